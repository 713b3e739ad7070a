//! What most tests do with an agent: start, take, give, wait, and look at what was refused.
//!
//! Nothing here sleeps: a wait is for a change that the agent tells, and ends after [`PATIENCE`] in a failure.

use std::future::Future;
use std::io::{self, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use hyper_util::rt::TokioIo;
use prost_types::Duration as WireDuration;
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};
use vfio_checkpoint_client::call::{CallError, CallOptions, Client, Refusal, RetryPolicy};
use vfio_checkpoint_client::tls::{Credentials, ServerCheck, client_config};
use vfio_checkpoint_client::transfer::{Accepted, GiveState, TakeState, Taker};
use vfio_checkpoint_device::MigrationDevice;
use vfio_checkpoint_device::executor::VirtualTime;
use vfio_checkpoint_device::fault::{Fault, FaultyDevice};
use vfio_checkpoint_device::seal::Seal;
use vfio_checkpoint_device::sim::{SimConfig, SimDevice};
use vfio_checkpoint_device::vfio_user::server::{Server, ServerHandle, ServerOptions};
use vfio_checkpoint_proto::domain::{ConfigSpaceCapture, Manifest};
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_server::config::AgentConfig;
use vfio_checkpoint_server::environment::Environment;
use vfio_checkpoint_server::security::identity::Identity;
use vfio_checkpoint_server::serve::Agent;

use crate::lab::{Lab, PATIENCE, validity};

type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A request id that nobody else uses.
pub(crate) fn request_id(number: u32) -> String {
    format!("{number:08x}-0000-4000-8000-000000000000")
}

#[allow(clippy::unnecessary_wraps, reason = "as the fields of requests take it")]
pub(crate) fn millis(millis: u32) -> Option<WireDuration> {
    let nanos = i32::try_from(millis % 1000 * 1_000_000).unwrap();
    Some(WireDuration { seconds: i64::from(millis / 1000), nanos })
}

pub(crate) async fn soon<T>(event: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, event).await.expect("it did not come in time")
}

/// An agent on a runtime of its own, so that nothing of it is left once it was stopped.
pub(crate) struct Node {
    runtime: Runtime,
    agent: Agent,
}

impl Node {
    pub(crate) async fn start(config: &AgentConfig) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let starting = Agent::start(config.clone(), Environment::production());
        let agent = runtime.spawn(starting).await.unwrap().unwrap();
        Self { runtime, agent }
    }

    pub(crate) fn agent(&self) -> &Agent {
        &self.agent
    }

    /// Ends the agent as a signal does.
    pub(crate) async fn stop(self) {
        let Self { runtime, agent } = self;
        runtime.spawn(agent.stop()).await.unwrap().unwrap();
        Self::end(runtime).await;
    }

    /// Ends the agent without a word, as a crash does. What it did in memory is gone.
    pub(crate) async fn crash(self) {
        let Self { runtime, agent } = self;
        Self::end(runtime).await;
        drop(agent);
    }

    async fn end(runtime: Runtime) {
        tokio::task::spawn_blocking(move || runtime.shutdown_timeout(PATIENCE)).await.unwrap();
    }
}

/// A device behind a vfio-user socket in this process, so that a test can look at the device itself.
pub(crate) struct Bench {
    pub(crate) device: SimDevice,
    pub(crate) address: String,
    /// What the device tells time by: it stands still unless a test moves it.
    pub(crate) time: Arc<VirtualTime>,
    handle: ServerHandle,
    _folder: tempfile::TempDir,
}

impl Bench {
    pub(crate) fn new(config: SimConfig) -> Self {
        Self::with(config, &[])
    }

    /// A device that fails like this.
    pub(crate) fn with(config: SimConfig, faults: &[Fault]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("device.sock");
        let time = Arc::new(VirtualTime::default());
        let device = SimDevice::new(config, time.clone()).unwrap();
        let handle: Box<dyn MigrationDevice> = Box::new(device.open().unwrap());
        let served: Box<dyn MigrationDevice> = if faults.is_empty() {
            handle
        } else {
            Box::new(FaultyDevice::new(handle, faults, Arc::clone(&time)))
        };
        let listener = UnixListener::bind(&path).unwrap();
        let server = Server::new(served, listener, ServerOptions::default()).unwrap();
        let handle = server.handle();
        thread::spawn(move || server.run());
        Self { device, address: format!("vfio-user:{}", path.display()), time, handle, _folder: folder }
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.handle.stop();
    }
}

/// The line to a device in another process. Once it is cut no answer of the device's comes through, as when its process
/// stands still.
pub(crate) struct Line {
    pub(crate) address: String,
    is_cut: Arc<AtomicBool>,
    unheard: watch::Sender<usize>,
    _folder: tempfile::TempDir,
}

