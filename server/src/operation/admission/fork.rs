//! Whether a restore would make a second running copy of a logical device.
//!
//! A checkpoint says what was meant for its source: that it runs on, or that it stays stopped. Whether that still holds is
//! known of the devices of this agent alone, so a source that was left running counts as running, wherever it is.
//!
//! ```text
//!   the target itself carries the logical device                 it is replaced: no fork
//!   another device of this agent carries it, and runs             a fork
//!   it is on its way into another device of this agent           a fork
//!   this agent discarded it, as new as the checkpoint or newer     no fork
//!   this agent handed it over since the checkpoint was made         a fork
//!   the source was left running, and it is not known where         a fork
//!   the source was left stopped, and does not run here            no fork
//! ```

use std::collections::BTreeMap;
use std::sync::Arc;

use vfio_checkpoint_fsm::State;
use vfio_checkpoint_proto::domain::{DeviceManifest, SourceDisposition};
use vfio_checkpoint_proto::ids::{DeviceName, LogicalDeviceId};
use vfio_checkpoint_proto::v1::BlockerReason;

use super::Blocker;
use crate::journal::PastRecord;
use crate::operation::Entry;
use crate::registry::DeviceView;

/// Where logical devices are on this agent, and whether they stand still there.
#[derive(Debug, Default)]
pub struct Whereabouts {
    here: BTreeMap<LogicalDeviceId, Vec<(DeviceName, bool)>>,
    /// What was discarded by a reset, was handed over, or lived again after that: the last of it.
    past: BTreeMap<LogicalDeviceId, PastRecord>,
}

impl Whereabouts {
    /// Of all of the agent's devices, as they were read back last.
    pub fn of(views: impl IntoIterator<Item = DeviceView>) -> Self {
        let mut here: BTreeMap<_, Vec<_>> = BTreeMap::new();
        let mut past: BTreeMap<LogicalDeviceId, PastRecord> = BTreeMap::new();
        for view in views {
            let Some(record) = view.record else { continue };
            // What an operation stopped for its own sake is about to run again.
            let stands =
                view.lease.is_none() && matches!(view.state, Some((State::Stop | State::StopCopy, _)));
            for one in record.past {
                let last = past.entry(one.logical.clone()).or_insert_with(|| one.clone());
                if one.epoch > last.epoch {
                    *last = one;
                } else if one.epoch == last.epoch {
                    // The same life, which ended in one of two devices: the one that knows less.
                    last.runs_nowhere &= one.runs_nowhere;
                    last.handed_over |= one.handed_over;
                }
            }
            here.entry(record.logical).or_default().push((view.name, stands));
        }
        Self { here, past }
    }

    /// And of what is on its way into a device: it runs there as soon as it is whole.
    #[must_use]
    pub fn and_arriving(mut self, operations: &[Arc<Entry>]) -> Self {
        let restores = operations.iter().filter(|entry| !entry.fixed.job.gives());
        for device in restores.flat_map(|entry| &entry.fixed.devices) {
            self.here.entry(device.logical.clone()).or_default().push((device.device.clone(), false));
        }
        self
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
        let stated = device.logical_device.epoch;
        match self.past.get(id) {
            Some(past) if past.runs_nowhere && past.epoch >= stated => return None,
            // Whatever was meant for the source when the checkpoint was made, its state went on after that, and elsewhere.
            Some(past) if past.handed_over && past.epoch > stated => {
                return blocked(format!(
                    "the state is of logical device {id} in epoch {stated}, which this agent has handed over to another \
                     since, where it runs in epoch {}",
                    past.epoch
                ));
            }
            Some(_) | None => {}
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
