//! `vfioctl certs`: a throwaway authority and its certificates, for labs.
//!
//! ```text
//!   init  -> DIR/ca.crt, DIR/ca.key
//!   issue -> DIR/NAME/tls.crt, tls.key, ca.crt        the names of a Kubernetes TLS secret
//! ```
//!
//! Invariants: nothing is ever overwritten; keys have mode 0600 from their first byte; the authority's key lies on the
//! disk without protection, and every command says so. Failure paths: what was written by a command that fails is removed
//! by it.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use clap::{Args, Subcommand};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls_pki_types::DnsName;
use serde::Serialize;
use vfio_checkpoint_client::tls::{SpiffeId, TrustDomain};
use x509_parser::extensions::GeneralName;
use x509_parser::pem::parse_x509_pem;
use x509_parser::time::ASN1Time;

use crate::cli::OutputFormat;
use crate::outcome::{Exit, Failure};
use crate::render;
use crate::values::validity;

const WARNING: &str = "\
WARNING: this is a throwaway authority for a lab. Its key lies on this disk without protection,
         and whoever reads it can be anybody. Never let a cluster trust it.";
/// Clocks differ.
const EARLIER: Duration = Duration::from_mins(1);

/// Make throwaway certificates for a lab.
#[derive(Debug, Subcommand)]
pub(crate) enum CertsCommand {
    /// Make an authority: ca.crt and ca.key
    Init {
        /// The folder; it is made where it is missing
        #[arg(long, value_name = "DIR", default_value = "lab-certs")]
        dir: PathBuf,
        /// The SPIFFE trust domain of all its certificates
        #[arg(long, value_name = "DOMAIN", default_value = "lab.internal")]
        trust_domain: TrustDomain,
        /// How long it is valid
        #[arg(long, value_name = "TIME", default_value = "30d", value_parser = validity)]
        valid: Duration,
    },
    /// Issue a certificate for an agent or a caller: NAME/tls.crt, NAME/tls.key and NAME/ca.crt
    Issue(IssueArgs),
}

/// Issue a certificate.
#[derive(Debug, Args)]
pub(crate) struct IssueArgs {
    /// What it is called; the path of its SPIFFE id, such as agent/node1 or ns/ops/sa/saver
    #[arg(value_parser = path_of_id)]
    name: String,
    /// The folder of the authority
    #[arg(long, value_name = "DIR", default_value = "lab-certs")]
    dir: PathBuf,
    /// A DNS name in it; an agent needs the host of its endpoint; may be given again
    #[arg(long, value_name = "HOST")]
    dns: Vec<String>,
    /// An IP address in it; may be given again
    #[arg(long, value_name = "ADDRESS")]
    ip: Vec<IpAddr>,
    /// How long it is valid
    #[arg(long, value_name = "TIME", default_value = "7d", value_parser = validity)]
    valid: Duration,
}

fn path_of_id(text: &str) -> Result<String, String> {
    // It becomes a path below the authority's folder, too.
    let fits = !text.is_empty()
        && text.len() <= 200
        && text.split('/').all(|part| {
            !part.is_empty()
                && !part.starts_with('.')
                && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
        });
    if fits {
        Ok(text.to_owned())
    } else {
        Err("give letters, digits, '-', '_' and '.', in parts with '/' between them, as in agent/node1"
            .to_owned())
    }
}

#[derive(Debug, Serialize)]
struct Written {
    spiffe_id: String,
    valid_until: String,
    files: Vec<PathBuf>,
}

pub(crate) fn run(command: CertsCommand, format: OutputFormat) -> Result<Exit, Failure> {
    let written = match command {
        CertsCommand::Init { dir, trust_domain, valid } => init(&dir, &trust_domain, valid)?,
        CertsCommand::Issue(args) => issue(&args)?,
    };
    render::say(WARNING);
    let table = |_| {
        let files: Vec<String> = written.files.iter().map(|path| format!("  {}\n", path.display())).collect();
        format!("{}, valid until {}\n{}", written.spiffe_id, written.valid_until, files.concat())
    };
    render::print(format, table, &written)?;
    Ok(Exit::Done)
}

fn failed(error: impl std::fmt::Display) -> Failure {
    Failure::new(Exit::Failed, format!("the certificate cannot be made: {error}"))
}

