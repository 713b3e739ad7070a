//! A throwaway certificate authority, for the demo and the tests.
//!
//! ```text
//!   LabCa::new(trust domain) -- issue(names, validity) -> LabCertificate -- write(folder) -> TlsFiles
//!                            -- crl(serials) -> PEM
//! ```
//!
//! Everything is in memory; files are written only where asked, whole or not at all (a new file takes the old
//! one's name), and keys with mode 0600. Its key has no protection: it is for a demonstration, never for a
//! cluster.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevocationReason, RevokedCertParams, SanType,
    SerialNumber,
};
use rustls_pki_types::{CertificateDer, UnixTime};
use x509_parser::time::ASN1Time;

use super::files::TlsFiles;
use super::identity::{Identity, Serial, TrustDomain};
use super::tls::provider;

/// Why the authority cannot do what is asked.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// The certificate cannot be made.
    #[error("the throwaway authority cannot make a certificate; check its names")]
    Issue {
        /// Why.
        #[source]
        source: rcgen::Error,
    },
    /// A date that certificates cannot carry.
    #[error("{secs} seconds after 1970 is no date of a certificate; choose one before the year 9999")]
    Date {
        /// The date.
        secs: u64,
    },
    /// No randomness for a serial number.
    #[error("the system gives no random bytes")]
    Random,
    /// A file cannot be written.
    #[error("cannot write {}; check that the folder exists and may be written", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
}

impl From<rcgen::Error> for LabError {
    fn from(source: rcgen::Error) -> Self {
        Self::Issue { source }
    }
}

/// From when to when something is valid, both seconds included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    /// The first second.
    pub not_before: UnixTime,
    /// The last second.
    pub not_after: UnixTime,
}

impl Validity {
    /// From a minute before `now` (clocks differ) for this long.
    pub fn starting(now: UnixTime, lasting: Duration) -> Self {
        let now = Duration::from_secs(now.as_secs());
        Self {
            not_before: UnixTime::since_unix_epoch(now.saturating_sub(Duration::from_mins(1))),
            not_after: UnixTime::since_unix_epoch(now.saturating_add(lasting)),
        }
    }
}

/// The authority.
#[derive(Debug)]
pub struct LabCa {
    issuer: Issuer<'static, KeyPair>,
    certificate: rcgen::Certificate,
}

/// What it issues.
#[derive(Debug)]
pub struct LabCertificate {
    /// The certificate.
    pub der: CertificateDer<'static>,
    /// Its serial number.
    pub serial: Serial,
    /// The certificate as PEM.
    pub certificate_pem: String,
    key: KeyPair,
}

impl LabCertificate {
    /// The private key as PEM.
    pub fn key_pem(&self) -> String {
        self.key.serialize_pem()
    }

    /// Writes `tls.crt`, `tls.key` and `ca.crt` into a folder, as in a Kubernetes TLS secret.
    pub fn write(&self, folder: &Path, authorities_pem: &str) -> Result<TlsFiles, LabError> {
        let files = TlsFiles {
            certificate: folder.join("tls.crt"),
            key: folder.join("tls.key"),
            client_ca: folder.join("ca.crt"),
            crls: Vec::new(),
        };
        write_file(&files.key, self.key_pem().as_bytes(), 0o600)?;
        write_file(&files.certificate, self.certificate_pem.as_bytes(), 0o644)?;
        write_file(&files.client_ca, authorities_pem.as_bytes(), 0o644)?;
        Ok(files)
    }
}

/// Writes a file under a new name and gives it the old one's place, so that no reader sees half of it.
pub fn write_file(path: &Path, bytes: &[u8], mode: u32) -> Result<(), LabError> {
    let failed = |source| LabError::Write { path: path.to_owned(), source };
    let mut draft = path.as_os_str().to_owned();
    draft.push(".new");
    let draft = PathBuf::from(draft);
    match std::fs::remove_file(&draft) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        Ok(()) | Err(_) => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&draft).map_err(failed)?;
    file.write_all(bytes).map_err(failed)?;
    std::fs::rename(&draft, path).map_err(failed)
}

