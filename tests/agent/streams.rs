//! `StreamState`: who may open which stream, and what a save does when its stream goes wrong.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};
use vfio_checkpoint_client::call::Refusal;
use vfio_checkpoint_client::transfer::{GiveState, TakeState};
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_proto::v1::checkpoint_service_client::CheckpointServiceClient;
use vfio_checkpoint_proto::v1::stream_message::Kind;
use vfio_checkpoint_server::security::roles::{Grant, Policy, Role};

use crate::flow::{
    channel, device, done, failure, reached, restore_into, save, save_of, soon, start_restore, start_save,
    take,
};
use crate::lab::{Lab, start};

pub(crate) type Sender = mpsc::Sender<v1::StreamStateRequest>;

fn request(kind: Option<Kind>) -> v1::StreamStateRequest {
    v1::StreamStateRequest { message: Some(v1::StreamMessage { kind }) }
}

pub(crate) fn open_of(operation: &str, role: v1::StreamRole) -> v1::StreamOpen {
    v1::StreamOpen {
        operation: operation.to_owned(),
        role: role.into(),
        min_version: 1,
        max_version: 1,
        max_chunk_bytes: 0,
        resume_stream_id: 0,
    }
}

/// A stream that begins with this message; what is refused comes before its first answer.
pub(crate) async fn begin(
    channel: &Channel,
    first: Option<Kind>,
) -> Result<(Sender, Streaming<v1::StreamStateResponse>), Status> {
    let (sender, queue) = mpsc::channel(8);
    if let Some(first) = first {
        sender.send(request(Some(first))).await.unwrap();
        let mut client = CheckpointServiceClient::new(channel.clone()).max_decoding_message_size(8 << 20);
        let answers = soon(client.stream_state(ReceiverStream::new(queue))).await?.into_inner();
        return Ok((sender, answers));
    }
    drop(sender);
    let mut client = CheckpointServiceClient::new(channel.clone());
    let answers = soon(client.stream_state(ReceiverStream::new(queue))).await?.into_inner();
    Ok((mpsc::channel(1).0, answers))
}

