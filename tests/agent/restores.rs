//! Restores: what runs, what is held, and what never runs.

use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;
use vfio_checkpoint_client::call::Client;
use vfio_checkpoint_client::transfer::GiveState;
use vfio_checkpoint_device::fault::Fault;
use vfio_checkpoint_device::sim::SimConfig;
use vfio_checkpoint_fsm::State;
use vfio_checkpoint_proto::domain::StreamOpened;
use vfio_checkpoint_proto::frame::{Framer, crc32c};
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_proto::v1::checkpoint_service_client::CheckpointServiceClient;
use vfio_checkpoint_proto::v1::frame::Body;
use vfio_checkpoint_proto::v1::stream_message::Kind;
use vfio_checkpoint_server::serve::Agent;

use crate::flow::{
    Bench, Saved, channel, device, done, failure, give, millis, reached, refused, restore_into, save, soon,
    start_restore,
};
use crate::lab::{Lab, start};

fn small() -> SimConfig {
    SimConfig { memory_bytes: 1 << 20, ..SimConfig::default() }
}

/// An agent with a source, a device that the test can look at, and a state that is not that device's.
async fn bench(faults: &[Fault]) -> (Lab, Agent, Bench, Saved, Client) {
    let lab = Lab::new();
    let bench = Bench::with(small(), faults);
    let source = Bench::new(SimConfig { seed: 7, ..small() });
    let mut config =
        lab.config("a", &[("source", source.address.as_str()), ("target", bench.address.as_str())]);
    config.server.stream_idle_timeout = Duration::from_secs(5);
    let agent = start(config).await;
    let saver = lab.client(&agent, "saver").await;
    let saved = save(&saver, &["source"]).await;
    let restorer = lab.client(&agent, "restorer").await;
    (lab, agent, bench, saved, restorer)
}

fn held(saved: &Saved) -> v1::RestoreRequest {
    v1::RestoreRequest { after: v1::AfterRestore::Hold.into(), ..restore_into(&["target"], saved) }
}

