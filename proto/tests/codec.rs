//! The generated client and server against each other, in one process: what the codec between them refuses.

use std::io::Write as _;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tonic::{Code, Request, Response, Status, Streaming};
use vfio_checkpoint_proto::parts::MAX_REQUEST_PARTS;
use vfio_checkpoint_proto::v1::checkpoint_service_client::CheckpointServiceClient;
use vfio_checkpoint_proto::v1::checkpoint_service_server::{CheckpointService, CheckpointServiceServer};
use vfio_checkpoint_proto::{MAX_CHUNK_BYTES, v1};

/// Says how many devices a restore has, and how often it was asked anything.
#[derive(Debug, Default)]
struct Counter(Arc<AtomicUsize>);

#[tonic::async_trait]
impl CheckpointService for Counter {
    type StreamStateStream = Pin<
        Box<dyn tonic::codegen::tokio_stream::Stream<Item = Result<v1::StreamStateResponse, Status>> + Send>,
    >;

    async fn start_save(
        &self,
        _: Request<v1::StartSaveRequest>,
    ) -> Result<Response<v1::StartSaveResponse>, Status> {
        Err(Status::unimplemented("not asked for here"))
    }

    async fn stream_state(
        &self,
        request: Request<Streaming<v1::StreamStateRequest>>,
    ) -> Result<Response<Self::StreamStateStream>, Status> {
        let mut messages = request.into_inner();
        while let Some(message) = messages.message().await? {
            self.0.fetch_add(1, Ordering::Relaxed);
            drop(message);
        }
        Ok(Response::new(Box::pin(tonic::codegen::tokio_stream::empty())))
    }

    async fn restore(
        &self,
        request: Request<v1::RestoreRequest>,
    ) -> Result<Response<v1::RestoreResponse>, Status> {
        self.0.fetch_add(1, Ordering::Relaxed);
        let count = request.into_inner().manifest.unwrap_or_default().devices.len();
        Ok(Response::new(v1::RestoreResponse {
            blockers: vec![v1::Blocker::default(); count],
            operation: None,
        }))
    }

    async fn cutover(&self, _: Request<v1::CutoverRequest>) -> Result<Response<v1::CutoverResponse>, Status> {
        Err(Status::unimplemented("not asked for here"))
    }

    async fn get_checkpoint(
        &self,
        _: Request<v1::GetCheckpointRequest>,
    ) -> Result<Response<v1::GetCheckpointResponse>, Status> {
        Err(Status::unimplemented("not asked for here"))
    }

    async fn list_checkpoints(
        &self,
        _: Request<v1::ListCheckpointsRequest>,
    ) -> Result<Response<v1::ListCheckpointsResponse>, Status> {
        Err(Status::unimplemented("not asked for here"))
    }

    async fn delete_checkpoint(
        &self,
        _: Request<v1::DeleteCheckpointRequest>,
    ) -> Result<Response<v1::DeleteCheckpointResponse>, Status> {
        Err(Status::unimplemented("not asked for here"))
    }

    type VerifyCheckpointStream =
        tonic::codegen::tokio_stream::Empty<Result<v1::VerifyCheckpointResponse, Status>>;

    async fn verify_checkpoint(
        &self,
        _: Request<v1::VerifyCheckpointRequest>,
    ) -> Result<Response<Self::VerifyCheckpointStream>, Status> {
        Err(Status::unimplemented("not asked for here"))
    }

    async fn resume(&self, _: Request<v1::ResumeRequest>) -> Result<Response<v1::ResumeResponse>, Status> {
        Err(Status::unimplemented("not asked for here"))
    }
}

fn client() -> (CheckpointServiceClient<CheckpointServiceServer<Counter>>, Arc<AtomicUsize>) {
    let calls = Arc::new(AtomicUsize::new(0));
    (CheckpointServiceClient::new(CheckpointServiceServer::new(Counter(Arc::clone(&calls)))), calls)
}

fn manifest(devices: usize) -> v1::CheckpointManifest {
    v1::CheckpointManifest { devices: vec![v1::DeviceManifest::default(); devices], ..Default::default() }
}

#[test]
fn a_request_of_too_many_parts_never_reaches_its_handler() {
    let (mut client, calls) = client();
    let mut restore = |devices| {
        let manifest = Some(manifest(devices));
        pollster::block_on(client.restore(v1::RestoreRequest { manifest, ..Default::default() }))
    };
    let answer = restore(MAX_REQUEST_PARTS).unwrap().into_inner();
    assert_eq!(answer.blockers.len(), MAX_REQUEST_PARTS, "as many as are allowed go both ways");
    let refused = restore(MAX_REQUEST_PARTS + 1).unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(refused.message().contains("RestoreRequest has more than 8192 entries"), "{refused}");
    assert_eq!(calls.load(Ordering::Relaxed), 1, "the second one was not decoded");
}

#[test]
fn a_message_on_a_stream_is_counted_too_and_the_longest_chunk_passes() {
    let opened = v1::StreamOpened { manifest: Some(manifest(MAX_REQUEST_PARTS + 1)), ..Default::default() };
    let data = vec![7; MAX_CHUNK_BYTES as usize].into();
    let chunk = v1::frame::Body::Chunk(v1::Chunk { offset: u64::MAX, data });
    let frame = v1::Frame { stream_id: 1, sequence: u64::MAX, device: 1, crc32c: 1, body: Some(chunk) };
    let [opened, frame] = [v1::stream_message::Kind::Opened(opened), v1::stream_message::Kind::Frame(frame)]
        .map(|kind| v1::StreamStateRequest::from(v1::StreamMessage { kind: Some(kind) }));
    assert!(prost::Message::encoded_len(&frame) <= vfio_checkpoint_proto::MAX_MESSAGE_BYTES);

    let (mut client, calls) = client();
    let sent = tonic::codegen::tokio_stream::iter([frame.clone(), frame, opened]);
    let refused = pollster::block_on(client.stream_state(sent)).unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert_eq!(calls.load(Ordering::Relaxed), 2, "both chunks passed under the default limit of 4 MiB");
    let _ =
        writeln!(std::io::stdout(), "\nfigures: codec: {MAX_REQUEST_PARTS} parts pass, one more is refused");
}
