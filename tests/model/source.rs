//! The source's agent: what it can do next, and what that changes.
//!
//! ```text
//!   SaveState::on --> Moved { to } --> OfferStep::on_move(to) --> write --> the command, device by device --> report
//!                                                                  `-- failed --> SaveEvent::Failed
//! ```
//! # Invariants
//! - Where it goes is what `SaveState::on` says, and what is written is what `OfferStep::on_move` says.
//! - No command is executed while a write is under way.
//!
//! # Failure paths
//! A write that failed may be durable. It counts as made, and where the failure moves nothing it is made again.

use vfio_checkpoint_fsm::handover::{Evidence, OfferStep, OfferTakeUp, Verdict};
use vfio_checkpoint_fsm::{Fate, Outcome, Recovery, Role, SaveEvent, SaveState, State, Step, recover};

use crate::handover::{Crash, HandOver};
use crate::setup::{Commit, Plant, Second};
use crate::world::{Device, Holds, Process, Source, Word, World, Wrong};

/// Something that the source's agent does, or that happens to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum SourceAction {
    Records,
    WriteFails { durable: bool },
    AsksPrepare,
    HearsAccepted(u8),
    HearsPrepared(u8),
    HearsAnswer(u8, Word),
    Saves,
    SendsState { damaged: bool },
    CommitIsDue,
    SendsCommit,
    Abandons,
    Settles,
    Sets { member: usize },
    SetFails { member: usize },
    Reports,
    TimeIsUp,
    IsCancelled,
    LosesConnection,
    Crashes(Crash),
    Restarts,
    MigratesAgain,
}

use SourceAction as Do;

impl HandOver {
    /// What the source may do next. An action that turns out to change nothing is dropped by the caller.
    pub(crate) fn source_actions(&self, world: &World, actions: &mut Vec<SourceAction>) {
        let source = &world.source;
        match source.process {
            Process::Up => {}
            Process::Down => return actions.push(Do::Restarts),
            Process::Gone | Process::Fenced => return,
        }
        if let Some(end) = source.ended {
            actions.push(Do::Settles);
            let is_called_off = matches!(end, SaveState::Aborted { .. } | SaveState::Lost { .. });
            if is_called_off || self.setup.planted(Plant::CallsOffWhatIsLetGo) {
                actions.push(Do::Abandons);
            }
            if end == SaveState::HandedOver {
                // An administrator may have let go of it before this was sent.
                actions.push(Do::SendsCommit);
            }
            let again = self.setup.second != Second::None && world.attempt == 0;
            if again && matches!(end, SaveState::Aborted { .. }) {
                actions.push(Do::MigratesAgain);
            }
            return;
        }
        if world.budget.source_crashes > 0 {
            actions.extend(self.crashes().iter().map(|crash| Do::Crashes(*crash)));
        }
        if source.writing {
            actions.push(Do::Records);
            if world.budget.writes > 0 && !source.machine.is_terminal() {
                actions.extend([Do::WriteFails { durable: false }, Do::WriteFails { durable: true }]);
            }
            return;
        }
        self.commands(world, actions);
        actions.extend([Do::TimeIsUp, Do::LosesConnection]);
        if self.setup.cancels {
            actions.push(Do::IsCancelled);
        }
        for attempt in 0..=world.attempt {
            if world.is_said(attempt, Word::Accepted) {
                actions.push(Do::HearsAccepted(attempt));
            }
            if world.is_said(attempt, Word::Prepared) {
                actions.push(Do::HearsPrepared(attempt));
            }
            let answers = Word::ANSWERS.into_iter().filter(|answer| world.is_said(attempt, *answer));
            actions.extend(answers.map(|answer| Do::HearsAnswer(attempt, answer)));
        }
    }

