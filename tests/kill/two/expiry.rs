//! The certificate of the source ends in mid-stream, or while it waits for an answer.
//!
//! ```text
//!   source ==state==> | expired | cut off by the destination     undone: stays, and the source runs on at once
//!   source --commit-> | expired | refused as nobody              in doubt, until another certificate is loaded: moves
//! ```
//! The certificates are valid for a few seconds, and the clocks are those of the machine.

use std::time::{Duration, SystemTime};

use rustls_pki_types::UnixTime;
use serde_json::Value;
use vfio_checkpoint_server::security::lab::Validity;

use super::settle::After;
use super::{Move, Pair};
use crate::figure;

/// Its files are looked at so often.
const LOOK: [&str; 1] = ["tls.reload_interval = \"100ms\""];
/// From its start to the point at which it is to expire an agent needs less, also on a machine under load.
const SHORT: Duration = Duration::from_secs(6);
const LONG: Duration = Duration::from_hours(1);

/// Waits for what an agent logs.
fn logs(message: &str) -> impl FnMut(&str) -> Option<()> {
    move |line| {
        let line: Value = serde_json::from_str(line).ok()?;
        line["fields"]["message"].as_str()?.contains(message).then_some(())
    }
}

impl Pair {
    /// Gives the agent at home another certificate, and waits until it is in force.
    async fn certify(&mut self, lasting: Duration) {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        let validity = Validity::starting(UnixTime::since_unix_epoch(now), lasting);
        let node = &mut self.nodes[self.home];
        node.certify(validity);
        node.agent().wait_for("that it has another certificate", logs("certificates reloaded")).await;
    }

    /// Stops a migration at a point of one side, until the certificate of its source has expired and the destination has
    /// cut off who bears it.
    async fn expired_at(&mut self, job: &Move, is_here: bool, point: &str) {
        let (home, away) = (self.home, self.away());
        self.certify(SHORT).await;
        let side = if is_here { home } else { away };
        self.nodes[side].arm(point, if point == "chunk" { 2 } else { 1 }).await;
        let driving = self.driven(job).await;
        self.nodes[side].stopped(point).await;
        driving.await.unwrap();
        self.nodes[home].agent().wait_for("that it has expired", logs("certificate has expired")).await;
        self.nodes[away].agent().wait_for("that it cuts it off", logs("connection ended")).await;
        self.nodes[side].release();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_whose_certificate_ends_in_mid_stream_runs_on() {
    let mut pair = Pair::configured(1, true, &LOOK).await;
    let job = Move::new(false);
    pair.expired_at(&job, false, "chunk").await;
    let home = pair.home;
    // Without waiting for anybody.
    pair.nodes[home]
        .agent()
        .wait_for("that it was undone", |line| (line == "at read back").then_some(()))
        .await;
    pair.certify(LONG).await;
    pair.settle(&job, After::Stays).await;
    pair.moves(&Move::new(false)).await;
    figure("1 certificate that ended in mid-stream: undone, and the source ran on");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_whose_certificate_ends_after_the_commit_is_in_doubt_until_it_has_another() {
    let mut pair = Pair::configured(1, true, &LOOK).await;
    let job = Move::new(false);
    pair.expired_at(&job, true, "commit is sent").await;
    let home = pair.home;
    for _ in 0..2 {
        let doubts = |line: &str| line.contains("the destination cannot be asked").then_some(());
        pair.nodes[home].agent().wait_for("that it is in doubt", doubts).await;
    }
    pair.certify(LONG).await;
    pair.settle(&job, After::Moves).await;
    pair.moves(&Move::new(false)).await;
    figure("1 certificate that ended after the commit: in doubt until there was another, then moved");
}
