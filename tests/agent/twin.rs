//! Somebody with the identity of the destination, and a key of its own, to whom a name or an address leads: whatever it says
//! about a hand-over moves nothing.
//!
//! ```text
//!   source: COMMITTING on record --relay--> twin: REFUSED, or COMMITTED, to whatever it is asked    in doubt
//!                                --relay--> destination                                             its answer ends it
//!   source: let go of --relay--> twin: NOT_FOUND, to whatever it is told      --relay--> destination    told, and runs it
//! ```

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::Body as _;
use prost::Message as _;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tonic::body::Body;
use tonic::codegen::http::{Request, Response};
use tonic::server::NamedService;
use tonic::transport::Server;
use tower::Service;
use vfio_checkpoint_fsm::State;
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_server::environment::Environment;
use vfio_checkpoint_server::security::accept::{AcceptLimits, Listener};
use vfio_checkpoint_server::security::clock::EnvironmentClock;
use vfio_checkpoint_server::security::peers::{PeerLimits, PeerRegistry};
use vfio_checkpoint_server::security::reload::TlsSource;

use crate::flow::{done, failure, soon};
use crate::lab::{Lab, validity};
use crate::migrations::{moved, prepared, when};
use crate::pair::{Pair, key};
use crate::peers::prepared_over;
use crate::relay::{Fate, Relay};

/// What somebody says to every call of `MigrationService`: the answers about a hand-over have their record in one place.
#[derive(Debug, Clone)]
struct Says {
    /// None for: there is no such thing.
    answer: Option<Bytes>,
    heard: Arc<Mutex<Vec<Bytes>>>,
    asked: Arc<watch::Sender<usize>>,
}

impl NamedService for Says {
    const NAME: &'static str = "vfio.checkpoint.v1.MigrationService";
}

impl Service<Request<Body>> for Says {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let Self { answer, heard, asked } = self.clone();
        Box::pin(async move {
            let mut body = pin!(request.into_body());
            while let Some(Ok(frame)) =
                std::future::poll_fn(|context| body.as_mut().poll_frame(context)).await
            {
                heard.lock().unwrap().extend(frame.into_data().ok());
            }
            asked.send_modify(|asked| *asked += 1);
            let response = Response::builder().header("content-type", "application/grpc");
            let Some(answer) = answer else {
                return Ok(response.header("grpc-status", "5").body(Body::empty()).unwrap());
            };
            let mut framed = vec![0];
            framed.extend_from_slice(&u32::try_from(answer.len()).unwrap().to_be_bytes());
            framed.extend_from_slice(&answer);
            let body = Body::new(Whole(Some(framed.into())));
            Ok(response.header("grpc-status", "0").body(body).unwrap())
        })
    }
}

/// A body that is there at once.
struct Whole(Option<Bytes>);

impl http_body::Body for Whole {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.0.take().map(|bytes| Ok(http_body::Frame::data(bytes))))
    }
}

/// Somebody with the identity of the destination.
struct Twin {
    address: SocketAddr,
    says: Says,
    key: [u8; 32],
    serving: JoinHandle<()>,
}

