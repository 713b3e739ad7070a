//! A throwaway authority, and what it issues to agents and the client. Its keys are new for each test program, and nothing
//! of them is in a log.

use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use rustls_pki_types::UnixTime;
use tempfile::TempDir;
use vfio_checkpoint_client::call::{CallOptions, Jitter, RetryPolicy};
use vfio_checkpoint_client::connect::ConnectOptions;
use vfio_checkpoint_client::network::Network;
use vfio_checkpoint_client::tls::{Credentials, ServerCheck, client_config};
use vfio_checkpoint_server::config::AgentConfig;
use vfio_checkpoint_server::security::files::TlsFiles;
use vfio_checkpoint_server::security::identity::Identity;
use vfio_checkpoint_server::security::lab::{LabCa, Validity};
use vfio_checkpoint_server::security::roles::{Grant, Role};

use crate::dice::Dice;
use crate::world::{PORT, epoch};

/// Who is who.
pub(crate) struct Pki {
    agents: Vec<(&'static str, TlsFiles)>,
    client: Arc<rustls::ClientConfig>,
    _folder: TempDir,
}

impl Pki {
    pub(crate) fn new(agents: &[&'static str]) -> Self {
        // From before the simulations begin until long after this machine's own time: a client's clock is the machine's.
        let since = epoch().duration_since(UNIX_EPOCH).unwrap();
        let since = since.saturating_sub(Duration::from_hours(24 * 365));
        let validity =
            Validity::starting(UnixTime::since_unix_epoch(since), Duration::from_hours(24 * 365 * 30));
        let ca = LabCa::new(&"lab.test".parse().unwrap(), validity).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let agents = agents.iter().map(|name| {
            let place = folder.path().join(name);
            std::fs::create_dir(&place).unwrap();
            let identity = Identity::Spiffe(format!("spiffe://lab.test/agent/{name}").parse().unwrap());
            let issued = ca.issue(&identity, &[name], &[], validity).unwrap();
            (*name, issued.write(&place, &ca.pem()).unwrap())
        });
        let agents = agents.collect();
        let identity = Identity::Spiffe("spiffe://lab.test/client/test".parse().unwrap());
        let issued = ca.issue(&identity, &[], &[], validity).unwrap();
        let credentials = Credentials::from_pem(
            issued.certificate_pem.as_bytes(),
            issued.key_pem().as_bytes(),
            ca.pem().as_bytes(),
        );
        let client = client_config(credentials.unwrap(), &ServerCheck::Name(None)).unwrap();
        Self { agents, client, _folder: folder }
    }

    /// Gives an agent its certificate, the client every role there, and the other agents theirs.
    pub(crate) fn configure(&self, name: &str, config: &mut AgentConfig) {
        let (_, files) = self.agents.iter().find(|(agent, _)| *agent == name).unwrap();
        config.tls.certificate.clone_from(&files.certificate);
        config.tls.key.clone_from(&files.key);
        config.tls.client_ca.clone_from(&files.client_ca);
        let (who, roles) = ("spiffe://lab.test/client/*".parse().unwrap(), Role::ALL.to_vec());
        let peers = Grant { who: "spiffe://lab.test/agent/*".parse().unwrap(), roles: vec![Role::Peer] };
        config.grants = vec![Grant { who, roles }, peers];
    }

    /// How the client reaches an agent.
    pub(crate) fn options(&self, agent: &str, network: Arc<dyn Network>) -> ConnectOptions {
        let endpoint = format!("https://{agent}:{PORT}");
        let options = ConnectOptions::new(endpoint, Arc::clone(&self.client), ServerCheck::Name(None));
        ConnectOptions {
            connect_timeout: Duration::from_secs(1),
            keepalive_interval: Duration::from_millis(400),
            keepalive_timeout: Duration::from_millis(400),
            network,
            ..options
        }
    }
}

/// How the client calls.
pub(crate) fn call_options(dice: Arc<Dice>) -> CallOptions {
    CallOptions {
        deadline: Duration::from_secs(2),
        retry: RetryPolicy {
            attempts: 3,
            longest_pause: Duration::from_millis(400),
            ..RetryPolicy::default()
        },
        jitter: Jitter::from_fn(move || u32::try_from(dice.draw() >> 32).unwrap()),
        trace: None,
    }
}
