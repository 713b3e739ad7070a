//! `vfioctl`: saves and restores the state of VFIO devices from a shell.
//!
//! ```text
//!   cli -> connection (options, environment, context) -> commands/* -> render
//!                                                        save, restore: start -> stream or wait -> summary
//! ```
//!
//! Invariants: results go to stdout, all else to stderr. With `-o json` or `-o yaml` stdout has one document, and a watch has
//! one a change. The exit code says what became of the devices, see `--help`. Failure paths: every one ends in
//! [`outcome::Failure`], which has the exit code.

mod cli;
mod commands;
mod connection;
mod contexts;
mod outcome;
mod progress;
mod render;
mod values;
mod wait;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

use cli::{Cli, Command};
use commands::{
    certs, checkpoints, context, devices, dirty_tracking, doctor, operations, restore, save, shell,
};
use connection::connect;
use outcome::{Exit, Failure};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return finish(Err(Failure::new(Exit::Failed, format!("cannot start: {error}")))),
    };
    let result = runtime.block_on(Box::pin(run(cli)));
    // Waits for threads that still work: one may be removing what a save that was interrupted has written.
    drop(runtime);
    finish(result)
}

async fn run(cli: Cli) -> Result<Exit, Failure> {
    let Cli { global, command } = cli;
    let format = global.output_format;
    match command {
        Command::Devices(command) => devices::run(&connect(&global).await?, command, format).await,
        Command::Save(args) => Box::pin(save::run(&connect(&global).await?, *args, format)).await,
        Command::Restore(args) => Box::pin(restore::run(&global, *args)).await,
        Command::Checkpoints(command) => Box::pin(checkpoints::run(&global, command)).await,
        Command::Operations(command) => operations::run(&connect(&global).await?, command, format).await,
        Command::DirtyTracking(command) => {
            dirty_tracking::run(&connect(&global).await?, command, format).await
        }
        Command::Context(command) => context::run(&global, command),
        Command::Doctor(args) => Box::pin(doctor::run(&global, args)).await,
        Command::Certs(command) => certs::run(command, format),
        Command::Completion(args) => shell::completion(&args),
        Command::Man(args) => shell::man(&args),
    }
}

fn finish(result: Result<Exit, Failure>) -> ExitCode {
    let exit = match result {
        Ok(exit) => exit,
        Err(failure) => {
            // A stderr that is closed leaves only the exit code to speak.
            let _unsaid = writeln!(std::io::stderr(), "vfioctl: {}", failure.message);
            failure.exit
        }
    };
    ExitCode::from(exit.code())
}
