//! How a configured device comes to be open: adopted from the holder, or opened, which resets it.
//!
//! ```text
//!   holder has it --adopt--> answered: as it was
//!        |                   silent:   late; waited for, for ever, with whatever claims it
//!        |                   over:     let go of
//!        '- no -----------------------> opened, and so reset
//! ```
//!
//! # Invariants
//! - What the holder keeps is let go of only where it is another device or its connection is over. A device process that
//!   stands still says neither.
//! - A device is brought in by one task at a time.
//!
//! # Failure paths
//! What is in the way of an adoption and is not the device leaves it with the holder: UNAVAILABLE, and tried again.

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared};
use tokio::sync::Notify;
use vfio_checkpoint_device::address::{Access, Keepsake, Opened as OpenDevice};
use vfio_checkpoint_device::{Call, DeviceLane, Driver, chain};
use vfio_checkpoint_fsm::{Role, State};
use vfio_checkpoint_proto::ids::{DeviceName, Epoch, LogicalDeviceId};

use super::keeper::Keeper;
use super::slot::{Facts, Opened, Slot};
use super::view::Standing;
use crate::core::{Core, Tasks};
use crate::environment::Environment;
use crate::failpoint::reached;
use crate::journal::{Change, DeviceRecord, Journal};

/// How a device came to be open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrived {
    /// As the agent before had it.
    Adopted,
    /// Opened, and so reset.
    Opened,
    /// Not at all.
    Not,
}

/// How a device comes to be open, also where that takes as long as its process stands still.
pub type Arrival = Shared<BoxFuture<'static, Arrived>>;

/// Its process is given so long to answer before the agent goes on without it.
const ANSWERS_WITHIN: Duration = Duration::from_secs(10);

/// Why a device that the holder keeps is not taken over.
#[derive(Debug)]
enum NotAdopted {
    /// Something else is in the way: the journal, a thread. The device is as it was.
    Yet(String),
    /// It cannot be: what is in it counts as lost.
    Lost(String),
}

/// What is needed to open devices.
#[derive(Debug, Clone)]
pub struct Opener {
    /// Clocks and lanes.
    pub environment: Environment,
    /// What must outlive the agent.
    pub journal: Journal,
    /// The holder, where there is one.
    pub keeper: Option<Keeper>,
    /// A call on a device that takes longer puts it out of service.
    pub call_limit: Duration,
}

impl Opener {
    /// Begins to bring a slot's device in, which goes on among `tasks`. Ready once it is in, or is late.
    pub async fn begin(&self, slot: &Arc<Slot>, before: Option<DeviceRecord>, tasks: &Tasks) -> Arrival {
        let (opener, slot, late) = (self.clone(), Arc::clone(slot), Arc::new(Notify::new()));
        let tell = Arc::clone(&late);
        let arrival = async move { opener.bring_in(&slot, before, &tell).await }.boxed().shared();
        tasks.spawn(arrival.clone().map(drop));
        tokio::select! {
            biased;
            _arrived = arrival.clone() => {}
            () = late.notified() => {}
        }
        arrival
    }

    /// Brings a slot's device in. `before` is what the journal says of it. Tells `late` where its process does not answer.
    pub async fn bring_in(&self, slot: &Arc<Slot>, before: Option<DeviceRecord>, late: &Notify) -> Arrived {
        let kept = match &self.keeper {
            Some(keeper) => match keeper.take(slot.name().clone()).await {
                Ok(kept) => kept,
                Err(error) => {
                    // Opening it might reset what the holder keeps.
                    slot.unavailable(chain(&error));
                    return Arrived::Not;
                }
            },
            None => None,
        };
        if let Some(keepsake) = kept {
            reached(format_args!("boot: keepsake taken"));
            match self.adopt(slot, keepsake, before.as_ref(), late).await {
                Ok(()) => return Arrived::Adopted,
                // What is in the way is not the device: it stays with the holder as it is, for the next try.
                Err(NotAdopted::Yet(problem)) => {
                    tracing::error!(device = %slot.name(), problem, "not adopted yet; the holder keeps it");
                    slot.unavailable(problem);
                    return Arrived::Not;
                }
                Err(NotAdopted::Lost(problem)) => {
                    tracing::error!(device = %slot.name(), problem, "not adopted; it is opened anew, its state is lost");
                    if let Some(keeper) = &self.keeper
                        && let Err(error) = keeper.let_go(slot.name().clone()).await
                    {
                        slot.unavailable(chain(&error));
                        return Arrived::Not;
                    }
                }
            }
        }
        match self.open(slot, before.as_ref()).await {
            Ok(()) => Arrived::Opened,
            Err(standing) => {
                tracing::warn!(device = %slot.name(), problem = standing.detail(), "not open");
                slot.not_open(standing);
                Arrived::Not
            }
        }
    }

