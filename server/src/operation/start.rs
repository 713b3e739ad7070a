//! How an operation begins: validated, unblocked, leased, recorded; in this order, and nothing is touched.

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tracing::Instrument as _;
use vfio_checkpoint_device::operation::{PrecopyPolicy, RestoreTerms, SaveTerms};
use vfio_checkpoint_fsm::{AfterLoad, AfterSave, Cutover, SaveRequest};
use vfio_checkpoint_proto::domain::{
    self, AfterRestore, NoConvergence, PreCopy, RestoreSource, RestoreSpec, SaveRequestSpec,
};
use vfio_checkpoint_proto::ids::{CheckpointName, DeviceName, Epoch, LogicalDeviceId, RequestId};
use vfio_checkpoint_proto::v1::BlockerReason;

use super::admission::fork::Whereabouts;
use super::admission::{self, Blocker, Bounds, Prediction};
use super::entry::{Entry, Fixed};
use super::kept::{Asked, Kept, Restorable, make_room};
use super::record::{AfterRecord, JobRecord, OccupantRecord, OperationDeviceRecord, RecordedStep};
use super::run::{self, Way};
use crate::core::Core;
use crate::journal::{Change, DeviceRecord, PastRecord, RequestAnswer, RequestKey, RequestRecord};
use crate::registry::opening::new_logical;
use crate::registry::{DeviceView, Lease, Slot};
use crate::rpc::Refusal;

/// Who starts an operation, and what makes the call idempotent.
#[derive(Debug, Clone)]
pub struct Starter {
    /// The identity of the verified certificate.
    pub caller: String,
    /// The caller's request id, with the digest of the request.
    pub request: Option<(RequestId, [u8; 32])>,
    /// The trace that the call belongs to.
    pub trace_id: Option<String>,
}

/// What came of a request.
#[derive(Debug)]
pub struct Started<P> {
    /// The operation. None where the request was to be validated only.
    pub entry: Option<Arc<Entry>>,
    /// What is in the way. Empty where there is an operation.
    pub blockers: Vec<Blocker>,
    /// What is known beforehand.
    pub prediction: P,
}

impl Core {
    /// Admits a save.
    pub async fn start_save(
        self: &Arc<Self>,
        spec: SaveRequestSpec,
        starter: Starter,
    ) -> Result<Started<Option<Prediction>>, Refusal> {
        let _one = self.lock(&starter).await;
        if let Some(entry) = self.started_before(&starter)?
            && !spec.validate_only
        {
            return Ok(Started { entry: Some(entry), blockers: Vec::new(), prediction: None });
        }
        let target = match &spec.store {
            Some(name) => Some(self.place(name)?),
            None => None,
        };
        let found = self.look(&spec.devices).await;
        let (mut blockers, plan, prediction) =
            admission::save(&found.views, &spec, self.bounds(), Duration::ZERO);
        let store = match target {
            Some(place) => make_room(place, prediction.total.bytes(), &mut blockers).await,
            None => None,
        };
        blockers.extend(target.and_then(|_| self.owes_too_much()));
        blockers.extend(found.missing.iter().cloned());
        blockers.extend(self.busy());
        let waits = Waits::of(&spec);
        self.waits_within("pre_copy_budget", waits.pre_copy)?;
        self.waits_within("cutover_timeout", waits.cutover)?;
        self.waits_within("hold_timeout", waits.hold)?;
        if spec.validate_only {
            return Ok(Started { entry: None, blockers, prediction: Some(prediction) });
        }
        self.check_ending()?;
        let job = JobRecord::Save {
            pre_copy: plan.pre_copy,
            barrier: plan.barrier,
            manual_cutover: plan.cutover == Cutover::Manual,
            after: match plan.after {
                AfterSave::Resume => AfterRecord::Resume,
                AfterSave::Hold => AfterRecord::Hold,
                AfterSave::StayStopped | AfterSave::HandOver => AfterRecord::StayStopped,
            },
        };
        let devices = found.views.iter().filter_map(|view| {
            let record = view.record.as_ref()?;
            Some((view.name.clone(), record.logical.clone(), record.epoch))
        });
        let devices = devices.collect();
        let defaults = &self.config.defaults;
        let terms = SaveTerms {
            request: SaveRequest {
                pre_copy: spec.pre_copy != PreCopy::Never,
                cutover: plan.cutover,
                after: plan.after,
            },
            policy: PrecopyPolicy {
                downtime_limit: spec.downtime_limit.unwrap_or(defaults.downtime_limit),
                time_budget: waits.pre_copy.unwrap_or(defaults.pre_copy_budget),
                stop_over_limit: spec.no_convergence == NoConvergence::StopAnyway,
            },
            cutover_limit: waits.cutover.unwrap_or(defaults.cutover_timeout),
            hold_limit: waits.hold.unwrap_or(defaults.hold_timeout),
            stop_limit: None,
            limits_commit: true,
        };
        let owner_pod = spec.owner_pod.map(|pod| pod.to_string()).unwrap_or_default();
        let manifests = run::device_manifests(&found.views)?;
        let kept = target.map(Kept::MadeIn);
        let asked = Asked { job, devices, owner_pod, kept, handover: None };
        let (entry, lease, arrival) = self.admit(&found, blockers, asked, starter).await?;
        let made = entry.fixed.checkpoint.as_ref().and_then(|name| name.id().parse().ok());
        let way = match (store, made) {
            (Some(store), Some(id)) => {
                Way::IntoStore { store, id, reserve_bytes: prediction.total.bytes().unwrap_or(0) }
            }
            (Some(_) | None, _) => Way::Stream(arrival),
        };
        let manifest = run::manifest(&entry.fixed.name, entry.fixed.created, manifests, plan.after);
        for (index, view) in found.views.iter().enumerate() {
            entry.expects(index, view.data_size);
        }
        if let Some(downtime) = prediction.downtime {
            entry.predicts(downtime);
        }
        let span = run::span(self, &entry);
        let work = run::Work::Save(terms);
        let running = run::run(Arc::clone(self), Arc::clone(&entry), lease, work, manifest, way);
        self.tasks.spawn(running.instrument(span));
        Ok(Started { entry: Some(entry), blockers: Vec::new(), prediction: Some(prediction) })
    }

