//! What a device operation asks and is told, on behalf of its entry.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use vfio_checkpoint_device::operation::{BoxError, Caller, OperationStep, Progress};
use vfio_checkpoint_fsm::{RestoreState, SaveState, Validity};

use super::entry::{Entry, Phase};
use super::record::{OperationDeviceRecord, RecordedStep};
use crate::core::Core;
use crate::failpoint::reached;
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
    /// What the journal says of the operation: the phase that its caller sees says less.
    pub(super) on_record: Mutex<RecordedStep>,
}

/// Why a caller took its operation back.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct TakenBack(String);

impl Caller for EntryCaller {
    fn cutover(&self) -> BoxFuture<'_, ()> {
        async {
            match &self.stream {
                // The taker may say it on its stream as well.
                Some(stream) => tokio::select! {
                    () = self.entry.signals.cutover() => {}
                    () = stream.cutover() => {}
                },
                None => self.entry.signals.cutover().await,
            }
        }
        .boxed()
    }

    fn resume(&self) -> BoxFuture<'_, ()> {
        self.entry.signals.resume().boxed()
    }

    fn cancelled(&self) -> BoxFuture<'_, BoxError> {
        async {
            let said = async { BoxError::from(TakenBack(self.entry.signals.cancelled().await.to_string())) };
            match &self.stream {
                Some(stream) => tokio::select! {
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
        self.entry.change(|view| {
            view.rate_bytes_per_second = rate;
            view.predicted_downtime = progress.predicted_downtime.or(view.predicted_downtime);
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
        let held = matches!(self.on_record(), RecordedStep::Held { .. });
        match state {
            SaveState::Stopping => {
                let environment = &self.core.environment;
                self.entry.note_stopped(environment.unix_now(), Some(environment.executor.now()));
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
            | SaveState::Draining
            | SaveState::Parking
            | SaveState::Sealing
            | SaveState::Marking
            | SaveState::Resuming { .. }
            | SaveState::Unwinding { .. }
            | SaveState::Completed
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
                | Phase::Unwinding
                | Phase::Done => None,
            };
            self.entry.change(|view| {
                view.phase = phase;
                view.deadline = deadline;
                view.cancellable =
                    !state.is_past_no_return() && !matches!(phase, Phase::Marking | Phase::Unwinding);
            });
        }
        Ok(())
    }

    async fn moved_restore(&self, state: RestoreState) -> Result<(), BoxError> {
        let on_record = self.on_record();
        match state {
            // From here on what was in the devices may be gone. Before, a restart leaves them alone.
            RestoreState::Entering => self.record(RecordedStep::Begun).await?,
            RestoreState::Held { ready: false } => self.hold().await?,
            // Running needs the epoch of the state that runs, on record before the SET.
            RestoreState::Quiescing | RestoreState::Resuming
                if !matches!(on_record, RecordedStep::Running { .. }) =>
            {
                self.record_running().await?;
            }
            // A reset leads to RUNNING too: nothing but the journal tells it from a restored state that runs.
            RestoreState::Resetting if on_record != RecordedStep::Begun => {
                self.record(RecordedStep::Begun).await?;
            }
            // As with a reset, and what runs of the set is to be left alone.
            RestoreState::Quarantined if on_record != RecordedStep::Begun => {
                self.record_quarantined().await?;
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
        if let Some(phase) = restore_phase(state) {
            self.entry.change(|view| {
                view.phase = phase;
                view.deadline = view.deadline.filter(|_| phase == Phase::Held);
                view.cancellable = matches!(phase, Phase::Loading | Phase::Verifying | Phase::Held);
            });
        }
        Ok(())
    }

    /// The hold is on record, with its deadline, before anybody is told of it.
    async fn hold(&self) -> Result<(), BoxError> {
        let view = self.entry.view();
        if view.phase == Phase::Held && view.deadline.is_some() {
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

    fn on_record(&self) -> RecordedStep {
        self.on_record.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn record(&self, step: RecordedStep) -> Result<(), BoxError> {
        self.commit(step, Vec::new()).await
    }

    async fn record_running(&self) -> Result<(), BoxError> {
        let changes = self.devices(|device, before| {
            let (logical, epoch) = (device.logical.clone(), device.epoch);
            self.core.back_to_life(DeviceRecord { logical, epoch, ..before })
        });
        self.commit(RecordedStep::Running { inconsistent: false }, changes).await
    }

    async fn record_quarantined(&self) -> Result<(), BoxError> {
        let changes = self.devices(|_, before| DeviceRecord { quarantined: true, ..before });
        self.commit(RecordedStep::Begun, changes).await
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
        changes.insert(0, Change::Operation(Box::new(self.entry.record(step.clone()))));
        let debts = self.core.stores.debts();
        let debt = debts.unrecorded(self.entry.fixed.checkpoint.as_ref());
        changes.extend(debt.clone());
        self.core.journal.commit(changes).await?;
        debts.recorded(debt.as_slice());
        *self.on_record.lock().unwrap_or_else(PoisonError::into_inner) = step;
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
        SaveState::Unwinding { .. } => Phase::Unwinding,
        SaveState::Completed
        | SaveState::CompletedStopped
        | SaveState::Inconsistent
        | SaveState::Aborted { .. }
        | SaveState::Lost { .. } => return None,
    })
}

/// Where a restore is, for its caller; none at its end, which is told once it is on record.
fn restore_phase(state: RestoreState) -> Option<Phase> {
    Some(match state {
        RestoreState::Admitted => Phase::WaitingForStream,
        RestoreState::Entering | RestoreState::Loading => Phase::Loading,
        RestoreState::Verifying | RestoreState::FixingUp => Phase::Verifying,
        RestoreState::Held { .. } => Phase::Held,
        RestoreState::AwaitingReady
        | RestoreState::Quiescing
        | RestoreState::Resuming
        | RestoreState::PartlyRunning => Phase::Resuming,
        RestoreState::Unwinding | RestoreState::Resetting => Phase::Unwinding,
        RestoreState::Completed | RestoreState::Aborted { .. } | RestoreState::Quarantined => return None,
    })
}
