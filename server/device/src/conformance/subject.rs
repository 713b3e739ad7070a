//! How the suite gets at a device, and what can be done to it from outside.
//!
//! ```text
//!   Subject { open, restore_onto?, last close, stimuli? } --run--> opened, closed and opened again as rules need it
//! ```
//!
//! A rule that needs something from outside (a change of the device's state, a write by DMA, a failure) is *not
//! observed* where there is no stimulus for it; it is never taken as holding.
//!
//! # Invariants
//! - [`Subject::kernel`] refuses a device that somebody uses, before anything is opened.
//! - Stimuli are called between calls on the device, never during one.
//!
//! # Failure paths
//! A factory's error ends the run before the first rule, or, later on, names the rules that were not run.

use std::fmt;

use vfio_checkpoint_fsm::State;

use crate::kernel::discovery::{Blocker, DiscoveryError, find};
use crate::kernel::{KernelDevice, OpenOptions};
use crate::sim::{SimConfig, SimDevice};
use crate::{IovaRange, MigrationDevice};

/// An error of whoever opens devices.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Opens the device, anew each time. The one before has been dropped by then.
pub type Open = Box<dyn FnMut() -> Result<Box<dyn MigrationDevice>, BoxError> + Send>;

/// Something that happens to a device from outside.
pub type Stimulus = Box<dyn FnMut() + Send>;

/// The hops that the device took since the last call, each with its two states.
pub type TakeHops = Box<dyn FnMut() -> Vec<(State, State)> + Send>;

/// What the last close of a device does to its migration state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LastClose {
    /// The device is reset: the next open finds it in RUNNING.
    Resets,
    /// The state stays for the next open.
    Keeps,
    /// Nobody said; either is taken as it comes.
    Unknown,
}

/// A device to run the suite on.
pub struct Subject {
    pub(super) open: Open,
    pub(super) restore_onto: Option<Open>,
    pub(super) last_close: LastClose,
    pub(super) change: Option<Stimulus>,
    pub(super) fail: Option<Stimulus>,
    pub(super) dma: Option<(IovaRange, Stimulus)>,
    pub(super) hops: Option<TakeHops>,
}

/// Why the suite does not run on a kernel device. Nothing was opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SubjectError {
    /// There is no such device, or sysfs does not show it.
    #[error("nothing was touched")]
    NotFound(#[from] DiscoveryError),
    /// Something stands in the way; a device that somebody uses is left alone.
    #[error("{name}: nothing was touched: {}", list(.blockers))]
    Blocked {
        /// The device.
        name: String,
        /// Everything that stands in the way.
        blockers: Vec<Blocker>,
    },
}

fn list(blockers: &[Blocker]) -> String {
    blockers.iter().map(Blocker::to_string).collect::<Vec<_>>().join("; ")
}

impl Subject {
    /// Any device, opened by `open`.
    pub fn new(open: Open) -> Self {
        Self {
            open,
            restore_onto: None,
            last_close: LastClose::Unknown,
            change: None,
            fail: None,
            dma: None,
            hops: None,
        }
    }

    /// A kernel device by its name. Refused where somebody uses it or it could not be opened anyway.
    pub fn kernel(name: &str, options: &OpenOptions) -> Result<Self, SubjectError> {
        let found = find(&options.roots, name)?;
        let blockers = found.blockers();
        if !blockers.is_empty() {
            return Err(SubjectError::Blocked { name: name.to_owned(), blockers });
        }
        // vfio-pci resets a function on the last close. What another kind of device does is its driver's affair.
        let last_close = if found.ids.is_some() { LastClose::Resets } else { LastClose::Unknown };
        let (name, options) = (name.to_owned(), options.clone());
        let open: Open = Box::new(move || Ok(Box::new(KernelDevice::open(&name, &options)?)));
        Ok(Self::new(open).last_close(last_close))
    }

    /// A simulated device that was made from `config`, with every stimulus that needs no clock.
    pub fn simulated(device: &SimDevice, config: &SimConfig) -> Self {
        let slot = device.clone();
        let open: Open = Box::new(move || Ok(Box::new(slot.open()?)));
        let last_close = if config.reset_on_last_close { LastClose::Resets } else { LastClose::Keeps };
        let (changed, failed, walked) = (device.clone(), device.clone(), device.clone());
        let mut value = 0_u64;
        Self::new(open)
            .last_close(last_close)
            .changed_by(Box::new(move || {
                value += 1;
                changed.set_scratch(value);
                // Refused only where memory must be left alone; the register has changed all the same.
                let _ = changed.write_memory(0, &value.to_le_bytes());
            }))
            .failed_by(Box::new(move || failed.force_error()))
            .hops_from(Box::new(move || {
                walked.take_hops().into_iter().map(|hop| (hop.arc.from(), hop.arc.to())).collect()
            }))
    }

    /// Restores onto a second device of the same kind, rather than onto the one that the state comes from.
    #[must_use]
    pub fn restore_onto(mut self, other: Self) -> Self {
        self.restore_onto = Some(other.open);
        self
    }

    /// Opens the device in another way, with all else as it was.
    #[must_use]
    pub fn opened_by(mut self, open: Open) -> Self {
        self.open = open;
        self
    }

    /// Says what the last close does.
    #[must_use]
    pub fn last_close(mut self, last_close: LastClose) -> Self {
        self.last_close = last_close;
        self
    }

    /// Something that changes the state which a save carries, differently each time. Called in running states only.
    #[must_use]
    pub fn changed_by(mut self, change: Stimulus) -> Self {
        self.change = Some(change);
        self
    }

    /// Something that drops the device into ERROR.
    #[must_use]
    pub fn failed_by(mut self, fail: Stimulus) -> Self {
        self.fail = Some(fail);
        self
    }

    /// Something that makes the device write by DMA somewhere into `range`, whole pages of 4 KiB.
    #[must_use]
    pub fn writes_dma_by(mut self, range: IovaRange, write: Stimulus) -> Self {
        self.dma = Some((range, write));
        self
    }

    /// Where the device's hops can be seen.
    #[must_use]
    pub fn hops_from(mut self, hops: TakeHops) -> Self {
        self.hops = Some(hops);
        self
    }
}

impl fmt::Debug for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subject")
            .field("restore_onto", &self.restore_onto.is_some())
            .field("last_close", &self.last_close)
            .field("change", &self.change.is_some())
            .field("fail", &self.fail.is_some())
            .field("dma", &self.dma.as_ref().map(|(range, _)| range))
            .field("hops", &self.hops.is_some())
            .finish_non_exhaustive()
    }
}
