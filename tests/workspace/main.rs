//! The house rules that a compiler does not check. Dependencies point one way. What a crate of this workspace may use is a
//! table here; anything else is a failure.
//!
//! ```text
//!   seal, fsm, drivers <- device <- server    seal <- proto <- client <- server    tests -> all
//!   seal <- store, drivers <- vfioctl: the client's feature `cli`
//! ```

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "a test: the helpers outside #[test] functions assert by panicking, too"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// For each crate of the workspace: the workspace crates it may depend on.
const ALLOWED: [(&str, &[&str]); 9] = [
    ("vfio-checkpoint-seal", &[]),
    ("vfio-checkpoint-fsm", &[]),
    ("vfio-checkpoint-drivers", &[]),
    ("vfio-checkpoint-device", &["vfio-checkpoint-drivers", "vfio-checkpoint-fsm", "vfio-checkpoint-seal"]),
    ("vfio-checkpoint-store", &["vfio-checkpoint-seal"]),
    ("vfio-checkpoint-proto", &["vfio-checkpoint-seal"]),
    (
        "vfio-checkpoint-client",
        &[
            "vfio-checkpoint-drivers",
            "vfio-checkpoint-proto",
            "vfio-checkpoint-seal",
            "vfio-checkpoint-store",
        ],
    ),
    (
        "vfio-checkpoint-server",
        &[
            "vfio-checkpoint-client",
            "vfio-checkpoint-device",
            "vfio-checkpoint-fsm",
            "vfio-checkpoint-proto",
            "vfio-checkpoint-seal",
            "vfio-checkpoint-store",
        ],
    ),
    (
        "vfio-checkpoint-tests",
        &[
            "vfio-checkpoint-client",
            "vfio-checkpoint-device",
            "vfio-checkpoint-fsm",
            "vfio-checkpoint-proto",
            "vfio-checkpoint-seal",
            "vfio-checkpoint-server",
            "vfio-checkpoint-store",
        ],
    ),
];

/// For each crate that is synchronous and offline by design: what must not be anywhere below it.
const NEVER_BELOW: [(&str, &[&str]); 3] = [
    ("vfio-checkpoint-seal", &["tokio", "tonic", "prost", "rustix"]),
    ("vfio-checkpoint-fsm", &["tokio", "tonic", "prost", "libc", "rustix"]),
    ("vfio-checkpoint-device", &["tokio", "tonic", "prost", "kvm-ioctls", "vfio-checkpoint-proto"]),
];

struct Metadata {
    members: BTreeSet<String>,
    /// Normal and build dependencies by crate name, one level.
    edges: BTreeMap<String, BTreeSet<String>>,
}

fn metadata() -> Metadata {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--locked", "--filter-platform=x86_64-unknown-linux-gnu"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let value: Value = serde_json::from_slice(&output.stdout).expect("cargo metadata prints JSON");

    let packages = value["packages"].as_array().expect("packages");
    let names: BTreeMap<&str, &str> =
        packages.iter().map(|p| (p["id"].as_str().unwrap(), p["name"].as_str().unwrap())).collect();
    let member_ids = value["workspace_members"].as_array().expect("members");
    let members = member_ids.iter().map(|id| names[id.as_str().unwrap()].to_owned()).collect();

    let mut edges: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for node in value["resolve"]["nodes"].as_array().expect("nodes") {
        let from = names[node["id"].as_str().unwrap()].to_owned();
        let below = edges.entry(from).or_default();
        for dependency in node["deps"].as_array().expect("deps") {
            let kinds = dependency["dep_kinds"].as_array().expect("kinds");
            if kinds.iter().any(|kind| kind["kind"] != "dev") {
                below.insert(names[dependency["pkg"].as_str().unwrap()].to_owned());
            }
        }
    }
    Metadata { members, edges }
}

fn all_below(edges: &BTreeMap<String, BTreeSet<String>>, root: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut open = vec![root.to_owned()];
    while let Some(name) = open.pop() {
        for below in edges.get(&name).into_iter().flatten() {
            if found.insert(below.clone()) {
                open.push(below.clone());
            }
        }
    }
    found
}

#[test]
fn workspace_edges_point_one_way() {
    let metadata = metadata();
    let known: BTreeSet<String> = ALLOWED.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(metadata.members, known, "every workspace crate has a line in ALLOWED");
    for (name, allowed) in ALLOWED {
        let used: Vec<&str> = metadata.edges[name]
            .iter()
            .map(String::as_str)
            .filter(|below| known.contains(*below) && !allowed.contains(below))
            .collect();
        assert!(used.is_empty(), "{name} must not depend on {used:?}");
    }
}

