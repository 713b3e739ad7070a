//! A process that stands still, and a wire that is silent or cut: nobody can tell the one from the other, or from a death.
//!
//! ```text
//!   source --commit--> (silent, cut)      destination    heard later: moves
//!   source <--answer-- (silent, cut)      destination    asked again: moves
//!   source ==state===> (silent)           destination    undone: stays; source runs on
//!   source, SIGSTOP    its destination refuses by its deadline; SIGCONT: refused, stays
//!   destination, SIGSTOP between its record and the SET; SIGCONT: it goes on: moves
//!   device, SIGSTOP before it stops   not told as stopped before it has: then moves
//! ```

use rustix::process::Signal;
use vfio_checkpoint_proto::v1;

use super::relay::Way;
use super::settle::After;
use super::{Move, Pair, becomes};
use crate::figure;
use crate::job::done;

/// A wire on which nothing is heard is given up after two seconds, and nobody comes back to it for long.
const KEEPALIVE: [&str; 3] = [
    "server.keepalive_interval = \"1s\"",
    "server.keepalive_timeout = \"1s\"",
    "server.stream_resume_window = \"1s\"",
];

/// A migration that is stopped at one point of one side.
async fn stopped_at(pair: &mut Pair, is_here: bool, point: &str, job: &Move) -> usize {
    let (home, side) = (pair.home, if is_here { pair.home } else { pair.away() });
    // What it has said so far is passed over.
    pair.nodes[home].arm("nothing", 1).await;
    // The end of the migration before is put on record once more, when it is settled, and is not what is meant.
    let is_end = point.ends_with("commit of ENDED");
    let first = if is_end { "read back" } else { point };
    pair.nodes[side].arm(first, if point == "chunk" { 2 } else { 1 }).await;
    let driving = pair.driven(job).await;
    pair.nodes[side].stopped(first).await;
    if is_end {
        pair.nodes[side].arm(point, 1).await;
        pair.nodes[side].release();
        pair.nodes[side].stopped(point).await;
    }
    // With a Commit that the caller says it is said by now; all else goes on by itself.
    driving.await.unwrap();
    side
}

