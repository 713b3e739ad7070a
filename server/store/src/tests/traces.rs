//! What saves leave that never came to be, and who clears it away.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::future::BoxFuture;
use object_store::{Error, Result};
use serde_json::Value;
use tokio::sync::Notify;

use super::between::{Ask, Between, Wrapped};
use super::{NIC, TestAmbient, impatient, in_memory, limits, names, noise, save, save_as};
use crate::key::{self, Part};
use crate::{Begin, Collected, Store, StoreError};

/// Everything but the store's marker.
async fn left(bucket: &crate::bucket::Bucket) -> Vec<String> {
    let mut left = Vec::new();
    for below in [key::CHUNKS, key::CHECKPOINTS, key::DEVICES, key::INTENTS, key::CONDEMNED] {
        left.extend(names(bucket, below).await);
    }
    left
}

fn begin(store: &Store) -> Begin {
    Begin { id: store.new_id(), logical_devices: vec![NIC.to_owned()], reserve_bytes: 0 }
}

/// Fails the first manifest before it is there.
#[derive(Debug, Default)]
struct NoManifest(AtomicBool);

impl Between for NoManifest {
    fn before(&self, ask: Ask, at: String) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            if ask == Ask::Put && at.ends_with("/manifest") && !self.0.swap(true, Ordering::SeqCst) {
                return Err(Error::Generic { store: "a test", source: "no manifest".into() });
            }
            Ok(())
        })
    }
}

/// The word that the writer was revoked is no checkpoint, and has a mark, by which it is found when it is time for it to go.
#[tokio::test]
async fn what_a_writer_revoked_itself_is_marked_and_goes_in_the_end() {
    let ambient = TestAmbient::new();
    let (free, bucket) = in_memory(&ambient).await;
    let behind = bucket.behind(|inner| Arc::new(Wrapped { inner, between: Arc::new(NoManifest::default()) }));
    let store = Store { bucket: behind, ..free.clone() };
    let begin = begin(&store);
    let id = begin.id;
    let mut writer = store.begin(begin).await.unwrap();
    writer.chunk(0, noise(1, 200_000).into()).await.unwrap();
    writer.finish(0).await.unwrap();
    let failed = writer.commit(Value::Null).await.unwrap_err();
    assert!(format!("{failed:?}").contains("no manifest"), "{failed:?}");
    assert!(matches!(free.get(id).await, Err(StoreError::NotFound { .. })));
    assert!(free.list(None, 10).await.unwrap().checkpoints.is_empty());
    // The word and its mark; of chunks, table, pointers and intent nothing.
    let expected = [Part::Deleted, Part::Manifest].map(|part| key::part(id, part).to_string());
    assert_eq!(left(&bucket).await, expected);
    let taken = free.begin(Begin { id, logical_devices: vec![NIC.to_owned()], reserve_bytes: 0 }).await;
    assert!(matches!(taken, Err(StoreError::Invalid { field: "id", .. })), "a name is never used again");

    assert_eq!(free.collect().await.unwrap(), Collected::default(), "somebody may come late");
    assert_eq!(impatient(&free).collect().await.unwrap().cleared, 1);
    assert_eq!(left(&bucket).await, Vec::<String>::new());
}

/// A writer whose intent is gone was taken for gone. It finds out before it uploads any more.
#[tokio::test(start_paused = true)]
async fn a_writer_that_was_taken_for_gone_finds_out_in_the_middle() {
    let ambient = TestAmbient::new();
    let (store, bucket) = in_memory(&ambient).await;
    let mut writer = store.begin(begin(&store)).await.unwrap();
    writer.chunk(0, noise(1, 200_000).into()).await.unwrap();
    tokio::time::sleep(limits().renew_interval * 2).await;
    writer.chunk(0, noise(2, 200_000).into()).await.unwrap();
    assert_eq!(impatient(&store).collect().await.unwrap().revoked, 1);
    tokio::time::sleep(limits().renew_interval * 2).await;
    let (id, refused) = (writer.id(), writer.chunk(0, noise(3, 200_000).into()).await.unwrap_err());
    assert!(matches!(refused, StoreError::Revoked { id: said } if said == id), "{refused}");
    let refused = writer.finish(0).await.unwrap_err();
    assert!(matches!(refused, StoreError::Revoked { .. }), "{refused}");
    writer.abort().await;
    impatient(&store).collect().await.unwrap();
    assert_eq!(left(&bucket).await, Vec::<String>::new());
}

/// Never lets a manifest through, as where the writer is killed before it.
#[derive(Debug, Default)]
struct Killed(Notify);

impl Between for Killed {
    fn before(&self, ask: Ask, at: String) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            if ask == Ask::Put && at.ends_with("/manifest") {
                self.0.notify_one();
                std::future::pending::<()>().await;
            }
            Ok(())
        })
    }
}

