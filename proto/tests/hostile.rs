//! Bytes that a peer made up: decoded and validated they are refused or kept within bounds, and never panic.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test: helpers assert by panicking, too")]

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::time::Duration;

use bytes::Bytes;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, RngSeed};
use prost::Message as _;
use vfio_checkpoint_proto::domain::{
    Fingerprint, Invalid, MAX_DURATION, Manifest, Phase as OperationPhase, Progress, RestoreSource,
    RestoreSpec, SaveRequestSpec, StreamLimits, StreamOpen, StreamOpened,
};
use vfio_checkpoint_proto::ids::{DeviceName, StreamId};
use vfio_checkpoint_proto::parts::{MAX_REQUEST_PARTS, PartsError, check_parts};
use vfio_checkpoint_proto::stream::{
    Answer, Dialing, GiverEvent, GiverSide, Job, MAX_REASON_BYTES, Phase, Session, TakerSide, opening,
};
use vfio_checkpoint_proto::v1::stream_message::Kind;
use vfio_checkpoint_proto::{MAX_DEVICES, MAX_MANIFEST_BYTES, MAX_MESSAGE_BYTES, MIN_CHUNK_BYTES, v1};

fn seconds(seconds: i64) -> prost_types::Duration {
    prost_types::Duration { seconds, nanos: 0 }
}

fn manifest() -> v1::CheckpointManifest {
    let device = |id: u8| v1::DeviceManifest {
        source_device: format!("devices/{id}"),
        source_address: "0000:03:00.1".into(),
        backend: v1::Backend::Kernel.into(),
        driver: "mtty".into(),
        fingerprint: Some(v1::Fingerprint { facts: BTreeMap::from([("driver".into(), "mtty".into())]) }),
        logical_device: Some(v1::LogicalDevice { id: format!("{id:032x}"), epoch: 3 }),
        data_size: Some(v1::DataSize { kind: v1::DataSizeKind::Known.into(), bytes: 60 }),
    };
    v1::CheckpointManifest {
        format_version: 1,
        operation: "operations/o".into(),
        create_time: Some(prost_types::Timestamp { seconds: 1, nanos: 2 }),
        devices: vec![device(1), device(2)],
        source_disposition: 0,
    }
}

fn save() -> v1::StartSaveRequest {
    v1::StartSaveRequest {
        devices: vec!["devices/a".into(), "devices/b".into()],
        memory_capture: v1::MemoryCapture::None.into(),
        downtime_limit: Some(seconds(1)),
        pre_copy_budget: Some(seconds(60)),
        request_id: "1b4e28ba-2fa1-41d2-883f-0016d3cca427".into(),
        owner_pod: "n/p".into(),
        ..Default::default()
    }
}

fn restore() -> v1::RestoreRequest {
    v1::RestoreRequest {
        devices: vec!["devices/a".into(), "devices/b".into()],
        manifest: Some(manifest()),
        ..Default::default()
    }
}

fn limits() -> StreamLimits {
    StreamLimits {
        max_chunk_bytes: MIN_CHUNK_BYTES,
        max_device_bytes: 1 << 20,
        idle_timeout: Duration::from_secs(1),
        lifetime: Duration::from_secs(1),
        ack_interval_bytes: 1,
        ack_delay: None,
    }
}

fn session() -> Session {
    Session { stream: StreamId(7), devices: 2, limits: limits(), job: Job::ManualSave }
}

fn open() -> StreamOpen {
    let wire = v1::StreamOpen {
        operation: "operations/o".into(),
        role: v1::StreamRole::Taker.into(),
        min_version: 1,
        max_version: 1,
        max_chunk_bytes: 0,
        resume_stream_id: 0,
    };
    wire.try_into().unwrap()
}

/// One good message of each kind.
fn messages() -> Vec<v1::StreamMessage> {
    let mut giver = GiverSide::new(&session());
    let mut messages: Vec<_> = giver.chunk(0, Bytes::from_static(b"abc")).unwrap().collect();
    let progress = Progress { phase: OperationPhase::PreCopy, left_bytes: 1, predicted_downtime: None };
    messages.push(giver.progress(progress).unwrap());
    messages.push(giver.seal(0, None).unwrap().0);
    messages.push(giver.seal(1, None).unwrap().0);
    messages.push(GiverSide::new(&session()).abort("enough").unwrap());
    messages.push(Dialing::new(open()).1);
    let manifest = manifest().try_into().unwrap();
    let opened = StreamOpened {
        version: vfio_checkpoint_proto::version::Version(1),
        stream_id: StreamId(7),
        manifest,
        next_sequence: 0,
        limits: limits(),
    };
    messages.push(vfio_checkpoint_proto::stream::opened(opened));
    for kind in
        [Kind::Ack(v1::StreamAck { next_sequence: 4, complete: true }), Kind::Cutover(v1::StreamCutover {})]
    {
        messages.push(v1::StreamMessage { kind: Some(kind) });
    }
    messages
}

