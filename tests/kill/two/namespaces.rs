//! A link of a rate between two network namespaces.
//!
//! ```text
//!   whoever makes it, in a namespace of its own: link0, tbf == veth == link0, tbf: the far namespace, kept by a process
//! ```
//! Namespaces have no names: they and what is in them are gone with the last process in them, however it ends. Nobody else
//! has a port in them.

use std::io::{BufRead as _, BufReader};
use std::net::Ipv4Addr;
use std::process::{Child, Command, Stdio};

/// The address of whoever makes the link.
pub(crate) const NEAR: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 1);
/// The address at its far end.
pub(crate) const FAR: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 2);
/// What a namespace must be able to do before anything is built on it.
pub(crate) const PREPARE: &str = "ip link set lo up && tc qdisc add dev lo root tbf rate 1gbit burst 256kb latency 50ms && \
                                  tc qdisc del dev lo root";

/// What a link lets through.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rate {
    pub(crate) kbit_s: u64,
    /// So much passes at once.
    pub(crate) burst_bytes: u64,
}

/// The far namespace, and the link to it.
#[derive(Debug)]
pub(crate) struct Far {
    /// Ends when nobody holds its standard input any more.
    keeper: Child,
}

impl Far {
    /// A link that lets so much through, each way.
    pub(crate) fn new(rate: Rate) -> Result<Self, String> {
        let mut command = Command::new("unshare");
        command.args(["--net", "sh", "-c", "echo kept; exec cat"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let keeper = command.spawn().map_err(|error| format!("unshare: {error}"))?;
        let mut far = Self { keeper };
        let said = far.keeper.stdout.as_mut().map(|said| BufReader::new(said).lines().next());
        if !matches!(said, Some(Some(Ok(line))) if line == "kept") {
            return Err("unshare --net: no namespace".to_owned());
        }
        far.link(rate)?;
        Ok(far)
    }

    fn link(&self, rate: Rate) -> Result<(), String> {
        let pid = self.keeper.id().to_string();
        let (bits, burst) = (format!("{}kbit", rate.kbit_s), format!("{}b", rate.burst_bytes));
        let shape = [
            "tc", "qdisc", "add", "dev", "link0", "root", "tbf", "rate", &bits, "burst", &burst, "latency",
            "50ms",
        ];
        let (near, far) = (format!("{NEAR}/30"), format!("{FAR}/30"));
        let up = ["ip", "link", "set", "link0", "up"];
        run(Command::new("ip")
            .args(["link", "add", "link0", "type", "veth"])
            .args(["peer", "name", "link0", "netns", &pid]))?;
        for (here, command) in [
            (true, &["ip", "addr", "add", &near, "dev", "link0"][..]),
            (true, &up),
            (true, &shape),
            (false, &["ip", "link", "set", "lo", "up"]),
            (false, &["ip", "addr", "add", &far, "dev", "link0"]),
            (false, &up),
            (false, &shape),
        ] {
            let mut asked = Command::new(command[0]);
            asked.args(&command[1..]);
            run(&mut if here { asked } else { self.there(&asked) })?;
        }
        Ok(())
    }

    /// The same command, at the far end.
    pub(crate) fn there(&self, command: &Command) -> Command {
        let mut there = Command::new("nsenter");
        there.args(["-t", &self.keeper.id().to_string(), "-n"]);
        there.arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => there.env(name, value),
                None => there.env_remove(name),
            };
        }
        there
    }

    /// The link is cut at its far end, or whole again: what is sent meanwhile is lost, and nobody is told.
    pub(crate) fn set_up(&self, is_up: bool) {
        let mut set = Command::new("ip");
        set.args(["link", "set", "link0", if is_up { "up" } else { "down" }]);
        run(&mut self.there(&set)).unwrap();
    }
}

impl Drop for Far {
    fn drop(&mut self) {
        let _ = self.keeper.kill();
        let _ = self.keeper.wait();
    }
}

fn run(command: &mut Command) -> Result<(), String> {
    match command.stdin(Stdio::null()).output() {
        Ok(ended) if ended.status.success() => Ok(()),
        Ok(ended) => Err(format!("{command:?}: {}", String::from_utf8_lossy(&ended.stderr).trim())),
        Err(error) => Err(format!("{command:?}: {error}")),
    }
}
