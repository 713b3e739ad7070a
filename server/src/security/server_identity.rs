//! Which server a caller is willing to talk to.
//!
//! ```text
//!   HostName           chain + revocation + the name that was dialled
//!   Spiffe(id)         chain + revocation + exactly this SPIFFE ID
//!   TrustDomain(d)     chain + revocation + any SPIFFE ID of this domain
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

use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::CryptoProvider;
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, DigitallySignedStruct, Error, OtherError, RootCertStore, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use super::identity::{Identity, IdentityError, PeerCertificate, SpiffeId, TrustDomain};

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
        self.check_identity(end_entity).map_err(|wrong| {
            Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(wrong))))
        })?;
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
