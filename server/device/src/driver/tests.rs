//! Every operation through every failure of every SET it makes, landing in every state that the walk could leave the
//! device in. Expected trajectories are snapshots; what must hold for all of them is asserted.

use std::fmt::Write as _;
use std::io::Write as _;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use bytes::Bytes;
use vfio_checkpoint_fsm::{Capabilities, Outcome, State, Walk, path};

use super::{Driver, Failure, Peers, SaveMode, SaveRead, Standing, Step};
use crate::executor::VirtualTime;
use crate::fault::{Fault, FaultyDevice};
use crate::pool::MIN_CHUNK_BYTES;
use crate::seal::SealHasher;
use crate::sim::{SimConfig, SimDevice};
use crate::{
    Call, ChunkPool, DeviceError, DirtyReport, InterruptKind, IovaRange, MigrationDevice, PciCommand, Rearm,
    Seal, Verifier,
};

const EIO: i32 = libc::EIO;

pub(super) fn slot(migration: Capabilities) -> (SimDevice, Arc<VirtualTime>) {
    let time = Arc::new(VirtualTime::default());
    let config = SimConfig { memory_bytes: 100_000, migration, ..SimConfig::default() };
    (SimDevice::new(config, Arc::clone(&time) as Arc<dyn crate::Clock>).unwrap(), time)
}

pub(super) fn driver(slot: &SimDevice, time: &Arc<VirtualTime>, faults: &[Fault]) -> Driver {
    Driver::new(Box::new(FaultyDevice::new(Box::new(slot.open().unwrap()), faults, Arc::clone(time))))
}

fn pool() -> ChunkPool {
    ChunkPool::new(MIN_CHUNK_BYTES, 2)
}

