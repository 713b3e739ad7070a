//! Discovery on fake machines: every verdict, viability, holder and kind of garbage, and one rich machine whole.

use std::fs;
use std::os::unix::fs::symlink;

use super::*;

mod held;
mod names;
mod tree;

use tree::Tree;

const VF: &str = "0000:03:00.1";
const MTTY: &str = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";

fn only(tree: &Tree) -> Discovered {
    let mut devices = discover(&tree.roots()).unwrap();
    assert_eq!(devices.len(), 1, "{devices:#?}");
    devices.remove(0)
}

fn named(tree: &Tree, name: &str) -> Discovered {
    find(&tree.roots(), name).unwrap()
}

/// Verdict and sentence.
fn told(device: &Discovered) -> String {
    device.migratable.to_string()
}

fn blockers(device: &Discovered) -> Vec<String> {
    device.blockers().iter().map(ToString::to_string).collect()
}

#[test]
fn each_driver_of_a_virtual_function_has_its_verdict() {
    let no_other = "no driver is known here that can save this device's state";
    for (driver, ids, registered, expected) in [
        (
            "mlx5_vfio_pci",
            "15b3:101e",
            true,
            "CANDIDATE: mlx5_vfio_pci implements migration; whether it does for this device shows when it is opened"
                .to_owned(),
        ),
        (
            "vfio-pci",
            "15b3:101e",
            true,
            "NO: vfio-pci passes the device through but cannot save its state; bind mlx5_vfio_pci, which may".into(),
        ),
        (
            "vfio-pci",
            "8086:10d3",
            true,
            format!("NO: vfio-pci passes the device through but cannot save its state; {no_other}"),
        ),
        ("nvgrace_gpu_vfio_pci", "10de:2342", true, format!("NO: nvgrace_gpu_vfio_pci does not implement migration; {no_other}")),
        (
            "mlx5_core",
            "15b3:101e",
            false,
            "NO: the host's driver mlx5_core has the device, and it cannot save the device's state; bind \
             mlx5_vfio_pci, which may"
                .into(),
        ),
        // Registered with VFIO by a driver whose name says nothing of it, as vendors' drivers do.
        (
            "nvidia",
            "10de:2236",
            true,
            "UNKNOWN: nothing is known of the VFIO driver nvidia; only opening the device tells".into(),
        ),
        // Before 6.1 there is no vfio-dev folder and only the name tells.
        (
            "acme_vfio_pci",
            "dead:beef",
            false,
            "UNKNOWN: nothing is known of the VFIO driver acme_vfio_pci; only opening the device tells".into(),
        ),
    ] {
        let tree = Tree::new();
        let device = tree.pci(VF, ids).driver(driver).physfn("0000:03:00.0").group(12);
        if registered {
            device.cdev("vfio0");
        }
        assert_eq!(told(&only(&tree)), expected);
    }
}

#[test]
fn an_unbound_virtual_function_says_what_to_bind() {
    let tree = Tree::new();
    tree.pci(VF, "1af4:1042").physfn("0000:03:00.0");
    let device = only(&tree);
    assert_eq!(device.driver, None);
    assert_eq!(device.physfn.map(|f| f.to_string()).as_deref(), Some("0000:03:00.0"));
    assert_eq!(
        device.migratable.reason(),
        &Reason::NoDriver { use_instead: Some("virtio_vfio_pci") },
        "{}",
        told(&device)
    );
    assert_eq!(device.blockers().len(), 2, "not migratable, and no group: {:?}", blockers(&device));
}

#[test]
fn a_parent_driver_can_tell_what_to_bind() {
    let tree = Tree::new();
    tree.pci("0000:03:00.0", "8086:e20b").driver("xe");
    tree.pci(VF, "8086:e20b").physfn("0000:03:00.0");
    assert_eq!(only(&tree).migratable.reason(), &Reason::NoDriver { use_instead: Some("xe-vfio-pci") });
}

#[test]
fn a_driver_for_virtual_functions_does_not_save_a_physical_one() {
    let tree = Tree::new();
    tree.pci("0000:03:00.0", "15b3:101d").driver("mlx5_vfio_pci").group(1).cdev("vfio0");
    assert_eq!(
        only(&tree).migratable.reason(),
        &Reason::NotVirtualFunction { driver: "mlx5_vfio_pci".into() }
    );
}

