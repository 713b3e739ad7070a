//! The interface that every backend stands behind.
//!
//! ```text
//!            MigrationDevice ---- dma_log() ----> DmaLog           (where capabilities say so)
//!   SET STATE   |      \--------- config_space() -> ConfigSpace    (where capabilities say so)
//!               v
//!       Option<DataStream> = Save(SaveStream) | Restore(RestoreStream)   owned by one session
//! ```
//!
//! A backend only *does*: it issues the call and reports what came back, errno for errno. It decides nothing:
//! which move is legal, what to try after a failure and when to give up belong to [`Driver`](crate::Driver),
//! which is the only caller.
//!
//! # Rules for an implementation
//! - No method has a default. What a device cannot do is said in [`DeviceCapabilities`] and by `None` from
//!   [`dma_log`](MigrationDevice::dma_log) and [`config_space`](MigrationDevice::config_space).
//! - A failed call changes nothing that the device itself did not change. No retry, no hidden reset.
//! - Calls may block for as long as the device does; they run on the device's own lane
//!   ([`Executor`](crate::Executor)), where a call that never returns costs that device and nothing else.
//! - Dropping the value releases the backend's own handle and touches no other holder's.

use std::fmt;

use vfio_checkpoint_fsm::State;

use crate::{
    Call, ConfigSpace, DataSize, DeviceCapabilities, DeviceError, DmaLog, Fingerprint, Identity, PrecopyInfo,
};

/// One opened device that speaks migration v2.
pub trait MigrationDevice: fmt::Debug + Send {
    /// Which device this is. Stable for the life of the value.
    fn identity(&self) -> &Identity;

    /// What must match on another device for this one's state to load there.
    fn fingerprint(&self) -> &Fingerprint;

    /// What the device can do, probed once when it was opened.
    fn capabilities(&self) -> &DeviceCapabilities;

    /// Reads the current migration state back from the device.
    fn state(&mut self) -> Result<State, DeviceError>;

    /// One SET to `target`; the device walks the path there itself.
    ///
    /// Returns the data stream that the walk opened, if it opened one. On an error the device may stand in any
    /// state of the path: read it back.
    fn set_state(&mut self, target: State) -> Result<Option<DataStream>, DeviceError>;

    /// How many bytes a stop-copy would take from here.
    fn data_size(&mut self) -> Result<DataSize, DeviceError>;

    /// Resets the device: its state is gone and it stands in RUNNING.
    fn reset(&mut self) -> Result<(), DeviceError>;

    /// The log of pages that the device wrote by DMA, where it keeps one.
    fn dma_log(&mut self) -> Option<&mut dyn DmaLog>;

    /// The PCI configuration space, where the device is a PCI function.
    fn config_space(&mut self) -> Option<&mut dyn ConfigSpace>;
}

/// The data fd of a session, by direction.
#[derive(Debug)]
pub enum DataStream {
    /// State comes out of the device.
    Save(Box<dyn SaveStream>),
    /// State goes into the device.
    Restore(Box<dyn RestoreStream>),
}

impl DataStream {
    /// The outgoing stream, or the error that says that `call` should have opened one.
    pub fn into_save(self, call: Call) -> Result<Box<dyn SaveStream>, DeviceError> {
        match self {
            Self::Save(stream) => Ok(stream),
            Self::Restore(_) => Err(DeviceError::Stream { call, expected: true }),
        }
    }

    /// The incoming stream, or the error that says that `call` should have opened one.
    pub fn into_restore(self, call: Call) -> Result<Box<dyn RestoreStream>, DeviceError> {
        match self {
            Self::Restore(stream) => Ok(stream),
            Self::Save(_) => Err(DeviceError::Stream { call, expected: true }),
        }
    }
}

/// What one `read` on a saving data fd brought. What it *means* depends on the state the device is in, and only
/// the session knows that: no byte is the end in STOP_COPY and nothing for now in PRE_COPY.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Read {
    /// This many bytes, at least one, at the start of the buffer.
    Bytes(usize),
    /// `read` returned 0.
    Zero,
    /// `ENOMSG`: nothing for now, more may come.
    NothingNow,
}

/// The saving data fd: one per session, shared by PRE_COPY, PRE_COPY_P2P and STOP_COPY.
pub trait SaveStream: fmt::Debug + Send {
    /// Reads what is there into `buffer`, which must not be empty. EINTR is retried inside.
    fn read(&mut self, buffer: &mut [u8]) -> Result<Read, DeviceError>;

    /// How much is left to pre-copy. Meaningful in PRE_COPY and PRE_COPY_P2P only; elsewhere the device answers
    /// EINVAL. Says nothing about the size of what STOP_COPY will bring: that is
    /// [`MigrationDevice::data_size`].
    fn precopy_info(&mut self) -> Result<PrecopyInfo, DeviceError>;
}

/// The resuming data fd.
pub trait RestoreStream: fmt::Debug + Send {
    /// Writes the start of `bytes`, which must not be empty, and returns how many were taken, at least one.
    /// EINTR is retried inside. Any error is final for the session: the device may have counted the bytes all
    /// the same.
    fn write(&mut self, bytes: &[u8]) -> Result<usize, DeviceError>;
}
