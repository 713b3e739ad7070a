//! Refusals that many methods have in common, of each of these methods: what a call names is not there, is of another kind,
//! cannot be reached or recorded, or the agent is going.
//!
//! What only one method refuses is in the file of that method. `reasons.rs` holds that each reason is somewhere.

use bytes::Bytes;
use prost::Message;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use tonic_prost::ProstCodec;
use vfio_checkpoint_client::call::Refusal;
use vfio_checkpoint_device::sim::{SimConfig, SimDma};
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_server::config::StoreConfig;
use vfio_checkpoint_server::serve::Agent;

use crate::flow::{Bench, channel, device, done, request_id, restore_into, save, save_of, soon, start_save};
use crate::lab::{Lab, start};
use crate::reasons::for_everything;
use crate::stored::{photos, store_at};

const DEVICE: &str = "devices/n9";
const OPERATION: &str = "operations/00000000000-0000000000000000";
const CHECKPOINT: &str = "checkpoints/019aa7b4c10-5c0ffee15c0ffee1";

/// A call: its method, and its request as it is sent.
struct Ask(&'static str, Vec<u8>);

fn ask(method: &'static str, request: &impl Message) -> Ask {
    Ask(method, request.encode_to_vec())
}

/// Calls, up to the first thing that is answered.
async fn call(channel: &Channel, Ask(method, request): &Ask) -> Result<(), Status> {
    let mut grpc = tonic::client::Grpc::new(channel.clone());
    soon(grpc.ready()).await.unwrap();
    let path = PathAndQuery::try_from(format!("/vfio.checkpoint.v1.{method}")).unwrap();
    let request = Request::new(tokio_stream::once(Encoded(request.clone())));
    let answer = soon(grpc.streaming(request, path, ProstCodec::<Encoded, Encoded>::default())).await?;
    soon(answer.into_inner().message()).await?;
    Ok(())
}

/// A message that is encoded already, or stays so.
#[derive(Debug, Default)]
struct Encoded(Vec<u8>);

impl Message for Encoded {
    fn encode_raw(&self, buf: &mut impl bytes::BufMut) {
        buf.put_slice(&self.0);
    }

    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: prost::encoding::WireType,
        buf: &mut impl bytes::Buf,
        ctx: prost::encoding::DecodeContext,
    ) -> Result<(), prost::DecodeError> {
        prost::encoding::skip_field(wire_type, tag, buf, ctx)
    }

    fn encoded_len(&self) -> usize {
        self.0.len()
    }

    fn clear(&mut self) {
        self.0.clear();
    }
}

/// Each of these calls is refused so.
async fn all_refused(channel: &Channel, asks: &[Ask], code: Code, reason: &str) {
    for ask in asks {
        let status = call(channel, ask).await.expect_err(ask.0);
        let refusal = Refusal::from_status("any", &status);
        assert_eq!((refusal.code, refusal.reason.as_deref()), (code, Some(reason)), "{}: {refusal}", ask.0);
        assert!(!refusal.message.is_empty() && !refusal.has_bad_details, "{}: {refusal}", ask.0);
    }
}

async fn admin(lab: &Lab, agent: &Agent) -> Channel {
    channel(lab, agent, "spiffe://lab.test/admin/test").await
}

fn restore_out_of(checkpoint: &str) -> v1::RestoreRequest {
    let devices = vec!["devices/n0".to_owned()];
    v1::RestoreRequest { devices, checkpoint: checkpoint.to_owned(), ..Default::default() }
}

/// What names a store, or a checkpoint in it.
fn of_checkpoints(store: &str) -> Vec<Ask> {
    let checkpoint = format!("{store}/{CHECKPOINT}");
    vec![
        ask("CheckpointService/Restore", &restore_out_of(&checkpoint)),
        ask("CheckpointService/GetCheckpoint", &v1::GetCheckpointRequest { name: checkpoint.clone() }),
        ask("CheckpointService/DeleteCheckpoint", &v1::DeleteCheckpointRequest { name: checkpoint.clone() }),
        ask("CheckpointService/VerifyCheckpoint", &v1::VerifyCheckpointRequest { name: checkpoint }),
    ]
}

