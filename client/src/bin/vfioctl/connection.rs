//! To an agent: who it is and with which certificates, and a connection to it.
//!
//! ```text
//!   options and environment (clap) -+
//!   the context in use, for the rest +-> Settings -> TLS -> Client
//! ```
//!
//! Invariants: the name of a server goes with its endpoint, so a context's is never held against an endpoint that was
//! given otherwise. The contexts file is read only where something is missing: one that is broken is in nobody's way
//! who says everything.

use std::path::PathBuf;

use vfio_checkpoint_client::call::{CallOptions, Client, RetryPolicy};
use vfio_checkpoint_client::connect::ConnectOptions;
use vfio_checkpoint_client::tls::{self, CredentialFiles, Credentials, ServerCheck};

use crate::cli::Global;
use crate::contexts::{Context, ContextsFile, Place};
use crate::outcome::{Exit, Failure};

/// What is said about an agent, all in all. Nothing is checked yet.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Settings {
    /// The context that some of it comes from.
    pub(crate) context: Option<String>,
    pub(crate) endpoint: Option<String>,
    pub(crate) ca: Option<PathBuf>,
    pub(crate) cert: Option<PathBuf>,
    pub(crate) key: Option<PathBuf>,
    pub(crate) server_name: Option<String>,
    pub(crate) server_spiffe_id: Option<String>,
}

impl Settings {
    pub(crate) fn of(global: &Global) -> Result<Self, Failure> {
        let given = Self {
            context: None,
            endpoint: global.endpoint.clone(),
            ca: global.ca.clone(),
            cert: global.cert.clone(),
            key: global.key.clone(),
            server_name: global.server_name.clone(),
            server_spiffe_id: global.server_spiffe_id.clone(),
        };
        let is_whole =
            given.endpoint.is_some() && given.ca.is_some() && given.cert.is_some() && given.key.is_some();
        if is_whole && global.context.is_none() {
            return Ok(given);
        }
        let file = ContextsFile::read(Place::from_environment()).map_err(Failure::usage)?;
        let Some(name) = global.context.clone().or_else(|| file.parsed.current.clone()) else {
            return Ok(given);
        };
        let context = file.get(&name).map_err(Failure::usage)?;
        Ok(given.over(name, context))
    }

    /// These, and what is missing from a context.
    fn over(self, name: String, context: Context) -> Self {
        let has_name = self.server_name.is_some() || self.server_spiffe_id.is_some();
        let (server_name, server_spiffe_id) = if has_name || self.endpoint.is_some() {
            (self.server_name, self.server_spiffe_id)
        } else {
            (context.server_name, context.server_spiffe_id)
        };
        Self {
            context: Some(name),
            endpoint: self.endpoint.or(context.endpoint),
            ca: self.ca.or(context.ca),
            cert: self.cert.or(context.cert),
            key: self.key.or(context.key),
            server_name,
            server_spiffe_id,
        }
    }

    pub(crate) fn server(&self) -> Result<ServerCheck, Failure> {
        match &self.server_spiffe_id {
            Some(id) => Ok(ServerCheck::SpiffeId(id.parse().map_err(Failure::usage)?)),
            None => Ok(ServerCheck::Name(self.server_name.clone())),
        }
    }

    pub(crate) async fn connect(&self, global: &Global) -> Result<Client, Failure> {
        let endpoint = needed(self.endpoint.as_ref(), "--endpoint", "VFIOCTL_ENDPOINT")?.clone();
        let files = CredentialFiles {
            certificate: needed(self.cert.as_ref(), "--cert", "VFIOCTL_CERT")?.clone(),
            key: needed(self.key.as_ref(), "--key", "VFIOCTL_KEY")?.clone(),
            ca: needed(self.ca.as_ref(), "--ca", "VFIOCTL_CA")?.clone(),
        };
        let server = self.server()?;
        let credentials = Credentials::from_files(&files).map_err(unusable)?;
        let config = tls::client_config(credentials, &server).map_err(unusable)?;
        let mut options = ConnectOptions::new(endpoint, config, server);
        options.connect_timeout = options.connect_timeout.min(global.timeout);
        let client = Client::connect(&options).await.map_err(Failure::connect)?;
        // Whoever typed the command is told what has the device, instead of being left in the dark for as long as it may
        // take; a script is told when to try again.
        let retry = RetryPolicy { repeat_blocked: false, ..RetryPolicy::default() };
        Ok(client.with_call_options(CallOptions {
            deadline: global.timeout,
            retry,
            ..CallOptions::default()
        }))
    }
}

/// What is given cannot be used, and its error ends with what to do.
fn unusable(error: impl std::fmt::Display) -> Failure {
    Failure::with_advice(Exit::Usage, error)
}

/// Connects as the command line, the environment and the context say.
pub(crate) async fn connect(global: &Global) -> Result<Client, Failure> {
    Settings::of(global)?.connect(global).await
}

fn needed<'a, T>(value: Option<&'a T>, option: &str, variable: &str) -> Result<&'a T, Failure> {
    value.ok_or_else(|| {
        unusable(format!(
            "{option} is missing; give it, set {variable}, or put it into a context with `vfioctl context set`"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context() -> Context {
        Context {
            endpoint: Some("https://context:1".to_owned()),
            key: Some("context.key".into()),
            server_name: Some("context".to_owned()),
            ..Context::default()
        }
    }

    #[test]
    fn what_is_given_goes_before_the_context() {
        let given = Settings { key: Some("given.key".into()), ..Settings::default() };
        let all = given.over("lab".to_owned(), context());
        assert_eq!(all.key.unwrap(), PathBuf::from("given.key"));
        assert_eq!(
            (all.endpoint, all.server_name),
            (Some("https://context:1".to_owned()), Some("context".to_owned()))
        );
    }

    #[test]
    fn the_name_of_a_server_goes_with_its_endpoint() {
        let given = Settings { endpoint: Some("https://given:1".to_owned()), ..Settings::default() };
        let all = given.over("lab".to_owned(), context());
        assert_eq!((all.server_name, all.server_spiffe_id), (None, None));
        let given = Settings { server_spiffe_id: Some("spiffe://a/b".to_owned()), ..Settings::default() };
        let all = given.over("lab".to_owned(), context());
        assert_eq!((all.server_name, all.server_spiffe_id), (None, Some("spiffe://a/b".to_owned())));
    }
}
