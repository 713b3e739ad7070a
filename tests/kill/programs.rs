//! The programs themselves, `vfio-checkpointd serve` and `vfio-checkpointd hold`, from their configuration file: no fail
//! points, and the kill comes when a caller sees its operation held.

use crate::every::check;
use crate::figure;
use crate::job::{Job, Kind, held};
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
