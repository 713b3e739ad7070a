//! Saved state, on to the stream.
//!
//! ```text
//!   device::operation --WireSink--> one command at a time --> pump --Giver--> stream
//!                                                              |  <-- acks, Cutover, Abort
//!                            SinkWatch <-- broken, cutover ----'
//! ```
//! The pump is a task of its own, because the stream has to be listened to also while the operation waits for its caller:
//! a taker that is gone must not leave the devices waiting for their cutover, and a taker with nothing to read has to
//! hear that the agent is still there.
//!
//! With a giver that is `resumable` a connection that breaks is no more to the operation than a taker that is slow: what is
//! given goes into the giver's spool while it dials. Only what it cannot mend is told as broken. But no device is stopped
//! meanwhile, unless a caller says Cutover during pre-copy, so the operation is told that the line is down where it asks.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::pending;
use tokio::sync::{mpsc, oneshot, watch};
use vfio_checkpoint_client::transfer::{CutoverSignal, Flow, Giver, Resent, TransferError};
use vfio_checkpoint_device::ConfigCapture;
use vfio_checkpoint_device::operation::{BoxError, StateSink};
use vfio_checkpoint_proto::domain::Progress;
use vfio_checkpoint_seal::Seal;

use super::{Shared, capture_to_wire};
use crate::core::Core;
use crate::environment::Environment;
use crate::failpoint::reached;
use crate::operation::Entry;

/// Takes the state of an operation's devices and gives it to its stream.
#[derive(Debug)]
pub struct WireSink {
    commands: mpsc::Sender<Command>,
    /// Beside the commands: it is heard also while one of them waits for the taker.
    give_up: mpsc::Sender<GivenUp>,
    entry: Arc<Entry>,
    watch: SinkWatch,
    /// Bytes of state.
    given_bytes: u64,
}

/// What becomes known of a stream while nothing is given to it.
#[derive(Debug, Clone)]
pub struct SinkWatch {
    broken: watch::Receiver<Option<Shared>>,
    cutover: CutoverSignal,
    resent: Resent,
    flow: Flow,
}

#[derive(Debug)]
enum Command {
    Chunk(usize, Bytes),
    Seal(usize, Option<ConfigCapture>, oneshot::Sender<Seal>),
    Complete(oneshot::Sender<()>),
}

impl WireSink {
    /// A sink for the operation `entry`, and its pump, which ends with it. Within `idle_timeout` the taker always hears
    /// something, and it has `seal_timeout` to make its checkpoint durable: the devices stand still for it.
    pub fn new(
        giver: Giver,
        entry: Arc<Entry>,
        core: &Core,
        idle_timeout: Duration,
        seal_timeout: Duration,
    ) -> Self {
        // One: a chunk is being sent while the next is being read, and no more is in memory.
        let (commands, queue) = mpsc::channel(1);
        let (give_up, ending) = mpsc::channel(1);
        let (tell, broken) = watch::channel(None);
        let (cutover, resent, flow) = (giver.cutover_signal(), giver.resent(), giver.flow());
        let watch = SinkWatch { broken, cutover, resent, flow };
        let pump = Pump {
            giver,
            entry: Arc::clone(&entry),
            environment: core.environment.clone(),
            seal_timeout,
            silence: (idle_timeout / 3).max(Duration::from_millis(10)),
        };
        core.tasks.spawn(pump.run(queue, ending, tell));
        Self { commands, give_up, entry, watch, given_bytes: 0 }
    }

    /// What becomes known of the stream while nothing is given to it.
    pub fn watch(&self) -> SinkWatch {
        self.watch.clone()
    }

    /// Tells the taker that there is no more to come, and why.
    pub async fn give_up(&mut self, reason: String) {
        let (told, over) = oneshot::channel();
        if self.give_up.send(GivenUp { reason, told: Some(told) }).await.is_ok() {
            let _ = over.await;
        }
    }

    async fn send(&mut self, command: Command) -> Result<(), BoxError> {
        if self.commands.send(command).await.is_err() {
            return Err(self.why().await);
        }
        Ok(())
    }

    /// Why the pump has ended.
    async fn why(&mut self) -> BoxError {
        let broken = self.watch.broken.wait_for(Option::is_some).await.map(|why| why.clone());
        match broken {
            Ok(Some(why)) => why.into(),
            Ok(None) | Err(_) => "the stream was over before".into(),
        }
    }
}

impl SinkWatch {
    /// Ready once the stream is broken, with the reason. Never where it came to its end.
    pub async fn broken(&self) -> Shared {
        let mut broken = self.broken.clone();
        let why = broken.wait_for(Option::is_some).await.map(|why| why.clone());
        match why {
            Ok(Some(why)) => why,
            Ok(None) | Err(_) => pending().await,
        }
    }

    /// Bytes of state that went more than once, because the connection broke.
    pub fn resent_bytes(&self) -> u64 {
        self.resent.bytes()
    }

