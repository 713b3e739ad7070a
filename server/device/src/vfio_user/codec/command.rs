//! What one side asks of the other.
//!
//! ```text
//!   client -> server: everything but            server -> client: DMA_READ, DMA_WRITE
//! ```
//!
//! # Invariants
//! - A command decodes only if its lengths agree with the bytes that are there; a count without data (a read) is not
//!   bounded here: whoever answers bounds it by [`Limits::max_data_xfer_bytes`](super::Limits::max_data_xfer_bytes).
//! - Data is borrowed from the message.

use super::feature::{Direction, FeatureMessage};
use super::wire::{Cursor, Frame};
use super::{
    Code, DEVICE_INFO_BYTES, DecodeError, IRQ_INFO_BYTES, Kind, Limits, MIG_DATA_BYTES, REGION_INFO_BYTES,
    TooLong, Version,
};

/// Bytes of a DMA mapping.
pub const MAP_BYTES: u32 = 32;
/// Bytes of an unmapping without a bitmap.
pub(super) const UNMAP_BYTES: u32 = 24;
/// Bytes of an interrupt command without its data.
pub const IRQ_SET_BYTES: u32 = 20;

/// Memory of the client that the device may use. Comes with a file descriptor where the device may map it itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DmaMap {
    /// How, as bits: see the constants.
    pub flags: u32,
    /// Where the memory begins in the file.
    pub offset: u64,
    /// Where the device sees it.
    pub iova: u64,
    /// Length in bytes, unchecked.
    pub length_bytes: u64,
}

impl DmaMap {
    /// The device may read it.
    pub const READ: u32 = 1 << 0;
    /// The device may write it.
    pub const WRITE: u32 = 1 << 1;
}

/// The bitmap that an unmapping asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnmapBitmap {
    /// Page size.
    pub page_bytes: u64,
    /// Length of the bitmap that should come back; covered by the request's `argsz`.
    pub bitmap_bytes: u64,
}

/// Memory that the device may use no longer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DmaUnmap {
    /// The most that the reply may take.
    pub argsz: u32,
    /// Whether everything goes ([`ALL`](Self::ALL)), or a bitmap is asked for.
    pub flags: u32,
    /// Where it was mapped.
    pub iova: u64,
    /// Length in bytes, unchecked.
    pub length_bytes: u64,
    /// The bitmap asked for, if one is.
    pub bitmap: Option<UnmapBitmap>,
}

impl DmaUnmap {
    /// Flag: the reply carries the bitmap of dirty pages.
    pub const GET_DIRTY_BITMAP: u32 = 1 << 0;
    /// Flag: all mappings; address and length are 0.
    pub const ALL: u32 = 1 << 1;
    /// `argsz` of an unmapping without a bitmap.
    pub const BYTES: u32 = UNMAP_BYTES;
}

/// Interrupts to arm, disarm, mask or trigger, as `VFIO_DEVICE_SET_IRQS`. Eventfds come beside the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SetIrqs<'a> {
    /// What is done and what the data is, as `VFIO_IRQ_SET_*`.
    pub flags: u32,
    /// The kind of interrupt.
    pub index: u32,
    /// The first vector.
    pub start: u32,
    /// How many vectors, unchecked.
    pub count: u32,
    /// One byte a vector for `VFIO_IRQ_SET_DATA_BOOL`; otherwise it means nothing.
    pub data: &'a [u8],
}

