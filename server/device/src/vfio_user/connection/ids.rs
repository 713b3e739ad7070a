//! Message ids, and whose they are once a connection has had several owners.
//!
//! ```text
//!   generation 0, 1, 2 ...  ->  one of 16 parts of the id space each, in turn
//!   owner 0 asks 7, is killed          |
//!   owner 1 asks 4096 (its fence)      |   <- 7's reply: not in owner 1's part, so left over and skipped
//!                                      |   <- 4096's reply: everything before it was answered; in step
//! ```
//!
//! # Invariants
//! - An owner's ids lie in its generation's part and nowhere else, so what answers an owner that died is never taken for
//!   an answer to this one.
//! - What is skipped is bounded, and nothing is skipped any more once one answer of this owner's came.
//!
//! # Failure paths
//! More left-over replies than dead owners can have asked for is [`PeerError::TooManyLeftOver`]. Sixteen owners in a row
//! that all died before their first answer came would share ids again.

use serde::{Deserialize, Serialize};

use super::PeerError;
use crate::vfio_user::codec::{HEADER_BYTES, Header, Limits};

/// How many parts the id space has, and how many ids one has.
const PARTS: u64 = 16;
const PART_IDS: u16 = 1 << 12;
/// An owner has one request under way at a time; some may have died in a row.
const MAX_LEFT_OVER: u32 = 16;
/// Left-over replies of full length that may come.
const MAX_LEFT_OVER_FULL: u64 = 4;

/// Which owner in a row of a connection: 0 made it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Generation(u64);

impl Generation {
    /// The owner that comes `owners` later.
    #[must_use]
    pub fn after(self, owners: u64) -> Self {
        Self(self.0.wrapping_add(owners))
    }
}

/// The ids of one owner.
#[derive(Debug)]
pub(super) struct Ids {
    generation: Generation,
    next: u16,
}

impl Ids {
    pub(super) fn of(generation: Generation) -> Self {
        Self { generation, next: 0 }
    }

    pub(super) fn generation(&self) -> Generation {
        self.generation
    }

    fn part(&self) -> u16 {
        // Less than 16.
        u16::try_from(self.generation.0 % PARTS).unwrap_or(0)
    }

    /// The next id of the part, round and round.
    pub(super) fn next(&mut self) -> u16 {
        let id = self.part() * PART_IDS + self.next;
        self.next = (self.next + 1) % PART_IDS;
        id
    }

    pub(super) fn has(&self, id: u16) -> bool {
        id / PART_IDS == self.part()
    }
}

/// What answers earlier owners and may still come.
#[derive(Debug)]
pub(super) struct LeftOver {
    replies: u32,
    bytes: u64,
}

impl LeftOver {
    pub(super) fn within(limits: Limits) -> Self {
        Self { replies: MAX_LEFT_OVER, bytes: MAX_LEFT_OVER_FULL * u64::from(limits.max_message_bytes()) }
    }

    /// Counts one that came.
    pub(super) fn skip(&mut self, header: &Header) -> Result<(), PeerError> {
        let bytes = (header.body_bytes() + HEADER_BYTES) as u64;
        match (self.replies.checked_sub(1), self.bytes.checked_sub(bytes)) {
            (Some(replies), Some(bytes)) => {
                (self.replies, self.bytes) = (replies, bytes);
                Ok(())
            }
            (None, _) | (_, None) => Err(PeerError::TooManyLeftOver),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn owners_in_a_row_share_no_id() {
        let mut seen = BTreeSet::new();
        for owner in 0..PARTS {
            let mut ids = Ids::of(Generation::default().after(owner));
            let first = ids.next();
            assert!(ids.has(first) && seen.insert(first));
            for _ in 1..PART_IDS {
                let id = ids.next();
                assert!(ids.has(id) && seen.insert(id));
            }
            assert_eq!(ids.next(), first, "round and round");
        }
        assert_eq!(seen.len(), 1 << 16);
    }
}
