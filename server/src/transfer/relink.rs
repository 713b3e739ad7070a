//! How a stream that is resumed gets to the operation that it is of.
//!
//! ```text
//!   StreamState{resume} --> Seat --put--> Relinks (one place: the latest) --next--> WireSource
//! ```
//! Invariants: there is one place. Whoever resumes once more displaces whoever was not looked at yet; that one's call ends
//! without an answer.

use std::sync::{Mutex, PoisonError};

use tokio::sync::Notify;
use vfio_checkpoint_client::transfer::{Link, say_complete};
use vfio_checkpoint_proto::domain::StreamOpened;
use vfio_checkpoint_proto::v1::StreamMessage;
use vfio_checkpoint_proto::v1::stream_message::Kind;

use super::{Agreement, Attached};

/// Where the connections of a stream that is resumed arrive.
#[derive(Debug, Default)]
pub struct Relinks {
    latest: Mutex<Option<Attached>>,
    came: Notify,
}

impl Relinks {
    /// Another connection, in place of any that was not taken yet.
    pub fn put(&self, attached: Attached) {
        let before = self.latest.lock().unwrap_or_else(PoisonError::into_inner).replace(attached);
        drop(before);
        self.came.notify_one();
    }

    /// The latest, if there is one.
    pub fn take(&self) -> Option<Attached> {
        self.latest.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Waits for the next. Cancel-safe.
    pub async fn next(&self) -> Attached {
        loop {
            if let Some(attached) = self.take() {
                return attached;
            }
            self.came.notified().await;
        }
    }
}

/// Answers whoever resumes with what is expected next, and hands out the link. None where it is gone already.
pub(super) async fn answer(attached: Attached, opened: StreamOpened, next_sequence: u64) -> Option<Link> {
    let Attached { link, terms, opener: _ } = attached;
    let outgoing = match terms {
        Agreement::Ours { outgoing, .. } => outgoing,
        // This agent resumes no stream that it takes.
        Agreement::Theirs(_) => return None,
    };
    let opened = StreamOpened { next_sequence, ..opened };
    outgoing.send(StreamMessage { kind: Some(Kind::Opened(opened.into())) }).await.ok().map(|()| link)
}

/// A stream that is complete: what its giver may ask once more.
#[derive(Debug)]
pub struct Completed {
    opened: StreamOpened,
    next_sequence: u64,
}

impl Completed {
    pub(super) fn new(opened: StreamOpened, next_sequence: u64) -> Self {
        Self { opened, next_sequence }
    }

    /// Tells whoever resumes that all was taken.
    pub fn tell(&self, attached: Attached) -> impl Future<Output = ()> + Send + 'static + use<> {
        let (opened, next_sequence) = (self.opened.clone(), self.next_sequence);
        async move {
            if let Some(link) = answer(attached, opened, next_sequence).await {
                say_complete(link, next_sequence).await;
            }
        }
    }
}
