//! Configuration space and interrupts of a real PCI function.

use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};
use vfio_checkpoint_device::kernel::{KernelPath, OpenDevice, OpenOptions};
use vfio_checkpoint_device::{InterruptKind, PciCommand, chain};

use crate::Test;
use crate::facts::Facts;

pub(crate) const TESTS: &[Test] = &[
    ("pci::command_is_restored_within_the_whitelist_container", |facts| {
        command(facts, KernelPath::Container);
    }),
    ("pci::command_is_restored_within_the_whitelist_iommufd", |facts| command(facts, KernelPath::Iommufd)),
    ("pci::interrupts_are_armed_again", interrupts),
];

fn open(facts: &Facts, path: KernelPath) -> OpenDevice {
    let options = OpenOptions { path: Some(path), ..OpenOptions::default() };
    OpenDevice::open(&facts.e1000e, &options).unwrap_or_else(|error| panic!("{}", chain(&error)))
}

/// A freshly opened function has no bus mastering; writing back what was captured brings it, and nothing beyond the
/// whitelist.
fn command(facts: &Facts, path: KernelPath) {
    let captured = {
        let mut device = open(facts, path);
        let space = device.config_space().expect("a PCI function");
        let fresh = space.command().expect("the command register");
        assert_eq!(fresh.0 & PciCommand::BUS_MASTER, 0, "a fresh function does no DMA");
        let wanted =
            PciCommand(fresh.0 | PciCommand::MEMORY | PciCommand::BUS_MASTER | PciCommand::INTX_DISABLE);
        space.set_command(wanted).expect("a written command register");
        let capture = space.capture().expect("a capture");
        assert_eq!(capture.command.0 & PciCommand::RESTORED, wanted.0 & PciCommand::RESTORED);
        assert_eq!(capture.interrupts, None);
        capture
    };
    let mut device = open(facts, path);
    let space = device.config_space().expect("a PCI function");
    let fresh = space.command().expect("the command register");
    assert_eq!(fresh.0 & PciCommand::BUS_MASTER, 0, "the last close reset the function");
    space.set_command(fresh.with_restored_bits_of(captured.command)).expect("the fix-up");
    let now = space.command().expect("the command register");
    assert_eq!(now.0 & PciCommand::RESTORED, captured.command.0 & PciCommand::RESTORED);
    assert_eq!(now.0 & !PciCommand::RESTORED, fresh.0 & !PciCommand::RESTORED);
}

fn eventfds(count: u32) -> Vec<OwnedFd> {
    (0..count).map(|_| eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd")).collect()
}

/// Captured as armed, lost with the close, armed again with new eventfds.
fn interrupts(facts: &Facts) {
    for (kind, vectors) in [(InterruptKind::MsiX, 3), (InterruptKind::Msi, 1)] {
        let captured = {
            let mut device = open(facts, KernelPath::Iommufd);
            let space = device.config_space().expect("a PCI function");
            let fds = eventfds(vectors);
            let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            space.arm(kind, &borrowed).expect("armed interrupts");
            space.capture().expect("a capture")
        };
        let rearm = captured.interrupts.expect("interrupts were armed");
        assert_eq!((rearm.kind, rearm.vectors), (kind, vectors));

        let mut device = open(facts, KernelPath::Container);
        let space = device.config_space().expect("a PCI function");
        assert_eq!(
            space.capture().expect("a capture").interrupts,
            None,
            "a reopened function has none armed"
        );
        let fds = eventfds(rearm.vectors);
        let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        assert!(rearm.apply(space, &borrowed[1..]).is_err(), "one eventfd a vector");
        rearm.apply(space, &borrowed).expect("armed interrupts");
        assert_eq!(space.capture().expect("a capture").interrupts, captured.interrupts);
        for (vector, fd) in (0..).zip(&fds) {
            device.trigger(kind, vector).expect("a triggered vector");
            let mut count = [0; 8];
            rustix::io::read(fd, &mut count).expect("the vector's own eventfd");
            assert_eq!(u64::from_ne_bytes(count), 1, "{kind:?} vector {vector}");
        }
        let space = device.config_space().expect("a PCI function");
        space.disarm(kind).expect("disarmed interrupts");
        assert_eq!(space.capture().expect("a capture").interrupts, None);
    }
}
