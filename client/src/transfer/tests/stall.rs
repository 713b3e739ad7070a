//! Streams that are resumed, and whether they get on: how often, and for how long.

use super::resume::{WINDOW, cable, opened, resumable};
use super::*;

/// Whoever opens the stream again and again, and takes nothing, has one window and is not called without a pause.
#[tokio::test(start_paused = true)]
async fn a_taker_that_resumes_and_acknowledges_nothing_has_one_window() {
    for cuts in [true, false] {
        let (link, wire) = wire();
        let (mut giver, mut asked) = resumable(link, terms());
        let giving = async {
            let mut step = 0;
            loop {
                if let Err(error) = giver.chunk(0, state(0, step % 10)).await {
                    return error;
                }
                step += 1;
            }
        };
        let mut wires = vec![wire];
        let mut opened_at = Vec::new();
        let begin = tokio::time::Instant::now();
        let resuming = async {
            if cuts {
                wires[0].send.send(Err(LinkError::ended("cable"))).await.unwrap();
            }
            while let Some(answer) = asked.recv().await {
                opened_at.push(begin.elapsed());
                let (link, wire) = super::wire();
                drop(answer.send(Ok(Dialed { opened: opened(0), link })));
                if cuts {
                    wire.send.send(Err(LinkError::ended("cable"))).await.unwrap();
                }
                // Otherwise it is not read, and seems to be well.
                wires.push(wire);
            }
        };
        let patience = 10 * (WINDOW + IDLE);
        let both = async { tokio::join!(giving, resuming).0 };
        let error = tokio::time::timeout(patience, both).await.expect("it ends");
        assert!(
            matches!(&error, TransferError::NotResumed { why: Unresumed::NoProgress(WINDOW), .. }),
            "{error}"
        );
        let (first, last) = (opened_at[0], opened_at[opened_at.len() - 1]);
        assert!(last <= first + WINDOW, "{opened_at:?}");
        // With a silent one it takes the idle time to find out, before the first and after the last.
        let most = if cuts { WINDOW } else { 2 * IDLE };
        assert!(begin.elapsed() <= most, "{:?}", begin.elapsed());
        assert!(opened_at.len() < 20, "{opened_at:?}");
    }
}

/// What is acknowledged, or time in which there was nothing to be acknowledged, gives a stream its window again.
#[tokio::test(start_paused = true)]
async fn a_stream_that_gets_on_may_break_as_often_as_it_likes() {
    for with_state in [true, false] {
        let (link, mut at_taker) = wire();
        let (mut giver, mut asked) = resumable(link, terms());
        for step in 0..20_u64 {
            if with_state {
                giver.chunk(0, state(0, 0)).await.unwrap();
                at_taker.receive.recv().await.unwrap();
            }
            let lasts = tokio::time::timeout(2 * WINDOW, giver.listen()).await;
            assert!(lasts.is_err(), "{lasts:?}");
            at_taker.send.send(Err(LinkError::ended("cable"))).await.unwrap();
            let next_sequence = if with_state { step + 1 } else { 0 };
            let answering = async {
                let answer = asked.recv().await.unwrap();
                let (link, wire) = wire();
                drop(answer.send(Ok(Dialed { opened: opened(next_sequence), link })));
                wire
            };
            let lasts = tokio::time::timeout(WINDOW / 2, async {
                tokio::join!(giver.listen(), async { at_taker = answering.await }).0
            });
            let lasts = lasts.await;
            assert!(lasts.is_err(), "{lasts:?}");
        }
    }
}

/// A connection may be dead without anybody saying so. A taker that has promised to acknowledge what nothing follows, and does
/// not, is found out also while there is nothing to send.
#[tokio::test(start_paused = true)]
async fn state_that_is_never_acknowledged_is_found_out_while_nothing_is_sent() {
    for ack_delay in [Some(Duration::from_millis(5)), None] {
        let terms = Terms { limits: StreamLimits { ack_delay, ..terms().limits }, ..terms() };
        let (link, mut wire) = wire();
        let (mut giver, mut asked) = resumable(link, terms);
        // With nothing under way silence is nothing unusual.
        let lasts = tokio::time::timeout(3 * IDLE, giver.listen()).await;
        assert!(lasts.is_err() && asked.try_recv().is_err(), "{lasts:?}");
        giver.chunk(0, state(0, 0)).await.unwrap();
        wire.receive.recv().await.unwrap();
        let begin = tokio::time::Instant::now();
        let found = loop {
            // Whoever gives has other things to do now and then, and says how far it is.
            let listening = tokio::time::timeout(IDLE / 3, giver.listen());
            let asked = tokio::select! {
                asked = asked.recv() => asked.is_some(),
                lasts = listening => {
                    assert!(lasts.is_err(), "{lasts:?}");
                    false
                }
            };
            if asked || begin.elapsed() > 5 * IDLE {
                break asked.then(|| begin.elapsed());
            }
            giver.progress(progress()).await.unwrap();
            if let Ok(message) = wire.receive.try_recv() {
                drop(message);
            }
        };
        assert_eq!(found, ack_delay.map(|delay| IDLE + delay));
    }
}

