//! One operation as the agent knows it: what never changes, what does, and what its caller can say.

mod said;
mod seat;
#[cfg(test)]
mod tests;
mod view;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{oneshot, watch};
use vfio_checkpoint_device::{DataSize, Seal};
use vfio_checkpoint_fsm::handover::ArrivalStep;
use vfio_checkpoint_proto::ids::{CheckpointName, DeviceName, OperationName};

pub use said::{Cancel, Refused};
pub use seat::{Opener, Reserved};
pub(super) use view::total;
pub use view::{Handover, Live, Phase, View};

use seat::StreamSeat;

use super::meter::Meter;
use super::record::{
    EndRecord, HandoverRecord, JobRecord, OperationDeviceRecord, OperationRecord, PeerRecord, RecordedStep,
};
use super::signals::Signals;
use crate::environment::UnixMillis;
use crate::transfer::Attached;

/// An operation that is running, or over.
#[derive(Debug)]
pub struct Entry {
    /// What never changes.
    pub fixed: Fixed,
    /// What its caller says.
    pub signals: Signals,
    view: watch::Sender<View>,
    meter: Mutex<Meter>,
    stopped: Mutex<Option<Stopped>>,
    seat: Mutex<StreamSeat>,
    /// What the journal says of it: the phase that its caller sees says less.
    on_record: Mutex<RecordedStep>,
    /// Whether its devices were told to run what it brings. It says nothing of an earlier life of the agent.
    told_to_run: AtomicBool,
    /// Held while something of it is put on record, so that what is written last is what is true last.
    pub(crate) recording: tokio::sync::Mutex<()>,
    /// Held while the farewell of a migration is said.
    pub(crate) parting: tokio::sync::Mutex<()>,
}

/// Since when the devices stand still.
#[derive(Debug, Clone, Copy)]
struct Stopped {
    at: UnixMillis,
    /// By the monotonic clock, where it was in this life of the agent.
    since: Option<Duration>,
}

/// What never changes of an operation.
#[derive(Debug, Clone)]
pub struct Fixed {
    /// Which one.
    pub name: OperationName,
    /// What it does.
    pub job: JobRecord,
    /// Its devices, in the caller's order, with the logical devices that they carry.
    pub devices: Vec<OperationDeviceRecord>,
    /// Who started it.
    pub caller: String,
    /// The caller's request id.
    pub request_id: Option<String>,
    /// The pod that uses the devices.
    pub owner_pod: String,
    /// When it was started.
    pub created: UnixMillis,
    /// The trace that it belongs to.
    pub trace_id: Option<String>,
    /// The checkpoint in a store that it makes or takes. None where its state goes over a stream.
    pub checkpoint: Option<CheckpointName>,
    /// Who is at the other side, where its devices move from node to node.
    pub peer: Option<PeerRecord>,
}

impl Entry {
    /// An admitted operation, and where its stream arrives.
    pub fn new(
        fixed: Fixed,
        handover: Option<HandoverRecord>,
        deadline: UnixMillis,
    ) -> (Self, oneshot::Receiver<Attached>) {
        let (seat, arrival) = oneshot::channel();
        let calls = matches!(fixed.job, JobRecord::Migrate { .. });
        let entry = if fixed.checkpoint.is_some() || calls {
            let view = View::new(&fixed, Phase::Preparing, None);
            Self::with(fixed, view, StreamSeat::None)
        } else {
            let view = View::new(&fixed, Phase::WaitingForStream, Some(deadline));
            Self::with(fixed, view, StreamSeat::Waiting(seat))
        };
        entry.view.send_modify(|view| view.handover = handover.map(Handover::new));
        (entry, arrival)
    }

