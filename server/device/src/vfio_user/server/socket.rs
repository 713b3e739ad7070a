//! The file of a listening socket: made for its owner alone, taken over only when stale, removed only when its own.
//!
//! ```text
//!   path is free                       -> bind, mode 0600 from its first instant
//!   a socket that nobody listens on    -> removed, then as above
//!   a socket that somebody listens on  -> refused        anything else  -> refused, untouched
//! ```
//!
//! # Failure paths
//! Two servers that find the same stale file at the same instant may both remove it; the later then has the path and
//! the earlier an unreachable socket. Give each server a path of its own.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Connections that may wait to be accepted. They are accepted at once, if only to be refused.
const BACKLOG: i32 = 16;

/// Why a socket cannot be made at a path.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SocketError {
    /// There is something that is no socket.
    #[error("{} is there already and is no socket; it is left alone", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// Another server listens there.
    #[error("{}: another server listens there", path.display())]
    InUse {
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

/// A socket's file, which goes with this value as long as it is still the one that was made.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    file: (u64, u64),
}

impl SocketFile {
    /// Listens at `path`; only its owner may connect.
    pub fn bind(path: &Path) -> Result<(Self, UnixListener), SocketError> {
        let failed = |what, source: io::Error| SocketError::Io { what, path: path.to_owned(), source };
        make_way(path)?;
        let address =
            SocketAddrUnix::new(path).map_err(|errno| failed("make an address of it", errno.into()))?;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
                .map_err(|errno| failed("open a socket for it", errno.into()))?;
        // The file takes its mode from the socket, so it is never anybody else's, not even for an instant.
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)
            .map_err(|errno| failed("restrict it to its owner", errno.into()))?;
        rustix::net::bind(&socket, &address).map_err(|errno| failed("bind to it", errno.into()))?;
        let made = fs::symlink_metadata(path).map_err(|error| failed("find it again", error))?;
        let file = Self { path: path.to_owned(), file: (made.dev(), made.ino()) };
        rustix::net::listen(&socket, BACKLOG).map_err(|errno| failed("listen on it", errno.into()))?;
        Ok((file, UnixListener::from(socket)))
    }

    /// The path.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let own = fs::symlink_metadata(&self.path).is_ok_and(|found| (found.dev(), found.ino()) == self.file);
        if own && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the socket");
        }
    }
}

/// Removes a socket that nobody listens on; refuses everything else that is there.
fn make_way(path: &Path) -> Result<(), SocketError> {
    let failed = |what, source| SocketError::Io { what, path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("look at it", error)),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(SocketError::NotASocket { path: path.to_owned() });
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(|error| failed("remove the stale socket", error))
        }
        Err(error) => Err(failed("find out whether somebody listens there", error)),
        Ok(_) => Err(SocketError::InUse { path: path.to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn folder() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    #[test]
    fn a_socket_is_its_owners_alone_and_goes_with_its_server() {
        let folder = folder();
        let path = folder.path().join("device.sock");
        let (file, _listener) = SocketFile::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(UnixStream::connect(&path).is_ok());
        assert!(matches!(SocketFile::bind(&path), Err(SocketError::InUse { .. })));
        drop(file);
        assert!(!path.exists());
    }

    #[test]
    fn only_a_stale_socket_makes_way() {
        let folder = folder();
        let path = folder.path().join("device.sock");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "left behind");
        let (_file, _listener) = SocketFile::bind(&path).unwrap();

        let other = folder.path().join("notes");
        fs::write(&other, "keep me").unwrap();
        assert!(matches!(SocketFile::bind(&other), Err(SocketError::NotASocket { .. })));
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(matches!(SocketFile::bind(&link), Err(SocketError::NotASocket { .. })));
        assert_eq!(fs::read_to_string(&other).unwrap(), "keep me");
    }

    #[test]
    fn a_file_that_took_the_sockets_place_is_not_removed() {
        let folder = folder();
        let path = folder.path().join("device.sock");
        let (file, _listener) = SocketFile::bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "another's").unwrap();
        drop(file);
        assert_eq!(fs::read_to_string(&path).unwrap(), "another's");
    }
}
