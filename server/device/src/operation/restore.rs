//! A restore of a set, start to end.

use std::time::Duration;

use bytes::Bytes;
use vfio_checkpoint_fsm::{
    AfterLoad, Outcome, RestoreCommand, RestoreEvent, RestorePlan, RestoreState, State, Step,
};

use super::{BoxError, Cause, OperationError, Unwound, capabilities};
use crate::driver::{Armed, Driver, Failure, FixedUp, Loaded, RestoreSession, Standing};
use crate::lane::Hung;
use crate::{Call, ConfigCapture, DeviceError, DeviceLane, Rearm, Seal, VerifiedChunk, Verifier};

/// Gives the state of a set of devices, counted from 0 in the order of the set.
pub trait StateSource {
    /// The next bytes of a device, or `None` at the end. Never empty.
    fn chunk(&mut self, device: usize) -> Result<Option<Bytes>, BoxError>;

    /// The seal on a device's state. Asked for once its chunks are at their end.
    fn seal(&mut self, device: usize) -> Result<Seal, BoxError>;

    /// What was captured of the device's configuration space when it was saved.
    fn config(&mut self, device: usize) -> Option<ConfigCapture>;

    /// The devices are loaded and fixed up. Whoever owns the eventfds and the DMA mappings arms what `rearm` names and
    /// says ready by returning; no device runs before that.
    fn ready(&mut self, rearm: &[Option<Rearm>]) -> Result<(), BoxError>;
}

/// What a restore did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RestoreReport {
    /// What was done.
    pub plan: RestorePlan,
    /// The seal on each device's state, verified over what was written to it.
    pub seals: Vec<Seal>,
    /// The whole restore.
    pub took: Duration,
}

/// Restores a set of devices and runs them. A failed restore leaves devices that run without anybody's state, except
/// where it says that one is quarantined.
pub fn restore(lanes: &[DeviceLane], source: &mut dyn StateSource) -> Result<RestoreReport, OperationError> {
    let plan = RestorePlan::for_devices(&capabilities(lanes)?, AfterLoad::Run)?;
    let mut run = Run::new(lanes, plan, source);
    let mut step = RestoreState::Admitted.on(plan, RestoreEvent::Start);
    loop {
        match step {
            Step::Moved { to, command } => match run.execute(command) {
                Some(event) => step = to.on(plan, event),
                None if to == RestoreState::Completed => return Ok(run.report()),
                None => return Err(run.unwound.into_error()),
            },
            // Neither can be: each event here answers the command before it, which the state waits for.
            Step::NoOp(state) => return Err(run.lost_track(state, None)),
            Step::Illegal { state, event } => return Err(run.lost_track(state, Some(event))),
        }
    }
}

/// One device of the set, and how far it is.
struct Seat<'a> {
    lane: &'a DeviceLane,
    hold: Hold,
    verifier: Verifier,
    seal: Option<Seal>,
    runs: bool,
}

/// What is held of a device between two steps.
enum Hold {
    Nothing,
    Loading(RestoreSession),
    Loaded(Loaded),
    FixedUp(FixedUp),
    Armed(Armed),
}

/// A step failed; what failed is noted already.
struct Noted;

struct Run<'a> {
    seats: Vec<Seat<'a>>,
    plan: RestorePlan,
    source: &'a mut dyn StateSource,
    unwound: Unwound,
    begun: Duration,
}

impl<'a> Run<'a> {
    fn new(lanes: &'a [DeviceLane], plan: RestorePlan, source: &'a mut dyn StateSource) -> Self {
        let seats = lanes
            .iter()
            .map(|lane| Seat {
                lane,
                hold: Hold::Nothing,
                verifier: Verifier::new(),
                seal: None,
                runs: false,
            })
            .collect();
        let begun = lanes.first().map_or(Duration::ZERO, |lane| lane.executor().now());
        Self { seats, plan, source, unwound: Unwound::new(), begun }
    }

