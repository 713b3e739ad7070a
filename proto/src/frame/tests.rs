use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;
use vfio_checkpoint_seal::SealHasher;

use super::*;
use crate::domain::{ArmedInterrupts, ConfigSpaceCapture, InterruptKind, Phase, Progress, StreamLimits};
use crate::ids::StreamId;
use crate::v1;
use crate::v1::frame::Body;

const STREAM: StreamId = StreamId(0x0123_4567_89ab_cdef);

fn limits() -> StreamLimits {
    StreamLimits {
        max_chunk_bytes: 4,
        max_device_bytes: 10,
        idle_timeout: Duration::from_secs(1),
        lifetime: Duration::from_secs(10),
        ack_interval_bytes: 8,
        ack_delay: None,
    }
}

fn progress() -> Progress {
    Progress { phase: Phase::PreCopy, left_bytes: 7, predicted_downtime: Some(Duration::from_millis(3)) }
}

fn capture() -> ConfigSpaceCapture {
    let interrupts = Some(ArmedInterrupts { kind: InterruptKind::MsiX, vectors: 9 });
    ConfigSpaceCapture { command: 0x0406, interrupts }
}

/// CRC32C bit by bit, from its definition.
fn sum(bytes: &[u8]) -> u32 {
    let bit = |sum: u32| (sum >> 1) ^ (0x82f6_3b78 & (sum & 1).wrapping_neg());
    !bytes.iter().fold(u32::MAX, |sum, byte| (0..8).fold(sum ^ u32::from(*byte), |sum, _| bit(sum)))
}

/// A frame that was made by somebody who counts CRCs but keeps no other rule.
fn forged(sequence: u64, device: u32, body: Body) -> v1::Frame {
    let mut frame = v1::Frame { stream_id: STREAM.0, sequence, device, crc32c: 0, body: Some(body) };
    frame.crc32c = crc32c(&frame).unwrap();
    frame
}

fn chunk(offset: u64, data: &'static [u8]) -> Body {
    Body::Chunk(v1::Chunk { offset, data: Bytes::from_static(data) })
}

fn seal_on(state: &[u8]) -> v1::StreamSeal {
    let mut hasher = SealHasher::new();
    hasher.update(state);
    let seal = hasher.seal();
    v1::StreamSeal { length_bytes: seal.bytes, blake3: Bytes::copy_from_slice(&seal.blake3), config: None }
}

/// What a taker of one device that has taken "abc" says of a frame.
fn refusal(frame: v1::Frame) -> FrameError {
    let mut taker = FrameVerifier::new(STREAM, 1, &limits());
    taker.accept(forged(0, 0, chunk(0, b"abc"))).unwrap();
    let error = taker.accept(frame).unwrap_err();
    // Whatever comes now, it is over; also a frame that would have been the right one.
    assert_eq!(taker.accept(forged(1, 0, chunk(3, b"d"))).unwrap_err(), FrameError::AlreadyFailed);
    assert_eq!(taker.finish(), Err(FrameError::AlreadyFailed));
    assert!(!taker.all_sealed());
    error
}

#[test]
fn what_was_given_is_taken_whatever_its_segmentation() {
    let limits = limits();
    let mut giver = Framer::new(STREAM, 2, &limits);
    let mut taker = FrameVerifier::new(STREAM, 2, &limits);
    let mut frames: Vec<v1::Frame> = giver.chunk(0, Bytes::from_static(b"0123456789")).unwrap().collect();
    assert_eq!(frames.len(), 3, "4 + 4 + 2");
    frames.extend(giver.chunk(1, Bytes::from_static(b"x")).unwrap());
    assert_eq!(giver.chunk(1, Bytes::new()).unwrap().count(), 0);
    frames.push(giver.progress(progress()));
    let (frame, sealed_1) = giver.seal(1, Some(capture())).unwrap();
    frames.push(frame);
    assert!(!giver.all_sealed());
    let (frame, sealed_0) = giver.seal(0, None).unwrap();
    frames.push(frame);
    assert!(giver.all_sealed());
    assert_eq!(giver.next_sequence(), 7);

    let mut state = [Vec::new(), Vec::new()];
    let mut ends = Vec::new();
    for frame in frames {
        assert!(!taker.all_sealed());
        match taker.accept(frame).unwrap() {
            Accepted::Chunk { device, chunk } => {
                assert_eq!(chunk.offset(), state[device].len() as u64);
                state[device].extend_from_slice(chunk.bytes());
            }
            Accepted::Progress(said) => assert_eq!(said, progress()),
            Accepted::Sealed { device, seal, config } => ends.push((device, seal.seal(), config)),
        }
    }
    assert_eq!(state, [b"0123456789".to_vec(), b"x".to_vec()]);
    assert_eq!(ends, [(1, sealed_1, Some(capture())), (0, sealed_0, None)]);
    taker.finish().unwrap();
    assert!(taker.all_sealed());
    assert_eq!(taker.next_sequence(), 7);
}

