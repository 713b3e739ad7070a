//! A simulated world: hosts with real agents, a client, a network between them, and what goes wrong.
//!
//! ```text
//!   seed -> faults, delays, latencies, ids        one thread, one clock
//!   client host --- the client library, mTLS, gRPC --- host a, host b: Agent, journal on SimDisk, devices in SimHardware
//!                         turmoil
//!   step by step: strike what is due -> a millisecond of every host -> end whoever is dead -> heal
//! ```
//! # Invariants
//! - What an agent leaves behind when it dies is what its host says: its devices as far as a holder keeps them, its disk as
//!   far as it was synced. Nothing else outlives it.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use turmoil::{Builder, Sim};
use vfio_checkpoint_device::chain;
use vfio_checkpoint_device::sim::SimConfig;
use vfio_checkpoint_server::config::{AgentConfig, DeviceConfig};
use vfio_checkpoint_server::environment::Environment;
use vfio_checkpoint_server::failpoint::{Failing, Watching, fail, watch};
use vfio_checkpoint_server::serve::Agent;

use crate::dice::Dice;
use crate::disk::SimDisk;
use crate::executor::{EPOCH_SECONDS, Gate, SimExecutor};
use crate::faults::{Fault, Link, Planned, When};
use crate::hardware::{Refusal, SimHardware};
use crate::log::{Log, SimClock, say};
use crate::network::SimNetwork;
use crate::oracle::Oracle;
use crate::pki::Pki;

/// Where every agent listens.
pub(crate) const PORT: u16 = 7443;
/// Nothing takes longer.
const LIMIT: Duration = Duration::from_mins(4);
/// How long a host is away that never comes back.
const FOR_GOOD: Duration = Duration::MAX;
/// A host that has nothing to do dies all the same.
const DIES_WITHIN: Duration = Duration::from_millis(100);

/// A host with an agent. Clones are the same host.
#[derive(Clone)]
pub(crate) struct Host {
    pub(crate) name: &'static str,
    pub(crate) hardware: SimHardware,
    pub(crate) disk: SimDisk,
    config: Arc<AgentConfig>,
    gate: Arc<Gate>,
    clock: SimClock,
    log: Log,
    seed: u64,
    lives: Arc<AtomicU64>,
    slowest_ms: u64,
    _watching: Arc<Watching>,
}

impl Host {
    /// The environment of a new life.
    fn environment(&self) -> Environment {
        let life = self.lives.fetch_add(1, Ordering::Relaxed);
        self.gate.open();
        let stream = |what: &str| Arc::new(Dice::new(self.seed, &format!("{what} {} {life}", self.name)));
        let executor = Arc::new(SimExecutor {
            clock: self.clock.clone(),
            gate: Arc::clone(&self.gate),
            dice: stream("agent"),
            delays: stream("delays"),
            slowest_ms: self.slowest_ms,
        });
        Environment {
            wall: executor.clone(),
            executor,
            network: Arc::new(SimNetwork { host: self.name, log: self.log.clone() }),
            disk: Arc::new(self.disk.clone()),
            hardware: Arc::new(self.hardware.clone()),
        }
    }

    /// One life: an agent that is started again whenever it does not begin or ends by itself.
    async fn live(self) -> turmoil::Result {
        const AGAIN: Duration = Duration::from_millis(100);
        let environment = self.environment();
        loop {
            match Agent::start((*self.config).clone(), environment.clone()).await {
                Ok(mut agent) => {
                    say!(self.log, self.name, "serves");
                    let error = agent.failed().await;
                    say!(self.log, self.name, "serves no more: {error}");
                }
                Err(error) => say!(self.log, self.name, "does not begin: {}", self.log.short(&chain(&error))),
            }
            tokio::time::sleep(AGAIN).await;
        }
    }
}

/// What a world is made of.
#[derive(Debug, Clone)]
pub(crate) struct Terms {
    pub(crate) seed: u64,
    pub(crate) faults: Vec<Planned>,
    /// The devices of each agent.
    pub(crate) devices: Vec<(&'static str, Vec<SimConfig>)>,
    /// Which agents have a holder.
    pub(crate) holders: Vec<&'static str>,
    /// Latency of every link, least and most.
    pub(crate) latency: (Duration, Duration),
    pub(crate) slowest_ms: u64,
    /// A defect in every agent.
    pub(crate) plant: Option<&'static str>,
}

/// What became of a run.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) log: String,
    pub(crate) violations: Vec<String>,
    pub(crate) struck: u64,
    pub(crate) virtual_time: Duration,
}

