//! The destination: what it lets in, and what it answers for.
//!
//! ```text
//!   admit    -> Tickets
//!   prepare  -> blockers, ticket -> admitted as an arrival: leased, on record, its task waits for the stream
//!   ready    -> on record -> said to the task, which tells the source Prepared
//!   commit   -> ArrivalStep::on_commit -> Commit said to the task -> its end, once that is on record
//!   abandon  -> Cancel said to the task, unless it is too late
//! ```
//! What is answered about a hand-over is its record, and its verdict only once its end is durable.
//!
//! # Invariants
//! - Where Admit asked for Ready an arrival counts as loading until Ready is on record: it is told as that, `CommitHandover`
//!   is refused, and a later life of the agent resets its devices. Its source was not told Prepared.
//! - Ready is the word of the identity that called Admit, or of an admin.

use std::sync::Arc;
use std::time::Duration;

use tracing::Instrument as _;
use vfio_checkpoint_device::operation::RestoreTerms;
use vfio_checkpoint_fsm::AfterLoad;
use vfio_checkpoint_fsm::handover::{ArrivalStep, CommitAnswer};
use vfio_checkpoint_proto::domain::{
    AdmitSpec, AfterRestore, CommitHandoverSpec, LogicalDevice, PrepareSpec, RestoreSource, RestoreSpec,
};
use vfio_checkpoint_proto::ids::{Epoch, KeyHash, OperationName, Ticket};
use vfio_checkpoint_proto::proof::Claim;
use vfio_checkpoint_proto::v1::BlockerReason;
use vfio_checkpoint_proto::version::{NoCommonVersion, Version, negotiate};

use super::tickets::random;
use crate::core::Core;
use crate::environment::UnixMillis;
use crate::journal::Change;
use crate::operation::admission::fork::Whereabouts;
use crate::operation::admission::{self, Blocker};
use crate::operation::record::{HandoverRecord, JobRecord, PeerRecord};
use crate::operation::{Asked, Cancel, Entry, Refused, Starter, Way, Work, hex, run, span};
use crate::rpc::Refusal;

/// A destination waits a little longer for the commit than its source does, so that it is the source that decides. Beside
/// this there is the time that a source may need to hear that all is prepared.
const SLACK: Duration = Duration::from_secs(10);

/// What Admit brought.
#[derive(Debug)]
pub struct Admitted {
    /// The ticket.
    pub ticket: Ticket,
    /// Until when it can be used.
    pub until: UnixMillis,
    /// The key of this agent, to which its source brings the devices. None where it is not served.
    pub key: Option<KeyHash>,
}

/// What Prepare brought.
#[derive(Debug)]
pub struct Prepared {
    /// The arrival. None where the request was to be validated only.
    pub entry: Option<Arc<Entry>>,
    /// What is in the way.
    pub blockers: Vec<Blocker>,
    /// The version that both speak, where there is one.
    pub version: Option<Version>,
}

/// What the destination has on record of a hand-over.
#[derive(Debug)]
pub struct Told {
    /// The arrival.
    pub operation: OperationName,
    /// How far it is.
    pub step: ArrivalStep,
    /// Why it did not end COMMITTED. Empty where it did, or has not ended.
    pub message: String,
    /// The epochs under which the devices run, or would have run.
    pub epochs: Vec<Epoch>,
    /// What proves it to the source. None where somebody else looks.
    pub secret: Option<Ticket>,
}

impl Core {
    /// Lets one source bring one set of logical devices here.
    pub fn admit_source(&self, spec: AdmitSpec, caller: String) -> Result<Admitted, Refusal> {
        for device in &spec.devices {
            if self.registry.get(device).is_none() {
                return Err(Refusal::DeviceNotFound(device.clone()));
            }
        }
        self.check_ending()?;
        let until = self.environment.unix_now().after(spec.ttl);
        let ticket = self.tickets.issue(self.environment.executor.now(), spec, caller)?;
        Ok(Admitted { ticket, until, key: self.own_key() })
    }

    /// The key of the certificate that this agent shows now. None where it is not served.
    pub fn own_key(&self) -> Option<KeyHash> {
        self.tls.as_ref().map(|tls| KeyHash(tls.current().material.own_key_hash().0))
    }

