//! What happens in the demo, in order.

use std::path::Path;
use std::time::{Duration, Instant};

use vfio_checkpoint_client::call::{Client, new_request_id};
use vfio_checkpoint_client::folder::{Consistency, Existing, FolderReader, FolderWriter};
use vfio_checkpoint_client::transfer::{Accepted, GiveState, TakeState};
use vfio_checkpoint_proto::DEFAULT_CHUNK_BYTES;
use vfio_checkpoint_proto::domain::ConfigSpaceCapture;
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_seal::Seal;

use super::Failure;
use super::node::{Lab, Node};
use super::report::{Audience, Place, Report, Restored, Saved, bytes, milliseconds};
use crate::args::Demo;

const DEVICE: &str = "devices/nic0";
/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_mins(10);

pub(super) async fn tell(arguments: &Demo, audience: &Audience) -> Result<Report, Failure> {
    let folder = tempfile::tempdir()?;
    let Demo { memory, dirty, .. } = arguments;
    audience.step("two agents on loopback, with a throwaway certificate authority and mutual TLS 1.3");
    let lab = Lab::new()?;
    let source =
        lab.node("node-a", folder.path(), &format!("sim:seed=7,memory={memory},dirty={dirty}")).await?;
    let destination = lab.node("node-b", folder.path(), &format!("sim:seed=8,memory={memory}")).await?;
    let (from, to) = (list(audience, &source).await?, list(audience, &destination).await?);

    let checkpoint = folder.path().join("checkpoint");
    let save = save(audience, &source, &checkpoint).await?;
    let source_digest = source.digest()?;
    let restore = restore(audience, &destination, &checkpoint).await?;
    let destination_digest = destination.digest()?;

    audience.step("proof: digests of all that the devices hold");
    audience.line(&format!("{}  {source_digest}", from.agent));
    audience.line(&format!("{}  {destination_digest}", to.agent));
    let verified = source_digest == destination_digest;
    source.agent.stop().await?;
    destination.agent.stop().await?;
    Ok(Report { source: from, destination: to, save, restore, source_digest, destination_digest, verified })
}

/// Lists a node's devices, as an operator would.
async fn list(audience: &Audience, node: &Node) -> Result<Place, Failure> {
    let listed = node.operator.list_devices(v1::ListDevicesRequest::default()).await?;
    let device = listed.devices.into_iter().next().ok_or("the agent has no device")?;
    let size = device.data_size.as_ref().map_or_else(String::new, |size| bytes(size.bytes));
    let state = device.state().as_str_name().trim_start_matches("MIGRATION_STATE_").to_owned();
    audience.line(&format!("{}  {}  {}  {state}  {size}", node.name, device.name, device.address));
    if let Some(blocker) = device.blockers.first() {
        return Err(format!("{} on {} cannot be saved: {}", device.name, node.name, blocker.message).into());
    }
    Ok(Place { agent: node.name.to_owned(), device: device.name, address: device.address })
}

async fn save(audience: &Audience, node: &Node, checkpoint: &Path) -> Result<Saved, Failure> {
    let request = v1::StartSaveRequest {
        devices: vec![DEVICE.to_owned()],
        pre_copy: v1::PreCopyMode::Required.into(),
        after: v1::AfterSave::StayStopped.into(),
        memory_capture: v1::MemoryCapture::None.into(),
        request_id: new_request_id().ok_or("this machine has no randomness")?,
        ..v1::StartSaveRequest::default()
    };
    audience
        .step(&format!("save {DEVICE} of {} while it runs, into a folder; it stays stopped then", node.name));
    let dry =
        node.operator.start_save(v1::StartSaveRequest { validate_only: true, ..request.clone() }).await?;
    if dry.blockers.is_empty() {
        audience.line("a dry run finds nothing in the way");
    }
    let begun = Instant::now();
    let operation = node.operator.start_save(request).await?.operation.ok_or("no operation")?.name;
    let done = tokio::try_join!(
        take(&node.operator, &operation, checkpoint),
        watch(audience, &node.operator, &operation)
    )?
    .1;
    let saved = Saved {
        operation,
        bytes: done.moved_bytes,
        pre_copy_bytes: done.devices.iter().map(|device| device.pre_copy_bytes).sum(),
        time_ms: milliseconds(begun.elapsed()),
        predicted_downtime_ms: span(done.predicted_downtime.as_ref()),
        downtime_ms: span(done.downtime.as_ref()),
        blake3: done
            .devices
            .iter()
            .filter_map(|device| device.seal.clone())
            .filter_map(|seal| Seal::try_from(seal).ok())
            .map(|seal| seal.hex())
            .collect(),
    };
    audience.line(&format!(
        "{} in {:.0} ms, {} of it while the device ran; it stood still for {:.1} ms (predicted: {:.1} ms)",
        bytes(saved.bytes),
        saved.time_ms,
        bytes(saved.pre_copy_bytes),
        saved.downtime_ms.unwrap_or_default(),
        saved.predicted_downtime_ms.unwrap_or_default(),
    ));
    Ok(saved)
}

