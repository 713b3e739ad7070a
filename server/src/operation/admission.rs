//! Why a job cannot work, all of it at once, before anything is touched. Pure: it looks at what was read back and at
//! what is asked for.
//!
//! State whose source may still run is refused, unless its caller wants a fork of it: see [`fork`].

pub mod fork;
#[cfg(test)]
mod tests;

use std::time::Duration;

use vfio_checkpoint_device::{DataSize, Fingerprint};
use vfio_checkpoint_fsm::{AfterLoad, AfterSave, Capabilities, Cutover, RestorePlan, SavePlan, State};
use vfio_checkpoint_proto::domain::{
    self, AfterRestore, DeviceManifest, Manifest, MemoryCapture, PreCopy, RestoreSpec, SaveRequestSpec,
};
use vfio_checkpoint_proto::ids::DeviceName;
use vfio_checkpoint_proto::v1::BlockerReason;

use super::entry::total;
use super::meter::time_for;
use crate::registry::{DeviceView, Leased, Standing};
use fork::Whereabouts;

/// One reason why a job cannot work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blocker {
    /// Stable.
    pub reason: BlockerReason,
    /// The device that it is about; none where it is about the set.
    pub device: Option<DeviceName>,
    /// For people: what is in the way and what to do.
    pub message: String,
}

impl Blocker {
    /// About one device.
    pub fn device(reason: BlockerReason, device: &DeviceName, message: impl Into<String>) -> Self {
        Self { reason, device: Some(device.clone()), message: message.into() }
    }

    /// About the set.
    pub fn set(reason: BlockerReason, message: impl Into<String>) -> Self {
        Self { reason, device: None, message: message.into() }
    }

    /// Whether it may be gone by itself in a while, so that trying again makes sense.
    pub fn is_passing(&self) -> bool {
        matches!(
            self.reason,
            BlockerReason::Leased | BlockerReason::AgentBusy | BlockerReason::StoreUnavailable
        )
    }
}

impl From<Leased> for Blocker {
    fn from(leased: Leased) -> Self {
        leased_by(&leased.device, leased.by.as_ref())
    }
}

fn leased_by(device: &DeviceName, operation: &str) -> Blocker {
    Blocker::device(
        BlockerReason::Leased,
        device,
        format!("{operation} has it; wait for that to end, or cancel it"),
    )
}

/// What is known of a save before it starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prediction {
    /// Whether state will be read while the devices run.
    pub pre_copy: bool,
    /// State of all devices.
    pub total: DataSize,
    /// How long they would stand still.
    pub downtime: Option<Duration>,
    /// How long at most: as if nothing of the state were read before they stop.
    pub downtime_at_most: Option<Duration>,
    /// The rate that was reckoned with.
    pub rate_bytes_per_second: u64,
    /// Whether it was measured on these devices, or is the configured one.
    pub rate_measured: bool,
}

/// What the agent itself adds to what the caller asks.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// The configured rate.
    pub rate_bytes_per_second: u64,
    /// State of one device.
    pub max_device_bytes: u64,
}

/// Why a device as it stands cannot be saved, whatever is asked.
pub fn device_blockers(view: &DeviceView) -> Vec<Blocker> {
    let mut found = Vec::new();
    let out = |message: &str| Blocker::device(BlockerReason::OutOfService, &view.name, message);
    match &view.standing {
        Standing::Ready => {}
        Standing::Quarantined | Standing::Hung(_) | Standing::Unavailable(_) => {
            found.push(out(&view.standing.detail()));
        }
        Standing::NotMigratable(why) => {
            found.push(Blocker::device(BlockerReason::NotMigratable, &view.name, why));
        }
    }
    match &view.lease {
        Some(operation) => found.push(leased_by(&view.name, operation.as_ref())),
        // While an operation is at work the state says nothing about what comes after it.
        None => match view.state {
            Some((State::Running, _)) | None => {}
            // What is told of a device out of service covers where it stands.
            Some(_) if view.standing != Standing::Ready => {}
            Some((state, _)) => found.push(Blocker::device(
                BlockerReason::NotRunning,
                &view.name,
                format!("it stands in {state}; bring it back with ResetDevice, which can keep its state"),
            )),
        },
    }
    found
}

