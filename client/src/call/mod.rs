//! Typed calls to an agent, each with a deadline, a policy for trying again, and errors that say everything.
//!
//! ```text
//!   Client::start_save(request) -> deadline, traceparent -> attempt -> UNAVAILABLE and repeatable? -> attempt ...
//!                                                                   -> answer | CallError
//! ```
//!
//! Invariants:
//! - No call is without a deadline. Streams have one for being opened; then keepalive watches them.
//! - Reads are repeated after UNAVAILABLE. A call that changes something is repeated only with a `request_id`, under
//!   which the agent does it once; without one it is made once.
//!
//! Failure paths: see [`CallError`].

mod error;
mod health;
mod ids;
mod retry;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};
use tonic::metadata::MetadataValue;
use tonic::transport::Channel;
use tonic::{Request, Response, Status, Streaming};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_proto::v1::checkpoint_service_client::CheckpointServiceClient;
use vfio_checkpoint_proto::v1::device_service_client::DeviceServiceClient;
use vfio_checkpoint_proto::v1::migration_service_client::MigrationServiceClient;
use vfio_checkpoint_proto::v1::operation_service_client::OperationServiceClient;

pub use error::{CallError, FieldProblem, Refusal, Violation, code_name, printable};
pub use health::{Health, Serving};
pub use ids::{BadTraceParent, TraceParent, new_request_id};
pub use retry::{Jitter, RetryPolicy};

use crate::connect::{self, ConnectError, ConnectOptions, Standing};

/// How calls are made.
#[derive(Debug, Clone)]
pub struct CallOptions {
    /// For one call with all its attempts.
    pub deadline: Duration,
    /// When it is made again.
    pub retry: RetryPolicy,
    /// What spreads callers that failed together.
    pub jitter: Jitter,
    /// The trace that calls belong to.
    pub trace: Option<TraceParent>,
}

impl Default for CallOptions {
    fn default() -> Self {
        Self {
            deadline: Duration::from_secs(30),
            retry: RetryPolicy::default(),
            jitter: Jitter::default(),
            trace: None,
        }
    }
}

/// A connection to an agent. Clones share it.
#[derive(Debug, Clone)]
pub struct Client {
    channel: Channel,
    standing: watch::Receiver<Standing>,
    options: Arc<CallOptions>,
}

