//! A device's state in a local file, for moving one device by hand.
//!
//! ```text
//!   "VFIODEV\x01"   8 bytes: magic and format version
//!   header length   u32
//!   header          JSON: the device and its fingerprint
//!   state           the device's own bytes, as they came
//!   trailer         JSON: the seal on the state, what was captured of configuration space
//!   trailer length  u32
//!   check           BLAKE3 of everything but the state and this field
//!   "VFIOSEAL"      8 bytes
//! ```
//! Integers are little-endian. The trailer comes last because the state's length is not known before its end.
//!
//! A save that is killed leaves a hidden file of its own name beside (`.vfio-device-…`), which may be deleted.
//!
//! # Invariants
//! - The file appears under its name only when it is whole and on the disk: it is written beside, synced and renamed,
//!   and an existing file is replaced only when asked.
//! - Nothing in it is trusted: lengths are checked against the file and against limits before anything is allocated,
//!   the header and the trailer against the check, and the state against its seal *before* a device is touched.
//! - Neither writing nor reading holds more than a chunk of state in memory.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

use crate::seal::{Seal, SealHasher, SealMismatch};
use crate::{ConfigCapture, Fingerprint, Identity};

const MAGIC: [u8; 8] = *b"VFIODEV\x01";
const END_MAGIC: [u8; 8] = *b"VFIOSEAL";
const PREFIX_BYTES: u64 = 8 + 4;
const SUFFIX_BYTES: u64 = 4 + 32 + 8;
/// Longest header or trailer that is read, 64 KiB: both are a few hundred bytes.
const MAX_META_BYTES: u32 = 64 << 10;
/// How much is written between two syncs, 64 MiB. The device is stopped during the last one: all before it must be on
/// the disk by then, or the downtime is the time that the disk takes for the whole file.
const SYNC_BYTES: u64 = 64 << 20;
/// How much state is read at a time, 1 MiB.
const CHUNK_BYTES: usize = 1 << 20;

/// Which device a file's state came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// The device.
    pub device: Identity,
    /// What must match on the device that the state goes to.
    pub fingerprint: Fingerprint,
}

/// What is known only once the state has been read to its end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trailer {
    /// The seal on the state.
    pub seal: Seal,
    /// What was captured of configuration space, where the device has one.
    pub config: Option<ConfigCapture>,
}

/// Why a state file cannot be written or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateFileError {
    /// The file system refused.
    #[error("{action} {}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A file of that name is there already.
    #[error("{} exists already; name another file, or say that it may be replaced", .0.display())]
    Exists(PathBuf),
    /// It is not a state file, or not one of this version.
    #[error("{} is not a device state file of version 1", .0.display())]
    NotAStateFile(PathBuf),
    /// It is cut short, longer than it should be, or its header or trailer is damaged.
    #[error("{} is damaged: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        reason: String,
    },
    /// The state in it is damaged.
    #[error("the state in {} is damaged", path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// How it differs.
        #[source]
        source: SealMismatch,
    },
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StateFileError {
    move |error| {
        // An error that was wrapped names a temporary file, which means nothing to whoever reads it: only its kind is
        // told.
        let source = match error.raw_os_error() {
            Some(_) => error,
            None => error.kind().into(),
        };
        StateFileError::Io { action, path: path.to_owned(), source }
    }
}

/// A state file being written. Dropped before [`finish`](Self::finish), it leaves nothing behind.
#[derive(Debug)]
pub struct StateFileWriter {
    path: PathBuf,
    replace: bool,
    file: NamedTempFile,
    check: blake3::Hasher,
    seal: SealHasher,
    synced_bytes: u64,
}

