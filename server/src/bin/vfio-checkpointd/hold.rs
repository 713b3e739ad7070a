//! `hold`.

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;
use vfio_checkpoint_server::holder::{self, HolderError, HolderOptions};

use crate::args::Hold;
use crate::{ExitStatus, complain};

pub(crate) fn run(arguments: Hold) -> ExitStatus {
    let filter = EnvFilter::builder().with_default_directive(LevelFilter::INFO.into()).from_env_lossy();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
    let Hold { socket, max_devices } = arguments;
    let Err(error) = holder::run(HolderOptions { socket, max_devices }) else { return ExitStatus::Done };
    complain("hold", &error);
    match error {
        HolderError::Socket(_) | HolderError::TooFewFiles { .. } | HolderError::Signals(_) => {
            ExitStatus::Blocked
        }
        HolderError::Poll(_) => ExitStatus::Failed,
    }
}
