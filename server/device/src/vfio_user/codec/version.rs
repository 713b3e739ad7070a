//! The first message each way: version and capabilities, and what the two make of them.
//!
//! ```text
//!   u16 major | u16 minor | {"capabilities":{…}} NUL
//!
//!   client's Version --> server: major must be equal; minor and sizes: the smaller of both   = Negotiated
//!   server's Version <-- the agreed minor, its own capabilities
//! ```
//!
//! # Invariants
//! - Every capability has a default; one that is absent has it, and one that is not known is passed over.
//! - What was negotiated is never more than either side said, nor more than [`Limits::HARD_DATA_XFER_BYTES`].
//!
//! # Failure paths
//! Text that is no JSON, or a known capability of the wrong type, is [`DecodeError::Capabilities`]: a bound that
//! cannot be read cannot be kept. A missing NUL or no text at all is taken as it is meant.

use serde::{Deserialize, Serialize};

use super::wire::{Cursor, Frame};
use super::{DecodeError, Limits};

/// Default of [`Capabilities::max_msg_fds`].
const DEFAULT_MSG_FDS: u64 = 1;
/// Default of [`Capabilities::max_dma_maps`].
const DEFAULT_DMA_MAPS: u64 = 65535;
/// Default of [`Capabilities::pgsizes`].
const DEFAULT_PGSIZES: u64 = 4096;
/// Default of [`Capabilities::max_bitmap_bytes`].
const DEFAULT_BITMAP_BYTES: u64 = 256 * 1024 * 1024;

/// What one side can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// The most file descriptors it can receive with one message.
    pub max_msg_fds: u64,
    /// The most data it can receive in one message.
    pub max_data_xfer_bytes: u64,
    /// Page sizes of DMA mappings, or'ed.
    pub pgsizes: u64,
    /// The most DMA mappings at one time.
    pub max_dma_maps: u64,
    /// Page size of dirty bitmaps, where it knows migration.
    pub migration_pgsize: Option<u64>,
    /// The longest dirty bitmap.
    pub max_bitmap_bytes: u64,
    /// Whether it knows several region writes in one message.
    pub write_multiple: bool,
}

impl Default for Capabilities {
    fn default() -> Self {
        Self {
            max_msg_fds: DEFAULT_MSG_FDS,
            max_data_xfer_bytes: Limits::DEFAULT_DATA_XFER_BYTES.into(),
            pgsizes: DEFAULT_PGSIZES,
            max_dma_maps: DEFAULT_DMA_MAPS,
            migration_pgsize: None,
            max_bitmap_bytes: DEFAULT_BITMAP_BYTES,
            write_multiple: false,
        }
    }
}

/// The JSON around the capabilities.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Envelope {
    capabilities: Members,
}

/// The JSON members that mean something here.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Members {
    #[serde(skip_serializing_if = "Option::is_none")]
    max_msg_fds: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_data_xfer_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pgsizes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_dma_maps: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    migration: Option<Migration>,
    #[serde(skip_serializing_if = "Option::is_none")]
    write_multiple: Option<bool>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Migration {
    #[serde(skip_serializing_if = "Option::is_none")]
    pgsize: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_bitmap_size: Option<u64>,
}

impl Capabilities {
    fn decode(text: &[u8]) -> Result<Self, DecodeError> {
        let text = text.split(|&byte| byte == 0).next().unwrap_or_default();
        if text.trim_ascii().is_empty() {
            return Ok(Self::default());
        }
        let envelope: Envelope = serde_json::from_slice(text)
            .map_err(|error| DecodeError::Capabilities { reason: error.to_string() })?;
        let members = envelope.capabilities;
        let default = Self::default();
        let migration = members.migration;
        Ok(Self {
            max_msg_fds: members.max_msg_fds.unwrap_or(default.max_msg_fds),
            max_data_xfer_bytes: members.max_data_xfer_size.unwrap_or(default.max_data_xfer_bytes),
            pgsizes: members.pgsizes.unwrap_or(default.pgsizes),
            max_dma_maps: members.max_dma_maps.unwrap_or(default.max_dma_maps),
            migration_pgsize: migration.as_ref().and_then(|migration| migration.pgsize),
            max_bitmap_bytes: migration
                .and_then(|migration| migration.max_bitmap_size)
                .unwrap_or(default.max_bitmap_bytes),
            write_multiple: members.write_multiple.unwrap_or(default.write_multiple),
        })
    }

