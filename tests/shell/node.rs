//! A node: the agent in a process of its own, and a shell beside it.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use rustls_pki_types::UnixTime;
use serde_json::{Value, json};
use vfio_checkpoint_server::security::identity::Identity;
use vfio_checkpoint_server::security::lab::{LabCa, Validity};

use crate::lab::{Lab, PATIENCE, validity};
use crate::process::{Process, program};
use crate::said::Said;

/// The devices of most tests.
pub(crate) const DEVICES: [(&str, &str); 3] = [
    ("lone", "sim:seed=3,memory=128KiB,p2p=no,pre_copy=no"),
    ("nic0", "sim:seed=1,memory=256KiB"),
    ("nic1", "sim:seed=2,memory=256KiB"),
];

pub(crate) struct Node {
    pub(crate) lab: Arc<Lab>,
    config: PathBuf,
    agent: Option<Process>,
    address: SocketAddr,
}

impl Node {
    /// A node whose agent runs, with two stores: `local`, which is meant where none is said, and `shelf`, a folder.
    pub(crate) async fn new(devices: &[(&str, &str)]) -> Self {
        Self::with(Lab::new(), devices, "").await
    }

    /// The same with more lines at the beginning of the agent's configuration.
    pub(crate) async fn with(lab: Lab, devices: &[(&str, &str)], more: &str) -> Self {
        Self::named(Arc::new(lab), "agent", devices, more).await
    }

    /// Another node under the same authority.
    pub(crate) async fn beside(&self, name: &str, devices: &[(&str, &str)]) -> Self {
        Self::named(Arc::clone(&self.lab), name, devices, "").await
    }

    async fn named(lab: Arc<Lab>, name: &str, devices: &[(&str, &str)], more: &str) -> Self {
        let config = lab.path(&format!("{name}.toml"));
        fs::write(&config, toml(&lab, name, devices, more)).unwrap();
        for role in ["admin", "viewer"] {
            issue(&lab.ca, &lab.ca, role, &lab.path(role), validity());
        }
        let mut node = Self { lab, config, agent: None, address: ([127, 0, 0, 1], 0).into() };
        node.start().await;
        // An agent that comes back does so where it was.
        let at = format!("server.listen = \"{}\"", node.address);
        node.change("server.listen = \"127.0.0.1:0\"", &at);
        node
    }

    pub(crate) async fn start(&mut self) {
        assert!(self.agent.is_none(), "the agent runs");
        let mut command = Command::new(program("vfio-checkpointd", "vfio-checkpoint-server"));
        command.arg("serve").arg("--config").arg(&self.config);
        let mut agent = Process::start("agent", &mut command);
        let address = agent.wait_for("where it is served", |line| {
            let line: Value = serde_json::from_str(line).ok()?;
            let fields = &line["fields"];
            (fields["message"] == "serving").then(|| fields["address"].as_str()?.parse().ok())?
        });
        self.address = address.await;
        self.agent = Some(agent);
    }

    /// Kills the agent with SIGKILL.
    pub(crate) fn kill(&mut self) {
        self.agent.take().expect("the agent runs").kill();
    }

    /// Changes the configuration, for the next agent.
    pub(crate) fn change(&self, from: &str, to: &str) {
        let config = fs::read_to_string(&self.config).unwrap();
        assert!(config.contains(from), "{config}");
        fs::write(&self.config, config.replace(from, to)).unwrap();
    }

