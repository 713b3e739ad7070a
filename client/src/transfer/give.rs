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
//! A giver is complete only after the taker said so, of every frame and every seal. One that is [`Giver::resumable`] keeps
//! each frame until it is acknowledged, and sends it again, as it was, where the taker has not got it.
//!
//! Failure paths: [`TransferError`]. Whoever gives must say something within the taker's `idle_timeout`: while a device
//! brings out nothing, send [`Giver::progress`].

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use vfio_checkpoint_proto::domain::{ConfigSpaceCapture, Progress};
use vfio_checkpoint_proto::stream::{GiverEvent, GiverSide, Job, Phase};
use vfio_checkpoint_proto::v1::StreamMessage;
use vfio_checkpoint_seal::{Seal, SealMismatch};

use super::error::TransferError;
use super::flow::Flow;
use super::line::{Heard, Kept, Line, Room, Step, Want};
use super::link::{self, Clock, Link, LinkError, Terms};
use super::redial::{Redial, Redialer};
use super::spool::Spool;

/// The half that gives state.
pub struct Giver {
    pub(super) line: Line,
    pub(super) clock: Clock,
    pub(super) side: GiverSide,
    pub(super) terms: Terms,
    /// Of a giver whose stream can be resumed.
    pub(super) kept: Option<Kept>,
    pub(super) flow: Flow,
    cutover: watch::Sender<bool>,
}

impl Giver {
    /// A giver on a link after its handshake. Its lifetime begins now.
    pub fn new(link: Link, terms: Terms) -> Self {
        Self {
            line: Line::up(link),
            clock: Clock::start(&terms.limits),
            side: GiverSide::new(&terms.session(Job::AutoSave)),
            terms,
            kept: None,
            flow: Flow::default(),
            cutover: watch::Sender::new(false),
        }
    }

    /// Where its connection breaks this giver dials again, for as long as `window`, and goes on out of its spool; what is
    /// given meanwhile goes into that, as far as there is room. Only before anything was given. With a taker that speaks
    /// version 1 it changes nothing.
    pub fn resumable(
        mut self,
        spool: Spool,
        redial: Box<dyn Redial>,
        window: Duration,
    ) -> Result<Self, TransferError> {
        if self.terms.version.resumes() {
            spool.check(&self.terms.limits)?;
            self.flow = Flow::counting(&self.terms.limits);
            self.kept = Some(Kept::new(spool, Redialer::new(redial, window), &self.terms.limits));
        }
        Ok(self)
    }

    /// Bytes of state that were sent more than once.
    pub fn resent_bytes(&self) -> u64 {
        self.resent().bytes()
    }

    /// The same for whoever watches. Zero for ever, where the stream cannot be resumed.
    pub fn resent(&self) -> Resent {
        self.kept.as_ref().map(|kept| kept.resent.clone()).unwrap_or_default()
    }

