//! What the agents say to each other of a hand-over that is decided, or over.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vfio_checkpoint_fsm::State;
use vfio_checkpoint_proto::proof::Proven as _;
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_server::failpoint;

use crate::flow::{done, soon};
use crate::pair::Pair;

/// As the page on the hand-over has it: a source that gives up too late is told what is on record, and what is settled is told
/// until it is forgotten, which is not at once. Of what is told again nothing is written again.
#[tokio::test(flavor = "multi_thread")]
async fn whoever_asks_after_the_end_is_told_the_same() {
    let pair = Pair::new(1).await;
    let (source, destination) = pair.migrator().await;
    let name = pair.start(|_, _| {}).await;
    let ended = soon(done(&source, &name)).await;
    let operation = ended.handover.unwrap().peer_operation;
    assert_eq!(soon(done(&destination, &operation)).await.result(), v1::OperationResult::Succeeded);
    let arrival = pair.destination.core().operations.get(&operation.parse().unwrap()).unwrap();
    let secret = arrival.view().handover.unwrap().record.secret.unwrap();
    let epochs = arrival.fixed.devices.iter().map(|device| device.epoch.0).collect();

    let as_source = pair.lab.client_named(&pair.destination, "spiffe://lab.test/agent/source").await;
    let get = v1::GetHandoverRequest { operation: operation.clone(), settled: true, ..Default::default() };
    let get = get.proven(&secret);
    let abandon = v1::AbandonHandoverRequest {
        operation: operation.clone(),
        reason: "too late".to_owned(),
        ..Default::default()
    };
    let abandon = abandon.proven(&secret);
    let commit = v1::CommitHandoverRequest { operation, epochs, ..Default::default() }.proven(&secret);
    let settled = as_source.get_handover(get.clone()).await.unwrap().handover.unwrap();
    assert_eq!(
        (settled.step(), settled.verdict()),
        (v1::HandoverStep::Over, v1::HandoverVerdict::Committed),
        "{settled:?}"
    );
    let written = Arc::new(AtomicU32::new(0));
    let _watching = failpoint::watch(&pair.destination.core().config.node.state_dir, {
        let written = Arc::clone(&written);
        move |point| {
            if point.starts_with("commit of ") {
                written.fetch_add(1, Ordering::Relaxed);
            }
        }
    });
    let told = [
        as_source.abandon_handover(abandon).await.unwrap().handover.unwrap(),
        as_source.commit_handover(commit).await.unwrap().handover.unwrap(),
        as_source.get_handover(get).await.unwrap().handover.unwrap(),
    ];
    assert_eq!(told, [settled.clone(), settled.clone(), settled]);
    assert_eq!(written.load(Ordering::Relaxed), 0, "commits");
    assert_eq!(pair.there[0].device.state(), State::Running, "it runs on");
    pair.stop().await;
}
