//! The two halves of a hand-over: what is on record, what is answered, what an administrator may decide.

use vfio_checkpoint_fsm::handover::{
    ArrivalEnd, ArrivalStep, ArrivalTakeUp, CommitAnswer, Evidence, OfferStep, OfferTakeUp, Resolution,
    Unresolvable, Verdict, resolve,
};
use vfio_checkpoint_fsm::{
    AfterLoad, AfterSave, RestoreEvent, RestorePlan, RestoreState, SaveCommand, SaveEvent, SaveState,
};

use crate::explore::{Machine, Move, courses};
use crate::table::{Table, check};

const VERDICTS: [Verdict; 4] = [Verdict::Committed, Verdict::Refused, Verdict::Lost, Verdict::Broken];
const STEPS: [ArrivalStep; 8] = [
    ArrivalStep::Loading,
    ArrivalStep::Prepared,
    ArrivalStep::Committing,
    ArrivalStep::Reverting,
    ArrivalStep::Over(Verdict::Committed),
    ArrivalStep::Over(Verdict::Refused),
    ArrivalStep::Over(Verdict::Lost),
    ArrivalStep::Over(Verdict::Broken),
];
const ENDS: [ArrivalEnd; 4] =
    [ArrivalEnd::AllRunning, ArrivalEnd::AllReset, ArrivalEnd::Quarantined, ArrivalEnd::NotKept];

fn hand_overs() -> impl Iterator<Item = Vec<Move<SaveState>>> {
    let plans = SaveState::plans().into_iter().filter(|plan| plan.after == AfterSave::HandOver);
    plans.flat_map(courses::<SaveState>)
}

fn arrivals() -> impl Iterator<Item = Vec<Move<RestoreState>>> {
    [true, false]
        .into_iter()
        .flat_map(|barrier| courses::<RestoreState>(RestorePlan { barrier, after: AfterLoad::Hold }))
}

#[test]
fn what_is_answered_and_decided() {
    let mut table = Table::new(&["ON RECORD", "COMMIT", "KEPT", "NOT KEPT", "ENDS AND VERDICTS"]);
    for step in STEPS {
        let ends: Vec<String> = ENDS.iter().map(|end| format!("{end:?} {}", step.verdict(*end))).collect();
        table.row([
            format!("{step:?}"),
            format!("{:?}", step.on_commit()),
            format!("{:?}", step.after_crash(true)),
            format!("{:?}", step.after_crash(false)),
            ends.join(", "),
        ]);
    }
    table.gap();
    check("handover_arrival", &table.render());
    let mut table = Table::new(&["EVIDENCE", "DECISION", "BARE", "STATED"]);
    for evidence in [Evidence::Nothing, Evidence::Undecided].into_iter().chain(VERDICTS.map(Evidence::Told)) {
        for resolution in [Resolution::ResumeHere, Resolution::LetGo] {
            let said = |stated| match resolve(evidence, resolution, stated) {
                Ok(event) => event.to_string(),
                Err(why) => format!("{why:?}"),
            };
            table.row([format!("{evidence:?}"), format!("{resolution:?}"), said(false), said(true)]);
        }
    }
    check("handover_resolve", &table.render());
}

#[test]
fn a_verdict_never_changes() {
    for verdict in VERDICTS {
        let over = ArrivalStep::Over(verdict);
        assert!(ENDS.iter().all(|end| over.verdict(*end) == verdict));
        assert_eq!(over.on_commit(), CommitAnswer::Told(verdict));
        for kept in [true, false] {
            assert_eq!(over.after_crash(kept), ArrivalTakeUp::Ended(verdict));
        }
        assert!(RestoreState::ALL.iter().all(|to| over.on_move(*to).is_none()));
    }
}

/// The device may leave RESUMING only with COMMITTING on record, and what is on record never claims less than may be.
#[test]
fn a_device_runs_only_once_that_is_on_record() {
    for course in arrivals() {
        let mut on_record = ArrivalStep::Loading;
        let mut told_to_run = false;
        for onward in &course {
            on_record = on_record.on_move(onward.to).unwrap_or(on_record);
            match onward.to {
                RestoreState::Quiescing | RestoreState::Resuming | RestoreState::PartlyRunning => {
                    told_to_run = true;
                    assert_eq!(on_record, ArrivalStep::Committing);
                }
                RestoreState::Held { .. } => assert_eq!(on_record, ArrivalStep::Prepared),
                RestoreState::Resetting => {
                    let expected = if told_to_run { ArrivalStep::Reverting } else { ArrivalStep::Loading };
                    assert_eq!(on_record, expected, "{course:?}", course = show(&course));
                }
                RestoreState::Completed => {
                    assert_eq!(on_record.verdict(ArrivalEnd::AllRunning), Verdict::Committed);
                }
                RestoreState::Quarantined if told_to_run => {
                    assert_eq!(on_record.verdict(ArrivalEnd::Quarantined), Verdict::Broken);
                }
                RestoreState::Admitted
                | RestoreState::Entering
                | RestoreState::Loading
                | RestoreState::Verifying
                | RestoreState::FixingUp
                | RestoreState::AwaitingReady
                | RestoreState::Unwinding
                | RestoreState::Aborted { .. }
                | RestoreState::Quarantined => {}
            }
        }
    }
}

