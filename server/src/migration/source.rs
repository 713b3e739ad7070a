//! The source: a migration from its admission to the stream that takes its state away.
//!
//! ```text
//!   spec -> blockers here -> dial -> Prepare{validate_only} -> blockers there
//!     none -> leased, on record -> task: dial, Prepare -> on record -> StreamState -> device::operation::save
//! ```

use std::sync::Arc;
use std::time::Duration;

use tracing::Instrument as _;
use vfio_checkpoint_client::call::{CallError, Client};
use vfio_checkpoint_client::transfer::{DialOptions, dial_with};
use vfio_checkpoint_device::chain;
use vfio_checkpoint_device::operation::{PrecopyPolicy, SaveTerms};
use vfio_checkpoint_fsm::{AfterSave, Cutover, SaveRequest};
use vfio_checkpoint_proto::domain::{
    CommitMode, Invalid, Manifest, MigrateSpec, NoConvergence, PreCopy, StreamRole, secret,
};
use vfio_checkpoint_proto::ids::{Epoch, OperationName, Ticket};
use vfio_checkpoint_proto::v1;

use super::COMMIT_PATIENCE;
use super::peer::{PREPARE_LIMIT, PeerError};
use crate::core::Core;
use crate::operation::admission::{self, Blocker, Prediction};
use crate::operation::record::{HandoverRecord, JobRecord, PeerRecord, RecordedStep};
use crate::operation::{Asked, Entry, Starter, Waits, Way, Work, device_manifests, manifest, run, span};
use crate::rpc::Refusal;
use crate::transfer::Attached;

/// A side of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Where the devices are.
    Source,
    /// Where they go.
    Destination,
}

/// What came of a request.
#[derive(Debug, Default)]
pub struct MigrationStarted {
    /// The operation. None where the request was to be validated only.
    pub entry: Option<Arc<Entry>>,
    /// What is in the way, on each side.
    pub blockers: Vec<(Side, Blocker)>,
    /// What is known beforehand.
    pub prediction: Option<Prediction>,
    /// A round trip to the destination, where it was reached.
    pub round_trip: Option<Duration>,
    /// The version that both speak, where there is one.
    pub version: Option<u32>,
}

/// What a migration has to know to begin its work.
#[derive(Debug)]
pub(crate) struct Departure {
    pub(crate) ticket: Ticket,
    pub(crate) devices: Vec<String>,
    pub(crate) commit_timeout: Duration,
}

/// What was found out about a destination without touching it.
#[derive(Debug, Default)]
struct There {
    blockers: Vec<Blocker>,
    round_trip: Option<Duration>,
    version: Option<u32>,
}

impl Core {
    /// Admits a migration.
    pub async fn start_migration(
        self: &Arc<Self>,
        spec: MigrateSpec,
        starter: Starter,
    ) -> Result<MigrationStarted, Refusal> {
        let _one = self.lock(&starter).await;
        if let Some(entry) = self.started_before(&starter)?
            && !spec.save.validate_only
        {
            return Ok(MigrationStarted { entry: Some(entry), ..MigrationStarted::default() });
        }
        let patience = self.patience(&spec)?;
        let found = self.look(&spec.save.devices).await;
        let manifests = device_manifests(&found.views)?;
        let there = if manifests.len() == spec.save.devices.len() {
            let now = self.environment.unix_now();
            let name = self.operations.new_name(now, &*self.environment.executor);
            let manifest = manifest(&name, now, manifests.clone(), AfterSave::HandOver);
            self.ask_destination(&spec, &manifest, patience).await
        } else {
            // Without all of its devices there is nothing that it could be asked about.
            There::default()
        };
        let cost = self.handover_cost(there.round_trip);
        let (mut blockers, plan, prediction) = admission::save(&found.views, &spec.save, self.bounds(), cost);
        blockers.extend(found.missing.iter().cloned());
        blockers.extend(self.busy());
        let beforehand = MigrationStarted {
            entry: None,
            blockers: Vec::new(),
            prediction: Some(prediction),
            round_trip: there.round_trip,
            version: there.version,
        };
        if spec.save.validate_only {
            let here = blockers.into_iter().map(|blocker| (Side::Source, blocker));
            let there = there.blockers.into_iter().map(|blocker| (Side::Destination, blocker));
            return Ok(MigrationStarted { blockers: here.chain(there).collect(), ..beforehand });
        }
        self.check_ending()?;
        blockers.extend(there.blockers.into_iter().map(at_the_destination));
        let ticket = spec.ticket.clone().ok_or_else(|| Refusal::invalid("ticket", "it must be given"))?;
        let devices = found.views.iter().filter_map(|view| {
            let record = view.record.as_ref()?;
            Some((view.name.clone(), record.logical.clone(), record.epoch))
        });
        let asked = Asked {
            job: JobRecord::Migrate {
                pre_copy: plan.pre_copy,
                barrier: plan.barrier,
                manual_cutover: plan.cutover == Cutover::Manual,
                manual_commit: matches!(spec.commit, CommitMode::Manual { .. }),
            },
            devices: devices.collect(),
            owner_pod: spec.save.owner_pod.as_ref().map(ToString::to_string).unwrap_or_default(),
            kept: None,
            handover: Some(HandoverRecord::new(destination(&spec))),
        };
        let (entry, lease, _no_stream) = self.admit(&found, blockers, asked, starter).await?;
        for (index, view) in found.views.iter().enumerate() {
            entry.expects(index, view.data_size);
        }
        if let Some(downtime) = prediction.downtime {
            entry.predicts(downtime);
        }
        let manifest = manifest(&entry.fixed.name, entry.fixed.created, manifests, AfterSave::HandOver);
        let departure = Departure {
            ticket,
            devices: spec.target.devices.iter().map(ToString::to_string).collect(),
            commit_timeout: patience,
        };
        let span = span(self, &entry);
        let work = Work::Migrate(self.terms(&spec, plan.cutover, cost, patience), cost);
        let way = Way::ToPeer(Box::new(departure));
        let running = run(Arc::clone(self), Arc::clone(&entry), lease, work, manifest, way);
        self.tasks.spawn(running.instrument(span));
        Ok(MigrationStarted { entry: Some(entry), ..beforehand })
    }

