//! Which servers this agent talks to when it is the client.

use super::super::identity::{PublicKeyHash, SpiffeId};
use super::super::roles::{Grant, Policy, PolicyHandle, Role};
use super::super::server_identity::{Demand, ServerExpectation};
use super::*;

fn id(text: &str) -> ServerExpectation {
    ServerExpectation::Spiffe(text.parse::<SpiffeId>().unwrap())
}

fn domain(text: &str) -> ServerExpectation {
    ServerExpectation::TrustDomain(text.parse().unwrap())
}

/// Calls the agent as itself, expecting this, under this name.
async fn call(world: &World, door: &Door, expected: ServerExpectation, name: &str) -> Result<(), String> {
    call_with(world, door, expected, None, name).await
}

async fn call_with(
    world: &World,
    door: &Door,
    expected: ServerExpectation,
    demand: Option<Demand>,
    name: &str,
) -> Result<(), String> {
    let config = world.source.client_config(expected, demand).unwrap();
    let tcp = TcpStream::connect(door.address).await.unwrap();
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let stream = soon(TlsConnector::from(Arc::new(config)).connect(name, tcp)).await;
    stream.map(|_| ()).map_err(|error| error.to_string())
}

#[tokio::test]
async fn a_server_is_known_by_name_by_spiffe_id_or_by_trust_domain() {
    let world = World::with_crl();
    let door = world.open().await;
    call(&world, &door, ServerExpectation::HostName, "agent.example").await.unwrap();
    call(&world, &door, ServerExpectation::HostName, "127.0.0.1").await.unwrap();
    // The name that is dialled does not matter for the other two.
    call(&world, &door, id("spiffe://lab.example/agent/a"), "whatever.example").await.unwrap();
    call(&world, &door, domain("lab.example"), "whatever.example").await.unwrap();
    call(&world, &door, domain("lab.example"), "127.0.0.1").await.unwrap();
    for (expected, name, word) in [
        (ServerExpectation::HostName, "other.example", "not valid for name"),
        (id("spiffe://lab.example/agent/b"), "agent.example", "spiffe://lab.example/agent/a"),
        (id("spiffe://lab.example/agent"), "agent.example", "spiffe://lab.example/agent/a"),
        (domain("example"), "agent.example", "spiffe://lab.example/agent/a"),
        (domain("lab.example.org"), "agent.example", "spiffe://lab.example/agent/a"),
    ] {
        let refused = call(&world, &door, expected.clone(), name).await.unwrap_err();
        assert!(refused.contains(word), "{expected:?}: {refused}");
    }
}

#[tokio::test]
async fn a_revoked_or_strange_server_is_refused_whatever_is_expected() {
    let world = World::with_crl();
    let door = world.open().await;
    let own = CertificateDer::from_pem_file(&world.files.certificate).unwrap();
    let serial = super::super::identity::PeerCertificate::from_der(&own).unwrap().serial;
    let expectations =
        || [ServerExpectation::HostName, id("spiffe://lab.example/agent/a"), domain("lab.example")];
    world.revoke(&[&serial]);
    world.source.reload().await.unwrap();
    for expected in expectations() {
        for name in ["agent.example", "whatever.example"] {
            let refused = call(&world, &door, expected.clone(), name).await.unwrap_err();
            assert!(refused.contains("Revoked"), "{expected:?}: {refused}");
        }
    }
    // Another world's agent has the right names and the wrong authority.
    let other = World::new();
    let strange = other.open().await;
    for expected in expectations() {
        let refused = call(&world, &strange, expected.clone(), "agent.example").await.unwrap_err();
        assert!(
            refused.contains("BadSignature") || refused.contains("UnknownIssuer"),
            "{expected:?}: {refused}"
        );
    }
}

#[tokio::test]
async fn an_expired_server_is_refused() {
    let world = World::new();
    let door = world.open().await;
    let config = world.source.client_config(domain("lab.example"), None).unwrap();
    world.clock.set(86_401);
    let refused = dial(door.address, config).await.unwrap_err().to_string();
    assert!(refused.contains("expired"), "{refused}");
}

#[tokio::test]
async fn a_server_without_a_spiffe_id_is_not_a_workload() {
    let world = World::new();
    let own = world.ca.issue_names(vec![rcgen::SanType::DnsName("agent.example".try_into().unwrap())], day());
    own.unwrap().write(world.folder.path(), &world.ca.pem()).unwrap();
    world.source.reload().await.unwrap();
    let door = world.open().await;
    let refused = call(&world, &door, domain("lab.example"), "agent.example").await.unwrap_err();
    assert!(refused.contains("dns:agent.example"), "{refused}");
}

#[tokio::test]
async fn a_server_needs_the_role_of_now_and_the_key_beside_its_name() {
    let world = World::with_crl();
    let door = world.open().await;
    let grant = |who: &str, role| {
        let who = who.parse().unwrap();
        Policy { grants: vec![Grant { who, roles: vec![role] }] }
    };
    let peers = || grant("spiffe://lab.example/agent/*", Role::Peer);
    let policy = PolicyHandle::new(peers());
    let own = world.source.current().material.own_key_hash();
    let call = async |expected, key| {
        let demand = Demand { policy: policy.clone(), role: Role::Peer, key };
        call_with(&world, &door, expected, Some(demand), "agent.example").await
    };
    let other = PublicKeyHash([7; 32]);
    let no_role = r#"NoRole { found: "spiffe://lab.example/agent/a", role: Peer }"#;
    let other_key = format!("OtherKey {{ found: {own:?}, expected: {other:?} }}");
    for expected in [ServerExpectation::HostName, id("spiffe://lab.example/agent/a"), domain("lab.example")] {
        for key in [None, Some(own)] {
            policy.replace(peers());
            call(expected.clone(), key).await.unwrap();
            for denies in [
                Policy::default(),
                grant("spiffe://lab.example/agent/*", Role::Migrator),
                grant("spiffe://lab.example/other/*", Role::Peer),
                // The name that it was dialled by is not who it is.
                grant("agent.example", Role::Peer),
            ] {
                policy.replace(denies);
                let refused = call(expected.clone(), key).await.unwrap_err();
                assert!(refused.contains(no_role), "{refused}");
            }
        }
        policy.replace(peers());
        let refused = call(expected.clone(), Some(other)).await.unwrap_err();
        assert!(refused.contains(&other_key), "{refused}");
    }
    // It takes the place of nothing that is asked of a server without it.
    let stranger = call(id("spiffe://lab.example/agent/b"), Some(own)).await.unwrap_err();
    assert!(stranger.contains("Other {"), "{stranger}");
}
