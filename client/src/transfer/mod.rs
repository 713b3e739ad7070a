//! The two halves of a stream of device state: who gives it and who takes it.
//!
//! What may be said when is decided by [`vfio_checkpoint_proto::stream`]; here are the clock, the queues and the waiting.
//! Neither half knows gRPC. A half sees a [`Link`]: a stream of messages that come in, and a bounded sender for those
//! that go out. The caller of a save takes and the agent gives; for a restore it is the other way round; both use this.
//!
//! ```text
//!   Giver                                  Taker
//!     chunk, progress, seal  -- Frame -->    next() -> Accepted      verified, in order, once
//!     counts                 <-- Ack ---     by itself, at least every ack_interval_bytes, and after ack_delay
//!     cutover_signal()       <- Cutover -    cutover()
//!     completed()            <-- Ack{complete} -- complete()         after the last seal, once all is durable
//!     abort(reason)          <- Abort ->     abort(reason)
//! ```
//!
//! A connection that breaks need not be the end of a stream of version 2:
//! ```text
//!   Giver::resumable(spool, redial)  -- Open{resume} -->  Taker::reattach(link): it expects this frame next
//!     goes on out of its spool       == Frame =======>    as if nothing had been
//! ```
//! The calls of a giver see nothing of it but that they take longer, or, while there is room in the spool, less long: whoever
//! has to know that nothing goes over asks [`Giver::flow`].
//!
//! Invariants:
//! - A half queues at most [`LINK_FRAMES`] messages. A giver whose taker does not read stands still.
//! - What a taker hands out is verified: place, CRC, order, length, digest. `None` comes only after every seal.
//! - A giver reads what comes in whenever it waits, so that an abort or a cutover is heard while it cannot send.
//! - After an error a half does nothing more; drop it, or `abort` it to tell the other side why.
//!
//! Failure paths: the connection ends ([`TransferError::Broken`]), the other side gives up
//! ([`TransferError::AbortedByPeer`]), it breaks the protocol ([`TransferError::Protocol`]), it is silent or does not
//! read for `idle_timeout` ([`TransferError::Idle`]), it does not complete in time ([`TransferError::NotSealed`]), or `lifetime`
//! is over ([`TransferError::Lifetime`]). Of a stream that can be resumed: it was not ([`TransferError::NotResumed`]), or
//! what is kept for that cannot be kept ([`TransferError::Spool`]).

mod body;
mod error;
mod flow;
mod give;
mod line;
mod link;
mod open;
mod redial;
mod spool;
mod take;

#[cfg(test)]
mod tests;

pub use body::{Incoming, Outgoing, Refused};
pub use error::{TransferError, Unresumed};
pub use flow::Flow;
pub use give::{CutoverSignal, Giver, Resent};
pub use link::{LINK_FRAMES, Link, LinkError, Terms};
pub use open::{DialOptions, Dialed, GiveState, OpenStreamError, TakeState, dial, dial_with};
pub use redial::{Redial, RedialOperation, Redialing};
pub use spool::{Spool, SpoolError, SpoolOptions};
pub use take::{Taker, say_complete};
pub use vfio_checkpoint_proto::frame::Accepted;
pub use vfio_checkpoint_proto::stream::ProtocolError;
