//! Runs of the model for the page: one in which nothing goes wrong, and from each of its steps one fault and what comes
//! of it.
//!
//! ```text
//!   course: World, World, World ...        a step that is possible and no fault, the destination's first, again and again
//!             |
//!             +-- a fault --> every order of what must follow --> ends
//! ```
//! # Invariants
//! After a fault nothing else goes wrong. Timers fire where nothing else is left, and an administrator decides where
//! nothing else would: so a cell says what comes of that one fault.

use std::collections::{BTreeSet, HashSet};
use std::fmt::Write as _;

use vfio_checkpoint_fsm::handover::{Resolution, Verdict};
use vfio_checkpoint_fsm::{RestoreState, SaveState, State};

use crate::destination::{DestinationAction, Set};
use crate::handover::{Action, Crash, HandOver};
use crate::liveness::{is_end, outcome};
use crate::page::{arrival_name, offer_name};
use crate::setup::{Budget, Commit, Setup};
use crate::source::SourceAction;
use crate::world::{Device, Process, Word, World};

/// Two devices, so that a part of them can run; one of each fault.
fn checked(commit: Commit) -> HandOver {
    let budget =
        Budget { source_crashes: 1, destination_crashes: 1, destination_sets: 1, ..Budget::default() };
    HandOver::new(Setup { commit, admin: true, ..Setup::new("course", 2, true, budget) })
}

/// How late a step comes: everything of a lower rank goes first. `None`: not by itself.
fn rank(action: Action) -> Option<u8> {
    match action {
        Action::Source(action) => match action {
            SourceAction::Records
            | SourceAction::AsksPrepare
            | SourceAction::HearsAccepted(_)
            | SourceAction::HearsPrepared(_)
            | SourceAction::HearsAnswer(..)
            | SourceAction::Saves
            | SourceAction::SendsState { damaged: false }
            | SourceAction::CommitIsDue
            | SourceAction::SendsCommit
            | SourceAction::Abandons
            | SourceAction::Sets { .. }
            | SourceAction::Reports
            | SourceAction::Restarts => Some(0),
            SourceAction::TimeIsUp | SourceAction::LosesConnection => Some(1),
            SourceAction::Settles => Some(4),
            SourceAction::WriteFails { .. }
            | SourceAction::SendsState { damaged: true }
            | SourceAction::SetFails { .. }
            | SourceAction::IsCancelled
            | SourceAction::Crashes(_)
            | SourceAction::MigratesAgain => None,
        },
        Action::Destination(action) => match action {
            DestinationAction::Records
            | DestinationAction::HearsPrepare(_)
            | DestinationAction::SaysAccepted
            | DestinationAction::HearsStream(_)
            | DestinationAction::HearsState { damaged: false, .. }
            | DestinationAction::HearsCommit(_)
            | DestinationAction::HearsAbandon(_)
            | DestinationAction::Enters
            | DestinationAction::SaysPrepared
            | DestinationAction::Sets { set: Set::Done, .. }
            | DestinationAction::Resets { .. }
            | DestinationAction::Reports
            | DestinationAction::Restarts => Some(0),
            DestinationAction::TimeIsUp | DestinationAction::LosesConnection => Some(1),
            DestinationAction::WriteFails { .. }
            | DestinationAction::HearsState { damaged: true, .. }
            | DestinationAction::HearsSettled(_)
            | DestinationAction::Sets { set: Set::Stays | Set::Errs | Set::FailsDone, .. }
            | DestinationAction::ResetFails { .. }
            | DestinationAction::IsShutDown
            | DestinationAction::Crashes(_)
            | DestinationAction::StaysAway => None,
        },
        Action::Fences => Some(3),
        Action::Resolves { stated, .. } => Some(if stated { 3 } else { 2 }),
    }
}

