//! Reading and writing streams in pieces of chosen sizes, with every end counted.
//!
//! # Invariants
//! - A stream is read to where it ends by itself: in STOP_COPY by 0, in pre-copy by the first "nothing for now".
//! - Never more than the limit is kept; a larger state is "not observed", not cut.

use super::rule::{Instead, differs, not_observed};
use crate::{DeviceError, Read, RestoreStream, SaveStream};

/// How many bytes are moved one at a time, before a stream goes on in larger pieces.
const SINGLE_BYTES: usize = 16 << 10;
/// How many reads a pre-copy may take until there is nothing for now.
const PRECOPY_READS: usize = 1 << 14;

/// The sizes of pieces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pieces {
    /// As large as a transfer would take them.
    Usual,
    /// One byte each, for the first 16 KiB; then as usual.
    Single,
    /// 7, 4093 and 65521 bytes in turn: no power of two, no page.
    Odd,
    /// More than any driver hands out at once.
    Huge,
}

impl Pieces {
    pub(super) const ALL: [Self; 4] = [Self::Usual, Self::Single, Self::Odd, Self::Huge];

    /// How large the piece at `offset` may be, the `index`th.
    fn size(self, index: usize, offset: usize) -> usize {
        match self {
            Self::Single if offset < SINGLE_BYTES => 1,
            Self::Usual | Self::Single => 256 << 10,
            Self::Odd => [7, 4093, 65_521][index % 3],
            Self::Huge => 8 << 20,
        }
    }
}

/// Reads a STOP_COPY stream to its end.
pub(super) fn drain(
    stream: &mut dyn SaveStream,
    pieces: Pieces,
    limit_bytes: usize,
) -> Result<Vec<u8>, Instead> {
    let mut all = Vec::new();
    let mut buffer = vec![0; pieces.size(2, SINGLE_BYTES)];
    for index in 0.. {
        let size = pieces.size(index, all.len()).min(buffer.len());
        match stream.read(&mut buffer[..size])? {
            Read::Bytes(bytes) => all.extend_from_slice(&buffer[..bytes.min(size)]),
            Read::Zero => break,
            Read::NothingNow => return differs("STOP_COPY answers ENOMSG, as only pre-copy may"),
        }
        if all.len() > limit_bytes {
            return not_observed(format!("the state is larger than the {limit_bytes} bytes this run keeps"));
        }
    }
    Ok(all)
}

/// Reads a pre-copy stream until it has nothing for now. Says how that was answered; `None`: it always had more.
pub(super) fn drain_precopy(
    stream: &mut dyn SaveStream,
    out: &mut Vec<u8>,
    limit_bytes: usize,
) -> Result<Option<Read>, Instead> {
    let mut buffer = vec![0; Pieces::Usual.size(0, 0)];
    for _ in 0..PRECOPY_READS {
        match stream.read(&mut buffer)? {
            Read::Bytes(bytes) => out.extend_from_slice(&buffer[..bytes.min(buffer.len())]),
            idle @ (Read::Zero | Read::NothingNow) => return Ok(Some(idle)),
        }
        if out.len() > limit_bytes {
            return not_observed(format!("pre-copy brings more than the {limit_bytes} bytes this run keeps"));
        }
    }
    Ok(None)
}

/// Writes all of `bytes`. The error says how many bytes the device had taken.
pub(super) fn write_all(
    stream: &mut dyn RestoreStream,
    bytes: &[u8],
    pieces: Pieces,
) -> Result<(), (usize, DeviceError)> {
    let mut written = 0;
    for index in 0.. {
        let rest = &bytes[written..];
        if rest.is_empty() {
            break;
        }
        let piece = &rest[..pieces.size(index, written).min(rest.len())];
        let taken = stream.write(piece).map_err(|error| (written, error))?;
        if taken == 0 || taken > piece.len() {
            return Err((written, DeviceError::errno(crate::Call::Write, libc::EIO)));
        }
        written += taken;
    }
    Ok(())
}
