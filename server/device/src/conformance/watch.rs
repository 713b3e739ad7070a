//! A device that says which call it is in, so that one that never returns has a name in the report.
//!
//! ```text
//!   rule -> Watched* -> device        during a call: Progress { call, since }
//!                                         ^
//!   runner, on another thread ------------/   looks when it has waited long enough
//! ```
//!
//! # Invariants
//! - Nothing is changed on the way: every call and every answer passes through.
//! - A call that returned, but late, is remembered: a clock that jumps (the simulated one) is judged as one that ran.
//!
//! # Failure paths
//! None of its own.

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vfio_checkpoint_fsm::State;

use crate::{
    Call, ConfigCapture, ConfigSpace, DataSize, DataStream, DeviceCapabilities, DeviceError, DirtyBitmap,
    DmaLog, Executor, Fingerprint, Identity, InterruptKind, IovaRange, MigrationDevice, PciCommand,
    PrecopyInfo, Read, RestoreStream, SaveStream,
};

/// Which call is under way, and since when.
#[derive(Debug)]
pub(super) struct Progress {
    executor: Arc<dyn Executor>,
    limit: Duration,
    under: Mutex<Under>,
}

#[derive(Debug, Default)]
struct Under {
    current: Option<(Call, Duration)>,
    overdue: Option<(Call, Duration)>,
}

impl Progress {
    pub(super) fn new(executor: Arc<dyn Executor>, limit: Duration) -> Self {
        Self { executor, limit, under: Mutex::default() }
    }

    fn under(&self) -> MutexGuard<'_, Under> {
        self.under.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `act`, which is `call`.
    pub(super) fn during<T>(&self, call: Call, act: impl FnOnce() -> T) -> T {
        let begun = self.executor.now();
        self.under().current = Some((call, begun));
        let value = act();
        let took = self.executor.now().saturating_sub(begun);
        let mut under = self.under();
        under.current = None;
        if took > self.limit && under.overdue.is_none() {
            under.overdue = Some((call, took));
        }
        value
    }

    /// A call that takes or took longer than the limit, and for how long.
    pub(super) fn overdue(&self) -> Option<(Call, Duration)> {
        let under = self.under();
        under.overdue.or_else(|| {
            let (call, begun) = under.current?;
            let took = self.executor.now().saturating_sub(begun);
            (took >= self.limit).then_some((call, took))
        })
    }
}

/// A device under watch.
#[derive(Debug)]
pub(super) struct Watched {
    inner: Box<dyn MigrationDevice>,
    progress: Arc<Progress>,
}

impl Watched {
    pub(super) fn new(inner: Box<dyn MigrationDevice>, progress: &Arc<Progress>) -> Self {
        Self { inner, progress: Arc::clone(progress) }
    }
}

impl MigrationDevice for Watched {
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
        self.progress.during(Call::GetState, || self.inner.state())
    }

    fn set_state(&mut self, target: State) -> Result<Option<DataStream>, DeviceError> {
        let stream = self.progress.during(Call::SetState(target), || self.inner.set_state(target))?;
        let progress = || Arc::clone(&self.progress);
        Ok(stream.map(|stream| match stream {
            DataStream::Save(inner) => {
                DataStream::Save(Box::new(WatchedSave { inner, progress: progress() }))
            }
            DataStream::Restore(inner) => {
                DataStream::Restore(Box::new(WatchedRestore { inner, progress: progress() }))
            }
        }))
    }

    fn data_size(&mut self) -> Result<DataSize, DeviceError> {
        self.progress.during(Call::DataSize, || self.inner.data_size())
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        self.progress.during(Call::Reset, || self.inner.reset())
    }

    // Both are lent as this very value, so that their calls are watched as well.
    fn dma_log(&mut self) -> Option<&mut dyn DmaLog> {
        self.inner.dma_log().is_some().then_some(self as &mut dyn DmaLog)
    }

    fn config_space(&mut self) -> Option<&mut dyn ConfigSpace> {
        self.inner.config_space().is_some().then_some(self as &mut dyn ConfigSpace)
    }
}

impl Watched {
    fn log<T>(
        &mut self,
        call: Call,
        act: impl FnOnce(&mut dyn DmaLog) -> Result<T, DeviceError>,
    ) -> Result<T, DeviceError> {
        let log = self.inner.dma_log().ok_or(DeviceError::Absent { call })?;
        self.progress.during(call, || act(log))
    }

    fn space<T>(
        &mut self,
        call: Call,
        act: impl FnOnce(&mut dyn ConfigSpace) -> Result<T, DeviceError>,
    ) -> Result<T, DeviceError> {
        let space = self.inner.config_space().ok_or(DeviceError::Absent { call })?;
        self.progress.during(call, || act(space))
    }
}

impl DmaLog for Watched {
    fn start(&mut self, page_bytes: u64, ranges: &[IovaRange]) -> Result<u64, DeviceError> {
        self.log(Call::DmaLogStart, |log| log.start(page_bytes, ranges))
    }

    fn report(&mut self, bitmap: &mut DirtyBitmap) -> Result<(), DeviceError> {
        self.log(Call::DmaLogReport, |log| log.report(bitmap))
    }

    fn stop(&mut self) -> Result<(), DeviceError> {
        self.log(Call::DmaLogStop, |log| log.stop())
    }
}

impl ConfigSpace for Watched {
    fn capture(&mut self) -> Result<ConfigCapture, DeviceError> {
        self.space(Call::ConfigRead, |space| space.capture())
    }

    fn command(&mut self) -> Result<PciCommand, DeviceError> {
        self.space(Call::ConfigRead, |space| space.command())
    }

    fn set_command(&mut self, command: PciCommand) -> Result<(), DeviceError> {
        self.space(Call::ConfigWrite, |space| space.set_command(command))
    }

    fn arm(&mut self, kind: InterruptKind, eventfds: &[BorrowedFd<'_>]) -> Result<(), DeviceError> {
        self.space(Call::SetIrqs, |space| space.arm(kind, eventfds))
    }

    fn disarm(&mut self, kind: InterruptKind) -> Result<(), DeviceError> {
        self.space(Call::SetIrqs, |space| space.disarm(kind))
    }
}

#[derive(Debug)]
struct WatchedSave {
    inner: Box<dyn SaveStream>,
    progress: Arc<Progress>,
}

impl SaveStream for WatchedSave {
    fn read(&mut self, buffer: &mut [u8]) -> Result<Read, DeviceError> {
        self.progress.during(Call::Read, || self.inner.read(buffer))
    }

    fn precopy_info(&mut self) -> Result<PrecopyInfo, DeviceError> {
        self.progress.during(Call::PrecopyInfo, || self.inner.precopy_info())
    }
}

#[derive(Debug)]
struct WatchedRestore {
    inner: Box<dyn RestoreStream>,
    progress: Arc<Progress>,
}

impl RestoreStream for WatchedRestore {
    fn write(&mut self, bytes: &[u8]) -> Result<usize, DeviceError> {
        self.progress.during(Call::Write, || self.inner.write(bytes))
    }
}
