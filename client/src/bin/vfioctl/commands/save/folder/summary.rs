//! What a save into a folder says of itself.

use std::path::Path;
use std::time::Duration;

use serde::Serialize;
use vfio_checkpoint_client::call::printable;
use vfio_checkpoint_client::document::Consistency;
use vfio_checkpoint_proto::v1;

use super::Taken;
use crate::render::{self, Column, Detail, usual, wide};

#[derive(Debug, Serialize)]
pub(super) struct Summary {
    operation: String,
    folder: String,
    result: &'static str,
    consistency: Consistency,
    moved_bytes: u64,
    time_us: u64,
    rate_bytes_per_second: u64,
    predicted_downtime_us: Option<u64>,
    downtime_us: Option<u64>,
    devices: Vec<SummaryDevice>,
}

#[derive(Debug, Serialize)]
struct SummaryDevice {
    device: String,
    file: String,
    length_bytes: u64,
    blake3: String,
}

impl Summary {
    pub(super) fn new(done: &v1::Operation, taken: &Taken, output: &Path, consistency: Consistency) -> Self {
        let micros = |span: Option<Duration>| span.and_then(|span| u64::try_from(span.as_micros()).ok());
        let time_us = micros(Some(taken.time)).unwrap_or(u64::MAX);
        let rate = u128::from(taken.moved_bytes) * 1_000_000 / u128::from(time_us.max(1));
        Self {
            operation: done.name.clone(),
            folder: output.display().to_string(),
            result: done.result().as_str_name().trim_start_matches("OPERATION_RESULT_"),
            consistency,
            moved_bytes: taken.moved_bytes,
            time_us,
            rate_bytes_per_second: u64::try_from(rate).unwrap_or(u64::MAX),
            predicted_downtime_us: micros(render::span(done.predicted_downtime.as_ref())),
            downtime_us: micros(render::span(done.downtime.as_ref())),
            devices: done
                .devices
                .iter()
                .zip(&taken.manifest.devices)
                .map(|(device, saved)| SummaryDevice {
                    device: device.device.clone(),
                    file: saved.file.clone(),
                    length_bytes: saved.length_bytes,
                    blake3: saved.blake3.clone(),
                })
                .collect(),
        }
    }

    pub(super) fn table(&self, detail: Detail) -> String {
        let downtime =
            |us: Option<u64>| render::or_dash(us.map(|us| render::time(Duration::from_micros(us))));
        let consistency = match self.consistency {
            Consistency::Consistent => "consistent",
            Consistency::Inconsistent => "INCONSISTENT",
        };
        let time = Duration::from_micros(self.time_us);
        let mut text = format!(
            "saved     {} in {} ({}), {consistency}\ndowntime  {} ({} predicted)\nfolder    {}\n",
            render::bytes(self.moved_bytes),
            render::time(time),
            render::rate(self.moved_bytes, time),
            downtime(self.downtime_us),
            downtime(self.predicted_downtime_us),
            self.folder,
        );
        text += &render::rows(detail, &COLUMNS, &self.devices);
        text
    }
}

const COLUMNS: [Column<SummaryDevice>; 4] = [
    usual("DEVICE", |device| printable(&device.device)),
    usual("FILE", |device| device.file.clone()),
    usual("SIZE", |device| render::bytes(device.length_bytes)),
    wide("BLAKE3", |device| device.blake3.clone()),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_for_people_and_for_programs() {
        let summary = Summary {
            operation: "operations/1".to_owned(),
            folder: "/backup/1".to_owned(),
            result: "SUCCEEDED",
            consistency: Consistency::Consistent,
            moved_bytes: 3 << 20,
            time_us: 1_500_000,
            rate_bytes_per_second: 2 << 20,
            predicted_downtime_us: Some(11_000),
            downtime_us: Some(12_300),
            devices: vec![SummaryDevice {
                device: "devices/nic-a".to_owned(),
                file: "device-0.state".to_owned(),
                length_bytes: 3 << 20,
                blake3: "ab".repeat(32),
            }],
        };
        let json = serde_json::to_string_pretty(&summary).unwrap();
        insta::assert_snapshot!(format!("{}{json}", summary.table(Detail::Wide)));
    }
}