/// A name that is not configured.
pub fn not_found(name: &DeviceName) -> Blocker {
    Blocker::device(
        BlockerReason::DeviceNotFound,
        name,
        "no device of this name is configured on this agent; ListDevices shows those that are",
    )
}

/// Whether a save can work, how it would, and what can be said beforehand. The devices stand still so much longer where they
/// are handed over.
pub fn save(
    views: &[DeviceView],
    spec: &SaveRequestSpec,
    bounds: Bounds,
    handover: Duration,
) -> (Vec<Blocker>, SavePlan, Prediction) {
    let mut found: Vec<Blocker> = views.iter().flat_map(device_blockers).collect();
    let known: Vec<Capabilities> = views
        .iter()
        .filter_map(|view| view.capabilities.map(|capabilities| capabilities.migration))
        .collect();
    let p2p = !known.is_empty() && known.iter().all(|capabilities| capabilities.p2p);
    let can_pre_copy = !known.is_empty() && known.iter().all(|capabilities| capabilities.pre_copy);
    if views.len() > 1 {
        found.extend(without(views, |capabilities| capabilities.p2p).map(|name| {
            Blocker::device(
                BlockerReason::NoP2p,
                name,
                "it has no RUNNING_P2P state, so it cannot be stopped together with others; save it alone",
            )
        }));
    }
    if matches!(spec.pre_copy, PreCopy::Required { .. }) {
        found.extend(without(views, |capabilities| capabilities.pre_copy).map(|name| {
            Blocker::device(
                BlockerReason::NoPreCopy,
                name,
                "it has no PRE_COPY state; ask for pre-copy only where every device can",
            )
        }));
    }
    memory(spec, &mut found);
    if spec.forbid_all_dirty {
        let blind = views.iter().filter(|view| view.capabilities.is_some_and(|known| !known.dma_logging));
        found.extend(blind.map(|view| {
            Blocker::device(
                BlockerReason::NoDirtyTracking,
                &view.name,
                "nothing tracks the pages that it writes, so all count as dirty; allow that, or save it while stopped",
            )
        }));
    }
    let plan = SavePlan {
        pre_copy: spec.pre_copy != PreCopy::Never && can_pre_copy,
        barrier: p2p,
        cutover: cutover(spec),
        after: after(spec),
    };
    let prediction = predict(views, plan, bounds, handover);
    sizes(views, spec.max_bytes, spec.allow_unknown_size, bounds, &mut found);
    downtime(spec, prediction, handover, &mut found);
    (found, plan, prediction)
}

/// Who says when to stop.
pub fn cutover(spec: &SaveRequestSpec) -> Cutover {
    match spec.cutover {
        domain::Cutover::Auto => Cutover::Auto,
        domain::Cutover::Manual { .. } => Cutover::Manual,
    }
}

/// What becomes of the devices.
pub fn after(spec: &SaveRequestSpec) -> AfterSave {
    match spec.after {
        domain::AfterSave::Resume => AfterSave::Resume,
        domain::AfterSave::Hold { .. } => AfterSave::Hold,
        domain::AfterSave::StayStopped => AfterSave::StayStopped,
        domain::AfterSave::HandOver => AfterSave::HandOver,
    }
}

/// An amount of state as a peer states it.
pub fn size(size: domain::DataSize) -> DataSize {
    match size {
        domain::DataSize::Known(bytes) => DataSize::Known(bytes),
        domain::DataSize::UpperBound(bytes) => DataSize::UpperBound(bytes),
        domain::DataSize::Unknown => DataSize::Unknown,
    }
}

fn without<'a>(
    views: &'a [DeviceView],
    has: impl Fn(Capabilities) -> bool + 'a,
) -> impl Iterator<Item = &'a DeviceName> {
    views
        .iter()
        .filter(move |view| view.capabilities.is_some_and(|known| !has(known.migration)))
        .map(|view| &view.name)
}

