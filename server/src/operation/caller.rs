//! What a device operation asks and is told, on behalf of its entry.
//!
//! # Invariants
//! - A step is on record before the command is executed that comes with it.
//! - Looked at where it is recorded: nothing runs under an epoch that is older than one that was seen here; it is reset. And
//!   of a migration, as an assertion: the source lets go only of what it was told to be elsewhere. An agent that would is
//!   stopped in its step, and its devices stay as they are.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, ready};
use vfio_checkpoint_device::operation::{BoxError, Caller, OperationStep, Progress};
use vfio_checkpoint_fsm::handover::{ArrivalStep, OfferStep};
use vfio_checkpoint_fsm::{RestoreState, SaveState, Validity};
use vfio_checkpoint_proto::ids::{Epoch, LogicalDeviceId};

use super::entry::{Entry, Phase};
use super::record::{JobRecord, OperationDeviceRecord, RecordedStep, VerdictRecord};
use crate::core::Core;
use crate::failpoint::{is_planted, reached};
use crate::journal::{Change, DeviceRecord};
use crate::transfer::SinkWatch;

/// The caller of one operation.
#[derive(Debug)]
pub(super) struct EntryCaller {
    pub(super) core: Arc<Core>,
    pub(super) entry: Arc<Entry>,
    pub(super) hold_limit: Duration,
    pub(super) cutover_limit: Duration,
    /// What becomes known of the stream of a save while nothing is given to it.
    pub(super) stream: Option<SinkWatch>,
    /// What a hand-over adds to the time that the devices stand still, beside the moving of state.
    pub(super) handover_cost: Duration,
}

/// Why a caller took its operation back.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct TakenBack(String);

/// What is to run is older than what was seen here.
#[derive(Debug, thiserror::Error)]
#[error(
    "logical device {0} is not run in epoch {1}: this agent has seen a newer one of it since this was admitted"
)]
struct StaleEpoch(LogicalDeviceId, Epoch);

impl Caller for EntryCaller {
    fn cutover(&self) -> BoxFuture<'_, ()> {
        async {
            match &self.stream {
                // The taker may say it on its stream as well.
                Some(stream) => tokio::select! {
                    biased;
                    () = self.entry.signals.cutover() => {}
                    () = stream.cutover() => {}
                },
                None => self.entry.signals.cutover().await,
            }
        }
        .boxed()
    }

    fn resume(&self) -> BoxFuture<'_, ()> {
        match self.entry.fixed.job {
            // The source says it.
            JobRecord::Arrive { .. } => self.entry.signals.commit().boxed(),
            JobRecord::Save { .. } | JobRecord::Restore { .. } | JobRecord::Migrate { .. } => {
                self.entry.signals.resume().boxed()
            }
        }
    }

    fn commit(&self) -> BoxFuture<'_, ()> {
        match self.entry.fixed.job {
            JobRecord::Migrate { manual_commit: false, .. } => ready(()).boxed(),
            JobRecord::Migrate { manual_commit: true, .. }
            | JobRecord::Save { .. }
            | JobRecord::Restore { .. }
            | JobRecord::Arrive { .. } => self.entry.signals.commit().boxed(),
        }
    }

    fn cancelled(&self) -> BoxFuture<'_, BoxError> {
        async {
            let said = async { BoxError::from(TakenBack(self.entry.signals.cancelled().await.to_string())) };
            match &self.stream {
                Some(stream) => tokio::select! {
                    biased;
                    said = said => said,
                    broken = stream.broken() => broken.into(),
                },
                None => said.await,
            }
        }
        .boxed()
    }

    fn moved(&self, step: OperationStep) -> BoxFuture<'_, Result<(), BoxError>> {
        async move {
            tracing::info!(operation = %self.entry.fixed.name, %step, "moved");
            reached(format_args!("{step}"));
            match step {
                OperationStep::Save(state) => self.moved_save(state).await,
                OperationStep::Restore(state) => self.moved_restore(state).await,
            }
        }
        .boxed()
    }

    fn progress(&self, progress: &Progress<'_>) {
        let moved = progress.devices.iter().fold(0_u64, |sum, device| sum.saturating_add(device.bytes));
        let rate = self.entry.meter(self.core.environment.executor.now(), moved);
        let running = match progress.step {
            OperationStep::Save(state) => {
                matches!(state, SaveState::Admitted | SaveState::PreCopying | SaveState::Quiescing)
            }
            OperationStep::Restore(_) => false,
        };
        let predicted = progress.predicted_downtime.map(|stop| stop.saturating_add(self.handover_cost));
        let resent = self.stream.as_ref().map_or(0, SinkWatch::resent_bytes);
        self.entry.change(|view| {
            if let Some(handover) = view.handover.as_mut().filter(|_| resent > 0) {
                handover.record.resent_bytes = resent;
            }
            view.rate_bytes_per_second = rate;
            view.predicted_downtime = predicted.or(view.predicted_downtime);
            for (live, device) in view.devices.iter_mut().zip(progress.devices) {
                live.moved_bytes = device.bytes;
                if running {
                    live.pre_copy_bytes = device.bytes;
                }
                if let Some(size) = device.data_size {
                    live.total = size;
                }
            }
        });
    }
}

