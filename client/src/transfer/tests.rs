mod body;
mod flow;
mod resume;
mod stall;

use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use vfio_checkpoint_proto::domain::{Phase, Progress, StreamLimits};
use vfio_checkpoint_proto::frame::Framer;
use vfio_checkpoint_proto::ids::StreamId;
use vfio_checkpoint_proto::v1::frame::Body;
use vfio_checkpoint_proto::v1::stream_message::Kind;
use vfio_checkpoint_proto::v1::{StreamAbort, StreamAck, StreamCutover, StreamMessage, StreamOpen};
use vfio_checkpoint_proto::version::Version;

use super::*;

const CHUNK_BYTES: usize = 64 * 1024;
const IDLE: Duration = Duration::from_secs(30);

fn terms() -> Terms {
    let limits = StreamLimits {
        max_chunk_bytes: u32::try_from(CHUNK_BYTES).unwrap(),
        max_device_bytes: 1 << 30,
        idle_timeout: IDLE,
        lifetime: Duration::from_hours(1),
        ack_interval_bytes: 2 * CHUNK_BYTES as u64,
        ack_delay: None,
    };
    Terms { version: Version(2), stream: StreamId(7), devices: 2, limits }
}

/// One end as it is on the wire, for a peer that the test plays.
struct Wire {
    send: mpsc::Sender<Result<StreamMessage, LinkError>>,
    receive: mpsc::Receiver<StreamMessage>,
}

fn wire() -> (Link, Wire) {
    let (outgoing, receive) = Link::outgoing_channel();
    let (send, incoming) = mpsc::channel(LINK_FRAMES);
    (Link::new(ReceiverStream::new(incoming), outgoing), Wire { send, receive })
}

fn pair() -> (Giver, Taker) {
    let (give, frames) = Link::outgoing_channel();
    let (take, acks) = Link::outgoing_channel();
    let giver = Giver::new(Link::new(ReceiverStream::new(acks).map(Ok), give), terms());
    (giver, Taker::new(Link::new(ReceiverStream::new(frames).map(Ok), take), terms()))
}

fn state(device: usize, chunk: usize) -> Bytes {
    Bytes::from(vec![u8::try_from(device * 16 + chunk).unwrap(); CHUNK_BYTES])
}

fn progress() -> Progress {
    Progress { phase: Phase::StopCopy, left_bytes: 5, predicted_downtime: Some(Duration::from_millis(3)) }
}

/// Each call makes one frame.
const FRAMES: usize = 11;

async fn give(giver: &mut Giver, step: usize) -> Result<(), TransferError> {
    match step {
        0..4 => giver.chunk(0, state(0, step)).await,
        4 => giver.progress(progress()).await,
        5..9 => giver.chunk(1, state(1, step)).await,
        9 => giver.seal(1, None).await.map(drop),
        _ => giver.seal(0, None).await.map(drop),
    }
}

async fn give_all(giver: &mut Giver) -> Result<(), TransferError> {
    for step in 0..FRAMES {
        give(giver, step).await?;
    }
    giver.completed().await
}

async fn take_all(taker: &mut Taker) -> Result<Vec<String>, TransferError> {
    let mut seen = Vec::new();
    while let Some(accepted) = taker.next().await? {
        seen.push(match accepted {
            Accepted::Chunk { device, chunk } => {
                format!("{device}: {} at {}", chunk.bytes().len(), chunk.offset())
            }
            Accepted::Progress(progress) => format!("{:?}", progress.phase),
            Accepted::Sealed { device, seal, .. } => format!("{device}: sealed {}", seal.seal().bytes),
        });
    }
    taker.complete().await?;
    Ok(seen)
}

