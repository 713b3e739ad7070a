//! What can be said on the command line.

use std::path::PathBuf;

use clap::Parser;
use vfio_checkpoint_device::sim::SPEC_HELP;

const EXIT_CODES: &str = "Exit codes: 0 ended by SIGTERM, SIGINT or, with --once, by its client; 1 could not go on; 2 \
                          wrong usage; 3 cannot work as things are, nobody was served.";

/// Serve a device to a vfio-user client (a VMM, or vfio-device) on a Unix socket.
#[derive(Debug, Parser)]
#[command(
    name = "vfio-user-device",
    version,
    after_help = EXIT_CODES,
    after_long_help = after_long_help()
)]
pub(crate) struct Arguments {
    /// Where to listen
    #[arg(long, value_name = "PATH")]
    pub(crate) socket: PathBuf,
    /// What to serve
    #[arg(long, default_value = "sim")]
    pub(crate) device: String,
    /// End when the first client is gone
    #[arg(long)]
    pub(crate) once: bool,
    /// Leave the device in the state that a lost client left it in, rather than reset it
    #[arg(long)]
    pub(crate) keep_state: bool,
}

fn after_long_help() -> String {
    format!(
        "A DEVICE is a simulated device ({SPEC_HELP}), the PCI address of a kernel device (0000:03:00.1) or the UUID of \
         a mediated device. Opening a kernel device resets it and takes it from everybody else.\n\n\
         One client is served at a time, a second is closed at once. Only the socket's owner may connect. A stale \
         socket at PATH is replaced; one that a server listens on, or anything else, is refused.\n\n\
         SIGTERM and SIGINT close the connection, reset the device and remove the socket; a second one ends the \
         process where it is.\n\n\
         {EXIT_CODES}"
    )
}
