//! Whole saves and restores of devices in other processes, through this project's client and its operations.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rustix::event::EventfdFlags;
use vfio_checkpoint_device::lane::DEFAULT_CALL_LIMIT;
use vfio_checkpoint_device::operation::{
    self, Alone, Arrival, BoxError, OperationError, PrecopyPolicy, RestoreReport, RestoreTerms, SaveReport,
    SaveTerms, StateSink, StateSource,
};
use vfio_checkpoint_device::seal::SealHasher;
use vfio_checkpoint_device::sim::{SimConfig, SimDma, Workload};
use vfio_checkpoint_device::vfio_user::server::ServerOptions;
use vfio_checkpoint_device::vfio_user::{ConnectOptions, VfioUserDevice};
use vfio_checkpoint_device::{
    Call, ConfigCapture, DeviceError, DeviceLane, DirtyReport, Driver, InterruptKind, IovaRange,
    MigrationDevice, PciCommand, Rearm, Threads, Verifier,
};
use vfio_checkpoint_fsm::{AfterSave, Capabilities, Outcome, State};

use crate::served::{Process, Served, slot, small, spawn};

fn connect(path: &Path) -> VfioUserDevice {
    VfioUserDevice::connect(path, ConnectOptions::default()).unwrap()
}

fn lane(device: impl MigrationDevice + 'static) -> DeviceLane {
    DeviceLane::new(Driver::new(Box::new(device)), Arc::new(Threads::new()), DEFAULT_CALL_LIMIT).unwrap()
}

/// State in memory, a blob a device.
#[derive(Default)]
struct Blobs {
    states: Vec<Vec<u8>>,
    /// Which is being read, from where on.
    reading: usize,
    at: usize,
    verifier: Verifier,
    config: Vec<Option<ConfigCapture>>,
    /// Runs once, when this many bytes have passed.
    after: Option<(usize, Box<dyn FnOnce() + Send>)>,
}

impl Blobs {
    fn new(devices: usize) -> Self {
        Self { states: vec![Vec::new(); devices], ..Self::default() }
    }

    fn passed(&mut self, bytes: usize) {
        if let Some((_, act)) = self.after.take_if(|(after, _)| *after <= bytes) {
            act();
        }
    }
}

impl StateSink for Blobs {
    async fn chunk(&mut self, device: usize, bytes: Bytes) -> Result<(), BoxError> {
        self.states[device].extend_from_slice(&bytes);
        let bytes = self.states[device].len();
        self.passed(bytes);
        Ok(())
    }

    async fn seal(&mut self, config: &[Option<ConfigCapture>]) -> Result<(), BoxError> {
        config.clone_into(&mut self.config);
        Ok(())
    }

    async fn mark_inconsistent(&mut self) -> Result<(), BoxError> {
        panic!("nothing is held here")
    }

    async fn discard(&mut self) -> Result<(), BoxError> {
        self.config.clear();
        Ok(())
    }
}

/// Device after device.
impl StateSource for Blobs {
    async fn next(&mut self) -> Result<Option<Arrival>, BoxError> {
        let device = self.reading;
        let Some(state) = self.states.get(device) else { return Ok(None) };
        let rest = &state[self.at..];
        let take = rest.len().min(70_000);
        if take > 0 {
            let chunk = self.verifier.accept(Bytes::copy_from_slice(&rest[..take]));
            self.at += take;
            let bytes = self.at;
            self.passed(bytes);
            return Ok(Some(Arrival::Chunk { device, chunk }));
        }
        let mut hasher = SealHasher::new();
        hasher.update(state);
        let seal = std::mem::take(&mut self.verifier).finish(&hasher.seal())?;
        (self.reading, self.at) = (device + 1, 0);
        Ok(Some(Arrival::Sealed { device, seal, config: self.config[device] }))
    }

    async fn ready(&mut self, _rearm: &[Option<Rearm>]) -> Result<(), BoxError> {
        Ok(())
    }
}

fn try_save(lanes: &[DeviceLane], pre_copy: bool, blobs: &mut Blobs) -> Result<SaveReport, OperationError> {
    let terms = SaveTerms::automatic(pre_copy, AfterSave::Resume, policy());
    pollster::block_on(operation::save(lanes, terms, &Alone, blobs))
}

fn restore(lanes: &[DeviceLane], blobs: &mut Blobs) -> Result<RestoreReport, OperationError> {
    let terms = RestoreTerms::run(Duration::from_secs(5));
    pollster::block_on(operation::restore(lanes, terms, &Alone, blobs))
}

fn policy() -> PrecopyPolicy {
    PrecopyPolicy { time_budget: Duration::from_secs(2), ..PrecopyPolicy::default() }
}