    /// Ready once the taker has said Cutover.
    pub async fn cutover(&self) {
        self.cutover.clone().requested().await;
    }
}

impl StateSink for WireSink {
    async fn chunk(&mut self, device: usize, bytes: Bytes) -> Result<(), BoxError> {
        reached(format_args!("chunk"));
        // Before it is queued: wherever it is from here on, it has still to go over.
        self.given_bytes = self.given_bytes.saturating_add(bytes.len() as u64);
        self.send(Command::Chunk(device, bytes)).await
    }

    /// The taker makes the checkpoint durable, and says so.
    async fn seal(&mut self, config: &[Option<ConfigCapture>]) -> Result<(), BoxError> {
        for (device, capture) in config.iter().enumerate() {
            let (tell, told) = oneshot::channel();
            self.send(Command::Seal(device, *capture, tell)).await?;
            match told.await {
                Ok(seal) => self.entry.sealed(device, seal),
                Err(_) => return Err(self.why().await),
            }
        }
        let (tell, told) = oneshot::channel();
        self.send(Command::Complete(tell)).await?;
        match told.await {
            Ok(()) => Ok(()),
            Err(_) => Err(self.why().await),
        }
    }

    /// The mark is in the journal, and so in the operation that the taker reads: its stream was over with the seal.
    async fn mark_inconsistent(&mut self) -> Result<(), BoxError> {
        Ok(())
    }

    fn is_down(&self) -> bool {
        self.watch.flow.is_down()
    }

    fn under_way(&self) -> Option<u64> {
        self.watch.flow.under_way(self.given_bytes)
    }

    /// The taker learns it from the operation, and where it still listens, when the operation is given up.
    async fn discard(&mut self) -> Result<(), BoxError> {
        Ok(())
    }
}

struct Pump {
    giver: Giver,
    entry: Arc<Entry>,
    environment: Environment,
    silence: Duration,
    seal_timeout: Duration,
}

/// The operation gives its stream up.
#[derive(Debug)]
struct GivenUp {
    reason: String,
    told: Option<oneshot::Sender<()>>,
}

impl Pump {
    async fn run(
        mut self,
        queue: mpsc::Receiver<Command>,
        mut ending: mpsc::Receiver<GivenUp>,
        tell: watch::Sender<Option<Shared>>,
    ) {
        let served = tokio::select! {
            biased;
            // What it was about to give is given up with the rest.
            Some(given_up) = ending.recv() => Ok(Some(given_up)),
            served = self.serve(queue) => served,
        };
        match served {
            Ok(None) => {}
            Ok(Some(GivenUp { reason, told })) => {
                self.giver.abort(&reason).await;
                if let Some(told) = told {
                    // An operation that is gone has no use for the answer.
                    let _ = told.send(());
                }
            }
            Err(error) => {
                let is_there = match &error {
                    TransferError::Protocol(_)
                    | TransferError::Idle(_)
                    | TransferError::NotSealed(_)
                    | TransferError::Changed { .. }
                    | TransferError::Spool(_)
                    | TransferError::Lifetime(_) => true,
                    // A giver that was dialing again has no connection to say anything on.
                    TransferError::Broken(_)
                    | TransferError::AbortedByPeer(_)
                    | TransferError::NotResumed { .. } => false,
                };
                let reason = error.to_string();
                // The operation first: its devices must not wait for a taker that does not listen.
                tell.send_replace(Some(Shared::new(error)));
                if is_there {
                    self.giver.abort(&reason).await;
                }
            }
        }
    }

    /// Gives what it is told to, until the stream is complete, or is given up, or breaks.
    async fn serve(&mut self, mut queue: mpsc::Receiver<Command>) -> Result<Option<GivenUp>, TransferError> {
        loop {
            let command = tokio::select! {
                biased;
                command = queue.recv() => command,
                error = self.giver.listen() => return Err(error),
                () = self.environment.sleep(self.silence) => {
                    self.giver.progress(self.progress()).await?;
                    continue;
                }
            };
            match command {
                Some(Command::Chunk(device, bytes)) => self.giver.chunk(device, bytes).await?,
                Some(Command::Seal(device, capture, tell)) => {
                    let capture = capture.as_ref().map(capture_to_wire);
                    // An operation that is gone has no use for the answer.
                    let _ = tell.send(self.giver.seal(device, capture).await?);
                }
                Some(Command::Complete(tell)) => {
                    self.giver.completed_within(self.seal_timeout).await?;
                    let _ = tell.send(());
                    return Ok(None);
                }
                None => {
                    return Ok(Some(GivenUp { reason: "the save was given up".to_owned(), told: None }));
                }
            }
        }
    }

    fn progress(&self) -> Progress {
        let view = self.entry.view();
        Progress {
            phase: crate::rpc::wire_phase(view.phase),
            left_bytes: view.total().bytes().map_or(0, |total| total.saturating_sub(view.moved_bytes())),
            predicted_downtime: view.predicted_downtime,
        }
    }
}
