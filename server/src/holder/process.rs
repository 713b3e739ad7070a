//! The holder's loop: one thread, no async, nothing that waits but `poll`.
//!
//! ```text
//!   poll: signals | listener | the agent | connections that did not say yet who they are
//!     listener  -> of this uid or root?  -> waits for its Hello, not for long
//!     Hello     -> is there an agent that lives?  yes: Busy   no: it is the agent now
//!     agent     -> one packet -> Shelf -> one reply
//! ```
//!
//! # Invariants
//! - An agent that is gone is served to its last packet before another takes its place: what it put is held.
//! - Held fds are not in the poll set, and nothing is done with them but duplicating and closing.
//! - Nobody is waited for: a reply that does not fit into the agent's socket ends the connection.
//!
//! # Failure paths
//! Trouble with one connection closes it and is logged. [`HolderError`] is trouble before the first connection, or with
//! `poll` itself.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use vfio_checkpoint_device::chain;

use super::label::Label;
use super::packet::{self, Received};
use super::protocol::{MAX_FDS, ProtocolError, Refusal, Reply, Request, VERSION};
use super::shelf::Shelf;
use super::socket::{Listener, SocketError};

/// Connections that did not say yet who they are.
const MAX_WAITING: usize = 8;
/// How long one may take to say so.
const HELLO_WITHIN: Duration = Duration::from_secs(5);
/// How long nobody is accepted after accepting failed, for example for want of fds.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// What the holder has open for itself: standard streams, socket, lock, signals, connections, one packet's fds; doubled.
const OWN_FDS: usize = 64;
/// What a device has, a kernel device at least: its own file, and its container's or iommufd's.
const FDS_PER_DEVICE: usize = 2;

/// How to hold.
#[derive(Debug, Clone)]
pub struct HolderOptions {
    /// Where to listen: in a folder of this user's alone.
    pub socket: PathBuf,
    /// How many devices may be held.
    pub max_devices: usize,
}

impl HolderOptions {
    /// Devices that may be held where nothing else is said.
    pub const DEFAULT_MAX_DEVICES: usize = 1024;

    /// With the default limits.
    pub fn at(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into(), max_devices: Self::DEFAULT_MAX_DEVICES }
    }
}

/// Why the holder does not hold.
#[derive(Debug, thiserror::Error)]
pub enum HolderError {
    /// The socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// This process may not keep as many files open as the devices would need.
    #[error(
        "{max_devices} devices need {needed} open files, and this process may have {limit}; raise its hard limit \
         (LimitNOFILE, ulimit -Hn), or lower --max-devices"
    )]
    TooFewFiles {
        /// How many devices.
        max_devices: usize,
        /// How many files they need.
        needed: usize,
        /// How many there may be.
        limit: usize,
    },
    /// Signals cannot be caught.
    #[error("cannot catch SIGTERM, SIGINT and SIGHUP")]
    Signals(#[source] io::Error),
    /// Waiting failed.
    #[error("cannot wait for connections")]
    Poll(#[source] io::Error),
}

/// Holds until SIGTERM, SIGINT or SIGHUP. Meant to be all that its process does: it catches these signals and raises the
/// process' limit of open files as far as it may.
pub fn run(options: HolderOptions) -> Result<(), HolderError> {
    let max_fds = room_for_files(options.max_devices)?;
    // Signals are caught before there is a socket that one of them could leave behind.
    let signals = signals().map_err(HolderError::Signals)?;
    let listener = Listener::bind(&options.socket)?;
    tracing::info!(
        socket = %options.socket.display(), max_devices = options.max_devices, max_fds, "holding"
    );
    let mut holder = Holder {
        listener,
        shelf: Shelf::new(options.max_devices, max_fds),
        agent: None,
        waiting: Vec::new(),
        accept_from: Instant::now(),
    };
    holder.serve(&signals)?;
    holder.say_goodbye();
    Ok(())
}

/// Raises the limit of open files and says how many held devices may have.
fn room_for_files(max_devices: usize) -> Result<usize, HolderError> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })
    {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
    let limit = getrlimit(Resource::Nofile).current;
    let limit = limit.map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX));
    let needed = max_devices.saturating_mul(FDS_PER_DEVICE).saturating_add(OWN_FDS);
    if limit < needed {
        return Err(HolderError::TooFewFiles { max_devices, needed, limit });
    }
    Ok((limit - OWN_FDS).min(max_devices.saturating_mul(MAX_FDS)))
}

