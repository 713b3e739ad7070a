//! A device is saved on one host over a stream, and restored on another, whatever goes wrong meanwhile.
//!
//! The caller is as good as a caller can be: it begins again what failed, believes nothing but the end of an operation, and
//! restores nothing that a save did not bring to its good end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vfio_checkpoint_client::call::{CallError, Client};
use vfio_checkpoint_client::transfer::{GiveState, TakeState};
use vfio_checkpoint_device::seal::Seal;
use vfio_checkpoint_device::sim::{SimConfig, SimDevice};
use vfio_checkpoint_fsm::State;
use vfio_checkpoint_proto::domain::{ConfigSpaceCapture, Manifest};
use vfio_checkpoint_proto::frame::Accepted;
use vfio_checkpoint_proto::v1;

use crate::caller::Caller;
use crate::dice::Dice;
use crate::faults::{self, Planned};
use crate::hardware::SimHardware;
use crate::log::{Log, say};
use crate::oracle::Oracle;
use crate::pki::Pki;
use crate::world::{BareEnds, Ended, Terms, World};

/// The two hosts.
pub(crate) const AGENTS: [&str; 2] = ["a", "b"];
const DEVICE: &str = "n0";
/// How often the caller begins anew.
const ATTEMPTS: u32 = 20;

/// What is different from seed to seed, faults aside.
#[derive(Debug, Clone, Copy)]
struct Draw {
    mark: u64,
    stays_stopped: bool,
    allows_fork: bool,
    pre_copy: v1::PreCopyMode,
    pages: u64,
}

impl Draw {
    fn of(seed: u64) -> Self {
        let dice = Dice::new(seed, "story");
        let stays_stopped = dice.once_in(2);
        Self {
            mark: dice.draw() | 1,
            stays_stopped,
            allows_fork: !stays_stopped && !dice.once_in(4),
            pre_copy: dice.one_of(&[
                v1::PreCopyMode::Unspecified,
                v1::PreCopyMode::Never,
                v1::PreCopyMode::Required,
            ]),
            pages: 1 + dice.below(4),
        }
    }
}

/// The faults of a seed.
pub(crate) fn faults_of(seed: u64) -> Vec<Planned> {
    faults::draw(seed, &AGENTS)
}

/// Runs the story of a seed, with these faults.
pub(crate) fn run(pki: &Arc<Pki>, seed: u64, faults: Vec<Planned>) -> Ended {
    let draw = Draw::of(seed);
    let dice = Dice::new(seed, "world");
    let small = |seed| SimConfig {
        name: DEVICE.to_owned(),
        seed,
        memory_bytes: draw.pages * 4096,
        ..SimConfig::default()
    };
    let least = dice.between(0, 3);
    let is_calm = faults.is_empty();
    let world = World::new(
        pki,
        Terms {
            plant: None,
            seed,
            faults,
            devices: vec![("a", vec![small(1)]), ("b", vec![small(2)])],
            holders: AGENTS.into_iter().filter(|_| !dice.once_in(3)).collect(),
            latency: (least, least + dice.between(1, 12)),
            slowest_ms: dice.below(6),
        },
    );
    let [a, b] = AGENTS.map(|name| world.host(name).hardware.device(DEVICE).clone());
    a.set_scratch(draw.mark);
    a.write_memory(7, &draw.mark.to_be_bytes()).unwrap();
    world.oracle.watches(draw.mark, draw.allows_fork);
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
        draw,
        hardware: world.host("a").hardware.clone(),
        a,
        b,
        is_calm,
    };
    say!(world.log, "world", "{draw:?}");
    world.run(async move {
        story.tell().await;
        Ok(())
    })
}

/// State that was taken.
struct Saved {
    manifest: Manifest,
    pieces: Vec<(usize, bytes::Bytes)>,
    seals: Vec<(usize, Seal, Option<ConfigSpaceCapture>)>,
}

struct Story {
    log: Log,
    oracle: Oracle,
    caller: Caller,
    calm: Arc<AtomicBool>,
    bare_ends: BareEnds,
    draw: Draw,
    hardware: SimHardware,
    a: SimDevice,
    b: SimDevice,
    is_calm: bool,
}

/// What a restore came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Restored {
    Yes {
        /// How often the last close had reset the destination before.
        closed: u64,
    },
    /// The source may run still, and no fork was allowed.
    Refused,
}

