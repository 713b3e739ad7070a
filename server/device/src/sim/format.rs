//! The stream format of a simulated device, and its incremental decoder. Sans-I/O: bytes in, events out.
//!
//! ```text
//!   header (80 bytes)
//!     0  u8[8]  magic "VCSIMDEV"          32  u64     seed that the memory is made from
//!     8  u16    major version, 1          40  u8[32]  BLAKE3 of the firmware's name
//!    10  u16    minor version, 0          72  u8[8]   start of the BLAKE3 of the 72 bytes before
//!    12  u32    flags, 0
//!    16  u32    page size, bytes
//!    20  u32    register block, bytes
//!    24  u64    memory, bytes
//!   records, each 24 bytes and a body:
//!     0  u32    kind                       8  u64     value (by kind)
//!     4  u32    flags; 1 = optional       16  u64     length of the body, bytes
//!
//!   kind 1  MEMORY     value: first page; body: whole pages, the last page of memory cut; any order, later wins
//!   kind 2  REGISTERS  value: 0; body: the register block; exactly one
//!   kind 3  END        value: bytes of the stream before this record; no body; nothing follows
//! ```
//!
//! All integers are little-endian. A minor version adds optional records only; an optional record of unknown kind
//! is skipped, any other is refused. The stream carries no digest of its contents: as with real devices, damage to
//! a body loads, and whoever carries a stream has to check it.
//!
//! # Invariants
//! - How the stream is cut into pieces never matters, down to single bytes.
//! - No length is trusted: what a length may be is checked before anything depends on it, and the decoder allocates
//!   nothing whatever it is fed.
//!
//! # Failure paths
//! Every refusal is a [`FormatError`] and final: the decoder must not be fed again after one.

use super::registers::REGISTER_BYTES;

/// First bytes of every stream.
pub(super) const MAGIC: [u8; 8] = *b"VCSIMDEV";
/// Version that is written, and the only major version that is read.
pub(super) const MAJOR: u16 = 1;
pub(super) const MINOR: u16 = 0;
pub(super) const HEADER_BYTES: usize = 80;
pub(super) const RECORD_BYTES: usize = 24;
/// Most a record of unknown kind may bring.
pub(super) const MAX_OPTIONAL_BYTES: u64 = 1 << 20;

pub(super) const KIND_MEMORY: u32 = 1;
pub(super) const KIND_REGISTERS: u32 = 2;
pub(super) const KIND_END: u32 = 3;
pub(super) const FLAG_OPTIONAL: u32 = 1;

/// The register block's length as the header has it.
const REGISTER_BLOCK: u32 = 64;
const _: () = assert!(REGISTER_BLOCK as usize == REGISTER_BYTES);
/// Where the header's check starts.
const CHECK: usize = 72;

/// What a stream says of itself before any state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) page_bytes: u32,
    pub(super) memory_bytes: u64,
    pub(super) seed: u64,
    pub(super) firmware: [u8; 32],
}

impl Header {
    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&MAJOR.to_le_bytes());
        bytes[10..12].copy_from_slice(&MINOR.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.page_bytes.to_le_bytes());
        bytes[20..24].copy_from_slice(&REGISTER_BLOCK.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.memory_bytes.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.seed.to_le_bytes());
        bytes[40..CHECK].copy_from_slice(&self.firmware);
        let check = header_check(&bytes);
        bytes[CHECK..].copy_from_slice(&check);
        bytes
    }

    fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, FormatError> {
        if bytes[..8] != MAGIC {
            return Err(FormatError::Magic);
        }
        // The version comes before the check: another version may check differently.
        let major = u16::from_le_bytes([bytes[8], bytes[9]]);
        if major != MAJOR {
            return Err(FormatError::Version { found: major });
        }
        if header_check(bytes) != bytes[CHECK..] {
            return Err(FormatError::Check);
        }
        let flags = u32_at(bytes, 12);
        if flags != 0 {
            return Err(FormatError::Flags { found: flags });
        }
        let registers = u32_at(bytes, 20);
        if registers != REGISTER_BLOCK {
            return Err(FormatError::RegisterBlock { found: registers.into() });
        }
        let mut firmware = [0; 32];
        firmware.copy_from_slice(&bytes[40..CHECK]);
        Ok(Self {
            page_bytes: u32_at(bytes, 16),
            memory_bytes: u64_at(bytes, 24),
            seed: u64_at(bytes, 32),
            firmware,
        })
    }
}

