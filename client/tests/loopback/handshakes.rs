//! Who gets in, and what is said to whom who does not.

use std::time::Duration;

use tokio::net::TcpListener;
use vfio_checkpoint_client::call::Client;
use vfio_checkpoint_client::connect::{ConnectError, ConnectOptions};
use vfio_checkpoint_client::tls::{CredentialFiles, Credentials, ServerCheck, TlsError};

use crate::pki::{AGENT_ID, Ca, Pair, agent_names, config, uri};
use crate::server::Agent;

fn spiffe(id: &str) -> ServerCheck {
    ServerCheck::SpiffeId(id.parse().unwrap())
}

async fn connect(
    server: &Pair,
    clients: &Ca,
    trusted: &Ca,
    client: &Pair,
    check: ServerCheck,
) -> Result<(), ConnectError> {
    let address = Agent::default().serve(server, clients).await;
    let endpoint = format!("https://localhost:{}", address.port());
    Client::connect(&ConnectOptions::new(endpoint, config(trusted, client, &check), check)).await.map(drop)
}

#[tokio::test]
async fn the_right_certificates_get_in_by_name_by_id_and_by_trust_domain() {
    let ca = Ca::new("one");
    let (server, client) = (ca.server(agent_names()), ca.client());
    for check in [
        ServerCheck::Name(None),
        ServerCheck::Name(Some("localhost".to_owned())),
        spiffe(AGENT_ID),
        ServerCheck::TrustDomain("example.org".parse().unwrap()),
    ] {
        connect(&server, &ca, &ca, &client, check).await.unwrap();
    }
}

#[tokio::test]
async fn every_wrong_certificate_is_told_in_words() {
    let (ca, other) = (Ca::new("one"), Ca::new("other"));
    let (server, client) = (ca.server(agent_names()), ca.client());
    let id = || spiffe(AGENT_ID);
    let two = ca.server(vec![uri(AGENT_ID), uri("spiffe://example.org/agent/b")]);
    let none = ca.server(vec![]);
    let cases = [
        ("client of another CA", &server, &ca, &ca, &other.client(), id(), "does not know the CA"),
        ("expired client", &server, &ca, &ca, &ca.expired_client(), id(), "has expired or is not valid yet"),
        ("server of another CA", &server, &ca, &other, &client, id(), "not signed by a CA of the CA bundle"),
        (
            "expired server",
            &ca.expired_server(),
            &ca,
            &ca,
            &client,
            id(),
            "the agent's certificate has expired",
        ),
        (
            "other id",
            &server,
            &ca,
            &ca,
            &client,
            spiffe("spiffe://example.org/agent/b"),
            "the server is spiffe://example.org/agent/a",
        ),
        ("two ids", &two, &ca, &ca, &client, id(), "has 2 URIs"),
        ("no id", &none, &ca, &ca, &client, id(), "has 0 URIs"),
        (
            "other domain",
            &server,
            &ca,
            &ca,
            &client,
            ServerCheck::TrustDomain("example.com".parse().unwrap()),
            "a member of spiffe://example.com",
        ),
        (
            "other name",
            &server,
            &ca,
            &ca,
            &client,
            ServerCheck::Name(Some("db".to_owned())),
            "for somebody else",
        ),
    ];
    for (what, server, clients, trusted, client, check, expected) in cases {
        let error = connect(server, clients, trusted, client, check).await.unwrap_err();
        assert!(matches!(error, ConnectError::Handshake { .. }), "{what}: {error}");
        assert!(error.to_string().contains(expected), "{what}: {error}");
    }
}

#[tokio::test]
async fn a_network_that_does_not_lead_there_is_told_step_by_step() {
    let ca = Ca::new("one");
    let config = config(&ca, &ca.client(), &ServerCheck::Name(None));
    let options = |endpoint: String| ConnectOptions::new(endpoint, config.clone(), ServerCheck::Name(None));

    // A port that was free a moment ago.
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let error = Client::connect(&options(format!("https://{free}"))).await.unwrap_err();
    assert!(matches!(error, ConnectError::Refused { .. }), "{error}");

    // The name is reserved for names that are not there.
    let error = Client::connect(&options("https://agent.invalid:1".to_owned())).await.unwrap_err();
    assert!(matches!(error, ConnectError::UnknownHost { .. }), "{error}");

    // It accepts and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut impatient = options(format!("https://{}", silent.local_addr().unwrap()));
    impatient.connect_timeout = Duration::from_millis(50);
    let error = Client::connect(&impatient).await.unwrap_err();
    assert!(matches!(error, ConnectError::Timeout { .. }), "{error}");
    assert!(error.to_string().contains("TLS"), "{error}");

    // It hangs up.
    let rude = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = rude.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok(hung_up) = rude.accept().await {
            drop(hung_up);
        }
    });
    let error = Client::connect(&options(format!("https://{address}"))).await.unwrap_err();
    assert!(matches!(error, ConnectError::Closed { .. }), "{error}");

    for bad in ["http://a:1", "https://a", "a:1", "https://a:1/path", "https://a:1?q", "https://:1", ""] {
        let error = Client::connect(&options(bad.to_owned())).await.unwrap_err();
        assert!(matches!(error, ConnectError::BadEndpoint { .. }), "{bad}: {error}");
    }
}

#[test]
fn files_that_are_not_what_they_should_be_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let ca = Ca::new("one");
    let pair = ca.client();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let good = CredentialFiles {
        certificate: write("cert.pem", &pair.certificate),
        key: write("key.pem", &pair.key),
        ca: write("ca.pem", &ca.pem),
    };
    Credentials::from_files(&good).unwrap();
    let missing = CredentialFiles { key: folder.path().join("none.pem"), ..good.clone() };
    let mixed_up = CredentialFiles { key: good.certificate.clone(), ..good.clone() };
    let empty = CredentialFiles { ca: write("empty.pem", ""), ..good.clone() };
    let long = CredentialFiles { ca: write("long.pem", &"x".repeat((1 << 20) + 1)), ..good.clone() };
    let cut = CredentialFiles { certificate: write("cut.pem", &pair.certificate[..200]), ..good.clone() };
    let a_folder = CredentialFiles { ca: folder.path().to_owned(), ..good.clone() };
    for (files, name, is_expected) in [
        (
            missing,
            "none.pem",
            (|error| matches!(error, TlsError::Unreadable { .. })) as fn(&TlsError) -> bool,
        ),
        (mixed_up, "cert.pem", |error| matches!(error, TlsError::Nothing { .. })),
        (empty, "empty.pem", |error| matches!(error, TlsError::Nothing { .. })),
        (long, "long.pem", |error| matches!(error, TlsError::TooLarge { .. })),
        (cut, "cut.pem", |error| matches!(error, TlsError::NotPem { .. })),
        (a_folder, folder.path().to_str().unwrap(), |error| matches!(error, TlsError::NotAFile { .. })),
    ] {
        let error = Credentials::from_files(&files).unwrap_err();
        assert!(is_expected(&error) && error.to_string().contains(name), "{error:?}");
    }
    let other = ca.client();
    let credentials =
        Credentials::from_pem(pair.certificate.as_bytes(), other.key.as_bytes(), ca.pem.as_bytes()).unwrap();
    let error =
        vfio_checkpoint_client::tls::client_config(credentials, &ServerCheck::Name(None)).unwrap_err();
    assert!(matches!(error, TlsError::Pair(_)), "{error}");
}
