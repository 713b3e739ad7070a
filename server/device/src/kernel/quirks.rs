//! What is known of single drivers, as data: each fact with its reason and its source.
//!
//! A driver that is not listed is taken at the interface's word. The facts are about kernel drivers as of Linux
//! 6.12 unless they say otherwise; a driver that was mended keeps its entry for as long as old kernels run.
//!
//! # Invariants
//! - A fact changes what is *believed* of a device, says what never to ask of it, or is there for whoever reads a
//!   report of that device. It never adds a hidden call.
//! - Each driver has a fact at most once.

use std::fmt;

/// A way in which a driver differs from what the interface promises.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Quirk {
    /// `MIG_DATA_SIZE` is the exact size of a whole stop-copy blob. For other drivers it is an estimate.
    SizeIsExact,
    /// `MIG_DATA_SIZE` leaves out the headers that the driver puts into the stream: see [`HEADER_ROOM_BYTES`].
    SizeLeavesOutHeaders,
    /// `VFIO_DEVICE_RESET` works although `VFIO_DEVICE_FLAGS_RESET` is not set.
    ResetsUnannounced,
    /// After a load the device must not stay in STOP: go from RESUMING to RUNNING (or `RUNNING_P2P`) in one SET.
    NoStayInStopAfterLoad,
    /// RUNNING to RESUMING must be one SET.
    ResumeInOneSet,
    /// A state that was loaded after a failed write is accepted: the driver counts bytes that it refused.
    LoadsAfterFailedWrite,
    /// A device that is found in RESUMING when it is opened must be reset before anything else is asked of it: any
    /// SET crashes the kernel.
    ResetFirstWhenFoundResuming,
    /// Writes to `PCI_COMMAND` are accepted and dropped.
    CommandIsFixed,
    /// `dirty_bytes` and the DMA log are always empty, whatever the device did.
    NeverDirty,
    /// Both hosts need the same firmware and configuration, which sysfs does not show.
    NeedsSameFirmware,
}

/// One fact about one driver.
#[derive(Debug, Clone, Copy)]
pub struct Fact {
    /// The driver's name, with `_` for `-`.
    pub driver: &'static str,
    /// What is different.
    pub quirk: Quirk,
    /// Why, in one sentence.
    pub reason: &'static str,
    /// Where that is written or was observed.
    pub source: &'static str,
}

impl fmt::Display for Fact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {:?}: {} [{}]", self.driver, self.quirk, self.reason, self.source)
    }
}

/// What is added to a size that [leaves out the headers](Quirk::SizeLeavesOutHeaders). The known ones are 16 to 40
/// bytes a record with one record per several MiB, so this is room for a blob of many GiB.
pub const HEADER_ROOM_BYTES: u64 = 64 << 10;