impl StateFileWriter {
    /// Starts a file that will appear at `path`. Where one is there already this fails at once, unless `replace`.
    pub fn create(path: &Path, header: &Header, replace: bool) -> Result<Self, StateFileError> {
        if let Ok(there) = path.symlink_metadata() {
            if !there.is_file() {
                return Err(StateFileError::NotAStateFile(path.to_owned()));
            }
            if !replace {
                return Err(StateFileError::Exists(path.to_owned()));
            }
        }
        let directory =
            path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut file = tempfile::Builder::new()
            .prefix(".vfio-device-")
            .tempfile_in(directory)
            .map_err(io_error("creating", path))?;
        let meta = encode(header, path)?;
        let mut check = blake3::Hasher::new();
        for part in [&MAGIC[..], &length(&meta), &meta] {
            check.update(part);
            file.write_all(part).map_err(io_error("writing", path))?;
        }
        Ok(Self { path: path.to_owned(), replace, file, check, seal: SealHasher::new(), synced_bytes: 0 })
    }

    /// Writes the next bytes of the state.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), StateFileError> {
        self.seal.update(bytes);
        self.file.write_all(bytes).map_err(io_error("writing", &self.path))?;
        if self.seal.bytes() - self.synced_bytes >= SYNC_BYTES {
            self.file.as_file().sync_data().map_err(io_error("syncing", &self.path))?;
            self.synced_bytes = self.seal.bytes();
        }
        Ok(())
    }

    /// Bytes of state written so far.
    pub fn bytes(&self) -> u64 {
        self.seal.bytes()
    }

    /// Seals the state, brings everything to the disk and gives the file its name.
    pub fn finish(mut self, config: Option<ConfigCapture>) -> Result<Seal, StateFileError> {
        let seal = self.seal.seal();
        let meta = encode(&Trailer { seal, config }, &self.path)?;
        let meta_length = length(&meta);
        self.check.update(&meta).update(&meta_length);
        for part in [&meta[..], &meta_length, self.check.finalize().as_bytes(), &END_MAGIC] {
            self.file.write_all(part).map_err(io_error("writing", &self.path))?;
        }
        self.file.as_file().sync_all().map_err(io_error("syncing", &self.path))?;
        let directory = self.file.path().parent().map(Path::to_owned).unwrap_or_default();
        if self.replace {
            self.file.persist(&self.path).map_err(|error| io_error("naming", &self.path)(error.error))?;
        } else {
            self.file.persist_noclobber(&self.path).map_err(|error| {
                if error.error.kind() == io::ErrorKind::AlreadyExists {
                    StateFileError::Exists(self.path.clone())
                } else {
                    io_error("naming", &self.path)(error.error)
                }
            })?;
        }
        File::open(&directory)
            .and_then(|directory| directory.sync_all())
            .map_err(io_error("syncing", &directory))?;
        Ok(seal)
    }
}

fn encode<T: Serialize>(meta: &T, path: &Path) -> Result<Vec<u8>, StateFileError> {
    let refuse = |reason: String| StateFileError::Damaged { path: path.to_owned(), reason };
    let text = serde_json::to_vec(meta).map_err(|error| refuse(error.to_string()))?;
    if text.len() > MAX_META_BYTES as usize {
        return Err(refuse(format!("a header of {} bytes is longer than {MAX_META_BYTES}", text.len())));
    }
    Ok(text)
}

/// The length field of a header or trailer, which [`encode`] has bounded.
fn length(meta: &[u8]) -> [u8; 4] {
    u32::try_from(meta.len()).unwrap_or(u32::MAX).to_le_bytes()
}

/// A state file that was opened and whose header and trailer are sound.
#[derive(Debug)]
pub struct StateFile {
    path: PathBuf,
    file: File,
    header: Header,
    trailer: Trailer,
    state_offset: u64,
}

