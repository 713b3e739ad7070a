//! Taking an operation up that an earlier life of the process was at.
//!
//! ```text
//!   journal: where it stood --+
//!                             +--> adopt each device --> the same machine, in the middle --> the same end
//!   fds that were kept open --+
//! ```
//! Streams never survive the process, so an operation that was still copying is undone. One that had done all its
//! copying goes on.
//!
//! # Invariants
//! - Every take-up ends, as every operation does; the machine is the same.
//! - No device is left stopped, except in a hold that goes on or where that was asked for.
//! - A device runs restored state only with a seal that was verified and journaled before.
//!
//! # Failure paths
//! A device that is not where the journal says fails the operation, from the state that it is taken up in. The rest of
//! the set is taken up all the same, so that it can be brought back or reset.

use std::time::Duration;

use vfio_checkpoint_fsm::{
    AfterLoad, AfterSave, Cutover, Fate, RestoreCommand, RestoreEvent, RestorePlan, RestoreState,
    RestoreStep, SaveCommand, SaveEvent, SavePlan, SaveRequest, SaveState, SaveStep, State, Step, Validity,
};

use super::error::{Cause, OperationError};
use super::restore::{Fed, Hold as RestoreHold, RestoreRun};
use super::save::{Hold as SaveHold, SaveRun};
use super::set::Noted;
use super::{Caller, Owner, PrecopyPolicy, RestoreReport, RestoreTerms, SaveTerms, StateSink, Word};
use crate::driver::{Driver, Starting, Waking};
use crate::{Call, DeviceError, DeviceLane, Rearm, VerifiedSeal};

/// Where a save stood, by its journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecordedSave {
    /// Before its seal: it is undone.
    Unsealed,
    /// It was being undone already, and the checkpoint had this fate.
    Unwinding {
        /// What becomes of the checkpoint.
        checkpoint: Fate,
    },
    /// Sealed and held: the hold goes on.
    Held {
        /// How long the devices wait for Resume from now on.
        remaining: Duration,
    },
    /// The hold had expired: the checkpoint is marked, then the devices run.
    Marking,
    /// The devices were on their way back to RUNNING: they go on.
    Resuming {
        /// What the checkpoint is worth.
        checkpoint: Validity,
    },
    /// Sealed, and the devices stay stopped: nothing is left to do.
    Stopped,
    /// The other side may have been told to run the devices: it is asked on.
    Committing,
    /// The other side runs them: they are reset here.
    LettingGo,
}

impl RecordedSave {
    /// What is left to do of a save whose last recorded move was to `state`, where a hold has `remaining` left. `None`
    /// where it was over. After [`Lost`](SaveState::Lost) the devices are to be left alone: which of them were
    /// quarantined went with the process.
    pub fn from_last(state: SaveState, remaining: Duration) -> Option<Self> {
        Some(match state {
            // Sealing may have come to its end. What was not recorded is undone, and discarded.
            SaveState::Admitted
            | SaveState::PreCopying
            | SaveState::AwaitingCutover
            | SaveState::Quiescing
            | SaveState::Stopping
            | SaveState::Draining
            | SaveState::Parking
            | SaveState::Sealing
            | SaveState::Offered => Self::Unsealed,
            SaveState::Held => Self::Held { remaining },
            SaveState::Marking => Self::Marking,
            SaveState::Resuming { checkpoint } => Self::Resuming { checkpoint },
            SaveState::Unwinding { checkpoint } => Self::Unwinding { checkpoint },
            SaveState::CompletedStopped => Self::Stopped,
            SaveState::Committing => Self::Committing,
            SaveState::LettingGo => Self::LettingGo,
            SaveState::Completed
            | SaveState::HandedOver
            | SaveState::Inconsistent
            | SaveState::Aborted { .. }
            | SaveState::Lost { .. } => return None,
        })
    }
}

/// A device that an earlier life of the process loaded.
#[derive(Debug)]
pub struct LoadedBefore {
    /// The seal that was verified over what was written to it, and journaled.
    pub seal: VerifiedSeal,
    /// The interrupts that must be armed again.
    pub rearm: Option<Rearm>,
}

