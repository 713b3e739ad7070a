//! The bench that rules work at: the device, the one to restore onto, and the moves that many rules make.
//!
//! ```text
//!   Bench --source()--> Slot (open, close, fresh, set, save ...)
//!         --target()--> Slot: the second device, or the same one where there is none
//!         --change/fail/dma/hops--> what the subject brought along
//! ```
//!
//! # Invariants
//! - Every rule begins with both devices open, in RUNNING, without a DMA log.
//! - A device that is found in RESUMING when it is opened is reset before any SET: drivers crash there.
//! - States are compared by what a device makes of them (load, stop-copy again), not by the bytes of two streams that
//!   may rightly differ.
//!
//! # Failure paths
//! What brings the device back to RUNNING: a reset; where it has none a walk, and at last closing it. Where nothing
//! helps the answer is [`Instead::Stuck`] and the run ends.

use std::sync::Arc;

use vfio_checkpoint_fsm::{Capabilities, State};

use super::pieces::{Pieces, drain, write_all};
use super::rule::{Answer, Instead, differs, not_applicable, not_observed};
use super::subject::{BoxError, LastClose, Open, Stimulus, Subject, TakeHops};
use super::watch::{Progress, Watched};
use crate::{
    Backend, Call, DataSize, DataStream, DeviceCapabilities, DeviceError, IovaRange, MigrationDevice,
    RestoreStream, SaveStream, chain,
};

/// A device that is opened and closed as rules need it.
pub(super) struct Slot {
    open: Open,
    last_close: LastClose,
    progress: Arc<Progress>,
    limit_bytes: usize,
    device: Option<Box<dyn MigrationDevice>>,
}

impl Slot {
    fn new(open: Open, last_close: LastClose, progress: Arc<Progress>, limit_bytes: usize) -> Self {
        Self { open, last_close, progress, limit_bytes, device: None }
    }

    /// Opens the device, where it is not open.
    pub(super) fn open(&mut self) -> Result<&mut dyn MigrationDevice, BoxError> {
        let device = match self.device.take() {
            Some(device) => device,
            None => Box::new(Watched::new(self.progress.during(Call::Open, &mut self.open)?, &self.progress)),
        };
        Ok(&mut **self.device.insert(device))
    }

    pub(super) fn close(&mut self) {
        self.device = None;
    }

    pub(super) fn device(&mut self) -> Result<&mut dyn MigrationDevice, Instead> {
        self.open()
            .map_err(|error| Instead::Stuck(format!("the device does not open again: {}", chain(&*error))))
    }

    pub(super) fn capabilities(&mut self) -> Result<DeviceCapabilities, Instead> {
        Ok(*self.device()?.capabilities())
    }

    pub(super) fn migration(&mut self) -> Result<Capabilities, Instead> {
        Ok(self.capabilities()?.migration)
    }

    pub(super) fn backend(&mut self) -> Result<Backend, Instead> {
        Ok(self.device()?.identity().backend)
    }

    pub(super) fn last_close(&self) -> LastClose {
        self.last_close
    }

    /// Open, in RUNNING, no log running: where each rule and each case of a rule begins.
    pub(super) fn fresh(&mut self) -> Result<(), Instead> {
        let capabilities = self.capabilities()?;
        if capabilities.dma_logging
            && let Some(log) = self.device()?.dma_log()
        {
            // Drivers differ on stopping what was not started; what matters is that none runs.
            let _ = log.stop();
        }
        if capabilities.reset {
            self.device()?.reset().map_err(|error| Instead::Stuck(chain(&error)))?;
        } else if self.state()? != State::Running {
            self.run_without_reset()?;
        }
        let state = self.state()?;
        if state == State::Running {
            return Ok(());
        }
        Err(Instead::Stuck(format!("the device stays in {state} and nothing brings it to RUNNING")))
    }

    fn run_without_reset(&mut self) -> Result<(), Instead> {
        let state = self.state()?;
        // A half-written RESUMING cannot be walked out of, and a reopened one must not be tried.
        if state != State::Resuming
            && state != State::Error
            && self.device()?.set_state(State::Running).is_ok()
        {
            return Ok(());
        }
        if self.last_close == LastClose::Resets {
            self.close();
        }
        Ok(())
    }

    /// Whether a load that was refused can be undone. Otherwise it must not be tried.
    pub(super) fn require_undo(&mut self) -> Result<(), Instead> {
        if self.capabilities()?.reset || self.last_close == LastClose::Resets {
            return Ok(());
        }
        not_observed("neither a reset nor a close would free the device from RESUMING")
    }

    pub(super) fn require_reset(&mut self) -> Result<(), Instead> {
        if self.capabilities()?.reset { Ok(()) } else { not_applicable("the device has no reset") }
    }

