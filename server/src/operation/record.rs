//! What the journal keeps of an operation: all that a later life of the agent needs to bring it to a named end.
//!
//! ```text
//!   Admitted -> Begun -> Held -> Running -> Ended
//!       \-----------------------/ ^            ^
//!        \------------------------------------/
//!
//!   a migration:  Begun -> Committing -> LettingGo -> Ended       back to Begun where the destination refused
//!   an arrival:   Begun -> Held -> Running -> Ended               Running -> Reverting -> Ended where none ran
//! ```
//! A step is durable before the command that it announces is executed. What is not recorded (how many bytes, which round)
//! is not needed: a stream never survives the agent, so all before [`RecordedStep::Held`] is undone in the same way.
//!
//! The record is its own type, not the one that the agent works with and not the wire's: a journal is read by later
//! versions of the agent.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vfio_checkpoint_device::Seal;
use vfio_checkpoint_fsm::handover::{ArrivalStep, OfferStep, Verdict};
use vfio_checkpoint_proto::ids::{
    CheckpointName, DeviceName, Epoch, KeyHash, LogicalDeviceId, OperationName, Ticket,
};

use crate::environment::UnixMillis;

/// An operation in the journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OperationRecord {
    /// Which one.
    pub name: OperationName,
    /// What it does.
    pub job: JobRecord,
    /// Its devices, in the caller's order.
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
    #[serde(default)]
    pub checkpoint: Option<CheckpointName>,
    /// The other side, where its devices move from node to node.
    #[serde(default)]
    pub handover: Option<Box<HandoverRecord>>,
    /// How far it is.
    pub step: RecordedStep,
}

/// What an operation does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum JobRecord {
    /// State out of devices.
    Save {
        /// Read state while the devices run.
        pre_copy: bool,
        /// Whether all devices have the P2P states.
        barrier: bool,
        /// The caller says when to stop.
        manual_cutover: bool,
        /// What comes after.
        after: AfterRecord,
    },
    /// State into devices.
    Restore {
        /// Whether the set goes through RUNNING_P2P.
        barrier: bool,
        /// Loaded devices wait for Resume.
        hold: bool,
    },
    /// Devices to another node.
    Migrate {
        /// Read state while the devices run.
        pre_copy: bool,
        /// Whether all devices have the P2P states.
        barrier: bool,
        /// The caller says when to stop.
        manual_cutover: bool,
        /// The caller says when the destination may run them.
        manual_commit: bool,
    },
    /// Devices from another node.
    Arrive {
        /// Whether the set goes through RUNNING_P2P.
        barrier: bool,
        /// Whoever uses the devices says Ready before the source is told Prepared.
        require_ready: bool,
    },
}

impl JobRecord {
    /// Whether state comes out of the devices.
    pub fn gives(self) -> bool {
        match self {
            Self::Save { .. } | Self::Migrate { .. } => true,
            Self::Restore { .. } | Self::Arrive { .. } => false,
        }
    }
}

/// The other side of a migration or an arrival.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HandoverRecord {
    /// Who it is.
    pub peer: PeerRecord,
    /// Its operation. Of a migration it is known once the destination has answered Prepare.
    pub operation: Option<OperationName>,
    /// Proves to the destination who prepared.
    pub secret: Option<Ticket>,
    /// The epochs under which the devices run at the destination, in the order of the set.
    pub epochs: Vec<Epoch>,
    /// When the devices of the source were stopped, at the source.
    pub stopped: Option<UnixMillis>,
    /// When the destination had all.
    pub prepared: Option<UnixMillis>,
    /// How it ended at the destination, as far as is known here.
    pub verdict: Option<VerdictRecord>,
    /// What an admin decided.
    pub resolution: Option<ResolutionRecord>,
    /// At the destination: the source has its own end on record. At the source: the destination knows that, or has nothing on
    /// record any more. False there in records of before it was kept.
    pub settled: bool,
    /// At the destination: who asked for the ticket. None in records of before it was kept.
    #[serde(default)]
    pub admitted_by: Option<String>,
    /// At the destination: what the source has prepared, in hexadecimals. None in records of before it was kept.
    #[serde(default)]
    pub body_digest: Option<String>,
    /// At the destination: whoever uses the devices has said Ready.
    #[serde(default)]
    pub ready: bool,
    /// State sent again after a connection broke.
    pub resent_bytes: u64,
    /// How often the stream was taken up again.
    pub reconnects: u32,
}

impl HandoverRecord {
    /// Nothing but who is there.
    pub fn new(peer: PeerRecord) -> Self {
        Self {
            peer,
            operation: None,
            secret: None,
            epochs: Vec::new(),
            stopped: None,
            prepared: None,
            verdict: None,
            resolution: None,
            settled: false,
            admitted_by: None,
            body_digest: None,
            ready: false,
            resent_bytes: 0,
            reconnects: 0,
        }
    }
}

