//! The log of pages that a device wrote by DMA: ranges, bitmaps, reports.
//!
//! A log reports writes only. Reading it clears it, and the kernel sets bits in the caller's bitmap without ever
//! clearing one, so a [`DirtyBitmap`] accumulates across reports. On **any** error every page counts as dirty:
//! a report that fails may have cleared what it did not deliver. The driver turns that into
//! [`DirtyReport::AllDirty`].

use crate::{Call, DeviceError};

/// Most pages one bitmap covers: 2^31 pages (8 TiB of 4 KiB pages) in 256 MiB. A longer range is refused before
/// anything is allocated; report it in parts.
pub const MAX_BITMAP_PAGES: u64 = 1 << 31;

/// A range of I/O virtual addresses, not empty, whose last byte is an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct IovaRange {
    start: u64,
    length_bytes: u64,
}

impl IovaRange {
    /// The range of `length_bytes` bytes at `start`, or `None` where it is empty or runs past the last address.
    pub fn new(start: u64, length_bytes: u64) -> Option<Self> {
        let last = length_bytes.checked_sub(1)?;
        start.checked_add(last)?;
        Some(Self { start, length_bytes })
    }

    /// First address.
    pub fn start(self) -> u64 {
        self.start
    }

    /// Length in bytes, at least 1.
    pub fn length_bytes(self) -> u64 {
        self.length_bytes
    }

    /// Last address, inclusive: an exclusive end might not fit in 64 bits.
    pub fn last(self) -> u64 {
        self.start + (self.length_bytes - 1)
    }

    /// Whether the two share an address.
    pub fn overlaps(self, other: Self) -> bool {
        self.start <= other.last() && other.start <= self.last()
    }
}

/// One bit a page over a range, as the kernel lays it out: little-endian 64-bit words, page 0 is bit 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirtyBitmap {
    range: IovaRange,
    page_bytes: u64,
    words: Vec<u64>,
}

impl DirtyBitmap {
    /// A clean bitmap over `range` with pages of `page_bytes`, a power of two. `range` must start on a page; its
    /// last page may be cut. At most [`MAX_BITMAP_PAGES`].
    pub fn new(range: IovaRange, page_bytes: u64) -> Result<Self, DeviceError> {
        let refuse = |reason: String| Err(DeviceError::Argument { call: Call::DmaLogReport, reason });
        if !page_bytes.is_power_of_two() {
            return refuse(format!("a page of {page_bytes} bytes is not a power of two"));
        }
        if !range.start.is_multiple_of(page_bytes) {
            return refuse(format!(
                "the range starts at {:#x}, which is not on a page of {page_bytes} bytes",
                range.start
            ));
        }
        let pages = range.length_bytes.div_ceil(page_bytes);
        if pages > MAX_BITMAP_PAGES {
            return refuse(format!(
                "{pages} pages are more than one bitmap holds ({MAX_BITMAP_PAGES}); ask for the range in parts"
            ));
        }
        // At most 2^25 words by the check above.
        let words = usize::try_from(pages.div_ceil(64)).unwrap_or(usize::MAX);
        Ok(Self { range, page_bytes, words: vec![0; words] })
    }

    /// The range covered.
    pub fn range(&self) -> IovaRange {
        self.range
    }

    /// Bytes per page.
    pub fn page_bytes(&self) -> u64 {
        self.page_bytes
    }

    /// Number of pages covered.
    pub fn pages(&self) -> u64 {
        self.range.length_bytes.div_ceil(self.page_bytes)
    }

    /// The words, for a backend to set bits in.
    pub fn words_mut(&mut self) -> &mut [u64] {
        &mut self.words
    }

    /// Marks one page. Pages past the end are ignored.
    pub fn set(&mut self, page: u64) {
        if page < self.pages()
            && let Ok(word) = usize::try_from(page / 64)
        {
            self.words[word] |= 1 << (page % 64);
        }
    }

    /// Whether a page is marked.
    pub fn is_set(&self, page: u64) -> bool {
        usize::try_from(page / 64).is_ok_and(|word| {
            page < self.pages() && self.words.get(word).is_some_and(|bits| bits >> (page % 64) & 1 == 1)
        })
    }

    /// Number of pages marked. Bits past the last page, which a device must not set, do not count.
    pub fn dirty_pages(&self) -> u64 {
        let pages = self.pages();
        (0u64..)
            .zip(&self.words)
            .map(|(index, &word)| {
                let valid = pages.saturating_sub(index * 64).min(64);
                let mask = if valid == 64 { u64::MAX } else { (1 << valid) - 1 };
                u64::from((word & mask).count_ones())
            })
            .sum()
    }

