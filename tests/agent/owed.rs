//! What a store did not take when it was time: a mark, or that a checkpoint is discarded.
//!
//! The store is a folder that is moved away and back again; in its place is a file, or nothing.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tonic::Code;
use tonic::transport::Channel;
use vfio_checkpoint_client::call::Client;
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_proto::v1::checkpoint_service_client::CheckpointServiceClient;
use vfio_checkpoint_server::config::AgentConfig;
use vfio_checkpoint_server::serve::Agent;

use crate::faulty::Faulty;
use crate::flow::{channel, device, done, failure, reached, refused, save_of, start_save, violations};
use crate::lab::{Lab, PATIENCE};

/// How long the holds are, by a clock that goes on where the test says so.
const HOLD: Duration = Duration::from_secs(777);

/// An agent whose store comes and goes.
struct Case {
    lab: Lab,
    config: AgentConfig,
    faulty: Faulty,
    agent: Agent,
}

/// What is in the store's place while it is away.
#[derive(Debug, Clone, Copy)]
enum Instead {
    File,
    Nothing,
    /// The point where its disk is mounted otherwise.
    EmptyFolder,
}

impl Case {
    async fn new() -> Self {
        let lab = Lab::new();
        let config = lab.config("a", &[("n0", "sim:seed=1,memory=256KiB")]);
        let (faulty, agent) = begin(&config).await;
        Self { lab, config, faulty, agent }
    }

    async fn restarted(self) -> Self {
        let Self { lab, config, agent, faulty } = self;
        agent.stop().await.unwrap();
        drop(faulty);
        let (faulty, agent) = begin(&config).await;
        Self { lab, config, faulty, agent }
    }

    fn store(&self) -> PathBuf {
        self.config.node.state_dir.join("checkpoints")
    }

    fn takes_away(&self, instead: Instead) {
        std::fs::rename(self.store(), self.lab.path("away")).unwrap();
        match instead {
            Instead::File => std::fs::write(self.store(), "a file").unwrap(),
            Instead::Nothing => {}
            Instead::EmptyFolder => std::fs::create_dir(self.store()).unwrap(),
        }
    }

    fn brings_back(&self, instead: Instead) {
        match instead {
            Instead::File => std::fs::remove_file(self.store()).unwrap(),
            Instead::Nothing => assert!(!self.store().exists(), "it was made anew"),
            // It fails where something was put into it.
            Instead::EmptyFolder => std::fs::remove_dir(self.store()).unwrap(),
        }
        std::fs::rename(self.lab.path("away"), self.store()).unwrap();
    }

    /// The mark of this name beside a checkpoint in the store itself.
    fn mark(&self, checkpoint: &str, mark: &str) -> PathBuf {
        let id = checkpoint.rsplit_once('/').unwrap().1;
        self.store().join("checkpoints").join(id).join(mark)
    }

    async fn saver(&self) -> Client {
        self.lab.client(&self.agent, "saver").await
    }

    async fn checkpoints(&self) -> CheckpointServiceClient<Channel> {
        CheckpointServiceClient::new(channel(&self.lab, &self.agent, "spiffe://lab.test/saver/test").await)
    }

    /// A save into the store that is held: its name, and its checkpoint's.
    async fn held(&self) -> (String, String) {
        let saver = self.saver().await;
        let request = v1::StartSaveRequest {
            store: "stores/local".to_owned(),
            after: v1::AfterSave::Hold.into(),
            hold_timeout: Some(HOLD.try_into().unwrap()),
            ..save_of(&["n0"])
        };
        let name = start_save(&saver, request).await;
        let checkpoint = reached(&saver, &name, v1::OperationPhase::Held).await.checkpoint;
        (name, checkpoint)
    }

    /// It is INCONSISTENT, for everybody who asks this agent.
    async fn is_inconsistent(&self, checkpoint: &str) {
        let request = v1::GetCheckpointRequest { name: checkpoint.to_owned() };
        let got = self.checkpoints().await.get_checkpoint(request).await.unwrap().into_inner();
        let inconsistent = v1::CheckpointConsistency::Inconsistent;
        assert_eq!(got.checkpoint.unwrap().consistency(), inconsistent);
        let listed = self.listed().await;
        assert_eq!(listed.iter().map(v1::Checkpoint::consistency).collect::<Vec<_>>(), [inconsistent]);
        let restorer = self.lab.client(&self.agent, "restorer").await;
        let request = v1::RestoreRequest {
            devices: vec!["devices/n0".to_owned()],
            checkpoint: checkpoint.to_owned(),
            allow_fork: true,
            ..Default::default()
        };
        let refusal = refused(restorer.restore(request.clone()).await, Code::FailedPrecondition, "BLOCKED");
        assert_eq!(violations(&refusal)[0].0, "BLOCKER_REASON_CHECKPOINT_INCONSISTENT");
        let all_the_same = v1::RestoreRequest { allow_inconsistent: true, validate_only: true, ..request };
        assert_eq!(restorer.restore(all_the_same).await.unwrap().blockers, Vec::new());
    }

