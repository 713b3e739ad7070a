//! `serve`.

use std::io;

use serde_json::{Value, json};
use tokio::signal::unix::{Signal, SignalKind, signal};
use vfio_checkpoint_server::config::{AgentConfig, ConfigError};
use vfio_checkpoint_server::environment::Environment;
use vfio_checkpoint_server::security::roles::Policy;
use vfio_checkpoint_server::serve::{Agent, ServeError, runtime};
use vfio_checkpoint_server::telemetry::{self, AuditLines};

use crate::args::Serve;
use crate::{ExitStatus, complain};

pub(crate) fn run(arguments: Serve) -> ExitStatus {
    let config = match load(&arguments) {
        Ok(config) => config,
        Err(error) => {
            complain("serve", &error);
            return ExitStatus::Blocked;
        }
    };
    if let Err(error) = telemetry::begin(&config.telemetry, AuditLines::All) {
        complain("serve", &error);
        return ExitStatus::Blocked;
    }
    let runtime = match runtime(config.server.worker_threads) {
        Ok(runtime) => runtime,
        Err(error) => {
            complain("serve", &error);
            return ExitStatus::Failed;
        }
    };
    if arguments.check {
        return match Agent::check(&config) {
            Ok(()) => ExitStatus::Done,
            Err(error) => {
                complain("serve", &error);
                ExitStatus::Blocked
            }
        };
    }
    match runtime.block_on(serve(&arguments, config)) {
        Ok(()) => ExitStatus::Done,
        Err(End::NotBegun(error)) => {
            complain("serve", &error);
            ExitStatus::Blocked
        }
        Err(End::Failed(error)) => {
            complain("serve", &error);
            ExitStatus::Failed
        }
        Err(End::Signals(error)) => {
            complain("serve", &error);
            ExitStatus::Failed
        }
    }
}

/// Why serving ended that should not have.
enum End {
    NotBegun(ServeError),
    Failed(ServeError),
    Signals(io::Error),
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    fn listen() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }
}

async fn serve(arguments: &Serve, config: AgentConfig) -> Result<(), End> {
    let mut signals = Signals::listen().map_err(End::Signals)?;
    let mut agent = Agent::start(config, Environment::production()).await.map_err(End::NotBegun)?;
    loop {
        tokio::select! {
            _ = signals.terminate.recv() => break,
            _ = signals.interrupt.recv() => break,
            _ = signals.hangup.recv() => reload(arguments, &agent).await,
            error = agent.failed() => return Err(End::Failed(error)),
        }
    }
    tracing::info!("ending");
    agent.stop().await.map_err(End::Failed)
}

/// Reads again what can change while the agent runs: certificates and grants. What is wrong stays as it was.
async fn reload(arguments: &Serve, agent: &Agent) {
    // What it found is in the log.
    let _ = agent.tls().reload().await;
    match load(arguments) {
        Ok(config) => {
            let changed = agent.core().config.differs_in(&config);
            if !changed.is_empty() {
                let sections = changed.join(", ");
                tracing::warn!(sections, "these sections have changed, and take a restart to be in force");
            }
            let grants = config.grants.len();
            let cut_off = agent.set_policy(Policy { grants: config.grants });
            tracing::info!(grants, cut_off, "grants read again");
        }
        Err(error) => tracing::error!(%error, "the configuration is refused; the old grants stay in force"),
    }
}

fn load(arguments: &Serve) -> Result<AgentConfig, ConfigError> {
    let mut flags = json!({});
    let mut set = |section: &str, key: &str, value: Value| flags[section][key] = value;
    if let Some(listen) = arguments.listen {
        set("server", "listen", json!(listen));
    }
    if let Some(log) = &arguments.log {
        set("telemetry", "log", json!(log));
    }
    if let Some(format) = arguments.log_format {
        set("telemetry", "format", json!(format));
    }
    AgentConfig::load(arguments.config.as_deref(), flags)
}
