//! A set of devices goes from the agent of one host to that of another, whatever goes wrong meanwhile.
//!
//! ```text
//!   client: GetDevice, GetAgent at a -> Admit at b -> Migrate at a -> Commit, Cancel, Resolve -> the ends of both
//!   a == Prepare, StreamState, CommitHandover ==> b
//! ```
//! The caller knows what it may: it says Commit where it was asked for, and an admin among it says that a host is fenced only
//! after that host has lost its power for good.
//!
//! What must be true of an end is in `ends`.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vfio_checkpoint_client::call::{CallError, CallOptions, Client};
use vfio_checkpoint_device::sim::{SimConfig, SimDevice, Workload};
use vfio_checkpoint_proto::v1;

use crate::caller::Caller;
use crate::dice::Dice;
use crate::ends::Course;
use crate::faults::{self, Fault, Planned};
use crate::hardware::SimHardware;
use crate::log::{Log, say};
use crate::oracle::Oracle;
use crate::pki::{Pki, call_options};
use crate::transfer::{AGENTS, request_id};
use crate::world::{BareEnds, Ended, Orders, PORT, Terms, World};

/// The devices of each host, as far as there are so many.
pub(crate) const NAMES: [&str; 2] = ["n0", "n1"];
/// How often a migration is asked for that is not admitted.
const ASKS: u32 = 12;
/// How often a migration in doubt is looked at before nothing more is expected of it.
const DOUBTS: u32 = 12;

/// What is different from seed to seed, faults aside.
#[derive(Debug, Clone)]
#[allow(clippy::struct_excessive_bools, reason = "each is drawn by itself")]
pub(crate) struct Draw {
    /// What is in the first host's devices.
    pub(crate) marks: Vec<u64>,
    pre_copy: v1::PreCopyMode,
    manual: bool,
    /// The caller says when to stop.
    cuts_over: bool,
    /// Nothing runs there before somebody says Ready; and whether anybody does.
    require_ready: bool,
    says_ready: bool,
    busy: bool,
    pages: u64,
    attempts: u32,
    /// Once it was looked at so often, it is cancelled.
    cancel_after: Option<u32>,
    /// Somebody cancels where Commit is waited for.
    cancels_prepared: bool,
    /// An admin decides as soon as something is in doubt, and not only where nobody else can.
    resolves: bool,
    /// What has moved moves back.
    goes_back: bool,
    /// The admin says that the destination is fenced where it is not: a bug, for the oracles to find.
    pub(crate) lies: bool,
    /// A defect in the agents: for the oracles to find.
    pub(crate) plant: Option<&'static str>,
}

impl Draw {
    fn of(seed: u64) -> Self {
        let dice = Dice::new(seed, "story");
        let marks = (0..=dice.below(2)).map(|_| dice.draw() | 1).collect();
        let pre_copy =
            dice.one_of(&[v1::PreCopyMode::Unspecified, v1::PreCopyMode::Never, v1::PreCopyMode::Required]);
        let words = Dice::new(seed, "words");
        Self {
            marks,
            pre_copy,
            manual: dice.once_in(2),
            cuts_over: words.once_in(4),
            require_ready: words.once_in(4),
            says_ready: !words.once_in(4),
            busy: dice.once_in(2),
            pages: 1 + dice.below(4),
            attempts: 1 + u32::try_from(dice.below(2)).unwrap(),
            cancel_after: dice.once_in(6).then(|| 1 + u32::try_from(dice.below(4)).unwrap()),
            cancels_prepared: dice.once_in(5),
            resolves: dice.once_in(2),
            goes_back: dice.once_in(3),
            lies: false,
            plant: None,
        }
    }
}

/// The faults of a seed.
pub(crate) fn faults_of(seed: u64) -> Vec<Planned> {
    faults::draw_migration(seed, AGENTS)
}

/// What became of a run, and how its migrations ended.
pub(crate) struct Told {
    pub(crate) ended: Ended,
    pub(crate) ends: Vec<String>,
}

/// Runs the story of a seed, with these faults.
pub(crate) fn run(pki: &Arc<Pki>, seed: u64, faults: Vec<Planned>) -> Told {
    run_as(pki, seed, faults, Draw::of(seed))
}

