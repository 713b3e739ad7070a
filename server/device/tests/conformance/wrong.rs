//! Devices that are wrong in one way each: exactly the rules that are about it say so, and no others.
//!
//! A rule that cannot fail proves nothing. Each line of [`table`] is a flaw and the rules that must find it; a last
//! test names the rules that no flaw is for.

#![allow(clippy::wildcard_enum_match_arm, reason = "most flaws show on the same device")]

use std::collections::BTreeSet;

use vfio_checkpoint_device::conformance::{LastClose, Report, Subject, Verdict, rules as suite};
use vfio_checkpoint_device::sim::{Precopy, SimConfig, SizeReport};
use vfio_checkpoint_fsm::Capabilities;

use super::broken::{Broken, Flaw};
use super::{Bed, figure, rules, small};

/// A flaw, the device that has it, and the rules that must find it.
type Case = (Flaw, SimConfig, &'static [&'static str]);

fn table() -> Vec<Case> {
    TABLE.iter().map(|(flaw, expected)| (*flaw, base(*flaw), *expected)).collect()
}

/// The device that shows the flaw best.
fn base(flaw: Flaw) -> SimConfig {
    let bare = Capabilities { p2p: false, pre_copy: false };
    match flaw {
        Flaw::AcceptsAbsent => SimConfig { migration: bare, ..small() },
        Flaw::UnderstatesBound => {
            SimConfig { data_size: SizeReport::UpperBound { slack_bytes: 0 }, ..small() }
        }
        Flaw::GuessesSize => SimConfig { data_size: SizeReport::Exact, ..small() },
        Flaw::InitialNeverFalls => {
            SimConfig { precopy: Precopy { initial_bytes: Some(8192), ..Precopy::default() }, ..small() }
        }
        _ => small(),
    }
}

