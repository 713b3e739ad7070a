//! One open file of a simulated device, and its data streams.
//!
//! ```text
//!   SimHandle --- duplicate() ---> SimHandle        the device closes with the last of them
//!      |  set_state
//!      v
//!   SimSaveStream | SimRestoreStream                each holds the slot, not the device: like a data fd, it can
//!                                                   outlive the session, and answers ENODEV from then on
//! ```

use std::sync::{Arc, MutexGuard};

use vfio_checkpoint_fsm::State;

use super::Slot;
use super::hardware::{Hardware, Opened};
use crate::{
    Call, ConfigCapture, ConfigSpace, DataSize, DataStream, DeviceCapabilities, DeviceError, DirtyBitmap,
    DmaLog, Fingerprint, Identity, InterruptKind, IovaRange, MigrationDevice, PciCommand, PrecopyInfo, Read,
    RestoreStream, SaveStream,
};

/// One open file of a [`SimDevice`](super::SimDevice). Dropping it closes it.
#[derive(Debug)]
pub struct SimHandle {
    slot: Arc<Slot>,
    log: Option<SimDmaLog>,
    pci: Option<SimConfigSpace>,
}

impl SimHandle {
    /// A new handle; the caller has counted it in.
    pub(super) fn new(slot: Arc<Slot>) -> Self {
        let log = slot.capabilities.dma_logging.then(|| SimDmaLog { slot: Arc::clone(&slot) });
        let pci = slot.capabilities.config_space.then(|| SimConfigSpace { slot: Arc::clone(&slot) });
        Self { slot, log, pci }
    }

    /// Another handle of the same open device, as `dup` makes another fd. The device closes with the last one.
    #[must_use]
    pub fn duplicate(&self) -> Self {
        self.slot.hardware().handles += 1;
        Self::new(Arc::clone(&self.slot))
    }
}

impl Drop for SimHandle {
    fn drop(&mut self) {
        let mut hardware = self.slot.hardware();
        hardware.handles -= 1;
        if hardware.handles == 0 {
            hardware.last_close();
        }
    }
}

impl MigrationDevice for SimHandle {
    fn identity(&self) -> &Identity {
        &self.slot.identity
    }

    fn fingerprint(&self) -> &Fingerprint {
        &self.slot.fingerprint
    }

    fn capabilities(&self) -> &DeviceCapabilities {
        &self.slot.capabilities
    }

    fn state(&mut self) -> Result<State, DeviceError> {
        Ok(self.slot.hardware().state)
    }

    fn set_state(&mut self, target: State) -> Result<Option<DataStream>, DeviceError> {
        let opened = self.slot.hardware().set_state(target);
        let opened = opened.map_err(|errno| DeviceError::errno(Call::SetState(target), errno))?;
        let slot = || Arc::clone(&self.slot);
        Ok(opened.map(|opened| match opened {
            Opened::Save(session) => DataStream::Save(Box::new(SimSaveStream { slot: slot(), session })),
            Opened::Restore(session) => {
                DataStream::Restore(Box::new(SimRestoreStream { slot: slot(), session }))
            }
        }))
    }

    fn data_size(&mut self) -> Result<DataSize, DeviceError> {
        self.slot.hardware().data_size().ok_or(DeviceError::Absent { call: Call::DataSize })
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        self.slot.hardware().reset().map_err(|errno| DeviceError::errno(Call::Reset, errno))
    }

    fn dma_log(&mut self) -> Option<&mut dyn DmaLog> {
        self.log.as_mut().map(|log| log as &mut dyn DmaLog)
    }

    fn config_space(&mut self) -> Option<&mut dyn ConfigSpace> {
        self.pci.as_mut().map(|pci| pci as &mut dyn ConfigSpace)
    }
}

/// The data fd of a saving session.
#[derive(Debug)]
struct SimSaveStream {
    slot: Arc<Slot>,
    session: u64,
}

impl SaveStream for SimSaveStream {
    fn read(&mut self, buffer: &mut [u8]) -> Result<Read, DeviceError> {
        if buffer.is_empty() {
            return Err(empty(Call::Read));
        }
        self.slot.hardware().read(self.session, buffer).map_err(|errno| DeviceError::errno(Call::Read, errno))
    }

    fn precopy_info(&mut self) -> Result<PrecopyInfo, DeviceError> {
        let info = self.slot.hardware().precopy_info(self.session);
        info.map_err(|errno| DeviceError::errno(Call::PrecopyInfo, errno))
    }
}

/// The data fd of a resuming session.
#[derive(Debug)]
struct SimRestoreStream {
    slot: Arc<Slot>,
    session: u64,
}

impl RestoreStream for SimRestoreStream {
    fn write(&mut self, bytes: &[u8]) -> Result<usize, DeviceError> {
        if bytes.is_empty() {
            return Err(empty(Call::Write));
        }
        self.slot
            .hardware()
            .write(self.session, bytes)
            .map_err(|errno| DeviceError::errno(Call::Write, errno))
    }
}

fn empty(call: Call) -> DeviceError {
    DeviceError::Argument { call, reason: "the buffer is empty; it must hold at least one byte".to_owned() }
}

#[derive(Debug)]
struct SimDmaLog {
    slot: Arc<Slot>,
}

impl DmaLog for SimDmaLog {
    fn start(&mut self, page_bytes: u64, ranges: &[IovaRange]) -> Result<u64, DeviceError> {
        let pages = self.slot.log_pages.ok_or(DeviceError::Absent { call: Call::DmaLogStart })?;
        let started = self.slot.hardware().dma.start(page_bytes, ranges, pages);
        started.map_err(|errno| DeviceError::errno(Call::DmaLogStart, errno))
    }

    fn report(&mut self, bitmap: &mut DirtyBitmap) -> Result<(), DeviceError> {
        let reported = self.slot.hardware().dma.report(bitmap);
        reported.map_err(|errno| DeviceError::errno(Call::DmaLogReport, errno))
    }

    fn stop(&mut self) -> Result<(), DeviceError> {
        self.slot.hardware().dma.stop();
        Ok(())
    }
}

#[derive(Debug)]
struct SimConfigSpace {
    slot: Arc<Slot>,
}

impl SimConfigSpace {
    fn with<T>(&self, call: Call, act: impl FnOnce(&mut super::pci::Pci) -> T) -> Result<T, DeviceError> {
        let mut hardware: MutexGuard<'_, Hardware> = self.slot.hardware();
        hardware.pci.as_mut().map(act).ok_or(DeviceError::Absent { call })
    }
}

impl ConfigSpace for SimConfigSpace {
    fn capture(&mut self) -> Result<ConfigCapture, DeviceError> {
        self.with(Call::ConfigRead, |pci| pci.capture())
    }

    fn command(&mut self) -> Result<PciCommand, DeviceError> {
        self.with(Call::ConfigRead, |pci| pci.command())
    }

    fn set_command(&mut self, command: PciCommand) -> Result<(), DeviceError> {
        self.with(Call::ConfigWrite, |pci| pci.set_command(command))
    }

    fn arm(
        &mut self,
        kind: InterruptKind,
        eventfds: &[std::os::fd::BorrowedFd<'_>],
    ) -> Result<(), DeviceError> {
        self.with(Call::SetIrqs, |pci| pci.arm(kind, eventfds))?
            .map_err(|source| DeviceError::os(Call::SetIrqs, source))
    }

    fn disarm(&mut self, kind: InterruptKind) -> Result<(), DeviceError> {
        self.with(Call::SetIrqs, |pci| pci.disarm(kind))
    }
}
