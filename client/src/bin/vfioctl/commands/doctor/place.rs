//! What the agent needs beside devices: the holder's socket, and a store with room.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{StatVfsMountFlags, statvfs};
use vfio_checkpoint_store::key::MARKER;

use super::finding::{Finding, fail, ok, warn};
use super::node::read;
use crate::render;

/// In `/proc/net/unix`: somebody listens.
const LISTENS: u64 = 0x1_0000;
/// Less than this is little.
const LITTLE_BYTES: u64 = 1 << 30;

/// An absolute path, below another root.
fn below(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

/// The holder, which keeps devices open while the agent restarts. It is not connected to: it serves one agent.
pub(super) fn holder(root: &Path, socket: &Path) -> Finding {
    const CHECK: &str = "holder";
    let shown = socket.display();
    let start = "start `vfio-checkpointd hold --socket PATH` before the agent, and set holder.socket; without it every \
        device is reset when the agent ends";
    match fs::symlink_metadata(below(root, socket)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            warn(CHECK, format!("there is no socket {shown}"), start)
        }
        Err(error) => {
            warn(CHECK, format!("{shown} cannot be looked at: {error}"), "run this as the agent's user")
        }
        Ok(metadata) if !metadata.file_type().is_socket() => {
            fail(CHECK, format!("{shown} is no socket"), "remove it, and start the holder anew")
        }
        Ok(_) => match read(root, "proc/net/unix").map(|table| is_listened(&table, socket)) {
            Some(true) => ok(CHECK, format!("it listens on {shown}")),
            Some(false) => fail(CHECK, format!("nobody listens on {shown}; the holder is gone"), start),
            None => {
                warn(CHECK, format!("whether anybody listens on {shown} cannot be told"), "mount /proc here")
            }
        },
    }
}

fn is_listened(table: &str, socket: &Path) -> bool {
    // Num: RefCount Protocol Flags Type St Inode Path
    table.lines().any(|line| {
        let mut fields = line.split_whitespace();
        let flags = fields.nth(3).and_then(|flags| u64::from_str_radix(flags, 16).ok());
        let path = fields.nth(3);
        flags.is_some_and(|flags| flags & LISTENS != 0) && path.is_some_and(|path| Path::new(path) == socket)
    })
}

/// The folder of a store, and its space.
pub(super) fn store(root: &Path, folder: &Path) -> Vec<Finding> {
    const CHECK: &str = "store";
    let shown = folder.display();
    let real = below(root, folder);
    let metadata = match fs::metadata(&real) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let mend =
                "nothing, if the agent has not run yet or keeps checkpoints elsewhere; else give --store DIR";
            return vec![warn(CHECK, format!("there is no folder {shown}"), mend)];
        }
        Err(error) => {
            let mend = "run this as the agent's user";
            return vec![warn(CHECK, format!("{shown} cannot be looked at: {error}"), mend)];
        }
    };
    let mut findings = Vec::new();
    if !metadata.is_dir() {
        return vec![fail(CHECK, format!("{shown} is no folder"), "give the agent a folder of its own")];
    }
    let is_empty = || fs::read_dir(&real).is_ok_and(|mut entries| entries.next().is_none());
    if metadata.mode() & 0o077 != 0 {
        let mend = format!("chmod 700 {shown}: device state may hold secrets");
        findings.push(warn(CHECK, format!("others than its owner can reach {shown}"), mend));
    } else if fs::symlink_metadata(real.join(MARKER)).is_ok_and(|marker| marker.is_file()) {
        findings.push(ok(CHECK, format!("{shown} is a store")));
    } else if is_empty() {
        findings.push(ok(CHECK, format!("{shown} is empty, and becomes a store when it is first used")));
    } else {
        let mend = "give the agent a folder of its own; run this as the agent's user if it is that";
        findings.push(warn(CHECK, format!("{shown} is not seen to be a store"), mend));
    }
    findings.push(match statvfs(&real) {
        Ok(stat) => {
            let (free, total) =
                (stat.f_bavail.saturating_mul(stat.f_frsize), stat.f_blocks.saturating_mul(stat.f_frsize));
            space(free, total, stat.f_flag.contains(StatVfsMountFlags::RDONLY))
        }
        Err(error) => {
            warn("store space", format!("it cannot be told: {error}"), "run this as the agent's user")
        }
    });
    findings
}

fn space(free_bytes: u64, total_bytes: u64, is_read_only: bool) -> Finding {
    const CHECK: &str = "store space";
    let detail = format!("{} of {} are free", render::bytes(free_bytes), render::bytes(total_bytes));
    let mend = "delete checkpoints and let the agent collect, or give the store a larger disk";
    if is_read_only {
        fail(CHECK, "the file system is mounted read-only", "look why, and mount it for writing")
    } else if free_bytes == 0 {
        fail(CHECK, detail, mend)
    } else if free_bytes < LITTLE_BYTES {
        warn(CHECK, detail, mend)
    } else {
        ok(CHECK, detail)
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Level;
    use super::*;

    #[test]
    fn only_a_socket_that_is_listened_on_is_one() {
        let table = "Num       RefCount Protocol Flags    Type St Inode Path\n\
            0000000000000000: 00000002 00000000 00010000 0005 01 12345 /run/holder.sock\n\
            0000000000000000: 00000003 00000000 00000000 0005 03 12346 /run/other.sock\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 12347\n";
        assert!(is_listened(table, Path::new("/run/holder.sock")));
        assert!(!is_listened(table, Path::new("/run/other.sock")));
        assert!(!is_listened(table, Path::new("/run")));
    }

    #[test]
    fn space_is_judged() {
        assert_eq!(space(2 << 30, 4 << 30, false).level, Level::Ok);
        assert_eq!(space(2 << 20, 4 << 30, false).level, Level::Warn);
        assert_eq!(space(0, 4 << 30, false).level, Level::Fail);
        assert_eq!(space(2 << 30, 4 << 30, true).level, Level::Fail);
    }
}
