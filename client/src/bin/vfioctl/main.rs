//! `vfioctl`: saves and restores the state of VFIO devices from a shell.
//!
//! ```text
//!   args -> connect -> devices | operations -> render
//!                   -> save:    StartSave -> stream into a folder -> wait until it is done -> summary
//!                   -> restore: verify a folder -> Restore -> stream out of it -> wait until it is done -> summary
//! ```
//!
//! Invariants: results go to stdout, all else to stderr. With `-o json` stdout has one document. The exit code says what
//! became of the devices, see `--help`. Failure paths: every one ends in [`outcome::Failure`], which has the exit code.

mod args;
mod calls;
mod outcome;
mod progress;
mod render;
mod restore;
mod save;
mod wait;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use vfio_checkpoint_client::call::{CallOptions, Client};
use vfio_checkpoint_client::connect::ConnectOptions;
use vfio_checkpoint_client::tls::{self, CredentialFiles, Credentials, ServerCheck};

use args::{Cli, Command, Global};
use outcome::{Exit, Failure};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return finish(Err(Failure::new(Exit::Failed, format!("cannot start: {error}")))),
    };
    finish(runtime.block_on(Box::pin(run(cli))))
}

async fn run(cli: Cli) -> Result<Exit, Failure> {
    let client = connect(&cli.global).await?;
    let format = cli.global.output_format;
    match cli.command {
        Command::Devices(devices) => calls::devices(&client, devices, format).await,
        Command::Operations(operations) => calls::operations(&client, operations, format).await,
        Command::Save(save) => Box::pin(save::save(&client, save, format)).await,
        Command::Restore(restore) => Box::pin(restore::restore(&client, restore, format)).await,
    }
}

async fn connect(global: &Global) -> Result<Client, Failure> {
    let endpoint = needed(global.endpoint.as_ref(), "--endpoint", "VFIOCTL_ENDPOINT")?.clone();
    let files = CredentialFiles {
        certificate: needed(global.cert.as_ref(), "--cert", "VFIOCTL_CERT")?.clone(),
        key: needed(global.key.as_ref(), "--key", "VFIOCTL_KEY")?.clone(),
        ca: needed(global.ca.as_ref(), "--ca", "VFIOCTL_CA")?.clone(),
    };
    let server = match &global.server_spiffe_id {
        Some(id) => ServerCheck::SpiffeId(id.parse().map_err(Failure::usage)?),
        None => ServerCheck::Name(global.server_name.clone()),
    };
    let credentials = Credentials::from_files(&files).map_err(Failure::usage)?;
    let config = tls::client_config(credentials, &server).map_err(Failure::usage)?;
    let client =
        Client::connect(&ConnectOptions::new(endpoint, config, server)).await.map_err(Failure::connect)?;
    Ok(client.with_call_options(CallOptions { deadline: global.timeout, ..CallOptions::default() }))
}

fn needed<'a, T>(value: Option<&'a T>, option: &str, variable: &str) -> Result<&'a T, Failure> {
    value.ok_or_else(|| Failure::usage(format!("{option} is missing; give it or set {variable}")))
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
