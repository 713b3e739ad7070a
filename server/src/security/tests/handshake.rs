//! Who gets in, who does not, and that nobody keeps others out.

use tokio::io::AsyncWriteExt;
use tonic::transport::server::Connected;

use super::super::accept::AcceptCounts;
use super::super::peers::RefusedPeer;
use super::*;

#[tokio::test]
async fn a_good_peer_gets_in_and_is_known() {
    let world = World::new();
    let mut door = world.open().await;
    let peer = world.peer("/ns/x/saver");
    let (mut stream, mut connection) = door.enter(world.client(Some(&peer))).await;
    let info = connection.connect_info();
    assert_eq!(info.certificate.identity, spiffe("/ns/x/saver"));
    assert_eq!(info.certificate.serial, peer.serial);
    assert_eq!(info.certificate.not_after, day().not_after);
    assert_eq!(info.address, stream.get_ref().0.local_addr().unwrap());
    assert_eq!(info.cut_reason(), None);
    stream.write_all(b"hello").await.unwrap();
    stream.flush().await.unwrap();
    let mut heard = [0; 5];
    soon(connection.read_exact(&mut heard)).await.unwrap();
    assert_eq!(&heard, b"hello");
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    assert_eq!(door.registry.len(), 1);
    drop(connection);
    assert!(door.registry.is_empty());
}

#[tokio::test]
async fn no_session_is_resumed() {
    let world = World::new();
    let mut door = world.open().await;
    let client = world.client(Some(&world.peer("/a")));
    for _ in 0..3 {
        // The same store of tickets each time.
        let (mut stream, mut connection) = door.enter(client.clone()).await;
        connection.write_all(b"x").await.unwrap();
        connection.flush().await.unwrap();
        soon(stream.read_exact(&mut [0])).await.unwrap();
        let (_, tls) = stream.get_ref();
        assert_eq!(tls.handshake_kind(), Some(rustls::HandshakeKind::Full));
        assert_eq!(tls.tls13_tickets_received(), 0);
    }
}

#[tokio::test]
async fn bad_peers_do_not_get_in() {
    let world = World::with_crl();
    let door = world.open().await;
    let revoked = world.peer("/revoked");
    world.revoke(&[&revoked.serial]);
    world.source.reload().await.unwrap();
    let expired = world.ca.issue(&spiffe("/old"), &[], &[], from_to(0, 10)).unwrap();
    let early = world.ca.issue(&spiffe("/early"), &[], &[], from_to(1000, 2000)).unwrap();
    world.clock.set(11);
    let stranger = authority().issue(&spiffe("/a"), &[], &[], day()).unwrap();
    for (certificate, alert) in [
        (None, "CertificateRequired"),
        (Some(&stranger), "UnknownCA"),
        (Some(&expired), "CertificateExpired"),
        (Some(&early), "CertificateExpired"),
        (Some(&revoked), "CertificateRevoked"),
    ] {
        let refusal = door.refusal(world.client(certificate)).await;
        // An authority of the same name and another key is caught by its signature.
        let alerts = if alert == "UnknownCA" { vec![alert, "DecryptError"] } else { vec![alert] };
        assert!(alerts.iter().any(|alert| refusal.contains(alert)), "{alert}: {refusal}");
    }
    assert_eq!(door.counters.read(), AcceptCounts { failed: 5, ..AcceptCounts::default() });
    assert!(door.registry.is_empty());
}

#[tokio::test]
async fn a_peer_whose_certificate_names_nobody_does_not_get_in() {
    let world = World::new();
    let door = world.open().await;
    let names = vec![rcgen::SanType::URI("spiffe://lab.example/a//b".try_into().unwrap())];
    let nobody = world.ca.issue_names(names, day()).unwrap();
    let refusal = door.refusal(world.client(Some(&nobody))).await;
    assert_eq!(door.counters.read(), AcceptCounts { refused: 1, ..AcceptCounts::default() }, "{refusal}");
}

