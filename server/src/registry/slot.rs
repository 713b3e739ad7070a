//! One configured device.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use vfio_checkpoint_device::address::DeviceAddress;
use vfio_checkpoint_device::kernel::KernelPath;
use vfio_checkpoint_device::lane::Closing;
use vfio_checkpoint_device::sim::SimDevice;
use vfio_checkpoint_device::{Backend, Call, DataSize, DeviceLane, Fingerprint, driver};
use vfio_checkpoint_fsm::State;
use vfio_checkpoint_proto::ids::{DeviceName, OperationName};

use super::view::{DeviceView, Standing};
use crate::environment::Environment;
use crate::journal::DeviceRecord;

/// One configured device, opened or not.
#[derive(Debug)]
pub struct Slot {
    name: DeviceName,
    address: DeviceAddress,
    path: Option<KernelPath>,
    environment: Environment,
    lane: Mutex<Option<DeviceLane>>,
    closing: Mutex<Option<Closing>>,
    sim: Mutex<Option<SimDevice>>,
    /// Who has the device log the pages that it writes: reading the log clears it, so it is one caller's alone.
    log_owner: Mutex<Option<String>>,
    /// Where the device was seen last. The view says where it is, and nothing of one that does not answer.
    seen: Mutex<Option<State>>,
    view: watch::Sender<DeviceView>,
    revision: Arc<watch::Sender<u64>>,
}

/// What opening a device brought.
#[derive(Debug)]
pub struct Opened {
    /// The device on its lane.
    pub lane: DeviceLane,
    /// What it is and can do.
    pub facts: Facts,
    /// What lives in it.
    pub record: DeviceRecord,
    /// The slot of a simulated device.
    pub sim: Option<SimDevice>,
}

/// What is known of an open device without asking it.
#[derive(Debug, Clone)]
pub struct Facts {
    pub(crate) driver: String,
    pub(crate) capabilities: vfio_checkpoint_device::DeviceCapabilities,
    pub(crate) fingerprint: Fingerprint,
}

impl Slot {
    /// A slot whose device is not open yet.
    pub fn new(
        name: DeviceName,
        address: DeviceAddress,
        owner_pod: String,
        environment: Environment,
        revision: Arc<watch::Sender<u64>>,
    ) -> Self {
        let backend = match address {
            DeviceAddress::Kernel(_) => Backend::Kernel,
            DeviceAddress::VfioUser(_) => Backend::VfioUser,
            DeviceAddress::Sim(_) => Backend::Sim,
        };
        let view = DeviceView {
            name: name.clone(),
            address: address.to_string(),
            backend,
            driver: String::new(),
            state: None,
            standing: Standing::Unavailable("it is not open yet".to_owned()),
            capabilities: None,
            data_size: DataSize::Unknown,
            fingerprint: Fingerprint::new(),
            record: None,
            lease: None,
            owner_pod,
            revision: 0,
        };
        let (lane, sim, view) = (Mutex::new(None), Mutex::new(None), watch::Sender::new(view));
        Self {
            name,
            address,
            path: None,
            environment,
            lane,
            closing: Mutex::new(None),
            sim,
            log_owner: Mutex::new(None),
            seen: Mutex::new(None),
            view,
            revision,
        }
    }

    /// The same, opened this way where it is a kernel device.
    #[must_use]
    pub fn by(self, path: Option<KernelPath>) -> Self {
        Self { path, ..self }
    }

    /// What it is called.
    pub fn name(&self) -> &DeviceName {
        &self.name
    }

    /// Where it is.
    pub fn address(&self) -> &DeviceAddress {
        &self.address
    }

    /// Which way to a kernel device, where that was configured.
    pub fn path(&self) -> Option<KernelPath> {
        self.path
    }

    /// The device on its lane, where it is open.
    pub fn lane(&self) -> Option<DeviceLane> {
        self.locked().clone()
    }

