//! `vfioctl migrate` between two agents on loopback: what each is asked, what each may refuse, and what a person is told.

use std::io::{BufRead, BufReader, Read};
use std::process::Stdio;

use serde_json::Value;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};
use vfio_checkpoint_proto::v1;

use crate::commands::interrupted;
use crate::moves::{ITS_KEY, KEY, TICKET};
use crate::server::Agent;
use crate::setup::{Setup, done};

const UUID: &str = "1b4e28ba-2fa1-41d2-883f-0016d3cca427";

fn logical() -> v1::LogicalDevice {
    v1::LogicalDevice { id: "ab".repeat(16), epoch: 3 }
}

fn handover() -> v1::Handover {
    v1::Handover {
        peer: "https://node2:7443".to_owned(),
        peer_operation: "operations/7".to_owned(),
        stop_time: Some(prost_types::Timestamp { seconds: 1_800_000_000, nanos: 0 }),
        ..Default::default()
    }
}

fn on_the_way(phase: v1::OperationPhase, handover: v1::Handover) -> v1::Operation {
    v1::Operation {
        name: "operations/1".to_owned(),
        kind: v1::OperationKind::Migration.into(),
        phase: phase.into(),
        handover: Some(handover),
        ..Default::default()
    }
}

fn moved() -> v1::Operation {
    let consistency = v1::CheckpointConsistency::Unspecified;
    let mut operation = done(v1::OperationResult::Succeeded, v1::StateOutcome::Moved, consistency);
    operation.moved_bytes = 5 << 20;
    operation.devices[0].pre_copy_bytes = 4 << 20;
    operation.downtime = Some(prost_types::Duration { seconds: 0, nanos: 12_300_000 });
    operation.predicted_downtime = Some(prost_types::Duration { seconds: 0, nanos: 11_000_000 });
    let verdict = v1::HandoverVerdict::Committed.into();
    operation.handover = Some(v1::Handover { verdict, resent_bytes: 1 << 20, reconnects: 1, ..handover() });
    operation
}

/// A source with one device, a destination, and the destination's endpoint.
async fn two() -> (Setup, Agent, Agent, String) {
    let (source, destination) = (Agent::default(), Agent::default());
    *source.devices.logical.lock().unwrap() = Some(logical());
    *source.operation.lock().unwrap() = moved();
    let setup = Setup::new(&source).await;
    let endpoint = setup.beside(&destination).await;
    (setup, source, destination, endpoint)
}

fn refusal(code: Code, reason: &str) -> Status {
    let mut details = ErrorDetails::new();
    details.set_error_info(reason, "vfio.checkpoint.v1", [] as [(String, String); 0]);
    Status::with_error_details(code, "it is not to be", details)
}

#[tokio::test]
async fn a_migration_asks_the_destination_for_a_ticket_and_the_source_to_move() {
    let (setup, source, destination, endpoint) = two().await;
    let line = format!(
        "migrate a --to {endpoint} --onto x --pre-copy required --downtime-limit 300ms --on-no-convergence abort \
         --memory dirty-tracking --owner-pod ops/web-0 --require-ready"
    );
    let (code, out, err) = setup.run(&line).await;
    assert_eq!(code, 0, "{err}");
    insta::assert_snapshot!(out.replace(&endpoint, "https://node2:7443"));
    assert_eq!(err, format!("migrating as operations/1 to {endpoint}\n"));

    let admits = destination.moves.admits.lock().unwrap().clone();
    assert_eq!(admits.len(), 1);
    assert_eq!(
        (&admits[0].logical_devices[..], &admits[0].source_key_sha256[..]),
        (&[logical()][..], &KEY[..])
    );
    assert_eq!((admits[0].devices[0].as_str(), admits[0].require_ready), ("devices/x", true));
    assert_eq!(admits[0].owner_pod, "ops/web-0");
    assert!(
        source.moves.admits.lock().unwrap().is_empty()
            && destination.moves.migrations.lock().unwrap().is_empty()
    );

    let migrations = source.moves.migrations.lock().unwrap().clone();
    assert_eq!(migrations.len(), 1);
    let asked = &migrations[0];
    assert_eq!((&asked.ticket[..], asked.devices[0].as_str()), (&TICKET[..], "devices/a"));
    let target = v1::MigrationTarget {
        endpoint,
        spiffe_id: String::new(),
        devices: vec!["devices/x".to_owned()],
        key_sha256: ITS_KEY.to_vec().into(),
    };
    assert_eq!(asked.target, Some(target));
    assert_eq!((asked.pre_copy(), asked.cutover()), (v1::PreCopyMode::Required, v1::CutoverMode::Auto));
    assert_eq!((asked.commit(), asked.no_convergence()), (v1::CommitMode::Auto, v1::NoConvergence::Abort));
    assert_eq!(asked.memory_capture(), v1::MemoryCapture::DirtyTracking);
    assert_eq!(asked.downtime_limit, Some(prost_types::Duration { seconds: 0, nanos: 300_000_000 }));
    assert_eq!(
        (asked.owner_pod.as_str(), asked.request_id.len(), asked.validate_only),
        ("ops/web-0", 36, false)
    );
}

