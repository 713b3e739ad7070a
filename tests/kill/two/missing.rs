//! A device that is not there when its agent is back: it cannot be taken over yet, is not configured any more, or its process
//! has died. Whatever the holder keeps of it stays as it was, and nothing of it runs by mistake later.
//!
//! ```text
//!   source, COMMITTING      the destination runs it; found again: quarantined, and good for nothing but a reset
//!   destination, RUNNING    BROKEN: nobody can say that it does not run, so the source resumes only past a statement
//!   destination, HELD       REFUSED: it was never told to run, and stays quarantined until somebody resets it
//!   half of a set is dead   destination, RUNNING: LOST; REVERTING: REFUSED; the other half is reset, and is somebody new
//! ```

use rustix::process::Signal;
use tonic::Code;
use vfio_checkpoint_client::call::Client;
use vfio_checkpoint_proto::v1;

use super::relay::Way;
use super::settle::After;
use super::{Move, NAMES, Pair, becomes};
use crate::faulty::Faulty;
use crate::figure;
use crate::here::{RETRY, begin};
use crate::job::done;
use crate::lab::PATIENCE;
use crate::world::{Content, MEMORY};

impl Pair {
    /// Begins a migration, and kills one side where it comes to a step.
    async fn dies(&mut self, job: &Move, side: usize, point: &str) {
        self.nodes[side].arm(point, 1).await;
        let driving = self.driven(job).await;
        self.nodes[side].stopped(point).await;
        self.kill(side);
        driving.abort();
        let _ = driving.await;
    }

    /// Has an admin let go of the devices of a migration in doubt.
    async fn lets_go(&self, client: &Client, operation: &str) -> v1::Operation {
        let let_go = v1::ResolveRequest {
            operation: operation.to_owned(),
            resolution: v1::Resolution::LetGo.into(),
            accept_loss: true,
            statement: "what is there is enough".to_owned(),
            ..Default::default()
        };
        assert_eq!(client.resolve(let_go).await.unwrap().refused, "");
        done(client, operation).await.unwrap()
    }

    /// The migration, once its source knows how it ended.
    async fn over(&self, client: &Client, job: &Move) -> v1::Operation {
        let name = self.recorded(client, job).await.expect("it was begun").name;
        done(client, &name).await.unwrap()
    }
}

/// Asserts that a device is quarantined in a state, and is brought back by nothing but a reset.
async fn is_good_for_a_reset_only(client: &Client, state: v1::MigrationState) {
    let request = v1::GetDeviceRequest { name: "devices/nic0".to_owned() };
    let device = client.get_device(request).await.unwrap().device.unwrap();
    assert_eq!(device.standing(), v1::DeviceStanding::Quarantined, "{device:?}");
    assert_eq!(device.state(), state, "{device:?}");
    let reset = |mode: v1::ResetMode| v1::ResetDeviceRequest {
        name: device.name.clone(),
        mode: mode.into(),
        ..Default::default()
    };
    let refused = client.reset_device(reset(v1::ResetMode::KeepState)).await.unwrap_err();
    let refusal = refused.refusal().unwrap();
    assert_eq!(refusal.code, Code::FailedPrecondition, "{refusal}");
    assert!(client.reset_device(reset(v1::ResetMode::DiscardState)).await.unwrap().state_lost);
}

/// The holder has a device that was handed over, and the agent gets at it only once all is over.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_handed_over_does_not_run_when_it_is_adopted_late() {
    let mut pair = Pair::new(1, true).await;
    let (home, job) = (pair.home, Move::new(false));
    pair.dies(&job, home, "after commit of COMMITTING").await;
    let faulty = Faulty::new();
    faulty.gate(RETRY);
    faulty.break_lane("adopt", 0);
    let agent = begin(&pair.nodes[home], &faulty).await;
    let client = pair.nodes[home].client_of(&agent).await;
    let ended = pair.over(&client, &job).await;
    assert_eq!(ended.outcome(), v1::StateOutcome::Moved, "{ended:?}");
    faulty.mend();
    // Some of the waits of this length are for an answer of the destination.
    for _ in 0..8 {
        faulty.pass(RETRY);
    }
    let mut watching = client.watch_devices(v1::WatchDevicesRequest::default()).await.unwrap();
    let found = async {
        loop {
            let device = watching.next().await.unwrap().unwrap().device.unwrap();
            if device.standing() != v1::DeviceStanding::Unavailable {
                return;
            }
        }
    };
    tokio::time::timeout(PATIENCE, found).await.expect("it is adopted");
    pair.watch.check(&pair.own, pair.kept_since);
    is_good_for_a_reset_only(&client, v1::MigrationState::Stop).await;
    agent.stop().await.unwrap();
    pair.start(home).await;
    pair.settle(&job, After::Moves).await;
    pair.moves(&Move::new(false)).await;
    figure("1 device that was handed over and adopted late: it did not run again");
}

