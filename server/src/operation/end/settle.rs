//! What of an end goes to the journal: the operation's last record, and what lives in its devices from then on.
//!
//! ```text
//!   outcome     a device carries                          its past
//!   Preserved   what it carried, after RESUME_HERE newer
//!   Replaced    what the operation brought
//!   StateLost   somebody new, where it lost its state; where it may run what the operation brought, that
//!   Moved       somebody new                              what it carried was handed over, and runs under that epoch
//! ```
//! # Invariants
//! - Of what was let go of, a device that was not seen to be reset is quarantined, and good for nothing but a reset: also one
//!   that is not open, or not configured.

use std::sync::Arc;

use vfio_checkpoint_fsm::State;
use vfio_checkpoint_fsm::handover::ArrivalEnd;
use vfio_checkpoint_proto::ids::{DeviceName, Epoch};

use super::End;
use crate::core::Core;
use crate::journal::{Change, DeviceRecord, Owed, PastRecord};
use crate::operation::entry::Entry;
use crate::operation::record::{
    EndOutcome, EndRecord, EndResult, JobRecord, OperationDeviceRecord, RecordedStep, VerdictRecord,
};
use crate::registry::opening::new_logical;
use crate::registry::{Lease, Slot, Standing};

impl End {
    /// How the devices of an arrival ended.
    fn of_arrival(&self) -> ArrivalEnd {
        if self.result == EndResult::Succeeded {
            ArrivalEnd::AllRunning
        } else if !self.quarantined.is_empty() {
            ArrivalEnd::Quarantined
        } else if self.kept {
            ArrivalEnd::AllReset
        } else {
            ArrivalEnd::NotKept
        }
    }

    /// What the end means for the other side.
    fn settle_handover(&mut self, entry: &Entry, lease: &Lease) {
        if let JobRecord::Arrive { .. } = entry.fixed.job {
            let verdict = entry.on_record().arrival(None).verdict(self.of_arrival());
            entry.hand_over(|handover| {
                handover.record.verdict = Some(verdict.into());
                handover.awaits_ready = false;
            });
        }
        entry.hand_over(|handover| handover.in_doubt = false);
        if self.let_go {
            // Whatever was not seen to be reset must not run again: also one that does not answer, that is not open, or that
            // is not configured any more. The holder may have it as it was, and a later adoption goes by its record.
            let reset = |slot: &Arc<Slot>| {
                let view = slot.view();
                view.standing == Standing::Ready && matches!(view.state, Some((State::Running, _)))
            };
            let names = entry.device_names();
            let stuck = names.filter(|name| slot_of(lease, name).is_none_or(|slot| !reset(slot)));
            self.quarantined = stuck.cloned().collect();
        }
    }

    /// What was on record to run here and was refused never did: it is at its source, under the epoch before, from where it may
    /// come again.
    fn after_refusal(entry: &Entry, device: &OperationDeviceRecord, record: DeviceRecord) -> DeviceRecord {
        let verdict = entry.view().handover.and_then(|known| known.record.verdict);
        let noted = |past: &PastRecord| past.logical == device.logical && past.epoch == device.epoch;
        let is_refused = matches!(entry.fixed.job, JobRecord::Arrive { .. })
            && verdict == Some(VerdictRecord::Refused)
            && record.past.iter().any(noted);
        if !is_refused {
            return record;
        }
        let epoch = Epoch(device.epoch.0.saturating_sub(1));
        let logical = device.logical.clone();
        record.with_past(PastRecord { logical, epoch, runs_nowhere: false, handed_over: true })
    }

    /// What became of a device's record where the state that it had is let go of.
    fn after_hand_over(entry: &Entry, index: usize, record: DeviceRecord) -> DeviceRecord {
        let Some(device) = entry.fixed.devices.get(index) else { return record };
        let there = entry.view().handover.and_then(|known| known.record.epochs.get(index).copied());
        let past = PastRecord {
            logical: device.logical.clone(),
            epoch: there.unwrap_or(device.epoch),
            runs_nowhere: false,
            handed_over: true,
        };
        // One that was seen to be reset carries nothing of it.
        DeviceRecord { handed_over: record.quarantined, ..record }.with_past(past)
    }

