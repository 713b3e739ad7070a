//! State on its way between devices and a stream.
//!
//! ```text
//!   save:     device::operation --chunk, seal--> WireSink --> Giver --frames--> stream
//!   restore:  stream --frames--> Taker --verified chunks, seals--> WireSource --> device::operation
//! ```
//! A giver of version 2 whose connection broke comes back: see `relink` and `source`.
//! With a store of the agent in place of the stream it is `StoreSink` and `StoreSource`.
//!
//! Nothing here knows gRPC: a stream is a link of messages, as the client library has it, and a peer agent's is the
//! same. Nothing here holds more than a few chunks.

mod relink;
mod sink;
mod source;
mod store;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use vfio_checkpoint_client::transfer::{Dialed, Link, Taker, Terms, TransferError};
use vfio_checkpoint_device::{ConfigCapture, InterruptKind, PciCommand, Rearm};
use vfio_checkpoint_proto::domain::{
    self, ArmedInterrupts, ConfigSpaceCapture, Manifest, StreamLimits, StreamOpened,
};
use vfio_checkpoint_proto::frame::FrameError;
use vfio_checkpoint_proto::ids::StreamId;
use vfio_checkpoint_proto::stream::ProtocolError;
use vfio_checkpoint_proto::v1::stream_message::Kind;
use vfio_checkpoint_proto::v1::{FailureReason, StreamMessage};
use vfio_checkpoint_proto::version::Version;
use vfio_checkpoint_seal::SealMismatch;
use vfio_checkpoint_store::StoreError;

pub use relink::{Completed, Relinks};
pub use sink::{SinkWatch, WireSink};
use source::Comeback;
pub use source::WireSource;
pub use store::{LeftBehind, StoreSink, StoreSource};

use crate::config::AgentConfig;
use crate::core::Core;
use crate::operation::{Entry, Opener};

/// How much of a save may be under way before its taker says that it has it. Coarse: it serves progress.
const SAVE_ACK_INTERVAL_BYTES: u64 = 8 << 20;
/// How much this agent takes before it says that it has it. Still coarse, but a giver predicts from it how long a stop of its
/// devices takes: by no more than this it takes for under way what has arrived while state flows.
const ACK_INTERVAL_BYTES: u64 = 1 << 20;
/// How long after it came this agent acknowledges what nothing follows. Short beside a downtime, and long beside the time
/// between two chunks on a line that is busy.
const ACK_DELAY: Duration = Duration::from_millis(5);

/// A peer that takes state and has nothing to say speaks three times in this time, or in that which it has agreed to, where it
/// is shorter. With less patience than this a peer that is well would be given up.
const PATIENCE: Duration = Duration::from_secs(3);

/// The open stream of an operation.
#[derive(Debug)]
pub struct Attached {
    /// Its two directions.
    pub link: Link,
    /// Who says what may be sent.
    pub terms: Agreement,
    /// The identity of the caller that opened it. Empty of a stream that this agent opened.
    pub opener: String,
}

/// Who says what may be sent on a stream: whoever was called.
#[derive(Debug)]
pub enum Agreement {
    /// This agent, whose answer is still owed to the caller.
    Ours {
        /// The version that both speak.
        version: Version,
        /// The longest chunk that the caller takes.
        max_chunk_bytes: Option<u32>,
        /// The outgoing direction once more, for the answer.
        outgoing: mpsc::Sender<StreamMessage>,
    },
    /// The peer that this agent called, and it has said so.
    Theirs(Terms),
}

impl Attached {
    /// The stream of a peer that this agent called.
    pub fn dialed(dialed: Dialed) -> Self {
        let Dialed { opened, link } = dialed;
        Self { link, terms: Agreement::Theirs(Terms::of(&opened)), opener: String::new() }
    }

    /// Agrees on the terms of a stream with these devices, whose state this agent gives; a caller gets its answer.
    pub async fn open(self, config: &AgentConfig, stream: StreamId, manifest: Manifest) -> (Link, Terms) {
        self.agree(config, Half::Gives, stream, manifest).await
    }

