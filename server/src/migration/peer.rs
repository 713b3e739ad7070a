//! The destination's agent, as the source calls it.

use std::sync::Arc;
use std::time::Duration;

use vfio_checkpoint_client::call::{CallError, CallOptions, Client, RetryPolicy};
use vfio_checkpoint_client::connect::{ConnectError, ConnectOptions};
use vfio_checkpoint_client::tls::ServerCheck;
use vfio_checkpoint_proto::v1;

use crate::core::Core;
use crate::operation::record::PeerRecord;
use crate::security::files::TlsError;
use crate::security::identity::SpiffeId;
use crate::security::server_identity::ServerExpectation;
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
    /// What it says cannot be.
    #[error("the destination's answer cannot be used: {0}")]
    Answer(String),
}

impl Core {
    /// Connects to the agent at the other side.
    pub(crate) async fn dial(&self, peer: &PeerRecord) -> Result<Client, PeerError> {
        let PeerRecord::Destination { endpoint, spiffe_id } = peer else {
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
        let tls = source.client_config(expected).map_err(PeerError::Tls)?;
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

/// What a destination has on record, as it says.
pub(super) fn record(found: Option<v1::HandoverRecord>) -> Result<v1::HandoverRecord, PeerError> {
    found.ok_or_else(|| PeerError::Answer("it has no record in it".to_owned()))
}
