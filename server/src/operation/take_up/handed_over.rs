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

use vfio_checkpoint_device::DeviceLane;
use vfio_checkpoint_device::operation::{self, RecordedSave, Settled, Word};
use vfio_checkpoint_fsm::handover::OfferStep;
use vfio_checkpoint_fsm::{Role, SavePlan, SaveState, State};

use super::{Found, There, bring_back, not_kept};
use crate::core::Core;
use crate::migration::Offer;
use crate::operation::caller::EntryCaller;
use crate::operation::end::{self, End};
use crate::operation::entry::Entry;
use crate::operation::record::RecordedStep;
use crate::registry::{Lease, Slot};

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
    step: &RecordedStep,
    there: &[There],
) -> End {
    let mut offer = Offer::new(Arc::clone(core), Arc::clone(entry), None);
    let settled = if *step == RecordedStep::LettingGo {
        Settled::There
    } else if stand_still(there) {
        // Nothing that was kept runs here, so it may run there.
        offer.settle(Word::Commit).await
    } else {
        offer.settle(Word::Withdraw).await
    };
    match settled {
        Settled::There => {
            core.record_surely(entry, RecordedStep::LettingGo).await;
            for There { slot, how, .. } in there {
                match how {
                    // One that resists is seen as not reset at the end.
                    Found::Kept | Found::KeptSince => {
                        let _ = bring_back(slot.as_ref(), Role::Source, true).await;
                    }
                    Found::Opened | Found::NotOpen | Found::NotConfigured => {}
                }
            }
            end::handed_over(entry)
        }
        Settled::Here(_) => {
            // Before anything runs here again: a later life of the agent must not have the destination run it.
            core.record_surely(entry, RecordedStep::Begun).await;
            not_kept(core, entry, step, there).await
        }
    }
}

/// Whether every device that was kept is where the hand-over left it.
fn stand_still(there: &[There]) -> bool {
    let stands = |slot: &Arc<Slot>| matches!(slot.view().state, Some((State::Stop, _)));
    there.iter().all(|device| device.how != Found::Kept || device.slot.as_ref().is_some_and(stands))
}
