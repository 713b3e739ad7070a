//! Migrations over connections that break, fall silent, are quiet for long, or end between the word and its answer.

use std::time::Duration;

use vfio_checkpoint_device::sim::SimConfig;
use vfio_checkpoint_fsm::State;
use vfio_checkpoint_proto::v1;

use crate::flow::{device, done, failure, soon};
use crate::lab::PATIENCE;
use crate::migrations::{manual, moved, prepared, stayed, when};
use crate::pair::{Pair, small};
use crate::relay::{Fate, Relay};

fn large(seed: u64) -> SimConfig {
    SimConfig { memory_bytes: 8 << 20, ..small(seed) }
}

fn through(relay: &Relay) -> impl FnOnce(&mut v1::AdmitRequest, &mut v1::MigrateRequest) {
    let endpoint = format!("https://localhost:{}", relay.address().port());
    move |_, request| request.target.as_mut().unwrap().endpoint = endpoint
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_breaks_is_gone_on_from_where_it_broke() {
    let pair = Pair::with(1, large, &[], &[], |_| {}).await;
    let before = pair.digests();
    // The first connection is that of the questions beforehand.
    let cuts = [Fate::Lasts, Fate::CutAfter(2_000_000), Fate::CutAfter(1_500_000), Fate::Lasts];
    let relay = Relay::to(&pair.destination, &cuts).await;
    let (source, _) = pair.migrator().await;
    let name = pair.start(through(&relay)).await;
    let ended = soon(done(&source, &name)).await;
    assert_eq!(ended.result(), v1::OperationResult::Succeeded, "{ended:?}");
    let handover = ended.handover.unwrap();
    assert_eq!(handover.reconnects, 2, "{handover:?}");
    assert!(handover.resent_bytes > 0 && handover.resent_bytes < ended.moved_bytes, "{handover:?}");
    moved(&pair, &before);
    pair.stop().await;
}

/// A device does not stand still for an outage, though all that is left of it would go into the spool at once.
#[tokio::test(flavor = "multi_thread")]
async fn no_device_is_stopped_before_the_line_is_back() {
    let pair = Pair::with(1, large, &[], &[], |config| config.server.stream_resume_window = PATIENCE).await;
    let before = pair.digests();
    let relay = Relay::to(&pair.destination, &[Fate::Lasts, Fate::CutAfter(2_000_000), Fate::Lasts]).await;
    // The questions beforehand, and the stream. Whoever comes after that is turned away.
    relay.admit(2);
    let (source, _) = pair.migrator().await;
    let name = pair.start(through(&relay)).await;
    soon(relay.turned_away(5)).await;
    assert_eq!(pair.here[0].device.state(), State::PreCopy);
    let seen = soon(when(&source, &name, |seen| seen.moved_bytes > 4_000_000)).await;
    assert_eq!(seen.phase(), v1::OperationPhase::PreCopy, "{seen:?}");
    relay.admit(usize::MAX);
    let ended = soon(done(&source, &name)).await;
    assert_eq!(ended.result(), v1::OperationResult::Succeeded, "{ended:?}");
    assert_eq!(ended.handover.unwrap().reconnects, 1);
    moved(&pair, &before);
    pair.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_that_does_not_come_back_costs_nothing_but_time() {
    let pair = Pair::with(1, large, &[], &[], |_| {}).await;
    let before = pair.digests();
    let relay =
        Relay::to(&pair.destination, &[Fate::Lasts, Fate::CutAfter(2_000_000), Fate::CutAfter(0)]).await;
    let (source, _) = pair.migrator().await;
    let name = pair.start(through(&relay)).await;
    let ended = soon(done(&source, &name)).await;
    assert_eq!(failure(&ended), "STREAM_BROKEN", "{ended:?}");
    // The destination gives up by itself, and its device runs without anybody's state.
    let admin = pair.lab.client(&pair.destination, "admin").await;
    let arrival = soon(done(&admin, &ended.handover.unwrap().peer_operation)).await;
    assert_eq!(arrival.handover.unwrap().verdict(), v1::HandoverVerdict::Refused);
    stayed(&pair, &(before.0, pair.digests().1));
    pair.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_word_that_is_swallowed_is_said_again_until_it_is_answered() {
    for down_alone in [false, true] {
        let pair = Pair::new(2).await;
        let before = pair.digests();
        let relay = Relay::to(&pair.destination, &[]).await;
        let (source, _) = pair.migrator().await;
        let endpoint = through(&relay);
        let name = pair
            .start(|admission, request| {
                endpoint(admission, request);
                manual(admission, request);
            })
            .await;
        prepared(&source, &name).await;
        // No connection is closed: the word goes nowhere, or only its answer does.
        if down_alone {
            relay.mute_down();
        } else {
            relay.mute();
        }
        source.commit(v1::CommitRequest { operation: name.clone() }).await.unwrap();
        let doubtful = |seen: &v1::Operation| seen.handover.as_ref().unwrap().in_doubt;
        let seen = when(&source, &name, doubtful).await;
        assert_eq!(seen.phase(), v1::OperationPhase::Committing);
        assert!(pair.here.iter().all(|bench| bench.device.state() == State::Stop), "it stands still");
        relay.heal();
        let ended = soon(done(&source, &name)).await;
        assert_eq!(ended.result(), v1::OperationResult::Succeeded, "{ended:?}");
        assert!(!ended.handover.unwrap().in_doubt);
        moved(&pair, &before);
        pair.stop().await;
    }
}

/// However long it takes until the destination's workload is ready: the stream that waits for it does not break, and the
/// commit has all of its time after that. A destination does not know how long its source waits to hear of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_source_hears_of_the_destination_for_as_long_as_ready_takes() {
    for is_alone in [false, true] {
        hears_until_ready(is_alone).await;
    }
}

/// With a patience that is short on both sides, or on the source's alone.
async fn hears_until_ready(is_alone: bool) {
    let idle = Duration::from_millis(300);
    let is_source = std::sync::atomic::AtomicBool::new(true);
    let pair = Pair::with(1, small, &[], &[], |config| {
        if is_source.swap(false, std::sync::atomic::Ordering::Relaxed) || !is_alone {
            config.server.stream_idle_timeout = idle;
        }
    })
    .await;
    let before = pair.digests();
    let (source, destination) = pair.migrator().await;
    let name = pair
        .start(|admission, request| {
            admission.require_ready = true;
            manual(admission, request);
        })
        .await;
    let seen = when(&source, &name, |seen| seen.phase() == v1::OperationPhase::Sealing).await;
    let arrival = seen.handover.unwrap().peer_operation;
    let waits = |seen: &v1::Operation| seen.handover.as_ref().is_some_and(|handover| handover.awaits_ready);
    let waiting = when(&destination, &arrival, waits).await;
    // Nothing happens meanwhile.
    let early = tokio::time::timeout(4 * idle, done(&source, &name)).await;
    assert!(early.is_err(), "{early:?}");
    destination.ready(v1::ReadyRequest { operation: arrival.clone() }).await.unwrap();
    assert_eq!(prepared(&source, &name).await.handover.unwrap().reconnects, 0);
    let held = prepared(&destination, &arrival).await;
    let deadline = |seen: &v1::Operation| seen.deadline.map(|at| (at.seconds, at.nanos));
    assert!(deadline(&held) > deadline(&waiting), "it runs anew");
    assert!(deadline(&held) > deadline(&prepared(&source, &name).await), "the source decides");
    source.commit(v1::CommitRequest { operation: name.clone() }).await.unwrap();
    let ended = soon(done(&source, &name)).await;
    assert_eq!(ended.result(), v1::OperationResult::Succeeded, "{ended:?}");
    moved(&pair, &before);
    pair.stop().await;
}

/// Which versions two agents speak, and whether they go together.
#[tokio::test(flavor = "multi_thread")]
async fn agents_of_neighbouring_versions_go_together() {
    for (theirs, ours, version) in [
        ([1, 1], [1, 2], Some(1)),
        ([1, 2], [1, 1], Some(1)),
        ([2, 3], [1, 2], Some(2)),
        ([1, 2], [2, 3], Some(2)),
        ([3, 3], [1, 2], None),
        ([1, 2], [3, 3], None),
    ] {
        let first = std::sync::atomic::AtomicBool::new(true);
        let pair = Pair::with(1, small, &[], &[], |config| {
            let is_source = first.swap(false, std::sync::atomic::Ordering::Relaxed);
            config.server.stream_versions = Some(if is_source { theirs } else { ours });
        })
        .await;
        let before = pair.digests();
        let (source, _) = pair.migrator().await;
        let dry = v1::MigrateRequest { validate_only: true, ..pair.request(bytes::Bytes::new()) };
        let dry = source.migrate(dry).await.unwrap();
        assert_eq!(dry.prediction.unwrap().version, version.unwrap_or(0));
        let reasons: Vec<_> =
            dry.blockers.iter().map(|found| found.blocker.as_ref().unwrap().reason()).collect();
        if version.is_none() {
            assert_eq!(reasons, [v1::BlockerReason::NoCommonVersion]);
            let refused = pair.migrate(|_, _| {}).await.unwrap_err();
            assert!(refused.to_string().contains("version"), "{refused}");
            assert_eq!(pair.digests(), before);
        } else {
            assert!(reasons.is_empty(), "{reasons:?}");
            let name = pair.start(|_, _| {}).await;
            let ended = soon(done(&source, &name)).await;
            assert_eq!(ended.result(), v1::OperationResult::Succeeded, "{theirs:?} {ours:?}: {ended:?}");
            moved(&pair, &before);
        }
        assert!(device(&source, "n0").await.blockers.is_empty());
        pair.stop().await;
    }
}
