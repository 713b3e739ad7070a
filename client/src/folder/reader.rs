//! Reads a checkpoint out of a folder.
//!
//! ```text
//!   open: manifest.json (bounded, strict) -> every file there, regular, of its length
//!   verify: one pass of BLAKE3 over every file     chunks(device): thread -> QUEUED_CHUNKS -> caller
//! ```
//!
//! Invariants: files are opened once and stay open, so that what was verified is the file that is sent. No name comes
//! out of the manifest. Failure paths: what is wrong is named by file, field and figure.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::mpsc;
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_seal::{Seal, SealHasher};

use super::manifest::{FORMAT_VERSION, FolderManifest};
use super::{Folder, FolderError, MANIFEST_FILE, MAX_MANIFEST_BYTES, QUEUED_CHUNKS, off_runtime, state_file};

/// How much is read at a time while a file is verified.
const VERIFY_STEP_BYTES: usize = 1024 * 1024;

#[derive(Debug)]
struct Input {
    path: PathBuf,
    file: File,
    seal: Seal,
    config: Option<v1::ConfigSpaceCapture>,
}

/// A checkpoint whose manifest and sizes are right.
#[derive(Debug)]
pub struct FolderReader {
    manifest: FolderManifest,
    wire: v1::CheckpointManifest,
    inputs: Vec<Arc<Input>>,
}

impl FolderReader {
    /// Reads the manifest, and opens every file and compares its length.
    pub async fn open(path: &Path) -> Result<Self, FolderError> {
        let path = path.to_owned();
        off_runtime(move || Self::open_now(&path)).await
    }

    fn open_now(path: &Path) -> Result<Self, FolderError> {
        let folder = Folder::open(path)?;
        let manifest = read_manifest(&folder)?;
        let bad =
            |(field, problem)| FolderError::Field { path: folder.path_of(MANIFEST_FILE), field, problem };
        let wire = manifest.manifest.to_wire().map_err(bad)?;
        let mut inputs = Vec::with_capacity(manifest.devices.len());
        for (index, device) in manifest.devices.iter().enumerate() {
            let field = |name: &str| format!("devices[{index}].{name}");
            let seal = device.seal().map_err(|problem| bad((field("blake3"), problem)))?;
            let config = device.config_to_wire().map_err(|problem| bad((field("config"), problem)))?;
            let path = folder.path_of(&state_file(index));
            let file = folder.open_file(&state_file(index))?;
            let found_bytes =
                file.metadata().map_err(|source| FolderError::io("look at", &path, source))?.len();
            if found_bytes != seal.bytes {
                return Err(FolderError::Size { path, expected_bytes: seal.bytes, found_bytes });
            }
            inputs.push(Arc::new(Input { path, file, seal, config }));
        }
        Ok(Self { manifest, wire, inputs })
    }

    /// The file `manifest.json`.
    pub fn manifest(&self) -> &FolderManifest {
        &self.manifest
    }

    /// The manifest as the contract has it.
    pub fn wire_manifest(&self) -> &v1::CheckpointManifest {
        &self.wire
    }

    /// Length and digest of each device's state, as the manifest says.
    pub fn seals(&self) -> impl Iterator<Item = Seal> + '_ {
        self.inputs.iter().map(|input| input.seal)
    }

    /// What was captured of a device's configuration space.
    pub fn config(&self, device: usize) -> Option<v1::ConfigSpaceCapture> {
        self.inputs.get(device).and_then(|input| input.config)
    }

    /// Compares every file with its seal.
    pub async fn verify(&self) -> Result<(), FolderError> {
        for input in &self.inputs {
            let input = input.clone();
            off_runtime(move || verify(&input)).await?;
        }
        Ok(())
    }

    /// The state of one device from its beginning, in chunks of this length. One reader a device at a time.
    pub fn chunks(&self, device: usize, chunk_bytes: usize) -> Option<ChunkReader> {
        let input = self.inputs.get(device)?.clone();
        let (sender, queue) = mpsc::channel(QUEUED_CHUNKS);
        tokio::task::spawn_blocking(move || {
            let mut left = input.seal.bytes;
            if let Err(error) = rewind(&input) {
                // Nobody listens any more if it cannot be sent.
                drop(sender.blocking_send(Err(error)));
                return;
            }
            while left > 0 {
                let chunk = read_chunk(&input, left, chunk_bytes);
                left -= chunk.as_ref().map_or(left, |bytes| bytes.len() as u64);
                if sender.blocking_send(chunk).is_err() {
                    return;
                }
            }
        });
        Some(ChunkReader { queue })
    }
}

