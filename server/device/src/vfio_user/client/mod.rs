//! A device in another process, as a [`MigrationDevice`].
//!
//! ```text
//!   connect(path) --handshake, probe--> VfioUserDevice <--one exchange-- adopt(kept connection)
//!                                          | set_state: DEVICE_FEATURE set MIG_DEVICE_STATE
//!                                          +--> SaveSession     MIG_DATA_READ    \
//!                                          +--> RestoreSession  MIG_DATA_WRITE   +- one connection, one call at a time
//!                                          +--> RemoteDmaLog, RemoteConfigSpace  /
//! ```
//!
//! # Invariants
//! - Which SET opens a stream is told by the state machine from the state before and after, because the server hands
//!   out no fd: it is read just before the SET.
//! - A stream belongs to the session that opened it; once that is over it answers ENODEV.
//! - What the device can do is asked of it, once. It has no pre-copy info: the call goes to a data fd, and there is none.
//!
//! # Failure paths
//! A server's error reply comes through with its errno. [`DeviceError::Peer`] is a server that makes no sense;
//! [`DeviceError::Disconnected`] one that is gone, late or out of step. After the latter every call answers it, the
//! state included: the driver cannot read it back and counts the device's state as lost.
//!
//! Servers may reset their device when the connection goes: dropping the device and its streams is giving it up.

mod config_space;
mod dma_log;
mod keep;
mod link;
mod open;
mod stream;
#[cfg(test)]
mod tests;

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use vfio_checkpoint_fsm::{State, Walk, path as walk};

pub use keep::{ConnectionFacts, KeptConnection};
pub use open::ConnectError;

use self::config_space::RemoteConfigSpace;
use self::dma_log::RemoteDmaLog;
use self::link::{Link, Shared};
use self::open::Probed;
use self::stream::{RestoreSession, SaveSession};
use super::codec::{
    Capabilities, Command, DeviceInfo, FeatureId, FeatureMessage, FeatureOperation, FeaturePayload, Limits,
    MigrationState, NO_DATA_FD,
};
use super::connection::{Connection, DmaTarget, NoMemory, Timing};
use crate::{
    Backend, Call, ConfigSpace, DataSize, DataStream, DeviceCapabilities, DeviceError, DmaLog, Fingerprint,
    Identity, MigrationDevice,
};

/// What stands for the driver of a device process.
pub(super) const DRIVER: &str = "vfio-user";

/// The most file descriptors that a server may send with one message.
const MAX_MSG_FDS: u64 = 8;

/// How to connect.
#[derive(Debug)]
pub struct ConnectOptions {
    /// The device's name. `None`: the socket's file name.
    pub name: Option<String>,
    /// How long the handshake and each question of the probe may take. A server that serves another client does not
    /// answer. On taking a connection over, how long the server may take to finish what an earlier owner asked for.
    pub connect_within: Duration,
    /// How long calls may take from then on.
    pub timing: Timing,
    /// The most data in one message; the server may want less.
    pub max_data_xfer_bytes: u32,
    /// The memory that the server may ask for over the socket.
    pub dma: Box<dyn DmaTarget>,
}

impl Default for ConnectOptions {
    fn default() -> Self {
        Self {
            name: None,
            connect_within: Duration::from_secs(10),
            timing: Timing::default(),
            max_data_xfer_bytes: Limits::DEFAULT_DATA_XFER_BYTES,
            dma: Box::new(NoMemory),
        }
    }
}

/// A device in another process that speaks migration v2.
#[derive(Debug)]
pub struct VfioUserDevice {
    identity: Identity,
    fingerprint: Fingerprint,
    capabilities: DeviceCapabilities,
    info: DeviceInfo,
    shared: Shared,
    log: Option<RemoteDmaLog>,
    config: Option<RemoteConfigSpace>,
}

impl VfioUserDevice {
    /// Connects to the device process that listens at `path`. Its migration state is left as it is: read it.
    pub fn connect(path: &Path, options: ConnectOptions) -> Result<Self, ConnectError> {
        let stream = UnixStream::connect(path)
            .map_err(|source| ConnectError::Socket { path: path.to_owned(), source })?;
        let name = options.name.clone().unwrap_or_else(|| open::name_of(path));
        Self::over(stream, name, options)
    }

