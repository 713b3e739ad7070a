//! The restore side of the driver.
//!
//! ```text
//!   RestoreSession --verified--> Loaded --fix_up--> FixedUp --ready--> Armed --enter_running--> (runs)
//!      write(VerifiedChunk)      VerifiedSeal       PCI_COMMAND        interrupts, mappings
//! ```
//! Each arrow consumes what stands before it, so no order of calls leaves RESUMING early. A session that is dropped
//! on the way leaves the device in RESUMING, to be held or given up with [`Driver::abort`].

use std::os::fd::BorrowedFd;

use vfio_checkpoint_fsm::State;

use super::{Driver, Engagement, Failure, Peers, SessionId, Stake};
use crate::seal::StreamMark;
use crate::{Call, ConfigCapture, DeviceError, Rearm, RestoreStream, Seal, VerifiedChunk, VerifiedSeal};

/// A restore under way. Owns the data fd; writing needs no other hold on the device.
#[derive(Debug)]
pub struct RestoreSession {
    id: SessionId,
    stream: Box<dyn RestoreStream>,
    source: Option<StreamMark>,
    written: u64,
    poisoned: bool,
}

impl RestoreSession {
    /// Writes the next chunk, all of it.
    ///
    /// Any error is final: the device may have counted the bytes all the same, so the session refuses everything
    /// after it and [`Driver::abort`] resets the device.
    pub fn write(&mut self, chunk: &VerifiedChunk) -> Result<(), DeviceError> {
        if self.poisoned {
            return Err(DeviceError::Poisoned);
        }
        if !chunk.belongs_at(self.written, &mut self.source) {
            self.poisoned = true;
            return Err(DeviceError::Misplaced { offset: chunk.offset(), expected: self.written });
        }
        let mut rest = &chunk.bytes()[..];
        while !rest.is_empty() {
            let taken = match self.stream.write(rest) {
                // Interrupted before a byte was taken: nothing happened.
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => continue,
                taken => taken.inspect_err(|_| self.poisoned = true)?,
            };
            if taken == 0 || taken > rest.len() {
                self.poisoned = true;
                return Err(DeviceError::errno(Call::Write, libc::EIO));
            }
            self.written = self.written.saturating_add(taken as u64);
            rest = &rest[taken..];
        }
        Ok(())
    }

    /// Bytes written so far.
    pub fn written_bytes(&self) -> u64 {
        self.written
    }
}

/// A device in RESUMING with its whole state written and verified. May be held as long as somebody wants.
#[derive(Debug)]
pub struct Loaded {
    id: SessionId,
    /// Kept open: closing it is not what ends the load, and one driver's quirk could make it so. None where an earlier
    /// life of the process loaded the device.
    _stream: Option<Box<dyn RestoreStream>>,
    seal: Seal,
}

impl Loaded {
    pub(super) fn adopted(id: SessionId, seal: Seal) -> Self {
        Self { id, _stream: None, seal }
    }

    /// The seal on what was loaded.
    pub fn seal(&self) -> Seal {
        self.seal
    }
}

/// A loaded device whose configuration space was fixed up, with what is left to arm.
#[derive(Debug)]
pub struct FixedUp {
    loaded: Loaded,
    rearm: Option<Rearm>,
}

impl FixedUp {
    pub(super) fn adopted(loaded: Loaded, rearm: Option<Rearm>) -> Self {
        Self { loaded, rearm }
    }

    /// The seal on what was loaded.
    pub fn seal(&self) -> Seal {
        self.loaded.seal
    }

    /// The interrupts that were armed when the state was captured, which whoever owns the eventfds must arm again.
    pub fn rearm(&self) -> Option<Rearm> {
        self.rearm
    }

    /// Whoever owns the eventfds and the DMA mappings (the workload of a lent device, or an agent whose device has
    /// neither) says that all is in place.
    pub fn ready(self) -> Armed {
        Armed { loaded: self.loaded }
    }
}

/// A loaded device whose owner is ready for it to run.
#[derive(Debug)]
pub struct Armed {
    loaded: Loaded,
}

impl Driver {
    /// RUNNING to RESUMING in one SET; the device's present state is given up.
    pub fn begin_restore(&mut self) -> Result<RestoreSession, Failure> {
        let call = Call::SetState(State::Resuming);
        let id = self.begin(call, Stake::Entry, Peers::None)?;
        let opened = self.walk_from(State::Running, State::Resuming).and_then(|stream| {
            stream
                .map_or(Err(DeviceError::Stream { call, expected: true }), |stream| stream.into_restore(call))
        });
        match opened {
            Ok(stream) => {
                self.engaged = Some(Engagement {
                    session: id,
                    stake: Stake::Destination,
                    peers: Peers::None,
                    left_in: None,
                });
                Ok(RestoreSession { id, stream, source: None, written: 0, poisoned: false })
            }
            Err(first) => Err(self.session_failed(id, first)),
        }
    }

