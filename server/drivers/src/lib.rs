//! Which VFIO drivers can save a device's state, as data: the one list that the agent, its tools and the command line have.
//!
//! ```text
//!   a driver's name in sysfs --fact--> DriverFact: does it migrate, for which devices, and where that is known from
//! ```
//!
//! Invariants: a driver is in the list once, whatever the dashes in its name. That a driver migrates says that a device of
//! it may; only opening the device tells. Failure paths: none; a driver that is not in the list is not known.

/// What is known of one VFIO driver.
#[derive(Debug)]
pub struct DriverFact {
    /// The name in sysfs, which is the one to bind by. The kernel is not consistent about dashes.
    pub name: &'static str,
    /// Whether it implements migration v2.
    pub migrates: bool,
    /// The vendor and device numbers that it says it is for.
    pub ids: &'static [(u16, u16)],
    /// The driver of a parent function, where that tells better than a long list of numbers.
    pub parent_driver: Option<&'static str>,
    /// Where this is from.
    pub source: &'static str,
}

const fn migrates(name: &'static str, ids: &'static [(u16, u16)], source: &'static str) -> DriverFact {
    DriverFact { name, migrates: true, ids, parent_driver: None, source }
}

const fn lacks(name: &'static str, source: &'static str) -> DriverFact {
    DriverFact { name, migrates: false, ids: &[], parent_driver: None, source }
}

/// The generic driver: it passes any PCI function through and can save none.
pub const GENERIC: &str = "vfio-pci";

/// Every VFIO driver whose answer is known. The PCI ones that migrate do so for virtual functions only.
pub static DRIVERS: &[DriverFact] = &[
    migrates("mlx5_vfio_pci", &[(0x15b3, 0x101e)], "drivers/vfio/pci/mlx5: needs the migration capability"),
    migrates(
        "hisi_acc_vfio_pci",
        &[(0x19e5, 0xa251), (0x19e5, 0xa256), (0x19e5, 0xa259)],
        "drivers/vfio/pci/hisilicon: needs its own driver on the parent function",
    ),
    migrates("pds_vfio_pci", &[(0x1dd8, 0x1003)], "drivers/vfio/pci/pds"),
    migrates(
        "virtio_vfio_pci",
        &[(0x1af4, 0x1041), (0x1af4, 0x1042)],
        "drivers/vfio/pci/virtio: since 6.13, needs the device-parts admin commands",
    ),
    migrates(
        "qat_vfio_pci",
        &[(0x8086, 0x4941), (0x8086, 0x4943), (0x8086, 0x4945), (0x8086, 0x4949)],
        "drivers/vfio/pci/qat",
    ),
    DriverFact {
        name: "xe-vfio-pci",
        migrates: true,
        ids: &[],
        parent_driver: Some("xe"),
        source: "drivers/vfio/pci/xe: its numbers are whole GPU families, always under the xe driver",
    },
    migrates(
        "mtty",
        &[],
        "samples/vfio-mdev/mtty.c: the kernel's sample, on older kernels without migration",
    ),
    migrates("nvidia-vgpu-vfio", &[], "NVIDIA's vGPU host driver: migration v2 where the kernel has it"),
    lacks(GENERIC, "drivers/vfio/pci/vfio_pci.c"),
    lacks("nvgrace_gpu_vfio_pci", "drivers/vfio/pci/nvgrace-gpu"),
    lacks("ism_vfio_pci", "drivers/vfio/pci/ism"),
    lacks("vfio_ap_mdev", "drivers/s390/crypto/vfio_ap_ops.c: newer ones list states but answer EOPNOTSUPP"),
    lacks("vfio_ccw_mdev", "drivers/s390/cio/vfio_ccw_ops.c"),
    lacks("intel_vgpu_mdev", "drivers/gpu/drm/i915/gvt"),
    lacks("mdpy", "samples/vfio-mdev/mdpy.c"),
    lacks("mbochs", "samples/vfio-mdev/mbochs.c"),
];

/// What is known of a driver of this name.
pub fn fact(driver: &str) -> Option<&'static DriverFact> {
    // A module and its driver can differ in dashes, and either name may change sides between kernels.
    let folded = |name: &str| name.replace('-', "_");
    let driver = folded(driver);
    DRIVERS.iter().find(|fact| folded(fact.name) == driver)
}

/// Whether this is a VFIO driver by its name. Before 6.1 the name is all that tells; later a bound device also has a
/// `vfio-dev` folder.
pub fn is_vfio(driver: &str) -> bool {
    fact(driver).is_some() || driver.contains("vfio")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_is_found_whatever_its_dashes_and_is_there_once() {
        for name in ["xe-vfio-pci", "xe_vfio_pci", "mlx5_vfio_pci", "nvidia_vgpu_vfio"] {
            assert!(fact(name).is_some_and(|fact| fact.migrates), "{name}");
        }
        assert!(fact("vfio_pci").is_some_and(|fact| fact.name == GENERIC && !fact.migrates));
        assert!(is_vfio("acme_vfio_pci") && fact("acme_vfio_pci").is_none());
        assert!(!is_vfio("e1000e") && is_vfio("mtty"));
        for known in DRIVERS {
            assert!(std::ptr::eq(fact(known.name).unwrap(), known), "{} is there twice", known.name);
        }
    }
}
