//! The machine of one device: every walk, every arc, and an independent opinion on both.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use vfio_checkpoint_fsm::{
    Arc, Capabilities, Fallback, Forbidden, MAX_HOPS, Next, Path, Recovery, Role, State, StreamEffect, Walk,
    next_hop, path, recover, recover_entry,
};

use crate::table::{Table, check, slug};

/// Every pair of states that a device with these capabilities can walk.
fn walks(capabilities: Capabilities) -> Vec<(State, State, Path)> {
    let pairs = State::ALL.into_iter().flat_map(|from| State::ALL.map(|to| (from, to)));
    pairs
        .filter_map(|(from, to)| match path(capabilities, from, to) {
            Walk::Path(path) => Some((from, to, path)),
            Walk::NoOp | Walk::Forbidden(_) => None,
        })
        .collect()
}

/// Every arc of a device with these capabilities.
pub(crate) fn arcs(capabilities: Capabilities) -> Vec<Arc> {
    let pairs = State::ALL.into_iter().flat_map(|from| State::ALL.map(|to| (from, to)));
    pairs.filter_map(|(from, to)| Arc::between(capabilities, from, to)).collect()
}

#[test]
fn every_pair_of_states() {
    for capabilities in Capabilities::ALL {
        let mut table = Table::new(&["FROM", "TO", "FD", "PATH, WITH WHAT EACH HOP DOES TO THE STREAM"]);
        for from in State::ALL {
            table.gap();
            for to in State::ALL {
                let (fd, way) = match path(capabilities, from, to) {
                    Walk::NoOp => (String::new(), "no-op".to_owned()),
                    Walk::Forbidden(why) => (String::new(), format!("forbidden: {why}")),
                    Walk::Path(path) => (data_fd(&path), describe(&path)),
                };
                table.row([from.to_string(), to.to_string(), fd, way]);
            }
        }
        check(&format!("walks_{}", slug(capabilities)), &table.render());
    }
}

fn data_fd(path: &Path) -> String {
    match (path.closes_stream(), path.opens_stream()) {
        (false, false) => String::new(),
        (true, false) => "closed".to_owned(),
        (false, true) => "new".to_owned(),
        (true, true) => "closed, new".to_owned(),
    }
}

fn describe(path: &Path) -> String {
    let hops = path.iter().map(|arc| match arc.stream() {
        StreamEffect::None => format!(" -> {}", arc.to()),
        effect @ (StreamEffect::OpensSave
        | StreamEffect::OpensRestore
        | StreamEffect::Keeps
        | StreamEffect::Closes) => format!(" -({effect})-> {}", arc.to()),
    });
    std::iter::once(path.from().to_string()).chain(hops).collect()
}

#[test]
fn every_arc() {
    let mut table = Table::new(&["ARC", "STREAM", "FALLBACK", "EXISTS WITH"]);
    let every: BTreeSet<Arc> = Capabilities::ALL.into_iter().flat_map(arcs).collect();
    for arc in every {
        let with: Vec<String> = Capabilities::ALL
            .into_iter()
            .filter(|&capabilities| arcs(capabilities).contains(&arc))
            .map(|capabilities| capabilities.to_string())
            .collect();
        table.row([arc.to_string(), arc.stream().to_string(), arc.fallback().to_string(), with.join(", ")]);
    }
    check("arcs", &table.render());
}

/// The arcs that a driver with every capability implements.
const BASE: [(State, State); 15] = {
    use State::{PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy};
    [
        (Running, RunningP2p),
        (RunningP2p, Running),
        (RunningP2p, Stop),
        (Stop, RunningP2p),
        (Running, PreCopy),
        (PreCopy, Running),
        (RunningP2p, PreCopyP2p),
        (PreCopyP2p, RunningP2p),
        (PreCopy, PreCopyP2p),
        (PreCopyP2p, PreCopy),
        (PreCopyP2p, StopCopy),
        (Stop, StopCopy),
        (StopCopy, Stop),
        (Stop, Resuming),
        (Resuming, Stop),
    ]
};

/// The shortest way over the base arcs with no saving state inside, unless the whole way is a saving one.
/// This is how the kernel's header defines a walk; it shares nothing with the rule in the crate.
fn shortest(from: State, to: State) -> Option<Vec<State>> {
    let all_saving = from.is_saving() && to.is_saving();
    let mut before: BTreeMap<State, State> = BTreeMap::new();
    let mut queue = VecDeque::from([from]);
    while let Some(state) = queue.pop_front() {
        if state == to {
            let mut way = vec![to];
            while let Some(&state) = way.last().filter(|&&state| state != from) {
                way.push(*before.get(&state)?);
            }
            way.reverse();
            return Some(way);
        }
        if state != from && state.is_saving() && !all_saving {
            continue;
        }
        for (_, next) in BASE.into_iter().filter(|&(begin, _)| begin == state) {
            if all_saving && !next.is_saving() {
                continue;
            }
            if next != from && !before.contains_key(&next) {
                before.insert(next, state);
                queue.push_back(next);
            }
        }
    }
    None
}

#[test]
fn walks_are_the_shortest_that_keep_out_of_saving_states() {
    for capabilities in Capabilities::ALL {
        for from in State::ALL {
            for to in State::ALL {
                let possible = capabilities.supports(from) && capabilities.supports(to);
                let expected = shortest(from, to)
                    .filter(|_| possible && from != to)
                    .map(|way| way.into_iter().filter(|&state| capabilities.supports(state)).collect());
                let actual: Option<Vec<State>> = match path(capabilities, from, to) {
                    Walk::Path(path) => Some(path.states().collect()),
                    Walk::NoOp | Walk::Forbidden(_) => None,
                };
                assert_eq!(actual, expected, "{from} to {to} with {capabilities}");
            }
        }
    }
}

