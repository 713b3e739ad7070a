//! Streams whose connection breaks, and that go on: wherever, and as often as it happens.
//!
//! ```text
//!   GiverSide --> kept: all frames that were made --> wire, cut at some frame --> TakerSide
//!       ^------------------- resume(next) ------------------- resume() -----------'
//! ```

use proptest::prelude::*;
use vfio_checkpoint_seal::SealHasher;

use super::*;

/// What one call gives.
#[derive(Debug, Clone)]
enum Step {
    Chunk(usize, Vec<u8>),
    Progress,
}

const DEVICES: usize = 2;

fn session() -> Session {
    let limits = StreamLimits { max_device_bytes: 1 << 20, ack_interval_bytes: 16, ..LIMITS };
    Session { devices: DEVICES, limits, ..super::session(Job::Restore) }
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let chunk = (0..DEVICES, prop::collection::vec(any::<u8>(), 1..20));
    let step = prop_oneof![4 => chunk.prop_map(|(device, state)| Step::Chunk(device, state)), 1 => Just(Step::Progress)];
    prop::collection::vec(step, 0..25)
}

/// All frames of these steps, and of the seals after them.
fn frames(giver: &mut GiverSide, steps: &[Step]) -> Vec<v1::StreamMessage> {
    let mut frames = Vec::new();
    for step in steps {
        match step {
            Step::Chunk(device, state) => {
                frames.extend(giver.chunk(*device, Bytes::from(state.clone())).unwrap());
            }
            Step::Progress => frames.push(giver.progress(progress()).unwrap()),
        }
    }
    for device in 0..DEVICES {
        frames.push(giver.seal(device, None).unwrap().0);
    }
    frames
}

/// What a taker has, and how.
#[derive(Debug, Default, PartialEq)]
struct Taken {
    state: [Vec<u8>; DEVICES],
    seals: usize,
    accepted: usize,
}

impl Taken {
    fn note(&mut self, accepted: Accepted) {
        self.accepted += 1;
        match accepted {
            Accepted::Chunk { device, chunk } => {
                assert_eq!(chunk.offset(), self.state[device].len() as u64);
                self.state[device].extend_from_slice(chunk.bytes());
            }
            Accepted::Sealed { device, seal, .. } => {
                let mut hasher = SealHasher::new();
                hasher.update(&self.state[device]);
                assert_eq!(seal.seal(), hasher.seal());
                self.seals += 1;
            }
            Accepted::Progress(_) => {}
        }
    }
}

/// Takes what comes until the connection breaks after so many frames; some acks are lost with it.
fn until_cut(
    giver: &mut GiverSide,
    taker: &mut TakerSide,
    kept: &[v1::StreamMessage],
    frames: usize,
    heard_acks: usize,
    seen: &mut Taken,
) {
    let mut acks = Vec::new();
    for frame in kept.iter().take(frames) {
        let Took { event: TakerEvent::Frame(accepted), reply } = taker.receive(frame.clone()).unwrap() else {
            panic!("no frame")
        };
        seen.note(accepted);
        acks.extend(reply);
    }
    for ack in acks.into_iter().take(heard_acks) {
        assert!(matches!(giver.receive(ack).unwrap(), GiverEvent::Acked { .. }));
    }
}

proptest! {
    #[test]
    fn whatever_breaks_and_wherever_all_arrives_once(
        steps in steps(),
        cuts in prop::collection::vec((0_usize..12, 0_usize..3), 0..8),
    ) {
        let (mut giver, mut taker) = (GiverSide::new(&session()), TakerSide::new(&session()));
        let all = frames(&mut giver, &steps);
        let mut whole = Taken::default();
        let mut untouched = TakerSide::new(&session());
        until_cut(&mut GiverSide::new(&session()), &mut untouched, &all, all.len(), 0, &mut whole);

        let mut taken = Taken::default();
        let mut from = 0;
        for (frames, acks) in cuts {
            until_cut(&mut giver, &mut taker, &all[from..], frames, acks, &mut taken);
            let Resumed { next_sequence, again } = taker.resume().unwrap();
            prop_assert_eq!(again, None);
            giver.resume(next_sequence).unwrap();
            prop_assert_eq!(giver.acked(), next_sequence);
            from = usize::try_from(next_sequence).unwrap();
            prop_assert_eq!(taken.accepted, from, "each frame was verified once");
        }
        until_cut(&mut giver, &mut taker, &all[from..], all.len(), usize::MAX, &mut taken);
        prop_assert_eq!(&taken, &whole);
        prop_assert_eq!((taken.accepted, taken.seals), (all.len(), DEVICES));

        // Whoever did not hear `complete` hears it again, as often as it asks.
        let said = taker.complete().unwrap();
        for _ in 0..2 {
            let resumed = taker.resume().unwrap();
            giver.resume(resumed.next_sequence).unwrap();
            prop_assert_eq!(resumed.again.as_ref(), Some(&said));
        }
        prop_assert_eq!(giver.receive(said).unwrap(), GiverEvent::Completed);
    }
}

