//! The agent is killed, and something else is lost: the holder, a device process, or the time.

use std::fs;

use rustix::process::Signal;
use serde_json::Value;
use vfio_checkpoint_proto::v1;

use crate::every::{check, kill_at, state_lost};
use crate::figure;
use crate::job::{Job, Kind, done};
use crate::steps::Found;
use crate::world::{Content, World};

/// Waits until a new holder has got so many devices from the agent that goes on.
async fn put_back(world: &mut World, devices: usize) {
    for _ in 0..devices {
        world.holder().wait_for("a device", |line| line.contains("holding a device").then_some(())).await;
    }
}

/// The agent gives what it has to the next holder, and what was held goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_holder_that_is_restarted_before_the_agent_is_killed_has_every_device() {
    for kind in [Kind::HeldSave, Kind::HeldRestore] {
        let mut world = World::new(2, true).await;
        world.kill_holder();
        world.start_holder().await;
        put_back(&mut world, 2).await;
        let job = Job::new(kind, 2);
        kill_at(&mut world, &job, "after commit of HELD").await;
        world.start().await;
        check(&world, &job, Found::Held, true).await;
    }
    figure("2 holds went on after the holder and then the agent were killed");
}

/// The holder dies, and the agent before it could give the next one anything: the devices are reset. A start that is
/// killed once it has opened them anew, and put them into the next holder, leaves devices that are kept, and that are not
/// what the operation had.
#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_was_reset_is_not_taken_for_one_that_was_kept() {
    let mut starts = 0;
    for (kind, point, found) in [
        (Kind::Save, "save: Draining", Found::Undone),
        (Kind::HeldSave, "after commit of HELD", Found::Held),
        (Kind::HeldSave, "after commit of RUNNING", Found::Done),
        (Kind::StoppedSave, "after commit of STOPPED", Found::Done),
        (Kind::Restore, "after commit of ADMITTED", Found::Untouched),
        (Kind::Restore, "restore: Verifying", Found::Undone),
        (Kind::HeldRestore, "after commit of HELD", Found::Held),
        (Kind::Restore, "after commit of RUNNING", Found::Done),
    ] {
        let mut world = World::new(1, true).await;
        for second in
            ["boot: device open", "boot: device kept", "after commit of devices", "boot: devices in"]
        {
            let job = Job::new(kind, 1);
            world.arm(point, 1).await;
            let driving = job.driven(&world).await;
            world.stopped(point).await;
            world.kill_holder();
            world.kill_agent();
            driving.abort();
            world.start_holder().await;
            world.launch(&format!("{second}=1"));
            world.stopped(second).await;
            world.kill_agent();
            world.start().await;
            eprintln!("{kind:?}: lost at {point}, killed at {second}");
            let client = world.client().await;
            let name = job.begin(&client, world.manifest.as_ref()).await.unwrap().name;
            let ended = done(&client, &name).await.unwrap();
            state_lost(found, &ended);
            assert_eq!(world.contents(&client).await, [Content::Fresh]);
            world.load(&client, Content::Own).await;
            starts += 1;
        }
    }
    figure(&format!(
        "{starts} devices that were reset and then kept: none was told as preserved or restored"
    ));
}

/// A hold whose time is over when the agent comes back ends then; one that was ending goes on ending.
#[tokio::test(flavor = "multi_thread")]
async fn a_hold_that_ran_out_is_over_whenever_the_agent_is_killed() {
    let mut world = World::new(1, true).await;
    let saves = [
        ("after commit of HELD", 1, "HOLD_EXPIRED"),
        ("save: Marking", 1, "HOLD_EXPIRED"),
        ("before commit of RUNNING", 1, "HOLD_EXPIRED"),
        ("after commit of RUNNING", 1, "HOLD_EXPIRED"),
        ("read back", 1, "HOLD_EXPIRED"),
        ("after commit of ENDED", 1, "HOLD_EXPIRED"),
    ];
    let restores = [
        ("after commit of HELD", 1, "HOLD_EXPIRED"),
        ("restore: Resetting", 1, "HOLD_EXPIRED"),
        ("before commit of BEGUN", 2, "HOLD_EXPIRED"),
        // Why it is being undone is not on record before its end.
        ("after commit of BEGUN", 2, "AGENT_RESTARTED"),
        ("read back", 1, "AGENT_RESTARTED"),
        ("after commit of ENDED", 1, "HOLD_EXPIRED"),
    ];
    for (kind, points, outcome, consistency, content) in [
        (
            Kind::HeldSave,
            saves,
            v1::StateOutcome::Preserved,
            v1::CheckpointConsistency::Inconsistent,
            Content::Own,
        ),
        (
            Kind::HeldRestore,
            restores,
            v1::StateOutcome::StateLost,
            v1::CheckpointConsistency::Unspecified,
            Content::Fresh,
        ),
    ] {
        for (point, times, reason) in points {
            let job = Job::new(kind, 1).that_waits().held_for_a_moment();
            world.arm(point, times).await;
            let driving = job.driven(&world).await;
            world.stopped(point).await;
            world.kill_agent();
            driving.abort();
            world.start().await;
            eprintln!("{kind:?}: killed at {point}");
            let client = world.client().await;
            let name = job.begin(&client, world.manifest.as_ref()).await.unwrap().name;
            let ended = done(&client, &name).await.unwrap();
            assert_eq!(ended.result(), v1::OperationResult::Failed, "{ended:?}");
            assert_eq!((ended.outcome(), ended.consistency()), (outcome, consistency), "{ended:?}");
            assert_eq!(ended.failure.as_ref().unwrap().reason, reason, "{ended:?}");
            assert_eq!(world.contents(&client).await, [content]);
            for device in world.devices(&client).await {
                assert_eq!((device.state(), device.operation.as_str()), (v1::MigrationState::Running, ""));
            }
        }
    }
    figure(&format!("{} kills of a hold that ran out: over at once", saves.len() + restores.len()));
}

