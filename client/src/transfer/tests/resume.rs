//! Connections that break: in memory, cut after so many messages.
//!
//! ```text
//!   Giver --redial--> Desk --> desk of the taker: reattach --> a new cable, and what the taker expects next
//!     |                                                          ^
//!     '====== cable: cut after so many messages, either way =====' Taker
//! ```

use std::collections::VecDeque;
use std::time::SystemTime;

use tokio::sync::oneshot;
use vfio_checkpoint_proto::domain::{
    Backend, DataSize, DeviceManifest, Fingerprint, LogicalDevice, Manifest, SourceDisposition, StreamOpened,
};
use vfio_checkpoint_proto::ids::{Epoch, LogicalDeviceId};

use super::*;

pub(super) const WINDOW: Duration = Duration::from_secs(20);

pub(super) fn opened(next_sequence: u64) -> StreamOpened {
    let device = DeviceManifest {
        source_device: "devices/a".parse().unwrap(),
        source_address: "sim:".into(),
        backend: Backend::Sim,
        driver: "sim".into(),
        fingerprint: Fingerprint::default(),
        logical_device: LogicalDevice { id: LogicalDeviceId::from_bytes([1; 16]), epoch: Epoch(1) },
        data_size: DataSize::Known(3),
    };
    let manifest = Manifest {
        operation: "operations/o".parse().unwrap(),
        create_time: SystemTime::UNIX_EPOCH,
        devices: vec![device],
        source_disposition: SourceDisposition::RunsOn,
    };
    let Terms { version, stream, limits, .. } = terms();
    StreamOpened { version, stream_id: stream, manifest, limits, next_sequence }
}

/// Two ends of a connection that breaks after so many messages, whichever way they go.
pub(super) fn cable(messages: usize) -> (Link, Link) {
    let (give, mut frames) = Link::outgoing_channel();
    let (take, mut acks) = Link::outgoing_channel();
    let (to_giver, giver_hears) = mpsc::channel(LINK_FRAMES);
    let (to_taker, taker_hears) = mpsc::channel(LINK_FRAMES);
    tokio::spawn(async move {
        for _ in 0..messages {
            tokio::select! {
                frame = frames.recv() => match frame {
                    Some(frame) => drop(to_taker.send(Ok(frame)).await),
                    None => return,
                },
                ack = acks.recv() => match ack {
                    Some(ack) => drop(to_giver.send(Ok(ack)).await),
                    None => return,
                },
            }
        }
        let cut = || Err(LinkError::ended("the cable was cut"));
        let _ = tokio::join!(to_giver.send(cut()), to_taker.send(cut()));
    });
    (Link::new(ReceiverStream::new(giver_hears), give), Link::new(ReceiverStream::new(taker_hears), take))
}

/// Where a giver asks for another connection.
struct Desk(mpsc::Sender<oneshot::Sender<Result<Dialed, OpenStreamError>>>);

impl Redial for Desk {
    fn redial(&mut self, stream: StreamId) -> Redialing<'_> {
        assert_eq!(stream, terms().stream);
        Box::pin(async {
            let (answer, answered) = oneshot::channel();
            self.0.send(answer).await.map_err(|_| OpenStreamError::Ended)?;
            answered.await.unwrap_or(Err(OpenStreamError::Ended))
        })
    }
}

pub(super) type Asked = mpsc::Receiver<oneshot::Sender<Result<Dialed, OpenStreamError>>>;

pub(super) fn resumable(link: Link, terms: Terms) -> (Giver, Asked) {
    let spool = Spool::in_memory(Spool::least_memory_bytes(&terms.limits));
    let (desk, asked) = mpsc::channel(1);
    (Giver::new(link, terms).resumable(spool, Box::new(Desk(desk)), WINDOW).unwrap(), asked)
}

/// What a taker has: each thing that was accepted, in order, and how often its connection was a new one.
#[derive(Debug, Default)]
struct Seen {
    accepted: Vec<String>,
    state: [Vec<u8>; 2],
    connections: usize,
}

