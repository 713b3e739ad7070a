//! What `vfioctl` does without an agent: contexts, certificates, shells, and checkpoints on this machine.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use serde_json::Value;
use tempfile::TempDir;
use vfio_checkpoint_client::document::{About, Manifest};
use vfio_checkpoint_store::{Ambient, Begin, CheckpointId, Limits, Location, Store};

use crate::pki::Ca;
use crate::server::{Agent, manifest, state};
use crate::setup::{Setup, alone, done};

#[derive(Debug)]
struct Clock;

impl Ambient for Clock {
    fn now(&self) -> SystemTime {
        SystemTime::now()
    }

    fn random(&self) -> u64 {
        7
    }
}

async fn stored(root: &Path) -> CheckpointId {
    let location = Location::Folder(root.to_owned());
    let store = Store::open(&location, Limits::default(), Arc::new(Clock)).await.unwrap();
    let begin = Begin { id: store.new_id(), logical_devices: vec!["ab".repeat(16)], reserve_bytes: 0 };
    let mut writer = store.begin(begin).await.unwrap();
    writer.chunk(0, Bytes::from(state())).await.unwrap();
    writer.finish(0).await.unwrap();
    let about = About {
        node: "node1".to_owned(),
        caller: "spiffe://example.org/user".to_owned(),
        owner_pod: String::new(),
        manifest: Manifest::from_wire(&manifest().into()).unwrap(),
        config: vec![None],
    };
    writer.commit(serde_json::to_value(about).unwrap()).await.unwrap().id
}

fn files(folder: &Path) -> Vec<std::path::PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

#[tokio::test]
async fn a_store_is_inspected_where_it_lies() {
    let folder = TempDir::new().unwrap();
    let root = folder.path().join("store");
    let id = stored(&root).await.to_string();
    let before = files(&root);
    for line in [
        "checkpoints inspect store".to_owned(),
        format!("checkpoints inspect store --checkpoint {id}"),
        format!("checkpoints inspect store/checkpoints/{id}"),
    ] {
        let (code, out, err) = alone(folder.path(), &line);
        assert_eq!((code, err.as_str()), (0, ""), "{line}");
        insta::assert_snapshot!("a_store_that_is_sound", out.replace(&id, "ID"));
    }
    let after = files(&root);
    assert_eq!(before.len(), after.len(), "inspecting has written something: {after:?}");

    let chunk = files(&root.join("chunks")).swap_remove(0);
    let mut bytes = fs::read(&chunk).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&chunk, bytes).unwrap();
    let (code, out, err) = alone(folder.path(), "checkpoints inspect store -o json");
    assert_eq!((code, err.as_str()), (1, ""));
    let found: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&found["kind"], &found["is_sound"]), (&"STORE".into(), &false.into()));
    let problem = found["checkpoints"][0]["problems"][0].as_str().unwrap();
    assert!(problem.contains("chunks/"), "{problem}");
    let (code, out, _) = alone(folder.path(), "checkpoints inspect store");
    assert_eq!(code, 1);
    assert!(out.starts_with(&format!("{id} is NOT sound\n")), "{out}");
}

#[tokio::test]
async fn a_folder_is_inspected_and_nothing_is_made_into_a_store() {
    let agent = Agent::default();
    let setup = Setup::new(&agent).await;
    *agent.operation.lock().unwrap() = done(
        vfio_checkpoint_proto::v1::OperationResult::Succeeded,
        vfio_checkpoint_proto::v1::StateOutcome::Preserved,
        vfio_checkpoint_proto::v1::CheckpointConsistency::Consistent,
    );
    let (code, _, err) = setup.run("save a --output one").await;
    assert_eq!(code, 0, "{err}");
    let folder = setup.folder.path();
    let (code, out, err) = alone(folder, "checkpoints inspect one -o yaml");
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(out.contains("kind: FOLDER\nis_sound: true\n"), "{out}");
    fs::write(setup.path("one/device-0.state"), vec![0; state().len()]).unwrap();
    let (code, out, _) = alone(folder, "checkpoints inspect one");
    assert_eq!(code, 1);
    assert!(out.starts_with("one is NOT sound\n"), "{out}");
    fs::write(setup.path("one/manifest.json"), "{}").unwrap();
    let (code, out, _) = alone(folder, "checkpoints inspect one");
    assert_eq!(code, 1);
    assert!(out.contains("NOT sound"), "{out}");

    fs::create_dir(setup.path("empty")).unwrap();
    for path in ["empty", "nowhere"] {
        let (code, out, err) = alone(folder, &format!("checkpoints inspect {path}"));
        assert_eq!((code, out.as_str()), (2, ""), "{err}");
    }
    assert!(fs::read_dir(setup.path("empty")).unwrap().next().is_none());
}

