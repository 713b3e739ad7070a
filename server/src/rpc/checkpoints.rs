//! `CheckpointService`.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Extensions, Request, Response, Status, Streaming};
use vfio_checkpoint_client::transfer::{Link, LinkError};
use vfio_checkpoint_proto::digest::body_digest;
use vfio_checkpoint_proto::domain::{RestoreSpec, SaveRequestSpec, StreamOpen, StreamRole, operation_name};
use vfio_checkpoint_proto::ids::{KeyHash, RequestId};
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_proto::v1::checkpoint_service_server::CheckpointService;
use vfio_checkpoint_proto::v1::stream_message::Kind;
use vfio_checkpoint_proto::version::negotiate;

use super::{Asked, Refusal, audit, caller, messages, open, own_entry, say, spec, stored, to_its_end};
use crate::core::Core;
use crate::operation::record::{JobRecord, PeerRecord};
use crate::operation::{Entry, Opener, Starter};
use crate::security::authorize::Caller;
use crate::security::peers::PeerInfo;
use crate::security::roles::Role;
use crate::telemetry;
use crate::transfer::{Agreement, Attached};

/// How long the first message of a stream may take.
const OPEN_WITHIN: Duration = Duration::from_secs(10);

/// Saves and restores.
#[derive(Debug, Clone)]
pub struct Checkpoints {
    core: Arc<Core>,
}

impl Checkpoints {
    /// Those of `core`.
    pub fn new(core: Arc<Core>) -> Self {
        Self { core }
    }

    /// The role that an operation takes beside its being the caller's own: Resume and `StreamState` are for savers and
    /// restorers alike, and only the operation tells which.
    fn fits(caller: &Caller, entry: &Entry) -> Result<(), Refusal> {
        let (role, fits) = match entry.fixed.job {
            JobRecord::Save { .. } => ("saver", caller.roles.contains(Role::Saver)),
            JobRecord::Restore { .. } => ("restorer", caller.roles.contains(Role::Restorer)),
            JobRecord::Migrate { .. } => ("migrator", caller.roles.contains(Role::Migrator)),
            // Its stream is its source's alone, whatever else somebody may do here.
            JobRecord::Arrive { .. } => {
                let source = entry.fixed.peer.as_ref();
                let shown = PeerRecord::Source { key: KeyHash(caller.public_key_hash.0) };
                return if source == Some(&shown) {
                    Ok(())
                } else {
                    Err(Refusal::NotYours(entry.fixed.name.clone()))
                };
            }
        };
        if fits || caller.roles.contains(Role::Peer) || caller.roles.contains(Role::Admin) {
            Ok(())
        } else {
            Err(Refusal::RoleOfOperation { operation: entry.fixed.name.clone(), role })
        }
    }