impl Story {
    async fn tell(self) {
        let a = self.caller.connect("a").await;
        let Some((saved, mark)) = self.save(&a).await else {
            return self.violated("no save came to its end".to_owned());
        };
        let b = self.caller.connect("b").await;
        let restored = self.restore(&b, &saved).await;
        match restored {
            Some(Restored::Yes { .. }) if self.must_refuse() => {
                self.violated("a restore was let through that makes a second running copy".to_owned());
            }
            Some(Restored::Refused) if !self.must_refuse() => {
                self.violated("a restore was refused that makes no second running copy".to_owned());
            }
            Some(Restored::Yes { .. } | Restored::Refused) => {}
            None => self.violated("no restore came to its end".to_owned()),
        }
        while !self.calm.load(Ordering::Relaxed) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.settled(&a, &b).await;
        // Unless it was closed since, by whatever ended its host.
        let was_restored =
            matches!(restored, Some(Restored::Yes { closed }) if closed == self.b.close_resets());
        self.judge(mark, was_restored);
    }

    fn must_refuse(&self) -> bool {
        !self.draw.stays_stopped && !self.draw.allows_fork
    }

    fn violated(&self, what: String) {
        self.oracle.violated(&self.log, what);
    }

    /// State whose save succeeded, and the mark that the device had then.
    async fn save(&self, a: &Client) -> Option<(Saved, u64)> {
        let after = if self.draw.stays_stopped { v1::AfterSave::StayStopped } else { v1::AfterSave::Resume };
        for attempt in 0..ATTEMPTS {
            self.caller.rest_after(attempt).await;
            let request = v1::StartSaveRequest {
                devices: vec![format!("devices/{DEVICE}")],
                memory_capture: v1::MemoryCapture::None.into(),
                pre_copy: self.draw.pre_copy.into(),
                after: after.into(),
                request_id: request_id(1, attempt),
                ..Default::default()
            };
            let started = a.start_save(request).await;
            let Some(operation) =
                self.caller.told("StartSave", started).and_then(|started| started.operation)
            else {
                self.unblock(a, v1::ResetMode::KeepState, attempt).await;
                continue;
            };
            let taken = self.take(a, &operation.name).await;
            let ended = self.end_of(a, &operation.name).await;
            if let (Some(saved), v1::OperationResult::Succeeded) = (taken, ended.result()) {
                return Some((saved, self.hardware.saved_mark(DEVICE)));
            }
            if ended.result() == v1::OperationResult::Succeeded {
                self.violated("a save succeeded whose taker never had all of it".to_owned());
            }
        }
        None
    }

    /// Decides for a device that waits for somebody to decide: one that is quarantined, or that a save left stopped that was
    /// good and whose state went with this caller.
    async fn unblock(&self, client: &Client, mode: v1::ResetMode, attempt: u32) {
        let name = format!("devices/{DEVICE}");
        let request = v1::GetDeviceRequest { name: name.clone() };
        let answer = self.caller.told("GetDevice", client.get_device(request).await);
        let Some(device) = answer.and_then(|answer| answer.device) else { return };
        let is_stopped = device.state() == v1::MigrationState::Stop && device.operation.is_empty();
        if is_stopped || device.standing() == v1::DeviceStanding::Quarantined {
            let request_id = request_id(3, attempt);
            let reset = v1::ResetDeviceRequest { name, mode: mode.into(), request_id, ..Default::default() };
            let _ = self.caller.told(&format!("ResetDevice {mode:?}"), client.reset_device(reset).await);
        }
    }

    async fn take(&self, a: &Client, operation: &str) -> Option<Saved> {
        let TakeState { manifest, mut taker, .. } =
            self.caller.told("StreamState", TakeState::open(a, &operation.parse().unwrap()).await)?;
        let mut saved = Saved { manifest, pieces: Vec::new(), seals: Vec::new() };
        loop {
            match self.caller.told("take", taker.next().await)? {
                Some(Accepted::Chunk { device, chunk }) => {
                    say!(self.log, "client", "takes {} bytes", chunk.bytes().len());
                    saved.pieces.push((device, chunk.bytes().clone()));
                }
                Some(Accepted::Sealed { device, seal, config }) => {
                    let seal = seal.seal();
                    say!(self.log, "client", "has {} bytes sealed", seal.bytes);
                    saved.seals.push((device, seal, config));
                }
                Some(Accepted::Progress(_)) => say!(self.log, "client", "hears of progress"),
                None => break,
            }
        }
        self.caller.told("complete", taker.complete().await)?;
        Some(saved)
    }

    async fn restore(&self, b: &Client, saved: &Saved) -> Option<Restored> {
        for attempt in 0..ATTEMPTS {
            self.caller.rest_after(attempt).await;
            let closed = self.b.close_resets();
            let request = v1::RestoreRequest {
                devices: vec![format!("devices/{DEVICE}")],
                manifest: Some(saved.manifest.clone().into()),
                allow_fork: self.draw.allows_fork,
                request_id: request_id(2, attempt),
                ..Default::default()
            };
            let started = b.restore(request).await;
            if let Err(CallError::Refused(refusal)) = &started
                && refusal.blockers.iter().any(|blocker| blocker.kind.ends_with("SOURCE_STILL_RUNNING"))
            {
                say!(self.log, "client", "Restore: SOURCE_STILL_RUNNING");
                return Some(Restored::Refused);
            }
            let Some(operation) = self.caller.told("Restore", started).and_then(|started| started.operation)
            else {
                self.unblock(b, v1::ResetMode::DiscardState, attempt).await;
                continue;
            };
            let _ = self.give(b, &operation.name, saved).await;
            if self.end_of(b, &operation.name).await.result() == v1::OperationResult::Succeeded {
                return Some(Restored::Yes { closed });
            }
        }
        None
    }