    /// What runs again under this epoch is newer than what the destination may have run.
    fn epoch_after(entry: &Entry, index: usize, before: Epoch) -> Epoch {
        let Some(handover) = entry.view().handover else { return before };
        let may_have_run = handover.record.resolution.is_some_and(|decided| decided.resume_here);
        match handover.record.epochs.get(index) {
            Some(there) if may_have_run && matches!(entry.fixed.job, JobRecord::Migrate { .. }) => {
                Epoch(before.0.max(there.0.saturating_add(1)))
            }
            Some(_) | None => before,
        }
    }

    /// Whether a device may run what the operation brought: it was told to, and could then be neither run for good nor reset.
    /// Whoever has it run on later runs that.
    fn may_run(&self, entry: &Entry, device: &OperationDeviceRecord, before: &DeviceRecord) -> bool {
        if !self.quarantined.contains(&device.device) || self.reset.contains(&device.device) {
            return false;
        }
        match entry.fixed.job {
            // Also where it is not known here, or not open.
            JobRecord::Arrive { .. } => {
                let handover = entry.view().handover;
                handover.is_some_and(|known| known.record.verdict == Some(VerdictRecord::Broken))
            }
            JobRecord::Restore { .. } => {
                let is_on_record = before.logical == device.logical && before.epoch == device.epoch;
                entry.is_told_to_run() || is_on_record
            }
            JobRecord::Save { .. } | JobRecord::Migrate { .. } => false,
        }
    }

    /// The record, and all that goes to the journal with it.
    pub(in crate::operation) fn settle(
        mut self,
        core: &Core,
        entry: &Entry,
        lease: &Lease,
    ) -> (EndRecord, Vec<Change>) {
        self.settle_handover(entry, lease);
        let view = entry.view();
        let checkpoint = entry.fixed.checkpoint.as_ref();
        let owed = checkpoint.and_then(|name| core.stores.debts().of(name));
        if let (Some(failure), Some(owed), JobRecord::Save { .. }) =
            (&mut self.failure, owed, entry.fixed.job)
        {
            // Who reads the store by another way than this agent finds it as it was.
            failure.message.push_str(match owed {
                Owed::Inconsistent => {
                    "; its store could not be told of that yet: this agent refuses it, and goes on trying"
                }
                Owed::Discard => {
                    "; its checkpoint could not be discarded in its store yet: this agent goes on trying"
                }
            });
        }
        let OutOfService { quarantined, hung, unavailable } =
            OutOfService::among(&entry.fixed.devices, lease, &self.quarantined);
        let now = core.environment.unix_now();
        // Not where devices do not run again: nobody knows for how long.
        let run_again =
            self.outcome == EndOutcome::Preserved && self.quarantined.is_empty() && !self.left_stopped;
        let stood_still =
            run_again.then(|| entry.stood_still(now, core.environment.executor.now())).flatten();
        let record = EndRecord {
            at: now,
            result: self.result,
            outcome: self.outcome,
            failure: self.failure.take(),
            consistency: self.consistency,
            moved_bytes: view.devices.iter().map(|live| live.moved_bytes).collect(),
            pre_copy_bytes: view
                .devices
                .iter()
                .fold(0, |sum: u64, live| sum.saturating_add(live.pre_copy_bytes)),
            device_pre_copy_bytes: view.devices.iter().map(|live| live.pre_copy_bytes).collect(),
            downtime: self.downtime.or(stood_still),
            predicted_downtime: self.predicted_downtime.or(view.predicted_downtime),
            quarantined,
            hung,
            unavailable,
            left_stopped: self.left_stopped,
            revision: view.revision + 1,
        };
        let mut changes =
            vec![Change::Operation(Box::new(entry.record(RecordedStep::Ended(record.clone()))))];
        changes.extend(core.stores.debts().unrecorded(checkpoint));
        for (index, device) in entry.fixed.devices.iter().enumerate() {
            let name = &device.device;
            let is_quarantined = self.quarantined.contains(name);
            let known = slot_of(lease, name).and_then(|slot| slot.view().record);
            let before = match known.clone() {
                Some(before) => before,
                // It is not configured any more. Where it is again, this is known of it.
                None if is_quarantined => not_configured(device),
                None => continue,
            };
            let (logical, epoch) = match self.outcome {
                EndOutcome::Preserved => {
                    (before.logical.clone(), Self::epoch_after(entry, index, before.epoch))
                }
                EndOutcome::Replaced => (device.logical.clone(), device.epoch),
                EndOutcome::StateLost if self.may_run(entry, device, &before) => {
                    (device.logical.clone(), device.epoch)
                }
                EndOutcome::StateLost
                    if self.lost.as_ref().is_some_and(|lost| !lost.contains(name))
                        && !self.reset.contains(name) =>
                {
                    (before.logical.clone(), Self::epoch_after(entry, index, before.epoch))
                }
                // Nothing of what was here lives on, or lives on elsewhere: whatever runs now is somebody new.
                EndOutcome::StateLost | EndOutcome::Moved => (new_logical(&core.environment), Epoch(1)),
            };
            let record = DeviceRecord {
                logical,
                epoch,
                rate_bytes_per_second: self.rate_bytes_per_second.or(before.rate_bytes_per_second),
                // Also of one that hangs: after a restart of the agent it answers, and is where nobody knows.
                quarantined: before.quarantined || is_quarantined,
                left_stopped: self.left_stopped && !self.reset.contains(name),
                handed_over: before.handed_over,
                past: before.past.clone(),
            };
            let record = match self.outcome {
                EndOutcome::Replaced => core.back_to_life(record),
                EndOutcome::Moved | EndOutcome::StateLost if self.let_go => {
                    Self::after_hand_over(entry, index, record)
                }
                EndOutcome::StateLost => Self::after_refusal(entry, device, record),
                EndOutcome::Moved | EndOutcome::Preserved => record,
            };
            if known.as_ref() != Some(&record) {
                changes.push(Change::Device(name.clone(), record));
            }
        }
        (record, changes)
    }
}

