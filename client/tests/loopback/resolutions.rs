//! `vfioctl operations resolve`: what is shown, what is asked, and what is sent.

use serde_json::Value;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};
use vfio_checkpoint_proto::v1;

use crate::server::Agent;
use crate::setup::Setup;

const MAY_RUN: &str = "the destination may run the devices";
const MAY_BE_LAST: &str = "what is here may be the last copy";

fn migration() -> v1::Operation {
    v1::Operation {
        name: "operations/1".to_owned(),
        kind: v1::OperationKind::Migration.into(),
        phase: v1::OperationPhase::Committing.into(),
        devices: vec![v1::OperationDevice { device: "devices/a".to_owned(), ..Default::default() }],
        handover: Some(v1::Handover {
            peer: "https://node2:7443".to_owned(),
            in_doubt: true,
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// A migration in doubt whose destination does not answer.
async fn silent() -> (Agent, Setup) {
    let agent = Agent::default();
    *agent.moves.evidence.lock().unwrap() = v1::ResolveResponse {
        operation: Some(migration()),
        destination_error: "10.0.0.2:7443 refuses the connection".to_owned(),
        ..Default::default()
    };
    *agent.moves.without_statement.lock().unwrap() = [MAY_RUN, MAY_BE_LAST];
    let setup = Setup::new(&agent).await;
    (agent, setup)
}

fn sent(agent: &Agent) -> Vec<v1::ResolveRequest> {
    std::mem::take(&mut *agent.moves.resolves.lock().unwrap())
}

#[tokio::test]
async fn without_a_decision_both_sides_are_shown_and_nothing_is_done() {
    let (agent, setup) = silent().await;
    let (code, out, err) = setup.run("operations resolve 1").await;
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(out.contains("was not reached: 10.0.0.2:7443 refuses the connection"), "{out}");
    assert!(out.contains("--peer-is-fenced") && out.contains("--accept-loss"), "{out}");
    let asked = sent(&agent);
    let resolutions: Vec<v1::Resolution> = asked.iter().map(v1::ResolveRequest::resolution).collect();
    assert_eq!(resolutions, [v1::Resolution::ResumeHere, v1::Resolution::LetGo]);
    assert!(asked.iter().all(|one| {
        one.validate_only && !one.peer_is_fenced && !one.accept_loss && one.statement.is_empty()
    }));

    let (code, out, _) = setup.run("operations resolve 1 -o json").await;
    assert_eq!(code, 0);
    let known: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&known["decided"], &known["destination"]), (&Value::Null, &Value::Null));
    assert_eq!(known["decisions"][0]["needs_statement"], true);

    // One that the destination answers for takes no statement.
    agent.moves.evidence.lock().unwrap().destination = Some(v1::HandoverRecord {
        operation: "operations/7".to_owned(),
        step: v1::HandoverStep::Over.into(),
        verdict: v1::HandoverVerdict::Refused.into(),
        ..Default::default()
    });
    *agent.moves.without_statement.lock().unwrap() = ["", MAY_BE_LAST];
    let (_, out, _) = setup.run("operations resolve 1 -o json").await;
    let known: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(known["destination"]["verdict"], "REFUSED");
    assert_eq!(known["decisions"][0]["options"], "--resume-here");
    assert_eq!(known["decisions"][1]["needs_statement"], true);
}

#[tokio::test]
async fn without_evidence_a_decision_is_refused_before_anybody_is_asked() {
    let (agent, setup) = silent().await;
    for (option, why) in [("--resume-here", MAY_RUN), ("--let-go", MAY_BE_LAST)] {
        let (code, out, err) = setup.run(&format!("operations resolve 1 {option} --yes")).await;
        assert_eq!(code, 3, "{err}");
        assert!(out.contains("was not reached"), "{out}");
        assert!(err.contains(why) && err.contains("is as it was"), "{err}");
        let asked = sent(&agent);
        assert!(asked.len() == 1 && asked[0].validate_only, "{asked:?}");
    }
    let (_, _, err) = setup.run("operations resolve 1 --let-go --yes -o json").await;
    let error: Value = serde_json::from_str(&err).unwrap();
    assert_eq!(
        (&error["error"]["reason"], &error["error"]["exit_code"]),
        (&"UNRESOLVABLE".into(), &3.into())
    );
}

#[tokio::test]
async fn a_decision_is_asked_for_and_then_sent_with_its_statement() {
    let (agent, setup) = silent().await;
    // Nobody can be asked here, so it takes --yes; what would have been asked is told.
    let line = "operations resolve 1 --resume-here --peer-is-fenced --statement power-is-off";
    let (code, out, err) = setup.run(line).await;
    assert_eq!((code, out.as_str()), (2, ""));
    assert!(err.contains("run the devices here again?") && err.contains("--yes"), "{err}");
    assert!(err.contains("was not reached") && err.contains("fence its node first"), "{err}");
    assert!(sent(&agent).iter().all(|one| one.validate_only));

    let (code, out, err) = setup.run(&format!("{line} --yes")).await;
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(out.contains("are being run again") && out.contains("vfioctl operations watch 1"), "{out}");
    let asked = sent(&agent);
    assert_eq!(asked.iter().map(|one| one.validate_only).collect::<Vec<_>>(), [true, false]);
    assert!(asked[1].peer_is_fenced && !asked[1].accept_loss);
    assert_eq!(
        (asked[1].resolution(), asked[1].statement.as_str()),
        (v1::Resolution::ResumeHere, "power-is-off")
    );

    let line = "operations resolve 1 --let-go --accept-loss --statement test-rig -y -o json";
    let (code, out, err) = setup.run(line).await;
    assert_eq!((code, err.as_str()), (0, ""));
    let known: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&known["decided"], &known["operation"]["name"]), (&"LET_GO".into(), &"operations/1".into()));
    assert!(sent(&agent)[1].accept_loss);
}

#[tokio::test]
async fn what_the_agent_says_in_the_last_moment_counts() {
    let (agent, setup) = silent().await;
    let line = "operations resolve 1 --resume-here --peer-is-fenced --statement power-is-off --yes";
    let mut details = ErrorDetails::new();
    details.set_error_info("NOT_IN_DOUBT", "vfio.checkpoint.v1", [] as [(String, String); 0]);
    let status = Status::with_error_details(Code::FailedPrecondition, "it has ended", details);
    agent.moves.refuse("Resolve", status);
    let (code, out, err) = setup.run(line).await;
    assert_eq!((code, out.as_str()), (3, ""));
    assert!(err.contains("NOT_IN_DOUBT") && err.contains("vfioctl operations get"), "{err}");
}

#[tokio::test]
async fn half_a_decision_is_no_decision() {
    let (agent, setup) = silent().await;
    for line in [
        "--yes",
        "--statement why",
        "--resume-here --let-go",
        "--resume-here --peer-is-fenced",
        "--let-go --accept-loss",
        "--peer-is-fenced --statement why",
        "--let-go --peer-is-fenced --statement why",
        "--resume-here --accept-loss --statement why",
    ] {
        let (code, out, err) = setup.run(&format!("operations resolve 1 {line}")).await;
        assert_eq!((code, out.as_str()), (2, ""), "{line}: {err}");
    }
    assert!(sent(&agent).is_empty());
}
