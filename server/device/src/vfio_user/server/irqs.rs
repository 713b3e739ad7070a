//! Interrupts: eventfds that a client sends, armed on the device through its [`ConfigSpace`].
//!
//! ```text
//!   SET_IRQS   trigger, eventfds      these vectors, beside those armed before      -> arm all from vector 0
//!              trigger, eventfds, 0   these vectors no longer                       -> arm the rest, or disarm
//!              trigger, none, count 0 none of the kind any longer                   -> disarm
//!              trigger, none | bools  signal armed vectors                          -> here, on our duplicates
//! ```
//!
//! A client can send only a few descriptors with a message, so it arms a large set piece by piece; a device arms a
//! whole set from vector 0. A vector in between that nobody armed gets an eventfd that nobody listens to.
//!
//! # Invariants
//! - Descriptors are kept for armed vectors only, at most one a vector.
//! - "Signal, if false" signals nothing and succeeds exactly where the vectors are armed, as with the kernel.
//!
//! # Failure paths
//! Where the device refuses, nothing is kept of the request; what was armed before still counts only if the device
//! says that it does.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::EventfdFlags;
use rustix::io::Errno;
use vfio_bindings::bindings::vfio as uapi;

use super::errno;
use super::pci::PciRegisters;
use crate::vfio_user::codec::{IrqInfo, SetIrqs};
use crate::{ConfigSpace, DeviceError, InterruptKind};

/// How many kinds of interrupt a PCI device has: INTx, MSI, MSI-X, errors, and requests to let the device go.
pub(super) const KINDS: u32 = uapi::VFIO_PCI_NUM_IRQS;

const ACTIONS: u32 =
    uapi::VFIO_IRQ_SET_ACTION_MASK | uapi::VFIO_IRQ_SET_ACTION_UNMASK | uapi::VFIO_IRQ_SET_ACTION_TRIGGER;

/// What an index stands for, where interrupts of it can be armed.
fn kind(index: u32) -> Option<InterruptKind> {
    match index {
        uapi::VFIO_PCI_MSI_IRQ_INDEX => Some(InterruptKind::Msi),
        uapi::VFIO_PCI_MSIX_IRQ_INDEX => Some(InterruptKind::MsiX),
        _ => None,
    }
}

/// `DEVICE_GET_IRQ_INFO`. `registers` is `None` for a device that is no PCI function.
pub(super) fn info(index: u32, registers: Option<&PciRegisters>) -> Result<IrqInfo, Errno> {
    if index >= KINDS {
        return Err(Errno::INVAL);
    }
    let count = match (kind(index), registers) {
        (Some(kind), Some(registers)) => registers.vectors(kind),
        (None, _) | (_, None) => 0,
    };
    let flags = if count == 0 { 0 } else { uapi::VFIO_IRQ_INFO_EVENTFD | uapi::VFIO_IRQ_INFO_NORESIZE };
    Ok(IrqInfo { flags, index, count })
}

/// The eventfds that one client armed.
#[derive(Debug, Default)]
pub(super) struct Interrupts {
    kind: Option<InterruptKind>,
    vectors: Vec<Option<OwnedFd>>,
}

/// What a request does, once it is known to make sense.
enum Request<'a> {
    DisarmAll,
    /// One a vector; none where the vector is disarmed.
    Replace(Vec<Option<OwnedFd>>),
    /// Every vector, or those whose byte is 1.
    Signal(Option<&'a [u8]>),
}

impl Interrupts {
    /// `DEVICE_SET_IRQS`.
    pub(super) fn set(
        &mut self,
        irqs: &SetIrqs<'_>,
        fds: Vec<OwnedFd>,
        space: &mut dyn ConfigSpace,
        registers: &PciRegisters,
    ) -> Result<(), Errno> {
        let kind = kind(irqs.index).ok_or(Errno::INVAL)?;
        let vectors = registers.vectors(kind);
        let end = irqs.start.checked_add(irqs.count).ok_or(Errno::INVAL)?;
        if irqs.start >= vectors || end > vectors {
            return Err(Errno::INVAL);
        }
        // At most 2048 by the check above.
        let start = usize::try_from(irqs.start).map_err(|_| Errno::INVAL)?;
        let count = usize::try_from(irqs.count).map_err(|_| Errno::INVAL)?;
        match classify(irqs, count, fds)? {
            Request::DisarmAll if self.kind == Some(kind) => {
                self.release(space).map_err(|error| errno::of(&error))
            }
            // Disarming what is not armed is no error.
            Request::DisarmAll => Ok(()),
            Request::Replace(sent) => self.replace(kind, start, sent, space),
            Request::Signal(bools) => {
                let captured = space.capture().map_err(|error| errno::of(&error))?;
                let armed = captured.interrupts.filter(|armed| armed.kind == kind);
                if armed.is_none_or(|armed| armed.vectors < end) {
                    return Err(Errno::INVAL);
                }
                self.signal(start, count, bools)
            }
        }
    }

