//! What a migration is asked to do, by callers and between agents.

use std::time::Duration;

use super::save::{save_parts, without};
use super::{AfterSave, Invalid, LogicalDevice, Manifest, SaveRequestSpec, check_assigned, checks};
use crate::ids::{DeviceName, Epoch, KeyHash, OperationName, PodName, Ticket};
use crate::proof::Claim;
use crate::v1;
use crate::version::VersionRange;

/// How long a ticket can be used where nobody says.
const DEFAULT_TTL: Duration = Duration::from_mins(1);
/// How long it can be used at most.
const MAX_TTL: Duration = Duration::from_hours(1);
/// The longest endpoint.
const MAX_ENDPOINT_BYTES: usize = 512;
/// The longest SPIFFE ID.
const MAX_SPIFFE_ID_BYTES: usize = 2048;
/// The longest statement of an admin.
const MAX_STATEMENT_BYTES: usize = 1024;

/// What a destination is asked to let in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdmitSpec {
    /// The logical devices that come, in the order of the set, each once.
    pub logical_devices: Vec<LogicalDevice>,
    /// The devices that take them, as many, each once.
    pub devices: Vec<DeviceName>,
    /// Who may bring them.
    pub source_key: KeyHash,
    /// For how long.
    pub ttl: Duration,
    /// Prepared is said only after Ready.
    pub require_ready: bool,
    /// The pod that will use the devices, for people.
    pub owner_pod: Option<PodName>,
}

impl TryFrom<v1::AdmitRequest> for AdmitSpec {
    type Error = Invalid;

    fn try_from(wire: v1::AdmitRequest) -> Result<Self, Invalid> {
        let devices = checks::device_set("devices", &wire.devices)?;
        same_number("logical_devices", wire.logical_devices.len(), devices.len())?;
        let mut logical_devices: Vec<LogicalDevice> = Vec::with_capacity(devices.len());
        for (index, logical) in wire.logical_devices.into_iter().enumerate() {
            let at = format!("logical_devices[{index}]");
            let logical = LogicalDevice::try_from(logical).map_err(|invalid: Invalid| invalid.within(&at))?;
            if logical_devices.iter().any(|other| other.id == logical.id) {
                let problem = format!("{} is there twice; one set holds it once", logical.id);
                return Err(Invalid::new(format!("{at}.id"), problem));
            }
            logical_devices.push(logical);
        }
        let ttl = wire.ttl.map_or(Ok(DEFAULT_TTL), |ttl| checks::duration_up_to("ttl", ttl, MAX_TTL))?;
        Ok(Self {
            logical_devices,
            devices,
            source_key: key_hash("source_key_sha256", &wire.source_key_sha256)?,
            ttl,
            require_ready: wire.require_ready,
            owner_pod: checks::optional_id("owner_pod", &wire.owner_pod)?,
        })
    }
}

/// Who says when the destination may run the devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CommitMode {
    /// The agent, as soon as the destination has all.
    Auto,
    /// The caller.
    Manual {
        /// How long to wait for it. None takes the agent's default.
        timeout: Option<Duration>,
    },
}

/// Where a set of devices goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MigrationTarget {
    /// `https://host:port`. What else it has to be, whoever dials finds out.
    pub endpoint: String,
    /// Who must be there. None for whoever has the host's name.
    pub spiffe_id: Option<String>,
    /// The devices that take the state.
    pub devices: Vec<DeviceName>,
    /// The key of who admitted them. None only where nothing is to be done.
    pub key: Option<KeyHash>,
}

/// What a source is asked to move.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MigrateSpec {
    /// How the devices are saved: what a migration shares with a save. What comes after is the hand-over.
    pub save: SaveRequestSpec,
    /// Where to.
    pub target: MigrationTarget,
    /// What opens the destination. None only where nothing is to be done.
    pub ticket: Option<Ticket>,
    /// Who says when the destination may run them.
    pub commit: CommitMode,
}

impl TryFrom<v1::MigrateRequest> for MigrateSpec {
    type Error = Invalid;

