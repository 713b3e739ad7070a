//! The devices of a simulated host, which outlive its agent, and the holder that keeps them open.
//!
//! ```text
//!   agent's life: handle, and a spare for the holder --put--> kept     the last handle that closes resets the device
//!   the agent dies: handles and spares close                  the holder dies, or the machine: kept ones close
//! ```
//! Each call of the agent on a device is said in the log, with the state that was read back, and each change of a state is
//! shown to the oracle.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use vfio_checkpoint_device::address::{
    Access, AdoptFailure, AdoptRefusal, DeviceAddress, Keepsake, KeepsakeError, KeepsakeKind, OpenFailure,
    Opened,
};
use vfio_checkpoint_device::kernel::KernelPath;
use vfio_checkpoint_device::sim::{SimConfig, SimDevice, SimHandle};
use vfio_checkpoint_device::{
    Call, ConfigSpace, DataSize, DataStream, DeviceCapabilities, DeviceError, DmaLog, Fingerprint, Identity,
    MigrationDevice,
};
use vfio_checkpoint_fsm::State;
use vfio_checkpoint_proto::ids::DeviceName;
use vfio_checkpoint_server::registry::hardware::{Hardware, Holding};
use vfio_checkpoint_server::registry::keeper::KeeperError;

use crate::log::{Log, SimClock, say};
use crate::oracle::Oracle;

/// A host's devices.
#[derive(Clone)]
pub(crate) struct SimHardware {
    host: &'static str,
    log: Log,
    oracle: Oracle,
    devices: Arc<BTreeMap<String, SimDevice>>,
    /// What the agent's keepsakes hold.
    spares: Arc<Mutex<BTreeMap<String, SimHandle>>>,
    /// What the holder has.
    kept: Arc<Mutex<BTreeMap<String, SimHandle>>>,
    has_holder: Arc<AtomicBool>,
    /// The mark of what was in a device when it was stopped to be saved last.
    saved: Arc<Mutex<BTreeMap<String, u64>>>,
    /// What the agent has opened in this life, and whether it ever opened a device twice in one.
    opened: Arc<Mutex<Opens>>,
    /// What devices will refuse.
    refusals: Arc<Mutex<Vec<(String, Refusal)>>>,
}

/// What a device refuses once, and stands where it stood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    Set(State),
    Reset,
}

#[derive(Debug, Default)]
struct Opens {
    now: Vec<String>,
    anew: bool,
}

impl fmt::Debug for SimHardware {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimHardware").field("host", &self.host).finish_non_exhaustive()
    }
}

impl SimHardware {
    pub(crate) fn new(
        host: &'static str,
        log: Log,
        clock: &SimClock,
        oracle: Oracle,
        configs: Vec<SimConfig>,
    ) -> Self {
        let devices = configs.into_iter().map(|config| {
            let name = config.name.clone();
            (name, SimDevice::new(config, Arc::new(clock.clone())).unwrap())
        });
        let devices: BTreeMap<_, _> = devices.collect();
        for (name, device) in &devices {
            oracle.knows(host, name, device.clone());
        }
        Self {
            host,
            log,
            oracle,
            devices: Arc::new(devices),
            spares: Arc::default(),
            kept: Arc::default(),
            has_holder: Arc::default(),
            saved: Arc::default(),
            opened: Arc::default(),
            refusals: Arc::default(),
        }
    }

    pub(crate) fn device(&self, name: &str) -> &SimDevice {
        &self.devices[name]
    }

    /// The device of this number refuses the next of these. Where there is no such device nothing happens.
    pub(crate) fn refuse(&self, device: usize, what: Refusal) {
        if let Some(name) = self.devices.keys().nth(device) {
            self.refusals.lock().unwrap().push((name.clone(), what));
        }
    }

    fn refuses(&self, name: &str, what: Refusal) -> bool {
        let mut refusals = self.refusals.lock().unwrap();
        let found = refusals.iter().position(|refusal| *refusal == (name.to_owned(), what));
        found.map(|index| refusals.remove(index)).is_some()
    }

    /// Whether the agent gave a device up and opened it anew: it could not note what it had opened.
    pub(crate) fn opened_anew(&self) -> bool {
        self.opened.lock().unwrap().anew
    }

