//! Hops that fail on a real kernel device, with the exact trajectory of the driver. Where the same fault can be put in
//! front of a simulated device, the trajectory there must be the same.
//!
//! ```text
//!   operation -> its SETs -> the hops of each -> that hop fails, or lands in ERROR   (kernel: module parameter)
//!                                                                                    (sim: `Fault::Set`)
//!   both: Driver -> Failure { first, state, outcome, standing, steps }   must be equal
//! ```

use std::sync::Arc;

use vfio_checkpoint_device::driver::{Answer, Failure, Peers, SaveMode, SaveRead, Standing, Step};
use vfio_checkpoint_device::executor::VirtualTime;
use vfio_checkpoint_device::fault::{Fault, FaultyDevice};
use vfio_checkpoint_device::kernel::KernelPath;
use vfio_checkpoint_device::pool::MIN_CHUNK_BYTES;
use vfio_checkpoint_device::sim::{SimConfig, SimDevice};
use vfio_checkpoint_device::{Call, ChunkPool, Clock, DeviceError, Driver, Verifier};
use vfio_checkpoint_fsm::{Capabilities, Outcome, State, Walk, path};

use super::{Parameters, blank, programmed};
use crate::blobs::seal_of;
use crate::facts::Facts;
use crate::save_restore::driver;
use crate::uart;

const EIO: i32 = libc::EIO;
const PATH: KernelPath = KernelPath::Iommufd;

/// A whole save of one device: the barrier where it has P2P.
fn save(driver: &mut Driver, mode: SaveMode) -> Result<Vec<u8>, Failure> {
    let p2p = driver.capabilities().migration.p2p;
    let pool = ChunkPool::new(MIN_CHUNK_BYTES, 2);
    let mut state = Vec::new();
    let mut session = match mode {
        SaveMode::StopCopy if p2p => {
            let quiesced = driver.quiesce_running(Peers::None)?;
            driver.stop_copy_quiesced(quiesced)?
        }
        SaveMode::StopCopy => driver.begin_save(SaveMode::StopCopy, Peers::None)?,
        SaveMode::PreCopy => {
            let mut session = driver.begin_save(SaveMode::PreCopy, Peers::None)?;
            if p2p {
                driver.quiesce(&session)?;
            }
            driver.stop_copy(&mut session)?;
            session
        }
    };
    loop {
        match session.read(&pool) {
            Ok(SaveRead::Chunk(chunk)) => state.extend_from_slice(&chunk),
            Ok(SaveRead::End) => break,
            Ok(SaveRead::NothingNow) => panic!("STOP_COPY has no \"nothing for now\""),
            Err(error) => return Err(driver.abort(error)),
        }
    }
    let stopped = driver.finish_save(session)?;
    if p2p {
        driver.resume_p2p(&stopped)?;
    }
    driver.resume(stopped)?;
    Ok(state)
}

/// A whole restore of one device, with the barrier where it has P2P.
fn restore(driver: &mut Driver, state: &[u8]) -> Result<(), Failure> {
    let mut session = driver.begin_restore()?;
    let mut verifier = Verifier::new();
    if let Err(error) = session.write(&verifier.accept(bytes::Bytes::copy_from_slice(state))) {
        return Err(driver.abort(error));
    }
    let seal = verifier.finish(&seal_of(state)).expect("an honest seal");
    let loaded = driver.verified(session, &seal)?;
    let armed = driver.fix_up(loaded, None)?.ready();
    if driver.capabilities().migration.p2p {
        driver.enter_running_p2p(&armed)?;
    }
    driver.enter_running(&armed)
}

/// One SET of a trajectory.
struct Set {
    /// The steps before it.
    before: usize,
    target: State,
    hops: Vec<(State, State)>,
    /// It is the first to its target, the one that a [`Fault::Set`] strikes.
    first: bool,
}

/// Every SET of a trajectory, in order.
fn sets(steps: &[Step], capabilities: Capabilities) -> Vec<Set> {
    let mut at = State::Running;
    let mut sets: Vec<Set> = Vec::new();
    for (before, step) in steps.iter().enumerate() {
        match *step {
            Step::Set(target, _) => {
                let Walk::Path(path) = path(capabilities, at, target) else { panic!("{at} to {target}") };
                let hops = path.iter().map(|arc| (arc.from(), arc.to())).collect();
                let first = sets.iter().all(|set| set.target != target);
                sets.push(Set { before, target, hops, first });
            }
            Step::ReadBack(Ok(state)) => at = state,
            Step::ReadBack(Err(_)) | Step::Reset(_) => {}
        }
    }
    sets
}

/// A simulated device with the kernel's capabilities, and faults in front of it.
fn simulated(capabilities: Capabilities, faults: &[Fault]) -> Driver {
    let time = Arc::new(VirtualTime::default());
    let config = SimConfig { migration: capabilities, ..SimConfig::mtty_like() };
    let slot = SimDevice::new(config, Arc::clone(&time) as Arc<dyn Clock>).expect("a simulated device");
    let device = slot.open().expect("a simulated device");
    Driver::new(Box::new(FaultyDevice::new(Box::new(device), faults, time)))
}