    async fn attach(
        &self,
        caller: &Caller,
        peer: Option<PeerInfo>,
        mut incoming: impl Stream<Item = Result<v1::StreamMessage, Status>> + Send + Unpin + 'static,
        operation: &mut String,
    ) -> Result<mpsc::Receiver<v1::StreamMessage>, Refusal> {
        let first = tokio::select! {
            biased;
            first = incoming.next() => first.transpose(),
            () = self.core.environment.sleep(OPEN_WITHIN) => {
                let within = humantime::format_duration(OPEN_WITHIN);
                return Err(Refusal::StreamOpen(format!("no StreamOpen came within {within}")));
            }
        };
        let first = first
            .map_err(|status| Refusal::StreamOpen(format!("no StreamOpen came: {}", status.message())))?;
        let kind = first.and_then(|message| message.kind);
        let Some(Kind::Open(wire)) = kind else {
            return Err(Refusal::StreamOpen("the first message of a stream has to be StreamOpen".to_owned()));
        };
        operation.clone_from(&wire.operation);
        let open = StreamOpen::try_from(wire).map_err(|invalid| invalid.within("message.open"))?;
        let name = open.operation;
        let entry = own_entry(&self.core, &name, caller)?;
        Self::fits(caller, &entry)?;
        let (kind, role) = match entry.fixed.job {
            JobRecord::Save { .. } => ("save", StreamRole::Taker),
            JobRecord::Restore { .. } => ("restore", StreamRole::Giver),
            // It has none here, which is told when it is asked for.
            JobRecord::Migrate { .. } => ("migration", open.role),
            JobRecord::Arrive { .. } => ("arrival", StreamRole::Giver),
        };
        if open.role != role {
            let role = match role {
                StreamRole::Taker => "TAKER",
                StreamRole::Giver => "GIVER",
            };
            return Err(Refusal::StreamRole { operation: name, kind, role });
        }
        let version = negotiate(self.core.config.server.stream_versions(), open.versions)
            .map_err(|none| Refusal::NoCommonVersion(none.to_string()))?;
        let (outgoing, from_operation) = Link::outgoing_channel();
        let incoming = incoming.map(move |message| {
            // In words alone: the causes of a status are the internals of the connection, which say nothing to whoever
            // reads why an operation failed.
            message.map_err(|status| {
                LinkError::ended(match peer.as_ref().and_then(PeerInfo::cut_reason) {
                    Some(reason) => format!("this agent ended the caller's connection: {reason}"),
                    None => format!("the caller's stream failed: {}", status.message()),
                })
            })
        });
        let link = Link::new(incoming, outgoing.clone());
        let terms = Agreement::Ours { version, max_chunk_bytes: open.max_chunk_bytes, outgoing };
        let attached = Attached { link, terms, opener: caller.identity.to_string() };
        // An agent of version 1 knows of no resumption: to it every stream is a new one.
        let resumed = open.resume.filter(|_| version.resumes());
        let given = match resumed {
            Some(stream) => {
                let id = Opener { stream, identity: attached.opener.clone() };
                entry.resume_stream(&id, attached)
            }
            None => entry.attach(attached).map(|()| None),
        };
        if let Some(telling) = given.map_err(|refused| Refusal::Operation { operation: name, refused })? {
            self.core.tasks.spawn(telling);
        }
        Ok(from_operation)
    }

    /// Opens the stream that `incoming` asks for, of a caller whose connection these extensions describe: what is to be
    /// sent, message by message.
    pub(super) async fn stream(
        &self,
        extensions: &Extensions,
        incoming: impl Stream<Item = Result<v1::StreamMessage, Status>> + Send + Unpin + 'static,
    ) -> Result<mpsc::Receiver<v1::StreamMessage>, Status> {
        let caller = caller(extensions)?;
        let mut operation = String::new();
        let peer = extensions.get::<PeerInfo>().cloned();
        let attached = self.attach(&caller, peer, incoming, &mut operation).await;
        audit(&caller, &Asked::new("StreamState", &operation), &attached);
        Ok(attached?)
    }
}

/// Who starts an operation, by a request of this digest.
pub(super) fn starter(caller: &Caller, request_id: Option<RequestId>, digest: [u8; 32]) -> Starter {
    Starter {
        caller: caller.identity.to_string(),
        request: request_id.map(|id| (id, digest)),
        trace_id: telemetry::current_trace_id(),
    }
}

#[tonic::async_trait]
impl CheckpointService for Checkpoints {
    async fn start_save(
        &self,
        request: Request<v1::StartSaveRequest>,
    ) -> Result<Response<v1::StartSaveResponse>, Status> {
        let (caller, wire) = open(request)?;
        let asked = Asked::new("StartSave", wire.devices.join(",")).by_request(&wire.request_id);
        let validated = wire.validate_only;
        let started = async {
            let digest = body_digest(&wire);
            let spec: SaveRequestSpec = spec(wire)?;
            let starter = starter(&caller, spec.request_id.clone(), digest);
            let core = Arc::clone(&self.core);
            to_its_end(&self.core.tasks, async move { core.start_save(spec, starter).await }).await
        }
        .await;
        if !validated {
            audit(&caller, &asked, &started);
        }
        let started = started?;
        Ok(Response::new(v1::StartSaveResponse {
            operation: started.entry.as_deref().map(messages::operation),
            blockers: started.blockers.iter().map(messages::blocker).collect(),
            prediction: started.prediction.as_ref().map(messages::prediction),
        }))
    }

    type StreamStateStream = Pin<Box<dyn Stream<Item = Result<v1::StreamStateResponse, Status>> + Send>>;

