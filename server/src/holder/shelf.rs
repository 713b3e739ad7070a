//! What is held, and how much of it may be. No I/O but closing.
//!
//! ```text
//!   put(label, fds): new key -> one more device;  known key -> the old fds are closed once the new ones are in
//!   limits: devices (configured), fds (this process' limit, less what the holder itself needs)
//! ```
//!
//! # Invariants
//! - What is refused changes nothing; the fds that came with it are closed, and the sender still has its own.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::os::fd::OwnedFd;

use super::label::{DeviceKey, Label};
use super::protocol::Refusal;

/// A held device.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) label: Label,
    pub(super) fds: Vec<OwnedFd>,
    /// How many times it was handed out since it was put.
    pub(super) handed_out: u64,
}

/// All held devices.
#[derive(Debug)]
pub(super) struct Shelf {
    held: BTreeMap<DeviceKey, Held>,
    fds: usize,
    max_devices: usize,
    max_fds: usize,
}

impl Shelf {
    pub(super) fn new(max_devices: usize, max_fds: usize) -> Self {
        Self { held: BTreeMap::new(), fds: 0, max_devices, max_fds }
    }

    pub(super) fn len(&self) -> usize {
        self.held.len()
    }

    /// Keeps a device. Whether its key was known. What was kept under the key comes back, to be closed.
    pub(super) fn put(&mut self, label: Label, fds: Vec<OwnedFd>) -> Result<Option<Held>, Refusal> {
        if !self.held.contains_key(&label.key) && self.held.len() >= self.max_devices {
            return Err(Refusal::TooManyDevices { limit: self.max_devices as u64 });
        }
        // The old and the new ones are open together for a moment.
        let needed = self.fds + fds.len();
        if needed > self.max_fds {
            return Err(Refusal::TooManyFds { needed: needed as u64, limit: self.max_fds as u64 });
        }
        let key = label.key.clone();
        self.fds = needed;
        let old = self.held.insert(key, Held { label, fds, handed_out: 0 });
        self.fds -= old.as_ref().map_or(0, |old| old.fds.len());
        Ok(old)
    }

    pub(super) fn get_mut(&mut self, key: &DeviceKey) -> Option<&mut Held> {
        self.held.get_mut(key)
    }

    /// Lets go of a device, which the caller closes.
    pub(super) fn remove(&mut self, key: &DeviceKey) -> Option<Held> {
        let held = self.held.remove(key)?;
        self.fds -= held.fds.len();
        Some(held)
    }

    /// Labels in the order of keys, from after one on.
    pub(super) fn labels(&self, after: Option<&DeviceKey>) -> impl Iterator<Item = &Label> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        self.held.range::<DeviceKey, _>((from, Bound::Unbounded)).map(|(_, held)| &held.label)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::super::label::{BootId, Facts};
    use super::*;

    fn label(key: &str) -> Label {
        Label {
            key: DeviceKey::new(key).unwrap(),
            address: "sim".parse().unwrap(),
            operation: None,
            epoch: 0,
            facts: Facts::new("{}").unwrap(),
            boot_id: BootId::new("boot").unwrap(),
        }
    }

    fn ends(count: usize) -> (std::io::PipeReader, Vec<OwnedFd>) {
        let (reader, writer) = std::io::pipe().unwrap();
        (reader, (0..count).map(|_| writer.try_clone().unwrap().into()).collect())
    }

    #[test]
    fn a_put_replaces_what_was_there() {
        let mut shelf = Shelf::new(1, 4);
        let (mut first, fds) = ends(2);
        assert!(shelf.put(label("a"), fds).unwrap().is_none());
        let (mut second, fds) = ends(2);
        drop(shelf.put(label("a"), fds).unwrap().unwrap());
        assert_eq!(first.read(&mut [0]).unwrap(), 0, "closed");
        assert_eq!(shelf.len(), 1);
        drop(shelf.remove(&label("a").key).unwrap());
        assert_eq!(second.read(&mut [0]).unwrap(), 0, "closed");
        assert!(shelf.remove(&label("a").key).is_none());
        assert_eq!(shelf.fds, 0);
    }

    #[test]
    fn what_is_refused_changes_nothing() {
        let mut shelf = Shelf::new(2, 5);
        shelf.put(label("a"), ends(2).1).unwrap();
        assert_eq!(
            shelf.put(label("b"), ends(4).1).unwrap_err(),
            Refusal::TooManyFds { needed: 6, limit: 5 }
        );
        shelf.put(label("c"), ends(3).1).unwrap();
        assert_eq!(shelf.put(label("b"), ends(1).1).unwrap_err(), Refusal::TooManyDevices { limit: 2 });
        let keys = |after: Option<&str>| {
            let after = after.map(|key| DeviceKey::new(key).unwrap());
            shelf.labels(after.as_ref()).map(|label| label.key.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(keys(None), ["a", "c"]);
        assert_eq!(keys(Some("a")), ["c"]);
        assert_eq!(keys(Some("b")), ["c"]);
        assert!(keys(Some("c")).is_empty());
    }
}
