//! Frames: device state on its way from a giver to a taker.
//!
//! ```text
//!   state --> Framer ---------------- v1::Frame ----------------> FrameVerifier --> Accepted
//!             number, place, CRC32C,                FrameCheck:   stream, number, place, bounds, CRC32C
//!             BLAKE3 as it passes                   seal::Verifier: BLAKE3, once
//! ```
//!
//! Invariants:
//! - The CRC is compared before anything of a frame is believed, and the rest of the frame before its state is hashed.
//! - A taker takes the next frame of its own stream and no other; a chunk has its place behind the one before it.
//! - [`Accepted`] holds state only as a `VerifiedChunk` and an end only as a `VerifiedSeal`, which nothing else makes.
//! - A seal is on all state that was handed in: where frames of it were not taken to be sent, none is made.
//! - After the first error everything is refused: a stream is never mended.
//! - Payload is never copied, and touched twice at each end: by the CRC and by the digest.
//!
//! Failure: [`FrameError`] at the taker and [`GiveError`] at the giver say what was expected and what was found. The
//! stream is over with either of them.
//!
//! Digests are the slowest part. Both ends can be split where they are made: a [`Framer`] takes any [`StateDigest`], and
//! a taker may run [`FrameCheck`] in one place and a `seal::Verifier` for each device in another.

mod check;
mod crc;
mod error;
mod give;
mod verify;

pub use check::{Checked, FrameCheck};
pub use crc::{crc32c, is_intact};
pub use error::{FrameError, GiveError};
pub use give::{Chunks, Framer, StateDigest};
pub use verify::{Accepted, FrameVerifier};

#[cfg(test)]
mod tests;
