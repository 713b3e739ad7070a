//! State moves from one real device to another: the registers are equal afterwards.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use vfio_checkpoint_device::kernel::{KernelDevice, KernelPath, OpenOptions};
use vfio_checkpoint_device::lane::DEFAULT_CALL_LIMIT;
use vfio_checkpoint_device::operation::{
    self, Alone, Arrival, BoxError, OperationError, PrecopyPolicy, RestoreReport, RestoreTerms, SaveReport,
    SaveTerms, StateSink, StateSource,
};
use vfio_checkpoint_device::{
    ConfigCapture, DeviceError, DeviceLane, Driver, Read, Rearm, SaveStream, Threads, Verifier,
};
use vfio_checkpoint_fsm::{AfterSave, Cutover, SaveRequest, State};

use crate::Test;
use crate::blobs::seal_of;
use crate::facts::Facts;
use crate::uart;

pub(crate) const TESTS: &[Test] = &[
    ("save_restore::stop_copy_container", |facts| each_type(facts, KernelPath::Container, false)),
    ("save_restore::stop_copy_iommufd", |facts| each_type(facts, KernelPath::Iommufd, false)),
    ("save_restore::pre_copy_container", |facts| each_type(facts, KernelPath::Container, true)),
    ("save_restore::pre_copy_iommufd", |facts| each_type(facts, KernelPath::Iommufd, true)),
    ("save_restore::a_set_of_two_with_the_barrier", set_of_two),
    ("save_restore::pre_copy_and_stop_copy_give_the_same_bytes", same_bytes),
];

/// Opens a device of the guest on a path.
pub(crate) fn open(name: &str, path: KernelPath) -> KernelDevice {
    let options = OpenOptions { path: Some(path), ..OpenOptions::default() };
    KernelDevice::open(name, &options)
        .unwrap_or_else(|error| panic!("opening {name} by {path}: {}", vfio_checkpoint_device::chain(&error)))
}

/// Reads a stop-copy stream to its end.
pub(crate) fn read_all(stream: &mut dyn SaveStream) -> Result<Vec<u8>, DeviceError> {
    let mut all = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer)? {
            Read::Bytes(bytes) => all.extend_from_slice(&buffer[..bytes]),
            Read::Zero => return Ok(all),
            Read::NothingNow => panic!("STOP_COPY has no \"nothing for now\""),
        }
    }
}

/// State of a set in memory: what the operations write to and read from.
#[derive(Default)]
pub(crate) struct Memory {
    pub(crate) blobs: Vec<Vec<u8>>,
    config: Vec<Option<ConfigCapture>>,
    sealed: bool,
    reading: usize,
    verifier: Option<Verifier>,
}

impl Memory {
    pub(crate) fn new(devices: usize) -> Self {
        Self { blobs: vec![Vec::new(); devices], ..Self::default() }
    }
}

impl StateSink for Memory {
    async fn chunk(&mut self, device: usize, bytes: Bytes) -> Result<(), BoxError> {
        assert!(!self.sealed);
        self.blobs[device].extend_from_slice(&bytes);
        Ok(())
    }

    async fn seal(&mut self, config: &[Option<ConfigCapture>]) -> Result<(), BoxError> {
        config.clone_into(&mut self.config);
        self.sealed = true;
        Ok(())
    }

    async fn mark_inconsistent(&mut self) -> Result<(), BoxError> {
        panic!("nothing is held here")
    }

    async fn discard(&mut self) -> Result<(), BoxError> {
        self.sealed = false;
        Ok(())
    }
}

/// Device after device, each in one chunk.
impl StateSource for Memory {
    async fn next(&mut self) -> Result<Option<Arrival>, BoxError> {
        let device = self.reading;
        let Some(blob) = self.blobs.get(device) else { return Ok(None) };
        if let Some(verifier) = self.verifier.take() {
            let seal = verifier.finish(&seal_of(blob))?;
            self.reading += 1;
            let config = self.config.get(device).copied().flatten();
            return Ok(Some(Arrival::Sealed { device, seal, config }));
        }
        let verifier = self.verifier.insert(Verifier::new());
        let chunk = verifier.accept(Bytes::copy_from_slice(blob));
        Ok(Some(Arrival::Chunk { device, chunk }))
    }

    async fn ready(&mut self, _rearm: &[Option<Rearm>]) -> Result<(), BoxError> {
        Ok(())
    }
}

/// A lane of a test, which goes on only once the device is closed: the next one may open it.
#[derive(Debug)]
pub(crate) struct TestLane(Option<DeviceLane>);

impl Drop for TestLane {
    fn drop(&mut self) {
        if let Some(lane) = self.0.take() {
            let closing = lane.closing();
            drop(lane);
            pollster::block_on(closing.closed());
        }
    }
}