fn signals() -> io::Result<UnixStream> {
    let (reader, writer) = UnixStream::pair()?;
    for signal in [SIGTERM, SIGINT, SIGHUP] {
        signal_hook::low_level::pipe::register(signal, writer.try_clone()?)?;
    }
    Ok(reader)
}

/// A connection, and who is at the other end.
#[derive(Debug)]
struct Peer {
    socket: OwnedFd,
    pid: u32,
}

/// One that did not say yet who it is.
#[derive(Debug)]
struct Waiting {
    peer: Peer,
    until: Instant,
}

/// What became of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kept {
    Yes,
    No,
}

#[derive(Debug)]
struct Holder {
    listener: Listener,
    shelf: Shelf,
    agent: Option<Peer>,
    waiting: Vec<Waiting>,
    /// Nobody is accepted before.
    accept_from: Instant,
}

/// What `poll` said.
#[derive(Debug)]
struct Ready {
    signal: bool,
    listener: bool,
    agent: bool,
    waiting: Vec<bool>,
}

impl Holder {
    fn serve(&mut self, signals: &UnixStream) -> Result<(), HolderError> {
        loop {
            let ready = self.wait(signals).map_err(HolderError::Poll)?;
            if ready.signal {
                return Ok(());
            }
            if ready.agent {
                self.serve_agent();
            }
            self.greet(&ready.waiting);
            if ready.listener {
                self.accept();
            }
        }
    }

    fn wait(&self, signals: &UnixStream) -> io::Result<Ready> {
        let now = Instant::now();
        let may_accept = now >= self.accept_from;
        let mut fds = vec![PollFd::new(signals, PollFlags::IN)];
        // Without flags nothing but errors is reported.
        let wanted = if may_accept { PollFlags::IN } else { PollFlags::empty() };
        fds.push(PollFd::new(&self.listener, wanted));
        fds.extend(self.waiting.iter().map(|waiting| PollFd::new(&waiting.peer.socket, PollFlags::IN)));
        fds.extend(self.agent.iter().map(|agent| PollFd::new(&agent.socket, PollFlags::IN)));

        let pause = (!may_accept).then_some(self.accept_from);
        let until = self.waiting.iter().map(|waiting| waiting.until).chain(pause).min();
        let timeout = until.map(|until| {
            // Rounded up, so that what is waited for has passed when poll returns.
            until.saturating_duration_since(now) + Duration::from_millis(1)
        });
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let mut happened = fds.iter().map(|fd| !fd.revents().is_empty());
        let mut next = || happened.next().unwrap_or(false);
        Ok(Ready {
            signal: next(),
            listener: next(),
            waiting: self.waiting.iter().map(|_| next()).collect(),
            agent: self.agent.is_some() && next(),
        })
    }

    fn accept(&mut self) {
        let socket = match self.listener.accept() {
            Ok(Some(socket)) => socket,
            Ok(None) => return,
            Err(error) => {
                tracing::error!(%error, "cannot accept a connection; trying again in a moment");
                self.accept_from = Instant::now() + ACCEPT_PAUSE;
                return;
            }
        };
        let peer = match rustix::net::sockopt::socket_peercred(&socket) {
            Ok(peer) => peer,
            Err(error) => {
                tracing::warn!(%error, "refused a connection: the kernel does not say whose it is");
                return;
            }
        };
        if !peer.uid.is_root() && peer.uid != rustix::process::geteuid() {
            tracing::warn!(uid = peer.uid.as_raw(), "refused a connection of another user");
            return;
        }
        if self.waiting.len() >= MAX_WAITING {
            // The one that had the most time. Whoever means it says who it is at once.
            let silent = self.waiting.remove(0);
            tracing::warn!(pid = silent.peer.pid, "hung up: too many connections do not say who they are");
        }
        let pid = peer.pid.as_raw_nonzero().get().unsigned_abs();
        self.waiting.push(Waiting { peer: Peer { socket, pid }, until: Instant::now() + HELLO_WITHIN });
    }

