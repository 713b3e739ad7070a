//! TLS towards an agent: the one place where a rustls `ClientConfig` is made, for callers and for agents alike.
//!
//! ```text
//!   PEM files or memory -> Credentials -+
//!   name or SPIFFE id   -> ServerCheck -+-> client_config() -> ClientConfig: TLS 1.3, client certificate, h2
//! ```
//!
//! Invariants:
//! - TLS 1.3 only, by aws-lc-rs, which is passed explicitly: no process-wide default decides.
//! - A client certificate is always sent. No session is resumed and no data is sent before the handshake is over, so
//!   every connection shows both certificates as they are now.
//! - The chain is always verified; a SPIFFE id takes the place of the name, never of the chain.
//!
//! Failure paths: a file that cannot be read, is too large or holds something else is a [`TlsError`] with its path and
//! what to do. A handshake that fails is put in words by [`explain`].

mod explain;
mod spiffe;

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::{self, PemObject};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

pub use explain::{Explanation, explain};
pub use spiffe::{ServerCheck, SpiffeError, SpiffeId, TrustDomain};

/// The longest PEM file that is read. Real ones are a few KiB.
pub const MAX_PEM_BYTES: u64 = 1024 * 1024;

/// Where a certificate, a key and a CA bundle are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CredentialFiles {
    /// The client certificate and its intermediates, PEM.
    pub certificate: PathBuf,
    /// Its private key, PEM.
    pub key: PathBuf,
    /// The certificates that servers are trusted by, PEM.
    pub ca: PathBuf,
}

/// A client certificate with its key, and who is trusted.
#[derive(Debug)]
pub struct Credentials {
    certificates: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    roots: Arc<RootCertStore>,
}

impl Credentials {
    /// Reads them from files.
    pub fn from_files(files: &CredentialFiles) -> Result<Self, TlsError> {
        Self::parse(
            (&read_bounded(&files.certificate)?, &name(&files.certificate)),
            (&read_bounded(&files.key)?, &name(&files.key)),
            (&read_bounded(&files.ca)?, &name(&files.ca)),
        )
    }

    /// Takes them from memory.
    pub fn from_pem(certificate: &[u8], key: &[u8], ca: &[u8]) -> Result<Self, TlsError> {
        Self::parse((certificate, "the client certificate"), (key, "the client key"), (ca, "the CA bundle"))
    }

    fn parse(certificate: (&[u8], &str), key: (&[u8], &str), ca: (&[u8], &str)) -> Result<Self, TlsError> {
        let certificates = certificates(certificate)?;
        let key_der = PrivateKeyDer::from_pem_slice(key.0).map_err(|source| {
            if matches!(source, pem::Error::NoItemsFound) {
                TlsError::Nothing { origin: key.1.to_owned(), wanted: "private key (PRIVATE KEY)" }
            } else {
                TlsError::NotPem { origin: key.1.to_owned(), source }
            }
        })?;
        let mut roots = RootCertStore::empty();
        for der in self::certificates(ca)? {
            roots.add(der).map_err(|source| TlsError::BadRoot { origin: ca.1.to_owned(), source })?;
        }
        Ok(Self { certificates, key: key_der, roots: Arc::new(roots) })
    }
}

/// The configuration of every connection to an agent.
pub fn client_config(credentials: Credentials, server: &ServerCheck) -> Result<Arc<ClientConfig>, TlsError> {
    let provider = Arc::new(provider());
    let verifier = server.verifier(&credentials.roots, &provider)?;
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::Provider)?
        // The verifier checks the chain by webpki and then the name or the SPIFFE id; see `ServerCheck`.
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_auth_cert(credentials.certificates, credentials.key)
        .map_err(TlsError::Pair)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    config.enable_early_data = false;
    Ok(Arc::new(config))
}

pub(crate) fn provider() -> CryptoProvider {
    aws_lc_rs::default_provider()
}

fn certificates((bytes, origin): (&[u8], &str)) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found = CertificateDer::pem_slice_iter(bytes)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|source| TlsError::NotPem { origin: origin.to_owned(), source })?;
    if found.is_empty() {
        return Err(TlsError::Nothing { origin: origin.to_owned(), wanted: "certificate (CERTIFICATE)" });
    }
    Ok(found)
}

fn name(path: &Path) -> String {
    path.display().to_string()
}

fn read_bounded(path: &Path) -> Result<Vec<u8>, TlsError> {
    let failed = |source| TlsError::Unreadable { path: path.to_owned(), source };
    let file = File::open(path).map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(TlsError::NotAFile { path: path.to_owned() });
    }
    let mut bytes = Vec::new();
    // One byte more than allowed tells a file that is too long from one that just fits, whatever its metadata says.
    file.take(MAX_PEM_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_PEM_BYTES {
        return Err(TlsError::TooLarge { path: path.to_owned() });
    }
    Ok(bytes)
}

/// Why there is no TLS configuration.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("cannot read {}: {source}; give the path of a PEM file that this user may read", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A path is not a file.
    #[error("{} is not a regular file; give the path of a PEM file", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// A file is longer than any PEM file has to be.
    #[error("{} is longer than {MAX_PEM_BYTES} bytes; give a PEM file with only what is needed", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// What is there is not PEM.
    #[error("{origin} is not valid PEM: {source}; write it anew")]
    NotPem {
        /// The file, or what it is for.
        origin: String,
        /// What is wrong with it.
        source: pem::Error,
    },
    /// It is PEM, but of something else.
    #[error("{origin} holds no {wanted}; see that the paths of certificate, key and CA are not mixed up")]
    Nothing {
        /// The file, or what it is for.
        origin: String,
        /// What was looked for.
        wanted: &'static str,
    },
    /// A certificate in the CA bundle cannot be trusted.
    #[error(
        "{origin} holds a certificate that cannot be used as a CA: {source}; give the CA's own certificate"
    )]
    BadRoot {
        /// The file, or what it is for.
        origin: String,
        /// Why not.
        source: rustls::Error,
    },
    /// Certificate and key do not go together.
    #[error(
        "the client certificate and its key cannot be used together: {0}; give the key that the certificate was made for"
    )]
    Pair(#[source] rustls::Error),
    /// The cryptography has no TLS 1.3.
    #[error("TLS 1.3 cannot be set up: {0}")]
    Provider(#[source] rustls::Error),
    /// The name of the server cannot be one.
    #[error(
        "the server name {name:?} is neither a DNS name nor an IP address; give the name that is in its certificate"
    )]
    ServerName {
        /// What was given.
        name: String,
    },
    /// The verifier of servers cannot be made.
    #[error("servers cannot be verified: {0}; give a CA bundle with at least one certificate")]
    Verifier(#[source] rustls::client::VerifierBuilderError),
}
