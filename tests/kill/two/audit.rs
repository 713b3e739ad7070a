//! Who decided what at a destination, and how that ended, whose source is killed before it hears so.

use serde_json::Value;

use super::settle::After;
use super::{Move, NAMES, Pair};
use crate::figure;

/// Waits for the line of how a call of this agent ended well.
fn succeeded(what: &'static str, agent: &str) -> impl FnMut(&str) -> Option<()> {
    let who = format!("spiffe://lab.test/agent/{agent}");
    move |line| {
        let line: Value = serde_json::from_str(line).ok()?;
        let fields = &line["fields"];
        let is_it = fields["message"] == "audit" && fields["what"] == what && fields["who"] == who.as_str();
        (is_it && fields["result"] == "succeeded").then_some(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_decided_has_its_line_also_where_nobody_hears_of_it() {
    let mut pair = Pair::new(1, true).await;
    let (home, away) = (pair.home, pair.away());
    let job = Move::new(false);
    pair.nodes[away].arm("after commit of RUNNING", 1).await;
    let driving = pair.driven(&job).await;
    pair.nodes[away].stopped("after commit of RUNNING").await;
    pair.kill(home);
    driving.await.unwrap();
    pair.nodes[away].release();
    let source = NAMES[home];
    let committed = succeeded("CommitHandover", source);
    pair.nodes[away].agent().wait_for("the line of CommitHandover", committed).await;
    pair.start(home).await;
    pair.settle(&job, After::Moves).await;
    let settled = succeeded("GetHandover settled", source);
    pair.nodes[away].agent().wait_for("the line of its source's farewell", settled).await;
    figure("1 source killed before it heard COMMITTED: the audit log of its destination has it");
}

/// A source that is killed between its end and its farewell says that in its next life. Otherwise the destination would keep
/// the arrival for good.
#[tokio::test(flavor = "multi_thread")]
async fn a_farewell_that_was_not_said_is_said_by_the_next_life_of_the_source() {
    let mut pair = Pair::new(1, true).await;
    let (home, away) = (pair.home, pair.away());
    let job = Move::new(false);
    pair.nodes[home].arm("after commit of ENDED", 1).await;
    let driving = pair.driven(&job).await;
    pair.nodes[home].stopped("after commit of ENDED").await;
    pair.kill(home);
    driving.await.unwrap();
    pair.start(home).await;
    pair.settle(&job, After::Moves).await;
    let settled = succeeded("GetHandover settled", NAMES[home]);
    pair.nodes[away].agent().wait_for("the line of its source's farewell", settled).await;
    figure("1 source killed before its farewell: its next life has said it");
}
