//! The agent on loopback as the source or the destination of a migration: what it was asked, and what tests have it say.

use std::sync::{Arc, Mutex};

use tonic::{Request, Response, Status};
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_proto::v1::migration_service_server::MigrationService;

pub(crate) const KEY: [u8; 32] = [7; 32];
pub(crate) const TICKET: [u8; 32] = [9; 32];
/// Of the destination, as it says it with a ticket.
pub(crate) const ITS_KEY: [u8; 32] = [5; 32];

#[derive(Clone, Default)]
pub(crate) struct Moves {
    pub(crate) admits: Arc<Mutex<Vec<v1::AdmitRequest>>>,
    pub(crate) migrations: Arc<Mutex<Vec<v1::MigrateRequest>>>,
    pub(crate) commits: Arc<Mutex<Vec<String>>>,
    pub(crate) readies: Arc<Mutex<Vec<String>>>,
    pub(crate) resolves: Arc<Mutex<Vec<v1::ResolveRequest>>>,
    /// What the next call of a name is answered, instead of what it would be.
    pub(crate) script: Arc<Mutex<Vec<(&'static str, Status)>>>,
    /// What a dry run finds.
    pub(crate) dry_run: Arc<Mutex<v1::MigrateResponse>>,
    /// What Resolve answers, but for the decision.
    pub(crate) evidence: Arc<Mutex<v1::ResolveResponse>>,
    /// Why each of the two decisions, to resume here and to let go, is not taken unless somebody answers for it.
    pub(crate) without_statement: Arc<Mutex<[&'static str; 2]>>,
}

impl Moves {
    pub(crate) fn refuse(&self, rpc: &'static str, status: Status) {
        self.script.lock().unwrap().push((rpc, status));
    }

    pub(crate) fn scripted(&self, rpc: &'static str) -> Result<(), Status> {
        let mut script = self.script.lock().unwrap();
        match script.iter().position(|(name, _)| *name == rpc) {
            Some(at) => Err(script.remove(at).1),
            None => Ok(()),
        }
    }
}

fn begun() -> v1::Operation {
    v1::Operation {
        name: "operations/1".to_owned(),
        kind: v1::OperationKind::Migration.into(),
        ..v1::Operation::default()
    }
}

fn between_agents<T>() -> Result<Response<T>, Status> {
    Err(Status::permission_denied("that is for agents"))
}

#[tonic::async_trait]
impl MigrationService for Moves {
    async fn get_agent(
        &self,
        _: Request<v1::GetAgentRequest>,
    ) -> Result<Response<v1::GetAgentResponse>, Status> {
        self.scripted("GetAgent")?;
        let node = "node1".to_owned();
        let key_sha256 = KEY.to_vec().into();
        Ok(Response::new(v1::GetAgentResponse { node, key_sha256, min_version: 1, max_version: 2 }))
    }

    async fn admit(&self, request: Request<v1::AdmitRequest>) -> Result<Response<v1::AdmitResponse>, Status> {
        self.admits.lock().unwrap().push(request.into_inner());
        self.scripted("Admit")?;
        let key_sha256 = ITS_KEY.to_vec().into();
        Ok(Response::new(v1::AdmitResponse { ticket: TICKET.to_vec().into(), expire_time: None, key_sha256 }))
    }

    async fn migrate(
        &self,
        request: Request<v1::MigrateRequest>,
    ) -> Result<Response<v1::MigrateResponse>, Status> {
        let request = request.into_inner();
        let is_dry = request.validate_only;
        self.migrations.lock().unwrap().push(request);
        self.scripted("Migrate")?;
        if is_dry {
            return Ok(Response::new(self.dry_run.lock().unwrap().clone()));
        }
        Ok(Response::new(v1::MigrateResponse { operation: Some(begun()), ..Default::default() }))
    }

    async fn commit(
        &self,
        request: Request<v1::CommitRequest>,
    ) -> Result<Response<v1::CommitResponse>, Status> {
        self.scripted("Commit")?;
        self.commits.lock().unwrap().push(request.into_inner().operation);
        Ok(Response::new(v1::CommitResponse { operation: Some(begun()) }))
    }

    async fn ready(&self, request: Request<v1::ReadyRequest>) -> Result<Response<v1::ReadyResponse>, Status> {
        self.scripted("Ready")?;
        self.readies.lock().unwrap().push(request.into_inner().operation);
        Ok(Response::new(v1::ReadyResponse { operation: Some(begun()) }))
    }

    async fn resolve(
        &self,
        request: Request<v1::ResolveRequest>,
    ) -> Result<Response<v1::ResolveResponse>, Status> {
        let request = request.into_inner();
        let without = *self.without_statement.lock().unwrap();
        let refused = match request.resolution() {
            v1::Resolution::ResumeHere if !request.peer_is_fenced => without[0],
            v1::Resolution::LetGo if !request.accept_loss => without[1],
            v1::Resolution::ResumeHere | v1::Resolution::LetGo => "",
            v1::Resolution::Unspecified => return Err(Status::invalid_argument("no resolution")),
        };
        self.resolves.lock().unwrap().push(request);
        self.scripted("Resolve")?;
        let evidence = self.evidence.lock().unwrap().clone();
        Ok(Response::new(v1::ResolveResponse { refused: refused.to_owned(), ..evidence }))
    }

    async fn prepare(&self, _: Request<v1::PrepareRequest>) -> Result<Response<v1::PrepareResponse>, Status> {
        between_agents()
    }

    async fn commit_handover(
        &self,
        _: Request<v1::CommitHandoverRequest>,
    ) -> Result<Response<v1::CommitHandoverResponse>, Status> {
        between_agents()
    }

    async fn abandon_handover(
        &self,
        _: Request<v1::AbandonHandoverRequest>,
    ) -> Result<Response<v1::AbandonHandoverResponse>, Status> {
        between_agents()
    }

    async fn get_handover(
        &self,
        _: Request<v1::GetHandoverRequest>,
    ) -> Result<Response<v1::GetHandoverResponse>, Status> {
        between_agents()
    }
}
