//! What an operation machine answers to an event.
//!
//! ```text
//!              +-- Moved { to, command }    something is to be done; the executor does exactly this
//!   on(event) -+-- NoOp(state)              known and already accounted for: a repeated call, a late timer
//!              +-- Illegal { state, event } the event has no business in this state
//! ```
//!
//! Invariants: only [`Step::Moved`] changes the state, and it always brings one command, so no state is
//! entered whose devices, leases or deadlines nobody looks after.
//!
//! Failure paths: [`Step::Illegal`] gives the state back unchanged. A call that causes one is refused as a
//! failed precondition; a report that causes one is a defect of the executor, to be logged and otherwise
//! survived.

/// The answer of a machine with states `S` to an event `E`: what became of it, with a command `C` if it
/// moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[must_use = "the machine was consumed; its next state is in here"]
pub enum Step<S, E, C> {
    /// The machine moved.
    Moved {
        /// Where to.
        to: S,
        /// What the executor does next.
        command: C,
    },
    /// The event is known here and changes nothing.
    NoOp(S),
    /// The event is not possible or not permitted here; nothing moved.
    Illegal {
        /// The state, unchanged.
        state: S,
        /// The event that was refused.
        event: E,
    },
}

impl<S, E, C> Step<S, E, C> {
    /// The state after the event.
    pub fn state(self) -> S {
        match self {
            Self::Moved { to, .. } => to,
            Self::NoOp(state) | Self::Illegal { state, .. } => state,
        }
    }

    /// What the executor does next, if the machine moved.
    pub fn command(self) -> Option<C> {
        match self {
            Self::Moved { command, .. } => Some(command),
            Self::NoOp(_) | Self::Illegal { .. } => None,
        }
    }
}

/// A machine's answer before it is joined with the state and the event that it is about.
#[derive(Clone, Copy)]
pub(crate) enum Verdict<S, C> {
    Move(S, C),
    Ignore,
    Refuse,
}

impl<S, C> Verdict<S, C> {
    pub(crate) fn about<E>(self, state: S, event: E) -> Step<S, E, C> {
        match self {
            Self::Move(to, command) => Step::Moved { to, command },
            Self::Ignore => Step::NoOp(state),
            Self::Refuse => Step::Illegal { state, event },
        }
    }
}
