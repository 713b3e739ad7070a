//! Faults as data over any backend: a device that does what it is told, except where a [`Fault`] says otherwise.
//!
//! The wrapped device stays real: a SET that fails half-way has really walked the wrapped device to where it landed,
//! and what the driver does next happens to that device. Each fault strikes once, in the order of the list among
//! those for the same call. Which faults there are is data, so a test enumerates them and a failing run is replayed
//! from its list.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vfio_checkpoint_fsm::State;

use crate::executor::VirtualTime;
use crate::{
    Call, ConfigSpace, DataSize, DataStream, DeviceCapabilities, DeviceError, DmaLog, Executor, Fingerprint,
    Identity, Inline, MigrationDevice, PrecopyInfo, Read, RestoreStream, SaveStream,
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
    /// The next SET to `target` answers success and leaves the device in `landing`.
    Lie {
        /// The SET that lies.
        target: State,
        /// Where the device stands afterwards.
        landing: State,
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
    /// The read at this offset of a save stream fails. EINTR is not the end of a session, all else is.
    Read {
        /// Bytes that are read before.
        after_bytes: u64,
        /// What the read answers.
        errno: i32,
    },
    /// The read at this offset of a save stream, and some more after it, answer ENOMSG.
    NothingNow {
        /// Bytes that are read before.
        after_bytes: u64,
        /// How many reads answer so.
        times: u32,
    },
    /// Every read of a save stream brings at most this many bytes, from now on.
    ShortReads {
        /// At least 1.
        max_bytes: usize,
    },
    /// The write at this offset of a restore stream fails. The device takes none of its bytes.
    Write {
        /// Bytes that are written before.
        after_bytes: u64,
        /// What the write answers.
        errno: i32,
    },
    /// Every write to a restore stream takes at most this many bytes, from now on.
    ShortWrites {
        /// At least 1.
        max_bytes: usize,
    },
    /// The device falls into ERROR by itself once a stream has carried this many bytes: only a reset leads out.
    SuddenError {
        /// Bytes that are read or written before.
        after_bytes: u64,
    },
    /// The next question for what is left to pre-copy is answered with new initial data, although none is there.
    Reinit {
        /// What it claims is left.
        initial_bytes: u64,
    },
    /// The next such call takes this long, in virtual time, before it does its work.
    Slow {
        /// The call that is slow: a SET, a read, a write or a reset.
        call: Call,
        /// How long it takes.
        takes: Duration,
    },
}

impl Fault {
    /// Some faults, at most `most`, drawn from `seed`: the same ones for the same seed. Offsets are below
    /// `stream_bytes`.
    pub fn draw(seed: u64, most: u32, stream_bytes: u64) -> Vec<Self> {
        let random = Inline::new(seed);
        let below = |bound: u64| random.random() % bound.max(1);
        let count = below(u64::from(most) + 1);
        (0..count)
            .map(|_| {
                let state = |random: u64| State::ALL[usize::try_from(random % 8).unwrap_or(0)];
                let errno = [libc::EIO, libc::EINVAL, libc::ENOMEM, libc::ETIMEDOUT, libc::EBUSY]
                    [usize::try_from(below(5)).unwrap_or(0)];
                let (target, landing) = (state(below(8)), state(below(8)));
                let after_bytes = below(stream_bytes);
                let max_bytes = usize::try_from(1 + below(5000)).unwrap_or(1);
                match below(14) {
                    0..=2 => Self::Set { target, landing, errno },
                    3 => Self::Lie { target, landing },
                    4 => Self::Get { errno },
                    5 => Self::Reset { errno },
                    6 => Self::Read { after_bytes, errno: if below(2) == 0 { libc::EINTR } else { errno } },
                    7 => Self::NothingNow { after_bytes, times: 3 },
                    8 => Self::ShortReads { max_bytes },
                    9 => Self::Write { after_bytes, errno: if below(2) == 0 { libc::EINTR } else { errno } },
                    10 => Self::ShortWrites { max_bytes },
                    11 => Self::SuddenError { after_bytes },
                    12 => Self::Reinit { initial_bytes: after_bytes },
                    _ => Self::Slow { call: Call::SetState(target), takes: Duration::from_secs(below(240)) },
                }
            })
            .collect()
    }
}

impl Fault {
    /// Where in a save stream it strikes, if that is where it does.
    fn read_offset(&self) -> Option<u64> {
        match self {
            Self::Read { after_bytes, .. }
            | Self::NothingNow { after_bytes, .. }
            | Self::SuddenError { after_bytes } => Some(*after_bytes),
            Self::Set { .. }
            | Self::Lie { .. }
            | Self::Get { .. }
            | Self::Reset { .. }
            | Self::ShortReads { .. }
            | Self::Write { .. }
            | Self::ShortWrites { .. }
            | Self::Reinit { .. }
            | Self::Slow { .. } => None,
        }
    }

    /// Where in a restore stream it strikes, if that is where it does.
    fn write_offset(&self) -> Option<u64> {
        match self {
            Self::Write { after_bytes, .. } | Self::SuddenError { after_bytes } => Some(*after_bytes),
            Self::Set { .. }
            | Self::Lie { .. }
            | Self::Get { .. }
            | Self::Reset { .. }
            | Self::Read { .. }
            | Self::NothingNow { .. }
            | Self::ShortReads { .. }
            | Self::ShortWrites { .. }
            | Self::Reinit { .. }
            | Self::Slow { .. } => None,
        }
    }
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
    max_write_bytes: usize,
    /// Reads that still answer ENOMSG.
    nothing_now: u32,
    struck: Arc<AtomicU64>,
}

impl Shared {
    /// Takes the first fault that `strikes`.
    fn take(&mut self, strikes: impl Fn(&Fault) -> bool) -> Option<Fault> {
        let index = self.faults.iter().position(strikes)?;
        self.struck.fetch_add(1, Ordering::Relaxed);
        self.faults.remove(index)
    }

    /// How many bytes a stream that has carried `carried` may carry in one call, at most `length`: up to the next
    /// fault that `counts`, so that it strikes where it says.
    fn room(&self, carried: u64, length: usize, counts: impl Fn(&Fault) -> Option<u64>) -> usize {
        let next = self.faults.iter().filter_map(counts).filter(|after| *after > carried).min();
        let room = next.map_or(usize::MAX, |after| usize::try_from(after - carried).unwrap_or(usize::MAX));
        length.min(room)
    }

    /// How long `wanted` takes before it begins.
    fn delay(&mut self, wanted: Call) -> Option<Duration> {
        match self.take(|fault| matches!(fault, Fault::Slow { call, .. } if *call == wanted))? {
            Fault::Slow { takes, .. } => Some(takes),
            Fault::Set { .. }
            | Fault::Lie { .. }
            | Fault::Get { .. }
            | Fault::Reset { .. }
            | Fault::Read { .. }
            | Fault::NothingNow { .. }
            | Fault::ShortReads { .. }
            | Fault::Write { .. }
            | Fault::ShortWrites { .. }
            | Fault::SuddenError { .. }
            | Fault::Reinit { .. } => None,
        }
    }

    /// Whether a stream that has carried `carried` bytes drops the device into ERROR.
    fn falls(&mut self, carried: u64) -> bool {
        let falls = self
            .take(|fault| matches!(fault, Fault::SuddenError { after_bytes } if *after_bytes <= carried))
            .is_some();
        self.in_error |= falls;
        falls
    }
}

impl FaultyDevice {
    /// Puts `faults` in front of `inner`. `time` is the clock that slow calls move.
    pub fn new(inner: Box<dyn MigrationDevice>, faults: &[Fault], time: Arc<VirtualTime>) -> Self {
        let shared = Shared {
            faults: faults.iter().copied().collect(),
            in_error: false,
            max_read_bytes: usize::MAX,
            max_write_bytes: usize::MAX,
            nothing_now: 0,
            struck: Arc::default(),
        };
        Self { inner, shared: Arc::new(Mutex::new(shared)), time }
    }

    /// How many faults have struck so far; goes on counting after the device was handed over.
    pub fn struck(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.shared().struck)
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        lock(&self.shared)
    }

    /// Leaves the device in `landing`, as far as it can get there; a stream that this opens is lost with the SET.
    fn land(&mut self, landing: State) {
        if landing == State::Error {
            self.shared().in_error = true;
        } else if self.inner.state().is_ok_and(|state| state != landing) {
            drop(self.inner.set_state(landing));
        }
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
        let (delay, failing) = {
            let mut shared = self.shared();
            let delay = shared.delay(call);
            let strikes = |fault: &Fault| matches!(fault, Fault::Set { target, .. } | Fault::Lie { target, .. } if *target == wanted);
            (delay, shared.take(strikes))
        };
        if let Some(takes) = delay {
            self.time.advance(takes);
        }
        if self.shared().in_error {
            return Err(DeviceError::errno(call, libc::EINVAL));
        }
        match failing {
            Some(Fault::Set { landing, errno, .. }) => {
                self.land(landing);
                Err(DeviceError::errno(call, errno))
            }
            Some(Fault::Lie { landing, .. }) => {
                self.land(landing);
                Ok(None)
            }
            Some(_) | None => {
                let stream = self.inner.set_state(wanted)?;
                Ok(stream.map(|stream| wrap(stream, &self.shared, &self.time)))
            }
        }
    }

    fn data_size(&mut self) -> Result<DataSize, DeviceError> {
        self.inner.data_size()
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        let delay = self.shared().delay(Call::Reset);
        if let Some(takes) = delay {
            self.time.advance(takes);
        }
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

fn wrap(stream: DataStream, shared: &Arc<Mutex<Shared>>, time: &Arc<VirtualTime>) -> DataStream {
    let (shared, time) = (Arc::clone(shared), Arc::clone(time));
    match stream {
        DataStream::Save(inner) => {
            DataStream::Save(Box::new(FaultySave { inner, shared, time, read_bytes: 0 }))
        }
        DataStream::Restore(inner) => {
            DataStream::Restore(Box::new(FaultyRestore { inner, shared, time, written_bytes: 0 }))
        }
    }
}

#[derive(Debug)]
struct FaultySave {
    inner: Box<dyn SaveStream>,
    shared: Arc<Mutex<Shared>>,
    time: Arc<VirtualTime>,
    read_bytes: u64,
}

impl SaveStream for FaultySave {
    fn read(&mut self, buffer: &mut [u8]) -> Result<Read, DeviceError> {
        let mut shared = lock(&self.shared);
        if let Some(takes) = shared.delay(Call::Read) {
            self.time.advance(takes);
        }
        if let Some(Fault::ShortReads { max_bytes }) =
            shared.take(|fault| matches!(fault, Fault::ShortReads { .. }))
        {
            shared.max_read_bytes = max_bytes.max(1);
        }
        let carried = self.read_bytes;
        if shared.falls(carried) || shared.in_error {
            return Err(DeviceError::errno(Call::Read, libc::EIO));
        }
        if let Some(Fault::Read { errno, .. }) =
            shared.take(|fault| matches!(fault, Fault::Read { after_bytes, .. } if *after_bytes <= carried))
        {
            return Err(DeviceError::errno(Call::Read, errno));
        }
        if let Some(Fault::NothingNow { times, .. }) = shared
            .take(|fault| matches!(fault, Fault::NothingNow { after_bytes, .. } if *after_bytes <= carried))
        {
            shared.nothing_now = times;
        }
        let length = shared.room(carried, buffer.len().min(shared.max_read_bytes), Fault::read_offset);
        if shared.nothing_now > 0 {
            shared.nothing_now -= 1;
            return Ok(Read::NothingNow);
        }
        drop(shared);
        let read = self.inner.read(&mut buffer[..length])?;
        if let Read::Bytes(bytes) = read {
            self.read_bytes = self.read_bytes.saturating_add(bytes as u64);
        }
        Ok(read)
    }

    fn precopy_info(&mut self) -> Result<PrecopyInfo, DeviceError> {
        let info = self.inner.precopy_info()?;
        let struck = lock(&self.shared).take(|fault| matches!(fault, Fault::Reinit { .. }));
        Ok(match struck {
            Some(Fault::Reinit { initial_bytes }) => PrecopyInfo { initial_bytes, reinit: true, ..info },
            Some(_) | None => info,
        })
    }
}

#[derive(Debug)]
struct FaultyRestore {
    inner: Box<dyn RestoreStream>,
    shared: Arc<Mutex<Shared>>,
    time: Arc<VirtualTime>,
    written_bytes: u64,
}

impl RestoreStream for FaultyRestore {
    fn write(&mut self, bytes: &[u8]) -> Result<usize, DeviceError> {
        let mut shared = lock(&self.shared);
        if let Some(takes) = shared.delay(Call::Write) {
            self.time.advance(takes);
        }
        if let Some(Fault::ShortWrites { max_bytes }) =
            shared.take(|fault| matches!(fault, Fault::ShortWrites { .. }))
        {
            shared.max_write_bytes = max_bytes.max(1);
        }
        let carried = self.written_bytes;
        if shared.falls(carried) || shared.in_error {
            return Err(DeviceError::errno(Call::Write, libc::EIO));
        }
        if let Some(Fault::Write { errno, .. }) =
            shared.take(|fault| matches!(fault, Fault::Write { after_bytes, .. } if *after_bytes <= carried))
        {
            return Err(DeviceError::errno(Call::Write, errno));
        }
        let length = shared.room(carried, bytes.len().min(shared.max_write_bytes), Fault::write_offset);
        drop(shared);
        let taken = self.inner.write(&bytes[..length])?;
        self.written_bytes = self.written_bytes.saturating_add(taken as u64);
        Ok(taken)
    }
}
