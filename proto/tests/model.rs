//! The taker's end of a stream against a model of what it may take.
//!
//! ```text
//!   seed -> moves, most of them right -> frames under a right CRC, or not -> FrameVerifier --\
//!                                                                     \---> Model ----------- the same verdict and content
//! ```
//! Frames that were damaged on the way are `damage.rs`'; here a giver means what it sends. The model is written for reading:
//! one line a rule, no order of checks, no errors. It does not know why a frame is refused, only whether.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test: helpers assert by panicking, too")]

use std::io::Write as _;
use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, RngSeed};
use vfio_checkpoint_proto::domain::{ConfigSpaceCapture, Progress, StreamLimits};
use vfio_checkpoint_proto::frame::{Accepted, FrameError, FrameVerifier, crc32c};
use vfio_checkpoint_proto::ids::StreamId;
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_proto::v1::frame::Body;
use vfio_checkpoint_seal::{Seal, SealHasher};

const STREAM: u64 = 7;
const DEVICES: usize = 2;
const MAX_CHUNK_BYTES: usize = 4;
const MAX_DEVICE_BYTES: usize = 10;

/// What a giver does next. What is not in here it does right.
#[derive(Debug, Clone)]
enum Move {
    Chunk { device: u32, behind: i64, data: Vec<u8> },
    Progress { device: u32, phase: i32 },
    Seal { device: u32, length_off: i64, flip: Option<u8>, digest_bytes: usize, vectors: Option<u32> },
    Nothing,
}

/// How far off what is around it is.
#[derive(Debug, Clone, Copy)]
struct Around {
    sequence: i64,
    stream: u64,
    crc: u32,
}

#[derive(Debug, Default)]
struct Model {
    state: [Vec<u8>; DEVICES],
    sealed: [bool; DEVICES],
    taken: u64,
    failed: bool,
}

fn seal_on(state: &[u8]) -> Seal {
    let mut hasher = SealHasher::new();
    hasher.update(state);
    hasher.seal()
}

fn place(device: u32) -> Option<usize> {
    usize::try_from(device).ok().filter(|device| *device < DEVICES)
}

impl Model {
    fn frame(&self, wanted: &Move, around: Around) -> v1::Frame {
        let length = |device: u32| place(device).map_or(0, |device| self.state[device].len() as u64);
        let (device, body) = match wanted.clone() {
            Move::Chunk { device, behind, data } => {
                let offset = length(device).wrapping_add_signed(behind);
                (device, Some(Body::Chunk(v1::Chunk { offset, data: data.into() })))
            }
            Move::Progress { device, phase } => {
                let progress = v1::StreamProgress { phase, left_bytes: 1, predicted_downtime_us: 0 };
                (device, Some(Body::Progress(progress)))
            }
            Move::Seal { device, length_off, flip, digest_bytes, vectors } => {
                let state = place(device).map_or(&[][..], |device| &self.state[device]);
                let mut digest = seal_on(state).blake3.to_vec();
                if let Some(bit) = flip {
                    digest[usize::from(bit / 8)] ^= 1 << (bit % 8);
                }
                digest.resize(digest_bytes, 0);
                let config = vectors.map(|vectors| v1::ConfigSpaceCapture {
                    command: 6,
                    interrupt_kind: v1::InterruptKind::Msi.into(),
                    interrupt_vectors: vectors,
                });
                let length_bytes = length(device).wrapping_add_signed(length_off);
                (device, Some(Body::Seal(v1::StreamSeal { length_bytes, blake3: digest.into(), config })))
            }
            Move::Nothing => (0, None),
        };
        let sequence = self.taken.wrapping_add_signed(around.sequence);
        let mut frame =
            v1::Frame { stream_id: STREAM.wrapping_add(around.stream), sequence, device, crc32c: 0, body };
        frame.crc32c = crc32c(&frame).unwrap_or_default() ^ around.crc;
        frame
    }

    fn may_take(&self, frame: &v1::Frame) -> bool {
        let open = place(frame.device).filter(|device| !self.sealed[*device]);
        let body = match &frame.body {
            None => false,
            Some(Body::Chunk(chunk)) => open.is_some_and(|device| {
                let length = self.state[device].len();
                chunk.offset == length as u64
                    && (1..=MAX_CHUNK_BYTES).contains(&chunk.data.len())
                    && length + chunk.data.len() <= MAX_DEVICE_BYTES
            }),
            Some(Body::Progress(progress)) => frame.device == 0 && Progress::try_from(*progress).is_ok(),
            Some(Body::Seal(seal)) => open.is_some_and(|device| {
                let right = seal_on(&self.state[device]);
                seal.length_bytes == right.bytes
                    && seal.blake3[..] == right.blake3
                    && seal.config.is_none_or(|config| ConfigSpaceCapture::try_from(config).is_ok())
            }),
        };
        let right_crc = crc32c(frame).is_some_and(|crc| crc == frame.crc32c);
        !self.failed && body && right_crc && frame.stream_id == STREAM && frame.sequence == self.taken
    }

    fn take(&mut self, frame: &v1::Frame) {
        self.taken += 1;
        match frame.body.as_ref().expect("a body") {
            Body::Chunk(chunk) => self.state[frame.device as usize].extend_from_slice(&chunk.data),
            Body::Progress(_) => {}
            Body::Seal(_) => self.sealed[frame.device as usize] = true,
        }
    }
}

