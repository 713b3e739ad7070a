//! `DeviceService`.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::join_all;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use vfio_checkpoint_device::{
    Call, DeviceError, DeviceLane, DirtyBitmap, DirtyReport, Driver, IovaRange, chain,
};
use vfio_checkpoint_fsm::{Outcome, Role};
use vfio_checkpoint_proto::digest::body_digest;
use vfio_checkpoint_proto::domain::{
    DirtyReportSpec, DirtyTrackingSpec, Page, ResetMode, ResetSpec, WatchSpec, device_name,
};
use vfio_checkpoint_proto::ids::{DeviceName, Epoch};
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_proto::v1::ErrorReason;
use vfio_checkpoint_proto::v1::device_service_server::DeviceService;

use super::{Asked, Refusal, audit, messages, open, page, spec, to_its_end};
use crate::core::Core;
use crate::journal::{Change, DeviceRecord, RequestAnswer, RequestKey, RequestRecord};
use crate::operation::{Entry, hex};
use crate::registry::opening::new_logical;
use crate::registry::{DeviceView, Slot, Standing};
use crate::security::authorize::Caller;
use crate::security::roles;

/// The devices of the agent.
#[derive(Debug, Clone)]
pub struct Devices {
    core: Arc<Core>,
}

impl Devices {
    /// Those of `core`.
    pub fn new(core: Arc<Core>) -> Self {
        Self { core }
    }

    fn slot(&self, name: &DeviceName) -> Result<&Arc<Slot>, Refusal> {
        self.core.registry.get(name).ok_or_else(|| Refusal::DeviceNotFound(name.clone()))
    }

    /// A device's lane, where it is open and takes calls.
    fn lane(&self, name: &DeviceName) -> Result<DeviceLane, Refusal> {
        let slot = self.slot(name)?;
        let view = slot.view();
        match (slot.lane(), &view.standing) {
            (Some(lane), Standing::Ready) => Ok(lane),
            (
                _,
                Standing::Ready
                | Standing::Quarantined
                | Standing::Hung(_)
                | Standing::Unavailable(_)
                | Standing::NotMigratable(_),
            ) => Err(Refusal::Device {
                device: name.clone(),
                problem: view.standing.detail(),
                reason: ErrorReason::OutOfService,
            }),
        }
    }

    /// A device's log is that of whoever started it, and while an operation has the device, of that operation's caller.
    fn check_log(&self, name: &DeviceName, caller: &Caller) -> Result<(), Refusal> {
        let slot = self.slot(name)?;
        if caller.roles.contains(roles::Role::Admin) {
            return Ok(());
        }
        let who = caller.identity.to_string();
        let lease = slot.leased_by().and_then(|operation| self.core.operations.get(&operation));
        let others = lease.is_some_and(|entry| entry.fixed.caller != who)
            || slot.log_owner().is_some_and(|owner| owner != who);
        if others { Err(Refusal::NotYourLog(name.clone())) } else { Ok(()) }
    }

    /// Runs `work` on a device's lane.
    async fn ask<T: Send + 'static>(
        &self,
        name: &DeviceName,
        call: Call,
        reason: ErrorReason,
        work: impl FnOnce(&mut Driver) -> Result<T, DeviceError> + Send + 'static,
    ) -> Result<T, Refusal> {
        let problem = match self.lane(name)?.start(call, work).finished().await {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(error)) => chain(&error),
            Err(hung) => hung.to_string(),
        };
        Err(Refusal::Device { device: name.clone(), problem, reason })
    }
}

/// What came of a reset.
#[derive(Debug)]
struct Done {
    view: DeviceView,
    state_lost: bool,
}

impl Core {
    /// Where what a device carries went on, or is about to, if it did: nothing runs under an epoch that is over.
    fn elsewhere(&self, name: &DeviceName, record: &DeviceRecord) -> Option<String> {
        if record.handed_over {
            return Some("what it carries was handed over to another agent, where it runs".to_owned());
        }
        let comes = |entry: &Arc<Entry>| {
            let mut devices = entry.fixed.devices.iter();
            !entry.fixed.job.gives()
                && devices.any(|device| device.device != *name && device.logical == record.logical)
        };
        if let Some(entry) = self.operations.active().into_iter().find(comes) {
            return Some(format!("{} brings what it carries into another device", entry.fixed.name));
        }
        let newest = self.registry.newest_epoch(&record.logical)?;
        (newest > record.epoch).then(|| {
            format!(
                "what it carries, in epoch {}, went on in epoch {newest} of the same logical device",
                record.epoch
            )
        })
    }