/// Devices of an operation that take no work at its end, each in the list that says why.
#[derive(Debug, Default)]
struct OutOfService {
    quarantined: Vec<DeviceName>,
    hung: Vec<DeviceName>,
    unavailable: Vec<DeviceName>,
}

impl OutOfService {
    /// `quarantined` are those that the device layer could not bring back, also because they do not answer: which of
    /// them hang their slots know, which were read back meanwhile.
    fn among(devices: &[OperationDeviceRecord], lease: &Lease, quarantined: &[DeviceName]) -> Self {
        let mut out = Self::default();
        for OperationDeviceRecord { device, .. } in devices {
            match slot_of(lease, device).map(|slot| slot.view().standing) {
                Some(Standing::Hung(_)) => out.hung.push(device.clone()),
                // One without a slot is not configured any more.
                Some(Standing::Unavailable(_) | Standing::NotMigratable(_)) | None => {
                    out.unavailable.push(device.clone());
                }
                Some(Standing::Ready | Standing::Quarantined) if quarantined.contains(device) => {
                    out.quarantined.push(device.clone());
                }
                Some(Standing::Ready | Standing::Quarantined) => {}
            }
        }
        out
    }
}

/// The devices that were last seen to stand still: one that hangs since in its reset is not run by that.
pub(in crate::operation) fn standing_still(lease: &Lease) -> Vec<DeviceName> {
    let stands = |slot: &&Arc<Slot>| slot.last_seen().is_some_and(|state| !state.is_running());
    lease.slots().iter().filter(stands).map(|slot| slot.name().clone()).collect()
}

/// What the journal says of devices is what the registry says.
pub(in crate::operation) fn take_over_records(core: &Core, changes: &[Change]) {
    for change in changes {
        match change {
            Change::Device(name, record) => {
                if let Some(slot) = core.registry.get(name) {
                    slot.set_record(record.clone());
                }
            }
            Change::Operation(_)
            | Change::ForgetOperation(_)
            | Change::Request(..)
            | Change::ForgetRequest(_)
            | Change::Debt(..)
            | Change::ForgetDebt(_) => {}
        }
    }
}

fn slot_of<'a>(lease: &'a Lease, name: &DeviceName) -> Option<&'a Arc<Slot>> {
    lease.slots().iter().find(|slot| slot.name() == name)
}

/// What is known of a device of an operation that has no slot.
fn not_configured(device: &OperationDeviceRecord) -> DeviceRecord {
    DeviceRecord {
        logical: device.logical.clone(),
        epoch: device.epoch,
        rate_bytes_per_second: None,
        quarantined: true,
        left_stopped: false,
        handed_over: false,
        past: Vec::new(),
    }
}
