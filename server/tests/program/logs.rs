//! Logs for programs: what the agent says on standard error with `telemetry.format = "json"`, from its start to its end.

use std::io::{BufRead as _, BufReader};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, SystemTime};

use rustls_pki_types::UnixTime;
use serde_json::Value;
use vfio_checkpoint_client::call::Client;
use vfio_checkpoint_client::connect::ConnectOptions;
use vfio_checkpoint_client::tls::{Credentials, ServerCheck, client_config};
use vfio_checkpoint_client::transfer::TakeState;
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_server::security::identity::Identity;
use vfio_checkpoint_server::security::lab::{LabCa, Validity};

const PATIENCE: Duration = Duration::from_secs(30);
const SAVER: &str = "spiffe://logs.test/saver/test";
const REQUEST_ID: &str = "7b0e9f6c-0f0d-4f5e-9a55-0d8b6d1c2a11";

/// Killed with the test that fails.
struct Agent(Child);

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn validity() -> Validity {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    Validity::starting(UnixTime::since_unix_epoch(now), Duration::from_hours(1))
}

async fn client(ca: &LabCa, address: SocketAddr) -> Client {
    let issued = ca.issue(&Identity::Spiffe(SAVER.parse().unwrap()), &[], &[], validity()).unwrap();
    let (certificate, authority) = (issued.certificate_pem.as_bytes(), ca.pem());
    let key = issued.key_pem();
    let credentials = Credentials::from_pem(certificate, key.as_bytes(), authority.as_bytes()).unwrap();
    let check = ServerCheck::Name(None);
    let tls = client_config(credentials, &check).unwrap();
    Client::connect(&ConnectOptions::new(format!("https://{address}"), tls, check)).await.unwrap()
}

/// A save, start to end, and two calls that are refused.
async fn work(client: &Client) -> String {
    let save = v1::StartSaveRequest {
        devices: vec!["devices/nic0".to_owned()],
        memory_capture: v1::MemoryCapture::None.into(),
        request_id: REQUEST_ID.to_owned(),
        ..Default::default()
    };
    let name = client.start_save(save.clone()).await.unwrap().operation.unwrap().name;
    let TakeState { mut taker, .. } = TakeState::open(client, &name.parse().unwrap()).await.unwrap();
    while taker.next().await.unwrap().is_some() {}
    taker.complete().await.unwrap();
    let ended = client.wait_operation(&name, PATIENCE).await.unwrap().operation.unwrap();
    assert_eq!(ended.result(), v1::OperationResult::Succeeded, "{ended:?}");
    // A caller's text is no way to a line of its own.
    let forged = v1::StartSaveRequest {
        devices: vec!["x\n{\"level\":\"INFO\"}\n\"".to_owned()],
        request_id: "x\n".to_owned(),
        ..save
    };
    client.start_save(forged).await.unwrap_err();
    client.reset_device(v1::ResetDeviceRequest::default()).await.unwrap_err();
    name
}

fn document(line: &str) -> Value {
    serde_json::from_str(line).unwrap_or_else(|error| panic!("no document: {error}: {line}"))
}

fn text<'a>(line: &'a Value, path: &str) -> &'a str {
    line.pointer(path).and_then(Value::as_str).unwrap_or_default()
}

