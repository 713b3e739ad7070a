use std::fs::File;
use std::io::Write as _;

use bytes::Bytes;
use vfio_checkpoint_proto::frame::Framer;
use vfio_checkpoint_proto::ids::StreamId;
use vfio_checkpoint_proto::v1::frame::Body;
use vfio_checkpoint_proto::v1::stream_message::Kind;

use super::*;

const STATE_BYTES: usize = 1000;
const COST_BYTES: u64 = FRAME_BYTES + STATE_BYTES as u64;

fn limits() -> StreamLimits {
    StreamLimits {
        max_chunk_bytes: 1 << 16,
        max_device_bytes: 1 << 30,
        idle_timeout: std::time::Duration::from_secs(1),
        lifetime: std::time::Duration::from_secs(1),
        ack_interval_bytes: 1 << 20,
        ack_delay: None,
    }
}

/// Frames of one stream, each with a state of its own.
fn frames(count: usize) -> Vec<StreamMessage> {
    let mut framer = Framer::new(StreamId(7), 1, &limits());
    let mut messages = Vec::new();
    for number in 0..count {
        let state = Bytes::from(vec![u8::try_from(number % 251).unwrap(); STATE_BYTES]);
        messages.extend(
            framer.chunk(0, state).unwrap().map(|frame| StreamMessage { kind: Some(Kind::Frame(frame)) }),
        );
    }
    messages
}

/// Keeps frames from the first one on for as long as there is room; how many that were.
async fn fill(spool: &mut Spool, frames: &[StreamMessage]) -> usize {
    for (number, frame) in frames.iter().enumerate() {
        if !spool.has_room(STATE_BYTES) {
            return number;
        }
        spool.keep(frame.clone(), STATE_BYTES);
        spool.settle().await.unwrap();
    }
    panic!("it never gets full")
}

async fn disk(memory_frames: u64, disk_bytes: u64, folder: &std::path::Path) -> Spool {
    let memory_bytes = memory_frames * COST_BYTES;
    Spool::open(SpoolOptions { memory_bytes, disk_bytes, folder: folder.to_owned() }).await.unwrap()
}

#[tokio::test]
async fn what_is_in_memory_is_shared_and_freed_by_acks() {
    let frames = frames(20);
    let mut spool = Spool::in_memory(4 * COST_BYTES);
    assert_eq!(fill(&mut spool, &frames).await, 4);
    assert_eq!((spool.in_memory_bytes(), spool.on_disk_bytes()), (4 * COST_BYTES, 0));
    let data = |message: &StreamMessage| {
        let Some(Kind::Frame(frame)) = &message.kind else { panic!("no frame") };
        let Some(Body::Chunk(chunk)) = &frame.body else { panic!("no chunk") };
        chunk.data.as_ptr()
    };
    let again = spool.frame(3).await.unwrap().unwrap();
    assert_eq!((&again, data(&again)), (&frames[3], data(&frames[3])), "not copied");

    spool.acked(3);
    assert_eq!(spool.in_memory_bytes(), COST_BYTES);
    assert_eq!(spool.frame(2).await.unwrap(), None, "it is acknowledged");
    assert_eq!(spool.frame(4).await.unwrap(), None, "it was not made");
    assert_eq!(fill(&mut spool, &frames[4..]).await, 3);
    assert_eq!(spool.frame(6).await.unwrap().as_ref(), Some(&frames[6]));
}

#[tokio::test]
async fn what_memory_does_not_hold_goes_to_disk_and_comes_back_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let frames = frames(200);
    let mut spool = disk(3, 5 * COST_BYTES, folder.path()).await;
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "the file has no name");
    // The encoding is shorter than what is reckoned with.
    let kept = fill(&mut spool, &frames).await;
    assert_eq!(kept, 3 + 5);
    assert_eq!(spool.in_memory_bytes(), 3 * COST_BYTES);
    assert!((5 * STATE_BYTES as u64..=5 * COST_BYTES).contains(&spool.on_disk_bytes()));

    // Round and round: each frame is there until it is acknowledged, wherever it is.
    let mut made = kept;
    for acked in 1..150 {
        spool.acked(acked);
        while spool.has_room(STATE_BYTES) && made < frames.len() {
            spool.keep(frames[made].clone(), STATE_BYTES);
            spool.settle().await.unwrap();
            made += 1;
        }
        let kept = frames.iter().enumerate().take(made).skip(usize::try_from(acked).unwrap());
        for (number, frame) in kept {
            let again = spool.frame(number as u64).await.unwrap();
            assert_eq!(again.as_ref(), Some(frame), "{number}");
        }
        assert!(spool.in_memory_bytes() <= 3 * COST_BYTES && spool.on_disk_bytes() <= 5 * COST_BYTES);
    }
    assert!(made > 150, "{made}");
    spool.acked(made as u64);
    assert_eq!((spool.in_memory_bytes(), spool.on_disk_bytes()), (0, 0));
}

