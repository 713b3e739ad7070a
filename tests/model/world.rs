//! One state of everything: two agents with their journals, the devices of both, what was ever said, and what nobody but
//! the model knows.
//!
//! ```text
//!   Source       Destination        process, machine, record, what is being written
//!   [Device; 2]  [Device; 2]        VFIO state, and what the device holds
//!        `--- Said, per attempt ---'
//!   Ghost                           what the oracles need to remember
//! ```
//! # Invariants
//! - A message, once sent, can be heard at any time, any number of times, or never. That covers loss, doubling, delay and
//!   reordering without a count of any.
//! - What is volatile goes with a crash. What is recorded stays, and nothing else does.
//! - Ghost fields are read by oracles alone, and by no decision.

use vfio_checkpoint_fsm::handover::{ArrivalStep, Evidence, OfferStep, Verdict};
use vfio_checkpoint_fsm::{RestoreState, SaveState, State};

use crate::setup::{Budget, Setup};

/// The most devices of a set.
pub(crate) const MEMBERS: usize = 2;
/// The most attempts to hand one logical device over.
pub(crate) const ATTEMPTS: usize = 2;

/// What a device holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Holds {
    /// Nobody's state, as after a reset.
    Nothing,
    /// The logical device, after it has resumed so many times.
    Copy(u8),
    /// What was damaged on its way.
    Damaged,
}

/// One device of one side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Device {
    pub(crate) state: State,
    pub(crate) holds: Holds,
    pub(crate) quarantined: bool,
}

impl Device {
    pub(crate) const BLANK: Self = Self { state: State::Running, holds: Holds::Nothing, quarantined: false };

    /// Whether it runs a state that is, or was to be, the logical device.
    pub(crate) fn runs_copy(self) -> bool {
        self.state.is_running() && self.holds != Holds::Nothing
    }
}

/// A process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Process {
    Up,
    Down,
    /// Down for good. Its holder is there, so its devices do what they did.
    Gone,
    /// Made sure by an administrator: neither agent nor holder are there, or will be.
    Fenced,
}

/// The source's agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Source {
    pub(crate) process: Process,
    pub(crate) machine: SaveState,
    /// What is on record, or may be after a write that failed.
    pub(crate) believed: OfferStep,
    /// What is on record.
    pub(crate) durable: OfferStep,
    /// A write is under way: `believed`, or the end. The command that comes with it waits.
    pub(crate) writing: bool,
    /// Every device was kept open ever since the hand-over began.
    pub(crate) kept: bool,
    pub(crate) heard: Evidence,
    /// The end on record, which is the one that is reported.
    pub(crate) ended: Option<SaveState>,
}

/// The destination's agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Destination {
    pub(crate) process: Process,
    /// The attempt whose arrival is at hand, or was last.
    pub(crate) arrival: Option<u8>,
    pub(crate) machine: RestoreState,
    pub(crate) believed: ArrivalStep,
    /// What is on record of it. `None`: nothing yet.
    pub(crate) durable: Option<ArrivalStep>,
    pub(crate) writing: bool,
    pub(crate) kept: bool,
    /// A SET failed, and the devices have not been read back since.
    pub(crate) set_failed: bool,
    /// Its deadline is armed.
    pub(crate) armed: bool,
    /// The stream is open. It goes with the process, and nobody takes it up again.
    pub(crate) streams: bool,
    /// The verdict of the attempt before.
    pub(crate) before: Option<Verdict>,
    /// Tickets that open nothing any more, by attempt. So it stays longer than an arrival is remembered, and `newest` does.
    pub(crate) used: [bool; ATTEMPTS],
    /// The last attempt whose epoch was put on record of the devices, which is with COMMITTING.
    pub(crate) newest: Option<u8>,
}

/// What an agent says to the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub(crate) enum Word {
    /// Prepare.
    Prepare = 1,
    /// Its answer.
    Accepted = 1 << 1,
    /// The state of all devices with its seal.
    State = 1 << 2,
    /// The same, damaged or cut short.
    DamagedState = 1 << 3,
    /// The last Ack of the stream.
    Prepared = 1 << 4,
    /// `CommitHandover`.
    Commit = 1 << 5,
    /// `AbandonHandover`.
    Abandon = 1 << 6,
    /// Answers to Commit.
    NotPrepared = 1 << 7,
    Committed = 1 << 8,
    Refused = 1 << 9,
    Lost = 1 << 10,
    Broken = 1 << 11,
    /// `GetHandover` with `settled`: the source has its end on record.
    Settled = 1 << 12,
    /// The stream is opened.
    Opens = 1 << 13,
}

impl Word {
    pub(crate) const ANSWERS: [Self; 5] =
        [Self::NotPrepared, Self::Committed, Self::Refused, Self::Lost, Self::Broken];

