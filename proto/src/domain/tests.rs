//! Each rule of each message: a good one, and for each field what is refused, under its own path.

use std::collections::BTreeMap;
use std::time::UNIX_EPOCH;

use bytes::Bytes;
use vfio_checkpoint_seal::Seal;

use super::*;
use crate::ids::{Epoch, StreamId};
use crate::{MAX_CHUNK_BYTES, MAX_MANIFEST_BYTES, MIN_CHUNK_BYTES, v1};

mod migration;

const ID: &str = "00112233445566778899aabbccddeeff";
const UUID: &str = "1b4e28ba-2fa1-41d2-883f-0016d3cca427";

#[allow(clippy::unnecessary_wraps, reason = "as the fields of messages are")]
fn seconds(seconds: i64) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds, nanos: 0 })
}

fn save() -> v1::StartSaveRequest {
    v1::StartSaveRequest {
        devices: vec!["devices/a".into(), "devices/b".into()],
        memory_capture: v1::MemoryCapture::None.into(),
        ..Default::default()
    }
}

fn device(id: u8) -> v1::DeviceManifest {
    v1::DeviceManifest {
        source_device: "devices/a".into(),
        source_address: "0000:03:00.1".into(),
        backend: v1::Backend::Kernel.into(),
        driver: "mtty".into(),
        fingerprint: Some(v1::Fingerprint { facts: BTreeMap::from([("driver".into(), "mtty".into())]) }),
        logical_device: Some(v1::LogicalDevice { id: format!("{id:032x}"), epoch: 3 }),
        data_size: Some(v1::DataSize { kind: v1::DataSizeKind::Known.into(), bytes: 60 }),
    }
}

fn manifest() -> v1::CheckpointManifest {
    v1::CheckpointManifest {
        format_version: 1,
        operation: "operations/o".into(),
        create_time: Some(prost_types::Timestamp { seconds: 1, nanos: 2 }),
        devices: vec![device(1), device(2)],
        source_disposition: v1::SourceDisposition::StaysStopped.into(),
    }
}

fn restore() -> v1::RestoreRequest {
    v1::RestoreRequest {
        devices: vec!["devices/a".into(), "devices/b".into()],
        manifest: Some(manifest()),
        ..Default::default()
    }
}

fn open() -> v1::StreamOpen {
    v1::StreamOpen {
        operation: "operations/o".into(),
        role: v1::StreamRole::Taker.into(),
        min_version: 1,
        max_version: 2,
        max_chunk_bytes: 0,
        resume_stream_id: 0,
    }
}

fn opened() -> v1::StreamOpened {
    let limits = v1::StreamLimits {
        max_chunk_bytes: MIN_CHUNK_BYTES,
        max_device_bytes: 1,
        idle_timeout: seconds(1),
        lifetime: seconds(604_800),
        ack_interval_bytes: 1,
        ack_delay: Some(prost_types::Duration { seconds: 0, nanos: 5_000_000 }),
    };
    v1::StreamOpened {
        version: 1,
        stream_id: u64::MAX,
        manifest: Some(manifest()),
        limits: Some(limits),
        next_sequence: 0,
    }
}

