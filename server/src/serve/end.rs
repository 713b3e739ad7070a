//! The end of an agent: what is under way is undone, and what it has is given back.
//!
//! ```text
//!   undo_all: cancel each operation, but what is held and kept --> none left, or the grace is over
//!   shut:     a door's calls end by themselves --> over, or late: aborted
//!   left:     connections were cut --> each is over
//!   close:    the last of Core dropped --> each lane closes its device --> holder hung up --> journal settled
//! ```
//! # Failure paths
//! A call on a device that does not return keeps the device open, and is not waited for: nothing can end it but the process.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::{JoinError, JoinHandle};
use vfio_checkpoint_device::chain;
use vfio_checkpoint_device::lane::Closing;

use crate::core::Core;
use crate::counted::Count;
use crate::environment::Environment;
use crate::operation::{Cancel, Entry, Phase};
use crate::registry::Slot;
use crate::security::peers::PeerRegistry;

/// How long calls have to end once nothing is under way any more.
pub(super) const LAST_CALLS: Duration = Duration::from_secs(2);

/// Undoes every operation that is under way, except those that are held, and whose devices the holder has.
pub(super) async fn undo_all(core: &Core) {
    let kept = match &core.keeper {
        Some(keeper) => keeper.held().await.unwrap_or_else(|error| {
            tracing::error!(error = %chain(&error), "the holder cannot be asked, so what is held is undone");
            Vec::new()
        }),
        None => Vec::new(),
    };
    let is_kept = |entry: &Entry| entry.device_names().all(|name| kept.iter().any(|kept| kept == name.id()));
    let mut running = core.operations.running();
    loop {
        let mut left = 0;
        for entry in core.operations.active() {
            // Nobody can undo anything on a device that does not answer: the next agent takes it up. Nor about what another
            // agent has been told to run; but where nobody keeps it here its answer is waited for, as long as there is time.
            let phase = entry.view().phase;
            let stays = match phase {
                Phase::Held => true,
                Phase::Prepared => !entry.fixed.job.gives(),
                Phase::Committing => entry.fixed.job.gives(),
                Phase::WaitingForStream
                | Phase::Preparing
                | Phase::PreCopy
                | Phase::WaitingForCutover
                | Phase::Stopping
                | Phase::StopCopy
                | Phase::Sealing
                | Phase::Marking
                | Phase::Loading
                | Phase::Verifying
                | Phase::Resuming
                | Phase::LettingGo
                | Phase::Unwinding
                | Phase::Done => false,
            };
            if entry.signals.waits_for_device() || stays && is_kept(&entry) {
                continue;
            }
            left += 1;
            if let Err(refused) = entry.cancel(Cancel::ShuttingDown) {
                tracing::debug!(operation = %entry.fixed.name, %refused, "ends by itself");
            }
        }
        if left == 0 {
            return;
        }
        tokio::select! {
            biased;
            changed = running.changed() => if changed.is_err() { return },
            // A hold may have begun, or an operation come to where it can be undone.
            () = core.environment.sleep(Duration::from_millis(50)) => {}
        }
    }
}

/// Waits for a door to close by itself, and closes it once `late` is ready: None then.
pub(super) async fn shut<T>(
    mut door: JoinHandle<T>,
    late: impl Future<Output = ()>,
) -> Option<Result<T, JoinError>> {
    tokio::select! {
        biased;
        ended = &mut door => return Some(ended),
        () = late => door.abort(),
    }
    let _ = door.await;
    None
}

/// Waits until the connections are over: those of peers, which were cut, and those of `health`, which are by this.
pub(super) async fn left(environment: &Environment, peers: &PeerRegistry, health: Option<Count>) {
    let over = async {
        peers.all_left().await;
        if let Some(count) = health {
            count.cut().await;
        }
    };
    tokio::select! {
        biased;
        () = over => {}
        () = environment.sleep(LAST_CALLS) => tracing::warn!("a connection that was cut is not over yet"),
    }
}

/// Gives back what an agent has for itself alone: its devices, its journal and its holder.
pub(super) async fn close(core: Arc<Core>, grace: Duration) {
    let (journal, keeper, environment) =
        (core.journal.clone(), core.keeper.clone(), core.environment.clone());
    // One that was given up is closed when its call returns, if ever.
    let answers = |slot: &&Arc<Slot>| slot.lane().is_none_or(|lane| lane.hung().is_none());
    let devices: Vec<Closing> =
        core.registry.all().filter(answers).filter_map(|slot| slot.closing()).collect();
    let gone = core.gone();
    drop(core);
    let let_go = async {
        gone.await;
        for device in &devices {
            device.begun().await;
        }
    };
    tokio::select! {
        biased;
        () = let_go => {}
        () = environment.sleep(LAST_CALLS) => {
            tracing::warn!(
                "a call is not over yet; until then this process has the journal locked, or a device open"
            );
        }
    }
    // What is reset by it may take its time. A device that is still at a call may never come to it.
    let closed = async {
        for device in devices.iter().filter(|device| device.has_begun()) {
            device.closed().await;
        }
    };
    tokio::select! {
        biased;
        () = closed => {}
        () = environment.sleep(grace.max(LAST_CALLS)) => {
            tracing::warn!("a device is not closed yet; until then this process has it open");
        }
    }
    if let Some(keeper) = keeper {
        keeper.hang_up().await;
    }
    journal.settled().await;
}