fn init(folder: &Path, trust_domain: &TrustDomain, valid: Duration) -> Result<Written, Failure> {
    let spiffe_id = format!("spiffe://{trust_domain}");
    let key = KeyPair::generate().map_err(failed)?;
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.distinguished_name.remove(DnType::CommonName);
    params.distinguished_name.push(DnType::CommonName, format!("throwaway authority of {trust_domain}"));
    params.subject_alt_names = vec![SanType::URI(spiffe_id.as_str().try_into().map_err(failed)?)];
    let valid_until = set_validity(&mut params, valid, None)?;
    let certificate = params.self_signed(&key).map_err(failed)?;
    let files = [
        (folder.join("ca.key"), key.serialize_pem(), 0o600),
        (folder.join("ca.crt"), certificate.pem(), 0o644),
    ];
    Ok(Written { spiffe_id, valid_until, files: write_all(folder, &files)? })
}

fn issue(args: &IssueArgs) -> Result<Written, Failure> {
    let authority = Authority::read(&args.dir)?;
    let id: SpiffeId =
        format!("spiffe://{}/{}", authority.trust_domain, args.name).parse().map_err(Failure::usage)?;
    let mut names = vec![SanType::URI(id.to_string().as_str().try_into().map_err(failed)?)];
    for host in &args.dns {
        // What is no DNS name would be a name that nobody can be held against.
        DnsName::try_from(host.as_str())
            .map_err(|error| Failure::usage(format!("--dns {host:?}: {error}")))?;
        let name = host.as_str().try_into();
        names.push(SanType::DnsName(
            name.map_err(|error| Failure::usage(format!("--dns {host:?}: {error}")))?,
        ));
    }
    names.extend(args.ip.iter().copied().map(SanType::IpAddress));
    let key = KeyPair::generate().map_err(failed)?;
    let mut params = CertificateParams::default();
    params.subject_alt_names = names;
    params.distinguished_name.remove(DnType::CommonName);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    // Agents are both.
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    let valid_until = set_validity(&mut params, args.valid, Some(authority.not_after))?;
    let certificate = params.signed_by(&key, &authority.issuer).map_err(failed)?;
    let folder = args.dir.join(&args.name);
    let files = [
        (folder.join("tls.key"), key.serialize_pem(), 0o600),
        (folder.join("tls.crt"), certificate.pem(), 0o644),
        (folder.join("ca.crt"), authority.pem, 0o644),
    ];
    Ok(Written { spiffe_id: id.to_string(), valid_until, files: write_all(&folder, &files)? })
}

/// An authority that `init` made.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    trust_domain: TrustDomain,
    not_after: i64,
    pem: String,
}

impl Authority {
    fn read(folder: &Path) -> Result<Self, Failure> {
        let read = |name: &str| {
            let path = folder.join(name);
            fs::read_to_string(&path).map_err(|error| {
                let path = path.display();
                Failure::usage(format!(
                    "cannot read {path}: {error}; make an authority with `vfioctl certs init`"
                ))
            })
        };
        let (pem, key) = (read("ca.crt")?, read("ca.key")?);
        let wrong = |problem: &str| {
            let path = folder.join("ca.crt");
            Failure::usage(format!("{} is no authority of `vfioctl certs init`: {problem}", path.display()))
        };
        let (_, block) = parse_x509_pem(pem.as_bytes()).map_err(|error| wrong(&error.to_string()))?;
        let certificate = block.parse_x509().map_err(|error| wrong(&error.to_string()))?;
        let names = certificate.subject_alternative_name().ok().flatten();
        let uri = names.and_then(|names| {
            names.value.general_names.iter().find_map(|name| {
                if let GeneralName::URI(uri) = name { uri.strip_prefix("spiffe://") } else { None }
            })
        });
        let trust_domain = uri.ok_or_else(|| wrong("it names no trust domain"))?;
        let trust_domain = trust_domain.parse().map_err(|error| wrong(&format!("{error}")))?;
        let not_after = certificate.validity().not_after.timestamp();
        let key = KeyPair::from_pem(&key).map_err(|error| wrong(&format!("its key: {error}")))?;
        let issuer = Issuer::from_ca_cert_pem(&pem, key).map_err(|error| wrong(&error.to_string()))?;
        Ok(Self { issuer, trust_domain, not_after, pem })
    }
}

