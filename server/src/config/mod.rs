//! The agent's configuration: one typed value out of a file, the environment and flags.
//!
//! ```text
//!   defaults < TOML file < VFIO_CHECKPOINTD_* < flags  --figment-->  AgentConfig  --validate-->  in force
//! ```
//! Unknown keys are refused wherever they come from, and so is a value out of range: an agent that was configured by a
//! typing mistake owns devices by mistake. All mistakes that can be told together are told together.
//!
//! In the environment `__` parts the sections: `VFIO_CHECKPOINTD_SERVER__LISTEN=0.0.0.0:7443`. Lists of tables
//! (`devices`, `grants`) come from the file only.

mod bounds;
mod duration;
mod validate;
mod variables;

#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use figment::Figment;
use figment::providers::{Format, Serialized, Toml};
use serde::{Deserialize, Serialize};
use vfio_checkpoint_device::kernel::KernelPath;
use vfio_checkpoint_proto::version::VersionRange;

pub use validate::Mistake;

use variables::Variables;

use crate::security::roles::Grant;

/// What the agent is told.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AgentConfig {
    /// Who the agent is, and where it keeps what must outlive it.
    pub node: NodeConfig,
    /// Where it listens, and what it takes from peers.
    pub server: ServerConfig,
    /// Its certificates.
    pub tls: TlsConfig,
    /// Who may do what. Nobody may do anything without a grant.
    pub grants: Vec<Grant>,
    /// The process that keeps the devices open while the agent restarts.
    pub holder: HolderConfig,
    /// The devices that are the agent's own. Opening a device resets it and takes it from everybody else, so no other is
    /// ever opened.
    pub devices: Vec<DeviceConfig>,
    /// Where checkpoints are kept. The first is taken where a caller names none. Without any there is one, `local`, in the
    /// folder `checkpoints` of `node.state_dir`.
    pub stores: Vec<StoreConfig>,
    /// What operations take where their caller does not say.
    pub defaults: OperationDefaults,
    /// What no caller can exceed.
    pub limits: OperationLimits,
    /// Logs.
    pub telemetry: TelemetryConfig,
}

/// Who the agent is, and where it keeps what must outlive it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NodeConfig {
    /// The node's name, as the span of each operation says it. Empty where it does not matter.
    pub name: String,
    /// Folder of the journal. It is made with mode 0700 where it is not there; one agent uses it at a time.
    pub state_dir: PathBuf,
}

/// Where the agent listens, and what it takes from peers.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ServerConfig {
    /// Address of the gRPC service, with TLS.
    pub listen: SocketAddr,
    /// Address of a plain-text listener that answers `grpc.health.v1.Health` and nothing else, for probes that have no
    /// certificate. None where it is not set.
    pub health_listen: Option<SocketAddr>,
    /// Connections at a time, 1 to 65536.
    pub max_connections: usize,
    /// Streams and calls of one connection at a time, 1 to 4096.
    pub max_concurrent_streams: u32,
    /// Bytes of the headers of one call, 1024 to 1048576.
    pub max_header_bytes: u32,
    /// A TLS handshake takes at most this long, 1ms to 5m.
    #[serde(with = "duration")]
    pub handshake_timeout: Duration,
    /// How often an idle connection is asked whether it is still there, 1ms to 1day.
    #[serde(with = "duration")]
    pub keepalive_interval: Duration,
    /// How long it may take to answer, 1ms to 1day.
    #[serde(with = "duration")]
    pub keepalive_timeout: Duration,
    /// A stream of state that carries nothing for this long is ended, 1ms to 1day.
    #[serde(with = "duration")]
    pub stream_idle_timeout: Duration,
    /// No stream of state lasts longer, 1ms to 7days.
    #[serde(with = "duration")]
    pub stream_lifetime: Duration,
    /// How long a restore waits for the giver of its state to come back whose connection broke. Its devices are loaded and
    /// do not run meanwhile. And how long a migration tries to get on with its destination, from when the connection broke until
    /// something new is acknowledged. 1ms to 1h.
    #[serde(with = "duration")]
    pub stream_resume_window: Duration,
    /// How long the taker of a save may take to say that its checkpoint is durable, once it has all state. The devices
    /// stand still for it. 1ms to 1day.
    #[serde(with = "duration")]
    pub seal_timeout: Duration,
    /// On SIGTERM: how long running operations have to be undone, 1ms to 1h.
    #[serde(with = "duration")]
    pub shutdown_grace: Duration,
    /// Threads that serve calls and move state. Half of the processors, and at least one, where it is not set: the node is
    /// its workloads', and state moves fastest where it stays in one core's cache. 1 to 1024.
    pub worker_threads: Option<usize>,
    /// In a build for tests: the versions of the stream's protocol that this agent pretends to speak, lowest and highest.
    #[cfg(feature = "test-versions")]
    pub stream_versions: Option<[u32; 2]>,
}

