//! Buffers for streaming reads, handed out as [`Bytes`] and taken back when the last of those is dropped.
//!
//! A save reads into a pooled buffer once, and from there on nothing copies: hashing, framing and sending share it.
//! The pool keeps returned buffers up to a limit and never blocks: how many are out at a time is bounded by the
//! channel behind the reader, not here.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

use crate::DataSize;

/// Smallest chunk, 64 KiB: below it the cost of a system call outweighs the copy.
pub const MIN_CHUNK_BYTES: usize = 64 << 10;
/// Largest chunk, 1 MiB: above it nothing gets faster. The buffers of a device that is being read fall out of the caches
/// then, and memory and cancel latency grow.
pub const MAX_CHUNK_BYTES: usize = 1 << 20;
/// Chunk of a device that does not say how much state it has, 1 MiB.
const UNKNOWN_CHUNK_BYTES: usize = 1 << 20;
/// A device's state should make about this many chunks, so that progress can be seen.
const CHUNKS_A_DEVICE: u64 = 64;

/// The chunk size that suits a device with this much state: a power of two from [`MIN_CHUNK_BYTES`] to
/// [`MAX_CHUNK_BYTES`].
pub fn chunk_bytes_for(size: DataSize) -> usize {
    match size.bytes() {
        Some(bytes) => {
            let even_share = usize::try_from(bytes / CHUNKS_A_DEVICE).unwrap_or(MAX_CHUNK_BYTES);
            even_share.min(MAX_CHUNK_BYTES).next_power_of_two().clamp(MIN_CHUNK_BYTES, MAX_CHUNK_BYTES)
        }
        None => UNKNOWN_CHUNK_BYTES,
    }
}

/// A pool of equal buffers. Cheap to clone; clones share the buffers.
#[derive(Debug, Clone)]
pub struct ChunkPool {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    chunk_bytes: usize,
    keep: usize,
    free: Mutex<Vec<Vec<u8>>>,
}

impl ChunkPool {
    /// A pool of buffers of `chunk_bytes`, brought into [`MIN_CHUNK_BYTES`]..=[`MAX_CHUNK_BYTES`], which keeps at
    /// most `keep` unused ones.
    pub fn new(chunk_bytes: usize, keep: usize) -> Self {
        let chunk_bytes = chunk_bytes.clamp(MIN_CHUNK_BYTES, MAX_CHUNK_BYTES);
        Self { shared: Arc::new(Shared { chunk_bytes, keep, free: Mutex::default() }) }
    }

    /// Size of every buffer.
    pub fn chunk_bytes(&self) -> usize {
        self.shared.chunk_bytes
    }

    /// An unused buffer, [`chunk_bytes`](Self::chunk_bytes) long, with whatever was in it before.
    pub fn take(&self) -> PooledChunk {
        let free = self.shared.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let buffer = free.unwrap_or_else(|| vec![0; self.shared.chunk_bytes]);
        PooledChunk { buffer, filled: 0, pool: Arc::clone(&self.shared) }
    }

    #[cfg(test)]
    fn unused(&self) -> usize {
        self.shared.free.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}

/// A buffer out of a pool, being filled.
#[derive(Debug)]
pub struct PooledChunk {
    buffer: Vec<u8>,
    filled: usize,
    pool: Arc<Shared>,
}

impl PooledChunk {
    /// The part not filled yet.
    pub fn unfilled_mut(&mut self) -> &mut [u8] {
        &mut self.buffer[self.filled..]
    }

    /// Says that the next `bytes` bytes were filled; more than there is room for fills the buffer.
    pub fn advance(&mut self, bytes: usize) {
        self.filled = self.filled.saturating_add(bytes).min(self.buffer.len());
    }

    /// Whether nothing was filled.
    pub fn is_empty(&self) -> bool {
        self.filled == 0
    }

    /// Whether there is no room left.
    pub fn is_full(&self) -> bool {
        self.filled == self.buffer.len()
    }

    /// The filled part as [`Bytes`], without a copy. The buffer returns to its pool when the last clone is dropped.
    pub fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for PooledChunk {
    fn as_ref(&self) -> &[u8] {
        &self.buffer[..self.filled]
    }
}

impl Drop for PooledChunk {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.buffer);
        let mut free = self.pool.free.lock().unwrap_or_else(PoisonError::into_inner);
        if free.len() < self.pool.keep {
            free.push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunk_size_follows_the_device() {
        let kib = 1 << 10;
        for (size, chunk) in [
            (DataSize::Known(0), 64 * kib),
            (DataSize::Known(60), 64 * kib),
            (DataSize::UpperBound(16 << 20), 256 * kib),
            (DataSize::Known(40 << 20), 1024 * kib),
            (DataSize::Known(40 << 30), 1024 * kib),
            (DataSize::Known(u64::MAX), 1024 * kib),
            (DataSize::Unknown, 1024 * kib),
        ] {
            assert_eq!(chunk_bytes_for(size), chunk, "{size}");
        }
    }

    #[test]
    fn a_buffer_comes_back_when_the_last_clone_is_dropped_and_no_more_are_kept_than_asked() {
        let pool = ChunkPool::new(MIN_CHUNK_BYTES, 1);
        let mut chunk = pool.take();
        chunk.unfilled_mut()[..3].copy_from_slice(b"abc");
        chunk.advance(3);
        let bytes = chunk.freeze();
        let clone = bytes.clone();
        drop(bytes);
        assert_eq!((pool.unused(), &clone[..]), (0, &b"abc"[..]));
        drop(clone);
        assert_eq!(pool.unused(), 1);
        let (first, second) = (pool.take(), pool.take());
        drop((first, second));
        assert_eq!(pool.unused(), 1);
    }
}
