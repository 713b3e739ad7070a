//! State goes to a folder and comes back into another device, by `vfioctl` and the agent.

use vfio_checkpoint_device::kernel::KernelPath;
use vfio_checkpoint_fsm::State::{self, PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy};

use super::lab::{Lab, Slot, text};
use crate::facts::Facts;
use crate::kmsg::KernelLog;
use crate::save_restore::open;
use crate::uart::{self, Registers};

/// Resets a device and puts registers of this seed into it; then it is free for the agent.
pub(super) fn program(uuid: &str, ports: u8, seed: u8) -> Registers {
    use vfio_checkpoint_device::MigrationDevice as _;
    let mut device = open(uuid, KernelPath::Container);
    device.reset().expect("a reset");
    uart::program(&device, ports, seed);
    uart::registers(&device, ports)
}

/// The registers of a device that nobody has open.
pub(super) fn registers(uuid: &str, ports: u8) -> Registers {
    use vfio_checkpoint_device::MigrationDevice as _;
    let mut device = open(uuid, KernelPath::Container);
    assert_eq!(device.state().expect("a state"), Running);
    uart::registers(&device, ports)
}

/// By stop-copy onto one device and by pre-copy onto another, and the source runs on with its state.
pub(super) fn save_and_restore(facts: &Facts, path: KernelPath) {
    let (source, by_stop_copy, by_pre_copy) = (&facts.mtty1[0], &facts.mtty1[1], &facts.mtty1[2]);
    let before = program(source, 1, 41);
    for (uuid, seed) in [(by_stop_copy, 42), (by_pre_copy, 43)] {
        assert_ne!(program(uuid, 1, seed), before);
    }
    let lab = Lab::new();
    let slots = [
        ("source", source.as_str(), Some(path)),
        ("stop-copy", by_stop_copy.as_str(), Some(path)),
        ("pre-copy", by_pre_copy.as_str(), Some(path)),
    ];
    let agent = lab.agent(&slots, "");
    let files = agent.files();
    let (by, not_by) = match path {
        KernelPath::Container => ("/dev/vfio/vfio", "/dev/iommu"),
        KernelPath::Iommufd => ("/dev/iommu", "/dev/vfio/vfio"),
    };
    assert!(files.iter().any(|file| file == by) && !files.iter().any(|file| file == not_by), "{files:?}");

    let devices = lab.succeed(&agent, &["devices", "list"]);
    let of = |name: &str, key: &str| {
        let name = format!("devices/{name}");
        let all = devices.as_array().expect("a list").iter();
        all.filter(|device| device["name"] == name.as_str())
            .map(|device| device[key].clone())
            .next()
            .expect("a device")
    };
    assert_eq!((of("source", "state"), of("source", "driver")), ("RUNNING".into(), "mtty".into()));
    assert_eq!((of("source", "standing"), of("source", "address")), ("READY".into(), source.as_str().into()));
    assert_eq!(of("source", "data_size")["bytes"], 60);

    let mut log = KernelLog::new();
    let mut digests = Vec::new();
    for (name, mode, destination) in
        [("stop-copy", "never", by_stop_copy), ("pre-copy", "required", by_pre_copy)]
    {
        let folder = lab.path(&format!("checkpoint-{name}"));
        let saved = lab.succeed(&agent, &["save", "source", "--output", text(&folder), "--pre-copy", mode]);
        assert_eq!((&saved["result"], &saved["consistency"]), (&"SUCCEEDED".into(), &"CONSISTENT".into()));
        assert_eq!(saved["devices"][0]["length_bytes"], 60, "{saved}");
        digests.push(saved["devices"][0]["blake3"].clone());
        let into = if mode == "never" {
            [(Running, RunningP2p), (RunningP2p, Stop), (Stop, StopCopy)]
        } else {
            [(Running, PreCopy), (PreCopy, PreCopyP2p), (PreCopyP2p, StopCopy)]
        };
        let hops = [&into[..], &[(StopCopy, Stop), (Stop, RunningP2p), (RunningP2p, Running)]].concat();
        assert_eq!(log.hops(source), hops, "{name}: what the kernel saw of the save");
        let restored = lab.succeed(&agent, &["restore", name, "--input", text(&folder), "--allow-fork"]);
        assert_eq!(restored["result"], "SUCCEEDED", "{restored}");
        let seen = log.hops(destination);
        assert_eq!(
            seen,
            [
                (Running, RunningP2p),
                (RunningP2p, Stop),
                (Stop, Resuming),
                (Resuming, Stop),
                (Stop, RunningP2p),
                (RunningP2p, Running),
            ],
            "{name}: what the kernel saw of the restore"
        );
    }
    assert_eq!(digests[0], digests[1], "the same registers are the same state, whichever way it is read");
    agent.stop();
    for uuid in [source, by_stop_copy, by_pre_copy] {
        assert_eq!(registers(uuid, 1), before, "{uuid}");
    }
    println!(
        "figures: agent: {path}: 2 saves to a folder and 2 restores by vfioctl over TLS, registers equal"
    );
}

