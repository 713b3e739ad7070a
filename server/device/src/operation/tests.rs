//! Sets of simulated devices through whole operations, with faults in one of them.

pub(super) mod answers;
mod busy;
pub(super) mod crashes;
pub(super) mod handover;
mod hold;
mod line;
mod node;
pub(super) mod script;
pub(super) mod watch;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use vfio_checkpoint_fsm::{AfterSave, Capabilities, Outcome, PlanRefusal, SaveRequest, State, Validity};

pub(super) use self::node::{Memory, Node, READY_LIMIT, RESUME, configs, restore, save};
use super::{Arrival, BoxError, Cause, OperationError, PrecopyPolicy, StateSink, StateSource};
use crate::driver::Step;
use crate::fault::Fault;
use crate::lane::{DEFAULT_CALL_LIMIT, Hung};
use crate::sim::{SimConfig, SimDevice, SimHandle, Workload};
use crate::{
    Call, ConfigCapture, DeviceError, DeviceLane, Driver, Executor, MigrationDevice, Rearm, Threads,
};

#[test]
fn a_set_arrives_on_other_devices() {
    for pre_copy in [false, true] {
        let source = Node::new(&configs(3, |_| ()), &[]);
        let target = Node::new(&configs(3, |config| config.seed += 100), &[]);
        let mut memory = Memory::new(3);
        let report =
            save(&source.lanes, SaveRequest { pre_copy, ..RESUME }, PrecopyPolicy::default(), &mut memory)
                .unwrap();
        assert_eq!((report.plan.pre_copy, report.plan.barrier), (pre_copy, true));
        assert_eq!(report.precopy_bytes > 0, pre_copy);
        assert_ne!(target.digests(), source.digests());
        let restored = restore(&target.lanes, &mut memory).unwrap();
        assert_eq!(restored.seals.iter().map(|seal| seal.bytes).collect::<Vec<_>>(), report.bytes);
        assert_eq!(target.digests(), source.digests());
        assert_eq!([source.states(), target.states()].concat(), [State::Running; 6]);
    }
}

#[test]
fn no_device_stops_before_all_are_quiesced_and_none_runs_freely_before_all_do_again() {
    let source = Node::new(&configs(2, |_| ()), &[]);
    let mut memory = Memory::new(2);
    save(&source.lanes, RESUME, PrecopyPolicy::default(), &mut memory).unwrap();
    let hops: Vec<Vec<String>> = source
        .slots
        .iter()
        .map(|slot| slot.take_hops().iter().map(|hop| hop.arc.to_string()).collect())
        .collect();
    let each = [
        "RUNNING -> PRE_COPY",
        "PRE_COPY -> PRE_COPY_P2P",
        "PRE_COPY_P2P -> STOP_COPY",
        "STOP_COPY -> STOP",
        "STOP -> RUNNING_P2P",
        "RUNNING_P2P -> RUNNING",
    ];
    assert_eq!(hops, [each, each]);
}

#[test]
fn a_set_without_p2p_on_all_is_refused_untouched() {
    let mut mixed = configs(2, |_| ());
    mixed[1].migration = Capabilities { p2p: false, pre_copy: true };
    let node = Node::new(&mixed, &[]);
    let refused = save(&node.lanes, RESUME, PrecopyPolicy::default(), &mut Memory::new(2)).unwrap_err();
    assert!(matches!(refused, OperationError::Refused(PlanRefusal::PeerWithoutP2p { index: 1, devices: 2 })));
    let refused = restore(&node.lanes, &mut Memory::new(2)).unwrap_err();
    assert!(matches!(refused, OperationError::Refused(_)));
    assert!(node.slots.iter().all(|slot| slot.take_hops().is_empty()));
}

fn failed(error: OperationError) -> (Cause, Outcome, Vec<String>) {
    match error {
        OperationError::Failed { cause, outcome, quarantined, .. } => {
            (cause, outcome, quarantined.into_iter().map(|device| device.name).collect())
        }
        other @ (OperationError::Refused(_)
        | OperationError::NotReady { .. }
        | OperationError::Inconsistent { .. }) => panic!("{other}"),
    }
}

