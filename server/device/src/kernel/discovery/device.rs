//! One device: everything that its folder in sysfs says about it.
//!
//! ```text
//!   DeviceName -> sys/bus/BUS/devices/NAME -> attributes, links -> Discovered
//! ```
//!
//! Invariants: a [`Discovered`] is complete in form whatever its folder contains; what could not be read is `None`
//! and, unless its absence is normal, a note says why.
//! Failure paths: the folder is gone, before or meanwhile: there is no such device.

use std::fs;
use std::path::PathBuf;

use serde::Serialize;

use super::attr::{Folder, Note, Problem, entries, hex};
use super::drivers::{self, Facts, Migratable};
use super::group::{self, Group, Role};
use super::holders::{Holders, Scan};
use super::{Bus, DeviceName, Node, PciAddress, SysRoots};

/// The PCI class of bridges, the uppermost of three bytes.
const CLASS_BRIDGE: u32 = 0x06;

/// What is known of a device without opening it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Discovered {
    /// Its name on this node: what an agent's configuration calls it.
    pub name: DeviceName,
    /// The bus on which it sits.
    pub bus: Bus,
    /// Its folder in sysfs, by bus and name.
    pub sysfs: PathBuf,
    /// The driver that is bound to it.
    pub driver: Option<String>,
    /// What the device says it is. PCI only.
    pub ids: Option<PciIds>,
    /// What kind of mdev it is. mdev only.
    pub mdev_type: Option<MdevType>,
    /// The physical function that a virtual function belongs to.
    pub physfn: Option<PciAddress>,
    /// Its IOMMU group. Without one VFIO cannot open the device.
    pub iommu_group: Option<Group>,
    /// The NUMA node that it is close to, for an mdev its parent's. `None` where the firmware does not say.
    pub numa_node: Option<u32>,
    /// Its own node (`/dev/vfio/devices/vfioN`), where sysfs names one. Kernels without cdev support never make it.
    pub cdev: Option<Node>,
    /// Whether it can be expected to save its state, with the reason.
    pub migratable: Migratable,
    /// Who has it open.
    pub holders: Holders,
    /// What could not be found out.
    pub notes: Vec<Note>,
}

/// What a PCI function says it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(into = "ShownIds")]
pub struct PciIds {
    /// Vendor number.
    pub vendor: u16,
    /// Device number, the vendor's own.
    pub device: u16,
    /// The card maker's vendor number.
    pub subsystem_vendor: Option<u16>,
    /// The card maker's own number.
    pub subsystem_device: Option<u16>,
    /// Revision of the silicon.
    pub revision: Option<u8>,
    /// Class, subclass and programming interface, a byte each.
    pub class: Option<u32>,
}

/// [`PciIds`] as people know them: in hexadecimal.
#[derive(Debug, Serialize)]
struct ShownIds {
    vendor: String,
    device: String,
    subsystem_vendor: Option<String>,
    subsystem_device: Option<String>,
    revision: Option<String>,
    class: Option<String>,
}

impl From<PciIds> for ShownIds {
    fn from(ids: PciIds) -> Self {
        let number = |number: u16| format!("{number:#06x}");
        Self {
            vendor: number(ids.vendor),
            device: number(ids.device),
            subsystem_vendor: ids.subsystem_vendor.map(number),
            subsystem_device: ids.subsystem_device.map(number),
            revision: ids.revision.map(|revision| format!("{revision:#04x}")),
            class: ids.class.map(|class| format!("{class:#08x}")),
        }
    }
}

/// What kind of mdev a device is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MdevType {
    /// The type's id (`mtty-1`, `nvidia-1088`).
    pub id: String,
    /// Its name for people, where it has one.
    pub name: Option<String>,
}

impl Discovered {
    /// Whether a VFIO driver is bound, so that the device could be opened.
    pub fn is_vfio(&self) -> bool {
        self.cdev.is_some() || self.driver.as_deref().is_some_and(drivers::is_vfio)
    }

    /// Whether it belongs in a listing: see the module's "What is listed".
    pub(super) fn is_of_interest(&self) -> bool {
        let bridge = self.ids.and_then(|ids| ids.class).is_some_and(|class| class >> 16 == CLASS_BRIDGE);
        let beside_vfio = || {
            self.iommu_group.iter().flat_map(|group| &group.members).any(|member| member.role == Role::Vfio)
        };
        self.bus == Bus::Mdev || self.is_vfio() || self.physfn.is_some() || (!bridge && beside_vfio())
    }
}

