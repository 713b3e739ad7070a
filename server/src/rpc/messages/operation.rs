//! An operation on the wire.

use vfio_checkpoint_proto::v1;
use vfio_checkpoint_seal::Seal;

use super::{data_size, duration};
use crate::operation::admission::Prediction;
use crate::operation::record::{
    AfterRecord, Consistency, EndOutcome, EndRecord, EndResult, JobRecord, OperationDeviceRecord, PeerRecord,
};
use crate::operation::{Entry, Handover, Live, Phase, View};

/// An operation as it is.
pub(in crate::rpc) fn operation(entry: &Entry) -> v1::Operation {
    operation_at(entry, &entry.view())
}

/// An operation as it was at one moment.
pub(in crate::rpc) fn operation_at(entry: &Entry, view: &View) -> v1::Operation {
    let fixed = &entry.fixed;
    let end = view.end.as_ref();
    v1::Operation {
        name: fixed.name.to_string(),
        kind: kind(fixed.job).into(),
        phase: phase(view.phase).into(),
        done: end.is_some(),
        result: end.map_or(v1::OperationResult::Unspecified, |end| result(end.result)).into(),
        outcome: end.map_or(v1::StateOutcome::Unspecified, |end| outcome(end.outcome)).into(),
        failure: end.and_then(|end| end.failure.as_ref()).map(|failure| v1::OperationFailure {
            reason: failure.reason.clone(),
            message: failure.message.clone(),
            device: failure.device.as_ref().map(ToString::to_string).unwrap_or_default(),
        }),
        devices: fixed
            .devices
            .iter()
            .zip(&view.devices)
            .map(|(fixed, live)| device(fixed, live, end))
            .collect(),
        caller: fixed.caller.clone(),
        request_id: fixed.request_id.clone().unwrap_or_default(),
        create_time: Some(fixed.created.timestamp()),
        end_time: end.map(|end| end.at.timestamp()),
        actions: actions(entry, view).into_iter().map(Into::into).collect(),
        deadline: view.deadline.map(crate::environment::UnixMillis::timestamp),
        moved_bytes: view.moved_bytes(),
        total: Some(data_size(view.total())),
        rate_bytes_per_second: if end.is_some() { 0 } else { view.rate_bytes_per_second },
        eta: view.eta().map(duration),
        predicted_downtime: view.predicted_downtime.map(duration),
        downtime: end.and_then(|end| end.downtime).map(duration),
        consistency: end
            .and_then(|end| end.consistency)
            .map_or(v1::CheckpointConsistency::Unspecified, |consistency| match consistency {
                Consistency::Consistent => v1::CheckpointConsistency::Consistent,
                Consistency::Inconsistent => v1::CheckpointConsistency::Inconsistent,
            })
            .into(),
        revision: view.revision,
        trace_id: fixed.trace_id.clone().unwrap_or_default(),
        checkpoint: fixed.checkpoint.as_ref().map(ToString::to_string).unwrap_or_default(),
        handover: view.handover.as_ref().map(|known| handover(entry, known)),
    }
}

fn device(fixed: &OperationDeviceRecord, live: &Live, end: Option<&EndRecord>) -> v1::OperationDevice {
    let standing = match end {
        None => v1::DeviceStanding::Unspecified,
        Some(end) if end.hung.contains(&fixed.device) => v1::DeviceStanding::Hung,
        Some(end) if end.unavailable.contains(&fixed.device) => v1::DeviceStanding::Unavailable,
        Some(end) if end.quarantined.contains(&fixed.device) => v1::DeviceStanding::Quarantined,
        Some(_) => v1::DeviceStanding::Ready,
    };
    v1::OperationDevice {
        device: fixed.device.to_string(),
        moved_bytes: live.moved_bytes,
        pre_copy_bytes: live.pre_copy_bytes,
        total: Some(data_size(live.total)),
        seal: live.seal.map(seal),
        standing: standing.into(),
        logical_device: Some(v1::LogicalDevice { id: fixed.logical.to_string(), epoch: fixed.epoch.0 }),
    }
}

/// The other side of a migration or an arrival.
fn handover(entry: &Entry, handover: &Handover) -> v1::Handover {
    let record = &handover.record;
    let peer = match &record.peer {
        PeerRecord::Destination { endpoint, .. } => endpoint.clone(),
        PeerRecord::Source { .. } => entry.fixed.caller.clone(),
    };
    v1::Handover {
        peer,
        peer_operation: record.operation.as_ref().map(ToString::to_string).unwrap_or_default(),
        stop_time: record.stopped.map(crate::environment::UnixMillis::timestamp),
        prepare_time: record.prepared.map(crate::environment::UnixMillis::timestamp),
        // That of an arrival is told once it is on record.
        verdict: record
            .verdict
            .filter(|_| entry.fixed.job.gives() || entry.is_done())
            .map_or(v1::HandoverVerdict::Unspecified, |verdict| super::verdict(verdict.into()))
            .into(),
        in_doubt: handover.in_doubt,
        doubt: handover.doubt.clone(),
        resent_bytes: record.resent_bytes,
        reconnects: record.reconnects,
        resolution: record.resolution.as_ref().map(ToString::to_string).unwrap_or_default(),
        awaits_ready: handover.awaits_ready,
    }
}