impl Line {
    pub(crate) fn to(bench: &Bench) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("line.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let device = bench.address.trim_start_matches("vfio-user:").to_owned();
        let is_cut = Arc::new(AtomicBool::new(false));
        let cut = Arc::clone(&is_cut);
        let unheard = watch::Sender::new(0);
        let told = unheard.clone();
        // Its threads end with their sockets, or with the test.
        thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                let Ok(far) = UnixStream::connect(&device) else { return };
                let (near_out, far_out) = (near.try_clone().unwrap(), far.try_clone().unwrap());
                thread::spawn(move || io::copy(&mut &near, &mut &far_out));
                let (cut, told) = (Arc::clone(&cut), told.clone());
                thread::spawn(move || carry(&far, &near_out, &cut, &told));
            }
        });
        Self { address: format!("vfio-user:{}", path.display()), is_cut, unheard, _folder: folder }
    }

    pub(crate) fn cut(&self) {
        self.is_cut.store(true, Ordering::Release);
    }

    /// Waits until somebody waits for an answer that does not come through.
    pub(crate) async fn keeps_waiting(&self) {
        let mut unheard = self.unheard.subscribe();
        soon(unheard.wait_for(|answers| *answers > 0)).await.unwrap();
    }
}

fn carry(
    mut from: &UnixStream,
    mut to: &UnixStream,
    is_cut: &AtomicBool,
    unheard: &watch::Sender<usize>,
) -> io::Result<()> {
    let mut bytes = [0; 4096];
    loop {
        let got = from.read(&mut bytes)?;
        if got == 0 {
            return to.shutdown(Shutdown::Both);
        }
        if is_cut.load(Ordering::Acquire) {
            unheard.send_modify(|answers| *answers += 1);
        } else {
            to.write_all(&bytes[..got])?;
        }
    }
}

/// A connection with nothing but TLS on it.
pub(crate) async fn connection(lab: &Lab, agent: &Agent, identity: &str) -> TlsStream<TcpStream> {
    soon(connector(lab, agent, identity)()).await.unwrap()
}

/// A channel without the client library, for what that would never say.
pub(crate) async fn channel(lab: &Lab, agent: &Agent, identity: &str) -> Channel {
    try_channel(lab, agent, identity).await.unwrap()
}

/// The same where the agent may not let it in.
pub(crate) async fn try_channel(
    lab: &Lab,
    agent: &Agent,
    identity: &str,
) -> Result<Channel, tonic::transport::Error> {
    let connect = connector(lab, agent, identity);
    let connect = move |_: tonic::transport::Uri| {
        let connecting = connect();
        async move { Ok::<_, io::Error>(TokioIo::new(connecting.await?)) }
    };
    let endpoint = Endpoint::from_static("http://agent.lab");
    soon(endpoint.connect_with_connector(tower::service_fn(connect))).await
}

fn connector(
    lab: &Lab,
    agent: &Agent,
    identity: &str,
) -> impl Fn() -> BoxFuture<'static, io::Result<TlsStream<TcpStream>>> + Send + Clone + 'static {
    let identity = Identity::Spiffe(identity.parse().unwrap());
    let issued = lab.ca.issue(&identity, &[], &[], validity()).unwrap();
    let authority = lab.ca.pem();
    let (certificate, key) = (issued.certificate_pem.as_bytes(), issued.key_pem());
    let credentials = Credentials::from_pem(certificate, key.as_bytes(), authority.as_bytes()).unwrap();
    let tls = client_config(credentials, &ServerCheck::Name(None)).unwrap();
    let address = agent.address();
    move || {
        let connector = TlsConnector::from(tls.clone());
        Box::pin(async move {
            let name = rustls_pki_types::ServerName::from(address.ip());
            connector.connect(name, TcpStream::connect(address).await?).await
        })
    }
}

/// A client that takes the first UNAVAILABLE for an answer.
pub(crate) fn at_once(client: Client) -> Client {
    let retry = RetryPolicy { attempts: 1, ..RetryPolicy::default() };
    client.with_call_options(CallOptions { retry, ..CallOptions::default() })
}

/// A save of these devices and nothing else said.
pub(crate) fn save_of(devices: &[&str]) -> v1::StartSaveRequest {
    v1::StartSaveRequest {
        devices: devices.iter().map(|name| format!("devices/{name}")).collect(),
        memory_capture: v1::MemoryCapture::None.into(),
        ..Default::default()
    }
}

/// A restore of this state into these devices and nothing else said.
pub(crate) fn restore_into(devices: &[&str], saved: &Saved) -> v1::RestoreRequest {
    v1::RestoreRequest {
        devices: devices.iter().map(|name| format!("devices/{name}")).collect(),
        manifest: Some(saved.manifest.clone().into()),
        // The saves of these tests leave their devices running.
        allow_fork: true,
        ..Default::default()
    }
}

pub(crate) async fn start_save(client: &Client, request: v1::StartSaveRequest) -> String {
    client.start_save(request).await.unwrap().operation.unwrap().name
}

pub(crate) async fn start_restore(client: &Client, request: v1::RestoreRequest) -> String {
    client.restore(request).await.unwrap().operation.unwrap().name
}

