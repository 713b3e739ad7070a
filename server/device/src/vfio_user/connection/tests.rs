//! A hostile server on the other end of a socket pair, told what to do by each test.

use std::io::{IoSlice, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::thread::JoinHandle;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use super::*;
use crate::vfio_user::codec::{HEADER_BYTES, Header};

const PATIENT: Timing = Timing { answer_within: None, finish_within: Duration::from_mins(1) };
const HASTY: Duration = Duration::from_millis(30);

/// The server's end.
struct Peer {
    stream: UnixStream,
}

impl Peer {
    fn read(&mut self) -> (Header, Vec<u8>) {
        let mut header = [0; HEADER_BYTES];
        self.stream.read_exact(&mut header).unwrap();
        let header = Header::decode(&header, Limits::new(u32::MAX)).unwrap();
        let mut body = vec![0; header.body_bytes()];
        self.stream.read_exact(&mut body).unwrap();
        (header, body)
    }

    fn write(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    fn agree(&mut self) {
        let (header, _) = self.read();
        let capabilities = Capabilities { max_msg_fds: 2, ..Capabilities::default() };
        self.write(&reply(&Reply::Version(Version::ours(capabilities)), header.id));
    }

    fn sees_the_end(&mut self) {
        // A reset says the same: bytes of ours were not read.
        assert!(matches!(self.stream.read(&mut [0; 64]), Ok(0) | Err(_)));
    }

    fn write_with_fds(&mut self, bytes: &[u8], file: &UnixStream, count: usize) {
        let fds = vec![file.as_fd(); count];
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(count))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        let slices = [IoSlice::new(bytes)];
        let sent = rustix::net::sendmsg(&self.stream, &slices, &mut control, SendFlags::NOSIGNAL).unwrap();
        assert_eq!(sent, bytes.len());
    }
}

fn reply(reply: &Reply<'_>, id: u16) -> Vec<u8> {
    reply.encode(id, Limits::default()).unwrap()
}

fn ours() -> Capabilities {
    Capabilities { max_msg_fds: 8, ..Capabilities::default() }
}

/// Memory of 16 bytes at 0x1000.
#[derive(Debug, Default)]
struct Memory([u8; 16]);

impl Memory {
    fn at(&mut self, iova: u64, length: usize) -> Result<&mut [u8], i32> {
        let start = iova.checked_sub(0x1000).and_then(|start| usize::try_from(start).ok());
        start.and_then(|start| self.0.get_mut(start..start.checked_add(length)?)).ok_or(libc::EFAULT)
    }
}

impl DmaTarget for Memory {
    fn read(&mut self, iova: u64, buffer: &mut [u8]) -> Result<(), i32> {
        buffer.copy_from_slice(self.at(iova, buffer.len())?);
        Ok(())
    }

    fn write(&mut self, iova: u64, bytes: &[u8]) -> Result<(), i32> {
        self.at(iova, bytes.len())?.copy_from_slice(bytes);
        Ok(())
    }
}

fn start(
    timing: Timing,
    script: impl FnOnce(&mut Peer) + Send + 'static,
) -> (Result<Connection, ConnectionError>, JoinHandle<()>) {
    let (stream, theirs) = UnixStream::pair().unwrap();
    let peer = std::thread::spawn(move || script(&mut Peer { stream: theirs }));
    (Connection::open(stream, ours(), timing, Box::<Memory>::default()), peer)
}

/// A connection whose server agreed on the version and goes on with the script.
fn connected(script: impl FnOnce(&mut Peer) + Send + 'static) -> (Connection, JoinHandle<()>) {
    let (connection, peer) = start(PATIENT, |peer| {
        peer.agree();
        script(peer);
    });
    (connection.unwrap(), peer)
}

fn assert_broken(connection: &mut Connection) {
    assert!(connection.is_broken());
    assert!(matches!(connection.call(&Command::Reset, &[]), Err(ConnectionError::Broken)));
    assert!(matches!(connection.send(&Command::Reset, &[]), Err(ConnectionError::Broken)));
}

#[test]
fn a_reply_may_come_byte_by_byte() {
    let (mut connection, peer) = connected(|peer| {
        let (header, _) = peer.read();
        for byte in reply(&Reply::MigDataRead { data: b"state" }, header.id) {
            peer.write(&[byte]);
        }
    });
    let answer = connection.call(&Command::MigDataRead { size: 64 }, &[]).unwrap();
    assert_eq!(answer.reply(), Ok(Reply::MigDataRead { data: b"state" }));
    peer.join().unwrap();
}

#[test]
fn replies_may_come_in_any_order() {
    let (mut connection, peer) = connected(|peer| {
        let asked: Vec<_> = (0..3).map(|_| peer.read()).collect();
        for (header, body) in asked.iter().rev() {
            let Ok(Command::RegionRead { offset, .. }) = Command::decode(header.code, body) else {
                panic!("{header:?}")
            };
            let data = [u8::try_from(offset).unwrap()];
            peer.write(&reply(&Reply::RegionRead { region: 7, offset, data: &data }, header.id));
        }
    });
    let tickets: Vec<_> = (0..3)
        .map(|offset| connection.send(&Command::RegionRead { region: 7, offset, count: 1 }, &[]).unwrap())
        .collect();
    for (ticket, offset) in tickets.into_iter().zip(0..) {
        let answer = connection.wait(ticket).unwrap();
        let data = &[u8::try_from(offset).unwrap()];
        assert_eq!(answer.reply(), Ok(Reply::RegionRead { region: 7, offset, data }));
    }
    peer.join().unwrap();
}

#[test]
fn what_the_server_asks_meanwhile_is_answered_and_is_never_the_reply() {
    let (mut connection, peer) = connected(|peer| {
        let (asked, _) = peer.read();
        let ask = |command: Command<'_>, no_reply| {
            // The very id that we wait for: each side counts its own.
            command.encode(asked.id, no_reply, Limits::default()).unwrap()
        };
        let written = b"by a device";
        peer.write(&ask(Command::DmaWrite { iova: 0x1000, data: written }, false));
        peer.write(&ask(Command::DmaWrite { iova: 0x1000 + 11, data: b"!" }, true));
        peer.write(&ask(Command::DmaRead { iova: 0x1000, count: 12 }, false));
        peer.write(&ask(Command::DmaRead { iova: 0x1000, count: 17 }, false));
        peer.write(&ask(Command::DmaRead { iova: 0x1000, count: u64::MAX }, false));
        peer.write(&ask(Command::MigDataRead { size: 4 }, false));
        peer.write(&ask(Command::Other { code: Code::Unknown(500), body: b"what?" }, false));
        let half =
            Header { size_bytes: 20, kind: Kind::Command { no_reply: false }, code: Code::DmaRead, ..asked };
        peer.write(&[half.encode().as_slice(), &[1, 2, 3, 4]].concat());
        let expected: [Result<Reply<'_>, i32>; 7] = [
            Ok(Reply::DmaWrite { iova: 0x1000, count: 11 }),
            Ok(Reply::DmaRead { iova: 0x1000, data: b"by a device!" }),
            Err(libc::EFAULT),
            Err(libc::EINVAL),
            Err(libc::EINVAL),
            Err(libc::EINVAL),
            Err(libc::EINVAL),
        ];
        for expected in expected {
            let (header, body) = peer.read();
            assert_eq!(header.id, asked.id);
            match expected {
                Ok(expected) => assert_eq!(Reply::decode(header.code, &body), Ok(expected)),
                Err(errno) => assert_eq!(header.kind, Kind::ErrorReply { errno }),
            }
        }
        peer.write(&reply(&Reply::Done(Code::Reset), asked.id));
    });
    let answer = connection.call(&Command::Reset, &[]).unwrap();
    assert_eq!(answer.reply(), Ok(Reply::Done(Code::Reset)));
    peer.join().unwrap();
}

