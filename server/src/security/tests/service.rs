//! The gate before a real gRPC server, with the health service behind it, over real connections.

use std::io;
use std::sync::{LazyLock, Mutex};

use http::uri::PathAndQuery;
use hyper_util::rt::TokioIo;
use tokio::task::JoinHandle;
use tonic::transport::{Channel, Endpoint, Server, Uri};
use tonic::{Code, Request, Status};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};
use tonic_prost::ProstCodec;
use tonic_types::StatusExt;
use tracing::Dispatch;
use tracing::subscriber::DefaultGuard;

use super::super::authorize::{AuthorizeLayer, Caller};
use super::super::roles::{Policy, PolicyHandle};
use super::*;

const LIST: &str = "/vfio.checkpoint.v1.DeviceService/ListDevices";
const RESET: &str = "/vfio.checkpoint.v1.DeviceService/ResetDevice";
const CHECK: &str = "/grpc.health.v1.Health/Check";
const WATCH: &str = "/grpc.health.v1.Health/Watch";

/// A running agent, as far as its door and its gate go.
struct Agent {
    world: World,
    address: SocketAddr,
    policy: PolicyHandle,
    server: JoinHandle<()>,
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Agent {
    async fn start(world: World) -> Self {
        let policy = PolicyHandle::new(
            serde_json::from_str(
                r#"{"grants": [
                    {"who": "spiffe://lab.example/viewer", "roles": ["viewer"]},
                    {"who": "spiffe://lab.example/admin", "roles": ["admin"]}
                ]}"#,
            )
            .unwrap(),
        );
        let door = world.open().await;
        let (reporter, health) = tonic_health::server::health_reporter();
        reporter.set_service_status("", tonic_health::ServingStatus::Serving).await;
        let gated = Server::builder().layer(AuthorizeLayer::new(policy.clone()));
        let (address, incoming) = (door.address, door.incoming);
        let server = tokio::spawn(async move {
            gated.serve_with_incoming(health, incoming).await.unwrap();
            // Its task would hold the health state as long.
            drop(reporter);
        });
        Self { world, address, policy, server }
    }

    async fn channel(&self, certificate: &LabCertificate) -> Channel {
        let (address, client) = (self.address, self.world.client(Some(certificate)));
        let connect = move |_: Uri| {
            let client = client.clone();
            async move { Ok::<_, io::Error>(TokioIo::new(dial(address, client).await?)) }
        };
        let endpoint = Endpoint::from_static("http://agent.example");
        soon(endpoint.connect_with_connector(tower::service_fn(connect))).await.unwrap()
    }

    async fn call(
        &self,
        certificate: &LabCertificate,
        path: &'static str,
    ) -> Result<HealthCheckResponse, Status> {
        let mut grpc = tonic::client::Grpc::new(self.channel(certificate).await);
        grpc.ready().await.unwrap();
        let request = Request::new(HealthCheckRequest::default());
        let codec: ProstCodec<HealthCheckRequest, HealthCheckResponse> = ProstCodec::default();
        soon(grpc.unary(request, PathAndQuery::from_static(path), codec))
            .await
            .map(tonic::Response::into_inner)
    }
}

/// Takes what this thread logs, as JSON lines.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Lines {
    fn capture() -> (Self, DefaultGuard) {
        // While at most one subscriber lives, tracing asks the thread that comes first whether an event is wanted,
        // and remembers a no for all threads. Two that never end, and it asks every subscriber.
        static NEVER_ALONE: LazyLock<[Dispatch; 2]> = LazyLock::new(|| {
            [(); 2].map(|()| Dispatch::new(tracing_subscriber::fmt().with_writer(io::sink).finish()))
        });
        LazyLock::force(&NEVER_ALONE);
        let lines = Self::default();
        let writer = lines.clone();
        let subscriber = tracing_subscriber::fmt().json().with_writer(move || writer.clone()).finish();
        (lines, tracing::subscriber::set_default(subscriber))
    }

    /// The audit lines so far: who, what, result, reason, roles.
    fn audit(&self) -> Vec<[String; 5]> {
        let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        text.lines()
            .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
            .filter(|line| line["target"] == "audit")
            .map(|line| {
                // A field that there is nothing for is not there, and not empty.
                let field = |name: &str| match line["fields"].get(name) {
                    Some(value) => value.as_str().filter(|value| !value.is_empty()).unwrap().to_owned(),
                    None => String::new(),
                };
                assert!(line["fields"]["time_unix_ms"].as_u64().unwrap() > 0);
                ["who", "what", "result", "reason", "roles"].map(field)
            })
            .collect()
    }
}