    /// Hears connections that did not say yet who they are, and hangs up on those that take too long.
    fn greet(&mut self, ready: &[bool]) {
        let now = Instant::now();
        let waiting = std::mem::take(&mut self.waiting);
        for (waiting, ready) in waiting.into_iter().zip(ready) {
            if *ready {
                self.hear(waiting);
            } else if now >= waiting.until {
                tracing::warn!(pid = waiting.peer.pid, "hung up: it did not say who it is");
            } else {
                self.waiting.push(waiting);
            }
        }
    }

    fn hear(&mut self, Waiting { peer, until }: Waiting) {
        let request = match receive(&peer) {
            Heard::Request(request, _) => request,
            Heard::Nothing => {
                // Woken for nothing; it has said nothing yet.
                self.waiting.push(Waiting { peer, until });
                return;
            }
            Heard::End => return,
        };
        let refusal = match request {
            Request::Hello { version: VERSION, pid } => match self.living_agent() {
                None => {
                    tracing::info!(
                        pid = peer.pid,
                        own_pid = pid,
                        held = self.shelf.len(),
                        "an agent connected"
                    );
                    let welcome = Reply::Welcome { version: VERSION, held: self.shelf.len() as u64 };
                    if reply(&peer, &welcome, &[]) == Kept::Yes {
                        self.agent = Some(peer);
                    }
                    return;
                }
                Some(agent) => Refusal::Busy { pid: agent },
            },
            Request::Hello { .. } => Refusal::Version { holder: VERSION },
            Request::Put { .. } | Request::List { .. } | Request::Take { .. } | Request::Drop { .. } => {
                malformed(&ProtocolError::OutOfTurn("the first message must be a hello"))
            }
        };
        tracing::warn!(pid = peer.pid, %refusal, "refused a connection");
        reply(&peer, &Reply::Refused(refusal), &[]);
    }

    /// The process of the agent, if there is one and it lives. One that is gone is served to its end first.
    fn living_agent(&mut self) -> Option<u32> {
        while let Some(agent) = &self.agent {
            if !is_hung_up(agent.socket.as_fd()) {
                return Some(agent.pid);
            }
            self.serve_agent();
        }
        None
    }

    /// One packet of the agent's.
    fn serve_agent(&mut self) {
        let Some(agent) = self.agent.take() else { return };
        let kept = match receive(&agent) {
            Heard::Request(request, fds) => self.answer(&agent, request, fds),
            Heard::Nothing => Kept::Yes,
            Heard::End => Kept::No,
        };
        match kept {
            Kept::Yes => self.agent = Some(agent),
            Kept::No => {
                tracing::info!(pid = agent.pid, held = self.shelf.len(), "the agent's connection is over");
            }
        }
    }

