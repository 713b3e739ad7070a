//! Saves into the agent's store and restores out of it: the agent is killed at every step.
//!
//! ```text
//!   kill at a step -> next agent takes the operation up -> a collector for which everything is long ago
//!     the checkpoint is listed, verified whole and restored     or     it is not there, and nothing of it is left
//!     another save works; what it and the first one made is deleted and collected, and the store is as new
//! ```
//! What must be there is told by where the manifest is created: [`CREATED`]. Before it there is no checkpoint. From there on
//! one that no caller was told of is discarded by the take-up, where the devices run on with their state. Where they do
//! not, because nobody kept them, it stays: it is the last copy.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use vfio_checkpoint_client::call::Client;
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_store::{Ambient, Limits, Location, Store};

use crate::every::{check, kill_at, passed};
use crate::figure;
use crate::job::{Job, Kind, done, held};
use crate::lab::PATIENCE;
use crate::steps::{Found, Step, steps, steps_into_store};
use crate::world::{Content, World};

/// The step at which the manifest has just been created.
const CREATED: &str = "store: Created";

/// A clock, and numbers that count.
#[derive(Debug, Default)]
struct Here(AtomicU64);

impl Ambient for Here {
    fn now(&self) -> SystemTime {
        SystemTime::now()
    }

    fn random(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed)
    }
}

/// Collects as another agent would after a long time. Nobody may be writing.
async fn collect(world: &World) {
    let limits = Limits {
        abandoned_after: Duration::ZERO,
        keep_marks: Duration::ZERO,
        grace: Duration::ZERO,
        ..Limits::default()
    };
    let store =
        Store::open(&Location::Folder(world.store()), limits, Arc::new(Here::default())).await.unwrap();
    // What the first one revokes the second clears away.
    for _ in 0..2 {
        store.collect().await.unwrap();
    }
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let paths = entries.map(|entry| entry.unwrap().path());
    paths.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

/// Nothing but the store's marker and its ballast is left.
fn assert_empty(world: &World, where_killed: &str) {
    let mut left = files(&world.store());
    left.retain(|path| path.parent() != Some(world.store().as_path()));
    assert_eq!(left, Vec::<PathBuf>::new(), "{where_killed}: left behind");
    let mut at_top: Vec<String> = fs::read_dir(world.store())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with('.') && name != ".ballast")
        .collect();
    at_top.sort();
    assert_eq!(at_top, Vec::<String>::new(), "{where_killed}: space that is reserved still");
}

async fn listed(client: &Client) -> Vec<v1::Checkpoint> {
    client.list_checkpoints(v1::ListCheckpointsRequest::default()).await.unwrap().checkpoints
}

/// It is listed alone or with others, and every byte of it is what was sealed.
async fn is_whole(client: &Client, name: &str) -> v1::Checkpoint {
    let all = listed(client).await;
    let found = all.into_iter().find(|checkpoint| checkpoint.name == name);
    let found = found.unwrap_or_else(|| panic!("{name} is not listed"));
    assert_eq!(found.damage, "", "{found:?}");
    let request = v1::VerifyCheckpointRequest { name: name.to_owned() };
    let mut answers = client.verify_checkpoint(request).await.unwrap();
    let mut last = None;
    while let Some(answer) = answers.next().await.unwrap() {
        last = Some(answer);
    }
    let last = last.unwrap();
    assert!(last.done && last.problems.is_empty(), "{name}: {last:?}");
    assert!(last.verified_bytes == last.total_bytes && last.total_bytes > 0, "{name}: {last:?}");
    found
}

/// Neither listed nor found by its name.
async fn is_not_there(client: &Client, name: &str) {
    assert_eq!(listed(client).await, Vec::new(), "{name}");
    let gone = client.get_checkpoint(v1::GetCheckpointRequest { name: name.to_owned() }).await.unwrap_err();
    let reason = gone.refusal().and_then(|refusal| refusal.reason.clone());
    assert_eq!(reason.as_deref(), Some("CHECKPOINT_NOT_FOUND"), "{gone}");
}

/// What is in a checkpoint is what the devices had: it is brought into devices that have nothing of it.
async fn is_restorable(world: &World, client: &Client, name: &str) {
    for device in world.devices(client).await {
        let mode = v1::ResetMode::DiscardState.into();
        let request = v1::ResetDeviceRequest { name: device.name, mode, ..Default::default() };
        assert!(client.reset_device(request).await.unwrap().state_lost);
    }
    let job = Job::restore(world.len()).out_of(name);
    let ended = job.run(client, world, Content::Own).await;
    assert_eq!(ended.result(), v1::OperationResult::Succeeded, "{ended:?}");
    assert_eq!(world.contents(client).await, vec![Content::Own; world.len()]);
}