#[test]
fn the_core_stays_synchronous_and_offline() {
    let metadata = metadata();
    for (name, never) in NEVER_BELOW {
        let below = all_below(&metadata.edges, name);
        let found: Vec<&&str> = never.iter().filter(|banned| below.contains(**banned)).collect();
        assert!(found.is_empty(), "{name} must not have {found:?} below it");
    }
}

/// What only the program `vfioctl` needs, and nobody who uses the client library.
const ONLY_OF_THE_PROGRAM: [&str; 11] = [
    "clap",
    "clap_complete",
    "clap_mangen",
    "indicatif",
    "object_store",
    "rcgen",
    "reqwest",
    "serde-saphyr",
    "toml_edit",
    "vfio-checkpoint-drivers",
    "vfio-checkpoint-store",
];

#[test]
fn the_client_library_goes_without_what_its_program_needs() {
    let below = |more: &[&str]| -> BTreeSet<String> {
        let output = Command::new(env!("CARGO"))
            .args(["tree", "-p", "vfio-checkpoint-client", "-e", "normal", "--prefix", "none", "--locked"])
            .args(more)
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .output()
            .expect("cargo runs");
        assert!(output.status.success(), "cargo tree: {}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).expect("text");
        text.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect()
    };
    let (program, library) = (below(&[]), below(&["--no-default-features"]));
    for name in ONLY_OF_THE_PROGRAM {
        assert!(program.contains(name), "vfioctl does without {name}: take it from the list");
        assert!(!library.contains(name), "the client library must not have {name} below it");
    }
}

#[test]
fn nobody_builds_on_the_program_vfioctl() {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--locked", "--no-deps"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    let value: Value = serde_json::from_slice(&output.stdout).expect("cargo metadata prints JSON");
    let mut users = 0;
    for package in value["packages"].as_array().expect("packages") {
        for dependency in package["dependencies"].as_array().expect("dependencies") {
            if dependency["name"] == "vfio-checkpoint-client" {
                users += 1;
                let is_program = dependency["uses_default_features"] != false
                    || dependency["features"].as_array().expect("features").iter().any(|name| name == "cli");
                assert!(!is_program, "{} builds on the command line", package["name"]);
            }
        }
    }
    assert_eq!(users, 2, "the server and the tests");
}

/// The one module that may hold `unsafe`, from the workspace's root. Its own modules inherit the leave.
const UNSAFE: &str = "server/device/src/kernel/sys.rs";

#[test]
fn one_module_opts_in_to_unsafe() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let mut open = ["server", "proto", "client", "tests"].map(|top| root.join(top)).to_vec();
    let mut opted_in = Vec::new();
    while let Some(path) = open.pop() {
        if path.is_dir() {
            open.extend(fs::read_dir(&path).expect("a folder").map(|entry| entry.expect("an entry").path()));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).expect("source text");
            // In two parts, so that this file does not name itself.
            if text.replace(concat!("forbid(unsafe", "_code)"), "").contains(concat!("unsafe", "_code")) {
                opted_in.push(path.strip_prefix(root).expect("below the root").display().to_string());
            }
        }
    }
    assert_eq!(opted_in, [UNSAFE]);
}

/// The points at which tests stop the agent are in what tests are built against, and in no program: nothing but a
/// dev-dependency may ask for them, which cargo leaves aside where it builds programs.
#[test]
fn no_program_has_fail_points() {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--locked", "--no-deps"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    let value: Value = serde_json::from_slice(&output.stdout).expect("cargo metadata prints JSON");
    let mut asked_for = 0;
    for package in value["packages"].as_array().expect("packages") {
        let features = package["features"].as_object().expect("features");
        for (feature, asks_for) in features {
            let names = asks_for.as_array().expect("a list").iter().filter_map(Value::as_str);
            let points: Vec<&str> = names.filter(|name| name.contains("failpoints")).collect();
            assert!(points.is_empty(), "{}: the feature {feature} turns on {points:?}", package["name"]);
        }
        for dependency in package["dependencies"].as_array().expect("dependencies") {
            let asks =
                dependency["features"].as_array().expect("features").iter().any(|name| name == "failpoints");
            assert!(!asks || dependency["kind"] == "dev", "{} has {}", package["name"], dependency["name"]);
            asked_for += usize::from(asks);
        }
    }
    assert_eq!(asked_for, 1, "the tests ask for them");
}
