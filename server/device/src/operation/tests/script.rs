//! Something happens at one exact place of an operation: a cancel, a crash, or a move that cannot be recorded.
//!
//! ```text
//!   operation -- job --> lane ----.
//!             -- moved --> caller -+--> place 0, 1, 2, ...   at the chosen one: it happens
//!             -- chunk --> sink --'
//! ```
//! A place is a job of a lane before it runs, a move before and after it is recorded, a call of a sink or a source, or the
//! question whether a hand-over may be committed. Everything else of a run on [`Inline`] happens between two of these, so a test that goes through all places goes
//! through all that can be interrupted.
//!
//! Time stands still while anything is under way, and then goes on to what is due first.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, pending, ready};

use super::node::Memory;
use super::watch::{Side, Watch};
use crate::executor::Job;
use crate::operation::{
    Arrival, BoxError, Caller, OperationStep, Progress, Settled, StateSink, StateSource, Word,
};
use crate::sim::SimDevice;
use crate::{Clock, ConfigCapture, Executor, Inline, Lane, Rearm};
use vfio_checkpoint_fsm::State;

/// How long a delay is.
pub(crate) const DELAY: Duration = Duration::from_secs(10);

/// What happens at the place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum What {
    Nothing,
    /// The caller cancels while the lane has not begun the job, or the sink has not answered.
    Cancel,
    /// The process dies: nothing runs any more.
    Crash,
    /// A move cannot be recorded. Counts moves only.
    FailMove,
    /// It takes [`DELAY`] until the lane begins the job, or the sink or the caller answers.
    Delay,
}

#[derive(Debug, Default)]
#[allow(clippy::struct_excessive_bools, reason = "each is something that was said or has happened")]
struct Run {
    at: usize,
    passed: usize,
    happened: bool,
    /// How many moves were recorded when it happened.
    recorded_before: usize,
    crashed: bool,
    cancelled: bool,
    /// The operation has ended: closing its devices is no place of it.
    over: bool,
    /// A call of a sink or a source is under way: time stands still.
    busy: bool,
    cutover: bool,
    resume: bool,
    /// When a hand-over may be committed, by the clock.
    commit_at: Option<Duration>,
    /// When those that wait want to be asked again.
    due: Vec<Duration>,
    /// Cutover is said once this many progress reports came.
    cutover_after: Option<usize>,
    progress: usize,
    predicted: Option<Duration>,
    journal: Vec<OperationStep>,
}

/// One run with something at one place.
#[derive(Clone)]
pub(crate) struct Script {
    what: What,
    run: Arc<Mutex<Run>>,
    jobs: Arc<Mutex<VecDeque<Job>>>,
    pub(crate) inline: Inline,
    pub(crate) watch: Watch,
}

impl std::fmt::Debug for Script {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Script").field("what", &self.what).finish_non_exhaustive()
    }
}

impl Script {
    pub(crate) fn new(what: What, at: usize) -> Self {
        let run = Run { at, ..Run::default() };
        let (run, jobs) = (Arc::new(Mutex::new(run)), Arc::default());
        Self { what, run, jobs, inline: Inline::new(7), watch: Watch::default() }
    }

    pub(crate) fn quiet() -> Self {
        Self::new(What::Nothing, 0)
    }

    pub(crate) fn cutover(self) -> Self {
        self.run().cutover = true;
        self
    }

    pub(crate) fn cutover_after(self, reports: usize) -> Self {
        self.run().cutover_after = Some(reports);
        self
    }

    pub(crate) fn resume(self) -> Self {
        self.run().resume = true;
        self
    }

    /// Commit is said at this time of the clock.
    pub(crate) fn commit_at(self, at: Duration) -> Self {
        self.run().commit_at = Some(at);
        self
    }

    /// What comes after another one that died: the hardware and the destination are the same.
    pub(crate) fn after(self, died: &Self) -> Self {
        Self { watch: died.watch.clone(), ..self }
    }

    fn run(&self) -> MutexGuard<'_, Run> {
        self.run.lock().unwrap()
    }

    /// Whether the place was reached.
    pub(crate) fn happened(&self) -> bool {
        self.run().happened
    }

    pub(crate) fn recorded_before(&self) -> usize {
        self.run().recorded_before
    }

    pub(crate) fn journal(&self) -> Vec<OperationStep> {
        self.run().journal.clone()
    }

    pub(crate) fn reports(&self) -> (usize, Option<Duration>) {
        let run = self.run();
        (run.progress, run.predicted)
    }

    /// Whether this is the place; a crash or a cancel has happened then.
    fn place(&self) -> bool {
        self.watch.look(self.now());
        let mut run = self.run();
        if run.over {
            return false;
        }
        let here = run.passed == run.at && self.what != What::Nothing;
        run.passed += 1;
        if here {
            run.happened = true;
            run.recorded_before = run.journal.len();
            run.cancelled = self.what == What::Cancel;
            run.crashed = self.what == What::Crash;
            if self.what == What::Delay {
                self.inline.pause(DELAY);
            }
        }
        here
    }

    async fn pass(&self) {
        if self.what == What::FailMove || !self.place() {
            return;
        }
        if self.what == What::Crash {
            pending::<()>().await;
        }
        self.run().busy = true;
        let mut yielded = false;
        poll_fn(|_| if std::mem::replace(&mut yielded, true) { Poll::Ready(()) } else { Poll::Pending })
            .await;
        self.run().busy = false;
    }

    fn run_jobs(&self) {
        while !self.run().crashed {
            let Some(job) = self.jobs.lock().unwrap().pop_front() else { break };
            job();
            self.watch.look(self.now());
        }
    }

    /// Polls an operation to its end. `None`: the process died, where it waits for ever.
    pub(crate) fn poll<F: Future>(&self, operation: F) -> Option<F::Output> {
        self.run().over = false;
        let mut operation = pin!(operation);
        let mut context = Context::from_waker(Waker::noop());
        for turn in 0..1000 {
            self.run().due.clear();
            if let Poll::Ready(end) = operation.as_mut().poll(&mut context) {
                self.run().over = true;
                return Some(end);
            }
            if self.run().crashed {
                return None;
            }
            self.watch.look(self.now());
            let idle = self.jobs.lock().unwrap().is_empty() && !self.run().busy;
            let first = self.run().due.iter().min().copied();
            if idle && let Some(first) = first {
                self.inline.pause(first.saturating_sub(self.now()));
            } else if idle && self.watch.is_silent() {
                return None;
            }
            // The operation hears of a cancel before the lane goes on.
            if turn % 2 == 1 {
                self.run_jobs();
            }
        }
        panic!("it does not end; the last steps were {:?}", self.journal());
    }
}

