//! Waits for operations and for the person at the keyboard.
//!
//! An operation outlives every connection: where a call fails because the agent is away, it is asked again for a while.

use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use vfio_checkpoint_client::call::{CallError, Client};
use vfio_checkpoint_proto::ids::OperationName;
use vfio_checkpoint_proto::v1::{CancelOperationRequest, Operation, OperationAction};

use crate::calls::missing;
use crate::outcome::{Exit, Failure, judge};
use crate::render;

/// How often something to do is looked for.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// How many times in a row an agent may be away. Each time the call itself has tried for as long as `--timeout`.
const MAX_AWAY: u32 = 5;

/// Waits until an operation is done, and says once what its caller may do.
pub(crate) async fn done(client: &Client, name: &OperationName) -> Result<Operation, Failure> {
    let mut told = Vec::new();
    let mut away = 0;
    loop {
        let answer = match client.wait_operation(name.as_str(), LOOK_EVERY).await {
            Ok(answer) => answer,
            Err(error @ (CallError::NotConnected { .. } | CallError::Deadline { .. })) if away < MAX_AWAY => {
                away += 1;
                render::say(&format!("{error}\n{name} goes on without this connection; asking again"));
                tokio::time::sleep(LOOK_EVERY).await;
                continue;
            }
            Err(error) => {
                let failure = Failure::call(error);
                // It was begun, so "refused before anything was touched" would not be true of it.
                let exit = if failure.exit == Exit::Refused { Exit::Failed } else { failure.exit };
                let text = format!("what became of {name} is not known: {}", failure.message);
                return Err(Failure::new(exit, text));
            }
        };
        away = 0;
        let operation = answer.operation.ok_or_else(|| missing("WaitOperation", "operation"))?;
        if operation.done {
            return Ok(operation);
        }
        for (action, text) in [
            (OperationAction::Cutover, "pause the workload and call: vfioctl operations cutover"),
            (OperationAction::Resume, "the devices are held; to run them call: vfioctl operations resume"),
        ] {
            if operation.actions().any(|found| found == action) && !told.contains(&action) {
                told.push(action);
                render::say(&format!("{text} {}", name.id()));
            }
        }
    }
}

/// Ctrl-C. It is listened for before an operation is started, so that none is started and then left alone.
#[derive(Debug)]
pub(crate) struct Interrupts(Signal);

impl Interrupts {
    pub(crate) fn listen() -> Result<Self, Failure> {
        match signal(SignalKind::interrupt()) {
            Ok(signal) => Ok(Self(signal)),
            Err(error) => Err(Failure::new(Exit::Failed, format!("cannot listen for Ctrl-C: {error}"))),
        }
    }

    /// Returns at the next one, or at one that came since the last. Cancel-safe.
    pub(crate) async fn next(&mut self) {
        if self.0.recv().await.is_none() {
            std::future::pending::<()>().await;
        }
    }

    /// Runs the work of an operation; on Ctrl-C cancels the operation first, and then drops the work.
    pub(crate) async fn or<T>(
        &mut self,
        client: &Client,
        name: &OperationName,
        work: impl Future<Output = T>,
    ) -> Option<T> {
        tokio::select! {
            result = work => Some(result),
            () = async {
                self.next().await;
                render::say(&format!("interrupted; cancelling {name}"));
                // The stream ends only after this, so that the operation knows that it was cancelled and did not break.
                cancel(client, name).await;
            } => None,
        }
    }
}

/// Asks for an operation to be undone. Where that fails, waiting for it tells what became of it.
pub(crate) async fn cancel(client: &Client, name: &OperationName) {
    if let Err(error) = client.cancel_operation(CancelOperationRequest { name: name.to_string() }).await {
        render::say(&error.to_string());
    }
}

/// What became of an operation after an interrupt. A second Ctrl-C ends the waiting.
pub(crate) async fn after_interrupt(
    client: &Client,
    name: &OperationName,
    interrupts: &mut Interrupts,
) -> Failure {
    let done = tokio::select! {
        done = done(client, name) => done,
        () = interrupts.next() => {
            let text = format!("{name} is being undone; to see what became of it call: vfioctl operations get {}", name.id());
            return Failure::new(Exit::Interrupted, text);
        }
    };
    match done {
        Ok(operation) => match judge(&operation) {
            // State that is lost is worse news than an interrupt.
            (Exit::NeedsSomebody, Some(text)) => Failure::new(Exit::NeedsSomebody, text),
            (_, Some(text)) => Failure::new(Exit::Interrupted, text),
            (_, None) => {
                Failure::new(Exit::Interrupted, format!("{name} had succeeded before it could be cancelled"))
            }
        },
        Err(failure) => Failure::new(Exit::Interrupted, failure.message),
    }
}
