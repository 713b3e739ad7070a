//! An operation from its first call to its end, as a caller drives it.
//!
//! The same request id begins it and asks for it again: after a kill the caller knows nothing else of it.

use tokio::task::JoinHandle;
use vfio_checkpoint_client::call::{CallError, Client, new_request_id};
use vfio_checkpoint_client::transfer::{Accepted, GiveState, TakeState};
use vfio_checkpoint_proto::v1;

use crate::lab::PATIENCE;
use crate::world::{Content, World, state};

/// What a failing stream or call says. A caller whose agent is killed gets one at any point.
pub(crate) type Broken = Box<dyn std::error::Error + Send + Sync>;

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Save,
    PreCopySave,
    ManualSave,
    HeldSave,
    StoppedSave,
    Restore,
    HeldRestore,
}

/// Where the state of a save goes, or that of a restore comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Way {
    Stream,
    IntoStore,
    /// Out of this checkpoint.
    OutOf(String),
}

/// An operation on the first `set` devices.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    pub(crate) kind: Kind,
    pub(crate) set: usize,
    way: Way,
    allow_inconsistent: bool,
    request_id: String,
    hold_timeout: Option<prost_types::Duration>,
    /// Whether Resume is said as soon as it is held.
    resumes: bool,
}

/// What a save brought.
#[derive(Debug)]
pub(crate) struct Saved {
    pub(crate) manifest: v1::CheckpointManifest,
    pub(crate) seals: Vec<v1::Seal>,
}

impl Job {
    pub(crate) fn new(kind: Kind, set: usize) -> Self {
        Self {
            kind,
            set,
            way: Way::Stream,
            allow_inconsistent: false,
            request_id: new_request_id().unwrap(),
            hold_timeout: None,
            resumes: true,
        }
    }

    /// The checkpoint is made in the agent's store.
    pub(crate) fn into_store(self) -> Self {
        Self { way: Way::IntoStore, ..self }
    }

    /// What is restored is this checkpoint of the agent's store.
    pub(crate) fn out_of(self, checkpoint: &str) -> Self {
        Self { way: Way::OutOf(checkpoint.to_owned()), ..self }
    }

    /// Also where the checkpoint is marked inconsistent.
    pub(crate) fn whatever_it_is_worth(self) -> Self {
        Self { allow_inconsistent: true, ..self }
    }

    /// Whether it has no stream.
    pub(crate) fn is_stored(&self) -> bool {
        self.way != Way::Stream
    }

    pub(crate) fn save(set: usize) -> Self {
        Self::new(Kind::Save, set)
    }

    pub(crate) fn restore(set: usize) -> Self {
        Self::new(Kind::Restore, set)
    }

    /// Its driver says no Resume.
    pub(crate) fn that_waits(mut self) -> Self {
        self.resumes = false;
        self
    }

    /// The hold ends by itself at once.
    pub(crate) fn held_for_a_moment(mut self) -> Self {
        self.hold_timeout = Some(prost_types::Duration { seconds: 0, nanos: 1_000_000 });
        self
    }

    pub(crate) fn is_save(&self) -> bool {
        match self.kind {
            Kind::Save | Kind::PreCopySave | Kind::ManualSave | Kind::HeldSave | Kind::StoppedSave => true,
            Kind::Restore | Kind::HeldRestore => false,
        }
    }

    /// Whether an operation is this.
    pub(crate) fn is(&self, operation: &v1::Operation) -> bool {
        operation.request_id == self.request_id
    }

    fn is_held(&self) -> bool {
        matches!(self.kind, Kind::HeldSave | Kind::HeldRestore)
    }

    fn devices(&self) -> Vec<String> {
        (0..self.set).map(|index| format!("devices/nic{index}")).collect()
    }

    /// Begins it, or finds it where it was begun before.
    pub(crate) async fn begin(
        &self,
        client: &Client,
        manifest: Option<&v1::CheckpointManifest>,
    ) -> Result<v1::Operation, CallError> {
        let begun = if self.is_save() {
            let request = v1::StartSaveRequest {
                devices: self.devices(),
                memory_capture: v1::MemoryCapture::None.into(),
                pre_copy: if self.kind == Kind::PreCopySave {
                    v1::PreCopyMode::Required.into()
                } else {
                    v1::PreCopyMode::Never.into()
                },
                cutover: if self.kind == Kind::ManualSave {
                    v1::CutoverMode::Manual.into()
                } else {
                    v1::CutoverMode::Auto.into()
                },
                after: match self.kind {
                    Kind::HeldSave => v1::AfterSave::Hold,
                    Kind::StoppedSave => v1::AfterSave::StayStopped,
                    Kind::Save | Kind::PreCopySave | Kind::ManualSave | Kind::Restore | Kind::HeldRestore => {
                        v1::AfterSave::Resume
                    }
                }
                .into(),
                hold_timeout: self.hold_timeout,
                store: if self.is_stored() { "stores/local".to_owned() } else { String::new() },
                request_id: self.request_id.clone(),
                ..Default::default()
            };
            client.start_save(request).await?.operation
        } else {
            let (checkpoint, manifest) = match &self.way {
                Way::OutOf(checkpoint) => (checkpoint.clone(), None),
                Way::Stream | Way::IntoStore => {
                    let mut manifest = manifest.unwrap().clone();
                    manifest.devices.truncate(self.set);
                    (String::new(), Some(manifest))
                }
            };
            let after = if self.is_held() { v1::AfterRestore::Hold } else { v1::AfterRestore::Run };
            let request = v1::RestoreRequest {
                devices: self.devices(),
                checkpoint,
                manifest,
                allow_fork: true,
                allow_inconsistent: self.allow_inconsistent,
                after: after.into(),
                hold_timeout: self.hold_timeout,
                request_id: self.request_id.clone(),
                ..Default::default()
            };
            client.restore(request).await?.operation
        };
        Ok(begun.unwrap())
    }

