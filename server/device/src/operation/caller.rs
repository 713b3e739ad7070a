//! Whoever an operation answers to, and what it is told.
//!
//! ```text
//!   Caller --cutover, resume, cancelled--> operation --moved, progress--> Caller
//! ```
//!
//! # Invariants
//! - What a caller says is a level, not an edge: once said, it stays said, however often it is asked for. So a future
//!   that waits for it can be dropped and made again, and nothing is missed.
//! - A caller is told of a move before anything is done about it.

use std::fmt;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, pending, ready};
use vfio_checkpoint_fsm::{RestoreState, SaveState};

use super::BoxError;
use crate::{DataSize, PrecopyInfo};

/// Says when an operation goes on, and is told how far it is.
pub trait Caller: Send + Sync {
    /// Over once the workload is paused and the devices may stop. Asked for with manual cutover only.
    fn cutover(&self) -> BoxFuture<'_, ()>;

    /// Over once held devices may run.
    fn resume(&self) -> BoxFuture<'_, ()>;

    /// Over once the destination of a hand-over may run the devices. Asked for only when it has loaded them.
    fn commit(&self) -> BoxFuture<'_, ()>;

    /// Over once the operation is taken back, with the reason. It may come too late to be honoured.
    fn cancelled(&self) -> BoxFuture<'_, BoxError>;

    /// The operation moves to this step. Nothing of it was done yet; what is recorded of it is durable when the answer
    /// comes. A step may be told again where a crash was in between.
    ///
    /// An error fails the operation, as a failure in that step would. Where there is no way back it goes on, and its
    /// report says so.
    fn moved(&self, step: OperationStep) -> BoxFuture<'_, Result<(), BoxError>>;

    /// How far it is: after every batch or chunk. Must be quick.
    fn progress(&self, progress: &Progress<'_>);
}

/// Where an operation stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum OperationStep {
    /// A save.
    Save(SaveState),
    /// A restore.
    Restore(RestoreState),
}

impl fmt::Display for OperationStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Save(state) => write!(f, "save: {state}"),
            Self::Restore(state) => write!(f, "restore: {state}"),
        }
    }
}

/// How far an operation is.
#[derive(Debug, Clone, Copy)]
pub struct Progress<'a> {
    /// Its phase.
    pub step: OperationStep,
    /// Each device, in the order of the set.
    pub devices: &'a [DeviceProgress],
    /// How long the devices would be stopped if they were stopped now, where that can be told.
    pub predicted_downtime: Option<Duration>,
}

/// How far one device is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DeviceProgress {
    /// Bytes handed on to the sink, or written to the device.
    pub bytes: u64,
    /// What the device last said a stop-copy would take, where it was asked.
    pub data_size: Option<DataSize>,
    /// What it last said is left to pre-copy.
    pub precopy: Option<PrecopyInfo>,
}

/// Nobody: an operation on its own, as from a shell. It is never cancelled, and none of Cutover, Resume and Commit is ever said.
#[derive(Debug, Clone, Copy, Default)]
pub struct Alone;

impl Caller for Alone {
    fn cutover(&self) -> BoxFuture<'_, ()> {
        pending().boxed()
    }

    fn resume(&self) -> BoxFuture<'_, ()> {
        pending().boxed()
    }

    fn commit(&self) -> BoxFuture<'_, ()> {
        pending().boxed()
    }

    fn cancelled(&self) -> BoxFuture<'_, BoxError> {
        pending().boxed()
    }

    fn moved(&self, _step: OperationStep) -> BoxFuture<'_, Result<(), BoxError>> {
        ready(Ok(())).boxed()
    }

    fn progress(&self, _progress: &Progress<'_>) {}
}
