//! A simulated device conforms, however it is configured, without a single difference.

use std::collections::BTreeSet;
use std::time::Duration;

use vfio_checkpoint_device::conformance::{Verdict, rules as suite};
use vfio_checkpoint_device::sim::{
    LogPages, Precopy, PrecopyIdle, Refill, Reinit, SimConfig, SimPci, SizeReport, Validation, Workload,
};
use vfio_checkpoint_fsm::Capabilities;

use super::{Bed, figure, rules, small};

/// Every kind of device there is, by name.
fn configurations() -> Vec<(String, SimConfig)> {
    let mut all: Vec<(String, SimConfig)> =
        Capabilities::ALL.map(|migration| (migration.to_string(), SimConfig { migration, ..small() })).into();
    let precopy = |precopy| SimConfig { precopy, ..small() };
    let others = [
        ("as mtty", SimConfig::mtty_like()),
        ("0 when idle", precopy(Precopy { idle: PrecopyIdle::Zero, ..Precopy::default() })),
        ("refills on reads", precopy(Precopy { refill: Refill::OnRead, ..Precopy::default() })),
        ("little to pre-copy", precopy(Precopy { initial_bytes: Some(8192), ..Precopy::default() })),
        ("a rate limit", precopy(Precopy { reread_interval: Duration::from_secs(1), ..Precopy::default() })),
        ("REINIT, opted in", precopy(reinit(true))),
        ("REINIT, not opted in", precopy(reinit(false))),
        ("late validation", SimConfig { validation: Validation::OnExit, ..small() }),
        ("keeps its state over a close", SimConfig { reset_on_last_close: false, ..small() }),
        ("no reset", SimConfig { reset: false, ..small() }),
        ("no reset at all", SimConfig { reset: false, reset_on_last_close: false, ..small() }),
        ("no size", SimConfig { data_size: SizeReport::Unknown, ..small() }),
        ("a bound", SimConfig { data_size: SizeReport::UpperBound { slack_bytes: 1000 }, ..small() }),
        ("no PCI function", SimConfig { pci: None, ..small() }),
        (
            "no interrupts, cleared by a reset",
            SimConfig {
                pci: Some(SimPci { msi_vectors: 0, msix_vectors: 0, kept_by_reset: false }),
                ..small()
            },
        ),
        (
            "no DMA log",
            SimConfig { dma: vfio_checkpoint_device::sim::SimDma { log: None, ..small().dma }, ..small() },
        ),
        (
            "a coarse DMA log",
            SimConfig {
                dma: vfio_checkpoint_device::sim::SimDma {
                    log: Some(LogPages { min_bytes: 65536, max_bytes: 65536 }),
                    ..small().dma
                },
                ..small()
            },
        ),
        ("one page", SimConfig { memory_bytes: 1, ..small() }),
        (
            "busy",
            SimConfig {
                workload: Workload { dirty_bytes_per_second: 40960, working_set_bytes: None },
                ..small()
            },
        ),
    ];
    all.extend(others.map(|(name, config)| (name.to_owned(), config)));
    all
}

fn reinit(reinit_feature: bool) -> Precopy {
    Precopy {
        reinit_feature,
        reinit: Some(Reinit { after_bytes: 9000, initial_bytes: 12288 }),
        ..Precopy::default()
    }
}

#[test]
fn every_configuration_conforms_without_a_difference() {
    let (mut hold, mut not_observed, mut backends) = (0, 0, 0);
    let mut shown = BTreeSet::new();
    for (name, config) in configurations() {
        let bed = Bed::new(config);
        let report = bed.run(bed.subject());
        assert!(report.conforms() && report.differences().next().is_none(), "{name}: {report}");
        let summary = report.summary();
        assert_eq!(summary.rules, suite::all().count(), "{name}");
        (hold, not_observed, backends) =
            (hold + summary.hold, not_observed + summary.not_observed, backends + 1);
        shown.extend(rules(&report, |verdict| matches!(verdict, Verdict::Holds { .. })));
    }
    let never: Vec<&str> = suite::all().map(|rule| rule.id).filter(|id| !shown.contains(id)).collect();
    assert!(never.is_empty(), "no configuration shows these rules: {never:?}");
    figure(&format!(
        "conformance: {} rules x {backends} simulated devices, {hold} hold, 0 differ, {not_observed} not observed",
        suite::all().count()
    ));
}

#[test]
fn a_device_with_everything_shows_every_rule() {
    let bed = Bed::new(small());
    let report = bed.run(bed.subject());
    let unseen = rules(&report, |verdict| !matches!(verdict, Verdict::Holds { .. }));
    // Nothing has every state and an absent one, a bound and an exact size, a size and none.
    assert_eq!(
        unseen,
        ["arc-forbidden-to-absent-states", "size-bound-is-kept", "size-absent-is-said"],
        "{report}"
    );
    assert!(bed.device.resets() > 100, "each case begins fresh");
}

#[test]
fn states_load_into_a_second_device() {
    let source = Bed::new(small());
    let other = Bed::new(SimConfig { name: "sim1".to_owned(), seed: 99, ..small() });
    let report = source.run(source.subject().restore_onto(other.subject()));
    assert!(report.conforms() && report.differences().next().is_none(), "{report}");
    assert_eq!(report.restored_onto.unwrap().name, "sim1");
    assert!(other.device.resets() > 10);
}
