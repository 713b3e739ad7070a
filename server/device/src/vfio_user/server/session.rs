//! What one client has of the device, and what each command does.
//!
//! ```text
//!   GET_INFO, GET_REGION_INFO, GET_IRQ_INFO      what kind of device it is
//!   REGION_READ, REGION_WRITE                    configuration space, BAR 0            -> pci
//!   SET_IRQS                                     eventfds, armed on the device         -> irqs
//!   DMA_MAP, DMA_UNMAP                           windows                               -> dma
//!   DEVICE_FEATURE                               migration state, data size, DMA log   -> feature
//!   MIG_DATA_READ, MIG_DATA_WRITE                the stream that the last SET opened
//!   DEVICE_RESET
//! ```
//!
//! The device decides: which moves it makes, what it loads, which ranges it logs. Its errno is the answer.
//!
//! # Invariants
//! - At most one data stream, the one that was opened last. Like a data fd it may outlive its session, and the device
//!   then says so.
//! - Nothing is allocated by a length that a client names before it is held against a limit.
//!
//! # Failure paths
//! A command that fails changes nothing but what the device itself changed. What a client leaves behind is cleared away
//! when it is gone ([`Session::end`]); what of that fails is logged, and the next client finds it.

use std::os::fd::OwnedFd;

use rustix::io::Errno;
use vfio_bindings::bindings::vfio as uapi;

use super::dma::DmaTable;
use super::irqs::Interrupts;
use super::pci::{CONFIG_BYTES, PciRegisters};
use super::{ServerOptions, errno, irqs};
use crate::vfio_user::codec::{Command, DeviceInfo, DmaMap, DmaUnmap, Limits, RegionInfo, Reply, TooLong};
use crate::{ConfigSpace, DataStream, DeviceError, MigrationDevice, PciCommand, Read, chain};
use vfio_checkpoint_fsm::State;

const REGIONS: u32 = uapi::VFIO_PCI_NUM_REGIONS;
const BAR0: u32 = uapi::VFIO_PCI_BAR0_REGION_INDEX;
const CONFIG: u32 = uapi::VFIO_PCI_CONFIG_REGION_INDEX;

/// Flags of a DMA mapping: its file can be mapped, or read and written. Either needs the file.
const DMA_BY_FILE: u32 = 1 << 2 | 1 << 3;

/// One client's hold on the device.
#[derive(Debug)]
pub(super) struct Session<'a> {
    pub(super) device: &'a mut dyn MigrationDevice,
    pub(super) limits: Limits,
    pub(super) stream: Option<DataStream>,
    /// Whether this client started the DMA log.
    pub(super) logging: bool,
    windows: DmaTable,
    /// `None` where the device is no PCI function.
    registers: Option<PciRegisters>,
    interrupts: Interrupts,
    /// The command register as the client found it.
    command: Option<PciCommand>,
    reset_at_end: bool,
    buffer: Vec<u8>,
}

impl<'a> Session<'a> {
    /// A client has attached.
    pub(super) fn begin(
        device: &'a mut dyn MigrationDevice,
        options: &ServerOptions,
        limits: Limits,
    ) -> Self {
        let command = match device.config_space().map(ConfigSpace::command) {
            Some(Ok(command)) => Some(command),
            Some(Err(error)) => {
                tracing::warn!(error = chain(&error), "cannot read the command register");
                None
            }
            None => None,
        };
        let registers = device.config_space().map(|_| PciRegisters::new(options.function));
        Self {
            device,
            limits,
            stream: None,
            logging: false,
            windows: DmaTable::new(options.max_dma_windows),
            registers,
            interrupts: Interrupts::default(),
            command,
            reset_at_end: options.reset_on_disconnect,
            buffer: Vec::new(),
        }
    }