/// A taker that has all does not know how patient its giver is, and speaks often enough for one that waits for a few seconds.
#[tokio::test(start_paused = true)]
async fn a_taker_that_lingers_is_heard_by_a_giver_that_is_less_patient() {
    let (link, take) = cable(usize::MAX);
    let patient = |idle_timeout| Terms { limits: StreamLimits { idle_timeout, ..terms().limits }, ..terms() };
    let (mut giver, _asked) = resumable(link, patient(Duration::from_secs(3)));
    let mut taker = Taker::new(take, patient(Duration::from_mins(1)));
    for step in 0..FRAMES {
        give(&mut giver, step).await.unwrap();
        taker.next().await.unwrap();
    }
    let (end, lingering) = tokio::join!(
        tokio::time::timeout(10 * IDLE, giver.completed()),
        tokio::time::timeout(10 * IDLE, taker.linger()),
    );
    assert!(end.is_err() && lingering.is_err(), "{end:?}, {lingering:?}");
}

/// A taker that promises nothing may keep less than an ack interval to itself for as long as it likes. A line that was well
/// for a whole window gives the window again also then, and no longer one does not.
#[tokio::test(start_paused = true)]
async fn what_a_taker_may_keep_to_itself_does_not_count_against_a_line_that_was_well() {
    // How many chunks are owed an ack, how long each line lasts, and how often it is dialed after three breaks.
    for (chunks, lasts, dials) in [(1, 10 * WINDOW, 3), (2, 10 * WINDOW, 1), (1, WINDOW * 3 / 5, 2)] {
        let (link, first) = wire();
        let (mut giver, mut asked) = resumable(link, terms());
        let mut wires = vec![first];
        for chunk in 0..chunks {
            giver.chunk(0, state(0, chunk)).await.unwrap();
        }
        let mut error = None;
        for _break in 0..3 {
            wires.last().unwrap().send.send(Err(LinkError::ended("cable"))).await.unwrap();
            let answering = async {
                let answer = asked.recv().await?;
                let (link, mut wire) = wire();
                drop(answer.send(Ok(Dialed { opened: opened(0), link })));
                for _again in 0..chunks {
                    wire.receive.recv().await?;
                }
                Some(wire)
            };
            let answering = tokio::time::timeout(lasts, answering);
            let (ended, wire) = tokio::join!(tokio::time::timeout(lasts, giver.listen()), answering);
            wires.extend(wire.ok().flatten());
            error = ended.ok();
            if error.is_some() {
                break;
            }
        }
        assert_eq!(wires.len() - 1, dials, "{chunks} chunks, {lasts:?}: {error:?}");
        match error {
            None => assert_eq!(dials, 3),
            Some(error) => assert!(
                matches!(&error, TransferError::NotResumed { why: Unresumed::NoProgress(WINDOW), .. }),
                "{error}"
            ),
        }
    }
}

/// A taker may promise to acknowledge within as long as a minute, and is not late before that.
#[tokio::test(start_paused = true)]
async fn an_ack_is_not_overdue_before_it_was_promised() {
    let ack_delay = Some(2 * IDLE);
    let (link, mut wire) = wire();
    let terms = Terms { limits: StreamLimits { ack_delay, ..terms().limits }, ..terms() };
    let (mut giver, mut asked) = resumable(link, terms);
    giver.chunk(0, state(0, 0)).await.unwrap();
    wire.receive.recv().await.unwrap();
    let lasts = tokio::time::timeout(2 * IDLE, giver.listen()).await;
    assert!(lasts.is_err() && asked.try_recv().is_err(), "{lasts:?}");
    let ack = StreamAck { next_sequence: 1, complete: false };
    wire.send.send(Ok(StreamMessage { kind: Some(Kind::Ack(ack)) })).await.unwrap();
    let lasts = tokio::time::timeout(10 * IDLE, giver.listen()).await;
    assert!(lasts.is_err() && asked.try_recv().is_err(), "{lasts:?}");
    // Late is late all the same.
    giver.chunk(0, state(0, 1)).await.unwrap();
    let begin = tokio::time::Instant::now();
    let found = tokio::select! {
        found = asked.recv() => found.map(|_| begin.elapsed()),
        error = giver.listen() => panic!("{error}"),
    };
    assert_eq!(found, Some(3 * IDLE));
}

/// Whoever takes may be at work on one piece for long. It is not given up for as long as it says that it is there.
#[tokio::test(start_paused = true)]
async fn a_taker_that_is_busy_is_heard() {
    let (link, take) = cable(usize::MAX);
    let ack_delay = Some(Duration::from_millis(5));
    let terms = Terms { limits: StreamLimits { ack_delay, ..terms().limits }, ..terms() };
    let (mut giver, mut asked) = resumable(link, terms.clone());
    let mut taker = Taker::new(take, terms);
    for step in 0..3 {
        giver.chunk(0, state(0, step)).await.unwrap();
    }
    taker.next().await.unwrap();
    let (end, busy) = tokio::join!(
        tokio::time::timeout(10 * IDLE, giver.listen()),
        tokio::time::timeout(10 * IDLE, taker.busy()),
    );
    assert!(end.is_err() && busy.is_err() && asked.try_recv().is_err(), "{end:?}");
    for step in 1..3 {
        let Ok(Some(Accepted::Chunk { chunk, .. })) = taker.next().await else { panic!("step {step}") };
        assert_eq!(chunk.bytes(), &state(0, step));
    }
}