    fn commands(&self, world: &World, actions: &mut Vec<SourceAction>) {
        match world.source.machine {
            SaveState::Admitted => actions.push(Do::AsksPrepare),
            SaveState::PreCopying
            | SaveState::Quiescing
            | SaveState::Stopping
            | SaveState::Draining
            | SaveState::Parking => actions.push(Do::Saves),
            SaveState::Sealing => {
                actions.push(Do::SendsState { damaged: false });
                if world.budget.damaged > 0 {
                    actions.push(Do::SendsState { damaged: true });
                }
                if self.setup.planted(Plant::CommitsBeforePrepared)
                    || self.setup.planted(Plant::RunsUnprepared)
                {
                    actions.push(Do::Reports);
                }
            }
            SaveState::Offered => actions.push(Do::CommitIsDue),
            SaveState::Committing => actions.push(Do::SendsCommit),
            SaveState::LettingGo | SaveState::Unwinding { .. } => {
                match self.next_set(world) {
                    Some(member) => {
                        actions.push(Do::Sets { member });
                        if world.budget.source_sets > 0 {
                            actions.push(Do::SetFails { member });
                        }
                    }
                    None => actions.push(Do::Reports),
                }
                if world.source.machine != SaveState::LettingGo {
                    actions.push(Do::Abandons);
                }
            }
            SaveState::AwaitingCutover
            | SaveState::Held
            | SaveState::Marking
            | SaveState::Resuming { .. }
            | SaveState::Completed
            | SaveState::CompletedStopped
            | SaveState::Inconsistent
            | SaveState::HandedOver
            | SaveState::Aborted { .. }
            | SaveState::Lost { .. } => {}
        }
    }

    /// The device that the command at hand has to move next. All are quiesced before any runs freely.
    fn next_set(&self, world: &World) -> Option<usize> {
        let devices = &world.here[..self.setup.devices];
        if world.source.machine == SaveState::LettingGo {
            return devices.iter().position(|device| !device.quarantined && *device != Device::BLANK);
        }
        let open = |device: &Device| !device.quarantined && device.state != State::Running;
        devices
            .iter()
            .position(|device| open(device) && !device.state.is_running())
            .or_else(|| devices.iter().position(open))
    }

    /// Does it, and says whether that was possible.
    pub(crate) fn source_does(&self, world: &mut World, action: SourceAction) -> bool {
        let attempt = world.attempt;
        match action {
            Do::Records => self.source_records(world),
            Do::WriteFails { durable } => self.source_write_fails(world, durable),
            Do::AsksPrepare => {
                world.said(attempt).say(Word::Prepare);
                true
            }
            Do::HearsAccepted(of) => {
                let begins =
                    world.source.machine == SaveState::Admitted && self.hears(world, of, SaveEvent::Start);
                if begins {
                    world.said(attempt).say(Word::Opens);
                }
                begins
            }
            Do::HearsPrepared(of) => {
                world.source.machine == SaveState::Sealing && self.hears(world, of, SaveEvent::Sealed)
            }
            Do::HearsAnswer(of, answer) => self.hears_answer(world, of, answer),
            Do::Saves => self.saves(world),
            Do::SendsState { damaged } => {
                let state = if damaged { Word::DamagedState } else { Word::State };
                if damaged && !world.is_said(attempt, state) {
                    world.budget.damaged -= 1;
                }
                if let Holds::Copy(copy) = world.here[0].holds {
                    world.said(attempt).copy = copy;
                }
                world.said(attempt).say(state);
                true
            }
            Do::CommitIsDue => self.source_event(world, SaveEvent::CommitDue),
            Do::SendsCommit => {
                let crashed = world.budget.source_crashes < self.setup.budget.source_crashes;
                if self.setup.planted(Plant::AsksOnce) && crashed {
                    return false;
                }
                let moved = world.here.iter().any(|device| device.runs_copy());
                let withdraws = moved && self.setup.planted(Plant::JudgesByDevices);
                world.said(attempt).say(if withdraws { Word::Abandon } else { Word::Commit });
                if self.setup.planted(Plant::LetsGoOnSent) {
                    self.source_event(world, SaveEvent::Committed);
                }
                true
            }
            Do::Abandons => {
                world.said(attempt).say(Word::Abandon);
                true
            }
            Do::Settles => {
                world.said(attempt).say(Word::Settled);
                true
            }
            Do::Sets { member } => {
                self.sets_here(world, member);
                true
            }
            Do::SetFails { member } => {
                world.budget.source_sets -= 1;
                world.here[member].quarantined = true;
                true
            }
            Do::Reports => self.source_reports(world),
            Do::TimeIsUp => {
                if self.setup.planted(Plant::ResumesOnSilence)
                    && world.source.machine == SaveState::Committing
                {
                    return self.source_event(world, SaveEvent::Refused);
                }
                self.source_event(world, SaveEvent::HoldExpired)
            }
            Do::IsCancelled => self.source_event(world, SaveEvent::Cancel),
            Do::LosesConnection => {
                matches!(
                    world.source.machine,
                    SaveState::Admitted | SaveState::PreCopying | SaveState::Draining | SaveState::Sealing
                ) && self.source_event(world, SaveEvent::Failed)
            }
            Do::Crashes(crash) => {
                self.source_crashes(world, crash);
                true
            }
            Do::Restarts => {
                Self::source_restarts(world);
                true
            }
            Do::MigratesAgain => {
                world.source = Source::BEGUN;
                world.attempt += 1;
                true
            }
        }
    }

