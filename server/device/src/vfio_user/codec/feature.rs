//! `VFIO_DEVICE_FEATURE` as a message, in both directions.
//!
//! ```text
//!   u32 argsz | u32 flags: feature 0..15, GET 1<<16, SET 1<<17, PROBE 1<<18 | data as in linux/vfio.h
//!
//!   MIGRATION         1  get  -> u64 flags
//!   MIG_DEVICE_STATE  2  get/set  u32 state, u32 data fd (means nothing here: data goes through MIG_DATA_*)
//!   DMA_LOGGING_START 6  set  u64 page size, u32 ranges, u32 0, ranges of u64 iova, u64 length
//!   DMA_LOGGING_STOP  7  set
//!   DMA_LOGGING_REPORT 8 get  u64 iova, u64 length, u64 page size  -> the same, and the bitmap inline
//!   MIG_DATA_SIZE     9  get  -> u64 bytes
//! ```
//!
//! # Invariants
//! - `argsz` of a request covers the data that it carries, and bounds the reply of a GET.
//! - A feature that is not in the list keeps its data as bytes.

use super::DecodeError;
use super::wire::{Cursor, Frame};

/// Bytes before a feature's data.
pub(super) const FEATURE_BYTES: u32 = 8;
const FEATURE_MASK: u32 = 0xffff;
const GET: u32 = 1 << 16;
const SET: u32 = 1 << 17;
const PROBE: u32 = 1 << 18;
/// The data fd of a SET that asks for none.
pub const NO_DATA_FD: u32 = u32::MAX;

/// A feature.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FeatureId {
    /// The migration flags.
    Migration,
    /// The migration state.
    MigDeviceState,
    /// Start the DMA log.
    DmaLoggingStart,
    /// Stop the DMA log.
    DmaLoggingStop,
    /// Read and clear the DMA log.
    DmaLoggingReport,
    /// How many bytes a stop-copy takes.
    MigDataSize,
    /// Another feature, by its number.
    Other(u16),
}

impl From<u16> for FeatureId {
    fn from(number: u16) -> Self {
        match number {
            1 => Self::Migration,
            2 => Self::MigDeviceState,
            6 => Self::DmaLoggingStart,
            7 => Self::DmaLoggingStop,
            8 => Self::DmaLoggingReport,
            9 => Self::MigDataSize,
            other => Self::Other(other),
        }
    }
}

impl From<FeatureId> for u16 {
    fn from(feature: FeatureId) -> Self {
        match feature {
            FeatureId::Migration => 1,
            FeatureId::MigDeviceState => 2,
            FeatureId::DmaLoggingStart => 6,
            FeatureId::DmaLoggingStop => 7,
            FeatureId::DmaLoggingReport => 8,
            FeatureId::MigDataSize => 9,
            FeatureId::Other(number) => number,
        }
    }
}

/// What is done with a feature.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FeatureOperation {
    /// Read it.
    Get,
    /// Write it.
    Set,
    /// Ask whether it can be read or written; neither flag asks only whether it exists.
    Probe {
        /// Whether it can be read.
        get: bool,
        /// Whether it can be written.
        set: bool,
    },
}

/// The migration state as it is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MigrationState {
    /// The kernel's number of the state, unchecked.
    pub state: u32,
    /// Not used over a socket: [`NO_DATA_FD`] or 0.
    pub data_fd: u32,
}

/// What to log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogControl {
    /// Page size asked for; in a reply the one in force.
    pub page_bytes: u64,
    /// Start and length of each range, unchecked. None means everything that is mapped.
    pub ranges: Vec<(u64, u64)>,
}

/// A report of the log: what is asked, and in a reply the bitmap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogReport<'a> {
    /// First address.
    pub iova: u64,
    /// Length in bytes.
    pub length_bytes: u64,
    /// Page size of the bitmap.
    pub page_bytes: u64,
    /// Little-endian, page 0 is bit 0. Empty in a request.
    pub bitmap: &'a [u8],
}

