//! An epoch that is over runs nowhere: neither what comes in it, nor what was let in before it was over.
//!
//! ```text
//!   comes        the destination had the logical device in a newer epoch  ->  STALE_EPOCH, on the side of the destination
//!   was let in   a restore is held; what it is of runs on here, and is brought back from a migration in doubt: a newer epoch
//!                Resume  ->  the restore fails, and its device is reset
//! ```

use tonic::Code;
use vfio_checkpoint_client::call::Client;
use vfio_checkpoint_fsm::State;
use vfio_checkpoint_proto::v1;

use crate::flow::{Saved, device, done, give, reached, refused, restore_into, save_of, soon};
use crate::flow::{start_restore, start_save, take, violations};
use crate::migrations::{manual, prepared, when};
use crate::pair::Pair;
use crate::relay::Relay;

/// Saves a device and leaves it stopped.
async fn stopped(saver: &Client, name: &str) -> Saved {
    let request = v1::StartSaveRequest { after: v1::AfterSave::StayStopped.into(), ..save_of(&[name]) };
    let operation = start_save(saver, request).await;
    let saved = take(saver, &operation).await;
    assert_eq!(done(saver, &operation).await.result(), v1::OperationResult::Succeeded);
    saved
}

fn restore(name: &str, saved: &Saved) -> v1::RestoreRequest {
    v1::RestoreRequest { allow_fork: false, ..restore_into(&[name], saved) }
}

async fn reset(admin: &Client, name: &str, mode: v1::ResetMode) {
    let name = format!("devices/{name}");
    let request = v1::ResetDeviceRequest { name, mode: mode.into(), ..Default::default() };
    admin.reset_device(request).await.unwrap();
}

/// Restores it as what it was: the epoch under which it runs.
async fn lives_again(restorer: &Client, name: &str, saved: &Saved) -> u64 {
    let operation = start_restore(restorer, restore(name, saved)).await;
    give(restorer, &operation, saved).await;
    assert_eq!(done(restorer, &operation).await.result(), v1::OperationResult::Succeeded);
    let logical = device(restorer, name).await.logical_device.unwrap();
    assert_eq!(logical.id, saved.manifest.devices[0].logical_device.id.to_string());
    logical.epoch
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_at_the_destination_in_a_newer_epoch_does_not_come_in_an_old_one() {
    let pair = Pair::new(1).await;
    let saver = pair.lab.client(&pair.source, "saver").await;
    let (here, there) =
        (pair.lab.client(&pair.source, "admin").await, pair.lab.client(&pair.destination, "admin").await);
    let (restores_here, restores_there) = (
        pair.lab.client(&pair.source, "restorer").await,
        pair.lab.client(&pair.destination, "restorer").await,
    );
    let saved = stopped(&saver, "n0").await;
    reset(&here, "n0", v1::ResetMode::DiscardState).await;
    for epoch in [2, 3] {
        assert_eq!(lives_again(&restores_there, "n0", &saved).await, epoch);
        // It runs nowhere: it is the epoch alone that is in the way.
        reset(&there, "n0", v1::ResetMode::DiscardState).await;
    }
    // The source knows nothing of that.
    assert_eq!(lives_again(&restores_here, "n0", &saved).await, 2);
    let before = pair.digests();

    let refusal = refused(pair.migrate(|_, _| {}).await, Code::FailedPrecondition, "BLOCKED");
    let reasons: Vec<String> = violations(&refusal).into_iter().map(|(reason, _)| reason).collect();
    assert_eq!(reasons, ["BLOCKER_REASON_STALE_EPOCH"], "{refusal}");
    assert!(refusal.to_string().contains("was here in epoch 3"), "{refusal}");
    assert_eq!(pair.digests(), before);
    assert!(pair.all_run());
    pair.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_let_in_before_a_newer_epoch_is_reset_instead_of_run() {
    let pair = Pair::new(2).await;
    let (source, _) = pair.migrator().await;
    let admin = pair.lab.client(&pair.source, "admin").await;
    let restorer = pair.lab.client(&pair.source, "restorer").await;
    let saved = stopped(&pair.lab.client(&pair.source, "saver").await, "n0").await;
    let lives = device(&source, "n0").await.logical_device.unwrap();

    let hold = v1::RestoreRequest { after: v1::AfterRestore::Hold.into(), ..restore("n1", &saved) };
    let held = start_restore(&restorer, hold).await;
    give(&restorer, &held, &saved).await;
    let operation = reached(&restorer, &held, v1::OperationPhase::Held).await;
    let admitted = operation.devices[0].logical_device.clone().unwrap();
    assert_eq!((&admitted.id, admitted.epoch), (&lives.id, lives.epoch + 1));

    // Somebody has it run on where it was, and brings it back from a migration of which nobody knows how it ended.
    reset(&admin, "n0", v1::ResetMode::KeepState).await;
    let relay = Relay::to(&pair.destination, &[]).await;
    let name = pair
        .start(|admission, request| {
            manual(admission, request);
            admission.devices.truncate(1);
            admission.logical_devices.truncate(1);
            request.devices.truncate(1);
            let target = request.target.as_mut().unwrap();
            target.devices.truncate(1);
            target.endpoint = format!("https://localhost:{}", relay.address().port());
        })
        .await;
    prepared(&source, &name).await;
    relay.admit(0);
    relay.cut();
    source.commit(v1::CommitRequest { operation: name.clone() }).await.unwrap();
    when(&source, &name, |seen| seen.handover.as_ref().is_some_and(|known| known.in_doubt)).await;
    let resume = v1::ResolveRequest {
        operation: name.clone(),
        resolution: v1::Resolution::ResumeHere.into(),
        peer_is_fenced: true,
        statement: "its power is off".to_owned(),
        ..Default::default()
    };
    admin.resolve(resume).await.unwrap();
    soon(done(&source, &name)).await;
    let runs = device(&source, "n0").await.logical_device.unwrap();
    assert_eq!((&runs.id, runs.epoch), (&lives.id, admitted.epoch + 1));

    let before = pair.digests().0;
    restorer.resume(v1::ResumeRequest { operation: held.clone() }).await.unwrap();
    let ended = soon(done(&restorer, &held)).await;
    assert_eq!(ended.result(), v1::OperationResult::Failed, "{ended:?}");
    let message = ended.failure.unwrap().message;
    assert!(message.contains("is not run in epoch 2"), "{message}");
    assert_eq!(pair.digests().0[0], before[0]);
    assert_ne!(pair.digests().0[1], before[0]);
    assert_eq!((pair.here[1].device.state(), pair.here[1].device.resets()), (State::Running, 1));
    let hops = pair.here[1].device.hops();
    assert_eq!(hops.last().unwrap().arc.to(), State::Resuming, "nothing but its reset led on: {hops:?}");
    assert_ne!(device(&source, "n1").await.logical_device.unwrap().id, lives.id);
    pair.stop().await;
}