/// A save into the store, to its end.
async fn saved(world: &World, client: &Client) -> v1::Operation {
    let ended = Job::save(world.len()).into_store().run(client, world, Content::Own).await;
    assert_eq!(ended.result(), v1::OperationResult::Succeeded, "{ended:?}");
    ended
}

/// Deletes all there is, and finds the store as new.
async fn clear(world: &World, client: &Client, where_killed: &str) {
    for checkpoint in listed(client).await {
        let request = v1::DeleteCheckpointRequest { name: checkpoint.name };
        client.delete_checkpoint(request).await.unwrap();
    }
    collect(world).await;
    assert_empty(world, where_killed);
}

/// Asserts that of a save that was killed there is a whole checkpoint, or nothing.
async fn check_store(world: &World, ended: Option<&v1::Operation>, point: &str, is_there: bool) {
    let client = world.client().await;
    // A collector that takes every writer for gone takes nothing that is needed.
    collect(world).await;
    match ended {
        Some(ended) if is_there => {
            let found = is_whole(&client, &ended.checkpoint).await;
            assert_eq!(found.consistency(), v1::CheckpointConsistency::Consistent, "{found:?}");
            assert_eq!(listed(&client).await.len(), 1, "{point}");
            is_restorable(world, &client, &ended.checkpoint).await;
        }
        Some(ended) => {
            is_not_there(&client, &ended.checkpoint).await;
            assert_empty(world, point);
        }
        None => {
            assert_eq!(listed(&client).await, Vec::new(), "{point}");
            assert_empty(world, point);
        }
    }
    is_whole(&client, &saved(world, &client).await.checkpoint).await;
    clear(world, &client, point).await;
}

/// Whether the checkpoint of a save that was killed at a step must be there.
fn is_there(steps: &[Step], point: &str, found: Found, with_holder: bool) -> bool {
    let at = |name: &str| steps.iter().position(|(listed, _)| *listed == name).expect("a step");
    match found {
        Found::Held | Found::Done | Found::Ended => true,
        Found::Nothing | Found::Untouched | Found::Undone => !with_holder && at(point) >= at(CREATED),
    }
}

/// Kills a save at every step from `first` on.
async fn save_killed(kind: Kind, set: usize, with_holder: bool, first: &str) {
    let begun = Instant::now();
    let mut world = World::new(set, with_holder).await;
    let steps = steps_into_store(kind);
    let job = Job::new(kind, set).into_store();
    let points: Vec<&str> = steps.iter().map(|(point, _)| *point).collect();
    assert_eq!(passed(&mut world, &job).await, points);
    let ended = check(&world, &job, Found::Ended, true).await;
    check_store(&world, ended.as_ref(), "nowhere", true).await;

    let (mut kills, mut there) = (0, 0);
    for (point, found) in steps.iter().copied().skip_while(|(point, _)| *point != first) {
        let job = Job::new(kind, set).into_store();
        kill_at(&mut world, &job, point).await;
        world.start().await;
        let is_there = is_there(&steps, point, found, with_holder);
        eprintln!(
            "{kind:?} of {set}, holder: {with_holder}: killed at {point}: {found:?}, there: {is_there}"
        );
        let ended = check(&world, &job, found, with_holder).await;
        check_store(&world, ended.as_ref(), point, is_there).await;
        kills += 1;
        there += usize::from(is_there);
    }
    figure(&format!(
        "{kind:?} of {set} into the store {} holder: killed at {kills} steps: {there} checkpoints whole and restored, {} \
         not there and nothing left of them, in {} ms",
        if with_holder { "with" } else { "without" },
        kills - there,
        begun.elapsed().as_millis(),
    ));
}

const START: &str = "before commit of ADMITTED";

