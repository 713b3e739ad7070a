//! The suite that runs inside the guest, on real VFIO devices of a real kernel.
//!
//! One static binary that `tests/guest/init` starts as root with the facts of the guest in its environment. It prints
//! lines as cargo's test harness does, so that the host counts both alike: `test NAME ... ok (MS ms)`, `figures: …`, and a
//! last `test result:`. A test that panics has failed; the others go on.
//!
//! | module | what it proves on the kernel |
//! |---|---|
//! | [`matrix`] | every pair of states, hop by hop, against `fsm` and against the simulated device |
//! | [`save_restore`] | state moves from one device to another, by stop-copy and by pre-copy |
//! | [`blobs`] | damaged state ends in a reset device and a clear error |
//! | [`ownership`] | left-over states, duplicates, devices in use, devices that cannot migrate |
//! | [`pci`] | `PCI_COMMAND` and interrupt fix-ups, DMA mappings, on an e1000e |
//! | [`dma_log`] | the DMA log |
//! | [`variant`] | what the kernel's mtty cannot show: other flags, reset on close, ENOMSG, dirty state, failing hops |
//! | [`by_hand`] | the main job with the `vfio-device` binary, as a person does it |
//! | [`agent`] | the agent, its holder and `vfioctl` as processes: save, restore, blockers, SIGKILL |
//! | [`conformance`] | the rules of the migration contract, on every backend the same |
//! | [`kmsg`] | the kernel warned of nothing meanwhile |

#![allow(
    clippy::print_stdout,
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test program: it asserts by panicking and reports on standard output"
)]

mod agent;
mod blobs;
mod by_hand;
mod conformance;
mod dma_log;
mod facts;
mod kmsg;
mod matrix;
mod ownership;
mod pci;
mod save_restore;
mod uart;
mod variant;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Instant;

use crate::facts::Facts;

/// A test: its name and what it does.
type Test = (&'static str, fn(&Facts));

fn main() -> ExitCode {
    let facts = match Facts::from_environment() {
        Ok(facts) => facts,
        Err(missing) => {
            println!("test guest::facts ... FAILED: {missing}");
            println!("test result: FAILED. 0 passed; 1 failed");
            return ExitCode::FAILURE;
        }
    };
    let tests = [
        matrix::TESTS,
        save_restore::TESTS,
        blobs::TESTS,
        ownership::TESTS,
        pci::TESTS,
        dma_log::TESTS,
        variant::TESTS,
        by_hand::TESTS,
        agent::TESTS,
        conformance::TESTS,
        kmsg::TESTS,
    ];
    let (mut passed, mut failed) = (0_u32, 0_u32);
    for (name, run) in tests.into_iter().flatten() {
        let begun = Instant::now();
        if catch_unwind(AssertUnwindSafe(|| run(&facts))).is_ok() {
            passed += 1;
            println!("test {name} ... ok ({} ms)", begun.elapsed().as_millis());
        } else {
            failed += 1;
            println!("test {name} ... FAILED");
        }
    }
    let verdict = if failed == 0 { "ok" } else { "FAILED" };
    println!("test result: {verdict}. {passed} passed; {failed} failed");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
