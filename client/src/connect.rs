//! Connects to an agent: TCP, TLS, HTTP/2, each failure with its own words.
//!
//! ```text
//!   https://host:port -> look up -> TCP -> TLS 1.3 -> HTTP/2 -> first bytes of the agent -> Client
//! ```
//!
//! In TLS 1.3 a client is done with its handshake before the server has seen the client's certificate. So a connection
//! counts as made when the agent's first bytes are there: only then has it accepted who we are. `Gate` watches for it.
//!
//! Invariants: there is one time limit over all steps. Nothing is sent without TLS. HTTP/2 windows are explicit.
//!
//! Failure paths: [`ConnectError`] has a variant for each step. A connection that breaks later is made again by the
//! next call; why that failed is kept for that call's error.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use http::Uri;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint};

use crate::network::{Network, Tcp};
use crate::socket::{Socket, socket, write_in_large_steps};
use crate::tls::{self, Explanation, ServerCheck};

/// A stream of state has one window of its own; this holds several chunks, so that a long way does not starve it.
const STREAM_WINDOW_BYTES: u32 = 8 * 1024 * 1024;
/// Room for two such streams on one connection.
const CONNECTION_WINDOW_BYTES: u32 = 16 * 1024 * 1024;
/// A chunk of the usual size goes in one HTTP/2 frame.
const MAX_HTTP2_FRAME_BYTES: u32 = 1024 * 1024;
/// Error details list at most a few dozen blockers.
const MAX_HEADER_LIST_BYTES: u32 = 64 * 1024;

/// How to reach an agent.
#[derive(Clone)]
pub struct ConnectOptions {
    /// `https://host:port`.
    pub endpoint: String,
    /// From [`tls::client_config`].
    pub tls: Arc<ClientConfig>,
    /// Who the agent must be: the same check that `tls` was made with. It gives the name that TLS is told.
    pub server: ServerCheck,
    /// For all steps together.
    pub connect_timeout: Duration,
    /// A ping goes out after this long without traffic.
    pub keepalive_interval: Duration,
    /// The connection is given up when a ping is not answered for this long.
    pub keepalive_timeout: Duration,
    /// What leads to the agent: the machine's own network, unless told otherwise.
    pub network: Arc<dyn Network>,
}

impl ConnectOptions {
    /// Options with the usual times.
    pub fn new(endpoint: impl Into<String>, tls: Arc<ClientConfig>, server: ServerCheck) -> Self {
        Self {
            endpoint: endpoint.into(),
            tls,
            server,
            connect_timeout: Duration::from_secs(10),
            keepalive_interval: Duration::from_secs(20),
            keepalive_timeout: Duration::from_secs(10),
            network: Arc::new(Tcp),
        }
    }
}

impl fmt::Debug for ConnectOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectOptions")
            .field("endpoint", &self.endpoint)
            .field("server", &self.server)
            .field("connect_timeout", &self.connect_timeout)
            .finish_non_exhaustive()
    }
}

/// What is known of the newest connection.
#[derive(Debug, Clone)]
pub(crate) enum Standing {
    /// On its way, or its TLS is up and the agent has not said anything yet.
    Connecting,
    /// The agent has spoken.
    Accepted,
    /// It failed, or ended with a TLS error.
    Failed(ConnectError),
}

/// Connects, and waits until the agent has accepted the client certificate.
pub(crate) async fn connect(
    options: &ConnectOptions,
) -> Result<(Channel, watch::Receiver<Standing>), ConnectError> {
    let target = Target::parse(options)?;
    let deadline = Instant::now() + options.connect_timeout;
    let (standing, mut seen) = watch::channel(Standing::Connecting);
    let standing = Arc::new(standing);
    let reconnect = {
        let (target, standing, tls) = (target.clone(), standing.clone(), options.tls.clone());
        let (network, limit) = (Arc::clone(&options.network), options.connect_timeout);
        move |_: Uri| {
            let (target, standing, tls) = (target.clone(), standing.clone(), tls.clone());
            let network = Arc::clone(&network);
            async move {
                // A failure stands until the agent has spoken again: whoever asks why must not find it overwritten.
                standing.send_if_modified(|standing| {
                    let was_accepted = matches!(standing, Standing::Accepted);
                    if was_accepted {
                        *standing = Standing::Connecting;
                    }
                    was_accepted
                });
                match open(&*network, &target, tls, limit).await {
                    Ok(stream) => Ok(TokioIo::new(Gate {
                        stream,
                        target,
                        standing,
                        has_spoken: false,
                        has_failed: false,
                    })),
                    Err(error) => {
                        standing.send_replace(Standing::Failed(error.clone()));
                        Err(error)
                    }
                }
            }
        }
    };
    let endpoint = Endpoint::from(target.uri.clone())
        .http2_keep_alive_interval(options.keepalive_interval)
        .keep_alive_timeout(options.keepalive_timeout)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(MAX_HTTP2_FRAME_BYTES)
        .http2_max_header_list_size(MAX_HEADER_LIST_BYTES);
    let channel = match endpoint.connect_with_connector(tower::service_fn(reconnect)).await {
        Ok(channel) => channel,
        Err(source) => {
            // What our own connector found is more exact than what HTTP/2 made of it.
            let found = seen.borrow().clone();
            return Err(match found {
                Standing::Failed(error) => error,
                Standing::Connecting | Standing::Accepted => {
                    ConnectError::Http2 { authority: target.authority(), source: Arc::new(source) }
                }
            });
        }
    };
    let spoken = seen.wait_for(|standing| !matches!(standing, Standing::Connecting));
    let outcome = match timeout_at(deadline, spoken).await {
        Ok(Ok(standing)) => match &*standing {
            Standing::Failed(error) => Err(error.clone()),
            Standing::Accepted | Standing::Connecting => Ok(()),
        },
        Ok(Err(_)) => Err(ConnectError::Closed { authority: target.authority() }),
        Err(_) => Err(target.timed_out("waiting for the agent's first bytes", options.connect_timeout)),
    };
    outcome.map(|()| (channel, seen))
}

