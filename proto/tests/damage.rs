//! Everything that can happen to a small stream on its way, exhaustively: it is taken whole, or it is not taken.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test: helpers assert by panicking, too")]

use std::io::Write as _;
use std::time::Duration;

use bytes::{Buf as _, Bytes};
use prost::Message as _;
use vfio_checkpoint_proto::domain::{
    ArmedInterrupts, ConfigSpaceCapture, InterruptKind, Phase as OperationPhase, Progress, StreamLimits,
};
use vfio_checkpoint_proto::frame::{Accepted, FrameError, crc32c};
use vfio_checkpoint_proto::ids::StreamId;
use vfio_checkpoint_proto::stream::{
    GiverSide, Job, Phase, ProtocolError, Session, TakerEvent, TakerSide, Took,
};
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_proto::v1::frame::Body;
use vfio_checkpoint_proto::v1::stream_message::Kind;
use vfio_checkpoint_seal::Seal;

fn session(stream: u64) -> Session {
    let limits = StreamLimits {
        max_chunk_bytes: 5,
        max_device_bytes: 64,
        idle_timeout: Duration::from_secs(1),
        lifetime: Duration::from_secs(1),
        ack_interval_bytes: 1,
        ack_delay: None,
    };
    Session { stream: StreamId(stream), devices: 2, limits, job: Job::Restore }
}

/// Two devices, interleaved chunks, a progress and seals, one with a capture.
fn give(stream: u64) -> Vec<v1::StreamMessage> {
    let mut giver = GiverSide::new(&session(stream));
    let mut sent: Vec<v1::StreamMessage> = giver.chunk(0, Bytes::from_static(b"pre-copy")).unwrap().collect();
    sent.extend(giver.chunk(1, Bytes::from_static(b"\0\0\xff")).unwrap());
    let predicted_downtime = Some(Duration::from_micros(1500));
    sent.push(
        giver
            .progress(Progress { phase: OperationPhase::StopCopy, left_bytes: 9, predicted_downtime })
            .unwrap(),
    );
    sent.extend(giver.chunk(0, Bytes::from_static(b"stop")).unwrap());
    sent.push(giver.seal(0, None).unwrap().0);
    sent.extend(giver.chunk(1, Bytes::from_static(b"tail")).unwrap());
    let interrupts = Some(ArmedInterrupts { kind: InterruptKind::MsiX, vectors: 300 });
    sent.push(giver.seal(1, Some(ConfigSpaceCapture { command: 0x0406, interrupts })).unwrap().0);
    sent
}

/// All that a taker got out of a stream.
#[derive(Debug, Default, Clone, PartialEq)]
struct Content {
    state: [Vec<u8>; 2],
    sealed: [Option<(Seal, Option<ConfigSpaceCapture>)>; 2],
    progress: Vec<Progress>,
}

impl Content {
    /// Whether this is what came of `whole` before its end.
    fn is_beginning_of(&self, whole: &Self) -> bool {
        (0..2).all(|device| {
            whole.state[device].starts_with(&self.state[device])
                && (self.sealed[device].is_none() || self.sealed[device] == whole.sealed[device])
        }) && whole.progress.starts_with(&self.progress)
    }
}

#[derive(Debug)]
enum End {
    /// Every seal was verified.
    Whole,
    /// The stream ended before.
    Incomplete,
    Refused(ProtocolError),
    Undecodable,
}

fn take(taker: &mut TakerSide, got: &mut Content, message: v1::StreamMessage) -> Result<(), End> {
    let Took { event, .. } = taker.receive(message).map_err(End::Refused)?;
    match event {
        TakerEvent::Frame(Accepted::Chunk { device, chunk }) => {
            got.state[device].extend_from_slice(chunk.bytes());
        }
        TakerEvent::Frame(Accepted::Progress(progress)) => got.progress.push(progress),
        TakerEvent::Frame(Accepted::Sealed { device, seal, config }) => {
            got.sealed[device] = Some((seal.seal(), config));
        }
        TakerEvent::Aborted { .. } | TakerEvent::Ignored => return Err(End::Incomplete),
    }
    Ok(())
}