#[tokio::test]
async fn a_context_takes_the_place_of_options() {
    let agent = Agent::default();
    let setup = Setup::new(&agent).await;
    let folder = setup.folder.path();
    let (code, _, err) = alone(folder, "devices list");
    assert_eq!(code, 2);
    assert!(err.contains("--endpoint is missing") && err.contains("vfioctl context set"), "{err}");
    let port = setup.port;
    let line = format!(
        "context set lab --endpoint https://localhost:{port} --ca ca --cert cert --key key --server-name localhost"
    );
    let (code, out, err) = alone(folder, &line);
    assert_eq!((code, out.as_str()), (0, ""), "{err}");
    assert!(err.contains("lab is in ") && err.contains("in use"), "{err}");
    let folder = folder.to_owned();
    let runs = tokio::task::spawn_blocking(move || {
        let elsewhere = folder.join("elsewhere");
        fs::create_dir(&elsewhere).unwrap();
        let listed = alone(&folder, "devices list");
        let refused = alone(&folder, "devices list --endpoint https://localhost:1");
        let unknown = alone(&folder, "devices list --context lba");
        let contexts = alone(&folder, "context list -o json");
        let deleted = alone(&folder, "context delete lab");
        (listed, refused, unknown, contexts, deleted, alone(&folder, "context use lab"))
    });
    let (listed, refused, unknown, contexts, deleted, used) = runs.await.unwrap();
    assert_eq!(listed.0, 0, "{}", listed.2);
    assert!(listed.1.contains("devices/a"), "{}", listed.1);
    assert_eq!(refused.0, 5, "an option goes before the context: {}", refused.2);
    assert_eq!(unknown.0, 2);
    assert!(unknown.2.contains("there are: lab"), "{}", unknown.2);
    let contexts: Value = serde_json::from_str(&contexts.1).unwrap();
    assert_eq!((&contexts[0]["name"], &contexts[0]["is_current"]), (&"lab".into(), &true.into()));
    assert_eq!((deleted.0, used.0), (0, 2));
}

#[test]
fn certificates_of_a_lab_are_made_once_and_loudly() {
    let folder = TempDir::new().unwrap();
    let (code, out, err) = alone(folder.path(), "certs init");
    assert_eq!(code, 0, "{err}");
    assert!(err.contains("WARNING") && out.contains("lab-certs/ca.crt"), "{out}{err}");
    let (code, out, err) = alone(folder.path(), "certs issue agent/node1 --dns localhost --ip 127.0.0.1");
    assert_eq!(code, 0, "{err}");
    assert!(err.contains("WARNING") && out.contains("spiffe://lab.internal/agent/node1"), "{out}{err}");
    for line in ["certs init", "certs issue agent/node1"] {
        let (code, out, err) = alone(folder.path(), line);
        assert_eq!((code, out.as_str()), (3, ""), "{err}");
        assert!(err.contains("nothing is overwritten"), "{err}");
    }
    let (code, _, err) = alone(folder.path(), "certs issue a --dns a_b*c");
    assert_eq!(code, 2, "{err}");
    let (code, _, err) = alone(folder.path(), "certs issue a --dir nowhere");
    assert_eq!(code, 2);
    assert!(err.contains("vfioctl certs init"), "{err}");
}

#[test]
fn shells_and_manuals_get_what_they_want() {
    let folder = TempDir::new().unwrap();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let (code, out, err) = alone(folder.path(), &format!("completion {shell}"));
        assert_eq!((code, err.as_str()), (0, ""));
        assert!(out.contains("dirty-tracking"), "{shell}");
    }
    let (code, out, _) = alone(folder.path(), "man");
    assert_eq!(code, 0);
    assert!(out.contains(".TH vfioctl 1"), "{out}");
    let (code, out, _) = alone(folder.path(), "man --dir pages");
    assert_eq!((code, out.as_str()), (0, ""));
    for page in ["vfioctl.1", "vfioctl-checkpoints-inspect.1"] {
        assert!(folder.path().join("pages").join(page).exists(), "{page}");
    }
}

#[tokio::test]
async fn the_doctor_looks_at_the_caller_and_the_agent() {
    let setup = Setup::new(&Agent::default()).await;
    let (code, out, err) = setup.run("doctor --only caller --only agent -o json").await;
    assert_eq!(err, "");
    let report: Value = serde_json::from_str(&out).unwrap();
    let level = |check: &str| {
        let all = report["findings"].as_array().unwrap();
        all.iter().find(|finding| finding["check"] == check).unwrap()["level"].as_str().unwrap().to_owned()
    };
    assert_eq!(
        (level("key pair"), level("agent"), level("agent health")),
        ("OK".into(), "OK".into(), "OK".into())
    );
    assert_eq!((level("clock"), code), ("OK".to_owned(), 0), "{out}");
    let (code, out, _) = setup.run("doctor --only agent --endpoint https://localhost:1").await;
    assert_eq!(code, 1);
    assert!(out.contains("FAIL  agent  ") && out.contains("-> see that the agent runs"), "{out}");
}

#[tokio::test]
async fn the_doctor_finds_certificates_that_cannot_work() {
    let setup = Setup::new(&Agent::default()).await;
    let ca = Ca::new("two");
    let (good, expired) = (ca.client(), ca.expired_client());
    let put = |name: &str, text: &str| fs::write(setup.path(name), text).unwrap();
    let looked = async |check: &str| {
        let (code, out, _) = setup.run("doctor --only caller -o json").await;
        let report: Value = serde_json::from_str(&out).unwrap();
        let all = report["findings"].as_array().unwrap().clone();
        let found = all.into_iter().find(|finding| finding["check"] == check).unwrap();
        (code, found["level"].as_str().unwrap().to_owned(), found["detail"].as_str().unwrap().to_owned())
    };
    put("cert", &expired.certificate);
    put("key", &expired.key);
    let (code, level, detail) = looked("certificate").await;
    assert_eq!((code, level.as_str()), (1, "FAIL"));
    assert!(detail.contains("expired at 2020-01-01"), "{detail}");
    put("key", &good.key);
    let (code, level, detail) = looked("key pair").await;
    assert_eq!((code, level.as_str()), (1, "FAIL"), "{detail}");
    assert!(detail.contains("cannot be used together"), "{detail}");
    put("cert", &good.certificate);
    assert_eq!(looked("key pair").await.1, "OK");
    assert_eq!(looked("key file").await.1, "WARN", "others may read what fs::write makes");
    put("key", "nothing");
    let (code, level, detail) = looked("key pair").await;
    assert_eq!((code, level.as_str()), (1, "FAIL"), "{detail}");
}