#[derive(Debug, Clone)]
struct Target {
    uri: Uri,
    host: String,
    port: u16,
    server_name: ServerName<'static>,
}

impl Target {
    fn parse(options: &ConnectOptions) -> Result<Self, ConnectError> {
        let bad = |problem: &str| ConnectError::BadEndpoint {
            endpoint: options.endpoint.chars().take(256).collect(),
            problem: problem.to_owned(),
        };
        let uri: Uri = options.endpoint.parse().map_err(|error| bad(&format!("{error}")))?;
        if uri.scheme_str() != Some("https") {
            return Err(bad("it does not begin with https://"));
        }
        if uri.path() != "/" || uri.query().is_some() {
            return Err(bad("it has a path"));
        }
        let (Some(host), Some(port)) = (uri.host(), uri.port_u16()) else {
            return Err(bad("it has no host or no port"));
        };
        // An IPv6 address has brackets in a URI and nowhere else.
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let server_name = options.server.server_name(&host).map_err(|error| bad(&error.to_string()))?;
        Ok(Self { uri, host, port, server_name })
    }

    fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }

    fn timed_out(&self, step: &'static str, after: Duration) -> ConnectError {
        ConnectError::Timeout { authority: self.authority(), step, after }
    }
}

type TlsStream = tokio_rustls::client::TlsStream<Socket>;

async fn open(
    network: &dyn Network,
    target: &Target,
    tls: Arc<ClientConfig>,
    limit: Duration,
) -> Result<TlsStream, ConnectError> {
    let deadline = Instant::now() + limit;
    let found = timeout_at(deadline, network.resolve(&target.host, target.port))
        .await
        .map_err(|_| target.timed_out("looking up its name", limit))?;
    let unknown =
        |source: io::Error| ConnectError::UnknownHost { host: target.host.clone(), source: Arc::new(source) };
    let addresses = found.map_err(unknown)?;
    let mut last = unknown(io::Error::new(io::ErrorKind::NotFound, "the name has no address"));
    for address in addresses {
        match timeout_at(deadline, network.connect(address)).await {
            Ok(Ok(stream)) => return handshake(target, tls, socket(stream), deadline, limit).await,
            Ok(Err(source)) if source.kind() == io::ErrorKind::ConnectionRefused => {
                last = ConnectError::Refused { address };
            }
            Ok(Err(source)) => last = ConnectError::Unreachable { address, source: Arc::new(source) },
            Err(_) => return Err(target.timed_out("opening a TCP connection", limit)),
        }
    }
    Err(last)
}

async fn handshake(
    target: &Target,
    tls: Arc<ClientConfig>,
    socket: Socket,
    deadline: Instant,
    limit: Duration,
) -> Result<TlsStream, ConnectError> {
    let connector = TlsConnector::from(tls);
    match timeout_at(deadline, connector.connect(target.server_name.clone(), socket)).await {
        Ok(Ok(mut stream)) => {
            write_in_large_steps(stream.get_mut().1);
            Ok(stream)
        }
        Ok(Err(source)) => Err(target.failed(&source)),
        Err(_) => Err(target.timed_out("shaking hands over TLS", limit)),
    }
}

impl Target {
    /// What an error of the TLS stream means.
    fn failed(&self, source: &io::Error) -> ConnectError {
        let authority = self.authority();
        match source.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            Some(error) => {
                let source = Arc::new(error.clone());
                ConnectError::Handshake { authority, explanation: tls::explain(error), source }
            }
            None => ConnectError::Closed { authority },
        }
    }
}