    /// How long the destination may have to wait for the commit, where all times that are asked for are within bounds.
    fn patience(&self, spec: &MigrateSpec) -> Result<Duration, Refusal> {
        let waits = Waits::of(&spec.save);
        self.waits_within("pre_copy_budget", waits.pre_copy)?;
        self.waits_within("cutover_timeout", waits.cutover)?;
        match spec.commit {
            CommitMode::Auto => Ok(COMMIT_PATIENCE),
            CommitMode::Manual { timeout } => {
                self.waits_within("commit_timeout", timeout)?;
                Ok(timeout.unwrap_or(self.config.defaults.hold_timeout))
            }
        }
    }

    fn terms(&self, spec: &MigrateSpec, cutover: Cutover, cost: Duration, patience: Duration) -> SaveTerms {
        let (defaults, waits) = (&self.config.defaults, Waits::of(&spec.save));
        let limit = spec.save.downtime_limit.unwrap_or(defaults.downtime_limit);
        let keeps_limit = spec.save.no_convergence == NoConvergence::Abort;
        SaveTerms {
            request: SaveRequest {
                pre_copy: spec.save.pre_copy != PreCopy::Never,
                cutover,
                after: AfterSave::HandOver,
            },
            policy: PrecopyPolicy {
                downtime_limit: limit.saturating_sub(cost),
                time_budget: waits.pre_copy.unwrap_or(defaults.pre_copy_budget),
                stop_over_limit: !keeps_limit,
            },
            cutover_limit: waits.cutover.unwrap_or(defaults.cutover_timeout),
            hold_limit: patience,
            // About half of what a hand-over costs comes after the commit was sent.
            stop_limit: keeps_limit.then(|| limit.saturating_sub(cost / 2)),
            limits_commit: spec.commit == CommitMode::Auto,
        }
    }

    /// What a hand-over adds to the stop: two round trips, and what the two journals write meanwhile, of which each is
    /// taken to be as quick as this one.
    fn handover_cost(&self, round_trip: Option<Duration>) -> Duration {
        round_trip.unwrap_or_default() * 2 + self.journal.syncs().usual * 4
    }

    /// What a destination is asked to take; without a ticket, whether it would.
    fn prepare_request(
        &self,
        ticket: Option<&Ticket>,
        manifest: &Manifest,
        devices: Vec<String>,
        commit_timeout: Duration,
    ) -> v1::PrepareRequest {
        let versions = self.config.server.stream_versions();
        v1::PrepareRequest {
            ticket: ticket.map(|ticket| bytes::Bytes::copy_from_slice(&ticket.0)).unwrap_or_default(),
            source_operation: manifest.operation.to_string(),
            manifest: Some(manifest.clone().into()),
            devices,
            min_version: versions.min().0,
            max_version: versions.max().0,
            validate_only: ticket.is_none(),
            commit_timeout: prost_types::Duration::try_from(commit_timeout).ok(),
        }
    }

    /// Everything that is in the way at the destination, as it says itself.
    async fn ask_destination(
        &self,
        spec: &MigrateSpec,
        manifest: &Manifest,
        commit_timeout: Duration,
    ) -> There {
        let asking = async {
            let client = self.dial_admitted(&destination(spec)).await?;
            let begun = self.environment.executor.now();
            client.get_agent(v1::GetAgentRequest {}).await.map_err(PeerError::Call)?;
            let round_trip = self.environment.executor.now().saturating_sub(begun);
            let devices = spec.target.devices.iter().map(ToString::to_string).collect();
            let request = self.prepare_request(None, manifest, devices, commit_timeout);
            let answer =
                self.within(client, PREPARE_LIMIT).prepare(request).await.map_err(PeerError::Call)?;
            Ok::<_, PeerError>((round_trip, answer))
        };
        match asking.await {
            Ok((round_trip, answer)) => There {
                blockers: answer.blockers.into_iter().map(blocker).collect(),
                round_trip: Some(round_trip),
                version: Some(answer.version).filter(|version| *version > 0),
            },
            Err(error) => {
                let message = format!("{} cannot be asked: {}", spec.target.endpoint, chain(&error));
                let blocker = Blocker::set(error.reason(), message);
                There { blockers: vec![blocker], ..There::default() }
            }
        }
    }
}

