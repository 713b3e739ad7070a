//! An operation at work: from the arrival of its stream to its end.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use vfio_checkpoint_client::document::{self, About};
use vfio_checkpoint_client::transfer::{Giver, Link, Taker, Terms};
use vfio_checkpoint_device::operation::{
    self, OperationError, RestoreReport, RestoreTerms, SaveReport, SaveTerms,
};
use vfio_checkpoint_device::{DataSize, DeviceLane, chain};
use vfio_checkpoint_fsm::AfterSave;
use vfio_checkpoint_proto::domain::{self, DeviceManifest, Invalid, Manifest, SourceDisposition};
use vfio_checkpoint_proto::ids::StreamId;
use vfio_checkpoint_store::{Begin, Checkpoint, CheckpointId, Store};

use super::caller::EntryCaller;
use super::end::{self, End};
use super::entry::{Cancel, Entry};
use super::record::RecordedStep;
use crate::core::Core;
use crate::failpoint::reached;
use crate::registry::{DeviceView, Lease};
use crate::transfer::{Attached, StoreSink, StoreSource, WireSink, WireSource};

/// Where an operation's stream comes from.
pub(super) type Arrival = oneshot::Receiver<Attached>;

/// The span that everything about an operation is in.
pub(super) fn span(core: &Core, entry: &Entry) -> tracing::Span {
    let fixed = &entry.fixed;
    let devices: Vec<String> = entry.device_names().map(ToString::to_string).collect();
    tracing::info_span!("operation", node = %core.config.node.name, operation = %fixed.name, trace_id = fixed.trace_id.as_deref(), caller = %fixed.caller, devices = %devices.join(","))
}

/// What is going to be saved, device by device, as it is known before.
pub(super) fn device_manifests(views: &[DeviceView]) -> Result<Vec<DeviceManifest>, Invalid> {
    views
        .iter()
        .filter_map(|view| {
            let record = view.record.as_ref()?;
            let facts: BTreeMap<String, String> =
                view.fingerprint.facts().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
            Some(facts.try_into().map(|fingerprint| DeviceManifest {
                source_device: view.name.clone(),
                source_address: view.address.clone(),
                backend: end::backend_to_wire(view.backend),
                driver: view.driver.clone(),
                fingerprint,
                logical_device: domain::LogicalDevice { id: record.logical.clone(), epoch: record.epoch },
                data_size: size_to_wire(view.data_size),
            }))
        })
        .collect()
}

/// What is going to be saved.
pub(super) fn manifest(entry: &Entry, devices: Vec<DeviceManifest>, after: AfterSave) -> Manifest {
    Manifest {
        operation: entry.fixed.name.clone(),
        create_time: entry.fixed.created.system_time(),
        devices,
        source_disposition: match after {
            AfterSave::Resume | AfterSave::Hold => SourceDisposition::RunsOn,
            AfterSave::StayStopped => SourceDisposition::StaysStopped,
        },
    }
}

fn size_to_wire(size: DataSize) -> domain::DataSize {
    match size {
        DataSize::Known(bytes) => domain::DataSize::Known(bytes),
        DataSize::UpperBound(bytes) => domain::DataSize::UpperBound(bytes),
        DataSize::Unknown => domain::DataSize::Unknown,
    }
}

/// What an operation is to do, and on which terms.
#[derive(Debug, Clone, Copy)]
pub(super) enum Work {
    Save(SaveTerms),
    Restore(RestoreTerms),
}

/// Where an operation's state goes, or comes from.
#[derive(Debug)]
pub(super) enum Way {
    /// The stream that its caller opens.
    Stream(Arrival),
    /// A store: this checkpoint is made in it, of about so many bytes.
    IntoStore { store: Store, id: CheckpointId, reserve_bytes: u64 },
    /// This checkpoint of a store.
    OutOfStore { checkpoint: Box<Checkpoint>, about: Box<About> },
}

/// A way that is open.
enum Opened {
    Stream(Attached),
    IntoStore(Box<StoreSink>),
    OutOfStore(Box<StoreSource>),
}

/// An operation, start to end.
pub(super) async fn run(
    core: Arc<Core>,
    entry: Arc<Entry>,
    lease: Lease,
    work: Work,
    manifest: Manifest,
    way: Way,
) {
    let ended = match open(&core, &entry, way, &manifest).await {
        Ok(opened) => carry(&core, &entry, &lease, work, manifest, opened).await,
        Err(ended) => *ended,
    };
    finish(&core, &entry, lease, ended).await;
}

/// Opens the way. Nothing has been touched meanwhile, nor where it fails.
async fn open(
    core: &Arc<Core>,
    entry: &Arc<Entry>,
    way: Way,
    manifest: &Manifest,
) -> Result<Opened, Box<End>> {
    match way {
        Way::Stream(arrival) => match attached(core, entry, arrival).await {
            Ok(attached) => Ok(Opened::Stream(attached)),
            Err(why) => Err(end::never_begun(&why).into()),
        },
        Way::IntoStore { store, id, reserve_bytes } => {
            let about = about(core, entry, manifest).map_err(|problem| end::undescribed(&problem))?;
            let logical_devices =
                manifest.devices.iter().map(|device| device.logical_device.id.to_string()).collect();
            let begin = Begin { id, logical_devices, reserve_bytes };
            let writer = tokio::select! {
                biased;
                why = entry.signals.cancelled() => return Err(end::never_begun(&why).into()),
                writer = store.begin(begin) => writer.map_err(|error| end::not_stored(&error))?,
            };
            Ok(Opened::IntoStore(StoreSink::new(Arc::clone(core), writer, about, Arc::clone(entry)).into()))
        }
        Way::OutOfStore { checkpoint, about } => {
            Ok(Opened::OutOfStore(StoreSource::new(*checkpoint, *about, Arc::clone(entry)).into()))
        }
    }
}

