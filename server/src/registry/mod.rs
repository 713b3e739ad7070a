//! The agent's devices: who they are, how they stand, and which operation has them.
//!
//! ```text
//!   configuration --open or adopt--> Slot { lane, view } <--lease-- operation
//!                                      |
//!                        keepsake --> holder
//! ```
//!
//! # Invariants
//! - A lease is exclusive, and a set is leased whole or not at all.
//! - Whoever is not the holder of a slot's lease does nothing to its device but read it back, and not even that while
//!   an operation is at work on it.
//! - A device that its operation left quarantined takes no work until somebody decides.
//!
//! # Failure paths
//! A device that cannot be opened stays in the registry as UNAVAILABLE, with the reason, and is tried again.

pub mod hardware;
pub mod keeper;
pub mod opening;
mod slot;
mod view;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;
use vfio_checkpoint_proto::ids::{DeviceName, Epoch, LogicalDeviceId, OperationName};

pub use slot::{Opened, Slot};
pub use view::{DeviceView, Standing};

/// All devices of the agent. They are fixed for the life of the process.
#[derive(Debug)]
pub struct Registry {
    slots: BTreeMap<DeviceName, Arc<Slot>>,
    /// Rises with every change of any device.
    revision: Arc<watch::Sender<u64>>,
    /// Held while a set is leased, so that two sets that overlap cannot each get a part.
    leasing: Mutex<()>,
}

/// Devices that an operation has to itself. Given back when it is dropped.
#[derive(Debug)]
pub struct Lease {
    operation: OperationName,
    slots: Vec<Arc<Slot>>,
}

/// A device of a set is leased already.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leased {
    /// Which one.
    pub device: DeviceName,
    /// By which operation.
    pub by: OperationName,
}

impl Registry {
    /// A registry of these slots.
    pub fn new(slots: impl IntoIterator<Item = Slot>, revision: Arc<watch::Sender<u64>>) -> Self {
        let slots = slots.into_iter().map(|slot| (slot.name().clone(), Arc::new(slot))).collect();
        Self { slots, revision, leasing: Mutex::new(()) }
    }

    /// The device of this name.
    pub fn get(&self, name: &DeviceName) -> Option<&Arc<Slot>> {
        self.slots.get(name)
    }

    /// All devices by name.
    pub fn all(&self) -> impl Iterator<Item = &Arc<Slot>> {
        self.slots.values()
    }

    /// Devices from `after` on, by name.
    pub fn after(&self, after: Option<&DeviceName>) -> impl Iterator<Item = &Arc<Slot>> {
        use std::ops::Bound::{Excluded, Unbounded};
        let from = after.map_or(Unbounded, Excluded);
        self.slots.range::<DeviceName, _>((from, Unbounded)).map(|(_, slot)| slot)
    }

    /// The newest epoch of a logical device that lives in a device of this agent, or lived in one as far as that is kept.
    pub fn newest_epoch(&self, logical: &LogicalDeviceId) -> Option<Epoch> {
        let records = self.all().filter_map(|slot| slot.view().record);
        let epochs = records.flat_map(|record| {
            let past = record.past.into_iter().map(|past| (past.logical, past.epoch));
            past.chain([(record.logical, record.epoch)])
        });
        epochs.filter(|(known, _)| known == logical).map(|(_, epoch)| epoch).max()
    }

    /// Tells when any device changes.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }

    /// Leases a set to an operation, or says every device that is leased already.
    pub fn lease(&self, slots: Vec<Arc<Slot>>, operation: &OperationName) -> Result<Lease, Vec<Leased>> {
        let _one_at_a_time = self.leasing.lock().unwrap_or_else(PoisonError::into_inner);
        let leased: Vec<Leased> = slots
            .iter()
            .filter_map(|slot| Some(Leased { device: slot.name().clone(), by: slot.leased_by()? }))
            .collect();
        if !leased.is_empty() {
            return Err(leased);
        }
        for slot in &slots {
            slot.set_lease(Some(operation.clone()));
        }
        Ok(Lease { operation: operation.clone(), slots })
    }
}

impl Lease {
    /// The devices, in the order of the set.
    pub fn slots(&self) -> &[Arc<Slot>] {
        &self.slots
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        for slot in &self.slots {
            if slot.leased_by().as_ref() == Some(&self.operation) {
                slot.set_lease(None);
            }
        }
    }
}
