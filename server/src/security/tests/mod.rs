//! Real handshakes over loopback, on a clock that the tests move.
//!
//! Nothing here waits for time to pass. A test changes a file, a set or the clock, and then waits for the
//! event that has to follow; [`soon`] bounds that wait, so that a missing event is a failure and not a hang.

mod cutoff;
mod files;
mod handshake;
mod identity;
mod policy;
mod servers;
mod service;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tempfile::TempDir;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::accept::{AcceptCounters, AcceptLimits, Incoming, Listener, TlsConnection};
use super::clock::{Clock, TlsClock};
use super::files::TlsFiles;
use super::identity::{Identity, Serial};
use super::lab::{LabCa, LabCertificate, Validity, write_file};
use super::peers::{PeerLimits, PeerRegistry};
use super::reload::TlsSource;
use super::tls::provider;
use crate::environment::Environment;

/// When the tests take place.
const START_SECS: u64 = 1_900_000_000;
/// How long an event may take that has to come.
const PATIENCE: Duration = Duration::from_secs(20);

/// Time that stands until it is moved.
#[derive(Debug)]
struct ManualClock(watch::Sender<u64>);

impl ManualClock {
    fn new() -> Arc<Self> {
        Arc::new(Self(watch::Sender::new(START_SECS)))
    }

    fn set(&self, after_start_secs: u64) {
        self.0.send_replace(START_SECS + after_start_secs);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> UnixTime {
        UnixTime::since_unix_epoch(Duration::from_secs(*self.0.borrow()))
    }

    fn wait_until(&self, at: UnixTime) -> BoxFuture<'_, ()> {
        let mut time = self.0.subscribe();
        Box::pin(async move {
            time.wait_for(|now| *now >= at.as_secs()).await.unwrap();
        })
    }
}

/// The event, which has to come.
async fn soon<T>(event: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, event).await.expect("the event did not come")
}

/// Seconds after the start, both included.
fn from_to(from_secs: u64, to_secs: u64) -> Validity {
    let at = |secs| UnixTime::since_unix_epoch(Duration::from_secs(START_SECS + secs));
    Validity { not_before: at(from_secs), not_after: at(to_secs) }
}

fn day() -> Validity {
    from_to(0, 86_400)
}

fn spiffe(path: &str) -> Identity {
    Identity::Spiffe(format!("spiffe://lab.example{path}").parse().unwrap())
}

fn authority() -> LabCa {
    LabCa::new(&"lab.example".parse().unwrap(), from_to(0, 864_000)).unwrap()
}

/// An agent's files, its source and its registry.
struct World {
    clock: Arc<ManualClock>,
    ca: LabCa,
    files: TlsFiles,
    source: TlsSource,
    folder: TempDir,
}

impl World {
    fn new() -> Self {
        Self::build(false)
    }

    /// With a revocation list that revokes nobody.
    fn with_crl() -> Self {
        Self::build(true)
    }

    fn build(with_crl: bool) -> Self {
        let (clock, ca, folder) = (ManualClock::new(), authority(), TempDir::new().unwrap());
        let own = Self::own(&ca);
        let mut files = own.write(folder.path(), &ca.pem()).unwrap();
        if with_crl {
            files.crls.push(folder.path().join("ca.crl"));
            write_file(&files.crls[0], ca.crl(&[], day()).unwrap().as_bytes(), 0o644).unwrap();
        }
        let source = TlsSource::load(files.clone(), clock.clone(), Environment::production()).unwrap();
        Self { clock, ca, files, source, folder }
    }

    /// The agent's own certificate.
    fn own(ca: &LabCa) -> LabCertificate {
        ca.issue(&spiffe("/agent/a"), &["agent.example"], &[IpAddr::V4(Ipv4Addr::LOCALHOST)], day()).unwrap()
    }

    fn revoke(&self, serials: &[&Serial]) {
        let list = self.ca.crl(serials, day()).unwrap();
        write_file(&self.files.crls[0], list.as_bytes(), 0o644).unwrap();
    }

    fn peer(&self, path: &str) -> LabCertificate {
        self.ca.issue(&spiffe(path), &[], &[], day()).unwrap()
    }

    /// How a peer connects. Without a certificate: None.
    fn client(&self, certificate: Option<&LabCertificate>) -> ClientConfig {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.ca.pem().as_bytes()).unwrap()).unwrap();
        let config = ClientConfig::builder_with_details(provider(), Arc::new(TlsClock(self.clock.clone())))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots);
        let mut config = match certificate {
            Some(own) => config
                .with_client_auth_cert(
                    vec![own.der.clone()],
                    PrivateKeyDer::from_pem_slice(own.key_pem().as_bytes()).unwrap(),
                )
                .unwrap(),
            None => config.with_no_client_auth(),
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        config
    }

    async fn listen(&self, limits: AcceptLimits, peers: PeerLimits) -> Door {
        let (registry, enforcing) = PeerRegistry::new(self.source.clone(), peers);
        tokio::spawn(enforcing);
        let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let listener = Listener::new(Box::new(tcp), self.source.clone(), registry.clone(), limits);
        let (address, counters) = (listener.local_addr().unwrap(), listener.counters());
        let (incoming, accepting) = listener.incoming();
        tokio::spawn(accepting);
        Door { address, counters, registry, incoming }
    }

    async fn open(&self) -> Door {
        self.listen(AcceptLimits::default(), PeerLimits::default()).await
    }
}

/// The agent's listening side.
struct Door {
    address: SocketAddr,
    counters: Arc<AcceptCounters>,
    registry: PeerRegistry,
    incoming: Incoming,
}

impl Door {
    /// Connects, and takes the connection at the agent's side.
    async fn enter(&mut self, client: ClientConfig) -> (TlsStream<TcpStream>, TlsConnection) {
        let stream = soon(dial(self.address, client)).await.unwrap();
        let connection = soon(self.incoming.next()).await.unwrap().unwrap();
        (stream, connection)
    }

    /// Connects, and says how that was refused.
    async fn refusal(&self, client: ClientConfig) -> String {
        soon(async {
            match dial(self.address, client).await {
                // With TLS 1.3 a client is done before the server has looked at its certificate.
                Ok(mut stream) => match stream.read(&mut [0]).await {
                    Ok(read) => format!("end of stream after {read} bytes"),
                    Err(error) => error.to_string(),
                },
                Err(error) => error.to_string(),
            }
        })
        .await
    }
}

async fn dial(address: SocketAddr, client: ClientConfig) -> std::io::Result<TlsStream<TcpStream>> {
    let tcp = TcpStream::connect(address).await?;
    TlsConnector::from(Arc::new(client)).connect(ServerName::from(address.ip()), tcp).await
}
