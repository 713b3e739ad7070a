//! A store in a folder of this machine: `object_store`'s own, behind a guard.
//!
//! The folder is for its owner only, because device state may hold secrets. Every path is looked at before it is used:
//! no part of it may be a symbolic link, and what is opened must be a regular file, and the very one that was looked at. That
//! finds links that somebody planted. Whoever can change the folder while the agent works is its owner.
//!
//! Single chunks are not synced: [`LocalFolder::flush`] syncs the file system once, before a manifest is created.
//! What a power cut tears has no manifest, and its name is never used again.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path as FsPath, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::BoxStream;
use futures_util::{StreamExt as _, TryStreamExt as _};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, Stat, fstat, openat2};

use crate::{StoreError, key};

/// A path that the guard does not let through.
#[derive(Debug, thiserror::Error)]
#[error("{} is a symbolic link or no regular file", .0.display())]
pub(crate) struct NotRegular(pub PathBuf);

/// The folder of a store.
#[derive(Debug)]
pub(crate) struct LocalFolder {
    path: PathBuf,
    root: Arc<OwnedFd>,
    durable: Arc<Guarded>,
    quick: Arc<Guarded>,
}

impl LocalFolder {
    /// Opens a folder, and makes it where it is missing and may be made.
    pub(crate) async fn open(path: PathBuf, may_make: bool) -> std::result::Result<Self, StoreError> {
        off_runtime(move || Self::open_now(path, may_make)).await?
    }

    fn open_now(path: PathBuf, may_make: bool) -> std::result::Result<Self, StoreError> {
        use std::os::unix::fs::DirBuilderExt as _;
        let failed = |what, source| StoreError::Folder { what, path: path.clone(), source };
        if may_make {
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&path)
                .map_err(|source| failed("make the folder", source))?;
        }
        let path = std::fs::canonicalize(&path).map_err(|source| failed("find the folder", source))?;
        let failed = |what, source| StoreError::Folder { what, path: path.clone(), source };
        let root =
            rustix::fs::open(&path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
                .map_err(|errno| failed("open the folder", errno.into()))?;
        let stat = fstat(&root).map_err(|errno| failed("look at the folder", errno.into()))?;
        if stat.st_mode & 0o077 != 0 {
            tracing::warn!(
                folder = %path.display(),
                mode = format_args!("{:o}", stat.st_mode & 0o7777),
                "others than its owner can reach the store, and device state may hold secrets: chmod 700"
            );
        }
        let root = Arc::new(root);
        let guarded = |fsync| -> std::result::Result<Arc<Guarded>, StoreError> {
            let inner = LocalFileSystem::new_with_prefix(&path)
                .map_err(|source| StoreError::answered("open", &path.display(), source))?
                .with_fsync(fsync);
            Ok(Arc::new(Guarded {
                inner,
                guard: Guard { path: path.clone().into(), root: Arc::clone(&root) },
            }))
        };
        let (durable, quick) = (guarded(true)?, guarded(false)?);
        Ok(Self { path, root, durable, quick })
    }

    pub(crate) fn path(&self) -> &FsPath {
        &self.path
    }

    pub(crate) fn root(&self) -> &Arc<OwnedFd> {
        &self.root
    }

    pub(crate) fn durable(&self) -> Arc<dyn ObjectStore> {
        Arc::clone(&self.durable) as Arc<dyn ObjectStore>
    }

    pub(crate) fn quick(&self) -> Arc<dyn ObjectStore> {
        Arc::clone(&self.quick) as Arc<dyn ObjectStore>
    }

    /// Syncs the file system that the folder is on.
    pub(crate) async fn flush(&self) -> std::result::Result<(), StoreError> {
        let root = Arc::clone(&self.root);
        let synced = off_runtime(move || rustix::fs::syncfs(&*root)).await?;
        synced.map_err(|errno| StoreError::Folder {
            what: "sync the file system of",
            path: self.path.clone(),
            source: errno.into(),
        })
    }
}

impl LocalFolder {
    /// Removes staged files that were never published, because their writer died.
    pub(crate) async fn sweep(&self, older_than: Duration) -> std::result::Result<u64, StoreError> {
        let root = self.path.clone();
        off_runtime(move || {
            let mut swept = 0;
            for below in [key::CHUNKS, key::CHECKPOINTS, key::DEVICES, key::INTENTS, key::CONDEMNED] {
                sweep(&root.join(below), older_than, 3, &mut swept);
            }
            swept
        })
        .await
    }
}

