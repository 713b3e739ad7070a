//! The PCI function that a simulated device is: PCI_COMMAND, MSI and MSI-X.
//!
//! # Invariants
//! - At most one kind of interrupt is armed.
//! - Armed eventfds are duplicates: whoever armed may close its own.
//!
//! # Failure paths
//! Refusals are those of vfio-pci: more vectors than the function has, a file that is no eventfd, and a second kind
//! while one is armed are EINVAL.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use super::SimPci;
use crate::{ConfigCapture, InterruptKind, PciCommand, Rearm};

/// Bits of PCI_COMMAND that a function implements; the others read 0.
const COMMAND_BITS: u16 = 0x0547;

#[derive(Debug)]
pub(super) struct Pci {
    config: SimPci,
    command: u16,
    armed: Option<(InterruptKind, Vec<OwnedFd>)>,
}

impl Pci {
    pub(super) fn new(config: SimPci) -> Self {
        Self { config, command: 0, armed: None }
    }

    pub(super) fn capture(&self) -> ConfigCapture {
        let interrupts = self.armed.as_ref().map(|(kind, eventfds)| Rearm {
            kind: *kind,
            // At most 2048, by the configuration.
            vectors: u32::try_from(eventfds.len()).unwrap_or(u32::MAX),
        });
        ConfigCapture { command: self.command(), interrupts }
    }

    pub(super) fn command(&self) -> PciCommand {
        PciCommand(self.command)
    }

    pub(super) fn set_command(&mut self, command: PciCommand) {
        self.command = command.0 & COMMAND_BITS;
    }

    /// Arms vectors from 0, replacing what was armed of this kind.
    pub(super) fn arm(&mut self, kind: InterruptKind, eventfds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let vectors = match kind {
            InterruptKind::Msi => self.config.msi_vectors,
            InterruptKind::MsiX => self.config.msix_vectors,
        };
        let fits = u32::try_from(eventfds.len()).is_ok_and(|count| (1..=vectors).contains(&count));
        let other_armed = self.armed.as_ref().is_some_and(|(armed, _)| *armed != kind);
        if !fits || other_armed || !eventfds.iter().copied().all(is_eventfd) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let duplicates = eventfds.iter().map(BorrowedFd::try_clone_to_owned).collect::<io::Result<_>>()?;
        self.armed = Some((kind, duplicates));
        Ok(())
    }

    pub(super) fn disarm(&mut self, kind: InterruptKind) {
        if self.armed.as_ref().is_some_and(|(armed, _)| *armed == kind) {
            self.armed = None;
        }
    }

    /// Signals a vector's eventfd. `false` where it is not armed.
    pub(super) fn raise(&self, vector: u32) -> io::Result<bool> {
        let eventfds = self.armed.as_ref().map_or(&[][..], |(_, eventfds)| eventfds);
        match usize::try_from(vector).ok().and_then(|vector| eventfds.get(vector)) {
            Some(eventfd) => {
                crate::config_space::signal(eventfd.as_fd())?;
                Ok(true)
            }
            None => Ok(false),
        }
    }

    /// What the last close of the device does: interrupts go with their holder.
    pub(super) fn release(&mut self) {
        self.armed = None;
    }

    /// Power-on state.
    pub(super) fn reset(&mut self) {
        self.armed = None;
        self.command = 0;
    }
}

/// Whether a file is an eventfd. Where the system does not say, it passes.
fn is_eventfd(fd: BorrowedFd<'_>) -> bool {
    fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
        .map_or(true, |target| target.to_string_lossy().contains("eventfd"))
}