fn resume(operation: &str) -> v1::ResumeRequest {
    v1::ResumeRequest { operation: operation.to_owned() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fork_runs_with_the_state_as_a_logical_device_of_its_own() {
    let (lab, agent, bench, saved, restorer) = bench(&[]).await;
    let saver = lab.client(&agent, "saver").await;
    let unasked = v1::RestoreRequest { allow_fork: false, ..restore_into(&["target"], &saved) };
    refused(restorer.restore(unasked).await, Code::FailedPrecondition, "BLOCKED");
    let name = start_restore(&restorer, restore_into(&["target"], &saved)).await;
    assert_eq!(bench.device.state(), State::Running, "nothing is touched before the stream is open");
    give(&restorer, &name, &saved).await;
    let ended = done(&restorer, &name).await;
    assert_eq!(ended.result(), v1::OperationResult::Succeeded, "{ended:?}");
    assert_eq!(ended.outcome(), v1::StateOutcome::Replaced);
    assert_eq!(ended.kind(), v1::OperationKind::Restore);
    assert!(ended.downtime.is_none());
    assert_eq!((bench.device.state(), bench.device.resets()), (State::Running, 0));
    let now = device(&restorer, "target").await.logical_device.unwrap();
    let was = &saved.manifest.devices[0].logical_device;
    assert_ne!(now.id, was.id.to_string());
    assert_eq!(now.epoch, 1);
    assert_eq!(save(&saver, &["target"]).await.digests().len(), 1);
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_held_restore_runs_when_it_is_told_to() {
    let (lab, agent, bench, saved, restorer) = bench(&[]).await;
    let name = start_restore(&restorer, held(&saved)).await;
    refused(restorer.resume(resume(&name)).await, Code::FailedPrecondition, "NOT_HELD");
    give(&restorer, &name, &saved).await;
    let operation = reached(&restorer, &name, v1::OperationPhase::Held).await;
    assert!(operation.deadline.is_some());
    assert_eq!(bench.device.state(), State::Resuming);
    // A saver may call Resume, but not of a restore, and not of somebody else.
    let saver = lab.client(&agent, "saver").await;
    refused(saver.resume(resume(&name)).await, Code::PermissionDenied, "NOT_YOUR_OPERATION");
    restorer.resume(resume(&name)).await.unwrap();
    let ended = done(&restorer, &name).await;
    assert_eq!(
        (ended.result(), ended.outcome()),
        (v1::OperationResult::Succeeded, v1::StateOutcome::Replaced)
    );
    assert_eq!((bench.device.state(), bench.device.resets()), (State::Running, 0));
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_held_restore_that_nobody_resumes_is_reset_and_never_runs() {
    let (_lab, agent, bench, saved, restorer) = bench(&[]).await;
    let mut request = held(&saved);
    request.hold_timeout = millis(30);
    bench.device.take_hops();
    let name = start_restore(&restorer, request).await;
    give(&restorer, &name, &saved).await;
    let ended = done(&restorer, &name).await;
    assert_eq!((ended.result(), failure(&ended)), (v1::OperationResult::Failed, "HOLD_EXPIRED"), "{ended:?}");
    assert_eq!(ended.outcome(), v1::StateOutcome::StateLost);
    never_ran(&bench);
    refused(restorer.resume(resume(&name)).await, Code::FailedPrecondition, "OPERATION_OVER");

    // The same where it is cancelled.
    let name = start_restore(&restorer, held(&saved)).await;
    give(&restorer, &name, &saved).await;
    reached(&restorer, &name, v1::OperationPhase::Held).await;
    restorer.cancel_operation(v1::CancelOperationRequest { name: name.clone() }).await.unwrap();
    let ended = done(&restorer, &name).await;
    assert_eq!((ended.result(), failure(&ended)), (v1::OperationResult::Cancelled, "CANCELLED"), "{ended:?}");
    assert_eq!(bench.device.resets(), 2);
    agent.stop().await.unwrap();
}

/// It left RESUMING by its one reset and by no SET.
#[track_caller]
fn never_ran(bench: &Bench) {
    let hops = bench.device.take_hops();
    let from_loaded = hops.iter().find(|hop| hop.arc.from() == State::Resuming);
    assert!(from_loaded.is_none(), "it left RESUMING by a SET: {hops:?}");
    assert!(hops.iter().any(|hop| hop.arc.to() == State::Resuming), "it was to be loaded: {hops:?}");
    assert_eq!((bench.device.state(), bench.device.resets()), (State::Running, 1));
}

/// What is done to the frames of a good stream.
struct Damage {
    what: &'static str,
    reason: &'static str,
    to: fn(&mut Vec<Kind>),
}

fn frame(kinds: &mut [Kind], at: usize) -> &mut v1::Frame {
    let Kind::Frame(frame) = &mut kinds[at] else { panic!("not a frame") };
    frame
}

/// Gives it the CRC that belongs to it, as a peer would that means it.
fn mend(frame: &mut v1::Frame) {
    frame.crc32c = crc32c(frame).unwrap();
}

fn flip(frame: &mut v1::Frame) {
    let Some(Body::Chunk(chunk)) = &mut frame.body else { panic!("not a chunk") };
    let mut data = chunk.data.to_vec();
    data[3] ^= 0x10;
    chunk.data = Bytes::from(data);
}

const DAMAGES: &[Damage] = &[
    Damage { what: "a flipped byte", reason: "STREAM_PROTOCOL", to: |kinds| flip(frame(kinds, 1)) },
    Damage {
        what: "a flipped byte under a good CRC",
        reason: "SEAL_MISMATCH",
        to: |kinds| {
            flip(frame(kinds, 1));
            mend(frame(kinds, 1));
        },
    },
    Damage {
        what: "a wrong seal",
        reason: "SEAL_MISMATCH",
        to: |kinds| {
            let last = kinds.len() - 1;
            let frame = frame(kinds, last);
            let Some(Body::Seal(seal)) = &mut frame.body else { panic!("not a seal") };
            seal.blake3 = Bytes::from(vec![7; 32]);
            mend(frame);
        },
    },
    Damage {
        what: "a seal of another length",
        reason: "SEAL_MISMATCH",
        to: |kinds| {
            let last = kinds.len() - 1;
            let frame = frame(kinds, last);
            let Some(Body::Seal(seal)) = &mut frame.body else { panic!("not a seal") };
            seal.length_bytes += 1;
            mend(frame);
        },
    },
    Damage {
        what: "a replayed frame",
        reason: "STREAM_PROTOCOL",
        to: |kinds| {
            let again = kinds[1].clone();
            kinds.insert(2, again);
        },
    },
    Damage { what: "a gap", reason: "STREAM_PROTOCOL", to: |kinds| drop(kinds.remove(1)) },
    Damage { what: "frames in another order", reason: "STREAM_PROTOCOL", to: |kinds| kinds.swap(1, 2) },
    Damage {
        what: "a frame of another stream",
        reason: "STREAM_PROTOCOL",
        to: |kinds| {
            let frame = frame(kinds, 1);
            frame.stream_id ^= 1;
            mend(frame);
        },
    },
    Damage {
        what: "a device that is not of the set",
        reason: "STREAM_PROTOCOL",
        to: |kinds| {
            let frame = frame(kinds, 1);
            frame.device = 5;
            mend(frame);
        },
    },
    Damage { what: "no seal", reason: "STREAM_BROKEN", to: |kinds| drop(kinds.pop()) },
    Damage { what: "half of it", reason: "STREAM_BROKEN", to: |kinds| kinds.truncate(2) },
    Damage {
        what: "what a giver does not say",
        reason: "STREAM_PROTOCOL",
        to: |kinds| kinds.insert(1, Kind::Ack(v1::StreamAck { next_sequence: 0, complete: true })),
    },
    Damage {
        what: "an abort",
        reason: "ABORTED_BY_PEER",
        to: |kinds| kinds.insert(1, Kind::Abort(v1::StreamAbort { reason: "never mind".to_owned() })),
    },
];

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_stream_resets_its_device_and_never_runs_it() {
    for damage in DAMAGES {
        let (lab, agent, bench, saved, restorer) = bench(&[]).await;
        let pristine = bench.device.digest();
        let name = start_restore(&restorer, restore_into(&["target"], &saved)).await;
        bench.device.take_hops();
        let raw = channel(&lab, &agent, "spiffe://lab.test/restorer/test").await;
        let (sender, queue) = mpsc::channel(4);
        let say = |kind| v1::StreamStateRequest { message: Some(v1::StreamMessage { kind: Some(kind) }) };
        sender.send(say(Kind::Open(giver_of(&name)))).await.unwrap();
        let mut client = CheckpointServiceClient::new(raw);
        let mut answers = soon(client.stream_state(ReceiverStream::new(queue))).await.unwrap().into_inner();
        let first = soon(answers.message()).await.unwrap().unwrap();
        let Some(Kind::Opened(opened)) = first.message.unwrap().kind else { panic!("not opened") };
        let opened = StreamOpened::try_from(opened).unwrap();
        let mut kinds = frames(&opened, &saved);
        assert!(kinds.len() > 3);
        (damage.to)(&mut kinds);
        for kind in kinds {
            if sender.send(say(kind)).await.is_err() {
                break;
            }
        }
        drop(sender);
        let ended = done(&restorer, &name).await;
        assert_eq!(
            (ended.result(), failure(&ended)),
            (v1::OperationResult::Failed, damage.reason),
            "{}: {ended:?}",
            damage.what
        );
        assert_eq!(ended.outcome(), v1::StateOutcome::StateLost, "{}", damage.what);
        never_ran(&bench);
        assert_eq!(bench.device.digest(), pristine, "{}: nothing of it stays", damage.what);
        let target = device(&restorer, "target").await;
        assert_eq!((target.state(), target.operation.as_str()), (v1::MigrationState::Running, ""));
        agent.stop().await.unwrap();
    }
}

/// It heard that all was taken, and is gone with its connection at once. What was verified and written runs.
#[tokio::test(flavor = "multi_thread")]
async fn a_giver_that_is_gone_after_the_last_ack_takes_nothing_back() {
    let (lab, agent, bench, saved, restorer) = bench(&[]).await;
    let name = start_restore(&restorer, restore_into(&["target"], &saved)).await;
    let giving = async {
        let raw = channel(&lab, &agent, "spiffe://lab.test/restorer/test").await;
        let (sender, queue) = mpsc::channel(4);
        let mut client = CheckpointServiceClient::new(raw);
        let say = |kind| v1::StreamStateRequest { message: Some(v1::StreamMessage { kind: Some(kind) }) };
        sender.send(say(Kind::Open(giver_of(&name)))).await.unwrap();
        let mut answers = soon(client.stream_state(ReceiverStream::new(queue))).await.unwrap().into_inner();
        let first = soon(answers.message()).await.unwrap().unwrap();
        let Some(Kind::Opened(opened)) = first.message.unwrap().kind else { panic!("not opened") };
        for kind in frames(&StreamOpened::try_from(opened).unwrap(), &saved) {
            sender.send(say(kind)).await.unwrap();
        }
        loop {
            let answer = soon(answers.message()).await.unwrap().expect("no last Ack");
            if let Some(Kind::Ack(v1::StreamAck { complete: true, .. })) = answer.message.unwrap().kind {
                return (sender, client, answers);
            }
        }
    };
    // The connection is on a runtime of its own, and ends with that, without a word.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let open = tokio::task::block_in_place(|| runtime.block_on(giving));
    runtime.shutdown_background();
    let ended = done(&restorer, &name).await;
    assert_eq!((ended.result(), failure(&ended)), (v1::OperationResult::Succeeded, ""), "{ended:?}");
    assert_eq!((bench.device.state(), bench.device.resets()), (State::Running, 0));
    drop(open);
    agent.stop().await.unwrap();
}

fn giver_of(operation: &str) -> v1::StreamOpen {
    v1::StreamOpen {
        operation: operation.to_owned(),
        role: v1::StreamRole::Giver.into(),
        min_version: 1,
        max_version: 1,
        max_chunk_bytes: 0,
        resume_stream_id: 0,
    }
}

/// The frames of a good stream, in chunks of 64 KiB.
fn frames(opened: &StreamOpened, saved: &Saved) -> Vec<Kind> {
    let mut framer = Framer::new(opened.stream_id, 1, &opened.limits);
    let mut kinds = Vec::new();
    for (device, bytes) in &saved.pieces {
        let mut rest = bytes.clone();
        while !rest.is_empty() {
            let piece = rest.split_to(rest.len().min(64 << 10));
            kinds.extend(framer.chunk(*device, piece).unwrap().map(Kind::Frame));
        }
    }
    let (device, _, config) = &saved.seals[0];
    kinds.push(Kind::Frame(framer.seal(*device, *config).unwrap().0));
    kinds
}

#[tokio::test(flavor = "multi_thread")]
async fn a_giver_that_falls_silent_or_is_gone_resets_the_device() {
    let (lab, agent, bench, saved, restorer) = bench(&[]).await;
    let name = start_restore(&restorer, restore_into(&["target"], &saved)).await;
    bench.device.take_hops();
    let giving = lab.client(&agent, "restorer").await;
    let GiveState { mut giver, .. } = GiveState::open(&giving, &name.parse().unwrap()).await.unwrap();
    giver.chunk(0, saved.pieces[0].1.clone()).await.unwrap();
    reached(&restorer, &name, v1::OperationPhase::Loading).await;
    drop((giver, giving));
    let ended = done(&restorer, &name).await;
    assert_eq!(
        (ended.result(), failure(&ended)),
        (v1::OperationResult::Failed, "STREAM_BROKEN"),
        "{ended:?}"
    );
    never_ran(&bench);
    agent.stop().await.unwrap();

    let lab = Lab::new();
    let quiet = Bench::new(small());
    let mut config = lab.config("b", &[("target", quiet.address.as_str())]);
    config.server.stream_idle_timeout = Duration::from_millis(100);
    let agent = start(config).await;
    let restorer = lab.client(&agent, "restorer").await;
    let name = start_restore(&restorer, restore_into(&["target"], &saved)).await;
    quiet.device.take_hops();
    let GiveState { mut giver, .. } = GiveState::open(&restorer, &name.parse().unwrap()).await.unwrap();
    giver.chunk(0, saved.pieces[0].1.clone()).await.unwrap();
    let ended = done(&restorer, &name).await;
    assert_eq!((ended.result(), failure(&ended)), (v1::OperationResult::Failed, "STREAM_IDLE"), "{ended:?}");
    never_ran(&quiet);
    drop(giver);
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_does_not_take_the_state_is_named() {
    let failing = [Fault::Write { after_bytes: 64 << 10, errno: 5 }];
    let (_lab, agent, bench, saved, restorer) = bench(&failing).await;
    let name = start_restore(&restorer, restore_into(&["target"], &saved)).await;
    bench.device.take_hops();
    let GiveState { mut giver, .. } = GiveState::open(&restorer, &name.parse().unwrap()).await.unwrap();
    for (_, bytes) in &saved.pieces {
        if giver.chunk(0, bytes.clone()).await.is_err() {
            break;
        }
    }
    let ended = done(&restorer, &name).await;
    assert_eq!(
        (ended.result(), failure(&ended)),
        (v1::OperationResult::Failed, "DEVICE_FAILED"),
        "{ended:?}"
    );
    assert_eq!(ended.failure.as_ref().unwrap().device, "devices/target");
    assert_eq!(ended.outcome(), v1::StateOutcome::StateLost);
    never_ran(&bench);
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_giver_that_never_ends_its_stream_does_not_hold_a_loaded_device() {
    let lab = Lab::new();
    let bench = Bench::new(small());
    let source = Bench::new(SimConfig { seed: 7, ..small() });
    let mut config =
        lab.config("a", &[("source", source.address.as_str()), ("target", bench.address.as_str())]);
    config.defaults.hold_timeout = Duration::from_millis(50);
    let agent = start(config).await;
    let saved = save(&lab.client(&agent, "saver").await, &["source"]).await;
    let restorer = lab.client(&agent, "restorer").await;
    let name = start_restore(&restorer, restore_into(&["target"], &saved)).await;
    bench.device.take_hops();
    let GiveState { mut giver, .. } = GiveState::open(&restorer, &name.parse().unwrap()).await.unwrap();
    for (device, bytes) in &saved.pieces {
        giver.chunk(*device, bytes.clone()).await.unwrap();
    }
    let (device, seal, config) = &saved.seals[0];
    giver.seal_as(*device, *config, *seal).await.unwrap();
    // It has said all, and does not hang up once it hears that all was taken.
    let ended = done(&restorer, &name).await;
    assert_eq!(
        (ended.result(), failure(&ended)),
        (v1::OperationResult::Failed, "OWNER_NOT_READY"),
        "{ended:?}"
    );
    assert_eq!(ended.outcome(), v1::StateOutcome::StateLost);
    never_ran(&bench);
    drop(giver);
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_is_not_ready_any_more_is_named_and_nothing_is_touched() {
    let (_lab, agent, bench, saved, restorer) = bench(&[]).await;
    let name = start_restore(&restorer, restore_into(&["target"], &saved)).await;
    bench.device.take_hops();
    // Between its admission and its stream.
    bench.device.force_error();
    let Ok(GiveState { giver, .. }) = GiveState::open(&restorer, &name.parse().unwrap()).await else {
        panic!("the stream is opened before the devices are looked at");
    };
    let ended = done(&restorer, &name).await;
    drop(giver);
    assert_eq!(
        (ended.result(), failure(&ended)),
        (v1::OperationResult::Failed, "DEVICE_NOT_READY"),
        "{ended:?}"
    );
    assert_eq!(ended.failure.as_ref().unwrap().device, "devices/target");
    assert_eq!(ended.outcome(), v1::StateOutcome::Preserved);
    assert!(bench.device.take_hops().is_empty(), "nothing is touched");
    assert_eq!((bench.device.state(), bench.device.resets()), (State::Error, 0));
    agent.stop().await.unwrap();
}