    /// Does what the machine commands and says what came of it; `None` where that was the end.
    fn execute(&mut self, command: RestoreCommand) -> Option<RestoreEvent> {
        let (done, event) = match command {
            RestoreCommand::EnterResuming => (self.enter(), RestoreEvent::AllEntered),
            RestoreCommand::Load => (self.load(), RestoreEvent::AllLoaded),
            RestoreCommand::Verify => (self.verify(), RestoreEvent::SealVerified),
            RestoreCommand::FixUp => (self.fix_up(), RestoreEvent::FixedUp),
            RestoreCommand::AwaitReady => (self.ready(), RestoreEvent::Ready),
            RestoreCommand::EnterP2p => (self.enter_p2p(), RestoreEvent::AllQuiesced),
            RestoreCommand::Resume | RestoreCommand::FinishResume => {
                let done = self.run_all();
                // A device that runs is told before the failure of another: it decides between reset and quarantine.
                if done.is_err()
                    && command == RestoreCommand::Resume
                    && self.seats.iter().any(|seat| seat.runs)
                {
                    return Some(RestoreEvent::AnyRunning);
                }
                (done, RestoreEvent::AllRunning)
            }
            RestoreCommand::UndoEntry => return Some(self.undo()),
            // Past the entry every device gave up what it had, whatever its way back was.
            RestoreCommand::ResetAll => {
                let event = self.undo();
                return Some(if event == RestoreEvent::Recovered { RestoreEvent::AllReset } else { event });
            }
            RestoreCommand::Release => return None,
            RestoreCommand::Quarantine => {
                self.quarantine_set();
                return None;
            }
            // Not in a plan without a hold.
            RestoreCommand::AwaitResume => {
                self.unwound
                    .blame(Cause::Other("the plan asks for a caller to wait for, and there is none".into()));
                (Err(Noted), RestoreEvent::Failed)
            }
        };
        Some(if done.is_ok() { event } else { RestoreEvent::Failed })
    }

    fn enter(&mut self) -> Result<(), Noted> {
        for index in 0..self.seats.len() {
            let session = self.step(index, Call::SetState(State::Resuming), Driver::begin_restore)?;
            self.seats[index].hold = Hold::Loading(session);
        }
        Ok(())
    }

    /// Writes each device's chunks, fetching and hashing the next while one is being written.
    fn load(&mut self) -> Result<(), Noted> {
        for index in 0..self.seats.len() {
            let lane = self.seats[index].lane;
            let mut next = self.fetch(index)?;
            while let Some(chunk) = next {
                let Hold::Loading(mut session) = self.take(index) else {
                    return Err(self.fail_device(index, DeviceError::Poisoned));
                };
                let writing = lane.start(Call::Write, move |_| {
                    let written = session.write(&chunk);
                    (session, written)
                });
                let fetched = self.fetch(index);
                let (session, written) = match writing.wait() {
                    Ok(done) => done,
                    Err(hung) => {
                        self.unwound.device(lane, Err(hung));
                        return Err(Noted);
                    }
                };
                self.seats[index].hold = Hold::Loading(session);
                if let Err(error) = written {
                    return Err(self.fail_device(index, error));
                }
                next = fetched?;
            }
        }
        Ok(())
    }

    fn fetch(&mut self, index: usize) -> Result<Option<VerifiedChunk>, Noted> {
        match self.source.chunk(index) {
            Ok(bytes) => Ok(bytes.map(|bytes| self.seats[index].verifier.accept(bytes))),
            Err(error) => {
                self.unwound.blame(Cause::Other(error));
                Err(Noted)
            }
        }
    }

    fn verify(&mut self) -> Result<(), Noted> {
        for index in 0..self.seats.len() {
            let hashed = std::mem::take(&mut self.seats[index].verifier);
            let verified =
                self.source.seal(index).and_then(|seal| hashed.finish(&seal).map_err(Into::into)).map_err(
                    |error| {
                        self.unwound.blame(Cause::Other(error));
                        Noted
                    },
                )?;
            self.seats[index].seal = Some(verified.seal());
            if let Hold::Loading(session) = self.take(index) {
                let loaded =
                    self.step(index, Call::Write, move |driver| driver.verified(session, &verified))?;
                self.seats[index].hold = Hold::Loaded(loaded);
            }
        }
        Ok(())
    }

    fn fix_up(&mut self) -> Result<(), Noted> {
        for index in 0..self.seats.len() {
            let config = self.source.config(index);
            if let Hold::Loaded(loaded) = self.take(index) {
                let fixed = self
                    .step(index, Call::ConfigWrite, move |driver| driver.fix_up(loaded, config.as_ref()))?;
                self.seats[index].hold = Hold::FixedUp(fixed);
            }
        }
        Ok(())
    }