impl EntryCaller {
    async fn moved_save(&self, state: SaveState) -> Result<(), BoxError> {
        let on_record = self.entry.on_record();
        let held = matches!(on_record, RecordedStep::Held { .. });
        if let JobRecord::Migrate { .. } = self.entry.fixed.job
            && let Some(step) = on_record.offer().on_move(state)
        {
            match step {
                // That it was to be committed may be on record, and then only this takes it back: without it a later life of
                // the agent would have the destination run what runs here.
                OfferStep::Begun => self.record_surely(RecordedStep::Begun).await,
                OfferStep::Committing if is_planted(self.folder(), "commit without a record") => {
                    self.entry.set_on_record(RecordedStep::Committing);
                }
                OfferStep::Committing => self.record(RecordedStep::Committing).await?,
                OfferStep::LettingGo => {
                    self.assert_told();
                    self.record(RecordedStep::LettingGo).await?;
                }
            }
        }
        match state {
            SaveState::Stopping => {
                let environment = &self.core.environment;
                self.entry.note_stopped(environment.unix_now(), Some(environment.executor.now()));
            }
            // Not before all of them were found to stand still: whoever reads it takes what they wrote for all there is.
            SaveState::Draining => {
                let now = self.core.environment.unix_now();
                self.entry.hand_over(|handover| handover.record.stopped = Some(now));
            }
            SaveState::Offered => {
                let now = self.core.environment.unix_now();
                self.entry.hand_over(|handover| handover.record.prepared = Some(now));
            }
            SaveState::Held => self.hold().await?,
            SaveState::CompletedStopped => self.record(RecordedStep::Stopped).await?,
            SaveState::Resuming { checkpoint: Validity::Inconsistent } => {
                self.record(RecordedStep::Running { inconsistent: true }).await?;
            }
            // Out of a hold that is on record. Without one, what a restart would do is the same: let the devices run.
            SaveState::Resuming { checkpoint: Validity::Consistent } if held => {
                self.record(RecordedStep::Running { inconsistent: false }).await?;
            }
            // Undone after a hold that is on record: not to be taken up as held.
            SaveState::Unwinding { .. } if held => self.record(RecordedStep::Begun).await?,
            SaveState::Admitted
            | SaveState::PreCopying
            | SaveState::AwaitingCutover
            | SaveState::Quiescing
            | SaveState::Parking
            | SaveState::Sealing
            | SaveState::Marking
            | SaveState::Resuming { .. }
            | SaveState::Unwinding { .. }
            | SaveState::Committing
            | SaveState::LettingGo
            | SaveState::Completed
            | SaveState::HandedOver
            | SaveState::Inconsistent
            | SaveState::Aborted { .. }
            | SaveState::Lost { .. } => {}
        }
        if let Some(phase) = save_phase(state) {
            let deadline = match phase {
                Phase::WaitingForCutover => Some(self.core.environment.unix_now().after(self.cutover_limit)),
                Phase::Held => self.entry.view().deadline,
                Phase::PreCopy if self.entry.is_manual() => {
                    Some(self.core.environment.unix_now().after(self.cutover_limit))
                }
                Phase::Prepared
                    if matches!(self.entry.fixed.job, JobRecord::Migrate { manual_commit: true, .. }) =>
                {
                    Some(self.core.environment.unix_now().after(self.hold_limit))
                }
                Phase::WaitingForStream
                | Phase::Preparing
                | Phase::PreCopy
                | Phase::Stopping
                | Phase::StopCopy
                | Phase::Sealing
                | Phase::Marking
                | Phase::Loading
                | Phase::Verifying
                | Phase::Resuming
                | Phase::Prepared
                | Phase::Committing
                | Phase::LettingGo
                | Phase::Unwinding
                | Phase::Done => None,
            };
            self.entry.change(|view| {
                view.phase = phase;
                view.deadline = deadline;
                view.cancellable = !state.is_past_no_return()
                    && !matches!(phase, Phase::Marking | Phase::Committing | Phase::Unwinding);
            });
        }
        Ok(())
    }

