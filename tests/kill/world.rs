//! Device processes, the holder and the agent of one test, and states that can be told apart.
//!
//! ```text
//!   vfio-user-device x n <--socket-- agent --keepsakes--> holder
//!                                      ^ stdin: arm, release; stderr: at, stopped at
//!                                    client
//! ```
//! A device carries one of three contents: [`Content::Fresh`], as at power-on and after a reset; [`Content::Own`], what
//! it carries when a job begins; [`Content::Other`], what a restore brings. Each has its own seal.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use rustix::process::Signal;
use serde_json::{Value, json};
use vfio_checkpoint_client::call::Client;
use vfio_checkpoint_device::sim::SimDevice;
use vfio_checkpoint_device::{Call, DeviceAddress, MigrationDevice as _, Read as Got, Threads};
use vfio_checkpoint_fsm::State;
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_server::config::AgentConfig;
use vfio_checkpoint_server::security::lab::Validity;
use vfio_checkpoint_server::serve::Agent;

use crate::children;
use crate::job::{Job, Saved};
use crate::lab::Lab;
use crate::process::{Process, program};
use crate::two::namespaces::Far;
use crate::two::watch;

/// Several chunks, and quick to move.
pub(crate) const MEMORY: &str = "memory=256KiB";

/// What a device carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Content {
    Fresh,
    Own,
    Other,
}

/// Everything of one test; or, of a test with two nodes, everything of one of them.
pub(crate) struct World {
    lab: Arc<Lab>,
    /// What the agent is called.
    name: String,
    /// Where the devices say what they do, if they do.
    told: Option<PathBuf>,
    /// Whether the agent and the holder are the programs, and not this test program.
    programs: bool,
    config: PathBuf,
    /// Where the agent is on its network, if it is not on loopback here.
    far: Option<Arc<Far>>,
    devices: Vec<Process>,
    holder: Option<Process>,
    agent: Option<Process>,
    address: Option<SocketAddr>,
    /// What a save of each device brings, by its content.
    pub(crate) known: Vec<[Option<v1::Seal>; 3]>,
    /// Any manifest of a set of all devices.
    pub(crate) manifest: Option<v1::CheckpointManifest>,
}

impl World {
    /// A world with so many devices, whose agent is running. Every device carries its own content.
    pub(crate) async fn new(devices: usize, with_holder: bool) -> Self {
        let mut world = Self::made(Arc::new(Lab::new()), "agent", None, devices, with_holder, false).await;
        world.start().await;
        world.learn().await;
        world
    }

    /// A node of this name among others of the same authority, whose agent is not started yet. Its devices, which carry what
    /// they have at power-on, say in the file `told` what they do.
    pub(crate) async fn node(
        lab: &Arc<Lab>,
        name: &str,
        told: &Path,
        devices: usize,
        with_holder: bool,
    ) -> Self {
        Self::made(Arc::clone(lab), name, Some(told.to_owned()), devices, with_holder, false).await
    }

    /// The same with the programs, as they are built for whoever runs them.
    pub(crate) async fn of_programs(devices: usize, with_holder: bool) -> Self {
        let mut world = Self::made(Arc::new(Lab::new()), "agent", None, devices, with_holder, true).await;
        world.start().await;
        world.learn().await;
        world
    }

    async fn made(
        lab: Arc<Lab>,
        name: &str,
        told: Option<PathBuf>,
        devices: usize,
        with_holder: bool,
        programs: bool,
    ) -> Self {
        let names: Vec<String> = (0..devices).map(|index| format!("nic{index}")).collect();
        let mut world = Self {
            name: name.to_owned(),
            told,
            programs,
            config: lab.path(&format!("{name}.toml")),
            far: None,
            devices: Vec::new(),
            holder: None,
            agent: None,
            address: None,
            known: vec![[const { None }; 3]; devices],
            manifest: None,
            lab,
        };
        for index in 0..devices {
            world.start_device(index, &format!("sim:seed={},{MEMORY}", index + 1)).await;
        }
        world.write_config(&names, with_holder);
        if with_holder {
            world.start_holder().await;
        }
        world
    }

    /// Whether there is a holder.
    pub(crate) fn is_kept(&self) -> bool {
        self.holder.is_some()
    }

    pub(crate) fn len(&self) -> usize {
        self.known.len()
    }

