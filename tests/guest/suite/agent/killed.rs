//! SIGKILL of the agent in the middle of its work.
//!
//! The variant is told to reset on the last close, as vfio-pci does, so that the state in a device is worth as much as the
//! process that keeps it open: each case runs with a holder, and where that is the point again without one, which has to
//! lose the state. An agent is killed while its peer stands still, at a place that the kernel's log confirms.

use bytes::Bytes;
use vfio_checkpoint_client::call::Client;
use vfio_checkpoint_client::transfer::{Accepted, GiveState, TakeState, Taker};
use vfio_checkpoint_device::Seal;
use vfio_checkpoint_device::kernel::KernelPath::{self, Container, Iommufd};
use vfio_checkpoint_fsm::State::{self, PreCopy, Resuming, Running, RunningP2p, Stop, StopCopy};
use vfio_checkpoint_proto::domain::{ConfigSpaceCapture, Manifest};
use vfio_checkpoint_proto::v1;

use super::lab::{Agent, Lab, PATIENCE, Program, done, save_request, until};
use super::transfer::{program, registers};
use crate::facts::Facts;
use crate::kmsg::KernelLog;
use crate::uart::Registers;
use crate::variant::Parameters;

/// The registers of a variant that was reset and not used since.
pub(super) fn power_on(uuid: &str) -> Registers {
    use vfio_checkpoint_device::MigrationDevice as _;
    let mut device = crate::save_restore::open(uuid, Container);
    device.reset().expect("a reset");
    crate::uart::registers(&device, 1)
}

/// What a taker was given of one device.
pub(super) struct Taken {
    pub(super) manifest: Manifest,
    pub(super) state: Vec<u8>,
    seal: Seal,
    config: Option<ConfigSpaceCapture>,
}

/// Starts a save of one device and opens its stream.
async fn begin(client: &Client, request: v1::StartSaveRequest) -> (String, Manifest, Taker) {
    let started = client.start_save(request).await.expect("a save");
    let operation = started.operation.expect("an operation").name;
    let name = operation.parse().expect("a name");
    let TakeState { manifest, taker, .. } = TakeState::open(client, &name).await.expect("a stream");
    (operation, manifest, taker)
}

/// Takes all there is. The agent then waits to hear that it is durable, and does not hear it here.
async fn take(manifest: Manifest, stream: &mut Taker) -> Taken {
    let (mut state, mut sealed) = (Vec::new(), None);
    while let Some(accepted) = stream.next().await.expect("more of the stream") {
        match accepted {
            Accepted::Chunk { chunk, .. } => state.extend_from_slice(chunk.bytes()),
            Accepted::Sealed { seal, config, .. } => sealed = Some((seal.seal(), config)),
            Accepted::Progress(_) => {}
        }
    }
    let (seal, config) = sealed.expect("a seal");
    Taken { manifest, state, seal, config }
}

/// A whole save of one device.
pub(super) async fn save(client: &Client, device: &str) -> Taken {
    save_as(client, save_request(&[device])).await
}

/// The same, as the request says.
pub(super) async fn save_as(client: &Client, request: v1::StartSaveRequest) -> Taken {
    let (operation, manifest, mut stream) = begin(client, request).await;
    let taken = take(manifest, &mut stream).await;
    stream.complete().await.expect("the agent hears of it");
    let saved = done(client, &operation).await;
    assert_eq!(saved.result(), v1::OperationResult::Succeeded, "{saved:?}");
    taken
}

/// Saves a device as far as `SEALING`: stopped, all of its state out, and its taker silent. Then the agent is killed.
pub(super) async fn killed_while_sealing(client: &Client, device: &str, agent: &Agent) -> (String, Taken) {
    let (operation, manifest, mut stream) = begin(client, save_request(&[device])).await;
    let taken = take(manifest, &mut stream).await;
    until(client, &operation, |now| now.phase() == v1::OperationPhase::Sealing).await;
    agent.kill();
    (operation, taken)
}

/// Lets go of everything without a reset by the close, and looks at what the devices have.
fn end(parameters: &Parameters, agent: Agent, holder: Option<Program>, uuids: &[&str]) -> Vec<Registers> {
    parameters.set("reset_on_close", "0");
    agent.stop();
    holder.into_iter().for_each(Program::stop);
    uuids.iter().map(|uuid| registers(uuid, 1)).collect()
}