impl LogReport<'_> {
    /// Bytes of a bitmap over a range, in whole 64-bit words. `None` where the page size is no power of two.
    pub fn bitmap_bytes(length_bytes: u64, page_bytes: u64) -> Option<u64> {
        page_bytes.is_power_of_two().then(|| length_bytes.div_ceil(page_bytes).div_ceil(64) * 8)
    }

    /// `argsz` of the request whose reply carries a bitmap of this length: the reply's size without its header.
    pub fn argsz(bitmap_bytes: u32) -> u32 {
        bitmap_bytes.saturating_add(FEATURE_BYTES + 24)
    }
}

/// The data of a feature.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FeaturePayload<'a> {
    /// None: a probe, a GET that only asks, a SET that is all said by its name.
    Empty,
    /// The migration flags, unchecked.
    Migration(u64),
    /// The migration state.
    State(MigrationState),
    /// How many bytes a stop-copy takes.
    DataSize(u64),
    /// What to log.
    LogStart(LogControl),
    /// A report of the log.
    LogReport(LogReport<'a>),
    /// The data of another feature.
    Opaque(&'a [u8]),
}

/// A feature request or its reply: the two have one layout.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use]
pub struct FeatureMessage<'a> {
    /// In a request the most that the reply may take, this structure included; in a reply what it takes.
    pub argsz: u32,
    /// Which feature.
    pub feature: FeatureId,
    /// What is done with it.
    pub operation: FeatureOperation,
    /// Its data.
    pub payload: FeaturePayload<'a>,
}

/// Which way a feature message goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    Request,
    Reply,
}

impl<'a> FeatureMessage<'a> {
    /// A message whose `argsz` is exactly what it takes itself. A GET that expects more back says so in
    /// [`reply_room`](Self::reply_room).
    pub fn new(feature: FeatureId, operation: FeatureOperation, payload: FeaturePayload<'a>) -> Self {
        let argsz = FEATURE_BYTES.saturating_add(payload.bytes());
        Self { argsz, feature, operation, payload }
    }

    /// The same with room for `bytes` of data in the reply.
    pub fn reply_room(self, bytes: u32) -> Self {
        Self { argsz: self.argsz.max(FEATURE_BYTES.saturating_add(bytes)), ..self }
    }

    /// How many bytes of data the reply to this request may carry.
    #[must_use]
    pub fn reply_room_bytes(&self) -> u32 {
        self.argsz.saturating_sub(FEATURE_BYTES)
    }

    pub(super) fn decode(body: &'a [u8], direction: Direction) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new("a device feature", body);
        let (argsz, flags) = (cursor.u32()?, cursor.u32()?);
        if direction == Direction::Request {
            cursor.argsz(argsz, FEATURE_BYTES.into())?;
        }
        let operation = match (flags & PROBE != 0, flags & GET != 0, flags & SET != 0) {
            (true, get, set) => FeatureOperation::Probe { get, set },
            (false, true, false) => FeatureOperation::Get,
            (false, false, true) => FeatureOperation::Set,
            (false, true, true) | (false, false, false) => return Err(cursor.field("flags", flags.into())),
        };
        if flags & !(FEATURE_MASK | GET | SET | PROBE) != 0 {
            return Err(cursor.field("flags", flags.into()));
        }
        // At most 0xffff by the mask.
        let feature = FeatureId::from(u16::try_from(flags & FEATURE_MASK).unwrap_or_default());
        let data = cursor.rest();
        if direction == Direction::Request && operation == FeatureOperation::Set {
            Cursor::new("a device feature", data).argsz(argsz, body.len() as u64)?;
        }
        let payload = FeaturePayload::decode(feature, operation, direction, data)?;
        Ok(Self { argsz, feature, operation, payload })
    }

    pub(super) fn encode(&self, frame: &mut Frame) {
        let operation = match self.operation {
            FeatureOperation::Get => GET,
            FeatureOperation::Set => SET,
            FeatureOperation::Probe { get, set } => {
                PROBE | if get { GET } else { 0 } | if set { SET } else { 0 }
            }
        };
        frame.u32(self.argsz).u32(operation | u32::from(u16::from(self.feature)));
        self.payload.encode(frame);
    }
}