fn header_check(bytes: &[u8; HEADER_BYTES]) -> [u8; 8] {
    let mut check = [0; 8];
    check.copy_from_slice(&blake3::hash(&bytes[..CHECK]).as_bytes()[..8]);
    check
}

/// What the firmware's name becomes in a header.
pub(super) fn firmware_digest(name: &str) -> [u8; 32] {
    *blake3::hash(name.as_bytes()).as_bytes()
}

/// The head of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) kind: u32,
    pub(super) flags: u32,
    pub(super) value: u64,
    pub(super) length: u64,
}

impl Record {
    pub(super) fn encode(self) -> [u8; RECORD_BYTES] {
        let mut bytes = [0; RECORD_BYTES];
        bytes[..4].copy_from_slice(&self.kind.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.flags.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.value.to_le_bytes());
        bytes[16..].copy_from_slice(&self.length.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8; RECORD_BYTES]) -> Self {
        Self {
            kind: u32_at(bytes, 0),
            flags: u32_at(bytes, 4),
            value: u64_at(bytes, 8),
            length: u64_at(bytes, 16),
        }
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

/// Why a stream is not one of this format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum FormatError {
    #[error("the stream does not begin as a simulated device's does")]
    Magic,
    #[error("the stream has major version {found}, this device reads {MAJOR}")]
    Version { found: u16 },
    #[error("the stream's header is damaged")]
    Check,
    #[error("flags {found:#x} are not known")]
    Flags { found: u32 },
    #[error("a register block of {found} bytes is not {REGISTER_BYTES}")]
    RegisterBlock { found: u64 },
    #[error("a record of unknown kind {kind} must be understood")]
    UnknownRecord { kind: u32 },
    #[error("a record of kind {kind} and {length} bytes from value {value} lies outside of what may be")]
    RecordBounds { kind: u32, value: u64, length: u64 },
    #[error("a record follows the registers that must not")]
    Order,
    #[error("the end stands at byte {found} of the stream and says {said}")]
    EndElsewhere { found: u64, said: u64 },
    #[error("bytes follow the end")]
    Trailing,
}

/// What a piece of a stream turned out to be.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Event<'a> {
    Header(Header),
    /// A piece of memory from byte `at` on. Pieces of one record follow each other without gap; a record starts on a
    /// page and ends on one, or at the end of memory.
    Memory {
        at: u64,
        bytes: &'a [u8],
    },
    Registers([u8; REGISTER_BYTES]),
    /// The end, complete and in its place.
    End,
}

/// Takes a stream apart.
#[derive(Debug)]
pub(super) struct Decoder {
    header: Option<Header>,
    state: State,
    /// Bytes of a header, record head or register block so far.
    scratch: [u8; HEADER_BYTES],
    filled: usize,
    consumed: u64,
    registers_seen: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Header,
    Record,
    Memory { at: u64, left: u64 },
    Registers,
    Skip { left: u64 },
    End,
}

impl Decoder {
    pub(super) fn new() -> Self {
        Self {
            header: None,
            state: State::Header,
            scratch: [0; HEADER_BYTES],
            filled: 0,
            consumed: 0,
            registers_seen: false,
        }
    }

