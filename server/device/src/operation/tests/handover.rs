//! Hand-overs: something at every place of one, a destination that takes the devices or does not, and what stands in
//! the way. What must hold at every place is asserted by [`watch`](super::watch); here is how they end.

mod devices;

use std::fmt::Write as _;
use std::time::Duration;

use vfio_checkpoint_fsm::{AfterSave, Capabilities, Cutover, Fate, Outcome, SavePlan, SaveState, State};

use super::answers::{HOLD_LIMIT, Saved, blank, node, restore, restore_terms, save, save_terms, small};
use super::crashes::{found, last_save};
use super::node::{Memory, Node};
use super::script::{DELAY, Script, Scripted, What};
use super::watch::Side;
use crate::Clock as _;
use crate::operation::{Cause, OperationError, OperationStep, RecordedSave, SaveTerms, Word, take_up_save};

const HOUR: Duration = Duration::from_hours(1);
/// When the caller says Commit where it takes its time.
const MANUAL: Duration = Duration::from_secs(1);

/// A kind of hand-over.
#[derive(Clone, Copy)]
struct Kind {
    name: &'static str,
    devices: u64,
    terms: SaveTerms,
    commit_at: Duration,
}

impl Kind {
    fn plan(&self) -> SavePlan {
        let capabilities = Capabilities { p2p: true, pre_copy: true };
        let devices = usize::try_from(self.devices).unwrap();
        SavePlan::for_devices(&vec![capabilities; devices], self.terms.request).unwrap()
    }

    fn script(&self, what: What, at: usize) -> Script {
        Script::new(what, at).cutover().commit_at(self.commit_at)
    }
}

fn kinds() -> Vec<Kind> {
    let mut kinds = Vec::new();
    for devices in [1, 2] {
        for (name, pre_copy, commit_at) in [
            ("stop-copy, AUTO", false, Duration::ZERO),
            ("pre-copy, AUTO", true, Duration::ZERO),
            ("stop-copy, MANUAL", false, MANUAL),
            ("pre-copy, MANUAL", true, MANUAL),
        ] {
            let terms = save_terms(pre_copy, Cutover::Auto, AfterSave::HandOver);
            kinds.push(Kind { name, devices, terms, commit_at });
        }
    }
    kinds
}

/// The source of a hand-over, watched.
pub(crate) struct Source {
    pub(crate) node: Node,
    pub(crate) carried: Vec<[u8; 32]>,
    /// What they would carry after a reset.
    pub(crate) blank: Vec<[u8; 32]>,
}

impl Source {
    pub(crate) fn new(script: &Script, node: Node, inclined: Side) -> Self {
        let (carried, blank) = script.watch.begin(&node, inclined);
        Self { node, carried, blank }
    }

    /// Another process finds it.
    pub(crate) fn found(self, script: &Script) -> Self {
        Self { node: found(script, self.node), ..self }
    }

    /// The devices run where they were, with what they had.
    #[track_caller]
    fn runs_here(&self) {
        self.is(State::Running, &self.carried, 0);
    }

    /// The devices are reset. Once more is as good.
    #[track_caller]
    fn is_blank(&self, resets: std::ops::RangeInclusive<u64>) {
        for slot in &self.node.slots {
            assert!(resets.contains(&slot.resets()), "{} resets", slot.resets());
        }
        assert_eq!(self.node.digests(), self.blank);
        assert!(self.node.slots.iter().all(|slot| slot.state() == State::Running));
    }

    #[track_caller]
    fn is(&self, state: State, digests: &[[u8; 32]], resets: u64) {
        for slot in &self.node.slots {
            assert_eq!((slot.state(), slot.resets(), slot.close_resets()), (state, resets, 0));
        }
        assert_eq!(self.node.digests(), digests);
    }
}

fn hand_over(script: &Script, kind: &Kind, inclined: Side) -> (Source, Saved, Scripted) {
    let source = Source::new(script, node(script, kind.devices, small), inclined);
    let (saved, sink) = save(script, &source.node, kind.terms);
    (source, saved, sink)
}