    /// Takes away what this client armed, for the next one to find nothing.
    pub(super) fn release(&mut self, space: &mut dyn ConfigSpace) -> Result<(), DeviceError> {
        self.vectors.clear();
        self.kind.take().map_or(Ok(()), |kind| space.disarm(kind))
    }

    /// Puts `sent` in place of the vectors from `start` on and arms what there is then.
    fn replace(
        &mut self,
        kind: InterruptKind,
        start: usize,
        sent: Vec<Option<OwnedFd>>,
        space: &mut dyn ConfigSpace,
    ) -> Result<(), Errno> {
        let same = self.kind == Some(kind);
        let kept = if same { self.vectors.as_slice() } else { &[] };
        let length = kept.len().max(start + sent.len());
        let mut merged: Vec<Option<BorrowedFd<'_>>> = (0..length)
            .map(|vector| {
                let replaced = vector.checked_sub(start).and_then(|index| sent.get(index));
                replaced.or_else(|| kept.get(vector))?.as_ref().map(AsFd::as_fd)
            })
            .collect();
        while merged.last().is_some_and(Option::is_none) {
            merged.pop();
        }
        let length = merged.len();
        let done = if length > 0 {
            let unheard = rustix::event::eventfd(0, EventfdFlags::CLOEXEC)?;
            let whole: Vec<BorrowedFd<'_>> =
                merged.iter().map(|vector| vector.unwrap_or(unheard.as_fd())).collect();
            space.arm(kind, &whole)
        } else if same {
            space.disarm(kind)
        } else {
            Ok(())
        };
        if let Err(error) = done {
            let still = space.capture().ok().and_then(|captured| captured.interrupts);
            if still.map(|armed| armed.kind) != self.kind {
                self.vectors.clear();
                self.kind = None;
            }
            return Err(errno::of(&error));
        }
        if !same {
            if length == 0 {
                return Ok(());
            }
            self.vectors.clear();
        }
        self.vectors.resize_with(self.vectors.len().max(start + sent.len()), || None);
        for (vector, eventfd) in self.vectors.iter_mut().skip(start).zip(sent) {
            *vector = eventfd;
        }
        self.vectors.truncate(length);
        self.kind = (length > 0).then_some(kind);
        Ok(())
    }

    fn signal(&self, start: usize, count: usize, bools: Option<&[u8]>) -> Result<(), Errno> {
        for (index, vector) in self.vectors.iter().skip(start).take(count).enumerate() {
            let wanted = bools.is_none_or(|bools| bools.get(index) == Some(&1));
            if let (true, Some(eventfd)) = (wanted, vector) {
                let signalled = crate::config_space::signal(eventfd.as_fd());
                signalled.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
            }
        }
        Ok(())
    }
}

/// Checks what a request says of itself, as libvfio-user and the kernel do.
fn classify<'a>(irqs: &SetIrqs<'a>, count: usize, fds: Vec<OwnedFd>) -> Result<Request<'a>, Errno> {
    match irqs.flags & ACTIONS {
        uapi::VFIO_IRQ_SET_ACTION_TRIGGER => {}
        // The kernel masks neither kind.
        uapi::VFIO_IRQ_SET_ACTION_MASK | uapi::VFIO_IRQ_SET_ACTION_UNMASK => return Err(Errno::NOTTY),
        _ => return Err(Errno::INVAL),
    }
    let data = irqs.flags & !ACTIONS;
    if count == 0 {
        let disarms = data == uapi::VFIO_IRQ_SET_DATA_NONE && irqs.start == 0 && fds.is_empty();
        return if disarms { Ok(Request::DisarmAll) } else { Err(Errno::INVAL) };
    }
    match data {
        uapi::VFIO_IRQ_SET_DATA_EVENTFD if fds.is_empty() => {
            Ok(Request::Replace((0..count).map(|_| None).collect()))
        }
        uapi::VFIO_IRQ_SET_DATA_EVENTFD if fds.len() == count => {
            Ok(Request::Replace(fds.into_iter().map(Some).collect()))
        }
        uapi::VFIO_IRQ_SET_DATA_NONE if fds.is_empty() => Ok(Request::Signal(None)),
        uapi::VFIO_IRQ_SET_DATA_BOOL if fds.is_empty() && irqs.data.len() == count => {
            Ok(Request::Signal(Some(irqs.data)))
        }
        _ => Err(Errno::INVAL),
    }
}
