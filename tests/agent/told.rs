//! Devices under an operation: what is told of them meanwhile, and that nobody keeps them stopped by only saying that it
//! is there.

use std::time::{Duration, Instant};

use vfio_checkpoint_device::sim::SimConfig;
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_proto::v1::stream_message::Kind;
use vfio_checkpoint_server::security::roles::{Policy, Role};

use crate::flow::{
    Bench, Node, channel, device, done, failure, give, millis, reached, restore_into, save_of, soon,
    start_restore, start_save, take,
};
use crate::lab::{Lab, start};
use crate::streams::{begin, open_of};

#[tokio::test(flavor = "multi_thread")]
async fn the_state_of_a_device_is_told_while_an_operation_has_it() {
    let lab = Lab::new();
    let agent =
        start(lab.config("a", &[("n0", "sim:seed=1,memory=1MiB"), ("n1", "sim:seed=2,memory=1MiB")])).await;
    let saver = lab.client(&agent, "saver").await;
    let restorer = lab.client(&agent, "restorer").await;
    let only = v1::WatchDevicesRequest { names: vec!["devices/n0".to_owned()] };
    let mut watch = saver.watch_devices(only).await.unwrap();

    let hold = v1::StartSaveRequest { after: v1::AfterSave::Hold.into(), ..save_of(&["n0"]) };
    let name = start_save(&saver, hold).await;
    let saved = take(&saver, &name).await;
    reached(&saver, &name, v1::OperationPhase::Held).await;
    let held = device(&saver, "n0").await;
    assert_eq!((held.state(), held.operation.as_str()), (v1::MigrationState::Stop, name.as_str()));
    loop {
        let told = soon(watch.next()).await.unwrap().unwrap().device.unwrap();
        if told.operation == name && told.state() == v1::MigrationState::Stop {
            break;
        }
    }
    saver.resume(v1::ResumeRequest { operation: name.clone() }).await.unwrap();
    done(&saver, &name).await;
    assert_eq!(device(&saver, "n0").await.state(), v1::MigrationState::Running);

    let hold = v1::RestoreRequest { after: v1::AfterRestore::Hold.into(), ..restore_into(&["n1"], &saved) };
    let name = start_restore(&restorer, hold).await;
    give(&restorer, &name, &saved).await;
    reached(&restorer, &name, v1::OperationPhase::Held).await;
    assert_eq!(device(&saver, "n1").await.state(), v1::MigrationState::Resuming);
    restorer.resume(v1::ResumeRequest { operation: name.clone() }).await.unwrap();
    done(&restorer, &name).await;
    assert_eq!(device(&saver, "n1").await.state(), v1::MigrationState::Running);
    agent.stop().await.unwrap();
}

