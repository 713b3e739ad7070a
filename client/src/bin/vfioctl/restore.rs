//! `vfioctl restore`: state from a folder into devices.
//!
//! ```text
//!   verify the folder -> Restore -> stream, each seal compared before it is sent -> wait until done -> summary
//! ```
//!
//! Invariants: the whole folder is verified before the agent is asked for anything. A file that changes after that is
//! found before its seal is sent, so its state is never run. Failure paths: the stream is aborted with the reason, and
//! the agent resets the devices; Ctrl-C cancels the restore.

use std::time::Duration;

use serde::Serialize;
use vfio_checkpoint_client::call::{Client, new_request_id};
use vfio_checkpoint_client::folder::{Consistency, FolderReader};
use vfio_checkpoint_client::transfer::{GiveState, Giver};
use vfio_checkpoint_proto::DEFAULT_CHUNK_BYTES;
use vfio_checkpoint_proto::domain::ConfigSpaceCapture;
use vfio_checkpoint_proto::ids::OperationName;
use vfio_checkpoint_proto::v1;

use crate::args::{OutputFormat, Restore};
use crate::calls::missing;
use crate::outcome::{Exit, Failure, judge};
use crate::progress::Meter;
use crate::render::{self, BlockerDoc};
use crate::save::{blocked, fate};
use crate::wait;

pub(crate) async fn restore(client: &Client, args: Restore, format: OutputFormat) -> Result<Exit, Failure> {
    let refused = |error| Failure::new(Exit::Refused, error);
    let folder = FolderReader::open(&args.input).await.map_err(refused)?;
    let saved = folder.manifest().devices.len();
    if saved != args.devices.len() {
        let text =
            format!("the checkpoint has {saved} devices, but {} are given; give as many", args.devices.len());
        return Err(Failure::new(Exit::Usage, text));
    }
    folder.verify().await.map_err(refused)?;
    if folder.manifest().consistency == Consistency::Inconsistent {
        render::say(
            "the checkpoint is marked INCONSISTENT: memory that was captured with it may be newer than it",
        );
    }
    let request_id = new_request_id()
        .ok_or_else(|| Failure::new(Exit::Failed, "this machine has no randomness for a request id"))?;
    let after = if args.hold { v1::AfterRestore::Hold } else { v1::AfterRestore::Run };
    let request = v1::RestoreRequest {
        devices: args.devices.iter().map(ToString::to_string).collect(),
        manifest: Some(folder.wire_manifest().clone()),
        after: after.into(),
        validate_only: args.dry_run,
        request_id,
        ..v1::RestoreRequest::default()
    };
    let mut interrupts = wait::Interrupts::listen()?;
    let answer = client.restore(request).await.map_err(Failure::call)?;
    if args.dry_run {
        let doc = DryRun { blockers: answer.blockers.iter().map(BlockerDoc::new).collect() };
        render::print(format, || blocked(&doc.blockers), &doc)?;
        return Ok(if doc.blockers.is_empty() { Exit::Done } else { Exit::Refused });
    }
    let started = answer.operation.ok_or_else(|| missing("Restore", "operation"))?;
    let name: OperationName =
        started.name.parse().map_err(|_| missing("Restore", "operation with a name"))?;
    render::say(&format!("restoring as {name}"));

    let giving = Box::pin(give(client, &name, &folder));
    let Some(given) = interrupts.or(client, &name, giving).await else {
        return Err(wait::after_interrupt(client, &name, &mut interrupts).await);
    };
    let given = match given {
        Ok(given) => given,
        Err(failure) => {
            wait::cancel(client, &name).await;
            return Err(fate(client, &name, failure).await);
        }
    };
    let Some(done) = interrupts.or(client, &name, wait::done(client, &name)).await else {
        return Err(wait::after_interrupt(client, &name, &mut interrupts).await);
    };
    let done = done?;
    let (exit, problem) = judge(&done);
    let summary = Summary {
        operation: done.name.clone(),
        result: done.result().as_str_name().trim_start_matches("OPERATION_RESULT_"),
        moved_bytes: given.moved_bytes,
        time_us: u64::try_from(given.time.as_micros()).unwrap_or(u64::MAX),
        devices: args.devices.iter().map(ToString::to_string).collect(),
    };
    let table = || {
        let (bytes, time) = (render::bytes(given.moved_bytes), render::time(given.time));
        let rate = render::rate(given.moved_bytes, given.time);
        format!("restored  {bytes} in {time} ({rate})\ndevices   {}\n", summary.devices.join(", "))
    };
    match problem {
        None => {
            render::print(format, table, &summary)?;
            Ok(exit)
        }
        Some(text) => Err(Failure::new(exit, text)),
    }
}

#[derive(Debug, Serialize)]
struct DryRun {
    blockers: Vec<BlockerDoc>,
}

#[derive(Debug, Serialize)]
struct Summary {
    operation: String,
    result: &'static str,
    moved_bytes: u64,
    time_us: u64,
    devices: Vec<String>,
}

struct Given {
    moved_bytes: u64,
    time: Duration,
}

async fn give(client: &Client, name: &OperationName, folder: &FolderReader) -> Result<Given, Failure> {
    let GiveState { limits, mut giver, .. } = GiveState::open(client, name).await.map_err(Failure::open)?;
    let meter = Meter::new(Some(folder.seals().map(|seal| seal.bytes).sum()));
    meter.phase("LOADING");
    let chunk_bytes = limits.max_chunk_bytes.min(DEFAULT_CHUNK_BYTES) as usize;
    if let Err(failure) = pour(&mut giver, folder, chunk_bytes, &meter).await {
        giver.abort(&failure.message).await;
        return Err(failure);
    }
    Ok(Given { moved_bytes: meter.moved_bytes(), time: meter.elapsed() })
}

async fn pour(
    giver: &mut Giver,
    folder: &FolderReader,
    chunk_bytes: usize,
    meter: &Meter,
) -> Result<(), Failure> {
    let stream_failed = |error| Failure::new(Exit::Failed, error);
    for (device, seal) in folder.seals().enumerate() {
        let config = folder.config(device).map(ConfigSpaceCapture::try_from).transpose();
        let config = config.map_err(|error| Failure::new(Exit::Refused, error))?;
        let Some(mut chunks) = folder.chunks(device, chunk_bytes) else { break };
        while let Some(chunk) = chunks.next().await.map_err(|error| Failure::new(Exit::Failed, error))? {
            let bytes = chunk.len();
            giver.chunk(device, chunk).await.map_err(stream_failed)?;
            meter.moved(bytes);
        }
        giver.seal_as(device, config, seal).await.map_err(stream_failed)?;
    }
    meter.phase("VERIFYING");
    giver.completed().await.map_err(stream_failed)
}
