//! Every live connection, and when it has to end.
//!
//! ```text
//!   handshake -> register: counted, verified once more -> ConnectionGuard (on drop: forgotten)
//!                              |
//!   a date in a chain passes --+
//!   a revocation list ends   --+--> enforce: verify every chain again -> cut those that fail
//!   a new set is in force    --+
//!   a grant is taken away, or the agent ends ------------------------> cut those it is about
//! ```
//!
//! A handshake's verdict holds for its moment only; streams run for hours. So the verdict is asked for again,
//! by the same verifier that handshakes use, and who would not get in now is put out now, in the middle of a
//! stream.
//!
//! Invariants:
//! - No connection escapes a reload: it is entered first and verified against the set in force after that, so
//!   either it sees the new set, or the sweep for the new set sees it.
//! - A cut is final: the reason is set once and the connection only fails from there on.
//! - At most `max_connections`, and at most `max_connections_per_identity` of one identity.
//!
//! Failure paths: a full table refuses the newest; a poisoned lock is taken over, as every change under it is
//! whole.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use rustls_pki_types::{CertificateDer, UnixTime};
use tokio::sync::{Notify, watch};
use tracing::{error, warn};

use super::clock::Clock;
use super::identity::{Identity, IdentityError, PeerCertificate, validity_of};
use super::reload::TlsSource;

/// How many connections there may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerLimits {
    /// Of all peers.
    pub max_connections: usize,
    /// Of one identity. None: only the total counts.
    pub max_connections_per_identity: Option<usize>,
}

impl Default for PeerLimits {
    fn default() -> Self {
        Self { max_connections: 1024, max_connections_per_identity: None }
    }
}

/// Why a verified peer is not let in.
#[derive(Debug, thiserror::Error)]
pub enum RefusedPeer {
    /// It showed no certificate. The handshake does not let that happen.
    #[error("the peer showed no certificate")]
    NoCertificate,
    /// Its certificate names nobody.
    #[error("the peer's certificate names nobody")]
    Identity {
        /// Why.
        #[source]
        source: IdentityError,
    },
    /// All places are taken.
    #[error("{limit} connections are open, which is the limit; close some or raise max_connections")]
    Full {
        /// The limit.
        limit: usize,
    },
    /// All places of this identity are taken.
    #[error("{who} has {limit} connections open, which is the limit for one identity")]
    IdentityFull {
        /// Who.
        who: String,
        /// The limit.
        limit: usize,
    },
    /// The set in force changed during the handshake.
    #[error("the peer's certificate no longer verifies")]
    NoLongerVerifies {
        /// What the verifier says.
        #[source]
        source: rustls::Error,
    },
}

/// Why a connection was ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CutReason(String);

impl fmt::Display for CutReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a request knows of its connection. In the extensions of every request.
#[derive(Debug, Clone)]
pub struct PeerInfo {
    /// The verified certificate.
    pub certificate: Arc<PeerCertificate>,
    /// The other end's address.
    pub address: SocketAddr,
    cut: watch::Receiver<Option<CutReason>>,
}

impl PeerInfo {
    /// Why the connection was ended, if it was.
    pub fn cut_reason(&self) -> Option<CutReason> {
        self.cut.borrow().clone()
    }
}

struct Entry {
    certificate: Arc<PeerCertificate>,
    chain: Arc<[CertificateDer<'static>]>,
    /// The first second after each certificate of the chain.
    ends: Vec<UnixTime>,
    /// When the chain was found good last.
    verified_at: UnixTime,
    address: SocketAddr,
    cut: watch::Sender<Option<CutReason>>,
}

impl Entry {
    /// Ends the connection, unless it was ended before.
    fn end(&self, reason: &str) -> bool {
        let ended = self.cut.send_if_modified(|cut| {
            let first = cut.is_none();
            cut.get_or_insert_with(|| CutReason(reason.to_owned()));
            first
        });
        if ended {
            warn!(
                who = %self.certificate.identity, serial = %self.certificate.serial, address = %self.address,
                reason, "connection ended"
            );
        }
        ended
    }
}

#[derive(Default)]
struct Table {
    next_id: u64,
    entries: BTreeMap<u64, Entry>,
}

struct Inner {
    source: TlsSource,
    limits: PeerLimits,
    table: Mutex<Table>,
    changed: Arc<Notify>,
    /// Told whenever a connection is over.
    left: watch::Sender<()>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // The enforcing task holds no strong reference and is told to look, and to end.
        self.changed.notify_one();
    }
}

