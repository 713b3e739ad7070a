//! A node of simulated devices, and state in memory, for the tests of whole operations.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use bytes::Bytes;
use vfio_checkpoint_fsm::{AfterSave, Cutover, SaveRequest, State};

use crate::executor::VirtualTime;
use crate::fault::{Fault, FaultyDevice};
use crate::lane::DEFAULT_CALL_LIMIT;
use crate::operation::{
    self, Alone, Arrival, BoxError, OperationError, PrecopyPolicy, RestoreReport, RestoreTerms, SaveReport,
    SaveTerms, StateSink, StateSource,
};
use crate::seal::SealHasher;
use crate::sim::{SimConfig, SimDevice, SimHandle};
use crate::{Call, ConfigCapture, DeviceLane, Driver, Executor, Inline, Rearm, Seal, Verifier};

pub(crate) const READY_LIMIT: Duration = Duration::from_secs(5);

pub(crate) const RESUME: SaveRequest =
    SaveRequest { pre_copy: true, cutover: Cutover::Auto, after: AfterSave::Resume };

/// One node: a set of simulated devices on lanes of one executor.
pub(crate) struct Node {
    pub(crate) slots: Vec<SimDevice>,
    pub(crate) lanes: Vec<DeviceLane>,
    /// Faults that struck, a count a device.
    pub(crate) struck: Vec<Arc<AtomicU64>>,
    /// Duplicates that somebody else holds.
    pub(crate) others: Vec<SimHandle>,
}

impl Node {
    pub(crate) fn new(configs: &[SimConfig], faults: &[&[Fault]]) -> Self {
        let inline = Inline::new(7);
        let time = inline.time();
        Self::on(Arc::new(inline), time, configs, faults)
    }

    /// On an executor whose virtual clock is `time`.
    pub(crate) fn on(
        executor: Arc<dyn Executor>,
        time: Arc<VirtualTime>,
        configs: &[SimConfig],
        faults: &[&[Fault]],
    ) -> Self {
        let slots: Vec<SimDevice> = configs
            .iter()
            .map(|config| SimDevice::new(config.clone(), Arc::clone(&time) as Arc<dyn crate::Clock>).unwrap())
            .collect();
        let handles: Vec<SimHandle> = slots.iter().map(|slot| slot.open().unwrap()).collect();
        let others = handles.iter().map(SimHandle::duplicate).collect();
        let mut struck = Vec::new();
        let lanes = handles
            .into_iter()
            .enumerate()
            .map(|(index, handle)| {
                let faults = faults.get(index).copied().unwrap_or_default();
                let device = FaultyDevice::new(Box::new(handle), faults, Arc::clone(&time));
                struck.push(device.struck());
                let driver = Driver::new(Box::new(device));
                DeviceLane::new(driver, Arc::clone(&executor), DEFAULT_CALL_LIMIT).unwrap()
            })
            .collect();
        Self { slots, lanes, struck, others }
    }

    pub(crate) fn digests(&self) -> Vec<[u8; 32]> {
        self.slots.iter().map(SimDevice::digest).collect()
    }

    pub(crate) fn states(&self) -> Vec<State> {
        self.lanes.iter().map(|lane| lane.call(Call::GetState, Driver::state).unwrap().unwrap()).collect()
    }
}

pub(crate) fn configs(count: u64, change: impl Fn(&mut SimConfig)) -> Vec<SimConfig> {
    (0..count)
        .map(|index| {
            let name = format!("sim{index}");
            let mut config = SimConfig { name, seed: index, memory_bytes: 300_000, ..SimConfig::default() };
            change(&mut config);
            config
        })
        .collect()
}

#[derive(Default)]
pub(crate) struct Memory {
    pub(crate) blobs: Vec<Vec<u8>>,
    pub(crate) config: Vec<Option<ConfigCapture>>,
    pub(crate) fail_after_bytes: Option<usize>,
    /// Whether it was sealed, marked inconsistent, discarded.
    pub(crate) sealed: bool,
    pub(crate) inconsistent: bool,
    pub(crate) discarded: bool,
    reading: usize,
    at: usize,
    verifier: Verifier,
}

impl Memory {
    pub(crate) fn new(devices: usize) -> Self {
        Self { blobs: vec![Vec::new(); devices], ..Self::default() }
    }

    /// The same state, to be read from its start.
    pub(crate) fn again(&self) -> Self {
        Self { blobs: self.blobs.clone(), config: self.config.clone(), ..Self::default() }
    }

    pub(crate) fn seal_of(&self, device: usize) -> Seal {
        let mut hasher = SealHasher::new();
        hasher.update(&self.blobs[device]);
        hasher.seal()
    }
}

impl StateSink for Memory {
    async fn chunk(&mut self, device: usize, bytes: Bytes) -> Result<(), BoxError> {
        assert!(!self.sealed && !self.discarded);
        self.blobs[device].extend_from_slice(&bytes);
        match self.fail_after_bytes {
            Some(limit) if self.blobs[device].len() > limit => Err("the disk is full".into()),
            Some(_) | None => Ok(()),
        }
    }

    async fn seal(&mut self, config: &[Option<ConfigCapture>]) -> Result<(), BoxError> {
        config.clone_into(&mut self.config);
        self.sealed = true;
        Ok(())
    }

    async fn mark_inconsistent(&mut self) -> Result<(), BoxError> {
        assert!(self.sealed);
        self.inconsistent = true;
        Ok(())
    }

    async fn discard(&mut self) -> Result<(), BoxError> {
        self.discarded = true;
        Ok(())
    }
}

/// Device after device.
impl StateSource for Memory {
    async fn next(&mut self) -> Result<Option<Arrival>, BoxError> {
        let device = self.reading;
        let Some(blob) = self.blobs.get(device) else { return Ok(None) };
        let rest = &blob[self.at..];
        let take = rest.len().min(70_000);
        if take > 0 {
            let chunk = self.verifier.accept(Bytes::copy_from_slice(&rest[..take]));
            self.at += take;
            return Ok(Some(Arrival::Chunk { device, chunk }));
        }
        let seal = std::mem::take(&mut self.verifier).finish(&self.seal_of(device))?;
        (self.reading, self.at) = (device + 1, 0);
        Ok(Some(Arrival::Sealed { device, seal, config: self.config[device] }))
    }

    async fn ready(&mut self, _rearm: &[Option<Rearm>]) -> Result<(), BoxError> {
        Ok(())
    }
}

/// What a test waits for in one place, with nobody to answer to.
pub(crate) fn save(
    lanes: &[DeviceLane],
    request: SaveRequest,
    policy: PrecopyPolicy,
    sink: &mut impl StateSink,
) -> Result<SaveReport, OperationError> {
    let terms = SaveTerms { policy, ..SaveTerms::automatic(request.pre_copy, request.after, policy) };
    pollster::block_on(operation::save(lanes, terms, &Alone, sink))
}

pub(crate) fn restore(
    lanes: &[DeviceLane],
    source: &mut impl StateSource,
) -> Result<RestoreReport, OperationError> {
    pollster::block_on(operation::restore(lanes, RestoreTerms::run(READY_LIMIT), &Alone, source))
}