fn save(lanes: &[DeviceLane], pre_copy: bool) -> Blobs {
    let mut blobs = Blobs::new(lanes.len());
    let report = try_save(lanes, pre_copy, &mut blobs).unwrap();
    assert_eq!(report.precopy_bytes > 0, pre_copy);
    blobs
}

#[test]
fn a_device_moves_from_process_to_process() {
    let source = Process::start(&["--device", "sim:seed=5,memory=3MiB"]);
    let destination = Process::start(&["--device", "sim:seed=9,memory=3MiB"]);
    let (from, to) = (lane(connect(&source.path)), lane(connect(&destination.path)));
    let pristine = save(std::slice::from_ref(&to), false);
    for pre_copy in [false, true] {
        let mut blobs = save(std::slice::from_ref(&from), pre_copy);
        restore(std::slice::from_ref(&to), &mut blobs).unwrap();
        assert_eq!(to.call(Call::GetState, Driver::state).unwrap().unwrap(), State::Running);
        // Loaded, it saves as the same bytes. A stop-copy has one form, whatever way the state came.
        let expected = save(std::slice::from_ref(&from), false);
        let again = save(std::slice::from_ref(&to), false);
        assert!(again.states == expected.states, "pre-copy: {pre_copy}");
        assert!(again.states != pristine.states);
    }
}

/// In this process the device itself can be looked at.
#[test]
fn a_restored_device_has_the_digest_of_the_saved_one() {
    for pre_copy in [false, true] {
        let workload = Workload { dirty_bytes_per_second: 40_960, ..Workload::default() };
        let config = SimConfig { memory_bytes: 3 << 20, ..SimConfig::default() };
        let (near, _time) = slot(SimConfig { seed: 3, workload, ..config.clone() });
        near.write_memory(12_345, b"what a guest wrote").unwrap();
        let source = Served::new(SimConfig { seed: 3, workload, ..config.clone() }, ServerOptions::default());
        source.slot.write_memory(12_345, b"what a guest wrote").unwrap();
        let destination = Served::new(SimConfig { seed: 4, ..config }, ServerOptions::default());
        let (from, to) = (lane(connect(&source.path)), lane(connect(&destination.path)));
        let mut blobs = save(std::slice::from_ref(&from), pre_copy);
        restore(std::slice::from_ref(&to), &mut blobs).unwrap();
        assert_eq!(destination.slot.digest(), source.slot.digest(), "pre-copy: {pre_copy}");
        assert_eq!(source.slot.digest(), near.digest(), "the source kept its state");
        assert_eq!((source.slot.resets(), destination.slot.resets()), (0, 0));
    }
}

#[test]
fn a_set_of_device_processes_moves_through_the_barrier() {
    let folder = |seed: u64| Served::new(SimConfig { seed, ..small() }, ServerOptions::default());
    let sources: Vec<Served> = (0..3).map(folder).collect();
    let destinations: Vec<Served> = (10..13).map(folder).collect();
    let lanes = |served: &[Served]| -> Vec<DeviceLane> {
        served.iter().map(|served| lane(connect(&served.path))).collect()
    };
    let (from, to) = (lanes(&sources), lanes(&destinations));
    let mut blobs = save(&from, true);
    restore(&to, &mut blobs).unwrap();
    for (source, destination) in sources.iter().zip(&destinations) {
        assert_eq!(source.slot.digest(), destination.slot.digest());
        let through = source.slot.hops().iter().any(|hop| hop.arc.to() == State::PreCopyP2p);
        assert!(through, "{:?}", source.slot.hops());
    }
}

fn assert_state_lost(error: &OperationError) {
    let lost = matches!(error, OperationError::Failed { outcome: Outcome::StateLost, .. });
    assert!(lost, "{error:?}");
}

/// The process dies in the middle: the first error says so, the device's state counts as lost, and whoever connects
/// next finds a device that runs.
#[test]
fn a_connection_lost_in_the_middle_is_state_lost() {
    for bytes in [0, 1, 90_000] {
        let source = Served::new(SimConfig { memory_bytes: 3 << 20, ..small() }, ServerOptions::default());
        let from = lane(connect(&source.path));
        let handle = source.handle.clone();
        let mut blobs = Blobs::new(1);
        blobs.after = Some((bytes, Box::new(move || handle.stop())));
        let error = try_save(std::slice::from_ref(&from), false, &mut blobs);
        assert_state_lost(&error.unwrap_err());
        let gone = from.call(Call::GetState, Driver::state).unwrap().unwrap_err();
        assert!(
            matches!(gone, DeviceError::Quarantined { .. } | DeviceError::Disconnected { .. }),
            "{gone:?}"
        );
        let slot = source.slot.clone();
        assert!(source.ended().is_ok());
        assert_eq!(slot.resets(), 1, "the server reset it");
    }
}

