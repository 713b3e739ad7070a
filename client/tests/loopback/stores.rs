//! `vfioctl` and a store of the agent.

use serde_json::Value;
use vfio_checkpoint_proto::v1;

use crate::calls::client;
use crate::server::Agent;
use crate::setup::{Setup, done};
use crate::shelf::{checkpoint, name};

fn succeeded(checkpoint: &str) -> v1::Operation {
    let mut operation = done(
        v1::OperationResult::Succeeded,
        v1::StateOutcome::Preserved,
        v1::CheckpointConsistency::Consistent,
    );
    operation.moved_bytes = 5 << 20;
    checkpoint.clone_into(&mut operation.checkpoint);
    operation
}

#[tokio::test]
async fn a_save_says_what_it_is_called_and_what_it_added() {
    let agent = Agent::default();
    let setup = Setup::new(&agent).await;
    *agent.operation.lock().unwrap() = succeeded(&name("1"));
    agent.shelf.checkpoints.lock().unwrap().push(checkpoint("1"));
    let (code, out, err) = setup.run("save a --store local --owner-pod ops/web-0").await;
    assert_eq!(code, 0, "{err}");
    insta::assert_snapshot!(out);
    assert_eq!(err, "saving as operations/1\n");
    let request = agent.calls()[0].request.clone();
    assert_eq!((request.store.as_str(), request.owner_pod.as_str()), ("stores/local", "ops/web-0"));
    assert!(!request.request_id.is_empty());

    // Also where the checkpoint cannot be read back.
    agent.shelf.checkpoints.lock().unwrap().clear();
    let (code, out, err) = setup.run("save a --store local -o json").await;
    assert_eq!(code, 0, "{err}");
    let summary: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(summary["checkpoint"], name("1"));
    assert_eq!(summary["added"], Value::Null);
    assert!(err.contains("what it added is not known"), "{err}");
}

#[tokio::test]
async fn a_save_that_is_not_waited_for_is_left_alone() {
    let agent = Agent::default();
    agent.operation.lock().unwrap().name = "operations/1".to_owned();
    let setup = Setup::new(&agent).await;
    let (code, out, err) = setup.run("save a --store local --no-wait -o yaml").await;
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(out.starts_with("name: operations/1\n"), "{out}");
    let (code, out, err) = setup.run("save a --store local --wait-timeout 50ms").await;
    assert_eq!(code, 6, "{err}");
    assert!(out.contains("operations/1"), "as it is now: {out}");
    assert!(err.contains("vfioctl operations watch 1"), "{err}");
    assert!(!agent.operation.lock().unwrap().done, "it was cancelled");
}

#[tokio::test]
async fn a_restore_names_its_checkpoint_and_what_it_allows() {
    let agent = Agent::default();
    let setup = Setup::new(&agent).await;
    *agent.operation.lock().unwrap() = succeeded("");
    let (code, out, err) = setup.run("restore a --checkpoint local/1").await;
    assert_eq!(code, 0, "{err}");
    assert_eq!(out, "restored  5.00 MiB\ndevices   devices/a\n");
    let line = "restore a --checkpoint local/1 --allow-fork --allow-inconsistent --hold --dry-run";
    let (code, out, err) = setup.run(line).await;
    assert_eq!((code, out.as_str()), (0, "nothing is in the way\n"), "{err}");
    let restores = agent.shelf.restores.lock().unwrap().clone();
    assert!(restores.iter().all(|request| request.checkpoint == name("1") && request.manifest.is_none()));
    assert!(!restores[0].allow_fork && !restores[0].allow_inconsistent && !restores[0].validate_only);
    assert!(restores[1].allow_fork && restores[1].allow_inconsistent && restores[1].validate_only);
    assert_eq!(restores[1].after(), v1::AfterRestore::Hold);
}