fn destination(spec: &MigrateSpec) -> PeerRecord {
    PeerRecord::Destination {
        endpoint: spec.target.endpoint.clone(),
        spiffe_id: spec.target.spiffe_id.clone(),
        key: spec.target.key,
    }
}

/// What is in the way there, for a caller that is told of the blockers here.
fn at_the_destination(blocker: Blocker) -> Blocker {
    let message = match &blocker.device {
        Some(device) => format!("at the destination, {device}: {}", blocker.message),
        None => format!("at the destination: {}", blocker.message),
    };
    Blocker { device: None, message, reason: blocker.reason }
}

fn blocker(wire: v1::Blocker) -> Blocker {
    Blocker {
        reason: wire.reason(),
        device: wire.device.parse().ok(),
        message: wire.message.chars().take(1024).collect(),
    }
}

/// How far an epoch may go at a time. One is enough, for a destination that has seen no newer one. What comes after the last
/// epoch that there is would be none that is higher: a device that was there could never move again.
const LONGEST_STEP: u64 = 1024;

/// The epochs under which the devices will run at the destination, as it says.
fn epochs_there(told: &[u64], ours: &[Epoch]) -> Result<Vec<Epoch>, String> {
    let fits = |(new, old): (&u64, &Epoch)| *new > old.0 && *new - old.0 <= LONGEST_STEP;
    if told.len() == ours.len() && told.iter().zip(ours).all(fits) {
        return Ok(told.iter().copied().map(Epoch).collect());
    }
    Err(format!("epochs: they are not one for each device, higher than its own by 1 to {LONGEST_STEP}"))
}

/// Why a destination did not take a migration that was admitted here. Nothing was touched.
#[derive(Debug, thiserror::Error)]
#[error("the destination did not take the devices: {}", chain(&**.0))]
pub(crate) struct NotTaken(#[source] pub(crate) Box<dyn std::error::Error + Send + Sync>);

impl Departure {
    /// Has the destination admit the arrival, and opens its stream. What the destination answers is in the entry, to be
    /// put on record with the next step.
    pub(crate) async fn open(
        &self,
        core: &Core,
        entry: &Entry,
        manifest: &Manifest,
    ) -> Result<(Client, Attached), NotTaken> {
        let not_taken = |error: PeerError| NotTaken(Box::new(error));
        let peer = entry.fixed.peer.as_ref();
        let peer =
            peer.ok_or_else(|| not_taken(PeerError::Answer("nobody is on record there".to_owned())))?;
        let client = core.dial_admitted(peer).await.map_err(not_taken)?;
        let (ticket, devices) = (Some(&self.ticket), self.devices.clone());
        let request = core.prepare_request(ticket, manifest, devices, self.commit_timeout);
        let answer = core.within(client.clone(), PREPARE_LIMIT).prepare(request).await;
        let answer = answer.map_err(|error: CallError| not_taken(PeerError::Call(error)))?;
        let wrong = |problem: String| not_taken(PeerError::Answer(problem));
        let operation: OperationName =
            answer.operation.parse().map_err(|error| wrong(format!("operation: {error}")))?;
        let secret = secret(&answer.secret).map_err(|error: Invalid| wrong(error.to_string()))?;
        let ours: Vec<Epoch> = entry.fixed.devices.iter().map(|device| device.epoch).collect();
        let epochs = epochs_there(&answer.epochs, &ours).map_err(wrong)?;
        entry.hand_over(|handover| {
            handover.record.operation = Some(operation.clone());
            handover.record.secret = Some(secret);
            handover.record.epochs = epochs;
        });
        // So that, also after a crash, whoever is over there can be told that nothing comes.
        core.record_step(entry, RecordedStep::Begun).await.map_err(|error| NotTaken(Box::new(error)))?;
        let options = DialOptions { versions: core.config.server.stream_versions(), resume: None };
        let dialed = dial_with(&client, &operation, StreamRole::Giver, options).await;
        Ok((client, Attached::dialed(dialed.map_err(|error| NotTaken(Box::new(error)))?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_rises_and_not_out_of_sight() {
        let ours = [Epoch(3), Epoch(u64::MAX - 5)];
        let taken = |first, second| epochs_there(&[first, second], &ours).ok();
        let last = u64::MAX - 4;
        assert_eq!(taken(4, last), Some(vec![Epoch(4), Epoch(last)]));
        assert_eq!(taken(3 + LONGEST_STEP, last), Some(vec![Epoch(3 + LONGEST_STEP), Epoch(last)]));
        for first in [0, 2, 3, 4 + LONGEST_STEP, u64::MAX] {
            assert_eq!(taken(first, last), None, "{first}");
        }
        assert_eq!(taken(4, 4), None, "each of its own device");
        assert!(epochs_there(&[4], &ours).is_err() && epochs_there(&[4, last, 1], &ours).is_err());
    }
}
