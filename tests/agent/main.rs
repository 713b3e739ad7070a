//! Agents as their callers see them: every call over TLS, in this process and in processes of their own.

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test: the helpers outside #[test] functions assert by panicking, too"
)]
#![allow(
    clippy::similar_names,
    reason = "a saver saves what is saved, and a restorer restores what is restored"
)]

mod arrivals;
mod audited;
mod blockers;
mod bodies;
mod broken;
mod devices;
mod dirty;
mod discarded;
mod doubt;
mod each_error;
mod ending;
#[allow(dead_code, reason = "shared with the tests that kill agents")]
mod faulty;
mod flow;
mod full;
mod full_journal;
mod handed_over;
mod idempotency;
mod journal;
mod lab;
mod late;
mod limits;
mod listing;
mod logged;
mod migrations;
mod operations;
mod owed;
mod pair;
mod peers;
mod ready;
mod reasons;
mod relay;
mod restores;
mod resumed;
mod roles;
mod rude;
mod save_restore;
mod saves;
mod stale;
mod stopped;
mod stored;
mod streams;
mod told;
mod twin;
mod unrecorded;
mod unshared;
