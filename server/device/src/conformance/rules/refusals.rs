//! Loading: what has to be refused, at the write or on leaving RESUMING.
//!
//! ```text
//!   bytes --write--> refused: that is final, RESUMING is not left
//!               \--> taken --SET RUNNING--> refused: RESUMING stays, until a reset
//!                                      \--> taken: the rule is broken
//! ```

use std::fmt;

use vfio_checkpoint_fsm::State;

use super::super::bench::{Bench, Slot};
use super::super::pieces::{Pieces, write_all};
use super::super::rule::{Answer, Instead, Rule, Weight, differs, holds, not_applicable};
use super::{errno_name, source};
use crate::kernel::quirks::Quirk;

const SEALED: Weight = Weight::Tolerated {
    how: "RESUMING is left only with a seal over exactly the bytes that were saved, so such a state cannot be complete",
};

pub(super) const RULES: &[Rule] = &[
    Rule {
        id: "truncated-state-refused",
        contract: "A state that was cut short is refused, by a byte as by half.",
        source: source::DATA_FD,
        weight: SEALED,
        quirks: &[],
        check: truncated,
    },
    Rule {
        id: "empty-state-refused",
        contract: "RESUMING is not left for RUNNING where nothing was written.",
        source: source::DATA_FD,
        weight: Weight::Matters {
            consequence: "a device would run with whatever it held, as if it had been restored",
        },
        quirks: &[],
        check: empty,
    },
    Rule {
        id: "trailing-byte-refused",
        contract: "A state with a byte too many is refused.",
        source: source::DATA_FD,
        weight: SEALED,
        quirks: &[],
        check: |bench| trailing(bench, 1),
    },
    Rule {
        id: "trailing-page-refused",
        contract: "A state with 4096 bytes too many is refused.",
        source: source::DATA_FD,
        weight: SEALED,
        quirks: &[],
        check: |bench| trailing(bench, 4096),
    },
    Rule {
        id: "foreign-state-refused",
        contract: "Bytes that do not begin as the device's states do are refused.",
        source: source::DATA_FD,
        weight: Weight::Matters { consequence: "a device would run with a state of something else" },
        quirks: &[],
        check: foreign,
    },
    Rule {
        id: "session-takes-a-whole-state",
        contract: "A state does not load in two sessions: the second half on its own is refused.",
        source: source::DATA_FD,
        weight: Weight::Matters {
            consequence: "what an aborted restore left behind would become part of the next",
        },
        quirks: &[],
        check: two_sessions,
    },
    Rule {
        id: "failed-write-is-final",
        contract: "After a write that failed RESUMING is not left for RUNNING.",
        source: source::DATA_FD,
        weight: Weight::Tolerated { how: "the driver takes any write error as final and resets the device" },
        quirks: &[Quirk::LoadsAfterFailedWrite],
        check: failed_write,
    },
    Rule {
        id: "refused-state-stays-in-resuming",
        contract: "A device that refuses a state stays in RESUMING.",
        source: source::STATES,
        weight: Weight::Tolerated {
            how: "the state is read back, and a destination is reset from wherever it is",
        },
        quirks: &[],
        check: stays,
    },
    Rule {
        id: "restore-after-a-refusal",
        contract: "After a refused state a reset leads to RUNNING, and a sound state loads.",
        source: source::RESET,
        weight: Weight::Matters { consequence: "one damaged state would cost the slot" },
        quirks: &[],
        check: after_a_refusal,
    },
];

/// How a device dealt with a state that it should refuse.
enum Dealt {
    AtTheWrite(String),
    OnLeaving(String),
    Took,
}

impl fmt::Display for Dealt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtTheWrite(errno) => write!(f, "{errno} from the write"),
            Self::OnLeaving(errno) => write!(f, "{errno} on leaving RESUMING"),
            Self::Took => f.write_str("taken, and the device runs"),
        }
    }
}

/// Offers `parts`, one session for all of them, and tries to run.
fn offer(slot: &mut Slot, parts: &[&[u8]]) -> Result<Dealt, Instead> {
    let mut stream = slot.resume()?;
    for part in parts {
        if let Err((_, error)) = write_all(&mut *stream, part, Pieces::Usual) {
            return Ok(Dealt::AtTheWrite(errno_name(&error)));
        }
    }
    let answer = slot.device()?.set_state(State::Running);
    drop(stream);
    Ok(match answer {
        Ok(_) => Dealt::Took,
        Err(error) => Dealt::OnLeaving(errno_name(&error)),
    })
}

