//! An epoch that is over runs nowhere: neither what comes in it, nor what was left stopped in it.
//!
//! ```text
//!   comes      the destination had the logical device in a newer epoch  ->  STALE_EPOCH, on the side of the destination
//!   stopped    a restore of it into another device is under way, or done  ->  KEEP_STATE is refused
//! ```

use tonic::Code;
use vfio_checkpoint_client::call::Client;
use vfio_checkpoint_fsm::State;
use vfio_checkpoint_proto::v1;

use crate::flow::{Saved, device, done, give, reached, refused, restore_into, save_of};
use crate::flow::{start_restore, start_save, take, violations};
use crate::pair::Pair;

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
async fn what_goes_on_in_another_device_is_not_brought_back_where_it_was() {
    let pair = Pair::new(2).await;
    let admin = pair.lab.client(&pair.source, "admin").await;
    let restorer = pair.lab.client(&pair.source, "restorer").await;
    let saver = pair.lab.client(&pair.source, "saver").await;
    let keep = v1::ResetDeviceRequest {
        name: "devices/n0".to_owned(),
        mode: v1::ResetMode::KeepState.into(),
        ..Default::default()
    };
    let saved = stopped(&saver, "n0").await;
    let hold = v1::RestoreRequest { after: v1::AfterRestore::Hold.into(), ..restore("n1", &saved) };
    let held = start_restore(&restorer, hold).await;
    give(&restorer, &held, &saved).await;
    reached(&restorer, &held, v1::OperationPhase::Held).await;
    // On its way, it may run there at any moment.
    let refusal = refused(admin.reset_device(keep.clone()).await, Code::FailedPrecondition, "OUT_OF_SERVICE");
    assert!(refusal.message.contains(&held), "{refusal}");
    // Called off, it does not.
    restorer.cancel_operation(v1::CancelOperationRequest { name: held.clone() }).await.unwrap();
    done(&restorer, &held).await;
    assert!(!admin.reset_device(keep.clone()).await.unwrap().state_lost);
    assert_eq!(pair.here[0].device.state(), State::Running);

    // There, it runs.
    let saved = stopped(&saver, "n0").await;
    let epoch = lives_again(&restorer, "n1", &saved).await;
    let refusal = refused(admin.reset_device(keep).await, Code::FailedPrecondition, "OUT_OF_SERVICE");
    assert!(refusal.message.contains(&format!("epoch {epoch}")), "{refusal}");
    assert_eq!(pair.here[0].device.state(), State::Stop);
    reset(&admin, "n0", v1::ResetMode::DiscardState).await;
    assert!(pair.all_run());
    pair.stop().await;
}
