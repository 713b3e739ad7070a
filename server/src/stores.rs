//! The stores of the agent: opened when they are first used, so that one that cannot be reached holds up nobody else.
//!
//! ```text
//!   [[stores]] --> Stores --get--> Place --open, once--> vfio_checkpoint_store::Store
//!                     |--every collect_interval--> Store::collect
//!                     '--settle: mark, discard--> Store, or else Debts
//! ```
//! # Failure paths
//! A store that cannot be opened is told to whoever named it, and tried again at the next call. What it did not take is owed
//! to it ([`debts`]). A store that was in use, by what the journal says, is not made anew where it is missing.

pub mod debts;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use tokio::sync::OnceCell;
use vfio_checkpoint_device::chain;
use vfio_checkpoint_device::operation::BoxError;
use vfio_checkpoint_proto::ids::{CheckpointName, IdError, StoreName};
use vfio_checkpoint_store::{
    Ambient, CheckpointId, Limits, Location, S3Options, Store, StoreError, WriteStep,
};

use self::debts::Debts;
use crate::config::{AgentConfig, StoreConfig};
use crate::environment::Environment;
use crate::failpoint::reached;
use crate::journal::{Owed, Recorded};

/// How often a store is collected where nothing is configured.
const DEFAULT_COLLECT: Duration = Duration::from_hours(1);
/// What the store is called that is there where none is configured.
const DEFAULT_NAME: &str = "local";
/// Where that one is, below the state's folder.
const DEFAULT_FOLDER: &str = "checkpoints";

/// Why the agent's configuration of a store cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("the store `{store}` in the configuration")]
pub struct StoresError {
    store: String,
    #[source]
    source: StoresProblem,
}

