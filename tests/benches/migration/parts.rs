//! What the processes of the benchmark are, beside the one that measures: agents, holders, devices, and the far end of a
//! link.
//!
//! Each ends when nobody tells it anything any more, so none outlives the process that measures.

use std::io::Read as _;
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use vfio_checkpoint_device::Threads;
use vfio_checkpoint_device::sim::{SimConfig, SimDevice};
use vfio_checkpoint_device::vfio_user::server::{Server, ServerOptions, SocketFile};
use vfio_checkpoint_server::config::AgentConfig;
use vfio_checkpoint_server::holder::{self, HolderOptions};
use vfio_checkpoint_server::serve::Agent;

use crate::child::{runtime, tell, told};
use crate::timed::Timed;

/// An agent. Each line that it is told is answered with what it has done since the last.
pub(crate) fn agent(config: &Path) {
    let config: AgentConfig = serde_json::from_slice(&std::fs::read(config).unwrap()).unwrap();
    let timed = Timed::new();
    runtime().block_on(async {
        let agent = Agent::start(config, timed.environment()).await.unwrap();
        // One device is watched; where there are several, nobody asks what they did.
        if let Some(device) = agent.core().registry.all().next().and_then(|slot| slot.sim()) {
            timed.watch(device);
        }
        tell(&agent.address().to_string());
        while tokio::task::spawn_blocking(told).await.unwrap() {
            tell(&timed.line());
        }
        agent.stop().await.unwrap();
    });
}

/// A process that keeps devices open while an agent is away.
pub(crate) fn hold(socket: &Path) {
    let options = HolderOptions { socket: socket.to_owned(), max_devices: 16 };
    ends_with_its_teller();
    holder::run(options).unwrap();
}

/// A simulated device, served on a socket.
pub(crate) fn device(socket: &Path, settings: &str) {
    let config = SimConfig::from_spec(settings).unwrap();
    let device = SimDevice::new(config, Arc::new(Threads::new())).unwrap().open().unwrap();
    let (_file, listener) = SocketFile::bind(socket).unwrap();
    let server = Server::new(Box::new(device), listener, ServerOptions::default()).unwrap();
    tell("listening");
    ends_with_its_teller();
    server.run().unwrap();
}

fn ends_with_its_teller() {
    std::thread::spawn(|| {
        while told() {}
        std::process::exit(0);
    });
}

/// The far end of a link: takes bytes, and says how many a second came.
pub(crate) fn take(address: &str) {
    let listener = TcpListener::bind(address).unwrap();
    tell(&listener.local_addr().unwrap().to_string());
    let (mut stream, _) = listener.accept().unwrap();
    let mut buffer = vec![0; 1 << 18];
    let (begun, mut bytes) = (Instant::now(), 0.0);
    while let Ok(got @ 1..) = stream.read(&mut buffer) {
        bytes += f64::from(u32::try_from(got).unwrap());
    }
    tell(&(bytes / begun.elapsed().as_secs_f64()).to_string());
    while told() {}
}
