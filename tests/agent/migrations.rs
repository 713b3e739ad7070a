//! Devices from agent to agent: what arrives, what stays, and what is refused.

use tonic::Code;
use vfio_checkpoint_client::call::Client;
use vfio_checkpoint_device::fault::Fault;
use vfio_checkpoint_device::sim::SimConfig;
use vfio_checkpoint_fsm::{Capabilities, State};
use vfio_checkpoint_proto::ids::Ticket;
use vfio_checkpoint_proto::proof::Proven as _;
use vfio_checkpoint_proto::v1;

use crate::flow::{device, done, failure, millis, refused, request_id, soon, violations};
use crate::pair::{Pair, key, small};
use crate::relay::Relay;

/// The operation once it is as wanted.
pub(crate) async fn when(
    client: &Client,
    name: &str,
    wanted: impl Fn(&v1::Operation) -> bool,
) -> v1::Operation {
    let request = v1::WatchOperationRequest { name: name.to_owned() };
    let mut watch = client.watch_operation(request).await.unwrap();
    loop {
        let seen = soon(watch.next()).await.unwrap().expect("it ended before").operation.unwrap();
        if wanted(&seen) {
            return seen;
        }
        assert!(!seen.done, "it ended before: {seen:?}");
    }
}

pub(crate) async fn prepared(client: &Client, name: &str) -> v1::Operation {
    when(client, name, |seen| seen.phase() == v1::OperationPhase::Prepared).await
}

pub(crate) fn manual(_: &mut v1::AdmitRequest, request: &mut v1::MigrateRequest) {
    request.commit = v1::CommitMode::Manual.into();
}

/// The source has its devices as before, and the destination has what it had.
pub(crate) fn stayed(pair: &Pair, before: &(Vec<[u8; 32]>, Vec<[u8; 32]>)) {
    assert_eq!(&pair.digests(), before);
    assert!(pair.all_run(), "every device runs");
    assert!(pair.here.iter().all(|bench| bench.device.resets() == 0), "a source is never reset by itself");
}

