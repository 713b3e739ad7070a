//! The main job with the `vfio-device` binary, as a person does it on a real device.

use std::process::{Command, Output};

use vfio_checkpoint_device::kernel::KernelPath;

use crate::Test;
use crate::facts::Facts;
use crate::save_restore::open;
use crate::uart;

pub(crate) const TESTS: &[Test] = &[
    ("by_hand::save_to_a_file_and_restore_from_it", save_and_restore),
    ("by_hand::what_cannot_work_is_said_and_nothing_is_touched", blocked),
];

const BINARY: &str = "/bin/vfio-device";

/// The binary's exit code, standard output and standard error.
pub(crate) fn run(arguments: &[&str]) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } =
        Command::new(BINARY).args(arguments).output().expect("vfio-device runs");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
    (status.code(), text(stdout), text(stderr))
}

fn succeed(arguments: &[&str]) -> String {
    let (code, stdout, stderr) = run(arguments);
    assert_eq!(code, Some(0), "vfio-device {arguments:?}: {stderr}");
    stdout
}

/// mtty keeps its state over a close, so the registers can be set before and looked at after.
fn save_and_restore(facts: &Facts) {
    for (via, seed) in [("container", 31), ("iommufd", 32)] {
        let (source, destination) = (&facts.mtty2[0], &facts.mtty2[1]);
        let before = {
            let device = open(source, KernelPath::Iommufd);
            uart::program(&device, 2, seed);
            uart::registers(&device, 2)
        };
        let list = succeed(&["list"]);
        assert!(list.contains(source.as_str()) && list.contains("CANDIDATE"), "{list}");
        let saved =
            succeed(&["save", source, "mtty.state", "--pre-copy", "--replace", "--via", via, "-o", "json"]);
        assert!(saved.contains("\"bytes\": 96"), "{saved}");
        let restored = succeed(&["restore", destination, "mtty.state", "--via", via]);
        assert!(restored.contains("verified"), "{restored}");
        let after = uart::registers(&open(destination, KernelPath::Iommufd), 2);
        assert_eq!(after, before, "{via}");
    }
}

fn blocked(facts: &Facts) {
    succeed(&["save", &facts.mtty1[0], "one-port.state"]);
    let mut damaged = std::fs::read("one-port.state").expect("a state file");
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    std::fs::write("damaged.state", damaged).expect("a damaged state file");

    let holder = open(&facts.mtty1[1], KernelPath::Container);
    let cases: [(&[&str], &str); 6] = [
        (&["save", &facts.e1000e, "x"], "not migratable"),
        (&["save", &facts.nonviable, "x"], "not viable"),
        (&["save", &facts.mtty1[1], "x"], "in use"),
        (&["restore", &facts.mtty2[0], "one-port.state"], "does not fit this device"),
        (&["restore", &facts.mtty1[0], "damaged.state"], "damaged"),
        (&["save", &facts.mtty1[0], "one-port.state"], "exists already"),
    ];
    for (arguments, expected) in cases {
        let (code, stdout, stderr) = run(arguments);
        assert_eq!((code, stdout.as_str()), (Some(3), ""), "{arguments:?}: {stderr}");
        assert!(stderr.contains(expected), "{arguments:?}: {stderr}");
    }
    drop(holder);
}
