//! What TLS is made of: one set of certificate, key, authorities and revocation lists, and the configurations
//! of it.
//!
//! ```text
//!   TlsBytes --parse, check--> TlsMaterial --server_config--> rustls::ServerConfig   (client certificate required)
//!                                          --client_config--> rustls::ClientConfig   (name, SPIFFE ID, trust domain)
//!                                          --verify_peer----> the handshake's verdict, asked again later
//! ```
//!
//! Invariants:
//! - TLS 1.3 only, ALPN `h2` only, aws-lc-rs only.
//! - No resumption, no tickets and no early data, in either role. A ticket would carry yesterday's verdict
//!   past a revocation, and early data can be replayed. A full handshake costs a millisecond; the connections
//!   live long.
//! - A revocation list that has expired revokes all: with lists configured, what they cannot answer for is
//!   refused, for the whole chain.
//! - An authority is trusted because it is configured. Its own dates are not looked at: take it out of the
//!   bundle.
//!
//! Failure paths: a set with any fault is refused whole, with the file's name, before it can serve a
//! handshake.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, InconsistentKeys, RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, UnixTime};

use super::clock::{Clock, TlsClock};
use super::crl::RevocationLists;
use super::files::{TlsBytes, TlsError, TlsFiles, secs_between};
use super::identity::{PublicKeyHash, validity_of};
use super::server_identity::{Demand, DemandingVerifier, ServerExpectation, SpiffeServerVerifier};

/// The one application protocol.
const ALPN_H2: &[u8] = b"h2";

/// The one crypto provider.
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

/// A checked set.
pub struct TlsMaterial {
    key: Arc<CertifiedKey>,
    roots: Arc<RootCertStore>,
    crls: Vec<CertificateRevocationListDer<'static>>,
    clients: Arc<dyn ClientCertVerifier>,
    servers: Arc<WebPkiServerVerifier>,
    own_key_hash: PublicKeyHash,
    own_not_after: UnixTime,
    crl_next_update: Option<UnixTime>,
    unanswered: Vec<String>,
}

impl fmt::Debug for TlsMaterial {
    /// Says nothing of the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsMaterial")
            .field("own_key_hash", &self.own_key_hash)
            .field("own_not_after", &self.own_not_after)
            .field("authorities", &self.roots.len())
            .field("crls", &self.crls.len())
            .finish_non_exhaustive()
    }
}

impl TlsMaterial {
    /// Reads and checks the files.
    pub fn load(files: &TlsFiles, clock: &dyn Clock) -> Result<Self, TlsError> {
        Self::parse(files, &TlsBytes::read(files)?, clock.now())
    }

    /// Checks what was read. `files` gives errors their names.
    pub fn parse(files: &TlsFiles, bytes: &TlsBytes, now: UnixTime) -> Result<Self, TlsError> {
        let chain = certificates(&files.certificate, &bytes.certificate)?;
        let at =
            |index| move |source| TlsError::Certificate { path: files.certificate.clone(), index, source };
        let mut own_not_after = None;
        for (index, certificate) in chain.iter().enumerate() {
            let (not_before, not_after) = validity_of(certificate).map_err(at(index))?;
            let path = files.certificate.clone();
            if now < not_before {
                return Err(TlsError::OwnNotYetValid { path, secs_left: secs_between(now, not_before) });
            }
            if now > not_after {
                return Err(TlsError::OwnExpired { path, secs_ago: secs_between(not_after, now) });
            }
            own_not_after = Some(own_not_after.unwrap_or(not_after).min(not_after));
        }
        let missing = || TlsError::Missing { path: files.certificate.clone(), what: "CERTIFICATE section" };
        let own_not_after = own_not_after.ok_or_else(missing)?;
        let own_key_hash =
            PublicKeyHash::of_certificate(chain.first().ok_or_else(missing)?).map_err(at(0))?;

        let key = PrivateKeyDer::pem_slice_iter(&bytes.key)
            .next()
            .ok_or_else(|| TlsError::Missing { path: files.key.clone(), what: "PRIVATE KEY section" })?
            .map_err(|source| TlsError::Pem { path: files.key.clone(), source })?;
        let provider = provider();
        let key = CertifiedKey::from_der(chain, key, &provider).map_err(|source| {
            if source == rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) {
                return TlsError::KeyMismatch {
                    key: files.key.clone(),
                    certificate: files.certificate.clone(),
                };
            }
            TlsError::Key { path: files.key.clone(), source }
        })?;

