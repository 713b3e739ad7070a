//! IOMMU groups: who is in one, and whether VFIO could own all of it.
//!
//! ```text
//!   device/iommu_group -> N
//!   sys/kernel/iommu_groups/N/devices/* --driver--> Role --any Blocks?--> Viability
//! ```
//!
//! The kernel's rule (since 5.19 in drivers/iommu/iommu.c, before that in drivers/vfio/vfio.c): a group belongs
//! either to kernel drivers or to VFIO. When a driver is bound, its bus claims the group for kernel DMA, unless the
//! driver says that it manages DMA itself (`driver_managed_dma`); VFIO's own claim is then refused with EPERM. So a
//! member does not stand in the way where it has no driver, a VFIO driver, or one of [`TOLERATED_DRIVERS`].
//! Before 5.19 every PCI bridge was tolerated as well, whatever its driver; the stricter rule is used here.
//!
//! Not every group has an IOMMU behind it. The kernel calls both the group that it makes up for an mdev and the one
//! that it makes up in its unsafe no-IOMMU mode `vfio-noiommu`; the bus tells them apart ([`GroupKind`]). VFIO
//! claims neither, so members cannot stand in its way there.
//!
//! Invariants: `Viable` is said only when every member was seen. Failure paths: members that cannot be listed or
//! judged make the viability `Unknown` with the reason, and leave a note.

use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

use super::attr::{Folder, Problem, Unusable, entries};
use super::drivers;
use super::{Bus, Node, SysRoots};

/// How many members of one group are looked at.
const MAX_MEMBERS: usize = 1024;

/// What the kernel names a group that has no IOMMU behind it.
const NO_IOMMU_NAME: &str = "vfio-noiommu";

/// Drivers that are not VFIO's and may share a group with it, each with where the kernel says so.
const TOLERATED_DRIVERS: &[(&str, &str)] = &[
    ("pcieport", "drivers/pci/pcie/portdrv.c: does no DMA, driver_managed_dma since 5.19"),
    ("pci-stub", "drivers/pci/pci-stub.c: only keeps others away, driver_managed_dma since 5.19"),
];

/// The IOMMU group of a device: what the IOMMU cannot tell apart, and VFIO owns as a whole or not at all.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Group {
    /// The group's number.
    pub id: u32,
    /// The name some groups have. `vfio-noiommu` does not mean that IOMMU protection is missing: see `kind`.
    pub name: Option<String>,
    /// What stands behind the group.
    pub kind: GroupKind,
    /// The group's node in `/dev/vfio`.
    pub node: Node,
    /// Every device of the group, this one included.
    pub members: Vec<Member>,
    /// Whether VFIO could own the group.
    pub viability: Viability,
}

/// What stands behind an IOMMU group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupKind {
    /// An IOMMU, which confines the DMA of the group's devices.
    Iommu,
    /// Nothing: the device does no DMA of its own, its driver does it through VFIO (every mdev).
    Emulated,
    /// Nothing, and the device does DMA: the kernel's unsafe no-IOMMU mode.
    NoIommu,
}

/// A device of a group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Member {
    /// Its name on its bus.
    pub name: String,
    /// The driver that is bound to it, as far as that could be read.
    pub driver: Option<String>,
    /// What it means for the group.
    pub role: Role,
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.driver {
            Some(driver) => write!(f, "{} ({driver})", self.name),
            None => write!(f, "{} (no driver)", self.name),
        }
    }
}

/// What a member means for the viability of its group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// A VFIO driver is bound: this is what can be opened.
    Vfio,
    /// No driver is bound.
    Free,
    /// A driver that leaves DMA to whoever owns the group.
    Tolerated,
    /// A driver that does DMA through the kernel. VFIO cannot own the group while it is bound.
    Blocks,
    /// The driver could not be read.
    Unknown,
}

/// Whether VFIO could own a group, as far as sysfs tells. Whether somebody owns it now is another question: see
/// [`Holders`](super::Holders).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "status", rename_all = "snake_case")]
pub enum Viability {
    /// No member stands in the way.
    Viable,
    /// These members' drivers stand in the way.
    NotViable {
        /// The members, never empty.
        blocked_by: Vec<Member>,
    },
    /// It could not be found out.
    Unknown {
        /// Why not.
        why: UnknownViability,
    },
}

impl fmt::Display for Viability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Viable => f.write_str("viable"),
            Self::NotViable { blocked_by } => {
                write!(
                    f,
                    "not viable: {} bound to a kernel driver; unbind or bind to vfio-pci",
                    list(blocked_by)
                )
            }
            Self::Unknown { why } => write!(f, "unknown: {why}"),
        }
    }
}

/// Why the viability of a group is not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum UnknownViability {
    /// The group's members could not be listed, or not all of them.
    MembersUnread,
    /// The driver of at least one member could not be read.
    DriverUnread,
}

