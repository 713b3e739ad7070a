//! What an attacker, a bad disk or a careless caller does to a store.

use std::fs;
use std::path::{Path as FsPath, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use object_store::Result;
use serde_json::{Value, json};

use super::between::{Ask, Between, Wrapped};
use super::{
    NIC, TestAmbient, assert_all_whole, impatient, in_memory, limits, load, names, noise, save, save_as,
};
use crate::bucket::Bucket;
use crate::key::{self, ChunkKey, Part};
use crate::table::{Entry, MOST_UPLOADS, Table};
use crate::{Begin, CheckpointId, Location, Store};

fn begin(id: CheckpointId) -> Begin {
    Begin { id, logical_devices: vec![NIC.to_owned()], reserve_bytes: 0 }
}

/// Fails the first chunk that is written, or takes long for each.
#[derive(Debug)]
struct BadChunks {
    fails: AtomicBool,
    takes: Duration,
}

impl Between for BadChunks {
    fn before(&self, ask: Ask, at: String) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            if ask != Ask::Put || !at.starts_with("chunks/") {
                return Ok(());
            }
            tokio::time::sleep(self.takes).await;
            if self.fails.swap(false, Ordering::SeqCst) {
                return Err(object_store::Error::Generic { store: "bad", source: "no".into() });
            }
            Ok(())
        })
    }
}

fn behind(bucket: &Bucket, between: BadChunks, ambient: &Arc<TestAmbient>) -> Store {
    let between = Arc::new(between);
    let bucket = bucket.behind(|inner| Arc::new(Wrapped { inner, between: Arc::clone(&between) }));
    let limits = crate::Limits { parallel: 1, ..limits() };
    Store { bucket, limits: Arc::new(limits), ambient: Arc::clone(ambient) as _ }
}