pub(super) fn failed_by_the_restart(operation: &v1::Operation, outcome: v1::StateOutcome) {
    assert_eq!(operation.result(), v1::OperationResult::Failed, "{operation:?}");
    assert_eq!(operation.outcome(), outcome, "{operation:?}");
    let failure = operation.failure.as_ref().expect("a failure");
    assert_eq!(failure.reason, "AGENT_RESTARTED", "{operation:?}");
}

/// In the middle of a save the state of a held device is that of a source: it comes back with it.
pub(super) fn in_a_save(facts: &Facts, path: KernelPath) {
    let uuid = facts.mttyv1[0].as_str();
    for with_holder in [true, false] {
        let parameters = Parameters::new();
        let blank = power_on(uuid);
        let before = program(uuid, 1, 61);
        assert_ne!(before, blank);
        parameters.reset_on_close();
        let mut lab = Lab::new();
        let holder = with_holder.then(|| lab.holder());
        let slots = [("nic", uuid, Some(path))];
        // The device was opened by nobody since its registers were set but the next agent.
        let agent = lab.agent(&slots, "");
        let mut log = KernelLog::new();
        let (operation, _) =
            lab.with_client(&agent, async |client| killed_while_sealing(&client, "nic", &agent).await);
        assert_eq!(log.hops(uuid).last(), Some(&(StopCopy, Stop)), "it was stopped when the agent died");

        let agent = lab.agent(&slots, "");
        let ended = lab.done(&agent, &operation);
        let device = lab.device(&agent, "nic");
        assert_eq!(device.state(), v1::MigrationState::Running, "{device:?}");
        assert_eq!(device.standing(), v1::DeviceStanding::Ready, "{device:?}");
        let hops = log.hops(uuid);
        if with_holder {
            failed_by_the_restart(&ended, v1::StateOutcome::Preserved);
            assert_eq!(hops, [(Stop, RunningP2p), (RunningP2p, Running)], "brought back without a reset");
        } else {
            failed_by_the_restart(&ended, v1::StateOutcome::StateLost);
            assert_eq!(hops, [], "there was nothing to bring back");
        }
        let after = end(&parameters, agent, holder, &[uuid]).remove(0);
        assert_eq!(after, if with_holder { before } else { blank }, "with a holder: {with_holder}");
    }
    println!(
        "figures: agent: {path}: killed in a save: RUNNING with its registers by the holder, lost without"
    );
}

/// The same while the device still runs, its state being read.
pub(super) fn in_pre_copy(facts: &Facts) {
    let uuid = facts.mttyv1[0].as_str();
    for path in [Container, Iommufd] {
        let parameters = Parameters::new();
        let before = program(uuid, 1, 62);
        parameters.reset_on_close();
        let mut lab = Lab::new();
        let holder = lab.holder();
        let slots = [("nic", uuid, Some(path))];
        let agent = lab.agent(&slots, "");
        let mut log = KernelLog::new();
        let operation = lab.with_client(&agent, async |client| {
            let request = v1::StartSaveRequest {
                pre_copy: v1::PreCopyMode::Required.into(),
                cutover: v1::CutoverMode::Manual.into(),
                ..save_request(&["nic"])
            };
            let (operation, _, mut stream) = begin(&client, request).await;
            // mtty pre-copies its header, and then has no more until somebody says Cutover.
            let header = async {
                loop {
                    let Some(accepted) = stream.next().await.expect("more of the stream") else { break };
                    match accepted {
                        Accepted::Chunk { .. } => break,
                        Accepted::Sealed { .. } => panic!("nobody said Cutover"),
                        Accepted::Progress(_) => {}
                    }
                }
            };
            tokio::time::timeout(PATIENCE, header).await.expect("the header");
            agent.kill();
            operation
        });
        assert_eq!(log.hops(uuid), [(Running, PreCopy)], "its state was being read when the agent died");

        let agent = lab.agent(&slots, "");
        failed_by_the_restart(&lab.done(&agent, &operation), v1::StateOutcome::Preserved);
        assert_eq!(log.hops(uuid), [(PreCopy, Running)]);
        // It is good for another one.
        lab.with_client(&agent, async |client| save(&client, "nic").await);
        assert_eq!(end(&parameters, agent, Some(holder), &[uuid]), [before]);
    }
    println!("figures: agent: killed in pre-copy on both paths: RUNNING with its registers");
}