    async fn agree(
        self,
        config: &AgentConfig,
        half: Half,
        stream: StreamId,
        manifest: Manifest,
    ) -> (Link, Terms) {
        let Self { link, terms, opener: _ } = self;
        let terms = match terms {
            Agreement::Theirs(terms) => {
                let limits = within(config, terms.limits);
                return (link, Terms { limits, ..terms });
            }
            Agreement::Ours { version, max_chunk_bytes, outgoing } => {
                let opened = answer(config, half, version, max_chunk_bytes, stream, manifest);
                let terms = Terms::of(&opened);
                let message = StreamMessage { kind: Some(Kind::Opened(opened.into())) };
                // Where the caller is gone already, the first use of the link finds out.
                let _ = outgoing.send(message).await;
                terms
            }
        };
        (link, terms)
    }

    /// The same for the state of a restore, whose giver may come back where it speaks a version that has it.
    pub async fn source(
        self,
        core: &Core,
        stream: StreamId,
        manifest: Manifest,
        entry: &Arc<Entry>,
    ) -> WireSource {
        let config = &core.config;
        let (version, max_chunk_bytes) = match &self.terms {
            Agreement::Ours { version, max_chunk_bytes, .. } if version.resumes() => {
                (*version, *max_chunk_bytes)
            }
            Agreement::Ours { .. } | Agreement::Theirs(_) => {
                let (link, terms) = self.agree(config, Half::Takes, stream, manifest).await;
                return WireSource::new(Taker::new(link, terms), Arc::clone(entry));
            }
        };
        let opened = answer(config, Half::Takes, version, max_chunk_bytes, stream, manifest.clone());
        // Before the answer: whoever has that may come back.
        let reserved = entry.reserve(Opener { stream, identity: self.opener.clone() });
        let (link, terms) = self.agree(config, Half::Takes, stream, manifest).await;
        let comeback = Comeback::new(
            reserved,
            opened,
            core.environment.clone(),
            core.tasks.clone(),
            config.server.stream_resume_window,
        );
        WireSource::resumable(Taker::new(link, terms), Arc::clone(entry), comeback)
    }
}

/// What this agent is to a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Half {
    Gives,
    Takes,
}

/// What a caller is told of a stream that is new.
fn answer(
    config: &AgentConfig,
    half: Half,
    version: Version,
    max_chunk_bytes: Option<u32>,
    stream_id: StreamId,
    manifest: Manifest,
) -> StreamOpened {
    let ours = config.limits.max_chunk_bytes;
    let (ack_interval_bytes, ack_delay) = match half {
        Half::Gives => (SAVE_ACK_INTERVAL_BYTES, None),
        Half::Takes => (ACK_INTERVAL_BYTES, Some(ACK_DELAY)),
    };
    let limits = StreamLimits {
        max_chunk_bytes: max_chunk_bytes.map_or(ours, |theirs| theirs.min(ours)),
        max_device_bytes: config.limits.max_device_bytes,
        idle_timeout: config.server.stream_idle_timeout,
        lifetime: config.server.stream_lifetime,
        ack_interval_bytes,
        ack_delay,
    };
    StreamOpened { version, stream_id, manifest, limits, next_sequence: 0 }
}

/// What a peer allows is its word. How long this agent waits for it, while devices may stand still, is this agent's own, but
/// for what a peer that is well may need to be heard: it does not know how patient this agent is.
fn within(config: &AgentConfig, theirs: StreamLimits) -> StreamLimits {
    StreamLimits {
        idle_timeout: theirs.idle_timeout.min(config.server.stream_idle_timeout.max(PATIENCE)),
        lifetime: theirs.lifetime.min(config.server.stream_lifetime),
        ..theirs
    }
}

/// A failure of a stream that more than one has to hear of.
#[derive(Debug, Clone)]
pub struct Shared(Arc<TransferError>);

impl Shared {
    fn new(error: TransferError) -> Self {
        Self(Arc::new(error))
    }
}

impl fmt::Display for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for Shared {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source()
    }
}

