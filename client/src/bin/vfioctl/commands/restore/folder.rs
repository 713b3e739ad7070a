//! `vfioctl restore --input`: state from a folder into devices.
//!
//! ```text
//!   verify the folder -> Restore -> stream, each seal compared before it is sent -> wait until done -> summary
//! ```
//!
//! Invariants: the whole folder is verified before the agent is asked for anything. A file that changes after that is
//! found before its seal is sent, so its state is never run. A connection that breaks is dialed again, and the stream goes
//! on. Failure paths: the stream is aborted with the reason, and the agent resets the devices; Ctrl-C cancels the restore.

use std::path::Path;
use std::time::Duration;

use vfio_checkpoint_client::call::Client;
use vfio_checkpoint_client::document::Consistency;
use vfio_checkpoint_client::folder::FolderReader;
use vfio_checkpoint_client::transfer::{GiveState, Giver, RedialOperation, Spool, SpoolOptions};
use vfio_checkpoint_proto::DEFAULT_CHUNK_BYTES;
use vfio_checkpoint_proto::domain::ConfigSpaceCapture;
use vfio_checkpoint_proto::ids::OperationName;
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_proto::version::VersionRange;

use super::{RestoreArgs, Summary, dry_run, request};
use crate::cli::OutputFormat;
use crate::commands::save::fate;
use crate::commands::started;
use crate::outcome::{Exit, Failure, judge};
use crate::progress::Meter;
use crate::render;
use crate::wait;

/// The folder, all of it compared with its seals.
pub(super) async fn verified(input: &Path, devices: usize) -> Result<FolderReader, Failure> {
    let refused = |error| Failure::new(Exit::Refused, error);
    let folder = FolderReader::open(input).await.map_err(refused)?;
    let saved = folder.manifest().devices.len();
    if saved != devices {
        let text = format!("the checkpoint has {saved} devices, but {devices} are given; give as many");
        return Err(Failure::new(Exit::Usage, text));
    }
    folder.verify().await.map_err(refused)?;
    Ok(folder)
}

pub(super) async fn restore(
    client: &Client,
    args: &RestoreArgs,
    folder: &FolderReader,
    format: OutputFormat,
) -> Result<Exit, Failure> {
    if folder.manifest().consistency == Consistency::Inconsistent {
        render::say(
            "the checkpoint is marked INCONSISTENT: memory that was captured with it may be newer than it",
        );
    }
    let request = v1::RestoreRequest { manifest: Some(folder.wire_manifest().clone()), ..request(args)? };
    let mut interrupts = wait::Interrupts::listen()?;
    let answer = client.restore(request).await.map_err(Failure::call)?;
    if args.dry_run {
        return dry_run(&answer, format);
    }
    let name = started("Restore", answer.operation.as_ref())?;
    render::say(&format!("restoring as {name}"));

    let giving = Box::pin(give(client, &name, folder));
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
    match judge(&done) {
        (exit, None) => {
            let summary = Summary::new(&done, given.moved_bytes, Some(given.time));
            render::print(format, |_| summary.table(), &summary)?;
            Ok(exit)
        }
        (exit, Some(text)) => Err(Failure::ended(exit, text, &done)),
    }
}

/// How long a connection that broke is dialed again: as long as an agent waits by default.
const RESUME_WINDOW: Duration = Duration::from_secs(30);
/// What is kept in memory for that, at most. An agent that would have more is refused.
const MAX_SPOOL_BYTES: u64 = 256 << 20;

struct Given {
    moved_bytes: u64,
    time: Duration,
}

async fn give(client: &Client, name: &OperationName, folder: &FolderReader) -> Result<Given, Failure> {
    let GiveState { limits, giver, .. } = GiveState::open(client, name).await.map_err(Failure::open)?;
    let least_bytes = Spool::least_memory_bytes(&limits);
    let spool = Spool::in_memory(SpoolOptions::default().memory_bytes.max(least_bytes.min(MAX_SPOOL_BYTES)));
    let redial = RedialOperation::new(client.clone(), name.clone(), VersionRange::OURS);
    let mut giver = giver
        .resumable(spool, Box::new(redial), RESUME_WINDOW)
        .map_err(|error| Failure::new(Exit::Failed, error))?;
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
