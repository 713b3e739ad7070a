//! `vfioctl save`: state out of devices into a folder.
//!
//! ```text
//!   look at the folder -> StartSave -> stream -> folder (manifest last) -> Ack{complete} -> wait until done -> summary
//! ```
//!
//! Invariants: the manifest is there before the agent is told that all is durable. The checkpoint says INCONSISTENT until
//! its operation has ended well, so that a crash or an interrupt of this program cannot make it look better than it
//! is. Failure paths: a folder that fails aborts the stream with the reason, and the save is undone; Ctrl-C cancels it.

use std::path::Path;
use std::time::Duration;

use serde::Serialize;
use vfio_checkpoint_client::call::{Client, new_request_id};
use vfio_checkpoint_client::folder::{self, Consistency, Existing, FolderManifest, FolderWriter};
use vfio_checkpoint_client::transfer::{Accepted, TakeState, Taker};
use vfio_checkpoint_proto::domain::Phase;
use vfio_checkpoint_proto::ids::OperationName;
use vfio_checkpoint_proto::v1;

use crate::args::{After, Cutover, Memory, OutputFormat, PreCopy, Save};
use crate::calls::missing;
use crate::outcome::{Exit, Failure, judge};
use crate::progress::Meter;
use crate::render::{self, BlockerDoc};
use crate::wait;

pub(crate) async fn save(client: &Client, args: Save, format: OutputFormat) -> Result<Exit, Failure> {
    let request = request(&args)?;
    if args.dry_run {
        return dry_run(client, request, format).await;
    }
    let existing = if args.replace { Existing::Replace } else { Existing::Refuse };
    // Before a device is stopped for a folder that cannot take its state.
    folder::check_free(&args.output, existing).await.map_err(|error| Failure::new(Exit::Refused, error))?;
    let mut interrupts = wait::Interrupts::listen()?;
    let started = client.start_save(request).await.map_err(Failure::call)?;
    let started = started.operation.ok_or_else(|| missing("StartSave", "operation"))?;
    let name: OperationName =
        started.name.parse().map_err(|_| missing("StartSave", "operation with a name"))?;
    render::say(&format!("saving as {name}"));

    let taking = Box::pin(take(client, &name, &args, existing));
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
        let note = format!("the checkpoint in {} is whole and marked INCONSISTENT", args.output.display());
        return Err(Failure::new(failure.exit, format!("{}\n{note}", failure.message)));
    };
    let done = done?;
    let consistency = match done.consistency() {
        v1::CheckpointConsistency::Consistent => Consistency::Consistent,
        v1::CheckpointConsistency::Inconsistent | v1::CheckpointConsistency::Unspecified => {
            Consistency::Inconsistent
        }
    };
    if consistency != taken.manifest.consistency {
        mark(&args.output, consistency).await?;
    }
    let (exit, problem) = judge(&done);
    let summary = Summary::new(&done, &taken, &args.output, consistency);
    render::print(format, || summary.table(), &summary)?;
    match problem {
        None => Ok(exit),
        Some(text) => Err(Failure::new(exit, text)),
    }
}

fn request(args: &Save) -> Result<v1::StartSaveRequest, Failure> {
    let request_id = new_request_id()
        .ok_or_else(|| Failure::new(Exit::Failed, "this machine has no randomness for a request id"))?;
    let pre_copy = match args.pre_copy {
        PreCopy::Auto => v1::PreCopyMode::Unspecified,
        PreCopy::Never => v1::PreCopyMode::Never,
        PreCopy::Required => v1::PreCopyMode::Required,
    };
    let cutover = match args.cutover {
        Cutover::Auto => v1::CutoverMode::Auto,
        Cutover::Manual => v1::CutoverMode::Manual,
    };
    let after = match args.after {
        After::Resume => v1::AfterSave::Resume,
        After::Hold => v1::AfterSave::Hold,
        After::StayStopped => v1::AfterSave::StayStopped,
    };
    let memory_capture = match args.memory {
        Memory::None => v1::MemoryCapture::None,
        Memory::WhileStopped => v1::MemoryCapture::WhileStopped,
        Memory::DirtyTracking => v1::MemoryCapture::DirtyTracking,
    };
    Ok(v1::StartSaveRequest {
        devices: args.devices.iter().map(ToString::to_string).collect(),
        pre_copy: pre_copy.into(),
        cutover: cutover.into(),
        after: after.into(),
        downtime_limit: args.downtime_limit.and_then(|limit| prost_types::Duration::try_from(limit).ok()),
        memory_capture: memory_capture.into(),
        request_id,
        ..v1::StartSaveRequest::default()
    })
}

