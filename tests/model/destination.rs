//! The destination's agent: what it can do next, and what that changes.
//!
//! ```text
//!   RestoreState::on --> Moved { to } --> ArrivalStep::on_move(to) --> write --> the command, device by device
//!                          `-- an end --> ArrivalStep::verdict(end) --> write --> the answer to Commit
//! ```
//! # Invariants
//! - Where it goes is what `RestoreState::on` says, what is written and answered is what `ArrivalStep` says.
//! - No command is executed, and nothing answered, while a write is under way.
//! - Devices are not opened anew while an arrival that lost them has no verdict on record.
//!
//! # Failure paths
//! A SET that failed leaves the device in RESUMING, in ERROR, or where it should be; the devices are read back before
//! anything is reported. A reset that fails leaves the device as it is, so that the oracles see the worst.

use vfio_checkpoint_fsm::handover::{ArrivalEnd, ArrivalStep, ArrivalTakeUp, CommitAnswer, Verdict};
use vfio_checkpoint_fsm::{Outcome, RestoreEvent, RestoreState, State, Step};

use crate::handover::{Crash, HandOver};
use crate::setup::Plant;
use crate::world::{Device, Holds, Process, Word, World, Wrong};

/// How a SET ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Set {
    Done,
    /// It failed, and the device is where it was.
    Stays,
    /// It failed, and the device is in ERROR.
    Errs,
    /// It failed, and the device is where it was sent all the same.
    FailsDone,
}

/// Something that the destination's agent does, or that happens to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum DestinationAction {
    Records,
    WriteFails { durable: bool },
    HearsPrepare(u8),
    SaysAccepted,
    HearsStream(u8),
    HearsState { of: u8, damaged: bool },
    HearsCommit(u8),
    HearsAbandon(u8),
    HearsSettled(u8),
    Enters,
    SaysPrepared,
    Sets { member: usize, set: Set },
    Resets { member: usize },
    ResetFails { member: usize },
    Reports,
    TimeIsUp,
    IsShutDown,
    LosesConnection,
    Crashes(Crash),
    Restarts,
    StaysAway,
}

use DestinationAction as Do;

impl HandOver {
    /// What the destination may do next. An action that turns out to change nothing is dropped by the caller.
    pub(crate) fn destination_actions(&self, world: &World, actions: &mut Vec<DestinationAction>) {
        let destination = &world.destination;
        match destination.process {
            Process::Up => {}
            Process::Down => {
                actions.push(Do::Restarts);
                if self.setup.gone {
                    actions.push(Do::StaysAway);
                }
                return;
            }
            Process::Gone | Process::Fenced => return,
        }
        if world.budget.destination_crashes > 0 && destination.arrival.is_some() {
            actions.extend(self.crashes().iter().map(|crash| Do::Crashes(*crash)));
        }
        if destination.writing {
            actions.push(Do::Records);
            if world.budget.writes > 0 {
                actions.extend([Do::WriteFails { durable: false }, Do::WriteFails { durable: true }]);
            }
            return;
        }
        for of in 0..=world.attempt {
            let heard = [
                (Word::Prepare, Do::HearsPrepare(of)),
                (Word::Opens, Do::HearsStream(of)),
                (Word::State, Do::HearsState { of, damaged: false }),
                (Word::DamagedState, Do::HearsState { of, damaged: true }),
                (Word::Commit, Do::HearsCommit(of)),
                (Word::Abandon, Do::HearsAbandon(of)),
                (Word::Settled, Do::HearsSettled(of)),
            ];
            actions.extend(
                heard.into_iter().filter(|(word, _)| world.is_said(of, *word)).map(|(_, hears)| hears),
            );
        }
        if destination.arrival.is_none() || matches!(destination.believed, ArrivalStep::Over(_)) {
            return;
        }
        actions.extend([Do::TimeIsUp, Do::LosesConnection, Do::Reports, Do::Enters]);
        actions.extend([Do::SaysAccepted, Do::SaysPrepared]);
        if self.setup.cancels {
            actions.push(Do::IsShutDown);
        }
        if let Some(member) = self.next_to_run(world) {
            actions.push(Do::Sets { member, set: Set::Done });
            if world.budget.destination_sets > 0 {
                let failed = [Set::Stays, Set::Errs, Set::FailsDone];
                actions.extend(failed.map(|set| Do::Sets { member, set }));
            }
        }
        if let Some(member) = self.next_to_reset(world) {
            actions.push(Do::Resets { member });
            if world.budget.destination_sets > 0 {
                actions.push(Do::ResetFails { member });
            }
        }
    }

