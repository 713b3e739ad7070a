//! State that leaves for another agent, and the word that hands its devices over.
//!
//! ```text
//!   device::operation::save --chunk, seal--> WireSink ==> destination
//!   Committing on record    --settle-------> Offer: CommitHandover, again and again, until there is a verdict
//!                                                   or an admin's decision is on record
//!   the end on record       --farewell-----> AbandonHandover where it stayed here, CommitHandover where it was let go of
//!                                            without an answer and cannot run here; then GetHandover{settled}
//! ```
//!
//! # Invariants
//! - [`Offer::settle`] answers only with what the destination has on record, or with what an admin has put on record here,
//!   and of these with the one that came first.
//! - A destination is told to run what an admin let go of only where that cannot run here: each device was seen to be reset,
//!   or stood still when it was seen last. Otherwise it is told neither this nor that, and left to its own deadline.
//!
//! # Failure paths
//! Every failed call is told as doubt and tried again, over a new connection, with the certificates that are in force then;
//! an answer that does not prove who gives it is one of them.
//! A farewell is tried again for half a minute, because both agents may just be starting. Of devices that an admin let go
//! it is `CommitHandover` once more, and never that nothing comes: what the destination has may be the last copy. It is
//! tried for as long as a destination may wait for it, by an agent that lives so long, and whatever it is refused with: a
//! refusal proves nobody. What was not taken by then stays owed: see `farewell`.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tonic::Code;
use vfio_checkpoint_client::call::Client;
use vfio_checkpoint_device::operation::{BoxError, Settled, StateSink, Word};
use vfio_checkpoint_device::{ConfigCapture, chain};
use vfio_checkpoint_fsm::SaveEvent;
use vfio_checkpoint_proto::v1;

use super::agreed::{Agreed, verdict};
use super::farewell;
use super::peer::PeerError;
use crate::core::Core;
use crate::failpoint::is_planted;
use crate::operation::Entry;
use crate::operation::record::HandoverRecord;
use crate::transfer::WireSink;

/// How long the destination may be silent before the source says that it is in doubt.
const SILENCE: Duration = Duration::from_secs(2);
/// First and longest pause between two calls; each is twice the one before.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));
/// How long it is tried to tell a destination that it will not be asked again.
const FAREWELL: Duration = Duration::from_secs(30);

/// The devices of a migration, offered to its destination.
#[derive(Debug)]
pub struct Offer {
    core: Arc<Core>,
    entry: Arc<Entry>,
    client: Option<Client>,
}

/// Takes the state of a migration's devices and gives it to the destination.
#[derive(Debug)]
pub struct HandoverSink {
    wire: WireSink,
    offer: Offer,
}

impl Offer {
    /// The offer of the migration `entry`, over this connection where there is one yet.
    pub fn new(core: Arc<Core>, entry: Arc<Entry>, client: Option<Client>) -> Self {
        Self { core, entry, client }
    }

    fn on_record(&self) -> Option<HandoverRecord> {
        self.entry.view().handover.map(|handover| handover.record)
    }

    /// Asks until it is known which side has the devices.
    pub async fn settle(&mut self, word: Word) -> Settled {
        let mut pause = PAUSES.0;
        loop {
            if let Some(settled) = self.resolved() {
                return settled;
            }
            let entry = Arc::clone(&self.entry);
            let asked = tokio::select! {
                biased;
                () = entry.signals.resolved() => continue,
                asked = self.ask(word) => asked,
            };
            match asked {
                Ok(told) => {
                    if let Some(settled) = self.heard(&told).await {
                        return settled;
                    }
                }
                Err(error) => {
                    if is_planted(&self.core.config.node.state_dir, "silence is a refusal") {
                        return Settled::Here("a test has it so".into());
                    }
                    // Another connection, and another certificate where there is one by now.
                    self.client = None;
                    self.doubt(format!("the destination cannot be asked: {}", chain(&error)));
                }
            }
            tokio::select! {
                biased;
                () = entry.signals.resolved() => {}
                () = self.core.environment.sleep(pause) => {}
            }
            pause = (pause * 2).min(PAUSES.1);
        }
    }

    /// What an admin has put on record.
    fn resolved(&self) -> Option<Settled> {
        let resolution = self.on_record()?.resolution?;
        Some(if resolution.resume_here {
            Settled::Here(format!("an admin has decided: {resolution}").into())
        } else {
            Settled::There
        })
    }

