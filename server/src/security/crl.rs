//! Revocation lists, checked before they are put in force.
//!
//! ```text
//!   PEM -> parse -> expired? -> issuer among the authorities? -> signed by it? -> RevocationLists
//! ```
//!
//! The verifier checks all of this again for each peer, and what does not hold there refuses the peer. A list
//! that is wrong for everybody would refuse everybody, so it is found here, while the old set is still in
//! force. A list by an issuer that is not among the authorities may be an intermediate's, whose key is not
//! known yet: it is let pass here. An authority without any list is told, because all its peers will be
//! refused.

use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, UnixTime};
use x509_parser::prelude::{CertificateRevocationList, FromDer, X509Certificate};

use super::files::{TlsBytes, TlsError, TlsFiles, secs_between};
use super::identity::unix_time;
use super::tls::provider;

/// The lists of one set.
pub(super) struct RevocationLists {
    pub(super) lists: Vec<CertificateRevocationListDer<'static>>,
    /// When the first of them stops to answer.
    pub(super) first_update: Option<UnixTime>,
    /// Authorities for whose peers nobody answers, though there are lists.
    pub(super) unanswered: Vec<String>,
}

impl RevocationLists {
    pub(super) fn parse(
        files: &TlsFiles,
        bytes: &TlsBytes,
        authorities: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<Self, TlsError> {
        // What cannot be parsed here was refused as an authority before.
        let authorities: Vec<_> = authorities
            .iter()
            .filter_map(|der| X509Certificate::from_der(der).ok().map(|(_, certificate)| certificate))
            .collect();
        let mut answered = vec![false; authorities.len()];
        let mut lists = Vec::new();
        let mut first_update: Option<UnixTime> = None;
        for (path, bytes) in files.crls.iter().zip(&bytes.crls) {
            let found = CertificateRevocationListDer::pem_slice_iter(bytes)
                .collect::<Result<Vec<_>, _>>()
                .map_err(|source| TlsError::Pem { path: path.clone(), source })?;
            if found.is_empty() {
                return Err(TlsError::Missing { path: path.clone(), what: "X509 CRL section" });
            }
            for der in found {
                let broken = |reason: String| TlsError::Crl { path: path.clone(), reason };
                let (_, list) =
                    CertificateRevocationList::from_der(&der).map_err(|error| broken(error.to_string()))?;
                let next_update =
                    list.next_update().ok_or_else(|| broken("it does not say when it expires".to_owned()))?;
                let next_update = unix_time(next_update.timestamp());
                // From the very second on: the verifier counts it so.
                if now >= next_update {
                    let secs_ago = secs_between(next_update, now);
                    return Err(TlsError::CrlExpired { path: path.clone(), secs_ago });
                }
                first_update = Some(first_update.unwrap_or(next_update).min(next_update));

                let (mut named, mut signed) = (false, false);
                for (authority, answered) in authorities.iter().zip(&mut answered) {
                    if authority.subject().as_raw() == list.issuer().as_raw() {
                        named = true;
                        let by_this_one = is_signed_by(&list, authority);
                        signed |= by_this_one;
                        *answered |= by_this_one;
                    }
                }
                if named && !signed {
                    let issuer = list.issuer().to_string();
                    let reason = format!("its issuer {issuer:?} is an authority that did not sign it");
                    return Err(broken(reason));
                }
                lists.push(der);
            }
        }
        let unanswered = authorities
            .iter()
            .zip(answered)
            .filter(|(_, answered)| !lists.is_empty() && !answered)
            .map(|(authority, _)| authority.subject().to_string().escape_default().to_string())
            .collect();
        Ok(Self { lists, first_update, unanswered })
    }
}

/// Whether any algorithm of the provider finds the signature good. Which one was meant is the verifier's to
/// check.
fn is_signed_by(list: &CertificateRevocationList<'_>, authority: &X509Certificate<'_>) -> bool {
    let key: &[u8] = &authority.public_key().subject_public_key.data;
    provider().signature_verification_algorithms.all.iter().any(|algorithm| {
        algorithm.verify_signature(key, list.tbs_cert_list.as_ref(), &list.signature_value.data).is_ok()
    })
}
