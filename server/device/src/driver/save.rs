//! The save side of the driver.

use bytes::Bytes;
use vfio_checkpoint_fsm::State;

use super::{Driver, Failure, Peers, SessionId, Stake};
use crate::{
    Call, ChunkPool, ConfigCapture, ConfigSpace, DataStream, DeviceError, PrecopyInfo, Read, SaveStream,
};

/// How a save starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SaveMode {
    /// The device keeps running while the first state is copied.
    PreCopy,
    /// The device stops at once.
    StopCopy,
}

/// A save under way. Owns the data fd; reading needs no other hold on the device.
///
/// One stream from the first pre-copied byte to the last: the phases share it.
#[derive(Debug)]
pub struct SaveSession {
    id: SessionId,
    stream: Box<dyn SaveStream>,
    phase: Phase,
    read_bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// PRE_COPY or PRE_COPY_P2P: no bytes means none for now.
    PreCopy,
    /// STOP_COPY: no bytes means the end.
    StopCopy,
    /// The end was read.
    Drained,
}

/// What a read of a session brought.
#[derive(Debug, PartialEq, Eq)]
pub enum SaveRead {
    /// The next bytes of the stream, at least one.
    Chunk(Bytes),
    /// Nothing for now, only while pre-copying. Pause before asking again, longer each time: a device may limit how
    /// often it looks for changes.
    NothingNow,
    /// The end of the stream. Every later read says so too.
    End,
}

impl SaveSession {
    /// Reads the next chunk: until a buffer of the pool is full, or the device has no more for now.
    ///
    /// An error ends the session: [`Driver::abort`] brings the device back.
    pub fn read(&mut self, pool: &ChunkPool) -> Result<SaveRead, DeviceError> {
        if self.phase == Phase::Drained {
            return Ok(SaveRead::End);
        }
        let mut chunk = pool.take();
        let mut ended = false;
        while !chunk.is_full() {
            let read = match self.stream.read(chunk.unfilled_mut()) {
                // Interrupted before a byte was read: nothing happened.
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => continue,
                read => read?,
            };
            match (read, self.phase) {
                (Read::Bytes(bytes), _) if bytes > 0 => {
                    chunk.advance(bytes);
                    self.read_bytes = self.read_bytes.saturating_add(bytes as u64);
                }
                (Read::Bytes(_) | Read::Zero | Read::NothingNow, Phase::PreCopy) => break,
                (Read::Bytes(_) | Read::Zero, Phase::StopCopy | Phase::Drained) => {
                    ended = true;
                    break;
                }
                // Only pre-copy has "nothing for now"; taken for the end it would cut the state short.
                (Read::NothingNow, Phase::StopCopy | Phase::Drained) => {
                    return Err(DeviceError::errno(Call::Read, libc::ENOMSG));
                }
            }
        }
        if ended {
            self.phase = Phase::Drained;
        }
        Ok(match (chunk.is_empty(), ended) {
            (false, _) => SaveRead::Chunk(chunk.freeze()),
            (true, true) => SaveRead::End,
            (true, false) => SaveRead::NothingNow,
        })
    }