/// A request for a restore of what was taken.
fn restore_request(device: &str, taken: &Taken, after: v1::AfterRestore) -> v1::RestoreRequest {
    v1::RestoreRequest {
        devices: vec![format!("devices/{device}")],
        manifest: Some(taken.manifest.clone().into()),
        allow_fork: true,
        after: after.into(),
        ..v1::RestoreRequest::default()
    }
}

async fn begin_restore(client: &Client, request: v1::RestoreRequest) -> (String, GiveState) {
    let operation = client.restore(request).await.expect("a restore").operation.expect("an operation").name;
    let giving = GiveState::open(client, &operation.parse().expect("a name")).await;
    (operation, giving.expect("a stream"))
}

/// Restores into a device as far as `LOADING`: a part of the state is in it, and its giver silent. Then the agent is
/// killed.
pub(super) async fn killed_while_loading(
    client: &Client,
    taken: &Taken,
    device: &str,
    agent: &Agent,
) -> String {
    let request = restore_request(device, taken, v1::AfterRestore::Run);
    let (operation, GiveState { mut giver, .. }) = begin_restore(client, request).await;
    for part in [&taken.state[..20], &taken.state[20..40]] {
        giver.chunk(0, Bytes::copy_from_slice(part)).await.expect("a part of the state");
    }
    // The second part has come when the first is known to be in the device.
    until(client, &operation, |now| now.moved_bytes >= 20).await;
    agent.kill();
    operation
}

/// Half of a state is no state: the device is reset, with a holder by the agent and without one by the kernel.
pub(super) fn in_a_restore(facts: &Facts, path: KernelPath) {
    let (source, destination) = (facts.mttyv1[0].as_str(), facts.mttyv1[1].as_str());
    for with_holder in [true, false] {
        let parameters = Parameters::new();
        let blank = power_on(destination);
        program(source, 1, 63);
        assert_ne!(program(destination, 1, 64), blank);
        parameters.reset_on_close();
        let mut lab = Lab::new();
        let holder = with_holder.then(|| lab.holder());
        let slots = [("source", source, Some(path)), ("nic", destination, Some(path))];
        let agent = lab.agent(&slots, "");
        let mut log = KernelLog::new();
        let operation = lab.with_client(&agent, async |client| {
            let taken = save(&client, "source").await;
            killed_while_loading(&client, &taken, "nic", &agent).await
        });
        assert_eq!(
            log.hops(destination).last(),
            Some(&(Stop, Resuming)),
            "it was loading when the agent died"
        );

        let agent = lab.agent(&slots, "");
        failed_by_the_restart(&lab.done(&agent, &operation), v1::StateOutcome::StateLost);
        let device = lab.device(&agent, "nic");
        assert_eq!(device.state(), v1::MigrationState::Running, "{device:?}");
        assert_eq!(device.standing(), v1::DeviceStanding::Ready, "{device:?}");
        assert_eq!(log.hops(destination), [], "a reset and no SET");
        assert_eq!(end(&parameters, agent, holder, &[destination]), [blank], "with a holder: {with_holder}");
    }
    println!("figures: agent: {path}: killed in a restore: reset, STATE_LOST, with a holder and without");
}

/// Waits until a hold is on record, and kills the agent.
async fn killed_while_held(client: &Client, operation: &str, agent: &Agent) {
    until(client, operation, |now| now.phase() == v1::OperationPhase::Held).await;
    agent.kill();
}

/// After the restart: the hold goes on, and ends when its caller says so.
fn resumed(lab: &Lab, agent: &Agent, operation: &str, state: v1::MigrationState) -> v1::Operation {
    let device = lab.device(agent, "nic");
    assert_eq!((device.state(), device.operation.as_str()), (state, operation), "{device:?}");
    lab.with_client(agent, async |client| {
        let held = until(&client, operation, |now| now.phase() == v1::OperationPhase::Held).await;
        assert!(held.deadline.is_some(), "{held:?}");
        let request = v1::ResumeRequest { operation: operation.to_owned() };
        client.resume(request).await.expect("it is held, so it can be resumed");
        done(&client, operation).await
    })
}

