//! What the agent may lock and open: its own limits where it runs here, else those of this shell.

use std::fs;
use std::path::Path;

use rustix::process::{Resource, getrlimit};

use super::finding::{Finding, ok, warn};
use super::node::read;
use crate::render;

/// What the kernel calls the agent: names are cut after 15 bytes.
const AGENT_COMM: &str = "vfio-checkpoint";
/// Memory that devices write by DMA is locked. Less than this is the default of a shell, and too little for any.
const MIN_MEMLOCK_BYTES: u64 = 64 << 20;
/// A device takes up to eight files, and a connection one.
const MIN_FILES: u64 = 1024;

/// Soft limits; None is unlimited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Limits {
    memlock_bytes: Option<u64>,
    files: Option<u64>,
}

pub(super) fn check(root: &Path) -> Vec<Finding> {
    if let Some((pid, limits)) = agent(root) {
        return judge(&format!("of the agent (process {pid})"), limits);
    }
    let limits = Limits {
        memlock_bytes: getrlimit(Resource::Memlock).current,
        files: getrlimit(Resource::Nofile).current,
    };
    judge("of this shell, as no agent is seen to run here", limits)
}

fn judge(whose: &str, limits: Limits) -> Vec<Finding> {
    let text = |limit: Option<u64>, show: fn(u64) -> String| limit.map_or("unlimited".to_owned(), show);
    let memory = format!("{} {whose}", text(limits.memlock_bytes, render::bytes));
    let files = format!("{} {whose}", text(limits.files, |count| count.to_string()));
    vec![
        if limits.memlock_bytes.is_none_or(|bytes| bytes >= MIN_MEMLOCK_BYTES) {
            ok("locked memory", memory)
        } else {
            let mend = "set LimitMEMLOCK=infinity in the agent's unit, or give it CAP_IPC_LOCK";
            warn("locked memory", memory, mend)
        },
        if limits.files.is_none_or(|count| count >= MIN_FILES) {
            ok("open files", files)
        } else {
            warn("open files", files, "set LimitNOFILE=65536 in the agent's unit")
        },
    ]
}

/// The limits of an agent that runs here.
fn agent(root: &Path) -> Option<(u32, Limits)> {
    let processes = fs::read_dir(root.join("proc")).ok()?;
    let pids = processes.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    for pid in pids {
        if read(root, &format!("proc/{pid}/comm")).as_deref() != Some(AGENT_COMM) {
            continue;
        }
        // The holder has the same name and is not what maps memory.
        let line = read(root, &format!("proc/{pid}/cmdline")).unwrap_or_default();
        if line.split('\0').nth(1) != Some("serve") {
            continue;
        }
        if let Some(limits) = read(root, &format!("proc/{pid}/limits")).and_then(|text| parse(&text)) {
            return Some((pid, limits));
        }
    }
    None
}

/// Out of `/proc/PID/limits`.
fn parse(text: &str) -> Option<Limits> {
    let soft = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        match line.split_whitespace().next()? {
            "unlimited" => Some(None),
            number => number.parse().ok().map(Some),
        }
    };
    Some(Limits { memlock_bytes: soft("Max locked memory")?, files: soft("Max open files")? })
}

#[cfg(test)]
mod tests {
    use super::super::finding::Level;
    use super::*;

    #[test]
    fn limits_are_read_and_judged() {
        let text = "Limit                     Soft Limit           Hard Limit           Units     \n\
            Max open files            512                  524288               files     \n\
            Max locked memory         unlimited            unlimited            bytes     \n";
        let limits = parse(text).unwrap();
        assert_eq!(limits, Limits { memlock_bytes: None, files: Some(512) });
        let levels = |limits| judge("", limits).into_iter().map(|finding| finding.level).collect::<Vec<_>>();
        assert_eq!(levels(limits), [Level::Ok, Level::Warn]);
        let small = Limits { memlock_bytes: Some(8 << 20), files: None };
        assert_eq!(levels(small), [Level::Warn, Level::Ok]);
        assert_eq!(parse("Max open files 5"), None);
    }
}