/// The same, where somebody took the device out of the configuration meanwhile, and puts it back.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_handed_over_does_not_run_when_it_is_configured_again() {
    let mut pair = Pair::new(1, true).await;
    let (home, job) = (pair.home, Move::new(false));
    pair.dies(&job, home, "after commit of COMMITTING").await;
    let config = pair.nodes[home].without_devices();
    pair.start(home).await;
    let ended = pair.over(&pair.nodes[home].client().await, &job).await;
    assert_eq!(ended.outcome(), v1::StateOutcome::Moved, "{ended:?}");
    pair.kill(home);
    pair.nodes[home].restore_config(&config);
    pair.start(home).await;
    pair.watch.check(&pair.own, pair.kept_since);
    is_good_for_a_reset_only(&pair.nodes[home].client().await, v1::MigrationState::Stop).await;
    pair.settle(&job, After::Moves).await;
    pair.moves(&Move::new(false)).await;
    figure("1 device that was handed over and configured again: it did not run again");
}

/// The reset of a source does not come to its end. A later life of the agent, to which the device answers, does not take what
/// it finds for a device of its own.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_handed_over_and_hangs_in_its_reset_stays_quarantined() {
    let mut pair = Pair::configured(1, true, &["limits.device_call_timeout = \"2s\""]).await;
    let (home, job) = (pair.home, Move::new(false));
    pair.nodes[home].arm("save: LettingGo", 1).await;
    let driving = pair.driven(&job).await;
    pair.nodes[home].stopped("save: LettingGo").await;
    pair.nodes[home].signal_device(0, Signal::STOP);
    pair.nodes[home].release();
    driving.await.unwrap();
    let ended = pair.over(&pair.nodes[home].client().await, &job).await;
    assert_eq!(ended.outcome(), v1::StateOutcome::Moved, "{ended:?}");
    pair.kill(home);
    pair.nodes[home].signal_device(0, Signal::CONT);
    pair.start(home).await;
    pair.watch.check(&pair.own, pair.kept_since);
    // The process has done what it was told last.
    is_good_for_a_reset_only(&pair.nodes[home].client().await, v1::MigrationState::Running).await;
    pair.settle(&job, After::Moves).await;
    pair.moves(&Move::new(false)).await;
    figure("1 device that was handed over and hung in its reset: it stays quarantined");
}