    /// Does what a command asks. Returns the whole reply.
    pub(super) fn execute(
        &mut self,
        id: u16,
        command: Command<'_>,
        fds: Vec<OwnedFd>,
    ) -> Result<Vec<u8>, Errno> {
        let code = command.code();
        let encode =
            |reply: Reply<'_>, limits| reply.encode(id, limits).map_err(|TooLong { .. }| Errno::MSGSIZE);
        let limits = self.limits;
        match command {
            Command::GetInfo { argsz: _ } => encode(Reply::Info(self.info()), limits),
            Command::GetRegionInfo { argsz: _, index } => {
                encode(Reply::RegionInfo(self.region_info(index)?), limits)
            }
            Command::GetIrqInfo { argsz: _, index } => {
                encode(Reply::IrqInfo(irqs::info(index, self.registers.as_ref())?), limits)
            }
            Command::SetIrqs(request) => {
                let registers = self.registers.as_ref().ok_or(Errno::INVAL)?;
                let space = self.device.config_space().ok_or(Errno::INVAL)?;
                self.interrupts.set(&request, fds, space, registers)?;
                encode(Reply::Done(code), limits)
            }
            Command::RegionRead { region, offset, count } => {
                self.read_region(region, offset, count)?;
                encode(Reply::RegionRead { region, offset, data: &self.buffer }, limits)
            }
            Command::RegionWrite { region, offset, data } => {
                self.write_region(region, offset, data)?;
                let count = u32::try_from(data.len()).map_err(|_| Errno::INVAL)?;
                encode(Reply::RegionWrite { region, offset, count }, limits)
            }
            Command::DmaMap(map) => {
                self.map(&map, &fds)?;
                encode(Reply::Done(code), limits)
            }
            Command::DmaUnmap(unmap) => {
                self.unmap(&unmap)?;
                let DmaUnmap { flags, iova, length_bytes, argsz: _, bitmap: _ } = unmap;
                encode(Reply::DmaUnmap { flags, iova, length_bytes, bitmap: &[] }, limits)
            }
            Command::Reset => {
                self.device.reset().map_err(|error| errno::of(&error))?;
                encode(Reply::Done(code), limits)
            }
            Command::Feature(request) => {
                let mut bitmap = std::mem::take(&mut self.buffer);
                let answer = self
                    .feature(&request, &mut bitmap)
                    .and_then(|reply| encode(Reply::Feature(reply), limits));
                self.buffer = bitmap;
                answer
            }
            Command::MigDataRead { size } => {
                self.read_stream(size)?;
                encode(Reply::MigDataRead { data: &self.buffer }, limits)
            }
            Command::MigDataWrite { data } => {
                self.write_stream(data)?;
                encode(Reply::Done(code), limits)
            }
            // Agreed on once; and what only a server asks.
            Command::Version(_) | Command::DmaRead { .. } | Command::DmaWrite { .. } => Err(Errno::INVAL),
            Command::Other { .. } => Err(Errno::OPNOTSUPP),
        }
    }

    /// The client is gone: its interrupts, its log, its stream, its windows, and the device's state with it.
    pub(super) fn end(self) {
        let Self { device, stream, logging, mut windows, mut interrupts, command, reset_at_end, .. } = self;
        let report = |what: &str, done: Result<(), DeviceError>| {
            if let Err(error) = done {
                tracing::warn!(error = chain(&error), "cannot {what} after the client is gone");
            }
        };
        drop(stream);
        windows.clear();
        if let Some(space) = device.config_space() {
            report("disarm interrupts", interrupts.release(space));
        }
        if logging && let Some(log) = device.dma_log() {
            report("stop the DMA log", log.stop());
        }
        if !reset_at_end {
            return;
        }
        report("reset the device", device.reset());
        if let (Some(command), Some(space)) = (command, device.config_space()) {
            report("restore the command register", space.set_command(command));
        }
    }

    fn info(&self) -> DeviceInfo {
        let reset = if self.device.capabilities().reset { uapi::VFIO_DEVICE_FLAGS_RESET } else { 0 };
        DeviceInfo { flags: uapi::VFIO_DEVICE_FLAGS_PCI | reset, regions: REGIONS, irqs: irqs::KINDS }
    }