    fn try_from(wire: v1::MigrateRequest) -> Result<Self, Invalid> {
        let target = checks::present("target", wire.target)?;
        let target = MigrationTarget::try_from(target).map_err(|invalid| invalid.within("target"))?;
        if target.key.is_none() && !wire.validate_only {
            return Err(Invalid::new("target.key_sha256", "it must be given; take it from Admit"));
        }
        let timeout = checks::duration("commit_timeout", wire.commit_timeout)?;
        let commit = match checks::known("commit", wire.commit)? {
            v1::CommitMode::Manual => CommitMode::Manual { timeout },
            v1::CommitMode::Unspecified | v1::CommitMode::Auto => {
                without("commit_timeout", timeout, "commit", "AUTO")?;
                CommitMode::Auto
            }
        };
        let ticket = ticket(&wire.ticket, wire.validate_only)?;
        // A limit that the caller gives is one to be kept.
        let is_kept =
            wire.downtime_limit.is_some() && wire.no_convergence == i32::from(v1::NoConvergence::Unspecified);
        let no_convergence = if is_kept { v1::NoConvergence::Abort.into() } else { wire.no_convergence };
        let save = save_parts(
            v1::StartSaveRequest {
                devices: wire.devices,
                pre_copy: wire.pre_copy,
                cutover: wire.cutover,
                after: v1::AfterSave::Unspecified.into(),
                downtime_limit: wire.downtime_limit,
                pre_copy_budget: wire.pre_copy_budget,
                no_convergence,
                cutover_timeout: wire.cutover_timeout,
                hold_timeout: None,
                max_bytes: wire.max_bytes,
                allow_unknown_size: wire.allow_unknown_size,
                memory_capture: wire.memory_capture,
                viommu: wire.viommu,
                forbid_all_dirty: wire.forbid_all_dirty,
                validate_only: wire.validate_only,
                request_id: wire.request_id,
                owner_pod: wire.owner_pod,
                store: String::new(),
            },
            AfterSave::HandOver,
        )?;
        same_number("target.devices", target.devices.len(), save.devices.len())?;
        Ok(Self { save, target, ticket, commit })
    }
}

impl TryFrom<v1::MigrationTarget> for MigrationTarget {
    type Error = Invalid;

    fn try_from(wire: v1::MigrationTarget) -> Result<Self, Invalid> {
        let endpoint = checks::text("endpoint", wire.endpoint, 1, MAX_ENDPOINT_BYTES)?;
        let spiffe_id = checks::text("spiffe_id", wire.spiffe_id, 0, MAX_SPIFFE_ID_BYTES)?;
        let devices = checks::device_set("devices", &wire.devices)?;
        let key = Some(&wire.key_sha256).filter(|key| !key.is_empty());
        let key = key.map(|key| key_hash("key_sha256", key)).transpose()?;
        Ok(Self { endpoint, spiffe_id: Some(spiffe_id).filter(|id| !id.is_empty()), devices, key })
    }
}

/// What the source's agent asks of the destination's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PrepareSpec {
    /// What opens the destination. None only where nothing is to be done.
    pub ticket: Option<Ticket>,
    /// The source's operation: with the source's identity it names the hand-over.
    pub source_operation: OperationName,
    /// What comes.
    pub manifest: Manifest,
    /// The devices that take it, one for each of the manifest.
    pub devices: Vec<DeviceName>,
    /// What the source speaks.
    pub versions: VersionRange,
    /// Tell every blocker and do nothing.
    pub validate_only: bool,
    /// How long loaded devices wait for the commit at least.
    pub commit_timeout: Duration,
}

impl TryFrom<v1::PrepareRequest> for PrepareSpec {
    type Error = Invalid;

    fn try_from(wire: v1::PrepareRequest) -> Result<Self, Invalid> {
        let devices = checks::device_set("devices", &wire.devices)?;
        let manifest: Manifest = checks::present("manifest", wire.manifest)?
            .try_into()
            .map_err(|invalid: Invalid| invalid.within("manifest"))?;
        check_assigned(&devices, &manifest)?;
        let commit_timeout = checks::present("commit_timeout", wire.commit_timeout)?;
        Ok(Self {
            ticket: ticket(&wire.ticket, wire.validate_only)?,
            source_operation: checks::id("source_operation", &wire.source_operation)?,
            manifest,
            devices,
            versions: checks::versions(wire.min_version, wire.max_version)?,
            validate_only: wire.validate_only,
            commit_timeout: checks::duration_up_to("commit_timeout", commit_timeout, super::MAX_DURATION)?,
        })
    }
}

