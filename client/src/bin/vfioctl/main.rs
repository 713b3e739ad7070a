//! `vfioctl`: saves, restores and moves the state of VFIO devices from a shell.
//!
//! ```text
//!   cli -> connection (options, environment, context) -> commands/* -> render
//!                                                        save, restore, migrate: start -> stream or wait -> summary
//! ```
//!
//! Invariants: results go to stdout, all else to stderr. With `-o json` or `-o yaml` stdout has one document, and a watch has
//! one a change; stderr has documents then, too, a line each in JSON: `note` for what is said on the way, and last `error` for
//! a failure. The exit code says what became of the devices, see `--help`. Failure paths: every one ends in
//! [`failure::Failure`], which has the exit code.

mod cli;
mod commands;
mod connection;
mod contexts;
mod failure;
mod outcome;
mod progress;
mod render;
mod values;
mod wait;

// As in the agent: state comes off the wire in pieces of a megabyte, which the system's allocator gives back each time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Parser, ValueEnum};

use cli::{Cli, Command, FORMAT_VARIABLE, OutputFormat};
use commands::{
    certs, checkpoints, context, devices, dirty_tracking, doctor, migrate, operations, restore, save, shell,
};
use connection::connect;
use outcome::{Exit, Failure};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return unparsed(&error),
    };
    let format = cli.global.output_format;
    render::speak(format);
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            return finish(Err(Failure::new(Exit::Failed, format!("cannot start: {error}"))), format);
        }
    };
    let result = runtime.block_on(Box::pin(run(cli)));
    // Waits for threads that still work: one may be removing what a save that was interrupted has written.
    drop(runtime);
    finish(result, format)
}

/// A command line that is wrong, or asks for help.
fn unparsed(error: &clap::Error) -> ExitCode {
    let format = wanted_format(std::env::args_os().skip(1), std::env::var_os(FORMAT_VARIABLE));
    match (format, error.use_stderr()) {
        (OutputFormat::Json | OutputFormat::Yaml, true) => {
            render::speak(format);
            let text = error.to_string();
            let text = text.trim().trim_start_matches("error: ");
            // A command that is missing is answered with the help, which is not what went wrong.
            let text = if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
                "the command is not whole"
            } else {
                text.split("\n\nFor more information").next().unwrap_or(text)
            };
            finish(Err(Failure::usage(text).hint("see `vfioctl --help`")), format)
        }
        (OutputFormat::Table | OutputFormat::Wide | OutputFormat::Json | OutputFormat::Yaml, _) => {
            // Where neither stdout nor stderr is there, the exit code is all that can be told.
            let _unsaid = error.print();
            if error.use_stderr() { ExitCode::from(Exit::Usage.code()) } else { ExitCode::SUCCESS }
        }
    }
}

/// The format that a command line asks for which cannot be understood as a whole.
fn wanted_format(args: impl Iterator<Item = OsString>, variable: Option<OsString>) -> OutputFormat {
    let known = |text: &str| OutputFormat::from_str(text, false).ok();
    let mut wanted = variable.and_then(|value| known(value.to_str()?));
    let mut is_next = false;
    for arg in args {
        let Some(arg) = arg.to_str() else { continue };
        let value = if is_next {
            Some(arg)
        } else {
            let short = arg.strip_prefix("-o").map(|value| value.trim_start_matches('='));
            arg.strip_prefix("--format=").or(short.filter(|value| !value.is_empty()))
        };
        is_next = arg == "-o" || arg == "--format";
        wanted = value.and_then(known).or(wanted);
    }
    wanted.unwrap_or(OutputFormat::Table)
}

async fn run(cli: Cli) -> Result<Exit, Failure> {
    let Cli { global, command } = cli;
    let format = global.output_format;
    match command {
        Command::Devices(command) => devices::run(&connect(&global).await?, command, format).await,
        Command::Save(args) => Box::pin(save::run(&connect(&global).await?, *args, format)).await,
        Command::Restore(args) => Box::pin(restore::run(&global, *args)).await,
        Command::Migrate(args) => Box::pin(migrate::run(&global, *args)).await,
        Command::Checkpoints(command) => Box::pin(checkpoints::run(&global, command)).await,
        Command::Operations(command) => {
            Box::pin(operations::run(&connect(&global).await?, command, format)).await
        }
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

fn finish(result: Result<Exit, Failure>, format: OutputFormat) -> ExitCode {
    let exit = match result {
        Ok(exit) => exit,
        Err(failure) => {
            if let Some(operation) = failure.shown()
                && let Err(unprinted) = operations::print_one(format, operation)
            {
                render::say(&unprinted.message);
            }
            render::say_failure(&failure);
            failure.exit
        }
    };
    ExitCode::from(exit.code())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_format_is_found_on_a_command_line_that_is_wrong() {
        let wanted = |line: &str, variable: Option<&str>| {
            wanted_format(line.split_whitespace().map(OsString::from), variable.map(OsString::from))
        };
        for line in ["x -o json", "-ojson x", "x -o=json", "x --format json --y", "--format=json"] {
            assert_eq!(wanted(line, None), OutputFormat::Json, "{line}");
        }
        assert_eq!(wanted("x", Some("yaml")), OutputFormat::Yaml);
        assert_eq!(wanted("x -o table", Some("yaml")), OutputFormat::Table);
        for line in ["x", "x -o", "x -o toml", "json"] {
            assert_eq!(wanted(line, None), OutputFormat::Table, "{line}");
        }
    }
}
