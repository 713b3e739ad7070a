//! A simulated device with one flaw: what it gets wrong is data, the rest is the simulated device's own.

#![allow(
    clippy::wildcard_enum_match_arm,
    reason = "each flaw is about one thing; with any other that thing is as it should be"
)]

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard};

use vfio_checkpoint_device::sim::{SimDevice, SimHandle};
use vfio_checkpoint_device::{
    Call, ConfigCapture, ConfigSpace, DataSize, DataStream, DeviceCapabilities, DeviceError, DirtyBitmap,
    DmaLog, Fingerprint, Identity, InterruptKind, IovaRange, MigrationDevice, PciCommand, PrecopyInfo, Read,
    RestoreStream, SaveStream,
};
use vfio_checkpoint_fsm::State;

/// What a device gets wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flaw {
    CapabilitiesChangeOnReopen,
    FingerprintChangesOnReopen,
    IdentityChangesOnReopen,
    SecondStream,
    NoStreamFromStop,
    LandsElsewhere,
    StayingRefused,
    AcceptsError,
    AcceptsAbsent,
    RestartsStream,
    RunsOutOfError,
    P2pFlaggedNotThere,
    EndsByEnomsg,
    EndComesBack,
    LosesByteOfSingleReads,
    ShortOnHugeReads,
    RejectedSetEndsStream,
    StreamOutlivesSession,
    StreamOutlivesReset,
    CloseStopsDevice,
    SaveChangesState,
    EndsInPrecopy,
    IdleIsError,
    PrecopySavesElse,
    InfoInStopCopy,
    NoInfoInP2p,
    InitialRises,
    InitialNeverFalls,
    ReinitUnasked,
    Understates,
    UnderstatesAfterPrecopy,
    UnderstatesBound,
    GuessesSize,
    AcceptsTruncated,
    AcceptsEmpty,
    AcceptsTrailing,
    AcceptsForeign,
    LoadsAfterFailedWrite,
    RefusalStops,
    RefusesSingleBytes,
    RefusesOddPieces,
    RefusesSecondRestore,
    NoStartInTwoSteps,
    StuckInPrecopy,
    KeepsOldState,
    StartChangesState,
    ResetRemembers,
    ResetUnannounced,
    BitmapCleared,
    WritesNotLogged,
    ReportedAgain,
    SecondStartTaken,
    OverlapTaken,
    CleanWithoutLog,
    OddLogPages,
    LogStopsWithDevice,
    CommandFixed,
    CommandLostOnLoad,
    InterruptsNotCaptured,
}

use Flaw as F;

#[derive(Debug, Default)]
#[allow(clippy::struct_excessive_bools, reason = "each remembers one thing for one flaw")]
struct Memo {
    opens: u32,
    state: Option<State>,
    precopied: bool,
    written: usize,
    write_failed: bool,
    scratch: u64,
    rejected: bool,
    infos: u32,
    logging: bool,
    loaded: bool,
    reported: Vec<u64>,
}

/// The slot: what outlives a close.
#[derive(Debug, Clone)]
pub(crate) struct Broken {
    flaw: Flaw,
    slot: SimDevice,
    memo: Arc<Mutex<Memo>>,
}

impl Broken {
    pub(crate) fn new(flaw: Flaw, slot: &SimDevice) -> Self {
        Self { flaw, slot: slot.clone(), memo: Arc::default() }
    }

    fn memo(&self) -> MutexGuard<'_, Memo> {
        self.memo.lock().unwrap()
    }

    fn is(&self, flaw: Flaw) -> bool {
        self.flaw == flaw
    }

    pub(crate) fn open(&self) -> BrokenDevice {
        let inner = self.slot.open().unwrap();
        let mut memo = self.memo();
        memo.opens += 1;
        let again = memo.opens.is_multiple_of(2);
        drop(memo);
        let mut capabilities = *inner.capabilities();
        let mut identity = inner.identity().clone();
        let mut fingerprint = inner.fingerprint().clone();
        match self.flaw {
            F::CapabilitiesChangeOnReopen if again => capabilities.precopy_reinit = true,
            F::IdentityChangesOnReopen if again => identity.name.push('\''),
            F::FingerprintChangesOnReopen if again => fingerprint = fingerprint.with("opened", "again"),
            F::GuessesSize => capabilities.data_size = false,
            F::ResetUnannounced => capabilities.reset = false,
            _ => {}
        }
        BrokenDevice { inner, broken: self.clone(), capabilities, identity, fingerprint }
    }
}

