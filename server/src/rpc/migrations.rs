//! `MigrationService`.
//!
//! What a call decides has its audit line also where the caller hangs up before it hears how that ended: whoever waits for
//! a device, or for a journal, may be gone by then. The two that a source says again and again, `CommitHandover` and
//! `GetHandover` with `settled`, have one line for what they bring about, however often they come.

use std::sync::Arc;

use tonic::{Request, Response, Status};
use tracing::Instrument as _;
use vfio_checkpoint_proto::digest::body_digest;
use vfio_checkpoint_proto::domain::{AdmitSpec, MigrateSpec, operation_name};
use vfio_checkpoint_proto::ids::KeyHash;
use vfio_checkpoint_proto::proof::Claim;
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_proto::v1::migration_service_server::MigrationService;

use super::{Asked, Asker, Refusal, audit, audit_stating, messages, open, say, spec, to_its_end};
use crate::core::Core;
use crate::migration::ended;
use crate::operation::{Entry, Starter};
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

    /// Runs a change to its end, and writes the audit line of how it ended; none where nothing is decided.
    async fn audited<T: Send + 'static>(
        &self,
        caller: &Caller,
        line: Option<Asked>,
        change: impl Future<Output = Result<T, Refusal>> + Send + 'static,
    ) -> Result<T, Refusal> {
        let caller = caller.clone();
        let change = async move {
            let done = change.await;
            if let Some(asked) = line {
                audit(&caller, &asked, &done);
            }
            done
        };
        to_its_end(&self.core.tasks, change).await
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
        let asked = Asked::new("Admit", wire.devices.join(","));
        let admitted = (|| {
            let spec: AdmitSpec = spec(wire)?;
            self.core.admit_source(spec, caller.identity.to_string())
        })();
        audit(&caller, &asked, &admitted);
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
        let line = (!wire.validate_only)
            .then(|| Asked::new("Migrate", wire.devices.join(",")).by_request(&wire.request_id));
        let (core, by) = (Arc::clone(&self.core), caller.clone());
        let starting = Box::pin(async move {
            let digest = body_digest(&wire);
            let spec: MigrateSpec = spec(wire)?;
            let starter = super::checkpoints::starter(&by, spec.save.request_id.clone(), digest);
            core.start_migration(spec, starter).await
        });
        let started = self.audited(&caller, line, starting).await?;
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
        let said = say(&self.core, &caller, &wire.operation, Entry::commit);
        audit(&caller, &Asked::new("Commit", &wire.operation), &said);
        Ok(Response::new(v1::CommitResponse { operation: Some(messages::operation(&*said?)) }))
    }

    async fn ready(&self, request: Request<v1::ReadyRequest>) -> Result<Response<v1::ReadyResponse>, Status> {
        let (caller, wire) = open(request)?;
        let line = Some(Asked::new("Ready", &wire.operation));
        let (core, by) = (Arc::clone(&self.core), caller.identity.to_string());
        let is_admin = caller.roles.contains(Role::Admin);
        let said = self.audited(&caller, line, async move {
            let name = operation_name("operation", &wire.operation)?;
            core.ready(&name, &by, is_admin).await
        });
        Ok(Response::new(v1::ReadyResponse { operation: Some(messages::operation(&*said.await?)) }))
    }

    async fn resolve(
        &self,
        request: Request<v1::ResolveRequest>,
    ) -> Result<Response<v1::ResolveResponse>, Status> {
        let (caller, wire) = open(request)?;
        // What was decided, and what is answered for, belongs into the audit line.
        let resource = format!(
            "{} {} fenced={} accept_loss={}",
            wire.operation,
            wire.resolution().as_str_name(),
            wire.peer_is_fenced,
            wire.accept_loss
        );
        let line = Asked::new("Resolve", resource);
        let (statement, decides) = (wire.statement.clone(), !wire.validate_only);
        let (core, by) = (Arc::clone(&self.core), caller.identity.to_string());
        let (waits, asker) = Asker::waiting();
        let resolving = async move {
            let resolved = async { core.resolve(spec(wire)?, by, asker).await }.await;
            if decides {
                audit_stating(&caller, &line, &statement, &resolved);
            }
            resolved
        };
        let resolved = to_its_end(&self.core.tasks, resolving).await?;
        drop(waits);
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
        let line = (!wire.validate_only).then(|| Asked::new("Prepare", wire.devices.join(",")));
        let (core, key) = (Arc::clone(&self.core), key(&caller));
        let starter = Starter {
            caller: caller.identity.to_string(),
            request: None,
            trace_id: telemetry::current_trace_id(),
        };
        let prepared = self.audited(&caller, line, async move {
            let body = body_digest(&wire);
            core.prepare(spec(wire)?, body, starter, key).await
        });
        let prepared = prepared.await?;
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
        let asked = Asked::new("CommitHandover", &wire.operation);
        let said = spec(wire).and_then(|spec| self.core.commit_handover(spec, &caller.identity.to_string()));
        if said.is_err() {
            audit(&caller, &asked, &said);
        }
        let entry = said?;
        if entry.signals.is_first_commit() {
            // Said again it is the same decision, of whoever said it first. Only this one waits where nobody else does.
            let (entry, caller) = (Arc::clone(&entry), caller.clone());
            let line = async move {
                ended(&entry).await;
                audit(&caller, &asked, &Ok(()));
            };
            self.core.tasks.spawn(line.in_current_span());
        }
        let (record, proof) = messages::proven_record(&ended(&entry).await);
        Ok(Response::new(v1::CommitHandoverResponse { handover: Some(record), proof }))
    }

    async fn abandon_handover(
        &self,
        request: Request<v1::AbandonHandoverRequest>,
    ) -> Result<Response<v1::AbandonHandoverResponse>, Status> {
        let (caller, wire) = open(request)?;
        let told = (|| {
            let name = operation_name("operation", &wire.operation)?;
            let claim = Claim::new(&wire, &wire.proof)?;
            // It ends up in logs and in the operation's failure.
            let reason =
                wire.reason.chars().take(1024).map(|c| if c.is_control() { ' ' } else { c }).collect();
            self.core.abandon_handover(&name, &caller.identity.to_string(), &claim, reason)
        })();
        audit(&caller, &Asked::new("AbandonHandover", &wire.operation), &told);
        let (record, proof) = messages::proven_record(&told?);
        Ok(Response::new(v1::AbandonHandoverResponse { handover: Some(record), proof }))
    }

    async fn get_handover(
        &self,
        request: Request<v1::GetHandoverRequest>,
    ) -> Result<Response<v1::GetHandoverResponse>, Status> {
        let (caller, wire) = open(request)?;
        let told = if wire.settled {
            let (core, caller) = (Arc::clone(&self.core), caller.clone());
            let settling = async move {
                let settled = async {
                    let name = operation_name("operation", &wire.operation)?;
                    let claim = Claim::new(&wire, &wire.proof)?;
                    core.settle_handover(&name, &caller.identity.to_string(), &claim).await
                };
                let settled = settled.await;
                // Its source asks until it is over, and after that nothing changes any more.
                if !matches!(settled, Ok((_, false))) {
                    audit(&caller, &Asked::new("GetHandover settled", &wire.operation), &settled);
                }
                Ok(settled?.0)
            };
            to_its_end(&self.core.tasks, settling).await?
        } else {
            // Read, and nothing more. Others than the source may look, who have nothing to prove.
            let name = operation_name("operation", &wire.operation).map_err(Refusal::from)?;
            let claim = (!wire.proof.is_empty()).then(|| Claim::new(&wire, &wire.proof)).transpose();
            let by = caller.identity.to_string();
            self.core.handover(&name, &by, claim.map_err(Refusal::from)?.as_ref())?
        };
        let (record, proof) = messages::proven_record(&told);
        Ok(Response::new(v1::GetHandoverResponse { handover: Some(record), proof }))
    }
}