    /// When what was opened of it last is closed, taken in or not.
    pub fn closing(&self) -> Option<Closing> {
        self.closing.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Its device is open, on this lane; whether it is taken in will be seen.
    pub(super) fn has_lane(&self, lane: &DeviceLane) {
        *self.closing.lock().unwrap_or_else(PoisonError::into_inner) = Some(lane.closing());
    }

    /// The simulated device behind it, where it is one: what it holds can be told, as of no real device.
    pub fn sim(&self) -> Option<SimDevice> {
        self.sim.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Who has the device log the pages that it writes.
    pub fn log_owner(&self) -> Option<String> {
        self.log_owner.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Who has it from now on.
    pub fn set_log_owner(&self, owner: Option<String>) {
        *self.log_owner.lock().unwrap_or_else(PoisonError::into_inner) = owner;
    }

    /// As it was known last.
    pub fn view(&self) -> DeviceView {
        self.view.borrow().clone()
    }

    /// Where the device was seen last in this life of the agent, also where it does not answer any more.
    pub fn last_seen(&self) -> Option<State> {
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn see(&self, state: State) {
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = Some(state);
    }

    /// Takes in an opened device.
    pub fn opened(&self, opened: Opened) {
        let Opened { lane, facts, record, sim } = opened;
        *self.sim.lock().unwrap_or_else(PoisonError::into_inner) = sim;
        *self.locked() = Some(lane);
        self.change(|view| {
            view.driver = facts.driver;
            view.capabilities = Some(facts.capabilities);
            view.fingerprint = facts.fingerprint;
            view.standing = if record.quarantined { Standing::Quarantined } else { Standing::Ready };
            view.record = Some(record);
        });
    }

    /// Takes in why the device could not be opened.
    pub fn unavailable(&self, why: String) {
        self.not_open(Standing::Unavailable(why));
    }

    /// Takes in how the device stands, which could not be opened.
    pub fn not_open(&self, standing: Standing) {
        self.change(|view| view.standing = standing);
    }

    /// Who has it.
    pub fn leased_by(&self) -> Option<OperationName> {
        self.view.borrow().lease.clone()
    }

    pub(super) fn set_lease(&self, lease: Option<OperationName>) {
        self.change(|view| view.lease = lease);
    }

    /// What lives in the device from now on.
    pub fn set_record(&self, record: DeviceRecord) {
        self.change(|view| {
            if let Standing::Ready | Standing::Quarantined = view.standing {
                view.standing = if record.quarantined { Standing::Quarantined } else { Standing::Ready };
            }
            view.record = Some(record);
        });
    }

    /// Takes in the state that an operation has just read back. Nothing more is known of a device that hangs.
    pub fn set_state(&self, state: State) {
        let now = self.environment.unix_now();
        self.see(state);
        self.change(|view| match view.standing {
            Standing::Hung(_) => {}
            Standing::Ready
            | Standing::Quarantined
            | Standing::Unavailable(_)
            | Standing::NotMigratable(_) => {
                view.state = Some((state, now));
            }
        });
    }

    /// Who uses it, where a caller says so.
    pub fn set_owner_pod(&self, owner_pod: String) {
        self.change(|view| view.owner_pod = owner_pod);
    }

    /// Reads the device back, unless an operation is at work on it or it is not open, and says how it is. Of one that
    /// has an operation the driver tells each state as it reads it back.
    pub async fn refresh(&self) -> DeviceView {
        if self.leased_by().is_none() {
            self.read_back().await;
        }
        self.view()
    }

    /// Reads the device back, whoever has it.
    pub async fn read_back(&self) {
        let Some(lane) = self.lane() else { return };
        let reading = lane.start(Call::GetState, |driver| {
            (driver.observe(), driver.data_size().unwrap_or(DataSize::Unknown), driver.standing())
        });
        let now = self.environment.unix_now();
        match reading.finished().await {
            Ok((state, data_size, standing)) => {
                if let Ok(state) = &state {
                    self.see(*state);
                }
                self.change(|view| {
                    view.state = state.ok().map(|state| (state, now));
                    view.data_size = data_size;
                    match standing {
                        driver::Standing::Quarantined => view.standing = Standing::Quarantined,
                        driver::Standing::InService if view.standing != Standing::Quarantined => {
                            view.standing = Standing::Ready;
                        }
                        driver::Standing::InService => {}
                    }
                });
            }
            Err(hung) => self.change(|view| {
                view.state = None;
                view.standing = Standing::Hung(hung.to_string());
            }),
        }
    }

    /// Changes the view. That it was read back again, and found as it was, is no change that anybody is told.
    fn change(&self, change: impl FnOnce(&mut DeviceView)) {
        self.view.send_if_modified(|view| {
            let before = view.clone();
            change(view);
            if view.is_as(&before) {
                return false;
            }
            self.revision.send_modify(|revision| *revision += 1);
            view.revision = *self.revision.borrow();
            true
        });
    }

    fn locked(&self) -> MutexGuard<'_, Option<DeviceLane>> {
        self.lane.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