#[tokio::test]
async fn the_limits_of_a_migration_are_the_callers() {
    let (setup, source, _, endpoint) = two().await;
    let limits =
        "--cutover manual --cutover-timeout 2m --pre-copy-budget 30s --max-bytes 16MiB --allow-unknown-size";
    let (code, _, err) = setup.run(&format!("migrate a --to {endpoint} --dry-run {limits}")).await;
    assert_eq!(code, 0, "{err}");
    let asked = source.moves.migrations.lock().unwrap().pop().unwrap();
    let seconds = |seconds| Some(prost_types::Duration { seconds, nanos: 0 });
    assert_eq!((asked.cutover_timeout, asked.pre_copy_budget), (seconds(120), seconds(30)));
    assert_eq!((asked.max_bytes, asked.allow_unknown_size), (16 << 20, true));
}

#[tokio::test]
async fn a_destination_has_a_name_in_the_contexts_file() {
    let (setup, source, _destination, endpoint) = two().await;
    let id = crate::pki::AGENT_ID;
    let contexts = format!("[contexts.two]\nendpoint = \"{endpoint}\"\nserver_spiffe_id = \"{id}\"\n");
    std::fs::write(setup.path("contexts"), contexts).unwrap();
    let mut command = setup.command("migrate a --to two -o json");
    command.env("VFIOCTL_CONFIG", setup.path("contexts"));
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{err}");
    let summary: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&summary["outcome"], &summary["destination"]), (&"MOVED".into(), &endpoint.clone().into()));
    assert_eq!(
        (&summary["handover"]["verdict"], &summary["stop_bytes"]),
        (&"COMMITTED".into(), &(1 << 20).into())
    );
    assert_eq!(summary["devices"][0]["to"], "devices/a", "the same names if nothing is said");
    let target = source.moves.migrations.lock().unwrap()[0].target.clone().unwrap();
    assert_eq!((target.endpoint, target.spiffe_id.as_str()), (endpoint, id));
    let (code, _, err) = setup.run("migrate a --to three").await;
    assert_eq!(code, 2, "{err}");
}