    async fn moved_restore(&self, state: RestoreState) -> Result<(), BoxError> {
        let on_record = self.entry.on_record();
        let arrives = matches!(self.entry.fixed.job, JobRecord::Arrive { .. });
        if arrives {
            self.moved_arrival(state, &on_record).await?;
        }
        match state {
            // From here on what was in the devices may be gone. Before, a restart leaves them alone.
            RestoreState::Entering => self.record(RecordedStep::Begun).await?,
            RestoreState::Held { .. }
            | RestoreState::Quiescing
            | RestoreState::Resuming
            | RestoreState::Resetting
            | RestoreState::Quarantined
                if arrives => {}
            RestoreState::Held { ready: false } => self.hold().await?,
            // Running needs the epoch of the state that runs, on record before the SET.
            RestoreState::Quiescing | RestoreState::Resuming
                if !matches!(on_record, RecordedStep::Running { .. }) =>
            {
                self.record_running().await?;
            }
            // A reset leads to RUNNING too: nothing but the journal tells it from a restored state that runs.
            RestoreState::Resetting if on_record != RecordedStep::Begun => {
                self.record_surely(RecordedStep::Begun).await;
            }
            // As with a reset, and what runs of the set is to be left alone.
            RestoreState::Quarantined if on_record != RecordedStep::Begun => {
                self.record_quarantined(RecordedStep::Begun).await?;
            }
            RestoreState::Admitted
            | RestoreState::Loading
            | RestoreState::Verifying
            | RestoreState::FixingUp
            | RestoreState::Held { ready: true }
            | RestoreState::AwaitingReady
            | RestoreState::Quiescing
            | RestoreState::Resuming
            | RestoreState::PartlyRunning
            | RestoreState::Unwinding
            | RestoreState::Resetting
            | RestoreState::Completed
            | RestoreState::Aborted { .. }
            | RestoreState::Quarantined => {}
        }
        if let Some(phase) = restore_phase(state, arrives) {
            self.entry.change(|view| {
                view.phase = phase;
                view.deadline = view.deadline.filter(|_| matches!(phase, Phase::Held | Phase::Prepared));
                view.cancellable =
                    matches!(phase, Phase::Loading | Phase::Verifying | Phase::Held | Phase::Prepared);
            });
        }
        Ok(())
    }

