//! What stands in the way of a job, provoked on real devices, and that nothing is touched by finding it.

use tonic::Code;
use vfio_checkpoint_client::call::{CallError, Client};
use vfio_checkpoint_device::kernel::KernelPath::{Container, Iommufd};
use vfio_checkpoint_fsm::Capabilities;
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_proto::v1::BlockerReason;

use super::killed::save;
use super::lab::{Lab, done, save_request};
use super::transfer::{program, registers};
use crate::facts::Facts;
use crate::kmsg::KernelLog;
use crate::save_restore::open;
use crate::variant::Parameters;

/// Expects a call to be refused for exactly these reasons, each about a device or, with none, about the set.
fn refused<T: std::fmt::Debug>(
    answer: Result<T, CallError>,
    code: Code,
    expected: &[(BlockerReason, Option<&str>)],
) {
    let error = answer.expect_err("it is blocked");
    let refusal = error.refusal().unwrap_or_else(|| panic!("{error}"));
    assert_eq!(refusal.code, code, "{error}");
    assert_eq!(refusal.reason.as_deref(), Some("BLOCKED"), "{error}");
    let told: Vec<(&str, &str)> =
        refusal.blockers.iter().map(|told| (told.kind.as_str(), told.subject.as_str())).collect();
    let subjects: Vec<String> = expected
        .iter()
        .map(|(_, device)| device.map_or_else(String::new, |device| format!("devices/{device}")))
        .collect();
    let expected: Vec<(&str, &str)> = expected
        .iter()
        .zip(&subjects)
        .map(|((reason, _), subject)| (reason.as_str_name(), subject.as_str()))
        .collect();
    assert_eq!(told, expected, "{error}");
    assert!(refusal.blockers.iter().all(|told| !told.description.is_empty()), "{error}");
}

/// Devices that are configured and cannot be had are listed, with the reason, and every job on them is refused.
pub(super) fn not_open(facts: &Facts) {
    const GONE: &str = "00000000-0000-4000-8000-00000000dead";
    let in_use = open(&facts.mtty1[3], Container);
    let lab = Lab::new();
    let socket = format!("vfio-user:{}", lab.path("none.sock").display());
    let slots = [
        ("well", facts.mtty1[0].as_str(), None),
        ("e1000e", facts.e1000e.as_str(), None),
        ("nonviable", facts.nonviable.as_str(), None),
        ("gone", GONE, None),
        ("in-use", facts.mtty1[3].as_str(), None),
        ("no-process", socket.as_str(), None),
    ];
    let agent = lab.agent(&slots, "");
    let own = std::process::id().to_string();
    for (name, says) in [
        ("e1000e", "not migratable"),
        ("nonviable", facts.nonviable_peer.as_str()),
        ("gone", GONE),
        ("in-use", own.as_str()),
        ("no-process", "none.sock"),
    ] {
        let listed = lab.succeed(&agent, &["devices", "get", name]);
        assert_eq!(listed["standing"], "UNAVAILABLE", "{listed}");
        let detail = listed["standing_detail"].as_str().expect("a sentence");
        assert!(detail.contains(says), "{name}: {detail}");
        let (code, _, stderr) = lab.control(&agent, &["save", name, "--output", "nowhere"]);
        assert_eq!(code, Some(3), "{stderr}");
        assert!(stderr.contains(says), "{name}: {stderr}");
    }
    lab.with_client(&agent, async |client| {
        for name in ["gone", "in-use", "no-process"] {
            let expected = [(BlockerReason::OutOfService, Some(name))];
            refused(client.start_save(save_request(&[name])).await, Code::FailedPrecondition, &expected);
        }
        // The driver of the second has no migration either, whatever else is in its way.
        for name in ["e1000e", "nonviable"] {
            let expected = [(BlockerReason::NotMigratable, Some(name))];
            refused(client.start_save(save_request(&[name])).await, Code::FailedPrecondition, &expected);
        }
        let expected = [(BlockerReason::DeviceNotFound, Some("nobody"))];
        refused(client.start_save(save_request(&["nobody"])).await, Code::FailedPrecondition, &expected);
        // The others do not keep it from its work.
        save(&client, "well").await;
    });
    agent.stop();
    drop(in_use);
    println!("figures: agent: 5 devices that cannot be had, each with its reason, beside one that works");
}

