//! What an operation does when its caller cuts over, holds, cancels or cannot record a move: at every place of it.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use vfio_checkpoint_fsm::{
    AfterLoad, AfterSave, Cutover, Outcome, RestoreEvent, RestorePlan, RestoreState, SaveEvent, SavePlan,
    SaveRequest, SaveState, State, Step, Validity,
};

use super::node::{Memory, Node, READY_LIMIT, RESUME, configs};
use super::script::{Script, Scripted, What};
use crate::Clock as _;
use crate::operation::{
    self, Cause, OperationError, OperationStep, PrecopyPolicy, RestoreReport, RestoreTerms, SaveReport,
    SaveTerms,
};
use crate::sim::{SimConfig, SimDevice};

pub(crate) const HOLD_LIMIT: Duration = Duration::from_secs(30);
pub(crate) const CUTOVER_LIMIT: Duration = Duration::from_mins(1);

pub(crate) fn save_terms(pre_copy: bool, cutover: Cutover, after: AfterSave) -> SaveTerms {
    SaveTerms {
        request: SaveRequest { pre_copy, cutover, after },
        policy: PrecopyPolicy::default(),
        cutover_limit: CUTOVER_LIMIT,
        hold_limit: HOLD_LIMIT,
        stop_limit: None,
        limits_commit: true,
    }
}

pub(crate) fn restore_terms(after: AfterLoad) -> RestoreTerms {
    RestoreTerms { after, hold_limit: HOLD_LIMIT, ready_limit: READY_LIMIT }
}

/// A node whose lanes belong to the script. Nothing has been counted yet.
pub(crate) fn node(script: &Script, devices: u64, change: impl Fn(&mut SimConfig)) -> Node {
    let executor = Arc::new(script.clone());
    Node::on(executor, script.inline.time(), &configs(devices, change), &[])
}

pub(crate) fn small(config: &mut SimConfig) {
    config.memory_bytes = 100_000;
}

pub(crate) fn blank(config: &mut SimConfig) {
    small(config);
    config.seed += 100;
}

pub(crate) type Saved = Option<Result<SaveReport, OperationError>>;

pub(crate) fn save(script: &Script, node: &Node, terms: SaveTerms) -> (Saved, Scripted) {
    let memory = Memory::new(node.lanes.len());
    let mut sink = Scripted { script: script.clone(), memory, slots: node.slots.clone() };
    let saved = script.poll(operation::save(&node.lanes, terms, script, &mut sink));
    (saved, sink)
}

pub(crate) type Restored = Option<Result<RestoreReport, OperationError>>;

pub(crate) fn restore(script: &Script, node: &Node, terms: RestoreTerms, state: &Memory) -> Restored {
    let mut source = Scripted { script: script.clone(), memory: state.again(), slots: Vec::new() };
    script.poll(operation::restore(&node.lanes, terms, script, &mut source))
}

/// A saved state, and the digests that it restores to.
pub(crate) fn saved_state(devices: u64) -> (Memory, Vec<[u8; 32]>) {
    let script = Script::quiet();
    let source = node(&script, devices, small);
    let terms = save_terms(true, Cutover::Auto, AfterSave::Resume);
    let (saved, sink) = save(&script, &source, terms);
    saved.unwrap().unwrap();
    (sink.memory, source.digests())
}

pub(crate) fn running(node: &Node) -> bool {
    node.slots.iter().all(|slot| slot.state() == State::Running)
}

fn save_steps(script: &Script) -> Vec<SaveState> {
    let step = |step: OperationStep| match step {
        OperationStep::Save(state) => state,
        OperationStep::Restore(state) => panic!("{state} in a save"),
    };
    script.journal().into_iter().map(step).collect()
}

#[track_caller]
fn cause(end: Option<Result<SaveReport, OperationError>>) -> (Cause, Outcome) {
    match end.unwrap().unwrap_err() {
        OperationError::Failed { cause, outcome, quarantined, checkpoint, .. } => {
            assert_eq!((quarantined.len(), checkpoint), (0, None));
            (cause, outcome)
        }
        other @ (OperationError::Refused(_)
        | OperationError::NotReady { .. }
        | OperationError::Inconsistent { .. }) => panic!("{other}"),
    }
}