/// Where a restore stood, by its journal. `devices` are in the order of the set.
#[derive(Debug)]
pub enum RecordedRestore {
    /// Before all was loaded, verified and fixed up, or being undone already: every device is reset.
    Unloaded,
    /// Loaded and held: the hold goes on.
    Held {
        /// How long the devices wait for Resume from now on.
        remaining: Duration,
        /// What was loaded.
        devices: Vec<LoadedBefore>,
    },
    /// Loaded, and the owner was to say Ready: it is asked again.
    AwaitingReady {
        /// What was loaded.
        devices: Vec<LoadedBefore>,
    },
    /// The owner was ready, and the devices were on their way to RUNNING: they go on.
    Running {
        /// What was loaded.
        devices: Vec<LoadedBefore>,
    },
}

impl RecordedRestore {
    /// What is left to do of a restore whose last recorded move was to `state`, where a hold has `remaining` left and
    /// `devices` were loaded. `None` where it was over, or nothing had been touched. After
    /// [`Quarantined`](RestoreState::Quarantined) the devices are to be left alone.
    pub fn from_last(state: RestoreState, remaining: Duration, devices: Vec<LoadedBefore>) -> Option<Self> {
        Some(match state {
            RestoreState::Entering
            | RestoreState::Loading
            | RestoreState::Verifying
            | RestoreState::FixingUp
            | RestoreState::Unwinding
            | RestoreState::Resetting => Self::Unloaded,
            RestoreState::Held { .. } => Self::Held { remaining, devices },
            RestoreState::AwaitingReady => Self::AwaitingReady { devices },
            RestoreState::Quiescing | RestoreState::Resuming | RestoreState::PartlyRunning => {
                Self::Running { devices }
            }
            RestoreState::Admitted
            | RestoreState::Completed
            | RestoreState::Aborted { .. }
            | RestoreState::Quarantined => return None,
        })
    }
}

/// Takes a save up on devices whose fds were kept open, each behind a driver that has done nothing yet.
///
/// Returns the end that is a success; every other end is an error, as of [`save`](super::save).
pub async fn take_up_save<S: StateSink>(
    lanes: &[DeviceLane],
    plan: SavePlan,
    recorded: RecordedSave,
    caller: &dyn Caller,
    sink: &mut S,
) -> Result<SaveState, OperationError> {
    let request = SaveRequest { pre_copy: plan.pre_copy, cutover: Cutover::Auto, after: AfterSave::Resume };
    let hold_limit = match recorded {
        RecordedSave::Held { remaining } => remaining,
        RecordedSave::Unsealed
        | RecordedSave::Unwinding { .. }
        | RecordedSave::Marking
        | RecordedSave::Resuming { .. }
        | RecordedSave::Stopped
        | RecordedSave::Committing
        | RecordedSave::LettingGo => Duration::ZERO,
    };
    // Copying is over for good: of these terms only the hold counts.
    let policy = PrecopyPolicy::default();
    let terms = SaveTerms { hold_limit, ..SaveTerms::automatic(request.pre_copy, request.after, policy) };
    let mut run = SaveRun::new(lanes, plan, terms, caller, sink);
    let first = match recorded {
        RecordedSave::Stopped => return Ok(SaveState::CompletedStopped),
        RecordedSave::Unsealed => unwind(&mut run, Fate::Unsealed).await,
        RecordedSave::Unwinding { checkpoint } => unwind(&mut run, checkpoint).await,
        RecordedSave::Held { .. } => {
            let adopted = adopt_stopped(&mut run).await;
            moved_or_failed(plan, adopted, SaveState::Held, SaveCommand::AwaitResume)
        }
        RecordedSave::Marking => {
            let adopted = adopt_stopped(&mut run).await;
            moved_or_failed(plan, adopted, SaveState::Marking, SaveCommand::MarkInconsistent)
        }
        RecordedSave::Resuming { checkpoint } => {
            let adopted = adopt_resuming(&mut run).await;
            moved_or_failed(plan, adopted, SaveState::Resuming { checkpoint }, SaveCommand::Resume)
        }
        RecordedSave::Committing => {
            // Whoever moved a device since may have let it run, so nobody else must be told to: what the other side was
            // told before stands, and no more is said.
            let moved = adopt_stopped(&mut run).await.is_err();
            run.word = if moved { Word::Withdraw } else { Word::Commit };
            run.may_run_there = true;
            Step::Moved { to: SaveState::Committing, command: SaveCommand::Commit }
        }
        RecordedSave::LettingGo => Step::Moved { to: SaveState::LettingGo, command: SaveCommand::LetGo },
    };
    run.finish(first).await
}

