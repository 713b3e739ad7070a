//! Taking up devices that an earlier life of the process was at.
//!
//! ```text
//!   a device whose fds were kept open          what the journal says       what must be found
//!     adopt_source ------------------> (abort)   a save, not sealed          anything: abort says what it is worth
//!     adopt_stopped -----------------> Stopped   a save, held                STOP
//!     adopt_resuming ----------------> Waking    a save, past its end        STOP, RUNNING_P2P or RUNNING
//!     adopt_destination -------------> (abort)   a restore, not loaded       anything: abort resets it
//!     adopt_loaded ------------------> FixedUp   a restore, held             RESUMING, with a journaled seal
//!     adopt_starting ----------------> Starting  a restore, on its way       RESUMING, RUNNING_P2P or RUNNING
//! ```
//! The state that is read back is held against what the journal says. The kernel keeps what was loaded for as long as
//! the device itself is held open: the data fd of the earlier process is not needed for it.
//!
//! # Invariants
//! - After an adoption, failed or not, the device is engaged: [`Driver::abort`] brings it back as a source, or resets it
//!   as a destination.
//! - Nothing is called but a read-back.
//!
//! # Failure paths
//! A device found elsewhere is [`Displaced`](DeviceError::Displaced). Where the journal says exactly where a source was
//! left, [`Driver::abort`] then quarantines it, as it does with any that somebody else has moved.

use vfio_checkpoint_fsm::State;

use super::restore::{Armed, FixedUp, Loaded};
use super::{Driver, Engagement, Peers, SessionId, Stake, Stopped};
use crate::{Call, DeviceError, Rearm, VerifiedSeal};

/// How far a device of a save got on its way back to RUNNING.
#[derive(Debug)]
pub enum Waking {
    /// Not yet: it is in STOP.
    Stopped(Stopped),
    /// It is in RUNNING_P2P.
    Quiesced(Stopped),
    /// It runs. Its save is over.
    Running,
}

/// How far a restored device got on its way to RUNNING.
#[derive(Debug)]
pub enum Starting {
    /// Not yet: it is in RESUMING.
    Loaded(Armed),
    /// It is in RUNNING_P2P.
    Quiesced(Armed),
    /// It runs. Its restore is over.
    Running,
}

impl Driver {
    /// Takes up a device in the middle of a save, wherever it is. What is left to do with it is
    /// [`abort`](Self::abort).
    pub fn adopt_source(&mut self, peers: Peers) -> Result<(), DeviceError> {
        self.adopt(Stake::Source, peers, None).map(|_| ())
    }

    /// Takes up a device that was left in STOP with its state saved.
    pub fn adopt_stopped(&mut self, peers: Peers) -> Result<Stopped, DeviceError> {
        let (id, found) = self.adopt(Stake::Source, peers, Some(State::Stop))?;
        if found == State::Stop { Ok(Stopped::adopted(id)) } else { Err(DeviceError::Displaced { found }) }
    }

    /// Takes up a device whose state is saved and that was on its way back to RUNNING.
    pub fn adopt_resuming(&mut self, peers: Peers) -> Result<Waking, DeviceError> {
        let (id, found) = self.adopt(Stake::Source, peers, None)?;
        match found {
            State::Stop => Ok(Waking::Stopped(Stopped::adopted(id))),
            State::RunningP2p => Ok(Waking::Quiesced(Stopped::adopted(id))),
            State::Running => {
                self.engaged = None;
                Ok(Waking::Running)
            }
            State::Error | State::StopCopy | State::Resuming | State::PreCopy | State::PreCopyP2p => {
                Err(DeviceError::Displaced { found })
            }
        }
    }

    /// Takes up a device in the middle of a restore, wherever it is. What is left to do with it is
    /// [`abort`](Self::abort), which resets it.
    pub fn adopt_destination(&mut self) -> Result<(), DeviceError> {
        self.adopt(Stake::Destination, Peers::None, None).map(|_| ())
    }

    /// Takes up a device that was left in RESUMING with its whole state written, verified and fixed up. `rearm` is what
    /// [`FixedUp::rearm`] said before.
    pub fn adopt_loaded(
        &mut self,
        seal: &VerifiedSeal,
        rearm: Option<Rearm>,
    ) -> Result<FixedUp, DeviceError> {
        let (id, found) = self.adopt(Stake::Destination, Peers::None, Some(State::Resuming))?;
        if found == State::Resuming {
            Ok(FixedUp::adopted(Loaded::adopted(id, seal.seal()), rearm))
        } else {
            Err(DeviceError::Displaced { found })
        }
    }

    /// Takes up a device that was loaded, whose owner was ready, and that was on its way to RUNNING.
    ///
    /// Whoever journals must do so before a device that failed to start is reset: a reset leads to RUNNING too, and
    /// nothing but the journal tells the two apart. [`try_running`](Self::try_running) leaves the time for it.
    pub fn adopt_starting(&mut self, seal: &VerifiedSeal) -> Result<Starting, DeviceError> {
        let (id, found) = self.adopt(Stake::Destination, Peers::None, None)?;
        let armed = || FixedUp::adopted(Loaded::adopted(id, seal.seal()), None).ready();
        match found {
            State::Resuming => Ok(Starting::Loaded(armed())),
            State::RunningP2p => Ok(Starting::Quiesced(armed())),
            State::Running => {
                self.engaged = None;
                Ok(Starting::Running)
            }
            State::Error | State::Stop | State::StopCopy | State::PreCopy | State::PreCopyP2p => {
                Err(DeviceError::Displaced { found })
            }
        }
    }

    /// Engages the device in a session of its own and reads back where it is.
    fn adopt(
        &mut self,
        stake: Stake,
        peers: Peers,
        left_in: Option<State>,
    ) -> Result<(SessionId, State), DeviceError> {
        self.check_free(Call::GetState)?;
        self.steps.clear();
        self.cut_short = None;
        let session = SessionId::next();
        self.engaged = Some(Engagement { session, stake, peers, left_in });
        Ok((session, self.read_back()?))
    }
}