fn list(store: &str) -> Ask {
    let request = v1::ListCheckpointsRequest { parent: store.to_owned(), ..Default::default() };
    ask("CheckpointService/ListCheckpoints", &request)
}

fn save_into(store: &str) -> Ask {
    let request = v1::StartSaveRequest { store: store.to_owned(), ..save_of(&["n0"]) };
    ask("CheckpointService/StartSave", &request)
}

/// Everything that names an operation, and who may call it.
fn of_operation(operation: &str) -> Vec<Ask> {
    let (name, operation) = (operation.to_owned(), operation.to_owned());
    vec![
        ask("OperationService/GetOperation", &v1::GetOperationRequest { name: name.clone() }),
        ask("OperationService/CancelOperation", &v1::CancelOperationRequest { name: name.clone() }),
        ask(
            "OperationService/WaitOperation",
            &v1::WaitOperationRequest { name: name.clone(), timeout: None },
        ),
        ask("OperationService/WatchOperation", &v1::WatchOperationRequest { name }),
        ask("CheckpointService/Cutover", &v1::CutoverRequest { operation: operation.clone() }),
        ask("CheckpointService/Resume", &v1::ResumeRequest { operation }),
    ]
}

/// Everything that is for migrations, or arrivals, alone.
fn of_migration(operation: &str) -> Vec<Ask> {
    let operation = operation.to_owned();
    let resolve = v1::ResolveRequest {
        operation: operation.clone(),
        resolution: v1::Resolution::ResumeHere.into(),
        ..Default::default()
    };
    vec![
        ask("MigrationService/Commit", &v1::CommitRequest { operation: operation.clone() }),
        ask("MigrationService/Ready", &v1::ReadyRequest { operation }),
        ask("MigrationService/Resolve", &resolve),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_is_said_by_every_method_that_names_it() {
    let lab = Lab::new();
    let agent = start(for_everything(lab.config("a", &[("n0", "sim:seed=1,memory=1MiB")]))).await;
    let channel = admin(&lab, &agent).await;
    all_refused(&channel, &of_operation(OPERATION), Code::NotFound, "OPERATION_NOT_FOUND").await;
    all_refused(&channel, &of_migration(OPERATION), Code::NotFound, "OPERATION_NOT_FOUND").await;
    all_refused(&channel, &of_checkpoints("stores/local"), Code::NotFound, "CHECKPOINT_NOT_FOUND").await;
    let mut cold = of_checkpoints("stores/cold");
    cold.extend([list("stores/cold"), save_into("stores/cold")]);
    all_refused(&channel, &cold, Code::NotFound, "STORE_NOT_FOUND").await;

    let name = DEVICE.to_owned();
    let reset = v1::ResetDeviceRequest {
        name: name.clone(),
        mode: v1::ResetMode::KeepState.into(),
        ..Default::default()
    };
    let viewer = lab.client(&agent, "viewer").await;
    let own = viewer.get_agent(v1::GetAgentRequest {}).await.unwrap();
    let admission = v1::AdmitRequest {
        logical_devices: vec![device(&viewer, "n0").await.logical_device.unwrap()],
        devices: vec![name.clone()],
        source_key_sha256: own.key_sha256.clone(),
        ..Default::default()
    };
    let migration = v1::MigrateRequest {
        devices: vec![name.clone()],
        target: Some(v1::MigrationTarget {
            endpoint: format!("https://localhost:{}", agent.address().port()),
            spiffe_id: "spiffe://lab.test/agent/a".to_owned(),
            devices: vec![name.clone()],
            key_sha256: own.key_sha256,
        }),
        ticket: Bytes::from_static(&[7; 32]),
        memory_capture: v1::MemoryCapture::None.into(),
        ..Default::default()
    };
    let range = Some(v1::IovaRange { start: 0, length_bytes: 4096 });
    let tracking = v1::StartDirtyTrackingRequest {
        name: name.clone(),
        page_bytes: 4096,
        ranges: range.into_iter().collect(),
    };
    let report = v1::ReportDirtyPagesRequest { name: name.clone(), page_bytes: 4096, range };
    let asks = [
        ask("DeviceService/GetDevice", &v1::GetDeviceRequest { name: name.clone() }),
        ask("DeviceService/ResetDevice", &reset),
        ask("DeviceService/StartDirtyTracking", &tracking),
        ask("DeviceService/ReportDirtyPages", &report),
        ask("DeviceService/StopDirtyTracking", &v1::StopDirtyTrackingRequest { name }),
        ask("MigrationService/Admit", &admission),
    ];
    all_refused(&channel, &asks, Code::NotFound, "DEVICE_NOT_FOUND").await;
    // Where it is one of several that are to be in order it is a blocker like others.
    let asks =
        [ask("CheckpointService/StartSave", &save_of(&["n9"])), ask("MigrationService/Migrate", &migration)];
    all_refused(&channel, &asks, Code::FailedPrecondition, "BLOCKED").await;
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_for_migrations_is_refused_for_all_else_and_what_is_over_is_over() {
    let lab = Lab::new();
    let agent = start(for_everything(lab.config("a", &[("n0", "sim:seed=1,memory=1MiB")]))).await;
    let saver = lab.client(&agent, "saver").await;
    let channel = admin(&lab, &agent).await;
    let request = v1::StartSaveRequest {
        cutover: v1::CutoverMode::Manual.into(),
        after: v1::AfterSave::Hold.into(),
        ..save_of(&["n0"])
    };
    let name = start_save(&saver, request).await;
    all_refused(&channel, &of_migration(&name), Code::FailedPrecondition, "NOT_A_MIGRATION").await;
    saver.cancel_operation(v1::CancelOperationRequest { name: name.clone() }).await.unwrap();
    done(&saver, &name).await;
    let acts = |Ask(method, _): &Ask| {
        ["Cutover", "Resume", "CancelOperation"].iter().any(|act| method.ends_with(act))
    };
    let over: Vec<Ask> = of_operation(&name).into_iter().filter(acts).collect();
    assert_eq!(over.len(), 3);
    all_refused(&channel, &over, Code::FailedPrecondition, "OPERATION_OVER").await;
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_cannot_be_used_is_said_by_every_method_that_names_one() {
    let lab = Lab::new();
    let mut config = for_everything(lab.config("a", &[("n0", "sim:seed=1,memory=1MiB")]));
    let photos = photos(&lab);
    let keys = lab.path("keys");
    std::fs::write(&keys, "AWS_ACCESS_KEY_ID=a\nAWS_SECRET_ACCESS_KEY=b\n").unwrap();
    config.stores = vec![
        StoreConfig {
            endpoint: Some("https://127.0.0.1:1".to_owned()),
            credentials: Some(keys),
            ..store_at("away", "s3://bucket/x".to_owned())
        },
        store_at("photos", photos.display().to_string()),
    ];
    let agent = start(config).await;
    let channel = admin(&lab, &agent).await;
    for (name, code, reason) in [
        ("stores/away", Code::Unavailable, "STORE_UNAVAILABLE"),
        ("stores/photos", Code::FailedPrecondition, "STORE_UNUSABLE"),
    ] {
        let mut asks = of_checkpoints(name);
        asks.push(list(name));
        all_refused(&channel, &asks, code, reason).await;
        // Where something is to be done to devices it is a blocker.
        all_refused(&channel, &[save_into(name)], code, "BLOCKED").await;
    }
    agent.stop().await.unwrap();
}

/// What begins something, with a request that would do.
async fn beginning(lab: &Lab, agent: &Agent) -> Vec<Ask> {
    let saver = lab.client(agent, "saver").await;
    let saved = save(&saver, &["n0"]).await;
    let viewer = lab.client(agent, "viewer").await;
    let own = viewer.get_agent(v1::GetAgentRequest {}).await.unwrap();
    let devices = vec!["devices/n0".to_owned()];
    let logical_devices = vec![device(&viewer, "n0").await.logical_device.unwrap()];
    let admission = v1::AdmitRequest {
        logical_devices,
        devices: devices.clone(),
        source_key_sha256: own.key_sha256.clone(),
        ..Default::default()
    };
    let migration = v1::MigrateRequest {
        devices: devices.clone(),
        target: Some(v1::MigrationTarget {
            endpoint: format!("https://localhost:{}", agent.address().port()),
            spiffe_id: "spiffe://lab.test/agent/a".to_owned(),
            devices,
            key_sha256: own.key_sha256,
        }),
        ticket: Bytes::from_static(&[7; 32]),
        memory_capture: v1::MemoryCapture::None.into(),
        request_id: request_id(3),
        ..Default::default()
    };
    let start = v1::StartSaveRequest { request_id: request_id(1), ..save_of(&["n0"]) };
    let restore = v1::RestoreRequest { request_id: request_id(2), ..restore_into(&["n0"], &saved) };
    vec![
        ask("CheckpointService/StartSave", &start),
        ask("CheckpointService/Restore", &restore),
        ask("MigrationService/Admit", &admission),
        ask("MigrationService/Migrate", &migration),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_ends_begins_nothing() {
    let lab = Lab::new();
    let agent = start(for_everything(lab.config("a", &[("n0", "sim:seed=1,memory=1MiB")]))).await;
    let channel = admin(&lab, &agent).await;
    let asks = beginning(&lab, &agent).await;
    agent.core().begin_ending();
    all_refused(&channel, &asks, Code::Unavailable, "SHUTTING_DOWN").await;
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_asked_under_an_id_is_not_asked_otherwise_under_it() {
    let lab = Lab::new();
    let agent = start(for_everything(lab.config("a", &[("n0", "sim:seed=1,memory=1MiB")]))).await;
    let channel = admin(&lab, &agent).await;
    let saver = lab.client(&agent, "saver").await;
    let saved = save(&saver, &["n0"]).await;
    let restore = v1::RestoreRequest { request_id: request_id(1), ..restore_into(&["n0"], &saved) };
    call(&channel, &ask("CheckpointService/Restore", &restore)).await.unwrap();
    let other = v1::RestoreRequest { allow_fork: !restore.allow_fork, ..restore };
    let asks = [ask("CheckpointService/Restore", &other)];
    all_refused(&channel, &asks, Code::AlreadyExists, "REQUEST_ID_REUSED").await;
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_without_a_log_says_so() {
    let lab = Lab::new();
    let blind = Bench::new(SimConfig {
        memory_bytes: 1 << 20,
        dma: SimDma { log: None, ..SimDma::default() },
        ..SimConfig::default()
    });
    let agent = start(for_everything(lab.config("a", &[("n0", blind.address.as_str())]))).await;
    let channel = admin(&lab, &agent).await;
    let name = "devices/n0".to_owned();
    let range = v1::IovaRange { start: 0, length_bytes: 4096 };
    let tracking =
        v1::StartDirtyTrackingRequest { name: name.clone(), page_bytes: 4096, ranges: vec![range] };
    let asks = [
        ask("DeviceService/StartDirtyTracking", &tracking),
        ask("DeviceService/StopDirtyTracking", &v1::StopDirtyTrackingRequest { name: name.clone() }),
    ];
    all_refused(&channel, &asks, Code::FailedPrecondition, "DIRTY_TRACKING").await;
    // What no log says counts as dirty.
    let report = v1::ReportDirtyPagesRequest { name, page_bytes: 4096, range: Some(range) };
    call(&channel, &ask("DeviceService/ReportDirtyPages", &report)).await.unwrap();
    agent.stop().await.unwrap();
}