impl ServerConfig {
    /// The versions of the stream's protocol that this agent speaks.
    pub fn stream_versions(&self) -> VersionRange {
        #[cfg(feature = "test-versions")]
        if let Some(pretended) = self.stream_versions.and_then(|[min, max]| VersionRange::new(min, max)) {
            return pretended;
        }
        VersionRange::OURS
    }
}

/// The agent's certificates. PEM files; they are read again when they change.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TlsConfig {
    /// The agent's certificate chain, its own first.
    pub certificate: PathBuf,
    /// The private key.
    pub key: PathBuf,
    /// The authorities whose clients are let in.
    pub client_ca: PathBuf,
    /// Lists of revoked certificates.
    pub crls: Vec<PathBuf>,
    /// How often the files are looked at, 1ms to 1day. 30 s where it is not set.
    #[serde(with = "duration::option")]
    pub reload_interval: Option<Duration>,
}

/// The process that keeps the devices open while the agent restarts.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HolderConfig {
    /// The socket of `vfio-checkpointd hold`. Without it every device is reset when the agent ends, whatever the
    /// reason.
    pub socket: Option<PathBuf>,
}

/// One device of the agent's own.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceConfig {
    /// What it is called: `devices/NAME`. 1 to 63 of `a-z 0-9 - . _ :`.
    pub name: String,
    /// Where it is: a PCI address, an mdev's UUID, `vfio-user:PATH`, or `sim:…`.
    pub address: String,
    /// Which way to a kernel device: `container` or `iommufd`. Where it is not set: `iommufd` if the kernel has it for
    /// this device, else `container`.
    #[serde(default)]
    pub path: Option<KernelPath>,
    /// The pod that uses it, `namespace/name`, for people.
    #[serde(default)]
    pub owner_pod: String,
}

/// A store of checkpoints. Several agents may share one.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoreConfig {
    /// What it is called: `stores/NAME`. 1 to 63 of `a-z 0-9 -`.
    pub name: String,
    /// Where it is: the absolute path of a folder, or `s3://BUCKET/PREFIX`.
    pub location: String,
    /// S3: the server, where it is not Amazon's: `https://HOST:PORT`.
    #[serde(default)]
    pub endpoint: Option<String>,
    /// S3: the region.
    #[serde(default)]
    pub region: Option<String>,
    /// S3: a file with `AWS_ACCESS_KEY_ID=…` and `AWS_SECRET_ACCESS_KEY=…`, a line each. Where it is not set they come from
    /// the environment, a web identity or the machine's role, as for every S3 client.
    #[serde(default)]
    pub credentials: Option<PathBuf>,
    /// S3: authorities of the server's certificate beside the system's, a PEM file.
    #[serde(default)]
    pub ca: Option<PathBuf>,
    /// S3: allow an endpoint without TLS. Whoever sees the wire then reads the state of devices.
    #[serde(default)]
    pub allow_http: bool,
    /// A folder: bytes that stay free on its file system, 0 to 1125899906842624. 64 MiB where it is not set.
    #[serde(default)]
    pub keep_free_bytes: Option<u64>,
    /// How often this agent collects what no checkpoint needs, 1ms to 7days. 1 h where it is not set.
    #[serde(default, with = "duration::option")]
    pub collect_interval: Option<Duration>,
}

