use std::time::UNIX_EPOCH;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use vfio_checkpoint_client::transfer::{Link, LinkError, Terms};
use vfio_checkpoint_proto::domain::{
    Backend, DataSize, DeviceManifest, Fingerprint, LogicalDevice, Manifest, SourceDisposition, StreamLimits,
};
use vfio_checkpoint_proto::frame::Framer;
use vfio_checkpoint_proto::ids::{Epoch, LogicalDeviceId, OperationName, StreamId};
use vfio_checkpoint_proto::v1::stream_message::Kind;
use vfio_checkpoint_proto::v1::{StreamAck, StreamMessage};
use vfio_checkpoint_proto::version::Version;

use super::*;
use crate::core::Tasks;
use crate::environment::UnixMillis;
use crate::operation::record::JobRecord;
use crate::operation::{Fixed, Opener, Refused};
use crate::transfer::Agreement;

const STREAM: StreamId = StreamId(7);

/// The other end of a connection.
struct Giver {
    send: mpsc::Sender<Result<StreamMessage, LinkError>>,
    receive: mpsc::Receiver<StreamMessage>,
}

impl Giver {
    async fn says(&self, frame: vfio_checkpoint_proto::v1::Frame) {
        self.send.send(Ok(StreamMessage { kind: Some(Kind::Frame(frame)) })).await.unwrap();
    }

    async fn breaks(&self) {
        self.send.send(Err(LinkError::ended("cable"))).await.unwrap();
    }

    /// What it is told to go on with.
    async fn opened(&mut self) -> u64 {
        match self.receive.recv().await.unwrap().kind {
            Some(Kind::Opened(opened)) => opened.next_sequence,
            other => panic!("{other:?}"),
        }
    }

    /// It is told that all was taken, and nothing after that.
    async fn completed(&mut self) -> u64 {
        let said = self.receive.recv().await.unwrap().kind;
        let Some(Kind::Ack(StreamAck { next_sequence, complete: true })) = said else { panic!("{said:?}") };
        assert_eq!(self.receive.recv().await, None);
        next_sequence
    }
}

fn connection() -> (Attached, Giver) {
    let (outgoing, receive) = Link::outgoing_channel();
    let (send, incoming) = mpsc::channel(4);
    let link = Link::new(ReceiverStream::new(incoming), outgoing.clone());
    let terms = Agreement::Ours { version: Version(2), max_chunk_bytes: None, outgoing };
    (Attached { link, terms, opener: String::new() }, Giver { send, receive })
}

fn opened() -> StreamOpened {
    let device = DeviceManifest {
        source_device: "devices/a".parse().unwrap(),
        source_address: "sim:".into(),
        backend: Backend::Sim,
        driver: "sim".into(),
        fingerprint: Fingerprint::default(),
        logical_device: LogicalDevice { id: LogicalDeviceId::from_bytes([1; 16]), epoch: Epoch(1) },
        data_size: DataSize::Unknown,
    };
    let manifest = Manifest {
        operation: "operations/o".parse().unwrap(),
        create_time: UNIX_EPOCH,
        devices: vec![device],
        source_disposition: SourceDisposition::RunsOn,
    };
    let limits = StreamLimits {
        max_chunk_bytes: 1 << 16,
        max_device_bytes: 1 << 20,
        idle_timeout: Duration::from_mins(1),
        lifetime: Duration::from_hours(1),
        ack_interval_bytes: 1 << 20,
        ack_delay: None,
    };
    StreamOpened { version: Version(2), stream_id: STREAM, manifest, limits, next_sequence: 0 }
}

fn id() -> Opener {
    Opener { stream: STREAM, identity: "spiffe://lab.test/restorer".to_owned() }
}

/// A source on a stream that is open, its operation, the giver, and whoever makes its frames.
fn source(window: Duration) -> (WireSource, Arc<Entry>, Giver, Framer) {
    let fixed = Fixed {
        name: OperationName::from_id("0-0").unwrap(),
        job: JobRecord::Restore { barrier: false, hold: false },
        devices: Vec::new(),
        caller: id().identity,
        request_id: None,
        owner_pod: String::new(),
        created: UnixMillis(0),
        trace_id: None,
        checkpoint: None,
        peer: None,
    };
    let entry = Arc::new(Entry::new(fixed, None, UnixMillis(1)).0);
    let (Attached { link, .. }, giver) = connection();
    let comeback =
        Comeback::new(entry.reserve(id()), opened(), Environment::production(), Tasks::default(), window);
    let taker = Taker::new(link, Terms::of(&opened()));
    let framer = Framer::new(STREAM, 1, &opened().limits);
    (WireSource::resumable(taker, Arc::clone(&entry), comeback), entry, giver, framer)
}

fn chunk(framer: &mut Framer) -> vfio_checkpoint_proto::v1::Frame {
    framer.chunk(0, Bytes::from_static(b"state")).unwrap().next().unwrap()
}

/// Hands over another connection, as the call does.
fn comes_back(entry: &Entry) -> Giver {
    let (attached, giver) = connection();
    assert!(entry.resume_stream(&id(), attached).unwrap().is_none());
    giver
}

