//! Who may call, and until when: TLS, identity, roles, reload, revocation and audit.
//!
//! ```text
//!   files -> tls::TlsMaterial -> reload::TlsSource (current set, generation) --+
//!                                      |                                       |
//!   TCP -> accept::Listener -> handshake (1.3, client certificate) -> identity::PeerCertificate
//!                                      |                                       |
//!                               peers::PeerRegistry <---- re-verified after each reload, ended at expiry
//!                                      |
//!          accept::TlsConnection -> tonic -> authorize::AuthorizeLayer -> handler (sees Caller)
//!                                               |  roles::Policy, roles::METHODS
//!                                               +-> audit
//! ```
//!
//! Invariants:
//! - An identity is read out of a certificate that was verified on this connection; nothing in a request
//!   names one.
//! - No request reaches a handler without a rule for its method. What has no rule is denied.
//! - A connection lives no longer than its certificate verifies: the verdict of the handshake is asked for
//!   again after each reload and whenever a date in the chain passes.
//! - The crypto provider is aws-lc-rs, handed over explicitly everywhere; the process default is never read.
//!
//! Failure paths: bad files keep the old set in force and say so; a refused handshake is one log line and a
//! closed socket; a refused request is a gRPC status with a stable reason and one audit line.

pub mod accept;
pub mod audit;
pub mod authorize;
pub mod clock;
mod crl;
pub mod files;
pub mod identity;
pub mod lab;
mod methods;
pub mod peers;
pub mod reload;
pub mod roles;
pub mod server_identity;
pub mod tls;

#[cfg(test)]
mod tests;
