//! Every job, killed at every step, with the holder and without.

use std::time::Instant;

use vfio_checkpoint_client::call::Client;
use vfio_checkpoint_proto::v1;

use crate::figure;
use crate::job::{Job, Kind, done};
use crate::lab::PATIENCE;
use crate::steps::{Found, steps};
use crate::world::{Content, World};

/// What a kill cost, counted.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Tally {
    kills: usize,
    succeeded: usize,
    undone: usize,
    held: usize,
    lost: usize,
    nothing: usize,
}

impl Tally {
    fn count(&mut self, went_on: bool, ended: Option<&v1::Operation>) {
        self.kills += 1;
        self.held += usize::from(went_on);
        match ended.map(|ended| (ended.result(), ended.outcome())) {
            None => self.nothing += 1,
            Some((v1::OperationResult::Succeeded, _)) => self.succeeded += 1,
            Some((_, v1::StateOutcome::StateLost)) => self.lost += 1,
            Some(_) => self.undone += 1,
        }
    }
}

/// Starts a job, kills the agent where it comes to `point`, and leaves it dead.
pub(crate) async fn kill_at(world: &mut World, job: &Job, point: &str) {
    // A state is several chunks: the second is in the middle.
    let times = if matches!(point, "chunk" | "store: Uploaded") { 2 } else { 1 };
    world.arm(point, times).await;
    let driving = job.driven(world).await;
    world.stopped(point).await;
    world.kill_agent();
    driving.abort();
    // It may have heard of the kill before it was aborted; all that it must not is come to its end.
    assert!(driving.await.map_or_else(|error| error.is_cancelled(), |()| true), "{job:?} at {point}");
}

/// Asserts that the agent, which was killed and is served again, tells of `job` what must be found, that its devices are
/// where that says and carry what it says, and that they take a new save. Leaves them with their own content.
pub(crate) async fn check(world: &World, job: &Job, found: Found, kept: bool) -> Option<v1::Operation> {
    let client = world.client().await;
    let recorded = recorded(&client, job).await;
    // Without a holder only what had ended has not failed.
    let on_time = kept || found == Found::Ended;
    let ended = match (found, recorded) {
        // One without a stream would run at once: its own tests begin it anew.
        (Found::Nothing, None) if job.is_stored() => None,
        (Found::Nothing, None) => {
            never_was(&client, job, world).await;
            None
        }
        (Found::Nothing, Some(recorded)) => panic!("nothing should be on record of it: {recorded:?}"),
        (_, None) => panic!("it is not on record"),
        (Found::Untouched | Found::Undone | Found::Held | Found::Done | Found::Ended, Some(recorded)) => {
            let again = job.begin(&client, world.manifest.as_ref()).await.unwrap();
            assert_eq!(again.name, recorded.name, "the same request, another operation");
            if kept && found == Found::Held {
                go_on(&client, job, world, &recorded).await;
            }
            let ended = done(&client, &recorded.name).await.unwrap();
            if on_time {
                ended_well(job, found, &ended);
            } else {
                state_lost(found, &ended);
            }
            Some(ended)
        }
    };
    let stopped =
        on_time && job.kind == Kind::StoppedSave && matches!(found, Found::Done | Found::Ended) && kept;
    for device in world.devices(&client).await {
        assert_eq!(device.operation, "", "the lease is free: {device:?}");
        assert_eq!(device.standing(), v1::DeviceStanding::Ready, "{device:?}");
        let state = if stopped { v1::MigrationState::Stop } else { v1::MigrationState::Running };
        assert_eq!(device.state(), state, "{device:?}");
        if stopped {
            let request = v1::ResetDeviceRequest {
                name: device.name,
                mode: v1::ResetMode::KeepState.into(),
                ..Default::default()
            };
            assert!(!client.reset_device(request).await.unwrap().state_lost);
        }
    }
    let content = match (kept, found, job.is_save()) {
        (false, _, _) | (true, Found::Undone, false) => Content::Fresh,
        (true, _, true) | (true, Found::Nothing | Found::Untouched, false) => Content::Own,
        (true, Found::Held | Found::Done | Found::Ended, false) => Content::Other,
    };
    assert_eq!(world.contents(&client).await, vec![content; world.len()]);
    if content != Content::Own {
        world.load(&client, Content::Own).await;
    }
    ended
}

async fn recorded(client: &Client, job: &Job) -> Option<v1::Operation> {
    let request = v1::ListOperationsRequest { page_size: 1000, ..Default::default() };
    let listed = client.list_operations(request).await.unwrap().operations;
    let mut ours = listed.into_iter().filter(|operation| job.is(operation));
    let first = ours.next();
    assert!(ours.next().is_none(), "one request, two operations");
    first
}

/// The same request begins a new operation, which can be taken back.
async fn never_was(client: &Client, job: &Job, world: &World) {
    let begun = job.begin(client, world.manifest.as_ref()).await.unwrap();
    assert_eq!(begun.phase(), v1::OperationPhase::WaitingForStream, "{begun:?}");
    client.cancel_operation(v1::CancelOperationRequest { name: begun.name.clone() }).await.unwrap();
    let ended = client.wait_operation(&begun.name, PATIENCE).await.unwrap().operation.unwrap();
    assert_eq!(ended.result(), v1::OperationResult::Cancelled, "{ended:?}");
    assert_eq!(ended.outcome(), v1::StateOutcome::Preserved, "{ended:?}");
}