impl StateFile {
    /// Opens a file and checks everything but the state; see [`verify`](Self::verify).
    pub fn open(path: &Path) -> Result<Self, StateFileError> {
        // Without O_NONBLOCK a pipe would be waited for here, for ever.
        let mut options = File::options();
        let mut file = options
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(io_error("opening", path))?;
        let metadata = file.metadata().map_err(io_error("opening", path))?;
        if !metadata.is_file() {
            return Err(StateFileError::NotAStateFile(path.to_owned()));
        }
        let size = metadata.len();
        let damaged =
            |reason: &str| StateFileError::Damaged { path: path.to_owned(), reason: reason.to_owned() };

        if size < PREFIX_BYTES {
            return Err(StateFileError::NotAStateFile(path.to_owned()));
        }
        let prefix: [u8; 12] = read_array(&mut file, path)?;
        let (magic, header_length) = prefix.split_at(8);
        if magic != MAGIC {
            return Err(StateFileError::NotAStateFile(path.to_owned()));
        }
        let header_length = le_u32(header_length);
        if size < PREFIX_BYTES + SUFFIX_BYTES || header_length > MAX_META_BYTES {
            return Err(damaged("it is cut short"));
        }
        let state_offset = PREFIX_BYTES + u64::from(header_length);
        let suffix_offset = size - SUFFIX_BYTES;
        if state_offset > suffix_offset {
            return Err(damaged("its header runs past its end"));
        }
        let header_text = read_vec(&mut file, header_length, path)?;

        file.seek(SeekFrom::Start(suffix_offset)).map_err(io_error("reading", path))?;
        let suffix: [u8; 44] = read_array(&mut file, path)?;
        if suffix[36..] != END_MAGIC {
            return Err(damaged("it does not end in a seal; it was cut short or appended to"));
        }
        let trailer_length = le_u32(&suffix[..4]);
        if trailer_length > MAX_META_BYTES || u64::from(trailer_length) > suffix_offset - state_offset {
            return Err(damaged("its trailer is longer than the file"));
        }
        let trailer_offset = suffix_offset - u64::from(trailer_length);
        file.seek(SeekFrom::Start(trailer_offset)).map_err(io_error("reading", path))?;
        let trailer_text = read_vec(&mut file, trailer_length, path)?;

        let mut check = blake3::Hasher::new();
        check.update(&prefix).update(&header_text).update(&trailer_text).update(&suffix[..4]);
        if *check.finalize().as_bytes() != suffix[4..36] {
            return Err(damaged("its header or trailer does not match its check"));
        }
        // What it says is shown to people, and could be made to do things to their terminals.
        if header_text.iter().chain(&trailer_text).any(u8::is_ascii_control)
            || [&header_text, &trailer_text].iter().any(|text| text.windows(2).any(|pair| pair == b"\\u"))
        {
            return Err(damaged("its header or trailer holds control characters"));
        }
        let parse_error = |error: serde_json::Error| damaged(&error.to_string());
        let header = serde_json::from_slice(&header_text).map_err(parse_error)?;
        let trailer: Trailer = serde_json::from_slice(&trailer_text).map_err(parse_error)?;
        if trailer.seal.bytes != trailer_offset - state_offset {
            return Err(damaged("the state is not as long as its seal says"));
        }
        Ok(Self { path: path.to_owned(), file, header, trailer, state_offset })
    }

    /// Which device the state came from.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The seal, and what was captured of configuration space.
    pub fn trailer(&self) -> &Trailer {
        &self.trailer
    }

    /// Reads the whole state and compares it with its seal. `progress` gets the bytes read so far.
    pub fn verify(&mut self, mut progress: impl FnMut(u64)) -> Result<(), StateFileError> {
        let expected = self.trailer.seal;
        let mut hasher = SealHasher::new();
        for chunk in self.state()? {
            hasher.update(&chunk?);
            progress(hasher.bytes());
        }
        let found = hasher.seal();
        if found == expected {
            Ok(())
        } else {
            Err(StateFileError::State { path: self.path.clone(), source: SealMismatch { expected, found } })
        }
    }

