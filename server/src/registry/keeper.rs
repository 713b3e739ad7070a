//! The agent's side of the holder: every open device that can be kept is kept, also after the holder was restarted.
//!
//! ```text
//!   start: take(name) --> keepsake of the agent before
//!   open or adopted: put(name, keepsake)
//!   every few seconds: still connected? else connect again and put everything once more
//! ```
//! # Failure paths
//! A holder that cannot be reached when the agent starts is an error, because devices would be opened, and so reset,
//! that it may be keeping. Later it is a warning: the agent has its own fds, and only its own death would show.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use vfio_checkpoint_device::address::{Keepsake, KeepsakeError};
use vfio_checkpoint_device::{Lane, chain};
use vfio_checkpoint_proto::ids::DeviceName;

use crate::environment::Environment;
use crate::holder::{BootId, ClientError, DeviceKey, HolderClient, InvalidLabel, Label, LabelError, Refusal};

/// How long the holder may take to answer. It answers at once, unless the machine is busy.
const WITHIN: Duration = Duration::from_secs(10);
/// How often it is looked after.
const LOOK: Duration = Duration::from_secs(5);

/// Keeps devices with the holder.
#[derive(Debug, Clone)]
pub struct Keeper {
    lane: Arc<dyn Lane>,
    shared: Arc<Mutex<Shared>>,
}

#[derive(Debug)]
struct Shared {
    socket: PathBuf,
    client: Option<HolderClient>,
    kept: BTreeMap<DeviceName, Keepsake>,
}

/// Why a device is not kept.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeeperError {
    /// The holder does not answer as hoped.
    #[error("the holder does not do its part")]
    Holder(#[from] ClientError),
    /// What it keeps cannot be understood.
    #[error("what the holder keeps of {device} cannot be understood")]
    Keepsake {
        /// Of which device.
        device: DeviceName,
        /// Why not.
        #[source]
        source: KeepsakeError,
    },
    /// The device cannot be labelled.
    #[error("{device} cannot be labelled for the holder")]
    Label {
        /// Which one.
        device: DeviceName,
        /// Why not.
        #[source]
        source: LabelError,
    },
    /// A name that the holder does not take.
    #[error("{device} cannot be labelled for the holder")]
    Key {
        /// Which one.
        device: DeviceName,
        /// Why not.
        #[source]
        source: InvalidLabel,
    },
    /// Its thread cannot be started, or died.
    #[error("the thread that talks to the holder is not there")]
    Thread(#[source] io::Error),
}

impl Keeper {
    /// Connects to the holder.
    pub async fn connect(environment: &Environment, socket: PathBuf) -> Result<Self, KeeperError> {
        let lane = environment.executor.lane("holder").map_err(KeeperError::Thread)?.into();
        let shared = Arc::new(Mutex::new(Shared { socket, client: None, kept: BTreeMap::new() }));
        let keeper = Self { lane, shared };
        keeper.run(|shared| shared.client().map(|_| ())).await?;
        Ok(keeper)
    }

    /// What an earlier agent left with the holder of this device.
    pub async fn take(&self, device: DeviceName) -> Result<Option<Keepsake>, KeeperError> {
        self.run(move |shared| {
            let key = key(&device)?;
            match shared.client()?.take(&key) {
                Ok(taken) => {
                    let keepsake = taken.into_keepsake();
                    keepsake.map(Some).map_err(|source| KeeperError::Keepsake { device, source })
                }
                Err(ClientError::Refused(Refusal::NotHeld { .. })) => Ok(None),
                Err(error) => Err(error.into()),
            }
        })
        .await
    }

    /// The names of what the holder has now.
    pub async fn held(&self) -> Result<Vec<String>, KeeperError> {
        self.run(|shared| {
            let held = shared.client()?.list()?;
            Ok(held.into_iter().map(|label| label.key.to_string()).collect())
        })
        .await
    }

    /// Has a device kept from now on.
    pub async fn put(&self, device: DeviceName, keepsake: Keepsake) -> Result<(), KeeperError> {
        self.run(move |shared| {
            let put = shared.put(&device, &keepsake);
            // Also where it failed: it is tried again.
            shared.kept.insert(device, keepsake);
            put
        })
        .await
    }

    /// Lets go of what the holder has of a device that could not be adopted: the last close resets it.
    pub async fn let_go(&self, device: DeviceName) -> Result<(), KeeperError> {
        self.run(move |shared| {
            shared.kept.remove(&device);
            let key = key(&device)?;
            Ok(shared.client()?.remove(&key).map(|_| ())?)
        })
        .await
    }

    /// Hangs up, so that another agent can have the holder. What it keeps it keeps.
    pub async fn hang_up(&self) {
        let hung_up = self.run(|shared| {
            shared.client = None;
            Ok(())
        });
        // A thread that died has hung up.
        let _ = hung_up.await;
    }

    /// Looks after the holder for as long as the agent lives.
    pub async fn look_after(self, environment: Environment) {
        let mut lost = false;
        loop {
            environment.sleep(LOOK).await;
            match self.run(Shared::look).await {
                Ok(()) => {
                    if std::mem::take(&mut lost) {
                        tracing::info!("the holder is back, and has every device again");
                    }
                }
                Err(error) => {
                    if !std::mem::replace(&mut lost, true) {
                        tracing::error!(
                            error = %chain(&error),
                            "the holder is not there: if the agent ends now, its devices are reset"
                        );
                    }
                }
            }
        }
    }

    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Shared) -> Result<T, KeeperError> + Send + 'static,
    ) -> Result<T, KeeperError> {
        let shared = Arc::clone(&self.shared);
        let (answer, answered) = oneshot::channel();
        self.lane.submit(Box::new(move || {
            let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
            // Nobody waits where the future was dropped.
            let _ = answer.send(work(&mut shared));
        }));
        answered.await.unwrap_or_else(|_| Err(KeeperError::Thread(io::Error::other("it died"))))
    }
}

impl Shared {
    fn client(&mut self) -> Result<&mut HolderClient, KeeperError> {
        let client = match self.client.take() {
            Some(client) if !client.is_closed() => client,
            Some(_) | None => HolderClient::connect(&self.socket, WITHIN)?,
        };
        Ok(self.client.insert(client))
    }

    fn put(&mut self, device: &DeviceName, keepsake: &Keepsake) -> Result<(), KeeperError> {
        let label = Label::of(key(device)?, keepsake, BootId::current())
            .map_err(|source| KeeperError::Label { device: device.clone(), source })?;
        let fds: Vec<_> = keepsake.fds.iter().map(|fd| fd.as_fd()).collect();
        self.client()?.put(&label, &fds)?;
        Ok(())
    }

    /// Where the holder was restarted, or lost something, it gets everything again.
    fn look(&mut self) -> Result<(), KeeperError> {
        let held: Vec<DeviceKey> = self.client()?.list()?.into_iter().map(|label| label.key).collect();
        let kept = std::mem::take(&mut self.kept);
        let mut first = Ok(());
        for (device, keepsake) in &kept {
            let has = key(device).is_ok_and(|key| held.contains(&key));
            if !has && let Err(error) = self.put(device, keepsake) {
                first = first.and(Err(error));
            }
        }
        self.kept = kept;
        first
    }
}

fn key(device: &DeviceName) -> Result<DeviceKey, KeeperError> {
    DeviceKey::new(device.id()).map_err(|source| KeeperError::Key { device: device.clone(), source })
}
