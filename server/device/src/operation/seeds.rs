//! Thousands of seeded runs: random sets, random faults in every device, whole operations. What must hold whatever
//! goes wrong is checked on the simulated hardware itself, not on what the driver says of it.
//!
//! One run: `SEED=17 cargo test -p vfio-checkpoint-device --lib seeds -- --nocapture`. More runs: `SEEDS=100000`.

mod handover;

use std::collections::BTreeMap;
use std::env;
use std::io::Write as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vfio_checkpoint_fsm::{
    AfterLoad, AfterSave, Capabilities, Cutover, Outcome, RestorePlan, RestoreState, SavePlan, SaveRequest,
    SaveState, State,
};

use super::tests::answers::{self, HOLD_LIMIT, restore_terms, save_terms};
use super::tests::crashes::{found, last_restore, last_save, loaded};
use super::tests::script::{Script, Scripted, What};
use super::tests::{Memory, Node, READY_LIMIT, RESUME, configs, restore, save};
use super::{
    OperationError, PrecopyPolicy, RecordedRestore, RecordedSave, SaveTerms, take_up_restore, take_up_save,
};
use crate::fault::Fault;
use crate::sim::SimConfig;
use crate::{Executor, Inline};

/// Several chunks, so that faults strike in the middle of a stream.
const MEMORY_BYTES: u64 = 200_000;
const RUNS: u64 = 1_000;
/// Each says how it ended, and how many faults struck.
const RUNS_OF_A_SEED: [fn(u64) -> (String, u64); 4] =
    [save_run, restore_run, interrupted_run, handover::hand_over_run];

/// A set of one to three devices with the same random capabilities, and up to three faults in each.
fn scenario(seed: u64) -> (Vec<SimConfig>, Vec<Vec<Fault>>) {
    let random = Inline::new(seed);
    let devices = 1 + random.random() % 3;
    let bits = random.random();
    let migration = Capabilities { p2p: devices > 1 || bits & 1 == 0, pre_copy: bits & 2 == 0 };
    let configs = configs(devices, |config| {
        config.memory_bytes = MEMORY_BYTES;
        config.migration = migration;
    });
    let faults = (0..devices).map(|_| Fault::draw(random.random(), 3, MEMORY_BYTES)).collect();
    (configs, faults)
}

fn node(configs: &[SimConfig], faults: &[Vec<Fault>]) -> Node {
    let faults: Vec<&[Fault]> = faults.iter().map(Vec::as_slice).collect();
    Node::new(configs, &faults)
}

fn is_quarantined(error: &OperationError, name: &str) -> bool {
    match error {
        OperationError::Refused(_)
        | OperationError::NotReady { .. }
        | OperationError::Inconsistent { .. } => false,
        OperationError::Failed { quarantined, .. } => quarantined.iter().any(|device| device.name == name),
    }
}

fn outcome(error: &OperationError) -> Outcome {
    match error {
        OperationError::Refused(_)
        | OperationError::NotReady { .. }
        | OperationError::Inconsistent { .. } => Outcome::Preserved,
        OperationError::Failed { outcome, .. } => *outcome,
    }
}

/// A save with faults in the source. Says how it ended.
fn save_run(seed: u64) -> (String, u64) {
    let (configs, faults) = scenario(seed);
    let source = node(&configs, &faults);
    let before = source.digests();
    let mut memory = Memory::new(configs.len());
    let pre_copy = seed.is_multiple_of(2);
    let saved =
        save(&source.lanes, SaveRequest { pre_copy, ..RESUME }, PrecopyPolicy::default(), &mut memory);

    assert_eq!(source.digests(), before, "a source never loses its state to its own save");
    assert!(source.slots.iter().all(|slot| slot.resets() == 0), "a source is never reset by itself");
    let struck = struck(&source);
    let end = match saved {
        Ok(_) => {
            assert!(source.slots.iter().all(|slot| slot.state() == State::Running));
            let target = Node::new(&configs, &[]);
            restore(&target.lanes, &mut memory).expect("what was saved can be restored");
            assert_eq!(target.digests(), before, "what was saved is the state");
            "saved".to_owned()
        }
        Err(error) => {
            for slot in &source.slots {
                let quarantined = is_quarantined(&error, &slot.identity().name);
                assert!(quarantined || slot.state() == State::Running, "left in {}: {error}", slot.state());
            }
            format!("not saved, {}", outcome(&error))
        }
    };
    (end, struck)
}