    /// The state from its start, in chunks of at most 1 MiB.
    pub fn state(
        &mut self,
    ) -> Result<impl Iterator<Item = Result<Bytes, StateFileError>> + '_, StateFileError> {
        self.file.seek(SeekFrom::Start(self.state_offset)).map_err(io_error("reading", &self.path))?;
        let mut reader = BufReader::with_capacity(0, &self.file).take(self.trailer.seal.bytes);
        let path = &self.path;
        Ok(std::iter::from_fn(move || {
            let left = usize::try_from(reader.limit()).unwrap_or(usize::MAX);
            if left == 0 {
                return None;
            }
            let mut chunk = vec![0; left.min(CHUNK_BYTES)];
            Some(
                reader.read_exact(&mut chunk).map(|()| Bytes::from(chunk)).map_err(io_error("reading", path)),
            )
        }))
    }
}

fn read_array<const N: usize>(file: &mut File, path: &Path) -> Result<[u8; N], StateFileError> {
    let mut bytes = [0; N];
    file.read_exact(&mut bytes).map_err(io_error("reading", path))?;
    Ok(bytes)
}

/// Reads a header or trailer, whose length has been bounded.
fn read_vec(file: &mut File, length: u32, path: &Path) -> Result<Vec<u8>, StateFileError> {
    let mut bytes = vec![0; length as usize];
    file.read_exact(&mut bytes).map_err(io_error("reading", path))?;
    Ok(bytes)
}

fn le_u32(bytes: &[u8]) -> u32 {
    bytes.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Backend;

    fn header() -> Header {
        Header {
            device: Identity { name: "d".to_owned(), backend: Backend::Sim, driver: "sim".to_owned() },
            fingerprint: Fingerprint::new().with("driver", "sim"),
        }
    }

    fn write(path: &Path, state: &[u8]) -> Seal {
        let mut writer = StateFileWriter::create(path, &header(), false).unwrap();
        writer.write(state).unwrap();
        writer.finish(None).unwrap()
    }

    fn read(path: &Path) -> Result<Vec<u8>, StateFileError> {
        let mut file = StateFile::open(path)?;
        file.verify(|_| ())?;
        let chunks: Result<Vec<Bytes>, _> = file.state()?.collect();
        Ok(chunks?.concat())
    }

    #[test]
    fn what_was_written_is_read_in_chunks() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        let state: Vec<u8> = (0..2 * CHUNK_BYTES + 7).map(|i| u8::try_from(i % 251).unwrap()).collect();
        let seal = write(&path, &state);
        let file = StateFile::open(&path).unwrap();
        assert_eq!((file.header(), file.trailer()), (&header(), &Trailer { seal, config: None }));
        assert!(read(&path).unwrap() == state);
    }

    #[test]
    fn an_unfinished_file_leaves_nothing_and_an_existing_one_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        let mut unfinished = StateFileWriter::create(&path, &header(), false).unwrap();
        unfinished.write(b"half").unwrap();
        drop(unfinished);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);

        let racing = StateFileWriter::create(&path, &header(), false).unwrap();
        write(&path, b"first");
        assert!(matches!(racing.finish(None), Err(StateFileError::Exists(_))));
        assert!(matches!(StateFileWriter::create(&path, &header(), false), Err(StateFileError::Exists(_))));
        assert_eq!(read(&path).unwrap(), b"first");
        let replacing = StateFileWriter::create(&path, &header(), true).unwrap();
        replacing.finish(None).unwrap();
        assert_eq!(read(&path).unwrap(), b"");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn every_truncation_extension_and_bit_flip_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        write(&path, b"thirty bytes of device state..");
        let whole = std::fs::read(&path).unwrap();
        for length in 0..whole.len() {
            std::fs::write(&path, &whole[..length]).unwrap();
            assert!(read(&path).is_err(), "cut to {length}");
        }
        std::fs::write(&path, [&whole[..], b"x"].concat()).unwrap();
        assert!(read(&path).is_err(), "extended");
        for bit in 0..whole.len() * 8 {
            let mut damaged = whole.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(&path, &damaged).unwrap();
            assert!(read(&path).is_err(), "bit {bit}");
        }
    }
}
