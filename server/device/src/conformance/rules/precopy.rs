//! Saving while the device runs.

use vfio_checkpoint_fsm::State;

use super::super::bench::Bench;
use super::super::pieces::{Pieces, drain_precopy};
use super::super::rule::{Answer, Instead, Rule, Weight, differs, holds, not_applicable, not_observed};
use super::{errno_name, source};
use crate::{DeviceError, PrecopyInfo, Read, SaveStream};

/// How often a session is asked how much is left, at most.
const QUESTIONS: usize = 1024;

pub(super) const RULES: &[Rule] = &[
    Rule {
        id: "precopy-idle-is-no-error",
        contract: "Where pre-copy has nothing for now a read answers ENOMSG (or 0), again and again.",
        source: source::PRECOPY_INFO,
        weight: Weight::Matters {
            consequence: "a save would fail as soon as it had caught up with the device",
        },
        quirks: &[],
        check: idle,
    },
    Rule {
        id: "precopy-is-never-the-end",
        contract: "Nothing for now is not the end: what is left comes in STOP_COPY, and the whole loads.",
        source: source::PRECOPY_INFO,
        weight: Weight::Matters { consequence: "the state would be cut short" },
        quirks: &[],
        check: never_the_end,
    },
    Rule {
        id: "precopy-saves-the-same-state",
        contract: "Pre-copy and stop-copy together carry the state that a plain stop-copy carries.",
        source: source::STATES,
        weight: Weight::Matters {
            consequence: "a device restored from a pre-copy save would hold another state",
        },
        quirks: &[],
        check: same_state,
    },
    Rule {
        id: "precopy-follows-changes",
        contract: "What changes while a device pre-copies is in the stream by its end.",
        source: source::PRECOPY_INFO,
        weight: Weight::Matters { consequence: "a restored device would hold a state that is partly old" },
        quirks: &[],
        check: follows_changes,
    },
    Rule {
        id: "precopy-begins-quiesced",
        contract: "A session can begin in PRE_COPY_P2P, from RUNNING_P2P, and end in STOP_COPY.",
        source: source::STATES,
        weight: Weight::Tolerated { how: "the driver begins every pre-copy in PRE_COPY" },
        quirks: &[],
        check: quiesced,
    },
    Rule {
        id: "precopy-can-be-abandoned",
        contract: "A pre-copy that is given up runs on in RUNNING, and a later save is whole.",
        source: source::STATES,
        weight: Weight::Matters { consequence: "a cancelled pre-copy would cost the device's state" },
        quirks: &[],
        check: abandoned,
    },
    Rule {
        id: "precopy-info-in-pre-copy",
        contract: "In PRE_COPY and PRE_COPY_P2P the stream says how much is left.",
        source: source::PRECOPY_INFO,
        weight: Weight::Tolerated { how: "without it rounds end by the time budget alone" },
        quirks: &[],
        check: info_in_precopy,
    },
    Rule {
        id: "precopy-info-nowhere-else",
        contract: "Outside of PRE_COPY and PRE_COPY_P2P the question how much is left to pre-copy is EINVAL.",
        source: source::PRECOPY_INFO,
        weight: Weight::Tolerated { how: "the session asks only while it pre-copies" },
        quirks: &[],
        check: info_nowhere_else,
    },
    Rule {
        id: "initial-bytes-only-fall",
        contract: "initial_bytes never rises, except with the flag REINIT.",
        source: source::PRECOPY_INFO,
        weight: Weight::Tolerated {
            how: "rounds are bounded by a budget; it would be spent and the device stopped, or not, as asked",
        },
        quirks: &[],
        check: initial_only_falls,
    },
    Rule {
        id: "initial-bytes-can-be-read",
        contract: "While initial_bytes is not 0 a read in PRE_COPY brings bytes.",
        source: source::PRECOPY_INFO,
        weight: Weight::Tolerated {
            how: "rounds are bounded by a budget; pre-copy would not converge before it is spent",
        },
        quirks: &[],
        check: initial_is_readable,
    },
    Rule {
        id: "initial-bytes-reach-zero",
        contract: "Reading brings initial_bytes to 0.",
        source: source::PRECOPY_INFO,
        weight: Weight::Tolerated {
            how: "rounds are bounded by a budget; pre-copy would not converge before it is spent",
        },
        quirks: &[],
        check: initial_reaches_zero,
    },
    Rule {
        id: "reinit-only-after-opt-in",
        contract: "REINIT is flagged only where the device was opted in to it.",
        source: source::PRECOPY_INFO,
        weight: Weight::Tolerated {
            how: "the flag is left out of account where the device was not opted in",
        },
        quirks: &[],
        check: reinit_after_opt_in,
    },
];

