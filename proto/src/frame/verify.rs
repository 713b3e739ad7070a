//! The taker's end: frames into verified state.

use vfio_checkpoint_seal::{VerifiedChunk, VerifiedSeal, Verifier};

use super::{Checked, FrameCheck, FrameError};
use crate::domain::{ConfigSpaceCapture, Progress, StreamLimits};
use crate::ids::StreamId;
use crate::v1;

/// What an accepted frame carries.
#[derive(Debug)]
pub enum Accepted {
    /// The next state of a device.
    Chunk {
        /// The device.
        device: usize,
        /// The state.
        chunk: VerifiedChunk,
    },
    /// How far the giver is.
    Progress(Progress),
    /// All of a device's state was taken, and is what was given.
    Sealed {
        /// The device.
        device: usize,
        /// The proof.
        seal: VerifiedSeal,
        /// What was captured of configuration space.
        config: Option<ConfigSpaceCapture>,
    },
}

/// Verifies the frames of one stream, in order.
#[derive(Debug)]
pub struct FrameVerifier {
    check: FrameCheck,
    /// None once a device is sealed.
    verifiers: Vec<Option<Verifier>>,
}

impl FrameVerifier {
    /// A taker of `devices` states on `stream`.
    pub fn new(stream: StreamId, devices: usize, limits: &StreamLimits) -> Self {
        let verifiers = (0..devices).map(|_| Some(Verifier::new())).collect();
        Self { check: FrameCheck::new(stream, devices, limits), verifiers }
    }

    /// Takes the next frame. After an error it takes nothing more.
    pub fn accept(&mut self, frame: v1::Frame) -> Result<Accepted, FrameError> {
        match self.check.accept(frame)? {
            Checked::Chunk { device, offset, data } => {
                match self.verifiers.get_mut(device).and_then(Option::as_mut) {
                    Some(verifier) => Ok(Accepted::Chunk { device, chunk: verifier.accept(data) }),
                    None => Err(self.refuse(FrameError::AfterSeal { device, offset })),
                }
            }
            Checked::Progress(progress) => Ok(Accepted::Progress(progress)),
            Checked::Seal { device, seal, config } => {
                match self.verifiers.get_mut(device).and_then(Option::take) {
                    Some(verifier) => match verifier.finish(&seal) {
                        Ok(seal) => Ok(Accepted::Sealed { device, seal, config }),
                        Err(source) => Err(self.refuse(FrameError::SealDigest { device, source })),
                    },
                    None => Err(self.refuse(FrameError::SecondSeal { device })),
                }
            }
        }
    }

    /// The number of the next frame: how many were taken. Means nothing once one was refused.
    pub fn next_sequence(&self) -> u64 {
        self.check.next_sequence()
    }

    /// Whether every device is sealed and nothing was refused.
    pub fn all_sealed(&self) -> bool {
        self.check.all_sealed()
    }

    /// The stream has ended: was all of it taken?
    pub fn finish(&self) -> Result<(), FrameError> {
        self.check.finish()
    }

    fn refuse(&mut self, error: FrameError) -> FrameError {
        self.check.fail();
        error
    }
}
