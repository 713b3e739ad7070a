//! What is left in a process of an agent that was stopped there: nothing.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use vfio_checkpoint_device::address::{
    Access, AdoptFailure, DeviceAddress, Keepsake, OpenFailure, Opened as OpenDevice,
};
use vfio_checkpoint_device::{
    ConfigSpace, DataSize, DataStream, DeviceCapabilities, DeviceError, DmaLog, Fingerprint, Identity,
    MigrationDevice,
};
use vfio_checkpoint_fsm::State;
use vfio_checkpoint_server::environment::Environment;
use vfio_checkpoint_server::registry::hardware::{Hardware, Holding, Node};
use vfio_checkpoint_server::registry::keeper::KeeperError;
use vfio_checkpoint_server::serve::Agent;

use crate::faulty::Faulty;
use crate::flow::soon;
use crate::lab::{Lab, PATIENCE};

/// A machine whose devices take their time to be closed: until the test says so.
#[derive(Debug)]
struct Slow {
    /// On which thread a device is being closed.
    closing: tokio::sync::mpsc::UnboundedSender<Option<String>>,
    closed: Arc<AtomicBool>,
    release: Arc<Mutex<mpsc::Receiver<()>>>,
}

#[derive(Debug)]
struct SlowDevice {
    inner: Box<dyn MigrationDevice>,
    closing: tokio::sync::mpsc::UnboundedSender<Option<String>>,
    closed: Arc<AtomicBool>,
    release: Arc<Mutex<mpsc::Receiver<()>>>,
}

impl Drop for SlowDevice {
    fn drop(&mut self) {
        let _ = self.closing.send(std::thread::current().name().map(str::to_owned));
        let _ = self.release.lock().unwrap().recv_timeout(PATIENCE);
        self.closed.store(true, Ordering::SeqCst);
    }
}

impl Hardware for Slow {
    fn open(&self, address: &DeviceAddress, access: Access) -> Result<OpenDevice, OpenFailure> {
        let opened = Node.open(address, access)?;
        let device = Box::new(SlowDevice {
            inner: opened.device,
            closing: self.closing.clone(),
            closed: Arc::clone(&self.closed),
            release: Arc::clone(&self.release),
        });
        Ok(OpenDevice { device, ..opened })
    }

    fn adopt(
        &self,
        address: &DeviceAddress,
        keepsake: Keepsake,
        access: Access,
    ) -> Result<OpenDevice, AdoptFailure> {
        Node.adopt(address, keepsake, access)
    }

    fn holder(&self, socket: &Path) -> Result<Box<dyn Holding>, KeeperError> {
        Node.holder(socket)
    }
}

impl MigrationDevice for SlowDevice {
    fn identity(&self) -> &Identity {
        self.inner.identity()
    }

    fn fingerprint(&self) -> &Fingerprint {
        self.inner.fingerprint()
    }

    fn capabilities(&self) -> &DeviceCapabilities {
        self.inner.capabilities()
    }

    fn state(&mut self) -> Result<State, DeviceError> {
        self.inner.state()
    }

    fn set_state(&mut self, target: State) -> Result<Option<DataStream>, DeviceError> {
        self.inner.set_state(target)
    }

    fn data_size(&mut self) -> Result<DataSize, DeviceError> {
        self.inner.data_size()
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        self.inner.reset()
    }

    fn dma_log(&mut self) -> Option<&mut dyn DmaLog> {
        self.inner.dma_log()
    }

    fn config_space(&mut self) -> Option<&mut dyn ConfigSpace> {
        self.inner.config_space()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_is_stopped_once_its_devices_are_closed_on_their_own_threads() {
    let lab = Lab::new();
    let (closing, mut begun) = tokio::sync::mpsc::unbounded_channel();
    let (release, until_released) = mpsc::channel();
    let (closed, until_released) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(until_released)));
    let hardware = Slow { closing, closed: Arc::clone(&closed), release: until_released };
    let faulty = Faulty::new();
    let environment = Environment { hardware: Arc::new(hardware), ..faulty.environment() };
    let mut config = lab.config("a", &[("n0", "sim:seed=1,memory=1MiB")]);
    // Nothing is under way, so that only the close of a device is waited for, and for no longer than this. It never passes.
    let grace = Duration::from_secs(77);
    config.server.shutdown_grace = grace;
    faulty.gate(grace);
    let agent = Agent::start(config, environment).await.unwrap();
    let stopping = tokio::spawn(agent.stop());
    assert_eq!(soon(begun.recv()).await.unwrap().as_deref(), Some("n0"));
    faulty.waits(grace, 1).await;
    assert!(!stopping.is_finished() && !closed.load(Ordering::SeqCst));
    release.send(()).unwrap();
    soon(stopping).await.unwrap().unwrap();
    assert!(closed.load(Ordering::SeqCst), "another agent can open it");
}
