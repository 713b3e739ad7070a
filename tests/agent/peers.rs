//! To whom a source brings its devices, and to whom it does not, whoever says so.

use tonic::Code;
use vfio_checkpoint_client::call::CallError;
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_proto::v1::BlockerReason;
use vfio_checkpoint_server::config::AgentConfig;
use vfio_checkpoint_server::security::reload::Reloaded;
use vfio_checkpoint_server::serve::Agent;

use crate::flow::{Bench, done, failure, refused, soon, violations};
use crate::lab::{Lab, start, validity};
use crate::migrations::{manual, moved, prepared, stayed, when};
use crate::pair::{Pair, key, small};
use crate::relay::{Fate, Relay};

/// An agent like the destination, on the same authority, with a certificate of its own that says that it is `identity`.
async fn other(lab: &Lab, bench: &Bench, identity: &str, configure: impl Fn(&mut AgentConfig)) -> Agent {
    let mut config = lab.config("other", &[("n0", bench.address.as_str())]);
    lab.certify_as("other", identity, validity());
    configure(&mut config);
    start(config).await
}

/// Nothing was begun at an agent, and nothing was heard there of what would come.
fn untouched(agent: &Agent, bench: &Bench) {
    assert!(agent.core().operations.page(None, |_| true, 1).is_empty(), "it was asked to prepare something");
    assert!(bench.device.hops().is_empty());
}

/// What is in the way of a migration to whoever that is, in a dry run and in earnest.
async fn blocked(pair: &Pair, request: v1::MigrateRequest, reason: BlockerReason) -> String {
    let (source, _) = pair.migrator().await;
    let dry = v1::MigrateRequest { validate_only: true, ..request.clone() };
    let told = source.migrate(dry).await.unwrap();
    let [found] = &told.blockers[..] else { panic!("not one blocker: {:?}", told.blockers) };
    let blocker = found.blocker.as_ref().unwrap();
    assert_eq!((found.side(), blocker.reason()), (v1::MigrationSide::Destination, reason), "{blocker:?}");
    // The very first call, of which nothing but the answer's time is of interest, was not answered.
    let prediction = told.prediction.unwrap();
    assert_eq!((prediction.round_trip, prediction.version), (None, 0));
    let refusal = refused(source.migrate(request).await, Code::FailedPrecondition, "BLOCKED");
    assert_eq!(violations(&refusal), [(reason.as_str_name().to_owned(), String::new())]);
    blocker.message.clone()
}

/// Whoever may migrate says where to, and has a certificate of the same authority: that is all it takes to be an endpoint
/// that answers as a destination does.
#[tokio::test(flavor = "multi_thread")]
async fn who_may_migrate_is_no_destination_for_that() {
    let pair = Pair::new(1).await;
    let before = pair.digests();
    let bench = Bench::new(small(201));
    let identity = "spiffe://lab.test/migrator/test";
    let fake = other(&pair.lab, &bench, identity, |_| {}).await;
    // It gives itself the ticket.
    let (source, _) = pair.migrator().await;
    let admission = pair.admission(&source).await;
    let admitted = pair.lab.client(&fake, "migrator").await.admit(admission).await.unwrap();
    let mut request = pair.request(admitted.ticket);
    let target = request.target.as_mut().unwrap();
    target.endpoint = format!("https://localhost:{}", fake.address().port());
    target.key_sha256 = admitted.key_sha256;
    for spiffe_id in [identity, ""] {
        request.target.as_mut().unwrap().spiffe_id = spiffe_id.to_owned();
        let said = blocked(&pair, request.clone(), BlockerReason::DestinationNotAPeer).await;
        assert!(said.contains(identity) && said.contains("does not grant it the role peer"), "{said}");
    }
    untouched(&fake, &bench);
    stayed(&pair, &before);
    fake.stop().await.unwrap();
    pair.stop().await;
}