impl Twin {
    async fn saying(lab: &Lab, record: Option<v1::HandoverRecord>) -> Self {
        let files = lab.certify_as("twin", "spiffe://lab.test/agent/destination", validity());
        let environment = Environment::production();
        let clock = Arc::new(EnvironmentClock(environment.clone()));
        let tls = TlsSource::load(files, clock, environment.clone()).unwrap();
        let key = tls.current().material.own_key_hash().0;
        let door = environment.network.listen("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let (registry, enforcing) = PeerRegistry::new(tls.clone(), PeerLimits::default());
        let listener = Listener::new(door, tls, registry, AcceptLimits::default());
        let address = listener.local_addr().unwrap();
        let answer = record.map(|record| {
            let answer = v1::CommitHandoverResponse { handover: Some(record), ..Default::default() };
            answer.encode_to_vec().into()
        });
        let says = Says { answer, heard: Arc::default(), asked: Arc::new(watch::Sender::new(0)) };
        let server = Server::builder().add_service(says.clone());
        let serving = tokio::spawn(async move {
            let (connections, accepting) = listener.incoming();
            let (served, (), ()) =
                tokio::join!(server.serve_with_incoming(connections), accepting, enforcing);
            served.unwrap();
        });
        Self { address, says, key, serving }
    }

    /// Once it was asked so often.
    async fn asked(&self, times: usize) {
        let mut asked = self.says.asked.subscribe();
        soon(asked.wait_for(|asked| *asked >= times)).await.unwrap();
    }
}

impl Drop for Twin {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_agent_of_that_identity_says_moves_nothing() {
    for verdict in [v1::HandoverVerdict::Refused, v1::HandoverVerdict::Committed] {
        let pair = Pair::new(1).await;
        let before = pair.digests();
        let relay = Relay::to(&pair.destination, &[Fate::Lasts]).await;
        let name = prepared_over(&pair, &relay).await.unwrap();
        let (source, _) = pair.migrator().await;
        let arrival = prepared(&source, &name).await.handover.unwrap().peer_operation;
        let known = pair.destination.core().operations.get(&arrival.parse().unwrap()).unwrap();
        let epochs = known.fixed.devices.iter().map(|device| device.epoch.0).collect();
        let twin = Twin::saying(
            &pair.lab,
            Some(v1::HandoverRecord {
                operation: arrival,
                step: v1::HandoverStep::Over.into(),
                verdict: verdict.into(),
                message: String::new(),
                epochs,
            }),
        )
        .await;
        assert_ne!(twin.key[..], key(&pair.destination)[..]);
        relay.lead(twin.address);
        relay.cut();
        source.commit(v1::CommitRequest { operation: name.clone() }).await.unwrap();
        let doubts = |seen: &v1::Operation| {
            let handover = seen.handover.as_ref().unwrap();
            handover.in_doubt && handover.doubt.contains("does not prove that it is the agent")
        };
        let seen = when(&source, &name, doubts).await;
        twin.asked(2).await;
        assert_eq!(seen.phase(), v1::OperationPhase::Committing, "{seen:?}");
        assert_eq!(seen.handover.unwrap().verdict(), v1::HandoverVerdict::Unspecified);
        assert_eq!(pair.here[0].device.state(), State::Stop, "it neither runs nor was reset");
        // An admin is shown no more than the task.
        let admin = pair.lab.client(&pair.source, "admin").await;
        let look = v1::ResolveRequest {
            operation: name.clone(),
            resolution: v1::Resolution::ResumeHere.into(),
            validate_only: true,
            ..Default::default()
        };
        let shown = admin.resolve(look).await.unwrap();
        assert!(shown.destination.is_none() && !shown.refused.is_empty(), "{shown:?}");
        assert!(shown.destination_error.contains("does not prove"), "{shown:?}");
        // Nor is it told what would make others believe it.
        let secret = known.view().handover.unwrap().record.secret.unwrap().0;
        let heard = twin.says.heard.lock().unwrap().concat();
        assert!(!heard.is_empty() && !heard.windows(secret.len()).any(|bytes| bytes == secret));

        relay.lead(pair.destination.address());
        relay.cut();
        let ended = soon(done(&source, &name)).await;
        assert_eq!(ended.result(), v1::OperationResult::Succeeded, "{ended:?}");
        moved(&pair, &before);
        pair.stop().await;
    }
}

/// What the destination has is the last copy then, and waits for the word.
#[tokio::test(flavor = "multi_thread")]
async fn another_agent_of_that_identity_does_not_keep_the_last_word_from_the_destination() {
    let pair = Pair::new(1).await;
    let before = pair.digests();
    let relay = Relay::to(&pair.destination, &[Fate::Lasts]).await;
    let name = prepared_over(&pair, &relay).await.unwrap();
    let (source, destination) = pair.migrator().await;
    let arrival = prepared(&source, &name).await.handover.unwrap().peer_operation;
    let twin = Twin::saying(&pair.lab, None).await;
    relay.lead(twin.address);
    relay.cut();
    source.commit(v1::CommitRequest { operation: name.clone() }).await.unwrap();
    when(&source, &name, |seen| !seen.handover.as_ref().unwrap().doubt.is_empty()).await;
    let let_go = v1::ResolveRequest {
        operation: name.clone(),
        resolution: v1::Resolution::LetGo.into(),
        accept_loss: true,
        statement: "the node here is needed".to_owned(),
        ..Default::default()
    };
    pair.lab.client(&pair.source, "admin").await.resolve(let_go).await.unwrap();
    let ended = soon(done(&source, &name)).await;
    assert_eq!(failure(&ended), "RESOLVED", "{ended:?}");
    let asked = *twin.says.asked.borrow();
    twin.asked(asked + 2).await;
    relay.lead(pair.destination.address());
    relay.cut();
    let arrived = soon(done(&destination, &arrival)).await;
    assert_eq!(arrived.result(), v1::OperationResult::Succeeded, "{arrived:?}");
    assert_eq!(pair.digests().1, before.0);
    pair.stop().await;
}