#[tokio::test]
async fn what_is_refused_says_by_whom_and_touches_nothing() {
    let (setup, source, destination, endpoint) = two().await;
    let line = format!("migrate a --to {endpoint}");
    let mut details = ErrorDetails::new();
    details.add_precondition_failure_violation("LEASED", "devices/a", "operations/7 has it");
    details.set_error_info("BLOCKED", "vfio.checkpoint.v1", [] as [(String, String); 0]);
    destination
        .moves
        .refuse("Admit", Status::with_error_details(Code::FailedPrecondition, "blocked", details));
    let (code, out, err) = setup.run(&line).await;
    assert_eq!((code, out.as_str()), (3, ""));
    assert!(
        err.contains("nothing was touched") && err.contains(&endpoint) && err.contains("LEASED devices/a"),
        "{err}"
    );
    assert!(source.moves.migrations.lock().unwrap().is_empty());

    destination.moves.refuse("Admit", refusal(Code::PermissionDenied, "ROLE_REQUIRED"));
    let (code, _, err) = setup.run(&line).await;
    assert_eq!(code, 5, "{err}");

    let (code, out, err) = setup.run("migrate a --to https://localhost:1 -o json").await;
    assert_eq!((code, out.as_str()), (5, ""));
    let error: Value = serde_json::from_str(&err).unwrap();
    assert_eq!(error["error"]["reason"], "CONNECTION_REFUSED");
    assert!(
        error["error"]["message"].as_str().unwrap().contains("the destination, https://localhost:1"),
        "{err}"
    );
    assert!(source.moves.migrations.lock().unwrap().is_empty());

    source.moves.refuse("Migrate", refusal(Code::FailedPrecondition, "TICKET_INVALID"));
    let (code, out, err) = setup.run(&line).await;
    assert_eq!((code, out.as_str()), (3, ""));
    assert!(err.contains("TICKET_INVALID") && err.contains("call `vfioctl migrate` again"), "{err}");

    *source.devices.logical.lock().unwrap() = None;
    let admits = destination.moves.admits.lock().unwrap().len();
    let (code, _, err) = setup.run(&line).await;
    assert_eq!(code, 3);
    assert!(err.contains("never opened") && err.contains("vfioctl devices get a"), "{err}");
    assert_eq!(destination.moves.admits.lock().unwrap().len(), admits);

    source.moves.refuse("GetAgent", Status::unimplemented("no such service"));
    let (code, _, err) = setup.run(&line).await;
    assert_eq!(code, 3);
    assert!(err.contains("knows no migrations"), "{err}");
    for wrong in [
        "--onto x y",
        "--commit-timeout 1m",
        "--cutover-timeout 1m",
        "--pre-copy never --pre-copy-budget 1m",
        "--max-bytes much",
        "--to-cert c",
        "--to-server-spiffe-id node2",
    ] {
        let (code, _, err) = setup.run(&format!("{line} {wrong}")).await;
        assert_eq!(code, 2, "{wrong}: {err}");
    }
}

#[tokio::test]
async fn a_dry_run_tells_both_sides_and_asks_for_no_ticket() {
    let (setup, source, destination, endpoint) = two().await;
    let blocker = |side: v1::MigrationSide, reason: v1::BlockerReason| v1::MigrationBlocker {
        side: side.into(),
        blocker: Some(v1::Blocker { reason: reason.into(), message: "no".to_owned(), ..Default::default() }),
    };
    let line = format!("migrate a --to {endpoint} --dry-run --request-id {UUID}");
    let (code, out, err) = setup.run(&line).await;
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(out.starts_with("nothing is in the way\n"), "{out}");
    source.moves.dry_run.lock().unwrap().blockers = vec![
        blocker(v1::MigrationSide::Source, v1::BlockerReason::NoP2p),
        blocker(v1::MigrationSide::Destination, v1::BlockerReason::FingerprintMismatch),
    ];
    let (code, out, err) = setup.run(&line).await;
    assert_eq!((code, err.as_str()), (3, ""));
    assert!(out.contains("source       NO_P2P: no\n  destination  FINGERPRINT_MISMATCH: no\n"), "{out}");

    // A destination that is not there is in the way, and no failure.
    source.moves.dry_run.lock().unwrap().blockers =
        vec![blocker(v1::MigrationSide::Source, v1::BlockerReason::DestinationUnreachable)];
    let (code, out, err) = setup.run("migrate a --to https://localhost:1 --dry-run -o json").await;
    assert_eq!((code, err.as_str()), (3, ""));
    let found: Value = serde_json::from_str(&out).unwrap();
    let sides: Vec<&str> =
        found["blockers"].as_array().unwrap().iter().map(|one| one["side"].as_str().unwrap()).collect();
    assert_eq!(sides, ["SOURCE", "CALLER"]);
    assert!(found["blockers"][1]["message"].as_str().unwrap().contains("refuses the connection"), "{out}");

    assert!(destination.moves.admits.lock().unwrap().is_empty());
    let asked = source.moves.migrations.lock().unwrap().clone();
    assert!(
        asked
            .iter()
            .all(|asked| asked.validate_only && asked.ticket.is_empty() && asked.request_id.is_empty())
    );
}