/// It is held still, on devices that stand still, until somebody says Resume.
async fn go_on(client: &Client, job: &Job, world: &World, recorded: &v1::Operation) {
    assert!(!recorded.done && recorded.phase() == v1::OperationPhase::Held, "{recorded:?}");
    assert!(recorded.deadline.is_some(), "{recorded:?}");
    let state = if job.is_save() { v1::MigrationState::Stop } else { v1::MigrationState::Resuming };
    for device in world.devices(client).await {
        assert_eq!((device.state(), &device.operation), (state, &recorded.name), "{device:?}");
    }
    client.resume(v1::ResumeRequest { operation: recorded.name.clone() }).await.unwrap();
}

fn ended_well(job: &Job, found: Found, ended: &v1::Operation) {
    let (result, outcome) = match (found, job.is_save()) {
        (Found::Untouched, _) | (Found::Undone | Found::Nothing, true) => {
            (v1::OperationResult::Failed, v1::StateOutcome::Preserved)
        }
        (Found::Undone | Found::Nothing, false) => (v1::OperationResult::Failed, v1::StateOutcome::StateLost),
        (Found::Held | Found::Done | Found::Ended, true) => {
            (v1::OperationResult::Succeeded, v1::StateOutcome::Preserved)
        }
        (Found::Held | Found::Done | Found::Ended, false) => {
            (v1::OperationResult::Succeeded, v1::StateOutcome::Replaced)
        }
    };
    assert_eq!((ended.result(), ended.outcome()), (result, outcome), "{ended:?}");
    let failed = result == v1::OperationResult::Failed;
    let reason = ended.failure.as_ref().map(|failure| failure.reason.as_str());
    assert_eq!(reason, failed.then_some("AGENT_RESTARTED"), "{ended:?}");
    let consistency = if job.is_save() && !failed {
        v1::CheckpointConsistency::Consistent
    } else {
        v1::CheckpointConsistency::Unspecified
    };
    assert_eq!(ended.consistency(), consistency, "{ended:?}");
}

/// The devices were reset with the agent. What was sealed on record before stands.
pub(crate) fn state_lost(found: Found, ended: &v1::Operation) {
    assert_eq!(ended.result(), v1::OperationResult::Failed, "{ended:?}");
    assert_eq!(ended.outcome(), v1::StateOutcome::StateLost, "{ended:?}");
    assert_eq!(ended.failure.as_ref().unwrap().reason, "AGENT_RESTARTED", "{ended:?}");
    let sealed = ended.kind() == v1::OperationKind::Save && matches!(found, Found::Held | Found::Done);
    let consistency =
        if sealed { v1::CheckpointConsistency::Consistent } else { v1::CheckpointConsistency::Unspecified };
    assert_eq!(ended.consistency(), consistency, "{ended:?}");
}

/// What a job passes that nobody kills.
pub(crate) async fn passed(world: &mut World, job: &Job) -> Vec<String> {
    world.arm("nothing", 1).await;
    let client = world.client().await;
    let ended = job.run(&client, world, Content::Other).await;
    assert_eq!(ended.result(), v1::OperationResult::Succeeded, "{ended:?}");
    let mut points: Vec<String> = Vec::new();
    let end = world.agent().wait_for("that it ended", |line| {
        let point = line.strip_prefix("at ")?;
        if !points.iter().any(|before| before == point) {
            points.push(point.to_owned());
        }
        (point == "after commit of ENDED").then_some(())
    });
    end.await;
    points
}

async fn every_step(kind: Kind, set: usize, with_holder: bool) {
    let begun = Instant::now();
    let mut world = World::new(set, with_holder).await;
    let steps = steps(kind, set);
    let job = Job::new(kind, set);
    let points: Vec<&str> = steps.iter().map(|(point, _)| *point).collect();
    assert_eq!(passed(&mut world, &job).await, points);
    check(&world, &job, Found::Ended, true).await;

    let mut tally = Tally::default();
    for (point, found) in steps {
        let job = Job::new(kind, set);
        kill_at(&mut world, &job, point).await;
        world.start().await;
        eprintln!("{kind:?} of {set}, holder: {with_holder}: killed at {point}: {found:?}");
        let ended = check(&world, &job, found, with_holder).await;
        tally.count(with_holder && found == Found::Held, ended.as_ref());
    }
    let Tally { kills, succeeded, undone, held, lost, nothing } = tally;
    figure(&format!(
        "{kind:?} of {set} {} holder: killed at {kills} steps: {succeeded} succeeded ({held} went on being held), \
         {undone} undone, {lost} state lost, {nothing} never begun, in {} ms",
        if with_holder { "with" } else { "without" },
        begun.elapsed().as_millis(),
    ));
}

macro_rules! every_step {
    ($($name:ident: $kind:ident of $set:literal;)*) => {$(
        mod $name {
            use super::{Kind, every_step};

            #[tokio::test(flavor = "multi_thread")]
            async fn with_the_holder() {
                every_step(Kind::$kind, $set, true).await;
            }

            #[tokio::test(flavor = "multi_thread")]
            async fn without_the_holder() {
                every_step(Kind::$kind, $set, false).await;
            }
        }
    )*};
}

every_step! {
    save: Save of 1;
    save_with_pre_copy: PreCopySave of 1;
    save_with_manual_cutover: ManualSave of 1;
    held_save: HeldSave of 1;
    save_that_stays_stopped: StoppedSave of 1;
    save_of_two: HeldSave of 2;
    restore: Restore of 1;
    held_restore: HeldRestore of 1;
    restore_of_two: Restore of 2;
}
