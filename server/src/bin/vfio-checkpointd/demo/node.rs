//! The two nodes and the operator of the demo.

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::time::{Duration, SystemTime};

use rustls_pki_types::UnixTime;
use vfio_checkpoint_client::call::Client;
use vfio_checkpoint_client::connect::ConnectOptions;
use vfio_checkpoint_client::tls::{Credentials, ServerCheck, client_config};
use vfio_checkpoint_proto::ids::DeviceName;
use vfio_checkpoint_seal::Seal;
use vfio_checkpoint_server::config::{AgentConfig, DeviceConfig, StoreConfig};
use vfio_checkpoint_server::environment::Environment;
use vfio_checkpoint_server::security::identity::Identity;
use vfio_checkpoint_server::security::lab::{LabCa, Validity};
use vfio_checkpoint_server::security::roles::{Grant, Role};
use vfio_checkpoint_server::serve::Agent;

use super::Failure;

const OPERATOR: &str = "spiffe://demo.vfio-checkpoint/operator";

/// An authority that nobody trusts but the demo.
pub(super) struct Lab {
    ca: LabCa,
    validity: Validity,
}

/// An agent and a connection to it.
pub(super) struct Node {
    pub(super) name: &'static str,
    pub(super) agent: Agent,
    pub(super) operator: Client,
}

impl Lab {
    pub(super) fn new() -> Result<Self, Failure> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
        let validity = Validity::starting(UnixTime::since_unix_epoch(now), Duration::from_hours(1));
        Ok(Self { ca: LabCa::new(&"demo.vfio-checkpoint".parse()?, validity)?, validity })
    }

    /// Starts an agent with these devices, nic0 and on, in a folder of its own, and connects the operator to it.
    pub(super) async fn node(
        &self,
        name: &'static str,
        folder: &Path,
        devices: &[String],
    ) -> Result<Node, Failure> {
        let shared = folder.join("store");
        let folder = folder.join(name);
        std::fs::create_dir(&folder)?;
        let identity = Identity::Spiffe(format!("spiffe://demo.vfio-checkpoint/agent/{name}").parse()?);
        let issued =
            self.ca.issue(&identity, &["localhost"], &[IpAddr::V4(Ipv4Addr::LOCALHOST)], self.validity)?;
        let files = issued.write(&folder, &self.ca.pem())?;
        let mut config = AgentConfig::default();
        name.clone_into(&mut config.node.name);
        config.node.state_dir = folder.join("state");
        config.server.listen = (Ipv4Addr::LOCALHOST, 0).into();
        config.tls.certificate = files.certificate;
        config.tls.key = files.key;
        config.tls.client_ca = files.client_ca;
        config.grants = vec![
            Grant { who: OPERATOR.parse()?, roles: vec![Role::Saver, Role::Restorer, Role::Migrator] },
            Grant { who: "spiffe://demo.vfio-checkpoint/agent/*".parse()?, roles: vec![Role::Peer] },
        ];
        let device = |(index, address): (usize, &String)| DeviceConfig {
            name: format!("nic{index}"),
            address: address.clone(),
            owner_pod: String::new(),
            path: None,
        };
        config.devices = devices.iter().enumerate().map(device).collect();
        config.stores = vec![StoreConfig {
            name: "shared".to_owned(),
            location: shared.display().to_string(),
            endpoint: None,
            region: None,
            credentials: None,
            ca: None,
            allow_http: false,
            keep_free_bytes: None,
            collect_interval: None,
        }];
        config.validate()?;
        let agent = Agent::start(config, Environment::production()).await?;
        let operator = self.operator(&agent).await?;
        Ok(Node { name, agent, operator })
    }

    async fn operator(&self, agent: &Agent) -> Result<Client, Failure> {
        let issued = self.ca.issue(&Identity::Spiffe(OPERATOR.parse()?), &[], &[], self.validity)?;
        let credentials = Credentials::from_pem(
            issued.certificate_pem.as_bytes(),
            issued.key_pem().as_bytes(),
            self.ca.pem().as_bytes(),
        )?;
        let check = ServerCheck::Name(None);
        let tls = client_config(credentials, &check)?;
        let options = ConnectOptions::new(format!("https://{}", agent.address()), tls, check);
        Ok(Client::connect(&options).await?)
    }
}

impl Node {
    /// Digest of all that a device of the node holds. Only a simulated device can tell.
    pub(super) fn digest(&self, device: &str) -> Result<String, Failure> {
        let name: DeviceName = device.parse()?;
        let slot = self.agent.core().registry.get(&name).ok_or("the device is gone")?;
        let sim = slot.sim().ok_or("the device is not open")?;
        Ok(Seal { bytes: 0, blake3: sim.digest() }.hex())
    }
}
