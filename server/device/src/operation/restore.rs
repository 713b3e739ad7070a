//! A restore of a set, start to end.

mod load;
mod report;

use std::convert::Infallible;
use std::pin::pin;

use futures_util::future::{Either, pending, select};
use vfio_checkpoint_fsm::{
    Outcome, RestoreCommand, RestoreEvent, RestorePlan, RestoreState, RestoreStep, State,
};

use super::error::{Cause, OperationError, Unwound};
use super::machine::{LostTrack, Machine, begin, drive};
use super::set::{Noted, Seats};
use super::{
    Arrival, BoxError, Caller, DeviceProgress, OperationStep, Owner, Progress, StateSource, capabilities,
};
use crate::driver::{Armed, Driver, FixedUp, Loaded, RestoreSession, Standing};
use crate::{Call, ConfigCapture, DeviceError, DeviceLane, Rearm, VerifiedSeal};

pub use report::{RestoreReport, RestoreTerms};

/// Restores a set of devices and runs them. A restore that fails or is cancelled leaves devices that run without
/// anybody's state, except where it says that one is quarantined.
///
/// Needs no async runtime. The future may be dropped at any point, as by a crash: [`Driver::abort`] on each lane, or
/// [`take_up_restore`](super::take_up_restore) from another process, then does the rest.
pub async fn restore<S: StateSource>(
    lanes: &[DeviceLane],
    terms: RestoreTerms,
    caller: &dyn Caller,
    source: &mut S,
) -> Result<RestoreReport, OperationError> {
    let plan = RestorePlan::for_devices(&capabilities(lanes).await?, terms.after)?;
    let mut run = RestoreRun::new(lanes, plan, terms, caller, source);
    let first = begin(caller, &mut run, RestoreState::Admitted, RestoreEvent::Start);
    run.finish(first).await
}

/// Gives state to a restore, or, where it was given before a crash, only speaks for the devices' owner.
pub(super) trait Feed: Send {
    fn next(&mut self) -> impl Future<Output = Result<Option<Arrival>, BoxError>> + Send;
    fn busy(&mut self) -> impl Future<Output = Infallible> + Send;
    fn held(&mut self) -> impl Future<Output = Result<(), BoxError>> + Send;
    fn ready(&mut self, rearm: &[Option<Rearm>]) -> impl Future<Output = Result<(), BoxError>> + Send;
}

impl<S: StateSource> Feed for S {
    fn next(&mut self) -> impl Future<Output = Result<Option<Arrival>, BoxError>> + Send {
        StateSource::next(self)
    }

    fn busy(&mut self) -> impl Future<Output = Infallible> + Send {
        StateSource::busy(self)
    }

    fn held(&mut self) -> impl Future<Output = Result<(), BoxError>> + Send {
        StateSource::held(self)
    }

    fn ready(&mut self, rearm: &[Option<Rearm>]) -> impl Future<Output = Result<(), BoxError>> + Send {
        StateSource::ready(self, rearm)
    }
}

/// Nothing more comes: the state was loaded before.
pub(super) struct Fed<'a, O>(pub(super) &'a mut O);

impl<O: Owner> Feed for Fed<'_, O> {
    async fn next(&mut self) -> Result<Option<Arrival>, BoxError> {
        Ok(None)
    }

    fn busy(&mut self) -> impl Future<Output = Infallible> + Send {
        pending()
    }

    async fn held(&mut self) -> Result<(), BoxError> {
        Ok(())
    }

    fn ready(&mut self, rearm: &[Option<Rearm>]) -> impl Future<Output = Result<(), BoxError>> + Send {
        self.0.ready(rearm)
    }
}

/// What is held of a device between two steps.
#[derive(Default)]
pub(super) enum Hold {
    #[default]
    Nothing,
    Loading(RestoreSession),
    Loaded(Loaded),
    FixedUp(FixedUp),
    Armed(Armed),
    /// Past the barrier, in RUNNING_P2P.
    Quiesced(Armed),
    Running,
    /// It did not start, and was left where it is.
    Failed,
}

/// What came to an end with a device's state.
struct Sealed {
    seal: VerifiedSeal,
    config: Option<ConfigCapture>,
}

