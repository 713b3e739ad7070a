//! `vfio-device`: one device, by hand: list what is there, look at it, save its state to a file, restore it.
//!
//! ```text
//!   args.rs      what can be said on the command line
//!   target.rs    a device's name -> an opened device on its lane (kernel, simulated, or a device process)
//!   list.rs      list, info: what sysfs shows, nothing opened
//!   transfer.rs  save, restore: a state file at one end, a device at the other
//!   mend.rs      recover, reset: a device that somebody left in the middle of something
//!   output.rs    results, as tables or as JSON
//!   conformance.rs  the suite of rules on a device, which loses its state
//!   failure.rs   what went wrong -> the exit code and the words for it
//! ```
//! Results go to standard output, everything else to standard error. Exit codes are part of the interface; see
//! [`failure::ExitStatus`].

#![allow(clippy::print_stderr, reason = "messages go to standard error; results go through output.rs")]

mod args;
mod conformance;
mod failure;
mod list;
mod mend;
mod output;
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
        Command::Conformance(conformance) => conformance::run(&conformance),
        Command::Restore(restore) => transfer::restore(&restore),
        Command::Recover(one) => mend::recover(&one),
        Command::Reset(one) => mend::reset(&one),
    };
    match done {
        Ok(()) => ExitStatus::Done.into(),
        Err(failure) => {
            eprintln!("vfio-device: {failure}");
            failure.status().into()
        }
    }
}