fn must_refuse(slot: &mut Slot, case: &str, parts: &[&[u8]]) -> Answer {
    slot.fresh()?;
    match offer(slot, parts).map_err(|instead| instead.during(case))? {
        dealt @ (Dealt::AtTheWrite(_) | Dealt::OnLeaving(_)) => holds(format!("{case}: {dealt}")),
        Dealt::Took => differs(format!("{case}: {}", Dealt::Took)),
    }
}

fn truncated(bench: &mut Bench) -> Answer {
    let blob = bench.blob()?;
    let target = bench.target();
    target.require_undo()?;
    let cases = [("a byte short", blob.len() - 1), ("half", blob.len() / 2), ("one byte", 1)];
    let mut seen = Vec::new();
    for (case, length) in cases {
        seen.push(must_refuse(target, case, &[&blob[..length]])?);
    }
    holds(seen.join(", "))
}

fn empty(bench: &mut Bench) -> Answer {
    let target = bench.target();
    target.require_undo()?;
    must_refuse(target, "nothing written", &[])
}

fn trailing(bench: &mut Bench, bytes: usize) -> Answer {
    let blob = bench.blob()?;
    let target = bench.target();
    target.require_undo()?;
    must_refuse(target, &format!("{bytes} too many"), &[&blob, &vec![0; bytes]])
}

/// The blob with other first bytes. Nothing behind them changes, so that a device which takes it takes nothing that
/// is not its own.
fn with_foreign_start(blob: &[u8]) -> Vec<u8> {
    let mut foreign = blob.to_vec();
    foreign.iter_mut().take(8).for_each(|byte| *byte ^= 0xff);
    foreign
}

fn foreign(bench: &mut Bench) -> Answer {
    let foreign = with_foreign_start(&bench.blob()?);
    let target = bench.target();
    target.require_undo()?;
    must_refuse(target, "other first bytes", &[&foreign])
}

fn two_sessions(bench: &mut Bench) -> Answer {
    let blob = bench.blob()?;
    let target = bench.target();
    target.require_undo()?;
    let (first, second) = blob.split_at(blob.len() / 2);
    let mut stream = target.resume()?;
    write_all(&mut *stream, first, Pieces::Usual).map_err(|(_, error)| error)?;
    drop(stream);
    must_refuse(target, "the second half after a reset", &[second])
}

fn failed_write(bench: &mut Bench) -> Answer {
    let foreign = with_foreign_start(&bench.blob()?);
    let target = bench.target();
    target.require_undo()?;
    let mut stream = target.resume()?;
    let Err((_, failed)) = write_all(&mut *stream, &foreign, Pieces::Usual) else {
        return not_applicable("the device checks a state only when RESUMING is left; no write failed");
    };
    let left = target.device()?.set_state(State::Running);
    drop(stream);
    match left {
        Err(error) => {
            holds(format!("{} from the write, {} on leaving", errno_name(&failed), errno_name(&error)))
        }
        Ok(_) => differs(format!("{} from the write, and the device runs all the same", errno_name(&failed))),
    }
}

fn stays(bench: &mut Bench) -> Answer {
    let blob = bench.blob()?;
    let target = bench.target();
    target.require_undo()?;
    if let Dealt::Took = offer(target, &[&blob[..blob.len() / 2]])? {
        return not_applicable("the device does not refuse a state that was cut short");
    }
    target.expect_state(State::Resuming)?;
    holds("RESUMING")
}

fn after_a_refusal(bench: &mut Bench) -> Answer {
    let blob = bench.blob()?;
    let target = bench.target();
    target.require_reset()?;
    for bytes in [&blob[..blob.len() / 2], &with_foreign_start(&blob)] {
        target.fresh()?;
        offer(target, &[bytes])?;
        target.device()?.reset()?;
        target.expect_state(State::Running)?;
        let stream = target.load(&blob, Pieces::Usual)?;
        target.quiet(State::Running)?;
        drop(stream);
    }
    holds("reset to RUNNING, and a sound state loaded")
}