#[tokio::test]
async fn tls_1_2_is_refused_with_protocol_version() {
    let world = World::new();
    let door = world.open().await;
    // By hand, because this build has no TLS 1.2 to speak: ECDHE-ECDSA-AES128-GCM over P-256, no
    // supported_versions.
    let extensions =
        [&[0, 10, 0, 4, 0, 2, 0, 23][..], &[0, 11, 0, 2, 1, 0], &[0, 13, 0, 4, 0, 2, 4, 3]].concat();
    let body = [
        &[3, 3][..],
        &[7; 32],
        &[0],
        &[0, 2, 0xc0, 0x2b],
        &[1, 0],
        &[0, u8::try_from(extensions.len()).unwrap()],
        &extensions,
    ]
    .concat();
    let length = u8::try_from(body.len()).unwrap();
    let hello = [&[22, 3, 1, 0, length + 4, 1, 0, 0, length][..], &body].concat();
    let mut tcp = TcpStream::connect(door.address).await.unwrap();
    tcp.write_all(&hello).await.unwrap();
    let mut answer = Vec::new();
    soon(tcp.read_to_end(&mut answer)).await.unwrap();
    // An alert record; fatal (2), protocol_version (70).
    assert_eq!(answer, [21, 3, 3, 0, 2, 2, 70]);
}

#[tokio::test]
async fn who_says_nothing_keeps_nobody_out() {
    let world = World::new();
    // So long a timeout that only giving way can end a handshake.
    let limits = AcceptLimits { handshake_timeout: Duration::from_hours(1), max_handshakes: 2 };
    let mut door = world.listen(limits, PeerLimits::default()).await;
    let mut silent = Vec::new();
    for _ in 0..10 {
        silent.push(TcpStream::connect(door.address).await.unwrap());
    }
    let _in = door.enter(world.client(Some(&world.peer("/a")))).await;
    assert_eq!(door.counters.read(), AcceptCounts { accepted: 1, evicted: 9, ..AcceptCounts::default() });
    // The first of them was put out: its socket ends.
    assert_eq!(soon(silent[0].read(&mut [0])).await.unwrap(), 0);
}

#[tokio::test]
async fn a_handshake_has_to_end() {
    let world = World::new();
    let handshake_timeout = Duration::from_millis(20);
    let limits = AcceptLimits { handshake_timeout, ..AcceptLimits::default() };
    let door = world.listen(limits, PeerLimits::default()).await;
    let mut silent = TcpStream::connect(door.address).await.unwrap();
    assert_eq!(soon(silent.read(&mut [0])).await.unwrap(), 0);
    assert_eq!(door.counters.read().timed_out, 1);
}

#[tokio::test]
async fn connections_are_limited_in_all_and_for_each_identity() {
    let world = World::new();
    let peers = PeerLimits { max_connections: 2, max_connections_per_identity: Some(1) };
    let mut door = world.listen(AcceptLimits::default(), peers).await;
    let [a, b, c] = ["/a", "/b", "/c"].map(|path| world.peer(path));
    let first = door.enter(world.client(Some(&a))).await;
    door.refusal(world.client(Some(&a))).await;
    assert_eq!(door.counters.read().refused, 1);
    let _second = door.enter(world.client(Some(&b))).await;
    door.refusal(world.client(Some(&c))).await;
    assert_eq!(door.counters.read().refused, 2);
    // A place that was left is free again.
    drop(first);
    let _third = door.enter(world.client(Some(&c))).await;
    assert_eq!(door.registry.len(), 2);
}

#[tokio::test]
async fn a_handshake_that_crosses_a_reload_is_held_to_the_new_set() {
    let world = World::with_crl();
    let door = world.open().await;
    let peer = world.peer("/a");
    world.revoke(&[&peer.serial]);
    world.source.reload().await.unwrap();
    // As if its handshake had begun before.
    let refused = door.registry.register(vec![peer.der.clone()], door.address).unwrap_err();
    let revoked = rustls::Error::InvalidCertificate(rustls::CertificateError::Revoked);
    assert!(matches!(refused, RefusedPeer::NoLongerVerifies { source } if source == revoked));
    assert!(door.registry.is_empty());
}