#[test]
fn state_is_not_copied_from_the_device_to_the_frame_nor_from_the_message_to_the_taker() {
    let limits = StreamLimits { max_chunk_bytes: 1 << 16, max_device_bytes: 1 << 20, ..limits() };
    let state = Bytes::from(vec![7; 100_000]);
    let mut giver = Framer::new(STREAM, 1, &limits);
    let mut at = state.as_ptr();
    let mut encoded = Vec::new();
    for frame in giver.chunk(0, state.clone()).unwrap() {
        let Some(Body::Chunk(chunk)) = &frame.body else { panic!("{frame:?}") };
        assert_eq!(chunk.data.as_ptr(), at, "a slice of what was given");
        at = at.wrapping_add(chunk.data.len());
        encoded.push(Bytes::from(frame.encode_to_vec()));
    }
    assert_eq!(encoded.len(), 2);
    let mut taker = FrameVerifier::new(STREAM, 1, &limits);
    for message in encoded {
        let frame = v1::Frame::decode(message.clone()).unwrap();
        let Accepted::Chunk { chunk, .. } = taker.accept(frame).unwrap() else { panic!() };
        assert!(message.as_ptr_range().contains(&chunk.bytes().as_ptr()), "a slice of the message");
    }
}

#[test]
fn the_crc_is_the_documented_one() {
    // By hand from stream.proto, so that a change here is a change of the protocol.
    let mut content = Vec::new();
    content.extend(STREAM.0.to_le_bytes());
    content.extend(5u64.to_le_bytes());
    content.extend(1u32.to_le_bytes());
    let seal = seal_on(b"abc");
    let mut sealed = content.clone();
    sealed.extend(7u32.to_le_bytes());
    sealed.extend(3u64.to_le_bytes());
    sealed.extend(32u64.to_le_bytes());
    sealed.extend(&seal.blake3);
    let mut bare = sealed.clone();
    bare.extend(0u64.to_le_bytes());
    for number in [1u64, 0x0406, 2, 9] {
        sealed.extend(number.to_le_bytes());
    }
    let with = v1::StreamSeal { config: Some(capture().into()), ..seal.clone() };
    assert_eq!(forged(5, 1, Body::Seal(with)).crc32c, sum(&sealed));
    assert_eq!(forged(5, 1, Body::Seal(seal)).crc32c, sum(&bare));

    let mut chunked = content.clone();
    chunked.extend(5u32.to_le_bytes());
    chunked.extend(9u64.to_le_bytes());
    chunked.extend(3u64.to_le_bytes());
    chunked.extend(b"xyz");
    assert_eq!(forged(5, 1, chunk(9, b"xyz")).crc32c, sum(&chunked));

    let mut told = content;
    told.extend(6u32.to_le_bytes());
    for number in [2u64, 7, 3000] {
        told.extend(number.to_le_bytes());
    }
    assert_eq!(forged(5, 1, Body::Progress(progress().into())).crc32c, sum(&told));
    // The check value of CRC32C itself.
    assert_eq!(sum(b"123456789"), 0xe306_9283);
}

#[test]
fn each_refusal_says_what_was_expected_and_found() {
    let good = forged(1, 0, chunk(3, b"def"));
    let foreign = {
        let mut frame = v1::Frame { stream_id: 1, ..good.clone() };
        frame.crc32c = crc32c(&frame).unwrap();
        frame
    };
    assert_eq!(
        refusal(foreign),
        FrameError::WrongStream { sequence: 1, expected: STREAM, found: StreamId(1) }
    );
    assert_eq!(refusal(v1::Frame { body: None, ..good.clone() }), FrameError::NoBody { sequence: 1 });
    assert_eq!(
        refusal(v1::Frame { crc32c: !good.crc32c, ..good.clone() }),
        FrameError::Crc { sequence: 1, stated: !good.crc32c, computed: good.crc32c }
    );
    // Damage is told before anything that the damaged frame says.
    assert!(matches!(
        refusal(v1::Frame { sequence: 9, ..good.clone() }),
        FrameError::Crc { sequence: 9, .. }
    ));
    assert_eq!(refusal(forged(2, 0, chunk(3, b"d"))), FrameError::Gap { expected: 1, found: 2 });
    assert_eq!(refusal(forged(0, 0, chunk(0, b"abc"))), FrameError::Repeated { expected: 1, found: 0 });
    assert_eq!(
        refusal(forged(1, 1, chunk(0, b"d"))),
        FrameError::UnknownDevice { sequence: 1, device: 1, devices: 1 }
    );
    assert_eq!(
        refusal(forged(1, u32::MAX, Body::Seal(seal_on(b"")))),
        FrameError::UnknownDevice { sequence: 1, device: u32::MAX, devices: 1 }
    );
    assert_eq!(
        refusal(forged(1, 3, Body::Progress(progress().into()))),
        FrameError::ProgressOfDevice { sequence: 1, device: 3 }
    );
    for found in [0, 2, 4, u64::MAX] {
        assert_eq!(
            refusal(forged(1, 0, chunk(found, b"d"))),
            FrameError::Offset { device: 0, expected: 3, found }
        );
    }
    assert_eq!(refusal(forged(1, 0, chunk(3, b""))), FrameError::EmptyChunk { device: 0, offset: 3 });
    assert_eq!(
        refusal(forged(1, 0, chunk(3, b"defgh"))),
        FrameError::ChunkTooLong { device: 0, max_bytes: 4, found_bytes: 5 }
    );
    assert_eq!(
        refusal(forged(1, 0, Body::Seal(seal_on(b"abcd")))),
        FrameError::SealLength { device: 0, sealed_bytes: 4, found_bytes: 3 }
    );
    assert!(matches!(
        refusal(forged(1, 0, Body::Seal(seal_on(b"abd")))),
        FrameError::SealDigest { device: 0, source } if source.found.bytes == 3
    ));
}