/// How much is left, where the device says at all.
fn info(stream: &mut dyn SaveStream) -> Result<PrecopyInfo, Instead> {
    match stream.precopy_info() {
        Ok(info) => Ok(info),
        Err(DeviceError::Absent { .. }) => not_applicable("the device does not say how much is left"),
        Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => {
            not_applicable("the device does not say how much is left")
        }
        Err(error) => Err(error.into()),
    }
}

fn begin(bench: &mut Bench) -> Result<Box<dyn SaveStream>, Instead> {
    let slot = bench.source();
    slot.require(State::PreCopy)?;
    slot.save(State::PreCopy)
}

fn idle(bench: &mut Bench) -> Answer {
    let limit = bench.source().limit_bytes();
    let mut stream = begin(bench)?;
    let mut out = Vec::new();
    let Some(first) = drain_precopy(&mut *stream, &mut out, limit)? else {
        return not_observed("the device always had more to read");
    };
    for _ in 0..3 {
        // A device that changes by itself may have something again.
        stream.read(&mut [0; 4096])?;
    }
    let answer = if first == Read::Zero { "0" } else { "ENOMSG" };
    holds(format!("{answer} after {} bytes", out.len()))
}

fn never_the_end(bench: &mut Bench) -> Answer {
    let limit = bench.source().limit_bytes();
    let mut stream = begin(bench)?;
    let mut all = Vec::new();
    for _ in 0..4 {
        drain_precopy(&mut *stream, &mut all, limit)?;
    }
    let early = all.len();
    let slot = bench.source();
    slot.set(State::StopCopy)?;
    all.extend(slot.drain(&mut *stream)?);
    drop(stream);
    bench.fresh()?;
    let target = bench.target();
    let held = target.load(&all, Pieces::Usual)?;
    target.quiet(State::Running).map_err(|instead| {
        instead.during(format!("{early} bytes by pre-copy and {} after do not load", all.len() - early))
    })?;
    drop(held);
    holds(format!("{early} bytes by pre-copy, {} by stop-copy", all.len() - early))
}

/// Saves with pre-copy, and again by a plain stop-copy of the same stopped device.
fn both_ways(
    bench: &mut Bench,
    mut while_copying: impl FnMut(&mut Bench) -> Result<(), Instead>,
) -> Result<(Vec<u8>, Vec<u8>), Instead> {
    let limit = bench.source().limit_bytes();
    let mut stream = begin(bench)?;
    let mut all = Vec::new();
    for _ in 0..2 {
        drain_precopy(&mut *stream, &mut all, limit)?;
        while_copying(bench)?;
        // Drivers that collect changes do so when they are asked how much is left.
        let _ = stream.precopy_info();
    }
    if bench.source().migration()?.p2p {
        bench.source().set(State::PreCopyP2p)?;
        drain_precopy(&mut *stream, &mut all, limit)?;
    }
    let slot = bench.source();
    slot.set(State::StopCopy)?;
    all.extend(slot.drain(&mut *stream)?);
    drop(stream);
    let plain = slot.stop_copy_again()?;
    bench.fresh()?;
    Ok((all, plain))
}

fn same_state(bench: &mut Bench) -> Answer {
    bench.source().require(State::PreCopy)?;
    bench.require_repeatable()?;
    let (precopied, plain) = both_ways(bench, |_| Ok(()))?;
    bench.same_state(&precopied, &plain)
}

fn follows_changes(bench: &mut Bench) -> Answer {
    bench.source().require(State::PreCopy)?;
    bench.require_repeatable()?;
    let before = bench.blob()?;
    let (precopied, plain) = both_ways(bench, Bench::change)?;
    if before[..] == plain[..] {
        return not_observed("what was changed from outside is not part of the state");
    }
    bench.same_state(&precopied, &plain)
}

fn quiesced(bench: &mut Bench) -> Answer {
    let slot = bench.source();
    slot.require(State::PreCopyP2p)?;
    slot.quiet(State::RunningP2p)?;
    let mut stream = slot.save(State::PreCopyP2p)?;
    let mut all = Vec::new();
    drain_precopy(&mut *stream, &mut all, slot.limit_bytes())?;
    slot.quiet(State::StopCopy)?;
    all.extend(slot.drain(&mut *stream)?);
    drop(stream);
    bench.fresh()?;
    let target = bench.target();
    let held = target.load(&all, Pieces::Usual)?;
    target.quiet(State::Running)?;
    drop(held);
    holds(format!("{} bytes, and they load", all.len()))
}

