//! Which moves there are, and which are refused.
//!
//! The pairs of states are rules by the state they start from: one SET has to reach each target that the state
//! machine allows, with a data stream exactly where the walk's last hop opens one.

use vfio_checkpoint_fsm::{Path, State, Stream, Walk, path};

use super::super::bench::Bench;
use super::super::pieces::Pieces;
use super::super::rule::{Answer, Instead, Rule, Weight, differs, holds, not_applicable, not_observed};
use super::source;
use crate::{Backend, DataStream};

const WALKS: Weight = Weight::Matters {
    consequence: "operations would end in a state that they do not expect, or without the stream that they wait for",
};

pub(super) const RULES: &[Rule] = &[
    Rule {
        id: "walks-from-running",
        contract: "From RUNNING one SET reaches every state that the device has, with a stream where that has one.",
        source: source::WALK,
        weight: WALKS,
        quirks: &[],
        check: |bench| walks_from(bench, State::Running),
    },
    Rule {
        id: "walks-from-running-p2p",
        contract: "From RUNNING_P2P one SET reaches every state that the device has, with a stream where that has one.",
        source: source::WALK,
        weight: WALKS,
        quirks: &[],
        check: |bench| walks_from(bench, State::RunningP2p),
    },
    Rule {
        id: "walks-from-stop",
        contract: "From STOP one SET reaches every state that the device has, with a stream where that has one.",
        source: source::WALK,
        weight: WALKS,
        quirks: &[],
        check: |bench| walks_from(bench, State::Stop),
    },
    Rule {
        id: "walks-from-stop-copy",
        contract: "From STOP_COPY one SET reaches every state but those of pre-copy, and ends the stream.",
        source: source::WALK,
        weight: WALKS,
        quirks: &[],
        check: |bench| walks_from(bench, State::StopCopy),
    },
    Rule {
        id: "walks-from-resuming",
        contract: "From RESUMING, with a whole state written, one SET reaches every state that the device has.",
        source: source::WALK,
        weight: WALKS,
        quirks: &[],
        check: |bench| walks_from(bench, State::Resuming),
    },
    Rule {
        id: "walks-from-pre-copy",
        contract: "From PRE_COPY one SET reaches every state that the device has; to another saving state the stream stays.",
        source: source::WALK,
        weight: WALKS,
        quirks: &[],
        check: |bench| walks_from(bench, State::PreCopy),
    },
    Rule {
        id: "walks-from-pre-copy-p2p",
        contract: "From PRE_COPY_P2P one SET reaches every state that the device has; to another saving state the stream stays.",
        source: source::WALK,
        weight: WALKS,
        quirks: &[],
        check: |bench| walks_from(bench, State::PreCopyP2p),
    },
    Rule {
        id: "walk-takes-the-predicted-hops",
        contract: "Each SET takes the hops of the shortest path that the kernel defines, in that order.",
        source: source::WALK,
        weight: Weight::Matters {
            consequence: "after a failed SET the device could stand where no fallback is planned from",
        },
        quirks: &[],
        check: hops,
    },
    Rule {
        id: "staying-is-no-move",
        contract: "A SET to the state that the device is in succeeds, gives no stream and changes nothing.",
        source: source::WALK,
        weight: Weight::Tolerated { how: "the driver never asks for the state that it read back" },
        quirks: &[],
        check: staying,
    },
    Rule {
        id: "reading-the-state-changes-nothing",
        contract: "Reading the state back moves the device nowhere, however often it is asked.",
        source: source::DATA_FD,
        weight: Weight::Matters { consequence: "every recovery reads the state first and decides by it" },
        quirks: &[],
        check: reading_back,
    },
    Rule {
        id: "arc-forbidden-to-error",
        contract: "ERROR is no target: a SET to it is EINVAL from every state and changes nothing.",
        source: source::WALK,
        weight: Weight::Tolerated { how: "the driver refuses such a request before the device is asked" },
        quirks: &[],
        check: error_is_no_target,
    },
    Rule {
        id: "arc-forbidden-to-absent-states",
        contract: "A state that the device's flags leave out is EINVAL as a target from every state, and changes nothing.",
        source: source::FLAGS,
        weight: Weight::Tolerated { how: "the driver refuses such a request before the device is asked" },
        quirks: &[],
        check: absent_states,
    },
    Rule {
        id: "arc-forbidden-stop-copy-to-pre-copy",
        contract: "From STOP_COPY there is no way back to a pre-copy state: EINVAL, and nothing changes.",
        source: source::WALK,
        weight: Weight::Tolerated { how: "the driver refuses such a request before the device is asked" },
        quirks: &[],
        check: no_restart,
    },
    Rule {
        id: "p2p-state-as-flagged",
        contract: "RUNNING_P2P exists exactly where the device has the flag P2P.",
        source: source::FLAGS,
        weight: Weight::Matters { consequence: "the barrier between the devices of a set would be none" },
        quirks: &[],
        check: |bench| as_flagged(bench, State::RunningP2p),
    },
    Rule {
        id: "pre-copy-state-as-flagged",
        contract: "PRE_COPY exists exactly where the device has the flag PRE_COPY.",
        source: source::FLAGS,
        weight: Weight::Matters {
            consequence: "a save that was planned with pre-copy would fail on its first move",
        },
        quirks: &[],
        check: |bench| as_flagged(bench, State::PreCopy),
    },
    Rule {
        id: "pre-copy-p2p-state-as-flagged",
        contract: "PRE_COPY_P2P exists exactly where the device has both flags, P2P and PRE_COPY.",
        source: source::FLAGS,
        weight: Weight::Matters { consequence: "a set that pre-copies could not pass its barrier" },
        quirks: &[],
        check: |bench| as_flagged(bench, State::PreCopyP2p),
    },
    Rule {
        id: "error-is-left-by-a-reset-only",
        contract: "Out of ERROR every SET is refused, and a reset brings the device to RUNNING.",
        source: source::STATES,
        weight: Weight::Matters {
            consequence: "a device that failed would run on with a state that nobody vouches for",
        },
        quirks: &[],
        check: out_of_error,
    },
];

