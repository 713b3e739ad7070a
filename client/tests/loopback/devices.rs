//! `vfioctl devices` and `vfioctl dirty-tracking`.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use serde_json::Value;
use tonic::Status;
use vfio_checkpoint_proto::v1;

use crate::server::Agent;
use crate::setup::Setup;

#[tokio::test]
async fn a_watch_prints_each_change_and_comes_back_after_the_agent() {
    let agent = Agent::default();
    let setup = Setup::new(&agent).await;
    let (code, out, err) = setup.run("devices watch").await;
    assert_eq!((code, err.as_str()), (0, ""));
    insta::assert_snapshot!(out);
    agent.devices.watch_ends.lock().unwrap().push(Status::unavailable("restarting"));
    let (code, out, err) = setup.run("devices watch a -o json").await;
    assert_eq!(code, 0, "{err}");
    let states: Vec<Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let states: Vec<&str> = states.iter().map(|device| device["state"].as_str().unwrap()).collect();
    assert_eq!(states, ["RUNNING", "STOP_COPY", "RUNNING", "STOP_COPY"]);
    assert!(err.contains("asking again"), "{err}");
    agent.devices.watch_ends.lock().unwrap().push(Status::permission_denied("not for you"));
    let (code, out, err) = setup.run("devices watch -o yaml").await;
    assert_eq!(code, 5, "{err}");
    assert_eq!(out.matches("---\nname: devices/a\n").count(), 2, "{out}");
}

#[tokio::test]
async fn a_watch_ends_with_its_reader() {
    let agent = Agent::default();
    *agent.devices.is_restless.lock().unwrap() = true;
    let setup = Setup::new(&agent).await;
    let mut command = setup.command("devices watch -o json");
    let ended = tokio::task::spawn_blocking(move || {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.contains("devices/a"), "{line}");
        child.wait_with_output().unwrap()
    });
    let ended = ended.await.unwrap();
    assert_eq!((ended.status.code(), ended.stderr), (Some(0), Vec::new()));
}

#[tokio::test]
async fn a_reset_asks_and_says_what_became_of_the_state() {
    let agent = Agent::default();
    let setup = Setup::new(&agent).await;
    let (code, out, err) = setup.run("devices reset a --discard-state").await;
    assert_eq!((code, out.as_str()), (2, ""));
    assert!(err.contains("lost for good") && err.contains("--yes") && err.contains("STOP"), "{err}");
    assert!(agent.devices.resets.lock().unwrap().is_empty());

    let (code, out, err) = setup.run("devices reset a --discard-state --yes").await;
    assert_eq!(code, 0, "{err}");
    assert!(out.starts_with("devices/a was reset; its state is lost\n"), "{out}");
    let (code, out, err) = setup.run("devices reset a --keep-state --yes -o json").await;
    assert_eq!(code, 0, "{err}");
    let reset: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&reset["state_lost"], &reset["device"]["state"]), (&false.into(), &"RUNNING".into()));
    let (code, out, _) = setup.run("devices reset a --discard-state --dry-run").await;
    assert_eq!(code, 0);
    assert!(out.starts_with("devices/a would be reset, and its state lost\n"), "{out}");
    let resets = agent.devices.resets.lock().unwrap().clone();
    let asked: Vec<_> = resets.iter().map(|request| (request.mode(), request.validate_only)).collect();
    let (keep, discard) = (v1::ResetMode::KeepState, v1::ResetMode::DiscardState);
    assert_eq!(asked, [(discard, false), (keep, false), (discard, true)]);
    assert!(resets.iter().all(|request| !request.request_id.is_empty()));
}

#[tokio::test]
async fn a_log_is_started_read_in_parts_and_ended() {
    let agent = Agent::default();
    let setup = Setup::new(&agent).await;
    let (code, out, err) = setup.run("dirty-tracking start a --range 0x1000+16MiB").await;
    assert_eq!(code, 0, "{err}");
    assert_eq!(out, "devices/a logs the pages that it writes, in pages of 8.00 KiB\n");
    // One page more than a call may have.
    let (code, out, err) = setup.run("dirty-tracking report a --range 0+0x800001000 -o json").await;
    assert_eq!(code, 0, "{err}");
    let report: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&report["pages"], &report["dirty_pages"]), (&8_388_609.into(), &2.into()));
    assert_eq!(report["dirty"][1]["start"], 0x8_0000_0000_u64);
    let parts: Vec<v1::IovaRange> =
        agent.devices.reports.lock().unwrap().iter().map(|request| request.range.unwrap()).collect();
    assert_eq!(parts.len(), 2);
    assert_eq!((parts[1].start, parts[1].length_bytes), (0x8_0000_0000, 4096));
    let (code, _, err) = setup.run("dirty-tracking report a --range 1+4096").await;
    assert_eq!(code, 2);
    assert!(err.contains("whole pages"), "{err}");
    let (code, out, _) = setup.run("dirty-tracking stop a").await;
    assert_eq!((code, out.as_str()), (0, "devices/a logs no more\n"));
}