#[test]
fn a_driver_may_be_spelled_with_or_without_dashes() {
    let tree = Tree::new();
    for (function, driver) in [(VF, "xe-vfio-pci"), ("0000:03:00.2", "xe_vfio_pci")] {
        tree.pci(function, "8086:e20b").driver(driver).physfn("0000:03:00.0").group(1);
        let device = named(&tree, function);
        assert_eq!(device.migratable.verdict(), Verdict::Candidate);
        assert!(device.migratable.reason().source().is_some());
    }
}

#[test]
fn an_mdev_is_a_candidate_in_a_group_that_is_only_called_noiommu() {
    let tree = Tree::new();
    tree.mtty(MTTY, 7).cdev("vfio3");
    tree.node("vfio/7");
    let device = only(&tree);
    assert_eq!(device.bus, Bus::Mdev);
    assert_eq!(device.migratable.verdict(), Verdict::Candidate);
    let kind = device.mdev_type.as_ref().unwrap();
    assert_eq!((kind.id.as_str(), kind.name.as_deref()), ("mtty-2", Some("Dual port serial")));
    let group = device.iommu_group.as_ref().unwrap();
    assert_eq!((group.id, group.kind, &group.viability), (7, GroupKind::Emulated, &Viability::Viable));
    assert!(group.node.exists && group.node.path.ends_with("dev/vfio/7"));
    let cdev = device.cdev.as_ref().unwrap();
    assert!(
        !cdev.exists && cdev.path.ends_with("dev/vfio/devices/vfio3"),
        "sysfs names it, the kernel has it not"
    );
    assert_eq!((device.numa_node, device.notes.as_slice()), (None, &[][..]));
    assert_eq!(blockers(&device), [""; 0]);
}

#[test]
fn an_mdev_is_near_its_parent() {
    let tree = Tree::new();
    tree.mtty(MTTY, 7);
    fs::write(tree.path("sys/devices/virtual/mtty/mtty/numa_node"), "1\n").unwrap();
    assert_eq!(only(&tree).numa_node, Some(1));
}

#[test]
fn a_pci_function_without_an_iommu_is_told_apart() {
    let tree = Tree::new();
    tree.pci(VF, "15b3:101e").driver("mlx5_vfio_pci").physfn("0000:03:00.0").group(0);
    fs::write(tree.path("sys/kernel/iommu_groups/0/name"), "vfio-noiommu\n").unwrap();
    tree.node("vfio/noiommu-0");
    let device = only(&tree);
    let group = device.iommu_group.as_ref().unwrap();
    assert_eq!(group.kind, GroupKind::NoIommu);
    assert!(group.node.exists);
    assert_eq!(device.blockers(), [Blocker::NoIommu { group: 0 }]);
}

#[test]
fn a_group_behind_a_bridge_is_not_viable_while_a_neighbour_has_a_kernel_driver() {
    let tree = Tree::new();
    tree.pci("0000:01:00.0", "1b36:000e").attribute("class", "0x060401\n").group(5);
    tree.pci("0000:02:01.0", "8086:10d3").driver("vfio-pci").group(5).cdev("vfio0");
    tree.pci("0000:02:02.0", "8086:10d3").driver("e1000e").group(5);
    tree.pci("0000:00:1f.0", "8086:2918").group(9);
    tree.node("vfio/5");
    let devices = discover(&tree.roots()).unwrap();
    let names: Vec<String> = devices.iter().map(|device| device.name.to_string()).collect();
    assert_eq!(names, ["0000:02:01.0", "0000:02:02.0"], "neither the bridge nor the unrelated function");
    let roles: Vec<Role> =
        devices[0].iommu_group.iter().flat_map(|group| &group.members).map(|member| member.role).collect();
    assert_eq!(roles, [Role::Free, Role::Vfio, Role::Blocks]);
    assert_eq!(
        blockers(&devices[0]),
        [
            "not migratable: vfio-pci passes the device through but cannot save its state; no driver is known here \
             that can save this device's state",
            "IOMMU group 5 is not viable: 0000:02:02.0 (e1000e) is bound to a kernel driver; unbind every such \
             member or bind it to vfio-pci",
        ]
    );
}