    /// The same over a stream that is connected already, for example one that was handed over.
    pub fn over(stream: UnixStream, name: String, options: ConnectOptions) -> Result<Self, ConnectError> {
        let ours = Capabilities {
            max_msg_fds: MAX_MSG_FDS,
            max_data_xfer_bytes: options.max_data_xfer_bytes.into(),
            // One server refuses every page size but that of the machine, and none at all is "no migration".
            migration_pgsize: Some(rustix::param::page_size() as u64),
            ..Capabilities::default()
        };
        let careful = Timing { answer_within: Some(options.connect_within), ..options.timing };
        let connection = Connection::open(stream, ours, careful, options.dma)
            .map_err(|source| ConnectError::Handshake { name: name.clone(), source })?;
        let shared = Shared::new(connection);
        let probed = open::probe(&mut shared.lock(), &name)?;
        shared.lock().connection().set_timing(options.timing);
        Ok(Self::of(name, probed, shared))
    }

    fn of(name: String, probed: Probed, shared: Shared) -> Self {
        let Probed { info, capabilities, fingerprint } = probed;
        Self {
            identity: Identity { name, backend: Backend::VfioUser, driver: DRIVER.to_owned() },
            fingerprint,
            capabilities,
            info,
            log: capabilities.dma_logging.then(|| RemoteDmaLog::new(shared.clone())),
            config: capabilities.config_space.then(|| RemoteConfigSpace::new(shared.clone())),
            shared,
        }
    }

    /// Whether the connection is lost: every call fails, and what the device did last is not known.
    pub fn is_disconnected(&self) -> bool {
        self.shared.lock().connection().is_broken()
    }
}

fn read_state(link: &mut Link, call: Call) -> Result<State, DeviceError> {
    let number = link.get_feature(call, FeatureId::MigDeviceState, |payload| {
        let FeaturePayload::State(state) = payload else { return None };
        Some(state.state)
    })?;
    Ok(State::try_from(number)?)
}

/// What a successful SET did to the data session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Session {
    Opened,
    Kept,
    Ended,
}

fn session_after(capabilities: DeviceCapabilities, from: State, target: State) -> Session {
    let streams = match target {
        State::StopCopy | State::Resuming | State::PreCopy | State::PreCopyP2p => true,
        State::Error | State::Stop | State::Running | State::RunningP2p => false,
    };
    match walk(capabilities.migration, from, target) {
        Walk::Path(path) if path.opens_stream() => Session::Opened,
        // The server took what the state machine forbids: a state with a stream then has a new one.
        Walk::Forbidden(_) if streams => Session::Opened,
        Walk::NoOp | Walk::Path(_) if streams => Session::Kept,
        Walk::NoOp | Walk::Path(_) | Walk::Forbidden(_) => Session::Ended,
    }
}

impl MigrationDevice for VfioUserDevice {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn fingerprint(&self) -> &Fingerprint {
        &self.fingerprint
    }

    fn capabilities(&self) -> &DeviceCapabilities {
        &self.capabilities
    }

    fn state(&mut self) -> Result<State, DeviceError> {
        read_state(&mut self.shared.lock(), Call::GetState)
    }

    fn set_state(&mut self, target: State) -> Result<Option<DataStream>, DeviceError> {
        let call = Call::SetState(target);
        let mut link = self.shared.lock();
        let from = read_state(&mut link, call)?;
        let state = MigrationState { state: target.into(), data_fd: NO_DATA_FD };
        let request = FeatureMessage::new(
            FeatureId::MigDeviceState,
            FeatureOperation::Set,
            FeaturePayload::State(state),
        );
        link.order(call, &Command::Feature(request), &[])?;
        match session_after(self.capabilities, from, target) {
            Session::Kept => Ok(None),
            Session::Ended => {
                link.end_session();
                Ok(None)
            }
            Session::Opened => {
                let session = link.begin_session();
                let shared = self.shared.clone();
                Ok(Some(if target == State::Resuming {
                    DataStream::Restore(Box::new(RestoreSession::new(shared, session)))
                } else {
                    DataStream::Save(Box::new(SaveSession::new(shared, session)))
                }))
            }
        }
    }

    /// The server's number. Nothing says whether it is exact, so it is an upper bound.
    fn data_size(&mut self) -> Result<DataSize, DeviceError> {
        if !self.capabilities.data_size {
            return Ok(DataSize::Unknown);
        }
        let bytes = self.shared.lock().get_feature(Call::DataSize, FeatureId::MigDataSize, |payload| {
            let FeaturePayload::DataSize(bytes) = payload else { return None };
            Some(bytes)
        })?;
        Ok(DataSize::UpperBound(bytes))
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        let mut link = self.shared.lock();
        link.order(Call::Reset, &Command::Reset, &[])?;
        link.end_session();
        Ok(())
    }

    fn dma_log(&mut self) -> Option<&mut dyn DmaLog> {
        self.log.as_mut().map(|log| log as &mut dyn DmaLog)
    }

    fn config_space(&mut self) -> Option<&mut dyn ConfigSpace> {
        self.config.as_mut().map(|config| config as &mut dyn ConfigSpace)
    }
}