    /// Does it, and says whether that was possible.
    pub(crate) fn destination_does(&self, world: &mut World, action: DestinationAction) -> bool {
        match action {
            Do::Records => {
                world.destination.writing = false;
                Self::destination_durable(world);
                true
            }
            Do::WriteFails { durable } => {
                world.budget.writes -= 1;
                if durable {
                    Self::destination_durable(world);
                }
                let moved = self.destination_event(world, RestoreEvent::Failed);
                let is_end = matches!(world.destination.believed, ArrivalStep::Over(_));
                if !moved && !is_end && self.setup.planted(Plant::GoesOnUnrecorded) {
                    world.destination.writing = false;
                }
                true
            }
            Do::HearsPrepare(of) => self.hears_prepare(world, of),
            Do::SaysAccepted => {
                let is_admitted = world.destination.machine == RestoreState::Admitted;
                let Some(of) = world.destination.arrival.filter(|_| is_admitted) else { return false };
                world.said(of).say(Word::Accepted);
                true
            }
            Do::HearsStream(of) => self.hears_stream(world, of),
            Do::HearsState { of, damaged } => self.hears_state(world, of, damaged),
            Do::HearsCommit(of) => self.hears_commit(world, of),
            Do::HearsAbandon(of) => self.heard_by_destination(world, of, |checked, world| {
                checked.destination_event(world, RestoreEvent::Cancel)
            }),
            Do::HearsSettled(of) => Self::forgets(world, of),
            Do::Enters => {
                if world.destination.machine != RestoreState::Entering {
                    return false;
                }
                let entered = Device { state: State::Resuming, ..Device::BLANK };
                world.there[..self.setup.devices].fill(entered);
                self.destination_event(world, RestoreEvent::AllEntered)
            }
            Do::SaysPrepared => {
                let is_held = matches!(world.destination.machine, RestoreState::Held { .. })
                    && world.destination.streams;
                let Some(of) = world.destination.arrival.filter(|_| is_held) else { return false };
                world.said(of).say(Word::Prepared);
                true
            }
            Do::Sets { member, set } => Self::sets_there(world, member, set),
            Do::Resets { member } => {
                world.there[member] = Device::BLANK;
                true
            }
            Do::ResetFails { member } => {
                world.budget.destination_sets -= 1;
                world.there[member].quarantined = true;
                true
            }
            Do::Reports => self.destination_reports(world),
            Do::TimeIsUp => self.destination_time_is_up(world),
            Do::IsShutDown => self.destination_event(world, RestoreEvent::Cancel),
            Do::LosesConnection => {
                world.destination.machine == RestoreState::Loading
                    && self.destination_event(world, RestoreEvent::Failed)
            }
            Do::Crashes(crash) => {
                world.budget.destination_crashes -= 1;
                self.destination_crashes(world, crash);
                true
            }
            Do::Restarts => {
                self.destination_restarts(world);
                true
            }
            Do::StaysAway => {
                world.destination.process = Process::Gone;
                true
            }
        }
    }

    pub(crate) fn destination_event(&self, world: &mut World, event: RestoreEvent) -> bool {
        let Step::Moved { to, .. } = world.destination.machine.on(self.restore, event) else {
            return false;
        };
        world.destination.machine = to;
        if let Some(step) = world.destination.believed.on_move(to) {
            world.destination.believed = step;
            let late = self.setup.planted(Plant::RecordsAfterSet) && step == ArrivalStep::Committing;
            world.destination.writing = !late;
        }
        let is_kept = world.destination.kept;
        match to {
            RestoreState::Completed => self.decide(world, ArrivalEnd::AllRunning),
            RestoreState::Aborted { .. } if is_kept => self.decide(world, ArrivalEnd::AllReset),
            RestoreState::Aborted { .. } => self.decide(world, ArrivalEnd::NotKept),
            RestoreState::Quarantined => {
                world.there[..self.setup.devices].iter_mut().for_each(|device| device.quarantined = true);
                self.decide(world, ArrivalEnd::Quarantined);
            }
            RestoreState::Admitted
            | RestoreState::Entering
            | RestoreState::Loading
            | RestoreState::Verifying
            | RestoreState::FixingUp
            | RestoreState::Held { .. }
            | RestoreState::AwaitingReady
            | RestoreState::Quiescing
            | RestoreState::Resuming
            | RestoreState::PartlyRunning
            | RestoreState::Unwinding
            | RestoreState::Resetting => {}
        }
        true
    }

    fn decide(&self, world: &mut World, end: ArrivalEnd) {
        let verdict = world.destination.believed.verdict(end);
        self.write_verdict(world, verdict);
    }

