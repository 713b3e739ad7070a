//! The gate before every handler: a tower layer that lets a request pass or answers it.
//!
//! ```text
//!   request (PeerInfo, path) -> no PeerInfo, or cut     -> UNAUTHENTICATED    CERTIFICATE_REQUIRED, CERTIFICATE_ENDED
//!                            -> roles::decide: unknown  -> PERMISSION_DENIED  UNKNOWN_METHOD
//!                                              role     -> PERMISSION_DENIED  ROLE_REQUIRED (roles that would do)
//!                                              allowed  -> Caller into the extensions -> handler
//! ```
//!
//! It is a layer and not a check in each handler, so that no handler can forget it. A caller without any role
//! and a caller with the wrong ones get the same answer. Each denial, and each allowed call that changes
//! something, is one audit line. Reasons are part of the contract: they never change their spelling.

use std::collections::HashMap;
use std::future::{Ready, ready};
use std::net::SocketAddr;
use std::task::{Context, Poll};
use std::time::SystemTime;

use futures_util::future::Either;
use tonic::{Code, Status};
use tonic_types::StatusExt;
use tower::{Layer, Service};
use vfio_checkpoint_proto::v1::ErrorReason;

use super::audit::{AuditLine, AuditResult};
use super::identity::{Identity, PublicKeyHash};
use super::peers::PeerInfo;
use super::roles::{Decision, Effect, PolicyHandle, RoleSet, decide, join};
use crate::reason::error_info;

/// Who makes a request. In the extensions of every request that reaches a handler.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// Who it is.
    pub identity: Identity,
    /// What it may do.
    pub roles: RoleSet,
    /// Names its key.
    pub public_key_hash: PublicKeyHash,
    /// Where it calls from.
    pub address: SocketAddr,
}

/// Puts the gate before a service.
#[derive(Debug, Clone)]
pub struct AuthorizeLayer {
    policy: PolicyHandle,
}

impl AuthorizeLayer {
    /// A gate under this policy, whatever it becomes.
    pub fn new(policy: PolicyHandle) -> Self {
        Self { policy }
    }
}

impl<S> Layer<S> for AuthorizeLayer {
    type Service = Authorize<S>;

    fn layer(&self, inner: S) -> Authorize<S> {
        Authorize { inner, policy: self.policy.clone() }
    }
}

/// A service behind the gate.
#[derive(Debug, Clone)]
pub struct Authorize<S> {
    inner: S,
    policy: PolicyHandle,
}

impl<S, RequestBody, ResponseBody> Service<http::Request<RequestBody>> for Authorize<S>
where
    S: Service<http::Request<RequestBody>, Response = http::Response<ResponseBody>>,
    ResponseBody: Default,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Either<S::Future, Ready<Result<S::Response, S::Error>>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: http::Request<RequestBody>) -> Self::Future {
        let peer = request.extensions().get::<PeerInfo>();
        match gate(peer, request.uri().path(), &self.policy) {
            Ok(caller) => {
                request.extensions_mut().insert(caller);
                Either::Left(self.inner.call(request))
            }
            Err(denied) => Either::Right(ready(Ok(denied.into_http()))),
        }
    }
}

/// Decides about one request and writes its audit line.
fn gate(peer: Option<&PeerInfo>, path: &str, policy: &PolicyHandle) -> Result<Caller, Box<Status>> {
    let caller = peer.map(|peer| Caller {
        identity: peer.certificate.identity.clone(),
        roles: policy.current().roles_of(&peer.certificate.identity),
        public_key_hash: peer.certificate.public_key_hash,
        address: peer.address,
    });
    let line = |result| {
        let (caller, address) = (caller.as_ref(), caller.as_ref().map(|caller| caller.address));
        let time = SystemTime::now();
        AuditLine { time, caller, address, what: path, resource: None, result, request_id: None }.emit();
    };
    let deny = |code, reason: ErrorReason, message: String, metadata: HashMap<String, String>| {
        line(AuditResult::Denied { reason: reason.as_reason() });
        let details = error_info(reason, metadata);
        Err(Box::new(Status::with_error_details(code, message, details)))
    };
    let (Some(peer), Some(caller)) = (peer, &caller) else {
        let message = "a client certificate is required; connect with mutual TLS".to_owned();
        return deny(Code::Unauthenticated, ErrorReason::CertificateRequired, message, HashMap::new());
    };
    if let Some(reason) = peer.cut_reason() {
        let message =
            format!("the client certificate is no longer accepted ({reason}); connect with a new one");
        return deny(Code::Unauthenticated, ErrorReason::CertificateEnded, message, HashMap::new());
    }
    match decide(path, caller.roles) {
        Decision::Allowed(rule) => {
            match rule.effect {
                Effect::Reads => {}
                Effect::Mutates => line(AuditResult::Allowed),
            }
            Ok(caller.clone())
        }
        Decision::RoleRequired(roles) => {
            let roles = join(roles.iter().copied());
            let message = format!(
                "{} may not call {path}: it needs one of the roles {roles}; ask an administrator for a grant",
                caller.identity
            );
            deny(
                Code::PermissionDenied,
                ErrorReason::RoleRequired,
                message,
                HashMap::from([("roles".to_owned(), roles)]),
            )
        }
        Decision::UnknownMethod => {
            let message =
                "this agent knows no such method; compare the versions of client and agent".to_owned();
            deny(Code::PermissionDenied, ErrorReason::UnknownMethod, message, HashMap::new())
        }
    }
}