/// The path that a refusal names, and the change that brings it about.
type Case<W> = (&'static str, fn(&mut W));

/// Makes one change to a good message at a time, and expects the path that its refusal names.
fn refusals<W: Clone, D: TryFrom<W, Error = Invalid> + std::fmt::Debug>(good: &W, cases: &[Case<W>]) {
    D::try_from(good.clone()).unwrap();
    for (path, change) in cases {
        let mut wire = good.clone();
        change(&mut wire);
        let invalid = D::try_from(wire).unwrap_err();
        assert_eq!(invalid.field, *path, "{invalid}");
        assert!(invalid.problem.len() > 5 && invalid.problem.len() < 500, "{invalid}");
    }
}

#[test]
fn saves_that_are_refused_name_the_field() {
    refusals::<_, SaveRequestSpec>(
        &save(),
        &[
            ("devices", |m| m.devices.clear()),
            ("devices", |m| m.devices = (0..65).map(|n| format!("devices/{n}")).collect()),
            ("devices[1]", |m| m.devices[1] = "b".into()),
            ("devices[2]", |m| m.devices.push("devices/a".into())),
            ("pre_copy", |m| m.pre_copy = 3),
            ("cutover", |m| m.cutover = -1),
            ("after", |m| m.after = 4),
            ("no_convergence", |m| m.no_convergence = i32::MAX),
            ("memory_capture", |m| m.memory_capture = 0),
            ("memory_capture", |m| m.memory_capture = 6),
            ("downtime_limit", |m| m.downtime_limit = seconds(0)),
            ("downtime_limit", |m| m.downtime_limit = seconds(-1)),
            ("downtime_limit", |m| m.downtime_limit = seconds(i64::MAX)),
            ("downtime_limit", |m| m.downtime_limit = Some(prost_types::Duration { seconds: 1, nanos: -1 })),
            ("downtime_limit", |m| {
                m.downtime_limit = Some(prost_types::Duration { seconds: 0, nanos: 1_000_000_000 });
            }),
            ("downtime_limit", |m| {
                m.downtime_limit = Some(prost_types::Duration { seconds: 86_400, nanos: 1 });
            }),
            ("pre_copy_budget", |m| m.pre_copy_budget = seconds(86_401)),
            ("pre_copy_budget", |m| {
                m.pre_copy_budget = seconds(1);
                m.pre_copy = v1::PreCopyMode::Never.into();
            }),
            ("cutover_timeout", |m| m.cutover_timeout = seconds(1)),
            ("hold_timeout", |m| m.hold_timeout = seconds(1)),
            ("hold_timeout", |m| {
                m.hold_timeout = seconds(1);
                m.after = v1::AfterSave::StayStopped.into();
            }),
            ("request_id", |m| m.request_id = "mine".into()),
            ("owner_pod", |m| m.owner_pod = "pod".into()),
        ],
    );
}

#[test]
fn unspecified_takes_the_documented_default() {
    let spec = SaveRequestSpec::try_from(save()).unwrap();
    assert_eq!(
        (spec.pre_copy, spec.cutover, spec.after, spec.no_convergence, spec.max_bytes, spec.downtime_limit),
        (
            PreCopy::IfAble { budget: None },
            Cutover::Auto,
            AfterSave::Resume,
            NoConvergence::StopAnyway,
            None,
            None
        )
    );
    assert_eq!((spec.request_id, spec.owner_pod), (None, None));
    assert_eq!(RestoreSpec::try_from(restore()).unwrap().after, AfterRestore::Run);
    let not_said = v1::CheckpointManifest { source_disposition: 0, ..manifest() };
    assert_eq!(Manifest::try_from(not_said).unwrap().source_disposition, SourceDisposition::RunsOn);
    assert_eq!(DataSize::try_from(v1::DataSize::default()).unwrap(), DataSize::Unknown);
}

#[test]
fn what_a_save_asks_for_arrives() {
    let wire = v1::StartSaveRequest {
        pre_copy: v1::PreCopyMode::Required.into(),
        pre_copy_budget: seconds(86_400),
        cutover: v1::CutoverMode::Manual.into(),
        cutover_timeout: seconds(5),
        after: v1::AfterSave::Hold.into(),
        hold_timeout: seconds(6),
        downtime_limit: Some(prost_types::Duration { seconds: 0, nanos: 300_000_000 }),
        no_convergence: v1::NoConvergence::Abort.into(),
        max_bytes: 9,
        memory_capture: v1::MemoryCapture::PostCopy.into(),
        request_id: UUID.to_uppercase(),
        owner_pod: "n/p".into(),
        ..save()
    };
    let spec = SaveRequestSpec::try_from(wire).unwrap();
    assert_eq!(spec.pre_copy, PreCopy::Required { budget: Some(MAX_DURATION) });
    assert_eq!(spec.cutover, Cutover::Manual { timeout: Some(Duration::from_secs(5)) });
    assert_eq!(spec.after, AfterSave::Hold { timeout: Some(Duration::from_secs(6)) });
    assert_eq!(spec.downtime_limit, Some(Duration::from_millis(300)));
    assert_eq!((spec.no_convergence, spec.max_bytes), (NoConvergence::Abort, Some(9)));
    assert_eq!(spec.memory_capture, MemoryCapture::PostCopy);
    assert_eq!(spec.request_id.unwrap().as_str(), UUID);
    assert_eq!(spec.owner_pod.unwrap().namespace(), "n");
}

#[test]
fn restores_and_manifests_that_are_refused_name_the_field() {
    refusals::<_, RestoreSpec>(
        &restore(),
        &[
            ("devices", |m| drop(m.devices.pop())),
            ("devices[1]", |m| m.devices[1] = "devices/a".into()),
            ("manifest", |m| m.manifest = None),
            ("manifest.format_version", |m| m.manifest.as_mut().unwrap().format_version = 2),
            ("manifest.operation", |m| m.manifest.as_mut().unwrap().operation = "x".into()),
            ("manifest.devices[1].driver", |m| m.manifest.as_mut().unwrap().devices[1].driver.clear()),
            ("after", |m| m.after = 3),
            ("hold_timeout", |m| m.hold_timeout = seconds(1)),
            ("request_id", |m| m.request_id = "x".into()),
            ("owner_pod", |m| m.owner_pod = "x".into()),
        ],
    );
    refusals::<_, Manifest>(
        &manifest(),
        &[
            ("format_version", |m| m.format_version = 0),
            ("create_time", |m| m.create_time = None),
            ("create_time", |m| m.create_time = Some(prost_types::Timestamp { seconds: -1, nanos: 0 })),
            ("create_time", |m| m.create_time = Some(prost_types::Timestamp { seconds: i64::MAX, nanos: 0 })),
            ("create_time", |m| {
                m.create_time = Some(prost_types::Timestamp { seconds: 1, nanos: 1_000_000_000 });
            }),
            ("devices", |m| m.devices.clear()),
            ("devices", |m| m.devices = vec![v1::DeviceManifest::default(); 65]),
            ("devices", |m| {
                let facts = (0..64).map(|n| (format!("{n}"), "v".repeat(1024))).collect();
                m.devices = (0..8).map(device).collect();
                for device in &mut m.devices {
                    device.fingerprint = Some(v1::Fingerprint { facts: BTreeMap::clone(&facts) });
                }
                assert!(prost::Message::encoded_len(m) > MAX_MANIFEST_BYTES);
            }),
            ("source_disposition", |m| m.source_disposition = 3),
            ("devices[1].logical_device.id", |m| m.devices[1] = device(1)),
            ("devices[0].logical_device.id", |m| m.devices[0].logical_device.as_mut().unwrap().id.clear()),
        ],
    );
    refusals::<_, DeviceManifest>(
        &device(1),
        &[
            ("source_device", |m| m.source_device.clear()),
            ("source_address", |m| m.source_address = "x".repeat(1025)),
            ("source_address", |m| m.source_address = "a\u{1b}[2J".into()),
            ("backend", |m| m.backend = 0),
            ("backend", |m| m.backend = 4),
            ("driver", |m| m.driver = "x".repeat(65)),
            ("driver", |m| m.driver = "a\0".into()),
            ("fingerprint", |m| m.fingerprint = None),
            ("logical_device", |m| m.logical_device = None),
            ("logical_device.id", |m| m.logical_device.as_mut().unwrap().id = "0".repeat(31)),
            ("data_size.kind", |m| m.data_size.as_mut().unwrap().kind = 4),
            ("data_size.bytes", |m| m.data_size.as_mut().unwrap().kind = v1::DataSizeKind::Unknown.into()),
        ],
    );
}

#[test]
fn fingerprints_are_bounded() {
    let facts = |count: usize, name: usize, value: usize| -> BTreeMap<String, String> {
        (0..count).map(|n| (format!("{n:0name$}"), "v".repeat(value))).collect()
    };
    assert!(Fingerprint::try_from(facts(64, 64, 1024)).is_ok());
    for bad in [facts(65, 2, 1), facts(1, 65, 1), facts(1, 1, 1025), [(String::new(), "v".into())].into()] {
        assert!(Fingerprint::try_from(bad).unwrap_err().field.starts_with("facts"));
    }
    let hostile = BTreeMap::from([("driver".to_owned(), "a\nb".to_owned())]);
    assert_eq!(Fingerprint::try_from(hostile).unwrap_err().field, "facts[\"driver\"]");
}

#[test]
fn streams_that_are_refused_name_the_field() {
    refusals::<_, StreamOpen>(
        &open(),
        &[
            ("operation", |m| m.operation.clear()),
            ("role", |m| m.role = 0),
            ("role", |m| m.role = 3),
            ("min_version", |m| m.min_version = 0),
            ("min_version", |m| m.min_version = 3),
            ("max_chunk_bytes", |m| m.max_chunk_bytes = MIN_CHUNK_BYTES - 1),
            ("resume_stream_id", |m| m.resume_stream_id = 7),
            ("resume_stream_id", |m| {
                m.role = v1::StreamRole::Giver.into();
                m.max_version = 1;
                m.resume_stream_id = 7;
            }),
        ],
    );
    refusals::<_, StreamOpened>(
        &opened(),
        &[
            ("version", |m| m.version = 0),
            ("manifest", |m| m.manifest = None),
            ("manifest.devices", |m| m.manifest.as_mut().unwrap().devices.clear()),
            ("limits", |m| m.limits = None),
            ("limits.max_chunk_bytes", |m| m.limits.as_mut().unwrap().max_chunk_bytes = MIN_CHUNK_BYTES - 1),
            ("limits.max_chunk_bytes", |m| m.limits.as_mut().unwrap().max_chunk_bytes = MAX_CHUNK_BYTES + 1),
            ("limits.max_device_bytes", |m| m.limits.as_mut().unwrap().max_device_bytes = 0),
            ("limits.idle_timeout", |m| m.limits.as_mut().unwrap().idle_timeout = None),
            ("limits.idle_timeout", |m| m.limits.as_mut().unwrap().idle_timeout = seconds(86_401)),
            ("limits.lifetime", |m| m.limits.as_mut().unwrap().lifetime = seconds(604_801)),
            ("limits.ack_interval_bytes", |m| m.limits.as_mut().unwrap().ack_interval_bytes = 0),
            ("limits.ack_delay", |m| m.limits.as_mut().unwrap().ack_delay = seconds(61)),
        ],
    );
    let giver = v1::StreamOpen { role: v1::StreamRole::Giver.into(), resume_stream_id: 7, ..open() };
    assert_eq!(StreamOpen::try_from(giver.clone()).unwrap().resume, Some(StreamId(7)));
    assert_eq!(v1::StreamOpen::from(StreamOpen::try_from(giver.clone()).unwrap()), giver);
    let most = v1::StreamOpen { max_chunk_bytes: u32::MAX, ..open() };
    assert_eq!(StreamOpen::try_from(most).unwrap().max_chunk_bytes, Some(u32::MAX));
}

#[test]
fn captures_and_seals() {
    let capture = v1::ConfigSpaceCapture { command: 0xffff, interrupt_kind: 1, interrupt_vectors: 32 };
    refusals::<_, ConfigSpaceCapture>(
        &capture,
        &[
            ("command", |m| m.command = 0x1_0000),
            ("interrupt_kind", |m| m.interrupt_kind = 3),
            ("interrupt_vectors", |m| m.interrupt_vectors = 0),
            ("interrupt_vectors", |m| m.interrupt_vectors = 33),
            ("interrupt_vectors", |m| m.interrupt_kind = 0),
        ],
    );
    assert!(
        ConfigSpaceCapture::try_from(v1::ConfigSpaceCapture {
            interrupt_kind: 2,
            interrupt_vectors: 2048,
            ..capture
        })
        .is_ok()
    );
    let seal = v1::Seal { length_bytes: 3, blake3: Bytes::from(vec![7; 32]) };
    refusals::<_, Seal>(
        &seal,
        &[("blake3", |m| m.blake3.truncate(31)), ("blake3", |m| m.blake3 = Bytes::from(vec![0; 33]))],
    );
    assert_eq!(v1::Seal::from(Seal::try_from(seal.clone()).unwrap()), seal);
}

#[test]
fn queries_that_are_refused_name_the_field() {
    refusals::<v1::ListDevicesRequest, Page>(
        &v1::ListDevicesRequest { page_size: 1000, page_token: "x".repeat(256) },
        &[
            ("page_size", |m| m.page_size = -1),
            ("page_size", |m| m.page_size = 1001),
            ("page_token", |m| m.page_token = "x".repeat(257)),
            ("page_token", |m| m.page_token = "\n".into()),
        ],
    );
    assert_eq!(Page::try_from(v1::ListDevicesRequest::default()).unwrap(), Page { size: 100, token: None });
    refusals::<v1::ListOperationsRequest, OperationQuery>(
        &v1::ListOperationsRequest { device: "devices/a".into(), ..Default::default() },
        &[("page_size", |m| m.page_size = i32::MIN), ("device", |m| m.device = "a".into())],
    );
    refusals::<v1::WatchDevicesRequest, WatchSpec>(
        &v1::WatchDevicesRequest { names: vec!["devices/a".into()] },
        &[
            ("names", |m| m.names = vec![String::new(); 1001]),
            ("names[1]", |m| m.names.push("devices/a".into())),
            ("names[0]", |m| m.names[0].clear()),
        ],
    );
    refusals::<v1::WaitOperationRequest, WaitSpec>(
        &v1::WaitOperationRequest { name: "operations/o".into(), timeout: seconds(3600) },
        &[("name", |m| m.name.clear()), ("timeout", |m| m.timeout = seconds(3601))],
    );
    let reset = v1::ResetDeviceRequest { name: "devices/a".into(), mode: 1, ..Default::default() };
    refusals::<_, ResetSpec>(
        &reset,
        &[
            ("name", |m| m.name = "operations/a".into()),
            ("mode", |m| m.mode = 0),
            ("mode", |m| m.mode = 3),
            ("request_id", |m| m.request_id = "1".into()),
        ],
    );
    assert_eq!(device_name("a").unwrap_err().field, "name");
    assert_eq!(operation_name("operation", "a").unwrap_err().field, "operation");
}

#[test]
fn dirty_ranges() {
    let range = |start, length_bytes| v1::IovaRange { start, length_bytes };
    let track = v1::StartDirtyTrackingRequest {
        name: "devices/a".into(),
        page_bytes: 4096,
        ranges: vec![range(0x2000, 0x1000), range(0, 0x2000), range(u64::MAX, 1)],
    };
    refusals::<_, DirtyTrackingSpec>(
        &track,
        &[
            ("name", |m| m.name.clear()),
            ("page_bytes", |m| m.page_bytes = 0),
            ("page_bytes", |m| m.page_bytes = 4097),
            ("ranges", |m| m.ranges.clear()),
            ("ranges", |m| m.ranges = vec![v1::IovaRange { start: 0, length_bytes: 1 }; 1025]),
            ("ranges", |m| m.ranges[1].length_bytes = 0x2001),
            ("ranges[1].length_bytes", |m| m.ranges[1].length_bytes = 0),
            ("ranges[2].length_bytes", |m| m.ranges[2].length_bytes = 2),
        ],
    );
    let starts: Vec<u64> =
        DirtyTrackingSpec::try_from(track).unwrap().ranges.iter().map(|range| range.start).collect();
    assert_eq!(starts, [0, 0x2000, u64::MAX]);

    let report = v1::ReportDirtyPagesRequest {
        name: "devices/a".into(),
        range: Some(range(0x1000, MAX_REPORT_PAGES * 4096)),
        page_bytes: 4096,
    };
    assert_eq!(DirtyReportSpec::try_from(report.clone()).unwrap().pages(), MAX_REPORT_PAGES);
    refusals::<_, DirtyReportSpec>(
        &report,
        &[
            ("name", |m| m.name.clear()),
            ("range", |m| m.range = None),
            ("range", |m| m.range.as_mut().unwrap().start += 1),
            ("range", |m| m.range.as_mut().unwrap().length_bytes += 1),
            ("range", |m| m.range.as_mut().unwrap().length_bytes += 4096),
            ("range.length_bytes", |m| m.range.as_mut().unwrap().start = u64::MAX - 4095),
            ("page_bytes", |m| m.page_bytes = 3),
        ],
    );
}

#[test]
fn what_the_agent_answers_comes_back_the_same() {
    let wire = manifest();
    let domain = Manifest::try_from(wire.clone()).unwrap();
    assert_eq!(domain.create_time.duration_since(UNIX_EPOCH).unwrap(), Duration::new(1, 2));
    assert_eq!(domain.devices[0].logical_device.epoch, Epoch(3));
    assert_eq!(v1::CheckpointManifest::from(domain), wire);
    let wire = opened();
    let domain = StreamOpened::try_from(wire.clone()).unwrap();
    assert_eq!(domain.stream_id, StreamId(u64::MAX));
    assert_eq!(v1::StreamOpened::from(domain), wire);
    assert_eq!(v1::StreamOpen::from(StreamOpen::try_from(open()).unwrap()), open());
    for size in [DataSize::Known(0), DataSize::UpperBound(7), DataSize::Unknown] {
        assert_eq!(DataSize::try_from(v1::DataSize::from(size)).unwrap(), size);
    }
    for interrupts in [
        None,
        Some(ArmedInterrupts { kind: InterruptKind::Msi, vectors: 1 }),
        Some(ArmedInterrupts { kind: InterruptKind::MsiX, vectors: 2048 }),
    ] {
        let capture = ConfigSpaceCapture { command: 6, interrupts };
        assert_eq!(ConfigSpaceCapture::try_from(v1::ConfigSpaceCapture::from(capture)).unwrap(), capture);
    }
    for (downtime, back) in [(None, None), (Some(1), Some(1000)), (Some(5_000_999), Some(5_000_000))] {
        let nanos = |n: Option<u64>| n.map(Duration::from_nanos);
        let progress = Progress { phase: Phase::Held, left_bytes: 1, predicted_downtime: nanos(downtime) };
        let found = Progress::try_from(v1::StreamProgress::from(progress)).unwrap();
        assert_eq!(found, Progress { predicted_downtime: nanos(back), ..progress });
    }
    assert_eq!(crate::ids::LogicalDeviceId::try_from(ID).unwrap().as_str(), ID);
}

#[test]
fn a_hostile_text_does_not_fill_an_error() {
    let mut wire = save();
    wire.devices[0] = "\u{1b}]0;".repeat(100_000);
    let said = SaveRequestSpec::try_from(wire).unwrap_err().to_string();
    assert!(said.len() < 1000 && !said.contains('\u{1b}'), "{}", said.len());
}
