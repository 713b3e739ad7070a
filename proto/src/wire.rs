//! The messages of a `StreamState` as gRPC carries them, without a copy of the state in them. No I/O.
//!
//! ```text
//!   StreamMessage --encode--> head, payload            two pieces of a body: the state itself is never touched
//!   pieces of a body --Assembly::push, message--> StreamMessage      the state is a slice of the piece that it came in
//! ```
//! prost and tonic copy each chunk once on the way out and once on the way in, into memory that is new each time; that
//! was 7% of what moving state costs (`tests/benches/speed.md`). What is written here is what prost writes, byte for byte, and
//! what is read is whatever prost reads: a chunk in the usual order of fields by a short way, anything else by prost's.
//!
//! Invariants:
//! - A caller's first message is short. A message is refused by its length before anything of it is kept, and by its parts before it is decoded.
//! - At most one message, and one piece beyond it, is kept; small pieces are put together, so that a peer that sends a
//!   byte at a time has no more memory here than it sent.
//! - State that came in one piece is not copied, and state that came in several is copied once.
//!
//! Failure: [`WireError`], after which the stream is to be ended.

use std::collections::VecDeque;

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use prost::encoding::{decode_varint, encode_varint, encoded_len_varint};
use prost::{Message as _, Name as _};

use crate::MAX_MESSAGE_BYTES;
use crate::parts::{MAX_REQUEST_PARTS, MAX_RESPONSE_PARTS, PartsError, check_parts};
use crate::v1;
use crate::v1::frame::Body;
use crate::v1::stream_message::Kind;

/// The flag and the length before each message.
const PREFIX_BYTES: usize = 5;
/// The head of a chunk is shorter than this: four lengths of at most 5 bytes with their keys, and 41 bytes of fields.
const MAX_HEAD_BYTES: usize = 96;
/// The first message of a caller: `StreamOpen`, which is short. Until it was looked at nobody knows whether the caller may
/// send anything at all.
const MAX_OPEN_BYTES: usize = 4096;
/// Pieces shorter than this are put together.
const SMALL_BYTES: usize = 4096;

/// Keys of the fields on the way to a chunk's state: number and wire type, as in `stream.proto`.
mod key {
    pub(super) const MESSAGE: u8 = 1 << 3 | 2;
    pub(super) const FRAME: u8 = 3 << 3 | 2;
    pub(super) const STREAM_ID: u8 = 1 << 3 | 1;
    pub(super) const SEQUENCE: u8 = 2 << 3;
    pub(super) const DEVICE: u8 = 3 << 3;
    pub(super) const CRC32C: u8 = 4 << 3 | 5;
    pub(super) const CHUNK: u8 = 5 << 3 | 2;
    pub(super) const OFFSET: u8 = 1 << 3;
    pub(super) const DATA: u8 = 2 << 3 | 2;
}

/// A message on its way out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// gRPC's prefix, and all of the message but its state.
    pub head: Bytes,
    /// The state, which ends the message. Empty where it carries none.
    pub state: Bytes,
}

/// Encodes a message of a stream. Requests and responses have one encoding.
pub fn encode(message: v1::StreamMessage) -> Encoded {
    match message.kind {
        Some(Kind::Frame(v1::Frame {
            stream_id,
            sequence,
            device,
            crc32c,
            body: Some(Body::Chunk(v1::Chunk { offset, data })),
        })) if !data.is_empty() => {
            let frame = v1::Frame { stream_id, sequence, device, crc32c, body: None };
            Encoded { head: chunk_head(&frame, offset, data.len()), state: data }
        }
        kind => {
            let envelope = v1::StreamStateRequest { message: Some(v1::StreamMessage { kind }) };
            let length = envelope.encoded_len();
            let mut head = BytesMut::with_capacity(PREFIX_BYTES + length);
            put_prefix(&mut head, length);
            envelope.encode_raw(&mut head);
            Encoded { head: head.freeze(), state: Bytes::new() }
        }
    }
}

fn put_prefix(head: &mut BytesMut, length: usize) {
    head.put_u8(0);
    // No message is as long as this; one that were would be refused for what it says.
    head.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
}