/// What another process makes of it.
pub(crate) fn take_up(
    script: &Script,
    source: &Source,
    plan: SavePlan,
    recorded: RecordedSave,
    memory: Memory,
) -> (Option<Result<SaveState, OperationError>>, Memory) {
    let mut sink = Scripted { script: script.clone(), memory, slots: Vec::new() };
    let end = script.poll(take_up_save(&source.node.lanes, plan, recorded, script, &mut sink));
    (end, sink.memory)
}

fn steps(script: &Script) -> Vec<SaveState> {
    let step = |step| match step {
        OperationStep::Save(state) => state,
        OperationStep::Restore(state) => panic!("{state} in a save"),
    };
    script.journal().into_iter().map(step).collect()
}

/// Undone, with nothing lost.
#[track_caller]
fn undone<T: std::fmt::Debug>(end: Result<T, OperationError>) -> Cause {
    match end.unwrap_err() {
        OperationError::Failed { cause, outcome, quarantined, checkpoint, .. } => {
            assert_eq!((outcome, quarantined.len(), checkpoint), (Outcome::Preserved, 0, None), "{cause}");
            cause
        }
        other @ (OperationError::Refused(_)
        | OperationError::NotReady { .. }
        | OperationError::Inconsistent { .. }) => panic!("{other}"),
    }
}

const UNWINDING: SaveState = SaveState::Unwinding { checkpoint: Fate::Unsealed };
const ABORTED: SaveState = SaveState::Aborted { checkpoint: None };

/// Runs at every place until there is no more; the runs are counted.
fn at_every_place(kind: &Kind, what: What, mut run: impl FnMut(Script) -> Script) -> usize {
    (0..10_000).find(|place| !run(kind.script(what, *place)).happened()).expect("fewer places")
}

#[test]
fn devices_are_let_go_once_the_destination_runs_and_run_here_once_it_refuses() {
    for kind in kinds() {
        let takes = Duration::from_mins(10);
        let script = kind.script(What::Nothing, 0);
        let source = Source::new(&script, node(&script, kind.devices, small), Side::There);
        script.watch.answers_after(Some(takes));
        let (saved, sink) = save(&script, &source.node, kind.terms);
        let report = saved.unwrap().unwrap();
        source.is_blank(1..=1);
        assert_eq!(script.watch.words(), [Word::Commit]);
        let end = [SaveState::Offered, SaveState::Committing, SaveState::LettingGo, SaveState::HandedOver];
        assert!(steps(&script).ends_with(&end), "{:?}", steps(&script));
        // No hold and no limit is between a decision and its answer; all of it is downtime.
        assert_eq!((report.downtime, report.unrecorded), (kind.commit_at + takes, None));
        assert!(sink.memory.sealed && !sink.memory.discarded);
        let there = node(&script, kind.devices, blank);
        restore(&Script::quiet(), &there, restore_terms(vfio_checkpoint_fsm::AfterLoad::Run), &sink.memory)
            .unwrap()
            .unwrap();
        assert_eq!(there.digests(), source.carried, "what went over is the state");

        let script = kind.script(What::Nothing, 0);
        let (source, saved, sink) = hand_over(&script, &kind, Side::Here);
        assert!(matches!(undone(saved.unwrap()), Cause::NotTaken(_)));
        source.runs_here();
        assert!(sink.memory.discarded);
        let end = [SaveState::Offered, SaveState::Committing, UNWINDING, ABORTED];
        assert!(steps(&script).ends_with(&end), "{:?}", steps(&script));
        let back: Vec<Vec<String>> = source
            .node
            .slots
            .iter()
            .map(|slot| slot.hops().iter().map(|hop| hop.arc.to_string()).collect())
            .collect();
        assert!(
            kind.devices == 1
                || back
                    .iter()
                    .all(|hops| hops
                        .ends_with(&["STOP -> RUNNING_P2P".into(), "RUNNING_P2P -> RUNNING".into()])),
            "{back:?}"
        );
    }
}

