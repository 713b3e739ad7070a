//! The machine of a save.

use vfio_checkpoint_fsm::{
    AfterSave, Capabilities, Cutover, Fate, Outcome, PlanRefusal, SaveCommand, SaveEvent, SavePlan,
    SaveRequest, SaveState, SaveStep, State, Validity, Walk, path,
};

use crate::explore::{self, Machine, Move, courses};
use crate::table::{Table, check};

impl Machine for SaveState {
    type Plan = SavePlan;
    type Event = SaveEvent;
    type Command = SaveCommand;

    const START: Self = Self::Admitted;
    const STATES: &'static [Self] = &Self::ALL;
    const EVENTS: &'static [SaveEvent] = &SaveEvent::ALL;

    fn plans() -> Vec<SavePlan> {
        let mut plans = Vec::new();
        for pre_copy in [true, false] {
            for barrier in [true, false] {
                for cutover in [Cutover::Auto, Cutover::Manual] {
                    for after in
                        [AfterSave::Resume, AfterSave::Hold, AfterSave::StayStopped, AfterSave::HandOver]
                    {
                        plans.push(SavePlan { pre_copy, barrier, cutover, after });
                    }
                }
            }
        }
        plans
    }

    fn facets(plan: SavePlan) -> Vec<String> {
        vec![
            if plan.pre_copy { "pre-copy" } else { "no pre-copy" }.to_owned(),
            if plan.barrier { "barrier" } else { "no barrier" }.to_owned(),
            plan.cutover.to_string(),
            plan.after.to_string(),
        ]
    }

    fn take(self, plan: SavePlan, event: SaveEvent) -> SaveStep {
        self.on(plan, event)
    }

    fn is_over(self) -> bool {
        self.is_terminal()
    }

    fn owed(plan: SavePlan, command: SaveCommand) -> &'static [SaveEvent] {
        use SaveEvent as E;
        match (command, plan.cutover) {
            (SaveCommand::EnterPreCopy, Cutover::Auto) => &[E::CutoverDue, E::Failed],
            // If the caller never cuts over, the operation's deadline cancels it.
            (SaveCommand::EnterPreCopy, Cutover::Manual)
            | (SaveCommand::AwaitCutover, Cutover::Auto | Cutover::Manual) => {
                &[E::Cutover, E::Cancel, E::Failed]
            }
            (SaveCommand::Quiesce, _) => &[E::AllQuiesced, E::Failed],
            (SaveCommand::EnterStopCopy, _) => &[E::AllStopped, E::Failed],
            (SaveCommand::Drain, _) => &[E::AllDrained, E::Failed],
            (SaveCommand::Seal, _) => &[E::Sealed, E::Failed],
            (SaveCommand::Park, _) => &[E::AllParked, E::Failed],
            (SaveCommand::AwaitResume, _) => &[E::Resume, E::HoldExpired, E::Failed],
            (SaveCommand::MarkInconsistent, _) => &[E::Marked, E::Failed],
            (SaveCommand::Resume, _) => &[E::AllRunning, E::Failed],
            (SaveCommand::AwaitCommit, _) => &[E::CommitDue, E::HoldExpired, E::Failed],
            (SaveCommand::Commit, _) => &[E::Committed, E::Refused],
            (SaveCommand::LetGo, _) => &[E::LetGo],
            (SaveCommand::FallBack, _) => &[E::Recovered, E::Unrecoverable],
            (SaveCommand::Release | SaveCommand::Discard | SaveCommand::Quarantine, _) => &[],
        }
    }
}

/// The place of an event in a course.
fn place(course: &[Move<SaveState>], event: SaveEvent) -> Option<usize> {
    course.iter().position(|onward| onward.event == event)
}

fn all_courses() -> impl Iterator<Item = (SavePlan, Vec<Move<SaveState>>)> {
    SaveState::plans()
        .into_iter()
        .flat_map(|plan| courses::<SaveState>(plan).into_iter().map(move |course| (plan, course)))
}

fn end(course: &[Move<SaveState>]) -> SaveState {
    course.last().map_or(SaveState::START, |last| last.to)
}

#[test]
fn every_state_and_event() {
    check("save_answers", &explore::answers::<SaveState>());
}

#[test]
fn every_course_without_a_failure() {
    let smooth = |course: &[Move<SaveState>]| {
        place(course, SaveEvent::Failed).is_none() && place(course, SaveEvent::Cancel).is_none()
    };
    check("save_courses", &explore::show_courses(smooth));
}

#[test]
fn only_moves_move() {
    explore::only_moves_move::<SaveState>();
}

#[test]
fn every_save_ends() {
    explore::every_operation_ends::<SaveState>();
}

#[test]
fn every_state_can_be_reached() {
    explore::the_list_of_states_is_complete::<SaveState>();
}