/// Who is at the other side.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum PeerRecord {
    /// The destination.
    Destination {
        /// Where it is.
        endpoint: String,
        /// Who must be there. None for whoever has the host's name.
        spiffe_id: Option<String>,
        /// The key of the agent that admitted the devices, as the caller says. None in records of before it was asked for.
        #[serde(default)]
        key: Option<KeyHash>,
    },
    /// The source.
    Source {
        /// The key that it showed.
        key: KeyHash,
    },
}

/// How a hand-over ended at the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VerdictRecord {
    /// Every device runs with the state.
    Committed,
    /// No device runs with it, and none will.
    Refused,
    /// They may have run, and what they had is gone.
    Lost,
    /// Some may run, and not all do.
    Broken,
}

impl From<Verdict> for VerdictRecord {
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Committed => Self::Committed,
            Verdict::Refused => Self::Refused,
            Verdict::Lost => Self::Lost,
            Verdict::Broken => Self::Broken,
        }
    }
}

impl From<VerdictRecord> for Verdict {
    fn from(verdict: VerdictRecord) -> Self {
        match verdict {
            VerdictRecord::Committed => Self::Committed,
            VerdictRecord::Refused => Self::Refused,
            VerdictRecord::Lost => Self::Lost,
            VerdictRecord::Broken => Self::Broken,
        }
    }
}

/// What an admin decided about a migration in doubt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResolutionRecord {
    /// The devices of the source run again. Otherwise they are let go of.
    pub resume_here: bool,
    /// Who.
    pub by: String,
    /// When.
    pub at: UnixMillis,
    /// What they answer for, in their own words. Empty where the destination's own word was enough.
    pub statement: String,
}

impl fmt::Display for ResolutionRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = if self.resume_here { "resume here" } else { "let go" };
        write!(f, "{what}, decided by {}", self.by)?;
        if self.statement.is_empty() { Ok(()) } else { write!(f, ": {}", self.statement) }
    }
}

/// What becomes of saved devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AfterRecord {
    /// They run on.
    Resume,
    /// They wait for Resume.
    Hold,
    /// They stay stopped.
    StayStopped,
}

/// A device of an operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OperationDeviceRecord {
    /// Which one.
    pub device: DeviceName,
    /// The logical device that is saved, or that the restored state is of.
    pub logical: LogicalDeviceId,
    /// Its epoch: for a restore the one under which it will run.
    pub epoch: Epoch,
    /// The seal on its state, once it is known.
    pub seal: Option<Seal>,
    /// What lived in the device when the operation was admitted. None in records of before it was kept.
    #[serde(default)]
    pub before: Option<OccupantRecord>,
}

/// What lives in a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OccupantRecord {
    /// Which logical device.
    pub logical: LogicalDeviceId,
    /// Under which epoch.
    pub epoch: Epoch,
}

/// How far an operation is, as the journal says.
#[allow(clippy::large_enum_variant, reason = "a record has one of it, and its change is boxed")]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum RecordedStep {
    /// Its devices are leased. Those of a restore have not been touched; those of a save may be anywhere on the way, which
    /// makes no difference: their own state is in them.
    Admitted,
    /// Its devices may be anywhere on the way. Nothing of it stands: it is undone.
    Begun,
    /// A sealed save, stopped, or a verified restore, loaded, waits for Resume.
    Held {
        /// When the hold ends by itself.
        deadline: UnixMillis,
        /// How long it was to last. None in records of before it was kept.
        #[serde(default)]
        limit: Option<Duration>,
        /// When the devices of a save were stopped. None in records of before it was kept, and of a restore.
        #[serde(default)]
        stopped_at: Option<UnixMillis>,
    },
    /// A sealed save lets its devices run again, or a verified restore is about to.
    Running {
        /// The hold of a save ran out: the checkpoint counts as inconsistent.
        inconsistent: bool,
    },
    /// A sealed save whose devices stay stopped, as was asked for.
    Stopped,
    /// The destination of a migration may have been told to run the devices.
    Committing,
    /// The destination of a migration runs them, and those of the source are being reset.
    LettingGo,
    /// The devices of an arrival were told to run, none was found running, and all are being reset.
    Reverting,
    /// Over.
    Ended(EndRecord),
}

