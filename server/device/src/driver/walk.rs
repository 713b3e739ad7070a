//! One step of a session: what must hold before, the SET, and what must hold after.

use vfio_checkpoint_fsm::{Outcome, State, Walk, path};

use super::failure::{Answer, Failure, Standing, Step};
use super::unwind::{Engagement, Peers, Stake};
use super::{Driver, SessionId};
use crate::{Call, DataStream, DeviceError};

impl Driver {
    pub(super) fn check_standing(&self, call: Call) -> Result<(), DeviceError> {
        match self.standing {
            Standing::InService => Ok(()),
            Standing::Quarantined => Err(DeviceError::Quarantined { call }),
        }
    }

    /// Whether an operation could start: the device is in service, free, and in RUNNING. Any other state belongs to
    /// somebody or is left over from somebody. Nothing is changed.
    pub fn check_ready(&mut self) -> Result<(), DeviceError> {
        self.check_free(Call::GetState)?;
        unless_running(self.device.state()?).map_err(|found| DeviceError::LeftOver { found })
    }

    /// Starts an operation, with a fresh trajectory, where [`check_ready`](Self::check_ready) allows it.
    pub(super) fn begin(&mut self, call: Call, stake: Stake, peers: Peers) -> Result<SessionId, Failure> {
        self.check_free(call).map_err(|first| self.refuse(first))?;
        self.steps.clear();
        self.cut_short = None;
        let running = self
            .read_back()
            .and_then(|found| unless_running(found).map_err(|found| DeviceError::LeftOver { found }));
        running.map_err(|first| self.refuse(first))?;
        let session = SessionId::next();
        self.engaged = Some(Engagement { session, stake, peers, left_in: None });
        Ok(session)
    }

    pub(super) fn check_free(&self, call: Call) -> Result<(), DeviceError> {
        self.check_standing(call)?;
        match self.engaged {
            None => Ok(()),
            Some(_) => Err(DeviceError::Engaged { call }),
        }
    }

    /// Refuses a session that is not the one under way here.
    pub(super) fn check_session(&self, session: SessionId, call: Call) -> Result<(), DeviceError> {
        self.check_standing(call)?;
        match self.engaged {
            Some(engagement) if engagement.session == session => Ok(()),
            Some(_) | None => Err(DeviceError::ForeignSession { call }),
        }
    }

    /// Ends the session under way by somebody's word.
    pub(super) fn cut_short(&mut self) {
        if let Some(engagement) = self.engaged.take() {
            self.cut_short = Some(engagement.session);
        }
    }

    /// A refusal that changes nothing here: there is nothing to recover. Where the session had been cut short, what
    /// became of its state is not known.
    pub(super) fn refuse(&self, first: DeviceError) -> Failure {
        let outcome = if self.cut_short.is_some() { Outcome::StateLost } else { Outcome::Preserved };
        Failure {
            first,
            state: self.last_seen(),
            outcome,
            standing: self.standing,
            steps: self.steps.clone(),
        }
    }

    /// A step of a session failed. A session that is not the one under way here changes nothing here.
    pub(super) fn session_failed(&mut self, session: SessionId, first: DeviceError) -> Failure {
        match self.engaged {
            Some(engagement) if engagement.session == session => {
                self.unwind(engagement.stake, engagement.peers.back(), first)
            }
            Some(_) | None => self.refuse(first),
        }
    }

    /// One step of a session, out of one of the states that the step before may have left the device in.
    ///
    /// The state is read first. A device that fell into ERROR must not be SET, which the kernel does not only refuse
    /// but warn of. One that stands anywhere else was moved or reset by somebody: a walk from there might succeed, and
    /// success would be a lie.
    pub(super) fn walk(&mut self, from: &[State], target: State) -> Result<Option<DataStream>, DeviceError> {
        let found = self.read_back()?;
        if from.contains(&found) {
            self.walk_from(found, target)
        } else {
            Err(DeviceError::Displaced { found })
        }
    }

    /// One SET from the state that was just read back: the legality before, the state and the stream after.
    ///
    /// On an error nothing is recovered here; the caller knows what the device's state is worth.
    pub(super) fn walk_from(
        &mut self,
        from: State,
        target: State,
    ) -> Result<Option<DataStream>, DeviceError> {
        let opens = match path(self.device.capabilities().migration, from, target) {
            Walk::NoOp => return Ok(None),
            Walk::Forbidden(source) => return Err(DeviceError::Forbidden { target, source }),
            Walk::Path(path) => path.opens_stream(),
        };
        let arc = tracing::info_span!("arc", device = %self.device.identity().name, %from, to = %target);
        let _entered = arc.enter();
        let set = self.device.set_state(target);
        self.steps.push(Step::Set(target, Answer::of(&set)));
        let stream = set?;
        // Also after success: a driver was seen to answer success out of ERROR and stay there.
        let found = self.read_back()?;
        if found != target {
            return Err(DeviceError::Elsewhere { asked: target, found });
        }
        if stream.is_some() == opens {
            Ok(stream)
        } else {
            Err(DeviceError::Stream { call: Call::SetState(target), expected: opens })
        }
    }

    pub(super) fn read_back(&mut self) -> Result<State, DeviceError> {
        let read = self.device.state();
        self.steps.push(Step::ReadBack(match &read {
            Ok(state) => Ok(*state),
            Err(error) => Err(Answer::of_error(error)),
        }));
        if let (Ok(state), Some(seen)) = (&read, &self.watcher.0) {
            seen(*state);
        }
        read
    }

    pub(super) fn reset_and_read_back(&mut self) -> Result<(), DeviceError> {
        let reset = self.device.reset();
        self.steps.push(Step::Reset(Answer::of(&reset)));
        let found = self.read_back();
        reset?;
        unless_running(found?).map_err(|found| DeviceError::Elsewhere { asked: State::Running, found })
    }

    /// The state that the last read-back found, where it found one.
    pub(super) fn last_seen(&self) -> Option<State> {
        self.steps.iter().rev().find_map(|step| match step {
            Step::ReadBack(state) => Some(state.ok()),
            Step::Set(..) | Step::Reset(_) => None,
        })?
    }
}

/// The state, as an error, where it is any other than RUNNING.
pub(super) fn unless_running(found: State) -> Result<(), State> {
    if found == State::Running { Ok(()) } else { Err(found) }
}