    pub(crate) fn socket(&self, index: usize) -> PathBuf {
        self.lab.path(&format!("{}-nic{index}.sock", self.name))
    }

    fn holder_socket(&self) -> PathBuf {
        self.lab.path(&format!("{}-hold/agent.sock", self.name))
    }

    pub(crate) async fn start_device(&mut self, index: usize, device: &str) {
        let mut command = if let Some(told) = &self.told {
            watch::command(&self.socket(index), device, &format!("{}/{index}", self.name), told)
        } else {
            let mut command = Command::new(program("vfio-user-device", "vfio-checkpoint-device"));
            command.arg("--socket").arg(self.socket(index)).args(["--device", device]);
            command
        };
        let mut process = Process::start(&format!("device {index}"), &mut command);
        process.wait_for("listening", |line| line.contains("listening on").then_some(())).await;
        self.put_device(index, process);
    }

    pub(crate) fn put_device(&mut self, index: usize, process: Process) {
        self.devices.insert(index, process);
    }

    /// A device process stands still, or goes on.
    pub(crate) fn signal_device(&self, index: usize, signal: Signal) {
        self.devices[index].signal(signal);
    }

    /// The next agent waits no longer than this for a call on a device.
    pub(crate) fn limit_calls(&self, limit: &str) {
        self.configure(&format!("limits.device_call_timeout = \"{limit}\""));
    }

    /// The next agent is configured with this line, too.
    pub(crate) fn configure(&self, line: &str) {
        let config = fs::read_to_string(&self.config).unwrap();
        fs::write(&self.config, format!("{line}\n{config}")).unwrap();
    }

    /// The next agent knows of no device. What it was configured with before.
    pub(crate) fn without_devices(&self) -> String {
        let config = fs::read_to_string(&self.config).unwrap();
        let devices = config.find("[[devices]]").expect("there are devices");
        fs::write(&self.config, &config[..devices]).unwrap();
        config
    }

    /// The next agent listens there, and is on the network of the far end of a link where one is given.
    pub(crate) fn listen(&mut self, address: SocketAddr, far: Option<&Arc<Far>>) {
        let config = fs::read_to_string(&self.config).unwrap();
        let there = config.replace("127.0.0.1:0", &address.to_string());
        assert_ne!(there, config);
        fs::write(&self.config, there).unwrap();
        self.far = far.cloned();
    }

    pub(crate) fn restore_config(&self, config: &str) {
        fs::write(&self.config, config).unwrap();
    }

    pub(crate) fn write_config(&self, names: &[String], with_holder: bool) {
        let addresses: Vec<String> =
            (0..names.len()).map(|index| format!("vfio-user:{}", self.socket(index).display())).collect();
        let pairs: Vec<(&str, &str)> =
            names.iter().map(String::as_str).zip(addresses.iter().map(String::as_str)).collect();
        let mut config = self.lab.config(&self.name, &pairs);
        if with_holder {
            config.holder.socket = Some(self.holder_socket());
        }
        // The smallest: a state is several chunks.
        config.limits.max_chunk_bytes = 64 << 10;
        fs::write(&self.config, toml(&config)).unwrap();
    }

    pub(crate) async fn start_holder(&mut self) {
        let mut command = if self.programs {
            let mut command = Command::new(program("vfio-checkpointd", "vfio-checkpoint-server"));
            command.arg("hold").arg("--socket").arg(self.holder_socket());
            command
        } else {
            children::holder(&self.holder_socket())
        };
        let mut holder = Process::start("holder", &mut command);
        holder.wait_for("holding", |line| line.contains("holding ").then_some(())).await;
        self.holder = Some(holder);
    }

    pub(crate) fn holder(&mut self) -> &mut Process {
        self.holder.as_mut().unwrap()
    }

    pub(crate) fn kill_holder(&mut self) {
        self.holder.take().unwrap().kill();
    }

    pub(crate) fn kill_device(&mut self, index: usize) {
        self.devices.remove(index).kill();
    }

    /// Starts the agent and waits until it is served.
    pub(crate) async fn start(&mut self) {
        self.launch("");
        self.served().await;
    }

