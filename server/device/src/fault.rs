//! Faults as data over any backend: a device that does what it is told, except where a [`Fault`] says otherwise.
//!
//! The wrapped device stays real: a SET that fails half-way has really walked the wrapped device to where it landed,
//! and what the driver does next happens to that device. Each fault strikes once, in the order of the list among
//! those for the same call. Which faults there are is data, so a test enumerates them and a failing run is replayed
//! from its list.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vfio_checkpoint_fsm::State;

use crate::executor::VirtualTime;
use crate::{
    Call, ConfigSpace, DataSize, DataStream, DeviceCapabilities, DeviceError, DmaLog, Fingerprint, Identity,
    MigrationDevice, PrecopyInfo, Read, RestoreStream, SaveStream,
};

/// One thing that goes wrong, once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The next SET to `target` fails with `errno` and leaves the device in `landing`: a state on the way, or ERROR.
    Set {
        /// The SET that fails.
        target: State,
        /// Where the device stands afterwards.
        landing: State,
        /// What the SET answers.
        errno: i32,
    },
    /// The next read-back fails.
    Get {
        /// What it answers.
        errno: i32,
    },
    /// The next reset fails and changes nothing.
    Reset {
        /// What it answers.
        errno: i32,
    },
    /// The read that would pass this offset of a save stream fails.
    Read {
        /// Bytes that are read before.
        after_bytes: u64,
        /// What the read answers.
        errno: i32,
    },
    /// Every read of a save stream brings at most this many bytes, from now on.
    ShortReads {
        /// At least 1.
        max_bytes: usize,
    },
    /// The write that would pass this offset of a restore stream fails. The device takes the bytes before it.
    Write {
        /// Bytes that are written before.
        after_bytes: u64,
        /// What the write answers.
        errno: i32,
    },
    /// The next SET to `target` takes this long, in virtual time, before it does its work.
    SlowSet {
        /// The SET that is slow.
        target: State,
        /// How long it takes.
        takes: Duration,
    },
}

/// A device with faults in front of it.
#[derive(Debug)]
pub struct FaultyDevice {
    inner: Box<dyn MigrationDevice>,
    shared: Arc<Mutex<Shared>>,
    time: Arc<VirtualTime>,
}

#[derive(Debug)]
struct Shared {
    faults: VecDeque<Fault>,
    /// The device fell into ERROR: only a reset leads out.
    in_error: bool,
    max_read_bytes: usize,
}

impl Shared {
    /// Takes the first fault that `strikes`.
    fn take(&mut self, strikes: impl Fn(&Fault) -> bool) -> Option<Fault> {
        let index = self.faults.iter().position(strikes)?;
        self.faults.remove(index)
    }
}