    fn ready(&mut self) -> Result<(), Noted> {
        let rearm: Vec<Option<Rearm>> = self
            .seats
            .iter()
            .map(|seat| match &seat.hold {
                Hold::FixedUp(fixed) => fixed.rearm(),
                Hold::Nothing | Hold::Loading(_) | Hold::Loaded(_) | Hold::Armed(_) => None,
            })
            .collect();
        self.source.ready(&rearm).map_err(|error| {
            self.unwound.blame(Cause::Other(error));
            Noted
        })?;
        for seat in &mut self.seats {
            if let Hold::FixedUp(fixed) = std::mem::replace(&mut seat.hold, Hold::Nothing) {
                seat.hold = Hold::Armed(fixed.ready());
            }
        }
        Ok(())
    }

    fn enter_p2p(&mut self) -> Result<(), Noted> {
        for index in 0..self.seats.len() {
            if let Hold::Armed(armed) = self.take(index) {
                let armed = self.step(index, Call::SetState(State::RunningP2p), |driver| {
                    driver.enter_running_p2p(&armed).map(|()| armed)
                })?;
                self.seats[index].hold = Hold::Armed(armed);
            }
        }
        Ok(())
    }

    fn run_all(&mut self) -> Result<(), Noted> {
        for index in 0..self.seats.len() {
            if self.seats[index].runs {
                continue;
            }
            let Hold::Armed(armed) = self.take(index) else {
                // Its own driver has reset it already: it runs, but not with the restored state.
                return Err(Noted);
            };
            self.step(index, Call::SetState(State::Running), move |driver| driver.enter_running(&armed))?;
            self.seats[index].runs = true;
        }
        Ok(())
    }

    /// Gives every device up: one that kept its old state goes back to RUNNING with it, every other is reset.
    fn undo(&mut self) -> RestoreEvent {
        let reason = match &self.unwound.cause {
            Some(cause) => cause.to_string(),
            None => "the operation was given up".to_owned(),
        };
        for seat in &mut self.seats {
            seat.hold = Hold::Nothing;
            let cause = DeviceError::GivenUp { reason: reason.clone() };
            let ended = seat.lane.call(Call::Reset, move |driver| driver.abort(cause));
            self.unwound.device(seat.lane, ended);
        }
        match (self.unwound.quarantined.is_empty(), self.unwound.outcome) {
            (false, _) => RestoreEvent::Unrecoverable,
            (true, Outcome::StateLost) => RestoreEvent::AllReset,
            (true, Outcome::Preserved) => RestoreEvent::Recovered,
        }
    }

    /// Only a part of the set runs with the restored state: nothing of it takes work until somebody decides.
    fn quarantine_set(&mut self) {
        for seat in &self.seats {
            let quarantined = seat.lane.call(Call::GetState, Driver::quarantine);
            let device = seat.lane.identity();
            if !self.unwound.quarantined.contains(device)
                && matches!(quarantined, Ok(Standing::Quarantined) | Err(_))
            {
                self.unwound.quarantined.push(device.clone());
            }
        }
        self.unwound.outcome = Outcome::StateLost;
    }

    fn take(&mut self, index: usize) -> Hold {
        std::mem::replace(&mut self.seats[index].hold, Hold::Nothing)
    }

    /// A step of the driver; where it fails, the driver has already reset its device or quarantined it.
    fn step<T: Send + 'static>(
        &mut self,
        index: usize,
        call: Call,
        work: impl FnOnce(&mut Driver) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Noted> {
        let lane = self.seats[index].lane;
        let failed: Result<Failure, Hung> = match lane.call(call, work) {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(failure)) => Ok(failure),
            Err(hung) => Err(hung),
        };
        self.unwound.device(lane, failed);
        Err(Noted)
    }

    fn fail_device(&mut self, index: usize, failure: DeviceError) -> Noted {
        self.unwound.blame(Cause::Device { device: self.seats[index].lane.identity().clone(), failure });
        Noted
    }

    fn lost_track(mut self, state: RestoreState, event: Option<RestoreEvent>) -> OperationError {
        let reason =
            format!("the restore in {state} has no use for {event:?}; please report this as a defect");
        self.unwound.blame(Cause::Other(reason.into()));
        let _ = self.undo();
        self.unwound.into_error()
    }

    fn report(&self) -> RestoreReport {
        let now = self.seats.first().map_or(self.begun, |seat| seat.lane.executor().now());
        RestoreReport {
            plan: self.plan,
            seals: self.seats.iter().filter_map(|seat| seat.seal).collect(),
            took: now.saturating_sub(self.begun),
        }
    }
}