/// What would come over a connection that is lost.
fn is_of_stream(action: Action) -> bool {
    matches!(
        action,
        Action::Source(
            SourceAction::HearsAccepted(_)
                | SourceAction::HearsPrepared(_)
                | SourceAction::AsksPrepare
                | SourceAction::SendsState { .. }
        ) | Action::Destination(
            DestinationAction::HearsPrepare(_)
                | DestinationAction::SaysAccepted
                | DestinationAction::HearsStream(_)
                | DestinationAction::HearsState { .. }
                | DestinationAction::SaysPrepared
        )
    )
}

/// The steps of the lowest rank that change something.
fn onward(checked: &HandOver, world: &World, stream: bool) -> Vec<(Action, World)> {
    let mut ranked: Vec<(u8, Action, World)> = checked
        .possible(world)
        .into_iter()
        .filter(|action| stream || !is_of_stream(*action))
        // An administrator who lets go decides against the copy here: that is in a table of its own.
        .filter(|action| !matches!(action, Action::Resolves { resolution: Resolution::LetGo, .. }))
        .filter_map(|action| Some((rank(action)?, action, checked.does(world, action)?)))
        .collect();
    let lowest = ranked.iter().map(|(rank, ..)| *rank).min();
    ranked.retain(|(rank, ..)| Some(*rank) == lowest);
    ranked.into_iter().map(|(_, action, next)| (action, next)).collect()
}

/// A run in which nothing goes wrong.
fn course(checked: &HandOver) -> Vec<(Option<Action>, World)> {
    let mut course = vec![(None, World::new(&checked.setup))];
    while let Some((action, next)) = course.last().and_then(|(_, world)| {
        // So that what was said is heard before more is said.
        let mut next = onward(checked, world, true);
        next.sort_by_key(|(action, _)| !matches!(action, Action::Destination(_)));
        next.into_iter().next()
    }) {
        course.push((Some(action), next));
    }
    course
}

/// The run as Mermaid draws it.
pub(crate) fn sequence(commit: Commit) -> String {
    let checked = checked(commit);
    let mut text = String::from("```mermaid\nsequenceDiagram\n");
    if checked.is_manual() {
        text.push_str("    participant C as caller\n");
    }
    text.push_str("    participant S as source\n    participant D as destination\n");
    let course = course(&checked);
    for pair in course.windows(2) {
        let [(_, before), (Some(action), after)] = pair else { continue };
        for line in lines(&checked, *action, before, after) {
            let _ = writeln!(text, "    {line}");
        }
    }
    text.push_str("```\n");
    text
}

