//! Requests about devices and operations that exist: one by name, a page of them, a wait, a reset, dirty pages.

use std::time::Duration;

use super::{Invalid, checks};
use crate::ids::{CheckpointName, DeviceName, OperationName, RequestId, StoreName};
use crate::v1;

/// The field `name` of `GetDevice` and the like.
pub fn device_name(name: &str) -> Result<DeviceName, Invalid> {
    checks::id("name", name)
}

/// The field `field` of `GetOperation` (`name`), `Cutover` (`operation`) and the like.
pub fn operation_name(field: &str, name: &str) -> Result<OperationName, Invalid> {
    checks::id(field, name)
}

/// The field `name` of `GetCheckpoint` and the like.
pub fn checkpoint_name(name: &str) -> Result<CheckpointName, Invalid> {
    checks::id("name", name)
}

/// Where a page begins, as the service that answers wrote it. Opaque to everybody else, so that service checks it again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageToken(String);

impl PageToken {
    /// The longest one.
    pub const MAX_BYTES: usize = 256;

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Which part of a list is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// At most this many, 1 to [`Page::MAX`].
    pub size: usize,
    /// Where it begins. None for the first page.
    pub token: Option<PageToken>,
}

impl Page {
    /// The most entries.
    pub const MAX: usize = 1000;
    /// How many entries where nobody says.
    pub const DEFAULT: usize = 100;

    fn new(size: i32, token: String) -> Result<Self, Invalid> {
        let size = match usize::try_from(size) {
            Ok(0) => Self::DEFAULT,
            Ok(size) if size <= Self::MAX => size,
            Ok(_) | Err(_) => {
                let problem = format!("it is {size}; give 1 to {}, or 0 for {}", Self::MAX, Self::DEFAULT);
                return Err(Invalid::new("page_size", problem));
            }
        };
        let token = checks::text("page_token", token, 0, PageToken::MAX_BYTES)?;
        Ok(Self { size, token: (!token.is_empty()).then_some(PageToken(token)) })
    }
}

impl TryFrom<v1::ListDevicesRequest> for Page {
    type Error = Invalid;

    fn try_from(wire: v1::ListDevicesRequest) -> Result<Self, Invalid> {
        Self::new(wire.page_size, wire.page_token)
    }
}

/// Which operations are wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OperationQuery {
    /// Which part of the list.
    pub page: Page,
    /// Only operations that are not done.
    pub active_only: bool,
    /// Only operations on this device.
    pub device: Option<DeviceName>,
}

impl TryFrom<v1::ListOperationsRequest> for OperationQuery {
    type Error = Invalid;

    fn try_from(wire: v1::ListOperationsRequest) -> Result<Self, Invalid> {
        Ok(Self {
            page: Page::new(wire.page_size, wire.page_token)?,
            active_only: wire.active_only,
            device: checks::optional_id("device", &wire.device)?,
        })
    }
}

/// Which checkpoints are wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointQuery {
    /// The store. None for the agent's first.
    pub store: Option<StoreName>,
    /// Which part of the list.
    pub page: Page,
}

impl TryFrom<v1::ListCheckpointsRequest> for CheckpointQuery {
    type Error = Invalid;

    fn try_from(wire: v1::ListCheckpointsRequest) -> Result<Self, Invalid> {
        Ok(Self {
            store: checks::optional_id("parent", &wire.parent)?,
            page: Page::new(wire.page_size, wire.page_token)?,
        })
    }
}

/// Which devices are watched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WatchSpec {
    /// Each once. Empty for all.
    pub names: Vec<DeviceName>,
}

impl WatchSpec {
    /// The most devices.
    pub const MAX_NAMES: usize = 1000;
}

impl TryFrom<v1::WatchDevicesRequest> for WatchSpec {
    type Error = Invalid;

    fn try_from(wire: v1::WatchDevicesRequest) -> Result<Self, Invalid> {
        if wire.names.len() > Self::MAX_NAMES {
            let problem = format!("it has {} entries; give at most {}", wire.names.len(), Self::MAX_NAMES);
            return Err(Invalid::new("names", problem));
        }
        Ok(Self { names: checks::unique_devices("names", &wire.names)? })
    }
}

/// What is waited for, and how long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WaitSpec {
    /// The operation.
    pub name: OperationName,
    /// How long. None for as long as the call's own deadline.
    pub timeout: Option<Duration>,
}

impl WaitSpec {
    /// The longest wait.
    pub const MAX_TIMEOUT: Duration = Duration::from_hours(1);
}

impl TryFrom<v1::WaitOperationRequest> for WaitSpec {
    type Error = Invalid;

    fn try_from(wire: v1::WaitOperationRequest) -> Result<Self, Invalid> {
        let timeout = wire
            .timeout
            .map(|timeout| checks::duration_up_to("timeout", timeout, Self::MAX_TIMEOUT))
            .transpose()?;
        Ok(Self { name: checks::id("name", &wire.name)?, timeout })
    }
}

/// What may become of the state in a device that is reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResetMode {
    /// Bring it to RUNNING with the state that it carries, or fail.
    KeepState,
    /// Reset it: its state is lost.
    DiscardState,
}

/// What a reset is asked to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResetSpec {
    /// The device.
    pub name: DeviceName,
    /// What may become of its state.
    pub mode: ResetMode,
    /// Say what would be done, and do nothing.
    pub validate_only: bool,
    /// Makes the call idempotent.
    pub request_id: Option<RequestId>,
}