pub(super) fn each(facts: &Facts) {
    let parameters = Parameters::new();
    // No barrier without P2P, no pre-copy either, and nothing that tracks dirty pages.
    parameters.flags(Capabilities { p2p: false, pre_copy: false }).set("no_dma_log", "1");
    let uuids = [&facts.mtty1[0], &facts.mtty2[0], &facts.mttyv1[0], &facts.mttyv1[1]].map(String::as_str);
    let before = [program(uuids[0], 1, 81), program(uuids[1], 2, 82)];
    let lab = Lab::new();
    let slots = [
        ("one-port", uuids[0], Some(Iommufd)),
        ("two-ports", uuids[1], Some(Container)),
        ("lone-a", uuids[2], Some(Iommufd)),
        ("lone-b", uuids[3], Some(Container)),
    ];
    // At a byte a second a minute's downtime is known beforehand.
    let agent = lab.agent(&slots, "defaults.rate_bytes_per_second = 1\n");
    let mut log = KernelLog::new();
    lab.with_client(&agent, async |client| {
        one_by_one(&client, &parameters).await;
        all_dirty(&client).await;
        all_at_once(&client).await;
        assert_eq!(log.hops_of_all(&uuids), [], "no device was touched");
        leased(&client).await;
        assert_eq!(log.hops_of_all(&uuids), [], "not by an operation that never began either");
        let taken = save(&client, "one-port").await;
        log.hops_of_all(&uuids);
        let request = |device: &str| v1::RestoreRequest {
            devices: vec![format!("devices/{device}")],
            manifest: Some(taken.manifest.clone().into()),
            allow_fork: true,
            ..v1::RestoreRequest::default()
        };
        let mismatch = [(BlockerReason::FingerprintMismatch, Some("two-ports"))];
        refused(client.restore(request("two-ports")).await, Code::FailedPrecondition, &mismatch);
        // It runs on, where it was saved.
        let fork = v1::RestoreRequest { allow_fork: false, ..request("two-ports") };
        let expected = [mismatch[0], (BlockerReason::SourceStillRunning, Some("two-ports"))];
        refused(client.restore(fork).await, Code::FailedPrecondition, &expected);
        let too_large = v1::RestoreRequest { max_bytes: 59, ..request("one-port") };
        let expected = [(BlockerReason::TooLarge, None)];
        refused(client.restore(too_large).await, Code::FailedPrecondition, &expected);
        assert_eq!(log.hops_of_all(&uuids), [], "no device was touched");
        not_running(&client).await;
    });
    agent.stop();
    assert_eq!([registers(uuids[0], 1), registers(uuids[1], 2)], before);
    println!("figures: agent: 14 kinds of blockers provoked on real devices, none of which was touched");
}

async fn one_by_one(client: &Client, parameters: &Parameters) {
    use BlockerReason::{DowntimeLimit, MemoryCapture, NoP2p, NoPreCopy, SizeUnknown, TooLarge, Viommu};
    let limit = Some(prost_types::Duration { seconds: 0, nanos: 300_000_000 });
    let one = || save_request(&["one-port"]);
    let cases = [
        (save_request(&["lone-a", "lone-b"]), vec![(NoP2p, Some("lone-a")), (NoP2p, Some("lone-b"))]),
        (
            v1::StartSaveRequest { pre_copy: v1::PreCopyMode::Required.into(), ..save_request(&["lone-a"]) },
            vec![(NoPreCopy, Some("lone-a"))],
        ),
        (v1::StartSaveRequest { max_bytes: 59, ..one() }, vec![(TooLarge, None)]),
        (v1::StartSaveRequest { downtime_limit: limit, ..one() }, vec![(DowntimeLimit, None)]),
        (
            v1::StartSaveRequest { memory_capture: v1::MemoryCapture::PostCopy.into(), ..one() },
            vec![(MemoryCapture, None)],
        ),
        (v1::StartSaveRequest { viommu: true, ..one() }, vec![(Viommu, None)]),
    ];
    for (request, expected) in cases {
        refused(client.start_save(request).await, Code::FailedPrecondition, &expected);
    }
    // What a device does not say meets no limit, unless the caller allows it.
    parameters.set("no_data_size", "1");
    let lone = || v1::StartSaveRequest { max_bytes: 1 << 20, ..save_request(&["lone-a"]) };
    let expected = [(SizeUnknown, Some("lone-a"))];
    refused(client.start_save(lone()).await, Code::FailedPrecondition, &expected);
    let limited = v1::StartSaveRequest { downtime_limit: limit, ..save_request(&["lone-a"]) };
    refused(client.start_save(limited).await, Code::FailedPrecondition, &[(SizeUnknown, None)]);
    let allowed = v1::StartSaveRequest { allow_unknown_size: true, validate_only: true, ..lone() };
    let answer = client.start_save(allowed).await.expect("an answer");
    assert_eq!(answer.blockers, [], "allowed");
    let total = answer.prediction.and_then(|prediction| prediction.total).expect("a total");
    assert_eq!(total.kind(), v1::DataSizeKind::Unknown);
    parameters.set("no_data_size", "0");
}

