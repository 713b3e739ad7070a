//! Where settings come from, and who is let in: contexts, certificates, doctor.

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use serde_json::{Value, json};
use vfio_checkpoint_server::security::lab::LabCa;

use crate::lab::validity;
use crate::node::{DEVICES, Node, issue, valid_from};

/// The options by which a caller is who its files say.
fn files(folder: &str) -> String {
    format!("--cert {folder}/tls.crt --key {folder}/tls.key --ca {folder}/ca.crt")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_context_takes_the_place_of_options_and_variables() {
    let node = Node::new(&DEVICES).await;
    let error = node.run_bare("devices list -o json").exits(2).without_result().error();
    assert!(error["hint"].as_str().unwrap().contains("vfioctl context set"), "{error}");
    let endpoint = node.endpoint();
    let set = format!("context set lab --endpoint {endpoint} {}", files("admin"));
    node.run_bare(&set).exits(0).without_result().says("lab is in ");
    let file = node.path(".config/vfioctl/config.toml");
    assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    node.run_bare("devices list").quietly().prints("devices/nic0");
    let set = format!("context set look --endpoint {endpoint} {}", files("viewer"));
    node.run_bare(&set).exits(0);
    let all = node.run_bare("context list -o json").quietly().json();
    assert_eq!((&all[0]["name"], &all[0]["is_current"]), (&json!("lab"), &json!(true)));
    assert_eq!((&all[1]["name"], &all[1]["is_current"]), (&json!("look"), &json!(false)));
    let line = "devices reset nic0 --discard-state --yes";
    node.run_bare(&format!("{line} --context look")).exits(5).without_result().says("ROLE_REQUIRED");
    node.run_bare("context use look").exits(0);
    node.run_bare(line).exits(5);
    node.run_bare("context delete look").exits(0);
    node.run_bare("devices list").exits(2).without_result();
    node.run_bare("devices list --context gone").exits(2).without_result().says("there are: lab");
    // A file that others may write is not believed.
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o666)).unwrap();
    node.run_bare("devices list --context lab").exits(2).without_result().says("chmod 600");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_wrong_certificate_is_told_by_calls_and_by_the_doctor() {
    let node = Node::new(&DEVICES).await;
    let (ca, path) = (&node.lab.ca, |name: &str| node.path(name));
    let other = LabCa::new(&"lab.test".parse().unwrap(), validity()).unwrap();
    let day = Duration::from_hours(24);
    issue(&other, ca, "admin", &path("stranger"), validity());
    issue(ca, &other, "admin", &path("deceived"), validity());
    issue(ca, ca, "admin", &path("expired"), valid_from(|now| now.checked_sub(day).unwrap()));
    issue(ca, ca, "admin", &path("early"), valid_from(|now| now + day));
    for (caller, told, by_doctor) in [
        ("stranger", "the client certificate", "FAIL  agent"),
        ("deceived", "the agent's certificate is", "FAIL  agent"),
        ("expired", "has expired or is not valid yet", "FAIL  certificate"),
        ("early", "has expired or is not valid yet", "FAIL  certificate"),
    ] {
        let settings = format!("--endpoint {} {}", node.endpoint(), files(caller));
        let error = node.run_bare(&format!("devices list -o json {settings}")).exits(5).error();
        assert!(error["message"].as_str().unwrap().contains(told), "{caller}: {error}");
        assert!(error["hint"].is_string(), "{caller}: {error}");
        let reason = if caller == "deceived" { "TLS_FAILED" } else { "CERTIFICATE_REFUSED" };
        assert_eq!(error["reason"], reason, "{caller}");
        let doctor = node.run_bare(&format!("doctor --only caller --only agent {settings}")).exits(1);
        assert!(doctor.out.contains(by_doctor) && doctor.err.is_empty(), "{caller}: {doctor:#?}");
    }
    let settings = format!("--endpoint {} {}", node.endpoint(), files("admin"));
    let well =
        node.run_bare(&format!("doctor --only caller --only agent -o json {settings}")).quietly().json();
    assert_eq!(well["is_well"], true, "{well}");
    // What is wrong is told once, and not again as the reason why the agent was not called.
    let mixed =
        "doctor --only caller --only agent --cert admin/tls.crt --key viewer/tls.key --ca admin/ca.crt";
    let mixed = node.run_bare(&format!("{mixed} --endpoint {}", node.endpoint())).exits(1);
    assert_eq!(mixed.out.matches("FAIL").count(), 1, "{mixed:#?}");
    mixed.prints("WARN  agent").prints("-> give the key that the certificate was made for");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_doctor_without_agent_devices_or_settings_says_what_to_do() {
    let node = Node::new(&[]).await;
    std::fs::create_dir(node.path("root")).unwrap();
    let bare = node.run_bare("doctor --root root -o json").exits(1);
    let findings = bare.json()["findings"].as_array().unwrap().clone();
    let about = |check: &str| findings.iter().find(|one| one["check"] == check).unwrap().clone();
    for (check, level) in [("vfio", "FAIL"), ("devices", "WARN"), ("agent", "WARN"), ("certificate", "WARN")]
    {
        let found = about(check);
        assert_eq!(found["level"], level, "{found}");
        assert!(found["mend"].is_string(), "{found}");
    }
    let advice = bare.told().swap_remove(0)["note"].as_str().unwrap().to_owned();
    assert!(advice.contains("--only caller --only agent"), "{advice}");
    let gone = format!("doctor --only agent --endpoint https://127.0.0.1:1 {}", files("admin"));
    node.run_bare(&gone).exits(1).prints("FAIL  agent").prints("-> see that the agent runs");

    // Somebody listens and never answers.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = format!("--endpoint https://{} --timeout 200ms", silent.local_addr().unwrap());
    let error = node.run_bare(&format!("devices list -o json {at} {}", files("admin"))).exits(5).error();
    assert_eq!((&error["reason"], &error["code"]), (&json!("CONNECT_TIMEOUT"), &Value::Null));
    node.run_bare(&format!("doctor --only agent {at} {}", files("admin"))).exits(1).prints("within 200 ms");
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_of_a_lab_let_an_agent_and_its_callers_know_each_other() {
    let mut node = Node::new(&DEVICES).await;
    let made = node.run_bare("certs init --dir ca --trust-domain lab.test -o json").exits(0);
    assert_eq!(made.json()["spiffe_id"], "spiffe://lab.test");
    assert!(made.told()[0]["note"].as_str().unwrap().starts_with("WARNING"), "{made:?}");
    let error = node.run_bare("certs init --dir ca -o json").exits(3).without_result().error();
    assert_eq!(error["reason"], "REFUSED");
    node.run_bare("certs issue agent/new --dir ca --dns localhost").exits(0);
    let issued = node.run_bare("certs issue admin/me --dir ca -o json").exits(0).json();
    assert_eq!(
        (&issued["spiffe_id"], issued["files"].as_array().unwrap().len()),
        (&json!("spiffe://lab.test/admin/me"), 3)
    );
    assert_eq!(node.path("ca/admin/me/tls.key").metadata().unwrap().permissions().mode() & 0o777, 0o600);
    // The agent is one of that lab from now on.
    node.kill();
    node.change(node.path("agent").to_str().unwrap(), node.path("ca/agent/new").to_str().unwrap());
    node.change("ca/agent/new/state", "agent/state");
    node.start().await;
    let line = format!("devices list --endpoint {} {}", node.endpoint(), files("ca/admin/me"));
    node.run_bare(&line).quietly().prints("devices/nic0");
    node.run("devices list").exits(5).without_result();
}