pub(super) struct RestoreRun<'a, S> {
    pub(super) set: Seats<'a, Hold>,
    sealed: Vec<Option<Sealed>>,
    progress: Vec<DeviceProgress>,
    state: RestoreState,
    plan: RestorePlan,
    terms: RestoreTerms,
    caller: &'a dyn Caller,
    source: &'a mut S,
}

impl<S: Feed> Machine for RestoreRun<'_, S> {
    type Plan = RestorePlan;
    type State = RestoreState;
    type Event = RestoreEvent;
    type Command = RestoreCommand;

    const CANCEL: RestoreEvent = RestoreEvent::Cancel;
    const FAILED: RestoreEvent = RestoreEvent::Failed;

    fn on(state: RestoreState, plan: RestorePlan, event: RestoreEvent) -> RestoreStep {
        state.on(plan, event)
    }

    fn is_past_no_return(&self, state: RestoreState) -> bool {
        state.is_past_no_return()
    }

    fn step(state: RestoreState) -> OperationStep {
        OperationStep::Restore(state)
    }

    fn plan(&self) -> RestorePlan {
        self.plan
    }

    fn unwound(&mut self) -> &mut Unwound {
        &mut self.set.unwound
    }

    async fn execute(&mut self, state: RestoreState, command: RestoreCommand) -> Option<RestoreEvent> {
        self.state = state;
        let done = match command {
            RestoreCommand::EnterResuming => self.enter().await.map(|()| RestoreEvent::AllEntered),
            RestoreCommand::Load => self.load().await.map(|()| RestoreEvent::AllLoaded),
            RestoreCommand::Verify => self.verify().await.map(|()| RestoreEvent::SealVerified),
            RestoreCommand::FixUp => self.fix_up().await.map(|()| RestoreEvent::FixedUp),
            RestoreCommand::AwaitResume => self.await_resume().await,
            RestoreCommand::AwaitReady => self.await_ready().await,
            RestoreCommand::EnterP2p => self.enter_p2p().await.map(|()| RestoreEvent::AllQuiesced),
            RestoreCommand::Resume => self.run_first().await,
            RestoreCommand::FinishResume => self.run_rest().await.map(|()| RestoreEvent::AllRunning),
            RestoreCommand::UndoEntry => Ok(self.undo().await),
            // Past the entry every device gave up what it had, whatever its way back was.
            RestoreCommand::ResetAll => {
                let event = self.undo().await;
                Ok(if event == RestoreEvent::Recovered { RestoreEvent::AllReset } else { event })
            }
            RestoreCommand::Release => return None,
            RestoreCommand::Quarantine => {
                self.quarantine_set().await;
                return None;
            }
        };
        Some(done.unwrap_or(RestoreEvent::Failed))
    }

    async fn bring_back(&mut self) {
        let _ = self.undo().await;
    }
}

impl<'a, S: Feed> RestoreRun<'a, S> {
    pub(super) fn new(
        lanes: &'a [DeviceLane],
        plan: RestorePlan,
        terms: RestoreTerms,
        caller: &'a dyn Caller,
        source: &'a mut S,
    ) -> Self {
        Self {
            set: Seats::new(lanes),
            sealed: lanes.iter().map(|_| None).collect(),
            progress: vec![DeviceProgress::default(); lanes.len()],
            state: RestoreState::Admitted,
            plan,
            terms,
            caller,
            source,
        }
    }

    /// Goes on from a step to the end. An error tells of every end that is not a success.
    pub(super) async fn finish(&mut self, first: RestoreStep) -> Result<RestoreReport, OperationError> {
        match drive(self, self.caller, first).await {
            Ok(state) if state.is_success() => Ok(self.report()),
            Ok(_) | Err(LostTrack) => {
                Err(std::mem::replace(&mut self.set.unwound, Unwound::new()).into_error(None))
            }
        }
    }

    /// Takes in that a device was loaded by an earlier life of the process.
    pub(super) fn loaded_before(&mut self, index: usize, seal: VerifiedSeal) {
        self.progress[index].bytes = seal.seal().bytes;
        self.sealed[index] = Some(Sealed { seal, config: None });
    }

