//! Where a migration goes: what `--to` says, as this program reaches it and as the source's agent is told.
//!
//! Invariants: certificates are those of the source's connection unless the destination has its own. Who the destination
//! must be is never taken from the source: it names another agent. Failure paths: what only this program could check, a
//! server's name that is not the host's, is refused, because the source could not.

use std::path::PathBuf;

use clap::Args;
use vfio_checkpoint_proto::ids::DeviceName;
use vfio_checkpoint_proto::v1;

use crate::connection::Settings;
use crate::contexts::{Context, ContextsFile, Place};
use crate::outcome::Failure;

/// Where a migration goes.
#[derive(Debug, Args)]
pub(super) struct DestinationArgs {
    /// The destination: a context's name, or https://HOST:PORT as the source's agent reaches it too
    #[arg(long, value_name = "DESTINATION")]
    pub(super) to: String,
    /// The devices there that take the state, in the order of the set; those of the same names if it is not said. What
    /// they carry now is lost
    #[arg(long, value_name = "DEVICE", num_args = 1.., value_parser = crate::values::device)]
    pub(super) onto: Vec<DeviceName>,
    /// The SPIFFE id in the destination's certificate; without one it must have the host's name
    #[arg(long, value_name = "ID")]
    pub(super) to_server_spiffe_id: Option<String>,
    /// The CA bundle that the destination's certificate is verified by, where it is not that of --ca
    #[arg(long, value_name = "FILE")]
    pub(super) to_ca: Option<PathBuf>,
    /// The client certificate for the destination, where it is not that of --cert
    #[arg(long, value_name = "FILE", requires = "to_key")]
    pub(super) to_cert: Option<PathBuf>,
    /// The key of that certificate
    #[arg(long, value_name = "FILE", requires = "to_cert")]
    pub(super) to_key: Option<PathBuf>,
}

/// The destination, and how this program reaches it.
#[derive(Debug)]
pub(super) struct Destination {
    pub(super) endpoint: String,
    pub(super) settings: Settings,
}

impl DestinationArgs {
    pub(super) fn find(&self, source: &Settings) -> Result<Destination, Failure> {
        if self.to.contains("://") {
            let endpoint = Some(self.to.clone());
            return self.over(Context { endpoint, ..Context::default() }, source);
        }
        if self.to.contains(':') {
            let text =
                format!("--to {:?} is no endpoint; give https://HOST:PORT, or a context's name", self.to);
            return Err(Failure::usage(text));
        }
        let file = ContextsFile::read(Place::from_environment()).map_err(Failure::usage)?;
        self.over(file.get(&self.to).map_err(Failure::usage)?, source)
    }

    /// What is given, then what the context says, then what reaches the source.
    fn over(&self, context: Context, source: &Settings) -> Result<Destination, Failure> {
        let Some(endpoint) = context.endpoint else {
            let text = format!("the context {} has no endpoint", self.to);
            let hint = format!("give it one: vfioctl context set {} --endpoint https://HOST:PORT", self.to);
            return Err(Failure::usage(text).hint(&hint));
        };
        let spiffe_id = self.to_server_spiffe_id.clone().or(context.server_spiffe_id);
        if let Some(name) =
            context.server_name.filter(|name| spiffe_id.is_none() && !is_host(name, &endpoint))
        {
            let text = format!(
                "the context {} says that the server is called {name}, which is not the host of {endpoint}: the source \
                 cannot be told that",
                self.to
            );
            return Err(
                Failure::usage(text).hint("give --to-server-spiffe-id, or an endpoint with that host")
            );
        }
        // A certificate without its key would be of no use, so the two come from one place.
        let (cert, key) = if self.to_cert.is_some() {
            (self.to_cert.clone(), self.to_key.clone())
        } else if context.cert.is_some() && context.key.is_some() {
            (context.cert, context.key)
        } else {
            (source.cert.clone(), source.key.clone())
        };
        let settings = Settings {
            context: None,
            endpoint: Some(endpoint.clone()),
            ca: self.to_ca.clone().or(context.ca).or_else(|| source.ca.clone()),
            cert,
            key,
            server_name: None,
            server_spiffe_id: spiffe_id,
        };
        // Before anybody is called.
        settings.server()?;
        Ok(Destination { endpoint, settings })
    }

    /// What to give `vfioctl` for a call to the destination.
    pub(super) fn options(&self, target: &v1::MigrationTarget) -> String {
        match (self.to.contains("://"), target.spiffe_id.as_str()) {
            (false, _) => format!("--context {}", self.to),
            (true, "") => format!("--endpoint {}", self.to),
            (true, id) => format!("--endpoint {} --server-spiffe-id {id}", self.to),
        }
    }

    /// The devices there that take those of the set.
    pub(super) fn takers(&self, devices: &[DeviceName]) -> Result<Vec<String>, Failure> {
        if !self.onto.is_empty() && self.onto.len() != devices.len() {
            let (named, moved) = (self.onto.len(), devices.len());
            let text = format!("--onto names {named} devices, and {moved} are to move; name one for each");
            return Err(Failure::usage(text));
        }
        let takers = if self.onto.is_empty() { devices } else { &self.onto };
        Ok(takers.iter().map(ToString::to_string).collect())
    }
}

