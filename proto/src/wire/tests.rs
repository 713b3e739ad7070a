use proptest::prelude::*;

use super::*;

/// As prost and gRPC write it, for whoever knows nothing of this module.
fn by_prost(message: &v1::StreamMessage) -> Vec<u8> {
    let encoded = v1::StreamStateRequest { message: Some(message.clone()) }.encode_to_vec();
    framed(&encoded)
}

fn framed(message: &[u8]) -> Vec<u8> {
    let mut framed = vec![0];
    framed.extend_from_slice(&u32::try_from(message.len()).unwrap().to_be_bytes());
    framed.extend_from_slice(message);
    framed
}

fn chunk(frame: v1::Frame, offset: u64, data: &[u8]) -> v1::StreamMessage {
    let body = Some(Body::Chunk(v1::Chunk { offset, data: Bytes::copy_from_slice(data) }));
    v1::StreamMessage { kind: Some(Kind::Frame(v1::Frame { body, ..frame })) }
}

/// Of a caller whose first message was taken.
fn opened() -> Assembly {
    let mut assembly = Assembly::new(Sender::Caller);
    assembly.push(Bytes::from_static(&[0; PREFIX_BYTES]));
    assert_eq!(assembly.message(), Ok(Some(v1::StreamMessage::default())));
    assembly
}

/// All messages of a body that comes in pieces of these lengths, over and over.
fn read(body: &[u8], lengths: &[usize]) -> Result<Vec<v1::StreamMessage>, WireError> {
    let mut assembly = opened();
    let mut messages = Vec::new();
    let (mut rest, mut turn) = (body, 0);
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(lengths[turn % lengths.len()].clamp(1, rest.len()));
        assembly.push(Bytes::copy_from_slice(piece));
        (rest, turn) = (after, turn + 1);
        while let Some(message) = assembly.message()? {
            messages.push(message);
        }
    }
    assembly.finish()?;
    Ok(messages)
}

fn messages() -> impl Strategy<Value = v1::StreamMessage> {
    let number = || prop_oneof![Just(0), Just(1), Just(127), Just(128), any::<u64>()];
    let frame = (number(), number(), any::<u32>(), prop_oneof![Just(0), any::<u32>()]).prop_map(
        |(stream_id, sequence, device, crc32c)| v1::Frame { stream_id, sequence, device, crc32c, body: None },
    );
    let data = prop_oneof![0..200_usize, Just(SMALL_BYTES), Just(20_000)]
        .prop_map(|length| (0..=250).cycle().take(length).collect::<Vec<u8>>());
    prop_oneof![
        (frame.clone(), number(), data).prop_map(|(frame, offset, data)| chunk(frame, offset, &data)),
        (frame, number(), any::<[u8; 32]>()).prop_map(|(frame, length_bytes, digest)| {
            let blake3 = Bytes::copy_from_slice(&digest);
            let body = Some(Body::Seal(v1::StreamSeal { length_bytes, blake3, config: None }));
            v1::StreamMessage { kind: Some(Kind::Frame(v1::Frame { body, ..frame })) }
        }),
        (number(), any::<bool>()).prop_map(|(next_sequence, complete)| v1::StreamMessage {
            kind: Some(Kind::Ack(v1::StreamAck { next_sequence, complete }))
        }),
        ".{0,40}"
            .prop_map(|reason| v1::StreamMessage { kind: Some(Kind::Abort(v1::StreamAbort { reason })) }),
        Just(v1::StreamMessage { kind: None }),
    ]
}