/// One change to bytes.
#[derive(Debug, Clone)]
enum Edit {
    Flip(prop::sample::Index, u8),
    Put(prop::sample::Index, u8),
    Insert(prop::sample::Index, Vec<u8>),
    Remove(prop::sample::Index, usize),
    Repeat(prop::sample::Index, usize),
}

fn edits() -> impl Strategy<Value = Vec<Edit>> {
    let at = any::<prop::sample::Index>;
    let edit = prop_oneof![
        (at(), 0..8u8).prop_map(|(at, bit)| Edit::Flip(at, bit)),
        (at(), any::<u8>()).prop_map(|(at, byte)| Edit::Put(at, byte)),
        (at(), prop::collection::vec(any::<u8>(), 1..12)).prop_map(|(at, bytes)| Edit::Insert(at, bytes)),
        (at(), 1..12usize).prop_map(|(at, count)| Edit::Remove(at, count)),
        (at(), 1..40usize).prop_map(|(at, count)| Edit::Repeat(at, count)),
    ];
    prop::collection::vec(edit, 0..4)
}

fn edited(mut bytes: Vec<u8>, edits: &[Edit]) -> Vec<u8> {
    for edit in edits {
        // A place of the bytes or behind them.
        let place = |at: &prop::sample::Index| at.index(bytes.len() + 1);
        match edit {
            Edit::Flip(at, _) | Edit::Put(at, _) if place(at) == bytes.len() => {}
            Edit::Flip(at, bit) => {
                let at = place(at);
                bytes[at] ^= 1 << bit;
            }
            Edit::Put(at, byte) => {
                let at = place(at);
                bytes[at] = *byte;
            }
            Edit::Insert(at, more) => {
                let at = place(at);
                bytes.splice(at..at, more.iter().copied());
            }
            Edit::Remove(at, count) => {
                let at = place(at);
                bytes.drain(at..bytes.len().min(at + count));
            }
            Edit::Repeat(at, count) => {
                let at = place(at);
                let again = bytes[at..bytes.len().min(at + count)].to_vec();
                bytes.splice(at..at, again);
            }
        }
    }
    bytes
}

fn unique(devices: &[DeviceName]) -> bool {
    (1..=MAX_DEVICES).contains(&devices.len())
        && devices.iter().collect::<BTreeSet<_>>().len() == devices.len()
}

fn check_manifest(manifest: &Manifest) {
    assert!((1..=MAX_DEVICES).contains(&manifest.devices.len()));
    let wire = v1::CheckpointManifest::from(manifest.clone());
    // Beyond what came only by defaults that are spelt out.
    assert!(wire.encoded_len() <= MAX_MANIFEST_BYTES + 16 * MAX_DEVICES);
    for device in &manifest.devices {
        assert!(device.fingerprint.facts().len() <= Fingerprint::MAX_FACTS);
        assert!(
            !device.source_address.contains(char::is_control) && !device.driver.contains(char::is_control)
        );
    }
    assert_eq!(&Manifest::try_from(wire).unwrap(), manifest);
}

/// Decodes and validates bytes as requests. Says whether one of them was valid.
fn requests(bytes: &[u8]) -> bool {
    let bytes = Bytes::copy_from_slice(bytes);
    let short = |invalid: &Invalid| invalid.field.len() < 400 && invalid.problem.len() < 800;
    let mut valid = false;
    if let Ok(wire) = v1::StartSaveRequest::decode(bytes.clone()) {
        match SaveRequestSpec::try_from(wire) {
            Ok(spec) => {
                valid = true;
                assert!(
                    unique(&spec.devices) && spec.downtime_limit.is_none_or(|limit| limit <= MAX_DURATION)
                );
            }
            Err(invalid) => assert!(short(&invalid), "{invalid}"),
        }
    }
    if let Ok(wire) = v1::RestoreRequest::decode(bytes.clone()) {
        match RestoreSpec::try_from(wire) {
            Ok(spec) => {
                valid = true;
                assert!(unique(&spec.devices));
                if let RestoreSource::Stream(manifest) = &spec.source {
                    assert_eq!(spec.devices.len(), manifest.devices.len());
                    check_manifest(manifest);
                }
            }
            Err(invalid) => assert!(short(&invalid), "{invalid}"),
        }
    }
    valid
}

/// Gives a message to both sides in several phases, and to both handshakes. Says whether anything took it.
fn message(bytes: &[u8]) -> bool {
    let Ok(message) = v1::StreamMessage::decode(Bytes::copy_from_slice(bytes)) else { return false };
    let mut accepted = false;
    if let Ok((open, _)) = opening(message.clone()) {
        accepted = true;
        assert_eq!(StreamOpen::try_from(v1::StreamOpen::from(open.clone())).unwrap(), open);
    }
    if let Ok(answer) = Dialing::new(open()).0.answered(message.clone()) {
        accepted = true;
        match answer {
            Answer::Opened(opened) => check_manifest(&opened.manifest),
            Answer::Aborted { reason } => assert!(reason.len() <= MAX_REASON_BYTES),
        }
    }
    let good = messages();
    for before in 0..4 {
        let mut taker = TakerSide::new(&session());
        for message in &good[..before] {
            taker.receive(message.clone()).unwrap();
        }
        assert_eq!(taker.phase(), Phase::Taking);
        accepted |= taker.receive(message.clone()).is_ok();
        if before < 3 {
            assert_ne!(taker.phase(), Phase::Taken, "two seals were missing");
        }
    }
    let mut giver = GiverSide::new(&session());
    let event = giver.receive(message);
    accepted |= event.is_ok();
    assert_ne!(event, Ok(GiverEvent::Completed), "nothing was given");
    accepted
}

