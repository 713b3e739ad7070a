//! `vfioctl doctor`: what is wrong with this node, this caller and its agent, and how to mend it.
//!
//! ```text
//!   node    sysfs and proc below a root: kernel, IOMMU, VFIO, drivers, limits, holder, store     opens no device
//!   caller  the certificates of the options, the environment or the context
//!   agent   a connection, its health, its clock
//! ```
//!
//! Invariants: nothing is changed, and no VFIO device is opened, because opening one resets it. What cannot be found out
//! is said to be so, and is never OK. Failure paths: each check ends in a [`Finding`]; one FAIL makes the exit code 1.

mod agent;
mod certificates;
mod finding;
mod limits;
mod node;
mod place;

#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::time::SystemTime;

use clap::{Args, ValueEnum};
use serde::Serialize;

use crate::cli::Global;
use crate::connection::Settings;
use crate::outcome::{Exit, Failure};
use crate::render;
use finding::{Finding, Level};

/// Find out what is wrong, and how to mend it.
#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// Only this part; may be given again
    #[arg(long, value_name = "PART")]
    only: Vec<Part>,
    /// The socket of the holder, as in the agent's configuration
    #[arg(long, value_name = "SOCKET", default_value = "/run/vfio-checkpoint/holder.sock")]
    holder: PathBuf,
    /// The folder of the agent's store
    #[arg(long, value_name = "DIR", default_value = "/var/lib/vfio-checkpoint/checkpoints")]
    store: PathBuf,
    /// Where the node's files are: another root than /, such as a node's file system in a debug container
    #[arg(long, value_name = "DIR", default_value = "/")]
    root: PathBuf,
}

/// What is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// This machine, as a node with devices and an agent
    Node,
    /// The caller's certificates
    Caller,
    /// The agent: whether it is reached, how it is, and its clock
    Agent,
}

#[derive(Debug, Serialize)]
struct Report {
    is_well: bool,
    findings: Vec<Finding>,
}

pub(crate) async fn run(global: &Global, args: DoctorArgs) -> Result<Exit, Failure> {
    let is_wanted = |part| args.only.is_empty() || args.only.contains(&part);
    let mut findings = Vec::new();
    if is_wanted(Part::Node) {
        let (root, holder, store) = (args.root.clone(), args.holder.clone(), args.store.clone());
        let looked = tokio::task::spawn_blocking(move || {
            let mut findings = node::check(&root);
            findings.extend(limits::check(&root));
            findings.push(place::holder(&root, &holder));
            findings.extend(place::store(&root, &store));
            findings
        });
        findings.extend(looked.await.map_err(|error| Failure::new(Exit::Failed, error))?);
        if args.only.is_empty() && !args.root.join("sys/module/vfio").exists() {
            render::say(
                "if this machine is no node with devices, look at the rest alone: vfioctl doctor --only caller --only agent",
            );
        }
    }
    if is_wanted(Part::Caller) || is_wanted(Part::Agent) {
        let settings = Settings::of(global)?;
        if is_wanted(Part::Caller) {
            findings.extend(certificates::check(&settings, SystemTime::now()));
        }
        if is_wanted(Part::Agent) {
            let has_pair = !findings.iter().any(|found| found.is_failed(certificates::PAIR));
            findings.extend(agent::check(&settings, global, has_pair).await);
        }
    }
    let report = Report { is_well: findings.iter().all(|finding| finding.level != Level::Fail), findings };
    let has_colours = render::has_colours();
    render::print(global.output_format, |_| finding::table(&report.findings, has_colours), &report)?;
    Ok(if report.is_well { Exit::Done } else { Exit::Failed })
}
