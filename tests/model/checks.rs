//! The checks: every setup without a plant holds and ends, and every plant is found.
//!
//! ```text
//!   setups ---> every property in every state, and every run ends    figures: the number of states
//!   plants ---> the property that finds each                         the shortest trace
//! ```
//! `MODEL_DEPTH=deep cargo test -p vfio-checkpoint-tests --release --test model` allows more of everything.

use std::collections::BTreeSet;
use std::env;
use std::fmt::Write as _;
use std::io::Write as _;

use stateright::{Checker, Model};

use crate::handover::{Action, HandOver};
use crate::liveness::{Endless, every_run_ends};
use crate::oracle;
use crate::setup::{Budget, Commit, Plant, Second, Setup};

const NOTHING: Budget = Budget {
    source_crashes: 0,
    destination_crashes: 0,
    destination_sets: 0,
    source_sets: 0,
    writes: 0,
    damaged: 0,
};
const A_CRASH_EACH: Budget = Budget { source_crashes: 1, destination_crashes: 1, ..NOTHING };

fn is_deep() -> bool {
    env::var("MODEL_DEPTH").is_ok_and(|depth| depth == "deep")
}

/// What is checked. Messages are lost, doubled, delayed and reordered in all of them.
fn setups() -> Vec<Setup> {
    let admin = |setup| Setup { admin: true, ..setup };
    let mut setups = vec![
        Setup {
            cancels: true,
            pre_copy: true,
            commit: Commit::Manual,
            ..admin(Setup::new(
                "MANUAL, pre-copy, cancelled, damaged",
                1,
                true,
                Budget { damaged: 1, ..NOTHING },
            ))
        },
        Setup {
            cancels: true,
            gone: true,
            ..admin(Setup::new("one device, a crash each, or gone for good", 1, false, A_CRASH_EACH))
        },
        Setup {
            commit: Commit::Manual,
            ..admin(Setup::new("MANUAL, P2P, a crash each", 1, true, A_CRASH_EACH))
        },
        admin(Setup::new(
            "two crashes of the source",
            1,
            true,
            Budget { source_crashes: 2, writes: 1, ..NOTHING },
        )),
        admin(Setup::new(
            "two crashes of the destination",
            1,
            false,
            Budget { destination_crashes: 2, writes: 1, ..NOTHING },
        )),
        admin(Setup::new("a write that fails", 1, false, Budget { writes: 1, ..A_CRASH_EACH })),
        admin(Setup::new("two devices, a crash each", 2, true, A_CRASH_EACH)),
        admin(Setup::new(
            "two devices, two SETs that fail",
            2,
            true,
            Budget { destination_crashes: 1, destination_sets: 2, ..NOTHING },
        )),
        admin(Setup::new(
            "two devices, a SET that fails each",
            2,
            true,
            Budget { source_crashes: 1, destination_sets: 1, source_sets: 1, ..NOTHING },
        )),
        Setup {
            second: Second::SameEpoch,
            ..Setup::new("two attempts, one epoch", 1, false, Budget { damaged: 1, ..NOTHING })
        },
        Setup {
            second: Second::HigherEpoch,
            ..admin(Setup::new(
                "two attempts, two epochs",
                1,
                false,
                Budget { destination_sets: 1, ..NOTHING },
            ))
        },
    ];
    if is_deep() {
        let once_more = |count: u8| if count > 0 { count + 1 } else { 0 };
        for setup in &mut setups {
            let budget = &mut setup.budget;
            for count in [
                &mut budget.source_crashes,
                &mut budget.destination_crashes,
                &mut budget.destination_sets,
                &mut budget.source_sets,
                &mut budget.writes,
            ] {
                *count = once_more(*count);
            }
        }
        setups.push(Setup {
            second: Second::SameEpoch,
            ..admin(Setup::new("two attempts, a crash each", 1, false, A_CRASH_EACH))
        });
    }
    setups
}

fn trace(actions: &[Action]) -> String {
    actions.iter().enumerate().fold(String::new(), |mut text, (index, action)| {
        let _ = write!(text, "\n  {:>2}. {action:?}", index + 1);
        text
    })
}

/// The shortest way to where a property does not hold. With one property alone the walk ends at the first such state, and
/// in breadth that is the nearest.
fn shortest(setup: Setup, property: &'static str) -> Option<Vec<Action>> {
    let checked = HandOver { only: Some(property), ..HandOver::new(setup) };
    checked.checker().spawn_bfs().join().discovery(property).map(stateright::Path::into_actions)
}