#[test]
fn bodies_that_are_not_valid_name_their_field() {
    let field = |body: Body| {
        let error = refusal(forged(1, 0, body));
        let FrameError::Body { sequence: 1, source } = error else { panic!("{error}") };
        source.field
    };
    let seal = seal_on(b"abc");
    assert_eq!(
        field(Body::Seal(v1::StreamSeal { blake3: Bytes::from_static(b"short"), ..seal.clone() })),
        "seal.blake3"
    );
    let config = v1::ConfigSpaceCapture { command: 0x1_0000, ..Default::default() };
    assert_eq!(
        field(Body::Seal(v1::StreamSeal { config: Some(config), ..seal.clone() })),
        "seal.config.command"
    );
    let config = v1::ConfigSpaceCapture { interrupt_kind: 3, ..Default::default() };
    assert_eq!(
        field(Body::Seal(v1::StreamSeal { config: Some(config), ..seal })),
        "seal.config.interrupt_kind"
    );
    let progress = v1::StreamProgress { phase: 99, ..Default::default() };
    assert_eq!(field(Body::Progress(progress)), "progress.phase");
}

#[test]
fn nothing_of_a_device_comes_after_its_seal() {
    let sealed = || {
        let mut taker = FrameVerifier::new(STREAM, 2, &limits());
        taker.accept(forged(0, 0, chunk(0, b"abc"))).unwrap();
        taker.accept(forged(1, 0, Body::Seal(seal_on(b"abc")))).unwrap();
        taker
    };
    assert_eq!(
        sealed().accept(forged(2, 0, chunk(3, b"d"))).unwrap_err(),
        FrameError::AfterSeal { device: 0, offset: 3 }
    );
    assert_eq!(
        sealed().accept(forged(2, 0, Body::Seal(seal_on(b"abc")))).unwrap_err(),
        FrameError::SecondSeal { device: 0 }
    );
    assert_eq!(sealed().finish(), Err(FrameError::Unsealed { next_sequence: 2, devices: vec![1] }));
}

#[test]
fn a_device_has_no_more_state_than_was_agreed_on() {
    let mut taker = FrameVerifier::new(STREAM, 1, &limits());
    for (sequence, offset) in [(0, 0), (1, 4)] {
        taker.accept(forged(sequence, 0, chunk(offset, b"1234"))).unwrap();
    }
    assert_eq!(
        taker.accept(forged(2, 0, chunk(8, b"123"))).unwrap_err(),
        FrameError::DeviceTooLong { device: 0, max_bytes: 10, found_bytes: 11 }
    );
    let mut giver = Framer::new(STREAM, 1, &limits());
    assert_eq!(giver.chunk(0, Bytes::from_static(b"1234567890")).unwrap().count(), 3);
    assert_eq!(
        giver.chunk(0, Bytes::from_static(b"1")).unwrap_err(),
        GiveError::DeviceTooLong { device: 0, max_bytes: 10, found_bytes: 11 }
    );
    assert_eq!(giver.seal(1, None).unwrap_err(), GiveError::UnknownDevice { device: 1, devices: 1 });
    giver.seal(0, None).unwrap();
    assert_eq!(giver.seal(0, None).unwrap_err(), GiveError::AfterSeal { device: 0 });
    assert_eq!(giver.chunk(0, Bytes::new()).unwrap_err(), GiveError::AfterSeal { device: 0 });
}

#[test]
fn state_that_was_handed_in_and_not_given_is_never_sealed() {
    for taken in 0..3 {
        let mut giver = Framer::new(STREAM, 2, &limits());
        let mut frames = giver.chunk(0, Bytes::from_static(b"0123456789")).unwrap();
        assert_eq!(frames.by_ref().take(taken).count(), taken);
        drop(frames);
        let torn = GiveError::Torn { device: 0 };
        assert_eq!(giver.seal(0, None).unwrap_err(), torn);
        assert_eq!(giver.seal(1, None).unwrap_err(), torn, "the stream cannot be whole");
        assert_eq!(giver.chunk(0, Bytes::from_static(b"x")).unwrap_err(), torn);
        assert!(!giver.all_sealed());
    }
}
