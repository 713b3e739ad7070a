//! The node: kernel, IOMMU, VFIO, and the drivers of its devices. Reads below a root, so that a made-up tree will do.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use vfio_checkpoint_drivers as drivers;

use super::finding::{Finding, fail, ok, warn};

/// The longest file of sysfs or proc that is read.
const MAX_BYTES: u64 = 64 * 1024;

/// Everything about the node.
pub(super) fn check(root: &Path) -> Vec<Finding> {
    let version = read(root, "proc/sys/kernel/osrelease");
    vec![kernel(version.as_deref()), iommu(root), vfio(root), devices(root)]
}

/// A small file, without the blanks around its text.
pub(super) fn read(root: &Path, path: &str) -> Option<String> {
    use std::io::Read as _;
    let mut text = String::new();
    fs::File::open(root.join(path)).ok()?.take(MAX_BYTES).read_to_string(&mut text).ok()?;
    Some(text.trim().to_owned())
}

/// The names in a folder, in order. None where it cannot be read.
fn names(root: &Path, path: &str) -> Option<Vec<String>> {
    let mut names: Vec<String> = fs::read_dir(root.join(path))
        .ok()?
        .filter_map(Result::ok)
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    Some(names)
}

fn kernel(version: Option<&str>) -> Finding {
    const CHECK: &str = "kernel";
    const NEWER: &str = "use a kernel of 6.6 or later";
    let Some(version) = version else {
        return warn(CHECK, "its version cannot be read", "look whether /proc is mounted here");
    };
    let mut numbers = version.split(|letter: char| !letter.is_ascii_digit()).map(str::parse::<u32>);
    let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else {
        return warn(CHECK, format!("{version} is no version that is understood"), NEWER);
    };
    match (major, minor) {
        (0..=4, _) | (5, 0..=17) => {
            fail(CHECK, format!("{version} has no VFIO migration of version 2 (since 5.18)"), NEWER)
        }
        (5, _) | (6, 0..=1) => {
            warn(CHECK, format!("{version} has no pre-copy and tells no data sizes (since 6.2)"), NEWER)
        }
        (6, 2..=5) => ok(CHECK, format!("{version}; devices go through groups, as iommufd begins with 6.6")),
        (6.., _) => ok(CHECK, version),
    }
}

fn iommu(root: &Path) -> Finding {
    const CHECK: &str = "iommu";
    match names(root, "sys/kernel/iommu_groups") {
        None => warn(CHECK, "its groups cannot be read", "look whether /sys is mounted here"),
        Some(groups) if groups.is_empty() => fail(
            CHECK,
            "there is no IOMMU group, so VFIO cannot give out devices",
            "switch VT-d, AMD-Vi or SMMU on in the firmware, and add intel_iommu=on to the kernel's command line",
        ),
        Some(groups) => ok(CHECK, format!("{} groups", groups.len())),
    }
}

fn vfio(root: &Path) -> Finding {
    const CHECK: &str = "vfio";
    let is_there = |path: &str| root.join(path).exists();
    if !is_there("sys/module/vfio") {
        return fail(
            CHECK,
            "the module is not loaded",
            "modprobe vfio-pci, or the variant driver of the device",
        );
    }
    let ways: Vec<&str> = [
        ("iommufd (/dev/iommu)", is_there("sys/module/iommufd") && is_there("dev/iommu")),
        ("groups (/dev/vfio/vfio)", is_there("sys/module/vfio_iommu_type1") && is_there("dev/vfio/vfio")),
    ]
    .iter()
    .filter_map(|(name, is_there)| is_there.then_some(*name))
    .collect();
    if ways.is_empty() {
        return fail(
            CHECK,
            "it is loaded, and there is no way to map memory: neither /dev/iommu nor /dev/vfio/vfio",
            "modprobe vfio_iommu_type1 or iommufd; in a container, mount /dev/vfio and /dev/iommu",
        );
    }
    ok(CHECK, format!("it is loaded, by way of {}", ways.join(" and ")))
}

/// Which drivers have the devices that VFIO serves.
fn devices(root: &Path) -> Finding {
    const CHECK: &str = "devices";
    let mut by_driver: BTreeMap<String, usize> = BTreeMap::new();
    for bus in ["pci", "mdev"] {
        let folder = format!("sys/bus/{bus}/devices");
        for device in names(root, &folder).unwrap_or_default() {
            let link = fs::read_link(root.join(&folder).join(&device).join("driver"));
            let driver = link.ok().and_then(|link| link.file_name()?.to_str().map(str::to_owned));
            if let Some(driver) = driver.filter(|driver| bus == "mdev" || drivers::is_vfio(driver)) {
                *by_driver.entry(driver).or_default() += 1;
            }
        }
    }
    let list = |wanted: bool| {
        let chosen = by_driver.iter().filter(|(driver, _)| migrates(driver) == wanted);
        chosen.map(|(driver, count)| format!("{count} x {driver}")).collect::<Vec<_>>().join(", ")
    };
    let (with, without) = (list(true), list(false));
    let bind = "bind the virtual functions to the variant driver of their maker, such as mlx5_vfio_pci; \
        `vfio-device list` tells which";
    match (with.is_empty(), without.is_empty()) {
        (true, true) => warn(CHECK, "no device is bound to a VFIO driver", bind),
        (true, false) => fail(CHECK, format!("no device has a driver that can migrate: {without}"), bind),
        (false, true) => ok(CHECK, with),
        (false, false) => ok(CHECK, format!("{with}; and without migration {without}")),
    }
}

fn migrates(driver: &str) -> bool {
    drivers::fact(driver).is_some_and(|fact| fact.migrates)
}

#[cfg(test)]
mod tests {
    use super::super::finding::Level;
    use super::*;

    #[test]
    fn kernels_are_judged_by_what_they_have() {
        for (version, level) in [
            (Some("4.18.0-553.el8.x86_64"), Level::Fail),
            (Some("5.17.9"), Level::Fail),
            (Some("5.18.0"), Level::Warn),
            (Some("6.1.0-13-amd64"), Level::Warn),
            (Some("6.2.0"), Level::Ok),
            (Some("6.12.1+"), Level::Ok),
            (Some("7.0-rc1"), Level::Ok),
            (Some("x"), Level::Warn),
            (Some(""), Level::Warn),
            (None, Level::Warn),
        ] {
            assert_eq!(kernel(version).level, level, "{version:?}");
        }
    }
}