fn beat() -> v1::StreamStateRequest {
    let kind = Some(Kind::Ack(v1::StreamAck { next_sequence: 0, complete: false }));
    v1::StreamStateRequest { message: Some(v1::StreamMessage { kind }) }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_taker_that_only_says_that_it_is_there_does_not_keep_a_device_stopped() {
    for (memory, reads) in [("64MiB", false), ("1MiB", true)] {
        let lab = Lab::new();
        let mut config = lab.config("a", &[("n0", &format!("sim:seed=1,memory={memory}"))]);
        config.server.stream_idle_timeout = Duration::from_millis(200);
        config.server.seal_timeout = Duration::from_millis(500);
        let agent = start(config).await;
        let saver = lab.client(&agent, "saver").await;
        let save = v1::StartSaveRequest { pre_copy: v1::PreCopyMode::Never.into(), ..save_of(&["n0"]) };
        let name = start_save(&saver, save).await;
        let raw = channel(&lab, &agent, "spiffe://lab.test/saver/test").await;
        let open = Kind::Open(open_of(&name, v1::StreamRole::Taker));
        let (sender, mut answers) = begin(&raw, Some(open)).await.unwrap();
        let beating = tokio::spawn(async move {
            let mut every = tokio::time::interval(Duration::from_millis(50));
            while sender.send(beat()).await.is_ok() {
                every.tick().await;
            }
        });
        let reading = async {
            if reads {
                while let Ok(Some(_)) = answers.message().await {}
            }
            std::future::pending::<()>().await;
        };
        let ended = tokio::select! {
            ended = done(&saver, &name) => ended,
            () = reading => unreachable!("it never ends"),
        };
        beating.abort();
        assert_eq!(
            (ended.result(), failure(&ended)),
            (v1::OperationResult::Failed, "STREAM_IDLE"),
            "{ended:?}"
        );
        let message = &ended.failure.as_ref().unwrap().message;
        assert_eq!(message.contains("durable"), reads, "{message}");
        assert_eq!(ended.outcome(), v1::StateOutcome::Preserved);
        assert_eq!(device(&saver, "n0").await.state(), v1::MigrationState::Running);
        agent.stop().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quiet_device_that_does_not_say_what_is_dirty_is_stopped_once_all_is_copied() {
    let lab = Lab::new();
    let bench = Bench::new(SimConfig { memory_bytes: 8 << 20, ..SimConfig::default() });
    let agent = start(lab.config("a", &[("n0", bench.address.as_str())])).await;
    let saver = lab.client(&agent, "saver").await;
    // Its size alone never fits.
    let save = v1::StartSaveRequest {
        pre_copy: v1::PreCopyMode::Required.into(),
        downtime_limit: millis(1),
        ..save_of(&["n0"])
    };
    let begun = Instant::now();
    let name = start_save(&saver, save).await;
    take(&saver, &name).await;
    let ended = done(&saver, &name).await;
    assert_eq!(ended.result(), v1::OperationResult::Succeeded, "{ended:?}");
    // Far less than the budget of a minute.
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    assert!(ended.devices[0].pre_copy_bytes >= 8 << 20, "{ended:?}");
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_finished_operation_is_told_the_same_after_a_restart() {
    let lab = Lab::new();
    let config = lab.config("a", &[("n0", "sim:seed=1,memory=1MiB"), ("n1", "sim:seed=2,memory=1MiB")]);
    let node = Node::start(&config).await;
    let saver = lab.client(node.agent(), "saver").await;
    let mut ended = Vec::new();
    for pre_copy in [v1::PreCopyMode::Never, v1::PreCopyMode::Required] {
        let save = v1::StartSaveRequest { pre_copy: pre_copy.into(), ..save_of(&["n0", "n1"]) };
        let name = start_save(&saver, save).await;
        take(&saver, &name).await;
        let operation = done(&saver, &name).await;
        for device in &operation.devices {
            assert_eq!(device.pre_copy_bytes > 0, pre_copy == v1::PreCopyMode::Required, "{operation:?}");
        }
        assert!(operation.predicted_downtime.is_some() && operation.downtime.is_some(), "{operation:?}");
        assert!(operation.revision > 1, "{operation:?}");
        ended.push(operation);
    }
    // Taken back while it is held: its devices stood still as well.
    let hold = v1::StartSaveRequest { after: v1::AfterSave::Hold.into(), ..save_of(&["n0"]) };
    let name = start_save(&saver, hold.clone()).await;
    take(&saver, &name).await;
    reached(&saver, &name, v1::OperationPhase::Held).await;
    saver.cancel_operation(v1::CancelOperationRequest { name: name.clone() }).await.unwrap();
    let cancelled = done(&saver, &name).await;
    assert_eq!(cancelled.result(), v1::OperationResult::Cancelled, "{cancelled:?}");
    assert!(cancelled.downtime.is_some(), "{cancelled:?}");
    ended.push(cancelled);
    // One whose devices never stopped has none.
    let name = start_save(&saver, save_of(&["n0"])).await;
    saver.cancel_operation(v1::CancelOperationRequest { name: name.clone() }).await.unwrap();
    let untouched = done(&saver, &name).await;
    assert_eq!(untouched.downtime, None, "{untouched:?}");
    ended.push(untouched);
    node.stop().await;

    let node = Node::start(&config).await;
    let saver = lab.client(node.agent(), "saver").await;
    for before in ended {
        let get = v1::GetOperationRequest { name: before.name.clone() };
        let mut after = saver.get_operation(get).await.unwrap().operation.unwrap();
        for (after, before) in after.devices.iter_mut().zip(&before.devices) {
            // How much there was in all is kept of what was sealed only.
            assert!(after.seal.is_none() || after.total == before.total, "{after:?} {before:?}");
            after.total.clone_from(&before.total);
        }
        after.total.clone_from(&before.total);
        assert_eq!(after, before);
    }
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_was_cut_off_is_told_so_in_words() {
    let lab = Lab::new();
    let agent = start(lab.config("a", &[("n0", "sim:seed=1,memory=64MiB")])).await;
    let saver = lab.client(&agent, "saver").await;
    let viewer = lab.client(&agent, "viewer").await;
    let name = start_save(&saver, save_of(&["n0"])).await;
    let raw = channel(&lab, &agent, "spiffe://lab.test/saver/test").await;
    let open = Kind::Open(open_of(&name, v1::StreamRole::Taker));
    let (_sender, _answers) = begin(&raw, Some(open)).await.unwrap();
    reached(&viewer, &name, v1::OperationPhase::PreCopy).await;
    let mut grants = agent.core().config.grants.clone();
    grants.retain(|grant| grant.roles != [Role::Saver]);
    assert!(agent.set_policy(Policy { grants }) > 0);
    let ended = done(&viewer, &name).await;
    assert_eq!(failure(&ended), "STREAM_BROKEN", "{ended:?}");
    let message = &ended.failure.as_ref().unwrap().message;
    assert!(message.contains("this agent ended the caller's connection"), "{message}");
    assert!(
        !message.contains("hyper") && !message.contains("Error {") && !message.contains("Kind"),
        "{message}"
    );
    agent.stop().await.unwrap();
}
