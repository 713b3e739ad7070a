//! A destination that is killed while it waits for Ready.
//!
//! ```text
//!   destination: HELD on record, Ready not said --killed, and its source too
//!     started again: its devices are kept, and reset: REFUSED, also to whoever has the secret of its source
//!   source, started again: runs on
//! ```

use std::sync::Arc;

use vfio_checkpoint_proto::proof::Proven as _;
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_server::environment::Environment;
use vfio_checkpoint_server::journal::Journal;
use vfio_checkpoint_server::operation::record::{HandoverRecord, RecordedStep};

use super::settle::After;
use super::{Move, NAMES, Pair, becomes, operations};
use crate::figure;
use crate::lab::PATIENCE;

impl Pair {
    /// What an agent that was killed has on record of an arrival.
    async fn arrival_on_record(&self, side: usize, name: &str) -> (RecordedStep, HandoverRecord) {
        let environment = Environment::production();
        let folder = self.nodes[side].config().node.state_dir;
        let journal = Journal::open(&folder, &environment.executor, Arc::clone(&environment.disk)).unwrap();
        let mut recorded = journal.load().unwrap().operations;
        journal.settled().await;
        recorded.retain(|operation| operation.name.to_string() == name);
        let arrival = recorded.pop().expect("it is on record");
        (arrival.step, *arrival.handover.unwrap())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_said_ready_of_does_not_run_after_a_kill() {
    let mut pair = Pair::new(1, true).await;
    let (home, away) = (pair.home, pair.away());
    let job = Move::new(false).awaiting_ready();
    pair.driven(&job).await.await.unwrap();
    let client = pair.nodes[away].client().await;
    let arrival = async {
        loop {
            let arrives = |found: &v1::Operation| found.kind() == v1::OperationKind::Arrival;
            if let Some(arrival) = operations(&client).await.into_iter().find(arrives) {
                return arrival.name;
            }
        }
    };
    let arrival = tokio::time::timeout(PATIENCE, arrival).await.expect("it arrives");
    let waits =
        becomes(&client, &arrival, |seen| seen.handover.as_ref().is_some_and(|known| known.awaits_ready));
    assert!(tokio::time::timeout(PATIENCE, waits).await.unwrap().unwrap(), "{}", pair.log());
    // The source first: it says nothing more, not even that it gives up.
    pair.kill(home);
    pair.kill(away);
    let (step, handover) = pair.arrival_on_record(away, &arrival).await;
    assert!(matches!(step, RecordedStep::Held { .. }), "{step:?}");

    pair.start(away).await;
    let as_source = pair.nodes[away].client_as(&format!("spiffe://lab.test/agent/{}", NAMES[home])).await;
    let commit = v1::CommitHandoverRequest {
        operation: arrival,
        epochs: handover.epochs.iter().map(|epoch| epoch.0).collect(),
        ..Default::default()
    };
    let told =
        as_source.commit_handover(commit.proven(&handover.secret.unwrap())).await.unwrap().handover.unwrap();
    assert_eq!(told.verdict(), v1::HandoverVerdict::Refused, "{}", pair.log());

    pair.start(home).await;
    pair.settle(&job, After::Stays).await;
    pair.moves(&Move::new(false)).await;
    figure("1 destination killed while it waited for Ready: nothing ran there, and the source ran on");
}
