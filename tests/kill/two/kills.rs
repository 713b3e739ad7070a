//! The agent of the source, or of the destination, or both are killed at every step of a migration.
//!
//! ```text
//!   killed                  devices kept by the holder       not kept
//!   source, .. Sealing      undone: stays                    lost, and told
//!   source, COMMITTING ..   moves                            moves
//!   destination, .. HELD    undone: stays                    stays
//!   destination, then told  moves                            refused: stays
//!   destination, RUNNING .. moves                            LOST: an admin has the source resume by that
//!   destination, ENDED      moves                            moved; then lost with its agent
//! ```
//! What is a row here is derived from two facts of each step: whether `CommitHandover` may have been sent, and what the
//! destination has on record. The steps are not only listed: a migration is run to its end first, and what it passes must
//! be the list. After each kill the next migration works. `page.rs` holds the rows against those of the page on the hand-over.

use std::collections::BTreeMap;
use std::time::Instant;

use super::settle::After;
use super::{Move, Pair};
use crate::figure;

mod page;

/// What the source passes, up to the record by which it may have told the destination to run the devices.
const SOURCE_BEFORE: [&str; 13] = [
    "before commit of ADMITTED",
    "after commit of ADMITTED",
    "before commit of BEGUN",
    "after commit of BEGUN",
    "save: Quiescing",
    "save: Stopping",
    "save: Draining",
    "chunk",
    "save: Parking",
    "save: Sealing",
    "save: Offered",
    "save: Committing",
    "before commit of COMMITTING",
];

/// The same with pre-copy.
const SOURCE_BEFORE_PRE_COPY: [&str; 14] = [
    "before commit of ADMITTED",
    "after commit of ADMITTED",
    "before commit of BEGUN",
    "after commit of BEGUN",
    "save: PreCopying",
    "chunk",
    "save: Quiescing",
    "save: Stopping",
    "save: Draining",
    "save: Parking",
    "save: Sealing",
    "save: Offered",
    "save: Committing",
    "before commit of COMMITTING",
];

/// What it passes then.
const SOURCE_AFTER: [&str; 10] = [
    "after commit of COMMITTING",
    "commit is sent",
    "commit is answered",
    "save: LettingGo",
    "before commit of LETTING_GO",
    "after commit of LETTING_GO",
    "save: HandedOver",
    "read back",
    "before commit of ENDED",
    "after commit of ENDED",
];

/// What the destination passes before the source is told that it has all.
const DESTINATION_BEFORE: [&str; 12] = [
    "before commit of ADMITTED",
    "after commit of ADMITTED",
    "restore: Entering",
    "before commit of BEGUN",
    "after commit of BEGUN",
    "restore: Loading",
    "chunk",
    "restore: Verifying",
    "restore: FixingUp",
    "restore: Held",
    "before commit of HELD",
    "after commit of HELD",
];

/// The first that the destination passes once it was told to run its devices.
const TOLD_FIRST: &str = "restore: AwaitingReady";
/// Told to run its devices, and not on record as that.
const DESTINATION_TOLD: [&str; 3] = [TOLD_FIRST, "restore: Resuming", "before commit of RUNNING"];
/// Of a set, whose first step is another.
const DESTINATION_TOLD_SET: [&str; 3] = [TOLD_FIRST, "restore: Quiescing", "before commit of RUNNING"];

/// On record as running its devices.
const DESTINATION_RUNS: [&str; 4] =
    ["after commit of RUNNING", "restore: Completed", "read back", "before commit of ENDED"];
/// The same of a set.
const DESTINATION_RUNS_SET: [&str; 6] = [
    "after commit of RUNNING",
    "restore: Resuming",
    "restore: PartlyRunning",
    "restore: Completed",
    "read back",
    "before commit of ENDED",
];

const DESTINATION_OVER: [&str; 1] = ["after commit of ENDED"];