impl RecordedStep {
    /// Its name in logs.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Admitted => "ADMITTED",
            Self::Begun => "BEGUN",
            Self::Held { .. } => "HELD",
            Self::Running { .. } => "RUNNING",
            Self::Stopped => "STOPPED",
            Self::Committing => "COMMITTING",
            Self::LettingGo => "LETTING_GO",
            Self::Reverting => "REVERTING",
            Self::Ended(_) => "ENDED",
        }
    }

    /// How much of a hold is left at `now`; zero where there is none.
    ///
    /// The deadline is by the wall clock, which somebody may have set back since: no hold has more left than it was to
    /// last.
    pub fn hold_left(&self, now: UnixMillis) -> Duration {
        match self {
            Self::Held { deadline, limit, .. } => deadline.remaining(now).min(limit.unwrap_or(Duration::MAX)),
            Self::Admitted
            | Self::Begun
            | Self::Running { .. }
            | Self::Stopped
            | Self::Committing
            | Self::LettingGo
            | Self::Reverting
            | Self::Ended(_) => Duration::ZERO,
        }
    }

    /// What counts where Ready is still to be said: what is held waits for nobody yet, and is undone after a restart.
    #[must_use]
    pub fn until_ready(self, owes_ready: bool) -> Self {
        if owes_ready && matches!(self, Self::Held { .. }) { Self::Begun } else { self }
    }

    /// How far an arrival is that has this on record.
    pub fn arrival(&self, verdict: Option<VerdictRecord>) -> ArrivalStep {
        match self {
            Self::Held { .. } => ArrivalStep::Prepared,
            Self::Running { .. } => ArrivalStep::Committing,
            Self::Reverting => ArrivalStep::Reverting,
            // One that ended without a verdict never got as far as to have one.
            Self::Ended(_) => ArrivalStep::Over(verdict.map_or(Verdict::Refused, Into::into)),
            Self::Admitted | Self::Begun | Self::Stopped | Self::Committing | Self::LettingGo => {
                ArrivalStep::Loading
            }
        }
    }

    /// How far a migration is that has this on record.
    pub fn offer(&self) -> OfferStep {
        match self {
            Self::Committing => OfferStep::Committing,
            Self::LettingGo => OfferStep::LettingGo,
            Self::Admitted
            | Self::Begun
            | Self::Held { .. }
            | Self::Running { .. }
            | Self::Stopped
            | Self::Reverting
            | Self::Ended(_) => OfferStep::Begun,
        }
    }

    /// Whether the operation is over.
    pub fn is_ended(&self) -> bool {
        matches!(self, Self::Ended(_))
    }
}

/// How an operation ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EndRecord {
    /// When.
    pub at: UnixMillis,
    /// How.
    pub result: EndResult,
    /// What became of the state that the devices carried before.
    pub outcome: EndOutcome,
    /// What went wrong first.
    pub failure: Option<FailureRecord>,
    /// Whether there is a checkpoint, and whether it is consistent.
    pub consistency: Option<Consistency>,
    /// Bytes of each device.
    pub moved_bytes: Vec<u64>,
    /// Of these, while the devices ran.
    pub pre_copy_bytes: u64,
    /// The same of each device. Empty in records of before it was kept.
    #[serde(default)]
    pub device_pre_copy_bytes: Vec<u64>,
    /// How long the devices stood still.
    pub downtime: Option<Duration>,
    /// How long they were expected to.
    pub predicted_downtime: Option<Duration>,
    /// Devices that wait for somebody to decide.
    pub quarantined: Vec<DeviceName>,
    /// Devices on which a call did not return. Nobody can decide anything about them before the agent is restarted.
    #[serde(default)]
    pub hung: Vec<DeviceName>,
    /// Devices that were not open.
    #[serde(default)]
    pub unavailable: Vec<DeviceName>,
    /// Devices that stay stopped, as was asked for.
    pub left_stopped: bool,
    /// The revision that was told with the end. 0 in records of before it was kept.
    #[serde(default)]
    pub revision: u64,
}

impl EndRecord {
    /// The devices that take no work at its end.
    pub fn out_of_service(&self) -> impl Iterator<Item = &DeviceName> {
        self.quarantined.iter().chain(&self.hung).chain(&self.unavailable)
    }
}

/// How an operation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EndResult {
    /// All that was asked for, on every device.
    Succeeded,
    /// Not what was asked for.
    Failed,
    /// Undone on request.
    Cancelled,
}

/// What became of the state that the devices carried before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EndOutcome {
    /// It is there.
    Preserved,
    /// It is gone.
    StateLost,
    /// The restored state took its place.
    Replaced,
    /// It lives on another node.
    Moved,
}

/// What a checkpoint is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Consistency {
    /// One moment, and held as long as was wanted.
    Consistent,
    /// The hold ran out first.
    Inconsistent,
}

/// What went wrong first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FailureRecord {
    /// Stable, in capitals.
    pub reason: String,
    /// For people.
    pub message: String,
    /// The device that it is about.
    pub device: Option<DeviceName>,
}