    fn tell(&self) {
        self.caller.progress(&Progress {
            step: OperationStep::Restore(self.state),
            devices: &self.progress,
            predicted_downtime: None,
        });
    }

    async fn enter(&mut self) -> Result<(), Noted> {
        for index in 0..self.set.len() {
            let call = Call::SetState(State::Resuming);
            let session = self.set.step(index, call, Driver::begin_restore).await?;
            self.set.hold(index, Hold::Loading(session));
        }
        Ok(())
    }

    async fn verify(&mut self) -> Result<(), Noted> {
        for index in 0..self.set.len() {
            if let Hold::Loading(session) = self.set.take(index)
                && let Some(Sealed { seal, config }) = self.sealed[index].take()
            {
                let verified = self.set.step(index, Call::Write, move |driver| {
                    driver.verified(session, &seal).map(|loaded| (loaded, seal))
                });
                let (loaded, seal) = verified.await?;
                self.sealed[index] = Some(Sealed { seal, config });
                self.set.hold(index, Hold::Loaded(loaded));
            }
        }
        Ok(())
    }

    async fn fix_up(&mut self) -> Result<(), Noted> {
        for index in 0..self.set.len() {
            let config = self.sealed[index].as_ref().and_then(|sealed| sealed.config);
            if let Hold::Loaded(loaded) = self.set.take(index) {
                let call = Call::ConfigWrite;
                let fixed =
                    self.set.step(index, call, move |driver| driver.fix_up(loaded, config.as_ref())).await?;
                self.set.hold(index, Hold::FixedUp(fixed));
            }
        }
        Ok(())
    }

    async fn await_resume(&mut self) -> Result<RestoreEvent, Noted> {
        let limit = self.terms.hold_limit;
        let told = match select(pin!(self.source.held()), self.set.sleep(limit)).await {
            Either::Left((told, _)) => Some(told),
            Either::Right(((), _)) => None,
        };
        // Whoever says Resume knows of the hold from then on, so it is as long as was agreed only if it begins then.
        let resumed = match told {
            Some(Ok(())) => select(self.caller.resume(), self.set.sleep(limit)).await,
            Some(Err(error)) => return Err(self.set.fail(Cause::Other(error))),
            None => return Ok(self.hold_expired()),
        };
        match resumed {
            Either::Left(((), _)) => Ok(RestoreEvent::Resume),
            Either::Right(((), _)) => Ok(self.hold_expired()),
        }
    }

    fn hold_expired(&mut self) -> RestoreEvent {
        self.set.unwound.blame(Cause::HoldExpired { limit: self.terms.hold_limit });
        RestoreEvent::HoldExpired
    }

    async fn await_ready(&mut self) -> Result<RestoreEvent, Noted> {
        let rearm: Vec<Option<Rearm>> = self
            .set
            .all
            .iter()
            .map(|seat| match &seat.hold {
                Hold::FixedUp(fixed) => fixed.rearm(),
                Hold::Nothing
                | Hold::Loading(_)
                | Hold::Loaded(_)
                | Hold::Armed(_)
                | Hold::Quiesced(_)
                | Hold::Running
                | Hold::Failed => None,
            })
            .collect();
        let limit = self.terms.ready_limit;
        let late = self.set.sleep(limit);
        let ready = match select(pin!(self.source.ready(&rearm)), late).await {
            Either::Left((ready, _)) => Some(ready),
            Either::Right(((), _)) => None,
        };
        match ready {
            Some(Ok(())) => {}
            Some(Err(error)) => return Err(self.set.fail(Cause::Other(error))),
            None => {
                self.set.unwound.blame(Cause::NotReady { limit });
                return Ok(RestoreEvent::HoldExpired);
            }
        }
        for index in 0..self.set.len() {
            if let Hold::FixedUp(fixed) = self.set.take(index) {
                self.set.hold(index, Hold::Armed(fixed.ready()));
            }
        }
        Ok(RestoreEvent::Ready)
    }