/// The first error is the one that was injected.
fn assert_first(name: &str, failure: &Failure, target: State) {
    assert!(
        matches!(&failure.first, DeviceError::Os { call: Call::SetState(state), source }
            if *state == target && source.raw_os_error() == Some(EIO)),
        "{name}: {failure}"
    );
}

/// What the driver did on the kernel is what it does on a simulated device.
fn assert_same(name: &str, kernel: &Failure, simulated: &Failure) {
    let told = |failure: &Failure| (failure.state, failure.outcome, failure.standing, failure.steps.clone());
    assert_eq!(told(kernel), told(simulated), "{name}");
}

/// One fault: a hop that fails.
struct Case {
    name: String,
    target: State,
    landing: State,
    /// All that was asked of the device up to the answer to the failing SET.
    begun: Vec<Step>,
    /// The same fault for a simulated device, where it can be said.
    fault: Option<Fault>,
}

/// Asks the variant for each fault of a trajectory in turn, and hands it to `check`. Returns how many, and how many of
/// them a simulated device had too.
fn each_fault(
    parameters: &Parameters,
    capabilities: Capabilities,
    clean: &[Step],
    title: &str,
    check: &mut dyn FnMut(&Case),
) -> (usize, usize) {
    let (mut count, mut simulated) = (0, 0);
    for Set { before, target, hops, first } in sets(clean, capabilities) {
        for hop in hops {
            for in_error in [false, true] {
                let landing = if in_error {
                    parameters.error_hops(&[hop]);
                    State::Error
                } else {
                    parameters.fail_hops(&[hop]);
                    hop.0
                };
                let name = format!(
                    "{capabilities} {title}: SET {target}, the hop {} -> {} lands in {landing}",
                    hop.0, hop.1
                );
                let mut begun = clean[..before].to_vec();
                begun.extend([Step::Set(target, Answer::Errno(EIO)), Step::ReadBack(Ok(landing))]);
                let fault = first.then_some(Fault::Set { target, landing, errno: EIO });
                check(&Case { name, target, landing, begun, fault });
                assert!(parameters.all_struck(), "the fault did not strike");
                count += 1;
                simulated += usize::from(first);
            }
        }
    }
    (count, simulated)
}

pub(super) fn saves(facts: &Facts) {
    let (mut count, mut simulated_too) = (0, 0);
    for capabilities in Capabilities::ALL {
        let parameters = Parameters::new();
        parameters.flags(capabilities);
        let device = programmed(&facts.mttyv1[0], PATH, 13);
        let registers = uart::registers(&device, 1);
        for mode in [SaveMode::StopCopy, SaveMode::PreCopy] {
            if mode == SaveMode::PreCopy && !capabilities.pre_copy {
                continue;
            }
            let mut clean = driver(&device);
            let state = save(&mut clean, mode).expect("a clean save");
            let check = &mut |case: &Case| {
                let name = &case.name;
                let mut source = driver(&device);
                let failure = save(&mut source, mode).expect_err(name);
                assert_first(name, &failure, case.target);
                if let Some(fault) = case.fault {
                    let simulated =
                        save(&mut simulated(capabilities, &[fault]), mode).expect_err("the same fault");
                    assert_same(name, &failure, &simulated);
                }
                let mut expected = case.begun.clone();
                if !matches!(case.landing, State::Running | State::Error) {
                    let back = [Step::Set(State::Running, Answer::Ok), Step::ReadBack(Ok(State::Running))];
                    expected.extend(back);
                }
                assert_eq!(failure.steps, expected, "{name}: at most one SET back, and never a reset");
                if case.landing == State::Error {
                    assert_eq!(failure.standing, Standing::Quarantined, "{name}");
                    assert_eq!(failure.outcome, Outcome::StateLost, "{name}");
                    assert!(save(&mut source, mode).is_err(), "{name}: a quarantined device takes no work");
                    source.reset().expect("a reset");
                    uart::program(&device, 1, 13);
                } else {
                    assert_eq!(failure.standing, Standing::InService, "{name}");
                    assert_eq!(failure.state, Some(State::Running), "{name}");
                    assert_eq!(failure.outcome, Outcome::Preserved, "{name}");
                }
                assert_eq!(uart::registers(&device, 1), registers, "{name}");
                assert_eq!(save(&mut source, mode).expect("the device works again"), state, "{name}");
            };
            let (all, both) =
                each_fault(&parameters, capabilities, clean.steps(), &format!("{mode:?}"), check);
            count += all;
            simulated_too += both;
        }
    }
    println!(
        "figures: variant: {count} failing hops of saves on the kernel, each with its exact trajectory; \
         {simulated_too} of them on the simulated device too, with the same"
    );
}