#[test]
fn ports_and_stubs_leave_a_group_viable() {
    let tree = Tree::new();
    tree.pci("0000:00:1c.0", "8086:7ab8").attribute("class", "0x060400\n").driver("pcieport").group(5);
    tree.pci("0000:02:00.0", "8086:10d3").driver("vfio-pci").group(5).cdev("vfio0");
    tree.pci("0000:02:00.1", "8086:10d3").driver("pci-stub").group(5);
    tree.pci("0000:02:00.2", "8086:10d3").group(5);
    let device = named(&tree, "0000:02:00.0");
    let group = device.iommu_group.unwrap();
    assert_eq!(group.viability, Viability::Viable);
    let roles: Vec<Role> = group.members.iter().map(|member| member.role).collect();
    assert_eq!(roles, [Role::Tolerated, Role::Vfio, Role::Tolerated, Role::Free]);
    assert_eq!(discover(&tree.roots()).unwrap().len(), 3, "the port is only a member");
}

#[test]
fn a_driver_of_another_bridge_kind_blocks() {
    let tree = Tree::new();
    tree.pci("0000:00:1c.0", "8086:7ab8").attribute("class", "0x060400\n").driver("shpchp").group(5);
    tree.pci("0000:02:00.0", "8086:10d3").driver("vfio-pci").group(5).cdev("vfio0");
    let viability = only(&tree).iommu_group.unwrap().viability;
    assert!(matches!(viability, Viability::NotViable { blocked_by } if blocked_by.len() == 1));
}

#[test]
fn viability_is_unknown_when_a_member_cannot_be_judged() {
    let tree = Tree::new();
    tree.pci("0000:02:00.0", "8086:10d3").driver("vfio-pci").group(5).cdev("vfio0");
    tree.pci("0000:02:00.1", "8086:10d3").attribute("driver", "a file").group(5);
    let device = named(&tree, "0000:02:00.0");
    assert_eq!(
        device.iommu_group.unwrap().viability,
        Viability::Unknown { why: UnknownViability::DriverUnread }
    );
    assert!(device.notes[0].attribute.ends_with("devices/0000:02:00.1/driver"), "{:?}", device.notes);

    fs::remove_dir_all(tree.path("sys/kernel/iommu_groups/5")).unwrap();
    let device = named(&tree, "0000:02:00.0");
    let group = device.iommu_group.unwrap();
    assert_eq!(group.viability, Viability::Unknown { why: UnknownViability::MembersUnread });
}

#[test]
fn a_missing_bus_has_no_devices_and_a_missing_sysfs_is_an_error() {
    let tree = Tree::new();
    assert_eq!(discover(&tree.roots()).unwrap(), []);
    fs::remove_dir_all(tree.path("sys/bus")).unwrap();
    assert_eq!(discover(&tree.roots()).unwrap(), []);
    assert!(matches!(find(&tree.roots(), VF), Err(DiscoveryError::NotFound { .. })));
    fs::create_dir_all(tree.path("sys/bus/pci")).unwrap();
    fs::write(tree.path("sys/bus/pci/devices"), "").unwrap();
    assert!(matches!(discover(&tree.roots()), Err(DiscoveryError::Unlistable { .. })));
    fs::remove_dir_all(tree.path("sys")).unwrap();
    assert!(matches!(discover(&tree.roots()), Err(DiscoveryError::NoSysfs { .. })));
}