    /// Leases the devices of a ticket for what its source brings, of which `body` is the digest.
    pub async fn prepare(
        self: &Arc<Self>,
        spec: PrepareSpec,
        body: [u8; 32],
        starter: Starter,
        key: KeyHash,
    ) -> Result<Prepared, Refusal> {
        self.waits_within("commit_timeout", Some(spec.commit_timeout))?;
        let version = negotiate(self.config.server.stream_versions(), spec.versions);
        let body = hex(&body);
        if let Some(before) = self.prepared_before(&spec, &body, &starter.caller, key, version)? {
            return Ok(before);
        }
        // A device that does not answer keeps waiting who asks for it, and must not keep all others waiting too.
        let found = self.look(&spec.devices).await;
        // Until it is admitted nobody knows of it, and of one state only one is. What was found is looked at again there.
        let _one_after_another =
            if spec.validate_only { None } else { Some(self.operations.admit_restore().await) };
        // It may have been asked twice at once.
        if let Some(before) = self.prepared_before(&spec, &body, &starter.caller, key, version)? {
            return Ok(before);
        }
        let whereabouts = Whereabouts::of(self.registry.all().map(|slot| slot.view()))
            .and_arriving(&self.operations.active());
        let restore = RestoreSpec {
            devices: spec.devices.clone(),
            source: RestoreSource::Stream(Box::new(spec.manifest.clone())),
            after: AfterRestore::Hold { timeout: None },
            max_bytes: None,
            validate_only: spec.validate_only,
            request_id: None,
            owner_pod: None,
            allow_fork: false,
            allow_inconsistent: false,
        };
        let manifest = &spec.manifest;
        let (mut blockers, plan) =
            admission::restore(&found.views, &restore, manifest, &whereabouts, self.bounds());
        blockers.extend(found.missing.iter().cloned());
        blockers.extend(self.busy());
        blockers.extend(self.stale(manifest.devices.iter().map(|device| &device.logical_device)));
        if spec.validate_only {
            if let Err(none) = &version {
                blockers.push(Blocker::set(BlockerReason::NoCommonVersion, none.to_string()));
            }
            return Ok(Prepared { entry: None, blockers, version: version.ok() });
        }
        let version = version.map_err(|none| Refusal::NoCommonVersion(none.to_string()))?;
        self.check_ending()?;
        let ticket = spec.ticket.as_ref().ok_or_else(|| Refusal::invalid("ticket", "it must be given"))?;
        let logical: Vec<LogicalDevice> =
            manifest.devices.iter().map(|device| device.logical_device.clone()).collect();
        let now = self.environment.executor.now();
        let promise = self.tickets.look(now, ticket, key, &logical, &spec.devices)?;
        let devices: Vec<_> = spec
            .devices
            .iter()
            .zip(&logical)
            .map(|(device, logical)| {
                (device.clone(), logical.id.clone(), self.next_epoch(&logical.id, logical.epoch))
            })
            .collect();
        let handover = HandoverRecord {
            operation: Some(spec.source_operation),
            secret: Some(random()?),
            admitted_by: Some(promise.caller),
            body_digest: Some(body),
            epochs: devices.iter().map(|(_, _, epoch)| *epoch).collect(),
            ..HandoverRecord::new(PeerRecord::Source { key })
        };
        let job = JobRecord::Arrive { barrier: plan.barrier, require_ready: promise.spec.require_ready };
        let owner_pod = promise.spec.owner_pod.as_ref().map(ToString::to_string).unwrap_or_default();
        let taken = if blockers.is_empty() {
            Some(self.tickets.take(ticket).ok_or(super::TicketError::Invalid)?)
        } else {
            None
        };
        let asked = Asked { job, devices, owner_pod, kept: None, handover: Some(handover) };
        let (entry, lease, arrival) = match self.admit(&found, blockers, asked, starter).await {
            Ok(admitted) => admitted,
            Err(refusal) => {
                // What is in the way may pass, and whoever asks again is to be told of that, or let in. Nobody else is in
                // between: one is admitted after another.
                if let Some(promise) = taken {
                    self.tickets.put_back(ticket.clone(), promise);
                }
                return Err(refusal);
            }
        };
        for (index, device) in manifest.devices.iter().enumerate() {
            entry.expects(index, admission::size(device.data_size));
        }
        // Where the connection breaks under the news, the source may find out after the one and come back within the other.
        // After that its stream is forgotten here, and it gives up.
        let server = &self.config.server;
        let news = server.stream_idle_timeout.saturating_add(server.stream_resume_window);
        let terms = RestoreTerms {
            after: AfterLoad::Hold,
            hold_limit: spec.commit_timeout.saturating_add(SLACK).saturating_add(news),
            // Without effect: Ready was said, or was not asked for, before the hold ends.
            ready_limit: self.config.defaults.hold_timeout,
        };
        let span = span(self, &entry);
        let running = run(
            Arc::clone(self),
            Arc::clone(&entry),
            lease,
            Work::Arrive(terms),
            spec.manifest,
            Way::Stream(arrival),
        );
        self.tasks.spawn(running.instrument(span));
        Ok(Prepared { entry: Some(entry), blockers: Vec::new(), version: Some(version) })
    }

