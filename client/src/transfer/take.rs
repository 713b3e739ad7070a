//! The half that takes state.
//!
//! ```text
//!   next: Ack if one is due -> wait for a frame -> TakerSide -> Accepted
//!                                nothing for `ack_delay` -> Ack of what was taken, and wait on
//!   busy: the caller is at work on what it took -> Ack of that, now and then, and nothing is heard meanwhile
//!   after the last seal: None -> the caller makes all durable -> complete: Ack{complete}, then the giver ends the stream
//! ```
//!
//! Invariants: a chunk is acknowledged only after its caller came back, so an Ack never speaks of state that nobody took.
//! Frames are verified once, whatever connections they come over. Failure paths: [`TransferError`]; after a refused frame
//! everything is refused.

use std::convert::Infallible;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tokio_stream::StreamExt;
use vfio_checkpoint_proto::frame::Accepted;
use vfio_checkpoint_proto::stream::{Job, Phase, Resumed, TakerEvent, TakerSide, Took};
use vfio_checkpoint_proto::v1::stream_message::Kind;
use vfio_checkpoint_proto::v1::{StreamAck, StreamMessage};

use super::error::TransferError;
use super::link::{self, Clock, Incoming, Link, LinkError, Terms};

/// How long a giver may take to end a stream of which it was told that it is complete.
const GOODBYE: Duration = Duration::from_secs(2);

/// The least time between two acks of a taker that waits, and the longest: its giver may be less patient than what was agreed.
/// A giver that waits for three times the longest, or for as long as was agreed, hears each taker in time.
const SILENCE: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));

/// The half that takes state.
pub struct Taker {
    incoming: Incoming,
    outgoing: Option<mpsc::Sender<StreamMessage>>,
    clock: Clock,
    side: TakerSide,
    terms: Terms,
    due: Option<StreamMessage>,
}

impl Taker {
    /// A taker on a link after its handshake. Its lifetime begins now.
    pub fn new(link: Link, terms: Terms) -> Self {
        Self {
            incoming: link.incoming,
            outgoing: Some(link.outgoing),
            clock: Clock::start(&terms.limits),
            side: TakerSide::new(&terms.session(Job::AutoSave)),
            terms,
            due: None,
        }
    }

    /// This side may say Cutover: this is a save with MANUAL cutover. Only before anything was taken.
    #[must_use]
    pub fn with_cutover(mut self) -> Self {
        self.side = TakerSide::new(&self.terms.session(Job::ManualSave));
        self
    }

    /// The next verified piece; `None` only after every seal. Cancel-safe.
    pub async fn next(&mut self) -> Result<Option<Accepted>, TransferError> {
        if self.side.phase() == Phase::Complete {
            // What is due then is to be said again, by `complete`.
            return Ok(None);
        }
        loop {
            if let Some(ack) = &self.due {
                let ack = ack.clone();
                // Where nobody carries it away the line breaks soon. What came in before it does is still to be taken.
                let _is_said = self.try_send(ack).await?;
                self.due = None;
            }
            if self.side.phase() == Phase::Taken {
                return Ok(None);
            }
            let heard = match self.terms.limits.ack_delay.filter(|_| self.side.is_unacked()) {
                None => self.hear().await?,
                Some(delay) => match timeout(delay, self.hear()).await {
                    Ok(heard) => heard?,
                    Err(_quiet) => {
                        self.due = self.side.acknowledge();
                        continue;
                    }
                },
            };
            return heard.map(Some).ok_or_else(|| self.ended());
        }
    }

    /// Says what was taken, now. While all is made durable it keeps the giver from taking silence for an end. Cancel-safe.
    pub async fn acknowledge(&mut self) -> Result<(), TransferError> {
        let ack = StreamAck { next_sequence: self.side.next_sequence(), complete: false };
        self.send(StreamMessage { kind: Some(Kind::Ack(ack)) }).await?;
        self.due = None;
        Ok(())
    }

    /// Keeps the stream while all is taken and somebody has yet to say that it may be told as complete: the giver hears in time
    /// that this side is still there. Returns why the stream is over. Cancel-safe.
    pub async fn linger(&mut self) -> TransferError {
        let silence = self.silence();
        loop {
            if let Err(error) = self.acknowledge().await {
                return error;
            }
            // What a giver says meanwhile is how far it is. Its silence is nothing unusual: it waits.
            match timeout(silence, self.hear()).await {
                Ok(Ok(Some(_))) | Err(_) => {}
                Ok(Ok(None)) => return self.ended(),
                Ok(Err(error)) => return error,
            }
        }
    }

    /// Says now and then what was taken, while the caller is at work on it, and takes nothing meanwhile: the giver hears that this
    /// side is there. Never over: where the connection breaks it is silent, and [`Taker::next`] says why. Cancel-safe.
    pub async fn busy(&mut self) -> Infallible {
        loop {
            sleep(self.silence()).await;
            let ack = StreamAck { next_sequence: self.side.next_sequence(), complete: false };
            match self.try_send(StreamMessage { kind: Some(Kind::Ack(ack)) }).await {
                // It says all that an ack which is due would.
                Ok(true) => self.due = None,
                Ok(false) | Err(_) => std::future::pending().await,
            }
        }
    }

    /// How long a giver that waits hears nothing.
    fn silence(&self) -> Duration {
        (self.terms.limits.idle_timeout / 3).clamp(SILENCE.0, SILENCE.1)
    }

