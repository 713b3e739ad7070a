//! One operation as the agent knows it: what never changes, what does, and what its caller can say.

mod said;
#[cfg(test)]
mod tests;

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{oneshot, watch};
use vfio_checkpoint_device::{DataSize, Seal};
use vfio_checkpoint_proto::ids::{CheckpointName, DeviceName, OperationName};

pub use said::{Cancel, Refused};

use super::meter::{Meter, time_for};
use super::record::{
    AfterRecord, EndRecord, JobRecord, OperationDeviceRecord, OperationRecord, RecordedStep,
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
}

/// What changes of an operation.
#[derive(Debug, Clone)]
pub struct View {
    /// Where it is.
    pub phase: Phase,
    /// Its devices, in the order of the set.
    pub devices: Vec<Live>,
    /// Bytes a second over the last seconds.
    pub rate_bytes_per_second: u64,
    /// How long the devices are expected to stand still.
    pub predicted_downtime: Option<Duration>,
    /// When what is waited for ends by itself.
    pub deadline: Option<UnixMillis>,
    /// Whether it can still be undone.
    pub cancellable: bool,
    /// How it ended.
    pub end: Option<EndRecord>,
    /// Rises with each change.
    pub revision: u64,
}

/// How far one device is.
#[derive(Debug, Clone, Copy)]
pub struct Live {
    /// Bytes moved.
    pub moved_bytes: u64,
    /// Of these, while it ran.
    pub pre_copy_bytes: u64,
    /// Bytes in all.
    pub total: DataSize,
    /// The seal on its state.
    pub seal: Option<Seal>,
}

/// Where an operation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Admitted; nothing has been touched.
    WaitingForStream,
    /// Admitted; the store is made ready, and nothing has been touched.
    Preparing,
    /// Devices run, and their state is read.
    PreCopy,
    /// Devices run; the caller has to say Cutover.
    WaitingForCutover,
    /// Devices are quiesced and stopped.
    Stopping,
    /// Devices stand still and the rest of their state is read.
    StopCopy,
    /// The taker makes it durable.
    Sealing,
    /// Stopped or loaded, until Resume.
    Held,
    /// The hold ran out.
    Marking,
    /// State is written to devices.
    Loading,
    /// Lengths and digests are compared, and what the state does not hold is set.
    Verifying,
    /// Devices are on their way to RUNNING.
    Resuming,
    /// Devices are brought back.
    Unwinding,
    /// Over.
    Done,
}

#[derive(Debug)]
enum StreamSeat {
    Waiting(oneshot::Sender<Attached>),
    Taken,
    /// Its state is kept in a store.
    None,
}