fn end_of(taker: &TakerSide) -> End {
    if taker.phase() == Phase::Taken { End::Whole } else { End::Incomplete }
}

fn taken(messages: impl IntoIterator<Item = v1::StreamMessage>) -> (End, Content) {
    let (mut taker, mut got) = (TakerSide::new(&session(7)), Content::default());
    for message in messages {
        if let Err(end) = take(&mut taker, &mut got, message) {
            return (end, got);
        }
    }
    (end_of(&taker), got)
}

fn encode(messages: &[v1::StreamMessage]) -> Vec<u8> {
    messages.iter().flat_map(prost::Message::encode_length_delimited_to_vec).collect()
}

fn taken_from(bytes: Vec<u8>) -> (End, Content) {
    let (mut taker, mut got) = (TakerSide::new(&session(7)), Content::default());
    let mut bytes = Bytes::from(bytes);
    while bytes.has_remaining() {
        let Ok(message) = v1::StreamMessage::decode_length_delimited(&mut bytes) else {
            return (End::Undecodable, got);
        };
        if let Err(end) = take(&mut taker, &mut got, message) {
            return (end, got);
        }
    }
    (end_of(&taker), got)
}

fn whole() -> Content {
    let (end, content) = taken(give(7));
    assert!(matches!(end, End::Whole), "{end:?}");
    assert_eq!(content.state, [b"pre-copystop".to_vec(), b"\0\0\xfftail".to_vec()]);
    assert!(content.sealed.iter().all(Option::is_some) && content.progress.len() == 1);
    content
}

fn figure(line: &str) {
    let _ = writeln!(std::io::stdout(), "\nfigures: stream: {line}");
}

#[test]
fn a_stream_that_is_cut_at_any_byte_is_not_whole() {
    let (bytes, whole) = (encode(&give(7)), whole());
    let (end, content) = taken_from(bytes.clone());
    assert!(matches!(end, End::Whole) && content == whole);
    for length in 0..bytes.len() {
        let (end, content) = taken_from(bytes[..length].to_vec());
        assert!(!matches!(end, End::Whole), "cut to {length} bytes");
        assert!(content.is_beginning_of(&whole), "cut to {length} bytes: {content:?}");
    }
    figure(&format!("{} bytes, cut at each: never whole", bytes.len()));
}

#[test]
fn a_flip_of_any_bit_is_refused() {
    let (bytes, whole) = (encode(&give(7)), whole());
    let (mut undecodable, mut refused, mut incomplete, mut harmless) = (0, 0, 0, 0);
    let mut by_crc = 0;
    for bit in 0..bytes.len() * 8 {
        let mut damaged = bytes.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        let (end, content) = taken_from(damaged);
        assert!(content.is_beginning_of(&whole), "bit {bit}: {content:?}");
        match end {
            End::Whole => {
                harmless += 1;
                assert_eq!(content, whole, "bit {bit}: taken with other content");
            }
            End::Incomplete => incomplete += 1,
            End::Undecodable => undecodable += 1,
            End::Refused(error) => {
                refused += 1;
                by_crc += usize::from(matches!(error, ProtocolError::Frame(FrameError::Crc { .. })));
            }
        }
    }
    assert!(by_crc > bytes.len() * 4, "most bits are content: {by_crc}");
    assert_eq!(undecodable + refused + incomplete + harmless, bytes.len() * 8);
    figure(&format!(
        "{} bits flipped one by one: {refused} refused ({by_crc} by the CRC), {undecodable} undecodable, \
         {incomplete} incomplete, {harmless} with the same meaning, 0 with another",
        bytes.len() * 8
    ));
}