/// What operations take where their caller does not say.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OperationDefaults {
    /// Devices should stand still no longer than this, 1ms to 1day.
    #[serde(with = "duration")]
    pub downtime_limit: Duration,
    /// Pre-copy takes at most this long, 1ms to `limits.max_wait`.
    #[serde(with = "duration")]
    pub pre_copy_budget: Duration,
    /// How long to wait for a manual cutover, 1ms to `limits.max_wait`.
    #[serde(with = "duration")]
    pub cutover_timeout: Duration,
    /// How long a hold lasts, 1ms to `limits.max_wait`.
    #[serde(with = "duration")]
    pub hold_timeout: Duration,
    /// How long an admitted operation waits for its stream, 1ms to `limits.max_wait`.
    #[serde(with = "duration")]
    pub stream_open_timeout: Duration,
    /// What downtimes are predicted by before anything was measured, in bytes a second, 1 to 1125899906842624.
    pub rate_bytes_per_second: u64,
}

/// What no caller can exceed.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OperationLimits {
    /// Operations that are not done, at a time, 1 to 4096.
    pub max_operations: usize,
    /// State of one device, in bytes, 1 to 1125899906842624.
    pub max_device_bytes: u64,
    /// Chunks on the wire, in bytes. 65536 to 2097152.
    pub max_chunk_bytes: u32,
    /// What one migration keeps in memory of what its destination has not acknowledged, in bytes: where the connection
    /// breaks it is sent again. 12582912 to 1073741824.
    pub spool_memory_bytes: u64,
    /// What one migration keeps on disk beyond that, in `node.state_dir`, in bytes, while the connection is down: as long as
    /// 512 MiB are free besides. Once both are full its devices are not read until it is back. 0 to 1125899906842624, 0 for
    /// nothing.
    pub spool_disk_bytes: u64,
    /// A device call that takes longer puts its device out of service, 1ms to 1h.
    #[serde(with = "duration")]
    pub device_call_timeout: Duration,
    /// The longest hold, wait for a cutover or wait for a stream that a caller can ask for, 1ms to 30days.
    #[serde(with = "duration")]
    pub max_wait: Duration,
    /// How long finished operations, and the request ids that started them, are kept, 1ms to 1year.
    #[serde(with = "duration")]
    pub keep_finished: Duration,
    /// How many of them are kept at most, 1 to 1000000.
    pub keep_finished_count: usize,
}

/// Logs.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TelemetryConfig {
    /// What is logged, as in `RUST_LOG`: `info`, `vfio_checkpoint_server=debug,info`. Audit lines are written whatever it
    /// says.
    pub log: String,
    /// How.
    pub format: LogFormat,
}

/// How logs are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

impl Default for NodeConfig {
    fn default() -> Self {
        Self { name: String::new(), state_dir: PathBuf::from("/var/lib/vfio-checkpoint") }
    }
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 7443)),
            health_listen: None,
            max_connections: 256,
            max_concurrent_streams: 128,
            max_header_bytes: 16 << 10,
            handshake_timeout: Duration::from_secs(10),
            keepalive_interval: Duration::from_secs(20),
            keepalive_timeout: Duration::from_secs(10),
            stream_idle_timeout: Duration::from_mins(1),
            stream_lifetime: Duration::from_hours(6),
            stream_resume_window: Duration::from_secs(30),
            seal_timeout: Duration::from_mins(5),
            shutdown_grace: Duration::from_secs(30),
            worker_threads: None,
            #[cfg(feature = "test-versions")]
            stream_versions: None,
        }
    }
}

impl Default for OperationDefaults {
    fn default() -> Self {
        Self {
            downtime_limit: Duration::from_millis(300),
            pre_copy_budget: Duration::from_mins(1),
            cutover_timeout: Duration::from_mins(5),
            hold_timeout: Duration::from_mins(5),
            stream_open_timeout: Duration::from_secs(30),
            rate_bytes_per_second: 1 << 30,
        }
    }
}

impl Default for OperationLimits {
    fn default() -> Self {
        Self {
            max_operations: 256,
            max_device_bytes: 256 << 30,
            max_chunk_bytes: 1 << 20,
            spool_memory_bytes: 16 << 20,
            spool_disk_bytes: 256 << 20,
            device_call_timeout: vfio_checkpoint_device::lane::DEFAULT_CALL_LIMIT,
            max_wait: Duration::from_hours(24),
            keep_finished: Duration::from_hours(24 * 7),
            keep_finished_count: 10_000,
        }
    }
}

