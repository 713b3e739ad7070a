//! One read, one write, one wait on a Unix stream, with file descriptors beside the bytes.
//!
//! # Invariants
//! - Received file descriptors are close-on-exec and owned from the first moment.
//! - No signal on a peer that is gone; EINTR is retried.
//! - Nothing blocks but [`wait`], and that not past its deadline.
//! - What [`make_room`] promises goes into an empty send buffer by one call of [`send`]. The kernel looks at signals only
//!   where it has to wait for room, so not even SIGKILL cuts it.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

/// The most file descriptors that this end accepts or sends with one message.
pub(super) const MAX_FDS: usize = 16;
const CONTROL_BYTES: usize = rustix::cmsg_space!(ScmRights(MAX_FDS));

/// What one read brought.
#[derive(Debug)]
pub(super) enum Received {
    /// Bytes at the start of the buffer, and what came beside them.
    Bytes(usize, Vec<OwnedFd>),
    /// More file descriptors than there was room for; the kernel closed the rest.
    TooManyFds,
    /// The peer is gone.
    End,
    /// Nothing is there.
    Nothing,
}

/// Reads what is there, without waiting.
pub(super) fn receive(stream: &UnixStream, buffer: &mut [u8]) -> io::Result<Received> {
    loop {
        let mut space = [MaybeUninit::uninit(); CONTROL_BYTES];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let mut slices = [IoSliceMut::new(buffer)];
        let message = match rustix::net::recvmsg(stream, &mut slices, &mut control, flags) {
            Ok(message) => message,
            Err(rustix::io::Errno::INTR) => continue,
            Err(rustix::io::Errno::AGAIN) => return Ok(Received::Nothing),
            Err(errno) => return Err(errno.into()),
        };
        let mut fds = Vec::new();
        for part in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = part {
                fds.extend(rights);
            }
        }
        return Ok(if message.flags.contains(ReturnFlags::CTRUNC) {
            Received::TooManyFds
        } else if message.bytes == 0 {
            Received::End
        } else {
            Received::Bytes(message.bytes, fds)
        });
    }
}

/// Writes what fits, without waiting. `None`: nothing fits now. The file descriptors go with the first byte.
pub(super) fn send(stream: &UnixStream, bytes: &[u8], fds: &[OwnedFd]) -> io::Result<Option<usize>> {
    loop {
        let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); CONTROL_BYTES];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !borrowed.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&borrowed)) {
            return Err(io::Error::from_raw_os_error(libc::E2BIG));
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        return match rustix::net::sendmsg(stream, &[IoSlice::new(bytes)], &mut control, flags) {
            Ok(sent) => Ok(Some(sent)),
            Err(rustix::io::Errno::INTR) => continue,
            Err(rustix::io::Errno::AGAIN) => Ok(None),
            Err(errno) => Err(errno.into()),
        };
    }
}

/// Sees to it that a message of so many bytes fits whole into the send buffer when that is empty: how many do. Without
/// `CAP_NET_ADMIN` the system's `wmem_max` is the bound.
pub(super) fn make_room(stream: &UnixStream, bytes: usize) -> io::Result<usize> {
    use rustix::net::sockopt;
    // Both double it: the kernel counts what a message takes in memory, which is more than its bytes, but not twice.
    if sockopt::socket_send_buffer_size(stream)? / 2 < bytes
        && sockopt::set_socket_send_buffer_size_force(stream, bytes).is_err()
    {
        sockopt::set_socket_send_buffer_size(stream, bytes)?;
    }
    Ok(sockopt::socket_send_buffer_size(stream)? / 2)
}

/// What a wait ended with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ready {
    /// A read brings something, if only an error.
    pub(super) readable: bool,
    /// A write brings something, if only an error.
    pub(super) writable: bool,
}

/// Waits until the stream is readable, or, where wanted, writable. `None`: the deadline passed.
pub(super) fn wait(
    stream: &UnixStream,
    wants_in: bool,
    wants_out: bool,
    deadline: Option<Instant>,
) -> io::Result<Option<Ready>> {
    let mut wanted = PollFlags::empty();
    wanted.set(PollFlags::IN, wants_in);
    wanted.set(PollFlags::OUT, wants_out);
    loop {
        let timeout = match deadline {
            None => None,
            Some(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Ok(None);
                }
                Timespec::try_from(left).ok()
            }
        };
        let mut fds = [PollFd::new(stream, wanted)];
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            // The time is looked at again above: poll may round down.
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => {
                let ready = fds[0].revents();
                let gone = ready.intersects(PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL);
                return Ok(Some(Ready {
                    readable: gone || ready.contains(PollFlags::IN),
                    writable: wants_out && (gone || ready.contains(PollFlags::OUT)),
                }));
            }
            Err(errno) => return Err(errno.into()),
        }
    }
}
