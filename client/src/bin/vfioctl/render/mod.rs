//! Results for people and for programs.
//!
//! ```text
//!   message of the contract -> document (serde) -> table | wide        for eyes
//!                                               -> json | yaml         for programs
//! ```
//!
//! Invariants: documents keep the names of their fields, with units in them; enum values are those of the contract
//! without their prefix. Text of others reaches a table only without control characters. Failure paths: a reader that
//! has seen enough is no failure; any other trouble with stdout is.

mod checkpoint;
mod device;
mod handover;
mod operation;

use std::borrow::Cow;
use std::io::{self, IsTerminal, Write};
use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

use indicatif::{BinaryBytes, HumanDuration};
use serde::Serialize;
use vfio_checkpoint_client::call::{Violation, printable};
use vfio_checkpoint_proto::v1;

pub(crate) use checkpoint::{AddedDoc, CheckpointDoc, DeviceStateDoc, checkpoints, device_states};
pub(crate) use device::{DeviceDoc, device_change, devices};
pub(crate) use handover::{HandoverDoc, in_doubt, is_for_somebody, verdict_in_words, verdict_name};
pub(crate) use operation::{OperationDoc, operations};

use crate::cli::OutputFormat;
use crate::outcome::{Exit, Failure};

/// How much a table shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Detail {
    /// What fits beside each other on most terminals.
    Usual,
    /// All columns.
    Wide,
}

/// Prints a result.
pub(crate) fn print(
    format: OutputFormat,
    table: impl FnOnce(Detail) -> String,
    document: &impl Serialize,
) -> Result<(), Failure> {
    let text = match format {
        OutputFormat::Table => table(Detail::Usual),
        OutputFormat::Wide => table(Detail::Wide),
        OutputFormat::Json => json(document)?,
        OutputFormat::Yaml => yaml(document)?,
    };
    put(&text).map(drop)
}

/// Whether anybody reads what is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reader {
    /// Somebody does, as far as is known.
    There,
    /// Whoever did has seen enough.
    Gone,
}

/// Prints one of many results: a line of JSON, or a YAML document of a stream of them.
pub(crate) fn print_next(
    format: OutputFormat,
    table: impl FnOnce(Detail) -> String,
    document: &impl Serialize,
) -> Result<Reader, Failure> {
    let text = match format {
        OutputFormat::Table => table(Detail::Usual),
        OutputFormat::Wide => table(Detail::Wide),
        OutputFormat::Json => json_line(document)?,
        OutputFormat::Yaml => format!("---\n{}", yaml(document)?),
    };
    put(&text)
}

pub(crate) fn json(document: &impl Serialize) -> Result<String, Failure> {
    serde_json::to_string_pretty(document).map(|text| text + "\n").map_err(unprintable)
}

pub(crate) fn json_line(document: &impl Serialize) -> Result<String, Failure> {
    serde_json::to_string(document).map(|text| text + "\n").map_err(unprintable)
}

pub(crate) fn yaml(document: &impl Serialize) -> Result<String, Failure> {
    serde_saphyr::to_string(document).map_err(unprintable)
}

fn unprintable(error: impl std::fmt::Display) -> Failure {
    Failure::new(Exit::Failed, format!("the result cannot be written down: {error}"))
}

/// Writes to stdout.
pub(crate) fn put(text: &str) -> Result<Reader, Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(Reader::There),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(Reader::Gone),
        Err(error) => Err(Failure::new(Exit::Failed, format!("the result cannot be printed: {error}"))),
    }
}

/// Whether stdout takes colours: it is a terminal, and `NO_COLOR` is not set.
pub(crate) fn has_colours() -> bool {
    io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// How results are printed, and with them all that stderr gets.
static FORMAT: OnceLock<OutputFormat> = OnceLock::new();

/// From now on stderr gets what it gets in this format.
pub(crate) fn speak(format: OutputFormat) {
    // It is said once, when the command line is known.
    let _said_before = FORMAT.set(format);
}

/// Something that is said on the way, for programs.
#[derive(Debug, Serialize)]
struct NoteDoc<'a> {
    note: &'a str,
}

