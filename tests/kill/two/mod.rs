//! Two nodes, and devices that move from the one to the other while agents, holders and wires fail.
//!
//! ```text
//!   devices <-- agent a --relay--> agent b --> devices
//!      |          |                   |           |
//!      |        holder              holder        |
//!      '------------- one file: who ran what -----'
//!
//!   relay.rs    the wire between the agents: led elsewhere, cut, silent
//!   watch.rs    the devices themselves say what they carry and whether it runs
//!   settle.rs   both sides come to an end; what must hold then, whatever happened
//!   kills.rs    an agent, both, or one with its holder, are killed at every step
//!   doubt.rs    a destination that does not come back, and what an admin may decide
//!   silence.rs  a process that stands still, and a wire that is silent or cut
//!   missing.rs  a device that its agent does not find, or not at once, when it is back
//!   full.rs     a journal that takes nothing more
//!   shaped.rs   agents in two network namespaces, and a link of a rate between them, which may be cut: namespaces.rs
//!   expiry.rs   a certificate that ends in mid-stream
//!   audit.rs    who decided what, also where nobody hears how that ended
//!   ready.rs    a destination that is killed while it waits for Ready
//! ```
//! The state that moves is [`Content::Own`] of the first device, and of the second; every device has the same content at
//! power-on on both nodes, so that a seal says what is where. A node is a source in one migration and the destination of
//! the next.
//!
//! # Invariants
//! What [`settle`] asserts after each test and each kill.

mod audit;
mod doubt;
mod expiry;
mod full;
mod kills;
mod missing;
pub(crate) mod namespaces;
mod ready;
mod relay;
mod settle;
mod shaped;
mod silence;
pub(crate) mod watch;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use vfio_checkpoint_client::call::{CallError, CallOptions, Client, RetryPolicy, new_request_id};
use vfio_checkpoint_proto::v1;

use crate::job::{Broken, done};
use crate::lab::Lab;
use crate::world::{Content, World};
use namespaces::Far;
use relay::{Relay, Way};
use watch::Watch;

/// What the two nodes are called.
const NAMES: [&str; 2] = ["a", "b"];

/// A migration of all devices.
#[derive(Debug, Clone)]
pub(crate) struct Move {
    pub(crate) pre_copy: bool,
    /// Commit is said by the caller, who does so at once.
    pub(crate) manual: bool,
    commit_timeout: Option<prost_types::Duration>,
    /// The destination waits for Ready before it says Prepared.
    require_ready: bool,
    /// A migration that would stand still for longer is given up.
    downtime_limit: Option<Duration>,
    request_id: String,
}

impl Move {
    pub(crate) fn new(pre_copy: bool) -> Self {
        let request_id = new_request_id().unwrap();
        Self {
            pre_copy,
            manual: false,
            commit_timeout: None,
            require_ready: false,
            downtime_limit: None,
            request_id,
        }
    }

    /// The caller says when to commit, for which it has so many seconds.
    pub(crate) fn by_hand_within(self, seconds: i64) -> Self {
        let commit_timeout = Some(prost_types::Duration { seconds, nanos: 0 });
        Self { manual: true, commit_timeout, ..self }
    }

    /// It is given up where it would stand still for longer.
    fn within(self, downtime_limit: Duration) -> Self {
        Self { downtime_limit: Some(downtime_limit), ..self }
    }

    /// Ready is to be said at the destination.
    fn awaiting_ready(self) -> Self {
        Self { require_ready: true, ..self }
    }
}

/// Two nodes.
pub(crate) struct Pair {
    pub(crate) nodes: [World; 2],
    pub(crate) relays: [Relay; 2],
    /// The nodes are at the two ends of a link, and call each other without a relay.
    is_far: bool,
    /// The node that has the devices' own state.
    pub(crate) home: usize,
    /// The devices that live there.
    lives: Vec<v1::LogicalDevice>,
    watch: Watch,
    /// By digest.
    own: Vec<String>,
    /// From this line on each of them must be somewhere.
    kept_since: Option<usize>,
}

impl Pair {
    /// Two nodes with so many devices each, whose agents run. The state to move is at the first.
    pub(crate) async fn new(devices: usize, with_holders: bool) -> Self {
        Self::configured(devices, with_holders, &[]).await
    }

    /// The same, with agents that are configured with these lines as well.
    pub(crate) async fn configured(devices: usize, with_holders: bool, lines: &[&str]) -> Self {
        Self::made(devices, with_holders, lines, None).await
    }

    /// The same, with one device each, and the second node at the far end of a link.
    pub(crate) async fn across(far: &Arc<Far>, with_holders: bool, lines: &[&str]) -> Self {
        Self::made(1, with_holders, lines, Some(far)).await
    }