#[test]
fn silence_is_no_answer() {
    for (kind, inclined) in kinds().into_iter().zip([Side::There, Side::Here].into_iter().cycle()) {
        let script = kind.script(What::Nothing, 0);
        let source = Source::new(&script, node(&script, kind.devices, small), inclined);
        script.watch.stop_limit(DELAY);
        script.watch.answers_after(None);
        let terms = SaveTerms { stop_limit: Some(DELAY), ..kind.terms };
        let (saved, sink) = save(&script, &source.node, terms);
        assert!(saved.is_none(), "it waits for ever");
        source.is(State::Stop, &source.carried, 0);

        // It is asked again for as long as it takes, whoever asks.
        let again = Script::quiet().after(&script);
        let source = source.found(&again);
        let (end, memory) = take_up(&again, &source, kind.plan(), RecordedSave::Committing, sink.memory);
        assert!(end.is_none());
        source.is(State::Stop, &source.carried, 0);

        let again = Script::quiet().after(&script);
        let source = source.found(&again);
        again.watch.answers_after(Some(HOUR));
        let (end, _) = take_up(&again, &source, kind.plan(), RecordedSave::Committing, memory);
        match inclined {
            Side::There => {
                assert_eq!(end.unwrap().unwrap(), SaveState::HandedOver);
                source.is_blank(1..=1);
            }
            Side::Here => {
                assert!(matches!(undone(end.unwrap()), Cause::NotTaken(_)));
                source.runs_here();
            }
        }
        assert_eq!((again.watch.words(), again.now()), (vec![Word::Commit; 3], HOUR));
    }
}

#[test]
fn a_hand_over_can_be_cancelled_at_every_place_until_it_is_committed() {
    let mut told = String::new();
    for kind in kinds() {
        let (mut cancelled, mut late) = (0, 0);
        let places = at_every_place(&kind, What::Cancel, |script| {
            let (source, saved, sink) = hand_over(&script, &kind, Side::There);
            let steps = steps(&script);
            if *steps.last().unwrap() == ABORTED {
                let cause = undone(saved.unwrap());
                assert!(matches!(cause, Cause::Cancelled(_)), "{cause}");
                source.runs_here();
                assert!(sink.memory.discarded && script.watch.words().is_empty(), "{steps:?}");
                cancelled += 1;
            } else {
                saved.unwrap().unwrap();
                source.is_blank(1..=1);
                assert!(!sink.memory.discarded, "{steps:?}");
                let committing = steps.iter().position(|step| *step == SaveState::Committing).unwrap();
                // Where the move is being recorded the decision is made.
                assert!(!script.happened() || script.recorded_before() >= committing, "{steps:?}");
                late += usize::from(script.happened());
            }
            script
        });
        assert!(cancelled > 5 && late > 5);
        let Kind { name, devices, .. } = kind;
        writeln!(told, "{name}, {devices} device(s): {places} places, {cancelled} undone, {late} too late")
            .unwrap();
    }
    insta::assert_snapshot!("cancelled_hand_overs", told);
}

