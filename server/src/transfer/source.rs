//! State to restore, off the stream.
//!
//! ```text
//!   stream --frames--> Taker --verified chunks, seals--> device::operation
//!     broken: wait for the giver -- Relinks: the same stream over another connection --> reattach, and go on
//!                                -- the window is over --> the error that broke it
//! ```
//! Invariants: the latest connection of a stream is the one that counts, also where the one before seems to be well: its
//! giver knows better. Whoever says that all is taken says it to a connection, and says it again to whoever comes back.
//!
//! Failure paths: those of [`Taker`]; a connection that broke is one of them only once nobody has come back in time.

#[cfg(test)]
mod tests;

use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use vfio_checkpoint_client::transfer::{Taker, TransferError};
use vfio_checkpoint_device::Rearm;
use vfio_checkpoint_device::operation::{Arrival, BoxError, StateSource};
use vfio_checkpoint_proto::domain::StreamOpened;
use vfio_checkpoint_proto::frame::Accepted;

use super::relink::{self, Completed};
use super::{Attached, capture_from_wire};
use crate::core::Tasks;
use crate::environment::Environment;
use crate::failpoint::reached;
use crate::operation::{Entry, Reserved};

/// Gives the state that comes on an operation's stream.
#[derive(Debug)]
pub struct WireSource {
    taker: Taker,
    entry: Arc<Entry>,
    /// Of a stream whose giver may come back.
    comeback: Option<Comeback>,
    /// The giver was told that all is here, and is gone.
    is_complete: bool,
}

/// How a giver comes back.
#[derive(Debug)]
pub(super) struct Comeback {
    reserved: Reserved,
    /// What it was told at first.
    opened: StreamOpened,
    environment: Environment,
    tasks: Tasks,
    window: Duration,
}

impl Comeback {
    pub(super) fn new(
        reserved: Reserved,
        opened: StreamOpened,
        environment: Environment,
        tasks: Tasks,
        window: Duration,
    ) -> Self {
        Self { reserved, opened, environment, tasks, window }
    }

    /// Goes on with another connection of the stream. One that is gone before it was answered changes nothing, and false
    /// is returned.
    async fn go_on(&self, taker: &mut Taker, attached: Attached) -> Result<bool, TransferError> {
        let next_sequence = taker.taken_frames();
        let Some(link) = relink::answer(attached, self.opened.clone(), next_sequence).await else {
            return Ok(false);
        };
        taker.reattach(link)?;
        tracing::info!(stream = %self.opened.stream_id, next_sequence, "the giver has come back");
        Ok(true)
    }

    /// All is taken, and was said. A giver that did not hear it may find out that its connection broke, and come back, for
    /// some time; after that nobody asks any more.
    async fn complete(&self, taken_frames: u64) {
        let completed = Completed::new(self.opened.clone(), taken_frames);
        let late = self.reserved.complete(completed);
        let (environment, forgetting) = (self.environment.clone(), self.reserved.forgetting());
        let patience = self.opened.limits.idle_timeout.saturating_add(self.window);
        self.tasks.spawn(async move {
            environment.sleep(patience).await;
            forgetting.forget();
        });
        if let Some(telling) = late {
            telling.await;
        }
    }
}

/// The next connection, where there can be one.
async fn relinked(comeback: Option<&Comeback>) -> Attached {
    match comeback {
        Some(comeback) => comeback.reserved.relinks.next().await,
        None => std::future::pending().await,
    }
}

impl WireSource {
    /// A source for the operation `entry`, whose giver does not come back.
    pub fn new(taker: Taker, entry: Arc<Entry>) -> Self {
        Self { taker, entry, comeback: None, is_complete: false }
    }

    pub(super) fn resumable(taker: Taker, entry: Arc<Entry>, comeback: Comeback) -> Self {
        Self { taker, entry, comeback: Some(comeback), is_complete: false }
    }

    /// What is next on whatever connection there is.
    async fn accepted(&mut self) -> Result<Option<Accepted>, TransferError> {
        loop {
            tokio::select! {
                biased;
                attached = relinked(self.comeback.as_ref()) => self.go_on(attached).await?,
                accepted = self.taker.next() => match accepted {
                    Err(error) => self.wait_after(error).await?,
                    Ok(accepted) => return Ok(accepted),
                },
            }
        }
    }

    async fn go_on(&mut self, attached: Attached) -> Result<(), TransferError> {
        if let Some(comeback) = &self.comeback {
            comeback.go_on(&mut self.taker, attached).await?;
        }
        Ok(())
    }

    /// The connection broke: waits for the giver, where it may come back, for as long as the window. Otherwise that is the
    /// end of it.
    async fn wait_after(&mut self, error: TransferError) -> Result<(), TransferError> {
        let Some(comeback) = self.comeback.as_ref().filter(|_| error.is_break()) else { return Err(error) };
        tracing::warn!(stream = %comeback.opened.stream_id, error = %error, "the stream broke; its giver may come back");
        let mut over = pin!(comeback.environment.sleep(comeback.window));
        loop {
            let attached = tokio::select! {
                biased;
                attached = comeback.reserved.relinks.next() => attached,
                () = &mut over => return Err(error),
            };
            if comeback.go_on(&mut self.taker, attached).await? {
                return Ok(());
            }
        }
    }

    /// Keeps the stream, over whatever connections there are, while all is taken and the giver is not to be told so yet.
    /// Returns why that is over. Cancel-safe.
    pub async fn linger(&mut self) -> TransferError {
        loop {
            let lasts = tokio::select! {
                biased;
                attached = relinked(self.comeback.as_ref()) => self.go_on(attached).await,
                error = self.taker.linger() => self.wait_after(error).await,
            };
            if let Err(error) = lasts {
                return error;
            }
        }
    }

    /// Keeps the stream while a device is at work on what was taken: says that this side is there, also to a giver that comes
    /// back. Nothing is taken meanwhile, so what is wrong with a connection is found after it. Never over. Cancel-safe.
    async fn keep(&mut self) -> Infallible {
        loop {
            let attached = tokio::select! {
                biased;
                attached = relinked(self.comeback.as_ref()) => attached,
                never = self.taker.busy() => match never {},
            };
            if let Err(error) = self.go_on(attached).await {
                tracing::debug!(error = %error, "a giver came back, and cannot go on");
                std::future::pending::<()>().await;
            }
        }
    }

    /// Tells the giver that all is taken, once.
    async fn complete(&mut self) -> Result<(), BoxError> {
        if self.is_complete {
            return Ok(());
        }
        while !self.is_complete {
            tokio::select! {
                biased;
                attached = relinked(self.comeback.as_ref()) => self.go_on(attached).await?,
                completed = self.taker.complete() => match completed {
                    Err(error) => self.wait_after(error).await?,
                    Ok(()) => self.is_complete = true,
                },
            }
        }
        if let Some(comeback) = &self.comeback {
            comeback.complete(self.taker.taken_frames()).await;
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
            return Ok(match self.accepted().await? {
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

    fn busy(&mut self) -> impl Future<Output = Infallible> + Send {
        self.keep()
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