#[tokio::test]
async fn a_save_of_which_a_part_failed_is_never_committed() {
    let ambient = TestAmbient::new();
    let (free, bucket) = in_memory(&ambient).await;
    let store = behind(&bucket, BadChunks { fails: AtomicBool::new(true), takes: Duration::ZERO }, &ambient);
    let mut writer = store.begin(begin(store.new_id())).await.unwrap();
    let mut failed = 0;
    for part in noise(3, 800_000).chunks(100_000) {
        failed += usize::from(writer.chunk(0, Bytes::copy_from_slice(part)).await.is_err());
    }
    // The caller goes on all the same.
    failed += usize::from(writer.finish(0).await.is_err());
    assert!(writer.commit(Value::Null).await.is_err());
    assert!(failed > 1, "an error is told again");
    assert!(assert_all_whole(&free).await.is_empty());
    free.collect().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_save_of_which_a_part_was_dropped_is_never_committed() {
    let ambient = TestAmbient::new();
    let (free, bucket) = in_memory(&ambient).await;
    for patience in [20, 60, 100, 130, 160] {
        let slow = BadChunks { fails: AtomicBool::new(false), takes: Duration::from_millis(120) };
        let store = behind(&bucket, slow, &ambient);
        let mut writer = store.begin(begin(store.new_id())).await.unwrap();
        let mut dropped = 0;
        for part in noise(patience, 300_000).chunks(40_000) {
            let chunk = writer.chunk(0, Bytes::copy_from_slice(part));
            dropped +=
                usize::from(tokio::time::timeout(Duration::from_millis(patience), chunk).await.is_err());
        }
        let finished = writer.finish(0).await.is_ok();
        let committed = writer.commit(Value::Null).await.is_ok();
        assert_eq!((finished, committed), (dropped == 0, dropped == 0), "{dropped} of {patience} ms");
    }
    assert_all_whole(&free).await;
}

#[tokio::test]
async fn an_id_that_is_taken_is_refused_and_what_has_it_stays() {
    let ambient = TestAmbient::new();
    let (store, _) = in_memory(&ambient).await;
    let saved = save(&store, &[&noise(1, 200_000)]).await.unwrap();
    let refused = store.begin(begin(saved.id)).await.unwrap_err();
    assert!(refused.to_string().contains("take another id"), "{refused}");
    let at_work = store.begin(begin(store.new_id())).await.unwrap();
    assert!(store.begin(begin(at_work.id())).await.is_err(), "also where nothing is committed yet");
    assert_eq!(assert_all_whole(&store).await, [saved.id]);
}

#[tokio::test]
async fn words_that_cannot_be_read_wedge_nothing_for_ever() {
    for (at, text) in [
        ("condemned/x", "t"),
        ("condemned/019aa7b4c10-5c0ffee15c0ffee1", ""),
        ("intents/019aa7b4c10-5c0ffee15c0ffee1", ""),
        ("intents/019aa7b4c10-5c0ffee15c0ffee1", "{\"format\":9,\"bases\":[],\"writer\":1}"),
    ] {
        let ambient = TestAmbient::new();
        let (store, bucket) = in_memory(&ambient).await;
        let first = save(&store, &[&noise(1, 100_000)]).await.unwrap();
        bucket.put(&at.into(), Bytes::from(text)).await.unwrap();
        let second = save(&store, &[&noise(1, 100_001)]).await.unwrap();
        // What may be needed by what cannot be read stays, and then it is long ago.
        let _ = store.collect().await;
        assert_eq!(assert_all_whole(&store).await, [second.id, first.id]);
        impatient(&store).collect().await.unwrap();
        store.collect().await.unwrap();
        assert_eq!(assert_all_whole(&store).await, [second.id, first.id], "{at}");
    }
}

#[tokio::test]
async fn a_chunk_that_a_base_has_lost_is_uploaded_anew() {
    let ambient = TestAmbient::new();
    let (store, bucket) = in_memory(&ambient).await;
    let state = noise(1, 200_000);
    save(&store, &[&state]).await.unwrap();
    let chunks = bucket.list(&key::CHUNKS.into()).await.unwrap();
    bucket.delete(&chunks[0].path).await.unwrap();
    let second = save(&store, &[&state]).await.unwrap();
    assert_eq!(second.added.chunks, 1);
    assert_eq!(store.verify(second.id, |_| {}).await.unwrap().problems, Vec::<String>::new());
}

/// Puts another table in the place of a checkpoint's, and makes its manifest fit.
async fn forge(bucket: &Bucket, id: CheckpointId, table: &Table) {
    let encoded = table.encode();
    let at = key::part(id, Part::Manifest);
    let mut document: Value =
        serde_json::from_slice(&bucket.get(&at, 1 << 20).await.unwrap().unwrap()).unwrap();
    *document.pointer_mut("/table/blake3").unwrap() = json!(blake3::hash(&encoded).to_hex().to_string());
    *document.pointer_mut("/table/bytes").unwrap() = json!(encoded.len());
    bucket.put(&at, serde_json::to_vec(&document).unwrap().into()).await.unwrap();
    bucket.put(&key::part(id, Part::Table), encoded).await.unwrap();
}

#[tokio::test]
async fn a_base_that_lies_about_lengths_is_not_believed() {
    let ambient = TestAmbient::new();
    let (store, bucket) = in_memory(&ambient).await;
    let state = noise(1, 200_000);
    let first = save(&store, &[&state]).await.unwrap();
    let (_, honest) = bucket.read_whole(first.id).await.unwrap().unwrap();
    let mut lying = Table::default();
    for (index, entry) in honest.iter().enumerate() {
        let bytes = match index {
            0 => entry.plain_bytes - 1,
            1 => entry.plain_bytes + 1,
            _ => entry.plain_bytes,
        };
        lying.push(Entry { plain_bytes: bytes, stored_bytes: bytes, ..entry }).unwrap();
    }
    forge(&bucket, first.id, &lying).await;
    let second = save(&store, &[&state]).await.unwrap();
    assert!(load(&store, second.id, 0).await.unwrap() == state);
}

#[tokio::test]
async fn a_base_of_very_many_uploads_ends_no_save() {
    let ambient = TestAmbient::new();
    let (store, bucket) = in_memory(&ambient).await;
    let devices: Vec<String> = (0..32).map(|index| format!("{index:032x}")).collect();
    let states: Vec<Vec<u8>> = (0..32).map(|index| noise(1000 + index, 4_000_000)).collect();
    let states: Vec<&[u8]> = states.iter().map(Vec::as_slice).collect();
    let first = save_as(&store, devices.clone(), &states).await.unwrap();
    let (_, table) = bucket.read_whole(first.id).await.unwrap().unwrap();
    let mut scattered = Table::default();
    for (index, entry) in table.iter().enumerate() {
        let upload = if index < MOST_UPLOADS - 1 { store.new_id() } else { first.id };
        let key = ChunkKey { upload, ..entry.key };
        let bytes = bucket.get(&entry.key.path(), 8 << 20).await.unwrap().unwrap();
        bucket.put(&key.path(), bytes).await.unwrap();
        scattered.push(Entry { key, ..entry }).unwrap();
    }
    assert!(table.len() > MOST_UPLOADS, "{}", table.len());
    forge(&bucket, first.id, &scattered).await;
    let mut longer = states.clone();
    let last = noise(9, 4_000_001);
    longer[31] = &last;
    let second = save_as(&store, devices, &longer).await.unwrap();
    assert!(second.added.chunks > 0);
    assert_eq!(store.verify(second.id, |_| {}).await.unwrap().problems, Vec::<String>::new());
}

#[tokio::test]
async fn one_logical_device_is_in_a_set_once() {
    let ambient = TestAmbient::new();
    let (store, _) = in_memory(&ambient).await;
    let twice = vec![NIC.to_owned(), NIC.to_owned()];
    let refused = save_as(&store, twice, &[b"one", b"two"]).await.unwrap_err();
    assert!(refused.to_string().contains("twice"), "{refused}");
}

fn files(folder: &FsPath) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

#[tokio::test]
async fn what_a_killed_writer_left_half_written_is_swept() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("store");
    let store = Store::open(&Location::Folder(root.clone()), limits(), TestAmbient::new()).await.unwrap();
    let saved = save(&store, &[&noise(1, 100_000)]).await.unwrap();
    let staged = format!("{}#1", files(&root.join("chunks"))[0].display());
    fs::write(&staged, "half").unwrap();
    assert_eq!(store.collect().await.unwrap().swept, 0, "its writer may be alive");
    assert_eq!(impatient(&store).collect().await.unwrap().swept, 1);
    assert!(!FsPath::new(&staged).exists());
    assert_eq!(assert_all_whole(&store).await, [saved.id]);
}

#[tokio::test]
async fn a_local_store_keeps_space_for_what_frees_space() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("store");
    let store = Store::open(&Location::Folder(root.clone()), limits(), TestAmbient::new()).await.unwrap();
    let saved = save(&store, &[&noise(1, 100_000)]).await.unwrap();
    store.collect().await.unwrap();
    let ballast = root.join(".ballast");
    assert_eq!(fs::metadata(&ballast).unwrap().len(), 16 << 20);
    // It is given up where it is needed, is no object of the store, and is not asked after when a store is opened.
    store.delete(saved.id).await.unwrap();
    assert_eq!(store.collect().await.unwrap().chunks, saved.states[0].chunks);
    assert_eq!(fs::metadata(&ballast).unwrap().len(), 16 << 20);
    assert_eq!(names(&store.bucket, "chunks").await, Vec::<String>::new());
    Store::open(&Location::Folder(root), limits(), TestAmbient::new()).await.unwrap();
}
