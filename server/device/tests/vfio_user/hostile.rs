//! Peers that mean it no good: whatever they send, the server answers or hangs up, and the next client is served.

use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use vfio_checkpoint_device::vfio_user::codec::{
    Capabilities, Code, Command, DmaMap, HEADER_BYTES, Header, Kind, Limits, Version,
};
use vfio_checkpoint_device::vfio_user::server::ServerOptions;
use vfio_checkpoint_fsm::State;

use crate::raw::Raw;
use crate::served::{Served, paired, slot, small};

fn header(code: Code, size_bytes: u32) -> [u8; HEADER_BYTES] {
    Header { id: 1, code, size_bytes, kind: Kind::Command { no_reply: false } }.encode()
}

/// Every command that has a name, and two that have none.
fn codes() -> impl Iterator<Item = Code> {
    Code::KNOWN.iter().copied().chain([Code::Unknown(0), Code::Unknown(u16::MAX)])
}

#[test]
fn a_length_that_no_message_has_ends_the_connection() {
    let served = Served::small();
    for attached in [false, true] {
        for size in [0, 1, 15, u32::MAX, 1 << 31, 17 << 20] {
            for code in codes() {
                let mut client = if attached { served.attach() } else { Raw::new(served.connect()) };
                client.send_bytes(&header(code, size), &[]).unwrap();
                client.assert_closed();
            }
        }
    }
    assert_eq!(served.attach().state(), State::Running);
}

#[test]
fn a_message_of_no_type_ends_the_connection() {
    let served = Served::small();
    let mut bytes = header(Code::Reset, 16);
    bytes[8] = 0xf;
    let mut client = served.attach();
    client.send_bytes(&bytes, &[]).unwrap();
    client.assert_closed();
    assert_eq!(served.attach().state(), State::Running);
}

#[test]
fn replies_that_nobody_asked_for_are_passed_over() {
    let (slot, _time) = slot(small());
    let mut client = paired(&slot);
    for kind in [Kind::Reply, Kind::ErrorReply { errno: 5 }] {
        let reply = Header { id: 9, code: Code::DmaRead, size_bytes: 20, kind };
        client.send_bytes(&[&reply.encode()[..], b"data"].concat(), &[]).unwrap();
    }
    assert_eq!(client.state(), State::Running);
}

/// A body cut to every length, in a message that is whole.
#[test]
fn a_body_too_short_for_its_command_is_einval() {
    let served = Served::small();
    let mut client = served.attach();
    for code in codes() {
        for length in 0..40_u32 {
            let body = vec![0xff; usize::try_from(length).unwrap()];
            client.send_bytes(&[&header(code, 16 + length)[..], &body].concat(), &[]).unwrap();
            let (reply, _) = client.receive().unwrap();
            match reply.kind {
                Kind::ErrorReply { .. } => {}
                // The one has no body, the other needs no more than its first field.
                Kind::Reply => assert!(
                    matches!(code, Code::Reset | Code::GetInfo),
                    "{length} bytes of nonsense were accepted as {code:?}"
                ),
                Kind::Command { .. } => panic!("{reply:?}"),
            }
        }
    }
    assert_eq!(client.state(), State::Running);
}

/// A message cut at every byte: what was half sent is never carried out, and the device is reset.
#[test]
fn a_message_cut_short_is_not_carried_out() {
    let served = Served::small();
    let version = Command::Version(Version::ours(Capabilities::default()));
    let version = version.encode(1, false, Limits::default()).unwrap();
    for cut in 1..version.len() {
        let mut client = Raw::new(served.connect());
        client.send_bytes(&version[..cut], &[]).unwrap();
    }
    let write = Command::RegionWrite { region: 7, offset: 4, data: &[0x06, 0x00, 0x00, 0x00] };
    let write = write.encode(1, false, Limits::default()).unwrap();
    let mut resets = 0;
    for cut in 1..write.len() {
        let mut client = served.attach();
        assert_eq!((served.slot.resets(), client.read_region(7, 4, 2)), (resets, Ok(vec![0, 0])));
        client.set_state(State::Resuming).unwrap();
        client.send_bytes(&write[..cut], &[]).unwrap();
        drop(client);
        resets += 1;
    }
    let mut client = served.attach();
    assert_eq!((client.state(), served.slot.resets()), (State::Running, resets));
}

#[test]
fn a_message_may_come_byte_by_byte() {
    let (slot, _time) = slot(small());
    let mut client = paired(&slot);
    let read = Command::RegionRead { region: 7, offset: 0, count: 4 };
    for byte in read.encode(3, false, Limits::default()).unwrap() {
        client.send_bytes(&[byte], &[]).unwrap();
    }
    let (header, body) = client.receive().unwrap();
    assert_eq!((header.id, header.kind, body.len()), (3, Kind::Reply, 20));
}