#[test]
fn a_stream_goes_on_with_what_can_be_next_and_with_nothing_else() {
    let giver = || {
        let mut giver = GiverSide::new(&session());
        frames(&mut giver, &vec![Step::Progress; 3]);
        giver.receive(ack(2, false)).unwrap();
        giver
    };
    for next_sequence in 0..8 {
        let mut giver = giver();
        let refused = ProtocolError::ResumeOutOfRange { next_sequence, acked: 2, sent: 5 };
        match giver.resume(next_sequence) {
            Ok(()) => assert!((2..=5).contains(&next_sequence)),
            Err(error) => {
                assert!(!(2..=5).contains(&next_sequence));
                assert_eq!((error, giver.phase()), (refused, Phase::Failed));
            }
        }
    }
    // What the taker said on the new connection holds on it.
    let mut giver = giver();
    giver.resume(4).unwrap();
    assert_eq!(giver.receive(ack(3, false)), Err(ProtocolError::AckWentBack { acked: 3, before: 4 }));
}

#[test]
fn what_was_taken_before_the_break_is_refused_after_it() {
    let (mut giver, mut taker) = (GiverSide::new(&session()), TakerSide::new(&session()));
    let all = frames(&mut giver, &[Step::Chunk(0, vec![1, 2, 3]), Step::Progress]);
    taker.receive(all[0].clone()).unwrap();
    assert_eq!(taker.resume().unwrap().next_sequence, 1);
    let Err(ProtocolError::Frame(FrameError::Repeated { expected: 1, found: 0 })) =
        taker.receive(all[0].clone())
    else {
        panic!("a replay was taken")
    };
    assert!(taker.resume().is_err(), "and that is the end of it");
}

#[test]
fn frames_without_state_are_acknowledged_too() {
    let (mut giver, mut taker) = (GiverSide::new(&session()), TakerSide::new(&session()));
    let all = frames(&mut giver, &vec![Step::Progress; 2100]);
    let acks: Vec<u64> = all
        .into_iter()
        .filter_map(|frame| {
            let Some(Kind::Ack(ack)) = taker.receive(frame).unwrap().reply?.kind else { panic!("no ack") };
            Some(ack.next_sequence)
        })
        .collect();
    assert_eq!(acks, [ACK_INTERVAL_FRAMES, 2 * ACK_INTERVAL_FRAMES]);
}

#[test]
fn the_answer_is_of_the_stream_that_was_asked_for() {
    let resuming = StreamOpen { resume: Some(StreamId(7)), ..open(StreamRole::Giver) };
    let good = StreamOpened { version: Version(2), next_sequence: 3, ..opened_answer() };
    let answered = |open: &StreamOpen, answer: StreamOpened| {
        let (dialing, first) = Dialing::new(open.clone());
        assert_eq!(opening(first).unwrap().0.resume, open.resume);
        match dialing.answered(opened(answer)) {
            Ok(_) => String::new(),
            Err(ProtocolError::Invalid { source, .. }) => source.field,
            Err(other) => panic!("{other}"),
        }
    };
    assert_eq!(answered(&resuming, good.clone()), "");
    assert_eq!(answered(&resuming, StreamOpened { stream_id: StreamId(8), ..good.clone() }), "stream_id");
    assert_eq!(answered(&resuming, StreamOpened { version: Version(1), ..good.clone() }), "version");
    assert_eq!(answered(&open(StreamRole::Giver), good), "next_sequence");
}