/// The same with an admin who says what is not so.
pub(crate) fn run_with_liar(pki: &Arc<Pki>, seed: u64, faults: Vec<Planned>) -> Told {
    run_as(
        pki,
        seed,
        faults,
        Draw { lies: true, cancels_prepared: false, cancel_after: None, ..Draw::of(seed) },
    )
}

/// The same with a defect in every agent.
pub(crate) fn run_with(plant: &'static str, pki: &Arc<Pki>, seed: u64, faults: Vec<Planned>) -> Told {
    run_as(pki, seed, faults, Draw { plant: Some(plant), ..Draw::of(seed) })
}

fn run_as(pki: &Arc<Pki>, seed: u64, faults: Vec<Planned>, draw: Draw) -> Told {
    let dice = Dice::new(seed, "world");
    let set = |first: u64| -> Vec<SimConfig> {
        (first..)
            .zip(&NAMES[..draw.marks.len()])
            .map(|(seed, name)| SimConfig {
                name: (*name).to_owned(),
                seed,
                memory_bytes: draw.pages * 4096,
                workload: Workload {
                    dirty_bytes_per_second: if draw.busy { 40_960 } else { 0 },
                    working_set_bytes: None,
                },
                ..SimConfig::default()
            })
            .collect()
    };
    let least = dice.between(0, 3);
    let is_calm = faults.is_empty();
    let world = World::new(
        pki,
        Terms {
            plant: draw.plant,
            seed,
            faults,
            devices: vec![("a", set(1)), ("b", set(11))],
            holders: AGENTS.into_iter().filter(|_| !dice.once_in(3)).collect(),
            latency: (least, least + dice.between(1, 12)),
            slowest_ms: dice.below(6),
        },
    );
    let devices = AGENTS.map(|host| {
        let hardware = &world.host(host).hardware;
        NAMES[..draw.marks.len()].iter().map(|name| hardware.device(name).clone()).collect::<Vec<_>>()
    });
    for (device, mark) in devices[0].iter().zip(&draw.marks) {
        device.set_scratch(*mark);
        device.write_memory(7, &mark.to_be_bytes()).unwrap();
    }
    world.oracle.watches_set(&draw.marks);
    say!(world.log, "world", "{draw:?}");
    let ends = Arc::default();
    let story = Story {
        log: world.log.clone(),
        oracle: world.oracle.clone(),
        caller: Caller {
            log: world.log.clone(),
            pki: Arc::clone(pki),
            dice: Arc::new(Dice::new(seed, "client")),
        },
        calm: world.calm(),
        bare_ends: world.bare_ends(),
        orders: world.orders(),
        gone: world.gone(),
        hardware: AGENTS.map(|host| world.host(host).hardware.clone()),
        devices,
        draw,
        is_calm,
        ends: Arc::clone(&ends),
    };
    let ended = world.run(async move {
        story.tell().await;
        Ok(())
    });
    let ends = std::mem::take(&mut *ends.lock().unwrap());
    Told { ended, ends }
}

pub(crate) struct Story {
    pub(crate) log: Log,
    pub(crate) oracle: Oracle,
    pub(crate) caller: Caller,
    pub(crate) calm: Arc<AtomicBool>,
    pub(crate) bare_ends: BareEnds,
    orders: Orders,
    gone: Arc<Mutex<Vec<&'static str>>>,
    pub(crate) hardware: [SimHardware; 2],
    pub(crate) devices: [Vec<SimDevice>; 2],
    pub(crate) draw: Draw,
    /// Nothing is to go wrong.
    pub(crate) is_calm: bool,
    pub(crate) ends: Arc<Mutex<Vec<String>>>,
}

impl Story {
    async fn tell(self) {
        let a = self.caller.connect("a").await;
        let Some(b) = self.destination().await else {
            return self.judge(&[Some(a), None], None).await;
        };
        let clients = [a, b];
        let (mut from, mut doubtful) = (0, None);
        for attempt in 0..self.draw.attempts {
            let Some(course) = self.start(&clients, from, attempt).await else { break };
            let Some(operation) = self.follow(&clients, &course).await else {
                doubtful = Some(from);
                break;
            };
            let has_moved = self.over(&clients, &course, &operation).await;
            if has_moved && !self.draw.goes_back {
                break;
            }
            if has_moved {
                from = 1 - from;
            }
        }
        while !self.calm.load(Ordering::Relaxed) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let [a, b] = clients;
        self.judge(&[Some(a), Some(b)], doubtful).await;
    }

