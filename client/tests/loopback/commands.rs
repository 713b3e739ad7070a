//! `vfioctl` itself: its exit codes and what it prints.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::Stdio;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};
use vfio_checkpoint_client::document::Consistency;
use vfio_checkpoint_client::folder::FolderReader;
use vfio_checkpoint_proto::v1;

use crate::pki::Ca;
use crate::server::{Agent, state};
use crate::setup::{Setup, done};

async fn consistency(path: &Path) -> Consistency {
    let reader = FolderReader::open(path).await.unwrap();
    reader.verify().await.unwrap();
    reader.manifest().consistency
}

#[tokio::test]
async fn a_save_ends_with_a_checkpoint_and_one_document() {
    let agent = Agent::default();
    let setup = Setup::new(&agent).await;
    let (consistent, inconsistent) =
        (v1::CheckpointConsistency::Consistent, v1::CheckpointConsistency::Inconsistent);
    *agent.operation.lock().unwrap() =
        done(v1::OperationResult::Succeeded, v1::StateOutcome::Preserved, consistent);
    let (code, out, err) = setup.run("save a --output one -o json").await;
    assert_eq!(code, 0, "{err}");
    let summary: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(summary["moved_bytes"], state().len());
    assert_eq!(summary["devices"][0]["blake3"], blake3::hash(&state()).to_hex().as_str());
    assert_eq!(consistency(&setup.path("one")).await, Consistency::Consistent);

    // Whatever is in the folder is not asked of the agent first.
    let calls = agent.calls().len();
    let (code, out, err) = setup.run("save a --output one").await;
    assert_eq!((code, out.as_str(), agent.calls().len()), (3, "", calls), "{err}");
    let (code, out, err) = setup.run("save a --output one --replace --after hold").await;
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("consistent") && out.contains("device-0.state"), "{out}");
    assert_eq!(consistency(&setup.path("one")).await, Consistency::Consistent, "a hold that ended well");

    *agent.operation.lock().unwrap() =
        done(v1::OperationResult::Succeeded, v1::StateOutcome::Preserved, inconsistent);
    let (code, _, err) = setup.run("save a --output two").await;
    assert_eq!(code, 1, "{err}");
    assert!(err.contains("INCONSISTENT"), "{err}");
    assert_eq!(consistency(&setup.path("two")).await, Consistency::Inconsistent);

    *agent.operation.lock().unwrap() =
        done(v1::OperationResult::Failed, v1::StateOutcome::StateLost, inconsistent);
    let (code, _, err) = setup.run("save a --output three").await;
    assert_eq!(code, 4, "{err}");
}

#[tokio::test]
async fn a_refusal_lists_every_reason_and_leaves_no_folder() {
    let mut details = ErrorDetails::new();
    details.add_precondition_failure_violation("LEASED", "devices/a", "operations/7 has it");
    details.add_precondition_failure_violation("NO_P2P", "devices/b", "it cannot be one of several");
    let status = Status::with_error_details(Code::FailedPrecondition, "2 blockers", details);
    let setup = Setup::new(&Agent::with_script(vec![status])).await;
    let (code, out, err) = setup.run("save a b --output one").await;
    assert_eq!((code, out.as_str()), (3, ""));
    assert!(err.contains("LEASED devices/a") && err.contains("NO_P2P devices/b"), "{err}");
    assert!(!setup.path("one").exists());
    let (code, out, _) = setup.run("save a --output one --dry-run").await;
    assert_eq!(code, 0);
    assert!(out.contains("nothing is in the way"), "{out}");
}

#[tokio::test]
async fn an_agent_that_is_not_there_or_says_no_is_5() {
    let setup = Setup::new(&Agent::default()).await;
    let (code, out, err) = setup.run("operations list").await;
    assert_eq!((code, out.as_str()), (5, ""), "{err}");
    assert!(err.contains("PERMISSION_DENIED"), "{err}");
    let (code, _, err) = setup.run("devices list --endpoint https://localhost:1").await;
    assert_eq!(code, 5);
    assert!(err.contains("refuses the connection"), "{err}");
    let other = Ca::new("other").client();
    std::fs::write(setup.path("cert"), other.certificate).unwrap();
    std::fs::write(setup.path("key"), other.key).unwrap();
    let (code, _, err) = setup.run("devices list").await;
    assert_eq!(code, 5);
    assert!(err.contains("does not know the CA"), "{err}");
    let (code, _, err) = setup.run("devices list --key nowhere").await;
    assert_eq!(code, 2);
    assert!(err.contains("nowhere"), "{err}");
}

/// Interrupts it once it has said that it has begun. Its exit code, and all that it said.
pub(crate) async fn interrupted(setup: &Setup, line: &str, begun: &'static str) -> (Option<i32>, String) {
    let mut command = setup.command(line);
    let interrupted = tokio::task::spawn_blocking(move || {
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let mut said = String::new();
        stderr.read_line(&mut said).unwrap();
        assert!(said.starts_with(begun), "{said}");
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
        stderr.read_to_string(&mut said).unwrap();
        (child.wait().unwrap().code(), said)
    });
    interrupted.await.unwrap()
}

#[tokio::test]
async fn ctrl_c_cancels_the_operation_and_tells_what_became_of_it() {
    for line in ["save a --output one", "save a --store local"] {
        let agent = Agent::default();
        agent.operation.lock().unwrap().name = "operations/1".to_owned();
        let setup = Setup::new(&agent).await;
        let (code, said) = interrupted(&setup, line, "saving as operations/1").await;
        assert_eq!(code, Some(130), "{said}");
        assert!(said.contains("was cancelled; the devices keep their state"), "{said}");
        // Whole or not at all, whichever came first.
        if setup.path("one").exists() {
            assert_eq!(consistency(&setup.path("one")).await, Consistency::Inconsistent);
        }
    }
}