/// Mostly 0, so that whole streams come about.
fn rarely<T: std::fmt::Debug + Clone + Default + 'static>(
    wrong: impl Strategy<Value = T> + 'static,
) -> impl Strategy<Value = T> {
    prop_oneof![60 => Just(T::default()), 1 => wrong]
}

fn any_off() -> impl Strategy<Value = i64> {
    prop_oneof![4 => -2..=2_i64, 1 => any::<i64>()]
}

fn device() -> impl Strategy<Value = u32> {
    prop_oneof![80 => 0..2_u32, 1 => Just(2_u32), 1 => any::<u32>()]
}

fn moves() -> impl Strategy<Value = (Move, Around)> {
    let data = prop_oneof![
        60 => prop::collection::vec(any::<u8>(), 1..=MAX_CHUNK_BYTES),
        1 => prop::collection::vec(any::<u8>(), 0..9),
    ];
    let chunk = (device(), rarely(any_off()), data).prop_map(|(device, behind, data)| Move::Chunk {
        device,
        behind,
        data,
    });
    let progress = (rarely(1..3_u32), prop_oneof![20 => 1..4_i32, 1 => any::<i32>()])
        .prop_map(|(device, phase)| Move::Progress { device, phase });
    let digest_bytes = prop_oneof![60 => Just(32_usize), 1 => 0..40_usize];
    let vectors = prop_oneof![4 => Just(None), 1 => (1..40_u32).prop_map(Some)];
    let seal = (device(), rarely(any_off()), rarely(any::<u8>().prop_map(Some)), digest_bytes, vectors)
        .prop_map(|(device, length_off, flip, digest_bytes, vectors)| Move::Seal {
            device,
            length_off,
            flip,
            digest_bytes,
            vectors,
        });
    let wanted = prop_oneof![30 => chunk, 15 => progress, 15 => seal, 1 => Just(Move::Nothing)];
    let around = (rarely(any_off()), rarely(any::<u64>()), rarely(any::<u32>()))
        .prop_map(|(sequence, stream, crc)| Around { sequence, stream, crc });
    (wanted, around)
}

/// The same inputs in every run: a failure is a failure for everybody.
fn config() -> Config {
    Config {
        cases: 12_000,
        failure_persistence: None,
        rng_algorithm: RngAlgorithm::ChaCha,
        rng_seed: RngSeed::Fixed(1),
        ..Config::default()
    }
}

#[test]
fn what_is_taken_is_what_a_model_takes() {
    let limits = StreamLimits {
        max_chunk_bytes: u32::try_from(MAX_CHUNK_BYTES).unwrap(),
        max_device_bytes: MAX_DEVICE_BYTES as u64,
        idle_timeout: Duration::from_secs(1),
        lifetime: Duration::from_secs(1),
        ack_interval_bytes: 1,
        ack_delay: None,
    };
    let counts = std::cell::Cell::new([0_u32; 3]);
    let count = |which: usize| {
        let mut now = counts.get();
        now[which] += 1;
        counts.set(now);
    };
    proptest!(config(), |(moves in prop::collection::vec(moves(), 0..10))| {
        let mut taker = FrameVerifier::new(StreamId(STREAM), DEVICES, &limits);
        let mut model = Model::default();
        for (wanted, around) in &moves {
            let frame = model.frame(wanted, *around);
            let may = model.may_take(&frame);
            match taker.accept(frame.clone()) {
                Ok(accepted) => {
                    prop_assert!(may, "taken: {:?} after {:?}", frame, model);
                    count(0);
                    model.take(&frame);
                    match (accepted, frame.body) {
                        (Accepted::Chunk { device, chunk }, Some(Body::Chunk(sent))) => {
                            prop_assert_eq!(device, frame.device as usize);
                            prop_assert_eq!(chunk.bytes(), &sent.data);
                        }
                        (Accepted::Progress(_), Some(Body::Progress(_))) => {}
                        (Accepted::Sealed { device, seal, .. }, Some(Body::Seal(_))) => {
                            prop_assert_eq!(device, frame.device as usize);
                            prop_assert_eq!(seal.seal(), seal_on(&model.state[device]));
                        }
                        (accepted, sent) => prop_assert!(false, "{:?} of {:?}", accepted, sent),
                    }
                }
                Err(error) => {
                    prop_assert!(!may, "{error}: {:?} after {:?}", frame, model);
                    // Once something was refused nothing is taken any more, and that is why.
                    prop_assert_eq!(error == FrameError::AlreadyFailed, model.failed);
                    count(1);
                    model.failed = true;
                }
            }
            // A seal is counted before its digest is compared; with a wrong one nothing comes after it.
            if !model.failed {
                prop_assert_eq!(taker.next_sequence(), model.taken);
            }
        }
        let whole = !model.failed && model.sealed == [true; DEVICES];
        prop_assert_eq!(taker.all_sealed(), whole);
        prop_assert_eq!(taker.finish().is_ok(), whole);
        if whole {
            count(2);
        }
    });
    let [taken, refused, whole] = counts.get();
    assert!(taken > 5_000 && refused > 5_000 && whole > 100, "it proves little: {:?}", counts.get());
    let _ = writeln!(
        std::io::stdout(),
        "\nfigures: stream: {} sequences of made-up frames against a model: {taken} taken, {refused} refused, {whole} whole",
        config().cases
    );
}