/// What is said where RESUMING is left out.
const NO_WAY_OUT: &str = "; not RESUMING, which neither a reset nor a close would leave";

/// Every walk that starts from a state, but none into a RESUMING that nothing leads out of.
fn walks(bench: &mut Bench, from: State) -> Result<Vec<Path>, Instead> {
    let capabilities = bench.source().migration()?;
    if !capabilities.supports(from) {
        return not_applicable(format!("the device has no {from}"));
    }
    let walk = |to| match path(capabilities, from, to) {
        Walk::Path(path) => Some(path),
        Walk::NoOp | Walk::Forbidden(_) => None,
    };
    let undo = bench.source().require_undo().is_ok();
    let left_out = |path: &Path| path.to() == State::Resuming && !undo;
    Ok(State::ALL.into_iter().filter_map(walk).filter(|path| !left_out(path)).collect())
}

/// Brings a fresh device to where a walk begins: in RESUMING with a whole state written.
fn begin(bench: &mut Bench, from: State) -> Result<Option<DataStream>, Instead> {
    let blob = if from == State::Resuming { Some(bench.blob()?) } else { None };
    let slot = bench.source();
    slot.fresh()?;
    match blob {
        Some(blob) => Ok(Some(DataStream::Restore(slot.load(&blob, Pieces::Usual)?))),
        None => slot.stand_in(from),
    }
}

fn walks_from(bench: &mut Bench, from: State) -> Answer {
    let mut reached = Vec::new();
    for path in walks(bench, from)? {
        let session = begin(bench, from)?;
        let slot = bench.source();
        let stream = slot.set(path.to()).map_err(|instead| instead.during(path))?;
        slot.expect_state(path.to()).map_err(|instead| instead.during(path))?;
        let came = stream.as_ref().map(|stream| match stream {
            DataStream::Save(_) => Stream::Save,
            DataStream::Restore(_) => Stream::Restore,
        });
        let due = path.opens_stream().then(|| path.to().stream()).flatten();
        if came != due {
            let name =
                |stream: Option<Stream>| stream.map_or("none".to_owned(), |stream| format!("{stream:?}"));
            return differs(format!("{path}: the stream is {}, due is {}", name(came), name(due)));
        }
        drop(session);
        reached.push(path.to().name());
    }
    holds(format!("reached {}{}", reached.join(" "), left_out(bench)))
}