    async fn give(&self, b: &Client, operation: &str, saved: &Saved) -> Option<()> {
        let GiveState { mut giver, .. } =
            self.caller.told("StreamState", GiveState::open(b, &operation.parse().unwrap()).await)?;
        for (device, bytes) in &saved.pieces {
            say!(self.log, "client", "gives {} bytes", bytes.len());
            self.caller.told("chunk", giver.chunk(*device, bytes.clone()).await)?;
        }
        for (device, seal, config) in &saved.seals {
            self.caller.told("seal", giver.seal_as(*device, *config, *seal).await)?;
        }
        self.caller.told("completed", giver.completed().await)
    }

    /// The operation once it is over. An agent that is away is waited for.
    async fn end_of(&self, client: &Client, operation: &str) -> v1::Operation {
        loop {
            let waited = client.wait_operation(operation, Duration::from_secs(1)).await;
            match self.caller.told("WaitOperation", waited).and_then(|answer| answer.operation) {
                Some(operation) if operation.done => {
                    let failure = operation.failure.as_ref().map_or("", |failure| &failure.reason);
                    let (result, outcome) = (operation.result(), operation.outcome());
                    say!(self.log, "client", "an operation is over: {result:?} {outcome:?} {failure}");
                    return operation;
                }
                Some(_) => {}
                None => self.caller.rest().await,
            }
        }
    }

    /// Until both agents are there, nothing is under way, and what they say of their devices is as it is.
    async fn settled(&self, a: &Client, b: &Client) {
        for (name, client, device) in [("a", a, &self.a), ("b", b, &self.b)] {
            let mut looks = 0;
            loop {
                self.caller.rest_after(looks).await;
                looks += 1;
                let request = v1::GetDeviceRequest { name: format!("devices/{DEVICE}") };
                let answer = self.caller.told("GetDevice", client.get_device(request).await);
                let Some(said) = answer.and_then(|answer| answer.device) else { continue };
                let is_quarantined = said.standing() == v1::DeviceStanding::Quarantined;
                say!(self.log, name, "says of {DEVICE}: {:?} {:?}", said.state(), said.standing());
                let may_stop = name == "a" && self.draw.stays_stopped;
                let stands_well = match device.state() {
                    State::Running => said.state() == v1::MigrationState::Running,
                    State::Stop => may_stop && said.state() == v1::MigrationState::Stop,
                    State::Error
                    | State::StopCopy
                    | State::Resuming
                    | State::RunningP2p
                    | State::PreCopy
                    | State::PreCopyP2p => false,
                };
                if said.operation.is_empty() && (stands_well || is_quarantined) {
                    break;
                }
                if looks >= 20 {
                    let is = device.state();
                    self.violated(format!("{name}/{DEVICE} is {is}, and its agent says {:?}", said.state()));
                    break;
                }
            }
        }
    }

    /// What must be true in the end.
    fn judge(&self, mark: u64, was_restored: bool) {
        let bare_ends = self.bare_ends.lock().unwrap();
        let may_lose = bare_ends.iter().any(|(host, _)| *host == "a") || self.hardware.opened_anew();
        if self.a.resets() > 0 {
            self.violated(format!("the source was reset {} times, which nobody asked for", self.a.resets()));
        }
        if self.a.close_resets() > 0 && !may_lose {
            self.violated("the source was reset by a close, and its holder had it".to_owned());
        }
        if self.a.close_resets() == 0 && self.a.scratch() != self.draw.mark {
            self.violated("the source lost its state".to_owned());
        }
        if self.a.close_resets() == 0 && self.draw.stays_stopped && self.a.state() != State::Stop {
            self.violated("the source was to stay stopped, and does not".to_owned());
        }
        if was_restored && (self.b.scratch(), self.b.state()) != (mark, State::Running) {
            let holds = (self.b.scratch(), self.b.state());
            self.violated(format!("what was restored is gone: {holds:x?}"));
        }
        if was_restored && self.a.close_resets() == 0 && self.a.digest() != self.b.digest() {
            self.violated("what was restored is not what was saved".to_owned());
        }
        if self.is_calm && (self.b.resets(), self.b.close_resets()) != (0, 0) {
            self.violated("nothing went wrong, and the destination was reset".to_owned());
        }
    }
}

pub(crate) fn request_id(kind: u32, attempt: u32) -> String {
    format!("{kind:08x}-0000-4000-8000-{attempt:012x}")
}