    async fn adopt(
        &self,
        slot: &Arc<Slot>,
        keepsake: Keepsake,
        before: Option<&DeviceRecord>,
        late: &Notify,
    ) -> Result<(), NotAdopted> {
        // To give a silent process up is to close its connection, by which it resets its device: not for the agent to decide.
        let access = Access { adopt_within: Duration::MAX, ..self.access(slot) };
        let (address, hardware) = (slot.address().clone(), Arc::clone(&self.environment.hardware));
        let adopting = self.environment.blocking("adopt", move || hardware.adopt(&address, keepsake, access));
        let mut adopting = pin!(adopting);
        let adopted = tokio::select! {
            biased;
            adopted = &mut adopting => adopted,
            () = self.environment.sleep(self.call_limit.min(ANSWERS_WITHIN)) => {
                let problem = "its process does not answer, and may stand still: the holder keeps it, and it is taken over \
                               once it answers; to give its state up, end the process";
                tracing::error!(device = %slot.name(), problem, "not adopted yet");
                slot.unavailable(problem.to_owned());
                late.notify_one();
                adopting.await
            }
        };
        let adopted = adopted.map_err(|error| NotAdopted::Yet(error.to_string()))?.map_err(|error| {
            let kind = if error.is_for_good() { NotAdopted::Lost } else { NotAdopted::Yet };
            kind(chain(&error))
        })?;
        let record = before.cloned().unwrap_or_else(|| {
            tracing::error!(
                device = %slot.name(),
                "the holder keeps it, and the journal has never heard of it: whether its state may run here nobody knows, \
                 so it is quarantined; ask what became of its last checkpoint, then ResetDevice it, which can keep its state"
            );
            DeviceRecord { quarantined: true, ..self.new_record(None) }
        });
        self.take_in(slot, adopted, record).await.map_err(NotAdopted::Yet)
    }

    async fn open(&self, slot: &Arc<Slot>, before: Option<&DeviceRecord>) -> Result<(), Standing> {
        let (address, access) = (slot.address().clone(), self.access(slot));
        let hardware = Arc::clone(&self.environment.hardware);
        let opened = self
            .environment
            .blocking("open", move || hardware.open(&address, access))
            .await
            .map_err(|error| Standing::Unavailable(error.to_string()))?
            .map_err(|error| {
                let stands =
                    if error.is_not_migratable() { Standing::NotMigratable } else { Standing::Unavailable };
                stands(chain(&error))
            })?;
        // Opening resets: whatever lived here is gone. A quarantine was about what was gone with it.
        let new = self.new_record(before.and_then(|before| before.rate_bytes_per_second));
        let past = before.map(|before| before.past.clone()).unwrap_or_default();
        let record = DeviceRecord { past, ..new };
        self.take_in(slot, opened, record).await.map_err(Standing::Unavailable)
    }

    async fn take_in(
        &self,
        slot: &Arc<Slot>,
        opened: OpenDevice,
        record: DeviceRecord,
    ) -> Result<(), String> {
        let OpenDevice { device, keepsake, sim } = opened;
        let looks_on = Arc::downgrade(slot);
        let driver = Driver::new(device).watched(move |state| {
            if let Some(slot) = looks_on.upgrade() {
                slot.set_state(state);
            }
        });
        let facts = Facts {
            driver: driver.identity().driver.clone(),
            capabilities: *driver.capabilities(),
            fingerprint: driver.fingerprint().clone(),
        };
        let lane = DeviceLane::new(driver, Arc::clone(&self.environment.executor), self.call_limit)
            .map_err(|error| format!("its thread cannot be started: {error}"))?;
        // From here on whoever ends the agent waits for its close, wherever this ends.
        slot.has_lane(&lane);
        reached(format_args!("boot: device open"));
        if record.quarantined {
            let quarantine = lane.start(Call::GetState, Driver::quarantine).finished().await;
            quarantine.map_err(|hung| hung.to_string())?;
        }
        let change = Change::Device(slot.name().clone(), record.clone());
        self.journal.commit(vec![change]).await.map_err(|error| chain(&error))?;
        // After it is on record what lives in the device: one that was opened anew, and so reset, is kept from here on, and
        // the next agent must not take it for the one that an operation had.
        if let (Some(keeper), Some(keepsake)) = (&self.keeper, keepsake)
            && let Err(error) = keeper.put(slot.name().clone(), keepsake).await
        {
            // It works without; the keeper tries again and says so.
            tracing::error!(device = %slot.name(), error = %chain(&error), "not kept by the holder");
        }
        reached(format_args!("boot: device kept"));
        slot.opened(Opened { lane, facts, record, sim });
        slot.read_back().await;
        Ok(())
    }