/// One of two device processes dies with the agent. The other device is brought back, and the operation has failed: one that
/// was reset for it is nobody that was known before.
#[tokio::test(flavor = "multi_thread")]
async fn half_of_a_set_is_not_the_set() {
    for (kind, point, content) in [
        (Kind::HeldSave, "after commit of HELD", Content::Own),
        (Kind::HeldRestore, "after commit of HELD", Content::Fresh),
        (Kind::Restore, "after commit of BEGUN", Content::Fresh),
        (Kind::Restore, "restore: Verifying", Content::Fresh),
        (Kind::Restore, "after commit of RUNNING", Content::Fresh),
        // One runs already, and runs on.
        (Kind::Restore, "restore: PartlyRunning", Content::Other),
    ] {
        let mut world = World::new(2, true).await;
        let client = world.client().await;
        let before = world.devices(&client).await.remove(0).logical_device.unwrap();
        let job = Job::new(kind, 2);
        kill_at(&mut world, &job, point).await;
        world.kill_device(1);
        // Another process in its place, before the agent looks.
        world.start_device(1, "sim:seed=2,memory=256KiB").await;
        world.start().await;
        let client = world.client().await;
        let operation = job.begin(&client, world.manifest.as_ref()).await.unwrap();
        let ended = done(&client, &operation.name).await.unwrap();
        state_lost(Found::Held, &ended);
        assert_eq!(ended.failure.as_ref().unwrap().device, "devices/nic1");
        let now = world.devices(&client).await.remove(0).logical_device.unwrap();
        let brought = ended.devices[0].logical_device.clone().unwrap();
        assert_eq!(now == before, content == Content::Own, "{point}: {now:?}, and it was {before:?}");
        if !job.is_save() {
            assert_eq!(now == brought, content == Content::Other, "{point}: {now:?}, and {brought:?} came");
        }
        assert_eq!(world.contents(&client).await, [content, Content::Fresh], "{point}");
    }
    figure("6 sets of which half was lost: failed, and the other half runs");
}

/// The journal is lost with the agent, and the holder has the devices still. One was left stopped on request, the other
/// carries a state that was restored and held: neither runs before somebody says so.
#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_no_journal_knows_waits_for_somebody_to_decide() {
    for (kind, point, state) in [
        (Kind::StoppedSave, "after commit of ENDED", v1::MigrationState::Stop),
        (Kind::HeldSave, "after commit of HELD", v1::MigrationState::Stop),
        (Kind::HeldRestore, "after commit of HELD", v1::MigrationState::Resuming),
    ] {
        let mut world = World::new(1, true).await;
        kill_at(&mut world, &Job::new(kind, 1).that_waits(), point).await;
        fs::remove_dir_all(world.config().node.state_dir).unwrap();
        for life in ["first", "second"] {
            world.start().await;
            let client = world.client().await;
            let device = world.devices(&client).await.remove(0);
            assert_eq!(device.standing(), v1::DeviceStanding::Quarantined, "{kind:?}, {life}: {device:?}");
            assert_eq!(device.state(), state, "{kind:?}, {life}: {device:?}");
            if life == "first" {
                world.kill_agent();
            }
        }
        let client = world.client().await;
        let reset = |mode: v1::ResetMode| v1::ResetDeviceRequest {
            name: "devices/nic0".to_owned(),
            mode: mode.into(),
            ..Default::default()
        };
        let kept = client.reset_device(reset(v1::ResetMode::KeepState)).await;
        let content = if kind == Kind::HeldRestore {
            // Whether it was loaded whole is on no record: it can be given up, and nothing else.
            kept.unwrap_err();
            assert!(client.reset_device(reset(v1::ResetMode::DiscardState)).await.unwrap().state_lost);
            Content::Fresh
        } else {
            assert!(!kept.unwrap().state_lost);
            Content::Own
        };
        let device = world.devices(&client).await.remove(0);
        assert_eq!(device.standing(), v1::DeviceStanding::Ready, "{device:?}");
        assert_eq!(world.contents(&client).await, [content], "{kind:?}");
    }
    figure("3 devices whose journal was lost: quarantined until somebody decided");
}

