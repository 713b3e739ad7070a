//! Files: what is refused and why, and that changes are seen.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use super::super::files::TlsError;
use super::super::reload::{Reloaded, chain_of};
use super::super::tls::TlsMaterial;
use super::*;

fn refused(world: &World) -> String {
    chain_of(&TlsMaterial::load(&world.files, &*world.clock).unwrap_err())
}

type Spoil<'a> = &'a dyn Fn(&mut World);

#[test]
fn every_refusal_names_the_file_and_what_to_do() {
    let garbage = |file: &Path| write_file(file, b"nothing of the kind\n", 0o644).unwrap();
    let cases: &[(Spoil<'_>, &[&str])] = &[
        (&|w| garbage(&w.files.client_ca), &["ca.crt", "no CERTIFICATE section"]),
        (&|w| garbage(&w.files.certificate), &["tls.crt", "no CERTIFICATE section"]),
        (&|w| garbage(&w.files.key), &["tls.key", "no PRIVATE KEY section"]),
        (&|w| garbage(&w.files.crls[0]), &["ca.crl", "no X509 CRL section"]),
        (&|w| w.clock.set(86_401), &["tls.crt", "expired 1 s ago", "issue a new one"]),
        (&|w| w.files.key = w.folder.path().into(), &["not a regular file"]),
        (&|w| std::fs::remove_file(&w.files.crls[0]).unwrap(), &["ca.crl", "check that it exists"]),
        (
            &|w| write_file(&w.files.key, &vec![b'a'; (1 << 20) + 1], 0o600).unwrap(),
            &["tls.key", "1048576 bytes"],
        ),
        (
            &|w| {
                let list = w.ca.crl(&[], from_to(0, 50)).unwrap();
                write_file(&w.files.crls[0], list.as_bytes(), 0o644).unwrap();
                w.clock.set(60);
            },
            &["ca.crl", "expired 10 s ago", "fetch"],
        ),
        (
            &|w| {
                let list = w.ca.crl(&[], from_to(0, 50)).unwrap();
                write_file(&w.files.crls[0], list.as_bytes(), 0o644).unwrap();
                w.clock.set(50);
            },
            &["ca.crl", "expired 0 s ago"],
        ),
        (
            &|w| {
                let pem = "-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n";
                write_file(&w.files.crls[0], pem.as_bytes(), 0o644).unwrap();
            },
            &["ca.crl", "publish it again"],
        ),
        (
            &|w| {
                let early = w.ca.issue(&spiffe("/agent/a"), &[], &[], from_to(30, 60)).unwrap();
                early.write(w.folder.path(), &w.ca.pem()).unwrap();
            },
            &["tls.crt", "valid in 30 s"],
        ),
        (
            &|w| {
                let pem = std::fs::read_to_string(&w.files.client_ca).unwrap();
                write_file(&w.files.client_ca, &pem.as_bytes()[..pem.len() / 2], 0o644).unwrap();
            },
            &["ca.crt", "PEM"],
        ),
    ];
    for (spoil, words) in cases {
        let mut world = World::with_crl();
        TlsMaterial::load(&world.files, &*world.clock).unwrap();
        spoil(&mut world);
        let refused = refused(&world);
        for word in *words {
            assert!(refused.contains(word), "{word:?} is not in: {refused}");
        }
    }
}

#[test]
fn a_list_that_its_authority_did_not_sign_is_refused_before_it_locks_all_out() {
    let world = World::with_crl();
    // The same name, another key.
    let forged = authority().crl(&[], day()).unwrap();
    write_file(&world.files.crls[0], forged.as_bytes(), 0o644).unwrap();
    assert!(refused(&world).contains("did not sign it"), "{}", refused(&world));
}

#[test]
fn an_authority_without_a_list_is_told() {
    let world = World::with_crl();
    let load = || TlsMaterial::load(&world.files, &*world.clock).unwrap();
    assert!(load().authorities_without_crl().is_empty());
    let both = world.ca.pem() + &authority().pem();
    write_file(&world.files.client_ca, both.as_bytes(), 0o644).unwrap();
    assert_eq!(load().authorities_without_crl(), ["CN=throwaway authority of lab.example"]);
}

#[test]
fn nothing_prints_a_key() {
    let world = World::new();
    let printed = format!("{:?}", world.source);
    let key = std::fs::read_to_string(&world.files.key).unwrap();
    assert!(!printed.contains(key.lines().nth(1).unwrap()), "{printed}");
    let mode = std::fs::metadata(&world.files.key).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[tokio::test]
async fn the_same_content_is_no_new_generation() {
    let world = World::new();
    let generation = world.source.current().generation;
    let same = std::fs::read(&world.files.certificate).unwrap();
    write_file(&world.files.certificate, &same, 0o644).unwrap();
    assert_eq!(world.source.reload().await.unwrap(), Reloaded::Unchanged(generation));
}

#[tokio::test]
async fn a_swapped_symbolic_link_is_seen_by_polling() {
    // As the kubelet does it: names that never change, a link to a folder of one generation.
    let (clock, ca, folder) = (ManualClock::new(), authority(), TempDir::new().unwrap());
    let at = |name: &str| folder.path().join(name);
    for generation in ["..1", "..2"] {
        std::fs::create_dir(at(generation)).unwrap();
        World::own(&ca).write(&at(generation), &ca.pem()).unwrap();
    }
    symlink("..1", at("..data")).unwrap();
    for name in ["tls.crt", "tls.key", "ca.crt"] {
        symlink(Path::new("..data").join(name), at(name)).unwrap();
    }
    let files = TlsFiles {
        certificate: at("tls.crt"),
        key: at("tls.key"),
        client_ca: at("ca.crt"),
        crls: Vec::new(),
    };
    let source = TlsSource::load(files, clock, Environment::production()).unwrap();
    let old_key = source.current().material.own_key_hash();
    let mut generations = source.generations();
    let polling = tokio::spawn(source.clone().poll(Duration::from_millis(5)));
    symlink("..2", at("..data_tmp")).unwrap();
    std::fs::rename(at("..data_tmp"), at("..data")).unwrap();
    soon(generations.changed()).await.unwrap();
    assert_ne!(source.current().material.own_key_hash(), old_key);
    assert_eq!(source.current().generation, *generations.borrow());
    polling.abort();
}

#[tokio::test]
async fn a_new_certificate_serves_new_connections() {
    let world = World::new();
    let mut door = world.open().await;
    let client = world.client(Some(&world.peer("/a")));
    let (old, _held) = door.enter(client.clone()).await;
    let renewed = World::own(&world.ca);
    renewed.write(world.folder.path(), &world.ca.pem()).unwrap();
    world.source.reload().await.unwrap();
    let (new, _held_too) = door.enter(client).await;
    let shown = |stream: &TlsStream<TcpStream>| stream.get_ref().1.peer_certificates().unwrap()[0].clone();
    assert_eq!(shown(&new), renewed.der);
    assert_ne!(shown(&old), renewed.der);
}

#[tokio::test]
async fn an_expired_set_is_refused_and_a_good_one_mends_it() {
    let world = World::new();
    let short = world.ca.issue(&spiffe("/agent/a"), &[], &[], from_to(0, 10)).unwrap();
    short.write(world.folder.path(), &world.ca.pem()).unwrap();
    world.clock.set(11);
    assert!(matches!(world.source.reload().await, Err(TlsError::OwnExpired { secs_ago: 1, .. })));
    World::own(&world.ca).write(world.folder.path(), &world.ca.pem()).unwrap();
    assert!(matches!(world.source.reload().await, Ok(Reloaded::Accepted(_))));
}