    pub(crate) fn write_verdict(&self, world: &mut World, verdict: Verdict) {
        let devices = &world.there[..self.setup.devices];
        let all_run = devices
            .iter()
            .all(|device| device.state == State::Running && matches!(device.holds, Holds::Copy(_)));
        if verdict == Verdict::Committed && !all_run {
            world.wrong(Wrong::FalseReport);
        }
        world.destination.believed = ArrivalStep::Over(verdict);
        world.destination.writing = true;
    }

    fn destination_durable(world: &mut World) {
        world.destination.durable = Some(world.destination.believed);
        let at = usize::from(world.destination.arrival.unwrap_or(0));
        match world.destination.believed {
            ArrivalStep::Prepared => world.ghost.prepared[at] = true,
            ArrivalStep::Over(verdict) => {
                if world.ghost.verdicts[at].is_some_and(|before| before != verdict) {
                    world.wrong(Wrong::SecondVerdict);
                }
                world.ghost.verdicts[at] = Some(verdict);
                if verdict == Verdict::Committed {
                    // What a crash took is no matter any more: the logical device lives here.
                    world.ghost.destroyed = false;
                }
            }
            ArrivalStep::Committing => world.destination.newest = world.destination.arrival,
            ArrivalStep::Loading | ArrivalStep::Reverting => {}
        }
    }

    /// The source will not ask again.
    fn forgets(world: &mut World, of: u8) -> bool {
        let destination = &mut world.destination;
        let is_last = destination.arrival == Some(of);
        if is_last && matches!(destination.durable, Some(ArrivalStep::Over(_))) {
            (destination.arrival, destination.durable) = (None, None);
            destination.believed = ArrivalStep::Loading;
            true
        } else if !is_last && destination.arrival > Some(of) {
            destination.before = None;
            true
        } else {
            false
        }
    }

    fn hears_prepare(&self, world: &mut World, of: u8) -> bool {
        let devices = &world.there[..self.setup.devices];
        let before = match (world.destination.arrival, world.destination.durable) {
            (None, _) => None,
            (Some(last), Some(ArrivalStep::Over(verdict))) if last < of => Some(verdict),
            (Some(_), _) => return false,
        };
        let is_used = world.destination.used[usize::from(of)] && !self.setup.planted(Plant::TicketTwice);
        let is_stale = world.destination.newest > Some(of) && !self.setup.planted(Plant::OldTicket);
        if is_used || is_stale || devices.iter().any(|device| device.quarantined) {
            return false;
        }
        world.destination = crate::world::Destination {
            arrival: Some(of),
            machine: RestoreState::Admitted,
            believed: ArrivalStep::Loading,
            durable: None,
            kept: true,
            armed: true,
            streams: false,
            before,
            ..world.destination
        };
        world.destination.writing = true;
        world.destination.used[usize::from(of)] = true;
        if world.destination.newest > Some(of) {
            world.wrong(Wrong::StaleMessage);
        }
        true
    }

    /// Nothing is touched before the stream is open.
    fn hears_stream(&self, world: &mut World, of: u8) -> bool {
        if world.destination.machine != RestoreState::Admitted {
            return false;
        }
        self.heard_by_destination(world, of, |checked, world| {
            world.destination.streams = true;
            checked.destination_event(world, RestoreEvent::Start)
        })
    }

    fn heard_by_destination(
        &self,
        world: &mut World,
        of: u8,
        act: impl FnOnce(&Self, &mut World) -> bool,
    ) -> bool {
        let Some(arrival) = world.destination.arrival else { return false };
        if !self.is_addressed(arrival, of) {
            return false;
        }
        let acted = act(self, world);
        if acted && of != arrival {
            world.wrong(Wrong::StaleMessage);
        }
        acted
    }

    fn hears_state(&self, world: &mut World, of: u8, damaged: bool) -> bool {
        if world.destination.machine != RestoreState::Loading {
            return false;
        }
        self.heard_by_destination(world, of, |checked, world| {
            let copy = world.said(of).copy;
            let holds = if damaged { Holds::Damaged } else { Holds::Copy(copy) };
            world.there[..checked.setup.devices].iter_mut().for_each(|device| device.holds = holds);
            checked.destination_event(world, RestoreEvent::AllLoaded);
            if damaged {
                return checked.destination_event(world, RestoreEvent::Failed);
            }
            checked.destination_event(world, RestoreEvent::SealVerified);
            checked.destination_event(world, RestoreEvent::FixedUp)
        })
    }