impl TryFrom<v1::ResetDeviceRequest> for ResetSpec {
    type Error = Invalid;

    fn try_from(wire: v1::ResetDeviceRequest) -> Result<Self, Invalid> {
        let mode = match checks::known("mode", wire.mode)? {
            v1::ResetMode::Unspecified => {
                return Err(Invalid::new(
                    "mode",
                    "it must be given: KEEP_STATE, or DISCARD_STATE to lose the state",
                ));
            }
            v1::ResetMode::KeepState => ResetMode::KeepState,
            v1::ResetMode::DiscardState => ResetMode::DiscardState,
        };
        Ok(Self {
            name: checks::id("name", &wire.name)?,
            mode,
            validate_only: wire.validate_only,
            request_id: checks::request_id(&wire.request_id)?,
        })
    }
}

/// A range of I/O virtual addresses: over 0 bytes, and its last address is one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Iova {
    /// First address.
    pub start: u64,
    /// Bytes.
    pub length_bytes: u64,
}

impl Iova {
    /// Last address.
    pub fn last(self) -> u64 {
        self.start.saturating_add(self.length_bytes.saturating_sub(1))
    }
}

impl TryFrom<v1::IovaRange> for Iova {
    type Error = Invalid;

    fn try_from(wire: v1::IovaRange) -> Result<Self, Invalid> {
        let last_offset = wire.length_bytes.checked_sub(1);
        let last_offset = last_offset.ok_or_else(|| Invalid::new("length_bytes", "it is 0"))?;
        if wire.start.checked_add(last_offset).is_none() {
            let problem =
                format!("{} bytes from {:#x} go beyond the last address", wire.length_bytes, wire.start);
            return Err(Invalid::new("length_bytes", problem));
        }
        Ok(Self { start: wire.start, length_bytes: wire.length_bytes })
    }
}

/// What to log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirtyTrackingSpec {
    /// The device.
    pub name: DeviceName,
    /// The page size asked for: a power of two.
    pub page_bytes: u64,
    /// The ranges, which do not overlap, by their start. At least one: the kernel refuses to log none.
    pub ranges: Vec<Iova>,
}

impl DirtyTrackingSpec {
    /// The most ranges.
    pub const MAX_RANGES: usize = 1024;
}

impl TryFrom<v1::StartDirtyTrackingRequest> for DirtyTrackingSpec {
    type Error = Invalid;

    fn try_from(wire: v1::StartDirtyTrackingRequest) -> Result<Self, Invalid> {
        if wire.ranges.is_empty() {
            return Err(Invalid::new("ranges", "it is empty; say which addresses are to be logged"));
        }
        if wire.ranges.len() > Self::MAX_RANGES {
            let problem = format!("it has {} entries; give at most {}", wire.ranges.len(), Self::MAX_RANGES);
            return Err(Invalid::new("ranges", problem));
        }
        let mut ranges = Vec::with_capacity(wire.ranges.len());
        for (index, range) in wire.ranges.into_iter().enumerate() {
            let range =
                Iova::try_from(range).map_err(|invalid| invalid.within(&format!("ranges[{index}]")))?;
            ranges.push(range);
        }
        ranges.sort_by_key(|range| range.start);
        if let Some((one, other)) =
            ranges.iter().zip(ranges.iter().skip(1)).find(|(a, b)| a.last() >= b.start)
        {
            let problem =
                format!("those that begin at {:#x} and {:#x} overlap; join them", one.start, other.start);
            return Err(Invalid::new("ranges", problem));
        }
        Ok(Self { name: device_name(&wire.name)?, page_bytes: page_bytes(wire.page_bytes)?, ranges })
    }
}

/// The most pages in one report: their bitmap is 1 MiB.
pub const MAX_REPORT_PAGES: u64 = 8 << 20;

/// Which part of the log to read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirtyReportSpec {
    /// The device.
    pub name: DeviceName,
    /// The range: whole pages, at most [`MAX_REPORT_PAGES`].
    pub range: Iova,
    /// The page size of the bitmap: a power of two.
    pub page_bytes: u64,
}

impl DirtyReportSpec {
    /// The number of pages in the range.
    pub fn pages(&self) -> u64 {
        self.range.length_bytes / self.page_bytes
    }
}

impl TryFrom<v1::ReportDirtyPagesRequest> for DirtyReportSpec {
    type Error = Invalid;

    fn try_from(wire: v1::ReportDirtyPagesRequest) -> Result<Self, Invalid> {
        let page_bytes = page_bytes(wire.page_bytes)?;
        let range = checks::present("range", wire.range)?;
        let range = Iova::try_from(range).map_err(|invalid| invalid.within("range"))?;
        if range.start % page_bytes != 0 || range.length_bytes % page_bytes != 0 {
            let problem = format!(
                "{} bytes from {:#x} are not whole pages of {page_bytes} bytes",
                range.length_bytes, range.start
            );
            return Err(Invalid::new("range", problem));
        }
        let pages = range.length_bytes / page_bytes;
        if pages > MAX_REPORT_PAGES {
            let problem = format!("it has {pages} pages; ask for at most {MAX_REPORT_PAGES} at a time");
            return Err(Invalid::new("range", problem));
        }
        Ok(Self { name: device_name(&wire.name)?, range, page_bytes })
    }
}

fn page_bytes(bytes: u64) -> Result<u64, Invalid> {
    if bytes.is_power_of_two() {
        Ok(bytes)
    } else {
        Err(Invalid::new("page_bytes", format!("{bytes} is not a power of two")))
    }
}
