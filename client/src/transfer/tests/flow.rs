//! What is known of what is under way: when a taker says what has arrived, and what its giver counts.

use super::*;

const DELAY: Duration = Duration::from_millis(6);
const CHUNK: u64 = CHUNK_BYTES as u64;

/// An ack takes four chunks, or the delay.
fn prompt() -> Terms {
    let limits = StreamLimits { ack_interval_bytes: 4 * CHUNK, ack_delay: Some(DELAY), ..terms().limits };
    Terms { limits, ..terms() }
}

/// Nobody has to dial.
struct Nobody;

impl Redial for Nobody {
    fn redial(&mut self, _stream: StreamId) -> Redialing<'_> {
        Box::pin(std::future::pending())
    }
}

fn giver(terms: Terms) -> (Giver, Wire) {
    let (link, wire) = wire();
    let spool = Spool::in_memory(Spool::least_memory_bytes(&terms.limits));
    (Giver::new(link, terms).resumable(spool, Box::new(Nobody), IDLE).unwrap(), wire)
}

#[tokio::test(start_paused = true)]
async fn what_nothing_follows_is_acknowledged_after_the_delay_and_not_before() {
    let (link, mut wire) = wire();
    let mut taker = Taker::new(link, prompt());
    let mut framer = Framer::new(StreamId(7), 2, &prompt().limits);
    let taking = tokio::spawn(async move {
        while taker.next().await.unwrap().is_some() {}
        taker
    });
    let begin = tokio::time::Instant::now();
    for step in 0..7 {
        let frame = framer.chunk(0, state(0, step)).unwrap().next().unwrap();
        wire.send.send(Ok(StreamMessage { kind: Some(Kind::Frame(frame)) })).await.unwrap();
        tokio::time::sleep(DELAY / 2).await;
    }
    // The bytes made one due, and the silence another.
    assert_eq!(wire.receive.recv().await.unwrap().kind, Some(ack(4, false)));
    assert!(wire.receive.try_recv().is_err(), "more followed each time");
    assert_eq!(wire.receive.recv().await.unwrap().kind, Some(ack(7, false)));
    assert_eq!(begin.elapsed(), DELAY * 4);
    // Of nothing new nothing is said, nor of what carries no state.
    let frame = framer.progress(progress());
    wire.send.send(Ok(StreamMessage { kind: Some(Kind::Frame(frame)) })).await.unwrap();
    tokio::time::sleep(10 * DELAY).await;
    assert!(wire.receive.try_recv().is_err());
    for device in 0..2 {
        let frame = framer.seal(device, None).unwrap().0;
        wire.send.send(Ok(StreamMessage { kind: Some(Kind::Frame(frame)) })).await.unwrap();
    }
    taking.await.unwrap();
}

#[tokio::test]
async fn what_is_under_way_is_what_was_given_and_not_acknowledged() {
    let (mut giver, mut wire) = giver(prompt());
    let flow = giver.flow();
    for step in 0..4 {
        give(&mut giver, step).await.unwrap();
        wire.receive.recv().await.unwrap();
    }
    // A chunk that its giver has, and that no frame was made of yet.
    let given_bytes = 5 * CHUNK;
    assert_eq!(flow.under_way(given_bytes), Some(5 * CHUNK));
    for (next_sequence, under_way) in [(1, 4), (1, 4), (3, 2), (4, 1)] {
        wire.send.send(Ok(StreamMessage { kind: Some(ack(next_sequence, false)) })).await.unwrap();
        tokio::select! {
            biased;
            error = giver.listen() => panic!("{error}"),
            () = tokio::task::yield_now() => {}
        }
        assert_eq!(flow.under_way(given_bytes), Some(under_way * CHUNK), "{next_sequence}");
    }
}

#[tokio::test]
async fn what_a_taker_may_keep_to_itself_is_not_waited_for() {
    // It owes an ack for every two chunks, and for less none at all.
    let (mut giver, mut wire) = giver(terms());
    let flow = giver.flow();
    let mut seen = Vec::new();
    for step in 0..4 {
        give(&mut giver, step).await.unwrap();
        wire.receive.recv().await.unwrap();
        seen.push(flow.under_way((step as u64 + 1) * CHUNK).unwrap());
    }
    assert_eq!(seen, [0, 1, CHUNK + 1, 2 * CHUNK + 1]);
    let (link, _wire) = super::wire();
    assert_eq!(Giver::new(link, prompt()).flow().under_way(CHUNK), None, "nobody keeps what is acknowledged");
}
