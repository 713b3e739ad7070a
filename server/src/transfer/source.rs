//! State to restore, off the stream.

use std::sync::Arc;

use vfio_checkpoint_client::transfer::Taker;
use vfio_checkpoint_device::Rearm;
use vfio_checkpoint_device::operation::{Arrival, BoxError, StateSource};
use vfio_checkpoint_proto::frame::Accepted;

use super::capture_from_wire;
use crate::failpoint::reached;
use crate::operation::Entry;

/// Gives the state that comes on an operation's stream.
#[derive(Debug)]
pub struct WireSource {
    taker: Taker,
    entry: Arc<Entry>,
    /// The giver was told that all is here, and is gone.
    is_complete: bool,
}

impl WireSource {
    /// A source for the operation `entry`.
    pub fn new(taker: Taker, entry: Arc<Entry>) -> Self {
        Self { taker, entry, is_complete: false }
    }

    /// Tells the giver that all is taken, once.
    async fn complete(&mut self) -> Result<(), BoxError> {
        if !self.is_complete {
            self.taker.complete().await?;
            self.is_complete = true;
        }
        Ok(())
    }

    /// Tells the giver that nothing more is taken, and why.
    pub async fn give_up(self, reason: &str) {
        self.taker.abort(reason).await;
    }
}

impl StateSource for WireSource {
    async fn next(&mut self) -> Result<Option<Arrival>, BoxError> {
        loop {
            return Ok(match self.taker.next().await? {
                None => None,
                Some(Accepted::Chunk { device, chunk }) => {
                    reached(format_args!("chunk"));
                    Some(Arrival::Chunk { device, chunk })
                }
                Some(Accepted::Sealed { device, seal, config }) => {
                    self.entry.sealed(device, seal.seal());
                    let config = config.as_ref().map(capture_from_wire);
                    Some(Arrival::Sealed { device, seal, config })
                }
                // For people at the giver's end.
                Some(Accepted::Progress(_)) => continue,
            });
        }
    }

    /// A hold may outlast the stream, and goes on without it: the giver is done.
    async fn held(&mut self) -> Result<(), BoxError> {
        self.complete().await
    }

    /// All is verified, written and fixed up, so the giver is done. The agent owns its devices: it maps no memory for
    /// them and waits for no interrupt. Whoever is lent one arms its own.
    async fn ready(&mut self, _rearm: &[Option<Rearm>]) -> Result<(), BoxError> {
        self.complete().await
    }
}
