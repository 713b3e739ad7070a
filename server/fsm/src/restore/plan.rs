//! What one restore is going to do, fixed when it is admitted.

use std::fmt;

use crate::plan::common_capabilities;
use crate::{Capabilities, PlanRefusal};

/// What the devices do once their state is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AfterLoad {
    /// Run at once, that is as soon as their owner is ready.
    Run,
    /// Stay loaded in `RESUMING` until the caller says Resume, at most until the hold's deadline.
    Hold,
}

/// What one restore of a set of devices is going to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RestorePlan {
    /// Bring every device to `RUNNING_P2P` before any runs freely.
    pub barrier: bool,
    /// What the devices do once their state is loaded.
    pub after: AfterLoad,
}

impl RestorePlan {
    /// The plan for a set of devices, or why they cannot be restored as one.
    pub fn for_devices(devices: &[Capabilities], after: AfterLoad) -> Result<Self, PlanRefusal> {
        let common = common_capabilities(devices)?;
        // A device that has no peer needs no barrier, and some drivers would rather take the way in one SET.
        Ok(Self { barrier: common.p2p && devices.len() > 1, after })
    }
}

impl fmt::Display for AfterLoad {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Run => "RUN",
            Self::Hold => "HOLD",
        })
    }
}