/// A restore with faults in the destination. Says how it ended.
fn restore_run(seed: u64) -> (String, u64) {
    let (configs, faults) = scenario(seed);
    let source = Node::new(&configs, &[]);
    let mut memory = Memory::new(configs.len());
    save(&source.lanes, RESUME, PrecopyPolicy::default(), &mut memory).expect("a save without faults");
    let wanted = source.digests();

    let blank: Vec<SimConfig> =
        configs.iter().map(|config| SimConfig { seed: config.seed + 100, ..config.clone() }).collect();
    let target = node(&blank, &faults);
    let before = target.digests();
    let end = match restore(&target.lanes, &mut memory) {
        Ok(_) => {
            assert_eq!(target.digests(), wanted, "success means the state, on every device");
            assert!(target.slots.iter().all(|slot| slot.state() == State::Running && slot.resets() == 0));
            "restored".to_owned()
        }
        Err(error) => {
            let resets: u64 = target.slots.iter().map(|slot| u64::from(slot.resets() > 0)).sum();
            for (slot, before) in target.slots.iter().zip(before) {
                if !is_quarantined(&error, &slot.identity().name) {
                    assert_eq!(slot.state(), State::Running, "left behind: {error}");
                    assert_eq!(slot.digest(), before, "a copy that was refused must not run: {error}");
                }
            }
            assert!(resets == 0 || outcome(&error) == Outcome::StateLost, "a reset is a loss: {error}");
            format!("not restored, {}", outcome(&error))
        }
    };
    (end, struck(&target))
}