    /// Members at their default are left out where older peers do not know them.
    fn encode(&self) -> Vec<u8> {
        let default = Self::default();
        let bitmap = (self.max_bitmap_bytes != default.max_bitmap_bytes).then_some(self.max_bitmap_bytes);
        let migration = (self.migration_pgsize.is_some() || bitmap.is_some())
            .then_some(Migration { pgsize: self.migration_pgsize, max_bitmap_size: bitmap });
        let envelope = Envelope {
            capabilities: Members {
                max_msg_fds: Some(self.max_msg_fds),
                max_data_xfer_size: Some(self.max_data_xfer_bytes),
                pgsizes: (self.pgsizes != default.pgsizes).then_some(self.pgsizes),
                max_dma_maps: (self.max_dma_maps != default.max_dma_maps).then_some(self.max_dma_maps),
                migration,
                write_multiple: self.write_multiple.then_some(true),
            },
        };
        // Numbers and booleans in structs always serialize; an empty text would mean the defaults.
        let mut text = serde_json::to_vec(&envelope).unwrap_or_default();
        text.push(0);
        text
    }
}

/// The version message of one side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub struct Version {
    /// Incompatible with every other major.
    pub major: u16,
    /// The newest minor it speaks, and in the server's answer the one that both will.
    pub minor: u16,
    /// What it can do.
    pub capabilities: Capabilities,
}

impl Version {
    /// The major that this codec speaks.
    pub const MAJOR: u16 = 0;
    /// The newest minor that this codec speaks.
    pub const MINOR: u16 = 1;

    /// Our version with these capabilities.
    pub fn ours(capabilities: Capabilities) -> Self {
        Self { major: Self::MAJOR, minor: Self::MINOR, capabilities }
    }

    pub(super) fn decode(body: &[u8]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new("a version", body);
        let (major, minor) = (cursor.u16()?, cursor.u16()?);
        Ok(Self { major, minor, capabilities: Capabilities::decode(cursor.rest())? })
    }

    pub(super) fn encode(&self, frame: &mut Frame) {
        frame.u16(self.major).u16(self.minor).data(&self.capabilities.encode());
    }

    /// What holds between this side and the peer that sent `theirs`. The same on both sides.
    pub fn negotiate(&self, theirs: &Self) -> Result<Negotiated, VersionError> {
        if theirs.major != self.major {
            return Err(VersionError::Major { ours: self.major, theirs: theirs.major });
        }
        let data = self.capabilities.max_data_xfer_bytes.min(theirs.capabilities.max_data_xfer_bytes);
        if data == 0 {
            return Err(VersionError::NoData);
        }
        Ok(Negotiated {
            minor: self.minor.min(theirs.minor),
            limits: Limits::new(u32::try_from(data).unwrap_or(u32::MAX)),
            peer_max_msg_fds: theirs.capabilities.max_msg_fds,
            migration_pgsize: match (self.capabilities.migration_pgsize, theirs.capabilities.migration_pgsize)
            {
                (Some(ours), Some(theirs)) => Some(ours.min(theirs)),
                (one, other) => one.or(other),
            },
        })
    }

    /// The answer of a server that agrees with a client: its own capabilities and the minor of both.
    pub fn answer(&self, negotiated: &Negotiated) -> Self {
        Self { minor: negotiated.minor, ..*self }
    }
}

/// What two sides agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Negotiated {
    /// The minor that both speak.
    pub minor: u16,
    /// How long messages may be.
    pub limits: Limits,
    /// The most file descriptors the peer receives with one message.
    pub peer_max_msg_fds: u64,
    /// The smaller page size of dirty bitmaps, where either side named one.
    pub migration_pgsize: Option<u64>,
}

/// Why two sides cannot work together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum VersionError {
    /// Another major.
    #[error("the peer speaks major version {theirs}, this end {ours}")]
    Major {
        /// This end's.
        ours: u16,
        /// The peer's.
        theirs: u16,
    },
    /// One side can transfer nothing.
    #[error("a max_data_xfer_size of 0 leaves nothing to transfer")]
    NoData,
}