    /// What is particular to an arrival: the source relies on what is on record of it.
    async fn moved_arrival(&self, state: RestoreState, on_record: &RecordedStep) -> Result<(), BoxError> {
        let Some(step) = on_record.arrival(None).on_move(state) else {
            return match state {
                RestoreState::Quarantined => self.record_quarantined(on_record.clone()).await,
                // Taken up: the deadline is told already.
                RestoreState::Held { .. } => self.hold().await,
                RestoreState::Admitted
                | RestoreState::Entering
                | RestoreState::Loading
                | RestoreState::Verifying
                | RestoreState::FixingUp
                | RestoreState::AwaitingReady
                | RestoreState::Quiescing
                | RestoreState::Resuming
                | RestoreState::PartlyRunning
                | RestoreState::Unwinding
                | RestoreState::Resetting
                | RestoreState::Completed
                | RestoreState::Aborted { .. } => Ok(()),
            };
        };
        match step {
            ArrivalStep::Loading => {
                self.record_surely(RecordedStep::Begun).await;
                Ok(())
            }
            ArrivalStep::Prepared => {
                let now = self.core.environment.unix_now();
                self.entry.hand_over(|handover| handover.record.prepared = Some(now));
                self.hold().await
            }
            // Running needs the epoch of the state that runs, on record before the SET.
            ArrivalStep::Committing => self.record_running().await,
            // A reset leads to RUNNING too: nothing but the journal tells it from a restored state that runs.
            ArrivalStep::Reverting => {
                self.record_surely(RecordedStep::Reverting).await;
                Ok(())
            }
            // No move leads to an end.
            ArrivalStep::Over(_) => Ok(()),
        }
    }

    /// The hold is on record, with its deadline, before anybody is told of it.
    async fn hold(&self) -> Result<(), BoxError> {
        let view = self.entry.view();
        if matches!(view.phase, Phase::Held | Phase::Prepared) && view.deadline.is_some() {
            // Taken up: the deadline is told already.
            return Ok(());
        }
        let deadline = self.core.environment.unix_now().after(self.hold_limit);
        self.record(RecordedStep::Held {
            deadline,
            limit: Some(self.hold_limit),
            stopped_at: self.entry.stopped_at(),
        })
        .await?;
        self.entry.change(|view| view.deadline = Some(deadline));
        Ok(())
    }

    fn folder(&self) -> &Path {
        &self.core.config.node.state_dir
    }

    async fn record(&self, step: RecordedStep) -> Result<(), BoxError> {
        self.commit(step, Vec::new()).await
    }

    /// For what is done next only where it is on record, and is done whatever happens.
    async fn record_surely(&self, step: RecordedStep) {
        self.core.record_surely(&self.entry, step).await;
    }

    /// The source lets go only after the destination's word that it runs, or an admin's that it may.
    fn assert_told(&self) {
        let known = self.entry.view().handover.map(|handover| handover.record);
        let told = known.is_some_and(|known| {
            let decided = known.resolution.map(|resolution| !resolution.resume_here);
            decided.unwrap_or(known.verdict == Some(VerdictRecord::Committed))
        });
        assert!(told, "{} would let go of what nobody said to run elsewhere", self.entry.fixed.name);
    }

    /// Nothing runs under an epoch that is older than one that this agent has seen: what came in between, an administrator's
    /// word for one, ends this.
    fn check_newest(&self) -> Result<(), BoxError> {
        for device in &self.entry.fixed.devices {
            if self.core.registry.newest_epoch(&device.logical) > Some(device.epoch) {
                return Err(StaleEpoch(device.logical.clone(), device.epoch).into());
            }
        }
        Ok(())
    }

    async fn record_running(&self) -> Result<(), BoxError> {
        self.check_newest()?;
        self.entry.set_told_to_run();
        let changes = self.devices(|device, before| {
            let (logical, epoch) = (device.logical.clone(), device.epoch);
            self.core.back_to_life(DeviceRecord { logical, epoch, ..before })
        });
        self.commit(RecordedStep::Running { inconsistent: false }, changes).await
    }

