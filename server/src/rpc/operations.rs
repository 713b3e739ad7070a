//! `OperationService`.

use std::pin::Pin;
use std::sync::Arc;

use futures_util::stream::unfold;
use tokio_stream::Stream;
use tonic::{Request, Response, Status};
use vfio_checkpoint_proto::domain::{OperationQuery, Page, WaitSpec, operation_name};
use vfio_checkpoint_proto::ids::OperationName;
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_proto::v1::operation_service_server::OperationService;

use super::{Asked, Refusal, audit, entry, messages, open, own_entry, page, spec};
use crate::core::Core;
use crate::operation::{Cancel, Entry, Operations};

/// The operations of the agent.
#[derive(Debug, Clone)]
pub struct OperationsService {
    core: Arc<Core>,
}

impl OperationsService {
    /// Those of `core`.
    pub fn new(core: Arc<Core>) -> Self {
        Self { core }
    }
}

type Watching = Pin<Box<dyn Stream<Item = Result<v1::WatchOperationResponse, Status>> + Send>>;

#[tonic::async_trait]
impl OperationService for OperationsService {
    async fn get_operation(
        &self,
        request: Request<v1::GetOperationRequest>,
    ) -> Result<Response<v1::GetOperationResponse>, Status> {
        let name = operation_name("name", &request.into_inner().name).map_err(Refusal::from)?;
        let entry = entry(&self.core, &name)?;
        Ok(Response::new(v1::GetOperationResponse { operation: Some(messages::operation(&entry)) }))
    }

    async fn list_operations(
        &self,
        request: Request<v1::ListOperationsRequest>,
    ) -> Result<Response<v1::ListOperationsResponse>, Status> {
        let OperationQuery { page: Page { size, token }, active_only, device } = spec(request.into_inner())?;
        let before = match token {
            Some(token) => Some(OperationName::from_id(token.as_str()).map_err(|_| Refusal::PageToken)?),
            None => None,
        };
        let wanted = |entry: &Entry| {
            let active = !active_only || !entry.is_done();
            active && device.as_ref().is_none_or(|device| Operations::is_about(entry, device))
        };
        let found = self.core.operations.page(before.as_ref(), wanted, size + 1);
        let (operations, more) = page(&found, size, |entry| messages::operation(entry));
        let last = found.get(operations.len().wrapping_sub(1)).filter(|_| more);
        let next_page_token = last.map(|entry| entry.fixed.name.id().to_owned()).unwrap_or_default();
        Ok(Response::new(v1::ListOperationsResponse { operations, next_page_token }))
    }

    async fn cancel_operation(
        &self,
        request: Request<v1::CancelOperationRequest>,
    ) -> Result<Response<v1::CancelOperationResponse>, Status> {
        let (caller, wire) = open(request)?;
        let cancelled = (|| {
            let name = operation_name("name", &wire.name)?;
            let entry = own_entry(&self.core, &name, &caller)?;
            let by = caller.identity.to_string();
            entry
                .cancel(Cancel::Requested { by })
                .map_err(|refused| Refusal::Operation { operation: name, refused })?;
            Ok::<_, Refusal>(entry)
        })();
        audit(&caller, &Asked::new("CancelOperation", &wire.name), &cancelled);
        Ok(Response::new(v1::CancelOperationResponse { operation: Some(messages::operation(&*cancelled?)) }))
    }

    async fn wait_operation(
        &self,
        request: Request<v1::WaitOperationRequest>,
    ) -> Result<Response<v1::WaitOperationResponse>, Status> {
        let WaitSpec { name, timeout } = spec(request.into_inner())?;
        let entry = entry(&self.core, &name)?;
        let mut changes = entry.changes();
        // The sender is in the entry, so waiting fails only with the agent.
        let done =
            async { changes.wait_for(|view| view.end.is_some()).await.map(|_| ()).unwrap_or_default() };
        match timeout {
            Some(timeout) => tokio::select! {
                biased;
                () = done => {}
                () = self.core.environment.sleep(timeout) => {}
            },
            None => done.await,
        }
        Ok(Response::new(v1::WaitOperationResponse { operation: Some(messages::operation(&entry)) }))
    }

    type WatchOperationStream = Watching;

    async fn watch_operation(
        &self,
        request: Request<v1::WatchOperationRequest>,
    ) -> Result<Response<Watching>, Status> {
        let name = operation_name("name", &request.into_inner().name).map_err(Refusal::from)?;
        let entry = entry(&self.core, &name)?;
        let mut changes = entry.changes();
        changes.mark_changed();
        // It ends with the message that says `done`, and not with the entry, which is kept long after.
        let watching = unfold(Some((entry, changes)), |watched| async move {
            let (entry, mut changes) = watched?;
            changes.changed().await.ok()?;
            let now = messages::operation_at(&entry, &changes.borrow_and_update());
            let on = (!now.done).then_some((entry, changes));
            Some((Ok(v1::WatchOperationResponse { operation: Some(now) }), on))
        });
        Ok(Response::new(Box::pin(watching)))
    }
}
