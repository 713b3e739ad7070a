//! `DeviceService`: what devices there are, how they are, and how they are brought back.

use std::time::Duration;

use tonic::Code;
use vfio_checkpoint_client::transfer::TakeState;
use vfio_checkpoint_device::fault::Fault;
use vfio_checkpoint_device::sim::SimConfig;
use vfio_checkpoint_fsm::State;
use vfio_checkpoint_proto::v1;

use crate::flow::{
    Bench, Line, Node, at_once, device, done, failure, reached, refused, refused_field, request_id, save,
    save_of, soon, start_save, take, violations,
};
use crate::lab::{Lab, start};

fn reset(name: &str, mode: v1::ResetMode) -> v1::ResetDeviceRequest {
    v1::ResetDeviceRequest { name: format!("devices/{name}"), mode: mode.into(), ..Default::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_are_listed_by_name_a_page_at_a_time() {
    let lab = Lab::new();
    let mut config = lab.config(
        "a",
        &[
            ("nic2", "sim:seed=3,memory=1MiB,p2p=no"),
            ("nic0", "sim:seed=1,memory=1MiB"),
            ("nic1", "sim:seed=2,memory=1MiB,pre_copy=no"),
        ],
    );
    config.devices[1].owner_pod = "default/pod".to_owned();
    let agent = start(config).await;
    let viewer = lab.client(&agent, "viewer").await;
    let first = v1::ListDevicesRequest { page_size: 2, ..Default::default() };
    let page = viewer.list_devices(first.clone()).await.unwrap();
    assert_eq!(names(&page), ["devices/nic0", "devices/nic1"]);
    let [nic0, nic1] = page.devices.as_slice() else { panic!("{page:?}") };
    assert_eq!((nic0.backend(), nic0.state()), (v1::Backend::Sim, v1::MigrationState::Running));
    assert_eq!((nic0.standing(), nic0.owner_pod.as_str()), (v1::DeviceStanding::Ready, "default/pod"));
    assert!(nic0.blockers.is_empty() && nic0.state_time.is_some() && nic0.operation.is_empty());
    assert_eq!(nic0.dirty_source(), v1::DirtySource::DeviceLog);
    assert_eq!(nic0.data_size.unwrap().kind(), v1::DataSizeKind::Known);
    assert!(nic0.data_size.unwrap().bytes > 1 << 20, "the memory, and what is around it");
    assert!(nic0.fingerprint.as_ref().unwrap().facts.contains_key("firmware"));
    assert_ne!(nic0.logical_device.as_ref().unwrap().id, nic1.logical_device.as_ref().unwrap().id);
    let (can, cannot) = (nic0.capabilities.unwrap(), nic1.capabilities.unwrap());
    assert!(can.p2p && can.pre_copy && can.data_size && can.dma_log && !cannot.pre_copy);

    let next = v1::ListDevicesRequest { page_token: page.next_page_token, ..first.clone() };
    let page = viewer.list_devices(next).await.unwrap();
    assert_eq!((names(&page).as_slice(), page.next_page_token.as_str()), (["devices/nic2"].as_slice(), ""));

    let wrong = v1::ListDevicesRequest { page_token: "no token!".to_owned(), ..Default::default() };
    let refusal = refused(viewer.list_devices(wrong).await, Code::InvalidArgument, "INVALID_PAGE_TOKEN");
    assert_eq!(refusal.fields[0].field, "page_token");
    let wrong = v1::ListDevicesRequest { page_token: "x".repeat(257), ..Default::default() };
    refused_field(viewer.list_devices(wrong).await, "page_token");
    let wrong = v1::ListDevicesRequest { page_size: 1001, ..Default::default() };
    refused_field(viewer.list_devices(wrong).await, "page_size");

    let get = |name: &str| viewer.get_device(v1::GetDeviceRequest { name: name.to_owned() });
    assert_eq!(get("devices/nic2").await.unwrap().device.unwrap().name, "devices/nic2");
    let refusal = refused(get("devices/nic3").await, Code::NotFound, "DEVICE_NOT_FOUND");
    assert!(refusal.message.contains("devices/nic3"), "{refusal}");
    for name in ["", "nic0", "devices/", "operations/nic0", "devices/a/b", "devices/../x"] {
        refused_field(get(name).await, "name");
    }
    agent.stop().await.unwrap();
}

fn names(page: &v1::ListDevicesResponse) -> Vec<&str> {
    page.devices.iter().map(|device| device.name.as_str()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_tells_every_device_and_then_each_change() {
    let lab = Lab::new();
    let agent =
        start(lab.config("a", &[("nic0", "sim:seed=1,memory=1MiB"), ("nic1", "sim:seed=2,memory=1MiB")]))
            .await;
    let saver = lab.client(&agent, "saver").await;
    let mut all = saver.watch_devices(v1::WatchDevicesRequest::default()).await.unwrap();
    let mut told = Vec::new();
    for _ in 0..2 {
        told.push(soon(all.next()).await.unwrap().unwrap().device.unwrap().name);
    }
    assert_eq!(told, ["devices/nic0", "devices/nic1"]);
    let only = v1::WatchDevicesRequest { names: vec!["devices/nic1".to_owned()] };
    let mut one = saver.watch_devices(only).await.unwrap();

    let operation = start_save(&saver, save_of(&["nic1"])).await;
    let mut before = 0;
    for watch in [&mut all, &mut one] {
        loop {
            let device = soon(watch.next()).await.unwrap().unwrap().device.unwrap();
            assert!(device.name == "devices/nic1" || before == 0, "the second watch is of one device");
            if device.operation == operation {
                assert_eq!(device.blockers[0].reason(), v1::BlockerReason::Leased);
                before = device.revision;
                break;
            }
        }
    }
    take(&saver, &operation).await;
    let mut last = before;
    loop {
        let device = soon(one.next()).await.unwrap().unwrap().device.unwrap();
        assert!(device.revision > last, "only newer: {last}, {device:?}");
        last = device.revision;
        if device.operation.is_empty() {
            assert_eq!(device.state(), v1::MigrationState::Running);
            break;
        }
    }

    let wrong = v1::WatchDevicesRequest { names: vec!["devices/x".to_owned()] };
    refused(saver.watch_devices(wrong).await.map(|_| ()), Code::NotFound, "DEVICE_NOT_FOUND");
    let twice = v1::WatchDevicesRequest { names: vec!["devices/nic0".to_owned(); 2] };
    refused_field(saver.watch_devices(twice).await.map(|_| ()), "names[1]");
    let wrong = v1::WatchDevicesRequest { names: vec!["nic0".to_owned()] };
    refused_field(saver.watch_devices(wrong).await.map(|_| ()), "names[0]");
    drop((all, one));
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_device_comes_back_with_its_state_or_without() {
    let lab = Lab::new();
    let bench = Bench::new(SimConfig { memory_bytes: 1 << 20, ..SimConfig::default() });
    let agent = start(lab.config("a", &[("nic0", bench.address.as_str())])).await;
    let (saver, admin) = (lab.client(&agent, "saver").await, lab.client(&agent, "admin").await);
    let resets = bench.device.resets();
    let mut stop = save_of(&["nic0"]);
    stop.after = v1::AfterSave::StayStopped.into();
    let before = device(&saver, "nic0").await.logical_device.unwrap();
    let operation = start_save(&saver, stop.clone()).await;
    let saved = take(&saver, &operation).await;
    done(&saver, &operation).await;
    let stopped = device(&saver, "nic0").await;
    assert_eq!(stopped.state(), v1::MigrationState::Stop);
    assert_eq!(stopped.blockers[0].reason(), v1::BlockerReason::NotRunning);

    // Said, and not done.
    for (mode, lost) in [(v1::ResetMode::KeepState, false), (v1::ResetMode::DiscardState, true)] {
        let request = v1::ResetDeviceRequest { validate_only: true, ..reset("nic0", mode) };
        let answer = admin.reset_device(request).await.unwrap();
        assert_eq!(answer.state_lost, lost);
        assert_eq!(bench.device.state(), State::Stop);
    }
    let answer = admin.reset_device(reset("nic0", v1::ResetMode::KeepState)).await.unwrap();
    let kept = answer.device.unwrap();
    assert!(!answer.state_lost);
    assert_eq!((kept.state(), kept.operation.as_str()), (v1::MigrationState::Running, ""));
    assert_eq!(kept.logical_device, Some(before.clone()), "it is who it was");
    assert_eq!(bench.device.resets(), resets, "nothing was reset");
    assert_eq!(save(&saver, &["nic0"]).await.digests(), saved.digests());

    bench.device.set_scratch(77);
    let answer = admin.reset_device(reset("nic0", v1::ResetMode::DiscardState)).await.unwrap();
    assert!(answer.state_lost);
    assert_eq!(bench.device.resets(), resets + 1);
    assert_eq!(bench.device.scratch(), 0, "its state is gone");
    let fresh = answer.device.unwrap();
    assert_eq!(fresh.state(), v1::MigrationState::Running);
    assert_ne!(fresh.logical_device.unwrap().id, before.id, "it is somebody new");
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_reset_is_told() {
    let lab = Lab::new();
    let nowhere = format!("vfio-user:{}", lab.path("nobody.sock").display());
    let agent = start(lab.config(
        "a",
        &[
            ("nic0", "sim:seed=1,memory=1MiB"),
            ("fixed", "sim:seed=1,memory=1MiB,reset=no"),
            ("gone", &nowhere),
        ],
    ))
    .await;
    let (saver, admin) = (lab.client(&agent, "saver").await, at_once(lab.client(&agent, "admin").await));
    refused_field(admin.reset_device(reset("nic0", v1::ResetMode::Unspecified)).await, "mode");
    let wrong = v1::ResetDeviceRequest { mode: 77, ..reset("nic0", v1::ResetMode::KeepState) };
    refused_field(admin.reset_device(wrong).await, "mode");
    refused_field(admin.reset_device(reset("", v1::ResetMode::KeepState)).await, "name");
    let wrong =
        v1::ResetDeviceRequest { request_id: "1".to_owned(), ..reset("nic0", v1::ResetMode::KeepState) };
    refused_field(admin.reset_device(wrong).await, "request_id");
    let missing = admin.reset_device(reset("nic9", v1::ResetMode::KeepState)).await;
    refused(missing, Code::NotFound, "DEVICE_NOT_FOUND");

    let operation = start_save(&saver, save_of(&["nic0"])).await;
    for validate_only in [false, true] {
        let request = v1::ResetDeviceRequest { validate_only, ..reset("nic0", v1::ResetMode::DiscardState) };
        let refusal = refused(admin.reset_device(request).await, Code::Unavailable, "BLOCKED");
        let leased = ("BLOCKER_REASON_LEASED".to_owned(), "devices/nic0".to_owned());
        assert_eq!(violations(&refusal), [leased]);
        assert!(refusal.message.contains(&operation), "{refusal}");
    }

    let refusal = refused(
        admin.reset_device(reset("fixed", v1::ResetMode::DiscardState)).await,
        Code::FailedPrecondition,
        "RESET_FAILED",
    );
    assert!(refusal.message.contains("devices/fixed"), "{refusal}");

    // What cannot be opened stays in the list, and says why.
    let gone = device(&saver, "gone").await;
    assert_eq!((gone.standing(), gone.backend()), (v1::DeviceStanding::Unavailable, v1::Backend::VfioUser));
    assert!(gone.standing_detail.contains("nobody.sock"), "{gone:?}");
    assert_eq!(gone.blockers[0].reason(), v1::BlockerReason::OutOfService);
    assert_eq!((gone.state(), gone.capabilities), (v1::MigrationState::Unspecified, None));
    refused(
        admin.reset_device(reset("gone", v1::ResetMode::DiscardState)).await,
        Code::FailedPrecondition,
        "OUT_OF_SERVICE",
    );
    assert_eq!(device(&saver, "gone").await.operation, "", "it is not left leased");
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_does_not_come_back_is_quarantined_until_somebody_decides() {
    let lab = Lab::new();
    let stuck = [Fault::Set { target: State::Running, landing: State::Error, errno: 5 }];
    let config = SimConfig { memory_bytes: 1 << 20, ..SimConfig::default() };
    let bench = Bench::with(config, &stuck);
    let agent = start(lab.config("a", &[("nic0", bench.address.as_str())])).await;
    let (saver, admin) = (lab.client(&agent, "saver").await, lab.client(&agent, "admin").await);
    let before = bench.device.resets();
    let operation = start_save(&saver, save_of(&["nic0"])).await;
    take(&saver, &operation).await;
    let ended = done(&saver, &operation).await;
    assert_eq!(
        (ended.result(), failure(&ended)),
        (v1::OperationResult::Failed, "DEVICE_FAILED"),
        "{ended:?}"
    );
    assert_eq!(ended.outcome(), v1::StateOutcome::StateLost);
    assert_eq!(ended.devices[0].standing(), v1::DeviceStanding::Quarantined);
    assert_eq!(ended.failure.unwrap().device, "devices/nic0");
    assert_eq!(bench.device.resets(), before, "a source is not reset by itself");
    let quarantined = device(&saver, "nic0").await;
    assert_eq!(quarantined.standing(), v1::DeviceStanding::Quarantined);

    let refusal = refused(saver.start_save(save_of(&["nic0"])).await, Code::FailedPrecondition, "BLOCKED");
    let reasons = violations(&refusal).into_iter().map(|(reason, _)| reason).collect::<Vec<_>>();
    assert_eq!(reasons, ["BLOCKER_REASON_OUT_OF_SERVICE"]);
    let name = "devices/nic0".to_owned();
    let stop = v1::StopDirtyTrackingRequest { name };
    refused(saver.stop_dirty_tracking(stop).await, Code::FailedPrecondition, "OUT_OF_SERVICE");

    // It stands in ERROR, so there is no way back with its state.
    let kept = admin.reset_device(reset("nic0", v1::ResetMode::KeepState)).await;
    refused(kept, Code::FailedPrecondition, "RESET_FAILED");
    assert_eq!(device(&saver, "nic0").await.standing(), v1::DeviceStanding::Quarantined);
    let answer = admin.reset_device(reset("nic0", v1::ResetMode::DiscardState)).await.unwrap();
    assert!(answer.state_lost);
    let back = answer.device.unwrap();
    assert_eq!((back.standing(), back.state()), (v1::DeviceStanding::Ready, v1::MigrationState::Running));
    save(&saver, &["nic0"]).await;
    agent.stop().await.unwrap();
}

/// Unlike one that is quarantined, nobody can decide anything about it before the agent is restarted.
#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_does_not_answer_hangs_in_its_operation_too() {
    let lab = Lab::new();
    let bench = Bench::new(SimConfig { memory_bytes: 1 << 20, ..SimConfig::default() });
    let line = Line::to(&bench);
    let devices = [("nic0", line.address.as_str()), ("nic1", "sim:seed=1,memory=1MiB,p2p=yes")];
    let mut config = lab.config("a", &devices);
    config.limits.device_call_timeout = Duration::from_secs(2);
    let agent = start(config).await;
    let saver = lab.client(&agent, "saver").await;
    let request = v1::StartSaveRequest {
        pre_copy: v1::PreCopyMode::Never.into(),
        cutover: v1::CutoverMode::Manual.into(),
        ..save_of(&["nic0", "nic1"])
    };
    let operation = start_save(&saver, request).await;
    let taking = TakeState::open(&saver, &operation.parse().unwrap()).await.unwrap();
    // Here its devices are asked nothing.
    reached(&saver, &operation, v1::OperationPhase::WaitingForCutover).await;
    line.cut();
    saver.cutover(v1::CutoverRequest { operation: operation.clone() }).await.unwrap();
    let ended = done(&saver, &operation).await;
    drop(taking);
    assert_eq!(failure(&ended), "DEVICE_FAILED", "{ended:?}");
    let standings: Vec<_> = ended.devices.iter().map(v1::OperationDevice::standing).collect();
    assert_eq!(standings, [v1::DeviceStanding::Hung, v1::DeviceStanding::Ready], "{ended:?}");
    let hung = device(&saver, "nic0").await;
    assert_eq!(hung.standing(), v1::DeviceStanding::Hung);
    assert!(hung.standing_detail.contains("did not return"), "{}", hung.standing_detail);
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_with_a_request_id_happens_once() {
    let lab = Lab::new();
    let bench = Bench::new(SimConfig { memory_bytes: 1 << 20, ..SimConfig::default() });
    let config = lab.config("a", &[("nic0", bench.address.as_str()), ("nic1", "sim:seed=1,memory=1MiB")]);
    let node = Node::start(&config).await;
    let admin = lab.client(node.agent(), "admin").await;
    let before = bench.device.resets();
    let discard =
        v1::ResetDeviceRequest { request_id: request_id(1), ..reset("nic0", v1::ResetMode::DiscardState) };
    let (one, other) = tokio::join!(admin.reset_device(discard.clone()), admin.reset_device(discard.clone()));
    assert!(one.unwrap().state_lost && other.unwrap().state_lost);
    assert_eq!(bench.device.resets(), before + 1);
    let another = v1::ResetDeviceRequest { mode: v1::ResetMode::KeepState.into(), ..discard.clone() };
    refused(admin.reset_device(another).await, Code::AlreadyExists, "REQUEST_ID_REUSED");
    let another = v1::ResetDeviceRequest { name: "devices/nic1".to_owned(), ..discard.clone() };
    refused(admin.reset_device(another).await, Code::AlreadyExists, "REQUEST_ID_REUSED");
    // Nor can it start a save.
    let save = v1::StartSaveRequest { request_id: request_id(1), ..save_of(&["nic1"]) };
    refused(admin.start_save(save).await, Code::AlreadyExists, "REQUEST_ID_REUSED");

    // A reset that failed was none: it may be tried again.
    let mut wrong = discard.clone();
    wrong.request_id = request_id(2);
    drop(admin);
    node.stop().await;
    let node = Node::start(&config).await;
    // Now, and no sooner: the device process resets when it has noticed that the agent before hung up.
    let before = bench.device.resets();
    let admin = lab.client(node.agent(), "admin").await;
    assert!(admin.reset_device(discard).await.unwrap().state_lost, "known after a restart");
    assert_eq!(bench.device.resets(), before, "and not done again");
    admin.reset_device(wrong).await.unwrap();
    assert_eq!(bench.device.resets(), before + 1);
    drop(admin);
    node.stop().await;
}
