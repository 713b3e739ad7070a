//! A save of a set, start to end.

use std::time::Duration;

use bytes::Bytes;
use vfio_checkpoint_fsm::{
    AfterSave, Cutover, SaveCommand, SaveEvent, SavePlan, SaveRequest, SaveState, State, Step,
};

use super::{BoxError, Cause, Decision, Left, OperationError, PrecopyPolicy, Unwound, capabilities};
use crate::driver::{Driver, Failure, Peers, Quiesced, SaveMode, SaveSession, Stopped};
use crate::lane::{Batch, Hung, Then};
use crate::pool::chunk_bytes_for;
use crate::{Call, ChunkPool, ConfigCapture, DataSize, DeviceError, DeviceLane, PrecopyInfo};

/// Unused buffers kept for a device: as many as two batches need.
const POOL_KEEP: usize = 2 * crate::lane::BATCH_CHUNKS;
/// First and longest pause when a device has nothing for now; each is twice the one before.
const PAUSES: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(100));

/// Takes the state of a set of devices.
pub trait StateSink {
    /// Takes the next bytes of a device, counted from 0 in the order of the set.
    fn chunk(&mut self, device: usize, bytes: Bytes) -> Result<(), BoxError>;

    /// Makes everything durable. All of every device's state has come. `config` is what was captured of each device's
    /// configuration space.
    fn seal(&mut self, config: &[Option<ConfigCapture>]) -> Result<(), BoxError>;
}

/// What a save did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SaveReport {
    /// What was done, after the wishes were held against what the devices can do.
    pub plan: SavePlan,
    /// Bytes of each device, in the order of the set.
    pub bytes: Vec<u64>,
    /// Of these, how many came while the devices ran.
    pub precopy_bytes: u64,
    /// From before the first device was stopped until the last ran again, or until the seal where they stay stopped.
    pub downtime: Duration,
    /// The whole save.
    pub took: Duration,
}