impl Destination {
    /// But for the key of whoever admits the devices, which it says itself.
    pub(super) fn target(&self, devices: Vec<String>) -> v1::MigrationTarget {
        let spiffe_id = self.settings.server_spiffe_id.clone().unwrap_or_default();
        v1::MigrationTarget {
            endpoint: self.endpoint.clone(),
            spiffe_id,
            devices,
            key_sha256: bytes::Bytes::new(),
        }
    }
}

fn is_host(name: &str, endpoint: &str) -> bool {
    let uri: Option<http::Uri> = endpoint.parse().ok();
    uri.as_ref().and_then(http::Uri::host).is_some_and(|host| host.eq_ignore_ascii_case(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(to: &str) -> DestinationArgs {
        DestinationArgs {
            to: to.to_owned(),
            onto: Vec::new(),
            to_server_spiffe_id: None,
            to_ca: None,
            to_cert: None,
            to_key: None,
        }
    }

    fn source() -> Settings {
        Settings {
            endpoint: Some("https://node1:7443".to_owned()),
            ca: Some("one.ca".into()),
            cert: Some("one.crt".into()),
            key: Some("one.key".into()),
            server_spiffe_id: Some("spiffe://lab/agent/node1".to_owned()),
            ..Settings::default()
        }
    }

    fn context() -> Context {
        Context { endpoint: Some("https://node2:7443".to_owned()), ..Context::default() }
    }

    #[test]
    fn certificates_are_shared_and_names_are_not() {
        let found = args("https://node2:7443").find(&source()).unwrap();
        assert_eq!(found.settings.ca, source().ca);
        assert_eq!((&found.settings.cert, &found.settings.key), (&source().cert, &source().key));
        assert_eq!(found.settings.server_spiffe_id, None);
        let target = found.target(vec!["devices/x".to_owned()]);
        assert_eq!((target.endpoint.as_str(), target.spiffe_id.as_str()), ("https://node2:7443", ""));
    }

    #[test]
    fn what_is_given_goes_before_the_context_and_that_before_the_source() {
        let two = Context {
            ca: Some("two.ca".into()),
            cert: Some("two.crt".into()),
            key: Some("two.key".into()),
            server_spiffe_id: Some("spiffe://lab/agent/node2".to_owned()),
            ..context()
        };
        let found = args("two").over(two.clone(), &source()).unwrap().settings;
        assert_eq!((&found.ca, &found.cert, &found.key), (&two.ca, &two.cert, &two.key));
        assert_eq!(found.server_spiffe_id, two.server_spiffe_id);
        let given = DestinationArgs {
            to_ca: Some("three.ca".into()),
            to_cert: Some("three.crt".into()),
            to_key: Some("three.key".into()),
            to_server_spiffe_id: Some("spiffe://lab/agent/node3".to_owned()),
            ..args("two")
        };
        let found = given.over(two, &source()).unwrap();
        assert_eq!(found.settings.cert, given.to_cert);
        assert_eq!(found.target(Vec::new()).spiffe_id, "spiffe://lab/agent/node3");
        // Half a pair is not mixed with half of another.
        let half = Context { cert: Some("two.crt".into()), ..context() };
        assert_eq!(args("two").over(half, &source()).unwrap().settings.cert, source().cert);
    }

    #[test]
    fn what_the_source_could_not_check_is_refused() {
        let named = |name: &str| Context { server_name: Some(name.to_owned()), ..context() };
        assert!(args("two").over(named("NODE2"), &source()).is_ok());
        let refused = args("two").over(named("other"), &source()).unwrap_err();
        assert!(refused.message.contains("--to-server-spiffe-id"), "{}", refused.message);
        let told = DestinationArgs { to_server_spiffe_id: Some("spiffe://lab/x".to_owned()), ..args("two") };
        assert!(told.over(named("other"), &source()).is_ok());
        let target = told.over(named("other"), &source()).unwrap().target(Vec::new());
        assert_eq!(told.options(&target), "--context two");
        let url = DestinationArgs { to: "https://node2:7443".to_owned(), ..told };
        assert_eq!(url.options(&target), "--endpoint https://node2:7443 --server-spiffe-id spiffe://lab/x");
        let wrong = DestinationArgs { to_server_spiffe_id: Some("node2".to_owned()), ..args("two") };
        assert!(wrong.over(context(), &source()).is_err());
        let nowhere = args("two").over(Context::default(), &source()).unwrap_err();
        assert!(nowhere.message.contains("vfioctl context set two --endpoint"), "{}", nowhere.message);
        let half = args("node2:7443").find(&source()).unwrap_err();
        assert!(half.message.contains("give https://HOST:PORT"), "{}", half.message);
    }

    #[test]
    fn one_device_there_for_each_here() {
        let names = |all: &[&str]| -> Vec<DeviceName> {
            all.iter().map(|id| DeviceName::from_id(id).unwrap()).collect()
        };
        let set = names(&["a", "b"]);
        assert_eq!(args("two").takers(&set).unwrap(), ["devices/a", "devices/b"]);
        let onto = DestinationArgs { onto: names(&["y", "x"]), ..args("two") };
        assert_eq!(onto.takers(&set).unwrap(), ["devices/y", "devices/x"]);
        let short = DestinationArgs { onto: names(&["x"]), ..args("two") };
        assert!(short.takers(&set).unwrap_err().message.contains("names 1 devices, and 2 are to move"));
    }
}
