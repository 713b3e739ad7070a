//! Waits for operations and for the person at the keyboard.
//!
//! An operation outlives every connection: where a call fails because the agent is away, it is asked again for a while.

mod tell;

use std::pin::pin;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tonic::Code;
use vfio_checkpoint_client::call::{CallError, Client};
use vfio_checkpoint_proto::ids::OperationName;
use vfio_checkpoint_proto::v1::{CancelOperationRequest, Operation, OperationPhase};

pub(crate) use tell::Teller;

use crate::cli::Waiting;
use crate::commands::missing;
use crate::outcome::{Exit, Failure, judge};
use crate::progress::Meter;
use crate::render;

/// How long the first look takes. Each takes twice as long as the one before, up to one of those below.
const FIRST_LOOK: Duration = Duration::from_millis(125);
/// How often something to do is looked for.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// How many times in a row an agent may be away. Each time the call itself has tried for as long as `--timeout`.
pub(crate) const MAX_AWAY: u32 = 5;
/// How often a line of progress is drawn anew where somebody sees it.
const DRAW_EVERY: Duration = Duration::from_millis(500);

/// Waits until an operation is done, and says once what its caller may do.
pub(crate) async fn done(client: &Client, name: &OperationName) -> Result<Operation, Failure> {
    poll(client, name, None, &mut None, Teller::new()).await
}

/// The same, for no longer than a limit, and with a line of progress.
pub(crate) async fn until_done(
    client: &Client,
    name: &OperationName,
    limit: Option<Duration>,
    meter: Option<&Meter>,
    teller: Teller,
) -> Result<Operation, Failure> {
    let mut seen = None;
    let Some(limit) = limit else { return poll(client, name, meter, &mut seen, teller).await };
    tokio::time::timeout(limit, poll(client, name, meter, &mut seen, teller)).await.unwrap_or_else(|_| {
        if let Some(doubtful) = seen.as_ref().filter(|seen| render::in_doubt(seen).is_some()) {
            return Err(Failure::in_doubt(doubtful));
        }
        let phase = seen.as_ref().map(Operation::phase).filter(|phase| *phase != OperationPhase::Unspecified);
        let at = phase.map(|phase| format!(" ({})", render::phase(phase)));
        let text = format!(
            "{name} is not done after {}{}, and goes on",
            humantime::format_duration(limit),
            at.unwrap_or_default(),
        );
        let hint = format!("to follow it call: vfioctl operations watch {}", name.id());
        Err(Failure::goes_on(text, name, seen).hint(&hint))
    })
}

/// Stays with an operation that was started here: Ctrl-C cancels it.
pub(crate) async fn stay(
    client: &Client,
    name: &OperationName,
    waiting: &Waiting,
    interrupts: &mut Interrupts,
) -> Result<Operation, Failure> {
    stay_with(client, name, waiting, interrupts, Teller::new()).await
}

/// The same, with more to say on the way.
pub(crate) async fn stay_with(
    client: &Client,
    name: &OperationName,
    waiting: &Waiting,
    interrupts: &mut Interrupts,
    teller: Teller,
) -> Result<Operation, Failure> {
    let meter = Meter::new(None);
    let waited = until_done(client, name, waiting.wait_timeout, Some(&meter), teller);
    match interrupts.or(client, name, waited).await {
        Some(done) => done,
        None => Err(after_interrupt(client, name, interrupts).await),
    }
}

/// Whether the agent is away, or on its way out, so that asking again is of use. Where another certificate is needed it
/// is of none.
pub(crate) fn is_away(error: &CallError) -> bool {
    match error {
        CallError::NotConnected { source, .. } => !source.is_about_the_caller(),
        CallError::Deadline { .. } => true,
        CallError::Refused(refusal) => refusal.code == Code::Unavailable,
        CallError::BadAnswer { .. } => false,
    }
}

/// Asks until the operation is done. What was heard last is in `seen`, also where the asking is given up.
async fn poll(
    client: &Client,
    name: &OperationName,
    meter: Option<&Meter>,
    seen: &mut Option<Operation>,
    mut teller: Teller,
) -> Result<Operation, Failure> {
    let say = |text: &str| match meter {
        Some(meter) => meter.say(text),
        None => render::say(text),
    };
    let longest = if meter.is_some_and(Meter::is_seen) { DRAW_EVERY } else { LOOK_EVERY };
    // Most of what is waited for begins or ends soon; then it is asked less and less.
    let mut look_every = FIRST_LOOK;
    let mut away = 0;
    loop {
        let asked = tokio::time::Instant::now();
        let answer = match client.wait_operation(name.as_str(), look_every).await {
            Ok(answer) => answer,
            Err(error) if away < MAX_AWAY && is_away(&error) => {
                away += 1;
                say(&format!("{error}\n{name} goes on without this connection; asking again"));
                tokio::time::sleep(LOOK_EVERY).await;
                continue;
            }
            Err(error) => {
                let failure = Failure::call(error);
                // It was begun, so "refused before anything was touched" would not be true of it.
                let exit = if failure.exit == Exit::Refused { Exit::Failed } else { failure.exit };
                let unknown = Failure::new(exit, format!("what became of {name} is not known"));
                return Err(failure.exits(exit).about(name).after(&unknown));
            }
        };
        away = 0;
        let operation = answer.operation.ok_or_else(|| missing("WaitOperation", "operation"))?;
        if let Some(meter) = meter {
            meter.follow(&operation);
        }
        if operation.done {
            return Ok(operation);
        }
        *seen = Some(operation.clone());
        // The destination has said all that it will.
        if render::is_for_somebody(&operation) {
            return Err(Failure::in_doubt(&operation));
        }
        for text in teller.hear(&operation, asked) {
            say(&text);
        }
        // The agent answers when the time is up. One that does not wait must not be asked without end.
        tokio::time::sleep_until(asked + look_every / 2).await;
        look_every = (look_every * 2).min(longest);
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

    /// Runs the work of an operation. On Ctrl-C cancels the operation first, and then drops the work: from then on what
    /// came of the work is not asked, because it may have ended by the cancellation.
    pub(crate) async fn or<T>(
        &mut self,
        client: &Client,
        name: &OperationName,
        work: impl Future<Output = T>,
    ) -> Option<T> {
        let mut work = pin!(work);
        tokio::select! {
            result = &mut work => return Some(result),
            () = self.next() => {}
        }
        render::say(&format!("interrupted; cancelling {name}"));
        // The stream ends only after this, so that the operation knows that it was cancelled and did not break.
        let mut cancelling = pin!(cancel(client, name));
        tokio::select! {
            () = &mut cancelling => {}
            _ended = &mut work => cancelling.await,
        }
        None
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
            let hint = format!("to see what became of it call: vfioctl operations get {}", name.id());
            let failure = Failure::new(Exit::Interrupted, format!("{name} is not over yet"));
            return failure.about(name).hint(&hint);
        }
    };
    match done {
        Ok(operation) => match judge(&operation) {
            // State that is lost is worse news than an interrupt.
            (Exit::NeedsSomebody, Some(text)) => Failure::ended(Exit::NeedsSomebody, text, &operation),
            (_, Some(text)) => Failure::ended(Exit::Interrupted, text, &operation),
            (_, None) => {
                let text = format!("{name} had succeeded before it could be cancelled");
                Failure::ended(Exit::Interrupted, text, &operation)
            }
        },
        // What somebody has to do is worse news, too.
        Err(failure) if failure.exit == Exit::NeedsSomebody => failure,
        Err(failure) => failure.exits(Exit::Interrupted),
    }
}
