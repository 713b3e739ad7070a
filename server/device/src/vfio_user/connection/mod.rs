//! A client's end of a vfio-user socket: asks, waits for the answer, and answers what the server asks meanwhile.
//!
//! ```text
//!   send(command) --> outbox --\                       /--> inbox --> reply   --> answers, by id --> wait(ticket)
//!                               >--- Unix stream -----<
//!   answer to DMA_* -> outbox --/                       \--> inbox --> command --> DmaTarget --> outbox
//! ```
//!
//! Reading goes on while a message is being written: a server that is writing a request of its own reads nothing until
//! that is taken, and two ends that only write wait for each other for ever.
//!
//! # Invariants
//! - A reply is matched by id *and* command; replies may come in any order.
//! - No length is allocated for that is not bounded by what was negotiated.
//! - A request with no more data than [goes out whole](Connection::portion_bytes) is not cut by a SIGKILL of its sender:
//!   whoever takes the connection over finds the server in step. One request is under way at a time.
//! - A connection may be [taken over](Connection::adopt) from an owner that died; ids tell what was asked by whom.
//! - **A failure in the middle of anything is the end.** Once a byte of a request has gone out, only its whole reply
//!   tells what the device did. Where that does not come (the peer is gone, is late, or out of step), the connection
//!   is [broken](ConnectionError::Broken) for good, its socket shut down, and the device's state counts as lost.
//!
//! # Failure paths
//! [`ConnectionError`] says which. A refusal, a message that was too long to be sent and a reply whose body makes no
//! sense leave the connection usable: it is still in step. Time is the system's: a deadline here bounds I/O and
//! decides nothing about the device.

mod dma_target;
mod error;
mod ids;
mod inbox;
mod seek;
mod socket;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::Shutdown;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

pub use dma_target::{DmaTarget, NoMemory};
pub use error::{ConnectionError, PeerError};
pub use ids::Generation;

use self::ids::{Ids, LeftOver};
use self::inbox::{Inbox, Incoming};
use self::seek::Seeker;
use self::socket::{MAX_FDS, Received};
use super::codec::{
    Capabilities, Code, Command, DecodeError, Header, Kind, Limits, Negotiated, Reply, TooLong, Version,
    encode_error,
};

/// Answers to the server's own requests that may wait to be written. A server that asks on without reading its
/// answers is not read from until it does.
const MAX_QUEUED: usize = 8;

/// How long is waited for what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// For the whole of a call. `None`: for ever; whoever runs the call watches it.
    pub answer_within: Option<Duration>,
    /// For the rest of a message of which the first byte came or went.
    pub finish_within: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self { answer_within: None, finish_within: Duration::from_secs(30) }
    }
}

/// A request that was sent. Its answer must be waited for.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub struct Ticket {
    id: u16,
}

/// A successful answer.
#[derive(Debug)]
#[must_use]
pub struct Answer {
    code: Code,
    body: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Answer {
    /// What it says.
    pub fn reply(&self) -> Result<Reply<'_>, DecodeError> {
        Reply::decode(self.code, &self.body)
    }

    /// The file descriptors that came with it. Those that nobody takes are closed with the answer.
    pub fn into_fds(self) -> Vec<OwnedFd> {
        self.fds
    }
}

/// A message that is being written.
#[derive(Debug)]
struct Outgoing {
    bytes: Vec<u8>,
    sent: usize,
    fds: Vec<OwnedFd>,
}

