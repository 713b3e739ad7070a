//! The destination's agent, as the source calls it.
//!
//! ```text
//!   until it has all state   dial_admitted   chain, SPIFFE ID or host name, role `peer`, the key of Admit
//!   after that               dial            chain, SPIFFE ID or host name, role `peer`
//! ```
//! Who the destination is the caller of Migrate says, who may have nothing but a certificate of the same authority. So the
//! source has a say of its own: the configured grants name who may be a peer, of those that call and of those that are
//! called.
//!
//! An identity may be that of many agents, as a service account's is. So what a ticket is for is told by both keys, the
//! source's (the destination looks at it) and the destination's, and state goes to that key alone: in Prepare, and on the
//! stream, also when that is opened again.
//!
//! # Invariants
//! - Nothing is sent to a destination that is not granted the role `peer`: it is refused in the handshake.
//! - Nothing of a manifest, and no state, is sent to another key than the one that the caller of Migrate has from Admit.
//!
//! # Failure paths
//! A destination that renews its certificate between Admit and Prepare is refused; a ticket of now helps. Where it does so
//! later, connections that stand go on. One that breaks before it has all state is not made again: the source runs on.
//! What is asked after that (`CommitHandover`, `GetHandover`, Resolve) is asked of whoever has the identity by then, over
//! a new connection: a source in doubt must not stay so because its destination has another key, and no state goes that
//! way. Another agent of that identity may answer, because a name or an address led there; without the secret of Prepare it
//! cannot prove that it is the one, and what it says is as if nobody had answered: see `agreed`. A destination that is not
//! granted the role any more is not asked before it is again.

use std::sync::Arc;
use std::time::Duration;

use vfio_checkpoint_client::call::{CallError, CallOptions, Client, RetryPolicy};
use vfio_checkpoint_client::connect::{ConnectError, ConnectOptions};
use vfio_checkpoint_client::tls::ServerCheck;
use vfio_checkpoint_proto::ids::KeyHash;
use vfio_checkpoint_proto::v1::BlockerReason;

use crate::core::Core;
use crate::operation::record::PeerRecord;
use crate::security::files::TlsError;
use crate::security::identity::{PublicKeyHash, SpiffeId};
use crate::security::roles::Role;
use crate::security::server_identity::{Demand, ServerExpectation, WrongServer};
use crate::telemetry;

/// How long a call to a peer may take. What takes longer is asked again.
const CALL_LIMIT: Duration = Duration::from_secs(5);
/// How long Prepare may take, at which everything stands as it was: a destination to which many come at once puts each of
/// them on record, one after the other.
pub(super) const PREPARE_LIMIT: Duration = Duration::from_secs(30);
/// How long it may take to connect.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// Why the other agent cannot be called.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PeerError {
    /// This agent has no certificate to call with.
    #[error("this agent has no certificate to call others with")]
    NoCertificate,
    /// The SPIFFE ID is none.
    #[error("target.spiffe_id is no SPIFFE ID: {0}")]
    SpiffeId(String),
    /// TLS cannot be set up.
    #[error("TLS cannot be set up")]
    Tls(#[source] TlsError),
    /// It cannot be reached.
    #[error("{0}")]
    Connect(#[source] ConnectError),
    /// It says no, or nothing.
    #[error("{0}")]
    Call(#[source] CallError),
    /// It does not prove that it is the one with which all was agreed.
    #[error(
        "whoever answers there does not prove that it is the agent that took the devices, so what it says does not count; \
         see that the endpoint leads to that agent, and not to another one of its identity"
    )]
    Unproven,
    /// What it says cannot be.
    #[error("the destination's answer cannot be used: {0}")]
    Answer(String),
}

impl PeerError {
    /// What is in the way where this is.
    pub(super) fn reason(&self) -> BlockerReason {
        match self {
            Self::Connect(ConnectError::Handshake { source, .. }) => match WrongServer::of(source) {
                Some(WrongServer::NoRole { .. }) => BlockerReason::DestinationNotAPeer,
                Some(WrongServer::OtherKey { .. }) => BlockerReason::DestinationOtherKey,
                Some(WrongServer::Other { .. } | WrongServer::Nobody { .. }) | None => {
                    BlockerReason::DestinationUnreachable
                }
            },
            Self::NoCertificate
            | Self::SpiffeId(_)
            | Self::Tls(_)
            | Self::Connect(
                ConnectError::BadEndpoint { .. }
                | ConnectError::UnknownHost { .. }
                | ConnectError::Refused { .. }
                | ConnectError::Unreachable { .. }
                | ConnectError::Closed { .. }
                | ConnectError::Timeout { .. }
                | ConnectError::Http2 { .. },
            )
            | Self::Call(_)
            | Self::Unproven
            | Self::Answer(_) => BlockerReason::DestinationUnreachable,
        }
    }
}

impl Core {
    /// Connects to the agent that admitted the devices, to bring them.
    pub(super) async fn dial_admitted(&self, peer: &PeerRecord) -> Result<Client, PeerError> {
        self.connect(peer, true).await
    }

    /// Connects to the agent at the other side, whatever key it has by now.
    pub(crate) async fn dial(&self, peer: &PeerRecord) -> Result<Client, PeerError> {
        self.connect(peer, false).await
    }

    async fn connect(&self, peer: &PeerRecord, with_key: bool) -> Result<Client, PeerError> {
        let PeerRecord::Destination { endpoint, spiffe_id, key } = peer else {
            return Err(PeerError::Answer("a source is not called".to_owned()));
        };
        let source = self.tls.as_ref().ok_or(PeerError::NoCertificate)?;
        let (expected, check) = match spiffe_id {
            None => (ServerExpectation::HostName, ServerCheck::Name(None)),
            Some(id) => {
                let wrong = |error: &dyn std::fmt::Display| PeerError::SpiffeId(error.to_string());
                let expected: SpiffeId = id.parse().map_err(|error| wrong(&error))?;
                let check = id.parse().map_err(|error| wrong(&error))?;
                (ServerExpectation::Spiffe(expected), ServerCheck::SpiffeId(check))
            }
        };
        let demand = Demand {
            policy: self.policy.clone(),
            role: Role::Peer,
            key: key.filter(|_| with_key).map(|KeyHash(key)| PublicKeyHash(key)),
        };
        let tls = source.client_config(expected, Some(demand)).map_err(PeerError::Tls)?;
        let mut options = ConnectOptions::new(endpoint.clone(), Arc::new(tls), check);
        options.connect_timeout = CONNECT_LIMIT;
        options.keepalive_interval = self.config.server.keepalive_interval;
        options.keepalive_timeout = self.config.server.keepalive_timeout;
        options.network = Arc::clone(&self.environment.network);
        let client = Client::connect(&options).await.map_err(PeerError::Connect)?;
        Ok(self.within(client, CALL_LIMIT))
    }

    /// The same connection, on which a call may take so long.
    pub(super) fn within(&self, client: Client, deadline: Duration) -> Client {
        client.with_call_options(CallOptions {
            deadline,
            retry: RetryPolicy::default(),
            trace: telemetry::current_trace_parent(),
            jitter: self.environment.jitter(),
        })
    }
}
