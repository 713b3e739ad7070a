//! The agent is killed while it resets a device.

use tonic::Code;
use vfio_checkpoint_client::call::new_request_id;
use vfio_checkpoint_proto::v1;

use crate::figure;
use crate::job::{Job, Kind};
use crate::world::{Content, World};

fn discard(request_id: &str) -> v1::ResetDeviceRequest {
    v1::ResetDeviceRequest {
        name: "devices/nic0".to_owned(),
        mode: v1::ResetMode::DiscardState.into(),
        request_id: request_id.to_owned(),
        ..Default::default()
    }
}

/// It was left stopped because its state may run elsewhere by now. Until it is reset nothing may run it.
#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_device_that_was_about_to_be_reset_stays_stopped() {
    let mut world = World::new(1, true).await;
    let points = ["before commit of devices", "after commit of devices"];
    for point in points {
        let client = world.client().await;
        let saved = Job::new(Kind::StoppedSave, 1).run(&client, &world, Content::Own).await;
        assert_eq!(saved.result(), v1::OperationResult::Succeeded, "{saved:?}");
        world.arm(point, 1).await;
        let id = new_request_id().unwrap();
        let resetting = tokio::spawn({
            let id = id.clone();
            async move { client.reset_device(discard(&id)).await }
        });
        world.stopped(point).await;
        world.kill_agent();
        resetting.abort();
        world.start().await;
        let client = world.client().await;
        let device = world.devices(&client).await.remove(0);
        assert_eq!(device.state(), v1::MigrationState::Stop, "{point}: {device:?}");
        assert_eq!((device.standing(), &*device.operation), (v1::DeviceStanding::Ready, ""), "{device:?}");
        // Where it is on record that it began, nobody knows whether it was done.
        let again = client.reset_device(discard(&id)).await;
        if point == points[1] {
            let error = again.unwrap_err();
            let refusal = error.refusal().unwrap();
            assert_eq!(
                (refusal.code, refusal.reason.as_deref()),
                (Code::FailedPrecondition, Some("RESET_UNKNOWN"))
            );
            assert!(client.reset_device(discard("")).await.unwrap().state_lost);
        } else {
            assert!(again.unwrap().state_lost);
        }
        let device = world.devices(&client).await.remove(0);
        assert_eq!(device.state(), v1::MigrationState::Running, "{point}: {device:?}");
        assert_eq!(world.contents(&client).await, [Content::Fresh]);
        world.load(&client, Content::Own).await;
    }
    figure("2 kills around the reset of a device that was left stopped: stopped still");
}
