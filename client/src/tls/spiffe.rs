//! Who a server must be: a name, a SPIFFE id, or any member of a trust domain.
//!
//! ```text
//!   server's chain -> webpki: signed by a trusted CA, in time, for servers -> name | URI SAN -> accepted
//! ```
//!
//! Invariants: the chain is verified before a name in it is looked at. A certificate with a SPIFFE id has exactly one
//! URI, as the SPIFFE standard demands; with more it is refused.
//!
//! Failure paths: a chain that does not hold is rustls's own error; a certificate of somebody else is a [`SpiffeError`].

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, DigitallySignedStruct, OtherError, RootCertStore, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;

use super::TlsError;

/// The longest SPIFFE id, by its standard.
const MAX_ID_BYTES: usize = 2048;
/// The longest trust domain, by its standard.
const MAX_DOMAIN_BYTES: usize = 255;

/// Who a server must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServerCheck {
    /// Whose certificate has this DNS name or IP address. `None` for the host of the endpoint.
    Name(Option<String>),
    /// Whose certificate has exactly this SPIFFE id.
    SpiffeId(SpiffeId),
    /// Whose certificate has a SPIFFE id of this trust domain.
    TrustDomain(TrustDomain),
}

impl ServerCheck {
    /// The name that TLS is told, for an endpoint's host.
    pub fn server_name(&self, host: &str) -> Result<ServerName<'static>, TlsError> {
        let name = match self {
            Self::Name(Some(name)) => name.as_str(),
            Self::Name(None) | Self::SpiffeId(_) | Self::TrustDomain(_) => host,
        };
        ServerName::try_from(name.to_owned()).map_err(|_| TlsError::ServerName { name: name.to_owned() })
    }

    pub(super) fn verifier(
        &self,
        roots: &Arc<RootCertStore>,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Arc<dyn ServerCertVerifier>, TlsError> {
        let expected = match self {
            Self::Name(_) => {
                let verifier = WebPkiServerVerifier::builder_with_provider(roots.clone(), provider.clone());
                return Ok(verifier.build().map_err(TlsError::Verifier)?);
            }
            Self::SpiffeId(id) => Expected::Id(id.clone()),
            Self::TrustDomain(domain) => Expected::Domain(domain.clone()),
        };
        Ok(Arc::new(SpiffeVerifier { expected, roots: roots.clone(), provider: provider.clone() }))
    }
}

/// `spiffe://trust-domain/path`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SpiffeId {
    text: String,
    domain: TrustDomain,
}

impl SpiffeId {
    /// The trust domain that it belongs to.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.domain
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for SpiffeId {
    type Err = SpiffeError;

    fn from_str(text: &str) -> Result<Self, SpiffeError> {
        let invalid = |problem| SpiffeError::Invalid { text: clip(text), problem };
        if text.len() > MAX_ID_BYTES {
            return Err(invalid("it is longer than 2048 bytes"));
        }
        let Some(rest) = text.strip_prefix("spiffe://") else {
            return Err(invalid("it does not begin with spiffe://"));
        };
        let Some((domain, path)) = rest.split_once('/') else {
            return Err(invalid("it has no path after the trust domain"));
        };
        let domain = TrustDomain::from_str(domain)?;
        let segment_fits = |segment: &str| {
            !segment.is_empty()
                && segment != "."
                && segment != ".."
                && segment.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte))
        };
        if !path.split('/').all(segment_fits) {
            return Err(invalid(
                "its path has an empty part, a dot part, or a character outside [a-zA-Z0-9.-_]",
            ));
        }
        Ok(Self { text: text.to_owned(), domain })
    }
}

/// The first part of a SPIFFE id.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TrustDomain(String);

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for TrustDomain {
    type Err = SpiffeError;

    fn from_str(text: &str) -> Result<Self, SpiffeError> {
        let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b".-_".contains(&byte);
        if text.is_empty() || text.len() > MAX_DOMAIN_BYTES || !text.bytes().all(fits) {
            let problem = "a trust domain has 1 to 255 characters of [a-z0-9.-_]";
            return Err(SpiffeError::Invalid { text: clip(text), problem });
        }
        Ok(Self(text.to_owned()))
    }
}

/// What a peer sends is shown, but never at any length.
fn clip(text: &str) -> String {
    text.chars().take(128).collect()
}

