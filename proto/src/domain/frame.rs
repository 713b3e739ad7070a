//! What frames carry besides state: progress, seals and captures of configuration space.

use std::time::Duration;

use bytes::Bytes;
use vfio_checkpoint_seal::Seal;

use super::{Invalid, checks};
use crate::v1;

/// A kind of interrupt that a PCI function can be armed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum InterruptKind {
    /// Message-signalled interrupts, up to 32 vectors.
    Msi,
    /// MSI-X, up to 2048 vectors.
    MsiX,
}

impl InterruptKind {
    /// The most vectors that a function may have of this kind.
    pub fn max_vectors(self) -> u32 {
        match self {
            Self::Msi => 32,
            Self::MsiX => 2048,
        }
    }
}

/// Interrupts that were armed when a state was captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ArmedInterrupts {
    /// MSI or MSI-X.
    pub kind: InterruptKind,
    /// How many vectors: 1 to [`InterruptKind::max_vectors`].
    pub vectors: u32,
}

/// What a device's state does not hold of its PCI configuration space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConfigSpaceCapture {
    /// PCI_COMMAND.
    pub command: u16,
    /// What was armed, if anything was.
    pub interrupts: Option<ArmedInterrupts>,
}

impl TryFrom<v1::ConfigSpaceCapture> for ConfigSpaceCapture {
    type Error = Invalid;

    fn try_from(wire: v1::ConfigSpaceCapture) -> Result<Self, Invalid> {
        let command = u16::try_from(wire.command)
            .map_err(|_| Invalid::new("command", format!("{:#x} is no register of 16 bits", wire.command)))?;
        let kind = match checks::known("interrupt_kind", wire.interrupt_kind)? {
            v1::InterruptKind::Unspecified => None,
            v1::InterruptKind::Msi => Some(InterruptKind::Msi),
            v1::InterruptKind::MsiX => Some(InterruptKind::MsiX),
        };
        let vectors = wire.interrupt_vectors;
        let interrupts = match kind {
            Some(kind) if (1..=kind.max_vectors()).contains(&vectors) => {
                Some(ArmedInterrupts { kind, vectors })
            }
            Some(kind) => {
                let problem =
                    format!("it is {vectors}, and {kind:?} has 1 to {} vectors", kind.max_vectors());
                return Err(Invalid::new("interrupt_vectors", problem));
            }
            None if vectors == 0 => None,
            None => {
                let problem = format!("it is {vectors}, but interrupt_kind says that none was armed");
                return Err(Invalid::new("interrupt_vectors", problem));
            }
        };
        Ok(Self { command, interrupts })
    }
}

impl From<ConfigSpaceCapture> for v1::ConfigSpaceCapture {
    fn from(capture: ConfigSpaceCapture) -> Self {
        let (kind, vectors) = match capture.interrupts {
            None => (v1::InterruptKind::Unspecified, 0),
            Some(ArmedInterrupts { kind: InterruptKind::Msi, vectors }) => (v1::InterruptKind::Msi, vectors),
            Some(ArmedInterrupts { kind: InterruptKind::MsiX, vectors }) => {
                (v1::InterruptKind::MsiX, vectors)
            }
        };
        Self { command: capture.command.into(), interrupt_kind: kind.into(), interrupt_vectors: vectors }
    }
}

/// Where a giver's operation is.
pub type Phase = v1::OperationPhase;

/// How far the giver is. For people.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// The operation's phase. UNSPECIFIED where the giver runs none.
    pub phase: Phase,
    /// Bytes that are still to come from all devices, as far as known.
    pub left_bytes: u64,
    /// The predicted downtime, in whole microseconds on the wire. None where it cannot be told.
    pub predicted_downtime: Option<Duration>,
}

impl TryFrom<v1::StreamProgress> for Progress {
    type Error = Invalid;

    fn try_from(wire: v1::StreamProgress) -> Result<Self, Invalid> {
        Ok(Self {
            phase: checks::known("phase", wire.phase)?,
            left_bytes: wire.left_bytes,
            predicted_downtime: (wire.predicted_downtime_us != 0)
                .then(|| Duration::from_micros(wire.predicted_downtime_us)),
        })
    }
}

impl From<Progress> for v1::StreamProgress {
    fn from(progress: Progress) -> Self {
        // A prediction of less than a microsecond must not read as none.
        let us = progress
            .predicted_downtime
            .map_or(0, |downtime| u64::try_from(downtime.as_micros()).unwrap_or(u64::MAX).max(1));
        Self { phase: progress.phase.into(), left_bytes: progress.left_bytes, predicted_downtime_us: us }
    }
}

/// The seal that a length and a digest are.
pub(crate) fn seal_from_wire(length_bytes: u64, blake3: &Bytes) -> Result<Seal, Invalid> {
    let digest: [u8; 32] = blake3
        .as_ref()
        .try_into()
        .map_err(|_| Invalid::new("blake3", format!("it has {} bytes, and a digest has 32", blake3.len())))?;
    Ok(Seal { bytes: length_bytes, blake3: digest })
}

impl TryFrom<v1::Seal> for Seal {
    type Error = Invalid;

    fn try_from(wire: v1::Seal) -> Result<Self, Invalid> {
        seal_from_wire(wire.length_bytes, &wire.blake3)
    }
}

impl From<Seal> for v1::Seal {
    fn from(seal: Seal) -> Self {
        Self { length_bytes: seal.bytes, blake3: Bytes::copy_from_slice(&seal.blake3) }
    }
}
