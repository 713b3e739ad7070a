//! `vfioctl` beside an agent on loopback.

use std::process::{Command, Output, Stdio};

use tempfile::TempDir;
use vfio_checkpoint_proto::v1;

use crate::pki::{AGENT_ID, Ca, agent_names};
use crate::server::Agent;

pub(crate) struct Setup {
    pub(crate) folder: TempDir,
    pub(crate) port: u16,
    ca: Ca,
}

impl Setup {
    pub(crate) async fn new(agent: &Agent) -> Self {
        let ca = Ca::new("one");
        let address = agent.serve(&ca.server(agent_names()), &ca).await;
        let folder = TempDir::new().unwrap();
        let client = ca.client();
        for (name, text) in [("ca", &ca.pem), ("cert", &client.certificate), ("key", &client.key)] {
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        Self { folder, port: address.port(), ca }
    }

    /// Another agent, with a certificate of the same authority: its endpoint.
    pub(crate) async fn beside(&self, agent: &Agent) -> String {
        let address = agent.serve(&self.ca.server(agent_names()), &self.ca).await;
        format!("https://localhost:{}", address.port())
    }

    pub(crate) fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn command(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vfioctl"));
        command
            .args(line.split_whitespace())
            .current_dir(self.folder.path())
            .env_clear()
            .stdin(Stdio::null());
        command.env("VFIOCTL_ENDPOINT", format!("https://localhost:{}", self.port));
        command.env("VFIOCTL_SERVER_SPIFFE_ID", AGENT_ID);
        for (variable, name) in [("VFIOCTL_CA", "ca"), ("VFIOCTL_CERT", "cert"), ("VFIOCTL_KEY", "key")] {
            command.env(variable, name);
        }
        command
    }

    /// Runs it beside the server, which lives on this runtime.
    pub(crate) async fn run(&self, line: &str) -> (i32, String, String) {
        let mut command = self.command(line);
        let Output { status, stdout, stderr } =
            tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (status.code().unwrap(), text(stdout), text(stderr))
    }
}

pub(crate) fn done(
    result: v1::OperationResult,
    outcome: v1::StateOutcome,
    consistency: v1::CheckpointConsistency,
) -> v1::Operation {
    v1::Operation {
        name: "operations/1".to_owned(),
        done: true,
        result: result.into(),
        outcome: outcome.into(),
        consistency: consistency.into(),
        devices: vec![v1::OperationDevice { device: "devices/a".to_owned(), ..Default::default() }],
        ..Default::default()
    }
}

/// Runs `vfioctl` without an agent and without any settings, in a folder.
pub(crate) fn alone(folder: &std::path::Path, line: &str) -> (i32, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vfioctl"));
    command.args(line.split_whitespace()).current_dir(folder).env_clear().env("HOME", folder);
    let Output { status, stdout, stderr } = command.stdin(Stdio::null()).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code().unwrap(), text(stdout), text(stderr))
}
