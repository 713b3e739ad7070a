//! A lab: an authority, agents in this process on loopback with simulated devices, and clients with roles.
//!
//! Everything is real but the hardware: TLS, gRPC, journal on disk.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use rustls_pki_types::UnixTime;
use tempfile::TempDir;
use vfio_checkpoint_client::call::Client;
use vfio_checkpoint_client::connect::ConnectOptions;
use vfio_checkpoint_client::tls::{CredentialFiles, Credentials, ServerCheck, client_config};
use vfio_checkpoint_server::config::{AgentConfig, DeviceConfig};
use vfio_checkpoint_server::environment::Environment;
use vfio_checkpoint_server::security::files::TlsFiles;
use vfio_checkpoint_server::security::identity::Identity;
use vfio_checkpoint_server::security::lab::{LabCa, Validity};
use vfio_checkpoint_server::security::roles::{Grant, Role};
use vfio_checkpoint_server::serve::Agent;

/// Nothing that a test waits for takes longer, unless it never comes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Where agents of tests are: on loopback, or at either end of a link between two network namespaces.
const ADDRESSES: [Ipv4Addr; 3] =
    [Ipv4Addr::LOCALHOST, Ipv4Addr::new(192, 168, 77, 1), Ipv4Addr::new(192, 168, 77, 2)];

/// An authority, and what it has issued for one test.
pub(crate) struct Lab {
    pub(crate) ca: LabCa,
    pub(crate) folder: TempDir,
}

impl Lab {
    pub(crate) fn new() -> Self {
        let domain = "lab.test".parse().unwrap();
        Self { ca: LabCa::new(&domain, validity()).unwrap(), folder: tempfile::tempdir().unwrap() }
    }

    /// A configuration for an agent with these devices, each a name and an address. `ROLE` as in
    /// `spiffe://lab.test/ROLE/…` is granted to whoever bears it.
    pub(crate) fn config(&self, name: &str, devices: &[(&str, &str)]) -> AgentConfig {
        let files = self.certify(name, validity());
        let mut config = AgentConfig::default();
        config.node.state_dir = self.folder.path().join(name).join("state");
        config.server.listen = "127.0.0.1:0".parse().unwrap();
        // Givers of tests that are gone do not come back, but for those of `resumed`.
        config.server.stream_resume_window = Duration::from_millis(200);
        config.tls.certificate = files.certificate;
        config.tls.key = files.key;
        config.tls.client_ca = files.client_ca;
        config.grants = Role::ALL
            .iter()
            .map(|role| Grant {
                who: format!("spiffe://lab.test/{}/*", role.name()).parse().unwrap(),
                roles: vec![*role],
            })
            .chain([Grant { who: "spiffe://lab.test/agent/*".parse().unwrap(), roles: vec![Role::Peer] }])
            .collect();
        config.devices = devices
            .iter()
            .map(|(name, address)| DeviceConfig {
                name: (*name).to_owned(),
                address: (*address).to_owned(),
                path: None,
                owner_pod: String::new(),
            })
            .collect();
        config
    }

    /// Gives an agent of this name a certificate, in the place of the one that it had.
    pub(crate) fn certify(&self, name: &str, validity: Validity) -> TlsFiles {
        self.certify_as(name, &format!("spiffe://lab.test/agent/{name}"), validity)
    }

    /// The same, as somebody else.
    pub(crate) fn certify_as(&self, name: &str, identity: &str, validity: Validity) -> TlsFiles {
        let folder = self.folder.path().join(name);
        std::fs::create_dir_all(&folder).unwrap();
        let identity = Identity::Spiffe(identity.parse().unwrap());
        let issued = self.ca.issue(&identity, &["localhost"], &ADDRESSES.map(IpAddr::V4), validity).unwrap();
        issued.write(&folder, &self.ca.pem()).unwrap()
    }

    /// A client that bears this role, or none that any agent knows.
    pub(crate) async fn client(&self, agent: &Agent, role: &str) -> Client {
        self.client_named(agent, &format!("spiffe://lab.test/{role}/test")).await
    }

    pub(crate) async fn client_named(&self, agent: &Agent, identity: &str) -> Client {
        self.client_at(agent.address(), identity).await
    }

    /// A client of an agent in whatever process.
    pub(crate) async fn client_at(&self, address: SocketAddr, identity: &str) -> Client {
        let identity = Identity::Spiffe(identity.parse().unwrap());
        let issued = self.ca.issue(&identity, &[], &[], validity()).unwrap();
        let credentials = Credentials::from_pem(
            issued.certificate_pem.as_bytes(),
            issued.key_pem().as_bytes(),
            self.ca.pem().as_bytes(),
        )
        .unwrap();
        Self::client_with(address, credentials).await
    }

    /// A client with the certificate and the key of the agent of this name.
    pub(crate) async fn client_as(&self, agent: &Agent, name: &str) -> Client {
        let folder = self.folder.path().join(name);
        let files = CredentialFiles {
            certificate: folder.join("tls.crt"),
            key: folder.join("tls.key"),
            ca: folder.join("ca.crt"),
        };
        Self::client_with(agent.address(), Credentials::from_files(&files).unwrap()).await
    }

    async fn client_with(address: SocketAddr, credentials: Credentials) -> Client {
        let check = ServerCheck::Name(None);
        let tls = client_config(credentials, &check).unwrap();
        let options = ConnectOptions::new(format!("https://{address}"), tls, check);
        Client::connect(&options).await.unwrap()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

pub(crate) async fn start(config: AgentConfig) -> Agent {
    Agent::start(config, Environment::production()).await.unwrap()
}

pub(crate) fn validity() -> Validity {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    Validity::starting(UnixTime::since_unix_epoch(now), Duration::from_hours(1))
}
