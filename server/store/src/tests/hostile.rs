//! What lies in a store is not trusted.

use bytes::Bytes;
use serde_json::{Value, json};

use super::{TestAmbient, in_memory, load, noise, save};
use crate::bucket::Bucket;
use crate::key::{self, Part};
use crate::{Manifest, Store, StoreError};

struct Case {
    store: Store,
    bucket: Bucket,
    saved: Manifest,
}

async fn case() -> Case {
    let ambient = TestAmbient::new();
    let (store, bucket) = in_memory(&ambient).await;
    let saved = save(&store, &[&noise(1, 200_000), &vec![7; 300_000]]).await.unwrap();
    Case { store, bucket, saved }
}

async fn get(bucket: &Bucket, at: &object_store::path::Path) -> Vec<u8> {
    bucket.get(at, 1 << 30).await.unwrap().unwrap().to_vec()
}

/// Every byte of the manifest and of the table, changed: refused, or without any meaning.
#[tokio::test]
async fn a_flipped_byte_anywhere_is_found() {
    let Case { store, bucket, saved } = case().await;
    let state = load(&store, saved.id, 0).await.unwrap();
    for part in [Part::Manifest, Part::Table] {
        let at = key::part(saved.id, part);
        let whole = get(&bucket, &at).await;
        for index in 0..whole.len() {
            let mut bad = whole.clone();
            bad[index] ^= 0x10;
            bucket.put(&at, bad.into()).await.unwrap();
            match load(&store, saved.id, 0).await {
                // In the free text, or in a figure of what was added.
                Ok(read) => assert!(part == Part::Manifest && read == state, "byte {index}"),
                Err(StoreError::Damaged { .. } | StoreError::NotFound { .. }) => {}
                Err(other) => panic!("byte {index} of {part:?}: {other}"),
            }
        }
        bucket.put(&at, whole.into()).await.unwrap();
    }
    for found in bucket.list(&key::CHUNKS.into()).await.unwrap() {
        let whole = get(&bucket, &found.path).await;
        for bad in [
            Bytes::new(),
            Bytes::from(whole[..whole.len() - 1].to_vec()),
            Bytes::from([&whole[..], b"x"].concat()),
            Bytes::from(whole.iter().map(|byte| byte ^ 1).collect::<Vec<_>>()),
        ] {
            bucket.put(&found.path, bad).await.unwrap();
            let verified = store.verify(saved.id, |_| {}).await.unwrap();
            assert_eq!(verified.problems.len(), 1, "{}", found.path);
            assert!(verified.problems[0].contains(found.path.as_ref()), "{:?}", verified.problems);
        }
        bucket.delete(&found.path).await.unwrap();
        let verified = store.verify(saved.id, |_| {}).await.unwrap();
        assert!(verified.problems[0].contains("is missing"), "{:?}", verified.problems);
        bucket.put(&found.path, whole.into()).await.unwrap();
    }
    assert_eq!(store.verify(saved.id, |_| {}).await.unwrap().problems, Vec::<String>::new());
}

#[tokio::test]
async fn a_manifest_that_lies_is_refused_with_what_is_wrong() {
    let Case { store, bucket, saved } = case().await;
    let at = key::part(saved.id, Part::Manifest);
    let honest: Value = serde_json::from_slice(&get(&bucket, &at).await).unwrap();
    let other = store.new_id();
    let cases: Vec<(&str, Value, &str)> = vec![
        ("/format", json!(2), "it has format 2"),
        ("/id", json!(other.to_string()), "another checkpoint"),
        ("/states", json!([]), "0 states"),
        ("/states/0/logical_device", json!("../../etc"), "a-z, 0-9 and hyphen"),
        ("/states/0/seal/bytes", json!(200_001), "are sealed"),
        ("/states/0/chunks", json!(u64::MAX), "manifest counts"),
        ("/states/0/seal/blake3", json!("xyz"), "hex"),
        ("/table/bytes", json!(u64::MAX), "at most"),
        ("/table/blake3", json!("00"), "not the table"),
        ("/kind", json!("other"), "unknown variant"),
    ];
    for (field, lie, expected) in cases {
        let mut document = honest.clone();
        *document.pointer_mut(field).unwrap() = lie;
        bucket.put(&at, serde_json::to_vec(&document).unwrap().into()).await.unwrap();
        let refused = store.get(saved.id).await.unwrap_err().to_string();
        assert!(refused.contains(expected), "{field}: {refused}");
        assert!(refused.contains(&saved.id.to_string()), "{refused}");
        // It is listed, so that it can be deleted, or it is not listed because it is none.
        assert!(store.list(None, 10).await.unwrap().checkpoints.len() == 1);
    }
    // Longer than any manifest: not read to its end.
    bucket.put(&at, vec![b' '; 3 << 20].into()).await.unwrap();
    assert!(store.get(saved.id).await.unwrap_err().to_string().contains("at most"));
    // Deep enough to overflow a stack that follows it.
    bucket.put(&at, vec![b'['; 1 << 19].into()).await.unwrap();
    assert!(matches!(store.get(saved.id).await, Err(StoreError::Damaged { .. })));
    store.delete(saved.id).await.unwrap();
    assert!(store.list(None, 10).await.unwrap().checkpoints.is_empty());
}

