//! The conformance suite: the rules of the kernel's migration contract, tried out on any device.
//!
//! ```text
//!   Subject (how to open the device) --run--> each rule on the device's own lane --> Report
//!                                                |
//!        fresh device (RUNNING) -> check -> Verdict: holds | differs | not applicable | not observed
//! ```
//!
//! One suite for every backend: a simulated device is never softer than the kernel only as long as both pass it. And
//! for whoever writes a driver: `vfio-device conformance --device …` says what the driver does differently, and
//! whether that matters. Rules are data ([`Rule`]), by subject in [`rules`]. They call the device itself and not the
//! [`Driver`](crate::Driver), because it is the raw contract that is tried out.
//!
//! **A run destroys the state of the device, again and again.** It resets it, loads it with damaged states and closes
//! it. [`Subject::kernel`] refuses a device that somebody uses; [`run`] refuses one that is not in RUNNING when it is
//! opened, because its state may be somebody's, unless [`Options::discard_left_over`] says that it is not.
//!
//! # Invariants
//! - Each rule begins on a fresh device and says nothing about the others.
//! - What is not seen does not hold: it is *not applicable* or *not observed*, with the reason.
//! - After the run the device is in RUNNING, or the report says that it is not.
//! - A request that is known to hang kernels is made only on request ([`Options::allow_restart`]).
//!
//! # Failure paths
//! An error that a rule did not look for is a difference of that rule. A call that does not return within
//! [`Options::call_limit`] ends the run; the report names the rule and the call, and the device stays with the call.
//! A device that cannot be brought back to RUNNING ends the run; the report names the rules that were not run.

mod bench;
mod pieces;
mod report;
mod rule;
pub mod rules;
mod subject;
mod watch;

use std::io;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use vfio_checkpoint_fsm::State;

pub use self::report::{Finding, Report, Stopped, Summary};
pub use self::rule::{Rule, Verdict, Weight};
pub use self::subject::{BoxError, LastClose, Open, Stimulus, Subject, SubjectError, TakeHops};

use self::bench::Bench;
use self::rule::{Answer, Instead};
use self::watch::Progress;
use crate::kernel::quirks;
use crate::lane::DEFAULT_CALL_LIMIT;
use crate::{Backend, Call, DeviceError, Difference, Executor, Identity, Lane, MigrationDevice};

/// How a run goes.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// How long one call on the device may take.
    pub call_limit: Duration,
    /// The largest state that is kept in memory; rules about a larger one are not observed. A run keeps up to four.
    pub state_limit_bytes: usize,
    /// Ask also kernel devices to go from STOP_COPY back to a pre-copy state. Kernels before 7.2 without the fix loop
    /// for ever in that request, with the device's lock held.
    pub allow_restart: bool,
    /// Run also on a device that is not in RUNNING when it is opened.
    pub discard_left_over: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            call_limit: DEFAULT_CALL_LIMIT,
            state_limit_bytes: 256 << 20,
            allow_restart: false,
            discard_left_over: false,
        }
    }
}