/// State that came out of devices.
#[derive(Clone)]
pub(crate) struct Saved {
    pub(crate) manifest: Manifest,
    /// Which device, and a piece of its state; in the order in which they came.
    pub(crate) pieces: Vec<(usize, bytes::Bytes)>,
    pub(crate) seals: Vec<(usize, Seal, Option<ConfigSpaceCapture>)>,
}

impl Saved {
    pub(crate) fn digests(&self) -> Vec<[u8; 32]> {
        self.seals.iter().map(|(_, seal, _)| seal.blake3).collect()
    }
}

/// Takes all of a save that was started.
pub(crate) async fn take(client: &Client, operation: &str) -> Saved {
    let TakeState { manifest, mut taker, .. } =
        TakeState::open(client, &operation.parse().unwrap()).await.unwrap();
    let saved = drain(manifest, &mut taker).await;
    soon(taker.complete()).await.unwrap();
    saved
}

/// Takes everything up to the last seal, and does not say that it is durable.
pub(crate) async fn drain(manifest: Manifest, taker: &mut Taker) -> Saved {
    let mut saved = Saved { manifest, pieces: Vec::new(), seals: Vec::new() };
    while let Some(accepted) = soon(taker.next()).await.unwrap() {
        match accepted {
            Accepted::Chunk { device, chunk } => saved.pieces.push((device, chunk.bytes().clone())),
            Accepted::Sealed { device, seal, config } => saved.seals.push((device, seal.seal(), config)),
            Accepted::Progress(_) => {}
        }
    }
    saved
}

/// Gives all of a restore that was started, and waits until the agent has it.
pub(crate) async fn give(client: &Client, operation: &str, saved: &Saved) {
    let GiveState { mut giver, .. } = GiveState::open(client, &operation.parse().unwrap()).await.unwrap();
    for (device, bytes) in &saved.pieces {
        giver.chunk(*device, bytes.clone()).await.unwrap();
    }
    for (device, seal, config) in &saved.seals {
        giver.seal_as(*device, *config, *seal).await.unwrap();
    }
    soon(giver.completed()).await.unwrap();
}

/// Saves devices, start to end, and leaves them running.
pub(crate) async fn save(client: &Client, devices: &[&str]) -> Saved {
    let operation = start_save(client, save_of(devices)).await;
    let saved = take(client, &operation).await;
    let ended = done(client, &operation).await;
    assert_eq!(ended.result(), v1::OperationResult::Succeeded, "{ended:?}");
    saved
}

/// The operation once it is over.
pub(crate) async fn done(client: &Client, operation: &str) -> v1::Operation {
    let operation = client.wait_operation(operation, PATIENCE).await.unwrap().operation.unwrap();
    assert!(operation.done, "it should be over: {operation:?}");
    operation
}

/// The operation once it is in `phase`.
pub(crate) async fn reached(client: &Client, operation: &str, phase: v1::OperationPhase) -> v1::Operation {
    let request = v1::WatchOperationRequest { name: operation.to_owned() };
    let mut watch = client.watch_operation(request).await.unwrap();
    let reaching = async {
        loop {
            let now = watch.next().await.unwrap().expect("the watch ended").operation.unwrap();
            if now.phase() == phase {
                return now;
            }
            assert!(!now.done, "it ended before {phase:?}: {now:?}");
        }
    };
    soon(reaching).await
}

pub(crate) async fn device(client: &Client, name: &str) -> v1::Device {
    let name = format!("devices/{name}");
    client.get_device(v1::GetDeviceRequest { name }).await.unwrap().device.unwrap()
}

pub(crate) fn failure(operation: &v1::Operation) -> &str {
    operation.failure.as_ref().map_or("", |failure| failure.reason.as_str())
}

/// Why a call was refused, which has to have this code and reason.
#[track_caller]
pub(crate) fn refused<T: std::fmt::Debug>(answer: Result<T, CallError>, code: Code, reason: &str) -> Refusal {
    let error = answer.expect_err("it should have been refused");
    let refusal = error.refusal().unwrap_or_else(|| panic!("not a refusal: {error}")).clone();
    assert_eq!((refusal.code, refusal.reason.as_deref()), (code, Some(reason)), "{refusal}");
    assert_eq!(refusal.retry_after.is_some(), code == Code::Unavailable, "{refusal}");
    assert!(!refusal.has_bad_details);
    refusal
}

/// A call was refused because of this field.
#[track_caller]
pub(crate) fn refused_field<T: std::fmt::Debug>(answer: Result<T, CallError>, field: &str) {
    let refusal = refused(answer, Code::InvalidArgument, "INVALID_FIELD");
    let fields: Vec<&str> = refusal.fields.iter().map(|problem| problem.field.as_str()).collect();
    assert_eq!(fields, [field], "{refusal}");
}

/// What was in the way of a call: reason and device of each.
pub(crate) fn violations(refusal: &Refusal) -> Vec<(String, String)> {
    refusal.blockers.iter().map(|blocker| (blocker.kind.clone(), blocker.subject.clone())).collect()
}
