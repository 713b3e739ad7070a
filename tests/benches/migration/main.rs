//! What a live migration costs: the stop, the whole, the way back from a crash, and many at once.
//!
//! ```text
//!   link.rs        two network namespaces and a shaped link between them, or a relay in their place
//!   node.rs        two agents, each a process, and a migration as an operator asks for it
//!   live.rs        a busy device over a link of a rate: live against stop-copy; and a connection that is cut
//!   cutover.rs     the fixed cost of a cutover, on loopback          stop.rs   what a stop was made of
//!   recovery.rs    an agent is killed at some moment of a migration  timed.rs  what devices and journals did, and when
//!   concurrent.rs  many at once through one agent                    relay.rs  bytes at a rate, and a cut
//!   parts.rs       the processes                                     report.rs the document
//! ```
//! Every ratio is of two migrations of one round; what is printed are medians over the rounds. What the figures mean is in
//! `tests/benches/migration.md`.
//!
//! `cargo bench -p vfio-checkpoint-tests --bench migration -- --json` prints one document. `--only
//! live,cut,cutover,recovery,concurrent`, `--rounds N`, `--mib N` (the live device), `--mbit N` (the link), `--cutovers N`,
//! `--kills N`, `--seed N`, `--concurrent N` and `--concurrent-mib N` make it another one.
//!
//! # Failure paths
//! A migration that fails ends the benchmark, but for those of `concurrent`, which are counted. Processes and namespaces
//! end with this process, however that ends.

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a benchmark: it says what it found, and ends where it stands"
)]

#[path = "../stream/child.rs"]
#[allow(dead_code, reason = "shared with the benchmark of streams")]
mod child;
mod concurrent;
mod cutover;
#[path = "../../agent/lab.rs"]
#[allow(dead_code, reason = "shared with the tests of agents")]
mod lab;
mod link;
mod live;
#[path = "../../kill/two/namespaces.rs"]
#[allow(dead_code, reason = "shared with the tests that kill agents")]
mod namespaces;
mod node;
mod parts;
mod recovery;
mod relay;
mod report;
mod stop;
mod timed;
#[path = "../../agent/unshared.rs"]
#[allow(dead_code, reason = "shared with the tests of agents")]
mod unshared;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

use std::path::Path;

use serde_json::{Value, json};

use crate::link::Link;
use crate::node::rounded;
use crate::report::Report;

/// What is asked on the command line.
struct Asked {
    rounds: usize,
    mib: u64,
    mbit_s: u64,
    cutovers: usize,
    kills: usize,
    seed: u64,
    concurrent: usize,
    concurrent_mib: u64,
    json: bool,
    only: Vec<String>,
}

impl Asked {
    fn read(arguments: &[String]) -> Self {
        let value = |name: &str| {
            let at = arguments.iter().position(|argument| argument == name)?;
            Some(arguments.get(at + 1).unwrap_or_else(|| panic!("{name} takes a value")).clone())
        };
        let number = |name: &str, usual: u64| {
            value(name).map_or(usual, |text| {
                text.parse().unwrap_or_else(|_| panic!("{name} takes a number, not {text:?}"))
            })
        };
        let count = |name: &str, usual: u64| usize::try_from(number(name, usual)).unwrap().max(1);
        Self {
            rounds: count("--rounds", 3),
            // Of a device, and of many: as far as a few GiB figures of this program are exact.
            mib: number("--mib", 1024).clamp(8, 1 << 20),
            mbit_s: number("--mbit", 1000).clamp(1, 100_000),
            cutovers: count("--cutovers", 15),
            kills: count("--kills", 24),
            seed: number("--seed", 1),
            concurrent: count("--concurrent", 64).min(256),
            concurrent_mib: number("--concurrent-mib", 64).clamp(1, 1 << 20),
            json: arguments.iter().any(|argument| argument == "--json"),
            only: value("--only").map_or_else(Vec::new, |text| text.split(',').map(str::to_owned).collect()),
        }
    }

    fn wants(&self, what: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| only == what)
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["agent", config] => parts::agent(Path::new(config)),
        ["hold", socket] => parts::hold(Path::new(socket)),
        ["device", socket, settings] => parts::device(Path::new(socket), settings),
        ["take", address] => parts::take(address),
        _ => measure(&arguments),
    }
}

fn measure(arguments: &[String]) {
    let asked = Asked::read(arguments);
    link::enter(arguments);
    let document = child::runtime().block_on(all(&asked)).document();
    if asked.json {
        println!("{document}");
    } else if let Value::Object(document) = document {
        for (name, value) in &document {
            println!("{name:<40} {value}");
        }
    }
}

async fn all(asked: &Asked) -> Report {
    let mut report = Report::default();
    report.put("rounds", json!(asked.rounds));
    report.put("processors", json!(std::thread::available_parallelism().map_or(0, usize::from)));
    if asked.wants("live") {
        let link = Link::new(asked.mbit_s);
        report.put("link", json!(link.kind()));
        report.put("link_mbit_s", json!(asked.mbit_s));
        report.put("link_measured_mbit_s", rounded(link.measure(128).await));
        report.put("live_device_mib", json!(asked.mib));
        for _ in 0..asked.rounds {
            live::round(asked, &link, &mut report).await;
        }
    }
    if asked.wants("cut") {
        live::cut(asked, &mut report).await;
    }
    if asked.wants("cutover") {
        report.put("cutovers", json!(asked.cutovers));
        for _ in 0..asked.cutovers {
            cutover::round(&mut report).await;
        }
    }
    if asked.wants("recovery") {
        recovery::run(asked, &mut report).await;
    }
    if asked.wants("concurrent") {
        concurrent::run(asked, &mut report).await;
    }
    report
}
