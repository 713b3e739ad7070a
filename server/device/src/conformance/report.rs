//! What a run found: for people as a table with the differences explained, for programs as JSON.
//!
//! # Invariants
//! - Every rule of the suite is in a report exactly once: as a finding, or by its id among those not run.
//! - [`Report::conforms`] is false where a rule that matters differs, and where a run ended early.

use std::fmt;

use serde::Serialize;

use super::rule::{Rule, Verdict};
use crate::Identity;

/// What was found about one rule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The rule's id.
    pub rule: &'static str,
    /// What a device has to do.
    pub contract: &'static str,
    /// Where the kernel says so.
    pub source: &'static str,
    /// What was found.
    #[serde(flatten)]
    pub verdict: Verdict,
}

impl Finding {
    pub(super) fn of(rule: &'static Rule, verdict: Verdict) -> Self {
        Self { rule: rule.id, contract: rule.contract, source: rule.source, verdict }
    }
}

/// Why a run ended before its last rule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Stopped {
    /// What happened.
    pub reason: String,
    /// The rules that were not run.
    pub not_run: Vec<&'static str>,
}

/// How many rules ended how.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// All rules of the suite.
    pub rules: usize,
    /// The device does as they say.
    pub hold: usize,
    /// It differs, and that matters.
    pub differ: usize,
    /// It differs, and the driver copes.
    pub differ_tolerated: usize,
    /// The device lacks what they are about.
    pub not_applicable: usize,
    /// They could not be observed.
    pub not_observed: usize,
    /// The run ended before them.
    pub not_run: usize,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} rules: {} hold, {} differ and matter, {} differ and are tolerated, {} not applicable, {} not observed",
            self.rules, self.hold, self.differ, self.differ_tolerated, self.not_applicable, self.not_observed
        )?;
        if self.not_run > 0 {
            write!(f, ", {} NOT RUN", self.not_run)?;
        }
        Ok(())
    }
}

/// What a run of the suite found about one device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The device.
    pub device: Identity,
    /// What it said that it can do.
    pub capabilities: String,
    /// The device that states were loaded into, where it was another one.
    pub restored_onto: Option<Identity>,
    /// What was found, in the order of the suite.
    pub findings: Vec<Finding>,
    /// Why the run ended early, where it did.
    pub stopped: Option<Stopped>,
}

impl Report {
    /// Whether the whole suite ran and no difference matters.
    pub fn conforms(&self) -> bool {
        self.stopped.is_none() && !self.findings.iter().any(|finding| finding.verdict.matters())
    }

    /// The rules in which the device differs.
    pub fn differences(&self) -> impl Iterator<Item = &Finding> {
        self.findings.iter().filter(|finding| matches!(finding.verdict, Verdict::Differs { .. }))
    }

    /// What was found about one rule, if it was run.
    pub fn finding(&self, rule: &str) -> Option<&Finding> {
        self.findings.iter().find(|finding| finding.rule == rule)
    }

    /// The counts.
    pub fn summary(&self) -> Summary {
        let not_run = self.stopped.as_ref().map_or(0, |stopped| stopped.not_run.len());
        let mut summary = Summary { rules: self.findings.len() + not_run, not_run, ..Summary::default() };
        for finding in &self.findings {
            let count = match finding.verdict {
                Verdict::Holds { .. } => &mut summary.hold,
                Verdict::Differs { matters: true, .. } => &mut summary.differ,
                Verdict::Differs { matters: false, .. } => &mut summary.differ_tolerated,
                Verdict::NotApplicable { .. } => &mut summary.not_applicable,
                Verdict::NotObserved { .. } => &mut summary.not_observed,
            };
            *count += 1;
        }
        summary
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {}", self.device, self.capabilities)?;
        if let Some(other) = &self.restored_onto {
            writeln!(f, "states were loaded into {other}")?;
        }
        let width = self.findings.iter().map(|finding| finding.rule.len()).max().unwrap_or(4).max(4);
        writeln!(f, "\n{:<width$}  {:<14}  {:<8}  SEEN", "RULE", "VERDICT", "MATTERS?")?;
        for Finding { rule, verdict, .. } in &self.findings {
            let matters = match verdict {
                Verdict::Differs { matters: true, .. } => "YES",
                Verdict::Differs { matters: false, .. } => "no",
                Verdict::Holds { .. } | Verdict::NotApplicable { .. } | Verdict::NotObserved { .. } => "-",
            };
            writeln!(f, "{rule:<width$}  {verdict:<14}  {matters:<8}  {}", verdict.text())?;
        }
        for Finding { rule, contract, source, verdict } in self.differences() {
            if let Verdict::Differs { seen, matters, meaning } = verdict {
                let weight = if *matters { "matters" } else { "tolerated" };
                writeln!(f, "\n{rule}\n  rule:       {contract}\n  source:     {source}")?;
                writeln!(f, "  seen:       {seen}\n  {:<12}{meaning}", format!("{weight}:"))?;
            }
        }
        if let Some(Stopped { reason, not_run }) = &self.stopped {
            writeln!(f, "\nThe run ended early: {reason}\nNot run: {}", not_run.join(", "))?;
        }
        let verdict = if self.conforms() { "conforms" } else { "does NOT conform" };
        write!(f, "\n{}\nThe device {verdict}.", self.summary())
    }
}