/// The same inputs in every run: a failure is a failure for everybody.
fn config(seed: u64) -> Config {
    Config {
        cases: 4000,
        failure_persistence: None,
        rng_algorithm: RngAlgorithm::ChaCha,
        rng_seed: RngSeed::Fixed(seed),
        ..Config::default()
    }
}

#[test]
fn arbitrary_bytes() {
    let tried = Cell::new(0);
    proptest!(config(1), |(bytes in prop::collection::vec(any::<u8>(), 0..300))| {
        requests(&bytes);
        message(&bytes);
        tried.set(tried.get() + 1);
    });
    let _ = writeln!(std::io::stdout(), "\nfigures: hostile bytes: {} inputs, no panic", tried.get());
}

#[test]
fn good_requests_with_random_changes() {
    let good = [save().encode_to_vec(), restore().encode_to_vec()];
    assert!(good.iter().all(|bytes| requests(bytes)));
    let (tried, valid) = (Cell::new(0), Cell::new(0));
    proptest!(config(2), |(which in 0..good.len(), edits in edits())| {
        tried.set(tried.get() + 1);
        let was_valid = requests(&edited(good[which].clone(), &edits));
        valid.set(valid.get() + usize::from(was_valid));
    });
    let (tried, valid) = (tried.get(), valid.get());
    assert!(0 < valid && valid < tried, "both sides of the border were visited: {valid} of {tried}");
    let _ = writeln!(
        std::io::stdout(),
        "\nfigures: hostile requests: {tried} changed ones, {valid} still valid, no panic"
    );
}

#[test]
fn good_messages_with_random_changes() {
    let good: Vec<Vec<u8>> = messages().iter().map(prost::Message::encode_to_vec).collect();
    let (tried, taken) = (Cell::new(0), Cell::new(0));
    proptest!(config(3), |(which in 0..good.len(), edits in edits())| {
        tried.set(tried.get() + 1);
        let was_taken = message(&edited(good[which].clone(), &edits));
        taken.set(taken.get() + usize::from(was_taken));
    });
    let (tried, taken) = (tried.get(), taken.get());
    assert!(0 < taken && taken < tried, "both sides of the border were visited: {taken} of {tried}");
    let _ = writeln!(
        std::io::stdout(),
        "\nfigures: hostile messages: {tried} changed ones, {taken} taken, no panic"
    );
}

#[test]
fn a_length_that_is_claimed_and_not_there_is_refused() {
    for field in 1..=15u8 {
        for claimed in [1u64 << 20, 1 << 31, 1 << 32, 1 << 62, u64::MAX] {
            let mut bytes = vec![field << 3 | 2];
            prost::encoding::encode_varint(claimed, &mut bytes);
            assert!(v1::StreamMessage::decode(&bytes[..]).is_err(), "field {field}, {claimed}");
            assert!(v1::RestoreRequest::decode(&bytes[..]).is_err(), "field {field}, {claimed}");
            assert!(v1::StartSaveRequest::decode(&bytes[..]).is_err(), "field {field}, {claimed}");
        }
    }
}

#[test]
fn nesting_without_end_is_refused() {
    // Groups are the only way to nest in an unknown field.
    let bytes = vec![0x7b; 100_000];
    assert!(v1::StreamMessage::decode(&bytes[..]).is_err());
}

#[test]
fn what_a_request_decodes_to_is_bounded_before_it_is_decoded() {
    const NAME: &str = "vfio.checkpoint.v1.CheckpointManifest";
    // The shortest that a device of a manifest can be, again and again: the most memory for the fewest bytes.
    let devices = |count: usize| [[0x08, 1].to_vec(), [0x22, 0].repeat(count)].concat();
    let longest = devices(MAX_MESSAGE_BYTES / 2);
    let refused = PartsError::TooMany { message: NAME.into(), max: MAX_REQUEST_PARTS };
    assert_eq!(check_parts(NAME, &longest, MAX_REQUEST_PARTS), Err(refused));

    let passing = devices(MAX_REQUEST_PARTS);
    assert_eq!(check_parts(NAME, &passing, MAX_REQUEST_PARTS), Ok(()));
    let wire = v1::CheckpointManifest::decode(&passing[..]).unwrap();
    let decoded_bytes = wire.devices.capacity() * size_of::<v1::DeviceManifest>();
    assert!(decoded_bytes < 4 << 20, "{decoded_bytes}");
    assert_eq!(Manifest::try_from(wire).unwrap_err().field, "devices");
    let _ = writeln!(
        std::io::stdout(),
        "\nfigures: hostile manifest: {} bytes refused undecoded; the worst that is decoded takes {decoded_bytes}",
        longest.len()
    );
}
