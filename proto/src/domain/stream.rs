//! How a stream of device state is opened, and what may be sent on it.

use std::time::Duration;

use super::{Invalid, Manifest, checks};
use crate::ids::{OperationName, StreamId};
use crate::version::{Version, VersionRange};
use crate::{MAX_CHUNK_BYTES, MIN_CHUNK_BYTES, v1};

/// What the caller is to the state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StreamRole {
    /// Takes the state of a save.
    Taker,
    /// Gives the state for a restore.
    Giver,
}

/// The caller's first message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamOpen {
    /// The operation.
    pub operation: OperationName,
    /// What the caller is to the state.
    pub role: StreamRole,
    /// What the caller speaks.
    pub versions: VersionRange,
    /// The longest chunk that a caller takes. None for the agent's. May be over [`MAX_CHUNK_BYTES`], which no agent
    /// uses.
    pub max_chunk_bytes: Option<u32>,
    /// The stream that a giver resumes. None for a new stream.
    pub resume: Option<StreamId>,
}

impl TryFrom<v1::StreamOpen> for StreamOpen {
    type Error = Invalid;

    fn try_from(wire: v1::StreamOpen) -> Result<Self, Invalid> {
        let role = match checks::known("role", wire.role)? {
            v1::StreamRole::Unspecified => {
                return Err(Invalid::new("role", "it must be given: TAKER for a save, GIVER for a restore"));
            }
            v1::StreamRole::Taker => StreamRole::Taker,
            v1::StreamRole::Giver => StreamRole::Giver,
        };
        let versions = VersionRange::new(wire.min_version, wire.max_version).ok_or_else(|| {
            let problem = format!(
                "{} to {} is no range of versions; they begin at 1",
                wire.min_version, wire.max_version
            );
            Invalid::new("min_version", problem)
        })?;
        let max_chunk_bytes = match wire.max_chunk_bytes {
            0 => None,
            bytes if bytes < MIN_CHUNK_BYTES => {
                let problem = format!("it is {bytes}; give at least {MIN_CHUNK_BYTES}, or 0 for the agent's");
                return Err(Invalid::new("max_chunk_bytes", problem));
            }
            bytes => Some(bytes),
        };
        let resume = match (wire.resume_stream_id, role) {
            (0, _) => None,
            (_, StreamRole::Taker) => {
                let problem = "a taker gives it; only a giver resumes a stream";
                return Err(Invalid::new("resume_stream_id", problem));
            }
            (_, StreamRole::Giver) if !versions.max().resumes() => {
                let problem = format!("version 2 resumes a stream, and the caller speaks {versions}");
                return Err(Invalid::new("resume_stream_id", problem));
            }
            (stream, StreamRole::Giver) => Some(StreamId(stream)),
        };
        let operation = checks::id("operation", &wire.operation)?;
        Ok(Self { operation, role, versions, max_chunk_bytes, resume })
    }
}

impl From<StreamOpen> for v1::StreamOpen {
    fn from(open: StreamOpen) -> Self {
        let role = match open.role {
            StreamRole::Taker => v1::StreamRole::Taker,
            StreamRole::Giver => v1::StreamRole::Giver,
        };
        Self {
            operation: open.operation.into(),
            role: role.into(),
            min_version: open.versions.min().0,
            max_version: open.versions.max().0,
            max_chunk_bytes: open.max_chunk_bytes.unwrap_or(0),
            resume_stream_id: open.resume.map_or(0, |stream| stream.0),
        }
    }
}

/// What may be sent on a stream. The bytes are enforced by [`crate::frame`] and [`crate::stream`], the times by whoever
/// has the clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamLimits {
    /// The longest chunk: [`MIN_CHUNK_BYTES`] to [`MAX_CHUNK_BYTES`].
    pub max_chunk_bytes: u32,
    /// The most bytes of one device's state, over 0.
    pub max_device_bytes: u64,
    /// The stream ends where nothing is sent for this long.
    pub idle_timeout: Duration,
    /// The stream ends after this long.
    pub lifetime: Duration,
    /// An Ack comes after at most this many bytes of state, over 0.
    pub ack_interval_bytes: u64,
    /// State that nothing follows is acknowledged after this long. None where only the bytes count.
    pub ack_delay: Option<Duration>,
}

impl StreamLimits {
    /// The longest lifetime of a stream: tens of GiB over a slow link.
    pub const MAX_LIFETIME: Duration = Duration::from_hours(7 * 24);
    /// The longest time that an ack may wait for more state.
    pub const MAX_ACK_DELAY: Duration = Duration::from_mins(1);
}

impl TryFrom<v1::StreamLimits> for StreamLimits {
    type Error = Invalid;

