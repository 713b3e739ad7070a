//! What a restore is asked to do.

use std::time::Duration;

use super::save::without;
use super::{Invalid, Manifest, checks};
use crate::ids::{DeviceName, PodName, RequestId};
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

/// What a restore is asked to do, validated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RestoreSpec {
    /// The devices that take the state, one for each of the manifest and in its order, each once.
    pub devices: Vec<DeviceName>,
    /// What is restored.
    pub manifest: Manifest,
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
}

impl TryFrom<v1::RestoreRequest> for RestoreSpec {
    type Error = Invalid;

    fn try_from(wire: v1::RestoreRequest) -> Result<Self, Invalid> {
        let devices = checks::device_set("devices", &wire.devices)?;
        let manifest: Manifest = checks::present("manifest", wire.manifest)?
            .try_into()
            .map_err(|invalid: Invalid| invalid.within("manifest"))?;
        if devices.len() != manifest.devices.len() {
            let problem = format!(
                "it has {} entries and the manifest has {}; give one device for each",
                devices.len(),
                manifest.devices.len()
            );
            return Err(Invalid::new("devices", problem));
        }
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
            manifest,
            after,
            max_bytes: checks::limit(wire.max_bytes),
            validate_only: wire.validate_only,
            request_id: checks::request_id(&wire.request_id)?,
            owner_pod: checks::optional_id("owner_pod", &wire.owner_pod)?,
        })
    }
}
