//! One packet with its file descriptors, in or out, without waiting.
//!
//! # Invariants
//! - Received file descriptors are close-on-exec and owned from the first moment; what is not wanted is closed.
//! - A packet that was cut by the buffer is never taken for a whole one.
//! - No signal on a peer that is gone; EINTR is retried.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

use super::protocol::{MAX_FDS, MAX_PACKET_BYTES};

const CONTROL_BYTES: usize = rustix::cmsg_space!(ScmRights(MAX_FDS));

/// What came.
#[derive(Debug)]
pub(super) enum Received {
    /// A packet and what came beside it.
    Packet(Vec<u8>, Vec<OwnedFd>),
    /// A packet that is longer than any may be.
    TooLong,
    /// A packet with more file descriptors than may come, or than this process has room for.
    TooManyFds,
    /// The peer is gone, or sent a packet of nothing, which looks the same.
    End,
    /// Nothing is there.
    Nothing,
}

/// Reads one packet.
pub(super) fn receive(socket: BorrowedFd<'_>) -> io::Result<Received> {
    let mut buffer = vec![0; MAX_PACKET_BYTES];
    loop {
        let mut space = [MaybeUninit::uninit(); CONTROL_BYTES];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let message =
            match rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut buffer)], &mut control, flags) {
                Ok(message) => message,
                // A peer that went without reading everything leaves its reset before what it sent: once, then the rest.
                Err(Errno::INTR | Errno::CONNRESET) => continue,
                Err(Errno::AGAIN) => return Ok(Received::Nothing),
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
        } else if message.flags.contains(ReturnFlags::TRUNC) {
            Received::TooLong
        } else if message.bytes == 0 {
            Received::End
        } else {
            buffer.truncate(message.bytes);
            Received::Packet(buffer, fds)
        });
    }
}

/// Writes one packet, whole or not at all. `false`: there is no room now.
pub(super) fn send(socket: BorrowedFd<'_>, packet: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<bool> {
    loop {
        let mut space = [MaybeUninit::uninit(); CONTROL_BYTES];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(Errno::TOOBIG.into());
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        return match rustix::net::sendmsg(socket, &[IoSlice::new(packet)], &mut control, flags) {
            Ok(_) => Ok(true),
            Err(Errno::INTR) => continue,
            Err(Errno::AGAIN) => Ok(false),
            Err(errno) => Err(errno.into()),
        };
    }
}
