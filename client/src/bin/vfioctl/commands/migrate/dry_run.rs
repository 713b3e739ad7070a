//! `vfioctl migrate --dry-run`: what is in the way on each side, and what is expected.
//!
//! Invariants: nothing is touched, and no ticket is asked for. Failure paths: a destination that cannot be reached, from the
//! source or from here, is in the way like all else; only a source that does not answer is a failure.

use std::time::Duration;

use serde::Serialize;
use vfio_checkpoint_client::call::{Client, printable};
use vfio_checkpoint_proto::v1;

use super::destination::Destination;
use crate::cli::{Global, OutputFormat};
use crate::outcome::{Exit, Failure};
use crate::render::{self, BlockerDoc, SizeDoc};

pub(super) async fn run(
    client: &Client,
    request: v1::MigrateRequest,
    destination: &Destination,
    global: &Global,
) -> Result<Exit, Failure> {
    let question = v1::MigrateRequest { validate_only: true, request_id: String::new(), ..request };
    let asked = client.migrate(question);
    let (answer, reached) = tokio::join!(asked, destination.settings.connect(global));
    let answer = answer.map_err(Failure::call)?;
    let unreached = match reached {
        Ok(_) => None,
        Err(failure) if failure.exit == Exit::Unreachable => Some(failure),
        Err(failure) => return Err(failure),
    };
    let found = DryRun::new(&answer, unreached.as_ref());
    print(&found, global.output_format)
}

fn print(found: &DryRun, format: OutputFormat) -> Result<Exit, Failure> {
    render::print(format, |_| found.table(), found)?;
    Ok(if found.blockers.is_empty() { Exit::Done } else { Exit::Refused })
}

#[derive(Debug, Serialize)]
struct DryRun {
    blockers: Vec<SideBlocker>,
    pre_copy: Option<bool>,
    total: Option<SizeDoc>,
    predicted_downtime_us: Option<u64>,
    /// As if nothing were read before the devices stop.
    downtime_at_most_us: Option<u64>,
    rate_bytes_per_second: Option<u64>,
    rate_source: Option<String>,
    round_trip_us: Option<u64>,
    /// Of the stream's protocol.
    version: Option<u32>,
}

#[derive(Debug, Serialize)]
struct SideBlocker {
    side: &'static str,
    #[serde(flatten)]
    blocker: BlockerDoc,
}

impl SideBlocker {
    fn new(found: &v1::MigrationBlocker) -> Self {
        let side = render::short(found.side().as_str_name(), "MIGRATION_SIDE_");
        Self { side, blocker: BlockerDoc::new(&found.blocker.clone().unwrap_or_default()) }
    }

    fn line(&self) -> String {
        let side = match self.side {
            "SOURCE" => "source",
            "DESTINATION" => "destination",
            "CALLER" => "here",
            _ => "-",
        };
        format!("  {side:11}  {}", self.blocker.line().trim_start())
    }
}

impl DryRun {
    fn new(answer: &v1::MigrateResponse, unreached: Option<&Failure>) -> Self {
        let mut blockers: Vec<SideBlocker> = answer.blockers.iter().map(SideBlocker::new).collect();
        if let Some(failure) = unreached {
            let (what, _) = failure.advice();
            let message =
                format!("the ticket comes from the destination, and this machine does not reach it: {what}");
            let blocker = BlockerDoc::own("DESTINATION_UNREACHABLE", message);
            blockers.push(SideBlocker { side: "CALLER", blocker });
        }
        let known = answer.prediction.as_ref();
        Self {
            blockers,
            pre_copy: known.map(|known| known.pre_copy),
            total: known.and_then(|known| known.total.as_ref()).map(SizeDoc::new),
            predicted_downtime_us: known.and_then(|known| render::micros(known.downtime.as_ref())),
            downtime_at_most_us: known.and_then(|known| render::micros(known.downtime_at_most.as_ref())),
            rate_bytes_per_second: known.map(|known| known.rate_bytes_per_second).filter(|rate| *rate > 0),
            rate_source: known.map(|known| known.rate_source.clone()).filter(|source| !source.is_empty()),
            round_trip_us: known.and_then(|known| render::micros(known.round_trip.as_ref())),
            version: known.map(|known| known.version).filter(|version| *version > 0),
        }
    }