    pub(crate) const fn told(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Committed => Self::Committed,
            Verdict::Refused => Self::Refused,
            Verdict::Lost => Self::Lost,
            Verdict::Broken => Self::Broken,
        }
    }

    /// What it is evidence of.
    pub(crate) const fn evidence(self) -> Evidence {
        match self {
            Self::Committed => Evidence::Told(Verdict::Committed),
            Self::Refused => Evidence::Told(Verdict::Refused),
            Self::Lost => Evidence::Told(Verdict::Lost),
            Self::Broken => Evidence::Told(Verdict::Broken),
            Self::NotPrepared => Evidence::Undecided,
            Self::Prepare
            | Self::Accepted
            | Self::State
            | Self::DamagedState
            | Self::Prepared
            | Self::Commit
            | Self::Abandon
            | Self::Settled
            | Self::Opens => Evidence::Nothing,
        }
    }
}

/// What was said of one attempt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Said {
    words: u16,
    /// What [`Word::State`] carries.
    pub(crate) copy: u8,
}

impl Said {
    pub(crate) const fn has(self, word: Word) -> bool {
        self.words & word as u16 != 0
    }

    pub(crate) fn say(&mut self, word: Word) {
        self.words |= word as u16;
    }
}

/// What was found to be wrong at the moment when it happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Wrong {
    /// A message of another hand-over or epoch moved something.
    StaleMessage,
    /// A device left RESUMING with something else than a verified state.
    Unverified,
    /// A device left RESUMING with a state that the source had run on from.
    StaleCopy,
    /// An end was reported that was not so.
    FalseReport,
    /// A second verdict on one hand-over.
    SecondVerdict,
    /// The source ran by itself what had run at the destination.
    Fork,
}

/// What only the model knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Ghost {
    /// How many times the logical device resumed at its source.
    pub(crate) resumed: u8,
    /// Attempts whose arrival had Prepared on record.
    pub(crate) prepared: [bool; ATTEMPTS],
    /// Attempts of which a device ran at the destination.
    pub(crate) ran: [bool; ATTEMPTS],
    pub(crate) verdicts: [Option<Verdict>; ATTEMPTS],
    pub(crate) ends: [Option<SaveState>; ATTEMPTS],
    /// A crash without a holder took the copy, or fencing did.
    pub(crate) destroyed: bool,
    /// An administrator let the copy go without evidence that it runs.
    pub(crate) forgone: bool,
    /// An administrator said that the source resumes.
    pub(crate) resumed_on_word: bool,
    pub(crate) wrong: Option<Wrong>,
}

/// One state of everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct World {
    pub(crate) source: Source,
    pub(crate) destination: Destination,
    pub(crate) here: [Device; MEMBERS],
    pub(crate) there: [Device; MEMBERS],
    pub(crate) said: [Said; ATTEMPTS],
    /// The attempt that the source is at.
    pub(crate) attempt: u8,
    pub(crate) budget: Budget,
    pub(crate) ghost: Ghost,
}

impl World {
    pub(crate) fn new(setup: &Setup) -> Self {
        let mut here = [Device::BLANK; MEMBERS];
        for device in &mut here[..setup.devices] {
            device.holds = Holds::Copy(0);
        }
        Self {
            source: Source::BEGUN,
            destination: Destination {
                process: Process::Up,
                arrival: None,
                machine: RestoreState::Admitted,
                believed: ArrivalStep::Loading,
                durable: None,
                writing: false,
                kept: true,
                set_failed: false,
                armed: true,
                streams: false,
                before: None,
                used: [false; ATTEMPTS],
                newest: None,
            },
            here,
            there: [Device::BLANK; MEMBERS],
            said: [Said::default(); ATTEMPTS],
            attempt: 0,
            budget: setup.budget,
            ghost: Ghost {
                resumed: 0,
                prepared: [false; ATTEMPTS],
                ran: [false; ATTEMPTS],
                verdicts: [None; ATTEMPTS],
                ends: [None; ATTEMPTS],
                destroyed: false,
                forgone: false,
                resumed_on_word: false,
                wrong: None,
            },
        }
    }

    pub(crate) fn said(&mut self, attempt: u8) -> &mut Said {
        &mut self.said[usize::from(attempt)]
    }

    pub(crate) fn is_said(&self, attempt: u8, word: Word) -> bool {
        self.said[usize::from(attempt)].has(word)
    }

    /// The first one stays, since that is where a trace should end.
    pub(crate) fn wrong(&mut self, what: Wrong) {
        self.ghost.wrong.get_or_insert(what);
    }
}

impl Source {
    /// The hand-over is on record, and nothing has been touched.
    pub(crate) const BEGUN: Self = Self {
        process: Process::Up,
        machine: SaveState::Admitted,
        believed: OfferStep::Begun,
        durable: OfferStep::Begun,
        writing: false,
        kept: true,
        heard: Evidence::Nothing,
        ended: None,
    };
}
