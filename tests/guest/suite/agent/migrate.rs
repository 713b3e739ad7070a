//! Devices of the kernel move between the agents of two nodes, one of which is killed in the middle.
//!
//! ```text
//!   a: hold <- serve -- variant of mtty          b: hold <- serve -- variant of mtty
//!               |  ^                                        |  ^
//!               |  '------------- Commit, GetHandover ------'  |
//!               '------------- StreamState, mutual TLS --------'
//! ```
//! The variant resets on the last close, as vfio-pci does: what nobody keeps open is gone. The registers are read by a
//! duplicate of the agent's own fd, as whoever uses the device has one, so that they are seen while the agents run and
//! nothing is opened for it.
//!
//! After each migration, whatever was killed, the registers are at one node, and the device of the other is as after a
//! reset: they arrived, or they stayed.

use std::mem;

use bytes::Bytes;
use vfio_checkpoint_client::call::{Client, new_request_id};
use vfio_checkpoint_device::kernel::KernelPath;
use vfio_checkpoint_fsm::State::{self, PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy};
use vfio_checkpoint_proto::v1;

use super::killed::power_on;
use super::lab::{Agent, Lab, Program, done, until};
use super::transfer::{program, registers};
use crate::facts::Facts;
use crate::kmsg::KernelLog;
use crate::uart::{self, Registers};
use crate::variant::Parameters;

/// A destination waits so long for a source that was killed before it opened its stream, or in its midst.
const SHORT_WAITS: &str = "defaults.stream_open_timeout = \"5s\"";
const DEVICE: &str = "devices/nic";

/// A node with one device, whose agent runs but between [`kill`](Node::kill) and [`start`](Node::start).
struct Node<'a> {
    lab: Lab,
    holder: Option<Program>,
    agent: Option<Agent>,
    uuid: &'a str,
    path: KernelPath,
}

impl<'a> Node<'a> {
    fn new(mut lab: Lab, uuid: &'a str, path: KernelPath, with_holder: bool) -> Self {
        let holder = with_holder.then(|| lab.holder());
        let mut node = Self { lab, holder, agent: None, uuid, path };
        node.start();
        node
    }

    fn start(&mut self) {
        let slots = [("nic", self.uuid, Some(self.path))];
        self.agent = Some(self.lab.agent(&slots, SHORT_WAITS));
    }

    fn agent(&self) -> &Agent {
        self.agent.as_ref().expect("its agent runs")
    }

    fn kill(&mut self) {
        self.agent.take().expect("its agent runs").kill();
    }

    fn registers(&self) -> Registers {
        uart::registers_by(&self.agent().device_file(), 1)
    }

    fn with_client<T>(&self, work: impl AsyncFnOnce(Client) -> T) -> T {
        self.lab.with_client(self.agent(), work)
    }

    /// As another agent reaches it, and knows it by its key.
    fn target(&self, devices: Vec<String>, key_sha256: Bytes) -> v1::MigrationTarget {
        let (endpoint, spiffe_id) = (self.agent().endpoint().to_owned(), self.lab.identity().to_owned());
        v1::MigrationTarget { endpoint, spiffe_id, devices, key_sha256 }
    }

    fn end(self) {
        self.agent.into_iter().for_each(Agent::stop);
        self.holder.into_iter().for_each(Program::stop);
    }
}

/// Two nodes. The registers of the test are at the first of them.
struct Pair<'a> {
    home: Node<'a>,
    away: Node<'a>,
    log: KernelLog,
    blank: Registers,
    parameters: Parameters,
}

impl<'a> Pair<'a> {
    fn new(facts: &'a Facts, path: KernelPath, with_holder: bool) -> Self {
        let (home, away) = (facts.mttyv1[0].as_str(), facts.mttyv1[1].as_str());
        let parameters = Parameters::new();
        let blank = power_on(home);
        parameters.reset_on_close();
        let lab = Lab::new();
        let beside = lab.beside("b");
        Self {
            home: Node::new(lab, home, path, with_holder),
            away: Node::new(beside, away, path, with_holder),
            log: KernelLog::new(),
            blank,
            parameters,
        }
    }