/// What a store is told of a checkpoint.
fn about(core: &Core, entry: &Entry, manifest: &Manifest) -> Result<About, String> {
    let wire = manifest.clone().into();
    let manifest =
        document::Manifest::from_wire(&wire).map_err(|(field, problem)| format!("{field}: {problem}"))?;
    Ok(About {
        node: core.config.node.name.clone(),
        caller: entry.fixed.caller.clone(),
        owner_pod: entry.fixed.owner_pod.clone(),
        manifest,
        config: Vec::new(),
    })
}

async fn carry(
    core: &Arc<Core>,
    entry: &Arc<Entry>,
    lease: &Lease,
    work: Work,
    manifest: Manifest,
    opened: Opened,
) -> End {
    let Some(lanes) = lanes(lease) else {
        if let Opened::IntoStore(mut sink) = opened {
            sink.give_up().await;
        }
        return end::not_open();
    };
    let (hold_limit, cutover_limit) = match work {
        Work::Save(terms) => (terms.hold_limit, terms.cutover_limit),
        Work::Restore(terms) => (terms.hold_limit, Duration::ZERO),
    };
    let caller = EntryCaller {
        core: Arc::clone(core),
        entry: Arc::clone(entry),
        hold_limit,
        cutover_limit,
        stream: None,
        on_record: RecordedStep::Admitted.into(),
    };
    match (work, opened) {
        (Work::Save(terms), Opened::Stream(attached)) => {
            let (link, wire) = attached.open(&core.config, new_stream(core), manifest).await;
            end::of_save(entry, lease, save(&lanes, terms, caller, link, wire).await)
        }
        (Work::Restore(terms), Opened::Stream(attached)) => {
            let (link, wire) = attached.open(&core.config, new_stream(core), manifest).await;
            end::of_restore(entry, lease, restore(&lanes, terms, caller, link, wire).await)
        }
        (Work::Save(terms), Opened::IntoStore(mut sink)) => {
            let saved = operation::save(&lanes, terms, &caller, &mut *sink).await;
            sink.give_up().await;
            end::of_save(entry, lease, saved)
        }
        (Work::Restore(terms), Opened::OutOfStore(mut source)) => {
            end::of_restore(entry, lease, operation::restore(&lanes, terms, &caller, &mut *source).await)
        }
        (Work::Save(_), Opened::OutOfStore(_)) | (Work::Restore(_), Opened::IntoStore(_)) => end::no_way(),
    }
}

fn new_stream(core: &Core) -> StreamId {
    StreamId(core.environment.executor.random())
}

async fn save(
    lanes: &[DeviceLane],
    terms: SaveTerms,
    mut caller: EntryCaller,
    link: Link,
    wire: Terms,
) -> Result<SaveReport, OperationError> {
    let idle_timeout = wire.limits.idle_timeout;
    let giver = Giver::new(link, wire);
    let giver = if caller.entry.is_manual() { giver.with_cutover() } else { giver };
    let core = &caller.core;
    let seal_timeout = core.config.server.seal_timeout;
    let mut sink =
        WireSink::new(giver, Arc::clone(&caller.entry), &core.environment, idle_timeout, seal_timeout);
    caller.stream = Some(sink.watch());
    let saved = operation::save(lanes, terms, &caller, &mut sink).await;
    if let Err(error) = &saved {
        sink.give_up(chain(error)).await;
    }
    saved
}

async fn restore(
    lanes: &[DeviceLane],
    terms: RestoreTerms,
    caller: EntryCaller,
    link: Link,
    wire: Terms,
) -> Result<RestoreReport, OperationError> {
    let mut source = WireSource::new(Taker::new(link, wire), Arc::clone(&caller.entry));
    let restored = operation::restore(lanes, terms, &caller, &mut source).await;
    if let Err(error) = &restored {
        source.give_up(&chain(error)).await;
    }
    restored
}

/// Waits for the operation's stream, for as long as it may take. Nothing has been touched meanwhile.
async fn attached(core: &Core, entry: &Entry, arrival: Arrival) -> Result<Attached, Cancel> {
    let after = core.config.defaults.stream_open_timeout;
    let no_stream = Cancel::NoStream { after };
    tokio::select! {
        biased;
        why = entry.signals.cancelled() => Err(why),
        attached = arrival => {
            entry.change(|view| view.deadline = None);
            attached.map_err(|_| no_stream)
        }
        () = core.environment.sleep(after) => Err(no_stream),
    }
}

pub(super) fn lanes(lease: &Lease) -> Option<Vec<DeviceLane>> {
    lease.slots().iter().map(|slot| slot.lane()).collect()
}

/// Puts the end on record, tells it, and gives the devices back; in this order, so that nobody finds a device free whose
/// operation is not known to be over.
pub(super) async fn finish(core: &Arc<Core>, entry: &Arc<Entry>, lease: Lease, ended: End) {
    for slot in lease.slots() {
        slot.read_back().await;
    }
    reached(format_args!("read back"));
    let (record, changes) = ended.settle(core, entry, &lease);
    core.commit_surely(changes.clone()).await;
    end::take_over_records(core, &changes);
    core.stores.debts().recorded(&changes);
    tracing::info!(
        result = ?record.result,
        outcome = ?record.outcome,
        downtime_ms = record.downtime.map(|downtime| downtime.as_secs_f64() * 1e3),
        failure = record.failure.as_ref().map(|failure| failure.message.as_str()),
        "operation ended"
    );
    drop(lease);
    core.operations.release();
    entry.end(record);
}
