//! What the device says of the size of its state.

use vfio_checkpoint_fsm::State;

use super::super::bench::Bench;
use super::super::pieces::drain_precopy;
use super::super::rule::{Answer, Instead, Rule, Weight, differs, holds, not_applicable};
use super::source;
use crate::DataSize;

const UNDERSTATED: Weight = Weight::Matters {
    consequence: "space would be reserved and downtime predicted for less than what comes",
};

pub(super) const RULES: &[Rule] = &[
    Rule {
        id: "size-known-is-exact",
        contract: "A size that is called known is the number of bytes that a stop-copy brings.",
        source: source::SIZE,
        weight: UNDERSTATED,
        quirks: &[],
        check: known,
    },
    Rule {
        id: "size-bound-is-kept",
        contract: "A size that is called a bound is not exceeded by a stop-copy.",
        source: source::SIZE,
        weight: UNDERSTATED,
        quirks: &[],
        check: bound,
    },
    Rule {
        id: "size-covers-stop-copy-after-pre-copy",
        contract: "The size said during pre-copy covers what STOP_COPY brings if the device is stopped then.",
        source: source::SIZE,
        weight: UNDERSTATED,
        quirks: &[],
        check: after_precopy,
    },
    Rule {
        id: "size-in-stop-copy",
        contract: "The size can be asked for in STOP_COPY; it covers what is left, and asking does not disturb the stream.",
        source: source::SIZE,
        weight: UNDERSTATED,
        quirks: &[],
        check: in_stop_copy,
    },
    Rule {
        id: "size-absent-is-said",
        contract: "A device without MIG_DATA_SIZE says that it has none, instead of a number.",
        source: source::SIZE,
        weight: Weight::Matters {
            consequence: "a number that nobody stands behind would meet a caller's limit",
        },
        quirks: &[],
        check: absent,
    },
];

/// Whether what came is within what was said.
fn within(said: DataSize, came: usize) -> Result<(), Instead> {
    let came = came as u64;
    let kept = match said {
        DataSize::Known(bytes) => came == bytes,
        DataSize::UpperBound(bytes) => came <= bytes,
        DataSize::Unknown => return not_applicable(NOT_SAID),
    };
    if kept { Ok(()) } else { differs(format!("{said} said, {came} came")) }
}

const NOT_SAID: &str = "the device does not say the size of its state";

/// What is said of a stopped device: a running one may be changing its state.
fn said_in_stop(bench: &mut Bench) -> Result<DataSize, Instead> {
    let slot = bench.source();
    slot.quiet(State::Stop)?;
    slot.size()
}

fn known(bench: &mut Bench) -> Answer {
    let said = said_in_stop(bench)?;
    match said {
        DataSize::Known(_) => {}
        DataSize::UpperBound(_) => return not_applicable("the device gives a bound, no exact size"),
        DataSize::Unknown => return not_applicable(NOT_SAID),
    }
    let came = bench.source().stop_copy()?.len();
    within(said, came)?;
    holds(format!("{said} said, {came} came"))
}

fn bound(bench: &mut Bench) -> Answer {
    let said = said_in_stop(bench)?;
    match said {
        DataSize::UpperBound(_) => {}
        DataSize::Known(_) => return not_applicable("the device gives an exact size"),
        DataSize::Unknown => return not_applicable(NOT_SAID),
    }
    let came = bench.source().stop_copy()?.len();
    within(said, came)?;
    holds(format!("{said} said, {came} came"))
}

fn after_precopy(bench: &mut Bench) -> Answer {
    let slot = bench.source();
    slot.require(State::PreCopy)?;
    let mut stream = slot.save(State::PreCopy)?;
    let mut before = Vec::new();
    drain_precopy(&mut *stream, &mut before, slot.limit_bytes())?;
    let Some(said) = slot.size()?.bytes() else {
        return not_applicable(NOT_SAID);
    };
    slot.set(State::StopCopy)?;
    let came = slot.drain(&mut *stream)?.len();
    within(DataSize::UpperBound(said), came)?;
    holds(format!("{said} bytes said after {} were read, {came} came", before.len()))
}

fn in_stop_copy(bench: &mut Bench) -> Answer {
    let slot = bench.source();
    let mut stream = slot.save(State::StopCopy)?;
    let said = slot.size()?;
    let mut came = 0;
    if let crate::Read::Bytes(bytes) = stream.read(&mut [0; 16])? {
        came += bytes;
    }
    slot.size()?;
    came += slot.drain(&mut *stream)?.len();
    within(said, came)?;
    drop(stream);
    let undisturbed = slot.stop_copy_again()?.len();
    if came != undisturbed {
        return differs(format!(
            "{came} bytes came with questions for the size between, {undisturbed} without"
        ));
    }
    holds(format!("{said} said, {came} came"))
}

fn absent(bench: &mut Bench) -> Answer {
    let slot = bench.source();
    if slot.capabilities()?.data_size {
        return not_applicable("the device has MIG_DATA_SIZE");
    }
    match slot.size()? {
        DataSize::Unknown => holds("unknown"),
        said @ (DataSize::Known(_) | DataSize::UpperBound(_)) => differs(format!("{said}")),
    }
}
