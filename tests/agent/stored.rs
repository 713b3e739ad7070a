//! Checkpoints in a store of the agent: saved, listed, verified, restored, deleted, and what is refused.

use std::path::{Path, PathBuf};

use tonic::transport::Channel;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use vfio_checkpoint_client::call::Client;
use vfio_checkpoint_device::sim::{SimConfig, SizeReport};
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_proto::v1::checkpoint_service_client::CheckpointServiceClient;
use vfio_checkpoint_server::config::{AgentConfig, StoreConfig};
use vfio_checkpoint_server::serve::Agent;

use crate::flow::{
    Bench, channel, device, done, failure, millis, reached, refused, request_id, save, save_of, soon,
    start_save, violations,
};
use crate::lab::{Lab, start};

const SIM: &str = "sim:seed=1,memory=2MiB";

type Checkpoints = CheckpointServiceClient<Channel>;

/// An agent with devices and its own store.
pub(crate) struct Case {
    lab: Lab,
    agent: Agent,
    pub(crate) saver: Client,
    restorer: Client,
    /// Its checkpoints, as a saver sees them.
    pub(crate) checkpoints: Checkpoints,
}

impl Case {
    pub(crate) async fn new(devices: &[(&str, &str)]) -> Self {
        let lab = Lab::new();
        let config = lab.config("a", devices);
        Self::of(lab, config).await
    }

    async fn of(lab: Lab, config: AgentConfig) -> Self {
        let agent = start(config).await;
        let (saver, restorer) = (lab.client(&agent, "saver").await, lab.client(&agent, "restorer").await);
        let checkpoints = as_role(&lab, &agent, "saver").await;
        Self { lab, agent, saver, restorer, checkpoints }
    }

    /// Saves devices to the store, to the end of it.
    pub(crate) async fn save(&self, devices: &[&str]) -> v1::Operation {
        let operation = start_save(&self.saver, into_store(devices)).await;
        let ended = done(&self.saver, &operation).await;
        assert_eq!(ended.result(), v1::OperationResult::Succeeded, "{ended:?}");
        ended
    }

    async fn restore(&self, request: v1::RestoreRequest) -> v1::Operation {
        let operation = self.restorer.restore(request).await.unwrap().operation.unwrap().name;
        done(&self.restorer, &operation).await
    }

    async fn get(&self, name: &str) -> Result<v1::Checkpoint, Status> {
        let request = v1::GetCheckpointRequest { name: name.to_owned() };
        Ok(self.checkpoints.clone().get_checkpoint(request).await?.into_inner().checkpoint.unwrap())
    }

    pub(crate) fn store(&self) -> PathBuf {
        self.agent.core().config.node.state_dir.join("checkpoints")
    }
}

async fn as_role(lab: &Lab, agent: &Agent, role: &str) -> Checkpoints {
    CheckpointServiceClient::new(channel(lab, agent, &format!("spiffe://lab.test/{role}/test")).await)
}

/// A store of this name, with nothing else said of it.
pub(crate) fn store_at(name: &str, location: String) -> StoreConfig {
    StoreConfig {
        name: name.to_owned(),
        location,
        endpoint: None,
        region: None,
        credentials: None,
        ca: None,
        allow_http: false,
        keep_free_bytes: None,
        collect_interval: None,
    }
}

/// A folder that holds other things.
pub(crate) fn photos(lab: &Lab) -> PathBuf {
    let photos = lab.path("photos");
    std::fs::create_dir(&photos).unwrap();
    std::fs::write(photos.join("1.jpg"), "x").unwrap();
    photos
}

fn into_store(devices: &[&str]) -> v1::StartSaveRequest {
    v1::StartSaveRequest { store: "stores/local".to_owned(), ..save_of(devices) }
}

fn out_of_store(devices: &[&str], checkpoint: &str) -> v1::RestoreRequest {
    v1::RestoreRequest {
        devices: devices.iter().map(|name| format!("devices/{name}")).collect(),
        checkpoint: checkpoint.to_owned(),
        ..Default::default()
    }
}

#[track_caller]
fn says<T: std::fmt::Debug>(answer: Result<T, Status>, code: Code, reason: &str) -> Status {
    let status = answer.expect_err("it should have been refused");
    let details = status.get_error_details();
    let said = details.error_info().map(|info| info.reason.clone()).unwrap_or_default();
    assert_eq!((status.code(), said.as_str()), (code, reason), "{status}");
    status
}