    /// Admits a restore.
    pub async fn start_restore(
        self: &Arc<Self>,
        spec: RestoreSpec,
        starter: Starter,
    ) -> Result<Started<()>, Refusal> {
        let _one = self.lock(&starter).await;
        if let Some(entry) = self.started_before(&starter)?
            && !spec.validate_only
        {
            return Ok(Started { entry: Some(entry), blockers: Vec::new(), prediction: () });
        }
        let Restorable { manifest, way, mut blockers } = self.restorable(&spec).await?;
        let found = self.look(&spec.devices).await;
        // Until it is admitted nobody knows of it, and of one state only one restore is.
        let _one_after_another = self.operations.admit_restore().await;
        let whereabouts = Whereabouts::of(self.registry.all().map(|slot| slot.view()))
            .and_arriving(&self.operations.active());
        let (in_the_way, plan) =
            admission::restore(&found.views, &spec, &manifest, &whereabouts, self.bounds());
        blockers.extend(in_the_way);
        blockers.extend(found.missing.iter().cloned());
        blockers.extend(self.busy());
        let hold_timeout = match spec.after {
            AfterRestore::Hold { timeout } => timeout,
            AfterRestore::Run => None,
        };
        self.waits_within("hold_timeout", hold_timeout)?;
        if spec.validate_only {
            return Ok(Started { entry: None, blockers, prediction: () });
        }
        self.check_ending()?;
        let job = JobRecord::Restore { barrier: plan.barrier, hold: plan.after == AfterLoad::Hold };
        let devices = found
            .views
            .iter()
            .zip(&manifest.devices)
            .map(|(view, device)| {
                let logical = &device.logical_device;
                if whereabouts.fork(&view.name, device, manifest.source_disposition).is_some() {
                    // Refused above, unless it is wanted.
                    return (view.name.clone(), new_logical(&self.environment), Epoch(1));
                }
                (view.name.clone(), logical.id.clone(), self.next_epoch(&logical.id, logical.epoch))
            })
            .collect();
        let hold_limit = hold_timeout.unwrap_or(self.config.defaults.hold_timeout);
        let terms = RestoreTerms {
            after: match spec.after {
                AfterRestore::Run => AfterLoad::Run,
                AfterRestore::Hold { .. } => AfterLoad::Hold,
            },
            hold_limit,
            ready_limit: self.config.defaults.hold_timeout,
        };
        let owner_pod = spec.owner_pod.map(|pod| pod.to_string()).unwrap_or_default();
        let kept = match &spec.source {
            RestoreSource::Checkpoint(name) => Some(Kept::Taken(name.clone())),
            RestoreSource::Stream(_) => None,
        };
        let asked = Asked { job, devices, owner_pod, kept, handover: None };
        let (entry, lease, arrival) = self.admit(&found, blockers, asked, starter).await?;
        let way = way.unwrap_or(Way::Stream(arrival));
        for (index, device) in manifest.devices.iter().enumerate() {
            entry.expects(index, admission::size(device.data_size));
        }
        let span = run::span(self, &entry);
        let work = run::Work::Restore(terms);
        let running = run::run(Arc::clone(self), Arc::clone(&entry), lease, work, manifest, way);
        self.tasks.spawn(running.instrument(span));
        Ok(Started { entry: Some(entry), blockers: Vec::new(), prediction: () })
    }