#[test]
fn each_line_of_a_log_for_programs_is_one_document_with_its_fields() {
    let folder = tempfile::tempdir().unwrap();
    let ca = LabCa::new(&"logs.test".parse().unwrap(), validity()).unwrap();
    let identity = Identity::Spiffe("spiffe://logs.test/agent".parse().unwrap());
    let local = [IpAddr::V4(Ipv4Addr::LOCALHOST)];
    let files = ca.issue(&identity, &["localhost"], &local, validity()).unwrap();
    let files = files.write(folder.path(), &ca.pem()).unwrap();
    let config = folder.path().join("agent.toml");
    let lines = format!(
        "node.name = \"node-a\"\nnode.state_dir = {:?}\nserver.listen = \"127.0.0.1:0\"\n\
         server.health_listen = \"127.0.0.1:0\"\ntelemetry.format = \"json\"\n\
         tls.certificate = {:?}\ntls.key = {:?}\ntls.client_ca = {:?}\n\
         [[grants]]\nwho = \"{SAVER}\"\nroles = [\"saver\"]\n\
         [[devices]]\nname = \"nic0\"\naddress = \"sim:seed=1,memory=1MiB\"\n",
        folder.path().join("state"),
        files.certificate,
        files.key,
        files.client_ca,
    );
    std::fs::write(&config, lines).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_vfio-checkpointd"));
    command.arg("serve").arg("--config").arg(&config).stderr(Stdio::piped());
    let mut agent = Agent(command.spawn().unwrap());
    let mut said = BufReader::new(agent.0.stderr.take().unwrap()).lines().map(Result::unwrap);
    let mut log = Vec::new();
    let address: SocketAddr = loop {
        let line = document(&said.next().expect("it ended before it served"));
        let serving = text(&line, "/fields/message") == "serving";
        log.push(line);
        if serving {
            break text(&log[log.len() - 1], "/fields/address").parse().unwrap();
        }
    };
    // As a probe asks, which has no certificate.
    let health = text(&log[log.len() - 1], "/fields/health_address");
    let probe = super::run(&["healthcheck", "--address", health]);
    assert_eq!(probe.status.code(), Some(0), "{health}: {}", super::said(&probe));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let name = runtime.block_on(async {
        let client = client(&ca, address).await;
        tokio::time::timeout(PATIENCE, work(&client)).await.unwrap()
    });
    drop(runtime);
    let pid = rustix::process::Pid::from_child(&agent.0);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    log.extend(said.map(|line| document(&line)));
    assert_eq!(agent.0.wait().unwrap().code(), Some(0), "{log:#?}");

    for line in &log {
        for field in ["/timestamp", "/level", "/target", "/fields/message"] {
            assert!(!text(line, field).is_empty(), "{field} is missing: {line}");
        }
        assert!(humantime::parse_rfc3339(text(line, "/timestamp")).is_ok(), "{line}");
        assert!(["ERROR", "WARN", "INFO"].contains(&text(line, "/level")), "{line}");
    }
    let with = |message: &str| -> Vec<&Value> {
        log.iter().filter(|line| text(line, "/fields/message") == message).collect()
    };
    // An operation's lines say whose they are, on which node.
    let ended = with("operation ended");
    let [ended] = ended.as_slice() else { panic!("{log:#?}") };
    assert_eq!(text(ended, "/span/name"), "operation");
    assert_eq!((text(ended, "/span/node"), text(ended, "/span/operation")), ("node-a", name.as_str()));
    assert_eq!((text(ended, "/span/caller"), text(ended, "/span/devices")), (SAVER, "devices/nic0"));
    assert_eq!(text(ended, "/fields/result"), "Succeeded");
    assert!(ended.pointer("/fields/downtime_ms").is_some_and(Value::is_number), "{ended}");
    // What a decision of authority is asked for.
    let audit = with("audit");
    assert!(audit.iter().all(|line| text(line, "/target") == "audit" && text(line, "/fields/who") == SAVER));
    for line in &audit {
        for field in ["who", "key", "roles", "what", "result"] {
            assert!(!text(line, &format!("/fields/{field}")).is_empty(), "{field} is missing: {line}");
        }
        assert!(line.pointer("/fields/time_unix_ms").is_some_and(Value::is_number), "{line}");
        // There is one connection, and each line is about a call on it.
        let from: SocketAddr = text(line, "/fields/address").parse().unwrap();
        assert!(from.ip().is_loopback() && from != address, "{line}");
        assert_eq!(text(line, "/fields/address"), text(audit[0], "/fields/address"));
        // What a line cannot say it says nothing of.
        let fields = line["fields"].as_object().unwrap();
        assert!(fields.values().all(|value| value.as_str() != Some("")), "{line}");
    }
    let of = |what: &str, result: &str| -> Vec<&&Value> {
        let is =
            |line: &&&Value| (text(line, "/fields/what"), text(line, "/fields/result")) == (what, result);
        audit.iter().filter(is).collect()
    };
    let saved = of("StartSave", "succeeded");
    let [saved] = saved.as_slice() else { panic!("{audit:#?}") };
    assert_eq!(
        (text(saved, "/fields/request_id"), text(saved, "/fields/resource")),
        (REQUEST_ID, "devices/nic0")
    );
    assert_eq!(saved["fields"].get("reason"), None, "{saved}");
    let streamed = of("StreamState", "succeeded");
    assert_eq!(text(streamed[0], "/fields/resource"), name);
    assert_eq!(streamed[0]["fields"].get("request_id"), None, "it has none");
    let failed = of("StartSave", "failed");
    assert_eq!(text(failed[0], "/fields/reason"), "INVALID_FIELD", "{audit:#?}");
    assert!(text(failed[0], "/fields/resource").starts_with("x\\n"), "{audit:#?}");
    assert_eq!(text(failed[0], "/fields/request_id"), "x\\n", "{audit:#?}");
    let denied = of("/vfio.checkpoint.v1.DeviceService/ResetDevice", "denied");
    assert_eq!(text(denied[0], "/fields/reason"), "ROLE_REQUIRED", "{audit:#?}");
    assert_eq!(with("ending").len(), 1, "the last lines are there, too");
}
