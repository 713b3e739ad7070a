//! The devices of the destination: which one a command moves next, how that ends, and what is reported then.
//!
//! ```text
//!   EnterP2p, Resume, FinishResume --> SET --> done | stays | ERROR | done, though it failed --> read all back, report
//!   ResetAll -----------------------> reset -> done | stays, quarantined --------------------> report
//! ```
//! # Invariants
//! A device found in RUNNING is reported before a failure is. That order decides between a reset and a quarantine.
//!
//! # Failure paths
//! After a SET that failed no other is made: the devices are read back first.

use vfio_checkpoint_fsm::handover::Verdict;
use vfio_checkpoint_fsm::{RestoreEvent, RestoreState, State};

use crate::destination::Set;
use crate::handover::HandOver;
use crate::setup::Plant;
use crate::world::{Device, Holds, World, Wrong};

impl HandOver {
    /// The device that the command at hand has to run next.
    pub(crate) fn next_to_run(&self, world: &World) -> Option<usize> {
        let target = Self::target(world)?;
        let devices = &world.there[..self.setup.devices];
        let next = devices.iter().position(|device| device.state != target && device.state != State::Running);
        next.filter(|member| !world.destination.set_failed && world.there[*member].state != State::Error)
    }

    pub(crate) fn target(world: &World) -> Option<State> {
        match world.destination.machine {
            RestoreState::Quiescing => Some(State::RunningP2p),
            RestoreState::Resuming | RestoreState::PartlyRunning => Some(State::Running),
            RestoreState::Admitted
            | RestoreState::Entering
            | RestoreState::Loading
            | RestoreState::Verifying
            | RestoreState::FixingUp
            | RestoreState::Held { .. }
            | RestoreState::AwaitingReady
            | RestoreState::Unwinding
            | RestoreState::Resetting
            | RestoreState::Completed
            | RestoreState::Aborted { .. }
            | RestoreState::Quarantined => None,
        }
    }

    pub(crate) fn next_to_reset(&self, world: &World) -> Option<usize> {
        let devices = &world.there[..self.setup.devices];
        let next = devices.iter().position(|device| !device.quarantined && *device != Device::BLANK);
        next.filter(|_| world.destination.machine == RestoreState::Resetting)
    }

    pub(crate) fn sets_there(world: &mut World, member: usize, set: Set) -> bool {
        let Some(target) = Self::target(world) else { return false };
        if set != Set::Done {
            world.budget.destination_sets -= 1;
            world.destination.set_failed = true;
        }
        let device = &mut world.there[member];
        let was_resuming = device.state == State::Resuming;
        match set {
            Set::Done | Set::FailsDone => device.state = target,
            Set::Stays => {}
            Set::Errs => (device.state, device.holds) = (State::Error, Holds::Nothing),
        }
        let device = *device;
        if !device.state.is_running() {
            return true;
        }
        if was_resuming {
            match device.holds {
                Holds::Copy(copy) if copy == world.ghost.resumed => {}
                Holds::Copy(_) => world.wrong(Wrong::StaleCopy),
                Holds::Nothing | Holds::Damaged => world.wrong(Wrong::Unverified),
            }
        }
        if device.state == State::Running {
            let at = usize::from(world.destination.arrival.unwrap_or(0));
            world.ghost.ran[at] = true;
        }
        true
    }

    pub(crate) fn destination_reports(&self, world: &mut World) -> bool {
        let devices = &world.there[..self.setup.devices];
        let failed = world.destination.set_failed;
        let running = devices.iter().filter(|device| device.state == State::Running).count();
        let all_run = running == devices.len();
        let all_out = devices.iter().all(|device| device.state.is_running());
        let event = match world.destination.machine {
            RestoreState::Quiescing if all_out && !failed => RestoreEvent::AllQuiesced,
            RestoreState::Resuming | RestoreState::PartlyRunning if all_run => RestoreEvent::AllRunning,
            // Before any failure: that order decides between a reset and a quarantine.
            RestoreState::Resuming if running > 0 => {
                if self.setup.planted(Plant::CommitsPart) {
                    world.destination.machine = RestoreState::Completed;
                    self.write_verdict(world, Verdict::Committed);
                    return true;
                }
                return self.destination_event(world, RestoreEvent::AnyRunning);
            }
            RestoreState::Quiescing | RestoreState::Resuming | RestoreState::PartlyRunning => {
                // A device that a crash left in ERROR is a failure as well.
                let stuck = devices.iter().any(|device| device.state == State::Error);
                if !failed && !stuck {
                    return false;
                }
                RestoreEvent::Failed
            }
            RestoreState::Resetting if self.next_to_reset(world).is_some() => return false,
            RestoreState::Resetting if devices.iter().any(|device| device.quarantined) => {
                RestoreEvent::Unrecoverable
            }
            RestoreState::Resetting => RestoreEvent::AllReset,
            // The devices were not touched yet.
            RestoreState::Unwinding => RestoreEvent::Recovered,
            RestoreState::Admitted
            | RestoreState::Entering
            | RestoreState::Loading
            | RestoreState::Verifying
            | RestoreState::FixingUp
            | RestoreState::Held { .. }
            | RestoreState::AwaitingReady
            | RestoreState::Completed
            | RestoreState::Aborted { .. }
            | RestoreState::Quarantined => return false,
        };
        world.destination.set_failed = false;
        self.destination_event(world, event)
    }
}
