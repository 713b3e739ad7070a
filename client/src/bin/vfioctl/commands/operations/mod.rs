//! `vfioctl operations`: list, get, watch, cancel, cutover, resume, commit, ready, resolve.

mod resolve;

use std::time::Duration;

use clap::{Args, Subcommand};
use vfio_checkpoint_client::call::Client;
use vfio_checkpoint_proto::ids::{DeviceName, OperationName};
use vfio_checkpoint_proto::v1;

use super::{PAGE_SIZE, all_pages, missing};
use crate::cli::OutputFormat;
use crate::outcome::{Exit, Failure, judge};
use crate::progress::Meter;
use crate::render::{self, OperationDoc};
use crate::values::{device, duration, operation};
use crate::wait;
use resolve::ResolveArgs;

/// Show and steer operations.
#[derive(Debug, Subcommand)]
pub(crate) enum OperationsCommand {
    /// List operations, the newest first
    List {
        /// Only those that are not done
        #[arg(long)]
        active: bool,
        /// Only those on this device
        #[arg(long, value_name = "DEVICE", value_parser = device)]
        device: Option<DeviceName>,
    },
    /// Show one operation
    Get {
        /// Its name
        #[arg(value_name = "OPERATION", value_parser = operation)]
        name: OperationName,
    },
    /// Follow one operation until it is done
    Watch {
        /// Its name
        #[arg(value_name = "OPERATION", value_parser = operation)]
        name: OperationName,
        /// Watch no longer than this; the operation goes on
        #[arg(long, value_name = "TIME", value_parser = duration)]
        wait_timeout: Option<Duration>,
    },
    /// Undo an operation, and wait for that
    Cancel {
        /// Its name
        #[arg(value_name = "OPERATION", value_parser = operation)]
        name: OperationName,
    },
    /// Stop the devices of a save or a migration now: its workload is paused
    Cutover(Steer),
    /// End a hold: run the devices
    Resume(Steer),
    /// Let the destination of a migration run the devices: all else of the workload is there; said to the source
    Commit(Steer),
    /// The workload's memory is mapped and its interrupts are armed: go on; said to the destination
    Ready(Steer),
    /// End a migration that is in doubt; without a decision, show both sides and what can be decided
    Resolve(ResolveArgs),
}

/// Say something to an operation.
#[derive(Debug, Args)]
pub(crate) struct Steer {
    /// Its name
    #[arg(value_name = "OPERATION", value_parser = operation)]
    name: OperationName,
    /// Wait until the operation is done
    #[arg(long)]
    wait: bool,
    /// Wait no longer than this; the operation goes on
    #[arg(long, value_name = "TIME", value_parser = duration, requires = "wait")]
    wait_timeout: Option<Duration>,
}

