//! Sets of pages, and the version of each: sparse, in blocks that exist once something in them does.
//!
//! Invariant: both know how much they hold, so that the common case of holding nothing costs nothing to ask.

use std::ops::Range;

/// Pages a block of a set covers (512 bytes of bits).
const SET_BLOCK: u64 = 4096;
/// Pages a block of versions covers (4 KiB of versions).
const VERSION_BLOCK: u64 = 512;

/// Index as the machine counts. Page numbers are bounded by the configuration, far below any machine's limit.
fn index(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// A set of page numbers below a limit. A bit a page where the set is dense, 8 bytes per 4096 pages elsewhere.
#[derive(Debug, Clone)]
pub(super) struct PageSet {
    limit: u64,
    count: u64,
    /// No page below this one is in the set: taking runs off the front must not look at what was taken before.
    floor: u64,
    blocks: Vec<Option<Box<[u64; 64]>>>,
}

impl PageSet {
    /// The empty set of pages below `limit`.
    pub(super) fn new(limit: u64) -> Self {
        Self { limit, count: 0, floor: 0, blocks: vec![None; index(limit.div_ceil(SET_BLOCK))] }
    }

    pub(super) fn len(&self) -> u64 {
        self.count
    }

    pub(super) fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Adds a page. Pages at or past the limit do not exist and are left out.
    pub(super) fn insert(&mut self, page: u64) {
        if page >= self.limit {
            return;
        }
        let Some(block) = self.blocks.get_mut(index(page / SET_BLOCK)) else { return };
        let word = &mut block.get_or_insert_with(|| Box::new([0; 64]))[index(page % SET_BLOCK / 64)];
        let bit = 1 << (page % 64);
        self.count += u64::from(*word & bit == 0);
        *word |= bit;
        self.floor = self.floor.min(page);
    }

    pub(super) fn remove(&mut self, page: u64) {
        if let Some(Some(block)) = self.blocks.get_mut(index(page / SET_BLOCK)) {
            let word = &mut block[index(page % SET_BLOCK / 64)];
            let bit = 1 << (page % 64);
            self.count -= u64::from(*word & bit != 0);
            *word &= !bit;
        }
    }

    pub(super) fn remove_range(&mut self, pages: Range<u64>) {
        let mut next = pages.start;
        while let Some(page) = self.next_from(next).filter(|page| *page < pages.end) {
            self.remove(page);
            next = page + 1;
        }
    }

    pub(super) fn contains(&self, page: u64) -> bool {
        match self.blocks.get(index(page / SET_BLOCK)) {
            Some(Some(block)) => block[index(page % SET_BLOCK / 64)] >> (page % 64) & 1 == 1,
            Some(None) | None => false,
        }
    }

    /// The first page of the set at or after `from`.
    pub(super) fn next_from(&self, from: u64) -> Option<u64> {
        let mut page = from.max(self.floor);
        while !self.is_empty() && page < self.limit {
            match self.blocks.get(index(page / SET_BLOCK))? {
                Some(block) => {
                    let word = block[index(page % SET_BLOCK / 64)] >> (page % 64);
                    if word != 0 {
                        return Some(page + u64::from(word.trailing_zeros()));
                    }
                    page = (page / 64 + 1) * 64;
                }
                None => page = (page / SET_BLOCK + 1) * SET_BLOCK,
            }
        }
        None
    }

    /// The first run of neighbours at or after `from`, cut to `most` pages.
    pub(super) fn run_from(&self, from: u64, most: u64) -> Option<Range<u64>> {
        let start = self.next_from(from)?;
        let end = (start + 1..start.saturating_add(most)).find(|page| !self.contains(*page));
        Some(start..end.unwrap_or(start.saturating_add(most).min(self.limit)))
    }

    /// Takes the first run of neighbours out of the set, cut to `most` pages.
    pub(super) fn take_run(&mut self, most: u64) -> Option<Range<u64>> {
        let run = self.run_from(0, most)?;
        self.remove_range(run.clone());
        self.floor = run.end;
        Some(run)
    }

    /// Takes everything of `other` in, and leaves it empty.
    pub(super) fn absorb(&mut self, other: &mut Self) {
        if self.is_empty() {
            std::mem::swap(self, other);
        }
        let mut next = 0;
        while let Some(page) = other.next_from(next) {
            self.insert(page);
            next = page + 1;
        }
        *other = Self::new(other.limit);
    }
}

/// The version of every page; 0 unless set. 8 bytes a page in blocks of 512 pages that hold any other.
#[derive(Debug)]
pub(super) struct Versions {
    changed: u64,
    blocks: Vec<Option<Box<[u64; 512]>>>,
}

impl Versions {
    pub(super) fn new(pages: u64) -> Self {
        Self { changed: 0, blocks: vec![None; index(pages.div_ceil(VERSION_BLOCK))] }
    }

    /// How many pages have a version other than 0.
    pub(super) fn changed(&self) -> u64 {
        self.changed
    }

    pub(super) fn get(&self, page: u64) -> u64 {
        match self.blocks.get(index(page / VERSION_BLOCK)) {
            Some(Some(block)) => block[index(page % VERSION_BLOCK)],
            Some(None) | None => 0,
        }
    }

    pub(super) fn set(&mut self, page: u64, version: u64) {
        let Some(block) = self.blocks.get_mut(index(page / VERSION_BLOCK)) else { return };
        if block.is_none() && version == 0 {
            return;
        }
        let slot = &mut block.get_or_insert_with(|| Box::new([0; 512]))[index(page % VERSION_BLOCK)];
        self.changed += u64::from(*slot == 0 && version != 0);
        self.changed -= u64::from(*slot != 0 && version == 0);
        *slot = version;
    }

    /// The pages below `end` whose version is not 0, in order, with their versions.
    pub(super) fn iter_below(&self, end: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        (0u64..)
            .zip(&self.blocks)
            .filter_map(|(number, block)| Some((number, block.as_deref()?)))
            .flat_map(|(number, block)| (number * VERSION_BLOCK..).zip(block.iter().copied()))
            .filter(move |(page, version)| *page < end && *version != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const LIMIT: u64 = 9000;

    proptest! {
        #[test]
        fn a_set_is_a_set(steps in prop::collection::vec((0u64..LIMIT + 10, any::<bool>()), 0..200), from in 0u64..LIMIT) {
            let mut set = PageSet::new(LIMIT);
            let mut model = BTreeSet::new();
            for (page, put) in steps {
                // Neighbours, so that there are runs.
                for page in page..page + 3 {
                    if put {
                        set.insert(page);
                        if page < LIMIT {
                            model.insert(page);
                        }
                    } else {
                        set.remove(page);
                        model.remove(&page);
                    }
                }
            }
            prop_assert_eq!(set.len(), model.len() as u64);
            prop_assert_eq!(set.next_from(from), model.range(from..).next().copied());
            if let Some(run) = set.run_from(from, 70) {
                prop_assert!(run.clone().all(|page| model.contains(&page)));
                prop_assert!(run.end - run.start == 70 || !model.contains(&run.end));
            }
        }

        #[test]
        fn versions_are_kept(steps in prop::collection::vec((0u64..2000, 0u64..3), 0..200)) {
            let mut versions = Versions::new(2000);
            let mut model = std::collections::BTreeMap::new();
            for (page, version) in steps {
                versions.set(page, version);
                if version == 0 { model.remove(&page); } else { model.insert(page, version); }
            }
            prop_assert_eq!(versions.changed(), model.len() as u64);
            prop_assert_eq!(versions.iter_below(2000).collect::<Vec<_>>(), model.into_iter().collect::<Vec<_>>());
        }
    }
}
