//! The contract: the .proto files, generated code, validated messages, frames and their verification. No I/O.
//!
//! ```text
//!   bytes --prost--> v1::StartSaveRequest --TryFrom--> domain::SaveRequestSpec      refused: Invalid{field, problem}
//!   bytes --prost--> v1::StreamMessage --stream::TakerSide--> frame::Accepted       refused: ProtocolError
//!   state --stream::GiverSide--> v1::StreamMessage --prost--> bytes
//! ```
//!
//! Invariants:
//! - Nothing that a peer sent is used before it is validated: the domain types have no other way in for wire messages.
//! - A frame is believed only after its CRC, its stream, its number and its place are right, and a device's state
//!   only after its seal.
//! - Every length is bounded, and so is what a message decodes to ([`codec`]). The bounds are below, and in the modules
//!   that check them.

pub mod codec;
pub mod digest;
pub mod domain;
pub mod frame;
pub mod ids;
pub mod parts;
pub mod proof;
mod reason;
pub mod stream;
pub mod version;
pub mod wire;

/// Generated from `vfio/checkpoint/v1`.
#[allow(
    missing_docs,
    missing_debug_implementations,
    unused_qualifications,
    clippy::pedantic,
    clippy::allow_attributes_without_reason,
    reason = "generated"
)]
pub mod v1 {
    tonic::include_proto!("vfio.checkpoint.v1");

    /// The descriptors of all of the above and of what they import, without comments: for server reflection.
    pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
}

/// The longest chunk that a stream may agree on. A longer one saves no time: at 1 MiB the cost of a frame is already
/// lost in that of its hash, while each chunk in flight is memory at both ends.
pub const MAX_CHUNK_BYTES: u32 = 2 << 20;

/// The longest chunk where nobody asks for another.
pub const DEFAULT_CHUNK_BYTES: u32 = 1 << 20;

/// The shortest `max_chunk_bytes` that a stream may agree on.
pub const MIN_CHUNK_BYTES: u32 = 64 << 10;

/// The longest encoded manifest: 4 KiB for each of 64 devices, where one takes well under 1 KiB. It travels in one
/// message of a stream and in one request, and a decoded one can be a hundred times as large where it is made to be.
pub const MAX_MANIFEST_BYTES: usize = 256 << 10;

/// The longest encoded request of any RPC but `StreamState`: a manifest, and slack for what is around it.
pub const MAX_REQUEST_BYTES: usize = MAX_MANIFEST_BYTES + (64 << 10);

/// The longest encoded message of `StreamState`, and of any response: a chunk, and slack for what is around it. It stays
/// under 4 MiB, which is what gRPC libraries take where nobody tells them otherwise.
pub const MAX_MESSAGE_BYTES: usize = MAX_CHUNK_BYTES as usize + (64 << 10);

/// The most devices in one operation.
pub const MAX_DEVICES: usize = 64;
