//! `DEVICE_FEATURE`: what of the kernel's features a client can probe, read and write.
//!
//! ```text
//!   MIGRATION           get        which states the device has
//!   MIG_DEVICE_STATE    get, set   a SET that opens a stream makes it the one of MIG_DATA_READ and MIG_DATA_WRITE
//!   MIG_DATA_SIZE       get        where the device has it
//!   DMA_LOGGING_*       start and stop: set; report: get        where the device keeps a log
//! ```
//!
//! # Failure paths
//! As with the kernel: a feature that the device lacks is ENOTTY, an operation that the feature does not have is
//! EINVAL, and so is an `argsz` without room for the answer.

use rustix::io::Errno;
use vfio_checkpoint_fsm::State;

use super::errno;
use super::session::Session;
use crate::vfio_user::codec::{
    FeatureId, FeatureMessage, FeatureOperation, FeaturePayload, LogControl, LogReport, MigrationState,
    NO_DATA_FD,
};
use crate::{DeviceError, DirtyBitmap, DmaLog, IovaRange};

/// Data of the features that answer with a number.
const NUMBER_BYTES: u32 = 8;
/// A report before its bitmap.
const REPORT_BYTES: u32 = 24;

/// What can be done with a feature.
#[derive(Debug, Clone, Copy)]
struct Has {
    get: bool,
    set: bool,
}

impl Session<'_> {
    /// Answers one request. `bitmap` holds what a report brings.
    pub(super) fn feature<'m>(
        &mut self,
        request: &FeatureMessage<'_>,
        bitmap: &'m mut Vec<u8>,
    ) -> Result<FeatureMessage<'m>, Errno> {
        let (feature, operation) = (request.feature, request.operation);
        let has = self.has(feature).ok_or(Errno::NOTTY)?;
        let done = |payload| Ok(FeatureMessage::new(feature, operation, payload));
        match operation {
            FeatureOperation::Probe { get, set } => {
                if (get && !has.get) || (set && !has.set) {
                    return Err(Errno::INVAL);
                }
                return done(FeaturePayload::Empty);
            }
            FeatureOperation::Get if has.get => {}
            FeatureOperation::Set if has.set => {}
            FeatureOperation::Get | FeatureOperation::Set => return Err(Errno::INVAL),
        }
        match (feature, &request.payload) {
            (FeatureId::Migration, _) => {
                room(request, NUMBER_BYTES)?;
                let flags = self.device.capabilities().migration.kernel_flags();
                done(FeaturePayload::Migration(flags))
            }
            (FeatureId::MigDeviceState, FeaturePayload::State(asked)) => {
                let target = State::try_from(asked.state).map_err(|_| Errno::INVAL)?;
                self.set_state(target)?;
                done(FeaturePayload::State(MigrationState { state: asked.state, data_fd: NO_DATA_FD }))
            }
            (FeatureId::MigDeviceState, _) => {
                room(request, NUMBER_BYTES)?;
                let state = self.device.state().map_err(|error| errno::of(&error))?;
                done(FeaturePayload::State(MigrationState { state: state.into(), data_fd: NO_DATA_FD }))
            }
            (FeatureId::MigDataSize, _) => {
                room(request, NUMBER_BYTES)?;
                let size = self.device.data_size().map_err(|error| errno::of(&error))?;
                done(FeaturePayload::DataSize(size.bytes().ok_or(Errno::NOTTY)?))
            }
            (FeatureId::DmaLoggingStart, FeaturePayload::LogStart(control)) => {
                let page_bytes = self.start_log(control)?;
                done(FeaturePayload::LogStart(LogControl { page_bytes, ranges: control.ranges.clone() }))
            }
            (FeatureId::DmaLoggingStop, _) => {
                self.log()?.stop().map_err(|error| errno::of(&error))?;
                self.logging = false;
                done(FeaturePayload::Empty)
            }
            (FeatureId::DmaLoggingReport, FeaturePayload::LogReport(asked)) => {
                let room = request.reply_room_bytes().min(self.limits.max_data_xfer_bytes());
                report(self.log()?, asked, room, bitmap)?;
                let LogReport { iova, length_bytes, page_bytes, bitmap: _ } = *asked;
                done(FeaturePayload::LogReport(LogReport { iova, length_bytes, page_bytes, bitmap }))
            }
            (FeatureId::DmaLoggingStart | FeatureId::DmaLoggingReport | FeatureId::Other(_), _) => {
                Err(Errno::INVAL)
            }
        }
    }

    /// What the device has of a feature, `None` where it lacks it.
    fn has(&self, feature: FeatureId) -> Option<Has> {
        let capabilities = self.device.capabilities();
        let (there, has) = match feature {
            FeatureId::Migration => (true, Has { get: true, set: false }),
            FeatureId::MigDeviceState => (true, Has { get: true, set: true }),
            FeatureId::MigDataSize => (capabilities.data_size, Has { get: true, set: false }),
            FeatureId::DmaLoggingStart | FeatureId::DmaLoggingStop => {
                (capabilities.dma_logging, Has { get: false, set: true })
            }
            FeatureId::DmaLoggingReport => (capabilities.dma_logging, Has { get: true, set: false }),
            FeatureId::Other(_) => (false, Has { get: false, set: false }),
        };
        there.then_some(has)
    }

    /// One SET. A stream that it opens takes the place of the one before; where it opens none, that one stays, as a
    /// data fd does in its holder's hands.
    fn set_state(&mut self, target: State) -> Result<(), Errno> {
        if let Some(opened) = self.device.set_state(target).map_err(|error| errno::of(&error))? {
            self.stream = Some(opened);
        }
        Ok(())
    }

    fn start_log(&mut self, control: &LogControl) -> Result<u64, Errno> {
        let ranges = control.ranges.iter().map(|&(start, length)| range(start, length));
        let ranges: Vec<IovaRange> = ranges.collect::<Result<_, _>>()?;
        let page_bytes = self.log()?.start(control.page_bytes, &ranges).map_err(|error| errno::of(&error))?;
        self.logging = true;
        Ok(page_bytes)
    }

    fn log(&mut self) -> Result<&mut dyn DmaLog, Errno> {
        self.device.dma_log().ok_or(Errno::NOTTY)
    }
}