impl Entry {
    /// An admitted operation, and where its stream arrives.
    pub fn new(fixed: Fixed, deadline: UnixMillis) -> (Self, oneshot::Receiver<Attached>) {
        let (seat, arrival) = oneshot::channel();
        let entry = if fixed.checkpoint.is_some() {
            let view = View::new(&fixed, Phase::Preparing, None);
            Self::with(fixed, view, StreamSeat::None)
        } else {
            let view = View::new(&fixed, Phase::WaitingForStream, Some(deadline));
            Self::with(fixed, view, StreamSeat::Waiting(seat))
        };
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
            step,
        } = record;
        let fixed =
            Fixed { name, job, devices, caller, request_id, owner_pod, created, trace_id, checkpoint };
        let stopped_at = match &step {
            RecordedStep::Held { stopped_at, .. } => *stopped_at,
            RecordedStep::Admitted
            | RecordedStep::Begun
            | RecordedStep::Running { .. }
            | RecordedStep::Stopped
            | RecordedStep::Ended(_) => None,
        };
        let (phase, deadline) = match &step {
            RecordedStep::Admitted | RecordedStep::Begun => (Phase::Unwinding, None),
            RecordedStep::Held { deadline, .. } => (Phase::Held, Some(*deadline)),
            RecordedStep::Running { .. } | RecordedStep::Stopped => (Phase::Resuming, None),
            RecordedStep::Ended(_) => (Phase::Done, None),
        };
        let mut view = View::new(&fixed, phase, deadline);
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
        view.cancellable = matches!(phase, Phase::Held);
        let entry = Self::with(fixed, view, StreamSeat::Taken);
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
        }
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

    /// Hands over the operation's stream, once.
    pub fn attach(&self, attached: Attached) -> Result<(), Refused> {
        if self.is_done() {
            return Err(Refused::Over);
        }
        let mut seat = self.seat.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(*seat, StreamSeat::None) {
            return Err(Refused::NoStream);
        }
        match std::mem::replace(&mut *seat, StreamSeat::Taken) {
            // A task that is gone has ended the operation meanwhile.
            StreamSeat::Waiting(waiting) => waiting.send(attached).map_err(|_| Refused::Over),
            StreamSeat::Taken | StreamSeat::None => Err(Refused::StreamTaken),
        }
    }

    /// Says Cutover.
    pub fn cutover(&self) -> Result<(), Refused> {
        if !self.is_manual() {
            return Err(Refused::NotManual);
        }
        let view = self.view();
        if view.end.is_some() {
            return Err(Refused::Over);
        }
        // Also where its task has not come to it yet: what was undone first is not cut over.
        if view.phase == Phase::Unwinding || self.signals.cancel_reason().is_some() {
            return Err(Refused::Undone);
        }
        self.signals.say_cutover();
        Ok(())
    }

    /// Says Resume.
    pub fn resume(&self) -> Result<(), Refused> {
        match self.fixed.job {
            JobRecord::Save { after: AfterRecord::Hold, .. } | JobRecord::Restore { hold: true, .. } => {}
            JobRecord::Save { after: AfterRecord::Resume | AfterRecord::StayStopped, .. }
            | JobRecord::Restore { hold: false, .. } => return Err(Refused::NoHold),
        }
        let view = self.view();
        match view.phase {
            Phase::Held if self.signals.cancel_reason().is_some() => Err(Refused::Undone),
            Phase::Held => {
                self.signals.say_resume();
                Ok(())
            }
            // Said again while it has its effect. A hold that ran out ends without it, and is worth less.
            Phase::Resuming if self.signals.is_resumed() => Ok(()),
            Phase::Done => Err(Refused::Over),
            Phase::Resuming
            | Phase::WaitingForStream
            | Phase::Preparing
            | Phase::PreCopy
            | Phase::WaitingForCutover
            | Phase::Stopping
            | Phase::StopCopy
            | Phase::Sealing
            | Phase::Marking
            | Phase::Loading
            | Phase::Verifying
            | Phase::Unwinding => Err(Refused::NotHeld { phase: view.phase }),
        }
    }

    /// Says Cancel. An operation that is being undone already takes it as said again.
    pub fn cancel(&self, why: Cancel) -> Result<(), Refused> {
        let view = self.view();
        if view.end.is_some() {
            return Err(Refused::Over);
        }
        if !view.cancellable && view.phase != Phase::Unwinding {
            return Err(Refused::PastNoReturn { phase: view.phase });
        }
        self.signals.say_cancel(why);
        Ok(())
    }

    /// Takes in how much state of a device is expected.
    pub(super) fn expects(&self, device: usize, total: DataSize) {
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
    pub(super) fn predicts(&self, downtime: Duration) {
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
            JobRecord::Save { manual_cutover, .. } => manual_cutover,
            JobRecord::Restore { .. } => false,
        }
    }

    /// As the journal keeps it, at `step`.
    pub fn record(&self, step: RecordedStep) -> OperationRecord {
        let Fixed { name, job, devices, caller, request_id, owner_pod, created, trace_id, checkpoint } =
            self.fixed.clone();
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
            step,
        }
    }

    /// The names of its devices.
    pub fn device_names(&self) -> impl Iterator<Item = &DeviceName> {
        self.fixed.devices.iter().map(|device| &device.device)
    }
}

impl View {
    fn new(fixed: &Fixed, phase: Phase, deadline: Option<UnixMillis>) -> Self {
        let live = Live { moved_bytes: 0, pre_copy_bytes: 0, total: DataSize::Unknown, seal: None };
        Self {
            phase,
            devices: vec![live; fixed.devices.len()],
            rate_bytes_per_second: 0,
            predicted_downtime: None,
            deadline,
            cancellable: true,
            end: None,
            revision: 1,
        }
    }

    /// Bytes moved by all devices.
    pub fn moved_bytes(&self) -> u64 {
        self.devices.iter().fold(0, |sum, live| sum.saturating_add(live.moved_bytes))
    }

    /// Bytes in all, as far as they are known: as sure as the least sure of the devices.
    pub fn total(&self) -> DataSize {
        total(self.devices.iter().map(|live| live.total))
    }

    /// When it will be done with moving.
    pub fn eta(&self) -> Option<Duration> {
        let left = self.total().bytes()?.saturating_sub(self.moved_bytes());
        match self.phase {
            Phase::PreCopy | Phase::StopCopy | Phase::Loading => time_for(left, self.rate_bytes_per_second),
            Phase::WaitingForStream
            | Phase::Preparing
            | Phase::WaitingForCutover
            | Phase::Stopping
            | Phase::Sealing
            | Phase::Held
            | Phase::Marking
            | Phase::Verifying
            | Phase::Resuming
            | Phase::Unwinding
            | Phase::Done => None,
        }
    }
}

/// The sum of sizes, as sure as the least sure of them.
pub(super) fn total(sizes: impl IntoIterator<Item = DataSize>) -> DataSize {
    sizes.into_iter().fold(DataSize::Known(0), |sum, size| match (sum, size) {
        (DataSize::Unknown, _) | (_, DataSize::Unknown) => DataSize::Unknown,
        (DataSize::Known(a), DataSize::Known(b)) => DataSize::Known(a.saturating_add(b)),
        (DataSize::Known(a) | DataSize::UpperBound(a), DataSize::Known(b) | DataSize::UpperBound(b)) => {
            DataSize::UpperBound(a.saturating_add(b))
        }
    })
}