    /// The folder in which commands run.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.lab.path(name)
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("https://localhost:{}", self.address.port())
    }

    /// A command as an administrator gives it.
    pub(crate) fn command(&self, line: &str) -> Command {
        self.command_as("admin", line)
    }

    /// A command as the bearer of a role gives it.
    pub(crate) fn command_as(&self, role: &str, line: &str) -> Command {
        let mut command = bare(self.lab.folder.path(), line);
        let files = self.path(role);
        command.env("VFIOCTL_ENDPOINT", self.endpoint());
        for (variable, name) in
            [("VFIOCTL_CERT", "tls.crt"), ("VFIOCTL_KEY", "tls.key"), ("VFIOCTL_CA", "ca.crt")]
        {
            command.env(variable, files.join(name));
        }
        command
    }

    /// Runs it to its end.
    pub(crate) fn run(&self, line: &str) -> Said {
        Said::new(line, self.command(line).output().unwrap())
    }

    pub(crate) fn run_as(&self, role: &str, line: &str) -> Said {
        Said::new(line, self.command_as(role, line).output().unwrap())
    }

    /// Runs it without any setting.
    pub(crate) fn run_bare(&self, line: &str) -> Said {
        Said::new(line, bare(self.lab.folder.path(), line).output().unwrap())
    }

    /// Names, as a command lists them.
    pub(crate) fn names(&self, line: &str) -> Vec<String> {
        let all = self.run(&format!("{line} -o json")).quietly().json();
        all.as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap().to_owned()).collect()
    }

    /// Asks until an operation holds its devices.
    pub(crate) fn until_held(&self, name: &str) {
        self.until(name, "HELD");
    }

    /// Asks until an operation is in this phase.
    pub(crate) fn until(&self, name: &str, phase: &str) {
        let begin = Instant::now();
        loop {
            let found = self.run(&format!("operations get {name} -o json")).quietly().json();
            if found["phase"] == phase {
                return;
            }
            assert!(begin.elapsed() < PATIENCE && found["done"] == false, "it is never {phase}: {found}");
        }
    }

    /// The logical device and its epoch, which change with the state that a device carries.
    pub(crate) fn carries(&self, device: &str) -> (String, u64) {
        let found = self.run(&format!("devices get {device} -o json")).quietly().json();
        assert_eq!((&found["state"], &found["standing"]), (&json!("RUNNING"), &json!("READY")), "{found}");
        (found["logical_device"].as_str().unwrap().to_owned(), found["epoch"].as_u64().unwrap())
    }
}

/// `vfioctl` in a folder, with nothing that this test program's own environment says.
pub(crate) fn bare(folder: &Path, line: &str) -> Command {
    let mut command = Command::new(program("vfioctl", "vfio-checkpoint-client"));
    command.args(line.split_whitespace()).current_dir(folder).env_clear().env("HOME", folder);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Writes a caller's files: a certificate of one authority, and another by which servers are verified.
pub(crate) fn issue(by: &LabCa, trusted: &LabCa, role: &str, folder: &Path, valid: Validity) {
    let identity = Identity::Spiffe(format!("spiffe://lab.test/{role}/shell").parse().unwrap());
    let issued = by.issue(&identity, &[], &[], valid).unwrap();
    fs::create_dir_all(folder).unwrap();
    issued.write(folder, &trusted.pem()).unwrap();
}

/// Valid for an hour, from a time on that is told from the time it is.
pub(crate) fn valid_from(time: impl Fn(Duration) -> Duration) -> Validity {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    Validity::starting(UnixTime::since_unix_epoch(time(now)), Duration::from_hours(1))
}

/// The agent's configuration file.
fn toml(lab: &Lab, name: &str, devices: &[(&str, &str)], more: &str) -> String {
    // Of the same shape: what TOML and JSON quote, they quote alike.
    let config = lab.config(name, devices);
    let path = |path: &Path| json!(path.to_str().unwrap());
    let mut lines = vec![
        more.to_owned(),
        "server.listen = \"127.0.0.1:0\"".to_owned(),
        "telemetry.format = \"json\"".to_owned(),
        format!("node.state_dir = {}", path(&config.node.state_dir)),
        format!("tls.certificate = {}", path(&config.tls.certificate)),
        format!("tls.key = {}", path(&config.tls.key)),
        format!("tls.client_ca = {}", path(&config.tls.client_ca)),
    ];
    for grant in &config.grants {
        lines.push(format!("[[grants]]\nwho = {}\nroles = {}", json!(grant.who), json!(grant.roles)));
    }
    for (name, address) in devices {
        lines.push(format!("[[devices]]\nname = {}\naddress = {}", json!(name), json!(address)));
    }
    for name in ["local", "shelf"] {
        lines.push(format!("[[stores]]\nname = {}\nlocation = {}", json!(name), path(&lab.path(name))));
    }
    lines.join("\n")
}
