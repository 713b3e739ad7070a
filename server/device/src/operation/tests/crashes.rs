//! The process dies at every place of an operation, and another one takes up what was recorded.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use vfio_checkpoint_fsm::{
    AfterLoad, AfterSave, Capabilities, Outcome, RestorePlan, RestoreState, SavePlan, SaveState, State,
};

use super::answers::{
    HOLD_LIMIT, at_every_place, blank, kinds_of_save, node, restore, restore_terms, running, save,
    saved_state, small,
};
use super::node::{Memory, Node, READY_LIMIT, configs};
use super::script::{Script, Scripted, What};
use crate::fault::Fault;
use crate::lane::DEFAULT_CALL_LIMIT;
use crate::operation::{
    LoadedBefore, OperationError, OperationStep, RecordedRestore, RecordedSave, take_up_restore, take_up_save,
};
use crate::{DeviceLane, Driver, VerifiedSeal};

const CAPABILITIES: Capabilities = Capabilities { p2p: true, pre_copy: true };

/// What another process makes of a node that it finds: fresh drivers on the handles that somebody kept open.
pub(crate) fn found(script: &Script, mut node: Node) -> Node {
    // With the lanes go their drivers and their handles.
    node.lanes = node
        .others
        .iter()
        .map(|kept| {
            let driver = Driver::new(Box::new(kept.duplicate()));
            DeviceLane::new(driver, Arc::new(script.clone()), DEFAULT_CALL_LIMIT).unwrap()
        })
        .collect();
    node
}

pub(crate) fn last_save(script: &Script) -> SaveState {
    match script.journal().last() {
        Some(OperationStep::Save(state)) => *state,
        Some(OperationStep::Restore(_)) => panic!("a restore"),
        None => SaveState::Admitted,
    }
}

pub(crate) fn last_restore(script: &Script) -> RestoreState {
    match script.journal().last() {
        Some(OperationStep::Restore(state)) => *state,
        Some(OperationStep::Save(_)) => panic!("a save"),
        None => RestoreState::Admitted,
    }
}

#[test]
fn a_save_is_taken_up_wherever_its_process_died() {
    let mut told = String::new();
    for (kind, devices, terms) in kinds_of_save() {
        for resume in [true, false] {
            let mut ends = Vec::new();
            at_every_place(What::Crash, |script| {
                let source = node(&script, devices, small);
                let before = source.digests();
                let (saved, sink) = save(&script, &source, terms);
                assert_eq!(saved.is_none(), script.happened());
                let last = last_save(&script);
                let after = if resume { Script::quiet().resume() } else { Script::quiet() };
                let source = found(&after, source);
                let memory = sink.memory;
                let mut sink = Scripted { script: after.clone(), memory, slots: source.slots.clone() };

                let plan =
                    SavePlan::for_devices(&vec![CAPABILITIES; source.lanes.len()], terms.request).unwrap();
                let end = match RecordedSave::from_last(last, HOLD_LIMIT) {
                    None => "nothing to do".to_owned(),
                    Some(recorded) => {
                        let taken_up = take_up_save(&source.lanes, plan, recorded, &after, &mut sink);
                        match after.poll(taken_up).unwrap() {
                            Ok(end) => end.to_string(),
                            Err(OperationError::Inconsistent { report: None }) => "inconsistent".to_owned(),
                            Err(OperationError::Failed {
                                outcome, quarantined, checkpoint, cause, ..
                            }) => {
                                assert_eq!((quarantined.len(), checkpoint), (0, None), "{cause}");
                                assert_eq!(outcome, Outcome::Preserved);
                                "undone".to_owned()
                            }
                            Err(other) => panic!("{other}"),
                        }
                    }
                };
                assert!(source.digests() == before && source.slots.iter().all(|slot| slot.resets() == 0));
                let stopped = last == SaveState::CompletedStopped;
                let expected = if stopped { State::Stop } else { State::Running };
                assert!(source.slots.iter().all(|slot| slot.state() == expected), "{last}: {end}");
                let memory = &sink.memory;
                assert_eq!(memory.inconsistent, end == "inconsistent", "{last}: {end}");
                // What is called a checkpoint is sealed, and what is not is discarded.
                assert!(memory.discarded != (end != "undone"), "{last}: {end}");
                assert!(memory.sealed || end == "undone", "{last}: {end}");
                ends.push(format!("{last}: {end}"));
                script
            });
            ends.dedup();
            writeln!(told, "{kind}, {devices} device(s), resume {resume}: {}", ends.join("; ")).unwrap();
        }
    }
    insta::assert_snapshot!("crashed_saves", told);
}

pub(crate) fn loaded(state: &Memory, devices: u64) -> Vec<LoadedBefore> {
    (0..devices)
        .map(|index| {
            let seal = VerifiedSeal::journaled(state.seal_of(usize::try_from(index).unwrap()));
            LoadedBefore { seal, rearm: None }
        })
        .collect()
}

