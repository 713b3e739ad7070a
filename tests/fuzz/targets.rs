//! What may come from a peer, each as one function of bytes: run by a fuzzer that looks for new paths (`run`), and by
//! `replay.rs` on what it has found so far.
//!
//! ```text
//!   wire       a body of HTTP/2: messages are the same however it is cut into pieces, and whatever they are made of
//!   transfer   a giver's stream that is changed on the way: nothing is taken that was not given
//!   requests   every request that there is: valid or refused
//! ```
//! A target panics where something is wrong, and never else.

use bytes::Bytes;
use prost::Message as _;
use vfio_checkpoint_proto::domain::{self, Invalid, StreamLimits};
use vfio_checkpoint_proto::frame::Accepted;
use vfio_checkpoint_proto::ids::StreamId;
use vfio_checkpoint_proto::stream::{GiverSide, Job, Phase, Session, TakerEvent, TakerSide};
use vfio_checkpoint_proto::v1::frame::Body;
use vfio_checkpoint_proto::v1::stream_message::Kind;
use vfio_checkpoint_proto::wire::{Assembly, Encoded, Sender, encode};
use vfio_checkpoint_proto::{MIN_CHUNK_BYTES, v1};

/// A target.
pub(crate) type Target = fn(&[u8]);

/// Every target, by its name.
pub(crate) const ALL: [(&str, Target); 3] = [("wire", wire), ("transfer", transfer), ("requests", requests)];

/// Puts messages together until one is refused. What they are, and how it ended.
fn read(from: Sender, pieces: &[Bytes]) -> (Vec<v1::StreamMessage>, String) {
    let mut assembly = Assembly::new(from);
    let mut messages = Vec::new();
    for piece in pieces {
        assembly.push(piece.clone());
        loop {
            match assembly.message() {
                Ok(Some(message)) => messages.push(message),
                Ok(None) => break,
                Err(error) => return (messages, error.to_string()),
            }
        }
    }
    (messages, assembly.finish().err().map(|error| error.to_string()).unwrap_or_default())
}

/// The first byte says who sends, and how long the pieces are.
pub(crate) fn wire(input: &[u8]) {
    let Some((&how, body)) = input.split_first() else { return };
    let from = if how & 1 == 0 { Sender::Caller } else { Sender::Agent };
    let body = Bytes::copy_from_slice(body);
    let length = 1 + usize::from(how >> 1) * 67;
    let pieces: Vec<Bytes> =
        (0..body.len()).step_by(length).map(|at| body.slice(at..body.len().min(at + length))).collect();
    let whole = read(from, std::slice::from_ref(&body));
    assert_eq!(whole, read(from, &pieces), "in pieces of {length}");
    for message in whole.0 {
        let Encoded { head, state } = encode(message.clone());
        let (again, end) = read(Sender::Agent, &[head, state]);
        assert!(end.is_empty() && again == [message], "{again:?}, {end}");
    }
}

const DEVICES: usize = 2;

fn session() -> Session {
    let limits = StreamLimits {
        max_chunk_bytes: MIN_CHUNK_BYTES,
        max_device_bytes: 1 << 20,
        idle_timeout: std::time::Duration::from_secs(1),
        lifetime: std::time::Duration::from_secs(1),
        ack_interval_bytes: 256,
        ack_delay: None,
    };
    Session { stream: StreamId(7), devices: DEVICES, limits, job: Job::ManualSave }
}

/// One byte of an input after the other; zeros behind its end.
struct Script<'a>(&'a [u8]);

impl Script<'_> {
    fn byte(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        *first
    }

    fn bytes(&mut self, count: usize) -> Bytes {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        Bytes::copy_from_slice(taken)
    }
}

/// Changes a message, as the script says.
fn changed(message: &mut v1::StreamMessage, script: &mut Script<'_>) {
    let by = u64::from(script.byte());
    let Some(Kind::Frame(frame)) = &mut message.kind else { return };
    match script.byte() % 8 {
        0 => frame.stream_id ^= by,
        1 => frame.sequence ^= by,
        2 => frame.device ^= u32::try_from(by).unwrap_or_default(),
        3 => frame.crc32c ^= u32::try_from(by).unwrap_or_default(),
        4 => frame.body = None,
        which => match &mut frame.body {
            Some(Body::Chunk(chunk)) if which == 5 => chunk.offset ^= by,
            Some(Body::Chunk(chunk)) => {
                let mut data = chunk.data.to_vec();
                if which == 6 {
                    data.pop();
                } else if let Some(first) = data.first_mut() {
                    *first ^= u8::try_from(by).unwrap_or_default();
                }
                chunk.data = data.into();
            }
            Some(Body::Seal(seal)) => seal.length_bytes ^= by,
            _ => {}
        },
    }
    // A peer can reckon, too.
    if script.byte().is_multiple_of(2)
        && let Some(sum) = vfio_checkpoint_proto::frame::crc32c(frame)
    {
        frame.crc32c = sum;
    }
}

