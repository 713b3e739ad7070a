//! What a collection and a save take of memory where there are very many checkpoints.
//!
//! What a collection takes is measured in a process of its own, in which nothing else runs: this test program, which runs one
//! test. The checkpoints are made here: only their tables are long, and no chunk of them is there.

use std::env;
use std::fs;
use std::path::Path;
use std::process::Command;

use bytes::Bytes;
use serde_json::{Value, json};

use super::{NIC, TestAmbient, in_memory, limits, load, noise, save_as};
use crate::bucket::Bucket;
use crate::key::{self, ChunkKey, Part};
use crate::table::{Entry, Table};
use crate::write::MOST_TRUSTED;
use crate::{Begin, CheckpointId, Location, Store};

/// Says to this test program that it is to collect, and where.
const FOLDER: &str = "STORE_TEST_COLLECT";

/// A table of so many chunks of one byte, which no other number has.
fn table(upload: CheckpointId, number: usize, chunks: usize) -> Table {
    let mut table = Table::default();
    for index in 0..chunks {
        let mut blake3 = [7; 32];
        blake3[..8].copy_from_slice(&(number as u64).to_be_bytes());
        blake3[8..16].copy_from_slice(&(index as u64).to_le_bytes());
        // As a digest has it: what a collection remembers is made of these.
        let blake3 = *blake3::hash(&blake3).as_bytes();
        table.push(Entry { key: ChunkKey { blake3, upload }, plain_bytes: 1, stored_bytes: 1 }).unwrap();
    }
    table
}

/// Puts a checkpoint into a store whose one state is made of `table`, after the model of a real one.
async fn forge(bucket: &Bucket, model: CheckpointId, id: CheckpointId, table: &Table) {
    let encoded = table.encode();
    let manifest = bucket.get(&key::part(model, Part::Manifest), 1 << 20).await.unwrap().unwrap();
    let mut document: Value = serde_json::from_slice(&manifest).unwrap();
    for (at, value) in [
        ("/id", json!(id)),
        ("/table/blake3", json!(blake3::hash(&encoded).to_hex().to_string())),
        ("/table/bytes", json!(encoded.len())),
        ("/states/0/chunks", json!(table.len())),
        ("/states/0/seal/bytes", json!(table.len())),
    ] {
        *document.pointer_mut(at).unwrap() = value;
    }
    bucket.put(&key::part(id, Part::Table), encoded).await.unwrap();
    let manifest = Bytes::from(serde_json::to_vec(&document).unwrap());
    bucket.put(&key::part(id, Part::Manifest), manifest).await.unwrap();
    bucket.put(&key::device_has(NIC, id), Bytes::new()).await.unwrap();
}

/// A save knows so many chunks of what it builds on, and no more; what it does not know it uploads.
#[tokio::test]
async fn what_a_save_remembers_of_its_bases_is_bounded() {
    let ambient = TestAmbient::new();
    let (store, bucket) = in_memory(&ambient).await;
    let state = noise(1, 200_000);
    let model = save_as(&store, vec![NIC.to_owned()], &[&state]).await.unwrap();
    for number in 0..2 {
        let id = store.new_id();
        forge(&bucket, model.id, id, &table(id, number, MOST_TRUSTED / 2 + 20_000)).await;
    }
    let begin = Begin { id: store.new_id(), logical_devices: vec![NIC.to_owned()], reserve_bytes: 0 };
    let mut writer = store.begin(begin).await.unwrap();
    assert_eq!(writer.known_chunks(), MOST_TRUSTED);
    writer.chunk(0, Bytes::from(state.clone())).await.unwrap();
    writer.finish(0).await.unwrap();
    let saved = writer.commit(Value::Null).await.unwrap();
    assert!(saved.added.chunks > 0, "its two bases have none of it");
    assert!(load(&store, saved.id, 0).await.unwrap() == state);
}

/// A figure of this process, in KiB.
fn status(name: &str) -> u64 {
    let text = fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.trim_start_matches(':').trim().trim_end_matches(" kB").parse().unwrap()
}

/// Collects, and says what that took. Run by the other test, in a process of its own; by itself it has nothing to do.
#[tokio::test]
async fn a_collection_that_is_measured() {
    let Some(folder) = env::var_os(FOLDER) else { return };
    let location = Location::Folder(Path::new(&folder).to_owned());
    let store = Store::open(&location, limits(), TestAmbient::new()).await.unwrap();
    let before = status("VmRSS");
    store.collect().await.unwrap();
    println!("it took {} KiB", status("VmHWM").saturating_sub(before));
}

fn measured(folder: &Path) -> u64 {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["--exact", "tests::memory::a_collection_that_is_measured", "--nocapture"]);
    // Else the allocator keeps a heap for every thread that a table was once read on.
    command.env("MALLOC_ARENA_MAX", "1");
    let said = command.env(FOLDER, folder).output().unwrap();
    let said = String::from_utf8(said.stdout).unwrap();
    let figure = said.lines().find_map(|line| line.split_once("it took ")?.1.strip_suffix(" KiB"));
    figure.unwrap_or_else(|| panic!("no figure: {said}")).parse().unwrap()
}

/// A collection remembers 8 bytes of each chunk that is needed, whoever needs it, and one table at a time.
#[tokio::test]
async fn what_a_collection_remembers_grows_with_the_chunks_and_little() {
    const CHUNKS: usize = 25_000;
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("store");
    let store = Store::open(&Location::Folder(root.clone()), limits(), TestAmbient::new()).await.unwrap();
    let model = save_as(&store, vec![NIC.to_owned()], &[b"a model"]).await.unwrap();
    let empty_kib = measured(&root);
    let shared = table(model.id, 0, CHUNKS);
    let mut figures = Vec::new();
    for (first, last, is_shared) in [(0, 1, true), (1, 60, true), (60, 80, false)] {
        for number in first..last {
            let id = store.new_id();
            let own;
            let table = if is_shared {
                &shared
            } else {
                own = table(id, number, CHUNKS);
                &own
            };
            forge(&store.bucket, model.id, id, table).await;
        }
        figures.push(measured(&root));
    }
    let [one_kib, shared_kib, own_kib] = figures[..] else { unreachable!("three of them") };
    println!(
        "figures: store: a collection takes {empty_kib} KiB, {one_kib} KiB with a checkpoint of {CHUNKS} chunks, {shared_kib} \
         KiB with 60 that share them, {own_kib} KiB with 20 more that share nothing, which have {} KiB of tables",
        (20 * CHUNKS * crate::table::ENTRY_BYTES) >> 10,
    );
    // What is left over of that the allocator keeps. Those that share nothing have half a million chunks, of which 8 bytes each are
    // remembered in a set, which is at most 7/8 full, was half as long before it grew, and has a byte beside each.
    let tables_kib = ((59 * CHUNKS * crate::table::ENTRY_BYTES) >> 10) as u64;
    assert!(
        shared_kib < one_kib + tables_kib / 16,
        "{shared_kib} KiB, {one_kib} with one, {tables_kib} of tables"
    );
    assert!(own_kib < shared_kib + 20 * CHUNKS as u64 * 48 / 1024, "{own_kib} KiB, {shared_kib} before");
}
