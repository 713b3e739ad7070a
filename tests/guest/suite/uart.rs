//! The UART registers of an mtty port: the state that a save must carry.
//!
//! Port `n` is region `n`, eight one-byte registers. With the divisor latch (DLAB) set, the first two are the divisor;
//! a test leaves it set, so that what it reads back is what it wrote and reading has no side effect.

use std::fs::File;
use std::os::unix::fs::FileExt;

use vfio_checkpoint_device::kernel::KernelDevice;

/// The scratch register, which does nothing.
const SCRATCH: u64 = 7;
const DIVISOR_LOW: u64 = 0;
const DIVISOR_HIGH: u64 = 1;
const LINE_CONTROL: u64 = 3;
const MODEM_CONTROL: u64 = 4;
const DIVISOR_LATCH: u8 = 0x80;
/// Where vfio puts region `n` of a PCI-like device: at `n << 40` of the device fd.
const REGION_SHIFT: u32 = 40;

/// The registers of all ports of a device.
pub(crate) type Registers = Vec<[u8; 8]>;

/// What a test puts into port `port`, different for each `seed`.
pub(crate) fn program(device: &KernelDevice, ports: u8, seed: u8) {
    program_by(&file(device), ports, seed);
}

/// The same, by the file of a device that another process has open.
pub(crate) fn program_by(file: &File, ports: u8, seed: u8) {
    for port in 0..ports {
        let value = seed.wrapping_mul(7).wrapping_add(port);
        for (register, byte) in [
            (LINE_CONTROL, DIVISOR_LATCH | 0x03),
            (DIVISOR_LOW, value ^ 0x5a),
            (DIVISOR_HIGH, value ^ 0x13),
            (MODEM_CONTROL, 0x03),
            (SCRATCH, value),
        ] {
            file.write_at(&[byte], offset(port, register)).expect("a register write");
        }
    }
}

/// Writes the scratch register of the first port: one register write and no more.
pub(crate) fn scratch(device: &KernelDevice, value: u8) {
    file(device).write_at(&[value], offset(0, SCRATCH)).expect("a register write");
}

/// The registers of every port, read one by one.
pub(crate) fn registers(device: &KernelDevice, ports: u8) -> Registers {
    registers_by(&file(device), ports)
}

/// The same, by the file of a device that another process has open.
pub(crate) fn registers_by(file: &File, ports: u8) -> Registers {
    (0..ports)
        .map(|port| {
            let mut registers = [0; 8];
            for (register, byte) in (0..).zip(&mut registers) {
                let mut one = [0];
                file.read_at(&mut one, offset(port, register)).expect("a register read");
                *byte = one[0];
            }
            registers
        })
        .collect()
}

fn file(device: &KernelDevice) -> File {
    File::from(device.fds().device.try_clone().expect("a duplicate of the device fd"))
}

fn offset(port: u8, register: u64) -> u64 {
    (u64::from(port) << REGION_SHIFT) + register
}
