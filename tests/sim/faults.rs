//! What goes wrong in a run: drawn from its seed before it begins, and struck by the clock or by what has happened.

use std::time::Duration;

use vfio_checkpoint_fsm::State;

use crate::dice::Dice;
use crate::disk::SyncFault;

/// Between whom.
pub(crate) type Link = (&'static str, &'static str);

/// One thing that goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Messages between two hosts wait, and none is lost.
    Hold(Link, Duration),
    /// Messages between two hosts are lost, and what is connected stays broken.
    Partition(Link, Duration),
    /// Messages from the first to the second are lost.
    OneWay(Link, Duration),
    /// Messages take so long.
    Slow(Link, Duration, Duration),
    /// The agent dies after so many more pieces of work, and comes back.
    Kill {
        /// Whose.
        host: &'static str,
        /// Pieces of work that it still does.
        pieces: u64,
        /// So does the whole machine, and its holder.
        loses_power: bool,
        /// How long it is away.
        down: Duration,
    },
    /// Syncs of a journal go wrong.
    Disk {
        /// Whose.
        host: &'static str,
        /// How.
        what: SyncFault,
        /// So many syncs are good before.
        after: u32,
        /// How many go wrong then.
        times: u32,
    },
    /// A device refuses a SET, once, and stands where it stood.
    Set {
        /// Whose.
        host: &'static str,
        /// Which of its devices, by number.
        device: usize,
        /// What it refuses.
        target: State,
    },
    /// A device does not let itself be reset, once.
    Reset {
        /// Whose.
        host: &'static str,
        /// Which of its devices, by number.
        device: usize,
    },
    /// The machine loses power after so many more pieces of work, and never comes back.
    Gone {
        /// Which.
        host: &'static str,
        /// Pieces of work that it still does.
        pieces: u64,
    },
}

/// When it strikes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum When {
    /// When the simulation is this old.
    At(Duration),
    /// When so many things have happened.
    Line(usize),
    /// When this was said, by whomever.
    Said(&'static str),
}

/// A fault and its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Planned {
    pub(crate) when: When,
    pub(crate) fault: Fault,
}

/// The faults of a seed: none for one in eight, up to four.
pub(crate) fn draw(seed: u64, agents: &[&'static str]) -> Vec<Planned> {
    let dice = Dice::new(seed, "faults");
    let count = if dice.once_in(8) { 0 } else { 1 + dice.below(4) };
    (0..count).map(|_| Planned { when: when(&dice), fault: fault(&dice, agents) }).collect()
}

/// What is said around the moment at which devices change hands.
pub(crate) const TURNS: [&str; 7] = [
    "set PRE_COPY",
    "set STOP_COPY",
    "journal: commit of HELD",
    "journal: commit of COMMITTING",
    "journal: commit of RUNNING",
    "set RUNNING_P2P",
    "journal: commit of LETTING_GO",
];

/// The faults of a seed in which devices go from the first of two agents to the second: also between the two, and at their
/// devices. The second may be gone for good.
pub(crate) fn draw_migration(seed: u64, agents: [&'static str; 2]) -> Vec<Planned> {
    let dice = Dice::new(seed, "faults");
    let count = if dice.once_in(8) { 0 } else { 1 + dice.below(4) };
    let mut faults: Vec<_> = (0..count)
        .map(|_| {
            let when = match dice.below(8) {
                0 => When::At(dice.between(1, 400)),
                1..=3 => When::Line(usize::try_from(3 + dice.below(140)).unwrap()),
                _ => When::Said(dice.one_of(&TURNS)),
            };
            let fault = match dice.below(6) {
                0 => Fault::Set {
                    // Mostly where state arrives.
                    host: agents[usize::from(!dice.once_in(4))],
                    device: usize::try_from(dice.below(2)).unwrap(),
                    target: dice.one_of(&[
                        State::Running,
                        State::RunningP2p,
                        State::Resuming,
                        State::StopCopy,
                    ]),
                },
                1 | 2 => fault_on(&dice, agents[0], (agents[0], agents[1])),
                _ => {
                    let host = dice.one_of(&agents);
                    fault_on(&dice, host, ("client", host))
                }
            };
            Planned { when, fault }
        })
        .collect();
    if dice.once_in(12) {
        let when = When::Said(dice.one_of(&TURNS));
        faults.push(Planned { when, fault: Fault::Gone { host: agents[1], pieces: dice.below(8) } });
    }
    // Most that undoes an arrival resets its devices, and resets are rare else.
    let dice = Dice::new(seed, "resets");
    if !faults.is_empty() && dice.once_in(6) {
        let device = usize::try_from(dice.below(2)).unwrap();
        let fault = Fault::Reset { host: agents[usize::from(!dice.once_in(6))], device };
        faults.push(Planned { when: When::Line(3), fault });
    }
    faults
}

fn when(dice: &Dice) -> When {
    if dice.once_in(3) {
        When::At(dice.between(1, 400))
    } else {
        When::Line(usize::try_from(3 + dice.below(90)).unwrap())
    }
}

fn fault(dice: &Dice, agents: &[&'static str]) -> Fault {
    let host = dice.one_of(agents);
    fault_on(dice, host, ("client", host))
}

fn fault_on(dice: &Dice, host: &'static str, link: Link) -> Fault {
    let lasting = dice.between(10, if dice.once_in(4) { 1500 } else { 300 });
    match dice.below(10) {
        0 | 1 => Fault::Hold(link, lasting),
        2 => Fault::Partition(link, lasting),
        3 if dice.once_in(2) => Fault::OneWay(link, lasting),
        3 => Fault::OneWay((link.1, link.0), lasting),
        4 => Fault::Slow(link, dice.between(20, 300), lasting),
        5..=7 => {
            let (pieces, loses_power) = (dice.below(8), dice.once_in(3));
            Fault::Kill { host, pieces, loses_power, down: dice.between(1, 200) }
        }
        _ => {
            let what = dice.one_of(&[SyncFault::Fails, SyncFault::FailsLate]);
            let [after, times] =
                [dice.below(4), 1 + dice.below(3)].map(|drawn| u32::try_from(drawn).unwrap());
            // A commit in doubt is taken back at once. Where that fails too, and the agent dies before it can try again, its
            // next life believes what was never done: one such failure at a time is what it is built for.
            let times = if what == SyncFault::FailsLate { 1 } else { times };
            Fault::Disk { host, what, after, times }
        }
    }
}