fn kind(job: JobRecord) -> v1::OperationKind {
    match job {
        JobRecord::Migrate { .. } => v1::OperationKind::Migration,
        JobRecord::Arrive { .. } => v1::OperationKind::Arrival,
        JobRecord::Save { .. } => v1::OperationKind::Save,
        JobRecord::Restore { .. } => v1::OperationKind::Restore,
    }
}

/// The phase on the wire.
pub(crate) fn phase(phase: Phase) -> v1::OperationPhase {
    match phase {
        Phase::WaitingForStream => v1::OperationPhase::WaitingForStream,
        Phase::Preparing => v1::OperationPhase::Preparing,
        Phase::PreCopy => v1::OperationPhase::PreCopy,
        Phase::WaitingForCutover => v1::OperationPhase::WaitingForCutover,
        Phase::Stopping => v1::OperationPhase::Stopping,
        Phase::StopCopy => v1::OperationPhase::StopCopy,
        Phase::Sealing => v1::OperationPhase::Sealing,
        Phase::Held => v1::OperationPhase::Held,
        Phase::Marking => v1::OperationPhase::Marking,
        Phase::Loading => v1::OperationPhase::Loading,
        Phase::Verifying => v1::OperationPhase::Verifying,
        Phase::Resuming => v1::OperationPhase::Resuming,
        Phase::Prepared => v1::OperationPhase::Prepared,
        Phase::Committing => v1::OperationPhase::Committing,
        Phase::LettingGo => v1::OperationPhase::LettingGo,
        Phase::Unwinding => v1::OperationPhase::Unwinding,
        Phase::Done => v1::OperationPhase::Done,
    }
}

fn result(result: EndResult) -> v1::OperationResult {
    match result {
        EndResult::Succeeded => v1::OperationResult::Succeeded,
        EndResult::Failed => v1::OperationResult::Failed,
        EndResult::Cancelled => v1::OperationResult::Cancelled,
    }
}

/// Length and digest.
pub(super) fn seal(seal: Seal) -> v1::Seal {
    v1::Seal { length_bytes: seal.bytes, blake3: bytes::Bytes::copy_from_slice(&seal.blake3) }
}

fn outcome(outcome: EndOutcome) -> v1::StateOutcome {
    match outcome {
        EndOutcome::Preserved => v1::StateOutcome::Preserved,
        EndOutcome::StateLost => v1::StateOutcome::StateLost,
        EndOutcome::Replaced => v1::StateOutcome::Replaced,
        EndOutcome::Moved => v1::StateOutcome::Moved,
    }
}

/// What the caller may call next.
fn actions(entry: &Entry, view: &View) -> Vec<v1::OperationAction> {
    if view.end.is_some() {
        return Vec::new();
    }
    let manual = match entry.fixed.job {
        JobRecord::Save {
            manual_cutover,
            after: AfterRecord::Resume | AfterRecord::Hold | AfterRecord::StayStopped,
            ..
        }
        | JobRecord::Migrate { manual_cutover, .. } => manual_cutover,
        JobRecord::Restore { .. } | JobRecord::Arrive { .. } => false,
    };
    let manual_commit = matches!(entry.fixed.job, JobRecord::Migrate { manual_commit: true, .. });
    let handover = view.handover.as_ref();
    let mut actions = Vec::new();
    match view.phase {
        Phase::WaitingForStream => actions.push(v1::OperationAction::Stream),
        Phase::PreCopy | Phase::WaitingForCutover if manual => actions.push(v1::OperationAction::Cutover),
        Phase::Held => actions.push(v1::OperationAction::Resume),
        Phase::Prepared if manual_commit => actions.push(v1::OperationAction::Commit),
        Phase::Prepared if handover.is_some_and(|handover| handover.awaits_ready) => {
            actions.push(v1::OperationAction::Ready);
        }
        Phase::Committing if handover.is_some_and(|handover| handover.in_doubt) => {
            actions.push(v1::OperationAction::Resolve);
        }
        Phase::PreCopy
        | Phase::Preparing
        | Phase::WaitingForCutover
        | Phase::Stopping
        | Phase::StopCopy
        | Phase::Sealing
        | Phase::Marking
        | Phase::Loading
        | Phase::Verifying
        | Phase::Resuming
        | Phase::Prepared
        | Phase::Committing
        | Phase::LettingGo
        | Phase::Unwinding
        | Phase::Done => {}
    }
    if view.cancellable {
        actions.push(v1::OperationAction::Cancel);
    }
    actions
}

/// What is known of a save before it starts.
pub(in crate::rpc) fn prediction(prediction: &Prediction) -> v1::SavePrediction {
    v1::SavePrediction {
        pre_copy: prediction.pre_copy,
        total: Some(data_size(prediction.total)),
        downtime: prediction.downtime.map(duration),
        rate_bytes_per_second: prediction.rate_bytes_per_second,
        rate_source: if prediction.rate_measured { "measured" } else { "configured" }.to_owned(),
    }
}
