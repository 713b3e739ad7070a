//! A device in a process of its own: `vfio-user-device` in front of a kernel device, and the agent behind its socket.

use std::process::Command;

use vfio_checkpoint_fsm::State::{Resuming, Stop};
use vfio_checkpoint_proto::v1;

use super::killed::{failed_by_the_restart, killed_while_loading, killed_while_sealing, save};
use super::lab::{Lab, Program, text};
use super::transfer::{program, programmed, registers, sets_are_saved_and_restored};
use crate::facts::Facts;
use crate::kmsg::KernelLog;
use crate::variant::Parameters;

/// Serves a kernel device on a socket of the lab: the process, and the address for an agent.
fn serve(lab: &Lab, name: &str, uuid: &str) -> (Program, String) {
    let socket = lab.path(name);
    let mut command = Command::new("/bin/vfio-user-device");
    command.args(["--socket", text(&socket), "--device", uuid]);
    let (process, ()) =
        Program::start("device process", command, |line| line.contains("listening on").then_some(()));
    (process, format!("vfio-user:{}", text(&socket)))
}

pub(super) fn save_and_restore(facts: &Facts) {
    let (source, destination) = (facts.mtty1[0].as_str(), facts.mtty1[1].as_str());
    let before = program(source, 1, 71);
    assert_ne!(program(destination, 1, 72), before);
    let lab = Lab::new();
    let (source_process, source_address) = serve(&lab, "source.sock", source);
    let (destination_process, destination_address) = serve(&lab, "destination.sock", destination);
    let slots =
        [("source", source_address.as_str(), None), ("destination", destination_address.as_str(), None)];
    let agent = lab.agent(&slots, "");
    assert_eq!(lab.device(&agent, "source").backend(), v1::Backend::VfioUser);
    for mode in ["never", "required"] {
        let folder = lab.path(&format!("checkpoint-{mode}"));
        let saved = lab.succeed(&agent, &["save", "source", "--output", text(&folder), "--pre-copy", mode]);
        assert_eq!(saved["devices"][0]["length_bytes"], 60, "{saved}");
        lab.succeed(&agent, &["restore", "destination", "--input", text(&folder), "--allow-fork"]);
    }
    agent.stop();
    source_process.stop();
    destination_process.stop();
    // The reset of mtty itself, unlike its variant's, leaves registers alone.
    assert_eq!((registers(source, 1), registers(destination, 1)), (before.clone(), before));
    println!(
        "figures: agent: vfio-user: 2 saves and 2 restores of a device in another process, registers equal"
    );
}

/// The barrier is the agent's, and each process is told by itself.
pub(super) fn set_of_two(facts: &Facts) {
    let uuids: Vec<&str> = facts.mtty1.iter().map(String::as_str).collect();
    // Before the processes have them.
    let before = programmed(&uuids);
    let lab = Lab::new();
    let names = ["a", "b", "c", "d"];
    let served: Vec<(Program, String)> =
        names.iter().zip(&uuids).map(|(name, uuid)| serve(&lab, &format!("{name}.sock"), uuid)).collect();
    let slots: Vec<_> =
        names.iter().zip(&served).map(|(name, (_, address))| (*name, address.as_str(), None)).collect();
    sets_are_saved_and_restored(&lab, &slots, &uuids);
    drop(slots);
    for (process, _) in served {
        process.stop();
    }
    assert_eq!([registers(uuids[2], 1), registers(uuids[3], 1)], before);
    println!("figures: agent: vfio-user: 2 sets of two saved and one restored, with the barrier");
}

/// The process resets its device when it loses its client, which it does not while a holder keeps the connection.
pub(super) fn killed_in_a_save(facts: &Facts) {
    let uuid = facts.mttyv1[0].as_str();
    for with_holder in [true, false] {
        let _parameters = Parameters::new();
        program(uuid, 1, 73);
        let mut lab = Lab::new();
        let (process, address) = serve(&lab, "device.sock", uuid);
        let holder = with_holder.then(|| lab.holder());
        let slots = [("nic", address.as_str(), None)];
        let agent = lab.agent(&slots, "");
        let (operation, before) =
            lab.with_client(&agent, async |client| killed_while_sealing(&client, "nic", &agent).await);

        let agent = lab.agent(&slots, "");
        let ended = lab.done(&agent, &operation);
        assert_eq!(ended.failure.as_ref().map(|failure| failure.reason.as_str()), Some("AGENT_RESTARTED"));
        let after = lab.with_client(&agent, async |client| save(&client, "nic").await);
        if with_holder {
            assert_eq!(ended.outcome(), v1::StateOutcome::Preserved, "{ended:?}");
            assert_eq!(after.state, before.state);
        } else {
            assert_eq!(ended.outcome(), v1::StateOutcome::StateLost, "{ended:?}");
            assert_ne!(after.state, before.state);
        }
        agent.stop();
        holder.into_iter().for_each(Program::stop);
        process.stop();
    }
    println!("figures: agent: vfio-user: killed in a save: its state kept by the holder, lost without");
}

/// Half of a state is no state: the device is reset, with a holder by the agent that gets the connection, and without one
/// by the process that has lost its client.
pub(super) fn killed_in_a_restore(facts: &Facts) {
    let (source, destination) = (facts.mttyv1[0].as_str(), facts.mttyv1[1].as_str());
    for with_holder in [true, false] {
        let _parameters = Parameters::new();
        assert_ne!(program(source, 1, 74), program(destination, 1, 75));
        let mut lab = Lab::new();
        let (source_process, source_address) = serve(&lab, "source.sock", source);
        let (process, address) = serve(&lab, "nic.sock", destination);
        let holder = with_holder.then(|| lab.holder());
        let slots = [("source", source_address.as_str(), None), ("nic", address.as_str(), None)];
        let agent = lab.agent(&slots, "");
        let mut log = KernelLog::new();
        let (operation, given, before) = lab.with_client(&agent, async |client| {
            let (given, before) = (save(&client, "source").await, save(&client, "nic").await);
            (killed_while_loading(&client, &given, "nic", &agent).await, given, before)
        });
        assert!(log.hops(destination).contains(&(Stop, Resuming)), "it was loading when the agent died");

        let agent = lab.agent(&slots, "");
        failed_by_the_restart(&lab.done(&agent, &operation), v1::StateOutcome::StateLost);
        let device = lab.device(&agent, "nic");
        assert_eq!(device.state(), v1::MigrationState::Running, "{device:?}");
        assert_eq!(device.standing(), v1::DeviceStanding::Ready, "{device:?}");
        let (after, reset) = lab.with_client(&agent, async |client| {
            let after = save(&client, "nic").await;
            let discard = v1::ResetDeviceRequest {
                name: "devices/nic".to_owned(),
                mode: v1::ResetMode::DiscardState.into(),
                ..v1::ResetDeviceRequest::default()
            };
            assert!(client.reset_device(discard).await.expect("a reset").state_lost);
            (after, save(&client, "nic").await)
        });
        assert_eq!(after.state, reset.state, "as after any reset");
        assert!(after.state != given.state && after.state != before.state, "with a holder: {with_holder}");
        agent.stop();
        holder.into_iter().for_each(Program::stop);
        process.stop();
        source_process.stop();
    }
    println!("figures: agent: vfio-user: killed in a restore: reset, STATE_LOST, with a holder and without");
}
