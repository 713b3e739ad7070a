//! Data fds: when one comes, how it is read, when it is over.

use vfio_checkpoint_fsm::State;

use super::super::bench::{Bench, equal};
use super::super::pieces::{Pieces, drain, write_all};
use super::super::rule::{Answer, Instead, Rule, Weight, differs, holds};
use super::{errno_name, source};
use crate::{Read, SaveStream, chain};

pub(super) const RULES: &[Rule] = &[
    Rule {
        id: "one-stream-per-session",
        contract: "PRE_COPY, PRE_COPY_P2P and STOP_COPY of one session share one data stream; none but the first brings one.",
        source: source::DATA_FD,
        weight: Weight::Matters {
            consequence: "the state would be split over two streams, and the second part lost",
        },
        quirks: &[],
        check: one_stream,
    },
    Rule {
        id: "stream-goes-on-into-stop-copy",
        contract: "The stream of PRE_COPY is read on in STOP_COPY, to the end of the whole state.",
        source: source::DATA_FD,
        weight: Weight::Matters { consequence: "what pre-copy did not bring would be lost" },
        quirks: &[],
        check: goes_on,
    },
    Rule {
        id: "stop-copy-ends-by-zero",
        contract: "In STOP_COPY a stream has something to read, and its end is read() == 0, never ENOMSG.",
        source: source::DATA_FD,
        weight: Weight::Matters { consequence: "a save would never end, or fail at its end" },
        quirks: &[],
        check: ends_by_zero,
    },
    Rule {
        id: "stop-copy-end-stays",
        contract: "After the end of a STOP_COPY stream every further read is the end again.",
        source: source::DATA_FD,
        weight: Weight::Tolerated { how: "a session reads no further once it has seen the end" },
        quirks: &[],
        check: end_stays,
    },
    Rule {
        id: "reads-of-any-size",
        contract: "The stream's bytes do not depend on the sizes of the reads.",
        source: source::DATA_FD,
        weight: Weight::Matters {
            consequence: "bytes would be lost wherever a read is shorter than what the driver expects",
        },
        quirks: &[],
        check: any_size,
    },
    Rule {
        id: "save-leaves-the-state-alone",
        contract: "Reading the state out does not change it: two stop-copies of a stopped device are equal.",
        source: source::STATES,
        weight: Weight::Matters {
            consequence: "a save could not be taken back; or the stream holds more than state (a time, a counter), and then \
                          the rules that compare states cannot be observed",
        },
        quirks: &[],
        check: twice,
    },
    Rule {
        id: "rejected-set-keeps-the-save-stream",
        contract: "A SET that the kernel rejects leaves the session's save stream open and where it was.",
        source: source::WALK,
        weight: Weight::Matters { consequence: "the only copy of the state read so far would be cut short" },
        quirks: &[],
        check: rejected_while_saving,
    },
    Rule {
        id: "rejected-set-keeps-the-restore-stream",
        contract: "A SET that the kernel rejects leaves the session's restore stream open and where it was.",
        source: source::WALK,
        weight: Weight::Tolerated {
            how: "the driver checks a move before it asks, and a failed restore is begun anew",
        },
        quirks: &[],
        check: rejected_while_loading,
    },
    Rule {
        id: "stream-ends-with-its-session",
        contract: "Once the saving states are left a read on their stream is an error.",
        source: source::DATA_FD,
        weight: Weight::Tolerated { how: "the driver drops the stream with the session and never reads on" },
        quirks: &[],
        check: ends_with_session,
    },
    Rule {
        id: "new-session-new-stream",
        contract: "A second session has a stream of its own, from the beginning; the first one's does not come back to life.",
        source: source::DATA_FD,
        weight: Weight::Matters { consequence: "a stream would begin in the middle of a state" },
        quirks: &[],
        check: new_session,
    },
    Rule {
        id: "closing-the-stream-moves-nothing",
        contract: "Closing a data fd early leaves the device where it is, and it can go on from there.",
        source: source::DATA_FD,
        weight: Weight::Matters {
            consequence: "a caller that goes away would change the device behind the driver's back",
        },
        quirks: &[],
        check: closed_early,
    },
    Rule {
        id: "save-can-be-abandoned",
        contract: "A save that is given up half-way runs on from where it was, and a later save is whole.",
        source: source::STATES,
        weight: Weight::Matters { consequence: "a cancelled save would cost the device's state" },
        quirks: &[],
        check: abandoned,
    },
];

/// Reads a few bytes, as a session in its middle has.
fn read_some(stream: &mut dyn SaveStream, most: usize) -> Result<Vec<u8>, Instead> {
    let mut buffer = vec![0; most];
    match stream.read(&mut buffer)? {
        Read::Bytes(bytes) => buffer.truncate(bytes),
        Read::Zero | Read::NothingNow => buffer.clear(),
    }
    Ok(buffer)
}

fn one_stream(bench: &mut Bench) -> Answer {
    let slot = bench.source();
    slot.require(State::PreCopy)?;
    let stream = slot.save(State::PreCopy)?;
    let mut way = vec![State::PreCopy.name()];
    let p2p = [State::PreCopyP2p, State::PreCopy, State::PreCopyP2p];
    let middle = if slot.migration()?.p2p { &p2p[..] } else { &[] };
    for state in middle.iter().chain(&[State::StopCopy]) {
        slot.quiet(*state)?;
        way.push(state.name());
    }
    drop(stream);
    holds(format!("one stream for {}", way.join(" ")))
}

