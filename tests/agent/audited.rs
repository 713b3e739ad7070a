//! Audit lines about a hand-over: one for each decision, however often it is asked for, and whole.
//!
//! ```text
//!   destination: ENDED cannot be recorded --CommitHandover, 100 times, none waited for--> one line, once it is
//!                                         --GetHandover settled, again and again------> one line, once it is over
//!   Resolve with a statement --> the statement, whole
//! ```
//! All is on one thread: the subscriber is this thread's.

use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::Value;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::yield_now;
use tracing::subscriber::DefaultGuard;
use vfio_checkpoint_proto::ids::Ticket;
use vfio_checkpoint_proto::proof::Proven as _;
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_server::config::{LogFormat, TelemetryConfig};
use vfio_checkpoint_server::environment::Environment;
use vfio_checkpoint_server::failpoint::{Failing, fail};
use vfio_checkpoint_server::telemetry::{self, AuditLines};

use crate::doubt::in_doubt;
use crate::faulty::Faulty;
use crate::flow::{done, soon};
use crate::migrations::{manual, prepared};
use crate::pair::{Pair, small};

/// The audit lines of all agents of this thread.
#[derive(Clone, Default)]
struct Audit {
    lines: Arc<watch::Sender<Vec<Value>>>,
    /// What is not a whole line yet.
    rest: Arc<Mutex<Vec<u8>>>,
}

impl Audit {
    /// Those from now on, until the guard is dropped.
    fn begin() -> (Self, DefaultGuard) {
        let audit = Self::default();
        let writer = audit.clone();
        let telemetry = TelemetryConfig { log: "audit=info".to_owned(), format: LogFormat::Json };
        let subscriber =
            telemetry::subscriber(&telemetry, AuditLines::Filtered, false, move || writer.clone()).unwrap();
        (audit, tracing::subscriber::set_default(subscriber))
    }

    /// The fields of those about this that have this result.
    fn of(&self, what: &str, result: &str) -> Vec<Value> {
        let lines = self.lines.borrow();
        lines.iter().filter(|fields| fields["what"] == what && fields["result"] == result).cloned().collect()
    }

    /// Waits for so many of them.
    async fn come(&self, what: &str, result: &str, count: usize) {
        let mut lines = self.lines.subscribe();
        let are = |lines: &Vec<Value>| {
            lines.iter().filter(|fields| fields["what"] == what && fields["result"] == result).count()
                >= count
        };
        soon(lines.wait_for(are)).await.unwrap();
    }
}

