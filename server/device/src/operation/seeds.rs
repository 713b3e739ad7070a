//! Thousands of seeded runs: random sets, random faults in every device, whole operations. What must hold whatever
//! goes wrong is checked on the simulated hardware itself, not on what the driver says of it.
//!
//! One run: `SEED=17 cargo test -p vfio-checkpoint-device --lib seeds -- --nocapture`. More runs: `SEEDS=100000`.

use std::collections::BTreeMap;
use std::env;
use std::io::Write as _;
use std::sync::atomic::Ordering;

use vfio_checkpoint_fsm::{Capabilities, Outcome, SaveRequest, State};

use super::tests::{Memory, Node, RESUME, configs};
use super::{OperationError, PrecopyPolicy, restore, save};
use crate::fault::Fault;
use crate::sim::SimConfig;
use crate::{Executor, Inline};

/// Several chunks, so that faults strike in the middle of a stream.
const MEMORY_BYTES: u64 = 200_000;
const RUNS: u64 = 1_000;

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
        OperationError::Refused(_) | OperationError::NotReady { .. } => false,
        OperationError::Failed { quarantined, .. } => quarantined.iter().any(|device| device.name == name),
    }
}

fn outcome(error: &OperationError) -> Outcome {
    match error {
        OperationError::Refused(_) | OperationError::NotReady { .. } => Outcome::Preserved,
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
        let run = [save_run(seed), restore_run(seed)];
        if seed % 64 == 0 {
            assert_eq!([save_run(seed), restore_run(seed)], run, "the same seed gives the same run");
        }
        drawn += 2 * scenario(seed).1.iter().map(Vec::len).sum::<usize>();
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
        2 * runs,
        ends.join("; ")
    );
}