/// A writer that is gone once everything but its manifest is there: as soon as it is revoked, nothing leads to
/// it any more, so the next save builds on what there really is.
#[tokio::test]
async fn saves_that_were_killed_do_not_stand_in_the_way_of_what_there_is_to_build_on() {
    let ambient = TestAmbient::new();
    let (store, bucket) = in_memory(&ambient).await;
    let state = noise(1, 300_000);
    let base = save_as(&store, vec![NIC.to_owned()], &[&state]).await.unwrap();
    for _ in 0..3 {
        let between = Arc::new(Killed::default());
        let behind = bucket.behind(|inner| Arc::new(Wrapped { inner, between: Arc::clone(&between) }));
        let killed = Store { bucket: behind, ..store.clone() };
        let mut writer = killed.begin(begin(&killed)).await.unwrap();
        writer.chunk(0, state.clone().into()).await.unwrap();
        writer.finish(0).await.unwrap();
        tokio::select! {
            () = between.0.notified() => {}
            committed = writer.commit(Value::Null) => panic!("it was not stopped: {committed:?}"),
        }
    }
    assert_eq!(names(&bucket, key::DEVICES).await.len(), 4);
    let gone = crate::Limits { abandoned_after: Duration::ZERO, ..limits() };
    let collector = Store { limits: Arc::new(gone), ..store.clone() };
    assert_eq!(collector.collect().await.unwrap().revoked, 3);
    assert_eq!(names(&bucket, key::DEVICES).await, [key::device_has(NIC, base.id).to_string()]);
    let next = save_as(&store, vec![NIC.to_owned()], &[&state]).await.unwrap();
    assert_eq!(next.added.chunks, 0, "it builds on what there is");
}

/// Of a damaged manifest nobody can tell whose states it had, and what leads to it goes all the same.
#[tokio::test]
async fn what_leads_to_a_damaged_checkpoint_goes_with_it() {
    let ambient = TestAmbient::new();
    let (store, bucket) = in_memory(&ambient).await;
    let saved = save(&store, &[b"one", b"two"]).await.unwrap();
    bucket.put(&key::part(saved.id, Part::Manifest), "{}".into()).await.unwrap();
    store.delete(saved.id).await.unwrap();
    // Before its traces are cleared away it names chunks that nobody can tell: then they go.
    assert_eq!(impatient(&store).collect().await.unwrap().cleared, 1);
    assert_eq!(left(&bucket).await, Vec::<String>::new());
}

/// Each of the two looks that a writer takes after its intent holds by itself: at what is condemned, whoever condemned it,
/// and at whether a base was deleted meanwhile, whether or not a collector was there yet.
#[tokio::test]
async fn a_save_builds_on_nothing_that_is_about_to_go() {
    let ambient = TestAmbient::new();
    let (store, bucket) = in_memory(&ambient).await;
    let state = noise(1, 200_000);
    let base = save_as(&store, vec![NIC.to_owned()], &[&state]).await.unwrap();
    let (_, chunks) = bucket.read_whole(base.id).await.unwrap().unwrap();
    let word = key::condemned(store.new_id());
    bucket.put(&word, chunks.encode()).await.unwrap();
    let anew = save_as(&store, vec![NIC.to_owned()], &[&state]).await.unwrap();
    assert_eq!(anew.added.chunks, base.states[0].chunks, "condemned, and built on");
    bucket.delete(&word).await.unwrap();

    store.delete(base.id).await.unwrap();
    store.delete(anew.id).await.unwrap();
    let last = save_as(&store, vec![NIC.to_owned()], &[&state]).await.unwrap();
    assert_eq!(last.added.chunks, base.states[0].chunks, "deleted, and built on");
}

/// It slept for so long that even the word that it was revoked is gone, and with it what holds its name. Its chunks are gone as
/// well, so a manifest would be that of half a checkpoint.
#[tokio::test]
async fn a_writer_that_slept_until_its_name_was_free_again_makes_no_checkpoint() {
    let ambient = TestAmbient::new();
    let (store, bucket) = in_memory(&ambient).await;
    let mut writer = store.begin(begin(&store)).await.unwrap();
    writer.chunk(0, noise(1, 200_000).into()).await.unwrap();
    writer.finish(0).await.unwrap();
    let collector = impatient(&store);
    assert_eq!(collector.collect().await.unwrap().revoked, 1);
    assert_eq!(collector.collect().await.unwrap().cleared, 1);
    // Its last uploads may come later still: it is alive.
    for below in [key::CHECKPOINTS, key::INTENTS] {
        assert_eq!(names(&bucket, below).await, Vec::<String>::new(), "its name is free");
    }
    let refused = writer.commit(Value::Null).await.unwrap_err();
    assert!(matches!(refused, StoreError::Revoked { .. }), "{refused}");
    assert_eq!(left(&bucket).await, Vec::<String>::new());
}
