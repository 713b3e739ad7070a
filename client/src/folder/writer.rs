//! Writes a checkpoint into a folder.
//!
//! ```text
//!   chunk, seal --(QUEUED_CHUNKS)--> thread: write, fdatasync every SYNC_STEP_BYTES
//!   finish ------------------------> thread: fdatasync, manifest.json.new, fsync, rename, fsync of the folder
//!   dropped or failed -------------> thread: removes what it wrote
//! ```
//!
//! Invariants: only verified chunks in their place are written, and only a verified seal that covers them ends a file.
//! Failure paths: the first error ends the work; every later call returns that there is no more work, `finish` why.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_seal::{StreamMark, VerifiedChunk, VerifiedSeal};

use super::manifest::{FORMAT_VERSION, FolderManifest, SavedDevice};
use super::{
    Folder, FolderError, MANIFEST_FILE, MANIFEST_TEMPORARY, MAX_DEVICES, MAX_MANIFEST_BYTES, QUEUED_CHUNKS,
    is_ours, off_runtime, reader, state_file,
};
use crate::document::{Consistency, Manifest};

/// How much is written before it is brought to the disk, so that the last sync finds little left to do.
const SYNC_STEP_BYTES: u64 = 64 * 1024 * 1024;

/// What to do with a folder that holds something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    /// Refuse it.
    Refuse,
    /// Replace a checkpoint, or what is left of one, if there is nothing else in it.
    Replace,
}

enum Command {
    Chunk { device: u32, chunk: VerifiedChunk },
    Seal { device: u32, seal: VerifiedSeal, config: Option<v1::ConfigSpaceCapture> },
    Finish(Consistency),
}

/// A checkpoint that is being written. Dropping it removes what was written; [`FolderWriter::abandon`] waits for that.
#[derive(Debug)]
pub struct FolderWriter {
    commands: mpsc::Sender<Command>,
    work: Option<JoinHandle<Result<Option<FolderManifest>, FolderError>>>,
}

impl FolderWriter {
    /// Prepares the folder and its files. The folder is made if it is not there; the one above it must be.
    pub async fn create(
        path: &Path,
        manifest: &v1::CheckpointManifest,
        existing: Existing,
    ) -> Result<Self, FolderError> {
        let devices = manifest.devices.len();
        if devices == 0 || devices > MAX_DEVICES {
            let problem = format!("there are {devices}, but 1 to {MAX_DEVICES} are possible");
            return Err(FolderError::Manifest { field: "devices".to_owned(), problem });
        }
        let manifest = Manifest::from_wire(manifest)
            .map_err(|(field, problem)| FolderError::Manifest { field, problem })?;
        let path = path.to_owned();
        let mut work = off_runtime(move || Work::begin(path, manifest, devices, existing)).await?;
        let (commands, queue) = mpsc::channel(QUEUED_CHUNKS);
        let work = tokio::task::spawn_blocking(move || work.run(queue));
        Ok(Self { commands, work: Some(work) })
    }

    /// Writes the next chunk of a device. Returns when it is queued. Cancel-safe in that a chunk is queued or not.
    pub async fn chunk(&mut self, device: u32, chunk: VerifiedChunk) -> Result<(), FolderError> {
        self.send(Command::Chunk { device, chunk }).await
    }

    /// Ends the file of a device.
    pub async fn seal(
        &mut self,
        device: u32,
        seal: VerifiedSeal,
        config: Option<v1::ConfigSpaceCapture>,
    ) -> Result<(), FolderError> {
        self.send(Command::Seal { device, seal, config }).await
    }

    /// Makes all of it durable and writes the manifest. When it returns, the checkpoint is there.
    pub async fn finish(mut self, consistency: Consistency) -> Result<FolderManifest, FolderError> {
        self.send(Command::Finish(consistency)).await?;
        match self.end().await? {
            Some(manifest) => Ok(manifest),
            None => Err(gone()),
        }
    }

    /// Removes what was written, and returns when it is gone.
    pub async fn abandon(self) {
        let Self { commands, work } = self;
        drop(commands);
        if let Some(work) = work {
            // Whatever the work ended with, it has removed its files.
            drop(work.await);
        }
    }

    async fn send(&mut self, command: Command) -> Result<(), FolderError> {
        if self.commands.send(command).await.is_ok() {
            return Ok(());
        }
        // The thread closes its queue only when it has failed.
        match self.end().await {
            Err(error) => Err(error),
            Ok(_) => Err(gone()),
        }
    }

    async fn end(&mut self) -> Result<Option<FolderManifest>, FolderError> {
        // A handle answers once; whoever uses a writer after it failed is told that there is none.
        let Some(work) = self.work.take() else { return Err(gone()) };
        match work.await {
            Ok(result) => result,
            Err(join) => Err(FolderError::Worker(io::Error::other(join))),
        }
    }
}

