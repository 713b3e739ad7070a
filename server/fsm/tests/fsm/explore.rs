//! Exploring an operation machine to its end, and showing what was found.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;

use vfio_checkpoint_fsm::Step;

use crate::table::Table;

/// An operation machine, as far as tests need to know it.
pub(crate) trait Machine: Copy + Ord + Display + 'static {
    type Plan: Copy + Ord;
    type Event: Copy + Ord + Display + 'static;
    type Command: Copy + Ord + Display;

    const START: Self;
    const STATES: &'static [Self];
    const EVENTS: &'static [Self::Event];

    /// Every distinct plan.
    fn plans() -> Vec<Self::Plan>;
    /// The parts of a plan, in words.
    fn facets(plan: Self::Plan) -> Vec<String>;
    fn take(self, plan: Self::Plan, event: Self::Event) -> Step<Self, Self::Event, Self::Command>;
    fn is_over(self) -> bool;
    /// One of these is certain to come after the command, if the executor and the deadlines keep their word.
    fn owed(plan: Self::Plan, command: Self::Command) -> &'static [Self::Event];
}

/// A move of a machine.
#[derive(Clone, Copy)]
pub(crate) struct Move<M: Machine> {
    pub(crate) event: M::Event,
    pub(crate) to: M,
    pub(crate) command: M::Command,
}

/// Every move out of a state.
pub(crate) fn moves<M: Machine>(plan: M::Plan, state: M) -> Vec<Move<M>> {
    let steps = M::EVENTS.iter().map(|&event| (event, state.take(plan, event)));
    steps
        .filter_map(|(event, step)| match step {
            Step::Moved { to, command } => Some(Move { event, to, command }),
            Step::NoOp(_) | Step::Illegal { .. } => None,
        })
        .collect()
}

/// Every course that an operation can take, from the start to where no event moves it any more.
///
/// No-ops are left out: they change nothing, so a course with them is one of these with pauses.
pub(crate) fn courses<M: Machine>(plan: M::Plan) -> Vec<Vec<Move<M>>> {
    let mut open: Vec<(M, Vec<Move<M>>)> = vec![(M::START, Vec::new())];
    let mut done = Vec::new();
    while let Some((state, course)) = open.pop() {
        assert!(course.len() <= M::STATES.len(), "moves form a cycle through {state}");
        let onward = moves(plan, state);
        if onward.is_empty() {
            done.push(course);
            continue;
        }
        // In reverse, so that courses come out in the order of the events.
        for onward in onward.into_iter().rev() {
            let mut course = course.clone();
            course.push(onward);
            open.push((onward.to, course));
        }
    }
    done
}

/// The states that an operation with this plan can be in.
pub(crate) fn reachable<M: Machine>(plan: M::Plan) -> BTreeSet<M> {
    let ends = courses::<M>(plan).into_iter().flatten().map(|onward| onward.to);
    std::iter::once(M::START).chain(ends).collect()
}

/// In words, which of the relevant plans are the chosen ones. Empty: all of them.
pub(crate) fn guard<M: Machine>(relevant: &[M::Plan], chosen: &[M::Plan]) -> String {
    let values = |plans: &[M::Plan], facet: usize| -> BTreeSet<String> {
        plans.iter().filter_map(|&plan| M::facets(plan).get(facet).cloned()).collect()
    };
    let facets = relevant.first().map_or(0, |&plan| M::facets(plan).len());
    let narrowed: Vec<(usize, BTreeSet<String>)> = (0..facets)
        .map(|facet| (facet, values(chosen, facet)))
        .filter(|(facet, chosen)| *chosen != values(relevant, *facet))
        .collect();
    let matching = relevant.iter().filter(|&&plan| {
        let facets = M::facets(plan);
        narrowed.iter().all(|(facet, values)| facets.get(*facet).is_some_and(|value| values.contains(value)))
    });
    assert_eq!(matching.count(), chosen.len(), "the plans are no conjunction; teach the guard to say or");
    let words: Vec<String> =
        narrowed.into_iter().map(|(_, values)| values.into_iter().collect::<Vec<_>>().join(" or ")).collect();
    words.join(", ")
}