/// The state of one device.
#[derive(Debug)]
pub struct ChunkReader {
    queue: mpsc::Receiver<Result<Bytes, FolderError>>,
}

impl ChunkReader {
    /// The next chunk; `None` at the end. Cancel-safe.
    pub async fn next(&mut self) -> Result<Option<Bytes>, FolderError> {
        self.queue.recv().await.transpose()
    }
}

fn rewind(input: &Input) -> Result<(), FolderError> {
    (&input.file).rewind().map_err(|source| FolderError::io("read", &input.path, source))
}

fn read_chunk(input: &Input, left: u64, chunk_bytes: usize) -> Result<Bytes, FolderError> {
    let wanted = usize::try_from(left).unwrap_or(usize::MAX).min(chunk_bytes.max(1));
    let mut bytes = Vec::with_capacity(wanted);
    (&input.file)
        .take(wanted as u64)
        .read_to_end(&mut bytes)
        .map_err(|source| FolderError::io("read", &input.path, source))?;
    if bytes.len() < wanted {
        let found_bytes = input.seal.bytes - left + bytes.len() as u64;
        return Err(FolderError::Size {
            path: input.path.clone(),
            expected_bytes: input.seal.bytes,
            found_bytes,
        });
    }
    Ok(bytes.into())
}

fn verify(input: &Input) -> Result<(), FolderError> {
    rewind(input)?;
    let mut hasher = SealHasher::new();
    let mut buffer = vec![0; VERIFY_STEP_BYTES];
    // One byte past the seal is enough to know that a file grew.
    let mut file = (&input.file).take(input.seal.bytes.saturating_add(1));
    loop {
        match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => hasher.update(&buffer[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(source) => return Err(FolderError::io("read", &input.path, source)),
        }
    }
    let found = hasher.seal();
    if found == input.seal {
        Ok(())
    } else {
        Err(FolderError::Damaged { path: input.path.clone(), expected: input.seal, found })
    }
}

/// The one field that every version has.
#[derive(serde::Deserialize)]
struct Versioned {
    format_version: u32,
}

/// Reads and checks `manifest.json`.
pub(super) fn read_manifest(folder: &Folder) -> Result<FolderManifest, FolderError> {
    let path = folder.path_of(MANIFEST_FILE);
    let file = match folder.open_file(MANIFEST_FILE) {
        Ok(file) => file,
        Err(FolderError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            return Err(FolderError::NoCheckpoint { path: folder.path.clone() });
        }
        Err(error) => return Err(error),
    };
    let mut text = Vec::new();
    file.take(MAX_MANIFEST_BYTES + 1)
        .read_to_end(&mut text)
        .map_err(|source| FolderError::io("read", &path, source))?;
    if text.len() as u64 > MAX_MANIFEST_BYTES {
        return Err(FolderError::ManifestTooLarge { path });
    }
    // The version comes first: the fields of another version are not known.
    let versioned: Versioned =
        serde_json::from_slice(&text).map_err(|source| FolderError::Json { path: path.clone(), source })?;
    if versioned.format_version != FORMAT_VERSION {
        return Err(FolderError::Version { path, found: versioned.format_version, known: FORMAT_VERSION });
    }
    let manifest: FolderManifest =
        serde_json::from_slice(&text).map_err(|source| FolderError::Json { path: path.clone(), source })?;
    manifest.check().map_err(|(field, problem)| FolderError::Field { path, field, problem })?;
    Ok(manifest)
}