/// Why a run did not begin. Nothing was done to the device but opening it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// No thread for the device could be had.
    #[error("the device's lane could not be made")]
    Lane(#[source] io::Error),
    /// A device could not be opened.
    #[error("the device could not be opened")]
    Open(#[source] BoxError),
    /// The device answered nothing useful.
    #[error("the device could not be looked at")]
    Device(#[from] DeviceError),
    /// Opening did not return.
    #[error("{call} did not return within {after:?}")]
    Hung {
        /// The call that is still under way.
        call: Call,
        /// How long it was waited for.
        after: Duration,
    },
    /// The device holds a state that may be somebody's.
    #[error("{device} is in {found}, not in RUNNING, so it may hold somebody's state; discard it first")]
    LeftOver {
        /// The device.
        device: Identity,
        /// Where it stands.
        found: State,
    },
    /// States of the one device do not fit the other.
    #[error("{device} is of another kind: {}", list(.differences))]
    OtherKind {
        /// The device that was to be restored onto.
        device: Identity,
        /// Every fact that differs.
        differences: Vec<Difference>,
    },
}

fn list(differences: &[Difference]) -> String {
    differences.iter().map(Difference::to_string).collect::<Vec<_>>().join("; ")
}

/// Runs every rule on a device. `seen` is told of each finding as it comes.
pub fn run(
    subject: Subject,
    options: &Options,
    executor: &Arc<dyn Executor>,
    seen: &mut dyn FnMut(&Finding),
) -> Result<Report, RunError> {
    let progress = Arc::new(Progress::new(Arc::clone(executor), options.call_limit));
    let bench = Bench::new(subject, &progress, options.state_limit_bytes, options.allow_restart);
    let supervised = Supervised {
        lane: executor.lane("conformance").map_err(RunError::Lane)?,
        bench: Arc::new(Mutex::new(bench)),
        progress,
        limit: options.call_limit,
    };
    let discard = options.discard_left_over;
    let mut report = match supervised.call(move |bench| look(bench, discard)) {
        Ok(report) => report?,
        Err(Ended::Hung(call, after)) => return Err(RunError::Hung { call, after }),
        Err(Ended::Panicked) => return Err(RunError::Open("opening the device panicked".into())),
    };
    let mut rules = rules::all();
    while let Some(rule) = rules.next() {
        let (answer, stop) = match supervised.call(|bench| judge(bench, rule)) {
            Ok((answer, stop)) => (answer, stop),
            Err(Ended::Hung(call, after)) => {
                let hung = format!("{call} did not return within {after:?}");
                (Err(Instead::Stuck(hung.clone())), Some(hung))
            }
            Err(Ended::Panicked) => {
                let panicked = "the rule, or the device's backend, panicked".to_owned();
                (Err(Instead::Stuck(panicked.clone())), Some(panicked))
            }
        };
        let finding = Finding::of(rule, weigh(rule, answer, &report.device));
        seen(&finding);
        report.findings.push(finding);
        if let Some(reason) = stop {
            let not_run = rules.map(|rule| rule.id).collect();
            report.stopped = Some(Stopped { reason: format!("{}: {reason}", rule.id), not_run });
            break;
        }
    }
    Ok(report)
}

/// Opens the devices and sees whether the suite may run on them.
fn look(bench: &mut Bench, discard_left_over: bool) -> Result<Report, RunError> {
    let source = bench.source().open().map_err(RunError::Open)?;
    refuse_left_over(source, discard_left_over)?;
    let fingerprint = source.fingerprint().clone();
    let device = source.identity().clone();
    let capabilities = source.capabilities().to_string();
    let mut restored_onto = None;
    if let Some(second) = bench.second() {
        let second = second.open().map_err(RunError::Open)?;
        refuse_left_over(second, discard_left_over)?;
        let other = second.identity().clone();
        let differences = fingerprint.differences(second.fingerprint());
        if !differences.is_empty() {
            return Err(RunError::OtherKind { device: other, differences });
        }
        restored_onto = Some(other);
    }
    Ok(Report { device, capabilities, restored_onto, findings: Vec::new(), stopped: None })
}

fn refuse_left_over(device: &mut dyn MigrationDevice, discard: bool) -> Result<(), RunError> {
    let found = device.state()?;
    if found == State::Running || discard {
        return Ok(());
    }
    Err(RunError::LeftOver { device: device.identity().clone(), found })
}

/// One rule on a fresh device, which is fresh again afterwards. With the answer comes why the run cannot go on.
fn judge(bench: &mut Bench, rule: &Rule) -> (Answer, Option<String>) {
    let answer = bench.fresh().and_then(|()| (rule.check)(bench));
    let left = match &answer {
        // Whatever is tried now, the device was beyond it.
        Err(Instead::Stuck(why)) => Some(why.clone()),
        Ok(_) | Err(Instead::NotApplicable(_) | Instead::NotObserved(_) | Instead::Differs(_)) => {
            match bench.fresh() {
                Ok(()) => None,
                Err(
                    Instead::Stuck(why)
                    | Instead::Differs(why)
                    | Instead::NotApplicable(why)
                    | Instead::NotObserved(why),
                ) => Some(why),
            }
        }
    };
    (answer, left)
}

/// What an answer means for this device. A difference that its driver is known for is tolerated.
fn weigh(rule: &Rule, answer: Answer, device: &Identity) -> Verdict {
    let seen = match answer {
        Ok(seen) => return Verdict::Holds { seen },
        Err(Instead::NotApplicable(why)) => return Verdict::NotApplicable { why },
        Err(Instead::NotObserved(why)) => return Verdict::NotObserved { why },
        Err(Instead::Stuck(seen)) => {
            let meaning = "nothing more can be asked of the device".to_owned();
            return Verdict::Differs { seen, matters: true, meaning };
        }
        Err(Instead::Differs(seen)) => seen,
    };
    let known = quirks::of(&device.driver)
        .find(|fact| device.backend == Backend::Kernel && rule.quirks.contains(&fact.quirk));
    match (known, rule.weight) {
        (Some(fact), _) => {
            let meaning = format!("known of {}: {} [{}]", fact.driver, fact.reason, fact.source);
            Verdict::Differs { seen, matters: false, meaning }
        }
        (None, Weight::Matters { consequence }) => {
            Verdict::Differs { seen, matters: true, meaning: consequence.to_owned() }
        }
        (None, Weight::Tolerated { how }) => {
            Verdict::Differs { seen, matters: false, meaning: how.to_owned() }
        }
    }
}

/// The bench on a lane, with somebody who looks at how long calls take.
struct Supervised {
    lane: Box<dyn Lane>,
    bench: Arc<Mutex<Bench>>,
    progress: Arc<Progress>,
    limit: Duration,
}

enum Ended {
    Hung(Call, Duration),
    Panicked,
}

impl Supervised {
    fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Bench) -> T + Send + 'static,
    ) -> Result<T, Ended> {
        let (answer, answered) = mpsc::sync_channel(1);
        let bench = Arc::clone(&self.bench);
        self.lane.submit(Box::new(move || {
            let value = work(&mut bench.lock().unwrap_or_else(PoisonError::into_inner));
            // Nobody waits any more where a call was given up.
            let _ = answer.send(value);
        }));
        loop {
            let received = answered.recv_timeout(self.limit);
            if let Some((call, after)) = self.progress.overdue() {
                return Err(Ended::Hung(call, after));
            }
            match received {
                Ok(value) => return Ok(value),
                // A rule makes many calls; each has the limit to itself.
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(Ended::Panicked),
            }
        }
    }
}
