//! How a run goes: calls that hang, devices that cannot be brought back, states that somebody left, the report.

use std::sync::{Arc, mpsc};
use std::time::Duration;

use vfio_checkpoint_device::conformance::{
    Options, Report, RunError, Subject, rules as suite, run as run_suite,
};
use vfio_checkpoint_device::fault::{Fault, FaultyDevice};
use vfio_checkpoint_device::sim::{SimConfig, SimDevice};
use vfio_checkpoint_device::{Call, Executor, MigrationDevice, Threads, chain};
use vfio_checkpoint_fsm::State;

use super::{Bed, small};

/// Runs on a device with faults in front of it, the same ones after each open.
fn with_faults<const N: usize>(faults: [Fault; N]) -> Result<Report, RunError> {
    let bed = Bed::new(small());
    let (slot, time) = (bed.device.clone(), bed.executor.time());
    let subject = bed.subject().opened_by(Box::new(move || {
        Ok(Box::new(FaultyDevice::new(Box::new(slot.open()?), &faults, Arc::clone(&time))))
    }));
    let executor: Arc<dyn Executor> = Arc::new(bed.executor.clone());
    run_suite(subject, &Options::default(), &executor, &mut |_| {})
}

#[test]
fn a_call_that_hangs_is_named_with_its_rule_and_ends_the_run() {
    let report =
        with_faults([Fault::Slow { call: Call::SetState(State::Resuming), takes: Duration::from_hours(1) }])
            .unwrap();
    let stopped = report.stopped.as_ref().unwrap();
    assert_eq!(stopped.reason, "reopened-state: moving the device to RESUMING did not return within 3600s");
    assert!(!report.conforms());
    assert_eq!(report.findings.len() + stopped.not_run.len(), suite::all().count());
    let last = report.findings.last().unwrap();
    assert!(last.rule == "reopened-state" && last.verdict.matters(), "{last:?}");
}

#[test]
fn a_slow_call_within_the_limit_is_no_hang() {
    let report =
        with_faults([Fault::Slow { call: Call::SetState(State::Resuming), takes: Duration::from_secs(90) }])
            .unwrap();
    assert!(report.conforms(), "{report}");
}

#[test]
fn a_device_that_cannot_be_reset_ends_the_run() {
    let report = with_faults([Fault::Reset { errno: libc::EIO }]).unwrap();
    let stopped = report.stopped.as_ref().unwrap();
    assert!(stopped.reason.contains("resetting the device failed"), "{}", stopped.reason);
    assert_eq!(report.findings.len(), 1);
    assert_eq!(stopped.not_run.len(), suite::all().count() - 1);
    assert!(report.to_string().contains("The run ended early"), "{report}");
}

#[test]
fn an_error_that_no_rule_expects_is_a_difference_of_one_rule() {
    let report =
        with_faults([Fault::Set { target: State::StopCopy, landing: State::Running, errno: libc::EIO }])
            .unwrap();
    assert!(report.stopped.is_none(), "{report}");
    assert!(
        report.differences().any(|finding| finding.verdict.text().contains("Input/output error")),
        "{report}"
    );
}

#[test]
fn a_state_that_somebody_left_is_not_destroyed_unasked() {
    let bed = Bed::new(SimConfig { reset_on_last_close: false, ..small() });
    bed.device.open().unwrap().set_state(State::Stop).unwrap();
    let executor: Arc<dyn Executor> = Arc::new(bed.executor.clone());
    let refused = run_suite(bed.subject(), &Options::default(), &executor, &mut |_| {}).unwrap_err();
    assert!(matches!(refused, RunError::LeftOver { found: State::Stop, .. }), "{}", chain(&refused));
    assert_eq!((bed.device.state(), bed.device.resets()), (State::Stop, 0));
    let options = Options { discard_left_over: true, ..Options::default() };
    assert!(run_suite(bed.subject(), &options, &executor, &mut |_| {}).unwrap().conforms());
}

#[test]
fn a_device_that_is_open_or_of_another_kind_is_refused() {
    let bed = Bed::new(small());
    let holder = bed.device.open().unwrap();
    let executor: Arc<dyn Executor> = Arc::new(bed.executor.clone());
    let run = |subject: Subject| run_suite(subject, &Options::default(), &executor, &mut |_| {}).unwrap_err();
    let refused = run(bed.subject());
    assert!(matches!(refused, RunError::Open(_)), "{}", chain(&refused));
    drop(holder);
    let other = Bed::new(SimConfig { firmware: "another".to_owned(), ..small() });
    let refused = run(bed.subject().restore_onto(other.subject()));
    assert!(
        chain(&refused).contains("firmware is sim-firmware-1 there and another here"),
        "{}",
        chain(&refused)
    );
    assert_eq!((bed.device.resets(), other.device.resets()), (0, 0), "nothing was done to either");
}

#[test]
fn findings_are_told_as_they_come_and_the_device_is_left_running() {
    let bed = Bed::new(small());
    let executor: Arc<dyn Executor> = Arc::new(bed.executor.clone());
    let mut told = Vec::new();
    let report =
        run_suite(bed.subject(), &Options::default(), &executor, &mut |finding| told.push(finding.rule))
            .unwrap();
    assert_eq!(told, suite::all().map(|rule| rule.id).collect::<Vec<_>>());
    assert_eq!((bed.device.state(), bed.device.handles()), (State::Running, 0));
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["findings"][0]["rule"], "identity-stable");
    assert_eq!(json["findings"][0]["verdict"], "holds");
    assert_eq!(json["stopped"], serde_json::Value::Null);
}

/// On real threads: the call never returns, and the report comes all the same.
#[test]
fn a_call_that_never_returns_is_reported() {
    let executor: Arc<dyn Executor> = Arc::new(Threads::new());
    let device = SimDevice::new(small(), Arc::new(Threads::new())).unwrap();
    // Held by this test: as long as it lives the second open waits.
    let (let_go, wait) = mpsc::channel::<()>();
    let mut opens = 0;
    let subject = Subject::new(Box::new(move || {
        opens += 1;
        if opens == 2 {
            let _ = wait.recv();
        }
        Ok(Box::new(device.open()?))
    }));
    let options = Options { call_limit: Duration::from_millis(300), ..Options::default() };
    let report = run_suite(subject, &options, &executor, &mut |_| {}).unwrap();
    let stopped = report.stopped.as_ref().unwrap();
    assert!(
        stopped.reason.starts_with("identity-stable: opening the device did not return within"),
        "{}",
        stopped.reason
    );
    assert_eq!(stopped.not_run.len(), suite::all().count() - 1);
    drop(let_go);
}
