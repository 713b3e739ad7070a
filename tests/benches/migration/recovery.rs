//! An agent is killed at some moment of a migration, and started again: how long until both sides know how it ended.
//!
//! ```text
//!   device process, holder, agent --migration--> agent, holder, device process
//!                           kill -9 of one of the two, after a time by the seed; at once, the next one
//!   recovery: from the start of its process until every operation of both agents has ended
//! ```
//! The devices are processes, and holders keep them, as on a node: what the dead agent had is there for the next.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;
use vfio_checkpoint_client::call::Client;
use vfio_checkpoint_proto::v1::{self, PreCopyMode};

use crate::Asked;
use crate::child::Child;
use crate::lab::Lab;
use crate::node::{Node, Place, config, lab, request, rounded};
use crate::report::Report;

/// Long enough to be killed in the middle of.
const DEVICE: &str = "memory=64MiB,dirty=1MiB";

/// What has not ended after this is counted as not ended, and is in the times with it.
const BOUND: Duration = Duration::from_mins(1);

/// Both sides.
struct Sides {
    // In the order in which they end: agents before what they work with.
    agents: BTreeMap<&'static str, Node>,
    _holders: Vec<Child>,
    _devices: Vec<Child>,
    lab: Lab,
    _sockets: tempfile::TempDir,
}

impl Sides {
    async fn new() -> Self {
        let lab = lab();
        // Short: the path of a socket has at most 107 bytes.
        let sockets = tempfile::tempdir().unwrap();
        let (mut agents, mut holders, mut devices) = (BTreeMap::new(), Vec::new(), Vec::new());
        for (seed, name) in [(1, "source"), (2, "destination")] {
            let device = sockets.path().join(format!("{name}.sock"));
            let settings = format!("seed={seed},{DEVICE}");
            let mut process = Child::start(&["device", device.to_str().unwrap(), &settings]);
            process.hear();
            devices.push(process);
            // The folder is made by the holder, so that nobody else may look into it.
            let holder = sockets.path().join(name).join("hold.sock");
            holders.push(Child::start(&["hold", holder.to_str().unwrap()]));
            wait_for(&holder).await;
            let address = format!("vfio-user:{}", device.display());
            let port = free_port();
            let config = config(&lab, name, &format!("127.0.0.1:{port}"), &[address], Some(&holder));
            agents.insert(name, Node::start(&lab, name, config, &Place::Here).await);
        }
        Self { agents, _holders: holders, _devices: devices, lab, _sockets: sockets }
    }

    fn client(&self, name: &str) -> &Client {
        &self.agents[name].client
    }

    async fn request(&self) -> v1::MigrateRequest {
        let to = self.agents["destination"].address;
        let (source, destination) = (self.client("source"), self.client("destination"));
        request(source, destination, to, 0, PreCopyMode::Required).await.unwrap()
    }

    /// Kills an agent and starts it again: when the new process was started.
    async fn restart(&mut self, name: &'static str) -> Instant {
        let Node { child, config, .. } = self.agents.remove(name).unwrap();
        child.kill();
        let begun = Instant::now();
        self.agents.insert(name, Node::start(&self.lab, name, config, &Place::Here).await);
        begun
    }

    /// Waits until every operation of both sides has ended: how each did, in a word.
    async fn settled(&self) -> Vec<String> {
        let mut ends = Vec::new();
        for name in ["source", "destination"] {
            let client = self.client(name);
            let listed = client.list_operations(v1::ListOperationsRequest::default()).await.unwrap();
            for listed in listed.operations {
                let ended = client.wait_operation(&listed.name, BOUND).await.unwrap().operation.unwrap();
                if !ended.done {
                    eprintln!("{name}: it did not end: {ended:?}");
                    ends.push(format!("{name} NOT_ENDED"));
                    continue;
                }
                let how = match ended.result() {
                    v1::OperationResult::Succeeded => "SUCCEEDED".to_owned(),
                    v1::OperationResult::Failed
                    | v1::OperationResult::Cancelled
                    | v1::OperationResult::Unspecified => ended.failure.unwrap_or_default().reason,
                };
                ends.push(format!("{name} {how}"));
            }
        }
        ends
    }
}

/// A port that nobody listens on: a source finds its destination again where it was.
fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Waits for a socket that another process makes. It listens at once; an agent is longer in coming.
async fn wait_for(socket: &Path) {
    let until = Instant::now() + Duration::from_secs(30);
    while !socket.exists() {
        assert!(Instant::now() < until, "{} never came", socket.display());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub(crate) async fn run(asked: &Asked, report: &mut Report) {
    // How long it takes when nobody is killed.
    let sides = Sides::new().await;
    let request = sides.request().await;
    let begun = Instant::now();
    sides.client("source").migrate(request).await.unwrap();
    let ends = sides.settled().await;
    let whole = begun.elapsed();
    assert!(ends.iter().all(|end| end.ends_with("SUCCEEDED")), "{ends:?}");
    drop(sides);

    let mut random = asked.seed;
    let (mut times, mut ways) = (Vec::new(), BTreeMap::<String, u32>::new());
    for kill in 0..asked.kills {
        let mut sides = Sides::new().await;
        let request = sides.request().await;
        let source = sides.client("source").clone();
        // Its answer may be lost with the agent.
        let asking = tokio::spawn(async move { source.migrate(request).await });
        let victim = if kill % 2 == 0 { "source" } else { "destination" };
        let delay = whole.mul_f64(f64::from(u32::try_from(next(&mut random) % 1000).unwrap()) / 1000.0);
        tokio::time::sleep(delay).await;
        let begun = sides.restart(victim).await;
        let ends = sides.settled().await;
        let took_ms = begun.elapsed().as_secs_f64() * 1000.0;
        asking.abort();
        let ends = if ends.is_empty() { "not begun".to_owned() } else { ends.join(", ") };
        eprintln!("recovery {kill}: {victim} killed after {delay:?} of {whole:?}: {took_ms:.0} ms: {ends}");
        *ways.entry(format!("{victim} killed: {ends}")).or_default() += 1;
        times.push(took_ms);
    }
    times.sort_by(f64::total_cmp);
    for time in &times {
        report.add("recovery_ms_p50", *time);
    }
    report.put("recovery_ms_max", rounded(times.last().copied().unwrap_or_default()));
    report.put("recovery_kills", json!(times.len()));
    report.put("recovery_seed", json!(asked.seed));
    report.put("recovery_ends", json!(ways));
}

/// The next of a row of numbers that follows from a seed: `SplitMix64`.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mixed = (*state ^ (*state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    mixed ^ (mixed >> 31)
}
