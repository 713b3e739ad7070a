//! The machine of a restore.

use vfio_checkpoint_fsm::{
    AfterLoad, Capabilities, Outcome, PlanRefusal, RestoreCommand, RestoreEvent, RestorePlan, RestoreState,
    RestoreStep, State, Walk, path,
};

use crate::explore::{self, Machine, Move, courses};
use crate::table::check;

impl Machine for RestoreState {
    type Plan = RestorePlan;
    type Event = RestoreEvent;
    type Command = RestoreCommand;

    const START: Self = Self::Admitted;
    const STATES: &'static [Self] = &Self::ALL;
    const EVENTS: &'static [RestoreEvent] = &RestoreEvent::ALL;

    fn plans() -> Vec<RestorePlan> {
        let mut plans = Vec::new();
        for barrier in [true, false] {
            for after in [AfterLoad::Run, AfterLoad::Hold] {
                plans.push(RestorePlan { barrier, after });
            }
        }
        plans
    }

    fn facets(plan: RestorePlan) -> Vec<String> {
        vec![if plan.barrier { "barrier" } else { "no barrier" }.to_owned(), plan.after.to_string()]
    }

    fn take(self, plan: RestorePlan, event: RestoreEvent) -> RestoreStep {
        self.on(plan, event)
    }

    fn is_over(self) -> bool {
        self.is_terminal()
    }

    fn owed(_plan: RestorePlan, command: RestoreCommand) -> &'static [RestoreEvent] {
        use RestoreEvent as E;
        match command {
            RestoreCommand::EnterResuming => &[E::AllEntered, E::Failed],
            RestoreCommand::Load => &[E::AllLoaded, E::Failed],
            RestoreCommand::Verify => &[E::SealVerified, E::Failed],
            RestoreCommand::FixUp => &[E::FixedUp, E::Failed],
            RestoreCommand::AwaitResume => &[E::Resume, E::HoldExpired, E::Failed],
            RestoreCommand::AwaitReady => &[E::Ready, E::HoldExpired, E::Failed],
            RestoreCommand::EnterP2p => &[E::AllQuiesced, E::Failed],
            RestoreCommand::Resume => &[E::AnyRunning, E::AllRunning, E::Failed],
            RestoreCommand::FinishResume => &[E::AllRunning, E::Failed],
            RestoreCommand::UndoEntry => &[E::Recovered, E::AllReset, E::Unrecoverable],
            RestoreCommand::ResetAll => &[E::AllReset, E::Unrecoverable],
            RestoreCommand::Release | RestoreCommand::Quarantine => &[],
        }
    }
}

fn place(course: &[Move<RestoreState>], event: RestoreEvent) -> Option<usize> {
    course.iter().position(|onward| onward.event == event)
}

fn all_courses() -> impl Iterator<Item = (RestorePlan, Vec<Move<RestoreState>>)> {
    RestoreState::plans()
        .into_iter()
        .flat_map(|plan| courses::<RestoreState>(plan).into_iter().map(move |course| (plan, course)))
}

fn end(course: &[Move<RestoreState>]) -> RestoreState {
    course.last().map_or(RestoreState::START, |last| last.to)
}

#[test]
fn every_state_and_event() {
    check("restore_answers", &explore::answers::<RestoreState>());
}

#[test]
fn every_course_without_a_failure() {
    let smooth = |course: &[Move<RestoreState>]| {
        [RestoreEvent::Failed, RestoreEvent::Cancel, RestoreEvent::Unrecoverable]
            .into_iter()
            .all(|event| place(course, event).is_none())
    };
    check("restore_courses", &explore::show_courses(smooth));
}

#[test]
fn only_moves_move() {
    explore::only_moves_move::<RestoreState>();
}

#[test]
fn every_restore_ends() {
    explore::every_operation_ends::<RestoreState>();
}

#[test]
fn every_state_can_be_reached() {
    explore::the_list_of_states_is_complete::<RestoreState>();
}

#[test]
fn no_device_runs_without_a_verified_seal_and_ready() {
    for (plan, course) in all_courses() {
        for (index, onward) in course.iter().enumerate() {
            let before = |event| place(&course[..=index], event).is_some();
            match onward.command {
                RestoreCommand::EnterP2p | RestoreCommand::Resume | RestoreCommand::FinishResume => {
                    for event in [
                        RestoreEvent::AllLoaded,
                        RestoreEvent::SealVerified,
                        RestoreEvent::FixedUp,
                        RestoreEvent::Ready,
                    ] {
                        assert!(before(event), "{} without {event}", onward.command);
                    }
                    assert!(plan.after == AfterLoad::Run || before(RestoreEvent::Resume));
                    assert!(
                        onward.command == RestoreCommand::EnterP2p
                            || !plan.barrier
                            || before(RestoreEvent::AllQuiesced)
                    );
                }
                RestoreCommand::EnterResuming
                | RestoreCommand::Load
                | RestoreCommand::Verify
                | RestoreCommand::FixUp
                | RestoreCommand::AwaitResume
                | RestoreCommand::AwaitReady
                | RestoreCommand::UndoEntry
                | RestoreCommand::ResetAll
                | RestoreCommand::Release
                | RestoreCommand::Quarantine => {}
            }
        }
    }
}

