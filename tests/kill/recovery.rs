//! The agent is killed once more, while it recovers from the first kill.
//!
//! What recovery passes is not listed: it is read from a recovery that nobody kills, and each of its points is the place of
//! a second kill. What must be found after the third start is what had to be found after the second.

use std::time::Instant;

use crate::every::{check, kill_at};
use crate::figure;
use crate::job::{Job, Kind};
use crate::steps::{Found, steps};
use crate::world::World;

/// The points of a recovery from a kill at `point`, each with how often it was passed before.
async fn recovery(world: &mut World, job: &Job, point: &str, found: Found) -> Vec<(String, u32)> {
    kill_at(world, job, point).await;
    world.launch("");
    let mut points: Vec<(String, u32)> = Vec::new();
    let served = world.agent().wait_for("that it is done", |line| {
        let point = line.strip_prefix("at ")?;
        let times = 1 + points.iter().filter(|(before, _)| before == point).count();
        points.push((point.to_owned(), u32::try_from(times).unwrap()));
        (point == "boot: done").then_some(())
    });
    served.await;
    world.served().await;
    check(world, job, found, world.is_kept()).await;
    points
}

async fn killed_twice(kind: Kind, first: &[&str], with_holder: bool) {
    let begun = Instant::now();
    let mut world = World::new(1, with_holder).await;
    let steps = steps(kind, 1);
    let mut kills = 0;
    for point in first {
        let found = steps.iter().find(|(listed, _)| listed == point).expect("a step").1;
        for (second, times) in recovery(&mut world, &Job::new(kind, 1), point, found).await {
            let job = Job::new(kind, 1);
            kill_at(&mut world, &job, point).await;
            world.launch(&format!("{second}={times}"));
            world.stopped(&second).await;
            world.kill_agent();
            world.start().await;
            eprintln!(
                "{kind:?}, holder: {with_holder}: killed at {point}, and at {second} ({times}): {found:?}"
            );
            check(&world, &job, found, with_holder).await;
            kills += 1;
        }
    }
    figure(&format!(
        "{kind:?} {} holder: killed at {} steps and once more at {kills} points of its recovery, in {} ms",
        if with_holder { "with" } else { "without" },
        first.len(),
        begun.elapsed().as_millis(),
    ));
}

const SAVE: [&str; 3] = ["save: Draining", "after commit of HELD", "after commit of RUNNING"];
const RESTORE: [&str; 3] = ["restore: Verifying", "after commit of HELD", "after commit of RUNNING"];

#[tokio::test(flavor = "multi_thread")]
async fn a_save_that_is_taken_up() {
    killed_twice(Kind::HeldSave, &SAVE, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_save_that_is_lost() {
    killed_twice(Kind::HeldSave, &SAVE[2..], false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_that_is_taken_up() {
    killed_twice(Kind::HeldRestore, &RESTORE, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_that_is_lost() {
    killed_twice(Kind::HeldRestore, &RESTORE[2..], false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_that_stay_stopped() {
    killed_twice(Kind::StoppedSave, &["after commit of STOPPED", "after commit of ENDED"], true).await;
}
