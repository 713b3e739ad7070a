//! The conformance suite on real devices: the same rules as for every backend, on mtty by both paths.
//!
//! Where mtty differs from a rule the difference is a line of [`EXPECTED`], with its reason: a difference that is not
//! listed is a failure, and so is one that is listed and gone.

use std::io::Write as _;
use std::sync::Arc;

use vfio_checkpoint_device::conformance::{Options, Report, RunError, Subject, Verdict, rules, run};
use vfio_checkpoint_device::kernel::{KernelPath, OpenOptions};
use vfio_checkpoint_device::{Executor, Threads, chain};
use vfio_checkpoint_fsm::Capabilities;

use crate::Test;
use crate::by_hand;
use crate::facts::Facts;
use crate::kmsg::KernelLog;
use crate::save_restore::open;
use crate::variant::Parameters;

pub(crate) const TESTS: &[Test] = &[
    ("conformance::container", |facts| conforms(facts, KernelPath::Container)),
    ("conformance::iommufd", |facts| conforms(facts, KernelPath::Iommufd)),
    ("conformance::variant_container", |facts| variant_conforms(facts, KernelPath::Container)),
    ("conformance::variant_iommufd", |facts| variant_conforms(facts, KernelPath::Iommufd)),
    ("conformance::a_device_in_use_is_left_alone", in_use),
];

/// What mtty does differently: the rule, and why.
const EXPECTED: &[(&str, &str)] = &[
    (
        "failed-write-is-final",
        "the bytes of a write that failed are counted, and the load looks at the count alone",
    ),
    ("dma-log-refuses-a-second-start", "the log is three functions that do nothing and answer success"),
    ("dma-log-no-report-before-start", "the log is three functions that do nothing and answer success"),
    ("dma-log-no-report-after-stop", "the log is three functions that do nothing and answer success"),
    ("command-can-be-written", "writes to the command register are accepted and dropped"),
    ("command-can-be-fixed-up-in-resuming", "writes to the command register are accepted and dropped"),
];

/// What the variant of mtty does differently, under whatever flags.
const EXPECTED_OF_VARIANT: &[(&str, &str)] = &[
    ("command-can-be-written", "as mtty: writes to the command register are accepted and dropped"),
    (
        "command-can-be-fixed-up-in-resuming",
        "as mtty: writes to the command register are accepted and dropped",
    ),
];

/// A device of the guest, with the hops that the kernel logs of it.
fn subject(name: &str, path: KernelPath) -> Subject {
    let options = OpenOptions { path: Some(path), ..OpenOptions::default() };
    let subject = Subject::kernel(name, &options);
    let (mut log, name) = (KernelLog::new(), name.to_owned());
    subject
        .unwrap_or_else(|error| panic!("{name}: {}", chain(&error)))
        .hops_from(Box::new(move || log.hops(&name)))
}

fn suite(subject: Subject) -> Result<Report, RunError> {
    let executor: Arc<dyn Executor> = Arc::new(Threads::new());
    // The guest's kernel has the fix for the request that loops in others; the state matrix makes it, too.
    let options = Options { allow_restart: true, discard_left_over: true, ..Options::default() };
    run(subject, &options, &executor, &mut |_| {})
}

/// Every mtty of the guest, each restored onto the next of its type.
fn conforms(facts: &Facts, path: KernelPath) {
    let (mut backends, mut hold, mut tolerated, mut not_observed) = (0, 0, 0, 0);
    for devices in [&facts.mtty1, &facts.mtty2] {
        let report = suite(subject(&devices[0], path).restore_onto(subject(&devices[1], path)))
            .unwrap_or_else(|error| panic!("{}: {}", devices[0], chain(&error)));
        // Whole, for whoever reads the guest's log: the report is what a driver author gets to see.
        println!("{report}");
        let differences: Vec<&str> = report.differences().map(|finding| finding.rule).collect();
        let expected: Vec<&str> = EXPECTED.iter().map(|(rule, _)| *rule).collect();
        assert_eq!(differences, expected, "{}", devices[0]);
        assert!(report.conforms(), "{}", devices[0]);
        let summary = report.summary();
        backends += 1;
        hold += summary.hold;
        tolerated += summary.differ_tolerated;
        not_observed += summary.not_observed;
        for rule in ["arc-forbidden-stop-copy-to-pre-copy", "walk-takes-the-predicted-hops"] {
            let finding = report.finding(rule).expect("a finding");
            assert!(matches!(finding.verdict, Verdict::Holds { .. }), "{finding:?}");
        }
    }
    let _ = writeln!(
        std::io::stdout().lock(),
        "figures: conformance: {path:?}: {} rules x {backends} kernel devices, {hold} hold, {tolerated} differ (tolerated), \
         {not_observed} not observed",
        rules::all().count()
    );
}

/// The variant of mtty, which does what mtty leaves out, under every set of flags.
fn variant_conforms(facts: &Facts, path: KernelPath) {
    let (mut hold, mut not_observed) = (0, 0);
    for capabilities in Capabilities::ALL {
        let parameters = Parameters::new();
        parameters.flags(capabilities).enomsg().dma_dirty().reset_on_close();
        let devices = &facts.mttyv1;
        let report = suite(subject(&devices[0], path).restore_onto(subject(&devices[1], path)))
            .unwrap_or_else(|error| panic!("{capabilities}: {}", chain(&error)));
        println!("{report}");
        let differences: Vec<&str> = report.differences().map(|finding| finding.rule).collect();
        let expected: Vec<&str> = EXPECTED_OF_VARIANT.iter().map(|(rule, _)| *rule).collect();
        assert_eq!(differences, expected, "{capabilities}");
        let summary = report.summary();
        hold += summary.hold;
        not_observed += summary.not_observed;
    }
    let _ = writeln!(
        std::io::stdout().lock(),
        "figures: conformance: variant {path:?}: {} rules x {} kernel devices, {hold} hold, {} differ each, \
         {not_observed} not observed",
        rules::all().count(),
        Capabilities::ALL.len(),
        EXPECTED_OF_VARIANT.len(),
    );
}

/// A device that somebody else has open is refused before it is touched, and without consent nothing is destroyed.
fn in_use(facts: &Facts) {
    let name = facts.mtty1[3].as_str();
    // Who holds the device's own node is seen before anything is opened. Who holds it through its group is not, once
    // the group's file is closed; then the kernel refuses the open.
    for (path, refusal) in [(KernelPath::Iommufd, "held open by"), (KernelPath::Container, "is in use")] {
        let holder = open(name, path);
        let (code, stdout, stderr) = by_hand::run(&["conformance", "--device", name, "--yes"]);
        assert_eq!((code, stdout.as_str()), (Some(3), ""), "{path}: {stderr}");
        assert!(stderr.contains(refusal), "{path}: {stderr}");
        drop(holder);
    }

    let (code, stdout, stderr) = by_hand::run(&["conformance", "--device", name]);
    assert_eq!((code, stdout.as_str()), (Some(3), ""), "{stderr}");
    assert!(stderr.contains("--yes"), "{stderr}");

    let (code, stdout, stderr) = by_hand::run(&["conformance", "--device", name, "--yes"]);
    assert_eq!(code, Some(0), "{stdout}{stderr}");
    assert!(stdout.contains("The device conforms."), "{stdout}");
}