/// Waits until the source has found so many times that it cannot ask its destination.
async fn doubts(pair: &mut Pair, times: usize) {
    let home = pair.home;
    for _ in 0..times {
        let line = |line: &str| line.contains("the destination cannot be asked").then_some(());
        pair.nodes[home].agent().wait_for("that it is in doubt", line).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wire_that_is_silent_costs_time_and_no_device() {
    let mut pair = Pair::configured(1, true, &KEEPALIVE).await;
    for (is_here, point, after) in [
        (true, "commit is sent", After::Moves),
        (false, "after commit of RUNNING", After::Moves),
        (false, "chunk", After::Stays),
    ] {
        eprintln!("silent at {point}: {after:?}");
        let job = Move::new(false);
        let side = stopped_at(&mut pair, is_here, point, &job).await;
        let away = pair.away();
        pair.relays[away].lead(Way::Silent);
        pair.nodes[side].release();
        if after == After::Moves {
            // What was sent is lost, and whoever is called does not answer.
            doubts(&mut pair, 1).await;
        } else {
            let home = pair.home;
            // The destination may have got all, and waits for its source then: which tells it, as soon as it can.
            let line = |line: &str| line.starts_with("at save: Unwinding").then_some(());
            pair.nodes[home].agent().wait_for("that it is undone", line).await;
        }
        pair.lead(away);
        pair.settle(&job, after).await;
        pair.moves(&Move::new(false)).await;
    }
    figure("3 wires that went silent and were never ended: 2 moved once they were free, 1 undone");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wire_that_is_cut_costs_no_device() {
    let mut pair = Pair::new(1, true).await;
    let cuts = [
        (true, "commit is sent"),
        (false, "restore: AwaitingReady"),
        (false, "after commit of RUNNING"),
        (false, "before commit of ENDED"),
    ];
    for (is_here, point) in cuts {
        eprintln!("cut at {point}");
        let job = Move::new(false);
        let side = stopped_at(&mut pair, is_here, point, &job).await;
        pair.relays[pair.away()].cut();
        if !is_here {
            // It has asked again before the first question is answered.
            pair.in_doubt(&job, "").await;
        }
        pair.nodes[side].release();
        pair.settle(&job, After::Moves).await;
        pair.moves(&Move::new(false)).await;
    }
    figure(&format!("{} wires cut between the commit and its answer: all moved", cuts.len()));
}

/// It stands still longer than its hold would have lasted, and than a call of its source may take.
#[tokio::test(flavor = "multi_thread")]
async fn a_destination_that_stands_still_before_its_set_goes_on_alone() {
    let mut pair = Pair::configured(1, true, &KEEPALIVE).await;
    let job = Move::new(false).by_hand_within(4);
    let away = stopped_at(&mut pair, false, "after commit of RUNNING", &job).await;
    pair.nodes[away].signal_agent(Signal::STOP);
    // The first is a call that is not answered for ten seconds, each that follows a connection that is not for five.
    doubts(&mut pair, 3).await;
    pair.nodes[away].signal_agent(Signal::CONT);
    pair.nodes[away].release();
    pair.settle(&job, After::Moves).await;
    pair.moves(&Move::new(false)).await;
    figure("1 destination that stood still between its record and the SET: it went on, alone");
}

/// The destination waits longer than the source might: by ten seconds, and by what the news of Prepared may take.
#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_stands_still_until_it_was_refused_runs_on() {
    let news = ["server.stream_idle_timeout = \"3s\"", "server.stream_resume_window = \"1s\""];
    let mut pair = Pair::configured(1, true, &news).await;
    let job = Move::new(false).by_hand_within(4);
    let home = stopped_at(&mut pair, true, "commit is sent", &job).await;
    pair.nodes[home].signal_agent(Signal::STOP);
    let there = pair.nodes[pair.away()].client().await;
    let arrival = super::operations(&there).await.into_iter().find(|operation| !operation.done).unwrap();
    assert_eq!(arrival.kind(), v1::OperationKind::Arrival);
    let arrival = done(&there, &arrival.name).await.unwrap();
    let why = arrival.failure.as_ref().unwrap();
    assert_eq!(why.reason, "COMMIT_TIMEOUT", "{arrival:?}");
    assert!(why.message.contains("the source did not say Commit within"), "{arrival:?}");
    pair.nodes[home].signal_agent(Signal::CONT);
    pair.nodes[home].release();
    let ended = pair.settle(&job, After::Stays).await.unwrap();
    assert_eq!(ended.failure.as_ref().unwrap().reason, "HANDOVER_REFUSED", "{ended:?}");
    assert_eq!(ended.handover.unwrap().verdict(), v1::HandoverVerdict::Refused);
    pair.moves(&Move::new(false)).await;
    figure("1 source that stood still until its destination had refused: it runs on");
}

/// Whoever moves the workload's memory takes what was written until then for all there is.
#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_was_told_to_stop_is_not_told_as_stopped_before_it_is() {
    let mut pair = Pair::new(1, true).await;
    let job = Move::new(false);
    let home = stopped_at(&mut pair, true, "save: Stopping", &job).await;
    pair.nodes[home].signal_device(0, Signal::STOP);
    pair.nodes[home].release();
    let client = pair.nodes[home].client().await;
    let name = pair.recorded(&client, &job).await.unwrap().name;
    let seen = |operation: &v1::Operation| {
        let stopped = operation.handover.as_ref().is_some_and(|known| known.stop_time.is_some());
        assert!(!stopped, "it has not stopped yet: {operation:?}");
        operation.phase() == v1::OperationPhase::Stopping
    };
    assert!(becomes(&client, &name, seen).await.unwrap(), "it is over");
    pair.nodes[home].signal_device(0, Signal::CONT);
    let ended = pair.settle(&job, After::Moves).await.unwrap();
    assert!(ended.handover.unwrap().stop_time.is_some());
    figure("1 device that stood still before it stopped: told as stopped once it had");
}
