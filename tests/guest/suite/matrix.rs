//! Every pair of states on a real device, hop by hop: what `fsm` predicts, what the kernel does, what the simulated
//! device does. All three must be the same.
//!
//! The kernel's hops come from its log, the simulated device's from its own. Where a driver does otherwise than the
//! state machine alone says, the difference is a line of [`differences`], with its reason.

use std::ops::AddAssign;
use std::sync::Arc;

use vfio_checkpoint_device::kernel::KernelPath;
use vfio_checkpoint_device::sim::{SimConfig, SimDevice};
use vfio_checkpoint_device::{DataStream, DeviceError, MigrationDevice, Threads};
use vfio_checkpoint_fsm::{Capabilities, State, Walk, path};

use crate::Test;
use crate::facts::Facts;
use crate::kmsg::KernelLog;
use crate::save_restore::{open, read_all};

pub(crate) const TESTS: &[Test] = &[
    ("matrix::container", |facts| mtty(facts, KernelPath::Container)),
    ("matrix::iommufd", |facts| mtty(facts, KernelPath::Iommufd)),
];

/// Where a case starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Start {
    /// In this state; in RESUMING with nothing written.
    At(State),
    /// In RESUMING with a whole blob written.
    Loaded,
}

impl Start {
    const ALL: [Self; 8] = [
        Self::At(State::Running),
        Self::At(State::RunningP2p),
        Self::At(State::PreCopy),
        Self::At(State::PreCopyP2p),
        Self::At(State::Stop),
        Self::At(State::StopCopy),
        Self::At(State::Resuming),
        Self::Loaded,
    ];

    fn state(self) -> State {
        match self {
            Self::At(state) => state,
            Self::Loaded => State::Resuming,
        }
    }
}

/// What one SET did.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    errno: Option<i32>,
    landed: State,
    stream: bool,
    hops: Vec<(State, State)>,
}

/// Where data, not the state machine, decides: the case, what happens instead, and why.
fn differences(start: Start, seen: &Seen) -> Option<(Seen, &'static str)> {
    let leaves = seen.hops.first() == Some(&(State::Resuming, State::Stop));
    (start == Start::At(State::Resuming) && leaves).then(|| {
        let refused = Seen {
            errno: Some(libc::EINVAL),
            landed: State::Resuming,
            stream: false,
            hops: vec![(State::Resuming, State::Stop)],
        };
        (refused, "no state was written, so there is none to load: the first hop is tried and refused")
    })
}

fn predict(capabilities: Capabilities, start: Start, target: State) -> Seen {
    let from = start.state();
    let seen = match path(capabilities, from, target) {
        Walk::NoOp => Seen { errno: None, landed: from, stream: false, hops: Vec::new() },
        Walk::Forbidden(_) => {
            Seen { errno: Some(libc::EINVAL), landed: from, stream: false, hops: Vec::new() }
        }
        Walk::Path(path) => Seen {
            errno: None,
            landed: target,
            stream: path.opens_stream(),
            hops: path.iter().map(|arc| (arc.from(), arc.to())).collect(),
        },
    };
    differences(start, &seen).map_or(seen, |(instead, _)| instead)
}

/// Brings a device to `start`, SETs `target`, and says what happened. The device is reset first.
fn observe(
    device: &mut dyn MigrationDevice,
    start: Start,
    target: State,
    blob: &[u8],
    hops: &mut dyn FnMut() -> Vec<(State, State)>,
) -> Seen {
    device.reset().expect("a reset");
    // Held to the end of the case, as a session would hold it.
    let mut session = None;
    if start.state() != State::Running {
        session = device.set_state(start.state()).expect("the start state");
    }
    if start == Start::Loaded {
        let Some(DataStream::Restore(stream)) = &mut session else { panic!("RESUMING opens a stream") };
        let mut rest = blob;
        while !rest.is_empty() {
            let taken = stream.write(rest).expect("the whole blob");
            rest = &rest[taken..];
        }
    }
    assert_eq!(device.state().expect("a state"), start.state());
    let _before = hops();
    let set = device.set_state(target);
    let seen = Seen {
        errno: set.as_ref().err().map(|error| error.raw_os_error().expect("an errno")),
        landed: device.state().expect("a state"),
        stream: matches!(&set, Ok(Some(_))),
        hops: hops(),
    };
    device.reset().expect("a reset");
    seen
}

