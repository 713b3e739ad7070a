//! The driver: the sole executor of the state machine's plans on one device.
//!
//! ```text
//!   begin_save ----> SaveSession ----> quiesce / stop_copy ----> finish_save ----> resume
//!   begin_restore -> RestoreSession -> Loaded -> FixedUp -> Armed -> enter_running_p2p / enter_running
//!                        any of them fails: read back, fall back, reset or quarantine -> Failure
//! ```
//!
//! Every SET goes through one function, `walk`: ask `fsm` whether a path leads there, SET once (the device walks the
//! path itself), read back. A device that answers success but stands elsewhere has failed. After any failure the
//! driver reads the state back, does what [`recover`] says, and reports a
//! [`Failure`] with the *first* error, the [`Outcome`] and every [`Step`].
//!
//! # Invariants
//! - At most one session a device; a session given to another device's driver is refused.
//! - A source is never reset by itself: what cannot fall back is quarantined. A destination is.
//! - RESUMING is left only with a seal that covers every byte that was written, and only once whoever owns the
//!   interrupts and mappings has said that it is ready; both by type.
//! - A quarantined device gets no call at all, except the ones that somebody asks for by name:
//!   [`reset`](Driver::reset) and [`reinstate`](Driver::reinstate).
//!
//! Dropping a session leaves the device where it is. [`Driver::abort`] brings it back, with or without the session.

mod failure;
mod restore;
mod save;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicU64, Ordering};

use vfio_checkpoint_fsm::{
    Capabilities, Outcome, Recovery, Role, State, Walk, after_failed_reset, after_failed_walk, path, recover,
    recover_entry,
};

pub use failure::{Answer, Failure, Standing, Step};
pub use restore::{Armed, FixedUp, Loaded, RestoreSession};
pub use save::{Quiesced, SaveMode, SaveRead, SaveSession, Stopped};

use crate::{
    Call, DataSize, DataStream, DeviceCapabilities, DeviceError, DirtyBitmap, DirtyReport, Fingerprint,
    Identity, IovaRange, MigrationDevice, chain,
};

/// Names one session in this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct SessionId(u64);

impl SessionId {
    fn next() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// The session that holds the device, and what is at stake in it.
#[derive(Debug, Clone, Copy)]
struct Engagement {
    session: SessionId,
    stake: Stake,
}

/// What the state in the device is worth, which decides what a failure may cost.
#[derive(Debug, Clone, Copy)]
enum Stake {
    /// It is precious ([`Role::Source`]).
    Source,
    /// It is precious until the device has left RUNNING_P2P on its way into RESUMING.
    Entry,
    /// It is a copy ([`Role::Destination`]).
    Destination,
}

impl Stake {
    fn role(self) -> Role {
        match self {
            Self::Source => Role::Source,
            Self::Entry | Self::Destination => Role::Destination,
        }
    }

    fn recover(self, capabilities: Capabilities, landed: State) -> Recovery {
        match self {
            Self::Source => recover(Role::Source, capabilities, landed),
            Self::Entry => recover_entry(capabilities, landed),
            Self::Destination => recover(Role::Destination, capabilities, landed),
        }
    }
}

impl From<Role> for Stake {
    fn from(role: Role) -> Self {
        match role {
            Role::Source => Self::Source,
            Role::Destination => Self::Destination,
        }
    }
}

/// Drives one device.
#[derive(Debug)]
pub struct Driver {
    device: Box<dyn MigrationDevice>,
    standing: Standing,
    engaged: Option<Engagement>,
    steps: Vec<Step>,
}

impl Driver {
    /// Takes charge of a device, in whatever state it is. Nothing is called.
    pub fn new(device: Box<dyn MigrationDevice>) -> Self {
        Self { device, standing: Standing::InService, engaged: None, steps: Vec::new() }
    }

    /// Which device this is.
    pub fn identity(&self) -> &Identity {
        self.device.identity()
    }

    /// What must match for its state to load elsewhere.
    pub fn fingerprint(&self) -> &Fingerprint {
        self.device.fingerprint()
    }

    /// What the device can do.
    pub fn capabilities(&self) -> &DeviceCapabilities {
        self.device.capabilities()
    }

