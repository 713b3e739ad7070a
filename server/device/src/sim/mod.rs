//! A simulated device: a whole migratable device in a few kilobytes, that is no softer than the kernel.
//!
//! ```text
//!   SimConfig --> SimDevice (the slot: hardware)        digest, registers, hop log, faults of its own
//!                    | open                             state and memory live here, handles come and go
//!                    v
//!                 SimHandle (an open file)  --set_state-->  data streams, numbered by session
//!
//!   handle, streams -> hardware -> save      what is due, into the reader's buffer
//!                               -> load      what was written, checked, beside the device's own state
//!                               -> memory    over generator: content from (seed, page, version); pages: sets of them
//!                               -> workload, dma, pci, registers       what a running device does and has
//!                                  format    the stream that save writes and load reads
//! ```
//!
//! It refuses what the VFIO core and its drivers refuse, with their errnos, and where drivers differ it takes the one
//! that is hardest on the caller:
//! - dirty pages become readable by *asking* how much is left, and in PRE_COPY only ([`Refill::OnInfo`]: mlx5);
//! - after a failed write nothing loads (mlx5 fails every write after it; mtty would load all the same);
//! - RESUMING is left only with a complete stream; what is wrong shows as EINVAL and the device stays in RESUMING;
//! - a reset stops the DMA log (pds) and keeps PCI_COMMAND and armed interrupts (the PCI core saves them around it);
//! - a report of the DMA log must lie within one tracked range (pds).
//!
//! # Invariants
//! - Memory is procedural: what is neither written nor loaded takes no room, and a page is made when it is read.
//! - Equal [digests](SimDevice::digest) mean equal state, and equal state has equal digests. One exception takes
//!   malice: a hand-made stream that names another seed than its pages are made from loads as raw content.
//! - The same configuration, clock and calls give the same bytes.
//!
//! # Failure paths
//! A refused call changes nothing. A failed hop leaves the device where it began. [`SimDevice::force_error`] drops the
//! device into ERROR, which only a reset leaves.

mod config;
mod dma;
mod format;
mod generator;
mod handle;
mod hardware;
mod load;
mod memory;
mod pages;
mod pci;
mod registers;
mod save;
mod spec;
mod streams;
mod workload;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vfio_checkpoint_fsm::State;

pub use self::config::{
    LogPages, Precopy, PrecopyIdle, Refill, Reinit, SimConfig, SimConfigError, SimDma, SimPci, SizeReport,
    Validation, Workload,
};
pub use self::handle::SimHandle;
pub use self::spec::{SPEC_HELP, SimSpecError};

use self::hardware::Hardware;
use crate::{Backend, Call, Clock, DeviceCapabilities, DeviceError, Fingerprint, Identity};

/// One hop that a device took, or tried to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hop {
    /// The hop.
    pub arc: vfio_checkpoint_fsm::Arc,
    /// The errno, where it failed.
    pub errno: Option<i32>,
}

/// Why the hardware's memory could not be accessed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SimMemoryError {
    /// The access runs past the end.
    #[error("the access runs past the {memory_bytes} bytes of memory")]
    OutOfRange {
        /// Size of the memory.
        memory_bytes: u64,
    },
    /// Who writes to a device that does not run destroys what is being saved or loaded.
    #[error("the device is in {state}, where its memory must be left alone")]
    NotRunning {
        /// The state it is in.
        state: State,
    },
    /// There is no more room for content that is not the seed's.
    #[error("there is no room for more content that does not come from the seed")]
    NoRoom,
}

/// The slot that handles share.
#[derive(Debug)]
struct Slot {
    identity: Identity,
    fingerprint: Fingerprint,
    capabilities: DeviceCapabilities,
    log_pages: Option<LogPages>,
    clock: Arc<dyn Clock>,
    hardware: Mutex<Hardware>,
}

impl Slot {
    /// The hardware, as it is now.
    fn hardware(&self) -> MutexGuard<'_, Hardware> {
        let mut hardware = self.hardware.lock().unwrap_or_else(PoisonError::into_inner);
        hardware.catch_up(self.clock.now());
        hardware
    }
}

/// A simulated device: the hardware, whether or not somebody has it open. Clones are the same device.
///
/// Everything on this type is the hardware's own side, for tests and tools. What an agent may do goes through a
/// [`SimHandle`].
#[derive(Debug, Clone)]
pub struct SimDevice {
    slot: Arc<Slot>,
}

