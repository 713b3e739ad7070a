//! Who holds a VFIO device open, as far as `/proc` tells.
//!
//! ```text
//!   proc/PID/fd/N --readlink--> /dev/vfio/12              -> a holder of every device of group 12
//!                               /dev/vfio/devices/vfio3   -> a holder of that device
//!                               anon_inode:[vfio-device]  -> proc/PID/fdinfo/N: vfio-device-syspath (since 6.18)
//!                                                            or nothing: somebody's device, nobody knows which
//! ```
//!
//! Invariants: links are read and never followed, so nothing is opened but `comm` and `fdinfo`; the scan is bounded in
//! processes and descriptors. A process is listed whoever it is: this one, a holder process, a VMM.
//! Failure paths: a process that exits midway is no holder any more and is skipped; one that may not be looked at
//! (another user's, without `CAP_SYS_PTRACE`) is counted; without `/proc` nothing is known. All of it is in
//! [`Coverage`], because "nobody" and "nobody that could be seen" are different answers.
//!
//! What it cannot see: processes outside this PID namespace; threads that no longer share their process's
//! descriptors; a node opened under another name; a descriptor in flight over a socket.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::Path;

use serde::Serialize;

use super::attr::{entries, read_bounded};

/// How many entries of `/proc` are looked at: all processes, and a few files.
const MAX_PROCESSES: usize = 1 << 17;

/// How many descriptors of one process are looked at.
const MAX_DESCRIPTORS: usize = 1 << 16;

/// How many characters of a process's name are kept. The kernel's limit is 15.
const MAX_COMM_CHARS: usize = 64;

/// What a device's own descriptor is called when it came out of a group.
const ANONYMOUS_DEVICE: &str = "anon_inode:[vfio-device]";

/// The processes that hold a device, and how much that list is worth.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Holders {
    /// The processes that were seen to hold it, by pid.
    pub processes: Vec<Holder>,
    /// What could not be seen.
    pub coverage: Coverage,
}

/// A process that holds a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Holder {
    /// Which process.
    #[serde(flatten)]
    pub process: Process,
    /// How that is known.
    pub evidence: Vec<Evidence>,
}

/// A process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Process {
    /// Its id, in the PID namespace that `/proc` shows.
    pub pid: u32,
    /// Its name, where it was still there to be read.
    pub comm: Option<String>,
}

/// How it is known that a process holds a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Evidence {
    /// It has the group open, so nobody else can open any device of the group that way.
    Group,
    /// It has the device's own node open.
    Cdev,
    /// It has a descriptor that the kernel says is this device's.
    Fdinfo,
}

/// What a list of holders leaves out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "status", rename_all = "snake_case")]
pub enum Coverage {
    /// Every process in this PID namespace was looked at.
    Complete,
    /// Some could not be.
    Partial {
        /// So many processes may not be looked at.
        unreadable_processes: usize,
        /// These hold some VFIO device, and the kernel does not say which.
        unattributed: Vec<Process>,
        /// There were more processes or descriptors than are looked at.
        truncated: bool,
    },
    /// `/proc` cannot be read at all.
    Unavailable {
        /// Why not.
        error: String,
    },
}

/// One pass over `/proc`, from which the holders of every device are looked up.
#[derive(Debug, Default)]
pub(super) struct Scan {
    groups: Sightings,
    cdevs: Sightings,
    devices: Sightings,
    unattributed: BTreeSet<u32>,
    names: BTreeMap<u32, Option<String>>,
    unreadable_processes: usize,
    truncated: bool,
    unavailable: Option<String>,
}

/// The last component of a node or device, and the processes that hold it.
type Sightings = BTreeMap<String, BTreeSet<u32>>;

/// What a descriptor is.
enum Descriptor {
    Group(String),
    Cdev(String),
    AnonymousDevice,
    Other,
}

/// Looks at every descriptor of every process.
pub(super) fn scan(proc: &Path) -> Scan {
    let mut scan = Scan::default();
    match fs::symlink_metadata(proc).and_then(|_| entries(proc, MAX_PROCESSES)) {
        Ok((names, complete)) => {
            scan.truncated = !complete;
            for pid in names.iter().filter_map(|name| name.parse::<u32>().ok()) {
                scan.process(pid, &proc.join(pid.to_string()));
            }
        }
        Err(error) => scan.unavailable = Some(error.to_string()),
    }
    scan
}

impl Scan {
    fn process(&mut self, pid: u32, folder: &Path) {
        match self.descriptors(pid, folder) {
            Ok(()) => {}
            // It has exited, or is just doing so.
            Err(error) if is_gone(&error) => {}
            Err(error) => {
                tracing::trace!(pid, %error, "cannot see what a process holds");
                self.unreadable_processes += 1;
            }
        }
    }

