//! Damaged state ends in a reset device and a clear error, never in a device that runs with it.
//!
//! Each case is given its own honest seal, so that it is the *driver* and the kernel that find the fault, not the
//! digest; a last case shows that what no driver finds, the digest does.

use bytes::Bytes;
use vfio_checkpoint_device::driver::{Failure, Standing};
use vfio_checkpoint_device::kernel::{KernelDevice, KernelPath};
use vfio_checkpoint_device::operation::{Arrival, BoxError, OperationError, PrecopyPolicy, StateSource};
use vfio_checkpoint_device::seal::SealHasher;
use vfio_checkpoint_device::{MigrationDevice, Rearm, Seal, Verifier};
use vfio_checkpoint_fsm::{AfterSave, Cutover, Outcome, SaveRequest, State};

use crate::Test;
use crate::facts::Facts;
use crate::save_restore::{Memory, driver, lane, open, restore, save};
use crate::uart;

pub(crate) const TESTS: &[Test] = &[
    ("blobs::damaged_state_resets_the_device_container", |facts| damaged(facts, KernelPath::Container)),
    ("blobs::damaged_state_resets_the_device_iommufd", |facts| damaged(facts, KernelPath::Iommufd)),
    ("blobs::a_flipped_byte_that_mtty_accepts_is_found_by_the_seal", flipped),
];

/// A whole blob of a device, by a save.
pub(crate) fn blob(device: &KernelDevice) -> Vec<u8> {
    let mut memory = Memory::new(1);
    let request = SaveRequest { pre_copy: false, cutover: Cutover::Auto, after: AfterSave::Resume };
    save(&[lane(device)], request, PrecopyPolicy::default(), &mut memory).expect("a save");
    memory.blobs.remove(0)
}

/// Loads `blob` under an honest seal, as far as the device takes it.
pub(crate) fn load(device: &KernelDevice, blob: &[u8]) -> Result<(), Failure> {
    let mut driver = driver(device);
    let mut session = driver.begin_restore()?;
    let mut verifier = Verifier::new();
    let chunk = verifier.accept(Bytes::copy_from_slice(blob));
    if let Err(error) = session.write(&chunk) {
        return Err(driver.abort(error));
    }
    let seal = verifier.finish(&seal_of(blob)).expect("an honest seal");
    let loaded = driver.verified(session, &seal)?;
    let armed = driver.fix_up(loaded, None)?.ready();
    driver.enter_running(&armed)
}

pub(crate) fn seal_of(blob: &[u8]) -> Seal {
    let mut hasher = SealHasher::new();
    hasher.update(blob);
    hasher.seal()
}

fn damaged(facts: &Facts, path: KernelPath) {
    let mut device = open(&facts.mtty1[0], path);
    let whole = blob(&device);
    let with = |offset: usize, byte: u8| {
        let mut damaged = whole.clone();
        damaged[offset] ^= byte;
        damaged
    };
    let two_ports = blob(&open(&facts.mtty2[0], path));
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("empty", Vec::new()),
        ("one byte", whole[..1].to_vec()),
        ("header only", whole[..24].to_vec()),
        ("one byte short", whole[..whole.len() - 1].to_vec()),
        ("wrong magic", with(0, 0xff)),
        ("wrong major version", with(8, 0xff)),
        ("wrong number of ports", with(16, 0x03)),
        ("the blob of a device with two ports", two_ports),
        ("oversize", [&whole[..], &[0; 4096]].concat()),
    ];
    let count = cases.len();
    for (name, blob) in cases {
        uart::program(&device, 1, 42);
        let failure = load(&device, &blob).expect_err(name);
        assert_eq!(
            (failure.outcome, failure.standing),
            (Outcome::StateLost, Standing::InService),
            "{name}: {failure}"
        );
        assert_eq!((failure.state, failure.resets()), (Some(State::Running), 1), "{name}: {failure}");
        assert!(failure.first.raw_os_error().is_some(), "{name}: the kernel's errno is reported: {failure}");
        assert_eq!(device.state().expect("a state"), State::Running, "{name}");
        load(&device, &whole).unwrap_or_else(|failure| panic!("after {name} a good blob loads: {failure}"));
    }
    println!("figures: {path:?}: {count} damaged blobs refused by the real driver");
}

/// A source whose bytes are not what its seal says.
struct Flipped {
    blob: Option<Bytes>,
    seal: Seal,
    verifier: Option<Verifier>,
}

impl StateSource for Flipped {
    async fn next(&mut self) -> Result<Option<Arrival>, BoxError> {
        let Some(mut verifier) = self.verifier.take() else { return Ok(None) };
        if let Some(blob) = self.blob.take() {
            let chunk = verifier.accept(blob);
            self.verifier = Some(verifier);
            return Ok(Some(Arrival::Chunk { device: 0, chunk }));
        }
        let seal = verifier.finish(&self.seal)?;
        Ok(Some(Arrival::Sealed { device: 0, seal, config: None }))
    }

    async fn ready(&mut self, _rearm: &[Option<Rearm>]) -> Result<(), BoxError> {
        panic!("a device with unverified state must not get here")
    }
}

fn flipped(facts: &Facts) {
    let mut device = open(&facts.mtty1[0], KernelPath::Iommufd);
    let whole = blob(&device);
    let mut damaged = whole.clone();
    // The scratch register.
    damaged[31] ^= 0x01;
    load(&device, &damaged).expect("mtty accepts it, which is why there is a seal");

    let (blob, verifier) = (Some(Bytes::from(damaged)), Some(Verifier::new()));
    let mut source = Flipped { blob, seal: seal_of(&whole), verifier };
    let Err(OperationError::Failed { cause, outcome, quarantined, .. }) =
        restore(&[lane(&device)], &mut source)
    else {
        panic!("the restore must fail")
    };
    assert!(cause.to_string().contains("not what its seal says"), "{cause}");
    assert_eq!((outcome, quarantined.len()), (Outcome::StateLost, 0));
    assert_eq!(device.state().expect("a state"), State::Running);
}