fn lines(checked: &HandOver, action: Action, before: &World, after: &World) -> Vec<String> {
    let line = |text: &str| vec![text.to_owned()];
    match action {
        Action::Source(action) => match action {
            SourceAction::AsksPrepare => line("S->>D: Prepare"),
            SourceAction::Saves => vec![format!("Note over S: {}", after.source.machine)],
            SourceAction::HearsAccepted(_) => line("S->>D: StreamState opens"),
            SourceAction::SendsState { .. } => line("S->>D: StreamState: chunks and seals"),
            SourceAction::HearsPrepared(_) => line("Note over S: Offered"),
            SourceAction::CommitIsDue if checked.is_manual() => line("C->>S: Commit"),
            SourceAction::Records => {
                let name = after.source.ended.map_or(offer_name(after.source.durable), SaveState::name);
                vec![format!("Note over S: on record: {name}")]
            }
            SourceAction::SendsCommit => line("S->>D: CommitHandover"),
            SourceAction::Sets { member } => vec![format!("Note over S: device {} is reset", member + 1)],
            SourceAction::Settles => line("S->>D: GetHandover, settled"),
            SourceAction::WriteFails { .. }
            | SourceAction::HearsAnswer(..)
            | SourceAction::CommitIsDue
            | SourceAction::Abandons
            | SourceAction::SetFails { .. }
            | SourceAction::Reports
            | SourceAction::TimeIsUp
            | SourceAction::IsCancelled
            | SourceAction::LosesConnection
            | SourceAction::Crashes(_)
            | SourceAction::Restarts
            | SourceAction::MigratesAgain => Vec::new(),
        },
        Action::Destination(action) => match action {
            DestinationAction::Records => {
                let name = after.destination.durable.map_or("nothing", arrival_name);
                vec![format!("Note over D: on record: {name}")]
            }
            DestinationAction::SaysAccepted => line("D-->>S: answer of Prepare"),
            DestinationAction::Enters => line("Note over D: devices in RESUMING"),
            DestinationAction::HearsState { .. } => line("Note over D: all is loaded and verified"),
            DestinationAction::SaysPrepared => line("D-->>S: last Ack, complete: Prepared"),
            DestinationAction::Sets { member, .. } => {
                vec![format!("Note over D: device {} in {}", member + 1, after.there[member].state)]
            }
            DestinationAction::HearsCommit(of) if before.said != after.said => {
                let told = after.ghost.verdicts[usize::from(of)].map_or("not prepared", Verdict::name);
                vec![format!("D-->>S: {told}")]
            }
            DestinationAction::WriteFails { .. }
            | DestinationAction::HearsPrepare(_)
            | DestinationAction::HearsStream(_)
            | DestinationAction::HearsCommit(_)
            | DestinationAction::HearsAbandon(_)
            | DestinationAction::HearsSettled(_)
            | DestinationAction::Resets { .. }
            | DestinationAction::ResetFails { .. }
            | DestinationAction::Reports
            | DestinationAction::TimeIsUp
            | DestinationAction::IsShutDown
            | DestinationAction::LosesConnection
            | DestinationAction::Crashes(_)
            | DestinationAction::Restarts
            | DestinationAction::StaysAway => Vec::new(),
        },
        Action::Fences | Action::Resolves { .. } => Vec::new(),
    }
}

type Reached = fn(&World) -> bool;

fn out_there(world: &World, state: State) -> usize {
    world.there.iter().filter(|device| device.runs_copy() && device.state == state).count()
}

/// The steps of a run, each with the first state that counts as it.
const STEPS: [(&str, Reached); 19] = [
    ("Prepare is under way", |world| world.is_said(0, Word::Prepare)),
    ("Prepare is heard, LOADING is being written", |world| world.destination.arrival.is_some()),
    ("Prepare is answered", |world| world.is_said(0, Word::Accepted)),
    ("state is under way", |world| {
        world.source.machine == SaveState::Draining && world.destination.machine == RestoreState::Loading
    }),
    ("PREPARED is being written", |world| {
        matches!(world.destination.machine, RestoreState::Held { .. }) && world.destination.writing
    }),
    ("PREPARED is on record", |world| world.ghost.prepared[0]),
    ("Prepared is heard", |world| world.source.machine == SaveState::Offered),
    ("COMMITTING is being written here", |world| world.source.machine == SaveState::Committing),
    ("COMMITTING is on record here", |world| {
        world.source.machine == SaveState::Committing && !world.source.writing
    }),
    ("Commit is heard, COMMITTING is being written there", |world| {
        world.destination.machine == RestoreState::Quiescing
    }),
    ("COMMITTING is on record there", |world| {
        world.destination.machine == RestoreState::Quiescing && !world.destination.writing
    }),
    ("a device is in RUNNING_P2P", |world| out_there(world, State::RunningP2p) > 0),
    ("all are in RUNNING_P2P", |world| world.destination.machine == RestoreState::Resuming),
    ("a device is in RUNNING", |world| out_there(world, State::Running) > 0),
    ("all are in RUNNING", |world| out_there(world, State::Running) > 1),
    ("COMMITTED is on record", |world| world.ghost.verdicts[0].is_some()),
    ("COMMITTED is heard", |world| world.source.machine == SaveState::LettingGo),
    ("LETTING_GO is on record", |world| {
        world.source.machine == SaveState::LettingGo && !world.source.writing
    }),
    ("over", |world| world.source.ended.is_some()),
];

