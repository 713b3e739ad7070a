//! One operation as the agent knows it: what never changes, what does, and what its caller can say.

#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{oneshot, watch};
use vfio_checkpoint_device::{DataSize, Seal};
use vfio_checkpoint_proto::ids::{DeviceName, OperationName};

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
    seat: Mutex<StreamSeat>,
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

/// Why an operation is undone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cancel {
    /// Somebody asked.
    Requested {
        /// Who.
        by: String,
    },
    /// No stream was opened in time.
    NoStream {
        /// How long it was waited for.
        after: Duration,
    },
    /// The agent ends.
    ShuttingDown,
}

impl fmt::Display for Cancel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Requested { by } => write!(f, "{by} asked for it"),
            Self::NoStream { after } => {
                write!(f, "nobody opened its stream within {}", humantime::format_duration(*after))
            }
            Self::ShuttingDown => f.write_str("the agent is shutting down"),
        }
    }
}

/// Why something cannot be said to an operation now.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It is over.
    #[error("it is over")]
    Over,
    /// It is past the point at which it can be undone.
    #[error("it is past its point of no return, in phase {phase:?}; wait for it to end")]
    PastNoReturn {
        /// Where it is.
        phase: Phase,
    },
    /// It is being undone.
    #[error("it is being undone")]
    Undone,
    /// It decides by itself.
    #[error("it was started with AUTO cutover, so it decides by itself when to stop the devices")]
    NotManual,
    /// It has no hold.
    #[error("it was started without a hold, so there is nothing to resume")]
    NoHold,
    /// It is not held yet.
    #[error("it is not held yet, it is in phase {phase:?}; watch it until it is HELD")]
    NotHeld {
        /// Where it is.
        phase: Phase,
    },
    /// Its stream is open, or was.
    #[error("its stream is open already, or was; start another operation")]
    StreamTaken,
}

#[derive(Debug)]
enum StreamSeat {
    Waiting(oneshot::Sender<Attached>),
    Taken,
}

impl Entry {
    /// An admitted operation, and where its stream arrives.
    pub fn new(fixed: Fixed, deadline: UnixMillis) -> (Self, oneshot::Receiver<Attached>) {
        let (seat, arrival) = oneshot::channel();
        let view = View::new(&fixed, Phase::WaitingForStream, Some(deadline));
        (Self::with(fixed, view, StreamSeat::Waiting(seat)), arrival)
    }

    /// An operation out of the journal. It had a stream, and streams do not survive the agent.
    pub fn recorded(record: OperationRecord) -> Self {
        let OperationRecord { name, job, devices, caller, request_id, owner_pod, created, trace_id, step } =
            record;
        let fixed = Fixed { name, job, devices, caller, request_id, owner_pod, created, trace_id };
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
            view.predicted_downtime = end.predicted_downtime;
            view.end = Some(end);
        }
        view.cancellable = matches!(phase, Phase::Held);
        Self::with(fixed, view, StreamSeat::Taken)
    }

    fn with(fixed: Fixed, view: View, seat: StreamSeat) -> Self {
        Self {
            fixed,
            signals: Signals::new(),
            view: watch::Sender::new(view),
            meter: Mutex::default(),
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
        match std::mem::replace(&mut *seat, StreamSeat::Taken) {
            // A task that is gone has ended the operation meanwhile.
            StreamSeat::Waiting(waiting) => waiting.send(attached).map_err(|_| Refused::Over),
            StreamSeat::Taken => Err(Refused::StreamTaken),
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

    /// It is over, and that is on record.
    pub(super) fn end(&self, record: EndRecord) {
        self.change(|view| {
            view.phase = Phase::Done;
            view.deadline = None;
            view.cancellable = false;
            view.predicted_downtime = record.predicted_downtime;
            if let [only] = view.devices.as_mut_slice() {
                only.pre_copy_bytes = record.pre_copy_bytes;
            }
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
        let Fixed { name, job, devices, caller, request_id, owner_pod, created, trace_id } =
            self.fixed.clone();
        let devices = devices
            .into_iter()
            .zip(&self.view.borrow().devices)
            .map(|(device, live)| OperationDeviceRecord { seal: live.seal, ..device })
            .collect();
        OperationRecord { name, job, devices, caller, request_id, owner_pod, created, trace_id, step }
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
