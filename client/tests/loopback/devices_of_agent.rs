//! The devices of the agent on loopback: one, `devices/a`, and what was asked of it.

use std::pin::Pin;
use std::sync::{Arc, Mutex};

use tokio_stream::Stream;
use tonic::{Request, Response, Status};
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_proto::v1::device_service_server::DeviceService;

#[derive(Clone, Default)]
pub(crate) struct DevicesOfAgent {
    pub(crate) resets: Arc<Mutex<Vec<v1::ResetDeviceRequest>>>,
    pub(crate) reports: Arc<Mutex<Vec<v1::ReportDirtyPagesRequest>>>,
    /// Its device changes all the time, so that a watch does not end.
    pub(crate) is_restless: Arc<Mutex<bool>>,
    /// What lives in the device.
    pub(crate) logical: Arc<Mutex<Option<v1::LogicalDevice>>>,
    /// How each watch ends; after the last it ends well.
    pub(crate) watch_ends: Arc<Mutex<Vec<Status>>>,
}

fn device(state: v1::MigrationState) -> v1::Device {
    v1::Device {
        name: "devices/a".to_owned(),
        driver: "mlx5_vfio_pci".to_owned(),
        state: state.into(),
        standing: v1::DeviceStanding::Ready.into(),
        ..Default::default()
    }
}

#[tonic::async_trait]
impl DeviceService for DevicesOfAgent {
    async fn list_devices(
        &self,
        _: Request<v1::ListDevicesRequest>,
    ) -> Result<Response<v1::ListDevicesResponse>, Status> {
        let devices = vec![device(v1::MigrationState::Running)];
        Ok(Response::new(v1::ListDevicesResponse { devices, ..Default::default() }))
    }

    async fn get_device(
        &self,
        _: Request<v1::GetDeviceRequest>,
    ) -> Result<Response<v1::GetDeviceResponse>, Status> {
        let logical_device = self.logical.lock().unwrap().clone();
        let device = v1::Device { logical_device, ..device(v1::MigrationState::Stop) };
        Ok(Response::new(v1::GetDeviceResponse { device: Some(device) }))
    }

    type WatchDevicesStream = Pin<Box<dyn Stream<Item = Result<v1::WatchDevicesResponse, Status>> + Send>>;

    async fn watch_devices(
        &self,
        _: Request<v1::WatchDevicesRequest>,
    ) -> Result<Response<Self::WatchDevicesStream>, Status> {
        let changes = [v1::MigrationState::Running, v1::MigrationState::StopCopy];
        let changes = changes.map(|state| Ok(v1::WatchDevicesResponse { device: Some(device(state)) }));
        if *self.is_restless.lock().unwrap() {
            return Ok(Response::new(Box::pin(tokio_stream::iter(changes.into_iter().cycle()))));
        }
        let end = self.watch_ends.lock().unwrap().pop();
        let all: Vec<_> = changes.into_iter().chain(end.map(Err)).collect();
        Ok(Response::new(Box::pin(tokio_stream::iter(all))))
    }

    async fn reset_device(
        &self,
        request: Request<v1::ResetDeviceRequest>,
    ) -> Result<Response<v1::ResetDeviceResponse>, Status> {
        let request = request.into_inner();
        let state_lost = request.mode() == v1::ResetMode::DiscardState;
        self.resets.lock().unwrap().push(request);
        let device = Some(device(v1::MigrationState::Running));
        Ok(Response::new(v1::ResetDeviceResponse { device, state_lost }))
    }

    async fn start_dirty_tracking(
        &self,
        request: Request<v1::StartDirtyTrackingRequest>,
    ) -> Result<Response<v1::StartDirtyTrackingResponse>, Status> {
        // The device chooses another size than the one that is asked for.
        let page_bytes = request.into_inner().page_bytes * 2;
        Ok(Response::new(v1::StartDirtyTrackingResponse { page_bytes }))
    }

    /// The first page of each call is dirty.
    async fn report_dirty_pages(
        &self,
        request: Request<v1::ReportDirtyPagesRequest>,
    ) -> Result<Response<v1::ReportDirtyPagesResponse>, Status> {
        let request = request.into_inner();
        let pages = request.range.unwrap().length_bytes / request.page_bytes;
        let mut bitmap = vec![0; usize::try_from(pages.div_ceil(8)).unwrap()];
        bitmap[0] = 1;
        self.reports.lock().unwrap().push(request);
        Ok(Response::new(v1::ReportDirtyPagesResponse { bitmap: bitmap.into(), all_dirty: false }))
    }

    async fn stop_dirty_tracking(
        &self,
        _: Request<v1::StopDirtyTrackingRequest>,
    ) -> Result<Response<v1::StopDirtyTrackingResponse>, Status> {
        Ok(Response::new(v1::StopDirtyTrackingResponse {}))
    }
}