    /// Puts registers into the device at home, where a workload would.
    fn program(&mut self, seed: u8) -> Registers {
        uart::program_by(&self.home.agent().device_file(), 1, seed);
        let registers = self.home.registers();
        assert_ne!(registers, self.blank);
        self.log = KernelLog::new();
        registers
    }

    /// The hops of both devices since the last call: true for the one at home.
    fn hops(&mut self) -> Vec<(bool, State, State)> {
        let hops = self.log.hops_of_all(&[self.home.uuid, self.away.uuid]);
        hops.into_iter().map(|(device, from, to)| (device == 0, from, to)).collect()
    }

    /// The registers are away now, and only there.
    fn arrived(&mut self, before: &Registers, what: &str) {
        assert_eq!(self.away.registers(), *before, "{what}: the registers arrived");
        assert_eq!(self.home.registers(), self.blank, "{what}: and nothing of them stayed");
        mem::swap(&mut self.home, &mut self.away);
    }

    /// The registers are at home still, and only there.
    fn stayed(&self, before: &Registers, what: &str) {
        assert_eq!(self.home.registers(), *before, "{what}: the registers stayed");
        assert_eq!(self.away.registers(), self.blank, "{what}: and nothing of them arrived");
    }

    /// Begins a migration: its operation at home.
    fn begin(&self, request: v1::MigrateRequest) -> String {
        begin(&self.home, &self.away, vec![DEVICE.to_owned()], request)
    }

    fn commit(&self, operation: &str) {
        let request = v1::CommitRequest { operation: operation.to_owned() };
        self.home.with_client(async |client| client.commit(request).await.expect("Commit is taken"));
    }

    /// An admin has the source run on by what the destination has on record: that its device was lost to it.
    fn resume_here(&self, operation: &str) {
        let is_lost = |now: &v1::Operation| {
            now.handover.as_ref().is_some_and(|known| known.verdict() == v1::HandoverVerdict::Lost)
        };
        let request = v1::ResolveRequest {
            operation: operation.to_owned(),
            resolution: v1::Resolution::ResumeHere.into(),
            ..v1::ResolveRequest::default()
        };
        self.home.with_client(async |client| {
            until(&client, operation, is_lost).await;
            let resolved = client.resolve(request).await.expect("an answer");
            assert_eq!(resolved.refused, "", "{resolved:?}");
        });
    }

    fn end(self) {
        self.home.end();
        self.away.end();
    }
}

/// Asks for a ticket at the one node, and for the migration at the other.
fn begin(from: &Node<'_>, to: &Node<'_>, devices: Vec<String>, request: v1::MigrateRequest) -> String {
    let (source_key_sha256, logical_devices) = from.with_client(async |client| {
        let mut living = Vec::new();
        for name in devices.clone() {
            let answer = client.get_device(v1::GetDeviceRequest { name }).await.expect("an answer");
            living.extend(answer.device.and_then(|device| device.logical_device));
        }
        (client.get_agent(v1::GetAgentRequest {}).await.expect("an answer").key_sha256, living)
    });
    let admission = v1::AdmitRequest {
        logical_devices,
        devices: devices.clone(),
        source_key_sha256,
        ..v1::AdmitRequest::default()
    };
    let admitted = to.with_client(async |client| client.admit(admission).await.expect("a ticket"));
    let target = Some(to.target(devices.clone(), admitted.key_sha256));
    let request = v1::MigrateRequest { target, devices, ticket: admitted.ticket, ..request };
    from.with_client(async |client| {
        client.migrate(request).await.expect("a migration").operation.expect("an operation").name
    })
}

/// A migration whose downtime is not what is asked: the machine is an emulated one.
fn request(is_live: bool) -> v1::MigrateRequest {
    v1::MigrateRequest {
        pre_copy: if is_live { v1::PreCopyMode::Required } else { v1::PreCopyMode::Never }.into(),
        memory_capture: v1::MemoryCapture::None.into(),
        downtime_limit: Some(prost_types::Duration { seconds: 600, nanos: 0 }),
        request_id: new_request_id().expect("an id"),
        ..v1::MigrateRequest::default()
    }
}

