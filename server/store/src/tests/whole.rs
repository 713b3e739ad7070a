//! Save, list, read, verify, delete, collect, with nobody in the way.

use std::sync::Arc;
use std::time::Duration;

use super::{TestAmbient, assert_all_whole, impatient, in_memory, limits, load, names, noise, save, save_as};
use crate::{Location, Store, StoreError};

#[tokio::test(flavor = "multi_thread")]
async fn what_is_saved_is_read_back_from_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let location = Location::Folder(folder.path().join("a").join("store"));
    let store = Store::open(&location, limits(), TestAmbient::new()).await.unwrap();
    let (one, two) = (noise(1, 3_000_000), vec![0; 500_000]);
    let saved = save(&store, &[&one, &two, b""]).await.unwrap();
    assert_eq!(saved.plain_bytes(), 3_500_000);
    assert!(saved.added.stored_bytes < 3_100_000, "{:?}", saved.added);

    // Another agent opens it.
    let store = Store::open(&location, limits(), TestAmbient::new()).await.unwrap();
    assert!(load(&store, saved.id, 0).await.unwrap() == one);
    assert!(load(&store, saved.id, 1).await.unwrap() == two);
    assert!(load(&store, saved.id, 2).await.unwrap().is_empty());
    let listed = store.list(None, 10).await.unwrap();
    assert_eq!(listed.checkpoints.len(), 1);
    assert_eq!(listed.checkpoints[0].manifest.as_ref().unwrap(), &saved);
    let verified = store.verify(saved.id, |_| {}).await.unwrap();
    assert_eq!((verified.plain_bytes, verified.problems.len()), (3_500_000, 0));
}

#[tokio::test]
async fn a_second_save_adds_little() {
    let ambient = TestAmbient::new();
    let (store, _) = in_memory(&ambient).await;
    let first = noise(1, 16 << 20);
    save(&store, &[&first]).await.unwrap();
    let mut second = first.clone();
    second.splice(5000..5000, *b"put in near the start");
    second[9 << 20..(9 << 20) + (16 << 20) / 100].copy_from_slice(&noise(2, (16 << 20) / 100));
    let saved = save(&store, &[&second]).await.unwrap();
    assert!(saved.added.stored_bytes * 20 < second.len() as u64, "{:?}", saved.added);
    assert!(load(&store, saved.id, 0).await.unwrap() == second);
    // The same once more, in a set with another device.
    let again =
        save_as(&store, vec![format!("{:032x}", 0), "other".to_owned()], &[&second, b"x"]).await.unwrap();
    assert_eq!(again.added.chunks, 1);
}

#[tokio::test]
async fn pages_go_from_the_newest_to_the_oldest() {
    let ambient = TestAmbient::new();
    let (store, _) = in_memory(&ambient).await;
    let mut made = Vec::new();
    for index in 0..5_u8 {
        made.push(save(&store, &[&[index; 10]]).await.unwrap().id);
    }
    made.reverse();
    let (mut found, mut before) = (Vec::new(), None);
    loop {
        let page = store.list(before, 2).await.unwrap();
        assert!(page.checkpoints.len() <= 2);
        found.extend(page.checkpoints.iter().map(|listed| listed.id));
        before = page.next;
        if before.is_none() {
            break;
        }
    }
    assert_eq!(found, made);
}

#[tokio::test]
async fn what_is_deleted_goes_with_the_next_collection_and_nothing_else_does() {
    let ambient = TestAmbient::new();
    let (store, bucket) = in_memory(&ambient).await;
    let (shared, own) = (noise(1, 300_000), noise(2, 300_000));
    let first = save(&store, &[&shared, &own]).await.unwrap();
    let second = save_as(&store, vec![format!("{:032x}", 0)], &[&shared]).await.unwrap();
    assert_eq!(second.added.chunks, 0);
    store.delete(first.id).await.unwrap();
    assert!(matches!(store.get(first.id).await, Err(StoreError::NotFound { .. })));
    assert!(matches!(store.delete(first.id).await, Err(StoreError::NotFound { .. })));

    let collected = store.collect().await.unwrap();
    assert_eq!(collected.chunks, first.states[1].chunks);
    assert_eq!(assert_all_whole(&store).await, [second.id]);
    assert_eq!(store.collect().await.unwrap(), super::super::Collected::default());

    // Its last traces go when nobody can come late any more.
    assert_eq!(names(&bucket, &format!("checkpoints/{}", first.id)).await.len(), 3);
    assert_eq!(impatient(&store).collect().await.unwrap().cleared, 1);
    assert_eq!(names(&bucket, &format!("checkpoints/{}", first.id)).await, Vec::<String>::new());
    assert_eq!(names(&bucket, &format!("devices/{:032x}", 1)).await, Vec::<String>::new());
    assert_eq!(assert_all_whole(&store).await, [second.id]);
}