/// That every page counts as dirty is said of the device, and in the way only of a caller that forbids it.
async fn all_dirty(client: &Client) {
    for (device, source) in [("one-port", v1::DirtySource::DeviceLog), ("lone-a", v1::DirtySource::AllDirty)]
    {
        let name = format!("devices/{device}");
        let answer = client.get_device(v1::GetDeviceRequest { name }).await.expect("an answer");
        assert_eq!(answer.device.expect("a device").dirty_source(), source, "{device}");
    }
    let forbidding =
        |device: &str| v1::StartSaveRequest { forbid_all_dirty: true, ..save_request(&[device]) };
    let expected = [(BlockerReason::NoDirtyTracking, Some("lone-a"))];
    refused(client.start_save(forbidding("lone-a")).await, Code::FailedPrecondition, &expected);
    for request in [forbidding("one-port"), save_request(&["lone-a"])] {
        let answer = client.start_save(v1::StartSaveRequest { validate_only: true, ..request }).await;
        assert_eq!(answer.expect("an answer").blockers, []);
    }
}

/// `validate_only` tells everything, not the first thing.
async fn all_at_once(client: &Client) {
    let request = v1::StartSaveRequest {
        max_bytes: 10,
        viommu: true,
        pre_copy: v1::PreCopyMode::Required.into(),
        memory_capture: v1::MemoryCapture::BackgroundSnapshot.into(),
        validate_only: true,
        ..save_request(&["two-ports", "lone-b"])
    };
    let answer = client.start_save(request).await.expect("an answer");
    assert!(answer.operation.is_none());
    let told: Vec<(BlockerReason, &str)> =
        answer.blockers.iter().map(|blocker| (blocker.reason(), blocker.device.as_str())).collect();
    let expected = [
        (BlockerReason::NoP2p, "devices/lone-b"),
        (BlockerReason::NoPreCopy, "devices/lone-b"),
        (BlockerReason::MemoryCapture, ""),
        (BlockerReason::Viommu, ""),
        (BlockerReason::TooLarge, ""),
    ];
    assert_eq!(told, expected, "{:?}", answer.blockers);
}

/// A device that another operation has may be free in a while: the call is to be tried again, as it says.
async fn leased(client: &Client) {
    let first = client.start_save(save_request(&["one-port"])).await.expect("a save");
    let name = first.operation.expect("an operation").name;
    let expected = [(BlockerReason::Leased, Some("one-port"))];
    refused(client.start_save(save_request(&["one-port"])).await, Code::Unavailable, &expected);
    let cancel = v1::CancelOperationRequest { name: name.clone() };
    client.cancel_operation(cancel).await.expect("it can be cancelled");
    assert_eq!(done(client, &name).await.result(), v1::OperationResult::Cancelled);
}

/// A device that a save left stopped on request, until somebody lets it run.
async fn not_running(client: &Client) {
    let left = super::killed::save_as(
        client,
        v1::StartSaveRequest { after: v1::AfterSave::StayStopped.into(), ..save_request(&["one-port"]) },
    );
    left.await;
    let expected = [(BlockerReason::NotRunning, Some("one-port"))];
    refused(client.start_save(save_request(&["one-port"])).await, Code::FailedPrecondition, &expected);
    let reset = v1::ResetDeviceRequest {
        name: "devices/one-port".to_owned(),
        mode: v1::ResetMode::KeepState.into(),
        ..v1::ResetDeviceRequest::default()
    };
    let answer = client.reset_device(reset).await.expect("it runs again");
    assert!(!answer.state_lost);
    assert_eq!(answer.device.expect("a device").state(), v1::MigrationState::Running);
}
