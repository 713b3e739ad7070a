//! `conformance`: the suite of rules on one device, which loses its state.

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Arc;

use vfio_checkpoint_device::conformance::{self, Finding, Options, RunError, Subject, rules};
use vfio_checkpoint_device::kernel::OpenOptions;
use vfio_checkpoint_device::sim::SimDevice;
use vfio_checkpoint_device::vfio_user::{ConnectOptions, VfioUserDevice};
use vfio_checkpoint_device::{Clock, Executor, MigrationDevice, Threads, chain};

use crate::args::{Conformance, Output};
use crate::failure::{CommandFailure, ExitStatus};
use crate::output::{line, print_json};
use crate::target::sim_config_of;

pub(crate) fn run(arguments: &Conformance) -> Result<(), CommandFailure> {
    let executor = Arc::new(Threads::new());
    let mut subject = subject(&arguments.device, arguments, &executor)?;
    let mut real = Vec::from([arguments.device.as_str()]);
    if let Some(other) = arguments.restore_onto.as_deref().filter(|other| *other != arguments.device) {
        subject = subject.restore_onto(self::subject(other, arguments, &executor)?);
        real.push(other);
    }
    // A simulated device ends with this process; there is nothing to lose.
    real.retain(|name| sim_config_of(name).is_none());
    if !real.is_empty() {
        eprintln!(
            "This destroys the state of {}: the device is reset, closed, opened and loaded with damaged states some \
             hundred times. Whatever uses it, or counts on what it holds or was left with, is lost.",
            real.join(" and of ")
        );
        if !arguments.yes {
            consent()?;
        }
    }
    let options = Options {
        allow_restart: arguments.allow_restart,
        // That its state is lost is what was agreed to.
        discard_left_over: true,
        ..Options::default()
    };
    let executor: Arc<dyn Executor> = executor;
    let mut told = progress();
    let report = conformance::run(subject, &options, &executor, &mut *told).map_err(failure)?;
    match arguments.common.output {
        Output::Json => print_json(&report)?,
        Output::Table => line(format_args!("{report}"))?,
    }
    if report.conforms() {
        return Ok(());
    }
    if let Some(stopped) = &report.stopped {
        let text = format!("{}: the run ended early: {}", report.device, stopped.reason);
        return Err(CommandFailure::new(ExitStatus::StateLost, text));
    }
    Err(CommandFailure::new(ExitStatus::Failed, format!("{} does not conform", report.device)))
}

fn subject(name: &str, arguments: &Conformance, executor: &Arc<Threads>) -> Result<Subject, CommandFailure> {
    if let Some(config) = sim_config_of(name) {
        let config = config?;
        let clock: Arc<dyn Clock> = Arc::<Threads>::clone(executor);
        let device = SimDevice::new(config.clone(), clock).map_err(CommandFailure::blocked)?;
        return Ok(Subject::simulated(&device, &config));
    }
    if let Some(socket) = name.strip_prefix("vfio-user:") {
        let socket = PathBuf::from(socket);
        let open = move || {
            let device = VfioUserDevice::connect(&socket, ConnectOptions::default())?;
            Ok(Box::new(device) as Box<dyn MigrationDevice>)
        };
        return Ok(Subject::new(Box::new(open)));
    }
    let path = arguments.common.via.map(Into::into);
    Subject::kernel(name, &OpenOptions { path, ..OpenOptions::default() })
        .map_err(|error| CommandFailure::blocked(chain(&error)))
}

/// Asks whoever sits there.
fn consent() -> Result<(), CommandFailure> {
    if !io::stdin().is_terminal() {
        return Err(CommandFailure::blocked("nothing was touched: say --yes to go on without being asked"));
    }
    eprint!("Type yes to go on: ");
    // What is not shown is not agreed to, but the answer decides.
    let _ = io::stderr().flush();
    let mut answer = String::new();
    io::stdin().read_line(&mut answer).map_err(|error| CommandFailure::failed(&error))?;
    if answer.trim() == "yes" { Ok(()) } else { Err(CommandFailure::blocked("nothing was touched")) }
}

/// A line that says how far the run is, for people only.
fn progress() -> Box<dyn FnMut(&Finding)> {
    if !io::stderr().is_terminal() {
        return Box::new(|_| {});
    }
    let bar = indicatif::ProgressBar::new(rules::all().count() as u64);
    Box::new(move |finding| {
        bar.set_message(finding.rule);
        bar.inc(1);
        if bar.length() == Some(bar.position()) {
            bar.finish_and_clear();
        }
    })
}

fn failure(error: RunError) -> CommandFailure {
    let status = match &error {
        RunError::Open(_) | RunError::Lane(_) | RunError::LeftOver { .. } | RunError::OtherKind { .. } => {
            ExitStatus::Blocked
        }
        RunError::Hung { .. } => ExitStatus::StateLost,
        // The enum may grow; what is not known is a failure.
        RunError::Device(_) | _ => ExitStatus::Failed,
    };
    CommandFailure::new(status, chain(&error))
}