impl<'a> FeaturePayload<'a> {
    fn bytes(&self) -> u32 {
        match self {
            Self::Empty => 0,
            Self::Migration(_) | Self::State(_) | Self::DataSize(_) => 8,
            Self::LogStart(control) => {
                u32::try_from(control.ranges.len()).unwrap_or(u32::MAX).saturating_mul(16).saturating_add(16)
            }
            Self::LogReport(report) => Frame::length(report.bitmap).saturating_add(24),
            Self::Opaque(data) => Frame::length(data),
        }
    }

    fn decode(
        feature: FeatureId,
        operation: FeatureOperation,
        direction: Direction,
        data: &'a [u8],
    ) -> Result<Self, DecodeError> {
        let only_asks = match (operation, direction) {
            (FeatureOperation::Probe { .. }, _) => true,
            // What a SET echoes may be left out.
            (FeatureOperation::Set, Direction::Reply) => data.is_empty(),
            (FeatureOperation::Set, Direction::Request) | (FeatureOperation::Get, Direction::Reply) => false,
            // Room for the answer may be sent along and holds nothing, except where the question has arguments.
            (FeatureOperation::Get, Direction::Request) => match feature {
                FeatureId::Migration
                | FeatureId::MigDeviceState
                | FeatureId::MigDataSize
                | FeatureId::DmaLoggingStart
                | FeatureId::DmaLoggingStop => true,
                FeatureId::DmaLoggingReport | FeatureId::Other(_) => false,
            },
        };
        if only_asks {
            return Ok(Self::Empty);
        }
        match feature {
            FeatureId::Migration => Ok(Self::Migration(Cursor::new("migration flags", data).u64()?)),
            FeatureId::MigDeviceState => {
                let mut cursor = Cursor::new("a migration state", data);
                Ok(Self::State(MigrationState { state: cursor.u32()?, data_fd: cursor.u32()? }))
            }
            FeatureId::MigDataSize => Ok(Self::DataSize(Cursor::new("a migration data size", data).u64()?)),
            FeatureId::DmaLoggingStart => LogControl::decode(data).map(Self::LogStart),
            FeatureId::DmaLoggingStop => Ok(Self::Empty),
            FeatureId::DmaLoggingReport => {
                let mut cursor = Cursor::new("a DMA log report", data);
                let (iova, length_bytes, page_bytes) = (cursor.u64()?, cursor.u64()?, cursor.u64()?);
                let bitmap = match direction {
                    Direction::Request => &[],
                    Direction::Reply => cursor.rest(),
                };
                Ok(Self::LogReport(LogReport { iova, length_bytes, page_bytes, bitmap }))
            }
            FeatureId::Other(_) if data.is_empty() => Ok(Self::Empty),
            FeatureId::Other(_) => Ok(Self::Opaque(data)),
        }
    }

    fn encode(&self, frame: &mut Frame) {
        match self {
            Self::Empty => {}
            Self::Migration(value) | Self::DataSize(value) => {
                frame.u64(*value);
            }
            Self::State(state) => {
                frame.u32(state.state).u32(state.data_fd);
            }
            Self::LogStart(control) => {
                let ranges = u32::try_from(control.ranges.len()).unwrap_or(u32::MAX);
                frame.u64(control.page_bytes).u32(ranges).u32(0);
                for &(iova, length_bytes) in &control.ranges {
                    frame.u64(iova).u64(length_bytes);
                }
            }
            Self::LogReport(report) => {
                frame.u64(report.iova).u64(report.length_bytes).u64(report.page_bytes).data(report.bitmap);
            }
            Self::Opaque(data) => {
                frame.data(data);
            }
        }
    }
}

impl LogControl {
    fn decode(data: &[u8]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new("a DMA log's ranges", data);
        let page_bytes = cursor.u64()?;
        let (count, _reserved) = (cursor.u32()?, cursor.u32()?);
        // Compared in 64 bits with what is there, so the collection below is no longer than the message.
        let ranges = cursor.data("the ranges' length", u64::from(count) * 16)?;
        let (pairs, _) = ranges.as_chunks::<16>();
        let ranges = pairs
            .iter()
            .map(|pair| {
                let mut cursor = Cursor::new("a DMA log's range", pair);
                Ok((cursor.u64()?, cursor.u64()?))
            })
            .collect::<Result<_, DecodeError>>()?;
        Ok(Self { page_bytes, ranges })
    }
}
