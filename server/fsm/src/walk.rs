//! From one state to another: the next hop, and the whole path, as the kernel takes them.
//!
//! The kernel turns one SET into a series of hops. Knowing them beforehand tells whether a data fd comes
//! back, where a failed SET can have left the device, and that a request is impossible without asking.
//!
//! ```text
//!            RUNNING ------ RUNNING_P2P ------ STOP          the spine
//!               |                |            /    \
//!               |                |           /      \
//!   saving:  PRE_COPY ---- PRE_COPY_P2P -> STOP_COPY  RESUMING
//! ```
//!
//! Three states form a spine; each of the other four hangs on one of them. The rule is:
//!
//! 1. between two saving states, stay inside the saving group and so keep the stream, always forward into
//!    `STOP_COPY`;
//! 2. otherwise, off the spine: go back to it;
//! 3. otherwise, where the target hangs: go to the target;
//! 4. otherwise, one step along the spine.
//!
//! Where a hop is a state that the device lacks, the hop after it is taken directly. That yields the shortest
//! path without a saving state as an interior stop (other than between saving states), which is how the
//! kernel defines it.
//!
//! Invariants: each hop is closer to the target, so every walk ends, after at most [`MAX_HOPS`]. At most one
//! arc of a path opens a stream, and it is the last one.
//!
//! Failure paths: what cannot be walked is [`Forbidden`]. Already being there is [`Next::NoOp`], which is
//! neither an error nor a hop. `ERROR` as a target is forbidden even from `ERROR`, where a driver would call
//! it success: whoever asks for it has lost track.

use std::fmt;

use crate::{Arc, Capabilities, Forbidden, State};

/// The most hops of any walk; from `PRE_COPY` to `RESUMING` and back, with P2P.
pub const MAX_HOPS: usize = 4;

/// What to do next on the way to a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Next {
    /// The device is there already.
    NoOp,
    /// Take this arc.
    Hop(Arc),
    /// There is no way.
    Forbidden(Forbidden),
}

/// The next hop of a device with these capabilities on its way between two states.
pub const fn next_hop(capabilities: Capabilities, from: State, to: State) -> Next {
    if matches!(to, State::Error) {
        return Next::Forbidden(Forbidden::ErrorAsTarget);
    }
    if matches!(from, State::Error) {
        return Next::Forbidden(Forbidden::OutOfError { to });
    }
    if !capabilities.supports(from) {
        return Next::Forbidden(Forbidden::StateAbsent { state: from, capabilities });
    }
    if !capabilities.supports(to) {
        return Next::Forbidden(Forbidden::StateAbsent { state: to, capabilities });
    }
    if from as u32 == to as u32 {
        return Next::NoOp;
    }
    match hop(capabilities, from, to) {
        Some(next) => Next::Hop(Arc::hop(from, next)),
        None => Next::Forbidden(Forbidden::StreamCannotRestart { to }),
    }
}

/// The first state on the way that the device has. `None`: a rule forbids the way.
const fn hop(capabilities: Capabilities, from: State, to: State) -> Option<State> {
    match step(from, to) {
        Some(next) if !capabilities.supports(next) => hop(capabilities, next, to),
        next => next,
    }
}

/// The next state between two different states on a device that has them all.
const fn step(from: State, to: State) -> Option<State> {
    let (Some(here), Some(there)) = (anchor(from), anchor(to)) else {
        return None;
    };
    if from.is_saving() && to.is_saving() {
        return step_while_saving(from, to);
    }
    if here as u32 != from as u32 {
        return Some(here);
    }
    if here as u32 == there as u32 {
        return Some(to);
    }
    // RUNNING_P2P is the middle of the spine, so it is next to both ends.
    if matches!(here, State::RunningP2p) { Some(there) } else { Some(State::RunningP2p) }
}

/// Within the saving group the stream stays open, and `STOP_COPY` is its last part.
const fn step_while_saving(from: State, to: State) -> Option<State> {
    if matches!(from, State::StopCopy) {
        None
    } else if matches!(from, State::PreCopy) {
        Some(State::PreCopyP2p)
    } else {
        Some(to)
    }
}

/// The state of the spine on which a state hangs; a state of the spine hangs on itself. `ERROR` hangs
/// nowhere.
const fn anchor(state: State) -> Option<State> {
    match state {
        State::Running | State::PreCopy => Some(State::Running),
        State::RunningP2p | State::PreCopyP2p => Some(State::RunningP2p),
        State::Stop | State::StopCopy | State::Resuming => Some(State::Stop),
        State::Error => None,
    }
}

/// The whole way between two states.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Walk {
    /// The device is there already.
    NoOp,
    /// These hops, in this order.
    Path(Path),
    /// There is no way.
    Forbidden(Forbidden),
}

/// The whole way of a device with these capabilities between two states.
pub fn path(capabilities: Capabilities, from: State, to: State) -> Walk {
    let first = match next_hop(capabilities, from, to) {
        Next::NoOp => return Walk::NoOp,
        Next::Forbidden(why) => return Walk::Forbidden(why),
        Next::Hop(arc) => arc,
    };
    let mut path = Path { arcs: [first; MAX_HOPS], hops: 1 };
    let mut last = first;
    for slot in path.arcs.iter_mut().skip(1) {
        match next_hop(capabilities, last.to(), to) {
            Next::Hop(arc) => (*slot, last) = (arc, arc),
            Next::NoOp | Next::Forbidden(_) => break,
        }
        path.hops += 1;
    }
    Walk::Path(path)
}

/// One to [`MAX_HOPS`] arcs, each beginning where the one before ends. Held inline: planning allocates
/// nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Path {
    /// The slots behind the last hop repeat the first, so that equal paths compare equal.
    arcs: [Arc; MAX_HOPS],
    hops: usize,
}

impl Path {
    /// The hops, first to last. Never empty.
    pub fn arcs(&self) -> &[Arc] {
        self.arcs.get(..self.hops).unwrap_or(&self.arcs)
    }

    /// The hops by value, first to last.
    pub fn iter(&self) -> std::iter::Copied<std::slice::Iter<'_, Arc>> {
        self.arcs().iter().copied()
    }

    /// Where the path begins.
    pub fn from(&self) -> State {
        self.arcs[0].from()
    }

    /// Where the path ends.
    pub fn to(&self) -> State {
        self.arcs().last().unwrap_or(&self.arcs[0]).to()
    }

    /// Every state on the path, both ends included: where a failed SET may have left the device, besides
    /// `ERROR`.
    pub fn states(&self) -> impl Iterator<Item = State> + '_ {
        std::iter::once(self.from()).chain(self.iter().map(Arc::to))
    }

    /// Whether the kernel answers a SET along this path with a new data fd.
    pub fn opens_stream(&self) -> bool {
        self.iter().any(|arc| arc.stream().opens())
    }

    /// Whether the stream that was open at the beginning, if any, is over at the end.
    pub fn closes_stream(&self) -> bool {
        self.iter().any(|arc| arc.stream().closes())
    }
}

impl<'a> IntoIterator for &'a Path {
    type Item = Arc;
    type IntoIter = std::iter::Copied<std::slice::Iter<'a, Arc>>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.from())?;
        self.iter().try_for_each(|arc| write!(f, " -> {}", arc.to()))
    }
}