fn moved_or_failed(
    plan: SavePlan,
    adopted: Result<(), Noted>,
    to: SaveState,
    command: SaveCommand,
) -> SaveStep {
    match adopted {
        Ok(()) => Step::Moved { to, command },
        Err(Noted) => to.on(plan, SaveEvent::Failed),
    }
}

async fn unwind<S: StateSink>(run: &mut SaveRun<'_, S>, checkpoint: Fate) -> SaveStep {
    run.set.unwound.blame(Cause::Interrupted);
    let peers = run.peers();
    for index in 0..run.set.len() {
        let adopted = run.set.attempt(index, Call::GetState, move |driver| driver.adopt_source(peers));
        // A device that does not say where it is is still engaged: the fall back tries.
        let _ = adopted.await;
    }
    Step::Moved { to: SaveState::Unwinding { checkpoint }, command: SaveCommand::FallBack }
}

async fn adopt_stopped<S: StateSink>(run: &mut SaveRun<'_, S>) -> Result<(), Noted> {
    let peers = run.peers();
    let mut all = Ok(());
    for index in 0..run.set.len() {
        let adopted = run.set.attempt(index, Call::GetState, move |driver| driver.adopt_stopped(peers));
        match adopted.await {
            Ok(stopped) => run.set.hold(index, SaveHold::Stopped(stopped)),
            Err(Noted) => all = Err(Noted),
        }
    }
    all
}

async fn adopt_resuming<S: StateSink>(run: &mut SaveRun<'_, S>) -> Result<(), Noted> {
    let peers = run.peers();
    let mut all = Ok(());
    for index in 0..run.set.len() {
        let adopted = run.set.attempt(index, Call::GetState, move |driver| driver.adopt_resuming(peers));
        match adopted.await {
            Ok(Waking::Stopped(stopped)) => run.set.hold(index, SaveHold::Stopped(stopped)),
            Ok(Waking::Quiesced(stopped)) => run.set.hold(index, SaveHold::Waking(stopped)),
            Ok(Waking::Running) => {}
            Err(Noted) => all = Err(Noted),
        }
    }
    all
}

/// Takes a restore up on devices whose fds were kept open, each behind a driver that has done nothing yet. `owner` is
/// asked whether it is ready, for at most `ready_limit`, unless it had been before.
pub async fn take_up_restore<O: Owner>(
    lanes: &[DeviceLane],
    plan: RestorePlan,
    recorded: RecordedRestore,
    ready_limit: Duration,
    caller: &dyn Caller,
    owner: &mut O,
) -> Result<RestoreReport, OperationError> {
    let hold_limit = match &recorded {
        RecordedRestore::Held { remaining, .. } => *remaining,
        RecordedRestore::Unloaded
        | RecordedRestore::AwaitingReady { .. }
        | RecordedRestore::Running { .. } => Duration::ZERO,
    };
    let terms = RestoreTerms { after: AfterLoad::Hold, hold_limit, ready_limit };
    let mut fed = Fed(owner);
    let mut run = RestoreRun::new(lanes, plan, terms, caller, &mut fed);
    let first = match recorded {
        RecordedRestore::Unloaded => {
            run.set.unwound.blame(Cause::Interrupted);
            adopt_the_rest(&mut run, 0).await;
            Step::Moved { to: RestoreState::Resetting, command: RestoreCommand::ResetAll }
        }
        RecordedRestore::Held { devices, .. } => {
            match adopt_loaded(&mut run, devices).await {
                // Whether the owner had been ready died with the process; it is asked again.
                Ok(()) => Step::Moved {
                    to: RestoreState::Held { ready: false },
                    command: RestoreCommand::AwaitResume,
                },
                Err(Noted) => RestoreState::Held { ready: false }.on(plan, RestoreEvent::Failed),
            }
        }
        RecordedRestore::AwaitingReady { devices } => match adopt_loaded(&mut run, devices).await {
            Ok(()) => Step::Moved { to: RestoreState::AwaitingReady, command: RestoreCommand::AwaitReady },
            Err(Noted) => RestoreState::AwaitingReady.on(plan, RestoreEvent::Failed),
        },
        RecordedRestore::Running { devices } => adopt_starting(&mut run, plan, devices).await,
    };
    run.finish(first).await
}