/// Everything that sysfs says about one device. `None` where there is no such device.
pub(super) fn inspect(roots: &SysRoots, name: DeviceName, scan: &Scan) -> Option<Discovered> {
    let bus = name.bus();
    let sysfs = roots.bus_devices(bus).join(name.to_string());
    let mut folder = Folder::new(sysfs.clone());
    let driver = folder.link("driver");
    let ids = match bus {
        Bus::Pci => read_ids(&mut folder),
        Bus::Mdev => None,
    };
    let mdev_type = match bus {
        Bus::Pci => None,
        Bus::Mdev => read_mdev_type(&mut folder),
    };
    let physfn = read_physfn(&mut folder);
    // The parent is named by a parsed address, so its folder is looked up like any other device's.
    let parent_driver = physfn.and_then(|physfn| {
        let parent = roots.bus_devices(Bus::Pci).join(physfn.to_string());
        Folder::new(parent).link("driver").ok().flatten()
    });
    let iommu_group = group::read(roots, bus, &mut folder);
    let numa_node = read_numa_node(&mut folder, bus);
    let cdev = read_cdev(roots, &mut folder);
    let migratable = drivers::classify(&Facts {
        bus,
        driver: driver.as_ref().map(Option::as_deref).map_err(|unusable| *unusable),
        in_vfio: cdev.is_some(),
        ids: ids.as_ref(),
        virtual_function: physfn.is_some(),
        parent_driver: parent_driver.as_deref(),
    });
    let driver = driver.ok().flatten();
    let in_vfio = cdev.is_some() || driver.as_deref().is_some_and(drivers::is_vfio);
    let group_node = iommu_group.as_ref().and_then(|group| group.node.name());
    let holders = scan.holders(&name.to_string(), group_node, cdev.as_ref().and_then(Node::name), in_vfio);
    // Asked last: a device that went away while it was read would else be listed as one with nothing to it.
    fs::metadata(&sysfs).ok()?;
    Some(Discovered {
        name,
        bus,
        sysfs,
        driver,
        ids,
        mdev_type,
        physfn,
        iommu_group,
        numa_node,
        cdev,
        migratable,
        holders,
        notes: folder.into_notes(),
    })
}

fn read_ids(folder: &mut Folder) -> Option<PciIds> {
    let mut number = |attribute| folder.parsed(attribute, |text| u16::try_from(hex(text)?).ok());
    let (vendor, device) = (number("vendor"), number("device"));
    let (subsystem_vendor, subsystem_device) = (number("subsystem_vendor"), number("subsystem_device"));
    let revision = folder.parsed("revision", |text| u8::try_from(hex(text)?).ok());
    let class = folder.parsed("class", |text| hex(text).filter(|class| *class <= 0x00ff_ffff));
    Some(PciIds { vendor: vendor?, device: device?, subsystem_vendor, subsystem_device, revision, class })
}

fn read_mdev_type(folder: &mut Folder) -> Option<MdevType> {
    let id = folder.link("mdev_type").ok().flatten()?;
    let name = folder.text("mdev_type/name");
    Some(MdevType { id, name })
}

fn read_physfn(folder: &mut Folder) -> Option<PciAddress> {
    let name = folder.link("physfn").ok().flatten()?;
    let address = name.parse().ok();
    if address.is_none() {
        folder.note("physfn", Problem::Malformed(name));
    }
    address
}

fn read_numa_node(folder: &mut Folder, bus: Bus) -> Option<u32> {
    let attribute = match bus {
        Bus::Pci => "numa_node",
        // An mdev's own folder has none. The kernel resolves `..` through the link, to the parent's folder.
        Bus::Mdev => "../numa_node",
    };
    let node = folder.parsed(attribute, |text| text.parse::<i32>().ok().filter(|node| *node >= -1))?;
    // -1: the firmware does not say.
    u32::try_from(node).ok()
}

fn read_cdev(roots: &SysRoots, folder: &mut Folder) -> Option<Node> {
    let (names, _) = match entries(&folder.path().join("vfio-dev"), 1) {
        Ok(listing) => listing,
        Err(error) => {
            folder.note("vfio-dev", Problem::Unreadable(error.to_string()));
            return None;
        }
    };
    let name = names.into_iter().next()?;
    Some(Node::at(roots.vfio_dir().join("devices").join(name), folder))
}