    /// The second host, which may be gone before it was there.
    async fn destination(&self) -> Option<Client> {
        while !self.is_gone(1) {
            if let Some(client) = self.caller.connect_within("b", 3).await {
                return Some(client);
            }
        }
        None
    }

    pub(crate) fn is_gone(&self, side: usize) -> bool {
        self.gone.lock().unwrap().contains(&AGENTS[side])
    }

    /// Whether all is said that a migration waits for.
    pub(crate) fn expects_to_move(&self) -> bool {
        !self.draw.require_ready || self.draw.says_ready
    }

    pub(crate) fn violated(&self, what: String) {
        self.oracle.violated(&self.log, what);
    }

    fn names(&self) -> Vec<String> {
        NAMES[..self.draw.marks.len()].iter().map(|name| format!("devices/{name}")).collect()
    }

    /// Every device of an agent, as it says.
    pub(crate) async fn look(&self, client: &Client) -> Option<Vec<v1::Device>> {
        let mut devices = Vec::new();
        for name in self.names() {
            let answer = client.get_device(v1::GetDeviceRequest { name }).await;
            devices.push(self.caller.told("GetDevice", answer)?.device?);
        }
        Some(devices)
    }

    /// Asks for a migration until it is admitted.
    async fn start(&self, clients: &[Client; 2], from: usize, attempt: u32) -> Option<Course> {
        let (source, destination) = (&clients[from], &clients[1 - from]);
        let mut number = 0;
        for ask in 0..ASKS {
            self.caller.rest_after(ask).await;
            if self.is_gone(0) || self.is_gone(1) {
                return None;
            }
            let Some(devices) = self.look(source).await else { continue };
            let asked_at = turmoil::sim_elapsed().unwrap_or_default();
            let marks: Vec<u64> = self.devices[from].iter().map(SimDevice::scratch).collect();
            let logical: Option<Vec<_>> = devices.into_iter().map(|device| device.logical_device).collect();
            let Some(logical) = logical else { continue };
            let agent = source.get_agent(v1::GetAgentRequest {}).await;
            let Some(agent) = self.caller.told("GetAgent", agent) else { continue };
            let admission = v1::AdmitRequest {
                logical_devices: logical.clone(),
                devices: self.names(),
                source_key_sha256: agent.key_sha256,
                require_ready: self.draw.require_ready,
                ..Default::default()
            };
            let admitted = self.caller.told("Admit", destination.admit(admission).await);
            let Some(v1::AdmitResponse { ticket, key_sha256, .. }) = admitted else { continue };
            let cutover = if self.draw.cuts_over { v1::CutoverMode::Manual } else { v1::CutoverMode::Auto };
            let commit = if self.draw.manual { v1::CommitMode::Manual } else { v1::CommitMode::Auto };
            let to = AGENTS[1 - from];
            let request = v1::MigrateRequest {
                devices: self.names(),
                target: Some(v1::MigrationTarget {
                    endpoint: format!("https://{to}:{PORT}"),
                    spiffe_id: format!("spiffe://lab.test/agent/{to}"),
                    devices: self.names(),
                    key_sha256,
                }),
                ticket,
                pre_copy: self.draw.pre_copy.into(),
                cutover: cutover.into(),
                commit: commit.into(),
                memory_capture: v1::MemoryCapture::None.into(),
                request_id: request_id(4 + attempt, number),
                ..Default::default()
            };
            let started = source.migrate(request).await;
            if let Err(CallError::Refused(refusal)) = &started
                && !refusal.blockers.is_empty()
            {
                // It is known that nothing came of it.
                number += 1;
            }
            let started = self.caller.told("Migrate", started);
            if let Some(operation) = started.and_then(|started| started.operation) {
                return Some(Course { from, name: operation.name, asked_at, marks, logical });
            }
        }
        self.ends.lock().unwrap().push("not admitted".to_owned());
        None
    }

