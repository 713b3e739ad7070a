//! The way in: from a connection to one whose peer is known.
//!
//! ```text
//!   network::Listener -> accept -> handshake task (bounded in number and time) -> PeerRegistry::register
//!                                      |                                              |
//!                                      +-- refused: one log line, socket closed       +-> TlsConnection -> Incoming
//! ```
//!
//! Invariants:
//! - Accepting never waits for a handshake. When all handshake places are taken, the oldest unfinished one
//!   gives way: an honest handshake takes milliseconds, so whoever holds a place longest is the one that
//!   stalls.
//! - A place among the connections is taken only after the handshake: who shows no valid certificate cannot
//!   fill them.
//! - A cut connection gives errors from both directions at once, whatever its task waits for.
//!
//! Failure paths: a failed handshake is counted and logged at `warn`, at most `LOG_LINES_PER_WINDOW` lines
//! in `LOG_WINDOW`, with the number of those left out; a failing `accept` (no descriptors left) is logged
//! and tried again.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::Stream;
use futures_util::future::BoxFuture;
use rustls_pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;
use tracing::warn;
use vfio_checkpoint_client::network::{self, BoxStream};
use vfio_checkpoint_client::socket::{Socket, socket, write_in_large_steps};

use super::peers::{ConnectionGuard, CutReason, PeerInfo, PeerRegistry, RefusedPeer};
use super::reload::{TlsSource, chain_of};

/// Log lines about refused connections in one window.
const LOG_LINES_PER_WINDOW: u32 = 20;
/// The window.
const LOG_WINDOW: Duration = Duration::from_secs(10);
/// How long to leave a failing `accept` alone: out of descriptors, it fails at once and for ever.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Connections that wait for the server to take them.
const HANDOVER_DEPTH: usize = 16;

/// The limits of the way in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AcceptLimits {
    /// How long a handshake may take.
    pub handshake_timeout: Duration,
    /// How many may be under way.
    pub max_handshakes: usize,
}

impl Default for AcceptLimits {
    fn default() -> Self {
        Self { handshake_timeout: Duration::from_secs(10), max_handshakes: 128 }
    }
}

/// Why a connection did not get in.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// TLS failed: no certificate, a wrong one, a wrong version.
    #[error("the TLS handshake failed")]
    Tls {
        /// What rustls says.
        #[source]
        source: io::Error,
    },
    /// It took too long.
    #[error("the TLS handshake took longer than {timeout_ms} ms")]
    TimedOut {
        /// The limit.
        timeout_ms: u128,
    },
    /// The peer is verified and not wanted.
    #[error("the peer was not let in")]
    Refused {
        /// Why.
        #[source]
        source: RefusedPeer,
    },
}

/// What happened at the door, for metrics. Only ever grows.
#[derive(Debug, Default)]
pub struct AcceptCounters {
    accepted: AtomicU64,
    failed: AtomicU64,
    timed_out: AtomicU64,
    refused: AtomicU64,
    evicted: AtomicU64,
}

/// A reading of [`AcceptCounters`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AcceptCounts {
    /// Got in.
    pub accepted: u64,
    /// Handshake failed.
    pub failed: u64,
    /// Handshake took too long.
    pub timed_out: u64,
    /// Verified and not let in.
    pub refused: u64,
    /// Unfinished handshakes that gave way to a newer one.
    pub evicted: u64,
}

impl AcceptCounters {
    /// Reads them.
    pub fn read(&self) -> AcceptCounts {
        AcceptCounts {
            accepted: self.accepted.load(Ordering::Relaxed),
            failed: self.failed.load(Ordering::Relaxed),
            timed_out: self.timed_out.load(Ordering::Relaxed),
            refused: self.refused.load(Ordering::Relaxed),
            evicted: self.evicted.load(Ordering::Relaxed),
        }
    }
}

/// The listening side.
#[derive(Debug)]
pub struct Listener {
    door: Box<dyn network::Listener>,
    source: TlsSource,
    registry: PeerRegistry,
    limits: AcceptLimits,
    counters: Arc<AcceptCounters>,
}

