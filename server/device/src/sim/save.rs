//! One saving session: what has been handed out, what is due, and how it becomes bytes.
//!
//! ```text
//!   PRE_COPY    header, initial pages ----> captured pages <--capture-- dirty pages <-- workload
//!   STOP_COPY   what is left of the record in hand, initial, never sent, captured and dirty pages,
//!               registers, end; then nothing, for ever
//! ```
//!
//! A page that changes while it is due anyway is not due twice: pages are made at the moment they are handed out.
//! Dirty pages become readable only once they are *captured*; when that happens is the configuration's
//! ([`Refill`]).
//!
//! # Invariants
//! - Every page is in at least one of: handed out as it is now, initial, never sent, captured, dirty.
//! - A page is made from the content it had when its first byte was handed out, so no page is torn.
//! - The stream is written straight into the reader's buffer. Nothing of the state is ever copied elsewhere.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

use super::format::{HEADER_BYTES, Header, KIND_END, KIND_MEMORY, KIND_REGISTERS, RECORD_BYTES, Record};
use super::memory::{Content, Memory};
use super::pages::PageSet;
use super::registers::{REGISTER_BYTES, Registers};
use super::{Precopy, Refill};
use crate::PrecopyInfo;

/// Most bytes of memory in a record. Small enough that a change of state finds little left of the record in hand,
/// large enough that the head of a record costs nothing.
const RUN_BYTES: u64 = 1 << 20;
const FIXED_BYTES: usize = RECORD_BYTES + REGISTER_BYTES;
const REGISTERS_RECORD: u64 = FIXED_BYTES as u64;

/// Bytes that are handed out as they are: the header, or the head of a record with a short body.
#[derive(Debug)]
struct Fixed {
    bytes: [u8; FIXED_BYTES],
    next: usize,
    end: usize,
}

impl Fixed {
    fn new(head: &[u8], body: &[u8]) -> Self {
        let mut bytes = [0; FIXED_BYTES];
        bytes[..head.len()].copy_from_slice(head);
        bytes[head.len()..head.len() + body.len()].copy_from_slice(body);
        Self { bytes, next: 0, end: head.len() + body.len() }
    }

    fn left(&self) -> u64 {
        (self.end - self.next) as u64
    }

    fn copy(&mut self, out: &mut [u8]) -> usize {
        let length = out.len().min(self.end - self.next);
        out[..length].copy_from_slice(&self.bytes[self.next..self.next + length]);
        self.next += length;
        length
    }
}

/// The pages of the record in hand.
#[derive(Debug)]
struct Run {
    next: u64,
    end: u64,
    /// How much of page `next` is out, and the content it is made from.
    begun: Option<(usize, Content)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Precopy,
    Memory,
    Registers,
    End,
    Over,
}

#[derive(Debug)]
pub(super) struct SaveSession {
    phase: Phase,
    fixed: Fixed,
    run: Option<Run>,
    /// Whether what is in hand counts as initial.
    in_hand_initial: bool,
    run_pages: u64,
    initial: VecDeque<Range<u64>>,
    never_sent: Range<u64>,
    captured: PageSet,
    dirty: PageSet,
    sent_bytes: u64,
    captured_at: Duration,
    reinit_done: bool,
}

impl SaveSession {
    /// A session that begins in PRE_COPY or PRE_COPY_P2P.
    pub(super) fn precopy(memory: &Memory, header: &Header, rules: &Precopy, now: Duration) -> Self {
        let pages = memory.pages();
        let initial = rules
            .initial_bytes
            .map_or(pages, |bytes| bytes.div_ceil(u64::from(header.page_bytes)).min(pages));
        let mut ranges = VecDeque::with_capacity(2);
        ranges.push_back(0..initial);
        Self {
            phase: Phase::Precopy,
            fixed: Fixed::new(&header.encode(), &[]),
            run: None,
            in_hand_initial: true,
            run_pages: run_pages(header.page_bytes),
            initial: ranges,
            never_sent: initial..pages,
            captured: PageSet::new(pages),
            dirty: PageSet::new(pages),
            sent_bytes: 0,
            captured_at: now,
            reinit_done: false,
        }
    }

    /// A session that begins in STOP_COPY.
    pub(super) fn stop_copy(memory: &Memory, header: &Header, now: Duration) -> Self {
        let rules = Precopy { initial_bytes: Some(0), ..Precopy::default() };
        let mut session = Self::precopy(memory, header, &rules, now);
        session.phase = Phase::Memory;
        session
    }

    /// The device has stopped: what is left is due now.
    pub(super) fn stop(&mut self) {
        if self.phase == Phase::Precopy {
            self.phase = Phase::Memory;
            self.captured.absorb(&mut self.dirty);
        }
    }