macro_rules! unary {
    ($($(#[$doc:meta])* $service:ident . $method:ident = $rpc:literal ($request:ident) -> $response:ident,
       repeatable: |$seen:ident| $repeatable:expr;)*) => {
        impl Client {
            $($(#[$doc])*
            pub async fn $method(&self, request: v1::$request) -> Result<v1::$response, CallError> {
                let $seen = &request;
                let is_repeatable = $repeatable;
                let service = $service::new(self.channel.clone());
                self.unary($rpc, self.options.deadline, request, is_repeatable, |request| {
                    let mut service = service.clone();
                    async move { service.$method(request).await }
                })
                .await
            })*
        }
    };
}

unary! {
    /// One page of the agent's devices.
    DeviceServiceClient.list_devices = "ListDevices" (ListDevicesRequest) -> ListDevicesResponse,
        repeatable: |_request| true;
    /// Reads one device back.
    DeviceServiceClient.get_device = "GetDevice" (GetDeviceRequest) -> GetDeviceResponse,
        repeatable: |_request| true;
    /// Brings a device back to RUNNING, with its state or without it.
    DeviceServiceClient.reset_device = "ResetDevice" (ResetDeviceRequest) -> ResetDeviceResponse,
        repeatable: |request| request.validate_only || !request.request_id.is_empty();
    /// Starts a device's log of dirty pages.
    DeviceServiceClient.start_dirty_tracking = "StartDirtyTracking"
        (StartDirtyTrackingRequest) -> StartDirtyTrackingResponse, repeatable: |_request| false;
    /// Reads and clears a device's log of dirty pages. It is never repeated: what an answer that was lost had cleared
    /// would be missing from the next.
    DeviceServiceClient.report_dirty_pages = "ReportDirtyPages"
        (ReportDirtyPagesRequest) -> ReportDirtyPagesResponse, repeatable: |_request| false;
    /// Ends a device's log of dirty pages.
    DeviceServiceClient.stop_dirty_tracking = "StopDirtyTracking"
        (StopDirtyTrackingRequest) -> StopDirtyTrackingResponse, repeatable: |_request| false;
    /// Admits a save.
    CheckpointServiceClient.start_save = "StartSave" (StartSaveRequest) -> StartSaveResponse,
        repeatable: |request| request.validate_only || !request.request_id.is_empty();
    /// Admits a restore.
    CheckpointServiceClient.restore = "Restore" (RestoreRequest) -> RestoreResponse,
        repeatable: |request| request.validate_only || !request.request_id.is_empty();
    /// Stops the devices of a save now.
    CheckpointServiceClient.cutover = "Cutover" (CutoverRequest) -> CutoverResponse,
        repeatable: |_request| false;
    /// Ends a hold.
    CheckpointServiceClient.resume = "Resume" (ResumeRequest) -> ResumeResponse,
        repeatable: |_request| false;
    /// One checkpoint of a store.
    CheckpointServiceClient.get_checkpoint = "GetCheckpoint" (GetCheckpointRequest) -> GetCheckpointResponse,
        repeatable: |_request| true;
    /// One page of a store's checkpoints.
    CheckpointServiceClient.list_checkpoints = "ListCheckpoints" (ListCheckpointsRequest) -> ListCheckpointsResponse,
        repeatable: |_request| true;
    /// Deletes a checkpoint. It is never repeated: where an answer was lost, the next would say that there is none.
    CheckpointServiceClient.delete_checkpoint = "DeleteCheckpoint"
        (DeleteCheckpointRequest) -> DeleteCheckpointResponse, repeatable: |_request| false;
    /// Who an agent is.
    MigrationServiceClient.get_agent = "GetAgent" (GetAgentRequest) -> GetAgentResponse,
        repeatable: |_request| true;
    /// Asks a destination to let a source in. Repeated, it makes a second ticket, and nobody uses the first.
    MigrationServiceClient.admit = "Admit" (AdmitRequest) -> AdmitResponse, repeatable: |_request| true;
    /// Moves devices to another agent.
    MigrationServiceClient.migrate = "Migrate" (MigrateRequest) -> MigrateResponse,
        repeatable: |request| request.validate_only || !request.request_id.is_empty();
    /// Lets the destination of a migration run the devices.
    MigrationServiceClient.commit = "Commit" (CommitRequest) -> CommitResponse, repeatable: |_request| false;
    /// Says that whoever uses the devices of an arrival is ready.
    MigrationServiceClient.ready = "Ready" (ReadyRequest) -> ReadyResponse, repeatable: |_request| false;
    /// Ends a migration that is in doubt.
    MigrationServiceClient.resolve = "Resolve" (ResolveRequest) -> ResolveResponse,
        repeatable: |request| request.validate_only;
    /// From agent to agent: leases the devices of a ticket.
    MigrationServiceClient.prepare = "Prepare" (PrepareRequest) -> PrepareResponse, repeatable: |_request| true;
    /// From agent to agent: run the devices. The answer is the same however often it is asked for.
    MigrationServiceClient.commit_handover = "CommitHandover" (CommitHandoverRequest) -> CommitHandoverResponse,
        repeatable: |_request| true;
    /// From agent to agent: the source gives up.
    MigrationServiceClient.abandon_handover = "AbandonHandover" (AbandonHandoverRequest) -> AbandonHandoverResponse,
        repeatable: |_request| true;
    /// What a destination has on record.
    MigrationServiceClient.get_handover = "GetHandover" (GetHandoverRequest) -> GetHandoverResponse,
        repeatable: |_request| true;
    /// Reads one operation.
    OperationServiceClient.get_operation = "GetOperation" (GetOperationRequest) -> GetOperationResponse,
        repeatable: |_request| true;
    /// One page of operations.
    OperationServiceClient.list_operations = "ListOperations" (ListOperationsRequest) -> ListOperationsResponse,
        repeatable: |_request| true;
    /// Asks for an operation to be undone.
    OperationServiceClient.cancel_operation = "CancelOperation" (CancelOperationRequest) -> CancelOperationResponse,
        repeatable: |_request| false;
}

impl Client {
    /// Connects, and returns when the agent has accepted the client certificate.
    pub async fn connect(options: &ConnectOptions) -> Result<Self, ConnectError> {
        let (channel, standing) = connect::connect(options).await?;
        Ok(Self { channel, standing, options: Arc::new(CallOptions::default()) })
    }

    /// The same connection with other call options.
    #[must_use]
    pub fn with_call_options(mut self, options: CallOptions) -> Self {
        self.options = Arc::new(options);
        self
    }

    /// Returns when an operation is done or `limit` is over, with the operation as it is.
    pub async fn wait_operation(
        &self,
        name: &str,
        limit: Duration,
    ) -> Result<v1::WaitOperationResponse, CallError> {
        let request = v1::WaitOperationRequest {
            name: name.to_owned(),
            timeout: prost_types::Duration::try_from(limit).ok(),
        };
        let service = OperationServiceClient::new(self.channel.clone());
        // The agent answers after `limit` at the latest; the usual time for a call comes on top.
        let deadline = limit.saturating_add(self.options.deadline);
        self.unary("WaitOperation", deadline, request, true, |request| {
            let mut service = service.clone();
            async move { service.wait_operation(request).await }
        })
        .await
    }

    /// First every device as it is, then each change.
    pub async fn watch_devices(
        &self,
        request: v1::WatchDevicesRequest,
    ) -> Result<Watch<v1::WatchDevicesResponse>, CallError> {
        let service = DeviceServiceClient::new(self.channel.clone());
        self.watch("WatchDevices", request, |request| {
            let mut service = service.clone();
            async move { service.watch_devices(request).await }
        })
        .await
    }

    /// First the operation as it is, then each change, until it is done.
    pub async fn watch_operation(
        &self,
        request: v1::WatchOperationRequest,
    ) -> Result<Watch<v1::WatchOperationResponse>, CallError> {
        let service = OperationServiceClient::new(self.channel.clone());
        self.watch("WatchOperation", request, |request| {
            let mut service = service.clone();
            async move { service.watch_operation(request).await }
        })
        .await
    }

    /// Reads all of a checkpoint and compares every digest: how far that is, and what was found last.
    pub async fn verify_checkpoint(
        &self,
        request: v1::VerifyCheckpointRequest,
    ) -> Result<Watch<v1::VerifyCheckpointResponse>, CallError> {
        let service = CheckpointServiceClient::new(self.channel.clone());
        self.watch("VerifyCheckpoint", request, |request| {
            let mut service = service.clone();
            async move { service.verify_checkpoint(request).await }
        })
        .await
    }

    /// How the agent says it is.
    pub async fn health(&self) -> Result<Health, CallError> {
        let service = HealthClient::new(self.channel.clone());
        let request = HealthCheckRequest { service: String::new() };
        let call = |request| {
            let mut service = service.clone();
            async move { service.check(request).await }
        };
        let answer = self.attempts("Check", self.options.deadline, request, true, true, call).await?;
        Ok(Health::read(&answer))
    }

    async fn watch<Q, R, F>(
        &self,
        rpc: &'static str,
        message: Q,
        call: impl Fn(Request<Q>) -> F,
    ) -> Result<Watch<R>, CallError>
    where
        Q: Clone,
        F: Future<Output = Result<Response<Streaming<R>>, Status>>,
    {
        let answer = self.attempts(rpc, self.options.deadline, message, true, false, call).await?;
        Ok(Watch { rpc, stream: answer.into_inner(), client: self.clone() })
    }

    async fn unary<Q, R, F>(
        &self,
        rpc: &'static str,
        limit: Duration,
        message: Q,
        is_repeatable: bool,
        call: impl Fn(Request<Q>) -> F,
    ) -> Result<R, CallError>
    where
        Q: Clone,
        F: Future<Output = Result<Response<R>, Status>>,
    {
        self.attempts(rpc, limit, message, is_repeatable, true, call).await.map(Response::into_inner)
    }

    async fn attempts<Q, R, F>(
        &self,
        rpc: &'static str,
        limit: Duration,
        message: Q,
        is_repeatable: bool,
        has_wire_deadline: bool,
        call: impl Fn(Request<Q>) -> F,
    ) -> Result<Response<R>, CallError>
    where
        Q: Clone,
        F: Future<Output = Result<Response<R>, Status>>,
    {
        let deadline = Instant::now() + limit;
        let is_refused =
            || matches!(&*self.standing.borrow(), Standing::Failed(error) if error.is_about_the_caller());
        let attempts = retry::retry(
            &self.options.retry,
            &self.options.jitter,
            deadline,
            is_repeatable,
            is_refused,
            || {
                let mut request = self.request(message.clone());
                if has_wire_deadline {
                    // The agent is told what is left, not what there was. A stream lives on, so it is told nothing.
                    request.set_timeout(deadline.saturating_duration_since(Instant::now()));
                }
                call(request)
            },
        );
        match timeout_at(deadline, attempts).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(_)) if Instant::now() >= deadline => Err(CallError::Deadline { rpc, after: limit }),
            Ok(Err(status)) => Err(self.failed(rpc, &status)),
            Err(_) => Err(CallError::Deadline { rpc, after: limit }),
        }
    }

    /// A request with the trace that it belongs to.
    pub(crate) fn request<Q>(&self, message: Q) -> Request<Q> {
        let mut request = Request::new(message);
        let trace =
            self.options.trace.as_ref().and_then(|trace| MetadataValue::try_from(trace.as_str()).ok());
        if let Some(trace) = trace {
            request.metadata_mut().insert("traceparent", trace);
        }
        request
    }

    /// What a status means, with what the connection knows.
    pub(crate) fn failed(&self, rpc: &'static str, status: &Status) -> CallError {
        if retry::is_local(status)
            && let Standing::Failed(error) = &*self.standing.borrow()
        {
            return CallError::NotConnected { rpc, source: Box::new(error.clone()) };
        }
        CallError::Refused(Box::new(Refusal::from_status(rpc, status)))
    }

    pub(crate) fn channel(&self) -> Channel {
        self.channel.clone()
    }

    pub(crate) fn options(&self) -> &CallOptions {
        &self.options
    }
}

/// A stream of changes.
#[derive(Debug)]
pub struct Watch<R> {
    rpc: &'static str,
    stream: Streaming<R>,
    client: Client,
}

impl<R> Watch<R> {
    /// The next change; `None` when the agent has no more to say. Cancel-safe.
    pub async fn next(&mut self) -> Result<Option<R>, CallError> {
        self.stream.message().await.map_err(|status| self.client.failed(self.rpc, &status))
    }
}