/// By `vfioctl`: by stop-copy to the other node, and live back again.
pub(super) fn there_and_back(facts: &Facts, path: KernelPath) {
    let mut pair = Pair::new(facts, path, false);
    let before = pair.program(81);
    let mut downtimes_us = Vec::new();
    for mode in ["never", "required"] {
        let (to, id) = (pair.away.agent().endpoint().to_owned(), pair.away.lab.identity().to_owned());
        let way = ["--to", &to, "--to-server-spiffe-id", &id, "--downtime-limit", "600s"];
        let migrate = [&["migrate", "nic", "--pre-copy", mode][..], &way].concat();
        let dry = pair.home.lab.succeed(pair.home.agent(), &[&migrate[..], &["--dry-run"]].concat());
        assert_eq!(dry["blockers"], serde_json::json!([]), "{dry}");
        assert_eq!(pair.hops(), [], "a dry run touches nothing");

        let moved = pair.home.lab.succeed(pair.home.agent(), &migrate);
        assert_eq!((&moved["result"], &moved["outcome"]), (&"SUCCEEDED".into(), &"MOVED".into()), "{moved}");
        assert_eq!(moved["handover"]["verdict"], "COMMITTED", "{moved}");
        assert_eq!(moved["devices"][0]["length_bytes"], 60, "{moved}");
        downtimes_us.push(moved["downtime_us"].as_u64().expect("a downtime"));
        let hops = pair.hops();
        let of = |home: bool| -> Vec<_> {
            hops.iter().filter(|hop| hop.0 == home).map(|&(_, from, to)| (from, to)).collect()
        };
        let drain = if mode == "never" {
            [(Running, RunningP2p), (RunningP2p, Stop), (Stop, StopCopy)]
        } else {
            [(Running, PreCopy), (PreCopy, PreCopyP2p), (PreCopyP2p, StopCopy)]
        };
        assert_eq!(
            of(true),
            [&drain[..], &[(StopCopy, Stop)]].concat(),
            "{mode}: stopped, and never run again"
        );
        let load = [(Running, RunningP2p), (RunningP2p, Stop), (Stop, Resuming)];
        let run = [(Resuming, Stop), (Stop, RunningP2p), (RunningP2p, Running)];
        assert_eq!(of(false), [load, run].concat(), "{mode}");
        let place = |hop| hops.iter().position(|found| *found == hop).expect("a hop");
        assert!(
            place((true, StopCopy, Stop)) < place((false, Resuming, Stop)),
            "{mode}: the one is out of the way before the other runs: {hops:?}"
        );
        // What it takes the state into is ready before the source stands still.
        assert!(place((false, Stop, Resuming)) < place((true, drain[1].0, drain[1].1)), "{mode}: {hops:?}");
        pair.arrived(&before, mode);
    }
    pair.end();
    println!(
        "figures: agent: {path}: migrated by vfioctl to another agent by stop-copy ({} ms still) and live back ({} ms), \
         registers equal",
        downtimes_us[0] / 1000,
        downtimes_us[1] / 1000,
    );
}

/// What is written to a device while its state is on the way arrives as well.
pub(super) fn written_on_the_way(facts: &Facts) {
    for path in [KernelPath::Container, KernelPath::Iommufd] {
        let mut pair = Pair::new(facts, path, false);
        // After each register write there are so many bytes of state more.
        let record_bytes = 4096;
        pair.parameters.dirty_bytes(record_bytes);
        let before = pair.program(82);
        let operation =
            pair.begin(v1::MigrateRequest { cutover: v1::CutoverMode::Manual.into(), ..request(true) });
        let workload = pair.home.agent().device_file();
        let written = pair.home.with_client(async |client| {
            let copies = |bytes: u64| {
                let operation = &operation;
                let client = &client;
                async move {
                    until(client, operation, |now| {
                        now.phase() == v1::OperationPhase::PreCopy && now.moved_bytes >= bytes
                    })
                    .await
                    .moved_bytes
                }
            };
            let moved = copies(1).await;
            uart::program_by(&workload, 1, 83);
            // More of it while the first is being read.
            uart::program_by(&workload, 1, 84);
            let moved = copies(moved + u64::from(record_bytes)).await;
            uart::program_by(&workload, 1, 85);
            copies(moved + u64::from(record_bytes)).await;
            let written = uart::registers_by(&workload, 1);
            client.cutover(v1::CutoverRequest { operation: operation.clone() }).await.expect("Cutover");
            let ended = done(&client, &operation).await;
            assert_eq!(ended.outcome(), v1::StateOutcome::Moved, "{ended:?}");
            written
        });
        drop(workload);
        assert_ne!(written, before);
        pair.arrived(&written, "written on the way");
        pair.end();
    }
    println!(
        "figures: agent: registers written while they were migrated, on both paths: the last of them arrived"
    );
}

