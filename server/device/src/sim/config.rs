//! What a simulated device is like, as data.

use std::time::Duration;

use vfio_checkpoint_fsm::Capabilities;

use super::dma::GRANULE_BYTES;
use super::generator::MAX_PAGE_BYTES;
use crate::IovaRange;

/// Largest memory, 1 TiB.
const MAX_MEMORY_BYTES: u64 = 1 << 40;
/// Smallest page of device memory.
const MIN_PAGE_BYTES: u32 = 4096;
/// Highest rate of writes, 1 TiB/s.
const MAX_RATE: u64 = 1 << 40;
/// Most guest memory that a device writes to, 256 GiB: the log keeps a bit for each 4 KiB of it.
const MAX_DMA_BYTES: u64 = 256 << 30;
/// Most ranges of guest memory that a device writes to.
const MAX_DMA_RANGES: usize = 64;

/// A simulated device.
///
/// The default is a quiet device with 16 MiB of memory that can do everything a kernel device can: all states,
/// reset, an exact data size, a DMA log, a PCI function; it changes nothing by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SimConfig {
    /// The slot's name. Not empty.
    pub name: String,
    /// The firmware, as the fingerprint says it. A stream loads only into a device with the same.
    pub firmware: String,
    /// What the memory is filled from, and where the order of writes comes from. Pristine devices with the same
    /// seed and sizes hold the same state.
    pub seed: u64,
    /// Memory, in bytes: 1 to 2^40. Costs almost nothing until it is written (8 bytes a page from then on).
    pub memory_bytes: u64,
    /// Page of device memory, in bytes: a power of two from 4096 to 65536. Dirtying is counted by it.
    pub page_bytes: u32,
    /// Bytes of memory that may hold content which does not come from the seed, because it was loaded or written so.
    /// Each costs its size. A load that brings more fails with ENOSPC.
    pub overlay_limit_bytes: u64,
    /// Which states the device has.
    pub migration: Capabilities,
    /// Whether `VFIO_DEVICE_RESET` works; EINVAL where not.
    pub reset: bool,
    /// Whether the last close resets the device, as vfio-pci does. Where not, its state stays for the next open, as
    /// with mtty: without data streams, and in RESUMING good for nothing but a reset.
    pub reset_on_last_close: bool,
    /// What the device says of the size of its state.
    pub data_size: SizeReport,
    /// How it pre-copies.
    pub precopy: Precopy,
    /// When it checks what is loaded.
    pub validation: Validation,
    /// What changes its memory while it runs.
    pub workload: Workload,
    /// What it writes to guest memory while it runs.
    pub dma: SimDma,
    /// The PCI function, where it is one.
    pub pci: Option<SimPci>,
}

impl Default for SimConfig {
    fn default() -> Self {
        Self {
            name: "sim0".to_owned(),
            firmware: "sim-firmware-1".to_owned(),
            seed: 1,
            memory_bytes: 16 << 20,
            page_bytes: 4096,
            overlay_limit_bytes: 64 << 20,
            migration: Capabilities { p2p: true, pre_copy: true },
            reset: true,
            reset_on_last_close: true,
            data_size: SizeReport::Exact,
            precopy: Precopy::default(),
            validation: Validation::OnWrite,
            workload: Workload::default(),
            dma: SimDma::default(),
            pci: Some(SimPci::default()),
        }
    }
}

impl SimConfig {
    /// A device that behaves as the kernel's mtty sample does, where mtty behaves at all: a few bytes of state, only
    /// a header to pre-copy, 0 instead of ENOMSG, a size that ignores what was sent, state that survives the last
    /// close, a log in which nothing is ever dirty. It still refuses to load after a failed write, which mtty does
    /// not, and a reset clears its registers.
    pub fn mtty_like() -> Self {
        Self {
            memory_bytes: 36,
            reset_on_last_close: false,
            data_size: SizeReport::UpperBound { slack_bytes: 0 },
            precopy: Precopy { initial_bytes: Some(0), idle: PrecopyIdle::Zero, ..Precopy::default() },
            pci: None,
            ..Self::default()
        }
    }