    fn try_from(wire: v1::StreamLimits) -> Result<Self, Invalid> {
        if !(MIN_CHUNK_BYTES..=MAX_CHUNK_BYTES).contains(&wire.max_chunk_bytes) {
            let problem =
                format!("it is {}, not {MIN_CHUNK_BYTES} to {MAX_CHUNK_BYTES}", wire.max_chunk_bytes);
            return Err(Invalid::new("max_chunk_bytes", problem));
        }
        let over_0 =
            |field, bytes: u64| if bytes == 0 { Err(Invalid::new(field, "it is 0")) } else { Ok(bytes) };
        let idle_timeout = checks::present("idle_timeout", wire.idle_timeout)?;
        let lifetime = checks::present("lifetime", wire.lifetime)?;
        Ok(Self {
            max_chunk_bytes: wire.max_chunk_bytes,
            max_device_bytes: over_0("max_device_bytes", wire.max_device_bytes)?,
            idle_timeout: checks::duration_up_to("idle_timeout", idle_timeout, super::MAX_DURATION)?,
            lifetime: checks::duration_up_to("lifetime", lifetime, Self::MAX_LIFETIME)?,
            ack_interval_bytes: over_0("ack_interval_bytes", wire.ack_interval_bytes)?,
            ack_delay: wire
                .ack_delay
                .map(|delay| checks::duration_up_to("ack_delay", delay, Self::MAX_ACK_DELAY))
                .transpose()?,
        })
    }
}

impl From<StreamLimits> for v1::StreamLimits {
    fn from(limits: StreamLimits) -> Self {
        Self {
            max_chunk_bytes: limits.max_chunk_bytes,
            max_device_bytes: limits.max_device_bytes,
            idle_timeout: Some(checks::wire_duration(limits.idle_timeout)),
            lifetime: Some(checks::wire_duration(limits.lifetime)),
            ack_interval_bytes: limits.ack_interval_bytes,
            ack_delay: limits.ack_delay.map(checks::wire_duration),
        }
    }
}

/// The agent's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamOpened {
    /// The version that both speak from here on.
    pub version: Version,
    /// Names this stream.
    pub stream_id: StreamId,
    /// What is streamed.
    pub manifest: Manifest,
    /// What may be sent.
    pub limits: StreamLimits,
    /// The frame that the taker expects next: 0 of a new stream.
    pub next_sequence: u64,
}

impl StreamOpened {
    /// Whether this can be the answer to `open`: a version and a chunk that were offered, and the stream that was asked
    /// for.
    pub fn answers(&self, open: &StreamOpen) -> Result<(), Invalid> {
        if let Some(max) = open.max_chunk_bytes
            && self.limits.max_chunk_bytes > max
        {
            let problem = format!("it is {}, and at most {max} was asked for", self.limits.max_chunk_bytes);
            return Err(Invalid::new("limits.max_chunk_bytes", problem));
        }
        match open.resume {
            Some(_) if !self.version.resumes() => {
                let problem = format!("it is {}, which resumes no stream, and one was to be", self.version);
                Err(Invalid::new("version", problem))
            }
            Some(stream) if self.stream_id != stream => {
                let problem = format!("it is {}, and {stream} was to be resumed", self.stream_id);
                Err(Invalid::new("stream_id", problem))
            }
            None if self.next_sequence != 0 => {
                let problem = format!("it is {}, and a new stream begins with 0", self.next_sequence);
                Err(Invalid::new("next_sequence", problem))
            }
            Some(_) | None => Ok(()),
        }
    }
}

impl TryFrom<v1::StreamOpened> for StreamOpened {
    type Error = Invalid;

    fn try_from(wire: v1::StreamOpened) -> Result<Self, Invalid> {
        let manifest = checks::present("manifest", wire.manifest)?;
        let limits = checks::present("limits", wire.limits)?;
        if wire.version == 0 {
            return Err(Invalid::new("version", "it is 0, and versions begin at 1"));
        }
        Ok(Self {
            version: Version(wire.version),
            stream_id: StreamId(wire.stream_id),
            manifest: manifest.try_into().map_err(|invalid: Invalid| invalid.within("manifest"))?,
            limits: limits.try_into().map_err(|invalid: Invalid| invalid.within("limits"))?,
            next_sequence: wire.next_sequence,
        })
    }
}

impl From<StreamOpened> for v1::StreamOpened {
    fn from(opened: StreamOpened) -> Self {
        Self {
            version: opened.version.0,
            stream_id: opened.stream_id.0,
            manifest: Some(opened.manifest.into()),
            limits: Some(opened.limits.into()),
            next_sequence: opened.next_sequence,
        }
    }
}