/// The answer must fit in what the client has room for.
fn room(request: &FeatureMessage<'_>, bytes: u32) -> Result<(), Errno> {
    if request.reply_room_bytes() >= bytes { Ok(()) } else { Err(Errno::INVAL) }
}

fn range(start: u64, length_bytes: u64) -> Result<IovaRange, Errno> {
    let overflows = if length_bytes == 0 { Errno::INVAL } else { Errno::OVERFLOW };
    IovaRange::new(start, length_bytes).ok_or(overflows)
}

/// Reads the log of a range into `bytes`, which may take up to `room_bytes` with what comes before it.
fn report(
    log: &mut dyn DmaLog,
    asked: &LogReport<'_>,
    room_bytes: u32,
    bytes: &mut Vec<u8>,
) -> Result<(), Errno> {
    let range = range(asked.iova, asked.length_bytes)?;
    let needed = LogReport::bitmap_bytes(asked.length_bytes, asked.page_bytes).ok_or(Errno::INVAL)?;
    if needed.saturating_add(REPORT_BYTES.into()) > room_bytes.into() {
        return Err(Errno::INVAL);
    }
    let failed = |error: DeviceError| errno::of(&error);
    let mut bitmap = DirtyBitmap::new(range, asked.page_bytes).map_err(failed)?;
    log.report(&mut bitmap).map_err(failed)?;
    bytes.clear();
    bytes.extend(bitmap.words_mut().iter().flat_map(|word| word.to_le_bytes()));
    Ok(())
}
