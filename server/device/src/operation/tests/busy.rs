//! A device that is at work for long: whoever gives the state is told so meanwhile.
//!
//! ```text
//!   first chunk -> lane: held back -> second chunk -> StateSource::busy lets the lane go on -> all is written
//! ```

use std::convert::Infallible;
use std::pin::pin;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, pending};
use futures_util::task::noop_waker;

use super::*;
use crate::executor::Job;
use crate::operation::{self, Alone, RestoreTerms};
use crate::{Clock, Inline, Lane};

/// An executor that holds back what its lanes are given while it is told to. Nothing is late meanwhile.
#[derive(Debug, Clone)]
struct Gate {
    inline: Inline,
    is_closed: Arc<AtomicBool>,
    held: Arc<Mutex<Vec<HeldJob>>>,
}

struct HeldJob(Job);

impl std::fmt::Debug for HeldJob {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("HeldJob")
    }
}

impl Gate {
    fn open(&self) {
        self.is_closed.store(false, Ordering::Relaxed);
        let held = std::mem::take(&mut *self.held.lock().unwrap());
        for HeldJob(job) in held {
            job();
        }
    }
}

impl Lane for Gate {
    fn submit(&self, job: Job) {
        self.held.lock().unwrap().push(HeldJob(job));
        if !self.is_closed.load(Ordering::Relaxed) {
            self.open();
        }
    }
}

impl Clock for Gate {
    fn now(&self) -> Duration {
        self.inline.now()
    }
}

impl Executor for Gate {
    fn lane(&self, _name: &str) -> std::io::Result<Box<dyn Lane>> {
        Ok(Box::new(self.clone()))
    }

    fn pause(&self, duration: Duration) {
        self.inline.pause(duration);
    }

    fn sleep(&self, _duration: Duration) -> BoxFuture<'static, ()> {
        pending().boxed()
    }

    fn random(&self) -> u64 {
        self.inline.random()
    }
}

/// Has the device work for long on the first chunk.
struct Source {
    memory: Memory,
    gate: Gate,
    chunks: usize,
    was_busy: bool,
}

impl StateSource for Source {
    async fn next(&mut self) -> Result<Option<Arrival>, BoxError> {
        let arrival = self.memory.next().await;
        if let Ok(Some(Arrival::Chunk { .. })) = &arrival {
            self.chunks += 1;
            if self.chunks == 1 {
                self.gate.is_closed.store(true, Ordering::Relaxed);
            }
        }
        arrival
    }

    async fn busy(&mut self) -> Infallible {
        assert_eq!(self.chunks, 2, "the next chunk is here already");
        self.was_busy = true;
        self.gate.open();
        pending().await
    }

    async fn ready(&mut self, _rearm: &[Option<Rearm>]) -> Result<(), BoxError> {
        Ok(())
    }
}

#[test]
fn a_source_knows_that_it_waits_for_a_device() {
    let source = Node::new(&configs(1, |_| ()), &[]);
    let mut memory = Memory::new(1);
    save(&source.lanes, RESUME, PrecopyPolicy::default(), &mut memory).unwrap();
    let gate = Gate { inline: Inline::new(7), is_closed: Arc::default(), held: Arc::default() };
    let target = configs(1, |config| config.seed += 100);
    let node = Node::on(Arc::new(gate.clone()), gate.inline.time(), &target, &[]);
    let mut giving = Source { memory: memory.again(), gate, chunks: 0, was_busy: false };
    let restored = {
        let mut restoring =
            pin!(operation::restore(&node.lanes, RestoreTerms::run(READY_LIMIT), &Alone, &mut giving));
        let waker = noop_waker();
        // One that waits for nobody comes to its end.
        (0..1000).find_map(|_| match restoring.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(restored) => Some(restored),
            Poll::Pending => None,
        })
    };
    restored.expect("the source was not told that the device is at work").unwrap();
    assert!(giving.was_busy);
    assert_eq!(node.digests(), source.digests());
}
