//! Finds the first answer on a connection that was taken over in the middle of a message.
//!
//! ```text
//!   ... rest of a reply that a killed owner had half read | reply to the fence
//!       not a header, whatever it looks like                ^ its id, its command, its kind
//! ```
//! Who reads a header and is killed before its body leaves the rest of a message behind, which reads like anything. So an owner
//! that begins with one request looks for the answer to it in all that comes, beside putting messages together in
//! the ordinary way. The answer is known by 12 bytes that nothing else has: an id of this owner's, the command that was asked,
//! and the flags of a reply; and by what it says, which the fence compares.
//!
//! # Failure paths
//! What is looked through is bounded. A request that a killed owner had half written is not mended by this: the server
//! still waits for its rest.

use super::PeerError;
use super::inbox::Incoming;
use crate::vfio_user::codec::{HEADER_BYTES, Header, Kind, Limits};

/// An answer that is looked for is short.
const MOST_BODY_BYTES: usize = 256;
/// Messages of full length that may have been left over.
const MOST_FULL: u64 = 8;

/// Looks through what comes.
#[derive(Debug)]
pub(super) struct Seeker {
    limits: Limits,
    kept: Vec<u8>,
    left_bytes: u64,
}

impl Seeker {
    pub(super) fn within(limits: Limits) -> Self {
        Self { limits, kept: Vec::new(), left_bytes: MOST_FULL * u64::from(limits.max_message_bytes()) }
    }

    /// Takes the next bytes. Returns the answer, once all of it is there, and what came after it.
    pub(super) fn look(
        &mut self,
        bytes: &[u8],
        is_answer: impl Fn(&Header) -> bool,
    ) -> Result<Option<(Incoming, Vec<u8>)>, PeerError> {
        self.left_bytes =
            self.left_bytes.checked_sub(bytes.len() as u64).ok_or(PeerError::TooManyLeftOver)?;
        self.kept.extend_from_slice(bytes);
        let mut at = 0;
        while let Some(begun) = self.kept[at..].first_chunk::<HEADER_BYTES>() {
            let found = Header::decode(begun, self.limits).ok().filter(|header| {
                let is_reply = match header.kind {
                    Kind::Reply | Kind::ErrorReply { .. } => true,
                    Kind::Command { .. } => false,
                };
                is_reply && header.body_bytes() <= MOST_BODY_BYTES && is_answer(header)
            });
            if let Some(header) = found {
                let body = at + HEADER_BYTES;
                let end = body + header.body_bytes();
                if self.kept.len() < end {
                    break;
                }
                let rest = self.kept.split_off(end);
                let body = self.kept.split_off(body);
                return Ok(Some((Incoming { header, body, fds: Vec::new() }, rest)));
            }
            at += 1;
        }
        self.kept.drain(..at);
        Ok(None)
    }
}