    /// The marked pages as ranges in order, neighbours joined, cut to the range covered.
    pub fn dirty_ranges(&self) -> Vec<IovaRange> {
        let mut ranges = Vec::new();
        let mut run: Option<(u64, u64)> = None;
        let pages = self.pages();
        for (index, &word) in (0u64..).zip(&self.words) {
            let mut rest = word;
            while rest != 0 {
                let bit = u64::from(rest.trailing_zeros());
                let ones = u64::from((rest >> bit).trailing_ones());
                let first = index * 64 + bit;
                let end = (first + ones).min(pages);
                rest = if bit + ones >= 64 { 0 } else { rest & (u64::MAX << (bit + ones)) };
                if first >= end {
                    break;
                }
                run = match run {
                    Some((start, stop)) if stop == first => Some((start, end)),
                    Some((start, stop)) => {
                        ranges.extend(self.pages_as_range(start, stop));
                        Some((first, end))
                    }
                    None => Some((first, end)),
                };
            }
        }
        if let Some((start, stop)) = run {
            ranges.extend(self.pages_as_range(start, stop));
        }
        ranges
    }

    fn pages_as_range(&self, first: u64, end: u64) -> Option<IovaRange> {
        let offset = first * self.page_bytes;
        // A run that ends at the last address has no end that fits in 64 bits.
        let whole = (end - first).saturating_mul(self.page_bytes);
        let length = whole.min(self.range.length_bytes - offset);
        IovaRange::new(self.range.start + offset, length)
    }
}

/// What a report of the log says of a range.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DirtyReport {
    /// Exactly the marked pages were written since the last report.
    Pages(DirtyBitmap),
    /// The log could not be read: every page of the range counts as written.
    AllDirty {
        /// The range that was asked for.
        range: IovaRange,
        /// Why, for people.
        reason: String,
    },
}

impl DirtyReport {
    /// The written ranges in order.
    pub fn ranges(&self) -> Vec<IovaRange> {
        match self {
            Self::Pages(bitmap) => bitmap.dirty_ranges(),
            Self::AllDirty { range, .. } => vec![*range],
        }
    }
}

/// The DMA log of a device.
pub trait DmaLog: std::fmt::Debug {
    /// Starts logging writes to `ranges`, which do not overlap, with pages of `page_bytes` where the device can.
    /// Returns the page size in force, which the device may have changed.
    fn start(&mut self, page_bytes: u64, ranges: &[IovaRange]) -> Result<u64, DeviceError>;

    /// Marks in `bitmap` what was written since the last report and clears the log of that range. Never clears a
    /// bit of `bitmap`.
    fn report(&mut self, bitmap: &mut DirtyBitmap) -> Result<(), DeviceError>;

    /// Stops logging and forgets what was logged.
    fn stop(&mut self) -> Result<(), DeviceError>;
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bitmap(start: u64, length: u64, page: u64) -> DirtyBitmap {
        DirtyBitmap::new(IovaRange::new(start, length).unwrap(), page).unwrap()
    }

    #[test]
    fn ranges_are_whole_and_end_at_an_address() {
        assert_eq!(IovaRange::new(0, 0), None);
        assert_eq!(IovaRange::new(1, u64::MAX).map(IovaRange::last), Some(u64::MAX));
        assert_eq!(IovaRange::new(2, u64::MAX), None);
    }

    #[test]
    fn a_bitmap_over_everything_can_be_all_dirty() {
        let mut all = bitmap(0, u64::MAX, 1 << 40);
        all.words_mut().fill(u64::MAX);
        assert_eq!(all.dirty_pages(), 1 << 24);
        assert_eq!(all.dirty_ranges(), [all.range()]);
    }

    #[test]
    fn what_cannot_be_a_bitmap_is_refused_before_it_is_made() {
        let range = IovaRange::new(0x1000, 1 << 50).unwrap();
        for (range, page) in [(range, 0), (range, 3000), (range, 8192), (range, 4096)] {
            assert!(DirtyBitmap::new(range, page).is_err(), "{page}");
        }
    }

    proptest! {
        #[test]
        fn agrees_with_a_list_of_pages(
            start in 0u64..1000,
            length in 1u64..(300 * 4096),
            dirty in prop::collection::btree_set(0u64..320, 0..64),
        ) {
            let start = start * 4096;
            let mut bitmap = bitmap(start, length, 4096);
            for page in &dirty {
                bitmap.set(*page);
            }
            let pages: Vec<u64> = dirty.into_iter().filter(|page| *page < bitmap.pages()).collect();
            prop_assert_eq!(bitmap.dirty_pages(), pages.len() as u64);
            let end = start + length;
            let mut expected: Vec<(u64, u64)> = Vec::new();
            for page in pages {
                prop_assert!(bitmap.is_set(page));
                let (from, to) = (start + page * 4096, (start + (page + 1) * 4096).min(end));
                match expected.last_mut() {
                    Some((_, last)) if *last == from => *last = to,
                    _ => expected.push((from, to)),
                }
            }
            let found: Vec<(u64, u64)> = bitmap
                .dirty_ranges()
                .iter()
                .map(|range| (range.start(), range.start() + range.length_bytes()))
                .collect();
            prop_assert_eq!(found, expected);
        }
    }
}