    pub(crate) fn source_event(&self, world: &mut World, event: SaveEvent) -> bool {
        match world.source.machine.on(self.save, event) {
            Step::Moved { to, .. } => {
                world.source.machine = to;
                if let Some(step) = world.source.believed.on_move(to) {
                    world.source.believed = step;
                    world.source.writing = true;
                }
                if to.is_terminal() {
                    world.source.writing = true;
                }
                true
            }
            Step::NoOp(_) | Step::Illegal { .. } => false,
        }
    }

    fn hears(&self, world: &mut World, of: u8, event: SaveEvent) -> bool {
        if !self.is_addressed(world.attempt, of) {
            return false;
        }
        let moved = self.source_event(world, event);
        if moved && of != world.attempt {
            world.wrong(Wrong::StaleMessage);
        }
        moved
    }

    fn hears_answer(&self, world: &mut World, of: u8, answer: Word) -> bool {
        if world.source.machine != SaveState::Committing || !self.is_addressed(world.attempt, of) {
            return false;
        }
        // A verdict stays; an answer from before it may still come in.
        if !matches!(world.source.heard, Evidence::Told(_)) {
            world.source.heard = answer.evidence();
        }
        let event = match answer.evidence() {
            Evidence::Told(Verdict::Lost) if self.setup.planted(Plant::LostIsRefused) => {
                Some(SaveEvent::Refused)
            }
            Evidence::Told(verdict) => verdict.event(),
            Evidence::Nothing | Evidence::Undecided => None,
        };
        if let Some(event) = event {
            self.hears(world, of, event);
        }
        true
    }

    fn source_write_fails(&self, world: &mut World, durable: bool) -> bool {
        world.budget.writes -= 1;
        if durable {
            world.source.durable = world.source.believed;
        }
        if self.setup.planted(Plant::FailedWriteNotMade) || self.setup.planted(Plant::JudgesByDevices) {
            world.source.believed = OfferStep::Begun;
            world.source.writing = false;
        }
        let moved = self.source_event(world, SaveEvent::Failed);
        if !moved && self.setup.planted(Plant::GoesOnUnrecorded) {
            world.source.writing = false;
        }
        true
    }

    fn source_records(&self, world: &mut World) -> bool {
        world.source.writing = false;
        if !world.source.machine.is_terminal() {
            world.source.durable = world.source.believed;
            return true;
        }
        let end = world.source.machine;
        let at = usize::from(world.attempt);
        let mut devices = world.here[..self.setup.devices].iter();
        let is_so = if end == SaveState::HandedOver {
            let gone = devices.all(|device| device.quarantined || device.holds == Holds::Nothing);
            let runs = world.ghost.verdicts[at] == Some(Verdict::Committed);
            gone && (runs || world.ghost.forgone)
        } else {
            end.outcome() == Some(Outcome::StateLost)
                || devices
                    .all(|device| device.state == State::Running && matches!(device.holds, Holds::Copy(_)))
        };
        if !is_so {
            world.wrong(Wrong::FalseReport);
        }
        world.source.ended = Some(end);
        world.ghost.ends[at] = Some(end);
        true
    }

