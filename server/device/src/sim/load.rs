//! One session in RESUMING: takes a stream in beside the device's own state, and checks it.
//!
//! ```text
//!   write -> Decoder -> header: does it fit this device?
//!                       memory: whole pages -> staged Memory, a bitmap of what was covered
//!                       registers, end -> complete
//!   leaving RESUMING -> finish: the staged state, or EINVAL
//! ```
//!
//! # Invariants
//! - The device's own state is untouched until RESUMING is left with a complete stream.
//! - A stream is complete once its end was reached and every page was covered.
//! - Memory taken grows only with what differs from the stream's seed, bounded by the raw limit and 8 bytes a page.
//!
//! # Failure paths
//! With [`Validation::OnWrite`] a refused write is final: later writes answer ENODEV, as the mlx5 driver does, and
//! RESUMING can be left by a reset only. With [`Validation::OnExit`] writes go on succeeding and the SET out of
//! RESUMING refuses.

use super::Validation;
use super::format::{Decoder, Event, FormatError, Header};
use super::generator::Generator;
use super::memory::{Memory, OverlayFull};
use super::pages::PageSet;
use super::registers::{REGISTER_BYTES, Registers};

/// Why a stream does not load into this device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum LoadError {
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error("the stream is of a device with another firmware, memory size or page size")]
    OtherDevice,
    #[error("more pages hold arbitrary content than the device has room for")]
    OverlayFull,
    #[error("the stream ended without bringing every page")]
    Incomplete,
    #[error("the stream has not ended")]
    Truncated,
    #[error("the session failed before")]
    Poisoned,
}

impl LoadError {
    /// The errno that a driver answers. There is no common one: mtty says EFAULT where qat says EINVAL.
    pub(super) fn errno(self) -> i32 {
        match self {
            // Too long for the device is ENOMEM with mtty and qat, a record that is unknown EOPNOTSUPP with mlx5.
            Self::Format(FormatError::Trailing) => libc::ENOMEM,
            Self::Format(FormatError::UnknownRecord { .. }) => libc::EOPNOTSUPP,
            Self::Format(
                FormatError::Magic
                | FormatError::Version { .. }
                | FormatError::Check
                | FormatError::Flags { .. }
                | FormatError::RegisterBlock { .. }
                | FormatError::RecordBounds { .. }
                | FormatError::Order
                | FormatError::EndElsewhere { .. },
            )
            | Self::OtherDevice
            | Self::Incomplete
            | Self::Truncated => libc::EINVAL,
            Self::OverlayFull => libc::ENOSPC,
            Self::Poisoned => libc::ENODEV,
        }
    }
}

/// What a stream must be of to load.
#[derive(Debug, Clone, Copy)]
pub(super) struct Expected {
    pub(super) page_bytes: u32,
    pub(super) memory_bytes: u64,
    pub(super) firmware: [u8; 32],
    pub(super) raw_limit_bytes: u64,
    pub(super) validation: Validation,
}

#[derive(Debug)]
enum Progress {
    Feeding,
    Complete,
    Failed(LoadError),
}

#[derive(Debug)]
pub(super) struct LoadSession {
    expected: Expected,
    decoder: Decoder,
    progress: Progress,
    staged: Option<Memory>,
    registers: Registers,
    covered: PageSet,
    /// The start of a page of which the rest has not come yet.
    partial: Vec<u8>,
}

impl LoadSession {
    pub(super) fn new(expected: Expected) -> Self {
        Self {
            expected,
            decoder: Decoder::new(),
            progress: Progress::Feeding,
            staged: None,
            registers: Registers::power_on(),
            covered: PageSet::new(expected.memory_bytes.div_ceil(u64::from(expected.page_bytes))),
            partial: Vec::new(),
        }
    }

    /// Takes all of `bytes`, or answers with an errno.
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<usize, LoadError> {
        let fed = match self.progress {
            Progress::Feeding | Progress::Complete => self.feed(bytes),
            Progress::Failed(_) => Err(LoadError::Poisoned),
        };
        match (fed, self.expected.validation) {
            (Ok(()), _) => Ok(bytes.len()),
            (Err(error), validation) => {
                if !matches!(self.progress, Progress::Failed(_)) {
                    self.progress = Progress::Failed(error);
                    // What was staged is worth nothing any more.
                    self.staged = None;
                }
                match validation {
                    Validation::OnWrite => Err(error),
                    Validation::OnExit => Ok(bytes.len()),
                }
            }
        }
    }

    /// The loaded state, where the stream was complete. Leaves the session as it was otherwise.
    pub(super) fn finish(&mut self) -> Result<(Memory, Registers), LoadError> {
        match self.progress {
            Progress::Complete => {
                let memory = self.staged.take().ok_or(LoadError::Truncated)?;
                Ok((memory, self.registers))
            }
            Progress::Feeding => Err(LoadError::Truncated),
            Progress::Failed(error) => Err(error),
        }
    }

    fn feed(&mut self, bytes: &[u8]) -> Result<(), LoadError> {
        let mut input = bytes;
        while let Some(event) = self.decoder.next(&mut input)? {
            match event {
                Event::Header(header) => self.begin(header)?,
                Event::Memory { at, bytes } => self.take_memory(at, bytes)?,
                Event::Registers(block) => self.take_registers(block),
                Event::End => self.end()?,
            }
        }
        Ok(())
    }

    fn begin(&mut self, header: Header) -> Result<(), LoadError> {
        let Expected { page_bytes, memory_bytes, firmware, raw_limit_bytes, validation: _ } = self.expected;
        if header.page_bytes != page_bytes
            || header.memory_bytes != memory_bytes
            || header.firmware != firmware
        {
            return Err(LoadError::OtherDevice);
        }
        let generator = Generator::new(header.seed);
        self.staged = Some(Memory::new(memory_bytes, page_bytes, generator, raw_limit_bytes));
        Ok(())
    }

    /// Cuts a piece of memory into pages. A page that comes in one piece is never copied.
    fn take_memory(&mut self, at: u64, bytes: &[u8]) -> Result<(), LoadError> {
        let Some(memory) = &mut self.staged else { return Err(LoadError::Truncated) };
        let page_bytes = u64::from(self.expected.page_bytes);
        let (mut at, mut bytes) = (at, bytes);
        while !bytes.is_empty() {
            let page = at / page_bytes;
            let wanted = memory.page_len(page) - self.partial.len();
            let (now, later) = bytes.split_at(wanted.min(bytes.len()));
            if now.len() < wanted {
                self.partial.extend_from_slice(now);
                return Ok(());
            }
            let stored = if self.partial.is_empty() {
                memory.store(page, now)
            } else {
                self.partial.extend_from_slice(now);
                memory.store(page, &self.partial)
            };
            stored.map_err(|OverlayFull| LoadError::OverlayFull)?;
            self.partial.clear();
            self.covered.insert(page);
            at += now.len() as u64;
            bytes = later;
        }
        Ok(())
    }

    fn take_registers(&mut self, block: [u8; REGISTER_BYTES]) {
        self.registers = Registers(block);
    }

    fn end(&mut self) -> Result<(), LoadError> {
        match &self.staged {
            Some(memory) if self.covered.len() == memory.pages() => {
                self.progress = Progress::Complete;
                Ok(())
            }
            Some(_) | None => Err(LoadError::Incomplete),
        }
    }
}
