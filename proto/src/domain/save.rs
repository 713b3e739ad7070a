//! What a save is asked to do.

use std::time::Duration;

use super::{Invalid, checks};
use crate::ids::{DeviceName, PodName, RequestId, StoreName};
use crate::v1;

/// Whether to read state while the devices run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PreCopy {
    /// Where every device of the set can.
    IfAble {
        /// Pre-copy takes at most this long. None takes the agent's default.
        budget: Option<Duration>,
    },
    /// Never.
    Never,
    /// Always: a device that cannot is a blocker.
    Required {
        /// Pre-copy takes at most this long. None takes the agent's default.
        budget: Option<Duration>,
    },
}

/// Who says when to stop the devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cutover {
    /// The agent, when the predicted downtime fits.
    Auto,
    /// The caller, once it has paused its workload.
    Manual {
        /// How long to wait for it. None takes the agent's default.
        timeout: Option<Duration>,
    },
}

/// What becomes of saved devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AfterSave {
    /// They run on at once.
    Resume,
    /// They stay stopped until Resume, or until the hold runs out.
    Hold {
        /// How long to wait for Resume. None takes the agent's default.
        timeout: Option<Duration>,
    },
    /// They stay stopped.
    StayStopped,
    /// They stay stopped until the destination of a migration has taken over, and are reset then.
    HandOver,
}

/// What to do when pre-copy does not bring the predicted downtime under the limit in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoConvergence {
    /// Stop the devices all the same.
    StopAnyway,
    /// Undo the save; the devices run on.
    Abort,
}

/// How the memory of a workload is captured along with its devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryCapture {
    /// Not at all.
    None,
    /// While the workload and its devices stand still.
    WhileStopped,
    /// While it runs, with dirty tracking, and the rest while it stands still.
    DirtyTracking,
    /// By a snapshot that goes on after the workload runs again. A blocker.
    BackgroundSnapshot,
    /// By faulting pages in on the destination. A blocker.
    PostCopy,
}

/// What a save is asked to do, validated.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(
    clippy::struct_excessive_bools,
    reason = "independent switches of the request, each named by its field"
)]
pub struct SaveRequestSpec {
    /// The set: 1 to [`MAX_DEVICES`](crate::MAX_DEVICES) devices, each once.
    pub devices: Vec<DeviceName>,
    /// Whether to read state while the devices run.
    pub pre_copy: PreCopy,
    /// Who says when to stop the devices.
    pub cutover: Cutover,
    /// What becomes of the devices once their state is sealed.
    pub after: AfterSave,
    /// The devices should stand still no longer than this. None takes the agent's default.
    pub downtime_limit: Option<Duration>,
    /// What to do when pre-copy does not get there.
    pub no_convergence: NoConvergence,
    /// Refuse where there is more state than this.
    pub max_bytes: Option<u64>,
    /// Take devices whose amount of state is not known, although there is a limit.
    pub allow_unknown_size: bool,
    /// How the caller captures the workload's memory.
    pub memory_capture: MemoryCapture,
    /// The workload has a virtual IOMMU.
    pub viommu: bool,
    /// Refuse where a device's dirty pages cannot be tracked.
    pub forbid_all_dirty: bool,
    /// Tell every blocker and do nothing.
    pub validate_only: bool,
    /// Makes the call idempotent.
    pub request_id: Option<RequestId>,
    /// The pod that uses the devices, for people.
    pub owner_pod: Option<PodName>,
    /// The store that the state goes to. None for the stream.
    pub store: Option<StoreName>,
}

impl TryFrom<v1::StartSaveRequest> for SaveRequestSpec {
    type Error = Invalid;

    fn try_from(wire: v1::StartSaveRequest) -> Result<Self, Invalid> {
        let timeout = checks::duration("hold_timeout", wire.hold_timeout)?;
        let after = match checks::known("after", wire.after)? {
            v1::AfterSave::Hold => AfterSave::Hold { timeout },
            v1::AfterSave::Unspecified | v1::AfterSave::Resume => {
                without("hold_timeout", timeout, "after", "RESUME")?;
                AfterSave::Resume
            }
            v1::AfterSave::StayStopped => {
                without("hold_timeout", timeout, "after", "STAY_STOPPED")?;
                AfterSave::StayStopped
            }
        };
        save_parts(wire, after)
    }
}

/// What a save is asked to do, whatever comes after.
pub(super) fn save_parts(wire: v1::StartSaveRequest, after: AfterSave) -> Result<SaveRequestSpec, Invalid> {
    let devices = checks::device_set("devices", &wire.devices)?;
    let budget = checks::duration("pre_copy_budget", wire.pre_copy_budget)?;
    let pre_copy = match checks::known("pre_copy", wire.pre_copy)? {
        v1::PreCopyMode::Unspecified => PreCopy::IfAble { budget },
        v1::PreCopyMode::Required => PreCopy::Required { budget },
        v1::PreCopyMode::Never => {
            without("pre_copy_budget", budget, "pre_copy", "NEVER")?;
            PreCopy::Never
        }
    };
    let timeout = checks::duration("cutover_timeout", wire.cutover_timeout)?;
    let cutover = match checks::known("cutover", wire.cutover)? {
        v1::CutoverMode::Manual => Cutover::Manual { timeout },
        v1::CutoverMode::Unspecified | v1::CutoverMode::Auto => {
            without("cutover_timeout", timeout, "cutover", "AUTO")?;
            Cutover::Auto
        }
    };
    let no_convergence = match checks::known("no_convergence", wire.no_convergence)? {
        v1::NoConvergence::Unspecified | v1::NoConvergence::StopAnyway => NoConvergence::StopAnyway,
        v1::NoConvergence::Abort => NoConvergence::Abort,
    };
    let memory_capture = match checks::known("memory_capture", wire.memory_capture)? {
        v1::MemoryCapture::Unspecified => {
            return Err(Invalid::new(
                "memory_capture",
                "it must be given: device state is of no use without memory from the same moment; \
                     say NONE where device state alone is wanted",
            ));
        }
        v1::MemoryCapture::None => MemoryCapture::None,
        v1::MemoryCapture::WhileStopped => MemoryCapture::WhileStopped,
        v1::MemoryCapture::DirtyTracking => MemoryCapture::DirtyTracking,
        v1::MemoryCapture::BackgroundSnapshot => MemoryCapture::BackgroundSnapshot,
        v1::MemoryCapture::PostCopy => MemoryCapture::PostCopy,
    };
    Ok(SaveRequestSpec {
        devices,
        pre_copy,
        cutover,
        after,
        downtime_limit: checks::duration("downtime_limit", wire.downtime_limit)?,
        no_convergence,
        max_bytes: checks::limit(wire.max_bytes),
        allow_unknown_size: wire.allow_unknown_size,
        memory_capture,
        viommu: wire.viommu,
        forbid_all_dirty: wire.forbid_all_dirty,
        validate_only: wire.validate_only,
        request_id: checks::request_id(&wire.request_id)?,
        owner_pod: checks::optional_id("owner_pod", &wire.owner_pod)?,
        store: checks::optional_id("store", &wire.store)?,
    })
}

/// Refuses a time that would never run: its giver expects something else than what was asked for.
pub(super) fn without(
    field: &str,
    time: Option<Duration>,
    mode_field: &str,
    mode: &str,
) -> Result<(), Invalid> {
    if time.is_none() {
        return Ok(());
    }
    Err(Invalid::new(
        field,
        format!("it means nothing where {mode_field} is {mode}; leave it unset or change that"),
    ))
}
