//! Who a device is, and what must match for its state to load elsewhere.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// Which kind of backend serves a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Backend {
    /// A kernel VFIO device.
    Kernel,
    /// A simulated device in this process.
    Sim,
    /// A device in another process, over a vfio-user socket.
    VfioUser,
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kernel => "kernel",
            Self::Sim => "sim",
            Self::VfioUser => "vfio-user",
        })
    }
}

/// Which device this is, on this node.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Identity {
    /// The slot's name on its node: a PCI address (`0000:03:00.1`), an mdev's UUID, a simulated device's name, a
    /// socket's file name.
    pub name: String,
    /// The backend that serves it.
    pub backend: Backend,
    /// The driver behind it (`mlx5_vfio_pci`, `mtty`, `sim`).
    pub driver: String,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}, {})", self.name, self.backend, self.driver)
    }
}

/// What must match on the destination for a device's state to load there.
///
/// A set of named facts rather than one hash, so that a refusal can say *which* fact differs. Kernel drivers check
/// their own blob as well, but late: on the write, or only on leaving RESUMING.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fingerprint {
    facts: BTreeMap<String, String>,
}

impl Fingerprint {
    /// An empty fingerprint, which matches only another empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds one fact, for example `("driver", "mtty")`.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.facts.insert(name.to_owned(), value.into());
        self
    }

    /// The facts by name.
    pub fn facts(&self) -> impl Iterator<Item = (&str, &str)> {
        self.facts.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// Every fact that differs between the device that the state came from (`self`) and the one it should go to.
    pub fn differences(&self, destination: &Self) -> Vec<Difference> {
        let names: std::collections::BTreeSet<&String> =
            self.facts.keys().chain(destination.facts.keys()).collect();
        names
            .into_iter()
            .filter_map(|name| {
                let (source, destination) =
                    (self.facts.get(name).cloned(), destination.facts.get(name).cloned());
                (source != destination).then(|| Difference { fact: name.clone(), source, destination })
            })
            .collect()
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (name, value)) in self.facts.iter().enumerate() {
            write!(f, "{}{name}={value}", if i == 0 { "" } else { " " })?;
        }
        Ok(())
    }
}

/// One fact of a fingerprint on which two devices differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// The fact's name.
    pub fact: String,
    /// Its value where the state came from, if it was stated there.
    pub source: Option<String>,
    /// Its value where the state should go, if it is stated there.
    pub destination: Option<String>,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let side = |value: &Option<String>| value.clone().unwrap_or_else(|| "(not stated)".to_owned());
        write!(f, "{} is {} there and {} here", self.fact, side(&self.source), side(&self.destination))
    }
}