/// A whole save of one device. `pre_copy` where the device has it; the barrier where it has P2P.
pub(super) fn save(driver: &mut Driver, mode: SaveMode) -> Result<Vec<u8>, Failure> {
    let p2p = driver.capabilities().migration.p2p;
    let mut state = Vec::new();
    let pool = pool();
    let mut session = match mode {
        SaveMode::PreCopy => {
            let mut session = driver.begin_save(SaveMode::PreCopy, Peers::None)?;
            loop {
                match session.read(&pool) {
                    Ok(SaveRead::Chunk(chunk)) => state.extend_from_slice(&chunk),
                    Ok(SaveRead::NothingNow | SaveRead::End) => break,
                    Err(error) => return Err(driver.abort(error)),
                }
            }
            if p2p {
                driver.quiesce(&session)?;
            }
            driver.stop_copy(&mut session)?;
            session
        }
        SaveMode::StopCopy if p2p => {
            let quiesced = driver.quiesce_running(Peers::None)?;
            driver.stop_copy_quiesced(quiesced)?
        }
        SaveMode::StopCopy => driver.begin_save(SaveMode::StopCopy, Peers::None)?,
    };
    loop {
        match session.read(&pool) {
            Ok(SaveRead::Chunk(chunk)) => state.extend_from_slice(&chunk),
            Ok(SaveRead::NothingNow) => panic!("STOP_COPY has no \"nothing for now\""),
            Ok(SaveRead::End) => break,
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

fn seal_of(state: &[u8]) -> Seal {
    let mut hasher = SealHasher::new();
    hasher.update(state);
    hasher.seal()
}

/// A whole restore of one device, with the barrier where it has P2P.
pub(super) fn restore(driver: &mut Driver, state: &[u8]) -> Result<(), Failure> {
    let mut session = driver.begin_restore()?;
    let mut verifier = Verifier::new();
    for part in state.chunks(30_000) {
        let chunk = verifier.accept(Bytes::copy_from_slice(part));
        if let Err(error) = session.write(&chunk) {
            return Err(driver.abort(error));
        }
    }
    let loaded = driver.verified(session, &verifier.finish(&seal_of(state)).unwrap())?;
    let armed = driver.fix_up(loaded, None)?.ready();
    if driver.capabilities().migration.p2p {
        driver.enter_running_p2p(&armed)?;
    }
    driver.enter_running(&armed)
}

/// Every SET that a trajectory makes, in order, with the state it starts from.
fn sets(steps: &[Step]) -> Vec<(State, State)> {
    let mut at = State::Running;
    let mut sets = Vec::new();
    for step in steps {
        match step {
            Step::Set(target, _) => sets.push((at, *target)),
            Step::ReadBack(Ok(state)) => at = *state,
            Step::ReadBack(Err(_)) | Step::Reset(_) => {}
        }
    }
    sets
}

/// Where a failed SET can leave a device: any state of the path, its start included, or ERROR.
fn landings(capabilities: Capabilities, from: State, to: State) -> Vec<State> {
    let mut landings = vec![from];
    if let Walk::Path(path) = path(capabilities, from, to) {
        landings.extend(path.iter().map(vfio_checkpoint_fsm::Arc::to));
    }
    landings.push(State::Error);
    landings.dedup();
    landings
}

pub(super) fn tell(report: &mut String, title: &str, failure: &Failure) {
    let steps: Vec<String> = failure.steps.iter().map(ToString::to_string).collect();
    writeln!(
        report,
        "{title}\n  {:?}, {:?}, in {}\n  {}",
        failure.outcome,
        failure.standing,
        failure.state.map_or("?", State::name),
        steps.join("; ")
    )
    .unwrap();
}

/// Says how many trajectories the snapshot holds, past the test harness, which keeps what a passing test prints.
fn figure(operation: &str, report: &str) {
    let trajectories = report.lines().count() / 3;
    let _ = writeln!(
        std::io::stdout(),
        "figures: trajectories: {trajectories} of a {operation}, one a failing SET and landing state, asserted exactly"
    );
}

/// The first error is the injected one, whatever recovery met.
fn assert_first(failure: &Failure, target: State) {
    assert!(
        matches!(&failure.first, DeviceError::Os { call: Call::SetState(state), source }
            if *state == target && source.raw_os_error() == Some(EIO)),
        "{failure:?}"
    );
}

#[test]
fn a_save_survives_the_failure_of_every_set() {
    let mut report = String::new();
    for capabilities in Capabilities::ALL {
        for mode in [SaveMode::StopCopy, SaveMode::PreCopy] {
            if mode == SaveMode::PreCopy && !capabilities.pre_copy {
                continue;
            }
            let (device, time) = slot(capabilities);
            let mut clean = driver(&device, &time, &[]);
            let state = save(&mut clean, mode).unwrap();
            assert!(state.len() > 100_000);
            let digest = device.digest();
            let made = sets(clean.steps());
            drop(clean);
            for (from, target) in made {
                for landing in landings(capabilities, from, target) {
                    let (device, time) = slot(capabilities);
                    let mut driver = driver(&device, &time, &[Fault::Set { target, landing, errno: EIO }]);
                    let failure = save(&mut driver, mode).unwrap_err();
                    assert_first(&failure, target);
                    assert_eq!(failure.resets(), 0, "a source is never reset by itself");
                    if landing == State::Error {
                        assert_eq!(failure.standing, Standing::Quarantined);
                        assert_eq!(failure.outcome, Outcome::StateLost);
                        assert!(
                            driver.begin_save(SaveMode::StopCopy, Peers::None).is_err(),
                            "a quarantined device takes no work"
                        );
                        driver.reset().unwrap();
                    } else {
                        assert_eq!(
                            (failure.standing, failure.state),
                            (Standing::InService, Some(State::Running))
                        );
                        assert_eq!(failure.outcome, Outcome::Preserved);
                        assert_eq!(device.digest(), digest, "the state is what it was");
                    }
                    assert_eq!(save(&mut driver, mode).unwrap().len(), state.len(), "the device works again");
                    tell(
                        &mut report,
                        &format!("{capabilities} {mode:?}: SET {from} -> {target} lands in {landing}"),
                        &failure,
                    );
                }
            }
        }
    }
    figure("save", &report);
    insta::assert_snapshot!("save_failures", report);
}

#[test]
fn a_restore_survives_the_failure_of_every_set() {
    let mut report = String::new();
    for capabilities in Capabilities::ALL {
        let (source, time) = slot(capabilities);
        let state = save(&mut driver(&source, &time, &[]), SaveMode::StopCopy).unwrap();

        let (destination, time) = slot(capabilities);
        let mut clean = driver(&destination, &time, &[]);
        restore(&mut clean, &state).unwrap();
        let made = sets(clean.steps());
        drop(clean);
        for (from, target) in made {
            for landing in landings(capabilities, from, target) {
                let (device, time) = slot(capabilities);
                let digest = device.digest();
                let mut driver = driver(&device, &time, &[Fault::Set { target, landing, errno: EIO }]);
                let failure = restore(&mut driver, &state).unwrap_err();
                assert_first(&failure, target);
                assert_eq!((failure.standing, failure.state), (Standing::InService, Some(State::Running)));
                assert_eq!(
                    failure.outcome == Outcome::StateLost,
                    failure.resets() == 1,
                    "a reset is a loss, and only it"
                );
                assert!(failure.resets() <= 1);
                if failure.outcome == Outcome::Preserved {
                    assert_eq!(device.digest(), digest);
                }
                restore(&mut driver, &state).unwrap();
                tell(
                    &mut report,
                    &format!("{capabilities}: SET {from} -> {target} lands in {landing}"),
                    &failure,
                );
            }
        }
    }
    figure("restore", &report);
    insta::assert_snapshot!("restore_failures", report);
}

const FULL: Capabilities = Capabilities { p2p: true, pre_copy: true };

#[test]
fn a_recovery_that_fails_too_ends_in_quarantine_with_the_first_error() {
    let (device, time) = slot(FULL);
    let faults = [
        Fault::Set { target: State::StopCopy, landing: State::Stop, errno: EIO },
        Fault::Set { target: State::Running, landing: State::Stop, errno: libc::ENOMEM },
    ];
    let mut source = driver(&device, &time, &faults);
    let failure = save(&mut source, SaveMode::StopCopy).unwrap_err();
    assert_first(&failure, State::StopCopy);
    assert_eq!((failure.standing, failure.resets()), (Standing::Quarantined, 0));
    assert_eq!(
        (failure.state, failure.outcome),
        (Some(State::Stop), Outcome::Preserved),
        "stopped, but there"
    );
    drop(source);

    let (device, time) = slot(FULL);
    let faults = [
        Fault::Set { target: State::RunningP2p, landing: State::Resuming, errno: EIO },
        Fault::Reset { errno: libc::ETIMEDOUT },
    ];
    let (from, source_time) = slot(FULL);
    let state = save(&mut driver(&from, &source_time, &[]), SaveMode::StopCopy).unwrap();
    let mut destination = driver(&device, &time, &faults);
    let failure = restore(&mut destination, &state).unwrap_err();
    assert_first(&failure, State::RunningP2p);
    assert_eq!((failure.standing, failure.resets()), (Standing::Quarantined, 1));
    assert_eq!(failure.outcome, Outcome::StateLost);
    assert!(destination.reinstate().is_err(), "RESUMING is not sound");
    destination.reset().unwrap();
    restore(&mut destination, &state).unwrap();
}

#[test]
fn reads_and_writes_that_fail_end_the_session() {
    let (device, time) = slot(FULL);
    let digest = device.digest();
    let mut source = driver(&device, &time, &[Fault::Read { after_bytes: 70_000, errno: EIO }]);
    let failure = save(&mut source, SaveMode::PreCopy).unwrap_err();
    assert!(matches!(failure.first, DeviceError::Os { call: Call::Read, .. }));
    assert_eq!(
        (failure.outcome, failure.resets(), failure.state),
        (Outcome::Preserved, 0, Some(State::Running))
    );
    assert_eq!(device.digest(), digest);
    let state = save(&mut source, SaveMode::StopCopy).unwrap();
    drop(source);

    let (device, time) = slot(FULL);
    let mut destination =
        driver(&device, &time, &[Fault::Write { after_bytes: 70_000, errno: libc::EFAULT }]);
    let failure = restore(&mut destination, &state).unwrap_err();
    assert!(matches!(failure.first, DeviceError::Os { call: Call::Write, .. }));
    assert_eq!(
        (failure.outcome, failure.resets(), failure.state),
        (Outcome::StateLost, 1, Some(State::Running))
    );
    restore(&mut destination, &state).unwrap();
}

#[test]
fn short_reads_are_not_the_end() {
    let (device, time) = slot(FULL);
    let whole = save(&mut driver(&device, &time, &[]), SaveMode::StopCopy).unwrap();
    let mut short = driver(&device, &time, &[Fault::ShortReads { max_bytes: 7 }]);
    assert!(save(&mut short, SaveMode::StopCopy).unwrap() == whole);
}

#[test]
fn a_session_belongs_to_one_device_and_ends_once() {
    let (first, time) = slot(FULL);
    let (second, _) = slot(FULL);
    let (mut one, mut other) = (driver(&first, &time, &[]), driver(&second, &time, &[]));
    let mut session = one.begin_save(SaveMode::PreCopy, Peers::None).unwrap();
    let refused = other.stop_copy(&mut session).unwrap_err();
    assert!(matches!(refused.first, DeviceError::ForeignSession { .. }));
    assert_eq!(other.state().unwrap(), State::Running, "the other device was not touched");
    assert!(matches!(one.begin_restore().unwrap_err().first, DeviceError::Engaged { .. }));
    assert_eq!(one.state().unwrap(), State::PreCopy, "nor was the one, which goes on");
    one.stop_copy(&mut session).unwrap();
    let unread = one.finish_save(session).unwrap_err();
    assert!(matches!(unread.first, DeviceError::Undrained));
    assert_eq!((unread.state, unread.outcome), (Some(State::Running), Outcome::Preserved));
}

#[test]
fn resuming_is_not_left_without_the_seal_on_all_that_was_written() {
    let (device, time) = slot(FULL);
    let state = save(&mut driver(&device, &time, &[]), SaveMode::StopCopy).unwrap();
    let mut destination = driver(&device, &time, &[]);

    // The seal of another stream, of the same bytes.
    let mut session = destination.begin_restore().unwrap();
    let (mut own, mut other) = (Verifier::new(), Verifier::new());
    session.write(&own.accept(Bytes::from(state.clone()))).unwrap();
    let _elsewhere = other.accept(Bytes::from(state.clone()));
    let foreign = other.finish(&seal_of(&state)).unwrap();
    let failure = destination.verified(session, &foreign).unwrap_err();
    assert!(matches!(failure.first, DeviceError::Uncovered { .. }));
    assert_eq!((failure.resets(), failure.state), (1, Some(State::Running)));

    // A chunk that was hashed and not written.
    let mut session = destination.begin_restore().unwrap();
    let mut verifier = Verifier::new();
    let (head, tail) = state.split_at(10);
    session.write(&verifier.accept(Bytes::copy_from_slice(head))).unwrap();
    let skipped = verifier.accept(Bytes::copy_from_slice(&tail[..10]));
    let after = verifier.accept(Bytes::copy_from_slice(&tail[10..]));
    assert!(matches!(session.write(&after), Err(DeviceError::Misplaced { offset: 20, expected: 10 })));
    assert!(matches!(session.write(&skipped), Err(DeviceError::Poisoned)), "an error is final");
    let seal = verifier.finish(&seal_of(&state)).unwrap();
    let failure = destination.verified(session, &seal).unwrap_err();
    assert!(matches!(failure.first, DeviceError::Poisoned));
    assert_eq!((failure.outcome, failure.state), (Outcome::StateLost, Some(State::Running)));
}

#[test]
fn a_device_that_lies_about_where_it_is_has_failed() {
    let (device, time) = slot(FULL);
    let mut driver = driver(&device, &time, &[]);
    let session = driver.begin_save(SaveMode::PreCopy, Peers::None).unwrap();
    device.force_error();
    let failure = driver.quiesce(&session).unwrap_err();
    assert!(matches!(failure.first, DeviceError::Displaced { found: State::Error }), "{failure}");
    assert_eq!((failure.standing, failure.outcome), (Standing::Quarantined, Outcome::StateLost));
}

#[test]
fn a_device_that_says_yes_and_stands_elsewhere_has_failed() {
    for (target, landing) in
        [(State::StopCopy, State::Stop), (State::Stop, State::StopCopy), (State::Running, State::Stop)]
    {
        let (device, time) = slot(FULL);
        let digest = device.digest();
        let mut driver = driver(&device, &time, &[Fault::Lie { target, landing }]);
        let failure = save(&mut driver, SaveMode::StopCopy).unwrap_err();
        assert!(
            matches!(failure.first, DeviceError::Elsewhere { asked, found } if asked == target && found == landing),
            "{failure}"
        );
        assert_eq!((failure.outcome, failure.state), (Outcome::Preserved, Some(State::Running)));
        assert_eq!(device.digest(), digest);
    }
}

/// The answer is about where the device stands after the recovery failed, not before.
#[test]
fn a_recovery_that_makes_it_worse_is_told_as_it_is() {
    for (landing, outcome) in [
        (State::Error, Outcome::StateLost),
        (State::RunningP2p, Outcome::Preserved),
        (State::Running, Outcome::Preserved),
    ] {
        let (device, time) = slot(FULL);
        let faults = [
            Fault::Set { target: State::StopCopy, landing: State::Stop, errno: EIO },
            Fault::Set { target: State::Running, landing, errno: libc::ENOMEM },
        ];
        let failure = save(&mut driver(&device, &time, &faults), SaveMode::StopCopy).unwrap_err();
        assert_first(&failure, State::StopCopy);
        assert_eq!((failure.state, failure.outcome), (Some(landing), outcome));
        assert_eq!(failure.standing, Standing::Quarantined);
    }
}

#[test]
fn configuration_space_is_captured_restored_within_the_whitelist_and_interrupts_are_armed_again() {
    let eventfds = |count: u32| -> Vec<OwnedFd> {
        (0..count).map(|_| rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap()).collect()
    };
    let parity = 1 << 6;
    let wanted = PciCommand::MEMORY | PciCommand::BUS_MASTER;
    let (source, time) = slot(FULL);
    let mut handle = source.open().unwrap();
    let space = handle.config_space().unwrap();
    space.set_command(PciCommand(wanted | parity)).unwrap();
    let fds = eventfds(3);
    let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    space.arm(InterruptKind::MsiX, &borrowed).unwrap();
    let mut source = Driver::new(Box::new(handle));
    let mut session = source.begin_save(SaveMode::StopCopy, Peers::None).unwrap();
    let mut state = Vec::new();
    while let SaveRead::Chunk(chunk) = session.read(&pool()).unwrap() {
        state.extend_from_slice(&chunk);
    }
    let stopped = source.finish_save(session).unwrap();
    let capture = *stopped.config().unwrap();
    assert_eq!(capture.interrupts, Some(Rearm { kind: InterruptKind::MsiX, vectors: 3 }));

    let (device, _) = slot(FULL);
    let mut destination = driver(&device, &time, &[]);
    let load = |destination: &mut Driver| {
        let mut session = destination.begin_restore().unwrap();
        let mut verifier = Verifier::new();
        session.write(&verifier.accept(Bytes::from(state.clone()))).unwrap();
        let seal = verifier.finish(&seal_of(&state)).unwrap();
        let loaded = destination.verified(session, &seal).unwrap();
        destination.fix_up(loaded, Some(&capture)).unwrap()
    };
    let fixed = load(&mut destination);
    assert_eq!(fixed.rearm(), capture.interrupts);
    let fds = eventfds(3);
    let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let refused = destination.arm(fixed, &borrowed[1..]).unwrap_err();
    assert_eq!(
        (refused.outcome, refused.resets()),
        (Outcome::StateLost, 1),
        "two eventfds for three vectors"
    );

    let fixed = load(&mut destination);
    let armed = destination.arm(fixed, &borrowed).unwrap();
    destination.enter_running(&armed).unwrap();
    assert!(device.raise_interrupt(2).unwrap());
    let mut count = [0; 8];
    rustix::io::read(&fds[2], &mut count).unwrap();
    assert_eq!(u64::from_ne_bytes(count), 1, "the vector reaches its own eventfd");
    let mut device = destination.into_device();
    let command = device.config_space().unwrap().command().unwrap();
    assert_eq!(
        command.0 & (wanted | parity),
        wanted,
        "parity is policy of the node, not state of the device"
    );
}

#[test]
fn a_log_that_cannot_be_read_counts_every_page() {
    let (device, time) = slot(FULL);
    let mut driver = driver(&device, &time, &[]);
    let range = IovaRange::new(0, 1 << 20).unwrap();
    // Nothing is logged yet, which the device refuses to report.
    let report = driver.report_dma_log(range, 4096).unwrap();
    assert!(matches!(&report, DirtyReport::AllDirty { .. }), "{report:?}");
    assert_eq!(report.ranges(), [range]);
    assert_eq!(driver.start_dma_log(4096, &[range]).unwrap(), 4096);
    assert_eq!(driver.report_dma_log(range, 4096).unwrap().ranges(), []);
    assert!(driver.start_dma_log(3000, &[range]).is_err());
}

#[test]
fn each_state_that_a_step_reads_back_is_told_at_once() {
    let (slot, time) = slot(Capabilities { p2p: true, pre_copy: true });
    let (tell, told) = std::sync::mpsc::channel();
    let mut driver = driver(&slot, &time, &[]).watched(move |state| tell.send(state).unwrap());
    save(&mut driver, SaveMode::StopCopy).unwrap();
    let mut told: Vec<State> = told.try_iter().collect();
    told.dedup();
    let stopped = [State::Running, State::RunningP2p, State::StopCopy, State::Stop];
    assert_eq!(told, [&stopped[..], &[State::RunningP2p, State::Running]].concat());
}
