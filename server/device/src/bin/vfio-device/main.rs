//! `vfio-device`: one device, by hand: list what is there, look at it, save its state to a file, restore it.
//!
//! ```text
//!   args.rs      what can be said on the command line
//!   target.rs    a device's name -> an opened device on its lane (kernel, or simulated)
//!   list.rs      list, info: what sysfs shows, nothing opened
//!   transfer.rs  save, restore: a state file at one end, a device at the other
//!   failure.rs   what went wrong -> the exit code and the words for it
//! ```
//! Results go to standard output, everything else to standard error. Exit codes are part of the interface; see
//! [`failure::ExitStatus`].

#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a command line speaks on its standard streams"
)]

mod args;
mod failure;
mod list;
mod target;
mod transfer;

use std::process::ExitCode;

use clap::Parser;

use crate::args::{Arguments, Command};
use crate::failure::ExitStatus;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let done = match arguments.command {
        Command::List { output } => list::list(output),
        Command::Info { device, output } => list::info(&device, output),
        Command::Save(save) => transfer::save(&save),
        Command::Restore(restore) => transfer::restore(&restore),
    };
    match done {
        Ok(()) => ExitStatus::Done.into(),
        Err(failure) => {
            eprintln!("vfio-device: {failure}");
            failure.status().into()
        }
    }
}
