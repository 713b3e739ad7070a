use tempfile::TempDir;

use super::*;

fn place(folder: &TempDir) -> Place {
    Place { vfioctl_config: Some(folder.path().join("a/config.toml")), ..Place::default() }
}

fn lab() -> Context {
    Context {
        endpoint: Some("https://node1:7443".to_owned()),
        ca: Some("/lab/ca.crt".into()),
        server_name: Some("node1".to_owned()),
        ..Context::default()
    }
}

fn written(folder: &TempDir, text: &str) -> Place {
    let path = folder.path().join("config.toml");
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    Place { vfioctl_config: Some(path), ..Place::default() }
}

#[test]
fn the_place_is_found_in_this_order() {
    let all = |config: Option<&str>, xdg: Option<&str>, home: Option<&str>| {
        let place = Place {
            vfioctl_config: config.map(Into::into),
            xdg_config_home: xdg.map(Into::into),
            home: home.map(Into::into),
        };
        place.path().ok().map(|path| path.display().to_string())
    };
    assert_eq!(all(Some("x.toml"), Some("/x"), Some("/h")).unwrap(), "x.toml");
    assert_eq!(all(None, Some("/x"), Some("/h")).unwrap(), "/x/vfioctl/config.toml");
    assert_eq!(all(None, Some("x"), Some("/h")).unwrap(), "/h/.config/vfioctl/config.toml");
    assert_eq!(all(None, None, None), None);
}

#[test]
fn a_context_is_set_used_changed_and_deleted() {
    let folder = TempDir::new().unwrap();
    let mut file = ContextsFile::read(place(&folder)).unwrap();
    assert_eq!(file.parsed, Contexts::default());
    file.set("lab", &lab()).unwrap();
    assert_eq!(fs::metadata(file.path()).unwrap().permissions().mode() & 0o777, 0o600);
    let spiffe = Some("spiffe://lab/agent".to_owned());
    file.set("lab", &Context { server_spiffe_id: spiffe.clone(), ..Context::default() }).unwrap();
    file.set("other", &Context { key: Some("me.key".into()), ..Context::default() }).unwrap();

    let mut file = ContextsFile::read(place(&folder)).unwrap();
    assert_eq!(file.parsed.current.as_deref(), Some("lab"), "the first one is in use");
    let changed = Context { server_name: None, server_spiffe_id: spiffe, ..lab() };
    assert_eq!(file.get("lab").unwrap(), changed);
    assert_eq!(file.get("other").unwrap().key.unwrap(), folder.path().join("a/me.key"));
    file.use_context("other").unwrap();
    file.delete("other").unwrap();
    let file = ContextsFile::read(place(&folder)).unwrap();
    assert_eq!((file.parsed.current, file.parsed.contexts.len()), (None, 1));
    insta::assert_snapshot!(file.text, @r#"
    [contexts.lab]
    endpoint = "https://node1:7443"
    ca = "/lab/ca.crt"
    server_spiffe_id = "spiffe://lab/agent"
    "#);
}

#[test]
fn what_people_wrote_stays_and_a_link_stays_a_link() {
    let folder = TempDir::new().unwrap();
    let real =
        written(&folder, "# mine\n[contexts.lab] # the lab\nendpoint = 'https://a:1'\n").path().unwrap();
    let link = folder.path().join("link");
    std::os::unix::fs::symlink(&real, &link).unwrap();
    let place = Place { vfioctl_config: Some(link.clone()), ..Place::default() };
    let mut file = ContextsFile::read(place).unwrap();
    file.use_context("lab").unwrap();
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    let text = fs::read_to_string(real).unwrap();
    assert!(
        text.contains("# mine") && text.contains("# the lab") && text.contains("current = \"lab\""),
        "{text}"
    );
}

#[test]
fn what_is_wrong_is_told_with_its_line() {
    let folder = TempDir::new().unwrap();
    let said = |text: &str| {
        let error = ContextsFile::read(written(&folder, text)).unwrap_err().to_string();
        error.replace(&folder.path().display().to_string(), "")
    };
    insta::assert_snapshot!(said("[contexts.lab]\nendpont = 'https://a:1'\n"));
    insta::assert_snapshot!(said("current = 'lab'\n"));
    insta::assert_snapshot!(said("current =\n"));
    insta::assert_snapshot!(said("[contexts.lab]\nserver_name = 'a'\nserver_spiffe_id = 'spiffe://a/b'\n"));
    let mut file = ContextsFile::read(written(&folder, "[contexts.lab]\n")).unwrap();
    let error = file.use_context("lba").unwrap_err().to_string();
    assert!(error.contains("\"lba\"") && error.contains("there are: lab"), "{error}");
    for name in ["", "a b", "ä", &"a".repeat(64)] {
        assert!(matches!(file.set(name, &lab()), Err(ContextsError::Name { .. })), "{name}");
    }
}

#[test]
fn a_file_that_others_may_write_is_not_believed() {
    let folder = TempDir::new().unwrap();
    let path = written(&folder, "").path().unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o620)).unwrap();
    let place = Place { vfioctl_config: Some(path), ..Place::default() };
    assert!(matches!(ContextsFile::read(place), Err(ContextsError::Open { .. })));
}