    pub(crate) async fn lock(&self, starter: &Starter) -> Option<tokio::sync::OwnedMutexGuard<()>> {
        match starter.key() {
            Some(key) => Some(self.operations.lock_request(&key).await),
            None => None,
        }
    }

    pub(crate) fn started_before(&self, starter: &Starter) -> Result<Option<Arc<Entry>>, Refusal> {
        let (Some(key), Some((_, digest))) = (starter.key(), &starter.request) else { return Ok(None) };
        let Some(record) = self.operations.request(&key) else { return Ok(None) };
        match &record.answer {
            RequestAnswer::Operation(name) if record.digest == hex(digest) => Ok(self.operations.get(name)),
            RequestAnswer::Operation(_) | RequestAnswer::Reset { .. } => Err(Refusal::RequestIdReused),
        }
    }

    /// Reads the devices of a set back, all at once.
    pub(crate) async fn look(&self, names: &[DeviceName]) -> Found {
        let missing =
            names.iter().filter(|name| self.registry.get(name).is_none()).map(admission::not_found).collect();
        let slots: Vec<Arc<Slot>> =
            names.iter().filter_map(|name| self.registry.get(name).cloned()).collect();
        let views = join_all(slots.iter().map(|slot| slot.refresh())).await;
        Found { slots, views, missing }
    }

    pub(crate) fn bounds(&self) -> Bounds {
        Bounds {
            rate_bytes_per_second: self.config.defaults.rate_bytes_per_second,
            max_device_bytes: self.config.limits.max_device_bytes,
        }
    }

    /// Whether the agent itself takes no operation now.
    pub(crate) fn busy(&self) -> Option<Blocker> {
        let most = self.config.limits.max_operations;
        if self.is_ending() {
            return Some(Blocker::set(BlockerReason::AgentBusy, "the agent is shutting down"));
        }
        (*self.operations.running().borrow() >= most).then(|| too_many(most))
    }

    pub(crate) fn check_ending(&self) -> Result<(), Refusal> {
        if self.is_ending() { Err(Refusal::ShuttingDown) } else { Ok(()) }
    }

    pub(crate) fn waits_within(&self, field: &str, asked: Option<Duration>) -> Result<(), Refusal> {
        let most = self.config.limits.max_wait;
        match asked {
            Some(asked) if asked > most => Err(Refusal::invalid(
                field,
                format!("is longer than limits.max_wait of this agent, {}", humantime::format_duration(most)),
            )),
            Some(_) | None => Ok(()),
        }
    }

    /// Leases, records, and seats an operation, or says what is in the way. Where it fails nothing is left behind.
    pub(crate) async fn admit(
        self: &Arc<Self>,
        found: &Found,
        mut blockers: Vec<Blocker>,
        asked: Asked<'_>,
        starter: Starter,
    ) -> Result<(Arc<Entry>, Lease, run::Arrival), Refusal> {
        let Asked { job, devices, owner_pod, kept, handover } = asked;
        let now = self.environment.unix_now();
        let name = self.operations.new_name(now, &*self.environment.executor);
        let checkpoint = match kept {
            // Named for the operation that makes it.
            Some(Kept::MadeIn(place)) => Some(
                CheckpointName::new(place.name(), name.id())
                    .map_err(|error| Refusal::invalid("store", error))?,
            ),
            Some(Kept::Taken(name)) => Some(name),
            None => None,
        };
        if blockers.is_empty() && devices.len() != found.slots.len() {
            blockers.push(Blocker::set(BlockerReason::OutOfService, "a device of the set was never opened"));
        }
        if !blockers.is_empty() {
            return Err(Refusal::Blocked(blockers));
        }
        let lease = self
            .registry
            .lease(found.slots.clone(), &name)
            .map_err(|leased| Refusal::Blocked(leased.into_iter().map(Into::into).collect()))?;
        // Looked at before it was leased: another operation may have had it in between.
        let moved_on: Vec<Blocker> = lease
            .slots()
            .iter()
            .zip(&found.views)
            .filter(|(slot, view)| !slot.view().is_still(view))
            .map(|(slot, _)| {
                let message = "another operation had it until just now; try again";
                Blocker::device(BlockerReason::Leased, slot.name(), message)
            })
            .collect();
        if !moved_on.is_empty() {
            return Err(Refusal::Blocked(moved_on));
        }
        let most = self.config.limits.max_operations;
        let Some(seat) = Seat::take(self, most) else {
            return Err(Refusal::Blocked(vec![too_many(most)]));
        };
        let request = starter.key().zip(starter.request.as_ref().map(|(_, digest)| hex(digest)));
        let fixed = Fixed {
            name: name.clone(),
            job,
            devices: devices
                .into_iter()
                .zip(&found.views)
                .map(|((device, logical, epoch), view)| {
                    let before = view.record.as_ref().map(|record| OccupantRecord {
                        logical: record.logical.clone(),
                        epoch: record.epoch,
                    });
                    OperationDeviceRecord { device, logical, epoch, seal: None, before }
                })
                .collect(),
            caller: starter.caller,
            request_id: starter.request.map(|(id, _)| id.to_string()),
            owner_pod,
            created: now,
            trace_id: starter.trace_id,
            checkpoint,
            peer: handover.as_ref().map(|handover| handover.peer.clone()),
        };
        let (entry, arrival) =
            Entry::new(fixed, handover, now.after(self.config.defaults.stream_open_timeout));
        let entry = Arc::new(entry);
        let mut changes = vec![Change::Operation(Box::new(entry.record(RecordedStep::Admitted)))];
        let request = request.map(|(key, digest)| {
            (key, RequestRecord { digest, at: now, answer: RequestAnswer::Operation(name) })
        });
        if let Some((key, record)) = request.clone() {
            changes.push(Change::Request(key, record));
        }
        self.journal.commit(changes).await?;
        if let Some((key, record)) = request {
            self.operations.set_request(key, record);
        }
        self.operations.insert(Arc::clone(&entry));
        seat.keep();
        if !entry.fixed.owner_pod.is_empty() {
            for slot in lease.slots() {
                slot.set_owner_pod(entry.fixed.owner_pod.clone());
            }
        }
        Ok((entry, lease, arrival))
    }

