//! What the agent's devices are made of: how one comes to be open, and who keeps it open when the agent ends.
//!
//! ```text
//!   Opener -- open, adopt --> Hardware --> device and its keepsake
//!   Keeper ---- holder -----> Hardware --> Holding -- put, take, held, let_go --> the holder's process
//! ```
//! [`Node`] is the machine: addresses of real devices, and a holder behind a socket. Device work is as it is whatever
//! stands here; it is a trait so that a simulated node can keep simulated devices across the agent's death.
//!
//! # Invariants
//! - Everything here may block, and is called from lanes alone.
//!
//! # Failure paths
//! A holder that did not answer is asked for anew: see [`Holding::is_closed`].

use std::fmt;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::time::Duration;

use vfio_checkpoint_device::address::{
    Access, AdoptFailure, DeviceAddress, Keepsake, OpenFailure, Opened as OpenDevice,
};
use vfio_checkpoint_proto::ids::DeviceName;

use super::keeper::KeeperError;
use crate::holder::{BootId, ClientError, DeviceKey, HolderClient, Label, Refusal};

/// How long the holder may take to answer. It answers at once, unless the machine is busy.
const WITHIN: Duration = Duration::from_secs(10);

/// Where devices and their holder are.
pub trait Hardware: fmt::Debug + Send + Sync {
    /// Opens a device, which resets it.
    fn open(&self, address: &DeviceAddress, access: Access) -> Result<OpenDevice, OpenFailure>;

    /// Takes over a device that was kept, as it is.
    fn adopt(
        &self,
        address: &DeviceAddress,
        keepsake: Keepsake,
        access: Access,
    ) -> Result<OpenDevice, AdoptFailure>;

    /// Connects to the holder as the one agent.
    fn holder(&self, socket: &Path) -> Result<Box<dyn Holding>, KeeperError>;
}

/// A connection to the holder. Dropping it hangs up; what is kept stays.
pub trait Holding: fmt::Debug + Send {
    /// What is kept of a device. It stays kept.
    fn take(&mut self, device: &DeviceName) -> Result<Option<Keepsake>, KeeperError>;

    /// The names of what is kept.
    fn held(&mut self) -> Result<Vec<String>, KeeperError>;

    /// Has a device kept, in place of what was kept of it.
    fn put(&mut self, device: &DeviceName, keepsake: &Keepsake) -> Result<(), KeeperError>;

    /// Lets go of what is kept of a device. Where nobody else has it open it is reset by that.
    fn let_go(&mut self, device: &DeviceName) -> Result<(), KeeperError>;

    /// Whether the connection is of no further use.
    fn is_closed(&self) -> bool;
}

/// This machine.
#[derive(Debug, Clone, Copy, Default)]
pub struct Node;

impl Hardware for Node {
    fn open(&self, address: &DeviceAddress, access: Access) -> Result<OpenDevice, OpenFailure> {
        address.open(access)
    }

    fn adopt(
        &self,
        address: &DeviceAddress,
        keepsake: Keepsake,
        access: Access,
    ) -> Result<OpenDevice, AdoptFailure> {
        address.adopt(keepsake, access)
    }

    fn holder(&self, socket: &Path) -> Result<Box<dyn Holding>, KeeperError> {
        Ok(Box::new(HolderClient::connect(socket, WITHIN)?))
    }
}

impl Holding for HolderClient {
    fn take(&mut self, device: &DeviceName) -> Result<Option<Keepsake>, KeeperError> {
        match HolderClient::take(self, &key(device)?) {
            Ok(taken) => {
                let keepsake = taken.into_keepsake();
                let unclear = |source| KeeperError::Keepsake { device: device.clone(), source };
                keepsake.map(Some).map_err(unclear)
            }
            Err(ClientError::Refused(Refusal::NotHeld { .. })) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn held(&mut self) -> Result<Vec<String>, KeeperError> {
        Ok(self.list()?.into_iter().map(|label| label.key.to_string()).collect())
    }

    fn put(&mut self, device: &DeviceName, keepsake: &Keepsake) -> Result<(), KeeperError> {
        let label = Label::of(key(device)?, keepsake, BootId::current())
            .map_err(|source| KeeperError::Label { device: device.clone(), source })?;
        let fds: Vec<_> = keepsake.fds.iter().map(|fd| fd.as_fd()).collect();
        HolderClient::put(self, &label, &fds)?;
        Ok(())
    }

    fn let_go(&mut self, device: &DeviceName) -> Result<(), KeeperError> {
        self.remove(&key(device)?)?;
        Ok(())
    }

    fn is_closed(&self) -> bool {
        HolderClient::is_closed(self)
    }
}

fn key(device: &DeviceName) -> Result<DeviceKey, KeeperError> {
    DeviceKey::new(device.id()).map_err(|source| KeeperError::Key { device: device.clone(), source })
}