/// Digests of what the devices of an operation had.
fn digests(operation: &v1::Operation) -> Vec<[u8; 32]> {
    operation.devices.iter().map(|device| digest(device.seal.as_ref().unwrap())).collect()
}

fn digest(seal: &v1::Seal) -> [u8; 32] {
    seal.blake3.as_ref().try_into().unwrap()
}

async fn verify(checkpoints: &Checkpoints, name: &str) -> Result<v1::VerifyCheckpointResponse, Status> {
    let request = v1::VerifyCheckpointRequest { name: name.to_owned() };
    let mut answers = checkpoints.clone().verify_checkpoint(request).await?.into_inner();
    let mut last = None;
    while let Some(answer) = soon(answers.message()).await? {
        last = Some(answer);
    }
    Ok(last.expect("an answer"))
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_set_goes_into_the_store_and_out_of_it() {
    let case = Case::new(&[
        ("n0", SIM),
        ("n1", "sim:seed=2,memory=1MiB"),
        ("t0", SIM),
        ("t1", "sim:seed=9,memory=1MiB"),
    ])
    .await;
    let streamed = save(&case.saver, &["n0", "n1"]).await;
    let saved = case.save(&["n0", "n1"]).await;
    assert_eq!(saved.checkpoint, saved.name.replace("operations/", "stores/local/checkpoints/"));
    assert_eq!(digests(&saved), streamed.digests());
    assert!(saved.moved_bytes >= 3 << 20 && saved.downtime.is_some(), "{saved:?}");

    let checkpoint = case.get(&saved.checkpoint).await.unwrap();
    assert_eq!(checkpoint.caller, "spiffe://lab.test/saver/test");
    assert_eq!(checkpoint.size_bytes, saved.moved_bytes);
    assert_eq!(checkpoint.consistency(), v1::CheckpointConsistency::Consistent);
    let seals: Vec<_> = checkpoint.seals.iter().map(digest).collect();
    assert_eq!(seals, digests(&saved));
    let manifest = checkpoint.manifest.unwrap();
    assert_eq!(manifest.devices[1].source_device, "devices/n1");
    assert_eq!(manifest.operation, saved.name);

    let fork = v1::RestoreRequest { allow_fork: true, ..out_of_store(&["t0", "t1"], &saved.checkpoint) };
    let restored = case.restore(fork).await;
    assert_eq!(restored.result(), v1::OperationResult::Succeeded, "{restored:?}");
    assert_eq!(restored.outcome(), v1::StateOutcome::Replaced);
    assert_eq!(restored.checkpoint, saved.checkpoint);
    assert_eq!(digests(&restored), digests(&saved));
    // What the targets carry now is what the sources did.
    assert_eq!(save(&case.saver, &["t0", "t1"]).await.digests(), streamed.digests());
    case.agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_save_adds_only_what_is_new_and_a_restart_forgets_nothing() {
    let case = Case::new(&[("n0", SIM)]).await;
    let first = case.save(&["n0"]).await;
    let second = case.save(&["n0"]).await;
    let added = |checkpoint: v1::Checkpoint| checkpoint.added.unwrap();
    assert!(added(case.get(&first.checkpoint).await.unwrap()).stored_bytes > 0);
    assert_eq!(added(case.get(&second.checkpoint).await.unwrap()).chunks, 0);
    let Case { lab, agent, .. } = case;
    let config = agent.core().config.as_ref().clone();
    agent.stop().await.unwrap();

    let case = Case::of(lab, config).await;
    let list =
        |page_token: String| v1::ListCheckpointsRequest { page_size: 1, page_token, ..Default::default() };
    let mut found = Vec::new();
    let mut token = String::new();
    loop {
        let page = case.checkpoints.clone().list_checkpoints(list(token)).await.unwrap().into_inner();
        found.extend(page.checkpoints.into_iter().map(|checkpoint| checkpoint.name));
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    assert_eq!(found, [second.checkpoint.clone(), first.checkpoint.clone()]);
    let verified = verify(&case.checkpoints, &second.checkpoint).await.unwrap();
    assert!(verified.done && verified.problems.is_empty(), "{verified:?}");
    assert_eq!(verified.verified_bytes, verified.total_bytes);
    case.agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_may_run_gets_no_second_copy_unasked() {
    let case = Case::new(&[("n0", SIM), ("t0", SIM)]).await;
    let saved = case.save(&["n0"]).await;
    let original = device(&case.saver, "n0").await.logical_device.unwrap();
    let dry = v1::RestoreRequest { validate_only: true, ..out_of_store(&["t0"], &saved.checkpoint) };
    let told = case.restorer.restore(dry).await.unwrap();
    assert_eq!(told.blockers[0].reason(), v1::BlockerReason::SourceStillRunning);
    assert!(told.blockers[0].message.contains("runs in devices/n0"), "{told:?}");
    let refusal = refused(
        case.restorer.restore(out_of_store(&["t0"], &saved.checkpoint)).await,
        Code::FailedPrecondition,
        "BLOCKED",
    );
    assert_eq!(violations(&refusal)[0].0, "BLOCKER_REASON_SOURCE_STILL_RUNNING");

    // Back onto itself: the running copy is replaced. The logical device goes on, under a higher epoch.
    let back = case.restore(out_of_store(&["n0"], &saved.checkpoint)).await;
    assert_eq!(back.result(), v1::OperationResult::Succeeded, "{back:?}");
    let now = device(&case.saver, "n0").await.logical_device.unwrap();
    assert_eq!(now.id, original.id);
    assert!(now.epoch > original.epoch);

    // A fork is a logical device of its own.
    let fork = v1::RestoreRequest { allow_fork: true, ..out_of_store(&["t0"], &saved.checkpoint) };
    assert_eq!(case.restore(fork).await.result(), v1::OperationResult::Succeeded);
    let forked = device(&case.saver, "t0").await.logical_device.unwrap();
    assert_ne!(forked.id, original.id);
    assert_eq!(forked.epoch, 1);

    // What was left stopped may run elsewhere, under its own name.
    let stopped = v1::StartSaveRequest { after: v1::AfterSave::StayStopped.into(), ..into_store(&["n0"]) };
    let stopped = done(&case.saver, &start_save(&case.saver, stopped).await).await;
    let moved = case.restore(out_of_store(&["t0"], &stopped.checkpoint)).await;
    assert_eq!(moved.result(), v1::OperationResult::Succeeded, "{moved:?}");
    assert_eq!(device(&case.saver, "t0").await.logical_device.unwrap().id, original.id);
    case.agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hold_that_runs_out_marks_the_checkpoint_and_a_cancelled_one_is_gone() {
    let case = Case::new(&[("n0", SIM)]).await;
    let hold = |timeout| v1::StartSaveRequest {
        after: v1::AfterSave::Hold.into(),
        hold_timeout: timeout,
        ..into_store(&["n0"])
    };
    let stale = done(&case.saver, &start_save(&case.saver, hold(millis(50))).await).await;
    assert_eq!(stale.consistency(), v1::CheckpointConsistency::Inconsistent, "{stale:?}");
    let checkpoint = case.get(&stale.checkpoint).await.unwrap();
    assert_eq!(checkpoint.consistency(), v1::CheckpointConsistency::Inconsistent);
    let refusal = refused(
        case.restorer.restore(out_of_store(&["n0"], &stale.checkpoint)).await,
        Code::FailedPrecondition,
        "BLOCKED",
    );
    assert_eq!(violations(&refusal)[0].0, "BLOCKER_REASON_CHECKPOINT_INCONSISTENT");
    let all_the_same =
        v1::RestoreRequest { allow_inconsistent: true, ..out_of_store(&["n0"], &stale.checkpoint) };
    assert_eq!(case.restore(all_the_same).await.result(), v1::OperationResult::Succeeded);

    let held = start_save(&case.saver, hold(None)).await;
    let there = reached(&case.saver, &held, v1::OperationPhase::Held).await;
    // Sealed, and so in the store already.
    case.get(&there.checkpoint).await.unwrap();
    case.saver.cancel_operation(v1::CancelOperationRequest { name: held.clone() }).await.unwrap();
    assert_eq!(failure(&done(&case.saver, &held).await), "CANCELLED");
    says(case.get(&there.checkpoint).await, Code::NotFound, "CHECKPOINT_NOT_FOUND");
    assert_eq!(device(&case.saver, "n0").await.state(), v1::MigrationState::Running);

    let held = start_save(&case.saver, hold(None)).await;
    reached(&case.saver, &held, v1::OperationPhase::Held).await;
    case.saver.resume(v1::ResumeRequest { operation: held.clone() }).await.unwrap();
    assert_eq!(done(&case.saver, &held).await.consistency(), v1::CheckpointConsistency::Consistent);
    case.agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_checkpoint_is_found_by_whoever_reads_it_and_runs_nowhere() {
    let case = Case::new(&[("n0", SIM), ("t0", SIM)]).await;
    let before = save(&case.saver, &["t0"]).await.digests();
    let saved = case.save(&["n0"]).await;
    let chunk = files(&case.store().join("chunks")).pop().unwrap();
    let mut bytes = std::fs::read(&chunk).unwrap();
    bytes[0] ^= 1;
    std::fs::write(&chunk, bytes).unwrap();
    let verified = verify(&case.checkpoints, &saved.checkpoint).await.unwrap();
    assert!(verified.done && verified.problems.len() == 1, "{verified:?}");
    assert!(verified.problems[0].contains("chunks/"), "{verified:?}");

    let fork = v1::RestoreRequest { allow_fork: true, ..out_of_store(&["t0"], &saved.checkpoint) };
    let failed = case.restore(fork).await;
    assert_eq!(failure(&failed), "CHECKPOINT_DAMAGED", "{failed:?}");
    assert_eq!(failed.outcome(), v1::StateOutcome::StateLost);
    let now = device(&case.saver, "t0").await;
    assert_eq!(now.state(), v1::MigrationState::Running);
    drop(before);

    // The manifest: neither shown nor restored, and listed, so that it can be deleted.
    let id = saved.checkpoint.rsplit_once('/').unwrap().1;
    std::fs::write(case.store().join("checkpoints").join(id).join("manifest"), "{}").unwrap();
    says(case.get(&saved.checkpoint).await, Code::FailedPrecondition, "CHECKPOINT_DAMAGED");
    says(verify(&case.checkpoints, &saved.checkpoint).await, Code::FailedPrecondition, "CHECKPOINT_DAMAGED");
    refused(
        case.restorer.restore(out_of_store(&["n0"], &saved.checkpoint)).await,
        Code::FailedPrecondition,
        "CHECKPOINT_DAMAGED",
    );
    let listed = case.checkpoints.clone().list_checkpoints(v1::ListCheckpointsRequest::default()).await;
    let listed = listed.unwrap().into_inner().checkpoints;
    assert!(!listed[0].damage.is_empty() && listed[0].manifest.is_none(), "{listed:?}");
    let delete = v1::DeleteCheckpointRequest { name: saved.checkpoint.clone() };
    says(
        case.checkpoints.clone().delete_checkpoint(delete.clone()).await,
        Code::FailedPrecondition,
        "CHECKPOINT_DAMAGED",
    );
    let mut admin = as_role(&case.lab, &case.agent, "admin").await;
    admin.delete_checkpoint(delete).await.unwrap();
    says(case.get(&saved.checkpoint).await, Code::NotFound, "CHECKPOINT_NOT_FOUND");
    case.agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_is_deleted_by_its_own_caller_or_an_admin() {
    let case = Case::new(&[("n0", SIM)]).await;
    let saved = case.save(&["n0"]).await;
    let delete = v1::DeleteCheckpointRequest { name: saved.checkpoint.clone() };
    let other = channel(&case.lab, &case.agent, "spiffe://lab.test/saver/other").await;
    let mut other = CheckpointServiceClient::new(other);
    says(other.delete_checkpoint(delete.clone()).await, Code::PermissionDenied, "NOT_YOUR_CHECKPOINT");
    case.get(&saved.checkpoint).await.unwrap();
    case.checkpoints.clone().delete_checkpoint(delete.clone()).await.unwrap();
    says(case.checkpoints.clone().delete_checkpoint(delete).await, Code::NotFound, "CHECKPOINT_NOT_FOUND");
    case.agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_is_refused_with_its_field_and_its_reason() {
    let case = Case::new(&[("n0", SIM)]).await;
    for (name, field) in [("stores/local", "name"), ("stores/local/checkpoints/A", "name"), ("", "name")] {
        let status = says(case.get(name).await, Code::InvalidArgument, "INVALID_FIELD");
        assert!(status.message().contains(field), "{status}");
    }
    let missing = "stores/local/checkpoints/019aa7b4c10-5c0ffee15c0ffee1";
    says(case.get(missing).await, Code::NotFound, "CHECKPOINT_NOT_FOUND");
    says(case.get("stores/local/checkpoints/no-id").await, Code::NotFound, "CHECKPOINT_NOT_FOUND");
    says(case.get("stores/cold/checkpoints/x").await, Code::NotFound, "STORE_NOT_FOUND");
    says(verify(&case.checkpoints, missing).await, Code::NotFound, "CHECKPOINT_NOT_FOUND");
    refused(
        case.restorer.restore(out_of_store(&["n0"], missing)).await,
        Code::NotFound,
        "CHECKPOINT_NOT_FOUND",
    );
    let cold = v1::StartSaveRequest { store: "stores/cold".to_owned(), ..save_of(&["n0"]) };
    refused(case.saver.start_save(cold).await, Code::NotFound, "STORE_NOT_FOUND");
    let list = |parent: &str, token: &str| v1::ListCheckpointsRequest {
        parent: parent.to_owned(),
        page_token: token.to_owned(),
        ..Default::default()
    };
    says(
        case.checkpoints.clone().list_checkpoints(list("stores/cold", "")).await,
        Code::NotFound,
        "STORE_NOT_FOUND",
    );
    says(
        case.checkpoints.clone().list_checkpoints(list("", "x")).await,
        Code::InvalidArgument,
        "INVALID_PAGE_TOKEN",
    );
    says(
        case.checkpoints.clone().list_checkpoints(list("cold", "")).await,
        Code::InvalidArgument,
        "INVALID_FIELD",
    );

    // A save into a store has no stream.
    let manual = v1::StartSaveRequest { cutover: v1::CutoverMode::Manual.into(), ..into_store(&["n0"]) };
    let operation = start_save(&case.saver, manual).await;
    let mut raw = case.checkpoints.clone();
    let open = v1::StreamOpen {
        operation: operation.clone(),
        role: v1::StreamRole::Taker.into(),
        min_version: 1,
        max_version: 1,
        max_chunk_bytes: 0,
        resume_stream_id: 0,
    };
    let kind = v1::stream_message::Kind::Open(open);
    let first = v1::StreamStateRequest { message: Some(v1::StreamMessage { kind: Some(kind) }) };
    says(raw.stream_state(tokio_stream::once(first)).await, Code::FailedPrecondition, "NO_STREAM");
    case.saver.cutover(v1::CutoverRequest { operation: operation.clone() }).await.unwrap();
    let saved = done(&case.saver, &operation).await;
    assert_eq!(saved.result(), v1::OperationResult::Succeeded, "{saved:?}");
    // Nor does a restore take both.
    let both = v1::RestoreRequest {
        manifest: case.get(&saved.checkpoint).await.unwrap().manifest,
        ..out_of_store(&["n0"], &saved.checkpoint)
    };
    refused(case.restorer.restore(both).await, Code::InvalidArgument, "INVALID_FIELD");
    // Two devices for one state.
    let two = v1::RestoreRequest {
        devices: vec!["devices/n0".to_owned(), "devices/n1".to_owned()],
        ..out_of_store(&[], &saved.checkpoint)
    };
    refused(case.restorer.restore(two).await, Code::InvalidArgument, "INVALID_FIELD");
    case.agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_cannot_be_used_is_said_and_nothing_is_touched() {
    let lab = Lab::new();
    let mut config = lab.config("a", &[("n0", SIM)]);
    let photos = photos(&lab);
    let mut full = store_at("full", lab.path("full").display().to_string());
    full.keep_free_bytes = Some(u64::MAX);
    let keys = lab.path("keys");
    std::fs::write(&keys, "AWS_ACCESS_KEY_ID=a\nAWS_SECRET_ACCESS_KEY=b\n").unwrap();
    config.stores = vec![
        StoreConfig {
            endpoint: Some("https://127.0.0.1:1".to_owned()),
            ..store_at("away", "s3://bucket/x".to_owned())
        },
        store_at("photos", photos.display().to_string()),
        full,
    ];
    let case = Case::of(lab, config).await;
    let into = |name: &str| v1::StartSaveRequest { store: format!("stores/{name}"), ..save_of(&["n0"]) };
    let dry = v1::StartSaveRequest { validate_only: true, ..into("full") };
    let told = case.saver.start_save(dry).await.unwrap();
    assert_eq!(told.blockers[0].reason(), v1::BlockerReason::NoSpace, "{told:?}");
    let refusal = refused(case.saver.start_save(into("full")).await, Code::FailedPrecondition, "BLOCKED");
    assert_eq!(violations(&refusal)[0].0, "BLOCKER_REASON_NO_SPACE");
    let dry = v1::StartSaveRequest { validate_only: true, ..into("photos") };
    let told = case.saver.start_save(dry).await.unwrap();
    assert_eq!(told.blockers[0].reason(), v1::BlockerReason::StoreUnusable);
    assert!(told.blockers[0].message.contains("give it a place of its own"), "{told:?}");
    let dry = v1::StartSaveRequest { validate_only: true, ..into("away") };
    let told = case.saver.start_save(dry).await.unwrap();
    assert_eq!(told.blockers[0].reason(), v1::BlockerReason::StoreUnavailable, "{told:?}");
    let away = case.checkpoints.clone().list_checkpoints(v1::ListCheckpointsRequest::default()).await;
    says(away, Code::Unavailable, "STORE_UNAVAILABLE");
    let photo = "stores/photos/checkpoints/019aa7b4c10-5c0ffee15c0ffee1";
    says(case.get(photo).await, Code::FailedPrecondition, "STORE_UNUSABLE");
    assert_eq!(device(&case.saver, "n0").await.state(), v1::MigrationState::Running);
    assert!(device(&case.saver, "n0").await.operation.is_empty());
    case.agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_fails_on_the_way_leaves_the_device_with_its_state() {
    let bench = Bench::new(SimConfig {
        memory_bytes: 1 << 20,
        data_size: SizeReport::Unknown,
        ..SimConfig::default()
    });
    let lab = Lab::new();
    let mut config = lab.config("a", &[("n0", &bench.address)]);
    let store = |name: &str, keep_free_bytes| StoreConfig {
        name: name.to_owned(),
        location: lab.path(name).display().to_string(),
        endpoint: None,
        region: None,
        credentials: None,
        ca: None,
        allow_http: false,
        keep_free_bytes,
        collect_interval: None,
    };
    config.stores = vec![store("local", None), store("full", Some(u64::MAX))];
    let local = lab.path("local");
    let case = Case::of(lab, config).await;
    let before = save(&case.saver, &["n0"]).await.digests();
    case.save(&["n0"]).await;

    // How much there will be is not known, so only its store finds that there is no room.
    let full = v1::StartSaveRequest { store: "stores/full".to_owned(), ..save_of(&["n0"]) };
    let failed = done(&case.saver, &start_save(&case.saver, full).await).await;
    assert_eq!(failure(&failed), "STORE_FULL", "{failed:?}");
    assert_eq!(failed.outcome(), v1::StateOutcome::Preserved);

    std::fs::remove_dir_all(local.join("chunks")).unwrap();
    std::os::unix::fs::symlink("/nowhere", local.join("chunks")).unwrap();
    let failed = done(&case.saver, &start_save(&case.saver, into_store(&["n0"])).await).await;
    assert_eq!(failure(&failed), "STORE_FAILED", "{failed:?}");
    assert!(failed.failure.as_ref().unwrap().message.contains("symbolic link"), "{failed:?}");
    assert_eq!(failed.outcome(), v1::StateOutcome::Preserved);
    says(case.get(&failed.checkpoint).await, Code::NotFound, "CHECKPOINT_NOT_FOUND");
    assert_eq!(bench.device.resets(), 0);
    assert_eq!(save(&case.saver, &["n0"]).await.digests(), before);
    case.agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_request_makes_one_checkpoint() {
    let case = Case::new(&[("n0", SIM)]).await;
    let request = v1::StartSaveRequest { request_id: request_id(1), ..into_store(&["n0"]) };
    let first = start_save(&case.saver, request.clone()).await;
    let saved = done(&case.saver, &first).await;
    assert_eq!(start_save(&case.saver, request).await, first);
    let listed = case.checkpoints.clone().list_checkpoints(v1::ListCheckpointsRequest::default()).await;
    let listed: Vec<_> =
        listed.unwrap().into_inner().checkpoints.into_iter().map(|checkpoint| checkpoint.name).collect();
    assert_eq!(listed, [saved.checkpoint]);
    case.agent.stop().await.unwrap();
}