#[test]
fn a_server_process_that_is_killed_is_state_lost_too() {
    let process = Process::start(&["--device", "sim:memory=3MiB"]);
    let to = lane(connect(&process.path));
    let mut blobs = save(std::slice::from_ref(&to), false);
    let pid = rustix::process::Pid::from_child(&process.child);
    blobs.after = Some((
        100_000,
        Box::new(move || rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap()),
    ));
    assert_state_lost(&restore(std::slice::from_ref(&to), &mut blobs).unwrap_err());
}

#[test]
fn the_clients_view_of_a_device_is_the_devices() {
    for migration in Capabilities::ALL {
        let dma = SimDma {
            ranges: vec![IovaRange::new(0x10_0000, 64 * 4096).unwrap()],
            bytes_per_second: 10 * 4096,
            ..SimDma::default()
        };
        let served = Served::new(SimConfig { migration, dma, ..small() }, ServerOptions::default());
        let mut device = connect(&served.path);
        let (near, _time) = slot(SimConfig { migration, ..small() });
        let here = near.open().unwrap();
        assert_eq!(device.capabilities(), here.capabilities());

        let log = device.dma_log().unwrap();
        let range = IovaRange::new(0x10_0000, 64 * 4096).unwrap();
        assert_eq!(log.start(4096, &[range]).unwrap(), 4096);
        served.time.advance(Duration::from_secs(1));
        let mut bitmap = vfio_checkpoint_device::DirtyBitmap::new(range, 4096).unwrap();
        log.report(&mut bitmap).unwrap();
        assert_eq!(DirtyReport::Pages(bitmap.clone()).ranges().is_empty(), bitmap.dirty_pages() == 0);
        assert_eq!(bitmap.dirty_pages(), 10);
        log.stop().unwrap();

        let space = device.config_space().unwrap();
        space.set_command(PciCommand(0x0406)).unwrap();
        assert_eq!(space.command().unwrap(), PciCommand(0x0406));
        let eventfds: Vec<_> =
            (0..40).map(|_| rustix::event::eventfd(0, EventfdFlags::CLOEXEC).unwrap()).collect();
        let fds: Vec<_> = eventfds.iter().map(AsFd::as_fd).collect();
        space.arm(InterruptKind::MsiX, &fds).unwrap();
        let captured = space.capture().unwrap();
        assert_eq!(captured.interrupts, Some(Rearm { kind: InterruptKind::MsiX, vectors: 40 }));
        assert!(served.slot.raise_interrupt(39).unwrap());
        space.disarm(InterruptKind::MsiX).unwrap();
        assert!(!served.slot.raise_interrupt(0).unwrap());
    }
}

fn vfio_device(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vfio-device"));
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    spawn(&mut command).wait_with_output().unwrap()
}

#[test]
fn the_command_line_reaches_device_processes() {
    let source = Process::start(&["--device", "sim:seed=5,memory=1MiB", "--keep-state"]);
    let destination = Process::start(&["--device", "sim:seed=6,memory=1MiB", "--keep-state"]);
    let (one, other) = (source.folder().join("one"), source.folder().join("other"));
    let (from, to) =
        (format!("vfio-user:{}", source.path.display()), format!("vfio-user:{}", destination.path.display()));
    for arguments in [
        ["save", &from, one.to_str().unwrap()],
        ["restore", &to, one.to_str().unwrap()],
        ["save", &to, other.to_str().unwrap()],
    ] {
        let output = vfio_device(&arguments);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    let state = |path| {
        let mut file = vfio_checkpoint_device::state_file::StateFile::open(path).unwrap();
        file.state().unwrap().flat_map(Result::unwrap).collect::<Vec<u8>>()
    };
    assert!(state(&one) == state(&other), "the state that arrived is the state that left");

    let never = one.with_file_name("never");
    let nobody = vfio_device(&["save", "vfio-user:/nobody/listens", never.to_str().unwrap()]);
    assert_eq!(nobody.status.code(), Some(3));
    assert!(!fs::exists(&never).unwrap());
    let unfit = Process::start(&["--device", "sim:pci=no"]);
    let unfit = format!("vfio-user:{}", unfit.path.display());
    let refused = vfio_device(&["restore", &unfit, one.to_str().unwrap()]);
    assert_eq!(refused.status.code(), Some(3), "{}", String::from_utf8_lossy(&refused.stderr));
}
