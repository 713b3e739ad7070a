//! Restores whose connection breaks and that go on, and those that do not.
//!
//! ```text
//!   Giver --spool, redial--> Relay: cut, or mute --> agent: WireSource, the same stream over another connection
//! ```

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tonic::Code;
use vfio_checkpoint_client::call::Client;
use vfio_checkpoint_client::transfer::{
    DialOptions, Dialed, GiveState, Giver, OpenStreamError, Redial, RedialOperation, Redialing, Spool,
    SpoolOptions, Taker, Terms, TransferError, Unresumed, dial_with,
};
use vfio_checkpoint_device::operation::StateSink as _;
use vfio_checkpoint_device::sim::SimConfig;
use vfio_checkpoint_fsm::State;
use vfio_checkpoint_proto::domain::StreamRole;
use vfio_checkpoint_proto::ids::{OperationName, StreamId};
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_proto::v1::stream_message::Kind;
use vfio_checkpoint_proto::version::VersionRange;
use vfio_checkpoint_server::config::AgentConfig;
use vfio_checkpoint_server::serve::Agent;
use vfio_checkpoint_server::transfer::{WireSink, reason as reason_of};

use crate::flow::{
    Bench, Saved, channel, done, drain, failure, reached, restore_into, save_of, soon, start_restore,
    start_save,
};
use crate::lab::{Lab, PATIENCE, start};
use crate::relay::{Fate, Relay};
use crate::streams::{begin, open_of};

const MEMORY_BYTES: u64 = 6 << 20;
const RESTORER: &str = "spiffe://lab.test/restorer/test";

/// A source, a device that the test can look at, an agent that has both, and state that is not the target's.
struct World {
    lab: Lab,
    agent: Agent,
    target: Bench,
    source: Bench,
    saved: Saved,
    restorer: Client,
}

impl World {
    async fn new(configure: impl FnOnce(&mut AgentConfig)) -> Self {
        Self::speaking([1, 2], configure).await
    }

    /// An agent that speaks these versions of the stream's protocol.
    async fn speaking(versions: [u32; 2], configure: impl FnOnce(&mut AgentConfig)) -> Self {
        let lab = Lab::new();
        let small = |seed| SimConfig { seed, memory_bytes: MEMORY_BYTES, ..SimConfig::default() };
        let (target, source) = (Bench::new(small(1)), Bench::new(small(7)));
        let devices = [("source", source.address.as_str()), ("target", target.address.as_str())];
        let mut config = lab.config("a", &devices);
        config.server.stream_resume_window = PATIENCE;
        config.server.stream_versions = Some(versions);
        configure(&mut config);
        let agent = start(config).await;
        let versions = VersionRange::new(versions[0], versions[1]).unwrap();
        let saved = save_as(&lab.client(&agent, "saver").await, versions).await;
        target.device.take_hops();
        let restorer = lab.client(&agent, "restorer").await;
        Self { lab, agent, target, source, saved, restorer }
    }

    async fn start(&self) -> OperationName {
        start_restore(&self.restorer, restore_into(&["target"], &self.saved)).await.parse().unwrap()
    }

    async fn client_over(&self, relay: &Relay) -> Client {
        self.lab.client_at(relay.address(), RESTORER).await
    }

    /// The restore has done what it was to.
    async fn succeeded(&self, operation: &OperationName) {
        let ended = done(&self.restorer, operation.as_ref()).await;
        assert_eq!((ended.result(), failure(&ended)), (v1::OperationResult::Succeeded, ""), "{ended:?}");
        assert_eq!((self.target.device.state(), self.target.device.resets()), (State::Running, 0));
        assert_eq!(self.target.device.digest(), self.source.device.digest(), "it has the source's state");
    }

    /// It has not, and its device never ran with the state.
    async fn failed(&self, operation: &OperationName, reason: &str) {
        let ended = done(&self.restorer, operation.as_ref()).await;
        assert_eq!((ended.result(), failure(&ended)), (v1::OperationResult::Failed, reason), "{ended:?}");
        assert_eq!(ended.outcome(), v1::StateOutcome::StateLost);
        assert_eq!((self.target.device.state(), self.target.device.resets()), (State::Running, 1));
        assert!(self.target.device.take_hops().iter().all(|hop| hop.arc.from() != State::Resuming));
    }
}