/// A cancel or a crash at a random place of a save or a restore, on top of the faults; after a crash another process
/// takes it up. Says how it ended.
fn interrupted_run(seed: u64) -> (String, u64) {
    let random = Inline::new(!seed);
    let what = if random.random().is_multiple_of(2) { What::Cancel } else { What::Crash };
    let place = usize::try_from(random.random() % 50).expect("a small number");
    let said = |script: Script| if random.random().is_multiple_of(2) { script.resume() } else { script };
    let (script, again) = (said(Script::new(what, place).cutover()), said(Script::quiet().cutover()));
    let (configs, faults) = scenario(seed);
    let faults: Vec<&[Fault]> = faults.iter().map(Vec::as_slice).collect();
    let capabilities = vec![configs[0].migration; configs.len()];
    let on_script =
        |configs: &[SimConfig]| Node::on(Arc::new(script.clone()), script.inline.time(), configs, &faults);
    if random.random().is_multiple_of(2) {
        let cutover = if random.random().is_multiple_of(2) { Cutover::Auto } else { Cutover::Manual };
        let terms = save_terms(random.random().is_multiple_of(2), cutover, AfterSave::Hold);
        let source = on_script(&configs);
        let before = source.digests();
        let (ended, sink) = answers::save(&script, &source, terms);
        let struck = struck(&source);
        let (end, node) = if let Some(end) = ended {
            (end.map(|_| ()), source)
        } else {
            let source = found(&again, source);
            let plan = SavePlan::for_devices(&capabilities, terms.request).expect("a plan");
            let last = RecordedSave::from_last(last_save(&script), HOLD_LIMIT);
            let mut sink =
                Scripted { script: again.clone(), memory: sink.memory, slots: source.slots.clone() };
            if matches!(last_save(&script), SaveState::Lost { .. }) {
                // Which device was quarantined went with the process that died. Its record says: leave the set alone.
                return ("Crash after the end".to_owned(), struck);
            }
            let end = last.map_or(Ok(()), |recorded| {
                let taken_up = take_up_save(&source.lanes, plan, recorded, &again, &mut sink);
                again.poll(taken_up).expect("an end").map(|_| ())
            });
            (end, source)
        };
        assert_eq!(node.digests(), before, "a source never loses its state to its own save");
        for slot in &node.slots {
            let quarantined = end.as_ref().is_err_and(|error| is_quarantined(error, &slot.identity().name));
            assert!(slot.resets() == 0, "a source is never reset by itself");
            assert!(
                quarantined || slot.state() == State::Running,
                "left in {} after {:?}: {end:?}",
                slot.state(),
                script.journal()
            );
        }
        return (format!("{what:?} of a save, {}", end.map_or("undone", |()| "done")), struck);
    }

    let (state, wanted) = {
        let source = Node::new(&configs, &[]);
        let mut memory = Memory::new(configs.len());
        save(&source.lanes, RESUME, PrecopyPolicy::default(), &mut memory).expect("a save without faults");
        (memory, source.digests())
    };
    let blank: Vec<SimConfig> =
        configs.iter().map(|config| SimConfig { seed: config.seed + 100, ..config.clone() }).collect();
    let target = on_script(&blank);
    let before = target.digests();
    let ended = answers::restore(&script, &target, restore_terms(AfterLoad::Hold), &state);
    let struck = struck(&target);
    let over = last_restore(&script);
    let (end, node) = if let Some(end) = ended {
        (end.map(|_| ()), target)
    } else {
        let target = found(&again, target);
        let plan = RestorePlan::for_devices(&capabilities, AfterLoad::Hold).expect("a plan");
        let before_crash = loaded(&state, configs.len() as u64);
        let end = match RecordedRestore::from_last(over, HOLD_LIMIT, before_crash) {
            Some(recorded) => {
                let mut owner = Memory::new(0);
                let taken_up =
                    take_up_restore(&target.lanes, plan, recorded, READY_LIMIT, &again, &mut owner);
                again.poll(taken_up).expect("an end").map(|_| ())
            }
            // Quarantined is an end too, and what it says of its devices is with the process that died.
            None if over == RestoreState::Quarantined => {
                return ("Crash after the end".to_owned(), struck);
            }
            None if over == RestoreState::Completed => Ok(()),
            None => Err(OperationError::Failed {
                cause: super::Cause::Interrupted,
                outcome: Outcome::Preserved,
                quarantined: Box::default(),
                reset: Box::default(),
                checkpoint: None,
            }),
        };
        (end, target)
    };
    for ((slot, before), wanted) in node.slots.iter().zip(before).zip(wanted) {
        let quarantined = end.as_ref().is_err_and(|error| is_quarantined(error, &slot.identity().name));
        if !quarantined {
            assert_eq!(slot.state(), State::Running, "left behind: {end:?}");
            let expected = if end.is_ok() { wanted } else { before };
            assert_eq!(slot.digest(), expected, "{over}: {end:?}");
        }
    }
    (format!("{what:?} of a restore, {}", end.map_or("undone", |()| "done")), struck)
}

fn struck(node: &Node) -> u64 {
    node.struck.iter().map(|struck| struck.load(Ordering::Relaxed)).sum()
}

#[test]
fn whatever_goes_wrong_the_invariants_hold() {
    let number = |name: &str| env::var(name).ok().and_then(|value| value.parse::<u64>().ok());
    let (first, runs) = match number("SEED") {
        Some(seed) => (seed, 1),
        None => (0, number("SEEDS").unwrap_or(RUNS)),
    };
    let mut ends: BTreeMap<String, u64> = BTreeMap::new();
    let (mut drawn, mut struck) = (0, 0);
    for seed in first..first + runs {
        println!("SEED={seed}: {:?}", scenario(seed).1);
        let run = RUNS_OF_A_SEED.map(|run| run(seed));
        if seed % 64 == 0 {
            assert_eq!(RUNS_OF_A_SEED.map(|run| run(seed)), run, "the same seed gives the same run");
        }
        drawn += RUNS_OF_A_SEED.len() * scenario(seed).1.iter().map(Vec::len).sum::<usize>();
        for (end, strikes) in run {
            struck += strikes;
            *ends.entry(end).or_default() += 1;
        }
    }
    let ends: Vec<String> = ends.iter().map(|(end, count)| format!("{count} {end}")).collect();
    // Past the test harness, which keeps what a passing test prints to itself.
    let _ = writeln!(
        std::io::stdout(),
        "figures: faults: {drawn} drawn and {struck} struck, from {runs} seeds over {} operations: {}",
        RUNS_OF_A_SEED.len() as u64 * runs,
        ends.join("; ")
    );
}