#[test]
fn operations_may_be_given_to_any_runtime() {
    fn sendable<T: Send>(future: T) {
        drop(future);
    }
    let script = Script::quiet();
    let node = node(&script, 1, small);
    let (mut sink, mut source) = (Memory::new(1), Memory::new(1));
    let terms = save_terms(true, Cutover::Auto, AfterSave::Resume);
    sendable(operation::save(&node.lanes, terms, &script, &mut sink));
    sendable(operation::restore(&node.lanes, restore_terms(AfterLoad::Run), &script, &mut source));
    let plan = SavePlan { pre_copy: false, barrier: false, cutover: Cutover::Auto, after: AfterSave::Resume };
    let recorded = operation::RecordedSave::Unsealed;
    sendable(operation::take_up_save(&node.lanes, plan, recorded, &script, &mut sink));
    let plan = RestorePlan { barrier: false, after: AfterLoad::Run };
    let recorded = operation::RecordedRestore::Unloaded;
    sendable(operation::take_up_restore(&node.lanes, plan, recorded, READY_LIMIT, &script, &mut source));
}

#[test]
fn a_manual_cutover_is_the_callers_alone() {
    let busy = |config: &mut SimConfig| config.workload.dirty_bytes_per_second = 100_000;
    for pre_copy in [false, true] {
        let script = Script::quiet().cutover_after(40);
        let script = if pre_copy { script } else { script.cutover() };
        let source = node(&script, 2, busy);
        let (saved, _) = save(&script, &source, save_terms(pre_copy, Cutover::Manual, AfterSave::Resume));
        let report = saved.unwrap().unwrap();
        assert!(running(&source));
        let waited = if pre_copy { SaveState::PreCopying } else { SaveState::AwaitingCutover };
        assert_eq!(save_steps(&script)[..2], [waited, SaveState::Quiescing]);
        // The idle rounds went on past what would have been an automatic cutover, and copied what changed meanwhile.
        assert_eq!(report.precopy_bytes > 2 * 300_000, pre_copy, "{report:?}");
        assert!(script.reports().0 >= if pre_copy { 40 } else { 2 });
    }
}

#[test]
fn without_a_cutover_in_time_the_save_fails_and_the_devices_run_on() {
    for pre_copy in [false, true] {
        let script = Script::quiet();
        let source = node(&script, 2, small);
        let before = source.digests();
        let (saved, sink) = save(&script, &source, save_terms(pre_copy, Cutover::Manual, AfterSave::Resume));
        let (cause, outcome) = cause(saved);
        assert!(matches!(cause, Cause::NoCutover { limit: CUTOVER_LIMIT }), "{cause}");
        assert_eq!((outcome, script.inline.now()), (Outcome::Preserved, CUTOVER_LIMIT));
        assert!(running(&source) && source.digests() == before && sink.memory.discarded);
        assert!(source.slots.iter().all(|slot| slot.hops().iter().all(|hop| hop.arc.to() != State::Stop)));
    }
}

#[test]
fn a_held_save_resumes_on_the_callers_word_or_is_marked_before_anything_runs() {
    for devices in [1, 2] {
        let script = Script::quiet().resume();
        let source = node(&script, devices, small);
        let terms = save_terms(false, Cutover::Auto, AfterSave::Hold);
        let (saved, sink) = save(&script, &source, terms);
        saved.unwrap().unwrap();
        assert!(running(&source) && sink.memory.sealed && !sink.memory.inconsistent);

        let script = Script::quiet();
        let source = node(&script, devices, small);
        let before = source.digests();
        let (saved, sink) = save(&script, &source, terms);
        let Some(Err(OperationError::Inconsistent { report: Some(report) })) = saved else {
            panic!("{saved:?}")
        };
        assert_eq!(report.downtime, HOLD_LIMIT);
        assert!(running(&source) && source.digests() == before);
        assert!(sink.memory.sealed && sink.memory.inconsistent && !sink.memory.discarded);
        let resuming = SaveState::Resuming { checkpoint: Validity::Inconsistent };
        let end = [SaveState::Held, SaveState::Marking, resuming, SaveState::Inconsistent];
        assert!(save_steps(&script).ends_with(&end));
    }
}

#[test]
fn a_held_restore_runs_on_the_callers_word_or_is_reset() {
    for devices in [1, 2] {
        let (state, wanted) = saved_state(devices);
        let script = Script::quiet().resume();
        let target = node(&script, devices, blank);
        restore(&script, &target, restore_terms(AfterLoad::Hold), &state).unwrap().unwrap();
        assert!(running(&target) && target.digests() == wanted);

        let script = Script::quiet();
        let target = node(&script, devices, blank);
        let before = target.digests();
        let held = restore(&script, &target, restore_terms(AfterLoad::Hold), &state).unwrap().unwrap_err();
        let OperationError::Failed { cause: Cause::HoldExpired { limit: HOLD_LIMIT }, outcome, .. } = held
        else {
            panic!("{held}")
        };
        assert_eq!((outcome, target.digests()), (Outcome::StateLost, before));
        assert!(running(&target) && target.slots.iter().all(|slot| slot.resets() == 1));
    }
}