    pub(super) fn require(&mut self, state: State) -> Result<(), Instead> {
        if self.migration()?.supports(state) {
            Ok(())
        } else {
            not_applicable(format!("the device has no {state}"))
        }
    }

    pub(super) fn state(&mut self) -> Result<State, Instead> {
        Ok(self.device()?.state()?)
    }

    pub(super) fn expect_state(&mut self, expected: State) -> Result<(), Instead> {
        match self.state()? {
            found if found == expected => Ok(()),
            found => differs(format!("the device stands in {found} instead of {expected}")),
        }
    }

    pub(super) fn set(&mut self, target: State) -> Result<Option<DataStream>, Instead> {
        Ok(self.device()?.set_state(target)?)
    }

    /// A SET that opens no stream and gets where it should.
    pub(super) fn quiet(&mut self, target: State) -> Result<(), Instead> {
        if self.set(target)?.is_some() {
            return differs(format!("a stream came with the SET to {target}, where none is due"));
        }
        self.expect_state(target)
    }

    /// A SET that opens a stream to read.
    pub(super) fn save(&mut self, target: State) -> Result<Box<dyn SaveStream>, Instead> {
        let stream = self.set(target)?;
        self.expect_state(target)?;
        match stream {
            Some(DataStream::Save(stream)) => Ok(stream),
            Some(DataStream::Restore(_)) => differs(format!("{target} gave a stream to write to")),
            None => differs(format!("{target} gave no stream to read from")),
        }
    }

    /// RUNNING to RESUMING in one SET.
    pub(super) fn resume(&mut self) -> Result<Box<dyn RestoreStream>, Instead> {
        let stream = self.set(State::Resuming)?;
        self.expect_state(State::Resuming)?;
        match stream {
            Some(DataStream::Restore(stream)) => Ok(stream),
            Some(DataStream::Save(_)) => differs("RESUMING gave a stream to read from"),
            None => differs("RESUMING gave no stream to write to"),
        }
    }

    /// A SET that must be refused with EINVAL and change nothing.
    pub(super) fn refused(&mut self, target: State) -> Result<(), Instead> {
        let before = self.state()?;
        match self.device()?.set_state(target) {
            Ok(_) => return differs(format!("{before} -> {target} succeeded")),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            Err(error) => return differs(format!("{before} -> {target} is refused with: {}", chain(&error))),
        }
        self.expect_state(before)
    }

    /// Brings the device, which runs, to `state`; the stream that this opens is the caller's to hold.
    pub(super) fn stand_in(&mut self, state: State) -> Result<Option<DataStream>, Instead> {
        if state == State::Running {
            return Ok(None);
        }
        let stream = self.set(state)?;
        self.expect_state(state)?;
        Ok(stream)
    }

    /// A whole stop-copy from where the device stands, which is left in STOP_COPY.
    pub(super) fn stop_copy(&mut self) -> Result<Vec<u8>, Instead> {
        let mut stream = self.save(State::StopCopy)?;
        self.drain(&mut *stream)
    }

    /// From a drained STOP_COPY: another stop-copy of the same state.
    pub(super) fn stop_copy_again(&mut self) -> Result<Vec<u8>, Instead> {
        self.quiet(State::Stop)?;
        self.stop_copy()
    }

    pub(super) fn drain(&self, stream: &mut dyn SaveStream) -> Result<Vec<u8>, Instead> {
        drain(stream, Pieces::Usual, self.limit_bytes)
    }

    pub(super) fn limit_bytes(&self) -> usize {
        self.limit_bytes
    }

    /// Loads a whole state and stays in RESUMING. The stream is the caller's to hold until RESUMING is left.
    pub(super) fn load(&mut self, bytes: &[u8], pieces: Pieces) -> Result<Box<dyn RestoreStream>, Instead> {
        let mut stream = self.resume()?;
        match write_all(&mut *stream, bytes, pieces) {
            Ok(()) => Ok(stream),
            Err((taken, error)) => {
                differs(format!("after {taken} of {} bytes of a sound state: {}", bytes.len(), chain(&error)))
            }
        }
    }

    /// `MIG_DATA_SIZE`, by either of the two ways to say that there is none.
    pub(super) fn size(&mut self) -> Result<DataSize, Instead> {
        match self.device()?.data_size() {
            Err(DeviceError::Absent { .. }) => Ok(DataSize::Unknown),
            other => Ok(other?),
        }
    }
}

/// What rules work at.
pub(super) struct Bench {
    source: Slot,
    target: Option<Slot>,
    change: Option<Stimulus>,
    fail: Option<Stimulus>,
    dma: Option<(IovaRange, Stimulus)>,
    hops: Option<TakeHops>,
    pub(super) allow_restart: bool,
    blob: Option<Arc<[u8]>>,
    repeatable: Option<bool>,
}