    fn answer(&mut self, agent: &Peer, request: Request, fds: Vec<OwnedFd>) -> Kept {
        match request {
            Request::Hello { .. } => {
                let refusal = malformed(&ProtocolError::OutOfTurn("only the first message is a hello"));
                reply(agent, &Reply::Refused(refusal), &[])
            }
            Request::Put { label } => {
                let (key, count) = (label.key.clone(), fds.len());
                match self.shelf.put(*label, fds) {
                    Ok(old) => {
                        tracing::info!(%key, fds = count, replaced = old.is_some(), "holding a device");
                        let stored = Reply::Stored { replaced: old.is_some() };
                        // Answered first: closing may reset a device and take its time.
                        let kept = reply(agent, &stored, &[]);
                        drop(old);
                        kept
                    }
                    Err(refusal) => {
                        tracing::warn!(%key, fds = count, %refusal, "refused a device");
                        reply(agent, &Reply::Refused(refusal), &[])
                    }
                }
            }
            Request::List { after } => match Reply::page(self.shelf.labels(after.as_ref())) {
                Ok(page) => reply(agent, &page, &[]),
                Err(error) => reply(agent, &Reply::Refused(malformed(&error)), &[]),
            },
            Request::Take { key } => {
                let Some(held) = self.shelf.get_mut(&key) else {
                    return reply(agent, &Reply::Refused(Refusal::NotHeld { key }), &[]);
                };
                let taken = Reply::Taken { label: Box::new(held.label.clone()), handed_out: held.handed_out };
                // Counted before: whether it arrived is not known.
                held.handed_out = held.handed_out.saturating_add(1);
                let fds: Vec<BorrowedFd<'_>> = held.fds.iter().map(AsFd::as_fd).collect();
                tracing::info!(%key, fds = fds.len(), "handing out a device");
                reply(agent, &taken, &fds)
            }
            Request::Drop { key } => {
                let held = self.shelf.remove(&key);
                tracing::info!(%key, existed = held.is_some(), "letting go of a device");
                let existed = held.is_some();
                // Closed first: who is told that it is dropped may open it anew.
                drop(held);
                reply(agent, &Reply::Dropped { existed }, &[])
            }
        }
    }

    /// Says what ends with this process.
    fn say_goodbye(&self) {
        for Label { key, address, .. } in self.shelf.labels(None) {
            tracing::warn!(%key, ?address, "letting go; the last close resets it unless an agent has it open");
        }
        tracing::info!(held = self.shelf.len(), "ending");
    }
}

fn is_hung_up(socket: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(socket, PollFlags::RDHUP)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    match rustix::event::poll(&mut fds, Some(&now)) {
        Ok(_) => !fds[0].revents().is_empty(),
        Err(_) => false,
    }
}

/// What a peer said.
#[derive(Debug)]
enum Heard {
    Request(Request, Vec<OwnedFd>),
    Nothing,
    /// The connection is over, for a reason that was logged and told.
    End,
}

/// The next request of a peer.
fn receive(peer: &Peer) -> Heard {
    let error = match packet::receive(peer.socket.as_fd()) {
        Ok(Received::Packet(bytes, fds)) => match Request::decode(&bytes, fds.len()) {
            Ok(request) => return Heard::Request(request, fds),
            Err(error) => error,
        },
        Ok(Received::TooLong) => ProtocolError::TooLong,
        Ok(Received::TooManyFds) => ProtocolError::TooManyFds,
        Ok(Received::Nothing) => return Heard::Nothing,
        Ok(Received::End) => return Heard::End,
        Err(error) => {
            tracing::warn!(pid = peer.pid, %error, "cannot read from a connection");
            return Heard::End;
        }
    };
    let refusal = malformed(&error);
    tracing::warn!(pid = peer.pid, %refusal, "hung up");
    reply(peer, &Reply::Refused(refusal), &[]);
    Heard::End
}

fn malformed(error: &ProtocolError) -> Refusal {
    Refusal::Malformed { reason: chain(error) }
}

/// Answers, and says whether the connection goes on.
fn reply(peer: &Peer, reply: &Reply, fds: &[BorrowedFd<'_>]) -> Kept {
    let sent = match reply.encode() {
        Ok(packet) => packet::send(peer.socket.as_fd(), &packet, fds),
        Err(error) => Err(io::Error::other(error)),
    };
    let over = matches!(reply, Reply::Refused(refusal) if refusal.is_final());
    match sent {
        Ok(true) if !over => Kept::Yes,
        Ok(true) => Kept::No,
        Ok(false) => {
            tracing::warn!(pid = peer.pid, "hung up: it does not read its answers");
            Kept::No
        }
        Err(error) => {
            // A peer that is gone already is served to its last request all the same.
            tracing::debug!(pid = peer.pid, %error, "an answer was not taken");
            Kept::Yes
        }
    }
}
