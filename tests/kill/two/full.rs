//! The journal of one side takes nothing more, at each step that is put on record: what is not on record is not done.
//!
//! ```text
//!   source       ADMITTED, BEGUN        not begun: stays       COMMITTING  undone: stays
//!                LETTING_GO             goes on: what is not on record here is on record at the destination
//!                ENDED                  told once it is on record
//!   destination  ADMITTED, BEGUN, HELD, RUNNING  refused: stays
//!                ENDED                  runs, and says so once that is on record
//! ```

use super::settle::After;
use super::{Move, Pair};
use crate::figure;

/// A migration in which the journal of one side fails from one step on, until that has failed and all that could be done
/// without it is done.
async fn without_room(pair: &mut Pair, is_here: bool, step: &str, after: After) {
    let side = if is_here { pair.home } else { pair.away() };
    let job = Move::new(false);
    pair.nodes[side].fail(step).await;
    let driving = pair.driven(&job).await;
    pair.nodes[side].failed(step).await;
    if step == "ENDED" {
        // Tried again and again, and nothing is told before.
        pair.nodes[side].failed(step).await;
    } else {
        driving.await.unwrap();
        pair.until_over(&job).await;
    }
    pair.nodes[side].mend().await;
    pair.settle(&job, after).await;
    pair.moves(&Move::new(false)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_journal_does_not_take_is_not_done() {
    let mut pair = Pair::new(1, true).await;
    let steps = [
        (true, "ADMITTED", After::Never),
        (true, "BEGUN", After::Stays),
        (true, "COMMITTING", After::Stays),
        (true, "LETTING_GO", After::Moves),
        (true, "ENDED", After::Moves),
        (false, "ADMITTED", After::Stays),
        (false, "BEGUN", After::Stays),
        (false, "HELD", After::Stays),
        (false, "RUNNING", After::Stays),
        (false, "ENDED", After::Moves),
    ];
    for (is_here, step, after) in steps {
        eprintln!("no room at the {} for {step}: {after:?}", if is_here { "source" } else { "destination" });
        without_room(&mut pair, is_here, step, after).await;
    }
    // The devices are let go of without it being on record, which a later life finds.
    let (home, job) = (pair.home, Move::new(false));
    pair.nodes[home].fail("LETTING_GO").await;
    pair.nodes[home].arm("save: HandedOver", 1).await;
    pair.driven(&job).await.await.unwrap();
    pair.nodes[home].stopped("save: HandedOver").await;
    pair.kill(home);
    pair.start(home).await;
    pair.settle(&job, After::Moves).await;
    pair.moves(&Move::new(false)).await;
    figure(&format!("{} journals that took nothing more in a migration: nothing doubled", steps.len()));
}