/// Saves a set of devices. They run again at the end, or stay stopped where `request` says so; a failed save brings
/// them back to RUNNING.
///
/// `request` must ask for automatic cutover and no hold: there is nobody here to wait for, so what it says otherwise
/// is taken as automatic and as staying stopped.
pub fn save(
    lanes: &[DeviceLane],
    request: SaveRequest,
    policy: PrecopyPolicy,
    sink: &mut dyn StateSink,
) -> Result<SaveReport, OperationError> {
    let after = match request.after {
        AfterSave::Resume => AfterSave::Resume,
        AfterSave::Hold | AfterSave::StayStopped => AfterSave::StayStopped,
    };
    let plan = SavePlan::for_devices(
        &capabilities(lanes)?,
        SaveRequest { cutover: Cutover::Auto, after, ..request },
    )?;
    let mut run = Run::new(lanes, plan, policy, sink);
    let mut step = SaveState::Admitted.on(plan, SaveEvent::Start);
    loop {
        match step {
            Step::Moved { to, command } => match run.execute(command) {
                Some(event) => step = to.on(plan, event),
                None if to.is_success() => return Ok(run.report()),
                None => {
                    run.unwound.sealed = to.is_past_no_return();
                    return Err(run.unwound.into_error());
                }
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
    bytes: u64,
    pool: Option<ChunkPool>,
    /// How long reading and handing on took while the device ran.
    copying: Duration,
}

/// What is held of a device between two steps.
enum Hold {
    Nothing,
    Quiesced(Quiesced),
    Saving(SaveSession),
    Stopped(Stopped),
}

/// A step failed; what failed is noted already.
struct Noted;

struct Run<'a> {
    seats: Vec<Seat<'a>>,
    plan: SavePlan,
    policy: PrecopyPolicy,
    sink: &'a mut dyn StateSink,
    unwound: Unwound,
    begun: Duration,
    stopping: Option<Duration>,
    ended: Duration,
    precopy_bytes: u64,
}

impl<'a> Run<'a> {
    fn new(
        lanes: &'a [DeviceLane],
        plan: SavePlan,
        policy: PrecopyPolicy,
        sink: &'a mut dyn StateSink,
    ) -> Self {
        let seats = lanes
            .iter()
            .map(|lane| Seat { lane, hold: Hold::Nothing, bytes: 0, pool: None, copying: Duration::ZERO })
            .collect();
        let begun = lanes.first().map_or(Duration::ZERO, |lane| lane.executor().now());
        let unwound = Unwound::new();
        Self { seats, plan, policy, sink, unwound, begun, stopping: None, ended: begun, precopy_bytes: 0 }
    }

    fn peers(&self) -> Peers {
        if self.plan.barrier && self.seats.len() > 1 { Peers::Barrier } else { Peers::None }
    }

    fn now(&self) -> Duration {
        self.seats.first().map_or(self.begun, |seat| seat.lane.executor().now())
    }

    /// Does what the machine commands and says what came of it; `None` where that was the end.
    fn execute(&mut self, command: SaveCommand) -> Option<SaveEvent> {
        let (done, event) = match command {
            SaveCommand::EnterPreCopy => (self.pre_copy(), SaveEvent::CutoverDue),
            SaveCommand::Quiesce => (self.quiesce(), SaveEvent::AllQuiesced),
            SaveCommand::EnterStopCopy => (self.enter_stop_copy(), SaveEvent::AllStopped),
            SaveCommand::Drain => (self.drain(), SaveEvent::AllDrained),
            SaveCommand::Park => (self.park(), SaveEvent::AllParked),
            SaveCommand::Seal => (self.seal(), SaveEvent::Sealed),
            SaveCommand::Resume => (self.resume(), SaveEvent::AllRunning),
            SaveCommand::FallBack => {
                self.fall_back();
                let back = self.unwound.quarantined.is_empty();
                return Some(if back { SaveEvent::Recovered } else { SaveEvent::Unrecoverable });
            }
            SaveCommand::Release | SaveCommand::Discard | SaveCommand::Quarantine => {
                self.release();
                return None;
            }
            // Not in a plan with automatic cutover and without a hold.
            SaveCommand::AwaitCutover | SaveCommand::AwaitResume | SaveCommand::MarkInconsistent => {
                self.unwound
                    .blame(Cause::Other("the plan asks for a caller to wait for, and there is none".into()));
                (Err(Noted), SaveEvent::Failed)
            }
        };
        Some(if done.is_ok() { event } else { SaveEvent::Failed })
    }

    fn pre_copy(&mut self) -> Result<(), Noted> {
        for seat in 0..self.seats.len() {
            self.begin(seat, SaveMode::PreCopy)?;
        }
        let mut pause = PAUSES.0;
        loop {
            let mut left = Vec::with_capacity(self.seats.len());
            for seat in 0..self.seats.len() {
                left.push(self.pre_copy_some(seat)?);
            }
            match self.policy.decide(&left, self.now().saturating_sub(self.begun)) {
                Decision::CutOver => {
                    self.precopy_bytes = self.seats.iter().map(|seat| seat.bytes).sum();
                    return Ok(());
                }
                Decision::Continue => {}
                Decision::GiveUp => {
                    let limit = self.policy.downtime_limit;
                    let reason =
                        format!("pre-copy did not bring the predicted downtime under {limit:?} in time");
                    self.unwound.blame(Cause::Other(reason.into()));
                    return Err(Noted);
                }
            }
            if left.iter().all(|left| left.nothing_now) {
                if let Some(seat) = self.seats.first() {
                    seat.lane.executor().pause(pause);
                }
                pause = (pause * 2).min(PAUSES.1);
            } else {
                pause = PAUSES.0;
            }
        }
    }

    /// Reads one batch while the device runs, and says what is left.
    fn pre_copy_some(&mut self, seat: usize) -> Result<Left, Noted> {
        let (begun, copied) = (self.now(), self.seats[seat].bytes);
        let then = self.read_batch(seat)?;
        let (precopy, nothing_now): (Option<PrecopyInfo>, bool) = match then {
            Then::More(info) => (info, false),
            Then::NothingNow(info) => (info, true),
            Then::End => (None, true),
            Then::Failed(error) => return Err(self.fail_device(seat, error)),
        };
        if self.seats[seat].bytes > copied {
            let took = self.now().saturating_sub(begun);
            self.seats[seat].copying += took;
        }
        let stop_copy = self.call(seat, Call::DataSize, Driver::data_size)?.unwrap_or(DataSize::Unknown);
        let Seat { bytes: copied_bytes, copying, .. } = self.seats[seat];
        Ok(Left { precopy, stop_copy, nothing_now, copied_bytes, copying })
    }

    fn quiesce(&mut self) -> Result<(), Noted> {
        let peers = self.peers();
        for index in 0..self.seats.len() {
            match self.take(index) {
                Hold::Saving(session) => {
                    let hold = self.step(index, Call::SetState(State::PreCopyP2p), move |driver| {
                        driver.quiesce(&session).map(|()| Hold::Saving(session))
                    })?;
                    self.seats[index].hold = hold;
                }
                Hold::Nothing | Hold::Quiesced(_) | Hold::Stopped(_) => {
                    self.ask_size(index)?;
                    let hold = self.step(index, Call::SetState(State::RunningP2p), move |driver| {
                        driver.quiesce_running(peers).map(Hold::Quiesced)
                    })?;
                    self.seats[index].hold = hold;
                }
            }
        }
        Ok(())
    }

    fn enter_stop_copy(&mut self) -> Result<(), Noted> {
        self.stopping = Some(self.now());
        let call = Call::SetState(State::StopCopy);
        for index in 0..self.seats.len() {
            let hold = match self.take(index) {
                Hold::Saving(mut session) => self.step(index, call, move |driver| {
                    driver.stop_copy(&mut session).map(|()| Hold::Saving(session))
                })?,
                Hold::Quiesced(quiesced) => self
                    .step(index, call, move |driver| driver.stop_copy_quiesced(quiesced).map(Hold::Saving))?,
                Hold::Nothing | Hold::Stopped(_) => {
                    self.begin(index, SaveMode::StopCopy)?;
                    continue;
                }
            };
            self.seats[index].hold = hold;
        }
        Ok(())
    }

    fn drain(&mut self) -> Result<(), Noted> {
        for index in 0..self.seats.len() {
            loop {
                match self.read_batch(index)? {
                    Then::More(_) | Then::NothingNow(_) => {}
                    Then::End => break,
                    Then::Failed(error) => return Err(self.fail_device(index, error)),
                }
            }
        }
        Ok(())
    }

    fn park(&mut self) -> Result<(), Noted> {
        for index in 0..self.seats.len() {
            if let Hold::Saving(session) = self.take(index) {
                let hold = self.step(index, Call::SetState(State::Stop), |driver| {
                    driver.finish_save(session).map(Hold::Stopped)
                })?;
                self.seats[index].hold = hold;
            }
        }
        Ok(())
    }

    fn seal(&mut self) -> Result<(), Noted> {
        let config: Vec<Option<ConfigCapture>> = self
            .seats
            .iter()
            .map(|seat| match &seat.hold {
                Hold::Stopped(stopped) => stopped.config().copied(),
                Hold::Nothing | Hold::Quiesced(_) | Hold::Saving(_) => None,
            })
            .collect();
        self.sink.seal(&config).map_err(|error| {
            self.unwound.blame(Cause::Other(error));
            Noted
        })
    }

    /// Every device to RUNNING_P2P before any to RUNNING, where the plan has the barrier.
    fn resume(&mut self) -> Result<(), Noted> {
        if self.plan.barrier {
            for index in 0..self.seats.len() {
                if let Hold::Stopped(stopped) = self.take(index) {
                    let hold = self.step(index, Call::SetState(State::RunningP2p), |driver| {
                        driver.resume_p2p(&stopped).map(|()| Hold::Stopped(stopped))
                    })?;
                    self.seats[index].hold = hold;
                }
            }
        }
        for index in 0..self.seats.len() {
            if let Hold::Stopped(stopped) = self.take(index) {
                self.step(index, Call::SetState(State::Running), |driver| driver.resume(stopped))?;
            }
        }
        Ok(())
    }

    fn fall_back(&mut self) {
        let reason = match &self.unwound.cause {
            Some(cause) => cause.to_string(),
            None => "the operation was given up".to_owned(),
        };
        let cause = || DeviceError::GivenUp { reason: reason.clone() };
        // Back as they came: no device runs freely while a peer is still stopped.
        if self.peers() == Peers::Barrier {
            for seat in &mut self.seats {
                seat.hold = Hold::Nothing;
                let cause = cause();
                let call = Call::SetState(State::RunningP2p);
                let ended = seat.lane.call(call, move |driver| driver.abort_to_barrier(cause));
                self.unwound.device(seat.lane, ended);
            }
        }
        for seat in &mut self.seats {
            seat.hold = Hold::Nothing;
            let cause = cause();
            let ended = seat.lane.call(Call::SetState(State::Running), move |driver| driver.abort(cause));
            self.unwound.device(seat.lane, ended);
        }
    }

    /// The end: devices that stay stopped are let go of where they are.
    fn release(&mut self) {
        self.ended = self.now();
        for seat in &mut self.seats {
            if let Hold::Stopped(stopped) = std::mem::replace(&mut seat.hold, Hold::Nothing)
                && self.plan.after == AfterSave::StayStopped
            {
                // Only a hung lane or a foreign session could refuse, and there is nothing to be done about either.
                let _ = seat.lane.call(Call::SetState(State::Stop), |driver| driver.leave_stopped(stopped));
            }
        }
    }

    fn begin(&mut self, index: usize, mode: SaveMode) -> Result<(), Noted> {
        self.ask_size(index)?;
        let call = match mode {
            SaveMode::PreCopy => Call::SetState(State::PreCopy),
            SaveMode::StopCopy => Call::SetState(State::StopCopy),
        };
        let peers = self.peers();
        let session = self.step(index, call, move |driver| driver.begin_save(mode, peers))?;
        self.seats[index].hold = Hold::Saving(session);
        Ok(())
    }

    /// Asks how much state there is, once, for the size of the chunks. A device that does not say still works.
    fn ask_size(&mut self, index: usize) -> Result<(), Noted> {
        if self.seats[index].pool.is_none() {
            let size = self.call(index, Call::DataSize, Driver::data_size)?.unwrap_or(DataSize::Unknown);
            self.seats[index].pool = Some(ChunkPool::new(chunk_bytes_for(size), POOL_KEEP));
        }
        Ok(())
    }

    /// Reads on until something follows that is to be decided on: while pre-copying after every batch, else at the end.
    /// Chunks are handed on while the next batch is being read.
    fn read_batch(&mut self, index: usize) -> Result<Then, Noted> {
        let Hold::Saving(session) = self.take(index) else {
            return Err(self.fail_device(index, DeviceError::Undrained));
        };
        let lane = self.seats[index].lane;
        let pool = self.seats[index].pool.clone().unwrap_or_else(|| ChunkPool::new(0, POOL_KEEP));
        let mut reading = lane.start_batch(session, &pool);
        loop {
            let read = reading.wait();
            let (session, Batch { chunks, then }) = self.unless_hung(index, read)?;
            if session.is_precopying() || !matches!(then, Then::More(_)) {
                self.seats[index].hold = Hold::Saving(session);
                self.hand_on(index, chunks)?;
                return Ok(then);
            }
            reading = lane.start_batch(session, &pool);
            self.hand_on(index, chunks)?;
        }
    }

    fn hand_on(&mut self, index: usize, chunks: Vec<Bytes>) -> Result<(), Noted> {
        for bytes in chunks {
            self.seats[index].bytes = self.seats[index].bytes.saturating_add(bytes.len() as u64);
            if let Err(error) = self.sink.chunk(index, bytes) {
                self.unwound.blame(Cause::Other(error));
                return Err(Noted);
            }
        }
        Ok(())
    }

    fn take(&mut self, index: usize) -> Hold {
        std::mem::replace(&mut self.seats[index].hold, Hold::Nothing)
    }

    /// A step of the driver; where it fails, the driver has already brought its device back or quarantined it.
    fn step<T: Send + 'static>(
        &mut self,
        index: usize,
        call: Call,
        work: impl FnOnce(&mut Driver) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Noted> {
        let lane = self.seats[index].lane;
        match lane.call(call, work) {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(failure)) => {
                self.unwound.device(lane, Ok(failure));
                Err(Noted)
            }
            Err(hung) => {
                self.unwound.device(lane, Err(hung));
                Err(Noted)
            }
        }
    }

    fn call<T: Send + 'static>(
        &mut self,
        index: usize,
        call: Call,
        work: impl FnOnce(&mut Driver) -> T + Send + 'static,
    ) -> Result<T, Noted> {
        let done = self.seats[index].lane.call(call, work);
        self.unless_hung(index, done)
    }

    fn unless_hung<T>(&mut self, index: usize, done: Result<T, Hung>) -> Result<T, Noted> {
        let lane = self.seats[index].lane;
        done.map_err(|hung| {
            self.unwound.device(lane, Err(hung));
            Noted
        })
    }

    fn fail_device(&mut self, index: usize, failure: DeviceError) -> Noted {
        self.unwound.blame(Cause::Device { device: self.seats[index].lane.identity().clone(), failure });
        Noted
    }

    fn lost_track(mut self, state: SaveState, event: Option<SaveEvent>) -> OperationError {
        let reason = format!("the save in {state} has no use for {event:?}; please report this as a defect");
        self.unwound.blame(Cause::Other(reason.into()));
        self.fall_back();
        self.unwound.into_error()
    }

    fn report(&self) -> SaveReport {
        SaveReport {
            plan: self.plan,
            bytes: self.seats.iter().map(|seat| seat.bytes).collect(),
            precopy_bytes: self.precopy_bytes,
            downtime: self.stopping.map_or(Duration::ZERO, |since| self.ended.saturating_sub(since)),
            took: self.ended.saturating_sub(self.begun),
        }
    }
}