    /// The record of a device that is about to carry restored state. What was discarded once and lives again is noted: from
    /// here on that it was discarded says nothing of where it runs.
    pub(super) fn back_to_life(&self, record: DeviceRecord) -> DeviceRecord {
        let mut all = self.registry.all().filter_map(|slot| slot.view().record);
        if !all.any(|other| other.past.iter().any(|past| past.logical == record.logical)) {
            return record;
        }
        let (logical, epoch) = (record.logical.clone(), record.epoch);
        record.with_past(PastRecord { logical, epoch, runs_nowhere: false, handed_over: false })
    }

    /// The epoch under which a logical device runs next: higher than any that this agent has seen of it.
    pub(crate) fn next_epoch(&self, logical: &LogicalDeviceId, stated: Epoch) -> Epoch {
        let newest = self.registry.newest_epoch(logical).map_or(stated, |newest| newest.max(stated));
        Epoch(newest.0.saturating_add(1))
    }
}

impl Starter {
    fn key(&self) -> Option<RequestKey> {
        let (request_id, _) = self.request.as_ref()?;
        Some(RequestKey { caller: self.caller.clone(), request_id: request_id.to_string() })
    }
}

/// How long a save waits for what.
pub(crate) struct Waits {
    pub(crate) pre_copy: Option<Duration>,
    pub(crate) cutover: Option<Duration>,
    pub(crate) hold: Option<Duration>,
}

impl Waits {
    pub(crate) fn of(spec: &SaveRequestSpec) -> Self {
        Self {
            pre_copy: match spec.pre_copy {
                PreCopy::IfAble { budget } | PreCopy::Required { budget } => budget,
                PreCopy::Never => None,
            },
            cutover: match spec.cutover {
                domain::Cutover::Manual { timeout } => timeout,
                domain::Cutover::Auto => None,
            },
            hold: match spec.after {
                domain::AfterSave::Hold { timeout } => timeout,
                domain::AfterSave::Resume | domain::AfterSave::StayStopped | domain::AfterSave::HandOver => {
                    None
                }
            },
        }
    }
}

/// What was found of a set.
#[derive(Debug)]
pub(crate) struct Found {
    slots: Vec<Arc<Slot>>,
    pub(crate) views: Vec<DeviceView>,
    pub(crate) missing: Vec<Blocker>,
}

/// Room for one more operation, given back unless it is kept.
struct Seat<'a> {
    core: &'a Core,
    kept: bool,
}

impl<'a> Seat<'a> {
    fn take(core: &'a Core, most: usize) -> Option<Self> {
        core.operations.reserve(most).then_some(Self { core, kept: false })
    }

    fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        if !self.kept {
            self.core.operations.release();
        }
    }
}

fn too_many(most: usize) -> Blocker {
    let message = format!(
        "the agent has {most} operations, as many as limits.max_operations allows; wait for one to end, or cancel one"
    );
    Blocker::set(BlockerReason::AgentBusy, message)
}

pub(crate) fn hex(digest: &[u8; 32]) -> String {
    use std::fmt::Write as _;
    digest.iter().fold(String::with_capacity(64), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