#[tokio::test]
async fn checkpoints_are_listed_shown_and_deleted() {
    let agent = Agent::default();
    let setup = Setup::new(&agent).await;
    *agent.shelf.checkpoints.lock().unwrap() = ["3", "2", "1"].map(checkpoint).to_vec();
    let (code, out, err) = setup.run("checkpoints list -o json").await;
    assert_eq!(code, 0, "{err}");
    let listed: Value = serde_json::from_str(&out).unwrap();
    let names: Vec<&str> =
        listed.as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap()).collect();
    assert_eq!(names, [name("3"), name("2"), name("1")], "all pages, in their order");
    setup.run("checkpoints list --store other").await;
    let parents = agent.shelf.parents.lock().unwrap().clone();
    assert_eq!((parents[0].as_str(), parents.last().unwrap().as_str()), ("", "stores/other"));

    let (code, out, _) = setup.run("checkpoints get local/2").await;
    assert_eq!(code, 0);
    assert!(out.contains("local/2") && out.contains("devices/a"), "{out}");
    let (code, out, err) = setup.run("checkpoints get local/9").await;
    assert_eq!((code, out.as_str()), (3, ""));
    assert!(err.contains("NOT_FOUND"), "{err}");

    let count = || agent.shelf.checkpoints.lock().unwrap().len();
    let (code, out, err) = setup.run("checkpoints delete local/2").await;
    assert_eq!((code, out.as_str(), count()), (2, "", 3), "{err}");
    assert!(err.contains("--yes"), "{err}");
    let (code, out, _) = setup.run("checkpoints delete local/2 --dry-run").await;
    assert_eq!((code, count()), (0, 3));
    assert!(out.starts_with("this would be deleted:\n"), "{out}");
    let (code, out, err) = setup.run("checkpoints delete local/2 --yes").await;
    assert_eq!((code, out.as_str(), count()), (0, "local/2 is deleted\n", 2), "{err}");
}

#[tokio::test]
async fn a_verification_ends_with_what_it_found() {
    let agent = Agent::default();
    let setup = Setup::new(&agent).await;
    agent.shelf.checkpoints.lock().unwrap().push(checkpoint("1"));
    let step = |verified_bytes, done, problems: &[&str]| v1::VerifyCheckpointResponse {
        verified_bytes,
        total_bytes: 5 << 20,
        done,
        problems: problems.iter().map(|&problem| problem.to_owned()).collect(),
    };
    *agent.shelf.steps.lock().unwrap() = vec![step(1 << 20, false, &[]), step(5 << 20, true, &[])];
    let (code, out, err) = setup.run("checkpoints verify local/1").await;
    assert_eq!((code, err.as_str()), (0, ""));
    assert_eq!(out, "local/1 is sound: 5.00 MiB were read, and are what was sealed\n");
    *agent.shelf.steps.lock().unwrap() = vec![step(5 << 20, true, &["state 0: a chunk is missing"])];
    let (code, out, err) = setup.run("checkpoints verify local/1 -o json").await;
    assert_eq!((code, err.as_str()), (1, ""));
    let found: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(found["is_sound"], false);
    assert_eq!(found["problems"][0], "state 0: a chunk is missing");
    // An agent that dies in the middle has found nothing.
    *agent.shelf.steps.lock().unwrap() = vec![step(1 << 20, false, &[])];
    let (code, out, err) = setup.run("checkpoints verify local/1").await;
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(err.contains("ended before it said"), "{err}");
}

#[tokio::test]
async fn an_agent_tells_its_health_and_its_clock() {
    let agent = Agent::default();
    let before = std::time::SystemTime::now();
    let health = client(&agent).await.health().await.unwrap();
    assert_eq!(health.serving, vfio_checkpoint_client::call::Serving::Yes);
    let second = std::time::Duration::from_secs(1);
    let time = health.agent_time.unwrap();
    assert!(time + second >= before && time <= std::time::SystemTime::now() + second, "{time:?}");
}
