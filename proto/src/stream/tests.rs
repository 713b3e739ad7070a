//! Every phase with every message and every call, as tables; then what the tables do not show.

mod resume;

use std::fmt::Write as _;
use std::time::{Duration, UNIX_EPOCH};

use bytes::Bytes;

use super::*;
use crate::domain::{
    Backend, DataSize, DeviceManifest, Fingerprint, LogicalDevice, Manifest, Phase as OperationPhase,
    Progress, SourceDisposition, StreamOpen, StreamRole,
};
use crate::frame::{Accepted, FrameError};
use crate::ids::{Epoch, LogicalDeviceId};
use crate::version::{Version, VersionRange};

const LIMITS: StreamLimits = StreamLimits {
    max_chunk_bytes: crate::MIN_CHUNK_BYTES,
    max_device_bytes: 100,
    idle_timeout: Duration::from_secs(5),
    lifetime: Duration::from_mins(1),
    ack_interval_bytes: 4,
    ack_delay: None,
};

fn session(job: Job) -> Session {
    Session { stream: StreamId(7), devices: 1, limits: LIMITS, job }
}

fn opened_answer() -> StreamOpened {
    let device = DeviceManifest {
        source_device: "devices/a".parse().unwrap(),
        source_address: "sim:".into(),
        backend: Backend::Sim,
        driver: "sim".into(),
        fingerprint: Fingerprint::default(),
        logical_device: LogicalDevice { id: LogicalDeviceId::from_bytes([1; 16]), epoch: Epoch(1) },
        data_size: DataSize::Known(3),
    };
    let manifest = Manifest {
        operation: "operations/o".parse().unwrap(),
        create_time: UNIX_EPOCH,
        devices: vec![device],
        source_disposition: SourceDisposition::RunsOn,
    };
    StreamOpened { version: Version(1), stream_id: StreamId(7), manifest, limits: LIMITS, next_sequence: 0 }
}

fn open(role: StreamRole) -> StreamOpen {
    StreamOpen {
        operation: "operations/o".parse().unwrap(),
        role,
        versions: VersionRange::OURS,
        max_chunk_bytes: None,
        resume: None,
    }
}

fn progress() -> Progress {
    Progress { phase: OperationPhase::StopCopy, left_bytes: 1, predicted_downtime: None }
}

fn ack(next_sequence: u64, complete: bool) -> v1::StreamMessage {
    message(Kind::Ack(v1::StreamAck { next_sequence, complete }))
}

/// The messages of one giver of "abc": a chunk, progress and the seal.
fn given(giver: &mut GiverSide) -> [v1::StreamMessage; 3] {
    let chunk = giver.chunk(0, Bytes::from_static(b"abc")).unwrap().next().unwrap();
    let progress = giver.progress(progress()).unwrap();
    [chunk, progress, giver.seal(0, None).unwrap().0]
}

fn giver_in(phase: Phase, job: Job) -> GiverSide {
    let mut giver = GiverSide::new(&session(job));
    match phase {
        Phase::Giving => {
            let _sent = giver.chunk(0, Bytes::from_static(b"abc")).unwrap().count();
        }
        Phase::Given => drop(given(&mut giver)),
        Phase::Complete => {
            given(&mut giver);
            giver.receive(ack(3, true)).unwrap();
        }
        Phase::Aborted => drop(giver.receive(abort_message("enough")).unwrap()),
        Phase::Abandoned => drop(giver.abort("enough").unwrap()),
        Phase::Failed => drop(giver.receive(ack(9, false)).unwrap_err()),
        Phase::AwaitingOpen | Phase::AwaitingOpened | Phase::Taking | Phase::Taken => panic!("no giver's"),
    }
    assert_eq!(giver.phase(), phase);
    giver
}

fn taker_in(phase: Phase, job: Job) -> TakerSide {
    let mut taker = TakerSide::new(&session(job));
    let frames = given(&mut GiverSide::new(&session(job)));
    let mut take = |count: usize| {
        for frame in &frames[..count] {
            taker.receive(frame.clone()).unwrap();
        }
    };
    match phase {
        Phase::Taking => take(1),
        Phase::Taken => take(3),
        Phase::Complete => {
            take(3);
            taker.complete().unwrap();
        }
        Phase::Aborted => drop(taker.receive(abort_message("enough")).unwrap()),
        Phase::Abandoned => drop(taker.abort("enough").unwrap()),
        Phase::Failed => drop(taker.receive(ack(0, false)).unwrap_err()),
        Phase::AwaitingOpen | Phase::AwaitingOpened | Phase::Giving | Phase::Given => panic!("no taker's"),
    }
    assert_eq!(taker.phase(), phase);
    taker
}

