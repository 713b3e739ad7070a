//! The simulated hardware of a source and what its destination says, watched all through a hand-over.
//!
//! ```text
//!   script -- a place, a job, a move --> Watch --> hardware: state, resets, what it carries
//!   sink ----- settle -----------------> Watch --> destination: decides once, and answers
//! ```
//! # Invariants
//! Whatever happens, and asserted at every place:
//! - A device that carries its state does not run once the destination does.
//! - A device keeps its state, and is not reset, until the destination runs it.
//! - No device runs between the record that the hand-over is to be committed and the destination's refusal.
//! - The destination is told to run the devices only with that record, and while all of them stand still.
//! - That decision is not made once the devices were stopped for too long.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use vfio_checkpoint_fsm::{SaveState, State};

use super::node::Node;
use crate::operation::{OperationStep, Word};
use crate::sim::SimDevice;

/// Who has the devices in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    There,
    Here,
}

#[derive(Debug, Default)]
struct Watched {
    slots: Vec<SimDevice>,
    /// Devices that somebody else has moved: they are not this hand-over's doing.
    meddled: bool,
    /// A stop limit that must hold.
    stop_limit: Option<Duration>,
    /// When the first device was seen to stand still.
    stopped: Option<Duration>,
    /// The last move that is durable.
    last: Option<SaveState>,
    /// Whether it is, or was, on record that the hand-over is to be committed.
    decided: bool,
    /// What the destination would say, after how long; after for ever where that is none.
    inclined: Option<Side>,
    takes: Option<Duration>,
    verdict: Option<Side>,
    asked: Vec<Word>,
}

/// Shared by all that take part, in every life of the process.
#[derive(Clone, Default)]
pub(crate) struct Watch(Arc<Mutex<Watched>>);

/// What a device carries that no other does, and none after a reset.
fn mark(index: usize) -> u64 {
    0xC0_FFEE + index as u64
}

impl Watch {
    fn watched(&self) -> MutexGuard<'_, Watched> {
        self.0.lock().unwrap()
    }

    /// Watches the devices of a node from now on. Says what they carry, and what they would carry after a reset.
    pub(crate) fn begin(&self, node: &Node, inclined: Side) -> (Vec<[u8; 32]>, Vec<[u8; 32]>) {
        let blank = node.digests();
        for (index, slot) in node.slots.iter().enumerate() {
            slot.set_scratch(mark(index));
        }
        let mut watched = self.watched();
        watched.slots.clone_from(&node.slots);
        watched.inclined = Some(inclined);
        watched.takes = Some(Duration::ZERO);
        drop(watched);
        (node.digests(), blank)
    }

    pub(crate) fn stop_limit(&self, limit: Duration) {
        self.watched().stop_limit = Some(limit);
    }

    /// How long the destination takes to answer from now on. Without it, it never does.
    pub(crate) fn answers_after(&self, takes: Option<Duration>) {
        self.watched().takes = takes;
    }

    pub(crate) fn meddled(&self) {
        self.watched().meddled = true;
    }

    pub(crate) fn verdict(&self) -> Option<Side> {
        self.watched().verdict
    }

    pub(crate) fn words(&self) -> Vec<Word> {
        self.watched().asked.clone()
    }

    /// Whether the destination was asked and does not answer.
    pub(crate) fn is_silent(&self) -> bool {
        let watched = self.watched();
        !watched.asked.is_empty() && watched.takes.is_none()
    }

    /// A move is about to be recorded.
    pub(crate) fn moves(&self, step: OperationStep, now: Duration) {
        let watched = self.watched();
        if let (Some(limit), Some(stopped), OperationStep::Save(SaveState::Committing), false) =
            (watched.stop_limit, watched.stopped, step, watched.decided)
        {
            let took = now.saturating_sub(stopped);
            assert!(took <= limit, "to be committed after {took:?}, although {limit:?} were allowed");
        }
    }

    /// A move is durable.
    pub(crate) fn moved(&self, step: OperationStep) {
        if let OperationStep::Save(state) = step {
            let mut watched = self.watched();
            watched.last = Some(state);
            watched.decided |= state == SaveState::Committing;
        }
    }

    /// The destination is asked.
    pub(crate) fn asked(&self, word: Word) -> Option<Duration> {
        let mut watched = self.watched();
        assert_eq!(watched.last, Some(SaveState::Committing), "asked without a record");
        match word {
            Word::Commit => {
                let states: Vec<State> = watched.slots.iter().map(SimDevice::state).collect();
                assert!(states.iter().all(|state| *state == State::Stop), "told to run in {states:?}");
            }
            Word::Withdraw => assert!(watched.meddled, "asked for devices that nobody has moved"),
        }
        watched.asked.push(word);
        watched.takes
    }

    /// It has heard, and its first decision stays.
    pub(crate) fn decide(&self, word: Word) -> Side {
        let mut watched = self.watched();
        let would = match word {
            Word::Commit => watched.inclined.expect("a destination"),
            Word::Withdraw => Side::Here,
        };
        *watched.verdict.get_or_insert(would)
    }

    /// The destination decided so while nobody asked, or had not heard at all.
    pub(crate) fn heard(&self, verdict: Option<Side>) {
        self.watched().verdict = verdict;
    }

    /// Looks whether all is as it must be.
    pub(crate) fn look(&self, now: Duration) {
        let mut watched = self.watched();
        if watched.stopped.is_none() && watched.slots.iter().any(|slot| !slot.state().is_running()) {
            watched.stopped = Some(now);
        }
        if watched.meddled {
            return;
        }
        for (index, slot) in watched.slots.iter().enumerate() {
            let (state, carries, resets) = (slot.state(), slot.scratch() == mark(index), slot.resets());
            let last = watched.last;
            if watched.verdict == Some(Side::There) {
                assert!(!(state.is_running() && carries), "two copies run, after {last:?}");
            } else {
                assert!(carries && resets == 0, "lost before it ran anywhere else, after {last:?}");
                let doubtful = watched.decided && watched.verdict.is_none();
                assert!(!(doubtful && state.is_running()), "it may run elsewhere already, after {last:?}");
            }
        }
    }
}