/// Two devices move together: none stops before both are quiesced, and none runs before both are out of STOP.
pub(super) fn set_of_two(facts: &Facts) {
    let uuids: Vec<&str> = facts.mtty1.iter().map(String::as_str).collect();
    let before = [program(uuids[0], 1, 86), program(uuids[1], 1, 87)];
    for uuid in &uuids[2..4] {
        program(uuid, 1, 99);
    }
    let lab = Lab::new();
    let beside = lab.beside("b");
    let agents = [(&lab, &uuids[..2]), (&beside, &uuids[2..4])].map(|(lab, uuids)| {
        let slots =
            [("left", uuids[0], Some(KernelPath::Container)), ("right", uuids[1], Some(KernelPath::Iommufd))];
        lab.agent(&slots, "")
    });
    let mut log = KernelLog::new();
    let moved = lab.succeed(
        &agents[0],
        &[
            &["migrate", "left", "right", "--pre-copy", "required", "--downtime-limit", "600s"][..],
            &["--to", agents[1].endpoint(), "--to-server-spiffe-id", beside.identity()],
        ]
        .concat(),
    );
    assert_eq!(moved["outcome"], "MOVED", "{moved}");
    let hops = log.hops_of_all(&uuids);
    let place = |device: usize, from: State, to: State| {
        hops.iter().rposition(|hop| *hop == (device, from, to)).expect("a hop")
    };
    let of_both = |devices: [usize; 2], from, to| devices.map(|device| place(device, from, to));
    let quiesced = of_both([0, 1], PreCopy, PreCopyP2p);
    let stopping = of_both([0, 1], PreCopyP2p, StopCopy);
    assert!(quiesced.iter().max() < stopping.iter().min(), "{hops:?}");
    let stopped = of_both([0, 1], StopCopy, Stop);
    let leaving = of_both([2, 3], Resuming, Stop);
    assert!(stopped.iter().max() < leaving.iter().min(), "{hops:?}");
    let out = of_both([2, 3], Stop, RunningP2p);
    let running = of_both([2, 3], RunningP2p, Running);
    assert!(out.iter().max() < running.iter().min(), "{hops:?}");
    agents.into_iter().for_each(Agent::stop);
    assert_eq!([registers(uuids[2], 1), registers(uuids[3], 1)], before);
    println!(
        "figures: agent: a set of two migrated live, the barrier seen in the kernel's log on both nodes"
    );
}

/// Who is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Source,
    Destination,
}

/// Where a migration is then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Middle {
    /// The device runs, and its state is being read.
    Copying,
    /// It stands still, and all of its state is in the other, which nobody has told to run.
    Prepared,
    /// The other is on its way out of RESUMING.
    Committing,
}

/// What becomes of the registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum After {
    Arrive,
    Stay,
    /// They stay, once an admin says so by what the destination has on record: that it lost its device.
    StayByDecision,
}

/// SIGKILL in the middle, and the same agent again.
struct Kill {
    is_live: bool,
    victim: Victim,
    middle: Middle,
    after: After,
}

const KEPT: [Kill; 6] = [
    Kill { is_live: true, victim: Victim::Source, middle: Middle::Copying, after: After::Stay },
    Kill { is_live: true, victim: Victim::Destination, middle: Middle::Copying, after: After::Stay },
    Kill { is_live: false, victim: Victim::Source, middle: Middle::Prepared, after: After::Stay },
    Kill { is_live: true, victim: Victim::Destination, middle: Middle::Prepared, after: After::Arrive },
    Kill { is_live: true, victim: Victim::Source, middle: Middle::Committing, after: After::Arrive },
    Kill { is_live: false, victim: Victim::Destination, middle: Middle::Committing, after: After::Arrive },
];