#[tokio::test]
async fn who_commits_by_hand_is_told_when_and_how() {
    let (setup, source, destination, endpoint) = two().await;
    let prepared = v1::Handover {
        prepare_time: Some(prost_types::Timestamp { seconds: 1_800_000_001, nanos: 0 }),
        ..handover()
    };
    let mut waiting = on_the_way(v1::OperationPhase::Prepared, prepared);
    waiting.actions = vec![v1::OperationAction::Commit.into()];
    *source.course.lock().unwrap() =
        [on_the_way(v1::OperationPhase::Sealing, handover()), waiting.clone(), waiting].into();
    let line = format!("migrate a --to {endpoint} --commit manual --commit-timeout 1m --require-ready");
    let (code, _, err) = setup.run(&line).await;
    assert_eq!(code, 0, "{err}");
    assert!(err.contains(&format!("vfioctl --endpoint {endpoint} operations ready 7")), "{err}");
    assert!(err.contains("prepared since 2027-01-15T08:00:01.000Z"), "{err}");
    assert_eq!(err.matches("vfioctl operations commit 1").count(), 1, "{err}");
    let asked = source.moves.migrations.lock().unwrap()[0].clone();
    assert_eq!(asked.commit(), v1::CommitMode::Manual);
    assert_eq!(asked.commit_timeout, Some(prost_types::Duration { seconds: 60, nanos: 0 }));

    let (code, out, err) = setup.run("operations commit 1").await;
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(out.contains("operations/1"), "{out}");
    let (code, _, err) = setup.run(&format!("operations ready 7 --endpoint {endpoint}")).await;
    assert_eq!(code, 0, "{err}");
    assert_eq!(*source.moves.commits.lock().unwrap(), ["operations/1"]);
    assert_eq!(*destination.moves.readies.lock().unwrap(), ["operations/7"]);
    source.moves.refuse("Commit", refusal(Code::FailedPrecondition, "NOT_PREPARED"));
    let (code, _, err) = setup.run("operations commit 1 --wait").await;
    assert_eq!(code, 3);
    assert!(err.contains("vfioctl operations watch"), "{err}");
}

#[tokio::test]
async fn a_migration_that_is_not_waited_for_is_left_alone() {
    let (setup, source, _destination, endpoint) = two().await;
    *source.operation.lock().unwrap() = on_the_way(v1::OperationPhase::PreCopy, handover());
    let (code, out, err) = setup.run(&format!("migrate a --to {endpoint} --no-wait -o yaml")).await;
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(out.starts_with("name: operations/1\nkind: MIGRATION\n"), "{out}");
    let (code, _, err) = setup.run(&format!("migrate a --to {endpoint} --wait-timeout 50ms")).await;
    assert_eq!(code, 6, "{err}");
    assert!(!source.operation.lock().unwrap().done, "it was cancelled");
}

#[tokio::test]
async fn the_same_request_id_leads_to_the_same_migration() {
    let (setup, source, destination, endpoint) = two().await;
    let line = format!("migrate a --to {endpoint} --request-id {UUID}");
    *source.listed.lock().unwrap() = Some(Vec::new());
    let (code, _, err) = setup.run(&line).await;
    assert_eq!(code, 0, "{err}");
    assert_eq!(source.moves.migrations.lock().unwrap()[0].request_id, UUID);

    let mut begun = moved();
    begun.kind = v1::OperationKind::Migration.into();
    begun.request_id = UUID.to_owned();
    *source.listed.lock().unwrap() = Some(vec![v1::Operation::default(), begun.clone()]);
    let (code, out, err) = setup.run(&line).await;
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("verdict     COMMITTED"), "{out}");
    let counts =
        || (source.moves.migrations.lock().unwrap().len(), destination.moves.admits.lock().unwrap().len());
    assert_eq!(counts(), (1, 1), "it was asked for again");

    begun.kind = v1::OperationKind::Save.into();
    *source.listed.lock().unwrap() = Some(vec![begun]);
    let (code, out, err) = setup.run(&line).await;
    assert_eq!((code, out.as_str(), counts()), (3, "", (1, 1)));
    assert!(err.contains("something else"), "{err}");
}

#[tokio::test]
async fn one_that_failed_says_why_and_what_became_of_the_devices() {
    let (setup, source, _destination, endpoint) = two().await;
    let mut failed = done(
        v1::OperationResult::Failed,
        v1::StateOutcome::Preserved,
        v1::CheckpointConsistency::Unspecified,
    );
    failed.failure = Some(v1::OperationFailure {
        reason: "HANDOVER_REFUSED".to_owned(),
        message: "devices/x did not leave RESUMING".to_owned(),
        device: String::new(),
    });
    *source.operation.lock().unwrap() = failed;
    let (code, out, err) = setup.run(&format!("migrate a --to {endpoint}")).await;
    assert_eq!(code, 1, "{err}");
    assert!(out.contains("operations/1"), "{out}");
    assert!(err.contains("the devices keep their state") && err.contains("HANDOVER_REFUSED"), "{err}");
}