/// One message of each kind, and of each meaning where a kind has several.
fn messages() -> Vec<(&'static str, v1::StreamMessage)> {
    let frames = given(&mut GiverSide::new(&session(Job::Restore)));
    let [chunk, told, seal] = frames;
    let mut late = GiverSide::new(&session(Job::Restore));
    given(&mut late);
    let late = late.progress(progress()).unwrap();
    vec![
        ("no kind", v1::StreamMessage { kind: None }),
        ("Open", message(Kind::Open(open(StreamRole::Taker).into()))),
        ("Opened", opened(opened_answer())),
        ("chunk 0", chunk),
        ("progress 1", told),
        ("seal 2", seal),
        ("progress 3", late),
        ("Ack 1", ack(1, false)),
        ("complete 3", ack(3, true)),
        ("Ack 9", ack(9, false)),
        ("Cutover", message(Kind::Cutover(v1::StreamCutover {}))),
        ("Abort", abort_message("enough")),
    ]
}

fn verdict(error: &ProtocolError) -> String {
    let said = format!("{error:?}");
    let name = said.split([' ', '{', '(']).next().unwrap_or_default();
    match error {
        ProtocolError::Frame(frame) => {
            let said = format!("{frame:?}");
            format!("{name}.{}", said.split([' ', '{', '(']).next().unwrap_or_default())
        }
        ProtocolError::Empty { .. }
        | ProtocolError::Unexpected { .. }
        | ProtocolError::CutoverNotManual
        | ProtocolError::Invalid { .. }
        | ProtocolError::Version(_)
        | ProtocolError::Give(_)
        | ProtocolError::AckBeyondSent { .. }
        | ProtocolError::AckWentBack { .. }
        | ProtocolError::ResumeOutOfRange { .. }
        | ProtocolError::CompleteTooEarly { .. }
        | ProtocolError::NotNow { .. }
        | ProtocolError::Unfinished { .. }
        | ProtocolError::AlreadyFailed => name.to_owned(),
    }
}

fn row(table: &mut String, name: &str, cells: impl IntoIterator<Item = String>) {
    let mut line = format!("{name:<12}");
    for cell in cells {
        write!(line, "{cell:<21}").unwrap();
    }
    writeln!(table, "{}", line.trim_end()).unwrap();
}

const GIVER: [Phase; 6] =
    [Phase::Giving, Phase::Given, Phase::Complete, Phase::Aborted, Phase::Abandoned, Phase::Failed];
const TAKER: [Phase; 6] =
    [Phase::Taking, Phase::Taken, Phase::Complete, Phase::Aborted, Phase::Abandoned, Phase::Failed];

#[test]
fn every_phase_of_the_giver_with_every_message() {
    let mut table = String::new();
    row(&mut table, "", GIVER.map(|phase| format!("{phase:?}")));
    for (name, message) in messages() {
        let cells = GIVER.map(|phase| match giver_in(phase, Job::ManualSave).receive(message.clone()) {
            Ok(GiverEvent::Acked { next_sequence }) => format!("Acked {next_sequence}"),
            Ok(GiverEvent::Completed) => "Completed".into(),
            Ok(GiverEvent::CutoverRequested) => "CutoverRequested".into(),
            Ok(GiverEvent::Aborted { .. }) => "Aborted".into(),
            Ok(GiverEvent::Ignored) => "Ignored".into(),
            Err(error) => verdict(&error),
        });
        row(&mut table, name, cells);
    }
    assert_eq!(table, include_str!("tests/giver.txt"), "\n{table}");
}

#[test]
fn every_phase_of_the_taker_with_every_message() {
    let mut table = String::new();
    row(&mut table, "", TAKER.map(|phase| format!("{phase:?}")));
    for (name, message) in messages() {
        let cells = TAKER.map(|phase| match taker_in(phase, Job::Restore).receive(message.clone()) {
            Ok(Took { event: TakerEvent::Frame(Accepted::Chunk { .. }), .. }) => "Chunk".into(),
            Ok(Took { event: TakerEvent::Frame(Accepted::Progress(_)), .. }) => "Progress".into(),
            Ok(Took { event: TakerEvent::Frame(Accepted::Sealed { .. }), .. }) => "Sealed".into(),
            Ok(Took { event: TakerEvent::Aborted { .. }, .. }) => "Aborted".into(),
            Ok(Took { event: TakerEvent::Ignored, .. }) => "Ignored".into(),
            Err(error) => verdict(&error),
        });
        row(&mut table, name, cells);
    }
    assert_eq!(table, include_str!("tests/taker.txt"), "\n{table}");
}