impl Listener {
    /// Takes over who listens.
    pub fn new(
        door: Box<dyn network::Listener>,
        source: TlsSource,
        registry: PeerRegistry,
        limits: AcceptLimits,
    ) -> Self {
        Self { door, source, registry, limits, counters: Arc::default() }
    }

    /// Where it listens.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.door.local_address()
    }

    /// What happens at the door.
    pub fn counters(&self) -> Arc<AcceptCounters> {
        Arc::clone(&self.counters)
    }

    /// The connections, and what accepts them: a task for its owner to run. It ends, with all handshakes, once the
    /// connections are dropped.
    pub fn incoming(self) -> (Incoming, impl Future<Output = ()> + Send + use<>) {
        let (ready, connections) = mpsc::channel(HANDOVER_DEPTH);
        (Incoming { connections }, accept_all(self, ready))
    }
}

/// The connections, for `serve_with_incoming`.
#[derive(Debug)]
pub struct Incoming {
    connections: mpsc::Receiver<TlsConnection>,
}

impl Stream for Incoming {
    type Item = io::Result<TlsConnection>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.connections.poll_recv(cx).map(|connection| connection.map(Ok))
    }
}

async fn accept_all(listener: Listener, ready: mpsc::Sender<TlsConnection>) {
    let Listener { door, source, registry, limits, counters } = listener;
    let log = Arc::new(LogGate::default());
    let mut pending: VecDeque<AbortHandle> = VecDeque::new();
    let mut handshakes = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            biased;
            () = ready.closed() => break,
            accepted = door.accept() => accepted,
        };
        let (stream, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                log.warn(|left_out| warn!(%error, left_out, "cannot accept connections; trying again"));
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        while handshakes.try_join_next().is_some() {}
        pending.retain(|handshake| !handshake.is_finished());
        while pending.len() >= limits.max_handshakes.max(1) {
            let Some(oldest) = pending.pop_front() else { break };
            oldest.abort();
            counters.evicted.fetch_add(1, Ordering::Relaxed);
            log.warn(|left_out| {
                warn!(limit = limits.max_handshakes, left_out, "too many handshakes; the oldest gives way");
            });
        }
        let (source, registry, ready) = (source.clone(), registry.clone(), ready.clone());
        let (counters, log) = (Arc::clone(&counters), Arc::clone(&log));
        let task = handshakes.spawn(async move {
            match handshake(stream, address, &source, &registry, limits.handshake_timeout).await {
                Ok(connection) => {
                    counters.accepted.fetch_add(1, Ordering::Relaxed);
                    // Fails when the server is going down, and the connection goes with it.
                    let _ = ready.send(connection).await;
                }
                Err(error) => {
                    let counter = match &error {
                        HandshakeError::Tls { .. } => &counters.failed,
                        HandshakeError::TimedOut { .. } => &counters.timed_out,
                        HandshakeError::Refused { .. } => &counters.refused,
                    };
                    counter.fetch_add(1, Ordering::Relaxed);
                    log.warn(|left_out| {
                        warn!(%address, reason = %chain_of(&error), left_out, "connection refused");
                    });
                }
            }
        });
        pending.push_back(task);
    }
    handshakes.shutdown().await;
}

async fn handshake(
    stream: BoxStream,
    address: SocketAddr,
    source: &TlsSource,
    registry: &PeerRegistry,
    timeout: Duration,
) -> Result<TlsConnection, HandshakeError> {
    let acceptor = TlsAcceptor::from(Arc::clone(&source.current().server));
    let mut stream = tokio::time::timeout(timeout, acceptor.accept(socket(stream)))
        .await
        .map_err(|_elapsed| HandshakeError::TimedOut { timeout_ms: timeout.as_millis() })?
        .map_err(|source| HandshakeError::Tls { source })?;
    write_in_large_steps(stream.get_mut().1);
    let chain: Vec<_> = stream
        .get_ref()
        .1
        .peer_certificates()
        .unwrap_or_default()
        .iter()
        .cloned()
        .map(CertificateDer::into_owned)
        .collect();
    let guard = registry.register(chain, address).map_err(|source| HandshakeError::Refused { source })?;
    Ok(TlsConnection {
        cut_for_reader: Box::pin(guard.cut()),
        cut_for_writer: Box::pin(guard.cut()),
        cut: None,
        stream,
        guard,
    })
}

