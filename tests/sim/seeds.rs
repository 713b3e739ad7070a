//! Many seeds, and what they show.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use crate::disk::SyncFault;
use crate::faults::{Fault, Planned, TURNS, When};
use crate::migrate;
use crate::pki::Pki;
use crate::transfer::{AGENTS, faults_of, run};
use crate::world::Ended;

/// How many seeds are run where it is not said: the same ones everywhere.
const SEEDS: u64 = 600;
/// The same for migrations: a few minutes of a processor.
const MIGRATIONS: u64 = 2000;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

fn pki() -> Arc<Pki> {
    Arc::new(Pki::new(&AGENTS))
}

/// Calls `each` with the seeds from 0 on, on every processor, until it says that it has seen enough. How many there were.
fn seeds(each: impl Fn(u64) -> bool + Sync) -> u64 {
    let (next, enough) = (AtomicU64::new(0), AtomicU64::new(0));
    let threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while enough.load(Ordering::Relaxed) == 0 {
                    if !each(next.fetch_add(1, Ordering::Relaxed)) {
                        enough.store(1, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    next.into_inner()
}

/// How to see what a seed found: a line.
fn replay(seed: u64, test: &str, ended: &Ended) -> String {
    let found = ended.violations.join("; ");
    format!("SEED={seed} cargo test -p vfio-checkpoint-tests --test sim -- --nocapture {test}   # {found}")
}

#[derive(Debug, Default)]
struct Figures {
    seeds: u32,
    drawn: usize,
    struck: u64,
    simulated: Duration,
    failed: Vec<String>,
    /// How migrations ended, and how many so.
    ends: BTreeMap<String, u32>,
}

#[test]
fn one_seed() {
    let Some(seed) = number("SEED") else { return };
    let ended = run(&pki(), seed, faults_of(seed));
    println!("{}", ended.log);
    assert!(ended.violations.is_empty(), "{}", ended.violations.join("; "));
}

#[test]
fn a_device_is_saved_and_restored_whatever_goes_wrong() {
    let (pki, begun, most) = (pki(), Instant::now(), number("SEEDS").unwrap_or(SEEDS));
    let figures = Mutex::new(Figures::default());
    seeds(|seed| {
        if seed >= most {
            return false;
        }
        let faults = faults_of(seed);
        let drawn = faults.len();
        let ended = run(&pki, seed, faults);
        let mut figures = figures.lock().unwrap();
        figures.seeds += 1;
        figures.drawn += drawn;
        figures.struck += ended.struck;
        figures.simulated += ended.virtual_time;
        if !ended.violations.is_empty() {
            figures.failed.push(replay(seed, "one_seed", &ended));
        }
        figures.failed.len() < 10
    });
    let Figures { seeds, drawn, struck, simulated, failed, .. } = figures.into_inner().unwrap();
    println!(
        "figures: {seeds} seeds, {drawn} faults drawn and {struck} struck, {} s simulated, {:.1} seeds a second",
        simulated.as_secs(),
        f64::from(seeds) / begun.elapsed().as_secs_f64(),
    );
    assert!(failed.is_empty(), "{} seeds found something:\n{}", failed.len(), failed.join("\n"));
}

#[test]
fn a_seed_gives_the_same_log_each_time() {
    let pki = pki();
    same_log_each_time(100, |seed| run(&pki, seed, faults_of(seed)).log);
}

#[test]
fn a_seed_gives_the_same_migration_each_time() {
    let (pki, most) = (pki(), number("SEEDS").unwrap_or(60));
    same_log_each_time(most, |seed| migrate::run(&pki, seed, migrate::faults_of(seed)).ended.log);
}

fn same_log_each_time(most: u64, run: impl Fn(u64) -> String + Sync) {
    let failed = Mutex::new(None);
    seeds(|seed| {
        let [one, other] = [(); 2].map(|()| run(seed));
        if one != other {
            let at = one.lines().zip(other.lines()).position(|(one, other)| one != other);
            let shown = |log: &str| {
                let skip = at.unwrap_or(0).saturating_sub(5);
                log.lines().skip(skip).take(10).collect::<Vec<_>>().join("\n")
            };
            let text =
                format!("seed {seed}: two logs, from line {at:?}:\n{}\nand\n{}", shown(&one), shown(&other));
            *failed.lock().unwrap() = Some(text);
            return false;
        }
        seed < most
    });
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_none(), "{}", failed.unwrap_or_default());
}

/// A disk that says that it has synced what it has not makes an agent forget that its device is to stay stopped. No agent can
/// do anything about it: the seeds have to find it, or they would find nothing else either.
#[test]
fn a_disk_that_lies_is_found() {
    const SEEDS: u64 = 2000;
    let pki = pki();
    let found = Mutex::new(None);
    let tried = seeds(|seed| {
        let lies = Fault::Disk { host: "a", what: SyncFault::Lies, after: 0, times: u32::MAX };
        let mut faults = faults_of(seed);
        faults.push(Planned { when: When::Line(8), fault: lies });
        let violations = run(&pki, seed, faults).violations;
        if let Some(violation) = violations.into_iter().find(|violation| violation.contains("runs 2 times")) {
            *found.lock().unwrap() = Some(format!("seed {seed}: {violation}"));
            return false;
        }
        seed < SEEDS
    });
    let found = found.into_inner().unwrap();
    println!("figures: a second copy was found after {tried} seeds: {found:?}");
    assert!(found.is_some(), "{tried} seeds found no second copy");
}

/// A commit that failed and is durable all the same, at each place of a run, and a death soon after.
#[test]
fn a_commit_in_doubt_and_a_death_soon_after() {
    let pki = pki();
    let failed = Mutex::new(Vec::new());
    let tried = seeds(|seed| {
        let (host, after) = (AGENTS[usize::from(seed % 2 == 1)], u32::try_from(seed / 2 % 8).unwrap());
        let doubt = Fault::Disk { host, what: SyncFault::FailsLate, after, times: 1 };
        let down = Duration::from_millis(20);
        let kill = Fault::Kill { host, pieces: 4 + 2 * (seed / 16 % 12), loses_power: false, down };
        let line = if host == "a" { 10 } else { 40 };
        let faults = [doubt, kill].map(|fault| Planned { when: When::Line(line), fault });
        let ended = run(&pki, seed, faults.to_vec());
        if !ended.violations.is_empty() {
            println!("{}", ended.log);
            failed.lock().unwrap().push(format!("{seed}: {}", ended.violations.join("; ")));
        }
        seed < 192 && failed.lock().unwrap().len() < 5
    });
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "of {tried}, {}:\n{}", failed.len(), failed.join("\n"));
}

#[test]
fn one_migration() {
    let Some(seed) = number("SEED") else { return };
    let ended = migrate::run(&pki(), seed, migrate::faults_of(seed)).ended;
    println!("{}", ended.log);
    assert!(ended.violations.is_empty(), "{}", ended.violations.join("; "));
}

#[test]
fn a_set_moves_or_stays_whatever_goes_wrong() {
    let (pki, begun, most) = (pki(), Instant::now(), number("SEEDS").unwrap_or(MIGRATIONS));
    let figures = Mutex::new(Figures::default());
    seeds(|seed| {
        if seed >= most {
            return false;
        }
        let faults = migrate::faults_of(seed);
        let drawn = faults.len();
        let migrate::Told { ended, ends } = migrate::run(&pki, seed, faults);
        let mut figures = figures.lock().unwrap();
        figures.seeds += 1;
        figures.drawn += drawn;
        figures.struck += ended.struck;
        figures.simulated += ended.virtual_time;
        for end in ends {
            *figures.ends.entry(end).or_default() += 1;
        }
        if !ended.violations.is_empty() {
            figures.failed.push(replay(seed, "one_migration", &ended));
        }
        figures.failed.len() < 10
    });
    let Figures { seeds, drawn, struck, simulated, failed, ends } = figures.into_inner().unwrap();
    println!(
        "figures: migrations: {seeds} seeds, {drawn} faults drawn and {struck} struck, {} s simulated, {:.1} seeds a second",
        simulated.as_secs(),
        f64::from(seeds) / begun.elapsed().as_secs_f64(),
    );
    for (end, count) in &ends {
        println!("figures: migrations: {count:>5} {end}");
    }
    assert!(failed.is_empty(), "{} seeds found something:\n{}", failed.len(), failed.join("\n"));
}

/// Seeds until one finds a second copy of what `run` moves.
fn finds_a_second_copy(what: &str, run: impl Fn(u64) -> Vec<String> + Sync) {
    const SEEDS: u64 = 2000;
    let found = Mutex::new(None);
    let tried = seeds(|seed| {
        let is_second =
            |violation: &String| violation.contains("runs 2 times") || violation.contains("runs on 2 hosts");
        if let Some(violation) = run(seed).into_iter().find(is_second) {
            *found.lock().unwrap() = Some(format!("seed {seed}: {violation}"));
            return false;
        }
        seed < SEEDS
    });
    let found = found.into_inner().unwrap();
    println!("figures: migrations: with {what} a second copy was found after {tried} seeds: {found:?}");
    assert!(found.is_some(), "{tried} seeds found no second copy");
}

/// A source whose disk lies forgets that it has told its destination to run the devices, and runs them again.
#[test]
fn a_source_whose_disk_lies_is_found() {
    let pki = pki();
    finds_a_second_copy("a disk that lies", |seed| {
        let mut faults = migrate::faults_of(seed);
        let lies = Fault::Disk { host: "a", what: SyncFault::Lies, after: 0, times: u32::MAX };
        faults.push(Planned { when: When::Said("set STOP_COPY"), fault: lies });
        migrate::run(&pki, seed, faults).ended.violations
    });
}

/// Nothing can check what an admin says of a fence, so one who says what is not so is the way to two copies.
#[test]
fn an_admin_who_lies_is_found() {
    let pki = pki();
    finds_a_second_copy("an admin who lies", |seed| {
        let mut faults = migrate::faults_of(seed);
        let silence = Fault::Hold(("a", "b"), Duration::from_secs(10));
        faults.push(Planned { when: When::Said("set RUNNING_P2P"), fault: silence });
        migrate::run_with_liar(&pki, seed, faults).ended.violations
    });
}

/// A source that takes silence for a refusal runs what its destination runs, once an answer to Commit is lost.
#[test]
fn a_source_that_resumes_on_silence_is_found() {
    let pki = pki();
    finds_a_second_copy("a source that resumes on silence", |seed| {
        migrate::run_with("silence is a refusal", &pki, seed, migrate::faults_of(seed)).ended.violations
    });
}

/// A source that tells its destination to run before that is on record forgets it in a crash.
#[test]
fn a_source_that_commits_without_a_record_is_found() {
    let pki = pki();
    finds_a_second_copy("a source that commits without a record", |seed| {
        migrate::run_with("commit without a record", &pki, seed, migrate::faults_of(seed)).ended.violations
    });
}

/// One death, at each moment at which devices change hands, of each side, with and without the machine.
#[test]
fn a_death_at_each_turn() {
    const PIECES: u64 = 6;
    let (pki, most) = (pki(), 4 * PIECES * TURNS.len() as u64);
    let (failed, ends) = (Mutex::new(Vec::new()), Mutex::new(BTreeMap::<String, u32>::new()));
    let tried = seeds(|seed| {
        if seed >= most {
            return false;
        }
        let (turn, rest) = (TURNS[usize::try_from(seed).unwrap() % TURNS.len()], seed / TURNS.len() as u64);
        let (host, loses_power) = (AGENTS[usize::from(rest % 2 == 1)], rest / 2 % 2 == 1);
        let fault = Fault::Kill { host, pieces: rest / 4, loses_power, down: Duration::from_millis(20) };
        let migrate::Told { ended, ends: told } =
            migrate::run(&pki, seed, vec![Planned { when: When::Said(turn), fault }]);
        for end in told {
            *ends.lock().unwrap().entry(end).or_default() += 1;
        }
        if !ended.violations.is_empty() {
            println!("{}", ended.log);
            failed.lock().unwrap().push(format!("{seed}: {}", ended.violations.join("; ")));
        }
        failed.lock().unwrap().len() < 3
    });
    for (end, count) in ends.into_inner().unwrap() {
        println!("figures: a death at each turn: {count:>5} {end}");
    }
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "of {tried}, {}:\n{}", failed.len(), failed.join("\n"));
}

