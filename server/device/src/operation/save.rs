//! A save of a set, start to end.

mod report;
mod stream;

use std::pin::pin;
use std::time::Duration;

use futures_util::future::{Either, select};
use vfio_checkpoint_fsm::{AfterSave, Cutover, SaveCommand, SaveEvent, SavePlan, SaveState, SaveStep, State};

pub use report::{SaveReport, SaveTerms};

use super::error::{Cause, OperationError, Unwound};
use super::machine::{LostTrack, Machine, begin, drive};
use super::set::{Noted, Seats};
use super::{
    Caller, Delivery, DeviceProgress, OperationStep, Pace, Progress, Settled, StateSink, Word, capabilities,
};
use crate::driver::{Driver, Peers, Quiesced, SaveMode, SaveSession, Stopped};
use crate::lane::Then;
use crate::{Call, ChunkPool, ConfigCapture, DeviceLane};
use report::checkpoint_after;

/// Saves a set of devices. They run again at the end, or stay stopped where the terms say so; a save that fails or is
/// cancelled brings them back to RUNNING.
///
/// Needs no async runtime. The future may be dropped at any point, as by a crash: [`Driver::abort`] on each lane, or
/// [`take_up_save`](super::take_up_save) from another process, then does the rest.
pub async fn save<S: StateSink>(
    lanes: &[DeviceLane],
    terms: SaveTerms,
    caller: &dyn Caller,
    sink: &mut S,
) -> Result<SaveReport, OperationError> {
    let plan = SavePlan::for_devices(&capabilities(lanes).await?, terms.request)?;
    let mut run = SaveRun::new(lanes, plan, terms, caller, sink);
    if !plan.pre_copy && plan.cutover == Cutover::Auto {
        // The first step is the stop. A cancel in between is heard at that.
        select(caller.cancelled(), pin!(run.await_line())).await;
    }
    let first = begin(caller, &mut run, SaveState::Admitted, SaveEvent::Start);
    run.finish(first).await?;
    Ok(run.report())
}

/// What is held of a device between two steps.
#[derive(Default)]
pub(super) enum Hold {
    #[default]
    Nothing,
    Quiesced(Quiesced),
    Saving(SaveSession),
    Stopped(Stopped),
    /// On its way back, in RUNNING_P2P.
    Waking(Stopped),
}

/// The stream of one device.
#[derive(Default)]
struct Flow {
    pool: Option<ChunkPool>,
    /// What reading and handing on have shown while the device ran.
    pace: Pace,
}

pub(super) struct SaveRun<'a, S> {
    pub(super) set: Seats<'a, Hold>,
    flows: Vec<Flow>,
    progress: Vec<DeviceProgress>,
    state: SaveState,
    plan: SavePlan,
    terms: SaveTerms,
    caller: &'a dyn Caller,
    sink: &'a mut S,
    stopping: Option<Duration>,
    ended: Duration,
    precopy_bytes: u64,
    /// What has become of it, where the sink says so.
    delivery: Delivery,
    predicted_downtime: Option<Duration>,
    /// The sink was asked to seal. It may have done so although the answer was not waited for.
    sealing: bool,
    /// What whoever takes the devices over is told.
    pub(super) word: Word,
    /// An earlier life of the process may have told them. Then a record of it that cannot be made again stops nothing.
    pub(super) may_run_there: bool,
}

impl<S: StateSink> Machine for SaveRun<'_, S> {
    type Plan = SavePlan;
    type State = SaveState;
    type Event = SaveEvent;
    type Command = SaveCommand;

    const CANCEL: SaveEvent = SaveEvent::Cancel;
    const FAILED: SaveEvent = SaveEvent::Failed;

    fn on(state: SaveState, plan: SavePlan, event: SaveEvent) -> SaveStep {
        state.on(plan, event)
    }

    fn is_past_no_return(&self, state: SaveState) -> bool {
        state.is_past_no_return() || (self.may_run_there && state == SaveState::Committing)
    }

    fn step(state: SaveState) -> OperationStep {
        OperationStep::Save(state)
    }

    fn plan(&self) -> SavePlan {
        self.plan
    }

    fn unwound(&mut self) -> &mut Unwound {
        &mut self.set.unwound
    }

    async fn execute(&mut self, state: SaveState, command: SaveCommand) -> Option<SaveEvent> {
        self.state = state;
        let counts =
            counts_as_stop(command) && (self.terms.limits_commit || command != SaveCommand::AwaitCommit);
        let Some(limit) = self.terms.stop_limit.filter(|_| counts) else {
            return self.obey(state, command).await;
        };
        let stopped = self.stopping.map_or(Duration::ZERO, |since| self.set.now().saturating_sub(since));
        let left = limit.saturating_sub(stopped);
        let late = self.set.sleep(left);
        // What is late already is not begun: it could be over before the timer is heard.
        let done = if left.is_zero() {
            None
        } else {
            let work = pin!(self.obey(state, command));
            match select(work, late).await {
                Either::Left((event, _)) => Some(event),
                Either::Right(((), _)) => None,
            }
        };
        done.unwrap_or_else(|| {
            self.set.unwound.blame(Cause::StopLimit { limit });
            Some(SaveEvent::Failed)
        })
    }

    async fn bring_back(&mut self) {
        self.fall_back().await;
    }
}