fn show(course: &[Move<RestoreState>]) -> Vec<(String, String)> {
    course.iter().map(|onward| (onward.event.to_string(), onward.to.to_string())).collect()
}

/// Refused is said only of devices of which none was found in RUNNING with the state.
#[test]
fn nothing_is_refused_that_has_run() {
    for course in arrivals() {
        let ran = course.iter().any(|onward| onward.event == RestoreEvent::AnyRunning);
        let end = match course.last().map(|last| last.to) {
            Some(RestoreState::Completed) => ArrivalEnd::AllRunning,
            Some(RestoreState::Aborted { .. }) => ArrivalEnd::AllReset,
            Some(RestoreState::Quarantined) => ArrivalEnd::Quarantined,
            other => panic!("{other:?} is not an end"),
        };
        let on_record =
            course.iter().fold(ArrivalStep::Loading, |step, onward| step.on_move(onward.to).unwrap_or(step));
        assert!(!ran || on_record.verdict(end) != Verdict::Refused, "{:?}", show(&course));
    }
}

/// After Commit was sent, the source moves on its answer alone; before, it never lets go.
#[test]
fn the_source_moves_on_an_answer_alone() {
    for plan in SaveState::plans().into_iter().filter(|plan| plan.after == AfterSave::HandOver) {
        for event in SaveEvent::ALL {
            let moved = SaveState::Committing.on(plan, event).command();
            let expected = if event == SaveEvent::Committed {
                Some(SaveCommand::LetGo)
            } else if [SaveEvent::Refused, SaveEvent::Failed].contains(&event) {
                // To put it on record failed, so it was not sent.
                Some(SaveCommand::FallBack)
            } else {
                None
            };
            assert_eq!(moved, expected, "{event}");
        }
    }
    for course in hand_overs() {
        let mut on_record = OfferStep::Begun;
        for onward in &course {
            on_record = on_record.on_move(onward.to).unwrap_or(on_record);
            if onward.command == SaveCommand::Commit {
                assert_eq!(on_record, OfferStep::Committing);
            } else if onward.command == SaveCommand::LetGo {
                assert_eq!((on_record, onward.event), (OfferStep::LettingGo, SaveEvent::Committed));
            } else if onward.command == SaveCommand::FallBack {
                assert_eq!(on_record, OfferStep::Begun);
            }
        }
    }
}

/// A crash is no way round: only an offer whose Commit was not sent is undone, and only one that was answered let go of.
#[test]
fn an_offer_goes_on_as_its_record_says() {
    assert_eq!(OfferStep::Begun.after_crash(), OfferTakeUp::Undo);
    assert_eq!(OfferStep::Committing.after_crash(), OfferTakeUp::AskOn);
    assert_eq!(OfferStep::LettingGo.after_crash(), OfferTakeUp::LetGo);
}

/// A write that failed may be durable: what comes next is recorded over it.
#[test]
fn what_was_written_in_vain_is_written_over() {
    for plan in SaveState::plans().into_iter().filter(|plan| plan.after == AfterSave::HandOver) {
        let to = SaveState::Committing.on(plan, SaveEvent::Failed).state();
        assert_eq!(OfferStep::Committing.on_move(to), Some(OfferStep::Begun));
    }
    for barrier in [true, false] {
        let plan = RestorePlan { barrier, after: AfterLoad::Hold };
        for (state, step, over) in [
            (RestoreState::Held { ready: false }, ArrivalStep::Prepared, ArrivalStep::Loading),
            (RestoreState::Resuming, ArrivalStep::Committing, ArrivalStep::Reverting),
        ] {
            let to = state.on(plan, RestoreEvent::Failed).state();
            assert_eq!(step.on_move(to), Some(over), "{state}");
        }
    }
}

#[test]
fn nobody_resumes_on_silence_or_without_a_word() {
    for (evidence, expected) in [
        (Evidence::Nothing, Err(Unresolvable::MayRunThere)),
        (Evidence::Undecided, Err(Unresolvable::MayRunThere)),
        (Evidence::Told(Verdict::Broken), Err(Unresolvable::MayRunThere)),
        (Evidence::Told(Verdict::Committed), Err(Unresolvable::RunsThere)),
        (Evidence::Told(Verdict::Refused), Ok(SaveEvent::Refused)),
        (Evidence::Told(Verdict::Lost), Ok(SaveEvent::Refused)),
    ] {
        assert_eq!(resolve(evidence, Resolution::ResumeHere, false), expected);
    }
    let committed = Evidence::Told(Verdict::Committed);
    assert_eq!(resolve(committed, Resolution::ResumeHere, true), Err(Unresolvable::RunsThere));
    assert_eq!(Verdict::Lost.event(), None);
    assert_eq!(Verdict::Broken.event(), None);
}