/// Saves the source, as a taker that speaks these versions.
async fn save_as(saver: &Client, versions: VersionRange) -> Saved {
    let name = start_save(saver, save_of(&["source"])).await;
    let options = DialOptions { versions, resume: None };
    let dialed = dial_with(saver, &name.parse().unwrap(), StreamRole::Taker, options).await.unwrap();
    let Dialed { opened, link } = dialed;
    let mut taker = Taker::new(link, Terms::of(&opened));
    let saved = drain(opened.manifest, &mut taker).await;
    soon(taker.complete()).await.unwrap();
    assert_eq!(done(saver, &name).await.result(), v1::OperationResult::Succeeded);
    saved
}

/// The half that gives on a stream that can be resumed by way of `redial`.
fn resumable(giver: Giver, redial: Box<dyn Redial>) -> Giver {
    let spool = Spool::in_memory(SpoolOptions::default().memory_bytes);
    giver.resumable(spool, redial, PATIENCE).unwrap()
}

async fn pour(giver: &mut Giver, saved: &Saved) -> Result<(), TransferError> {
    for (device, bytes) in &saved.pieces {
        giver.chunk(*device, bytes.clone()).await?;
    }
    for (device, seal, config) in &saved.seals {
        giver.seal_as(*device, *config, *seal).await?;
    }
    giver.completed().await
}

/// Dials the agent itself, whatever the first way to it was.
struct Anew<F>(F, OperationName);

impl<F, C> Redial for Anew<F>
where
    F: Fn() -> C + Send,
    C: Future<Output = Client> + Send + 'static,
{
    fn redial(&mut self, stream: StreamId) -> Redialing<'_> {
        let connecting = (self.0)();
        let options = DialOptions { resume: Some(stream), ..DialOptions::default() };
        Box::pin(async move { dial_with(&connecting.await, &self.1, StreamRole::Giver, options).await })
    }
}

