//! What becomes of operations that were under way when the agent ended.
//!
//! ```text
//!   journal says    devices kept open           not kept
//!   Admitted        undone: RUNNING             reset by the last close: STATE_LOST
//!   Begun           undone: RUNNING (a save),   STATE_LOST
//!                   reset (a restore)
//!   Held            the hold goes on            STATE_LOST
//!   Running         they go on to RUNNING       STATE_LOST
//!   Stopped         nothing left to do          STATE_LOST, and the checkpoint stands
//!   of a migration:
//!   Committing      the destination is asked on the same; if it refused: STATE_LOST
//!   LettingGo       reset                       the same
//!   of an arrival:
//!   Held            it waits on for the commit  refused
//!     Ready owed    reset: refused              refused
//!   Running         they go on to RUNNING       lost
//!   Reverting       reset: refused              refused
//! ```
//! An operation of which a kept device does not answer yet is not taken up, and its devices stay leased, until it answers or
//! is known to be lost: what became of its state nobody can tell before.
//! Where only some devices of a set were kept, those are brought back alone, and the operation ends as the others did: one
//! that was reset for it is somebody new. A device that is not open, or not configured any more, may be in the holder's hands
//! as it was: of an arrival it counts as one that nobody can reset, and of what was handed over it is on record as good for
//! nothing but a reset.

mod handed_over;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tracing::Instrument as _;
use vfio_checkpoint_device::driver::Driver;
use vfio_checkpoint_device::operation::{self, LoadedBefore, RecordedRestore, RecordedSave};
use vfio_checkpoint_device::{Call, VerifiedSeal};
use vfio_checkpoint_fsm::{
    AfterLoad, AfterSave, Cutover, Outcome, RestorePlan, Role, SavePlan, SaveState, Validity,
};
use vfio_checkpoint_proto::ids::DeviceName;

use super::caller::EntryCaller;
use super::end::{self, End, Why};
use super::entry::Entry;
use super::record::{AfterRecord, JobRecord, OccupantRecord, OperationDeviceRecord, RecordedStep};
use super::run::{finish, lanes, span};
use crate::core::Core;
use crate::failpoint::reached;
use crate::registry::opening::{Arrival, Arrived};
use crate::registry::{Lease, Slot};
use crate::transfer::LeftBehind;

/// An operation that was under way, as the journal has it.
#[derive(Debug)]
pub struct Unfinished {
    /// The operation.
    pub entry: Arc<Entry>,
    /// How far it was.
    pub step: RecordedStep,
}

impl Core {
    /// Takes an operation up. `arriving` says how each device comes to be open. Where it has to wait for its caller, or for
    /// a device that is late, it goes on in a task; else it is over when this returns.
    pub async fn take_up(self: &Arc<Self>, unfinished: Unfinished, arriving: &BTreeMap<DeviceName, Arrival>) {
        let Unfinished { entry, step } = unfinished;
        // Its source does not wait for it, and did not hear that all is there.
        let step = step.until_ready(entry.owes_ready());
        let slots =
            entry.device_names().filter_map(|name| self.registry.get(name).cloned()).collect::<Vec<_>>();
        let lease = match self.registry.lease(slots, &entry.fixed.name) {
            Ok(lease) => lease,
            Err(leased) => {
                // Two records claim one device, which no run of this agent writes.
                tracing::error!(operation = %entry.fixed.name, ?leased, "not taken up: its devices are claimed twice");
                return;
            }
        };
        let arrivals: Vec<Option<Arrival>> =
            entry.device_names().map(|name| arriving.get(name).cloned()).collect();
        let is_late = arrivals.iter().flatten().any(|arrival| arrival.peek().is_none());
        let core = Arc::clone(self);
        if is_late {
            let span = span(self, &entry);
            tracing::warn!(operation = %entry.fixed.name, ?step, "not taken up before a device of it answers");
            entry.signals.set_waits_for_device(true);
            self.tasks.spawn(async move {
                let arrived = arrived(arrivals).await;
                entry.signals.set_waits_for_device(false);
                core.go_on(entry, lease, step, &arrived).instrument(span).await;
            });
            return;
        }
        let arrived = arrived(arrivals).await;
        let waits = matches!(step, RecordedStep::Held { .. });
        // Whether they were kept or not: it is the destination that is waited for.
        let asks = step == RecordedStep::Committing;
        let span = span(self, &entry);
        let is_kept = are_kept(&core.for_it(&entry, &step, &arrived));
        let work = async move { core.go_on(entry, lease, step, &arrived).await }.instrument(span);
        if is_kept && waits || asks {
            self.tasks.spawn(work);
        } else {
            work.await;
        }
    }

