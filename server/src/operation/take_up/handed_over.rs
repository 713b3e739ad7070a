//! A migration that was under way when the agent ended.
//!
//! ```text
//!   journal says   devices kept open                         not all of them
//!   Begun          undone, as a save                         undone, as a save
//!   Committing     all in STOP: the destination is told      those that are left stand still: it is told
//!                  again; else: it is asked for them back    again; else: it is asked for them back
//!   LettingGo      reset                                     reset
//! ```
//! # Invariants
//! - Of what was kept nothing runs before the destination has refused for good, and nothing is reset before it has
//!   committed, or an admin has decided.

use std::sync::Arc;

use vfio_checkpoint_device::operation::{self, RecordedSave, Settled, Word};
use vfio_checkpoint_device::{DeviceLane, chain};
use vfio_checkpoint_fsm::handover::OfferStep;
use vfio_checkpoint_fsm::{Role, SavePlan, SaveState, State};

use super::{bring_back, not_kept};
use crate::core::Core;
use crate::migration::Offer;
use crate::operation::caller::EntryCaller;
use crate::operation::end::{self, End};
use crate::operation::entry::Entry;
use crate::operation::record::RecordedStep;
use crate::registry::Lease;
use crate::registry::opening::Arrived;

/// All of its devices were kept.
pub(super) async fn adopted(
    core: &Arc<Core>,
    entry: &Arc<Entry>,
    lease: &Lease,
    lanes: &[DeviceLane],
    plan: SavePlan,
    caller: &EntryCaller,
    step: &RecordedStep,
) -> End {
    let recorded = match step.offer() {
        OfferStep::Begun => RecordedSave::Unsealed,
        OfferStep::Committing => RecordedSave::Committing,
        OfferStep::LettingGo => RecordedSave::LettingGo,
    };
    let mut offer = Offer::new(Arc::clone(core), Arc::clone(entry), None);
    match operation::take_up_save(lanes, plan, recorded, caller, &mut offer).await {
        Ok(SaveState::HandedOver) => end::handed_over(entry),
        Ok(state) => end::unexpected(state),
        Err(error) => end::failed(entry, lease, &error),
    }
}

/// Past its decision, and not all of its devices were kept: those that were not are reset already, and the others follow
/// or run again, as the destination says.
pub(super) async fn in_part(
    core: &Arc<Core>,
    entry: &Arc<Entry>,
    lease: &Lease,
    step: &RecordedStep,
    arrived: &[Arrived],
) -> End {
    let mut offer = Offer::new(Arc::clone(core), Arc::clone(entry), None);
    let settled = if *step == RecordedStep::LettingGo {
        Settled::There
    } else if stand_still(lease, arrived) {
        // Nothing that was kept runs here, so it may run there.
        offer.settle(Word::Commit).await
    } else {
        offer.settle(Word::Withdraw).await
    };
    match settled {
        Settled::There => {
            if let Err(error) = core.record_step(entry, RecordedStep::LettingGo).await {
                tracing::error!(error = %chain(&error), "not recorded; the destination is asked again after a restart");
            }
            for (slot, how) in lease.slots().iter().zip(arrived) {
                if *how == Arrived::Adopted {
                    // One that resists is found quarantined when it is read back.
                    let _ = bring_back(slot, Role::Source, true).await;
                }
            }
            end::handed_over(entry)
        }
        Settled::Here(_) => not_kept(core, entry, lease, step, arrived).await,
    }
}

/// Whether every device that was kept is where the hand-over left it.
fn stand_still(lease: &Lease, arrived: &[Arrived]) -> bool {
    lease
        .slots()
        .iter()
        .zip(arrived)
        .all(|(slot, how)| *how != Arrived::Adopted || matches!(slot.view().state, Some((State::Stop, _))))
}
