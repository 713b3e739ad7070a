//! What one side answers.
//!
//! ```text
//!   success: Reply, or a bare header (Reply::Done)          refusal: encode_error, a bare header with an errno
//! ```
//!
//! # Invariants
//! - Data is borrowed from the message, and is exactly what its length field says: bytes after it are ignored.
//! - Where the asker needs an answer, [`Reply::Done`] is not one; it says so, not this module.

use super::command::UNMAP_BYTES;
use super::feature::{Direction, FeatureMessage};
use super::header::{Header, LEAST_SIZE_BYTES};
use super::wire::{Cursor, Frame};
use super::{
    Code, DEVICE_INFO_BYTES, DecodeError, IRQ_INFO_BYTES, Kind, Limits, MIG_DATA_BYTES, REGION_INFO_BYTES,
    TooLong, Version,
};

/// What kind of device it is, as `VFIO_DEVICE_GET_INFO`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceInfo {
    /// `VFIO_DEVICE_FLAGS_*`.
    pub flags: u32,
    /// How many regions.
    pub regions: u32,
    /// How many kinds of interrupt.
    pub irqs: u32,
}

/// A region, as `VFIO_DEVICE_GET_REGION_INFO`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionInfo<'a> {
    /// The least `argsz` with which the capabilities come.
    pub argsz: u32,
    /// `VFIO_REGION_INFO_FLAG_*`.
    pub flags: u32,
    /// Which region.
    pub index: u32,
    /// Where the capabilities begin in this structure, 0 for nowhere.
    pub cap_offset: u32,
    /// Its size.
    pub size_bytes: u64,
    /// Where it is in the file that may come with the reply.
    pub offset: u64,
    /// The capabilities, unread.
    pub capabilities: &'a [u8],
}

/// Interrupts of one kind, as `VFIO_DEVICE_GET_IRQ_INFO`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IrqInfo {
    /// `VFIO_IRQ_INFO_*`.
    pub flags: u32,
    /// The kind.
    pub index: u32,
    /// How many vectors.
    pub count: u32,
}