/// An open device with a flaw.
#[derive(Debug)]
pub(crate) struct BrokenDevice {
    inner: SimHandle,
    broken: Broken,
    capabilities: DeviceCapabilities,
    identity: Identity,
    fingerprint: Fingerprint,
}

fn refused(call: Call) -> DeviceError {
    DeviceError::errno(call, libc::EINVAL)
}

impl MigrationDevice for BrokenDevice {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn fingerprint(&self) -> &Fingerprint {
        &self.fingerprint
    }

    fn capabilities(&self) -> &DeviceCapabilities {
        &self.capabilities
    }

    fn state(&mut self) -> Result<State, DeviceError> {
        self.inner.state()
    }

    fn set_state(&mut self, target: State) -> Result<Option<DataStream>, DeviceError> {
        let from = self.inner.state()?;
        let call = Call::SetState(target);
        let broken = self.broken.clone();
        match broken.flaw {
            F::StayingRefused if from == target => return Err(refused(call)),
            F::AcceptsError if target == State::Error => return Ok(None),
            F::AcceptsAbsent if !self.capabilities.migration.supports(target) => return Ok(None),
            F::RestartsStream
                if from == State::StopCopy && matches!(target, State::PreCopy | State::PreCopyP2p) =>
            {
                return Ok(None);
            }
            F::RunsOutOfError if from == State::Error && target == State::Running => {
                self.inner.reset()?;
                return Ok(None);
            }
            F::NoStartInTwoSteps if (from, target) == (State::Resuming, State::RunningP2p) => {
                return Err(refused(call));
            }
            F::StuckInPrecopy if (from, target) == (State::PreCopy, State::Running) => {
                return Err(refused(call));
            }
            F::RefusesSecondRestore if target == State::Resuming && self.broken.memo().loaded => {
                return Err(refused(call));
            }
            F::P2pFlaggedNotThere if target == State::RunningP2p => return Err(refused(call)),
            F::LandsElsewhere if (from, target) == (State::Running, State::Stop) => {
                return self.inner.set_state(State::RunningP2p);
            }
            F::SaveChangesState if target == State::StopCopy => {
                self.broken.slot.set_scratch(self.broken.slot.scratch() + 1);
            }
            F::LogStopsWithDevice if target == State::Stop => self.inner.dma_log().unwrap().stop()?,
            _ => {}
        }
        if target == State::Resuming {
            let mut memo = broken.memo();
            *memo = Memo { scratch: broken.slot.scratch(), opens: memo.opens, ..Memo::default() };
        }
        let set = self.inner.set_state(target);
        let mut memo = broken.memo();
        let set = match set {
            Err(error) => {
                memo.rejected = true;
                let took = (from, target) == (State::Resuming, State::Running)
                    && match broken.flaw {
                        F::AcceptsTruncated => memo.written > 0 && !memo.write_failed,
                        F::AcceptsEmpty => memo.written == 0 && !memo.write_failed,
                        F::LoadsAfterFailedWrite => memo.write_failed,
                        _ => false,
                    };
                if took {
                    self.inner.reset()?;
                    return Ok(None);
                }
                if broken.is(F::RefusalStops) && from == State::Resuming && target == State::Running {
                    self.inner.reset()?;
                    self.inner.set_state(State::Stop)?;
                }
                return Err(error);
            }
            Ok(set) => set,
        };
        if set.is_some() {
            memo.precopied = target == State::PreCopy || target == State::PreCopyP2p;
            memo.rejected = false;
            memo.infos = 0;
        }
        memo.state = Some(target);
        memo.loaded |= (from, target) == (State::Resuming, State::Running);
        match broken.flaw {
            F::PrecopySavesElse if from == State::StopCopy && target == State::Stop && memo.precopied => {
                memo.precopied = false;
                broken.slot.set_scratch(broken.slot.scratch() + 1);
            }
            F::KeepsOldState if from == State::Resuming => broken.slot.set_scratch(memo.scratch),
            F::StartChangesState if from == State::Resuming && target.is_running() => {
                broken.slot.set_scratch(broken.slot.scratch() + 1);
            }
            F::CommandLostOnLoad if from == State::Resuming => {
                self.inner.config_space().unwrap().set_command(PciCommand(0))?;
            }
            F::NoStreamFromStop if (from, target) == (State::Stop, State::StopCopy) => return Ok(None),
            F::SecondStream if (from, target) == (State::PreCopy, State::PreCopyP2p) => {
                return Ok(Some(DataStream::Save(Box::new(NoBytes))));
            }
            _ => {}
        }
        drop(memo);
        Ok(set.map(|stream| match stream {
            DataStream::Save(inner) => {
                DataStream::Save(Box::new(BrokenSave { inner, broken, read: 0, ended: false }))
            }
            DataStream::Restore(inner) => DataStream::Restore(Box::new(BrokenRestore { inner, broken })),
        }))
    }