    /// What this source was answered when it prepared this operation of its own before.
    fn prepared_before(
        &self,
        spec: &PrepareSpec,
        body: &str,
        caller: &str,
        key: KeyHash,
        version: Result<Version, NoCommonVersion>,
    ) -> Result<Option<Prepared>, Refusal> {
        if spec.validate_only {
            return Ok(None);
        }
        let Some(entry) = self.arrival_of(caller, key, &spec.source_operation) else { return Ok(None) };
        let known = entry.view().handover.and_then(|handover| handover.record.body_digest);
        if known.is_some_and(|known| known != body) {
            return Err(Refusal::SourceOperationReused(spec.source_operation.clone()));
        }
        let version = version.map_err(|none| Refusal::NoCommonVersion(none.to_string()))?;
        Ok(Some(Prepared { entry: Some(entry), blockers: Vec::new(), version: Some(version) }))
    }

    /// The arrival that this source has prepared with this operation of its own. Agents on many nodes may share an
    /// identity, and their operations' names are no secret: it takes the key too.
    fn arrival_of(&self, caller: &str, key: KeyHash, source: &OperationName) -> Option<Arc<Entry>> {
        let is_it = |entry: &Entry| {
            matches!(entry.fixed.job, JobRecord::Arrive { .. })
                && entry.fixed.caller == caller
                && entry.view().handover.is_some_and(|handover| {
                    let record = handover.record;
                    record.operation.as_ref() == Some(source)
                        && matches!(record.peer, PeerRecord::Source { key: known } if known == key)
                })
        };
        self.operations.page(None, is_it, 1).pop()
    }

