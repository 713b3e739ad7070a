//! Who the device is, and what of it a close leaves.

use vfio_checkpoint_fsm::State;

use super::super::bench::Bench;
use super::super::rule::{Answer, Rule, Weight, differs, holds};
use super::super::subject::LastClose;
use super::source;

pub(super) const RULES: &[Rule] = &[
    Rule {
        id: "identity-stable",
        contract: "A device that is closed and opened again is the same device.",
        source: source::CLOSE,
        weight: Weight::Matters {
            consequence: "leases and quarantines would be of a device that is not there",
        },
        quirks: &[],
        check: |bench| across_a_reopen(bench, |device| device.identity().to_string()),
    },
    Rule {
        id: "fingerprint-stable",
        contract: "What must match for a state to load does not change by closing and opening the device.",
        source: source::CLOSE,
        weight: Weight::Matters {
            consequence: "a state would be refused by the very device that it came from",
        },
        quirks: &[],
        check: |bench| across_a_reopen(bench, |device| device.fingerprint().to_string()),
    },
    Rule {
        id: "capabilities-stable",
        contract: "What a device can do does not change by closing and opening it.",
        source: source::FLAGS,
        weight: Weight::Matters { consequence: "a plan made for the device would not fit it any more" },
        quirks: &[],
        check: |bench| across_a_reopen(bench, |device| device.capabilities().to_string()),
    },
    Rule {
        id: "reopened-state",
        contract: "A device that is opened again stands where its last close leaves it: in RUNNING where that resets it.",
        source: source::CLOSE,
        weight: Weight::Matters {
            consequence: "a holder that keeps a device stopped over a restart could not rely on it",
        },
        quirks: &[],
        check: reopened_state,
    },
];

fn across_a_reopen(bench: &mut Bench, fact: fn(&dyn crate::MigrationDevice) -> String) -> Answer {
    let slot = bench.source();
    let before = fact(slot.device()?);
    slot.close();
    let after = fact(slot.device()?);
    if before == after { holds(after) } else { differs(format!("{before} before, {after} after")) }
}

/// After a reopen the state is read and the device reset; nothing else is asked of it, because drivers crash when a
/// device without its stream is moved.
fn reopened_state(bench: &mut Bench) -> Answer {
    let slot = bench.source();
    let mut kept = Vec::new();
    for state in State::ALL {
        if state == State::Error || !slot.migration()?.supports(state) {
            continue;
        }
        if state == State::Resuming && slot.require_undo().is_err() {
            continue;
        }
        slot.fresh()?;
        let stream = slot.stand_in(state).map_err(|instead| instead.during(state))?;
        drop(stream);
        slot.close();
        let found = slot.state()?;
        let expected = match slot.last_close() {
            LastClose::Resets => found == State::Running,
            LastClose::Keeps => found == state,
            LastClose::Unknown => found == state || found == State::Running,
        };
        if !expected {
            return differs(format!("closed in {state}, opened in {found}"));
        }
        if found == state && state != State::Running {
            kept.push(state.name());
        }
    }
    slot.fresh()?;
    if kept.is_empty() { holds("the last close resets") } else { holds(format!("kept: {}", kept.join(" "))) }
}
