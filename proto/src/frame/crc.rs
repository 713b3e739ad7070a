//! CRC32C of a frame, over its content rather than its encoding: a sender in any language makes the same one.

use crc_fast::{CrcAlgorithm, Digest};

use crate::v1;
use crate::v1::frame::Body;

/// Sums up integers and byte strings.
struct Sum(Digest);

impl Sum {
    fn raw(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    fn integer(&mut self, value: u64) {
        self.raw(&value.to_le_bytes());
    }

    fn enumeration(&mut self, value: i32) {
        self.raw(&i64::from(value).to_le_bytes());
    }

    fn string(&mut self, bytes: &[u8]) {
        self.integer(bytes.len() as u64);
        self.raw(bytes);
    }
}

/// The CRC32C that `frame` should carry, as `stream.proto` defines it. None for a frame without a body.
pub fn crc32c(frame: &v1::Frame) -> Option<u32> {
    let body = frame.body.as_ref()?;
    let number: u32 = match body {
        Body::Chunk(_) => 5,
        Body::Progress(_) => 6,
        Body::Seal(_) => 7,
    };
    let mut head = [0; 24];
    head[..8].copy_from_slice(&frame.stream_id.to_le_bytes());
    head[8..16].copy_from_slice(&frame.sequence.to_le_bytes());
    head[16..20].copy_from_slice(&frame.device.to_le_bytes());
    head[20..].copy_from_slice(&number.to_le_bytes());
    let mut sum = Sum(Digest::new(CrcAlgorithm::Crc32Iscsi));
    sum.raw(&head);
    match body {
        Body::Chunk(chunk) => {
            sum.integer(chunk.offset);
            sum.string(&chunk.data);
        }
        Body::Progress(progress) => {
            sum.enumeration(progress.phase);
            sum.integer(progress.left_bytes);
            sum.integer(progress.predicted_downtime_us);
        }
        Body::Seal(seal) => {
            sum.integer(seal.length_bytes);
            sum.string(&seal.blake3);
            sum.integer(seal.config.is_some().into());
            if let Some(config) = &seal.config {
                sum.integer(config.command.into());
                sum.enumeration(config.interrupt_kind);
                sum.integer(config.interrupt_vectors.into());
            }
        }
    }
    u32::try_from(sum.0.finalize()).ok()
}

/// Whether `frame` has a body and carries the CRC that belongs to it.
pub fn is_intact(frame: &v1::Frame) -> bool {
    crc32c(frame) == Some(frame.crc32c)
}
