//! A gRPC server on loopback that answers `StartSave` from a script and gives a stream of state. Its store, its devices
//! and its migrations have files of their own.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};
use std::vec::IntoIter;

use bytes::Bytes;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::RootCertStore;
use rustls::crypto::aws_lc_rs;
use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};
use tower::Service;
use vfio_checkpoint_client::transfer::{Giver, Link, LinkError, Terms};
use vfio_checkpoint_proto::domain::{Manifest, StreamLimits, StreamOpened};
use vfio_checkpoint_proto::ids::StreamId;
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_proto::v1::checkpoint_service_server::{CheckpointService, CheckpointServiceServer};
use vfio_checkpoint_proto::v1::device_service_server::DeviceServiceServer;
use vfio_checkpoint_proto::v1::migration_service_server::MigrationServiceServer;
use vfio_checkpoint_proto::v1::operation_service_server::{OperationService, OperationServiceServer};
use vfio_checkpoint_proto::v1::stream_message::Kind;
use vfio_checkpoint_proto::version::Version;

use crate::devices_of_agent::DevicesOfAgent;
use crate::moves::Moves;
use crate::pki::{Ca, Pair};
use crate::shelf::Shelf;

/// What a call came with.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    pub(crate) request: v1::StartSaveRequest,
    pub(crate) has_deadline: bool,
    pub(crate) traceparent: Option<String>,
}

#[derive(Clone, Default)]
pub(crate) struct Agent {
    /// What the operation is when it is waited for, or read.
    pub(crate) operation: Arc<Mutex<v1::Operation>>,
    /// What it is before that, one a call.
    pub(crate) course: Arc<Mutex<VecDeque<v1::Operation>>>,
    /// What is listed. Unset where that is not allowed.
    pub(crate) listed: Arc<Mutex<Option<Vec<v1::Operation>>>>,
    /// Answers of `StartSave`, one a call; after the last it succeeds.
    pub(crate) script: Arc<Mutex<VecDeque<Status>>>,
    pub(crate) calls: Arc<Mutex<Vec<Call>>>,
    /// Why the giver of a stream ended, if it did not complete.
    pub(crate) stream_ends: Arc<Mutex<Vec<Option<String>>>>,
    /// Its store.
    pub(crate) shelf: Shelf,
    /// Its devices.
    pub(crate) devices: DevicesOfAgent,
    /// Its migrations.
    pub(crate) moves: Moves,
}

impl Agent {
    pub(crate) fn with_script(script: Vec<Status>) -> Self {
        Self { script: Arc::new(Mutex::new(script.into())), ..Self::default() }
    }

    pub(crate) fn calls(&self) -> Vec<Call> {
        self.calls.lock().unwrap().clone()
    }

    /// Serves on a free port until the runtime ends.
    pub(crate) async fn serve(&self, own: &Pair, clients: &Ca) -> SocketAddr {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(clients.pem.as_bytes()).unwrap()).unwrap();
        let provider = Arc::new(aws_lc_rs::default_provider());
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build().unwrap();
        let certificate = CertificateDer::from_pem_slice(own.certificate.as_bytes()).unwrap();
        let key = PrivateKeyDer::from_pem_slice(own.key.as_bytes()).unwrap();
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_client_cert_verifier(verifier)
            .with_single_cert(vec![certificate], key)
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (reporter, health) = tonic_health::server::health_reporter();
        reporter.set_service_status("", tonic_health::ServingStatus::Serving).await;
        let service = (
            CheckpointServiceServer::new(self.clone()),
            OperationServiceServer::new(self.clone()),
            DeviceServiceServer::new(self.devices.clone()),
            MigrationServiceServer::new(self.moves.clone()),
            health,
        );
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let (acceptor, service) = (acceptor.clone(), service.clone());
                tokio::spawn(async move {
                    let Ok(tls) = acceptor.accept(tcp).await else { return };
                    let service = hyper::service::service_fn(move |request: http::Request<Incoming>| {
                        let (mut saves, mut operations, mut devices, mut moves, mut health) = service.clone();
                        async move {
                            match request.uri().path().split('/').nth(1).unwrap_or_default() {
                                "vfio.checkpoint.v1.OperationService" => operations.call(request).await,
                                "vfio.checkpoint.v1.DeviceService" => devices.call(request).await,
                                "vfio.checkpoint.v1.MigrationService" => moves.call(request).await,
                                "grpc.health.v1.Health" => health.call(request).await,
                                _ => saves.call(request).await,
                            }
                        }
                    });
                    let http2 = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                    // A client that leaves ends its connection in many ways, all of them fine.
                    drop(http2.serve_connection(TokioIo::new(tls), service).await);
                });
            }
        });
        address
    }
}

