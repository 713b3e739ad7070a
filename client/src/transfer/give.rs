//! The half that gives state.
//!
//! ```text
//!   chunk/progress/seal: wait for room -- hear what comes in meanwhile --> make the frame --> queue it
//!   listen, completed:   hear what comes in
//!        Ack -> counted | Cutover -> CutoverSignal | Abort -> AbortedByPeer | else -> Protocol
//! ```
//!
//! A taker that is heard but makes no room is no better than a silent one: devices may stand still for it. So what is
//! heard moves no deadline of `room`, unless it acknowledges something new; and how long a taker may say that it is at
//! work on its checkpoint is the caller's to limit, with [`Giver::completed_within`].
//!
//! Invariants: a frame is made only when there is room for it, so a call that is dropped leaves no gap in the numbers.
//! A giver is complete only after the taker said so, of every frame and every seal.
//!
//! Failure paths: [`TransferError`]. Whoever gives must say something within the taker's `idle_timeout`: while a device
//! brings out nothing, send [`Giver::progress`].

use std::pin::pin;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc::OwnedPermit;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_stream::StreamExt;
use vfio_checkpoint_proto::domain::{ConfigSpaceCapture, Progress};
use vfio_checkpoint_proto::stream::{GiverEvent, GiverSide, Job, Phase};
use vfio_checkpoint_proto::v1::StreamMessage;
use vfio_checkpoint_seal::{Seal, SealMismatch};

use super::error::TransferError;
use super::link::{self, Clock, Incoming, Link, LinkError, Terms};

/// The half that gives state.
pub struct Giver {
    incoming: Incoming,
    outgoing: Option<mpsc::Sender<StreamMessage>>,
    clock: Clock,
    side: GiverSide,
    terms: Terms,
    cutover: watch::Sender<bool>,
}

enum Event {
    Heard(Option<Result<StreamMessage, LinkError>>),
    Room(OwnedPermit<StreamMessage>),
    NobodySends,
}

impl Giver {
    /// A giver on a link after its handshake. Its lifetime begins now.
    pub fn new(link: Link, terms: Terms) -> Self {
        Self {
            incoming: link.incoming,
            outgoing: Some(link.outgoing),
            clock: Clock::start(&terms.limits),
            side: GiverSide::new(&terms.session(Job::AutoSave)),
            terms,
            cutover: watch::Sender::new(false),
        }
    }

    /// The taker may say Cutover: this is a save with MANUAL cutover. Otherwise it breaks the protocol with it. Only before
    /// anything was given.
    #[must_use]
    pub fn with_cutover(mut self) -> Self {
        self.side = GiverSide::new(&self.terms.session(Job::ManualSave));
        self
    }

    /// Tells when the taker has asked for the cutover. It stays told.
    pub fn cutover_signal(&self) -> CutoverSignal {
        CutoverSignal(self.cutover.subscribe())
    }

    /// Frames that the taker has acknowledged.
    pub fn acked_frames(&self) -> u64 {
        self.side.acked()
    }

    /// Gives the next state of a device, in one frame or several. Returns when the last is queued. Not cancel-safe: of
    /// what was not sent nothing is kept, so a call that is dropped leaves only [`Giver::abort`].
    pub async fn chunk(&mut self, device: usize, mut state: Bytes) -> Result<(), TransferError> {
        while !state.is_empty() {
            let room = self.room().await?;
            let longest = self.terms.limits.max_chunk_bytes.max(1) as usize;
            let piece = state.split_to(state.len().min(longest));
            // There is one message: the piece is no longer than a chunk.
            if let Some(message) = self.side.chunk(device, piece).map_err(TransferError::Protocol)?.next() {
                room.send(message);
            }
        }
        Ok(())
    }

    /// Says how far this side is. Cancel-safe.
    pub async fn progress(&mut self, progress: Progress) -> Result<(), TransferError> {
        let room = self.room().await?;
        room.send(self.side.progress(progress).map_err(TransferError::Protocol)?);
        Ok(())
    }

    /// Ends a device's state, and returns its seal. Cancel-safe.
    pub async fn seal(
        &mut self,
        device: usize,
        config: Option<ConfigSpaceCapture>,
    ) -> Result<Seal, TransferError> {
        self.seal_if(device, config, None).await
    }

    /// Ends a device's state, if what was given is what this seal says. Otherwise the seal is not sent, and the stream
    /// is to be aborted. Cancel-safe.
    pub async fn seal_as(
        &mut self,
        device: usize,
        config: Option<ConfigSpaceCapture>,
        expected: Seal,
    ) -> Result<(), TransferError> {
        self.seal_if(device, config, Some(expected)).await.map(|_| ())
    }