        let authority_certificates = certificates(&files.client_ca, &bytes.client_ca)?;
        let roots = Arc::new(authorities(&files.client_ca, &authority_certificates)?);
        let RevocationLists { lists: crls, first_update: crl_next_update, unanswered } =
            RevocationLists::parse(files, bytes, &authority_certificates, now)?;
        let no_verifier = |source| TlsError::Verifier { path: files.client_ca.clone(), source };
        let clients = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
            .with_crls(crls.clone())
            .enforce_revocation_expiration()
            .build()
            .map_err(no_verifier)?;
        let servers = WebPkiServerVerifier::builder_with_provider(Arc::clone(&roots), provider)
            .with_crls(crls.clone())
            .enforce_revocation_expiration()
            .build()
            .map_err(no_verifier)?;
        let key = Arc::new(key);
        Ok(Self {
            key,
            roots,
            crls,
            clients,
            servers,
            own_key_hash,
            own_not_after,
            crl_next_update,
            unanswered,
        })
    }

    /// Names this agent's own key: what a migration ticket is bound to.
    pub fn own_key_hash(&self) -> PublicKeyHash {
        self.own_key_hash
    }

    /// The last second in which this agent's own chain is valid.
    pub fn own_not_after(&self) -> UnixTime {
        self.own_not_after
    }

    /// When the first of the revocation lists stops to answer.
    pub fn crl_next_update(&self) -> Option<UnixTime> {
        self.crl_next_update
    }

    /// Authorities without a revocation list while others have one: all of their peers are refused.
    pub fn authorities_without_crl(&self) -> &[String] {
        &self.unanswered
    }

    /// The verdict of a handshake, for a chain as a peer presented it, leaf first.
    pub fn verify_peer(&self, chain: &[CertificateDer<'_>], now: UnixTime) -> Result<(), rustls::Error> {
        let (leaf, intermediates) = chain.split_first().ok_or(rustls::Error::NoCertificatesPresented)?;
        self.clients.verify_client_cert(leaf, intermediates, now).map(|_| ())
    }

    /// How this agent serves.
    pub fn server_config(&self, clock: Arc<dyn Clock>) -> Result<ServerConfig, TlsError> {
        let mut config = ServerConfig::builder_with_details(provider(), Arc::new(TlsClock(clock)))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|source| TlsError::Setup { source })?
            .with_client_cert_verifier(Arc::clone(&self.clients))
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(&self.key))));
        config.alpn_protocols = vec![ALPN_H2.to_vec()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.max_early_data_size = 0;
        Ok(config)
    }

    /// How this agent calls another one, and what it demands of it, where it does.
    pub fn client_config(
        &self,
        expected: ServerExpectation,
        demand: Option<Demand>,
        clock: Arc<dyn Clock>,
    ) -> Result<ClientConfig, TlsError> {
        let servers = Arc::clone(&self.servers);
        let verifier: Arc<dyn ServerCertVerifier> = match expected {
            ServerExpectation::HostName => servers,
            ServerExpectation::Spiffe(_) | ServerExpectation::TrustDomain(_) => {
                Arc::new(SpiffeServerVerifier::new(servers, Arc::clone(&self.roots), provider(), expected))
            }
        };
        let verifier = match demand {
            Some(demand) => Arc::new(DemandingVerifier::new(verifier, demand)),
            None => verifier,
        };
        let mut config = ClientConfig::builder_with_details(provider(), Arc::new(TlsClock(clock)))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|source| TlsError::Setup { source })?
            // Not dangerous here: the verifiers are built above, over the configured authorities and lists.
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(&self.key))));
        config.alpn_protocols = vec![ALPN_H2.to_vec()];
        config.resumption = rustls::client::Resumption::disabled();
        config.enable_early_data = false;
        Ok(config)
    }
}

fn certificates(path: &Path, bytes: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found = CertificateDer::pem_slice_iter(bytes)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|source| TlsError::Pem { path: path.to_owned(), source })?;
    if found.is_empty() {
        return Err(TlsError::Missing { path: path.to_owned(), what: "CERTIFICATE section" });
    }
    Ok(found)
}

fn authorities(path: &Path, found: &[CertificateDer<'_>]) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for (index, certificate) in found.iter().enumerate() {
        roots.add(certificate.clone()).map_err(|source| TlsError::Authority {
            path: path.to_owned(),
            index,
            source,
        })?;
    }
    Ok(roots)
}