#[derive(Debug, Serialize)]
struct DryRun {
    blockers: Vec<BlockerDoc>,
    pre_copy: Option<bool>,
    total_bytes: Option<u64>,
    predicted_downtime_us: Option<u64>,
    rate_bytes_per_second: Option<u64>,
    rate_source: Option<String>,
}

async fn dry_run(
    client: &Client,
    request: v1::StartSaveRequest,
    format: OutputFormat,
) -> Result<Exit, Failure> {
    let answer = client
        .start_save(v1::StartSaveRequest { validate_only: true, ..request })
        .await
        .map_err(Failure::call)?;
    let prediction = answer.prediction.as_ref();
    let downtime = prediction.and_then(|known| render::span(known.downtime.as_ref()));
    let doc = DryRun {
        blockers: answer.blockers.iter().map(BlockerDoc::new).collect(),
        pre_copy: prediction.map(|known| known.pre_copy),
        total_bytes: prediction
            .and_then(|known| known.total.as_ref())
            .filter(|total| total.kind() != v1::DataSizeKind::Unknown)
            .map(|total| total.bytes),
        predicted_downtime_us: downtime.and_then(|downtime| u64::try_from(downtime.as_micros()).ok()),
        rate_bytes_per_second: prediction.map(|known| known.rate_bytes_per_second),
        rate_source: prediction.map(|known| known.rate_source.clone()),
    };
    let table = || {
        let size = render::or_dash(doc.total_bytes.map(render::bytes));
        let downtime = render::or_dash(downtime.map(render::time));
        format!("{}state     {size}\ndowntime  {downtime} expected\n", blocked(&doc.blockers))
    };
    render::print(format, table, &doc)?;
    Ok(if doc.blockers.is_empty() { Exit::Done } else { Exit::Refused })
}

pub(crate) fn blocked(blockers: &[BlockerDoc]) -> String {
    if blockers.is_empty() {
        return "nothing is in the way\n".to_owned();
    }
    blockers.iter().fold("this is in the way:\n".to_owned(), |text, blocker| text + &blocker.line())
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
    args: &Save,
    existing: Existing,
) -> Result<Taken, Failure> {
    let TakeState { manifest, limits, mut taker } =
        TakeState::open(client, name).await.map_err(Failure::open)?;
    let meter = Meter::new(None);
    let folder_failed = |error| Failure::new(Exit::Failed, error);
    let mut writer = match FolderWriter::create(&args.output, &manifest.into(), existing).await {
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
                    return Err(unfinished(&args.output, finished.is_ok(), Failure::new(Exit::Failed, error)));
                }
            }
        }
    };
    let manifest = match finished {
        Ok(manifest) => manifest,
        Err(error) => return Err(give_up(taker, None, folder_failed(error)).await),
    };
    if let Err(error) = taker.complete().await {
        return Err(unfinished(&args.output, true, Failure::new(Exit::Failed, error)));
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
    Failure::new(failure.exit, format!("{}\n  {note}", failure.message))
}

async fn mark(output: &Path, consistency: Consistency) -> Result<(), Failure> {
    let failed = |error| Failure::new(Exit::Failed, format!("the checkpoint cannot be marked: {error}"));
    folder::set_consistency(output, consistency).await.map_err(failed)
}