    fn data_size(&mut self) -> Result<DataSize, DeviceError> {
        let state = self.inner.state()?;
        Ok(match (self.broken.flaw, self.inner.data_size()?) {
            (F::Understates, DataSize::Known(bytes)) => DataSize::Known(bytes - 1),
            (F::UnderstatesAfterPrecopy, DataSize::UpperBound(_)) if state == State::PreCopy => {
                DataSize::UpperBound(1)
            }
            (F::UnderstatesBound, DataSize::UpperBound(bytes)) => DataSize::UpperBound(bytes / 2),
            (_, size) => size,
        })
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        let scratch = self.broken.slot.scratch();
        self.inner.reset()?;
        if self.broken.is(F::ResetRemembers) {
            self.broken.slot.set_scratch(scratch);
        }
        self.broken.memo().state = None;
        self.broken.memo().loaded = false;
        Ok(())
    }

    fn dma_log(&mut self) -> Option<&mut dyn DmaLog> {
        Some(self)
    }

    fn config_space(&mut self) -> Option<&mut dyn ConfigSpace> {
        Some(self)
    }
}

impl DmaLog for BrokenDevice {
    fn start(&mut self, page_bytes: u64, ranges: &[IovaRange]) -> Result<u64, DeviceError> {
        let log = self.inner.dma_log().unwrap();
        let page_bytes = match log.start(page_bytes, ranges) {
            Err(_) if self.broken.is(F::SecondStartTaken) && self.broken.memo().logging => page_bytes,
            Err(_) if self.broken.is(F::OverlapTaken) && ranges.len() > 1 => page_bytes,
            other => other?,
        };
        self.broken.memo().logging = true;
        self.broken.memo().reported.clear();
        Ok(if self.broken.is(F::OddLogPages) { page_bytes + 1 } else { page_bytes })
    }

    fn report(&mut self, bitmap: &mut DirtyBitmap) -> Result<(), DeviceError> {
        match self.broken.flaw {
            F::BitmapCleared => bitmap.words_mut().fill(0),
            F::WritesNotLogged => return self.inner.dma_log().unwrap().report(&mut bitmap.clone()),
            F::ReportedAgain => {
                self.inner.dma_log().unwrap().report(bitmap)?;
                let mut memo = self.broken.memo();
                memo.reported.resize(bitmap.words_mut().len(), 0);
                for (word, kept) in bitmap.words_mut().iter_mut().zip(&mut memo.reported) {
                    *word |= *kept;
                    *kept = *word;
                }
                return Ok(());
            }
            _ => {}
        }
        match self.inner.dma_log().unwrap().report(bitmap) {
            Err(_) if self.broken.is(F::CleanWithoutLog) => Ok(()),
            other => other,
        }
    }

    fn stop(&mut self) -> Result<(), DeviceError> {
        self.broken.memo().logging = false;
        self.inner.dma_log().unwrap().stop()
    }
}

impl ConfigSpace for BrokenDevice {
    fn capture(&mut self) -> Result<ConfigCapture, DeviceError> {
        let capture = self.inner.config_space().unwrap().capture()?;
        let hide = self.broken.is(F::InterruptsNotCaptured);
        Ok(if hide { ConfigCapture { interrupts: None, ..capture } } else { capture })
    }

    fn command(&mut self) -> Result<PciCommand, DeviceError> {
        self.inner.config_space().unwrap().command()
    }

    fn set_command(&mut self, command: PciCommand) -> Result<(), DeviceError> {
        if self.broken.is(F::CommandFixed) {
            return Ok(());
        }
        self.inner.config_space().unwrap().set_command(command)
    }

    fn arm(&mut self, kind: InterruptKind, eventfds: &[BorrowedFd<'_>]) -> Result<(), DeviceError> {
        self.inner.config_space().unwrap().arm(kind, eventfds)
    }

    fn disarm(&mut self, kind: InterruptKind) -> Result<(), DeviceError> {
        self.inner.config_space().unwrap().disarm(kind)
    }
}

/// A stream that nobody asked for.
#[derive(Debug)]
struct NoBytes;

impl SaveStream for NoBytes {
    fn read(&mut self, _buffer: &mut [u8]) -> Result<Read, DeviceError> {
        Ok(Read::Zero)
    }