    /// How much is left to pre-copy, or `None` from a device that does not say (a kernel before 6.2, a vfio-user
    /// server): ENOTTY, by which a file says that it has no such call.
    pub fn precopy_info(&mut self) -> Result<Option<PrecopyInfo>, DeviceError> {
        match self.stream.precopy_info() {
            Ok(info) => Ok(Some(info)),
            Err(DeviceError::Absent { .. }) => Ok(None),
            Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether the device is still running while it is copied.
    pub fn is_precopying(&self) -> bool {
        self.phase == Phase::PreCopy
    }

    /// Bytes read so far.
    pub fn read_bytes(&self) -> u64 {
        self.read_bytes
    }

    /// Whether the end was read.
    pub fn is_drained(&self) -> bool {
        self.phase == Phase::Drained
    }
}

impl Driver {
    /// RUNNING to PRE_COPY or to STOP_COPY.
    pub fn begin_save(&mut self, mode: SaveMode, peers: Peers) -> Result<SaveSession, Failure> {
        let (target, phase) = match mode {
            SaveMode::PreCopy => (State::PreCopy, Phase::PreCopy),
            SaveMode::StopCopy => (State::StopCopy, Phase::StopCopy),
        };
        let call = Call::SetState(target);
        let id = self.begin(call, Stake::Source, peers)?;
        let opened = self.walk_from(State::Running, target).and_then(|stream| save_stream(stream, call));
        match opened {
            Ok(stream) => Ok(SaveSession { id, stream, phase, read_bytes: 0 }),
            Err(first) => Err(self.session_failed(id, first)),
        }
    }

    /// The P2P barrier before a stop-copy without pre-copy: RUNNING to RUNNING_P2P, the device starts no more DMA to
    /// its peers. Followed by [`stop_copy_quiesced`](Self::stop_copy_quiesced).
    pub fn quiesce_running(&mut self, peers: Peers) -> Result<Quiesced, Failure> {
        let id = self.begin(Call::SetState(State::RunningP2p), Stake::Source, peers)?;
        match self.walk_from(State::Running, State::RunningP2p) {
            Ok(_) => Ok(Quiesced { id }),
            Err(first) => Err(self.session_failed(id, first)),
        }
    }

    /// RUNNING_P2P to STOP_COPY, once every device of the set is quiesced.
    pub fn stop_copy_quiesced(&mut self, quiesced: Quiesced) -> Result<SaveSession, Failure> {
        let call = Call::SetState(State::StopCopy);
        let id = quiesced.id;
        let opened = self
            .check_session(id, call)
            .and_then(|()| self.walk(&[State::RunningP2p], State::StopCopy))
            .and_then(|stream| save_stream(stream, call));
        match opened {
            Ok(stream) => Ok(SaveSession { id, stream, phase: Phase::StopCopy, read_bytes: 0 }),
            Err(first) => Err(self.session_failed(id, first)),
        }
    }

    /// PRE_COPY to PRE_COPY_P2P: the barrier of a set that pre-copies. The stream goes on.
    pub fn quiesce(&mut self, session: &SaveSession) -> Result<(), Failure> {
        self.advance(session, &[State::PreCopy], State::PreCopyP2p)
    }

    /// To STOP_COPY: the device stops, and what is left of its state comes out of the same stream.
    pub fn stop_copy(&mut self, session: &mut SaveSession) -> Result<(), Failure> {
        self.advance(session, &[State::PreCopy, State::PreCopyP2p], State::StopCopy)?;
        session.phase = Phase::StopCopy;
        Ok(())
    }

    /// STOP_COPY to STOP, once the stream was read to its end, and the capture of configuration space where the
    /// device has one. The device stays stopped until [`resume_p2p`](Self::resume_p2p) or [`resume`](Self::resume).
    pub fn finish_save(&mut self, session: SaveSession) -> Result<Stopped, Failure> {
        let done = self
            .check_session(session.id, Call::SetState(State::Stop))
            .and_then(|()| if session.is_drained() { Ok(()) } else { Err(DeviceError::Undrained) })
            .and_then(|()| self.walk(&[State::StopCopy], State::Stop))
            .and_then(|_| self.device.config_space().map(ConfigSpace::capture).transpose());
        match done {
            Ok(config) => Ok(Stopped { id: session.id, config }),
            Err(first) => Err(self.session_failed(session.id, first)),
        }
    }

    /// STOP to RUNNING_P2P: the first half of a resume, for every device of a set before the second for any.
    pub fn resume_p2p(&mut self, stopped: &Stopped) -> Result<(), Failure> {
        let done = self
            .check_session(stopped.id, Call::SetState(State::RunningP2p))
            .and_then(|()| self.walk(&[State::Stop], State::RunningP2p));
        match done {
            Ok(_) => Ok(()),
            Err(first) => Err(self.session_failed(stopped.id, first)),
        }
    }

    /// To RUNNING: the save is over and the device runs on.
    pub fn resume(&mut self, stopped: Stopped) -> Result<(), Failure> {
        let done = self
            .check_session(stopped.id, Call::SetState(State::Running))
            .and_then(|()| self.walk(&[State::Stop, State::RunningP2p], State::Running));
        match done {
            Ok(_) => {
                self.engaged = None;
                Ok(())
            }
            Err(first) => Err(self.session_failed(stopped.id, first)),
        }
    }

    /// Ends the save and leaves the device stopped, as somebody asked.
    pub fn leave_stopped(&mut self, stopped: Stopped) -> Result<(), DeviceError> {
        self.check_session(stopped.id, Call::SetState(State::Stop))?;
        self.engaged = None;
        Ok(())
    }

    fn advance(&mut self, session: &SaveSession, from: &[State], target: State) -> Result<(), Failure> {
        let done =
            self.check_session(session.id, Call::SetState(target)).and_then(|()| self.walk(from, target));
        match done {
            Ok(_) => Ok(()),
            Err(first) => Err(self.session_failed(session.id, first)),
        }
    }
}

fn save_stream(stream: Option<DataStream>, call: Call) -> Result<Box<dyn SaveStream>, DeviceError> {
    stream.map_or(Err(DeviceError::Stream { call, expected: true }), |stream| stream.into_save(call))
}

/// A device in RUNNING_P2P, waiting for the rest of its set. See [`Driver::quiesce_running`].
#[derive(Debug)]
pub struct Quiesced {
    id: SessionId,
}

/// A device in STOP whose state has been read to the end.
#[derive(Debug)]
pub struct Stopped {
    id: SessionId,
    config: Option<ConfigCapture>,
}

impl Stopped {
    /// What was captured of configuration space went into the seal, with the process that took it.
    pub(super) fn adopted(id: SessionId) -> Self {
        Self { id, config: None }
    }

    /// What was captured of configuration space, where the device has one.
    pub fn config(&self) -> Option<&ConfigCapture> {
        self.config.as_ref()
    }
}
