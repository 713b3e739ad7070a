//! Reading and writing little-endian fields.
//!
//! ```text
//!   Cursor: one body, front to back; every step checks what is left      Frame: header room, fields, patched size
//! ```
//!
//! # Failure paths
//! A read past the end is [`DecodeError::Truncated`] with the message's name; a frame over the limit [`TooLong`].

use super::header::{HEADER_BYTES, Header, Kind};
use super::{Code, DecodeError, Limits, TooLong};

/// Reads one body from front to back.
#[derive(Debug)]
pub(super) struct Cursor<'a> {
    what: &'static str,
    whole: usize,
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    /// A cursor at the start of `body`, named `what` in errors.
    pub(super) fn new(what: &'static str, body: &'a [u8]) -> Self {
        Self { what, whole: body.len(), rest: body }
    }

    /// The next `N` bytes.
    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let Some((head, rest)) = self.rest.split_first_chunk::<N>() else {
            return Err(DecodeError::Truncated {
                what: self.what,
                needed_bytes: self.whole - self.rest.len() + N,
                found_bytes: self.whole,
            });
        };
        self.rest = rest;
        Ok(*head)
    }

    pub(super) fn u16(&mut self) -> Result<u16, DecodeError> {
        self.array().map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, DecodeError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, DecodeError> {
        self.array().map(u64::from_le_bytes)
    }

    /// Everything that is left.
    pub(super) fn rest(self) -> &'a [u8] {
        self.rest
    }

    /// The first `stated` of the bytes that are left; what follows them is ignored.
    pub(super) fn data(self, field: &'static str, stated: u64) -> Result<&'a [u8], DecodeError> {
        let end = usize::try_from(stated).ok();
        end.and_then(|end| self.rest.get(..end)).ok_or_else(|| self.length(field, stated))
    }

    /// The bytes that are left, which must be exactly `stated`.
    pub(super) fn exact(self, field: &'static str, stated: u64) -> Result<&'a [u8], DecodeError> {
        if self.rest.len() as u64 == stated { Ok(self.rest) } else { Err(self.length(field, stated)) }
    }

    /// Refuses an `argsz` that promises less than `least`.
    pub(super) fn argsz(&self, argsz: u32, least: u64) -> Result<u32, DecodeError> {
        if u64::from(argsz) < least {
            return Err(DecodeError::Length {
                what: self.what,
                field: "argsz",
                stated: argsz.into(),
                actual: least,
            });
        }
        Ok(argsz)
    }

    /// The error for a field that means nothing.
    pub(super) fn field(&self, field: &'static str, value: u64) -> DecodeError {
        DecodeError::Field { what: self.what, field, value }
    }

    fn length(&self, field: &'static str, stated: u64) -> DecodeError {
        DecodeError::Length { what: self.what, field, stated, actual: self.rest.len() as u64 }
    }
}

/// One message in the making: room for the header, then fields in order.
#[derive(Debug)]
pub(super) struct Frame {
    bytes: Vec<u8>,
}

impl Frame {
    pub(super) fn new() -> Self {
        Self { bytes: vec![0; HEADER_BYTES] }
    }

    pub(super) fn u16(&mut self, value: u16) -> &mut Self {
        self.data(&value.to_le_bytes())
    }

    pub(super) fn u32(&mut self, value: u32) -> &mut Self {
        self.data(&value.to_le_bytes())
    }

    pub(super) fn u64(&mut self, value: u64) -> &mut Self {
        self.data(&value.to_le_bytes())
    }

    pub(super) fn data(&mut self, data: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(data);
        self
    }

    /// The length of a piece of data as the 32-bit field that announces it. What does not fit makes the frame too
    /// long by far, so it never leaves [`finish`](Self::finish).
    pub(super) fn length(data: &[u8]) -> u32 {
        u32::try_from(data.len()).unwrap_or(u32::MAX)
    }

    /// The whole message, its header filled in.
    pub(super) fn finish(self, id: u16, code: Code, kind: Kind, limits: Limits) -> Result<Vec<u8>, TooLong> {
        let limit_bytes = limits.max_message_bytes();
        let size = u32::try_from(self.bytes.len()).ok().filter(|&size| size <= limit_bytes);
        let Some(size_bytes) = size else {
            return Err(TooLong { size_bytes: self.bytes.len(), limit_bytes });
        };
        let mut bytes = self.bytes;
        if let Some(header) = bytes.first_chunk_mut::<HEADER_BYTES>() {
            *header = Header { id, code, size_bytes, kind }.encode();
        }
        Ok(bytes)
    }
}
