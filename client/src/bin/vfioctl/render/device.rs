//! Devices.

use serde::Serialize;
use vfio_checkpoint_client::call::printable;
use vfio_checkpoint_proto::v1;

use super::{BlockerDoc, Column, Detail, SizeDoc, or_dash, rows, said, short, size, usual, wide, yes};

/// A device.
#[derive(Debug, Clone, PartialEq, Serialize)]
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
    dma_log: bool,
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
            state: short(device.state().as_str_name(), "MIGRATION_STATE_"),
            standing: short(device.standing().as_str_name(), "DEVICE_STANDING_"),
            standing_detail: device.standing_detail.clone(),
            p2p: device.capabilities.is_some_and(|capabilities| capabilities.p2p),
            pre_copy: device.capabilities.is_some_and(|capabilities| capabilities.pre_copy),
            dma_log: device.capabilities.is_some_and(|capabilities| capabilities.dma_log),
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

const COLUMNS: [Column<DeviceDoc>; 15] = [
    usual("NAME", |device| printable(&device.name)),
    usual("DRIVER", |device| printable(&device.driver)),
    usual("STATE", |device| said(device.state)),
    usual("STANDING", |device| said(device.standing)),
    usual("SIZE", |device| device.size_text.clone()),
    usual("OPERATION", |device| printable(&device.operation)),
    usual("POD", |device| printable(&device.owner_pod)),
    wide("BACKEND", |device| said(device.backend)),
    wide("ADDRESS", |device| printable(&device.address)),
    wide("PRE_COPY", |device| yes(device.pre_copy)),
    wide("P2P", |device| yes(device.p2p)),
    wide("DMA_LOG", |device| yes(device.dma_log)),
    wide("DIRTY_SOURCE", |device| said(device.dirty_source)),
    wide("LOGICAL_DEVICE", |device| device.logical_device.as_deref().map(printable).unwrap_or_default()),
    wide("EPOCH", |device| device.epoch.map(|epoch| epoch.to_string()).unwrap_or_default()),
];

pub(crate) fn devices(detail: Detail, devices: &[DeviceDoc]) -> String {
    let mut text = rows(detail, &COLUMNS, devices);
    for device in devices {
        text += &remarks(device);
    }
    text
}

/// What is wrong with a device, a line each.
fn remarks(device: &DeviceDoc) -> String {
    let name = printable(&device.name);
    let mut text = String::new();
    if !device.standing_detail.is_empty() {
        text.extend([format!("{name}: {}\n", printable(&device.standing_detail))]);
    }
    if !device.blockers.is_empty() {
        text.extend([format!("{name} cannot be saved:\n")]);
        text.extend(device.blockers.iter().map(BlockerDoc::line));
    }
    text
}

impl DeviceDoc {
    /// How it stands, in a sentence.
    pub(crate) fn stands(&self) -> String {
        let detail = printable(&self.standing_detail);
        let detail = if detail.is_empty() { detail } else { format!(" ({detail})") };
        format!(
            "{} is {}, and {}{detail}",
            printable(&self.name),
            or_dash(Some(said(self.state))),
            self.standing
        )
    }
}

/// One line that says how a device stands now.
pub(crate) fn device_change(device: &DeviceDoc) -> String {
    let line = format!(
        "{:<28} {:<12} {:<12} {}",
        printable(&device.name),
        or_dash(Some(said(device.state))),
        or_dash(Some(said(device.standing))),
        or_dash(Some(printable(&device.operation))),
    );
    let detail = if device.standing_detail.is_empty() {
        String::new()
    } else {
        format!("  {}", printable(&device.standing_detail))
    };
    format!("{}{detail}\n", line.trim_end())
}
