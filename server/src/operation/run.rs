//! An operation at work: from the arrival of its stream to its end.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use vfio_checkpoint_client::call::Client;
use vfio_checkpoint_client::document::{self, About};
use vfio_checkpoint_client::transfer::{Giver, Link, Terms, TransferError};
use vfio_checkpoint_device::operation::{
    self, OperationError, RestoreReport, RestoreTerms, SaveReport, SaveTerms,
};
use vfio_checkpoint_device::{DataSize, DeviceLane, chain};
use vfio_checkpoint_fsm::AfterSave;
use vfio_checkpoint_proto::domain::{self, DeviceManifest, Invalid, Manifest, SourceDisposition};
use vfio_checkpoint_proto::ids::{OperationName, StreamId};
use vfio_checkpoint_store::{Begin, Checkpoint, CheckpointId, Store};

use super::caller::EntryCaller;
use super::end::{self, End};
use super::entry::{Cancel, Entry};
use super::record::{JobRecord, RecordedStep};
use crate::core::Core;
use crate::environment::UnixMillis;
use crate::failpoint::reached;
use crate::migration::{ArrivalSource, Departure, HandoverSink, NotTaken, Offer, RedialDestination, spool};
use crate::registry::{DeviceView, Lease};
use crate::transfer::{Attached, StoreSink, StoreSource, WireSink, WireSource};

/// Where an operation's stream comes from.
pub(crate) type Arrival = oneshot::Receiver<Attached>;

/// The span that everything about an operation is in.
pub(crate) fn span(core: &Core, entry: &Entry) -> tracing::Span {
    let fixed = &entry.fixed;
    let devices: Vec<String> = entry.device_names().map(ToString::to_string).collect();
    tracing::info_span!("operation", node = %core.config.node.name, operation = %fixed.name, trace_id = fixed.trace_id.as_deref(), caller = %fixed.caller, devices = %devices.join(","))
}