    async fn made(devices: usize, with_holders: bool, lines: &[&str], far: Option<&Arc<Far>>) -> Self {
        let lab = Arc::new(Lab::new());
        let told = lab.path("told");
        let watch = Watch::new(told.clone());
        let (mut first, mut second) = tokio::join!(
            World::node(&lab, NAMES[0], &told, devices, with_holders),
            World::node(&lab, NAMES[1], &told, devices, with_holders),
        );
        if far.is_some() {
            first.listen(ends()[0], None);
            second.listen(ends()[1], far);
        }
        for node in [&first, &second] {
            // A destination whose source is killed before it opens its stream waits so long for it.
            node.configure("defaults.stream_open_timeout = \"3s\"");
            for line in lines {
                node.configure(line);
            }
        }
        tokio::join!(first.start(), second.start());
        let relays = [Relay::new().await, Relay::new().await];
        let mut pair = Self {
            nodes: [first, second],
            relays,
            is_far: far.is_some(),
            home: 0,
            lives: Vec::new(),
            watch,
            own: Vec::new(),
            kept_since: None,
        };
        pair.nodes[0].learn().await;
        let [first, second] = &mut pair.nodes;
        second.known.clone_from(&first.known);
        second.manifest.clone_from(&first.manifest);
        for index in 0..devices {
            pair.own.push(pair.watch.carries(&format!("{}/{index}", NAMES[0])));
        }
        for side in 0..2 {
            pair.lead(side);
        }
        pair.kept_since = with_holders.then(|| pair.watch.len());
        pair.lives = pair.living().await;
        pair
    }

    pub(crate) fn away(&self) -> usize {
        1 - self.home
    }

    fn is_kept(&self) -> bool {
        self.nodes.iter().all(World::is_kept)
    }

    /// The agent of a node that runs is what its relay leads to.
    pub(crate) fn lead(&self, side: usize) {
        self.relays[side].lead(Way::To(self.nodes[side].address()));
    }

    /// Where the agent of a node is called by the other.
    fn endpoint(&self, side: usize) -> String {
        if self.is_far { format!("https://{}", ends()[side]) } else { self.relays[side].endpoint() }
    }

    /// Starts the agent of a node, and waits until it is served.
    pub(crate) async fn start(&mut self, side: usize) {
        self.nodes[side].start().await;
        self.lead(side);
    }

    /// Starts both agents.
    pub(crate) async fn start_both(&mut self) {
        for node in &mut self.nodes {
            node.launch("");
        }
        // The one may ask the other before it is served itself.
        let [first, second] = &mut self.nodes;
        tokio::join!(serve(first, &self.relays[0]), serve(second, &self.relays[1]));
    }

    /// Kills the agent of a node.
    pub(crate) fn kill(&mut self, side: usize) {
        self.relays[side].lead(Way::Nowhere);
        self.nodes[side].kill_agent();
    }

    /// Brings the state to move into the devices of the node that had it last.
    async fn load(&mut self) {
        let client = self.nodes[self.home].client().await;
        self.nodes[self.home].load(&client, Content::Own).await;
    }

    /// What lives at home.
    async fn living(&self) -> Vec<v1::LogicalDevice> {
        let client = self.nodes[self.home].client().await;
        let devices = self.nodes[self.home].devices(&client).await;
        devices.into_iter().map(|device| device.logical_device.unwrap()).collect()
    }

    fn names(&self) -> Vec<String> {
        (0..self.own.len()).map(|index| format!("devices/nic{index}")).collect()
    }

    /// Has the devices move to the other node: asks for a ticket there, and for the migration here.
    async fn request(
        job: &Move,
        (source, destination): (&Client, &Client),
        names: Vec<String>,
        endpoint: String,
        spiffe_id: String,
    ) -> Result<v1::Operation, CallError> {
        let agent = source.get_agent(v1::GetAgentRequest {}).await?;
        let mut logical_devices = Vec::new();
        for name in &names {
            let device =
                source.get_device(v1::GetDeviceRequest { name: name.clone() }).await?.device.unwrap();
            logical_devices.push(device.logical_device.unwrap());
        }
        let admission = v1::AdmitRequest {
            logical_devices,
            devices: names.clone(),
            source_key_sha256: agent.key_sha256,
            require_ready: job.require_ready,
            ..Default::default()
        };
        let v1::AdmitResponse { ticket, key_sha256, .. } = destination.admit(admission).await?;
        let request = v1::MigrateRequest {
            devices: names.clone(),
            target: Some(v1::MigrationTarget { endpoint, spiffe_id, devices: names, key_sha256 }),
            ticket,
            pre_copy: if job.pre_copy { v1::PreCopyMode::Required } else { v1::PreCopyMode::Never }.into(),
            commit: if job.manual { v1::CommitMode::Manual } else { v1::CommitMode::Auto }.into(),
            memory_capture: v1::MemoryCapture::None.into(),
            // Else, how long a machine under load takes is not what is asked here.
            downtime_limit: job.downtime_limit.unwrap_or(Duration::from_mins(10)).try_into().ok(),
            pre_copy_budget: job.downtime_limit.map(|_| prost_types::Duration { seconds: 3, nanos: 0 }),
            no_convergence: if job.downtime_limit.is_some() {
                v1::NoConvergence::Abort
            } else {
                v1::NoConvergence::Unspecified
            }
            .into(),
            commit_timeout: job.commit_timeout,
            request_id: job.request_id.clone(),
            ..Default::default()
        };
        Ok(source.migrate(request).await?.operation.unwrap())
    }

