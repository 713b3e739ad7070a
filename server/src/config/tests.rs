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
            "tls.certificate",
            "tls.key",
            "tls.client_ca",
            "devices[0].name",
            "devices[1].address",
            "server.max_connections",
            "server.handshake_timeout",
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
fn the_environment_is_stronger_than_the_file_and_weaker_than_flags() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("agent.toml");
    std::fs::write(&path, format!("[server]\nmax_connections = 7\nlisten = \"127.0.0.1:7\"\n{MINIMAL}"))
        .unwrap();
    let load = |variables: &[(&str, &str)]| {
        let variables =
            variables.iter().map(|(name, says)| (format!("VFIO_CHECKPOINTD_{name}"), (*says).to_owned()));
        let flags = serde_json::json!({ "server": { "listen": "127.0.0.1:9" } });
        AgentConfig::load_with(Some(&path), Variables(variables.collect()), flags)
    };
    let config = load(&[
        ("SERVER__MAX_CONNECTIONS", "8"),
        ("SERVER__LISTEN", "127.0.0.1:8"),
        ("SERVER__SEAL_TIMEOUT", "8s"),
        ("SERVER__WORKER_THREADS", "8"),
        // Texts, whatever they look like.
        ("NODE__NAME", "007"),
        ("TELEMETRY__LOG", "true"),
        ("CONFIG", "/elsewhere.toml"),
    ]);
    let config = config.unwrap();
    assert_eq!((config.server.max_connections, config.server.listen.port()), (8, 9));
    assert_eq!((config.server.seal_timeout, config.server.worker_threads), (Duration::from_secs(8), Some(8)));
    assert_eq!((config.node.name.as_str(), config.telemetry.log.as_str()), ("007", "true"));
    for (name, says, named) in [
        ("SERVER__LISTN", "127.0.0.1:8", "listn"),
        ("SERVER__MAX_CONNECTIONS", "many", "server.max_connections"),
        ("SERVER__SEAL_TIMEOUT", "8", "server.seal_timeout"),
        ("SERVER____LISTEN", "x", "SERVER____LISTEN"),
        ("TLS", "x", "tls"),
    ] {
        let error = load(&[(name, says)]).unwrap_err().to_string();
        assert!(error.contains("environment") && error.contains(named), "{name}: {error}");
    }
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
        let error = load(&format!("{text}{MINIMAL}")).unwrap_err();
        // As the program says it.
        let error = vfio_checkpoint_device::chain(&error);
        assert_eq!(error.matches("agent.toml: ").count(), 1, "{error}");
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

/// Every number and every time of a configuration, with where it is.
fn amounts(config: &AgentConfig) -> Vec<String> {
    fn walk(value: &serde_json::Value, at: &str, found: &mut Vec<String>) {
        let below = |name: &str| if at.is_empty() { name.to_owned() } else { format!("{at}.{name}") };
        match value {
            serde_json::Value::Object(fields) => {
                fields.iter().for_each(|(name, value)| walk(value, &below(name), found));
            }
            serde_json::Value::Number(_) => found.push(at.to_owned()),
            serde_json::Value::String(text) if humantime::parse_duration(text).is_ok() => {
                found.push(at.to_owned());
            }
            serde_json::Value::Null
            | serde_json::Value::Bool(_)
            | serde_json::Value::String(_)
            | serde_json::Value::Array(_) => {}
        }
    }
    let mut found = Vec::new();
    walk(&serde_json::to_value(config).unwrap(), "", &mut found);
    found
}

#[test]
fn every_number_and_every_time_is_bounded_and_its_documentation_says_how() {
    let mut config = AgentConfig::default();
    // What is not set by default.
    config.server.worker_threads = Some(1);
    config.tls.reload_interval = Some(Duration::from_secs(1));
    let bounds = bounds::bounds(&config);
    for key in amounts(&config) {
        assert!(bounds.iter().any(|bound| bound.key == key), "{key} has no bounds");
    }
    let source = include_str!("mod.rs");
    for bound in &bounds {
        assert!(bound.problem().is_none(), "{}: the default is out of its range", bound.key);
        let field = bound.key.rsplit('.').next().unwrap();
        let at = source.find(&format!("    pub {field}: ")).unwrap();
        let docs: Vec<&str> = source[..at]
            .lines()
            .rev()
            .take_while(|line| line.trim_start().starts_with("///") || line.trim_start().starts_with("#["))
            .collect();
        let docs = docs
            .into_iter()
            .rev()
            .map(|line| line.trim_start_matches([' ', '/']))
            .collect::<Vec<_>>()
            .join(" ")
            .replace('`', "");
        assert!(docs.contains(&bound.range()), "{}: {:?} does not say {}", bound.key, docs, bound.range());
    }
}