    /// Starts the agent. It stops where it is told, as in `FAILPOINTS`.
    pub(crate) fn launch(&mut self, failpoints: &str) {
        assert!(self.agent.is_none(), "the agent runs");
        let mut command = if self.programs {
            let mut command = Command::new(program("vfio-checkpointd", "vfio-checkpoint-server"));
            command.arg("serve").arg("--config").arg(&self.config);
            command
        } else {
            children::agent(&self.config, failpoints)
        };
        if let Some(far) = &self.far {
            command = far.there(&command);
        }
        self.agent = Some(Process::start("agent", &mut command));
    }

    /// Waits until the agent is served.
    pub(crate) async fn served(&mut self) {
        let address = self.agent().wait_for("where it is served", |line| {
            let line: Value = serde_json::from_str(line).ok()?;
            let fields = &line["fields"];
            (fields["message"] == "serving").then(|| fields["address"].as_str()?.parse().ok())?
        });
        self.address = Some(address.await);
    }

    pub(crate) fn agent(&mut self) -> &mut Process {
        self.agent.as_mut().expect("the agent runs")
    }

    /// Has the agent stop where it comes to `point` for the `times`th time.
    pub(crate) async fn arm(&mut self, point: &str, times: u32) {
        self.agent().tell(&format!("arm {times} {point}"));
        self.agent().wait_for("that it is armed", |line| (line == "armed").then_some(())).await;
    }

    /// Waits until the agent has stopped where it was told to.
    pub(crate) async fn stopped(&mut self, point: &str) {
        let line = format!("stopped at {point}");
        self.agent().wait_for(&line, |said| (said == line).then_some(())).await;
    }

    /// Has what the agent's journal is told of `step` fail.
    pub(crate) async fn fail(&mut self, step: &str) {
        self.agent().tell(&format!("fail 0 commit of {step}"));
        self.agent().wait_for("that it fails", |line| (line == "fails").then_some(())).await;
    }

    /// Waits until that has failed.
    pub(crate) async fn failed(&mut self, step: &str) {
        let line = format!("failed at commit of {step}");
        self.agent().wait_for(&line, |said| (said == line).then_some(())).await;
    }

    /// The agent's journal works again.
    pub(crate) async fn mend(&mut self) {
        self.agent().tell("mend all");
        self.agent().wait_for("that it is mended", |line| (line == "mended").then_some(())).await;
    }

    /// Lets the agent go on from where it has stopped.
    pub(crate) fn release(&mut self) {
        self.agent().tell("release");
    }

    /// The agent's process stands still, or goes on.
    pub(crate) fn signal_agent(&mut self, signal: Signal) {
        self.agent().signal(signal);
    }

    /// Kills the agent with SIGKILL.
    pub(crate) fn kill_agent(&mut self) {
        self.address = None;
        self.agent.take().expect("the agent runs").kill();
    }

    /// Takes the role of every client away, in the file. The agent finds out when it is told to read it again.
    pub(crate) fn take_away_the_role(&self) {
        let config = fs::read_to_string(&self.config).unwrap();
        let without = config.replace("spiffe://lab.test/admin/*", "spiffe://lab.test/another/*");
        assert_ne!(without, config);
        fs::write(&self.config, without).unwrap();
    }

    /// Gives the agent another certificate, which it finds when it looks.
    pub(crate) fn certify(&self, validity: Validity) {
        let _files = self.lab.certify(&self.name, validity);
    }

    /// What the agent reads.
    pub(crate) fn config(&self) -> AgentConfig {
        AgentConfig::load(Some(&self.config), json!({})).unwrap()
    }

    /// Where the agent has its store.
    pub(crate) fn store(&self) -> PathBuf {
        self.config().node.state_dir.join("checkpoints")
    }

    /// A client of an agent in this process.
    pub(crate) async fn client_of(&self, agent: &Agent) -> Client {
        self.lab.client(agent, "admin").await
    }

    /// A client of the agent that runs, with a certificate of this identity.
    pub(crate) async fn client_as(&self, identity: &str) -> Client {
        self.lab.client_at(self.address(), identity).await
    }

    pub(crate) async fn client(&self) -> Client {
        self.lab.client_at(self.address(), "spiffe://lab.test/admin/test").await
    }