#[test]
fn the_invariants_hold_and_every_run_ends() {
    let (mut total, mut outcomes) = (0, BTreeSet::new());
    for setup in setups() {
        let checked = HandOver::new(setup);
        let walk = checked.clone().checker().spawn_bfs().join();
        if let Some((property, _)) = walk.discoveries().into_iter().next() {
            let way = shortest(setup, property).expect("what was found is found again");
            panic!("{}: does not hold: {property}{}", setup.name, trace(&way));
        }
        let seen = match every_run_ends(&checked) {
            Ok(seen) => seen,
            Err(Endless::Cycle(way)) => panic!("{}: goes round{}", setup.name, trace(&way)),
            Err(Endless::Stuck(way, world)) => {
                panic!("{}: does not end{}\n{world:#?}", setup.name, trace(&way))
            }
        };
        assert_eq!(seen.states, walk.unique_state_count(), "both walks see the same states");
        total += seen.states;
        let _ = writeln!(
            std::io::stdout(),
            "figures: model: {}: {} states, {} of them ends, {} steps deep",
            setup.name,
            seen.states,
            seen.ends,
            walk.max_depth()
        );
        outcomes.extend(seen.outcomes);
    }
    let _ = writeln!(std::io::stdout(), "figures: model: {total} states in all");
    let expected = [
        "Aborted, COMMITTED",
        "Aborted, LOST",
        "Aborted, REFUSED",
        "Aborted, nothing",
        "Aborted, BROKEN",
        "HandedOver, COMMITTED",
        "HandedOver, REFUSED",
        "HandedOver, LOST",
        "HandedOver, BROKEN",
        "HandedOver, nothing",
        "Lost, COMMITTED",
        "Lost, REFUSED",
        "Lost, LOST",
        "Lost, BROKEN",
        "Lost, nothing",
    ];
    // A model in which something cannot happen at all proves nothing about it.
    assert_eq!(outcomes, expected.map(str::to_owned).into());
}

/// How a plant is found.
enum Found {
    By(&'static str),
    /// A run that does not end.
    Endless,
}

fn finds(plant: Plant) -> (Found, Setup) {
    use Found::{By, Endless};
    let sets = Budget { destination_sets: 1, ..A_CRASH_EACH };
    let plain = Setup { plant: Some(plant), ..Setup::new("planted", 1, false, sets) };
    let admin = Setup { admin: true, ..plain };
    let again = Setup { second: Second::SameEpoch, budget: NOTHING, ..plain };
    let writes = Setup { budget: Budget { writes: 1, ..A_CRASH_EACH }, ..plain };
    match plant {
        Plant::CommitsBeforePrepared => (By(oracle::COMMIT_AFTER_PREPARED), plain),
        Plant::RunsUnprepared => (By(oracle::VERIFIED), plain),
        Plant::ResumesOnSilence | Plant::RefusesFromNothing | Plant::RefusesAfterCommitting => {
            (By(oracle::ONE_RUNNING), plain)
        }
        Plant::UnguardedForce => (By(oracle::ONE_RUNNING), admin),
        Plant::ForgetsRefusal => (By(oracle::ONE_VERDICT), plain),
        Plant::ResetIsPreserved => (By(oracle::TRUE_REPORT), plain),
        Plant::RecordsAfterSet => (By(oracle::TRUE_REFUSAL), plain),
        Plant::CommitsPart => {
            let devices = Setup::new("planted", 2, true, sets);
            (By(oracle::TRUE_REPORT), Setup { plant: Some(plant), ..devices })
        }
        Plant::IdentityIgnored => {
            (By(oracle::NO_STALE_MESSAGE), Setup { second: Second::HigherEpoch, ..again })
        }
        Plant::HandoverIgnored => (By(oracle::ONE_RUNNING), again),
        Plant::LetsGoOnSent => (By(oracle::ONE_RECOVERABLE), plain),
        Plant::FailedWriteNotMade => (By(oracle::ONE_RUNNING), writes),
        Plant::JudgesByDevices => (By(oracle::NO_STALE_COPY), writes),
        Plant::GoesOnUnrecorded => {
            let budget = Budget { destination_crashes: 1, destination_sets: 1, writes: 1, ..NOTHING };
            (By(oracle::TRUE_REPORT), Setup { budget, ..plain })
        }
        Plant::TicketTwice => (By(oracle::ONE_RECOVERABLE), again),
        Plant::OldTicket => (By(oracle::NO_STALE_MESSAGE), again),
        Plant::LostIsRefused => (By(oracle::NO_FORK), plain),
        Plant::CallsOffWhatIsLetGo => (By(oracle::NOT_CALLED_OFF), admin),
        Plant::OpensBeforeVerdict => {
            (By(oracle::TRUE_REPORT), Setup { budget: Budget { destination_crashes: 2, ..NOTHING }, ..plain })
        }
        Plant::NoDeadlineAfterCrash | Plant::AsksOnce => (Endless, admin),
    }
}

#[test]
fn every_planted_bug_is_found() {
    for plant in Plant::ALL {
        let (found, setup) = finds(plant);
        let sound = Setup { plant: None, ..setup };
        let (by, way) = match found {
            Found::By(property) => {
                assert_eq!(shortest(sound, property), None, "without {plant:?}: {property}");
                (property, shortest(setup, property))
            }
            Found::Endless => {
                let way = match every_run_ends(&HandOver::new(setup)) {
                    Ok(_) => None,
                    Err(Endless::Cycle(way) | Endless::Stuck(way, _)) => Some(way),
                };
                ("every run ends", way)
            }
        };
        let way = way.unwrap_or_else(|| panic!("{plant:?} is not found by: {by}"));
        println!("{plant:?} is found by: {by}{}", trace(&way));
        let _ = writeln!(std::io::stdout(), "figures: model: {plant:?}: {by}, after {} steps", way.len());
    }
}
