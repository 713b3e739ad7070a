//! `vfioctl save --output`: state out of devices into a folder.
//!
//! ```text
//!   probe the folder -> dry run: is there room? -> StartSave -> stream -> folder (manifest last) -> Ack{complete} -> wait until done -> summary
//! ```
//!
//! Invariants: the manifest is there before the agent is told that all is durable. The checkpoint says INCONSISTENT until
//! its operation has ended well, so that a crash or an interrupt of this program cannot make it look better than it
//! is. Failure paths: a folder that fails aborts the stream with the reason, and the save is undone; Ctrl-C cancels it.

mod summary;

use std::path::Path;
use std::time::Duration;

use vfio_checkpoint_client::call::Client;
use vfio_checkpoint_client::document::Consistency;
use vfio_checkpoint_client::folder::{self, Existing, FolderError, FolderManifest, FolderWriter};
use vfio_checkpoint_client::transfer::{Accepted, TakeState, Taker};
use vfio_checkpoint_proto::domain::Phase;
use vfio_checkpoint_proto::ids::OperationName;
use vfio_checkpoint_proto::v1;

use crate::cli::OutputFormat;
use crate::commands::started;
use crate::outcome::{Exit, Failure, judge};
use crate::progress::Meter;
use crate::render;
use crate::wait;
use summary::Summary;

pub(super) async fn save(
    client: &Client,
    request: v1::StartSaveRequest,
    output: &Path,
    is_replaced: bool,
    format: OutputFormat,
) -> Result<Exit, Failure> {
    let existing = if is_replaced { Existing::Replace } else { Existing::Refuse };
    // Before a device is stopped for a folder that cannot take its state.
    folder::check_free(output, existing).await.map_err(unfit)?;
    check_room(client, &request, output, existing).await?;
    let mut interrupts = wait::Interrupts::listen()?;
    let answer = client.start_save(request).await.map_err(Failure::call)?;
    let name = started("StartSave", answer.operation.as_ref())?;
    render::say(&format!("saving as {name}"));

    let taking = Box::pin(take(client, &name, output, existing));
    let Some(taken) = interrupts.or(client, &name, taking).await else {
        return Err(wait::after_interrupt(client, &name, &mut interrupts).await);
    };
    let taken = match taken {
        Ok(taken) => taken,
        Err(failure) => {
            wait::cancel(client, &name).await;
            return Err(fate(client, &name, failure).await);
        }
    };
    // The state is safe from here on; what is left is what becomes of the devices.
    let Some(done) = interrupts.or(client, &name, wait::done(client, &name)).await else {
        let failure = wait::after_interrupt(client, &name, &mut interrupts).await;
        let note = format!("the checkpoint in {} is whole and marked INCONSISTENT", output.display());
        return Err(failure.note(&note));
    };
    let done = done?;
    let consistency = match done.consistency() {
        v1::CheckpointConsistency::Consistent => Consistency::Consistent,
        v1::CheckpointConsistency::Inconsistent | v1::CheckpointConsistency::Unspecified => {
            Consistency::Inconsistent
        }
    };
    if consistency != taken.manifest.consistency {
        mark(output, consistency).await?;
    }
    let (exit, problem) = judge(&done);
    if let Some(text) = problem.as_ref().filter(|_| done.result() != v1::OperationResult::Succeeded) {
        let note = format!("  the state in {} is whole, and marked INCONSISTENT", output.display());
        return Err(Failure::ended(exit, text, &done).note(&note));
    }
    let summary = Summary::new(&done, &taken, output, consistency);
    render::print(format, |detail| summary.table(detail), &summary)?;
    match problem {
        None => Ok(exit),
        Some(text) => Err(Failure::ended(exit, text, &done).printed()),
    }
}

/// What the agent expects of the state has to fit into the folder.
async fn check_room(
    client: &Client,
    request: &v1::StartSaveRequest,
    output: &Path,
    existing: Existing,
) -> Result<(), Failure> {
    let question = v1::StartSaveRequest { validate_only: true, request_id: String::new(), ..request.clone() };
    let answer = client.start_save(question).await.map_err(Failure::call)?;
    // What is in the way is told by the refusal of the save itself.
    let Some(total) = answer.prediction.and_then(|known| known.total).filter(|_| answer.blockers.is_empty())
    else {
        return Ok(());
    };
    let room = folder::check_room(output, existing, total.bytes).await;
    match total.kind() {
        v1::DataSizeKind::Known => room.map_err(unfit),
        v1::DataSizeKind::UpperBound => {
            if let Err(error @ FolderError::NoRoom { .. }) = &room {
                render::say(&format!("the state may turn out smaller, so it is saved all the same: {error}"));
            }
            Ok(())
        }
        v1::DataSizeKind::Unknown | v1::DataSizeKind::Unspecified => Ok(()),
    }
}