    async fn enter_p2p(&mut self) -> Result<(), Noted> {
        for index in 0..self.set.len() {
            let hold = match self.set.take(index) {
                Hold::Armed(armed) => {
                    // Where it fails the device stays as it is until the caller has recorded that it will be reset.
                    let call = Call::SetState(State::RunningP2p);
                    let started = self
                        .set
                        .attempt(index, call, |driver| driver.try_running_p2p(&armed).map(|()| armed));
                    Hold::Quiesced(started.await?)
                }
                // There already: taken up after a crash.
                hold @ (Hold::Nothing
                | Hold::Loading(_)
                | Hold::Loaded(_)
                | Hold::FixedUp(_)
                | Hold::Quiesced(_)
                | Hold::Running
                | Hold::Failed) => hold,
            };
            self.set.hold(index, hold);
        }
        Ok(())
    }

    /// Runs the first device, which is the point of no return: the caller hears of it before another runs.
    async fn run_first(&mut self) -> Result<RestoreEvent, Noted> {
        let first = self.set.all[0].lane;
        match self.run(0).await {
            Ok(()) if self.set.len() > 1 => Ok(RestoreEvent::AnyRunning),
            Ok(()) => Ok(RestoreEvent::AllRunning),
            Err(noted) if is_seen_not_to_run(first).await => Err(noted),
            // Nobody can tell that it does not run, so it counts as if it did: what failed is found once more, past the line.
            Err(Noted) => Ok(RestoreEvent::AnyRunning),
        }
    }

    async fn run_rest(&mut self) -> Result<(), Noted> {
        for index in 0..self.set.len() {
            self.run(index).await?;
        }
        Ok(())
    }

    async fn run(&mut self, index: usize) -> Result<(), Noted> {
        let hold = match self.set.take(index) {
            Hold::Armed(armed) | Hold::Quiesced(armed) => {
                // What is held of it while it starts; where it fails it stays where it is, as in `enter_p2p`.
                self.set.hold(index, Hold::Failed);
                let call = Call::SetState(State::Running);
                self.set.attempt(index, call, move |driver| driver.try_running(&armed)).await?;
                Hold::Running
            }
            Hold::Running => Hold::Running,
            Hold::Nothing | Hold::Loading(_) | Hold::Loaded(_) | Hold::FixedUp(_) | Hold::Failed => {
                return Err(self.set.fail_device(index, DeviceError::Poisoned));
            }
        };
        self.set.hold(index, hold);
        Ok(())
    }

    /// Gives every device up: one that kept its old state goes back to RUNNING with it, every other is reset.
    async fn undo(&mut self) -> RestoreEvent {
        for index in 0..self.set.len() {
            self.set.give_up(index, Call::Reset, Driver::abort).await;
        }
        match (self.set.unwound.quarantined.is_empty(), self.set.unwound.outcome) {
            (false, _) => RestoreEvent::Unrecoverable,
            (true, Outcome::StateLost) => RestoreEvent::AllReset,
            (true, Outcome::Preserved) => RestoreEvent::Recovered,
        }
    }

    /// Only a part of the set runs with the restored state: nothing of it takes work until somebody decides. The device
    /// that did not start is reset, as it would be if it were alone.
    async fn quarantine_set(&mut self) {
        for index in 0..self.set.len() {
            if matches!(self.set.all[index].hold, Hold::Failed) {
                self.set.give_up(index, Call::Reset, Driver::abort).await;
            }
        }
        for index in 0..self.set.len() {
            let lane = self.set.all[index].lane;
            let quarantined = lane.start(Call::GetState, Driver::quarantine).finished().await;
            if matches!(quarantined, Ok(Standing::Quarantined) | Err(_)) {
                self.set.unwound.quarantine(lane.identity());
            }
        }
        self.set.unwound.outcome = Outcome::StateLost;
    }

    fn report(&self) -> RestoreReport {
        RestoreReport {
            plan: self.plan,
            seals: self.sealed.iter().flatten().map(|sealed| sealed.seal.seal()).collect(),
            took: self.set.elapsed(),
            unrecorded: self.set.unwound.unrecorded.clone(),
        }
    }
}

async fn is_seen_not_to_run(lane: &DeviceLane) -> bool {
    let seen = lane.start(Call::GetState, Driver::observe).finished().await;
    matches!(seen, Ok(Ok(state)) if state != State::Running)
}
