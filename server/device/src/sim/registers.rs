//! The register block: 64 bytes of state that are not memory.
//!
//! Invariant: every byte is state. What was loaded is kept, whether or not this device gives it a meaning.

/// Bytes of the block, in the device and in a stream.
pub(super) const REGISTER_BYTES: usize = 64;

/// Offset of the scratch register (u64), which nothing but its holder uses.
const SCRATCH: usize = 0;
/// Offset of the number of page writes that the workload has done (u64).
const PAGE_WRITES: usize = 8;
/// Offset of the number of pages written by DMA (u64).
const DMA_WRITES: usize = 16;

/// The registers, little-endian as they travel. All 0 at power-on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Registers(pub(super) [u8; REGISTER_BYTES]);

impl Registers {
    pub(super) fn power_on() -> Self {
        Self([0; REGISTER_BYTES])
    }

    pub(super) fn scratch(&self) -> u64 {
        self.get(SCRATCH)
    }

    pub(super) fn set_scratch(&mut self, value: u64) {
        self.set(SCRATCH, value);
    }

    pub(super) fn page_writes(&self) -> u64 {
        self.get(PAGE_WRITES)
    }

    pub(super) fn add_page_writes(&mut self, writes: u64) {
        self.set(PAGE_WRITES, self.page_writes().wrapping_add(writes));
    }

    pub(super) fn dma_writes(&self) -> u64 {
        self.get(DMA_WRITES)
    }

    pub(super) fn add_dma_writes(&mut self, writes: u64) {
        self.set(DMA_WRITES, self.dma_writes().wrapping_add(writes));
    }

    fn get(&self, at: usize) -> u64 {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.0[at..at + 8]);
        u64::from_le_bytes(bytes)
    }

    fn set(&mut self, at: usize, value: u64) {
        self.0[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
}
