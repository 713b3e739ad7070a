//! The holder's socket: its folder, its lock, its file.
//!
//! ```text
//!   FOLDER (0700, its owner's)          made if missing, refused if others may enter
//!   FOLDER/NAME.lock                    locked as long as the holder lives; stays as a file
//!   FOLDER/NAME (0600)                  made under the lock only, so what is there is stale; goes with the holder
//! ```
//!
//! # Invariants
//! - Two holders never share a path: who does not get the lock touches nothing.
//! - Nothing but a socket is ever removed, and at the end only the socket that was made here.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 16;

/// Why the holder cannot listen.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SocketError {
    /// Others than its owner may enter the folder, or own it.
    #[error(
        "{} must belong to this user and have mode 0700, because whoever reaches the socket could take devices: it belongs \
         to uid {uid} and has mode {mode:04o}",
        path.display()
    )]
    Folder {
        /// The folder.
        path: PathBuf,
        /// Who owns it.
        uid: u32,
        /// Its mode.
        mode: u32,
    },
    /// Another holder has the lock.
    #[error("another holder has {}; stop it, or give this one another socket", path.display())]
    Locked {
        /// The lock's file.
        path: PathBuf,
    },
    /// There is something that is no socket.
    #[error("{} is there already and is no socket; it is left alone", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// A call failed.
    #[error("{}: cannot {what}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// The listening socket. Its file goes with this value.
#[derive(Debug)]
pub(super) struct Listener {
    socket: OwnedFd,
    path: PathBuf,
    /// Device and inode of the file.
    file: (u64, u64),
    _lock: File,
}

impl Listener {
    pub(super) fn bind(path: &Path) -> Result<Self, SocketError> {
        let failed = |what| move |source| io_error(what, path, source);
        let os = |what| move |errno: Errno| io_error(what, path, errno.into());
        let address = SocketAddrUnix::new(path).map_err(os("make a socket's address of it"))?;
        own_folder(path)?;
        let lock = lock(path)?;
        match fs::symlink_metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(io_error("look at it", path, error)),
            Ok(found) if found.file_type().is_socket() => {
                fs::remove_file(path).map_err(failed("remove the stale socket"))?;
            }
            Ok(_) => return Err(SocketError::NotASocket { path: path.to_owned() }),
        }
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
            .map_err(os("open a socket for it"))?;
        // The file takes its mode from the socket, so it is never anybody else's, not even for an instant.
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(os("restrict it to its owner"))?;
        rustix::net::bind(&socket, &address).map_err(os("bind to it"))?;
        let made = fs::symlink_metadata(path).map_err(failed("find it again"))?;
        let listener = Self { socket, path: path.to_owned(), file: (made.dev(), made.ino()), _lock: lock };
        rustix::net::listen(&listener.socket, BACKLOG).map_err(os("listen on it"))?;
        Ok(listener)
    }

    /// Whoever waits. `None`: nobody does any more.
    pub(super) fn accept(&self) -> io::Result<Option<OwnedFd>> {
        match rustix::net::accept_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(socket) => Ok(Some(socket)),
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let own = fs::symlink_metadata(&self.path).is_ok_and(|found| (found.dev(), found.ino()) == self.file);
        if own && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the socket");
        }
    }
}

fn io_error(what: &'static str, path: &Path, source: io::Error) -> SocketError {
    SocketError::Io { what, path: path.to_owned(), source }
}

/// The folder, made where it is missing.
fn own_folder(socket: &Path) -> Result<(), SocketError> {
    let folder = match socket.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) | None => Path::new("."),
    };
    match DirBuilder::new().mode(0o700).create(folder) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(io_error("make the folder", folder, error)),
    }
    let found = fs::metadata(folder).map_err(|error| io_error("look at the folder", folder, error))?;
    let (uid, mode) = (found.uid(), found.mode() & 0o7777);
    if uid != rustix::process::geteuid().as_raw() || mode & 0o077 != 0 {
        return Err(SocketError::Folder { path: folder.to_owned(), uid, mode });
    }
    Ok(())
}

fn lock(socket: &Path) -> Result<File, SocketError> {
    let mut path = socket.as_os_str().to_owned();
    path.push(".lock");
    let path = PathBuf::from(path);
    let nofollow = i32::try_from(OFlags::NOFOLLOW.bits()).unwrap_or(0);
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(nofollow)
        .open(&path)
        .map_err(|error| io_error("open the lock", &path, error))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => Err(SocketError::Locked { path }),
        Err(errno) => Err(io_error("lock it", &path, errno.into())),
    }
}
