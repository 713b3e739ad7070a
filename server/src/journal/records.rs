//! What the journal keeps of requests, devices and checkpoints. That of operations is
//! [`record`](crate::operation::record).

use serde::{Deserialize, Serialize};
use vfio_checkpoint_proto::ids::{Epoch, LogicalDeviceId, OperationName};

use crate::environment::UnixMillis;

/// A request id, which is its caller's own.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RequestKey {
    /// The identity that used it.
    pub caller: String,
    /// The id.
    pub request_id: String,
}

impl RequestKey {
    /// As the journal's key. No identity holds a line break, so no two keys are the same.
    pub(super) fn text(&self) -> String {
        format!("{}\n{}", self.caller, self.request_id)
    }

    pub(super) fn parse(text: &str) -> Option<Self> {
        let (caller, request_id) = text.split_once('\n')?;
        Some(Self { caller: caller.to_owned(), request_id: request_id.to_owned() })
    }
}

/// What a request id stands for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RequestRecord {
    /// Digest of the request without the id, as 64 hexadecimal digits.
    pub digest: String,
    /// When it came.
    pub at: UnixMillis,
    /// What it brought.
    pub answer: RequestAnswer,
}

/// What a request brought.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum RequestAnswer {
    /// An operation.
    Operation(OperationName),
    /// A device was reset.
    Reset {
        /// Whether its state is gone. None while the reset was under way: the agent ended before it was known.
        state_lost: Option<bool>,
    },
}

/// What is to be done to a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Owed {
    /// To mark it INCONSISTENT.
    Inconsistent,
    /// To discard it. It goes beyond a mark.
    Discard,
}

/// What is still to be done to a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DebtRecord {
    /// That.
    pub owed: Owed,
}

/// What lives in a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceRecord {
    /// The logical device.
    pub logical: LogicalDeviceId,
    /// Its epoch.
    pub epoch: Epoch,
    /// What its state moved at, the last time that was measured.
    pub rate_bytes_per_second: Option<u64>,
    /// It waits for somebody to decide.
    pub quarantined: bool,
    /// It was left stopped on request.
    pub left_stopped: bool,
    /// It may still carry what was handed over to another agent, where that runs: nothing but a reset is good for it.
    #[serde(default, skip_serializing_if = "is_false")]
    pub handed_over: bool,
    /// What lived in it before, as far as it has to be known whether that may run still. The last is the newest.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub past: Vec<PastRecord>,
}

/// A logical device that a reset discarded, that was handed over, or that was brought back to life after that.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PastRecord {
    /// Which logical device.
    pub logical: LogicalDeviceId,
    /// Under which epoch.
    pub epoch: Epoch,
    /// It was discarded while nobody else could have it.
    pub runs_nowhere: bool,
    /// It was handed over to another agent, and the epoch is the one under which it runs there.
    #[serde(default, skip_serializing_if = "is_false")]
    pub handed_over: bool,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "the signature that serde asks for")]
fn is_false(flag: &bool) -> bool {
    !flag
}

impl DeviceRecord {
    /// The most that is kept of the past. What is forgotten counts as running somewhere, which is the safe side.
    pub(super) const MAX_PAST: usize = 64;

    /// The record of a device whose state was discarded: `new` lives in it.
    #[must_use]
    pub fn after_discard(self, new: LogicalDeviceId) -> Self {
        // What was left stopped, or stands still because nobody knows what it is, may have been brought to run elsewhere
        // meanwhile: that it is discarded here says nothing of that.
        let runs_nowhere = !self.left_stopped && !self.quarantined;
        let (logical, epoch) = (self.logical.clone(), self.epoch);
        let past = PastRecord { logical, epoch, runs_nowhere, handed_over: false };
        Self { logical: new, epoch: Epoch(1), handed_over: false, ..self }.with_past(past)
    }

    /// Notes what became of a logical device.
    #[must_use]
    pub fn with_past(mut self, past: PastRecord) -> Self {
        self.past.retain(|before| before.logical != past.logical);
        self.past.push(past);
        if self.past.len() > Self::MAX_PAST {
            // One that may run somewhere is what keeps an older record, of another device, from being believed.
            let first = self.past.iter().position(|past| past.runs_nowhere).unwrap_or(0);
            self.past.remove(first);
        }
        self
    }
}