impl<'a, S: StateSink> SaveRun<'a, S> {
    pub(super) fn new(
        lanes: &'a [DeviceLane],
        plan: SavePlan,
        terms: SaveTerms,
        caller: &'a dyn Caller,
        sink: &'a mut S,
    ) -> Self {
        let set = Seats::new(lanes);
        let ended = set.begun;
        Self {
            set,
            flows: lanes.iter().map(|_| Flow::default()).collect(),
            progress: vec![DeviceProgress::default(); lanes.len()],
            state: SaveState::Admitted,
            plan,
            terms,
            caller,
            sink,
            stopping: None,
            ended,
            precopy_bytes: 0,
            delivery: Delivery::default(),
            predicted_downtime: None,
            sealing: false,
            word: Word::Commit,
            may_run_there: false,
        }
    }

    /// Goes on from a step to the end. An error tells of every end that is not a success.
    pub(super) async fn finish(&mut self, first: SaveStep) -> Result<SaveState, OperationError> {
        let ended = drive(self, self.caller, first).await;
        let checkpoint = match ended {
            Ok(state) if state.is_success() => return Ok(state),
            Ok(SaveState::Inconsistent) => {
                let report = self.stopping.map(|_| Box::new(self.report()));
                return Err(OperationError::Inconsistent { report });
            }
            Ok(state) => checkpoint_after(state),
            Err(LostTrack) => checkpoint_after(self.state),
        };
        Err(std::mem::replace(&mut self.set.unwound, Unwound::new()).into_error(checkpoint))
    }

    async fn obey(&mut self, state: SaveState, command: SaveCommand) -> Option<SaveEvent> {
        let done = match command {
            SaveCommand::EnterPreCopy => self.pre_copy().await,
            SaveCommand::AwaitCutover => self.await_cutover().await,
            SaveCommand::Quiesce => self.quiesce().await.map(|()| SaveEvent::AllQuiesced),
            SaveCommand::EnterStopCopy => self.enter_stop_copy().await.map(|()| SaveEvent::AllStopped),
            SaveCommand::Drain => self.drain().await.map(|()| SaveEvent::AllDrained),
            SaveCommand::Park => self.park().await.map(|()| SaveEvent::AllParked),
            SaveCommand::Seal => self.seal().await.map(|()| SaveEvent::Sealed),
            SaveCommand::AwaitResume => Ok(self.await_resume().await),
            SaveCommand::MarkInconsistent => self.mark().await.map(|()| SaveEvent::Marked),
            SaveCommand::Resume => self.resume().await.map(|()| SaveEvent::AllRunning),
            SaveCommand::AwaitCommit => Ok(self.await_commit().await),
            SaveCommand::Commit => Ok(self.commit().await),
            SaveCommand::LetGo => {
                self.let_go().await;
                Ok(SaveEvent::LetGo)
            }
            SaveCommand::FallBack => {
                self.fall_back().await;
                let back = self.set.unwound.quarantined.is_empty();
                Ok(if back { SaveEvent::Recovered } else { SaveEvent::Unrecoverable })
            }
            SaveCommand::Release | SaveCommand::Discard => {
                self.release().await;
                if state == (SaveState::Aborted { checkpoint: None }) {
                    self.discard().await;
                }
                return None;
            }
            SaveCommand::Quarantine => {
                self.release().await;
                // Sealed after all, it would be the last copy.
                if state == (SaveState::Lost { checkpoint: None }) && !self.sealing {
                    self.discard().await;
                }
                return None;
            }
        };
        Some(done.unwrap_or(SaveEvent::Failed))
    }

    pub(super) fn peers(&self) -> Peers {
        if self.plan.barrier && self.set.len() > 1 { Peers::Barrier } else { Peers::None }
    }

