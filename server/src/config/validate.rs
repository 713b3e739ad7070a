//! Which values cannot be, all of them at once.

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;
use std::time::Duration;

use vfio_checkpoint_device::address::DeviceAddress;
use vfio_checkpoint_proto::domain::StreamLimits;
use vfio_checkpoint_proto::ids::{DeviceName, PodName, StoreName};
use vfio_checkpoint_proto::{MAX_CHUNK_BYTES, MIN_CHUNK_BYTES};
use vfio_checkpoint_store::Location;

use super::AgentConfig;

/// A value that cannot be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    /// The key, as in the file.
    pub key: String,
    /// What is wrong, and what it may be.
    pub problem: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.key, self.problem)
    }
}

#[derive(Default)]
struct Mistakes(Vec<Mistake>);

impl Mistakes {
    fn add(&mut self, key: impl Into<String>, problem: impl fmt::Display) {
        self.0.push(Mistake { key: key.into(), problem: problem.to_string() });
    }

    fn range<T: PartialOrd + fmt::Display>(&mut self, key: &str, value: T, low: T, high: T) {
        if value < low || value > high {
            self.add(key, format_args!("is {value} and must be {low} to {high}"));
        }
    }

    fn time(&mut self, key: &str, value: Duration, high: Duration) {
        if value.is_zero() || value > high {
            let (value, high) = (humantime::format_duration(value), humantime::format_duration(high));
            self.add(key, format_args!("is {value} and must be more than 0s and at most {high}"));
        }
    }

    fn path(&mut self, key: &str, path: &Path) {
        if path.as_os_str().is_empty() {
            self.add(key, "is not set; give the path of the PEM file");
        }
    }
}

const DAY: Duration = Duration::from_hours(24);

pub(super) fn mistakes(config: &AgentConfig) -> Vec<Mistake> {
    let mut found = Mistakes::default();
    node_and_server(config, &mut found);
    devices(config, &mut found);
    stores(config, &mut found);
    operations(config, &mut found);
    if config.telemetry.log.len() > 1024 {
        found.add("telemetry.log", "is longer than 1024 bytes");
    }
    found.0
}

fn node_and_server(config: &AgentConfig, found: &mut Mistakes) {
    if config.node.state_dir.as_os_str().is_empty() {
        found.add("node.state_dir", "is empty; give the folder of the journal");
    }
    let server = &config.server;
    found.range("server.max_connections", server.max_connections, 1, 65_536);
    found.range("server.max_concurrent_streams", server.max_concurrent_streams, 1, 4096);
    found.range("server.max_header_bytes", server.max_header_bytes, 1 << 10, 1 << 20);
    found.time("server.handshake_timeout", server.handshake_timeout, Duration::from_mins(5));
    found.time("server.keepalive_interval", server.keepalive_interval, DAY);
    found.time("server.keepalive_timeout", server.keepalive_timeout, DAY);
    found.time("server.stream_idle_timeout", server.stream_idle_timeout, DAY);
    found.time("server.stream_lifetime", server.stream_lifetime, StreamLimits::MAX_LIFETIME);
    found.time("server.stream_resume_window", server.stream_resume_window, Duration::from_hours(1));
    found.time("server.seal_timeout", server.seal_timeout, DAY);
    found.time("server.shutdown_grace", server.shutdown_grace, Duration::from_hours(1));
    #[cfg(feature = "test-versions")]
    if let Some([min, max]) = server.stream_versions
        && vfio_checkpoint_proto::version::VersionRange::new(min, max).is_none()
    {
        found.add("server.stream_versions", format_args!("{min} to {max} is no range of versions"));
    }
    if let Some(threads) = server.worker_threads {
        found.range("server.worker_threads", threads, 1, 1024);
    }
    if server.health_listen == Some(server.listen) && server.listen.port() != 0 {
        found.add("server.health_listen", "is the address of server.listen; give another port");
    }
    found.path("tls.certificate", &config.tls.certificate);
    found.path("tls.key", &config.tls.key);
    found.path("tls.client_ca", &config.tls.client_ca);
    if let Some(interval) = config.tls.reload_interval {
        found.time("tls.reload_interval", interval, DAY);
    }
}

