//! Where saved state goes, and where state to restore comes from.
//!
//! # Invariants
//! A call may be dropped before it is done, where the operation is cancelled or its process ends. A sink is then asked
//! for nothing but [`discard`](StateSink::discard); a source for nothing at all.

use std::convert::Infallible;
use std::future::Future;

use bytes::Bytes;

use super::BoxError;
use crate::{ConfigCapture, Rearm, VerifiedChunk, VerifiedSeal};

/// Takes the state of a set of devices, counted from 0 in the order of the set.
pub trait StateSink: Send {
    /// Takes the next bytes of a device.
    fn chunk(&mut self, device: usize, bytes: Bytes) -> impl Future<Output = Result<(), BoxError>> + Send;

    /// All of every device's state has come: everything is durable, and a checkpoint, once this is over. `config` is
    /// what was captured of each device's configuration space.
    fn seal(&mut self, config: &[Option<ConfigCapture>])
    -> impl Future<Output = Result<(), BoxError>> + Send;

    /// The checkpoint that was sealed must not be taken for a good one; that is durable once this is over. Memory that
    /// was captured with it may have moved on.
    fn mark_inconsistent(&mut self) -> impl Future<Output = Result<(), BoxError>> + Send;

    /// Of a save that hands its devices over: tells whoever took the state to run them, or asks for it back, and is over
    /// once it is known for good which side has the devices. That can be never. May be begun again after it was dropped.
    ///
    /// A sink that nobody runs from has nobody to tell: its devices are this side's.
    fn settle(&mut self, word: Word) -> impl Future<Output = Settled> + Send {
        let _ = word;
        std::future::ready(Settled::Here(Box::from("nobody takes devices over from here")))
    }

    /// Whether nothing goes through now: what is given is kept on this side until something does again, or the sink fails. No
    /// device stops for it meanwhile, unless its caller says Cutover during pre-copy; and how fast it takes what it is given
    /// says nothing.
    fn is_down(&self) -> bool {
        false
    }

    /// Of the bytes that were given, how many have not arrived yet: what is left of a device comes after them. None where
    /// what is given has arrived as good as at once.
    fn under_way(&self) -> Option<u64> {
        None
    }

    /// What was written, sealed or not, is no checkpoint. An error changes nothing: what resists is left over.
    fn discard(&mut self) -> impl Future<Output = Result<(), BoxError>> + Send;
}

/// What is said to whoever took the state of devices that are handed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Word {
    /// Run the devices.
    Commit,
    /// Do not run them any more, unless they were told to before.
    Withdraw,
}

/// Which side has the devices that were handed over, for good.
#[derive(Debug)]
pub enum Settled {
    /// The other one: it runs them.
    There,
    /// This one: nothing over there runs them, or ever will, for this reason.
    Here(BoxError),
}

/// What comes from a source.
#[derive(Debug)]
pub enum Arrival {
    /// The next bytes of a device.
    Chunk {
        /// Which one, counted from 0 in the order of the set.
        device: usize,
        /// The bytes, counted into the digest.
        chunk: VerifiedChunk,
    },
    /// The end of a device's state, which is what its seal says.
    Sealed {
        /// Which one.
        device: usize,
        /// The proof.
        seal: VerifiedSeal,
        /// What was captured of the device's configuration space when it was saved.
        config: Option<ConfigCapture>,
    },
}

/// Gives the state of a set of devices, of all of them in any order.
pub trait StateSource: Send {
    /// What comes next, or `None` once every device's seal has come.
    fn next(&mut self) -> impl Future<Output = Result<Option<Arrival>, BoxError>> + Send;

    /// A device is at work on what came before, and nothing more can be taken until it is done, which may be long: whoever gives
    /// the state may be told that this side is there. Never over; dropped once the device is done.
    fn busy(&mut self) -> impl Future<Output = Infallible> + Send {
        std::future::pending()
    }

    /// Everything is verified and loaded, and stays so until somebody says Resume, which can be long: whoever gives the
    /// state has done its part. The hold begins once this is over, which takes no longer than a hold may last.
    fn held(&mut self) -> impl Future<Output = Result<(), BoxError>> + Send {
        std::future::ready(Ok(()))
    }

    /// The devices are loaded and fixed up. Whoever owns the eventfds and the DMA mappings arms what `rearm` names; this
    /// is over once they are ready. No device runs before that.
    fn ready(&mut self, rearm: &[Option<Rearm>]) -> impl Future<Output = Result<(), BoxError>> + Send;
}

/// Whoever owns the eventfds and the DMA mappings of devices that are loaded already. Every [`StateSource`] speaks for
/// them.
pub trait Owner: Send {
    /// As [`StateSource::ready`].
    fn ready(&mut self, rearm: &[Option<Rearm>]) -> impl Future<Output = Result<(), BoxError>> + Send;
}

impl<S: StateSource> Owner for S {
    fn ready(&mut self, rearm: &[Option<Rearm>]) -> impl Future<Output = Result<(), BoxError>> + Send {
        StateSource::ready(self, rearm)
    }
}

/// What is wrong with what came from a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum ArrivalError {
    #[error("state came for device {device} of a set of {devices}; they are counted from 0")]
    NoSuchDevice { device: usize, devices: usize },
    #[error("more came for device {device} after its seal")]
    AfterSeal { device: usize },
    #[error("the state ended before the seal of device {device} came")]
    Unsealed { device: usize },
}