fn gone() -> FolderError {
    FolderError::Worker(io::Error::other("it was given up"))
}

/// Rewrites the manifest of a checkpoint with another consistency, as atomically as it was written.
pub async fn set_consistency(path: &Path, consistency: Consistency) -> Result<(), FolderError> {
    let path = path.to_owned();
    off_runtime(move || {
        let folder = Folder::open(&path)?;
        let mut manifest = reader::read_manifest(&folder)?;
        manifest.consistency = consistency;
        publish(&folder, &manifest)
    })
    .await
}

fn publish(folder: &Folder, manifest: &FolderManifest) -> Result<(), FolderError> {
    let failed = |action| move |source| FolderError::io(action, &folder.path_of(MANIFEST_TEMPORARY), source);
    let json = |source| FolderError::Json { path: folder.path_of(MANIFEST_FILE), source };
    let mut text = serde_json::to_vec_pretty(manifest).map_err(json)?;
    text.push(b'\n');
    if text.len() as u64 > MAX_MANIFEST_BYTES {
        return Err(FolderError::ManifestTooLarge { path: folder.path_of(MANIFEST_FILE) });
    }
    folder.remove_file(MANIFEST_TEMPORARY)?;
    let mut file = folder.create_file(MANIFEST_TEMPORARY)?;
    let written = file.write_all(&text).and_then(|()| file.sync_all());
    let renamed = written.map_err(failed("write")).and_then(|()| {
        rustix::fs::renameat(&folder.file, MANIFEST_TEMPORARY, &folder.file, MANIFEST_FILE)
            .map_err(|errno| failed("rename")(errno.into()))
    });
    if let Err(error) = renamed {
        let _the_first_error_is_told = folder.remove_file(MANIFEST_TEMPORARY);
        return Err(error);
    }
    folder.sync()
}

struct Output {
    file: File,
    written_bytes: u64,
    unsynced_bytes: u64,
    mark: Option<StreamMark>,
    sealed: Option<SavedDevice>,
}

/// The thread's side.
struct Work {
    folder: Folder,
    is_new_folder: bool,
    is_published: bool,
    manifest: Option<Manifest>,
    outputs: Vec<Output>,
}

impl Work {
    fn begin(
        path: PathBuf,
        manifest: Manifest,
        devices: usize,
        existing: Existing,
    ) -> Result<Self, FolderError> {
        let is_new_folder = make_folder(&path)?;
        let folder = Folder::open(&path)?;
        lock(&folder)?;
        if !is_new_folder {
            clear(&folder, existing)?;
        }
        let outputs = Vec::with_capacity(devices);
        let mut work = Self { folder, is_new_folder, is_published: false, manifest: Some(manifest), outputs };
        for device in 0..devices {
            let file = work.folder.create_file(&state_file(device))?;
            work.outputs.push(Output { file, written_bytes: 0, unsynced_bytes: 0, mark: None, sealed: None });
        }
        Ok(work)
    }

    /// `Ok(None)` when the writer was dropped before it was finished.
    fn run(&mut self, mut queue: mpsc::Receiver<Command>) -> Result<Option<FolderManifest>, FolderError> {
        while let Some(command) = queue.blocking_recv() {
            match command {
                Command::Chunk { device, chunk } => self.write(device, &chunk)?,
                Command::Seal { device, seal, config } => self.seal(device, &seal, config.as_ref())?,
                Command::Finish(consistency) => return self.finish(consistency).map(Some),
            }
        }
        Ok(None)
    }

    fn output(&mut self, device: u32) -> Result<(&mut Output, PathBuf), FolderError> {
        let path = self.folder.path_of(&state_file(device as usize));
        match self.outputs.get_mut(device as usize) {
            Some(output) if output.sealed.is_none() => Ok((output, path)),
            Some(_) => Err(FolderError::Order { device, problem: "it is sealed already" }),
            None => Err(FolderError::Order { device, problem: "the manifest has no such device" }),
        }
    }

    fn write(&mut self, device: u32, chunk: &VerifiedChunk) -> Result<(), FolderError> {
        let (output, path) = self.output(device)?;
        if !chunk.belongs_at(output.written_bytes, &mut output.mark) {
            return Err(FolderError::Order {
                device,
                problem: "the chunk is not the next one of its stream",
            });
        }
        let bytes = chunk.bytes();
        output.file.write_all(bytes).map_err(|source| FolderError::io("write", &path, source))?;
        output.written_bytes += bytes.len() as u64;
        output.unsynced_bytes += bytes.len() as u64;
        if output.unsynced_bytes >= SYNC_STEP_BYTES {
            output.file.sync_data().map_err(|source| FolderError::io("sync", &path, source))?;
            output.unsynced_bytes = 0;
        }
        Ok(())
    }

