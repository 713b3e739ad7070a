//! How callers and agents end: certificates that are taken back, health, and a stop.

use std::time::Duration;

use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use vfio_checkpoint_client::call::Client;
use vfio_checkpoint_client::connect::ConnectOptions;
use vfio_checkpoint_client::tls::{Credentials, ServerCheck, client_config};
use vfio_checkpoint_client::transfer::TakeState;
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_proto::v1::device_service_client::DeviceServiceClient;
use vfio_checkpoint_server::security::identity::Identity;
use vfio_checkpoint_server::security::lab::{LabCa, LabCertificate, write_file};
use vfio_checkpoint_server::security::roles::{Grant, Policy, Role};
use vfio_checkpoint_server::serve::Agent;

use crate::faulty::Faulty;
use crate::flow::{
    Node, channel, device, done, failure, reached, refused, restore_into, save, save_of, soon, start_save,
    take,
};
use crate::lab::{Lab, start, validity};

/// The agent's own certificate is the lab's, whoever issued the client's.
async fn connect(lab: &Lab, agent: &Agent, issued: &LabCertificate) -> Client {
    let key = issued.key_pem();
    let (certificate, authority) = (issued.certificate_pem.as_bytes(), lab.ca.pem());
    let credentials = Credentials::from_pem(certificate, key.as_bytes(), authority.as_bytes()).unwrap();
    let check = ServerCheck::Name(None);
    let tls = client_config(credentials, &check).unwrap();
    let options = ConnectOptions::new(format!("https://{}", agent.address()), tls, check);
    Client::connect(&options).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_caller_is_cut_off_and_what_it_streams_is_undone() {
    let lab = Lab::new();
    let mut config = lab.config("a", &[("n0", "sim:seed=1,memory=1MiB")]);
    let list = lab.path("revoked.crl");
    write_file(&list, lab.ca.crl(&[], validity()).unwrap().as_bytes(), 0o644).unwrap();
    config.tls.crls = vec![list.clone()];
    // Only when it is told to.
    config.tls.reload_interval = Some(Duration::from_hours(1));
    let agent = start(config).await;
    let admin = lab.client(&agent, "admin").await;
    let saver = lab.client(&agent, "saver").await;
    let digests = save(&saver, &["n0"]).await.digests();
    let identity = Identity::Spiffe("spiffe://lab.test/saver/thief".parse().unwrap());
    let issued = lab.ca.issue(&identity, &[], &[], validity()).unwrap();
    let thief = connect(&lab, &agent, &issued).await;
    let request = v1::StartSaveRequest {
        cutover: v1::CutoverMode::Manual.into(),
        pre_copy: v1::PreCopyMode::Never.into(),
        ..save_of(&["n0"])
    };
    let name = start_save(&thief, request).await;
    let TakeState { mut taker, .. } = TakeState::open(&thief, &name.parse().unwrap()).await.unwrap();
    let streaming = tokio::spawn(async move { while let Ok(Some(_)) = taker.next().await {} });
    reached(&admin, &name, v1::OperationPhase::WaitingForCutover).await;

    write_file(&list, lab.ca.crl(&[&issued.serial], validity()).unwrap().as_bytes(), 0o644).unwrap();
    soon(agent.tls().reload()).await.unwrap();
    let ended = done(&admin, &name).await;
    assert_eq!(
        (ended.result(), failure(&ended)),
        (v1::OperationResult::Failed, "STREAM_BROKEN"),
        "{ended:?}"
    );
    assert_eq!(ended.outcome(), v1::StateOutcome::Preserved);
    soon(streaming).await.unwrap();
    let answer = soon(thief.list_devices(v1::ListDevicesRequest::default())).await;
    assert!(answer.is_err(), "it does not come back: {answer:?}");
    assert_eq!(device(&admin, "n0").await.state(), v1::MigrationState::Running);
    assert_eq!(save(&saver, &["n0"]).await.digests(), digests, "others go on");
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn another_authority_is_found_without_a_word_and_counts_from_then_on() {
    let lab = Lab::new();
    let mut config = lab.config("a", &[("n0", "sim:seed=1,memory=1MiB")]);
    config.tls.reload_interval = Some(Duration::from_millis(20));
    let authorities = config.tls.client_ca.clone();
    let agent = start(config).await;
    let before = lab.client(&agent, "viewer").await;
    let mut watch = before.watch_devices(v1::WatchDevicesRequest::default()).await.unwrap();
    soon(watch.next()).await.unwrap().expect("it is there");

    let other = LabCa::new(&"lab.test".parse().unwrap(), validity()).unwrap();
    write_file(&authorities, other.pem().as_bytes(), 0o644).unwrap();
    while let Ok(Some(_)) = soon(watch.next()).await {}
    let answer = soon(before.list_devices(v1::ListDevicesRequest::default())).await;
    assert!(answer.is_err(), "who was let in by the one before is out: {answer:?}");
    let identity = Identity::Spiffe("spiffe://lab.test/viewer/new".parse().unwrap());
    let issued = other.issue(&identity, &[], &[], validity()).unwrap();
    let after = connect(&lab, &agent, &issued).await;
    after.list_devices(v1::ListDevicesRequest::default()).await.unwrap();
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn who_loses_a_role_is_cut_off_and_nobody_else() {
    let lab = Lab::new();
    let mut config = lab.config("a", &[("n0", "sim:seed=1,memory=1MiB")]);
    let who = "spiffe://lab.test/team/left";
    let grant = |role| Grant { who: who.parse().unwrap(), roles: vec![role] };
    config.grants.push(grant(Role::Viewer));
    let without = Policy { grants: config.grants.clone() };
    config.grants.push(grant(Role::Saver));
    let with = Policy { grants: config.grants.clone() };
    let agent = start(config).await;
    let (admin, saver) = (lab.client(&agent, "admin").await, lab.client(&agent, "saver").await);
    let left = lab.client_named(&agent, who).await;
    let request = v1::StartSaveRequest {
        cutover: v1::CutoverMode::Manual.into(),
        pre_copy: v1::PreCopyMode::Never.into(),
        ..save_of(&["n0"])
    };
    let name = start_save(&left, request).await;
    let TakeState { mut taker, .. } = TakeState::open(&left, &name.parse().unwrap()).await.unwrap();
    let streaming = tokio::spawn(async move { while let Ok(Some(_)) = taker.next().await {} });
    reached(&admin, &name, v1::OperationPhase::WaitingForCutover).await;
    let mut watch = saver.watch_operation(v1::WatchOperationRequest { name: name.clone() }).await.unwrap();

    assert_eq!(agent.set_policy(with), 0, "nobody loses a role by the same policy");
    assert_eq!(agent.set_policy(without.clone()), 1);
    let ended = done(&admin, &name).await;
    assert_eq!(
        (ended.result(), failure(&ended)),
        (v1::OperationResult::Failed, "STREAM_BROKEN"),
        "{ended:?}"
    );
    assert_eq!(ended.outcome(), v1::StateOutcome::Preserved);
    soon(streaming).await.unwrap();
    // The watch of another goes on to its end, and what the one who left may do still it may.
    let mut last = None;
    while let Some(told) = soon(watch.next()).await.unwrap() {
        last = told.operation;
    }
    assert!(last.unwrap().done);
    let left = lab.client_named(&agent, who).await;
    assert_eq!(device(&left, "n0").await.state(), v1::MigrationState::Running);
    refused(left.start_save(save_of(&["n0"])).await, Code::PermissionDenied, "ROLE_REQUIRED");
    assert_eq!(agent.set_policy(without), 0);
    save(&saver, &["n0"]).await;
    agent.stop().await.unwrap();
}

fn check(service: &str) -> HealthCheckRequest {
    HealthCheckRequest { service: service.to_owned() }
}

async fn plain(agent: &Agent) -> Channel {
    let address = agent.health_address().unwrap();
    soon(Endpoint::try_from(format!("http://{address}")).unwrap().connect()).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_plain_port_answers_health_and_nothing_else() {
    let lab = Lab::new();
    let mut config = lab.config("a", &[]);
    config.server.health_listen = Some("127.0.0.1:0".parse().unwrap());
    let agent = start(config).await;
    let channel = plain(&agent).await;
    let mut health = HealthClient::new(channel.clone());
    for service in [
        "",
        "vfio.checkpoint.v1.DeviceService",
        "vfio.checkpoint.v1.CheckpointService",
        "vfio.checkpoint.v1.OperationService",
    ] {
        let answer = soon(health.check(check(service))).await.unwrap().into_inner();
        assert_eq!(answer.status(), ServingStatus::Serving, "{service:?}");
    }
    let status = soon(health.check(check("no.such.Service"))).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    let request = Request::new(v1::ListDevicesRequest::default());
    let status = soon(DeviceServiceClient::new(channel.clone()).list_devices(request)).await.unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented);
    let request = tokio_stream::once(ServerReflectionRequest::default());
    let status =
        soon(ServerReflectionClient::new(channel).server_reflection_info(request)).await.unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented);
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_undoes_what_runs_and_says_first_that_it_does_not_serve() {
    let lab = Lab::new();
    let mut config = lab.config("a", &[("n0", "sim:seed=1,memory=1MiB"), ("n1", "sim:seed=2,memory=1MiB")]);
    config.server.health_listen = Some("127.0.0.1:0".parse().unwrap());
    let node = Node::start(&config).await;
    let agent = node.agent();
    let saver = lab.client(agent, "saver").await;
    let mut watching =
        soon(HealthClient::new(plain(agent).await).watch(check(""))).await.unwrap().into_inner();
    let over_tls = channel(&lab, agent, "spiffe://lab.test/nobody/test").await;
    let mut with_tls = soon(HealthClient::new(over_tls).watch(check(""))).await.unwrap().into_inner();
    let status = async |watch: &mut tonic::Streaming<HealthCheckResponse>| {
        soon(watch.message()).await.ok().flatten().map(|answer| answer.status())
    };
    assert_eq!(status(&mut watching).await, Some(ServingStatus::Serving));
    assert_eq!(status(&mut with_tls).await, Some(ServingStatus::Serving));
    let request = v1::StartSaveRequest {
        cutover: v1::CutoverMode::Manual.into(),
        pre_copy: v1::PreCopyMode::Never.into(),
        ..save_of(&["n0"])
    };
    let name = start_save(&saver, request).await;
    let TakeState { mut taker, .. } = TakeState::open(&saver, &name.parse().unwrap()).await.unwrap();
    let streaming = tokio::spawn(async move {
        loop {
            match taker.next().await {
                Ok(Some(_)) => {}
                Ok(None) => return None,
                Err(error) => return Some(error.to_string()),
            }
        }
    });
    reached(&saver, &name, v1::OperationPhase::WaitingForCutover).await;
    let mut watch = saver.watch_operation(v1::WatchOperationRequest { name: name.clone() }).await.unwrap();

    let stopping = tokio::spawn(node.stop());
    assert_eq!(status(&mut watching).await, Some(ServingStatus::NotServing));
    assert_eq!(status(&mut with_tls).await, Some(ServingStatus::NotServing));
    let mut last = None;
    while let Ok(Some(told)) = soon(watch.next()).await {
        last = told.operation;
    }
    soon(stopping).await.unwrap();
    let told = soon(streaming).await.unwrap();
    assert!(told.is_some(), "the taker hears that there is no checkpoint");
    let ended = last.expect("the watcher is told");
    assert_eq!(
        (ended.result(), failure(&ended)),
        (v1::OperationResult::Failed, "SHUTTING_DOWN"),
        "{ended:?}"
    );
    assert_eq!(ended.outcome(), v1::StateOutcome::Preserved);
    assert_eq!(status(&mut watching).await, None, "then it is over");
    let answer = soon(saver.list_devices(v1::ListDevicesRequest::default())).await;
    assert!(answer.is_err(), "nobody is there any more");
}

/// In one process and one runtime, and with callers whose calls do not end by themselves.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_was_stopped_leaves_its_folder_to_the_next() {
    let lab = Lab::new();
    let mut config = lab.config("a", &[("n0", "sim:seed=1,memory=1MiB")]);
    config.server.health_listen = Some("127.0.0.1:0".parse().unwrap());
    for _ in 0..2 {
        let agent = start(config.clone()).await;
        let saver = lab.client(&agent, "saver").await;
        let request = v1::WatchDevicesRequest { names: vec!["devices/n0".to_owned()] };
        let mut devices = saver.watch_devices(request).await.unwrap();
        soon(devices.next()).await.unwrap().expect("it is there");
        let mut plainly = HealthClient::new(plain(&agent).await).watch(check("")).await.unwrap().into_inner();
        agent.stop().await.unwrap();
        while let Ok(Some(_)) = soon(devices.next()).await {}
        while let Ok(Some(_)) = soon(plainly.message()).await {}
    }
}

/// What cannot be recorded cannot end. A stop leaves it as a kill does, and takes its task along.
#[tokio::test(flavor = "multi_thread")]
async fn an_operation_that_is_still_under_way_after_the_grace_does_not_hold_the_folder() {
    let lab = Lab::new();
    let mut config = lab.config("a", &[("n0", "sim:seed=1,memory=1MiB")]);
    config.server.shutdown_grace = Duration::from_millis(1);
    let faulty = Faulty::new();
    let agent = Agent::start(config.clone(), faulty.environment()).await.unwrap();
    let saver = lab.client(&agent, "saver").await;
    let name = start_save(&saver, save_of(&["n0"])).await;
    faulty.break_lane("journal", 0);
    take(&saver, &name).await;
    faulty.lost(2).await;
    // Somebody waits for its end, and would for an hour.
    let waiting = tokio::spawn({
        let (saver, name) = (saver.clone(), name.clone());
        async move { saver.wait_operation(&name, Duration::from_hours(1)).await }
    });
    let mut watch = saver.watch_operation(v1::WatchOperationRequest { name: name.clone() }).await.unwrap();
    soon(watch.next()).await.unwrap().expect("it is there");
    agent.stop().await.unwrap();
    assert!(soon(waiting).await.unwrap().is_err(), "nobody knows how it ends");

    let agent = start(config).await;
    let saver = lab.client(&agent, "saver").await;
    assert_eq!(failure(&done(&saver, &name).await), "AGENT_RESTARTED");
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_ends_admits_nothing() {
    let lab = Lab::new();
    let agent = start(lab.config("a", &[("n0", "sim:seed=1,memory=1MiB")])).await;
    let saver = lab.client(&agent, "saver").await;
    let restorer = lab.client(&agent, "restorer").await;
    let saved = save(&saver, &["n0"]).await;
    agent.core().begin_ending();
    refused(saver.start_save(save_of(&["n0"])).await, Code::Unavailable, "SHUTTING_DOWN");
    let restore = restore_into(&["n0"], &saved);
    refused(restorer.restore(restore.clone()).await, Code::Unavailable, "SHUTTING_DOWN");
    let validated = v1::RestoreRequest { validate_only: true, ..restore };
    let answer = restorer.restore(validated).await.unwrap();
    assert_eq!(answer.blockers[0].reason(), v1::BlockerReason::AgentBusy);
    let validated = v1::StartSaveRequest { validate_only: true, ..save_of(&["n0"]) };
    let answer = saver.start_save(validated).await.unwrap();
    assert_eq!(answer.blockers[0].reason(), v1::BlockerReason::AgentBusy);
    agent.stop().await.unwrap();
}
