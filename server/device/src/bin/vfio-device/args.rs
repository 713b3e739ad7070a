//! What can be said on the command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use vfio_checkpoint_device::kernel::KernelPath;
use vfio_checkpoint_device::sim::SPEC_HELP;

const EXIT_CODES: &str = "Exit codes: 0 done; 1 failed, the devices run with the state they had; 2 wrong usage; 3 cannot \
                          work as things are, nothing was touched; 4 failed, device state was lost or a device needs a \
                          decision.";

/// Save a VFIO device's migration state to a file, and restore it.
#[derive(Debug, Parser)]
#[command(
    name = "vfio-device",
    version,
    after_help = EXIT_CODES,
    after_long_help = after_long_help()
)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List the devices of this node that could be saved, without opening any
    List {
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
    /// Show one device and what stands in the way of saving it, without opening it
    Info {
        /// PCI address or mdev UUID
        device: String,
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
    /// Save a device's state to a file
    Save(Save),
    /// Restore a device's state from a file
    Restore(Restore),
    /// Bring a device that somebody left in the middle of something back to RUNNING, with its state
    Recover(One),
    /// Reset a device: its state is lost, and it runs
    Reset(One),
    /// Try out the rules of the kernel's migration contract on a device, which loses its state
    #[command(
        after_help = "Exit codes: 0 the device conforms; 1 it differs in something that matters; 2 wrong usage; \
                            3 no rule was run; 4 the run ended early, the device needs a look."
    )]
    Conformance(Conformance),
}

#[derive(Debug, Args)]
#[allow(clippy::struct_excessive_bools, reason = "flags of a command line, each its own")]
pub(crate) struct Save {
    /// PCI address, mdev UUID, vfio-user:PATH, or sim[:KEY=VALUE,…]
    pub(crate) device: String,
    /// Where to. It appears when it is whole, and not before
    pub(crate) file: PathBuf,
    /// Copy what can be copied while the device runs
    #[arg(long)]
    pub(crate) pre_copy: bool,
    /// With --pre-copy: stop the device only once the rest is predicted to take no longer, in milliseconds
    #[arg(long, value_name = "MS", requires = "pre_copy", value_parser = milliseconds, default_value = "300")]
    pub(crate) downtime_limit: Duration,
    /// With --pre-copy: how long to try, in milliseconds
    #[arg(long, value_name = "MS", requires = "pre_copy", value_parser = milliseconds, default_value = "60000")]
    pub(crate) pre_copy_budget: Duration,
    /// With --pre-copy: when the budget is spent, let the device run on and fail, rather than stop it all the same
    #[arg(long, requires = "pre_copy")]
    pub(crate) insist: bool,
    /// Leave the device stopped afterwards. A PCI function runs again, reset, once nobody holds it: say --hold, too
    #[arg(long)]
    pub(crate) leave_stopped: bool,
    /// Keep the device open afterwards, until standard input ends
    #[arg(long)]
    pub(crate) hold: bool,
    /// Replace FILE where it is there already
    #[arg(long)]
    pub(crate) replace: bool,
    #[command(flatten)]
    pub(crate) common: Common,
}

#[derive(Debug, Args)]
pub(crate) struct Restore {
    /// PCI address, mdev UUID, vfio-user:PATH, or sim[:KEY=VALUE,…]
    pub(crate) device: String,
    /// Where from. It is checked whole before the device is opened
    pub(crate) file: PathBuf,
    /// Keep the device open, running, until standard input ends
    #[arg(long)]
    pub(crate) hold: bool,
    #[command(flatten)]
    pub(crate) common: Common,
}

#[derive(Debug, Args)]
pub(crate) struct One {
    /// PCI address or mdev UUID
    pub(crate) device: String,
    #[command(flatten)]
    pub(crate) common: Common,
}

#[derive(Debug, Args)]
pub(crate) struct Conformance {
    /// PCI address, mdev UUID, vfio-user:PATH, or sim[:KEY=VALUE,…]. Its state is destroyed
    #[arg(long)]
    pub(crate) device: String,
    /// Load states into this device, of the same kind. Its state is destroyed, too
    #[arg(long, value_name = "DEVICE")]
    pub(crate) restore_onto: Option<String>,
    /// Go on without being asked
    #[arg(long)]
    pub(crate) yes: bool,
    /// Ask also for the way back from STOP_COPY to pre-copy, in which kernels before 7.2 without the fix loop for ever
    #[arg(long)]
    pub(crate) allow_restart: bool,
    #[command(flatten)]
    pub(crate) common: Common,
}

#[derive(Debug, Args)]
pub(crate) struct Common {
    /// How to open a kernel device [default: iommufd where there is one, else container]
    #[arg(long, value_enum)]
    pub(crate) via: Option<Via>,
    /// Form of the result
    #[arg(short, long, value_enum, default_value_t)]
    pub(crate) output: Output,
}

/// The form of results.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people
    #[default]
    Table,
    /// One JSON document
    Json,
}

/// How to open a kernel device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Via {
    /// The IOMMU group's node and a container
    Container,
    /// The device's own node and an iommufd
    Iommufd,
}

impl From<Via> for KernelPath {
    fn from(via: Via) -> Self {
        match via {
            Via::Container => Self::Container,
            Via::Iommufd => Self::Iommufd,
        }
    }
}

fn milliseconds(text: &str) -> Result<Duration, String> {
    text.parse().map(Duration::from_millis).map_err(|_| "give a whole number of milliseconds".to_owned())
}

fn after_long_help() -> String {
    format!(
        "A DEVICE is a PCI address (0000:03:00.1), the UUID of a mediated device, a device process (vfio-user:PATH, by \
         its socket), or a simulated device: {SPEC_HELP}.\n\n\
         Opening a VFIO device resets it and takes it from everybody else: name only devices that are yours. A PCI \
         function is reset again when its last holder closes it. A device process serves one client at a time, and most \
         reset their device when it hangs up: what was restored lives as long as --hold, unless the process keeps it \
         (vfio-user-device --keep-state).\n\n\
         {EXIT_CODES}"
    )
}
