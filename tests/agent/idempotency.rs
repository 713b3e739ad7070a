//! The same request id gives the same operation: at once, later, and after a restart.

use tonic::Code;
use vfio_checkpoint_proto::v1;

use crate::flow::{
    Node, at_once, done, failure, refused, request_id, restore_into, save, save_of, start_save, take,
};
use crate::lab::{Lab, start};

#[tokio::test(flavor = "multi_thread")]
async fn one_request_id_starts_one_operation() {
    let lab = Lab::new();
    let agent =
        start(lab.config("a", &[("n0", "sim:seed=1,memory=1MiB"), ("n1", "sim:seed=2,memory=1MiB")])).await;
    let saver = lab.client(&agent, "saver").await;
    let request = v1::StartSaveRequest { request_id: request_id(1), ..save_of(&["n0"]) };
    let calls = (0..8).map(|_| {
        let (saver, request) = (saver.clone(), request.clone());
        tokio::spawn(async move { start_save(&saver, request).await })
    });
    let mut names = Vec::new();
    for call in calls.collect::<Vec<_>>() {
        names.push(call.await.unwrap());
    }
    names.dedup();
    assert_eq!(names.len(), 1, "all got one: {names:?}");

    // Asked whether it would work, it is the same request; the answer is what is in the way, and no operation.
    let validated = v1::StartSaveRequest { validate_only: true, ..request.clone() };
    let answer = saver.start_save(validated).await.unwrap();
    assert_eq!(answer.operation, None, "a dry run starts nothing, and finds nothing that was started");
    let blockers: Vec<_> = answer.blockers.iter().map(v1::Blocker::reason).collect();
    assert_eq!(blockers, [v1::BlockerReason::Leased], "the operation that the id stands for has the device");
    assert!(answer.prediction.is_some());
    let other_body = v1::StartSaveRequest { devices: vec!["devices/n1".to_owned()], ..request.clone() };
    refused(saver.start_save(other_body).await, Code::AlreadyExists, "REQUEST_ID_REUSED");
    // An id is its caller's own.
    let other = lab.client_named(&agent, "spiffe://lab.test/saver/other").await;
    let theirs = v1::StartSaveRequest { request_id: request_id(1), ..save_of(&["n1"]) };
    assert_ne!(start_save(&other, theirs).await, names[0]);

    // Also once it is over.
    take(&saver, &names[0]).await;
    done(&saver, &names[0]).await;
    assert_eq!(start_save(&saver, request).await, names[0]);

    // A blocked request stands for nothing.
    let blocked = v1::StartSaveRequest { request_id: request_id(2), ..save_of(&["n1"]) };
    let at_once = at_once(saver.clone());
    refused(at_once.start_save(blocked.clone()).await, Code::Unavailable, "BLOCKED");
    let other_body = v1::StartSaveRequest { devices: vec!["devices/n0".to_owned()], ..blocked };
    start_save(&saver, other_body).await;
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_id_is_known_after_a_restart() {
    let lab = Lab::new();
    let config = lab.config("a", &[("n0", "sim:seed=1,memory=1MiB"), ("n1", "sim:seed=2,memory=1MiB")]);
    let node = Node::start(&config).await;
    let saver = lab.client(node.agent(), "saver").await;
    let request = v1::StartSaveRequest { request_id: request_id(1), ..save_of(&["n0"]) };
    let finished = start_save(&saver, request.clone()).await;
    take(&saver, &finished).await;
    let before = done(&saver, &finished).await;
    let waiting = v1::StartSaveRequest { request_id: request_id(2), ..save_of(&["n0"]) };
    let undone = start_save(&saver, waiting.clone()).await;
    let saved = save(&saver, &["n1"]).await;
    let restorer = lab.client(node.agent(), "restorer").await;
    let restore = v1::RestoreRequest { request_id: request_id(1), ..restore_into(&["n1"], &saved) };
    let restored = restorer.restore(restore.clone()).await.unwrap().operation.unwrap().name;
    let validated = v1::RestoreRequest { validate_only: true, ..restore.clone() };
    assert_eq!(
        restorer.restore(validated).await.unwrap().operation,
        None,
        "a dry run starts and finds nothing"
    );
    drop((saver, restorer));
    node.stop().await;

    let node = Node::start(&config).await;
    let saver = lab.client(node.agent(), "saver").await;
    assert_eq!(start_save(&saver, request.clone()).await, finished);
    let after = done(&saver, &finished).await;
    assert_eq!(after.result(), v1::OperationResult::Succeeded);
    assert_eq!(after.devices[0].seal, before.devices[0].seal);
    assert_eq!((after.end_time, after.downtime), (before.end_time, before.downtime));
    assert_eq!((after.moved_bytes, after.request_id.clone()), (before.moved_bytes, request_id(1)));
    assert_eq!(start_save(&saver, waiting).await, undone);
    let ended = done(&saver, &undone).await;
    assert_eq!(
        (ended.result(), failure(&ended)),
        (v1::OperationResult::Failed, "SHUTTING_DOWN"),
        "{ended:?}"
    );
    let other_body = v1::StartSaveRequest { devices: vec!["devices/n1".to_owned()], ..request };
    refused(saver.start_save(other_body).await, Code::AlreadyExists, "REQUEST_ID_REUSED");
    let restorer = lab.client(node.agent(), "restorer").await;
    assert_eq!(restorer.restore(restore).await.unwrap().operation.unwrap().name, restored);
    drop((saver, restorer));
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_agent_did_not_live_to_end_has_an_end_with_the_next() {
    let lab = Lab::new();
    let config = lab.config("a", &[("n0", "sim:seed=1,memory=1MiB")]);
    let node = Node::start(&config).await;
    let saver = lab.client(node.agent(), "saver").await;
    let request = v1::StartSaveRequest { request_id: request_id(1), ..save_of(&["n0"]) };
    let name = start_save(&saver, request.clone()).await;
    drop(saver);
    node.crash().await;

    let node = Node::start(&config).await;
    let saver = lab.client(node.agent(), "saver").await;
    assert_eq!(start_save(&saver, request).await, name);
    let ended = done(&saver, &name).await;
    assert_eq!(
        (ended.result(), failure(&ended)),
        (v1::OperationResult::Failed, "AGENT_RESTARTED"),
        "{ended:?}"
    );
    save(&saver, &["n0"]).await;
    drop(saver);
    node.stop().await;
}
