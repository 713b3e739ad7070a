//! The streams of a save: pre-copy until the cutover, and batches handed on while the next is being read.

use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::future::{Either, select};
use vfio_checkpoint_fsm::{Cutover, SaveEvent, State};

use super::super::error::Cause;
use super::super::set::Noted;
use super::super::{Decision, Left, StateSink};
use super::{Hold, SaveRun};
use crate::driver::{Driver, SaveMode};
use crate::lane::{BATCH_CHUNKS, Batch, Then};
use crate::pool::chunk_bytes_for;
use crate::{Call, ChunkPool, DataSize, DeviceError};

/// Unused buffers kept for a device: as many as two batches need.
const POOL_KEEP: usize = 2 * BATCH_CHUNKS;
/// First and longest pause when a device has nothing for now; each is twice the one before.
const PAUSES: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(100));
/// How often it is looked at what has arrived: that is a measure of the rate, and may be what is waited for. No device is asked
/// for it, so whoever takes the state does not decide how often one is.
const ARRIVING_PAUSE: Duration = Duration::from_millis(10);

impl<S: StateSink> SaveRun<'_, S> {
    pub(super) async fn pre_copy(&mut self) -> Result<SaveEvent, Noted> {
        for index in 0..self.set.len() {
            self.begin(index, SaveMode::PreCopy).await?;
        }
        let mut pause = PAUSES.0;
        loop {
            let mut left = Vec::with_capacity(self.set.len());
            for index in 0..self.set.len() {
                self.sample();
                left.push(self.pre_copy_some(index).await?);
            }
            self.sample();
            let has_nothing = left.iter().all(|left| left.nothing_now);
            if has_nothing {
                self.delivery.nothing_more();
            }
            // A stop that began now would last for as long as nothing goes over, which nobody can tell.
            let is_down = self.sink.is_down();
            self.predicted_downtime =
                if is_down { None } else { Left::predicted_downtime_of(&left, &self.delivery) };
            self.tell();
            if let Some(event) = self.cutover_now(&left, is_down)? {
                return Ok(self.cut_over(event));
            }
            if has_nothing {
                if let Some(event) = self.rest(pause, &left).await {
                    return Ok(self.cut_over(event));
                }
                pause = (pause * 2).min(PAUSES.1);
            } else {
                pause = PAUSES.0;
            }
        }
    }

    /// Looks at what has arrived of what was given so far.
    fn sample(&mut self) {
        if self.sink.is_down() {
            self.delivery.stand_still();
        } else if let Some(under_way_bytes) = self.sink.under_way() {
            let given_bytes =
                self.progress.iter().fold(0, |sum: u64, device| sum.saturating_add(device.bytes));
            self.delivery.sample(self.set.now(), given_bytes, under_way_bytes);
        }
    }

    fn cut_over(&mut self, event: SaveEvent) -> SaveEvent {
        self.precopy_bytes = self.progress.iter().map(|device| device.bytes).sum();
        event
    }

    /// Whether pre-copy has done enough: by the policy, or by the caller's word alone, whose workload may stand still for it
    /// already.
    fn cutover_now(&mut self, left: &[Left], is_down: bool) -> Result<Option<SaveEvent>, Noted> {
        let (elapsed, policy) = (self.set.elapsed(), self.terms.policy);
        match self.plan.cutover {
            Cutover::Auto => {
                let decision = if is_down {
                    policy.decide_while_down(elapsed)
                } else {
                    policy.decide_on(left, &self.delivery, elapsed)
                };
                match decision {
                    Decision::CutOver => Ok(Some(SaveEvent::CutoverDue)),
                    Decision::Continue => Ok(None),
                    Decision::GiveUp => Err(self.set.fail(Cause::Downtime { limit: policy.downtime_limit })),
                }
            }
            Cutover::Manual if self.caller.cutover().now_or_never().is_some() => Ok(Some(SaveEvent::Cutover)),
            Cutover::Manual if elapsed >= self.terms.cutover_limit => Err(self.no_cutover()),
            Cutover::Manual => Ok(None),
        }
    }

    /// Pauses before the devices are read again, and looks meanwhile at what has arrived. Over sooner where that may be the
    /// end of pre-copy: it is decided on what the devices say then.
    async fn rest(&mut self, pause: Duration, left: &[Left]) -> Option<SaveEvent> {
        let end = self.set.now().saturating_add(pause);
        loop {
            let whole = end.saturating_sub(self.set.now());
            let part = if self.delivery.under_way_bytes() > 0 { whole.min(ARRIVING_PAUSE) } else { whole };
            if let Some(event) = self.pause(part).await {
                return Some(event);
            }
            if part == whole {
                return None;
            }
            self.sample();
            let elapsed = self.set.elapsed();
            let may_be_over = match self.plan.cutover {
                Cutover::Auto => {
                    self.terms.policy.decide_on(left, &self.delivery, elapsed) != Decision::Continue
                }
                Cutover::Manual => elapsed >= self.terms.cutover_limit,
            };
            if may_be_over {
                return None;
            }
        }
    }

    /// Waits a little, unless a cutover that is the caller's comes first.
    async fn pause(&mut self, pause: Duration) -> Option<SaveEvent> {
        match self.plan.cutover {
            Cutover::Auto => {
                self.set.sleep(pause).await;
                None
            }
            Cutover::Manual => {
                let left = self.terms.cutover_limit.saturating_sub(self.set.elapsed());
                self.cutover_within(pause.min(left)).await
            }
        }
    }

    pub(super) async fn await_cutover(&mut self) -> Result<SaveEvent, Noted> {
        match self.cutover_within(self.terms.cutover_limit).await {
            Some(event) => {
                self.await_line().await;
                Ok(event)
            }
            None => Err(self.no_cutover()),
        }
    }

    /// Waits until what is given goes through, before a device stops for it that has run on until now. The sink fails where
    /// that takes too long, and its caller cancels for it.
    pub(super) async fn await_line(&mut self) {
        let mut pause = PAUSES.0;
        while self.sink.is_down() {
            self.set.sleep(pause).await;
            pause = (pause * 2).min(PAUSES.1);
        }
    }

    async fn cutover_within(&mut self, limit: Duration) -> Option<SaveEvent> {
        match select(self.caller.cutover(), self.set.sleep(limit)).await {
            Either::Left(((), _)) => Some(SaveEvent::Cutover),
            Either::Right(((), _)) => None,
        }
    }

    fn no_cutover(&mut self) -> Noted {
        self.set.fail(Cause::NoCutover { limit: self.terms.cutover_limit })
    }

    /// Reads one batch while the device runs, and says what is left.
    async fn pre_copy_some(&mut self, index: usize) -> Result<Left, Noted> {
        let (begun, copied, was_down) = (self.set.now(), self.progress[index].bytes, self.sink.is_down());
        let (precopy, nothing_now) = match self.read_batch(index).await? {
            Then::More(info) => (info, false),
            Then::NothingNow(info) => (info, true),
            Then::End => (None, true),
            Then::Failed(error) => return Err(self.set.fail_device(index, error)),
        };
        let bytes = self.progress[index].bytes.saturating_sub(copied);
        let took = self.set.now().saturating_sub(begun);
        let pace = &mut self.flows[index].pace;
        if was_down || self.sink.is_down() {
            // It went into whatever keeps it meanwhile, or waited for room there.
            pace.read_ahead(bytes, nothing_now);
        } else {
            pace.read(bytes, took, nothing_now);
        }
        let stop_copy = self.ask_size(index).await?;
        self.progress[index].precopy = precopy;
        Ok(Left { precopy, stop_copy, nothing_now, pace: self.flows[index].pace })
    }

    pub(super) async fn begin(&mut self, index: usize, mode: SaveMode) -> Result<(), Noted> {
        self.make_pool(index).await?;
        let call = match mode {
            SaveMode::PreCopy => Call::SetState(State::PreCopy),
            SaveMode::StopCopy => Call::SetState(State::StopCopy),
        };
        let peers = self.peers();
        let session = self.set.step(index, call, move |driver| driver.begin_save(mode, peers)).await?;
        self.set.hold(index, Hold::Saving(session));
        Ok(())
    }

    /// Asks how much state there is, once, for the size of the chunks. A device that does not say still works.
    pub(super) async fn make_pool(&mut self, index: usize) -> Result<(), Noted> {
        if self.flows[index].pool.is_none() {
            let size = self.ask_size(index).await?;
            self.flows[index].pool = Some(ChunkPool::new(chunk_bytes_for(size), POOL_KEEP));
        }
        Ok(())
    }

    async fn ask_size(&mut self, index: usize) -> Result<DataSize, Noted> {
        let asked = self.set.call(index, Call::DataSize, Driver::data_size).await?;
        let size = asked.unwrap_or(DataSize::Unknown);
        self.progress[index].data_size = Some(size);
        Ok(size)
    }

    /// Reads on until something follows that is to be decided on: while pre-copying after every batch, else at the end.
    /// Chunks are handed on while the next batch is being read.
    pub(super) async fn read_batch(&mut self, index: usize) -> Result<Then, Noted> {
        let Hold::Saving(session) = self.set.take(index) else {
            return Err(self.set.fail_device(index, DeviceError::Undrained));
        };
        let lane = self.set.all[index].lane;
        let pool = self.flows[index].pool.clone().unwrap_or_else(|| ChunkPool::new(0, POOL_KEEP));
        let mut reading = lane.start_batch(session, &pool);
        loop {
            let read = reading.finished().await;
            let (session, Batch { chunks, then }) = self.set.unless_hung(index, read)?;
            if session.is_precopying() || !matches!(then, Then::More(_)) {
                self.set.hold(index, Hold::Saving(session));
                self.hand_on(index, chunks).await?;
                return Ok(then);
            }
            reading = lane.start_batch(session, &pool);
            self.hand_on(index, chunks).await?;
        }
    }

    async fn hand_on(&mut self, index: usize, chunks: Vec<Bytes>) -> Result<(), Noted> {
        for bytes in chunks {
            let device = &mut self.progress[index];
            device.bytes = device.bytes.saturating_add(bytes.len() as u64);
            if let Err(error) = self.sink.chunk(index, bytes).await {
                return Err(self.set.fail(Cause::Other(error)));
            }
        }
        self.tell();
        Ok(())
    }
}