    /// Brings a device back, once for each request id.
    async fn reset(&self, spec: ResetSpec, caller: String, digest: [u8; 32]) -> Result<Done, Refusal> {
        let slot = self.registry.get(&spec.name).ok_or_else(|| Refusal::DeviceNotFound(spec.name.clone()))?;
        let key = spec.request_id.as_ref().map(|id| RequestKey { caller, request_id: id.to_string() });
        let _one = match &key {
            Some(key) => Some(self.operations.lock_request(key).await),
            None => None,
        };
        if let Some(record) = key.as_ref().and_then(|key| self.operations.request(key)) {
            return match record.answer {
                _ if record.digest != hex(&digest) => Err(Refusal::RequestIdReused),
                RequestAnswer::Reset { state_lost: Some(state_lost) } => {
                    Ok(Done { view: slot.refresh().await, state_lost })
                }
                RequestAnswer::Reset { state_lost: None } => Err(Refusal::ResetUnknown),
                RequestAnswer::Operation(_) => Err(Refusal::RequestIdReused),
            };
        }
        let now = self.environment.unix_now();
        // A name of its own, so that nobody else gets the device meanwhile.
        let lease_name = self.operations.new_name(now, &*self.environment.executor);
        // A restore that is admitted now is looked at below, and one that comes later finds the device leased, which counts as
        // running.
        let admitting = self.operations.admit_restore().await;
        let lease = self
            .registry
            .lease(vec![Arc::clone(slot)], &lease_name)
            .map_err(|leased| Refusal::Blocked(leased.into_iter().map(Into::into).collect()))?;
        drop(admitting);
        slot.read_back().await;
        let view = slot.view();
        let (Some(lane), Some(before)) = (slot.lane(), view.record.clone()) else {
            let problem = view.standing.detail();
            return Err(Refusal::Device { device: spec.name, problem, reason: ErrorReason::OutOfService });
        };
        if spec.mode == ResetMode::KeepState
            && let Some(elsewhere) = self.elsewhere(&spec.name, &before)
        {
            let problem = format!(
                "{elsewhere}: bringing it back here would make a second running copy; reset it with DISCARD_STATE"
            );
            return Err(Refusal::Device { device: spec.name, problem, reason: ErrorReason::OutOfService });
        }
        if spec.validate_only {
            return Ok(Done { view, state_lost: spec.mode == ResetMode::DiscardState });
        }
        let answer = |state_lost| RequestRecord {
            digest: hex(&digest),
            at: now,
            answer: RequestAnswer::Reset { state_lost },
        };
        // What lived in the device is given up before it is reset: were the agent killed in between, nobody would take what
        // is left for it.
        let lived = before.clone();
        let before = match spec.mode {
            ResetMode::KeepState => before,
            ResetMode::DiscardState => {
                DeviceRecord { logical: new_logical(&self.environment), epoch: Epoch(1), ..before }
            }
        };
        let mut begun = vec![Change::Device(spec.name.clone(), before.clone())];
        begun.extend(key.clone().map(|key| Change::Request(key, answer(None))));
        self.journal.commit(begun).await?;
        slot.set_record(before.clone());
        let reset = reset_on(&lane, spec.mode, before.quarantined).await;
        slot.read_back().await;
        let mut changes = Vec::new();
        if let Some(key) = key.clone() {
            changes.push(match &reset {
                Ok(outcome) => Change::Request(key, answer(Some(*outcome == Outcome::StateLost))),
                // A failed reset may be tried again under the same id.
                Err(_) => Change::ForgetRequest(key),
            });
        }
        let record = match &reset {
            // From here on it is known that what lived here runs here no more.
            Ok(Outcome::StateLost) if spec.mode == ResetMode::KeepState => {
                in_service(lived.after_discard(new_logical(&self.environment)))
            }
            Ok(Outcome::StateLost) => in_service(lived.after_discard(before.logical.clone())),
            Ok(Outcome::Preserved) => in_service(before.clone()),
            Err((_, quarantined)) => {
                DeviceRecord { quarantined: *quarantined || before.quarantined, ..before.clone() }
            }
        };
        changes.push(Change::Device(spec.name.clone(), record.clone()));
        // The device is reset: no way back from here. Nobody gets it before that is on record.
        self.commit_surely(changes).await;
        slot.set_record(record);
        if matches!(reset, Ok(Outcome::StateLost)) {
            // The log went with the state. Otherwise it may be running still, and is its owner's.
            slot.set_log_owner(None);
        }
        drop(lease);
        match reset {
            Ok(outcome) => {
                let state_lost = outcome == Outcome::StateLost;
                if let Some(key) = key {
                    self.operations.set_request(key, answer(Some(state_lost)));
                }
                Ok(Done { view: slot.refresh().await, state_lost })
            }
            Err((problem, _)) => {
                Err(Refusal::Device { device: spec.name, problem, reason: ErrorReason::ResetFailed })
            }
        }
    }
}