/// Takes all there is, over as many connections as it takes; `cuts` says after how many messages each one breaks.
async fn take_on(taker: &mut Taker, asked: &mut Asked, cuts: &mut VecDeque<usize>, seen: &mut Seen) {
    let (mut is_broken, mut is_complete) = (false, false);
    loop {
        let taking = async {
            if is_complete || is_broken {
                return std::future::pending().await;
            }
            match taker.next().await? {
                Some(accepted) => Ok(Some(accepted)),
                None => taker.complete().await.map(|()| None),
            }
        };
        tokio::select! {
            biased;
            Some(answer) = asked.recv() => {
                let (give, take) = cable(cuts.pop_front().unwrap_or(usize::MAX));
                let opened = opened(taker.reattach(take).unwrap());
                seen.connections += 1;
                // A giver that asked and is gone asks again.
                let _ = answer.send(Ok(Dialed { opened, link: give }));
                (is_broken, is_complete) = (false, false);
            }
            piece = taking => match piece {
                Ok(Some(accepted)) => {
                    seen.accepted.push(match accepted {
                        Accepted::Chunk { device, chunk } => {
                            seen.state[device].extend_from_slice(chunk.bytes());
                            format!("{device}: {} at {}", chunk.bytes().len(), chunk.offset())
                        }
                        Accepted::Progress(progress) => format!("{:?}", progress.phase),
                        Accepted::Sealed { device, seal, .. } => format!("{device}: sealed {:?}", seal.seal()),
                    });
                }
                Ok(None) => is_complete = true,
                Err(error) if error.is_break() => is_broken = true,
                Err(error) => panic!("{error}"),
            },
        }
    }
}

#[tokio::test]
async fn a_cut_after_any_message_and_after_any_two_loses_and_repeats_nothing() {
    let mut whole: Option<Seen> = None;
    let mut resent = 0;
    for first in (1..=FRAMES + 8).rev() {
        for second in [usize::MAX, 1, 2, 3, 5, 8] {
            let (give, take) = cable(first);
            let (mut giver, mut asked) = resumable(give, terms());
            let mut taker = Taker::new(take, terms());
            let (mut cuts, mut seen) = (VecDeque::from([second]), Seen::default());
            tokio::select! {
                end = give_all(&mut giver) => end.unwrap(),
                () = take_on(&mut taker, &mut asked, &mut cuts, &mut seen) => {}
            }
            let accepted = seen.accepted.len() as u64;
            assert_eq!(taker.taken_frames(), accepted, "{first} {second}: each frame was verified once");
            // How far a giver is it says to nobody while there is no line.
            seen.accepted.retain(|what| what != "StopCopy");
            assert_eq!(seen.accepted.len(), FRAMES - 1, "{first} {second}");
            resent += giver.resent_bytes();
            let whole = whole.get_or_insert_with(|| {
                assert_eq!(seen.connections, 0, "the longest cable lasts");
                std::mem::take(&mut seen)
            });
            if !seen.accepted.is_empty() {
                assert_eq!(
                    (&seen.accepted, &seen.state),
                    (&whole.accepted, &whole.state),
                    "{first} {second}"
                );
            }
        }
    }
    assert!(resent > 0);
}

#[tokio::test]
async fn bytes_that_go_twice_are_counted_and_are_the_same_bytes() {
    let (link, mut wire) = wire();
    let (mut giver, mut asked) = resumable(link, terms());
    give(&mut giver, 0).await.unwrap();
    let resent = giver.resent();
    let first = wire.receive.recv().await.unwrap();
    give(&mut giver, 1).await.unwrap();
    let second = wire.receive.recv().await.unwrap();
    wire.send.send(Err(LinkError::ended("cable"))).await.unwrap();
    let (other, mut again) = super::wire();
    let answering = async {
        let answer = asked.recv().await.unwrap();
        drop(answer.send(Ok(Dialed { opened: opened(1), link: other })));
    };
    let giving = async {
        // Given while there is no line, and after it.
        for step in 2..4 {
            give(&mut giver, step).await.unwrap();
        }
    };
    tokio::join!(giving, answering);
    // Whatever has room next hands on what waits.
    let hearing = tokio::spawn(async move {
        let mut frames = Vec::new();
        for _ in 0..3 {
            frames.push(again.receive.recv().await.unwrap());
        }
        (frames, again)
    });
    tokio::select! {
        error = giver.listen() => panic!("{error}"),
        heard = hearing => {
            let (frames, _again) = heard.unwrap();
            assert_eq!(frames[0], second);
            assert_ne!(frames[0], first);
        }
    }
    assert_eq!(
        resent.bytes(),
        CHUNK_BYTES as u64,
        "one chunk went twice, two went later than they might have"
    );
    assert_eq!(giver.resent_bytes(), resent.bytes());
}

