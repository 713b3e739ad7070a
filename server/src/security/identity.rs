//! Who a certificate says its holder is.
//!
//! ```text
//!   leaf DER -> x509 -> SAN --- one URI, spiffe://  -> Identity::Spiffe
//!                          |--- no SPIFFE URI, DNS  -> Identity::Dns (every name is a candidate)
//!                          +--- anything else       -> IdentityError, the connection is refused
//! ```
//!
//! Decisions:
//! - A certificate with a `spiffe:` URI is an X.509-SVID: it has exactly one URI, and that URI is valid. A
//!   broken one is refused and never falls back to a DNS name beside it.
//! - Without one, each DNS name is a candidate: what a certificate authority vouches for together is granted
//!   together, and the order of the names carries no meaning. Wildcard names are nobody's name and are left
//!   out.
//! - The subject's common name is never an identity.
//!
//! The leaf was verified before it gets here, but by an authority that may be careless: no text of it can
//! panic, and no name with characters outside its own grammar is ever accepted, so that names are safe to log
//! and to compare.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256;
use rustls_pki_types::{CertificateDer, UnixTime};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// The longest SPIFFE ID that the standard obliges anybody to accept.
const SPIFFE_ID_MAX_BYTES: usize = 2048;
/// The longest trust domain.
const TRUST_DOMAIN_MAX_BYTES: usize = 255;
/// The longest DNS name.
const DNS_NAME_MAX_BYTES: usize = 253;
/// More names than this in one certificate are refused: each of them is compared with each grant.
const DNS_NAMES_MAX: usize = 64;

/// Why a certificate names nobody.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// Not an X.509 certificate.
    #[error("the certificate cannot be parsed: {reason}; issue it again")]
    Malformed {
        /// What the parser says.
        reason: String,
    },
    /// The subject alternative names are absent, or there twice.
    #[error(
        "the certificate's subject alternative names cannot be used: {reason}; issue it with one SPIFFE ID as URI, or with DNS names"
    )]
    Names {
        /// What is wrong with them.
        reason: String,
    },
    /// A SPIFFE ID beside another URI.
    #[error(
        "the certificate has {count} URI names beside a SPIFFE ID; an X.509-SVID has exactly one: issue it again"
    )]
    SeveralUris {
        /// How many URIs there are.
        count: usize,
    },
    /// A SPIFFE ID that breaks the standard.
    #[error("SPIFFE ID {id:?} is not valid: {reason}")]
    Spiffe {
        /// The ID, shortened.
        id: String,
        /// The rule it breaks.
        reason: &'static str,
    },
    /// A DNS name that breaks the grammar of host names.
    #[error("DNS name {name:?} is not valid: {reason}")]
    Dns {
        /// The name, shortened.
        name: String,
        /// The rule it breaks.
        reason: &'static str,
    },
    /// More DNS names than are compared.
    #[error("the certificate has {count} DNS names; at most {DNS_NAMES_MAX} are accepted")]
    TooManyNames {
        /// How many there are.
        count: usize,
    },
}

/// Text of a stranger, short enough for an error.
fn shorten(text: &str) -> String {
    text.chars().take(80).collect()
}

/// A trust domain: the authority part of a SPIFFE ID.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct TrustDomain(String);

impl TrustDomain {
    /// The name, in lower case.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for TrustDomain {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        let broken = |reason| Err(IdentityError::Spiffe { id: shorten(text), reason });
        if text.is_empty() {
            return broken("the trust domain is empty");
        }
        if text.len() > TRUST_DOMAIN_MAX_BYTES {
            return broken("the trust domain is longer than 255 bytes");
        }
        if !text
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-' | b'_'))
        {
            return broken("a trust domain has only lower-case letters, digits, '.', '-' and '_'");
        }
        Ok(Self(text.to_owned()))
    }
}

/// A valid SPIFFE ID: `spiffe://trust-domain/path`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpiffeId {
    text: String,
    trust_domain: TrustDomain,
}

impl SpiffeId {
    /// The whole ID.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Its trust domain.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// Its path, with the leading slash; empty where the ID names a trust domain.
    pub fn path(&self) -> &str {
        self.text.get("spiffe://".len() + self.trust_domain.0.len()..).unwrap_or_default()
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SpiffeId({self})")
    }
}