fn in_service(record: DeviceRecord) -> DeviceRecord {
    DeviceRecord { quarantined: false, left_stopped: false, ..record }
}

/// Brings a device back on its lane; where that fails, says why, and whether it is quarantined now.
async fn reset_on(lane: &DeviceLane, mode: ResetMode, quarantined: bool) -> Result<Outcome, (String, bool)> {
    let done = match mode {
        ResetMode::DiscardState => {
            lane.start(Call::Reset, |driver| driver.reset().map(|()| Outcome::StateLost)).finished().await
        }
        ResetMode::KeepState if quarantined => {
            // Somebody looked at it, and says that what it carries may run; the device has to agree.
            let brought_back = lane.start(Call::GetState, Driver::bring_back).finished().await;
            return match brought_back {
                Ok(Ok(())) => Ok(Outcome::Preserved),
                Ok(Err(failure)) => Err((chain(&failure), true)),
                Err(hung) => Err((hung.to_string(), true)),
            };
        }
        ResetMode::KeepState => {
            lane.start(Call::GetState, |driver| driver.recover_left_over(Role::Source)).finished().await
        }
    };
    match done {
        Ok(Ok(outcome)) => Ok(outcome),
        Ok(Err(failure)) => {
            let quarantined = failure.standing == vfio_checkpoint_device::Standing::Quarantined;
            Err((chain(&failure), quarantined))
        }
        Err(hung) => Err((hung.to_string(), true)),
    }
}

type Watching = Pin<Box<dyn Stream<Item = Result<v1::WatchDevicesResponse, Status>> + Send>>;

#[tonic::async_trait]
impl DeviceService for Devices {
    async fn list_devices(
        &self,
        request: Request<v1::ListDevicesRequest>,
    ) -> Result<Response<v1::ListDevicesResponse>, Status> {
        let Page { size, token } = spec(request.into_inner())?;
        let after = match token {
            Some(token) => Some(DeviceName::from_id(token.as_str()).map_err(|_| Refusal::PageToken)?),
            None => None,
        };
        let slots: Vec<&Arc<Slot>> = self.core.registry.after(after.as_ref()).take(size + 1).collect();
        let views = join_all(slots.iter().map(|slot| slot.refresh())).await;
        let (devices, more) = page(&views, size, messages::device);
        let last = views.get(devices.len().wrapping_sub(1)).filter(|_| more);
        let next_page_token = last.map(|view| view.name.id().to_owned()).unwrap_or_default();
        Ok(Response::new(v1::ListDevicesResponse { devices, next_page_token }))
    }

    async fn get_device(
        &self,
        request: Request<v1::GetDeviceRequest>,
    ) -> Result<Response<v1::GetDeviceResponse>, Status> {
        let name = device_name(&request.into_inner().name).map_err(Refusal::from)?;
        let view = self.slot(&name)?.refresh().await;
        Ok(Response::new(v1::GetDeviceResponse { device: Some(messages::device(&view)) }))
    }

    type WatchDevicesStream = Watching;