/// Every kind of save and of restore that has a way of its own.
pub(crate) fn kinds_of_save() -> Vec<(&'static str, u64, SaveTerms)> {
    let mut kinds = Vec::new();
    for devices in [1, 2] {
        kinds.push(("stop-copy", devices, save_terms(false, Cutover::Auto, AfterSave::Resume)));
        kinds.push(("pre-copy", devices, save_terms(true, Cutover::Auto, AfterSave::Resume)));
        kinds.push(("held", devices, save_terms(false, Cutover::Manual, AfterSave::Hold)));
        kinds.push(("left stopped", devices, save_terms(false, Cutover::Auto, AfterSave::StayStopped)));
    }
    kinds
}

/// Runs at every place until there is no more; the runs are counted.
pub(crate) fn at_every_place(what: What, mut run: impl FnMut(Script) -> Script) -> usize {
    for place in 0..10_000 {
        let script = run(Script::new(what, place).cutover().resume());
        if !script.happened() {
            return place;
        }
    }
    panic!("an operation has fewer places")
}

#[test]
fn a_save_can_be_cancelled_at_every_place() {
    let mut told = String::new();
    for (kind, devices, terms) in kinds_of_save() {
        let (mut undone, mut done) = (0, 0);
        let places = at_every_place(What::Cancel, |script| {
            let source = node(&script, devices, small);
            let before = source.digests();
            let (saved, sink) = save(&script, &source, terms);
            let steps = save_steps(&script);
            let end = *steps.last().unwrap();
            assert!(source.digests() == before && source.slots.iter().all(|slot| slot.resets() == 0));
            if end == (SaveState::Aborted { checkpoint: None }) {
                let (cause, outcome) = cause(saved);
                assert!(matches!(cause, Cause::Cancelled(_)), "{cause}");
                assert_eq!(outcome, Outcome::Preserved);
                assert!(running(&source) && sink.memory.discarded, "{steps:?}");
                // Nothing more was begun: at most the move was recorded that was being told.
                let more = steps.len() - script.recorded_before();
                assert!((1..=3).contains(&more), "{more} of {steps:?}");
                undone += 1;
            } else {
                saved.unwrap().unwrap();
                assert!(sink.memory.sealed && !sink.memory.discarded, "{steps:?}");
                // The machine agrees that it was too late, or all was over.
                let seen = steps.get(script.recorded_before()).unwrap_or(&end);
                let late = seen.on(plan_of(terms), SaveEvent::Cancel);
                let too_late = matches!(late, Step::Illegal { .. } | Step::NoOp(_));
                assert!(too_late || !script.happened(), "{seen} of {steps:?}");
                let stopped = terms.request.after == AfterSave::StayStopped;
                let expected = if stopped { SaveState::CompletedStopped } else { SaveState::Completed };
                assert_eq!(end, expected);
                assert!(
                    source
                        .slots
                        .iter()
                        .all(|slot| slot.state() == if stopped { State::Stop } else { State::Running })
                );
                done += 1;
            }
            script
        });
        assert!(undone > 5 && done > 1, "{kind}");
        writeln!(
            told,
            "{kind}, {devices} device(s): {places} places, {undone} undone, {} too late",
            done - 1
        )
        .unwrap();
    }
    insta::assert_snapshot!("cancelled_saves", told);
}

fn plan_of(terms: SaveTerms) -> SavePlan {
    let SaveRequest { pre_copy, cutover, after } = terms.request;
    SavePlan { pre_copy, barrier: true, cutover, after }
}

