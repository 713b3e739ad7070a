//! How an agent is served, and how it ends.
//!
//! ```text
//!   Listener (TLS, limits) --> trace --> authorize --> unread --> DeviceService, CheckpointService, OperationService,
//!                                                                 health, reflection
//!   health_listen (plain) --------------------------------------> health, nothing else
//!
//!   stop: admit nothing, NOT_SERVING --> undo what runs, leave what is held --> cut connections, end tasks --> close
//! ```
//! # Failure paths
//! What is still under way when the grace is over is left to the agent's next start, which the journal and the holder
//! make safe; that is also how a kill ends.

mod end;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio_stream::Stream;

use tonic::server::NamedService;
use tonic::transport::Server;
use tonic_health::pb::health_server::{Health, HealthServer};
use tonic_health::server::HealthReporter;
use vfio_checkpoint_client::network;
use vfio_checkpoint_device::chain;
use vfio_checkpoint_proto::MAX_REQUEST_BYTES;
use vfio_checkpoint_proto::v1::FILE_DESCRIPTOR_SET;
use vfio_checkpoint_proto::v1::checkpoint_service_server::CheckpointServiceServer;
use vfio_checkpoint_proto::v1::device_service_server::DeviceServiceServer;
use vfio_checkpoint_proto::v1::migration_service_server::MigrationServiceServer;
use vfio_checkpoint_proto::v1::operation_service_server::OperationServiceServer;

use crate::boot::{BootError, boot};
use crate::config::AgentConfig;
use crate::core::Core;
use crate::counted::{Count, Counted, counted};
use crate::environment::Environment;
use crate::rpc::{Bulk, Checkpoints, Devices, Migrations, OperationsService, UnreadLayer};
use crate::security::accept::{AcceptLimits, Listener};
use crate::security::authorize::AuthorizeLayer;
use crate::security::clock::EnvironmentClock;
use crate::security::files::{TlsError, TlsFiles};
use crate::security::peers::{PeerLimits, PeerRegistry};
use crate::security::reload::TlsSource;
use crate::security::roles::{Policy, PolicyHandle};
use crate::telemetry::TraceLayer;
use end::{LAST_CALLS, close, left, shut, undo_all};

/// What a stream may have under way before its reader must say that it goes on. Enough for a fast link, and the bound on
/// what a peer that sends and never listens can make the agent keep.
const STREAM_WINDOW_BYTES: u32 = 8 << 20;
/// The same for a connection.
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
/// A chunk of the usual length comes in one frame, and so in one piece of memory.
const FRAME_BYTES: u32 = 1 << 20;
/// Streams that a peer opened and reset before they were looked at.
const MAX_PENDING_RESETS: usize = 32;
/// Streams that were reset here because of what the peer did.
const MAX_LOCAL_ERROR_RESETS: usize = 64;

