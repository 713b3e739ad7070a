//! A client that sends what a test says and nothing else.

use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use vfio_checkpoint_device::vfio_user::codec::{
    Capabilities, Code, Command, FeatureId, FeatureMessage, FeatureOperation, FeaturePayload, HEADER_BYTES,
    Header, Kind, Limits, MigrationState, NO_DATA_FD, Reply, Version,
};
use vfio_checkpoint_fsm::State;

/// No answer takes as long: a test fails then instead of hanging.
const PATIENCE: Duration = Duration::from_mins(1);

pub(crate) struct Raw {
    pub(crate) stream: UnixStream,
    next_id: u16,
    /// What the server said of itself.
    pub(crate) server: Option<Version>,
}

impl Raw {
    /// A connection on which nothing was said.
    pub(crate) fn new(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { stream, next_id: 7, server: None }
    }

    /// Agrees on a version.
    pub(crate) fn attach(stream: UnixStream) -> Self {
        let mut raw = Self::new(stream);
        let body = raw.call(&Command::Version(Version::ours(Capabilities::default())), &[]).unwrap();
        let found = Reply::decode(Code::Version, &body).unwrap();
        let Reply::Version(version) = found else { panic!("not a version: {found:?}") };
        raw.server = Some(version);
        raw
    }

    /// Asks and waits for the answer: the reply's body, or the errno.
    pub(crate) fn call(&mut self, command: &Command<'_>, fds: &[BorrowedFd<'_>]) -> Result<Vec<u8>, i32> {
        let id = self.send(command, false, fds);
        let (header, body) = self.receive().unwrap();
        assert_eq!((header.id, header.code), (id, command.code()));
        match header.kind {
            Kind::Reply => Ok(body),
            Kind::ErrorReply { errno } => {
                assert!(body.is_empty());
                Err(errno)
            }
            Kind::Command { .. } => panic!("the server asked {header:?}"),
        }
    }

    /// Sends a command, with descriptors beside it. Returns its id.
    pub(crate) fn send(&mut self, command: &Command<'_>, no_reply: bool, fds: &[BorrowedFd<'_>]) -> u16 {
        self.next_id = self.next_id.wrapping_add(1);
        let message = command.encode(self.next_id, no_reply, Limits::new(u32::MAX)).unwrap();
        self.send_bytes(&message, fds).unwrap();
        self.next_id
    }

    /// Sends bytes, whatever they are.
    pub(crate) fn send_bytes(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        if fds.is_empty() {
            return self.stream.write_all(bytes);
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(128))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        let parts = [IoSlice::new(bytes)];
        let sent = rustix::net::sendmsg(&self.stream, &parts, &mut control, SendFlags::NOSIGNAL)?;
        self.stream.write_all(&bytes[sent..])
    }

    /// The next message.
    pub(crate) fn receive(&mut self) -> io::Result<(Header, Vec<u8>)> {
        let mut header = [0; HEADER_BYTES];
        self.stream.read_exact(&mut header)?;
        let header = Header::decode(&header, Limits::new(u32::MAX)).unwrap();
        let mut body = vec![0; header.body_bytes()];
        self.stream.read_exact(&mut body)?;
        Ok((header, body))
    }

    /// Waits until the server has closed the connection, and asserts that it says nothing before.
    pub(crate) fn assert_closed(mut self) {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest) {
            Ok(_) => assert_eq!(rest, b"", "the server said something"),
            // Closed with something of ours unread.
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset),
        }
    }

    /// A feature, for the body of the reply, which [`payload`] reads.
    pub(crate) fn feature(
        &mut self,
        feature: FeatureId,
        operation: FeatureOperation,
        payload: FeaturePayload<'_>,
        room: u32,
    ) -> Result<Vec<u8>, i32> {
        let message = FeatureMessage::new(feature, operation, payload).reply_room(room);
        self.call(&Command::Feature(message), &[])
    }

    pub(crate) fn probe(&mut self, feature: FeatureId, get: bool, set: bool) -> Result<(), i32> {
        let operation = FeatureOperation::Probe { get, set };
        self.feature(feature, operation, FeaturePayload::Empty, 0).map(|body| {
            assert_eq!(payload(&body), FeaturePayload::Empty);
        })
    }

    pub(crate) fn set_state(&mut self, state: State) -> Result<(), i32> {
        self.set_state_number(state.into())
    }

    pub(crate) fn set_state_number(&mut self, state: u32) -> Result<(), i32> {
        let payload = FeaturePayload::State(MigrationState { state, data_fd: NO_DATA_FD });
        self.feature(FeatureId::MigDeviceState, FeatureOperation::Set, payload.clone(), 0).map(|body| {
            assert_eq!(self::payload(&body), payload);
        })
    }

    pub(crate) fn state(&mut self) -> State {
        let got =
            self.feature(FeatureId::MigDeviceState, FeatureOperation::Get, FeaturePayload::Empty, 8).unwrap();
        let found = payload(&got);
        let FeaturePayload::State(state) = found else { panic!("not a state: {found:?}") };
        State::try_from(state.state).unwrap()
    }

    pub(crate) fn read(&mut self, size: u32) -> Result<Vec<u8>, i32> {
        let body = self.call(&Command::MigDataRead { size }, &[])?;
        let found = Reply::decode(Code::MigDataRead, &body).unwrap();
        let Reply::MigDataRead { data } = found else { panic!("not data: {found:?}") };
        Ok(data.to_vec())
    }

    pub(crate) fn write(&mut self, data: &[u8]) -> Result<(), i32> {
        self.call(&Command::MigDataWrite { data }, &[]).map(|body| assert_eq!(body, b""))
    }

    pub(crate) fn reset(&mut self) -> Result<(), i32> {
        self.call(&Command::Reset, &[]).map(|body| assert_eq!(body, b""))
    }

    pub(crate) fn read_region(&mut self, region: u32, offset: u64, count: u32) -> Result<Vec<u8>, i32> {
        let body = self.call(&Command::RegionRead { region, offset, count }, &[])?;
        let found = Reply::decode(Code::RegionRead, &body).unwrap();
        let Reply::RegionRead { data, .. } = found else { panic!("not region data: {found:?}") };
        Ok(data.to_vec())
    }

    pub(crate) fn write_region(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), i32> {
        self.call(&Command::RegionWrite { region, offset, data }, &[]).map(drop)
    }
}

/// Hangs up the connection itself, not only this descriptor of it: another test of this process may be starting a
/// child just now, which holds a copy until it is another program.
impl Drop for Raw {
    fn drop(&mut self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

/// The payload of a feature's reply.
pub(crate) fn payload(body: &[u8]) -> FeaturePayload<'_> {
    let found = Reply::decode(Code::Feature, body).unwrap();
    let Reply::Feature(message) = found else { panic!("not a feature: {found:?}") };
    message.payload
}