#[tokio::test]
async fn the_latest_connection_counts_and_one_that_is_gone_again_ends_nothing() {
    let (mut source, entry, first, mut framer) = source(Duration::from_mins(1));
    first.says(chunk(&mut framer)).await;
    assert!(matches!(source.next().await.unwrap(), Some(Arrival::Chunk { .. })));
    first.breaks().await;
    let (tell, told) = oneshot::channel();
    let taking = tokio::spawn(async move {
        let next = source.next().await.map(|arrival| arrival.is_some());
        let _ = tell.send(next);
        source
    });
    // Gone before it was looked at, and displaced before it was: neither is what is waited for.
    drop(comes_back(&entry));
    let mut displaced = comes_back(&entry);
    let mut there = comes_back(&entry);
    assert_eq!(there.opened().await, 1);
    while let Some(message) = displaced.receive.recv().await {
        // Where it was the latest for a moment it was answered.
        assert!(matches!(message.kind, Some(Kind::Opened(_))), "{message:?}");
    }
    there.says(chunk(&mut framer)).await;
    assert!(told.await.unwrap().unwrap(), "it goes on");

    // One that seems to be well is displaced, too.
    let mut source = taking.await.unwrap();
    let mut latest = comes_back(&entry);
    let (arrival, next) = tokio::join!(source.next(), async {
        let next = latest.opened().await;
        latest.says(chunk(&mut framer)).await;
        next
    });
    assert!(matches!(arrival.unwrap(), Some(Arrival::Chunk { .. })));
    assert_eq!(next, 2);
    assert_eq!(there.receive.recv().await, None, "it was let go");
}

#[tokio::test]
async fn whoever_does_not_come_back_in_time_comes_in_vain() {
    let (mut source, entry, giver, mut framer) = source(Duration::from_millis(20));
    giver.says(chunk(&mut framer)).await;
    source.next().await.unwrap();
    giver.breaks().await;
    let error = source.next().await.err().unwrap();
    assert!(error.to_string().contains("cable"), "{error}");
    let mut late = comes_back(&entry);
    drop(source);
    assert_eq!(late.receive.recv().await, None, "nobody answers");
    let again = entry.resume_stream(&id(), connection().0);
    assert!(matches!(again, Err(Refused::Undone)));
    let other = Opener { stream: StreamId(8), ..id() };
    assert!(matches!(entry.resume_stream(&other, connection().0), Err(Refused::OtherStream)));
}

#[tokio::test]
async fn that_all_was_taken_is_said_to_whoever_asks_until_it_is_forgotten() {
    let (mut source, entry, mut giver, mut framer) = source(Duration::from_mins(1));
    giver.says(chunk(&mut framer)).await;
    giver.says(framer.seal(0, None).unwrap().0).await;
    source.next().await.unwrap();
    source.next().await.unwrap();
    assert!(source.next().await.unwrap().is_none());
    // The connection breaks before it can be said.
    giver.receive.close();
    giver.breaks().await;
    let mut back = comes_back(&entry);
    let (ready, ()) = tokio::join!(source.ready(&[]), async {
        assert_eq!(back.opened().await, 2);
        assert_eq!(back.completed().await, 2);
        drop(back.send);
    });
    ready.unwrap();

    let forgetting = source.comeback.as_ref().unwrap().reserved.forgetting();
    drop(source);
    for _ in 0..2 {
        let (attached, mut again) = connection();
        let telling = entry.resume_stream(&id(), attached).unwrap().expect("it is told");
        let hearing = async {
            assert_eq!(again.opened().await, 2);
            assert_eq!(again.completed().await, 2);
            drop(again.send);
        };
        tokio::join!(telling, hearing);
    }
    let stranger = Opener { identity: "spiffe://lab.test/other".to_owned(), ..id() };
    assert!(matches!(entry.resume_stream(&stranger, connection().0), Err(Refused::OtherStream)));
    forgetting.forget();
    assert!(matches!(entry.resume_stream(&id(), connection().0), Err(Refused::OtherStream)));
}

/// A device may be at work on one chunk for long. The giver hears that this side is there, also one that comes back meanwhile,
/// and what it says is taken after that.
#[tokio::test]
async fn a_source_that_waits_for_a_device_is_heard_and_answers_who_comes_back() {
    let (mut source, entry, mut first, mut framer) = source(Duration::from_mins(1));
    first.says(chunk(&mut framer)).await;
    assert!(matches!(source.next().await.unwrap(), Some(Arrival::Chunk { .. })));
    let (device_is_done, device) = oneshot::channel::<()>();
    let busy = tokio::spawn(async move {
        tokio::select! {
            never = source.busy() => match never {},
            _ = device => {}
        }
        source
    });
    let there = Some(Kind::Ack(StreamAck { next_sequence: 1, complete: false }));
    assert_eq!(first.receive.recv().await.unwrap().kind, there);
    first.breaks().await;
    let mut again = comes_back(&entry);
    assert_eq!(again.opened().await, 1);
    assert_eq!(again.receive.recv().await.unwrap().kind, there);
    again.says(chunk(&mut framer)).await;
    device_is_done.send(()).unwrap();
    let mut source = busy.await.unwrap();
    assert!(matches!(source.next().await.unwrap(), Some(Arrival::Chunk { .. })));
}