/// Where a set with pre-copy can differ from one device without.
const OF_A_SET: [&str; 15] = [
    "save: PreCopying",
    "chunk",
    "save: Quiescing",
    "save: Stopping",
    "before commit of COMMITTING",
    "after commit of COMMITTING",
    "after commit of LETTING_GO",
    "after commit of HELD",
    "restore: AwaitingReady",
    "restore: Quiescing",
    "before commit of RUNNING",
    "after commit of RUNNING",
    "restore: Resuming",
    "restore: PartlyRunning",
    "before commit of ENDED",
];

/// Who is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Victim {
    Source,
    Destination,
    Both,
}

/// A step of one side, at which somebody is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum At {
    Source(&'static str),
    Destination(&'static str),
}

/// What the source passes with these parameters.
fn of_source(pre_copy: bool) -> Vec<&'static str> {
    let before = if pre_copy { &SOURCE_BEFORE_PRE_COPY[..] } else { &SOURCE_BEFORE[..] };
    [before, &SOURCE_AFTER].concat()
}

/// What the destination passes, for a set of so many.
fn of_destination(set: usize) -> Vec<&'static str> {
    let (told, runs) = if set > 1 {
        (DESTINATION_TOLD_SET, &DESTINATION_RUNS_SET[..])
    } else {
        (DESTINATION_TOLD, &DESTINATION_RUNS[..])
    };
    [&DESTINATION_BEFORE, &told[..], runs, &DESTINATION_OVER].concat()
}

/// What the destination has on record at a step of either side, and whether it may have been told to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    /// Not prepared, as far as the source knows.
    Loading,
    /// Prepared, and the source has COMMITTING on record.
    Told,
    Runs,
    Over,
}

impl At {
    fn stage(self, set: usize) -> Stage {
        match self {
            Self::Source(point) if SOURCE_AFTER[..2].contains(&point) => Stage::Told,
            Self::Source(point) if SOURCE_AFTER.contains(&point) => Stage::Over,
            Self::Source(_) => Stage::Loading,
            Self::Destination(point) => {
                let all = of_destination(set);
                let at = all.iter().position(|listed| *listed == point).expect("a step");
                let over = all.len() - 1;
                let runs = all.iter().position(|listed| *listed == "after commit of RUNNING").unwrap();
                match at {
                    at if at == over => Stage::Over,
                    at if at >= runs => Stage::Runs,
                    at if at >= DESTINATION_BEFORE.len() => Stage::Told,
                    _ => Stage::Loading,
                }
            }
        }
    }

    /// What must be found once the victims are back, where the devices of those were kept, or not.
    pub(super) fn after(self, set: usize, victim: Victim, kept: bool) -> After {
        let source_lost = !kept && victim != Victim::Destination;
        let destination_lost = !kept && victim != Victim::Source;
        let never = self == Self::Source("before commit of ADMITTED");
        match self.stage(set) {
            Stage::Loading if never && source_lost => After::Gone,
            Stage::Loading if never => After::Never,
            Stage::Loading if source_lost => After::Lost,
            Stage::Loading => After::Stays,
            Stage::Told | Stage::Runs if source_lost && destination_lost => After::Lost,
            Stage::Told if destination_lost => After::Stays,
            Stage::Runs if destination_lost => After::Resolved,
            Stage::Over if destination_lost => After::Gone,
            Stage::Told | Stage::Runs | Stage::Over => After::Moves,
        }
    }
}

impl Pair {
    /// What source and destination pass in a migration that nobody kills.
    async fn passed(&mut self, job: &Move) -> [Vec<String>; 2] {
        let (home, away) = (self.home, self.away());
        for node in &mut self.nodes {
            node.arm("nothing", 1).await;
        }
        self.moves(job).await;
        let mut passed = [Vec::new(), Vec::new()];
        for (side, points) in [home, away].into_iter().zip(&mut passed) {
            let end = self.nodes[side].agent().wait_for("that it ended", |line| {
                let point = line.strip_prefix("at ")?;
                if !points.iter().any(|before| before == point) {
                    points.push(point.to_owned());
                }
                (point == "after commit of ENDED").then_some(())
            });
            end.await;
        }
        passed
    }