/// Flaws that show in one place: exactly these rules find them.
const TABLE: &[(Flaw, &[&str])] = &[
    (Flaw::UnderstatesBound, &["size-bound-is-kept", "size-in-stop-copy"]),
    (Flaw::RefusesOddPieces, &["writes-of-odd-sizes"]),
    (Flaw::RefusesSecondRestore, &["restore-can-be-repeated"]),
    (
        Flaw::NoStartInTwoSteps,
        &["walks-from-resuming", "walk-takes-the-predicted-hops", "restored-device-starts-in-two-steps"],
    ),
    (
        Flaw::StuckInPrecopy,
        &["walks-from-pre-copy", "walk-takes-the-predicted-hops", "precopy-can-be-abandoned"],
    ),
    (Flaw::CapabilitiesChangeOnReopen, &["capabilities-stable"]),
    (Flaw::FingerprintChangesOnReopen, &["fingerprint-stable"]),
    (Flaw::IdentityChangesOnReopen, &["identity-stable"]),
    (Flaw::SecondStream, &["walks-from-pre-copy", "one-stream-per-session"]),
    (Flaw::StayingRefused, &["staying-is-no-move"]),
    (
        Flaw::AcceptsError,
        &[
            "arc-forbidden-to-error",
            "error-is-left-by-a-reset-only",
            "rejected-set-keeps-the-save-stream",
            "rejected-set-keeps-the-restore-stream",
        ],
    ),
    (
        Flaw::AcceptsAbsent,
        &[
            "arc-forbidden-to-absent-states",
            "p2p-state-as-flagged",
            "pre-copy-state-as-flagged",
            "pre-copy-p2p-state-as-flagged",
            "error-is-left-by-a-reset-only",
        ],
    ),
    (Flaw::RestartsStream, &["arc-forbidden-stop-copy-to-pre-copy"]),
    (Flaw::RunsOutOfError, &["error-is-left-by-a-reset-only"]),
    (Flaw::EndComesBack, &["stop-copy-end-stays"]),
    (Flaw::LosesByteOfSingleReads, &["reads-of-any-size"]),
    (Flaw::ShortOnHugeReads, &["reads-of-any-size"]),
    (Flaw::RejectedSetEndsStream, &["rejected-set-keeps-the-save-stream"]),
    (Flaw::StreamOutlivesSession, &["stream-ends-with-its-session"]),
    (Flaw::StreamOutlivesReset, &["reset-ends-the-save-stream"]),
    (Flaw::CloseStopsDevice, &["new-session-new-stream", "closing-the-stream-moves-nothing"]),
    (Flaw::SaveChangesState, &["save-leaves-the-state-alone"]),
    (
        Flaw::EndsInPrecopy,
        &[
            "precopy-is-never-the-end",
            "precopy-saves-the-same-state",
            "precopy-follows-changes",
            "precopy-begins-quiesced",
        ],
    ),
    (
        Flaw::IdleIsError,
        &[
            "precopy-idle-is-no-error",
            "precopy-is-never-the-end",
            "precopy-saves-the-same-state",
            "precopy-follows-changes",
            "precopy-begins-quiesced",
            "initial-bytes-only-fall",
            "initial-bytes-reach-zero",
            "reinit-only-after-opt-in",
            "size-covers-stop-copy-after-pre-copy",
        ],
    ),
    (
        Flaw::PrecopySavesElse,
        &["stream-goes-on-into-stop-copy", "precopy-saves-the-same-state", "precopy-follows-changes"],
    ),
    (Flaw::InfoInStopCopy, &["precopy-info-nowhere-else"]),
    (Flaw::NoInfoInP2p, &["precopy-info-in-pre-copy"]),
    (Flaw::InitialRises, &["initial-bytes-only-fall"]),
    (Flaw::InitialNeverFalls, &["initial-bytes-can-be-read", "initial-bytes-reach-zero"]),
    (Flaw::ReinitUnasked, &["reinit-only-after-opt-in"]),
    (Flaw::Understates, &["size-known-is-exact", "size-in-stop-copy"]),
    (Flaw::UnderstatesAfterPrecopy, &["size-covers-stop-copy-after-pre-copy"]),
    (Flaw::GuessesSize, &["size-absent-is-said"]),
    (Flaw::AcceptsTruncated, &["truncated-state-refused"]),
    (Flaw::AcceptsEmpty, &["empty-state-refused"]),
    (Flaw::AcceptsTrailing, &["trailing-byte-refused", "trailing-page-refused"]),
    (Flaw::AcceptsForeign, &["foreign-state-refused"]),
    (Flaw::LoadsAfterFailedWrite, &["failed-write-is-final"]),
    (Flaw::RefusalStops, &["refused-state-stays-in-resuming"]),
    (Flaw::RefusesSingleBytes, &["writes-of-one-byte"]),
    (Flaw::KeepsOldState, &["restore-replaces-the-state"]),
    (Flaw::StartChangesState, &["restore-survives-running"]),
    (Flaw::ResetRemembers, &["reset-forgets-the-state"]),
    (Flaw::ResetUnannounced, &["reset-as-announced"]),
    (Flaw::BitmapCleared, &["dma-log-never-clears-the-bitmap"]),
    (Flaw::WritesNotLogged, &["dma-log-marks-writes"]),
    (Flaw::ReportedAgain, &["dma-log-report-clears-the-log"]),
    (Flaw::SecondStartTaken, &["dma-log-refuses-a-second-start"]),
    (Flaw::OverlapTaken, &["dma-log-refuses-overlaps"]),
    (Flaw::CleanWithoutLog, &["dma-log-no-report-before-start", "dma-log-no-report-after-stop"]),
    (Flaw::OddLogPages, &["dma-log-starts-reports-stops", "dma-log-adjusts-the-page-size"]),
    (
        Flaw::LogStopsWithDevice,
        &["dma-log-marks-writes", "dma-log-report-clears-the-log", "dma-log-reports-when-stopped"],
    ),
    (Flaw::CommandFixed, &["command-can-be-written", "command-can-be-fixed-up-in-resuming"]),
    (Flaw::CommandLostOnLoad, &["command-can-be-fixed-up-in-resuming"]),
    (Flaw::InterruptsNotCaptured, &["msi-armed-captured-disarmed", "msix-armed-captured-disarmed"]),
];

