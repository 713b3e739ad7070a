//! Migrations from a shell: dry runs, the whole way, and what is asked of a person.

use serde_json::json;

use crate::node::{DEVICES, Node};

#[tokio::test(flavor = "multi_thread")]
async fn devices_move_and_are_told_of() {
    let source = Node::new(&DEVICES).await;
    let destination = source.beside("other", &DEVICES).await;
    let to = format!("--to {} --to-server-spiffe-id spiffe://lab.test/agent/other", destination.endpoint());
    let was = source.carries("nic0");

    let dry = source.run(&format!("migrate nic0 nic1 {to} --dry-run -o json")).quietly().json();
    assert_eq!(dry["blockers"], json!([]), "{dry}");
    let blocked = source.run(&format!("migrate nic0 {to} --onto nic7 --dry-run")).exits(3);
    blocked.prints("nic7");
    source.run(&format!("migrate nic0 {to} --onto nic7")).exits(3).says("nic7");
    source.run("migrate nic0 --to https://localhost:1 --dry-run").exits(3).prints("DESTINATION_UNREACHABLE");
    assert_eq!(source.carries("nic0"), was, "nothing was touched");

    let moved = source.run(&format!("migrate nic0 {to} -o json")).exits(0).json();
    assert_eq!(moved["outcome"], "MOVED", "{moved}");
    assert_eq!(moved["handover"]["verdict"], "COMMITTED", "{moved}");
    assert!(moved["downtime_us"].as_u64().is_some_and(|downtime| downtime > 0), "{moved}");
    assert_eq!(destination.carries("nic0"), (was.0.clone(), was.1 + 1));
    assert_ne!(source.carries("nic0").0, was.0);
    source.run("operations list -o wide").quietly().prints("MIGRATION").prints("COMMITTED");
    destination.run("operations list").quietly().prints("ARRIVAL");
    source.run_as("viewer", &format!("migrate nic1 {to}")).exits(5).says("ROLE_REQUIRED");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_is_a_persons_is_asked_for() {
    let source = Node::new(&DEVICES).await;
    let destination = source.beside("other", &DEVICES).await;
    let to = format!("--to {} --to-server-spiffe-id spiffe://lab.test/agent/other", destination.endpoint());
    let was = source.carries("nic1");
    let started = source.run(&format!("migrate nic1 {to} --commit manual --no-wait -o json")).exits(0).json();
    let name = started["name"].as_str().unwrap().to_owned();
    source.until(&name, "PREPARED");
    let cold = source.run(&format!("operations resolve {name}")).exits(3);
    cold.says("NOT_IN_DOUBT");
    source.run(&format!("operations commit {name}")).exits(0);
    source.run(&format!("operations watch {name} -o json")).exits(0).prints("MOVED");
    assert_eq!(destination.carries("nic1"), (was.0, was.1 + 1));
}