#[test]
fn when_one_device_of_a_set_fails_to_save_all_run_on() {
    let sets =
        [State::PreCopy, State::PreCopyP2p, State::StopCopy, State::Stop, State::RunningP2p, State::Running];
    for target in sets {
        let source = Node::new(
            &configs(3, |_| ()),
            &[&[], &[Fault::Set { target, landing: State::Error, errno: libc::EIO }], &[]],
        );
        let before = source.digests();
        let error = save(&source.lanes, RESUME, PrecopyPolicy::default(), &mut Memory::new(3)).unwrap_err();
        let (cause, outcome, quarantined) = failed(error);
        assert!(matches!(&cause, Cause::Device { device, .. } if device.name == "sim1"), "{cause}");
        assert_eq!((outcome, quarantined), (Outcome::StateLost, vec!["sim1".to_owned()]), "{target}");
        for index in [0, 2] {
            let state = source.lanes[index].call(Call::GetState, Driver::state).unwrap().unwrap();
            assert_eq!((state, source.digests()[index]), (State::Running, before[index]), "{target}");
        }
    }
}

#[test]
fn when_the_sink_fails_all_run_on_and_nothing_is_lost() {
    let source = Node::new(&configs(2, |_| ()), &[]);
    let before = source.digests();
    let mut full = Memory::new(2);
    full.fail_after_bytes = Some(200_000);
    let (cause, outcome, quarantined) =
        failed(save(&source.lanes, RESUME, PrecopyPolicy::default(), &mut full).unwrap_err());
    assert_eq!(cause.to_string(), "the disk is full");
    assert_eq!((outcome, quarantined.len()), (Outcome::Preserved, 0));
    assert_eq!((source.digests(), source.states()), (before, vec![State::Running; 2]));
}

#[test]
fn when_one_device_of_a_set_fails_to_restore_none_runs_with_the_state() {
    let source = Node::new(&configs(2, |_| ()), &[]);
    let mut memory = Memory::new(2);
    save(&source.lanes, RESUME, PrecopyPolicy::default(), &mut memory).unwrap();
    let blank = Node::new(&configs(2, |config| config.seed += 100), &[]).digests();

    // On entry the second device keeps what it had; later everything is reset. Both leave blank devices here.
    for (target, landing) in
        [(State::Resuming, State::Running), (State::Resuming, State::Stop), (State::RunningP2p, State::Stop)]
    {
        let faults: &[&[Fault]] = &[&[], &[Fault::Set { target, landing, errno: libc::EIO }]];
        let node = Node::new(&configs(2, |config| config.seed += 100), faults);
        let (_, outcome, quarantined) = failed(restore(&node.lanes, &mut memory.again()).unwrap_err());
        assert_eq!((outcome, quarantined.len()), (Outcome::StateLost, 0));
        assert_eq!((node.digests(), node.states()), (blank.clone(), vec![State::Running; 2]), "{target}");
    }

    // Past the point of no return a part of the set runs: nothing takes work until somebody decides.
    let faults: &[&[Fault]] =
        &[&[], &[Fault::Set { target: State::Running, landing: State::RunningP2p, errno: libc::EIO }]];
    let node = Node::new(&configs(2, |config| config.seed += 100), faults);
    let (_, outcome, quarantined) = failed(restore(&node.lanes, &mut memory.again()).unwrap_err());
    assert_eq!((outcome, quarantined.len()), (Outcome::StateLost, 2));
}

/// What a SET answers is one thing, and what it did another: what was found to run is not taken back.
#[test]
fn a_device_that_runs_although_its_set_failed_counts_as_running() {
    let source = Node::new(&configs(2, |_| ()), &[]);
    let mut memory = Memory::new(2);
    save(&source.lanes, RESUME, PrecopyPolicy::default(), &mut memory).unwrap();
    let fault = Fault::Set { target: State::Running, landing: State::Running, errno: libc::EINTR };
    for faults in [[&[fault][..], &[]], [&[], &[fault]]] {
        let node = Node::new(&configs(2, |config| config.seed += 100), &faults);
        restore(&node.lanes, &mut memory.again()).unwrap();
        assert_eq!((node.digests(), node.states()), (source.digests(), vec![State::Running; 2]));
    }
    // Nobody can say that the first one does not run: then nothing is undone as if it did not, and somebody decides.
    let takes = DEFAULT_CALL_LIMIT + Duration::from_secs(1);
    let hangs = Fault::Slow { call: Call::SetState(State::Running), takes };
    let node = Node::new(&configs(2, |config| config.seed += 100), &[&[hangs], &[]]);
    let (_, outcome, quarantined) = failed(restore(&node.lanes, &mut memory.again()).unwrap_err());
    assert_eq!((outcome, quarantined.len()), (Outcome::StateLost, 2));
}