#[tokio::test]
async fn a_save_that_is_given_up_leaves_nothing() {
    let ambient = TestAmbient::new();
    let (store, bucket) = in_memory(&ambient).await;
    let begin = |id| crate::Begin { id, logical_devices: vec![super::NIC.to_owned()], reserve_bytes: 0 };
    let mut writer = store.begin(begin(store.new_id())).await.unwrap();
    writer.chunk(0, noise(1, 500_000).into()).await.unwrap();
    writer.abort().await;
    // Not whole when it is committed.
    let mut writer = store.begin(begin(store.new_id())).await.unwrap();
    writer.chunk(0, noise(1, 500_000).into()).await.unwrap();
    let refused = writer.commit(serde_json::Value::Null).await.unwrap_err();
    assert_eq!(refused.to_string(), "states: state 0 is not whole yet");
    for below in ["chunks", "checkpoints", "intents", "devices"] {
        assert_eq!(names(&bucket, below).await, Vec::<String>::new());
    }
}

#[tokio::test]
async fn a_writer_that_is_gone_is_revoked_and_collected() {
    let ambient = TestAmbient::new();
    let (store, bucket) = in_memory(&ambient).await;
    let begin =
        crate::Begin { id: store.new_id(), logical_devices: vec![super::NIC.to_owned()], reserve_bytes: 0 };
    let mut writer = store.begin(begin).await.unwrap();
    writer.chunk(0, noise(1, 500_000).into()).await.unwrap();
    writer.finish(0).await.unwrap();
    let id = writer.id();
    assert_eq!(store.collect().await.unwrap().chunks, 0, "it is at work");

    // A collector whose own clock is wrong does not take it for gone.
    ambient.advance(Duration::from_hours(24 * 31));
    assert_eq!(store.collect().await.unwrap().revoked, 0);
    let collected = impatient(&store).collect().await.unwrap();
    assert_eq!((collected.revoked, collected.cleared), (1, 0));
    // And then it wakes up.
    let refused = writer.commit(serde_json::Value::Null).await.unwrap_err();
    assert!(matches!(refused, StoreError::Revoked { id: said } if said == id), "{refused}");
    assert_eq!(names(&bucket, "chunks").await, Vec::<String>::new());
    assert!(assert_all_whole(&store).await.is_empty());
    assert!(matches!(store.get(id).await, Err(StoreError::NotFound { .. })));
}

#[tokio::test]
async fn marks_stay_and_an_inconsistent_checkpoint_says_so() {
    let ambient = TestAmbient::new();
    let (store, _) = in_memory(&ambient).await;
    let saved = save(&store, &[b"state"]).await.unwrap();
    assert!(!store.get(saved.id).await.unwrap().is_inconsistent);
    store.mark_inconsistent(saved.id).await.unwrap();
    assert!(store.get(saved.id).await.unwrap().is_inconsistent);
    assert!(store.list(None, 1).await.unwrap().checkpoints[0].is_inconsistent);
    assert!(matches!(store.mark_inconsistent(store.new_id()).await, Err(StoreError::NotFound { .. })));
}

#[tokio::test]
async fn a_bucket_that_holds_something_else_is_refused() {
    let bucket = crate::bucket::Bucket::remote("memory", Arc::new(object_store::memory::InMemory::new()));
    bucket.put(&"photos/1.jpg".into(), "x".into()).await.unwrap();
    let refused = Store::over(bucket, limits(), TestAmbient::new()).await.unwrap_err();
    assert!(refused.to_string().contains("give it a place of its own"), "{refused}");
}