    /// How each device of the operation is there for it.
    fn for_it(&self, entry: &Entry, step: &RecordedStep, arrived: &[Arrived]) -> Vec<There> {
        let devices = entry.fixed.devices.iter().zip(arrived);
        devices
            .map(|(device, how)| {
                let name = device.device.clone();
                let slot = self.registry.get(&name);
                let as_it_was = slot.is_some_and(|slot| is_same(slot, device, entry.fixed.job, step));
                let how = match (slot, how) {
                    (None, _) => Found::NotConfigured,
                    (Some(_), Arrived::Not) => Found::NotOpen,
                    (Some(_), Arrived::Adopted) if as_it_was => Found::Kept,
                    (Some(_), Arrived::Adopted) => Found::KeptSince,
                    (Some(_), Arrived::Opened) => Found::Opened,
                };
                There { name, slot: slot.cloned(), how }
            })
            .collect()
    }

    async fn go_on(
        self: Arc<Self>,
        entry: Arc<Entry>,
        lease: Lease,
        step: RecordedStep,
        arrived: &[Arrived],
    ) {
        let there = self.for_it(&entry, &step, arrived);
        let kept = are_kept(&there);
        tracing::warn!(?step, kept, "taken up after the agent ended");
        reached(format_args!("take-up begins"));
        let decided = matches!(step, RecordedStep::Committing | RecordedStep::LettingGo);
        let ended = if kept {
            adopted(&self, &entry, &lease, step).await
        } else if decided {
            handed_over::in_part(&self, &entry, &step, &there).await
        } else {
            not_kept(&self, &entry, &step, &there).await
        };
        finish(&self, &entry, lease, ended).await;
    }
}

/// How a device of an operation is there for it.
#[derive(Debug)]
struct There {
    name: DeviceName,
    slot: Option<Arc<Slot>>,
    how: Found,
}

/// What became of a device while the agent was away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    /// It is as the operation had it.
    Kept,
    /// It was kept, and what is on record of it is not what the operation had: as a rule it was reset since, by a start of
    /// the agent that did not come to its end.
    KeptSince,
    /// It was opened anew, and so reset.
    Opened,
    /// It could not be opened. The holder may have it still, as it was.
    NotOpen,
    /// Nobody knows it any more. Nor can it be said that it does not run: the holder may have it.
    NotConfigured,
}

/// Whether an operation has all of its devices as it had them.
fn are_kept(there: &[There]) -> bool {
    there.iter().all(|device| device.how == Found::Kept)
}

async fn arrived(arrivals: Vec<Option<Arrival>>) -> Vec<Arrived> {
    let each = arrivals.into_iter().map(|arrival| async move {
        match arrival {
            Some(arrival) => arrival.await,
            // It is not configured any more.
            None => Arrived::Not,
        }
    });
    join_all(each).await
}

/// Whether what lives in a device is what the operation at `step` had there. A device that is opened gets a new logical
/// device.
fn is_same(slot: &Slot, device: &OperationDeviceRecord, job: JobRecord, step: &RecordedStep) -> bool {
    let Some(record) = slot.view().record else { return false };
    let lives = OccupantRecord { logical: record.logical, epoch: record.epoch };
    match (job, step) {
        (JobRecord::Save { .. }, _)
        | (
            JobRecord::Migrate { .. },
            RecordedStep::Admitted
            | RecordedStep::Begun
            | RecordedStep::Held { .. }
            | RecordedStep::Running { .. }
            | RecordedStep::Stopped
            | RecordedStep::Committing
            | RecordedStep::Reverting
            | RecordedStep::Ended(_),
        )
        | (JobRecord::Restore { .. } | JobRecord::Arrive { .. }, RecordedStep::Running { .. }) => {
            lives == OccupantRecord { logical: device.logical.clone(), epoch: device.epoch }
        }
        // Nothing of the restored state runs, so on record is still what lived there before.
        (
            JobRecord::Restore { .. } | JobRecord::Arrive { .. },
            RecordedStep::Admitted | RecordedStep::Held { .. },
        ) => device.before.as_ref().is_none_or(|before| *before == lives),
        // It is reset, whatever it has.
        (JobRecord::Migrate { .. }, RecordedStep::LettingGo)
        | (
            JobRecord::Restore { .. } | JobRecord::Arrive { .. },
            RecordedStep::Begun
            | RecordedStep::Stopped
            | RecordedStep::Committing
            | RecordedStep::LettingGo
            | RecordedStep::Reverting
            | RecordedStep::Ended(_),
        ) => true,
    }
}

