//! Migrations on the wire.

use bytes::Bytes;
use vfio_checkpoint_fsm::handover::{ArrivalStep, Verdict};
use vfio_checkpoint_proto::proof::proof;
use vfio_checkpoint_proto::v1;

use super::device::{migration_state, standing};
use super::{blocker, data_size, duration};
use crate::migration::{MigrationStarted, Side, SourceCopy, SourceDevice, Told};
use crate::operation::admission::Blocker;

/// What is in the way, with its side.
pub(in crate::rpc) fn migration_blocker((side, found): &(Side, Blocker)) -> v1::MigrationBlocker {
    let side = match side {
        Side::Source => v1::MigrationSide::Source,
        Side::Destination => v1::MigrationSide::Destination,
    };
    v1::MigrationBlocker { side: side.into(), blocker: Some(blocker(found)) }
}

/// What is known of a migration before it starts.
pub(in crate::rpc) fn migration_prediction(started: &MigrationStarted) -> Option<v1::MigrationPrediction> {
    let prediction = started.prediction.as_ref()?;
    Some(v1::MigrationPrediction {
        pre_copy: prediction.pre_copy,
        total: Some(data_size(prediction.total)),
        downtime: prediction.downtime.map(duration),
        rate_bytes_per_second: prediction.rate_bytes_per_second,
        rate_source: if prediction.rate_measured { "measured" } else { "configured" }.to_owned(),
        round_trip: started.round_trip.map(duration),
        version: started.version.unwrap_or(0),
        downtime_at_most: prediction.downtime_at_most.map(duration),
    })
}

/// What the destination has on record.
fn handover_record(told: &Told) -> v1::HandoverRecord {
    let (step, found) = match told.step {
        ArrivalStep::Loading => (v1::HandoverStep::Loading, v1::HandoverVerdict::Unspecified),
        ArrivalStep::Prepared => (v1::HandoverStep::Prepared, v1::HandoverVerdict::Unspecified),
        ArrivalStep::Committing => (v1::HandoverStep::Committing, v1::HandoverVerdict::Unspecified),
        ArrivalStep::Reverting => (v1::HandoverStep::Reverting, v1::HandoverVerdict::Unspecified),
        ArrivalStep::Over(found) => (v1::HandoverStep::Over, verdict(found)),
    };
    v1::HandoverRecord {
        operation: told.operation.to_string(),
        step: step.into(),
        verdict: found.into(),
        message: told.message.clone(),
        epochs: told.epochs.iter().map(|epoch| epoch.0).collect(),
    }
}

/// The same for who has asked, with what proves it to the source.
pub(in crate::rpc) fn proven_record(told: &Told) -> (v1::HandoverRecord, Bytes) {
    let record = handover_record(told);
    let proof = told.secret.as_ref().map(|secret| proof(secret, &record).bytes()).unwrap_or_default();
    (record, proof)
}

/// What the source itself has of a device.
pub(in crate::rpc) fn source_device(found: &SourceDevice) -> v1::SourceDevice {
    let view = found.view.as_ref();
    let state = view.and_then(|view| view.state);
    v1::SourceDevice {
        device: found.name.to_string(),
        state: state.map_or(v1::MigrationState::Unspecified, |(state, _)| migration_state(state)).into(),
        standing: view.map_or(v1::DeviceStanding::Unavailable, |view| standing(&view.standing)).into(),
        copy: match found.copy {
            SourceCopy::Kept => v1::SourceCopy::Kept,
            SourceCopy::Gone => v1::SourceCopy::Gone,
            SourceCopy::MovedOn => v1::SourceCopy::MovedOn,
            SourceCopy::Unknown => v1::SourceCopy::Unknown,
        }
        .into(),
    }
}

/// How a hand-over ended.
pub(super) fn verdict(verdict: Verdict) -> v1::HandoverVerdict {
    match verdict {
        Verdict::Committed => v1::HandoverVerdict::Committed,
        Verdict::Refused => v1::HandoverVerdict::Refused,
        Verdict::Lost => v1::HandoverVerdict::Lost,
        Verdict::Broken => v1::HandoverVerdict::Broken,
    }
}