/// Why an agent is not served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// An address cannot be listened on.
    #[error("cannot listen on {address}")]
    Listen {
        /// Which one.
        address: SocketAddr,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The certificates.
    #[error("the certificates cannot be used")]
    Tls(#[from] TlsError),
    /// The agent cannot begin.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// gRPC.
    #[error("the gRPC service cannot go on")]
    Grpc(#[source] tonic::transport::Error),
    /// The reflection service cannot be made.
    #[error("the reflection service cannot be made")]
    Reflection(#[source] tonic_reflection::server::Error),
    /// A task died.
    #[error("the service died, which is a defect to report")]
    Died,
}

/// The runtime that an agent is served on.
pub fn runtime(worker_threads: Option<usize>) -> io::Result<Runtime> {
    let half = || std::thread::available_parallelism().map_or(1, |processors| processors.get().div_ceil(2));
    let workers = worker_threads.unwrap_or_else(half);
    Builder::new_multi_thread().worker_threads(workers).enable_all().build()
}

/// An agent that is served.
#[derive(Debug)]
pub struct Agent {
    core: Arc<Core>,
    address: SocketAddr,
    health_address: Option<SocketAddr>,
    reporter: HealthReporter,
    telling: JoinHandle<()>,
    tls: TlsSource,
    policy: PolicyHandle,
    peers: PeerRegistry,
    stop: watch::Sender<bool>,
    serving: JoinHandle<Result<(), tonic::transport::Error>>,
    accepting: JoinHandle<()>,
    health: Option<(JoinHandle<()>, Count)>,
    helpers: JoinSet<()>,
}

impl Agent {
    /// Whether an agent could begin, as far as that can be told without touching a device.
    pub fn check(config: &AgentConfig) -> Result<(), ServeError> {
        tls_source(config, &Environment::production()).map(|_| ())
    }

    /// Brings an agent up. It is served when this returns.
    pub async fn start(config: AgentConfig, environment: Environment) -> Result<Self, ServeError> {
        let config = Arc::new(config);
        // What can be wrong without a device being touched comes first.
        let tls = tls_source(&config, &environment)?;
        let listening = listen(&environment, config.server.listen).await?;
        let health_listening = match config.server.health_listen {
            Some(address) => Some(listen(&environment, address).await?),
            None => None,
        };
        let core = boot(Arc::clone(&config), environment, Some(tls.clone())).await?;

        let server = &config.server;
        let (peers, enforcing) = PeerRegistry::new(
            tls.clone(),
            PeerLimits {
                max_connections: server.max_connections,
                // Whoever has a certificate must not be able to lock everybody else out.
                max_connections_per_identity: Some(server.max_connections.div_ceil(4)),
            },
        );
        let limits = AcceptLimits { handshake_timeout: server.handshake_timeout, ..AcceptLimits::default() };
        let listener = Listener::new(listening, tls.clone(), peers.clone(), limits);
        let address =
            listener.local_addr().map_err(|source| ServeError::Listen { address: server.listen, source })?;
        let policy = core.policy.clone();
        let (reporter, health) = tonic_health::server::health_reporter();
        set_serving(&reporter).await;
        let (stop, stopped) = watch::channel(false);

        let checkpoints = Checkpoints::new(Arc::clone(&core));
        let routes = Server::builder()
            .max_concurrent_streams(server.max_concurrent_streams)
            .http2_max_header_list_size(server.max_header_bytes)
            .http2_max_pending_accept_reset_streams(Some(MAX_PENDING_RESETS))
            .http2_max_local_error_reset_streams(Some(MAX_LOCAL_ERROR_RESETS))
            .http2_keepalive_interval(Some(server.keepalive_interval))
            .http2_keepalive_timeout(Some(server.keepalive_timeout))
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_frame_size(FRAME_BYTES)
            .tcp_nodelay(true)
            .layer(TraceLayer)
            .layer(AuthorizeLayer::new(policy.clone()))
            .layer(UnreadLayer)
            .add_service(
                DeviceServiceServer::new(Devices::new(Arc::clone(&core)))
                    .max_decoding_message_size(MAX_REQUEST_BYTES),
            )
            .add_service(Bulk::new(
                CheckpointServiceServer::new(checkpoints.clone())
                    .max_decoding_message_size(MAX_REQUEST_BYTES),
                checkpoints,
            ))
            .add_service(
                MigrationServiceServer::new(Migrations::new(Arc::clone(&core)))
                    .max_decoding_message_size(MAX_REQUEST_BYTES),
            )
            .add_service(
                OperationServiceServer::new(OperationsService::new(Arc::clone(&core)))
                    .max_decoding_message_size(MAX_REQUEST_BYTES),
            )
            .add_service(health.clone())
            .add_service(
                tonic_reflection::server::Builder::configure()
                    .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
                    .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
                    .build_v1()
                    .map_err(ServeError::Reflection)?,
            );
        let (incoming, accepting) = listener.incoming();
        let accepting = tokio::spawn(accepting);
        let serving = tokio::spawn(routes.serve_with_incoming_shutdown(incoming, said(stopped.clone())));

        let telling = tokio::spawn(tell_of_journal(core.journal.failing(), reporter.clone()));
        let mut helpers = JoinSet::new();
        helpers.spawn(enforcing);
        let interval = config.tls.reload_interval.unwrap_or(DEFAULT_RELOAD);
        helpers.spawn(tls.clone().poll(interval));
        let health_address = health_listening.as_ref().and_then(|listening| listening.local_address().ok());
        let health = health_listening.map(|listening| {
            let count = Count::new();
            let incoming = counted(listening, count.clone());
            (tokio::spawn(serve_health(incoming, health, said(stopped))), count)
        });
        let shown = health_address.map(tracing::field::display);
        tracing::info!(%address, health_address = shown, devices = config.devices.len(), "serving");
        Ok(Self {
            core,
            address,
            health_address,
            reporter,
            telling,
            tls,
            policy,
            peers,
            stop,
            serving,
            accepting,
            health,
            helpers,
        })
    }

    /// Where it is served.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where probes are answered without TLS.
    pub fn health_address(&self) -> Option<SocketAddr> {
        self.health_address
    }

    /// What it works on.
    pub fn core(&self) -> &Arc<Core> {
        &self.core
    }

    /// Its certificates, to be read again.
    pub fn tls(&self) -> &TlsSource {
        &self.tls
    }

    /// Puts another policy in force. Whoever loses a role by it is cut off, in the middle of a stream; what it may do still
    /// it does over a new connection. Returns how many connections that were.
    pub fn set_policy(&self, policy: Policy) -> usize {
        let (before, now) = (self.policy.current(), policy.clone());
        // First, so that nobody who comes back comes back under the old one.
        self.policy.replace(policy);
        self.peers.cut("a role was taken away from the peer", |who| {
            !now.roles_of(who).contains_all(before.roles_of(who))
        })
    }

    /// Ready once the service has ended by itself, which it should not.
    pub async fn failed(&mut self) -> ServeError {
        match (&mut self.serving).await {
            Ok(Err(error)) => ServeError::Grpc(error),
            Ok(Ok(())) | Err(_) => ServeError::Died,
        }
    }

    /// Ends it: nothing is admitted any more, what runs is undone, what is held stays held where a holder keeps its
    /// devices, and is undone where none does. When this returns its connections and tasks are over, its devices are closed
    /// and so is its journal: another agent can begin.
    pub async fn stop(self) -> Result<(), ServeError> {
        let Self { core, reporter, telling, peers, stop, serving, accepting, health, mut helpers, .. } = self;
        let grace = core.config.server.shutdown_grace;
        core.begin_ending();
        telling.abort();
        // That it is over is all that is of interest: from here on nobody else says how the agent is.
        let _ = telling.await;
        set_not_serving(&reporter).await;
        tokio::select! {
            biased;
            () = undo_all(&core) => {}
            () = core.environment.sleep(grace) => {
                tracing::warn!("the grace is over; what is still under way is taken up at the next start");
            }
        }
        clear_status(reporter).await;
        stop.send_replace(true);
        // Watchers and waiters may hold their calls for ever.
        let environment = core.environment.clone();
        let late = async move { environment.sleep(LAST_CALLS).await }.boxed().shared();
        let ended = shut(serving, late.clone()).await;
        peers.cut("the agent ends", |_| true);
        let health = match health {
            Some((serving, count)) => {
                // How it ended it has said.
                let _ = shut(serving, late).await;
                Some(count)
            }
            None => None,
        };
        core.tasks.end().await;
        left(&core.environment, &peers, health).await;
        // It was over when there was nobody left to accept for.
        let _ = accepting.await;
        helpers.shutdown().await;
        close(core, grace).await;
        match ended {
            None | Some(Ok(Ok(()))) => Ok(()),
            Some(Ok(Err(error))) => Err(ServeError::Grpc(error)),
            Some(Err(_)) => Err(ServeError::Died),
        }
    }
}

/// How often certificates are read again, where nothing is configured.
const DEFAULT_RELOAD: Duration = Duration::from_secs(30);

fn tls_source(config: &AgentConfig, environment: &Environment) -> Result<TlsSource, ServeError> {
    let files = TlsFiles {
        certificate: config.tls.certificate.clone(),
        key: config.tls.key.clone(),
        client_ca: config.tls.client_ca.clone(),
        crls: config.tls.crls.clone(),
    };
    let clock = Arc::new(EnvironmentClock(environment.clone()));
    Ok(TlsSource::load(files, clock, environment.clone())?)
}

async fn listen(
    environment: &Environment,
    address: SocketAddr,
) -> Result<Box<dyn network::Listener>, ServeError> {
    environment.network.listen(address).await.map_err(|source| ServeError::Listen { address, source })
}

async fn said(mut stopped: watch::Receiver<bool>) {
    // A sender that is gone is an agent that is gone.
    let _ = stopped.wait_for(|stop| *stop).await;
}

/// The plain listener. It has a single service, and small limits: whoever reaches the port can call it.
async fn serve_health<H: Health>(
    incoming: impl Stream<Item = io::Result<Counted>>,
    health: HealthServer<H>,
    stopped: impl Future<Output = ()>,
) {
    let served = Server::builder()
        .max_concurrent_streams(16)
        .http2_max_header_list_size(8 << 10)
        .http2_max_pending_accept_reset_streams(Some(MAX_PENDING_RESETS))
        .http2_max_local_error_reset_streams(Some(MAX_LOCAL_ERROR_RESETS))
        .http2_keepalive_interval(Some(Duration::from_secs(20)))
        .max_connection_age(Duration::from_mins(5))
        .max_connection_age_grace(Duration::from_secs(5))
        .add_service(health.max_decoding_message_size(4 << 10))
        .serve_with_incoming_shutdown(incoming, stopped)
        .await;
    if let Err(error) = served {
        tracing::error!(error = %chain(&error), "the health listener ended");
    }
}

async fn set_serving(reporter: &HealthReporter) {
    reporter.set_serving::<DeviceServiceServer<Devices>>().await;
    reporter.set_serving::<CheckpointServiceServer<Checkpoints>>().await;
    reporter.set_serving::<MigrationServiceServer<Migrations>>().await;
    reporter.set_serving::<OperationServiceServer<OperationsService>>().await;
}

/// Says that the agent is not serving while its journal cannot be written: it refuses whatever is new.
async fn tell_of_journal(mut failing: watch::Receiver<bool>, reporter: HealthReporter) {
    // It ends with the journal.
    while failing.changed().await.is_ok() {
        let fails = *failing.borrow_and_update();
        if fails {
            set_not_serving(&reporter).await;
        } else {
            reporter.set_service_status("", tonic_health::ServingStatus::Serving).await;
            set_serving(&reporter).await;
        }
    }
}

/// Ends the calls of those who watch it.
async fn clear_status(mut reporter: HealthReporter) {
    for service in [
        "",
        DeviceServiceServer::<Devices>::NAME,
        CheckpointServiceServer::<Checkpoints>::NAME,
        MigrationServiceServer::<Migrations>::NAME,
        OperationServiceServer::<OperationsService>::NAME,
    ] {
        reporter.clear_service_status(service).await;
    }
}

async fn set_not_serving(reporter: &HealthReporter) {
    let status = tonic_health::ServingStatus::NotServing;
    reporter.set_service_status("", status).await;
    reporter.set_not_serving::<DeviceServiceServer<Devices>>().await;
    reporter.set_not_serving::<CheckpointServiceServer<Checkpoints>>().await;
    reporter.set_not_serving::<MigrationServiceServer<Migrations>>().await;
    reporter.set_not_serving::<OperationServiceServer<OperationsService>>().await;
}
