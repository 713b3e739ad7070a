//! `vfioctl` as a person and as a script see it: the program itself, against `vfio-checkpointd serve` in a process of its own.
//!
//! ```text
//!   node.rs      the agent with its configuration file, its devices and stores; a shell beside it
//!   said.rs      what a command said: exit code, stdout, stderr
//!   devices.rs   devices, dirty tracking, what stdout gets and what stderr
//!   folder.rs    save and restore with a folder
//!   stores.rs    save and restore with a store; checkpoints; operations
//!   settings.rs  contexts, certificates, doctor
//!   restart.rs   an agent that goes away and comes back, as the same or as another
//! ```
//! Every command runs without a terminal, with an empty environment but for what the test gives it. Nothing sleeps: a test
//! waits for a line, for an answer or for an end.

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test: the helpers outside #[test] functions assert by panicking, too"
)]

mod devices;
mod folder;
#[path = "../agent/lab.rs"]
#[allow(dead_code, reason = "shared with the tests of agents in this process")]
mod lab;
mod migrate;
mod node;
#[path = "../kill/process.rs"]
#[allow(dead_code, reason = "shared with the tests that kill agents")]
mod process;
mod restart;
mod said;
mod settings;
mod stores;
