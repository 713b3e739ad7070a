//! Operations.

use std::time::Duration;

use serde::Serialize;
use vfio_checkpoint_client::call::printable;
use vfio_checkpoint_proto::v1;

use super::{
    Column, Detail, HandoverDoc, SizeDoc, bytes, hex, in_doubt, micros, moment, phase, rows, said, seconds,
    short, time, usual, wide, yes,
};
use crate::values::short_checkpoint;

/// An operation.
#[derive(Debug, Serialize)]
pub(crate) struct OperationDoc {
    name: String,
    kind: &'static str,
    phase: &'static str,
    done: bool,
    result: &'static str,
    outcome: &'static str,
    consistency: &'static str,
    checkpoint: String,
    failure: Option<FailureDoc>,
    caller: String,
    create_time: Option<String>,
    end_time: Option<String>,
    deadline: Option<String>,
    moved_bytes: u64,
    total: Option<SizeDoc>,
    rate_bytes_per_second: u64,
    eta_us: Option<u64>,
    predicted_downtime_us: Option<u64>,
    downtime_us: Option<u64>,
    actions: Vec<&'static str>,
    trace_id: String,
    /// Of a migration or an arrival.
    handover: Option<HandoverDoc>,
    devices: Vec<OperationDeviceDoc>,
    /// For tables: that it is in doubt, and what leads on.
    #[serde(skip)]
    doubt: Option<(String, String)>,
}

#[derive(Debug, Serialize)]
struct FailureDoc {
    reason: String,
    message: String,
    device: String,
}

#[derive(Debug, Serialize)]
struct OperationDeviceDoc {
    device: String,
    moved_bytes: u64,
    pre_copy_bytes: u64,
    standing: &'static str,
    length_bytes: Option<u64>,
    blake3: Option<String>,
}

impl OperationDoc {
    pub(crate) fn new(operation: &v1::Operation) -> Self {
        Self {
            name: operation.name.clone(),
            kind: short(operation.kind().as_str_name(), "OPERATION_KIND_"),
            phase: phase(operation.phase()),
            done: operation.done,
            result: short(operation.result().as_str_name(), "OPERATION_RESULT_"),
            outcome: short(operation.outcome().as_str_name(), "STATE_OUTCOME_"),
            consistency: short(operation.consistency().as_str_name(), "CHECKPOINT_CONSISTENCY_"),
            checkpoint: operation.checkpoint.clone(),
            failure: operation.failure.as_ref().map(|failure| FailureDoc {
                reason: failure.reason.clone(),
                message: failure.message.clone(),
                device: failure.device.clone(),
            }),
            caller: operation.caller.clone(),
            create_time: moment(operation.create_time.as_ref()),
            end_time: moment(operation.end_time.as_ref()),
            deadline: moment(operation.deadline.as_ref()),
            moved_bytes: operation.moved_bytes,
            total: operation.total.as_ref().map(SizeDoc::new),
            rate_bytes_per_second: operation.rate_bytes_per_second,
            eta_us: micros(operation.eta.as_ref()),
            predicted_downtime_us: micros(operation.predicted_downtime.as_ref()),
            downtime_us: micros(operation.downtime.as_ref()),
            actions: operation
                .actions()
                .map(|action| short(action.as_str_name(), "OPERATION_ACTION_"))
                .collect(),
            trace_id: operation.trace_id.clone(),
            handover: operation.handover.as_ref().map(HandoverDoc::new),
            doubt: in_doubt(operation),
            devices: operation
                .devices
                .iter()
                .map(|device| OperationDeviceDoc {
                    device: device.device.clone(),
                    moved_bytes: device.moved_bytes,
                    pre_copy_bytes: device.pre_copy_bytes,
                    standing: short(device.standing().as_str_name(), "DEVICE_STANDING_"),
                    length_bytes: device.seal.as_ref().map(|seal| seal.length_bytes),
                    blake3: device.seal.as_ref().map(|seal| hex(&seal.blake3)),
                })
                .collect(),
        }
    }
}

const COLUMNS: [Column<OperationDoc>; 16] = [
    usual("NAME", |operation| printable(&operation.name)),
    usual("KIND", |operation| said(operation.kind)),
    usual("PHASE", |operation| said(operation.phase)),
    usual("RESULT", |operation| said(operation.result)),
    usual("MOVED", |operation| bytes(operation.moved_bytes)),
    usual("DEVICES", |operation| {
        let names: Vec<String> = operation.devices.iter().map(|device| printable(&device.device)).collect();
        names.join(",")
    }),
    wide("DOWNTIME", |operation| {
        operation.downtime_us.map(|downtime| time(Duration::from_micros(downtime))).unwrap_or_default()
    }),
    wide("CREATED", |operation| seconds(operation.create_time.as_ref())),
    wide("ENDED", |operation| seconds(operation.end_time.as_ref())),
    wide("OUTCOME", |operation| said(operation.outcome)),
    wide("CALLER", |operation| printable(&operation.caller)),
    wide("CHECKPOINT", |operation| printable(&short_checkpoint(&operation.checkpoint))),
    wide("PEER", |operation| far(operation, |handover| printable(&handover.peer))),
    wide("PEER_OPERATION", |operation| far(operation, |handover| printable(&handover.peer_operation))),
    wide("VERDICT", |operation| far(operation, |handover| said(handover.verdict))),
    wide("IN_DOUBT", |operation| far(operation, |handover| yes(handover.in_doubt))),
];

/// Of the other side, where there is one.
fn far(operation: &OperationDoc, cell: fn(&HandoverDoc) -> String) -> String {
    operation.handover.as_ref().map(cell).unwrap_or_default()
}

pub(crate) fn operations(detail: Detail, operations: &[OperationDoc]) -> String {
    let mut text = rows(detail, &COLUMNS, operations);
    for operation in operations {
        if let Some(failure) = &operation.failure {
            let (name, reason) = (printable(&operation.name), printable(&failure.reason));
            text.extend([format!("{name}: {reason}: {}\n", printable(&failure.message))]);
        }
        if let Some((doubt, hint)) = &operation.doubt {
            text.extend([format!("{}: {doubt}\n  {hint}\n", printable(&operation.name))]);
        }
        let resolution = operation.handover.as_ref().map_or("", |handover| handover.resolution.as_str());
        if !resolution.is_empty() {
            text.extend([format!("{}: resolved: {}\n", printable(&operation.name), printable(resolution))]);
        }
    }
    text
}
