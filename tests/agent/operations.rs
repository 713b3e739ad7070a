//! `OperationService`: what is under way, and what was.

use tonic::Code;
use vfio_checkpoint_proto::v1;

use crate::flow::{done, failure, millis, reached, refused, refused_field, save_of, soon, start_save, take};
use crate::lab::{Lab, start};

const GONE: &str = "operations/00000000000-0000000000000000";

#[tokio::test(flavor = "multi_thread")]
async fn an_operation_is_read_waited_for_and_listed() {
    let lab = Lab::new();
    let agent =
        start(lab.config("a", &[("n0", "sim:seed=1,memory=1MiB"), ("n1", "sim:seed=2,memory=1MiB")])).await;
    let saver = lab.client(&agent, "saver").await;
    let viewer = lab.client(&agent, "viewer").await;

    let mut request = save_of(&["n0"]);
    request.owner_pod = "default/pod".to_owned();
    let first = start_save(&saver, request).await;
    let operation = viewer
        .get_operation(v1::GetOperationRequest { name: first.clone() })
        .await
        .unwrap()
        .operation
        .unwrap();
    assert_eq!(operation.phase(), v1::OperationPhase::WaitingForStream);
    assert_eq!(operation.kind(), v1::OperationKind::Save);
    assert_eq!(operation.caller, "spiffe://lab.test/saver/test");
    assert_eq!(
        operation.actions().collect::<Vec<_>>(),
        [v1::OperationAction::Stream, v1::OperationAction::Cancel]
    );
    assert!(operation.deadline.is_some() && operation.end_time.is_none() && !operation.done);

    // It is not over, and the time is up: that is an answer, not an error.
    let waited = viewer.wait_operation(&first, std::time::Duration::from_millis(5)).await.unwrap();
    assert!(!waited.operation.unwrap().done);

    take(&saver, &first).await;
    let ended = done(&viewer, &first).await;
    assert_eq!(ended.result(), v1::OperationResult::Succeeded, "{ended:?}");
    assert_eq!(ended.outcome(), v1::StateOutcome::Preserved);
    assert_eq!(ended.consistency(), v1::CheckpointConsistency::Consistent);
    assert!(ended.actions.is_empty() && ended.deadline.is_none() && ended.end_time.is_some());
    assert!(ended.downtime.is_some());
    let sealed = ended.devices[0].seal.as_ref().unwrap();
    assert_eq!((sealed.length_bytes, sealed.blake3.len()), (ended.moved_bytes, 32));

    let second = start_save(&saver, save_of(&["n1"])).await;
    let all = v1::ListOperationsRequest { page_size: 1, ..Default::default() };
    let page = viewer.list_operations(all.clone()).await.unwrap();
    assert_eq!(names(&page), [second.as_str()], "the newest first");
    let next = v1::ListOperationsRequest { page_token: page.next_page_token, ..all };
    let page = viewer.list_operations(next).await.unwrap();
    assert_eq!(names(&page), [first.as_str()]);
    assert_eq!(page.next_page_token, "", "there is no third page");

    let active = v1::ListOperationsRequest { active_only: true, ..Default::default() };
    assert_eq!(names(&viewer.list_operations(active).await.unwrap()), [second.as_str()]);
    let of_device = v1::ListOperationsRequest { device: "devices/n0".to_owned(), ..Default::default() };
    assert_eq!(names(&viewer.list_operations(of_device).await.unwrap()), [first.as_str()]);
    agent.stop().await.unwrap();
}