impl fmt::Display for UnknownViability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::MembersUnread => "the group's members could not all be listed",
            Self::DriverUnread => "the driver of a member could not be read",
        })
    }
}

/// `a (x), b (y) and 3 more are`: names for a sentence, not a page of them.
pub(super) fn list(members: &[Member]) -> String {
    const NAMED: usize = 4;
    let named: Vec<String> = members.iter().take(NAMED).map(Member::to_string).collect();
    let verb = if members.len() == 1 { "is" } else { "are" };
    match members.len().saturating_sub(NAMED) {
        0 => format!("{} {verb}", named.join(", ")),
        more => format!("{} and {more} more {verb}", named.join(", ")),
    }
}

/// Reads the group of the device in `folder`. `None` where it has none, or where its link makes no sense.
pub(super) fn read(roots: &SysRoots, bus: Bus, folder: &mut Folder) -> Option<Group> {
    let link = folder.link("iommu_group").ok().flatten()?;
    let id = match link.parse::<u32>() {
        Ok(id) if id.to_string() == link => id,
        Ok(_) | Err(_) => {
            folder.note("iommu_group", Problem::Malformed(link));
            return None;
        }
    };
    let mut group = Folder::new(roots.sys.join("kernel/iommu_groups").join(&link));
    let name = group.text("name");
    let kind = match (bus, name.as_deref()) {
        (Bus::Mdev, _) => GroupKind::Emulated,
        (Bus::Pci, Some(NO_IOMMU_NAME)) => GroupKind::NoIommu,
        (Bus::Pci, Some(_) | None) => GroupKind::Iommu,
    };
    // VFIO names the node after the kind of group, not after the group's name (drivers/vfio/group.c).
    let node = match kind {
        GroupKind::Iommu | GroupKind::Emulated => link.clone(),
        GroupKind::NoIommu => format!("noiommu-{link}"),
    };
    let node = Node::at(roots.vfio_dir().join(node), folder);
    let (members, complete) = read_members(&mut group);
    let viability = judge(kind, &members, complete);
    for note in group.into_notes() {
        folder.note(&format!("iommu_group/{}", note.attribute), note.problem);
    }
    Some(Group { id, name, kind, node, members, viability })
}

/// The members, and whether they are all there are.
fn read_members(group: &mut Folder) -> (Vec<Member>, bool) {
    let devices = group.path().join("devices");
    match entries(&devices, MAX_MEMBERS) {
        Ok((names, complete)) => {
            if !complete {
                group.note("devices", Problem::TooMany(MAX_MEMBERS));
            }
            let members =
                names.into_iter().map(|name| read_member(devices.join(&name), name, group)).collect();
            (members, complete)
        }
        Err(error) => {
            group.note("devices", Problem::Unreadable(error.to_string()));
            (Vec::new(), false)
        }
    }
}

fn read_member(path: PathBuf, name: String, group: &mut Folder) -> Member {
    let mut folder = Folder::new(path);
    let driver = folder.link("driver");
    let in_vfio = folder.exists(&folder.path().join("vfio-dev"));
    let role = role(driver.as_ref().map(Option::as_deref).map_err(|unusable| *unusable), in_vfio);
    for note in folder.into_notes() {
        group.note(&format!("devices/{name}/{}", note.attribute), note.problem);
    }
    Member { name, driver: driver.ok().flatten(), role }
}

/// What a member with this driver means for its group.
fn role(driver: Result<Option<&str>, Unusable>, in_vfio: bool) -> Role {
    match driver {
        Err(Unusable) => Role::Unknown,
        Ok(None) => Role::Free,
        Ok(Some(driver)) if in_vfio || drivers::is_vfio(driver) => Role::Vfio,
        Ok(Some(driver)) if TOLERATED_DRIVERS.iter().any(|(tolerated, _)| *tolerated == driver) => {
            Role::Tolerated
        }
        Ok(Some(_)) => Role::Blocks,
    }
}

/// Whether VFIO could own a group of these members.
fn judge(kind: GroupKind, members: &[Member], complete: bool) -> Viability {
    match kind {
        GroupKind::Emulated | GroupKind::NoIommu => return Viability::Viable,
        GroupKind::Iommu => {}
    }
    let blocked_by: Vec<Member> =
        members.iter().filter(|member| member.role == Role::Blocks).cloned().collect();
    if !blocked_by.is_empty() {
        Viability::NotViable { blocked_by }
    } else if !complete || members.is_empty() {
        // A group without members cannot be: at least the device that led here is one.
        Viability::Unknown { why: UnknownViability::MembersUnread }
    } else if members.iter().any(|member| member.role == Role::Unknown) {
        Viability::Unknown { why: UnknownViability::DriverUnread }
    } else {
        Viability::Viable
    }
}