/// What one side asks.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use]
pub enum Command<'a> {
    /// Agree on a version.
    Version(Version),
    /// Map memory.
    DmaMap(DmaMap),
    /// Unmap memory.
    DmaUnmap(DmaUnmap),
    /// What device is it?
    GetInfo {
        /// The most that the reply may take.
        argsz: u32,
    },
    /// What region is it?
    GetRegionInfo {
        /// The most that the reply may take, capabilities included.
        argsz: u32,
        /// The region.
        index: u32,
    },
    /// How many interrupts?
    GetIrqInfo {
        /// The most that the reply may take.
        argsz: u32,
        /// The kind.
        index: u32,
    },
    /// Set up interrupts.
    SetIrqs(SetIrqs<'a>),
    /// Read from a region.
    RegionRead {
        /// The region.
        region: u32,
        /// Where in it.
        offset: u64,
        /// How much, unchecked.
        count: u32,
    },
    /// Write to a region.
    RegionWrite {
        /// The region.
        region: u32,
        /// Where in it.
        offset: u64,
        /// What.
        data: &'a [u8],
    },
    /// Read memory of the client.
    DmaRead {
        /// The device's address of it.
        iova: u64,
        /// How much, unchecked.
        count: u64,
    },
    /// Write memory of the client.
    DmaWrite {
        /// The device's address of it.
        iova: u64,
        /// What.
        data: &'a [u8],
    },
    /// Reset the device.
    Reset,
    /// Ask for, write or read a feature.
    Feature(FeatureMessage<'a>),
    /// Read from the migration stream.
    MigDataRead {
        /// How much at most; covered by the message's `argsz`.
        size: u32,
    },
    /// Write to the migration stream.
    MigDataWrite {
        /// What.
        data: &'a [u8],
    },
    /// A command that is known by its number only.
    Other {
        /// Which.
        code: Code,
        /// Its body.
        body: &'a [u8],
    },
}

impl<'a> Command<'a> {
    /// The command's number.
    pub fn code(&self) -> Code {
        match self {
            Self::Version(_) => Code::Version,
            Self::DmaMap(_) => Code::DmaMap,
            Self::DmaUnmap(_) => Code::DmaUnmap,
            Self::GetInfo { .. } => Code::GetInfo,
            Self::GetRegionInfo { .. } => Code::GetRegionInfo,
            Self::GetIrqInfo { .. } => Code::GetIrqInfo,
            Self::SetIrqs(_) => Code::SetIrqs,
            Self::RegionRead { .. } => Code::RegionRead,
            Self::RegionWrite { .. } => Code::RegionWrite,
            Self::DmaRead { .. } => Code::DmaRead,
            Self::DmaWrite { .. } => Code::DmaWrite,
            Self::Reset => Code::Reset,
            Self::Feature(_) => Code::Feature,
            Self::MigDataRead { .. } => Code::MigDataRead,
            Self::MigDataWrite { .. } => Code::MigDataWrite,
            Self::Other { code, .. } => *code,
        }
    }

    /// Reads the body of a command.
    pub fn decode(code: Code, body: &'a [u8]) -> Result<Self, DecodeError> {
        match code {
            Code::Version => Version::decode(body).map(Self::Version),
            Code::DmaMap => DmaMap::decode(body).map(Self::DmaMap),
            Code::DmaUnmap => DmaUnmap::decode(body).map(Self::DmaUnmap),
            Code::GetInfo => {
                let mut cursor = Cursor::new("a device info request", body);
                let argsz = cursor.u32()?;
                Ok(Self::GetInfo { argsz: cursor.argsz(argsz, DEVICE_INFO_BYTES.into())? })
            }
            Code::GetRegionInfo => {
                let (argsz, index) = indexed("a region info request", body, REGION_INFO_BYTES)?;
                Ok(Self::GetRegionInfo { argsz, index })
            }
            Code::GetIrqInfo => {
                let (argsz, index) = indexed("an interrupt info request", body, IRQ_INFO_BYTES)?;
                Ok(Self::GetIrqInfo { argsz, index })
            }
            Code::SetIrqs => SetIrqs::decode(body).map(Self::SetIrqs),
            Code::RegionRead => {
                let mut cursor = Cursor::new("a region read", body);
                let (offset, region, count) = (cursor.u64()?, cursor.u32()?, cursor.u32()?);
                Ok(Self::RegionRead { region, offset, count })
            }
            Code::RegionWrite => {
                let mut cursor = Cursor::new("a region write", body);
                let (offset, region, count) = (cursor.u64()?, cursor.u32()?, cursor.u32()?);
                Ok(Self::RegionWrite { region, offset, data: cursor.exact("count", count.into())? })
            }
            Code::DmaRead => {
                let mut cursor = Cursor::new("a DMA read", body);
                Ok(Self::DmaRead { iova: cursor.u64()?, count: cursor.u64()? })
            }
            Code::DmaWrite => {
                let mut cursor = Cursor::new("a DMA write", body);
                let (iova, count) = (cursor.u64()?, cursor.u64()?);
                Ok(Self::DmaWrite { iova, data: cursor.exact("count", count)? })
            }
            Code::Reset => Ok(Self::Reset),
            Code::Feature => FeatureMessage::decode(body, Direction::Request).map(Self::Feature),
            Code::MigDataRead => {
                let mut cursor = Cursor::new("a migration data read", body);
                let (argsz, size) = (cursor.u32()?, cursor.u32()?);
                cursor.argsz(argsz, u64::from(size) + u64::from(MIG_DATA_BYTES))?;
                Ok(Self::MigDataRead { size })
            }
            Code::MigDataWrite => {
                let mut cursor = Cursor::new("a migration data write", body);
                let (argsz, size) = (cursor.u32()?, cursor.u32()?);
                cursor.argsz(argsz, u64::from(size) + u64::from(MIG_DATA_BYTES))?;
                Ok(Self::MigDataWrite { data: cursor.data("size", size.into())? })
            }
            Code::GetRegionIoFds | Code::RegionWriteMulti | Code::Unknown(_) => {
                Ok(Self::Other { code, body })
            }
        }
    }

    /// The whole message.
    pub fn encode(&self, id: u16, no_reply: bool, limits: Limits) -> Result<Vec<u8>, TooLong> {
        let mut frame = Frame::new();
        match self {
            Self::Version(version) => version.encode(&mut frame),
            Self::DmaMap(map) => {
                let frame = frame.u32(MAP_BYTES).u32(map.flags).u64(map.offset);
                frame.u64(map.iova).u64(map.length_bytes);
            }
            Self::DmaUnmap(unmap) => {
                frame.u32(unmap.argsz).u32(unmap.flags).u64(unmap.iova).u64(unmap.length_bytes);
                if let Some(bitmap) = unmap.bitmap {
                    frame.u64(bitmap.page_bytes).u64(bitmap.bitmap_bytes);
                }
            }
            Self::GetInfo { argsz } => {
                frame.u32(*argsz).u32(0).u32(0).u32(0);
            }
            Self::GetRegionInfo { argsz, index } => {
                frame.u32(*argsz).u32(0).u32(*index).u32(0).u64(0).u64(0);
            }
            Self::GetIrqInfo { argsz, index } => {
                frame.u32(*argsz).u32(0).u32(*index).u32(0);
            }
            Self::SetIrqs(irqs) => {
                let argsz = Frame::length(irqs.data).saturating_add(IRQ_SET_BYTES);
                let frame = frame.u32(argsz).u32(irqs.flags).u32(irqs.index);
                frame.u32(irqs.start).u32(irqs.count).data(irqs.data);
            }
            Self::RegionRead { region, offset, count } => {
                frame.u64(*offset).u32(*region).u32(*count);
            }
            Self::RegionWrite { region, offset, data } => {
                frame.u64(*offset).u32(*region).u32(Frame::length(data)).data(data);
            }
            Self::DmaRead { iova, count } => {
                frame.u64(*iova).u64(*count);
            }
            Self::DmaWrite { iova, data } => {
                frame.u64(*iova).u64(data.len() as u64).data(data);
            }
            Self::Reset => {}
            Self::Feature(feature) => feature.encode(&mut frame),
            Self::MigDataRead { size } => {
                frame.u32(size.saturating_add(MIG_DATA_BYTES)).u32(*size);
            }
            Self::MigDataWrite { data } => {
                let size = Frame::length(data);
                frame.u32(size.saturating_add(MIG_DATA_BYTES)).u32(size).data(data);
            }
            Self::Other { body, .. } => {
                frame.data(body);
            }
        }
        frame.finish(id, self.code(), Kind::Command { no_reply }, limits)
    }
}

/// `argsz`, flags, index: how the requests for info of one of several begin. The whole structure must be there.
fn indexed(what: &'static str, body: &[u8], least: u32) -> Result<(u32, u32), DecodeError> {
    let mut cursor = Cursor::new(what, body);
    let (argsz, _flags, index) = (cursor.u32()?, cursor.u32()?, cursor.u32()?);
    cursor.argsz(argsz, least.into())?;
    Ok((argsz, index))
}

impl DmaMap {
    fn decode(body: &[u8]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new("a DMA mapping", body);
        let argsz = cursor.u32()?;
        let flags = cursor.u32()?;
        let (offset, iova, length_bytes) = (cursor.u64()?, cursor.u64()?, cursor.u64()?);
        cursor.argsz(argsz, MAP_BYTES.into())?;
        Ok(Self { flags, offset, iova, length_bytes })
    }
}

impl DmaUnmap {
    fn decode(body: &[u8]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new("a DMA unmapping", body);
        let (argsz, flags) = (cursor.u32()?, cursor.u32()?);
        let (iova, length_bytes) = (cursor.u64()?, cursor.u64()?);
        cursor.argsz(argsz, UNMAP_BYTES.into())?;
        let bitmap = if flags & Self::GET_DIRTY_BITMAP == 0 {
            None
        } else {
            let bitmap = UnmapBitmap { page_bytes: cursor.u64()?, bitmap_bytes: cursor.u64()? };
            cursor.argsz(argsz, bitmap.bitmap_bytes.saturating_add(u64::from(UNMAP_BYTES) + 16))?;
            Some(bitmap)
        };
        Ok(Self { argsz, flags, iova, length_bytes, bitmap })
    }
}

impl<'a> SetIrqs<'a> {
    fn decode(body: &'a [u8]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new("an interrupt command", body);
        let (argsz, flags, index) = (cursor.u32()?, cursor.u32()?, cursor.u32()?);
        let (start, count) = (cursor.u32()?, cursor.u32()?);
        cursor.argsz(argsz, IRQ_SET_BYTES.into())?;
        Ok(Self { flags, index, start, count, data: cursor.rest() })
    }
}