    fn precopy_info(&mut self) -> Result<PrecopyInfo, DeviceError> {
        Ok(PrecopyInfo::default())
    }
}

#[derive(Debug)]
struct BrokenSave {
    inner: Box<dyn SaveStream>,
    broken: Broken,
    read: usize,
    ended: bool,
}

impl Drop for BrokenSave {
    fn drop(&mut self) {
        if self.broken.is(F::CloseStopsDevice) && !self.ended && self.broken.slot.state() == State::StopCopy {
            self.broken.slot.force_error();
        }
    }
}

impl SaveStream for BrokenSave {
    fn read(&mut self, buffer: &mut [u8]) -> Result<Read, DeviceError> {
        let state = self.broken.slot.state();
        let precopying = matches!(state, State::PreCopy | State::PreCopyP2p);
        if self.broken.is(F::RejectedSetEndsStream) && self.broken.memo().rejected {
            return Err(DeviceError::errno(Call::Read, libc::ENODEV));
        }
        if self.broken.is(F::EndsInPrecopy) && self.ended {
            return Ok(Read::Zero);
        }
        if self.broken.is(F::ShortOnHugeReads) && buffer.len() > 1 << 20 && !self.ended {
            self.ended = true;
            let skipped = buffer.len().min(8);
            self.inner.read(&mut buffer[..skipped])?;
        }
        if self.broken.is(F::LosesByteOfSingleReads) && buffer.len() == 1 && self.read == 10 {
            self.inner.read(buffer)?;
        }
        let read = match self.inner.read(buffer) {
            Err(_) if self.broken.is(F::StreamOutlivesSession) && state == State::Stop => Read::Zero,
            Err(_) if self.broken.is(F::StreamOutlivesReset) && state == State::Running => Read::Zero,
            other => other?,
        };
        if let Read::Bytes(bytes) = read {
            self.read += bytes;
            return Ok(read);
        }
        let ended = std::mem::replace(&mut self.ended, true) && !self.broken.memo().precopied;
        match self.broken.flaw {
            F::EndsByEnomsg if state == State::StopCopy => Ok(Read::NothingNow),
            F::EndComesBack if ended && state == State::StopCopy => Ok(Read::Bytes(1)),
            F::IdleIsError if precopying => Err(DeviceError::errno(Call::Read, libc::EAGAIN)),
            _ => Ok(read),
        }
    }

    fn precopy_info(&mut self) -> Result<PrecopyInfo, DeviceError> {
        let state = self.broken.slot.state();
        let info = match self.inner.precopy_info() {
            Err(_) if self.broken.is(F::InfoInStopCopy) && state == State::StopCopy => PrecopyInfo::default(),
            other => other?,
        };
        let mut memo = self.broken.memo();
        memo.infos += 1;
        Ok(match self.broken.flaw {
            F::NoInfoInP2p if state == State::PreCopyP2p => return Err(refused(Call::PrecopyInfo)),
            F::InitialRises if memo.infos == 3 => {
                PrecopyInfo { initial_bytes: info.initial_bytes + (1 << 20), ..info }
            }
            F::InitialNeverFalls => PrecopyInfo { initial_bytes: 1 << 20, ..info },
            F::ReinitUnasked if memo.infos == 2 => PrecopyInfo { reinit: true, ..info },
            _ => info,
        })
    }
}

#[derive(Debug)]
struct BrokenRestore {
    inner: Box<dyn RestoreStream>,
    broken: Broken,
}

impl RestoreStream for BrokenRestore {
    fn write(&mut self, bytes: &[u8]) -> Result<usize, DeviceError> {
        let written = self.broken.memo().written;
        let mut bytes = bytes.to_vec();
        if self.broken.is(F::AcceptsForeign) && written == 0 && bytes[0] == !b'V' {
            bytes.iter_mut().take(8).for_each(|byte| *byte ^= 0xff);
        }
        let refused_size = match self.broken.flaw {
            F::RefusesSingleBytes => Some(1),
            F::RefusesOddPieces => Some(4093),
            _ => None,
        };
        if refused_size == Some(bytes.len()) {
            return Err(refused(Call::Write));
        }
        // The end record: 24 bytes that begin with kind 3. What follows it is too much.
        if self.broken.is(F::AcceptsTrailing)
            && let Some(end) = self.broken.memo().state.filter(|_| bytes.iter().all(|byte| *byte == 0))
            && end == State::Resuming
            && written > 80_000
        {
            return Ok(bytes.len());
        }
        let taken = self.inner.write(&bytes);
        let mut memo = self.broken.memo();
        memo.write_failed |= taken.is_err();
        memo.written += taken.as_ref().map_or(0, |taken| *taken);
        taken
    }
}