    /// A page changed.
    pub(super) fn mark_dirty(&mut self, page: u64) {
        let due_in_run = self.run.as_ref().is_some_and(|run| {
            page < run.end && (page > run.next || (page == run.next && run.begun.is_none()))
        });
        if due_in_run
            || self.initial.iter().any(|range| range.contains(&page))
            || self.never_sent.contains(&page)
            || self.captured.contains(page)
        {
            return;
        }
        match self.phase {
            Phase::Precopy => self.dirty.insert(page),
            // A stopped device changes nothing; a page written behind its back is still due if it was out.
            Phase::Memory => self.captured.insert(page),
            Phase::Registers | Phase::End | Phase::Over => {}
        }
    }

    /// Fills `out` as far as there is something to hand out.
    pub(super) fn read(&mut self, memory: &Memory, registers: &Registers, out: &mut [u8]) -> usize {
        let mut filled = 0;
        while filled < out.len() {
            let rest = &mut out[filled..];
            let length = if self.fixed.left() > 0 {
                self.fixed.copy(rest)
            } else if let Some(run) = &mut self.run {
                let length = run.copy(memory, rest);
                if run.next == run.end {
                    self.run = None;
                }
                length
            } else if self.begin_next(memory, registers, filled) {
                0
            } else {
                break;
            };
            filled += length;
        }
        self.sent_bytes += filled as u64;
        filled
    }

    /// Takes up the next record. `false` where nothing is due.
    fn begin_next(&mut self, memory: &Memory, registers: &Registers, unaccounted: usize) -> bool {
        match self.phase {
            Phase::Precopy | Phase::Memory => {
                if let Some(pages) = self.next_pages() {
                    let body = memory_bytes(memory, &pages);
                    let head =
                        Record { kind: KIND_MEMORY, flags: 0, value: pages.start, length: body }.encode();
                    self.fixed = Fixed::new(&head, &[]);
                    self.run = Some(Run { next: pages.start, end: pages.end, begun: None });
                    return true;
                }
                if self.phase == Phase::Precopy {
                    return false;
                }
                self.phase = Phase::Registers;
                true
            }
            Phase::Registers => {
                let length = REGISTER_BYTES as u64;
                let head = Record { kind: KIND_REGISTERS, flags: 0, value: 0, length }.encode();
                self.fixed = Fixed::new(&head, &registers.0);
                self.phase = Phase::End;
                true
            }
            Phase::End => {
                let before = self.sent_bytes + unaccounted as u64;
                let head = Record { kind: KIND_END, flags: 0, value: before, length: 0 }.encode();
                self.fixed = Fixed::new(&head, &[]);
                self.phase = Phase::Over;
                true
            }
            Phase::Over => false,
        }
    }

    fn next_pages(&mut self) -> Option<Range<u64>> {
        let most = self.run_pages;
        while let Some(range) = self.initial.front_mut() {
            if let Some(pages) = cut_front(range, most) {
                self.in_hand_initial = true;
                return Some(pages);
            }
            self.initial.pop_front();
        }
        self.in_hand_initial = false;
        if self.phase == Phase::Memory
            && let Some(pages) = cut_front(&mut self.never_sent, most)
        {
            return Some(pages);
        }
        self.captured.take_run(most)
    }

    /// Makes dirty pages readable, where everything else has been read and the interval has passed.
    pub(super) fn capture(&mut self, now: Duration, rules: &Precopy) {
        let drained = self.fixed.left() == 0
            && self.run.is_none()
            && self.initial.iter().all(Range::is_empty)
            && self.captured.is_empty();
        if drained && !self.dirty.is_empty() && self.may_capture(now, rules) {
            self.captured.absorb(&mut self.dirty);
            self.captured_at = now;
        }
    }

    fn may_capture(&self, now: Duration, rules: &Precopy) -> bool {
        now.saturating_sub(self.captured_at) >= rules.reread_interval
    }

    /// Whether the device reconfigures itself now, and how many of its first pages that gives new content.
    pub(super) fn reinit_due(&mut self, rules: &Precopy, page_bytes: u32, pages: u64) -> Option<u64> {
        let reinit = rules.reinit?;
        if self.reinit_done || self.sent_bytes < reinit.after_bytes {
            return None;
        }
        self.reinit_done = true;
        Some(reinit.initial_bytes.div_ceil(u64::from(page_bytes)).min(pages))
    }

    /// The first pages have to be sent anew, as initial data where the holder opted in, else as dirty pages.
    pub(super) fn reinit(&mut self, pages: u64, as_initial: bool) {
        if as_initial {
            // Whatever else they were due as, they are due once.
            self.captured.remove_range(0..pages);
            self.dirty.remove_range(0..pages);
            for range in self.initial.iter_mut().chain([&mut self.never_sent]) {
                range.start = range.start.max(pages.min(range.end));
            }
            self.initial.push_back(0..pages);
        } else {
            (0..pages).for_each(|page| self.mark_dirty(page));
        }
    }

