use std::fs;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::Path;

use tempfile::TempDir;

use super::*;

fn file(root: &Path, path: &str, text: &str) {
    let path = root.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

fn bound(root: &Path, bus: &str, device: &str, driver: &str) {
    let folder = root.join(format!("sys/bus/{bus}/devices/{device}"));
    fs::create_dir_all(&folder).unwrap();
    symlink(format!("../../drivers/{driver}"), folder.join("driver")).unwrap();
}

/// A node as it should be.
fn good(root: &Path) {
    file(root, "proc/sys/kernel/osrelease", "6.12.9\n");
    for group in ["1", "2"] {
        fs::create_dir_all(root.join("sys/kernel/iommu_groups").join(group)).unwrap();
    }
    for module in ["vfio", "vfio_iommu_type1", "iommufd"] {
        fs::create_dir_all(root.join("sys/module").join(module)).unwrap();
    }
    file(root, "dev/iommu", "");
    file(root, "dev/vfio/vfio", "");
    bound(root, "pci", "0000:03:00.1", "mlx5_vfio_pci");
    bound(root, "pci", "0000:03:00.2", "mlx5_vfio_pci");
    bound(root, "pci", "0000:04:00.0", "vfio-pci");
    bound(root, "pci", "0000:00:02.0", "e1000e");
    file(root, "proc/77/comm", "vfio-checkpoint\n");
    file(root, "proc/77/cmdline", "/usr/bin/vfio-checkpointd\0serve\0");
    let limits = "Max open files            65536   65536   files\n\
        Max locked memory         unlimited   unlimited   bytes\n";
    file(root, "proc/77/limits", limits);
}

fn looked(root: &Path) -> String {
    let mut findings = node::check(root);
    findings.extend(limits::check(root));
    finding::table(&findings, false)
}

#[test]
fn a_node_as_it_should_be() {
    let root = TempDir::new().unwrap();
    good(root.path());
    insta::assert_snapshot!(looked(root.path()));
}

#[test]
fn a_node_where_everything_is_wrong_says_how_to_mend_it() {
    let root = TempDir::new().unwrap();
    good(root.path());
    file(root.path(), "proc/sys/kernel/osrelease", "5.10.0\n");
    fs::remove_dir_all(root.path().join("sys/kernel/iommu_groups")).unwrap();
    fs::create_dir_all(root.path().join("sys/kernel/iommu_groups")).unwrap();
    fs::remove_dir_all(root.path().join("sys/module/vfio")).unwrap();
    for device in ["0000:03:00.1", "0000:03:00.2"] {
        fs::remove_dir_all(root.path().join("sys/bus/pci/devices").join(device)).unwrap();
    }
    let limits = "Max open files            256   256   files\n\
        Max locked memory         8388608   8388608   bytes\n";
    file(root.path(), "proc/77/limits", limits);
    insta::assert_snapshot!(looked(root.path()));
}

#[test]
fn what_cannot_be_read_is_not_ok() {
    let root = TempDir::new().unwrap();
    let findings = node::check(root.path());
    assert!(findings.iter().all(|finding| finding.level != Level::Ok), "{findings:?}");
    assert!(findings.iter().all(|finding| finding.mend.is_some()));
}

#[test]
fn a_way_to_map_memory_is_asked_for() {
    let root = TempDir::new().unwrap();
    good(root.path());
    fs::remove_file(root.path().join("dev/iommu")).unwrap();
    let found =
        |check: &str| node::check(root.path()).into_iter().find(|found| found.check == check).unwrap();
    assert_eq!(found("vfio").level, Level::Ok);
    fs::remove_file(root.path().join("dev/vfio/vfio")).unwrap();
    assert_eq!(found("vfio").level, Level::Fail);
}

#[test]
fn a_holder_is_one_that_listens() {
    let root = TempDir::new().unwrap();
    let socket = Path::new("/run/holder.sock");
    assert_eq!(place::holder(root.path(), socket).level, Level::Warn);
    file(root.path(), "run/holder.sock", "");
    assert_eq!(place::holder(root.path(), socket).level, Level::Fail, "a file is no socket");
    fs::remove_file(root.path().join("run/holder.sock")).unwrap();
    let _listener = std::os::unix::net::UnixListener::bind(root.path().join("run/holder.sock")).unwrap();
    file(root.path(), "proc/net/unix", "Num\n");
    assert_eq!(place::holder(root.path(), socket).level, Level::Fail, "nobody listens");
    let line = "0: 00000002 00000000 00010000 0005 01 1 /run/holder.sock\n";
    file(root.path(), "proc/net/unix", line);
    assert_eq!(place::holder(root.path(), socket).level, Level::Ok);
}

#[test]
fn a_store_is_looked_at_and_not_made() {
    let root = TempDir::new().unwrap();
    let folder = Path::new("/var/store");
    let level = || place::store(root.path(), folder)[0].level;
    assert_eq!(level(), Level::Warn);
    let real = root.path().join("var/store");
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&real).unwrap();
    assert_eq!(level(), Level::Ok);
    assert!(fs::read_dir(&real).unwrap().next().is_none(), "looking at it has written into it");
    fs::write(real.join("mine"), "").unwrap();
    assert_eq!(level(), Level::Warn);
    fs::write(real.join("vfio-checkpoint-store"), "").unwrap();
    assert_eq!(level(), Level::Ok);
}
