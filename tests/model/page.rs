//! `fsm/docs/handover.md`, for whoever writes another side or has to judge one. `UPDATE_DOCS=1 cargo test` writes its
//! generated parts anew.
//!
//! ```text
//!   fsm: on_commit, after_crash, resolve --.
//!   messages.rs ---------------------------+--> sections between markers == what is in the page
//!   courses.rs: runs of the model ---------'
//! ```
//! # Invariants
//! Every generated section has its place in the page, and every call that the page names is one of the contract.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;

use vfio_checkpoint_fsm::SaveEvent;
use vfio_checkpoint_fsm::handover::{
    ArrivalStep, ArrivalTakeUp, CommitAnswer, Evidence, OfferStep, OfferTakeUp, Resolution, Unresolvable,
    Verdict, resolve,
};

use crate::courses;
use crate::messages::MESSAGES;
use crate::oracle;
use crate::setup::Commit;

const VERDICTS: [Verdict; 4] = [Verdict::Committed, Verdict::Refused, Verdict::Lost, Verdict::Broken];

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

fn table(headings: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut text = format!("| {} |\n|{}\n", headings.join(" | "), "---|".repeat(headings.len()));
    for row in rows {
        let _ = writeln!(text, "| {} |", row.join(" | "));
    }
    text
}

pub(crate) fn arrival_name(step: ArrivalStep) -> &'static str {
    match step {
        ArrivalStep::Loading => "LOADING",
        ArrivalStep::Prepared => "PREPARED",
        ArrivalStep::Committing => "COMMITTING",
        ArrivalStep::Reverting => "REVERTING",
        ArrivalStep::Over(verdict) => verdict.name(),
    }
}

pub(crate) fn offer_name(step: OfferStep) -> &'static str {
    match step {
        OfferStep::Begun => "BEGUN",
        OfferStep::Committing => "COMMITTING",
        OfferStep::LettingGo => "LETTING_GO",
    }
}

fn arrival_steps() -> impl Iterator<Item = ArrivalStep> {
    [ArrivalStep::Loading, ArrivalStep::Prepared, ArrivalStep::Committing, ArrivalStep::Reverting]
        .into_iter()
        .chain(VERDICTS.map(ArrivalStep::Over))
}

fn messages() -> String {
    let rows = MESSAGES.iter().map(|message| {
        let call = format!("{}.`{}`", message.service, message.call);
        let cells = [&call, message.way, message.when, message.record, message.does, message.again];
        cells.map(str::to_owned).into()
    });
    table(&["call", "from, to", "when", "on record before", "what the receiver does", "a second one"], rows)
}

fn commit_answers() -> String {
    let said = |step: ArrivalStep| match step.on_commit() {
        CommitAnswer::NotPrepared => "refused as a call; nothing is decided".to_owned(),
        CommitAnswer::Run => "records COMMITTING, runs the devices, and answers how that ended".to_owned(),
        CommitAnswer::Wait => "waits for the end, and answers that".to_owned(),
        CommitAnswer::Told(verdict) => format!("answers {verdict}"),
    };
    let does = |verdict: Verdict| match verdict.event() {
        Some(SaveEvent::Committed) => "lets go of its devices",
        Some(SaveEvent::Refused) => "resumes",
        Some(other) => panic!("{other} is no answer to a Commit"),
        None => "waits for an administrator",
    };
    let rows = arrival_steps().map(|step| {
        let then = match step {
            ArrivalStep::Over(verdict) => does(verdict),
            ArrivalStep::Loading
            | ArrivalStep::Prepared
            | ArrivalStep::Committing
            | ArrivalStep::Reverting => "asks on",
        };
        vec![arrival_name(step).to_owned(), said(step), then.to_owned()]
    });
    table(&["on record at the destination", "CommitHandover", "then the source"], rows)
}

fn after_crash() -> String {
    let arrival = |step: ArrivalStep, kept: bool| match step.after_crash(kept) {
        ArrivalTakeUp::Reset => "resets every device".to_owned(),
        ArrivalTakeUp::Wait => "waits on for Commit, until the deadline that is on record".to_owned(),
        ArrivalTakeUp::GoOn => "goes on to RUNNING".to_owned(),
        ArrivalTakeUp::Ended(verdict) => format!("is over: {verdict}"),
    };
    let rows = arrival_steps()
        .map(|step| vec![arrival_name(step).to_owned(), arrival(step, true), arrival(step, false)]);
    let mut text = table(&["destination: on record", "devices kept", "devices not kept"], rows);
    let rows = [OfferStep::Begun, OfferStep::Committing, OfferStep::LettingGo].map(|step| {
        let (kept, lost) = match step.after_crash() {
            OfferTakeUp::Undo => ("resumes", "reports the state as lost"),
            OfferTakeUp::AskOn => (
                "sends CommitHandover again, and asks on",
                "the same: its own copy is gone, and the other one may run",
            ),
            OfferTakeUp::LetGo => ("resets its devices", "resets its devices"),
        };
        vec![offer_name(step).to_owned(), kept.to_owned(), lost.to_owned()]
    });
    text.push('\n');
    text.push_str(&table(&["source: on record", "devices kept", "devices not kept"], rows));
    text
}

