//! The DMA windows that a client has mapped: which addresses the device may use.
//!
//! ```text
//!   map    apart from every window, room for one more -> a window
//!   unmap  exactly a window, or all of them           -> gone
//! ```
//!
//! The table is kept for what it refuses. No device behind this server reaches into a client's memory through it: a
//! simulated device only counts pages, and a kernel device does DMA in its own address space. So the file that may
//! come with a mapping is closed at once, and a client with thousands of windows costs no descriptor.
//!
//! # Invariants
//! - Windows do not overlap, and there are never more than the limit that the client was told of.

use std::collections::BTreeMap;

use rustix::io::Errno;

use crate::IovaRange;

/// The windows of one connection, by their first address.
#[derive(Debug)]
pub(super) struct DmaTable {
    windows: BTreeMap<u64, IovaRange>,
    limit: usize,
}

impl DmaTable {
    pub(super) fn new(limit: usize) -> Self {
        Self { windows: BTreeMap::new(), limit }
    }

    /// Adds a window: EINVAL where it is empty or runs past the last address, EEXIST where it overlaps another, ENOSPC
    /// where the table is full.
    pub(super) fn map(&mut self, start: u64, length_bytes: u64) -> Result<(), Errno> {
        let window = IovaRange::new(start, length_bytes).ok_or(Errno::INVAL)?;
        // Windows do not overlap, so of all that start at or before this one's end only the last can reach into it.
        let before = self.windows.range(..=window.last()).next_back();
        if before.is_some_and(|(_, other)| other.overlaps(window)) {
            return Err(Errno::EXIST);
        }
        if self.windows.len() >= self.limit {
            return Err(Errno::NOSPC);
        }
        self.windows.insert(start, window);
        Ok(())
    }

    /// Takes a window away: ENOENT where there is none with exactly these bounds.
    pub(super) fn unmap(&mut self, start: u64, length_bytes: u64) -> Result<(), Errno> {
        match self.windows.get(&start) {
            Some(window) if window.length_bytes() == length_bytes => {
                self.windows.remove(&start);
                Ok(())
            }
            Some(_) | None => Err(Errno::NOENT),
        }
    }

    /// Takes every window away.
    pub(super) fn clear(&mut self) {
        self.windows.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_never_overlap_and_go_as_they_came() {
        let mut table = DmaTable::new(3);
        table.map(0x1000, 0x1000).unwrap();
        table.map(0x4000, 0x1000).unwrap();
        for (start, length) in [(0x1000, 0x1000), (0x1fff, 1), (0, 0x1001), (0x0, 0x10000), (0x2000, 0x2001)]
        {
            assert_eq!(table.map(start, length), Err(Errno::EXIST), "{start:#x}+{length:#x}");
        }
        for (start, length) in [(0x9000, 0), (u64::MAX, 2)] {
            assert_eq!(table.map(start, length), Err(Errno::INVAL));
        }
        table.map(u64::MAX, 1).unwrap();
        assert_eq!(table.map(0x8000, 1), Err(Errno::NOSPC));
        for (start, length) in [(0x1000, 0x800), (0x1800, 0x800), (0x3000, 0x1000)] {
            assert_eq!(table.unmap(start, length), Err(Errno::NOENT));
        }
        table.unmap(0x1000, 0x1000).unwrap();
        table.map(0x800, 0x1000).unwrap();
        table.clear();
        table.map(0, u64::MAX).unwrap();
    }
}