    fn hears_commit(&self, world: &mut World, of: u8) -> bool {
        let destination = world.destination;
        let is_present = destination.arrival.is_some_and(|arrival| self.is_addressed(arrival, of));
        if !is_present {
            let told = match destination.before {
                Some(verdict) if destination.arrival > Some(of) => Word::told(verdict),
                Some(_) | None
                    if destination.arrival.is_none() && self.setup.planted(Plant::RefusesFromNothing) =>
                {
                    Word::Refused
                }
                Some(_) | None => return false,
            };
            world.said(of).say(told);
            return true;
        }
        if self.setup.planted(Plant::RunsUnprepared) && destination.machine == RestoreState::Loading
            || self.setup.planted(Plant::ForgetsRefusal)
                && destination.believed == ArrivalStep::Over(Verdict::Refused)
        {
            world.destination.machine = RestoreState::Resuming;
            world.destination.believed = ArrivalStep::Committing;
            world.destination.writing = true;
            return true;
        }
        match destination.believed.on_commit() {
            CommitAnswer::NotPrepared => world.said(of).say(Word::NotPrepared),
            CommitAnswer::Wait => return false,
            CommitAnswer::Told(verdict) => world.said(of).say(Word::told(verdict)),
            CommitAnswer::Run => {
                return self.heard_by_destination(world, of, |checked, world| {
                    checked.destination_event(world, RestoreEvent::Resume)
                        && checked.destination_event(world, RestoreEvent::Ready)
                });
            }
        }
        true
    }

    fn destination_time_is_up(&self, world: &mut World) -> bool {
        let running = Self::target(world).is_some();
        if self.setup.planted(Plant::RefusesAfterCommitting) && running {
            world.destination.machine = RestoreState::Aborted { outcome: Outcome::StateLost };
            self.write_verdict(world, Verdict::Refused);
            return true;
        }
        if world.destination.machine == RestoreState::Admitted {
            // Nobody has opened the stream.
            return self.destination_event(world, RestoreEvent::Cancel);
        }
        world.destination.armed && self.destination_event(world, RestoreEvent::HoldExpired)
    }

    /// What goes with the process, and with the files that nobody holds any more.
    fn destination_crashes(&self, world: &mut World, crash: Crash) {
        if crash != Crash::Kept && world.destination.durable == Some(ArrivalStep::Over(Verdict::Committed)) {
            world.ghost.destroyed = true;
        }
        world.there[crash.resets(self.setup.devices)].fill(Device::BLANK);
        let destination = &mut world.destination;
        if destination.durable.is_none() {
            // Not on record, so nothing was touched. The one before is what the journal ends with.
            destination.arrival = destination.before.and(destination.arrival).map(|arrival| arrival - 1);
            destination.durable = destination.before.take().map(ArrivalStep::Over);
        }
        destination.process = Process::Down;
        destination.machine = RestoreState::Admitted;
        destination.believed = destination.durable.unwrap_or(ArrivalStep::Loading);
        destination.writing = false;
        destination.set_failed = false;
        destination.streams = false;
        destination.kept &= crash == Crash::Kept;
    }

    fn destination_restarts(&self, world: &mut World) {
        world.destination.process = Process::Up;
        let Some(step) = world.destination.durable else { return };
        if let (ArrivalStep::Over(_), true) = (step, self.setup.planted(Plant::RefusesFromNothing)) {
            (world.destination.arrival, world.destination.durable) = (None, None);
            return;
        }
        match step.after_crash(world.destination.kept) {
            ArrivalTakeUp::Reset => world.destination.machine = RestoreState::Resetting,
            ArrivalTakeUp::Wait => {
                world.destination.machine = RestoreState::Held { ready: false };
                world.destination.armed = !self.setup.planted(Plant::NoDeadlineAfterCrash);
                let mut devices = world.there[..self.setup.devices].iter();
                // Not where the journal says: what it was loaded with is gone.
                if devices.any(|device| device.state != State::Resuming) {
                    self.destination_event(world, RestoreEvent::Failed);
                }
            }
            ArrivalTakeUp::GoOn => {
                let devices = &world.there[..self.setup.devices];
                let is_first = self.restore.barrier
                    && devices.iter().any(|device| device.state == State::Resuming)
                    && devices.iter().all(|device| device.state != State::Running);
                world.destination.machine =
                    if is_first { RestoreState::Quiescing } else { RestoreState::Resuming };
            }
            ArrivalTakeUp::Ended(verdict) => {
                if let ArrivalStep::Over(_) = step {
                    return;
                }
                if world.there[..self.setup.devices].iter().all(|device| *device == Device::BLANK) {
                    self.write_verdict(world, verdict);
                } else {
                    // Some were kept. They are reset by closing them, and what is on record stays until they are.
                    world.destination.machine = RestoreState::Resetting;
                }
                world.destination.kept = self.setup.planted(Plant::OpensBeforeVerdict);
            }
        }
    }
}