/// The message that `frame` makes with a chunk as its body, up to the chunk's state. Lengths are made from the inside
/// out, as each holds those within.
fn chunk_head(frame: &v1::Frame, offset: u64, state_bytes: usize) -> Bytes {
    let within = |length: usize| 1 + encoded_len_varint(length as u64) + length;
    let chunk = if offset == 0 { 0 } else { 1 + encoded_len_varint(offset) } + within(state_bytes);
    // Everything of the frame but its body.
    let fields = frame.encoded_len();
    let in_frame = fields + within(chunk);
    let message = within(in_frame);
    let mut head = BytesMut::with_capacity(MAX_HEAD_BYTES);
    put_prefix(&mut head, within(message));
    for (key, length) in [(key::MESSAGE, message), (key::FRAME, in_frame)] {
        head.put_u8(key);
        encode_varint(length as u64, &mut head);
    }
    frame.encode_raw(&mut head);
    head.put_u8(key::CHUNK);
    encode_varint(chunk as u64, &mut head);
    if offset != 0 {
        head.put_u8(key::OFFSET);
        encode_varint(offset, &mut head);
    }
    head.put_u8(key::DATA);
    encode_varint(state_bytes as u64, &mut head);
    head.freeze()
}

/// Why what came in is no message.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum WireError {
    /// It is compressed, or its prefix is none of gRPC's.
    #[error("a message begins with {flag:#04x}; send it uncompressed, which is 0x00")]
    Compressed {
        /// The flag.
        flag: u8,
    },
    /// It is longer than any that is taken.
    #[error("a message has {found_bytes} bytes, and at most {max_bytes} are taken; send shorter chunks")]
    TooLong {
        /// The length that its prefix says.
        found_bytes: usize,
        /// What is taken.
        max_bytes: usize,
    },
    /// It would be too much in memory, or cannot be walked over.
    #[error(transparent)]
    Parts(#[from] PartsError),
    /// prost cannot read it.
    #[error("a message cannot be read: {0}")]
    Unreadable(#[from] prost::DecodeError),
    /// The body ended within a message.
    #[error("the stream ended within a message: {held_bytes} bytes of it are here")]
    CutOff {
        /// So many.
        held_bytes: usize,
    },
}

/// Whose messages they are: that decides how many parts one may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sender {
    /// `StreamStateRequest`.
    Caller,
    /// `StreamStateResponse`.
    Agent,
}

/// Puts the messages of one direction together.
#[derive(Debug)]
pub struct Assembly {
    from: Sender,
    pieces: VecDeque<Bytes>,
    /// Behind the pieces: the small ones that came last.
    tail: BytesMut,
    held_bytes: usize,
    max_bytes: usize,
    /// The length of the message that is coming, once its prefix is here.
    length: Option<usize>,
}

impl Assembly {
    /// Nothing is here yet.
    pub fn new(from: Sender) -> Self {
        let max_bytes = match from {
            Sender::Caller => MAX_OPEN_BYTES,
            Sender::Agent => MAX_MESSAGE_BYTES,
        };
        Self { from, pieces: VecDeque::new(), tail: BytesMut::new(), held_bytes: 0, max_bytes, length: None }
    }

    /// Takes in the next piece of the body.
    pub fn push(&mut self, piece: Bytes) {
        self.held_bytes += piece.len();
        if piece.len() < SMALL_BYTES {
            self.tail.extend_from_slice(&piece);
        } else {
            self.flush();
            self.pieces.push_back(piece);
        }
    }

    /// The next message, if all of it is here. A message without content is an empty one.
    pub fn message(&mut self) -> Result<Option<v1::StreamMessage>, WireError> {
        let length = match self.length {
            Some(length) => length,
            None if self.held_bytes < PREFIX_BYTES => return Ok(None),
            None => {
                self.flush();
                let prefix = self.take(PREFIX_BYTES);
                let (flag, length) = (prefix[0], &mut &prefix[1..]);
                if flag != 0 {
                    return Err(WireError::Compressed { flag });
                }
                let found_bytes = usize::try_from(length.get_u32()).unwrap_or(usize::MAX);
                if found_bytes > self.max_bytes {
                    return Err(WireError::TooLong { found_bytes, max_bytes: self.max_bytes });
                }
                *self.length.insert(found_bytes)
            }
        };
        if self.held_bytes < length {
            return Ok(None);
        }
        self.flush();
        self.length = None;
        self.max_bytes = MAX_MESSAGE_BYTES;
        if let Some((head_bytes, mut frame, offset)) = self.chunk_head(length) {
            self.skip(head_bytes);
            let data = self.take(length - head_bytes);
            frame.body = Some(Body::Chunk(v1::Chunk { offset, data }));
            return Ok(Some(v1::StreamMessage { kind: Some(Kind::Frame(frame)) }));
        }
        let message = self.take(length);
        let message = match self.from {
            Sender::Caller => {
                check_parts(&v1::StreamStateRequest::full_name(), &message, MAX_REQUEST_PARTS)?;
                v1::StreamStateRequest::decode(message)?.message
            }
            Sender::Agent => {
                check_parts(&v1::StreamStateResponse::full_name(), &message, MAX_RESPONSE_PARTS)?;
                v1::StreamStateResponse::decode(message)?.message
            }
        };
        Ok(Some(message.unwrap_or_default()))
    }

