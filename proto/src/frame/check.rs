//! The taker's end without the digest: is this the next frame, whole, of this stream, and within its bounds?

use bytes::Bytes;
use vfio_checkpoint_seal::Seal;

use super::{FrameError, crc};
use crate::domain::{ConfigSpaceCapture, Invalid, Progress, StreamLimits, seal_from_wire};
use crate::ids::StreamId;
use crate::v1;
use crate::v1::frame::Body;

/// How far one device's state is.
#[derive(Debug, Clone, Copy, Default)]
struct Place {
    next_offset: u64,
    sealed: bool,
}

/// What a checked frame carries. Its state is whole and in its place, and its digest is still to be compared.
#[derive(Debug)]
pub enum Checked {
    /// The next state of a device.
    Chunk {
        /// The device.
        device: usize,
        /// Where it belongs in the device's state, in bytes.
        offset: u64,
        /// The state.
        data: Bytes,
    },
    /// How far the giver is.
    Progress(Progress),
    /// The end of a device's state. The length in it is right.
    Seal {
        /// The device.
        device: usize,
        /// What the digest must come to.
        seal: Seal,
        /// What was captured of configuration space.
        config: Option<ConfigSpaceCapture>,
    },
}

/// Checks the frames of one stream, in order.
#[derive(Debug)]
pub struct FrameCheck {
    stream: StreamId,
    next_sequence: u64,
    max_chunk_bytes: u32,
    max_device_bytes: u64,
    devices: Vec<Place>,
    failed: bool,
}

impl FrameCheck {
    /// A taker of `devices` states on `stream`.
    pub fn new(stream: StreamId, devices: usize, limits: &StreamLimits) -> Self {
        Self {
            stream,
            next_sequence: 0,
            max_chunk_bytes: limits.max_chunk_bytes,
            max_device_bytes: limits.max_device_bytes,
            devices: vec![Place::default(); devices],
            failed: false,
        }
    }

    /// Takes the next frame. After an error it takes nothing more.
    pub fn accept(&mut self, frame: v1::Frame) -> Result<Checked, FrameError> {
        if self.failed {
            return Err(FrameError::AlreadyFailed);
        }
        // A frame that is left half-way has failed.
        self.failed = true;
        let checked = self.check(frame)?;
        self.next_sequence += 1;
        self.failed = false;
        Ok(checked)
    }

    /// Refuses everything from now on: what was checked here was found wrong elsewhere.
    pub fn fail(&mut self) {
        self.failed = true;
    }

    /// The number of the next frame: how many were taken.
    pub fn next_sequence(&self) -> u64 {
        self.next_sequence
    }

    /// Whether every device is sealed.
    pub fn all_sealed(&self) -> bool {
        !self.failed && self.devices.iter().all(|place| place.sealed)
    }

    /// The stream has ended: is all of it here?
    pub fn finish(&self) -> Result<(), FrameError> {
        if self.failed {
            return Err(FrameError::AlreadyFailed);
        }
        let unsealed = self.devices.iter().enumerate().filter(|(_, place)| !place.sealed);
        let devices: Vec<usize> = unsealed.map(|(device, _)| device).collect();
        if devices.is_empty() {
            Ok(())
        } else {
            Err(FrameError::Unsealed { next_sequence: self.next_sequence, devices })
        }
    }

    fn check(&mut self, frame: v1::Frame) -> Result<Checked, FrameError> {
        let sequence = frame.sequence;
        let computed = crc::crc32c(&frame).ok_or(FrameError::NoBody { sequence })?;
        if computed != frame.crc32c {
            return Err(FrameError::Crc { sequence, stated: frame.crc32c, computed });
        }
        if frame.stream_id != self.stream.0 {
            let found = StreamId(frame.stream_id);
            return Err(FrameError::WrongStream { sequence, expected: self.stream, found });
        }
        if sequence > self.next_sequence {
            return Err(FrameError::Gap { expected: self.next_sequence, found: sequence });
        }
        if sequence < self.next_sequence {
            return Err(FrameError::Repeated { expected: self.next_sequence, found: sequence });
        }
        let body = frame.body.ok_or(FrameError::NoBody { sequence })?;
        match body {
            Body::Chunk(chunk) => self.chunk(sequence, frame.device, chunk),
            Body::Progress(_) if frame.device != 0 => {
                Err(FrameError::ProgressOfDevice { sequence, device: frame.device })
            }
            Body::Progress(progress) => {
                let progress = progress.try_into().map_err(at(sequence, "progress"))?;
                Ok(Checked::Progress(progress))
            }
            Body::Seal(seal) => self.seal(sequence, frame.device, seal),
        }
    }

    fn place(&mut self, sequence: u64, device: u32) -> Result<(usize, &mut Place), FrameError> {
        let devices = self.devices.len();
        let index = usize::try_from(device).unwrap_or(usize::MAX);
        let place = self.devices.get_mut(index);
        place.map(|place| (index, place)).ok_or(FrameError::UnknownDevice { sequence, device, devices })
    }

    fn chunk(&mut self, sequence: u64, device: u32, chunk: v1::Chunk) -> Result<Checked, FrameError> {
        let (max_chunk_bytes, max_device_bytes) = (self.max_chunk_bytes, self.max_device_bytes);
        let (device, place) = self.place(sequence, device)?;
        let v1::Chunk { offset, data } = chunk;
        if place.sealed {
            return Err(FrameError::AfterSeal { device, offset });
        }
        if offset != place.next_offset {
            return Err(FrameError::Offset { device, expected: place.next_offset, found: offset });
        }
        if data.is_empty() {
            return Err(FrameError::EmptyChunk { device, offset });
        }
        if data.len() > max_chunk_bytes as usize {
            let found_bytes = data.len();
            return Err(FrameError::ChunkTooLong { device, max_bytes: max_chunk_bytes, found_bytes });
        }
        let end = offset.saturating_add(data.len() as u64);
        if end > max_device_bytes {
            return Err(FrameError::DeviceTooLong { device, max_bytes: max_device_bytes, found_bytes: end });
        }
        place.next_offset = end;
        Ok(Checked::Chunk { device, offset, data })
    }

    fn seal(&mut self, sequence: u64, device: u32, seal: v1::StreamSeal) -> Result<Checked, FrameError> {
        let (device, place) = self.place(sequence, device)?;
        if place.sealed {
            return Err(FrameError::SecondSeal { device });
        }
        let config = seal.config.map(ConfigSpaceCapture::try_from).transpose();
        let config = config.map_err(at(sequence, "seal.config"))?;
        let seal = seal_from_wire(seal.length_bytes, &seal.blake3).map_err(at(sequence, "seal"))?;
        if seal.bytes != place.next_offset {
            let (sealed_bytes, found_bytes) = (seal.bytes, place.next_offset);
            return Err(FrameError::SealLength { device, sealed_bytes, found_bytes });
        }
        place.sealed = true;
        Ok(Checked::Seal { device, seal, config })
    }
}

fn at(sequence: u64, outer: &str) -> impl FnOnce(Invalid) -> FrameError {
    move |invalid| FrameError::Body { sequence, source: invalid.within(outer) }
}