#[derive(Debug, thiserror::Error)]
enum StoresProblem {
    #[error("its name")]
    Name(#[source] IdError),
    #[error("its location")]
    Location(#[source] Box<StoreError>),
}

/// The stores of the agent, in the order of its configuration.
#[derive(Debug)]
pub struct Stores {
    places: Vec<Place>,
    debts: Debts,
}

/// One store, opened or not.
#[derive(Debug)]
pub struct Place {
    name: StoreName,
    location: Location,
    limits: Limits,
    collect_interval: Duration,
    environment: Environment,
    opened: OnceCell<Store>,
    /// Something that is not over was made in it.
    in_use: AtomicBool,
}

impl Stores {
    /// Those that are configured.
    pub fn new(config: &AgentConfig, environment: &Environment) -> Result<Self, StoresError> {
        if config.stores.is_empty() {
            let name = StoreName::from_id(DEFAULT_NAME).map_err(|error| StoresError {
                store: DEFAULT_NAME.into(),
                source: StoresProblem::Name(error),
            })?;
            let location = Location::Folder(config.node.state_dir.join(DEFAULT_FOLDER));
            let place = Place::new(name, location, Limits::default(), DEFAULT_COLLECT, environment);
            return Ok(Self { places: vec![place], debts: Debts::default() });
        }
        let places = config.stores.iter().map(|store| {
            Place::configured(store, environment)
                .map_err(|source| StoresError { store: store.name.clone(), source })
        });
        Ok(Self { places: places.collect::<Result<_, _>>()?, debts: Debts::default() })
    }

    /// The store of this name, or the first.
    pub fn get(&self, name: Option<&StoreName>) -> Option<&Place> {
        match name {
            Some(name) => self.places.iter().find(|place| place.name == *name),
            None => self.places.first(),
        }
    }

    /// What is owed to them.
    pub fn debts(&self) -> &Debts {
        &self.debts
    }

    /// Takes over what the journal says: what is owed to them, and which were in use when the agent ended.
    pub fn take_over(&self, recorded: &Recorded) {
        self.debts.take_over(&recorded.debts);
        let unfinished = recorded.operations.iter().filter(|operation| !operation.step.is_ended());
        let made = unfinished.filter_map(|operation| operation.checkpoint.as_ref());
        for name in made.chain(recorded.debts.iter().map(|(name, _)| name)) {
            self.was_in_use(&name.store());
        }
    }

    /// A checkpoint was being made in this store, or something is owed to it.
    fn was_in_use(&self, name: &StoreName) {
        if let Some(place) = self.get(Some(name)) {
            place.in_use.store(true, Ordering::Release);
        }
    }

    /// Marks or discards a checkpoint of an operation of this agent. Where its store does not take that now it is owed:
    /// the operation's next commit has to have it.
    pub async fn settle(&self, name: &CheckpointName, owed: Owed) {
        if let Err(error) = self.pay(name, owed).await {
            tracing::error!(
                checkpoint = %name,
                ?owed,
                error = %chain(&*error),
                "its store does not take what is to be done to it; it counts as done here, and is tried again"
            );
            self.debts.owe(name, owed);
            self.was_in_use(&name.store());
        }
    }

    /// Marks or discards a checkpoint in its store. One that is not there, in a store that is, needs neither.
    async fn pay(&self, name: &CheckpointName, owed: Owed) -> Result<(), BoxError> {
        let place = self.get(Some(&name.store()));
        let place = place.ok_or_else(|| format!("{} is not configured any more", name.store()))?;
        let id: CheckpointId = name.id().parse()?;
        // Whatever is owed is owed to a store that was there.
        place.in_use.store(true, Ordering::Release);
        let store = place.open().await?;
        store.is_there().await?;
        let (done, point) = match owed {
            Owed::Inconsistent => (store.mark_inconsistent(id).await, "checkpoint marked"),
            Owed::Discard => (store.delete(id).await, "checkpoint discarded"),
        };
        match done {
            Ok(()) => {}
            // Never committed, or deleted since. What was uploaded is left to the collector. It may have been unmounted in
            // between.
            Err(StoreError::NotFound { .. }) => store.is_there().await?,
            Err(error) => return Err(error.into()),
        }
        reached(format_args!("{point}"));
        Ok(())
    }

    fn is_open(&self, name: &StoreName) -> bool {
        self.get(Some(name)).is_some_and(|place| place.opened.initialized())
    }

    /// Collects in each store now and then, for as long as it is polled.
    pub async fn collect(&self) {
        futures_util::future::join_all(self.places.iter().map(Place::collect)).await;
    }
}

impl Place {
    fn configured(config: &StoreConfig, environment: &Environment) -> Result<Self, StoresProblem> {
        let name = StoreName::from_id(&config.name).map_err(StoresProblem::Name)?;
        let mut location: Location =
            config.location.parse().map_err(|error| StoresProblem::Location(Box::new(error)))?;
        if let Location::S3 { options, .. } = &mut location {
            *options = S3Options {
                endpoint: config.endpoint.clone(),
                region: config.region.clone(),
                allow_http: config.allow_http,
                ca: config.ca.clone(),
                credentials: config.credentials.clone(),
            };
        }
        let mut limits = Limits::default();
        if let Some(bytes) = config.keep_free_bytes {
            limits.keep_free_bytes = bytes;
        }
        let interval = config.collect_interval.unwrap_or(DEFAULT_COLLECT);
        Ok(Self::new(name, location, limits, interval, environment))
    }

    fn new(
        name: StoreName,
        location: Location,
        limits: Limits,
        collect_interval: Duration,
        environment: &Environment,
    ) -> Self {
        let (environment, opened, in_use) = (environment.clone(), OnceCell::new(), AtomicBool::new(false));
        Self { name, location, limits, collect_interval, environment, opened, in_use }
    }

    /// What it is called.
    pub fn name(&self) -> &StoreName {
        &self.name
    }

    /// The store itself.
    pub async fn open(&self) -> Result<&Store, StoreError> {
        let open = || async {
            let ambient = Arc::new(AgentAmbient(self.environment.clone()));
            let (location, limits) = (&self.location, self.limits.clone());
            let store = if self.in_use.load(Ordering::Acquire) {
                Store::open_again(location, limits, ambient).await?
            } else {
                Store::open(location, limits, ambient).await?
            };
            // Not only after a collection: the disk may be full before the first one.
            store.keep_ballast().await;
            tracing::info!(store = %self.name, location = %self.location, "store opened");
            Ok(store)
        };
        self.opened.get_or_try_init(open).await
    }

    /// The name of a checkpoint in it.
    pub fn checkpoint(&self, id: CheckpointId) -> Result<CheckpointName, IdError> {
        CheckpointName::new(&self.name, &id.to_string())
    }

    async fn collect(&self) {
        loop {
            self.environment.sleep(self.collect_interval).await;
            let collected = match self.open().await {
                Ok(store) => store.collect().await,
                Err(error) => Err(error),
            };
            match collected {
                Ok(collected) => tracing::info!(
                    store = %self.name,
                    chunks = collected.chunks,
                    stored_bytes = collected.stored_bytes,
                    revoked = collected.revoked,
                    cleared = collected.cleared,
                    "store collected"
                ),
                Err(error) => {
                    tracing::warn!(store = %self.name, error = %chain(&error), "store not collected");
                }
            }
        }
    }
}

/// The agent's clock, random numbers and fail points, for its stores.
#[derive(Debug)]
struct AgentAmbient(Environment);

impl Ambient for AgentAmbient {
    fn now(&self) -> SystemTime {
        self.0.unix_now().system_time()
    }

    fn random(&self) -> u64 {
        self.0.executor.random()
    }

    fn passes(&self, step: WriteStep) {
        reached(format_args!("store: {step:?}"));
    }
}