async fn adopted(core: &Arc<Core>, entry: &Arc<Entry>, lease: &Lease, step: RecordedStep) -> End {
    let Some(lanes) = lanes(lease) else { return end::not_open() };
    let now = core.environment.unix_now();
    let remaining = step.hold_left(now);
    entry.held_on(now, remaining);
    let caller = EntryCaller {
        core: Arc::clone(core),
        entry: Arc::clone(entry),
        hold_limit: remaining,
        cutover_limit: Duration::ZERO,
        stream: None,
        handover_cost: Duration::ZERO,
    };
    let checkpoint = match entry.fixed.job {
        JobRecord::Save { .. } => entry.fixed.checkpoint.clone(),
        // It takes the checkpoint, and has nothing to say of it.
        JobRecord::Restore { .. } | JobRecord::Migrate { .. } | JobRecord::Arrive { .. } => None,
    };
    let mut left = LeftBehind { core: Arc::clone(core), checkpoint };
    match entry.fixed.job {
        JobRecord::Save { pre_copy, barrier, after, .. } => {
            let after = match after {
                AfterRecord::Resume => AfterSave::Resume,
                AfterRecord::Hold => AfterSave::Hold,
                AfterRecord::StayStopped => AfterSave::StayStopped,
            };
            let plan = SavePlan { pre_copy, barrier, cutover: Cutover::Auto, after };
            let recorded = match step {
                RecordedStep::Admitted | RecordedStep::Begun => RecordedSave::Unsealed,
                RecordedStep::Held { .. } => RecordedSave::Held { remaining },
                RecordedStep::Running { inconsistent } => RecordedSave::Resuming {
                    checkpoint: if inconsistent { Validity::Inconsistent } else { Validity::Consistent },
                },
                RecordedStep::Stopped
                | RecordedStep::Committing
                | RecordedStep::LettingGo
                | RecordedStep::Reverting
                | RecordedStep::Ended(_) => RecordedSave::Stopped,
            };
            let ended = operation::take_up_save(&lanes, plan, recorded, &caller, &mut left).await;
            match ended {
                Ok(SaveState::Completed | SaveState::CompletedStopped) => end::sealed_save(entry),
                Ok(state) => end::unexpected(state),
                Err(error) => end::failed(entry, lease, &error),
            }
        }
        JobRecord::Migrate { pre_copy, barrier, .. } => {
            let plan = SavePlan { pre_copy, barrier, cutover: Cutover::Auto, after: AfterSave::HandOver };
            handed_over::adopted(core, entry, lease, &lanes, plan, &caller, &step).await
        }
        JobRecord::Restore { .. } | JobRecord::Arrive { .. } if step == RecordedStep::Admitted => {
            end::untouched()
        }
        JobRecord::Restore { barrier, .. } | JobRecord::Arrive { barrier, .. } => {
            let hold = match entry.fixed.job {
                JobRecord::Restore { hold, .. } => hold,
                JobRecord::Save { .. } | JobRecord::Migrate { .. } | JobRecord::Arrive { .. } => true,
            };
            let plan = RestorePlan { barrier, after: if hold { AfterLoad::Hold } else { AfterLoad::Run } };
            let seals: Option<Vec<_>> = entry.fixed.devices.iter().map(|device| device.seal).collect();
            let devices = seals.map(|seals| {
                let loaded = |seal| LoadedBefore { seal: VerifiedSeal::journaled(seal), rearm: None };
                seals.into_iter().map(loaded).collect::<Vec<_>>()
            });
            let recorded = match (step, devices) {
                (RecordedStep::Held { .. }, Some(devices)) => RecordedRestore::Held { remaining, devices },
                (RecordedStep::Running { .. }, Some(devices)) => RecordedRestore::Running { devices },
                (
                    RecordedStep::Admitted
                    | RecordedStep::Begun
                    | RecordedStep::Held { .. }
                    | RecordedStep::Running { .. }
                    | RecordedStep::Stopped
                    | RecordedStep::Committing
                    | RecordedStep::LettingGo
                    | RecordedStep::Reverting
                    | RecordedStep::Ended(_),
                    _,
                ) => RecordedRestore::Unloaded,
            };
            let terms_ready = core.config.defaults.hold_timeout;
            let ended =
                operation::take_up_restore(&lanes, plan, recorded, terms_ready, &caller, &mut left).await;
            end::of_restore(entry, lease, ended)
        }
    }
}

