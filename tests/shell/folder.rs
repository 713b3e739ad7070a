//! Save and restore with a folder of the caller's.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::lab::Lab;
use crate::node::{DEVICES, Node};
use crate::said::Said;

fn names(path: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[tokio::test(flavor = "multi_thread")]
async fn state_goes_into_a_folder_and_back() {
    let node = Node::new(&DEVICES).await;
    let first = node.carries("nic0");
    let saved = node.run("save nic0 nic1 --output one -o json").exits(0);
    let summary = saved.json();
    assert_eq!((&summary["result"], &summary["consistency"]), (&json!("SUCCEEDED"), &json!("CONSISTENT")));
    assert_eq!(summary["devices"][1]["device"], "devices/nic1");
    let operation = summary["operation"].as_str().unwrap();
    assert_eq!(saved.told(), [json!({ "note": format!("saving as {operation}") })]);
    assert_eq!(names(&node.path("one")), ["device-0.state", "device-1.state", "manifest.json"]);

    let found = node.run_bare("checkpoints inspect one -o json").quietly().json();
    assert_eq!((&found["kind"], &found["is_sound"]), (&json!("FOLDER"), &json!(true)));
    let device = &found["checkpoints"][0]["devices"][0];
    assert_eq!(
        (&device["logical_device"], &device["blake3"]),
        (&json!(first.0), &summary["devices"][0]["blake3"])
    );

    // It goes on under the next epoch.
    let restored = node.run("restore nic0 nic1 --input one -o json").exits(0).json();
    assert_eq!(
        (&restored["result"], &restored["devices"][0]["logical_device"]),
        (&json!("SUCCEEDED"), &json!(first.0))
    );
    let (carried, epoch) = node.carries("nic0");
    assert!(carried == first.0 && epoch > first.1, "{carried} {epoch}");
    // To people it is told as well, and stdout has the same three things.
    let text = node.run("restore nic0 nic1 --input one").exits(0).says("restoring as operations/");
    assert!(text.out.starts_with("restored  ") && text.out.contains("devices   devices/nic0, devices/nic1"));

    // A byte that was changed is found before the agent is asked for anything.
    let state = node.path("one/device-0.state");
    let mut bytes = fs::read(&state).unwrap();
    bytes[100] ^= 1;
    fs::write(&state, bytes).unwrap();
    node.run("checkpoints inspect one").exits(1).prints("one is NOT sound");
    let operations = node.names("operations list");
    node.run("restore nic0 nic1 --input one").exits(3).without_result().says("is damaged");
    assert_eq!(node.names("operations list"), operations);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_in_the_way_is_told_before_anything_is_touched() {
    let node = Node::new(&DEVICES).await;
    let dry = node.run("save nic0 nic1 --output one --dry-run -o json").quietly().json();
    assert_eq!((&dry["blockers"], &dry["pre_copy"]), (&json!([]), &json!(true)));
    assert!(dry["total_bytes"].as_u64().is_some_and(|bytes| bytes > 2 * (256 << 10)), "{dry}");
    node.run("save nic0 --output one --dry-run").quietly().prints("nothing is in the way\n");
    let dry = node.run("save nic0 lone --output one --dry-run -o json").exits(3).json();
    assert_eq!(
        (&dry["blockers"][0]["reason"], &dry["blockers"][0]["device"]),
        (&json!("NO_P2P"), &json!("devices/lone"))
    );
    // The same without the question is a failure, and has the same blockers.
    let error = node.run("save nic0 lone --output one -o json").exits(3).without_result().error();
    assert_eq!((&error["code"], &error["reason"]), (&json!("FAILED_PRECONDITION"), &json!("BLOCKED")));
    assert_eq!((&error["blockers"], &error["device"]), (&dry["blockers"], &json!("devices/lone")));
    node.run("save nic0 lone --output one").exits(3).without_result().says("\n  NO_P2P devices/lone: ");
    node.run("save nic0 --output one --after hold --wait-timeout 1s").exits(2).without_result();
    assert!(!node.path("one").exists());
    assert_eq!(node.names("operations list"), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_that_cannot_take_the_state_is_told_before_the_device_is_touched() {
    let free = rustix::fs::statvfs(std::env::temp_dir()).unwrap();
    // More than is free; a simulated device makes its memory up and takes none.
    let most: u64 = 1 << 40;
    let memory = (free.f_bavail * free.f_frsize + (8 << 30)).min(most);
    let huge = format!("sim:seed=4,memory={memory}");
    let devices = [("nic0", "sim:seed=1,memory=256KiB"), ("huge", huge.as_str())];
    let more = format!("limits.max_device_bytes = {}", most * 2);
    let node = Node::with(Lab::new(), &devices, &more).await;

    fs::create_dir(node.path("full")).unwrap();
    fs::write(node.path("full/thesis.txt"), "dear").unwrap();
    fs::write(node.path("file"), "").unwrap();
    let before = node.carries("nic0");
    for (folder, told, hint) in [
        ("full", "it holds \"thesis.txt\"", "give a new or empty folder"),
        ("file", "is not a folder", "give a folder"),
        ("no/where", "cannot make the folder", "see that the path is right"),
        // Nobody makes a folder there, whatever rights there are.
        ("/proc/here", "cannot make the folder", "see that the path is right"),
    ] {
        let line = format!("save nic0 --output {folder} -o json");
        let error = node.run(&line).exits(3).without_result().error();
        assert_eq!(error["reason"], "FOLDER_UNFIT", "{line}");
        let (message, advice) = (error["message"].as_str().unwrap(), error["hint"].as_str().unwrap());
        assert!(message.contains(told) && advice.contains(hint), "{line}: {error}");
    }
    if memory < most {
        // Should it be saved all the same, it ends after a few MiB, and not with a disk that is full.
        let mut limited = Command::new("sh");
        limited.args(["-c", "ulimit -f 65536 && exec \"$0\" \"$@\""]);
        let save = node.command("save huge --output one -o json");
        limited.arg(save.get_program()).args(save.get_args()).current_dir(node.lab.folder.path());
        limited.envs(save.get_envs().filter_map(|(name, value)| Some((name, value?))));
        let error = Said::new("save huge", limited.output().unwrap()).exits(3).without_result().error();
        assert_eq!(error["reason"], "FOLDER_UNFIT");
        assert!(error["message"].as_str().unwrap().contains("has room for"), "{error}");
    }
    assert!(!node.path("one").exists());
    assert_eq!(names(&node.path("full")), ["thesis.txt"]);
    assert_eq!(node.names("operations list"), Vec::<String>::new(), "nothing was begun");
    assert_eq!(node.carries("nic0"), before);

    node.run("save nic0 --output one").exits(0);
    let there = node.run("save nic0 --output one").exits(3).without_result();
    there.says("one is not empty").says("or --replace to replace the checkpoint in it");
    node.run("save nic0 --output one --replace").exits(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_copy_is_refused_and_allowed() {
    let node = Node::new(&DEVICES).await;
    node.run("save nic0 --output one").exits(0);
    let (mine, other) = (node.carries("nic0"), node.carries("nic1"));
    let dry = node.run("restore nic1 --input one --dry-run -o json").exits(3).json();
    assert_eq!(dry["blockers"][0]["reason"], "SOURCE_STILL_RUNNING");
    let error = node.run("restore nic1 --input one -o json").exits(3).without_result().error();
    assert_eq!((&error["reason"], &error["blockers"]), (&json!("BLOCKED"), &dry["blockers"]));
    assert!(error["hint"].as_str().unwrap().contains("--allow-fork"), "{error}");
    assert_eq!(node.carries("nic1"), other, "nothing was touched");
    node.run("restore nic1 --input one").exits(3).without_result().says("--allow-fork");

    let copy = node.run("restore nic1 --input one --allow-fork -o json").exits(0).json();
    let logical = copy["devices"][0]["logical_device"].as_str().unwrap();
    assert!(logical != mine.0 && logical != other.0, "a copy is a device of its own");
    assert_eq!(node.carries("nic1").0, logical);

    // Left stopped, it cannot run twice.
    node.run("save nic0 --output two --after stay-stopped").exits(0);
    node.run("restore nic1 --input two").exits(0);
    assert_eq!(node.carries("nic1").0, mine.0);
    node.run("restore nic0 nic1 --input one")
        .exits(2)
        .without_result()
        .says("has 1 devices, but 2 are given");
    node.run("restore lone --input one --allow-fork").exits(3).without_result().says("FINGERPRINT_MISMATCH");
    let error = node.run("restore nic0 --input gone -o json").exits(3).without_result().error();
    assert_eq!(error["code"], Value::Null);
}
