//! Who may talk to the device: one connection at a time, each on its own thread.
//!
//! ```text
//!              accept                      the device goes into the thread with the connection
//!   listener ---------> seat free?  yes -> talk ............ ends: the device comes back, put to rights
//!                          | no
//!                          v
//!                  has its holder hung up?  yes -> waits for the seat   (one may wait)
//!                                           no  -> closed at once
//! ```
//!
//! The thread that accepts never calls the device, so it refuses and stops at once whatever the device does.
//!
//! # Invariants
//! - Nobody talks to the device before everything that the connection before left behind is cleared away.
//! - A connection that ended is never in the way of the next: a client that closed and connects again is served.
//!
//! # Failure paths
//! - Out of descriptors: accepting goes on once the connection under way has ended; where there is none it is an error.
//! - A device call that never returns holds the seat for ever, and a stop waits for it. End the process then.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use super::connection::{self, Ended};
use super::{ServeError, ServerOptions};
use crate::MigrationDevice;

/// What wakes the thread that accepts: a stop was asked for, or a connection ended.
#[derive(Debug)]
pub(super) struct Bell {
    eventfd: OwnedFd,
    stop: AtomicBool,
}

impl Bell {
    pub(super) fn new() -> io::Result<Self> {
        let eventfd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { eventfd, stop: AtomicBool::new(false) })
    }

    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.ring();
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    fn ring(&self) {
        // It fails only where 2^64 - 2 rings were not heard, and then it rings already.
        let _ = rustix::io::write(&self.eventfd, &1_u64.to_ne_bytes());
    }

    fn silence(&self) {
        // It fails only where it does not ring.
        let _ = rustix::io::read(&self.eventfd, &mut [0; 8]);
    }
}

/// Rings when its thread ends, also by a panic.
struct RingAtEnd {
    bell: Arc<Bell>,
    ended: Arc<AtomicBool>,
}

impl Drop for RingAtEnd {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Release);
        self.bell.ring();
    }
}

/// The place that one connection has at a time.
enum Seat {
    Free(Box<dyn MigrationDevice>),
    Taken(Visit),
}

/// A connection under way.
struct Visit {
    stream: Arc<UnixStream>,
    ended: Arc<AtomicBool>,
    thread: JoinHandle<Ended>,
}

impl Visit {
    fn begin(
        device: Box<dyn MigrationDevice>,
        stream: UnixStream,
        options: &ServerOptions,
        bell: &Arc<Bell>,
    ) -> Result<Self, ServeError> {
        let (stream, ended) = (Arc::new(stream), Arc::new(AtomicBool::new(false)));
        let at_end = RingAtEnd { bell: Arc::clone(bell), ended: Arc::clone(&ended) };
        let (talk, options) = (Arc::clone(&stream), options.clone());
        let thread = thread::Builder::new()
            .name("vfio-user".to_owned())
            .spawn(move || {
                let _at_end = at_end;
                connection::talk(device, &talk, &options)
            })
            .map_err(ServeError::Thread)?;
        Ok(Self { stream, ended, thread })
    }

    fn join(self) -> Result<Ended, ServeError> {
        self.thread.join().map_err(|_panic| ServeError::Panicked)
    }
}

/// Lets connections in until it is told to stop, or after the first where that is asked for. Returns the device.
pub(super) fn attend(
    device: Box<dyn MigrationDevice>,
    listener: &UnixListener,
    options: &ServerOptions,
    bell: &Arc<Bell>,
) -> Result<Box<dyn MigrationDevice>, ServeError> {
    listener.set_nonblocking(true).map_err(ServeError::Accept)?;
    let mut seat = Seat::Free(device);
    let mut next: Option<UnixStream> = None;
    // Cleared while there is no descriptor to accept with.
    let mut accepting = true;
    loop {
        seat = match seat {
            Seat::Taken(visit) if bell.stopped() => {
                // The thread finds its connection at its end after the device call that it is in.
                hang_up(&visit.stream);
                return Ok(visit.join()?.device);
            }
            Seat::Free(device) if bell.stopped() => return Ok(device),
            Seat::Taken(visit) if visit.ended.load(Ordering::Acquire) => {
                let ended = visit.join()?;
                accepting = true;
                if options.once && ended.negotiated {
                    return Ok(ended.device);
                }
                continue_with(Seat::Free(ended.device), &mut next, options, bell)?
            }
            seat @ (Seat::Taken(_) | Seat::Free(_)) => continue_with(seat, &mut next, options, bell)?,
        };
        wait(listener, accepting, bell)?;
        bell.silence();
        if !accepting {
            continue;
        }
        match accept(listener) {
            Ok(None) => {}
            Ok(Some(stream)) => admit(&seat, &mut next, stream),
            Err(errno @ (Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM)) => match &seat {
                Seat::Taken(_) => accepting = false,
                Seat::Free(_) => return Err(ServeError::Accept(errno.into())),
            },
            Err(errno) => return Err(ServeError::Accept(errno.into())),
        }
    }
}

/// Gives a free seat to who waits for it.
fn continue_with(
    seat: Seat,
    next: &mut Option<UnixStream>,
    options: &ServerOptions,
    bell: &Arc<Bell>,
) -> Result<Seat, ServeError> {
    match (seat, next.take()) {
        (Seat::Free(device), Some(stream)) => Ok(Seat::Taken(Visit::begin(device, stream, options, bell)?)),
        (seat, waiting) => {
            *next = waiting;
            Ok(seat)
        }
    }
}

/// Lets a new connection wait for the seat, or closes it.
fn admit(seat: &Seat, next: &mut Option<UnixStream>, stream: UnixStream) {
    let seat_promised = match seat {
        Seat::Free(_) => false,
        Seat::Taken(visit) => !has_hung_up(&visit.stream),
    };
    let somebody_waits = next.as_ref().is_some_and(|waiting| !has_hung_up(waiting));
    if seat_promised || somebody_waits {
        tracing::debug!("refused a connection: another is served");
        hang_up(&stream);
    } else {
        *next = Some(stream);
    }
}

fn hang_up(stream: &UnixStream) {
    // It fails only where the peer was faster.
    let _ = stream.shutdown(std::net::Shutdown::Both);
}

/// Whether a connection's peer is gone, whatever it may have sent before.
fn has_hung_up(stream: &UnixStream) -> bool {
    let mut polled = [PollFd::new(stream, PollFlags::RDHUP)];
    // Where the system does not say, the connection counts as alive.
    rustix::event::poll(&mut polled, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}

/// Waits until the bell rings or somebody connects.
fn wait(listener: &UnixListener, accepting: bool, bell: &Bell) -> Result<(), ServeError> {
    let mut polled = [PollFd::new(&bell.eventfd, PollFlags::IN), PollFd::new(listener, PollFlags::IN)];
    let polled = if accepting { &mut polled[..] } else { &mut polled[..1] };
    match rustix::event::poll(polled, None) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(errno) => Err(ServeError::Accept(errno.into())),
    }
}

/// The next connection, if there is one. A connection that was given up before it was accepted is none.
fn accept(listener: &UnixListener) -> Result<Option<UnixStream>, Errno> {
    match rustix::net::accept_with(listener.as_fd(), rustix::net::SocketFlags::CLOEXEC) {
        Ok(stream) => Ok(Some(UnixStream::from(stream))),
        Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => Ok(None),
        Err(errno) => Err(errno),
    }
}
