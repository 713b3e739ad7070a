//! What the caller of an operation says while it runs: Cutover, Resume, Commit, Ready, Cancel, and an admin's decision.
//!
//! Each is a level, not an edge: said once it stays said, whoever listens and whenever.

use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::watch;

use super::entry::Cancel;

/// The levels of one operation.
#[derive(Debug)]
pub struct Signals {
    cutover: watch::Sender<bool>,
    resume: watch::Sender<bool>,
    commit: watch::Sender<bool>,
    ready: watch::Sender<bool>,
    resolved: watch::Sender<bool>,
    cancel: watch::Sender<Option<Cancel>>,
    /// `CommitHandover` was heard in this life of the agent.
    commit_heard: AtomicBool,
    /// It is not taken up yet, because a device of it does not answer.
    waits_for_device: AtomicBool,
}

impl Signals {
    /// Nothing said yet.
    pub fn new() -> Self {
        Self {
            cutover: watch::Sender::new(false),
            resume: watch::Sender::new(false),
            commit: watch::Sender::new(false),
            ready: watch::Sender::new(false),
            resolved: watch::Sender::new(false),
            cancel: watch::Sender::new(None),
            commit_heard: AtomicBool::new(false),
            waits_for_device: AtomicBool::new(false),
        }
    }

    /// Whether it listens to nothing yet, because a device of it does not answer. What is said stays said.
    pub fn waits_for_device(&self) -> bool {
        self.waits_for_device.load(Ordering::Acquire)
    }

    pub(super) fn set_waits_for_device(&self, waits: bool) {
        self.waits_for_device.store(waits, Ordering::Release);
    }

    /// Stop the devices.
    pub fn say_cutover(&self) {
        self.cutover.send_replace(true);
    }

    /// Run the devices.
    pub fn say_resume(&self) {
        self.resume.send_replace(true);
    }

    /// Whether Resume was said.
    pub fn is_resumed(&self) -> bool {
        *self.resume.borrow()
    }

    /// The destination may run the devices.
    pub fn say_commit(&self) {
        self.commit.send_replace(true);
    }

    /// Whether `CommitHandover` is heard for the first time: asked once for each that may be. A source says it again and
    /// again, and what it brings about is one decision.
    pub fn is_first_commit(&self) -> bool {
        !self.commit_heard.swap(true, Ordering::AcqRel)
    }

    /// Whoever uses the devices of an arrival is ready.
    pub fn say_ready(&self) {
        self.ready.send_replace(true);
    }

    /// An admin's decision about a migration in doubt is on record.
    pub fn say_resolved(&self) {
        self.resolved.send_replace(true);
    }

    /// Ready once Commit was said.
    pub async fn commit(&self) {
        said(&self.commit).await;
    }

    /// Ready once Ready was said.
    pub async fn ready(&self) {
        said(&self.ready).await;
    }

    /// Ready once an admin's decision is on record.
    pub async fn resolved(&self) {
        said(&self.resolved).await;
    }

    /// Undo everything. The first reason stays.
    pub fn say_cancel(&self, why: Cancel) {
        self.cancel.send_if_modified(|said| {
            let first = said.is_none();
            if first {
                *said = Some(why);
            }
            first
        });
    }

    /// Ready once Cutover was said.
    pub async fn cutover(&self) {
        said(&self.cutover).await;
    }

    /// Ready once Resume was said.
    pub async fn resume(&self) {
        said(&self.resume).await;
    }

    /// Ready once Cancel was said, with its reason.
    pub async fn cancelled(&self) -> Cancel {
        let mut listening = self.cancel.subscribe();
        // The sender is in `self`, so it cannot be gone.
        match listening.wait_for(Option::is_some).await.map(|why| why.clone()) {
            Ok(Some(why)) => why,
            Ok(None) | Err(_) => std::future::pending().await,
        }
    }

    /// Whether, and why, Cancel was said.
    pub fn cancel_reason(&self) -> Option<Cancel> {
        self.cancel.borrow().clone()
    }
}

impl Default for Signals {
    fn default() -> Self {
        Self::new()
    }
}

async fn said(level: &watch::Sender<bool>) {
    let mut listening = level.subscribe();
    if listening.wait_for(|said| *said).await.is_err() {
        std::future::pending::<()>().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_said_stays_said() {
        let signals = Signals::new();
        signals.say_cutover();
        signals.cutover().await;
        signals.cutover().await;
        assert_eq!(signals.cancel_reason(), None);
        signals.say_cancel(Cancel::Requested { by: "a".to_owned() });
        signals.say_cancel(Cancel::ShuttingDown);
        assert_eq!(signals.cancelled().await, Cancel::Requested { by: "a".to_owned() });
    }
}