/// The state that is given: long enough for several chunks and acknowledgements.
pub(crate) fn state() -> Vec<u8> {
    (0..3_000_000_u32).map(|at| u8::try_from(at % 251).unwrap()).collect()
}

pub(crate) fn manifest() -> Manifest {
    let wire = v1::CheckpointManifest {
        format_version: 1,
        operation: "operations/1".to_owned(),
        create_time: Some(SystemTime::now().into()),
        devices: vec![v1::DeviceManifest {
            source_device: "devices/a".to_owned(),
            source_address: "sim:".to_owned(),
            backend: v1::Backend::Sim.into(),
            driver: "sim".to_owned(),
            fingerprint: Some(v1::Fingerprint::default()),
            logical_device: Some(v1::LogicalDevice { id: "ab".repeat(16), epoch: 1 }),
            data_size: Some(v1::DataSize { kind: v1::DataSizeKind::Unknown.into(), bytes: 0 }),
        }],
        source_disposition: v1::SourceDisposition::RunsOn.into(),
    };
    wire.try_into().unwrap()
}

type Messages = Pin<Box<dyn Stream<Item = Result<v1::StreamStateResponse, Status>> + Send>>;

#[tonic::async_trait]
impl CheckpointService for Agent {
    async fn get_checkpoint(
        &self,
        request: Request<v1::GetCheckpointRequest>,
    ) -> Result<Response<v1::GetCheckpointResponse>, Status> {
        let checkpoint = Some(self.shelf.get(&request.into_inner().name)?);
        Ok(Response::new(v1::GetCheckpointResponse { checkpoint }))
    }

    async fn list_checkpoints(
        &self,
        request: Request<v1::ListCheckpointsRequest>,
    ) -> Result<Response<v1::ListCheckpointsResponse>, Status> {
        self.shelf.list(&request.into_inner()).map(Response::new)
    }

    async fn delete_checkpoint(
        &self,
        request: Request<v1::DeleteCheckpointRequest>,
    ) -> Result<Response<v1::DeleteCheckpointResponse>, Status> {
        self.shelf.delete(&request.into_inner().name)?;
        Ok(Response::new(v1::DeleteCheckpointResponse {}))
    }

    type VerifyCheckpointStream = tokio_stream::Iter<IntoIter<Result<v1::VerifyCheckpointResponse, Status>>>;

    async fn verify_checkpoint(
        &self,
        request: Request<v1::VerifyCheckpointRequest>,
    ) -> Result<Response<Self::VerifyCheckpointStream>, Status> {
        Ok(Response::new(tokio_stream::iter(self.shelf.verify(&request.into_inner().name)?)))
    }

    type StreamStateStream = Messages;

    async fn start_save(
        &self,
        request: Request<v1::StartSaveRequest>,
    ) -> Result<Response<v1::StartSaveResponse>, Status> {
        let header = |name| request.metadata().get(name).map(|value| value.to_str().unwrap().to_owned());
        let (deadline, traceparent) = (header("grpc-timeout"), header("traceparent"));
        let request = request.into_inner();
        self.calls.lock().unwrap().push(Call { request, has_deadline: deadline.is_some(), traceparent });
        if let Some(status) = self.script.lock().unwrap().pop_front() {
            return Err(status);
        }
        let operation = v1::Operation { name: "operations/1".to_owned(), ..v1::Operation::default() };
        Ok(Response::new(v1::StartSaveResponse { operation: Some(operation), ..Default::default() }))
    }

