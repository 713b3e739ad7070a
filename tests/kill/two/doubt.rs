//! A destination that was told to run the devices, and does not come back: the source is in doubt.
//!
//! ```text
//!   destination: RUNNING on record --killed
//!   source: COMMITTING on record, devices in STOP: in doubt, also after it was killed
//!     |-- the destination comes back: its answer ends it
//!     |-- Resolve RESUME_HERE: refused, but with peer_is_fenced and a statement   -> runs here, under an epoch of its own
//!     '-- Resolve LET_GO: refused, but with accept_loss and a statement           -> reset here, and the destination is
//!                                                                                    told once more to run what it has
//!
//!   source: the decision is being written --stopped--> the answer comes in --released--> what was decided is done
//!   source: its own device does not answer --Resolve--> answered all the same, and soon
//!   source: whoever has called Resolve hangs up, and then the destination is not reached -> nothing is decided
//! ```

use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;
use tokio::task::JoinHandle;
use tonic::Code;
use vfio_checkpoint_client::call::{CallError, Client};
use vfio_checkpoint_proto::v1;

use super::relay::Way;
use super::settle::After;
use super::{Move, Pair, becomes};
use crate::figure;
use crate::job::done;
use crate::lab::PATIENCE;
use crate::world::{Content, MEMORY};

impl Pair {
    /// Waits until the source of a migration is in doubt, and says so in these words.
    pub(crate) async fn in_doubt(&self, job: &Move, words: &str) -> v1::Operation {
        let client = self.nodes[self.home].client().await;
        let name = self.recorded(&client, job).await.expect("it was begun").name;
        let doubts = becomes(&client, &name, |operation| {
            operation.handover.as_ref().is_some_and(|known| known.in_doubt && known.doubt.contains(words))
        });
        let doubts = tokio::time::timeout(PATIENCE, doubts).await;
        assert!(doubts.is_ok_and(|doubts| doubts.unwrap()), "it is not in doubt:\n{}", self.log());
        self.recorded(&client, job).await.unwrap()
    }

    /// Kills the destination of a migration once it has on record that it runs the devices, and does not start it again.
    async fn left_in_doubt(&mut self, job: &Move) -> v1::Operation {
        let away = self.away();
        self.nodes[away].arm("after commit of RUNNING", 1).await;
        let driving = self.driven(job).await;
        self.nodes[away].stopped("after commit of RUNNING").await;
        self.kill(away);
        driving.await.unwrap();
        self.in_doubt(job, "cannot be asked").await
    }

    /// Asserts that an operation is in doubt, and that its devices stand still in its hands.
    async fn waits_in_doubt(&self, operation: &v1::Operation) {
        assert!(!operation.done && operation.phase() == v1::OperationPhase::Committing, "{operation:?}");
        assert!(operation.deadline.is_none(), "{operation:?}");
        assert!(operation.actions().any(|action| action == v1::OperationAction::Resolve), "{operation:?}");
        let client = self.nodes[self.home].client().await;
        for device in self.nodes[self.home].devices(&client).await {
            assert_eq!(
                (device.state(), &device.operation),
                (v1::MigrationState::Stop, &operation.name),
                "{device:?}"
            );
        }
        let cancel = v1::CancelOperationRequest { name: operation.name.clone() };
        refused(client.cancel_operation(cancel).await.map(drop));
    }
}

fn refused(answer: Result<(), CallError>) {
    let refusal = answer.unwrap_err();
    let refusal = refusal.refusal().unwrap();
    assert_eq!(refusal.code, Code::FailedPrecondition, "{refusal}");
}

fn resolve(operation: &v1::Operation, resolution: v1::Resolution) -> v1::ResolveRequest {
    v1::ResolveRequest {
        operation: operation.name.clone(),
        resolution: resolution.into(),
        ..Default::default()
    }
}

