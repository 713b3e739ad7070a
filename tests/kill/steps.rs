//! The steps of every job, each with what must be found after a kill there.
//!
//! | found | a save, with the holder | a restore, with the holder | without the holder |
//! |-------|-------------------------|----------------------------|--------------------|
//! | [`Found::Nothing`] | no operation, own state | no operation, own state | no operation, fresh state |
//! | [`Found::Untouched`] | failed, own state | failed, own state | failed, fresh state |
//! | [`Found::Undone`] | failed, own state | failed, reset | failed, fresh state |
//! | [`Found::Held`] | held, and then done | held, and then done | failed, fresh state |
//! | [`Found::Done`] | succeeded, own state | succeeded, the other state | failed, fresh state |
//! | [`Found::Ended`] | as it ended | as it ended | as it ended, fresh state |

use crate::job::Kind;

/// What is found once the agent was killed at a step and started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Found {
    /// The operation is not on record: it never was.
    Nothing,
    /// It had not begun, and its devices were left alone.
    Untouched,
    /// It had not come to its end, and was undone.
    Undone,
    /// It waits for Resume.
    Held,
    /// It went on to its end.
    Done,
    /// Its end was on record.
    Ended,
}

use Found::{Done, Ended, Held, Nothing, Undone, Untouched};

/// One step: the point at which the agent is killed, and what is found then.
pub(crate) type Step = (&'static str, Found);

/// Before anything is touched: the same for all.
const BEGIN: [Step; 2] = [("before commit of ADMITTED", Nothing), ("after commit of ADMITTED", Untouched)];

/// All steps of a job, in the order in which they are passed. A point that is passed several times is in here once.
pub(crate) fn steps(kind: Kind, set: usize) -> Vec<Step> {
    let mut steps = BEGIN.to_vec();
    match kind {
        Kind::Save | Kind::PreCopySave | Kind::ManualSave | Kind::HeldSave | Kind::StoppedSave => {
            save(kind, &mut steps);
        }
        Kind::Restore | Kind::HeldRestore => restore(kind, set, &mut steps),
    }
    steps
}

/// The steps of a save into a store. Of a restore out of one they are those of any other.
pub(crate) fn steps_into_store(kind: Kind) -> Vec<Step> {
    let steps = steps(kind, 1).into_iter().flat_map(|step| {
        let also: &[Step] = match step.0 {
            "after commit of ADMITTED" => &[("store: Reserved", Untouched), ("store: Intended", Untouched)],
            "chunk" => &[("store: Uploaded", Undone)],
            // Until the journal has the next step, nobody was told of the checkpoint.
            "save: Sealing" => {
                &[("store: Prepared", Undone), ("store: Created", Undone), ("checkpoint committed", Undone)]
            }
            _ => &[],
        };
        [step].into_iter().chain(also.iter().copied())
    });
    steps.collect()
}

fn save(kind: Kind, steps: &mut Vec<Step>) {
    if kind == Kind::PreCopySave {
        steps.extend([
            ("save: PreCopying", Undone),
            ("chunk", Undone),
            ("save: Quiescing", Undone),
            ("save: Stopping", Undone),
            ("save: Draining", Undone),
        ]);
    } else {
        if kind == Kind::ManualSave {
            steps.push(("save: AwaitingCutover", Undone));
        }
        steps.extend([
            ("save: Quiescing", Undone),
            ("save: Stopping", Undone),
            ("save: Draining", Undone),
            ("chunk", Undone),
        ]);
    }
    steps.extend([("save: Parking", Undone), ("save: Sealing", Undone)]);
    // Nothing but the end is on record of a save without a hold: what ran on is told as undone, and no checkpoint.
    let end = match kind {
        Kind::HeldSave => {
            steps.extend([
                ("save: Held", Undone),
                ("before commit of HELD", Undone),
                ("after commit of HELD", Held),
                ("save: Resuming", Held),
                ("before commit of RUNNING", Held),
                ("after commit of RUNNING", Done),
                ("save: Completed", Done),
            ]);
            Done
        }
        Kind::StoppedSave => {
            steps.extend([
                ("save: CompletedStopped", Undone),
                ("before commit of STOPPED", Undone),
                ("after commit of STOPPED", Done),
            ]);
            Done
        }
        Kind::Save | Kind::PreCopySave | Kind::ManualSave | Kind::Restore | Kind::HeldRestore => {
            steps.extend([("save: Resuming", Undone), ("save: Completed", Undone)]);
            Undone
        }
    };
    steps.extend([("read back", end), ("before commit of ENDED", end), ("after commit of ENDED", Ended)]);
}

fn restore(kind: Kind, set: usize, steps: &mut Vec<Step>) {
    steps.extend([
        ("restore: Entering", Untouched),
        ("before commit of BEGUN", Untouched),
        ("after commit of BEGUN", Undone),
        ("restore: Loading", Undone),
        ("chunk", Undone),
        ("restore: Verifying", Undone),
        ("restore: FixingUp", Undone),
    ]);
    // Loaded, and not on record as that: reset. Loaded and held: held, until it is on record that it runs.
    let loaded = if kind == Kind::HeldRestore {
        steps.extend([
            ("restore: Held", Undone),
            ("before commit of HELD", Undone),
            ("after commit of HELD", Held),
        ]);
        Held
    } else {
        Undone
    };
    // It is on record that it runs before the first SET on its way there.
    let (first, rest): (_, &[Step]) = if set > 1 {
        ("restore: Quiescing", &[("restore: Resuming", Done), ("restore: PartlyRunning", Done)])
    } else {
        ("restore: Resuming", &[])
    };
    steps.extend([
        ("restore: AwaitingReady", loaded),
        (first, loaded),
        ("before commit of RUNNING", loaded),
        ("after commit of RUNNING", Done),
    ]);
    steps.extend(rest);
    steps.extend([
        ("restore: Completed", Done),
        ("read back", Done),
        ("before commit of ENDED", Done),
        ("after commit of ENDED", Ended),
    ]);
}
