//! Hand-overs with faults in the source, something at a random place, and a destination that takes the devices, refuses
//! them or is not heard for a while. What must hold on the way is asserted by the watch.

use std::sync::Arc;
use std::time::Duration;

use vfio_checkpoint_fsm::{AfterSave, Cutover, SavePlan, SaveState, State};

use super::super::RecordedSave;
use super::super::tests::answers::{self, HOLD_LIMIT, save_terms};
use super::super::tests::crashes::last_save;
use super::super::tests::handover::{Source, take_up};
use super::super::tests::script::{Script, What};
use super::super::tests::watch::Side;
use super::{Inline, Node, SaveTerms, is_quarantined, scenario, struck};
use crate::Executor;
use crate::fault::Fault;

/// Says how it ended.
pub(super) fn hand_over_run(seed: u64) -> (String, u64) {
    let random = Inline::new(seed.rotate_left(32));
    let one_of = |many: usize| usize::try_from(random.random() % many as u64).expect("a small number");
    let what = [What::Nothing, What::Cancel, What::Crash, What::Delay, What::FailMove][one_of(5)];
    // There are fewer moves than places.
    let place = one_of(if what == What::FailMove { 10 } else { 45 });
    let commit_at = [0, 0, 1, 3600].map(Duration::from_secs)[one_of(4)];
    let inclined = [Side::There, Side::There, Side::Here][one_of(3)];
    let answers_after = [Some(Duration::ZERO), Some(Duration::from_mins(10)), None][one_of(3)];
    let stop_limit = [None, Some(Duration::from_secs(5)), Some(Duration::from_mins(1))][one_of(3)];
    let (configs, faults) = scenario(seed);
    let faults: Vec<&[Fault]> = faults.iter().map(Vec::as_slice).collect();

    let script = Script::new(what, place).cutover().commit_at(commit_at);
    let node = Node::on(Arc::new(script.clone()), script.inline.time(), &configs, &faults);
    let source = Source::new(&script, node, inclined);
    script.watch.answers_after(answers_after);
    if let Some(limit) = stop_limit {
        script.watch.stop_limit(limit);
    }
    let asked = save_terms(one_of(2) == 0, Cutover::Auto, AfterSave::HandOver);
    let terms = SaveTerms { stop_limit, ..asked };
    let (ended, sink) = answers::save(&script, &source.node, terms);
    let strikes = struck(&source.node);
    let what = match (&ended, script.happened()) {
        (None, false) => "Silence".to_owned(),
        (_, true) => format!("{what:?}"),
        (Some(_), false) => "Nothing".to_owned(),
    };
    let last = last_save(&script);
    let (source, end) = match (ended, RecordedSave::from_last(last, HOLD_LIMIT)) {
        (Some(end), _) => (source, end.map(|_| ())),
        (None, Some(recorded)) => {
            let again = Script::quiet().after(&script);
            again.watch.answers_after(Some(Duration::ZERO));
            let source = source.found(&again);
            let migration = vec![configs[0].migration; configs.len()];
            let plan = SavePlan::for_devices(&migration, terms.request).expect("a plan");
            let (end, _) = take_up(&again, &source, plan, recorded, sink.memory);
            (source, end.expect("an answer and an end").map(|_| ()))
        }
        (None, None) => {
            // Which device was quarantined went with the process that died.
            let end = if last == SaveState::HandedOver { "handed over" } else { "undone" };
            return (format!("{what} after a hand-over, {end}"), strikes);
        }
    };

    let there = script.watch.verdict() == Some(Side::There);
    assert_eq!(end.is_ok(), there, "{end:?}");
    for (index, slot) in source.node.slots.iter().enumerate() {
        let told = end.as_ref().is_err_and(|error| is_quarantined(error, &slot.identity().name));
        let (state, digest) = (slot.state(), slot.digest());
        if there {
            let blank = state == State::Running && slot.resets() > 0 && digest == source.blank[index];
            assert!(blank || !state.is_running(), "left in {state} although it runs elsewhere");
        } else {
            assert_eq!((slot.resets(), digest), (0, source.carried[index]), "{end:?}");
            assert!(told || state == State::Running, "left in {state}: {end:?}");
        }
    }
    (format!("{what} in a hand-over, {}", if there { "handed over" } else { "undone" }), strikes)
}
