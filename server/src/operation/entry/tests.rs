use vfio_checkpoint_fsm::handover::Verdict;
use vfio_checkpoint_proto::ids::KeyHash;

use super::*;
use crate::operation::record::{AfterRecord, EndOutcome, EndResult, VerdictRecord};

fn entry(job: JobRecord) -> Entry {
    let fixed = Fixed {
        name: OperationName::from_id("0-0").unwrap(),
        job,
        devices: Vec::new(),
        caller: "spiffe://lab.test/saver".to_owned(),
        request_id: None,
        owner_pod: String::new(),
        created: UnixMillis(0),
        trace_id: None,
        checkpoint: None,
        peer: None,
    };
    Entry::new(fixed, None, UnixMillis(1)).0
}

fn save(manual_cutover: bool, after: AfterRecord) -> Entry {
    entry(JobRecord::Save { pre_copy: false, barrier: false, manual_cutover, after })
}

#[test]
fn a_resume_after_the_hold_ran_out_is_no_success() {
    let entry = save(false, AfterRecord::Hold);
    entry.change(|view| view.phase = Phase::Resuming);
    assert_eq!(entry.resume(), Err(Refused::NotHeld { phase: Phase::Resuming }));
    entry.change(|view| view.phase = Phase::Held);
    entry.resume().unwrap();
    entry.change(|view| view.phase = Phase::Resuming);
    entry.resume().expect("said again while it has its effect");
}

/// The wall clock is all that says across a restart how much of a hold is over, and it may be set back meanwhile.
#[test]
fn a_hold_that_is_taken_up_lasts_no_longer_than_it_was_to() {
    let minute = Duration::from_mins(1);
    let held_at = UnixMillis(1_000_000_000);
    let deadline = held_at.after(minute);
    let step = RecordedStep::Held { deadline, limit: Some(minute), stopped_at: None };
    for (now, left, told) in [
        (held_at.after(Duration::from_secs(20)), Duration::from_secs(40), deadline),
        (deadline.after(minute), Duration::ZERO, deadline),
        // Set back by more than eleven days.
        (UnixMillis(0), minute, UnixMillis(60_000)),
    ] {
        let held = Entry::recorded(save(false, AfterRecord::Hold).record(step.clone()));
        assert_eq!(step.hold_left(now), left, "{now:?}");
        held.held_on(now, left);
        let view = held.view();
        assert_eq!((view.phase, view.deadline), (Phase::Held, Some(told)), "{now:?}");
    }
    let of_before = RecordedStep::Held { deadline, limit: None, stopped_at: None };
    assert_eq!(of_before.hold_left(UnixMillis(0)), Duration::from_millis(deadline.0));
    assert_eq!(RecordedStep::Stopped.hold_left(UnixMillis(0)), Duration::ZERO);
}

#[test]
fn what_is_being_undone_takes_no_cutover() {
    let entry = save(true, AfterRecord::Resume);
    entry.cutover().unwrap();
    entry.change(|view| view.phase = Phase::Unwinding);
    assert_eq!(entry.cutover(), Err(Refused::Undone));
    entry.cancel(Cancel::ShuttingDown).expect("said again");
}

#[test]
fn what_was_cancelled_takes_neither_cutover_nor_resume_before_its_task_hears_of_it() {
    let cancelled = |entry: Entry, phase| {
        entry.change(|view| view.phase = phase);
        entry.cancel(Cancel::ShuttingDown).unwrap();
        entry
    };
    let entry = cancelled(save(true, AfterRecord::Resume), Phase::WaitingForCutover);
    assert_eq!(entry.cutover(), Err(Refused::Undone));
    let entry = cancelled(save(false, AfterRecord::Hold), Phase::Held);
    assert_eq!(entry.resume(), Err(Refused::Undone));
    assert!(!entry.signals.is_resumed());
}

#[test]
fn past_the_point_of_no_return_there_is_nothing_to_cancel() {
    let entry = save(false, AfterRecord::Resume);
    entry.change(|view| {
        view.phase = Phase::Resuming;
        view.cancellable = false;
    });
    let refused = entry.cancel(Cancel::Requested { by: "a".to_owned() });
    assert_eq!(refused, Err(Refused::PastNoReturn { phase: Phase::Resuming }));
    assert_eq!(entry.signals.cancel_reason(), None);
}

#[test]
fn a_sum_is_as_sure_as_the_least_sure_of_its_parts() {
    use DataSize::{Known, Unknown, UpperBound};
    assert_eq!(total([]), Known(0));
    assert_eq!(total([Known(1), Known(2)]), Known(3));
    assert_eq!(total([Known(1), UpperBound(2)]), UpperBound(3));
    assert_eq!(total([UpperBound(1), Unknown, Known(2)]), Unknown);
    assert_eq!(total([Known(u64::MAX), Known(1)]), Known(u64::MAX));
}

/// Between the record of an end and what is told of it somebody may ask.
#[test]
fn an_arrival_whose_end_is_on_record_is_told_by_its_verdict() {
    let arrival = entry(JobRecord::Arrive { barrier: false, require_ready: false });
    let handover = HandoverRecord::new(PeerRecord::Source { key: KeyHash([7; 32]) });
    arrival.change(|view| view.handover = Some(Handover::new(handover)));
    arrival.set_on_record(RecordedStep::Running { inconsistent: false });
    arrival.hand_over(|handover| handover.record.verdict = Some(VerdictRecord::Committed));
    assert_eq!(arrival.arrival_step(), ArrivalStep::Committing, "it is not durable yet");
    let end = EndRecord {
        at: UnixMillis(1),
        result: EndResult::Succeeded,
        outcome: EndOutcome::Replaced,
        failure: None,
        consistency: None,
        moved_bytes: Vec::new(),
        pre_copy_bytes: 0,
        device_pre_copy_bytes: Vec::new(),
        downtime: None,
        predicted_downtime: None,
        quarantined: Vec::new(),
        hung: Vec::new(),
        unavailable: Vec::new(),
        left_stopped: false,
        revision: 1,
    };
    arrival.set_on_record(RecordedStep::Ended(end.clone()));
    assert_eq!(arrival.arrival_step(), ArrivalStep::Over(Verdict::Committed));
    arrival.end(end);
    assert_eq!(arrival.arrival_step(), ArrivalStep::Over(Verdict::Committed));
}
