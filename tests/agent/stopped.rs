//! What is left in a process of an agent that was stopped there: nothing.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, header};
use http_body::Frame;
use tokio::net::TcpStream;
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;
use tonic::body::Body;
use tonic::transport::Endpoint;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use tower::ServiceExt as _;
use vfio_checkpoint_device::address::{
    Access, AdoptFailure, DeviceAddress, Keepsake, OpenFailure, Opened as OpenDevice,
};
use vfio_checkpoint_device::{
    ConfigSpace, DataSize, DataStream, DeviceCapabilities, DeviceError, DmaLog, Fingerprint, Identity,
    MigrationDevice,
};
use vfio_checkpoint_fsm::State;
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_server::environment::Environment;
use vfio_checkpoint_server::registry::hardware::{Hardware, Holding, Node};
use vfio_checkpoint_server::registry::keeper::KeeperError;
use vfio_checkpoint_server::serve::Agent;

use crate::faulty::Faulty;
use crate::flow::{done, give, restore_into, save, soon, start_restore};
use crate::lab::{Lab, PATIENCE, start};

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

/// A body that is never said to its end.
struct Unsaid;

impl http_body::Body for Unsaid {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Pending
    }
}

/// What is done to an agent before it is stopped, and in the middle of what: each door has a caller that does not leave.
async fn call(lab: &Lab, address: SocketAddr, health: SocketAddr, tell: oneshot::Sender<()>) {
    // In mid-handshake.
    let _silent = TcpStream::connect(address).await.unwrap();
    let saver = lab.client_at(address, "spiffe://lab.test/saver/test").await;
    let restorer = lab.client_at(address, "spiffe://lab.test/restorer/test").await;
    let saved = save(&saver, &["n0"]).await;
    let name = start_restore(&restorer, restore_into(&["n1"], &saved)).await;
    give(&restorer, &name, &saved).await;
    done(&restorer, &name).await;
    let mut watch = saver.watch_devices(v1::WatchDevicesRequest::default()).await.unwrap();
    soon(watch.next()).await.unwrap().unwrap();

    let plain = Endpoint::new(format!("http://{health}")).unwrap().connect().await.unwrap();
    let request = Request::post("/grpc.health.v1.Health/Check")
        .version(http::Version::HTTP_2)
        .header(header::CONTENT_TYPE, "application/grpc")
        .header(header::TE, "trailers")
        .body(Body::new(Unsaid))
        .unwrap();
    let unsaid = tokio::spawn(plain.clone().oneshot(request));
    let mut asking = HealthClient::new(plain);
    let mut told = asking.watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    soon(told.message()).await.unwrap().unwrap();
    // After the one that is not said to its end, on the same connection.
    asking.check(HealthCheckRequest::default()).await.unwrap();
    tell.send(()).unwrap();
    while let Ok(Some(_)) = watch.next().await {}
    while let Ok(Some(_)) = told.message().await {}
    let _ = unsaid.await;
}

/// On one thread, where whoever is told that a task is over is told so after it is.
#[tokio::test]
async fn no_task_of_an_agent_is_left_once_it_is_stopped() {
    let lab = Lab::new();
    let devices = [("n0", "sim:seed=1,memory=1MiB"), ("n1", "sim:seed=2,memory=1MiB")];
    let mut config = lab.config("a", &devices);
    config.server.health_listen = Some("127.0.0.1:0".parse().unwrap());
    let tasks = || Handle::current().metrics().num_alive_tasks();
    let before = tasks();
    let agent = start(config).await;
    let (address, health) = (agent.address(), agent.health_address().unwrap());
    // The callers' own tasks are not counted.
    let callers = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (tell, told) = oneshot::channel();
    callers.spawn(async move { call(&lab, address, health, tell).await });
    soon(told).await.unwrap();
    assert!(tasks() > before);
    soon(agent.stop()).await.unwrap();
    assert_eq!(tasks(), before);
    callers.shutdown_background();
}