/// Two agents have one identity, as those of one service account do, and the endpoint leads to the wrong one.
#[tokio::test(flavor = "multi_thread")]
async fn what_one_agent_admitted_is_brought_to_no_other_of_its_identity() {
    let pair = Pair::new(1).await;
    let before = pair.digests();
    let bench = Bench::new(small(201));
    let twin = other(&pair.lab, &bench, "spiffe://lab.test/agent/destination", |_| {}).await;
    let (source, destination) = pair.migrator().await;
    let admission = pair.admission(&source).await;
    let admitted = destination.admit(admission).await.unwrap();
    assert_eq!(admitted.key_sha256, key(&pair.destination));
    let mut request = pair.request(admitted.ticket);
    request.target.as_mut().unwrap().endpoint = format!("https://localhost:{}", twin.address().port());
    let said = blocked(&pair, request.clone(), BlockerReason::DestinationOtherKey).await;
    let known = pair.destination.core().own_key().unwrap().to_string();
    assert!(said.contains(&known), "{said}");
    untouched(&twin, &bench);
    stayed(&pair, &before);
    // The right one of them is still as good.
    request.target.as_mut().unwrap().endpoint =
        format!("https://localhost:{}", pair.destination.address().port());
    let name = source.migrate(request).await.unwrap().operation.unwrap().name;
    assert_eq!(soon(done(&source, &name)).await.result(), v1::OperationResult::Succeeded);
    moved(&pair, &before);
    twin.stop().await.unwrap();
    pair.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_key_only_a_dry_run_is_taken() {
    let pair = Pair::new(1).await;
    let (source, _) = pair.migrator().await;
    let mut request = pair.request(bytes::Bytes::from_static(&[7; 32]));
    request.target.as_mut().unwrap().key_sha256.clear();
    let dry = v1::MigrateRequest { validate_only: true, ..request.clone() };
    assert!(source.migrate(dry).await.unwrap().blockers.is_empty());
    crate::flow::refused_field(source.migrate(request).await, "target.key_sha256");
    pair.stop().await;
}

/// Gives the destination another key, and has it show that.
async fn renew(pair: &Pair) {
    let was = key(&pair.destination);
    pair.lab.certify("destination", validity());
    let reloaded = pair.destination.tls().reload().await.unwrap();
    assert!(matches!(reloaded, Reloaded::Accepted(_)), "{reloaded:?}");
    assert_ne!(key(&pair.destination), was);
}

/// A migration over this relay, prepared and to be committed by hand.
pub(crate) async fn prepared_over(pair: &Pair, relay: &Relay) -> Result<String, CallError> {
    let over = |_: &mut v1::AdmitRequest, request: &mut v1::MigrateRequest| {
        manual(&mut v1::AdmitRequest::default(), request);
        request.target.as_mut().unwrap().endpoint = format!("https://localhost:{}", relay.address().port());
    };
    let name = pair.migrate(over).await?.operation.unwrap().name;
    let (source, _) = pair.migrator().await;
    prepared(&source, &name).await;
    Ok(name)
}

/// The key is what the devices are brought to. Where they are is asked of whoever has the identity.
#[tokio::test(flavor = "multi_thread")]
async fn a_destination_with_another_key_answers_for_what_it_has() {
    let pair = Pair::new(1).await;
    let before = pair.digests();
    let relay = Relay::to(&pair.destination, &[Fate::Lasts]).await;
    let name = prepared_over(&pair, &relay).await.unwrap();
    let (source, _) = pair.migrator().await;
    renew(&pair).await;
    relay.cut();
    let connections = relay.connections();
    source.commit(v1::CommitRequest { operation: name.clone() }).await.unwrap();
    let ended = soon(done(&source, &name)).await;
    assert_eq!(ended.result(), v1::OperationResult::Succeeded, "{ended:?}");
    assert!(relay.connections() > connections, "over another connection");
    moved(&pair, &before);
    pair.stop().await;
}

/// Who is no peer any more is not believed that it runs the devices, until it is one again.
#[tokio::test(flavor = "multi_thread")]
async fn a_destination_that_is_no_peer_any_more_is_not_asked() {
    let pair = Pair::new(1).await;
    let before = pair.digests();
    let relay = Relay::to(&pair.destination, &[Fate::Lasts]).await;
    let name = prepared_over(&pair, &relay).await.unwrap();
    let (source, _) = pair.migrator().await;
    let policy = pair.source.core().policy.current();
    let mut without = (*policy).clone();
    without.grants.retain(|grant| grant.who.to_string() != "spiffe://lab.test/agent/*");
    pair.source.set_policy(without);
    relay.cut();
    source.commit(v1::CommitRequest { operation: name.clone() }).await.unwrap();
    let doubts = |seen: &v1::Operation| {
        seen.handover
            .as_ref()
            .is_some_and(|handover| handover.doubt.contains("does not grant it the role peer"))
    };
    let seen = when(&source, &name, doubts).await;
    assert_eq!((seen.phase(), failure(&seen)), (v1::OperationPhase::Committing, ""));
    pair.source.set_policy((*policy).clone());
    let ended = soon(done(&source, &name)).await;
    assert_eq!(ended.result(), v1::OperationResult::Succeeded, "{ended:?}");
    moved(&pair, &before);
    pair.stop().await;
}
