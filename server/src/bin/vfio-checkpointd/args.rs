//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use vfio_checkpoint_server::config::LogFormat;
use vfio_checkpoint_server::holder::HolderOptions;

pub(crate) const EXIT_CODES: &str = "Exit codes: 0 done, or ended by SIGTERM, SIGINT or SIGHUP; 1 could not go on, or not \
                                     well; 2 wrong usage; 3 cannot work as things are, no device was touched.";

const AFTER_SERVE: &str = "\
Every value can come from the file, from the environment (VFIO_CHECKPOINTD_SERVER__LISTEN is server.listen) and, for some, \
from a flag; the later is the stronger. Unknown keys are refused.\n\n\
SIGHUP reads certificates and the grants again. SIGTERM and SIGINT end the agent: what runs is undone, what is held stays \
held if a holder keeps the devices.";

const AFTER_HOLD: &str = "Closing the last fd of a VFIO device resets it, and the kernel closes an agent's fds when it \
                          dies. The holder keeps duplicates, so that the next agent finds the devices as they were.\n\n\
                          The socket lies in a folder that only its owner may enter (made with mode 0700 where it is \
                          missing). One agent is served at a time. Run the holder as a service of its own that is not \
                          restarted with the agent, in the same PID namespace or an outer one.\n\n\
                          SIGTERM, SIGINT and SIGHUP end it at once, with a log line for each device that it lets go: \
                          those that no agent has open are reset.";

/// Save and restore the state of this node's VFIO devices.
#[derive(Debug, Parser)]
#[command(name = "vfio-checkpointd", version, after_help = EXIT_CODES)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Own this node's devices and serve them over gRPC
    #[command(after_help = EXIT_CODES, after_long_help = AFTER_SERVE)]
    Serve(Serve),
    /// See it work without hardware: two agents, a save on one, a restore on the other, and proof
    #[command(after_help = EXIT_CODES)]
    Demo(Demo),
    /// Keep devices open while agents come and go
    #[command(after_help = EXIT_CODES, after_long_help = AFTER_HOLD)]
    Hold(Hold),
    /// Ask a serving agent whether it is well
    #[command(after_help = EXIT_CODES)]
    Healthcheck(Healthcheck),
}

#[derive(Debug, Args)]
pub(crate) struct Serve {
    /// The configuration, in TOML
    #[arg(long, value_name = "PATH", env = "VFIO_CHECKPOINTD_CONFIG")]
    pub(crate) config: Option<PathBuf>,
    /// Where to listen, instead of server.listen
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) listen: Option<SocketAddr>,
    /// What to log, instead of telemetry.log
    #[arg(long, value_name = "FILTER")]
    pub(crate) log: Option<String>,
    /// How to log, instead of telemetry.format
    #[arg(long, value_name = "FORMAT")]
    pub(crate) log_format: Option<LogFormat>,
    /// Check the configuration and the certificates, and end. No device is touched.
    #[arg(long)]
    pub(crate) check: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// Print one JSON document, and nothing else, on standard output
    #[arg(long)]
    pub(crate) json: bool,
    /// How much memory the simulated devices have: bytes, or a number with KiB, MiB or GiB
    #[arg(long, value_name = "SIZE", default_value = "256MiB")]
    pub(crate) memory: String,
    /// How much of it a busy workload changes in a second
    #[arg(long, value_name = "SIZE", default_value = "50MiB")]
    pub(crate) dirty: String,
    /// How large the part of it is that the workload writes to; no larger than the memory
    #[arg(long, value_name = "SIZE", default_value = "8MiB")]
    pub(crate) hot: String,
    /// What the agents log, by the filter of tracing
    #[arg(long, value_name = "FILTER", default_value = "error")]
    pub(crate) log: String,
}

#[derive(Debug, Args)]
pub(crate) struct Hold {
    /// Where to listen for the agent
    #[arg(long, value_name = "PATH")]
    pub(crate) socket: PathBuf,
    /// How many devices may be held; each needs at least two open files
    #[arg(long, value_name = "N", default_value_t = HolderOptions::DEFAULT_MAX_DEVICES, value_parser = at_least_one)]
    pub(crate) max_devices: usize,
}

#[derive(Debug, Args)]
pub(crate) struct Healthcheck {
    /// The address that the agent's configuration has for plain health checks
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) address: SocketAddr,
    /// Ask for this service alone, by its full name
    #[arg(long, value_name = "SERVICE", default_value = "")]
    pub(crate) service: String,
    /// How long the answer may take
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = humantime::parse_duration)]
    pub(crate) timeout: std::time::Duration,
}

/// A holder that may hold nothing would be one in vain.
fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("it must be 1 at least".to_owned()),
        Ok(number) => Ok(number),
        Err(error) => Err(error.to_string()),
    }
}
