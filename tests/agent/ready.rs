//! Ready: who says it, and what does not happen before.

use tonic::Code;
use vfio_checkpoint_fsm::State;
use vfio_checkpoint_proto::proof::Proven as _;
use vfio_checkpoint_proto::v1;

use crate::flow::{at_once, done, failure, refused, soon};
use crate::migrations::{manual, moved, stayed, when};
use crate::pair::{Pair, small};

/// A migration whose destination waits for Ready: its name, and its arrival's.
async fn awaiting(pair: &Pair) -> (String, String) {
    let (source, destination) = pair.migrator().await;
    let name = pair.start(|admission, _| admission.require_ready = true).await;
    let seen = when(&source, &name, |seen| seen.phase() == v1::OperationPhase::Sealing).await;
    let arrival = seen.handover.unwrap().peer_operation;
    let waits = |seen: &v1::Operation| seen.handover.as_ref().is_some_and(|handover| handover.awaits_ready);
    when(&destination, &arrival, waits).await;
    (name, arrival)
}

#[tokio::test(flavor = "multi_thread")]
async fn ready_is_the_word_of_who_asked_for_the_ticket() {
    let pair = Pair::new(1).await;
    let before = pair.digests();
    let (source, destination) = pair.migrator().await;
    let (name, arrival) = awaiting(&pair).await;
    let ready = v1::ReadyRequest { operation: arrival.clone() };
    let other = pair.lab.client_named(&pair.destination, "spiffe://lab.test/migrator/other").await;
    refused(other.ready(ready.clone()).await, Code::PermissionDenied, "NOT_YOUR_OPERATION");
    let known = pair.destination.core().operations.get(&arrival.parse().unwrap()).unwrap();
    assert!(known.owes_ready(), "what was refused has no effect");
    destination.ready(ready.clone()).await.unwrap();
    assert!(known.view().handover.unwrap().record.ready, "on record before it is answered");
    let ended = soon(done(&source, &name)).await;
    assert_eq!(ended.result(), v1::OperationResult::Succeeded, "{ended:?}");
    moved(&pair, &before);
    refused(destination.ready(ready).await, Code::FailedPrecondition, "OPERATION_OVER");
    pair.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_admin_may_say_it_too() {
    let pair = Pair::new(1).await;
    let (source, _) = pair.migrator().await;
    let (name, operation) = awaiting(&pair).await;
    let admin = pair.lab.client(&pair.destination, "admin").await;
    admin.ready(v1::ReadyRequest { operation }).await.unwrap();
    assert_eq!(soon(done(&source, &name)).await.result(), v1::OperationResult::Succeeded);
    pair.stop().await;
}

/// Said by whoever has the secret of the source, that was told nothing of the sort to say.
#[tokio::test(flavor = "multi_thread")]
async fn no_commit_comes_before_ready() {
    let pair = Pair::new(1).await;
    let before = pair.digests();
    let (source, destination) = pair.migrator().await;
    let (name, operation) = awaiting(&pair).await;
    let as_source = pair.lab.client_named(&pair.destination, "spiffe://lab.test/agent/source").await;
    let get = v1::GetHandoverRequest { operation: operation.clone(), ..Default::default() };
    let told = as_source.get_handover(get).await.unwrap().handover.unwrap();
    assert_eq!(told.step(), v1::HandoverStep::Loading);
    let known = pair.destination.core().operations.get(&operation.parse().unwrap()).unwrap();
    let record = known.view().handover.unwrap().record;
    let commit = v1::CommitHandoverRequest {
        operation: operation.clone(),
        epochs: record.epochs.iter().map(|epoch| epoch.0).collect(),
        ..Default::default()
    };
    let commit = commit.proven(&record.secret.unwrap());
    let early = soon(at_once(as_source).commit_handover(commit)).await;
    refused(early, Code::Unavailable, "NOT_READY");
    assert_eq!(pair.there[0].device.state(), State::Resuming);
    destination.ready(v1::ReadyRequest { operation }).await.unwrap();
    assert_eq!(soon(done(&source, &name)).await.result(), v1::OperationResult::Succeeded);
    moved(&pair, &before);
    pair.stop().await;
}

/// What was waited for in vain is what both sides tell of: Ready, or else the source's word.
#[tokio::test(flavor = "multi_thread")]
async fn who_waited_in_vain_says_for_what() {
    // Beside these the destination waits ten seconds longer than it is asked to.
    let short = std::time::Duration::from_millis(300);
    let pair = Pair::with(1, small, &[], &[], |config| config.server.stream_idle_timeout = short).await;
    let before = pair.digests();
    let (source, destination) = pair.migrator().await;
    let in_a_second = |admission: &mut v1::AdmitRequest, request: &mut v1::MigrateRequest| {
        manual(admission, request);
        request.commit_timeout = Some(prost_types::Duration { seconds: 1, nanos: 0 });
    };
    let name = pair
        .start(|admission, request| {
            in_a_second(admission, request);
            admission.require_ready = true;
        })
        .await;
    let ended = soon(done(&source, &name)).await;
    let arrival = soon(done(&destination, &ended.handover.clone().unwrap().peer_operation)).await;
    assert_eq!(failure(&arrival), "OWNER_NOT_READY", "{arrival:?}");
    for told in [&arrival, &ended] {
        let message = &told.failure.as_ref().unwrap().message;
        assert!(message.contains("did not say Ready within 11.5s"), "{message}");
    }
    stayed(&pair, &(before.0, pair.digests().1));
    pair.stop().await;
}
