//! What can be said on the command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use vfio_checkpoint_proto::ids::{DeviceName, OperationName};

const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    failed, and the devices keep their state
  2    the command line is wrong
  3    refused before anything was touched; every reason is listed
  4    a device's state is lost, or a device needs somebody
  5    the agent cannot be reached, or does not let this caller in
  130  interrupted: the operation was cancelled, and what became of it is told";

/// Saves and restores the state of VFIO devices.
#[derive(Debug, Parser)]
#[command(name = "vfioctl", version, after_help = EXIT_CODES, disable_help_subcommand = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// How to reach the agent and how to answer.
#[derive(Debug, Args)]
pub(crate) struct Global {
    /// The agent, https://HOST:PORT
    #[arg(long, global = true, env = "VFIOCTL_ENDPOINT", value_name = "URL")]
    pub(crate) endpoint: Option<String>,
    /// The CA bundle that the agent's certificate is verified by, PEM
    #[arg(long, global = true, env = "VFIOCTL_CA", value_name = "FILE")]
    pub(crate) ca: Option<PathBuf>,
    /// The client certificate, PEM
    #[arg(long, global = true, env = "VFIOCTL_CERT", value_name = "FILE")]
    pub(crate) cert: Option<PathBuf>,
    /// The key of the client certificate, PEM
    #[arg(long, global = true, env = "VFIOCTL_KEY", value_name = "FILE")]
    pub(crate) key: Option<PathBuf>,
    /// The name in the agent's certificate, where it is not the host of the endpoint
    #[arg(
        long,
        global = true,
        env = "VFIOCTL_SERVER_NAME",
        value_name = "NAME",
        conflicts_with = "server_spiffe_id"
    )]
    pub(crate) server_name: Option<String>,
    /// The SPIFFE id in the agent's certificate
    #[arg(long, global = true, env = "VFIOCTL_SERVER_SPIFFE_ID", value_name = "ID")]
    pub(crate) server_spiffe_id: Option<String>,
    /// How to print results
    #[arg(
        short,
        long = "format",
        global = true,
        env = "VFIOCTL_FORMAT",
        value_name = "FORMAT",
        default_value = "table"
    )]
    pub(crate) output_format: OutputFormat,
    /// How long the agent may take to answer one call, such as 300ms, 2s or 1m
    #[arg(long, global = true, env = "VFIOCTL_TIMEOUT", value_name = "TIME", default_value = "30s", value_parser = duration)]
    pub(crate) timeout: Duration,
}

/// How to print results.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OutputFormat {
    /// For people
    Table,
    /// One JSON document
    Json,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show devices
    #[command(subcommand)]
    Devices(Devices),
    /// Save the state of devices into a folder
    Save(Save),
    /// Restore the state of devices from a folder
    Restore(Restore),
    /// Show and steer operations
    #[command(subcommand)]
    Operations(Operations),
}

/// Show devices.
#[derive(Debug, Subcommand)]
pub(crate) enum Devices {
    /// List the agent's devices
    List,
    /// Show one device
    Get {
        /// Its name
        #[arg(value_parser = device)]
        name: DeviceName,
    },
}

/// Save the state of devices into a folder.
#[derive(Debug, Args)]
pub(crate) struct Save {
    /// The devices, which share a stop point
    #[arg(required = true, value_name = "DEVICE", value_parser = device)]
    pub(crate) devices: Vec<DeviceName>,
    /// The folder; a new or an empty one
    #[arg(long, value_name = "DIR")]
    pub(crate) output: PathBuf,
    /// Replace the checkpoint that is in the folder
    #[arg(long)]
    pub(crate) replace: bool,
    /// Read state while the devices run
    #[arg(long, value_name = "WHEN", default_value = "auto")]
    pub(crate) pre_copy: PreCopy,
    /// Who says when to stop the devices: the agent, or `vfioctl operations cutover`
    #[arg(long, value_name = "WHO", default_value = "auto")]
    pub(crate) cutover: Cutover,
    /// What becomes of the devices once their state is saved
    #[arg(long, value_name = "WHAT", default_value = "resume")]
    pub(crate) after: After,
    /// The devices should stand still no longer than this
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(crate) downtime_limit: Option<Duration>,
    /// How the workload's memory is captured along with its devices
    #[arg(long, value_name = "HOW", default_value = "none")]
    pub(crate) memory: Memory,
    /// Say what is in the way and what is expected, and do nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
}

/// Restore the state of devices from a folder.
#[derive(Debug, Args)]
pub(crate) struct Restore {
    /// The devices that take the state, in the order in which they were saved
    #[arg(required = true, value_name = "DEVICE", value_parser = device)]
    pub(crate) devices: Vec<DeviceName>,
    /// The folder with the checkpoint
    #[arg(long, value_name = "DIR")]
    pub(crate) input: PathBuf,
    /// Load the state and wait for `vfioctl operations resume`
    #[arg(long)]
    pub(crate) hold: bool,
    /// Verify the checkpoint, say what is in the way, and do nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
}

