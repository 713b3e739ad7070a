//! What this test program is when the tests start it: an agent, a holder, until it is killed.
//!
//! ```text
//!   test --stdin: arm, release, fail, mend--> agent --stderr: armed, at, stopped at, failed at--> test
//! ```
//! They end with whoever talks to them.

use std::env;
use std::path::Path;
use std::process::{Command, ExitCode};

use serde_json::json;
use vfio_checkpoint_server::config::AgentConfig;
use vfio_checkpoint_server::environment::Environment;
use vfio_checkpoint_server::failpoint;
use vfio_checkpoint_server::holder::{self, HolderOptions};
use vfio_checkpoint_server::serve::Agent;
use vfio_checkpoint_server::telemetry::{self, AuditLines};

/// Says to this test program that it is an agent, and where its configuration is.
const AGENT: &str = "KILL_TEST_AGENT";
/// Says to this test program that it is a holder, and where its socket is.
const HOLDER: &str = "KILL_TEST_HOLDER";

/// An agent of this configuration, which stops where it is told, as in `FAILPOINTS`.
pub(crate) fn agent(config: &Path, failpoints: &str) -> Command {
    let mut command = this_program("children::an_agent_that_will_be_killed");
    command.env(AGENT, config).env("FAILPOINTS", failpoints);
    command
}

/// A holder with this socket.
pub(crate) fn holder(socket: &Path) -> Command {
    let mut command = this_program("children::a_holder_that_will_be_killed");
    command.env(HOLDER, socket);
    command
}

/// This test program, as one of its own tests.
pub(crate) fn this_program(test: &str) -> Command {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture"]).env_remove(AGENT).env_remove(HOLDER);
    command
}

/// Does what is said on standard input, and ends with whoever says it. What is to fail is in `folder`.
fn listen(folder: &Path) {
    let mut failing = Vec::new();
    for line in std::io::stdin().lines().map_while(Result::ok) {
        match line.split_once(' ').map(|(word, rest)| (word, rest.split_once(' '))) {
            Some(("arm", Some((times, point)))) => {
                failpoint::arm(point, times.parse().unwrap());
                eprintln!("armed");
            }
            Some(("fail", Some((pass, point)))) => {
                failing.push(failpoint::fail(folder, point, pass.parse().unwrap()));
                eprintln!("fails");
            }
            Some(("mend", _)) => {
                failing.clear();
                eprintln!("mended");
            }
            Some(_) | None => failpoint::release(),
        }
    }
    std::process::exit(1);
}

/// An agent, until it is killed. Run by the other tests, in a process of its own; by itself it has nothing to do.
#[test]
fn an_agent_that_will_be_killed() -> ExitCode {
    let Some(path) = env::var_os(AGENT) else { return ExitCode::SUCCESS };
    let config = AgentConfig::load(Some(Path::new(&path)), json!({})).unwrap();
    telemetry::begin(&config.telemetry, AuditLines::All).unwrap();
    let folder = config.node.state_dir.clone();
    std::thread::spawn(move || listen(&folder));
    // What is stopped blocks its thread, and the rest must go on.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(4).enable_all().build().unwrap();
    runtime.block_on(async {
        match Agent::start(config, Environment::production()).await {
            Ok(_agent) => std::future::pending().await,
            Err(error) => {
                eprintln!("does not begin: {error}");
                ExitCode::FAILURE
            }
        }
    })
}

/// A holder, until it is killed. Run by the other tests, in a process of its own; by itself it has nothing to do.
#[test]
fn a_holder_that_will_be_killed() {
    let Some(socket) = env::var_os(HOLDER) else { return };
    telemetry::begin(&AgentConfig::default().telemetry, AuditLines::All).unwrap();
    std::thread::spawn(|| listen(Path::new("")));
    let options = HolderOptions { socket: socket.into(), max_devices: 16 };
    holder::run(options).unwrap();
}
