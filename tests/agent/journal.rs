//! A journal that cannot be written: what is not on record is not done, and what was done stays leased until it is.
//!
//! The disk is made to fail by a fail point in the agent's own journal; all else is as it is served.

use std::fs::OpenOptions;
use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tonic::Code;
use tonic::transport::Channel;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use vfio_checkpoint_client::transfer::TakeState;
use vfio_checkpoint_device::sim::SimConfig;
use vfio_checkpoint_fsm::State;
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_server::config::AgentConfig;
use vfio_checkpoint_server::failpoint::{Failing, fail};

use crate::flow::{
    Bench, Node, Saved, at_once, device, done, drain, failure, give, reached, refused, request_id,
    restore_into, save, save_of, soon, start_restore, start_save, take,
};
use crate::lab::{Lab, start};

fn small() -> SimConfig {
    SimConfig { memory_bytes: 1 << 20, ..SimConfig::default() }
}

/// From the commit after `pass` of them on, what the journal of this agent is to be told of `what` fails.
fn failing(config: &AgentConfig, what: &str, pass: u32) -> Failing {
    fail(&config.node.state_dir, &format!("commit of {what}"), pass)
}

/// A lab, the configuration of its one agent, and that agent's one device.
fn one() -> (Lab, AgentConfig, Bench) {
    let lab = Lab::new();
    let bench = Bench::new(small());
    let config = lab.config("a", &[("n0", bench.address.as_str())]);
    (lab, config, bench)
}

fn resume(operation: &str) -> v1::ResumeRequest {
    v1::ResumeRequest { operation: operation.to_owned() }
}

fn cancel(operation: &str) -> v1::CancelOperationRequest {
    v1::CancelOperationRequest { name: operation.to_owned() }
}

fn cutover(operation: &str) -> v1::CutoverRequest {
    v1::CutoverRequest { operation: operation.to_owned() }
}