pub(super) fn set_of_two(facts: &Facts) {
    let uuids: Vec<&str> = facts.mtty1.iter().map(String::as_str).collect();
    // One set over both kinds of path: the barrier is the agent's, not the kernel's.
    let paths = [KernelPath::Container, KernelPath::Iommufd];
    let slots: Vec<_> = ["a", "b", "c", "d"]
        .into_iter()
        .zip(&uuids)
        .zip(paths.iter().cycle())
        .map(|((name, uuid), path)| (name, *uuid, Some(*path)))
        .collect();
    let before = programmed(&uuids);
    sets_are_saved_and_restored(&Lab::new(), &slots, &uuids);
    assert_eq!([registers(uuids[2], 1), registers(uuids[3], 1)], before);
    println!(
        "figures: agent: 2 sets of two saved and one restored, the barrier seen in the kernel's log both ways"
    );
}

/// Gives the first two of four devices registers of their own, and the others some that are to go.
pub(super) fn programmed(uuids: &[&str]) -> [Registers; 2] {
    for uuid in &uuids[2..4] {
        program(uuid, 1, 99);
    }
    [program(uuids[0], 1, 51), program(uuids[1], 1, 52)]
}

/// All devices of a set are quiesced before any stops, and all are out of STOP before any runs: of the first two of these
/// devices, `a` to `d`, and of the others.
pub(super) fn sets_are_saved_and_restored(lab: &Lab, slots: &[Slot<'_>], uuids: &[&str]) {
    let agent = lab.agent(slots, "");
    let mut log = KernelLog::new();
    let folder = lab.path("checkpoint");
    for mode in ["never", "required"] {
        lab.succeed(&agent, &["save", "a", "b", "--output", text(&folder), "--replace", "--pre-copy", mode]);
        let hops = log.hops_of_all(&uuids[..2]);
        let quiesced = if mode == "never" { RunningP2p } else { PreCopyP2p };
        barrier(
            &hops,
            |from, to| (from, to) == (if mode == "never" { Running } else { PreCopy }, quiesced),
            |from, _| from == quiesced,
        );
        barrier(
            &hops,
            |from, to| (from, to) == (Stop, RunningP2p),
            |from, to| (from, to) == (RunningP2p, Running),
        );
    }
    lab.succeed(&agent, &["restore", "c", "d", "--input", text(&folder), "--allow-fork"]);
    let hops = log.hops_of_all(&uuids[2..4]);
    barrier(
        &hops,
        |from, to| (from, to) == (Stop, RunningP2p),
        |from, to| (from, to) == (RunningP2p, Running),
    );
    agent.stop();
}

/// Every device has made a hop of the first kind before any makes one of the second after it.
fn barrier(
    hops: &[(usize, State, State)],
    into: impl Fn(State, State) -> bool,
    out: impl Fn(State, State) -> bool,
) {
    let first_in = |device| hops.iter().position(|&(who, from, to)| who == device && into(from, to));
    let all_in = [0, 1].map(|device| first_in(device).unwrap_or_else(|| panic!("{device} never: {hops:?}")));
    let last_in = all_in[0].max(all_in[1]);
    let earliest_in = all_in[0].min(all_in[1]);
    let first_out = hops
        .iter()
        .enumerate()
        .position(|(place, &(_, from, to))| place > earliest_in && out(from, to))
        .unwrap_or_else(|| panic!("none goes on: {hops:?}"));
    assert!(last_in < first_out, "{hops:?}");
}
