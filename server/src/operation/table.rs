//! All operations that the agent knows: those that run, and those that ended and are not forgotten yet.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use vfio_checkpoint_device::Executor;
use vfio_checkpoint_proto::ids::{DeviceName, OperationName};

use super::entry::Entry;
use crate::environment::UnixMillis;
use crate::journal::{Change, RequestKey, RequestRecord};

/// The operations of the agent.
#[derive(Debug)]
pub struct Operations {
    tables: Mutex<Tables>,
    /// How many are running.
    running: watch::Sender<usize>,
    /// Held while a restore is looked at and admitted, so that two of one state cannot both find that nobody has it.
    restores: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct Tables {
    /// By name; names begin with the time, so the oldest is the first.
    entries: BTreeMap<OperationName, Arc<Entry>>,
    requests: BTreeMap<RequestKey, RequestRecord>,
    /// Held while a request id is looked up and put down, so that two calls with one id cannot both be the first.
    locks: BTreeMap<RequestKey, Arc<tokio::sync::Mutex<()>>>,
}

impl Operations {
    /// The operations and request ids that the journal knows.
    pub fn new(
        entries: impl IntoIterator<Item = Arc<Entry>>,
        requests: impl IntoIterator<Item = (RequestKey, RequestRecord)>,
    ) -> Self {
        let entries: BTreeMap<_, _> =
            entries.into_iter().map(|entry| (entry.fixed.name.clone(), entry)).collect();
        let running = entries.values().filter(|entry| !entry.is_done()).count();
        let tables = Tables { entries, requests: requests.into_iter().collect(), locks: BTreeMap::new() };
        Self {
            tables: Mutex::new(tables),
            running: watch::Sender::new(running),
            restores: tokio::sync::Mutex::default(),
        }
    }

    /// Waits for its turn to admit a restore, which is over with what it returns.
    pub async fn admit_restore(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.restores.lock().await
    }

    /// The operation of this name.
    pub fn get(&self, name: &OperationName) -> Option<Arc<Entry>> {
        self.locked().entries.get(name).cloned()
    }

    /// Operations before `before`, the newest first, that are as asked for.
    pub fn page(
        &self,
        before: Option<&OperationName>,
        wanted: impl Fn(&Entry) -> bool,
        count: usize,
    ) -> Vec<Arc<Entry>> {
        use std::ops::Bound::{Excluded, Unbounded};
        let to = before.map_or(Unbounded, Excluded);
        let tables = self.locked();
        let range = tables.entries.range::<OperationName, _>((Unbounded, to)).rev();
        range.map(|(_, entry)| entry).filter(|entry| wanted(entry)).take(count).cloned().collect()
    }

    /// Operations that are not over.
    pub fn active(&self) -> Vec<Arc<Entry>> {
        self.locked().entries.values().filter(|entry| !entry.is_done()).cloned().collect()
    }

    /// How many are not over.
    pub fn running(&self) -> watch::Receiver<usize> {
        self.running.subscribe()
    }

    /// Takes in an operation that was admitted, where fewer than `most` run.
    pub(super) fn reserve(&self, most: usize) -> bool {
        self.running.send_if_modified(|running| {
            let room = *running < most;
            if room {
                *running += 1;
            }
            room
        })
    }

    /// Gives back what was reserved for an operation that is over, or never came to be.
    pub(super) fn release(&self) {
        self.running.send_modify(|running| *running = running.saturating_sub(1));
    }

    /// Takes in an operation for which there was room.
    pub(super) fn insert(&self, entry: Arc<Entry>) {
        self.locked().entries.insert(entry.fixed.name.clone(), entry);
    }

    /// A name that no operation has: the time first, so that names sort by it.
    pub(crate) fn new_name(&self, now: UnixMillis, executor: &dyn Executor) -> OperationName {
        loop {
            // Letters and digits only, so it is always a name.
            let Ok(name) = OperationName::from_id(&format!("{:011x}-{:016x}", now.0, executor.random()))
            else {
                continue;
            };
            if !self.locked().entries.contains_key(&name) {
                return name;
            }
        }
    }

    /// What a request id stands for.
    pub fn request(&self, key: &RequestKey) -> Option<RequestRecord> {
        self.locked().requests.get(key).cloned()
    }

    /// What a request id stands for from now on. It is in the journal already.
    pub fn set_request(&self, key: RequestKey, record: RequestRecord) {
        self.locked().requests.insert(key, record);
    }

    /// One call at a time for one request id.
    pub async fn lock_request(&self, key: &RequestKey) -> tokio::sync::OwnedMutexGuard<()> {
        let lock = {
            let mut tables = self.locked();
            // Nobody has or waits for a lock that is only here.
            tables.locks.retain(|_, lock| Arc::strong_count(lock) > 1);
            Arc::clone(tables.locks.entry(key.clone()).or_default())
        };
        lock.lock_owned().await
    }

    /// Forgets operations that ended long ago, and the oldest where there are too many; and the request ids that stand
    /// for them. Returns what the journal has to forget.
    pub fn forget(&self, now: UnixMillis, keep: Duration, count: usize) -> Vec<Change> {
        let mut tables = self.locked();
        let ended: Vec<(OperationName, UnixMillis)> = tables
            .entries
            .values()
            // A source that may still ask must find what it was answered.
            .filter(|entry| !entry.is_owed())
            .filter_map(|entry| Some((entry.fixed.name.clone(), entry.view().end?.at)))
            .collect();
        let surplus = ended.len().saturating_sub(count);
        let mut changes = Vec::new();
        for (index, (name, at)) in ended.into_iter().enumerate() {
            if index < surplus || at.after(keep) <= now {
                tables.entries.remove(&name);
                changes.push(Change::ForgetOperation(name));
            }
        }
        let Tables { entries, requests, .. } = &mut *tables;
        requests.retain(|key, record| {
            let stands = match &record.answer {
                crate::journal::RequestAnswer::Operation(name) => entries.contains_key(name),
                crate::journal::RequestAnswer::Reset { .. } => record.at.after(keep) > now,
            };
            if !stands {
                changes.push(Change::ForgetRequest(key.clone()));
            }
            stands
        });
        changes
    }

    /// Whether an operation is about a device.
    pub fn is_about(entry: &Entry, device: &DeviceName) -> bool {
        entry.device_names().any(|name| name == device)
    }

    fn locked(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
