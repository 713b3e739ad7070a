//! Devices, and what goes where: results to stdout, all else to stderr.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, ChildStdout};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::node::{DEVICES, Node};
use crate::said::Said;

#[tokio::test(flavor = "multi_thread")]
async fn devices_are_listed_in_every_format() {
    let node = Node::new(&DEVICES).await;
    let all = node.run("devices list -o json").quietly().json();
    let names: Vec<&str> = all.as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["devices/lone", "devices/nic0", "devices/nic1"]);
    assert_eq!(node.run("devices get nic0 -o json").quietly().json(), all[1]);
    let table = node.run("devices list").quietly().prints("NAME").prints("devices/nic1");
    let wide = node.run("devices list -o wide").quietly().prints("LOGICAL_DEVICE");
    assert_eq!((table.out.lines().count(), wide.out.lines().count()), (4, 4));
    node.run("devices get devices/nic0 -o yaml").quietly().prints("name: devices/nic0\n");
    // As a variable, and an option goes before it.
    let formatted = |line: &str| {
        let output = node.command(line).env("VFIOCTL_FORMAT", "json").output().unwrap();
        Said::new(line, output).quietly()
    };
    assert_eq!(formatted("devices list").json(), all);
    formatted("devices list -o table").prints("NAME");
    // Whoever asks for colours gets none where there is no terminal, and whoever forbids them gets none either.
    for variable in ["NO_COLOR", "CLICOLOR_FORCE", "FORCE_COLOR"] {
        let line = "doctor --only caller --only agent";
        Said::new(line, node.command(line).env(variable, "1").output().unwrap()).quietly();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_is_told_on_stderr_in_the_format_of_results() {
    let node = Node::new(&DEVICES).await;
    let text = node.run("devices get gone").exits(3).without_result();
    assert!(text.err.starts_with("vfioctl: GetDevice failed (NOT_FOUND, DEVICE_NOT_FOUND): "), "{text:?}");
    let error = node.run("devices get gone -o json").exits(3).without_result().error();
    assert_eq!((&error["code"], &error["reason"]), (&json!("NOT_FOUND"), &json!("DEVICE_NOT_FOUND")));
    let yaml = node.run("devices get gone -o yaml").exits(3).without_result();
    assert!(yaml.err.starts_with("---\nerror:\n  code: NOT_FOUND\n  reason: DEVICE_NOT_FOUND\n"), "{yaml:?}");

    // A command line that is wrong is told so as well, whatever is wrong with it.
    for line in ["devices get -o json", "devices get NO! --format=json", "-ojson", "what -o json"] {
        let error = node.run(line).exits(2).without_result().error();
        assert_eq!((&error["reason"], &error["code"]), (&json!("USAGE"), &Value::Null), "{line}");
    }
    let text = node.run("devices get NO!").exits(2).without_result().says("is not a device name");
    assert!(text.err.starts_with("error: "), "{text:?}");
    node.run("--help -o json").quietly().prints("Exit codes:").prints("retry_after_ms");

    let error = node.run_as("viewer", "devices reset nic0 --discard-state --yes -o json").exits(5).error();
    assert_eq!((&error["code"], &error["reason"]), (&json!("PERMISSION_DENIED"), &json!("ROLE_REQUIRED")));
    let error = node.run("devices list -o json --endpoint https://127.0.0.1:1").exits(5).error();
    assert_eq!((&error["code"], &error["reason"]), (&Value::Null, &json!("CONNECTION_REFUSED")));
    assert_eq!(error["hint"], "see that the agent runs and listens on this port");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_wants_a_yes_and_says_what_became_of_the_state() {
    let node = Node::new(&DEVICES).await;
    let before = node.carries("nic0");
    node.run("devices reset nic0").exits(2).without_result().says("--keep-state");
    let unasked = node.run("devices reset nic0 --discard-state").exits(2).without_result();
    let unasked = unasked.says("devices/nic0 is RUNNING, and READY: reset it? Its state is lost for good.");
    unasked.says("give --yes");
    let error = node.run("devices reset nic0 --discard-state -o json").exits(2).without_result().error();
    assert_eq!(error["hint"], "give --yes if that is wanted");
    let dry = node.run("devices reset nic0 --discard-state --dry-run -o json").quietly().json();
    assert_eq!((&dry["dry_run"], &dry["state_lost"]), (&json!(true), &json!(true)));
    assert_eq!(node.carries("nic0"), before, "a dry run changes nothing");
    let done = node.run("devices reset nic0 --discard-state --yes -o json").quietly().json();
    assert_eq!((&done["dry_run"], &done["state_lost"]), (&json!(false), &json!(true)));
    assert_ne!(node.carries("nic0").0, before.0, "it carries something else");
}

#[tokio::test(flavor = "multi_thread")]
async fn dirty_tracking_is_begun_read_and_ended() {
    let node = Node::new(&DEVICES).await;
    let range = "--range 0+256KiB";
    let started = node.run(&format!("dirty-tracking start nic0 {range} -o json")).quietly().json();
    assert_eq!(started, json!({"device": "devices/nic0", "page_bytes": 4096}));
    let report = node.run(&format!("dirty-tracking report nic0 {range} -o json")).quietly().json();
    assert_eq!((&report["pages"], &report["all_dirty"]), (&json!(64), &json!(false)), "{report}");
    let again = node.run(&format!("dirty-tracking start nic0 {range} -o json")).exits(3).without_result();
    let hint = again.error()["hint"].as_str().unwrap().to_owned();
    assert!(hint.contains("dirty-tracking stop"), "{hint}");
    node.run("dirty-tracking stop nic0").quietly().prints("devices/nic0 logs no more");
    // Nothing is known of it any more, so that all of it counts.
    let report = node.run(&format!("dirty-tracking report nic0 {range} -o json")).quietly().json();
    assert_eq!((&report["dirty_pages"], &report["all_dirty"]), (&json!(64), &json!(true)), "{report}");
    node.run("dirty-tracking start nic0").exits(2).without_result().says("--range");
    node.run("dirty-tracking report nic0 --range 0+5KiB").exits(2).without_result().says("whole pages");
}

/// A command that goes on, and what it prints.
struct Watching {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Watching {
    fn new(node: &Node, line: &str) -> Self {
        let mut child = node.command(line).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Self { child, lines }
    }

    fn next(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        line
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_prints_a_document_a_change_until_it_is_interrupted() {
    let node = Node::new(&DEVICES).await;
    let mut watch = Watching::new(&node, "devices watch nic0 -o json");
    let first: Value = serde_json::from_str(&watch.next()).unwrap();
    assert_eq!((&first["name"], &first["operation"]), (&json!("devices/nic0"), &json!("")));
    // Held, so that it is there for as long as it takes to be seen.
    let held = node.run("save nic0 --store local --after hold --no-wait -o json").quietly().json();
    let name = held["name"].as_str().unwrap();
    for operation in [name, ""] {
        loop {
            let change: Value = serde_json::from_str(&watch.next()).unwrap();
            if change["operation"] == operation {
                break;
            }
        }
        if operation == name {
            node.run(&format!("operations cancel {name}")).exits(0);
        }
    }
    kill_process(Pid::from_child(&watch.child), Signal::INT).unwrap();
    assert_eq!(watch.child.wait().unwrap().code(), Some(130));
}