/// A connection to a device process, with its version agreed on.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    timing: Timing,
    dma: Box<dyn DmaTarget>,
    negotiated: Negotiated,
    portion_bytes: u32,
    inbox: Inbox,
    /// When the first byte of the message in the inbox came.
    arriving_since: Option<Instant>,
    outbox: VecDeque<Outgoing>,
    /// When the first byte of the message at the head of the outbox went.
    leaving_since: Option<Instant>,
    /// Why nothing can be written any more, while what the peer said before is still read.
    unwritable: Option<io::Error>,
    ids: Ids,
    /// What answers earlier owners may still come: until the first answer to this one.
    left_over: Option<LeftOver>,
    /// Looks for that answer where an earlier owner may have left off in the middle of a message.
    seeker: Option<Seeker>,
    /// What was asked and not answered yet.
    asked: BTreeMap<u16, Code>,
    /// What was answered and not waited for yet.
    answers: BTreeMap<u16, Incoming>,
    broken: bool,
}

impl Connection {
    /// Agrees on a version with the server at the other end of `stream`.
    pub fn open(
        stream: UnixStream,
        ours: Capabilities,
        timing: Timing,
        dma: Box<dyn DmaTarget>,
    ) -> Result<Self, ConnectionError> {
        let max_fds = usize::try_from(ours.max_msg_fds).unwrap_or(MAX_FDS).min(MAX_FDS);
        let ours = Version::ours(Capabilities { max_msg_fds: max_fds as u64, ..ours });
        let nothing_yet = Negotiated {
            minor: ours.minor,
            limits: Limits::HANDSHAKE,
            peer_max_msg_fds: 0,
            migration_pgsize: None,
        };
        let mut connection = Self::new(stream, nothing_yet, max_fds, timing, dma);
        let answer = connection.call(&Command::Version(ours), &[])?;
        let reply = answer.reply().map_err(PeerError::from)?;
        let theirs = if let Reply::Version(theirs) = reply {
            theirs
        } else {
            // A bare header says nothing: a server with our version and the default capabilities.
            Version::ours(Capabilities::default())
        };
        connection.negotiated = ours.negotiate(&theirs).map_err(PeerError::from)?;
        connection.inbox.set_limits(connection.negotiated.limits);
        connection.make_room();
        Ok(connection)
    }

    /// Goes on where another owner of the same socket was stopped, which may have been in the middle of anything: what
    /// answers it is skipped until the first answer to this one. Nothing is sent or read yet. Whether the server is still
    /// in step shows in the first call: unless that is answered, the connection is broken.
    pub fn adopt(
        stream: UnixStream,
        negotiated: Negotiated,
        generation: Generation,
        max_fds: u64,
        timing: Timing,
        dma: Box<dyn DmaTarget>,
    ) -> Self {
        let max_fds = usize::try_from(max_fds).unwrap_or(MAX_FDS).min(MAX_FDS);
        let mut connection = Self {
            ids: Ids::of(generation),
            left_over: Some(LeftOver::within(negotiated.limits)),
            seeker: Some(Seeker::within(negotiated.limits)),
            ..Self::new(stream, negotiated, max_fds, timing, dma)
        };
        connection.make_room();
        connection
    }

    fn make_room(&mut self) {
        let limits = self.negotiated.limits;
        let largest = usize::try_from(limits.max_message_bytes()).unwrap_or(usize::MAX);
        match socket::make_room(&self.stream, largest) {
            Ok(whole) => {
                let whole = u32::try_from(whole).unwrap_or(u32::MAX);
                let data = whole.saturating_sub(Limits::OVERHEAD_BYTES).max(1);
                self.portion_bytes = data.min(limits.max_data_xfer_bytes());
            }
            Err(error) => tracing::debug!(%error, "how much goes out whole is not known"),
        }
    }

    /// The most data that one request should carry to the server: as much as was negotiated and goes out whole.
    pub fn portion_bytes(&self) -> u32 {
        self.portion_bytes
    }

    fn new(
        stream: UnixStream,
        negotiated: Negotiated,
        max_fds: usize,
        timing: Timing,
        dma: Box<dyn DmaTarget>,
    ) -> Self {
        Self {
            stream,
            timing,
            dma,
            negotiated,
            inbox: Inbox::new(negotiated.limits, max_fds),
            arriving_since: None,
            outbox: VecDeque::new(),
            leaving_since: None,
            unwritable: None,
            portion_bytes: negotiated.limits.max_data_xfer_bytes(),
            ids: Ids::of(Generation::default()),
            left_over: None,
            seeker: None,
            asked: BTreeMap::new(),
            answers: BTreeMap::new(),
            broken: false,
        }
    }

