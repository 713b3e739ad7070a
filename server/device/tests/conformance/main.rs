//! The conformance suite itself: simulated devices of every kind pass it, and rules can fail; those that no wrong device
//! breaks yet are named on every run.
//!
//! | module | what it proves |
//! |---|---|
//! | [`sim`] | a simulated device conforms, however it is configured |
//! | [`run`] | how a run goes: hangs, devices that are stuck, left-over states, the report |
//! | [`wrong`] | devices that are wrong in one way each ([`broken`]), and that the suite says so |

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a test fails by panicking, its helpers included"
)]

mod broken;
mod run;
mod sim;
mod wrong;

use std::io::Write as _;
use std::sync::Arc;
use std::time::Duration;

use vfio_checkpoint_device::conformance::{Options, Report, Subject, Verdict, run as run_suite};
use vfio_checkpoint_device::sim::{SimConfig, SimDevice, SimDma};
use vfio_checkpoint_device::{Executor, Inline, IovaRange};

/// A device on a clock that only the test moves, so that the same run gives the same report.
struct Bed {
    device: SimDevice,
    config: SimConfig,
    executor: Inline,
}

impl Bed {
    fn new(config: SimConfig) -> Self {
        let executor = Inline::new(7);
        let device = SimDevice::new(config.clone(), Arc::new(executor.clone())).unwrap();
        Self { device, config, executor }
    }

    /// With every stimulus there is.
    fn subject(&self) -> Subject {
        let subject = Subject::simulated(&self.device, &self.config);
        match self.config.dma.ranges.first() {
            Some(range) => {
                let time = self.executor.time();
                subject.writes_dma_by(*range, Box::new(move || time.advance(Duration::from_secs(1))))
            }
            None => subject,
        }
    }

    fn run(&self, subject: Subject) -> Report {
        let executor: Arc<dyn Executor> = Arc::new(self.executor.clone());
        let options = Options { state_limit_bytes: 1 << 20, ..Options::default() };
        run_suite(subject, &options, &executor, &mut |_| {}).unwrap()
    }
}

/// Small, and busy with DMA where the clock is moved.
fn small() -> SimConfig {
    SimConfig {
        memory_bytes: 20 * 4096 + 100,
        dma: SimDma {
            ranges: vec![IovaRange::new(1 << 20, 64 * 4096).unwrap()],
            bytes_per_second: 16 * 4096,
            ..SimDma::default()
        },
        ..SimConfig::default()
    }
}

/// Says a figure past the test harness, which keeps what a passing test prints.
fn figure(line: &str) {
    let _ = writeln!(std::io::stdout().lock(), "figures: {line}");
}

/// The rules that ended in a verdict, by id.
fn rules(report: &Report, of: fn(&Verdict) -> bool) -> Vec<&'static str> {
    report.findings.iter().filter(|finding| of(&finding.verdict)).map(|finding| finding.rule).collect()
}
