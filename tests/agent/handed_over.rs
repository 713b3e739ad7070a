//! A source whose state was handed over: what is left of it here runs by no way, and what was saved of it before is old.

use std::sync::{Mutex, mpsc};

use tonic::Code;
use vfio_checkpoint_device::sim::SimConfig;
use vfio_checkpoint_fsm::Capabilities;
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_server::config::AgentConfig;
use vfio_checkpoint_server::failpoint;

use crate::flow::{
    device, done, give, refused, restore_into, save_of, soon, start_restore, start_save, take, violations,
};
use crate::lab::start;
use crate::migrations::{stuck, when};
use crate::pair::{Pair, small};

/// A checkpoint whose source was left stopped may be restored, also where that was: until its state has moved on from there.
#[tokio::test(flavor = "multi_thread")]
async fn an_old_checkpoint_of_what_was_handed_over_is_a_fork() {
    let pair = Pair::new(1).await;
    let before = pair.digests();
    let saver = pair.lab.client(&pair.source, "saver").await;
    let restorer = pair.lab.client(&pair.source, "restorer").await;
    let (source, destination) = pair.migrator().await;
    let stopped = v1::StartSaveRequest { after: v1::AfterSave::StayStopped.into(), ..save_of(&["n0"]) };
    let operation = start_save(&saver, stopped).await;
    let saved = take(&saver, &operation).await;
    assert_eq!(done(&saver, &operation).await.result(), v1::OperationResult::Succeeded);
    // It stands there, and is in the way of a restore onto the same device.
    let discard = v1::ResetDeviceRequest {
        name: "devices/n0".to_owned(),
        mode: v1::ResetMode::DiscardState.into(),
        ..Default::default()
    };
    let admin = pair.lab.client(&pair.source, "admin").await;
    assert!(admin.reset_device(discard).await.unwrap().state_lost);
    let restore = || v1::RestoreRequest { allow_fork: false, ..restore_into(&["n0"], &saved) };
    let operation = start_restore(&restorer, restore()).await;
    give(&restorer, &operation, &saved).await;
    assert_eq!(done(&restorer, &operation).await.result(), v1::OperationResult::Succeeded);
    assert_eq!(device(&source, "n0").await.logical_device.unwrap().epoch, 2);

    let name = pair.start(|_, _| {}).await;
    assert_eq!(soon(done(&source, &name)).await.outcome(), v1::StateOutcome::Moved);
    let there = device(&destination, "n0").await.logical_device.unwrap();
    assert_eq!(there.epoch, 3);
    let refusal = refused(restorer.restore(restore()).await, Code::FailedPrecondition, "BLOCKED");
    assert_eq!(violations(&refusal)[0].0, "BLOCKER_REASON_SOURCE_STILL_RUNNING", "{refusal}");
    assert!(refusal.to_string().contains("handed over"), "{refusal}");
    assert_eq!(pair.digests().1, before.0, "it runs there");
    pair.stop().await;
}

/// The destination was told to run, and is about to refuse. Nobody keeps the devices of the source, which is being stopped:
/// it waits for the answer, by which they run on.
#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_is_stopped_waits_for_the_answer_where_nobody_keeps_its_devices() {
    let lone = |seed| SimConfig { migration: Capabilities { p2p: false, pre_copy: true }, ..small(seed) };
    let pair = Pair::with(1, lone, &[], &stuck(), |_| {}).await;
    let folder = pair.destination.core().config.node.state_dir.clone();
    let (release, held) = mpsc::channel::<()>();
    let held = Mutex::new(held);
    let _watching = failpoint::watch(&folder, move |point| {
        if point == "commit of REVERTING" {
            // Until it is released, or the test is over.
            let _ = held.lock().unwrap().recv();
        }
    });
    let (source, _) = pair.migrator().await;
    let name = pair.start(|_, _| {}).await;
    when(&source, &name, |seen| seen.phase() == v1::OperationPhase::Committing).await;
    let Pair { lab, source: agent, destination, here, there } = pair;
    let (config, core) = (AgentConfig::clone(&agent.core().config), std::sync::Arc::downgrade(agent.core()));
    let stopping = tokio::spawn(agent.stop());
    while core.upgrade().is_some_and(|core| !core.is_ending()) {
        tokio::task::yield_now().await;
    }
    drop(release);
    soon(stopping).await.unwrap().unwrap();
    let again = start(config).await;
    let source = lab.client(&again, "migrator").await;
    let ended = soon(done(&source, &name)).await;
    assert_eq!(ended.outcome(), v1::StateOutcome::Preserved, "{ended:?}");
    assert_eq!(ended.handover.unwrap().verdict(), v1::HandoverVerdict::Refused);
    again.stop().await.unwrap();
    destination.stop().await.unwrap();
    drop((here, there));
}