/// Says something that is not the result.
pub(crate) fn say(text: &str) {
    tell(text, &NoteDoc { note: text });
}

/// Says why a command did not do what was asked for.
pub(crate) fn say_failure(failure: &Failure) {
    tell(&format!("vfioctl: {}", failure.message), &failure.document());
}

/// A line for people, or a document of a stream of them.
fn tell(text: &str, document: &impl Serialize) {
    let for_people = || format!("{text}\n");
    let told = match FORMAT.get() {
        None | Some(OutputFormat::Table | OutputFormat::Wide) => for_people(),
        Some(OutputFormat::Json) => json_line(document).unwrap_or_else(|_| for_people()),
        Some(OutputFormat::Yaml) => {
            yaml(document).map_or_else(|_| for_people(), |document| format!("---\n{document}"))
        }
    };
    // A stderr that is closed hears nothing.
    let _unsaid = io::stderr().write_all(told.as_bytes());
}

/// A column of a table.
pub(crate) struct Column<T> {
    /// Its head.
    pub(crate) head: &'static str,
    /// Whether only a wide table has it.
    pub(crate) is_wide: bool,
    /// What stands in it.
    pub(crate) cell: fn(&T) -> String,
}

/// A column of every table.
pub(crate) const fn usual<T>(head: &'static str, cell: fn(&T) -> String) -> Column<T> {
    Column { head, is_wide: false, cell }
}

/// A column of wide tables.
pub(crate) const fn wide<T>(head: &'static str, cell: fn(&T) -> String) -> Column<T> {
    Column { head, is_wide: true, cell }
}

/// A table of things. What is empty in it is a dash.
pub(crate) fn rows<T>(detail: Detail, columns: &[Column<T>], things: &[T]) -> String {
    let shown: Vec<&Column<T>> =
        columns.iter().filter(|column| detail == Detail::Wide || !column.is_wide).collect();
    let head: Vec<&str> = shown.iter().map(|column| column.head).collect();
    let rows: Vec<Vec<String>> = things
        .iter()
        .map(|thing| shown.iter().map(|column| or_dash(Some((column.cell)(thing)))).collect())
        .collect();
    table(&head, &rows)
}

/// Columns as wide as they need to be.
pub(crate) fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = head.iter().map(|cell| cell.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let padded: Vec<String> = cells.zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        padded.join("  ").trim_end().to_owned() + "\n"
    };
    let mut text = line(&mut head.iter().copied());
    for row in rows {
        text += &line(&mut row.iter().map(String::as_str));
    }
    text
}

pub(crate) fn bytes(count: u64) -> String {
    BinaryBytes(count).to_string()
}

pub(crate) fn rate(count: u64, over: Duration) -> String {
    let seconds = over.as_secs_f64();
    if seconds <= 0.0 {
        return "-".to_owned();
    }
    format!("{:.1} MiB/s", mebibytes(count) / seconds)
}

#[allow(clippy::cast_precision_loss, reason = "a rate for people")]
fn mebibytes(count: u64) -> f64 {
    count as f64 / f64::from(1 << 20)
}

pub(crate) fn time(duration: Duration) -> String {
    if duration >= Duration::from_mins(1) {
        HumanDuration(duration).to_string()
    } else if duration >= Duration::from_secs(1) {
        format!("{:.1} s", duration.as_secs_f64())
    } else if duration >= Duration::from_micros(100) {
        format!("{:.1} ms", duration.as_secs_f64() * 1e3)
    } else {
        // 0.0 ms would say that there is none.
        format!("{} us", duration.as_micros())
    }
}

pub(crate) fn or_dash(text: Option<String>) -> String {
    text.filter(|text| !text.is_empty()).unwrap_or_else(|| "-".to_owned())
}

/// A duration of the contract. One that is negative is none.
pub(crate) fn span(wire: Option<&prost_types::Duration>) -> Option<Duration> {
    wire.and_then(|wire| Duration::try_from(*wire).ok())
}

