//! Which drivers can save a device's state, as data, and what a device's driver says about the device.
//!
//! ```text
//!   (driver, ids, VF or not, in VFIO or not) --classify--> Reason --verdict--> CANDIDATE | NO | UNKNOWN
//! ```
//!
//! Whether a device is migratable is known only once it is open, and opening resets it. Short of that its driver's
//! name tells: a driver that implements migration may still answer no for one device (firmware without the
//! capability, a parent that is not ready), so `CANDIDATE` means "may". A driver known without it means `NO`.
//!
//! Invariants: the verdict follows from the reason alone, so the two never disagree; `UNKNOWN` is said only where
//! VFIO serves the device and the driver is not in the table, or where sysfs could not be read.
//! Failure paths: none; the functions here are pure.

use std::fmt;

use serde::Serialize;

use super::attr::Unusable;
use super::{Bus, PciIds};

/// What is known of one VFIO driver.
#[derive(Debug)]
pub(super) struct DriverFact {
    /// The name in sysfs, which is the one to bind by. The kernel is not consistent about dashes.
    pub(super) name: &'static str,
    /// Whether it implements migration v2.
    pub(super) migrates: bool,
    /// The vendor and device numbers that it says it is for.
    pub(super) ids: &'static [(u16, u16)],
    /// The driver of a parent function, where that tells better than a long list of numbers.
    pub(super) parent_driver: Option<&'static str>,
    /// Where this is from.
    pub(super) source: &'static str,
}

const fn migrates(name: &'static str, ids: &'static [(u16, u16)], source: &'static str) -> DriverFact {
    DriverFact { name, migrates: true, ids, parent_driver: None, source }
}

const fn lacks(name: &'static str, source: &'static str) -> DriverFact {
    DriverFact { name, migrates: false, ids: &[], parent_driver: None, source }
}

/// The generic driver: it passes any PCI function through and can save none.
const GENERIC: &str = "vfio-pci";

/// Every VFIO driver whose answer is known. The PCI ones that migrate do so for virtual functions only.
pub(super) const DRIVERS: &[DriverFact] = &[
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

fn fact(driver: &str) -> Option<&'static DriverFact> {
    // A module and its driver can differ in dashes, and either name may change sides between kernels.
    let folded = |name: &str| name.replace('-', "_");
    DRIVERS.iter().find(|fact| folded(fact.name) == folded(driver))
}

/// Whether this is a VFIO driver by its name. Before 6.1 the name is all that tells; later a bound device also has a
/// `vfio-dev` folder.
pub(super) fn is_vfio(driver: &str) -> bool {
    fact(driver).is_some() || driver.contains("vfio")
}

/// Whether a device can be expected to save its state, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(into = "Told")]
pub struct Migratable(Reason);

impl Migratable {
    /// The answer.
    pub fn verdict(&self) -> Verdict {
        self.0.verdict()
    }

    /// The reason, which prints as a sentence that says what to do.
    pub fn reason(&self) -> &Reason {
        &self.0
    }
}

impl From<Reason> for Migratable {
    fn from(reason: Reason) -> Self {
        Self(reason)
    }
}

impl fmt::Display for Migratable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.verdict(), self.0)
    }
}

/// The answer to whether a device is migratable, without opening it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Its driver implements migration, so the device may; opening it tells.
    Candidate,
    /// Not with the driver that it has.
    No,
    /// Only opening it tells.
    Unknown,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Candidate => "CANDIDATE",
            Self::No => "NO",
            Self::Unknown => "UNKNOWN",
        })
    }
}

/// Why a device is a candidate, is not, or cannot be told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "code", rename_all = "snake_case")]
pub enum Reason {
    /// Its driver implements migration.
    DriverMigrates {
        /// The driver.
        driver: String,
    },
    /// The generic vfio-pci driver is bound.
    GenericDriver {
        /// A driver that may save this device's state, where one is known.
        use_instead: Option<&'static str>,
    },
    /// A VFIO driver is bound that is known not to implement migration.
    DriverLacksMigration {
        /// The driver.
        driver: String,
        /// A driver that may save this device's state, where one is known.
        use_instead: Option<&'static str>,
    },
    /// The driver saves virtual functions only, and this is none.
    NotVirtualFunction {
        /// The driver.
        driver: String,
    },
    /// A driver that uses the device for this host is bound.
    HostDriver {
        /// The driver.
        driver: String,
        /// A driver that may save this device's state, where one is known.
        use_instead: Option<&'static str>,
    },
    /// No driver is bound.
    NoDriver {
        /// A driver that may save this device's state, where one is known.
        use_instead: Option<&'static str>,
    },
    /// A VFIO driver is bound of which nothing is known.
    UnknownDriver {
        /// The driver.
        driver: String,
    },
    /// The driver could not be read from sysfs.
    DriverUnread,
}

impl Reason {
    /// The answer that follows from this reason.
    pub fn verdict(&self) -> Verdict {
        match self {
            Self::DriverMigrates { .. } => Verdict::Candidate,
            Self::GenericDriver { .. }
            | Self::DriverLacksMigration { .. }
            | Self::NotVirtualFunction { .. }
            | Self::HostDriver { .. }
            | Self::NoDriver { .. } => Verdict::No,
            Self::UnknownDriver { .. } | Self::DriverUnread => Verdict::Unknown,
        }
    }
}