fn reason(status: &Status) -> (String, String) {
    let info = status.get_details_error_info().unwrap();
    assert_eq!(info.domain, "vfio.checkpoint.v1");
    (info.reason, info.metadata.get("roles").cloned().unwrap_or_default())
}

#[tokio::test]
async fn the_gate_lets_pass_what_the_table_says_and_audits() {
    let (lines, _guard) = Lines::capture();
    let agent = Agent::start(World::new()).await;
    let [nobody, viewer, admin] = ["/nobody", "/viewer", "/admin"].map(|path| agent.world.peer(path));

    // Health is for whoever is known, even without a role.
    let healthy = agent.call(&nobody, CHECK).await.unwrap();
    assert_eq!(healthy.status, i32::from(ServingStatus::Serving));
    // Past the gate there is no such service here, and that is what a caller with the role hears.
    assert_eq!(agent.call(&viewer, LIST).await.unwrap_err().code(), Code::Unimplemented);
    assert!(lines.audit().is_empty(), "reads that are allowed are not audited: {:?}", lines.audit());
    assert_eq!(agent.call(&admin, RESET).await.unwrap_err().code(), Code::Unimplemented);

    let denied = agent.call(&nobody, LIST).await.unwrap_err();
    assert_eq!(denied.code(), Code::PermissionDenied);
    assert_eq!(
        reason(&denied),
        ("ROLE_REQUIRED".to_owned(), "viewer,saver,restorer,migrator,admin".to_owned())
    );
    let denied = agent.call(&viewer, RESET).await.unwrap_err();
    assert_eq!(reason(&denied), ("ROLE_REQUIRED".to_owned(), "admin".to_owned()));
    assert!(denied.message().contains("spiffe://lab.example/viewer"), "{denied}");

    let unknown = "/vfio.checkpoint.v1.DeviceService/Explode";
    let denied = agent.call(&admin, unknown).await.unwrap_err();
    assert_eq!(denied.code(), Code::PermissionDenied);
    assert_eq!(reason(&denied).0, "UNKNOWN_METHOD");

    let line = |path: &str, what: &str, result: &str, reason: &str, roles: &str| {
        [&format!("spiffe://lab.example{path}"), what, result, reason, roles].map(str::to_owned)
    };
    assert_eq!(
        lines.audit(),
        [
            line("/admin", RESET, "allowed", "", "admin"),
            line("/nobody", LIST, "denied", "ROLE_REQUIRED", ""),
            line("/viewer", RESET, "denied", "ROLE_REQUIRED", "viewer"),
            line("/admin", unknown, "denied", "UNKNOWN_METHOD", "admin"),
        ]
    );
}

#[tokio::test]
async fn a_new_policy_holds_for_the_next_request() {
    let agent = Agent::start(World::new()).await;
    let viewer = agent.world.peer("/viewer");
    assert_eq!(agent.call(&viewer, LIST).await.unwrap_err().code(), Code::Unimplemented);
    agent.policy.replace(Policy::default());
    assert_eq!(agent.call(&viewer, LIST).await.unwrap_err().code(), Code::PermissionDenied);
}

#[tokio::test]
async fn a_running_stream_ends_when_its_peer_is_revoked() {
    let agent = Agent::start(World::with_crl()).await;
    let (bad, good) = (agent.world.peer("/bad"), agent.world.peer("/good"));
    let mut streams = Vec::new();
    for certificate in [&bad, &good] {
        let mut grpc = tonic::client::Grpc::new(agent.channel(certificate).await);
        grpc.ready().await.unwrap();
        let codec: ProstCodec<HealthCheckRequest, HealthCheckResponse> = ProstCodec::default();
        let request = Request::new(HealthCheckRequest::default());
        let answer = grpc.server_streaming(request, PathAndQuery::from_static(WATCH), codec);
        let mut stream = soon(answer).await.unwrap().into_inner();
        assert!(soon(stream.message()).await.unwrap().is_some());
        streams.push(stream);
    }
    let (mut kept, mut cut) = (streams.pop().unwrap(), streams.pop().unwrap());
    agent.world.revoke(&[&bad.serial]);
    agent.world.source.reload().await.unwrap();
    soon(cut.message()).await.unwrap_err();
    let mut next = Box::pin(kept.message());
    assert!(futures_util::poll!(next.as_mut()).is_pending());
    // And there is no way back in.
    let refusal = soon(async {
        let mut stream = dial(agent.address, agent.world.client(Some(&bad))).await?;
        stream.read(&mut [0]).await
    });
    assert!(refusal.await.unwrap_err().to_string().contains("CertificateRevoked"));
}