impl FromStr for SpiffeId {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        let broken = |reason| IdentityError::Spiffe { id: shorten(text), reason };
        if text.len() > SPIFFE_ID_MAX_BYTES {
            return Err(broken("it is longer than 2048 bytes"));
        }
        let rest =
            text.strip_prefix("spiffe://").ok_or_else(|| broken("it does not start with spiffe://"))?;
        let (domain, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let trust_domain = TrustDomain::from_str(domain).map_err(|error| match error {
            IdentityError::Spiffe { reason, .. } => broken(reason),
            other @ (IdentityError::Malformed { .. }
            | IdentityError::Names { .. }
            | IdentityError::SeveralUris { .. }
            | IdentityError::Dns { .. }
            | IdentityError::TooManyNames { .. }) => other,
        })?;
        if let Some(segments) = path.strip_prefix('/') {
            for segment in segments.split('/') {
                if segment.is_empty() {
                    return Err(broken("a path segment is empty"));
                }
                if segment == "." || segment == ".." {
                    return Err(broken("a path segment is relative"));
                }
                if !segment.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_')) {
                    return Err(broken("a path has only letters, digits, '.', '-' and '_'"));
                }
            }
        }
        Ok(Self { text: text.to_owned(), trust_domain })
    }
}

/// A host name, in lower case, without a wildcard and without a trailing dot.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DnsName(String);

impl DnsName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DnsName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for DnsName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DnsName({self})")
    }
}

impl FromStr for DnsName {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        let broken = |reason| Err(IdentityError::Dns { name: shorten(text), reason });
        if text.len() > DNS_NAME_MAX_BYTES {
            return broken("it is longer than 253 bytes");
        }
        for label in text.split('.') {
            if label.is_empty() {
                return broken("a label is empty");
            }
            if label.len() > 63 {
                return broken("a label is longer than 63 bytes");
            }
            if !label.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_')) {
                return broken("a label has only letters, digits, '-' and '_'");
            }
            if label.starts_with('-') || label.ends_with('-') {
                return broken("a label starts or ends with '-'");
            }
        }
        Ok(Self(text.to_ascii_lowercase()))
    }
}

/// The DNS names of one certificate: at least one, sorted.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct DnsNames(BTreeSet<DnsName>);

impl DnsNames {
    /// The names in order.
    pub fn iter(&self) -> impl Iterator<Item = &DnsName> {
        self.0.iter()
    }
}

impl From<DnsName> for DnsNames {
    fn from(name: DnsName) -> Self {
        Self(BTreeSet::from([name]))
    }
}

/// Who a peer is.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Identity {
    /// A workload with an X.509-SVID.
    Spiffe(SpiffeId),
    /// A host, under each of these names.
    Dns(DnsNames),
}

impl fmt::Display for Identity {
    /// `spiffe://...`, or `dns:a.example,b.example` in sorted order: the same peer always reads the same.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Identity::Spiffe(id) => write!(f, "{id}"),
            Identity::Dns(names) => {
                for (index, name) in names.iter().enumerate() {
                    write!(f, "{}{name}", if index == 0 { "dns:" } else { "," })?;
                }
                Ok(())
            }
        }
    }
}

impl Identity {
    fn of(certificate: &X509Certificate<'_>) -> Result<Self, IdentityError> {
        let names = certificate
            .subject_alternative_name()
            .map_err(|error| IdentityError::Names { reason: error.to_string() })?
            .ok_or_else(|| IdentityError::Names { reason: "there are none".to_owned() })?;
        let mut uris = Vec::new();
        let mut hosts = Vec::new();
        for name in &names.value.general_names {
            match name {
                GeneralName::URI(uri) => uris.push(*uri),
                GeneralName::DNSName(host) => hosts.push(*host),
                GeneralName::Invalid(tag, _) => {
                    return Err(IdentityError::Names {
                        reason: format!("the name with tag {} is not text", tag.0),
                    });
                }
                GeneralName::OtherName(..)
                | GeneralName::RFC822Name(_)
                | GeneralName::X400Address(_)
                | GeneralName::DirectoryName(_)
                | GeneralName::EDIPartyName(_)
                | GeneralName::IPAddress(_)
                | GeneralName::RegisteredID(_) => {}
            }
        }
        // The scheme of a URI has no case, so `SPIFFE://` claims to be one too, and is then refused for its
        // spelling.
        if uris.iter().any(|uri| uri.get(..7).is_some_and(|scheme| scheme.eq_ignore_ascii_case("spiffe:"))) {
            let [uri] = uris.as_slice() else {
                return Err(IdentityError::SeveralUris { count: uris.len() });
            };
            let id = SpiffeId::from_str(uri)?;
            if id.path().is_empty() {
                let reason = "it names a trust domain and no workload: a leaf needs a path";
                return Err(IdentityError::Spiffe { id: shorten(uri), reason });
            }
            return Ok(Identity::Spiffe(id));
        }
        if hosts.len() > DNS_NAMES_MAX {
            return Err(IdentityError::TooManyNames { count: hosts.len() });
        }
        let hosts: BTreeSet<_> = hosts
            .iter()
            .filter(|host| !host.starts_with("*."))
            .map(|host| host.parse())
            .collect::<Result<_, _>>()?;
        if hosts.is_empty() {
            let reason = "there is no SPIFFE ID and no DNS name that is not a wildcard".to_owned();
            return Err(IdentityError::Names { reason });
        }
        Ok(Identity::Dns(DnsNames(hosts)))
    }
}