    async fn watch_devices(
        &self,
        request: Request<v1::WatchDevicesRequest>,
    ) -> Result<Response<Watching>, Status> {
        let WatchSpec { names } = spec(request.into_inner())?;
        let slots: Vec<Arc<Slot>> = if names.is_empty() {
            self.core.registry.all().cloned().collect()
        } else {
            names.iter().map(|name| self.slot(name).cloned()).collect::<Result<_, _>>()?
        };
        join_all(slots.iter().map(|slot| slot.refresh())).await;
        let mut changes = self.core.registry.changes();
        let (tell, told) = tokio::sync::mpsc::channel(1);
        self.core.tasks.spawn(async move {
            let mut seen: BTreeMap<DeviceName, u64> = BTreeMap::new();
            loop {
                changes.mark_unchanged();
                for slot in &slots {
                    let view = slot.view();
                    if seen.insert(view.name.clone(), view.revision) == Some(view.revision) {
                        continue;
                    }
                    let message = v1::WatchDevicesResponse { device: Some(messages::device(&view)) };
                    if tell.send(Ok(message)).await.is_err() {
                        return;
                    }
                }
                tokio::select! {
                    biased;
                    told = changes.changed() => if told.is_err() { return },
                    () = tell.closed() => return,
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(told))))
    }

    async fn reset_device(
        &self,
        request: Request<v1::ResetDeviceRequest>,
    ) -> Result<Response<v1::ResetDeviceResponse>, Status> {
        let (caller, wire) = open(request)?;
        let asked = Asked::new("ResetDevice", &wire.name).by_request(&wire.request_id);
        let validated = wire.validate_only;
        let done = async {
            let digest = body_digest(&wire);
            let spec: ResetSpec = spec(wire)?;
            let (core, who) = (Arc::clone(&self.core), caller.identity.to_string());
            to_its_end(&self.core.tasks, async move { core.reset(spec, who, digest).await }).await
        }
        .await;
        if !validated {
            audit(&caller, &asked, &done);
        }
        let Done { view, state_lost } = done?;
        Ok(Response::new(v1::ResetDeviceResponse { device: Some(messages::device(&view)), state_lost }))
    }

    async fn start_dirty_tracking(
        &self,
        request: Request<v1::StartDirtyTrackingRequest>,
    ) -> Result<Response<v1::StartDirtyTrackingResponse>, Status> {
        let (caller, wire) = open(request)?;
        let asked = Asked::new("StartDirtyTracking", &wire.name);
        let started = async {
            let DirtyTrackingSpec { name, page_bytes, ranges } = spec(wire)?;
            let ranges: Vec<IovaRange> =
                ranges.iter().filter_map(|range| IovaRange::new(range.start, range.length_bytes)).collect();
            self.check_log(&name, &caller)?;
            let work = move |driver: &mut Driver| driver.start_dma_log(page_bytes, &ranges);
            let page_bytes = self.ask(&name, Call::DmaLogStart, ErrorReason::DirtyTracking, work).await?;
            self.slot(&name)?.set_log_owner(Some(caller.identity.to_string()));
            Ok(page_bytes)
        }
        .await;
        audit(&caller, &asked, &started);
        Ok(Response::new(v1::StartDirtyTrackingResponse { page_bytes: started? }))
    }

    async fn report_dirty_pages(
        &self,
        request: Request<v1::ReportDirtyPagesRequest>,
    ) -> Result<Response<v1::ReportDirtyPagesResponse>, Status> {
        let (caller, wire) = open(request)?;
        let spec: DirtyReportSpec = spec(wire)?;
        self.check_log(&spec.name, &caller)?;
        let page_bytes = spec.page_bytes;
        let range = IovaRange::new(spec.range.start, spec.range.length_bytes)
            .ok_or_else(|| Refusal::invalid("range", "it is empty, or goes beyond the last address"))?;
        let work = move |driver: &mut Driver| driver.report_dma_log(range, page_bytes);
        let report = self.ask(&spec.name, Call::DmaLogReport, ErrorReason::DirtyTracking, work).await?;
        let (bitmap, all_dirty) = match report {
            DirtyReport::Pages(mut bitmap) => (bits(&mut bitmap), false),
            DirtyReport::AllDirty { .. } => (all_dirty(spec.pages()), true),
        };
        Ok(Response::new(v1::ReportDirtyPagesResponse { bitmap: Bytes::from(bitmap), all_dirty }))
    }

    async fn stop_dirty_tracking(
        &self,
        request: Request<v1::StopDirtyTrackingRequest>,
    ) -> Result<Response<v1::StopDirtyTrackingResponse>, Status> {
        let (caller, wire) = open(request)?;
        let stopped = async {
            let name = device_name(&wire.name)?;
            self.check_log(&name, &caller)?;
            self.ask(&name, Call::DmaLogStop, ErrorReason::DirtyTracking, Driver::stop_dma_log).await?;
            self.slot(&name)?.set_log_owner(None);
            Ok(())
        }
        .await;
        audit(&caller, &Asked::new("StopDirtyTracking", &wire.name), &stopped);
        stopped?;
        Ok(Response::new(v1::StopDirtyTrackingResponse {}))
    }
}

/// A bitmap as bytes, one bit a page, the first in the lowest bit of the first byte.
fn bits(bitmap: &mut DirtyBitmap) -> Vec<u8> {
    // At most 8 Mi pages are asked for.
    let bytes = usize::try_from(bitmap.pages().div_ceil(8)).unwrap_or(0);
    let mut bits: Vec<u8> = bitmap.words_mut().iter().flat_map(|word| word.to_le_bytes()).collect();
    bits.truncate(bytes);
    bits
}

/// A bitmap in which every page is dirty, and the bits beyond the last one are not.
fn all_dirty(pages: u64) -> Vec<u8> {
    // At most 8 Mi pages are asked for.
    let pages = usize::try_from(pages).unwrap_or(0);
    let mut bitmap = vec![0xff; pages.div_ceil(8)];
    if let (Some(last), rest @ 1..) = (bitmap.last_mut(), pages % 8) {
        *last = (1 << rest) - 1;
    }
    bitmap
}
