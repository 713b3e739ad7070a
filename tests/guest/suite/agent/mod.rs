//! The agent and its command line on real kernel devices, by mutual TLS over loopback.
//!
//! ```text
//!   suite --spawn--> vfio-checkpointd hold <--fds-- vfio-checkpointd serve --ioctls--> mtty, its variant, e1000e
//!     |                                                   ^   ^
//!     +--spawn--> vfioctl --gRPC, TLS---------------------+   |
//!     +--client library: a taker or giver that stands still --+
//! ```
//! Every program is the one that is shipped. While an agent owns a device nobody else can look at its registers, so a
//! test sets them before it starts the agent and reads them after it has ended it: mtty keeps its state over a close,
//! and its variant does unless it is told to reset then.
//!
//! | module | what it proves |
//! |---|---|
//! | [`transfer`] | save to a folder and restore from it, both modes, both ways to a device, and a set with its barrier |
//! | [`blocked`] | every blocker that a real device can provoke, and that none of them touches a device |
//! | [`killed`] | SIGKILL in the middle of everything, with a holder and without |
//! | [`migrate`] | devices move between two agents, by both modes and ways, and with a SIGKILL in the middle |
//! | [`process`] | the same for a device in a process of its own, by vfio-user |

mod blocked;
mod killed;
mod lab;
mod migrate;
mod process;
mod transfer;

use crate::Test;
use vfio_checkpoint_device::kernel::KernelPath::{Container, Iommufd};

pub(crate) const TESTS: &[Test] = &[
    ("agent::transfer::save_and_restore_container", |facts| transfer::save_and_restore(facts, Container)),
    ("agent::transfer::save_and_restore_iommufd", |facts| transfer::save_and_restore(facts, Iommufd)),
    ("agent::transfer::a_set_of_two_with_the_barrier", transfer::set_of_two),
    ("agent::blocked::devices_that_cannot_be_opened_say_why", blocked::not_open),
    ("agent::blocked::every_blocker_and_no_device_touched", blocked::each),
    ("agent::killed::in_a_save_container", |facts| killed::in_a_save(facts, Container)),
    ("agent::killed::in_a_save_iommufd", |facts| killed::in_a_save(facts, Iommufd)),
    ("agent::killed::in_pre_copy", killed::in_pre_copy),
    ("agent::killed::in_a_restore_container", |facts| killed::in_a_restore(facts, Container)),
    ("agent::killed::in_a_restore_iommufd", |facts| killed::in_a_restore(facts, Iommufd)),
    ("agent::killed::a_held_save_container", |facts| killed::held_save(facts, Container)),
    ("agent::killed::a_held_save_iommufd", |facts| killed::held_save(facts, Iommufd)),
    ("agent::killed::a_held_restore_container", |facts| killed::held_restore(facts, Container)),
    ("agent::killed::a_held_restore_iommufd", |facts| killed::held_restore(facts, Iommufd)),
    ("agent::migrate::there_and_back_container", |facts| migrate::there_and_back(facts, Container)),
    ("agent::migrate::there_and_back_iommufd", |facts| migrate::there_and_back(facts, Iommufd)),
    ("agent::migrate::registers_written_on_the_way", migrate::written_on_the_way),
    ("agent::migrate::a_set_of_two_with_the_barrier", migrate::set_of_two),
    ("agent::migrate::killed_container", |facts| migrate::killed(facts, Container)),
    ("agent::migrate::killed_iommufd", |facts| migrate::killed(facts, Iommufd)),
    ("agent::process::save_and_restore", process::save_and_restore),
    ("agent::process::a_set_of_two_with_the_barrier", process::set_of_two),
    ("agent::process::killed_in_a_save", process::killed_in_a_save),
    ("agent::process::killed_in_a_restore", process::killed_in_a_restore),
];