    /// Drives it to its end: its stream, Cutover as soon as it is waited for, and Resume as soon as it is held.
    pub(crate) async fn drive(
        &self,
        client: &Client,
        manifest: Option<&v1::CheckpointManifest>,
        states: Vec<Vec<u8>>,
    ) -> Result<v1::Operation, Broken> {
        let name = self.begin(client, manifest).await?.name;
        let stream = async {
            if self.is_stored() {
                Ok(())
            } else if self.is_save() {
                take(client, &name).await.map(drop)
            } else {
                give(client, &name, states).await
            }
        };
        let resume = async {
            let awaited = v1::OperationPhase::WaitingForCutover;
            if self.kind == Kind::ManualSave && comes_to(client, &name, awaited).await? {
                client.cutover(v1::CutoverRequest { operation: name.clone() }).await?;
            }
            if self.is_held() && self.resumes && held(client, &name).await? {
                client.resume(v1::ResumeRequest { operation: name.clone() }).await?;
            }
            Ok::<_, Broken>(())
        };
        let (streamed, resumed) = tokio::join!(stream, resume);
        streamed?;
        resumed?;
        Ok(done(client, &name).await?)
    }

    /// As [`drive`](Self::drive), in a world whose agent nobody kills.
    pub(crate) async fn run(&self, client: &Client, world: &World, content: Content) -> v1::Operation {
        let states = self.states(content);
        self.drive(client, world.manifest.as_ref(), states).await.unwrap_or_else(|error| {
            panic!("{self:?}: {error}\n{}", world.log());
        })
    }

    /// Drives it in a world whose agent somebody kills.
    pub(crate) async fn driven(&self, world: &World) -> JoinHandle<()> {
        let client = world.client().await;
        let (job, manifest, states) = (self.clone(), world.manifest.clone(), self.states(Content::Other));
        tokio::spawn(async move {
            if let Ok(ended) = job.drive(&client, manifest.as_ref(), states).await {
                panic!("it came to its end: {ended:?}");
            }
        })
    }

    /// The states that a restore brings, one for each device.
    pub(crate) fn states(&self, content: Content) -> Vec<Vec<u8>> {
        if self.is_save() || self.is_stored() {
            return Vec::new();
        }
        (0..self.set).map(|index| state(10 * content as usize + index + 1)).collect()
    }

    /// Runs a save, and says what it brought.
    pub(crate) async fn saved(&self, client: &Client) -> Saved {
        let name = self.begin(client, None).await.unwrap().name;
        let manifest = take(client, &name).await.unwrap();
        let ended = done(client, &name).await.unwrap();
        assert_eq!(ended.result(), v1::OperationResult::Succeeded, "{ended:?}");
        Saved { manifest, seals: ended.devices.into_iter().map(|device| device.seal.unwrap()).collect() }
    }
}

/// Takes the whole state of a save.
async fn take(client: &Client, operation: &str) -> Result<v1::CheckpointManifest, Broken> {
    let TakeState { manifest, mut taker, .. } = TakeState::open(client, &operation.parse()?).await?;
    while let Some(accepted) = taker.next().await? {
        match accepted {
            Accepted::Chunk { .. } | Accepted::Sealed { .. } | Accepted::Progress(_) => {}
        }
    }
    taker.complete().await?;
    Ok(manifest.into())
}

/// Gives a restore all of its state.
async fn give(client: &Client, operation: &str, states: Vec<Vec<u8>>) -> Result<(), Broken> {
    let GiveState { mut giver, .. } = GiveState::open(client, &operation.parse()?).await?;
    for (device, state) in states.into_iter().enumerate() {
        giver.chunk(device, state.into()).await?;
        giver.seal(device, None).await?;
    }
    giver.completed().await?;
    Ok(())
}

/// Waits until an operation is held; false where it ended instead.
pub(crate) async fn held(client: &Client, operation: &str) -> Result<bool, Broken> {
    comes_to(client, operation, v1::OperationPhase::Held).await
}

/// Waits until an operation is in a phase; false where it ended instead.
async fn comes_to(client: &Client, operation: &str, phase: v1::OperationPhase) -> Result<bool, Broken> {
    let request = v1::WatchOperationRequest { name: operation.to_owned() };
    let mut watch = client.watch_operation(request).await?;
    while let Some(response) = watch.next().await? {
        let operation = response.operation.unwrap();
        if operation.done || operation.phase() == phase {
            return Ok(!operation.done);
        }
    }
    Err("the watch ended".into())
}

/// The operation once it is over.
pub(crate) async fn done(client: &Client, operation: &str) -> Result<v1::Operation, CallError> {
    let operation = client.wait_operation(operation, PATIENCE).await?.operation.unwrap();
    assert!(operation.done, "it has not ended: {operation:?}");
    Ok(operation)
}
