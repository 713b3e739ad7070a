//! `recover` and `reset`: a device that somebody left in the middle of something.

use serde::Serialize;
use vfio_checkpoint_device::driver::Failure;
use vfio_checkpoint_device::{Call, Driver, Identity};
use vfio_checkpoint_fsm::{Outcome, Role};

use crate::args::{One, Output};
use crate::failure::CommandFailure;
use crate::output::{line, print_json};
use crate::target::Target;

/// What became of the device.
#[derive(Serialize)]
struct Mended {
    device: Identity,
    /// Whether it still has the state that it was found with.
    state_preserved: bool,
}

pub(crate) fn recover(one: &One) -> Result<(), CommandFailure> {
    mend(one, Call::GetState, |driver| driver.recover_left_over(Role::Source))
}

pub(crate) fn reset(one: &One) -> Result<(), CommandFailure> {
    mend(one, Call::Reset, |driver| driver.reset().map(|()| Outcome::StateLost))
}

fn mend(
    one: &One,
    call: Call,
    work: fn(&mut Driver) -> Result<Outcome, Failure>,
) -> Result<(), CommandFailure> {
    let opened = Target::parse(&one.device, &one.common)?.open()?;
    let outcome = opened
        .lane
        .call(call, work)
        .map_err(CommandFailure::hung)?
        .map_err(|failure| CommandFailure::of_device(&failure))?;
    let device = opened.lane.identity().clone();
    let mended = Mended { device, state_preserved: outcome == Outcome::Preserved };
    match one.common.output {
        Output::Json => print_json(&mended),
        Output::Table => {
            let state = if mended.state_preserved { "with its state" } else { "its state lost" };
            line(format_args!("{} is in RUNNING, {state}", mended.device))
        }
    }
}
