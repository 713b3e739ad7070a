//! The caller's certificates: readable, a pair, valid now, and for how long.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use vfio_checkpoint_client::tls::{self, CredentialFiles, Credentials, MAX_PEM_BYTES};
use x509_parser::pem::Pem;

use super::finding::{Finding, fail, ok, warn};
use crate::connection::Settings;

/// Whether certificate, key and CA can be used at all.
pub(super) const PAIR: &str = "key pair";

/// Everything about the certificates of a caller.
pub(super) fn check(settings: &Settings, now: SystemTime) -> Vec<Finding> {
    let (Some(certificate), Some(key), Some(ca)) = (&settings.cert, &settings.key, &settings.ca) else {
        let mend = "give --cert, --key and --ca, or make a context with `vfioctl context set`; \
            `vfioctl certs` makes some for a lab";
        return vec![warn("certificate", "certificate, key and CA are not all known", mend)];
    };
    let files = CredentialFiles { certificate: certificate.clone(), key: key.clone(), ca: ca.clone() };
    let pair = Credentials::from_files(&files).and_then(|credentials| {
        let server = tls::ServerCheck::Name(None);
        tls::client_config(credentials, &server)
    });
    let mut findings = vec![match pair {
        Ok(_) => ok(PAIR, "certificate, key and CA can be read, and go together"),
        Err(error) => {
            let text = error.to_string();
            let (what, mend) = text.rsplit_once("; ").unwrap_or((text.as_str(), "write the files anew"));
            fail(PAIR, what, mend)
        }
    }];
    findings.push(mode(key));
    findings.push(dates("certificate", certificate, now));
    findings.push(dates("CA", ca, now));
    findings
}

fn mode(key: &Path) -> Finding {
    const CHECK: &str = "key file";
    let shown = key.display();
    match fs::metadata(key).map(|metadata| metadata.permissions().mode() & 0o7777) {
        Err(error) => fail(CHECK, format!("cannot look at {shown}: {error}"), "give the path of the key"),
        Ok(mode) if mode & 0o077 != 0 => warn(
            CHECK,
            format!("others than its owner may read {shown} (mode {mode:o})"),
            format!("chmod 600 {shown}"),
        ),
        Ok(_) => ok(CHECK, format!("{shown} is for its owner only")),
    }
}

/// The first certificate of a file to end.
fn dates(check: &'static str, path: &Path, now: SystemTime) -> Finding {
    let shown = path.display();
    match validity(path) {
        Err(problem) => fail(check, format!("{shown}: {problem}"), "write the file anew"),
        Ok(Validity { begins, ends }) => judge(check, &shown.to_string(), begins, ends, now),
    }
}

fn judge(check: &'static str, shown: &str, begins: SystemTime, ends: SystemTime, now: SystemTime) -> Finding {
    let date = |time: SystemTime| humantime::format_rfc3339_seconds(time).to_string();
    let clock = "see that the clock of this machine is right";
    if now < begins {
        return fail(check, format!("{shown} is valid only from {}", date(begins)), clock);
    }
    let Ok(left) = ends.duration_since(now) else {
        let mend = format!("renew it, and {clock}");
        return fail(check, format!("{shown} expired at {}", date(ends)), mend);
    };
    let whole = ends.duration_since(begins).unwrap_or_default();
    let detail = format!("{shown} is valid until {}, for another {}", date(ends), coarse(left));
    // A tenth: certificates live for an hour here and for a year there.
    if left < whole / 10 { warn(check, detail, "renew it soon") } else { ok(check, detail) }
}

/// In days where there are some, else in hours, else in minutes.
fn coarse(left: Duration) -> String {
    let seconds = left.as_secs();
    let units = [(24 * 3600, "day"), (3600, "hour"), (60, "minute")];
    let (count, unit) = units
        .iter()
        .map(|(length, unit)| (seconds / length, *unit))
        .find(|(count, _)| *count > 0)
        .unwrap_or((seconds, "second"));
    if count == 1 { format!("1 {unit}") } else { format!("{count} {unit}s") }
}

struct Validity {
    begins: SystemTime,
    ends: SystemTime,
}

fn validity(path: &Path) -> Result<Validity, String> {
    use std::io::Read as _;
    let mut text = Vec::new();
    let file = fs::File::open(path).map_err(|error| error.to_string())?;
    file.take(MAX_PEM_BYTES).read_to_end(&mut text).map_err(|error| error.to_string())?;
    let mut found: Option<Validity> = None;
    for block in Pem::iter_from_buffer(&text) {
        let block = block.map_err(|error| error.to_string())?;
        if block.label != "CERTIFICATE" {
            continue;
        }
        let certificate = block.parse_x509().map_err(|error| error.to_string())?;
        let time = |seconds: i64| {
            // Before 1970 is over, too.
            UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or_default())
        };
        let (begins, ends) = (
            time(certificate.validity().not_before.timestamp()),
            time(certificate.validity().not_after.timestamp()),
        );
        if found.as_ref().is_none_or(|found| ends < found.ends) {
            found = Some(Validity { begins, ends });
        }
    }
    found.ok_or_else(|| "it holds no certificate".to_owned())
}

#[cfg(test)]
mod tests {
    use super::super::finding::Level;
    use super::*;

    #[test]
    fn dates_are_judged() {
        let at = |hours: u64| UNIX_EPOCH + Duration::from_hours(hours);
        let level = |now: u64| judge("c", "f", at(100), at(200), at(now)).level;
        assert_eq!(level(99), Level::Fail);
        assert_eq!(level(100), Level::Ok);
        assert_eq!(level(190), Level::Ok);
        assert_eq!(level(191), Level::Warn);
        assert_eq!(level(201), Level::Fail);
        assert_eq!(coarse(Duration::from_hours(25)), "1 day");
        assert_eq!(coarse(Duration::from_mins(125)), "2 hours");
        assert_eq!(coarse(Duration::from_millis(10)), "0 seconds");
    }
}