/// Asserts that nothing is decided about a migration in doubt without a word that somebody answers for.
async fn nobody_decides(client: &Client, operation: &v1::Operation) {
    for resolution in [v1::Resolution::ResumeHere, v1::Resolution::LetGo] {
        let request = resolve(operation, resolution);
        let looked = v1::ResolveRequest { validate_only: true, ..request.clone() };
        let answer = client.resolve(looked).await.unwrap();
        assert!(answer.destination.is_none() && !answer.destination_error.is_empty(), "{answer:?}");
        assert!(!answer.refused.is_empty(), "{answer:?}");
        refused(client.resolve(request).await.map(drop));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_is_in_doubt_until_its_destination_is_back() {
    let mut pair = Pair::new(2, true).await;
    let job = Move::new(false);
    let operation = pair.left_in_doubt(&job).await;
    pair.waits_in_doubt(&operation).await;
    let (home, away) = (pair.home, pair.away());
    pair.kill(home);
    pair.start(home).await;
    let operation = pair.in_doubt(&job, "cannot be asked").await;
    pair.waits_in_doubt(&operation).await;
    nobody_decides(&pair.nodes[home].client().await, &operation).await;
    pair.start(away).await;
    pair.settle(&job, After::Moves).await;
    pair.moves(&Move::new(false)).await;
    figure("1 source in doubt, killed meanwhile: its destination came back, and answered");
}

/// What each device of the source was found to be, by an admin who only looks.
async fn found(client: &Client, operation: &v1::Operation) -> Vec<(v1::MigrationState, v1::SourceCopy)> {
    let request = resolve(operation, v1::Resolution::ResumeHere);
    let looked = client.resolve(v1::ResolveRequest { validate_only: true, ..request }).await.unwrap();
    let told: Vec<&str> = looked.source_devices.iter().map(|found| found.device.as_str()).collect();
    let set: Vec<&str> = operation.devices.iter().map(|device| device.device.as_str()).collect();
    assert_eq!(told, set);
    looked.source_devices.iter().map(|found| (found.state(), found.copy())).collect()
}

/// Nobody kept the devices of the source: they were reset with its agent, and run as somebody new.
#[tokio::test(flavor = "multi_thread")]
async fn an_admin_is_shown_what_the_source_has_left() {
    let mut pair = Pair::new(2, false).await;
    pair.kept_since = None;
    let (home, away) = (pair.home, pair.away());
    let job = Move::new(false);
    pair.nodes[away].arm("restore: AwaitingReady", 1).await;
    let driving = pair.driven(&job).await;
    pair.nodes[away].stopped("restore: AwaitingReady").await;
    pair.kill(away);
    driving.await.unwrap();
    let operation = pair.in_doubt(&job, "cannot be asked").await;
    let stopped = (v1::MigrationState::Stop, v1::SourceCopy::Kept);
    assert_eq!(found(&pair.nodes[home].client().await, &operation).await, [stopped; 2]);

    pair.kill(home);
    pair.start(home).await;
    let operation = pair.in_doubt(&job, "cannot be asked").await;
    let blank = (v1::MigrationState::Running, v1::SourceCopy::Gone);
    assert_eq!(found(&pair.nodes[home].client().await, &operation).await, [blank; 2]);
    pair.start(away).await;
    pair.settle(&job, After::Lost).await;
    figure("1 source in doubt that was killed without a holder: an admin is shown that its copy is gone");
}

/// The node of the destination is gone for good: its agent, its holder and its devices.
#[tokio::test(flavor = "multi_thread")]
async fn a_source_whose_destination_is_fenced_resumes_under_an_epoch_of_its_own() {
    let mut pair = Pair::new(1, true).await;
    let job = Move::new(false);
    let before = pair.lives.clone();
    let operation = pair.left_in_doubt(&job).await;
    let (home, away) = (pair.home, pair.away());
    pair.nodes[away].kill_holder();
    pair.nodes[away].kill_device(0);
    let client = pair.nodes[home].client().await;
    nobody_decides(&client, &operation).await;
    let without_words =
        v1::ResolveRequest { peer_is_fenced: true, ..resolve(&operation, v1::Resolution::ResumeHere) };
    assert!(client.resolve(without_words.clone()).await.is_err(), "who fences says why");
    let request = v1::ResolveRequest { statement: "its power is off".to_owned(), ..without_words };
    assert_eq!(client.resolve(request.clone()).await.unwrap().refused, "");
    let ended = done(&client, &operation.name).await.unwrap();
    assert_eq!(
        (ended.result(), ended.outcome()),
        (v1::OperationResult::Failed, v1::StateOutcome::Preserved),
        "{ended:?}"
    );
    assert_eq!(ended.failure.as_ref().unwrap().reason, "RESOLVED", "{ended:?}");
    let resolution = &ended.handover.as_ref().unwrap().resolution;
    assert!(resolution.contains("its power is off") && resolution.contains("admin/test"), "{ended:?}");
    refused(client.resolve(request).await.map(drop));
    let now = pair.living().await;
    assert_eq!(now[0].id, before[0].id);
    assert!(now[0].epoch > before[0].epoch + 1, "the destination may have run it under the next: {now:?}");
    pair.lives = now;
    assert_eq!(pair.nodes[home].contents(&client).await, [Content::Own]);

    // What comes back there has nothing of it, and says so.
    pair.nodes[away].start_device(0, &format!("sim:seed=1,{MEMORY}")).await;
    pair.nodes[away].start_holder().await;
    pair.start(away).await;
    let there = pair.nodes[away].client().await;
    let arrival = done(&there, &ended.handover.unwrap().peer_operation).await.unwrap();
    assert_eq!(arrival.handover.as_ref().unwrap().verdict(), v1::HandoverVerdict::Lost, "{arrival:?}");
    assert_eq!(pair.nodes[away].contents(&there).await, [Content::Fresh]);
    pair.watch.check(&pair.own, pair.kept_since);
    pair.moves(&Move::new(false)).await;
    figure("1 source in doubt whose destination was fenced: it runs on, and could move again");
}

/// The last copy is let go of on somebody's word; the destination has it, and comes back.
#[tokio::test(flavor = "multi_thread")]
async fn a_source_lets_go_on_the_word_of_whoever_accepts_the_loss() {
    let mut pair = Pair::new(1, true).await;
    // In a device that is being loaded it cannot be seen.
    pair.kept_since = None;
    let job = Move::new(false);
    let before = pair.lives.clone();
    let operation = pair.left_in_doubt(&job).await;
    let (home, away) = (pair.home, pair.away());
    let client = pair.nodes[home].client().await;
    nobody_decides(&client, &operation).await;
    let request = v1::ResolveRequest {
        accept_loss: true,
        statement: "nobody needs it".to_owned(),
        ..resolve(&operation, v1::Resolution::LetGo)
    };
    assert_eq!(client.resolve(request).await.unwrap().refused, "");
    let ended = done(&client, &operation.name).await.unwrap();
    assert_eq!(
        (ended.result(), ended.outcome()),
        (v1::OperationResult::Failed, v1::StateOutcome::StateLost),
        "{ended:?}"
    );
    assert_eq!(pair.nodes[home].contents(&client).await, [Content::Fresh]);
    assert_ne!(pair.living().await[0].id, before[0].id, "whatever runs here is somebody new");

    pair.start(away).await;
    let there = pair.nodes[away].client().await;
    let arrival = done(&there, &ended.handover.unwrap().peer_operation).await.unwrap();
    assert_eq!(arrival.result(), v1::OperationResult::Succeeded, "{arrival:?}");
    assert_eq!(pair.nodes[away].contents(&there).await, [Content::Own]);
    pair.home = away;
    let now = pair.living().await;
    assert!(now[0].id == before[0].id && now[0].epoch > before[0].epoch, "{now:?}");
    pair.lives = now;
    pair.watch.check(&pair.own, pair.kept_since);
    pair.moves(&Move::new(false)).await;
    figure("1 source in doubt that let go: what its destination had runs there, alone");
}

/// `CommitHandover` got lost on the wire, and the destination waits for it. What it has is the last copy once the source was
/// let go of.
#[tokio::test(flavor = "multi_thread")]
async fn a_destination_runs_what_its_source_has_let_go_of_before_it_was_told() {
    let mut pair = Pair::new(1, true).await;
    // In a device that waits loaded it cannot be seen.
    pair.kept_since = None;
    let before = pair.lives.clone();
    let (home, away) = (pair.home, pair.away());
    let job = Move::new(false);
    pair.nodes[home].arm("after commit of COMMITTING", 1).await;
    let driving = pair.driven(&job).await;
    pair.nodes[home].stopped("after commit of COMMITTING").await;
    driving.await.unwrap();
    pair.relays[away].lead(Way::Nowhere);
    pair.relays[away].cut();
    pair.nodes[home].release();
    let operation = pair.in_doubt(&job, "cannot be asked").await;
    let client = pair.nodes[home].client().await;
    let request = v1::ResolveRequest {
        accept_loss: true,
        statement: "the node here is needed".to_owned(),
        ..resolve(&operation, v1::Resolution::LetGo)
    };
    assert_eq!(client.resolve(request).await.unwrap().refused, "");
    let ended = done(&client, &operation.name).await.unwrap();
    assert_eq!(
        (ended.failure.as_ref().unwrap().reason.as_str(), ended.outcome()),
        ("RESOLVED", v1::StateOutcome::StateLost),
        "{ended:?}"
    );
    assert_eq!(pair.nodes[home].contents(&client).await, [Content::Fresh]);
    let there = pair.nodes[away].client().await;
    let arrival = ended.handover.unwrap().peer_operation;
    let waits = v1::GetOperationRequest { name: arrival.clone() };
    let waits = there.get_operation(waits).await.unwrap().operation.unwrap();
    assert_eq!(waits.phase(), v1::OperationPhase::Prepared, "{waits:?}");

    pair.lead(away);
    let arrival = done(&there, &arrival).await.unwrap();
    assert_eq!(arrival.handover.as_ref().unwrap().verdict(), v1::HandoverVerdict::Committed, "{arrival:?}");
    assert_eq!(pair.nodes[away].contents(&there).await, [Content::Own]);
    pair.home = away;
    let now = pair.living().await;
    assert!(now[0].id == before[0].id && now[0].epoch > before[0].epoch, "{now:?}");
    pair.lives = now;
    pair.watch.check(&pair.own, pair.kept_since);
    pair.moves(&Move::new(false)).await;
    figure("1 source that let go of what its destination was not told to run: it was told then, and runs it");
}

impl Pair {
    /// Has an admin decide about a migration in doubt, and stops its source while that is being written.
    async fn being_decided(
        &mut self,
        request: v1::ResolveRequest,
    ) -> JoinHandle<Result<v1::ResolveResponse, CallError>> {
        let home = self.home;
        let client = self.nodes[home].client().await;
        self.nodes[home].arm("before commit of COMMITTING", 1).await;
        let deciding = tokio::spawn(async move { client.resolve(request).await });
        self.nodes[home].stopped("before commit of COMMITTING").await;
        deciding
    }

    /// Waits until the answer of the destination has come in at the source.
    async fn answered(&mut self) {
        let is_answered = |line: &str| (line == "at commit is answered").then_some(());
        self.nodes[self.home].agent().wait_for("that it is answered", is_answered).await;
    }
}

/// The destination answers COMMITTED and is fenced, while the decision that it is fenced is being put on record.
#[tokio::test(flavor = "multi_thread")]
async fn a_source_resumes_as_was_decided_although_it_is_answered_meanwhile() {
    let mut pair = Pair::new(1, true).await;
    // In the node that is fenced it is gone.
    pair.kept_since = None;
    let before = pair.lives.clone();
    let (home, away) = (pair.home, pair.away());
    let job = Move::new(false);
    pair.nodes[away].arm("after commit of RUNNING", 1).await;
    let driving = pair.driven(&job).await;
    pair.nodes[away].stopped("after commit of RUNNING").await;
    driving.await.unwrap();
    let operation = pair.in_doubt(&job, "has not answered yet").await;
    let deciding = pair
        .being_decided(v1::ResolveRequest {
            peer_is_fenced: true,
            statement: "its power goes off".to_owned(),
            ..resolve(&operation, v1::Resolution::ResumeHere)
        })
        .await;
    pair.nodes[away].release();
    pair.answered().await;
    pair.kill(away);
    pair.nodes[away].kill_holder();
    pair.nodes[away].kill_device(0);
    pair.nodes[home].release();
    assert_eq!(deciding.await.unwrap().unwrap().refused, "");
    let client = pair.nodes[home].client().await;
    let ended = done(&client, &operation.name).await.unwrap();
    assert_eq!(
        (ended.failure.as_ref().unwrap().reason.as_str(), ended.outcome()),
        ("RESOLVED", v1::StateOutcome::Preserved),
        "{ended:?}"
    );
    let now = pair.living().await;
    assert!(now[0].id == before[0].id && now[0].epoch > before[0].epoch + 1, "it ran there: {now:?}");
    assert_eq!(pair.nodes[home].contents(&client).await, [Content::Own]);
    figure(
        "1 source that was answered while it was decided that it resumes: it resumed, and its copy was the last",
    );
}

/// The destination answers REFUSED, while the decision that its source lets go is being put on record.
#[tokio::test(flavor = "multi_thread")]
async fn a_source_lets_go_as_was_decided_although_it_is_refused_meanwhile() {
    let mut pair = Pair::new(1, false).await;
    let (home, away) = (pair.home, pair.away());
    let job = Move::new(false);
    pair.nodes[away].arm("restore: AwaitingReady", 1).await;
    let driving = pair.driven(&job).await;
    pair.nodes[away].stopped("restore: AwaitingReady").await;
    pair.kill(away);
    driving.await.unwrap();
    let operation = pair.in_doubt(&job, "cannot be asked").await;
    let deciding = pair
        .being_decided(v1::ResolveRequest {
            accept_loss: true,
            statement: "nobody needs it".to_owned(),
            ..resolve(&operation, v1::Resolution::LetGo)
        })
        .await;
    pair.start(away).await;
    pair.answered().await;
    pair.nodes[home].release();
    assert_eq!(deciding.await.unwrap().unwrap().refused, "");
    let client = pair.nodes[home].client().await;
    let ended = done(&client, &operation.name).await.unwrap();
    assert_eq!(
        (ended.failure.as_ref().unwrap().reason.as_str(), ended.outcome()),
        ("RESOLVED", v1::StateOutcome::StateLost),
        "{ended:?}"
    );
    assert_eq!(pair.nodes[home].contents(&client).await, [Content::Fresh]);
    figure("1 source that was refused while it was decided that it lets go: it let go");
}

/// Who decides is answered well before a client gives up: a decision that is taken after that would be taken behind the back
/// of whoever has turned to something else by then.
const ANSWERED_WITHIN: Duration = Duration::from_secs(10);

/// The device of the source stands still, as one with a firmware that hangs does.
#[tokio::test(flavor = "multi_thread")]
async fn an_admin_is_answered_although_the_device_of_the_source_is_not_heard() {
    let mut pair = Pair::new(1, true).await;
    // While it stands still nobody can tell what is in it.
    pair.kept_since = None;
    let job = Move::new(false);
    let operation = pair.left_in_doubt(&job).await;
    let (home, away) = (pair.home, pair.away());
    pair.nodes[away].kill_holder();
    pair.nodes[away].kill_device(0);
    let client = pair.nodes[home].client().await;
    pair.nodes[home].signal_device(0, Signal::STOP);
    let request = v1::ResolveRequest {
        peer_is_fenced: true,
        statement: "its power is off".to_owned(),
        ..resolve(&operation, v1::Resolution::ResumeHere)
    };
    for validate_only in [true, false] {
        let asked = client.resolve(v1::ResolveRequest { validate_only, ..request.clone() });
        let answer = tokio::time::timeout(ANSWERED_WITHIN, asked).await.expect("it is answered").unwrap();
        let [found] = &answer.source_devices[..] else { panic!("one device: {answer:?}") };
        assert_eq!(
            (found.state(), found.copy()),
            (v1::MigrationState::Unspecified, v1::SourceCopy::Unknown),
            "{answer:?}"
        );
        assert_eq!(answer.refused, "");
    }
    pair.nodes[home].signal_device(0, Signal::CONT);
    let ended = done(&client, &operation.name).await.unwrap();
    assert_eq!(ended.failure.as_ref().unwrap().reason, "RESOLVED", "{ended:?}");
    assert_eq!(pair.nodes[home].contents(&client).await, [Content::Own]);
    figure("1 source in doubt whose device stood still: its admin was answered, and it runs on");
}

/// Waits for an audit line of this; with its result, and the reason where there is one.
fn audited(what: &'static str) -> impl FnMut(&str) -> Option<String> {
    move |line| {
        let line: Value = serde_json::from_str(line).ok()?;
        let fields = &line["fields"];
        let is_it = fields["message"] == "audit" && fields["what"] == what;
        let (result, reason) = (fields["result"].as_str()?, fields["reason"].as_str().unwrap_or_default());
        is_it.then(|| format!("{result} {reason}"))
    }
}

/// They are told by then that it failed, and what they do next nobody knows: take the fence off, for one.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_decided_for_who_has_hung_up() {
    let mut pair = Pair::new(1, true).await;
    let job = Move::new(false);
    let operation = pair.left_in_doubt(&job).await;
    let (home, away) = (pair.home, pair.away());
    // Who is called takes the connection and says nothing, until it has taken too long.
    pair.relays[away].lead(Way::Silent);
    let client = pair.nodes[home].client().await;
    let request = v1::ResolveRequest {
        peer_is_fenced: true,
        statement: "its power is off".to_owned(),
        ..resolve(&operation, v1::Resolution::ResumeHere)
    };
    let deciding = tokio::spawn(async move { client.resolve(request).await });
    let (called, ended) = ("/vfio.checkpoint.v1.MigrationService/Resolve", "Resolve");
    pair.nodes[home].agent().wait_for("that Resolve has come", audited(called)).await;
    deciding.abort();
    let told = pair.nodes[home].agent().wait_for("how Resolve ended", audited(ended)).await;
    assert_eq!(told, "failed CALLER_GONE");
    pair.waits_in_doubt(&pair.recorded(&pair.nodes[home].client().await, &job).await.unwrap()).await;
    pair.start(away).await;
    let over = pair.settle(&job, After::Moves).await.unwrap();
    assert_eq!(over.handover.unwrap().resolution, "");
    figure("1 admin who hung up before it was decided: nothing was, and the destination's answer ended it");
}
