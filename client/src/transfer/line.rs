//! The connection under a giver: it is up, or down and being dialed again, or over.
//!
//! ```text
//!   Up --broken, idle--> Down: tries in a task --Opened{next}--> Up, and the frames from `next` on first
//!    |                     |   room: as far as the spool has it
//!    |  not resumable      |  refused, or too late
//!    '---> the error       '---> NotResumed, Over
//! ```
//! Invariants:
//! - Frames go out in the order of their numbers: what waits in the spool goes before what is new.
//! - The old link is kept until there is another. To let it go is to end the stream in good order, which a taker takes for
//!   the last word.
//! - What the taker expects next was handed to some link before.
//! - From a break until the taker has acknowledged something new there is one window, however often there is a line again;
//!   unless a line was well for a whole window and no ack was due on it.
//!
//! Failure paths: [`TransferError`]; where a stream cannot be resumed, the error that broke it.

use std::pin::pin;

use tokio::sync::mpsc;
use tokio::sync::mpsc::OwnedPermit;
use tokio::time::Instant;
use tokio_stream::StreamExt as _;
use vfio_checkpoint_proto::domain::{StreamLimits, StreamOpened};
use vfio_checkpoint_proto::stream::{Phase, ProtocolError};
use vfio_checkpoint_proto::v1::StreamMessage;
use vfio_checkpoint_proto::v1::frame::Body;
use vfio_checkpoint_proto::v1::stream_message::Kind;

use super::error::{TransferError, Unresumed};
use super::flow::silent_bytes;
use super::give::{Giver, Resent};
use super::link::{Incoming, Link, LinkError};
use super::open::{Dialed, OpenStreamError};
use super::redial::{Redialer, Tries};
use super::spool::{Spool, SpoolError};

/// The connection.
pub(super) enum Line {
    Up(Up),
    Down(Outage),
    Over,
}

/// One that is there.
pub(super) struct Up {
    pub(super) incoming: Incoming,
    pub(super) outgoing: mpsc::Sender<StreamMessage>,
    /// Somebody carries messages away.
    can_send: bool,
}

/// None is there.
pub(super) struct Outage {
    broke: TransferError,
    tries: Tries,
    old: Up,
}

/// What came in.
pub(super) type Heard = Option<Result<StreamMessage, LinkError>>;

/// What a call waits for.
#[derive(Debug, Clone, Copy)]
pub(super) enum Want {
    /// Room for one more frame with so much state.
    Room { state_bytes: usize },
    /// What the taker says.
    Word,
}

/// What has come about.
pub(super) enum Step {
    /// One more frame can be made.
    Room(Room),
    /// The taker, or the connection to it, has moved.
    Moved,
    /// The taker has said something.
    Heard,
}

/// Where one more frame goes.
pub(super) enum Room {
    Link(OwnedPermit<StreamMessage>),
    /// Only to where frames are kept: the line is down.
    Kept,
}

/// What a stream is resumed with.
pub(super) struct Kept {
    pub(super) spool: Spool,
    pub(super) resent: Resent,
    /// The frame that this link gets next.
    next: u64,
    /// The frame that no link got yet.
    fresh: u64,
    /// Not here while the line is down.
    redialer: Option<Redialer>,
    /// Since when this link is there.
    since: Instant,
    /// Since when there is state that is not acknowledged, or when some was acknowledged last.
    waits_since: Instant,
    /// When the taker has said something last, whatever it was.
    pub(super) heard: Instant,
    /// Bytes of state that the taker may leave without an ack for as long as it likes.
    silent_bytes: u64,
}

impl Line {
    pub(super) fn up(link: Link) -> Self {
        Self::Up(Up { incoming: link.incoming, outgoing: link.outgoing, can_send: true })
    }

    /// From now on there is none. What may still carry a last word.
    pub(super) fn end(&mut self) -> Option<Up> {
        match std::mem::replace(self, Self::Over) {
            Self::Up(up) => Some(up),
            Self::Down(outage) => Some(outage.old),
            Self::Over => None,
        }
    }
}

impl Room {
    pub(super) fn send(self, message: StreamMessage) {
        match self {
            Self::Link(permit) => drop(permit.send(message)),
            // Nobody makes a frame for a line that is down without keeping it.
            Self::Kept => {}
        }
    }
}

