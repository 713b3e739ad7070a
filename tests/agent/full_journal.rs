//! Migrations while the disk of one side's journal is really full.
//!
//! ```text
//!   prepared --> the disk is filled --> Commit --> what can be recorded is done, what cannot is not --> room again: over
//! ```
//! Whether a commit of the journal still fits is the file's own affair, so what comes of each migration is read from the
//! devices; that some did not fit is asserted of all of them together.

use std::env;

use vfio_checkpoint_fsm::State;
use vfio_checkpoint_proto::v1;

use crate::flow::{done, soon};
use crate::full::{DISK, Disk, on_a_disk};
use crate::migrations::{manual, prepared};
use crate::pair::{Pair, small};

#[test]
fn a_migration_with_a_full_disk_moves_or_stays() {
    on_a_disk("full_journal::with_a_disk_of_its_own");
}

/// Run by the other test, in a process of its own; by itself it has nothing to do.
#[tokio::test(flavor = "multi_thread")]
async fn with_a_disk_of_its_own() {
    let Some(at) = env::var_os(DISK) else { return };
    let disk = Disk(at.into());
    let (mut failed, mut moved, mut rounds) = (0, 0, 0);
    for (side, round) in
        ["source", "destination"].into_iter().flat_map(|side| [(side, 0), (side, 1), (side, 2)])
    {
        let state = disk.0.join(format!("{side}-{round}"));
        let pair = Pair::with(1, small, &[], &[], |config| {
            // Its folder is called as its agent.
            if config.node.state_dir.iter().any(|part| part == side) {
                config.node.state_dir.clone_from(&state);
            }
        })
        .await;
        let before = pair.digests();
        let (source, destination) = pair.migrator().await;
        let name = pair.start(manual).await;
        let arrival = prepared(&source, &name).await.handover.unwrap().peer_operation;
        let full = if side == "source" { &pair.source } else { &pair.destination };
        let mut failing = full.core().journal.failing();
        disk.fill();
        // Where it cannot be recorded that it was said, it was not.
        let said = source.commit(v1::CommitRequest { operation: name.clone() }).await;
        let over = async {
            if said.is_ok() {
                done(&source, &name).await;
                done(&destination, &arrival).await;
            }
        };
        tokio::select! {
            () = over => {}
            fails = failing.wait_for(|fails| *fails) => failed += u32::from(fails.is_ok()),
        }
        let runs = |bench: &&crate::flow::Bench| {
            bench.device.state().is_running() && bench.device.digest() == before.0[0]
        };
        let running = || pair.here.iter().chain(&pair.there).filter(runs).count();
        assert!(running() < 2, "{side}: two copies run while the disk is full");
        disk.free();
        if said.is_err() {
            // It was not taken, and may be said again.
            source.commit(v1::CommitRequest { operation: name.clone() }).await.unwrap();
        }
        let ended = soon(done(&source, &name)).await;
        soon(done(&destination, &arrival)).await;
        let is_moved = ended.outcome() == v1::StateOutcome::Moved;
        let now = pair.digests();
        assert_eq!(is_moved, now.1 == before.0, "{side}: {ended:?}");
        assert_eq!(!is_moved, now.0 == before.0, "{side}: {ended:?}");
        assert!(is_moved || ended.outcome() == v1::StateOutcome::Preserved, "{side}: {ended:?}");
        assert!(pair.here.iter().chain(&pair.there).all(|bench| bench.device.state() == State::Running));
        moved += u32::from(is_moved);
        rounds += 1;
        pair.stop().await;
        std::fs::remove_dir_all(&state).unwrap();
    }
    println!(
        "figures: agent: {rounds} migrations with a full disk: {moved} moved, the others stayed; in {failed} the journal failed"
    );
    assert!(failed > 0, "no journal found its disk full");
}
