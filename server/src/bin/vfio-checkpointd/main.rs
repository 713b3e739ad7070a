//! `vfio-checkpointd`: the node agent's program.
//!
//! ```text
//!   serve         the agent: its devices, over gRPC with mutual TLS
//!   hold          keeps devices open across the agent's restarts: see vfio_checkpoint_server::holder
//!   demo          two agents on loopback with simulated devices: list, save, restore, proof
//!   healthcheck   asks a serving agent whether it is well, for probes
//! ```
//! What it does goes to standard error as log lines. Exit codes are part of the interface; see [`ExitStatus`].

#![allow(clippy::print_stderr, reason = "why a command line ends goes to standard error")]

mod args;
mod demo;
mod health;
mod hold;
mod serve;

use std::process::ExitCode;

// State comes off the wire in pieces of a megabyte. The system's allocator gives each back to the kernel, which clears it
// anew for the next: a quarter of the receiver's time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

use clap::Parser as _;

use args::{Arguments, Command};

/// How the program ends. Usage errors are clap's, which exits with 2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ExitStatus {
    /// It did what was asked, or was told to end.
    Done = 0,
    /// It worked, and could not go on; or what was asked for is not well.
    Failed = 1,
    /// It cannot work, as things are. No device was touched.
    Blocked = 3,
}

impl From<ExitStatus> for ExitCode {
    fn from(status: ExitStatus) -> Self {
        Self::from(status as u8)
    }
}

fn main() -> ExitCode {
    let status = match Arguments::parse().command {
        Command::Serve(arguments) => serve::run(arguments),
        Command::Demo(arguments) => demo::run(&arguments),
        Command::Hold(arguments) => hold::run(arguments),
        Command::Healthcheck(arguments) => health::run(&arguments),
    };
    status.into()
}

/// Says why the program ends.
pub(crate) fn complain(command: &str, error: &(dyn std::error::Error + 'static)) {
    eprintln!("vfio-checkpointd {command}: {}", vfio_checkpoint_device::chain(error));
}
