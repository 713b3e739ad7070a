//! A gate between a driver and its device, which closes when the device is given up.
//!
//! A call that hangs may come back. The driver that made it then goes on from there, with the SET that was next, while
//! everybody else has long been told that the device is out of service; a restored copy could start to run beside its
//! source. Behind a closed gate every call answers [`Hung`] instead, so the driver's own way back ends at once.
//!
//! What the gate cannot stop is the call that is inside it: what that one does is not known, ever.

use std::sync::{Arc, OnceLock};

use vfio_checkpoint_fsm::State;

use crate::lane::Hung;
use crate::{
    ConfigSpace, DataSize, DataStream, DeviceCapabilities, DeviceError, DmaLog, Fingerprint, Identity,
    MigrationDevice, PrecopyInfo, Read, RestoreStream, SaveStream,
};

/// Closed once it is set.
type Closed = Arc<OnceLock<Hung>>;

/// Puts a gate in front of `device` that closes when `closed` is set.
pub(crate) fn gate(device: Box<dyn MigrationDevice>, closed: &Closed) -> Box<dyn MigrationDevice> {
    Box::new(Gated { inner: device, closed: Arc::clone(closed) })
}

/// A device, or a stream of one, behind the gate.
#[derive(Debug)]
struct Gated<T: ?Sized> {
    closed: Closed,
    inner: Box<T>,
}

impl<T: ?Sized> Gated<T> {
    fn open(&mut self) -> Result<&mut T, DeviceError> {
        match self.closed.get() {
            Some(hung) => Err((*hung).into()),
            None => Ok(&mut self.inner),
        }
    }
}

impl MigrationDevice for Gated<dyn MigrationDevice> {
    fn identity(&self) -> &Identity {
        self.inner.identity()
    }

    fn fingerprint(&self) -> &Fingerprint {
        self.inner.fingerprint()
    }

    fn capabilities(&self) -> &DeviceCapabilities {
        self.inner.capabilities()
    }

    fn state(&mut self) -> Result<State, DeviceError> {
        self.open()?.state()
    }

    fn set_state(&mut self, target: State) -> Result<Option<DataStream>, DeviceError> {
        let stream = self.open()?.set_state(target)?;
        let closed = || Arc::clone(&self.closed);
        Ok(stream.map(|stream| match stream {
            DataStream::Save(inner) => DataStream::Save(Box::new(Gated { inner, closed: closed() })),
            DataStream::Restore(inner) => DataStream::Restore(Box::new(Gated { inner, closed: closed() })),
        }))
    }

    fn data_size(&mut self) -> Result<DataSize, DeviceError> {
        self.open()?.data_size()
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        self.open()?.reset()
    }

    /// None behind a closed gate: there is nothing to be had of such a device.
    fn dma_log(&mut self) -> Option<&mut dyn DmaLog> {
        self.open().ok()?.dma_log()
    }

    /// None behind a closed gate: there is nothing to be had of such a device.
    fn config_space(&mut self) -> Option<&mut dyn ConfigSpace> {
        self.open().ok()?.config_space()
    }
}

impl SaveStream for Gated<dyn SaveStream> {
    fn read(&mut self, buffer: &mut [u8]) -> Result<Read, DeviceError> {
        self.open()?.read(buffer)
    }

    fn precopy_info(&mut self) -> Result<PrecopyInfo, DeviceError> {
        self.open()?.precopy_info()
    }
}

impl RestoreStream for Gated<dyn RestoreStream> {
    fn write(&mut self, bytes: &[u8]) -> Result<usize, DeviceError> {
        self.open()?.write(bytes)
    }
}