    async fn stream_state(
        &self,
        request: Request<Streaming<v1::StreamStateRequest>>,
    ) -> Result<Response<Messages>, Status> {
        let mut requests = request.into_inner();
        let first =
            requests.message().await?.and_then(|request| request.message).and_then(|message| message.kind);
        let Some(Kind::Open(open)) = first else { return Err(Status::invalid_argument("no Open")) };
        if open.operation != "operations/1" {
            return Err(Status::not_found("no such operation"));
        }
        let limits = StreamLimits {
            max_chunk_bytes: 256 * 1024,
            max_device_bytes: 1 << 30,
            idle_timeout: Duration::from_secs(30),
            lifetime: Duration::from_mins(5),
            ack_interval_bytes: 512 * 1024,
            ack_delay: None,
        };
        let stream_id = StreamId(99);
        let version = Version(1);
        let opened = StreamOpened { version, stream_id, manifest: manifest(), limits, next_sequence: 0 };
        let (outgoing, queue) = Link::outgoing_channel();
        let message = v1::StreamMessage { kind: Some(Kind::Opened(opened.into())) };
        outgoing.send(message).await.map_err(|_| Status::internal("nobody sends"))?;
        let incoming = requests.map(|request| match request {
            Ok(request) => request.message.ok_or_else(|| LinkError::ended("empty")),
            Err(status) => Err(LinkError::failed("broken", status)),
        });
        let terms = Terms { version, stream: stream_id, devices: 1, limits };
        let mut giver = Giver::new(Link::new(incoming, outgoing), terms);
        let ends = self.stream_ends.clone();
        tokio::spawn(async move {
            let all = async {
                giver.chunk(0, Bytes::from(state())).await?;
                giver.seal(0, None).await?;
                giver.completed().await
            };
            let end = all.await.err().map(|error| error.to_string());
            ends.lock().unwrap().push(end);
        });
        let responses =
            ReceiverStream::new(queue).map(|message| Ok(v1::StreamStateResponse { message: Some(message) }));
        Ok(Response::new(Box::pin(responses)))
    }

    async fn restore(
        &self,
        request: Request<v1::RestoreRequest>,
    ) -> Result<Response<v1::RestoreResponse>, Status> {
        let request = request.into_inner();
        let operation = v1::Operation { name: "operations/1".to_owned(), ..v1::Operation::default() };
        let operation = (!request.validate_only).then_some(operation);
        self.shelf.restores.lock().unwrap().push(request);
        Ok(Response::new(v1::RestoreResponse { operation, ..Default::default() }))
    }

    async fn cutover(&self, _: Request<v1::CutoverRequest>) -> Result<Response<v1::CutoverResponse>, Status> {
        // Never answers: a call with a deadline has to end by itself.
        std::future::pending().await
    }

    async fn resume(&self, _: Request<v1::ResumeRequest>) -> Result<Response<v1::ResumeResponse>, Status> {
        Err(self.script.lock().unwrap().pop_front().unwrap_or_else(|| Status::unimplemented("not scripted")))
    }
}

#[tonic::async_trait]
impl OperationService for Agent {
    type WatchOperationStream =
        Pin<Box<dyn Stream<Item = Result<v1::WatchOperationResponse, Status>> + Send>>;

    async fn wait_operation(
        &self,
        _: Request<v1::WaitOperationRequest>,
    ) -> Result<Response<v1::WaitOperationResponse>, Status> {
        let next = self.course.lock().unwrap().pop_front();
        let operation = Some(next.unwrap_or_else(|| self.operation.lock().unwrap().clone()));
        Ok(Response::new(v1::WaitOperationResponse { operation }))
    }

    async fn cancel_operation(
        &self,
        _: Request<v1::CancelOperationRequest>,
    ) -> Result<Response<v1::CancelOperationResponse>, Status> {
        self.moves.scripted("CancelOperation")?;
        let mut operation = self.operation.lock().unwrap();
        if !operation.done {
            operation.done = true;
            operation.result = v1::OperationResult::Cancelled.into();
            operation.outcome = v1::StateOutcome::Preserved.into();
        }
        Ok(Response::new(v1::CancelOperationResponse { operation: Some(operation.clone()) }))
    }

    async fn get_operation(
        &self,
        _: Request<v1::GetOperationRequest>,
    ) -> Result<Response<v1::GetOperationResponse>, Status> {
        let operation = Some(self.operation.lock().unwrap().clone());
        Ok(Response::new(v1::GetOperationResponse { operation }))
    }

    async fn list_operations(
        &self,
        _: Request<v1::ListOperationsRequest>,
    ) -> Result<Response<v1::ListOperationsResponse>, Status> {
        let listed = self.listed.lock().unwrap().clone();
        let operations = listed.ok_or_else(|| Status::permission_denied("not for you"))?;
        Ok(Response::new(v1::ListOperationsResponse { operations, ..Default::default() }))
    }

    async fn watch_operation(
        &self,
        _: Request<v1::WatchOperationRequest>,
    ) -> Result<Response<Self::WatchOperationStream>, Status> {
        Err(Status::unimplemented("not part of these tests"))
    }
}