/// The stable reason of a failure of whoever gives or takes state; none where it is no failure of a stream.
pub fn reason(error: &(dyn std::error::Error + 'static)) -> Option<FailureReason> {
    if let Some(error) = error.downcast_ref::<StoreError>() {
        return Some(store_reason(error));
    }
    if error.is::<SealMismatch>() {
        // Every chunk was what its name says, and all together are not what was sealed.
        return Some(FailureReason::CheckpointDamaged);
    }
    let shared = error.downcast_ref::<Shared>().map(|shared| &*shared.0);
    Some(match shared.or_else(|| error.downcast_ref::<TransferError>())? {
        // A giver that cannot keep what it may have to send again cannot go on with its stream.
        TransferError::Broken(_) | TransferError::Spool(_) => FailureReason::StreamBroken,
        TransferError::NotResumed { broke, .. } => return reason(&**broke),
        TransferError::AbortedByPeer(_) => FailureReason::AbortedByPeer,
        TransferError::Changed { .. }
        | TransferError::Protocol(ProtocolError::Frame(
            FrameError::SealLength { .. } | FrameError::SealDigest { .. },
        )) => FailureReason::SealMismatch,
        TransferError::Protocol(_) => FailureReason::StreamProtocol,
        TransferError::Idle(_) | TransferError::NotSealed(_) => FailureReason::StreamIdle,
        TransferError::Lifetime(_) => FailureReason::StreamLifetime,
    })
}

fn store_reason(error: &StoreError) -> FailureReason {
    match error {
        StoreError::Damaged { .. } | StoreError::NotFound { .. } => FailureReason::CheckpointDamaged,
        StoreError::NoSpace { .. } | StoreError::DiskFull { .. } => FailureReason::StoreFull,
        StoreError::Unavailable { .. }
        | StoreError::NotRegular { .. }
        | StoreError::Foreign { .. }
        | StoreError::Missing { .. }
        | StoreError::Revoked { .. }
        | StoreError::TooLarge { .. }
        | StoreError::Invalid { .. }
        | StoreError::Location { .. }
        | StoreError::Folder { .. }
        | StoreError::Died => FailureReason::StoreFailed,
    }
}

fn capture_to_wire(capture: &ConfigCapture) -> ConfigSpaceCapture {
    ConfigSpaceCapture {
        command: capture.command.0,
        interrupts: capture.interrupts.map(|rearm| ArmedInterrupts {
            kind: match rearm.kind {
                InterruptKind::Msi => domain::InterruptKind::Msi,
                InterruptKind::MsiX => domain::InterruptKind::MsiX,
            },
            vectors: rearm.vectors,
        }),
    }
}

fn capture_from_wire(capture: &ConfigSpaceCapture) -> ConfigCapture {
    ConfigCapture {
        command: PciCommand(capture.command),
        interrupts: capture.interrupts.map(|armed| Rearm {
            kind: match armed.kind {
                domain::InterruptKind::Msi => InterruptKind::Msi,
                domain::InterruptKind::MsiX => InterruptKind::MsiX,
            },
            vectors: armed.vectors,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_makes_this_agent_wait_no_longer_than_its_own_configuration() {
        let config = AgentConfig::default();
        let limits = |idle_timeout, lifetime| StreamLimits {
            max_chunk_bytes: 1 << 16,
            max_device_bytes: 1 << 20,
            idle_timeout,
            lifetime,
            ack_interval_bytes: 1 << 20,
            ack_delay: None,
        };
        let longest = limits(Duration::from_hours(24), StreamLimits::MAX_LIFETIME);
        let own = limits(config.server.stream_idle_timeout, config.server.stream_lifetime);
        assert_eq!(within(&config, longest), own);
        let shortest = limits(Duration::from_millis(1), Duration::from_millis(2));
        assert_eq!(within(&config, shortest), shortest);
        // Whatever its own is, it waits for as long as a peer that is well may be silent.
        let mut hasty = config;
        hasty.server.stream_idle_timeout = Duration::from_millis(1);
        assert_eq!(within(&hasty, longest).idle_timeout, PATIENCE);
        assert_eq!(within(&hasty, shortest), shortest);
    }
}
