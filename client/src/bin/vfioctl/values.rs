//! Values on the command line: short names for resources, and units that people write.
//!
//! Failure paths: each parser says what is expected; clap says where it stands.

use std::time::Duration;

use vfio_checkpoint_proto::ids::{CheckpointName, DeviceName, OperationName, RequestId, StoreName};
use vfio_checkpoint_proto::v1::IovaRange;

/// 300ms, 2s, 1m: over 0 and at most 24 hours, as in the contract.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let duration =
        humantime::parse_duration(text).map_err(|error| format!("{error}; give 300ms, 2s or 1m"))?;
    if duration.is_zero() || duration > Duration::from_hours(24) {
        return Err("give more than nothing and at most 24h".to_owned());
    }
    Ok(duration)
}

/// How long a certificate is valid: from a minute to ten years.
pub(crate) fn validity(text: &str) -> Result<Duration, String> {
    let duration = humantime::parse_duration(text).map_err(|error| format!("{error}; give 12h or 30d"))?;
    if duration < Duration::from_mins(1) || duration > Duration::from_hours(10 * 366 * 24) {
        return Err("give at least 1m and at most ten years".to_owned());
    }
    Ok(duration)
}

/// `vf0` or `devices/vf0`.
pub(crate) fn device(text: &str) -> Result<DeviceName, String> {
    let name = if text.starts_with("devices/") { text.parse() } else { DeviceName::from_id(text) };
    name.map_err(|error| error.to_string())
}

/// With or without `operations/`.
pub(crate) fn operation(text: &str) -> Result<OperationName, String> {
    let name = if text.starts_with("operations/") { text.parse() } else { OperationName::from_id(text) };
    name.map_err(|error| error.to_string())
}

/// A UUID that the caller makes up.
pub(crate) fn request(text: &str) -> Result<RequestId, String> {
    text.parse().map_err(|error: vfio_checkpoint_proto::ids::IdError| error.to_string())
}

/// `local` or `stores/local`.
pub(crate) fn store(text: &str) -> Result<StoreName, String> {
    let name = if text.starts_with("stores/") { text.parse() } else { StoreName::from_id(text) };
    name.map_err(|error| error.to_string())
}

/// `local/ID` or `stores/local/checkpoints/ID`.
pub(crate) fn checkpoint(text: &str) -> Result<CheckpointName, String> {
    if text.starts_with("stores/") {
        return text.parse().map_err(|error: vfio_checkpoint_proto::ids::IdError| error.to_string());
    }
    let Some((store, id)) = text.split_once('/') else {
        return Err("give the store too: STORE/ID, as `vfioctl checkpoints list` shows it".to_owned());
    };
    let store = StoreName::from_id(store).map_err(|error| error.to_string())?;
    CheckpointName::new(&store, id).map_err(|error| error.to_string())
}

/// The short form of a checkpoint's name, which [`checkpoint`] reads.
pub(crate) fn short_checkpoint(name: &str) -> String {
    name.parse::<CheckpointName>()
        .map_or_else(|_| name.to_owned(), |name| format!("{}/{}", name.store().id(), name.id()))
}

const UNITS: [(&str, u64); 4] = [("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("TiB", 1 << 40)];

/// 4096, 0x1000, 4KiB, 16MiB, 2GiB.
pub(crate) fn bytes(text: &str) -> Result<u64, String> {
    let wrong = || "give bytes such as 4096, 0x1000, 4KiB, 16MiB or 2GiB".to_owned();
    if let Some((digits, unit)) =
        UNITS.iter().find_map(|(name, unit)| text.strip_suffix(name).map(|digits| (digits, *unit)))
    {
        return number(digits).and_then(|count| count.checked_mul(unit)).ok_or_else(wrong);
    }
    number(text).ok_or_else(wrong)
}

/// A size of pages.
pub(crate) fn page_bytes(text: &str) -> Result<u64, String> {
    let bytes = bytes(text)?;
    if bytes.is_power_of_two() { Ok(bytes) } else { Err("give a power of two, such as 4KiB".to_owned()) }
}

/// `START+LENGTH`, such as `0x100000+16MiB`.
pub(crate) fn range(text: &str) -> Result<IovaRange, String> {
    let Some((start, length)) = text.split_once('+') else {
        return Err("give START+LENGTH, such as 0x100000+16MiB".to_owned());
    };
    let (start, length_bytes) = (bytes(start)?, bytes(length)?);
    // The last address must be one: a range may end at the very top, and not wrap around.
    if length_bytes == 0 || start.checked_add(length_bytes - 1).is_none() {
        return Err("the range is empty or goes beyond the last address".to_owned());
    }
    Ok(IovaRange { start, length_bytes })
}

fn number(text: &str) -> Option<u64> {
    // from_str_radix takes a sign, and an address has none.
    if text.starts_with(['+', '-']) {
        return None;
    }
    match text.strip_prefix("0x") {
        Some(digits) if !digits.starts_with(['+', '-']) => u64::from_str_radix(digits, 16).ok(),
        Some(_) => None,
        None => text.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_a_short_form() {
        assert_eq!(store("local").unwrap().as_str(), "stores/local");
        assert_eq!(store("stores/local").unwrap().as_str(), "stores/local");
        assert_eq!(checkpoint("local/0-1").unwrap().as_str(), "stores/local/checkpoints/0-1");
        assert_eq!(checkpoint("stores/local/checkpoints/0-1").unwrap().id(), "0-1");
        assert_eq!(short_checkpoint("stores/local/checkpoints/0-1"), "local/0-1");
        assert_eq!(short_checkpoint("what is that"), "what is that");
        for bad in ["", "0-1", "local/", "local/a/b", "stores/local/0-1", "../x"] {
            assert!(checkpoint(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn ranges_are_whole() {
        assert_eq!(range("0x1000+4KiB").unwrap(), IovaRange { start: 4096, length_bytes: 4096 });
        assert_eq!(range("0+0xffffffffffffffff").unwrap().length_bytes, u64::MAX);
        assert_eq!(range("0xfffffffffffff000+4096").unwrap().start, 0xffff_ffff_ffff_f000);
        for bad in
            ["", "4096", "0+0", "0xffffffffffffffff+2", "-1+4", "1++4", "0x+1", "0x-1+1", "1K+4", "1+4kib"]
        {
            assert!(range(bad).is_err(), "{bad}");
        }
        assert!(bytes("18446744073709551615GiB").is_err());
        assert_eq!(page_bytes("2MiB"), Ok(2 << 20));
        assert!(page_bytes("3000").is_err() && page_bytes("0").is_err());
    }
}