#[tokio::test(start_paused = true)]
async fn while_there_is_no_line_the_spool_takes_what_it_can_and_then_the_giver_waits() {
    let folder = tempfile::tempdir().unwrap();
    let mut limits = terms().limits;
    limits.max_device_bytes = 1 << 30;
    let terms = Terms { limits, ..terms() };
    let memory_bytes = Spool::least_memory_bytes(&limits);
    for disk_bytes in [0_u64, 1 << 20] {
        let options = SpoolOptions { memory_bytes, disk_bytes, folder: folder.path().to_owned() };
        let spool = Spool::open(options).await.unwrap();
        let (desk, mut asked) = mpsc::channel(1);
        let (link, wire) = wire();
        let mut giver =
            Giver::new(link, terms.clone()).resumable(spool, Box::new(Desk(desk)), WINDOW).unwrap();
        wire.send.send(Err(LinkError::ended("cable"))).await.unwrap();
        let flow = giver.flow();
        assert!(!flow.is_down(), "nobody has found out");
        let counter = tokio::sync::watch::Sender::new(0_usize);
        let count = counter.subscribe();
        let giving = async {
            for step in 0.. {
                giver.chunk(0, state(0, step % 10)).await.unwrap();
                counter.send_replace(step + 1);
                if step == 99 {
                    break;
                }
            }
            giver.seal(0, None).await.unwrap();
            giver.seal(1, None).await.unwrap();
            giver.completed().await.unwrap();
        };
        let limit = usize::try_from((memory_bytes + disk_bytes) / CHUNK_BYTES as u64).unwrap();
        let answering = async {
            let answer = asked.recv().await.unwrap();
            // Time passes only once nobody has anything to do.
            tokio::time::sleep(Duration::from_millis(500)).await;
            let stopped_at = *count.borrow();
            let least = if disk_bytes == 0 { 6 } else { 15 };
            assert!((least..=limit).contains(&stopped_at), "{stopped_at} of {limit}");
            assert!(flow.is_down());
            let (give, take) = cable(usize::MAX);
            let mut taker = Taker::new(take, terms.clone());
            drop(answer.send(Ok(Dialed { opened: opened(0), link: give })));
            let mut bytes = 0;
            while let Some(accepted) = taker.next().await.unwrap() {
                if let Accepted::Chunk { chunk, .. } = accepted {
                    assert_eq!(chunk.offset(), bytes);
                    bytes += chunk.bytes().len() as u64;
                }
            }
            taker.complete().await.unwrap();
            assert_eq!(bytes, 100 * CHUNK_BYTES as u64);
            assert!(!flow.is_down());
        };
        tokio::join!(giving, answering);
    }
}

#[tokio::test(start_paused = true)]
async fn trouble_is_tried_again_within_the_window_and_a_refusal_is_not() {
    // Trouble, and then a line.
    let (link, wire) = wire();
    let (mut giver, mut asked) = resumable(link, terms());
    wire.send.send(Err(LinkError::ended("cable"))).await.unwrap();
    let answering = async {
        for _ in 0..5 {
            drop(asked.recv().await.unwrap().send(Err(OpenStreamError::Ended)));
        }
        let answer = asked.recv().await.unwrap();
        let (give, take) = cable(usize::MAX);
        drop(answer.send(Ok(Dialed { opened: opened(0), link: give })));
        take_all(&mut Taker::new(take, terms())).await.unwrap().len()
    };
    let (end, taken) = tokio::join!(give_all(&mut giver), answering);
    end.unwrap();
    assert_eq!(taken, FRAMES - 1, "all but the progress, which nobody was there to hear");

    // Nothing but trouble.
    let (link, wire) = super::wire();
    let (mut giver, mut asked) = resumable(link, terms());
    wire.send.send(Err(LinkError::ended("cable"))).await.unwrap();
    let begin = tokio::time::Instant::now();
    let troubles = tokio::spawn(async move {
        let mut tries = 0_usize;
        while let Some(answer) = asked.recv().await {
            tries += 1;
            // Every other one gets no answer at all.
            if tries.is_multiple_of(2) {
                tokio::spawn(async move {
                    tokio::time::sleep(10 * WINDOW).await;
                    drop(answer);
                });
            } else {
                drop(answer.send(Err(OpenStreamError::Ended)));
            }
        }
        tries
    });
    let error = giver.listen().await;
    assert!(
        matches!(&error, TransferError::NotResumed { broke, why: Unresumed::Window { .. } }
        if matches!(**broke, TransferError::Broken(_))),
        "{error}"
    );
    let said = error.to_string();
    assert!(said.contains("cable") && said.contains("20000 ms"), "{said}");
    assert!(begin.elapsed() <= WINDOW && begin.elapsed() > WINDOW / 2, "{:?}", begin.elapsed());
    assert!((4..30).contains(&troubles.await.unwrap()));
    assert!(give(&mut giver, 0).await.is_err(), "it is over");

    // What is said for good.
    let refusals = [OpenStreamError::GivenUp("the disk is full".to_owned()), OpenStreamError::NotOpened];
    for refusal in refusals {
        let (link, wire) = super::wire();
        let (mut giver, mut asked) = resumable(link, terms());
        wire.send.send(Err(LinkError::ended("cable"))).await.unwrap();
        let begin = tokio::time::Instant::now();
        let answering = async {
            drop(asked.recv().await.unwrap().send(Err(refusal)));
            asked.recv().await.is_none()
        };
        let giving = async { giver.completed().await.unwrap_err() };
        let (error, is_over) = tokio::join!(giving, answering);
        assert!(matches!(error, TransferError::NotResumed { why: Unresumed::Refused(_), .. }), "{error}");
        assert!(is_over && begin.elapsed().is_zero());
    }
}

