//! `MigrationService`.

use std::sync::Arc;

use tonic::{Request, Response, Status};
use vfio_checkpoint_proto::digest::body_digest;
use vfio_checkpoint_proto::domain::{
    AdmitSpec, CommitHandoverSpec, MigrateSpec, PrepareSpec, ResolveSpec, operation_name, secret,
};
use vfio_checkpoint_proto::ids::KeyHash;
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_proto::v1::migration_service_server::MigrationService;

use super::{Refusal, audit, messages, open, own_entry, spec, to_its_end};
use crate::core::Core;
use crate::operation::{Entry, Refused, Starter};
use crate::security::authorize::Caller;
use crate::security::roles::Role;
use crate::telemetry;

/// Devices from node to node.
#[derive(Debug, Clone)]
pub struct Migrations {
    core: Arc<Core>,
}

impl Migrations {
    /// Those of `core`.
    pub fn new(core: Arc<Core>) -> Self {
        Self { core }
    }

    /// Says something to an operation on behalf of its caller.
    fn say(
        &self,
        caller: &Caller,
        operation: &str,
        say: impl FnOnce(&Entry) -> Result<(), Refused>,
    ) -> Result<Arc<Entry>, Refusal> {
        let name = operation_name("operation", operation)?;
        let entry = own_entry(&self.core, &name, caller)?;
        say(&entry).map_err(|refused| Refusal::Operation { operation: name, refused })?;
        Ok(entry)
    }
}

fn key(caller: &Caller) -> KeyHash {
    KeyHash(caller.public_key_hash.0)
}

fn key_bytes(key: Option<KeyHash>) -> bytes::Bytes {
    key.map(|key| bytes::Bytes::copy_from_slice(&key.0)).unwrap_or_default()
}

#[tonic::async_trait]
impl MigrationService for Migrations {
    async fn get_agent(
        &self,
        _request: Request<v1::GetAgentRequest>,
    ) -> Result<Response<v1::GetAgentResponse>, Status> {
        Ok(Response::new(v1::GetAgentResponse {
            node: self.core.config.node.name.clone(),
            key_sha256: key_bytes(self.core.own_key()),
            min_version: self.core.config.server.stream_versions().min().0,
            max_version: self.core.config.server.stream_versions().max().0,
        }))
    }

    async fn admit(&self, request: Request<v1::AdmitRequest>) -> Result<Response<v1::AdmitResponse>, Status> {
        let (caller, wire) = open(request)?;
        let resource = wire.devices.join(",");
        let admitted = (|| {
            let spec: AdmitSpec = spec(wire)?;
            self.core.admit_source(spec, caller.identity.to_string())
        })();
        audit(&caller, "Admit", &resource, &admitted);
        let admitted = admitted?;
        Ok(Response::new(v1::AdmitResponse {
            ticket: bytes::Bytes::copy_from_slice(&admitted.ticket.0),
            expire_time: Some(admitted.until.timestamp()),
            key_sha256: key_bytes(admitted.key),
        }))
    }

    async fn migrate(
        &self,
        request: Request<v1::MigrateRequest>,
    ) -> Result<Response<v1::MigrateResponse>, Status> {
        let (caller, wire) = open(request)?;
        let resource = wire.devices.join(",");
        let validated = wire.validate_only;
        let started = async {
            let digest = body_digest(&wire);
            let spec: MigrateSpec = spec(wire)?;
            let starter = super::checkpoints::starter(&caller, spec.save.request_id.clone(), digest);
            let core = Arc::clone(&self.core);
            to_its_end(&self.core.tasks, async move { core.start_migration(spec, starter).await }).await
        }
        .await;
        if !validated {
            audit(&caller, "Migrate", &resource, &started);
        }
        let started = started?;
        Ok(Response::new(v1::MigrateResponse {
            operation: started.entry.as_deref().map(messages::operation),
            blockers: started.blockers.iter().map(messages::migration_blocker).collect(),
            prediction: messages::migration_prediction(&started),
        }))
    }

    async fn commit(
        &self,
        request: Request<v1::CommitRequest>,
    ) -> Result<Response<v1::CommitResponse>, Status> {
        let (caller, wire) = open(request)?;
        let said = self.say(&caller, &wire.operation, Entry::commit);
        audit(&caller, "Commit", &wire.operation, &said);
        Ok(Response::new(v1::CommitResponse { operation: Some(messages::operation(&*said?)) }))
    }

    async fn ready(&self, request: Request<v1::ReadyRequest>) -> Result<Response<v1::ReadyResponse>, Status> {
        let (caller, wire) = open(request)?;
        let said = async {
            let name = operation_name("operation", &wire.operation)?;
            let (core, by) = (Arc::clone(&self.core), caller.identity.to_string());
            let is_admin = caller.roles.contains(Role::Admin);
            to_its_end(&self.core.tasks, async move { core.ready(&name, &by, is_admin).await }).await
        }
        .await;
        audit(&caller, "Ready", &wire.operation, &said);
        Ok(Response::new(v1::ReadyResponse { operation: Some(messages::operation(&*said?)) }))
    }