    /// A duplicate of the socket, close-on-exec: the server is not hung up on while it is open.
    pub fn duplicate_socket(&self) -> io::Result<OwnedFd> {
        self.stream.try_clone().map(Into::into)
    }

    /// Which owner of the socket this is.
    pub fn generation(&self) -> Generation {
        self.ids.generation()
    }

    /// Hangs up, for every holder of the socket: the server resets its device, if it is of the kind that does.
    pub fn hang_up(&mut self) {
        self.give_up();
    }

    /// Waits differently from now on.
    pub fn set_timing(&mut self, timing: Timing) {
        self.timing = timing;
    }

    /// What was agreed on.
    pub fn negotiated(&self) -> Negotiated {
        self.negotiated
    }

    /// How many file descriptors go with one message.
    pub fn fds_per_message(&self) -> usize {
        usize::try_from(self.negotiated.peer_max_msg_fds).unwrap_or(MAX_FDS).min(MAX_FDS)
    }

    /// Whether the connection was lost or is out of step: every later call fails without being made.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Asks and waits for the answer.
    pub fn call(&mut self, command: &Command<'_>, fds: &[BorrowedFd<'_>]) -> Result<Answer, ConnectionError> {
        let ticket = self.send(command, fds)?;
        self.wait(ticket)
    }

    /// Asks. Nothing may be written yet: that happens in [`wait`](Self::wait).
    pub fn send(&mut self, command: &Command<'_>, fds: &[BorrowedFd<'_>]) -> Result<Ticket, ConnectionError> {
        if self.broken {
            return Err(ConnectionError::Broken);
        }
        let limit = self.negotiated.peer_max_msg_fds.min(MAX_FDS as u64);
        if fds.len() as u64 > limit {
            return Err(ConnectionError::TooManyFds { given: fds.len(), limit });
        }
        let id = self.free_id();
        let bytes = command.encode(id, false, self.negotiated.limits)?;
        let fds = fds.iter().map(BorrowedFd::try_clone_to_owned).collect::<io::Result<_>>();
        let fds = fds.map_err(ConnectionError::Fd)?;
        self.asked.insert(id, command.code());
        self.outbox.push_back(Outgoing { bytes, sent: 0, fds });
        Ok(Ticket { id })
    }

    /// Waits for the answer to one request, in whatever order answers come.
    pub fn wait(&mut self, ticket: Ticket) -> Result<Answer, ConnectionError> {
        if self.broken {
            return Err(ConnectionError::Broken);
        }
        let deadline = self.timing.answer_within.and_then(|within| Instant::now().checked_add(within));
        let incoming = self.run_until_answered(ticket.id, deadline).inspect_err(|_| self.give_up())?;
        match incoming.header.kind {
            Kind::ErrorReply { errno } => {
                Err(ConnectionError::Refused { source: io::Error::from_raw_os_error(errno) })
            }
            Kind::Reply | Kind::Command { .. } => {
                Ok(Answer { code: incoming.header.code, body: incoming.body, fds: incoming.fds })
            }
        }
    }

    fn free_id(&mut self) -> u16 {
        loop {
            let id = self.ids.next();
            // Far fewer than 4096 requests are ever under way: each has a caller that waits.
            if !self.asked.contains_key(&id) && !self.answers.contains_key(&id) {
                return id;
            }
        }
    }

    /// Nobody can tell any more what the device did: the end of the connection.
    fn give_up(&mut self) {
        self.broken = true;
        self.outbox.clear();
        self.asked.clear();
        self.answers.clear();
        if let Err(error) = self.stream.shutdown(Shutdown::Both) {
            tracing::debug!(%error, "shutting down a broken connection");
        }
    }

    /// Reads and writes until one answer is there, and then until everything is written. That the latter fails takes
    /// nothing from the answer; it is the end of the connection all the same.
    fn run_until_answered(
        &mut self,
        id: u16,
        deadline: Option<Instant>,
    ) -> Result<Incoming, ConnectionError> {
        let answer = loop {
            if let Some(answer) = self.answers.remove(&id) {
                break answer;
            }
            self.step(deadline)?;
        };
        while !self.outbox.is_empty() {
            if let Err(error) = self.step(deadline) {
                tracing::debug!(%error, "lost after the answer came");
                self.give_up();
            }
        }
        if self.unwritable.is_some() {
            self.give_up();
        }
        Ok(answer)
    }

    /// Waits for something to read or write, and does it.
    fn step(&mut self, deadline: Option<Instant>) -> Result<(), ConnectionError> {
        let begun = [self.arriving_since, self.leaving_since].into_iter().flatten();
        let stalled = begun.filter_map(|since| since.checked_add(self.timing.finish_within));
        let until = stalled.chain(deadline).min();
        let wants_in = self.outbox.len() <= MAX_QUEUED;
        let ready = socket::wait(&self.stream, wants_in, !self.outbox.is_empty(), until)
            .map_err(ConnectionError::Lost)?
            .ok_or_else(|| ConnectionError::lost(libc::ETIMEDOUT))?;
        // Read first: what a peer said before it went away is still there, and says more than EPIPE.
        if ready.readable && wants_in {
            self.read_some()?;
        }
        if ready.writable {
            self.write_some();
        }
        Ok(())
    }

    fn write_some(&mut self) {
        let Some(first) = self.outbox.front_mut() else { return };
        let fds = if first.sent == 0 { first.fds.as_slice() } else { &[] };
        let sent = socket::send(&self.stream, &first.bytes[first.sent..], fds);
        match sent {
            Ok(sent) => first.sent += sent.unwrap_or(0),
            Err(error) => {
                // What the peer said before is read to its end all the same, but not waited for for ever.
                self.unwritable = Some(error);
                self.leaving_since = Some(Instant::now());
                self.outbox.clear();
                return;
            }
        }
        if first.sent == first.bytes.len() {
            self.outbox.pop_front();
            self.leaving_since = None;
        } else if first.sent > 0 && self.leaving_since.is_none() {
            self.leaving_since = Some(Instant::now());
        }
    }

    fn read_some(&mut self) -> Result<(), ConnectionError> {
        let received = socket::receive(&self.stream, self.inbox.room()).map_err(ConnectionError::Lost)?;
        let (bytes, fds) = match received {
            Received::Bytes(bytes, fds) => (bytes, fds),
            Received::Nothing => return Ok(()),
            Received::End => {
                let reset = || io::Error::from_raw_os_error(libc::ECONNRESET);
                return Err(ConnectionError::Lost(self.unwritable.take().unwrap_or_else(reset)));
            }
            Received::TooManyFds => return Err(PeerError::TooManyFds { limit: MAX_FDS }.into()),
        };
        if self.seek(bytes)? {
            return Ok(());
        }
        let message = match self.inbox.advance(bytes, fds) {
            // In the middle of a message, which reads like anything.
            Err(PeerError::Message(error)) if self.seeker.is_some() => {
                tracing::debug!(%error, "an earlier owner of the connection left off in the middle of a message");
                self.inbox.restart();
                None
            }
            message => message?,
        };
        if !self.inbox.is_within_message() {
            self.arriving_since = None;
        } else if self.arriving_since.is_none() {
            self.arriving_since = Some(Instant::now());
        }
        message.map_or(Ok(()), |message| self.take(message))
    }

    /// Looks for the first answer to this owner in what came. Where it is found, whatever was being put together was not
    /// what it looked like.
    fn seek(&mut self, bytes: usize) -> Result<bool, ConnectionError> {
        let Some(seeker) = &mut self.seeker else { return Ok(false) };
        let came = &self.inbox.room()[..bytes];
        let asked = &self.asked;
        let is_answer = |header: &Header| asked.get(&header.id) == Some(&header.code);
        let Some((answer, rest)) = seeker.look(came, is_answer)? else { return Ok(false) };
        self.inbox.restart();
        self.arriving_since = None;
        self.take(answer)?;
        let mut rest = rest.as_slice();
        while !rest.is_empty() {
            let room = self.inbox.room();
            let (now, later) = rest.split_at(rest.len().min(room.len()));
            room[..now.len()].copy_from_slice(now);
            rest = later;
            if let Some(message) = self.inbox.advance(now.len(), Vec::new())? {
                self.take(message)?;
            }
        }
        Ok(true)
    }

    /// A whole message came.
    fn take(&mut self, message: Incoming) -> Result<(), ConnectionError> {
        let (id, answered) = (message.header.id, message.header.code);
        match message.header.kind {
            Kind::Command { no_reply } => {
                let answer = self.serve(&message)?;
                if !no_reply && self.unwritable.is_none() {
                    self.outbox.push_back(Outgoing { bytes: answer, sent: 0, fds: Vec::new() });
                }
                Ok(())
            }
            Kind::Reply | Kind::ErrorReply { .. } => match self.asked.remove(&id) {
                None if !self.ids.has(id) && self.left_over.is_some() => {
                    tracing::debug!(id, ?answered, "skipped what answers an earlier owner of the connection");
                    self.left_over.as_mut().map_or(Ok(()), |left| left.skip(&message.header))?;
                    Ok(())
                }
                None => Err(PeerError::UnknownReply { id }.into()),
                Some(asked) if asked != answered => {
                    Err(PeerError::WrongCommand { id, asked, answered }.into())
                }
                Some(_) => {
                    self.left_over = None;
                    self.seeker = None;
                    self.answers.insert(id, message);
                    Ok(())
                }
            },
        }
    }

    /// What the server asks of this end: memory. Anything else it is refused, in step.
    fn serve(&mut self, message: &Incoming) -> Result<Vec<u8>, TooLong> {
        let (id, code, limits) = (message.header.id, message.header.code, self.negotiated.limits);
        let refuse = |errno| {
            tracing::debug!(id, ?code, errno, "refused a request of the device's process");
            Ok(encode_error(id, code, errno))
        };
        match Command::decode(code, &message.body) {
            Ok(Command::DmaRead { iova, count }) => {
                if count > u64::from(limits.max_data_xfer_bytes()) {
                    return refuse(libc::EINVAL);
                }
                let mut buffer = vec![0; usize::try_from(count).unwrap_or(0)];
                match self.dma.read(iova, &mut buffer) {
                    Ok(()) => Reply::DmaRead { iova, data: &buffer }.encode(id, limits),
                    Err(errno) => refuse(errno),
                }
            }
            Ok(Command::DmaWrite { iova, data }) => match self.dma.write(iova, data) {
                Ok(()) => Reply::DmaWrite { iova, count: data.len() as u64 }.encode(id, limits),
                Err(errno) => refuse(errno),
            },
            Ok(
                Command::Version(_)
                | Command::DmaMap(_)
                | Command::DmaUnmap(_)
                | Command::GetInfo { .. }
                | Command::GetRegionInfo { .. }
                | Command::GetIrqInfo { .. }
                | Command::SetIrqs(_)
                | Command::RegionRead { .. }
                | Command::RegionWrite { .. }
                | Command::Reset
                | Command::Feature(_)
                | Command::MigDataRead { .. }
                | Command::MigDataWrite { .. }
                | Command::Other { .. },
            )
            | Err(_) => refuse(libc::EINVAL),
        }
    }
}