    /// What is left to pre-copy. With `captures` (the device runs unhindered) dirty pages that a capture would take
    /// now count too, and are taken where the configuration says that asking takes them.
    pub(super) fn info(
        &mut self,
        memory: &Memory,
        rules: &Precopy,
        now: Duration,
        captures: bool,
    ) -> PrecopyInfo {
        let in_hand = self.in_hand_bytes(memory);
        let initial: u64 = self.initial.iter().map(|range| self.range_bytes(memory, range)).sum();
        let mut dirty = self.set_bytes(memory, &self.captured);
        if captures && self.may_capture(now, rules) {
            dirty += self.set_bytes(memory, &self.dirty);
        }
        if captures && rules.refill == Refill::OnInfo {
            self.capture(now, rules);
        }
        let (initial, dirty) =
            if self.in_hand_initial { (initial + in_hand, dirty) } else { (initial, dirty + in_hand) };
        PrecopyInfo { initial_bytes: initial, dirty_bytes: dirty, reinit: false }
    }

    /// Exactly how many bytes this session still brings if the device stops now and stays stopped.
    pub(super) fn left_bytes(&self, memory: &Memory) -> u64 {
        let end = RECORD_BYTES as u64;
        self.in_hand_bytes(memory)
            + match self.phase {
                Phase::Precopy | Phase::Memory => {
                    let mut due = self.captured.clone();
                    due.absorb(&mut self.dirty.clone());
                    let ranges = self.initial.iter().chain([&self.never_sent]);
                    ranges.map(|range| self.range_bytes(memory, range)).sum::<u64>()
                        + self.set_bytes(memory, &due)
                        + REGISTERS_RECORD
                        + end
                }
                Phase::Registers => REGISTERS_RECORD + end,
                Phase::End => end,
                Phase::Over => 0,
            }
    }

    /// What is left of the record in hand.
    pub(super) fn in_hand_bytes(&self, memory: &Memory) -> u64 {
        let pages = self.run.as_ref().map_or(0, |run| {
            let out = run.begun.as_ref().map_or(0, |(offset, _)| *offset as u64);
            memory_bytes(memory, &(run.next..run.end)) - out
        });
        self.fixed.left() + pages
    }

    fn range_bytes(&self, memory: &Memory, range: &Range<u64>) -> u64 {
        records_bytes(memory, range, self.run_pages)
    }

    fn set_bytes(&self, memory: &Memory, set: &PageSet) -> u64 {
        let (mut bytes, mut next) = (0, 0);
        while let Some(pages) = set.run_from(next, self.run_pages) {
            bytes += RECORD_BYTES as u64 + memory_bytes(memory, &pages);
            next = pages.end;
        }
        bytes
    }
}

impl Run {
    fn copy(&mut self, memory: &Memory, out: &mut [u8]) -> usize {
        let mut filled = 0;
        while self.next < self.end && filled < out.len() {
            let (offset, content) = self.begun.take().unwrap_or_else(|| (0, memory.content(self.next)));
            let page_left = memory.page_len(self.next) - offset;
            let length = page_left.min(out.len() - filled);
            memory.copy(self.next, &content, offset, &mut out[filled..filled + length]);
            filled += length;
            if length == page_left {
                self.next += 1;
            } else {
                self.begun = Some((offset + length, content));
            }
        }
        filled
    }
}

/// Bytes of a whole stream that pre-copied nothing.
pub(super) fn full_bytes(memory: &Memory, page_bytes: u32) -> u64 {
    let end = RECORD_BYTES as u64;
    let pages = records_bytes(memory, &(0..memory.pages()), run_pages(page_bytes));
    HEADER_BYTES as u64 + pages + REGISTERS_RECORD + end
}

fn run_pages(page_bytes: u32) -> u64 {
    RUN_BYTES / u64::from(page_bytes)
}

fn memory_bytes(memory: &Memory, pages: &Range<u64>) -> u64 {
    let Some(last) = pages.end.checked_sub(1).filter(|last| *last >= pages.start) else { return 0 };
    // Only the last page of memory can be shorter than the first one.
    let full = memory.page_len(pages.start) as u64;
    (last - pages.start) * full + memory.page_len(last) as u64
}

fn records_bytes(memory: &Memory, pages: &Range<u64>, run_pages: u64) -> u64 {
    let records = pages.end.saturating_sub(pages.start).div_ceil(run_pages);
    records * RECORD_BYTES as u64 + memory_bytes(memory, pages)
}

fn cut_front(range: &mut Range<u64>, most: u64) -> Option<Range<u64>> {
    if range.is_empty() {
        return None;
    }
    let end = range.end.min(range.start + most);
    let front = range.start..end;
    range.start = end;
    Some(front)
}
