//! What the kernel's mtty cannot show, on a variant of it whose module parameters say how it behaves.
//!
//! ```text
//!   mtty.c of the kernel --variant.awk--> hooks --> variant.c --> mtty_variant.ko --> GUEST_MTTYV1
//!                                                      ^
//!                              Parameters: migration_flags, reset_on_close, enomsg, …
//! ```
//! The state machine's table, ioctls and data fds are a real kernel's; only the device behind them is made to differ.
//! Each test says its [`Parameters`] and leaves the defaults behind; the parameters are the module's, so they hold
//! for all four devices.

mod close;
mod dma_log;
mod faults;
mod flags;
mod parameters;
mod precopy;
mod stream;

use vfio_checkpoint_device::MigrationDevice;
use vfio_checkpoint_device::kernel::KernelPath::{Container, Iommufd};
use vfio_checkpoint_device::kernel::{KernelDevice, KernelPath};

use crate::Test;
use crate::save_restore::open;
use crate::uart;

pub(crate) use parameters::Parameters;

pub(crate) const TESTS: &[Test] = &[
    ("variant::flags::every_pair_of_every_flag_set_container", |facts| flags::matrices(facts, Container)),
    ("variant::flags::every_pair_of_every_flag_set_iommufd", |facts| flags::matrices(facts, Iommufd)),
    ("variant::flags::without_stop_copy_a_device_cannot_migrate", flags::without_stop_copy),
    ("variant::close::the_last_close_resets_container", |facts| close::last_close(facts, Container)),
    ("variant::close::the_last_close_resets_iommufd", |facts| close::last_close(facts, Iommufd)),
    ("variant::close::another_process_holds_the_state_container", |facts| close::held(facts, Container)),
    ("variant::close::another_process_holds_the_state_iommufd", |facts| close::held(facts, Iommufd)),
    ("variant::close::a_device_found_in_resuming_is_reset", close::found_resuming),
    ("variant::precopy::no_message_is_not_the_end", precopy::no_message),
    ("variant::precopy::dirty_bytes_are_seen_and_copied", precopy::dirty_bytes),
    ("variant::precopy::a_record_under_way_is_finished_after_the_stop", precopy::cut_record),
    ("variant::stream::at_the_defaults_it_is_the_stream_of_mtty", stream::as_mtty),
    ("variant::stream::lost_doubled_and_swapped_records_are_refused", stream::damaged_records),
    ("variant::dma_log::exactly_the_written_pages_container", |facts| dma_log::exact(facts, Container)),
    ("variant::dma_log::exactly_the_written_pages_iommufd", |facts| dma_log::exact(facts, Iommufd)),
    ("variant::dma_log::refusals_and_what_ends_a_log", dma_log::refusals),
    ("variant::faults::a_save_survives_every_hop", faults::saves),
    ("variant::faults::a_restore_survives_every_hop", faults::restores),
    ("variant::faults::a_recovery_that_fails_too_ends_in_quarantine", faults::recoveries),
];

/// Opens a device and resets it: whatever an earlier test left behind is gone.
fn blank(uuid: &str, path: KernelPath) -> KernelDevice {
    let mut device = open(uuid, path);
    device.reset().expect("a reset");
    device
}

/// The same, with registers of which no reset leaves any.
fn programmed(uuid: &str, path: KernelPath, seed: u8) -> KernelDevice {
    let device = blank(uuid, path);
    uart::program(&device, 1, seed);
    device
}