#[test]
fn every_impossible_pair_has_its_reason() {
    for capabilities in Capabilities::ALL {
        for from in State::ALL {
            for to in State::ALL {
                let absent = [from, to].into_iter().find(|&state| !capabilities.supports(state));
                let restarts = from == State::StopCopy && matches!(to, State::PreCopy | State::PreCopyP2p);
                let expected = if to == State::Error {
                    Some(Forbidden::ErrorAsTarget)
                } else if from == State::Error {
                    Some(Forbidden::OutOfError { to })
                } else if let Some(state) = absent {
                    Some(Forbidden::StateAbsent { state, capabilities })
                } else {
                    restarts.then_some(Forbidden::StreamCannotRestart { to })
                };
                let actual = match path(capabilities, from, to) {
                    Walk::Forbidden(why) => Some(why),
                    Walk::NoOp | Walk::Path(_) => None,
                };
                assert_eq!(actual, expected, "{from} to {to} with {capabilities}");
            }
        }
    }
}

#[test]
fn a_walk_is_a_chain_of_arcs_within_the_bound() {
    let mut longest = 0;
    for capabilities in Capabilities::ALL {
        for (from, to, path) in walks(capabilities) {
            assert_eq!((path.from(), path.to()), (from, to));
            assert_eq!(path.iter().count(), path.arcs().len());
            for arc in &path {
                assert_eq!(Arc::between(capabilities, arc.from(), arc.to()), Some(arc));
                assert_eq!(next_hop(capabilities, arc.from(), to), Next::Hop(arc));
            }
            let states: Vec<State> = path.states().collect();
            let chain: Vec<(State, State)> = path.iter().map(|arc| (arc.from(), arc.to())).collect();
            assert_eq!(chain, states.windows(2).map(|pair| (pair[0], pair[1])).collect::<Vec<_>>());
            assert!(states.iter().all(|&state| capabilities.supports(state)), "{path}: a state is absent");
            longest = longest.max(path.arcs().len());
        }
    }
    assert_eq!(longest, MAX_HOPS, "the bound is not tight");
}

#[test]
fn a_walk_passes_no_state_with_a_stream_unless_it_stays_in_that_stream() {
    for capabilities in Capabilities::ALL {
        for (from, to, path) in walks(capabilities) {
            let states: Vec<State> = path.states().collect();
            for state in &states[1..states.len() - 1] {
                let within = from.is_saving() && to.is_saving() && state.is_saving();
                assert!(state.stream().is_none() || within, "{path}");
            }
        }
    }
}

#[test]
fn a_walk_opens_one_stream_at_most_and_last() {
    for capabilities in Capabilities::ALL {
        for (from, to, path) in walks(capabilities) {
            let opening = path.iter().position(|arc| arc.stream().opens());
            assert_eq!(opening.is_some(), path.opens_stream());
            assert!(opening.is_none_or(|place| place + 1 == path.arcs().len()), "{path}");
            let keeps = from.is_saving() && to.is_saving();
            assert_eq!(path.opens_stream(), to.stream().is_some() && !keeps, "{path}");
            assert_eq!(path.closes_stream(), from.stream().is_some() && !keeps, "{path}");
        }
    }
}

#[test]
fn a_fallback_never_contradicts_the_recovery() {
    for capabilities in Capabilities::ALL {
        for arc in arcs(capabilities) {
            match arc.fallback() {
                Fallback::To(home) => {
                    // Wherever on the arc a source is found, it goes home, and can.
                    for landed in [arc.from(), arc.to()] {
                        let expected =
                            if landed == home { Recovery::Nothing } else { Recovery::Walk { to: home } };
                        assert_eq!(recover(Role::Source, capabilities, landed), expected, "{arc}");
                    }
                }
                Fallback::Reset => {
                    // Only a destination is there by rights; a source that is found there is not touched.
                    assert!([arc.from(), arc.to()].contains(&State::Resuming), "{arc}");
                    let stray = recover(Role::Source, capabilities, State::Resuming);
                    assert_eq!(stray, Recovery::Quarantine, "{arc}");
                }
            }
            if arc.to() == State::Resuming {
                // The arc may have cleared the state even if it left the device where it was.
                assert_eq!(recover_entry(capabilities, arc.from()), Recovery::Reset, "{arc}");
            }
            for landed in [arc.from(), arc.to()] {
                assert_eq!(recover(Role::Destination, capabilities, landed), Recovery::Reset, "{arc}");
            }
        }
    }
}

#[test]
fn only_arcs_of_the_capabilities_can_be_made() {
    let bare = Capabilities { p2p: false, pre_copy: false };
    let p2p = Capabilities { p2p: true, pre_copy: false };
    assert!(Arc::between(bare, State::Running, State::Stop).is_some());
    assert!(Arc::between(p2p, State::Running, State::Stop).is_none());
    assert!(Arc::between(bare, State::Running, State::RunningP2p).is_none());
    assert!(Arc::between(bare, State::Stop, State::Stop).is_none());
    assert!(Arc::between(bare, State::Error, State::Running).is_none());
}