/// The connection, as HTTP/2 sees it. It notes the first bytes of the agent, and the TLS error it may end with.
struct Gate {
    stream: TlsStream,
    target: Target,
    standing: Arc<watch::Sender<Standing>>,
    has_spoken: bool,
    has_failed: bool,
}

impl Gate {
    fn fail(&mut self, error: ConnectError) {
        self.has_failed = true;
        self.standing.send_replace(Standing::Failed(error));
    }

    /// A write failed. An agent that refuses the certificate says so and closes, so what it said may still be there to
    /// be read, and says more than the write does. Where it is not readable yet, the write waits for it: a connection
    /// that cannot be written to becomes readable, if only to show its end.
    fn fail_write<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        let Poll::Ready(Err(error)) = &written else { return written };
        if self.has_failed {
            return written;
        }
        let mut scratch = [0; 256];
        let found = if self.has_spoken {
            self.target.failed(error)
        } else {
            match ready!(Pin::new(&mut self.stream).poll_read(cx, &mut ReadBuf::new(&mut scratch))) {
                Err(said) => self.target.failed(&said),
                Ok(()) => self.target.failed(error),
            }
        };
        self.fail(found);
        written
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        if !self.has_spoken && !self.has_failed {
            let closed = ConnectError::Closed { authority: self.target.authority() };
            self.fail(closed);
        }
    }
}

impl AsyncRead for Gate {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = ready!(Pin::new(&mut self.stream).poll_read(cx, buf));
        match &read {
            Ok(()) if self.has_spoken => {}
            Ok(()) if buf.filled().len() > before => {
                self.has_spoken = true;
                self.standing.send_replace(Standing::Accepted);
            }
            Ok(()) => {
                let closed = ConnectError::Closed { authority: self.target.authority() };
                self.fail(closed);
            }
            Err(error) => {
                let failed = self.target.failed(error);
                self.fail(failed);
            }
        }
        Poll::Ready(read)
    }
}

impl AsyncWrite for Gate {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.fail_write(cx, written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        self.fail_write(cx, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.fail_write(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

/// Why there is no connection to an agent.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ConnectError {
    /// The endpoint cannot be one.
    #[error("the endpoint {endpoint:?} cannot be used: {problem}; give https://host:port")]
    BadEndpoint {
        /// What was given, at most 256 characters of it.
        endpoint: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The name of the host has no address.
    #[error(
        "the host {host} cannot be found: {source}; see that the name is right and that this machine can look it up"
    )]
    UnknownHost {
        /// The name.
        host: String,
        /// Why not.
        source: Arc<io::Error>,
    },
    /// Nobody listens there.
    #[error("{address} refuses the connection; see that the agent runs and listens on this port")]
    Refused {
        /// Where.
        address: SocketAddr,
    },
    /// The network does not lead there.
    #[error(
        "{address} cannot be reached: {source}; see that the network and its policies let this machine through"
    )]
    Unreachable {
        /// Where.
        address: SocketAddr,
        /// Why not.
        source: Arc<io::Error>,
    },
    /// The TLS handshake failed, on either side.
    #[error("no TLS with {authority}: {explanation}")]
    Handshake {
        /// Host and port.
        authority: String,
        /// In words.
        explanation: Explanation,
        /// As rustls says it.
        source: Arc<rustls::Error>,
    },
    /// The other side ended the connection without a word.
    #[error(
        "{authority} closed the connection without a word; see that it is the agent's gRPC port, and the agent's log"
    )]
    Closed {
        /// Host and port.
        authority: String,
    },
    /// It took too long.
    #[error("no connection to {authority} within {} ms, while {step}; see that the agent is up and the network lets this machine through", after.as_millis())]
    Timeout {
        /// Host and port.
        authority: String,
        /// What was going on.
        step: &'static str,
        /// How long it took.
        after: Duration,
    },
    /// HTTP/2 could not be set up.
    #[error("no HTTP/2 with {authority}: {source}; see that the endpoint is the agent's gRPC port")]
    Http2 {
        /// Host and port.
        authority: String,
        /// Why not.
        source: Arc<tonic::transport::Error>,
    },
}

impl ConnectError {
    /// Whether it is about who the caller is: another certificate is needed, and trying again is of no use.
    pub fn is_about_the_caller(&self) -> bool {
        match self {
            Self::Handshake { explanation, .. } => explanation.is_identity,
            Self::BadEndpoint { .. }
            | Self::UnknownHost { .. }
            | Self::Refused { .. }
            | Self::Unreachable { .. }
            | Self::Closed { .. }
            | Self::Http2 { .. }
            | Self::Timeout { .. } => false,
        }
    }
}