pub(crate) fn moved(pair: &Pair, before: &(Vec<[u8; 32]>, Vec<[u8; 32]>)) {
    let (here, there) = pair.digests();
    assert_eq!(there, before.0, "what runs at the destination is what ran at the source");
    assert!(here.iter().zip(&before.0).all(|(now, was)| now != was), "nothing of it is left at the source");
    assert!(pair.all_run());
    assert!(pair.here.iter().all(|bench| bench.device.resets() == 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_runs_on_at_the_destination_and_nowhere_else() {
    let pair = Pair::new(1).await;
    let before = pair.digests();
    let (source, destination) = pair.migrator().await;
    let was = device(&source, "n0").await.logical_device.unwrap();
    let name = pair.start(|_, _| {}).await;
    let ended = soon(done(&source, &name)).await;
    assert_eq!(ended.result(), v1::OperationResult::Succeeded, "{ended:?}");
    assert_eq!(ended.outcome(), v1::StateOutcome::Moved);
    assert_eq!(ended.kind(), v1::OperationKind::Migration);
    let handover = ended.handover.unwrap();
    assert_eq!(handover.verdict(), v1::HandoverVerdict::Committed);
    assert!(!handover.in_doubt && handover.stop_time.is_some() && handover.prepare_time.is_some());
    assert!(ended.downtime.is_some() && ended.predicted_downtime.is_some());
    assert!(ended.devices[0].pre_copy_bytes > 0, "{:?}", ended.devices);

    moved(&pair, &before);
    assert_eq!(pair.there[0].device.resets(), 0);
    let now = device(&destination, "n0").await.logical_device.unwrap();
    assert_eq!((now.id, now.epoch), (was.id.clone(), was.epoch + 1));
    assert_ne!(device(&source, "n0").await.logical_device.unwrap().id, was.id);

    let arrival = soon(done(&destination, &handover.peer_operation)).await;
    assert_eq!(arrival.kind(), v1::OperationKind::Arrival);
    assert_eq!(arrival.result(), v1::OperationResult::Succeeded);
    assert_eq!(arrival.outcome(), v1::StateOutcome::Replaced);
    assert_eq!(arrival.handover.unwrap().peer_operation, name);
    pair.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_set_moves_whole_with_and_without_pre_copy() {
    for pre_copy in [v1::PreCopyMode::Required, v1::PreCopyMode::Never] {
        let pair = Pair::new(2).await;
        let before = pair.digests();
        let (source, _) = pair.migrator().await;
        let name = pair.start(|_, request| request.pre_copy = pre_copy.into()).await;
        let ended = soon(done(&source, &name)).await;
        assert_eq!(ended.result(), v1::OperationResult::Succeeded, "{ended:?}");
        moved(&pair, &before);
        let p2p = |bench: &crate::flow::Bench| {
            let hops = bench.device.hops();
            let to = |state| hops.iter().position(|hop| hop.arc.to() == state);
            (to(State::RunningP2p), hops.iter().rposition(|hop| hop.arc.to() == State::Running))
        };
        for bench in &pair.there {
            let (quiesced, runs) = p2p(bench);
            assert!(quiesced.is_some() && quiesced < runs, "past the barrier before it runs");
        }
        pair.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn it_can_go_on_to_a_third_and_come_back() {
    let pair = Pair::new(1).await;
    let before = pair.digests();
    let (source, destination) = pair.migrator().await;
    let was = device(&source, "n0").await.logical_device.unwrap();
    let name = pair.start(|_, _| {}).await;
    soon(done(&source, &name)).await;
    // Back, with the two agents in each other's place.
    let agent = destination.get_agent(v1::GetAgentRequest {}).await.unwrap();
    let logical = device(&destination, "n0").await.logical_device.unwrap();
    let ticket = source
        .admit(v1::AdmitRequest {
            logical_devices: vec![logical],
            devices: pair.names(),
            source_key_sha256: agent.key_sha256,
            ..Default::default()
        })
        .await
        .unwrap()
        .ticket;
    let mut request = pair.request(ticket);
    let target = request.target.as_mut().unwrap();
    target.endpoint = format!("https://localhost:{}", pair.source.address().port());
    target.spiffe_id = "spiffe://lab.test/agent/source".to_owned();
    target.key_sha256 = key(&pair.source);
    let name = destination.migrate(request).await.unwrap().operation.unwrap().name;
    let ended = soon(done(&destination, &name)).await;
    assert_eq!(ended.result(), v1::OperationResult::Succeeded, "{ended:?}");
    assert_eq!(pair.digests().0, before.0);
    let now = device(&source, "n0").await.logical_device.unwrap();
    assert_eq!((now.id, now.epoch), (was.id, was.epoch + 2));
    pair.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_manual_commit_nothing_runs_until_it_is_said() {
    let pair = Pair::new(2).await;
    let before = pair.digests();
    let (source, destination) = pair.migrator().await;
    let name = pair.start(manual).await;
    let waiting = prepared(&source, &name).await;
    let handover = waiting.handover.clone().unwrap();
    assert!(handover.stop_time.is_some() && handover.prepare_time.is_some() && waiting.deadline.is_some());
    assert!(waiting.actions().any(|action| action == v1::OperationAction::Commit));
    assert!(pair.here.iter().all(|bench| bench.device.state() == State::Stop));
    assert!(pair.there.iter().all(|bench| bench.device.state() == State::Resuming));
    let arrival = prepared(&destination, &handover.peer_operation).await;
    assert_eq!(arrival.handover.unwrap().verdict(), v1::HandoverVerdict::Unspecified);

    let commit = v1::CommitRequest { operation: name.clone() };
    source.commit(commit.clone()).await.unwrap();
    let ended = soon(done(&source, &name)).await;
    assert_eq!(ended.result(), v1::OperationResult::Succeeded, "{ended:?}");
    moved(&pair, &before);
    refused(source.commit(commit).await, Code::FailedPrecondition, "OPERATION_OVER");
    pair.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_committed_is_undone_on_both_sides() {
    let pair = Pair::new(2).await;
    let before = pair.digests();
    let (source, destination) = pair.migrator().await;
    // Cancelled.
    let name = pair.start(manual).await;
    let arrival = prepared(&source, &name).await.handover.unwrap().peer_operation;
    source.cancel_operation(v1::CancelOperationRequest { name: name.clone() }).await.unwrap();
    let ended = soon(done(&source, &name)).await;
    assert_eq!(ended.result(), v1::OperationResult::Cancelled, "{ended:?}");
    assert_eq!(ended.outcome(), v1::StateOutcome::Preserved);
    let refused_there = soon(done(&destination, &arrival)).await;
    assert_eq!(failure(&refused_there), "HANDOVER_ABANDONED");
    assert_eq!(refused_there.outcome(), v1::StateOutcome::StateLost);
    assert_eq!(refused_there.handover.unwrap().verdict(), v1::HandoverVerdict::Refused);
    let fresh = pair.digests().1;
    stayed(&pair, &(before.0.clone(), fresh.clone()));
    assert!(pair.there.iter().all(|bench| bench.device.resets() == 1));

    // Nobody said Commit in time.
    let name = pair
        .start(|_, request| {
            request.commit = v1::CommitMode::Manual.into();
            request.commit_timeout = millis(50);
        })
        .await;
    let ended = soon(done(&source, &name)).await;
    assert_eq!(failure(&ended), "COMMIT_TIMEOUT");
    let arrival = ended.handover.unwrap().peer_operation;
    assert_eq!(failure(&soon(done(&destination, &arrival)).await), "HANDOVER_ABANDONED");
    stayed(&pair, &(before.0, fresh));
    pair.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ready_comes_before_prepared_where_it_was_asked_for() {
    let pair = Pair::new(1).await;
    let before = pair.digests();
    let (source, destination) = pair.migrator().await;
    let name = pair.start(|admission, _| admission.require_ready = true).await;
    let seen = when(&source, &name, |seen| seen.phase() == v1::OperationPhase::Sealing).await;
    let arrival = seen.handover.unwrap().peer_operation;
    let waits = |seen: &v1::Operation| seen.handover.as_ref().is_some_and(|handover| handover.awaits_ready);
    let waiting = when(&destination, &arrival, waits).await;
    assert!(waiting.actions().any(|action| action == v1::OperationAction::Ready));
    assert_eq!(pair.there[0].device.state(), State::Resuming);
    destination.ready(v1::ReadyRequest { operation: arrival }).await.unwrap();
    let ended = soon(done(&source, &name)).await;
    assert_eq!(ended.result(), v1::OperationResult::Succeeded, "{ended:?}");
    moved(&pair, &before);
    pair.stop().await;
}

/// A device that does not leave RESUMING, once.
pub(crate) fn stuck() -> Vec<Fault> {
    vec![Fault::Set { target: State::Running, landing: State::Resuming, errno: libc::EINVAL }]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_cannot_start_is_refused_and_runs_on_at_the_source() {
    let lone = |seed| SimConfig { migration: Capabilities { p2p: false, pre_copy: true }, ..small(seed) };
    let pair = Pair::with(1, lone, &[], &stuck(), |_| {}).await;
    let before = pair.digests();
    let (source, destination) = pair.migrator().await;
    let name = pair.start(|_, _| {}).await;
    let ended = soon(done(&source, &name)).await;
    assert_eq!(failure(&ended), "HANDOVER_REFUSED", "{ended:?}");
    assert_eq!(ended.outcome(), v1::StateOutcome::Preserved);
    let handover = ended.handover.unwrap();
    assert_eq!(handover.verdict(), v1::HandoverVerdict::Refused);
    stayed(&pair, &(before.0, pair.digests().1));
    assert_eq!(pair.there[0].device.resets(), 1);
    let arrival = soon(done(&destination, &handover.peer_operation)).await;
    assert_eq!(failure(&arrival), "DEVICE_FAILED");
    // The next one gets through.
    let name = pair.start(|_, _| {}).await;
    assert_eq!(soon(done(&source, &name)).await.result(), v1::OperationResult::Succeeded);
    pair.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_that_is_given_is_kept() {
    let shortly = std::time::Duration::from_secs(1);
    let pair = Pair::with(1, small, &[], &[], |config| config.server.stream_resume_window = shortly).await;
    let (before, (source, _)) = (pair.digests(), pair.migrator().await);
    let short = |nanos| Some(prost_types::Duration { seconds: 0, nanos });
    let beforehand = pair.migrate(|_, request| request.downtime_limit = short(1_000)).await;
    let refusal = refused(beforehand, Code::FailedPrecondition, "BLOCKED");
    assert_eq!(violations(&refusal)[0].0, "BLOCKER_REASON_DOWNTIME_LIMIT", "{refusal}");

    // What the destination says does not come back while the devices stand still. Whoever says Commit does not change that.
    for commit in [v1::CommitMode::Auto, v1::CommitMode::Manual] {
        let relay = Relay::to(&pair.destination, &[]).await;
        let endpoint = format!("https://localhost:{}", relay.address().port());
        let name = pair
            .start(|_, request| {
                request.target.as_mut().unwrap().endpoint = endpoint;
                request.cutover = v1::CutoverMode::Manual.into();
                request.commit = commit.into();
                request.downtime_limit = short(700_000_000);
            })
            .await;
        when(&source, &name, |seen| seen.phase() == v1::OperationPhase::PreCopy && seen.moved_bytes > 0)
            .await;
        relay.mute();
        source.cutover(v1::CutoverRequest { operation: name.clone() }).await.unwrap();
        let ended = soon(done(&source, &name)).await;
        assert_eq!(failure(&ended), "DOWNTIME_LIMIT", "{ended:?}");
        relay.heal();
        let admin = pair.lab.client(&pair.destination, "admin").await;
        soon(done(&admin, &ended.handover.unwrap().peer_operation)).await;
        stayed(&pair, &(before.0.clone(), pair.digests().1));
    }
    pair.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_tells_of_both_sides_and_touches_nothing() {
    let pair = Pair::new(1).await;
    let before = pair.digests();
    let (source, _) = pair.migrator().await;
    let dry = |change: &dyn Fn(&mut v1::MigrateRequest)| {
        let mut request = v1::MigrateRequest { validate_only: true, ..pair.request(bytes::Bytes::new()) };
        change(&mut request);
        source.migrate(request)
    };
    let free = dry(&|_| {}).await.unwrap();
    assert!(free.blockers.is_empty() && free.operation.is_none(), "{free:?}");
    let prediction = free.prediction.unwrap();
    assert!(prediction.round_trip.is_some() && prediction.version > 0 && prediction.pre_copy);
    assert!(prediction.downtime.is_none() && prediction.downtime_at_most.is_some());
    let stop = dry(&|request| request.pre_copy = v1::PreCopyMode::Never.into()).await.unwrap();
    assert!(stop.prediction.unwrap().downtime.is_some());

    let both = dry(&|request| {
        request.viommu = true;
        request.target.as_mut().unwrap().devices = vec!["devices/n7".to_owned()];
    });
    let told: Vec<_> = both
        .await
        .unwrap()
        .blockers
        .iter()
        .map(|found| (found.side(), found.blocker.as_ref().unwrap().reason()))
        .collect();
    assert!(told.contains(&(v1::MigrationSide::Source, v1::BlockerReason::Viommu)), "{told:?}");
    assert!(told.contains(&(v1::MigrationSide::Destination, v1::BlockerReason::DeviceNotFound)), "{told:?}");

    let nobody = dry(&|request| {
        request.target.as_mut().unwrap().endpoint = "https://localhost:1".to_owned();
    });
    let nobody = nobody.await.unwrap().blockers;
    assert_eq!(nobody[0].blocker.as_ref().unwrap().reason(), v1::BlockerReason::DestinationUnreachable);
    let stranger = dry(&|request| {
        request.target.as_mut().unwrap().spiffe_id = "spiffe://lab.test/agent/other".to_owned();
    });
    let stranger = stranger.await.unwrap().blockers;
    assert_eq!(stranger[0].blocker.as_ref().unwrap().reason(), v1::BlockerReason::DestinationUnreachable);
    assert_eq!(pair.digests(), before);
    assert!(pair.here[0].device.hops().is_empty(), "nothing was touched");
    pair.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ticket_opens_for_its_source_and_set_alone_and_once() {
    let pair = Pair::new(1).await;
    let before = pair.digests();
    let (source, destination) = pair.migrator().await;
    let admission = pair.admission(&source).await;
    let fails = async |ticket: bytes::Bytes, reason: &str| {
        let name = source.migrate(pair.request(ticket)).await.unwrap().operation.unwrap().name;
        let ended = soon(done(&source, &name)).await;
        assert_eq!(failure(&ended), "DESTINATION_REFUSED");
        assert!(ended.failure.as_ref().unwrap().message.contains(reason), "{ended:?}");
        stayed(&pair, &before);
    };
    fails(bytes::Bytes::from_static(&[7; 32]), "ask for another").await;
    // As the source's agent hears it.
    let as_source = pair.lab.client_named(&pair.destination, "spiffe://lab.test/agent/source").await;
    let logical = admission.logical_devices[0].clone();
    let fingerprint = device(&destination, "n0").await.fingerprint;
    let prepare = |ticket| {
        prepare_request(pair.names(), "operations/some", fingerprint.clone(), logical.clone(), ticket)
    };
    let made_up = as_source.prepare(prepare(bytes::Bytes::from_static(&[7; 32]))).await;
    refused(made_up, Code::FailedPrecondition, "TICKET_INVALID");
    let real = destination.admit(admission.clone()).await.unwrap().ticket;
    refused(as_source.prepare(prepare(real)).await, Code::PermissionDenied, "TICKET_MISMATCH");
    let other_key =
        v1::AdmitRequest { source_key_sha256: bytes::Bytes::from_static(&[1; 32]), ..admission.clone() };
    fails(destination.admit(other_key).await.unwrap().ticket, "the ticket is for the key").await;
    let mut stale = admission.clone();
    stale.logical_devices[0].epoch += 1;
    fails(destination.admit(stale).await.unwrap().ticket, "in epoch").await;
    let ticket = destination.admit(admission).await.unwrap().ticket;
    let name = source.migrate(pair.request(ticket.clone())).await.unwrap().operation.unwrap().name;
    assert_eq!(soon(done(&source, &name)).await.result(), v1::OperationResult::Succeeded);
    pair.stop().await;
}

/// What only another agent may say, said by one that has not prepared anything.
#[tokio::test(flavor = "multi_thread")]
async fn who_has_not_prepared_decides_nothing() {
    let pair = Pair::new(1).await;
    let before = pair.digests();
    let (source, _) = pair.migrator().await;
    let name = pair.start(manual).await;
    let handover = prepared(&source, &name).await.handover.unwrap();
    let arrival = handover.peer_operation;
    let as_source = pair.lab.client_named(&pair.destination, "spiffe://lab.test/agent/source").await;
    let peer = pair.lab.client(&pair.destination, "peer").await;
    let guessed = Ticket([0; Ticket::BYTES]);
    let commit =
        v1::CommitHandoverRequest { operation: arrival.clone(), epochs: vec![2], ..Default::default() };
    let commit = commit.proven(&guessed);
    for stranger in [&as_source, &peer] {
        let said = stranger.commit_handover(commit.clone()).await;
        refused(said, Code::PermissionDenied, "NOT_YOUR_OPERATION");
        let abandon = v1::AbandonHandoverRequest {
            operation: arrival.clone(),
            reason: String::new(),
            ..Default::default()
        };
        let abandon = abandon.proven(&guessed);
        refused(stranger.abandon_handover(abandon).await, Code::PermissionDenied, "NOT_YOUR_OPERATION");
        // To look is nobody's secret.
        let get = v1::GetHandoverRequest { operation: arrival.clone(), ..Default::default() };
        let told = stranger.get_handover(get.clone()).await.unwrap();
        assert_eq!(told.handover.unwrap().step(), v1::HandoverStep::Prepared);
        assert!(told.proof.is_empty(), "who proves nothing is proved nothing");
        let looks = stranger.get_handover(get.clone().proven(&guessed)).await;
        refused(looks, Code::PermissionDenied, "NOT_YOUR_OPERATION");
        let settle = v1::GetHandoverRequest { settled: true, ..get }.proven(&guessed);
        refused(stranger.get_handover(settle).await, Code::PermissionDenied, "NOT_YOUR_OPERATION");
    }
    // To say again what the source said brings its secret to the source's key alone.
    let told = source.get_operation(v1::GetOperationRequest { name: name.clone() }).await.unwrap();
    let logical = told.operation.unwrap().devices[0].logical_device.clone().unwrap();
    let fingerprint = device(&source, "n0").await.fingerprint;
    let again = prepare_request(pair.names(), &name, fingerprint, logical, commit.proof.clone());
    refused(as_source.prepare(again).await, Code::FailedPrecondition, "TICKET_INVALID");
    assert_eq!(pair.there[0].device.state(), State::Resuming, "it waits on");
    // The right one, with an epoch that is not.
    let known = pair.destination.core().operations.get(&arrival.parse().unwrap()).unwrap();
    let secret = known.view().handover.unwrap().record.secret.unwrap();
    // Said of another epoch than it was proved of.
    let other = v1::CommitHandoverRequest { epochs: vec![1], ..commit.clone().proven(&secret) };
    refused(as_source.commit_handover(other).await, Code::PermissionDenied, "NOT_YOUR_OPERATION");
    let stale = v1::CommitHandoverRequest { epochs: vec![1], ..commit.clone() }.proven(&secret);
    refused(as_source.commit_handover(stale).await, Code::FailedPrecondition, "STALE_EPOCH");
    assert_eq!(pair.there[0].device.state(), State::Resuming, "it waits on");
    source.commit(v1::CommitRequest { operation: name.clone() }).await.unwrap();
    assert_eq!(soon(done(&source, &name)).await.result(), v1::OperationResult::Succeeded);
    moved(&pair, &before);
    pair.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_said_to_the_wrong_operation_is_refused() {
    let pair = Pair::new(1).await;
    let (source, destination) = pair.migrator().await;
    let waits = pair
        .start(|_, request| {
            request.commit = v1::CommitMode::Manual.into();
            request.cutover = v1::CutoverMode::Manual.into();
        })
        .await;
    let early = source.commit(v1::CommitRequest { operation: waits.clone() }).await;
    refused(early, Code::FailedPrecondition, "NOT_PREPARED");
    source.cancel_operation(v1::CancelOperationRequest { name: waits.clone() }).await.unwrap();
    let cancelled = soon(done(&source, &waits)).await;
    assert_eq!(cancelled.result(), v1::OperationResult::Cancelled);
    // The destination hears of it a little later, where it had been asked already.
    let arrival = cancelled.handover.unwrap().peer_operation;
    if !arrival.is_empty() {
        soon(done(&destination, &arrival)).await;
    }
    let admin = pair.lab.client(&pair.source, "admin").await;
    let resolve = |operation: &str| v1::ResolveRequest {
        operation: operation.to_owned(),
        resolution: v1::Resolution::ResumeHere.into(),
        ..Default::default()
    };
    let name = pair.start(|_, _| {}).await;
    let ended = soon(done(&source, &name)).await;
    let arrival = ended.handover.unwrap().peer_operation;
    let commit = v1::CommitRequest { operation: name.clone() };
    refused(source.commit(commit).await, Code::FailedPrecondition, "NOT_ASKED_FOR");
    let ready = v1::ReadyRequest { operation: arrival.clone() };
    refused(destination.ready(ready).await, Code::FailedPrecondition, "NOT_ASKED_FOR");
    let ready = v1::ReadyRequest { operation: name.clone() };
    refused(source.ready(ready).await, Code::FailedPrecondition, "NOT_A_MIGRATION");
    refused(admin.resolve(resolve(&name)).await, Code::FailedPrecondition, "NOT_IN_DOUBT");
    let there = pair.lab.client(&pair.destination, "admin").await;
    refused(there.resolve(resolve(&arrival)).await, Code::FailedPrecondition, "NOT_A_MIGRATION");
    pair.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_request_is_the_same_migration() {
    let pair = Pair::new(1).await;
    let (source, destination) = pair.migrator().await;
    let admission = pair.admission(&source).await;
    let ask = async |change: &dyn Fn(&mut v1::MigrateRequest)| {
        let ticket = destination.admit(admission.clone()).await.unwrap().ticket;
        let mut request = v1::MigrateRequest { request_id: request_id(1), ..pair.request(ticket) };
        change(&mut request);
        source.migrate(request).await
    };
    let first = ask(&|_| {}).await.unwrap().operation.unwrap().name;
    // With another ticket: the first is used up.
    assert_eq!(ask(&|_| {}).await.unwrap().operation.unwrap().name, first);
    let other = ask(&|request| request.commit = v1::CommitMode::Manual.into()).await;
    refused(other, Code::AlreadyExists, "REQUEST_ID_REUSED");
    assert_eq!(soon(done(&source, &first)).await.result(), v1::OperationResult::Succeeded);
    pair.stop().await;
}

/// Prepare, as the agent of the source says it.
pub(crate) fn prepare_request(
    devices: Vec<String>,
    source_operation: &str,
    fingerprint: Option<v1::Fingerprint>,
    logical: v1::LogicalDevice,
    ticket: bytes::Bytes,
) -> v1::PrepareRequest {
    v1::PrepareRequest {
        ticket,
        source_operation: source_operation.to_owned(),
        manifest: Some(v1::CheckpointManifest {
            format_version: 1,
            operation: source_operation.to_owned(),
            create_time: Some(prost_types::Timestamp { seconds: 1, nanos: 0 }),
            devices: vec![v1::DeviceManifest {
                source_device: "devices/n0".to_owned(),
                source_address: "sim".to_owned(),
                backend: v1::Backend::VfioUser.into(),
                driver: "sim".to_owned(),
                fingerprint,
                logical_device: Some(logical),
                data_size: None,
            }],
            source_disposition: v1::SourceDisposition::StaysStopped.into(),
        }),
        devices,
        min_version: 1,
        max_version: 1,
        commit_timeout: millis(1000),
        ..Default::default()
    }
}