    /// An operation out of the journal. It had a stream, and streams do not survive the agent.
    pub fn recorded(record: OperationRecord) -> Self {
        let OperationRecord {
            name,
            job,
            devices,
            caller,
            request_id,
            owner_pod,
            created,
            trace_id,
            checkpoint,
            handover,
            step,
        } = record;
        let handover = handover.map(|handover| *handover);
        let peer = handover.as_ref().map(|handover| handover.peer.clone());
        let fixed =
            Fixed { name, job, devices, caller, request_id, owner_pod, created, trace_id, checkpoint, peer };
        let stopped_at = match &step {
            RecordedStep::Held { stopped_at, .. } => *stopped_at,
            RecordedStep::Committing => handover.as_ref().and_then(|handover| handover.stopped),
            RecordedStep::Admitted
            | RecordedStep::Begun
            | RecordedStep::Running { .. }
            | RecordedStep::Stopped
            | RecordedStep::LettingGo
            | RecordedStep::Reverting
            | RecordedStep::Ended(_) => None,
        };
        let arrives = matches!(job, JobRecord::Arrive { .. });
        let counts = step.clone().until_ready(owes_ready(job, handover.as_ref()));
        let (phase, deadline) = match &counts {
            RecordedStep::Admitted | RecordedStep::Begun | RecordedStep::Reverting => {
                (Phase::Unwinding, None)
            }
            RecordedStep::Held { deadline, .. } if arrives => (Phase::Prepared, Some(*deadline)),
            RecordedStep::Held { deadline, .. } => (Phase::Held, Some(*deadline)),
            RecordedStep::Running { .. } if arrives => (Phase::Committing, None),
            RecordedStep::Running { .. } | RecordedStep::Stopped => (Phase::Resuming, None),
            RecordedStep::Committing => (Phase::Committing, None),
            RecordedStep::LettingGo => (Phase::LettingGo, None),
            RecordedStep::Ended(_) => (Phase::Done, None),
        };
        let mut view = View::new(&fixed, phase, deadline);
        view.handover = handover.map(Handover::new);
        if let (RecordedStep::Committing, Some(handover)) = (&step, &mut view.handover) {
            handover.in_doubt = true;
            "the agent was restarted, and asks the destination".clone_into(&mut handover.doubt);
        }
        let on_record = step.clone();
        for (live, device) in view.devices.iter_mut().zip(&fixed.devices) {
            live.seal = device.seal;
            if let Some(seal) = device.seal {
                live.moved_bytes = seal.bytes;
                live.total = DataSize::Known(seal.bytes);
            }
        }
        if let RecordedStep::Ended(end) = step {
            for (live, moved) in view.devices.iter_mut().zip(&end.moved_bytes) {
                live.moved_bytes = *moved;
            }
            let mut pre_copied = end.device_pre_copy_bytes.as_slice();
            if let ([], [_only]) = (pre_copied, view.devices.as_slice()) {
                pre_copied = std::slice::from_ref(&end.pre_copy_bytes);
            }
            for (live, bytes) in view.devices.iter_mut().zip(pre_copied) {
                live.pre_copy_bytes = *bytes;
            }
            view.revision = end.revision.max(1);
            view.predicted_downtime = end.predicted_downtime;
            view.end = Some(end);
        }
        view.cancellable = matches!(phase, Phase::Held | Phase::Prepared);
        let entry = Self::with(fixed, view, StreamSeat::Taken);
        entry.set_on_record(on_record);
        if let Some(at) = stopped_at {
            entry.note_stopped(at, None);
        }
        entry
    }

    fn with(fixed: Fixed, view: View, seat: StreamSeat) -> Self {
        Self {
            fixed,
            signals: Signals::new(),
            view: watch::Sender::new(view),
            meter: Mutex::default(),
            stopped: Mutex::default(),
            seat: Mutex::new(seat),
            on_record: Mutex::new(RecordedStep::Admitted),
            told_to_run: AtomicBool::new(false),
            recording: tokio::sync::Mutex::default(),
            parting: tokio::sync::Mutex::default(),
        }
    }

