//! What is found after a kill is what the page on the hand-over says of a crash at that step.
//!
//! ```text
//!   step of an agent --row--> "at this step" of the page's table --column of the victim--> cell
//!       '---------------------- At::after --------------------------------------------> the same
//! ```
//! The cells are written by the model, and what is asserted after a kill was found of two agents: here the one is held
//! against the other, for each step.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::{After, At, Victim, of_destination, of_source};

/// How many devices the page's table is about.
const SET: usize = 2;

/// The table, by what stands at the head of its rows and its columns.
fn table() -> BTreeMap<String, BTreeMap<String, String>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../server/fsm/docs/handover.md");
    let page = std::fs::read_to_string(path).unwrap();
    let (_, rest) = page.split_once("<!-- generated: failures -->\n").unwrap();
    let (table, _) = rest.split_once("<!-- end -->").unwrap();
    let cells = |line: &str| -> Vec<String> {
        line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect()
    };
    let mut lines = table.lines();
    let head = cells(lines.next().unwrap());
    let rows = lines.skip(1).map(cells);
    rows.map(|row| (row[0].clone(), head.iter().cloned().zip(row).skip(1).collect())).collect()
}

/// The row that a step belongs to. None where the migration is not on record.
fn row(at: At) -> Option<&'static str> {
    Some(match at {
        At::Source("before commit of ADMITTED") => return None,
        At::Source("after commit of ADMITTED" | "before commit of BEGUN" | "after commit of BEGUN") => {
            "Prepare is under way"
        }
        At::Source(
            "save: PreCopying" | "save: Quiescing" | "save: Stopping" | "save: Draining" | "chunk"
            | "save: Parking" | "save: Sealing",
        )
        | At::Destination(
            "restore: Entering"
            | "before commit of BEGUN"
            | "after commit of BEGUN"
            | "restore: Loading"
            | "chunk"
            | "restore: Verifying"
            | "restore: FixingUp",
        ) => "state is under way",
        At::Source("save: Offered") => "Prepared is heard",
        At::Source("save: Committing" | "before commit of COMMITTING") => "COMMITTING is being written here",
        At::Source("after commit of COMMITTING" | "commit is sent") => "COMMITTING is on record here",
        At::Source("commit is answered") | At::Destination("after commit of ENDED") => {
            "COMMITTED is on record"
        }
        At::Source("save: LettingGo" | "before commit of LETTING_GO") => "COMMITTED is heard",
        At::Source(
            "after commit of LETTING_GO" | "save: HandedOver" | "read back" | "before commit of ENDED",
        ) => "LETTING_GO is on record",
        At::Source("after commit of ENDED") => "over",
        At::Destination("before commit of ADMITTED") => "Prepare is heard, LOADING is being written",
        At::Destination("after commit of ADMITTED") => "Prepare is answered",
        At::Destination("restore: Held" | "before commit of HELD") => "PREPARED is being written",
        At::Destination("after commit of HELD") => "PREPARED is on record",
        At::Destination("restore: AwaitingReady" | "restore: Quiescing" | "before commit of RUNNING") => {
            "Commit is heard, COMMITTING is being written there"
        }
        At::Destination("after commit of RUNNING") => "COMMITTING is on record there",
        At::Destination("restore: Resuming") => "all are in RUNNING_P2P",
        At::Destination("restore: PartlyRunning") => "a device is in RUNNING",
        At::Destination("restore: Completed" | "read back" | "before commit of ENDED") => {
            "all are in RUNNING"
        }
        At::Source(other) | At::Destination(other) => panic!("{other} has no row in the page"),
    })
}

/// What a cell says where a migration ends so.
fn cells(after: After) -> &'static [&'static str] {
    match after {
        After::Never => &[],
        // Without a verdict where the destination has nothing on record.
        After::Stays => &["here (Aborted, REFUSED)", "here (Aborted, nothing)"],
        After::Resolved => &["here (Aborted, LOST, on Resolve)"],
        // Nothing changes any more.
        After::Moves => &["there (HandedOver, COMMITTED)", "-"],
        After::Lost => &["nowhere (Lost, REFUSED)"],
        After::Gone => &["nowhere (HandedOver, COMMITTED)"],
    }
}

#[test]
fn what_is_found_after_a_kill_is_what_the_page_says() {
    let table = table();
    let mut rows = BTreeSet::new();
    for pre_copy in [false, true] {
        let sources = of_source(pre_copy).into_iter().map(At::Source);
        for at in sources.chain(of_destination(SET).into_iter().map(At::Destination)) {
            let Some(row) = row(at) else { continue };
            rows.insert(row.to_owned());
            for kept in [true, false] {
                let (who, victim) = match at {
                    At::Source(_) => ("source", Victim::Source),
                    At::Destination(_) => ("destination", Victim::Destination),
                };
                let column = format!("{who} crashes, {}", if kept { "kept" } else { "not kept" });
                let (cell, after) = (&table[row][&column], at.after(SET, victim, kept));
                assert!(
                    cells(after).contains(&cell.as_str()),
                    "killed at {at:?}, kept: {kept}: {after:?} is found, and the page says of `{row}`: {cell}"
                );
            }
        }
    }
    // The one that no step of an agent is at, since it is of a single device of the set.
    rows.insert("a device is in RUNNING_P2P".to_owned());
    assert_eq!(rows, table.into_keys().collect(), "every row of the page is looked at");
}
