//! Holders: what each kind of descriptor proves, and what is said where nothing can be proved.

use std::os::unix::fs::PermissionsExt;

use super::*;

#[test]
fn holders_are_seen_through_every_kind_of_descriptor() {
    let tree = Tree::new();
    tree.pci(VF, "15b3:101e").driver("mlx5_vfio_pci").physfn("0000:03:00.0").group(12).cdev("vfio0");
    tree.pci("0000:03:00.2", "15b3:101e").driver("mlx5_core").physfn("0000:03:00.0").group(13);
    let syspath = "vfio-device-syspath: /sys/devices/pci0000:00/0000:00:01.0/0000:03:00.1";
    tree.process(10, "qemu-system-x86", &[("/dev/null", ""), ("/dev/vfio/vfio", ""), ("/dev/vfio/12", "")]);
    tree.process(
        11,
        "vfio-checkpoint",
        &[("/dev/vfio/devices/vfio0 (deleted)", ""), ("anon_inode:[vfio-device]", syspath)],
    );
    tree.process(12, "evil\u{1b}[2J", &[("anon_inode:[vfio-device]", "ino:\t1")]);
    tree.process(
        13,
        "other",
        &[("/dev/vfio/13", ""), ("/dev/vfio/devices/vfio1", ""), ("/tmp/dev/vfio/12", "")],
    );
    let held = named(&tree, VF);
    let seen: Vec<(u32, &[Evidence])> = held
        .holders
        .processes
        .iter()
        .map(|holder| (holder.process.pid, holder.evidence.as_slice()))
        .collect();
    assert_eq!(seen, [(10, &[Evidence::Group][..]), (11, &[Evidence::Cdev, Evidence::Fdinfo][..])]);
    assert_eq!(
        held.holders.coverage,
        Coverage::Partial {
            unreadable_processes: 0,
            unattributed: vec![Process { pid: 12, comm: Some("evil?[2J".into()) }],
            truncated: false
        }
    );
    assert_eq!(
        blockers(&held),
        [
            "no node in /dev/vfio leads to the device; is /dev the host's own, with devtmpfs?",
            "held open by qemu-system-x86 (pid 10), vfio-checkpoint (pid 11)"
        ]
    );
    // What VFIO does not serve cannot be behind a descriptor of unknown origin.
    assert_eq!(named(&tree, "0000:03:00.2").holders.coverage, Coverage::Complete);
}

#[test]
fn a_process_that_has_a_group_accounts_for_its_devices() {
    let tree = Tree::new();
    tree.mtty(MTTY, 7);
    tree.process(10, "vmm", &[("/dev/vfio/12", ""), ("anon_inode:[vfio-device]", "")]);
    assert_eq!(only(&tree).holders, Holders { processes: vec![], coverage: Coverage::Complete });
}

#[test]
fn this_process_is_listed_and_is_no_blocker() {
    let tree = Tree::new();
    tree.mtty(MTTY, 7);
    tree.node("vfio/7");
    tree.process(std::process::id(), "agent", &[("/dev/vfio/7", "")]);
    let device = only(&tree);
    assert_eq!(device.holders.processes.len(), 1);
    assert_eq!(blockers(&device), [""; 0]);
}

#[test]
fn what_proc_does_not_show_is_said() {
    let tree = Tree::new();
    tree.mtty(MTTY, 7);
    // Exits between the listing and the look: the folder has no fd.
    fs::create_dir_all(tree.path("proc/77")).unwrap();
    assert_eq!(only(&tree).holders.coverage, Coverage::Complete);
    // `fd` that cannot be listed, for whoever runs this: it is no folder.
    fs::create_dir_all(tree.path("proc/78")).unwrap();
    fs::write(tree.path("proc/78/fd"), "").unwrap();
    let Coverage::Partial { unreadable_processes: 1, .. } = only(&tree).holders.coverage else { panic!() };
    fs::remove_dir_all(tree.path("proc")).unwrap();
    let Coverage::Unavailable { .. } = only(&tree).holders.coverage else { panic!() };
}

#[test]
fn a_process_that_may_not_be_looked_at_is_counted() {
    let tree = Tree::new();
    tree.mtty(MTTY, 7);
    tree.process(10, "secret", &[("/dev/vfio/7", "")]);
    let fd = tree.path("proc/10/fd");
    fs::set_permissions(&fd, fs::Permissions::from_mode(0o000)).unwrap();
    let holders = only(&tree).holders;
    let readable = fs::read_dir(&fd).is_ok();
    fs::set_permissions(&fd, fs::Permissions::from_mode(0o700)).unwrap();
    // Root may look at everything.
    let expected = if readable { (1, true) } else { (0, false) };
    assert_eq!((holders.processes.len(), holders.coverage == Coverage::Complete), expected);
}