    /// What comes before the devices stand and their state is sealed. The destination has no part in it, so a command
    /// moves the whole set at once.
    fn saves(&self, world: &mut World) -> bool {
        let pre_copies = world.here[0].state == State::PreCopy;
        let mut all = |state| {
            world.here[..self.setup.devices].iter_mut().for_each(|device| device.state = state);
        };
        let event = match world.source.machine {
            SaveState::PreCopying if !pre_copies => {
                all(State::PreCopy);
                return true;
            }
            SaveState::PreCopying => SaveEvent::CutoverDue,
            SaveState::Quiescing => {
                all(if self.save.pre_copy { State::PreCopyP2p } else { State::RunningP2p });
                SaveEvent::AllQuiesced
            }
            SaveState::Stopping => {
                all(State::StopCopy);
                SaveEvent::AllStopped
            }
            SaveState::Draining => SaveEvent::AllDrained,
            SaveState::Parking => {
                all(State::Stop);
                SaveEvent::AllParked
            }
            SaveState::Admitted
            | SaveState::AwaitingCutover
            | SaveState::Sealing
            | SaveState::Held
            | SaveState::Marking
            | SaveState::Resuming { .. }
            | SaveState::Offered
            | SaveState::Committing
            | SaveState::LettingGo
            | SaveState::Unwinding { .. }
            | SaveState::Completed
            | SaveState::CompletedStopped
            | SaveState::Inconsistent
            | SaveState::HandedOver
            | SaveState::Aborted { .. }
            | SaveState::Lost { .. } => return false,
        };
        self.source_event(world, event)
    }

    fn sets_here(&self, world: &mut World, member: usize) {
        if world.source.machine == SaveState::LettingGo {
            world.here[member] = Device::BLANK;
            return;
        }
        let device = &mut world.here[member];
        match recover(Role::Source, self.setup.capabilities, device.state) {
            Recovery::Quarantine | Recovery::Reset => device.quarantined = true,
            Recovery::Nothing => {}
            Recovery::Walk { to } => {
                let was_running = device.state.is_running();
                device.state = if self.save.barrier && !was_running { State::RunningP2p } else { to };
                if was_running {
                    return;
                }
                let resumed = world.attempt + 1;
                if let Holds::Copy(_) = device.holds {
                    device.holds = Holds::Copy(resumed);
                }
                world.ghost.resumed = resumed;
                if world.ghost.ran[usize::from(world.attempt)] && !world.ghost.resumed_on_word {
                    world.wrong(Wrong::Fork);
                }
            }
        }
    }

    fn source_reports(&self, world: &mut World) -> bool {
        let event = match world.source.machine {
            SaveState::LettingGo => SaveEvent::LetGo,
            SaveState::Sealing => SaveEvent::Sealed,
            SaveState::Admitted
            | SaveState::PreCopying
            | SaveState::AwaitingCutover
            | SaveState::Quiescing
            | SaveState::Stopping
            | SaveState::Draining
            | SaveState::Parking
            | SaveState::Held
            | SaveState::Marking
            | SaveState::Resuming { .. }
            | SaveState::Offered
            | SaveState::Committing
            | SaveState::Unwinding { .. }
            | SaveState::Completed
            | SaveState::CompletedStopped
            | SaveState::Inconsistent
            | SaveState::HandedOver
            | SaveState::Aborted { .. }
            | SaveState::Lost { .. } => {
                let kept = world.source.kept || self.setup.planted(Plant::ResetIsPreserved);
                if kept && world.here[..self.setup.devices].iter().all(|device| !device.quarantined) {
                    SaveEvent::Recovered
                } else {
                    SaveEvent::Unrecoverable
                }
            }
        };
        self.source_event(world, event)
    }

    fn source_crashes(&self, world: &mut World, crash: Crash) {
        world.budget.source_crashes -= 1;
        let resets = crash.resets(self.setup.devices);
        if resets.clone().any(|member| world.here[member].holds != Holds::Nothing)
            && world.ghost.verdicts[usize::from(world.attempt)] != Some(Verdict::Committed)
        {
            world.ghost.destroyed = true;
        }
        world.here[resets].fill(Device::BLANK);
        world.source = Source {
            process: Process::Down,
            believed: world.source.durable,
            durable: world.source.durable,
            kept: world.source.kept && crash == Crash::Kept,
            ..Source::BEGUN
        };
    }

    fn source_restarts(world: &mut World) {
        world.source.process = Process::Up;
        world.source.machine = match world.source.durable.after_crash() {
            OfferTakeUp::Undo => SaveState::Unwinding { checkpoint: Fate::Unsealed },
            OfferTakeUp::AskOn => SaveState::Committing,
            OfferTakeUp::LetGo => SaveState::LettingGo,
        };
    }

    /// Whether the caller's word is needed before Commit.
    pub(crate) fn is_manual(&self) -> bool {
        self.setup.commit == Commit::Manual
    }
}
