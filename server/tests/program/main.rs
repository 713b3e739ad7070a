//! The agent's program as a shell sees it: what it prints, and how it ends.

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test: the helpers outside #[test] functions assert by panicking, too"
)]

mod logs;

use std::process::{Command, Output};

fn run(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vfio-checkpointd")).args(arguments).output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn the_demo_proves_what_it_shows() {
    let output = run(&["demo", "--json", "--memory", "8MiB", "--dirty", "64MiB", "--hot", "1MiB"]);
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    let report: serde_json::Value =
        serde_json::from_slice(&output.stdout).expect("one document, and nothing else");
    assert_eq!(report["verified"], true, "{report}");
    assert_eq!(report["source_digest"], report["destination_digest"]);
    let moved = &report["migration"];
    assert_eq!(moved["given_digest"], moved["taken_digest"]);
    assert!(moved["given_digest"].as_str().unwrap().len() == 64, "{moved}");
    assert_ne!(moved["given_digest"], report["source_digest"], "two devices, and each has its own");
    assert!(report["save"]["bytes"].as_u64().unwrap() >= 4 << 20, "{report}");
    assert!(report["save"]["downtime_ms"].as_f64().unwrap() > 0.0, "{report}");
    assert_eq!(report["restore"]["bytes"], report["incremental"]["bytes"]);
    let added = |save: &str| report[save]["added_bytes"].as_u64().unwrap();
    assert!(added("save") >= 4 << 20 && added("incremental") < added("save") / 2, "{report}");
}

#[test]
fn the_demo_tells_people_the_same() {
    let output = run(&["demo", "--memory", "1MiB", "--dirty", "0", "--hot", "1MiB"]);
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        text.trim_end().ends_with("verified: the devices on node-b hold what those on node-a held."),
        "{text}"
    );
}

#[test]
fn what_is_wrong_with_a_configuration_is_told_and_nothing_begins() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("agent.toml");
    std::fs::write(&file, "[sever]\nlisten = \"127.0.0.1:0\"\n").unwrap();
    let output = run(&["serve", "--check", "--config", file.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(3));
    assert!(said(&output).contains("sever"), "{}", said(&output));
}

#[test]
fn nobody_is_well_where_nobody_is() {
    // A port that nobody serves over TCP.
    let taken = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let output = run(&["healthcheck", "--address", &taken.to_string(), "--timeout", "2s"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains(&taken.to_string()), "{}", said(&output));
}