#[tokio::test]
async fn a_taker_cannot_make_a_giver_go_on_where_it_likes() {
    for (next_sequence, stream) in [(0, 7), (3, 7), (u64::MAX, 7), (2, 8)] {
        let (link, wire) = wire();
        let (mut giver, mut asked) = resumable(link, terms());
        give(&mut giver, 0).await.unwrap();
        give(&mut giver, 1).await.unwrap();
        wire.send.send(Ok(StreamMessage { kind: Some(ack(1, false)) })).await.unwrap();
        wire.send.send(Err(LinkError::ended("cable"))).await.unwrap();
        // Made, and not sent to anybody: nobody can have it.
        let answering = async {
            let answer = asked.recv().await.unwrap();
            let (link, other) = super::wire();
            let opened = StreamOpened { stream_id: StreamId(stream), ..opened(next_sequence) };
            drop(answer.send(Ok(Dialed { opened, link })));
            other
        };
        let giving = async {
            give(&mut giver, 2).await.unwrap();
            giver.listen().await
        };
        let (error, _other) = tokio::join!(giving, answering);
        match stream {
            7 => {
                assert!(matches!(error, TransferError::Protocol(_)), "{next_sequence}: {error}");
                assert!(error.to_string().contains("1 were acknowledged and 2 sent"), "{error}");
            }
            _ => assert!(matches!(error, TransferError::NotResumed { .. }), "{error}"),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_line_on_which_nothing_moves_is_dialed_again_and_let_go_only_then() {
    let (link, mut silent) = wire();
    let (mut giver, mut asked) = resumable(link, terms());
    let begin = tokio::time::Instant::now();
    let answering = async {
        let answer = asked.recv().await.unwrap();
        assert_eq!(begin.elapsed(), IDLE);
        assert!(!silent.send.is_closed(), "to end it now would be the last word on the stream");
        let (give, take) = cable(usize::MAX);
        drop(answer.send(Ok(Dialed { opened: opened(0), link: give })));
        let seen = take_all(&mut Taker::new(take, terms())).await.unwrap();
        assert!(silent.send.is_closed());
        while silent.receive.recv().await.is_some() {}
        seen.len()
    };
    let (end, taken) = tokio::join!(give_all(&mut giver), answering);
    end.unwrap();
    assert_eq!((taken, giver.resent_bytes()), (FRAMES - 1, 2 * CHUNK_BYTES as u64), "what was in the queue");
}

#[tokio::test]
async fn a_stream_of_version_1_is_not_resumed_and_a_spool_that_is_too_small_is_refused() {
    let old = Terms { version: Version(1), ..terms() };
    let (link, wire) = wire();
    let (mut giver, mut asked) = resumable(link, old);
    wire.send.send(Err(LinkError::ended("cable"))).await.unwrap();
    assert!(matches!(giver.listen().await, TransferError::Broken(_)));
    assert!(asked.recv().await.is_none(), "nobody dials");

    let (link, _wire) = super::wire();
    let (desk, _asked) = mpsc::channel(1);
    let small = Giver::new(link, terms()).resumable(Spool::in_memory(1 << 10), Box::new(Desk(desk)), WINDOW);
    assert!(matches!(small, Err(TransferError::Spool(SpoolError::TooSmall { .. }))));
}

#[tokio::test]
async fn an_abort_and_a_giver_that_leaves_are_no_breaks() {
    let (link, wire) = wire();
    let (mut giver, mut asked) = resumable(link, terms());
    let abort = Kind::Abort(StreamAbort { reason: "no".to_owned() });
    wire.send.send(Ok(StreamMessage { kind: Some(abort) })).await.unwrap();
    assert!(matches!(giver.listen().await, TransferError::AbortedByPeer(_)));
    drop(giver);
    assert!(asked.recv().await.is_none(), "nobody dials");

    let (link, wire) = super::wire();
    let mut taker = Taker::new(link, terms());
    drop(wire);
    assert!(!taker.next().await.unwrap_err().is_break(), "it ended the stream in good order");
    let (link, wire) = super::wire();
    let mut taker = Taker::new(link, terms());
    wire.send.send(Err(LinkError::ended("cable"))).await.unwrap();
    assert!(taker.next().await.unwrap_err().is_break());
}

/// A connection can break in one direction first. What came in over the other before it did is taken like everything else.
#[tokio::test]
async fn an_ack_that_cannot_be_said_any_more_costs_no_frame() {
    let (link, wire) = wire();
    let Wire { send, receive } = wire;
    drop(receive);
    let mut taker = Taker::new(link, terms());
    let mut framer = Framer::new(terms().stream, terms().devices, &terms().limits);
    let saying = async {
        for step in 0..4 {
            let frame = framer.chunk(0, state(0, step)).unwrap().next().unwrap();
            send.send(Ok(StreamMessage { kind: Some(Kind::Frame(frame)) })).await.unwrap();
        }
        send.send(Err(LinkError::ended("cable"))).await.unwrap();
    };
    let taking = async {
        let mut bytes = 0;
        loop {
            match taker.next().await {
                Ok(Some(Accepted::Chunk { chunk, .. })) => bytes += chunk.bytes().len(),
                Ok(other) => panic!("{other:?}"),
                Err(error) => break (bytes, error),
            }
        }
    };
    let ((bytes, error), ()) = tokio::join!(taking, saying);
    assert!(error.is_break(), "{error}");
    assert_eq!((bytes, taker.taken_frames()), (4 * CHUNK_BYTES, 4));
}

#[tokio::test(start_paused = true)]
async fn a_taker_that_has_all_and_lingers_is_heard_and_hears() {
    let (link, take) = cable(usize::MAX);
    let (mut giver, mut asked) = resumable(link, terms());
    let mut taker = Taker::new(take, terms());
    for step in 0..FRAMES {
        give(&mut giver, step).await.unwrap();
        taker.next().await.unwrap();
    }
    let taking = async {
        let lingering = tokio::time::timeout(10 * IDLE, taker.linger()).await;
        assert!(lingering.is_err(), "{lingering:?}");
        taker.complete().await.unwrap();
    };
    let (end, ()) = tokio::join!(giver.completed(), taking);
    end.unwrap();
    assert!(asked.try_recv().is_err(), "nobody dialed");

    let (mut giver, mut taker) = pair();
    for step in 0..FRAMES {
        give(&mut giver, step).await.unwrap();
        taker.next().await.unwrap();
    }
    let (error, ()) = tokio::join!(taker.linger(), giver.abort("had enough"));
    assert!(matches!(error, TransferError::AbortedByPeer(_)), "{error}");
}

#[tokio::test]
async fn whoever_has_no_taker_any_more_can_still_say_that_all_is_complete() {
    let (link, take) = cable(usize::MAX);
    let (mut giver, mut asked) = resumable(link, terms());
    let mut taker = Taker::new(take, terms());
    for step in 0..FRAMES {
        give(&mut giver, step).await.unwrap();
        taker.next().await.unwrap();
    }
    drop(taker);
    let answering = async {
        let answer = asked.recv().await.unwrap();
        let (give, take) = cable(usize::MAX);
        drop(answer.send(Ok(Dialed { opened: opened(FRAMES as u64), link: give })));
        say_complete(take, FRAMES as u64).await;
    };
    let (end, ()) = tokio::join!(giver.completed(), answering);
    end.unwrap();
    assert_eq!(giver.resent_bytes(), 0);
}
