//! What a device's driver says about the device. Which drivers can save a device's state is data, in `vfio-checkpoint-drivers`.
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
use vfio_checkpoint_drivers::{DRIVERS, DriverFact, GENERIC, fact};

pub(super) use vfio_checkpoint_drivers::is_vfio;

use super::attr::Unusable;
use super::{Bus, PciIds};

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
