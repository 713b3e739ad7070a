//! What happens in the demo, in order.

use std::time::{Duration, Instant};

use vfio_checkpoint_client::call::{Client, new_request_id};
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_seal::Seal;

use super::Failure;
use super::node::{Lab, Node};
use super::report::{Audience, Migrated, Place, Report, Restored, Saved, bytes, milliseconds};
use crate::args::Demo;

const DEVICE: &str = "devices/nic0";
/// The one that moves.
const MOVING: &str = "devices/nic1";
const STORE: &str = "stores/shared";
/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_mins(10);

pub(super) async fn tell(arguments: &Demo, audience: &Audience) -> Result<Report, Failure> {
    let folder = tempfile::tempdir()?;
    let Demo { memory, dirty, hot, .. } = arguments;
    audience.step("two agents on loopback, with a throwaway certificate authority and mutual TLS 1.3");
    let lab = Lab::new()?;
    let busy = |seed: u32| format!("sim:seed={seed},memory={memory},dirty={dirty},hot={hot}");
    let idle = |seed: u32| format!("sim:seed={seed},memory={memory}");
    let source = lab.node("node-a", folder.path(), &[busy(7), busy(9)]).await?;
    let destination = lab.node("node-b", folder.path(), &[idle(8), idle(10)]).await?;
    let (from, to) = (list(audience, &source).await?, list(audience, &destination).await?);

    audience.step(&format!("save {DEVICE} of {} into the store of both, while it runs", source.name));
    let save = save_device(audience, &source, v1::AfterSave::Resume).await?;
    audience.step(
        "save it once more: what its last checkpoint has is not stored again; the device stays stopped then",
    );
    let incremental = save_device(audience, &source, v1::AfterSave::StayStopped).await?;
    let source_digest = source.digest(DEVICE)?;
    let restore = restore_device(audience, &destination, &incremental.checkpoint).await?;
    let destination_digest = destination.digest(DEVICE)?;

    let migration = migrate_device(audience, &source, &destination).await?;

    audience.step("proof: digests of all that the devices held, and of all that the restored and the moved one hold now");
    audience.line(&format!("{}  {source_digest}", from.agent));
    audience.line(&format!("{}  {destination_digest}", to.agent));
    audience.line(&format!("given   {}", migration.given_digest));
    audience.line(&format!("taken   {}", migration.taken_digest));
    let verified = source_digest == destination_digest && migration.given_digest == migration.taken_digest;
    source.agent.stop().await?;
    destination.agent.stop().await?;
    let (source, destination) = (from, to);
    Ok(Report {
        source,
        destination,
        save,
        incremental,
        restore,
        migration,
        source_digest,
        destination_digest,
        verified,
    })
}

/// Lists a node's devices, as an operator would.
async fn list(audience: &Audience, node: &Node) -> Result<Place, Failure> {
    let listed = node.operator.list_devices(v1::ListDevicesRequest::default()).await?;
    for device in &listed.devices {
        let size = device.data_size.as_ref().map_or_else(String::new, |size| bytes(size.bytes));
        let state = device.state().as_str_name().trim_start_matches("MIGRATION_STATE_").to_owned();
        audience.line(&format!("{}  {}  {}  {state}  {size}", node.name, device.name, device.address));
        if let Some(blocker) = device.blockers.first() {
            let why = format!("{} on {} cannot be saved: {}", device.name, node.name, blocker.message);
            return Err(why.into());
        }
    }
    let device = listed.devices.into_iter().next().ok_or("the agent has no device")?;
    Ok(Place { agent: node.name.to_owned(), device: device.name, address: device.address })
}

/// Saves a node's device into the store.
async fn save_device(audience: &Audience, node: &Node, after: v1::AfterSave) -> Result<Saved, Failure> {
    let request = v1::StartSaveRequest {
        devices: vec![DEVICE.to_owned()],
        pre_copy: v1::PreCopyMode::Required.into(),
        after: after.into(),
        memory_capture: v1::MemoryCapture::None.into(),
        store: STORE.to_owned(),
        request_id: new_request_id().ok_or("this machine has no randomness")?,
        ..v1::StartSaveRequest::default()
    };
    let dry =
        node.operator.start_save(v1::StartSaveRequest { validate_only: true, ..request.clone() }).await?;
    if dry.blockers.is_empty() {
        audience.line("a dry run finds nothing in the way");
    }
    let begun = Instant::now();
    let operation = node.operator.start_save(request).await?.operation.ok_or("no operation")?.name;
    let done = watch(audience, &node.operator, &operation).await?;
    let time_ms = milliseconds(begun.elapsed());
    let name = done.checkpoint.clone();
    let checkpoint = node.operator.get_checkpoint(v1::GetCheckpointRequest { name: name.clone() }).await?;
    let checkpoint = checkpoint.checkpoint.ok_or("no checkpoint")?;
    let saved = Saved {
        operation,
        checkpoint: name,
        bytes: done.moved_bytes,
        pre_copy_bytes: done.devices.iter().map(|device| device.pre_copy_bytes).sum(),
        added_bytes: checkpoint.added.as_ref().map_or(0, |added| added.stored_bytes),
        time_ms,
        predicted_downtime_ms: span(done.predicted_downtime.as_ref()),
        downtime_ms: span(done.downtime.as_ref()),
        blake3: seals(&done),
    };
    audience.line(&format!(
        "{} in {:.0} ms, {} of it while the device ran; it stood still for {:.1} ms (predicted: {:.1} ms)",
        bytes(saved.bytes),
        saved.time_ms,
        bytes(saved.pre_copy_bytes),
        saved.downtime_ms.unwrap_or_default(),
        saved.predicted_downtime_ms.unwrap_or_default(),
    ));
    audience.line(&format!("{}: {} were new to the store", saved.checkpoint, bytes(saved.added_bytes)));
    Ok(saved)
}