#[test]
fn a_move_that_cannot_be_recorded_undoes_a_hand_over_until_the_destination_may_run() {
    let mut told = String::new();
    for kind in kinds() {
        for inclined in [Side::There, Side::Here] {
            let mut ends = Vec::new();
            at_every_place(&kind, What::FailMove, |script| {
                let (source, saved, sink) = hand_over(&script, &kind, inclined);
                let end = match saved.unwrap() {
                    Ok(report) => {
                        assert_eq!(report.unrecorded.is_some(), script.happened());
                        source.is_blank(1..=1);
                        "handed over"
                    }
                    Err(error) => {
                        let cause = undone::<()>(Err(error));
                        source.runs_here();
                        assert!(sink.memory.discarded);
                        match (cause, script.watch.verdict()) {
                            (Cause::NotTaken(_), Some(Side::Here)) => "not taken",
                            (Cause::Unrecorded(_), None) => "undone",
                            (cause, verdict) => panic!("{verdict:?}: {cause}"),
                        }
                    }
                };
                let last = script.recorded_before().checked_sub(1);
                let last = last.map_or("nothing", |last| steps(&script)[last].name());
                ends.push(format!("{last}: {end}"));
                script
            });
            let Kind { name, devices, .. } = kind;
            writeln!(told, "{name}, {devices} device(s), {inclined:?}: {}", ends.join("; ")).unwrap();
        }
    }
    insta::assert_snapshot!("unrecorded_hand_overs", told);
}

#[test]
fn a_hand_over_is_taken_up_wherever_its_process_died() {
    let mut told = String::new();
    for kind in kinds() {
        for inclined in [Side::There, Side::Here] {
            let mut ends = Vec::new();
            at_every_place(&kind, What::Crash, |script| {
                let (source, saved, sink) = hand_over(&script, &kind, inclined);
                assert_eq!(saved.is_none(), script.happened());
                let last = last_save(&script);
                let again = Script::quiet().after(&script);
                let source = source.found(&again);
                let end = match RecordedSave::from_last(last, HOLD_LIMIT) {
                    None => "nothing to do".to_owned(),
                    Some(recorded) => {
                        let before = script.watch.words().len();
                        let (end, memory) = take_up(&again, &source, kind.plan(), recorded, sink.memory);
                        let asked = usize::from(last == SaveState::Committing);
                        assert_eq!(script.watch.words().len() - before, asked, "asked again, and only there");
                        match end.unwrap() {
                            Ok(end) => end.to_string(),
                            Err(error) => {
                                undone::<()>(Err(error));
                                assert!(memory.discarded);
                                "undone".to_owned()
                            }
                        }
                    }
                };
                assert!(script.watch.words().iter().all(|word| *word == Word::Commit));
                match script.watch.verdict() {
                    // An earlier life may have reset some.
                    Some(Side::There) => source.is_blank(1..=2),
                    Some(Side::Here) | None => source.runs_here(),
                }
                ends.push(format!("{last}: {end}"));
                script
            });
            ends.dedup();
            let Kind { name, devices, .. } = kind;
            writeln!(told, "{name}, {devices} device(s), {inclined:?}: {}", ends.join("; ")).unwrap();
        }
    }
    insta::assert_snapshot!("crashed_hand_overs", told);
}

/// The same once more: whoever takes it up dies too, or cannot record a move, or is told to cancel.
#[test]
fn a_hand_over_that_was_taken_up_is_as_safe() {
    let recorded = [RecordedSave::Committing, RecordedSave::LettingGo];
    let both = |side| recorded.map(|recorded| (side, recorded));
    let mut taken = 0;
    for kind in kinds().into_iter().filter(|kind| kind.commit_at.is_zero()) {
        for (inclined, recorded) in both(Side::There).into_iter().chain([(Side::Here, recorded[0])]) {
            let died_at = |place| {
                let first = kind.script(What::Crash, place);
                let (source, _, sink) = hand_over(&first, &kind, inclined);
                (first, source, sink.memory)
            };
            let is_there = |place: &usize| {
                RecordedSave::from_last(last_save(&died_at(*place).0), HOLD_LIMIT) == Some(recorded)
            };
            let place = (0..100).find(is_there).unwrap();
            for what in [What::Crash, What::FailMove, What::Cancel] {
                at_every_place(&kind, what, |script| {
                    let (first, source, memory) = died_at(place);
                    let script = script.after(&first);
                    let source = source.found(&script);
                    let (end, memory) = take_up(&script, &source, kind.plan(), recorded, memory);
                    let source = if let Some(end) = end {
                        assert_eq!(end.is_ok(), inclined == Side::There, "{what:?}: {end:?}");
                        source
                    } else {
                        let left = if script.journal().is_empty() {
                            Some(recorded)
                        } else {
                            RecordedSave::from_last(last_save(&script), HOLD_LIMIT)
                        };
                        let third = Script::quiet().after(&script);
                        let source = source.found(&third);
                        if let Some(left) = left {
                            let _ = take_up(&third, &source, kind.plan(), left, memory).0.unwrap();
                        }
                        source
                    };
                    match inclined {
                        Side::There => source.is_blank(1..=3),
                        Side::Here => source.runs_here(),
                    }
                    assert!(script.watch.words().iter().all(|word| *word == Word::Commit));
                    taken += 1;
                    script
                });
            }
        }
    }
    assert!(taken > 100, "{taken}");
}

