//! `vfioctl restore --checkpoint`: state out of a store of the agent into devices.
//!
//! ```text
//!   Restore{checkpoint} -> wait until done -> summary
//! ```
//!
//! The agent verifies what it reads, and runs nothing that is not what was sealed. Failure paths: Ctrl-C cancels the
//! restore, and the agent resets the devices.

use vfio_checkpoint_client::call::Client;

use super::{RestoreArgs, Summary, dry_run, request};
use crate::cli::OutputFormat;
use crate::commands::{operations, started};
use crate::outcome::{Exit, Failure, judge};
use crate::render;
use crate::wait;

pub(super) async fn restore(
    client: &Client,
    args: &RestoreArgs,
    format: OutputFormat,
) -> Result<Exit, Failure> {
    let mut interrupts = wait::Interrupts::listen()?;
    let answer = client.restore(request(args)?).await.map_err(Failure::call)?;
    if args.dry_run {
        return dry_run(&answer, format);
    }
    let name = started("Restore", answer.operation.as_ref())?;
    if !args.waiting.is_wanted() {
        if let Some(operation) = &answer.operation {
            operations::print_one(format, operation)?;
        }
        return Ok(Exit::Done);
    }
    render::say(&format!("restoring as {name}"));
    let done = wait::stay(client, &name, &args.waiting, &mut interrupts).await?;
    match judge(&done) {
        (exit, None) => {
            let summary = Summary::new(&done, done.moved_bytes, None);
            render::print(format, |_| summary.table(), &summary)?;
            Ok(exit)
        }
        (exit, Some(text)) => Err(Failure::ended(exit, text, &done)),
    }
}