    /// The body has ended: was that the end of a message?
    pub fn finish(&self) -> Result<(), WireError> {
        match self.length {
            None if self.held_bytes == 0 => Ok(()),
            None | Some(_) => Err(WireError::CutOff { held_bytes: self.held_bytes }),
        }
    }

    /// The head of the message that is next, `length` long, if it is a chunk in the usual order of fields: how long the
    /// head is, the frame without its body, and the chunk's offset.
    fn chunk_head(&self, length: usize) -> Option<(usize, v1::Frame, u64)> {
        let mut buffer = [0; MAX_HEAD_BYTES];
        let mut filled = 0;
        for piece in &self.pieces {
            let some = piece.len().min(MAX_HEAD_BYTES - filled);
            buffer[filled..filled + some].copy_from_slice(&piece[..some]);
            filled += some;
        }
        // What comes after this message is not part of it.
        let mut head = Head { rest: &buffer[..filled.min(length)], left_bytes: length };
        head.opens(key::MESSAGE)?;
        head.opens(key::FRAME)?;
        let mut frame = v1::Frame::default();
        if head.is(key::STREAM_ID) {
            frame.stream_id = u64::from_le_bytes(head.array()?);
        }
        if head.is(key::SEQUENCE) {
            frame.sequence = head.varint()?;
        }
        if head.is(key::DEVICE) {
            frame.device = u32::try_from(head.varint()?).ok()?;
        }
        if head.is(key::CRC32C) {
            frame.crc32c = u32::from_le_bytes(head.array()?);
        }
        head.opens(key::CHUNK)?;
        let offset = if head.is(key::OFFSET) { head.varint()? } else { 0 };
        head.opens(key::DATA)?;
        Some((length - head.left_bytes, frame, offset))
    }

    fn flush(&mut self) {
        if !self.tail.is_empty() {
            self.pieces.push_back(self.tail.split().freeze());
        }
    }

    /// Drops bytes that are here.
    fn skip(&mut self, mut bytes: usize) {
        self.held_bytes -= bytes;
        while let Some(front) = self.pieces.front_mut() {
            if front.len() > bytes {
                front.advance(bytes);
                return;
            }
            bytes -= front.len();
            self.pieces.pop_front();
        }
    }

    /// Takes bytes that are here: without a copy where they are in one piece.
    fn take(&mut self, bytes: usize) -> Bytes {
        match self.pieces.front_mut() {
            Some(front) if front.len() > bytes => {
                self.held_bytes -= bytes;
                front.split_to(bytes)
            }
            Some(front) if front.len() == bytes => {
                self.held_bytes -= bytes;
                self.pieces.pop_front().unwrap_or_default()
            }
            Some(_) | None => {
                let mut whole = BytesMut::with_capacity(bytes);
                while whole.len() < bytes {
                    let Some(front) = self.pieces.front_mut() else { break };
                    let some = front.len().min(bytes - whole.len());
                    whole.extend_from_slice(&front[..some]);
                    self.skip(some);
                }
                whole.freeze()
            }
        }
    }
}

/// The head of a chunk, being read.
struct Head<'a> {
    rest: &'a [u8],
    /// Of the message, the state included.
    left_bytes: usize,
}

impl Head<'_> {
    /// Steps over a key, if it is next.
    fn is(&mut self, key: u8) -> bool {
        let is_next = self.rest.first() == Some(&key);
        if is_next {
            self.advance(1);
        }
        is_next
    }

    /// Steps into a field that takes all that is left.
    fn opens(&mut self, key: u8) -> Option<()> {
        if !self.is(key) {
            return None;
        }
        let length = self.varint()?;
        (length == self.left_bytes as u64).then_some(())
    }

    fn varint(&mut self) -> Option<u64> {
        let before = self.rest.len();
        let value = decode_varint(&mut self.rest).ok()?;
        self.left_bytes = self.left_bytes.checked_sub(before - self.rest.len())?;
        Some(value)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let bytes = *self.rest.first_chunk()?;
        self.advance(N);
        Some(bytes)
    }

    fn advance(&mut self, bytes: usize) {
        self.rest = &self.rest[bytes..];
        // `rest` is within what is left.
        self.left_bytes = self.left_bytes.saturating_sub(bytes);
    }
}

#[cfg(test)]
mod tests;