#[test]
fn a_busy_device_is_pre_copied_until_the_rest_fits_or_given_up() {
    let busy = |config: &mut SimConfig| {
        config.workload = Workload { dirty_bytes_per_second: 100_000, working_set_bytes: None };
    };
    let insist = PrecopyPolicy {
        downtime_limit: Duration::ZERO,
        time_budget: Duration::from_secs(1),
        stop_over_limit: false,
    };
    let source = Node::new(&configs(1, busy), &[]);
    let (cause, outcome, _) = failed(save(&source.lanes, RESUME, insist, &mut Memory::new(1)).unwrap_err());
    assert!(cause.to_string().contains("predicted downtime"), "{cause}");
    assert_eq!((outcome, source.states()), (Outcome::Preserved, vec![State::Running]));

    // A read that takes time gives a rate to predict by.
    let slow = Fault::Slow { call: Call::Read, takes: Duration::from_millis(100) };
    let source = Node::new(&configs(1, busy), &[&[slow]]);
    let mut memory = Memory::new(1);
    let stop = PrecopyPolicy { stop_over_limit: true, ..insist };
    let report =
        save(&source.lanes, SaveRequest { after: AfterSave::StayStopped, ..RESUME }, stop, &mut memory)
            .unwrap();
    assert!(report.precopy_bytes > 300_000, "what changed meanwhile was copied again: {report:?}");
    assert_eq!(source.states(), [State::Stop]);
    let target = Node::new(&configs(1, busy), &[]);
    restore(&target.lanes, &mut memory).unwrap();
    assert_eq!(target.slots[0].digest(), source.slots[0].digest());
}

#[test]
fn a_call_that_never_returns_costs_its_device_and_nothing_else() {
    let takes = DEFAULT_CALL_LIMIT + Duration::from_secs(1);
    let slow: &[Fault] = &[Fault::Slow { call: Call::SetState(State::StopCopy), takes }];
    let source = Node::new(&configs(3, |_| ()), &[&[], slow, &[]]);
    let request = SaveRequest { pre_copy: false, ..RESUME };
    let (cause, _, quarantined) =
        failed(save(&source.lanes, request, PrecopyPolicy::default(), &mut Memory::new(3)).unwrap_err());
    assert!(matches!(cause, Cause::Device { failure: DeviceError::Hung { .. }, .. }), "{cause}");
    assert_eq!(quarantined, ["sim1"]);
    assert!(source.lanes[1].hung().is_some());
    assert!(source.lanes[1].call(Call::GetState, Driver::state).is_err(), "it is never called again");
    for index in [0, 2] {
        assert_eq!(source.lanes[index].call(Call::GetState, Driver::state).unwrap().unwrap(), State::Running);
    }
}

/// On real threads: the lane of a device that hangs is left alone, and another device is saved meanwhile.
#[test]
fn a_thread_that_never_returns_holds_up_nothing() {
    let executor: Arc<dyn Executor> = Arc::new(Threads::new());
    let lane = |name: &str, limit| {
        let config = SimConfig { name: name.to_owned(), ..SimConfig::default() };
        let slot = SimDevice::new(config, Arc::new(Threads::new())).unwrap();
        let driver = Driver::new(Box::new(slot.open().unwrap()));
        (DeviceLane::new(driver, Arc::clone(&executor), limit).unwrap(), slot)
    };
    let (stuck, _slot) = lane("stuck", Duration::from_millis(20));
    let (release, until_released) = std::sync::mpsc::channel::<()>();
    let hung = stuck.call(Call::Read, move |_| {
        let _ = until_released.recv();
    });
    assert!(matches!(hung.unwrap_err(), Hung::Overdue { call: Call::Read, .. }));
    let (well, _slot) = lane("well", DEFAULT_CALL_LIMIT);
    let mut memory = Memory::new(1);
    save(&[well], RESUME, PrecopyPolicy::default(), &mut memory).unwrap();
    assert!(stuck.call(Call::GetState, Driver::state).is_err());
    drop(release);
    assert!(stuck.call(Call::GetState, Driver::state).is_err(), "also when the call returned after all");
}