    /// Whether the device takes work.
    pub fn standing(&self) -> Standing {
        self.standing
    }

    /// Everything asked of the device since the current or last operation began.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// Hands the device back.
    pub fn into_device(self) -> Box<dyn MigrationDevice> {
        self.device
    }

    /// Reads the state back. Not part of a trajectory.
    pub fn state(&mut self) -> Result<State, DeviceError> {
        self.check_standing(Call::GetState)?;
        self.device.state()
    }

    /// How many bytes a stop-copy would take from here.
    pub fn data_size(&mut self) -> Result<DataSize, DeviceError> {
        self.check_standing(Call::DataSize)?;
        if self.device.capabilities().data_size { self.device.data_size() } else { Ok(DataSize::Unknown) }
    }

    /// Brings a device that an earlier owner left behind to a state where work can start.
    ///
    /// Whatever was under way is given up: from a saving state or STOP the device goes back to RUNNING with its
    /// state; from RESUMING or ERROR only a reset leads out, and `role` says whether that may happen by itself.
    /// Returns where the device stands and what became of its state.
    pub fn recover_left_over(&mut self, role: Role) -> Result<Outcome, Failure> {
        self.check_free(Call::GetState).map_err(|first| self.refuse(first))?;
        self.steps.clear();
        let first = match self.read_back() {
            Ok(State::Running) => return Ok(Outcome::Preserved),
            Ok(
                found @ (State::Error
                | State::Stop
                | State::StopCopy
                | State::Resuming
                | State::RunningP2p
                | State::PreCopy
                | State::PreCopyP2p),
            ) => DeviceError::LeftOver { found },
            Err(error) => error,
        };
        let recovered = self.unwind(role.into(), first);
        match (recovered.standing, recovered.state) {
            (Standing::InService, Some(State::Running)) => Ok(recovered.outcome),
            (Standing::InService | Standing::Quarantined, _) => Err(recovered),
        }
    }

    /// Resets the device because somebody decided to: its state is lost, a quarantine ends.
    pub fn reset(&mut self) -> Result<(), Failure> {
        self.engaged = None;
        self.steps.clear();
        self.standing = Standing::InService;
        match self.reset_and_read_back() {
            Ok(()) => Ok(()),
            Err(first) => Err(self.fail(first, Outcome::StateLost, after_failed_reset())),
        }
    }

    /// Ends a quarantine because somebody decided that the device is sound. Its state must read RUNNING.
    pub fn reinstate(&mut self) -> Result<(), DeviceError> {
        match self.device.state()? {
            State::Running => {
                self.standing = Standing::InService;
                Ok(())
            }
            found @ (State::Error
            | State::Stop
            | State::StopCopy
            | State::Resuming
            | State::RunningP2p
            | State::PreCopy
            | State::PreCopyP2p) => Err(DeviceError::Elsewhere { asked: State::Running, found }),
        }
    }

    /// Takes the device out of service because somebody decided to, and gives up its session without a call.
    pub fn quarantine(&mut self) -> Standing {
        self.engaged = None;
        self.standing = Standing::Quarantined;
        self.standing
    }

    /// Gives up the session under way, if there is one: a source goes back to RUNNING, a destination is reset.
    ///
    /// `cause` is reported as the first error. A session that the caller still holds is refused from here on.
    pub fn abort(&mut self, cause: DeviceError) -> Failure {
        match self.engaged {
            Some(engagement) => self.unwind(engagement.stake, cause),
            None => self.refuse(cause),
        }
    }

    /// Starts logging the pages that the device writes by DMA. Returns the page size in force.
    ///
    /// `page_bytes` must be a power of two: the kernel does not check that, and would log something else.
    pub fn start_dma_log(&mut self, page_bytes: u64, ranges: &[IovaRange]) -> Result<u64, DeviceError> {
        self.check_standing(Call::DmaLogStart)?;
        if !page_bytes.is_power_of_two() {
            let reason = format!("a page of {page_bytes} bytes is not a power of two");
            return Err(DeviceError::Argument { call: Call::DmaLogStart, reason });
        }
        match self.device.dma_log() {
            Some(log) => log.start(page_bytes, ranges),
            None => Err(DeviceError::Absent { call: Call::DmaLogStart }),
        }
    }

