//! What can be said on the command line, as far as it is common to all commands. Each command has its own in its file.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::commands::certs::CertsCommand;
use crate::commands::checkpoints::CheckpointsCommand;
use crate::commands::context::ContextCommand;
use crate::commands::devices::DevicesCommand;
use crate::commands::dirty_tracking::DirtyTrackingCommand;
use crate::commands::doctor::DoctorArgs;
use crate::commands::migrate::MigrateArgs;
use crate::commands::operations::OperationsCommand;
use crate::commands::restore::RestoreArgs;
use crate::commands::save::SaveArgs;
use crate::commands::shell::{CompletionArgs, ManArgs};
use crate::values::duration;

/// The variable that says how results are printed.
pub(crate) const FORMAT_VARIABLE: &str = "VFIOCTL_FORMAT";

const AFTER_HELP: &str = "\
Results go to stdout, all else to stderr. With -o json and -o yaml stderr has documents, too, one a
line in JSON: {\"note\": text} for what is said on the way, and last, for a failure, {\"error\": {code,
reason, message, device, operation, hint, blockers, fields, retry_after_ms, exit_code}}. An
operation that ended badly, or goes on, is on stdout, as `operations get` prints it.

Options go before the environment, and that before the context in use; see `vfioctl context`.

Exit codes:
  0    done
  1    failed, and the devices keep their state; or what was checked is not as it should be
  2    the command line or the contexts file is wrong
  3    refused before anything was touched; every reason is listed
  4    a device's state is lost, or somebody is needed: for a device, or for a migration in doubt
  5    the agent cannot be reached, or does not let this caller in
  6    the time to wait is over, and the operation goes on
  130  interrupted; where an operation was cancelled, what became of it is told";

/// Saves, restores and moves the state of VFIO devices.
#[derive(Debug, Parser)]
#[command(
    name = "vfioctl",
    version,
    after_help = AFTER_HELP,
    disable_help_subcommand = true,
    max_term_width = 100
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// How to reach the agent and how to answer.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Common options")]
pub(crate) struct Global {
    /// How to print results
    #[arg(
        short,
        long = "format",
        global = true,
        env = FORMAT_VARIABLE,
        hide_env_values = true,
        value_name = "FORMAT",
        default_value = "table"
    )]
    pub(crate) output_format: OutputFormat,
    /// The context to use, instead of the one in use
    #[arg(long, global = true, env = "VFIOCTL_CONTEXT", hide_env_values = true, value_name = "NAME")]
    pub(crate) context: Option<String>,
    /// The agent, https://HOST:PORT
    #[arg(long, global = true, env = "VFIOCTL_ENDPOINT", hide_env_values = true, value_name = "URL")]
    pub(crate) endpoint: Option<String>,
    /// The CA bundle that the agent's certificate is verified by, PEM
    #[arg(long, global = true, env = "VFIOCTL_CA", hide_env_values = true, value_name = "FILE")]
    pub(crate) ca: Option<PathBuf>,
    /// The client certificate, PEM
    #[arg(long, global = true, env = "VFIOCTL_CERT", hide_env_values = true, value_name = "FILE")]
    pub(crate) cert: Option<PathBuf>,
    /// The key of the client certificate, PEM
    #[arg(long, global = true, env = "VFIOCTL_KEY", hide_env_values = true, value_name = "FILE")]
    pub(crate) key: Option<PathBuf>,
    /// The name in the agent's certificate, where it is not the host of the endpoint
    #[arg(
        long,
        global = true,
        env = "VFIOCTL_SERVER_NAME",
        hide_env_values = true,
        value_name = "NAME",
        conflicts_with = "server_spiffe_id"
    )]
    pub(crate) server_name: Option<String>,
    /// The SPIFFE id in the agent's certificate
    #[arg(long, global = true, env = "VFIOCTL_SERVER_SPIFFE_ID", hide_env_values = true, value_name = "ID")]
    pub(crate) server_spiffe_id: Option<String>,
    /// How long the agent may take to answer one call, such as 300ms, 2s or 1m
    #[arg(
        long,
        global = true,
        env = "VFIOCTL_TIMEOUT",
        hide_env_values = true,
        value_name = "TIME",
        default_value = "30s",
        value_parser = duration
    )]
    pub(crate) timeout: Duration,
}

/// How to print results.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OutputFormat {
    /// For people
    Table,
    /// For people, with all columns
    Wide,
    /// One JSON document
    Json,
    /// One YAML document
    Yaml,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show, watch and reset devices
    #[command(subcommand)]
    Devices(DevicesCommand),
    /// Save the state of devices into a folder, or into a store of the agent
    Save(Box<SaveArgs>),
    /// Restore the state of devices from a folder, or from a store of the agent
    Restore(Box<RestoreArgs>),
    /// Move devices to another node
    Migrate(Box<MigrateArgs>),
    /// Show, verify and delete checkpoints
    #[command(subcommand)]
    Checkpoints(CheckpointsCommand),
    /// Show and steer operations
    #[command(subcommand)]
    Operations(OperationsCommand),
    /// Log the pages that a device writes by DMA
    #[command(subcommand)]
    DirtyTracking(DirtyTrackingCommand),
    /// Name agents and certificates once, and use them by that name
    #[command(subcommand)]
    Context(ContextCommand),
    /// Find out what is wrong with this node, its certificates and its agent, and how to mend it
    Doctor(DoctorArgs),
    /// Make throwaway certificates for a lab
    #[command(subcommand)]
    Certs(CertsCommand),
    /// Print a script that completes commands in a shell
    Completion(CompletionArgs),
    /// Print the manual page, or write all of them into a folder
    Man(ManArgs),
}

/// Whether a command that starts an operation stays until the operation is done.
#[derive(Debug, Clone, Args)]
pub(crate) struct Waiting {
    /// Wait until the operation is done, as is usual
    #[arg(long, overrides_with = "no_wait")]
    wait: bool,
    /// Start the operation, print it and leave it alone
    #[arg(long, overrides_with = "wait")]
    no_wait: bool,
    /// Wait no longer than this; the operation goes on
    #[arg(long, value_name = "TIME", value_parser = duration, conflicts_with = "no_wait")]
    pub(crate) wait_timeout: Option<Duration>,
}

impl Waiting {
    pub(crate) fn is_wanted(&self) -> bool {
        !self.no_wait
    }
}

#[cfg(test)]
mod tests;
