//! How far a stream of state is: on a terminal only.

use std::fmt::Write;
use std::time::Duration;

use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use vfio_checkpoint_proto::domain::Progress;
use vfio_checkpoint_proto::v1::{DataSizeKind, Operation};

use crate::render;

/// How often it is drawn, at most.
const DRAWS_PER_SECOND: u8 = 8;
/// No colours, so that `NO_COLOR` has nothing to forbid.
/// The message is cut where the terminal ends: a line that is wrapped cannot be drawn over.
const STYLE: &str = "{prefix:10} {bytes:>10} / {total:10} {rate:>14}  ETA {left:3} {wide_msg}";

/// A line that says how far it is. It draws nothing where stderr is no terminal.
pub(crate) struct Meter {
    bar: ProgressBar,
}

impl Meter {
    pub(crate) fn new(total_bytes: Option<u64>) -> Self {
        let bar =
            ProgressBar::with_draw_target(total_bytes, ProgressDrawTarget::stderr_with_hz(DRAWS_PER_SECOND));
        if let Ok(style) = ProgressStyle::with_template(STYLE) {
            bar.set_style(style.with_key("total", total).with_key("rate", rate).with_key("left", left));
        }
        Self { bar }
    }

    pub(crate) fn moved(&self, bytes: usize) {
        self.bar.inc(bytes as u64);
    }

    pub(crate) fn heard(&self, progress: &Progress) {
        self.bar.set_prefix(render::phase(progress.phase));
        // What is left changes while devices run; what was moved does not.
        self.bar.set_length(self.bar.position().saturating_add(progress.left_bytes));
        if let Some(downtime) = progress.predicted_downtime {
            self.bar.set_message(format!("downtime about {}", render::time(downtime)));
        }
    }

    /// As an operation is now, whose state goes past this program.
    pub(crate) fn follow(&self, operation: &Operation) {
        self.bar.set_prefix(render::phase(operation.phase()));
        self.reach(operation.moved_bytes);
        match operation.total.as_ref().map(|total| (total.kind(), total.bytes)) {
            Some((DataSizeKind::Known | DataSizeKind::UpperBound, bytes)) => self.bar.set_length(bytes),
            Some((DataSizeKind::Unknown | DataSizeKind::Unspecified, _)) | None => self.bar.unset_length(),
        }
        if operation.handover.as_ref().is_some_and(|handover| handover.in_doubt) {
            self.bar.set_message("IN DOUBT: waits for the destination's answer");
        } else if let Some(downtime) = render::span(operation.predicted_downtime.as_ref()) {
            self.bar.set_message(format!("downtime about {}", render::time(downtime)));
        }
    }

    /// So many bytes in all.
    pub(crate) fn reach(&self, bytes: u64) {
        self.bar.set_position(bytes);
    }

    pub(crate) fn expect(&self, total_bytes: u64) {
        self.bar.set_length(total_bytes);
    }

    /// Whether anybody sees it.
    pub(crate) fn is_seen(&self) -> bool {
        !self.bar.is_hidden()
    }

    pub(crate) fn phase(&self, phase: &'static str) {
        self.bar.set_prefix(phase);
    }

    /// Says something without tearing the line.
    pub(crate) fn say(&self, text: &str) {
        self.bar.suspend(|| render::say(text));
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.bar.elapsed()
    }

    pub(crate) fn moved_bytes(&self) -> u64 {
        self.bar.position()
    }
}

/// What is not known is a dash, and not nothing.
fn total(state: &ProgressState, out: &mut dyn Write) {
    let text = state.len().filter(|total| *total > 0).map(render::bytes);
    // A line that cannot be drawn is drawn again soon.
    let _undrawn = out.write_str(&render::or_dash(text));
}

fn rate(state: &ProgressState, out: &mut dyn Write) {
    let is_known = state.per_sec() >= 1.0;
    let _undrawn = if is_known {
        write!(out, "{:.1} MiB/s", state.per_sec() / f64::from(1 << 20))
    } else {
        out.write_str("-")
    };
}

fn left(state: &ProgressState, out: &mut dyn Write) {
    let is_known = state.per_sec() >= 1.0 && state.len().is_some_and(|total| total > 0);
    let _undrawn =
        if is_known { write!(out, "{:#}", HumanDuration(state.eta())) } else { out.write_str("-") };
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