#[test]
fn a_value_is_good_up_to_its_bounds_and_not_beyond() {
    let value = |amount: bounds::Amount| match amount {
        bounds::Amount::Number(number) => number.to_string(),
        bounds::Amount::Time(time) => format!("\"{}ns\"", time.as_nanos()),
    };
    let beyond = |amount: bounds::Amount, up: bool| match amount {
        bounds::Amount::Number(number) => {
            if up { number.checked_add(1) } else { number.checked_sub(1) }.map(bounds::Amount::Number)
        }
        bounds::Amount::Time(time) => {
            let tick = Duration::from_nanos(1);
            if up { time.checked_add(tick) } else { time.checked_sub(tick) }.map(bounds::Amount::Time)
        }
    };
    for bound in bounds::bounds(&AgentConfig::default()) {
        let (section, field) = bound.key.split_once('.').unwrap();
        let load = |amount| {
            load(
                &format!("[{section}]\n{field} = {}\n{MINIMAL}", value(amount))
                    .replace("[tls]\n[tls]", "[tls]"),
            )
        };
        let load = |amount| {
            if section == "tls" {
                self::load(&format!("{MINIMAL}{field} = {}\n", value(amount)))
            } else {
                load(amount)
            }
        };
        for good in [bound.least, bound.most] {
            // What bounds others may not be what they are by default.
            let told = load(good).err().map(|error| error.to_string()).unwrap_or_default();
            assert!(!told.contains(&format!("{}: ", bound.key)), "{told}");
        }
        for bad in [beyond(bound.least, false), beyond(bound.most, true)].into_iter().flatten() {
            let told = load(bad).unwrap_err().to_string();
            let expected = format!("{}: is {bad} and must be {}", bound.key, bound.range());
            assert!(told.contains(&expected), "{told}, and not {expected}");
        }
    }
}

#[test]
fn what_cannot_work_is_told_before_anything_is_touched() {
    let store = "[[stores]]\nname = \"a\"\nlocation = ";
    for (text, key) in [
        ("[[grants]]\nwho = \"spiffe://a/*\"\nroles = []\n".to_owned(), "grants[0].roles"),
        ("[holder]\nsocket = \"\"\n".to_owned(), "holder.socket"),
        (
            "[server]\nlisten = \"127.0.0.1:9\"\nhealth_listen = \"0.0.0.0:9\"\n".to_owned(),
            "server.health_listen",
        ),
        (
            "[server]\nlisten = \"127.0.0.1:9\"\nhealth_listen = \"127.0.0.1:9\"\n".to_owned(),
            "server.health_listen",
        ),
        (format!("{store}\"s3://bucket/p\"\nendpoint = \"nonsense\"\n"), "stores[0].endpoint"),
        (format!("{store}\"/x/y\"\n{}\"/x//y\"\n", store.replace("\"a\"", "\"b\"")), "stores[1].location"),
        (
            "[[devices]]\nname = \"a\"\naddress = \"vfio-user:/x\"\n\
             [[devices]]\nname = \"b\"\naddress = \"vfio-user://x\"\n"
                .to_owned(),
            "devices[1].address",
        ),
    ] {
        let error = load(&format!("{text}{MINIMAL}")).unwrap_err();
        let ConfigError::Mistakes(mistakes) = &error else { panic!("{error}") };
        assert_eq!(mistakes.len(), 1, "{error}");
        assert_eq!(mistakes[0].key, key, "{error}");
    }
    let other = "[server]\nlisten = \"127.0.0.1:9\"\nhealth_listen = \"127.0.0.2:9\"\n";
    assert!(load(&format!("{other}{MINIMAL}")).is_ok());
}

/// What people copy has to work.
#[test]
fn the_configuration_of_the_readme_is_one() {
    let readme = include_str!("../../../README.md");
    let begin = readme.find("[node]\n").unwrap();
    let text = &readme[begin..begin + readme[begin..].find("\n$ ").unwrap()];
    let config = load(text).unwrap();
    assert_eq!((config.devices.len(), config.stores.len(), config.grants.len()), (1, 1, 2));
}
