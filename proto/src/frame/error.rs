//! What can be wrong with frames.

use vfio_checkpoint_seal::SealMismatch;

use crate::domain::Invalid;
use crate::ids::StreamId;

/// A frame was refused, or frames are missing. The stream is over, and what came before is not to be run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// It carries nothing that this version knows.
    #[error("frame {sequence} has no body that this version knows")]
    NoBody {
        /// The number that it states.
        sequence: u64,
    },
    /// It was damaged on the way.
    #[error(
        "frame {sequence} is damaged: it states the CRC32C {stated:#010x}, its content has {computed:#010x}"
    )]
    Crc {
        /// The number that it states, which may be part of the damage.
        sequence: u64,
        /// What it states.
        stated: u32,
        /// What its content has.
        computed: u32,
    },
    /// It belongs to another stream.
    #[error("frame {sequence} belongs to stream {found}, and this is stream {expected}")]
    WrongStream {
        /// Its number.
        sequence: u64,
        /// This stream.
        expected: StreamId,
        /// Its stream.
        found: StreamId,
    },
    /// Frames before it are missing, or come later.
    #[error("frame {found} came where frame {expected} was expected: frames are missing or out of order")]
    Gap {
        /// The next number.
        expected: u64,
        /// Its number.
        found: u64,
    },
    /// It came before.
    #[error("frame {found} came again: frame {expected} was expected")]
    Repeated {
        /// The next number.
        expected: u64,
        /// Its number.
        found: u64,
    },
    /// What is in it is not what it may be.
    #[error("frame {sequence} is not valid")]
    Body {
        /// Its number.
        sequence: u64,
        /// What is wrong.
        #[source]
        source: Invalid,
    },
    /// It is about a device that is not of the set.
    #[error("frame {sequence} is about device {device}, and the set has {devices}, counted from 0")]
    UnknownDevice {
        /// Its number.
        sequence: u64,
        /// Its device.
        device: u32,
        /// How many there are.
        devices: usize,
    },
    /// Progress is about the set, and this names a device.
    #[error("frame {sequence} is progress of device {device}; progress is of the set and names device 0")]
    ProgressOfDevice {
        /// Its number.
        sequence: u64,
        /// Its device.
        device: u32,
    },
    /// State after the end of its device's state.
    #[error("device {device}: state came after its seal, at offset {offset}")]
    AfterSeal {
        /// The device.
        device: usize,
        /// Where the state says that it belongs.
        offset: u64,
    },
    /// The end of a device's state, twice.
    #[error("device {device}: a second seal came")]
    SecondSeal {
        /// The device.
        device: usize,
    },
    /// State that is not the next of its device.
    #[error("device {device}: state for offset {found} came where offset {expected} was expected")]
    Offset {
        /// The device.
        device: usize,
        /// The next offset.
        expected: u64,
        /// The offset that came.
        found: u64,
    },
    /// A chunk without state.
    #[error("device {device}: an empty chunk came at offset {offset}")]
    EmptyChunk {
        /// The device.
        device: usize,
        /// Where.
        offset: u64,
    },
    /// More state in one chunk than was agreed on.
    #[error("device {device}: a chunk of {found_bytes} bytes came, and at most {max_bytes} were agreed on")]
    ChunkTooLong {
        /// The device.
        device: usize,
        /// What was agreed on.
        max_bytes: u32,
        /// What came.
        found_bytes: usize,
    },
    /// More state of one device than was agreed on.
    #[error(
        "device {device}: its state goes beyond the {max_bytes} bytes that were agreed on, to {found_bytes}"
    )]
    DeviceTooLong {
        /// The device.
        device: usize,
        /// What was agreed on.
        max_bytes: u64,
        /// What it would be with this chunk.
        found_bytes: u64,
    },
    /// The seal is on more or less state than came.
    #[error("device {device}: its seal is on {sealed_bytes} bytes, and {found_bytes} came")]
    SealLength {
        /// The device.
        device: usize,
        /// What the seal says.
        sealed_bytes: u64,
        /// What came.
        found_bytes: u64,
    },
    /// The seal is on other state than came.
    #[error("device {device}: what came is not what was sealed")]
    SealDigest {
        /// The device.
        device: usize,
        /// Both digests.
        #[source]
        source: SealMismatch,
    },
    /// The stream ended too early.
    #[error(
        "the stream ended after frame {next_sequence} was expected, and before the seals of devices {devices:?}"
    )]
    Unsealed {
        /// The next number.
        next_sequence: u64,
        /// The devices without a seal.
        devices: Vec<usize>,
    },
    /// A frame was refused before.
    #[error("the stream failed before, and takes nothing more")]
    AlreadyFailed,
}

/// The giver was asked for a frame that its taker would refuse.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GiveError {
    /// No such device in the set.
    #[error("device {device} is not of the set, which has {devices}, counted from 0")]
    UnknownDevice {
        /// The device.
        device: usize,
        /// How many there are.
        devices: usize,
    },
    /// The device's state is sealed.
    #[error("device {device} is sealed, and nothing of it comes after its seal")]
    AfterSeal {
        /// The device.
        device: usize,
    },
    /// There is more state than was agreed on.
    #[error(
        "device {device} has more state than the {max_bytes} bytes that were agreed on: {found_bytes} so far; \
         raise the limit of the stream"
    )]
    DeviceTooLong {
        /// The device.
        device: usize,
        /// What was agreed on.
        max_bytes: u64,
        /// What there is.
        found_bytes: u64,
    },
    /// State was handed in, and not all of its frames were taken.
    #[error(
        "device {device}: not all frames of its state were taken to be sent, so no seal can be put on it"
    )]
    Torn {
        /// The device.
        device: usize,
    },
}
