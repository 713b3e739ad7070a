//! Throwaway certificates.

use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType,
};
use rustls::ClientConfig;
use vfio_checkpoint_client::tls::{Credentials, ServerCheck, client_config};

pub(crate) const AGENT_ID: &str = "spiffe://example.org/agent/a";

pub(crate) struct Ca {
    issuer: Issuer<'static, KeyPair>,
    pub(crate) pem: String,
}

/// A certificate and its key, PEM.
pub(crate) struct Pair {
    pub(crate) certificate: String,
    pub(crate) key: String,
}

impl Ca {
    pub(crate) fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    fn issue(&self, names: Vec<SanType>, purpose: ExtendedKeyUsagePurpose, is_expired: bool) -> Pair {
        let mut params = CertificateParams::default();
        params.subject_alt_names = names;
        params.extended_key_usages = vec![purpose];
        if is_expired {
            params.not_before = rcgen::date_time_ymd(2019, 1, 1);
            params.not_after = rcgen::date_time_ymd(2020, 1, 1);
        }
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap().pem();
        Pair { certificate, key: key.serialize_pem() }
    }

    pub(crate) fn client(&self) -> Pair {
        self.issue(vec![uri("spiffe://example.org/user")], ExtendedKeyUsagePurpose::ClientAuth, false)
    }

    pub(crate) fn expired_client(&self) -> Pair {
        self.issue(vec![uri("spiffe://example.org/user")], ExtendedKeyUsagePurpose::ClientAuth, true)
    }

    pub(crate) fn server(&self, names: Vec<SanType>) -> Pair {
        self.issue(names, ExtendedKeyUsagePurpose::ServerAuth, false)
    }

    pub(crate) fn expired_server(&self) -> Pair {
        self.issue(agent_names(), ExtendedKeyUsagePurpose::ServerAuth, true)
    }
}

pub(crate) fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

pub(crate) fn agent_names() -> Vec<SanType> {
    vec![SanType::DnsName("localhost".try_into().unwrap()), uri(AGENT_ID)]
}

pub(crate) fn config(trusted: &Ca, pair: &Pair, server: &ServerCheck) -> Arc<ClientConfig> {
    let credentials =
        Credentials::from_pem(pair.certificate.as_bytes(), pair.key.as_bytes(), trusted.pem.as_bytes())
            .unwrap();
    client_config(credentials, server).unwrap()
}