/// What is going to be saved, device by device, as it is known before.
pub(crate) fn device_manifests(views: &[DeviceView]) -> Result<Vec<DeviceManifest>, Invalid> {
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
pub(crate) fn manifest(
    operation: &OperationName,
    created: UnixMillis,
    devices: Vec<DeviceManifest>,
    after: AfterSave,
) -> Manifest {
    Manifest {
        operation: operation.clone(),
        create_time: created.system_time(),
        devices,
        source_disposition: match after {
            AfterSave::Resume | AfterSave::Hold => SourceDisposition::RunsOn,
            AfterSave::StayStopped | AfterSave::HandOver => SourceDisposition::StaysStopped,
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
pub(crate) enum Work {
    Save(SaveTerms),
    Restore(RestoreTerms),
    /// With what the hand-over adds to the stop.
    Migrate(SaveTerms, Duration),
    Arrive(RestoreTerms),
}

/// Where an operation's state goes, or comes from.
#[derive(Debug)]
pub(crate) enum Way {
    /// The stream that its caller opens.
    Stream(Arrival),
    /// A store: this checkpoint is made in it, of about so many bytes.
    IntoStore { store: Store, id: CheckpointId, reserve_bytes: u64 },
    /// This checkpoint of a store.
    OutOfStore { checkpoint: Box<Checkpoint>, about: Box<About> },
    /// Another agent, which this one calls.
    ToPeer(Box<Departure>),
}

/// A way that is open.
enum Opened {
    Stream(Attached),
    IntoStore(Box<StoreSink>),
    OutOfStore(Box<StoreSource>),
    ToPeer(Client, Attached),
}

/// An operation, start to end.
pub(crate) async fn run(
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
        Way::ToPeer(departure) => {
            // Not in the middle of it: what the destination has prepared by then must be known, to be given up.
            if let Some(why) = entry.signals.cancel_reason() {
                return Err(end::never_begun(&why).into());
            }
            let (client, attached) =
                departure.open(core, entry, manifest).await.map_err(|error| end::not_taken(&error))?;
            match entry.signals.cancel_reason() {
                Some(why) => Err(end::never_begun(&why).into()),
                None => Ok(Opened::ToPeer(client, attached)),
            }
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
        Work::Save(terms) | Work::Migrate(terms, _) => (terms.hold_limit, terms.cutover_limit),
        Work::Restore(terms) | Work::Arrive(terms) => (terms.hold_limit, Duration::ZERO),
    };
    let handover_cost = match work {
        Work::Migrate(_, cost) => cost,
        Work::Save(_) | Work::Restore(_) | Work::Arrive(_) => Duration::ZERO,
    };
    let caller = EntryCaller {
        core: Arc::clone(core),
        entry: Arc::clone(entry),
        hold_limit,
        cutover_limit,
        stream: None,
        handover_cost,
    };
    match (work, opened) {
        (Work::Save(terms), Opened::Stream(attached)) => {
            let (link, wire) = attached.open(&core.config, new_stream(core), manifest).await;
            end::of_save(entry, lease, save(&lanes, terms, caller, link, wire).await)
        }
        (Work::Restore(terms), Opened::Stream(attached)) => {
            let source = attached.source(core, new_stream(core), manifest, entry).await;
            end::of_restore(entry, lease, restore(&lanes, terms, caller, source).await)
        }
        (Work::Save(terms), Opened::IntoStore(mut sink)) => {
            let saved = operation::save(&lanes, terms, &caller, &mut *sink).await;
            sink.give_up().await;
            end::of_save(entry, lease, saved)
        }
        (Work::Restore(terms), Opened::OutOfStore(mut source)) => {
            end::of_restore(entry, lease, operation::restore(&lanes, terms, &caller, &mut *source).await)
        }
        (Work::Migrate(terms, _), Opened::ToPeer(client, attached)) => {
            let (link, wire) = attached.open(&core.config, new_stream(core), manifest).await;
            let giver = match departing(core, entry, link, wire).await {
                Ok(giver) => giver,
                Err(error) => return *end::not_taken(&NotTaken(Box::new(error))),
            };
            let offer = Offer::new(Arc::clone(core), Arc::clone(entry), Some(client));
            end::of_migration(entry, lease, migrate(&lanes, terms, caller, giver, offer).await)
        }
        (Work::Arrive(terms), Opened::Stream(attached)) => {
            let source = attached.source(core, new_stream(core), manifest, entry).await;
            end::of_restore(entry, lease, arrive(&lanes, terms, caller, source).await)
        }
        (Work::Save(_) | Work::Restore(_), Opened::ToPeer(..))
        | (Work::Migrate(..), Opened::Stream(_) | Opened::IntoStore(_) | Opened::OutOfStore(_))
        | (Work::Arrive(_), Opened::IntoStore(_) | Opened::OutOfStore(_) | Opened::ToPeer(..))
        | (Work::Save(_), Opened::OutOfStore(_))
        | (Work::Restore(_), Opened::IntoStore(_)) => end::no_way(),
    }
}

fn new_stream(core: &Core) -> StreamId {
    // 0 stands for none on the wire.
    StreamId(core.environment.executor.random().max(1))
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
    let mut sink = WireSink::new(giver, Arc::clone(&caller.entry), core, idle_timeout, seal_timeout);
    caller.stream = Some(sink.watch());
    let saved = operation::save(lanes, terms, &caller, &mut sink).await;
    if let Err(error) = &saved {
        sink.give_up(chain(error)).await;
    }
    saved
}

/// The giver of a migration, which calls its destination again where the connection breaks; and how long it may be silent.
async fn departing(
    core: &Arc<Core>,
    entry: &Arc<Entry>,
    link: Link,
    wire: Terms,
) -> Result<(Giver, Duration), TransferError> {
    let (idle_timeout, window) = (wire.limits.idle_timeout, core.config.server.stream_resume_window);
    let redial = RedialDestination { core: Arc::clone(core), entry: Arc::clone(entry) };
    let spool = spool(core).await?;
    Ok((Giver::new(link, wire).resumable(spool, Box::new(redial), window)?, idle_timeout))
}

async fn migrate(
    lanes: &[DeviceLane],
    terms: SaveTerms,
    mut caller: EntryCaller,
    (giver, idle_timeout): (Giver, Duration),
    offer: Offer,
) -> Result<SaveReport, OperationError> {
    let core = Arc::clone(&caller.core);
    // The destination may wait for its own workload before it says that it has all.
    let seal_timeout = core.config.server.seal_timeout.max(terms.hold_limit);
    let entry = Arc::clone(&caller.entry);
    let wire = WireSink::new(giver, entry, &core, idle_timeout, seal_timeout);
    let watch = wire.watch();
    caller.stream = Some(watch.clone());
    let mut sink = HandoverSink::new(wire, offer);
    let moved = operation::save(lanes, terms, &caller, &mut sink).await;
    // What was sent again last was so after the last of the state was read.
    caller.entry.hand_over(|handover| handover.record.resent_bytes = watch.resent_bytes());
    if let Err(error) = &moved {
        sink.give_up(chain(error)).await;
    }
    moved
}

async fn arrive(
    lanes: &[DeviceLane],
    terms: RestoreTerms,
    caller: EntryCaller,
    source: WireSource,
) -> Result<RestoreReport, OperationError> {
    let (core, entry) = (Arc::clone(&caller.core), Arc::clone(&caller.entry));
    let mut source = ArrivalSource::new(source, core, entry, terms.hold_limit);
    let restored = operation::restore(lanes, terms, &caller, &mut source).await;
    if let Err(error) = &restored {
        source.give_up(&end::words(&caller.entry, error)).await;
    }
    restored
}

async fn restore(
    lanes: &[DeviceLane],
    terms: RestoreTerms,
    caller: EntryCaller,
    mut source: WireSource,
) -> Result<RestoreReport, OperationError> {
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
    let standing_still = end::standing_still(&lease);
    reached(format_args!("read back"));
    let (record, changes) = ended.settle(core, entry, &lease);
    let recording = entry.recording.lock().await;
    core.commit_surely(changes.clone()).await;
    entry.set_on_record(RecordedStep::Ended(record.clone()));
    drop(recording);
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
    // It was not seen to be reset, and nobody knows that it stands still.
    let may_run_here = record.out_of_service().any(|device| !standing_still.contains(device));
    entry.end(record);
    if matches!(entry.fixed.job, JobRecord::Migrate { .. }) {
        // In a task of its own: the destination may be gone, and nothing here depends on it any more.
        let offer = Offer::new(Arc::clone(core), Arc::clone(entry), None);
        core.tasks.spawn(offer.farewell(may_run_here));
    }
}
