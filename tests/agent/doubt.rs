//! Migrations of which nobody can say by himself which side has the devices.

use tonic::Code;
use vfio_checkpoint_client::call::Client;
use vfio_checkpoint_fsm::State;
use vfio_checkpoint_proto::v1;

use crate::flow::{device, done, failure, refused, soon};
use crate::migrations::{stuck, when};
use crate::pair::{Pair, small};

/// Two devices at the destination, of which the second does not start, and the source in doubt about it.
pub(crate) async fn in_doubt() -> (Pair, (Vec<[u8; 32]>, Vec<[u8; 32]>), Client, String) {
    let pair = Pair::with(2, small, &[], &stuck(), |_| {}).await;
    let before = pair.digests();
    let (source, _) = pair.migrator().await;
    let name = pair.start(|_, _| {}).await;
    let doubtful = |seen: &v1::Operation| seen.handover.as_ref().is_some_and(|handover| handover.in_doubt);
    let seen = when(&source, &name, doubtful).await;
    assert_eq!(seen.phase(), v1::OperationPhase::Committing);
    assert!(seen.actions().any(|action| action == v1::OperationAction::Resolve));
    assert!(!seen.actions().any(|action| action == v1::OperationAction::Cancel));
    (pair, before, source, name)
}

#[tokio::test(flavor = "multi_thread")]
async fn where_only_a_part_runs_there_an_admin_decides() {
    let (pair, before, source, name) = in_doubt().await;
    let handover = when(&source, &name, |seen| !seen.handover.as_ref().unwrap().doubt.is_empty()).await;
    let handover = handover.handover.unwrap();
    assert_eq!(handover.verdict(), v1::HandoverVerdict::Broken, "{handover:?}");
    assert!(pair.here.iter().all(|bench| bench.device.state() == State::Stop), "it stands still");
    let cancel = v1::CancelOperationRequest { name: name.clone() };
    refused(source.cancel_operation(cancel).await, Code::FailedPrecondition, "PAST_NO_RETURN");

    let admin = pair.lab.client(&pair.source, "admin").await;
    let resolve = |resolution: v1::Resolution, fenced, accept_loss, validate_only| v1::ResolveRequest {
        operation: name.clone(),
        resolution: resolution.into(),
        peer_is_fenced: fenced,
        accept_loss,
        statement: if fenced || accept_loss { "power is off".to_owned() } else { String::new() },
        validate_only,
    };
    let (resume, let_go) = (v1::Resolution::ResumeHere, v1::Resolution::LetGo);
    let asked = admin.resolve(resolve(resume, false, false, true)).await.unwrap();
    assert!(asked.refused.contains("fenced"), "{asked:?}");
    assert_eq!(asked.destination.unwrap().verdict(), v1::HandoverVerdict::Broken);
    for bare in [resolve(resume, false, false, false), resolve(let_go, false, false, false)] {
        refused(admin.resolve(bare).await, Code::FailedPrecondition, "UNRESOLVABLE");
    }
    assert!(pair.here.iter().all(|bench| bench.device.state() == State::Stop), "it still does");

    let was = device(&source, "n0").await.logical_device.unwrap();
    admin.resolve(resolve(resume, true, false, false)).await.unwrap();
    let ended = soon(done(&source, &name)).await;
    assert_eq!(failure(&ended), "RESOLVED");
    assert_eq!(ended.outcome(), v1::StateOutcome::Preserved);
    let resolution = ended.handover.unwrap().resolution;
    assert!(resolution.contains("power is off") && resolution.contains("admin/test"), "{resolution}");
    assert_eq!(pair.digests().0, before.0);
    assert!(pair.here.iter().all(|bench| bench.device.state() == State::Running));
    let now = device(&source, "n0").await.logical_device.unwrap();
    assert_eq!(now.id, was.id);
    assert!(now.epoch > was.epoch + 1, "newer than what may have run there: {}", now.epoch);
    pair.stop().await;
}

/// What runs at the destination goes on there as what it is, and what was reset there as nobody that was known before.
#[tokio::test(flavor = "multi_thread")]
async fn an_admin_can_let_the_source_go() {
    let (pair, before, source, name) = in_doubt().await;
    let lives = [device(&source, "n0").await, device(&source, "n1").await];
    let admin = pair.lab.client(&pair.source, "admin").await;
    let let_go = v1::ResolveRequest {
        operation: name.clone(),
        resolution: v1::Resolution::LetGo.into(),
        accept_loss: true,
        statement: "the destination is mended by hand".to_owned(),
        ..Default::default()
    };
    admin.resolve(let_go.clone()).await.unwrap();
    let ended = soon(done(&source, &name)).await;
    assert_eq!((failure(&ended), ended.outcome()), ("RESOLVED", v1::StateOutcome::StateLost));
    assert!(pair.digests().0.iter().zip(&before.0).all(|(now, was)| now != was));
    assert!(pair.here.iter().all(|bench| bench.device.state() == State::Running));
    refused(admin.resolve(let_go).await, Code::FailedPrecondition, "NOT_IN_DOUBT");

    let there = pair.lab.client(&pair.destination, "admin").await;
    for name in pair.names() {
        let keep =
            v1::ResetDeviceRequest { name, mode: v1::ResetMode::KeepState.into(), ..Default::default() };
        assert!(!there.reset_device(keep).await.unwrap().state_lost);
    }
    let [runs, blank] = lives.map(|device| device.logical_device.unwrap());
    let now = device(&there, "n0").await.logical_device.unwrap();
    assert_eq!((now.id, now.epoch), (runs.id, runs.epoch + 1));
    assert_ne!(device(&there, "n1").await.logical_device.unwrap().id, blank.id);
    assert_eq!(pair.digests().1[0], before.0[0]);
    assert_ne!(pair.digests().1[1], before.0[1]);
    pair.stop().await;
}
