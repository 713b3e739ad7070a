//! The agent's end of the holder's socket: blocking, with a deadline on every call.
//!
//! ```text
//!   connect(path, within) -- Hello --> HolderClient -- put, list, take, remove --> one packet out, one packet in
//! ```
//! Call it from a thread that may block, and keep it connected: while it is, no other agent is let in.
//!
//! # Failure paths
//! After a timeout or a lost connection nobody knows whether the request was done, and the client is of no further use:
//! every call answers [`ClientError::Closed`]. Connect again and repeat: `put` and `remove` are idempotent, `take` leaves
//! the holder's own fds alone. A refusal that is not [final](Refusal::is_final) leaves the connection as it is.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use vfio_checkpoint_device::address::{Keepsake, KeepsakeError};

use super::label::{DeviceKey, Label};
use super::packet::{self, Received};
use super::protocol::{MAX_FDS, ProtocolError, Refusal, Reply, Request, VERSION};

/// Why a call was not answered, or not as hoped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// Nobody holds there.
    #[error("cannot connect to the holder at {}; is it running?", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Another user may have made the socket, and would get the devices.
    #[error(
        "{} belongs to uid {uid} and has mode {mode:04o}: it must be this user's or root's, and nobody else may write to it; \
         nothing was sent",
        path.display()
    )]
    Stranger {
        /// The socket, or its folder.
        path: PathBuf,
        /// Whose it is.
        uid: u32,
        /// Its mode.
        mode: u32,
    },
    /// It did not answer in time. Whether it did what was asked is not known.
    #[error("the holder did not answer within {within:?}")]
    Timeout {
        /// How long was waited.
        within: Duration,
    },
    /// The connection was lost. Whether the holder did what was asked is not known.
    #[error("the connection to the holder was lost")]
    Lost(#[source] io::Error),
    /// The connection was lost or given up before. Nothing was sent.
    #[error("the connection to the holder was lost before; connect again")]
    Closed,
    /// The holder refused.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The holder does not keep to the protocol, or the request makes no packet.
    #[error("the holder's protocol was broken")]
    Protocol(#[from] ProtocolError),
}

/// A device that was handed out.
#[derive(Debug)]
pub struct Taken {
    /// What is written on it.
    pub label: Label,
    /// New duplicates; the holder keeps its own.
    pub fds: Vec<OwnedFd>,
    /// How many times it was handed out before, since it was put.
    pub handed_out: u64,
}

impl Taken {
    /// What the device can be taken over with. On an error the duplicates are closed; the holder keeps its own.
    pub fn into_keepsake(self) -> Result<Keepsake, KeepsakeError> {
        let keepsake = Keepsake::decode(self.label.facts.as_str(), self.fds)?;
        Ok(keepsake.after_owners(self.handed_out))
    }
}

/// A connection to the holder.
#[derive(Debug)]
pub struct HolderClient {
    /// `None` once it is of no further use.
    socket: Option<OwnedFd>,
    within: Duration,
}

impl HolderClient {
    /// Connects as the one agent. Connecting and each call later take at most `within`.
    pub fn connect(path: &Path, within: Duration) -> Result<Self, ClientError> {
        let failed = |errno: Errno| ClientError::Connect { path: path.to_owned(), source: errno.into() };
        let address = SocketAddrUnix::new(path).map_err(failed)?;
        trusted(path)?;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .map_err(failed)?;
        // Bounds connecting, too, where too many wait already.
        set_socket_timeout(&socket, Timeout::Send, Some(within.max(Duration::from_millis(1))))
            .map_err(failed)?;
        rustix::io::retry_on_intr(|| rustix::net::connect(&socket, &address)).map_err(failed)?;
        let mut client = Self { socket: Some(socket), within };
        match client.call(&Request::Hello { version: VERSION, pid: std::process::id() }, &[])? {
            (Reply::Welcome { version: VERSION, .. }, _) => Ok(client),
            other => Err(client.out_of_turn(other)),
        }
    }

    /// Has a device held: duplicates of `fds`, 1 to 16, in place of what was held under the label's key. Whether
    /// something was.
    pub fn put(&mut self, label: &Label, fds: &[BorrowedFd<'_>]) -> Result<bool, ClientError> {
        if fds.is_empty() || fds.len() > MAX_FDS {
            return Err(ProtocolError::Fds { given: fds.len(), wanted: "1 to 16" }.into());
        }
        match self.call(&Request::Put { label: Box::new(label.clone()) }, fds)? {
            (Reply::Stored { replaced }, _) => Ok(replaced),
            other => Err(self.out_of_turn(other)),
        }
    }

    /// Everything that is held, in the order of keys.
    pub fn list(&mut self) -> Result<Vec<Label>, ClientError> {
        let mut labels: Vec<Label> = Vec::new();
        loop {
            let after = labels.last().map(|label| label.key.clone());
            match self.call(&Request::List { after: after.clone() }, &[])? {
                (Reply::Labels { labels: page, more }, _) => {
                    // A holder that goes round in circles would be listened to for ever.
                    let keys = after.iter().chain(page.iter().map(|label| &label.key));
                    if !keys.is_sorted_by(|a, b| a < b) || (more && page.is_empty()) {
                        self.socket = None;
                        return Err(
                            ProtocolError::OutOfTurn("the pages of a list do not follow each other").into()
                        );
                    }
                    labels.extend(page);
                    if !more {
                        return Ok(labels);
                    }
                }
                other => return Err(self.out_of_turn(other)),
            }
        }
    }

    /// New duplicates of a held device's fds. The holder keeps its own.
    pub fn take(&mut self, key: &DeviceKey) -> Result<Taken, ClientError> {
        match self.call(&Request::Take { key: key.clone() }, &[])? {
            (Reply::Taken { label, handed_out }, fds) if label.key == *key => {
                Ok(Taken { label: *label, fds, handed_out })
            }
            other => Err(self.out_of_turn(other)),
        }
    }

    /// Has the holder let go of a device: its duplicates are closed when this returns. Whether there was one.
    pub fn remove(&mut self, key: &DeviceKey) -> Result<bool, ClientError> {
        match self.call(&Request::Drop { key: key.clone() }, &[])? {
            (Reply::Dropped { existed }, _) => Ok(existed),
            other => Err(self.out_of_turn(other)),
        }
    }

    /// Whether calls may still be answered.
    pub fn is_closed(&self) -> bool {
        self.socket.is_none()
    }

    fn out_of_turn(&mut self, (reply, _fds): (Reply, Vec<OwnedFd>)) -> ClientError {
        match reply {
            Reply::Refused(refusal) => {
                if refusal.is_final() {
                    self.socket = None;
                }
                refusal.into()
            }
            Reply::Welcome { .. }
            | Reply::Stored { .. }
            | Reply::Labels { .. }
            | Reply::Taken { .. }
            | Reply::Dropped { .. } => {
                self.socket = None;
                ProtocolError::OutOfTurn("the holder answered something else than was asked").into()
            }
        }
    }

    /// One packet out, one packet in. Whatever fails in between, the socket is given up.
    fn call(
        &mut self,
        request: &Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(Reply, Vec<OwnedFd>), ClientError> {
        // Before anything is sent: a request that makes no packet costs nothing.
        let packet = request.encode()?;
        let socket = self.socket.take().ok_or(ClientError::Closed)?;
        let deadline = Deadline::after(self.within);
        while !packet::send(socket.as_fd(), &packet, fds).map_err(ClientError::Lost)? {
            deadline.wait(&socket, PollFlags::OUT)?;
        }
        loop {
            deadline.wait(&socket, PollFlags::IN)?;
            match packet::receive(socket.as_fd()).map_err(ClientError::Lost)? {
                Received::Packet(bytes, fds) => {
                    let reply = Reply::decode(&bytes, fds.len())?;
                    self.socket = Some(socket);
                    return Ok((reply, fds));
                }
                Received::Nothing => {}
                Received::TooLong => return Err(ProtocolError::TooLong.into()),
                Received::TooManyFds => return Err(ProtocolError::TooManyFds.into()),
                Received::End => return Err(ClientError::Lost(Errno::CONNRESET.into())),
            }
        }
    }
}

/// Whoever made the socket gets the devices: this user or root, in a folder where nobody else can put one. The files tell
/// it; the kernel's word on who listens would not reach into another PID namespace.
fn trusted(socket: &Path) -> Result<(), ClientError> {
    let folder = match socket.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) | None => Path::new("."),
    };
    // Who may write to the socket may connect, which takes nothing from this end; who may write to the folder replaces it.
    for (path, forbidden) in [(folder, 0o022), (socket, 0)] {
        let found =
            fs::metadata(path).map_err(|source| ClientError::Connect { path: socket.to_owned(), source })?;
        let (uid, mode) = (found.uid(), found.mode() & 0o7777);
        let owned = uid == 0 || uid == rustix::process::geteuid().as_raw();
        if !owned || mode & forbidden != 0 {
            return Err(ClientError::Stranger { path: path.to_owned(), uid, mode });
        }
    }
    Ok(())
}

/// When a call must be over.
#[derive(Debug, Clone, Copy)]
struct Deadline {
    within: Duration,
    /// `None`: further away than time goes.
    at: Option<Instant>,
}

impl Deadline {
    fn after(within: Duration) -> Self {
        Self { within, at: Instant::now().checked_add(within) }
    }

    fn wait(&self, socket: &OwnedFd, wanted: PollFlags) -> Result<(), ClientError> {
        loop {
            let left = self.at.map(|at| at.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Err(ClientError::Timeout { within: self.within });
            }
            let timeout = left.and_then(|left| Timespec::try_from(left).ok());
            let mut fds = [PollFd::new(socket, wanted)];
            match rustix::event::poll(&mut fds, timeout.as_ref()) {
                // The time is looked at again above: poll may round down.
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(errno) => return Err(ClientError::Lost(errno.into())),
            }
        }
    }
}
