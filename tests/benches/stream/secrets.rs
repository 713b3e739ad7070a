//! Certificates that all ends share: what one process issues, the others read.

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::sync::Arc;

use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tempfile::TempDir;
use vfio_checkpoint_client::call::Client;
use vfio_checkpoint_client::connect::ConnectOptions;
use vfio_checkpoint_client::tls::{Credentials, ServerCheck, client_config};
use vfio_checkpoint_server::security::identity::Identity;
use vfio_checkpoint_server::security::lab::LabCa;

use crate::lab::validity;

/// A folder with the certificates of a run.
pub(crate) struct Secrets {
    folder: TempDir,
}

impl Secrets {
    pub(crate) fn new() -> Self {
        // On a real disk beside the build, not in memory: stores and journals are in it.
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let ca = LabCa::new(&"lab.test".parse().unwrap(), validity()).unwrap();
        for name in ["taker", "giver", "restorer"] {
            let own = folder.path().join(name);
            std::fs::create_dir_all(&own).unwrap();
            let identity = Identity::Spiffe(format!("spiffe://lab.test/{name}/bench").parse().unwrap());
            let address = IpAddr::V4(Ipv4Addr::LOCALHOST);
            let issued = ca.issue(&identity, &["localhost"], &[address], validity()).unwrap();
            issued.write(&own, &ca.pem()).unwrap();
        }
        Self { folder }
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }
}

/// A client of an agent, with the role that agents give to `restorer`.
pub(crate) async fn client(folder: &Path, address: &str) -> Client {
    let own = folder.join("restorer");
    let read = |name: &str| std::fs::read(own.join(name)).unwrap();
    let credentials = Credentials::from_pem(&read("tls.crt"), &read("tls.key"), &read("ca.crt")).unwrap();
    let check = ServerCheck::Name(None);
    let tls = client_config(credentials, &check).unwrap();
    Client::connect(&ConnectOptions::new(format!("https://{address}"), tls, check)).await.unwrap()
}

/// TLS 1.3 as rustls does it by itself, for who takes.
pub(crate) fn server_tls(folder: &Path) -> Arc<ServerConfig> {
    let (chain, key) = identity(&folder.join("taker"));
    let config = ServerConfig::builder_with_protocol_versions(&[&rustls::version::TLS13])
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    Arc::new(with_http2(config, |config| &mut config.alpn_protocols))
}

/// The same, for who gives.
pub(crate) fn client_tls(folder: &Path) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(folder.join("giver/ca.crt")).unwrap()).unwrap();
    let config = ClientConfig::builder_with_protocol_versions(&[&rustls::version::TLS13])
        .with_root_certificates(roots)
        .with_no_client_auth();
    Arc::new(with_http2(config, |config| &mut config.alpn_protocols))
}

fn with_http2<C>(mut config: C, protocols: impl FnOnce(&mut C) -> &mut Vec<Vec<u8>>) -> C {
    *protocols(&mut config) = vec![b"h2".to_vec()];
    config
}

fn identity(own: &Path) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
    let chain = CertificateDer::pem_file_iter(own.join("tls.crt")).unwrap().map(Result::unwrap).collect();
    (chain, PrivateKeyDer::from_pem_file(own.join("tls.key")).unwrap())
}