/// A save that was held in STOP is held still, and its device runs on with its registers on Resume.
pub(super) fn held_save(facts: &Facts, path: KernelPath) {
    let uuid = facts.mttyv1[0].as_str();
    for with_holder in [true, false] {
        let parameters = Parameters::new();
        let blank = power_on(uuid);
        let before = program(uuid, 1, 65);
        parameters.reset_on_close();
        let mut lab = Lab::new();
        let holder = with_holder.then(|| lab.holder());
        let slots = [("nic", uuid, Some(path))];
        let agent = lab.agent(&slots, "");
        let operation = lab.with_client(&agent, async |client| {
            let request =
                v1::StartSaveRequest { after: v1::AfterSave::Hold.into(), ..save_request(&["nic"]) };
            let (operation, manifest, mut stream) = begin(&client, request).await;
            take(manifest, &mut stream).await;
            stream.complete().await.expect("the agent hears of it");
            killed_while_held(&client, &operation, &agent).await;
            operation
        });

        let mut log = KernelLog::new();
        let agent = lab.agent(&slots, "");
        assert_eq!(log.hops(uuid), [], "nothing moves before somebody says so");
        let after = if with_holder {
            let ended = resumed(&lab, &agent, &operation, v1::MigrationState::Stop);
            assert_eq!(ended.result(), v1::OperationResult::Succeeded, "{ended:?}");
            assert_eq!(ended.outcome(), v1::StateOutcome::Preserved, "{ended:?}");
            assert_eq!(ended.consistency(), v1::CheckpointConsistency::Consistent, "{ended:?}");
            let hops: [(State, State); 2] = [(Stop, RunningP2p), (RunningP2p, Running)];
            assert_eq!(log.hops(uuid), hops);
            before
        } else {
            failed_by_the_restart(&lab.done(&agent, &operation), v1::StateOutcome::StateLost);
            blank
        };
        assert_eq!(end(&parameters, agent, holder, &[uuid]), [after], "with a holder: {with_holder}");
    }
    println!("figures: agent: {path}: killed in a held save: held on by the holder, STATE_LOST without");
}

/// A restore that was held loaded in RESUMING runs with the restored registers on Resume.
pub(super) fn held_restore(facts: &Facts, path: KernelPath) {
    let (source, destination) = (facts.mttyv1[0].as_str(), facts.mttyv1[1].as_str());
    for with_holder in [true, false] {
        let parameters = Parameters::new();
        let blank = power_on(destination);
        let before = program(source, 1, 66);
        assert_ne!(program(destination, 1, 67), before);
        parameters.reset_on_close();
        let mut lab = Lab::new();
        let holder = with_holder.then(|| lab.holder());
        let slots = [("source", source, Some(path)), ("nic", destination, Some(path))];
        let agent = lab.agent(&slots, "");
        let operation = lab.with_client(&agent, async |client| {
            let taken = save(&client, "source").await;
            let request = restore_request("nic", &taken, v1::AfterRestore::Hold);
            let (operation, GiveState { mut giver, .. }) = begin_restore(&client, request).await;
            giver.chunk(0, Bytes::from(taken.state)).await.expect("the state");
            giver.seal_as(0, taken.config, taken.seal).await.expect("its seal");
            giver.completed().await.expect("it is loaded and verified");
            killed_while_held(&client, &operation, &agent).await;
            operation
        });

        let mut log = KernelLog::new();
        let agent = lab.agent(&slots, "");
        assert_eq!(log.hops(destination), [], "nothing moves before somebody says so");
        let after = if with_holder {
            let ended = resumed(&lab, &agent, &operation, v1::MigrationState::Resuming);
            assert_eq!(ended.result(), v1::OperationResult::Succeeded, "{ended:?}");
            assert_eq!(ended.outcome(), v1::StateOutcome::Replaced, "{ended:?}");
            assert_eq!(log.hops(destination), [(Resuming, Stop), (Stop, RunningP2p), (RunningP2p, Running)]);
            before
        } else {
            failed_by_the_restart(&lab.done(&agent, &operation), v1::StateOutcome::StateLost);
            blank
        };
        assert_eq!(end(&parameters, agent, holder, &[destination]), [after], "with a holder: {with_holder}");
    }
    println!("figures: agent: {path}: killed in a held restore: held on by the holder, STATE_LOST without");
}