#[test]
fn every_phase_with_every_call() {
    let result = |result: Result<(), ProtocolError>| result.map_or_else(|e| verdict(&e), |()| "ok".into());
    let sent =
        |message: Option<v1::StreamMessage>| if message.is_some() { "sent" } else { "nothing" }.to_owned();
    let mut table = String::new();
    row(&mut table, "giver", GIVER.map(|phase| format!("{phase:?}")));
    let side = |phase| giver_in(phase, Job::AutoSave);
    row(&mut table, "chunk", GIVER.map(|p| result(side(p).chunk(0, Bytes::from_static(b"d")).map(|_| ()))));
    row(&mut table, "progress", GIVER.map(|p| result(side(p).progress(progress()).map(|_| ()))));
    row(&mut table, "seal", GIVER.map(|p| result(side(p).seal(0, None).map(|_| ()))));
    row(&mut table, "resume", GIVER.map(|p| result(side(p).resume(1))));
    row(&mut table, "abort", GIVER.map(|p| sent(side(p).abort("enough"))));
    row(&mut table, "closed", GIVER.map(|p| result(side(p).closed())));
    row(&mut table, "taker", TAKER.map(|phase| format!("{phase:?}")));
    let side = |phase| taker_in(phase, Job::ManualSave);
    row(&mut table, "complete", TAKER.map(|p| result(side(p).complete().map(|_| ()))));
    row(&mut table, "cutover", TAKER.map(|p| result(side(p).cutover().map(|_| ()))));
    let resumed = |resumed: Result<Resumed, ProtocolError>| match resumed {
        Ok(Resumed { again: Some(_), .. }) => "says complete".into(),
        other => result(other.map(drop)),
    };
    row(&mut table, "resume", TAKER.map(|p| resumed(side(p).resume())));
    row(&mut table, "abort", TAKER.map(|p| sent(side(p).abort("enough"))));
    row(&mut table, "closed", TAKER.map(|p| result(side(p).closed())));
    assert_eq!(table, include_str!("tests/calls.txt"), "\n{table}");
}

#[test]
fn every_first_message_on_both_sides() {
    let mut table = String::new();
    row(&mut table, "", ["opening", "answered"].map(String::from));
    for (name, message) in messages() {
        let heard = match opening(message.clone()) {
            Ok((open, version)) => format!("{:?} {version}", open.role),
            Err(error) => verdict(&error),
        };
        let answered = match Dialing::new(open(StreamRole::Taker)).0.answered(message) {
            Ok(Answer::Opened(_)) => "Opened".into(),
            Ok(Answer::Aborted { .. }) => "Aborted".into(),
            Err(error) => verdict(&error),
        };
        row(&mut table, name, [heard, answered]);
    }
    assert_eq!(table, include_str!("tests/handshake.txt"), "\n{table}");
}

#[test]
fn only_the_taker_of_a_manual_save_has_a_say_in_cutover() {
    for job in [Job::AutoSave, Job::Restore] {
        let mut giver = giver_in(Phase::Giving, job);
        let asked = message(Kind::Cutover(v1::StreamCutover {}));
        assert_eq!(giver.receive(asked), Err(ProtocolError::CutoverNotManual));
        assert_eq!(giver.phase(), Phase::Failed);
        for phase in TAKER {
            assert_eq!(taker_in(phase, job).cutover(), Err(ProtocolError::CutoverNotManual));
        }
    }
    // Asked twice is asked: the signal is a level, not an edge.
    let mut giver = giver_in(Phase::Giving, Job::ManualSave);
    for _ in 0..2 {
        let asked = taker_in(Phase::Taking, Job::ManualSave).cutover().unwrap();
        assert_eq!(giver.receive(asked), Ok(GiverEvent::CutoverRequested));
    }
}

#[test]
fn acks_come_by_bytes_rise_and_cover_what_was_sent() {
    let mut giver = GiverSide::new(&session(Job::AutoSave));
    let mut taker = TakerSide::new(&session(Job::AutoSave));
    let mut acks = Vec::new();
    for piece in [&b"ab"[..], b"c", b"d", b"efghi", b"j"] {
        let sent: Vec<_> = giver.chunk(0, Bytes::from_static(piece)).unwrap().collect();
        for frame in sent {
            if let Some(reply) = taker.receive(frame).unwrap().reply {
                acks.push(giver.receive(reply).unwrap());
            }
        }
    }
    assert_eq!(acks, [3, 4].map(|next_sequence| GiverEvent::Acked { next_sequence }));
    assert_eq!(giver.acked(), 4);
    assert_eq!(giver.receive(ack(4, false)), Ok(GiverEvent::Acked { next_sequence: 4 }));
    assert_eq!(giver.receive(ack(3, false)), Err(ProtocolError::AckWentBack { acked: 3, before: 4 }));
}

