//! Running connections end when their certificate does, and the others go on.

use std::io::ErrorKind;

use tokio::io::AsyncWriteExt;
use tonic::transport::server::Connected;

use super::super::reload::Reloaded;
use super::*;

/// Both sides of a connection still talk.
async fn talks((stream, connection): &mut (TlsStream<TcpStream>, TlsConnection)) {
    stream.write_all(b"x").await.unwrap();
    stream.flush().await.unwrap();
    soon(connection.read_exact(&mut [0])).await.unwrap();
}

/// The agent's side ends by itself, for this reason, and the peer sees it.
async fn ends(pair: (TlsStream<TcpStream>, TlsConnection), reason: &str) {
    let (mut stream, mut connection) = pair;
    let error = soon(connection.read(&mut [0])).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionAborted);
    assert!(error.to_string().contains(reason), "{error}");
    assert_eq!(connection.write(b"x").await.unwrap_err().kind(), ErrorKind::ConnectionAborted);
    assert!(connection.connect_info().cut_reason().unwrap().to_string().contains(reason));
    drop(connection);
    assert!(!matches!(soon(stream.read(&mut [0])).await, Ok(1..)));
}

#[tokio::test]
async fn a_revoked_peer_is_cut_off_and_no_other() {
    let world = World::with_crl();
    let mut door = world.open().await;
    let (bad, good) = (world.peer("/bad"), world.peer("/good"));
    let mut cut = door.enter(world.client(Some(&bad))).await;
    let mut kept = door.enter(world.client(Some(&good))).await;
    talks(&mut cut).await;
    world.revoke(&[&bad.serial]);
    assert!(matches!(world.source.reload().await.unwrap(), Reloaded::Accepted(_)));
    ends(cut, "Revoked").await;
    talks(&mut kept).await;
    assert_eq!(door.registry.len(), 1);
    assert_eq!(door.registry.enforce(), 0);
}

#[tokio::test]
async fn a_cut_wakes_a_read_that_waits() {
    let world = World::with_crl();
    let mut door = world.open().await;
    let peer = world.peer("/bad");
    let (_stream, mut connection) = door.enter(world.client(Some(&peer))).await;
    // In a task of its own, which nobody but the cut wakes.
    let waiting = tokio::spawn(async move { connection.read(&mut [0]).await });
    tokio::task::yield_now().await;
    assert!(!waiting.is_finished());
    world.revoke(&[&peer.serial]);
    world.source.reload().await.unwrap();
    assert_eq!(soon(waiting).await.unwrap().unwrap_err().kind(), ErrorKind::ConnectionAborted);
}

#[tokio::test]
async fn peers_of_an_authority_that_is_taken_out_are_cut_off() {
    let world = World::new();
    let mut door = world.open().await;
    let mut pair = door.enter(world.client(Some(&world.peer("/a")))).await;
    // Rotation: first both, then the new one only.
    let next = authority();
    write_file(&world.files.client_ca, format!("{}{}", world.ca.pem(), next.pem()).as_bytes(), 0o644)
        .unwrap();
    assert!(matches!(world.source.reload().await.unwrap(), Reloaded::Accepted(_)));
    assert_eq!(door.registry.enforce(), 0);
    talks(&mut pair).await;
    let newcomer = next.issue(&spiffe("/b"), &[], &[], day()).unwrap();
    let mut kept = door.enter(world.client(Some(&newcomer))).await;
    write_file(&world.files.client_ca, next.pem().as_bytes(), 0o644).unwrap();
    world.source.reload().await.unwrap();
    ends(pair, "invalid peer certificate").await;
    talks(&mut kept).await;
}

#[tokio::test]
async fn a_peer_is_cut_off_when_its_certificate_expires() {
    let world = World::new();
    let mut door = world.open().await;
    let short = world.ca.issue(&spiffe("/short"), &[], &[], from_to(0, 100)).unwrap();
    let mut cut = door.enter(world.client(Some(&short))).await;
    let mut kept = door.enter(world.client(Some(&world.peer("/long")))).await;
    world.clock.set(100);
    // The last second is still a valid one.
    assert_eq!(door.registry.enforce(), 0);
    talks(&mut cut).await;
    world.clock.set(101);
    ends(cut, "expired").await;
    talks(&mut kept).await;
}

/// Nothing is awaited between the two seconds, so whoever enforces looks for the first time when the end has passed.
#[tokio::test]
async fn an_end_that_has_passed_before_anybody_looks_is_an_end() {
    let world = World::new();
    let (registry, enforcing) = PeerRegistry::new(world.source.clone(), PeerLimits::default());
    tokio::spawn(enforcing);
    let short = world.ca.issue(&spiffe("/short"), &[], &[], from_to(0, 100)).unwrap();
    world.clock.set(100);
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 1));
    let guard = registry.register(vec![short.der.clone()], address).expect("good for one more second");
    world.clock.set(101);
    let reason = soon(guard.cut()).await.to_string();
    assert!(reason.contains("expired"), "{reason}");
}

#[tokio::test]
async fn without_a_current_revocation_list_nobody_stays() {
    let world = World::with_crl();
    let list = world.ca.crl(&[], from_to(0, 500)).unwrap();
    write_file(&world.files.crls[0], list.as_bytes(), 0o644).unwrap();
    world.source.reload().await.unwrap();
    let mut door = world.open().await;
    let client = world.client(Some(&world.peer("/a")));
    let pair = door.enter(client.clone()).await;
    world.clock.set(500);
    ends(pair, "revocation list").await;
    door.refusal(client).await;
    assert_eq!(door.counters.read().failed, 1);
}

#[tokio::test]
async fn a_refused_reload_cuts_nobody_off() {
    let world = World::with_crl();
    let mut door = world.open().await;
    let client = world.client(Some(&world.peer("/a")));
    let mut pair = door.enter(client.clone()).await;
    let generation = world.source.current().generation;
    // A key of another certificate, as when only half of a secret was updated.
    write_file(&world.files.key, World::own(&world.ca).key_pem().as_bytes(), 0o600).unwrap();
    let refused = world.source.reload().await.unwrap_err();
    assert!(matches!(refused, super::super::files::TlsError::KeyMismatch { .. }), "{refused}");
    assert!(refused.to_string().contains("tls.key") && refused.to_string().contains("tls.crt"), "{refused}");
    assert_eq!(world.source.current().generation, generation);
    talks(&mut pair).await;
    door.enter(client).await;
}

#[tokio::test]
async fn the_enforcing_task_ends_with_the_registry() {
    let world = World::new();
    let door = world.open().await;
    let tasks = tokio::runtime::Handle::current().metrics().num_alive_tasks();
    assert_eq!(tasks, 2, "the accepting task and the enforcing task");
    drop(door);
    soon(async {
        while tokio::runtime::Handle::current().metrics().num_alive_tasks() > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}