impl Reason {
    /// Where what is said of a driver is from, where it is from anywhere.
    pub fn source(&self) -> Option<&'static str> {
        match self {
            Self::DriverMigrates { driver }
            | Self::DriverLacksMigration { driver, .. }
            | Self::NotVirtualFunction { driver } => fact(driver).map(|fact| fact.source),
            Self::GenericDriver { .. } => fact(GENERIC).map(|fact| fact.source),
            Self::HostDriver { .. }
            | Self::NoDriver { .. }
            | Self::UnknownDriver { .. }
            | Self::DriverUnread => None,
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bind = |f: &mut fmt::Formatter<'_>, use_instead: Option<&str>| match use_instead {
            Some(driver) => write!(f, "; bind {driver}, which may"),
            None => f.write_str("; no driver is known here that can save this device's state"),
        };
        match self {
            Self::DriverMigrates { driver } => {
                write!(
                    f,
                    "{driver} implements migration; whether it does for this device shows when it is opened"
                )
            }
            Self::GenericDriver { use_instead } => {
                f.write_str("vfio-pci passes the device through but cannot save its state")?;
                bind(f, *use_instead)
            }
            Self::DriverLacksMigration { driver, use_instead } => {
                write!(f, "{driver} does not implement migration")?;
                bind(f, *use_instead)
            }
            Self::NotVirtualFunction { driver } => write!(
                f,
                "{driver} saves virtual functions only, and this is a physical one (or one inside a guest); create \
                 virtual functions on the host and use one of them"
            ),
            Self::HostDriver { driver, use_instead } => {
                write!(
                    f,
                    "the host's driver {driver} has the device, and it cannot save the device's state"
                )?;
                bind(f, *use_instead)
            }
            Self::NoDriver { use_instead } => {
                f.write_str("no driver is bound")?;
                bind(f, *use_instead)
            }
            Self::UnknownDriver { driver } => {
                write!(f, "nothing is known of the VFIO driver {driver}; only opening the device tells")
            }
            Self::DriverUnread => f.write_str("the device's driver could not be read; see the notes"),
        }
    }
}

/// [`Migratable`] as it is told to others: the verdict, the reason as a value, its sentence and its source.
#[derive(Debug, Serialize)]
struct Told {
    verdict: Verdict,
    #[serde(flatten)]
    reason: Reason,
    message: String,
    source: Option<&'static str>,
}

impl From<Migratable> for Told {
    fn from(Migratable(reason): Migratable) -> Self {
        Self { verdict: reason.verdict(), message: reason.to_string(), source: reason.source(), reason }
    }
}

/// What [`classify`] judges by.
#[derive(Debug, Clone, Copy)]
pub(super) struct Facts<'a> {
    pub(super) bus: Bus,
    /// The driver that is bound.
    pub(super) driver: Result<Option<&'a str>, Unusable>,
    /// Whether the device has a `vfio-dev` folder: it is registered with VFIO, whatever its driver is called.
    pub(super) in_vfio: bool,
    pub(super) ids: Option<&'a PciIds>,
    /// Whether the device is a PCI virtual function.
    pub(super) virtual_function: bool,
    /// The driver of the physical function.
    pub(super) parent_driver: Option<&'a str>,
}

/// What a device's driver says about the device.
pub(super) fn classify(facts: &Facts<'_>) -> Migratable {
    let use_instead = suggestion(facts);
    let driver = match facts.driver {
        Err(Unusable) => return Reason::DriverUnread.into(),
        Ok(None) => return Reason::NoDriver { use_instead }.into(),
        Ok(Some(driver)) => driver,
    };
    let owned = driver.to_owned();
    let reason = match fact(driver) {
        Some(fact) if fact.migrates => {
            if facts.bus == Bus::Pci && !facts.virtual_function {
                Reason::NotVirtualFunction { driver: owned }
            } else {
                Reason::DriverMigrates { driver: owned }
            }
        }
        Some(fact) if fact.name == GENERIC => Reason::GenericDriver { use_instead },
        Some(_) => Reason::DriverLacksMigration { driver: owned, use_instead },
        None if facts.in_vfio || is_vfio(driver) => Reason::UnknownDriver { driver: owned },
        None => Reason::HostDriver { driver: owned, use_instead },
    };
    reason.into()
}

/// A driver that may save this device's state, if it were bound.
fn suggestion(facts: &Facts<'_>) -> Option<&'static str> {
    if !facts.virtual_function {
        return None;
    }
    let ids = facts.ids.map(|ids| (ids.vendor, ids.device));
    let fits = |fact: &&DriverFact| {
        ids.is_some_and(|ids| fact.ids.contains(&ids))
            || (fact.parent_driver.is_some() && fact.parent_driver == facts.parent_driver)
    };
    DRIVERS.iter().find(fits).map(|fact| fact.name)
}