type Fault = fn(&World) -> Vec<Action>;

/// What goes wrong, each in one way or in several.
const FAULTS: [(&str, Fault); 8] = [
    ("source crashes, kept", |_| vec![Action::Source(SourceAction::Crashes(Crash::Kept))]),
    ("source crashes, not kept", |_| vec![Action::Source(SourceAction::Crashes(Crash::NotKept))]),
    ("destination crashes, kept", |_| vec![Action::Destination(DestinationAction::Crashes(Crash::Kept))]),
    ("destination crashes, not kept", |_| {
        vec![Action::Destination(DestinationAction::Crashes(Crash::NotKept))]
    }),
    ("connection lost", |_| {
        vec![
            Action::Source(SourceAction::LosesConnection),
            Action::Destination(DestinationAction::LosesConnection),
        ]
    }),
    ("a SET fails", |world| {
        let failed = |set| world_set(world, set);
        vec![failed(Set::Stays), failed(Set::Errs)]
    }),
    ("the source's deadline", |_| vec![Action::Source(SourceAction::TimeIsUp)]),
    ("the destination's deadline", |_| vec![Action::Destination(DestinationAction::TimeIsUp)]),
];

/// A SET of the device that is next.
fn world_set(world: &World, set: Set) -> Action {
    let target =
        if world.destination.machine == RestoreState::Quiescing { State::RunningP2p } else { State::Running };
    let member = world.there.iter().position(|device| device.state != target).unwrap_or(0);
    Action::Destination(DestinationAction::Sets { member, set })
}

/// For every step and every fault: where the copy is in the end, and how both sides ended.
pub(crate) fn failures() -> String {
    let checked = checked(Commit::Auto);
    let course = course(&checked);
    let mut text = String::from("| at this step |");
    for (name, _) in FAULTS {
        let _ = write!(text, " {name} |");
    }
    let _ = writeln!(text, "\n|{}", "---|".repeat(1 + FAULTS.len()));
    for (step, reached) in STEPS {
        let (_, world) = course.iter().find(|(_, world)| reached(world)).expect("every step is passed");
        let _ = write!(text, "| {step} |");
        for (name, fault) in FAULTS {
            let possible = checked.possible(world);
            let is_lost = name == "connection lost";
            let mut ends = BTreeSet::new();
            for action in fault(world) {
                let next = possible.contains(&action).then(|| checked.does(world, action)).flatten();
                if let Some(next) = next {
                    ends.extend(ends_of(&checked, next, !is_lost));
                }
            }
            let cell = if ends.is_empty() {
                "-".to_owned()
            } else {
                ends.into_iter().collect::<Vec<_>>().join("; or ")
            };
            let _ = write!(text, " {cell} |");
        }
        text.push('\n');
    }
    text
}

/// Every end that the run can come to.
fn ends_of(checked: &HandOver, start: World, stream: bool) -> BTreeSet<String> {
    let (mut met, mut open, mut ends) = (HashSet::from([start]), vec![start], BTreeSet::new());
    while let Some(world) = open.pop() {
        let next = onward(checked, &world, stream);
        if next.is_empty() {
            assert!(is_end(checked, &world), "{world:#?}");
            ends.insert(end_of(&world));
        }
        open.extend(next.into_iter().map(|(_, next)| next).filter(|next| met.insert(*next)));
    }
    ends
}

fn end_of(world: &World) -> String {
    let runs = |devices: &[Device]| devices.iter().any(|device| device.runs_copy());
    let place = match (runs(&world.here), runs(&world.there)) {
        (true, false) => "here",
        (false, true) => "there",
        (false, false) => "nowhere",
        (true, true) => "TWICE",
    };
    let fenced = world.destination.process == Process::Fenced;
    let by = match (world.ghost.resumed_on_word, fenced) {
        (false, _) => "",
        (true, false) => ", on Resolve",
        (true, true) => ", on Resolve, fenced",
    };
    format!("{place} ({}{by})", outcome(world))
}