/// Engages the devices from `first` on, for a reset.
async fn adopt_the_rest<O: Owner>(run: &mut RestoreRun<'_, Fed<'_, O>>, first: usize) {
    for index in first..run.set.len() {
        let _ = run.set.attempt(index, Call::GetState, Driver::adopt_destination).await;
    }
}

/// A journal that names other devices than there are is worth nothing: all are reset.
async fn same_number<O: Owner>(
    run: &mut RestoreRun<'_, Fed<'_, O>>,
    devices: &[LoadedBefore],
) -> Result<(), Noted> {
    if devices.len() == run.set.len() {
        return Ok(());
    }
    let reason = format!("{} devices are on record, but the set has {}", devices.len(), run.set.len());
    run.set.unwound.blame(Cause::Other(reason.into()));
    adopt_the_rest(run, 0).await;
    Err(Noted)
}

async fn adopt_loaded<O: Owner>(
    run: &mut RestoreRun<'_, Fed<'_, O>>,
    devices: Vec<LoadedBefore>,
) -> Result<(), Noted> {
    same_number(run, &devices).await?;
    let mut all = Ok(());
    for (index, LoadedBefore { seal, rearm }) in devices.into_iter().enumerate() {
        let adopted = run.set.attempt(index, Call::GetState, move |driver| {
            driver.adopt_loaded(&seal, rearm).map(|fixed| (fixed, seal))
        });
        match adopted.await {
            Ok((fixed, seal)) => {
                run.loaded_before(index, seal);
                run.set.hold(index, RestoreHold::FixedUp(fixed));
            }
            Err(Noted) => all = Err(Noted),
        }
    }
    all
}

/// Where a device runs already there is no way back, and the others follow or the set is quarantined. Where none does,
/// the set goes on from the barrier, or is reset.
async fn adopt_starting<O: Owner>(
    run: &mut RestoreRun<'_, Fed<'_, O>>,
    plan: RestorePlan,
    devices: Vec<LoadedBefore>,
) -> RestoreStep {
    let mut all = same_number(run, &devices).await;
    let (mut running, mut loaded) = (false, None);
    if all.is_ok() {
        for (index, LoadedBefore { seal, .. }) in devices.into_iter().enumerate() {
            let adopted = run.set.attempt(index, Call::GetState, move |driver| {
                driver.adopt_starting(&seal).map(|starting| (starting, seal))
            });
            let Ok((starting, seal)) = adopted.await else {
                all = Err(Noted);
                continue;
            };
            run.loaded_before(index, seal);
            let hold = match starting {
                Starting::Loaded(armed) => {
                    loaded = Some(index);
                    RestoreHold::Armed(armed)
                }
                Starting::Quiesced(armed) => RestoreHold::Quiesced(armed),
                Starting::Running => {
                    running = true;
                    RestoreHold::Running
                }
            };
            run.set.hold(index, hold);
        }
    }
    if let (true, Some(index)) = (plan.barrier && running, loaded) {
        // Nothing runs before all are past the barrier: what runs was started, or reset, by somebody else.
        let found = State::Resuming;
        all = Err(run.set.fail_device(index, DeviceError::Displaced { found }));
    }
    let (to, command) = if running {
        (RestoreState::PartlyRunning, RestoreCommand::FinishResume)
    } else if plan.barrier {
        (RestoreState::Quiescing, RestoreCommand::EnterP2p)
    } else {
        (RestoreState::Resuming, RestoreCommand::Resume)
    };
    match all {
        Ok(()) => Step::Moved { to, command },
        Err(Noted) => to.on(plan, RestoreEvent::Failed),
    }
}