/// Takes the state of a save into a folder.
async fn take(client: &Client, operation: &str, checkpoint: &Path) -> Result<(), Failure> {
    let TakeState { manifest, mut taker, .. } = TakeState::open(client, &operation.parse()?).await?;
    let mut folder = FolderWriter::create(checkpoint, &manifest.into(), Existing::Refuse).await?;
    while let Some(accepted) = taker.next().await? {
        match accepted {
            Accepted::Chunk { device, chunk } => folder.chunk(u32::try_from(device)?, chunk).await?,
            Accepted::Sealed { device, seal, config } => {
                folder.seal(u32::try_from(device)?, seal, config.map(Into::into)).await?;
            }
            Accepted::Progress(_) => {}
        }
    }
    folder.finish(Consistency::Consistent).await?;
    Ok(taker.complete().await?)
}

async fn restore(audience: &Audience, node: &Node, checkpoint: &Path) -> Result<Restored, Failure> {
    audience.step(&format!("restore it into {DEVICE} of {}", node.name));
    let begun = Instant::now();
    let folder = FolderReader::open(checkpoint).await?;
    folder.verify().await?;
    audience.line("the folder's digests are as its manifest says");
    let request = v1::RestoreRequest {
        devices: vec![DEVICE.to_owned()],
        manifest: Some(folder.wire_manifest().clone()),
        request_id: new_request_id().ok_or("this machine has no randomness")?,
        ..v1::RestoreRequest::default()
    };
    let operation = node.operator.restore(request).await?.operation.ok_or("no operation")?.name;
    let done = tokio::try_join!(
        give(&node.operator, &operation, &folder),
        watch(audience, &node.operator, &operation)
    )?
    .1;
    let restored = Restored { operation, bytes: done.moved_bytes, time_ms: milliseconds(begun.elapsed()) };
    audience.line(&format!(
        "{} in {:.0} ms, verified on the way; the device runs",
        bytes(restored.bytes),
        restored.time_ms
    ));
    Ok(restored)
}

/// Gives a folder's state to a restore.
async fn give(client: &Client, operation: &str, folder: &FolderReader) -> Result<(), Failure> {
    let GiveState { mut giver, .. } = GiveState::open(client, &operation.parse()?).await?;
    for (device, seal) in folder.seals().enumerate() {
        let mut chunks =
            folder.chunks(device, DEFAULT_CHUNK_BYTES as usize).ok_or("the folder lacks a device")?;
        while let Some(chunk) = chunks.next().await? {
            giver.chunk(device, chunk).await?;
        }
        let config = folder.config(device).map(ConfigSpaceCapture::try_from).transpose()?;
        giver.seal_as(device, config, seal).await?;
    }
    Ok(giver.completed().await?)
}

/// Shows an operation until it is done; an error where it did not succeed.
async fn watch(audience: &Audience, client: &Client, operation: &str) -> Result<v1::Operation, Failure> {
    let mut bar = audience.bar();
    let mut watched =
        client.watch_operation(v1::WatchOperationRequest { name: operation.to_owned() }).await?;
    while let Some(told) = watched.next().await? {
        if let Some(operation) = told.operation {
            bar.show(&operation);
        }
    }
    drop(bar);
    let done = client.wait_operation(operation, PATIENCE).await?.operation.ok_or("no operation")?;
    match done.result() {
        v1::OperationResult::Succeeded => Ok(done),
        v1::OperationResult::Failed | v1::OperationResult::Cancelled | v1::OperationResult::Unspecified => {
            let why = done.failure.map_or_else(String::new, |failure| failure.message);
            Err(format!("{operation} did not succeed: {why}").into())
        }
    }
}

fn span(duration: Option<&prost_types::Duration>) -> Option<f64> {
    let duration = Duration::try_from(*duration?).ok()?;
    Some(milliseconds(duration))
}