fn hops(bench: &mut Bench) -> Answer {
    let mut count = 0;
    for from in State::ALL {
        if from == State::Error || !bench.source().migration()?.supports(from) {
            continue;
        }
        for path in walks(bench, from)? {
            let session = begin(bench, from)?;
            bench.take_hops()?;
            bench.source().set(path.to()).map_err(|instead| instead.during(path))?;
            let taken = bench.take_hops()?;
            let predicted: Vec<(State, State)> = path.iter().map(|arc| (arc.from(), arc.to())).collect();
            if taken != predicted {
                let list: Vec<String> = taken.iter().map(|(from, to)| format!("{from} -> {to}")).collect();
                return differs(format!("{path} was taken as {}", list.join(", ")));
            }
            count += predicted.len();
            drop(session);
        }
    }
    holds(format!("{count} hops, all as predicted{}", left_out(bench)))
}

fn left_out(bench: &mut Bench) -> &'static str {
    if bench.source().require_undo().is_ok() { "" } else { NO_WAY_OUT }
}

/// Does something in every state that the device has and can be brought to.
fn in_every_state(
    bench: &mut Bench,
    mut act: impl FnMut(&mut Bench, State) -> Result<(), Instead>,
) -> Answer {
    let mut names = Vec::new();
    for state in State::ALL {
        let slot = bench.source();
        let absent = state == State::Error || !slot.migration()?.supports(state);
        if absent || (state == State::Resuming && slot.require_undo().is_err()) {
            continue;
        }
        slot.fresh()?;
        let stream = slot.stand_in(state)?;
        act(bench, state).map_err(|instead| instead.during(state))?;
        drop(stream);
        names.push(state.name());
    }
    holds(format!("in {}{}", names.join(" "), left_out(bench)))
}

fn staying(bench: &mut Bench) -> Answer {
    in_every_state(bench, |bench, state| bench.source().quiet(state))
}

fn reading_back(bench: &mut Bench) -> Answer {
    in_every_state(bench, |bench, state| (0..3).try_for_each(|_| bench.source().expect_state(state)))
}

fn error_is_no_target(bench: &mut Bench) -> Answer {
    in_every_state(bench, |bench, _| bench.source().refused(State::Error))
}

fn absent_states(bench: &mut Bench) -> Answer {
    let capabilities = bench.source().migration()?;
    let absent: Vec<State> = State::ALL.into_iter().filter(|state| !capabilities.supports(*state)).collect();
    if absent.is_empty() {
        return not_applicable("the device has every state");
    }
    in_every_state(bench, |bench, _| absent.iter().try_for_each(|state| bench.source().refused(*state)))
}

fn no_restart(bench: &mut Bench) -> Answer {
    bench.source().require(State::PreCopy)?;
    if bench.source().backend()? == Backend::Kernel && !bench.allow_restart {
        return not_observed(
            "kernels before 7.2 without the fix loop for ever in this request, with the device's lock held; it is made \
             only on request",
        );
    }
    let slot = bench.source();
    let stream = slot.save(State::StopCopy)?;
    slot.refused(State::PreCopy)?;
    if slot.migration()?.p2p {
        slot.refused(State::PreCopyP2p)?;
    }
    drop(stream);
    holds("EINVAL")
}

fn as_flagged(bench: &mut Bench, state: State) -> Answer {
    let slot = bench.source();
    if !slot.migration()?.supports(state) {
        slot.refused(state)?;
        return holds("not flagged, and refused");
    }
    let stream = slot.set(state)?;
    slot.expect_state(state)?;
    drop(stream);
    holds("flagged, and reached")
}

fn out_of_error(bench: &mut Bench) -> Answer {
    if bench.source().backend()? == Backend::Kernel {
        return not_observed("a SET out of ERROR is a kernel warning, on which a host may be set to panic");
    }
    bench.source().require_reset()?;
    bench.fail()?;
    let slot = bench.source();
    slot.expect_state(State::Error)?;
    for target in State::ALL {
        if slot.device()?.set_state(target).is_ok() {
            return differs(format!("ERROR -> {target} succeeded"));
        }
        slot.expect_state(State::Error)?;
    }
    slot.device()?.reset()?;
    slot.expect_state(State::Running)?;
    holds("refused everything, and a reset led to RUNNING")
}