    /// Until it is over. None where it stays in doubt, because its destination is gone and nobody decides.
    async fn follow(&self, clients: &[Client; 2], course: &Course) -> Option<v1::Operation> {
        let source = &clients[course.from];
        let (mut looks, mut doubts) = (0, 0);
        loop {
            if self.is_gone(course.from) {
                return None;
            }
            let waited = source.wait_operation(&course.name, Duration::from_millis(300)).await;
            let Some(operation) = self.caller.told("WaitOperation", waited).and_then(|told| told.operation)
            else {
                self.caller.rest().await;
                continue;
            };
            if operation.done {
                return Some(operation);
            }
            looks += 1;
            let handover = operation.handover.clone().unwrap_or_default();
            say!(self.log, "client", "sees {:?}, in doubt: {}", operation.phase(), handover.in_doubt);
            let name = course.name.clone();
            let is_prepared = operation.phase() == v1::OperationPhase::Prepared && self.draw.manual;
            if self.draw.cancel_after == Some(looks) || is_prepared && self.draw.cancels_prepared {
                let cancel = v1::CancelOperationRequest { name };
                let _ = self.caller.told("CancelOperation", source.cancel_operation(cancel).await);
            } else if is_prepared {
                let commit = v1::CommitRequest { operation: name };
                let _ = self.caller.told("Commit", source.commit(commit).await);
            } else if self.draw.cuts_over && handover.stop_time.is_none() {
                let cutover = v1::CutoverRequest { operation: name };
                let _ = self.caller.told("Cutover", source.cutover(cutover).await);
            }
            if self.draw.require_ready && self.draw.says_ready && !is_prepared && !handover.in_doubt {
                self.ready(&clients[1 - course.from], handover.peer_operation.clone()).await;
            }
            if handover.in_doubt {
                doubts += 1;
                if !self.doubted(source, course, &handover, doubts).await {
                    return None;
                }
            }
        }
    }

    /// Whoever has asked for the ticket says that all is ready there, if anybody waits for it.
    async fn ready(&self, destination: &Client, operation: String) {
        if !operation.is_empty() {
            let ready = v1::ReadyRequest { operation };
            let _ = self.caller.told("Ready", destination.ready(ready).await);
        }
    }

    /// What an admin does about a migration that is in doubt. False where nothing more comes of it.
    async fn doubted(&self, source: &Client, course: &Course, told: &v1::Handover, doubts: u32) -> bool {
        let to = 1 - course.from;
        let is_broken = told.verdict() == v1::HandoverVerdict::Broken;
        // Nothing but an admin's word ends those.
        let waits = is_broken || told.verdict() == v1::HandoverVerdict::Lost;
        if self.draw.lies && doubts > 1 {
            self.resolve(source, course, v1::Resolution::ResumeHere, true).await;
        } else if self.is_gone(to) && !self.draw.resolves {
            return doubts < DOUBTS;
        } else if self.is_gone(to) {
            self.resolve(source, course, v1::Resolution::ResumeHere, true).await;
        } else if is_broken && doubts > 3 && self.calm.load(Ordering::Relaxed) {
            self.orders.lock().unwrap().push(Fault::Gone { host: AGENTS[to], pieces: 0 });
            while !self.is_gone(to) {
                self.caller.rest().await;
            }
        } else if (waits || self.draw.resolves) && doubts > 1 {
            for resolution in [v1::Resolution::ResumeHere, v1::Resolution::LetGo] {
                self.resolve(source, course, resolution, false).await;
            }
        }
        true
    }

    async fn resolve(&self, source: &Client, course: &Course, resolution: v1::Resolution, fenced: bool) {
        let request = v1::ResolveRequest {
            operation: course.name.clone(),
            resolution: resolution.into(),
            peer_is_fenced: fenced,
            accept_loss: false,
            statement: if fenced { "its power is off".to_owned() } else { String::new() },
            validate_only: false,
        };
        let what = format!("Resolve {resolution:?} fenced: {fenced}");
        // Where the destination is gone it takes its time to find out, and who does not wait for that decides nothing.
        let patient =
            CallOptions { deadline: Duration::from_secs(20), ..call_options(Arc::clone(&self.caller.dice)) };
        let source = source.clone().with_call_options(patient);
        let _ = self.caller.told(&what, source.resolve(request).await);
    }
}