    /// What was written since the last report. Every page counts as written where the log cannot be read, because a
    /// report that failed may have cleared what it did not deliver.
    pub fn report_dma_log(&mut self, range: IovaRange, page_bytes: u64) -> Result<DirtyReport, DeviceError> {
        self.check_standing(Call::DmaLogReport)?;
        let mut bitmap = DirtyBitmap::new(range, page_bytes)?;
        let reported = match self.device.dma_log() {
            Some(log) => log.report(&mut bitmap),
            None => Err(DeviceError::Absent { call: Call::DmaLogReport }),
        };
        Ok(match reported {
            Ok(()) => DirtyReport::Pages(bitmap),
            Err(error) => DirtyReport::AllDirty { range, reason: chain(&error) },
        })
    }

    /// Stops logging.
    pub fn stop_dma_log(&mut self) -> Result<(), DeviceError> {
        self.check_standing(Call::DmaLogStop)?;
        match self.device.dma_log() {
            Some(log) => log.stop(),
            None => Err(DeviceError::Absent { call: Call::DmaLogStop }),
        }
    }

    fn check_standing(&self, call: Call) -> Result<(), DeviceError> {
        match self.standing {
            Standing::InService => Ok(()),
            Standing::Quarantined => Err(DeviceError::Quarantined { call }),
        }
    }

    /// Starts an operation: a fresh trajectory on a device that is free and in RUNNING. Any other state belongs to
    /// somebody or is left over from somebody, and is not touched.
    fn begin(&mut self, call: Call, stake: Stake) -> Result<SessionId, Failure> {
        self.check_free(call).map_err(|first| self.refuse(first))?;
        self.steps.clear();
        match self.read_back() {
            Ok(State::Running) => {}
            Ok(
                found @ (State::Error
                | State::Stop
                | State::StopCopy
                | State::Resuming
                | State::RunningP2p
                | State::PreCopy
                | State::PreCopyP2p),
            ) => return Err(self.refuse(DeviceError::LeftOver { found })),
            Err(error) => return Err(self.refuse(error)),
        }
        let session = SessionId::next();
        self.engaged = Some(Engagement { session, stake });
        Ok(session)
    }

    fn check_free(&self, call: Call) -> Result<(), DeviceError> {
        self.check_standing(call)?;
        match self.engaged {
            None => Ok(()),
            Some(_) => Err(DeviceError::Engaged { call }),
        }
    }

    /// A refusal before anything was changed: the device is as it was and there is nothing to recover.
    fn refuse(&self, first: DeviceError) -> Failure {
        Failure {
            first,
            state: self.last_seen(),
            outcome: Outcome::Preserved,
            standing: self.standing,
            steps: self.steps.clone(),
        }
    }

    /// A step of a session failed. A session that is not the one under way here changes nothing here.
    fn session_failed(&mut self, session: SessionId, first: DeviceError) -> Failure {
        match self.engaged {
            Some(engagement) if engagement.session == session => self.unwind(engagement.stake, first),
            Some(_) | None => self.refuse(first),
        }
    }

    /// Refuses a session that is not the one under way here.
    fn check_session(&self, session: SessionId, call: Call) -> Result<(), DeviceError> {
        self.check_standing(call)?;
        match self.engaged {
            Some(engagement) if engagement.session == session => Ok(()),
            Some(_) | None => Err(DeviceError::ForeignSession { call }),
        }
    }

    /// One SET with everything that belongs to it: the legality before, the state and the stream after.
    ///
    /// The state is read first: a device may have fallen into ERROR meanwhile, and a SET out of ERROR is not only
    /// refused by the kernel but warned of. On an error nothing is recovered here; the caller knows what the device's
    /// state is worth.
    fn walk(&mut self, target: State) -> Result<Option<DataStream>, DeviceError> {
        let from = self.read_back()?;
        self.walk_from(from, target)
    }

