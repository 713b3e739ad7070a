//! `StreamState` between two agents, each a process: the state of a simulated device goes out of one, and verified into
//! one of the other, as when a node pushes to another.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use vfio_checkpoint_client::call::{Client, new_request_id};
use vfio_checkpoint_client::transfer::{TakeState, dial};
use vfio_checkpoint_proto::domain::{SaveRequestSpec, StreamRole, operation_name};
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_server::config::{AgentConfig, DeviceConfig};
use vfio_checkpoint_server::environment::Environment;
use vfio_checkpoint_server::operation::{Cancel, Entry, Starter};
use vfio_checkpoint_server::security::roles::{Grant, Role};
use vfio_checkpoint_server::serve::Agent;
use vfio_checkpoint_server::transfer::Attached;

use crate::child::{runtime, tell, told, until_over};
use crate::secrets::client;
use crate::stored::ended;

const DEVICE: &str = "devices/nic0";

/// The agent of one end.
pub(crate) async fn agent(folder: &Path, who: &str, devices: &[(&str, String)]) -> Agent {
    let own = folder.join(who);
    let mut config = AgentConfig::default();
    config.node.state_dir = own.join(format!("state-{}", std::process::id()));
    config.server.listen = "127.0.0.1:0".parse().unwrap();
    config.tls.certificate = own.join("tls.crt");
    config.tls.key = own.join("tls.key");
    config.tls.client_ca = own.join("ca.crt");
    let who = "spiffe://lab.test/restorer/*".parse().unwrap();
    config.grants = vec![Grant { who, roles: vec![Role::Saver, Role::Restorer, Role::Admin] }];
    config.devices = devices
        .iter()
        .map(|(name, address)| DeviceConfig {
            name: (*name).to_owned(),
            address: address.clone(),
            path: None,
            owner_pod: String::new(),
        })
        .collect();
    Agent::start(config, Environment::production()).await.unwrap()
}

pub(crate) fn take(folder: &Path, mib: &str) {
    runtime().block_on(async {
        let agent = agent(folder, "taker", &[("nic0", format!("sim:seed=8,memory={mib}MiB"))]).await;
        tell(&agent.address().to_string());
        until_over().await;
        agent.stop().await.unwrap();
    });
}

pub(crate) fn give(folder: &Path, address: &str, mib: &str) {
    runtime().block_on(async {
        let agent = agent(folder, "giver", &[("nic0", format!("sim:seed=7,memory={mib}MiB"))]).await;
        let own = client(folder, &agent.address().to_string()).await;
        let peer = client(folder, address).await;
        let manifest = manifest(&own, &agent).await;
        tell("ready");
        while tokio::task::spawn_blocking(told).await.unwrap() {
            let begun = Instant::now();
            push(&agent, &peer, &manifest).await;
            tell(&begun.elapsed().as_secs_f64().to_string());
        }
        agent.stop().await.unwrap();
    });
}

pub(crate) fn save_request() -> v1::StartSaveRequest {
    v1::StartSaveRequest {
        devices: vec![DEVICE.to_owned()],
        pre_copy: v1::PreCopyMode::Never.into(),
        after: v1::AfterSave::Resume.into(),
        memory_capture: v1::MemoryCapture::None.into(),
        request_id: new_request_id().unwrap(),
        ..v1::StartSaveRequest::default()
    }
}

/// What a save of the device is described with: that of one which is given up before it begins.
async fn manifest(own: &Client, agent: &Agent) -> v1::CheckpointManifest {
    let entry = start(agent).await;
    let take = TakeState::open(own, &entry.fixed.name).await.unwrap();
    let manifest = take.manifest.clone();
    let _ = entry.cancel(Cancel::ShuttingDown);
    take.taker.abort("only the manifest is of interest").await;
    over(&entry).await;
    manifest.into()
}

async fn start(agent: &Agent) -> Arc<Entry> {
    let spec = SaveRequestSpec::try_from(save_request()).unwrap();
    let caller = "spiffe://lab.test/restorer/bench".to_owned();
    let starter = Starter { caller, request: None, trace_id: None };
    agent.core().start_save(spec, starter).await.unwrap().entry.unwrap()
}

async fn over(entry: &Entry) {
    entry.changes().wait_for(|_| entry.is_done()).await.unwrap();
}

/// One save here and one restore there, over one stream.
async fn push(agent: &Agent, peer: &Client, manifest: &v1::CheckpointManifest) {
    let request = v1::RestoreRequest {
        devices: vec![DEVICE.to_owned()],
        manifest: Some(manifest.clone()),
        allow_fork: true,
        request_id: new_request_id().unwrap(),
        ..v1::RestoreRequest::default()
    };
    let (entry, restore) = tokio::join!(start(agent), peer.restore(request));
    let restore = restore.unwrap().operation.unwrap().name;
    let name = operation_name("operation", &restore).unwrap();
    let dialed = dial(peer, &name, StreamRole::Giver).await.unwrap();
    entry.attach(Attached::dialed(dialed)).unwrap();
    over(&entry).await;
    let there = ended(peer, &restore).await;
    let here = entry.view().devices.into_iter().map(|device| device.seal);
    let seals = there.devices.into_iter().map(|device| device.seal.map(|seal| seal.try_into().unwrap()));
    assert!(here.eq(seals), "the taker has verified something else");
}