#[test]
fn a_flip_of_any_bit_of_state_is_refused_also_under_a_right_crc() {
    let messages = give(7);
    let mut flipped = 0;
    for (at, message) in messages.iter().enumerate() {
        let Some(Kind::Frame(frame)) = &message.kind else { panic!("{message:?}") };
        let Some(Body::Chunk(chunk)) = &frame.body else { continue };
        for bit in 0..chunk.data.len() * 8 {
            let mut data = chunk.data.to_vec();
            data[bit / 8] ^= 1 << (bit % 8);
            let body = Some(Body::Chunk(v1::Chunk { data: data.into(), ..chunk.clone() }));
            let mut forged = v1::Frame { body, ..frame.clone() };
            forged.crc32c = crc32c(&forged).unwrap();
            let mut messages = messages.clone();
            messages[at] = v1::StreamMessage { kind: Some(Kind::Frame(forged)) };
            let (end, content) = taken(messages);
            assert!(
                matches!(end, End::Refused(ProtocolError::Frame(FrameError::SealDigest { .. }))),
                "frame {at}, bit {bit}: {end:?}"
            );
            assert!(content.sealed.iter().any(Option::is_none));
            flipped += 1;
        }
    }
    assert_eq!(flipped, 19 * 8);
    figure(&format!("{flipped} bits of state flipped under a right CRC: all refused by the seal"));
}

#[test]
fn frames_that_are_lost_repeated_swapped_or_foreign_are_refused() {
    let (messages, foreign, whole) = (give(7), give(8), whole());
    let count = messages.len();
    let mut refused = [0; 4];
    let check = |what: &str, messages: Vec<v1::StreamMessage>| {
        let (end, content) = taken(messages);
        assert!(content.is_beginning_of(&whole), "{what}: {content:?}");
        end
    };
    // Every set of frames but all of them.
    for set in 0..(1u32 << count) - 1 {
        let kept = messages.iter().enumerate().filter(|(at, _)| set & (1 << at) != 0);
        let kept: Vec<_> = kept.map(|(_, message)| message.clone()).collect();
        let cut_only = kept[..] == messages[..kept.len()];
        let end = check("lost", kept);
        match end {
            End::Incomplete if cut_only => {}
            End::Refused(ProtocolError::Frame(FrameError::Gap { .. })) if !cut_only => refused[0] += 1,
            End::Whole | End::Incomplete | End::Refused(_) | End::Undecodable => {
                panic!("kept {set:b}: {end:?}")
            }
        }
    }
    for at in 0..count {
        for place in 0..=count {
            let mut repeated = messages.clone();
            repeated.insert(place, messages[at].clone());
            let end = check("repeated", repeated);
            let End::Refused(ProtocolError::Frame(FrameError::Gap { .. } | FrameError::Repeated { .. })) =
                end
            else {
                panic!("frame {at} again as {place}: {end:?}");
            };
            refused[1] += 1;

            let mut mixed = messages.clone();
            mixed.insert(place, foreign[at].clone());
            let end = check("foreign", mixed);
            let End::Refused(ProtocolError::Frame(FrameError::WrongStream { .. })) = end else {
                panic!("foreign frame {at} as {place}: {end:?}");
            };
            refused[3] += 1;
        }
        let mut mixed = messages.clone();
        mixed[at] = foreign[at].clone();
        let end = check("foreign", mixed);
        let End::Refused(ProtocolError::Frame(FrameError::WrongStream { .. })) = end else {
            panic!("foreign frame {at} in place of its own: {end:?}");
        };
        refused[3] += 1;
        for other in at + 1..count {
            let mut swapped = messages.clone();
            swapped.swap(at, other);
            let end = check("swapped", swapped);
            let End::Refused(ProtocolError::Frame(FrameError::Gap { .. })) = end else {
                panic!("frames {at} and {other} swapped: {end:?}");
            };
            refused[2] += 1;
        }
    }
    let [lost, repeated, swapped, foreign] = refused;
    figure(&format!(
        "{count} frames: refused {lost} sets with gaps, {repeated} repetitions, {swapped} swaps, {foreign} foreign frames"
    ));
}
