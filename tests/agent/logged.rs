//! What agents log, and what goes on just the same where they are told to log little.

use std::sync::{Arc, LazyLock, Mutex};

use serde_json::Value;
use tracing::Dispatch;
use tracing::subscriber::DefaultGuard;
use vfio_checkpoint_client::call::{CallOptions, Client};
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_server::config::{LogFormat, TelemetryConfig};
use vfio_checkpoint_server::telemetry::{self, AuditLines};

use crate::flow::{done, save_of, soon, start_save, take};
use crate::lab::{Lab, start};
use crate::pair::Pair;

const TRACE_ID: &str = "0af7651916cd43dd8448eb211c80319c";

/// What is logged, for a test to look at.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Lines {
    /// Logs as `telemetry.log` says, on this thread: a test that looks at the lines of an agent runs on one.
    fn logging(log: &str, format: LogFormat) -> (Self, DefaultGuard) {
        // While at most one subscriber lives, tracing asks the thread that comes first whether an event is wanted, and
        // remembers a no for all threads. Two that never end, and it asks every subscriber.
        static NEVER_ALONE: LazyLock<[Dispatch; 2]> = LazyLock::new(|| {
            [(); 2].map(|()| {
                let telemetry = TelemetryConfig::default();
                let subscriber = telemetry::subscriber(&telemetry, AuditLines::All, false, std::io::sink);
                Dispatch::new(subscriber.unwrap())
            })
        });
        LazyLock::force(&NEVER_ALONE);
        let lines = Self::default();
        let writer = lines.clone();
        let telemetry = TelemetryConfig { log: log.to_owned(), format };
        let subscriber =
            telemetry::subscriber(&telemetry, AuditLines::All, false, move || writer.clone()).unwrap();
        (lines, tracing::subscriber::set_default(subscriber))
    }

    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl std::io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The same client, whose calls are part of the trace.
fn traced(client: Client) -> Client {
    let trace = Some(format!("00-{TRACE_ID}-b7ad6b7169203331-01").parse().unwrap());
    client.with_call_options(CallOptions { trace, ..Default::default() })
}

#[tokio::test]
async fn the_trace_of_a_caller_is_in_its_operation_and_in_each_line_about_it() {
    for format in [LogFormat::Text, LogFormat::Json] {
        let (lines, _guard) = Lines::logging("vfio_checkpoint_server=info", format);
        let lab = Lab::new();
        let agent = start(lab.config("a", &[("n0", "sim:seed=1,memory=1MiB")])).await;
        let saver = traced(lab.client(&agent, "saver").await);
        let name = start_save(&saver, save_of(&["n0"])).await;
        take(&saver, &name).await;
        assert_eq!(done(&saver, &name).await.trace_id, TRACE_ID);
        agent.stop().await.unwrap();
        let text = lines.text();
        for event in ["moved", "operation ended"] {
            let about: Vec<&str> =
                text.lines().filter(|line| line.contains(&name) && line.contains(event)).collect();
            assert!(!about.is_empty(), "{format:?} {event}: {text}");
            for line in about {
                assert!(line.contains(TRACE_ID), "{format:?}: {line}");
            }
        }
    }
}

#[tokio::test]
async fn a_denied_call_is_one_audit_line_whatever_is_logged() {
    for log in ["error", "vfio_checkpoint_store=debug", "off"] {
        let (lines, _guard) = Lines::logging(log, LogFormat::Json);
        let lab = Lab::new();
        let agent = start(lab.config("a", &[("n0", "sim:seed=1,memory=1MiB")])).await;
        let viewer = lab.client(&agent, "viewer").await;
        viewer.reset_device(v1::ResetDeviceRequest::default()).await.unwrap_err();
        agent.stop().await.unwrap();
        let text = lines.text();
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let [line] = lines.as_slice() else { panic!("{log}: one line, and not {text}") };
        assert_eq!(
            (&line["target"], &line["fields"]["result"]),
            (&"audit".into(), &"denied".into()),
            "{log}"
        );
    }
}

#[tokio::test]
async fn a_migration_is_one_trace_where_next_to_nothing_is_logged() {
    let (lines, _guard) = Lines::logging("error", LogFormat::Json);
    let pair = Pair::new(1).await;
    let (source, destination) = pair.migrator().await;
    let admission = pair.admission(&source).await;
    let ticket = destination.admit(admission).await.unwrap().ticket;
    let source = traced(source);
    let name = source.migrate(pair.request(ticket)).await.unwrap().operation.unwrap().name;
    let ended = soon(done(&source, &name)).await;
    assert_eq!((ended.result(), ended.trace_id.as_str()), (v1::OperationResult::Succeeded, TRACE_ID));
    let arrival = soon(done(&destination, &ended.handover.unwrap().peer_operation)).await;
    assert_eq!(arrival.trace_id, TRACE_ID, "the destination was told of it");
    pair.stop().await;
    // Only audit lines are written, and these are about the trace, too.
    for line in lines.text().lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        assert_eq!(line["target"], "audit", "{line}");
        if line["fields"]["what"] == "Migrate" || line["fields"]["what"] == "Prepare" {
            assert_eq!(line["spans"][0]["trace_id"], TRACE_ID, "{line}");
        }
    }
}