    async fn listed(&self) -> Vec<v1::Checkpoint> {
        let request = v1::ListCheckpointsRequest::default();
        self.checkpoints().await.list_checkpoints(request).await.unwrap().into_inner().checkpoints
    }

    async fn is_gone(&self, checkpoint: &str) {
        let request = v1::GetCheckpointRequest { name: checkpoint.to_owned() };
        let gone = self.checkpoints().await.get_checkpoint(request).await.unwrap_err();
        assert_eq!(gone.code(), Code::NotFound, "{gone}");
    }

    /// Waits until something is in the store, without a hand of the test's.
    async fn comes(&self, path: &Path) {
        let saver = self.saver().await;
        let coming = async {
            while !path.exists() {
                device(&saver, "n0").await;
            }
        };
        tokio::time::timeout(PATIENCE, coming)
            .await
            .unwrap_or_else(|_| panic!("{} never came", path.display()));
    }
}

async fn begin(config: &AgentConfig) -> (Faulty, Agent) {
    let faulty = Faulty::new();
    faulty.gate(HOLD);
    let agent = Agent::start(config.clone(), faulty.environment()).await.unwrap();
    (faulty, agent)
}

const ALL: [Instead; 3] = [Instead::File, Instead::Nothing, Instead::EmptyFolder];

#[tokio::test(flavor = "multi_thread")]
async fn a_mark_that_the_store_did_not_take_counts_here_at_once_and_is_made_when_it_is_back() {
    for instead in ALL {
        let case = Case::new().await;
        let (name, checkpoint) = case.held().await;
        case.takes_away(instead);
        case.faulty.pass(HOLD);
        let saver = case.saver().await;
        let ended = done(&saver, &name).await;
        assert_eq!(failure(&ended), "HOLD_EXPIRED", "{instead:?}: {ended:?}");
        assert_eq!(ended.consistency(), v1::CheckpointConsistency::Inconsistent, "{ended:?}");
        assert!(ended.failure.unwrap().message.contains("its store could not be told"), "{instead:?}");
        assert_eq!(device(&saver, "n0").await.state(), v1::MigrationState::Running);
        case.brings_back(instead);
        case.is_inconsistent(&checkpoint).await;
        case.comes(&case.mark(&checkpoint, "inconsistent")).await;
        case.is_inconsistent(&checkpoint).await;
        case.agent.stop().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mark_that_is_owed_is_known_to_the_next_agent() {
    for instead in ALL {
        let case = Case::new().await;
        let (name, checkpoint) = case.held().await;
        case.takes_away(instead);
        case.faulty.pass(HOLD);
        done(&case.saver().await, &name).await;
        // One finds the store away: it makes none in its place, though it is asked for what is in it.
        let case = case.restarted().await;
        let request = v1::ListCheckpointsRequest::default();
        let away = case.checkpoints().await.list_checkpoints(request).await.unwrap_err();
        assert_eq!(away.code(), Code::FailedPrecondition, "{instead:?}: {away}");
        let refusal = v1::StartSaveRequest { store: "stores/local".to_owned(), ..save_of(&["n0"]) };
        let refusal =
            refused(case.saver().await.start_save(refusal).await, Code::FailedPrecondition, "BLOCKED");
        assert_eq!(violations(&refusal)[0].0, "BLOCKER_REASON_STORE_UNUSABLE");
        case.brings_back(instead);
        let case = case.restarted().await;
        case.is_inconsistent(&checkpoint).await;
        case.comes(&case.mark(&checkpoint, "inconsistent")).await;
        // Nothing is owed any more, and it is what it is.
        let case = case.restarted().await;
        case.is_inconsistent(&checkpoint).await;
        case.agent.stop().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_that_the_store_did_not_discard_is_not_there_for_anybody() {
    for instead in ALL {
        let case = Case::new().await;
        let (name, checkpoint) = case.held().await;
        case.takes_away(instead);
        let saver = case.saver().await;
        saver.cancel_operation(v1::CancelOperationRequest { name: name.clone() }).await.unwrap();
        let ended = done(&saver, &name).await;
        assert_eq!(failure(&ended), "CANCELLED", "{instead:?}: {ended:?}");
        case.is_gone(&checkpoint).await;
        let case = case.restarted().await;
        case.is_gone(&checkpoint).await;
        case.brings_back(instead);
        case.is_gone(&checkpoint).await;
        assert_eq!(case.listed().await, Vec::new());
        case.comes(&case.mark(&checkpoint, "deleted")).await;
        assert_eq!(case.listed().await, Vec::new());
        case.agent.stop().await.unwrap();
    }
}
