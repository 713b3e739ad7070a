//! A save and a restore, start to end.

use vfio_checkpoint_client::call::Client;
use vfio_checkpoint_client::transfer::{Accepted, GiveState, TakeState};
use vfio_checkpoint_proto::v1;

use crate::lab::{Lab, PATIENCE, start};

#[tokio::test(flavor = "multi_thread")]
async fn a_state_goes_out_and_comes_back_into_another_device() {
    let lab = Lab::new();
    let agent =
        start(lab.config("a", &[("nic0", "sim:seed=7,memory=8MiB"), ("nic1", "sim:seed=8,memory=8MiB")]))
            .await;
    let saver = lab.client(&agent, "saver").await;
    let restorer = lab.client(&agent, "restorer").await;

    let started = saver
        .start_save(v1::StartSaveRequest {
            devices: vec!["devices/nic0".to_owned()],
            memory_capture: v1::MemoryCapture::None.into(),
            ..Default::default()
        })
        .await
        .unwrap();
    let operation = started.operation.unwrap().name;
    let TakeState { manifest, mut taker, .. } =
        TakeState::open(&saver, &operation.parse().unwrap()).await.unwrap();
    let (mut state, mut seal) = (Vec::new(), None);
    while let Some(accepted) = taker.next().await.unwrap() {
        match accepted {
            Accepted::Chunk { chunk, .. } => state.push(chunk.bytes().clone()),
            Accepted::Sealed { seal: sealed, config, .. } => seal = Some((sealed.seal(), config)),
            Accepted::Progress(_) => {}
        }
    }
    taker.complete().await.unwrap();
    let saved = done(&saver, &operation).await;
    assert_eq!(saved.result(), v1::OperationResult::Succeeded, "{saved:?}");

    let started = restorer
        .restore(v1::RestoreRequest {
            devices: vec!["devices/nic1".to_owned()],
            manifest: Some(manifest.into()),
            allow_fork: true,
            ..Default::default()
        })
        .await
        .unwrap();
    let operation = started.operation.unwrap().name;
    let GiveState { mut giver, .. } = GiveState::open(&restorer, &operation.parse().unwrap()).await.unwrap();
    for chunk in state {
        giver.chunk(0, chunk).await.unwrap();
    }
    let (seal, config) = seal.unwrap();
    giver.seal_as(0, config, seal).await.unwrap();
    giver.completed().await.unwrap();
    let restored = done(&restorer, &operation).await;
    assert_eq!(restored.result(), v1::OperationResult::Succeeded, "{restored:?}");
    agent.stop().await.unwrap();
}

async fn done(client: &Client, operation: &str) -> v1::Operation {
    client.wait_operation(operation, PATIENCE).await.unwrap().operation.unwrap()
}