/// SHA-256 of a certificate's subject public key info: names a key, whatever certificate it is in.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKeyHash(pub [u8; 32]);

impl PublicKeyHash {
    fn of(certificate: &X509Certificate<'_>) -> Option<Self> {
        sha256(certificate.public_key().raw).map(Self)
    }

    /// The key hash of a certificate, whatever names are in it.
    pub fn of_certificate(leaf: &CertificateDer<'_>) -> Result<Self, IdentityError> {
        Self::of(&parse(leaf)?).ok_or_else(no_digest)
    }
}

impl fmt::Display for PublicKeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for PublicKeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKeyHash({self})")
    }
}

/// A certificate's serial number: big-endian, as encoded, without leading zeroes.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Serial(Vec<u8>);

impl Serial {
    /// From big-endian bytes.
    pub fn new(bytes: &[u8]) -> Self {
        Self(bytes.iter().copied().skip_while(|byte| *byte == 0).collect())
    }

    /// The bytes, big-endian.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("0");
        }
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Serial({self})")
    }
}

/// What is kept of a peer's verified leaf.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerCertificate {
    /// Who it is.
    pub identity: Identity,
    /// Names its key.
    pub public_key_hash: PublicKeyHash,
    /// Names the certificate, within its issuer.
    pub serial: Serial,
    /// The last second in which it is valid.
    pub not_after: UnixTime,
    /// The issuer's name. Control characters are escaped.
    pub issuer: String,
}

impl PeerCertificate {
    /// Reads a leaf that was verified. It is not verified here.
    pub fn from_der(leaf: &CertificateDer<'_>) -> Result<Self, IdentityError> {
        let certificate = parse(leaf)?;
        Ok(Self {
            identity: Identity::of(&certificate)?,
            public_key_hash: PublicKeyHash::of(&certificate).ok_or_else(no_digest)?,
            serial: Serial::new(certificate.raw_serial()),
            not_after: not_after_of(&certificate),
            issuer: certificate
                .issuer()
                .to_string()
                .chars()
                .take(512)
                .flat_map(char::escape_default)
                .collect(),
        })
    }
}

fn parse<'a>(der: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, IdentityError> {
    let (rest, certificate) = X509Certificate::from_der(der)
        .map_err(|error| IdentityError::Malformed { reason: error.to_string() })?;
    if !rest.is_empty() {
        let reason = format!("{} bytes follow the certificate", rest.len());
        return Err(IdentityError::Malformed { reason });
    }
    Ok(certificate)
}

fn not_after_of(certificate: &X509Certificate<'_>) -> UnixTime {
    unix_time(certificate.validity().not_after.timestamp())
}

/// Seconds since 1970 as the verifiers count them; what lies before 1970 is long past either way.
pub(super) fn unix_time(timestamp_secs: i64) -> UnixTime {
    UnixTime::since_unix_epoch(std::time::Duration::from_secs(u64::try_from(timestamp_secs).unwrap_or(0)))
}

/// The first and the last second in which a certificate is valid.
pub(super) fn validity_of(der: &CertificateDer<'_>) -> Result<(UnixTime, UnixTime), IdentityError> {
    let certificate = parse(der)?;
    Ok((unix_time(certificate.validity().not_before.timestamp()), not_after_of(&certificate)))
}

/// SHA-256 by the one crypto provider. None cannot happen: a TLS 1.3 suite is one.
pub(super) fn sha256(bytes: &[u8]) -> Option<[u8; 32]> {
    TLS13_AES_128_GCM_SHA256.tls13()?.common.hash_provider.hash(bytes).as_ref().try_into().ok()
}

fn no_digest() -> IdentityError {
    IdentityError::Malformed { reason: "its key cannot be hashed".to_owned() }
}
