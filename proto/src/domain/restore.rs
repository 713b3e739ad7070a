//! What a restore is asked to do.

use std::time::Duration;

use super::save::without;
use super::{Invalid, Manifest, checks};
use crate::ids::{CheckpointName, DeviceName, PodName, RequestId};
use crate::v1;

/// When restored devices run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AfterRestore {
    /// At once.
    Run,
    /// On Resume. Until then they are loaded and stand in RESUMING.
    Hold {
        /// How long to wait for Resume, before the devices are reset. None takes the agent's default.
        timeout: Option<Duration>,
    },
}

/// Where restored state comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RestoreSource {
    /// From the operation's stream; this is what will come.
    Stream(Box<Manifest>),
    /// From a store.
    Checkpoint(CheckpointName),
}

/// What a restore is asked to do, validated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RestoreSpec {
    /// The devices that take the state, one for each of the manifest and in its order, each once.
    pub devices: Vec<DeviceName>,
    /// What is restored. That a checkpoint of a store has as many devices is still to be found out.
    pub source: RestoreSource,
    /// When the devices run.
    pub after: AfterRestore,
    /// Refuse where there is more state than this.
    pub max_bytes: Option<u64>,
    /// Tell every blocker and do nothing.
    pub validate_only: bool,
    /// Makes the call idempotent.
    pub request_id: Option<RequestId>,
    /// The pod that will use the devices, for people.
    pub owner_pod: Option<PodName>,
    /// Where the source may still run, make new logical devices.
    pub allow_fork: bool,
    /// Take a checkpoint that is marked inconsistent.
    pub allow_inconsistent: bool,
}

/// Whether there is one device for each state.
pub fn check_assigned(devices: &[DeviceName], manifest: &Manifest) -> Result<(), Invalid> {
    if devices.len() == manifest.devices.len() {
        return Ok(());
    }
    let problem = format!(
        "it has {} entries and the manifest has {}; give one device for each",
        devices.len(),
        manifest.devices.len()
    );
    Err(Invalid::new("devices", problem))
}

impl TryFrom<v1::RestoreRequest> for RestoreSpec {
    type Error = Invalid;

    fn try_from(wire: v1::RestoreRequest) -> Result<Self, Invalid> {
        let devices = checks::device_set("devices", &wire.devices)?;
        let checkpoint = checks::optional_id("checkpoint", &wire.checkpoint)?;
        let source = match (wire.manifest, checkpoint) {
            (Some(_), Some(_)) => {
                let problem = "a checkpoint of a store brings its own; leave one of the two unset";
                return Err(Invalid::new("manifest", problem));
            }
            (None, Some(checkpoint)) => RestoreSource::Checkpoint(checkpoint),
            (manifest, None) => {
                let manifest: Manifest = checks::present("manifest", manifest)?
                    .try_into()
                    .map_err(|invalid: Invalid| invalid.within("manifest"))?;
                check_assigned(&devices, &manifest)?;
                if wire.allow_inconsistent {
                    let problem =
                        "it is only for a checkpoint of a store; what is streamed is not known to the agent";
                    return Err(Invalid::new("allow_inconsistent", problem));
                }
                RestoreSource::Stream(Box::new(manifest))
            }
        };
        let timeout = checks::duration("hold_timeout", wire.hold_timeout)?;
        let after = match checks::known("after", wire.after)? {
            v1::AfterRestore::Hold => AfterRestore::Hold { timeout },
            v1::AfterRestore::Unspecified | v1::AfterRestore::Run => {
                without("hold_timeout", timeout, "after", "RUN")?;
                AfterRestore::Run
            }
        };
        Ok(Self {
            devices,
            source,
            after,
            max_bytes: checks::limit(wire.max_bytes),
            validate_only: wire.validate_only,
            request_id: checks::request_id(&wire.request_id)?,
            owner_pod: checks::optional_id("owner_pod", &wire.owner_pod)?,
            allow_fork: wire.allow_fork,
            allow_inconsistent: wire.allow_inconsistent,
        })
    }
}
