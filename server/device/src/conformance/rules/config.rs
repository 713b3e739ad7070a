//! PCI configuration space and interrupts.

use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};
use vfio_checkpoint_fsm::State;

use super::super::bench::{Bench, Slot};
use super::super::pieces::Pieces;
use super::super::rule::{Answer, Instead, Rule, Weight, differs, holds, not_applicable, not_observed};
use super::{errno_name, source};
use crate::kernel::quirks::Quirk;
use crate::{ConfigSpace, DeviceError, InterruptKind, PciCommand};

const NO_DMA: Weight = Weight::Matters {
    consequence: "a restored device could not do DMA; mlx5 times out on its command queue",
};
const NO_INTERRUPTS: Weight = Weight::Matters {
    consequence: "a restored device would be silent: its workload would wait for interrupts",
};

pub(super) const RULES: &[Rule] = &[
    Rule {
        id: "command-can-be-written",
        contract: "Bus mastering can be switched on and off in PCI_COMMAND, and is read back as written.",
        source: source::CONFIG,
        weight: NO_DMA,
        quirks: &[Quirk::CommandIsFixed],
        check: written,
    },
    Rule {
        id: "command-bits-are-stable",
        contract: "The bits of PCI_COMMAND that a restore writes are read back the same however often, and captured so.",
        source: source::CONFIG,
        weight: NO_DMA,
        quirks: &[],
        check: stable,
    },
    Rule {
        id: "command-can-be-fixed-up-in-resuming",
        contract: "PCI_COMMAND written in RESUMING stands once the device runs.",
        source: source::CONFIG,
        weight: NO_DMA,
        quirks: &[Quirk::CommandIsFixed],
        check: in_resuming,
    },
    Rule {
        id: "msi-armed-captured-disarmed",
        contract: "MSI that was armed is captured as armed, and gone once it was disarmed.",
        source: source::IRQS,
        weight: NO_INTERRUPTS,
        quirks: &[],
        check: |bench| interrupts(bench, InterruptKind::Msi),
    },
    Rule {
        id: "msix-armed-captured-disarmed",
        contract: "MSI-X that was armed is captured as armed, and gone once it was disarmed.",
        source: source::IRQS,
        weight: NO_INTERRUPTS,
        quirks: &[],
        check: |bench| interrupts(bench, InterruptKind::MsiX),
    },
    Rule {
        id: "disarming-what-is-not-armed",
        contract: "Disarming interrupts that are not armed is no error.",
        source: source::IRQS,
        weight: Weight::Tolerated { how: "interrupts are disarmed only where they are armed anew" },
        quirks: &[],
        check: disarm_twice,
    },
];

fn space(slot: &mut Slot) -> Result<&mut dyn ConfigSpace, Instead> {
    match slot.device()?.config_space() {
        Some(space) => Ok(space),
        None => not_applicable("the device has no PCI configuration space"),
    }
}

/// Which of the bits that a restore writes can be switched, by name.
fn written(bench: &mut Bench) -> Answer {
    let space = space(bench.source())?;
    let before = space.command()?;
    let mut switched = Vec::new();
    // A function without such ranges or interrupts has the bit fixed, which is its right; bus mastering is needed.
    for (name, bit) in [
        ("BUS_MASTER", PciCommand::BUS_MASTER),
        ("MEMORY", PciCommand::MEMORY),
        ("IO", PciCommand::IO),
        ("INTX_DISABLE", PciCommand::INTX_DISABLE),
    ] {
        space.set_command(PciCommand(before.0 | bit))?;
        let on = space.command()?.0 & bit != 0;
        space.set_command(PciCommand(before.0 & !bit))?;
        let off = space.command()?.0 & bit == 0;
        space.set_command(before)?;
        if on && off {
            switched.push(name);
        } else if bit == PciCommand::BUS_MASTER {
            return differs(format!("bus mastering is fixed at {}", u8::from(on)));
        }
    }
    holds(format!("can be switched: {}", switched.join(" ")))
}

fn stable(bench: &mut Bench) -> Answer {
    let space = space(bench.source())?;
    let before = space.command()?;
    space.set_command(PciCommand(before.0 | PciCommand::RESTORED))?;
    let (first, second) = (space.command()?, space.command()?);
    let captured = space.capture()?.command;
    space.set_command(before)?;
    if first != second || first != captured {
        return differs(format!("{:#06x}, then {:#06x}, captured {:#06x}", first.0, second.0, captured.0));
    }
    holds(format!("{:#06x}", first.0))
}

fn in_resuming(bench: &mut Bench) -> Answer {
    space(bench.target())?;
    let blob = bench.blob()?;
    let target = bench.target();
    let before = space(target)?.command()?;
    space(target)?.set_command(PciCommand(before.0 & !PciCommand::BUS_MASTER))?;
    let stream = target.load(&blob, Pieces::Usual)?;
    let restored = PciCommand(before.0 | PciCommand::BUS_MASTER);
    let space_in_resuming = space(target)?;
    let command = space_in_resuming.command()?.with_restored_bits_of(restored);
    space_in_resuming.set_command(command)?;
    target.quiet(State::Running)?;
    drop(stream);
    let after = space(target)?.command()?;
    space(target)?.set_command(before)?;
    if after.0 & PciCommand::BUS_MASTER == 0 {
        return differs(format!(
            "{:#06x} was written in RESUMING, {:#06x} stands in RUNNING",
            command.0, after.0
        ));
    }
    holds(format!("{:#06x}", after.0))
}

fn vector() -> Result<OwnedFd, Instead> {
    eventfd(0, EventfdFlags::CLOEXEC)
        .map_err(|errno| Instead::NotObserved(format!("no eventfd could be made: {errno}")))
}

fn interrupts(bench: &mut Bench, kind: InterruptKind) -> Answer {
    let space = space(bench.source())?;
    let before = space.capture()?.interrupts;
    if before.is_some() {
        return not_observed("interrupts are armed already");
    }
    let eventfd = vector()?;
    match space.arm(kind, &[eventfd.as_fd()]) {
        Ok(()) => {}
        Err(error @ DeviceError::Argument { .. }) => {
            return not_applicable(format!("the device has no vector of this kind: {error}"));
        }
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOTTY)) => {
            return not_applicable(format!("the device has no vector of this kind: {}", errno_name(&error)));
        }
        Err(error) => return Err(error.into()),
    }
    let armed = space.capture()?.interrupts;
    space.disarm(kind)?;
    let after = space.capture()?.interrupts;
    match armed {
        Some(rearm) if rearm.kind == kind && after.is_none() => {
            holds(format!("{} vector captured, none after", rearm.vectors))
        }
        _ => differs(format!("captured as {armed:?} when armed and as {after:?} when disarmed")),
    }
}

fn disarm_twice(bench: &mut Bench) -> Answer {
    let space = space(bench.source())?;
    for kind in [InterruptKind::Msi, InterruptKind::MsiX] {
        for _ in 0..2 {
            space.disarm(kind)?;
        }
    }
    holds("twice for each kind")
}