    /// Takes in what the destination has on record. None where that decides nothing yet.
    async fn heard(&self, told: &v1::HandoverRecord) -> Option<Settled> {
        let Some(verdict) = verdict(told) else {
            self.doubt(format!("the destination has not decided: it is {}", told.step().as_str_name()));
            return None;
        };
        let message: String = told.message.chars().take(1024).collect();
        {
            // A decision that is being put on record comes first, and what comes after it is too late: whoever decided is
            // told that it is done.
            let _one_at_a_time = self.entry.recording.lock().await;
            if let Some(settled) = self.resolved() {
                tracing::warn!(operation = %self.entry.fixed.name, %verdict, message, "answered after an admin has decided");
                return Some(settled);
            }
            self.entry.hand_over(|handover| handover.record.verdict = Some(verdict.into()));
        }
        let Some(event) = verdict.event() else {
            // What has run there is not undone by running it here: somebody has to decide.
            self.doubt(format!("the destination has said {verdict}: {message}"));
            self.entry.signals.resolved().await;
            return None;
        };
        self.certain();
        let is_there = event == SaveEvent::Committed;
        Some(if is_there { Settled::There } else { Settled::Here(message.into()) })
    }

    fn doubt(&self, why: String) {
        tracing::warn!(operation = %self.entry.fixed.name, doubt = why, "in doubt which side has the devices");
        self.entry.hand_over(|handover| {
            handover.in_doubt = true;
            handover.doubt = why;
        });
    }

    fn certain(&self) {
        self.entry.hand_over(|handover| {
            handover.in_doubt = false;
            handover.doubt.clear();
        });
    }

    async fn ask(&mut self, word: Word) -> Result<v1::HandoverRecord, PeerError> {
        let environment = self.core.environment.clone();
        let silent = environment.sleep(SILENCE);
        let entry = Arc::clone(&self.entry);
        let mut asking = std::pin::pin!(self.call(word));
        tokio::select! {
            biased;
            told = &mut asking => return told,
            () = silent => {}
        }
        entry.hand_over(|handover| {
            handover.in_doubt = true;
            "the destination has been told, and has not answered yet".clone_into(&mut handover.doubt);
        });
        asking.await
    }

    async fn call(&mut self, word: Word) -> Result<v1::HandoverRecord, PeerError> {
        let agreed = Agreed::on_record(&self.entry)?;
        let client = self.client().await?;
        match word {
            Word::Commit => agreed.commit(&client).await,
            Word::Withdraw => {
                let reason = "the source was restarted, and found its devices moved".to_owned();
                agreed.abandon(&client, reason).await
            }
        }
    }

    async fn client(&mut self) -> Result<Client, PeerError> {
        if let Some(client) = &self.client {
            return Ok(client.clone());
        }
        let peer = self.entry.fixed.peer.as_ref();
        let peer = peer.ok_or_else(|| PeerError::Answer("it is not on record who is there".to_owned()))?;
        let client = self.core.dial(peer).await?;
        self.client = Some(client.clone());
        Ok(client)
    }

    /// Whether an admin has let the devices go.
    fn is_let_go(&self) -> bool {
        let decided = self.on_record().and_then(|known| known.resolution);
        decided.is_some_and(|decided| !decided.resume_here)
    }

    /// Tells the destination that it will not be asked again, and before that what it may not know: where the devices stayed
    /// here, that nothing comes any more; where they were let go of, that they are to run there, unless one of them
    /// `may_run_here`. Where that does not get through, it is left to its own deadline for now, and keeps its record.
    pub async fn farewell(self, may_run_here: bool) {
        // No destination was asked to wait longer for the commit.
        let waits = if self.is_let_go() { self.core.config.limits.max_wait } else { Duration::ZERO };
        self.farewell_within(FAREWELL.saturating_add(waits), may_run_here).await;
    }

