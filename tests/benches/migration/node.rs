//! Two agents, each a process, and a migration from one to the other as an operator asks for it.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::json;
use vfio_checkpoint_client::call::{CallError, Client, new_request_id};
use vfio_checkpoint_client::connect::{ConnectError, ConnectOptions};
use vfio_checkpoint_client::tls::{Credentials, ServerCheck, client_config};
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_server::config::ServerConfig;
use vfio_checkpoint_server::security::identity::Identity;
use vfio_checkpoint_server::security::lab::LabCa;

use crate::child::{Child, Usage};
use crate::lab::{Lab, validity};
use crate::link::Link;
use crate::timed::Span;

/// No migration of the benchmark takes longer.
pub(crate) const PATIENCE: Duration = Duration::from_mins(10);

/// An authority, and a folder on a real disk: journals are in it.
pub(crate) fn lab() -> Lab {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    Lab { ca: LabCa::new(&"lab.test".parse().unwrap(), validity()).unwrap(), folder }
}

/// An agent.
pub(crate) struct Node {
    pub(crate) child: Child,
    pub(crate) address: SocketAddr,
    pub(crate) client: Client,
    pub(crate) config: PathBuf,
}

/// Where an agent is started.
pub(crate) enum Place<'a> {
    /// On loopback, here.
    Here,
    /// At the far end of a link.
    Far(&'a Link),
}

/// Writes an agent's configuration, for devices at these addresses, `nic0` and on.
pub(crate) fn config(
    lab: &Lab,
    name: &str,
    listen: &str,
    devices: &[String],
    holder: Option<&Path>,
) -> PathBuf {
    let names: Vec<String> = (0..devices.len()).map(device_id).collect();
    let pairs: Vec<(&str, &str)> =
        names.iter().zip(devices).map(|(name, address)| (name.as_str(), address.as_str())).collect();
    let mut config = lab.config(name, &pairs);
    config.server.listen = listen.parse().unwrap();
    config.server.stream_resume_window = ServerConfig::default().stream_resume_window;
    config.holder.socket = holder.map(Path::to_owned);
    let path = lab.path(&format!("{name}.json"));
    std::fs::write(&path, serde_json::to_vec(&config).unwrap()).unwrap();
    path
}

fn device_id(index: usize) -> String {
    format!("nic{index}")
}

pub(crate) fn device_name(index: usize) -> String {
    format!("devices/{}", device_id(index))
}

impl Node {
    /// Starts an agent out of its configuration.
    pub(crate) async fn start(lab: &Lab, name: &str, config: PathBuf, place: &Place<'_>) -> Self {
        let arguments = ["agent", config.to_str().unwrap()];
        let mut child = match place {
            Place::Here => Child::of(Command::new(std::env::current_exe().unwrap()).args(arguments)),
            Place::Far(link) => link.start(&arguments),
        };
        let address = child.hear().parse().unwrap();
        let client = connect(lab, name, address).await.unwrap();
        Self { child, address, client, config }
    }

    /// What its device and its journal have done since it was asked last.
    pub(crate) fn spans(&mut self) -> Vec<Span> {
        self.child.say("spans");
        Span::read(&self.child.hear())
    }

    pub(crate) fn usage(&self) -> Usage {
        self.child.usage()
    }
}

/// An operator, at an agent that is known by its identity: its address is in no certificate.
async fn connect(lab: &Lab, name: &str, address: SocketAddr) -> Result<Client, ConnectError> {
    let who = Identity::Spiffe("spiffe://lab.test/migrator/bench".parse().unwrap());
    let issued = lab.ca.issue(&who, &[], &[], validity()).unwrap();
    let authority = lab.ca.pem();
    let (chain, key) = (issued.certificate_pem.as_bytes(), issued.key_pem());
    let credentials = Credentials::from_pem(chain, key.as_bytes(), authority.as_bytes()).unwrap();
    let check = ServerCheck::SpiffeId(format!("spiffe://lab.test/agent/{name}").parse().unwrap());
    let tls = client_config(credentials, &check).unwrap();
    Client::connect(&ConnectOptions::new(format!("https://{address}"), tls, check)).await
}

/// Two agents.
pub(crate) struct Pair {
    pub(crate) source: Node,
    pub(crate) destination: Node,
    /// Where the source reaches the destination.
    pub(crate) to: SocketAddr,
    _lab: Lab,
}