async fn restore_device(audience: &Audience, node: &Node, checkpoint: &str) -> Result<Restored, Failure> {
    audience.step(&format!("restore that into {DEVICE} of {}, out of the store", node.name));
    let request = v1::RestoreRequest {
        devices: vec![DEVICE.to_owned()],
        checkpoint: checkpoint.to_owned(),
        request_id: new_request_id().ok_or("this machine has no randomness")?,
        ..v1::RestoreRequest::default()
    };
    let begun = Instant::now();
    let operation = node.operator.restore(request).await?.operation.ok_or("no operation")?.name;
    let done = watch(audience, &node.operator, &operation).await?;
    let restored = Restored { operation, bytes: done.moved_bytes, time_ms: milliseconds(begun.elapsed()) };
    audience.line(&format!(
        "{} in {:.0} ms, verified on the way; the device runs",
        bytes(restored.bytes),
        restored.time_ms
    ));
    Ok(restored)
}

/// Moves the other device to the other node while it works.
async fn migrate_device(audience: &Audience, source: &Node, destination: &Node) -> Result<Migrated, Failure> {
    audience.step(&format!(
        "migrate {MOVING} from {} to {}, live: it works until it stops here, and runs on there",
        source.name, destination.name
    ));
    let agent = source.operator.get_agent(v1::GetAgentRequest {}).await?;
    let device = source.operator.get_device(v1::GetDeviceRequest { name: MOVING.to_owned() }).await?.device;
    let logical = device.and_then(|device| device.logical_device).ok_or("no logical device")?;
    let admission = v1::AdmitRequest {
        logical_devices: vec![logical],
        devices: vec![MOVING.to_owned()],
        source_key_sha256: agent.key_sha256,
        ..v1::AdmitRequest::default()
    };
    let admitted = destination.operator.admit(admission).await?;
    let request = v1::MigrateRequest {
        devices: vec![MOVING.to_owned()],
        target: Some(v1::MigrationTarget {
            endpoint: format!("https://localhost:{}", destination.agent.address().port()),
            spiffe_id: format!("spiffe://demo.vfio-checkpoint/agent/{}", destination.name),
            devices: vec![MOVING.to_owned()],
            key_sha256: admitted.key_sha256,
        }),
        ticket: admitted.ticket,
        pre_copy: v1::PreCopyMode::Required.into(),
        // Between its stop and its reset the device can be looked at.
        commit: v1::CommitMode::Manual.into(),
        memory_capture: v1::MemoryCapture::None.into(),
        request_id: new_request_id().ok_or("this machine has no randomness")?,
        ..v1::MigrateRequest::default()
    };
    let dry = source.operator.migrate(v1::MigrateRequest { validate_only: true, ..request.clone() }).await?;
    if dry.blockers.is_empty() {
        audience.line("a dry run finds nothing in the way on either side");
    }
    let begun = Instant::now();
    let operation = source.operator.migrate(request).await?.operation.ok_or("no operation")?.name;
    let is_prepared = prepared(audience, &source.operator, &operation).await?;
    let given_digest = source.digest(MOVING)?;
    if is_prepared {
        source.operator.commit(v1::CommitRequest { operation: operation.clone() }).await?;
    }
    let done = watch(audience, &source.operator, &operation).await?;
    let time_ms = milliseconds(begun.elapsed());
    let arrival = done.handover.as_ref().map(|handover| handover.peer_operation.clone()).unwrap_or_default();
    watch(audience, &destination.operator, &arrival).await?;
    let migrated = Migrated {
        operation,
        arrival,
        bytes: done.moved_bytes,
        pre_copy_bytes: done.devices.iter().map(|device| device.pre_copy_bytes).sum(),
        time_ms,
        predicted_downtime_ms: span(done.predicted_downtime.as_ref()),
        downtime_ms: span(done.downtime.as_ref()),
        given_digest,
        taken_digest: destination.digest(MOVING)?,
    };
    audience.line(&format!(
        "{} in {:.0} ms, {} of it while the device ran; it stood still for {:.1} ms (predicted: {:.1} ms)",
        bytes(migrated.bytes),
        migrated.time_ms,
        bytes(migrated.pre_copy_bytes),
        migrated.downtime_ms.unwrap_or_default(),
        migrated.predicted_downtime_ms.unwrap_or_default(),
    ));
    Ok(migrated)
}

/// Shows a migration until the destination has all of its state; false where it is over before that.
async fn prepared(audience: &Audience, client: &Client, operation: &str) -> Result<bool, Failure> {
    let mut bar = audience.bar();
    let request = v1::WatchOperationRequest { name: operation.to_owned() };
    let mut watched = client.watch_operation(request).await?;
    while let Some(told) = watched.next().await? {
        let Some(operation) = told.operation else { continue };
        bar.show(&operation);
        if operation.phase() == v1::OperationPhase::Prepared {
            return Ok(true);
        }
    }
    Ok(false)
}

/// What the states of an operation's devices hash to.
fn seals(operation: &v1::Operation) -> String {
    let seals = operation.devices.iter().filter_map(|device| device.seal.clone());
    seals.filter_map(|seal| Seal::try_from(seal).ok()).map(|seal| seal.hex()).collect()
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
