//! The memory of a simulated device: any size, and only what differs from its seed is kept.
//!
//! ```text
//!   page -> raw bytes?        bytes that no version has: arbitrary or damaged content that was loaded
//!        -> version != 0?     dirtied by the workload                     8 bytes a page
//!        -> version 0         pristine                                    nothing
//! ```
//!
//! # Invariants
//! - A page of at least 8 bytes is kept raw only where no version of it has its bytes. So there is one
//!   representation of a content, and the digest can be taken of the representation.
//! - A page that is kept raw has version 0 in the table.
//! - Raw pages take at most the configured number of bytes; past it a store is refused and nothing changes.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::SimMemoryError;
use super::generator::Generator;
use super::pages::Versions;

/// Raw pages would take more than the configured limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct OverlayFull;

/// What a page holds, as a value that stays the same when the page is written.
#[derive(Debug, Clone)]
pub(super) enum Content {
    Generated { key: u64 },
    Raw(Arc<[u8]>),
}

#[derive(Debug)]
pub(super) struct Memory {
    bytes: u64,
    page_bytes: u32,
    generator: Generator,
    versions: Versions,
    raw: BTreeMap<u64, Arc<[u8]>>,
    raw_bytes: u64,
    raw_limit_bytes: u64,
}

impl Memory {
    /// Pristine memory. `page_bytes` is a power of two and at most [`super::generator::MAX_PAGE_BYTES`].
    pub(super) fn new(bytes: u64, page_bytes: u32, generator: Generator, raw_limit_bytes: u64) -> Self {
        Self {
            bytes,
            page_bytes,
            generator,
            versions: Versions::new(bytes.div_ceil(u64::from(page_bytes))),
            raw: BTreeMap::new(),
            raw_bytes: 0,
            raw_limit_bytes,
        }
    }

    pub(super) fn seed(&self) -> u64 {
        self.generator.seed()
    }

    /// How many pages there are. The last one may be cut.
    pub(super) fn pages(&self) -> u64 {
        self.bytes.div_ceil(u64::from(self.page_bytes))
    }

    /// Length of a page: less than a whole one at the end of memory, 0 behind it.
    pub(super) fn page_len(&self, page: u64) -> usize {
        let start = page.saturating_mul(u64::from(self.page_bytes));
        usize::try_from(self.bytes.saturating_sub(start).min(u64::from(self.page_bytes))).unwrap_or(0)
    }

    pub(super) fn content(&self, page: u64) -> Content {
        if !self.raw.is_empty()
            && let Some(bytes) = self.raw.get(&page)
        {
            return Content::Raw(Arc::clone(bytes));
        }
        let version = if self.versions.changed() == 0 { 0 } else { self.versions.get(page) };
        Content::Generated { key: self.generator.key(page, version) }
    }

    /// Copies a part of a page, from `offset` in it.
    pub(super) fn copy(&self, page: u64, content: &Content, offset: usize, out: &mut [u8]) {
        match content {
            Content::Generated { key } => {
                self.generator.fill(page * u64::from(self.page_bytes) + offset as u64, *key, out);
            }
            Content::Raw(bytes) => out.copy_from_slice(&bytes[offset..offset + out.len()]),
        }
    }

    /// Whether so many bytes lie in memory from `at` on.
    pub(super) fn check_range(&self, at: u64, length: usize) -> Result<(), SimMemoryError> {
        match at.checked_add(length as u64) {
            Some(end) if end <= self.bytes => Ok(()),
            Some(_) | None => Err(SimMemoryError::OutOfRange { memory_bytes: self.bytes }),
        }
    }

    /// Copies memory from `at` on.
    pub(super) fn read(&self, at: u64, out: &mut [u8]) -> Result<(), SimMemoryError> {
        self.check_range(at, out.len())?;
        let mut at = at;
        let mut left = out;
        while !left.is_empty() {
            let page = at / u64::from(self.page_bytes);
            let offset = usize::try_from(at % u64::from(self.page_bytes)).unwrap_or(0);
            let (now, later) = left.split_at_mut(left.len().min(self.page_len(page) - offset));
            self.copy(page, &self.content(page), offset, now);
            at += now.len() as u64;
            left = later;
        }
        Ok(())
    }

    /// Gives a page new content, all of it.
    pub(super) fn store(&mut self, page: u64, bytes: &[u8]) -> Result<(), OverlayFull> {
        let at = page * u64::from(self.page_bytes);
        if let Some(key) = self.generator.key_of(at, bytes) {
            self.forget_raw(page);
            self.versions.set(page, self.generator.version_of(page, key));
            return Ok(());
        }
        let replaced = self.raw.get(&page).map_or(0, |old| old.len() as u64);
        let raw_bytes = self.raw_bytes - replaced + bytes.len() as u64;
        if raw_bytes > self.raw_limit_bytes {
            return Err(OverlayFull);
        }
        self.raw_bytes = raw_bytes;
        self.raw.insert(page, bytes.into());
        self.versions.set(page, 0);
        Ok(())
    }

    /// Changes a page as many times as said: to the version that many further on. A raw page becomes that version.
    pub(super) fn touch(&mut self, page: u64, times: u64) {
        self.forget_raw(page);
        self.versions.set(page, self.versions.get(page).wrapping_add(times));
    }

    fn forget_raw(&mut self, page: u64) {
        if !self.raw.is_empty()
            && let Some(old) = self.raw.remove(&page)
        {
            self.raw_bytes -= old.len() as u64;
        }
    }

    /// Feeds what the memory holds into a digest, without looking at pages that are pristine.
    ///
    /// The seed stands for the pages that are made from it, and is left out where none is. A cut last page counts by
    /// its bytes: it may be too short to tell versions apart.
    pub(super) fn digest_into(&self, hasher: &mut blake3::Hasher) {
        let full_pages = self.bytes / u64::from(self.page_bytes);
        let raw = || self.raw.iter().filter(|(page, _)| **page < full_pages);
        hasher.update(&self.bytes.to_le_bytes()).update(&u64::from(self.page_bytes).to_le_bytes());
        let raw_pages = raw().count() as u64;
        if raw_pages < full_pages {
            hasher.update(&self.generator.seed().to_le_bytes());
        }
        hasher.update(&(self.versions.iter_below(full_pages).count() as u64).to_le_bytes());
        for (page, version) in self.versions.iter_below(full_pages) {
            hasher.update(&page.to_le_bytes()).update(&version.to_le_bytes());
        }
        hasher.update(&raw_pages.to_le_bytes());
        for (page, bytes) in raw() {
            hasher.update(&page.to_le_bytes()).update(bytes);
        }
        let mut cut = vec![0; self.page_len(full_pages)];
        self.copy(full_pages, &self.content(full_pages), 0, &mut cut);
        hasher.update(&cut);
    }
}