    fn table(&self) -> String {
        let time = |us: Option<u64>| us.map(|us| render::time(Duration::from_micros(us)));
        let mut text = if self.blockers.is_empty() {
            "nothing is in the way\n".to_owned()
        } else {
            let lines = self.blockers.iter().map(SideBlocker::line);
            std::iter::once("this is in the way:\n".to_owned()).chain(lines).collect()
        };
        let at_most = time(self.downtime_at_most_us);
        let downtime = match (time(self.predicted_downtime_us), at_most, self.pre_copy) {
            (Some(downtime), _, _) => format!("{downtime} expected"),
            (None, Some(at_most), Some(true)) => {
                format!("as pre-copy brings it down to, from {at_most} at most")
            }
            (None, None, Some(true)) => "as pre-copy brings it down to; not known before".to_owned(),
            (None, _, Some(false) | None) => "not known before".to_owned(),
        };
        let rate = self.rate_bytes_per_second.map(|bytes| {
            let rate = render::rate(bytes, Duration::from_secs(1));
            match &self.rate_source {
                Some(source) => format!("{rate}, {}", printable(source)),
                None => rate,
            }
        });
        for (head, cell) in [
            ("state", self.total.as_ref().map(SizeDoc::text)),
            ("downtime", Some(downtime)),
            ("rate", rate),
            ("round trip", time(self.round_trip_us)),
            ("version", self.version.map(|version| version.to_string())),
        ] {
            text.extend([format!("{head:10}  {}\n", render::or_dash(cell))]);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocker(side: v1::MigrationSide, reason: v1::BlockerReason, device: &str) -> v1::MigrationBlocker {
        let message = "what is in the way\u{1b}[2J".to_owned();
        let blocker = v1::Blocker { reason: reason.into(), device: device.to_owned(), message };
        v1::MigrationBlocker { side: side.into(), blocker: Some(blocker) }
    }

    fn answer(blockers: Vec<v1::MigrationBlocker>) -> v1::MigrateResponse {
        let prediction = v1::MigrationPrediction {
            pre_copy: false,
            total: Some(v1::DataSize { kind: v1::DataSizeKind::UpperBound.into(), bytes: 100 << 20 }),
            downtime: Some(prost_types::Duration { seconds: 0, nanos: 98_000_000 }),
            rate_bytes_per_second: 1 << 30,
            rate_source: "measured".to_owned(),
            round_trip: Some(prost_types::Duration { seconds: 0, nanos: 400_000 }),
            version: 1,
            downtime_at_most: Some(prost_types::Duration { seconds: 0, nanos: 98_000_000 }),
        };
        v1::MigrateResponse { operation: None, blockers, prediction: Some(prediction) }
    }

    #[test]
    fn a_dry_run_for_people_and_for_programs() {
        let here =
            Failure::with_advice(Exit::Unreachable, "127.0.0.1:1 refuses the connection; see that it runs");
        let blocked = answer(vec![
            blocker(v1::MigrationSide::Source, v1::BlockerReason::Leased, "devices/a"),
            blocker(v1::MigrationSide::Destination, v1::BlockerReason::StaleEpoch, ""),
            blocker(v1::MigrationSide::Unspecified, v1::BlockerReason::Unspecified, ""),
        ]);
        let blocked = DryRun::new(&blocked, Some(&here));
        let free = DryRun::new(&answer(Vec::new()), None);
        let unknown = v1::MigrationPrediction { pre_copy: true, ..Default::default() };
        let unknown = v1::MigrateResponse { prediction: Some(unknown), ..Default::default() };
        let unknown = DryRun::new(&unknown, None);
        let mut live = answer(Vec::new());
        if let Some(prediction) = &mut live.prediction {
            (prediction.pre_copy, prediction.downtime) = (true, None);
        }
        let live = DryRun::new(&live, None);
        let (json, yaml) = (render::json(&blocked).unwrap(), render::yaml(&blocked).unwrap());
        let tables = [blocked.table(), free.table(), unknown.table(), live.table()].join("\n");
        insta::assert_snapshot!(format!("{tables}\n{json}\n{yaml}"));
    }
}