/// The live connections. Clones are the same registry.
#[derive(Clone)]
pub struct PeerRegistry(Arc<Inner>);

impl fmt::Debug for PeerRegistry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PeerRegistry")
            .field("limits", &self.0.limits)
            .field("connections", &self.len())
            .finish_non_exhaustive()
    }
}

impl PeerRegistry {
    /// Makes a registry, and what enforces it: a task for its owner to run. It ends with the last clone and the last guard,
    /// and may be ended before.
    pub fn new(source: TlsSource, limits: PeerLimits) -> (Self, impl Future<Output = ()> + Send + use<>) {
        let changed = Arc::new(Notify::new());
        let mut generations = source.generations();
        let (clock, environment) = (Arc::clone(source.clock()), source.environment().clone());
        let registry = Self(Arc::new(Inner {
            source,
            limits,
            table: Mutex::default(),
            changed: Arc::clone(&changed),
            left: watch::Sender::new(()),
        }));
        let weak = Arc::downgrade(&registry.0);
        let enforcing = async move {
            loop {
                let deadline = match next_deadline(&weak) {
                    NextDeadline::At(time) => Some(time),
                    NextDeadline::Never => None,
                    NextDeadline::RegistryGone => return,
                };
                tokio::select! {
                    biased;
                    // The source lives in the registry, so an error here means that the registry is gone.
                    reloaded = generations.changed() => if reloaded.is_err() { return },
                    () = changed.notified() => continue,
                    () = until(&*clock, deadline) => {}
                }
                let Some(inner) = weak.upgrade() else { return };
                // Signatures are checked: not on a thread that serves connections.
                let enforcing = environment.blocking("enforce", move || PeerRegistry(inner).enforce());
                if let Err(died) = enforcing.await {
                    error!(error = %died, "verifying the live connections again failed; it is tried again");
                    environment.sleep(Duration::from_secs(1)).await;
                    changed.notify_one();
                }
            }
        };
        (registry, enforcing)
    }

    /// Ready while no connection is live.
    pub async fn all_left(&self) {
        let mut left = self.0.left.subscribe();
        // The sender is in the registry.
        while !self.is_empty() && left.changed().await.is_ok() {}
    }