impl Kept {
    pub(super) fn new(spool: Spool, redialer: Redialer, limits: &StreamLimits) -> Self {
        let (resent, since, silent_bytes) = (Resent::default(), Instant::now(), silent_bytes(limits));
        let redialer = Some(redialer);
        let (waits_since, heard) = (since, since);
        Self { spool, resent, next: 0, fresh: 0, redialer, since, waits_since, heard, silent_bytes }
    }

    /// The taker has acknowledged what is before this frame, which is new; how many bytes of state that was.
    pub(super) fn acked(&mut self, next_sequence: u64) -> u64 {
        if let Some(redialer) = &mut self.redialer {
            redialer.gets_on();
        }
        self.waits_since = Instant::now();
        self.spool.acked(next_sequence)
    }

    /// Whoever dials now that the line is down.
    fn redialer(&mut self) -> Option<Redialer> {
        let mut redialer = self.redialer.take()?;
        // With no more left than the taker may keep to itself there is nothing that an ack has to come for. Then time tells that
        // the line was well.
        let is_none_due = self.spool.state_bytes() <= self.silent_bytes;
        if is_none_due && self.since.elapsed() >= redialer.window() {
            redialer.gets_on();
        }
        Some(redialer)
    }

    /// Keeps the next frame, and sends it where there is a line. Its state is shared.
    pub(super) async fn send(
        &mut self,
        room: Room,
        message: StreamMessage,
        state_bytes: usize,
    ) -> Result<(), SpoolError> {
        if !self.spool.has_state() {
            self.waits_since = Instant::now();
        }
        self.spool.keep(message.clone(), state_bytes);
        match room {
            Room::Link(permit) => self.hand(permit, message),
            Room::Kept => {}
        }
        self.spool.settle().await
    }

    /// The link gets its next frame.
    fn hand(&mut self, permit: OwnedPermit<StreamMessage>, message: StreamMessage) {
        if self.next < self.fresh {
            self.resent.add(state_bytes(&message));
        }
        permit.send(message);
        self.next += 1;
        self.fresh = self.fresh.max(self.next);
    }
}

fn state_bytes(message: &StreamMessage) -> u64 {
    match &message.kind {
        Some(Kind::Frame(frame)) => match &frame.body {
            Some(Body::Chunk(chunk)) => chunk.data.len() as u64,
            Some(Body::Progress(_) | Body::Seal(_)) | None => 0,
        },
        Some(Kind::Open(_) | Kind::Opened(_) | Kind::Ack(_) | Kind::Cutover(_) | Kind::Abort(_)) | None => 0,
    }
}

enum Event {
    Heard(Heard),
    Room(OwnedPermit<StreamMessage>),
    NobodySends,
}

impl Giver {
    /// Waits for one thing to come about: what is wanted, or anything on the way to it. A taker that is silent up to
    /// `deadline` breaks the line. Cancel-safe.
    pub(super) async fn step(
        &mut self,
        want: Want,
        deadline: Option<Instant>,
    ) -> Result<Step, TransferError> {
        match &mut self.line {
            Line::Over => Err(TransferError::Broken(LinkError::ended("the stream was over before"))),
            Line::Up(_) => match self.step_up(want, deadline).await {
                Err(error) if self.can_resume(&error) => self.go_down(error),
                other => other,
            },
            Line::Down(outage) => {
                let has_room = match (want, &self.kept) {
                    (Want::Room { state_bytes }, Some(kept)) => kept.spool.has_room(state_bytes),
                    (Want::Room { .. }, None) | (Want::Word, _) => false,
                };
                let over = tokio::select! {
                    // A line that is there again comes before the room that there is without it.
                    biased;
                    over = self.clock.wait_patiently(outage.tries.over()) => over?,
                    () = std::future::ready(()), if has_room => return Ok(Step::Room(Room::Kept)),
                };
                self.go_up(over)
            }
        }
    }

