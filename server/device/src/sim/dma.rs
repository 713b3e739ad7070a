//! DMA: where the device writes on its own, and the log of it.
//!
//! ```text
//!   configured ranges, in granules of 4 KiB:  0 1 2 ... n-1      written in a fixed order at a set rate
//!                                                 |
//!   log: tracked ranges, page size          which granules were written since the last report
//! ```
//!
//! The log is kept by what the device can write, not by what is tracked: tracking 2^60 bytes costs nothing.
//!
//! # Invariants
//! - A write to a tracked address is in the next report that covers its whole tracked page, whatever page size that
//!   report has.
//! - A report never clears a bit, and never forgets a page that it covered in part only.
//!
//! # Failure paths
//! The refusals are those of the VFIO core, and where it leaves them to the driver those of mlx5 and pds.

use std::time::Duration;

use super::pages::PageSet;
use super::workload::{Pacer, Sweep};
use super::{LogPages, SimDma};
use crate::{DirtyBitmap, IovaRange};

/// The unit of simulated DMA and the smallest page that a report may have.
pub(super) const GRANULE_BYTES: u64 = 4096;
/// Most ranges that a start may name: what fits into a page of the kernel, 16 bytes each.
const MAX_RANGES: usize = 256;

/// The DMA engine of a device.
#[derive(Debug)]
pub(super) struct Dma {
    ranges: Vec<IovaRange>,
    bytes_per_second: u64,
    granules: u64,
    pacer: Pacer,
    sweep: Sweep,
    log: Option<Log>,
}

#[derive(Debug)]
struct Log {
    page_bytes: u64,
    ranges: Vec<IovaRange>,
    written: PageSet,
}

impl Dma {
    pub(super) fn new(config: &SimDma, seed: u64) -> Self {
        let granules = config.ranges.iter().map(|range| range.length_bytes() / GRANULE_BYTES).sum();
        Self {
            ranges: config.ranges.clone(),
            bytes_per_second: config.bytes_per_second,
            granules,
            pacer: Pacer::default(),
            sweep: Sweep::new(granules, seed),
            log: None,
        }
    }

    /// The device ran for `elapsed`, with `before` writes done. Returns how many it did.
    pub(super) fn run(&mut self, elapsed: Duration, before: u64) -> u64 {
        if self.granules == 0 {
            return 0;
        }
        let writes = self.pacer.writes(elapsed, self.bytes_per_second, GRANULE_BYTES);
        if let Some(log) = &mut self.log {
            let ranges = &self.ranges;
            self.sweep.visit(before, writes, |granule, _| {
                if let Some(iova) = address(ranges, granule)
                    && log.ranges.iter().any(|range| (range.start()..=range.last()).contains(&iova))
                {
                    log.written.insert(granule);
                }
            });
        }
        writes
    }

    /// Starts the log. Returns the page size in force, or an errno.
    pub(super) fn start(
        &mut self,
        page_bytes: u64,
        ranges: &[IovaRange],
        pages: LogPages,
    ) -> Result<u64, i32> {
        if ranges.is_empty() {
            return Err(libc::EINVAL);
        }
        if ranges.len() > MAX_RANGES {
            return Err(libc::E2BIG);
        }
        // The kernel takes the logarithm of whatever it is given; no device tracks pages that are no power of two.
        if !page_bytes.is_power_of_two() {
            return Err(libc::EINVAL);
        }
        for (at, range) in ranges.iter().enumerate() {
            if !range.start().is_multiple_of(page_bytes) || !range.length_bytes().is_multiple_of(page_bytes) {
                return Err(libc::EINVAL);
            }
            check_end(*range)?;
            if ranges[..at].iter().any(|other| other.overlaps(*range)) {
                return Err(libc::EINVAL);
            }
        }
        if self.log.is_some() {
            return Err(libc::EINVAL);
        }
        let page_bytes = page_bytes.clamp(pages.min_bytes, pages.max_bytes);
        self.log = Some(Log { page_bytes, ranges: ranges.to_vec(), written: PageSet::new(self.granules) });
        Ok(page_bytes)
    }

    /// Marks what was written in the bitmap's range and forgets it, or answers an errno.
    pub(super) fn report(&mut self, bitmap: &mut DirtyBitmap) -> Result<(), i32> {
        let (range, report_page) = (bitmap.range(), bitmap.page_bytes());
        if report_page < GRANULE_BYTES || !report_page.is_power_of_two() {
            return Err(libc::EINVAL);
        }
        check_end(range)?;
        let log = self.log.as_mut().ok_or(libc::EINVAL)?;
        let covers =
            |tracked: &&IovaRange| tracked.start() <= range.start() && range.last() <= tracked.last();
        let tracked = *log.ranges.iter().find(covers).ok_or(libc::EINVAL)?;
        let mut next = 0;
        while let Some(granule) = log.written.next_from(next) {
            next = granule + 1;
            let Some(iova) = address(&self.ranges, granule) else { continue };
            // The device knows only that something in this page of its own was written.
            let page = iova - iova % log.page_bytes;
            let (first, last) =
                (page.max(tracked.start()), (page + (log.page_bytes - 1)).min(tracked.last()));
            if last < range.start() || first > range.last() || first > last {
                continue;
            }
            let from = (first.max(range.start()) - range.start()) / report_page;
            let to = (last.min(range.last()) - range.start()) / report_page;
            (from..=to).for_each(|page| bitmap.set(page));
            if first >= range.start() && last <= range.last() {
                log.written.remove(granule);
            }
        }
        Ok(())
    }

    /// Stops the log. Where there is none, nothing happens, as with mlx5.
    pub(super) fn stop(&mut self) {
        self.log = None;
    }

    /// Power-on state.
    pub(super) fn reset(&mut self) {
        self.log = None;
        self.pacer = Pacer::default();
    }
}

/// The kernel reckons with an exclusive end, so a range up to the very last address overflows.
fn check_end(range: IovaRange) -> Result<(), i32> {
    if range.last() == u64::MAX { Err(libc::EOVERFLOW) } else { Ok(()) }
}

/// The address of a granule.
fn address(ranges: &[IovaRange], granule: u64) -> Option<u64> {
    let mut left = granule;
    for range in ranges {
        let granules = range.length_bytes() / GRANULE_BYTES;
        if left < granules {
            return Some(range.start() + left * GRANULE_BYTES);
        }
        left -= granules;
    }
    None
}
