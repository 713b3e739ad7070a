//! How many may be connected: nobody locks everybody else out.

use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_proto::v1::device_service_client::DeviceServiceClient;
use vfio_checkpoint_server::serve::Agent;

use crate::flow::{channel, soon, try_channel};
use crate::lab::{Lab, start};

/// Of the plain port, written here once more.
const PLAIN_CONNECTIONS: usize = 64;

async fn plain(agent: &Agent) -> Channel {
    let address = agent.health_address().unwrap();
    soon(Endpoint::try_from(format!("http://{address}")).unwrap().connect()).await.unwrap()
}

async fn ask(channel: &Channel) {
    soon(HealthClient::new(channel.clone()).check(HealthCheckRequest::default())).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_plain_port_serves_so_many_and_then_the_next() {
    let lab = Lab::new();
    let mut config = lab.config("a", &[]);
    config.server.health_listen = Some("127.0.0.1:0".parse().unwrap());
    let agent = start(config).await;
    let mut served = Vec::new();
    for _ in 0..PLAIN_CONNECTIONS {
        let one = plain(&agent).await;
        ask(&one).await;
        served.push(one);
    }
    let one_more = plain(&agent).await;
    let waiting = tokio::spawn(async move { ask(&one_more).await });
    // Every one of the others is served twice meanwhile.
    for one in served.iter().chain(&served) {
        ask(one).await;
    }
    assert!(!waiting.is_finished(), "it waits");
    served.pop();
    soon(waiting).await.unwrap();
    agent.stop().await.unwrap();
}

async fn list(channel: &Channel) -> Result<(), Status> {
    let request = Request::new(v1::ListDevicesRequest::default());
    soon(DeviceServiceClient::new(channel.clone()).list_devices(request)).await.map(drop)
}

/// Whether one more connection gets in. With TLS 1.3 a client is done before the agent has looked at its certificate, so
/// that it may be its first call that finds out.
async fn gets_in(lab: &Lab, agent: &Agent, identity: &str) -> bool {
    match try_channel(lab, agent, identity).await {
        Ok(channel) => match list(&channel).await {
            Ok(()) => true,
            Err(status) => {
                assert_ne!(status.code(), Code::PermissionDenied, "it is no matter of roles: {status}");
                false
            }
        },
        Err(_) => false,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_identity_takes_a_quarter_of_the_places_and_leaves_the_rest() {
    let lab = Lab::new();
    let mut config = lab.config("a", &[]);
    config.server.max_connections = 8;
    let agent = start(config).await;
    let (greedy, other) = ("spiffe://lab.test/viewer/greedy", "spiffe://lab.test/viewer/other");
    let mut served = Vec::new();
    for _ in 0..2 {
        let one = channel(&lab, &agent, greedy).await;
        list(&one).await.unwrap();
        served.push(one);
    }
    for _ in 0..8 {
        assert!(!gets_in(&lab, &agent, greedy).await);
    }
    assert!(gets_in(&lab, &agent, other).await, "others get in");
    for one in &served {
        list(one).await.expect("who is in stays in");
    }
    served.pop();
    // The agent hears of it when the connection's end comes in.
    soon(async { while !gets_in(&lab, &agent, greedy).await {} }).await;
    agent.stop().await.unwrap();
}
