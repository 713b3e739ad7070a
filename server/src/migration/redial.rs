//! The stream to a destination, again over another connection.

use std::sync::Arc;

use vfio_checkpoint_client::transfer::{
    DialOptions, OpenStreamError, Redial, Redialing, Spool, SpoolError, SpoolOptions, dial_with,
};
use vfio_checkpoint_device::chain;
use vfio_checkpoint_proto::domain::StreamRole;
use vfio_checkpoint_proto::ids::{OperationName, StreamId};

use crate::core::Core;
use crate::operation::Entry;

/// Calls the destination of a migration anew, with the certificate that is in force then: a connection of which nobody
/// knows yet that it is dead must not be what is waited for.
pub(crate) struct RedialDestination {
    pub(crate) core: Arc<Core>,
    pub(crate) entry: Arc<Entry>,
}

impl Redial for RedialDestination {
    fn redial(&mut self, stream: StreamId) -> Redialing<'_> {
        Box::pin(async move {
            let operation = self.entry.view().handover.and_then(|handover| handover.record.operation);
            let (Some(peer), Some(operation)) = (&self.entry.fixed.peer, operation) else {
                return Err(OpenStreamError::Ended);
            };
            let operation: OperationName = operation;
            // Whatever it is, it may pass: the destination was there when the stream began.
            let client = self.core.dial_admitted(peer).await.map_err(|error| {
                tracing::warn!(error = %chain(&error), "the destination is not reached again yet");
                OpenStreamError::Ended
            })?;
            let options =
                DialOptions { versions: self.core.config.server.stream_versions(), resume: Some(stream) };
            let dialed = dial_with(&client, &operation, StreamRole::Giver, options).await?;
            self.entry.hand_over(|handover| handover.record.reconnects += 1);
            Ok(dialed)
        })
    }
}

/// What may have to be sent to a destination again.
pub(crate) async fn spool(core: &Core) -> Result<Spool, SpoolError> {
    let limits = &core.config.limits;
    Spool::open(SpoolOptions {
        memory_bytes: limits.spool_memory_bytes,
        disk_bytes: limits.spool_disk_bytes,
        folder: core.config.node.state_dir.clone(),
    })
    .await
}
