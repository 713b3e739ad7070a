//! What is between the two agents: a link of a rate.
//!
//! ```text
//!   this program --unshare--> this program, in namespace A: harness, source -- veth, tbf -- namespace B: destination
//!   where that is not to be had: source -- token-bucket relay in the harness -- destination, all on loopback
//! ```
//! Namespaces have no names: they and what is in them are gone with the last process in them, however it ends. Which of the
//! two ways a run had is in its document.

use std::env;
use std::io::Write as _;
use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Stdio};

use crate::child::Child;
use crate::relay::Relay;

/// Says to this program that it is in a namespace of its own.
const INSIDE: &str = "MIGRATION_BENCH_NAMESPACE";
const NEAR: &str = "192.168.77.1/30";
const FAR: &str = "192.168.77.2";
/// What the document calls the two ways.
const NAMESPACES: &str = "namespaces";
const RELAY: &str = "relay";

/// Runs this program again in a network namespace of its own, where the machine lets it have one, and ends with it.
pub(crate) fn enter(arguments: &[String]) {
    if env::var_os(INSIDE).is_some() {
        return run(&["ip", "link", "set", "lo", "up"]).expect("loopback");
    }
    let ways: [&[&str]; 2] = [&["--net"], &["--user", "--map-root-user", "--net"]];
    let can = "ip link set lo up && tc qdisc add dev lo root tbf rate 1gbit burst 256kb latency 50ms";
    for way in ways {
        let mut tried = Command::new("unshare");
        tried
            .args(way)
            .args(["sh", "-c", can])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        if tried.status().is_ok_and(|status| status.success()) {
            let mut inside = Command::new("unshare");
            inside.args(way).arg(env::current_exe().unwrap()).args(arguments).env(INSIDE, "1");
            let ended = inside.status().unwrap();
            std::process::exit(ended.code().unwrap_or(1));
        }
    }
    eprintln!("no network namespaces with a shaped link here: a relay in this process stands in");
}

/// A link of a rate.
pub(crate) struct Link {
    mbit_s: u64,
    /// Keeps the far namespace, where there is one.
    far: Option<Child>,
}

impl Link {
    pub(crate) fn new(mbit_s: u64) -> Self {
        if env::var_os(INSIDE).is_none() {
            return Self { mbit_s, far: None };
        }
        let mut unshare = Command::new("unshare");
        unshare.arg("--net").arg(env::current_exe().unwrap()).arg("keep");
        let mut far = Child::of(&mut unshare);
        far.hear();
        match veth(&far, mbit_s) {
            Ok(()) => Self { mbit_s, far: Some(far) },
            Err(why) => {
                eprintln!("no shaped link: {why}; a relay in this process stands in");
                Self { mbit_s, far: None }
            }
        }
    }

    /// How it is made.
    pub(crate) fn kind(&self) -> &'static str {
        if self.far.is_some() { NAMESPACES } else { RELAY }
    }

    /// Where the far end listens.
    pub(crate) fn listen(&self) -> String {
        let host = if self.far.is_some() { FAR } else { "127.0.0.1" };
        format!("{host}:0")
    }

    /// A process at the far end.
    pub(crate) fn start(&self, arguments: &[&str]) -> Child {
        let Some(far) = &self.far else { return Child::start(arguments) };
        let mut command = Command::new("nsenter");
        command.args(["-t", &far.id().to_string(), "-n"]);
        Child::of(command.arg(env::current_exe().unwrap()).args(arguments))
    }

    /// Where somebody who listens at the far end is reached over the link.
    pub(crate) async fn to(&self, address: SocketAddr) -> SocketAddr {
        if self.far.is_some() {
            return address;
        }
        Relay::start(address, Some(self.mbit_s * 1_000_000 / 8), None).await
    }

    /// What one TCP connection gets through, in Mbit/s: whether the rate is what it is to be.
    pub(crate) async fn measure(&self, mib: usize) -> f64 {
        let mut taker = self.start(&["take", &self.listen()]);
        let address = self.to(taker.hear().parse().unwrap()).await;
        let sending = tokio::task::spawn_blocking(move || {
            let mut stream = TcpStream::connect(address).unwrap();
            let block = vec![0xA5; 1 << 20];
            for _ in 0..mib {
                stream.write_all(&block).unwrap();
            }
        });
        sending.await.unwrap();
        let bytes_s: f64 = taker.hear().parse().unwrap();
        bytes_s * 8.0 / 1e6
    }
}

fn veth(far: &Child, mbit_s: u64) -> Result<(), String> {
    let pid = far.id().to_string();
    let there = ["nsenter", "-t", pid.as_str(), "-n"];
    let rate = format!("{mbit_s}mbit");
    let shape = [
        "tc", "qdisc", "add", "dev", "link0", "root", "tbf", "rate", &rate, "burst", "256kb", "latency",
        "50ms",
    ];
    run(&["ip", "link", "add", "link0", "type", "veth", "peer", "name", "link0", "netns", &pid])?;
    run(&["ip", "addr", "add", NEAR, "dev", "link0"])?;
    run(&["ip", "link", "set", "link0", "up"])?;
    run(&shape)?;
    let far = format!("{FAR}/30");
    run(&[&there[..], &["ip", "link", "set", "lo", "up"]].concat())?;
    run(&[&there[..], &["ip", "addr", "add", &far, "dev", "link0"]].concat())?;
    run(&[&there[..], &["ip", "link", "set", "link0", "up"]].concat())?;
    run(&[&there[..], &shape].concat())
}

fn run(command: &[&str]) -> Result<(), String> {
    let ended = Command::new(command[0]).args(&command[1..]).stdin(Stdio::null()).output();
    match ended {
        Ok(ended) if ended.status.success() => Ok(()),
        Ok(ended) => Err(format!("{}: {}", command.join(" "), String::from_utf8_lossy(&ended.stderr).trim())),
        Err(error) => Err(format!("{}: {error}", command.join(" "))),
    }
}