    async fn stream_state(
        &self,
        request: Request<Streaming<v1::StreamStateRequest>>,
    ) -> Result<Response<Self::StreamStateStream>, Status> {
        // Reached only where the generated server is used without `Bulk`, which copies less.
        let (_, extensions, incoming) = request.into_parts();
        let incoming = incoming.map(|request| Ok(request?.message.unwrap_or_default()));
        let queue = self.stream(&extensions, incoming).await?;
        let messages =
            ReceiverStream::new(queue).map(|message| Ok(v1::StreamStateResponse { message: Some(message) }));
        Ok(Response::new(Box::pin(messages)))
    }

    async fn restore(
        &self,
        request: Request<v1::RestoreRequest>,
    ) -> Result<Response<v1::RestoreResponse>, Status> {
        let (caller, wire) = open(request)?;
        let asked = Asked::new("Restore", wire.devices.join(",")).by_request(&wire.request_id);
        let validated = wire.validate_only;
        let started = async {
            let digest = body_digest(&wire);
            let spec: RestoreSpec = spec(wire)?;
            let starter = starter(&caller, spec.request_id.clone(), digest);
            let core = Arc::clone(&self.core);
            to_its_end(&self.core.tasks, async move { core.start_restore(spec, starter).await }).await
        }
        .await;
        if !validated {
            audit(&caller, &asked, &started);
        }
        let started = started?;
        Ok(Response::new(v1::RestoreResponse {
            operation: started.entry.as_deref().map(messages::operation),
            blockers: started.blockers.iter().map(messages::blocker).collect(),
        }))
    }

    async fn cutover(
        &self,
        request: Request<v1::CutoverRequest>,
    ) -> Result<Response<v1::CutoverResponse>, Status> {
        let (caller, wire) = open(request)?;
        let said = say(&self.core, &caller, &wire.operation, Entry::cutover);
        audit(&caller, &Asked::new("Cutover", &wire.operation), &said);
        Ok(Response::new(v1::CutoverResponse { operation: Some(messages::operation(&*said?)) }))
    }

    async fn get_checkpoint(
        &self,
        request: Request<v1::GetCheckpointRequest>,
    ) -> Result<Response<v1::GetCheckpointResponse>, Status> {
        let (_, wire) = open(request)?;
        let checkpoint = stored::get(&self.core, &wire.name).await?;
        Ok(Response::new(v1::GetCheckpointResponse { checkpoint: Some(checkpoint) }))
    }

    async fn list_checkpoints(
        &self,
        request: Request<v1::ListCheckpointsRequest>,
    ) -> Result<Response<v1::ListCheckpointsResponse>, Status> {
        let (_, wire) = open(request)?;
        Ok(Response::new(stored::list(&self.core, spec(wire)?).await?))
    }

    async fn delete_checkpoint(
        &self,
        request: Request<v1::DeleteCheckpointRequest>,
    ) -> Result<Response<v1::DeleteCheckpointResponse>, Status> {
        let (caller, wire) = open(request)?;
        let deleted = stored::delete(&self.core, &wire.name, &caller).await;
        audit(&caller, &Asked::new("DeleteCheckpoint", &wire.name), &deleted);
        deleted?;
        Ok(Response::new(v1::DeleteCheckpointResponse {}))
    }

    type VerifyCheckpointStream = stored::Verification;

    async fn verify_checkpoint(
        &self,
        request: Request<v1::VerifyCheckpointRequest>,
    ) -> Result<Response<Self::VerifyCheckpointStream>, Status> {
        let (_, wire) = open(request)?;
        Ok(Response::new(stored::verify(&self.core, &wire.name).await?))
    }

    async fn resume(
        &self,
        request: Request<v1::ResumeRequest>,
    ) -> Result<Response<v1::ResumeResponse>, Status> {
        let (caller, wire) = open(request)?;
        let said = (|| {
            let name = operation_name("operation", &wire.operation)?;
            Self::fits(&caller, &*own_entry(&self.core, &name, &caller)?)?;
            say(&self.core, &caller, &wire.operation, Entry::resume)
        })();
        audit(&caller, &Asked::new("Resume", &wire.operation), &said);
        Ok(Response::new(v1::ResumeResponse { operation: Some(messages::operation(&*said?)) }))
    }
}
