//! The programs themselves, `vfio-checkpointd serve` and `vfio-checkpointd hold`, from their configuration file: no fail
//! points, and the kill comes when a caller sees its operation held. SIGHUP is theirs as well.

use rustix::process::Signal;
use tokio::time::timeout;
use tonic::Code;
use vfio_checkpoint_proto::v1;

use crate::every::check;
use crate::figure;
use crate::job::{Job, Kind, held};
use crate::lab::PATIENCE;
use crate::steps::Found;
use crate::world::World;

async fn killed_while_held(with_holder: bool) {
    let mut world = World::of_programs(1, with_holder).await;
    for kind in [Kind::HeldSave, Kind::HeldRestore] {
        let job = Job::new(kind, 1).that_waits();
        let driving = job.driven(&world).await;
        let client = world.client().await;
        let name = job.begin(&client, world.manifest.as_ref()).await.unwrap().name;
        assert!(held(&client, &name).await.unwrap(), "{}", world.log());
        world.kill_agent();
        driving.abort();
        world.start().await;
        check(&world, &job, Found::Held, with_holder).await;
    }
    figure(&format!(
        "the programs {} holder: killed in 2 holds, which {}",
        if with_holder { "with" } else { "without" },
        if with_holder { "went on" } else { "were lost" },
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_held_outlives_the_agent_with_the_holder() {
    killed_while_held(true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_held_is_lost_with_the_agent_without_the_holder() {
    killed_while_held(false).await;
}

/// SIGHUP has the grants read again, and who loses a role by that is cut off in the middle of a stream.
#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_is_taken_away_ends_the_streams_of_its_bearer() {
    let mut world = World::of_programs(1, false).await;
    let client = world.client().await;
    let mut watch = client.watch_devices(v1::WatchDevicesRequest::default()).await.unwrap();
    watch.next().await.unwrap().expect("a device");
    world.agent().signal(Signal::HUP);
    world
        .agent()
        .wait_for("that nobody lost anything", |line| line.contains("\"cut_off\":0").then_some(()))
        .await;
    world.take_away_the_role();
    world.agent().signal(Signal::HUP);
    while let Ok(Some(_)) = timeout(PATIENCE, watch.next()).await.expect("it goes on") {}
    let client = world.client().await;
    let error = client.list_devices(v1::ListDevicesRequest::default()).await.unwrap_err();
    let refusal = error.refusal().unwrap();
    assert_eq!((refusal.code, refusal.reason.as_deref()), (Code::PermissionDenied, Some("ROLE_REQUIRED")));
}
