//! What every part of the agent works on: devices, operations, the journal, the configuration.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vfio_checkpoint_device::chain;

use crate::config::AgentConfig;
use crate::environment::Environment;
use crate::journal::{Change, Journal};
use crate::operation::Operations;
use crate::registry::Registry;
use crate::registry::keeper::Keeper;

/// The agent without its doors.
#[derive(Debug)]
pub struct Core {
    /// What it was told.
    pub config: Arc<AgentConfig>,
    /// Clocks, device work, randomness.
    pub environment: Environment,
    /// What must outlive it.
    pub journal: Journal,
    /// Its devices.
    pub registry: Registry,
    /// Its operations.
    pub operations: Operations,
    /// The holder that keeps its devices, where there is one.
    pub keeper: Option<Keeper>,
    ending: AtomicBool,
}

impl Core {
    /// Puts the parts together.
    pub fn new(
        config: Arc<AgentConfig>,
        environment: Environment,
        journal: Journal,
        registry: Registry,
        operations: Operations,
        keeper: Option<Keeper>,
    ) -> Self {
        Self { config, environment, journal, registry, operations, keeper, ending: AtomicBool::new(false) }
    }

    /// Writes what has happened already, for as long as it takes: whoever waits for it keeps its devices leased.
    pub async fn commit_surely(&self, changes: Vec<Change>) {
        const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));
        let mut pause = PAUSES.0;
        while let Err(error) = self.journal.commit(changes.clone()).await {
            tracing::error!(
                error = %chain(&error),
                "what has happened cannot be recorded; the devices stay leased until it is"
            );
            self.environment.sleep(pause).await;
            pause = (pause * 2).min(PAUSES.1);
        }
    }

    /// No operation is admitted from now on.
    pub fn begin_ending(&self) {
        self.ending.store(true, Ordering::Release);
    }

    /// Whether the agent is shutting down.
    pub fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Acquire)
    }
}
