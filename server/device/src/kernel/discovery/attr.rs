//! Careful reading of a device's folder in sysfs: small text attributes and the last component of links.
//!
//! ```text
//!   folder/attribute  --stat: a regular file?--> read at most 4 KiB --> trimmed text --> number
//!   folder/link       --readlink--> last component, checked --> name        (a link is never opened)
//! ```
//!
//! Invariants: only regular files are opened, so no device ever is, whatever a folder contains; no read is longer
//! than [`MAX_ATTRIBUTE_BYTES`]; what comes out as a name is one printable path component.
//! Failure paths: an attribute that is absent is `None` and normal, because kernels differ. One that cannot be read
//! or understood is `None` and a [`Note`] on its device; it never fails the listing.

use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

/// The most that is read of one attribute. The kernel gives an attribute one page.
pub(super) const MAX_ATTRIBUTE_BYTES: u64 = 4096;

/// How many characters of an attribute that makes no sense are repeated in its note.
const SHOWN_CHARS: usize = 64;

/// Something about a device that could not be found out, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Note {
    /// The file or link in the device's folder, or the node.
    pub attribute: String,
    /// What is wrong with it.
    pub problem: Problem,
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.attribute, self.problem)
    }
}

/// What is wrong with an attribute.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Problem {
    /// It exists but could not be read.
    Unreadable(String),
    /// It holds something that it never should; this is the beginning of it.
    Malformed(String),
    /// There is more than this many of it; the rest was not looked at.
    TooMany(usize),
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreadable(error) => write!(f, "could not be read: {error}"),
            Self::Malformed(shown) => write!(f, "holds {shown:?}, which makes no sense here"),
            Self::TooMany(limit) => write!(f, "has more than {limit} entries; the rest was not looked at"),
        }
    }
}

/// A folder being read, with the notes that reading it leaves.
#[derive(Debug)]
pub(super) struct Folder {
    path: PathBuf,
    notes: Vec<Note>,
}

impl Folder {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, notes: Vec::new() }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn into_notes(self) -> Vec<Note> {
        self.notes
    }

    pub(super) fn note(&mut self, attribute: &str, problem: Problem) {
        self.notes.push(Note { attribute: attribute.to_owned(), problem });
    }

    /// The trimmed text of an attribute. Never empty.
    pub(super) fn text(&mut self, attribute: &str) -> Option<String> {
        match read_bounded(&self.path.join(attribute)) {
            Ok(text) => Some(text.trim().to_owned()).filter(|text| !text.is_empty()),
            Err(error) => {
                self.note_error(attribute, &error);
                None
            }
        }
    }

    /// An attribute that is a number, as `parse` understands it.
    pub(super) fn parsed<T>(&mut self, attribute: &str, parse: impl Fn(&str) -> Option<T>) -> Option<T> {
        let text = self.text(attribute)?;
        let value = parse(&text);
        if value.is_none() {
            self.note(attribute, Problem::Malformed(shown(&text)));
        }
        value
    }

    /// The last component of where a link points. `Err` where there is a link and it says nothing usable.
    pub(super) fn link(&mut self, attribute: &str) -> Result<Option<String>, Unusable> {
        match fs::read_link(self.path.join(attribute)) {
            Ok(target) => {
                let name = target.file_name().and_then(plain_name).map(str::to_owned);
                if name.is_none() {
                    self.note(attribute, Problem::Malformed(shown(&target.to_string_lossy())));
                }
                name.map(Some).ok_or(Unusable)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => {
                self.note_error(attribute, &error);
                Err(Unusable)
            }
        }
    }

    /// Whether something exists at `path`, which is looked at and not followed or opened.
    pub(super) fn exists(&mut self, path: &Path) -> bool {
        match fs::symlink_metadata(path) {
            Ok(_) => true,
            Err(error) => {
                self.note_error(&path.to_string_lossy(), &error);
                false
            }
        }
    }

    fn note_error(&mut self, attribute: &str, error: &io::Error) {
        if error.kind() != io::ErrorKind::NotFound {
            self.note(attribute, Problem::Unreadable(error.to_string()));
        }
    }
}

/// A link that exists and says nothing usable; a note was left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Unusable;

/// Reads the beginning of a regular file, as text.
pub(super) fn read_bounded(path: &Path) -> io::Result<String> {
    // Opening a VFIO node would reset its device: anything but a regular file is refused before it is opened.
    if !fs::symlink_metadata(path)?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
    let mut bytes = Vec::new();
    file.take(MAX_ATTRIBUTE_BYTES).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// At most `limit` entries of a folder, sorted, whose names are plain, and whether that was all of them.
/// A folder that does not exist has none.
pub(super) fn entries(path: &Path, limit: usize) -> io::Result<(Vec<String>, bool)> {
    let mut names = Vec::new();
    let listing = match fs::read_dir(path) {
        Ok(listing) => listing,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((names, true)),
        Err(error) => return Err(error),
    };
    for entry in listing {
        if names.len() == limit {
            return Ok((names, false));
        }
        let name = entry?.file_name();
        if let Some(name) = plain_name(&name) {
            names.push(name.to_owned());
        } else {
            tracing::debug!(folder = %path.display(), ?name, "ignoring an entry that is no name");
        }
    }
    names.sort_unstable();
    Ok((names, true))
}

/// A name that is one printable path component, as every bus, driver and device of the kernel has.
pub(super) fn plain_name(name: &OsStr) -> Option<&str> {
    let name = name.to_str()?;
    let printable = |c: char| c.is_ascii_graphic() || c == ' ';
    (!name.is_empty() && name != "." && name != ".." && !name.contains('/') && name.chars().all(printable))
        .then_some(name)
}

/// A hexadecimal number as sysfs prints it: `0x15b3`.
pub(super) fn hex(text: &str) -> Option<u32> {
    let digits = text.strip_prefix("0x")?;
    // `from_str_radix` takes a sign, which no attribute has.
    digits.bytes().all(|b| b.is_ascii_hexdigit()).then(|| u32::from_str_radix(digits, 16).ok())?
}

fn shown(text: &str) -> String {
    text.chars().take(SHOWN_CHARS).collect()
}