#[test]
fn success_means_that_all_run_and_nothing_failed() {
    for (_, course) in all_courses() {
        if !end(&course).is_success() {
            continue;
        }
        for event in [RestoreEvent::Failed, RestoreEvent::Cancel, RestoreEvent::HoldExpired] {
            assert_eq!(place(&course, event), None, "success after {event}");
        }
        assert_eq!(place(&course, RestoreEvent::AllRunning), Some(course.len() - 1));
    }
}

/// Also where the failure is a no-op, which no course shows.
#[test]
fn a_failure_never_turns_into_success() {
    for plan in RestoreState::plans() {
        for state in explore::reachable::<RestoreState>(plan) {
            let mut open = match state.on(plan, RestoreEvent::Failed) {
                RestoreStep::Moved { to, .. } => vec![to],
                RestoreStep::NoOp(state) => vec![state],
                RestoreStep::Illegal { .. } => continue,
            };
            while let Some(after) = open.pop() {
                assert!(!after.is_success(), "{state} succeeds after a failure");
                open.extend(explore::moves(plan, after).into_iter().map(|onward| onward.to));
            }
        }
    }
}

#[test]
fn an_expired_hold_is_reset_and_never_run() {
    for (_, course) in all_courses() {
        let Some(expired) = place(&course, RestoreEvent::HoldExpired) else {
            continue;
        };
        assert_eq!(course[expired].command, RestoreCommand::ResetAll);
        let lost = RestoreState::Aborted { outcome: Outcome::StateLost };
        assert!([lost, RestoreState::Quarantined].contains(&end(&course)));
    }
}

#[test]
fn past_the_point_of_no_return_nothing_is_aborted_or_reset() {
    for (_, course) in all_courses() {
        let Some(line) = course.iter().position(|onward| onward.to.is_past_no_return()) else {
            continue;
        };
        for onward in &course[line..] {
            assert!(onward.to.is_past_no_return(), "back over the line to {}", onward.to);
            assert_ne!(onward.command, RestoreCommand::ResetAll);
        }
    }
}

#[test]
fn the_old_state_is_preserved_only_if_no_device_was_loaded_or_reset() {
    let preserved = RestoreState::Aborted { outcome: Outcome::Preserved };
    for (_, course) in all_courses() {
        let entered = place(&course, RestoreEvent::AllEntered).is_some();
        let reset = place(&course, RestoreEvent::AllReset).is_some();
        if end(&course) == preserved {
            assert!(!entered && !reset);
        }
        if reset {
            assert_eq!(end(&course), RestoreState::Aborted { outcome: Outcome::StateLost });
        }
    }
}

/// The commands of every course, obeyed by a device: no SET is forbidden, one restore stream is opened, it
/// ends only with a verified seal or a reset, and no device is parked in STOP.
#[test]
fn a_device_can_follow_every_course() {
    for (plan, course) in all_courses() {
        for capabilities in Capabilities::ALL {
            if plan.barrier && !capabilities.p2p {
                continue;
            }
            let mut state = State::Running;
            let mut opened = 0;
            for (index, onward) in course.iter().enumerate() {
                if onward.command == RestoreCommand::ResetAll || onward.command == RestoreCommand::UndoEntry {
                    state = State::Running;
                }
                for &target in onward.command.targets(plan) {
                    assert_ne!(target, State::Stop);
                    match path(capabilities, state, target) {
                        Walk::NoOp => {}
                        Walk::Forbidden(why) => panic!("{} from {state}: {why}", onward.command),
                        Walk::Path(path) => {
                            opened += usize::from(path.opens_stream());
                            let verified = place(&course[..=index], RestoreEvent::SealVerified).is_some();
                            assert!(verified || !path.closes_stream(), "{}: {path}", onward.command);
                        }
                    }
                    state = target;
                }
            }
            assert!(opened <= 1);
        }
    }
}

#[test]
fn a_single_device_goes_straight() {
    let full = Capabilities { p2p: true, pre_copy: true };
    let bare = Capabilities { p2p: false, pre_copy: true };
    let run = AfterLoad::Run;
    assert_eq!(RestorePlan::for_devices(&[full], run), Ok(RestorePlan { barrier: false, after: run }));
    assert_eq!(RestorePlan::for_devices(&[bare], run), Ok(RestorePlan { barrier: false, after: run }));
    assert_eq!(RestorePlan::for_devices(&[full, full], run), Ok(RestorePlan { barrier: true, after: run }));
    assert_eq!(
        RestorePlan::for_devices(&[full, bare], run),
        Err(PlanRefusal::PeerWithoutP2p { index: 1, devices: 2 })
    );
}