impl Pair {
    /// Agents with simulated devices of their own: of the source as `busy` says, of the destination with as much memory.
    pub(crate) async fn new(
        link: Option<&Link>,
        devices: usize,
        memory_bytes: u64,
        dirty_bytes_s: u64,
    ) -> Self {
        let lab = lab();
        let address = |first: usize, dirty: u64| -> Vec<String> {
            let each = |seed| format!("sim:seed={seed},memory={memory_bytes},dirty={dirty}");
            (first..first + devices).map(each).collect()
        };
        let (place, listen) = match link {
            Some(link) => (Place::Far(link), link.listen()),
            None => (Place::Here, "127.0.0.1:0".to_owned()),
        };
        let from = config(&lab, "source", "127.0.0.1:0", &address(1, dirty_bytes_s), None);
        let to = config(&lab, "destination", &listen, &address(1001, 0), None);
        let source = Node::start(&lab, "source", from, &Place::Here).await;
        let destination = Node::start(&lab, "destination", to, &place).await;
        let to = match link {
            Some(link) => link.to(destination.address).await,
            None => destination.address,
        };
        Self { source, destination, to, _lab: lab }
    }

    /// Asks for a ticket, and for the migration of one device; how it ended, and how long that took from the call on.
    pub(crate) async fn migrate(&self, index: usize, pre_copy: v1::PreCopyMode) -> Result<Moved, CallError> {
        let request =
            request(&self.source.client, &self.destination.client, self.to, index, pre_copy).await?;
        let begun = Instant::now();
        let name = self.source.client.migrate(request).await?.operation.unwrap_or_default().name;
        let ended = self.source.client.wait_operation(&name, PATIENCE).await?.operation.unwrap_or_default();
        Ok(Moved { seconds: begun.elapsed().as_secs_f64(), operation: ended })
    }
}

/// How a migration ended.
pub(crate) struct Moved {
    /// From the call until it was over.
    pub(crate) seconds: f64,
    pub(crate) operation: v1::Operation,
}

impl Moved {
    /// It succeeded, or the benchmark ends here.
    pub(crate) fn well(self) -> Self {
        assert!(self.is_well(), "a migration did not succeed: {:?}", self.operation);
        self
    }

    pub(crate) fn is_well(&self) -> bool {
        self.operation.result() == v1::OperationResult::Succeeded
    }

    pub(crate) fn downtime_ms(&self) -> f64 {
        millis(self.operation.downtime.as_ref())
    }

    pub(crate) fn predicted_ms(&self) -> f64 {
        millis(self.operation.predicted_downtime.as_ref())
    }

    pub(crate) fn pre_copy_bytes(&self) -> u64 {
        self.operation.devices.iter().map(|device| device.pre_copy_bytes).sum()
    }
}

fn millis(duration: Option<&prost_types::Duration>) -> f64 {
    let duration = duration.and_then(|duration| Duration::try_from(*duration).ok());
    duration.unwrap_or_default().as_secs_f64() * 1000.0
}

/// What is asked of the source, with a ticket of the destination.
pub(crate) async fn request(
    source: &Client,
    destination: &Client,
    to: SocketAddr,
    index: usize,
    pre_copy: v1::PreCopyMode,
) -> Result<v1::MigrateRequest, CallError> {
    let names = vec![device_name(index)];
    let agent = source.get_agent(v1::GetAgentRequest {}).await?;
    let device = source.get_device(v1::GetDeviceRequest { name: names[0].clone() }).await?.device;
    let admission = v1::AdmitRequest {
        logical_devices: device.and_then(|device| device.logical_device).into_iter().collect(),
        devices: names.clone(),
        source_key_sha256: agent.key_sha256,
        ..v1::AdmitRequest::default()
    };
    let admitted = destination.admit(admission).await?;
    Ok(v1::MigrateRequest {
        devices: names.clone(),
        target: Some(v1::MigrationTarget {
            endpoint: format!("https://{to}"),
            spiffe_id: "spiffe://lab.test/agent/destination".to_owned(),
            devices: names,
            key_sha256: admitted.key_sha256,
        }),
        ticket: admitted.ticket,
        pre_copy: pre_copy.into(),
        memory_capture: v1::MemoryCapture::None.into(),
        request_id: new_request_id().unwrap_or_default(),
        ..v1::MigrateRequest::default()
    })
}

/// A number as the document has it.
pub(crate) fn rounded(value: f64) -> serde_json::Value {
    json!((value * 1000.0).round() / 1000.0)
}