    /// Learns the seal of every content of every device, and leaves each device with its own.
    pub(crate) async fn learn(&mut self) {
        let client = self.client().await;
        for content in [Content::Fresh, Content::Other, Content::Own] {
            if content != Content::Fresh {
                self.load(&client, content).await;
            }
            let saved = self.save(&client).await;
            for (known, seal) in self.known.iter_mut().zip(saved.seals) {
                known[content as usize] = Some(seal);
            }
            self.manifest = Some(saved.manifest);
        }
        for known in &self.known {
            assert!(known[0] != known[1] && known[1] != known[2] && known[0] != known[2], "{known:?}");
        }
    }

    /// A whole save of all devices: what the tests know devices by.
    pub(crate) async fn save(&self, client: &Client) -> Saved {
        Job::save(self.len()).saved(client).await
    }

    /// Brings a content into all devices.
    pub(crate) async fn load(&self, client: &Client, content: Content) {
        let ended = Job::restore(self.len()).run(client, self, content).await;
        assert_eq!(ended.result(), v1::OperationResult::Succeeded, "{ended:?}");
    }

    /// What every device carries, by a save: so every device takes a new one, too.
    pub(crate) async fn contents(&self, client: &Client) -> Vec<Content> {
        let saved = self.save(client).await;
        let contents = saved.seals.iter().zip(&self.known).map(|(seal, known)| {
            [Content::Fresh, Content::Own, Content::Other]
                .into_iter()
                .find(|content| known[*content as usize].as_ref() == Some(seal))
                .unwrap_or_else(|| panic!("a state that nobody has brought: {seal:?}, known are {known:?}"))
        });
        contents.collect()
    }

    /// The devices as the agent sees them.
    pub(crate) async fn devices(&self, client: &Client) -> Vec<v1::Device> {
        let mut devices = Vec::new();
        for index in 0..self.len() {
            let request = v1::GetDeviceRequest { name: format!("devices/nic{index}") };
            devices.push(client.get_device(request).await.unwrap().device.unwrap());
        }
        devices
    }

    /// Where the agent is served.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address.expect("the agent is served")
    }

    /// What the agent said last, for a test that fails.
    pub(crate) fn log(&self) -> String {
        self.agent.as_ref().map(Process::said).unwrap_or_default()
    }
}

/// The whole state that a device of this seed would save.
pub(crate) fn state(seed: usize) -> Vec<u8> {
    let DeviceAddress::Sim(address) = format!("sim:seed={seed},{MEMORY}").parse().unwrap() else {
        unreachable!("it is simulated")
    };
    let slot = SimDevice::new(address.config().unwrap(), Arc::new(Threads::new())).unwrap();
    let mut device = slot.open().unwrap();
    let target = State::StopCopy;
    let mut stream = device.set_state(target).unwrap().unwrap().into_save(Call::SetState(target)).unwrap();
    let (mut state, mut buffer) = (Vec::new(), vec![0; 64 << 10]);
    loop {
        match stream.read(&mut buffer).unwrap() {
            Got::Bytes(bytes) => state.extend_from_slice(&buffer[..bytes]),
            Got::Zero => return state,
            Got::NothingNow => panic!("nothing now, in STOP_COPY"),
        }
    }
}

/// A configuration as its file. Of all that there is only what a test sets.
fn toml(config: &AgentConfig) -> String {
    let quoted = |value: &dyn std::fmt::Display| serde_json::to_string(&value.to_string()).unwrap();
    let path = |path: &Path| quoted(&path.display());
    let tls = &config.tls;
    let mut lines = vec![
        format!("node.state_dir = {}", path(&config.node.state_dir)),
        format!("server.listen = {}", quoted(&config.server.listen)),
        format!("limits.max_chunk_bytes = {}", config.limits.max_chunk_bytes),
        "telemetry.format = \"json\"".to_owned(),
        format!("tls.certificate = {}", path(&tls.certificate)),
        format!("tls.key = {}", path(&tls.key)),
        format!("tls.client_ca = {}", path(&tls.client_ca)),
    ];
    lines.extend(config.holder.socket.iter().map(|socket| format!("holder.socket = {}", path(socket))));
    lines.extend(
        config
            .grants
            .iter()
            .map(|grant| format!("[[grants]]\nwho = {}\nroles = {}", json!(grant.who), json!(grant.roles))),
    );
    lines.extend(config.devices.iter().map(|device| {
        format!("[[devices]]\nname = {}\naddress = {}", quoted(&device.name), quoted(&device.address))
    }));
    lines.join("\n")
}