fn anew(client: &Client, operation: &OperationName) -> Box<dyn Redial> {
    let client = client.clone();
    Box::new(Anew(move || std::future::ready(client.clone()), operation.clone()))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_goes_on_where_its_connection_broke() {
    let world = World::new(|_| {}).await;
    let state_bytes: u64 = world.saved.pieces.iter().map(|(_, bytes)| bytes.len() as u64).sum();
    for cuts in [&[1_500_000][..], &[700_000, 1_300_000, 2_000_000], &[200_000]] {
        let mut fates: Vec<Fate> = cuts.iter().map(|bytes| Fate::CutAfter(*bytes)).collect();
        fates.push(Fate::Lasts);
        let operation = world.start().await;
        let relay = Relay::to(&world.agent, &fates).await;
        let client = world.client_over(&relay).await;
        let GiveState { giver, .. } = GiveState::open(&client, &operation).await.unwrap();
        let redial = RedialOperation::new(client, operation.clone(), VersionRange::OURS);
        let mut giver = resumable(giver, Box::new(redial));
        soon(pour(&mut giver, &world.saved)).await.unwrap();
        world.succeeded(&operation).await;
        assert!(relay.connections() > cuts.len(), "{} connections", relay.connections());
        let resent = giver.resent_bytes();
        // What was cut off in the middle of a frame goes twice; what was acknowledged does not.
        assert!(
            resent > 0 && resent < cuts.len() as u64 * state_bytes,
            "{cuts:?}: {resent} of {state_bytes}"
        );
    }
    world.agent.stop().await.unwrap();
}

/// A giver whose stream is open, and that has no patience with a taker that is silent.
async fn impatient(client: &Client, operation: &OperationName) -> Giver {
    let dialed = dial_with(client, operation, StreamRole::Giver, DialOptions::default()).await.unwrap();
    let mut terms = Terms::of(&dialed.opened);
    terms.limits.idle_timeout = Duration::from_millis(300);
    Giver::new(dialed.link, terms)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_only_seems_to_be_well_is_displaced() {
    let world = World::new(|_| {}).await;
    let operation = world.start().await;
    let relay = Relay::to(&world.agent, &[]).await;
    let client = world.client_over(&relay).await;
    let mut giver = resumable(impatient(&client, &operation).await, anew(&world.restorer, &operation));
    let (device, bytes) = &world.saved.pieces[0];
    giver.chunk(*device, bytes.clone()).await.unwrap();
    reached(&world.restorer, operation.as_ref(), v1::OperationPhase::Loading).await;
    // The agent goes on thinking that this connection is there: its own patience is much longer.
    relay.mute();
    let rest = Saved { pieces: world.saved.pieces[1..].to_vec(), ..world.saved.clone() };
    let begin = Instant::now();
    soon(pour(&mut giver, &rest)).await.unwrap();
    assert!(begin.elapsed() < Duration::from_secs(15), "{:?}", begin.elapsed());
    world.succeeded(&operation).await;
    world.agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_giver_that_did_not_hear_that_all_was_taken_hears_it_again() {
    let world = World::new(|_| {}).await;
    let operation = world.start().await;
    let relay = Relay::to(&world.agent, &[]).await;
    let client = world.client_over(&relay).await;
    let giver = impatient(&client, &operation).await;
    let mut giver = resumable(giver, anew(&world.restorer, &operation));
    for (device, bytes) in &world.saved.pieces {
        giver.chunk(*device, bytes.clone()).await.unwrap();
    }
    relay.mute_down();
    for (device, seal, config) in &world.saved.seals {
        giver.seal_as(*device, *config, *seal).await.unwrap();
    }
    // What it waits for was said, and never comes; by the time that it asks the operation is over.
    world.succeeded(&operation).await;
    soon(giver.completed()).await.unwrap();
    assert_eq!(giver.resent_bytes(), 0);
    world.agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_giver_that_does_not_come_back_in_time_fails_its_restore_as_ever() {
    let window = Duration::from_millis(400);
    let world = World::new(|config| config.server.stream_resume_window = window).await;
    let operation = world.start().await;
    let relay = Relay::to(&world.agent, &[Fate::CutAfter(1_500_000)]).await;
    let client = world.client_over(&relay).await;
    let GiveState { mut giver, .. } = GiveState::open(&client, &operation).await.unwrap();
    let begin = Instant::now();
    assert!(matches!(soon(pour(&mut giver, &world.saved)).await, Err(TransferError::Broken(_))));
    world.failed(&operation, "STREAM_BROKEN").await;
    assert!(begin.elapsed() >= window, "{:?}", begin.elapsed());

    // Whoever comes after that is told, and does not try again.
    let operation = world.start().await;
    let mut late = resumable(impatient(&world.restorer, &operation).await, anew(&world.restorer, &operation));
    late.chunk(0, world.saved.pieces[0].1.clone()).await.unwrap();
    reached(&world.restorer, operation.as_ref(), v1::OperationPhase::Loading).await;
    world
        .restorer
        .cancel_operation(v1::CancelOperationRequest { name: operation.to_string() })
        .await
        .unwrap();
    done(&world.restorer, operation.as_ref()).await;
    // It was told so, or found the connection broken and was refused another.
    let error = soon(late.listen()).await;
    let refusal = if let TransferError::NotResumed { why: Unresumed::Refused(refused), .. } = &error {
        let OpenStreamError::Call(refused) = refused else { panic!("{refused}") };
        refused.refusal().unwrap().reason.as_deref()
    } else {
        None
    };
    let is_told = refusal == Some("OPERATION_OVER") || matches!(error, TransferError::AbortedByPeer(_));
    assert!(is_told, "{error}");
    world.agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_giver_that_leaves_in_good_order_is_not_waited_for() {
    let world = World::new(|_| {}).await;
    let operation = world.start().await;
    let GiveState { mut giver, .. } = GiveState::open(&world.restorer, &operation).await.unwrap();
    giver.chunk(0, world.saved.pieces[0].1.clone()).await.unwrap();
    reached(&world.restorer, operation.as_ref(), v1::OperationPhase::Loading).await;
    let begin = Instant::now();
    drop(giver);
    world.failed(&operation, "STREAM_BROKEN").await;
    assert!(begin.elapsed() < PATIENCE / 2, "{:?}", begin.elapsed());
    world.agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_of_version_1_is_not_resumed() {
    let world = World::new(|_| {}).await;
    let operation = world.start().await;
    let relay = Relay::to(&world.agent, &[Fate::CutAfter(1_500_000), Fate::Lasts]).await;
    let client = world.client_over(&relay).await;
    let options = DialOptions { versions: VersionRange::new(1, 1).unwrap(), resume: None };
    let dialed = dial_with(&client, &operation, StreamRole::Giver, options).await.unwrap();
    assert_eq!(dialed.opened.version.0, 1);
    let stream = dialed.opened.stream_id;
    let mut giver = resumable(GiveState::of(dialed).giver, anew(&world.restorer, &operation));
    let begin = Instant::now();
    assert!(matches!(soon(pour(&mut giver, &world.saved)).await, Err(TransferError::Broken(_))));
    world.failed(&operation, "STREAM_BROKEN").await;
    assert!(begin.elapsed() < PATIENCE / 2, "{:?}", begin.elapsed());
    let resume = DialOptions { resume: Some(stream), ..DialOptions::default() };
    let late = dial_with(&world.restorer, &operation, StreamRole::Giver, resume).await;
    assert_eq!(reason(late), (Code::FailedPrecondition, "OPERATION_OVER".to_owned()));
    world.agent.stop().await.unwrap();
}

#[track_caller]
fn reason(dialed: Result<Dialed, OpenStreamError>) -> (Code, String) {
    let Err(error) = dialed else { panic!("it should have been refused") };
    assert!(!error.may_pass(), "{error}");
    let OpenStreamError::Call(error) = error else { panic!("{error}") };
    let refusal = error.refusal().unwrap_or_else(|| panic!("{error}"));
    (refusal.code, refusal.reason.clone().unwrap_or_default())
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_resumes_a_stream_that_is_not_theirs_or_is_none() {
    let world = World::new(|_| {}).await;
    let operation = world.start().await;
    let resume = |stream| DialOptions { resume: Some(stream), ..DialOptions::default() };
    let ask = async |client: &Client, stream: StreamId| {
        reason(dial_with(client, &operation, StreamRole::Giver, resume(stream)).await)
    };
    // "NO_STREAM_TO_RESUME": there is no stream yet.
    let none = (Code::FailedPrecondition, "NO_STREAM_TO_RESUME".to_owned());
    assert_eq!(ask(&world.restorer, StreamId(7)).await, none);

    let dialed =
        dial_with(&world.restorer, &operation, StreamRole::Giver, DialOptions::default()).await.unwrap();
    let stream = dialed.opened.stream_id;
    assert_eq!(ask(&world.restorer, StreamId(stream.0 ^ 1)).await, none);
    let other = world.lab.client_named(&world.agent, "spiffe://lab.test/restorer/other").await;
    let theirs = (Code::PermissionDenied, "NOT_YOUR_OPERATION".to_owned());
    assert_eq!(ask(&other, stream).await, theirs);
    let admin = world.lab.client(&world.agent, "admin").await;
    assert_eq!(ask(&admin, stream).await, none, "an admin may open a stream, and did not open this one");
    // None of that took anything from the stream.
    let mut giver = GiveState::of(dialed).giver;
    soon(pour(&mut giver, &world.saved)).await.unwrap();
    world.succeeded(&operation).await;
    assert_eq!(ask(&world.restorer, StreamId(stream.0 ^ 1)).await, (none.0, "OPERATION_OVER".to_owned()));
    assert_eq!(ask(&admin, stream).await, (none.0, "OPERATION_OVER".to_owned()));

    // A taker does not resume.
    let saver = world.lab.client(&world.agent, "saver").await;
    let name = start_save(&saver, save_of(&["source"])).await;
    let raw = channel(&world.lab, &world.agent, "spiffe://lab.test/saver/test").await;
    let open =
        v1::StreamOpen { max_version: 2, resume_stream_id: 7, ..open_of(&name, v1::StreamRole::Taker) };
    let Err(status) = begin(&raw, Some(Kind::Open(open))).await else {
        panic!("it should have been refused")
    };
    assert!(status.message().contains("resume_stream_id"), "{status}");
    let cancel = v1::CancelOperationRequest { name: name.clone() };
    saver.cancel_operation(cancel).await.unwrap();
    world.agent.stop().await.unwrap();
}

/// As an agent gives the state of its own devices: a break is no more to the operation than a taker that is slow.
#[tokio::test(flavor = "multi_thread")]
async fn an_operation_that_gives_to_another_agent_sees_nothing_of_a_break() {
    let world = World::new(|_| {}).await;
    let saver = world.lab.client(&world.agent, "saver").await;
    let name: OperationName = start_save(&saver, save_of(&["source"])).await.parse().unwrap();
    let entry = world.agent.core().operations.get(&name).unwrap();
    for (fates, ends) in [
        (&[Fate::CutAfter(1_500_000), Fate::CutAfter(1_500_000), Fate::Lasts][..], true),
        (&[Fate::CutAfter(1_500_000)], false),
    ] {
        let operation = world.start().await;
        let relay = Relay::to(&world.agent, fates).await;
        let client = world.client_over(&relay).await;
        let GiveState { giver, limits, .. } = GiveState::open(&client, &operation).await.unwrap();
        let window = if ends { PATIENCE } else { Duration::from_millis(500) };
        let redial: Box<dyn Redial> = if ends {
            Box::new(RedialOperation::new(client, operation.clone(), VersionRange::OURS))
        } else {
            Box::new(Nobody)
        };
        let spool = Spool::in_memory(SpoolOptions::default().memory_bytes);
        let giver = giver.resumable(spool, redial, window).unwrap();
        let core = world.agent.core();
        let mut sink = WireSink::new(giver, Arc::clone(&entry), core, limits.idle_timeout, PATIENCE);
        let watch = sink.watch();
        let given = soon(async {
            for (device, bytes) in &world.saved.pieces {
                sink.chunk(*device, bytes.clone()).await?;
            }
            sink.seal(&[None]).await
        });
        let given = given.await;
        if ends {
            given.unwrap();
            world.succeeded(&operation).await;
            assert_eq!(entry.view().devices[0].seal, Some(world.saved.seals[0].1));
            assert!(watch.resent_bytes() > 0);
        } else {
            let error = given.unwrap_err();
            assert_eq!(reason_of(&*error), Some(v1::FailureReason::StreamBroken), "{error}");
            assert!(error.to_string().contains("no connection within 500 ms"), "{error}");
            let cancel = v1::CancelOperationRequest { name: operation.to_string() };
            world.restorer.cancel_operation(cancel).await.unwrap();
        }
    }
    saver.cancel_operation(v1::CancelOperationRequest { name: name.to_string() }).await.unwrap();
    world.agent.stop().await.unwrap();
}

/// No connection comes about.
struct Nobody;

impl Redial for Nobody {
    fn redial(&mut self, _stream: StreamId) -> Redialing<'_> {
        Box::pin(std::future::ready(Err(OpenStreamError::Ended)))
    }
}

/// What one side speaks, the other, and what they agree on.
const NEIGHBOURS: [([u32; 2], [u32; 2], Option<u32>); 9] = [
    ([1, 2], [1, 2], Some(2)),
    ([1, 1], [1, 2], Some(1)),
    ([1, 2], [1, 1], Some(1)),
    ([2, 3], [1, 2], Some(2)),
    ([1, 2], [2, 3], Some(2)),
    ([2, 3], [2, 3], Some(3)),
    ([3, 3], [1, 2], None),
    ([1, 2], [3, 3], None),
    ([1, 1], [2, 3], None),
];

#[tokio::test(flavor = "multi_thread")]
async fn agents_and_callers_of_neighbouring_versions_go_together_and_resume_from_2_on() {
    for (agents, callers, agreed) in NEIGHBOURS {
        let what = format!("agent {agents:?}, caller {callers:?}");
        let world = World::speaking(agents, |_| {}).await;
        let versions = VersionRange::new(callers[0], callers[1]).unwrap();
        let operation = world.start().await;
        let relay = Relay::to(&world.agent, &[Fate::CutAfter(1_500_000), Fate::Lasts]).await;
        let client = world.client_over(&relay).await;
        let options = DialOptions { versions, resume: None };
        let dialed = dial_with(&client, &operation, StreamRole::Giver, options).await;
        let Some(agreed) = agreed else {
            assert_eq!(reason(dialed), (Code::FailedPrecondition, "NO_COMMON_VERSION".to_owned()), "{what}");
            world.agent.stop().await.unwrap();
            continue;
        };
        let dialed = dialed.unwrap();
        assert_eq!(dialed.opened.version.0, agreed, "{what}");
        let redial = RedialOperation::new(client, operation.clone(), versions);
        let mut giver = resumable(GiveState::of(dialed).giver, Box::new(redial));
        let poured = soon(pour(&mut giver, &world.saved)).await;
        if agreed >= 2 {
            poured.unwrap_or_else(|error| panic!("{what}: {error}"));
            world.succeeded(&operation).await;
        } else {
            assert!(poured.is_err(), "{what}");
            world.failed(&operation, "STREAM_BROKEN").await;
        }
        // A save, which nobody resumes, works with all of them.
        save_as(&world.lab.client(&world.agent, "saver").await, versions).await;
        world.agent.stop().await.unwrap();
    }
}