    /// The mark of what was in a device when it was stopped to be saved last.
    pub(crate) fn saved_mark(&self, name: &str) -> u64 {
        self.saved.lock().unwrap().get(name).copied().unwrap_or_default()
    }

    /// From now on a holder runs, or none does.
    pub(crate) fn set_holder(&self, has_holder: bool) {
        self.has_holder.store(has_holder, Ordering::Relaxed);
        if !has_holder {
            let dropped = std::mem::take(&mut *self.kept());
            drop(dropped);
        }
    }

    pub(crate) fn has_holder(&self) -> bool {
        self.has_holder.load(Ordering::Relaxed)
    }

    /// Whether the holder has every device: one that was just opened it may not have yet.
    pub(crate) fn keeps_all(&self) -> bool {
        self.has_holder() && self.devices.keys().all(|name| self.kept().contains_key(name))
    }

    /// The agent is dead: what it had of its own is closed.
    pub(crate) fn end_life(&self, loses_power: bool) {
        let spares = std::mem::take(&mut *self.spares());
        drop(spares);
        self.opened.lock().unwrap().now.clear();
        if loses_power {
            let dropped = std::mem::take(&mut *self.kept());
            drop(dropped);
        }
    }

    fn spares(&self) -> MutexGuard<'_, BTreeMap<String, SimHandle>> {
        self.spares.lock().unwrap()
    }

    fn kept(&self) -> MutexGuard<'_, BTreeMap<String, SimHandle>> {
        self.kept.lock().unwrap()
    }

    /// An agent's own: the device, and what its holder is to have.
    fn opened(&self, name: &str, address: &DeviceAddress, handle: SimHandle, keep: bool) -> Opened {
        let keepsake = keep.then(|| {
            self.spares().insert(name.to_owned(), handle.duplicate());
            keepsake(address, handle.identity())
        });
        let device = Watched { handle, who: name.to_owned(), hardware: self.clone() };
        Opened { device: Box::new(device), sim: None, keepsake }
    }
}

/// A keepsake without fds: what it stands for is among the spares, or kept.
fn keepsake(address: &DeviceAddress, identity: &Identity) -> Keepsake {
    let kind = KeepsakeKind::Kernel { path: KernelPath::Container, ioas_id: None };
    Keepsake { address: address.clone(), identity: identity.clone(), kind, fds: Vec::new() }
}

impl Hardware for SimHardware {
    fn open(&self, address: &DeviceAddress, access: Access) -> Result<Opened, OpenFailure> {
        let name = access.name.expect("an agent names its devices");
        say!(self.log, self.host, "{name}: opened, and so reset");
        // An agent that opens a device has no keepsake of it any more: dropping one closes its duplicates.
        let stale = self.spares().remove(&name);
        drop(stale);
        let mut opens = self.opened.lock().unwrap();
        opens.anew |= opens.now.contains(&name);
        opens.now.push(name.clone());
        drop(opens);
        let handle = self.devices[&name].open()?;
        Ok(self.opened(&name, address, handle, access.keep))
    }

    fn adopt(
        &self,
        address: &DeviceAddress,
        keepsake: Keepsake,
        access: Access,
    ) -> Result<Opened, AdoptFailure> {
        let name = access.name.expect("an agent names its devices");
        let Some(handle) = self.kept().get(&name).map(SimHandle::duplicate) else {
            let source = AdoptRefusal::Keepsake(KeepsakeError::Fds { given: 0, wanted: 1 });
            return Err(AdoptFailure {
                address: address.clone(),
                keepsake: Some(Box::new(keepsake)),
                source,
            });
        };
        say!(self.log, self.host, "{name}: adopted in {}", self.devices[&name].state());
        Ok(self.opened(&name, address, handle, access.keep))
    }

    fn holder(&self, _socket: &Path) -> Result<Box<dyn Holding>, KeeperError> {
        if self.has_holder() { Ok(Box::new(SimHolder(self.clone()))) } else { Err(gone()) }
    }
}

fn gone() -> KeeperError {
    KeeperError::Thread(io::Error::other("the simulated holder is not there"))
}

/// A connection to the holder.
#[derive(Debug)]
struct SimHolder(SimHardware);

impl SimHolder {
    fn there(&self) -> Result<&SimHardware, KeeperError> {
        if self.0.has_holder() { Ok(&self.0) } else { Err(gone()) }
    }
}

