//! Which server a caller is willing to talk to.
//!
//! ```text
//!   HostName           chain + revocation + the name that was dialled
//!   Spiffe(id)         chain + revocation + exactly this SPIFFE ID
//!   TrustDomain(d)     chain + revocation + any SPIFFE ID of this domain
//!
//!   a Demand on top    one of them, then: has the role, by the grants in force, and has the key
//! ```
//!
//! A SPIFFE ID names a workload and no host, so an SVID often has no DNS name at all. For those two the
//! host's name is not looked at, and everything else is, in this order: chain and dates, revocation,
//! identity.
//!
//! rustls offers a chain check without a name, but that one knows no revocation lists; its whole verifier
//! knows them and ends with the name. So both run: the chain first by itself, and then the whole, of which
//! only the last answer, "wrong name", is let pass. A revoked server is told apart by that order; a test
//! holds rustls to it.
//!
//! Who a caller expects is often what somebody else told it, and a certificate of the same authority is no
//! licence to play that part. A [`Demand`] is the caller's own say. It is asked in the handshake and not after it, so
//! that nothing is sent to whoever does not meet it, on no connection: a library that connects again by itself asks
//! again.

use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::CryptoProvider;
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, DigitallySignedStruct, Error, OtherError, RootCertStore, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use super::identity::{Identity, IdentityError, PeerCertificate, PublicKeyHash, SpiffeId, TrustDomain};
use super::roles::{PolicyHandle, Role};

/// Whom a caller expects at the other end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServerExpectation {
    /// The host that was dialled, by DNS name or IP address.
    HostName,
    /// This workload.
    Spiffe(SpiffeId),
    /// Any workload of this trust domain.
    TrustDomain(TrustDomain),
}

/// Why a server whose chain verifies is still not the one.
#[derive(Debug, thiserror::Error)]
pub enum WrongServer {
    /// It is somebody else.
    #[error(
        "the server is {found}, and {expected:?} was expected; dial another address or correct the expected identity"
    )]
    Other {
        /// Who it is.
        found: String,
        /// Who was expected.
        expected: ServerExpectation,
    },
    /// It is nobody.
    #[error("the server's certificate names nobody")]
    Nobody {
        /// Why.
        #[source]
        source: IdentityError,
    },
    /// It may not do what it is wanted for.
    #[error("the server is {found}, and this agent's configuration does not grant it the role {role}")]
    NoRole {
        /// Who it is.
        found: String,
        /// What it has to be.
        role: Role,
    },
    /// It has another key.
    #[error(
        "the server has the key {found}, and {expected} was expected: it is another one, or has renewed its certificate"
    )]
    OtherKey {
        /// Its key.
        found: PublicKeyHash,
        /// The key that was expected.
        expected: PublicKeyHash,
    },
}

impl WrongServer {
    /// What made a handshake fail, where it was this.
    pub fn of(error: &Error) -> Option<&Self> {
        let Error::InvalidCertificate(CertificateError::Other(other)) = error else { return None };
        other.0.downcast_ref()
    }

    fn refuse(self) -> Error {
        Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(self))))
    }
}

/// What a server has to be, beside who is expected.
#[derive(Debug, Clone)]
pub struct Demand {
    /// By the grants that are in force when it is asked.
    pub policy: PolicyHandle,
    /// It has this role.
    pub role: Role,
    /// It has this key. None for any.
    pub key: Option<PublicKeyHash>,
}

/// Asks one thing more of a server than another verifier does.
#[derive(Debug)]
pub(super) struct DemandingVerifier {
    inner: Arc<dyn ServerCertVerifier>,
    demand: Demand,
}

impl DemandingVerifier {
    pub(super) fn new(inner: Arc<dyn ServerCertVerifier>, demand: Demand) -> Self {
        Self { inner, demand }
    }

    fn check(&self, leaf: &CertificateDer<'_>) -> Result<(), WrongServer> {
        let Demand { policy, role, key } = &self.demand;
        let found = PeerCertificate::from_der(leaf).map_err(|source| WrongServer::Nobody { source })?;
        if !policy.current().roles_of(&found.identity).contains(*role) {
            return Err(WrongServer::NoRole { found: found.identity.to_string(), role: *role });
        }
        match key {
            Some(expected) if *expected != found.public_key_hash => {
                Err(WrongServer::OtherKey { found: found.public_key_hash, expected: *expected })
            }
            Some(_) | None => Ok(()),
        }
    }
}

impl ServerCertVerifier for DemandingVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verified =
            self.inner.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)?;
        self.check(end_entity).map_err(WrongServer::refuse)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

/// Verifies a server by its SPIFFE ID.
#[derive(Debug)]
pub(super) struct SpiffeServerVerifier {
    whole: Arc<WebPkiServerVerifier>,
    roots: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
    expected: ServerExpectation,
}

impl SpiffeServerVerifier {
    pub(super) fn new(
        whole: Arc<WebPkiServerVerifier>,
        roots: Arc<RootCertStore>,
        provider: Arc<CryptoProvider>,
        expected: ServerExpectation,
    ) -> Self {
        Self { whole, roots, provider, expected }
    }

    fn check_identity(&self, leaf: &CertificateDer<'_>) -> Result<(), WrongServer> {
        let found =
            PeerCertificate::from_der(leaf).map_err(|source| WrongServer::Nobody { source })?.identity;
        let meant = match (&self.expected, &found) {
            (ServerExpectation::Spiffe(id), Identity::Spiffe(peer)) => id == peer,
            (ServerExpectation::TrustDomain(domain), Identity::Spiffe(peer)) => domain == peer.trust_domain(),
            (ServerExpectation::Spiffe(_) | ServerExpectation::TrustDomain(_), Identity::Dns(_))
            | (ServerExpectation::HostName, Identity::Spiffe(_) | Identity::Dns(_)) => false,
        };
        if meant {
            return Ok(());
        }
        Err(WrongServer::Other { found: found.to_string(), expected: self.expected.clone() })
    }
}

impl ServerCertVerifier for SpiffeServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let algorithms = self.provider.signature_verification_algorithms.all;
        let leaf = ParsedCertificate::try_from(end_entity)?;
        verify_server_cert_signed_by_trust_anchor(&leaf, &self.roots, intermediates, now, algorithms)?;
        match self.whole.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now) {
            Ok(_)
            | Err(Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => {}
            Err(refused) => return Err(refused),
        }
        self.check_identity(end_entity).map_err(WrongServer::refuse)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.whole.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.whole.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.whole.supported_verify_schemes()
    }
}