/// What became of an operation whose stream failed. The operation knows the first cause.
pub(crate) async fn fate(client: &Client, name: &OperationName, failure: Failure) -> Failure {
    match wait::done(client, name).await {
        Ok(operation) => match judge(&operation) {
            (exit, Some(text)) => Failure::new(exit, format!("{}\n{text}", failure.message)),
            (_, None) => failure,
        },
        Err(unknown) => Failure::new(unknown.exit, format!("{}\n{}", failure.message, unknown.message)),
    }
}

#[derive(Debug, Serialize)]
struct Summary {
    operation: String,
    folder: String,
    result: &'static str,
    consistency: Consistency,
    moved_bytes: u64,
    time_us: u64,
    rate_bytes_per_second: u64,
    predicted_downtime_us: Option<u64>,
    downtime_us: Option<u64>,
    devices: Vec<SummaryDevice>,
}

#[derive(Debug, Serialize)]
struct SummaryDevice {
    device: String,
    file: String,
    length_bytes: u64,
    blake3: String,
}

impl Summary {
    fn new(done: &v1::Operation, taken: &Taken, output: &Path, consistency: Consistency) -> Self {
        let micros = |span: Option<Duration>| span.and_then(|span| u64::try_from(span.as_micros()).ok());
        let time_us = micros(Some(taken.time)).unwrap_or(u64::MAX);
        let rate = u128::from(taken.moved_bytes) * 1_000_000 / u128::from(time_us.max(1));
        Self {
            operation: done.name.clone(),
            folder: output.display().to_string(),
            result: done.result().as_str_name().trim_start_matches("OPERATION_RESULT_"),
            consistency,
            moved_bytes: taken.moved_bytes,
            time_us,
            rate_bytes_per_second: u64::try_from(rate).unwrap_or(u64::MAX),
            predicted_downtime_us: micros(render::span(done.predicted_downtime.as_ref())),
            downtime_us: micros(render::span(done.downtime.as_ref())),
            devices: done
                .devices
                .iter()
                .zip(&taken.manifest.devices)
                .map(|(device, saved)| SummaryDevice {
                    device: device.device.clone(),
                    file: saved.file.clone(),
                    length_bytes: saved.length_bytes,
                    blake3: saved.blake3.clone(),
                })
                .collect(),
        }
    }

    fn table(&self) -> String {
        let downtime =
            |us: Option<u64>| render::or_dash(us.map(|us| render::time(Duration::from_micros(us))));
        let consistency = match self.consistency {
            Consistency::Consistent => "consistent",
            Consistency::Inconsistent => "INCONSISTENT",
        };
        let time = Duration::from_micros(self.time_us);
        let mut text = format!(
            "saved     {} in {} ({}), {consistency}\ndowntime  {} ({} predicted)\nfolder    {}\n",
            render::bytes(self.moved_bytes),
            render::time(time),
            render::rate(self.moved_bytes, time),
            downtime(self.downtime_us),
            downtime(self.predicted_downtime_us),
            self.folder,
        );
        let rows: Vec<Vec<String>> = self
            .devices
            .iter()
            .map(|device| {
                vec![
                    vfio_checkpoint_client::call::printable(&device.device),
                    device.file.clone(),
                    render::bytes(device.length_bytes),
                    device.blake3.clone(),
                ]
            })
            .collect();
        text += &render::table(&["DEVICE", "FILE", "SIZE", "BLAKE3"], &rows);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_for_people_and_for_programs() {
        let summary = Summary {
            operation: "operations/1".to_owned(),
            folder: "/backup/1".to_owned(),
            result: "SUCCEEDED",
            consistency: Consistency::Consistent,
            moved_bytes: 3 << 20,
            time_us: 1_500_000,
            rate_bytes_per_second: 2 << 20,
            predicted_downtime_us: Some(11_000),
            downtime_us: Some(12_300),
            devices: vec![SummaryDevice {
                device: "devices/nic-a".to_owned(),
                file: "device-0.state".to_owned(),
                length_bytes: 3 << 20,
                blake3: "ab".repeat(32),
            }],
        };
        let json = serde_json::to_string_pretty(&summary).unwrap();
        insta::assert_snapshot!(format!("{}{json}", summary.table()));
    }
}
