//! Clients in other languages: what the contract says is enough to write one.
//!
//! ```text
//!   agent (this process, mutual TLS, simulated devices) <== gRPC ==> python/run SCRIPT
//!                                                                      |-- code generated from proto/ alone
//!   what the agent says of its operations == the script's JSON  <------'
//! ```
//! The scripts share no code with this project: their checksums, digests and checks of order are their own, so a mistake
//! that both ends of the Rust code make alike shows here.
//!
//! They need Python and packages for it, so they are ignored unless asked for: `tests/run interop` does. Where those are
//! missing and cannot be had, a test fails and says what is missing; none is skipped.

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test: the helpers outside #[test] functions assert by panicking, too"
)]

mod environment;
#[path = "../agent/lab.rs"]
#[allow(dead_code, reason = "shared with the tests of the agent, which use all of it")]
mod lab;
mod python;
mod s3;

use serde_json::{Value, json};
use vfio_checkpoint_server::serve::Agent;

use crate::lab::{Lab, PATIENCE, start};
use crate::python::{Ran, run};

const DEVICES: [(&str, &str); 2] = [
    // Enough state for several chunks and an Ack between them.
    ("nic0", "sim:seed=7,memory=24MiB"),
    ("nic1", "sim:seed=8,memory=24MiB"),
];

/// An agent, and the folders of TLS files that a client bears.
struct Stage {
    lab: Lab,
    agent: Agent,
}

impl Stage {
    async fn new() -> Self {
        let lab = Lab::new();
        let mut config = lab.config("a", &DEVICES);
        config.grants.push(python::operator_grant());
        let agent = start(config).await;
        for name in ["operator", "viewer"] {
            python::write_tls(&lab, name);
        }
        Self { lab, agent }
    }

    /// Runs a script against the agent, with the TLS files of `bearer`.
    async fn script(&self, script: &str, bearer: &str, more: &[&str]) -> Ran {
        let state = self.lab.path("taken");
        std::fs::create_dir_all(&state).unwrap();
        let (tls, folder, agent) = (self.lab.path(bearer), state, self.agent.address().to_string());
        let mut arguments = vec![script, "--agent", &agent, "--tls", tls.to_str().unwrap()];
        arguments.extend(["--source", "devices/nic0", "--destination", "devices/nic1"]);
        arguments.extend(["--folder", folder.to_str().unwrap()]);
        arguments.extend(more);
        run(&arguments).await
    }

