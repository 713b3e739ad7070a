//! What one check found.

use serde::Serialize;
use vfio_checkpoint_client::call::printable;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub(super) enum Level {
    /// As it should be.
    Ok,
    /// Works, and may not for long or not for everything; or could not be found out.
    Warn,
    /// Does not work.
    Fail,
}

/// What one check found, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Finding {
    pub(super) check: &'static str,
    pub(super) level: Level,
    /// What is there.
    pub(super) detail: String,
    /// How to mend it. None where nothing is wrong.
    pub(super) mend: Option<String>,
}

impl Finding {
    /// Whether this check has failed.
    pub(super) fn is_failed(&self, check: &str) -> bool {
        self.check == check && self.level == Level::Fail
    }
}

pub(super) fn ok(check: &'static str, detail: impl Into<String>) -> Finding {
    Finding { check, level: Level::Ok, detail: detail.into(), mend: None }
}

pub(super) fn warn(check: &'static str, detail: impl Into<String>, mend: impl Into<String>) -> Finding {
    Finding { check, level: Level::Warn, detail: detail.into(), mend: Some(mend.into()) }
}

pub(super) fn fail(check: &'static str, detail: impl Into<String>, mend: impl Into<String>) -> Finding {
    Finding { check, level: Level::Fail, detail: detail.into(), mend: Some(mend.into()) }
}

/// As wide as most terminals, and no wider where they are.
const LINE_CHARS: usize = 100;

/// Lines of words. A word that is longer stands alone: a path is to be copied.
fn wrap(text: &str, most_chars: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let line_chars = lines.last().map_or(0, |line| line.chars().count());
        if line_chars > 0 && line_chars + 1 + word.chars().count() > most_chars {
            lines.push(String::new());
        }
        if let Some(line) = lines.last_mut() {
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
    }
    lines
}

/// A line a finding, and below it what to do.
pub(super) fn table(findings: &[Finding], has_colours: bool) -> String {
    let width = findings.iter().map(|finding| finding.check.len()).max().unwrap_or_default();
    let mut text = String::new();
    for Finding { check, level, detail, mend } in findings {
        let (name, colour) = match level {
            Level::Ok => ("OK", "32"),
            Level::Warn => ("WARN", "33"),
            Level::Fail => ("FAIL", "31"),
        };
        let name = if has_colours { format!("\x1b[{colour}m{name:<4}\x1b[0m") } else { format!("{name:<4}") };
        let mut head = format!("{name}  {check:<width$}");
        let blank = " ".repeat(6 + width);
        for line in wrap(&printable(detail), LINE_CHARS - width - 8) {
            text.extend([format!("{head}  {line}\n")]);
            head.clone_from(&blank);
        }
        let mut arrow = "->";
        for line in mend.iter().flat_map(|mend| wrap(&printable(mend), LINE_CHARS - width - 11)) {
            text.extend([format!("{blank}  {arrow} {line}\n")]);
            arrow = "  ";
        }
    }
    let count = |wanted| findings.iter().filter(|finding| finding.level == wanted).count();
    text.extend([format!(
        "{} as they should be, {} to look at, {} wrong\n",
        count(Level::Ok),
        count(Level::Warn),
        count(Level::Fail)
    )]);
    text
}
