//! How far a stream of state is: on a terminal only.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use vfio_checkpoint_proto::domain::Progress;

use crate::render;

/// How often it is drawn, at most.
const DRAWS_PER_SECOND: u8 = 8;
/// No colours, so that `NO_COLOR` has nothing to forbid.
const STYLE: &str =
    "{prefix:18} {bytes:>11} / {total_bytes:11} {binary_bytes_per_sec:>13}  ETA {eta:4} {msg}";

/// A line that says how far it is. It draws nothing where stderr is no terminal.
pub(crate) struct Meter {
    bar: ProgressBar,
}

impl Meter {
    pub(crate) fn new(total_bytes: Option<u64>) -> Self {
        let bar =
            ProgressBar::with_draw_target(total_bytes, ProgressDrawTarget::stderr_with_hz(DRAWS_PER_SECOND));
        if let Ok(style) = ProgressStyle::with_template(STYLE) {
            bar.set_style(style);
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

impl Drop for Meter {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