    /// Size and flags of a region; a region that is not there has size 0.
    fn region_info(&self, index: u32) -> Result<RegionInfo<'static>, Errno> {
        if index >= REGIONS {
            return Err(Errno::INVAL);
        }
        let size_bytes = match (index, &self.registers) {
            (BAR0, Some(registers)) => registers.bar0_bytes(),
            (CONFIG, Some(_)) => CONFIG_BYTES as u64,
            (_, Some(_) | None) => 0,
        };
        let flags = match size_bytes {
            0 => 0,
            _ => uapi::VFIO_REGION_INFO_FLAG_READ | uapi::VFIO_REGION_INFO_FLAG_WRITE,
        };
        let argsz = crate::vfio_user::codec::REGION_INFO_BYTES;
        Ok(RegionInfo { argsz, flags, index, cap_offset: 0, size_bytes, offset: 0, capabilities: &[] })
    }

    /// Reads part of a region into the buffer.
    fn read_region(&mut self, region: u32, offset: u64, count: u32) -> Result<(), Errno> {
        let end = offset.checked_add(count.into()).ok_or(Errno::INVAL)?;
        if count > self.limits.max_data_xfer_bytes() || end > self.region_info(region)?.size_bytes {
            return Err(Errno::INVAL);
        }
        self.buffer.clear();
        self.buffer.resize(usize::try_from(count).map_err(|_| Errno::INVAL)?, 0);
        match (region, &self.registers) {
            (BAR0, Some(registers)) => registers.read_bar0(offset, &mut self.buffer),
            (CONFIG, Some(registers)) => {
                let space = self.device.config_space().ok_or(Errno::INVAL)?;
                registers.read_config(space, offset, &mut self.buffer)
            }
            // Nothing of nothing.
            (_, Some(_) | None) => Ok(()),
        }
    }

    fn write_region(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let end = offset.checked_add(data.len() as u64).ok_or(Errno::INVAL)?;
        if end > self.region_info(region)?.size_bytes {
            return Err(Errno::INVAL);
        }
        match (region, &mut self.registers) {
            (BAR0, Some(registers)) => registers.write_bar0(offset, data),
            (CONFIG, Some(registers)) => {
                let space = self.device.config_space().ok_or(Errno::INVAL)?;
                registers.write_config(space, offset, data)
            }
            (_, Some(_) | None) => Ok(()),
        }
    }

    fn map(&mut self, map: &DmaMap, fds: &[OwnedFd]) -> Result<(), Errno> {
        let known = DmaMap::READ | DmaMap::WRITE | DMA_BY_FILE;
        let file_is_missing = map.flags & DMA_BY_FILE != 0 && fds.is_empty();
        if map.flags & !known != 0 || file_is_missing || fds.len() > 1 {
            return Err(Errno::INVAL);
        }
        self.windows.map(map.iova, map.length_bytes)
    }

    fn unmap(&mut self, unmap: &DmaUnmap) -> Result<(), Errno> {
        match unmap.flags {
            0 => self.windows.unmap(unmap.iova, unmap.length_bytes),
            DmaUnmap::ALL if unmap.iova == 0 && unmap.length_bytes == 0 => {
                self.windows.clear();
                Ok(())
            }
            // The pages that a device dirtied are asked for of its log.
            DmaUnmap::GET_DIRTY_BITMAP => Err(Errno::OPNOTSUPP),
            _ => Err(Errno::INVAL),
        }
    }

    /// Reads from the data stream into the buffer. Nothing is the end; "nothing for now" is ENOMSG, as on a data fd.
    fn read_stream(&mut self, size: u32) -> Result<(), Errno> {
        let Some(DataStream::Save(stream)) = &mut self.stream else { return Err(Errno::INVAL) };
        // A short read is allowed, so who asks for more than was agreed on gets as much as was.
        let size = usize::try_from(size.min(self.limits.max_data_xfer_bytes())).map_err(|_| Errno::INVAL)?;
        if size == 0 {
            return Err(Errno::INVAL);
        }
        self.buffer.resize(size, 0);
        match stream.read(&mut self.buffer).map_err(|error| errno::of(&error))? {
            Read::Bytes(length) => self.buffer.truncate(length),
            nothing @ (Read::Zero | Read::NothingNow) => {
                self.buffer.clear();
                // Many drivers make dirty pages readable when they are asked how much is left, and only then. A client
                // cannot ask over this protocol, so the question comes from here, at the end of every round.
                if self.device.state().is_ok_and(|state| state == State::PreCopy) {
                    match stream.precopy_info() {
                        Ok(left) => tracing::trace!(?left, "asked how much is left to pre-copy"),
                        Err(error) => {
                            tracing::debug!(
                                error = chain(&error),
                                "the device does not say how much is left"
                            );
                        }
                    }
                }
                match nothing {
                    Read::NothingNow => return Err(Errno::NOMSG),
                    Read::Zero | Read::Bytes(_) => {}
                }
            }
        }
        Ok(())
    }

    /// Writes all of `data` to the data stream: the reply has no room for how much was taken.
    fn write_stream(&mut self, data: &[u8]) -> Result<(), Errno> {
        let Some(DataStream::Restore(stream)) = &mut self.stream else { return Err(Errno::INVAL) };
        let mut rest = data;
        while !rest.is_empty() {
            let taken = stream.write(rest).map_err(|error| errno::of(&error))?;
            // A device that takes nothing, or more than there is, would never be done.
            rest = match taken {
                0 => return Err(Errno::IO),
                taken => rest.get(taken..).ok_or(Errno::IO)?,
            };
        }
        Ok(())
    }
}
