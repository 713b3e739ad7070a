//! A state that this agent itself discarded runs nowhere: its checkpoint is restored without a fork.

use tonic::Code;
use vfio_checkpoint_client::call::Client;
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_server::serve::Agent;

use crate::flow::{device, done, refused, save_of, start_save, violations};
use crate::lab::{Lab, start};

async fn saved(saver: &Client, device: &str, after: v1::AfterSave) -> String {
    let request =
        v1::StartSaveRequest { store: "stores/local".to_owned(), after: after.into(), ..save_of(&[device]) };
    let ended = done(saver, &start_save(saver, request).await).await;
    assert_eq!(ended.result(), v1::OperationResult::Succeeded, "{ended:?}");
    ended.checkpoint
}

fn onto(device: &str, checkpoint: &str) -> v1::RestoreRequest {
    v1::RestoreRequest {
        devices: vec![format!("devices/{device}")],
        checkpoint: checkpoint.to_owned(),
        ..Default::default()
    }
}

async fn is_a_fork(restorer: &Client, device: &str, checkpoint: &str) {
    let answer = restorer.restore(onto(device, checkpoint)).await;
    let refusal = refused(answer, Code::FailedPrecondition, "BLOCKED");
    assert_eq!(violations(&refusal)[0].0, "BLOCKER_REASON_SOURCE_STILL_RUNNING", "{refusal}");
}

/// Restores it, as what it was: the epoch under which it runs.
async fn lives_again(restorer: &Client, name: &str, checkpoint: &str, id: &str) -> u64 {
    let operation = restorer.restore(onto(name, checkpoint)).await.unwrap().operation.unwrap().name;
    let ended = done(restorer, &operation).await;
    assert_eq!(ended.result(), v1::OperationResult::Succeeded, "{ended:?}");
    let logical = device(restorer, name).await.logical_device.unwrap();
    assert_eq!(logical.id, id);
    logical.epoch
}

async fn discard(admin: &Client, device: &str) {
    let request = v1::ResetDeviceRequest {
        name: format!("devices/{device}"),
        mode: v1::ResetMode::DiscardState.into(),
        ..Default::default()
    };
    assert!(admin.reset_device(request).await.unwrap().state_lost);
}

/// A saver, a restorer and an admin.
async fn clients(lab: &Lab, agent: &Agent) -> (Client, Client, Client) {
    (lab.client(agent, "saver").await, lab.client(agent, "restorer").await, lab.client(agent, "admin").await)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_discarded_here_comes_back_without_a_fork_and_what_was_left_stopped_does_not() {
    let lab = Lab::new();
    let sim = "sim:seed=1,memory=256KiB";
    let config = lab.config("a", &[("n0", sim), ("n1", sim)]);
    let agent = start(config.clone()).await;
    let (saver, restorer, admin) = clients(&lab, &agent).await;
    let id = device(&saver, "n0").await.logical_device.unwrap().id;
    let checkpoint = saved(&saver, "n0", v1::AfterSave::Resume).await;
    is_a_fork(&restorer, "n1", &checkpoint).await;

    discard(&admin, "n0").await;
    assert_ne!(device(&saver, "n0").await.logical_device.unwrap().id, id);
    // Back onto its device, and then it runs there.
    assert_eq!(lives_again(&restorer, "n0", &checkpoint, &id).await, 2);
    is_a_fork(&restorer, "n1", &checkpoint).await;

    // Onto another one, also by a later life of the agent, under an epoch that it never had.
    discard(&admin, "n0").await;
    agent.stop().await.unwrap();
    let agent = start(config.clone()).await;
    let (saver, restorer, admin) = clients(&lab, &agent).await;
    assert_eq!(lives_again(&restorer, "n1", &checkpoint, &id).await, 3);
    is_a_fork(&restorer, "n0", &checkpoint).await;

    // Left stopped it may run elsewhere, whatever is discarded of it here.
    saved(&saver, "n1", v1::AfterSave::StayStopped).await;
    discard(&admin, "n1").await;
    is_a_fork(&restorer, "n0", &checkpoint).await;
    is_a_fork(&restorer, "n1", &checkpoint).await;
    agent.stop().await.unwrap();
}

/// Of one state one restore is admitted, also where two ask in the same moment, and none beside one that is under way.
#[tokio::test(flavor = "multi_thread")]
async fn two_restores_of_one_state_make_one_copy() {
    let lab = Lab::new();
    let sim = "sim:seed=1,memory=256KiB";
    let agent = start(lab.config("a", &[("n0", sim), ("n1", sim), ("n2", sim)])).await;
    let (saver, restorer, admin) = clients(&lab, &agent).await;
    let checkpoint = saved(&saver, "n0", v1::AfterSave::Resume).await;
    discard(&admin, "n0").await;
    let hold =
        |device| v1::RestoreRequest { after: v1::AfterRestore::Hold.into(), ..onto(device, &checkpoint) };
    let (one, other) = tokio::join!(restorer.restore(hold("n1")), restorer.restore(hold("n2")));
    let (begun, refusal) = match (one, other) {
        (Ok(begun), Err(error)) | (Err(error), Ok(begun)) => (begun, error),
        both => panic!("{both:?}"),
    };
    let refusal = refused(Err::<(), _>(refusal), Code::FailedPrecondition, "BLOCKED");
    assert_eq!(violations(&refusal)[0].0, "BLOCKER_REASON_SOURCE_STILL_RUNNING", "{refusal}");
    is_a_fork(&restorer, "n0", &checkpoint).await;
    let name = begun.operation.unwrap().name;
    restorer.cancel_operation(v1::CancelOperationRequest { name: name.clone() }).await.unwrap();
    assert_eq!(done(&restorer, &name).await.result(), v1::OperationResult::Cancelled);
    agent.stop().await.unwrap();
}
