//! `list` and `info`: what sysfs and /proc show. Nothing is opened.

use serde::Serialize;
use vfio_checkpoint_device::chain;
use vfio_checkpoint_device::kernel::discovery::{Blocker, Discovered, SysRoots, discover, find};

use crate::args::Output;
use crate::failure::CommandFailure;
use crate::output::{line, print_json, print_table};

/// One device with what stands in its way, as JSON.
#[derive(Serialize)]
struct Entry {
    #[serde(flatten)]
    device: Discovered,
    blockers: Vec<Blocker>,
}

impl From<Discovered> for Entry {
    fn from(device: Discovered) -> Self {
        Self { blockers: device.blockers(), device }
    }
}

pub(crate) fn list(output: Output) -> Result<(), CommandFailure> {
    let found = discover(&SysRoots::default()).map_err(|error| CommandFailure::failed(&error))?;
    let entries: Vec<Entry> = found.into_iter().map(Entry::from).collect();
    match output {
        Output::Json => print_json(&entries),
        Output::Table => {
            let header = ["DEVICE", "DRIVER", "GROUP", "NUMA", "MIGRATABLE", "HELD BY"].map(str::to_owned);
            let rows: Vec<[String; 6]> = entries.iter().map(|entry| row(&entry.device)).collect();
            print_table(&header, &rows)?;
            if rows.is_empty() {
                eprintln!("no VFIO device, virtual function or mediated device on this node");
            }
            Ok(())
        }
    }
}

pub(crate) fn info(name: &str, output: Output) -> Result<(), CommandFailure> {
    let device = find(&SysRoots::default(), name).map_err(|error| CommandFailure::blocked(chain(&error)))?;
    let entry = Entry::from(device);
    match output {
        Output::Json => print_json(&entry),
        Output::Table => {
            let header = ["DEVICE", "DRIVER", "GROUP", "NUMA", "MIGRATABLE", "HELD BY"];
            for (name, value) in header.into_iter().zip(row(&entry.device)) {
                line(format_args!("{name:<11} {value}"))?;
            }
            line(format_args!("{:<11} {}", "WHY", entry.device.migratable.reason()))?;
            for blocker in &entry.blockers {
                line(format_args!("{:<11} {blocker}", "BLOCKED BY"))?;
            }
            for note in &entry.device.notes {
                line(format_args!("{:<11} {note}", "NOTE"))?;
            }
            Ok(())
        }
    }
}

fn row(device: &Discovered) -> [String; 6] {
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    let holders: Vec<String> = device
        .holders
        .processes
        .iter()
        .map(|holder| {
            let name = holder.process.comm.as_deref().unwrap_or("?");
            format!("{name} ({})", holder.process.pid)
        })
        .collect();
    [
        device.name.to_string(),
        or_dash(device.driver.clone()),
        or_dash(device.iommu_group.as_ref().map(|group| format!("{} ({})", group.id, group.viability))),
        or_dash(device.numa_node.map(|node| node.to_string())),
        device.migratable.verdict().to_string(),
        or_dash((!holders.is_empty()).then(|| holders.join(", "))),
    ]
}