#[tokio::test(flavor = "multi_thread")]
async fn a_save_is_in_the_store_whole_or_not_at_all_with_the_holder() {
    save_killed(Kind::Save, 1, true, START).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_save_is_in_the_store_whole_or_not_at_all_without_the_holder() {
    save_killed(Kind::Save, 1, false, START).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_held_save_of_two_is_in_the_store_whole_or_not_at_all() {
    save_killed(Kind::HeldSave, 2, true, "store: Prepared").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_save_that_stays_stopped_is_in_the_store_whole_or_not_at_all() {
    save_killed(Kind::StoppedSave, 1, true, "store: Prepared").await;
}

/// A checkpoint with the other content, of devices that carry their own.
async fn another(world: &World) -> String {
    let client = world.client().await;
    world.load(&client, Content::Other).await;
    let checkpoint = saved(world, &client).await.checkpoint;
    world.load(&client, Content::Own).await;
    checkpoint
}

/// Kills a restore at every step from `first` on. The checkpoint stays as it is.
async fn restore_killed(kind: Kind, set: usize, with_holder: bool, first: &str) {
    let begun = Instant::now();
    let mut world = World::new(set, with_holder).await;
    let checkpoint = another(&world).await;
    let steps = steps(kind, set);
    let job = Job::new(kind, set).out_of(&checkpoint);
    let points: Vec<&str> = steps.iter().map(|(point, _)| *point).collect();
    assert_eq!(passed(&mut world, &job).await, points);
    check(&world, &job, Found::Ended, true).await;

    let mut kills = 0;
    for (point, found) in steps.into_iter().skip_while(|(point, _)| *point != first) {
        let job = Job::new(kind, set).out_of(&checkpoint);
        kill_at(&mut world, &job, point).await;
        world.start().await;
        eprintln!("{kind:?} of {set}, holder: {with_holder}: killed at {point}: {found:?}");
        check(&world, &job, found, with_holder).await;
        let client = world.client().await;
        is_whole(&client, &checkpoint).await;
        if found == Found::Nothing {
            // The same request, which never was one.
            let ended = job.run(&client, &world, Content::Other).await;
            assert_eq!(ended.result(), v1::OperationResult::Succeeded, "{ended:?}");
            assert_eq!(world.contents(&client).await, vec![Content::Other; set]);
            world.load(&client, Content::Own).await;
        }
        kills += 1;
    }
    let client = world.client().await;
    clear(&world, &client, "restores").await;
    figure(&format!(
        "{kind:?} of {set} out of the store {} holder: killed at {kills} steps: the checkpoint is as it was, in {} ms",
        if with_holder { "with" } else { "without" },
        begun.elapsed().as_millis(),
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_from_the_store_is_told_as_it_is_with_the_holder() {
    restore_killed(Kind::Restore, 1, true, START).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_from_the_store_is_told_as_it_is_without_the_holder() {
    restore_killed(Kind::Restore, 1, false, START).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_held_restore_of_two_from_the_store_is_told_as_it_is() {
    restore_killed(Kind::HeldRestore, 2, true, "chunk").await;
}

/// Kills the agent at `point` of `job`, and, if there is one, at `second` of its recovery. It is served again then.
async fn killed(world: &mut World, job: &Job, point: &str, second: Option<&str>) {
    kill_at(world, job, point).await;
    if let Some(second) = second {
        world.launch(&format!("{second}=1"));
        world.stopped(second).await;
        world.kill_agent();
    }
    world.start().await;
}

/// A hold ran out while nobody was there, or when the agent was killed: whoever comes next marks the checkpoint.
#[tokio::test(flavor = "multi_thread")]
async fn a_hold_that_ran_out_is_marked_in_the_store_by_the_next_agent() {
    let mut world = World::new(1, true).await;
    let kills = [
        ("after commit of HELD", None),
        ("save: Marking", None),
        // Marked, and not on record as that.
        ("before commit of RUNNING", None),
        ("after commit of HELD", Some("take-up begins")),
        ("after commit of HELD", Some("checkpoint marked")),
        // On record: nothing is left to be marked.
        ("after commit of RUNNING", None),
    ];
    for (point, second) in kills {
        let job = Job::new(Kind::HeldSave, 1).into_store().that_waits().held_for_a_moment();
        killed(&mut world, &job, point, second).await;
        let client = world.client().await;
        let name = job.begin(&client, None).await.unwrap().name;
        let ended = done(&client, &name).await.unwrap();
        assert_eq!(ended.failure.as_ref().unwrap().reason, "HOLD_EXPIRED", "{point}, {second:?}: {ended:?}");
        assert_eq!(ended.consistency(), v1::CheckpointConsistency::Inconsistent, "{ended:?}");
        assert_eq!(world.contents(&client).await, [Content::Own]);
        collect(&world).await;
        let found = is_whole(&client, &ended.checkpoint).await;
        assert_eq!(found.consistency(), v1::CheckpointConsistency::Inconsistent, "{point}, {second:?}");
        let refused = Job::restore(1).out_of(&ended.checkpoint).begin(&client, None).await.unwrap_err();
        assert_eq!(refused.refusal().unwrap().reason.as_deref(), Some("BLOCKED"), "{refused}");
        let all_the_same = Job::restore(1).out_of(&ended.checkpoint).whatever_it_is_worth();
        let restored = all_the_same.run(&client, &world, Content::Own).await;
        assert_eq!(restored.result(), v1::OperationResult::Succeeded, "{restored:?}");
        clear(&world, &client, point).await;
    }
    figure(&format!("{} kills of a hold in the store that ran out: marked inconsistent", kills.len()));
}

/// The store is away when the next agent takes the operation up, and it comes back to the one after that.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_store_that_was_away_did_not_take_is_owed_by_every_agent_after_it() {
    let mut world = World::new(1, true).await;
    let (store, away) = (world.store(), world.store().with_extension("away"));
    // Marked, or discarded; what is in the store's place; where the agent that finds it away is killed as well.
    let kills = [
        (true, true, None),
        (true, false, Some("after commit of RUNNING")),
        (false, true, None),
        (false, false, Some("before commit of ENDED")),
    ];
    for (marked, by_a_file, second) in kills {
        let job = if marked {
            Job::new(Kind::HeldSave, 1).into_store().that_waits().held_for_a_moment()
        } else {
            Job::new(Kind::HeldSave, 1).into_store()
        };
        let point = if marked { "after commit of HELD" } else { "before commit of HELD" };
        kill_at(&mut world, &job, point).await;
        fs::rename(&store, &away).unwrap();
        if by_a_file {
            fs::write(&store, "a file").unwrap();
        }
        if let Some(second) = second {
            world.launch(&format!("{second}=1"));
            world.stopped(second).await;
            world.kill_agent();
        }
        world.start().await;
        let client = world.client().await;
        let name = job.begin(&client, None).await.unwrap().name;
        let ended = done(&client, &name).await.unwrap();
        let inconsistent = v1::CheckpointConsistency::Inconsistent;
        assert_eq!(ended.consistency() == inconsistent, marked, "{ended:?}");
        assert_eq!(world.contents(&client).await, [Content::Own]);
        world.kill_agent();
        if by_a_file {
            fs::remove_file(&store).unwrap();
        } else {
            assert!(!store.exists(), "it was made anew");
        }
        fs::rename(&away, &store).unwrap();

        world.start().await;
        let client = world.client().await;
        if marked {
            let found = is_whole(&client, &ended.checkpoint).await;
            assert_eq!(found.consistency(), inconsistent, "{found:?}");
            let refused = Job::restore(1).out_of(&ended.checkpoint).begin(&client, None).await.unwrap_err();
            assert_eq!(refused.refusal().unwrap().reason.as_deref(), Some("BLOCKED"), "{refused}");
        } else {
            is_not_there(&client, &ended.checkpoint).await;
        }
        let id = ended.checkpoint.rsplit_once('/').unwrap().1;
        let mark = store.join("checkpoints").join(id).join(if marked { "inconsistent" } else { "deleted" });
        let paid = async {
            while !mark.exists() {
                world.devices(&client).await;
            }
        };
        tokio::time::timeout(PATIENCE, paid).await.expect("it was never paid");
        clear(&world, &client, point).await;
    }
    figure(&format!("{} marks and discards that a store did not take: owed until it did", kills.len()));
}

/// A checkpoint that nobody was told of, and one of a hold that is taken back: whoever comes next discards them.
#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_that_is_taken_back_is_discarded_by_the_next_agent() {
    let mut world = World::new(1, true).await;
    let kills = [
        (Kind::Save, CREATED, Some("take-up begins")),
        (Kind::Save, "checkpoint committed", Some("checkpoint discarded")),
        (Kind::HeldSave, "before commit of HELD", Some("checkpoint discarded")),
        (Kind::Save, "checkpoint committed", Some("before commit of ENDED")),
    ];
    for (kind, point, second) in kills {
        let job = Job::new(kind, 1).into_store();
        killed(&mut world, &job, point, second).await;
        let ended = check(&world, &job, Found::Undone, true).await;
        check_store(&world, ended.as_ref(), point, false).await;
    }
    // Held by the agent that was killed, and cancelled in the hands of the next.
    let job = Job::new(Kind::HeldSave, 1).into_store().that_waits();
    killed(&mut world, &job, "after commit of HELD", None).await;
    let client = world.client().await;
    let operation = job.begin(&client, None).await.unwrap();
    assert!(held(&client, &operation.name).await.unwrap());
    is_whole(&client, &operation.checkpoint).await;
    client.cancel_operation(v1::CancelOperationRequest { name: operation.name.clone() }).await.unwrap();
    let ended = done(&client, &operation.name).await.unwrap();
    assert_eq!(ended.result(), v1::OperationResult::Cancelled, "{ended:?}");
    assert_eq!(world.contents(&client).await, [Content::Own]);
    check_store(&world, Some(&ended), "a hold that was taken up", false).await;
    figure(&format!("{} checkpoints taken back by the next agent: nothing left of them", kills.len() + 1));
}
