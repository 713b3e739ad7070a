//! Results for people and for programs.
//!
//! Tables are for eyes. JSON has one document, whose field names stay, with units in them; enum values are those of the
//! contract without their prefix.

use std::io::{self, Write};
use std::time::{Duration, SystemTime};

use indicatif::{BinaryBytes, HumanDuration};
use serde::Serialize;
use vfio_checkpoint_client::call::printable;
use vfio_checkpoint_proto::v1;

use crate::args::OutputFormat;
use crate::outcome::{Exit, Failure};

/// Prints a result.
pub(crate) fn print(
    format: OutputFormat,
    table: impl FnOnce() -> String,
    json: &impl Serialize,
) -> Result<(), Failure> {
    let text = match format {
        OutputFormat::Table => table(),
        OutputFormat::Json => serde_json::to_string_pretty(json)
            .map(|text| text + "\n")
            .map_err(|error| Failure::new(Exit::Failed, error))?,
    };
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(()),
        // Whoever reads has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        Err(error) => Err(Failure::new(Exit::Failed, format!("the result cannot be printed: {error}"))),
    }
}

/// Says something that is not the result.
pub(crate) fn say(text: &str) {
    // A stderr that is closed hears nothing.
    let _unsaid = writeln!(io::stderr(), "{text}");
}

/// Columns as wide as they need to be.
pub(crate) fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = head.iter().map(|cell| cell.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let padded: Vec<String> = cells.zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        padded.join("  ").trim_end().to_owned() + "\n"
    };
    let mut text = line(&mut head.iter().copied());
    for row in rows {
        text += &line(&mut row.iter().map(String::as_str));
    }
    text
}

pub(crate) fn bytes(count: u64) -> String {
    BinaryBytes(count).to_string()
}

pub(crate) fn rate(count: u64, over: Duration) -> String {
    let seconds = over.as_secs_f64();
    if seconds <= 0.0 {
        return "-".to_owned();
    }
    format!("{:.1} MiB/s", mebibytes(count) / seconds)
}

#[allow(clippy::cast_precision_loss, reason = "a rate for people")]
fn mebibytes(count: u64) -> f64 {
    count as f64 / f64::from(1 << 20)
}

pub(crate) fn time(duration: Duration) -> String {
    if duration >= Duration::from_mins(1) {
        HumanDuration(duration).to_string()
    } else if duration >= Duration::from_secs(1) {
        format!("{:.1} s", duration.as_secs_f64())
    } else {
        format!("{:.1} ms", duration.as_secs_f64() * 1e3)
    }
}

pub(crate) fn or_dash(text: Option<String>) -> String {
    text.filter(|text| !text.is_empty()).unwrap_or_else(|| "-".to_owned())
}

/// A duration of the contract. One that is negative is none.
pub(crate) fn span(wire: Option<&prost_types::Duration>) -> Option<Duration> {
    wire.and_then(|wire| Duration::try_from(*wire).ok())
}

fn micros(wire: Option<&prost_types::Duration>) -> Option<u64> {
    span(wire).and_then(|span| u64::try_from(span.as_micros()).ok())
}

fn moment(wire: Option<&prost_types::Timestamp>) -> Option<String> {
    let time = SystemTime::try_from(*wire?).ok()?;
    // The formatter knows the years 1970 to 9999 and panics at others.
    let seconds = time.duration_since(SystemTime::UNIX_EPOCH).ok()?.as_secs();
    (seconds < 253_402_300_800).then(|| humantime::format_rfc3339_millis(time).to_string())
}

/// The name of an enum value without the name of its enum.
fn short(name: &'static str, prefix: &str) -> &'static str {
    name.strip_prefix(prefix).unwrap_or(name)
}

pub(crate) fn phase(phase: v1::OperationPhase) -> &'static str {
    short(phase.as_str_name(), "OPERATION_PHASE_")
}

fn size(size: Option<&v1::DataSize>) -> String {
    let Some(size) = size else { return "-".to_owned() };
    match size.kind() {
        v1::DataSizeKind::Known => bytes(size.bytes),
        v1::DataSizeKind::UpperBound => format!("<= {}", bytes(size.bytes)),
        v1::DataSizeKind::Unknown | v1::DataSizeKind::Unspecified => "-".to_owned(),
    }
}