#[test]
fn an_offer_that_nobody_commits_is_withdrawn() {
    for kind in kinds() {
        let never = Kind { commit_at: HOUR, ..kind };
        let script = never.script(What::Nothing, 0);
        let (source, saved, sink) = hand_over(&script, &never, Side::There);
        assert!(matches!(undone(saved.unwrap()), Cause::NoCommit { limit: HOLD_LIMIT }));
        source.runs_here();
        assert!(sink.memory.discarded && script.watch.words().is_empty());
        assert!(steps(&script).ends_with(&[SaveState::Offered, UNWINDING, ABORTED]));
        assert_eq!(script.now(), HOLD_LIMIT);

        // What may be stopped for less is withdrawn earlier.
        let stop_limit = Some(DELAY);
        let shorter = Kind { terms: SaveTerms { stop_limit, ..kind.terms }, ..never };
        let script = never.script(What::Nothing, 0);
        let (source, saved, _) = hand_over(&script, &shorter, Side::There);
        assert!(matches!(undone(saved.unwrap()), Cause::StopLimit { limit: DELAY }));
        source.runs_here();
        assert_eq!((script.now(), script.watch.words().len()), (DELAY, 0));

        // Where somebody says it, the wait is theirs.
        let theirs = SaveTerms { stop_limit, limits_commit: false, ..kind.terms };
        let script = never.script(What::Nothing, 0);
        let (source, saved, _) = hand_over(&script, &Kind { terms: theirs, ..never }, Side::There);
        assert!(matches!(undone(saved.unwrap()), Cause::NoCommit { limit: HOLD_LIMIT }));
        source.runs_here();
    }
}

#[test]
fn devices_are_not_stopped_for_longer_than_they_may_be_unless_they_may_run_elsewhere() {
    let limit = Duration::from_secs(5);
    let mut told = String::new();
    for kind in kinds() {
        let mut late: Vec<&str> = Vec::new();
        let mut places = [0, 0];
        at_every_place(&kind, What::Delay, |script| {
            let source = Source::new(&script, node(&script, kind.devices, small), Side::There);
            script.watch.stop_limit(limit);
            // Commit is said relative to the start, and a delay before it counts.
            let terms = SaveTerms { stop_limit: Some(limit), ..kind.terms };
            let (saved, sink) = save(&script, &source.node, terms);
            let steps = steps(&script);
            if let Err(error) = saved.unwrap() {
                let cause = undone::<()>(Err(error));
                assert!(matches!(cause, Cause::StopLimit { .. }), "{cause}");
                source.runs_here();
                assert!(sink.memory.discarded && script.watch.words().is_empty());
                late.push(steps[script.recorded_before() - 1].name());
                places[0] += 1;
            } else {
                source.is_blank(1..=1);
                places[1] += usize::from(script.happened());
            }
            script
        });
        late.dedup();
        let Kind { name, devices, .. } = kind;
        let [undone, done] = places;
        writeln!(
            told,
            "{name}, {devices} device(s): {done} delays do no harm, {undone} undo it, after {}",
            late.join(", ")
        )
        .unwrap();
    }
    insta::assert_snapshot!("delayed_hand_overs", told);
}
