//! Peers that do not keep to the protocol. None of them makes the holder let go of anything.

use std::env;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use vfio_checkpoint_server::holder::{ClientError, HolderClient};

use crate::processes::{Ends, PATIENCE, Place, Process, Raw, key, label};

/// Says to the test binary that it connects to a socket, and to which.
const STRANGER: &str = "HOLDER_TEST_STRANGER";

/// A holder that holds one device, and the proof that it still does.
struct Holding {
    place: Place,
    _holder: Process,
    end: Ends,
}

impl Holding {
    fn new() -> Self {
        let place = Place::new();
        let holder = place.holder(&[]);
        let end = Ends::new(1);
        place.client().put(&label("kept"), &end.borrowed()).unwrap();
        Self { place, _holder: holder, end: end.held_elsewhere() }
    }

    fn still_holds(self) {
        let mut client = self.place.client();
        assert_eq!(client.list().unwrap(), [label("kept")]);
        let end = self.end.held_elsewhere();
        assert!(client.remove(&key("kept")).unwrap());
        end.closed_everywhere();
    }
}

fn is_refused_as_malformed(raw: &Raw) {
    let said = raw.receive().unwrap();
    assert!(said.starts_with(r#"{"refused":{"malformed""#), "{said}");
    assert_eq!(raw.receive(), None);
}

#[test]
fn garbage_ends_the_connection_and_nothing_else() {
    let holding = Holding::new();
    let put = serde_json::json!({ "put": { "label": label("x") } }).to_string();
    let garbage: [Vec<u8>; 8] = [
        b"garbage".to_vec(),
        vec![0; 60_000],
        vec![0xff; 64 * 1024],
        b"[".repeat(60_000),
        put.as_bytes()[..put.len() - 1].to_vec(),
        put.replace("\"x\"", "\"\"").into_bytes(),
        put.replace("0000:03:00.1", "../../etc/passwd").into_bytes(),
        br#"{"hello":{"version":1,"pid":7}}"#.to_vec(),
    ];
    for packet in &garbage {
        let raw = Raw::agent(&holding.place.socket());
        let end = Ends::new(1);
        raw.send(packet, &end.borrowed());
        is_refused_as_malformed(&raw);
        end.closed_everywhere();
    }
    // Before it said who it is.
    for packet in &garbage[..7] {
        let raw = Raw::connect(&holding.place.socket());
        raw.send(packet, &[]);
        is_refused_as_malformed(&raw);
    }
    // Whoever did not say who it is cannot ask.
    let raw = Raw::connect(&holding.place.socket());
    raw.send(br#"{"drop":{"key":"kept"}}"#, &[]);
    is_refused_as_malformed(&raw);
    // A packet of nothing looks like the end.
    let raw = Raw::agent(&holding.place.socket());
    raw.send(b"", &[]);
    assert_eq!(raw.receive(), None);
    holding.still_holds();
}

#[test]
fn what_is_too_much_is_refused() {
    let holding = Holding::new();
    let put = serde_json::json!({ "put": { "label": label("x") } }).to_string();
    let long = put.replace("{}", &"x".repeat(16_385));
    let longest = format!("{put}{}", " ".repeat(64 * 1024));
    for (packet, fds) in [(&put, 0), (&put, 17), (&put, 60), (&long, 1), (&longest, 1)] {
        let raw = Raw::agent(&holding.place.socket());
        let end = Ends::new(fds);
        raw.send(packet.as_bytes(), &end.borrowed());
        is_refused_as_malformed(&raw);
        end.closed_everywhere();
    }
    // Descriptors where none belong.
    let raw = Raw::agent(&holding.place.socket());
    let end = Ends::new(2);
    raw.send(br#"{"take":{"key":"kept"}}"#, &end.borrowed());
    is_refused_as_malformed(&raw);
    end.closed_everywhere();
    holding.still_holds();
}

/// Nobody waits for those who say nothing, and they are hung up on in the end.
#[test]
fn silence_keeps_nobody_out() {
    let holding = Holding::new();
    let silent: Vec<Raw> = (0..20).map(|_| Raw::connect(&holding.place.socket())).collect();
    assert_eq!(holding.place.client().list().unwrap().len(), 1);
    for raw in &silent {
        assert_eq!(raw.receive(), None);
    }
    holding.still_holds();
}

/// An agent that asks and asks and does not read its answers.
#[test]
fn a_flood_without_reading_is_cut_off() {
    let holding = Holding::new();
    let raw = Raw::agent(&holding.place.socket());
    let mut asked = 0;
    while raw.try_send(br#"{"list":{"after":null}}"#, &[]) {
        asked += 1;
        assert!(asked < 1_000_000, "it is never cut off");
    }
    holding.still_holds();
}

/// Connects and tells whether it was let in. Run by the next test as other users; by itself it has nothing to do.
#[test]
fn somebody_who_connects() {
    let Ok(socket) = env::var(STRANGER) else { return };
    let raw = Raw::connect(Path::new(&socket));
    let answered = raw.try_send(br#"{"hello":{"version":1,"pid":7}}"#, &[]) && raw.receive().is_some();
    println!("{}", if answered { "<answered>" } else { "<refused>" });
}

/// Folder and socket are opened to everybody here, as a careless person might: the kernel's word on who connects counts.
#[test]
fn another_user_is_refused() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not observed: only root can be somebody else");
        return;
    }
    let holding = Holding::new();
    let socket = holding.place.socket();
    for (path, mode) in
        [(holding.place.folder.path(), 0o755), (socket.parent().unwrap(), 0o755), (socket.as_path(), 0o666)]
    {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
    // A copy that others may run, wherever this one is.
    let program = holding.place.path("stranger");
    fs::copy(env::current_exe().unwrap(), &program).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let says = |uid| {
        let mut stranger = Command::new(&program);
        stranger.args(["--exact", "hostile::somebody_who_connects", "--nocapture"]).env(STRANGER, &socket);
        let output = stranger.uid(uid).gid(uid).current_dir("/").stdin(Stdio::null()).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(says(65_534).contains("<refused>"));
    assert!(says(0).contains("<answered>"));
    holding.still_holds();
}

/// A client sends nothing to a socket that somebody else may have put there.
#[test]
fn a_socket_that_others_could_have_made_is_not_used() {
    let place = Place::new();
    let _holder = place.holder(&[]);
    let folder = place.path("hold");
    let path = &folder;
    for mode in [0o777, 0o720, 0o702] {
        let before = fs::metadata(path).unwrap().permissions();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        let refused = HolderClient::connect(&place.socket(), PATIENCE);
        assert!(
            matches!(&refused, Err(ClientError::Stranger { path: named, mode: seen, .. }) if named == path && *seen == mode),
            "{refused:?}"
        );
        fs::set_permissions(path, before).unwrap();
    }
    place.client();
}