#[tokio::test]
async fn all_of_it_arrives_in_order_and_both_sides_know() {
    let (mut giver, mut taker) = pair();
    let (end, seen) = tokio::join!(give_all(&mut giver), take_all(&mut taker));
    end.unwrap();
    insta::assert_snapshot!(seen.unwrap().join("\n"), @"
    0: 65536 at 0
    0: 65536 at 65536
    0: 65536 at 131072
    0: 65536 at 196608
    StopCopy
    1: 65536 at 0
    1: 65536 at 65536
    1: 65536 at 131072
    1: 65536 at 196608
    1: sealed 262144
    0: sealed 262144
    ");
    assert_eq!(giver.acked_frames(), FRAMES as u64);
}

#[tokio::test]
async fn long_state_is_split_and_not_copied() {
    let (link, mut wire) = wire();
    let mut giver = Giver::new(link, terms());
    let state = Bytes::from(vec![1; CHUNK_BYTES + 10]);
    giver.chunk(0, state.clone()).await.unwrap();
    for (offset, length) in [(0, CHUNK_BYTES), (CHUNK_BYTES, 10)] {
        let Some(Kind::Frame(frame)) = wire.receive.recv().await.unwrap().kind else { panic!("no frame") };
        let Some(Body::Chunk(chunk)) = frame.body else { panic!("no chunk") };
        assert_eq!(chunk.data.len(), length);
        assert_eq!(chunk.data.as_ptr(), state[offset..].as_ptr(), "copied");
    }
}

#[tokio::test]
async fn a_giver_that_aborts_or_is_gone_at_any_frame_is_no_checkpoint() {
    for step in 0..=FRAMES {
        for is_told in [true, false] {
            let (mut giver, mut taker) = pair();
            let giving = async {
                for step in 0..step {
                    give(&mut giver, step).await.unwrap();
                }
                if is_told { giver.abort("had enough").await } else { drop(giver) }
            };
            let taking = async {
                let result = take_all(&mut taker).await;
                drop(taker);
                result
            };
            let ((), end) = tokio::join!(giving, taking);
            match end {
                Err(TransferError::AbortedByPeer(reason)) if is_told => assert_eq!(reason, "had enough"),
                Err(TransferError::Broken(_)) if !is_told => {}
                other => panic!("{step} {is_told}: {other:?}"),
            }
        }
    }
}

#[tokio::test]
async fn a_taker_that_aborts_or_is_gone_at_any_frame_is_heard() {
    for step in 0..=FRAMES {
        for is_told in [true, false] {
            let (mut giver, mut taker) = pair();
            let giving = async {
                let result = give_all(&mut giver).await;
                drop(giver);
                result
            };
            let taking = async {
                for _ in 0..step {
                    taker.next().await.unwrap().unwrap();
                }
                if is_told { taker.abort("disk full").await } else { drop(taker) }
            };
            let (end, ()) = tokio::join!(giving, taking);
            match end {
                Err(TransferError::AbortedByPeer(reason)) if is_told => assert_eq!(reason, "disk full"),
                Err(TransferError::Broken(_)) if !is_told => {}
                other => panic!("{step} {is_told}: {other:?}"),
            }
        }
    }
}

/// How a giver ends that was told that all was taken.
#[derive(Debug, Clone, Copy, PartialEq)]
enum End {
    Gone,
    Silent,
    Aborts,
}

#[tokio::test(start_paused = true)]
async fn a_giver_that_is_gone_or_silent_once_all_was_taken_takes_nothing_back() {
    for (end, wait_secs) in [(End::Gone, 0), (End::Silent, 2), (End::Aborts, 0)] {
        let (link, mut wire) = wire();
        let mut taker = Taker::new(link, terms());
        let mut framer = Framer::new(terms().stream, terms().devices, &terms().limits);
        for device in 0..terms().devices {
            let mut all: Vec<_> = framer.chunk(device, state(device, 0)).unwrap().collect();
            all.push(framer.seal(device, None).unwrap().0);
            for frame in all {
                let message = StreamMessage { kind: Some(Kind::Frame(frame)) };
                wire.send.send(Ok(message)).await.unwrap();
                taker.next().await.unwrap().unwrap();
            }
        }
        assert!(taker.next().await.unwrap().is_none());
        let begin = tokio::time::Instant::now();
        let peer = async {
            while let Some(Kind::Ack(ack)) = wire.receive.recv().await.unwrap().kind {
                if ack.complete {
                    break;
                }
            }
            let abort = StreamMessage { kind: Some(Kind::Abort(StreamAbort { reason: "no".to_owned() })) };
            match end {
                End::Gone => wire.send.send(Err(LinkError::ended("it was reset"))).await.unwrap(),
                End::Silent => {}
                End::Aborts => wire.send.send(Ok(abort)).await.unwrap(),
            }
            wire
        };
        let (completed, _open) = tokio::join!(taker.complete(), peer);
        match completed {
            Ok(()) => assert_ne!(end, End::Aborts),
            Err(error) => assert!(end == End::Aborts, "{end:?}: {error}"),
        }
        assert_eq!(begin.elapsed().as_secs(), wait_secs, "{end:?}");
    }
}

#[tokio::test]
async fn a_connection_that_fails_is_told_with_its_cause() {
    for is_giver in [true, false] {
        let (link, wire) = wire();
        let cause = std::io::Error::other("cable");
        wire.send.send(Err(LinkError::failed("it broke", cause))).await.unwrap();
        let error = if is_giver {
            Giver::new(link, terms()).chunk(0, state(0, 0)).await.unwrap_err()
        } else {
            Taker::new(link, terms()).next().await.unwrap_err()
        };
        let TransferError::Broken(link) = error else { panic!("{error}") };
        assert_eq!(std::error::Error::source(&link).unwrap().to_string(), "cable");
    }
}

#[tokio::test]
async fn a_taker_that_does_not_read_stops_the_giver_after_a_few_frames() {
    let (link, wire) = wire();
    let mut giver = Giver::new(link, terms());
    for step in 0..LINK_FRAMES {
        give(&mut giver, step).await.unwrap();
    }
    // Polling it again and again makes no room.
    let mut blocked = std::pin::pin!(give(&mut giver, LINK_FRAMES));
    for _ in 0..100 {
        tokio::select! {
            biased;
            result = &mut blocked => panic!("it was queued: {result:?}"),
            () = tokio::task::yield_now() => {}
        }
    }
    assert_eq!(wire.receive.len(), LINK_FRAMES);
}

#[tokio::test]
async fn a_call_that_is_dropped_while_it_waits_leaves_no_gap() {
    let (mut giver, mut taker) = pair();
    for step in 0..LINK_FRAMES {
        give(&mut giver, step).await.unwrap();
    }
    tokio::select! {
        biased;
        _ = give(&mut giver, 4) => panic!("there was no room"),
        () = tokio::task::yield_now() => {}
    }
    taker.next().await.unwrap();
    giver.progress(progress()).await.unwrap();
    taker.next().await.unwrap();
    assert!(matches!(taker.next().await.unwrap(), Some(Accepted::Progress(_))));
}

#[tokio::test(start_paused = true)]
async fn silence_ends_it_after_the_idle_limit_and_not_before() {
    let begin = tokio::time::Instant::now();
    let is_idle = |error: TransferError, what: &str| {
        assert!(matches!(error, TransferError::Idle(IDLE)), "{what}: {error}");
    };
    // The peer is there all the time, and says nothing.
    let (link, _quiet) = wire();
    is_idle(Taker::new(link, terms()).next().await.unwrap_err(), "a taker without a frame");
    let (link, _quiet) = wire();
    let mut giver = Giver::new(link, terms());
    let error = loop {
        if let Err(error) = giver.chunk(0, state(0, 0)).await {
            break error;
        }
    };
    is_idle(error, "a giver without room");
    let (link, _quiet) = wire();
    is_idle(Giver::new(link, terms()).completed().await.unwrap_err(), "a giver without a completion");
    assert_eq!(begin.elapsed().as_secs(), 3 * IDLE.as_secs());
}

/// Says that it is there, and nothing else, for ever.
fn heartbeat(wire: &Wire, next_sequence: u64) -> tokio::task::JoinHandle<()> {
    let send = wire.send.clone();
    tokio::spawn(async move {
        while send.send(Ok(StreamMessage { kind: Some(ack(next_sequence, false)) })).await.is_ok() {
            tokio::time::sleep(IDLE / 3).await;
        }
    })
}

#[tokio::test(start_paused = true)]
async fn a_taker_that_only_says_that_it_is_there_makes_no_room() {
    let (link, wire) = wire();
    let mut giver = Giver::new(link, terms());
    for step in 0..LINK_FRAMES {
        give(&mut giver, step).await.unwrap();
    }
    let beating = heartbeat(&wire, 0);
    let begin = tokio::time::Instant::now();
    let error =
        tokio::time::timeout(10 * IDLE, give(&mut giver, LINK_FRAMES)).await.expect("it ends").unwrap_err();
    assert!(matches!(error, TransferError::Idle(IDLE)), "{error}");
    assert_eq!(begin.elapsed().as_secs(), IDLE.as_secs());
    beating.abort();
}

#[tokio::test(start_paused = true)]
async fn what_is_acknowledged_anew_is_a_sign_of_life() {
    let (link, wire) = wire();
    let mut giver = Giver::new(link, terms());
    for step in 0..LINK_FRAMES {
        give(&mut giver, step).await.unwrap();
    }
    let send = wire.send.clone();
    let acking = tokio::spawn(async move {
        for next_sequence in 1..=LINK_FRAMES as u64 {
            tokio::time::sleep(IDLE * 2 / 3).await;
            send.send(Ok(StreamMessage { kind: Some(ack(next_sequence, false)) })).await.unwrap();
        }
    });
    let begin = tokio::time::Instant::now();
    let error = give(&mut giver, LINK_FRAMES).await.unwrap_err();
    assert!(matches!(error, TransferError::Idle(IDLE)), "{error}");
    assert_eq!(begin.elapsed(), IDLE * 2 / 3 * u32::try_from(LINK_FRAMES).unwrap() + IDLE);
    acking.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_taker_may_say_for_so_long_that_it_is_at_work_on_its_checkpoint() {
    let limit = 5 * IDLE;
    for completes in [true, false] {
        let (link, mut wire) = wire();
        let mut giver = Giver::new(link, terms());
        for device in 0..2 {
            giver.seal(device, None).await.unwrap();
            wire.receive.recv().await.unwrap();
        }
        let beating = heartbeat(&wire, 2);
        let send = wire.send.clone();
        let completing = tokio::spawn(async move {
            tokio::time::sleep(4 * IDLE).await;
            if completes {
                send.send(Ok(StreamMessage { kind: Some(ack(2, true)) })).await.unwrap();
            }
        });
        let begin = tokio::time::Instant::now();
        match giver.completed_within(limit).await {
            Ok(()) => assert!(completes),
            Err(error) => {
                assert!(
                    !completes && matches!(error, TransferError::NotSealed(after) if after == limit),
                    "{error}"
                );
                assert_eq!(begin.elapsed(), limit);
            }
        }
        beating.abort();
        completing.await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_keeps_talking_ends_with_its_lifetime() {
    let (mut giver, mut taker) = pair();
    let giving = async {
        loop {
            if let Err(error) = giver.progress(progress()).await {
                return error;
            }
            tokio::time::sleep(IDLE / 2).await;
        }
    };
    let taking = async {
        loop {
            if let Err(error) = taker.next().await {
                return error;
            }
        }
    };
    // The clocks of both began together, so whoever looks first ends it.
    let error = tokio::select! {
        error = giving => error,
        error = taking => error,
    };
    assert!(matches!(error, TransferError::Lifetime(_)), "{error}");

    let (link, _quiet) = wire();
    let error = Giver::new(link, terms()).listen().await;
    assert!(matches!(error, TransferError::Lifetime(_)), "silence is no error while it listens: {error}");
}

fn ack(next_sequence: u64, complete: bool) -> Kind {
    Kind::Ack(StreamAck { next_sequence, complete })
}

#[tokio::test]
async fn a_giver_refuses_what_a_taker_may_not_say() {
    let frame = Framer::new(StreamId(7), 2, &terms().limits).progress(progress());
    let cases = [
        (vec![ack(3, false)], "3 frames are acknowledged, and 2 were sent"),
        (vec![ack(2, false), ack(1, false)], "1 frames are acknowledged, and 2 were before"),
        (vec![ack(2, true)], "has all state after 2 frames"),
        (vec![ack(1, true)], "has all state after 1 frames"),
        (vec![Kind::Cutover(StreamCutover {})], "not a save with MANUAL cutover"),
        (vec![Kind::Frame(frame)], "Frame came while"),
        (vec![Kind::Open(StreamOpen::default())], "Open came while"),
    ];
    for (said, expected) in cases {
        let (link, wire) = wire();
        let mut giver = Giver::new(link, terms());
        give(&mut giver, 0).await.unwrap();
        give(&mut giver, 1).await.unwrap();
        let saying = async {
            for kind in said {
                wire.send.send(Ok(StreamMessage { kind: Some(kind) })).await.unwrap();
            }
        };
        let (error, ()) = tokio::join!(giver.listen(), saying);
        assert!(matches!(error, TransferError::Protocol(_)), "{error}");
        assert!(error.to_string().contains(expected), "{error}");
    }
    let (link, wire) = wire();
    wire.send.send(Ok(StreamMessage { kind: None })).await.unwrap();
    assert!(matches!(Giver::new(link, terms()).listen().await, TransferError::Protocol(_)));
}

#[tokio::test]
async fn a_taker_refuses_what_a_giver_may_not_say_and_damage() {
    let mut framer = Framer::new(StreamId(7), 2, &terms().limits);
    let mut damaged = framer.progress(progress());
    damaged.crc32c ^= 1;
    let cases = [
        ack(0, false),
        Kind::Cutover(StreamCutover {}),
        Kind::Open(StreamOpen::default()),
        Kind::Frame(damaged),
    ];
    for kind in cases {
        let (link, wire) = wire();
        wire.send.send(Ok(StreamMessage { kind: Some(kind) })).await.unwrap();
        let error = Taker::new(link, terms()).next().await.unwrap_err();
        assert!(matches!(error, TransferError::Protocol(_)), "{error}");
    }
    let (link, _wire) = wire();
    let error = Taker::new(link, terms()).complete().await.unwrap_err();
    assert!(matches!(error, TransferError::Protocol(_)), "nothing is sealed: {error}");
}

#[tokio::test]
async fn a_cutover_is_heard_while_there_is_nothing_to_send_and_stays_heard() {
    let (giver, taker) = pair();
    let (mut giver, mut taker) = (giver.with_cutover(), taker.with_cutover());
    let (mut early, mut again) = (giver.cutover_signal(), giver.cutover_signal());
    assert!(!early.is_requested());
    taker.cutover().await.unwrap();
    tokio::select! {
        error = giver.listen() => panic!("{error}"),
        () = early.requested() => {}
    }
    // Level-triggered: whoever asks later is told too, as often as it asks.
    again.requested().await;
    again.requested().await;
    assert!(giver.cutover_signal().is_requested());
}

#[tokio::test]
async fn progress_that_crosses_the_completion_harms_nobody() {
    let (mut giver, mut taker) = pair();
    for device in 0..2 {
        giver.seal(device, None).await.unwrap();
        taker.next().await.unwrap().unwrap();
    }
    giver.progress(progress()).await.unwrap();
    assert!(taker.next().await.unwrap().is_none());
    let (ended, completed) = tokio::join!(giver.completed(), taker.complete());
    ended.unwrap();
    completed.unwrap();
}

#[tokio::test]
async fn a_seal_on_something_else_is_not_sent() {
    let (link, mut wire) = wire();
    let mut giver = Giver::new(link, terms());
    let expected = vfio_checkpoint_seal::SealHasher::new().seal();
    give(&mut giver, 0).await.unwrap();
    let error = giver.seal_as(0, None, expected).await.unwrap_err();
    assert!(matches!(error, TransferError::Changed { device: 0, .. }), "{error}");
    drop(giver);
    wire.receive.recv().await.unwrap();
    assert_eq!(wire.receive.recv().await, None, "the seal was sent");
}

#[tokio::test]
async fn reasons_are_cut_and_cannot_move_a_terminal() {
    let (mut giver, taker) = pair();
    let reason = format!("{}\u{e4}{}", "x".repeat(1023), "y".repeat(100));
    let hearing = async {
        let error = giver.listen().await;
        drop(giver);
        error
    };
    let (error, ()) = tokio::join!(hearing, taker.abort(&reason));
    let TransferError::AbortedByPeer(heard) = error else { panic!("{error}") };
    assert_eq!(heard, "x".repeat(1023), "cut at a character");

    let (link, wire) = wire();
    let abort = Kind::Abort(StreamAbort { reason: "\u{1b}[2J".repeat(1000) });
    wire.send.send(Ok(StreamMessage { kind: Some(abort) })).await.unwrap();
    let TransferError::AbortedByPeer(heard) = Taker::new(link, terms()).next().await.unwrap_err() else {
        panic!("not aborted")
    };
    assert!(!heard.contains('\u{1b}') && heard.chars().count() <= 1024);
}

/// Whoever keeps an ear on the stream between two calls may hear that all is complete before it asks, and then that the
/// taker is done with the stream.
#[tokio::test]
async fn a_taker_that_is_done_is_not_a_broken_stream() {
    let (mut giver, mut taker) = pair();
    let taking = tokio::spawn(async move { take_all(&mut taker).await.map(drop) });
    for step in 0..FRAMES {
        give(&mut giver, step).await.unwrap();
    }
    // Nothing else goes on in this runtime: what is to be heard is heard before the time is over.
    tokio::time::pause();
    let heard = tokio::time::timeout(IDLE / 2, giver.listen()).await;
    assert!(heard.is_err(), "{heard:?}");
    giver.completed().await.unwrap();
    taking.await.unwrap().unwrap();
}
