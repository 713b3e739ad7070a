//! What is in the way of a save or a restore is told, all of it, before anything is touched.

use tonic::Code;
use vfio_checkpoint_device::sim::{SimConfig, SizeReport};
use vfio_checkpoint_fsm::State;
use vfio_checkpoint_proto::v1;

use crate::flow::{
    Bench, device, done, millis, refused, refused_field, restore_into, save, save_of, start_restore,
    start_save, take, violations,
};
use crate::lab::{Lab, start};

/// Reason and device of each, in short.
fn told(blockers: &[v1::Blocker]) -> Vec<(&'static str, &str)> {
    blockers
        .iter()
        .map(|blocker| {
            assert!(!blocker.message.is_empty(), "each says what to do: {blocker:?}");
            let reason = blocker.reason().as_str_name();
            (reason.strip_prefix("BLOCKER_REASON_").unwrap(), blocker.device.as_str())
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_blocker_of_a_save_is_told_at_once() {
    let lab = Lab::new();
    let sizeless = Bench::new(SimConfig {
        memory_bytes: 1 << 20,
        data_size: SizeReport::Unknown,
        dma: vfio_checkpoint_device::sim::SimDma { log: None, ..Default::default() },
        ..SimConfig::default()
    });
    let nowhere = format!("vfio-user:{}", lab.path("nobody.sock").display());
    let mut config = lab.config(
        "a",
        &[
            ("alone", "sim:seed=1,memory=1MiB,p2p=no,pre_copy=no"),
            ("busy", "sim:seed=2,memory=1MiB"),
            ("stopped", "sim:seed=3,memory=1MiB"),
            ("large", "sim:seed=4,memory=9MiB"),
            ("sizeless", sizeless.address.as_str()),
            ("gone", &nowhere),
        ],
    );
    config.limits.max_device_bytes = 8 << 20;
    let agent = start(config).await;
    let saver = lab.client(&agent, "saver").await;
    let mut stop = save_of(&["stopped"]);
    stop.after = v1::AfterSave::StayStopped.into();
    let operation = start_save(&saver, stop).await;
    take(&saver, &operation).await;
    done(&saver, &operation).await;
    start_save(&saver, save_of(&["busy"])).await;

    let mut all = save_of(&["alone", "busy", "stopped", "large", "sizeless", "gone", "missing"]);
    all.pre_copy = v1::PreCopyMode::Required.into();
    all.memory_capture = v1::MemoryCapture::PostCopy.into();
    all.viommu = true;
    all.forbid_all_dirty = true;
    all.max_bytes = 1 << 20;
    all.validate_only = true;
    all.downtime_limit = millis(1);
    let answer = saver.start_save(all.clone()).await.unwrap();
    assert!(answer.operation.is_none());
    let expected = [
        ("LEASED", "devices/busy"),
        ("NOT_RUNNING", "devices/stopped"),
        ("OUT_OF_SERVICE", "devices/gone"),
        ("NO_P2P", "devices/alone"),
        ("NO_PRE_COPY", "devices/alone"),
        ("MEMORY_CAPTURE", ""),
        ("VIOMMU", ""),
        ("NO_DIRTY_TRACKING", "devices/sizeless"),
        ("TOO_LARGE", "devices/large"),
        ("SIZE_UNKNOWN", "devices/sizeless"),
        ("SIZE_UNKNOWN", ""),
        ("DEVICE_NOT_FOUND", "devices/missing"),
    ];
    assert_eq!(told(&answer.blockers), expected);
    assert_eq!(sizeless.device.state(), State::Running);

    // Said for real it is refused, with the same in its details.
    all.validate_only = false;
    let refusal = refused(saver.start_save(all).await, Code::FailedPrecondition, "BLOCKED");
    let said: Vec<_> = violations(&refusal);
    let expected: Vec<_> = expected
        .iter()
        .map(|(reason, device)| (format!("BLOCKER_REASON_{reason}"), (*device).to_owned()))
        .collect();
    assert_eq!(said, expected);
    for name in ["alone", "large", "sizeless", "gone"] {
        assert_eq!(device(&saver, name).await.operation, "", "{name} is not left leased");
    }

    // What passes by itself is UNAVAILABLE.
    refused(saver.start_save(save_of(&["busy"])).await, Code::Unavailable, "BLOCKED");
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_meet_sizes_and_predictions() {
    let lab = Lab::new();
    let sizeless = Bench::new(SimConfig {
        memory_bytes: 1 << 20,
        data_size: SizeReport::Unknown,
        ..SimConfig::default()
    });
    let mut config =
        lab.config("a", &[("nic0", "sim:seed=1,memory=4MiB"), ("sizeless", sizeless.address.as_str())]);
    config.defaults.rate_bytes_per_second = 1 << 20;
    let agent = start(config).await;
    let saver = lab.client(&agent, "saver").await;
    let mut request = save_of(&["nic0"]);
    request.validate_only = true;

    let answer = saver.start_save(request.clone()).await.unwrap();
    let prediction = answer.prediction.unwrap();
    assert!(prediction.pre_copy && prediction.downtime.is_none(), "pre-copy decides that: {prediction:?}");
    assert_eq!((prediction.rate_bytes_per_second, prediction.rate_source.as_str()), (1 << 20, "configured"));

    request.pre_copy = v1::PreCopyMode::Never.into();
    let answer = saver.start_save(request.clone()).await.unwrap();
    let prediction = answer.prediction.unwrap();
    let total = prediction.total.unwrap();
    assert_eq!(total.kind(), v1::DataSizeKind::Known);
    let seconds = prediction.downtime.unwrap().seconds;
    assert_eq!(seconds, 4, "a little over 4 MiB at 1 MiB a second: {total:?}");
    assert!(answer.blockers.is_empty());

    request.downtime_limit = millis(1000);
    let answer = saver.start_save(request.clone()).await.unwrap();
    assert_eq!(told(&answer.blockers), [("DOWNTIME_LIMIT", "")]);
    request.downtime_limit = millis(10_000);
    request.max_bytes = total.bytes - 1;
    let answer = saver.start_save(request.clone()).await.unwrap();
    assert_eq!(told(&answer.blockers), [("TOO_LARGE", "")]);
    request.max_bytes = total.bytes;
    assert!(saver.start_save(request.clone()).await.unwrap().blockers.is_empty());

    let mut unknown = v1::StartSaveRequest { devices: vec!["devices/sizeless".to_owned()], ..request };
    let answer = saver.start_save(unknown.clone()).await.unwrap();
    assert_eq!(answer.prediction.unwrap().total.unwrap().kind(), v1::DataSizeKind::Unknown);
    assert_eq!(told(&answer.blockers), [("SIZE_UNKNOWN", "devices/sizeless"), ("SIZE_UNKNOWN", "")]);
    unknown.allow_unknown_size = true;
    assert!(saver.start_save(unknown.clone()).await.unwrap().blockers.is_empty());
    unknown.validate_only = false;
    let operation = start_save(&saver, unknown).await;
    take(&saver, &operation).await;
    assert_eq!(done(&saver, &operation).await.result(), v1::OperationResult::Succeeded);
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_is_not_there_does_not_shift_the_others() {
    let lab = Lab::new();
    let agent = start(lab.config(
        "a",
        &[
            ("old", "sim:seed=1,memory=1MiB,firmware=old"),
            ("new", "sim:seed=2,memory=1MiB,firmware=new"),
            ("alone", "sim:seed=3,memory=1MiB,p2p=no"),
        ],
    ))
    .await;
    let saver = lab.client(&agent, "saver").await;
    let restorer = lab.client(&agent, "restorer").await;
    let saved = save(&saver, &["old", "new"]).await;
    let mut request = restore_into(&["missing", "new"], &saved);
    request.validate_only = true;
    let answer = restorer.restore(request).await.unwrap();
    assert_eq!(told(&answer.blockers), [("DEVICE_NOT_FOUND", "devices/missing")]);

    let mut request = restore_into(&["new", "alone"], &saved);
    request.validate_only = true;
    request.max_bytes = 1;
    let answer = restorer.restore(request.clone()).await.unwrap();
    assert!(answer.operation.is_none());
    let expected = [
        ("NO_P2P", "devices/alone"),
        ("FINGERPRINT_MISMATCH", "devices/new"),
        ("FINGERPRINT_MISMATCH", "devices/alone"),
        ("TOO_LARGE", ""),
    ];
    assert_eq!(told(&answer.blockers), expected);
    assert!(answer.blockers[1].message.contains("firmware"), "{answer:?}");
    request.validate_only = false;
    refused(restorer.restore(request).await, Code::FailedPrecondition, "BLOCKED");

    // A device takes its own state back.
    let operation = start_restore(&restorer, restore_into(&["old", "new"], &saved)).await;
    let refusal =
        refused(restorer.restore(restore_into(&["old", "new"], &saved)).await, Code::Unavailable, "BLOCKED");
    let reasons: Vec<_> = violations(&refusal).into_iter().map(|(reason, _)| reason).collect();
    assert_eq!(reasons, ["BLOCKER_REASON_LEASED"; 2]);
    restorer.cancel_operation(v1::CancelOperationRequest { name: operation.clone() }).await.unwrap();
    done(&restorer, &operation).await;
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_takes_as_many_operations_as_it_may() {
    let lab = Lab::new();
    let mut config = lab.config("a", &[("n0", "sim:seed=1,memory=1MiB"), ("n1", "sim:seed=2,memory=1MiB")]);
    config.limits.max_operations = 1;
    let agent = start(config).await;
    let saver = lab.client(&agent, "saver").await;
    let first = start_save(&saver, save_of(&["n0"])).await;
    let mut second = save_of(&["n1"]);
    second.validate_only = true;
    let answer = saver.start_save(second.clone()).await.unwrap();
    assert_eq!(told(&answer.blockers), [("AGENT_BUSY", "")]);
    second.validate_only = false;
    let refusal = refused(saver.start_save(second.clone()).await, Code::Unavailable, "BLOCKED");
    assert_eq!(violations(&refusal), [("BLOCKER_REASON_AGENT_BUSY".to_owned(), String::new())]);
    assert_eq!(device(&saver, "n1").await.operation, "", "it is not left leased");
    saver.cancel_operation(v1::CancelOperationRequest { name: first.clone() }).await.unwrap();
    done(&saver, &first).await;
    start_save(&saver, second).await;
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn each_wrong_field_is_named() {
    let lab = Lab::new();
    let agent = start(lab.config("a", &[("n0", "sim:seed=1,memory=1MiB")])).await;
    let saver = lab.client(&agent, "saver").await;
    let restorer = lab.client(&agent, "restorer").await;
    let good = || save_of(&["n0"]);
    let wrong = [
        ("devices", v1::StartSaveRequest { devices: Vec::new(), ..good() }),
        ("devices[0]", save_of(&["no/name"])),
        ("devices[1]", save_of(&["n0", "n0"])),
        ("memory_capture", v1::StartSaveRequest { memory_capture: 0, ..good() }),
        ("memory_capture", v1::StartSaveRequest { memory_capture: 99, ..good() }),
        ("pre_copy", v1::StartSaveRequest { pre_copy: 99, ..good() }),
        ("cutover", v1::StartSaveRequest { cutover: 99, ..good() }),
        ("after", v1::StartSaveRequest { after: 99, ..good() }),
        ("no_convergence", v1::StartSaveRequest { no_convergence: -1, ..good() }),
        ("hold_timeout", v1::StartSaveRequest { hold_timeout: millis(5), ..good() }),
        ("cutover_timeout", v1::StartSaveRequest { cutover_timeout: millis(5), ..good() }),
        ("downtime_limit", v1::StartSaveRequest { downtime_limit: millis(0), ..good() }),
        (
            "pre_copy_budget",
            v1::StartSaveRequest {
                pre_copy: v1::PreCopyMode::Never.into(),
                pre_copy_budget: millis(5),
                ..good()
            },
        ),
        ("request_id", v1::StartSaveRequest { request_id: "mine".to_owned(), ..good() }),
        ("owner_pod", v1::StartSaveRequest { owner_pod: "pod".to_owned(), ..good() }),
    ];
    for (field, request) in wrong {
        refused_field(saver.start_save(request).await, field);
    }
    let saved = save(&saver, &["n0"]).await;
    let good = || restore_into(&["n0"], &saved);
    let mut unversioned = good();
    unversioned.manifest.as_mut().unwrap().format_version = 9;
    let wrong = [
        ("devices", v1::RestoreRequest { devices: vec!["devices/n0".into(), "devices/n1".into()], ..good() }),
        ("manifest", v1::RestoreRequest { manifest: None, ..good() }),
        ("manifest.format_version", unversioned),
        ("after", v1::RestoreRequest { after: 99, ..good() }),
        ("hold_timeout", v1::RestoreRequest { hold_timeout: millis(5), ..good() }),
        ("request_id", v1::RestoreRequest { request_id: "mine".to_owned(), ..good() }),
        ("owner_pod", v1::RestoreRequest { owner_pod: "a/b/c".to_owned(), ..good() }),
    ];
    for (field, request) in wrong {
        refused_field(restorer.restore(request).await, field);
    }
    agent.stop().await.unwrap();
}