#[test]
fn two_ends_that_write_at_once_do_not_wait_for_each_other() {
    let (mut connection, peer) = connected(|peer| {
        // Much more than the socket holds, before anything is read.
        let data = vec![0; 1 << 20];
        peer.write(&Command::DmaWrite { iova: 0, data: &data }.encode(9, false, Limits::default()).unwrap());
        let (asked, body) = peer.read();
        assert_eq!(body.len(), 8 + (1 << 20));
        peer.write(&reply(&Reply::Done(Code::MigDataWrite), asked.id));
        assert_eq!(peer.read().0.kind, Kind::ErrorReply { errno: libc::EFAULT });
    });
    let data = vec![1; 1 << 20];
    assert!(connection.call(&Command::MigDataWrite { data: &data }, &[]).unwrap().reply().is_ok());
    peer.join().unwrap();
}

/// What it is, and what is sent for a reply with this id.
type Lie = (&'static str, Box<dyn FnOnce(u16) -> Vec<u8> + Send>);

#[test]
fn a_reply_that_nobody_asked_for_is_the_end() {
    let header = |id, code, size_bytes| Header { id, code, size_bytes, kind: Kind::Reply }.encode().to_vec();
    let too_long = Limits::default().max_message_bytes() + 1;
    let lies: Vec<Lie> = vec![
        ("another id", Box::new(move |id| header(id.wrapping_add(1), Code::Reset, 16))),
        ("another command", Box::new(move |id| header(id, Code::MigDataRead, 16))),
        ("too long", Box::new(move |id| header(id, Code::Reset, too_long))),
        ("far too long", Box::new(move |id| header(id, Code::Reset, u32::MAX))),
        ("no length", Box::new(move |id| header(id, Code::Reset, 0))),
        ("shorter than a header", Box::new(move |id| header(id, Code::Reset, 15))),
        (
            "neither command nor reply",
            Box::new(move |id| {
                let mut bytes = header(id, Code::Reset, 16);
                bytes[8] = 5;
                bytes
            }),
        ),
    ];
    for (what, lie) in lies {
        let (mut connection, peer) = connected(move |peer| {
            let (asked, _) = peer.read();
            peer.write(&lie(asked.id));
            peer.sees_the_end();
        });
        let refused = connection.call(&Command::Reset, &[]);
        assert!(matches!(refused, Err(ConnectionError::Peer(_))), "{what}: {refused:?}");
        assert_broken(&mut connection);
        peer.join().unwrap();
    }
}

#[test]
fn an_answer_given_twice_is_the_end() {
    let (mut connection, peer) = connected(|peer| {
        let (asked, _) = peer.read();
        let once = reply(&Reply::Done(Code::Reset), asked.id);
        peer.write(&[once.clone(), once].concat());
        peer.sees_the_end();
    });
    assert!(connection.call(&Command::Reset, &[]).unwrap().reply().is_ok());
    let refused = connection.call(&Command::Reset, &[]);
    assert!(
        matches!(
            refused,
            Err(ConnectionError::Peer(PeerError::UnknownReply { .. }) | ConnectionError::Lost(_))
        ),
        "{refused:?}"
    );
    assert_broken(&mut connection);
    peer.join().unwrap();
}

#[test]
fn a_peer_that_dies_at_any_byte_of_a_reply_leaves_nothing_to_guess() {
    let whole = reply(&Reply::MigDataRead { data: b"state" }, 0).len();
    for alive in 0..whole {
        let (mut connection, peer) = connected(move |peer| {
            let (asked, _) = peer.read();
            peer.write(&reply(&Reply::MigDataRead { data: b"state" }, asked.id)[..alive]);
        });
        let refused = connection.call(&Command::MigDataRead { size: 5 }, &[]);
        assert!(
            matches!(&refused, Err(ConnectionError::Lost(error))
            if error.raw_os_error() == Some(libc::ECONNRESET)),
            "{alive}: {refused:?}"
        );
        assert_broken(&mut connection);
        peer.join().unwrap();
    }
}

#[test]
fn a_peer_that_dies_within_a_request_leaves_nothing_to_guess() {
    for alive in [0, 1, 15, 16, 17, 300_000] {
        let (mut connection, peer) = connected(move |peer| {
            peer.stream.read_exact(&mut vec![0; alive]).unwrap();
        });
        let data = vec![1; 1 << 20];
        let refused = connection.call(&Command::MigDataWrite { data: &data }, &[]);
        assert!(
            matches!(&refused, Err(ConnectionError::Lost(error))
            if matches!(error.raw_os_error(), Some(libc::ECONNRESET | libc::EPIPE))),
            "{alive}: {refused:?}"
        );
        assert_broken(&mut connection);
        peer.join().unwrap();
    }
}

#[test]
fn a_peer_that_says_nothing_or_only_half_is_late() {
    for half in [0, 1, 16, 20] {
        let (mut connection, peer) = connected(move |peer| {
            let (asked, _) = peer.read();
            peer.write(&reply(&Reply::MigDataRead { data: b"state" }, asked.id)[..half]);
            peer.sees_the_end();
        });
        connection.set_timing(match half {
            0 => Timing { answer_within: Some(HASTY), ..PATIENT },
            _ => Timing { finish_within: HASTY, ..PATIENT },
        });
        let refused = connection.call(&Command::MigDataRead { size: 5 }, &[]);
        assert!(
            matches!(&refused, Err(ConnectionError::Lost(error))
            if error.raw_os_error() == Some(libc::ETIMEDOUT)),
            "{half}: {refused:?}"
        );
        assert_broken(&mut connection);
        peer.join().unwrap();
    }
}

#[test]
fn an_answer_that_came_counts_although_the_peer_is_gone_since() {
    let (mut connection, peer) = connected(|peer| {
        let (asked, _) = peer.read();
        // A question whose answer nobody will read any more, and with it our reply.
        let question = Command::DmaRead { iova: 0x1000, count: 16 };
        let question = question.encode(1, false, Limits::default()).unwrap();
        peer.write(&[question, reply(&Reply::Done(Code::Reset), asked.id)].concat());
    });
    let answer = connection.call(&Command::Reset, &[]).unwrap();
    assert_eq!(answer.reply(), Ok(Reply::Done(Code::Reset)));
    peer.join().unwrap();
    assert!(connection.call(&Command::Reset, &[]).is_err());
    assert_broken(&mut connection);
}

#[test]
fn a_refusal_leaves_the_connection_as_it_was() {
    let (mut connection, peer) = connected(|peer| {
        let (asked, _) = peer.read();
        peer.write(&encode_error(asked.id, asked.code, libc::EBUSY));
        let (asked, _) = peer.read();
        peer.write(&reply(&Reply::Done(Code::Reset), asked.id));
    });
    let refused = connection.call(&Command::Reset, &[]).unwrap_err();
    assert_eq!(refused.refusal(), Some(libc::EBUSY));
    assert!(connection.call(&Command::Reset, &[]).unwrap().reply().is_ok());
    peer.join().unwrap();
}

#[test]
fn what_cannot_be_sent_is_not_begun() {
    let (mut connection, peer) = connected(|peer| {
        let (asked, _) = peer.read();
        assert_eq!(asked.code, Code::Reset);
        peer.write(&reply(&Reply::Done(Code::Reset), asked.id));
    });
    let data = vec![0; (1 << 20) + 8192];
    let refused = connection.call(&Command::MigDataWrite { data: &data }, &[]);
    assert!(matches!(refused, Err(ConnectionError::TooLong(_))), "{refused:?}");
    let (file, _other) = UnixStream::pair().unwrap();
    let refused = connection.call(&Command::Reset, &[file.as_fd(); 3]);
    assert!(matches!(refused, Err(ConnectionError::TooManyFds { given: 3, limit: 2 })), "{refused:?}");
    assert!(connection.call(&Command::Reset, &[]).unwrap().reply().is_ok());
    peer.join().unwrap();
}

#[test]
fn file_descriptors_that_nobody_wants_are_closed() {
    let (file, mut other) = UnixStream::pair().unwrap();
    let (mut connection, peer) = connected(move |peer| {
        let (asked, _) = peer.read();
        peer.write_with_fds(&reply(&Reply::Done(Code::Reset), asked.id), &file, 8);
    });
    let answer = connection.call(&Command::Reset, &[]).unwrap();
    peer.join().unwrap();
    assert_eq!(answer.into_fds().len(), 8);
    // The last duplicate is gone, or this would wait.
    assert_eq!(other.read(&mut [0]).unwrap(), 0);
}

#[test]
fn more_file_descriptors_than_were_allowed_are_the_end() {
    for count in [9, MAX_FDS, 40] {
        let (file, mut other) = UnixStream::pair().unwrap();
        let (mut connection, peer) = connected(move |peer| {
            let (asked, _) = peer.read();
            peer.write_with_fds(&reply(&Reply::Done(Code::Reset), asked.id), &file, count);
            peer.sees_the_end();
        });
        let refused = connection.call(&Command::Reset, &[]);
        assert!(
            matches!(refused, Err(ConnectionError::Peer(PeerError::TooManyFds { .. }))),
            "{count}: {refused:?}"
        );
        assert_broken(&mut connection);
        peer.join().unwrap();
        drop(connection);
        assert_eq!(other.read(&mut [0]).unwrap(), 0);
    }
}

#[test]
fn a_server_of_another_version_is_refused() {
    let answers: [fn(u16) -> Vec<u8>; 4] = [
        |id| reply(&Reply::Version(Version { major: 1, ..Version::ours(Capabilities::default()) }), id),
        |id| encode_error(id, Code::Version, libc::EINVAL),
        |id| reply(&Reply::Version(Version::ours(Capabilities { max_data_xfer_bytes: 0, ..ours() })), id),
        |id| Header { id, code: Code::Version, size_bytes: 1 << 20, kind: Kind::Reply }.encode().to_vec(),
    ];
    for (index, answer) in answers.into_iter().enumerate() {
        let (refused, peer) = start(PATIENT, move |peer| {
            let (asked, _) = peer.read();
            peer.write(&answer(asked.id));
            peer.sees_the_end();
        });
        let refused = refused.err().unwrap();
        match index {
            1 => assert_eq!(refused.refusal(), Some(libc::EINVAL)),
            _ => assert!(matches!(refused, ConnectionError::Peer(_)), "{refused:?}"),
        }
        peer.join().unwrap();
    }
}

#[test]
fn a_server_that_says_nothing_of_itself_has_the_defaults() {
    let (connection, peer) = start(PATIENT, |peer| {
        let (asked, _) = peer.read();
        peer.write(&reply(&Reply::Done(Code::Version), asked.id));
    });
    let agreed = connection.unwrap().negotiated();
    assert_eq!((agreed.peer_max_msg_fds, agreed.limits.max_data_xfer_bytes()), (1, 1 << 20));
    peer.join().unwrap();
}

/// An owner that is killed has read any number of bytes of a reply. The next one is in step all the same.
#[test]
fn an_owner_that_read_half_of_a_reply_takes_nothing_from_the_next() {
    let data: Vec<u8> = (0..96_u8).map(|byte| byte.wrapping_mul(37)).collect();
    let left = reply(&Reply::DmaRead { iova: 0x1000, data: &data }, 7);
    for read in 0..left.len() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let left = left.clone();
        let peer = std::thread::spawn(move || {
            let mut peer = Peer { stream: theirs };
            // What the killed owner has not read, and what the server says next: another request of its own.
            peer.write(&left[read..]);
            let (header, _) = peer.read();
            let mut said = reply(&Reply::Done(Code::Reset), header.id);
            said.extend(
                Command::DmaRead { iova: 0x1000, count: 4 }.encode(9, false, Limits::default()).unwrap(),
            );
            peer.write(&said);
            // Beside the next request: both ends are in step.
            while peer.read().0.kind != Kind::Reply {}
        });
        let negotiated =
            Negotiated { minor: 1, limits: Limits::default(), peer_max_msg_fds: 0, migration_pgsize: None };
        let generation = Generation::default().after(1);
        let mut connection =
            Connection::adopt(ours, negotiated, generation, 0, PATIENT, Box::<Memory>::default());
        let answer = connection.call(&Command::Reset, &[]);
        assert!(answer.is_ok(), "{read} bytes were read: {answer:?}");
        // In step: what came with the answer is served.
        let ticket = connection.send(&Command::Reset, &[]).unwrap();
        let _ = connection.wait(ticket);
        peer.join().unwrap();
    }
}