    async fn seal_if(
        &mut self,
        device: usize,
        config: Option<ConfigSpaceCapture>,
        expected: Option<Seal>,
    ) -> Result<Seal, TransferError> {
        let room = self.room().await?;
        let (message, found) = self.side.seal(device, config).map_err(TransferError::Protocol)?;
        if let Some(expected) = expected
            && expected != found
        {
            return Err(TransferError::Changed { device, source: SealMismatch { expected, found } });
        }
        room.send(message);
        Ok(found)
    }

    /// Hears the taker while there is nothing to send, and returns why the stream is over. Silence is no error here,
    /// but the taker has its own patience: send [`Giver::progress`] now and then. Cancel-safe.
    pub async fn listen(&mut self) -> TransferError {
        loop {
            if self.side.phase() == Phase::Complete {
                // Nothing more is to be heard: the taker, which has all, may be gone.
                std::future::pending::<()>().await;
            }
            let heard = match self.clock.wait_patiently(self.incoming.next()).await {
                Ok(heard) => heard,
                Err(error) => return error,
            };
            if let Err(error) = self.hear(heard) {
                return error;
            }
        }
    }

    /// Waits until the taker has all state of all devices verified and durable, for at most this long: it may say now
    /// and then that it is still at work. Cancel-safe, but the time begins anew with each call.
    pub async fn completed_within(&mut self, limit: Duration) -> Result<(), TransferError> {
        timeout(limit, self.completed()).await.unwrap_or(Err(TransferError::NotSealed(limit)))
    }

    /// Waits until the taker has all state of all devices verified and durable, for as long as it is heard and the stream
    /// lives. Cancel-safe.
    pub async fn completed(&mut self) -> Result<(), TransferError> {
        while self.side.phase() != Phase::Complete {
            let heard = self.clock.wait(self.incoming.next()).await?;
            self.hear(heard)?;
        }
        link::close(self.outgoing.take(), &mut self.incoming).await;
        Ok(())
    }

    /// Gives the stream up and tells the taker why, in at most 1024 bytes.
    pub async fn abort(mut self, reason: &str) {
        let abort = self.side.abort(reason);
        link::abort(self.outgoing.take(), &mut self.incoming, abort).await;
    }

    /// Waits until one message can be queued, and hears the taker meanwhile.
    async fn room(&mut self) -> Result<OwnedPermit<StreamMessage>, TransferError> {
        let Some(outgoing) = self.outgoing.clone() else {
            return Err(TransferError::Broken(LinkError::ended("the stream was complete before")));
        };
        let mut room = pin!(outgoing.reserve_owned());
        let mut can_send = true;
        let mut deadline = self.clock.idle_deadline();
        loop {
            let event = self.clock.wait_until(deadline, async {
                tokio::select! {
                    // What the taker has said comes first: an abort that is there already must not be overtaken.
                    biased;
                    heard = self.incoming.next() => Event::Heard(heard),
                    room = &mut room, if can_send => room.map_or(Event::NobodySends, Event::Room),
                }
            });
            match event.await? {
                Event::Heard(heard) => {
                    let acked = self.side.acked();
                    self.hear(heard)?;
                    if self.side.acked() > acked {
                        deadline = self.clock.idle_deadline();
                    }
                }
                Event::Room(room) => return Ok(room),
                // Whoever carried messages away has stopped; why is about to come in.
                Event::NobodySends => can_send = false,
            }
        }
    }

    fn hear(&mut self, heard: Option<Result<StreamMessage, LinkError>>) -> Result<(), TransferError> {
        let Some(heard) = heard else {
            let error = LinkError::ended("the taker ended it before all was complete");
            return Err(TransferError::Broken(error));
        };
        let message = heard.map_err(TransferError::Broken)?;
        match self.side.receive(message).map_err(TransferError::Protocol)? {
            GiverEvent::Acked { .. } | GiverEvent::Completed | GiverEvent::Ignored => Ok(()),
            GiverEvent::CutoverRequested => {
                self.cutover.send_replace(true);
                Ok(())
            }
            GiverEvent::Aborted { reason } => Err(TransferError::AbortedByPeer(reason)),
        }
    }
}

impl std::fmt::Debug for Giver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Giver")
            .field("phase", &self.side.phase())
            .field("sent", &self.side.next_sequence())
            .field("acked", &self.side.acked())
            .finish_non_exhaustive()
    }
}

/// Whether the taker has asked for the cutover.
#[derive(Debug, Clone)]
pub struct CutoverSignal(watch::Receiver<bool>);

impl CutoverSignal {
    /// Whether it has.
    pub fn is_requested(&self) -> bool {
        *self.0.borrow()
    }

    /// Returns when it has; at once if it had before. Never, where the giver is gone without. Cancel-safe. The giver
    /// hears it only while it sends, listens or waits.
    pub async fn requested(&mut self) {
        if self.0.wait_for(|requested| *requested).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
