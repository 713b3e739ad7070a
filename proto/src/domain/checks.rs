//! The checks that several messages share. Each takes the field's name and returns the validated value.

use std::collections::BTreeSet;
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::{Invalid, MAX_DURATION};
use crate::MAX_DEVICES;
use crate::ids::{DeviceName, IdError, RequestId};
use crate::version::VersionRange;

/// A generated enum. An unknown number is refused.
pub(super) fn known<E: TryFrom<i32>>(field: &str, number: i32) -> Result<E, Invalid> {
    E::try_from(number).map_err(|_| {
        Invalid::new(
            field,
            format!("{number} is no value that this version knows; use one of the .proto file"),
        )
    })
}

/// A message field that must be there.
pub(super) fn present<T>(field: &str, value: Option<T>) -> Result<T, Invalid> {
    value.ok_or_else(|| Invalid::new(field, "it must be set"))
}

/// An id as text.
pub(super) fn id<T: FromStr<Err = IdError>>(field: &str, text: &str) -> Result<T, Invalid> {
    text.parse().map_err(|error| Invalid::new(field, error))
}

/// An id as text that may be left empty.
pub(super) fn optional_id<T: FromStr<Err = IdError>>(field: &str, text: &str) -> Result<Option<T>, Invalid> {
    if text.is_empty() { Ok(None) } else { id(field, text).map(Some) }
}

pub(super) fn request_id(text: &str) -> Result<Option<RequestId>, Invalid> {
    optional_id("request_id", text)
}

/// A text for people: `min_bytes` to `max_bytes` long and without control characters.
pub(super) fn text(field: &str, text: String, min_bytes: usize, max_bytes: usize) -> Result<String, Invalid> {
    if text.len() < min_bytes || text.len() > max_bytes {
        let problem = format!("it has {} bytes, and {min_bytes} to {max_bytes} are allowed", text.len());
        return Err(Invalid::new(field, problem));
    }
    if let Some((at, found)) = text.char_indices().find(|(_, c)| c.is_control()) {
        return Err(Invalid::new(field, format!("{found:?} at byte {at} is a control character; remove it")));
    }
    Ok(text)
}

/// The devices of a set: 1 to [`MAX_DEVICES`], each once.
pub(super) fn device_set(field: &str, names: &[String]) -> Result<Vec<DeviceName>, Invalid> {
    set_size(field, names.len())?;
    unique_devices(field, names)
}

/// Device names, each once. Their number is the caller's to bound, first.
pub(super) fn unique_devices(field: &str, names: &[String]) -> Result<Vec<DeviceName>, Invalid> {
    let mut seen = BTreeSet::new();
    let mut devices = Vec::with_capacity(names.len());
    for (index, name) in names.iter().enumerate() {
        let device: DeviceName = id(&format!("{field}[{index}]"), name)?;
        if !seen.insert(name.as_str()) {
            return Err(Invalid::new(
                format!("{field}[{index}]"),
                format!("{device} is named twice; name it once"),
            ));
        }
        devices.push(device);
    }
    Ok(devices)
}

pub(super) fn set_size(field: &str, devices: usize) -> Result<(), Invalid> {
    if (1..=MAX_DEVICES).contains(&devices) {
        return Ok(());
    }
    Err(Invalid::new(field, format!("it has {devices} entries; give 1 to {MAX_DEVICES}")))
}

/// A duration: over 0 and at most `max`.
pub(super) fn duration_up_to(
    field: &str,
    duration: prost_types::Duration,
    max: Duration,
) -> Result<Duration, Invalid> {
    let found = u64::try_from(duration.seconds)
        .ok()
        .zip(u32::try_from(duration.nanos).ok().filter(|nanos| *nanos < 1_000_000_000))
        .map(|(seconds, nanos)| Duration::new(seconds, nanos));
    match found {
        Some(found) if !found.is_zero() && found <= max => Ok(found),
        Some(found) => {
            Err(Invalid::new(field, format!("{found:?} is not over 0 and at most {} s", max.as_secs())))
        }
        None => Err(Invalid::new(
            field,
            format!("{} s and {} ns are no positive duration", duration.seconds, duration.nanos),
        )),
    }
}

/// A duration that may be unset, by the bound of requests.
pub(super) fn duration(
    field: &str,
    duration: Option<prost_types::Duration>,
) -> Result<Option<Duration>, Invalid> {
    duration.map(|duration| duration_up_to(field, duration, MAX_DURATION)).transpose()
}

/// A moment between the years 1970 and 9999.
pub(super) fn time(field: &str, time: prost_types::Timestamp) -> Result<SystemTime, Invalid> {
    const END_OF_9999_SECONDS: u64 = 253_402_300_800;
    let found = u64::try_from(time.seconds)
        .ok()
        .filter(|seconds| *seconds < END_OF_9999_SECONDS)
        .zip(u32::try_from(time.nanos).ok().filter(|nanos| *nanos < 1_000_000_000))
        .and_then(|(seconds, nanos)| UNIX_EPOCH.checked_add(Duration::new(seconds, nanos)));
    found.ok_or_else(|| {
        Invalid::new(
            field,
            format!("{} s and {} ns are no moment from 1970 to 9999", time.seconds, time.nanos),
        )
    })
}

/// A duration for the wire. Durations of this system fit; one beyond 2^63 s becomes that.
pub(super) fn wire_duration(duration: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: duration.subsec_nanos().cast_signed(),
    }
}

/// Bytes where 0 means that there is no limit.
pub(super) fn limit(bytes: u64) -> Option<u64> {
    (bytes != 0).then_some(bytes)
}

/// The versions that a peer speaks.
pub(super) fn versions(min: u32, max: u32) -> Result<VersionRange, Invalid> {
    VersionRange::new(min, max).ok_or_else(|| {
        Invalid::new("min_version", format!("{min} to {max} is no range of versions; they begin at 1"))
    })
}
