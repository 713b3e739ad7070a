//! What one save is going to do, fixed when it is admitted.

use std::fmt;

use crate::plan::common_capabilities;
use crate::{Capabilities, PlanRefusal};

/// Who decides when the devices stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Cutover {
    /// The executor, once the predicted downtime fits or the budget for pre-copying is spent.
    Auto,
    /// The caller, once its virtual machine or pod is paused.
    Manual,
}

/// What the devices do once their checkpoint is sealed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AfterSave {
    /// Run again at once.
    Resume,
    /// Stay stopped until the caller says Resume, at most until the hold's deadline.
    Hold,
    /// Stay stopped.
    StayStopped,
    /// Stay stopped while the devices of another node take over, and are reset once those run. If they never
    /// will, the devices run again.
    HandOver,
}

/// What the caller of a save asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SaveRequest {
    /// Read what can be read while the devices run. A wish: where a device cannot, the save does without.
    pub pre_copy: bool,
    /// Who decides when the devices stop.
    pub cutover: Cutover,
    /// What the devices do afterwards.
    pub after: AfterSave,
}

/// What one save of a set of devices is going to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SavePlan {
    /// Read state while the devices run.
    pub pre_copy: bool,
    /// Quiesce every device before any is stopped; on the way back, before any runs freely.
    pub barrier: bool,
    /// Who decides when the devices stop.
    pub cutover: Cutover,
    /// What the devices do afterwards.
    pub after: AfterSave,
}

impl SavePlan {
    /// The plan for a set of devices, or why they cannot be saved as one.
    pub fn for_devices(devices: &[Capabilities], request: SaveRequest) -> Result<Self, PlanRefusal> {
        let common = common_capabilities(devices)?;
        Ok(Self {
            pre_copy: request.pre_copy && common.pre_copy,
            barrier: common.p2p,
            cutover: request.cutover,
            after: request.after,
        })
    }
}

impl fmt::Display for Cutover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Auto => "AUTO",
            Self::Manual => "MANUAL",
        })
    }
}

impl fmt::Display for AfterSave {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Resume => "RESUME",
            Self::Hold => "HOLD",
            Self::StayStopped => "STAY_STOPPED",
            Self::HandOver => "HAND_OVER",
        })
    }
}