    /// Begins a migration, and kills who is to be killed where one side comes to a step.
    pub(super) async fn killed(&mut self, job: &Move, at: At, victim: Victim, with_holders: bool) {
        let (home, away) = (self.home, self.away());
        let (side, point) = match at {
            At::Source(point) => (home, point),
            At::Destination(point) => (away, point),
        };
        let victims: &[usize] = match victim {
            Victim::Source => &[home],
            Victim::Destination => &[away],
            Victim::Both => &[home, away],
        };
        // The end of both sides is put on record once more, when it is settled: that of the migration before must not be taken
        // for this one's.
        let is_end = point.ends_with("commit of ENDED");
        // A state is several chunks: the second is in the middle.
        let first = if is_end { "read back" } else { point };
        self.nodes[side].arm(first, if point == "chunk" { 2 } else { 1 }).await;
        let driving = self.driven(job).await;
        self.nodes[side].stopped(first).await;
        if is_end {
            self.nodes[side].arm(point, 1).await;
            self.nodes[side].release();
            self.nodes[side].stopped(point).await;
        }
        for victim in victims {
            if with_holders {
                self.nodes[*victim].kill_holder();
            }
            self.kill(*victim);
        }
        if !victims.contains(&side) {
            self.nodes[side].release();
        }
        driving.abort();
        let _ = driving.await;
        for victim in victims {
            if with_holders {
                self.nodes[*victim].start_holder().await;
            }
        }
    }

    /// Starts again who was killed.
    pub(super) async fn start_again(&mut self, victim: Victim) {
        match victim {
            Victim::Source => self.start(self.home).await,
            Victim::Destination => self.start(self.away()).await,
            Victim::Both => self.start_both().await,
        }
    }
}

/// Kills at each of these steps, and looks.
async fn kill(pair: &mut Pair, what: &str, pre_copy: bool, victim: Victim, steps: &[At], with_holders: bool) {
    let begun = Instant::now();
    let set = pair.own.len();
    let kept = pair.is_kept() && !with_holders;
    if !kept {
        pair.kept_since = None;
    }
    let mut tally = BTreeMap::new();
    for at in steps {
        let after = at.after(set, victim, kept);
        eprintln!("{what}: {victim:?} killed at {at:?}, kept: {kept}: {after:?}");
        let job = Move::new(pre_copy);
        pair.killed(&job, *at, victim, with_holders).await;
        pair.start_again(victim).await;
        pair.settle(&job, after).await;
        pair.moves(&Move::new(pre_copy)).await;
        *tally.entry(format!("{after:?}").to_lowercase()).or_insert(0) += 1;
    }
    let runs = pair.watch.check(&pair.own, pair.kept_since);
    let tally: Vec<String> = tally.iter().map(|(after, times)| format!("{times} {after}")).collect();
    figure(&format!(
        "{what}: {victim:?} killed at {} steps: {}; a state began to run {runs} times, and never twice at once, in {} ms",
        steps.len(),
        tally.join(", "),
        begun.elapsed().as_millis(),
    ));
}

