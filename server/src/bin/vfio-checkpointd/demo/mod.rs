//! `demo`: the whole way of a device's state, on one machine and without hardware.
//!
//! ```text
//!   throwaway CA --> agent node-a [nic0, nic1: busy]      agent node-b [nic0, nic1: idle]
//!   operator:  list both -- save nic0 of a (pre-copy, it runs on) --> store
//!              once more (only what is new; left stopped)         --> store --> restore on b -- compare
//!              nic1 of a, live --------------- migrate ------------------------> nic1 of b -- compare
//! ```
//! Nothing is staged: both agents serve real gRPC with mutual TLS on loopback, and the operator is the client library.
//! Only the devices are simulated, so what they hold can be compared: digests of all that is in the one where it stopped
//! and in the other where it runs.

mod node;
mod report;
mod story;

use vfio_checkpoint_server::config::{LogFormat, TelemetryConfig};
use vfio_checkpoint_server::telemetry::{self, AuditLines};

use crate::args::Demo;
use crate::{ExitStatus, complain};
use report::Audience;

pub(crate) fn run(arguments: &Demo) -> ExitStatus {
    let logs = TelemetryConfig { log: arguments.log.clone(), format: LogFormat::Text };
    if let Err(error) = telemetry::begin(&logs, AuditLines::Filtered) {
        complain("demo", &error);
        return ExitStatus::Blocked;
    }
    let audience = Audience::new(arguments.json);
    let told = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(Into::into)
        .and_then(|runtime| runtime.block_on(story::tell(arguments, &audience)));
    match told.and_then(|report| audience.conclude(&report).map(|()| report.verified)) {
        Ok(true) => ExitStatus::Done,
        Ok(false) => ExitStatus::Failed,
        Err(error) => {
            complain("demo", &*error);
            ExitStatus::Failed
        }
    }
}

/// Why the demo cannot go on. Whatever it is, there is somebody at the terminal to read it.
type Failure = Box<dyn std::error::Error + Send + Sync>;