#[test]
fn success_means_drained_sealed_and_nothing_failed() {
    for (plan, course) in all_courses() {
        if !end(&course).is_success() {
            continue;
        }
        for event in [
            SaveEvent::Failed,
            SaveEvent::Cancel,
            SaveEvent::HoldExpired,
            SaveEvent::Refused,
            SaveEvent::Recovered,
            SaveEvent::Unrecoverable,
        ] {
            assert_eq!(place(&course, event), None, "success after {event}");
        }
        let drained = place(&course, SaveEvent::AllDrained);
        let sealed = place(&course, SaveEvent::Sealed);
        assert!(drained.is_some() && drained < sealed, "success without a seal over all bytes");
        let stayed = end(&course) == SaveState::CompletedStopped;
        assert_eq!(stayed, plan.after == AfterSave::StayStopped);
        assert_eq!(end(&course) == SaveState::HandedOver, plan.after == AfterSave::HandOver);
        let last = match plan.after {
            AfterSave::Resume | AfterSave::Hold => SaveEvent::AllRunning,
            AfterSave::StayStopped => SaveEvent::Sealed,
            AfterSave::HandOver => SaveEvent::LetGo,
        };
        assert_eq!(place(&course, last), Some(course.len() - 1), "success before it is true");
    }
}

/// Also where the failure is a no-op, which no course shows.
#[test]
fn a_failure_never_turns_into_success() {
    for plan in SaveState::plans() {
        for state in explore::reachable::<SaveState>(plan) {
            let mut open = match state.on(plan, SaveEvent::Failed) {
                SaveStep::Moved { to, .. } => vec![to],
                SaveStep::NoOp(state) => vec![state],
                SaveStep::Illegal { .. } => continue,
            };
            while let Some(after) = open.pop() {
                assert!(!after.is_success(), "{state} succeeds after a failure");
                open.extend(explore::moves(plan, after).into_iter().map(|onward| onward.to));
            }
        }
    }
}

#[test]
fn no_device_stops_before_all_are_quiesced() {
    for (plan, course) in all_courses() {
        let quiesced = place(&course, SaveEvent::AllQuiesced);
        let stopping = course.iter().position(|onward| onward.to == SaveState::Stopping);
        assert!(stopping.is_none() || !plan.barrier || (quiesced.is_some() && quiesced <= stopping));
        for onward in &course {
            match onward.command {
                SaveCommand::Resume | SaveCommand::FallBack => {
                    assert_eq!(
                        plan.barrier,
                        onward.command.targets(plan) == [State::RunningP2p, State::Running]
                    );
                }
                SaveCommand::EnterPreCopy
                | SaveCommand::AwaitCutover
                | SaveCommand::Quiesce
                | SaveCommand::EnterStopCopy
                | SaveCommand::Drain
                | SaveCommand::Seal
                | SaveCommand::Park
                | SaveCommand::AwaitResume
                | SaveCommand::MarkInconsistent
                | SaveCommand::AwaitCommit
                | SaveCommand::Commit
                | SaveCommand::LetGo
                | SaveCommand::Release
                | SaveCommand::Discard
                | SaveCommand::Quarantine => {}
            }
        }
    }
}

#[test]
fn past_the_point_of_no_return_a_sealed_checkpoint_stands() {
    for (_, course) in all_courses() {
        let Some(line) = course.iter().position(|onward| onward.to.is_past_no_return()) else {
            continue;
        };
        assert!(
            place(&course, SaveEvent::Sealed).is_some_and(|sealed| sealed <= line),
            "it never was sealed"
        );
        for onward in &course[line..] {
            assert!(onward.to.is_past_no_return(), "back over the line to {}", onward.to);
            assert_ne!(onward.command, SaveCommand::Discard, "a checkpoint that stands is discarded");
            assert_ne!(onward.to, SaveState::Aborted { checkpoint: None }, "aborted as if there were none");
        }
        for onward in &course[line + 1..] {
            assert_ne!(onward.event, SaveEvent::Cancel, "cancelled past the line");
        }
    }
}

#[test]
fn a_sealed_checkpoint_is_discarded_only_once_the_devices_run() {
    let kept = all_courses().filter(|(plan, _)| plan.after != AfterSave::HandOver);
    for (_, course) in kept {
        let sealed = place(&course, SaveEvent::Sealed).is_some();
        match end(&course) {
            SaveState::Aborted { checkpoint: None } => {
                let recovered = place(&course, SaveEvent::Recovered).is_some();
                assert!(recovered || !sealed);
            }
            SaveState::Lost { checkpoint } => assert_eq!(checkpoint.is_some(), sealed),
            SaveState::Aborted { checkpoint: Some(_) }
            | SaveState::Completed
            | SaveState::CompletedStopped
            | SaveState::Inconsistent => assert!(sealed),
            other @ (SaveState::Admitted
            | SaveState::PreCopying
            | SaveState::AwaitingCutover
            | SaveState::Quiescing
            | SaveState::Stopping
            | SaveState::Draining
            | SaveState::Sealing
            | SaveState::Parking
            | SaveState::Held
            | SaveState::Marking
            | SaveState::Resuming { .. }
            | SaveState::Offered
            | SaveState::Committing
            | SaveState::LettingGo
            | SaveState::HandedOver
            | SaveState::Unwinding { .. }) => panic!("{other} is not an end"),
        }
    }
}