fn reset(mode: v1::ResetMode, id: u32) -> v1::ResetDeviceRequest {
    v1::ResetDeviceRequest {
        name: "devices/n0".to_owned(),
        mode: mode.into(),
        request_id: request_id(id),
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_recorded_is_not_begun_and_leaves_nothing_behind() {
    let (lab, config, bench) = one();
    let agent = start(config.clone()).await;
    let saver = at_once(lab.client(&agent, "saver").await);
    let restorer = at_once(lab.client(&agent, "restorer").await);
    let admin = at_once(lab.client(&agent, "admin").await);
    let saved = save(&saver, &["n0"]).await;
    let request = v1::StartSaveRequest { request_id: request_id(1), ..save_of(&["n0"]) };
    let restore = v1::RestoreRequest { request_id: request_id(2), ..restore_into(&["n0"], &saved) };

    let no_journal = [failing(&config, "ADMITTED", 0), failing(&config, "devices", 0)];
    let refusal = refused(saver.start_save(request.clone()).await, Code::Unavailable, "JOURNAL_FAILED");
    assert!(refusal.message.contains("nothing was done"), "{refusal}");
    refused(restorer.restore(restore.clone()).await, Code::Unavailable, "JOURNAL_FAILED");
    let before = device(&saver, "n0").await.logical_device;
    let discard = reset(v1::ResetMode::DiscardState, 3);
    refused(admin.reset_device(discard.clone()).await, Code::Unavailable, "JOURNAL_FAILED");
    assert_eq!((bench.device.state(), bench.device.resets()), (State::Running, 0));
    assert_eq!(device(&saver, "n0").await.logical_device, before);
    assert_eq!(device(&saver, "n0").await.operation, "", "it is not leased");
    let listed = saver.list_operations(v1::ListOperationsRequest::default()).await.unwrap();
    assert_eq!(listed.operations.len(), 1, "the save from before: {listed:?}");

    // With a journal the same ids work: nothing stands for them.
    drop(no_journal);
    let name = start_save(&saver, request).await;
    take(&saver, &name).await;
    done(&saver, &name).await;
    let name = start_restore(&restorer, restore).await;
    give(&restorer, &name, &saved).await;
    done(&restorer, &name).await;
    assert!(admin.reset_device(discard).await.unwrap().state_lost);
    assert_eq!(bench.device.resets(), 1);
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_save_whose_hold_cannot_be_recorded_lets_its_device_run() {
    let (lab, config, bench) = one();
    let agent = start(config.clone()).await;
    let saver = lab.client(&agent, "saver").await;
    let digests = save(&saver, &["n0"]).await.digests();
    let _held = failing(&config, "HELD", 0);
    let hold = v1::StartSaveRequest { after: v1::AfterSave::Hold.into(), ..save_of(&["n0"]) };
    let name = start_save(&saver, hold).await;
    take(&saver, &name).await;
    let ended = done(&saver, &name).await;
    assert_eq!(
        (ended.result(), failure(&ended)),
        (v1::OperationResult::Failed, "JOURNAL_FAILED"),
        "{ended:?}"
    );
    assert_eq!(ended.outcome(), v1::StateOutcome::Preserved);
    assert_eq!((bench.device.state(), bench.device.resets()), (State::Running, 0));
    assert_eq!(save(&saver, &["n0"]).await.digests(), digests);
    agent.stop().await.unwrap();
}

/// Gives a restore of `n0` its state, as far as it takes it, and waits for its end.
async fn restored(lab: &Lab, node: &Node, saved: &Saved, after: v1::AfterRestore) -> v1::Operation {
    let restorer = lab.client(node.agent(), "restorer").await;
    let request = v1::RestoreRequest { after: after.into(), ..restore_into(&["n0"], saved) };
    let name = start_restore(&restorer, request).await;
    let giving = async {
        use vfio_checkpoint_client::transfer::GiveState;
        let GiveState { mut giver, .. } = GiveState::open(&restorer, &name.parse().unwrap()).await.unwrap();
        for (device, bytes) in &saved.pieces {
            giver.chunk(*device, bytes.clone()).await?;
        }
        for (device, seal, config) in &saved.seals {
            giver.seal_as(*device, *config, *seal).await?;
        }
        giver.completed().await
    };
    // Where it is given up before all was taken, the giver is told: the operation says why.
    let _told = soon(giving).await;
    done(&restorer, &name).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_that_cannot_be_recorded_never_runs() {
    let (lab, config, bench) = one();
    let node = Node::start(&config).await;
    let saved = save(&lab.client(node.agent(), "saver").await, &["n0"]).await;
    let steps = [("HELD", v1::AfterRestore::Hold), ("RUNNING", v1::AfterRestore::Run)];
    for (resets, (step, after)) in (1..).zip(steps) {
        bench.device.take_hops();
        let no_journal = failing(&config, step, 0);
        let ended = restored(&lab, &node, &saved, after).await;
        assert_eq!(
            (ended.result(), failure(&ended)),
            (v1::OperationResult::Failed, "JOURNAL_FAILED"),
            "{step}: {ended:?}"
        );
        assert_eq!(ended.outcome(), v1::StateOutcome::StateLost, "{step}");
        assert_eq!((bench.device.state(), bench.device.resets()), (State::Running, resets), "{step}");
        let hops = bench.device.take_hops();
        assert!(
            hops.iter().all(|hop| hop.arc.from() != State::Resuming),
            "{step}: only a reset ends it: {hops:?}"
        );
        drop(no_journal);
    }
    // Before anything was entered nothing is lost.
    bench.device.take_hops();
    let no_journal = failing(&config, "BEGUN", 0);
    let ended = restored(&lab, &node, &saved, v1::AfterRestore::Run).await;
    assert_eq!(
        (ended.result(), failure(&ended)),
        (v1::OperationResult::Failed, "JOURNAL_FAILED"),
        "{ended:?}"
    );
    assert_eq!(ended.outcome(), v1::StateOutcome::Preserved, "{ended:?}");
    assert_eq!((bench.device.take_hops(), bench.device.resets()), (Vec::new(), 2));
    drop(no_journal);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_end_that_is_not_on_record_yet_can_be_neither_cancelled_nor_cut_over() {
    let (lab, config, bench) = one();
    let agent = start(config.clone()).await;
    let saver = lab.client(&agent, "saver").await;

    // The device runs again; only the record of it is missing.
    let mut no_journal = failing(&config, "ENDED", 0);
    let hold = v1::StartSaveRequest { after: v1::AfterSave::Hold.into(), ..save_of(&["n0"]) };
    let name = start_save(&saver, hold).await;
    take(&saver, &name).await;
    reached(&saver, &name, v1::OperationPhase::Held).await;
    saver.resume(resume(&name)).await.unwrap();
    soon(no_journal.times(2)).await;
    let refusal =
        refused(saver.cancel_operation(cancel(&name)).await, Code::FailedPrecondition, "PAST_NO_RETURN");
    assert!(refusal.message.contains(&name), "{refusal}");
    saver.resume(resume(&name)).await.expect("said again while it has its effect");
    let leased = device(&saver, "n0").await;
    assert_eq!(leased.operation, name, "it stays leased until its end is on record");
    assert_eq!(bench.device.state(), State::Running);
    drop(no_journal);
    let ended = done(&saver, &name).await;
    assert_eq!(ended.result(), v1::OperationResult::Succeeded, "{ended:?}");

    // One that is undone: it hears a second Cancel, and no Cutover.
    let mut no_journal = failing(&config, "ENDED", 0);
    let manual = v1::StartSaveRequest {
        cutover: v1::CutoverMode::Manual.into(),
        pre_copy: v1::PreCopyMode::Never.into(),
        ..save_of(&["n0"])
    };
    let name = start_save(&saver, manual).await;
    let TakeState { manifest, mut taker, .. } =
        TakeState::open(&saver, &name.parse().unwrap()).await.unwrap();
    reached(&saver, &name, v1::OperationPhase::WaitingForCutover).await;
    saver.cancel_operation(cancel(&name)).await.unwrap();
    soon(no_journal.times(1)).await;
    refused(saver.cutover(cutover(&name)).await, Code::FailedPrecondition, "OPERATION_UNDONE");
    saver.cancel_operation(cancel(&name)).await.expect("said again");
    drop(no_journal);
    let ended = done(&saver, &name).await;
    assert_eq!((ended.result(), failure(&ended)), (v1::OperationResult::Cancelled, "CANCELLED"), "{ended:?}");
    assert!(soon(taker.next()).await.is_err(), "there is no checkpoint of {manifest:?}");
    refused(saver.cutover(cutover(&name)).await, Code::FailedPrecondition, "OPERATION_OVER");
    // And the device is free.
    let name = start_save(&saver, save_of(&["n0"])).await;
    let TakeState { manifest, mut taker, .. } =
        TakeState::open(&saver, &name.parse().unwrap()).await.unwrap();
    drain(manifest, &mut taker).await;
    soon(taker.complete()).await.unwrap();
    done(&saver, &name).await;
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_that_an_agent_did_not_live_to_record_is_told_as_unknown() {
    let (lab, config, bench) = one();
    let node = Node::start(&config).await;
    let admin = at_once(lab.client(node.agent(), "admin").await);
    // The announcement is recorded; what came of it is not.
    let mut no_journal = failing(&config, "devices", 1);
    let request = reset(v1::ResetMode::DiscardState, 1);
    let resetting = {
        let (admin, request) = (admin.clone(), request.clone());
        tokio::spawn(async move { admin.reset_device(request).await })
    };
    soon(no_journal.times(1)).await;
    assert_eq!(bench.device.resets(), 1);
    drop(admin);
    node.crash().await;
    assert!(soon(resetting).await.unwrap().is_err(), "nobody answers any more");
    drop(no_journal);

    let node = Node::start(&config).await;
    let admin = lab.client(node.agent(), "admin").await;
    let resets = bench.device.resets();
    let again = admin.reset_device(request.clone()).await;
    let refusal = refused(again, Code::FailedPrecondition, "RESET_UNKNOWN");
    assert!(refusal.message.contains("look at the device"), "{refusal}");
    let other = reset(v1::ResetMode::KeepState, 1);
    refused(admin.reset_device(other).await, Code::AlreadyExists, "REQUEST_ID_REUSED");
    assert_eq!(bench.device.resets(), resets, "it is not reset once more");
    assert_eq!(device(&admin, "n0").await.state(), v1::MigrationState::Running);
    assert!(admin.reset_device(reset(v1::ResetMode::DiscardState, 2)).await.unwrap().state_lost);
    drop(admin);
    node.stop().await;
}

/// A file system of its own that a test can fill, where the test may mount one.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: &Path) -> Option<Self> {
        std::fs::create_dir_all(at).unwrap();
        let mut mount = Command::new("mount");
        let mount = mount.args(["-t", "tmpfs", "-o", "size=4m", "tmpfs"]).arg(at).stderr(Stdio::null());
        mount.status().is_ok_and(|status| status.success()).then(|| Self(at.to_owned()))
    }

    /// Takes the last byte.
    fn fill(&self) {
        let mut filler = OpenOptions::new().append(true).create(true).open(self.0.join("filler")).unwrap();
        while filler.write_all(&[1; 4096]).is_ok() {}
        assert_eq!(filler.write_all(&[1]).unwrap_err().kind(), ErrorKind::StorageFull);
    }

    fn free(&self) {
        std::fs::remove_file(self.0.join("filler")).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: the agent of a test that failed may have the journal still.
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

/// Waits until the agent says so of itself.
async fn is_told(health: &mut HealthClient<Channel>, wanted: ServingStatus) {
    let request = HealthCheckRequest { service: String::new() };
    let mut told = health.watch(request).await.unwrap().into_inner();
    while soon(told.message()).await.unwrap().unwrap().status() != wanted {}
}

/// The disk is full for a while. As root it is a real one; else the journal is told that it is.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_whose_disk_was_full_works_again_without_a_restart() {
    let (lab, mut config, bench) = one();
    config.server.health_listen = Some("127.0.0.1:0".parse().unwrap());
    let disk = SmallDisk::mount(&config.node.state_dir);
    let agent = start(config.clone()).await;
    let saver = at_once(lab.client(&agent, "saver").await);
    let health = Channel::from_shared(format!("http://{}", agent.health_address().unwrap())).unwrap();
    let mut health = HealthClient::new(health.connect().await.unwrap());
    is_told(&mut health, ServingStatus::Serving).await;
    let digests = save(&saver, &["n0"]).await.digests();

    for round in 0..2 {
        let told = disk.is_none().then(|| [failing(&config, "ADMITTED", 0), failing(&config, "devices", 0)]);
        // What the file has room for in itself is taken up by the first ones.
        let refusal = loop {
            if let Some(disk) = &disk {
                disk.fill();
            }
            match saver.start_save(save_of(&["n0"])).await {
                Ok(started) => {
                    let name = started.operation.unwrap().name;
                    saver.cancel_operation(cancel(&name)).await.unwrap();
                }
                Err(_) => {
                    break refused(
                        saver.start_save(save_of(&["n0"])).await,
                        Code::Unavailable,
                        "JOURNAL_FAILED",
                    );
                }
            }
        };
        assert!(refusal.message.contains("nothing was done"), "{round}: {refusal}");
        is_told(&mut health, ServingStatus::NotServing).await;
        assert_eq!((bench.device.state(), bench.device.resets()), (State::Running, 0), "{round}");
        drop(told);
        if let Some(disk) = &disk {
            disk.free();
        }
        // Nobody calls it meanwhile.
        is_told(&mut health, ServingStatus::Serving).await;
        soon(async { while !device(&saver, "n0").await.operation.is_empty() {} }).await;
        assert_eq!(save(&saver, &["n0"]).await.digests(), digests, "{round}");
    }
    agent.stop().await.unwrap();
}