impl Write for Audit {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let mut rest = self.rest.lock().unwrap();
        rest.extend_from_slice(bytes);
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = rest.drain(..=end).collect();
            let mut line: Value = serde_json::from_slice(&line).unwrap();
            self.lines.send_modify(|lines| lines.push(line["fields"].take()));
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The destination cannot record that anything has ended.
fn without_end(pair: &Pair) -> Failing {
    fail(&pair.destination.core().config.node.state_dir, "commit of ENDED", 0)
}

/// What the destination has on record of an arrival, for who speaks as its source.
fn agreed(pair: &Pair, arrival: &str) -> (Ticket, Vec<u64>) {
    let known = pair.destination.core().operations.get(&arrival.parse().unwrap()).unwrap();
    let secret = known.view().handover.unwrap().record.secret.unwrap();
    (secret, known.fixed.devices.iter().map(|device| device.epoch.0).collect())
}

#[tokio::test]
async fn a_commit_that_is_said_again_and_again_has_one_line_and_leaves_no_task() {
    const CALLS: usize = 100;
    let (audit, _guard) = Audit::begin();
    let pair = Pair::new(1).await;
    let (source, destination) = pair.migrator().await;
    let name = pair.start(manual).await;
    let arrival = prepared(&source, &name).await.handover.unwrap().peer_operation;
    let mut held = without_end(&pair);
    source.commit(v1::CommitRequest { operation: name.clone() }).await.unwrap();
    held.times(1).await;
    let (secret, epochs) = agreed(&pair, &arrival);
    let commit = v1::CommitHandoverRequest { operation: arrival.clone(), epochs, ..Default::default() };
    let commit = commit.proven(&secret);
    let as_source = pair.lab.client_named(&pair.destination, "spiffe://lab.test/agent/source").await;
    let called = "/vfio.checkpoint.v1.MigrationService/CommitHandover";
    let tasks = Handle::current().metrics().num_alive_tasks();
    for _ in 0..CALLS {
        let before = audit.of(called, "allowed").len();
        let (caller, commit) = (as_source.clone(), commit.clone());
        let calling = tokio::spawn(async move { caller.commit_handover(commit).await });
        audit.come(called, "allowed", before + 1).await;
        calling.abort();
    }
    let gone = async {
        while Handle::current().metrics().num_alive_tasks() > tasks + CALLS / 4 {
            yield_now().await;
        }
    };
    soon(gone).await;
    assert!(audit.of("CommitHandover", "succeeded").is_empty(), "it has not ended");
    drop(held);
    assert_eq!(soon(done(&source, &name)).await.result(), v1::OperationResult::Succeeded);
    soon(done(&destination, &arrival)).await;
    as_source.commit_handover(commit).await.unwrap();
    audit.come("CommitHandover", "succeeded", 1).await;
    let lines = audit.of("CommitHandover", "succeeded");
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert_eq!(
        (&lines[0]["resource"], &lines[0]["who"]),
        (&arrival.into(), &"spiffe://lab.test/agent/source".into())
    );
    pair.stop().await;
}

#[tokio::test]
async fn a_farewell_is_audited_where_it_settles_something_and_asks_ever_less_often() {
    let (audit, _guard) = Audit::begin();
    let faulty = Faulty::new();
    // The second pause. Whoever asks without growing ones never comes to it.
    let second = Duration::from_millis(100);
    faulty.gate(second);
    let pair =
        Pair::within(1, small, &[], &[], |_| {}, [faulty.environment(), Environment::production()]).await;
    let (source, destination) = pair.migrator().await;
    let name = pair.start(manual).await;
    let arrival = prepared(&source, &name).await.handover.unwrap().peer_operation;
    let mut held = without_end(&pair);
    source.cancel_operation(v1::CancelOperationRequest { name: name.clone() }).await.unwrap();
    soon(done(&source, &name)).await;
    held.times(1).await;
    faulty.waits(second, 1).await;
    let (secret, _) = agreed(&pair, &arrival);
    let get = v1::GetHandoverRequest { operation: arrival.clone(), settled: true, ..Default::default() };
    let get = get.proven(&secret);
    let as_source = pair.lab.client_named(&pair.destination, "spiffe://lab.test/agent/source").await;
    for _ in 0..5 {
        let told = as_source.get_handover(get.clone()).await.unwrap().handover.unwrap();
        assert_ne!(told.step(), v1::HandoverStep::Over);
    }
    assert!(audit.of("GetHandover settled", "succeeded").is_empty(), "nothing is settled yet");
    drop(held);
    soon(done(&destination, &arrival)).await;
    faulty.pass(second);
    audit.come("GetHandover settled", "succeeded", 1).await;
    for _ in 0..5 {
        let told = as_source.get_handover(get.clone()).await.unwrap().handover.unwrap();
        assert_eq!(told.step(), v1::HandoverStep::Over);
    }
    assert_eq!(audit.of("GetHandover settled", "succeeded").len(), 1);
    pair.stop().await;
}

/// What somebody answers for is for whoever reads the audit log: all of it, and in letters.
#[tokio::test]
async fn what_an_admin_states_is_in_the_line_whole() {
    let (audit, _guard) = Audit::begin();
    let (pair, _, source, name) = in_doubt().await;
    let statement = format!("für {} it's off: \\o\nly", "x".repeat(300));
    let admin = pair.lab.client(&pair.source, "admin").await;
    let resolve = |statement: &str| v1::ResolveRequest {
        operation: name.clone(),
        resolution: v1::Resolution::ResumeHere.into(),
        peer_is_fenced: true,
        statement: statement.to_owned(),
        ..Default::default()
    };
    // With a line of its own in it, it is refused, and makes no line of the log.
    assert!(admin.resolve(resolve(&statement)).await.is_err());
    let statement = statement.replace("\\o\n", "on");
    admin.resolve(resolve(&statement)).await.unwrap();
    audit.come("Resolve", "succeeded", 1).await;
    let forged = &audit.of("Resolve", "failed")[0]["statement"];
    assert!(forged.as_str().is_some_and(|text| text.ends_with("it's off: \\\\o\\nly")), "{forged}");
    let line = &audit.of("Resolve", "succeeded")[0];
    assert_eq!(line["statement"], statement);
    assert_eq!(line["resource"], format!("{name} RESOLUTION_RESUME_HERE fenced=true accept_loss=false"));
    soon(done(&source, &name)).await;
    pair.stop().await;
}