    fn tell(&self) {
        self.caller.progress(&Progress {
            step: OperationStep::Save(self.state),
            devices: &self.progress,
            predicted_downtime: self.predicted_downtime,
        });
    }

    async fn quiesce(&mut self) -> Result<(), Noted> {
        let peers = self.peers();
        for index in 0..self.set.len() {
            let hold = match self.set.take(index) {
                Hold::Saving(session) => {
                    let quiesced = self.set.step(index, Call::SetState(State::PreCopyP2p), move |driver| {
                        driver.quiesce(&session).map(|()| Hold::Saving(session))
                    });
                    quiesced.await?
                }
                Hold::Nothing | Hold::Quiesced(_) | Hold::Stopped(_) | Hold::Waking(_) => {
                    self.make_pool(index).await?;
                    let quiesced = self.set.step(index, Call::SetState(State::RunningP2p), move |driver| {
                        driver.quiesce_running(peers).map(Hold::Quiesced)
                    });
                    quiesced.await?
                }
            };
            self.set.hold(index, hold);
        }
        Ok(())
    }

    async fn enter_stop_copy(&mut self) -> Result<(), Noted> {
        self.stopping = Some(self.set.now());
        let call = Call::SetState(State::StopCopy);
        for index in 0..self.set.len() {
            let hold = match self.set.take(index) {
                Hold::Saving(mut session) => {
                    let stopped = self.set.step(index, call, move |driver| {
                        driver.stop_copy(&mut session).map(|()| Hold::Saving(session))
                    });
                    stopped.await?
                }
                Hold::Quiesced(quiesced) => {
                    let stopped = self.set.step(index, call, move |driver| {
                        driver.stop_copy_quiesced(quiesced).map(Hold::Saving)
                    });
                    stopped.await?
                }
                Hold::Nothing | Hold::Stopped(_) | Hold::Waking(_) => {
                    self.begin(index, SaveMode::StopCopy).await?;
                    continue;
                }
            };
            self.set.hold(index, hold);
        }
        Ok(())
    }

    async fn drain(&mut self) -> Result<(), Noted> {
        for index in 0..self.set.len() {
            loop {
                match self.read_batch(index).await? {
                    Then::More(_) | Then::NothingNow(_) => {}
                    Then::End => break,
                    Then::Failed(error) => return Err(self.set.fail_device(index, error)),
                }
            }
        }
        Ok(())
    }

    async fn park(&mut self) -> Result<(), Noted> {
        for index in 0..self.set.len() {
            if let Hold::Saving(session) = self.set.take(index) {
                let parked = self.set.step(index, Call::SetState(State::Stop), |driver| {
                    driver.finish_save(session).map(Hold::Stopped)
                });
                let hold = parked.await?;
                self.set.hold(index, hold);
            }
        }
        Ok(())
    }

    async fn seal(&mut self) -> Result<(), Noted> {
        let config: Vec<Option<ConfigCapture>> = self
            .set
            .all
            .iter()
            .map(|seat| match &seat.hold {
                Hold::Stopped(stopped) => stopped.config().copied(),
                Hold::Nothing | Hold::Quiesced(_) | Hold::Saving(_) | Hold::Waking(_) => None,
            })
            .collect();
        self.sealing = true;
        let sealed = self.sink.seal(&config).await;
        sealed.map_err(|error| self.set.fail(Cause::Other(error)))
    }

    async fn await_resume(&mut self) -> SaveEvent {
        match select(self.caller.resume(), self.set.sleep(self.terms.hold_limit)).await {
            Either::Left(((), _)) => SaveEvent::Resume,
            Either::Right(((), _)) => SaveEvent::HoldExpired,
        }
    }

    async fn await_commit(&mut self) -> SaveEvent {
        let limit = self.terms.hold_limit;
        match select(self.caller.commit(), self.set.sleep(limit)).await {
            Either::Left(((), _)) => SaveEvent::CommitDue,
            Either::Right(((), _)) => {
                self.set.unwound.blame(Cause::NoCommit { limit });
                SaveEvent::HoldExpired
            }
        }
    }

    async fn commit(&mut self) -> SaveEvent {
        match self.sink.settle(self.word).await {
            Settled::There => {
                self.ended = self.set.now();
                SaveEvent::Committed
            }
            Settled::Here(why) => {
                self.set.unwound.blame(Cause::NotTaken(why));
                SaveEvent::Refused
            }
        }
    }