    /// [`walk`](Self::walk) from the state that was just read back.
    fn walk_from(&mut self, from: State, target: State) -> Result<Option<DataStream>, DeviceError> {
        let opens = match path(self.device.capabilities().migration, from, target) {
            Walk::NoOp => return Ok(None),
            Walk::Forbidden(source) => return Err(DeviceError::Forbidden { target, source }),
            Walk::Path(path) => path.opens_stream(),
        };
        let set = self.device.set_state(target);
        self.steps.push(Step::Set(target, Answer::of(&set)));
        let stream = set?;
        // Also after success: a driver was seen to answer success out of ERROR and stay there.
        let found = self.read_back()?;
        if found != target {
            return Err(DeviceError::Elsewhere { asked: target, found });
        }
        if stream.is_some() == opens {
            Ok(stream)
        } else {
            Err(DeviceError::Stream { call: Call::SetState(target), expected: opens })
        }
    }

    fn read_back(&mut self) -> Result<State, DeviceError> {
        let read = self.device.state();
        self.steps.push(Step::ReadBack(match &read {
            Ok(state) => Ok(*state),
            Err(error) => Err(Answer::of_error(error)),
        }));
        read
    }

    fn reset_and_read_back(&mut self) -> Result<(), DeviceError> {
        let reset = self.device.reset();
        self.steps.push(Step::Reset(Answer::of(&reset)));
        reset?;
        match self.read_back()? {
            State::Running => Ok(()),
            found @ (State::Error
            | State::Stop
            | State::StopCopy
            | State::Resuming
            | State::RunningP2p
            | State::PreCopy
            | State::PreCopyP2p) => Err(DeviceError::Elsewhere { asked: State::Running, found }),
        }
    }

    /// The one place where an operation that failed is unwound. Ends the session.
    fn unwind(&mut self, stake: Stake, first: DeviceError) -> Failure {
        let capabilities = self.device.capabilities().migration;
        let landed = self.read_back();
        let mut recovery = match &landed {
            Ok(landed) => stake.recover(capabilities, *landed),
            // Where the device stands cannot be told. The next best is what helps in every state.
            Err(_) => after_failed_walk(stake.role()),
        };
        // Each failed attempt leads to the next kind of recovery, and the last is quarantine: this ends.
        loop {
            match recovery {
                Recovery::Nothing => return self.fail(first, Outcome::Preserved, Recovery::Nothing),
                Recovery::Walk { to } => {
                    if landed.as_ref().is_ok_and(|landed| self.walk_from(*landed, to).is_ok()) {
                        return self.fail(first, Outcome::Preserved, Recovery::Nothing);
                    }
                    recovery = after_failed_walk(stake.role());
                }
                Recovery::Reset => {
                    if self.reset_and_read_back().is_ok() {
                        return self.fail(first, Outcome::StateLost, Recovery::Nothing);
                    }
                    recovery = after_failed_reset();
                }
                Recovery::Quarantine => {
                    return self.fail(first, self.outcome_in_quarantine(), Recovery::Quarantine);
                }
            }
        }
    }

    /// Whether a device in quarantine still carries what it carried: not after a reset was tried, and not in ERROR
    /// or RESUMING, out of which nothing else leads. Anywhere else the state is there and cannot be brought to run.
    fn outcome_in_quarantine(&self) -> Outcome {
        let reset_tried = self.steps.iter().any(|step| matches!(step, Step::Reset(_)));
        match self.last_seen() {
            Some(State::Error | State::Resuming) | None => Outcome::StateLost,
            Some(_) if reset_tried => Outcome::StateLost,
            Some(_) => Outcome::Preserved,
        }
    }

    /// The state that the last read-back found, where it found one.
    fn last_seen(&self) -> Option<State> {
        self.steps.iter().rev().find_map(|step| match step {
            Step::ReadBack(state) => Some(state.ok()),
            Step::Set(..) | Step::Reset(_) => None,
        })?
    }

    fn fail(&mut self, first: DeviceError, outcome: Outcome, left: Recovery) -> Failure {
        self.engaged = None;
        if left == Recovery::Quarantine {
            self.standing = Standing::Quarantined;
        }
        let failure = Failure {
            first,
            state: self.last_seen(),
            outcome,
            standing: self.standing,
            steps: self.steps.clone(),
        };
        tracing::warn!(device = %self.device.identity(), %failure, "device operation failed");
        failure
    }
}