#[test]
fn windows_are_as_many_as_were_told_and_no_more() {
    let options = ServerOptions { max_dma_windows: 3000, ..ServerOptions::default() };
    let served = Served::new(small(), options);
    let memory = std::fs::File::open("/dev/zero").unwrap();
    for _ in 0..2 {
        let mut client = served.attach();
        assert_eq!(client.server.unwrap().capabilities.max_dma_maps, 3000);
        for window in 0..3500_u64 {
            let map = DmaMap { flags: 0b111, offset: 0, iova: window << 20, length_bytes: 4096 };
            let mapped = client.call(&Command::DmaMap(map), &[memory.as_fd()]);
            assert_eq!(mapped, if window < 3000 { Ok(vec![]) } else { Err(libc::ENOSPC) }, "{window}");
        }
    }
}

#[test]
fn more_descriptors_than_were_told_are_refused() {
    let (slot, _time) = slot(small());
    let mut client = paired(&slot);
    let file = std::fs::File::open("/dev/null").unwrap();
    let fds: Vec<BorrowedFd<'_>> = (0..100).map(|_| file.as_fd()).collect();
    for count in [1, 32] {
        client.call(&Command::Reset, &fds[..count]).unwrap();
    }
    for count in [33, 100] {
        assert_eq!(client.call(&Command::Reset, &fds[..count]), Err(libc::EINVAL), "{count}");
    }
    // Piece by piece they are no fewer.
    let message = Command::Reset.encode(5, false, Limits::default()).unwrap();
    for byte in &message {
        client.send_bytes(&[*byte], &fds[..3]).unwrap();
    }
    assert!(matches!(client.receive().unwrap().0.kind, Kind::ErrorReply { errno: libc::EINVAL }));
    assert_eq!((client.state(), slot.resets()), (State::Running, 2));
}

/// The device is reset after each, so what is left over is only what the server got wrong.
#[test]
fn garbage_never_takes_the_server_down() {
    let served = Served::small();
    let body = prop::collection::vec(any::<u8>(), 0..200);
    let messages = prop::collection::vec((0..20_u16, any::<bool>(), body), 1..20);
    let tail = prop::collection::vec(any::<u8>(), 0..40);
    let mut runner = TestRunner::new(Config { cases: 300, failure_persistence: None, ..Config::default() });
    runner
        .run(&(messages, tail), |(messages, tail)| {
            let mut client = served.attach();
            for (code, no_reply, body) in messages {
                let size_bytes = u32::try_from(HEADER_BYTES + body.len()).unwrap();
                let kind = Kind::Command { no_reply };
                let header = Header { id: 0, code: Code::from(code), size_bytes, kind };
                client.send_bytes(&[&header.encode()[..], &body].concat(), &[]).unwrap();
                if !no_reply {
                    prop_assert_eq!(client.receive().unwrap().0.code, Code::from(code));
                }
            }
            // The server may have hung up meanwhile, at a header that is none.
            let _ = client.stream.write_all(&tail);
            drop(client);
            prop_assert_eq!(served.attach().state(), State::Running);
            Ok(())
        })
        .unwrap();
}

/// Features by their structure, with numbers that mean harm.
#[test]
fn features_with_lengths_that_lie_are_refused() {
    let served = Served::small();
    let mut client = served.attach();
    let numbers = [0_u64, 1, 4096, 4097, 1 << 40, u64::MAX - 4095, u64::MAX];
    let mut asked = 0;
    for feature in [1_u32, 2, 6, 7, 8, 9, 12, 0xffff] {
        for operation in [1_u32 << 16, 1 << 17, 1 << 18, 3 << 16, 7 << 16, 0, 1 << 31] {
            for argsz in [0_u32, 8, 16, 1 << 20, u32::MAX] {
                for (first, second) in numbers.iter().flat_map(|a| numbers.iter().map(move |b| (a, b))) {
                    let fields = [argsz.to_le_bytes(), (feature | operation).to_le_bytes()].concat();
                    let data = [first.to_le_bytes(), second.to_le_bytes(), first.to_le_bytes()].concat();
                    let size = u32::try_from(HEADER_BYTES + fields.len() + data.len()).unwrap();
                    let message = [&header(Code::Feature, size)[..], &fields, &data].concat();
                    client.send_bytes(&message, &[]).unwrap();
                    asked += 1;
                    assert_eq!(client.receive().unwrap().0.code, Code::Feature);
                }
            }
        }
    }
    println!("{asked} requests");
    client.reset().unwrap();
    assert_eq!(client.state(), State::Running);
}