/// Every state and event under every plan. Answers that depend on the plan have a row for each case.
pub(crate) fn answers<M: Machine>() -> String {
    let plans = M::plans();
    let mut table = Table::new(&["STATE", "EVENT", "IF", "ANSWER", "COMMAND"]);
    for &state in M::STATES {
        table.gap();
        for &event in M::EVENTS {
            let mut cases: BTreeMap<(String, String), Vec<M::Plan>> = BTreeMap::new();
            for &plan in &plans {
                cases.entry(describe(state.take(plan, event))).or_default().push(plan);
            }
            for ((answer, command), chosen) in cases {
                let guard = guard::<M>(&plans, &chosen);
                table.row([state.to_string(), event.to_string(), guard, answer, command]);
            }
        }
    }
    table.render()
}

fn describe<M: Machine>(step: Step<M, M::Event, M::Command>) -> (String, String) {
    match step {
        Step::Moved { to, command } => (format!("-> {to}"), command.to_string()),
        Step::NoOp(_) => ("no-op".to_owned(), String::new()),
        Step::Illegal { .. } => ("illegal".to_owned(), String::new()),
    }
}

/// The courses that a filter lets through, one a line, under every plan.
pub(crate) fn show_courses<M: Machine>(wanted: impl Fn(&[Move<M>]) -> bool) -> String {
    let mut lines = Vec::new();
    for plan in M::plans() {
        lines.push(M::facets(plan).join(", "));
        for course in courses::<M>(plan).into_iter().filter(|course| wanted(course)) {
            lines.push(format!("    {}", M::START));
            lines.extend(course.into_iter().map(|Move { event, to, command }| {
                format!("      {:14} -> {:24} {command}", event.to_string(), to.to_string())
            }));
        }
        lines.push(String::new());
    }
    lines.join("\n")
}

/// Nothing but a move changes the state, and what is refused is told with state and event.
pub(crate) fn only_moves_move<M: Machine + std::fmt::Debug>()
where
    M::Event: std::fmt::Debug,
    M::Command: std::fmt::Debug,
{
    for plan in M::plans() {
        for &state in M::STATES {
            for &event in M::EVENTS {
                match state.take(plan, event) {
                    Step::Moved { to, .. } => assert_ne!(to, state, "{state} moves to itself on {event}"),
                    Step::NoOp(after) => assert_eq!(after, state),
                    Step::Illegal { state: after, event: refused } => {
                        assert_eq!((after, refused), (state, event));
                    }
                }
            }
        }
    }
}

/// Whatever happens, in whatever order, an operation ends: its moves form no cycle, it gets stuck in no state
/// but a terminal one, and in every other state each event that is certain to come moves it.
pub(crate) fn every_operation_ends<M: Machine>() {
    for plan in M::plans() {
        for course in courses::<M>(plan) {
            for onward in &course {
                let owed = M::owed(plan, onward.command);
                assert_eq!(owed.is_empty(), onward.to.is_over(), "{}: nobody moves it", onward.to);
                for &event in owed {
                    let moved = onward.to.take(plan, event).command().is_some();
                    assert!(moved, "{} is not moved by {event}, which {} owes", onward.to, onward.command);
                }
            }
            assert!(
                course.last().is_some_and(|last| last.to.is_over()),
                "a course ends in no terminal state"
            );
        }
    }
}

/// Every listed state can be reached under some plan, so that none is dead and none was forgotten in the
/// list.
pub(crate) fn the_list_of_states_is_complete<M: Machine>() {
    let found: BTreeSet<M> = M::plans().into_iter().flat_map(reachable::<M>).collect();
    let listed: BTreeSet<M> = M::STATES.iter().copied().collect();
    let show = |states: BTreeSet<M>| states.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    assert_eq!(show(found), show(listed));
}
