//! Loading: what is taken.
//!
//! What has to be refused is in `refusals`. Both work on the device to restore onto.

use vfio_checkpoint_fsm::State;

use super::super::bench::{Bench, equal};
use super::super::pieces::Pieces;
use super::super::rule::{Answer, Rule, Weight, differs, holds, not_observed};
use super::source;

pub(super) const RULES: &[Rule] = &[
    Rule {
        id: "restored-device-runs",
        contract: "A device that has been given a whole state goes from RESUMING to RUNNING.",
        source: source::STATES,
        weight: Weight::Matters { consequence: "nothing could be restored" },
        quirks: &[],
        check: runs,
    },
    Rule {
        id: "restored-device-starts-in-two-steps",
        contract: "A device that has been given a whole state goes from RESUMING to RUNNING_P2P, and on to RUNNING.",
        source: source::STATES,
        weight: Weight::Matters { consequence: "a set of devices could not be started behind its barrier" },
        quirks: &[],
        check: two_steps,
    },
    Rule {
        id: "restore-is-faithful",
        contract: "What was loaded is what the device gives out again, before it has run.",
        source: source::STATES,
        weight: Weight::Matters {
            consequence: "a restored device would hold another state than the one saved",
        },
        quirks: &[],
        check: faithful,
    },
    Rule {
        id: "restore-survives-running",
        contract: "A restored device that ran and did nothing gives out the state that was loaded.",
        source: source::STATES,
        weight: Weight::Matters { consequence: "starting a restored device would change its state" },
        quirks: &[],
        check: survives_running,
    },
    Rule {
        id: "restore-replaces-the-state",
        contract: "Loading replaces what the device held: nothing of it shows afterwards.",
        source: source::STATES,
        weight: Weight::Matters { consequence: "the state of one workload would leak into another" },
        quirks: &[],
        check: replaces,
    },
    Rule {
        id: "restore-can-be-repeated",
        contract: "A restored and running device can be restored again, in one SET from RUNNING to RESUMING.",
        source: source::WALK,
        weight: Weight::Matters { consequence: "a slot could be used for one restore only" },
        quirks: &[],
        check: repeated,
    },
    Rule {
        id: "writes-of-one-byte",
        contract: "A state written byte by byte loads as one written at once.",
        source: source::DATA_FD,
        weight: Weight::Matters {
            consequence: "a state would load or not depending on how the network cut it",
        },
        quirks: &[],
        check: |bench| written_in(bench, Pieces::Single),
    },
    Rule {
        id: "writes-of-odd-sizes",
        contract: "A state written in pieces of odd sizes loads as one written at once.",
        source: source::DATA_FD,
        weight: Weight::Matters {
            consequence: "a state would load or not depending on how the network cut it",
        },
        quirks: &[],
        check: |bench| written_in(bench, Pieces::Odd),
    },
    Rule {
        id: "writes-of-huge-sizes",
        contract: "A state written in as few writes as the device takes loads as any other.",
        source: source::DATA_FD,
        weight: Weight::Matters {
            consequence: "a state would load or not depending on how the network cut it",
        },
        quirks: &[],
        check: |bench| written_in(bench, Pieces::Huge),
    },
];

fn runs(bench: &mut Bench) -> Answer {
    let blob = bench.blob()?;
    let target = bench.target();
    let stream = target.load(&blob, Pieces::Usual)?;
    target.quiet(State::Running)?;
    drop(stream);
    holds(format!("{} bytes loaded", blob.len()))
}

fn two_steps(bench: &mut Bench) -> Answer {
    bench.target().require(State::RunningP2p)?;
    let blob = bench.blob()?;
    let target = bench.target();
    let stream = target.load(&blob, Pieces::Usual)?;
    target.quiet(State::RunningP2p)?;
    target.quiet(State::Running)?;
    drop(stream);
    holds("RUNNING_P2P, then RUNNING")
}

fn faithful(bench: &mut Bench) -> Answer {
    bench.require_repeatable()?;
    let blob = bench.blob()?;
    let again = bench.reload(&blob)?;
    equal(&blob, &again)?;
    holds(format!("{} bytes, equal", blob.len()))
}

fn survives_running(bench: &mut Bench) -> Answer {
    bench.require_repeatable()?;
    let slot = bench.source();
    let before = slot.stop_copy()?;
    slot.quiet(State::Running)?;
    if slot.stop_copy()? != before {
        return not_observed("the device changes by itself while it runs");
    }
    bench.fresh()?;
    let blob = bench.blob()?;
    let target = bench.target();
    let stream = target.load(&blob, Pieces::Usual)?;
    target.quiet(State::Running)?;
    drop(stream);
    equal(&blob, &target.stop_copy()?)?;
    holds(format!("{} bytes, equal", blob.len()))
}

/// On one device: the state of the other has nothing to do with what this one held.
fn replaces(bench: &mut Bench) -> Answer {
    bench.require_repeatable()?;
    let blob = bench.blob()?;
    bench.change()?;
    let slot = bench.source();
    if slot.stop_copy()?[..] == blob[..] {
        return not_observed("what was changed from outside is not part of the state");
    }
    slot.quiet(State::Running)?;
    let stream = slot.load(&blob, Pieces::Usual)?;
    let loaded = slot.stop_copy()?;
    drop(stream);
    equal(&blob, &loaded)?;
    holds("nothing of the state before is left")
}

fn repeated(bench: &mut Bench) -> Answer {
    let blob = bench.blob()?;
    let target = bench.target();
    for _ in 0..2 {
        let stream = target.load(&blob, Pieces::Usual)?;
        target.quiet(State::Running)?;
        drop(stream);
    }
    holds("twice in a row")
}

fn written_in(bench: &mut Bench, pieces: Pieces) -> Answer {
    let blob = bench.blob()?;
    let repeatable = bench.repeatable()?;
    let target = bench.target();
    let stream = target.load(&blob, pieces)?;
    let saved = target.stop_copy()?;
    drop(stream);
    if repeatable {
        equal(&blob, &saved)?;
    } else if saved.is_empty() {
        return differs("the device loaded it and gives nothing out");
    }
    holds(format!("{} bytes in {pieces:?} pieces", blob.len()))
}