fn stop_copy_blob(device: &mut dyn MigrationDevice) -> Result<Vec<u8>, DeviceError> {
    device.reset()?;
    let stream = device.set_state(State::StopCopy)?;
    let Some(DataStream::Save(mut stream)) = stream else { panic!("STOP_COPY opens a stream") };
    let blob = read_all(&mut *stream)?;
    device.reset()?;
    Ok(blob)
}

/// What was compared.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Compared {
    pub(crate) pairs: usize,
    pub(crate) hops: usize,
    /// How many of the pairs the kernel refused to walk, out of a stop-copy back into a pre-copy.
    pub(crate) back_into_precopy: usize,
}

impl AddAssign for Compared {
    fn add_assign(&mut self, other: Self) {
        self.pairs += other.pairs;
        self.hops += other.hops;
        self.back_into_precopy += other.back_into_precopy;
    }
}

/// Compares every pair of one device, which must have exactly these `capabilities`.
pub(crate) fn compare(uuid: &str, kernel_path: KernelPath, capabilities: Capabilities) -> Compared {
    let mut kernel = open(uuid, kernel_path);
    assert_eq!(kernel.capabilities().migration, capabilities, "{uuid}");
    let mut log = KernelLog::new();
    let config = SimConfig { migration: capabilities, ..SimConfig::mtty_like() };
    let sim_slot = SimDevice::new(config, Arc::new(Threads::new())).expect("a simulated device");
    let mut sim = sim_slot.open().expect("a simulated device");

    let kernel_blob = stop_copy_blob(&mut kernel).expect("a blob of the kernel's device");
    let sim_blob = stop_copy_blob(&mut sim).expect("a blob of the simulated device");
    let mut compared = Compared::default();
    let mut wrong = Vec::new();
    for start in Start::ALL.into_iter().filter(|start| capabilities.supports(start.state())) {
        for target in State::ALL {
            let predicted = predict(capabilities, start, target);
            let by_kernel = observe(&mut kernel, start, target, &kernel_blob, &mut || log.hops(uuid));
            let by_sim = observe(&mut sim, start, target, &sim_blob, &mut || {
                sim_slot.take_hops().into_iter().map(|hop| (hop.arc.from(), hop.arc.to())).collect()
            });
            if by_kernel != predicted || by_sim != predicted {
                wrong.push(format!(
                    "{start:?} -> {target}:\n  fsm    {predicted:?}\n  kernel {by_kernel:?}\n  sim    {by_sim:?}"
                ));
            }
            compared.pairs += 1;
            compared.hops += by_kernel.hops.len();
            if start.state() == State::StopCopy && matches!(target, State::PreCopy | State::PreCopyP2p) {
                // Said once more without any prediction: some kernels are told to allow it.
                let refused = by_kernel.errno == Some(libc::EINVAL)
                    && by_kernel.landed == State::StopCopy
                    && by_kernel.hops.is_empty();
                assert!(refused, "{capabilities}: STOP_COPY -> {target}: {by_kernel:?}");
                compared.back_into_precopy += 1;
            }
        }
    }
    assert!(wrong.is_empty(), "{capabilities}: {} pairs differ:\n{}", wrong.len(), wrong.join("\n"));
    compared
}

fn mtty(facts: &Facts, kernel_path: KernelPath) {
    let mut compared = Compared::default();
    for uuid in [&facts.mtty1[0], &facts.mtty2[0]] {
        compared += compare(uuid, kernel_path, Capabilities { p2p: true, pre_copy: true });
    }
    println!(
        "figures: {kernel_path:?}: {} state pairs and {} hops compared: kernel, fsm, simulated device",
        compared.pairs, compared.hops
    );
}
