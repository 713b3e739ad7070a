//! The agent is killed with SIGKILL at every step, with its holder and without.
//!
//! ```text
//!   process.rs   a process that ends with its value, and what it says
//!   children.rs  this program as an agent or a holder
//!   world.rs     device processes, the holder, the agent; a client; states that can be told apart
//!   job.rs       an operation from its first call to its end, as a caller drives it
//!   steps.rs     the steps of every job, each with what must be found after a kill there
//!   every.rs     every job x every step x with and without the holder
//!   recovery.rs  the agent is killed once more, while it recovers
//!   losses.rs    the holder, a device process or the time is lost as well
//!   failing.rs   devices that fail on their way to RUNNING
//!   resets.rs    the agent is killed while it resets a device
//!   stored.rs    saves into the agent's store and restores out of it: no half checkpoint, nothing left behind
//!   here.rs      the next agent is in this process, and not all that it works with works
//!   programs.rs  the programs themselves
//!   two/         two nodes, and devices that move from the one to the other
//! ```
//! Agent and holder are this very test program in processes of their own, so that they are built as the test is, with the
//! fail points of the feature `failpoints`; `programs.rs` runs the real ones. The steps of a job are not only listed: a
//! job is run to its end first, and what it passes must be the list.
//!
//! The feature is turned on by the dev-dependency of this package alone, so `cargo test` of the workspace runs this without
//! a second build of the server, and no build of a program has it; a test in `workspace` sees to that.
//!
//! Nothing sleeps: a test waits for a line that a process says, or for an answer.

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test: the helpers outside #[test] functions assert by panicking, too, and say where they were"
)]

mod children;
mod every;
mod failing;
#[path = "../agent/faulty.rs"]
#[allow(dead_code, reason = "shared with the tests of agents in this process")]
mod faulty;
mod here;
mod job;
#[path = "../agent/lab.rs"]
#[allow(dead_code, reason = "shared with the tests of agents in this process")]
mod lab;
mod losses;
mod process;
mod programs;
mod recovery;
mod resets;
mod steps;
mod stored;
mod two;
#[path = "../agent/unshared.rs"]
mod unshared;
mod world;

use std::io::Write as _;

/// Says a figure past the test harness, which keeps what a passing test prints.
fn figure(line: &str) {
    let _ = writeln!(std::io::stdout().lock(), "\nfigures: kill: {line}");
}