/// Chunks in another order have the right names, and the state is not what was sealed.
#[tokio::test]
async fn a_table_in_another_order_fails_at_the_seal() {
    let Case { store, bucket, saved } = case().await;
    let (at, table_at) = (key::part(saved.id, Part::Manifest), key::part(saved.id, Part::Table));
    let mut table = get(&bucket, &table_at).await;
    // Two chunks of the same length: the repeated ones of the second state; one of them for its neighbour.
    let chunks = usize::try_from(saved.states[0].chunks + saved.states[1].chunks).unwrap();
    let rows = table.len() - chunks * 44;
    let (first, second) = (rows, rows + 44);
    let lengths = |table: &[u8], row: usize| table[row + 36..row + 40].to_vec();
    let swapped: Vec<u8> = [&table[second..second + 44], &table[first..first + 44]].concat();
    assert_ne!(lengths(&table, first), Vec::<u8>::new());
    table[first..first + 88].copy_from_slice(&swapped);
    let mut document: Value = serde_json::from_slice(&get(&bucket, &at).await).unwrap();
    *document.pointer_mut("/table/blake3").unwrap() = json!(blake3::hash(&table).to_hex().to_string());
    bucket.put(&table_at, table.into()).await.unwrap();
    bucket.put(&at, serde_json::to_vec(&document).unwrap().into()).await.unwrap();
    let verified = store.verify(saved.id, |_| {}).await.unwrap();
    assert_eq!(verified.problems.len(), 1);
    assert!(verified.problems[0].contains("sealed are"), "{:?}", verified.problems);
}

/// A collection that cannot tell what is needed deletes nothing.
#[tokio::test]
async fn nothing_is_collected_while_a_manifest_cannot_be_read() {
    let Case { store, bucket, saved } = case().await;
    let gone = save(&store, &[&noise(9, 100_000)]).await.unwrap();
    store.delete(gone.id).await.unwrap();
    let chunks = bucket.list(&key::CHUNKS.into()).await.unwrap().len();
    bucket.put(&key::part(saved.id, Part::Manifest), Bytes::from_static(b"{")).await.unwrap();
    let refused = store.collect().await.unwrap_err().to_string();
    assert!(refused.contains(&saved.id.to_string()), "{refused}");
    assert_eq!(bucket.list(&key::CHUNKS.into()).await.unwrap().len(), chunks);
    store.delete(saved.id).await.unwrap();
    store.collect().await.unwrap();
    assert_eq!(bucket.list(&key::CHUNKS.into()).await.unwrap().len(), 0);
}

/// An earlier checkpoint that rotted does not stop the next save.
#[tokio::test]
async fn a_save_goes_past_a_damaged_base() {
    let Case { store, bucket, saved } = case().await;
    bucket.put(&key::part(saved.id, Part::Table), Bytes::from_static(b"rot")).await.unwrap();
    let next = save(&store, &[&noise(1, 200_000)]).await.unwrap();
    assert_eq!(next.added.chunks, next.states[0].chunks);
    assert_eq!(store.verify(next.id, |_| {}).await.unwrap().problems, Vec::<String>::new());
}