/// A SPIFFE id that is none, or not the one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpiffeError {
    /// Not a SPIFFE id.
    #[error("{text:?} is not a SPIFFE id: {problem}")]
    Invalid {
        /// What was given, at most 128 characters of it.
        text: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A certificate that does not have exactly one URI.
    #[error(
        "the server's certificate has {uris} URIs where a SPIFFE id is exactly one; {expected} was expected"
    )]
    NotOne {
        /// How many it has.
        uris: usize,
        /// Who was expected.
        expected: String,
    },
    /// A certificate of somebody else.
    #[error("the server is {found}, but {expected} was expected")]
    SomebodyElse {
        /// Who it is.
        found: String,
        /// Who was expected.
        expected: String,
    },
}

#[derive(Debug)]
enum Expected {
    Id(SpiffeId),
    Domain(TrustDomain),
}

impl Expected {
    fn check(&self, uris: &[&str]) -> Result<(), SpiffeError> {
        let [uri] = uris else {
            return Err(SpiffeError::NotOne { uris: uris.len(), expected: self.to_string() });
        };
        let found = SpiffeId::from_str(uri)?;
        let is_expected = match self {
            Self::Id(id) => found == *id,
            Self::Domain(domain) => found.trust_domain() == domain,
        };
        if is_expected {
            Ok(())
        } else {
            Err(SpiffeError::SomebodyElse { found: clip(&found.to_string()), expected: self.to_string() })
        }
    }
}

impl fmt::Display for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Id(id) => id.fmt(f),
            Self::Domain(domain) => write!(f, "a member of spiffe://{domain}"),
        }
    }
}

#[derive(Debug)]
struct SpiffeVerifier {
    expected: Expected,
    roots: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for SpiffeVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        verify_server_cert_signed_by_trust_anchor(
            &ParsedCertificate::try_from(end_entity)?,
            &self.roots,
            intermediates,
            now,
            self.provider.signature_verification_algorithms.all,
        )?;
        let bad = || rustls::Error::InvalidCertificate(CertificateError::BadEncoding);
        let (_, parsed) =
            x509_parser::certificate::X509Certificate::from_der(end_entity).map_err(|_| bad())?;
        let names = parsed.subject_alternative_name().map_err(|_| bad())?;
        let uris: Vec<&str> = names
            .iter()
            .flat_map(|extension| &extension.value.general_names)
            .filter_map(|name| if let GeneralName::URI(uri) = name { Some(*uri) } else { None })
            .collect();
        match self.expected.check(&uris) {
            Ok(()) => Ok(ServerCertVerified::assertion()),
            Err(error) => {
                Err(rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(error)))))
            }
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_what_the_standard_says() {
        for good in ["spiffe://example.org/a", "spiffe://a-b_c.d/ns/x/sa/y", "spiffe://d/Agent.1"] {
            assert_eq!(good.parse::<SpiffeId>().unwrap().to_string(), good);
        }
        let long = format!("spiffe://d/{}", "x".repeat(2048));
        for bad in [
            "",
            "http://d/a",
            "spiffe://d",
            "spiffe:///a",
            "spiffe://D/a",
            "spiffe://d/",
            "spiffe://d/a//b",
            "spiffe://d/a/..",
            "spiffe://d/.",
            "spiffe://d:1/a",
            "spiffe://u@d/a",
            "spiffe://d/a?b",
            "spiffe://d/ä",
            &long,
        ] {
            let error = bad.parse::<SpiffeId>().unwrap_err().to_string();
            assert!(error.len() < 300, "{error}");
        }
    }

    #[test]
    fn only_the_expected_one_passes() {
        let id = Expected::Id("spiffe://d/a".parse().unwrap());
        let domain = Expected::Domain("d".parse().unwrap());
        assert_eq!(id.check(&["spiffe://d/a"]), Ok(()));
        assert_eq!(domain.check(&["spiffe://d/b"]), Ok(()));
        for (expected, uris) in [
            (&id, vec!["spiffe://d/b"]),
            (&domain, vec!["spiffe://e/a"]),
            (&id, vec![]),
            (&id, vec!["spiffe://d/a"; 2]),
        ] {
            assert!(expected.check(&uris).is_err(), "{expected} {uris:?}");
        }
    }
}