    async fn resolve(
        &self,
        request: Request<v1::ResolveRequest>,
    ) -> Result<Response<v1::ResolveResponse>, Status> {
        let (caller, wire) = open(request)?;
        // What was decided, and what is answered for, belongs into the audit line.
        let resource = format!(
            "{} {} fenced={} accept_loss={} {}",
            wire.operation,
            wire.resolution().as_str_name(),
            wire.peer_is_fenced,
            wire.accept_loss,
            wire.statement.escape_default().take(1024).collect::<String>()
        );
        let validated = wire.validate_only;
        let resolved = async {
            let spec: ResolveSpec = spec(wire)?;
            let (core, by) = (Arc::clone(&self.core), caller.identity.to_string());
            to_its_end(&self.core.tasks, async move { core.resolve(spec, by).await }).await
        }
        .await;
        if !validated {
            audit(&caller, "Resolve", &resource, &resolved);
        }
        let resolved = resolved?;
        let (destination, destination_error) = match resolved.destination {
            Ok(told) => (Some(told), String::new()),
            Err(error) => (None, error),
        };
        Ok(Response::new(v1::ResolveResponse {
            operation: Some(messages::operation(&resolved.entry)),
            destination,
            destination_error,
            refused: resolved.refused.map(|why| why.to_string()).unwrap_or_default(),
            source_devices: resolved.devices.iter().map(messages::source_device).collect(),
        }))
    }

    async fn prepare(
        &self,
        request: Request<v1::PrepareRequest>,
    ) -> Result<Response<v1::PrepareResponse>, Status> {
        let (caller, wire) = open(request)?;
        let resource = wire.devices.join(",");
        let validated = wire.validate_only;
        let prepared = async {
            let body = body_digest(&wire);
            let spec: PrepareSpec = spec(wire)?;
            let starter = Starter {
                caller: caller.identity.to_string(),
                request: None,
                trace_id: telemetry::current_trace_id(),
            };
            let (core, key) = (Arc::clone(&self.core), key(&caller));
            to_its_end(&self.core.tasks, async move { core.prepare(spec, body, starter, key).await }).await
        }
        .await;
        if !validated {
            audit(&caller, "Prepare", &resource, &prepared);
        }
        let prepared = prepared?;
        let entry = prepared.entry.as_deref();
        let secret =
            entry.and_then(|entry| entry.view().handover).and_then(|handover| handover.record.secret);
        Ok(Response::new(v1::PrepareResponse {
            operation: entry.map(|entry| entry.fixed.name.to_string()).unwrap_or_default(),
            blockers: prepared.blockers.iter().map(messages::blocker).collect(),
            version: prepared.version.map_or(0, |version| version.0),
            epochs: entry
                .map(|entry| entry.fixed.devices.iter().map(|device| device.epoch.0).collect())
                .unwrap_or_default(),
            secret: secret.map(|secret| bytes::Bytes::copy_from_slice(&secret.0)).unwrap_or_default(),
        }))
    }

    async fn commit_handover(
        &self,
        request: Request<v1::CommitHandoverRequest>,
    ) -> Result<Response<v1::CommitHandoverResponse>, Status> {
        let (caller, wire) = open(request)?;
        let resource = wire.operation.clone();
        let told = async {
            let spec: CommitHandoverSpec = spec(wire)?;
            self.core.commit_handover(spec, &caller.identity.to_string()).await
        }
        .await;
        audit(&caller, "CommitHandover", &resource, &told);
        Ok(Response::new(v1::CommitHandoverResponse { handover: Some(messages::handover_record(&told?)) }))
    }

    async fn abandon_handover(
        &self,
        request: Request<v1::AbandonHandoverRequest>,
    ) -> Result<Response<v1::AbandonHandoverResponse>, Status> {
        let (caller, wire) = open(request)?;
        let told = (|| {
            let name = operation_name("operation", &wire.operation)?;
            let secret = secret(&wire.secret)?;
            // It ends up in logs and in the operation's failure.
            let reason =
                wire.reason.chars().take(1024).map(|c| if c.is_control() { ' ' } else { c }).collect();
            self.core.abandon_handover(&name, &caller.identity.to_string(), &secret, reason)
        })();
        audit(&caller, "AbandonHandover", &wire.operation, &told);
        Ok(Response::new(v1::AbandonHandoverResponse { handover: Some(messages::handover_record(&told?)) }))
    }

    async fn get_handover(
        &self,
        request: Request<v1::GetHandoverRequest>,
    ) -> Result<Response<v1::GetHandoverResponse>, Status> {
        let (caller, wire) = open(request)?;
        let told = async {
            let name = operation_name("operation", &wire.operation)?;
            if !wire.settled {
                return self.core.handover(&name);
            }
            let secret = secret(&wire.secret)?;
            self.core.settle_handover(&name, &caller.identity.to_string(), &secret).await
        }
        .await;
        Ok(Response::new(v1::GetHandoverResponse { handover: Some(messages::handover_record(&told?)) }))
    }
}