pub(crate) async fn run(
    client: &Client,
    command: OperationsCommand,
    format: OutputFormat,
) -> Result<Exit, Failure> {
    match command {
        OperationsCommand::List { active, device } => {
            let device = device.map(String::from).unwrap_or_default();
            let all = all_pages(async |page_token| {
                let request = v1::ListOperationsRequest {
                    page_size: PAGE_SIZE,
                    page_token,
                    active_only: active,
                    device: device.clone(),
                };
                let page = client.list_operations(request).await?;
                Ok((page.operations, page.next_page_token))
            });
            let all: Vec<OperationDoc> = all.await?.iter().map(OperationDoc::new).collect();
            render::print(format, |detail| render::operations(detail, &all), &all)?;
            Ok(Exit::Done)
        }
        OperationsCommand::Get { name } => {
            let request = v1::GetOperationRequest { name: name.to_string() };
            let answer = client.get_operation(request).await.map_err(Failure::call)?;
            show(format, answer.operation, "GetOperation")
        }
        OperationsCommand::Watch { name, wait_timeout } => {
            // One that is not there is refused; where only the agent is away, the watch waits for it.
            let request = v1::GetOperationRequest { name: name.to_string() };
            if let Err(error) = client.get_operation(request).await
                && !wait::is_away(&error)
            {
                return Err(Failure::call(error));
            }
            watch(client, &name, wait_timeout, format).await
        }
        OperationsCommand::Cancel { name } => cancel(client, &name, format).await,
        OperationsCommand::Cutover(steer) => {
            let request = v1::CutoverRequest { operation: steer.name.to_string() };
            let answer = client.cutover(request).await.map_err(Failure::call)?;
            steered(client, steer, answer.operation, "Cutover", format).await
        }
        OperationsCommand::Resume(steer) => {
            let request = v1::ResumeRequest { operation: steer.name.to_string() };
            let answer = client.resume(request).await.map_err(Failure::call)?;
            steered(client, steer, answer.operation, "Resume", format).await
        }
        OperationsCommand::Commit(steer) => {
            let request = v1::CommitRequest { operation: steer.name.to_string() };
            let answer = client.commit(request).await.map_err(Failure::call)?;
            steered(client, steer, answer.operation, "Commit", format).await
        }
        OperationsCommand::Ready(steer) => {
            let request = v1::ReadyRequest { operation: steer.name.to_string() };
            let answer = client.ready(request).await.map_err(Failure::call)?;
            steered(client, steer, answer.operation, "Ready", format).await
        }
        OperationsCommand::Resolve(args) => Box::pin(resolve::run(client, args, format)).await,
    }
}

async fn steered(
    client: &Client,
    steer: Steer,
    operation: Option<v1::Operation>,
    rpc: &'static str,
    format: OutputFormat,
) -> Result<Exit, Failure> {
    if steer.wait {
        watch(client, &steer.name, steer.wait_timeout, format).await
    } else {
        show(format, operation, rpc)
    }
}

async fn watch(
    client: &Client,
    name: &OperationName,
    limit: Option<Duration>,
    format: OutputFormat,
) -> Result<Exit, Failure> {
    let mut interrupts = wait::Interrupts::listen()?;
    let meter = Meter::new(None);
    let done = tokio::select! {
        done = wait::until_done(client, name, limit, Some(&meter), wait::Teller::new()) => done?,
        // Only looking ends: the operation is somebody's and goes on.
        () = interrupts.next() => {
            return Err(Failure::new(Exit::Interrupted, format!("{name} goes on")).about(name));
        }
    };
    drop(meter);
    match judge(&done) {
        (exit, None) => print_one(format, &done).map(|()| exit),
        (exit, Some(text)) => Err(Failure::ended(exit, text, &done)),
    }
}

async fn cancel(client: &Client, name: &OperationName, format: OutputFormat) -> Result<Exit, Failure> {
    let request = v1::CancelOperationRequest { name: name.to_string() };
    client.cancel_operation(request).await.map_err(Failure::call)?;
    let done = wait::done(client, name).await?;
    match (done.result(), judge(&done)) {
        // It was undone, as was asked for.
        (v1::OperationResult::Cancelled, (Exit::Failed, _)) => print_one(format, &done).map(|()| Exit::Done),
        (v1::OperationResult::Succeeded, _) => {
            let text = format!("{name} had succeeded before it could be cancelled");
            Err(Failure::ended(Exit::Failed, text, &done))
        }
        (
            v1::OperationResult::Cancelled | v1::OperationResult::Failed | v1::OperationResult::Unspecified,
            (exit, text),
        ) => Err(Failure::ended(exit, text.unwrap_or_default(), &done)),
    }
}

fn show(format: OutputFormat, operation: Option<v1::Operation>, rpc: &'static str) -> Result<Exit, Failure> {
    print_one(format, &operation.ok_or_else(|| missing(rpc, "operation"))?)?;
    Ok(Exit::Done)
}

/// Prints one operation.
pub(crate) fn print_one(format: OutputFormat, operation: &v1::Operation) -> Result<(), Failure> {
    let doc = OperationDoc::new(operation);
    render::print(format, |detail| render::operations(detail, std::slice::from_ref(&doc)), &doc)
}