/// Where nobody keeps a device open but the agent that is killed, the kernel resets it.
const NOT_KEPT: [Kill; 3] = [
    Kill { is_live: true, victim: Victim::Destination, middle: Middle::Copying, after: After::Stay },
    Kill { is_live: true, victim: Victim::Destination, middle: Middle::Prepared, after: After::Stay },
    Kill {
        is_live: false,
        victim: Victim::Destination,
        middle: Middle::Committing,
        after: After::StayByDecision,
    },
];

/// The registers arrive or stay, whoever is killed and when.
pub(super) fn killed(facts: &Facts, path: KernelPath) {
    let mut seed = 90;
    let mut found = [0, 0];
    for (kills, with_holder) in [(&KEPT[..], true), (&NOT_KEPT[..], false)] {
        let mut pair = Pair::new(facts, path, with_holder);
        for kill in kills {
            seed += 1;
            let arrived = one(&mut pair, kill, seed);
            found[usize::from(arrived)] += 1;
        }
        pair.end();
    }
    println!(
        "figures: agent: {path}: {} SIGKILLs in the middle of a migration: registers arrived {} times and stayed {}",
        found[0] + found[1],
        found[1],
        found[0]
    );
}

/// One kill: whether the registers arrived.
fn one(pair: &mut Pair<'_>, kill: &Kill, seed: u8) -> bool {
    let Kill { is_live, victim, middle, after } = *kill;
    let what = format!("{victim:?} killed while {middle:?}, live: {is_live}");
    let before = pair.program(seed);
    let (cutover, commit, phase) = match middle {
        Middle::Copying => (v1::CutoverMode::Manual, v1::CommitMode::Auto, v1::OperationPhase::PreCopy),
        Middle::Prepared | Middle::Committing => {
            (v1::CutoverMode::Auto, v1::CommitMode::Manual, v1::OperationPhase::Prepared)
        }
    };
    let operation =
        pair.begin(v1::MigrateRequest { cutover: cutover.into(), commit: commit.into(), ..request(is_live) });
    let is_there = |now: &v1::Operation| now.phase() == phase && now.moved_bytes > 0;
    pair.home.with_client(async |client| until(&client, &operation, is_there).await);
    if middle == Middle::Committing {
        pair.commit(&operation);
        pair.log.until_out_of(pair.away.uuid, Resuming);
    }
    let struck = match victim {
        Victim::Source => &mut pair.home,
        Victim::Destination => &mut pair.away,
    };
    struck.kill();
    struck.start();
    if middle == Middle::Prepared && victim == Victim::Destination {
        pair.commit(&operation);
    }
    if after == After::StayByDecision {
        pair.resume_here(&operation);
    }
    let ended = pair.home.lab.done(pair.home.agent(), &operation);
    pair.away.with_client(all_done);
    for node in [&pair.home, &pair.away] {
        let device = node.lab.device(node.agent(), "nic");
        assert_eq!(device.state(), v1::MigrationState::Running, "{what}: {device:?}");
        assert_eq!(device.standing(), v1::DeviceStanding::Ready, "{what}: {device:?}");
        assert_eq!(device.operation, "", "{what}: {device:?}");
    }
    if after == After::Arrive {
        assert_eq!(ended.outcome(), v1::StateOutcome::Moved, "{what}: {ended:?}");
        pair.arrived(&before, &what);
        return true;
    }
    assert_eq!(ended.result(), v1::OperationResult::Failed, "{what}: {ended:?}");
    assert_eq!(ended.outcome(), v1::StateOutcome::Preserved, "{what}: {ended:?}");
    pair.stayed(&before, &what);
    false
}

/// Waits until no operation of a node is under way.
async fn all_done(client: Client) {
    let all = client.list_operations(v1::ListOperationsRequest::default()).await.expect("a list");
    for operation in all.operations {
        done(&client, &operation.name).await;
    }
}
