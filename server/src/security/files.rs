//! The files that certificates, keys, authorities and revocation lists come from.
//!
//! ```text
//!   TlsFiles (paths, configured) --read, bounded--> TlsBytes --fingerprint--> has anything changed?
//!                                                      +----> tls::TlsMaterial
//! ```
//!
//! Files are compared by content: a Kubernetes secret changes by swapping a symbolic link two folders up,
//! which leaves names and often sizes as they were. Reading several files is not atomic, so they are read
//! until two readings in a row agree; a certificate of one generation never meets the key of another because
//! of a swap between two reads.
//!
//! Failure paths: every error names the file and what to do about it.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use rustls_pki_types::{UnixTime, pem};
use serde::{Deserialize, Serialize};

use super::identity::{IdentityError, sha256};

/// A certificate chain, a key or a CA bundle is never this large.
const PEM_MAX_BYTES: u64 = 1 << 20;
/// Revocation lists grow with the years.
const CRL_MAX_BYTES: u64 = 16 << 20;
/// How often files that change under the reader are read again before that is an error.
const READ_ATTEMPTS: usize = 4;

/// Where the files are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    /// PEM: this agent's certificate, then its intermediates.
    pub certificate: PathBuf,
    /// PEM: the certificate's private key.
    pub key: PathBuf,
    /// PEM: the authorities whose certificates peers may show.
    pub client_ca: PathBuf,
    /// PEM: revocation lists. If there is one, every authority in a peer's chain needs one.
    #[serde(default)]
    pub crls: Vec<PathBuf>,
}

/// Why files cannot be put in force.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("cannot read {}: check that it exists and that the agent's user may read it", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// A folder, a pipe or a device.
    #[error("{} is not a regular file; give the path of a PEM file", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// More than such a file can sensibly hold.
    #[error("{} is larger than {limit_bytes} bytes; is it the right file?", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The bound.
        limit_bytes: u64,
    },
    /// The files change faster than they can be read.
    #[error("the files beside {} change while they are read; write them once and reload again", path.display())]
    Unsteady {
        /// The first of them.
        path: PathBuf,
    },
    /// Broken PEM.
    #[error("{} is not valid PEM; write it again", path.display())]
    Pem {
        /// The file.
        path: PathBuf,
        /// Where it breaks.
        #[source]
        source: pem::Error,
    },
    /// PEM without what is needed.
    #[error("{} has no {what}; put one into it", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// What is looked for.
        what: &'static str,
    },
    /// A certificate that cannot be parsed.
    #[error("certificate {index} in {} cannot be used; issue it again", path.display())]
    Certificate {
        /// The file.
        path: PathBuf,
        /// Its place in the file, from 0.
        index: usize,
        /// Why.
        #[source]
        source: IdentityError,
    },
    /// The agent's own certificate has expired.
    #[error(
        "certificate {} expired {secs_ago} s ago; issue a new one (or correct this host's clock)",
        path.display()
    )]
    OwnExpired {
        /// The file.
        path: PathBuf,
        /// For how long.
        secs_ago: u64,
    },
    /// The agent's own certificate is not valid yet.
    #[error("certificate {} becomes valid in {secs_left} s; correct this host's clock or wait", path.display())]
    OwnNotYetValid {
        /// The file.
        path: PathBuf,
        /// How long it takes.
        secs_left: u64,
    },
    /// The key belongs to another certificate.
    #[error(
        "the key in {} does not belong to the first certificate in {}; install the two that were issued together",
        key.display(), certificate.display()
    )]
    KeyMismatch {
        /// The key's file.
        key: PathBuf,
        /// The certificate's file.
        certificate: PathBuf,
    },
    /// The key cannot be used at all.
    #[error("the key in {} cannot be used; write an unencrypted ECDSA, Ed25519 or RSA key", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// What rustls says.
        #[source]
        source: rustls::Error,
    },
    /// An authority's certificate is no trust anchor.
    #[error("certificate {index} in {} cannot be an authority; take it out or issue it again", path.display())]
    Authority {
        /// The file.
        path: PathBuf,
        /// Its place in the file, from 0.
        index: usize,
        /// What rustls says.
        #[source]
        source: rustls::Error,
    },
    /// A revocation list that cannot be parsed.
    #[error("revocation list {} cannot be used: {reason}; publish it again", path.display())]
    Crl {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A revocation list that says nothing about today.
    #[error("revocation list {} expired {secs_ago} s ago; fetch the current one", path.display())]
    CrlExpired {
        /// The file.
        path: PathBuf,
        /// For how long.
        secs_ago: u64,
    },
    /// The revocation lists and authorities make no verifier.
    #[error("the authorities in {} and the revocation lists make no verifier", path.display())]
    Verifier {
        /// The authorities' file.
        path: PathBuf,
        /// What rustls says.
        #[source]
        source: rustls::server::VerifierBuilderError,
    },
    /// rustls refuses the provider or the versions.
    #[error("TLS cannot be set up")]
    Setup {
        /// What rustls says.
        #[source]
        source: rustls::Error,
    },
    /// The thread that read the files died.
    #[error("the thread that reads the certificate files died; reload again")]
    Reader {
        /// How.
        #[source]
        source: io::Error,
    },
}