#[test]
fn a_restore_can_be_cancelled_at_every_place() {
    let mut told = String::new();
    for devices in [1, 2] {
        let (state, wanted) = saved_state(devices);
        for after in [AfterLoad::Run, AfterLoad::Hold] {
            let (mut untouched, mut undone, mut done) = (0, 0, 0);
            let places = at_every_place(What::Cancel, |script| {
                let target = node(&script, devices, blank);
                let before = target.digests();
                let end = restore(&script, &target, restore_terms(after), &state).unwrap();
                let Some(OperationStep::Restore(last)) = script.journal().last().copied() else { panic!() };
                assert!(running(&target));
                let resets: u64 = target.slots.iter().map(SimDevice::resets).sum();
                match last {
                    RestoreState::Completed => {
                        assert_eq!((end.unwrap().seals.len(), resets), (wanted.len(), 0));
                        assert_eq!(target.digests(), wanted);
                        done += 1;
                    }
                    RestoreState::Aborted { outcome } => {
                        let error = end.unwrap_err();
                        assert!(error.is_cancelled(), "{error}");
                        assert_eq!((resets > 0, target.digests()), (outcome == Outcome::StateLost, before));
                        *(if resets > 0 { &mut undone } else { &mut untouched }) += 1;
                    }
                    other @ (RestoreState::Admitted
                    | RestoreState::Entering
                    | RestoreState::Loading
                    | RestoreState::Verifying
                    | RestoreState::FixingUp
                    | RestoreState::Held { .. }
                    | RestoreState::AwaitingReady
                    | RestoreState::Quiescing
                    | RestoreState::Resuming
                    | RestoreState::PartlyRunning
                    | RestoreState::Unwinding
                    | RestoreState::Resetting
                    | RestoreState::Quarantined) => panic!("{other}"),
                }
                script
            });
            assert!(untouched > 0 && undone > 5 && done > 1);
            writeln!(
                told,
                "{after}, {devices} device(s): {places} places, {untouched} untouched, {undone} undone, {} too late",
                done - 1
            )
            .unwrap();
        }
    }
    let late = RestoreState::Quiescing
        .on(RestorePlan { barrier: true, after: AfterLoad::Run }, RestoreEvent::Cancel);
    assert!(matches!(late, Step::Illegal { .. }));
    insta::assert_snapshot!("cancelled_restores", told);
}

#[test]
fn a_move_that_cannot_be_recorded_fails_the_operation_until_there_is_no_way_back() {
    let mut told = String::new();
    for (kind, devices, terms) in kinds_of_save() {
        at_every_place(What::FailMove, |script| {
            let source = node(&script, devices, small);
            let before = source.digests();
            let (saved, sink) = save(&script, &source, terms);
            assert_eq!(source.digests(), before);
            let end = match saved.unwrap() {
                Ok(report) => {
                    assert_eq!(report.unrecorded.is_some(), script.happened());
                    assert!(sink.memory.sealed && !sink.memory.discarded);
                    "done"
                }
                Err(OperationError::Failed { cause: Cause::Unrecorded(_), outcome, .. }) => {
                    assert!(running(&source) && sink.memory.discarded && outcome == Outcome::Preserved);
                    "undone"
                }
                Err(other) => panic!("{other}"),
            };
            let steps: Vec<&str> = script.journal().into_iter().map(name).collect();
            writeln!(told, "save, {kind}, {devices}: {}: {end}", steps.join(", ")).unwrap();
            script
        });
    }
    for devices in [1, 2] {
        let (state, wanted) = saved_state(devices);
        at_every_place(What::FailMove, |script| {
            let target = node(&script, devices, blank);
            let before = target.digests();
            let end = match restore(&script, &target, restore_terms(AfterLoad::Hold), &state).unwrap() {
                Ok(report) => {
                    assert_eq!(report.unrecorded.is_some(), script.happened());
                    assert_eq!(target.digests(), wanted);
                    "done"
                }
                Err(OperationError::Failed { cause: Cause::Unrecorded(_), .. }) => {
                    assert_eq!(target.digests(), before);
                    "undone"
                }
                Err(other) => panic!("{other}"),
            };
            assert!(running(&target));
            let steps: Vec<&str> = script.journal().into_iter().map(name).collect();
            writeln!(told, "restore, {devices}: {}: {end}", steps.join(", ")).unwrap();
            script
        });
    }
    insta::assert_snapshot!("unrecorded_moves", told);
}

fn name(step: OperationStep) -> &'static str {
    match step {
        OperationStep::Save(state) => state.name(),
        OperationStep::Restore(state) => state.name(),
    }
}

#[test]
fn an_operation_cancelled_before_it_began_touches_nothing() {
    let script = Script::new(What::Cancel, 0);
    let source = node(&script, 1, small);
    // The first place is the question whether the device is ready; it answers once the cancel has been said.
    let (saved, sink) =
        save(&script, &source, SaveTerms::automatic(true, RESUME.after, PrecopyPolicy::default()));
    assert!(saved.unwrap().unwrap_err().is_cancelled());
    assert_eq!(save_steps(&script), [SaveState::Aborted { checkpoint: None }]);
    assert!(source.slots[0].hops().is_empty() && sink.memory.blobs[0].is_empty());
}
