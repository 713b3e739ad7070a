//! The holder's socket, lock, signals and limits.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::process::Command;

use rustix::process::Signal;

use crate::processes::{Ends, Place, label};

fn mode(path: &std::path::Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

#[test]
fn the_socket_is_for_its_owner_alone_and_goes_with_the_holder() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let place = Place::new();
        let holder = place.holder(&[]);
        assert_eq!((mode(&place.path("hold")), mode(&place.socket())), (0o700, 0o600));
        let client = place.client();
        holder.signal(signal);
        assert_eq!(holder.ended().0, Some(0), "{signal:?}");
        assert!(!place.socket().exists());
        drop(client);
    }
}

#[test]
fn a_second_holder_touches_nothing() {
    let place = Place::new();
    let first = place.holder(&[]);
    let mut client = place.client();
    let (code, said) = place.refused(&[]);
    assert_eq!(code, Some(3), "{said}");
    assert!(said.contains("another holder has"), "{said}");
    let end = Ends::new(1);
    assert!(!client.put(&label("a"), &end.borrowed()).unwrap(), "the first goes on");
    drop(client);
    assert_eq!(place.client().list().unwrap().len(), 1, "at the same path");

    // Killed, it leaves its socket behind; the lock went with it, so the next one may replace it.
    first.kill();
    assert!(place.socket().exists());
    end.closed_everywhere();
    let _next = place.holder(&[]);
    assert!(place.client().list().unwrap().is_empty());
}

#[test]
fn what_is_in_the_way_is_left_alone() {
    let place = Place::new();
    DirBuilder::new().mode(0o700).create(place.path("hold")).unwrap();
    fs::write(place.socket(), "keep me").unwrap();
    let (code, said) = place.refused(&[]);
    assert_eq!(code, Some(3), "{said}");
    assert!(said.contains("is no socket"), "{said}");
    assert_eq!(fs::read_to_string(place.socket()).unwrap(), "keep me");
}

#[test]
fn a_folder_that_others_may_enter_is_refused() {
    let place = Place::new();
    DirBuilder::new().create(place.path("hold")).unwrap();
    for open in [0o755, 0o710, 0o701] {
        fs::set_permissions(place.path("hold"), fs::Permissions::from_mode(open)).unwrap();
        let (code, said) = place.refused(&[]);
        assert_eq!(code, Some(3), "{said}");
        assert!(said.contains("mode 0700") && said.contains(&format!("{open:04o}")), "{said}");
    }
    assert_eq!(fs::read_dir(place.path("hold")).unwrap().count(), 0, "nothing was made");
}

#[test]
fn the_limit_of_open_files_is_checked_before_anything_is_held() {
    let place = Place::new();
    let limited = |devices: &str| {
        Command::new("sh")
            .args(["-c", "ulimit -n 100 && exec \"$0\" hold --socket \"$1\" --max-devices \"$2\""])
            .arg(env!("CARGO_BIN_EXE_vfio-checkpointd"))
            .arg(place.socket())
            .arg(devices)
            .output()
            .unwrap()
    };
    let refused = limited("1024");
    let said = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(refused.status.code(), Some(3), "{said}");
    assert!(said.contains("1024 devices need 2112 open files") && said.contains("may have 100"), "{said}");
    assert!(!place.path("hold").exists());
    assert_eq!(
        Command::new(env!("CARGO_BIN_EXE_vfio-checkpointd")).arg("hold").output().unwrap().status.code(),
        Some(2)
    );
}