    fn descriptors(&mut self, pid: u32, folder: &Path) -> io::Result<()> {
        let (numbers, complete) = entries(&folder.join("fd"), MAX_DESCRIPTORS)?;
        self.truncated |= !complete;
        let (mut holds_group, mut holds_unnamed) = (false, false);
        for number in numbers {
            let target = match fs::read_link(folder.join("fd").join(&number)) {
                Ok(target) => target,
                Err(error) if is_gone(&error) => continue,
                Err(error) => return Err(error),
            };
            let (sightings, name) = match descriptor(&target.to_string_lossy()) {
                Descriptor::Group(node) => {
                    holds_group = true;
                    (&mut self.groups, Some(node))
                }
                Descriptor::Cdev(node) => (&mut self.cdevs, Some(node)),
                Descriptor::AnonymousDevice => {
                    (&mut self.devices, device_of(&folder.join("fdinfo").join(&number)))
                }
                Descriptor::Other => continue,
            };
            if let Some(name) = name {
                sightings.entry(name).or_default().insert(pid);
            } else {
                holds_unnamed = true;
            }
            self.names.entry(pid).or_insert_with(|| comm(folder));
        }
        // Where the process has a group as well, its devices came out of that one and are accounted for.
        if holds_unnamed && !holds_group {
            self.unattributed.insert(pid);
        }
        Ok(())
    }

    /// Who holds the device with this name, this group node and this node of its own. `in_vfio` says whether VFIO
    /// serves the device: a descriptor of unknown origin cannot be of one that it does not serve.
    pub(super) fn holders(
        &self,
        device: &str,
        group_node: Option<&str>,
        cdev: Option<&str>,
        in_vfio: bool,
    ) -> Holders {
        let mut found: BTreeMap<u32, Vec<Evidence>> = BTreeMap::new();
        let by_group = group_node.and_then(|node| self.groups.get(node));
        let by_cdev = cdev.and_then(|node| self.cdevs.get(node));
        let by_fdinfo = self.devices.get(device);
        for (pids, evidence) in
            [(by_group, Evidence::Group), (by_cdev, Evidence::Cdev), (by_fdinfo, Evidence::Fdinfo)]
        {
            for pid in pids.into_iter().flatten() {
                found.entry(*pid).or_default().push(evidence);
            }
        }
        let coverage = self.coverage(in_vfio, &found);
        let processes =
            found.into_iter().map(|(pid, evidence)| Holder { process: self.named(pid), evidence }).collect();
        Holders { processes, coverage }
    }

    fn coverage(&self, in_vfio: bool, found: &BTreeMap<u32, Vec<Evidence>>) -> Coverage {
        if let Some(error) = &self.unavailable {
            return Coverage::Unavailable { error: error.clone() };
        }
        let unattributed: Vec<Process> = self
            .unattributed
            .iter()
            .filter(|pid| in_vfio && !found.contains_key(pid))
            .map(|pid| self.named(*pid))
            .collect();
        let (unreadable_processes, truncated) = (self.unreadable_processes, self.truncated);
        if unreadable_processes == 0 && unattributed.is_empty() && !truncated {
            Coverage::Complete
        } else {
            Coverage::Partial { unreadable_processes, unattributed, truncated }
        }
    }

    fn named(&self, pid: u32) -> Process {
        Process { pid, comm: self.names.get(&pid).cloned().flatten() }
    }
}

/// What the target of a descriptor's link is. A process in a container shows the path that it sees itself, which is
/// the same one wherever the node was passed in under its own name.
fn descriptor(target: &str) -> Descriptor {
    // The kernel appends this where the node was removed while it is open; the device is still held.
    let target = target.strip_suffix(" (deleted)").unwrap_or(target);
    if target == ANONYMOUS_DEVICE {
        return Descriptor::AnonymousDevice;
    }
    let Some(node) = target.strip_prefix("/dev/vfio/") else { return Descriptor::Other };
    let number = node.strip_prefix("noiommu-").unwrap_or(node);
    match node.strip_prefix("devices/") {
        Some(node) if !node.is_empty() && !node.contains('/') => Descriptor::Cdev(node.to_owned()),
        // `/dev/vfio/vfio` is a container, which is of no device yet.
        None if number.parse::<u32>().is_ok() => Descriptor::Group(node.to_owned()),
        Some(_) | None => Descriptor::Other,
    }
}

/// The device whose descriptor this is, from its `fdinfo`.
fn device_of(fdinfo: &Path) -> Option<String> {
    let text = read_bounded(fdinfo).ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("vfio-device-syspath:"))?;
    Some(path.trim().rsplit('/').next()?.to_owned()).filter(|name| !name.is_empty())
}

fn comm(folder: &Path) -> Option<String> {
    let text = read_bounded(&folder.join("comm")).ok()?;
    // A process chooses its own name: nothing in it may reach a terminal as a control sequence.
    let clean = |c: char| if c.is_control() { '?' } else { c };
    Some(text.trim_end_matches('\n').chars().take(MAX_COMM_CHARS).map(clean).collect())
}

fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}
