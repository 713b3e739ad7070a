//! A test of this program in a namespace of its own, where the machine lets it have one.
//!
//! ```text
//!   test --unshare, prepare--> this program, one other test
//! ```
//! By root's right, or as root of a user namespace. What is in there ends with the process, however that ends.

use std::env;
use std::ffi::OsStr;
use std::io::Write as _;
use std::process::{Command, Stdio};

/// How this machine lets a process have a namespace of this kind, as `unshare` calls it, in which the script `prepare` works,
/// if it does. What is to run there is still to be added; it finds `mark` in its environment, as the script does.
pub(crate) fn unshared(kind: &str, prepare: &str, mark: (&str, &OsStr)) -> Option<Command> {
    let ways: [&[&str]; 2] = [&[], &["--user", "--map-root-user"]];
    ways.into_iter().find_map(|way| {
        let with = |script: &str| {
            let mut command = Command::new("unshare");
            command.args(way).arg(kind).args(["sh", "-c", script, "sh"]);
            command.env(mark.0, mark.1).stdin(Stdio::null());
            command
        };
        let tried = with(prepare).stdout(Stdio::null()).stderr(Stdio::null()).status();
        tried.is_ok_and(|status| status.success()).then(|| with(&format!(r#"{prepare} && exec "$@""#)))
    })
}

/// Runs one test of this program there, and passes on what it says of figures.
pub(crate) fn one_test(mut there: Command, test: &str) {
    there.arg(env::current_exe().unwrap()).args(["--exact", test, "--nocapture"]);
    let ended = there.output().unwrap();
    let said = String::from_utf8_lossy(&ended.stdout);
    for figure in said.lines().filter(|line| line.starts_with("figures:")) {
        // Past the test harness, which keeps what a passing test prints.
        let _ = writeln!(std::io::stdout().lock(), "\n{figure}");
    }
    assert!(
        ended.status.success() && said.contains("1 passed"),
        "{said}\n{}",
        String::from_utf8_lossy(&ended.stderr)
    );
}
