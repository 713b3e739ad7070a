//! `vfio-device` as a person meets it: what it prints, on which stream, with which exit code.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test: its helpers assert by panicking, too")]

use std::fmt::Write as _;
use std::path::Path;
use std::process::{Command, Output};

struct Run {
    code: i32,
    stdout: String,
    stderr: String,
}

fn run(folder: &Path, arguments: &str) -> Run {
    let Output { status, stdout, stderr } = Command::new(env!("CARGO_BIN_EXE_vfio-device"))
        .args(arguments.split_whitespace())
        .current_dir(folder)
        .env("COLUMNS", "100")
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Run { code: status.code().unwrap(), stdout: text(stdout), stderr: text(stderr) }
}

/// The value behind a word of a result.
fn value<'a>(text: &'a str, word: &str) -> &'a str {
    text.lines()
        .find_map(|line| line.trim().strip_prefix(word))
        .unwrap_or_else(|| panic!("{word} in {text}"))
        .trim()
}

#[test]
fn what_is_saved_is_what_is_restored() {
    let folder = tempfile::tempdir().unwrap();
    for options in ["", "--pre-copy"] {
        let saved = run(
            folder.path(),
            &format!("save sim:seed=7,memory=3MiB,dirty=1MiB x.state --replace {options}"),
        );
        assert_eq!((saved.code, saved.stderr.as_str()), (0, ""), "{}", saved.stdout);
        let restored = run(folder.path(), "restore sim:seed=8,memory=3MiB x.state");
        assert_eq!((restored.code, restored.stderr.as_str()), (0, ""), "{}", restored.stdout);
        assert_eq!(value(&restored.stdout, "device"), value(&saved.stdout, "device"));
        let fresh = run(folder.path(), "save sim:seed=8,memory=3MiB y.state --replace");
        assert_ne!(value(&fresh.stdout, "device"), value(&saved.stdout, "device"));
    }
}

#[test]
fn results_are_one_json_document() {
    let folder = tempfile::tempdir().unwrap();
    let saved = run(folder.path(), "save sim:memory=1MiB x.state -o json");
    let saved: serde_json::Value = serde_json::from_str(&saved.stdout).unwrap();
    let restored = run(folder.path(), "restore sim:memory=1MiB,seed=9 x.state -o json");
    let restored: serde_json::Value = serde_json::from_str(&restored.stdout).unwrap();
    for field in ["bytes", "blake3", "device_digest"] {
        assert_eq!(saved[field], restored[field], "{field}");
    }
    let list = run(folder.path(), "list -o json");
    assert!(serde_json::from_str::<Vec<serde_json::Value>>(&list.stdout).is_ok(), "{}", list.stdout);
}

/// The exit code says whether anything was touched; the message says what, where, and what to do.
#[test]
fn what_cannot_work_is_said_before_anything_is_touched() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(run(folder.path(), "save sim:memory=1MiB x.state").code, 0);
    let mut damaged = std::fs::read(folder.path().join("x.state")).unwrap();
    damaged[500_000] ^= 1;
    std::fs::write(folder.path().join("damaged.state"), &damaged).unwrap();
    std::fs::write(folder.path().join("cut.state"), &damaged[..400_000]).unwrap();
    std::fs::write(folder.path().join("text.state"), "not a state file").unwrap();

    let mut told = String::new();
    for arguments in [
        "save sim x.state",
        "save sim:colour=red y.state",
        "save sim:memory=0 y.state",
        "save sim no/such/folder/y.state",
        "save 0000:ff:1f.7 y.state",
        "save ../../etc/passwd y.state",
        "restore sim:memory=1MiB missing.state",
        "restore sim:memory=1MiB damaged.state",
        "restore sim:memory=1MiB cut.state",
        "restore sim:memory=1MiB text.state",
        "restore sim:memory=2MiB x.state",
        "restore sim:memory=1MiB,firmware=other x.state",
    ] {
        let Run { code, stdout, stderr } = run(folder.path(), arguments);
        write!(told, "$ vfio-device {arguments}\n{stderr}{stdout}-> {code}\n\n").unwrap();
    }
    insta::assert_snapshot!("refusals", told);
    let files = std::fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(files, 4, "nothing was left behind");
}

#[test]
fn help_tells_what_a_person_needs() {
    let folder = tempfile::tempdir().unwrap();
    for (name, arguments) in
        [("help", "--help"), ("help_save", "save --help"), ("help_restore", "restore --help")]
    {
        let help = run(folder.path(), arguments);
        assert_eq!(help.code, 0);
        insta::assert_snapshot!(name, help.stdout);
    }
    assert_eq!(run(folder.path(), "save").code, 2, "usage");
}