#[test]
fn garbage_is_noted_on_its_device_and_spares_the_others() {
    let tree = Tree::new();
    let garbage = tree
        .pci("0000:03:00.2", "15b3:101e")
        .attribute("device", "0x+1e\n")
        .attribute("class", &"0xf".repeat(5000))
        .attribute("revision", "")
        .attribute("numa_node", "-2\n")
        .link("driver", "..")
        .link("physfn", "../not-an-address")
        .link("iommu_group", "../groups/007")
        .cdev("vfio1");
    fs::remove_file(garbage.folder.join("subsystem_vendor")).unwrap();
    symlink("vendor", garbage.folder.join("subsystem_vendor")).unwrap();
    fs::write(garbage.folder.join("subsystem_device"), [0xff, 0xfe]).unwrap();
    tree.pci(VF, "15b3:101e").driver("mlx5_vfio_pci").physfn("0000:03:00.0").group(12).cdev("vfio0");

    let devices = discover(&tree.roots()).unwrap();
    assert_eq!(devices.len(), 2);
    assert_eq!(devices[0].notes, []);
    let odd = &devices[1];
    assert_eq!((odd.ids, odd.driver.as_deref(), odd.physfn, odd.numa_node), (None, None, None, None));
    assert_eq!(odd.iommu_group, None);
    assert_eq!(odd.migratable.reason(), &Reason::DriverUnread);
    let noted: Vec<&str> = odd.notes.iter().map(|note| note.attribute.as_str()).collect();
    assert_eq!(
        noted,
        [
            "driver",
            "device",
            "subsystem_vendor",
            "subsystem_device",
            "class",
            "physfn",
            "iommu_group",
            "numa_node"
        ]
    );
    assert!(odd.notes.iter().all(|note| note.to_string().len() < 200), "{:?}", odd.notes);
}

#[test]
fn nothing_but_a_regular_file_is_opened() {
    let tree = Tree::new();
    let device = tree.mtty(MTTY, 7);
    let pipe = device.folder.join("../mdev_supported_types/mtty-2/name");
    fs::remove_file(&pipe).unwrap();
    // Opening a pipe with no writer would block for ever.
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0)
        .unwrap();
    assert_eq!(only(&tree).notes[0].to_string(), "mdev_type/name: could not be read: not a regular file");
}

#[test]
fn an_unlistable_vfio_dev_is_noted() {
    let tree = Tree::new();
    tree.pci(VF, "15b3:101e").physfn("0000:03:00.0").attribute("vfio-dev", "no folder");
    let device = only(&tree);
    assert_eq!((device.cdev, device.notes[0].attribute.as_str()), (None, "vfio-dev"));
}

#[test]
fn a_device_that_went_away_is_left_out() {
    let tree = Tree::new();
    let device = tree.pci(VF, "15b3:101e").physfn("0000:03:00.0");
    fs::remove_dir_all(device.folder).unwrap();
    assert_eq!(discover(&tree.roots()).unwrap(), [], "the bus still links to it");
}

#[test]
fn its_own_host_driver_is_told_once() {
    let tree = Tree::new();
    tree.pci(VF, "15b3:101e").driver("mlx5_core").physfn("0000:03:00.0").group(12);
    let device = only(&tree);
    assert!(matches!(device.iommu_group.as_ref().unwrap().viability, Viability::NotViable { .. }));
    assert!(
        matches!(device.blockers().as_slice(), [Blocker::NotMigratable { .. }]),
        "{:?}",
        blockers(&device)
    );
}

#[test]
fn a_rich_machine_as_json() {
    let tree = Tree::new();
    tree.pci("0000:03:00.0", "15b3:101d").driver("mlx5_core").group(11);
    tree.pci(VF, "15b3:101e")
        .driver("mlx5_vfio_pci")
        .physfn("0000:03:00.0")
        .attribute("numa_node", "1\n")
        .group(12)
        .cdev("vfio0");
    tree.pci("0000:03:00.2", "15b3:101e").driver("mlx5_core").physfn("0000:03:00.0").group(13);
    tree.pci("0000:05:01.0", "8086:10d3").driver("vfio-pci").group(14).cdev("vfio1");
    tree.pci("0000:05:02.0", "8086:10d3").driver("e1000e").attribute("numa_node", "x").group(14);
    tree.mtty(MTTY, 15).cdev("vfio2");
    for node in ["vfio/12", "vfio/14", "vfio/15", "vfio/devices/vfio0"] {
        tree.node(node);
    }
    tree.process(4242, "qemu-system-x86", &[("/dev/vfio/devices/vfio0", "")]);
    let json = serde_json::to_string_pretty(&discover(&tree.roots()).unwrap()).unwrap();
    insta::assert_snapshot!(json.replace(&tree.path("").display().to_string(), "/"));
}
