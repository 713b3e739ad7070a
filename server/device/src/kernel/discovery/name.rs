//! The two kinds of name a device has on its node, parsed before any path is built from them.
//!
//! ```text
//!   text -> DeviceName = PciAddress "0000:03:00.1" | MdevUuid "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
//!                            '-> sys/bus/pci/devices/…          '-> sys/bus/mdev/devices/…
//! ```
//!
//! Invariants: a parsed name prints as exactly the kernel's name of the device, so it is one path component and has
//! no second spelling; nothing else ever becomes part of a path.
//! Failure paths: anything else is an [`InvalidName`], which says what a name looks like.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How many characters of a rejected name are repeated in the error.
const SHOWN_CHARS: usize = 64;

/// The text is not a device's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{shown:?} is neither a PCI address with its domain (0000:03:00.1) nor an mdev's UUID \
     (83b8f4f2-509f-382f-3c1e-e6bfe0fa1001)"
)]
pub struct InvalidName {
    /// The beginning of what was given.
    pub shown: String,
}

impl InvalidName {
    fn of(text: &str) -> Self {
        Self { shown: text.chars().take(SHOWN_CHARS).collect() }
    }
}

/// A PCI function's address: `domain:bus:device.function`, always with its domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PciAddress {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { domain, bus, device, function } = self;
        write!(f, "{domain:04x}:{bus:02x}:{device:02x}.{function}")
    }
}

impl FromStr for PciAddress {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let parse = || {
            let (domain, rest) = text.split_once(':')?;
            let (bus, rest) = rest.split_once(':')?;
            let (device, function) = rest.split_once('.')?;
            let address = Self {
                domain: u32::from_str_radix(domain, 16).ok()?,
                bus: u8::from_str_radix(bus, 16).ok()?,
                device: u8::from_str_radix(device, 16).ok().filter(|device| *device < 32)?,
                function: function.parse().ok().filter(|function| *function < 8)?,
            };
            // Signs, missing zeros and extra zeros parse as numbers; only the kernel's own spelling is a name.
            address.to_string().eq_ignore_ascii_case(text).then_some(address)
        };
        parse().ok_or_else(|| InvalidName::of(text))
    }
}

impl From<PciAddress> for String {
    fn from(address: PciAddress) -> Self {
        address.to_string()
    }
}

impl TryFrom<String> for PciAddress {
    type Error = InvalidName;

    fn try_from(text: String) -> Result<Self, InvalidName> {
        text.parse()
    }
}

/// A mediated device's UUID, in lower case as the kernel prints it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MdevUuid(u128);

impl fmt::Display for MdevUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let part = |shift: u32, digits: u32| (self.0 >> shift) & ((1 << (digits * 4)) - 1);
        let [low, mid, high, clock] = [part(96, 8), part(80, 4), part(64, 4), part(48, 4)];
        write!(f, "{low:08x}-{mid:04x}-{high:04x}-{clock:04x}-{:012x}", part(0, 12))
    }
}

impl FromStr for MdevUuid {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let digits: String = text.chars().filter(|c| *c != '-').collect();
        u128::from_str_radix(&digits, 16)
            .ok()
            .map(Self)
            // The dashes stand where a UUID has them, and nothing but hexadecimal digits stands between.
            .filter(|uuid| uuid.to_string().eq_ignore_ascii_case(text))
            .ok_or_else(|| InvalidName::of(text))
    }
}

impl From<MdevUuid> for String {
    fn from(uuid: MdevUuid) -> Self {
        uuid.to_string()
    }
}

impl TryFrom<String> for MdevUuid {
    type Error = InvalidName;

    fn try_from(text: String) -> Result<Self, InvalidName> {
        text.parse()
    }
}

/// A device's name on its node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum DeviceName {
    /// A PCI function.
    Pci(PciAddress),
    /// A mediated device.
    Mdev(MdevUuid),
}

impl DeviceName {
    /// The bus on which the device sits.
    pub fn bus(self) -> Bus {
        match self {
            Self::Pci(_) => Bus::Pci,
            Self::Mdev(_) => Bus::Mdev,
        }
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pci(address) => address.fmt(f),
            Self::Mdev(uuid) => uuid.fmt(f),
        }
    }
}

impl FromStr for DeviceName {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        text.parse().map(Self::Pci).or_else(|_| text.parse().map(Self::Mdev))
    }
}

impl From<DeviceName> for String {
    fn from(name: DeviceName) -> Self {
        name.to_string()
    }
}

impl TryFrom<String> for DeviceName {
    type Error = InvalidName;

    fn try_from(text: String) -> Result<Self, InvalidName> {
        text.parse()
    }
}

/// The bus on which a device sits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bus {
    /// PCI: named by its address.
    Pci,
    /// Mediated devices: named by their UUID.
    Mdev,
}

impl Bus {
    /// The bus's name under `sys/bus`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pci => "pci",
            Self::Mdev => "mdev",
        }
    }
}

impl fmt::Display for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