/// A device process stands still while the agent is killed and comes back, twice. That is no answer: nothing is lost, what
/// claims the device stays unfinished, and what nobody claims stays as it is.
#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_does_not_answer_keeps_its_state_and_its_operation() {
    for (kind, point, found) in [
        (Kind::HeldSave, "after commit of HELD", Found::Held),
        (Kind::StoppedSave, "after commit of ENDED", Found::Ended),
        (Kind::Save, "save: Draining", Found::Undone),
        (Kind::HeldRestore, "after commit of HELD", Found::Held),
    ] {
        let mut world = World::new(2, true).await;
        let job = Job::new(kind, 2);
        kill_at(&mut world, &job, point).await;
        world.limit_calls("2s");
        world.signal_device(0, Signal::STOP);
        for life in ["first", "second"] {
            world.start().await;
            eprintln!("{kind:?}, {life} life");
            let client = world.client().await;
            let device = world.devices(&client).await.remove(0);
            assert_eq!(device.standing(), v1::DeviceStanding::Unavailable, "{device:?}");
            assert!(device.standing_detail.contains("does not answer"), "{device:?}");
            let operation = job.begin(&client, world.manifest.as_ref()).await.unwrap();
            assert_eq!(operation.done, found == Found::Ended, "{operation:?}");
            if found != Found::Ended {
                assert_eq!(device.operation, operation.name, "{device:?}");
            }
            if life == "first" {
                world.kill_agent();
            }
        }
        world.signal_device(0, Signal::CONT);
        world.agent().wait_for("the device", |line| line.contains("open now").then_some(())).await;
        check(&world, &job, found, true).await;
    }
    figure("8 starts with a device that did not answer: it kept its state, and its operation went on");
}

/// The process that stood still is ended: now its device is known to be lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_did_not_answer_is_lost_once_its_process_has_ended() {
    let mut world = World::new(1, true).await;
    let job = Job::new(Kind::HeldSave, 1);
    kill_at(&mut world, &job, "after commit of HELD").await;
    world.limit_calls("2s");
    world.signal_device(0, Signal::STOP);
    world.start().await;
    let client = world.client().await;
    let name = job.begin(&client, None).await.unwrap().name;
    world.kill_device(0);
    let ended = done(&client, &name).await.unwrap();
    state_lost(Found::Held, &ended);
    let message = ended.failure.unwrap().message;
    assert!(message.contains("devices/nic0 is not open"), "{message}");
    assert!(!message.contains("run a holder"), "{message}");
    figure("1 device that did not answer and whose process ended: lost, and told so then");
}

/// A device that is taken out of the configuration stays with the holder, and the agent says so, and what to do.
#[tokio::test(flavor = "multi_thread")]
async fn a_kept_device_that_is_not_configured_any_more_is_named() {
    let mut world = World::new(2, true).await;
    let names = ["nic0", "nic1"].map(str::to_owned);
    world.kill_agent();
    world.write_config(&names[..1], true);
    world.launch("");
    let told = world.agent().wait_for("what is not configured", |line| {
        let line: Value = serde_json::from_str(line).ok()?;
        let message = line["fields"]["message"].as_str()?.to_owned();
        message.contains("it is not configured").then(|| (line["fields"]["device"].clone(), message))
    });
    let (device, message) = told.await;
    assert_eq!(device, "nic1");
    assert!(message.contains("until it is configured by this name again or the holder ends"), "{message}");
    world.served().await;
    world.kill_agent();
    world.write_config(&names, true);
    world.start().await;
    let client = world.client().await;
    assert_eq!(world.contents(&client).await, [Content::Own; 2], "it was left alone");
    figure("1 device that was not configured any more: named, kept, and adopted by a later agent");
}
