//! The TLS set in force, and how another one takes its place.
//!
//! ```text
//!   poll (content, every reload_interval) --+
//!                                           +--> read -> same? -> Unchanged
//!   reload() (signal, admin) ---------------+            check -> refused: old set stays, error log
//!                                                               -> accepted: swap, then publish the generation
//! ```
//!
//! Invariants:
//! - There is always a whole, checked set in force; the first one has to be good or the agent does not start.
//! - A generation is published after its set can be seen: whoever hears of generation n gets n or a later
//!   one.
//! - One reload at a time. A handshake keeps the set that it began with; `peers` asks again after it.
//!
//! Failure paths: a bad new set is refused and logged as an error at each poll until somebody corrects it.

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use rustls::{ClientConfig, ServerConfig};
use tokio::sync::{Mutex, watch};
use tracing::{error, info, warn};

use super::clock::Clock;
use super::files::{Fingerprint, TlsBytes, TlsError, TlsFiles};
use super::server_identity::{Demand, ServerExpectation};
use super::tls::TlsMaterial;
use crate::environment::Environment;

/// How often files are compared unless configured otherwise.
pub const DEFAULT_RELOAD_INTERVAL: Duration = Duration::from_secs(30);

/// Counts accepted sets, from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Generation(u64);

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A set in force.
#[derive(Debug)]
pub struct TlsSet {
    /// Its number.
    pub generation: Generation,
    /// What it is made of.
    pub material: TlsMaterial,
    /// How to serve with it.
    pub server: Arc<ServerConfig>,
    fingerprint: Option<Fingerprint>,
}

/// What a reload did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reloaded {
    /// The files say what they said before.
    Unchanged(Generation),
    /// A new set is in force.
    Accepted(Generation),
}

struct Inner {
    files: TlsFiles,
    clock: Arc<dyn Clock>,
    environment: Environment,
    current: RwLock<Arc<TlsSet>>,
    generation: watch::Sender<Generation>,
    reloading: Mutex<()>,
}

/// Holds the set in force. Clones are the same source.
#[derive(Clone)]
pub struct TlsSource(Arc<Inner>);

impl fmt::Debug for TlsSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsSource").field("files", &self.0.files).field("current", &self.current()).finish()
    }
}

impl TlsSource {
    /// Reads the first set. Blocks on the files: called at start. Certificates are held against `clock`; files are read,
    /// and signatures checked, where `environment` has what blocks.
    pub fn load(files: TlsFiles, clock: Arc<dyn Clock>, environment: Environment) -> Result<Self, TlsError> {
        let bytes = TlsBytes::read(&files)?;
        let set = check(&files, &bytes, Generation(1), &clock)?;
        warn_of_gaps(&set.material);
        Ok(Self(Arc::new(Inner {
            files,
            clock,
            environment,
            generation: watch::Sender::new(set.generation),
            current: RwLock::new(Arc::new(set)),
            reloading: Mutex::new(()),
        })))
    }

    /// The set in force.
    pub fn current(&self) -> Arc<TlsSet> {
        Arc::clone(&self.0.current.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The clock that certificates are held against.
    pub fn clock(&self) -> &Arc<dyn Clock> {
        &self.0.clock
    }

    /// Where what blocks is done.
    pub(super) fn environment(&self) -> &Environment {
        &self.0.environment
    }

    /// Follows the accepted sets.
    pub fn generations(&self) -> watch::Receiver<Generation> {
        self.0.generation.subscribe()
    }

    /// How to call another agent with the set in force. Made for each connection, so that none uses an old
    /// set.
    pub fn client_config(
        &self,
        expected: ServerExpectation,
        demand: Option<Demand>,
    ) -> Result<ClientConfig, TlsError> {
        self.current().material.client_config(expected, demand, Arc::clone(&self.0.clock))
    }

    /// Reads the files and puts them in force if they changed and are good.
    pub async fn reload(&self) -> Result<Reloaded, TlsError> {
        let _one_at_a_time = self.0.reloading.lock().await;
        let this = self.clone();
        let reading = self.0.environment.blocking("tls-reload", move || this.read_and_swap());
        let outcome = reading.await.map_err(|source| TlsError::Reader { source })?;
        match &outcome {
            Ok(Reloaded::Unchanged(_)) => {
                if self.0.clock.now() > self.current().material.own_not_after() {
                    error!(
                        "this agent's certificate has expired; no peer accepts it until it is issued again"
                    );
                }
            }
            Ok(Reloaded::Accepted(generation)) => {
                let set = self.current();
                info!(%generation, material = ?set.material, "certificates reloaded");
                warn_of_gaps(&set.material);
            }
            Err(refused) => error!(
                error = %chain_of(refused), in_force = %self.current().generation,
                "new certificates refused; the old ones stay in force"
            ),
        }
        outcome
    }

    fn read_and_swap(&self) -> Result<Reloaded, TlsError> {
        let old = self.current();
        let bytes = TlsBytes::read(&self.0.files)?;
        let fingerprint = bytes.fingerprint();
        if fingerprint.is_some() && fingerprint == old.fingerprint {
            return Ok(Reloaded::Unchanged(old.generation));
        }
        let generation = Generation(old.generation.0 + 1);
        let set = check(&self.0.files, &bytes, generation, &self.0.clock)?;
        *self.0.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(set);
        self.0.generation.send_replace(generation);
        Ok(Reloaded::Accepted(generation))
    }

    /// Reloads at every interval. Never ends: run it as a task and drop that.
    pub async fn poll(self, reload_interval: Duration) {
        let mut ticks = tokio::time::interval(reload_interval.max(Duration::from_millis(1)));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            // Reported by `reload`; the next tick tries again.
            let _ = self.reload().await;
        }
    }
}

fn check(
    files: &TlsFiles,
    bytes: &TlsBytes,
    generation: Generation,
    clock: &Arc<dyn Clock>,
) -> Result<TlsSet, TlsError> {
    let material = TlsMaterial::parse(files, bytes, clock.now())?;
    let server = Arc::new(material.server_config(Arc::clone(clock))?);
    Ok(TlsSet { generation, material, server, fingerprint: bytes.fingerprint() })
}

fn warn_of_gaps(material: &TlsMaterial) {
    for authority in material.authorities_without_crl() {
        warn!(
            authority,
            "this authority has no revocation list while others do: all of its peers are refused"
        );
    }
}

/// An error with its sources, on one line.
pub(super) fn chain_of(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