/// What cannot be looked at or removed stays for the next time.
fn sweep(folder: &FsPath, older_than: Duration, deep: usize, swept: &mut u64) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for entry in entries.filter_map(std::result::Result::ok) {
        // Of the entry itself: a link is not followed.
        let Ok(metadata) = entry.metadata() else { continue };
        if metadata.is_dir() && deep > 0 {
            sweep(&entry.path(), older_than, deep - 1, swept);
        }
        let name = entry.file_name();
        let staged = name.to_str().and_then(|name| name.rsplit_once('#')).is_some_and(|(_, number)| {
            !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
        });
        let age = metadata.modified().ok().and_then(|modified| modified.elapsed().ok());
        if metadata.is_file()
            && staged
            && age.is_some_and(|age| age >= older_than)
            && std::fs::remove_file(entry.path()).is_ok()
        {
            *swept += 1;
        }
    }
}

/// Runs what may block where it may.
pub(crate) async fn off_runtime<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> std::result::Result<T, StoreError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| StoreError::Died)
}

/// Looks at paths.
#[derive(Debug, Clone)]
struct Guard {
    path: Arc<FsPath>,
    root: Arc<OwnedFd>,
}

impl Guard {
    /// What is there, if anything is, with no link on the way. Anything but a regular file is refused.
    fn look(&self, at: &str) -> io::Result<Option<Stat>> {
        let refused = || io::Error::other(NotRegular(self.path.join(at)));
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let found = match openat2(&*self.root, at, flags, Mode::empty(), resolve) {
            Ok(found) => found,
            Err(rustix::io::Errno::NOENT) => return Ok(None),
            Err(rustix::io::Errno::LOOP | rustix::io::Errno::XDEV | rustix::io::Errno::NOTDIR) => {
                return Err(refused());
            }
            Err(errno) => return Err(errno.into()),
        };
        let stat = fstat(&found)?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile {
            Ok(Some(stat))
        } else {
            Err(refused())
        }
    }

    async fn check(&self, at: &Path) -> Result<Option<Stat>> {
        let (guard, text) = (self.clone(), at.to_string());
        let looked = tokio::task::spawn_blocking(move || guard.look(&text)).await;
        looked.map_err(io::Error::other).flatten().map_err(generic)
    }

    /// Whether an open file is the one that is there now.
    fn is_still(&self, at: &str, file: &File) -> io::Result<()> {
        let opened = fstat(file)?;
        match self.look(at)? {
            Some(found) if (found.st_dev, found.st_ino) == (opened.st_dev, opened.st_ino) => Ok(()),
            Some(_) | None => Err(io::Error::other(NotRegular(self.path.join(at)))),
        }
    }
}

fn generic(source: io::Error) -> Error {
    Error::Generic { store: "local folder", source: source.into() }
}

/// A local file system that follows no links.
#[derive(Debug)]
struct Guarded {
    inner: LocalFileSystem,
    guard: Guard,
}

impl fmt::Display for Guarded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} without links", self.inner)
    }
}

#[async_trait::async_trait]
impl ObjectStore for Guarded {
    async fn put_opts(&self, at: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        self.guard.check(at).await?;
        self.inner.put_opts(at, payload, opts).await
    }

    async fn put_multipart_opts(
        &self,
        at: &Path,
        opts: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.guard.check(at).await?;
        self.inner.put_multipart_opts(at, opts).await
    }

    async fn get_opts(&self, at: &Path, options: GetOptions) -> Result<GetResult> {
        // Before it is opened: a pipe would not come back.
        self.guard.check(at).await?;
        let got = self.inner.get_opts(at, options).await?;
        if let GetResultPayload::File(file, _) = &got.payload {
            let file = file.try_clone().map_err(generic)?;
            let (guard, text) = (self.guard.clone(), at.to_string());
            let same = tokio::task::spawn_blocking(move || guard.is_still(&text, &file)).await;
            same.map_err(io::Error::other).flatten().map_err(generic)?;
        }
        Ok(got)
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let guard = self.guard.clone();
        let checked = locations.and_then(move |at| {
            let guard = guard.clone();
            async move { guard.check(&at).await.map(|_| at) }
        });
        self.inner.delete_stream(checked.boxed())
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let guard = self.guard.clone();
        let listed = self.inner.list(prefix);
        listed
            .and_then(move |meta| {
                let guard = guard.clone();
                async move {
                    match guard.check(&meta.location).await? {
                        Some(_) => Ok(meta),
                        None => Err(Error::NotFound {
                            path: meta.location.to_string(),
                            source: "removed while it was listed".into(),
                        }),
                    }
                }
            })
            .boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let listed = self.inner.list_with_delimiter(prefix).await?;
        for meta in &listed.objects {
            self.guard.check(&meta.location).await?;
        }
        Ok(listed)
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.guard.check(from).await?;
        self.guard.check(to).await?;
        self.inner.copy_opts(from, to, options).await
    }
}