impl Clock for Script {
    fn now(&self) -> Duration {
        self.inline.now()
    }
}

impl Executor for Script {
    fn lane(&self, _name: &str) -> std::io::Result<Box<dyn Lane>> {
        Ok(Box::new(self.clone()))
    }

    fn pause(&self, duration: Duration) {
        self.inline.pause(duration);
    }

    /// Ends when it is due, and time does not go on while a lane is at work.
    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        let script = self.clone();
        let due = self.now().saturating_add(duration);
        poll_fn(move |_| {
            if script.now() >= due && !script.run().crashed {
                return Poll::Ready(());
            }
            script.run().due.push(due);
            Poll::Pending
        })
        .boxed()
    }

    fn random(&self) -> u64 {
        self.inline.random()
    }
}

impl Lane for Script {
    fn submit(&self, job: Job) {
        self.run().busy = false;
        let here = self.what != What::FailMove && self.place();
        if !here {
            self.run_jobs();
        }
        self.jobs.lock().unwrap().push_back(job);
        if !here {
            self.run_jobs();
        }
    }
}

impl Caller for Script {
    fn cutover(&self) -> BoxFuture<'_, ()> {
        if self.run().cutover { ready(()).boxed() } else { pending().boxed() }
    }

    fn resume(&self) -> BoxFuture<'_, ()> {
        if self.run().resume { ready(()).boxed() } else { pending().boxed() }
    }

    fn commit(&self) -> BoxFuture<'_, ()> {
        async {
            self.pass().await;
            let at = self.run().commit_at;
            match at {
                Some(at) => self.sleep(at.saturating_sub(self.now())).await,
                None => pending().await,
            }
        }
        .boxed()
    }

    fn cancelled(&self) -> BoxFuture<'_, BoxError> {
        poll_fn(|_| {
            let cancelled = self.run().cancelled;
            if cancelled { Poll::Ready("somebody changed their mind".into()) } else { Poll::Pending }
        })
        .boxed()
    }

    fn moved(&self, step: OperationStep) -> BoxFuture<'_, Result<(), BoxError>> {
        async move {
            if self.what == What::FailMove && self.place() {
                return Err("the disk of the journal is full".into());
            }
            self.watch.moves(step, self.now());
            self.pass().await;
            self.run().journal.push(step);
            self.watch.moved(step);
            self.pass().await;
            Ok(())
        }
        .boxed()
    }

    fn progress(&self, progress: &Progress<'_>) {
        let mut run = self.run();
        run.progress += 1;
        run.predicted = progress.predicted_downtime.or(run.predicted);
        if run.cutover_after.is_some_and(|after| run.progress >= after) {
            run.cutover = true;
        }
        assert!(!progress.devices.is_empty());
    }
}

/// State in memory, whose calls are places too.
pub(crate) struct Scripted {
    pub(crate) script: Script,
    pub(crate) memory: Memory,
    /// None of them may run while the checkpoint is being marked.
    pub(crate) slots: Vec<SimDevice>,
}

impl StateSink for Scripted {
    async fn chunk(&mut self, device: usize, bytes: Bytes) -> Result<(), BoxError> {
        self.script.pass().await;
        self.memory.chunk(device, bytes).await
    }

    async fn seal(&mut self, config: &[Option<ConfigCapture>]) -> Result<(), BoxError> {
        self.script.pass().await;
        self.memory.seal(config).await?;
        self.script.pass().await;
        Ok(())
    }

    async fn mark_inconsistent(&mut self) -> Result<(), BoxError> {
        self.script.pass().await;
        assert!(self.slots.iter().all(|slot| slot.state() == State::Stop), "marked before any device runs");
        self.memory.mark_inconsistent().await
    }

    async fn settle(&mut self, word: Word) -> Settled {
        let takes = self.script.watch.asked(word);
        self.script.pass().await;
        let side = self.script.watch.decide(word);
        self.script.pass().await;
        match takes {
            Some(takes) => self.script.sleep(takes).await,
            None => pending().await,
        }
        match side {
            Side::There => Settled::There,
            Side::Here => Settled::Here("its devices are broken".into()),
        }
    }

    async fn discard(&mut self) -> Result<(), BoxError> {
        self.script.watch.look(self.script.now());
        self.memory.discard().await
    }
}

impl StateSource for Scripted {
    async fn next(&mut self) -> Result<Option<Arrival>, BoxError> {
        self.script.pass().await;
        self.memory.next().await
    }

    async fn ready(&mut self, rearm: &[Option<Rearm>]) -> Result<(), BoxError> {
        self.script.pass().await;
        StateSource::ready(&mut self.memory, rearm).await
    }
}
