//! What is owed to checkpoints: marks, and that they are discarded, which their store did not take when it was time.
//!
//! ```text
//!   end of a hold, undone save --Stores::settle--> store: done
//!                                         \-- fails --> owed --commit of the operation's next step--> journal
//!   pay(): journal's debts, oldest first, with a growing pause --> store: done --> forgotten in the journal
//!   Get, List, Restore --of()--> what the checkpoint is, whatever its store says of it
//! ```
//! # Invariants
//! - From the failure on this agent tells of the checkpoint what it owes, and not what is in the store.
//! - A debt is on record before the devices that it is about run on, or with the end of its operation; were the agent killed
//!   before that, the operation would be taken up, and would owe it again.
//! - It is forgotten only once the store itself has taken it, or the checkpoint is not there while the store is.
//!
//! # Failure paths
//! What cannot be paid is tried again for as long as the agent lives, and by the next one. Other agents that share the store
//! find out once it is paid, and not before.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use vfio_checkpoint_device::chain;
use vfio_checkpoint_proto::ids::{CheckpointName, StoreName};

use crate::core::Core;
use crate::journal::{Change, DebtRecord, Owed};

/// Where so much is owed no save into a store is admitted. Those that run may add theirs.
const MOST: usize = 4096;
/// The pauses between two tries: the first, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(20));

/// What is owed.
#[derive(Debug, Default)]
pub struct Debts {
    owed: Mutex<BTreeMap<CheckpointName, Debt>>,
    /// Something is owed, or can be paid, that was not before.
    changed: Notify,
}

#[derive(Debug, Clone, Copy)]
struct Debt {
    owed: Owed,
    is_on_record: bool,
}

impl Debts {
    /// Takes over what the journal says.
    pub(super) fn take_over(&self, recorded: &[(CheckpointName, DebtRecord)]) {
        let debts = recorded.iter();
        self.locked().extend(
            debts.map(|(name, DebtRecord { owed })| (name.clone(), Debt { owed: *owed, is_on_record: true })),
        );
    }

    /// What is owed of a checkpoint.
    pub fn of(&self, name: &CheckpointName) -> Option<Owed> {
        self.locked().get(name).map(|debt| debt.owed)
    }

    /// What is owed to a store.
    pub fn of_store(&self, store: &StoreName) -> BTreeMap<CheckpointName, Owed> {
        let debts = self.locked();
        let of_it = debts.iter().filter(|(name, _)| name.store() == *store);
        of_it.map(|(name, debt)| (name.clone(), debt.owed)).collect()
    }

    /// Whether so much is owed that nothing may be added.
    pub fn is_full(&self) -> bool {
        self.locked().len() >= MOST
    }

    /// A store answers: what is owed may be paid now.
    pub fn nudge(&self) {
        self.changed.notify_one();
    }

    /// What the journal does not know yet of a checkpoint, for the commit that comes next.
    pub fn unrecorded(&self, name: Option<&CheckpointName>) -> Option<Change> {
        let name = name?;
        let debt = *self.locked().get(name)?;
        (!debt.is_on_record).then(|| Change::Debt(name.clone(), DebtRecord { owed: debt.owed }))
    }

    /// These changes are on record.
    pub fn recorded(&self, changes: &[Change]) {
        for change in changes {
            match change {
                Change::Debt(name, DebtRecord { owed }) => {
                    if let Some(debt) = self.locked().get_mut(name).filter(|debt| debt.owed == *owed) {
                        debt.is_on_record = true;
                    }
                    self.changed.notify_one();
                }
                Change::Operation(_)
                | Change::ForgetOperation(_)
                | Change::Request(..)
                | Change::ForgetRequest(_)
                | Change::Device(..)
                | Change::ForgetDebt(_) => {}
            }
        }
    }

    /// Something is owed from now on. To discard a checkpoint goes beyond a mark.
    pub(super) fn owe(&self, name: &CheckpointName, owed: Owed) {
        let mut debts = self.locked();
        if debts.get(name).is_none_or(|debt| debt.owed < owed) {
            debts.insert(name.clone(), Debt { owed, is_on_record: false });
        }
    }

    fn due(&self) -> Vec<(CheckpointName, Owed)> {
        let debts = self.locked();
        let due = debts.iter().filter(|(_, debt)| debt.is_on_record);
        due.map(|(name, debt)| (name.clone(), debt.owed)).collect()
    }

    /// It was paid, unless more is owed by now.
    fn paid(&self, name: &CheckpointName, paid: Owed) {
        let mut debts = self.locked();
        if debts.get(name).is_some_and(|debt| debt.owed <= paid) {
            debts.remove(name);
        }
    }

    fn locked(&self) -> MutexGuard<'_, BTreeMap<CheckpointName, Debt>> {
        self.owed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Pays what is owed, for as long as the agent lives.
pub async fn pay(core: &Core) {
    let mut pause = PAUSES.0;
    loop {
        let changed = core.stores.debts().changed.notified();
        if all_paid(core).await {
            pause = PAUSES.0;
            changed.await;
            continue;
        }
        tokio::select! {
            biased;
            () = changed => {}
            () = core.environment.sleep(pause) => {}
        }
        pause = (pause * 2).min(PAUSES.1);
    }
}

/// Tries to pay all that is on record; whether nothing of it is left.
async fn all_paid(core: &Core) -> bool {
    let mut all = true;
    let mut closed: Option<StoreName> = None;
    for (name, owed) in core.stores.debts().due() {
        if closed.as_ref() == Some(&name.store()) {
            continue;
        }
        if let Err(error) = core.stores.pay(&name, owed).await {
            tracing::warn!(checkpoint = %name, ?owed, error = %chain(&*error), "its store does not take yet what is owed");
            all = false;
            // Not each of its checkpoints has to wait for a store that is away.
            if !core.stores.is_open(&name.store()) {
                closed = Some(name.store());
            }
            continue;
        }
        // Where this fails it is paid again, which changes nothing.
        match core.journal.commit(vec![Change::ForgetDebt(name.clone())]).await {
            Ok(()) => {
                core.stores.debts().paid(&name, owed);
                tracing::info!(checkpoint = %name, ?owed, "its store took what was owed");
            }
            Err(error) => {
                tracing::error!(checkpoint = %name, error = %chain(&error), "what was paid cannot be recorded");
                all = false;
            }
        }
    }
    all
}