    fn access(&self, slot: &Slot) -> Access {
        Access {
            name: Some(slot.name().id().to_owned()),
            path: slot.path(),
            clock: Arc::new(crate::environment::ExecutorClock(Arc::clone(&self.environment.executor))),
            keep: self.keeper.is_some(),
            ..Access::default()
        }
    }

    fn new_record(&self, rate_bytes_per_second: Option<u64>) -> DeviceRecord {
        DeviceRecord {
            logical: new_logical(&self.environment),
            epoch: Epoch(1),
            rate_bytes_per_second,
            quarantined: false,
            left_stopped: false,
            handed_over: false,
            past: Vec::new(),
        }
    }
}

/// A logical device that nobody has seen before.
pub fn new_logical(environment: &Environment) -> LogicalDeviceId {
    let random = u128::from(environment.executor.random()) << 64 | u128::from(environment.executor.random());
    LogicalDeviceId::from_bytes(random.to_be_bytes())
}

/// Tries again, for as long as the agent lives, to open what could not be opened.
///
/// `before` is what the journal said of the devices when the agent began: one that is adopted late comes with it.
///
/// What is in `arriving` and has not arrived is waited for, and not tried meanwhile.
pub async fn retry_unavailable(
    core: Arc<Core>,
    opener: Opener,
    before: BTreeMap<DeviceName, DeviceRecord>,
    mut arriving: BTreeMap<DeviceName, Arrival>,
) {
    const EVERY: Duration = Duration::from_secs(30);
    for (name, arrival) in &arriving {
        if let (None, Some(slot)) = (arrival.peek(), core.registry.get(name)) {
            core.tasks.spawn(bring_back_late(Arc::clone(&core), Arc::clone(slot), arrival.clone()));
        }
    }
    loop {
        core.environment.sleep(EVERY).await;
        for slot in core.registry.all() {
            let arrives = arriving.get(slot.name()).is_some_and(|arrival| arrival.peek().is_none());
            if slot.lane().is_none() && slot.leased_by().is_none() && !arrives {
                let before = slot.view().record.or_else(|| before.get(slot.name()).cloned());
                let arrival = opener.begin(slot, before, &core.tasks).await;
                arriving.insert(slot.name().clone(), arrival.clone());
                match arrival.peek() {
                    Some(Arrived::Adopted | Arrived::Opened) => {
                        tracing::info!(device = %slot.name(), "open now");
                        bring_back_unclaimed(&core, slot).await;
                    }
                    Some(Arrived::Not) => {}
                    None => {
                        core.tasks.spawn(bring_back_late(Arc::clone(&core), Arc::clone(slot), arrival));
                    }
                }
            }
        }
    }
}

/// Waits for a device that is late. One that an operation waits for as well is the operation's.
async fn bring_back_late(core: Arc<Core>, slot: Arc<Slot>, arrival: Arrival) {
    match arrival.await {
        Arrived::Adopted | Arrived::Opened => {
            tracing::info!(device = %slot.name(), "open now");
            bring_back_unclaimed(&core, &slot).await;
        }
        Arrived::Not => {}
    }
}

/// A device that nobody claims runs, unless it was left stopped on request, or waits for somebody to decide.
pub async fn bring_back_unclaimed(core: &Core, slot: &Slot) {
    let (Some(lane), None) = (slot.lane(), slot.leased_by()) else { return };
    let view = slot.view();
    let Some(record) = view.record else { return };
    let runs = matches!(view.state, Some((State::Running, _)));
    if runs || record.left_stopped || record.quarantined {
        return;
    }
    tracing::warn!(device = %slot.name(), state = ?view.state, "claimed by no operation; it is brought back");
    let back = lane.start(Call::GetState, |driver| driver.recover_left_over(Role::Source)).finished().await;
    if let Ok(Err(failure)) = &back {
        tracing::error!(device = %slot.name(), %failure, "not brought back; it is quarantined");
    }
    slot.read_back().await;
    if matches!(back, Ok(Err(_))) {
        let record = DeviceRecord { quarantined: true, ..record };
        let change = Change::Device(slot.name().clone(), record.clone());
        if let Err(error) = core.journal.commit(vec![change]).await {
            tracing::error!(error = %chain(&error), "a quarantine cannot be recorded");
        }
        slot.set_record(record);
    }
}