/// What a giver says goes to a taker over somebody who changes, drops, repeats and invents.
pub(crate) fn transfer(input: &[u8]) {
    let mut script = Script(input);
    let (mut giver, mut taker) = (GiverSide::new(&session()), TakerSide::new(&session()));
    let (mut sent, mut got) = ([vec![], vec![]], [vec![], vec![]]);
    let mut last = None;
    while !script.0.is_empty() {
        let device = usize::from(script.byte()) % DEVICES;
        let mut messages = Vec::new();
        match script.byte() % 8 {
            0 | 1 => {
                let count = usize::from(script.byte());
                let state = script.bytes(count);
                if let Ok(chunks) = giver.chunk(device, state.clone()) {
                    messages.extend(chunks);
                    sent[device].extend_from_slice(&state);
                }
            }
            2 => messages.extend(giver.seal(device, None).ok().map(|(message, _)| message)),
            3 => messages.extend(last.clone()),
            4 => {
                let count = usize::from(script.byte());
                messages.extend(v1::StreamMessage::decode(script.bytes(count)).ok());
            }
            5 => drop(taker.resume()),
            6 => messages.extend(giver.abort("enough")),
            _ => {
                let phase = domain::Phase::PreCopy;
                let progress = domain::Progress { phase, left_bytes: 1, predicted_downtime: None };
                messages.extend(giver.progress(progress).ok());
            }
        }
        last = messages.last().cloned().or(last);
        let way = script.byte();
        for mut message in messages {
            match way % 16 {
                0 => changed(&mut message, &mut script),
                1 => continue,
                _ => {}
            }
            let Ok(took) = taker.receive(message) else { continue };
            match took.event {
                TakerEvent::Frame(Accepted::Chunk { device, chunk }) => {
                    got[device].extend_from_slice(chunk.bytes());
                }
                TakerEvent::Frame(Accepted::Sealed { device, seal, .. }) => {
                    let length = seal.seal().bytes;
                    assert_eq!(u64::try_from(got[device].len()), Ok(length), "device {device}");
                }
                TakerEvent::Frame(Accepted::Progress(_))
                | TakerEvent::Aborted { .. }
                | TakerEvent::Ignored => {}
            }
            if let Some(reply) = took.reply {
                // It may be about frames that this giver never sent.
                let _ = giver.receive(reply);
            }
        }
    }
    if taker.phase() == Phase::Taken {
        assert_eq!(sent, got, "all is taken, and is not what was given");
    }
}

/// Decodes as one kind of request and validates it.
fn request<W, S>(bytes: &[u8])
where
    W: prost::Message + Default,
    S: TryFrom<W, Error = Invalid>,
{
    let Ok(wire) = W::decode(bytes) else { return };
    if let Err(invalid) = S::try_from(wire) {
        assert!(!invalid.problem.is_empty(), "{invalid}");
        assert!(invalid.field.len() < 400 && invalid.problem.len() < 800, "{invalid}");
    }
}

/// The first byte says which.
pub(crate) fn requests(input: &[u8]) {
    use domain as to;
    const KINDS: [Target; 18] = [
        request::<v1::StartSaveRequest, to::SaveRequestSpec>,
        request::<v1::RestoreRequest, to::RestoreSpec>,
        request::<v1::AdmitRequest, to::AdmitSpec>,
        request::<v1::MigrateRequest, to::MigrateSpec>,
        request::<v1::PrepareRequest, to::PrepareSpec>,
        request::<v1::CommitHandoverRequest, to::CommitHandoverSpec>,
        request::<v1::ResolveRequest, to::ResolveSpec>,
        request::<v1::ListDevicesRequest, to::Page>,
        request::<v1::ListOperationsRequest, to::OperationQuery>,
        request::<v1::ListCheckpointsRequest, to::CheckpointQuery>,
        request::<v1::WatchDevicesRequest, to::WatchSpec>,
        request::<v1::WaitOperationRequest, to::WaitSpec>,
        request::<v1::ResetDeviceRequest, to::ResetSpec>,
        request::<v1::StartDirtyTrackingRequest, to::DirtyTrackingSpec>,
        request::<v1::ReportDirtyPagesRequest, to::DirtyReportSpec>,
        request::<v1::StreamOpen, to::StreamOpen>,
        request::<v1::StreamOpened, to::StreamOpened>,
        request::<v1::CheckpointManifest, to::Manifest>,
    ];
    if let Some((&which, bytes)) = input.split_first() {
        KINDS[usize::from(which) % KINDS.len()](bytes);
    }
}
