//! Every run ends: a walk over the whole graph of states, beside the one that checks what must hold.
//!
//! ```text
//!   1. no run goes round: the graph has no cycle, whichever steps are taken, faults included
//!   2. no run stops half-way: a state in which no fair step is left is an end on both sides
//! ```
//! Together they say more than fairness needs: a run has finitely many steps, and as long as it has not ended one of the
//! steps that must come is left. The checker's own `eventually` is not used: it takes a state that it met on another
//! path for one whose promise was kept there.
//!
//! # What is fair
//! Writes succeed in the end, commands go on, an agent comes back after a crash, timers fire, Commit and its answers get
//! through, an administrator fences a destination that is gone for good or broken, and resumes where that is allowed. No
//! other message ever has to get through, and no caller ever has to say anything.

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap};

use vfio_checkpoint_fsm::State;
use vfio_checkpoint_fsm::handover::{ArrivalStep, Evidence, Resolution, Verdict};

use crate::destination::{DestinationAction, Set};
use crate::handover::{Action, HandOver};
use crate::source::SourceAction;
use crate::world::{Device, Process, World};

/// What the walk saw.
pub(crate) struct Seen {
    pub(crate) states: usize,
    /// States without a fair step left.
    pub(crate) ends: usize,
    /// How both sides ended in them, by the first attempt.
    pub(crate) outcomes: BTreeSet<String>,
}

/// Why not every run ends.
#[derive(Debug)]
pub(crate) enum Endless {
    /// A run comes back to where it was.
    Cycle(Vec<Action>),
    /// Nothing that must happen is left, and it is no end.
    Stuck(Vec<Action>, Box<World>),
}

/// Whether the step comes in the end, as long as it is possible.
pub(crate) fn is_fair(checked: &HandOver, world: &World, action: Action) -> bool {
    match action {
        Action::Source(action) => match action {
            SourceAction::Records
            | SourceAction::Saves
            | SourceAction::SendsCommit
            | SourceAction::HearsAnswer(..)
            | SourceAction::Sets { .. }
            | SourceAction::Reports
            | SourceAction::TimeIsUp
            | SourceAction::LosesConnection
            | SourceAction::Restarts => true,
            SourceAction::CommitIsDue => !checked.is_manual(),
            SourceAction::WriteFails { .. }
            | SourceAction::AsksPrepare
            | SourceAction::HearsAccepted(_)
            | SourceAction::HearsPrepared(_)
            | SourceAction::SendsState { .. }
            | SourceAction::Abandons
            | SourceAction::Settles
            | SourceAction::SetFails { .. }
            | SourceAction::IsCancelled
            | SourceAction::Crashes(_)
            | SourceAction::MigratesAgain => false,
        },
        Action::Destination(action) => match action {
            DestinationAction::Records
            | DestinationAction::HearsCommit(_)
            | DestinationAction::Enters
            | DestinationAction::Sets { set: Set::Done, .. }
            | DestinationAction::Resets { .. }
            | DestinationAction::Reports
            | DestinationAction::TimeIsUp
            | DestinationAction::LosesConnection
            | DestinationAction::Restarts => true,
            DestinationAction::WriteFails { .. }
            | DestinationAction::HearsPrepare(_)
            | DestinationAction::SaysAccepted
            | DestinationAction::HearsStream(_)
            | DestinationAction::HearsState { .. }
            | DestinationAction::HearsAbandon(_)
            | DestinationAction::HearsSettled(_)
            | DestinationAction::SaysPrepared
            | DestinationAction::Sets { set: Set::Stays | Set::Errs | Set::FailsDone, .. }
            | DestinationAction::ResetFails { .. }
            | DestinationAction::IsShutDown
            | DestinationAction::Crashes(_)
            | DestinationAction::StaysAway => false,
        },
        Action::Fences => {
            world.destination.process == Process::Gone
                || world.source.heard == Evidence::Told(Verdict::Broken)
        }
        Action::Resolves { resolution, .. } => resolution == Resolution::ResumeHere,
    }
}

/// Whether both sides have come to an end that has a name, and no device stands still that is not quarantined.
pub(crate) fn is_end(checked: &HandOver, world: &World) -> bool {
    let at_rest = |devices: &[Device]| {
        devices[..checked.setup.devices]
            .iter()
            .all(|device| device.quarantined || device.state == State::Running)
    };
    let destination = &world.destination;
    let over = destination.arrival.is_none() || matches!(destination.durable, Some(ArrivalStep::Over(_)));
    world.source.ended.is_some()
        && at_rest(&world.here)
        && (destination.process == Process::Fenced || over && at_rest(&world.there))
}

/// The end of the source, and the verdict of the destination, of the first attempt.
pub(crate) fn outcome(world: &World) -> String {
    let end = world.ghost.ends[0].map_or("nothing", vfio_checkpoint_fsm::SaveState::name);
    format!("{end}, {}", world.ghost.verdicts[0].map_or("nothing", Verdict::name))
}

/// Walks every state, in depth, and looks for a cycle and for a state without a way on.
pub(crate) fn every_run_ends(checked: &HandOver) -> Result<Seen, Endless> {
    struct Open {
        world: World,
        actions: Vec<Action>,
        /// The step that is being looked at.
        last: Option<Action>,
        fair: bool,
    }
    let open = |world: World| Open { actions: checked.possible(&world), world, last: None, fair: false };
    // True while the state is on the path.
    let mut met: HashMap<World, bool> = HashMap::new();
    let start = World::new(&checked.setup);
    met.insert(start, true);
    let mut path = vec![open(start)];
    let (mut ends, mut outcomes) = (0, BTreeSet::new());
    while let Some(top) = path.last_mut() {
        let Some(action) = top.actions.pop() else {
            let (world, fair) = (top.world, top.fair);
            if !fair && !is_end(checked, &world) {
                let way = path.iter().filter_map(|open| open.last).collect();
                return Err(Endless::Stuck(way, Box::new(world)));
            }
            if !fair {
                ends += 1;
                outcomes.insert(outcome(&world));
            }
            met.insert(world, false);
            path.pop();
            if let Some(below) = path.last_mut() {
                below.last = None;
            }
            continue;
        };
        let Some(next) = checked.does(&top.world, action) else { continue };
        top.fair = top.fair || is_fair(checked, &top.world, action);
        match met.entry(next) {
            Entry::Occupied(on_path) => {
                if *on_path.get() {
                    top.last = Some(action);
                    return Err(Endless::Cycle(path.iter().filter_map(|open| open.last).collect()));
                }
            }
            Entry::Vacant(new) => {
                new.insert(true);
                top.last = Some(action);
                path.push(open(next));
            }
        }
    }
    Ok(Seen { states: met.len(), ends, outcomes })
}