fn names(page: &v1::ListOperationsResponse) -> Vec<&str> {
    page.operations.iter().map(|operation| operation.name.as_str()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_a_question_is_said() {
    let lab = Lab::new();
    let agent = start(lab.config("a", &[("n0", "sim:seed=1,memory=1MiB")])).await;
    let saver = lab.client(&agent, "saver").await;
    let get = |name: &str| saver.get_operation(v1::GetOperationRequest { name: name.to_owned() });
    refused(get(GONE).await, Code::NotFound, "OPERATION_NOT_FOUND");
    refused_field(get("").await, "name");
    refused_field(get("devices/n0").await, "name");
    let wait = |name: &'static str| saver.wait_operation(name, std::time::Duration::from_secs(1));
    refused(wait(GONE).await, Code::NotFound, "OPERATION_NOT_FOUND");
    refused_field(wait("operations/").await, "name");
    refused_field(saver.wait_operation(GONE, std::time::Duration::from_hours(2)).await, "timeout");
    let watch = |name: &str| saver.watch_operation(v1::WatchOperationRequest { name: name.to_owned() });
    refused(watch(GONE).await, Code::NotFound, "OPERATION_NOT_FOUND");
    refused_field(watch("x").await, "name");
    let cancel = |name: &str| saver.cancel_operation(v1::CancelOperationRequest { name: name.to_owned() });
    refused(cancel(GONE).await, Code::NotFound, "OPERATION_NOT_FOUND");
    refused_field(cancel("x").await, "name");

    let list = |request| saver.list_operations(request);
    let wrong = v1::ListOperationsRequest { page_size: -1, ..Default::default() };
    refused_field(list(wrong).await, "page_size");
    let wrong = v1::ListOperationsRequest { device: "n0".to_owned(), ..Default::default() };
    refused_field(list(wrong).await, "device");
    let wrong = v1::ListOperationsRequest { page_token: "no token!".to_owned(), ..Default::default() };
    let refusal = refused(list(wrong).await, Code::InvalidArgument, "INVALID_PAGE_TOKEN");
    assert_eq!(refusal.fields[0].field, "page_token");
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_tells_each_change_and_ends_with_the_operation() {
    let lab = Lab::new();
    let agent = start(lab.config("a", &[("n0", "sim:seed=1,memory=1MiB")])).await;
    let saver = lab.client(&agent, "saver").await;
    let mut request = save_of(&["n0"]);
    request.after = v1::AfterSave::Hold.into();
    let name = start_save(&saver, request).await;
    let mut watch = saver.watch_operation(v1::WatchOperationRequest { name: name.clone() }).await.unwrap();
    let first = soon(watch.next()).await.unwrap().unwrap().operation.unwrap();
    assert_eq!(first.phase(), v1::OperationPhase::WaitingForStream);
    take(&saver, &name).await;
    reached(&saver, &name, v1::OperationPhase::Held).await;
    saver.resume(v1::ResumeRequest { operation: name.clone() }).await.unwrap();

    let mut told = vec![first];
    while let Some(response) = soon(watch.next()).await.unwrap() {
        told.push(response.operation.unwrap());
    }
    assert!(told.windows(2).all(|pair| pair[0].revision < pair[1].revision), "each is newer: {told:?}");
    assert_eq!(told.iter().filter(|operation| operation.done).count(), 1, "the last one, once: {told:?}");
    assert!(told.last().unwrap().done);

    // Of what is over, the one message and the end.
    let mut watch = saver.watch_operation(v1::WatchOperationRequest { name }).await.unwrap();
    assert!(soon(watch.next()).await.unwrap().unwrap().operation.unwrap().done);
    assert!(soon(watch.next()).await.unwrap().is_none());
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn only_who_started_it_and_an_admin_cancel() {
    let lab = Lab::new();
    let agent = start(lab.config("a", &[("n0", "sim:seed=1,memory=1MiB")])).await;
    let saver = lab.client(&agent, "saver").await;
    let other = lab.client_named(&agent, "spiffe://lab.test/saver/other").await;
    let admin = lab.client(&agent, "admin").await;
    let request = |name: &str| v1::CancelOperationRequest { name: name.to_owned() };

    let name = start_save(&saver, save_of(&["n0"])).await;
    refused(other.cancel_operation(request(&name)).await, Code::PermissionDenied, "NOT_YOUR_OPERATION");
    admin.cancel_operation(request(&name)).await.unwrap();
    let ended = done(&saver, &name).await;
    assert_eq!((ended.result(), failure(&ended)), (v1::OperationResult::Cancelled, "CANCELLED"));
    assert_eq!(ended.outcome(), v1::StateOutcome::Preserved);
    let message = ended.failure.unwrap().message;
    assert!(message.contains("spiffe://lab.test/admin/test"), "{message}");
    refused(saver.cancel_operation(request(&name)).await, Code::FailedPrecondition, "OPERATION_OVER");

    // The device is free again.
    let name = start_save(&saver, save_of(&["n0"])).await;
    saver.cancel_operation(request(&name)).await.unwrap();
    done(&saver, &name).await;
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_nobody_opens_ends_its_operation() {
    let lab = Lab::new();
    let mut config = lab.config("a", &[("n0", "sim:seed=1,memory=1MiB")]);
    config.defaults.stream_open_timeout = std::time::Duration::from_millis(20);
    let agent = start(config).await;
    let saver = lab.client(&agent, "saver").await;
    let name = start_save(&saver, save_of(&["n0"])).await;
    let ended = done(&saver, &name).await;
    assert_eq!((ended.result(), failure(&ended)), (v1::OperationResult::Failed, "NO_STREAM"), "{ended:?}");
    assert_eq!(ended.outcome(), v1::StateOutcome::Preserved);
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn waits_that_are_too_long_are_refused() {
    let lab = Lab::new();
    let mut config = lab.config("a", &[("n0", "sim:seed=1,memory=1MiB")]);
    config.limits.max_wait = std::time::Duration::from_secs(10);
    let agent = start(config).await;
    let saver = lab.client(&agent, "saver").await;
    let mut request = save_of(&["n0"]);
    request.after = v1::AfterSave::Hold.into();
    request.hold_timeout = millis(11_000);
    refused_field(saver.start_save(request).await, "hold_timeout");
    let mut request = save_of(&["n0"]);
    request.cutover = v1::CutoverMode::Manual.into();
    request.cutover_timeout = millis(11_000);
    refused_field(saver.start_save(request).await, "cutover_timeout");
    agent.stop().await.unwrap();
}