impl FaultyDevice {
    /// Puts `faults` in front of `inner`. `time` is the clock that slow calls move.
    pub fn new(inner: Box<dyn MigrationDevice>, faults: &[Fault], time: Arc<VirtualTime>) -> Self {
        let max_read_bytes = usize::MAX;
        let shared = Shared { faults: faults.iter().copied().collect(), in_error: false, max_read_bytes };
        Self { inner, shared: Arc::new(Mutex::new(shared)), time }
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        lock(&self.shared)
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl MigrationDevice for FaultyDevice {
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
        let mut shared = self.shared();
        if let Some(Fault::Get { errno }) = shared.take(|fault| matches!(fault, Fault::Get { .. })) {
            return Err(DeviceError::errno(Call::GetState, errno));
        }
        let in_error = shared.in_error;
        drop(shared);
        if in_error { Ok(State::Error) } else { self.inner.state() }
    }

    fn set_state(&mut self, wanted: State) -> Result<Option<DataStream>, DeviceError> {
        let call = Call::SetState(wanted);
        let mut shared = self.shared();
        if shared.in_error {
            return Err(DeviceError::errno(call, libc::EINVAL));
        }
        let slow = shared.take(|fault| matches!(fault, Fault::SlowSet { target, .. } if *target == wanted));
        let failing = shared.take(|fault| matches!(fault, Fault::Set { target, .. } if *target == wanted));
        drop(shared);
        if let Some(Fault::SlowSet { takes, .. }) = slow {
            self.time.advance(takes);
        }
        let Some(Fault::Set { landing, errno, .. }) = failing else {
            let stream = self.inner.set_state(wanted)?;
            return Ok(stream.map(|stream| wrap(stream, &self.shared)));
        };
        if landing == State::Error {
            self.shared().in_error = true;
        } else if self.inner.state()? != landing {
            // The stream that this may open is lost with the failed SET, as it is in the kernel.
            drop(self.inner.set_state(landing)?);
        }
        Err(DeviceError::errno(call, errno))
    }

    fn data_size(&mut self) -> Result<DataSize, DeviceError> {
        self.inner.data_size()
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        let fault = self.shared().take(|fault| matches!(fault, Fault::Reset { .. }));
        if let Some(Fault::Reset { errno }) = fault {
            return Err(DeviceError::errno(Call::Reset, errno));
        }
        self.inner.reset()?;
        self.shared().in_error = false;
        Ok(())
    }

    fn dma_log(&mut self) -> Option<&mut dyn DmaLog> {
        self.inner.dma_log()
    }

    fn config_space(&mut self) -> Option<&mut dyn ConfigSpace> {
        self.inner.config_space()
    }
}

fn wrap(stream: DataStream, shared: &Arc<Mutex<Shared>>) -> DataStream {
    let shared = Arc::clone(shared);
    match stream {
        DataStream::Save(inner) => DataStream::Save(Box::new(FaultySave { inner, shared, read_bytes: 0 })),
        DataStream::Restore(inner) => {
            DataStream::Restore(Box::new(FaultyRestore { inner, shared, written_bytes: 0 }))
        }
    }
}

#[derive(Debug)]
struct FaultySave {
    inner: Box<dyn SaveStream>,
    shared: Arc<Mutex<Shared>>,
    read_bytes: u64,
}

impl SaveStream for FaultySave {
    fn read(&mut self, buffer: &mut [u8]) -> Result<Read, DeviceError> {
        let mut shared = lock(&self.shared);
        if let Some(Fault::ShortReads { max_bytes }) =
            shared.take(|fault| matches!(fault, Fault::ShortReads { .. }))
        {
            shared.max_read_bytes = max_bytes.max(1);
        }
        let length = buffer.len().min(shared.max_read_bytes);
        let end = self.read_bytes.saturating_add(length as u64);
        let struck =
            shared.take(|fault| matches!(fault, Fault::Read { after_bytes, .. } if *after_bytes < end));
        drop(shared);
        if let Some(Fault::Read { errno, .. }) = struck {
            return Err(DeviceError::errno(Call::Read, errno));
        }
        let read = self.inner.read(&mut buffer[..length])?;
        if let Read::Bytes(bytes) = read {
            self.read_bytes = self.read_bytes.saturating_add(bytes as u64);
        }
        Ok(read)
    }

    fn precopy_info(&mut self) -> Result<PrecopyInfo, DeviceError> {
        self.inner.precopy_info()
    }
}

#[derive(Debug)]
struct FaultyRestore {
    inner: Box<dyn RestoreStream>,
    shared: Arc<Mutex<Shared>>,
    written_bytes: u64,
}

impl RestoreStream for FaultyRestore {
    fn write(&mut self, bytes: &[u8]) -> Result<usize, DeviceError> {
        let end = self.written_bytes.saturating_add(bytes.len() as u64);
        let struck = lock(&self.shared)
            .take(|fault| matches!(fault, Fault::Write { after_bytes, .. } if *after_bytes < end));
        if let Some(Fault::Write { errno, .. }) = struck {
            return Err(DeviceError::errno(Call::Write, errno));
        }
        let taken = self.inner.write(bytes)?;
        self.written_bytes = self.written_bytes.saturating_add(taken as u64);
        Ok(taken)
    }
}