    /// The same, for so long. Nothing, where it is being said already.
    pub(super) async fn farewell_within(mut self, limit: Duration, may_run_here: bool) {
        let (environment, deadline) = (self.core.environment.clone(), self.core.environment.clone());
        let (core, entry) = (Arc::clone(&self.core), Arc::clone(&self.entry));
        let Ok(_alone) = entry.parting.try_lock() else { return };
        let mut pause = PAUSES.0;
        let telling = async {
            loop {
                match self.say_farewell(may_run_here).await {
                    Ok(()) => return true,
                    Err(PeerError::Call(error))
                        if !self.is_let_go()
                            && error.refusal().is_some_and(|refusal| refusal.code != Code::Unavailable) =>
                    {
                        tracing::info!(error = %chain(&error), "the destination has no use for a farewell");
                        // What may be the last copy is asked for also where another agent is found instead.
                        let is_unknown =
                            error.refusal().is_some_and(|refusal| refusal.code == Code::NotFound);
                        return is_unknown && !self.is_let_go();
                    }
                    // It may just be starting again, as this agent may.
                    Err(error) => {
                        self.client = None;
                        tracing::info!(error = %chain(&error), "the destination is not told yet how it ended");
                    }
                }
                environment.sleep(pause).await;
                pause = (pause * 2).min(PAUSES.1);
            }
        };
        let is_taken = tokio::select! {
            biased;
            is_taken = telling => is_taken,
            () = deadline.sleep(limit) => {
                tracing::info!("the destination is left to its own deadline, and keeps its record");
                false
            }
        };
        if is_taken && entry.owes_farewell() {
            farewell::taken(&core, &entry).await;
        }
    }

    async fn say_farewell(&mut self, may_run_here: bool) -> Result<(), PeerError> {
        // Otherwise there is nobody to tell: nothing was prepared.
        let Some(agreed) = Agreed::of(&self.entry) else { return Ok(()) };
        let client = self.client().await?;
        let end = self.entry.view().end;
        let mut is_silent = self.is_let_go() && may_run_here;
        if is_silent {
            // Nor that nothing comes: what it has may be the last copy.
        } else if self.is_let_go() {
            // Nothing of it runs here, or ever will, so whatever is there may run, and nowhere else.
            agreed.commit(&client).await?;
        } else if let Some(failure) = end.and_then(|end| end.failure) {
            agreed.abandon(&client, failure.message.chars().take(1024).collect()).await?;
        }
        let mut pause = PAUSES.0;
        loop {
            let told = agreed.look(&client, true).await?;
            if told.step() == v1::HandoverStep::Over {
                return Ok(());
            }
            if std::mem::take(&mut is_silent) {
                tracing::warn!(
                    "the destination is not told to run what was let go of here: a device was not seen to be reset, and may \
                     run; it is left to its own deadline"
                );
            }
            // It is still bringing its devices back, or waits for its deadline.
            self.core.environment.sleep(pause).await;
            pause = (pause * 2).min(PAUSES.1);
        }
    }
}

impl HandoverSink {
    /// A sink over the stream to the destination.
    pub fn new(wire: WireSink, offer: Offer) -> Self {
        Self { wire, offer }
    }

    /// Tells the destination that nothing more comes, and why.
    pub async fn give_up(&mut self, reason: String) {
        self.wire.give_up(reason).await;
    }
}

impl StateSink for HandoverSink {
    fn chunk(&mut self, device: usize, bytes: Bytes) -> impl Future<Output = Result<(), BoxError>> + Send {
        self.wire.chunk(device, bytes)
    }

    fn seal(
        &mut self,
        config: &[Option<ConfigCapture>],
    ) -> impl Future<Output = Result<(), BoxError>> + Send {
        self.wire.seal(config)
    }

    fn mark_inconsistent(&mut self) -> impl Future<Output = Result<(), BoxError>> + Send {
        self.wire.mark_inconsistent()
    }

    fn settle(&mut self, word: Word) -> impl Future<Output = Settled> + Send {
        self.offer.settle(word)
    }

    fn is_down(&self) -> bool {
        self.wire.is_down()
    }

    fn under_way(&self) -> Option<u64> {
        self.wire.under_way()
    }

    fn discard(&mut self) -> impl Future<Output = Result<(), BoxError>> + Send {
        self.wire.discard()
    }
}

/// What a migration has that was taken up: the stream is over, and the word is still to be said.
impl StateSink for Offer {
    async fn chunk(&mut self, _device: usize, _bytes: Bytes) -> Result<(), BoxError> {
        Err("a stream does not survive the agent".into())
    }

    async fn seal(&mut self, _config: &[Option<ConfigCapture>]) -> Result<(), BoxError> {
        Err("a stream does not survive the agent".into())
    }

    async fn mark_inconsistent(&mut self) -> Result<(), BoxError> {
        Ok(())
    }

    fn settle(&mut self, word: Word) -> impl Future<Output = Settled> + Send {
        Offer::settle(self, word)
    }

    async fn discard(&mut self) -> Result<(), BoxError> {
        Ok(())
    }
}