impl Holding for SimHolder {
    fn take(&mut self, device: &DeviceName) -> Result<Option<Keepsake>, KeeperError> {
        let hardware = self.there()?;
        let is_kept = hardware.kept().contains_key(device.id());
        let device = hardware.device(device.id());
        Ok(is_kept.then(|| keepsake(&"sim".parse().unwrap(), device.identity())))
    }

    fn held(&mut self) -> Result<Vec<String>, KeeperError> {
        Ok(self.there()?.kept().keys().cloned().collect())
    }

    fn put(&mut self, device: &DeviceName, _keepsake: &Keepsake) -> Result<(), KeeperError> {
        let hardware = self.there()?;
        let spare = hardware.spares().get(device.id()).map(SimHandle::duplicate);
        let Some(spare) = spare else { return Err(gone()) };
        let before = hardware.kept().insert(device.id().to_owned(), spare);
        drop(before);
        Ok(())
    }

    fn let_go(&mut self, device: &DeviceName) -> Result<(), KeeperError> {
        let hardware = self.there()?;
        // The agent drops its own duplicates with it.
        let before = (hardware.kept().remove(device.id()), hardware.spares().remove(device.id()));
        drop(before);
        Ok(())
    }

    fn is_closed(&self) -> bool {
        !self.0.has_holder()
    }
}

/// An open device whose calls are seen.
#[derive(Debug)]
struct Watched {
    handle: SimHandle,
    who: String,
    hardware: SimHardware,
}

impl Watched {
    fn say(&self, what: fmt::Arguments<'_>) {
        say!(self.hardware.log, self.hardware.host, "{}: {what}", self.who);
    }
}

impl MigrationDevice for Watched {
    fn identity(&self) -> &Identity {
        self.handle.identity()
    }

    fn fingerprint(&self) -> &Fingerprint {
        self.handle.fingerprint()
    }

    fn capabilities(&self) -> &DeviceCapabilities {
        self.handle.capabilities()
    }

    fn state(&mut self) -> Result<State, DeviceError> {
        let state = self.handle.state();
        match &state {
            Ok(state) => self.say(format_args!("reads {state}")),
            Err(error) => self.say(format_args!("state not read: {error}")),
        }
        self.hardware.oracle.look(&self.hardware.log, self.hardware.host);
        state
    }

    fn set_state(&mut self, target: State) -> Result<Option<DataStream>, DeviceError> {
        if self.hardware.refuses(&self.who, Refusal::Set(target)) {
            self.say(format_args!("refuses {target}"));
            return Err(DeviceError::errno(Call::SetState(target), libc::EINVAL));
        }
        let before = self.hardware.device(&self.who).state();
        let set = self.handle.set_state(target);
        match &set {
            Ok(_) => self.say(format_args!("set {target}")),
            Err(error) => self.say(format_args!("not set {target}: {error}")),
        }
        if set.is_ok() && target == State::StopCopy {
            let mark = self.hardware.device(&self.who).scratch();
            self.hardware.saved.lock().unwrap().insert(self.who.clone(), mark);
        }
        if set.is_ok() {
            let (oracle, device) = (&self.hardware.oracle, self.hardware.device(&self.who));
            oracle.moved(&self.hardware.log, self.hardware.host, device, (before, target));
        }
        self.hardware.oracle.look(&self.hardware.log, self.hardware.host);
        set
    }

    fn data_size(&mut self) -> Result<DataSize, DeviceError> {
        self.handle.data_size()
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        if self.hardware.refuses(&self.who, Refusal::Reset) {
            self.say(format_args!("refuses to be reset"));
            return Err(DeviceError::errno(Call::Reset, libc::EIO));
        }
        let mark = self.hardware.device(&self.who).scratch();
        let reset = self.handle.reset();
        self.say(format_args!("reset: {}", if reset.is_ok() { "done" } else { "failed" }));
        self.hardware.oracle.was_reset(&self.hardware.log, self.hardware.host, mark);
        reset
    }

    fn dma_log(&mut self) -> Option<&mut dyn DmaLog> {
        self.handle.dma_log()
    }

    fn config_space(&mut self) -> Option<&mut dyn ConfigSpace> {
        self.handle.config_space()
    }
}