#[test]
fn an_expired_hold_is_marked_before_any_device_runs_and_told_ever_after() {
    let kept = all_courses().filter(|(plan, _)| plan.after != AfterSave::HandOver);
    for (_, course) in kept {
        let Some(expired) = place(&course, SaveEvent::HoldExpired) else {
            continue;
        };
        let marked = place(&course, SaveEvent::Marked);
        for (index, onward) in course.iter().enumerate().skip(expired) {
            if onward.command == SaveCommand::Resume {
                assert_eq!(marked, Some(index), "resumed without the mark");
            }
        }
        let inconsistent = Some(Validity::Inconsistent);
        let honest = [
            SaveState::Inconsistent,
            SaveState::Aborted { checkpoint: None },
            SaveState::Aborted { checkpoint: inconsistent },
            SaveState::Lost { checkpoint: inconsistent },
        ];
        assert!(honest.contains(&end(&course)), "{} after the hold expired", end(&course));
    }
}

/// The commands of every course, obeyed by a device: no SET is forbidden, and one stream carries the whole
/// session.
#[test]
fn a_device_can_follow_every_course() {
    for (plan, course) in all_courses() {
        for capabilities in Capabilities::ALL {
            // A plan asks a device for what it has; with the barrier, that is P2P on all of them.
            if capabilities.p2p != plan.barrier || (plan.pre_copy && !capabilities.pre_copy) {
                continue;
            }
            let mut state = State::Running;
            let mut opened = 0;
            for onward in &course {
                for &target in onward.command.targets(plan) {
                    match path(capabilities, state, target) {
                        Walk::NoOp => {}
                        Walk::Forbidden(why) => panic!("{} from {state}: {why}", onward.command),
                        Walk::Path(path) => {
                            opened += usize::from(path.opens_stream());
                            let ends = matches!(
                                onward.command,
                                SaveCommand::Park | SaveCommand::Resume | SaveCommand::FallBack
                            );
                            assert!(ends || !path.closes_stream(), "{}: {path}", onward.command);
                        }
                    }
                    state = target;
                }
                if onward.command == SaveCommand::Drain {
                    assert_eq!((state, opened), (State::StopCopy, 1));
                }
            }
            assert!(opened <= 1);
            // What is handed over is let go of by a reset, which no SET does.
            let stopped = [SaveState::CompletedStopped, SaveState::HandedOver].contains(&end(&course));
            let expected = if stopped { State::Stop } else { State::Running };
            assert_eq!(state, expected);
        }
    }
}

#[test]
fn a_manual_cutover_belongs_to_the_caller() {
    let request = SaveRequest { pre_copy: true, cutover: Cutover::Manual, after: AfterSave::Resume };
    let full = Capabilities { p2p: true, pre_copy: true };
    let plan = SavePlan::for_devices(&[full], request);
    let expected =
        SavePlan { pre_copy: true, barrier: true, cutover: Cutover::Manual, after: AfterSave::Resume };
    assert_eq!(plan, Ok(expected));
    let state = SaveState::PreCopying;
    assert_eq!(state.on(expected, SaveEvent::CutoverDue), SaveStep::NoOp(state));
    assert_eq!(state.on(expected, SaveEvent::Cutover).state(), SaveState::Quiescing);
}

#[test]
fn a_seal_that_becomes_durable_during_a_cancel_is_remembered() {
    for plan in SaveState::plans().into_iter().filter(|plan| plan.after != AfterSave::HandOver) {
        let cancelled = SaveState::Sealing.on(plan, SaveEvent::Cancel).state();
        assert_eq!(cancelled, SaveState::Unwinding { checkpoint: Fate::Unsealed });
        let sealed = cancelled.on(plan, SaveEvent::Sealed).state();
        let lost = sealed.on(plan, SaveEvent::Unrecoverable).state();
        assert_eq!(lost, SaveState::Lost { checkpoint: Some(Validity::Consistent) });
        assert_eq!(lost.outcome(), Some(Outcome::StateLost));
    }
}

#[test]
fn every_plan_of_one_and_two_devices() {
    let mut table = Table::new(&["DEVICES", "PRE-COPY WANTED", "PLAN"]);
    let mut row = |devices: &[Capabilities]| {
        for pre_copy in [false, true] {
            let request = SaveRequest { pre_copy, cutover: Cutover::Auto, after: AfterSave::Resume };
            let plan = match SavePlan::for_devices(devices, request) {
                Ok(plan) => SaveState::facets(plan)[..2].join(", "),
                Err(refusal @ (PlanRefusal::NoDevices | PlanRefusal::PeerWithoutP2p { .. })) => {
                    format!("refused: {refusal}")
                }
            };
            let devices: Vec<String> = devices.iter().map(ToString::to_string).collect();
            table.row([devices.join(" + "), if pre_copy { "yes" } else { "no" }.to_owned(), plan]);
        }
    };
    row(&[]);
    for first in Capabilities::ALL {
        row(&[first]);
    }
    for first in Capabilities::ALL {
        for second in Capabilities::ALL.into_iter().filter(|&second| first <= second) {
            row(&[first, second]);
        }
    }
    check("save_plans", &table.render());
}
