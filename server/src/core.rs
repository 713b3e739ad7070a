//! What every part of the agent works on: devices, operations, the journal, the configuration.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use vfio_checkpoint_device::chain;

use crate::config::AgentConfig;
use crate::environment::Environment;
use crate::journal::{Change, Journal, JournalError};
use crate::migration::Tickets;
use crate::operation::record::RecordedStep;
use crate::operation::{Entry, Operations};
use crate::registry::Registry;
use crate::registry::keeper::Keeper;
use crate::security::reload::TlsSource;
use crate::security::roles::{Policy, PolicyHandle};
use crate::stores::Stores;

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
    /// Its stores of checkpoints.
    pub stores: Stores,
    /// What it shows to other agents that it calls. None where it is not served.
    pub tls: Option<TlsSource>,
    /// Who may do what: of those who call it, and of the agents that it calls.
    pub policy: PolicyHandle,
    /// What it has promised to let in.
    pub tickets: Tickets,
    /// What runs on its behalf.
    pub tasks: Tasks,
    ending: AtomicBool,
    /// The last field, so that whoever sees it gone knows that the others are.
    alive: watch::Sender<()>,
}

/// Tasks that must not outlive the agent: each may have devices and the journal. Clones are the same tasks.
#[derive(Debug, Clone)]
pub struct Tasks(Arc<Mutex<Option<JoinSet<()>>>>);

impl Default for Tasks {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Some(JoinSet::new()))))
    }
}

impl Tasks {
    /// Starts one more. Where the agent has ended it never runs.
    pub fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tasks) = &mut *tasks {
            // What is over takes no room.
            while tasks.try_join_next().is_some() {}
            tasks.spawn(work);
        }
    }

    /// Ends them where they are, and comes back once they are gone.
    pub async fn end(&self) {
        let tasks = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(mut tasks) = tasks {
            tasks.shutdown().await;
        }
    }
}

impl Core {
    /// Puts the parts together.
    #[allow(
        clippy::too_many_arguments,
        reason = "each is a part of its own, and there is one place that has them all"
    )]
    pub fn new(
        config: Arc<AgentConfig>,
        environment: Environment,
        journal: Journal,
        registry: Registry,
        operations: Operations,
        keeper: Option<Keeper>,
        stores: Stores,
        tls: Option<TlsSource>,
    ) -> Self {
        let policy = PolicyHandle::new(Policy { grants: config.grants.clone() });
        Self {
            config,
            environment,
            journal,
            registry,
            operations,
            keeper,
            stores,
            tls,
            policy,
            tickets: Tickets::default(),
            tasks: Tasks::default(),
            ending: AtomicBool::new(false),
            alive: watch::Sender::new(()),
        }
    }

    /// Puts a step of an operation on record.
    pub(crate) async fn record_step(&self, entry: &Entry, step: RecordedStep) -> Result<(), JournalError> {
        let _one_at_a_time = entry.recording.lock().await;
        self.journal.commit(vec![Change::Operation(Box::new(entry.record(step.clone())))]).await?;
        entry.set_on_record(step);
        Ok(())
    }

    /// The same, for as long as that takes: what is done next is done only then.
    pub(crate) async fn record_surely(&self, entry: &Entry, step: RecordedStep) {
        let _one_at_a_time = entry.recording.lock().await;
        let record = entry.record(step.clone());
        self.commit_surely(vec![Change::Operation(Box::new(record))]).await;
        entry.set_on_record(step);
    }

    /// Ready once nobody has the agent any more, and what it had is closed.
    pub fn gone(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut alive = self.alive.subscribe();
        async move { while alive.changed().await.is_ok() {} }
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
