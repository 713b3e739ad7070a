//! The binary: its socket, its signals, its exit codes, its descriptors.

use std::fs;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;

use rustix::event::EventfdFlags;
use rustix::process::Signal;
use vfio_checkpoint_device::vfio_user::codec::{Command, DmaMap, SetIrqs};
use vfio_checkpoint_fsm::State;

use crate::served::{NoProcessStarts, Process, command, spawn};

fn refused(path: &std::path::Path, arguments: &[&str]) -> (Option<i32>, String) {
    let mut child = spawn(command(path).args(arguments));
    let status = child.wait().unwrap();
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    (status.code(), said)
}

#[test]
fn it_ends_on_sigterm_and_sigint_and_takes_its_socket_along() {
    for (signal, attached) in
        [(Signal::TERM, false), (Signal::TERM, true), (Signal::INT, false), (Signal::INT, true)]
    {
        let mut process = Process::start(&["--device", "sim:memory=1MiB"]);
        assert_eq!(fs::metadata(&process.path).unwrap().permissions().mode() & 0o777, 0o600);
        let client = attached.then(|| {
            let mut client = process.attach();
            client.set_state(State::PreCopy).unwrap();
            client
        });
        process.signal(signal);
        assert_eq!(process.child.wait().unwrap().code(), Some(0), "{signal:?}, attached: {attached}");
        assert!(!process.path.exists());
        if let Some(client) = client {
            client.assert_closed();
        }
    }
}

#[test]
fn with_once_it_ends_with_its_client() {
    let mut process = Process::start(&["--once"]);
    drop(process.attach());
    assert_eq!(process.child.wait().unwrap().code(), Some(0));
    assert!(!process.path.exists());
}

#[test]
fn it_takes_over_a_stale_socket_and_nothing_else() {
    let mut process = Process::start(&[]);
    let (code, said) = refused(&process.path, &[]);
    assert_eq!(code, Some(3), "{said}");
    assert!(said.contains("another server listens there"), "{said}");
    assert_eq!(process.attach().state(), State::Running, "the first goes on");

    // Killed, it cannot take its socket along; the next one does.
    process.child.kill().unwrap();
    process.child.wait().unwrap();
    assert!(process.path.exists());
    let mut next = spawn(command(&process.path).arg("--once"));
    let mut byte = [0];
    next.stderr.as_mut().unwrap().read_exact(&mut byte).unwrap();
    drop(process.attach());
    assert_eq!(next.wait().unwrap().code(), Some(0));

    let notes = process.folder().join("notes");
    fs::write(&notes, "keep me").unwrap();
    let (code, said) = refused(&notes, &[]);
    assert_eq!((code, fs::read_to_string(&notes).unwrap().as_str()), (Some(3), "keep me"), "{said}");
}

#[test]
fn what_cannot_be_served_is_refused_before_there_is_a_socket() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("device.sock");
    for (device, reason) in [
        ("sim:colour=red", "there are seed"),
        ("sim:memory=0", "memory_bytes"),
        ("0000:ff:1f.7", "no pci device"),
    ] {
        let (code, said) = refused(&path, &["--device", device]);
        assert_eq!(code, Some(3), "{device}: {said}");
        assert!(said.contains(reason), "{device}: {said}");
        assert!(!path.exists());
    }
    assert_eq!(refused(&path, &["--bogus"]).0, Some(2));
    let long = folder.path().join("x".repeat(200));
    assert_eq!(refused(&long, &[]).0, Some(3), "too long for a socket's address");
}

/// Descriptors that clients send go with the message or with the client.
#[test]
fn no_descriptor_stays_behind() {
    let process = Process::start(&[]);
    let count = || fs::read_dir(format!("/proc/{}/fd", process.child.id())).unwrap().count();
    let visit = || {
        let mut client = process.attach();
        let before = count();
        let eventfds: Vec<_> =
            (0..30).map(|_| rustix::event::eventfd(0, EventfdFlags::CLOEXEC).unwrap()).collect();
        let fds: Vec<BorrowedFd<'_>> = eventfds.iter().map(AsFd::as_fd).collect();
        let memory = fs::File::open("/dev/zero").unwrap();
        for round in 0..100_u64 {
            let map = DmaMap { flags: 0b111, offset: 0, iova: round << 20, length_bytes: 4096 };
            client.call(&Command::DmaMap(map), &[memory.as_fd()]).unwrap();
            // The first refused for what it says, the second for what comes with it.
            let nonsense = SetIrqs { flags: 0, index: 2, start: 0, count: 30, data: &[] };
            client.call(&Command::SetIrqs(nonsense), &fds).unwrap_err();
            client.call(&Command::Reset, &fds).unwrap();
            let arm = SetIrqs { flags: 0b10_0100, index: 2, start: 0, count: 30, data: &[] };
            client.call(&Command::SetIrqs(arm), &fds).unwrap();
        }
        // One for each vector, and the device's own duplicate.
        assert_eq!(count(), before + 60);
        before
    };
    let _guard = NoProcessStarts::meanwhile();
    let first = visit();
    for _ in 0..5 {
        assert_eq!(visit(), first);
    }
}
