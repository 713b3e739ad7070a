//! `vfioctl restore`: state into devices, from a folder or from a store of the agent.
//!
//! ```text
//!   --input DIR         verify the folder -> Restore -> stream          see [`folder`]
//!   --checkpoint NAME   Restore -> wait; the agent reads its own store  see [`store`]
//! ```
//!
//! Failure paths: a refusal lists everything that is in the way, before anything is touched.

mod folder;
mod store;

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use vfio_checkpoint_client::call::printable;
use vfio_checkpoint_proto::ids::{CheckpointName, DeviceName, PodName};
use vfio_checkpoint_proto::v1;

use super::{Blockers, blocker_docs, request_id};
use crate::cli::{Global, Waiting};
use crate::connection::connect;
use crate::outcome::{Exit, Failure};
use crate::render;
use crate::values::{checkpoint, device};

/// Restore the state of devices.
#[allow(clippy::struct_excessive_bools, reason = "each is a flag of its own on the command line")]
#[derive(Debug, Args)]
pub(crate) struct RestoreArgs {
    /// The devices that take the state, in the order in which they were saved
    #[arg(required = true, value_name = "DEVICE", value_parser = device)]
    devices: Vec<DeviceName>,
    #[command(flatten)]
    source: Source,
    /// Load the state and wait for `vfioctl operations resume`
    #[arg(long)]
    hold: bool,
    /// The devices that were saved may still run: make new logical devices of their state
    #[arg(long)]
    allow_fork: bool,
    /// Take a checkpoint that is marked INCONSISTENT; a folder's is taken with a warning
    #[arg(long, conflicts_with = "input")]
    allow_inconsistent: bool,
    /// The pod that will use the devices, NAMESPACE/NAME
    #[arg(long, value_name = "POD")]
    owner_pod: Option<PodName>,
    /// Verify what is in the folder, say what is in the way, and do nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    waiting: Waiting,
}

/// Where the state comes from.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Source {
    /// The folder with the checkpoint
    #[arg(long, value_name = "DIR", conflicts_with_all = ["no_wait", "wait_timeout"])]
    input: Option<PathBuf>,
    /// The checkpoint in a store of the agent, STORE/ID
    #[arg(long, value_name = "CHECKPOINT", value_parser = checkpoint)]
    checkpoint: Option<CheckpointName>,
}

pub(crate) async fn run(global: &Global, args: RestoreArgs) -> Result<Exit, Failure> {
    let format = global.output_format;
    match (&args.source.input, &args.source.checkpoint) {
        (Some(input), _) => {
            // Verified before the agent is asked for anything, and before it has to be there.
            let folder = folder::verified(input, args.devices.len()).await?;
            let client = connect(global).await?;
            folder::restore(&client, &args, &folder, format).await
        }
        (None, Some(_)) => store::restore(&connect(global).await?, &args, format).await,
        (None, None) => Err(Failure::usage("give --input or --checkpoint")),
    }
}

fn request(args: &RestoreArgs) -> Result<v1::RestoreRequest, Failure> {
    let after = if args.hold { v1::AfterRestore::Hold } else { v1::AfterRestore::Run };
    Ok(v1::RestoreRequest {
        devices: args.devices.iter().map(ToString::to_string).collect(),
        after: after.into(),
        validate_only: args.dry_run,
        request_id: request_id()?,
        owner_pod: args.owner_pod.clone().map(String::from).unwrap_or_default(),
        checkpoint: args.source.checkpoint.clone().map(String::from).unwrap_or_default(),
        allow_fork: args.allow_fork,
        allow_inconsistent: args.allow_inconsistent,
        ..v1::RestoreRequest::default()
    })
}

/// What a restore says of itself.
#[derive(Debug, Serialize)]
struct Summary {
    operation: String,
    result: &'static str,
    moved_bytes: u64,
    /// How long the state took. None where the agent read it by itself.
    time_us: Option<u64>,
    devices: Vec<RestoredDevice>,
}

#[derive(Debug, Serialize)]
struct RestoredDevice {
    device: String,
    logical_device: Option<String>,
    epoch: Option<u64>,
}

impl Summary {
    fn new(done: &v1::Operation, moved_bytes: u64, time: Option<std::time::Duration>) -> Self {
        Self {
            operation: done.name.clone(),
            result: render::short(done.result().as_str_name(), "OPERATION_RESULT_"),
            moved_bytes,
            time_us: time.map(|time| u64::try_from(time.as_micros()).unwrap_or(u64::MAX)),
            devices: done
                .devices
                .iter()
                .map(|device| RestoredDevice {
                    device: device.device.clone(),
                    logical_device: device.logical_device.as_ref().map(|logical| logical.id.clone()),
                    epoch: device.logical_device.as_ref().map(|logical| logical.epoch),
                })
                .collect(),
        }
    }

    fn table(&self) -> String {
        let took = self
            .time_us
            .map(std::time::Duration::from_micros)
            .map(|time| format!(" in {} ({})", render::time(time), render::rate(self.moved_bytes, time)));
        let devices: Vec<String> = self.devices.iter().map(|device| printable(&device.device)).collect();
        format!(
            "restored  {}{}\ndevices   {}\n",
            render::bytes(self.moved_bytes),
            took.unwrap_or_default(),
            devices.join(", ")
        )
    }
}

/// Says what a dry run found.
fn dry_run(answer: &v1::RestoreResponse, format: crate::cli::OutputFormat) -> Result<Exit, Failure> {
    Blockers { blockers: blocker_docs(&answer.blockers) }.print(format)
}