/// Show and steer operations.
#[derive(Debug, Subcommand)]
pub(crate) enum Operations {
    /// List operations, the newest first
    List {
        /// Only those that are not done
        #[arg(long)]
        active: bool,
    },
    /// Show one operation
    Get {
        /// Its name
        #[arg(value_parser = operation)]
        name: OperationName,
    },
    /// Follow one operation until it is done
    Watch {
        /// Its name
        #[arg(value_parser = operation)]
        name: OperationName,
    },
    /// Undo an operation, and wait for that
    Cancel {
        /// Its name
        #[arg(value_parser = operation)]
        name: OperationName,
    },
    /// Stop the devices of a save now
    Cutover {
        /// Its name
        #[arg(value_parser = operation)]
        name: OperationName,
    },
    /// End a hold: run the devices
    Resume {
        /// Its name
        #[arg(value_parser = operation)]
        name: OperationName,
    },
}

/// Whether to read state while devices run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PreCopy {
    /// Where every device can
    Auto,
    /// Never
    Never,
    /// Always; a device that cannot is refused
    Required,
}

/// Who says when to stop devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Cutover {
    /// The agent
    Auto,
    /// The caller
    Manual,
}

/// What becomes of saved devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum After {
    /// They run on at once
    Resume,
    /// They stay stopped until `vfioctl operations resume`, or until the hold runs out
    Hold,
    /// They stay stopped
    StayStopped,
}

/// How memory is captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Memory {
    /// Not at all: device state alone is wanted
    None,
    /// While the workload and its devices stand still
    WhileStopped,
    /// While it runs, with dirty tracking, and the rest while it stands still
    DirtyTracking,
}

fn duration(text: &str) -> Result<Duration, String> {
    let duration =
        humantime::parse_duration(text).map_err(|error| format!("{error}; give 300ms, 2s or 1m"))?;
    if duration.is_zero() || duration > Duration::from_hours(24) {
        return Err("give more than nothing and at most 24h".to_owned());
    }
    Ok(duration)
}

fn device(text: &str) -> Result<DeviceName, String> {
    let name = if text.starts_with("devices/") { text.parse() } else { DeviceName::from_id(text) };
    name.map_err(|error| error.to_string())
}

fn operation(text: &str) -> Result<OperationName, String> {
    let name = if text.starts_with("operations/") { text.parse() } else { OperationName::from_id(text) };
    name.map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;
    use clap::error::ErrorKind;

    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn the_definition_holds() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_save_takes_its_defaults_and_all_of_its_options() {
        let Command::Save(save) = parse("vfioctl save a devices/b --output d").unwrap().command else {
            panic!()
        };
        assert_eq!(
            save.devices.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["devices/a", "devices/b"]
        );
        assert_eq!((save.pre_copy, save.cutover, save.after), (PreCopy::Auto, Cutover::Auto, After::Resume));
        assert_eq!((save.memory, save.downtime_limit, save.dry_run), (Memory::None, None, false));
        let line = "vfioctl save a --output d --pre-copy required --cutover manual --after stay-stopped \
            --downtime-limit 300ms --memory dirty-tracking --dry-run -o json --timeout 1m";
        let cli = parse(line).unwrap();
        let Command::Save(save) = cli.command else { panic!() };
        assert_eq!(
            (save.pre_copy, save.cutover, save.after),
            (PreCopy::Required, Cutover::Manual, After::StayStopped)
        );
        assert_eq!(save.downtime_limit, Some(Duration::from_millis(300)));
        assert!(save.dry_run);
        assert_eq!(
            (cli.global.output_format, cli.global.timeout),
            (OutputFormat::Json, Duration::from_mins(1))
        );
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for (line, kind) in [
            ("vfioctl", ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand),
            ("vfioctl save --output d", ErrorKind::MissingRequiredArgument),
            ("vfioctl save a", ErrorKind::MissingRequiredArgument),
            ("vfioctl save a/../b --output d", ErrorKind::ValueValidation),
            ("vfioctl save a --output d --downtime-limit 300", ErrorKind::ValueValidation),
            ("vfioctl save a --output d --downtime-limit 0s", ErrorKind::ValueValidation),
            ("vfioctl save a --output d --downtime-limit 25h", ErrorKind::ValueValidation),
            ("vfioctl save a --output d --memory post-copy", ErrorKind::InvalidValue),
            (
                "vfioctl devices list --server-name a --server-spiffe-id spiffe://d/a",
                ErrorKind::ArgumentConflict,
            ),
            ("vfioctl operations get a.b", ErrorKind::ValueValidation),
        ] {
            let error = parse(line).unwrap_err();
            assert_eq!(error.kind(), kind, "{line}");
            assert_eq!(error.exit_code(), 2, "{line}");
        }
    }

    #[test]
    fn the_exit_codes_are_in_the_help() {
        let help = Cli::command().render_long_help().to_string();
        for code in ["0 ", "1 ", "2 ", "3 ", "4 ", "5 ", "130 "] {
            assert!(help.lines().any(|line| line.trim_start().starts_with(code)), "{code}: {help}");
        }
    }
}