pub(crate) fn micros(wire: Option<&prost_types::Duration>) -> Option<u64> {
    span(wire).and_then(|span| u64::try_from(span.as_micros()).ok())
}

pub(crate) fn moment(wire: Option<&prost_types::Timestamp>) -> Option<String> {
    let time = SystemTime::try_from(*wire?).ok()?;
    // The formatter knows the years 1970 to 9999 and panics at others.
    let seconds = time.duration_since(SystemTime::UNIX_EPOCH).ok()?.as_secs();
    (seconds < 253_402_300_800).then(|| humantime::format_rfc3339_millis(time).to_string())
}

/// A moment for tables: no fractions of seconds.
fn seconds(moment: Option<&String>) -> String {
    moment.map_or_else(String::new, |text| match text.split_once('.') {
        Some((seconds, _)) => format!("{seconds}Z"),
        None => text.clone(),
    })
}

/// A value of an enum for tables: what is not said is nothing.
fn said(name: &'static str) -> String {
    if name == "UNSPECIFIED" { String::new() } else { name.to_owned() }
}

fn yes(is: bool) -> String {
    if is { "yes" } else { "no" }.to_owned()
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String does not fail.
        let _infallible = write!(text, "{byte:02x}");
        text
    })
}

/// The name of an enum value without the name of its enum.
pub(crate) fn short(name: &'static str, prefix: &str) -> &'static str {
    name.strip_prefix(prefix).unwrap_or(name)
}

pub(crate) fn phase(phase: v1::OperationPhase) -> &'static str {
    short(phase.as_str_name(), "OPERATION_PHASE_")
}

fn size(size: Option<&v1::DataSize>) -> String {
    let Some(size) = size else { return "-".to_owned() };
    match size.kind() {
        v1::DataSizeKind::Known => bytes(size.bytes),
        v1::DataSizeKind::UpperBound => format!("<= {}", bytes(size.bytes)),
        v1::DataSizeKind::Unknown | v1::DataSizeKind::Unspecified => "-".to_owned(),
    }
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct SizeDoc {
    kind: &'static str,
    bytes: u64,
}

impl SizeDoc {
    pub(crate) fn new(size: &v1::DataSize) -> Self {
        Self { kind: short(size.kind().as_str_name(), "DATA_SIZE_KIND_"), bytes: size.bytes }
    }

    /// Nothing where it is not known.
    pub(crate) fn text(&self) -> String {
        match self.kind {
            "KNOWN" => bytes(self.bytes),
            "UPPER_BOUND" => format!("<= {}", bytes(self.bytes)),
            _ => String::new(),
        }
    }
}

/// One reason why a job cannot work.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct BlockerDoc {
    reason: Cow<'static, str>,
    device: String,
    message: String,
}

impl BlockerDoc {
    pub(crate) fn new(blocker: &v1::Blocker) -> Self {
        let reason = short(blocker.reason().as_str_name(), "BLOCKER_REASON_");
        Self { reason: reason.into(), device: blocker.device.clone(), message: blocker.message.clone() }
    }

    /// What this program finds in the way.
    pub(crate) fn own(reason: &'static str, message: String) -> Self {
        Self { reason: reason.into(), device: String::new(), message }
    }

    /// As the details of a status say it.
    pub(crate) fn of_violation(violation: &Violation) -> Self {
        let kind = &violation.kind;
        Self {
            reason: kind.strip_prefix("BLOCKER_REASON_").unwrap_or(kind).to_owned().into(),
            device: violation.subject.clone(),
            message: violation.description.clone(),
        }
    }

    pub(crate) fn reason(&self) -> &str {
        &self.reason
    }

    pub(crate) fn device(&self) -> &str {
        &self.device
    }

    pub(crate) fn line(&self) -> String {
        let about =
            if self.device.is_empty() { String::new() } else { format!(" {}", printable(&self.device)) };
        format!("  {}{about}: {}\n", printable(&self.reason), printable(&self.message))
    }
}

#[cfg(test)]
mod tests;
