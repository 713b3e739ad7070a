//! Whether a restore would make a second running copy of a logical device.
//!
//! A checkpoint says what was meant for its source: that it runs on, or that it stays stopped. Whether that still holds is
//! known of the devices of this agent alone, so a source that was left running counts as running, wherever it is.
//!
//! ```text
//!   the target itself carries the logical device                 it is replaced: no fork
//!   another device of this agent carries it, and runs             a fork
//!   the source was left running, and it is not known where         a fork
//!   the source was left stopped, and does not run here            no fork
//! ```

use std::collections::BTreeMap;

use vfio_checkpoint_fsm::State;
use vfio_checkpoint_proto::domain::{DeviceManifest, SourceDisposition};
use vfio_checkpoint_proto::ids::{DeviceName, LogicalDeviceId};
use vfio_checkpoint_proto::v1::BlockerReason;

use super::Blocker;
use crate::registry::DeviceView;

/// Where logical devices are on this agent, and whether they stand still there.
#[derive(Debug, Default)]
pub struct Whereabouts {
    here: BTreeMap<LogicalDeviceId, Vec<(DeviceName, bool)>>,
}

impl Whereabouts {
    /// Of all of the agent's devices, as they were read back last.
    pub fn of(views: impl IntoIterator<Item = DeviceView>) -> Self {
        let mut here: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for view in views {
            let Some(record) = view.record else { continue };
            // What an operation stopped for its own sake is about to run again.
            let stands =
                view.lease.is_none() && matches!(view.state, Some((State::Stop | State::StopCopy, _)));
            here.entry(record.logical).or_default().push((view.name, stands));
        }
        Self { here }
    }

    /// What is in the way of restoring this state onto `target`.
    pub fn fork(
        &self,
        target: &DeviceName,
        device: &DeviceManifest,
        disposition: SourceDisposition,
    ) -> Option<Blocker> {
        let id = &device.logical_device.id;
        let here = self.here.get(id).map(Vec::as_slice).unwrap_or_default();
        let blocked = |message: String| {
            Some(Blocker::device(BlockerReason::SourceStillRunning, target, format!("{message}; {WAYS_OUT}")))
        };
        if let Some((other, _)) = here.iter().find(|(name, stands)| name != target && !stands) {
            return blocked(format!("the state is of logical device {id}, which runs in {other}"));
        }
        if here.iter().any(|(name, _)| name == target) {
            return None;
        }
        match disposition {
            SourceDisposition::RunsOn => blocked(format!(
                "the state is of logical device {id}, which was left running in {} and may run still",
                device.source_device
            )),
            SourceDisposition::StaysStopped => None,
        }
    }
}

const WAYS_OUT: &str =
    "restore onto the device that carries it, or set allow_fork to make a new logical device of it";