#[test]
fn a_restore_is_taken_up_wherever_its_process_died() {
    let mut told = String::new();
    for devices in [1, 2] {
        let (state, wanted) = saved_state(devices);
        for (after, resume) in [(AfterLoad::Run, false), (AfterLoad::Hold, true), (AfterLoad::Hold, false)] {
            let mut ends = Vec::new();
            at_every_place(What::Crash, |script| {
                let target = node(&script, devices, blank);
                let before = target.digests();
                let restored = restore(&script, &target, restore_terms(after), &state);
                assert_eq!(restored.is_none(), script.happened());
                let last = last_restore(&script);
                let again = if resume { Script::quiet().resume() } else { Script::quiet() };
                let target = found(&again, target);
                let plan = RestorePlan::for_devices(&vec![CAPABILITIES; target.lanes.len()], after).unwrap();
                let mut owner = Memory::new(0);
                let end = match RecordedRestore::from_last(last, HOLD_LIMIT, loaded(&state, devices)) {
                    None => "nothing to do".to_owned(),
                    Some(recorded) => {
                        let taken_up =
                            take_up_restore(&target.lanes, plan, recorded, READY_LIMIT, &again, &mut owner);
                        match again.poll(taken_up).unwrap() {
                            Ok(report) => {
                                assert_eq!(report.seals.len(), wanted.len());
                                assert_eq!(target.digests(), wanted, "{last}: success means the state");
                                "done".to_owned()
                            }
                            Err(OperationError::Failed { quarantined, outcome, .. }) => {
                                assert_eq!((quarantined.len(), outcome), (0, Outcome::StateLost));
                                assert_eq!(target.digests(), before, "{last}: nothing of it may run");
                                "reset".to_owned()
                            }
                            Err(other) => panic!("{other}"),
                        }
                    }
                };
                assert!(running(&target), "{last}: {end}");
                if end == "nothing to do" {
                    let kept = if last == RestoreState::Completed { &wanted } else { &before };
                    assert_eq!(&target.digests(), kept, "{last}");
                }
                ends.push(format!("{last}: {end}"));
                script
            });
            ends.dedup();
            writeln!(told, "{after}, {devices} device(s), resume {resume}: {}", ends.join("; ")).unwrap();
        }
    }
    insta::assert_snapshot!("crashed_restores", told);
}

/// A journal that the devices do not bear out is not believed.
#[test]
fn a_device_that_is_not_where_the_journal_says_is_quarantined_or_reset() {
    let script = Script::quiet();
    let source = found(&script, node(&script, 2, small));
    let plan = SavePlan {
        pre_copy: false,
        barrier: true,
        cutover: vfio_checkpoint_fsm::Cutover::Auto,
        after: AfterSave::Hold,
    };
    let held = RecordedSave::Held { remaining: Duration::from_secs(1) };
    let mut sink = Memory::new(2);
    let end = script.poll(take_up_save(&source.lanes, plan, held, &script, &mut sink)).unwrap().unwrap_err();
    let OperationError::Failed { outcome, quarantined, checkpoint, .. } = end else { panic!("{end}") };
    assert_eq!((outcome, quarantined.len()), (Outcome::StateLost, 2));
    assert!(checkpoint.is_some() && !sink.discarded, "it may be the only copy");

    let (state, _) = saved_state(2);
    let target = found(&script, node(&script, 2, blank));
    let before = target.digests();
    let plan = RestorePlan { barrier: true, after: AfterLoad::Hold };
    let held = RecordedRestore::Held { remaining: Duration::from_secs(1), devices: loaded(&state, 2) };
    let mut owner = Memory::new(0);
    let taken_up = take_up_restore(&target.lanes, plan, held, READY_LIMIT, &script, &mut owner);
    let end = script.poll(taken_up).unwrap().unwrap_err();
    let OperationError::Failed { outcome, quarantined, .. } = end else { panic!("{end}") };
    assert_eq!((outcome, quarantined.len(), target.digests()), (Outcome::StateLost, 0, before));
    assert!(running(&target) && target.slots.iter().all(|slot| slot.resets() == 1));
}

/// A device that did not start is reset, and a reset leads to RUNNING too. Whenever the process dies around that, the
/// blank device is never taken for a restored one.
#[test]
fn a_device_that_was_reset_is_not_taken_for_one_that_started() {
    let (mut done, mut reset) = (0, 0);
    for (devices, target, at) in
        [(1, State::Running, 0), (2, State::RunningP2p, 0), (2, State::RunningP2p, 1), (2, State::Running, 0)]
    {
        let (state, wanted) = saved_state(devices);
        let fault = [Fault::Set { target, landing: State::Resuming, errno: libc::EIO }];
        let faults: &[&[Fault]] = if at == 0 { &[&fault] } else { &[&[], &fault] };
        at_every_place(What::Crash, |script| {
            let executor = Arc::new(script.clone());
            let node = Node::on(executor, script.inline.time(), &configs(devices, blank), faults);
            let before = node.digests();
            let restored = restore(&script, &node, restore_terms(AfterLoad::Run), &state);
            assert!(restored.is_none_or(|end| end.is_err()), "it has a fault");
            let again = Script::quiet();
            let node = found(&again, node);
            let plan =
                RestorePlan::for_devices(&vec![CAPABILITIES; node.lanes.len()], AfterLoad::Run).unwrap();
            let last = last_restore(&script);
            let Some(recorded) = RecordedRestore::from_last(last, HOLD_LIMIT, loaded(&state, devices)) else {
                return script;
            };
            let mut owner = Memory::new(0);
            let taken_up = take_up_restore(&node.lanes, plan, recorded, READY_LIMIT, &again, &mut owner);
            let end = again.poll(taken_up).unwrap();
            let expected = if end.is_ok() { &wanted } else { &before };
            assert_eq!(&node.digests(), expected, "{last}: {end:?}");
            *(if end.is_ok() { &mut done } else { &mut reset }) += 1;
            script
        });
    }
    assert!(done > 0 && reset > 0);
}
