//! The driver: the sole executor of the state machine's plans on one device.
//!
//! ```text
//!   begin_save ----> SaveSession ----> quiesce / stop_copy ----> finish_save ----> resume
//!   begin_restore -> RestoreSession -> Loaded -> FixedUp -> Armed -> enter_running_p2p / enter_running
//!                        any of them fails: read back, fall back, reset or quarantine -> Failure
//! ```
//!
//! Every SET goes through one function, `walk`: read the state, which must be where the step before left it; ask `fsm`
//! whether a path leads on; SET once (the device walks the path itself); read back. A device that answers success but
//! stands elsewhere has failed. After any failure the driver reads the state back, does what
//! [`recover`](vfio_checkpoint_fsm::recover) says, and reports a [`Failure`] with the *first* error, the [`Outcome`]
//! and every [`Step`].
//!
//! # Invariants
//! - At most one session a device; a session given to another device's driver is refused.
//! - A source is never reset by itself: what cannot fall back is quarantined. A destination is.
//! - RESUMING is left only with a seal that covers every byte that was written, and only once whoever owns the
//!   interrupts and mappings has said that it is ready; both by type.
//! - A device that is not where the last step left it was moved or reset by somebody else: nothing good is said of its
//!   state, and a source is quarantined as it is.
//! - A quarantined device gets no call at all, except the ones that somebody asks for by name:
//!   [`reset`](Driver::reset) and [`reinstate`](Driver::reinstate).
//!
//! Dropping a session leaves the device where it is. [`Driver::abort`] brings it back, with or without the session. A
//! device that an earlier life of the process was at is taken up with one of the `adopt_` functions.

mod adopt;
mod failure;
mod restore;
mod save;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod trajectories;
mod unwind;
mod walk;

use std::sync::atomic::{AtomicU64, Ordering};

use vfio_checkpoint_fsm::{Outcome, Role, State};

pub use adopt::{Starting, Waking};
pub use failure::{Answer, Failure, Standing, Step};
pub use restore::{Armed, FixedUp, Loaded, RestoreSession};
pub use save::{Quiesced, SaveMode, SaveRead, SaveSession, Stopped};
pub use unwind::Peers;

use unwind::{Back, Engagement, Stake};
use walk::unless_running;

use crate::{
    Call, DataSize, DeviceCapabilities, DeviceError, DirtyBitmap, DirtyReport, Fingerprint, Identity,
    IovaRange, MigrationDevice, chain,
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

/// Drives one device.
#[derive(Debug)]
pub struct Driver {
    device: Box<dyn MigrationDevice>,
    standing: Standing,
    engaged: Option<Engagement>,
    /// The last session here that ended other than by its own steps.
    cut_short: Option<SessionId>,
    steps: Vec<Step>,
    watcher: Watcher,
}

/// Told of every state that is read back, on the thread of the device: it must be quick.
#[derive(Default)]
struct Watcher(Option<Box<dyn Fn(State) + Send>>);

impl std::fmt::Debug for Watcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Watcher").field(&self.0.is_some()).finish()
    }
}

impl Driver {
    /// Takes charge of a device, in whatever state it is. Nothing is called.
    pub fn new(device: Box<dyn MigrationDevice>) -> Self {
        Self {
            device,
            standing: Standing::InService,
            engaged: None,
            cut_short: None,
            steps: Vec::new(),
            watcher: Watcher::default(),
        }
    }

    /// Tells `seen` of each state that a step reads back, at once: whoever looks on cannot ask a device that an
    /// operation has.
    #[must_use]
    pub fn watched(self, seen: impl Fn(State) + Send + 'static) -> Self {
        Self { watcher: Watcher(Some(Box::new(seen))), ..self }
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

    /// Reads the state back, in quarantine too: whoever decides about a device wants to know where it stands.
    pub fn observe(&mut self) -> Result<State, DeviceError> {
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
            Ok(found) => DeviceError::LeftOver { found },
            Err(error) => error,
        };
        let recovered = self.unwind(role.into(), Back::ToRunning, first);
        match (recovered.standing, recovered.state) {
            (Standing::InService, Some(State::Running)) => Ok(recovered.outcome),
            (Standing::InService | Standing::Quarantined, _) => Err(recovered),
        }
    }

    /// Resets the device because somebody decided to: its state is lost, a quarantine ends.
    pub fn reset(&mut self) -> Result<(), Failure> {
        self.cut_short();
        self.steps.clear();
        self.standing = Standing::InService;
        match self.reset_and_read_back() {
            Ok(()) => Ok(()),
            // Nothing but quarantine follows a failed reset.
            Err(first) => Err(self.quarantined(first, Outcome::StateLost)),
        }
    }

    /// Ends a quarantine because somebody decided that the device is sound. Its state must read RUNNING.
    pub fn reinstate(&mut self) -> Result<(), DeviceError> {
        unless_running(self.device.state()?)
            .map_err(|found| DeviceError::Elsewhere { asked: State::Running, found })?;
        self.standing = Standing::InService;
        Ok(())
    }

    /// Ends a quarantine because somebody decided that what the device carries may run: a source goes back to RUNNING with
    /// its state. From RESUMING and ERROR no way leads there, and the quarantine stays.
    pub fn bring_back(&mut self) -> Result<(), Failure> {
        match self.device.state() {
            Ok(State::Running) => self.reinstate().map_err(|error| self.refuse(error)),
            Ok(State::Stop | State::StopCopy | State::RunningP2p | State::PreCopy | State::PreCopyP2p) => {
                self.standing = Standing::InService;
                self.recover_left_over(Role::Source).map(|_preserved| ())
            }
            Ok(found @ (State::Resuming | State::Error)) => {
                Err(self.refuse(DeviceError::Elsewhere { asked: State::Running, found }))
            }
            Err(error) => Err(self.refuse(error)),
        }
    }

    /// Takes the device out of service because somebody decided to, and gives up its session without a call.
    pub fn quarantine(&mut self) -> Standing {
        self.cut_short();
        self.standing = Standing::Quarantined;
        self.standing
    }

    /// Gives up the session under way, if there is one: a source goes back to RUNNING, a destination is reset.
    ///
    /// `cause` is reported as the first error. A session that the caller still holds is refused from here on.
    pub fn abort(&mut self, cause: DeviceError) -> Failure {
        match self.engaged {
            Some(engagement) => self.unwind(engagement.stake, Back::ToRunning, cause),
            None => self.refuse(cause),
        }
    }

    /// The first half of [`abort`](Self::abort) for a set: a source goes back only as far as RUNNING_P2P, where it
    /// starts no DMA to a peer that is still stopped. [`abort`](Self::abort) does the rest once every device is there.
    pub fn abort_to_barrier(&mut self, cause: DeviceError) -> Failure {
        match self.engaged {
            Some(engagement) => self.unwind(engagement.stake, Back::ToBarrier, cause),
            None => self.refuse(cause),
        }
    }

    /// Puts a gate in front of the device: once `hung` is set, no call gets through to it.
    pub(crate) fn gate(self, hung: &std::sync::Arc<std::sync::OnceLock<crate::lane::Hung>>) -> Self {
        let device = crate::gate::gate(self.device, hung);
        Self { device, ..self }
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
}
