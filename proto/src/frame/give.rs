//! The giver's end: state into frames.

use bytes::Bytes;
use vfio_checkpoint_seal::{Seal, SealHasher};

use super::{GiveError, crc};
use crate::domain::{ConfigSpaceCapture, Progress, StreamLimits};
use crate::ids::StreamId;
use crate::v1;
use crate::v1::frame::Body;

/// Makes the digest of one device's state. [`SealHasher`] does it at once; another may hash elsewhere and be waited for
/// in `seal`. It gets each chunk as `Bytes`, so that it can keep one without a copy.
pub trait StateDigest {
    /// Takes the next bytes.
    fn update(&mut self, chunk: &Bytes);

    /// Bytes taken so far.
    fn bytes(&self) -> u64;

    /// The seal on all of them.
    fn seal(self) -> Seal;
}

impl StateDigest for SealHasher {
    fn update(&mut self, chunk: &Bytes) {
        SealHasher::update(self, chunk);
    }

    fn bytes(&self) -> u64 {
        SealHasher::bytes(self)
    }

    fn seal(self) -> Seal {
        SealHasher::seal(&self)
    }
}

/// Makes the frames of one stream, in the order in which they must be sent.
#[derive(Debug)]
pub struct Framer<D = SealHasher> {
    stream: StreamId,
    next_sequence: u64,
    max_chunk_bytes: usize,
    max_device_bytes: u64,
    /// None once a device is sealed.
    devices: Vec<Option<D>>,
    /// The device of which state was handed in and not given. Its seal would be on less than there is, and match.
    torn: Option<usize>,
}

impl Framer {
    /// A giver of `devices` states on `stream`.
    pub fn new(stream: StreamId, devices: usize, limits: &StreamLimits) -> Self {
        Self::with_digests(stream, limits, (0..devices).map(|_| SealHasher::new()).collect())
    }
}

impl<D: StateDigest> Framer<D> {
    /// A giver of as many states as there are digests, which have seen nothing yet.
    pub fn with_digests(stream: StreamId, limits: &StreamLimits, digests: Vec<D>) -> Self {
        Self {
            stream,
            next_sequence: 0,
            max_chunk_bytes: limits.max_chunk_bytes.max(1) as usize,
            max_device_bytes: limits.max_device_bytes,
            devices: digests.into_iter().map(Some).collect(),
            torn: None,
        }
    }

    /// Frames for the next state of a device: one for each `max_chunk_bytes`, and none for no bytes. All of them must
    /// be sent.
    pub fn chunk(&mut self, device: usize, state: Bytes) -> Result<Chunks<'_, D>, GiveError> {
        let max_bytes = self.max_device_bytes;
        let found_bytes = self.device(device)?.bytes().saturating_add(state.len() as u64);
        if found_bytes > max_bytes {
            return Err(GiveError::DeviceTooLong { device, max_bytes, found_bytes });
        }
        Ok(Chunks { framer: self, device, rest: state })
    }

    /// A frame that says how far the giver is.
    pub fn progress(&mut self, progress: Progress) -> v1::Frame {
        self.frame(0, Body::Progress(progress.into()))
    }

    /// The frame that ends a device's state, and the seal in it.
    pub fn seal(
        &mut self,
        device: usize,
        config: Option<ConfigSpaceCapture>,
    ) -> Result<(v1::Frame, Seal), GiveError> {
        let seal = self.slot(device)?.take().ok_or(GiveError::AfterSeal { device })?.seal();
        let body = v1::StreamSeal {
            length_bytes: seal.bytes,
            blake3: Bytes::copy_from_slice(&seal.blake3),
            config: config.map(Into::into),
        };
        Ok((self.frame(device, Body::Seal(body)), seal))
    }

    /// The number of the next frame: how many were made.
    pub fn next_sequence(&self) -> u64 {
        self.next_sequence
    }

    /// Whether every device is sealed.
    pub fn all_sealed(&self) -> bool {
        self.devices.iter().all(Option::is_none)
    }

    fn device(&mut self, device: usize) -> Result<&mut D, GiveError> {
        self.slot(device)?.as_mut().ok_or(GiveError::AfterSeal { device })
    }

    fn slot(&mut self, device: usize) -> Result<&mut Option<D>, GiveError> {
        if let Some(device) = self.torn {
            return Err(GiveError::Torn { device });
        }
        let devices = self.devices.len();
        self.devices.get_mut(device).ok_or(GiveError::UnknownDevice { device, devices })
    }

    fn frame(&mut self, device: usize, body: Body) -> v1::Frame {
        let mut frame = v1::Frame {
            stream_id: self.stream.0,
            sequence: self.next_sequence,
            // A set has 64 devices at most; a number beyond 2^32 would be refused as unknown, not taken for another.
            device: u32::try_from(device).unwrap_or(u32::MAX),
            crc32c: 0,
            body: Some(body),
        };
        frame.crc32c = crc::crc32c(&frame).unwrap_or(0);
        self.next_sequence += 1;
        frame
    }
}

/// The frames of one piece of state. Each is made when it is asked for. Where this is dropped before its end, for example
/// with a future that was cancelled while it sent, the framer gives and seals nothing more.
#[derive(Debug)]
#[must_use = "state is given frame by frame, as they are taken from here"]
pub struct Chunks<'a, D = SealHasher> {
    framer: &'a mut Framer<D>,
    device: usize,
    rest: Bytes,
}

impl<D: StateDigest> Iterator for Chunks<'_, D> {
    type Item = v1::Frame;

    fn next(&mut self) -> Option<v1::Frame> {
        if self.rest.is_empty() {
            return None;
        }
        let data = self.rest.split_to(self.rest.len().min(self.framer.max_chunk_bytes));
        // The device was found and not sealed when this was made, and nobody else has had the framer since.
        let digest = self.framer.device(self.device).ok()?;
        let offset = digest.bytes();
        digest.update(&data);
        Some(self.framer.frame(self.device, Body::Chunk(v1::Chunk { offset, data })))
    }
}

impl<D> Drop for Chunks<'_, D> {
    fn drop(&mut self) {
        if !self.rest.is_empty() {
            self.framer.torn = Some(self.device);
        }
    }
}