    /// Takes bytes off the front of `input` up to the next event. `None`: `input` is used up.
    pub(super) fn next<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<Event<'a>>, FormatError> {
        loop {
            match self.state {
                State::Header => {
                    let Some(bytes) = self.gather::<HEADER_BYTES>(input) else { return Ok(None) };
                    let header = Header::decode(&bytes)?;
                    self.header = Some(header);
                    self.state = State::Record;
                    return Ok(Some(Event::Header(header)));
                }
                State::Record => {
                    let before = self.consumed - self.filled as u64;
                    let Some(bytes) = self.gather::<RECORD_BYTES>(input) else { return Ok(None) };
                    self.state = self.enter(Record::decode(&bytes), before)?;
                    if self.state == State::End {
                        return Ok(Some(Event::End));
                    }
                }
                State::Memory { at, left } => {
                    let bytes = self.take(input, left);
                    if bytes.is_empty() {
                        return Ok(None);
                    }
                    let (at_next, left) = (at + bytes.len() as u64, left - bytes.len() as u64);
                    self.state = if left == 0 { State::Record } else { State::Memory { at: at_next, left } };
                    return Ok(Some(Event::Memory { at, bytes }));
                }
                State::Registers => {
                    let Some(bytes) = self.gather::<REGISTER_BYTES>(input) else { return Ok(None) };
                    self.state = State::Record;
                    return Ok(Some(Event::Registers(bytes)));
                }
                State::Skip { left } => {
                    let left = left - self.take(input, left).len() as u64;
                    if left > 0 {
                        self.state = State::Skip { left };
                        return Ok(None);
                    }
                    self.state = State::Record;
                }
                State::End if input.is_empty() => return Ok(None),
                State::End => return Err(FormatError::Trailing),
            }
        }
    }

    /// Decides what a record that starts after `before` bytes of stream is followed by.
    fn enter(&mut self, record: Record, before: u64) -> Result<State, FormatError> {
        let Record { kind, flags, value, length } = record;
        let bounds = FormatError::RecordBounds { kind, value, length };
        match kind {
            KIND_MEMORY | KIND_REGISTERS | KIND_END if flags != 0 => Err(FormatError::Flags { found: flags }),
            KIND_MEMORY | KIND_REGISTERS if self.registers_seen => Err(FormatError::Order),
            KIND_MEMORY => {
                let (page_bytes, memory_bytes) = match &self.header {
                    Some(header) => (u64::from(header.page_bytes), header.memory_bytes),
                    None => (0, 0),
                };
                let at = value.checked_mul(page_bytes).ok_or(bounds)?;
                let end = at.checked_add(length).ok_or(bounds)?;
                let on_page = end == memory_bytes || (page_bytes > 0 && end.is_multiple_of(page_bytes));
                if length == 0 || end > memory_bytes || !on_page {
                    return Err(bounds);
                }
                Ok(State::Memory { at, left: length })
            }
            KIND_REGISTERS => {
                if value != 0 || length != REGISTER_BYTES as u64 {
                    return Err(bounds);
                }
                self.registers_seen = true;
                Ok(State::Registers)
            }
            KIND_END => {
                if length != 0 {
                    return Err(bounds);
                }
                if !self.registers_seen {
                    return Err(FormatError::Order);
                }
                if value != before {
                    return Err(FormatError::EndElsewhere { found: before, said: value });
                }
                Ok(State::End)
            }
            unknown if flags == FLAG_OPTIONAL => {
                if length > MAX_OPTIONAL_BYTES {
                    return Err(FormatError::RecordBounds { kind: unknown, value, length });
                }
                Ok(State::Skip { left: length })
            }
            unknown => Err(FormatError::UnknownRecord { kind: unknown }),
        }
    }

    /// Collects the next `N` bytes, at most [`HEADER_BYTES`], over as many calls as it takes.
    fn gather<const N: usize>(&mut self, input: &mut &[u8]) -> Option<[u8; N]> {
        let wanted = N - self.filled;
        let bytes = self.take(input, wanted as u64);
        self.scratch[self.filled..self.filled + bytes.len()].copy_from_slice(bytes);
        self.filled += bytes.len();
        if self.filled < N {
            return None;
        }
        self.filled = 0;
        self.scratch.first_chunk::<N>().copied()
    }

    fn take<'a>(&mut self, input: &mut &'a [u8], most: u64) -> &'a [u8] {
        let length = usize::try_from(most).unwrap_or(usize::MAX).min(input.len());
        let (taken, rest) = input.split_at(length);
        *input = rest;
        self.consumed += length as u64;
        taken
    }
}
