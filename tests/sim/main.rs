//! Real agents in a simulated world: the network, the clock, disks and devices are simulated, and everything else is what
//! runs on a node. A seed is a run: what goes wrong, and when, is drawn from it, and the same seed gives the same run.
//!
//! ```text
//!   SEEDS=n cargo test -p vfio-checkpoint-tests --test sim      so many seeds; 600 transfers and 300 migrations otherwise
//!   SEED=k  cargo test -p vfio-checkpoint-tests --test sim -- --nocapture one_seed        that transfer, with its log
//!   SEED=k  cargo test -p vfio-checkpoint-tests --test sim -- --nocapture one_migration   that migration, with its log
//! ```
//! Read in this order: `transfer` and `migrate` with `ends` (what happens), `world` (how it is run), `oracle` (what must hold), then what stands in for
//! the machine: `executor`, `network`, `disk`, `hardware`.
//!
//! # Invariants
//! - The same seed gives the same log, byte for byte, also in another process with other keys. tokio's `select!` and hash maps
//!   draw from the machine, so whatever an agent waits for in a `select!` is `biased`. Tasks are numbered over the whole
//!   process, and a runtime that ends drops them by their numbers, so what a dying host sends has one latency.
//!
//! # Limits
//! - Stores are not simulated. A host that loses power says goodbye to its connections, as turmoil has it.

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test: the helpers outside #[test] functions assert by panicking, too"
)]
#![allow(clippy::print_stdout, reason = "a log is for whoever asked for it")]

mod caller;
mod dice;
mod disk;
mod ends;
mod executor;
mod faults;
mod hardware;
mod log;
mod migrate;
mod network;
mod oracle;
mod pki;
mod seeds;
mod transfer;
mod world;
