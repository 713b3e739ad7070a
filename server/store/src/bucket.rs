//! The few things that are asked of an object store, with bounds, and with errors that name the object.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _};
use object_store::path::Path;
use object_store::{Error, GetOptions, ObjectMeta, ObjectStore, ObjectStoreExt as _, PutMode, PutPayload};

use crate::key;
use crate::local::LocalFolder;
use crate::{CheckpointId, StoreError};

/// What the marker of a store says.
const MARKER_TEXT: &str = "vfio-checkpoint store, format 1\n";
/// The most objects that a listing keeps: of checkpoints, writers and marks, never of chunks. About 30 MiB.
const MOST_LISTED: usize = 256 << 10;

/// An object store, seen through what this crate needs of it.
#[derive(Debug, Clone)]
pub(crate) struct Bucket {
    name: Arc<str>,
    objects: Arc<dyn ObjectStore>,
    /// Does not make every single write durable; [`Bucket::flush`] does.
    quick: Arc<dyn ObjectStore>,
    local: Option<Arc<LocalFolder>>,
}

/// An object that is there.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    pub path: Path,
    pub bytes: u64,
    pub modified: SystemTime,
}

/// What came of creating an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Created {
    /// It is there, as it was given.
    Yes,
    /// Another was there before.
    Taken,
}

impl Bucket {
    /// A remote store, where an answer means that it is durable.
    pub(crate) fn remote(name: &str, objects: Arc<dyn ObjectStore>) -> Self {
        Self { name: name.into(), quick: Arc::clone(&objects), objects, local: None }
    }

    /// A folder of this machine.
    pub(crate) fn local(folder: LocalFolder) -> Self {
        let name = folder.path().display().to_string().into();
        let (objects, quick) = (folder.durable(), folder.quick());
        Self { name, objects, quick, local: Some(Arc::new(folder)) }
    }