#[track_caller]
fn refusal<T>(answer: Result<T, Status>, code: Code, reason: &str) -> Refusal {
    let Err(status) = answer else { panic!("it should have been refused") };
    let refusal = Refusal::from_status("StreamState", &status);
    assert_eq!((refusal.code, refusal.reason.as_deref()), (code, Some(reason)), "{refusal}");
    refusal
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_not_opened_as_it_should_be_is_refused() {
    let lab = Lab::new();
    let agent =
        start(lab.config("a", &[("n0", "sim:seed=1,memory=1MiB"), ("n1", "sim:seed=2,memory=1MiB")])).await;
    let saver = lab.client(&agent, "saver").await;
    let restorer = lab.client(&agent, "restorer").await;
    let saved = save(&saver, &["n1"]).await;
    let name = start_save(&saver, save_of(&["n0"])).await;
    let into = start_restore(&restorer, restore_into(&["n1"], &saved)).await;
    let raw = channel(&lab, &agent, "spiffe://lab.test/saver/test").await;
    let taker = || open_of(&name, v1::StreamRole::Taker);

    refusal(begin(&raw, None).await, Code::InvalidArgument, "STREAM_OPEN");
    for first in [Kind::Ack(v1::StreamAck::default()), Kind::Cutover(v1::StreamCutover {})] {
        refusal(begin(&raw, Some(first)).await, Code::InvalidArgument, "STREAM_OPEN");
    }
    let wrong = [
        ("message.open.role", v1::StreamOpen { role: 0, ..taker() }),
        ("message.open.role", v1::StreamOpen { role: 9, ..taker() }),
        ("message.open.operation", v1::StreamOpen { operation: "n0".to_owned(), ..taker() }),
        ("message.open.min_version", v1::StreamOpen { min_version: 0, ..taker() }),
        ("message.open.min_version", v1::StreamOpen { min_version: 3, max_version: 2, ..taker() }),
        ("message.open.max_chunk_bytes", v1::StreamOpen { max_chunk_bytes: 1, ..taker() }),
    ];
    for (field, open) in wrong {
        let refusal =
            refusal(begin(&raw, Some(Kind::Open(open))).await, Code::InvalidArgument, "INVALID_FIELD");
        assert_eq!(refusal.fields[0].field, field, "{refusal}");
    }
    let later = v1::StreamOpen { min_version: 98, max_version: 99, ..taker() };
    let refused =
        refusal(begin(&raw, Some(Kind::Open(later))).await, Code::FailedPrecondition, "NO_COMMON_VERSION");
    assert!(refused.message.contains("98"), "{refused}");
    let giver = open_of(&name, v1::StreamRole::Giver);
    refusal(begin(&raw, Some(Kind::Open(giver))).await, Code::FailedPrecondition, "STREAM_ROLE");
    let gone = open_of("operations/00000000000-0000000000000000", v1::StreamRole::Taker);
    refusal(begin(&raw, Some(Kind::Open(gone))).await, Code::NotFound, "OPERATION_NOT_FOUND");
    let others = open_of(&into, v1::StreamRole::Giver);
    refusal(begin(&raw, Some(Kind::Open(others))).await, Code::PermissionDenied, "NOT_YOUR_OPERATION");
    let peer = channel(&lab, &agent, "spiffe://lab.test/saver/other").await;
    refusal(begin(&peer, Some(Kind::Open(taker()))).await, Code::PermissionDenied, "NOT_YOUR_OPERATION");
    let raw_restorer = channel(&lab, &agent, "spiffe://lab.test/restorer/test").await;
    let takes = open_of(&into, v1::StreamRole::Taker);
    refusal(begin(&raw_restorer, Some(Kind::Open(takes))).await, Code::FailedPrecondition, "STREAM_ROLE");

    // A grant that was taken away meanwhile: the identity may stream, but no saves.
    let grant = Grant { who: "spiffe://lab.test/saver/*".parse().unwrap(), roles: vec![Role::Restorer] };
    assert!(agent.set_policy(Policy { grants: vec![grant] }) > 1, "raw and the saver's own");
    let raw = channel(&lab, &agent, "spiffe://lab.test/saver/test").await;
    refusal(begin(&raw, Some(Kind::Open(taker()))).await, Code::PermissionDenied, "ROLE_REQUIRED");
    agent.set_policy(Policy { grants: agent.core().config.grants.clone() });
    let raw = channel(&lab, &agent, "spiffe://lab.test/saver/test").await;
    let saver = lab.client(&agent, "saver").await;

    // None of that took the stream's place.
    let (open, _answers) = begin(&raw, Some(Kind::Open(taker()))).await.unwrap();
    refusal(begin(&raw, Some(Kind::Open(taker()))).await, Code::FailedPrecondition, "STREAM_TAKEN");
    drop(open);
    done(&saver, &name).await;
    refusal(begin(&raw, Some(Kind::Open(taker()))).await, Code::FailedPrecondition, "OPERATION_OVER");
    agent.stop().await.unwrap();
}

/// What a taker does that it should not, once it has the first chunk.
enum Misdeed {
    /// Hangs up.
    Leave,
    /// Says this.
    Say(Kind),
}

#[tokio::test(flavor = "multi_thread")]
async fn a_save_whose_stream_goes_wrong_leaves_its_device_as_it_was() {
    let lab = Lab::new();
    let agent = start(lab.config("a", &[("n0", "sim:seed=1,memory=48MiB")])).await;
    let saver = lab.client(&agent, "saver").await;
    let digests = save(&saver, &["n0"]).await.digests();
    let misdeeds = [
        ("STREAM_BROKEN", Misdeed::Leave),
        ("ABORTED_BY_PEER", Misdeed::Say(Kind::Abort(v1::StreamAbort { reason: "the disk is full".into() }))),
        ("STREAM_PROTOCOL", Misdeed::Say(Kind::Frame(v1::Frame::default()))),
        ("STREAM_PROTOCOL", Misdeed::Say(Kind::Cutover(v1::StreamCutover {}))),
        ("STREAM_PROTOCOL", Misdeed::Say(Kind::Open(v1::StreamOpen::default()))),
        (
            "STREAM_PROTOCOL",
            Misdeed::Say(Kind::Ack(v1::StreamAck { next_sequence: 1 << 40, complete: false })),
        ),
        ("STREAM_PROTOCOL", Misdeed::Say(Kind::Ack(v1::StreamAck { next_sequence: 0, complete: true }))),
    ];
    for pre_copy in [v1::PreCopyMode::Never, v1::PreCopyMode::Required] {
        for (reason, misdeed) in &misdeeds {
            let raw = channel(&lab, &agent, "spiffe://lab.test/saver/test").await;
            let mut save = save_of(&["n0"]);
            save.pre_copy = pre_copy.into();
            let name = start_save(&saver, save).await;
            let open = Kind::Open(open_of(&name, v1::StreamRole::Taker));
            let (sender, mut answers) = begin(&raw, Some(open)).await.unwrap();
            for _ in 0..2 {
                soon(answers.message()).await.unwrap().unwrap();
            }
            match misdeed {
                Misdeed::Leave => drop((sender, answers, raw)),
                Misdeed::Say(kind) => {
                    sender.send(request(Some(kind.clone()))).await.unwrap();
                    let mut last = None;
                    while let Ok(Some(answer)) = soon(answers.message()).await {
                        last = answer.message.and_then(|message| message.kind);
                    }
                    // Whoever gives up itself need not be told.
                    let is_told = matches!(last, Some(Kind::Abort(_))) || *reason == "ABORTED_BY_PEER";
                    assert!(is_told, "{reason}: the agent says that it gives up");
                }
            }
            let ended = done(&saver, &name).await;
            assert_eq!(
                (ended.result(), failure(&ended)),
                (v1::OperationResult::Failed, *reason),
                "{ended:?}"
            );
            assert_eq!(ended.outcome(), v1::StateOutcome::Preserved);
            assert_eq!(ended.consistency(), v1::CheckpointConsistency::Unspecified);
            assert_eq!(device(&saver, "n0").await.state(), v1::MigrationState::Running);
        }
    }
    assert_eq!(save(&saver, &["n0"]).await.digests(), digests, "its state is its own");
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_taker_that_never_reads_does_not_hold_a_device_for_ever() {
    let lab = Lab::new();
    let mut config = lab.config("a", &[("n0", "sim:seed=1,memory=64MiB")]);
    config.server.stream_idle_timeout = Duration::from_millis(200);
    let agent = start(config).await;
    let saver = lab.client(&agent, "saver").await;
    let raw = channel(&lab, &agent, "spiffe://lab.test/saver/test").await;
    let mut save = save_of(&["n0"]);
    save.pre_copy = v1::PreCopyMode::Never.into();
    let name = start_save(&saver, save).await;
    let open = Kind::Open(open_of(&name, v1::StreamRole::Taker));
    let (_sender, _unread) = begin(&raw, Some(open)).await.unwrap();
    let ended = done(&saver, &name).await;
    assert_eq!((ended.result(), failure(&ended)), (v1::OperationResult::Failed, "STREAM_IDLE"), "{ended:?}");
    assert_eq!(ended.outcome(), v1::StateOutcome::Preserved);
    assert_eq!(device(&saver, "n0").await.state(), v1::MigrationState::Running);
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_does_not_outlive_its_lifetime_however_busy_it_is() {
    let lab = Lab::new();
    let mut config = lab.config("a", &[("n0", "sim:seed=1,memory=1MiB")]);
    config.server.stream_lifetime = Duration::from_millis(300);
    let agent = start(config).await;
    let saver = lab.client(&agent, "saver").await;
    // It waits for a Cutover that nobody says, and its taker reads all that is said meanwhile.
    let manual = v1::StartSaveRequest {
        cutover: v1::CutoverMode::Manual.into(),
        pre_copy: v1::PreCopyMode::Never.into(),
        ..save_of(&["n0"])
    };
    let name = start_save(&saver, manual).await;
    let raw = channel(&lab, &agent, "spiffe://lab.test/saver/test").await;
    let open = Kind::Open(open_of(&name, v1::StreamRole::Taker));
    let (_sender, mut answers) = begin(&raw, Some(open)).await.unwrap();
    let mut last = None;
    while let Ok(Some(answer)) = soon(answers.message()).await {
        last = answer.message.and_then(|message| message.kind);
    }
    assert!(matches!(last, Some(Kind::Abort(_))), "the taker is told: {last:?}");
    let ended = done(&saver, &name).await;
    assert_eq!(
        (ended.result(), failure(&ended)),
        (v1::OperationResult::Failed, "STREAM_LIFETIME"),
        "{ended:?}"
    );
    assert_eq!(ended.outcome(), v1::StateOutcome::Preserved);
    assert_eq!(device(&saver, "n0").await.state(), v1::MigrationState::Running);
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_is_heard_in_each_phase() {
    let lab = Lab::new();
    let agent =
        start(lab.config("a", &[("n0", "sim:seed=1,memory=48MiB"), ("n1", "sim:seed=2,memory=48MiB")])).await;
    let saver = lab.client(&agent, "saver").await;
    let restorer = lab.client(&agent, "restorer").await;
    let saved = save(&saver, &["n0"]).await;
    let cancel = |name: &str| v1::CancelOperationRequest { name: name.to_owned() };

    // A save: its taker stands still, so the phase stays as it is.
    let stop_copy = v1::StartSaveRequest { pre_copy: v1::PreCopyMode::Never.into(), ..save_of(&["n0"]) };
    let manual = v1::StartSaveRequest { cutover: v1::CutoverMode::Manual.into(), ..stop_copy.clone() };
    let phases = [
        (v1::OperationPhase::PreCopy, save_of(&["n0"])),
        (v1::OperationPhase::StopCopy, stop_copy),
        (v1::OperationPhase::WaitingForCutover, manual),
    ];
    for (phase, request) in phases {
        let name = start_save(&saver, request).await;
        let raw = channel(&lab, &agent, "spiffe://lab.test/saver/test").await;
        let open = Kind::Open(open_of(&name, v1::StreamRole::Taker));
        let (sender, mut answers) = begin(&raw, Some(open)).await.unwrap();
        let reads = phase == v1::OperationPhase::WaitingForCutover;
        let reading =
            reads.then(|| tokio::spawn(async move { while let Ok(Some(_)) = answers.message().await {} }));
        reached(&saver, &name, phase).await;
        saver.cancel_operation(cancel(&name)).await.unwrap();
        // Said again it is taken as said, unless it is over already.
        if let Err(error) = saver.cancel_operation(cancel(&name)).await {
            assert_eq!(error.refusal().unwrap().reason.as_deref(), Some("OPERATION_OVER"), "{error}");
        }
        let ended = done(&saver, &name).await;
        assert_eq!(
            (ended.result(), failure(&ended)),
            (v1::OperationResult::Cancelled, "CANCELLED"),
            "{phase:?} {ended:?}"
        );
        assert_eq!(ended.outcome(), v1::StateOutcome::Preserved, "{phase:?}");
        drop((sender, reading));
        assert_eq!(device(&saver, "n0").await.state(), v1::MigrationState::Running, "{phase:?}");
    }
    // Sealing: the taker has everything, and does not say that it is durable.
    let name = start_save(&saver, save_of(&["n0"])).await;
    let TakeState { manifest, mut taker, .. } =
        TakeState::open(&saver, &name.parse().unwrap()).await.unwrap();
    crate::flow::drain(manifest, &mut taker).await;
    reached(&saver, &name, v1::OperationPhase::Sealing).await;
    saver.cancel_operation(cancel(&name)).await.unwrap();
    let ended = done(&saver, &name).await;
    assert_eq!(ended.result(), v1::OperationResult::Cancelled, "{ended:?}");
    assert!(soon(taker.complete()).await.is_err(), "there is no checkpoint");

    // A restore that is half loaded.
    let name = start_restore(&restorer, restore_into(&["n1"], &saved)).await;
    let GiveState { mut giver, .. } = GiveState::open(&restorer, &name.parse().unwrap()).await.unwrap();
    let (_, first) = &saved.pieces[0];
    giver.chunk(0, first.clone()).await.unwrap();
    reached(&restorer, &name, v1::OperationPhase::Loading).await;
    restorer.cancel_operation(cancel(&name)).await.unwrap();
    let ended = done(&restorer, &name).await;
    assert_eq!((ended.result(), failure(&ended)), (v1::OperationResult::Cancelled, "CANCELLED"), "{ended:?}");
    assert_eq!(ended.outcome(), v1::StateOutcome::StateLost);
    assert_eq!(device(&saver, "n1").await.state(), v1::MigrationState::Running);
    let name = start_save(&saver, save_of(&["n1"])).await;
    take(&saver, &name).await;
    agent.stop().await.unwrap();
}
