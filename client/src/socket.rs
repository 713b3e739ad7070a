//! The socket under TLS, as both ends of a connection have it.
//!
//! ```text
//!   kernel --one call, up to READ_BYTES--> buffer --record by record--> rustls      and the other way
//!   rustls --up to WRITE_BYTES of records, one call--> kernel
//! ```
//! rustls asks for one record of 16 KiB at a time, and by itself hands on four. Each call into the kernel costs as much as
//! a record's cipher, and each write wakes the reader: state moves faster in larger steps (`tests/benches/speed.md`).
//!
//! Invariants: nothing is held back: what is here is read, and what is written is sent at once. The memory is bounded
//! by both sizes, and of what is not used nothing is touched.

use rustls::ConnectionCommon;
use tokio::io::BufReader;

use crate::network::BoxStream;

/// What one call reads at most: four records, which stay in a core's cache until they are decrypted.
const READ_BYTES: usize = 64 << 10;
/// What waits encrypted at most, and is so written with one call.
const WRITE_BYTES: usize = 256 << 10;

/// A connection that is read in large steps.
pub type Socket = BufReader<BoxStream>;

/// Prepares a connection for TLS.
pub fn socket(stream: BoxStream) -> Socket {
    BufReader::with_capacity(READ_BYTES, stream)
}

/// Has a TLS session write in large steps, once its handshake is over.
pub fn write_in_large_steps<Data>(session: &mut ConnectionCommon<Data>) {
    session.set_buffer_limit(Some(WRITE_BYTES));
}