#[tokio::test]
async fn what_was_not_written_before_is_written_next() {
    let folder = tempfile::tempdir().unwrap();
    let frames = frames(4);
    let mut spool = disk(1, 10 * COST_BYTES, folder.path()).await;
    for frame in &frames {
        spool.keep(frame.clone(), STATE_BYTES);
    }
    // Whoever waited is gone before anything was done.
    drop(spool.settle());
    assert_eq!(spool.frame(2).await.unwrap().as_ref(), Some(&frames[2]));
    spool.acked(2);
    spool.settle().await.unwrap();
    assert_eq!(spool.unwritten, 0);
    assert!(spool.frames.iter().all(|(kept, _)| matches!(kept, Kept::Disk(_))), "{:?}", spool.frames.len());
    for number in [2, 3] {
        assert_eq!(
            spool.frame(number).await.unwrap().as_ref(),
            Some(&frames[usize::try_from(number).unwrap()])
        );
    }
}

#[tokio::test]
async fn a_folder_that_is_not_there_is_named() {
    let options =
        SpoolOptions { memory_bytes: 1 << 20, disk_bytes: 1, folder: PathBuf::from("/no/such/folder") };
    let error = Spool::open(options.clone()).await.unwrap_err();
    assert!(
        matches!(error, SpoolError::Folder { .. }) && error.to_string().contains("/no/such/folder"),
        "{error}"
    );
    // Nobody looks at it where it is not used.
    Spool::open(SpoolOptions { disk_bytes: 0, ..options }).await.unwrap();
}

#[tokio::test]
async fn a_disk_that_fails_loses_nothing_and_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    File::create(&path).unwrap().write_all(&[0; 4096]).unwrap();
    // Not open for writing, as a disk that fails.
    let disk = Disk::of(folder.path().to_owned(), File::open(&path).unwrap(), 1 << 20);
    let mut spool = Spool { disk: Some(disk), ..Spool::in_memory(0) };
    let frames = frames(1);
    assert!(spool.has_room(STATE_BYTES));
    spool.keep(frames[0].clone(), STATE_BYTES);
    for _ in 0..2 {
        let error = spool.settle().await.unwrap_err();
        assert!(matches!(error, SpoolError::Write { .. }), "{error}");
        assert!(error.to_string().contains(&folder.path().display().to_string()), "{error}");
    }
    assert_eq!(spool.frame(0).await.unwrap().as_ref(), Some(&frames[0]));
}

#[tokio::test]
async fn what_is_not_as_it_was_written_is_not_sent() {
    let folder = tempfile::tempdir().unwrap();
    let frames = frames(2);
    for damage in [0_u64, 4, 20, 600] {
        let path = folder.path().join("file");
        let open = || {
            std::fs::OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)
                .unwrap()
        };
        let disk = Disk::of(folder.path().to_owned(), open(), 1 << 20);
        let mut spool = Spool { disk: Some(disk), ..Spool::in_memory(0) };
        for frame in &frames {
            spool.keep(frame.clone(), STATE_BYTES);
        }
        spool.settle().await.unwrap();
        assert_eq!(spool.frame(0).await.unwrap().as_ref(), Some(&frames[0]));
        let mut byte = [0];
        std::os::unix::fs::FileExt::read_exact_at(&open(), &mut byte, damage).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&open(), &[byte[0] ^ 0x11], damage).unwrap();
        let error = spool.frame(0).await.unwrap_err();
        assert!(matches!(error, SpoolError::Damaged { sequence: 0, .. }), "{damage}: {error}");
        // A record of another frame is not taken for this one.
        let (Kept::Disk(other), _) = spool.frames[1] else { panic!("not on disk") };
        let error = spool.disk.as_ref().unwrap().read(other, 0).await.unwrap_err();
        assert!(matches!(error, SpoolError::Damaged { sequence: 0, .. }), "{error}");
        File::create(&path).unwrap();
        let error = spool.frame(1).await.unwrap_err();
        assert!(matches!(error, SpoolError::Read { .. }), "{error}");
    }
}

#[test]
fn memory_holds_what_may_be_without_an_ack() {
    let least = Spool::least_memory_bytes(&limits());
    assert!(least > (1 << 20) + 4 * (1 << 16), "{least}");
    Spool::in_memory(least).check(&limits()).unwrap();
    let error = Spool::in_memory(least - 1).check(&limits()).unwrap_err();
    assert!(error.to_string().contains(&least.to_string()), "{error}");
    let agents = StreamLimits { max_chunk_bytes: 1 << 20, ack_interval_bytes: 8 << 20, ..limits() };
    Spool::in_memory(SpoolOptions::default().memory_bytes).check(&agents).unwrap();
}