    /// Checks every field against its documented limits.
    pub fn validate(&self) -> Result<(), SimConfigError> {
        require(!self.name.is_empty(), "name", "must not be empty")?;
        within("memory_bytes", self.memory_bytes, 1, MAX_MEMORY_BYTES)?;
        within("page_bytes", self.page_bytes.into(), MIN_PAGE_BYTES.into(), MAX_PAGE_BYTES.into())?;
        require(self.page_bytes.is_power_of_two(), "page_bytes", "must be a power of two")?;
        if let Some(initial) = self.precopy.initial_bytes {
            within("precopy.initial_bytes", initial, 0, self.memory_bytes)?;
        }
        if let Some(reinit) = self.precopy.reinit {
            require(self.migration.pre_copy, "precopy.reinit", "needs a device with PRE_COPY")?;
            within("precopy.reinit.initial_bytes", reinit.initial_bytes, 1, self.memory_bytes)?;
        }
        within("workload.dirty_bytes_per_second", self.workload.dirty_bytes_per_second, 0, MAX_RATE)?;
        if let Some(bytes) = self.workload.working_set_bytes {
            within("workload.working_set_bytes", bytes, 1, self.memory_bytes)?;
        }
        self.dma.validate()?;
        if let Some(pci) = &self.pci {
            within("pci.msi_vectors", pci.msi_vectors.into(), 0, 32)?;
            let whole = pci.msi_vectors == 0 || pci.msi_vectors.is_power_of_two();
            require(whole, "pci.msi_vectors", "must be 0 or a power of two")?;
            within("pci.msix_vectors", pci.msix_vectors.into(), 0, crate::config_space::MAX_VECTORS.into())?;
        }
        Ok(())
    }
}

/// What a device says of the size of its state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SizeReport {
    /// Exactly what a stop-copy from here brings, where that is certain; a bound while pre-copy goes on.
    Exact,
    /// The size of a full stop-copy and so much more, whatever has been sent.
    UpperBound {
        /// Bytes by which it always overstates.
        slack_bytes: u64,
    },
    /// The device has no `MIG_DATA_SIZE`.
    Unknown,
}

/// How a device pre-copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Precopy {
    /// Bytes of memory that are handed out in PRE_COPY as initial data, besides the header; at most the memory. All
    /// of it where `None`. The rest waits for STOP_COPY.
    pub initial_bytes: Option<u64>,
    /// What makes dirty pages readable.
    pub refill: Refill,
    /// What a read answers when there is nothing for now.
    pub idle: PrecopyIdle,
    /// Least time between the start of the session, or the time dirty pages last became readable, and the next time
    /// that they do. Until then the device does not report them either. Zero: no limit.
    pub reread_interval: Duration,
    /// Whether the device has feature 12 (`PRECOPY_INFO_REINIT`), to which its holder then opts in on opening.
    pub reinit_feature: bool,
    /// A reconfiguration in the middle of pre-copy. Without the feature its data counts as dirty.
    pub reinit: Option<Reinit>,
}

/// What makes dirty pages readable in PRE_COPY. Never in PRE_COPY_P2P: a device that is being held cannot be asked
/// for more, so there only what was readable before can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Refill {
    /// Asking how much is left, once everything else is read: mlx5 and virtio. Who only reads never sees them before
    /// STOP_COPY.
    #[default]
    OnInfo,
    /// Reading, too.
    OnRead,
}

/// What a read in PRE_COPY answers when there is nothing for now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PrecopyIdle {
    /// ENOMSG, as the kernel's documentation has it.
    #[default]
    NoMessage,
    /// 0, as mtty does.
    Zero,
}

/// A reconfiguration of the device, once a session, seen by the next question for how much is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reinit {
    /// Happens once the session has handed out this many bytes.
    pub after_bytes: u64,
    /// Memory from the start on that gets new content and counts as initial data again; 1 to the memory.
    pub initial_bytes: u64,
}

/// When a device checks what is written to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Validation {
    /// On the write that brings the fault.
    #[default]
    OnWrite,
    /// When RESUMING is left: every write succeeds.
    OnExit,
}