/// Every fact.
pub const FACTS: [Fact; 14] = [
    Fact {
        driver: "mlx5_vfio_pci",
        quirk: Quirk::NoStayInStopAfterLoad,
        reason: "A loaded function that stays in STOP re-initialises its queue indices and wedges.",
        source: "observed with mlx5 functions under Cloud Hypervisor",
    },
    Fact {
        driver: "mlx5_vfio_pci",
        quirk: Quirk::ResumeInOneSet,
        reason: "The driver is only exercised with the kernel's own walk from RUNNING to RESUMING.",
        source: "observed with mlx5 functions under Cloud Hypervisor",
    },
    Fact {
        driver: "mlx5_vfio_pci",
        quirk: Quirk::NeedsSameFirmware,
        reason: "The blob is the firmware's own, and loads only under the same PSID and firmware.",
        source: "drivers/vfio/pci/mlx5/cmd.c, mlx5vf_cmd_load_vhca_state",
    },
    Fact {
        driver: "mlx5_vfio_pci",
        quirk: Quirk::SizeLeavesOutHeaders,
        reason: "The size is the firmware's, and the driver puts a header before each record and a record of its own.",
        source: "drivers/vfio/pci/mlx5/main.c, mlx5vf_pci_get_data_size and mlx5vf_add_stop_copy_header",
    },
    Fact {
        driver: "virtio_vfio_pci",
        quirk: Quirk::SizeLeavesOutHeaders,
        reason: "The size is that of the device's parts, and the driver puts a header before them.",
        source: "drivers/vfio/pci/virtio/migrate.c, virtiovf_pci_get_data_size (Linux 6.13 and later)",
    },
    Fact {
        driver: "qat_vfio_pci",
        quirk: Quirk::SizeIsExact,
        reason: "The size is that of the buffer, all of which is handed out.",
        source: "drivers/vfio/pci/qat/main.c, qat_vf_pci_get_data_size",
    },
    Fact {
        driver: "mtty",
        quirk: Quirk::SizeIsExact,
        reason: "The size is a header and a fixed struct for each port.",
        source: "samples/vfio-mdev/mtty.c, mtty_data_size",
    },
    Fact {
        driver: "mtty",
        quirk: Quirk::ResetsUnannounced,
        reason: "VFIO_DEVICE_RESET is served but the device's flags say PCI alone.",
        source: "samples/vfio-mdev/mtty.c, mtty_get_device_info and mtty_ioctl",
    },
    Fact {
        driver: "mtty",
        quirk: Quirk::LoadsAfterFailedWrite,
        reason: "A write that fails on the header's check has been counted, and the load looks at the count alone.",
        source: "samples/vfio-mdev/mtty.c, mtty_resume_write and mtty_load_state",
    },
    Fact {
        driver: "mtty",
        quirk: Quirk::ResetFirstWhenFoundResuming,
        reason: "Closing the device drops the data fd but not the state, and the next SET follows the null pointer.",
        source: "samples/vfio-mdev/mtty.c, mtty_close and mtty_load_state",
    },
    Fact {
        driver: "mtty",
        quirk: Quirk::CommandIsFixed,
        reason: "Writes to the command register are accepted and do nothing.",
        source: "samples/vfio-mdev/mtty.c, handle_pci_cfg_write",
    },
    Fact {
        driver: "mtty",
        quirk: Quirk::NeverDirty,
        reason: "The driver does no DMA; its log callbacks and its dirty_bytes answer zero.",
        source: "samples/vfio-mdev/mtty.c, mtty_log_read_and_clear and mtty_precopy_ioctl",
    },
    Fact {
        driver: "hisi_acc_vfio_pci",
        quirk: Quirk::NeedsSameFirmware,
        reason: "The load refuses a function with another number of queues or another isolation setting.",
        source: "drivers/vfio/pci/hisilicon/hisi_acc_vfio_pci.c, vf_qm_check_match",
    },
    Fact {
        driver: "qat_vfio_pci",
        quirk: Quirk::NeedsSameFirmware,
        reason: "The load refuses another version, another service map, and lesser capabilities.",
        source: "drivers/crypto/intel/qat/qat_common/adf_gen4_vf_mig.c, adf_gen4_vfmig_load_config",
    },
];

/// The facts about a driver, named as sysfs names it.
pub fn of(driver: &str) -> impl Iterator<Item = &'static Fact> {
    let driver = driver.replace('-', "_");
    FACTS.iter().filter(move |fact| fact.driver == driver)
}

/// Whether a driver has a quirk.
pub fn has(driver: &str, quirk: Quirk) -> bool {
    of(driver).any(|fact| fact.quirk == quirk)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_fact_has_a_sentence_and_a_source() {
        for fact in FACTS {
            assert!(fact.reason.ends_with('.') && fact.reason.len() > 20, "{fact}");
            assert!(!fact.source.is_empty(), "{fact}");
            assert!(!fact.driver.contains('-'), "{fact}: write `_` for `-`");
        }
    }

    #[test]
    fn a_driver_has_a_fact_once() {
        let mut seen = HashSet::new();
        for fact in FACTS {
            assert!(seen.insert((fact.driver, fact.quirk)), "twice: {fact}");
        }
    }

    #[test]
    fn a_size_is_not_both_exact_and_without_headers() {
        for fact in FACTS {
            assert!(
                !(has(fact.driver, Quirk::SizeIsExact) && has(fact.driver, Quirk::SizeLeavesOutHeaders)),
                "{}",
                fact.driver
            );
        }
    }

    #[test]
    fn drivers_are_found_under_both_spellings() {
        assert!(has("mlx5_vfio_pci", Quirk::NoStayInStopAfterLoad));
        assert!(has("mlx5-vfio-pci", Quirk::NoStayInStopAfterLoad));
        assert!(has("mtty", Quirk::ResetsUnannounced));
        assert!(!has("vfio-pci", Quirk::ResetsUnannounced));
        assert_eq!(of("unheard-of").count(), 0);
    }
}
