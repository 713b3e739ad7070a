//! Runs the scripts of `python/`, and makes what they bear.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::Value;
use vfio_checkpoint_server::security::identity::Identity;
use vfio_checkpoint_server::security::roles::{Grant, Role};

use crate::lab::{Lab, validity};

/// How a script ended.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) status: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) took: Duration,
}

impl Ran {
    /// The JSON document that a script prints where it did what it is for.
    pub(crate) fn document(&self) -> Value {
        assert_eq!(self.status, Some(0), "{}", self.stderr);
        serde_json::from_str(&self.stdout).unwrap()
    }
}

/// A file of `python/`.
pub(crate) fn script(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("interop/python").join(name)
}

/// Runs `python/run` with these arguments.
pub(crate) async fn run(arguments: &[&str]) -> Ran {
    let mut command = std::process::Command::new(script("run"));
    command.args(arguments);
    let begun = Instant::now();
    // The agent lives in this process and has to go on meanwhile.
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    Ran {
        status: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        took: begun.elapsed(),
    }
}

/// Writes the TLS files of `spiffe://lab.test/NAME/python` into the lab's folder of that name.
pub(crate) fn write_tls(lab: &Lab, name: &str) {
    let identity = Identity::Spiffe(format!("spiffe://lab.test/{name}/python").parse().unwrap());
    let folder = lab.path(name);
    std::fs::create_dir_all(&folder).unwrap();
    let issued = lab.ca.issue(&identity, &[], &[], validity()).unwrap();
    issued.write(&folder, &lab.ca.pem()).unwrap();
}

/// An operator saves and restores.
pub(crate) fn operator_grant() -> Grant {
    Grant { who: "spiffe://lab.test/operator/*".parse().unwrap(), roles: vec![Role::Saver, Role::Restorer] }
}