    async fn step_up(&mut self, want: Want, deadline: Option<Instant>) -> Result<Step, TransferError> {
        let Line::Up(up) = &mut self.line else { return Ok(Step::Heard) };
        let waiting = match &mut self.kept {
            Some(kept) if kept.next < self.side.next_sequence() => {
                let next = kept.spool.frame(kept.next).await?;
                Some(next.ok_or_else(|| kept.lost(kept.next, &self.side))?)
            }
            Some(_) | None => None,
        };
        let has_room = match (want, &self.kept) {
            (Want::Room { state_bytes }, Some(kept)) => kept.spool.has_room(state_bytes),
            (Want::Room { .. }, None) => true,
            (Want::Word, _) => false,
        };
        let wants_room = up.can_send && (waiting.is_some() || has_room);
        let mut room = pin!(up.outgoing.clone().reserve_owned());
        let event = async {
            tokio::select! {
                // What the taker has said comes first: an abort that is there already must not be overtaken.
                biased;
                heard = up.incoming.next() => Event::Heard(heard),
                room = &mut room, if wants_room => room.map_or(Event::NobodySends, Event::Room),
            }
        };
        let event = match deadline {
            Some(deadline) => self.clock.wait_until(deadline, event).await?,
            None => self.clock.wait_patiently(event).await?,
        };
        match event {
            Event::Heard(heard) => self.hear(heard),
            Event::Room(permit) => match (waiting, &mut self.kept) {
                (Some(message), Some(kept)) => {
                    kept.hand(permit, message);
                    Ok(Step::Moved)
                }
                (Some(_), None) | (None, _) => Ok(Step::Room(Room::Link(permit))),
            },
            // Whoever carried messages away has stopped; why is about to come in.
            Event::NobodySends => {
                up.can_send = false;
                Ok(Step::Heard)
            }
        }
    }

    /// When a taker that has promised to acknowledge in time has been silent for too long after state that it was sent. Its
    /// connection may be dead without anybody saying so. One that says that it is there is none of these: it may be at work on
    /// what it has.
    pub(super) fn ack_overdue(&self) -> Option<Instant> {
        let kept = self.kept.as_ref().filter(|kept| kept.spool.has_state())?;
        let ack_delay = self.terms.limits.ack_delay?;
        let last = kept.waits_since.max(kept.since).max(kept.heard);
        Some(self.clock.idle_after(last) + ack_delay)
    }

    fn can_resume(&self, error: &TransferError) -> bool {
        let is_open = matches!(self.side.phase(), Phase::Giving | Phase::Given);
        is_open && error.is_break() && self.kept.as_ref().is_some_and(|kept| kept.redialer.is_some())
    }

    fn go_down(&mut self, broke: TransferError) -> Result<Step, TransferError> {
        let redialer = self.kept.as_mut().and_then(Kept::redialer);
        let (Some(redialer), Some(old)) = (redialer, self.line.end()) else { return Err(broke) };
        let stream = self.terms.stream;
        tracing::warn!(%stream, acked = self.side.acked(), error = %broke, "the stream broke; it is dialed again");
        self.flow.set_down(true);
        self.line = Line::Down(Outage { broke, tries: redialer.begin(stream), old });
        Ok(Step::Moved)
    }

    fn go_up(&mut self, over: Result<(Redialer, Dialed), Unresumed>) -> Result<Step, TransferError> {
        let Line::Down(outage) = std::mem::replace(&mut self.line, Line::Over) else {
            return Ok(Step::Heard);
        };
        let not_resumed = |why| TransferError::NotResumed { broke: Box::new(outage.broke), why };
        let (redialer, Dialed { opened, link }) = match over {
            Ok(there) => there,
            Err(why) => return Err(not_resumed(why)),
        };
        let StreamOpened { version: _, stream_id, manifest: _, limits: _, next_sequence } = opened;
        if stream_id != self.terms.stream {
            return Err(not_resumed(Unresumed::Refused(OpenStreamError::NotOpened)));
        }
        let Some(kept) = &mut self.kept else { return Ok(Step::Heard) };
        let (acked, sent) = (self.side.acked(), kept.fresh);
        if next_sequence < acked || next_sequence > sent {
            // More may have been made, but no link has had it.
            let error = ProtocolError::ResumeOutOfRange { next_sequence, acked, sent };
            return Err(TransferError::Protocol(error));
        }
        self.side.resume(next_sequence).map_err(TransferError::Protocol)?;
        (kept.next, kept.redialer, kept.since) = (next_sequence, Some(redialer), Instant::now());
        if next_sequence > acked {
            self.flow.acked(kept.acked(next_sequence));
        }
        self.line = Line::up(link);
        self.flow.set_down(false);
        tracing::info!(stream = %stream_id, next_sequence, "the stream goes on");
        Ok(Step::Moved)
    }
}

impl Kept {
    /// A frame that is not here though it was not acknowledged: the two counts have come apart, which is a defect.
    fn lost(&self, sequence: u64, side: &vfio_checkpoint_proto::stream::GiverSide) -> TransferError {
        let (acked, sent) = (side.acked(), self.fresh);
        TransferError::Protocol(ProtocolError::ResumeOutOfRange { next_sequence: sequence, acked, sent })
    }
}