fn resolutions() -> String {
    let why = |refused: Unresolvable| match refused {
        Unresolvable::MayRunThere => "refused: it may run there",
        Unresolvable::RunsThere => "refused: it runs there",
        Unresolvable::MayBeLast => "refused: it may be the last copy",
    };
    let evidence = |evidence: Evidence| match evidence {
        Evidence::Nothing => "not heard",
        Evidence::Undecided => "heard, not decided",
        Evidence::Told(verdict) => verdict.name(),
    };
    let all = [Evidence::Nothing, Evidence::Undecided].into_iter().chain(VERDICTS.map(Evidence::Told));
    let rows = all.map(|heard| {
        let said = |resolution, stated| match resolve(heard, resolution, stated) {
            Ok(SaveEvent::Refused) => "resumes".to_owned(),
            Ok(SaveEvent::Committed) => "lets go".to_owned(),
            Ok(other) => panic!("{other} is no decision"),
            Err(refused) => why(refused).to_owned(),
        };
        vec![
            evidence(heard).to_owned(),
            said(Resolution::ResumeHere, false),
            said(Resolution::ResumeHere, true),
            said(Resolution::LetGo, false),
            said(Resolution::LetGo, true),
        ]
    });
    table(&["the destination", "RESUME_HERE", "with `peer_is_fenced`", "LET_GO", "with `accept_loss`"], rows)
}

fn properties() -> String {
    oracle::PROPERTIES.iter().fold(String::new(), |mut text, (name, _)| {
        let _ = writeln!(text, "- {name}");
        text
    })
}

fn sections() -> [(&'static str, String); 8] {
    [
        ("auto", courses::sequence(Commit::Auto)),
        ("manual", courses::sequence(Commit::Manual)),
        ("messages", messages()),
        ("commit", commit_answers()),
        ("crash", after_crash()),
        ("failures", courses::failures()),
        ("resolve", resolutions()),
        ("properties", properties()),
    ]
}

#[test]
fn the_page_is_current() {
    let path = root().join("server/fsm/docs/handover.md");
    let page = std::fs::read_to_string(&path).expect("the page is there");
    let mut current = page.clone();
    for (name, text) in sections() {
        let (begin, end) = (format!("<!-- generated: {name} -->\n"), "<!-- end -->");
        let (before, rest) = current.split_once(&begin).unwrap_or_else(|| panic!("no place for {name}"));
        let (_, after) = rest.split_once(end).unwrap_or_else(|| panic!("{name} has no end"));
        current = format!("{before}{begin}{text}{end}{after}");
    }
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&path, &current).expect("the page can be written");
    }
    let written = std::fs::read_to_string(&path).expect("the page is there");
    assert!(written == current, "docs/handover.md is not current; UPDATE_DOCS=1 cargo test writes it anew");
}

/// The calls of a service, as its contract has them.
fn calls(service: &str, file: &str) -> BTreeSet<String> {
    let path = root().join("proto/vfio/checkpoint/v1").join(file);
    let contract = std::fs::read_to_string(path).expect("the contract is there");
    let (_, body) = contract.split_once(&format!("service {service} {{")).expect("the service is there");
    let (body, _) = body.split_once("\n}").expect("it ends");
    let lines = body.lines().filter_map(|line| line.trim().strip_prefix("rpc "));
    lines.filter_map(|line| line.split_once('(')).map(|(name, _)| name.to_owned()).collect()
}

#[test]
fn the_messages_are_those_of_the_contract() {
    let named = |service: &str| -> BTreeSet<String> {
        let of = MESSAGES.iter().filter(|message| message.service == service);
        of.map(|message| message.call.to_owned()).collect()
    };
    assert_eq!(named("MigrationService"), calls("MigrationService", "migration_service.proto"));
    let stream = named("CheckpointService");
    assert!(stream.is_subset(&calls("CheckpointService", "checkpoint_service.proto")), "{stream:?}");
    assert!(
        MESSAGES.iter().all(|message| ["MigrationService", "CheckpointService"].contains(&message.service))
    );
}