impl SimDevice {
    /// A device at power-on, in RUNNING. `clock` paces what it does by itself.
    pub fn new(config: SimConfig, clock: Arc<dyn Clock>) -> Result<Self, SimConfigError> {
        config.validate()?;
        let capabilities = DeviceCapabilities {
            migration: config.migration,
            reset: config.reset,
            data_size: config.data_size != SizeReport::Unknown,
            precopy_reinit: config.migration.pre_copy && config.precopy.reinit_feature,
            dma_logging: config.dma.log.is_some(),
            config_space: config.pci.is_some(),
        };
        let fingerprint = Fingerprint::new()
            .with("driver", "sim")
            .with("firmware", config.firmware.clone())
            .with("format", format::MAJOR.to_string())
            .with("memory_bytes", config.memory_bytes.to_string())
            .with("page_bytes", config.page_bytes.to_string());
        let identity =
            Identity { name: config.name.clone(), backend: Backend::Sim, driver: "sim".to_owned() };
        let log_pages = config.dma.log;
        let hardware = Mutex::new(Hardware::new(config, clock.now()));
        Ok(Self { slot: Arc::new(Slot { identity, fingerprint, capabilities, log_pages, clock, hardware }) })
    }

    /// Opens the device. EBUSY while somebody has it open.
    pub fn open(&self) -> Result<SimHandle, DeviceError> {
        let mut hardware = self.slot.hardware();
        if hardware.handles > 0 {
            return Err(DeviceError::errno(Call::Open, libc::EBUSY));
        }
        hardware.first_open();
        drop(hardware);
        Ok(SimHandle::new(Arc::clone(&self.slot)))
    }

    /// Which device this is.
    pub fn identity(&self) -> &Identity {
        &self.slot.identity
    }

    /// The state, without a handle.
    pub fn state(&self) -> State {
        self.slot.hardware().state
    }

    /// BLAKE3 over everything that a migration carries: registers and memory. Two devices with equal digests hold the
    /// same state. Costs what differs from pristine memory, not the memory's size. Meaningful for a comparison only
    /// while the device is stopped.
    pub fn digest(&self) -> [u8; 32] {
        self.slot.hardware().digest()
    }

    /// Reads memory from `at` on. Nothing is read where memory ends before the buffer does.
    pub fn read_memory(&self, at: u64, buffer: &mut [u8]) -> Result<(), SimMemoryError> {
        self.slot.hardware().memory.read(at, buffer)
    }

    /// Writes to memory as the device's user would through its registers, in running states only. Where room runs out
    /// ([`SimConfig::overlay_limit_bytes`]) the pages before are written.
    pub fn write_memory(&self, at: u64, bytes: &[u8]) -> Result<(), SimMemoryError> {
        self.slot.hardware().write_memory(at, bytes)
    }

    /// The scratch register, which is state and otherwise means nothing.
    pub fn scratch(&self) -> u64 {
        self.slot.hardware().registers.scratch()
    }

    /// Sets the scratch register. In STOP_COPY too late for the stream once the registers were read.
    pub fn set_scratch(&self, value: u64) {
        self.slot.hardware().registers.set_scratch(value);
    }

    /// How many page writes the workload has done since power-on, those done before a migration included.
    pub fn page_writes(&self) -> u64 {
        self.slot.hardware().registers.page_writes()
    }

    /// How many times it wrote 4 KiB to guest memory since power-on, before a migration included.
    pub fn dma_writes(&self) -> u64 {
        self.slot.hardware().registers.dma_writes()
    }

    /// The device fails by itself: ERROR, and its data streams answer ENODEV.
    pub fn force_error(&self) {
        self.slot.hardware().fail();
    }

    /// Signals an interrupt vector. `false` where it is not armed.
    pub fn raise_interrupt(&self, vector: u32) -> io::Result<bool> {
        self.slot.hardware().raise(vector)
    }

    /// The hops taken and tried since power-on, oldest first; the last 4096.
    pub fn hops(&self) -> Vec<Hop> {
        self.slot.hardware().hops.iter().copied().collect()
    }

    /// [`hops`](Self::hops), forgotten afterwards.
    pub fn take_hops(&self) -> Vec<Hop> {
        std::mem::take(&mut self.slot.hardware().hops).into()
    }

    /// How many times somebody reset the device.
    pub fn resets(&self) -> u64 {
        self.slot.hardware().resets
    }

    /// How many times the last close reset the device.
    pub fn close_resets(&self) -> u64 {
        self.slot.hardware().close_resets
    }

    /// How many handles are open.
    pub fn handles(&self) -> usize {
        self.slot.hardware().handles
    }
}
