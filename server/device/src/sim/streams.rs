//! What a data fd answers: reads, writes, and how much there is.
//!
//! ```text
//!   is the session still the one that the fd is of?   no: ENODEV
//!   pre-copy info only: is the device pre-copying?    no: EINVAL, and this comes first
//!   then the session itself
//! ```

use vfio_checkpoint_fsm::State;

use super::hardware::{Hardware, Session};
use super::save::full_bytes;
use super::{PrecopyIdle, Refill, SizeReport};
use crate::{DataSize, PrecopyInfo, Read};

/// What the bound of a running pre-copy allows for records that are cut otherwise than in a full stop-copy.
const RECORD_SLACK_BYTES: u64 = 512;

impl Hardware {
    /// `MIG_DATA_SIZE`, where the device has it.
    pub(super) fn data_size(&self) -> Option<DataSize> {
        let full = full_bytes(&self.memory, self.config.page_bytes);
        let in_hand = match &self.session {
            Session::Save(save) => save.in_hand_bytes(&self.memory),
            Session::None | Session::Load(_) => 0,
        };
        match (self.config.data_size, self.state, &self.session) {
            (SizeReport::Unknown, ..) => None,
            (SizeReport::UpperBound { slack_bytes }, ..) => {
                Some(DataSize::UpperBound(full.saturating_add(in_hand).saturating_add(slack_bytes)))
            }
            (SizeReport::Exact, State::PreCopy | State::PreCopyP2p, _) => {
                Some(DataSize::UpperBound(full + in_hand + RECORD_SLACK_BYTES))
            }
            (SizeReport::Exact, State::StopCopy, Session::Save(save)) => {
                Some(DataSize::Known(save.left_bytes(&self.memory)))
            }
            (
                SizeReport::Exact,
                State::Running
                | State::RunningP2p
                | State::Stop
                | State::StopCopy
                | State::Resuming
                | State::Error,
                _,
            ) => Some(DataSize::Known(full)),
        }
    }

    /// A read on the data stream of a session.
    pub(super) fn read(&mut self, session: u64, out: &mut [u8]) -> Result<Read, i32> {
        self.current(session)?;
        if self.config.precopy.refill == Refill::OnRead && self.state == State::PreCopy {
            self.reconfigure();
            if let Session::Save(save) = &mut self.session {
                save.capture(self.now, &self.config.precopy);
            }
        }
        let Session::Save(save) = &mut self.session else { return Err(libc::ENODEV) };
        match save.read(&self.memory, &self.registers, out) {
            0 => Ok(match (self.state, self.config.precopy.idle) {
                (State::PreCopy | State::PreCopyP2p, PrecopyIdle::NoMessage) => Read::NothingNow,
                (State::PreCopy | State::PreCopyP2p, PrecopyIdle::Zero)
                | (
                    State::StopCopy
                    | State::Running
                    | State::RunningP2p
                    | State::Stop
                    | State::Resuming
                    | State::Error,
                    _,
                ) => Read::Zero,
            }),
            filled => Ok(Read::Bytes(filled)),
        }
    }

    /// `VFIO_MIG_GET_PRECOPY_INFO` on the data stream of a session.
    pub(super) fn precopy_info(&mut self, session: u64) -> Result<PrecopyInfo, i32> {
        let captures = match self.state {
            State::PreCopy => true,
            State::PreCopyP2p => false,
            State::Running
            | State::RunningP2p
            | State::Stop
            | State::StopCopy
            | State::Resuming
            | State::Error => return Err(libc::EINVAL),
        };
        self.current(session)?;
        let reinit = captures && self.reconfigure();
        let Session::Save(save) = &mut self.session else { return Err(libc::ENODEV) };
        let info = save.info(&self.memory, &self.config.precopy, self.now, captures);
        Ok(PrecopyInfo { reinit, ..info })
    }

    /// Reconfigures the device where that is due. Says whether there is new initial data.
    fn reconfigure(&mut self) -> bool {
        let Session::Save(save) = &mut self.session else { return false };
        let rules = &self.config.precopy;
        let Some(pages) = save.reinit_due(rules, self.config.page_bytes, self.memory.pages()) else {
            return false;
        };
        (0..pages).for_each(|page| self.memory.touch(page, 1));
        save.reinit(pages, rules.reinit_feature);
        rules.reinit_feature
    }

    /// A write on the data stream of a session.
    pub(super) fn write(&mut self, session: u64, bytes: &[u8]) -> Result<usize, i32> {
        self.current(session)?;
        match &mut self.session {
            Session::Load(load) => load.write(bytes).map_err(|error| {
                tracing::debug!(device = self.config.name, %error, "refused a write of device state");
                error.errno()
            }),
            Session::None | Session::Save(_) => Err(libc::ENODEV),
        }
    }

    fn current(&self, session: u64) -> Result<(), i32> {
        match &self.session {
            Session::Save(_) | Session::Load(_) if session == self.session_number => Ok(()),
            Session::Save(_) | Session::Load(_) | Session::None => Err(libc::ENODEV),
        }
    }
}