/// What is in the files. Holds a private key: it has no `Debug`.
#[derive(Clone, PartialEq, Eq)]
#[allow(missing_debug_implementations, reason = "holds a private key")]
pub struct TlsBytes {
    /// The certificate chain.
    pub certificate: Vec<u8>,
    /// The private key.
    pub key: Vec<u8>,
    /// The authorities.
    pub client_ca: Vec<u8>,
    /// The revocation lists, in the order of their paths.
    pub crls: Vec<Vec<u8>>,
}

/// Names the content of a set of files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint([u8; 32]);

impl TlsBytes {
    /// Reads every file, until two readings agree.
    pub fn read(files: &TlsFiles) -> Result<Self, TlsError> {
        let mut last = Self::read_once(files)?;
        for _ in 1..READ_ATTEMPTS {
            let again = Self::read_once(files)?;
            if again == last {
                return Ok(again);
            }
            last = again;
        }
        Err(TlsError::Unsteady { path: files.certificate.clone() })
    }

    fn read_once(files: &TlsFiles) -> Result<Self, TlsError> {
        Ok(Self {
            certificate: read_file(&files.certificate, PEM_MAX_BYTES)?,
            key: read_file(&files.key, PEM_MAX_BYTES)?,
            client_ca: read_file(&files.client_ca, PEM_MAX_BYTES)?,
            crls: files.crls.iter().map(|path| read_file(path, CRL_MAX_BYTES)).collect::<Result<_, _>>()?,
        })
    }

    /// The content's name. The key goes in by its digest only.
    pub fn fingerprint(&self) -> Option<Fingerprint> {
        let mut digests = Vec::new();
        for part in [&self.certificate, &self.key, &self.client_ca].into_iter().chain(&self.crls) {
            digests.extend_from_slice(&sha256(part)?);
        }
        sha256(&digests).map(Fingerprint)
    }
}

fn read_file(path: &Path, limit_bytes: u64) -> Result<Vec<u8>, TlsError> {
    let failed = |source| TlsError::Read { path: path.to_owned(), source };
    // Asked before it is opened: opening a pipe waits for its other end.
    if !std::fs::metadata(path).map_err(failed)?.is_file() {
        return Err(TlsError::NotAFile { path: path.to_owned() });
    }
    let mut bytes = Vec::new();
    File::open(path).map_err(failed)?.take(limit_bytes + 1).read_to_end(&mut bytes).map_err(failed)?;
    if u64::try_from(bytes.len()).is_ok_and(|len| len > limit_bytes) {
        return Err(TlsError::TooLarge { path: path.to_owned(), limit_bytes });
    }
    Ok(bytes)
}

/// How many seconds `later` is after `earlier`; 0 if it is not.
pub(super) fn secs_between(earlier: UnixTime, later: UnixTime) -> u64 {
    later.as_secs().saturating_sub(earlier.as_secs())
}