    /// Logical devices that have been here, or are, under a newer epoch than the one that comes.
    fn stale<'a>(&'a self, logical: impl Iterator<Item = &'a LogicalDevice> + 'a) -> Vec<Blocker> {
        let newer = |wanted: &LogicalDevice| {
            self.registry.newest_epoch(&wanted.id).filter(|newest| *newest > wanted.epoch)
        };
        let stale = logical.filter_map(|wanted| Some((wanted, newer(wanted)?)));
        stale
            .map(|(wanted, epoch)| {
                let message = format!(
                    "logical device {} was here in epoch {}, and an old copy of it would come, of epoch {}",
                    wanted.id, epoch.0, wanted.epoch.0
                );
                Blocker::set(BlockerReason::StaleEpoch, message)
            })
            .collect()
    }

    /// The arrival of this name, for whoever can prove that it prepared it.
    fn arrival(&self, name: &OperationName, caller: &str, claim: &Claim) -> Result<Arc<Entry>, Refusal> {
        let entry = self.known_arrival(name)?;
        let is_proven = secret(&entry).is_some_and(|secret| claim.holds(&secret));
        if is_proven && entry.fixed.caller == caller {
            Ok(entry)
        } else {
            Err(Refusal::NotYours(name.clone()))
        }
    }

    fn known_arrival(&self, name: &OperationName) -> Result<Arc<Entry>, Refusal> {
        let entry = self.operations.get(name).ok_or_else(|| Refusal::OperationNotFound(name.clone()))?;
        match entry.fixed.job {
            JobRecord::Arrive { .. } => Ok(entry),
            JobRecord::Save { .. } | JobRecord::Restore { .. } | JobRecord::Migrate { .. } => {
                Err(Refusal::Operation { operation: name.clone(), refused: Refused::NotAMigration })
            }
        }
    }

    /// Has the devices of an arrival run, unless that is decided already. How it ends `ended` tells.
    pub fn commit_handover(&self, spec: CommitHandoverSpec, caller: &str) -> Result<Arc<Entry>, Refusal> {
        let entry = self.arrival(&spec.operation, caller, &spec.claim)?;
        let refused = |refused| Refusal::Operation { operation: spec.operation.clone(), refused };
        let epochs: Vec<Epoch> = entry.fixed.devices.iter().map(|device| device.epoch).collect();
        if epochs != spec.epochs {
            return Err(refused(Refused::StaleEpoch));
        }
        match entry.arrival_step().on_commit() {
            CommitAnswer::NotPrepared if entry.on_record().arrival(None) == ArrivalStep::Prepared => {
                return Err(refused(Refused::NotReady));
            }
            CommitAnswer::NotPrepared => {
                return Err(refused(Refused::NotPrepared { phase: entry.view().phase }));
            }
            // Whether a deadline or a Cancel was quicker is decided in one place, which is its task.
            CommitAnswer::Run => entry.signals.say_commit(),
            CommitAnswer::Wait | CommitAnswer::Told(_) => {}
        }
        Ok(entry)
    }

    /// Whoever uses the devices of an arrival is ready.
    pub async fn ready(
        &self,
        name: &OperationName,
        caller: &str,
        is_admin: bool,
    ) -> Result<Arc<Entry>, Refusal> {
        let entry = self.operations.get(name).ok_or_else(|| Refusal::OperationNotFound(name.clone()))?;
        let takes =
            || entry.takes_ready().map_err(|refused| Refusal::Operation { operation: name.clone(), refused });
        takes()?;
        let admitted_by = entry.view().handover.and_then(|handover| handover.record.admitted_by);
        if !is_admin && admitted_by.as_deref() != Some(caller) {
            return Err(Refusal::NotYourAdmission(name.clone()));
        }
        {
            let _one_at_a_time = entry.recording.lock().await;
            takes()?;
            if entry.owes_ready() {
                let mut record = entry.record(entry.on_record());
                if let Some(handover) = &mut record.handover {
                    handover.ready = true;
                }
                self.journal.commit(vec![Change::Operation(Box::new(record))]).await?;
                entry.hand_over(|handover| handover.record.ready = true);
            }
        }
        entry.signals.say_ready();
        Ok(entry)
    }

    /// Gives an arrival up on the word of its source. Says how it stands, which may be that it is too late.
    pub fn abandon_handover(
        &self,
        name: &OperationName,
        caller: &str,
        claim: &Claim,
        reason: String,
    ) -> Result<Told, Refusal> {
        let entry = self.arrival(name, caller, claim)?;
        match entry.cancel(Cancel::Abandoned { reason }) {
            Ok(()) | Err(Refused::Over) => {}
            Err(refused) => tracing::info!(operation = %name, %refused, "not given up"),
        }
        Ok(proven(&entry))
    }

    /// What is on record of a hand-over, with what proves it to whoever can prove that it prepared it.
    pub fn handover(
        &self,
        name: &OperationName,
        caller: &str,
        claim: Option<&Claim>,
    ) -> Result<Told, Refusal> {
        match claim {
            Some(claim) => Ok(proven(&*self.arrival(name, caller, claim)?)),
            None => Ok(told(&*self.known_arrival(name)?)),
        }
    }

    /// The source has its own end on record: this one's may be forgotten in its time, where it has one. Says whether that is
    /// so by this.
    pub async fn settle_handover(
        &self,
        name: &OperationName,
        caller: &str,
        claim: &Claim,
    ) -> Result<(Told, bool), Refusal> {
        let entry = self.arrival(name, caller, claim)?;
        let is_to_settle = || entry.is_done() && !is_settled(&entry);
        // Whoever puts the end on record may have to wait for room, and the source hears how far it is meanwhile.
        if !is_to_settle() {
            return Ok((proven(&entry), false));
        }
        let _one_at_a_time = entry.recording.lock().await;
        let settles = is_to_settle();
        if settles {
            let mut record = entry.record(entry.on_record());
            if let Some(handover) = &mut record.handover {
                handover.settled = true;
            }
            self.journal.commit(vec![Change::Operation(Box::new(record))]).await?;
            entry.settled();
        }
        Ok((proven(&entry), settles))
    }
}

/// How an arrival has ended, once that is on record, for its source.
pub(crate) async fn ended(entry: &Entry) -> Told {
    // The sender is in the entry, so waiting does not fail.
    let mut changes = entry.changes();
    drop(changes.wait_for(|view| view.end.is_some()).await);
    proven(entry)
}

fn is_settled(entry: &Entry) -> bool {
    entry.view().handover.is_some_and(|handover| handover.record.settled)
}

fn told(entry: &Entry) -> Told {
    let end = entry.view().end;
    let message = end.and_then(|end| end.failure).map(|failure| failure.message).unwrap_or_default();
    Told {
        operation: entry.fixed.name.clone(),
        step: entry.arrival_step(),
        message,
        epochs: entry.fixed.devices.iter().map(|device| device.epoch).collect(),
        secret: None,
    }
}

/// The same for its source.
fn proven(entry: &Entry) -> Told {
    Told { secret: secret(entry), ..told(entry) }
}

/// What its source was answered, and shows to nobody.
fn secret(entry: &Entry) -> Option<Ticket> {
    entry.view().handover.and_then(|handover| handover.record.secret)
}