/// The agent-to-agent word: run the devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommitHandoverSpec {
    /// The destination's operation.
    pub operation: OperationName,
    /// Under these epochs.
    pub epochs: Vec<Epoch>,
    /// That the source says so.
    pub claim: Claim,
}

impl TryFrom<v1::CommitHandoverRequest> for CommitHandoverSpec {
    type Error = Invalid;

    fn try_from(wire: v1::CommitHandoverRequest) -> Result<Self, Invalid> {
        checks::set_size("epochs", wire.epochs.len())?;
        let claim = Claim::new(&wire, &wire.proof)?;
        Ok(Self {
            operation: checks::id("operation", &wire.operation)?,
            epochs: wire.epochs.into_iter().map(Epoch).collect(),
            claim,
        })
    }
}

/// What an admin decides about a migration that is in doubt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolveSpec {
    /// The migration.
    pub operation: OperationName,
    /// What to do.
    pub resolution: Resolution,
    /// The admin answers for what there is no evidence of: that the destination is fenced, or that the last copy may go,
    /// whichever the resolution takes.
    pub is_stated: bool,
    /// Why. Empty where nothing is stated.
    pub statement: String,
    /// Tell whether it would be taken and do nothing.
    pub validate_only: bool,
}

/// What to do with a migration that is in doubt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resolution {
    /// The devices of the source run again.
    ResumeHere,
    /// They are reset.
    LetGo,
}

impl TryFrom<v1::ResolveRequest> for ResolveSpec {
    type Error = Invalid;

    fn try_from(wire: v1::ResolveRequest) -> Result<Self, Invalid> {
        let useless = |field: &str, mode: &str| {
            Err(Invalid::new(field, format!("it means nothing with {mode}; leave it unset")))
        };
        let (resolution, is_stated) = match checks::known("resolution", wire.resolution)? {
            v1::Resolution::Unspecified => {
                return Err(Invalid::new("resolution", "it must be given: RESUME_HERE or LET_GO"));
            }
            v1::Resolution::ResumeHere if wire.accept_loss => return useless("accept_loss", "RESUME_HERE"),
            v1::Resolution::ResumeHere => (Resolution::ResumeHere, wire.peer_is_fenced),
            v1::Resolution::LetGo if wire.peer_is_fenced => return useless("peer_is_fenced", "LET_GO"),
            v1::Resolution::LetGo => (Resolution::LetGo, wire.accept_loss),
        };
        let shortest = usize::from(is_stated);
        Ok(Self {
            operation: checks::id("operation", &wire.operation)?,
            resolution,
            is_stated,
            statement: checks::text("statement", wire.statement, shortest, MAX_STATEMENT_BYTES)?,
            validate_only: wire.validate_only,
        })
    }
}

/// What is 32 bytes long and names a key.
pub fn key_hash(field: &str, bytes: &[u8]) -> Result<KeyHash, Invalid> {
    <[u8; 32]>::try_from(bytes).map(KeyHash).map_err(|_| {
        Invalid::new(
            field,
            format!("it has {} bytes, and a SHA-256 has 32; take it as the agent says it", bytes.len()),
        )
    })
}

/// What Prepare was answered.
pub fn secret(bytes: &[u8]) -> Result<Ticket, Invalid> {
    <[u8; Ticket::BYTES]>::try_from(bytes).map(Ticket).map_err(|_| {
        let problem = format!("it has {} bytes, and Prepare answers {}", bytes.len(), Ticket::BYTES);
        Invalid::new("secret", problem)
    })
}

fn ticket(bytes: &[u8], may_be_empty: bool) -> Result<Option<Ticket>, Invalid> {
    if bytes.is_empty() && may_be_empty {
        return Ok(None);
    }
    <[u8; Ticket::BYTES]>::try_from(bytes).map(|bytes| Some(Ticket(bytes))).map_err(|_| {
        let problem =
            format!("it has {} bytes, and a ticket has {}; take it from Admit", bytes.len(), Ticket::BYTES);
        Invalid::new("ticket", problem)
    })
}

fn same_number(field: &str, found: usize, devices: usize) -> Result<(), Invalid> {
    if found == devices {
        return Ok(());
    }
    Err(Invalid::new(
        field,
        format!("it has {found} entries, and there are {devices} devices; give one for each"),
    ))
}
