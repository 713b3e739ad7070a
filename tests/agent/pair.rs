//! Two agents, and devices that move from the one to the other.

use vfio_checkpoint_client::call::{CallError, Client};
use vfio_checkpoint_device::fault::Fault;
use vfio_checkpoint_device::sim::SimConfig;
use vfio_checkpoint_fsm::State;
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_server::config::AgentConfig;
use vfio_checkpoint_server::environment::Environment;
use vfio_checkpoint_server::serve::Agent;

use crate::flow::{Bench, device};
use crate::lab::Lab;

/// The names of a set's devices, on both sides.
pub(crate) const NAMES: [&str; 2] = ["n0", "n1"];

/// Two agents with as many devices each.
pub(crate) struct Pair {
    pub(crate) lab: Lab,
    pub(crate) source: Agent,
    pub(crate) destination: Agent,
    /// The devices of the source, which the test can look at.
    pub(crate) here: Vec<Bench>,
    /// Those of the destination.
    pub(crate) there: Vec<Bench>,
}

/// A device that has nothing of its own in common with another one of another number.
pub(crate) fn small(seed: u64) -> SimConfig {
    SimConfig { seed, memory_bytes: 1 << 20, ..SimConfig::default() }
}

/// The key of an agent, as Admit and `GetAgent` say it.
pub(crate) fn key(agent: &Agent) -> bytes::Bytes {
    bytes::Bytes::copy_from_slice(&agent.core().own_key().unwrap().0)
}

impl Pair {
    pub(crate) async fn new(devices: u64) -> Self {
        Self::with(devices, small, &[], &[], |_| {}).await
    }

    /// With these faults in the last device of the source, and of the destination.
    pub(crate) async fn with(
        devices: u64,
        kind: impl Fn(u64) -> SimConfig,
        here: &[Fault],
        there: &[Fault],
        configure: impl Fn(&mut AgentConfig),
    ) -> Self {
        let environments = [Environment::production(), Environment::production()];
        Self::within(devices, kind, here, there, configure, environments).await
    }

    /// In these environments, of the source and of the destination.
    pub(crate) async fn within(
        devices: u64,
        kind: impl Fn(u64) -> SimConfig,
        here: &[Fault],
        there: &[Fault],
        configure: impl Fn(&mut AgentConfig),
        [at_source, at_destination]: [Environment; 2],
    ) -> Self {
        let lab = Lab::new();
        let bench = |first: u64, faults: &[Fault]| -> Vec<Bench> {
            (0..devices)
                .map(|index| {
                    Bench::with(kind(first + index), if index + 1 == devices { faults } else { &[] })
                })
                .collect()
        };
        let (here, there) = (bench(1, here), bench(101, there));
        let config = |name: &str, benches: &[Bench]| {
            let devices: Vec<(&str, &str)> =
                NAMES.iter().zip(benches).map(|(name, bench)| (*name, bench.address.as_str())).collect();
            let mut config = lab.config(name, &devices);
            configure(&mut config);
            config
        };
        let (from, to) = (config("source", &here), config("destination", &there));
        let source = Agent::start(from, at_source).await.unwrap();
        let destination = Agent::start(to, at_destination).await.unwrap();
        let pair = Self { lab, source, destination, here, there };
        pair.fill();
        pair
    }

    /// Somebody who may migrate, at the source and at the destination.
    pub(crate) async fn migrator(&self) -> (Client, Client) {
        (
            self.lab.client(&self.source, "migrator").await,
            self.lab.client(&self.destination, "migrator").await,
        )
    }

    pub(crate) fn names(&self) -> Vec<String> {
        NAMES[..self.here.len()].iter().map(|name| format!("devices/{name}")).collect()
    }

    /// What is asked of the destination, for all devices of the source.
    pub(crate) async fn admission(&self, source: &Client) -> v1::AdmitRequest {
        let agent = source.get_agent(v1::GetAgentRequest {}).await.unwrap();
        let mut logical_devices = Vec::new();
        for name in &NAMES[..self.here.len()] {
            logical_devices.push(device(source, name).await.logical_device.unwrap());
        }
        v1::AdmitRequest {
            logical_devices,
            devices: self.names(),
            source_key_sha256: agent.key_sha256,
            ..Default::default()
        }
    }

    /// What is asked of the source, with this ticket.
    pub(crate) fn request(&self, ticket: bytes::Bytes) -> v1::MigrateRequest {
        v1::MigrateRequest {
            devices: self.names(),
            target: Some(v1::MigrationTarget {
                endpoint: format!("https://localhost:{}", self.destination.address().port()),
                spiffe_id: "spiffe://lab.test/agent/destination".to_owned(),
                devices: self.names(),
                key_sha256: key(&self.destination),
            }),
            ticket,
            memory_capture: v1::MemoryCapture::None.into(),
            ..Default::default()
        }
    }

    /// Asks for a ticket, and has the source migrate everything, as `change` wants it.
    pub(crate) async fn migrate(
        &self,
        change: impl FnOnce(&mut v1::AdmitRequest, &mut v1::MigrateRequest),
    ) -> Result<v1::MigrateResponse, CallError> {
        let (source, destination) = self.migrator().await;
        let mut admission = self.admission(&source).await;
        let mut request = self.request(bytes::Bytes::new());
        change(&mut admission, &mut request);
        request.ticket = destination.admit(admission).await?.ticket;
        source.migrate(request).await
    }

    /// The same, where it is admitted: the operation's name.
    pub(crate) async fn start(
        &self,
        change: impl FnOnce(&mut v1::AdmitRequest, &mut v1::MigrateRequest),
    ) -> String {
        self.migrate(change).await.unwrap().operation.unwrap().name
    }

    /// Gives every device of the source something of its own, which no reset leaves.
    fn fill(&self) {
        for (number, bench) in (1..).zip(&self.here) {
            bench.device.set_scratch(number);
            bench.device.write_memory(4096 * number, &[0xA5; 100]).unwrap();
        }
    }

    /// What the devices of each side carry.
    pub(crate) fn digests(&self) -> (Vec<[u8; 32]>, Vec<[u8; 32]>) {
        let of = |benches: &[Bench]| benches.iter().map(|bench| bench.device.digest()).collect();
        (of(&self.here), of(&self.there))
    }

    /// Whether every device of both sides runs.
    pub(crate) fn all_run(&self) -> bool {
        self.here.iter().chain(&self.there).all(|bench| bench.device.state() == State::Running)
    }

    pub(crate) async fn stop(self) {
        let Self { source, destination, .. } = self;
        source.stop().await.unwrap();
        destination.stop().await.unwrap();
    }
}