impl Default for TelemetryConfig {
    fn default() -> Self {
        Self { log: "info".to_owned(), format: LogFormat::Text }
    }
}

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file is not there or cannot be read.
    #[error("the configuration file {} cannot be read", path.display())]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A key is unknown, or a value is not of its kind.
    #[error("{}", words(file.as_deref(), wrong))]
    Malformed {
        /// The file that was read, where one was.
        file: Option<PathBuf>,
        /// What is wrong. Not a source: its words are in these already, where they are fit for people.
        wrong: Box<figment::Error>,
    },
    /// Values that cannot be.
    #[error("{}", list(.0))]
    Mistakes(Vec<Mistake>),
}

/// Where it is and what, with the key as its author wrote it: figment's own words have its profiles and providers.
fn words(file: Option<&Path>, error: &figment::Error) -> String {
    let told = error.clone().into_iter().map(|error| {
        let provider = error.metadata.as_ref().map(|metadata| metadata.name.as_ref());
        let from = match (provider, file) {
            (Some(name), _) if name.contains(ENVIRONMENT) => format!("the environment ({ENVIRONMENT}*)"),
            (Some(name), Some(file)) if name.starts_with("TOML") => file.display().to_string(),
            // A problem of the whole, which the file is the most of.
            (None, Some(file)) => file.display().to_string(),
            (Some(_), _) => "the flags".to_owned(),
            (None, None) => "the configuration".to_owned(),
        };
        let key = if error.path.is_empty() { String::new() } else { format!("{}: ", error.path.join(".")) };
        format!("{from}: {key}{}", error.kind)
    });
    told.collect::<Vec<_>>().join("\n")
}

fn list(mistakes: &[Mistake]) -> String {
    mistakes.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

/// What the environment's names begin with.
pub const ENVIRONMENT: &str = "VFIO_CHECKPOINTD_";

impl AgentConfig {
    /// The configuration out of a file, the environment and `flags`, the later the stronger.
    pub fn load(file: Option<&Path>, flags: impl Serialize) -> Result<Self, ConfigError> {
        Self::load_with(file, Variables::of_the_process(), flags)
    }

    fn load_with(
        file: Option<&Path>,
        variables: Variables,
        flags: impl Serialize,
    ) -> Result<Self, ConfigError> {
        let mut figment = Figment::new();
        if let Some(path) = file {
            let text = std::fs::read_to_string(path)
                .map_err(|source| ConfigError::Unreadable { path: path.to_owned(), source })?;
            figment = figment.merge(Toml::string(&text));
        }
        let config: Self =
            figment.merge(variables).merge(Serialized::defaults(flags)).extract().map_err(|error| {
                ConfigError::Malformed { file: file.map(Path::to_owned), wrong: Box::new(error) }
            })?;
        config.validate()?;
        Ok(config)
    }

    /// The sections of `other` that say something else, but for the grants.
    pub fn differs_in(&self, other: &Self) -> Vec<&'static str> {
        let same = |ours: &dyn std::fmt::Debug, theirs: &dyn std::fmt::Debug| {
            format!("{ours:?}") == format!("{theirs:?}")
        };
        let Self { node, server, tls, grants: _, holder, devices, stores, defaults, limits, telemetry } =
            self;
        [
            ("node", same(node, &other.node)),
            ("server", same(server, &other.server)),
            ("tls", same(tls, &other.tls)),
            ("holder", same(holder, &other.holder)),
            ("devices", same(devices, &other.devices)),
            ("stores", same(stores, &other.stores)),
            ("defaults", same(defaults, &other.defaults)),
            ("limits", same(limits, &other.limits)),
            ("telemetry", same(telemetry, &other.telemetry)),
        ]
        .into_iter()
        .filter_map(|(section, same)| (!same).then_some(section))
        .collect()
    }

    /// Finds every value that cannot be.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let mistakes = validate::mistakes(self);
        if mistakes.is_empty() { Ok(()) } else { Err(ConfigError::Mistakes(mistakes)) }
    }
}
