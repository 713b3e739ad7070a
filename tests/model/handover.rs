//! The model: every step that a hand-over can take from one state of everything, and what must hold in all of them.
//!
//! ```text
//!   source.rs --.
//!   destination.rs --+--> Action --> World --> Action --> World ...   stateright walks all of it
//!   administrator --'                  `-- oracle.rs: what must hold
//! ```
//! # Invariants
//! - An action that changes nothing is no step: no run goes on by standing still.
//! - Each action is one step of one process, so every other process may be anywhere between two of them. That is what a
//!   process paused at any point amounts to.

use std::ops::Range;

use stateright::{Model, Property};
use vfio_checkpoint_fsm::handover::{ArrivalStep, Evidence, Resolution, Verdict, resolve};
use vfio_checkpoint_fsm::{RestorePlan, SaveEvent, SavePlan, SaveState};

use crate::destination::DestinationAction;
use crate::oracle;
use crate::setup::{Plant, Setup};
use crate::source::SourceAction;
use crate::world::{Device, Process, World};

/// What becomes of the open files of an agent that crashes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Crash {
    /// The holder has them all.
    Kept,
    /// There is no holder: every device is reset.
    NotKept,
    /// The holder has those of the first device alone.
    FirstKept,
}

impl Crash {
    /// The devices that it resets.
    pub(crate) fn resets(self, devices: usize) -> Range<usize> {
        match self {
            Self::Kept => devices..devices,
            Self::NotKept => 0..devices,
            Self::FirstKept => 1..devices,
        }
    }
}

/// One step of anybody.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    Source(SourceAction),
    Destination(DestinationAction),
    /// The administrator makes sure that the destination runs nothing, now and ever.
    Fences,
    /// The administrator decides, as `resolve` lets him.
    Resolves {
        resolution: Resolution,
        stated: bool,
    },
}

/// The model of one setup.
#[derive(Clone, Debug)]
pub(crate) struct HandOver {
    pub(crate) setup: Setup,
    pub(crate) save: SavePlan,
    pub(crate) restore: RestorePlan,
    /// The properties to check; all where there is none.
    pub(crate) only: Option<&'static str>,
}

impl HandOver {
    pub(crate) fn new(setup: Setup) -> Self {
        Self { save: setup.save(), restore: setup.restore(), setup, only: None }
    }

    pub(crate) fn crashes(&self) -> &'static [Crash] {
        if self.setup.devices > 1 {
            &[Crash::Kept, Crash::NotKept, Crash::FirstKept]
        } else {
            &[Crash::Kept, Crash::NotKept]
        }
    }

    /// Whether a message about the attempt `theirs` is one about the attempt `mine`.
    pub(crate) fn is_addressed(&self, mine: u8, theirs: u8) -> bool {
        let same_epoch = self.setup.epoch(mine) == self.setup.epoch(theirs);
        match self.setup.plant {
            Some(Plant::IdentityIgnored) => true,
            Some(Plant::HandoverIgnored) => same_epoch,
            Some(_) | None => mine == theirs && same_epoch,
        }
    }

    fn is_in_doubt(world: &World) -> bool {
        let source = &world.source;
        source.process == Process::Up && source.machine == SaveState::Committing && !source.writing
    }

    fn administrator(&self, world: &World, actions: &mut Vec<Action>) {
        if !self.setup.admin {
            return;
        }
        let in_doubt = Self::is_in_doubt(world);
        let is_fenced = world.destination.process == Process::Fenced;
        if (in_doubt || world.destination.process == Process::Gone) && !is_fenced {
            actions.push(Action::Fences);
        }
        if in_doubt {
            actions.push(Action::Resolves { resolution: Resolution::ResumeHere, stated: is_fenced });
            actions.push(Action::Resolves { resolution: Resolution::LetGo, stated: false });
            actions.push(Action::Resolves { resolution: Resolution::LetGo, stated: true });
        }
    }

    fn fences(&self, world: &mut World) {
        if world.destination.durable == Some(ArrivalStep::Over(Verdict::Committed)) {
            world.ghost.destroyed = true;
        }
        world.there[..self.setup.devices].fill(Device::BLANK);
        world.destination.process = Process::Fenced;
        world.destination.writing = false;
        world.destination.set_failed = false;
    }

    fn resolves(&self, world: &mut World, resolution: Resolution, stated: bool) -> bool {
        let heard = world.source.heard;
        let taken = match resolve(heard, resolution, stated) {
            Err(_) if self.setup.planted(Plant::UnguardedForce) && resolution == Resolution::ResumeHere => {
                Ok(SaveEvent::Refused)
            }
            taken => taken,
        };
        let Ok(event) = taken else { return false };
        match resolution {
            Resolution::ResumeHere => world.ghost.resumed_on_word = true,
            Resolution::LetGo => {
                world.ghost.forgone |= heard != Evidence::Told(Verdict::Committed);
            }
        }
        self.source_event(world, event)
    }

    /// Every action that may change something here.
    pub(crate) fn possible(&self, world: &World) -> Vec<Action> {
        let (mut source, mut destination) = (Vec::with_capacity(16), Vec::with_capacity(16));
        self.source_actions(world, &mut source);
        self.destination_actions(world, &mut destination);
        let mut actions = Vec::with_capacity(source.len() + destination.len() + 4);
        actions.extend(source.into_iter().map(Action::Source));
        actions.extend(destination.into_iter().map(Action::Destination));
        self.administrator(world, &mut actions);
        actions
    }

    pub(crate) fn does(&self, world: &World, action: Action) -> Option<World> {
        let mut next = *world;
        let done = match action {
            Action::Source(action) => self.source_does(&mut next, action),
            Action::Destination(action) => self.destination_does(&mut next, action),
            Action::Fences => {
                self.fences(&mut next);
                true
            }
            Action::Resolves { resolution, stated } => self.resolves(&mut next, resolution, stated),
        };
        (done && next != *world).then_some(next)
    }
}

impl Model for HandOver {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![World::new(&self.setup)]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        actions.extend(self.possible(world));
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        self.does(world, action)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let chosen = oracle::PROPERTIES.iter().filter(|(name, _)| self.only.is_none_or(|only| only == *name));
        chosen.map(|(name, holds)| Property::always(name, *holds)).collect()
    }
}
