//! The vfio-user wire format, without any I/O: bytes in, typed messages out, and back.
//!
//! ```text
//!   16 bytes --Header::decode(limits)--> Header { id, code, kind, body_bytes }
//!                                          | kind
//!                   Command ---------------+--------------- Reply           ErrorReply
//!       body --Command::decode--> Command      body --Reply::decode--> Reply     (no body)
//!
//!   Command::encode | Reply::encode | encode_error  --> one whole message, header first
//! ```
//!
//! Everything is little-endian. The structures behind the header are those of `linux/vfio.h` where the protocol takes
//! them over (region, interrupt and device info, `VFIO_DEVICE_FEATURE` and its data), and its own elsewhere.
//!
//! # Invariants
//! - A header that announces more than [`Limits`] allow is refused before anybody allocates for its body.
//! - A length inside a message (`argsz`, `size`, `count`, number of ranges) is compared with the bytes that are there
//!   before it is used. No input makes a decoder panic or allocate more than a small multiple of its length.
//! - Decoding is strict in what a message *means* and lax in what it may carry besides: bytes after the part that is
//!   understood are ignored in replies (one server pads what it read up to what was asked for), and a bare header is a
//!   success without details. Unknown commands and features are data, not errors.
//!
//! # Failure paths
//! [`DecodeError`] says which message and what about it; [`TooLong`] that a message was not made at all.

mod command;
mod feature;
mod header;
mod reply;
mod version;
mod wire;

#[cfg(test)]
mod tests;

pub use command::{Command, DmaMap, DmaUnmap, IRQ_SET_BYTES, MAP_BYTES, SetIrqs, UnmapBitmap};
pub use feature::{
    FeatureId, FeatureMessage, FeatureOperation, FeaturePayload, LogControl, LogReport, MigrationState,
    NO_DATA_FD,
};
pub use header::{Code, HEADER_BYTES, Header, Kind, Limits};
pub use reply::{DeviceInfo, IrqInfo, RegionInfo, Reply, encode_error};
pub use version::{Capabilities, Negotiated, Version, VersionError};

/// Bytes before the data in a migration data message.
pub const MIG_DATA_BYTES: u32 = 8;

/// Bytes of a device-info structure: the least `argsz` of its request.
pub const DEVICE_INFO_BYTES: u32 = 16;

/// Bytes of a region-info structure without capabilities: the least `argsz` of its request.
pub const REGION_INFO_BYTES: u32 = 32;

/// Bytes of an interrupt-info structure: the least `argsz` of its request.
pub const IRQ_INFO_BYTES: u32 = 16;

/// Why bytes are not a message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// The header's size is less than the header.
    #[error("a message of {size_bytes} bytes is shorter than its header")]
    ShorterThanHeader {
        /// The size in the header.
        size_bytes: u32,
    },
    /// The header's size is over the limit.
    #[error("a message of {size_bytes} bytes is over the limit of {limit_bytes}")]
    OverLimit {
        /// The size in the header.
        size_bytes: u32,
        /// The most that is accepted.
        limit_bytes: u32,
    },
    /// The header is neither a command nor a reply.
    #[error("message type {number} is neither command nor reply")]
    UnknownType {
        /// The type in the header.
        number: u32,
    },
    /// The message ends before its fixed part does.
    #[error("{what} needs {needed_bytes} bytes and has {found_bytes}")]
    Truncated {
        /// The message.
        what: &'static str,
        /// Bytes needed.
        needed_bytes: usize,
        /// Bytes there.
        found_bytes: usize,
    },
    /// A length in the message does not fit what is there, or what must be.
    #[error("{what}: {field} is {stated}, which does not fit {actual} bytes")]
    Length {
        /// The message.
        what: &'static str,
        /// The field.
        field: &'static str,
        /// Its value.
        stated: u64,
        /// What it was held against.
        actual: u64,
    },
    /// A field has a value that means nothing.
    #[error("{what}: {field} is {value:#x}, which means nothing")]
    Field {
        /// The message.
        what: &'static str,
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// The capabilities are not what the protocol says they are.
    #[error("the peer's capabilities cannot be read: {reason}")]
    Capabilities {
        /// What is wrong with them.
        reason: String,
    },
}

/// A message would be longer than the peer accepts. Nothing was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a message of {size_bytes} bytes would be over the limit of {limit_bytes}")]
pub struct TooLong {
    /// How long it would have been.
    pub size_bytes: usize,
    /// The most that may be sent.
    pub limit_bytes: u32,
}
