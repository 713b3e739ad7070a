//! The header that every message begins with, and how long a message may be.
//!
//! ```text
//!   u16 id | u16 command | u32 size, header included | u32 flags | u32 errno
//!                                   flags: 0..3 type (0 command, 1 reply), 0x10 no reply wanted, 0x20 error
//! ```
//!
//! # Invariants
//! - A decoded header's size is at least the header's and at most the limit.
//! - An error reply has an errno in 1..=4095: what a peer may send besides (0, or a number that no errno has) reads as
//!   EINVAL, so that an error stays one.

use super::DecodeError;

/// Bytes of a header.
pub const HEADER_BYTES: usize = 16;
/// The same as the header's size field has it: the least there is.
pub(super) const LEAST_SIZE_BYTES: u32 = 16;

const TYPE_MASK: u32 = 0xf;
const TYPE_COMMAND: u32 = 0;
const TYPE_REPLY: u32 = 1;
const NO_REPLY: u32 = 1 << 4;
const ERROR: u32 = 1 << 5;
/// The kernel's own bound of an errno.
const MAX_ERRNO: u32 = 4095;

/// How long messages may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    max_data_xfer_bytes: u32,
}

impl Limits {
    /// What a peer that says nothing can transfer in one message.
    pub const DEFAULT_DATA_XFER_BYTES: u32 = 1024 * 1024;
    /// The most data this end ever accepts or sends in one message, whatever a peer offers.
    pub const HARD_DATA_XFER_BYTES: u32 = 16 * 1024 * 1024;
    /// Room besides the data: the header, the fixed part, and a region's capabilities.
    pub const OVERHEAD_BYTES: u32 = 4096;
    /// Before anything is negotiated: the version messages, whose capabilities are a few hundred bytes.
    pub const HANDSHAKE: Self = Self { max_data_xfer_bytes: 60 * 1024 };

    /// Limits for messages that carry up to `max_data_xfer_bytes` of data, cut to the hard limit.
    pub fn new(max_data_xfer_bytes: u32) -> Self {
        Self { max_data_xfer_bytes: max_data_xfer_bytes.min(Self::HARD_DATA_XFER_BYTES) }
    }

    /// The most data in one message.
    pub fn max_data_xfer_bytes(self) -> u32 {
        self.max_data_xfer_bytes
    }

    /// The longest message, header included.
    pub fn max_message_bytes(self) -> u32 {
        // At most 16 MiB + 4 KiB.
        self.max_data_xfer_bytes + Self::OVERHEAD_BYTES
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self::new(Self::DEFAULT_DATA_XFER_BYTES)
    }
}

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $number:literal,)*) => {
        /// What a message asks, or answers.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Code {
            $($(#[$doc])* $name,)*
            /// A command that the protocol may have and this codec does not.
            Unknown(u16),
        }

        impl Code {
            /// Every command that has a name.
            pub const KNOWN: &[Self] = &[$(Self::$name,)*];
        }

        impl From<u16> for Code {
            fn from(number: u16) -> Self {
                match number {
                    $($number => Self::$name,)*
                    other => Self::Unknown(other),
                }
            }
        }

        impl From<Code> for u16 {
            fn from(code: Code) -> Self {
                match code {
                    $(Code::$name => $number,)*
                    Code::Unknown(number) => number,
                }
            }
        }
    };
}

codes! {
    /// Agree on a version and capabilities; the first message.
    Version = 1,
    /// Make memory of the client known to the device.
    DmaMap = 2,
    /// Take memory away again.
    DmaUnmap = 3,
    /// What kind of device it is.
    GetInfo = 4,
    /// Where a region is and what it allows.
    GetRegionInfo = 5,
    /// File descriptors that stand for accesses to part of a region.
    GetRegionIoFds = 6,
    /// How many interrupts of a kind there are.
    GetIrqInfo = 7,
    /// Arm, disarm, mask or trigger interrupts.
    SetIrqs = 8,
    /// Read from a region.
    RegionRead = 9,
    /// Write to a region.
    RegionWrite = 10,
    /// The device reads memory of the client. Asked by the server.
    DmaRead = 11,
    /// The device writes memory of the client. Asked by the server.
    DmaWrite = 12,
    /// Reset the device.
    Reset = 13,
    /// Several small region writes at once.
    RegionWriteMulti = 15,
    /// `VFIO_DEVICE_FEATURE`.
    Feature = 16,
    /// Read from the migration data stream.
    MigDataRead = 17,
    /// Write to the migration data stream.
    MigDataWrite = 18,
}