/// A source that was in doubt, and was let go of, hangs in its reset. Somebody may have had its device run before. Its
/// destination, which waits for its commit, is within reach again.
async fn hangs_let_go_of(is_moved: bool) -> (Pair, Move, v1::Operation) {
    let mut pair = Pair::configured(1, true, &["limits.device_call_timeout = \"2s\""]).await;
    // What was let go of is lost.
    pair.kept_since = None;
    let (home, away, job) = (pair.home, pair.away(), Move::new(false));
    pair.dies(&job, home, "after commit of COMMITTING").await;
    pair.relays[away].lead(Way::Nowhere);
    pair.relays[away].cut();
    if is_moved {
        pair.watch.moves(&format!("{}/0", NAMES[home]), "RUNNING");
    }
    pair.start(home).await;
    let operation = pair.in_doubt(&job, "cannot be asked").await;
    pair.nodes[home].signal_device(0, Signal::STOP);
    let ended = pair.lets_go(&pair.nodes[home].client().await, &operation.name).await;
    assert_eq!(ended.outcome(), v1::StateOutcome::StateLost, "{ended:?}");
    pair.lead(away);
    (pair, job, ended)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_may_run_at_the_source_is_not_run_at_its_destination() {
    let (mut pair, job, ended) = hangs_let_go_of(true).await;
    let (home, away) = (pair.home, pair.away());
    let there = pair.nodes[away].client().await;
    let arrival = ended.handover.unwrap().peer_operation;
    let settled = pair.nodes[home].agent().wait_for("that it says farewell", |line| {
        line.contains("the destination is not told to run").then_some(())
    });
    tokio::select! {
        () = settled => {}
        ran = done(&there, &arrival) => {
            pair.watch.check(&pair.own, None);
            panic!("its destination was told: {ran:?}");
        }
    }
    let get = v1::GetOperationRequest { name: arrival.clone() };
    let waits = there.get_operation(get).await.unwrap().operation.unwrap();
    assert_eq!(waits.phase(), v1::OperationPhase::Prepared, "{waits:?}");
    pair.watch.check(&pair.own, None);

    // Sooner than its deadline.
    there.cancel_operation(v1::CancelOperationRequest { name: arrival }).await.unwrap();
    pair.kill(home);
    pair.nodes[home].signal_device(0, Signal::CONT);
    pair.start(home).await;
    is_good_for_a_reset_only(&pair.nodes[home].client().await, v1::MigrationState::Running).await;
    pair.settle(&job, After::Lost).await;
    pair.moves(&Move::new(false)).await;
    figure("1 device that was moved, let go of, and hung in its reset: its destination did not run it");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_stood_still_at_the_source_is_run_at_its_destination() {
    let (pair, _, ended) = hangs_let_go_of(false).await;
    let there = pair.nodes[pair.away()].client().await;
    let arrival = done(&there, &ended.handover.unwrap().peer_operation).await.unwrap();
    assert_eq!(arrival.handover.as_ref().unwrap().verdict(), v1::HandoverVerdict::Committed, "{arrival:?}");
    assert_eq!(pair.nodes[pair.away()].contents(&there).await, [Content::Own]);
    pair.watch.check(&pair.own, None);
    figure("1 device that was let go of, and hung in its reset as it stood still: its destination ran it");
}

/// An arrival whose device may run is not told as lost because nobody looks at it.
#[tokio::test(flavor = "multi_thread")]
async fn an_arrival_whose_device_is_not_configured_any_more_is_broken() {
    let mut pair = Pair::new(1, true).await;
    let (home, away, job) = (pair.home, pair.away(), Move::new(false));
    pair.dies(&job, away, "read back").await;
    let config = pair.nodes[away].without_devices();
    pair.start(away).await;
    let client = pair.nodes[home].client().await;
    let name = pair.recorded(&client, &job).await.unwrap().name;
    let broken = becomes(&client, &name, |operation| {
        operation.handover.as_ref().is_some_and(|known| known.verdict() == v1::HandoverVerdict::Broken)
    });
    assert!(tokio::time::timeout(PATIENCE, broken).await.expect("it is told").unwrap());
    let resume = v1::ResolveRequest {
        operation: name.clone(),
        resolution: v1::Resolution::ResumeHere.into(),
        ..Default::default()
    };
    let refusal = client.resolve(resume).await.unwrap_err();
    assert_eq!(refusal.refusal().unwrap().code, Code::FailedPrecondition, "{refusal}");
    // It runs still, in the holder's hands, and is left alone when it is found again.
    pair.kill(away);
    pair.nodes[away].restore_config(&config);
    pair.start(away).await;
    pair.watch.check(&pair.own, pair.kept_since);
    pair.lets_go(&client, &name).await;
    let looking = pair.nodes[away].client().await;
    let device = pair.nodes[away].devices(&looking).await.remove(0);
    let runs = device.logical_device.clone().unwrap();
    assert_eq!((runs.id, runs.epoch), (pair.lives[0].id.clone(), pair.lives[0].epoch + 1));
    assert_eq!(
        (device.standing(), device.state()),
        (v1::DeviceStanding::Quarantined, v1::MigrationState::Running),
        "{device:?}"
    );
    pair.watch.check(&pair.own, None);
    figure("1 arrival whose device was not configured any more: BROKEN, and resumed by no word alone");
}

/// An arrival that waited for its commit is told as refused although nobody looks at its device: what is in it does not run, by
/// no way.
#[tokio::test(flavor = "multi_thread")]
async fn an_arrival_that_waited_and_whose_device_is_not_configured_any_more_is_refused() {
    let mut pair = Pair::new(1, true).await;
    let (home, away, job) = (pair.home, pair.away(), Move::new(false));
    pair.dies(&job, away, "after commit of HELD").await;
    let config = pair.nodes[away].without_devices();
    pair.start(away).await;
    let ended = pair.over(&pair.nodes[home].client().await, &job).await;
    assert_eq!(ended.outcome(), v1::StateOutcome::Preserved, "{ended:?}");
    pair.kill(away);
    pair.nodes[away].restore_config(&config);
    pair.start(away).await;
    pair.watch.check(&pair.own, pair.kept_since);
    is_good_for_a_reset_only(&pair.nodes[away].client().await, v1::MigrationState::Resuming).await;
    pair.settle(&job, After::Stays).await;
    pair.moves(&Move::new(false)).await;
    figure("1 arrival that waited and whose device was not configured any more: REFUSED, and quarantined");
}

/// A device of a set does not start, and the agent dies before it has told anybody. The source is let go of: what runs there
/// goes on, and is what it was.
#[tokio::test(flavor = "multi_thread")]
async fn a_set_that_partly_runs_is_broken_also_after_a_crash() {
    let mut pair = Pair::new(2, true).await;
    let (home, away, job, lives) = (pair.home, pair.away(), Move::new(false), pair.lives.clone());
    let mut saved = pair.nodes[home].save(&pair.nodes[home].client().await).await.manifest;
    pair.watch.refuse(&format!("{}/1", NAMES[away]), "RUNNING");
    // Once more than without a quarantine: the step stays, and the devices' records change.
    pair.nodes[away].arm("after commit of RUNNING", 2).await;
    let driving = pair.driven(&job).await;
    pair.nodes[away].stopped("after commit of RUNNING").await;
    pair.kill(away);
    driving.await.unwrap();
    pair.start(away).await;
    let client = pair.nodes[home].client().await;
    let name = pair.recorded(&client, &job).await.unwrap().name;
    let broken = becomes(&client, &name, |operation| {
        operation.handover.as_ref().is_some_and(|known| known.verdict() != v1::HandoverVerdict::Unspecified)
    });
    assert!(tokio::time::timeout(PATIENCE, broken).await.expect("it is told").unwrap());
    let operation = pair.recorded(&client, &job).await.unwrap();
    assert_eq!(operation.handover.as_ref().unwrap().verdict(), v1::HandoverVerdict::Broken, "{operation:?}");
    assert!(operation.handover.as_ref().unwrap().in_doubt, "{operation:?}");
    pair.watch.check(&pair.own, pair.kept_since);

    pair.lets_go(&client, &name).await;
    let there = pair.nodes[away].client().await;
    let reset = |name: &str, mode: v1::ResetMode| v1::ResetDeviceRequest {
        name: name.to_owned(),
        mode: mode.into(),
        ..Default::default()
    };
    there.reset_device(reset("devices/nic0", v1::ResetMode::KeepState)).await.unwrap();
    there.reset_device(reset("devices/nic1", v1::ResetMode::DiscardState)).await.unwrap();
    let runs = pair.nodes[away].devices(&there).await.swap_remove(0).logical_device.unwrap();
    assert_eq!((runs.id, runs.epoch), (lives[0].id.clone(), lives[0].epoch + 1));
    assert_eq!(pair.watch.carries(&format!("{}/0", NAMES[away])), pair.own[0]);
    saved.devices.truncate(1);
    saved.source_disposition = v1::SourceDisposition::StaysStopped.into();
    let restore = v1::RestoreRequest {
        devices: vec!["devices/nic1".to_owned()],
        manifest: Some(saved),
        validate_only: true,
        ..Default::default()
    };
    let blockers = there.restore(restore).await.unwrap().blockers;
    let reasons: Vec<_> = blockers.iter().map(v1::Blocker::reason).collect();
    assert_eq!(reasons, [v1::BlockerReason::SourceStillRunning], "{blockers:?}");
    pair.watch.check(&pair.own, None);
    figure("1 set of which a part ran, killed before it was told: BROKEN");
}

/// One of the two device processes of a destination dies with its agent. The other device is reset: what was on record to run
/// in it is not there, and is not told to be.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_kept_of_a_set_that_arrived_is_somebody_new() {
    for (point, after) in
        [("after commit of RUNNING", After::Resolved), ("after commit of REVERTING", After::Stays)]
    {
        let mut pair = Pair::new(2, true).await;
        let (away, job, lives) = (pair.away(), Move::new(false), pair.lives.clone());
        if after == After::Stays {
            pair.watch.refuse(&format!("{}/1", NAMES[away]), "RUNNING_P2P");
        }
        pair.dies(&job, away, point).await;
        pair.nodes[away].kill_device(1);
        // Another process in its place, before the agent looks.
        pair.nodes[away].start_device(1, &format!("sim:seed=2,{MEMORY}")).await;
        pair.start(away).await;
        pair.settle(&job, after).await;
        let there = pair.nodes[away].client().await;
        for (device, life) in pair.nodes[away].devices(&there).await.into_iter().zip(lives) {
            assert_ne!(device.logical_device.as_ref().unwrap().id, life.id, "{point}: {device:?}");
        }
        pair.moves(&Move::new(false)).await;
    }
    figure("2 arrivals of which half died with the agent: the other half was reset, and is somebody new");
}
