//! What must hold in every state, judged from the devices and from what was put on record, and not from what an agent
//! believes.
//!
//! ```text
//!   devices of both sides --.
//!   records ----------------+--> one function per property: does it hold here?
//!   Ghost ------------------'
//! ```
//! The numbers are those of the design's invariants.
//!
//! # Invariants
//! The second one has exceptions, and these alone: the copy was destroyed by a crash without a holder (of the source
//! before the destination had Committed on record, or of the destination after it, fencing included), or an
//! administrator let it go without evidence that it runs. What ends so is reported as a loss, so the seventh and the
//! agreement of both ends make the same exception.

use vfio_checkpoint_fsm::handover::{ArrivalStep, OfferStep, Verdict};
use vfio_checkpoint_fsm::{SaveState, State};

use crate::handover::HandOver;
use crate::world::{ATTEMPTS, Device, Holds, Word, World, Wrong};

type Holding = fn(&HandOver, &World) -> bool;

pub(crate) const ONE_RUNNING: &str = "1: at most one running copy";
pub(crate) const ONE_RECOVERABLE: &str = "2: at least one recoverable copy";
pub(crate) const VERIFIED: &str = "3: what leaves RESUMING was verified";
pub(crate) const NO_STALE_MESSAGE: &str = "6: a stale epoch moves nothing";
pub(crate) const NO_STALE_COPY: &str = "6: what runs there is what stopped here";
pub(crate) const TRUE_REPORT: &str = "7: what is reported is so";
pub(crate) const ONE_VERDICT: &str = "a verdict never changes";
pub(crate) const ENDS_AGREE: &str = "the end here and the verdict there agree";
pub(crate) const TRUE_REFUSAL: &str = "what was refused has not run";
pub(crate) const COMMIT_AFTER_PREPARED: &str = "Commit comes after Prepared";
pub(crate) const NO_FORK: &str = "what has run there runs here on an administrator's word alone";
pub(crate) const NOT_CALLED_OFF: &str = "what was let go of here is not called off there";

/// All properties.
pub(crate) const PROPERTIES: [(&str, Holding); 12] = [
    (ONE_RUNNING, one_running),
    (ONE_RECOVERABLE, one_recoverable),
    (VERIFIED, |_, world| world.ghost.wrong != Some(Wrong::Unverified)),
    (NO_STALE_MESSAGE, |_, world| world.ghost.wrong != Some(Wrong::StaleMessage)),
    (NO_STALE_COPY, |_, world| world.ghost.wrong != Some(Wrong::StaleCopy)),
    (TRUE_REPORT, |_, world| world.ghost.wrong != Some(Wrong::FalseReport)),
    (ONE_VERDICT, |_, world| world.ghost.wrong != Some(Wrong::SecondVerdict)),
    (ENDS_AGREE, ends_agree),
    (TRUE_REFUSAL, |_, world| {
        (0..ATTEMPTS).all(|at| !world.ghost.ran[at] || world.ghost.verdicts[at] != Some(Verdict::Refused))
    }),
    (COMMIT_AFTER_PREPARED, |_, world| {
        world.source.durable != OfferStep::Committing || world.ghost.prepared[usize::from(world.attempt)]
    }),
    (NO_FORK, |_, world| world.ghost.wrong != Some(Wrong::Fork)),
    (NOT_CALLED_OFF, |_, world| {
        let let_go = (0..ATTEMPTS).find(|at| world.ghost.ends[*at] == Some(SaveState::HandedOver));
        let_go.is_none_or(|at| !world.said[at].has(Word::Abandon))
    }),
];

fn one_running(_: &HandOver, world: &World) -> bool {
    let runs = |devices: &[Device]| devices.iter().any(|device| device.runs_copy());
    // Stricter than device by device: no part of the set runs on either side while any part runs on the other.
    !(runs(&world.here) && runs(&world.there))
}

fn one_recoverable(checked: &HandOver, world: &World) -> bool {
    let whole = |devices: &[Device]| {
        devices[..checked.setup.devices]
            .iter()
            .all(|device| matches!(device.holds, Holds::Copy(_)) && device.state != State::Error)
    };
    let committed = world.ghost.verdicts.contains(&Some(Verdict::Committed));
    let on_record = match world.destination.durable {
        Some(ArrivalStep::Prepared | ArrivalStep::Committing | ArrivalStep::Over(Verdict::Committed)) => true,
        Some(
            ArrivalStep::Loading
            | ArrivalStep::Reverting
            | ArrivalStep::Over(Verdict::Refused | Verdict::Lost | Verdict::Broken),
        )
        | None => false,
    };
    whole(&world.here)
        || (on_record || committed) && whole(&world.there)
        || world.ghost.destroyed
        || world.ghost.forgone
}

fn ends_agree(_: &HandOver, world: &World) -> bool {
    (0..ATTEMPTS).all(|at| {
        let committed = world.ghost.verdicts[at] == Some(Verdict::Committed);
        match world.ghost.ends[at] {
            None => true,
            Some(SaveState::HandedOver) => committed || world.ghost.forgone,
            Some(_) => !committed || world.ghost.resumed_on_word,
        }
    })
}