/// A folder that cannot take a checkpoint.
fn unfit(error: FolderError) -> Failure {
    let failure = if let FolderError::NotEmpty { path, found, replaceable: true } = error {
        let text = format!(
            "{} is not empty: it holds {found:?}; give a new or empty folder, or --replace to replace the checkpoint in it",
            path.display()
        );
        Failure::with_advice(Exit::Refused, text)
    } else {
        Failure::with_advice(Exit::Refused, error)
    };
    failure.because("FOLDER_UNFIT")
}

struct Taken {
    manifest: FolderManifest,
    moved_bytes: u64,
    time: Duration,
}

/// Takes all state into the folder and tells the agent so.
async fn take(
    client: &Client,
    name: &OperationName,
    output: &Path,
    existing: Existing,
) -> Result<Taken, Failure> {
    let TakeState { manifest, limits, mut taker } =
        TakeState::open(client, name).await.map_err(Failure::open)?;
    let meter = Meter::new(None);
    let folder_failed = |error| Failure::new(Exit::Failed, error);
    let mut writer = match FolderWriter::create(output, &manifest.into(), existing).await {
        Ok(writer) => writer,
        Err(error) => return Err(give_up(taker, None, folder_failed(error)).await),
    };
    if let Err(failure) = fill(&mut taker, &mut writer, &meter, name).await {
        return Err(give_up(taker, Some(writer), failure).await);
    }
    meter.phase("SYNC");
    let mut finishing = Box::pin(writer.finish(Consistency::Inconsistent));
    // A disk may take long; the agent must not take that for an end.
    let mut alive = tokio::time::interval((limits.idle_timeout / 4).max(Duration::from_millis(100)));
    let finished = loop {
        tokio::select! {
            finished = &mut finishing => break finished,
            _ = alive.tick() => {
                if let Err(error) = taker.acknowledge().await {
                    let finished = finishing.await;
                    return Err(unfinished(output, finished.is_ok(), Failure::new(Exit::Failed, error)));
                }
            }
        }
    };
    let manifest = match finished {
        Ok(manifest) => manifest,
        Err(error) => return Err(give_up(taker, None, folder_failed(error)).await),
    };
    if let Err(error) = taker.complete().await {
        return Err(unfinished(output, true, Failure::new(Exit::Failed, error)));
    }
    Ok(Taken { manifest, moved_bytes: meter.moved_bytes(), time: meter.elapsed() })
}

async fn fill(
    taker: &mut Taker,
    writer: &mut FolderWriter,
    meter: &Meter,
    name: &OperationName,
) -> Result<(), Failure> {
    let failed = |error| Failure::new(Exit::Failed, error);
    let mut is_cutover_told = false;
    while let Some(accepted) = taker.next().await.map_err(|error| Failure::new(Exit::Failed, error))? {
        match accepted {
            Accepted::Chunk { device, chunk } => {
                meter.moved(chunk.bytes().len());
                writer.chunk(index(device), chunk).await.map_err(failed)?;
            }
            Accepted::Progress(progress) => {
                meter.heard(&progress);
                if progress.phase == Phase::WaitingForCutover && !is_cutover_told {
                    is_cutover_told = true;
                    meter.say(&format!(
                        "pause the workload and call: vfioctl operations cutover {}",
                        name.id()
                    ));
                }
            }
            Accepted::Sealed { device, seal, config } => {
                writer.seal(index(device), seal, config.map(Into::into)).await.map_err(failed)?;
            }
        }
    }
    Ok(())
}

/// There are 64 devices at most; a number that does not fit is refused by the folder as unknown.
fn index(device: usize) -> u32 {
    u32::try_from(device).unwrap_or(u32::MAX)
}

/// Tells the agent why, and removes what was written.
async fn give_up(taker: Taker, writer: Option<FolderWriter>, failure: Failure) -> Failure {
    if let Some(writer) = writer {
        writer.abandon().await;
    }
    taker.abort(&failure.message).await;
    failure
}

/// The folder is whole, but whether the agent has heard so is not known: it stays INCONSISTENT.
fn unfinished(output: &Path, is_whole: bool, failure: Failure) -> Failure {
    if !is_whole {
        return failure;
    }
    let note = format!("the state in {} is whole, and marked INCONSISTENT", output.display());
    failure.note(&format!("  {note}"))
}

async fn mark(output: &Path, consistency: Consistency) -> Result<(), Failure> {
    let failed = |error| Failure::new(Exit::Failed, format!("the checkpoint cannot be marked: {error}"));
    folder::set_consistency(output, consistency).await.map_err(failed)
}

/// What became of an operation whose stream failed. The operation knows the first cause.
pub(in crate::commands) async fn fate(client: &Client, name: &OperationName, failure: Failure) -> Failure {
    match wait::done(client, name).await {
        Ok(operation) => match judge(&operation) {
            (exit, Some(text)) => Failure::ended(exit, text, &operation).after(&failure),
            (_, None) => failure.about(name),
        },
        Err(unknown) => unknown.after(&failure),
    }
}