    /// Begins a migration whose agents somebody kills. It goes on by itself, but for a Commit.
    async fn driven(&self, job: &Move) -> JoinHandle<()> {
        let (home, away) = (self.home, self.away());
        // What an agent does not take is for the test to see, not for its client to try again.
        let once = CallOptions {
            retry: RetryPolicy { attempts: 1, ..RetryPolicy::default() },
            ..CallOptions::default()
        };
        let clients = (
            self.nodes[home].client().await.with_call_options(once.clone()),
            self.nodes[away].client().await.with_call_options(once),
        );
        let identity = format!("spiffe://lab.test/agent/{}", NAMES[away]);
        let (endpoint, names, job) = (self.endpoint(away), self.names(), job.clone());
        tokio::spawn(async move {
            let driving = async {
                let clients = (&clients.0, &clients.1);
                let begun = Self::request(&job, clients, names, endpoint, identity).await?;
                if job.manual && comes_to(clients.0, &begun.name, v1::OperationPhase::Prepared).await? {
                    clients.0.commit(v1::CommitRequest { operation: begun.name }).await?;
                }
                Ok::<_, Broken>(())
            };
            if let Err(error) = driving.await {
                eprintln!("whoever asked for the migration hears: {error}");
            }
        })
    }

    /// A migration that nobody disturbs.
    pub(crate) async fn moves(&mut self, job: &Move) -> v1::Operation {
        let driving = self.driven(job).await;
        driving.await.unwrap();
        let client = self.nodes[self.home].client().await;
        let operation = self.recorded(&client, job).await.expect("it was begun");
        let ended = done(&client, &operation.name).await.unwrap();
        assert_eq!(ended.result(), v1::OperationResult::Succeeded, "{ended:?}\n{}", self.log());
        let peer = &ended.handover.as_ref().unwrap().peer_operation;
        let there = self.nodes[self.away()].client().await;
        let arrival = there.get_operation(v1::GetOperationRequest { name: peer.clone() }).await.unwrap();
        let arrival = arrival.operation.unwrap();
        assert!(!ended.trace_id.is_empty() && arrival.trace_id == ended.trace_id, "two traces: {arrival:?}");
        self.home = self.away();
        self.lives = self.living().await;
        ended
    }

    /// The migration as its source has it on record.
    async fn recorded(&self, client: &Client, job: &Move) -> Option<v1::Operation> {
        let mut found = operations(client).await;
        found.retain(|operation| operation.request_id == job.request_id);
        assert!(found.len() < 2, "one request, two operations");
        found.pop()
    }

    fn log(&self) -> String {
        format!("{}{}", self.nodes[0].log(), self.nodes[1].log())
    }
}

/// Where the agents at the two ends of a link are. Nobody else is there, so they have the same port in each life.
fn ends() -> [SocketAddr; 2] {
    [namespaces::NEAR, namespaces::FAR].map(|end| SocketAddr::from((end, 7443)))
}

/// Waits until an agent is served, which is where its relay leads to then.
async fn serve(node: &mut World, relay: &Relay) {
    node.served().await;
    relay.lead(Way::To(node.address()));
}

async fn operations(client: &Client) -> Vec<v1::Operation> {
    let request = v1::ListOperationsRequest { page_size: 1000, ..Default::default() };
    client.list_operations(request).await.unwrap().operations
}

/// Waits until an operation is as is wanted, or over; false where it is over.
async fn becomes(
    client: &Client,
    operation: &str,
    wanted: impl Fn(&v1::Operation) -> bool,
) -> Result<bool, Broken> {
    let request = v1::WatchOperationRequest { name: operation.to_owned() };
    let mut watch = client.watch_operation(request).await?;
    while let Some(response) = watch.next().await? {
        let operation = response.operation.unwrap();
        if operation.done || wanted(&operation) {
            return Ok(!operation.done);
        }
    }
    Err("the watch ended".into())
}

/// Waits until an operation is in a phase, or over; false where it is over.
async fn comes_to(client: &Client, operation: &str, phase: v1::OperationPhase) -> Result<bool, Broken> {
    becomes(client, operation, |operation| operation.phase() == phase).await
}