/// What changes the memory of a device while it runs (RUNNING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P: in the P2P states
/// it starts no DMA, but works on and can be written to).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Workload {
    /// Bytes written per second, a page at a time; at most 2^40.
    pub dirty_bytes_per_second: u64,
    /// How much memory, from its start, the writes go to; at most the memory. All of it where `None`.
    pub working_set_bytes: Option<u64>,
}

/// What a device writes to guest memory, in RUNNING and PRE_COPY.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SimDma {
    /// Where it writes: at most 64 ranges of whole 4 KiB pages, apart from each other, 256 GiB in all.
    pub ranges: Vec<IovaRange>,
    /// Bytes written per second, 4 KiB at a time, over all ranges; at most 2^40.
    pub bytes_per_second: u64,
    /// The log of it, where the device keeps one.
    pub log: Option<LogPages>,
}

impl Default for SimDma {
    fn default() -> Self {
        Self { ranges: Vec::new(), bytes_per_second: 0, log: Some(LogPages::default()) }
    }
}

impl SimDma {
    fn validate(&self) -> Result<(), SimConfigError> {
        within("dma.bytes_per_second", self.bytes_per_second, 0, MAX_RATE)?;
        within("dma.ranges", self.ranges.len() as u64, 0, MAX_DMA_RANGES as u64)?;
        let mut total = 0u64;
        for (at, range) in self.ranges.iter().enumerate() {
            let whole = range.start().is_multiple_of(GRANULE_BYTES)
                && range.length_bytes().is_multiple_of(GRANULE_BYTES);
            require(whole, "dma.ranges", "must be whole pages of 4096 bytes")?;
            let apart = self.ranges[..at].iter().all(|other| !other.overlaps(*range));
            require(apart, "dma.ranges", "must not overlap")?;
            total = total.saturating_add(range.length_bytes());
        }
        within("dma.ranges", total, 0, MAX_DMA_BYTES)?;
        if let Some(log) = &self.log {
            within("dma.log.min_bytes", log.min_bytes, GRANULE_BYTES, log.max_bytes)?;
            let powers = log.min_bytes.is_power_of_two() && log.max_bytes.is_power_of_two();
            require(powers, "dma.log", "page sizes must be powers of two")?;
        }
        Ok(())
    }
}

/// Page sizes that a DMA log can track. A start that asks for another gets the nearest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogPages {
    /// Smallest, in bytes: a power of two of at least 4096.
    pub min_bytes: u64,
    /// Largest, in bytes: a power of two.
    pub max_bytes: u64,
}

impl Default for LogPages {
    fn default() -> Self {
        Self { min_bytes: 4096, max_bytes: 1 << 30 }
    }
}

/// The PCI function that a device is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SimPci {
    /// Vectors of MSI: 0, or a power of two up to 32.
    pub msi_vectors: u32,
    /// Vectors of MSI-X: up to 2048.
    pub msix_vectors: u32,
    /// Whether `VFIO_DEVICE_RESET` leaves PCI_COMMAND and armed interrupts alone, as the kernel does, which saves
    /// configuration space before a function reset and restores it after. The last close clears both, where it
    /// resets the device.
    pub kept_by_reset: bool,
}

impl Default for SimPci {
    fn default() -> Self {
        Self { msi_vectors: 32, msix_vectors: 64, kept_by_reset: true }
    }
}

/// A configuration that no device can have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} {reason}")]
pub struct SimConfigError {
    /// The field, by its path in [`SimConfig`].
    pub field: &'static str,
    /// What is wrong with it and what it may be.
    pub reason: String,
}

fn require(holds: bool, field: &'static str, reason: &str) -> Result<(), SimConfigError> {
    if holds { Ok(()) } else { Err(SimConfigError { field, reason: reason.to_owned() }) }
}

fn within(field: &'static str, value: u64, least: u64, most: u64) -> Result<(), SimConfigError> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    Err(SimConfigError { field, reason: format!("is {value}; it may be from {least} to {most}") })
}