    /// The state lives on elsewhere: what is left of it here goes. What cannot be reset must not run again.
    async fn let_go(&mut self) {
        for index in 0..self.set.len() {
            let held = self.set.take(index);
            let lane = self.set.all[index].lane;
            let reset = lane.start(Call::Reset, move |driver| {
                // On the lane: closing a data fd is a call on the device too.
                drop(held);
                driver.reset()
            });
            match reset.finished().await {
                Ok(Ok(())) => {}
                Ok(Err(failure)) => self.set.unwound.device(lane, Ok(failure)),
                Err(hung) => self.set.unwound.device(lane, Err(hung)),
            }
        }
    }

    async fn mark(&mut self) -> Result<(), Noted> {
        let marked = self.sink.mark_inconsistent().await;
        marked.map_err(|error| self.set.fail(Cause::Other(error)))
    }

    /// Every device to RUNNING_P2P before any to RUNNING, where the plan has the barrier.
    async fn resume(&mut self) -> Result<(), Noted> {
        if self.plan.barrier {
            for index in 0..self.set.len() {
                let hold = match self.set.take(index) {
                    Hold::Stopped(stopped) => {
                        let waking = self.set.step(index, Call::SetState(State::RunningP2p), |driver| {
                            driver.resume_p2p(&stopped).map(|()| Hold::Waking(stopped))
                        });
                        waking.await?
                    }
                    hold @ (Hold::Nothing | Hold::Quiesced(_) | Hold::Saving(_) | Hold::Waking(_)) => hold,
                };
                self.set.hold(index, hold);
            }
        }
        for index in 0..self.set.len() {
            match self.set.take(index) {
                Hold::Stopped(stopped) | Hold::Waking(stopped) => {
                    let call = Call::SetState(State::Running);
                    self.set.step(index, call, |driver| driver.resume(stopped)).await?;
                }
                // It runs already: taken up after a crash.
                Hold::Nothing | Hold::Quiesced(_) | Hold::Saving(_) => {}
            }
        }
        Ok(())
    }

    async fn fall_back(&mut self) {
        // Back as they came: no device runs freely while a peer is still stopped.
        if self.peers() == Peers::Barrier {
            for index in 0..self.set.len() {
                self.set.give_up(index, Call::SetState(State::RunningP2p), Driver::abort_to_barrier).await;
            }
        }
        for index in 0..self.set.len() {
            self.set.give_up(index, Call::SetState(State::Running), Driver::abort).await;
        }
    }

    /// The end: devices that stay stopped are let go of where they are.
    async fn release(&mut self) {
        if self.plan.after != AfterSave::HandOver || !self.state.is_success() {
            self.ended = self.set.now();
        }
        for index in 0..self.set.len() {
            if let Hold::Stopped(stopped) = self.set.take(index)
                && self.plan.after == AfterSave::StayStopped
            {
                let lane = self.set.all[index].lane;
                let left = lane.start(Call::SetState(State::Stop), |driver| driver.leave_stopped(stopped));
                // Only a hung lane or a foreign session could refuse, and there is nothing to be done about either.
                let _ = left.finished().await;
            }
        }
    }

    async fn discard(&mut self) {
        if let Err(error) = self.sink.discard().await {
            tracing::warn!(error = %crate::chain(&*error), "what a save wrote could not be discarded");
        }
    }

    fn report(&self) -> SaveReport {
        SaveReport {
            plan: self.plan,
            bytes: self.progress.iter().map(|device| device.bytes).collect(),
            precopy_bytes: self.precopy_bytes,
            predicted_downtime: self.predicted_downtime,
            downtime: self.stopping.map_or(Duration::ZERO, |since| self.ended.saturating_sub(since)),
            took: self.ended.saturating_sub(self.set.begun),
            unrecorded: self.set.unwound.unrecorded.clone(),
        }
    }
}

/// Whether the devices stand still while it is obeyed, and can still be brought back.
const fn counts_as_stop(command: SaveCommand) -> bool {
    match command {
        SaveCommand::Drain | SaveCommand::Park | SaveCommand::Seal | SaveCommand::AwaitCommit => true,
        SaveCommand::EnterPreCopy
        | SaveCommand::AwaitCutover
        | SaveCommand::Quiesce
        | SaveCommand::EnterStopCopy
        | SaveCommand::AwaitResume
        | SaveCommand::MarkInconsistent
        | SaveCommand::Resume
        | SaveCommand::Commit
        | SaveCommand::LetGo
        | SaveCommand::FallBack
        | SaveCommand::Release
        | SaveCommand::Discard
        | SaveCommand::Quarantine => false,
    }
}