fn stores(config: &AgentConfig, found: &mut Mistakes) {
    let mut names = BTreeSet::new();
    for (index, store) in config.stores.iter().enumerate() {
        let key = |field: &str| format!("stores[{index}].{field}");
        if let Err(error) = StoreName::from_id(&store.name) {
            found.add(key("name"), error);
        }
        if !names.insert(&store.name) {
            found.add(key("name"), format_args!("`{}` is given to two stores", store.name));
        }
        match store.location.parse::<Location>() {
            Ok(Location::S3 { .. }) => {
                if store.keep_free_bytes.is_some() {
                    found.add(key("keep_free_bytes"), "is for a folder only; leave it out");
                }
            }
            Ok(Location::Folder(_)) => {
                let given = [
                    ("endpoint", store.endpoint.is_some()),
                    ("region", store.region.is_some()),
                    ("credentials", store.credentials.is_some()),
                    ("ca", store.ca.is_some()),
                    ("allow_http", store.allow_http),
                ];
                for (field, _) in given.into_iter().filter(|(_, is_given)| *is_given) {
                    found.add(key(field), "is for S3 only; leave it out");
                }
            }
            Err(error) => found.add(key("location"), error),
        }
        let is_plain = store.endpoint.as_ref().is_some_and(|endpoint| endpoint.starts_with("http://"));
        if is_plain && !store.allow_http {
            found
                .add(key("endpoint"), "has no TLS; say https, or allow_http where nobody else sees the wire");
        }
        if let Some(interval) = store.collect_interval {
            found.time(&key("collect_interval"), interval, DAY * 7);
        }
    }
}

fn devices(config: &AgentConfig, found: &mut Mistakes) {
    let (mut names, mut addresses) = (BTreeSet::new(), BTreeSet::new());
    for (index, device) in config.devices.iter().enumerate() {
        let key = |field: &str| format!("devices[{index}].{field}");
        if let Err(error) = DeviceName::from_id(&device.name) {
            found.add(key("name"), error);
        }
        if !names.insert(&device.name) {
            found.add(key("name"), format_args!("`{}` is given to two devices", device.name));
        }
        match device.address.parse::<DeviceAddress>() {
            Ok(address @ DeviceAddress::Sim(_)) => drop(address),
            Ok(_) if !addresses.insert(&device.address) => {
                found.add(key("address"), format_args!("`{}` is listed twice", device.address));
            }
            Ok(_) => {}
            Err(error) => found.add(key("address"), vfio_checkpoint_device::chain(&error)),
        }
        if let (Some(path), Ok(DeviceAddress::Sim(_) | DeviceAddress::VfioUser(_))) =
            (device.path, device.address.parse::<DeviceAddress>())
        {
            let address = &device.address;
            found.add(
                key("path"),
                format_args!("is {path}, but `{address}` is no kernel device; leave it out"),
            );
        }
        if !device.owner_pod.is_empty()
            && let Err(error) = device.owner_pod.parse::<PodName>()
        {
            found.add(key("owner_pod"), error);
        }
    }
}

fn operations(config: &AgentConfig, found: &mut Mistakes) {
    let (defaults, limits) = (&config.defaults, &config.limits);
    found.time("limits.max_wait", limits.max_wait, 30 * DAY);
    found.time("defaults.downtime_limit", defaults.downtime_limit, DAY);
    found.time("defaults.pre_copy_budget", defaults.pre_copy_budget, limits.max_wait);
    found.time("defaults.cutover_timeout", defaults.cutover_timeout, limits.max_wait);
    found.time("defaults.hold_timeout", defaults.hold_timeout, limits.max_wait);
    found.time("defaults.stream_open_timeout", defaults.stream_open_timeout, limits.max_wait);
    found.range("defaults.rate_bytes_per_second", defaults.rate_bytes_per_second, 1, u64::MAX);
    found.range("limits.max_operations", limits.max_operations, 1, 4096);
    found.range("limits.max_device_bytes", limits.max_device_bytes, 1, u64::MAX);
    found.range("limits.max_chunk_bytes", limits.max_chunk_bytes, MIN_CHUNK_BYTES, MAX_CHUNK_BYTES);
    // As much as a destination of this version may leave without an ack.
    found.range("limits.spool_memory_bytes", limits.spool_memory_bytes, 12 << 20, 1 << 30);
    found.time("limits.device_call_timeout", limits.device_call_timeout, Duration::from_hours(1));
    found.time("limits.keep_finished", limits.keep_finished, 365 * DAY);
    found.range("limits.keep_finished_count", limits.keep_finished_count, 1, 1_000_000);
}