    /// How many connections are live.
    pub fn len(&self) -> usize {
        self.table().entries.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Enters a connection whose handshake is done. `chain` is as presented, leaf first.
    pub fn register(
        &self,
        chain: Vec<CertificateDer<'static>>,
        address: SocketAddr,
    ) -> Result<ConnectionGuard, RefusedPeer> {
        let leaf = chain.first().ok_or(RefusedPeer::NoCertificate)?;
        let certificate =
            Arc::new(PeerCertificate::from_der(leaf).map_err(|source| RefusedPeer::Identity { source })?);
        let ends = chain
            .iter()
            // A certificate that cannot be parsed is not part of what verified.
            .filter_map(|certificate| validity_of(certificate).ok())
            .map(|(_, not_after)| after(not_after))
            .collect();
        let now = self.0.source.clock().now();
        let (cut, cut_seen) = watch::channel(None);
        let chain: Arc<[_]> = chain.into();
        let info = PeerInfo { certificate: Arc::clone(&certificate), address, cut: cut_seen };
        let id = {
            let mut table = self.table();
            let limit = self.0.limits.max_connections;
            if table.entries.len() >= limit {
                return Err(RefusedPeer::Full { limit });
            }
            if let Some(limit) = self.0.limits.max_connections_per_identity {
                let same = |entry: &&Entry| entry.certificate.identity == certificate.identity;
                if table.entries.values().filter(same).count() >= limit {
                    return Err(RefusedPeer::IdentityFull { who: certificate.identity.to_string(), limit });
                }
            }
            let id = table.next_id;
            table.next_id += 1;
            let entry =
                Entry { certificate, chain: Arc::clone(&chain), ends, verified_at: now, address, cut };
            table.entries.insert(id, entry);
            id
        };
        let guard = ConnectionGuard { registry: self.clone(), id, info };
        // After it was entered, never before: see the invariants.
        self.verify(&chain, now).map_err(|source| RefusedPeer::NoLongerVerifies { source })?;
        self.0.changed.notify_one();
        Ok(guard)
    }

    /// Verifies every connection again and ends those that fail. Returns how many it ended.
    pub fn enforce(&self) -> usize {
        let chains: Vec<_> =
            self.table().entries.iter().map(|(id, entry)| (*id, Arc::clone(&entry.chain))).collect();
        let mut ended = 0;
        for (id, chain) in chains {
            let now = self.0.source.clock().now();
            let verified = self.verify(&chain, now);
            let mut table = self.table();
            let Some(entry) = table.entries.get_mut(&id) else { continue };
            match verified {
                Ok(()) => entry.verified_at = now,
                Err(refused) => {
                    let reason = format!("the peer's certificate no longer verifies: {refused}");
                    ended += usize::from(entry.end(&reason));
                }
            }
        }
        ended
    }

    /// Ends every connection of the identities that `whose` names. Returns how many it ended.
    pub fn cut(&self, reason: &str, whose: impl Fn(&Identity) -> bool) -> usize {
        let table = self.table();
        let ended = table.entries.values().filter(|entry| whose(&entry.certificate.identity));
        ended.filter(|entry| entry.end(reason)).count()
    }

    fn verify(&self, chain: &[CertificateDer<'_>], now: UnixTime) -> Result<(), rustls::Error> {
        self.0.source.current().material.verify_peer(chain, now)
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The first second after this one.
fn after(time: UnixTime) -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_secs(time.as_secs().saturating_add(1)))
}

/// When to verify again, if no set changes before.
enum NextDeadline {
    At(UnixTime),
    /// Nothing live ever expires.
    Never,
    RegistryGone,
}

/// The first end that a live connection was not verified after. It may have passed already: between a handshake, or the
/// last verification, and now.
fn next_deadline(weak: &Weak<Inner>) -> NextDeadline {
    let Some(inner) = weak.upgrade() else { return NextDeadline::RegistryGone };
    let lists_end = inner.source.current().material.crl_next_update();
    let table = inner.table.lock().unwrap_or_else(PoisonError::into_inner);
    let live = table.entries.values().filter(|entry| entry.cut.borrow().is_none());
    let ends = live.flat_map(|entry| {
        let ends = entry.ends.iter().copied().chain(lists_end);
        ends.filter(|end| *end > entry.verified_at)
    });
    ends.min().map_or(NextDeadline::Never, NextDeadline::At)
}

async fn until(clock: &dyn Clock, deadline: Option<UnixTime>) {
    match deadline {
        Some(at) => clock.wait_until(at).await,
        None => std::future::pending().await,
    }
}

/// A live connection's place in the registry.
pub struct ConnectionGuard {
    registry: PeerRegistry,
    id: u64,
    info: PeerInfo,
}

impl fmt::Debug for ConnectionGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectionGuard")
            .field("id", &self.id)
            .field("info", &self.info)
            .finish_non_exhaustive()
    }
}

impl ConnectionGuard {
    /// What requests on it may know.
    pub fn info(&self) -> &PeerInfo {
        &self.info
    }

    /// Ends when the connection has to.
    pub fn cut(&self) -> impl Future<Output = CutReason> + Send + 'static {
        let mut cut = self.info.cut.clone();
        async move {
            match cut.wait_for(Option::is_some).await.map(|reason| reason.clone()) {
                Ok(Some(reason)) => reason,
                // The sender lives as long as the guard, so nobody is left to ask.
                Ok(None) | Err(_) => CutReason("the connection was forgotten".to_owned()),
            }
        }
    }
}

impl Drop for ConnectionGuard {
    fn drop(&mut self) {
        self.registry.table().entries.remove(&self.id);
        self.registry.0.left.send_replace(());
    }
}
