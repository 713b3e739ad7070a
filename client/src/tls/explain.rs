//! Puts a failed handshake in words: what happened and what to do.
//!
//! Alerts come from the other side and say little; errors of our own say what we found. Both become an [`Explanation`].

use std::fmt;

use rustls::{AlertDescription, CertificateError, Error};

/// What happened in a handshake, and what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Explanation {
    /// What happened.
    pub what: String,
    /// What to do.
    pub action: &'static str,
    /// Whether it is about who the caller is: another certificate is needed, not another network.
    pub is_identity: bool,
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; {}", self.what, self.action)
    }
}

/// Puts a TLS error in words.
pub fn explain(error: &Error) -> Explanation {
    if let Error::AlertReceived(alert) = error {
        return explain_alert(*alert);
    }
    if let Error::InvalidCertificate(problem) = error {
        return explain_certificate(problem);
    }
    let action = "see that the endpoint is the agent's gRPC port and that both sides speak TLS 1.3";
    Explanation { what: format!("the TLS handshake failed: {error}"), action, is_identity: false }
}

#[allow(
    clippy::wildcard_enum_match_arm,
    reason = "rustls leaves the list open, and what is not about certificates needs no words of its own"
)]
fn explain_alert(alert: AlertDescription) -> Explanation {
    let (what, action, is_identity) = match alert {
        AlertDescription::CertificateRequired => (
            "the agent asks for a client certificate and got none",
            "give a certificate and its key that the agent's CA has signed",
            true,
        ),
        AlertDescription::UnknownCA => (
            "the agent does not know the CA that signed the client certificate",
            "use a certificate of a CA that the agent trusts, or add the CA to the agent's configuration",
            true,
        ),
        AlertDescription::CertificateExpired => (
            "the agent refuses the client certificate: it has expired or is not valid yet",
            "renew the certificate, and see that the clocks of both machines are right",
            true,
        ),
        AlertDescription::CertificateRevoked => {
            ("the agent refuses the client certificate: it was revoked", "get a new certificate", true)
        }
        AlertDescription::BadCertificate
        | AlertDescription::UnsupportedCertificate
        | AlertDescription::CertificateUnknown
        | AlertDescription::DecryptError => (
            "the agent cannot accept the client certificate",
            "use a certificate for client authentication that the agent's CA has signed",
            true,
        ),
        AlertDescription::AccessDenied => (
            "the agent knows the client certificate and denies it access",
            "use a certificate whose identity the agent's configuration names",
            true,
        ),
        AlertDescription::ProtocolVersion => (
            "the other side does not speak TLS 1.3",
            "see that the endpoint is the agent's own port and no proxy ends TLS on the way",
            false,
        ),
        AlertDescription::NoApplicationProtocol => {
            ("the other side does not speak HTTP/2", "see that the endpoint is the agent's gRPC port", false)
        }
        AlertDescription::UnrecognisedName => (
            "the other side does not know the server name",
            "give the name that is in the agent's certificate",
            false,
        ),
        // The list belongs to IANA and grows; what is not about certificates is shown by its name.
        other => {
            let what = format!("the other side ended the TLS handshake with the alert {other:?}");
            let action = "see the agent's log for the reason";
            return Explanation { what, action, is_identity: false };
        }
    };
    Explanation { what: what.to_owned(), action, is_identity }
}

#[allow(
    clippy::wildcard_enum_match_arm,
    reason = "rustls leaves the list open, and what is not about certificates needs no words of its own"
)]
fn explain_certificate(problem: &CertificateError) -> Explanation {
    let (what, action) = match problem {
        CertificateError::UnknownIssuer => (
            "the agent's certificate is not signed by a CA of the CA bundle".to_owned(),
            "give the CA that signed the agent's certificate",
        ),
        // Of the same name with another key: an authority that was made anew, mostly.
        CertificateError::BadSignature => (
            "the agent's certificate is signed by another key than that of the CA of this name in the CA bundle"
                .to_owned(),
            "give the CA that signed the agent's certificate; one that was made anew has another key",
        ),
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => (
            "the agent's certificate has expired".to_owned(),
            "renew it, and see that the clock of this machine is right",
        ),
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => (
            "the agent's certificate is not valid yet".to_owned(),
            "see that the clocks of both machines are right",
        ),
        CertificateError::Revoked => {
            ("the agent's certificate was revoked".to_owned(), "give the agent a new one")
        }
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => (
            format!("the agent's certificate is for somebody else: {problem}"),
            "give the name that is in its certificate as the server name, or its SPIFFE id",
        ),
        CertificateError::Other(other) => (
            other.to_string(),
            "see that the endpoint is the agent that is meant and that its SPIFFE id is right",
        ),
        // rustls marks the list as open; the rest is about certificates that are malformed or unfit.
        other => {
            (format!("the agent's certificate is refused: {other}"), "give the agent a sound certificate")
        }
    };
    Explanation { what, action, is_identity: false }
}