/// Where the answer to Commit was lost, an admin lets the source go by what the destination says, and that is a success.
#[test]
fn an_admin_decides_by_what_the_destination_says() {
    const SEEDS: u64 = 60;
    let pki = pki();
    let (failed, decided) = (Mutex::new(Vec::new()), AtomicU64::new(0));
    let tried = seeds(|seed| {
        let silence = Fault::Partition(("a", "b"), Duration::from_millis(2500 + 50 * seed));
        let faults = vec![Planned { when: When::Said("journal: commit of RUNNING"), fault: silence }];
        let migrate::Told { ended, ends } = migrate::run(&pki, seed, faults);
        let is_decided = |end: &&String| end.starts_with("SUCCEEDED") && end.ends_with("by an admin");
        decided.fetch_add(ends.iter().filter(is_decided).count() as u64, Ordering::Relaxed);
        if !ended.violations.is_empty() {
            println!("{}", ended.log);
            failed.lock().unwrap().push(format!("{seed}: {}", ended.violations.join("; ")));
        }
        seed < SEEDS && failed.lock().unwrap().len() < 3
    });
    let (failed, decided) = (failed.into_inner().unwrap(), decided.into_inner());
    println!("figures: migrations: {decided} of {tried} were decided by an admin and have moved");
    assert!(failed.is_empty(), "of {tried}, {}:\n{}", failed.len(), failed.join("\n"));
    assert!(decided > 0, "no admin decided anything in {tried} seeds");
}