pub(super) fn restores(facts: &Facts) {
    let (mut count, mut simulated_too) = (0, 0);
    for capabilities in Capabilities::ALL {
        let parameters = Parameters::new();
        parameters.flags(capabilities);
        let source = programmed(&facts.mttyv1[0], PATH, 21);
        let state = save(&mut driver(&source), SaveMode::StopCopy).expect("a save");
        let simulated_state = save(&mut simulated(capabilities, &[]), SaveMode::StopCopy).expect("a save");
        let power_on = uart::registers(&blank(&facts.mttyv1[1], PATH), 1);
        let device = programmed(&facts.mttyv1[1], PATH, 99);
        let mut clean = driver(&device);
        restore(&mut clean, &state).expect("a clean restore");
        let (all, both) = each_fault(&parameters, capabilities, clean.steps(), "restore", &mut |case| {
            let name = &case.name;
            uart::program(&device, 1, 99);
            let before = uart::registers(&device, 1);
            let mut destination = driver(&device);
            let failure = restore(&mut destination, &state).expect_err(name);
            assert_first(name, &failure, case.target);
            let fault = case.fault.expect("a restore has one SET to a state");
            let simulated = restore(&mut simulated(capabilities, &[fault]), &simulated_state)
                .expect_err("the same fault");
            assert_same(name, &failure, &simulated);
            assert!(failure.steps.starts_with(&case.begun), "{name}: {failure}");
            assert_eq!(
                (failure.standing, failure.state),
                (Standing::InService, Some(State::Running)),
                "{name}"
            );
            match failure.outcome {
                Outcome::Preserved => {
                    assert_eq!(failure.resets(), 0, "{name}");
                    assert_eq!(uart::registers(&device, 1), before, "{name}");
                }
                Outcome::StateLost => {
                    assert_eq!(failure.resets(), 1, "{name}: a reset is a loss, and only it");
                    assert_eq!(uart::registers(&device, 1), power_on, "{name}");
                }
            }
            restore(&mut destination, &state).expect("the device works again");
            assert_eq!(uart::registers(&device, 1), uart::registers(&source, 1), "{name}");
        });
        count += all;
        simulated_too += both;
    }
    println!(
        "figures: variant: {count} failing hops of restores on the kernel; {simulated_too} of them on the simulated \
         device too, with the same trajectory"
    );
}

/// The recovery fails too: by a hop on the way back, and by the reset.
pub(super) fn recoveries(facts: &Facts) {
    let full = Capabilities { p2p: true, pre_copy: true };
    let parameters = Parameters::new();
    let device = programmed(&facts.mttyv1[0], PATH, 7);
    let registers = uart::registers(&device, 1);

    let mut source = driver(&device);
    let state = save(&mut source, SaveMode::StopCopy).expect("a save");
    parameters.fail_hops(&[(State::Stop, State::StopCopy), (State::Stop, State::RunningP2p)]);
    let failure = save(&mut source, SaveMode::StopCopy).expect_err("two failing hops");
    let faults = [
        Fault::Set { target: State::StopCopy, landing: State::Stop, errno: EIO },
        Fault::Set { target: State::Running, landing: State::Stop, errno: EIO },
    ];
    let simulated_failure =
        save(&mut simulated(full, &faults), SaveMode::StopCopy).expect_err("the same faults");
    assert_first("a way back that fails", &failure, State::StopCopy);
    assert_same("a way back that fails", &failure, &simulated_failure);
    assert_eq!((failure.standing, failure.resets()), (Standing::Quarantined, 0));
    assert_eq!((failure.state, failure.outcome), (Some(State::Stop), Outcome::Preserved));
    assert!(source.reinstate().is_err(), "STOP is not RUNNING");
    // Somebody looks at it, brings it back by hand, and says so.
    let mut by_hand = source.into_device();
    by_hand.set_state(State::Running).expect("a running device");
    assert_eq!(uart::registers(&device, 1), registers, "the state was there all the time");

    let mut destination = driver(&device);
    parameters.fail_hops(&[(State::Resuming, State::Stop)]).fail_resets(1);
    let failure = restore(&mut destination, &state).expect_err("a failing hop and a failing reset");
    let faults = [
        Fault::Set { target: State::RunningP2p, landing: State::Resuming, errno: EIO },
        Fault::Reset { errno: EIO },
    ];
    let simulated_state = save(&mut simulated(full, &[]), SaveMode::StopCopy).expect("a save");
    let simulated_failure =
        restore(&mut simulated(full, &faults), &simulated_state).expect_err("the same faults");
    assert_first("a reset that fails", &failure, State::RunningP2p);
    assert_same("a reset that fails", &failure, &simulated_failure);
    assert_eq!((failure.standing, failure.resets()), (Standing::Quarantined, 1));
    assert_eq!((failure.state, failure.outcome), (Some(State::Resuming), Outcome::StateLost));
    assert!(destination.reinstate().is_err(), "RESUMING is not RUNNING");
    assert!(parameters.all_struck());
    destination.reset().expect("a reset that somebody asks for");
    restore(&mut destination, &state).expect("the device works again");
    assert_eq!(uart::registers(&device, 1), registers);
}