/// What a message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Somebody asks.
    Command {
        /// The asker wants no answer, whether it succeeds or not.
        no_reply: bool,
    },
    /// It was done.
    Reply,
    /// It was refused.
    ErrorReply {
        /// Why, 1..=4095.
        errno: i32,
    },
}

/// The header of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub struct Header {
    /// Chosen by who asks, repeated in the reply. Each side counts its own.
    pub id: u16,
    /// The command that is asked or answered.
    pub code: Code,
    /// Size of the whole message.
    pub size_bytes: u32,
    /// Command or reply.
    pub kind: Kind,
}

impl Header {
    /// Reads a header and holds its size against the limits. Flags that mean nothing here are ignored.
    pub fn decode(bytes: &[u8; HEADER_BYTES], limits: Limits) -> Result<Self, DecodeError> {
        let [i0, i1, c0, c1, s0, s1, s2, s3, f0, f1, f2, f3, e0, e1, e2, e3] = *bytes;
        let size_bytes = u32::from_le_bytes([s0, s1, s2, s3]);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        let error = u32::from_le_bytes([e0, e1, e2, e3]);
        if size_bytes < LEAST_SIZE_BYTES {
            return Err(DecodeError::ShorterThanHeader { size_bytes });
        }
        let limit_bytes = limits.max_message_bytes();
        if size_bytes > limit_bytes {
            return Err(DecodeError::OverLimit { size_bytes, limit_bytes });
        }
        let kind = match flags & TYPE_MASK {
            TYPE_COMMAND => Kind::Command { no_reply: flags & NO_REPLY != 0 },
            TYPE_REPLY if flags & ERROR != 0 => Kind::ErrorReply { errno: sound_errno(error) },
            TYPE_REPLY => Kind::Reply,
            number => return Err(DecodeError::UnknownType { number }),
        };
        Ok(Self {
            id: u16::from_le_bytes([i0, i1]),
            code: Code::from(u16::from_le_bytes([c0, c1])),
            size_bytes,
            kind,
        })
    }

    /// The header as bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let (flags, error) = match self.kind {
            Kind::Command { no_reply: false } => (TYPE_COMMAND, 0),
            Kind::Command { no_reply: true } => (TYPE_COMMAND | NO_REPLY, 0),
            Kind::Reply => (TYPE_REPLY, 0),
            Kind::ErrorReply { errno } => {
                let errno = u32::try_from(errno).unwrap_or(0);
                (TYPE_REPLY | ERROR, u32::try_from(sound_errno(errno)).unwrap_or(0))
            }
        };
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..2].copy_from_slice(&self.id.to_le_bytes());
        bytes[2..4].copy_from_slice(&u16::from(self.code).to_le_bytes());
        bytes[4..8].copy_from_slice(&self.size_bytes.to_le_bytes());
        bytes[8..12].copy_from_slice(&flags.to_le_bytes());
        bytes[12..16].copy_from_slice(&error.to_le_bytes());
        bytes
    }

    /// How many bytes follow the header.
    pub fn body_bytes(&self) -> usize {
        usize::try_from(self.size_bytes).unwrap_or(usize::MAX).saturating_sub(HEADER_BYTES)
    }
}

fn sound_errno(number: u32) -> i32 {
    match i32::try_from(number) {
        Ok(errno) if (1..=MAX_ERRNO).contains(&number) => errno,
        Ok(_) | Err(_) => libc::EINVAL,
    }
}
