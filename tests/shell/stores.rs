//! Save and restore with a store of the agent's, its checkpoints, and operations.

use serde_json::json;

use crate::lab::Lab;
use crate::node::{DEVICES, Node};

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_is_made_listed_verified_restored_and_deleted() {
    let node = Node::new(&DEVICES).await;
    let first = node.carries("nic0");
    let saved = node.run("save nic0 --store shelf --wait -o json").exits(0).json();
    let name = saved["checkpoint"].as_str().unwrap().to_owned();
    assert!(name.starts_with("stores/shelf/checkpoints/"), "{name}");
    assert_eq!(saved["added"]["plain_bytes"], saved["moved_bytes"]);
    node.run("save nic0 --store local").exits(0).prints("checkpoint  local/");
    let again = node.run("save nic0 --store shelf -o json").exits(0).json();
    assert_eq!(again["added"]["chunks"], 0, "what is there is not stored again: {again}");

    // The newest first; a page after the other is the same list.
    let listed = node.names("checkpoints list --store shelf");
    assert_eq!(listed, [again["checkpoint"].as_str().unwrap(), &name]);
    assert_eq!(node.names("checkpoints list --store shelf --page-size 1"), listed);
    assert_eq!(node.names("checkpoints list").len(), 1, "the first store is meant where none is said");
    node.run("checkpoints list --page-size 0").exits(2).without_result();
    let error = node.run("checkpoints list --store gone -o json").exits(3).without_result().error();
    assert_eq!(error["reason"], "STORE_NOT_FOUND");

    let got = node.run(&format!("checkpoints get {name} -o json")).quietly().json();
    assert_eq!(
        (&got["consistency"], &got["devices"][0]["logical_device"]),
        (&json!("CONSISTENT"), &json!(first.0))
    );
    let short = name.replace("stores/", "").replace("checkpoints/", "");
    node.run(&format!("checkpoints verify {short}")).quietly().prints(&format!("{short} is sound"));
    let shelf = node.run_bare("checkpoints inspect shelf -o json").quietly().json();
    assert_eq!((&shelf["kind"], &shelf["is_sound"]), (&json!("STORE"), &json!(true)));
    assert_eq!(shelf["checkpoints"][1]["devices"][0]["blake3"], got["devices"][0]["blake3"]);

    let restored = node.run(&format!("restore nic0 --checkpoint {short} -o json")).exits(0).json();
    assert_eq!(restored["devices"][0]["logical_device"], json!(first.0));
    node.run(&format!("restore nic1 --checkpoint {short}")).exits(3).says("--allow-fork");

    let asked = node.run(&format!("checkpoints delete {short}")).exits(2).without_result();
    asked.says("delete this checkpoint?").says("give --yes");
    let dry = node.run(&format!("checkpoints delete {short} --dry-run -o json")).quietly().json();
    assert_eq!(dry, json!({ "name": name, "dry_run": true }));
    assert_eq!(node.names("checkpoints list --store shelf").len(), 2);
    node.run(&format!("checkpoints delete {short} --yes")).quietly().prints("is deleted");
    assert_eq!(node.names("checkpoints list --store shelf").len(), 1);
    for line in ["get", "verify", "delete --yes"] {
        let error =
            node.run(&format!("checkpoints {line} {short} -o json")).exits(3).without_result().error();
        assert_eq!(error["reason"], "CHECKPOINT_NOT_FOUND", "{line}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_damaged_in_a_store_is_found_by_both_ways_to_look() {
    let node = Node::new(&DEVICES).await;
    let saved = node.run("save nic0 --store shelf -o json").exits(0).json();
    let name = saved["checkpoint"].as_str().unwrap();
    let mut open = vec![node.path("shelf/chunks")];
    let chunk = loop {
        let path = open.pop().expect("a chunk");
        if path.is_file() {
            break path;
        }
        open.extend(std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
    };
    let mut bytes = std::fs::read(&chunk).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&chunk, bytes).unwrap();
    let verified = node.run(&format!("checkpoints verify {name} -o json")).exits(1).json();
    assert_eq!(verified["is_sound"], false);
    assert!(verified["problems"][0].as_str().unwrap().contains("chunks/"), "{verified}");
    let found = node.run_bare("checkpoints inspect shelf -o json").exits(1).json();
    assert_eq!(found["is_sound"], false);
    // A restore finds it as well. What it had loaded by then is no state that anybody had.
    let failed = node.run(&format!("restore nic0 --checkpoint {name} -o json")).exits(4);
    let (operation, error) = (failed.json(), failed.error());
    assert_eq!((&operation["result"], &operation["outcome"]), (&json!("FAILED"), &json!("STATE_LOST")));
    assert_eq!(
        (&error["reason"], &error["operation"]),
        (&operation["failure"]["reason"], &operation["name"])
    );
    assert!(error["message"].as_str().unwrap().contains("restore it"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operation_is_held_listed_resumed_and_cancelled() {
    let node = Node::new(&DEVICES).await;
    let started = node.run("save nic0 --store shelf --after hold --no-wait -o json").quietly().json();
    let name = started["name"].as_str().unwrap().to_owned();
    node.until_held(&name);
    // The time to wait is over, and the operation is told as it is then.
    let passed = node.run(&format!("operations watch {name} --wait-timeout 1s -o json")).exits(6);
    assert_eq!((&passed.json()["name"], &passed.json()["phase"]), (&json!(name), &json!("HELD")));
    let error = passed.error();
    assert_eq!((&error["reason"], &error["operation"]), (&json!("GOES_ON"), &json!(name)));
    assert!(error["hint"].as_str().unwrap().contains("operations watch"), "{error}");
    assert!(passed.err.contains("to run them call: vfioctl operations resume"), "{passed:?}");

    assert_eq!(node.names("operations list --active --device nic0"), [name.as_str()]);
    assert_eq!(node.names("operations list --active --device nic1"), Vec::<String>::new());
    let got = node.run(&format!("operations get {name} -o json")).quietly().json();
    assert_eq!(got["actions"], json!(["RESUME", "CANCEL"]));
    let error = node.run("save nic0 --store shelf -o json").exits(3).without_result().error();
    assert_eq!((&error["code"], &error["blockers"][0]["reason"]), (&json!("UNAVAILABLE"), &json!("LEASED")));
    assert!(error["retry_after_ms"].as_u64().is_some_and(|time| time > 0), "{error}");

    let done = node.run(&format!("operations resume {name} --wait -o json")).exits(0).json();
    assert_eq!((&done["result"], &done["consistency"]), (&json!("SUCCEEDED"), &json!("CONSISTENT")));
    let error = node.run(&format!("operations cancel {name} -o json")).exits(3).without_result().error();
    assert_eq!(error["reason"], "OPERATION_OVER");

    // Undone, as was asked for. Whoever waits for it is told that it was undone.
    let held = node.run("save nic0 --store shelf --after hold --no-wait -o json").quietly().json();
    let name = held["name"].as_str().unwrap();
    let waiting = node.command(&format!("operations watch {name} -o json")).spawn().unwrap();
    node.run(&format!("operations cancel {name} -o json")).exits(0).prints("\"CANCELLED\"");
    let waited = crate::said::Said::new("watch", waiting.wait_with_output().unwrap()).exits(1);
    assert_eq!(
        (&waited.json()["result"], &waited.error()["reason"]),
        (&json!("CANCELLED"), &json!("CANCELLED"))
    );
    assert_eq!(node.names("checkpoints list --store shelf").len(), 1);
    for line in ["get", "watch", "cancel", "resume --wait", "cutover"] {
        let error = node.run(&format!("operations {line} 1-1 -o json")).exits(3).without_result().error();
        assert_eq!(error["reason"], "OPERATION_NOT_FOUND", "{line}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hold_that_runs_out_leaves_a_checkpoint_that_says_so() {
    let node = Node::with(Lab::new(), &DEVICES, "defaults.hold_timeout = \"300ms\"").await;
    let stale = node.run("save nic0 --store shelf --after hold -o json").exits(1);
    assert_eq!(stale.json()["consistency"], "INCONSISTENT");
    assert_eq!(stale.error()["reason"], "HOLD_EXPIRED");
    let name = stale.json()["checkpoint"].as_str().unwrap().to_owned();
    node.run("checkpoints list --store shelf").quietly().prints("INCONSISTENT");
    let refused = node.run(&format!("restore nic0 --checkpoint {name}")).exits(3).without_result();
    refused.says("INCONSISTENT");
    node.run(&format!("restore nic0 --checkpoint {name} --allow-inconsistent")).exits(0);
    let (before, text) = (node.carries("nic0"), node.run("save nic0 --output one --after hold").exits(1));
    assert!(text.out.contains("INCONSISTENT") && text.err.contains("marked INCONSISTENT"), "{text:?}");
    node.run("restore nic0 --input one").exits(0).says("the checkpoint is marked INCONSISTENT");
    assert_eq!(node.carries("nic0").0, before.0);
    // A restore that nobody resumes is undone: its state is never run.
    let lost = node.run("restore nic0 --input one --hold -o json").exits(4);
    assert_eq!(lost.json()["outcome"], "STATE_LOST");
    assert_eq!(lost.error()["exit_code"], 4);
}
