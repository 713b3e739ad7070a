use super::*;

const MINIMAL: &str = r#"
[tls]
certificate = "a.pem"
key = "k.pem"
client_ca = "ca.pem"
"#;

fn load(text: &str) -> Result<AgentConfig, ConfigError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("agent.toml");
    std::fs::write(&path, text).unwrap();
    AgentConfig::load(Some(&path), serde_json::json!({}))
}

#[test]
fn a_minimal_file_takes_the_defaults() {
    let config = load(MINIMAL).unwrap();
    assert_eq!(config.server.listen.port(), 7443);
    assert_eq!(config.defaults.downtime_limit, Duration::from_millis(300));
    assert!(config.grants.is_empty(), "nobody may do anything by default");
}

#[test]
fn a_key_that_nobody_knows_is_refused_by_name() {
    for (text, name) in [
        ("[server]\nlistn = \"127.0.0.1:1\"\n", "listn"),
        ("[[devices]]\nname = \"a\"\naddress = \"sim\"\nadress = \"x\"\n", "adress"),
        ("[sever]\n", "sever"),
    ] {
        let error = load(&format!("{text}{MINIMAL}")).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
    }
}

#[test]
fn every_mistake_is_told_at_once() {
    let text = r#"
[server]
max_connections = 0
handshake_timeout = "0s"
[limits]
max_chunk_bytes = 1
[[devices]]
name = "NIC"
address = "sim"
[[devices]]
name = "b"
address = "nowhere"
"#;
    let error = load(text).unwrap_err();
    let ConfigError::Mistakes(mistakes) = &error else { panic!("{error}") };
    let keys: Vec<&str> = mistakes.iter().map(|mistake| mistake.key.as_str()).collect();
    assert_eq!(
        keys,
        [
            "server.max_connections",
            "server.handshake_timeout",
            "tls.certificate",
            "tls.key",
            "tls.client_ca",
            "devices[0].name",
            "devices[1].address",
            "limits.max_chunk_bytes",
        ],
        "{error}"
    );
}

#[test]
fn the_way_to_a_kernel_device_can_be_chosen() {
    let device = |rest: &str| load(&format!("{MINIMAL}[[devices]]\nname = \"a\"\n{rest}\n"));
    let address = "address = \"00000000-0000-4000-8000-000000000101\"";
    let path = |rest: &str| device(&format!("{address}\n{rest}")).unwrap().devices[0].path;
    assert_eq!(path(""), None);
    assert_eq!(path("path = \"container\""), Some(KernelPath::Container));
    assert_eq!(path("path = \"iommufd\""), Some(KernelPath::Iommufd));
    let error = device(&format!("{address}\npath = \"cdev\"")).unwrap_err().to_string();
    assert!(error.contains("cdev") && error.contains("container") && error.contains("iommufd"), "{error}");
    for address in ["sim", "vfio-user:/run/device.sock"] {
        let error = device(&format!("address = \"{address}\"\npath = \"iommufd\"")).unwrap_err();
        let ConfigError::Mistakes(mistakes) = &error else { panic!("{error}") };
        assert_eq!(mistakes[0].key, "devices[0].path", "{error}");
    }
}

#[test]
fn a_duration_that_is_none_names_its_key() {
    let error = load("[server]\nhandshake_timeout = \"soon\"\n").unwrap_err().to_string();
    assert!(error.contains("soon") && error.contains("handshake_timeout"), "{error}");
}

#[test]
fn flags_are_stronger_than_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("agent.toml");
    std::fs::write(&path, MINIMAL).unwrap();
    let flags = serde_json::json!({ "server": { "listen": "127.0.0.1:9" } });
    assert_eq!(AgentConfig::load(Some(&path), flags).unwrap().server.listen.port(), 9);
}

#[test]
fn a_missing_file_is_named() {
    let error =
        AgentConfig::load(Some(Path::new("/nonexistent/agent.toml")), serde_json::json!({})).unwrap_err();
    assert!(error.to_string().contains("/nonexistent/agent.toml"), "{error}");
}

#[test]
fn what_is_malformed_is_told_with_its_file_and_its_key_as_written() {
    for (text, key) in [
        ("[server]\nlistn = \"127.0.0.1:1\"\n", "server"),
        ("[server]\nmax_connections = \"many\"\n", "server.max_connections"),
        ("[server\n", "agent.toml"),
    ] {
        let error = load(&format!("{text}{MINIMAL}")).unwrap_err().to_string();
        assert!(error.contains("agent.toml: ") && error.contains(key), "{error}");
        assert!(!error.contains("default.") && !error.contains("TOML source string"), "{error}");
    }
    let flags = serde_json::json!({ "server": { "listen": 7 } });
    let error = AgentConfig::load(None, flags).unwrap_err().to_string();
    assert!(error.starts_with("the flags: server.listen: "), "{error}");
}

#[test]
fn the_sections_that_take_a_restart_are_told() {
    let config = load(MINIMAL).unwrap();
    assert_eq!(config.differs_in(&config), [] as [&str; 0]);
    let text = "[server]\nseal_timeout = \"1m\"\n[telemetry]\nlog = \"debug\"\n\
                [[grants]]\nwho = \"spiffe://a/*\"\nroles = [\"admin\"]\n";
    let other = load(&format!("{text}{MINIMAL}")).unwrap();
    assert_eq!(config.differs_in(&other), ["server", "telemetry"]);
    assert!(load(&format!("[server]\nseal_timeout = \"0s\"\n{MINIMAL}")).is_err());
}

#[test]
fn how_long_a_giver_is_waited_for_is_bounded() {
    assert_eq!(load(MINIMAL).unwrap().server.stream_resume_window, Duration::from_secs(30));
    for (window, is_valid) in [("0s", false), ("1ms", true), ("1h", true), ("3601s", false)] {
        let loaded = load(&format!("[server]\nstream_resume_window = \"{window}\"\n{MINIMAL}"));
        match loaded {
            Ok(_) => assert!(is_valid, "{window}"),
            Err(error) => {
                assert!(!is_valid && error.to_string().contains("server.stream_resume_window"), "{error}");
            }
        }
    }
}

/// Only a build for tests pretends: elsewhere the key is as unknown as any.
#[test]
fn the_versions_of_the_stream_are_those_of_the_build_unless_it_is_one_for_tests() {
    assert_eq!(load(MINIMAL).unwrap().server.stream_versions(), VersionRange::OURS);
    let pretending = load(&format!("[server]\nstream_versions = [2, 3]\n{MINIMAL}"));
    if cfg!(feature = "test-versions") {
        assert_eq!(pretending.unwrap().server.stream_versions(), VersionRange::new(2, 3).unwrap());
        assert!(load(&format!("[server]\nstream_versions = [3, 2]\n{MINIMAL}")).is_err());
    } else {
        assert!(pretending.unwrap_err().to_string().contains("stream_versions"));
    }
}
