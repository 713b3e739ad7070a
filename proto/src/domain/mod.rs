//! Messages that were validated: what the rest of the system works with.
//!
//! ```text
//!   v1::RestoreRequest --TryFrom--> RestoreSpec { devices: Vec<DeviceName>, manifest: Manifest, … }
//!                          |
//!                          +--> Invalid { field: "manifest.devices[2].fingerprint", problem: … }
//! ```
//!
//! Invariants:
//! - One `TryFrom` per message that comes from a peer. It checks all of it: bounds, enum numbers, uniqueness and what
//!   fields mean together. What it returns needs no second look.
//! - An enum number that this build does not know is refused: it asks for something that would not be done. An
//!   UNSPECIFIED one becomes the default that the .proto file names, or is refused where that names none.
//! - A manifest is hostile input like any other. Its texts are for people, and nothing is found by them.
//!
//! Failure: [`Invalid`] names the first field that is wrong by its path, as a `google.rpc.BadRequest` wants it.

mod checks;
mod device;
mod frame;
mod manifest;
mod migration;
mod query;
mod restore;
mod save;
mod stream;

pub use device::{Backend, DataSize, Fingerprint, LogicalDevice};
pub use frame::{ArmedInterrupts, ConfigSpaceCapture, InterruptKind, Phase, Progress};
pub use manifest::{DeviceManifest, Manifest, SourceDisposition};
pub use migration::{
    AdmitSpec, CommitHandoverSpec, CommitMode, MigrateSpec, MigrationTarget, PrepareSpec, Resolution,
    ResolveSpec, key_hash, secret,
};
pub use query::{
    CheckpointQuery, DirtyReportSpec, DirtyTrackingSpec, Iova, MAX_REPORT_PAGES, OperationQuery, Page,
    PageToken, ResetMode, ResetSpec, WaitSpec, WatchSpec, checkpoint_name, device_name, operation_name,
};
pub use restore::{AfterRestore, RestoreSource, RestoreSpec, check_assigned};
pub use save::{AfterSave, Cutover, MemoryCapture, NoConvergence, PreCopy, SaveRequestSpec};
pub use stream::{StreamLimits, StreamOpen, StreamOpened, StreamRole};

pub(crate) use frame::seal_from_wire;

use std::time::Duration;

/// The longest duration that a request may ask for.
pub const MAX_DURATION: Duration = Duration::from_hours(24);

/// A field of a message is not what it may be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct Invalid {
    /// The path of the field from the message, such as `manifest.devices[2].fingerprint`.
    pub field: String,
    /// What is wrong with it and what to do, as a sentence.
    pub problem: String,
}

impl Invalid {
    /// A problem with a field.
    pub fn new(field: impl Into<String>, problem: impl ToString) -> Self {
        Self { field: field.into(), problem: problem.to_string() }
    }

    /// The same problem, seen from the message that has the other one as its field `outer`.
    #[must_use]
    pub fn within(self, outer: &str) -> Self {
        Self { field: format!("{outer}.{}", self.field), problem: self.problem }
    }
}

#[cfg(test)]
mod tests;
