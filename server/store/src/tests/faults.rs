//! A store that fails: full disks, lost answers, races for a name, torn writes.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use object_store::{Error, Result};

use super::between::{Ask, Between, Wrapped};
use super::{TestAmbient, assert_all_whole, in_memory, limits, load, names, noise, save};
use crate::bucket::Bucket;
use crate::{Store, StoreError};

/// What a request fails with, and when.
#[derive(Debug, Clone, Copy)]
enum Fault {
    /// Before it is carried out: nothing happens.
    Fails(io::ErrorKind),
    /// After it was carried out: it happens, and nobody is told.
    AnswerLost,
}

/// Fails the request of this number, and where it is said so each one after it.
#[derive(Debug)]
struct FailsAt {
    fault: Fault,
    at: usize,
    is_for_good: bool,
    asked: AtomicUsize,
}

impl FailsAt {
    fn is_now(&self) -> bool {
        let number = self.asked.load(Ordering::SeqCst);
        number == self.at || (self.is_for_good && number > self.at)
    }

    fn error(&self) -> Error {
        let kind = match self.fault {
            Fault::Fails(kind) => kind,
            Fault::AnswerLost => io::ErrorKind::ConnectionReset,
        };
        Error::Generic { store: "a store that fails", source: io::Error::from(kind).into() }
    }
}

impl Between for FailsAt {
    fn before(&self, _ask: Ask, _at: String) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            self.asked.fetch_add(1, Ordering::SeqCst);
            match self.fault {
                Fault::Fails(_) if self.is_now() => Err(self.error()),
                Fault::Fails(_) | Fault::AnswerLost => Ok(()),
            }
        })
    }

    fn after(&self, ask: Ask, _at: String) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            match self.fault {
                // An answer with bytes is asked for again by whoever reads; a lost one is a failed one.
                Fault::AnswerLost if self.is_now() && ask != Ask::Get => Err(self.error()),
                Fault::AnswerLost | Fault::Fails(_) => Ok(()),
            }
        })
    }
}

struct Case {
    store: Store,
    free: Store,
    bucket: Bucket,
    fails: Arc<FailsAt>,
}

async fn case(fault: Fault, at: usize, is_for_good: bool) -> Case {
    let ambient = TestAmbient::new();
    let (free, bucket) = in_memory(&ambient).await;
    save(&free, &[&noise(1, 100_000)]).await.unwrap();
    let fails = Arc::new(FailsAt { fault, at, is_for_good, asked: AtomicUsize::new(0) });
    let behind = bucket.behind(|inner| Arc::new(Wrapped { inner, between: Arc::clone(&fails) }));
    let store = Store { bucket: behind, limits: Arc::new(limits()), ambient: ambient as _ };
    Case { store, free, bucket, fails }
}

/// Every request of a save fails once: the checkpoint is there whole, or it is not there, and what is said is true.
#[tokio::test]
async fn whichever_request_fails_a_checkpoint_is_there_whole_or_not_at_all() {
    let faults = [
        Fault::Fails(io::ErrorKind::StorageFull),
        Fault::Fails(io::ErrorKind::Other),
        Fault::Fails(io::ErrorKind::ConnectionReset),
        Fault::AnswerLost,
    ];
    let state = noise(2, 200_000);
    for fault in faults {
        for is_for_good in [false, true] {
            let (mut at, mut failed, mut succeeded) = (1, 0, 0);
            loop {
                let Case { store, free, fails, .. } = case(fault, at, is_for_good).await;
                let saved = save(&store, &[&state]).await;
                let listed = assert_all_whole(&free).await;
                match &saved {
                    Ok(saved) => {
                        succeeded += 1;
                        assert!(listed.contains(&saved.id), "{fault:?} at {at}");
                        assert!(load(&free, saved.id, 0).await.unwrap() == state);
                    }
                    Err(_) if is_for_good => {
                        failed += 1;
                        // Nobody could tell. What is there is whole, as was seen above.
                        assert!((1..=2).contains(&listed.len()));
                    }
                    Err(error) => {
                        failed += 1;
                        assert_eq!(listed.len(), 1, "{fault:?} at {at}: {error}");
                    }
                }
                if fails.asked.load(Ordering::SeqCst) < at {
                    assert!(saved.is_ok());
                    break;
                }
                at += 1;
            }
            assert!(at > 15 && failed > 0 && succeeded > 0, "{fault:?}: {at} requests, {failed} failed");
        }
    }
}

#[tokio::test]
async fn a_full_disk_is_called_one_and_leaves_nothing() {
    // The first request that writes a chunk.
    let mut seen = false;
    for at in 1..20 {
        let Case { store, bucket, .. } = case(Fault::Fails(io::ErrorKind::StorageFull), at, false).await;
        let before = names(&bucket, "chunks").await;
        if let Err(error) = save(&store, &[&noise(2, 200_000)]).await
            && let StoreError::DiskFull { key, .. } = &error
            && key.starts_with("chunks/")
        {
            seen = true;
            assert!(error.to_string().contains("disk became full"), "{error}");
            assert_eq!(names(&bucket, "chunks").await, before);
            assert_eq!(names(&bucket, "intents").await, Vec::<String>::new());
        }
    }
    assert!(seen);
}

/// A collection that fails anywhere is finished by the next one, and nothing that is needed is lost.
#[tokio::test]
async fn whichever_request_of_a_collection_fails_nothing_is_lost() {
    for fault in [Fault::Fails(io::ErrorKind::Other), Fault::AnswerLost] {
        let mut at = 1;
        loop {
            let Case { store, free, bucket, fails } = case(fault, at, false).await;
            let kept = save(&free, &[&noise(1, 100_000), &noise(3, 100_000)]).await.unwrap();
            let gone = save(&free, &[&noise(1, 100_000), &noise(4, 100_000)]).await.unwrap();
            free.delete(gone.id).await.unwrap();
            let collected = store.collect().await;
            let is_over = fails.asked.load(Ordering::SeqCst) < at;
            assert_eq!(collected.is_ok(), is_over || collected.is_ok());
            assert!(assert_all_whole(&free).await.contains(&kept.id));
            free.collect().await.unwrap();
            assert!(assert_all_whole(&free).await.contains(&kept.id));
            let chunks = names(&bucket, "chunks").await.len() as u64;
            assert_eq!(
                chunks,
                kept.states.iter().map(|state| state.chunks).sum::<u64>(),
                "{fault:?} at {at}"
            );
            assert_eq!(names(&bucket, "condemned").await, Vec::<String>::new());
            if is_over {
                break;
            }
            at += 1;
        }
        assert!(at > 10);
    }
}

/// Two for one name: one of them wins, and the other is told.
#[tokio::test]
async fn of_two_that_create_a_manifest_one_wins() {
    let ambient = TestAmbient::new();
    let (_, bucket) = in_memory(&ambient).await;
    for round in 0..50 {
        let at = object_store::path::Path::from(format!("checkpoints/{round}/manifest"));
        let (one, two) = tokio::join!(
            bucket.create(&at, Bytes::from_static(b"one")),
            bucket.create(&at, Bytes::from_static(b"two"))
        );
        let there = bucket.get(&at, 10).await.unwrap().unwrap();
        let won = [(one.unwrap(), b"one"), (two.unwrap(), b"two")]
            .into_iter()
            .filter(|(created, _)| *created == crate::bucket::Created::Yes);
        assert_eq!(won.map(|(_, text)| text.to_vec()).collect::<Vec<_>>(), [there.to_vec()]);
    }
}
