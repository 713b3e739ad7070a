//! The DMA log of a device process.
//!
//! ```text
//!   START(page size, ranges) -> page size in force;  REPORT(part of a range) -> bitmap, as often as it takes;  STOP
//! ```
//!
//! A bitmap comes inside a message, so a long range is asked for in parts that fit.
//!
//! # Failure paths
//! A report that fails after its first part has cleared that part of the log: the caller treats every page as written.

use crate::vfio_user::codec::{
    Command, FeatureId, FeatureMessage, FeatureOperation, FeaturePayload, Limits, LogControl, LogReport,
    Reply,
};
use crate::{Call, DeviceError, DirtyBitmap, DmaLog, IovaRange};

use super::link::Shared;

/// Bytes of a report besides its bitmap.
const REPORT_BYTES: u32 = 32;

/// The log of one device.
#[derive(Debug)]
pub(super) struct RemoteDmaLog {
    shared: Shared,
}

impl RemoteDmaLog {
    pub(super) fn new(shared: Shared) -> Self {
        Self { shared }
    }
}

impl DmaLog for RemoteDmaLog {
    fn start(&mut self, page_bytes: u64, ranges: &[IovaRange]) -> Result<u64, DeviceError> {
        let ranges = ranges.iter().map(|range| (range.start(), range.length_bytes())).collect();
        let payload = FeaturePayload::LogStart(LogControl { page_bytes, ranges });
        let request = FeatureMessage::new(FeatureId::DmaLoggingStart, FeatureOperation::Set, payload);
        self.shared.lock().ask(Call::DmaLogStart, &Command::Feature(request), &[], |reply| {
            // A server that echoes nothing changed nothing.
            let Reply::Feature(message) = reply else { return Ok(page_bytes) };
            let FeaturePayload::LogStart(control) = message.payload else { return Ok(page_bytes) };
            if control.page_bytes.is_power_of_two() {
                Ok(control.page_bytes)
            } else {
                Err("its page size is not a power of two")
            }
        })
    }

    fn report(&mut self, bitmap: &mut DirtyBitmap) -> Result<(), DeviceError> {
        let (range, page_bytes) = (bitmap.range(), bitmap.page_bytes());
        let mut link = self.shared.lock();
        let mut words = bitmap.words_mut();
        let part_words = part_words(link.limits());
        // One word covers 64 pages; saturated, it covers whatever range there is.
        let word_bytes = page_bytes.saturating_mul(64);
        let mut iova = range.start();
        let mut left = range.length_bytes();
        while left > 0 {
            let length_bytes = word_bytes.saturating_mul(part_words).min(left);
            let Some(bitmap_bytes) = LogReport::bitmap_bytes(length_bytes, page_bytes) else { break };
            let request = request(iova, length_bytes, page_bytes, bitmap_bytes);
            let taken = link.ask(Call::DmaLogReport, &Command::Feature(request), &[], |reply| {
                let Reply::Feature(FeatureMessage { payload: FeaturePayload::LogReport(report), .. }) = reply
                else {
                    return Err("it carries no bitmap");
                };
                if (report.iova, report.length_bytes, report.page_bytes) != (iova, length_bytes, page_bytes) {
                    return Err("it is of another range");
                }
                let bits = usize::try_from(bitmap_bytes).ok().and_then(|bytes| report.bitmap.get(..bytes));
                let (chunks, _) = bits.ok_or("its bitmap is too short")?.as_chunks::<8>();
                for (word, chunk) in words.iter_mut().zip(chunks) {
                    *word |= u64::from_le_bytes(*chunk);
                }
                Ok(chunks.len())
            })?;
            words = words.get_mut(taken..).unwrap_or_default();
            left -= length_bytes;
            iova = iova.wrapping_add(length_bytes);
        }
        Ok(())
    }

    fn stop(&mut self) -> Result<(), DeviceError> {
        let request =
            FeatureMessage::new(FeatureId::DmaLoggingStop, FeatureOperation::Set, FeaturePayload::Empty);
        self.shared.lock().order(Call::DmaLogStop, &Command::Feature(request), &[])
    }
}

/// How many words of bitmap one message carries: at least one, which the room besides the data always holds.
fn part_words(limits: Limits) -> u64 {
    u64::from(limits.max_data_xfer_bytes().saturating_sub(REPORT_BYTES) / 8).max(1)
}

fn request(iova: u64, length_bytes: u64, page_bytes: u64, bitmap_bytes: u64) -> FeatureMessage<'static> {
    let payload = FeaturePayload::LogReport(LogReport { iova, length_bytes, page_bytes, bitmap: &[] });
    let room = u32::try_from(bitmap_bytes).unwrap_or(u32::MAX).saturating_add(REPORT_BYTES);
    FeatureMessage::new(FeatureId::DmaLoggingReport, FeatureOperation::Get, payload).reply_room(room)
}