#[tokio::test]
async fn a_doubt_is_loud_and_one_that_nothing_ends_is_not_waited_for() {
    let (setup, source, _destination, endpoint) = two().await;
    let line = format!("migrate a --to {endpoint}");
    let doubtful = v1::Handover {
        in_doubt: true,
        doubt: "10.0.0.2:7443 refuses the connection".to_owned(),
        ..handover()
    };
    let waiting = on_the_way(v1::OperationPhase::Committing, doubtful.clone());
    *source.course.lock().unwrap() = [waiting.clone(), waiting.clone()].into();
    let (code, _, err) = setup.run(&line).await;
    assert_eq!(code, 0, "{err}");
    assert_eq!(err.matches("IN DOUBT").count(), 1, "{err}");
    assert!(err.contains("vfioctl operations resolve 1") && err.contains("10.0.0.2:7443 refuses"), "{err}");

    *source.operation.lock().unwrap() = waiting.clone();
    let (code, out, err) = setup.run(&format!("{line} --wait-timeout 50ms -o json")).await;
    assert_eq!(code, 4, "{err}");
    let shown: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&shown["handover"]["in_doubt"], &shown["phase"]), (&true.into(), &"COMMITTING".into()));
    let error: Value = serde_json::from_str(err.lines().last().unwrap()).unwrap();
    assert_eq!(error["error"]["reason"], "IN_DOUBT");

    let verdict = v1::HandoverVerdict::Lost.into();
    let lost = v1::Handover { verdict, ..doubtful };
    *source.operation.lock().unwrap() = on_the_way(v1::OperationPhase::Committing, lost);
    for line in [line.as_str(), "operations watch 1"] {
        let (code, out, err) = setup.run(line).await;
        assert_eq!(code, 4, "{err}");
        assert!(out.contains("operations/1: IN DOUBT: https://node2:7443 says LOST"), "{out}");
        assert!(err.contains("nothing leads on by itself"), "{err}");
    }
    let (code, out, err) = setup.run("operations get 1 -o wide").await;
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(out.contains("PEER_OPERATION") && out.contains("vfioctl operations resolve 1"), "{out}");
}

#[tokio::test]
async fn ctrl_c_cancels_a_migration() {
    let (setup, source, _destination, endpoint) = two().await;
    *source.operation.lock().unwrap() = on_the_way(v1::OperationPhase::PreCopy, handover());
    let (code, said) =
        interrupted(&setup, &format!("migrate a --to {endpoint}"), "migrating as operations/1").await;
    assert_eq!(code, Some(130), "{said}");
    assert!(said.contains("was cancelled; the devices keep their state"), "{said}");
}

#[tokio::test]
async fn ctrl_c_past_the_point_of_no_return_cancels_nothing() {
    let (setup, source, _destination, endpoint) = two().await;
    *source.operation.lock().unwrap() = on_the_way(v1::OperationPhase::Committing, handover());
    source.moves.refuse("CancelOperation", refusal(Code::FailedPrecondition, "PAST_NO_RETURN"));
    let mut command = setup.command(&format!("migrate a --to {endpoint}"));
    let ended = tokio::task::spawn_blocking(move || {
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let pid = rustix::process::Pid::from_child(&child);
        let mut said = String::new();
        for until in ["migrating as", "PAST_NO_RETURN"] {
            while !said.lines().last().unwrap_or_default().contains(until) {
                assert_ne!(stderr.read_line(&mut said).unwrap(), 0, "{said}");
            }
            rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
        }
        stderr.read_to_string(&mut said).unwrap();
        (child.wait().unwrap().code(), said)
    });
    let (code, said) = ended.await.unwrap();
    assert_eq!(code, Some(130), "{said}");
    assert!(said.contains("is not over yet") && said.contains("vfioctl operations get 1"), "{said}");
    assert!(!source.operation.lock().unwrap().done);
}