    async fn record_quarantined(&self, step: RecordedStep) -> Result<(), BoxError> {
        // What is to run is on record already, and stays: by it a later life of the agent knows what it finds.
        let runs = matches!(self.entry.on_record(), RecordedStep::Running { .. });
        let changes = self.devices(|device, before| {
            let lives = if runs {
                let (logical, epoch) = (device.logical.clone(), device.epoch);
                self.core.back_to_life(DeviceRecord { logical, epoch, ..before })
            } else {
                before
            };
            DeviceRecord { quarantined: true, ..lives }
        });
        self.commit(step, changes).await
    }

    /// What becomes of the records of the operation's devices.
    fn devices(&self, now: impl Fn(&OperationDeviceRecord, DeviceRecord) -> DeviceRecord) -> Vec<Change> {
        let devices = self.entry.fixed.devices.iter();
        devices
            .filter_map(|device| {
                let before = self.core.registry.get(&device.device)?.view().record?;
                Some(Change::Device(device.device.clone(), now(device, before)))
            })
            .collect()
    }

    async fn commit(&self, step: RecordedStep, mut changes: Vec<Change>) -> Result<(), BoxError> {
        let _one_at_a_time = self.entry.recording.lock().await;
        changes.insert(0, Change::Operation(Box::new(self.entry.record(step.clone()))));
        let debts = self.core.stores.debts();
        let debt = debts.unrecorded(self.entry.fixed.checkpoint.as_ref());
        changes.extend(debt.clone());
        let committed = self.core.journal.commit(changes).await;
        // Also where it failed: what was to be written may be there all the same, and a later life of the agent goes by it.
        self.entry.set_on_record(step);
        committed?;
        debts.recorded(debt.as_slice());
        Ok(())
    }
}

/// Where a save is, for its caller; none at its end, which is told once it is on record.
fn save_phase(state: SaveState) -> Option<Phase> {
    Some(match state {
        SaveState::Admitted => Phase::WaitingForStream,
        SaveState::PreCopying => Phase::PreCopy,
        SaveState::AwaitingCutover => Phase::WaitingForCutover,
        SaveState::Quiescing | SaveState::Stopping => Phase::Stopping,
        SaveState::Draining | SaveState::Parking => Phase::StopCopy,
        SaveState::Sealing => Phase::Sealing,
        SaveState::Held => Phase::Held,
        SaveState::Marking => Phase::Marking,
        SaveState::Resuming { .. } => Phase::Resuming,
        SaveState::Offered => Phase::Prepared,
        SaveState::Committing => Phase::Committing,
        SaveState::LettingGo => Phase::LettingGo,
        SaveState::Unwinding { .. } => Phase::Unwinding,
        SaveState::Completed
        | SaveState::HandedOver
        | SaveState::CompletedStopped
        | SaveState::Inconsistent
        | SaveState::Aborted { .. }
        | SaveState::Lost { .. } => return None,
    })
}

/// Where a restore is, for its caller; none at its end, which is told once it is on record.
fn restore_phase(state: RestoreState, arrives: bool) -> Option<Phase> {
    Some(match state {
        RestoreState::Admitted => Phase::WaitingForStream,
        RestoreState::Entering | RestoreState::Loading => Phase::Loading,
        RestoreState::Verifying | RestoreState::FixingUp => Phase::Verifying,
        RestoreState::Held { .. } if arrives => Phase::Prepared,
        RestoreState::Held { .. } => Phase::Held,
        RestoreState::AwaitingReady
        | RestoreState::Quiescing
        | RestoreState::Resuming
        | RestoreState::PartlyRunning
            if arrives =>
        {
            Phase::Committing
        }
        RestoreState::AwaitingReady
        | RestoreState::Quiescing
        | RestoreState::Resuming
        | RestoreState::PartlyRunning => Phase::Resuming,
        RestoreState::Unwinding | RestoreState::Resetting => Phase::Unwinding,
        RestoreState::Completed | RestoreState::Aborted { .. } | RestoreState::Quarantined => return None,
    })
}
