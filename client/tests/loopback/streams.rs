//! A stream of state over real gRPC, into a folder.

use tonic::Code;
use vfio_checkpoint_client::call::CallError;
use vfio_checkpoint_client::document::Consistency;
use vfio_checkpoint_client::folder::{Existing, FolderReader, FolderWriter};
use vfio_checkpoint_client::transfer::{Accepted, OpenStreamError, TakeState};

use crate::calls::client;
use crate::server::{Agent, manifest, state};

#[tokio::test]
async fn state_goes_from_a_giver_over_grpc_into_a_folder() {
    let agent = Agent::default();
    let client = client(&agent).await;
    let mut taken = TakeState::open(&client, &"operations/1".parse().unwrap()).await.unwrap();
    assert_eq!(taken.manifest.devices, manifest().devices);
    let above = tempfile::tempdir().unwrap();
    let path = above.path().join("checkpoint");
    let mut writer = FolderWriter::create(&path, &taken.manifest.into(), Existing::Refuse).await.unwrap();
    while let Some(accepted) = taken.taker.next().await.unwrap() {
        match accepted {
            Accepted::Chunk { device, chunk } => {
                writer.chunk(u32::try_from(device).unwrap(), chunk).await.unwrap();
            }
            Accepted::Progress(_) => {}
            Accepted::Sealed { device, seal, config } => {
                let device = u32::try_from(device).unwrap();
                writer.seal(device, seal, config.map(Into::into)).await.unwrap();
            }
        }
    }
    writer.finish(Consistency::Consistent).await.unwrap();
    // It returns only when the giver has heard it and ended the stream.
    taken.taker.complete().await.unwrap();
    FolderReader::open(&path).await.unwrap().verify().await.unwrap();
    assert!(std::fs::read(path.join("device-0.state")).unwrap() == state());
}

#[tokio::test]
async fn an_abort_reaches_the_giver_over_grpc() {
    let agent = Agent::default();
    let client = client(&agent).await;
    let mut taken = TakeState::open(&client, &"operations/1".parse().unwrap()).await.unwrap();
    taken.taker.next().await.unwrap();
    // It returns when the giver, which has heard it, has ended its side.
    taken.taker.abort("the disk is full").await;
    let ends = agent.stream_ends.lock().unwrap().clone();
    assert_eq!(ends.len(), 1);
    assert!(ends[0].as_ref().unwrap().contains("the disk is full"), "{ends:?}");
}

#[tokio::test]
async fn a_stream_that_the_agent_refuses_says_why() {
    let client = client(&Agent::default()).await;
    let error = TakeState::open(&client, &"operations/2".parse().unwrap()).await.unwrap_err();
    let OpenStreamError::Call(CallError::Refused(refusal)) = error else { panic!("{error}") };
    assert_eq!((refusal.code, refusal.message.as_str()), (Code::NotFound, "no such operation"));
}