impl LabCa {
    /// A new authority for a trust domain.
    pub fn new(trust_domain: &TrustDomain, validity: Validity) -> Result<Self, LabError> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name.remove(DnType::CommonName);
        params.distinguished_name.push(DnType::CommonName, format!("throwaway authority of {trust_domain}"));
        params.subject_alt_names = vec![SanType::URI(format!("spiffe://{trust_domain}").try_into()?)];
        set_validity(&mut params, validity)?;
        let certificate = params.self_signed(&key)?;
        Ok(Self { issuer: Issuer::new(params, key), certificate })
    }

    /// The authority's certificate as PEM: what a peer's `client_ca` holds.
    pub fn pem(&self) -> String {
        self.certificate.pem()
    }

    /// Issues a certificate, for a server and a client alike, as agents are both.
    pub fn issue(
        &self,
        identity: &Identity,
        hosts: &[&str],
        addresses: &[IpAddr],
        validity: Validity,
    ) -> Result<LabCertificate, LabError> {
        let mut names = Vec::new();
        match identity {
            Identity::Spiffe(id) => names.push(SanType::URI(id.as_str().try_into()?)),
            Identity::Dns(hosts) => {
                for host in hosts.iter() {
                    names.push(SanType::DnsName(host.as_str().try_into()?));
                }
            }
        }
        for host in hosts {
            names.push(SanType::DnsName((*host).try_into()?));
        }
        names.extend(addresses.iter().copied().map(SanType::IpAddress));
        self.issue_names(names, validity)
    }

    /// Issues a certificate with these names, whatever they are.
    pub(super) fn issue_names(
        &self,
        names: Vec<SanType>,
        validity: Validity,
    ) -> Result<LabCertificate, LabError> {
        let key = KeyPair::generate()?;
        let mut serial = [0_u8; 16];
        provider().secure_random.fill(&mut serial).map_err(|_| LabError::Random)?;
        // Positive, and never with a leading zero: there is one way to write it.
        serial[0] = (serial[0] & 0x7f) | 0x40;
        let mut params = CertificateParams::default();
        params.serial_number = Some(SerialNumber::from_slice(&serial));
        params.subject_alt_names = names;
        params.distinguished_name.remove(DnType::CommonName);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        set_validity(&mut params, validity)?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok(LabCertificate {
            der: certificate.der().clone(),
            serial: Serial::new(&serial),
            certificate_pem: certificate.pem(),
            key,
        })
    }

    /// A revocation list as PEM.
    pub fn crl(&self, revoked: &[&Serial], validity: Validity) -> Result<String, LabError> {
        let this_update = date(validity.not_before)?;
        let params = CertificateRevocationListParams {
            this_update: this_update.to_datetime(),
            next_update: date(validity.not_after)?.to_datetime(),
            crl_number: SerialNumber::from(validity.not_before.as_secs()),
            issuing_distribution_point: None,
            revoked_certs: revoked
                .iter()
                .map(|serial| RevokedCertParams {
                    serial_number: SerialNumber::from_slice(serial.as_bytes()),
                    revocation_time: this_update.to_datetime(),
                    reason_code: Some(RevocationReason::KeyCompromise),
                    invalidity_date: None,
                })
                .collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        Ok(params.signed_by(&self.issuer)?.pem()?)
    }
}

fn date(time: UnixTime) -> Result<ASN1Time, LabError> {
    let secs = time.as_secs();
    i64::try_from(secs)
        .ok()
        .and_then(|timestamp| ASN1Time::from_timestamp(timestamp).ok())
        .ok_or(LabError::Date { secs })
}

fn set_validity(params: &mut CertificateParams, validity: Validity) -> Result<(), LabError> {
    params.not_before = date(validity.not_before)?.to_datetime();
    params.not_after = date(validity.not_after)?.to_datetime();
    Ok(())
}
