//! What the device, its streams, its log and its configuration space share: one connection, and which data session is
//! under way on it.
//!
//! ```text
//!   VfioUserDevice --\
//!   SaveSession    ---+--> Shared { Mutex<Link { Connection, session }> }
//!   RestoreSession --/
//! ```
//!
//! `MIG_DATA_READ` and `MIG_DATA_WRITE` name no session: they act on whatever the device is doing. So every stream carries
//! the number of its session, and one whose session is over answers ENODEV, as a data fd of the kernel's would, rather
//! than read what belongs to the next.

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::vfio_user::codec::{
    Code, Command, FeatureId, FeatureMessage, FeatureOperation, FeaturePayload, Limits, Reply,
};
use crate::vfio_user::connection::{Connection, PeerError};
use crate::{Call, DeviceError};

/// The connection, shared.
#[derive(Debug, Clone)]
pub(super) struct Shared(Arc<Mutex<Link>>);

impl Shared {
    pub(super) fn new(connection: Connection) -> Self {
        Self(Arc::new(Mutex::new(Link { connection, sessions: 0, current: None })))
    }

    /// The connection, for one call. A holder that panicked left it in step or broken, and it knows which.
    pub(super) fn lock(&self) -> MutexGuard<'_, Link> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The connection and the session on it.
#[derive(Debug)]
pub(super) struct Link {
    connection: Connection,
    /// How many sessions there were.
    sessions: u64,
    /// The number of the one under way.
    current: Option<u64>,
}

impl Link {
    pub(super) fn connection(&mut self) -> &mut Connection {
        &mut self.connection
    }

    pub(super) fn limits(&self) -> Limits {
        self.connection.negotiated().limits
    }

    /// A new session begins. Its number.
    pub(super) fn begin_session(&mut self) -> u64 {
        self.sessions += 1;
        self.current = Some(self.sessions);
        self.sessions
    }

    /// No session is under way any more.
    pub(super) fn end_session(&mut self) {
        self.current = None;
    }

    /// Refuses a stream whose session is over.
    pub(super) fn check_session(&self, session: u64, call: Call) -> Result<(), DeviceError> {
        if self.current == Some(session) { Ok(()) } else { Err(DeviceError::errno(call, libc::ENODEV)) }
    }

    /// Asks, and takes from the reply what `read` finds in it: `None` where it does not answer the question.
    pub(super) fn ask<T>(
        &mut self,
        call: Call,
        command: &Command<'_>,
        fds: &[BorrowedFd<'_>],
        read: impl FnOnce(Reply<'_>) -> Result<T, &'static str>,
    ) -> Result<T, DeviceError> {
        let answer = self.connection.call(command, fds).map_err(|error| error.during(call))?;
        let reply =
            answer.reply().map_err(|source| DeviceError::Peer { call, source: Box::new(source.into()) })?;
        read(reply).map_err(|reason| no_answer(call, command.code(), reason))
    }

    /// Asks for something that is answered by having been done.
    pub(super) fn order(
        &mut self,
        call: Call,
        command: &Command<'_>,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), DeviceError> {
        self.ask(call, command, fds, |_| Ok(()))
    }

    /// Reads a feature of 8 bytes.
    pub(super) fn get_feature<T>(
        &mut self,
        call: Call,
        feature: FeatureId,
        read: impl FnOnce(FeaturePayload<'_>) -> Option<T>,
    ) -> Result<T, DeviceError> {
        let request =
            FeatureMessage::new(feature, FeatureOperation::Get, FeaturePayload::Empty).reply_room(8);
        self.ask(call, &Command::Feature(request), &[], |reply| {
            let Reply::Feature(message) = reply else { return Err("it carries no feature") };
            if message.feature != feature {
                return Err("it is of another feature");
            }
            read(message.payload).ok_or("its data is not this feature's")
        })
    }

    /// Whether a feature can be had this way. A refusal is an answer; that the connection is lost is none.
    pub(super) fn probe(
        &mut self,
        feature: FeatureId,
        operation: FeatureOperation,
    ) -> Result<bool, DeviceError> {
        let request = FeatureMessage::new(feature, operation, FeaturePayload::Empty);
        match self.order(Call::Probe, &Command::Feature(request), &[]) {
            Ok(()) => Ok(true),
            Err(DeviceError::Os { source, .. }) => {
                tracing::debug!(?feature, errno = %source, "absent");
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }
}

/// The error for a reply that is well formed and says nothing, or something else.
pub(super) fn no_answer(call: Call, asked: Code, reason: &'static str) -> DeviceError {
    DeviceError::Peer { call, source: Box::new(PeerError::NoAnswer { asked, reason }) }
}
