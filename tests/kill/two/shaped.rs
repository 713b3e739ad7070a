//! Two hosts: agents in two network namespaces, and a slow link between them.
//!
//! ```text
//!   this program --unshare--> this program, one test: harness, agent a -- link0, tbf -- agent b
//! ```
//! A state takes most of a second here, so that what is in the middle of a stream is really on its way: in queues of the
//! kernel, and lost with the link. Nobody is told of a link that is down; TCP, and the agents, find out by silence.
//!
//! Where the machine lets nobody have a network of their own, the tests say so and pass.

use std::env;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use vfio_checkpoint_proto::v1;

use super::kills::{At, Victim};
use super::namespaces::{Far, PREPARE, Rate};
use super::settle::After;
use super::{Move, Pair, operations};
use crate::figure;
use crate::job::done;
use crate::unshared::{one_test, unshared};

/// Says to this test program that it has a network of its own.
const NETWORK: &str = "KILL_TEST_NETWORK";
/// A device has 256 KiB: half a second.
const SLOW: Rate = Rate { kbit_s: 4000, burst_bytes: 16 << 10 };

/// Runs a test of this program where the network is its own.
#[allow(clippy::print_stdout, reason = "what it says is the test's")]
fn on_a_network(test: &str) {
    match unshared("--net", PREPARE, (NETWORK, "1".as_ref())) {
        Some(there) => one_test(there, test),
        None => {
            println!(
                "skipped: nobody may have a shaped network of their own here (iproute2, and root or user namespaces)"
            );
        }
    }
}

/// The link, for a test that is run by another on a network of its own; by itself it has nothing to do.
fn slow() -> Option<Arc<Far>> {
    env::var_os(NETWORK)?;
    Some(Arc::new(Far::new(SLOW).unwrap()))
}

#[test]
fn agents_are_killed_while_a_state_is_on_a_slow_link() {
    on_a_network("two::shaped::kills_on_a_slow_link");
}

#[test]
fn a_link_that_goes_down_costs_no_device() {
    on_a_network("two::shaped::a_slow_link_goes_down");
}

#[test]
fn a_device_that_changes_faster_than_the_link_carries_stays() {
    on_a_network("two::shaped::a_busy_device_on_a_slow_link");
}

fn taken(operation: &v1::Operation) -> Duration {
    let time = |time: Option<prost_types::Timestamp>| SystemTime::try_from(time.unwrap()).unwrap();
    time(operation.end_time).duration_since(time(operation.create_time)).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn kills_on_a_slow_link() {
    let Some(far) = slow() else { return };
    let mut pair = Pair::across(&far, true, &[]).await;
    // There, and back.
    for _ in 0..2 {
        let moved = pair.moves(&Move::new(true)).await;
        // What the link carries meanwhile is all that can have been moved, so it is this link.
        let at_least = (moved.moved_bytes - SLOW.burst_bytes) * 8 / SLOW.kbit_s;
        assert!(taken(&moved) >= Duration::from_millis(at_least), "{moved:?}");
    }
    let rows = [
        (At::Destination("chunk"), Victim::Source),
        (At::Destination("chunk"), Victim::Destination),
        (At::Destination("chunk"), Victim::Both),
        (At::Source("commit is sent"), Victim::Source),
        (At::Destination("after commit of RUNNING"), Victim::Destination),
        (At::Destination("after commit of RUNNING"), Victim::Both),
    ];
    for (at, victim) in rows {
        let after = at.after(1, victim, true);
        eprintln!("{victim:?} killed at {at:?}: {after:?}");
        let job = Move::new(false);
        pair.killed(&job, at, victim, false).await;
        pair.start_again(victim).await;
        pair.settle(&job, after).await;
        pair.moves(&Move::new(false)).await;
    }
    figure(&format!("{} kills over a link of {} kbit/s between two namespaces", rows.len(), SLOW.kbit_s));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_link_goes_down() {
    let Some(far) = slow() else { return };
    // A connection on which nothing is heard is given up after two seconds; a giver may come back for half a minute.
    let lines = [
        "server.keepalive_interval = \"1s\"",
        "server.keepalive_timeout = \"1s\"",
        "server.stream_resume_window = \"30s\"",
    ];
    let mut pair = Pair::across(&far, true, &lines).await;
    let mut resent = 0;
    // Of the state, of the order to run, and of the answer to it: from either host to the other.
    for (is_here, point, times) in [
        (false, "chunk", 2),
        (false, "chunk", 2),
        (true, "commit is sent", 1),
        (false, "after commit of RUNNING", 1),
    ] {
        eprintln!("the link goes down at {point}");
        let (home, away, job) = (pair.home, pair.away(), Move::new(false));
        let side = if is_here { home } else { away };
        pair.nodes[home].arm("nothing", 1).await;
        pair.nodes[side].arm(point, times).await;
        let driving = pair.driven(&job).await;
        pair.nodes[side].stopped(point).await;
        driving.await.unwrap();
        far.set_up(false);
        pair.nodes[side].release();
        let is_streaming = point == "chunk";
        let found = if is_streaming { "the stream broke" } else { "the destination cannot be asked" };
        let line = |line: &str| line.contains(found).then_some(());
        pair.nodes[home].agent().wait_for("that it finds the link down", line).await;
        far.set_up(true);
        let ended = pair.settle(&job, After::Moves).await.unwrap();
        let handover = ended.handover.unwrap();
        assert_eq!(handover.reconnects > 0, is_streaming, "{handover:?}");
        resent += handover.resent_bytes;
        pair.moves(&Move::new(false)).await;
    }
    assert!(resent > 0, "what was on its way was lost with the link");
    figure(&format!("4 times a link went down in a migration: all moved, {resent} bytes were sent again"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_device_on_a_slow_link() {
    let Some(far) = slow() else { return };
    let mut pair = Pair::across(&far, false, &[]).await;
    let home = pair.home;
    pair.kill(home);
    pair.nodes[home].kill_device(0);
    pair.nodes[home].start_device(0, "sim:seed=1,memory=256KiB,dirty=8MiB").await;
    pair.start(home).await;
    let job = Move::new(true).within(Duration::from_millis(50));
    pair.driven(&job).await.await.unwrap();
    let clients = [pair.nodes[0].client().await, pair.nodes[1].client().await];
    let operation = pair.recorded(&clients[home], &job).await.unwrap();
    let ended = done(&clients[home], &operation.name).await.unwrap();
    assert_eq!(ended.failure.as_ref().unwrap().reason, "NO_CONVERGENCE", "{ended:?}");
    assert_eq!(ended.outcome(), v1::StateOutcome::Preserved, "{ended:?}");
    assert!(ended.moved_bytes > 256 << 10, "it went on trying: {ended:?}");
    for arrival in operations(&clients[pair.away()]).await {
        let arrival = done(&clients[pair.away()], &arrival.name).await.unwrap();
        assert_eq!(arrival.result(), v1::OperationResult::Failed, "{arrival:?}");
    }
    pair.all_at_rest(&clients).await;
    // With as much time as the link takes it moves.
    let moved = pair.moves(&Move::new(true)).await;
    assert!(moved.downtime.is_some());
    figure("1 busy device behind a slow link: stayed for want of convergence, and then moved");
}
