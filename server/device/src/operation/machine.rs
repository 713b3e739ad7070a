//! The loop that drives an operation machine of `fsm`: one for a save and for a restore, from the start or taken up.
//!
//! ```text
//!        Moved { to, command }
//!   on ------------------------> moved(to) ---- ok ----> execute(command), listening for Cancel
//!   ^                               |                       |                      |
//!   |<---------- Failed ------------'                       |                      |
//!   |<------------------- event ----------------------------'                      |
//!   |<------------------- Cancel, where it moves the machine; the work is dropped -'
//! ```
//! # Invariants
//! - The caller has recorded a move before its command is begun.
//! - The machine decides whether Cancel is in time. Where it is not, the work goes on as if nobody had called.
//!
//! # Failure paths
//! A move that cannot be recorded is a failure of that move, except where there is no way back or the devices are being
//! brought back already: there the operation goes on, and it is noted. So it does where a hand-over that is taken up tells
//! again what was on record before: the destination may run, whatever can be written now. An event that the machine has no use for is a
//! defect here; the devices are brought back all the same.

use std::fmt::{Debug, Display};
use std::future::Future;
use std::pin::pin;

use futures_util::FutureExt as _;
use futures_util::future::{Either, select};
use tracing::Instrument as _;
use vfio_checkpoint_fsm::Step;

use super::error::{Cause, Unwound};
use super::{Caller, OperationStep};

/// The answer of a machine.
pub(super) type StepOf<M> = Step<<M as Machine>::State, <M as Machine>::Event, <M as Machine>::Command>;

/// A machine of `fsm` with what executes its commands.
pub(super) trait Machine: Send {
    type Plan: Copy + Send;
    type State: Copy + Display + Send;
    type Event: Copy + Debug + Send;
    type Command: Copy + Send;

    const CANCEL: Self::Event;
    const FAILED: Self::Event;

    fn on(state: Self::State, plan: Self::Plan, event: Self::Event) -> StepOf<Self>
    where
        Self: Sized;

    /// Whether the machine is past its point of no return in this state.
    fn is_past_no_return(&self, state: Self::State) -> bool;

    fn step(state: Self::State) -> OperationStep;

    fn plan(&self) -> Self::Plan;

    fn unwound(&mut self) -> &mut Unwound;

    /// Does what the machine commands and says what came of it; `None` where that was the end.
    fn execute(
        &mut self,
        state: Self::State,
        command: Self::Command,
    ) -> impl Future<Output = Option<Self::Event>> + Send;

    /// Brings the devices back although the machine is lost.
    fn bring_back(&mut self) -> impl Future<Output = ()> + Send;
}

/// An event came that the machine has no use for. The devices were brought back; the cause is noted.
pub(super) struct LostTrack;

/// The first step: Cancel may have come before it.
pub(super) fn begin<M: Machine>(
    caller: &dyn Caller,
    machine: &mut M,
    admitted: M::State,
    start: M::Event,
) -> StepOf<M> {
    match caller.cancelled().now_or_never() {
        Some(reason) => {
            machine.unwound().blame(Cause::Cancelled(reason));
            M::on(admitted, machine.plan(), M::CANCEL)
        }
        None => M::on(admitted, machine.plan(), start),
    }
}

/// Drives the machine to its end, which is returned.
pub(super) async fn drive<M: Machine>(
    machine: &mut M,
    caller: &dyn Caller,
    mut step: StepOf<M>,
) -> Result<M::State, LostTrack> {
    let plan = machine.plan();
    loop {
        let (to, command) = match step {
            Step::Moved { to, command } => (to, command),
            // Neither can be: each event here answers the command before it, which the state waits for.
            Step::NoOp(state) => return Err(lost_track(machine, state, None).await),
            Step::Illegal { state, event } => return Err(lost_track(machine, state, Some(event)).await),
        };
        if let Err(error) = caller.moved(M::step(to)).await {
            match M::on(to, plan, M::FAILED) {
                failed @ Step::Moved { .. } if !machine.is_past_no_return(to) => {
                    machine.unwound().blame(Cause::Unrecorded(error));
                    step = failed;
                    continue;
                }
                Step::Moved { .. } | Step::NoOp(_) | Step::Illegal { .. } => {
                    machine.unwound().unrecorded(&error);
                }
            }
        }
        let done = {
            let phase = tracing::info_span!("phase", step = %M::step(to));
            let work = pin!(machine.execute(to, command).instrument(phase));
            match select(caller.cancelled(), work).await {
                Either::Right((event, _)) => Ok(event),
                Either::Left((reason, work)) => match M::on(to, plan, M::CANCEL) {
                    undo @ Step::Moved { .. } => Err((reason, undo)),
                    Step::NoOp(_) | Step::Illegal { .. } => Ok(work.await),
                },
            }
        };
        step = match done {
            Ok(Some(event)) => M::on(to, plan, event),
            Ok(None) => return Ok(to),
            Err((reason, undo)) => {
                machine.unwound().blame(Cause::Cancelled(reason));
                undo
            }
        };
    }
}

async fn lost_track<M: Machine>(machine: &mut M, state: M::State, event: Option<M::Event>) -> LostTrack {
    let reason = format!("the operation in {state} has no use for {event:?}; please report this as a defect");
    machine.unwound().blame(Cause::Other(reason.into()));
    machine.bring_back().await;
    LostTrack
}