/// Flaws in what nearly every rule needs: they are found by many, and by these among them.
const BROAD: &[(Flaw, &[&str])] = &[
    (Flaw::NoStreamFromStop, &["walks-from-stop", "save-leaves-the-state-alone"]),
    (Flaw::LandsElsewhere, &["walks-from-running", "walk-takes-the-predicted-hops"]),
    (
        Flaw::P2pFlaggedNotThere,
        &["p2p-state-as-flagged", "walks-from-running-p2p", "restored-device-starts-in-two-steps"],
    ),
    (Flaw::EndsByEnomsg, &["stop-copy-ends-by-zero", "restored-device-runs"]),
];

fn run(flaw: Flaw, config: SimConfig) -> Report {
    let bed = Bed::new(config);
    let broken = Broken::new(flaw, &bed.device);
    let subject = bed.subject();
    bed.run(subject.opened_by(Box::new(move || Ok(Box::new(broken.open())))))
}

fn red(report: &Report) -> Vec<&'static str> {
    rules(report, |verdict| matches!(verdict, Verdict::Differs { .. }))
}

#[test]
fn exactly_the_rules_that_are_meant_find_a_wrong_device() {
    let mut wrong = Vec::new();
    for (flaw, config, expected) in table() {
        let report = run(flaw, config);
        if red(&report) != expected || report.stopped.is_some() {
            let seen: Vec<String> = report
                .differences()
                .map(|finding| format!("\n    {}: {}", finding.rule, finding.verdict.text()))
                .collect();
            wrong.push(format!("{flaw:?}: {expected:?} expected, found {:?}{}", red(&report), seen.concat()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    figure(&format!(
        "conformance: {} wrong devices, each found by the rules meant",
        TABLE.len() + BROAD.len() + 2
    ));
}

#[test]
fn what_the_subject_says_of_itself_is_checked_too() {
    let bed = Bed::new(small());
    let report = bed.run(bed.subject().last_close(LastClose::Keeps));
    assert_eq!(red(&report), ["reopened-state"], "{report}");
    let report = bed.run(bed.subject().hops_from(Box::new(Vec::new)));
    assert_eq!(red(&report), ["walk-takes-the-predicted-hops"], "{report}");
}

#[test]
fn flaws_in_what_every_rule_needs_are_found_by_many() {
    for (flaw, expected) in BROAD {
        let report = run(*flaw, base(*flaw));
        let red = red(&report);
        assert!(red.len() > 10 && expected.iter().all(|rule| red.contains(rule)), "{flaw:?}: {report}");
        assert!(!report.conforms() && report.stopped.is_none(), "{flaw:?}: {report}");
    }
}

/// The rules that no flaw here is for are named, and may only become fewer.
#[test]
fn most_rules_have_a_device_that_breaks_them() {
    let mut found: BTreeSet<&str> =
        TABLE.iter().chain(BROAD).flat_map(|(_, expected)| expected.iter().copied()).collect();
    found.extend(["reopened-state", "walk-takes-the-predicted-hops"]);
    let without: Vec<&str> = suite::all().map(|rule| rule.id).filter(|id| !found.contains(id)).collect();
    assert!(without.len() <= 17, "{without:?}");
    figure(&format!(
        "conformance: {} rules have a device that breaks them, {} have none: {}",
        found.len(),
        without.len(),
        without.join(" ")
    ));
}

#[test]
fn a_subject_without_stimuli_leaves_rules_unobserved() {
    let bed = Bed::new(small());
    let slot = bed.device.clone();
    let report = bed.run(Subject::new(Box::new(move || Ok(Box::new(slot.open()?)))));
    assert!(report.conforms(), "{report}");
    assert_eq!(
        rules(&report, |verdict| matches!(verdict, Verdict::NotObserved { .. })),
        [
            "walk-takes-the-predicted-hops",
            "error-is-left-by-a-reset-only",
            "precopy-follows-changes",
            "restore-replaces-the-state",
            "reset-forgets-the-state",
            "dma-log-marks-writes",
            "dma-log-report-clears-the-log",
        ]
    );
}