    /// Asks the giver to stop the devices: only of a save with MANUAL cutover. Cancel-safe.
    pub async fn cutover(&mut self) -> Result<(), TransferError> {
        let cutover = self.side.cutover().map_err(TransferError::Protocol)?;
        self.send(cutover).await
    }

    /// Goes on over another link, after its handshake; the one before may be broken, or seem to be well. Returns the
    /// number of the frame that is expected next, which the giver is to be told before anything else. What was said
    /// last, where that was `complete`, is said again by [`Taker::complete`]. The stream's lifetime goes on.
    pub fn reattach(&mut self, link: Link) -> Result<u64, TransferError> {
        let Resumed { next_sequence, again } = self.side.resume().map_err(TransferError::Protocol)?;
        self.incoming = link.incoming;
        self.outgoing = Some(link.outgoing);
        // An ack that was due is in what the giver is told.
        self.due = again;
        Ok(next_sequence)
    }

    /// How many frames were taken.
    pub fn taken_frames(&self) -> u64 {
        self.side.next_sequence()
    }

    /// Says that all state of all devices is verified and durable, and waits a little for the giver to end the stream.
    /// All is here, so a giver that is just gone, or silent, takes nothing back; one that aborts does. Whether it has heard
    /// this, its operation tells. Called again after [`Taker::reattach`] it says so again. Cancel-safe.
    pub async fn complete(&mut self) -> Result<(), TransferError> {
        if self.side.phase() != Phase::Complete {
            self.due = Some(self.side.complete().map_err(TransferError::Protocol)?);
        }
        if let Some(complete) = self.due.clone() {
            self.send(complete).await?;
            self.due = None;
            self.outgoing = None;
        }
        let ending = async {
            // The giver may have said how far it is before it heard this. Of state nothing can come any more.
            while self.hear().await?.is_some() {}
            Ok(())
        };
        match timeout(GOODBYE, ending).await {
            Ok(
                Ok(())
                | Err(
                    TransferError::Broken(_)
                    | TransferError::Idle(_)
                    | TransferError::NotSealed(_)
                    | TransferError::Lifetime(_)
                    | TransferError::Spool(_)
                    | TransferError::NotResumed { .. },
                ),
            )
            | Err(_) => Ok(()),
            Ok(Err(
                error @ (TransferError::AbortedByPeer(_)
                | TransferError::Protocol(_)
                | TransferError::Changed { .. }),
            )) => Err(error),
        }
    }

    /// Gives the stream up and tells the giver why, in at most 1024 bytes.
    pub async fn abort(mut self, reason: &str) {
        let abort = self.side.abort(reason);
        link::abort(self.outgoing.take(), &mut self.incoming, abort).await;
    }

    /// Says something, unless whoever carried messages away has stopped.
    async fn try_send(&mut self, message: StreamMessage) -> Result<bool, TransferError> {
        let Some(outgoing) = &self.outgoing else {
            return Err(TransferError::Broken(LinkError::ended("the stream was complete before")));
        };
        Ok(match self.clock.wait(outgoing.reserve()).await? {
            Ok(room) => {
                room.send(message);
                true
            }
            Err(_) => false,
        })
    }

    /// Says what there is no use going on without. State that comes in before it is known why it cannot be said is lost.
    async fn send(&mut self, message: StreamMessage) -> Result<(), TransferError> {
        if self.try_send(message).await? {
            return Ok(());
        }
        // Why is about to come in.
        while self.hear().await?.is_some() {}
        Err(TransferError::Broken(LinkError::left("the giver ended it")))
    }

    /// The next verified frame; `None` when the giver has ended the stream.
    async fn hear(&mut self) -> Result<Option<Accepted>, TransferError> {
        loop {
            let Some(heard) = self.clock.wait(self.incoming.next()).await? else { return Ok(None) };
            let message = heard.map_err(TransferError::Broken)?;
            let Took { event, reply } = self.side.receive(message).map_err(TransferError::Protocol)?;
            // A later ack says all that an earlier one did.
            self.due = reply.or(self.due.take());
            match event {
                TakerEvent::Frame(accepted) => return Ok(Some(accepted)),
                TakerEvent::Aborted { reason } => return Err(TransferError::AbortedByPeer(reason)),
                TakerEvent::Ignored => {}
            }
        }
    }

    /// The giver has ended the stream and there are seals missing: which ones is worth knowing.
    fn ended(&self) -> TransferError {
        let detail = self.side.closed().err().map_or_else(
            || "the giver ended it".to_owned(),
            |error| match std::error::Error::source(&error) {
                Some(source) => source.to_string(),
                None => error.to_string(),
            },
        );
        TransferError::Broken(LinkError::left(detail))
    }
}

/// Tells the giver of a stream that is complete, and that may not have heard so, once more: on a link that it opened to
/// resume that stream, after the answer. For whoever has no taker any more.
pub async fn say_complete(link: Link, next_sequence: u64) {
    let Link { mut incoming, outgoing } = link;
    let complete = StreamAck { next_sequence, complete: true };
    let message = StreamMessage { kind: Some(Kind::Ack(complete)) };
    // A giver that is gone again may come again.
    let _unheard = timeout(GOODBYE, outgoing.send(message)).await;
    link::close(Some(outgoing), &mut incoming).await;
}

impl std::fmt::Debug for Taker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Taker")
            .field("phase", &self.side.phase())
            .field("taken", &self.side.next_sequence())
            .finish_non_exhaustive()
    }
}