fn memory(spec: &SaveRequestSpec, found: &mut Vec<Blocker>) {
    match spec.memory_capture {
        MemoryCapture::None | MemoryCapture::WhileStopped | MemoryCapture::DirtyTracking => {}
        MemoryCapture::BackgroundSnapshot => found.push(Blocker::set(
            BlockerReason::MemoryCapture,
            "memory that is captured after the workload runs again does not belong to the state of its devices; capture \
             it while stopped, or with dirty tracking",
        )),
        MemoryCapture::PostCopy => found.push(Blocker::set(
            BlockerReason::MemoryCapture,
            "devices cannot fault pages in, so memory must be there before they run; capture it while stopped, or with \
             dirty tracking",
        )),
    }
    if spec.viommu {
        found.push(Blocker::set(
            BlockerReason::Viommu,
            "the mappings of a virtual IOMMU are not part of the state of its devices; take it away from the workload",
        ));
    }
}

fn sizes(
    views: &[DeviceView],
    max_bytes: Option<u64>,
    allow_unknown: bool,
    bounds: Bounds,
    found: &mut Vec<Blocker>,
) {
    for view in views {
        if let Some(bytes) = view.data_size.bytes().filter(|bytes| *bytes > bounds.max_device_bytes) {
            found.push(Blocker::device(
                BlockerReason::TooLarge,
                &view.name,
                format!(
                    "it has up to {bytes} bytes of state, and limits.max_device_bytes of this agent is {}",
                    bounds.max_device_bytes
                ),
            ));
        }
    }
    let Some(limit) = max_bytes else { return };
    match total(views.iter().map(|view| view.data_size)) {
        DataSize::Known(bytes) | DataSize::UpperBound(bytes) if bytes > limit => found.push(Blocker::set(
            BlockerReason::TooLarge,
            format!("there are up to {bytes} bytes of state, and max_bytes is {limit}"),
        )),
        DataSize::Known(_) | DataSize::UpperBound(_) => {}
        DataSize::Unknown if allow_unknown => {}
        DataSize::Unknown => found.extend(
            views.iter().filter(|view| view.capabilities.is_some() && view.data_size == DataSize::Unknown).map(|view| {
                Blocker::device(
                    BlockerReason::SizeUnknown,
                    &view.name,
                    "it does not say how much state it has, which meets no limit; set allow_unknown_size, or no limit",
                )
            }),
        ),
    }
}

/// Without pre-copy what a stop takes can be told beforehand. With it, pre-copy itself decides. The agent's own default
/// limit is a wish for pre-copy, not a promise to callers that set none, so it blocks nothing.
fn downtime(spec: &SaveRequestSpec, prediction: Prediction, handover: Duration, found: &mut Vec<Blocker>) {
    let Some(limit) = spec.downtime_limit else { return };
    let asked = humantime::format_duration(limit);
    if handover > limit {
        found.push(Blocker::set(
            BlockerReason::DowntimeLimit,
            format!(
                "the hand-over alone takes about {}, by the round trip to the destination and the time that the journal \
                 takes, and downtime_limit is {asked}; raise it",
                humantime::format_duration(rounded(handover)),
            ),
        ));
        return;
    }
    if prediction.pre_copy {
        return;
    }
    match prediction.downtime {
        Some(predicted) if predicted > limit => found.push(Blocker::set(
            BlockerReason::DowntimeLimit,
            format!(
                "the devices would stand still for about {}, at {} bytes a second, and downtime_limit is {asked}; raise \
                 it, or allow pre-copy where the devices can",
                humantime::format_duration(rounded(predicted)),
                prediction.rate_bytes_per_second,
            ),
        )),
        Some(_) => {}
        None if spec.allow_unknown_size => {}
        None => found.push(Blocker::set(
            BlockerReason::SizeUnknown,
            format!(
                "how long the devices would stand still cannot be told, which meets no limit, and downtime_limit is \
                 {asked}; set allow_unknown_size, or no limit"
            ),
        )),
    }
}

/// In whole milliseconds, for people.
fn rounded(time: Duration) -> Duration {
    Duration::from_millis(u64::try_from(time.as_millis()).unwrap_or(u64::MAX))
}