    /// How the stream flows, for whoever watches. To be asked for after [`Giver::resumable`].
    pub fn flow(&self) -> Flow {
        self.flow.clone()
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

    /// Gives the next state of a device, in one frame or several. Returns when the last is queued, or kept where the
    /// connection is down. Not cancel-safe: of what was not sent nothing is kept, so a call that is dropped leaves only
    /// [`Giver::abort`].
    pub async fn chunk(&mut self, device: usize, mut state: Bytes) -> Result<(), TransferError> {
        while !state.is_empty() {
            let longest = self.terms.limits.max_chunk_bytes.max(1) as usize;
            let bytes = state.len().min(longest);
            let room = self.room(bytes).await?;
            let piece = state.split_to(bytes);
            // There is one message: the piece is no longer than a chunk.
            let message = self.side.chunk(device, piece).map_err(TransferError::Protocol)?.next();
            if let Some(message) = message {
                self.send(room, message, bytes).await?;
            }
        }
        Ok(())
    }

    /// Says how far this side is, unless there is nobody to hear it now. Cancel-safe.
    pub async fn progress(&mut self, progress: Progress) -> Result<(), TransferError> {
        if matches!(self.line, Line::Down(_)) {
            return Ok(());
        }
        let room = self.room(0).await?;
        let message = self.side.progress(progress).map_err(TransferError::Protocol)?;
        self.send(room, message, 0).await
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
        let room = self.room(0).await?;
        let (message, found) = self.side.seal(device, config).map_err(TransferError::Protocol)?;
        if let Some(expected) = expected
            && expected != found
        {
            return Err(TransferError::Changed { device, source: SealMismatch { expected, found } });
        }
        self.send(room, message, 0).await?;
        Ok(found)
    }

    /// Hears the taker while there is nothing to send, and returns why the stream is over. Silence is no error here, unless
    /// an ack is owed, but the taker has its own patience: send [`Giver::progress`] now and then. Cancel-safe.
    pub async fn listen(&mut self) -> TransferError {
        loop {
            if self.side.phase() == Phase::Complete {
                // Nothing more is to be heard: the taker, which has all, may be gone.
                std::future::pending::<()>().await;
            }
            let overdue = self.ack_overdue();
            if let Err(error) = self.step(Want::Word, overdue).await {
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
            let deadline = self.clock.idle_deadline();
            self.step(Want::Word, Some(deadline)).await?;
        }
        if let Some(mut up) = self.line.end() {
            link::close(Some(up.outgoing), &mut up.incoming).await;
        }
        Ok(())
    }

    /// Gives the stream up and tells the taker why, in at most 1024 bytes.
    pub async fn abort(mut self, reason: &str) {
        let abort = self.side.abort(reason);
        if let Some(mut up) = self.line.end() {
            link::abort(Some(up.outgoing), &mut up.incoming, abort).await;
        }
    }

    /// Waits until one more frame, with so much state, can be made, and hears the taker meanwhile.
    async fn room(&mut self, state_bytes: usize) -> Result<Room, TransferError> {
        let mut deadline = self.clock.idle_deadline();
        loop {
            match self.step(Want::Room { state_bytes }, Some(deadline)).await? {
                Step::Room(room) => return Ok(room),
                Step::Moved => deadline = self.clock.idle_deadline(),
                Step::Heard => {}
            }
        }
    }

    async fn send(
        &mut self,
        room: Room,
        message: StreamMessage,
        state_bytes: usize,
    ) -> Result<(), TransferError> {
        match &mut self.kept {
            None => room.send(message),
            Some(kept) => kept.send(room, message, state_bytes).await?,
        }
        Ok(())
    }

    /// Takes in what the taker said. Whether it is further than before is worth knowing.
    pub(super) fn hear(&mut self, heard: Heard) -> Result<Step, TransferError> {
        let Some(heard) = heard else {
            let error = LinkError::ended("the taker ended it before all was complete");
            return Err(TransferError::Broken(error));
        };
        let message = heard.map_err(TransferError::Broken)?;
        if let Some(kept) = &mut self.kept {
            kept.heard = Instant::now();
        }
        let before = self.side.acked();
        match self.side.receive(message).map_err(TransferError::Protocol)? {
            GiverEvent::Acked { .. } | GiverEvent::Completed | GiverEvent::Ignored => {}
            GiverEvent::CutoverRequested => {
                self.cutover.send_replace(true);
            }
            GiverEvent::Aborted { reason } => return Err(TransferError::AbortedByPeer(reason)),
        }
        let acked = self.side.acked();
        if acked == before {
            return Ok(Step::Heard);
        }
        if let Some(kept) = &mut self.kept {
            self.flow.acked(kept.acked(acked));
        }
        Ok(Step::Moved)
    }
}

/// How many bytes of state were sent more than once.
#[derive(Debug, Clone, Default)]
pub struct Resent(Arc<AtomicU64>);

impl Resent {
    /// So many, so far.
    pub fn bytes(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    pub(super) fn add(&self, bytes: u64) {
        self.0.fetch_add(bytes, Ordering::Relaxed);
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