#[test]
fn complete_is_believed_after_the_last_seal_only() {
    let early = |acked| {
        let mut giver = giver_in(Phase::Given, Job::Restore);
        giver.receive(ack(acked, true))
    };
    assert_eq!(early(3), Ok(GiverEvent::Completed));
    assert!(matches!(early(2), Err(ProtocolError::CompleteTooEarly { acked: 2, sent: 3, .. })));
    let mut giver = giver_in(Phase::Giving, Job::Restore);
    assert!(matches!(
        giver.receive(ack(1, true)),
        Err(ProtocolError::CompleteTooEarly { acked: 1, sent: 1, .. })
    ));
    // Progress after the last seal crosses `complete` on its way, and harms neither side.
    let (mut giver, mut taker) = (giver_in(Phase::Given, Job::Restore), taker_in(Phase::Taken, Job::Restore));
    let told = giver.progress(progress()).unwrap();
    let complete = taker.complete().unwrap();
    assert_eq!(giver.receive(complete), Ok(GiverEvent::Completed));
    assert!(matches!(taker.receive(told).unwrap().event, TakerEvent::Frame(Accepted::Progress(_))));
    giver.closed().unwrap();
    taker.closed().unwrap();
}

#[test]
fn an_end_without_a_word_is_told_from_a_whole_stream() {
    let taker = taker_in(Phase::Taking, Job::Restore);
    let missing = FrameError::Unsealed { next_sequence: 1, devices: vec![0] };
    assert_eq!(taker.closed(), Err(ProtocolError::Frame(missing)));
    assert_eq!(
        taker_in(Phase::Taken, Job::Restore).closed(),
        Err(ProtocolError::Unfinished { phase: Phase::Taken })
    );
}

#[test]
fn what_has_ended_stays_as_it_ended() {
    let mut giver = giver_in(Phase::Complete, Job::Restore);
    assert!(giver.receive(ack(3, true)).is_err());
    assert_eq!((giver.phase(), giver.closed()), (Phase::Complete, Ok(())));
    let mut taker = taker_in(Phase::Complete, Job::Restore);
    assert!(taker.receive(ack(3, true)).is_err());
    assert!(matches!(taker.receive(abort_message("late")).unwrap().event, TakerEvent::Aborted { .. }));
    assert_eq!((taker.phase(), taker.closed()), (Phase::Complete, Ok(())));
}

#[test]
fn reasons_are_bounded_and_on_one_line() {
    let mut giver = giver_in(Phase::Giving, Job::Restore);
    let long = format!("a\nb\u{1b}{}", "é".repeat(2000));
    let hostile = message(Kind::Abort(v1::StreamAbort { reason: long.clone() }));
    let Ok(GiverEvent::Aborted { reason }) = giver.receive(hostile) else { panic!() };
    assert!(reason.starts_with("a b é") && reason.len() <= MAX_REASON_BYTES, "{}", reason.len());
    let Some(Kind::Abort(sent)) = giver_in(Phase::Giving, Job::Restore).abort(&long).unwrap().kind else {
        panic!()
    };
    assert_eq!(sent.reason, reason);
}

#[test]
fn the_answer_must_fit_what_was_asked_for() {
    let ask = |max_chunk_bytes| {
        let (dialing, first) = Dialing::new(StreamOpen { max_chunk_bytes, ..open(StreamRole::Taker) });
        let (heard, version) = opening(first).unwrap();
        assert_eq!((heard.max_chunk_bytes, version), (max_chunk_bytes, Version(2)));
        dialing
    };
    let answer = |max_chunk_bytes| {
        let limits = StreamLimits { max_chunk_bytes, ..LIMITS };
        opened(StreamOpened { limits, ..opened_answer() })
    };
    assert!(ask(None).answered(answer(1 << 20)).is_ok());
    assert!(ask(Some(1 << 20)).answered(answer(1 << 20)).is_ok());
    let Err(ProtocolError::Invalid { kind: MessageKind::Opened, source }) =
        ask(Some(1 << 17)).answered(answer(1 << 20))
    else {
        panic!()
    };
    assert_eq!(source.field, "limits.max_chunk_bytes");
    let Err(ProtocolError::Version(refused)) =
        ask(None).answered(opened(StreamOpened { version: Version(3), ..opened_answer() }))
    else {
        panic!()
    };
    assert_eq!((refused.ours, refused.theirs), (VersionRange::OURS, VersionRange::new(3, 3).unwrap()));
    let newer = StreamOpen { versions: VersionRange::new(3, 4).unwrap(), ..open(StreamRole::Giver) };
    assert!(matches!(opening(Dialing::new(newer).1), Err(ProtocolError::Version(_))));
    let Err(ProtocolError::Invalid { source, .. }) = opening(message(Kind::Open(v1::StreamOpen {
        operation: "operations/o".into(),
        ..Default::default()
    }))) else {
        panic!()
    };
    assert_eq!(source.field, "role");
}