    /// An operation, as the agent tells it to a client of this project.
    async fn told(&self, operation: &Value) -> vfio_checkpoint_proto::v1::Operation {
        let admin = self.lab.client(&self.agent, "admin").await;
        admin.wait_operation(operation.as_str().unwrap(), PATIENCE).await.unwrap().operation.unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Python and packages: run tests/run interop"]
async fn a_generated_client_saves_and_restores() {
    let stage = Stage::new().await;
    let ran = stage.script("client.py", "operator", &[]).await;
    let told = ran.document();

    let names: Vec<&str> =
        told["devices"].as_array().unwrap().iter().map(|device| device["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["devices/nic0", "devices/nic1"]);
    assert_eq!(told["devices"][0]["state"], "MIGRATION_STATE_RUNNING");
    let phases = told["phases"].as_array().unwrap();
    assert_eq!(phases.first().unwrap(), "OPERATION_PHASE_WAITING_FOR_STREAM", "{phases:?}");
    assert_eq!(phases.last().unwrap(), "OPERATION_PHASE_DONE", "{phases:?}");
    for (job, outcome) in [("save", "STATE_OUTCOME_PRESERVED"), ("restore", "STATE_OUTCOME_REPLACED")] {
        assert_eq!(told[job]["result"], "OPERATION_RESULT_SUCCEEDED", "{told:#}");
        assert_eq!(told[job]["outcome"], outcome, "{told:#}");
        let operation = stage.told(&told[job]["operation"]).await;
        let seal = operation.devices[0].seal.clone().unwrap();
        assert_eq!(told["taken"]["blake3"], json!([hex(&seal.blake3)]), "{job}: what Python hashed");
        assert_eq!(told["taken"]["length_bytes"], json!([seal.length_bytes]), "{job}: what Python counted");
        assert!(
            seal.length_bytes > 8 << 20,
            "several chunks, and an Ack between them: {}",
            seal.length_bytes
        );
    }
    let bytes = told["taken"]["length_bytes"][0].as_u64().unwrap();
    println!(
        "figures: interop, Python: {bytes} bytes saved and restored in {:.1?} with starting up",
        ran.took
    );
    stage.agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Python and packages: run tests/run interop"]
async fn a_generated_client_reads_what_is_refused() {
    let stage = Stage::new().await;
    let viewer = stage.lab.path("viewer");
    let ran = stage.script("refused.py", "operator", &["--viewer-tls", viewer.to_str().unwrap()]).await;
    let told = ran.document();
    eprintln!("{told:#}");

    for (case, code, reason) in [
        ("no_role", "PERMISSION_DENIED", "ROLE_REQUIRED"),
        ("no_memory_capture", "INVALID_ARGUMENT", "INVALID_FIELD"),
        ("hopeless", "FAILED_PRECONDITION", "BLOCKED"),
        ("no_operation", "NOT_FOUND", "OPERATION_NOT_FOUND"),
        ("other_request_same_id", "ALREADY_EXISTS", "REQUEST_ID_REUSED"),
        ("leased", "UNAVAILABLE", "BLOCKED"),
    ] {
        let refusal = &told[case];
        assert_eq!(
            (refusal["code"].as_str(), refusal["reason"].as_str()),
            (Some(code), Some(reason)),
            "{case}"
        );
        assert_eq!(refusal["domain"], "vfio.checkpoint.v1", "{case}");
    }
    assert!(told["no_role"]["metadata"]["roles"].as_str().unwrap().contains("saver"), "{}", told["no_role"]);
    assert_eq!(told["no_memory_capture"]["fields"], json!(["memory_capture"]));
    assert_eq!(told["no_operation"]["metadata"]["operation"], "operations/no-such-operation");
    assert!(
        told["leased"]["retry_after_seconds"].as_f64().is_some_and(|wait| wait > 0.0),
        "{}",
        told["leased"]
    );
    assert_eq!(told["hopeless"]["retry_after_seconds"], Value::Null, "trying again cannot help");

    let in_the_way = told["hopeless_dry_run"].as_array().unwrap();
    for blocker in [
        json!(["BLOCKER_REASON_DEVICE_NOT_FOUND", "devices/no-such-device"]),
        json!(["BLOCKER_REASON_MEMORY_CAPTURE", ""]),
        json!(["BLOCKER_REASON_VIOMMU", ""]),
    ] {
        assert!(in_the_way.contains(&blocker), "{blocker} is not among {in_the_way:?}");
    }
    assert_eq!(told["hopeless"]["blockers"], told["hopeless_dry_run"], "a dry run tells what the call would");
    assert_eq!(told["same_request"], true, "the same request gives the same operation");
    assert_eq!(told["cancelled"]["result"], "OPERATION_RESULT_CANCELLED");

    for (case, reason, says) in [
        ("flipped_bit", "STREAM_PROTOCOL", "frame 1 is damaged"),
        ("lost_frame", "STREAM_PROTOCOL", "frame 2 came where frame 1 was expected"),
        ("other_seal", "SEAL_MISMATCH", "is not what its seal says"),
        ("no_seal", "STREAM_BROKEN", "before the seals"),
    ] {
        let ended = &told[case];
        assert_eq!(ended["result"], "OPERATION_RESULT_FAILED", "{case}: {ended:#}");
        assert_eq!(ended["outcome"], "STATE_OUTCOME_STATE_LOST", "{case}: {ended:#}");
        assert_eq!(ended["failure"]["reason"], reason, "{case}: {ended:#}");
        assert!(ended["failure"]["message"].as_str().unwrap().contains(says), "{case}: {ended:#}");
        let heard = ended["said"].as_str().unwrap();
        assert!(
            heard.starts_with("the agent gave the stream up: ") && heard.contains(says),
            "{case}: {ended:#}"
        );
        assert_eq!(stage.told(&ended["operation"]).await.failure.unwrap().reason, reason, "{case}");
    }
    assert_eq!(
        told["whole"]["result"], "OPERATION_RESULT_SUCCEEDED",
        "the device takes whole state after all that"
    );
    stage.agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Python and packages: run tests/run interop"]
async fn a_client_that_is_refused_says_so_and_fails() {
    let stage = Stage::new().await;
    let ran = stage.script("client.py", "viewer", &[]).await;
    assert_eq!(ran.status, Some(1), "{ran:?}");
    assert_eq!(ran.stdout, "", "no document about what was not done");
    assert!(ran.stderr.starts_with("client.py: PERMISSION_DENIED (ROLE_REQUIRED): "), "{ran:?}");
    stage.agent.stop().await.unwrap();
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
