//! What the demo says: lines and a bar for people, one document for programs.

#![allow(clippy::print_stdout, reason = "what the demo shows goes to standard output")]

use std::io::{IsTerminal as _, Write as _};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use vfio_checkpoint_proto::v1;

use super::Failure;

/// What was seen.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) source: Place,
    pub(super) destination: Place,
    pub(super) save: Saved,
    /// The same device once more.
    pub(super) incremental: Saved,
    pub(super) restore: Restored,
    /// The other device, live.
    pub(super) migration: Migrated,
    /// Digest of all that the source's device held when it was stopped.
    pub(super) source_digest: String,
    /// Digest of all that the destination's device holds now that it runs.
    pub(super) destination_digest: String,
    /// All operations succeeded, and both devices hold on the destination what they held on the source.
    pub(super) verified: bool,
}

#[derive(Debug, Serialize)]
pub(super) struct Place {
    pub(super) agent: String,
    pub(super) device: String,
    pub(super) address: String,
}

#[derive(Debug, Serialize)]
pub(super) struct Saved {
    pub(super) operation: String,
    pub(super) checkpoint: String,
    pub(super) bytes: u64,
    /// Of these, while the device ran.
    pub(super) pre_copy_bytes: u64,
    /// What the store did not have yet, packed.
    pub(super) added_bytes: u64,
    pub(super) time_ms: f64,
    pub(super) predicted_downtime_ms: Option<f64>,
    pub(super) downtime_ms: Option<f64>,
    /// What the saved state hashes to.
    pub(super) blake3: String,
}

#[derive(Debug, Serialize)]
pub(super) struct Restored {
    pub(super) operation: String,
    pub(super) bytes: u64,
    pub(super) time_ms: f64,
}

#[derive(Debug, Serialize)]
pub(super) struct Migrated {
    pub(super) operation: String,
    /// The destination's operation.
    pub(super) arrival: String,
    pub(super) bytes: u64,
    /// Of these, while the device ran.
    pub(super) pre_copy_bytes: u64,
    pub(super) time_ms: f64,
    pub(super) predicted_downtime_ms: Option<f64>,
    pub(super) downtime_ms: Option<f64>,
    /// Digest of all that the device held at the source when it stood still there.
    pub(super) given_digest: String,
    /// Digest of all that it holds at the destination now that it runs.
    pub(super) taken_digest: String,
}

/// Who watches.
pub(super) struct Audience {
    json: bool,
}

impl Audience {
    pub(super) fn new(json: bool) -> Self {
        Self { json }
    }

    /// A step of the story.
    pub(super) fn step(&self, text: &str) {
        if !self.json {
            println!("\n{text}");
        }
    }

    /// Something about it.
    pub(super) fn line(&self, text: &str) {
        if !self.json {
            println!("  {text}");
        }
    }

    /// A bar for an operation, on a terminal; phases as lines elsewhere.
    pub(super) fn bar(&self) -> Bar<'_> {
        let bar = if !self.json && std::io::stderr().is_terminal() {
            let bar = ProgressBar::no_length();
            let template = "  {msg:<18} {wide_bar} {bytes:>11} {bytes_per_sec:>13}";
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style);
            }
            Some(bar)
        } else {
            None
        };
        Bar { audience: self, drawn: bar, phase: None }
    }

    /// The end.
    pub(super) fn conclude(&self, report: &Report) -> Result<(), Failure> {
        let mut out = std::io::stdout().lock();
        if self.json {
            serde_json::to_writer_pretty(&mut out, report)?;
            writeln!(out)?;
        } else if report.verified {
            writeln!(
                out,
                "\nverified: the devices on {} hold what those on {} held.",
                report.destination.agent, report.source.agent
            )?;
        } else {
            writeln!(out, "\nNOT verified: the devices differ.")?;
        }
        Ok(())
    }
}

/// How far an operation is.
pub(super) struct Bar<'a> {
    audience: &'a Audience,
    drawn: Option<ProgressBar>,
    phase: Option<v1::OperationPhase>,
}

impl Bar<'_> {
    pub(super) fn show(&mut self, operation: &v1::Operation) {
        let phase = operation.phase();
        let name =
            phase.as_str_name().trim_start_matches("OPERATION_PHASE_").to_lowercase().replace('_', " ");
        match &self.drawn {
            Some(bar) => {
                bar.set_message(name);
                if let Some(total) = operation.total.as_ref().filter(|total| total.bytes > 0) {
                    bar.set_length(total.bytes.max(operation.moved_bytes));
                }
                bar.set_position(operation.moved_bytes);
            }
            None if self.phase != Some(phase) => self.audience.line(&name),
            None => {}
        }
        self.phase = Some(phase);
    }
}

impl Drop for Bar<'_> {
    fn drop(&mut self) {
        if let Some(bar) = &self.drawn {
            bar.finish_and_clear();
        }
    }
}

/// Milliseconds with their fraction.
pub(super) fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

/// Bytes for people.
pub(super) fn bytes(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}