    /// What the journal says of it.
    pub fn on_record(&self) -> RecordedStep {
        self.on_record.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The journal says so from now on.
    pub(crate) fn set_on_record(&self, step: RecordedStep) {
        *self.on_record.lock().unwrap_or_else(PoisonError::into_inner) = step;
    }

    /// Its devices are about to be told to run what it brings.
    pub(super) fn set_told_to_run(&self) {
        self.told_to_run.store(true, Ordering::Release);
    }

    /// Whether its devices were told to run what it brings, in this life of the agent.
    pub(super) fn is_told_to_run(&self) -> bool {
        self.told_to_run.load(Ordering::Acquire)
    }

    /// Takes in what became of the hand-over.
    pub(crate) fn hand_over(&self, change: impl FnOnce(&mut Handover)) {
        self.view.send_if_modified(|view| {
            let Some(handover) = &mut view.handover else { return false };
            change(handover);
            view.revision += 1;
            true
        });
    }

    /// Nobody will ask any more how it ended, or, of a migration, the destination knows that. That is told to nobody, so it is
    /// no change.
    pub(crate) fn settled(&self) {
        self.view.send_if_modified(|view| {
            if let Some(handover) = &mut view.handover {
                handover.record.settled = true;
            }
            false
        });
    }

    /// As it is now.
    pub fn view(&self) -> View {
        self.view.borrow().clone()
    }

    /// Tells when it changes.
    pub fn changes(&self) -> watch::Receiver<View> {
        self.view.subscribe()
    }

    /// Whether it is over.
    pub fn is_done(&self) -> bool {
        self.view.borrow().end.is_some()
    }

    /// Changes the view.
    pub(super) fn change(&self, change: impl FnOnce(&mut View)) {
        self.view.send_modify(|view| {
            change(view);
            view.revision += 1;
        });
    }

    /// Takes in how many bytes have moved by `now`, a reading of the monotonic clock.
    pub(super) fn meter(&self, now: Duration, moved_bytes: u64) -> u64 {
        let mut meter = self.meter.lock().unwrap_or_else(PoisonError::into_inner);
        meter.sample(now, moved_bytes);
        meter.rate()
    }

    /// Takes in how much state of a device is expected.
    pub(crate) fn expects(&self, device: usize, total: DataSize) {
        self.change(|view| {
            if let Some(live) = view.devices.get_mut(device) {
                live.total = total;
            }
        });
    }

    /// It is held still, for this long from `now` on: a hold that was taken up.
    pub(super) fn held_on(&self, now: UnixMillis, left: Duration) {
        self.change(|view| view.deadline = view.deadline.map(|deadline| deadline.min(now.after(left))));
    }

    /// Its hold has begun anew, and lasts until then.
    pub(crate) fn held_until(&self, deadline: UnixMillis) {
        self.change(|view| view.deadline = Some(deadline));
    }

    /// Its devices are about to stop.
    pub(super) fn note_stopped(&self, at: UnixMillis, since: Option<Duration>) {
        *self.stopped.lock().unwrap_or_else(PoisonError::into_inner) = Some(Stopped { at, since });
    }

    /// When its devices were stopped, where it is known.
    pub(super) fn stopped_at(&self) -> Option<UnixMillis> {
        self.stopped.lock().unwrap_or_else(PoisonError::into_inner).map(|stopped| stopped.at)
    }

    /// For how long its devices have stood still by `now`, on both clocks, where it is known.
    pub(super) fn stood_still(&self, now: UnixMillis, monotonic: Duration) -> Option<Duration> {
        let stopped = (*self.stopped.lock().unwrap_or_else(PoisonError::into_inner))?;
        Some(match stopped.since {
            Some(since) => monotonic.saturating_sub(since),
            None => now.remaining(stopped.at),
        })
    }

    /// How long its devices will stand still, as is known before.
    pub(crate) fn predicts(&self, downtime: Duration) {
        self.change(|view| view.predicted_downtime = Some(downtime));
    }

    /// It is over, and that is on record.
    pub(super) fn end(&self, record: EndRecord) {
        self.change(|view| {
            view.phase = Phase::Done;
            view.deadline = None;
            view.cancellable = false;
            view.predicted_downtime = record.predicted_downtime;
            // The change itself counts: what is told now is what a later life of the agent tells.
            view.revision = view.revision.max(record.revision.saturating_sub(1));
            view.end = Some(record);
        });
    }

    /// Takes in the seal on a device's state.
    pub fn sealed(&self, device: usize, seal: Seal) {
        self.change(|view| {
            if let Some(live) = view.devices.get_mut(device) {
                live.seal = Some(seal);
                live.total = DataSize::Known(seal.bytes);
            }
        });
    }

    /// Whether its caller says when to stop the devices.
    pub fn is_manual(&self) -> bool {
        match self.fixed.job {
            JobRecord::Save { manual_cutover, .. } | JobRecord::Migrate { manual_cutover, .. } => {
                manual_cutover
            }
            JobRecord::Restore { .. } | JobRecord::Arrive { .. } => false,
        }
    }

    /// As the journal keeps it, at `step`.
    pub fn record(&self, step: RecordedStep) -> OperationRecord {
        let Fixed {
            name,
            job,
            devices,
            caller,
            request_id,
            owner_pod,
            created,
            trace_id,
            checkpoint,
            peer: _,
        } = self.fixed.clone();
        let handover = self.view.borrow().handover.as_ref().map(|handover| handover.record.clone());
        let devices = devices
            .into_iter()
            .zip(&self.view.borrow().devices)
            .map(|(device, live)| OperationDeviceRecord { seal: live.seal, ..device })
            .collect();
        OperationRecord {
            name,
            job,
            devices,
            caller,
            request_id,
            owner_pod,
            created,
            trace_id,
            checkpoint,
            handover: handover.map(Box::new),
            step,
        }
    }

    /// Whether its source may still ask how it ended.
    pub fn is_owed(&self) -> bool {
        let view = self.view.borrow();
        let arrives = matches!(self.fixed.job, JobRecord::Arrive { .. });
        let asked = view.handover.as_ref().map(|handover| &handover.record);
        arrives && asked.is_some_and(|record| record.prepared.is_some() && !record.settled)
    }

    /// How far an arrival is. Over only once that is on record, and loading until Ready is, where that is to be said.
    pub fn arrival_step(&self) -> ArrivalStep {
        // In this order: where its end is on record, its verdict was there before.
        let step = self.on_record().until_ready(self.owes_ready());
        let handover = self.view().handover;
        step.arrival(handover.and_then(|handover| handover.record.verdict))
    }

    /// Whether it is a migration that is over, and whose destination does not know yet that nobody will ask it again.
    pub fn owes_farewell(&self) -> bool {
        let view = self.view.borrow();
        let leaves = matches!(self.fixed.job, JobRecord::Migrate { .. }) && view.end.is_some();
        let told = view.handover.as_ref().map(|handover| &handover.record);
        // Without a secret nothing was prepared there, and nobody is to be told.
        leaves && told.is_some_and(|record| record.secret.is_some() && !record.settled)
    }

    /// Whether it is an arrival of which Ready is to be said, and is not on record. Until then its source is told nothing,
    /// so it is no further than loading, whatever else is on record of it.
    pub fn owes_ready(&self) -> bool {
        owes_ready(self.fixed.job, self.view.borrow().handover.as_ref().map(|handover| &handover.record))
    }

    /// The names of its devices.
    pub fn device_names(&self) -> impl Iterator<Item = &DeviceName> {
        self.fixed.devices.iter().map(|device| &device.device)
    }
}

fn owes_ready(job: JobRecord, handover: Option<&HandoverRecord>) -> bool {
    let wanted = matches!(job, JobRecord::Arrive { require_ready: true, .. });
    wanted && handover.is_some_and(|handover| !handover.ready)
}