/// Every step of one side.
async fn every_step(pre_copy: bool, set: usize, with_holders: bool, victim: Victim) {
    let mut pair = Pair::new(set, with_holders).await;
    let (here, there) = (of_source(pre_copy), of_destination(set));
    let passed = pair.passed(&Move::new(pre_copy)).await;
    assert_eq!(passed, [here.clone(), there.clone()]);
    // Of a set, the steps that it has alone, and those that decide. Where nobody keeps the devices only what is on record
    // makes a difference, and what was sent.
    let is_looked_at = |point: &&str| {
        let is_step = set == 1 || OF_A_SET.contains(point);
        let is_mark = with_holders || point.contains("commit") || ["chunk", TOLD_FIRST].contains(point);
        is_step && is_mark
    };
    let steps: Vec<At> = match victim {
        Victim::Source => here.into_iter().filter(is_looked_at).map(At::Source).collect(),
        Victim::Destination | Victim::Both => {
            there.into_iter().filter(is_looked_at).map(At::Destination).collect()
        }
    };
    let what = format!(
        "migration of {set} {} {} holders",
        if pre_copy { "with pre-copy" } else { "stopped" },
        if with_holders { "with" } else { "without" },
    );
    kill(&mut pair, &what, pre_copy, victim, &steps, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_source_is_killed_at_every_step() {
    every_step(false, 1, true, Victim::Source).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_destination_is_killed_at_every_step() {
    every_step(false, 1, true, Victim::Destination).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_source_of_two_with_pre_copy_is_killed() {
    every_step(true, 2, true, Victim::Source).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_destination_of_two_with_pre_copy_is_killed() {
    every_step(true, 2, true, Victim::Destination).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_source_is_killed_at_every_record_without_a_holder() {
    every_step(false, 1, false, Victim::Source).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_destination_is_killed_at_every_record_without_a_holder() {
    every_step(false, 1, false, Victim::Destination).await;
}

/// The steps around the commit, of both sides.
fn around_the_commit(set: usize) -> Vec<At> {
    let here = ["before commit of COMMITTING", "after commit of COMMITTING", "commit is answered"]
        .into_iter()
        .chain(["after commit of LETTING_GO", "before commit of ENDED"]);
    let there = of_destination(set);
    let told = there.iter().position(|point| *point == TOLD_FIRST).unwrap();
    here.map(At::Source).chain(there[told..].iter().copied().map(At::Destination)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn both_are_killed_around_the_commit() {
    let mut pair = Pair::new(2, true).await;
    kill(&mut pair, "migration of 2 with holders", false, Victim::Both, &around_the_commit(2), false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn both_are_killed_around_the_commit_without_a_holder() {
    let mut pair = Pair::new(1, false).await;
    kill(&mut pair, "migration of 1 without holders", false, Victim::Both, &around_the_commit(1), false)
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_and_its_holder_are_killed_around_the_commit() {
    let mut pair = Pair::new(1, true).await;
    let what = "migration of 1 with holders that are killed as well";
    let steps = around_the_commit(1);
    for (victim, is_here) in [(Victim::Source, true), (Victim::Destination, false), (Victim::Both, false)] {
        let of_it = |at: &&At| matches!(at, At::Source(_)) == is_here;
        let steps: Vec<At> = steps.iter().filter(of_it).copied().collect();
        kill(&mut pair, what, false, victim, &steps, true).await;
    }
}

/// The holder of one side is killed at every record of it, and its agent lives on: what it has open it has open itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_holder_is_killed_alone_at_every_record() {
    let begun = Instant::now();
    let mut pair = Pair::new(1, true).await;
    let records = |steps: Vec<&'static str>| steps.into_iter().filter(|step| step.contains(" commit of "));
    let here = records(of_source(false)).map(At::Source);
    let steps: Vec<At> = here.chain(records(of_destination(1)).map(At::Destination)).collect();
    for at in &steps {
        eprintln!("holder killed at {at:?}");
        let job = Move::new(false);
        let (side, point) = match *at {
            At::Source(point) => (pair.home, point),
            At::Destination(point) => (pair.away(), point),
        };
        pair.nodes[side].arm(point, 1).await;
        let driving = pair.driven(&job).await;
        pair.nodes[side].stopped(point).await;
        pair.nodes[side].kill_holder();
        pair.nodes[side].release();
        driving.await.unwrap();
        pair.settle(&job, After::Moves).await;
        pair.nodes[side].start_holder().await;
    }
    figure(&format!(
        "migration of 1: a holder killed alone at {} records: all moved, in {} ms",
        steps.len(),
        begun.elapsed().as_millis(),
    ));
}

/// A device of the destination does not leave RESUMING, and the agent is killed while it takes the others back.
#[tokio::test(flavor = "multi_thread")]
async fn the_destination_is_killed_while_it_reverts() {
    let mut pair = Pair::new(2, true).await;
    let points =
        ["before commit of REVERTING", "after commit of REVERTING", "read back", "before commit of ENDED"];
    for point in points {
        eprintln!("killed at {point}");
        let (away, job) = (pair.away(), Move::new(false));
        pair.watch.refuse(&format!("{}/1", super::NAMES[away]), "RUNNING_P2P");
        pair.killed(&job, At::Destination(point), Victim::Destination, false).await;
        pair.start_again(Victim::Destination).await;
        // What was not on record as taken back goes on, and this time no device refuses.
        let after = if point == "before commit of REVERTING" { After::Moves } else { After::Stays };
        pair.settle(&job, after).await;
        pair.moves(&Move::new(false)).await;
    }
    figure(&format!("migration of 2: the destination killed at {} steps of its way back", points.len()));
}

/// One side is killed, and once more while it takes up what it finds.
#[tokio::test(flavor = "multi_thread")]
async fn one_is_killed_and_once_more_while_it_recovers() {
    let begun = Instant::now();
    let mut pair = Pair::new(1, true).await;
    let undone: &[&str] = &["take-up begins", "before commit of ENDED"];
    let asks: &[&str] = &[
        "take-up begins",
        "commit is sent",
        "commit is answered",
        "save: LettingGo",
        "after commit of LETTING_GO",
        "save: HandedOver",
        "before commit of ENDED",
    ];
    let lets_go: &[&str] = &["save: HandedOver"];
    let waits: &[&str] = &["boot: devices in", "take-up begins"];
    let goes_on: &[&str] = &["take-up begins", "restore: Completed", "before commit of ENDED"];
    let rows = [
        (At::Source("before commit of COMMITTING"), undone),
        (At::Source("after commit of COMMITTING"), asks),
        (At::Source("after commit of LETTING_GO"), lets_go),
        (At::Destination("restore: Verifying"), undone),
        (At::Destination("restore: AwaitingReady"), waits),
        (At::Destination("after commit of RUNNING"), goes_on),
    ];
    let mut kills = 0;
    for (at, points) in rows {
        let (victim, is_here) = match at {
            At::Source(_) => (Victim::Source, true),
            At::Destination(_) => (Victim::Destination, false),
        };
        for point in points {
            let after = at.after(1, victim, true);
            eprintln!("killed at {at:?}, and at {point}: {after:?}");
            let job = Move::new(false);
            pair.killed(&job, at, victim, false).await;
            let side = if is_here { pair.home } else { pair.away() };
            pair.nodes[side].launch(&format!("{point}=1"));
            pair.nodes[side].stopped(point).await;
            pair.kill(side);
            pair.start(side).await;
            pair.settle(&job, after).await;
            pair.moves(&Move::new(false)).await;
            kills += 1;
        }
    }
    figure(&format!(
        "migration of 1 with holders: one side killed at {} steps and once more at {kills} points of its recovery, in {} ms",
        rows.len(),
        begun.elapsed().as_millis(),
    ));
}

/// Both are killed before the commit, and the source is back first: it runs on, and goes on telling its destination that
/// nothing comes, which would wait for it until its own deadline.
#[tokio::test(flavor = "multi_thread")]
async fn a_destination_that_is_back_later_than_its_source_is_told_that_nothing_comes() {
    let mut pair = Pair::new(1, true).await;
    let job = Move::new(false);
    pair.killed(&job, At::Source("before commit of COMMITTING"), Victim::Both, false).await;
    let (home, away) = (pair.home, pair.away());
    pair.nodes[away].launch("boot: done=1");
    pair.nodes[away].stopped("boot: done").await;
    pair.nodes[home].launch("");
    // It is served meanwhile.
    pair.nodes[home].served().await;
    pair.lead(home);
    let told = |line: &str| line.contains("the destination is not told yet").then_some(());
    pair.nodes[home].agent().wait_for("that it cannot tell its destination", told).await;
    pair.nodes[away].release();
    pair.nodes[away].served().await;
    pair.lead(away);
    pair.settle(&job, After::Stays).await;
    pair.moves(&Move::new(false)).await;
    figure("1 destination that was back later than its source: told that nothing comes");
}