impl Bench {
    pub(super) fn new(
        subject: Subject,
        progress: &Arc<Progress>,
        limit_bytes: usize,
        allow_restart: bool,
    ) -> Self {
        let slot = |open| Slot::new(open, subject.last_close, Arc::clone(progress), limit_bytes);
        Self {
            source: slot(subject.open),
            target: subject.restore_onto.map(slot),
            change: subject.change,
            fail: subject.fail,
            dma: subject.dma,
            hops: subject.hops,
            allow_restart,
            blob: None,
            repeatable: None,
        }
    }

    /// The device under test.
    pub(super) fn source(&mut self) -> &mut Slot {
        &mut self.source
    }

    /// The device to restore onto.
    pub(super) fn target(&mut self) -> &mut Slot {
        self.target.as_mut().unwrap_or(&mut self.source)
    }

    /// The second device, where there is one.
    pub(super) fn second(&mut self) -> Option<&mut Slot> {
        self.target.as_mut()
    }

    pub(super) fn fresh(&mut self) -> Result<(), Instead> {
        self.source.fresh()?;
        self.target.as_mut().map_or(Ok(()), Slot::fresh)
    }

    pub(super) fn change(&mut self) -> Result<(), Instead> {
        match &mut self.change {
            Some(change) => {
                change();
                Ok(())
            }
            None => not_observed("nothing here changes the device's state from outside"),
        }
    }

    pub(super) fn fail(&mut self) -> Result<(), Instead> {
        match &mut self.fail {
            Some(fail) => {
                fail();
                Ok(())
            }
            None => not_observed("nothing here drops the device into ERROR"),
        }
    }

    pub(super) fn dma_range(&self) -> Result<IovaRange, Instead> {
        match &self.dma {
            Some((range, _)) => Ok(*range),
            None => not_observed("nothing here makes the device write by DMA"),
        }
    }

    pub(super) fn write_dma(&mut self) {
        if let Some((_, write)) = &mut self.dma {
            write();
        }
    }

    pub(super) fn take_hops(&mut self) -> Result<Vec<(State, State)>, Instead> {
        match &mut self.hops {
            Some(hops) => Ok(hops()),
            None => not_observed("the device's hops cannot be seen here"),
        }
    }

    /// A whole state of the device, saved once a run. The devices are fresh afterwards.
    pub(super) fn blob(&mut self) -> Result<Arc<[u8]>, Instead> {
        if let Some(blob) = &self.blob {
            return Ok(Arc::clone(blob));
        }
        let saved = self.source.stop_copy();
        self.fresh()?;
        let blob: Arc<[u8]> = saved.map_err(|instead| instead.during("saving a state to load"))?.into();
        self.blob = Some(Arc::clone(&blob));
        Ok(blob)
    }

    /// Whether two stop-copies of one stopped device are byte for byte the same. Found out once a run, from a fresh
    /// device; the devices are fresh afterwards.
    pub(super) fn repeatable(&mut self) -> Result<bool, Instead> {
        if let Some(known) = self.repeatable {
            return Ok(known);
        }
        let first = self.source.stop_copy()?;
        let equal = self.source.stop_copy_again()? == first;
        self.fresh()?;
        self.repeatable = Some(equal);
        Ok(equal)
    }

    /// Not observed where bytes prove nothing.
    pub(super) fn require_repeatable(&mut self) -> Result<(), Instead> {
        if self.repeatable()? {
            Ok(())
        } else {
            not_observed("two stop-copies of the stopped device differ, so comparing bytes proves nothing")
        }
    }

    /// What a device that has loaded `bytes` gives out in a stop-copy, before it ever ran.
    pub(super) fn reload(&mut self, bytes: &[u8]) -> Result<Vec<u8>, Instead> {
        self.fresh()?;
        let target = self.target();
        let stream = target.load(bytes, Pieces::Usual)?;
        let saved = target.stop_copy();
        drop(stream);
        self.fresh()?;
        saved
    }

    /// Whether two streams carry the same state. The devices are fresh afterwards.
    pub(super) fn same_state(&mut self, a: &[u8], b: &[u8]) -> Answer {
        if a == b {
            return Ok(format!("{} bytes, equal", a.len()));
        }
        let (loaded_a, loaded_b) = (self.reload(a)?, self.reload(b)?);
        equal(&loaded_a, &loaded_b)?;
        Ok(format!("{} and {} bytes carry the same state", a.len(), b.len()))
    }
}

/// Equal bytes, or where they part.
pub(super) fn equal(a: &[u8], b: &[u8]) -> Result<(), Instead> {
    if a == b {
        return Ok(());
    }
    let at = a.iter().zip(b).position(|(a, b)| a != b).unwrap_or_else(|| a.len().min(b.len()));
    differs(format!("{} and {} bytes that differ from byte {at} on", a.len(), b.len()))
}