/// Brings back what was kept of a set, alone, and says what became of the rest.
async fn not_kept(core: &Arc<Core>, entry: &Arc<Entry>, step: &RecordedStep, there: &[There]) -> End {
    let role = match (entry.fixed.job, step) {
        // Nothing of the restore had begun: what is in the devices is their own.
        (JobRecord::Save { .. } | JobRecord::Migrate { .. }, _)
        | (JobRecord::Restore { .. } | JobRecord::Arrive { .. }, RecordedStep::Admitted) => Role::Source,
        (
            JobRecord::Restore { .. } | JobRecord::Arrive { .. },
            RecordedStep::Begun
            | RecordedStep::Held { .. }
            | RecordedStep::Running { .. }
            | RecordedStep::Stopped
            | RecordedStep::Committing
            | RecordedStep::LettingGo
            | RecordedStep::Reverting
            | RecordedStep::Ended(_),
        ) => Role::Destination,
    };
    // Of an arrival that is given up nothing runs on, also not what had begun to.
    let is_given_up = matches!(entry.fixed.job, JobRecord::Arrive { .. }) && role == Role::Destination;
    // A device that was reset runs, too, and nothing tells it from one that was not touched yet. But what was quarantined is
    // left alone: of it somebody decides.
    let is_undone =
        matches!(entry.fixed.job, JobRecord::Restore { .. }) && matches!(step, RecordedStep::Begun);
    let is_quarantined = |slot: &Arc<Slot>| slot.view().record.is_some_and(|record| record.quarantined);
    let (mut lost, mut reset, mut quarantined) = (Vec::new(), Vec::new(), Vec::new());
    for There { name, slot, how } in there {
        let why = match how {
            // It stays stopped as was asked for: its checkpoint may run elsewhere.
            Found::Kept if *step == RecordedStep::Stopped => continue,
            Found::Kept => {
                let undone = is_undone && !slot.as_ref().is_some_and(is_quarantined);
                match bring_back(slot.as_ref(), role, is_given_up || undone).await {
                    Some(Outcome::Preserved) => {}
                    Some(Outcome::StateLost) => reset.push(name.clone()),
                    None => quarantined.push(name.clone()),
                }
                continue;
            }
            Found::KeptSince | Found::Opened if slot.as_ref().is_some_and(|slot| slot.sim().is_some()) => {
                Why::Simulated
            }
            Found::KeptSince | Found::Opened if core.keeper.is_none() => Why::NoHolder,
            Found::KeptSince | Found::Opened => Why::NotKept,
            Found::NotOpen => Why::NotOpen,
            Found::NotConfigured => Why::NotConfigured,
        };
        lost.push((name.clone(), why));
        let resisted = match how {
            // Its record may be behind what is in it: what is told of the arrival must hold all the same.
            Found::KeptSince => is_given_up && bring_back(slot.as_ref(), role, true).await.is_none(),
            Found::Kept | Found::Opened => false,
            // Nobody can say that it does not run.
            Found::NotOpen | Found::NotConfigured => is_given_up,
        };
        if resisted {
            quarantined.push(name.clone());
        } else if matches!(how, Found::KeptSince | Found::Opened) {
            reset.push(name.clone());
        }
    }
    let end = end::not_kept(entry, lost, reset, quarantined, step);
    if is_given_up { end.of_all() } else { end }
}

/// Brings a device back that was kept, or resets it, and says what became of what it carried. None where it resists.
async fn bring_back(slot: Option<&Arc<Slot>>, role: Role, reset: bool) -> Option<Outcome> {
    let lane = slot?.lane()?;
    let back = if reset {
        let reset = |driver: &mut Driver| driver.reset().map(|()| Outcome::StateLost);
        lane.start(Call::Reset, reset).finished().await
    } else {
        lane.start(Call::GetState, move |driver| driver.recover_left_over(role)).finished().await
    };
    back.ok()?.ok()
}