    fn seal(
        &mut self,
        device: u32,
        seal: &VerifiedSeal,
        config: Option<&v1::ConfigSpaceCapture>,
    ) -> Result<(), FolderError> {
        let (output, _) = self.output(device)?;
        if !seal.covers(output.written_bytes, output.mark) {
            return Err(FolderError::Order { device, problem: "the seal is not on what was written" });
        }
        let saved = SavedDevice::new(device as usize, &seal.seal(), config).map_err(|problem| {
            FolderError::Manifest { field: format!("seal of device {device}: config"), problem }
        })?;
        output.sealed = Some(saved);
        Ok(())
    }

    fn finish(&mut self, consistency: Consistency) -> Result<FolderManifest, FolderError> {
        let mut devices = Vec::with_capacity(self.outputs.len());
        for (device, output) in (0..).zip(&mut self.outputs) {
            let Some(saved) = output.sealed.take() else {
                return Err(FolderError::Order { device, problem: "it has no seal" });
            };
            let path = self.folder.path_of(&saved.file);
            output.file.sync_all().map_err(|source| FolderError::io("sync", &path, source))?;
            devices.push(saved);
        }
        let Some(manifest) = self.manifest.take() else { return Err(gone()) };
        let manifest = FolderManifest { format_version: FORMAT_VERSION, consistency, manifest, devices };
        manifest.check().map_err(|(field, problem)| FolderError::Manifest { field, problem })?;
        // The names of the files have to last before the manifest that says they are there.
        self.folder.sync()?;
        publish(&self.folder, &manifest)?;
        self.is_published = true;
        Ok(manifest)
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        if !self.is_published {
            self.remove();
        }
    }
}

impl Work {
    /// Removes what was made. What cannot be removed stays, without a manifest: it is no checkpoint.
    fn remove(&self) {
        let mut names = vec![MANIFEST_FILE.to_owned(), MANIFEST_TEMPORARY.to_owned()];
        names.extend((0..self.outputs.len()).map(state_file));
        for name in names {
            if let Err(error) = self.folder.remove_file(&name) {
                tracing::warn!(%error, "a file of a checkpoint that failed stays behind");
            }
        }
        if self.is_new_folder
            && let Err(error) = std::fs::remove_dir(&self.folder.path)
        {
            tracing::warn!(%error, "the folder of a checkpoint that failed stays behind");
        }
    }
}

/// For as long as the folder is open: two writers would each remove or publish what is the other's.
pub(super) fn lock(folder: &Folder) -> Result<(), FolderError> {
    let action = "lock (is another save writing there?)";
    rustix::fs::flock(&folder.file, rustix::fs::FlockOperation::NonBlockingLockExclusive)
        .map_err(|errno| FolderError::io(action, &folder.path, errno.into()))
}

/// Makes the folder, for its owner only, and says whether it was made.
pub(super) fn make_folder(path: &Path) -> Result<bool, FolderError> {
    use std::os::unix::fs::DirBuilderExt;
    match std::fs::DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(false),
        Err(source) => return Err(FolderError::io("make the folder", path, source)),
    }
    // A folder whose name is not on the disk is lost with all that is in it.
    Folder::open(above(path))?.sync()?;
    Ok(true)
}

/// The folder that a folder is in.
pub(super) fn above(path: &Path) -> &Path {
    match path.parent() {
        Some(above) if !above.as_os_str().is_empty() => above,
        Some(_) | None => Path::new("."),
    }
}

/// What of ours a folder holds, if it may be used.
pub(super) fn look(folder: &Folder, existing: Existing) -> Result<Vec<String>, FolderError> {
    let failed = |source| FolderError::io("list", &folder.path, source);
    let refuse = |found: &String, replaceable| {
        Err(FolderError::NotEmpty { path: folder.path.clone(), found: found.clone(), replaceable })
    };
    let mut ours = Vec::new();
    for entry in std::fs::read_dir(&folder.path).map_err(failed)? {
        let found = entry.map_err(failed)?.file_name().to_string_lossy().into_owned();
        if !is_ours(&found) {
            return refuse(&found, false);
        }
        ours.push(found);
    }
    match (existing, ours.first()) {
        (Existing::Refuse, Some(found)) => refuse(found, true),
        (Existing::Refuse, None) | (Existing::Replace, _) => Ok(ours),
    }
}

/// Makes room in a folder that was there.
fn clear(folder: &Folder, existing: Existing) -> Result<(), FolderError> {
    let ours = look(folder, existing)?;
    // The manifest goes first and for good: from here on there is no checkpoint, so none is half there.
    folder.remove_file(MANIFEST_FILE)?;
    folder.sync()?;
    ours.iter().try_for_each(|name| folder.remove_file(name))
}