    /// The same bucket behind something that gets in the way.
    #[cfg(test)]
    pub(crate) fn behind(&self, wrap: impl Fn(Arc<dyn ObjectStore>) -> Arc<dyn ObjectStore>) -> Self {
        Self {
            name: Arc::clone(&self.name),
            objects: wrap(Arc::clone(&self.objects)),
            quick: wrap(Arc::clone(&self.quick)),
            local: self.local.clone(),
        }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn folder(&self) -> Option<&Arc<LocalFolder>> {
        self.local.as_ref()
    }

    /// Marks a new store as one, or finds that it is one.
    pub(crate) async fn claim(&self) -> Result<(), StoreError> {
        let marker = Path::from(key::MARKER);
        let foreign =
            |problem: &str| StoreError::Foreign { name: self.name.to_string(), problem: problem.into() };
        if let Some(text) = self.get(&marker, 4096).await? {
            return if text == MARKER_TEXT.as_bytes() {
                Ok(())
            } else {
                Err(foreign("its marker is of another format; use a version that reads it"))
            };
        }
        let mut listed = self.objects.list(None);
        match listed.next().await {
            None => {}
            Some(Ok(_)) => {
                return Err(foreign("it holds other things and no marker; give it a place of its own"));
            }
            Some(Err(error)) => return Err(StoreError::answered("list", &self.name, error)),
        }
        drop(listed);
        // Another agent may do the same at this moment, with the same text.
        self.create(&marker, Bytes::from_static(MARKER_TEXT.as_bytes())).await?;
        Ok(())
    }

    /// Creates an object that must not be there yet. Whatever happens to the answer, what is told is what is true.
    pub(crate) async fn create(&self, at: &Path, bytes: Bytes) -> Result<Created, StoreError> {
        match self.objects.put_opts(at, PutPayload::from_bytes(bytes.clone()), PutMode::Create.into()).await {
            Ok(_) => Ok(Created::Yes),
            Err(error) => {
                // Also where it was taken: by this very request, where its answer was lost and it was sent again.
                match self.get(at, bytes.len() as u64 + 1).await {
                    Ok(Some(found)) if found == bytes => {
                        // It may be there and not be durable, where the disk refused that.
                        self.flush().await?;
                        Ok(Created::Yes)
                    }
                    Ok(Some(_)) | Err(StoreError::Damaged { .. }) => Ok(Created::Taken),
                    Ok(None) | Err(_) => Err(StoreError::answered("create", at, error)),
                }
            }
        }
    }

    /// Writes an object, whether it was there before or not.
    pub(crate) async fn put(&self, at: &Path, bytes: Bytes) -> Result<(), StoreError> {
        let put = self.objects.put_opts(at, PutPayload::from_bytes(bytes), PutMode::Overwrite.into()).await;
        put.map(drop).map_err(|error| StoreError::answered("write", at, error))
    }

    /// Writes a chunk. It is durable after the next [`Self::flush`].
    pub(crate) async fn put_chunk(&self, at: &Path, bytes: Bytes) -> Result<(), StoreError> {
        let put = self.quick.put_opts(at, PutPayload::from_bytes(bytes), PutMode::Overwrite.into()).await;
        put.map(drop).map_err(|error| StoreError::answered("write", at, error))
    }

    /// All that was written before is durable after this.
    pub(crate) async fn flush(&self) -> Result<(), StoreError> {
        match &self.local {
            Some(folder) => folder.flush().await,
            None => Ok(()),
        }
    }

    /// An object of at most so many bytes, if it is there.
    pub(crate) async fn get(&self, at: &Path, most_bytes: u64) -> Result<Option<Bytes>, StoreError> {
        let got = match self.objects.get_opts(at, GetOptions::default()).await {
            Ok(got) => got,
            Err(Error::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(StoreError::answered("read", at, error)),
        };
        let says = got.meta.size;
        let too_long = |bytes: u64| {
            StoreError::damaged(
                at,
                format!("it has {bytes} bytes or more, and at most {most_bytes} are possible"),
            )
        };
        if says > most_bytes {
            return Err(too_long(says));
        }
        let mut stream = got.into_stream();
        let mut all = bytes::BytesMut::with_capacity(usize::try_from(says).unwrap_or(0));
        while let Some(part) =
            stream.try_next().await.map_err(|error| StoreError::answered("read", at, error))?
        {
            // It may grow while it is read, and a server may say one length and send another.
            if (all.len() + part.len()) as u64 > most_bytes {
                return Err(too_long((all.len() + part.len()) as u64));
            }
            all.extend_from_slice(&part);
        }
        Ok(Some(all.freeze()))
    }

    /// Whether an object is there.
    pub(crate) async fn has(&self, at: &Path) -> Result<bool, StoreError> {
        match self.objects.head(at).await {
            Ok(_) => Ok(true),
            Err(Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(StoreError::answered("look at", at, error)),
        }
    }

    /// How long an object is, if it is there.
    pub(crate) async fn length(&self, at: &Path) -> Result<Option<u64>, StoreError> {
        match self.objects.head(at).await {
            Ok(meta) => Ok(Some(meta.size)),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(StoreError::answered("look at", at, error)),
        }
    }

    /// What time it is by the store's own clock, which is the one that its objects have their times from.
    pub(crate) async fn now(&self, unique: CheckpointId) -> Result<SystemTime, StoreError> {
        let at = key::clock(unique);
        self.put(&at, Bytes::new()).await?;
        let meta =
            self.objects.head(&at).await.map_err(|error| StoreError::answered("look at", &at, error))?;
        self.delete(&at).await?;
        Ok(meta.last_modified.into())
    }

    /// Whether a local store has room for so many bytes beside what is to stay free.
    pub(crate) async fn check_room(&self, bytes: u64, keep_free_bytes: u64) -> Result<(), StoreError> {
        match &self.local {
            Some(folder) => folder.check_room(bytes, keep_free_bytes).await,
            None => Ok(()),
        }
    }

    /// Makes sure that what frees space has a little of it. Ended by [`Self::after_freeing`].
    pub(crate) async fn before_freeing(&self) {
        if let Some(folder) = &self.local {
            folder.drop_ballast().await;
        }
    }

    pub(crate) async fn after_freeing(&self) {
        if let Some(folder) = &self.local {
            folder.take_ballast().await;
        }
    }

    /// Removes what writers of a local store left half written that died, if it is older than this.
    pub(crate) async fn sweep(&self, older_than: Duration) -> Result<u64, StoreError> {
        match &self.local {
            Some(folder) => folder.sweep(older_than).await,
            None => Ok(0),
        }
    }

    /// Removes an object; one that is not there is none to complain about.
    pub(crate) async fn delete(&self, at: &Path) -> Result<(), StoreError> {
        match self.objects.delete(at).await {
            Ok(()) | Err(Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(StoreError::answered("delete", at, error)),
        }
    }

    /// All objects below `at`, in no order.
    pub(crate) async fn list(&self, at: &Path) -> Result<Vec<Found>, StoreError> {
        let mut all = Vec::new();
        let mut is_too_long = false;
        self.each(at, |found| {
            is_too_long = all.len() == MOST_LISTED;
            if !is_too_long {
                all.push(found);
            }
            !is_too_long
        })
        .await?;
        if is_too_long {
            return Err(StoreError::TooLarge {
                what: "a listing of the store",
                bytes: all.len() as u64,
                most_bytes: MOST_LISTED as u64,
            });
        }
        Ok(all)
    }

    /// Shows each object below `at`, in no order, until `see` has seen enough.
    pub(crate) async fn each(&self, at: &Path, mut see: impl FnMut(Found) -> bool) -> Result<(), StoreError> {
        let mut listed = self.objects.list(Some(at));
        while let Some(meta) = listed.next().await {
            let meta: ObjectMeta = match meta {
                Ok(meta) => meta,
                // Removed while it was listed.
                Err(Error::NotFound { .. }) => continue,
                Err(error) => return Err(StoreError::answered("list", at, error)),
            };
            let found = Found { path: meta.location, bytes: meta.size, modified: meta.last_modified.into() };
            if !see(found) {
                break;
            }
        }
        Ok(())
    }
}