fn goes_on(bench: &mut Bench) -> Answer {
    let slot = bench.source();
    slot.require(State::PreCopy)?;
    let mut stream = slot.save(State::PreCopy)?;
    let mut all = read_some(&mut *stream, 16)?;
    if slot.migration()?.p2p {
        slot.set(State::PreCopyP2p)?;
        all.extend(read_some(&mut *stream, 16)?);
    }
    slot.set(State::StopCopy)?;
    all.extend(slot.drain(&mut *stream)?);
    drop(stream);
    let whole = slot.stop_copy_again()?;
    bench.fresh()?;
    bench.require_repeatable()?;
    bench.same_state(&all, &whole)
}

fn ends_by_zero(bench: &mut Bench) -> Answer {
    let all = bench.source().stop_copy()?;
    if all.is_empty() {
        differs("a stream without a byte")
    } else {
        holds(format!("0 after {} bytes", all.len()))
    }
}

fn end_stays(bench: &mut Bench) -> Answer {
    let slot = bench.source();
    let mut stream = slot.save(State::StopCopy)?;
    slot.drain(&mut *stream)?;
    for again in 1..=3 {
        let read = stream.read(&mut [0; 64])?;
        if read != Read::Zero {
            return differs(format!("read {again} after the end brought {read:?}"));
        }
    }
    holds("0, three times more")
}

fn any_size(bench: &mut Bench) -> Answer {
    bench.require_repeatable()?;
    let slot = bench.source();
    let mut first: Option<Vec<u8>> = None;
    for pieces in Pieces::ALL {
        let mut stream = slot.save(State::StopCopy)?;
        let all = drain(&mut *stream, pieces, slot.limit_bytes())
            .map_err(|instead| instead.during(format!("{pieces:?} reads")))?;
        drop(stream);
        slot.quiet(State::Stop)?;
        match &first {
            None => first = Some(all),
            Some(first) => {
                equal(first, &all).map_err(|instead| instead.during(format!("{pieces:?} reads")))?;
            }
        }
    }
    holds("the same bytes by usual, single-byte, odd and huge reads")
}

fn twice(bench: &mut Bench) -> Answer {
    let slot = bench.source();
    let first = slot.stop_copy()?;
    let second = slot.stop_copy_again()?;
    equal(&first, &second)?;
    holds(format!("{} bytes, twice", first.len()))
}

fn rejected_while_saving(bench: &mut Bench) -> Answer {
    bench.require_repeatable()?;
    let slot = bench.source();
    let mut stream = slot.save(State::StopCopy)?;
    let mut all = read_some(&mut *stream, 5)?;
    // ERROR is rejected by every kernel; what it answers is another rule.
    let rejected = slot.device()?.set_state(State::Error);
    if rejected.is_ok() {
        return differs("the device went to ERROR on request");
    }
    all.extend(slot.drain(&mut *stream)?);
    drop(stream);
    equal(&all, &slot.stop_copy_again()?)?;
    holds("the rest came out of the same stream")
}

fn rejected_while_loading(bench: &mut Bench) -> Answer {
    let blob = bench.blob()?;
    let target = bench.target();
    target.require_undo()?;
    let mut stream = target.resume()?;
    let (first, rest) = blob.split_at(blob.len() / 2);
    write_all(&mut *stream, first, Pieces::Usual).map_err(|(_, error)| error)?;
    if target.device()?.set_state(State::Error).is_ok() {
        return differs("the device went to ERROR on request");
    }
    write_all(&mut *stream, rest, Pieces::Usual).map_err(|(_, error)| error)?;
    target.quiet(State::Running)?;
    holds("the rest went into the same stream, and the state was taken")
}

fn ends_with_session(bench: &mut Bench) -> Answer {
    let slot = bench.source();
    let mut stream = slot.save(State::StopCopy)?;
    slot.quiet(State::Stop)?;
    match stream.read(&mut [0; 64]) {
        Err(error) => holds(errno_name(&error)),
        Ok(read) => differs(format!("a read in STOP brought {read:?}")),
    }
}

fn new_session(bench: &mut Bench) -> Answer {
    bench.require_repeatable()?;
    let slot = bench.source();
    let mut old = slot.save(State::StopCopy)?;
    read_some(&mut *old, 10)?;
    slot.quiet(State::Stop)?;
    let mut new = slot.save(State::StopCopy)?;
    if let Ok(Read::Bytes(bytes)) = old.read(&mut [0; 64]) {
        return differs(format!("the first session's stream brought {bytes} bytes in the second session"));
    }
    let all = slot.drain(&mut *new)?;
    drop((old, new));
    equal(&all, &slot.stop_copy_again()?)?;
    holds("the second stream is whole, the first is over")
}

fn closed_early(bench: &mut Bench) -> Answer {
    let slot = bench.source();
    let mut stream = slot.save(State::StopCopy)?;
    read_some(&mut *stream, 5)?;
    drop(stream);
    slot.expect_state(State::StopCopy)?;
    slot.quiet(State::Running)?;
    slot.stop_copy()?;
    holds("stays in STOP_COPY, runs on, saves again")
}

fn abandoned(bench: &mut Bench) -> Answer {
    let blob = {
        let slot = bench.source();
        let mut stream = slot.save(State::StopCopy)?;
        read_some(&mut *stream, 5)?;
        slot.quiet(State::Running)?;
        drop(stream);
        slot.stop_copy()?
    };
    bench.fresh()?;
    let target = bench.target();
    let stream = target.load(&blob, Pieces::Usual)?;
    target.device()?.set_state(State::Running).map_err(|error| {
        Instead::Differs(format!("the state saved after an abandoned save does not load: {}", chain(&error)))
    })?;
    drop(stream);
    holds("the next save was whole")
}
