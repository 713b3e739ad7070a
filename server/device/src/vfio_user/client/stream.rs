//! The data streams of a session, over `MIG_DATA_READ` and `MIG_DATA_WRITE`.
//!
//! ```text
//!   read(buffer):  asks for min(buffer, negotiated) bytes; gets as many, fewer, none (Zero), or ENOMSG (NothingNow)
//!   write(bytes):  sends min(bytes, negotiated, what goes out whole) bytes; all of them were taken, or none can be told
//! ```
//!
//! A read that brings less than was asked is not the end: the protocol's text says it is, its servers do otherwise.
//! Only no byte at all is, and in PRE_COPY not even that.

use crate::vfio_user::codec::{Command, Reply};
use crate::{Call, DeviceError, PrecopyInfo, Read, RestoreStream, SaveStream};

use super::link::Shared;

/// The outgoing stream of one session.
#[derive(Debug)]
pub(super) struct SaveSession {
    shared: Shared,
    session: u64,
}

impl SaveSession {
    pub(super) fn new(shared: Shared, session: u64) -> Self {
        Self { shared, session }
    }
}

impl SaveStream for SaveSession {
    fn read(&mut self, buffer: &mut [u8]) -> Result<Read, DeviceError> {
        let call = Call::Read;
        if buffer.is_empty() {
            return Err(empty(call));
        }
        let mut link = self.shared.lock();
        link.check_session(self.session, call)?;
        let size = portion(buffer.len(), link.limits().max_data_xfer_bytes());
        let read = link.ask(call, &Command::MigDataRead { size }, &[], |reply| {
            let Reply::MigDataRead { data } = reply else { return Err("it carries no data and no length") };
            let room = buffer.get_mut(..data.len()).filter(|room| portion(room.len(), u32::MAX) <= size);
            room.ok_or("it carries more than was asked for")?.copy_from_slice(data);
            Ok(data.len())
        });
        match read {
            Ok(0) => Ok(Read::Zero),
            Ok(bytes) => Ok(Read::Bytes(bytes)),
            Err(error) if error.raw_os_error() == Some(libc::ENOMSG) => Ok(Read::NothingNow),
            Err(error) => Err(error),
        }
    }

    fn precopy_info(&mut self) -> Result<PrecopyInfo, DeviceError> {
        Err(DeviceError::Absent { call: Call::PrecopyInfo })
    }
}

/// The incoming stream of one session.
#[derive(Debug)]
pub(super) struct RestoreSession {
    shared: Shared,
    session: u64,
}

impl RestoreSession {
    pub(super) fn new(shared: Shared, session: u64) -> Self {
        Self { shared, session }
    }
}

impl RestoreStream for RestoreSession {
    fn write(&mut self, bytes: &[u8]) -> Result<usize, DeviceError> {
        let call = Call::Write;
        if bytes.is_empty() {
            return Err(empty(call));
        }
        let mut link = self.shared.lock();
        link.check_session(self.session, call)?;
        let limit = usize::try_from(link.connection().portion_bytes()).unwrap_or(usize::MAX);
        let data = &bytes[..bytes.len().min(limit)];
        link.order(call, &Command::MigDataWrite { data }, &[])?;
        Ok(data.len())
    }
}

/// As much of `wanted` as one message carries.
fn portion(wanted: usize, limit: u32) -> u32 {
    u32::try_from(wanted).unwrap_or(u32::MAX).min(limit)
}

/// An empty buffer would make a read's 0 look like the end, and a write of it mean nothing.
fn empty(call: Call) -> DeviceError {
    DeviceError::Argument { call, reason: "the buffer is empty; give at least one byte".to_owned() }
}