#[derive(Debug, Serialize)]
struct SizeDoc {
    kind: &'static str,
    bytes: u64,
}

impl SizeDoc {
    fn new(size: &v1::DataSize) -> Self {
        Self { kind: short(size.kind().as_str_name(), "DATA_SIZE_KIND_"), bytes: size.bytes }
    }
}

/// One reason why a job cannot work.
#[derive(Debug, Serialize)]
pub(crate) struct BlockerDoc {
    reason: &'static str,
    device: String,
    message: String,
}

impl BlockerDoc {
    pub(crate) fn new(blocker: &v1::Blocker) -> Self {
        let reason = short(blocker.reason().as_str_name(), "BLOCKER_REASON_");
        Self { reason, device: blocker.device.clone(), message: blocker.message.clone() }
    }

    pub(crate) fn line(&self) -> String {
        let about =
            if self.device.is_empty() { String::new() } else { format!(" {}", printable(&self.device)) };
        format!("  {}{about}: {}\n", self.reason, printable(&self.message))
    }
}

/// A device.
#[derive(Debug, Serialize)]
pub(crate) struct DeviceDoc {
    name: String,
    address: String,
    backend: &'static str,
    driver: String,
    state: &'static str,
    standing: &'static str,
    standing_detail: String,
    p2p: bool,
    pre_copy: bool,
    data_size: Option<SizeDoc>,
    dirty_source: &'static str,
    logical_device: Option<String>,
    epoch: Option<u64>,
    operation: String,
    owner_pod: String,
    blockers: Vec<BlockerDoc>,
    #[serde(skip)]
    size_text: String,
}

impl DeviceDoc {
    pub(crate) fn new(device: &v1::Device) -> Self {
        Self {
            name: device.name.clone(),
            address: device.address.clone(),
            backend: short(device.backend().as_str_name(), "BACKEND_"),
            driver: device.driver.clone(),
            state: if device.state() == v1::MigrationState::Unspecified {
                // Never read back.
                "-"
            } else {
                short(device.state().as_str_name(), "MIGRATION_STATE_")
            },
            standing: short(device.standing().as_str_name(), "DEVICE_STANDING_"),
            standing_detail: device.standing_detail.clone(),
            p2p: device.capabilities.is_some_and(|capabilities| capabilities.p2p),
            pre_copy: device.capabilities.is_some_and(|capabilities| capabilities.pre_copy),
            data_size: device.data_size.as_ref().map(SizeDoc::new),
            dirty_source: short(device.dirty_source().as_str_name(), "DIRTY_SOURCE_"),
            logical_device: device.logical_device.as_ref().map(|logical| logical.id.clone()),
            epoch: device.logical_device.as_ref().map(|logical| logical.epoch),
            operation: device.operation.clone(),
            owner_pod: device.owner_pod.clone(),
            blockers: device.blockers.iter().map(BlockerDoc::new).collect(),
            size_text: size(device.data_size.as_ref()),
        }
    }
}

