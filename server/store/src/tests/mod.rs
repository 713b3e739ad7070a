//! What the store promises, tried out: on a folder, in memory, on a store that fails, and with agents that meet.

mod attacks;
mod between;
mod faults;
mod folder;
mod hostile;
mod memory;
mod races;
mod traces;
mod whole;

use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use object_store::memory::InMemory;
use serde_json::json;

use crate::bucket::Bucket;
use crate::{Ambient, Begin, CheckpointId, Limits, Manifest, Store, StoreError, Writer};

/// A logical device.
pub(crate) const NIC: &str = "0123456789abcdef0123456789abcdef";

/// Bytes that look random and are the same each time.
pub(crate) fn noise(seed: u64, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// A clock that is set, and numbers that count.
#[derive(Debug)]
pub(crate) struct TestAmbient {
    state: Mutex<(SystemTime, u64)>,
}

impl TestAmbient {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self { state: Mutex::new((SystemTime::now(), 0)) })
    }

    pub(crate) fn advance(&self, by: Duration) {
        self.state.lock().unwrap().0 += by;
    }
}

impl Ambient for TestAmbient {
    fn now(&self) -> SystemTime {
        self.state.lock().unwrap().0
    }

    fn random(&self) -> u64 {
        let mut state = self.state.lock().unwrap();
        // Ids are in the order of time, so that tests can tell which is the newest.
        state.0 += Duration::from_millis(1);
        state.1 += 1;
        state.1
    }
}

pub(crate) fn limits() -> Limits {
    Limits { grace: Duration::ZERO, keep_free_bytes: 0, ..Limits::default() }
}

/// The same store, for which everything is long ago.
pub(crate) fn impatient(store: &Store) -> Store {
    let limits = Limits { abandoned_after: Duration::ZERO, keep_marks: Duration::ZERO, ..limits() };
    Store { limits: Arc::new(limits), ..store.clone() }
}

/// A store in memory, and its bucket.
pub(crate) async fn in_memory(ambient: &Arc<TestAmbient>) -> (Store, Bucket) {
    let bucket = Bucket::remote("memory", Arc::new(InMemory::new()));
    let store = Store::over(bucket.clone(), limits(), Arc::clone(ambient) as _).await.unwrap();
    (store, bucket)
}

/// Saves the states of as many devices.
pub(crate) async fn save(store: &Store, states: &[&[u8]]) -> Result<Manifest, StoreError> {
    let names = (0..states.len()).map(|index| format!("{index:032x}")).collect();
    save_as(store, names, states).await
}

pub(crate) async fn save_as(
    store: &Store,
    names: Vec<String>,
    states: &[&[u8]],
) -> Result<Manifest, StoreError> {
    let reserve_bytes = states.iter().map(|state| state.len() as u64).sum();
    let mut writer = store.begin(Begin { id: store.new_id(), logical_devices: names, reserve_bytes }).await?;
    match fill(&mut writer, states).await {
        Ok(()) => writer.commit(json!({ "made": "for a test" })).await,
        Err(error) => {
            writer.abort().await;
            Err(error)
        }
    }
}

async fn fill(writer: &mut Writer, states: &[&[u8]]) -> Result<(), StoreError> {
    for (device, state) in states.iter().enumerate() {
        for part in state.chunks(300_000) {
            writer.chunk(device, Bytes::copy_from_slice(part)).await?;
        }
        writer.finish(device).await?;
    }
    Ok(())
}

/// The state of one device of a checkpoint.
pub(crate) async fn load(store: &Store, id: CheckpointId, device: usize) -> Result<Vec<u8>, StoreError> {
    let mut reader = store.get(id).await?.read(device);
    let mut state = Vec::new();
    while let Some(bytes) = reader.next().await? {
        state.extend_from_slice(&bytes);
    }
    Ok(state)
}

/// Every checkpoint that is listed is whole.
pub(crate) async fn assert_all_whole(store: &Store) -> Vec<CheckpointId> {
    let page = store.list(None, 1000).await.unwrap();
    for listed in &page.checkpoints {
        let verified = store.verify(listed.id, |_| {}).await.unwrap();
        assert_eq!(verified.problems, Vec::<String>::new(), "checkpoint {}", listed.id);
    }
    page.checkpoints.iter().map(|listed| listed.id).collect()
}

/// Everything that lies in a bucket.
pub(crate) async fn names(bucket: &Bucket, below: &str) -> Vec<String> {
    let mut names: Vec<String> =
        bucket.list(&below.into()).await.unwrap().iter().map(|found| found.path.to_string()).collect();
    names.sort();
    names
}