/// Of a set that fails, no device runs freely while another is still stopped.
#[test]
fn the_way_back_has_the_barrier_too() {
    for target in [State::StopCopy, State::Stop, State::RunningP2p, State::Running] {
        let source = Node::new(
            &configs(2, |_| ()),
            &[&[], &[Fault::Set { target, landing: State::Stop, errno: libc::EIO }]],
        );
        let error = save(&source.lanes, RESUME, PrecopyPolicy::default(), &mut Memory::new(2)).unwrap_err();
        let (_, outcome, quarantined) = failed(error);
        assert_eq!((outcome, quarantined.len()), (Outcome::Preserved, 0), "{target}");
        assert_eq!(source.states(), [State::Running; 2], "{target}");
        // By the device's own account: out of STOP only to RUNNING_P2P, and one step at a time from there.
        for slot in &source.slots {
            let hops: Vec<String> = slot.take_hops().iter().map(|hop| hop.arc.to_string()).collect();
            assert_eq!(hops.last().map(String::as_str), Some("RUNNING_P2P -> RUNNING"), "{target}");
        }
        let log: Vec<Vec<Step>> = source
            .lanes
            .iter()
            .map(|lane| lane.call(Call::GetState, |driver| driver.steps().to_vec()).unwrap())
            .collect();
        for steps in log {
            let back: Vec<State> = steps
                .iter()
                .rev()
                .filter_map(|step| match step {
                    Step::Set(state, _) => Some(*state),
                    Step::ReadBack(_) | Step::Reset(_) => None,
                })
                .take(2)
                .collect();
            assert_eq!(back, [State::Running, State::RunningP2p], "{target}");
        }
    }
}

/// A device that somebody resets meanwhile: a restore of it did not succeed, and a save of it lost its state.
#[test]
fn what_is_reset_behind_the_drivers_back_is_never_called_a_success() {
    struct Meddling {
        memory: Memory,
        other: SimHandle,
        at_ready: bool,
    }
    impl StateSink for Meddling {
        async fn chunk(&mut self, device: usize, bytes: Bytes) -> Result<(), BoxError> {
            self.memory.chunk(device, bytes).await
        }
        async fn seal(&mut self, config: &[Option<ConfigCapture>]) -> Result<(), BoxError> {
            self.other.reset().unwrap();
            self.memory.seal(config).await
        }
        async fn mark_inconsistent(&mut self) -> Result<(), BoxError> {
            self.memory.mark_inconsistent().await
        }
        async fn discard(&mut self) -> Result<(), BoxError> {
            self.memory.discard().await
        }
    }
    impl StateSource for Meddling {
        async fn next(&mut self) -> Result<Option<Arrival>, BoxError> {
            if !self.at_ready {
                self.other.reset().unwrap();
            }
            self.memory.next().await
        }
        async fn ready(&mut self, _rearm: &[Option<Rearm>]) -> Result<(), BoxError> {
            self.other.reset().unwrap();
            Ok(())
        }
    }

    let good = Node::new(&configs(1, |_| ()), &[]);
    let mut memory = Memory::new(1);
    save(&good.lanes, RESUME, PrecopyPolicy::default(), &mut memory).unwrap();
    for at_ready in [true, false] {
        let mut target = Node::new(&configs(1, |config| config.seed += 100), &[]);
        let mut meddling = Meddling { memory: memory.again(), other: target.others.remove(0), at_ready };
        let (_, outcome, _) = failed(restore(&target.lanes, &mut meddling).unwrap_err());
        assert_eq!(outcome, Outcome::StateLost);
        assert_ne!(target.digests(), good.digests());
    }

    let mut source = Node::new(&configs(1, |_| ()), &[]);
    let mut meddling = Meddling { memory: Memory::new(1), other: source.others.remove(0), at_ready: true };
    let error = save(&source.lanes, RESUME, PrecopyPolicy::default(), &mut meddling).unwrap_err();
    assert!(
        matches!(error, OperationError::Failed { checkpoint: Some(Validity::Consistent), .. }),
        "what was saved is the last copy: {error}"
    );
    let (_, outcome, quarantined) = failed(error);
    assert_eq!((outcome, quarantined.len()), (Outcome::StateLost, 1));
}
