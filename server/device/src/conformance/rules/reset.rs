//! What a reset ends.

use vfio_checkpoint_fsm::State;

use super::super::bench::{Bench, equal};
use super::super::pieces::{Pieces, write_all};
use super::super::rule::{Answer, Rule, Weight, differs, holds, not_applicable, not_observed};
use super::{errno_name, source};

pub(super) const RULES: &[Rule] = &[
    Rule {
        id: "reset-as-announced",
        contract: "A reset works exactly where the device says that it has one.",
        source: source::RESET,
        weight: Weight::Matters {
            consequence: "a failed restore would leave the device quarantined, or seem to",
        },
        quirks: &[],
        check: as_announced,
    },
    Rule {
        id: "reset-lands-in-running",
        contract: "A reset leads from every state to RUNNING.",
        source: source::RESET,
        weight: Weight::Matters { consequence: "nothing would bring the device back after a failure" },
        quirks: &[],
        check: lands_in_running,
    },
    Rule {
        id: "reset-aborts-resuming",
        contract: "A reset gives up a half-written state, and the device runs and saves as before.",
        source: source::RESET,
        weight: Weight::Matters { consequence: "an aborted restore would cost the slot" },
        quirks: &[],
        check: aborts_resuming,
    },
    Rule {
        id: "reset-ends-the-save-stream",
        contract: "After a reset a read on the session's stream is an error.",
        source: source::DATA_FD,
        weight: Weight::Tolerated { how: "the driver drops the stream with the session and never reads on" },
        quirks: &[],
        check: ends_save,
    },
    Rule {
        id: "reset-ends-the-restore-stream",
        contract: "After a reset a write on the session's stream is an error.",
        source: source::DATA_FD,
        weight: Weight::Tolerated { how: "the driver drops the stream with the session and never writes on" },
        quirks: &[],
        check: ends_restore,
    },
    Rule {
        id: "reset-can-be-repeated",
        contract: "A reset of a device that was just reset succeeds and changes nothing.",
        source: source::RESET,
        weight: Weight::Matters { consequence: "a recovery that is itself repeated would fail" },
        quirks: &[],
        check: repeated,
    },
    Rule {
        id: "reset-forgets-the-state",
        contract: "After a reset nothing is left of the state that the device held.",
        source: source::RESET,
        weight: Weight::Tolerated { how: "a reset counts as the loss of the state, whatever of it is left" },
        quirks: &[],
        check: forgets,
    },
];

fn as_announced(bench: &mut Bench) -> Answer {
    let slot = bench.source();
    let announced = slot.capabilities()?.reset;
    match (announced, slot.device()?.reset()) {
        (true, Ok(())) => holds("announced, and works"),
        (false, Err(error)) => holds(format!("not announced, and answers {}", errno_name(&error))),
        (true, Err(error)) => differs(format!("announced, and answers {}", errno_name(&error))),
        (false, Ok(())) => differs("not announced, and works"),
    }
}

fn lands_in_running(bench: &mut Bench) -> Answer {
    let slot = bench.source();
    slot.require_reset()?;
    let mut from = Vec::new();
    for state in State::ALL {
        if state == State::Error || !slot.migration()?.supports(state) {
            continue;
        }
        let stream = slot.stand_in(state)?;
        slot.device()?.reset()?;
        slot.expect_state(State::Running).map_err(|instead| instead.during(format!("a reset in {state}")))?;
        drop(stream);
        from.push(state.name());
    }
    holds(format!("from {}", from.join(" ")))
}

fn aborts_resuming(bench: &mut Bench) -> Answer {
    let blob = bench.blob()?;
    let target = bench.target();
    target.require_reset()?;
    let mut stream = target.resume()?;
    write_all(&mut *stream, &blob[..blob.len() / 2], Pieces::Usual).map_err(|(_, error)| error)?;
    target.device()?.reset()?;
    target.expect_state(State::Running)?;
    drop(stream);
    let saved = target.stop_copy()?;
    if saved.is_empty() { differs("the device saves nothing afterwards") } else { holds("runs, and saves") }
}

fn ends_save(bench: &mut Bench) -> Answer {
    let slot = bench.source();
    slot.require_reset()?;
    let mut stream = slot.save(State::StopCopy)?;
    slot.device()?.reset()?;
    match stream.read(&mut [0; 64]) {
        Err(error) => holds(errno_name(&error)),
        Ok(read) => differs(format!("a read after the reset brought {read:?}")),
    }
}

fn ends_restore(bench: &mut Bench) -> Answer {
    let blob = bench.blob()?;
    let target = bench.target();
    target.require_reset()?;
    let mut stream = target.resume()?;
    target.device()?.reset()?;
    match stream.write(&blob) {
        Err(error) => holds(errno_name(&error)),
        Ok(taken) => differs(format!("a write after the reset took {taken} bytes")),
    }
}

fn repeated(bench: &mut Bench) -> Answer {
    let slot = bench.source();
    slot.require_reset()?;
    for _ in 0..3 {
        slot.device()?.reset()?;
        slot.expect_state(State::Running)?;
    }
    holds("three times in a row")
}

fn forgets(bench: &mut Bench) -> Answer {
    bench.source().require_reset()?;
    if !bench.repeatable()? {
        return not_applicable("the device's stop-copies differ by themselves");
    }
    let fresh = bench.blob()?;
    bench.change()?;
    let slot = bench.source();
    if slot.stop_copy()?[..] == fresh[..] {
        return not_observed("what was changed from outside is not part of the state");
    }
    slot.fresh()?;
    equal(&fresh, &slot.stop_copy()?)?;
    holds("the state of a fresh device")
}
