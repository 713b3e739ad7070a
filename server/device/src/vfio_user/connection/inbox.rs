//! Puts messages together from whatever pieces arrive.
//!
//! ```text
//!   room() -> where the next bytes go: the rest of a header, then the rest of its body, never past the message
//!   advance(bytes, fds) -> a whole message, or not yet
//! ```
//!
//! # Invariants
//! - Nothing is allocated for a body before its header was held against the limits.
//! - A read never goes past the end of a message, so that file descriptors that come with it are its own.
//! - At most `max_fds` file descriptors a message are kept; what is not wanted is closed by being dropped.

use std::os::fd::OwnedFd;

use super::PeerError;
use crate::vfio_user::codec::{HEADER_BYTES, Header, Limits};

/// A whole message.
#[derive(Debug)]
pub(super) struct Incoming {
    pub(super) header: Header,
    pub(super) body: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

/// The message that is arriving.
#[derive(Debug)]
pub(super) struct Inbox {
    limits: Limits,
    max_fds: usize,
    header: [u8; HEADER_BYTES],
    header_filled: usize,
    body: Option<(Header, Vec<u8>)>,
    body_filled: usize,
    fds: Vec<OwnedFd>,
}

impl Inbox {
    pub(super) fn new(limits: Limits, max_fds: usize) -> Self {
        Self {
            limits,
            max_fds,
            header: [0; HEADER_BYTES],
            header_filled: 0,
            body: None,
            body_filled: 0,
            fds: Vec::new(),
        }
    }

    /// New limits, for messages whose header has not arrived yet.
    pub(super) fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// Whether part of a message has arrived.
    pub(super) fn is_within_message(&self) -> bool {
        self.header_filled > 0
    }

    /// Forgets what was begun: the next bytes are the beginning of a header.
    pub(super) fn restart(&mut self) {
        (self.header_filled, self.body_filled, self.body) = (0, 0, None);
        self.fds.clear();
    }

    /// Where the next bytes go. Never empty.
    pub(super) fn room(&mut self) -> &mut [u8] {
        match &mut self.body {
            None => &mut self.header[self.header_filled..],
            Some((_, body)) => &mut body[self.body_filled..],
        }
    }

    /// Counts `bytes` of the room as filled, with file descriptors that came along.
    pub(super) fn advance(&mut self, bytes: usize, fds: Vec<OwnedFd>) -> Result<Option<Incoming>, PeerError> {
        self.fds.extend(fds);
        if self.fds.len() > self.max_fds {
            return Err(PeerError::TooManyFds { limit: self.max_fds });
        }
        let (header, body) = if let Some(begun) = self.body.take() {
            self.body_filled += bytes;
            begun
        } else {
            self.header_filled += bytes;
            if self.header_filled < HEADER_BYTES {
                return Ok(None);
            }
            let header = Header::decode(&self.header, self.limits)?;
            (header, vec![0; header.body_bytes()])
        };
        if self.body_filled < body.len() {
            self.body = Some((header, body));
            return Ok(None);
        }
        self.header_filled = 0;
        self.body_filled = 0;
        Ok(Some(Incoming { header, body, fds: std::mem::take(&mut self.fds) }))
    }
}
