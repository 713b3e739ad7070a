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
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use vfio_checkpoint_device::address::{Keepsake, KeepsakeError};
use vfio_checkpoint_device::{Lane, chain};
use vfio_checkpoint_proto::ids::DeviceName;

use super::hardware::{Hardware, Holding};
use crate::environment::Environment;
use crate::holder::{ClientError, InvalidLabel, LabelError};

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
    hardware: Arc<dyn Hardware>,
    client: Option<Box<dyn Holding>>,
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
        let hardware = Arc::clone(&environment.hardware);
        let shared = Arc::new(Mutex::new(Shared { socket, hardware, client: None, kept: BTreeMap::new() }));
        let keeper = Self { lane, shared };
        keeper.run(|shared| shared.client().map(|_| ())).await?;
        Ok(keeper)
    }

    /// What an earlier agent left with the holder of this device.
    pub async fn take(&self, device: DeviceName) -> Result<Option<Keepsake>, KeeperError> {
        self.run(move |shared| shared.client()?.take(&device)).await
    }

    /// The names of what the holder has now.
    pub async fn held(&self) -> Result<Vec<String>, KeeperError> {
        self.run(|shared| shared.client()?.held()).await
    }

    /// Has a device kept from now on.
    pub async fn put(&self, device: DeviceName, keepsake: Keepsake) -> Result<(), KeeperError> {
        self.run(move |shared| {
            let put = shared.client().and_then(|client| client.put(&device, &keepsake));
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
            shared.client()?.let_go(&device)
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
    fn client(&mut self) -> Result<&mut dyn Holding, KeeperError> {
        let client = match self.client.take() {
            Some(client) if !client.is_closed() => client,
            Some(_) | None => self.hardware.holder(&self.socket)?,
        };
        Ok(&mut **self.client.insert(client))
    }

    /// Where the holder was restarted, or lost something, it gets everything again.
    fn look(&mut self) -> Result<(), KeeperError> {
        let held = self.client()?.held()?;
        let kept = std::mem::take(&mut self.kept);
        let mut first = Ok(());
        for (device, keepsake) in &kept {
            let has = held.iter().any(|held| held == device.id());
            if !has {
                first = first.and(self.client().and_then(|client| client.put(device, keepsake)));
            }
        }
        self.kept = kept;
        first
    }
}
