//! Saves: how they stop, how long they hold, and what they leave behind.

use std::time::Duration;

use tonic::Code;
use vfio_checkpoint_client::transfer::TakeState;
use vfio_checkpoint_device::sim::SimConfig;
use vfio_checkpoint_fsm::State;
use vfio_checkpoint_proto::v1;

use crate::flow::{
    Bench, device, done, drain, failure, millis, reached, refused, refused_field, save, save_of, soon,
    start_save, take,
};
use crate::lab::{Lab, start};

fn small() -> SimConfig {
    SimConfig { memory_bytes: 1 << 20, ..SimConfig::default() }
}

fn cutover(operation: &str) -> v1::CutoverRequest {
    v1::CutoverRequest { operation: operation.to_owned() }
}

fn resume(operation: &str) -> v1::ResumeRequest {
    v1::ResumeRequest { operation: operation.to_owned() }
}

/// The states that a device went through since they were taken last, each where it arrived.
fn visited(bench: &Bench) -> Vec<State> {
    bench.device.take_hops().into_iter().map(|hop| hop.arc.to()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_copy_and_a_pre_copy_bring_the_same_state_by_their_arcs() {
    let lab = Lab::new();
    let bench = Bench::new(small());
    let agent = start(lab.config("a", &[("nic0", bench.address.as_str())])).await;
    let saver = lab.client(&agent, "saver").await;
    visited(&bench);
    let mut request = save_of(&["nic0"]);
    request.pre_copy = v1::PreCopyMode::Never.into();
    let name = start_save(&saver, request.clone()).await;
    assert_eq!(visited(&bench), [], "nothing is touched before the stream is open");
    let stopped = take(&saver, &name).await;
    let ended = done(&saver, &name).await;
    assert_eq!(ended.result(), v1::OperationResult::Succeeded, "{ended:?}");
    assert_eq!(ended.devices[0].pre_copy_bytes, 0);
    let hops = visited(&bench);
    assert!(!hops.contains(&State::PreCopy), "{hops:?}");
    assert_eq!(hops.last(), Some(&State::Running));
    assert!(hops.contains(&State::StopCopy));

    request.pre_copy = v1::PreCopyMode::Required.into();
    let name = start_save(&saver, request).await;
    let copied = take(&saver, &name).await;
    let ended = done(&saver, &name).await;
    assert_eq!(ended.result(), v1::OperationResult::Succeeded, "{ended:?}");
    assert!(ended.devices[0].pre_copy_bytes > 1 << 20, "{ended:?}");
    let hops = visited(&bench);
    assert_eq!(hops.first(), Some(&State::PreCopy));
    assert_eq!(hops.last(), Some(&State::Running));
    // A pre-copied stream is cut otherwise, and its source ran on unchanged.
    assert_eq!(copied.manifest.devices[0].logical_device, stopped.manifest.devices[0].logical_device);
    assert_eq!(bench.device.resets(), 0);
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_set_meets_at_its_barrier_before_any_device_stops() {
    let lab = Lab::new();
    let benches = [Bench::new(small()), Bench::new(SimConfig { seed: 9, ..small() })];
    let agent = start(
        lab.config("a", &[("nic0", benches[0].address.as_str()), ("nic1", benches[1].address.as_str())]),
    )
    .await;
    let saver = lab.client(&agent, "saver").await;
    for pre_copy in [v1::PreCopyMode::Never, v1::PreCopyMode::Required] {
        for bench in &benches {
            visited(bench);
        }
        let mut request = save_of(&["nic1", "nic0"]);
        request.pre_copy = pre_copy.into();
        let name = start_save(&saver, request).await;
        let saved = take(&saver, &name).await;
        let ended = done(&saver, &name).await;
        assert_eq!(ended.result(), v1::OperationResult::Succeeded, "{ended:?}");
        assert_eq!(saved.manifest.devices[0].source_device.to_string(), "devices/nic1", "the caller's order");
        assert_eq!(saved.seals.len(), 2);
        let barrier = match pre_copy {
            v1::PreCopyMode::Never => State::RunningP2p,
            v1::PreCopyMode::Required | v1::PreCopyMode::Unspecified => State::PreCopyP2p,
        };
        for bench in &benches {
            let hops = visited(bench);
            let at = |state| hops.iter().position(|hop| *hop == state).unwrap_or_else(|| panic!("{hops:?}"));
            assert!(at(barrier) < at(State::StopCopy), "{hops:?}");
            assert_eq!(hops[hops.len() - 2..], [State::RunningP2p, State::Running], "{hops:?}");
        }
    }
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_caller_says_when_to_stop() {
    let lab = Lab::new();
    let agent = start(lab.config("a", &[("nic0", "sim:seed=1,memory=1MiB")])).await;
    let saver = lab.client(&agent, "saver").await;
    let mut request = save_of(&["nic0"]);
    request.cutover = v1::CutoverMode::Manual.into();
    request.pre_copy = v1::PreCopyMode::Never.into();

    // By a call.
    let name = start_save(&saver, request.clone()).await;
    let TakeState { manifest, mut taker, .. } =
        TakeState::open(&saver, &name.parse().unwrap()).await.unwrap();
    let taking = tokio::spawn(async move {
        let saved = drain(manifest, &mut taker).await;
        soon(taker.complete()).await.unwrap();
        saved
    });
    let waits = reached(&saver, &name, v1::OperationPhase::WaitingForCutover).await;
    assert!(waits.actions().any(|action| action == v1::OperationAction::Cutover), "{waits:?}");
    assert!(waits.deadline.is_some());
    let other = lab.client_named(&agent, "spiffe://lab.test/saver/other").await;
    refused(other.cutover(cutover(&name)).await, Code::PermissionDenied, "NOT_YOUR_OPERATION");
    saver.cutover(cutover(&name)).await.unwrap();
    taking.await.unwrap();
    assert_eq!(done(&saver, &name).await.result(), v1::OperationResult::Succeeded);
    refused(saver.cutover(cutover(&name)).await, Code::FailedPrecondition, "OPERATION_OVER");

    // On the stream, while pre-copy goes on until it is told to stop.
    request.pre_copy = v1::PreCopyMode::Required.into();
    let name = start_save(&saver, request).await;
    let TakeState { manifest, taker, .. } = TakeState::open(&saver, &name.parse().unwrap()).await.unwrap();
    let mut taker = taker.with_cutover();
    soon(taker.cutover()).await.unwrap();
    drain(manifest, &mut taker).await;
    soon(taker.complete()).await.unwrap();
    assert_eq!(done(&saver, &name).await.result(), v1::OperationResult::Succeeded);

    // Where it was not asked for.
    let name = start_save(&saver, save_of(&["nic0"])).await;
    refused(saver.cutover(cutover(&name)).await, Code::FailedPrecondition, "NOT_MANUAL");
    refused_field(saver.cutover(cutover("nic0")).await, "operation");
    let unknown = "operations/00000000000-0000000000000000";
    refused(saver.cutover(cutover(unknown)).await, Code::NotFound, "OPERATION_NOT_FOUND");
    refused(saver.resume(resume(unknown)).await, Code::NotFound, "OPERATION_NOT_FOUND");
    refused_field(saver.resume(resume("")).await, "operation");
    let TakeState { manifest, taker, .. } = TakeState::open(&saver, &name.parse().unwrap()).await.unwrap();
    // A client that does not know better: the library would not say it.
    let mut taker = taker.with_cutover();
    soon(taker.cutover()).await.unwrap();
    // The agent gives the stream up: a cutover does not belong here, or it was over before it was heard.
    while let Ok(Some(_)) = soon(taker.next()).await {}
    drop((manifest, taker));
    done(&saver, &name).await;
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cutover_that_does_not_come_undoes_the_save() {
    let lab = Lab::new();
    let agent = start(lab.config("a", &[("nic0", "sim:seed=1,memory=1MiB")])).await;
    let saver = lab.client(&agent, "saver").await;
    let digests = save(&saver, &["nic0"]).await.digests();
    let mut request = save_of(&["nic0"]);
    request.cutover = v1::CutoverMode::Manual.into();
    request.cutover_timeout = millis(30);
    let name = start_save(&saver, request).await;
    let TakeState { mut taker, .. } = TakeState::open(&saver, &name.parse().unwrap()).await.unwrap();
    let told = loop {
        match soon(taker.next()).await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("it was undone, so it cannot be complete"),
            Err(error) => break error.to_string(),
        }
    };
    let ended = done(&saver, &name).await;
    assert_eq!((ended.result(), failure(&ended)), (v1::OperationResult::Failed, "CUTOVER_TIMEOUT"), "{told}");
    assert_eq!(ended.outcome(), v1::StateOutcome::Preserved);
    assert_eq!(device(&saver, "nic0").await.state(), v1::MigrationState::Running);
    assert_eq!(save(&saver, &["nic0"]).await.digests(), digests);
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_held_save_waits_for_its_caller() {
    let lab = Lab::new();
    let bench = Bench::new(small());
    let agent = start(lab.config("a", &[("nic0", bench.address.as_str())])).await;
    let saver = lab.client(&agent, "saver").await;
    let mut request = save_of(&["nic0"]);
    request.after = v1::AfterSave::Hold.into();
    let name = start_save(&saver, request.clone()).await;
    refused(saver.resume(resume(&name)).await, Code::FailedPrecondition, "NOT_HELD");
    take(&saver, &name).await;
    let held = reached(&saver, &name, v1::OperationPhase::Held).await;
    assert!(held.deadline.is_some());
    assert_eq!(
        held.actions().collect::<Vec<_>>(),
        [v1::OperationAction::Resume, v1::OperationAction::Cancel]
    );
    assert_eq!(bench.device.state(), State::Stop);
    let other = lab.client_named(&agent, "spiffe://lab.test/saver/other").await;
    refused(other.resume(resume(&name)).await, Code::PermissionDenied, "NOT_YOUR_OPERATION");
    saver.resume(resume(&name)).await.unwrap();
    let ended = done(&saver, &name).await;
    assert_eq!(ended.result(), v1::OperationResult::Succeeded, "{ended:?}");
    assert_eq!(ended.consistency(), v1::CheckpointConsistency::Consistent);
    assert_eq!(bench.device.state(), State::Running);
    refused(saver.resume(resume(&name)).await, Code::FailedPrecondition, "OPERATION_OVER");

    // A hold that is taken back.
    let name = start_save(&saver, request).await;
    take(&saver, &name).await;
    reached(&saver, &name, v1::OperationPhase::Held).await;
    saver.cancel_operation(v1::CancelOperationRequest { name: name.clone() }).await.unwrap();
    let ended = done(&saver, &name).await;
    assert_eq!((ended.result(), failure(&ended)), (v1::OperationResult::Cancelled, "CANCELLED"), "{ended:?}");
    assert_eq!(ended.outcome(), v1::StateOutcome::Preserved);
    assert_eq!((bench.device.state(), bench.device.resets()), (State::Running, 0));

    // Without a hold there is nothing to resume.
    let name = start_save(&saver, save_of(&["nic0"])).await;
    refused(saver.resume(resume(&name)).await, Code::FailedPrecondition, "NO_HOLD");
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hold_that_runs_out_lets_the_devices_run_and_says_so() {
    let lab = Lab::new();
    let bench = Bench::new(small());
    let agent = start(lab.config("a", &[("nic0", bench.address.as_str())])).await;
    let saver = lab.client(&agent, "saver").await;
    let mut request = save_of(&["nic0"]);
    request.after = v1::AfterSave::Hold.into();
    request.hold_timeout = millis(30);
    let name = start_save(&saver, request).await;
    take(&saver, &name).await;
    let ended = done(&saver, &name).await;
    assert_eq!((ended.result(), failure(&ended)), (v1::OperationResult::Failed, "HOLD_EXPIRED"), "{ended:?}");
    assert_eq!(ended.consistency(), v1::CheckpointConsistency::Inconsistent);
    assert_eq!(ended.outcome(), v1::StateOutcome::Preserved);
    assert_eq!((bench.device.state(), bench.device.resets()), (State::Running, 0));
    refused(saver.resume(resume(&name)).await, Code::FailedPrecondition, "OPERATION_OVER");
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_save_that_does_not_converge_stops_or_is_undone() {
    let lab = Lab::new();
    let agent = start(lab.config("a", &[("nic0", "sim:seed=1,memory=16MiB,dirty=1GiB")])).await;
    let saver = lab.client(&agent, "saver").await;
    let mut request = save_of(&["nic0"]);
    request.pre_copy = v1::PreCopyMode::Required.into();
    request.pre_copy_budget = millis(100);
    request.downtime_limit = Some(Duration::from_micros(1).try_into().unwrap());
    request.no_convergence = v1::NoConvergence::Abort.into();
    let name = start_save(&saver, request.clone()).await;
    let TakeState { mut taker, .. } = TakeState::open(&saver, &name.parse().unwrap()).await.unwrap();
    while let Ok(Some(_)) = soon(taker.next()).await {}
    let ended = done(&saver, &name).await;
    assert_eq!(
        (ended.result(), failure(&ended)),
        (v1::OperationResult::Failed, "NO_CONVERGENCE"),
        "{ended:?}"
    );
    assert_eq!(ended.outcome(), v1::StateOutcome::Preserved);
    assert_eq!(device(&saver, "nic0").await.state(), v1::MigrationState::Running);

    request.no_convergence = v1::NoConvergence::StopAnyway.into();
    let name = start_save(&saver, request).await;
    take(&saver, &name).await;
    let ended = done(&saver, &name).await;
    assert_eq!(ended.result(), v1::OperationResult::Succeeded, "{ended:?}");
    assert!(ended.downtime.is_some());
    agent.stop().await.unwrap();
}
