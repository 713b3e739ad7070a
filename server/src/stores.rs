//! The stores of the agent: opened when they are first used, so that one that cannot be reached holds up nobody else.
//!
//! ```text
//!   [[stores]] --> Stores --get--> Place --open, once--> vfio_checkpoint_store::Store
//!                     '--every collect_interval--> Store::collect
//! ```
//! # Failure paths
//! A store that cannot be opened is told to whoever named it, and tried again at the next call.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::OnceCell;
use vfio_checkpoint_device::chain;
use vfio_checkpoint_proto::ids::{CheckpointName, IdError, StoreName};
use vfio_checkpoint_store::{Ambient, CheckpointId, Limits, Location, S3Options, Store, StoreError};

use crate::config::{AgentConfig, StoreConfig};
use crate::environment::Environment;

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
            return Ok(Self { places: vec![place] });
        }
        let places = config.stores.iter().map(|store| {
            Place::configured(store, environment)
                .map_err(|source| StoresError { store: store.name.clone(), source })
        });
        Ok(Self { places: places.collect::<Result<_, _>>()? })
    }

    /// The store of this name, or the first.
    pub fn get(&self, name: Option<&StoreName>) -> Option<&Place> {
        match name {
            Some(name) => self.places.iter().find(|place| place.name == *name),
            None => self.places.first(),
        }
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
        let (environment, opened) = (environment.clone(), OnceCell::new());
        Self { name, location, limits, collect_interval, environment, opened }
    }

    /// What it is called.
    pub fn name(&self) -> &StoreName {
        &self.name
    }

    /// The store itself.
    pub async fn open(&self) -> Result<&Store, StoreError> {
        let open = || async {
            let ambient = Arc::new(AgentAmbient(self.environment.clone()));
            let store = Store::open(&self.location, self.limits.clone(), ambient).await?;
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

/// The agent's clock and random numbers, for its stores.
#[derive(Debug)]
struct AgentAmbient(Environment);

impl Ambient for AgentAmbient {
    fn now(&self) -> SystemTime {
        self.0.unix_now().system_time()
    }

    fn random(&self) -> u64 {
        self.0.executor.random()
    }
}
