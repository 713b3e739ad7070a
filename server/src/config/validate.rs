//! Which values cannot be, all of them at once.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

use vfio_checkpoint_device::address::DeviceAddress;
use vfio_checkpoint_proto::ids::{DeviceName, PodName, StoreName};
use vfio_checkpoint_store::Location;

use super::AgentConfig;
use super::bounds::bounds;

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

    fn path(&mut self, key: &str, path: &Path) {
        if path.as_os_str().is_empty() {
            self.add(key, "is not set; give the path of the PEM file");
        }
    }
}

pub(super) fn mistakes(config: &AgentConfig) -> Vec<Mistake> {
    let mut found = Mistakes::default();
    node_and_server(config, &mut found);
    grants(config, &mut found);
    devices(config, &mut found);
    stores(config, &mut found);
    for bound in bounds(config) {
        if let Some(problem) = bound.problem() {
            found.add(bound.key, problem);
        }
    }
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
    #[cfg(feature = "test-versions")]
    if let Some([min, max]) = server.stream_versions
        && vfio_checkpoint_proto::version::VersionRange::new(min, max).is_none()
    {
        found.add("server.stream_versions", format_args!("{min} to {max} is no range of versions"));
    }
    if let Some(health) = server.health_listen
        && health.port() == server.listen.port()
        && health.port() != 0
        && (health.ip() == server.listen.ip()
            || health.ip().is_unspecified()
            || server.listen.ip().is_unspecified())
    {
        found.add("server.health_listen", "takes the port of server.listen; give another one");
    }
    found.path("tls.certificate", &config.tls.certificate);
    found.path("tls.key", &config.tls.key);
    found.path("tls.client_ca", &config.tls.client_ca);
    if config.holder.socket.as_ref().is_some_and(|socket| socket.as_os_str().is_empty()) {
        found.add("holder.socket", "is empty; give the path of the holder's socket, or leave it out");
    }
}

fn grants(config: &AgentConfig, found: &mut Mistakes) {
    for (index, grant) in config.grants.iter().enumerate() {
        if grant.roles.is_empty() {
            found.add(format!("grants[{index}].roles"), "is empty; name a role, or leave the grant out");
        }
    }
}

fn stores(config: &AgentConfig, found: &mut Mistakes) {
    let (mut names, mut places) = (BTreeSet::new(), Vec::new());
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
        if let Ok(location) = store.location.parse::<Location>() {
            let place = (location, &store.endpoint);
            if places.contains(&place) {
                found.add(key("location"), format_args!("`{}` is where another store is", store.location));
            }
            places.push(place);
        }
        if let Some(endpoint) = store.endpoint.as_ref().filter(|endpoint| !is_endpoint(endpoint)) {
            found.add(
                key("endpoint"),
                format_args!("is `{endpoint}` and must be https://HOST or https://HOST:PORT"),
            );
        }
        let is_plain = store.endpoint.as_ref().is_some_and(|endpoint| endpoint.starts_with("http://"));
        if is_plain && !store.allow_http {
            found
                .add(key("endpoint"), "has no TLS; say https, or allow_http where nobody else sees the wire");
        }
    }
}

/// Where a device is, also where the same is written in another way.
fn place(address: &DeviceAddress) -> PathBuf {
    match address {
        DeviceAddress::VfioUser(socket) => socket.as_path().components().collect(),
        DeviceAddress::Kernel(_) | DeviceAddress::Sim(_) => address.to_string().into(),
    }
}

/// Whether it is the address of a server, with or without TLS.
fn is_endpoint(text: &str) -> bool {
    text.parse::<http::Uri>().is_ok_and(|uri| {
        matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some_and(|host| !host.is_empty())
    })
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
            // Each is a device of its own.
            Ok(DeviceAddress::Sim(_)) => {}
            Ok(address) if !addresses.insert(place(&address)) => {
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