fn all(lanes: &[TestLane]) -> Vec<DeviceLane> {
    lanes.iter().filter_map(|lane| lane.0.clone()).collect()
}

/// A whole save, with nobody to answer to.
pub(crate) fn save(
    lanes: &[TestLane],
    request: SaveRequest,
    policy: PrecopyPolicy,
    sink: &mut impl StateSink,
) -> Result<SaveReport, OperationError> {
    let terms = SaveTerms::automatic(request.pre_copy, request.after, policy);
    pollster::block_on(operation::save(&all(lanes), terms, &Alone, sink))
}

/// A whole restore, with nobody to answer to.
pub(crate) fn restore(
    lanes: &[TestLane],
    source: &mut impl StateSource,
) -> Result<RestoreReport, OperationError> {
    let terms = RestoreTerms::run(Duration::from_secs(5));
    pollster::block_on(operation::restore(&all(lanes), terms, &Alone, source))
}

/// A driver of a duplicate of a device; the device itself stays with the test, to look at its registers.
pub(crate) fn driver(device: &KernelDevice) -> Driver {
    let fds = device.duplicate_fds().expect("duplicates");
    let identity = device.opened().identity().clone();
    Driver::new(Box::new(KernelDevice::from_fds(fds, identity).expect("an adopted device")))
}

/// The same, on a lane of its own.
pub(crate) fn lane(device: &KernelDevice) -> TestLane {
    let lane = DeviceLane::new(driver(device), Arc::new(Threads::new()), DEFAULT_CALL_LIMIT);
    TestLane(Some(lane.expect("a lane")))
}

pub(crate) fn request(pre_copy: bool) -> SaveRequest {
    SaveRequest { pre_copy, cutover: Cutover::Auto, after: AfterSave::Resume }
}

fn each_type(facts: &Facts, path: KernelPath, pre_copy: bool) {
    for (uuids, ports, size) in [(&facts.mtty1, 1, 60), (&facts.mtty2, 2, 96)] {
        let (source, destination) = (open(&uuids[0], path), open(&uuids[1], path));
        uart::program(&source, ports, 11);
        uart::program(&destination, ports, 99);
        let before = uart::registers(&source, ports);
        assert_ne!(uart::registers(&destination, ports), before);

        let mut memory = Memory::new(1);
        let report =
            save(&[lane(&source)], request(pre_copy), PrecopyPolicy::default(), &mut memory).expect("a save");
        assert_eq!(report.bytes, [size]);
        assert_eq!(report.precopy_bytes, if pre_copy { 24 } else { 0 }, "mtty pre-copies its header");
        assert_eq!(uart::registers(&source, ports), before, "the source runs on with its state");

        restore(&[lane(&destination)], &mut memory).expect("a restore");
        assert_eq!(uart::registers(&destination, ports), before);
    }
}

fn set_of_two(facts: &Facts) {
    let path = KernelPath::Iommufd;
    let sources = [open(&facts.mtty1[0], path), open(&facts.mtty1[1], path)];
    let destinations = [open(&facts.mtty1[2], path), open(&facts.mtty1[3], path)];
    for (device, seed) in sources.iter().zip([21, 22]) {
        uart::program(device, 1, seed);
    }
    let before: Vec<_> = sources.iter().map(|device| uart::registers(device, 1)).collect();

    let mut memory = Memory::new(2);
    let lanes = [lane(&sources[0]), lane(&sources[1])];
    let report = save(&lanes, request(true), PrecopyPolicy::default(), &mut memory).expect("a save");
    assert!(report.plan.barrier && report.plan.pre_copy);
    let lanes = [lane(&destinations[0]), lane(&destinations[1])];
    restore(&lanes, &mut memory).expect("a restore");
    let after: Vec<_> = destinations.iter().map(|device| uart::registers(device, 1)).collect();
    assert_eq!(after, before);
}

fn same_bytes(facts: &Facts) {
    let device = open(&facts.mtty2[0], KernelPath::Container);
    uart::program(&device, 2, 5);
    let blobs = [false, true].map(|pre_copy| {
        let mut memory = Memory::new(1);
        save(&[lane(&device)], request(pre_copy), PrecopyPolicy::default(), &mut memory).expect("a save");
        memory.blobs.remove(0)
    });
    assert_eq!(blobs[0], blobs[1]);
    assert_eq!(driver_state(&lane(&device)), State::Running);
}

fn driver_state(lane: &TestLane) -> State {
    let lane = lane.0.as_ref().expect("a lane until it is dropped");
    let state = lane.call(vfio_checkpoint_device::Call::GetState, Driver::state);
    state.expect("a lane that answers").expect("a state")
}