/// A connection whose peer is known, until it is cut.
pub struct TlsConnection {
    stream: TlsStream<Socket>,
    guard: ConnectionGuard,
    /// One for each direction: the two may wait in different tasks, and each has to be woken.
    cut_for_reader: BoxFuture<'static, CutReason>,
    cut_for_writer: BoxFuture<'static, CutReason>,
    cut: Option<CutReason>,
}

impl std::fmt::Debug for TlsConnection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TlsConnection")
            .field("guard", &self.guard)
            .field("cut", &self.cut)
            .finish_non_exhaustive()
    }
}

#[derive(Clone, Copy)]
enum Direction {
    Read,
    Write,
}

impl TlsConnection {
    /// The error of a cut connection; otherwise makes sure that the cut wakes this direction.
    fn check(&mut self, direction: Direction, cx: &mut Context<'_>) -> io::Result<()> {
        if self.cut.is_none() {
            let waiting = match direction {
                Direction::Read => &mut self.cut_for_reader,
                Direction::Write => &mut self.cut_for_writer,
            };
            // Polled again only while it is pending: once ready, `cut` is set for good.
            if let Poll::Ready(reason) = waiting.as_mut().poll(cx) {
                self.cut = Some(reason);
            }
        }
        match &self.cut {
            Some(reason) => Err(io::Error::new(io::ErrorKind::ConnectionAborted, reason.to_string())),
            None => Ok(()),
        }
    }
}

impl Connected for TlsConnection {
    type ConnectInfo = PeerInfo;

    fn connect_info(&self) -> PeerInfo {
        self.guard.info().clone()
    }
}

impl AsyncRead for TlsConnection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check(Direction::Read, cx)?;
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for TlsConnection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.check(Direction::Write, cx)?;
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check(Direction::Write, cx)?;
        Pin::new(&mut self.stream).poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check(Direction::Write, cx)?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check(Direction::Write, cx)?;
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Lets a bounded number of log lines through in each window.
#[derive(Debug, Default)]
struct LogGate(Mutex<LogWindow>);

#[derive(Debug, Default)]
struct LogWindow {
    began: Option<Instant>,
    lines: u32,
    left_out: u64,
}

impl LogGate {
    /// Calls `write` with the number of lines left out since the last one, or leaves this one out too.
    fn warn(&self, write: impl FnOnce(u64)) {
        if let Some(left_out) = self.admit(Instant::now()) {
            write(left_out);
        }
    }

    fn admit(&self, now: Instant) -> Option<u64> {
        let mut window = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if window.began.is_none_or(|began| now.duration_since(began) >= LOG_WINDOW) {
            window.began = Some(now);
            window.lines = 0;
        }
        if window.lines >= LOG_LINES_PER_WINDOW {
            window.left_out += 1;
            return None;
        }
        window.lines += 1;
        Some(std::mem::take(&mut window.left_out))
    }
}
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_refusals_is_a_bounded_number_of_lines_and_a_count() {
        let (gate, start) = (LogGate::default(), Instant::now());
        let lines = (0..1000).filter(|_| gate.admit(start).is_some()).count();
        assert_eq!(lines, LOG_LINES_PER_WINDOW as usize);
        assert_eq!(gate.admit(start + LOG_WINDOW), Some(1000 - u64::from(LOG_LINES_PER_WINDOW)));
        assert_eq!(gate.admit(start + LOG_WINDOW), Some(0));
    }
}