    /// Takes the proof that what was written is whole. A session it does not cover ends in a reset.
    pub fn verified(&mut self, session: RestoreSession, seal: &VerifiedSeal) -> Result<Loaded, Failure> {
        let whole = self.check_session(session.id, Call::Write).and_then(|()| {
            if session.poisoned {
                Err(DeviceError::Poisoned)
            } else if seal.covers(session.written, session.source) {
                Ok(())
            } else {
                Err(DeviceError::Uncovered { sealed: seal.seal().bytes, written: session.written })
            }
        });
        match whole {
            Ok(()) => Ok(Loaded { id: session.id, _stream: Some(session.stream), seal: seal.seal() }),
            Err(first) => Err(self.session_failed(session.id, first)),
        }
    }

    /// Writes back the whitelisted PCI_COMMAND bits, while the device is in RESUMING.
    ///
    /// `capture` is what the save took from configuration space; `None` where the source had none. A capture for a
    /// device without configuration space is an error: the state came from another kind of device.
    pub fn fix_up(&mut self, loaded: Loaded, capture: Option<&ConfigCapture>) -> Result<FixedUp, Failure> {
        let call = Call::ConfigWrite;
        let done =
            self.check_session(loaded.id, call).and_then(|()| match (capture, self.device.config_space()) {
                (None, _) => Ok(None),
                (Some(_), None) => Err(DeviceError::Absent { call }),
                (Some(capture), Some(space)) => {
                    let command = space.command()?.with_restored_bits_of(capture.command);
                    space.set_command(command)?;
                    Ok(capture.interrupts)
                }
            });
        match done {
            Ok(rearm) => Ok(FixedUp { loaded, rearm }),
            Err(first) => Err(self.session_failed(loaded.id, first)),
        }
    }

    /// Arms the interrupts with this process's own eventfds, one a vector of [`FixedUp::rearm`].
    pub fn arm(&mut self, fixed: FixedUp, eventfds: &[BorrowedFd<'_>]) -> Result<Armed, Failure> {
        let call = Call::SetIrqs;
        let done = self.check_session(fixed.loaded.id, call).and_then(|()| {
            match (fixed.rearm, self.device.config_space()) {
                (None, _) => Ok(()),
                (Some(_), None) => Err(DeviceError::Absent { call }),
                (Some(rearm), Some(space)) => rearm.apply(space, eventfds),
            }
        });
        match done {
            Ok(()) => Ok(fixed.ready()),
            Err(first) => Err(self.session_failed(fixed.loaded.id, first)),
        }
    }

    /// RESUMING to RUNNING_P2P: the first half of the start, for every device of a set before the second for any.
    ///
    /// What a device cannot accept may show only here: it is then reset.
    pub fn enter_running_p2p(&mut self, armed: &Armed) -> Result<(), Failure> {
        self.start(armed, &[State::Resuming], State::RunningP2p)
    }

    /// To RUNNING: the restore is done and the device carries the restored state.
    pub fn enter_running(&mut self, armed: &Armed) -> Result<(), Failure> {
        self.start(armed, &[State::Resuming, State::RunningP2p], State::Running)?;
        self.engaged = None;
        Ok(())
    }

    /// As [`enter_running_p2p`](Self::enter_running_p2p), but a failure leaves the device where it is, until
    /// [`abort`](Self::abort): time to write down what is going to be done about it.
    pub fn try_running_p2p(&mut self, armed: &Armed) -> Result<(), DeviceError> {
        self.try_start(armed, &[State::Resuming], State::RunningP2p)
    }

    /// As [`enter_running`](Self::enter_running), but a failure leaves the device where it is, until
    /// [`abort`](Self::abort). A device that is found in RUNNING after the SET runs, whatever the SET answered.
    pub fn try_running(&mut self, armed: &Armed) -> Result<(), DeviceError> {
        self.check_session(armed.loaded.id, Call::SetState(State::Running))?;
        let found = self.read_back()?;
        if !matches!(found, State::Resuming | State::RunningP2p) {
            return Err(DeviceError::Displaced { found });
        }
        if let Err(first) = self.walk_from(found, State::Running) {
            // What a SET answers is one thing and what it did another: one that was interrupted may have been done.
            match self.read_back() {
                Ok(State::Running) => {
                    let device = &self.device.identity().name;
                    tracing::warn!(%device, error = %crate::chain(&first), "the SET failed, and the device runs");
                }
                Ok(_) | Err(_) => return Err(first),
            }
        }
        self.engaged = None;
        Ok(())
    }

    fn start(&mut self, armed: &Armed, from: &[State], target: State) -> Result<(), Failure> {
        self.try_start(armed, from, target).map_err(|first| self.session_failed(armed.loaded.id, first))
    }

    fn try_start(&mut self, armed: &Armed, from: &[State], target: State) -> Result<(), DeviceError> {
        self.check_session(armed.loaded.id, Call::SetState(target))?;
        self.walk(from, target).map(|_| ())
    }
}
