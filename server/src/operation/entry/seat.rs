//! Where the stream of an operation arrives, and where it comes back.
//!
//! ```text
//!   Waiting --attach--> Taken --open_for_resumption--> Resumable --complete--> Complete
//!                         |                              |  ^ resume             ^ resume: told so again
//!                         '-- no giver of version 2      '--> Lost: the operation gives it up
//! ```
//! Invariants: a stream is resumed by whoever opened it, by its id, and by nobody else. What was complete stays so, also
//! where the operation is over: its giver may not have heard it.

use std::fmt;
use std::sync::{Arc, PoisonError, Weak};

use tokio::sync::oneshot;
use vfio_checkpoint_proto::ids::StreamId;

use super::{Entry, Refused};
use crate::transfer::{Attached, Completed, Relinks};

#[derive(Debug)]
pub(super) enum StreamSeat {
    Waiting(oneshot::Sender<Attached>),
    Taken,
    /// Its giver may come back.
    Resumable {
        id: Opener,
        relinks: Arc<Relinks>,
    },
    /// All of it was taken.
    Complete {
        id: Opener,
        completed: Completed,
    },
    /// The operation takes nothing more from it.
    Lost {
        id: Opener,
    },
    /// The operation's state is kept in a store.
    None,
}

/// Which stream, and who opened it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opener {
    /// The stream.
    pub stream: StreamId,
    /// The identity of whoever opened it.
    pub identity: String,
}

/// A stream that can be resumed, for as long as its operation takes from it.
#[derive(Debug)]
pub struct Reserved {
    entry: Arc<Entry>,
    /// Where its connections arrive.
    pub relinks: Arc<Relinks>,
}

impl Entry {
    /// Hands over the operation's stream, once.
    pub fn attach(&self, attached: Attached) -> Result<(), Refused> {
        if self.is_done() {
            return Err(Refused::Over);
        }
        let mut seat = self.seat.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(*seat, StreamSeat::Waiting(_)) {
            return match std::mem::replace(&mut *seat, StreamSeat::Taken) {
                // A task that is gone has ended the operation meanwhile.
                StreamSeat::Waiting(waiting) => waiting.send(attached).map_err(|_| Refused::Over),
                StreamSeat::Taken
                | StreamSeat::Resumable { .. }
                | StreamSeat::Complete { .. }
                | StreamSeat::Lost { .. }
                | StreamSeat::None => Err(Refused::StreamTaken),
            };
        }
        Err(if matches!(*seat, StreamSeat::None) { Refused::NoStream } else { Refused::StreamTaken })
    }

    /// From now on this stream of the operation can be resumed.
    pub fn reserve(self: &Arc<Self>, id: Opener) -> Reserved {
        let relinks = Arc::new(Relinks::default());
        let seat = StreamSeat::Resumable { id, relinks: Arc::clone(&relinks) };
        *self.seat.lock().unwrap_or_else(PoisonError::into_inner) = seat;
        Reserved { entry: Arc::clone(self), relinks }
    }

    /// Hands over another connection of the operation's stream, which is `id`. What is returned has to be done, and may
    /// take as long as the giver takes to hear it.
    pub fn resume_stream(
        &self,
        id: &Opener,
        attached: Attached,
    ) -> Result<Option<impl Future<Output = ()> + Send + 'static + use<>>, Refused> {
        let seat = self.seat.lock().unwrap_or_else(PoisonError::into_inner);
        match &*seat {
            StreamSeat::Complete { id: of, completed } if of == id => Ok(Some(completed.tell(attached))),
            StreamSeat::None => Err(Refused::NoStream),
            StreamSeat::Waiting(_)
            | StreamSeat::Taken
            | StreamSeat::Resumable { .. }
            | StreamSeat::Complete { .. }
            | StreamSeat::Lost { .. }
                if self.is_done() =>
            {
                Err(Refused::Over)
            }
            StreamSeat::Resumable { id: of, relinks } if of == id => {
                relinks.put(attached);
                Ok(None)
            }
            StreamSeat::Lost { id: of } if of == id => Err(Refused::Undone),
            StreamSeat::Waiting(_)
            | StreamSeat::Taken
            | StreamSeat::Resumable { .. }
            | StreamSeat::Complete { .. }
            | StreamSeat::Lost { .. } => Err(Refused::OtherStream),
        }
    }
}

impl Reserved {
    /// All of the stream was taken, and its giver was told so. Whoever did not hear it is told again. Returns whoever
    /// asked just before.
    pub fn complete(
        &self,
        completed: Completed,
    ) -> Option<impl Future<Output = ()> + Send + 'static + use<>> {
        let mut seat = self.entry.seat.lock().unwrap_or_else(PoisonError::into_inner);
        let late = self.relinks.take().map(|attached| completed.tell(attached));
        if let StreamSeat::Resumable { id, .. } = &*seat {
            *seat = StreamSeat::Complete { id: id.clone(), completed };
        }
        late
    }
}

impl Reserved {
    /// What ends the memory of a stream that was complete: it holds a manifest, and its operation is remembered for long.
    pub fn forgetting(&self) -> Forgetting {
        Forgetting(Arc::downgrade(&self.entry))
    }
}

/// See [`Reserved::forgetting`].
#[derive(Debug)]
pub struct Forgetting(Weak<Entry>);

impl Forgetting {
    /// From now on the stream is over as any other.
    pub fn forget(&self) {
        if let Some(entry) = self.0.upgrade() {
            let mut seat = entry.seat.lock().unwrap_or_else(PoisonError::into_inner);
            if matches!(*seat, StreamSeat::Complete { .. }) {
                *seat = StreamSeat::Taken;
            }
        }
    }
}

impl Drop for Reserved {
    /// Whoever comes now comes in vain, unless all was taken.
    fn drop(&mut self) {
        let mut seat = self.entry.seat.lock().unwrap_or_else(PoisonError::into_inner);
        if let StreamSeat::Resumable { id, .. } = &*seat {
            *seat = StreamSeat::Lost { id: id.clone() };
        }
        drop(self.relinks.take());
    }
}

impl fmt::Display for Opener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", self.stream, self.identity)
    }
}