proptest! {
    #[test]
    fn it_is_written_as_prost_writes_it(message in messages()) {
        let Encoded { head, state } = encode(message.clone());
        prop_assert!(state.is_empty() || head.len() < MAX_HEAD_BYTES);
        prop_assert_eq!([&head[..], &state[..]].concat(), by_prost(&message));
    }

    #[test]
    fn it_is_read_however_it_is_cut(
        sent in prop::collection::vec(messages(), 0..5),
        lengths in prop::collection::vec(prop_oneof![1..9_usize, 1..30_000_usize], 1..5),
    ) {
        let body: Vec<u8> = sent.iter().flat_map(by_prost).collect();
        prop_assert_eq!(read(&body, &lengths), Ok(sent));
    }

    /// Bytes that were changed anywhere are read as prost reads them, or refused as it refuses them.
    #[test]
    fn what_is_odd_is_read_as_prost_reads_it(
        message in messages(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
    ) {
        let mut encoded = v1::StreamStateRequest { message: Some(message) }.encode_to_vec();
        for (at, byte) in changes {
            if !encoded.is_empty() {
                let at = at.index(encoded.len().min(64));
                encoded[at] = byte;
            }
        }
        let found = read(&framed(&encoded), &[7, 4096]);
        let walked = check_parts(&v1::StreamStateRequest::full_name(), &encoded, MAX_REQUEST_PARTS);
        match (walked, v1::StreamStateRequest::decode(&encoded[..])) {
            (Ok(()), Ok(expected)) => {
                prop_assert_eq!(found, Ok(vec![expected.message.unwrap_or_default()]));
            }
            (Err(_), _) | (_, Err(_)) => prop_assert!(found.is_err(), "{:?}", found),
        }
    }
}

#[test]
fn state_that_came_in_one_piece_is_not_copied() {
    let data = vec![7; 100_000];
    let frame = v1::Frame { stream_id: 1, sequence: 2, device: 3, crc32c: 4, body: None };
    let Encoded { head, state } = encode(chunk(frame, 5, &data));
    let mut assembly = Assembly::new(Sender::Agent);
    assembly.push(head);
    assert_eq!(assembly.message(), Ok(None));
    assembly.push(state.clone());
    let message = assembly.message().unwrap().unwrap();
    let Some(Kind::Frame(v1::Frame { body: Some(Body::Chunk(chunk)), .. })) = message.kind else { panic!() };
    assert_eq!(chunk.data.as_ptr(), state.as_ptr());
    assert_eq!(assembly.finish(), Ok(()));
}

#[test]
fn a_message_is_refused_by_its_prefix() {
    let mut assembly = Assembly::new(Sender::Caller);
    assembly.push(Bytes::from_static(&[1, 0, 0, 0, 0]));
    assert_eq!(assembly.message(), Err(WireError::Compressed { flag: 1 }));

    // A caller's first message is held to less, as is nobody else's.
    for (mut assembly, max_bytes) in [
        (opened(), MAX_MESSAGE_BYTES),
        (Assembly::new(Sender::Agent), MAX_MESSAGE_BYTES),
        (Assembly::new(Sender::Caller), MAX_OPEN_BYTES),
    ] {
        let longest = u32::try_from(max_bytes).unwrap();
        let prefix = |length: u32| Bytes::from([&[0][..], &length.to_be_bytes()].concat());
        let mut other = Assembly { max_bytes, ..Assembly::new(Sender::Agent) };
        other.push(prefix(longest + 1));
        let too_long = WireError::TooLong { found_bytes: max_bytes + 1, max_bytes };
        assert_eq!(other.message(), Err(too_long));
        assembly.push(prefix(longest));
        assert_eq!(assembly.message(), Ok(None));
        assert_eq!(assembly.max_bytes, max_bytes);
    }
}

#[test]
fn a_body_that_ends_within_a_message_is_told() {
    let body = by_prost(&chunk(v1::Frame::default(), 0, b"state"));
    for end in 1..body.len() {
        assert!(matches!(read(&body[..end], &[3]), Err(WireError::CutOff { .. })), "{end}");
    }
}

/// A byte at a time costs its sender a frame each, and this side a byte.
#[test]
fn small_pieces_are_put_together() {
    let mut assembly = opened();
    assembly.push(Bytes::copy_from_slice(&[0, 0, 1, 0, 0]));
    assert_eq!(assembly.message(), Ok(None));
    for _ in 0..60_000 {
        assembly.push(Bytes::from_static(&[0]));
        assert_eq!(assembly.message(), Ok(None));
    }
    assert_eq!(assembly.pieces.len(), 0);
}