pub(crate) fn devices(devices: &[DeviceDoc]) -> String {
    let yes = |is: bool| if is { "yes" } else { "no" }.to_owned();
    let rows: Vec<Vec<String>> = devices
        .iter()
        .map(|device| {
            vec![
                printable(&device.name),
                device.backend.to_owned(),
                printable(&device.driver),
                device.state.to_owned(),
                device.standing.to_owned(),
                device.size_text.clone(),
                yes(device.pre_copy),
                yes(device.p2p),
                or_dash(Some(printable(&device.operation))),
                or_dash(Some(printable(&device.owner_pod))),
            ]
        })
        .collect();
    let head =
        ["NAME", "BACKEND", "DRIVER", "STATE", "STANDING", "SIZE", "PRE_COPY", "P2P", "OPERATION", "POD"];
    let mut lines = vec![table(&head, &rows)];
    for device in devices {
        let name = printable(&device.name);
        if !device.standing_detail.is_empty() {
            lines.push(format!("{name}: {}\n", printable(&device.standing_detail)));
        }
        lines.extend(
            device.blockers.iter().map(|blocker| format!("{name} cannot be saved:\n{}", blocker.line())),
        );
    }
    lines.concat()
}

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
    devices: Vec<OperationDeviceDoc>,
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
        let hex = |bytes: &[u8]| bytes.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"));
        Self {
            name: operation.name.clone(),
            kind: short(operation.kind().as_str_name(), "OPERATION_KIND_"),
            phase: phase(operation.phase()),
            done: operation.done,
            result: short(operation.result().as_str_name(), "OPERATION_RESULT_"),
            outcome: short(operation.outcome().as_str_name(), "STATE_OUTCOME_"),
            consistency: short(operation.consistency().as_str_name(), "CHECKPOINT_CONSISTENCY_"),
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

pub(crate) fn operations(operations: &[OperationDoc]) -> String {
    let rows: Vec<Vec<String>> = operations
        .iter()
        .map(|operation| {
            let devices: Vec<String> =
                operation.devices.iter().map(|device| printable(&device.device)).collect();
            vec![
                printable(&operation.name),
                operation.kind.to_owned(),
                operation.phase.to_owned(),
                if operation.done { operation.result.to_owned() } else { "-".to_owned() },
                bytes(operation.moved_bytes),
                or_dash(operation.downtime_us.map(|downtime| time(Duration::from_micros(downtime)))),
                or_dash(operation.create_time.clone()),
                devices.join(","),
            ]
        })
        .collect();
    table(&["NAME", "KIND", "PHASE", "RESULT", "MOVED", "DOWNTIME", "CREATED", "DEVICES"], &rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device() -> v1::Device {
        v1::Device {
            name: "devices/nic-a".to_owned(),
            backend: v1::Backend::Kernel.into(),
            driver: "mlx5_vfio_pci".to_owned(),
            state: v1::MigrationState::Running.into(),
            standing: v1::DeviceStanding::Quarantined.into(),
            standing_detail: "it could not be brought back\u{1b}[2J".to_owned(),
            capabilities: Some(v1::DeviceCapabilities { p2p: true, pre_copy: true, ..Default::default() }),
            data_size: Some(v1::DataSize { kind: v1::DataSizeKind::UpperBound.into(), bytes: 5 << 20 }),
            blockers: vec![v1::Blocker {
                reason: v1::BlockerReason::Unspecified.into(),
                message: "reset it first".to_owned(),
                ..Default::default()
            }],
            ..Default::default()
        }
    }

    fn operation() -> v1::Operation {
        v1::Operation {
            name: "operations/1".to_owned(),
            kind: v1::OperationKind::Save.into(),
            phase: v1::OperationPhase::Done.into(),
            done: true,
            result: v1::OperationResult::Succeeded.into(),
            create_time: Some(prost_types::Timestamp { seconds: 1_800_000_000, nanos: 0 }),
            // A time that no calendar shows is left out, and stops nothing.
            end_time: Some(prost_types::Timestamp { seconds: i64::MAX, nanos: 0 }),
            downtime: Some(prost_types::Duration { seconds: 0, nanos: 12_300_000 }),
            eta: Some(prost_types::Duration { seconds: -1, nanos: 0 }),
            moved_bytes: 3 << 20,
            actions: vec![v1::OperationAction::Resume.into()],
            devices: vec![v1::OperationDevice {
                device: "devices/nic-a".to_owned(),
                seal: Some(v1::Seal { length_bytes: 3, blake3: vec![0xab; 2].into() }),
                ..Default::default()
            }],
            ..Default::default()
        }
    }

    #[test]
    fn devices_for_people() {
        insta::assert_snapshot!(devices(&[
            DeviceDoc::new(&device()),
            DeviceDoc::new(&v1::Device::default())
        ]));
    }

    #[test]
    fn operations_for_people() {
        insta::assert_snapshot!(operations(&[OperationDoc::new(&operation())]));
    }

    #[test]
    fn both_for_programs() {
        let device = serde_json::to_string_pretty(&DeviceDoc::new(&device())).unwrap();
        let operation = serde_json::to_string_pretty(&OperationDoc::new(&operation())).unwrap();
        insta::assert_snapshot!(format!("{device}\n{operation}"));
    }
}
