//! What a migration came to.

use std::time::Duration;

use serde::Serialize;
use vfio_checkpoint_client::call::printable;
use vfio_checkpoint_proto::v1;

use crate::render::{self, HandoverDoc};

#[derive(Debug, Serialize)]
pub(super) struct Summary {
    operation: String,
    result: &'static str,
    outcome: &'static str,
    destination: String,
    moved_bytes: u64,
    pre_copy_bytes: u64,
    stop_bytes: u64,
    predicted_downtime_us: Option<u64>,
    downtime_us: Option<u64>,
    downtime_limit_us: Option<u64>,
    handover: Option<HandoverDoc>,
    devices: Vec<Moved>,
}

#[derive(Debug, Serialize)]
struct Moved {
    device: String,
    to: String,
    length_bytes: Option<u64>,
    blake3: Option<String>,
}

impl Summary {
    pub(super) fn new(done: &v1::Operation, target: &v1::MigrationTarget, limit: Option<Duration>) -> Self {
        let pre_copy_bytes =
            done.devices.iter().fold(0_u64, |bytes, device| bytes.saturating_add(device.pre_copy_bytes));
        let moved = |(device, to): (&v1::OperationDevice, &String)| Moved {
            device: device.device.clone(),
            to: to.clone(),
            length_bytes: device.seal.as_ref().map(|seal| seal.length_bytes),
            blake3: device.seal.as_ref().map(|seal| render::hex(&seal.blake3)),
        };
        Self {
            operation: done.name.clone(),
            result: render::short(done.result().as_str_name(), "OPERATION_RESULT_"),
            outcome: render::short(done.outcome().as_str_name(), "STATE_OUTCOME_"),
            destination: target.endpoint.clone(),
            moved_bytes: done.moved_bytes,
            pre_copy_bytes,
            stop_bytes: done.moved_bytes.saturating_sub(pre_copy_bytes),
            predicted_downtime_us: render::micros(done.predicted_downtime.as_ref()),
            downtime_us: render::micros(done.downtime.as_ref()),
            downtime_limit_us: limit.and_then(|limit| u64::try_from(limit.as_micros()).ok()),
            handover: done.handover.as_ref().map(HandoverDoc::new),
            devices: done.devices.iter().zip(&target.devices).map(moved).collect(),
        }
    }

    pub(super) fn table(&self) -> String {
        let time = |us: Option<u64>| render::or_dash(us.map(|us| render::time(Duration::from_micros(us))));
        let over = match (self.downtime_us, self.downtime_limit_us) {
            (Some(actual), Some(limit)) if actual > limit => {
                format!(", over the limit of {}", time(Some(limit)))
            }
            (_, Some(limit)) => format!(", within the limit of {}", time(Some(limit))),
            (_, None) => String::new(),
        };
        let devices: Vec<String> = self
            .devices
            .iter()
            .map(|moved| format!("{} -> {}", printable(&moved.device), printable(&moved.to)))
            .collect();
        let (resent, verdict) =
            self.handover.as_ref().map(|far| (far.resent(), far.verdict_in_words())).unzip();
        format!(
            "moved       {} to {}\n            {} while the devices ran, {} while they stood still\n\
             resent      {}\ndowntime    {} ({} predicted){over}\nverdict     {}\noperation   {}\n\
             devices     {}\n",
            render::bytes(self.moved_bytes),
            printable(&self.destination),
            render::bytes(self.pre_copy_bytes),
            render::bytes(self.stop_bytes),
            render::or_dash(resent),
            time(self.downtime_us),
            time(self.predicted_downtime_us),
            render::or_dash(verdict),
            printable(&self.operation),
            devices.join(", "),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_for_people_and_for_programs() {
        let device = |id: &str, pre_copy_bytes| v1::OperationDevice {
            device: format!("devices/{id}"),
            pre_copy_bytes,
            seal: Some(v1::Seal { length_bytes: 50 << 20, blake3: vec![0xab; 32].into() }),
            ..Default::default()
        };
        let done = v1::Operation {
            name: "operations/019aa7b4c10-5c0ffee15c0ffee1".to_owned(),
            result: v1::OperationResult::Succeeded.into(),
            outcome: v1::StateOutcome::Moved.into(),
            moved_bytes: 100 << 20,
            predicted_downtime: Some(prost_types::Duration { seconds: 0, nanos: 11_000_000 }),
            downtime: Some(prost_types::Duration { seconds: 0, nanos: 12_300_000 }),
            handover: Some(v1::Handover {
                peer: "https://node2:7443".to_owned(),
                peer_operation: "operations/019aa7b4c11-5c0ffee15c0ffee2".to_owned(),
                verdict: v1::HandoverVerdict::Committed.into(),
                resent_bytes: 3 << 20,
                reconnects: 2,
                ..Default::default()
            }),
            devices: vec![device("nic-a", 40 << 20), device("nic-b", 48 << 20)],
            ..Default::default()
        };
        let target = v1::MigrationTarget {
            endpoint: "https://node2:7443".to_owned(),
            spiffe_id: String::new(),
            devices: vec!["devices/x".to_owned(), "devices/y".to_owned()],
            ..Default::default()
        };
        let kept = Summary::new(&done, &target, Some(Duration::from_millis(300)));
        let broken = Summary::new(&done, &target, Some(Duration::from_millis(12)));
        let bare = Summary::new(&v1::Operation::default(), &v1::MigrationTarget::default(), None);
        let json = render::json(&kept).unwrap();
        insta::assert_snapshot!([kept.table(), broken.table(), bare.table(), json].join("\n"));
    }
}