fn abandoned(bench: &mut Bench) -> Answer {
    let mut stream = begin(bench)?;
    stream.read(&mut [0; 16])?;
    let slot = bench.source();
    slot.quiet(State::Running)?;
    drop(stream);
    let blob = slot.stop_copy()?;
    bench.fresh()?;
    let target = bench.target();
    let held = target.load(&blob, Pieces::Usual)?;
    target.quiet(State::Running)?;
    drop(held);
    holds("the next save was whole")
}

fn info_in_precopy(bench: &mut Bench) -> Answer {
    let mut stream = begin(bench)?;
    let first = info(&mut *stream)?;
    if bench.source().migration()?.p2p {
        bench.source().set(State::PreCopyP2p)?;
        info(&mut *stream).map_err(|instead| instead.during(State::PreCopyP2p))?;
    }
    holds(format!("initial {} and dirty {} bytes at the start", first.initial_bytes, first.dirty_bytes))
}

fn info_nowhere_else(bench: &mut Bench) -> Answer {
    let mut stream = begin(bench)?;
    info(&mut *stream)?;
    bench.source().set(State::StopCopy)?;
    match stream.precopy_info() {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => holds("EINVAL in STOP_COPY"),
        Err(error) => differs(format!("in STOP_COPY it answers {}", errno_name(&error))),
        Ok(info) => differs(format!("in STOP_COPY it answers {info:?}")),
    }
}

/// All that a session says of what is left, while it is read until nothing is due, with changes on the way where
/// there is something that makes them.
fn watch(bench: &mut Bench) -> Result<Vec<PrecopyInfo>, Instead> {
    let mut stream = begin(bench)?;
    let mut infos = vec![info(&mut *stream)?];
    let mut buffer = vec![0; 4096];
    for round in 0..QUESTIONS {
        let read = stream.read(&mut buffer)?;
        if round % 8 == 3 {
            // Without a stimulus there is less to see, but what there is counts.
            let _ = bench.change();
        }
        infos.push(info(&mut *stream)?);
        if matches!(read, Read::Zero | Read::NothingNow) && round > 16 {
            break;
        }
        // Large devices in large steps: it is the course that is of interest.
        buffer.resize((buffer.len() * 2).min(1 << 20), 0);
    }
    Ok(infos)
}

fn initial_only_falls(bench: &mut Bench) -> Answer {
    let infos = watch(bench)?;
    for pair in infos.windows(2) {
        if pair[1].initial_bytes > pair[0].initial_bytes && !pair[1].reinit {
            return differs(format!(
                "initial_bytes rose from {} to {} without REINIT",
                pair[0].initial_bytes, pair[1].initial_bytes
            ));
        }
    }
    let reinits = infos.iter().filter(|info| info.reinit).count();
    let first = infos.first().map_or(0, |info| info.initial_bytes);
    let last = infos.last().map_or(0, |info| info.initial_bytes);
    holds(format!("from {first} to {last} in {} answers, {reinits} REINIT", infos.len()))
}

fn reinit_after_opt_in(bench: &mut Bench) -> Answer {
    let opted_in = bench.source().capabilities()?.precopy_reinit;
    let infos = watch(bench)?;
    let reinits = infos.iter().filter(|info| info.reinit).count();
    match (opted_in, reinits) {
        (true, _) => holds(format!("opted in; {reinits} REINIT in {} answers", infos.len())),
        (false, 0) => holds(format!("not opted in; none in {} answers", infos.len())),
        (false, _) => differs(format!("not opted in, and {reinits} REINIT in {} answers", infos.len())),
    }
}

fn initial_is_readable(bench: &mut Bench) -> Answer {
    let mut stream = begin(bench)?;
    let mut buffer = vec![0; 4096];
    for round in 0..QUESTIONS {
        let left = info(&mut *stream)?.initial_bytes;
        if left == 0 {
            return holds(format!("{round} reads until it was 0"));
        }
        let read = stream.read(&mut buffer)?;
        if !matches!(read, Read::Bytes(_)) {
            return differs(format!("initial_bytes is {left}, and a read brought {read:?}"));
        }
        buffer.resize((buffer.len() * 2).min(1 << 20), 0);
    }
    holds(format!("{QUESTIONS} reads, and more to come"))
}

fn initial_reaches_zero(bench: &mut Bench) -> Answer {
    let limit = bench.source().limit_bytes();
    let mut stream = begin(bench)?;
    info(&mut *stream)?;
    let mut all = Vec::new();
    let mut left = 0;
    // A REINIT on the way is new initial data: it has to be read, too.
    for _ in 0..16 {
        drain_precopy(&mut *stream, &mut all, limit)?;
        left = info(&mut *stream)?.initial_bytes;
        if left == 0 {
            return holds(format!("0 after {} bytes", all.len()));
        }
    }
    differs(format!("initial_bytes is still {left} after all there was to read, {} bytes", all.len()))
}
