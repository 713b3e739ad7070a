//! What stands between a discovered device and an agent that would own it.
//!
//! ```text
//!   Discovered --blockers()--> every refusal at once, each a value with a sentence
//! ```
//!
//! Invariants: only what is known to stand in the way is a blocker; an unknown (a verdict of `UNKNOWN`, a viability
//! that could not be read, processes that could not be looked at) is none, because opening the device would tell.
//! Failure paths: none; a pure function of what was discovered.

use std::fmt;

use serde::Serialize;

use super::drivers::{Reason, Verdict};
use super::group::{self, GroupKind, Member, Viability};
use super::{Discovered, Process};

/// A reason why an agent could not own this device as things stand.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "blocker", rename_all = "snake_case")]
pub enum Blocker {
    /// The device cannot save its state with the driver that it has.
    NotMigratable {
        /// Why not.
        reason: Reason,
    },
    /// The device has no IOMMU group, so VFIO cannot open it.
    NoGroup,
    /// Other members of the group are bound to kernel drivers, so VFIO cannot own it.
    GroupNotViable {
        /// The group's number.
        group: u32,
        /// The members in the way, this device excepted.
        blocked_by: Vec<Member>,
    },
    /// No IOMMU confines the device's DMA.
    NoIommu {
        /// The group's number.
        group: u32,
    },
    /// VFIO serves the device, but neither its group nor the device itself has a node.
    NoNode,
    /// Other processes have it open.
    Held {
        /// Which.
        by: Vec<Process>,
    },
}

impl fmt::Display for Blocker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotMigratable { reason } => write!(f, "not migratable: {reason}"),
            Self::NoGroup => f.write_str(
                "no IOMMU group: VFIO cannot open the device; enable the IOMMU in the firmware and on the kernel's \
                 command line",
            ),
            Self::GroupNotViable { group, blocked_by } => write!(
                f,
                "IOMMU group {group} is not viable: {} bound to a kernel driver; unbind every such member or bind it \
                 to vfio-pci",
                group::list(blocked_by)
            ),
            Self::NoIommu { group } => {
                write!(f, "group {group} has no IOMMU: nothing would confine the device's DMA, so it is not used")
            }
            Self::NoNode => {
                f.write_str("no node in /dev/vfio leads to the device; is /dev the host's own, with devtmpfs?")
            }
            Self::Held { by } => {
                f.write_str("held open by")?;
                for (i, Process { pid, comm }) in by.iter().enumerate() {
                    let comm = comm.as_deref().unwrap_or("unknown");
                    write!(f, "{} {comm} (pid {pid})", if i == 0 { "" } else { "," })?;
                }
                Ok(())
            }
        }
    }
}

impl Discovered {
    /// Everything that is known to stand in the way of owning this device and saving its state.
    pub fn blockers(&self) -> Vec<Blocker> {
        let mut blockers = Vec::new();
        if self.migratable.verdict() == Verdict::No {
            blockers.push(Blocker::NotMigratable { reason: self.migratable.reason().clone() });
        }
        match &self.iommu_group {
            None => blockers.push(Blocker::NoGroup),
            Some(group) => {
                match &group.viability {
                    Viability::NotViable { blocked_by } => {
                        // Its own driver is what the verdict is about; only the neighbours are news.
                        let name = self.name.to_string();
                        let blocked_by: Vec<Member> =
                            blocked_by.iter().filter(|member| member.name != name).cloned().collect();
                        if !blocked_by.is_empty() {
                            blockers.push(Blocker::GroupNotViable { group: group.id, blocked_by });
                        }
                    }
                    Viability::Viable | Viability::Unknown { .. } => {}
                }
                match group.kind {
                    GroupKind::NoIommu => blockers.push(Blocker::NoIommu { group: group.id }),
                    GroupKind::Iommu | GroupKind::Emulated => {}
                }
                let has_node = group.node.exists || self.cdev.as_ref().is_some_and(|cdev| cdev.exists);
                if self.is_vfio() && !has_node {
                    blockers.push(Blocker::NoNode);
                }
            }
        }
        let others: Vec<Process> = self
            .holders
            .processes
            .iter()
            .map(|holder| holder.process.clone())
            .filter(|process| process.pid != std::process::id())
            .collect();
        if !others.is_empty() {
            blockers.push(Blocker::Held { by: others });
        }
        blockers
    }
}
