//! How fast state gets from one agent to another, beside what the wire and plain gRPC give on the same machine.
//!
//! ```text
//!   pipe.rs     one TLS 1.3 connection of tokio-rustls, bytes in and bytes out      no framing, no check
//!   plain.rs    a client stream of tonic as it comes, over the same connection      no check
//!   service.rs  StreamState between two agents: simulated device out, frames, CRC, digest, simulated device in
//!   stored.rs   an agent's save into a local store, and a restore out of it
//!   child.rs    every end is a process of its own: its CPU time and its memory are its own, too
//!   report.rs   the document
//! ```
//! One run measures all of them in turn, round by round, because machines are shared and noisy: ratios of one round
//! mean something, figures of two runs beside each other do not. What is printed are medians over the rounds; a ratio is
//! the median of the ratios of each round.
//!
//! `cargo bench -p vfio-checkpoint-tests --bench stream -- --json` prints one document. `--rounds N`, `--mib N` (state of a
//! round), `--big-mib N` (state of the run that measures memory, 0 for none) and `--only pipe,plain,service,stored` make
//! it shorter while something is being tried.

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a benchmark: it says what it found, and ends where it stands"
)]

#[allow(dead_code, reason = "shared with the benchmark of migrations")]
mod child;
#[path = "../../agent/lab.rs"]
#[allow(dead_code, reason = "shared with the tests of agents")]
mod lab;
mod pipe;
mod plain;
mod report;
mod secrets;
mod service;
mod stored;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

use std::path::Path;

use child::{Child, Usage};
use report::{Report, Sample};
use secrets::Secrets;

/// What is asked on the command line.
struct Asked {
    rounds: usize,
    mib: u64,
    big_mib: u64,
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
        Self {
            rounds: usize::try_from(number("--rounds", 5)).unwrap().max(1),
            mib: number("--mib", 2048).max(1),
            big_mib: number("--big-mib", 8192),
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
        ["pipe-take", folder] => pipe::take(Path::new(folder)),
        ["pipe-give", folder, address, mib] => pipe::give(Path::new(folder), address, mib),
        ["plain-take", folder] => plain::take(Path::new(folder)),
        ["plain-give", folder, address, mib] => plain::give(Path::new(folder), address, mib),
        ["service-take", folder, mib] => service::take(Path::new(folder), mib),
        ["service-give", folder, address, mib] => service::give(Path::new(folder), address, mib),
        ["stored", folder, mib] => stored::keep(Path::new(folder), mib),
        _ => compare(&Asked::read(&arguments)),
    }
}

/// Two processes with a connection between them.
struct Pair {
    taker: Child,
    giver: Child,
    mib: u64,
}

impl Pair {
    fn start(kind: &str, folder: &Path, mib: u64) -> Self {
        let (folder, size) = (folder.to_str().unwrap(), mib.to_string());
        let role = format!("{kind}-take");
        let mut taker = match kind {
            "service" => Child::start(&[&role, folder, &size]),
            _ => Child::start(&[&role, folder]),
        };
        let address = taker.hear();
        let mut giver = Child::start(&[&format!("{kind}-give"), folder, &address, &size]);
        assert_eq!(giver.hear(), "ready");
        Self { taker, giver, mib }
    }

    fn run(&mut self) -> Sample {
        let before = (self.giver.usage(), self.taker.usage());
        self.giver.say("go");
        let seconds: f64 = self.giver.hear().parse().expect("seconds");
        let after = (self.giver.usage(), self.taker.usage());
        let gib = gib(self.mib);
        let cpu = |after: Usage, before: Usage| (after.cpu_seconds - before.cpu_seconds) / gib;
        Sample {
            gib_s: gib / seconds,
            giver_cpu_s_per_gib: cpu(after.0, before.0),
            taker_cpu_s_per_gib: cpu(after.1, before.1),
            rss_peak_mib: after.0.rss_peak_mib.max(after.1.rss_peak_mib),
        }
    }
}

fn gib(mib: u64) -> f64 {
    u32::try_from(mib).map_or(f64::INFINITY, f64::from) / 1024.0
}

fn compare(asked: &Asked) {
    let secrets = Secrets::new();
    let folder = secrets.folder();
    let mut report = Report::new(asked.rounds, asked.mib);
    let mut pairs: Vec<(&'static str, Pair)> = ["pipe", "plain", "service"]
        .into_iter()
        .filter(|kind| asked.wants(kind))
        .map(|kind| (kind, Pair::start(kind, folder, asked.mib)))
        .collect();
    // Warm: connections, code, buffers.
    for (_, pair) in &mut pairs {
        pair.run();
    }
    for round in 0..asked.rounds {
        // In another order each time, so that nobody always comes after the same other.
        for turn in 0..pairs.len() {
            let at = (turn + round) % pairs.len();
            let (kind, both) = &mut pairs[at];
            let sample = both.run();
            eprintln!("round {}: {kind}: {sample}", round + 1);
            report.add(kind, sample);
        }
        if asked.wants("stored") {
            let mib = (asked.mib / 2).max(1);
            let kept = stored::run(folder, mib);
            eprintln!("round {}: stored: {kept:?}", round + 1);
            report.kept(kept);
        }
    }
    drop(pairs);
    if asked.big_mib > 0 && asked.wants("service") {
        let mut pair = Pair::start("service", folder, asked.big_mib);
        let sample = pair.run();
        eprintln!("{} MiB at once: {sample}", asked.big_mib);
        report.big(asked.big_mib, sample);
    }
    report.print(asked.json);
}