/// A world that has not begun.
pub(crate) struct World<'a> {
    sim: Sim<'a>,
    pub(crate) log: Log,
    pub(crate) oracle: Oracle,
    hosts: Vec<Host>,
    clock: SimClock,
    terms: Terms,
    /// Nothing goes wrong any more, and every host is up.
    calm: Arc<AtomicBool>,
    /// What ended without anything that kept its devices.
    bare_ends: BareEnds,
    /// What the story wants to go wrong.
    orders: Orders,
    /// Hosts that never come back.
    gone: Arc<Mutex<Vec<&'static str>>>,
    _planted: Option<Failing>,
}

/// Which hosts ended with nobody to keep their devices, and when.
pub(crate) type BareEnds = Arc<Mutex<Vec<(&'static str, Duration)>>>;
/// What is struck next.
pub(crate) type Orders = Arc<Mutex<Vec<Fault>>>;

/// What the world does after a fault.
#[derive(Debug, Clone, Copy)]
enum Heal {
    Release(Link),
    Repair(Link),
    Latency(Link),
    Bounce(&'static str),
}

impl World<'_> {
    pub(crate) fn new(pki: &Pki, terms: Terms) -> Self {
        static RUNS: AtomicU64 = AtomicU64::new(0);
        let run = RUNS.fetch_add(1, Ordering::Relaxed);
        let (clock, oracle) = (SimClock::default(), Oracle::default());
        let folder = format!("/simulated/{run}");
        let log = Log::new(clock.clone(), &folder);
        let mut sim = Builder::new()
            .rng_seed(terms.seed)
            .epoch(UNIX_EPOCH + Duration::from_secs(EPOCH_SECONDS))
            .tick_duration(Duration::from_millis(1))
            .simulation_duration(LIMIT + Duration::from_secs(1))
            .min_message_latency(terms.latency.0)
            .max_message_latency(terms.latency.1)
            .tcp_capacity(1024)
            .build();
        let mut hosts = Vec::new();
        for (name, devices) in &terms.devices {
            let folder = PathBuf::from(&folder).join(name);
            let has_holder = terms.holders.contains(name);
            let host = Host {
                name,
                hardware: SimHardware::new(name, log.clone(), &clock, oracle.clone(), devices.clone()),
                disk: SimDisk::new(name, log.clone()),
                config: Arc::new(config(pki, name, folder.clone(), devices, has_holder)),
                gate: Arc::default(),
                clock: clock.clone(),
                log: log.clone(),
                seed: terms.seed,
                lives: Arc::default(),
                slowest_ms: terms.slowest_ms,
                _watching: {
                    let log = log.clone();
                    let name = *name;
                    Arc::new(watch(&folder, move |point| say!(log, name, "journal: {point}")))
                },
            };
            host.hardware.set_holder(has_holder);
            let living = host.clone();
            sim.host(*name, move || living.clone().live());
            hosts.push(host);
        }
        let (calm, bare_ends) = (Arc::default(), Arc::default());
        let (orders, gone) = (Arc::default(), Arc::default());
        let planted = terms.plant.map(|defect| fail(Path::new(&folder), &format!("planted: {defect}"), 0));
        Self { _planted: planted, sim, log, oracle, hosts, clock, terms, calm, bare_ends, orders, gone }
    }

    pub(crate) fn host(&self, name: &str) -> &Host {
        self.hosts.iter().find(|host| host.name == name).unwrap()
    }

    /// Set once nothing goes wrong any more.
    pub(crate) fn calm(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.calm)
    }

    /// Hosts whose agents ended with nobody to keep their devices.
    pub(crate) fn bare_ends(&self) -> BareEnds {
        Arc::clone(&self.bare_ends)
    }

    /// What is put in here goes wrong at once.
    pub(crate) fn orders(&self) -> Orders {
        Arc::clone(&self.orders)
    }

    /// Hosts that never come back.
    pub(crate) fn gone(&self) -> Arc<Mutex<Vec<&'static str>>> {
        Arc::clone(&self.gone)
    }

    /// Runs until `story`, on a host of its own, is over.
    pub(crate) fn run(mut self, story: impl Future<Output = turmoil::Result> + 'static) -> Ended {
        self.sim.client("client", story);
        let mut faults = self.terms.faults.clone();
        let mut heals: Vec<(Duration, Heal)> = Vec::new();
        let mut dying: Vec<(&'static str, Duration, bool, Duration)> = Vec::new();
        let (mut struck, mut seen) = (0, 0);
        loop {
            let now = self.sim.elapsed();
            self.clock.set(now);
            let lines = self.log.len();
            let (due, later): (Vec<_>, Vec<_>) = faults.into_iter().partition(|planned| match planned.when {
                When::At(at) => now >= at,
                When::Line(line) => lines >= line,
                When::Said(what) => self.log.has_said(seen, what),
            });
            seen = lines;
            faults = later;
            let ordered = std::mem::take(&mut *self.orders.lock().unwrap());
            let ordered = ordered.into_iter().map(|fault| Planned { when: When::At(now), fault });
            let due: Vec<_> = due.into_iter().chain(ordered).collect();
            for Planned { fault, .. } in due {
                struck += u64::from(self.strike(fault, now, &mut heals, &mut dying));
            }
            let (ends, rest): (Vec<_>, Vec<_>) =
                dying.into_iter().partition(|(name, by, ..)| self.host(name).gate.is_shut() || now >= *by);
            dying = rest;
            for (name, _, loses_power, down) in ends {
                self.end(name, loses_power);
                if down == FOR_GOOD {
                    self.gone.lock().unwrap().push(name);
                } else {
                    heals.push((now + down, Heal::Bounce(name)));
                }
            }
            let (due, later): (Vec<_>, Vec<_>) = heals.into_iter().partition(|(at, _)| now >= *at);
            heals = later;
            for (_, heal) in due {
                self.heal(heal);
            }
            // What waits for something that never happens does not hold up the end.
            let over = faults.iter().all(|planned| matches!(planned.when, When::Line(_) | When::Said(_)))
                && now >= Duration::from_secs(3)
                || faults.is_empty();
            if over && heals.is_empty() && dying.is_empty() {
                faults.clear();
                self.calm.store(true, Ordering::Relaxed);
            }
            match self.sim.step() {
                Ok(true) => break,
                Ok(false) if now < LIMIT => {}
                Ok(false) => {
                    self.oracle.violated(&self.log, format!("it is not over after {LIMIT:?}"));
                    break;
                }
                Err(error) => {
                    self.oracle.violated(&self.log, format!("a host failed: {error}"));
                    break;
                }
            }
        }
        let virtual_time = self.sim.elapsed();
        let Self { sim, log, oracle, clock, hosts, .. } = self;
        let violations = oracle.violations();
        clock.standing(|| {
            for host in &hosts {
                host.disk.end_life(true);
            }
            drop(sim);
        });
        Ended { log: log.text(), violations, struck, virtual_time }
    }

    fn strike(
        &mut self,
        fault: Fault,
        now: Duration,
        heals: &mut Vec<(Duration, Heal)>,
        dying: &mut Vec<(&'static str, Duration, bool, Duration)>,
    ) -> bool {
        if let Fault::Kill { host, .. } = fault
            && (self.gone.lock().unwrap().contains(&host)
                || dying.iter().any(|(name, ..)| *name == host)
                || heals.iter().any(|(_, heal)| matches!(heal, Heal::Bounce(name) if *name == host)))
        {
            // It is dead already.
            return false;
        }
        say!(self.log, "world", "{fault:?}");
        match fault {
            Fault::Hold((a, b), lasting) => {
                self.sim.hold(a, b);
                heals.push((now + lasting, Heal::Release((a, b))));
            }
            Fault::Partition((a, b), lasting) => {
                self.sim.partition(a, b);
                heals.push((now + lasting, Heal::Repair((a, b))));
            }
            Fault::OneWay((from, to), lasting) => {
                self.sim.partition_oneway(from, to);
                heals.push((now + lasting, Heal::Repair((from, to))));
            }
            Fault::Slow((a, b), latency, lasting) => {
                self.sim.set_link_latency(a, b, latency);
                heals.push((now + lasting, Heal::Latency((a, b))));
            }
            Fault::Kill { host, pieces, loses_power, down } => {
                self.host(host).gate.shut_after(pieces);
                dying.push((host, now + DIES_WITHIN, loses_power, down));
            }
            Fault::Disk { host, what, after, times } => self.host(host).disk.fail(what, after, times),
            Fault::Set { host, device, target } => {
                self.host(host).hardware.refuse(device, Refusal::Set(target));
            }
            Fault::Reset { host, device } => self.host(host).hardware.refuse(device, Refusal::Reset),
            Fault::Gone { host, pieces } => self.lose(host, pieces, now, heals, dying),
        }
        true
    }

    /// The machine goes, and does not come back; also one that is away already.
    fn lose(
        &self,
        host: &'static str,
        pieces: u64,
        now: Duration,
        heals: &mut Vec<(Duration, Heal)>,
        dying: &mut Vec<(&'static str, Duration, bool, Duration)>,
    ) {
        if self.gone.lock().unwrap().contains(&host) {
            return;
        }
        let is_away = |heal: &Heal| matches!(heal, Heal::Bounce(name) if *name == host);
        if heals.iter().any(|(_, heal)| is_away(heal)) {
            heals.retain(|(_, heal)| !is_away(heal));
            let host_there = self.host(host).clone();
            self.clock.standing(|| {
                host_there.disk.end_life(true);
                host_there.hardware.end_life(true);
            });
            self.bare_ends.lock().unwrap().push((host, now));
            self.gone.lock().unwrap().push(host);
            return;
        }
        dying.retain(|(name, ..)| *name != host);
        self.host(host).gate.shut_after(pieces);
        dying.push((host, now + DIES_WITHIN, true, FOR_GOOD));
    }

    /// The agent ends as a kill ends it, or the whole machine as without power.
    fn end(&mut self, name: &'static str, loses_power: bool) {
        let host = self.host(name).clone();
        host.gate.shut();
        say!(self.log, name, "{}", if loses_power { "loses power" } else { "is killed" });
        if loses_power || !host.hardware.keeps_all() {
            self.bare_ends.lock().unwrap().push((name, self.sim.elapsed()));
        }
        // The order in which a dead host drops its tasks comes from their numbers, which are the whole process's: what they
        // send then must take the same time in each order. A link that was slow is not from then on.
        let (least, most) = self.terms.latency;
        let others: Vec<_> = self
            .hosts
            .iter()
            .map(|host| host.name)
            .chain(["client"])
            .filter(|other| *other != name)
            .collect();
        for other in &others {
            self.sim.set_link_latency(name, *other, least);
        }
        let (clock, sim) = (self.clock.clone(), &mut self.sim);
        clock.standing(|| {
            host.disk.end_life(loses_power);
            sim.crash(name);
            host.hardware.end_life(loses_power);
        });
        for other in others {
            self.sim.set_link_max_message_latency(name, other, most);
        }
    }

    fn heal(&mut self, heal: Heal) {
        say!(self.log, "world", "{heal:?}");
        match heal {
            // Also what was only slow, or partitioned meanwhile: a link has one state.
            Heal::Release((a, b)) => self.sim.release(a, b),
            Heal::Repair((a, b)) => {
                self.sim.repair(a, b);
                self.sim.release(a, b);
            }
            Heal::Latency((a, b)) => self.sim.set_link_latency(a, b, self.terms.latency.0),
            Heal::Bounce(name) => {
                let (clock, sim) = (self.clock.clone(), &mut self.sim);
                clock.standing(|| sim.bounce(name));
            }
        }
    }
}

fn config(pki: &Pki, name: &str, folder: PathBuf, devices: &[SimConfig], has_holder: bool) -> AgentConfig {
    let mut config = AgentConfig::default();
    name.clone_into(&mut config.node.name);
    config.node.state_dir = folder;
    config.server.listen = ([0, 0, 0, 0], PORT).into();
    config.server.handshake_timeout = Duration::from_secs(2);
    config.server.keepalive_interval = Duration::from_millis(400);
    config.server.keepalive_timeout = Duration::from_millis(400);
    config.server.stream_idle_timeout = Duration::from_secs(2);
    config.server.seal_timeout = Duration::from_secs(4);
    config.server.shutdown_grace = Duration::from_secs(1);
    config.server.stream_resume_window = Duration::from_secs(2);
    // What may have to be sent again fits into memory: a file would be one of the machine's own.
    config.limits.spool_disk_bytes = 0;
    config.defaults.stream_open_timeout = Duration::from_secs(2);
    config.defaults.hold_timeout = Duration::from_secs(2);
    config.defaults.pre_copy_budget = Duration::from_secs(2);
    config.limits.device_call_timeout = Duration::from_secs(20);
    config.holder.socket = has_holder.then(|| PathBuf::from("/simulated/holder"));
    config.devices = devices
        .iter()
        .map(|device| DeviceConfig {
            name: device.name.clone(),
            address: "sim".to_owned(),
            path: None,
            owner_pod: String::new(),
        })
        .collect();
    pki.configure(name, &mut config);
    config
}

/// When simulations begin, as the system has it.
pub(crate) fn epoch() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(EPOCH_SECONDS)
}