fn predict(views: &[DeviceView], plan: SavePlan, bounds: Bounds, handover: Duration) -> Prediction {
    let measured = views.iter().filter_map(|view| view.record.as_ref()?.rate_bytes_per_second).min();
    let rate = measured.unwrap_or(bounds.rate_bytes_per_second).max(1);
    let total = total(views.iter().map(|view| view.data_size));
    let stop = total.bytes().and_then(|bytes| time_for(bytes, rate));
    let at_most = stop.map(|stop| stop.saturating_add(handover));
    Prediction {
        pre_copy: plan.pre_copy,
        total,
        downtime: at_most.filter(|_| !plan.pre_copy),
        downtime_at_most: at_most,
        rate_bytes_per_second: rate,
        rate_measured: measured.is_some(),
    }
}

/// Whether a restore of this state can work, and how it would.
pub fn restore(
    views: &[DeviceView],
    spec: &RestoreSpec,
    manifest: &Manifest,
    whereabouts: &Whereabouts,
    bounds: Bounds,
) -> (Vec<Blocker>, RestorePlan) {
    let mut found: Vec<Blocker> = views.iter().flat_map(device_blockers).collect();
    let barrier = views.len() > 1
        && views.iter().all(|view| view.capabilities.is_some_and(|known| known.migration.p2p));
    if views.len() > 1 {
        found.extend(without(views, |capabilities| capabilities.p2p).map(|name| {
            Blocker::device(
                BlockerReason::NoP2p,
                name,
                "it has no RUNNING_P2P state, so it cannot be started together with others; restore it alone",
            )
        }));
    }
    let after = match spec.after {
        AfterRestore::Run => AfterLoad::Run,
        AfterRestore::Hold { .. } => AfterLoad::Hold,
    };
    for (view, device) in assigned(views, spec, manifest) {
        found.extend(fingerprint(view, device));
    }
    if !spec.allow_fork {
        found.extend(
            spec.devices
                .iter()
                .zip(&manifest.devices)
                .filter_map(|(target, device)| whereabouts.fork(target, device, manifest.source_disposition)),
        );
    }
    for (view, device) in assigned(views, spec, manifest) {
        let size = size(device.data_size);
        if let Some(bytes) = size.bytes().filter(|bytes| *bytes > bounds.max_device_bytes) {
            found.push(Blocker::device(
                BlockerReason::TooLarge,
                &view.name,
                format!(
                    "up to {bytes} bytes are to come, and limits.max_device_bytes of this agent is {}",
                    bounds.max_device_bytes
                ),
            ));
        }
    }
    if let Some(limit) = spec.max_bytes {
        let bytes = total(manifest.devices.iter().map(|device| size(device.data_size))).bytes();
        if let Some(bytes) = bytes.filter(|bytes| *bytes > limit) {
            let message = format!("up to {bytes} bytes are to come, and max_bytes is {limit}");
            found.push(Blocker::set(BlockerReason::TooLarge, message));
        }
    }
    (found, RestorePlan { barrier, after })
}

/// Each device with what it takes. By name, and not by place: a name that is not configured has no view.
fn assigned<'a>(
    views: &'a [DeviceView],
    spec: &'a RestoreSpec,
    manifest: &'a Manifest,
) -> impl Iterator<Item = (&'a DeviceView, &'a DeviceManifest)> {
    spec.devices
        .iter()
        .zip(&manifest.devices)
        .filter_map(|(name, device)| Some((views.iter().find(|view| view.name == *name)?, device)))
}

fn fingerprint(view: &DeviceView, device: &DeviceManifest) -> Option<Blocker> {
    // Where it is not open, which is told already, nothing is known to compare with.
    view.capabilities?;
    let theirs = device
        .fingerprint
        .facts()
        .iter()
        .fold(Fingerprint::new(), |sum, (name, value)| sum.with(name, value.as_str()));
    let differences: Vec<String> =
        theirs.differences(&view.fingerprint).iter().map(ToString::to_string).collect();
    (!differences.is_empty()).then(|| {
        Blocker::device(
            BlockerReason::FingerprintMismatch,
            &view.name,
            format!("the state is of another kind of device: {}", differences.join("; ")),
        )
    })
}
