//! Whole messages in and out of a stream socket, with the descriptors that come beside them.
//!
//! ```text
//!   recvmsg: 16 bytes -> Header, held against the limits -> recvmsg: the body, into one buffer that is used again
//! ```
//!
//! # Invariants
//! - Nothing is allocated for a body before its length is within the limits.
//! - A descriptor that arrived is owned at once, so whatever becomes of its message it is closed in the end.
//!
//! # Failure paths
//! A connection that ends between two messages is [`Incoming::End`]. One that ends within a message, or a header that
//! is none, is an error: where the next message would begin cannot be known any more.

use std::io::{self, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags};

use crate::vfio_user::codec::{DecodeError, HEADER_BYTES, Header, Limits};

/// Most descriptors that may come with one message.
pub(super) const MAX_MSG_FDS: usize = 32;

/// Why a connection cannot go on.
#[derive(Debug, thiserror::Error)]
pub(super) enum WireError {
    #[error("the socket failed")]
    Io(#[from] io::Error),
    #[error("the peer hung up within a message")]
    Cut,
    #[error("what came is no message")]
    Header(#[from] DecodeError),
}

/// What came.
#[derive(Debug)]
pub(super) enum Incoming {
    /// A message; its body is in the buffer.
    Message(Message),
    /// The peer hung up.
    End,
}

/// A message without its body.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) header: Header,
    pub(super) fds: Vec<OwnedFd>,
    /// More descriptors came than may, or than this process can hold: those in `fds` are not all.
    pub(super) fds_lost: bool,
}

/// The receiving end.
#[derive(Debug)]
pub(super) struct Receiver<'a> {
    stream: &'a UnixStream,
    body: Vec<u8>,
    deadline: Option<Instant>,
}

impl<'a> Receiver<'a> {
    pub(super) fn new(stream: &'a UnixStream) -> Self {
        Self { stream, body: Vec::new(), deadline: None }
    }

    /// Until when a message must have come whole; what is later is an error. `None`: whenever it comes.
    pub(super) fn set_deadline(&mut self, deadline: Option<Instant>) -> io::Result<()> {
        self.deadline = deadline;
        self.stream.set_read_timeout(None)
    }

    /// The body of the message that came last.
    pub(super) fn body(&self) -> &[u8] {
        &self.body
    }

    /// Waits for the next message.
    pub(super) fn receive(&mut self, limits: Limits) -> Result<Incoming, WireError> {
        let mut fds = Fds::default();
        let mut header = [0; HEADER_BYTES];
        match fill(self.stream, &mut header, &mut fds, self.deadline)? {
            HEADER_BYTES => {}
            0 => return Ok(Incoming::End),
            _ => return Err(WireError::Cut),
        }
        let header = Header::decode(&header, limits)?;
        self.body.clear();
        self.body.resize(header.body_bytes(), 0);
        if fill(self.stream, &mut self.body, &mut fds, self.deadline)? < header.body_bytes() {
            return Err(WireError::Cut);
        }
        Ok(Incoming::Message(Message { header, fds: fds.taken, fds_lost: fds.lost }))
    }
}

#[derive(Debug, Default)]
struct Fds {
    taken: Vec<OwnedFd>,
    lost: bool,
}

/// Fills the buffer. Returns how much came: less only where the peer hung up.
fn fill(
    stream: &UnixStream,
    buffer: &mut [u8],
    fds: &mut Fds,
    deadline: Option<Instant>,
) -> io::Result<usize> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        if let Some(deadline) = deadline {
            // Anew for each piece: a peer that sends byte by byte has no more time than any other.
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            stream.set_read_timeout(Some(left))?;
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_MSG_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(rest)];
        let received = match rustix::net::recvmsg(stream, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(received) => received,
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
        };
        fds.lost |= received.flags.contains(ReturnFlags::CTRUNC);
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                fds.taken.extend(descriptors);
            }
        }
        // However many pieces a message comes in, it has no more than this.
        if fds.taken.len() > MAX_MSG_FDS {
            fds.taken.truncate(MAX_MSG_FDS);
            fds.lost = true;
        }
        if received.bytes == 0 {
            break;
        }
        filled += received.bytes;
    }
    Ok(filled)
}

/// Sends a whole message.
pub(super) fn send(mut stream: &UnixStream, message: &[u8]) -> io::Result<()> {
    stream.write_all(message)
}