/// From a minute ago for this long, and no longer than its authority. Returns when it ends.
fn set_validity(
    params: &mut CertificateParams,
    valid: Duration,
    authority_ends: Option<i64>,
) -> Result<String, Failure> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_err(failed)?;
    let seconds = |time: Duration| i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
    let wanted = seconds(now.saturating_add(valid));
    let ends = authority_ends.map_or(wanted, |ends| ends.min(wanted));
    if ends <= seconds(now) {
        return Err(Failure::usage("the authority has expired; make another with `vfioctl certs init`"));
    }
    let date = |seconds: i64| ASN1Time::from_timestamp(seconds).map_err(failed);
    params.not_before = date(seconds(now.saturating_sub(EARLIER)))?.to_datetime();
    params.not_after = date(ends)?.to_datetime();
    let at = SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(ends).map_err(failed)?);
    Ok(humantime::format_rfc3339_seconds(at).to_string())
}

/// Writes files that must not be there yet: all of them or none.
fn write_all(folder: &Path, files: &[(PathBuf, String, u32)]) -> Result<Vec<PathBuf>, Failure> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(folder);
    made.map_err(|error| failed(format!("cannot make the folder {}: {error}", folder.display())))?;
    let mut written: Vec<PathBuf> = Vec::new();
    for (path, text, mode) in files {
        match write_new(path, text.as_bytes(), *mode) {
            Ok(()) => written.push(path.clone()),
            Err(error) => {
                for path in &written {
                    // What stays behind is in the way of the next try, which says so.
                    let _gone = fs::remove_file(path);
                }
                let path = path.display();
                return Err(if error.kind() == io::ErrorKind::AlreadyExists {
                    let text = format!(
                        "{path} is there, and nothing is overwritten; remove it or choose another place"
                    );
                    Failure::new(Exit::Refused, text)
                } else {
                    failed(format!("cannot write {path}: {error}"))
                });
            }
        }
    }
    Ok(written)
}

fn write_new(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    let result = file.write_all(bytes).and_then(|()| file.sync_all());
    if result.is_err() {
        let _gone = fs::remove_file(path);
    }
    result
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use tempfile::TempDir;
    use vfio_checkpoint_client::tls::{CredentialFiles, Credentials, ServerCheck, client_config};

    use super::*;

    fn issue_args(dir: &Path, name: &str) -> IssueArgs {
        IssueArgs {
            name: name.to_owned(),
            dir: dir.to_owned(),
            dns: vec!["node1".to_owned()],
            ip: vec![IpAddr::from([127, 0, 0, 1])],
            valid: Duration::from_hours(24 * 365),
        }
    }

    #[test]
    fn what_is_issued_works_as_credentials_and_ends_with_its_authority() {
        let folder = TempDir::new().unwrap();
        let dir = folder.path().join("certs");
        let made = init(&dir, &"lab.internal".parse().unwrap(), Duration::from_hours(24)).unwrap();
        let issued = issue(&issue_args(&dir, "agent/node1")).unwrap();
        assert_eq!(issued.spiffe_id, "spiffe://lab.internal/agent/node1");
        assert_eq!(issued.valid_until, made.valid_until);
        let at = |name| dir.join("agent/node1").join(name);
        let files = CredentialFiles { certificate: at("tls.crt"), key: at("tls.key"), ca: at("ca.crt") };
        client_config(Credentials::from_files(&files).unwrap(), &ServerCheck::Name(None)).unwrap();
        for key in [dir.join("ca.key"), at("tls.key")] {
            assert_eq!(fs::metadata(key).unwrap().permissions().mode() & 0o777, 0o600);
        }
    }

    #[test]
    fn nothing_is_overwritten_and_nothing_is_left_half() {
        let folder = TempDir::new().unwrap();
        let domain: TrustDomain = "lab.internal".parse().unwrap();
        fs::write(folder.path().join("ca.crt"), "mine").unwrap();
        let failure = init(folder.path(), &domain, Duration::from_hours(1)).unwrap_err();
        assert_eq!(failure.exit, Exit::Refused);
        assert!(!folder.path().join("ca.key").exists(), "a key without its certificate stayed");
        assert_eq!(fs::read_to_string(folder.path().join("ca.crt")).unwrap(), "mine");
    }

    #[test]
    fn a_name_stays_below_its_folder() {
        for bad in ["", "/a", "a/", "a//b", "..", "a/../b", ".x", "a b", "ä"] {
            assert!(path_of_id(bad).is_err(), "{bad}");
        }
        assert!(path_of_id("ns/ops/sa/saver-1").is_ok());
    }
}
