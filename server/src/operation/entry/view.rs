//! What changes of an operation, as whoever asks sees it.

use std::time::Duration;

use vfio_checkpoint_device::{DataSize, Seal};

use super::Fixed;
use crate::environment::UnixMillis;
use crate::operation::meter::time_for;
use crate::operation::record::{EndRecord, HandoverRecord};

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
    /// How far it and the other side are, where there is one.
    pub handover: Option<Handover>,
    /// Rises with each change.
    pub revision: u64,
}

/// How far the two sides of a hand-over are.
#[derive(Debug, Clone)]
pub struct Handover {
    /// All that is kept of it.
    pub record: HandoverRecord,
    /// `CommitHandover` was sent, and its answer is not known or leaves open what runs.
    pub in_doubt: bool,
    /// What was heard last, where something is wrong.
    pub doubt: String,
    /// An arrival waits for Ready.
    pub awaits_ready: bool,
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
    /// The destination has all, and waits for the commit.
    Prepared,
    /// The destination was told to run the devices, or may have been.
    Committing,
    /// The destination runs them; those of the source are reset.
    LettingGo,
    /// Devices are brought back.
    Unwinding,
    /// Over.
    Done,
}

impl View {
    pub(super) fn new(fixed: &Fixed, phase: Phase, deadline: Option<UnixMillis>) -> Self {
        let live = Live { moved_bytes: 0, pre_copy_bytes: 0, total: DataSize::Unknown, seal: None };
        Self {
            phase,
            devices: vec![live; fixed.devices.len()],
            rate_bytes_per_second: 0,
            predicted_downtime: None,
            deadline,
            cancellable: true,
            end: None,
            handover: None,
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
            | Phase::Prepared
            | Phase::Committing
            | Phase::LettingGo
            | Phase::Unwinding
            | Phase::Done => None,
        }
    }
}

impl Handover {
    /// As it is on record.
    pub fn new(record: HandoverRecord) -> Self {
        Self { record, in_doubt: false, doubt: String::new(), awaits_ready: false }
    }
}

/// The sum of sizes, as sure as the least sure of them.
pub(in crate::operation) fn total(sizes: impl IntoIterator<Item = DataSize>) -> DataSize {
    sizes.into_iter().fold(DataSize::Known(0), |sum, size| match (sum, size) {
        (DataSize::Unknown, _) | (_, DataSize::Unknown) => DataSize::Unknown,
        (DataSize::Known(a), DataSize::Known(b)) => DataSize::Known(a.saturating_add(b)),
        (DataSize::Known(a) | DataSize::UpperBound(a), DataSize::Known(b) | DataSize::UpperBound(b)) => {
            DataSize::UpperBound(a.saturating_add(b))
        }
    })
}