#[tokio::test]
async fn a_handler_sees_its_caller_until_the_connection_is_cut() {
    use tonic::transport::server::Connected;
    use tower::{Layer, ServiceExt};
    let world = World::with_crl();
    let mut door = world.open().await;
    let peer = world.peer("/a");
    let (_stream, mut connection) = door.enter(world.client(Some(&peer))).await;
    let info = connection.connect_info();
    let (expected, seen) = (info.certificate.clone(), Arc::new(Mutex::new(Vec::new())));
    let see = seen.clone();
    let handler = tower::service_fn(move |request: http::Request<()>| {
        see.lock().unwrap().push(request.extensions().get::<Caller>().cloned());
        async { Ok::<_, std::convert::Infallible>(http::Response::new(tonic::body::Body::empty())) }
    });
    let call = || {
        let mut request = http::Request::builder().uri(CHECK).body(()).unwrap();
        request.extensions_mut().insert(info.clone());
        AuthorizeLayer::new(PolicyHandle::default()).layer(handler.clone()).oneshot(request)
    };
    call().await.unwrap();
    let caller = seen.lock().unwrap().pop().unwrap().unwrap();
    assert_eq!((caller.identity, caller.public_key_hash), (spiffe("/a"), expected.public_key_hash));
    assert!(caller.roles.is_empty());
    // A request that was read before the cut and comes to the gate after it.
    world.revoke(&[&peer.serial]);
    world.source.reload().await.unwrap();
    soon(connection.read(&mut [0])).await.unwrap_err();
    let status = Status::from_header_map(call().await.unwrap().headers()).unwrap();
    assert_eq!(status.code(), Code::Unauthenticated);
    assert_eq!(reason(&status).0, "CERTIFICATE_ENDED");
    assert!(seen.lock().unwrap().is_empty());
}

#[tokio::test]
async fn without_a_verified_connection_nothing_passes() {
    use tower::{Layer, ServiceExt};
    let (lines, _guard) = Lines::capture();
    let reached = tower::service_fn(|request: http::Request<()>| async move {
        assert!(request.extensions().get::<Caller>().is_some(), "a request without a caller got through");
        Ok::<_, std::convert::Infallible>(http::Response::new(tonic::body::Body::empty()))
    });
    // A path that would forge a second audit line, if it were written as it is.
    for path in [CHECK, LIST, "/x/%0Aaudit", "/unknown/method"] {
        let request = http::Request::builder().uri(path).body(()).unwrap();
        let gate = AuthorizeLayer::new(PolicyHandle::default()).layer(reached);
        let response = gate.oneshot(request).await.unwrap();
        let status = Status::from_header_map(response.headers()).unwrap();
        assert_eq!(status.code(), Code::Unauthenticated);
        assert_eq!(reason(&status).0, "CERTIFICATE_REQUIRED");
    }
    assert_eq!(lines.audit().len(), 4);
    assert!(lines.audit().iter().all(|line| line[0].is_empty() && line[2] == "denied"));
}

#[tokio::test]
async fn a_handler_writes_what_became_of_it_and_cannot_be_made_to_write_more() {
    use super::super::audit::{AuditResult, record};
    use super::super::identity::PeerCertificate;
    let (lines, _guard) = Lines::capture();
    let world = World::new();
    let certificate = PeerCertificate::from_der(&world.peer("/a").der).unwrap();
    let caller = Caller {
        identity: certificate.identity,
        roles: [super::super::roles::Role::Saver].into_iter().collect(),
        public_key_hash: certificate.public_key_hash,
        address: "192.0.2.1:7443".parse().unwrap(),
    };
    let forged = format!("save\n{{\"target\":\"audit\"}}{}", "x".repeat(1000));
    record(&caller, &forged, "devices/d0", None, "", AuditResult::Failed { reason: "DEVICE_LEASED" });
    let [line] = &lines.audit()[..] else { panic!("one line: {:?}", lines.audit()) };
    assert_eq!(line[0], "spiffe://lab.example/a");
    assert!(line[1].starts_with("save\\n{") && line[1].len() < 300, "{}", line[1]);
    assert_eq!(line[2..], ["failed", "DEVICE_LEASED", "saver"]);
}
