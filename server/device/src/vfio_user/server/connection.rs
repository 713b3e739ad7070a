//! One connection, from its first message to the state in which the device is left behind.
//!
//! ```text
//!   VERSION --agreed--> command -> reply -> command -> reply ... -> end -> what the client left is cleared away
//!      |                                                             |
//!      '-- anything else: refused, closed, device untouched          '-- then closed, and not before
//! ```
//!
//! # Invariants
//! - The device is not called before a version was agreed on, so whoever only looks whether somebody listens changes
//!   nothing.
//! - A command is answered before the next one is read; one that wants no reply gets none, not even of its failure.
//! - A client that sees the connection closed and connects again finds the device put to rights.
//!
//! # Failure paths
//! What is wrong *within* a message is answered with an errno. Where the next message begins is unknown after a header
//! that is none or a message that was cut short: the connection ends.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::io::Errno;

use super::ServerOptions;
use super::session::Session;
use super::wire::{self, Incoming, MAX_MSG_FDS, Message, Receiver, WireError};
use crate::vfio_user::codec::{Capabilities, Command, Header, Kind, Limits, Reply, Version, encode_error};
use crate::{MigrationDevice, chain};

/// What a connection leaves.
pub(super) struct Ended {
    pub(super) device: Box<dyn MigrationDevice>,
    /// Whether a version was agreed on: whether it was a client at all.
    pub(super) negotiated: bool,
}

/// Serves one connection until it ends, and clears away what it leaves behind.
pub(super) fn talk(
    mut device: Box<dyn MigrationDevice>,
    stream: &UnixStream,
    options: &ServerOptions,
) -> Ended {
    let mut receiver = Receiver::new(stream);
    let negotiated = match negotiate(&mut receiver, stream, options) {
        Ok(Some(limits)) => {
            tracing::info!(device = %device.identity(), "a client has attached");
            let mut session = Session::begin(&mut *device, options, limits);
            match converse(&mut receiver, stream, &mut session, options.limits) {
                Ok(()) => tracing::info!("the client hung up"),
                Err(error) => tracing::warn!(error = chain(&error), "the connection was lost"),
            }
            session.end();
            true
        }
        Ok(None) => false,
        Err(error) => {
            tracing::debug!(error = chain(&error), "a connection ended before a version was agreed on");
            false
        }
    };
    // It fails only where the peer was faster.
    let _ = stream.shutdown(Shutdown::Both);
    Ended { device, negotiated }
}

/// The first exchange. `None` where it came to nothing, which the peer was told.
fn negotiate(
    receiver: &mut Receiver<'_>,
    stream: &UnixStream,
    options: &ServerOptions,
) -> Result<Option<Limits>, WireError> {
    // A connection that says nothing must not keep others away.
    receiver.set_deadline(Instant::now().checked_add(options.handshake_timeout))?;
    let Incoming::Message(message) = receiver.receive(Limits::HANDSHAKE)? else { return Ok(None) };
    let Header { id, code, .. } = message.header;
    let ours = Version::ours(Capabilities {
        max_msg_fds: MAX_MSG_FDS as u64,
        max_data_xfer_bytes: options.limits.max_data_xfer_bytes().into(),
        max_dma_maps: options.max_dma_windows as u64,
        migration_pgsize: Some(MIGRATION_PAGE_BYTES),
        ..Capabilities::default()
    });
    let agreed = match (message.header.kind, Command::decode(code, receiver.body())) {
        (Kind::Command { .. }, Ok(Command::Version(theirs))) if no_fds(&message) => {
            ours.negotiate(&theirs).map_err(|error| error.to_string())
        }
        (Kind::Command { .. } | Kind::Reply | Kind::ErrorReply { .. }, Ok(_)) => {
            Err("the first message is not a version".to_owned())
        }
        (Kind::Command { .. } | Kind::Reply | Kind::ErrorReply { .. }, Err(error)) => Err(error.to_string()),
    };
    let reply = agreed.and_then(|agreed| {
        let answer = Reply::Version(ours.answer(&agreed)).encode(id, Limits::HANDSHAKE);
        answer.map(|answer| (answer, agreed.limits)).map_err(|error| error.to_string())
    });
    let (reply, limits) = match reply {
        Ok((reply, limits)) => (reply, Some(limits)),
        Err(reason) => {
            tracing::debug!(reason, "refused a client");
            (encode_error(id, code, Errno::INVAL.raw_os_error()), None)
        }
    };
    if wants_reply(message.header.kind) {
        wire::send(stream, &reply)?;
    }
    receiver.set_deadline(None)?;
    Ok(limits)
}

/// Page size of dirty bitmaps that the server names: the least that any log has.
const MIGRATION_PAGE_BYTES: u64 = 4096;

/// Answers commands until the peer hangs up. `limits` are this end's own, of what it takes: a client that can receive
/// little may still send as much as it was told.
fn converse(
    receiver: &mut Receiver<'_>,
    stream: &UnixStream,
    session: &mut Session<'_>,
    limits: Limits,
) -> Result<(), WireError> {
    loop {
        let Incoming::Message(message) = receiver.receive(limits)? else { return Ok(()) };
        let Header { id, code, kind, .. } = message.header;
        match kind {
            Kind::Command { .. } => {}
            // This server asks nothing, so there is nothing to answer.
            Kind::Reply | Kind::ErrorReply { .. } => {
                tracing::debug!(?code, "passed over a reply that nobody asked for");
                continue;
            }
        }
        let answer = if message.fds_lost {
            Err(Errno::INVAL)
        } else {
            match Command::decode(code, receiver.body()) {
                Ok(command) => session.execute(id, command, message.fds),
                Err(error) => {
                    tracing::debug!(?code, error = chain(&error), "refused a message");
                    Err(Errno::INVAL)
                }
            }
        };
        if wants_reply(kind) {
            let answer = answer.unwrap_or_else(|errno| encode_error(id, code, errno.raw_os_error()));
            wire::send(stream, &answer)?;
        }
    }
}

fn wants_reply(kind: Kind) -> bool {
    match kind {
        Kind::Command { no_reply } => !no_reply,
        Kind::Reply | Kind::ErrorReply { .. } => false,
    }
}

fn no_fds(message: &Message) -> bool {
    message.fds.is_empty() && !message.fds_lost
}