/// What one side answers.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use]
pub enum Reply<'a> {
    /// It was done, and there is no more to say.
    Done(Code),
    /// The server's version.
    Version(Version),
    /// Memory was unmapped.
    DmaUnmap {
        /// As asked.
        flags: u32,
        /// As asked.
        iova: u64,
        /// As asked.
        length_bytes: u64,
        /// What follows: where a bitmap was asked for, its description (16 bytes) and the bitmap.
        bitmap: &'a [u8],
    },
    /// What device it is.
    Info(DeviceInfo),
    /// What region it is.
    RegionInfo(RegionInfo<'a>),
    /// How many interrupts.
    IrqInfo(IrqInfo),
    /// What was read from a region.
    RegionRead {
        /// The region.
        region: u32,
        /// Where in it.
        offset: u64,
        /// What, perhaps less than was asked.
        data: &'a [u8],
    },
    /// A region was written.
    RegionWrite {
        /// The region.
        region: u32,
        /// Where in it.
        offset: u64,
        /// How much was taken, unchecked.
        count: u32,
    },
    /// What was read from the client's memory.
    DmaRead {
        /// The device's address of it.
        iova: u64,
        /// What.
        data: &'a [u8],
    },
    /// The client's memory was written.
    DmaWrite {
        /// The device's address of it.
        iova: u64,
        /// How much was taken, unchecked.
        count: u64,
    },
    /// A feature was probed, read or written.
    Feature(FeatureMessage<'a>),
    /// What was read from the migration stream.
    MigDataRead {
        /// What, perhaps less than was asked. Nothing is the end, or nothing for now.
        data: &'a [u8],
    },
    /// The answer to a command that is known by its number only.
    Other {
        /// Which.
        code: Code,
        /// Its body, not empty.
        body: &'a [u8],
    },
}

impl<'a> Reply<'a> {
    /// The number of the command that is answered.
    pub fn code(&self) -> Code {
        match self {
            Self::Done(code) | Self::Other { code, .. } => *code,
            Self::Version(_) => Code::Version,
            Self::DmaUnmap { .. } => Code::DmaUnmap,
            Self::Info(_) => Code::GetInfo,
            Self::RegionInfo(_) => Code::GetRegionInfo,
            Self::IrqInfo(_) => Code::GetIrqInfo,
            Self::RegionRead { .. } => Code::RegionRead,
            Self::RegionWrite { .. } => Code::RegionWrite,
            Self::DmaRead { .. } => Code::DmaRead,
            Self::DmaWrite { .. } => Code::DmaWrite,
            Self::Feature(_) => Code::Feature,
            Self::MigDataRead { .. } => Code::MigDataRead,
        }
    }

    /// Reads the body of a successful reply.
    pub fn decode(code: Code, body: &'a [u8]) -> Result<Self, DecodeError> {
        if body.is_empty() {
            return Ok(Self::Done(code));
        }
        match code {
            Code::Version => Version::decode(body).map(Self::Version),
            // Answered by a bare header; an echo of the request says nothing more.
            Code::DmaMap | Code::SetIrqs | Code::Reset | Code::MigDataWrite => Ok(Self::Done(code)),
            Code::DmaUnmap => {
                let mut cursor = Cursor::new("a DMA unmapping's reply", body);
                let (_argsz, flags) = (cursor.u32()?, cursor.u32()?);
                let (iova, length_bytes) = (cursor.u64()?, cursor.u64()?);
                Ok(Self::DmaUnmap { flags, iova, length_bytes, bitmap: cursor.rest() })
            }
            Code::GetInfo => {
                let mut cursor = Cursor::new("a device info", body);
                let (_argsz, flags) = (cursor.u32()?, cursor.u32()?);
                Ok(Self::Info(DeviceInfo { flags, regions: cursor.u32()?, irqs: cursor.u32()? }))
            }
            Code::GetRegionInfo => {
                let mut cursor = Cursor::new("a region info", body);
                Ok(Self::RegionInfo(RegionInfo {
                    argsz: cursor.u32()?,
                    flags: cursor.u32()?,
                    index: cursor.u32()?,
                    cap_offset: cursor.u32()?,
                    size_bytes: cursor.u64()?,
                    offset: cursor.u64()?,
                    capabilities: cursor.rest(),
                }))
            }
            Code::GetIrqInfo => {
                let mut cursor = Cursor::new("an interrupt info", body);
                let (_argsz, flags) = (cursor.u32()?, cursor.u32()?);
                Ok(Self::IrqInfo(IrqInfo { flags, index: cursor.u32()?, count: cursor.u32()? }))
            }
            Code::RegionRead => {
                let mut cursor = Cursor::new("a region read's reply", body);
                let (offset, region, count) = (cursor.u64()?, cursor.u32()?, cursor.u32()?);
                Ok(Self::RegionRead { region, offset, data: cursor.data("count", count.into())? })
            }
            Code::RegionWrite => {
                let mut cursor = Cursor::new("a region write's reply", body);
                let (offset, region, count) = (cursor.u64()?, cursor.u32()?, cursor.u32()?);
                Ok(Self::RegionWrite { region, offset, count })
            }
            Code::DmaRead => {
                let mut cursor = Cursor::new("a DMA read's reply", body);
                let (iova, count) = (cursor.u64()?, cursor.u64()?);
                Ok(Self::DmaRead { iova, data: cursor.data("count", count)? })
            }
            Code::DmaWrite => {
                let mut cursor = Cursor::new("a DMA write's reply", body);
                Ok(Self::DmaWrite { iova: cursor.u64()?, count: cursor.u64()? })
            }
            Code::Feature => FeatureMessage::decode(body, Direction::Reply).map(Self::Feature),
            Code::MigDataRead => {
                let mut cursor = Cursor::new("a migration data read's reply", body);
                let (_argsz, size) = (cursor.u32()?, cursor.u32()?);
                Ok(Self::MigDataRead { data: cursor.data("size", size.into())? })
            }
            Code::GetRegionIoFds | Code::RegionWriteMulti | Code::Unknown(_) => {
                Ok(Self::Other { code, body })
            }
        }
    }

    /// The whole message.
    pub fn encode(&self, id: u16, limits: Limits) -> Result<Vec<u8>, TooLong> {
        let mut frame = Frame::new();
        match self {
            Self::Done(_) => {}
            Self::Version(version) => version.encode(&mut frame),
            Self::DmaUnmap { flags, iova, length_bytes, bitmap } => {
                let argsz = Frame::length(bitmap).saturating_add(UNMAP_BYTES);
                frame.u32(argsz).u32(*flags).u64(*iova).u64(*length_bytes).data(bitmap);
            }
            Self::Info(info) => {
                frame.u32(DEVICE_INFO_BYTES).u32(info.flags).u32(info.regions).u32(info.irqs);
            }
            Self::RegionInfo(info) => {
                let argsz = info.argsz.max(REGION_INFO_BYTES);
                let frame = frame.u32(argsz).u32(info.flags).u32(info.index).u32(info.cap_offset);
                frame.u64(info.size_bytes).u64(info.offset).data(info.capabilities);
            }
            Self::IrqInfo(info) => {
                frame.u32(IRQ_INFO_BYTES).u32(info.flags).u32(info.index).u32(info.count);
            }
            Self::RegionRead { region, offset, data } => {
                frame.u64(*offset).u32(*region).u32(Frame::length(data)).data(data);
            }
            Self::RegionWrite { region, offset, count } => {
                frame.u64(*offset).u32(*region).u32(*count);
            }
            Self::DmaRead { iova, data } => {
                frame.u64(*iova).u64(data.len() as u64).data(data);
            }
            Self::DmaWrite { iova, count } => {
                frame.u64(*iova).u64(*count);
            }
            Self::Feature(feature) => feature.encode(&mut frame),
            Self::MigDataRead { data } => {
                let size = Frame::length(data);
                frame.u32(size.saturating_add(MIG_DATA_BYTES)).u32(size).data(data);
            }
            Self::Other { body, .. } => {
                frame.data(body);
            }
        }
        frame.finish(id, self.code(), Kind::Reply, limits)
    }
}

/// The refusal of a command, as a whole message. An errno that is none becomes EINVAL.
#[must_use]
pub fn encode_error(id: u16, code: Code, errno: i32) -> Vec<u8> {
    Header { id, code, size_bytes: LEAST_SIZE_BYTES, kind: Kind::ErrorReply { errno } }.encode().to_vec()
}
