//! The id of a checkpoint, and of the upload that made it: when, and a random number, as text in the order of time.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// `{milliseconds since 1970, 11 hexadecimal digits}-{random, 16 hexadecimal digits}`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct CheckpointId {
    millis: u64,
    random: u64,
}

/// A text is not the id of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{found:?} is no checkpoint id: 11 hexadecimal digits in lowercase, a hyphen, and 16 more, as in {EXAMPLE}"
)]
pub struct InvalidId {
    found: String,
}

const EXAMPLE: &str = "019aa7b4c10-5c0ffee15c0ffee1";
const MILLIS_DIGITS: usize = 11;
const MILLIS_BITS: u32 = 44;
const RANDOM_DIGITS: usize = 16;
const MOST_MILLIS: u64 = (1 << MILLIS_BITS) - 1;

impl CheckpointId {
    /// How many bytes it takes in a table.
    pub(crate) const BYTES: usize = 16;

    /// The id of something that begins now.
    pub fn new(now: SystemTime, random: u64) -> Self {
        let since = now.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        Self { millis: u64::try_from(since.as_millis()).unwrap_or(u64::MAX).min(MOST_MILLIS), random }
    }

    /// When it began.
    pub fn time(self) -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(self.millis)
    }

    pub(crate) fn to_bytes(self) -> [u8; Self::BYTES] {
        ((u128::from(self.millis) << 64) | u128::from(self.random)).to_be_bytes()
    }

    pub(crate) fn from_bytes(bytes: [u8; Self::BYTES]) -> Option<Self> {
        let whole = u128::from_be_bytes(bytes);
        let millis = u64::try_from(whole >> 64).ok().filter(|millis| *millis <= MOST_MILLIS)?;
        Some(Self { millis, random: u64::try_from(whole & u128::from(u64::MAX)).ok()? })
    }
}

impl fmt::Display for CheckpointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:011x}-{:016x}", self.millis, self.random)
    }
}

impl FromStr for CheckpointId {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let invalid = || InvalidId { found: text.chars().take(64).collect() };
        let hex = |part: &str, digits: usize| {
            let is_hex = part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
            (part.len() == digits && is_hex).then(|| u64::from_str_radix(part, 16).ok()).flatten()
        };
        let (millis, random) = text.split_once('-').ok_or_else(invalid)?;
        let millis = hex(millis, MILLIS_DIGITS).ok_or_else(invalid)?;
        let random = hex(random, RANDOM_DIGITS).ok_or_else(invalid)?;
        Ok(Self { millis, random })
    }
}

impl TryFrom<String> for CheckpointId {
    type Error = InvalidId;

    fn try_from(text: String) -> Result<Self, InvalidId> {
        text.parse()
    }
}

impl From<CheckpointId> for String {
    fn from(id: CheckpointId) -> Self {
        id.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_bytes_round_trip_and_keep_the_order_of_time() {
        let at = |millis: u64, random| CheckpointId::new(UNIX_EPOCH + Duration::from_millis(millis), random);
        let ids = [at(0, u64::MAX), at(1, 0), at(1, 1), at(1 << 40, 7), at(u64::MAX, 3)];
        for id in ids {
            assert_eq!(id.to_string().parse(), Ok(id));
            assert_eq!(CheckpointId::from_bytes(id.to_bytes()), Some(id));
        }
        assert!(ids.is_sorted());
        assert!(ids.map(|id| id.to_string()).is_sorted());
    }

    #[test]
    fn anything_else_is_refused() {
        let long = "0".repeat(28);
        for text in [
            "",
            "-",
            "../../etc/passwd",
            "019aa7b4c10-5c0ffee15c0ffee",
            "019AA7B4C10-5C0FFEE15C0FFEE1",
            "+19aa7b4c10-5c0ffee15c0ffee1",
            &long,
        ] {
            assert!(text.parse::<CheckpointId>().is_err(), "{text}");
        }
        assert_eq!(CheckpointId::from_bytes([0xff; 16]), None);
    }
}
