//! A certificate that the agent does not take any more: no repetition changes that, so calls and waits end at once.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use vfio_checkpoint_client::call::{CallError, CallOptions, Client, RetryPolicy};
use vfio_checkpoint_client::connect::ConnectOptions;
use vfio_checkpoint_client::tls::ServerCheck;
use vfio_checkpoint_proto::v1;

use crate::pki::{Ca, agent_names, config};
use crate::server::Agent;

/// One address, behind which an agent takes the place of another.
struct Place {
    address: SocketAddr,
    /// Who is behind it. A change cuts every connection.
    behind: watch::Sender<SocketAddr>,
    connections: Arc<AtomicUsize>,
}

impl Place {
    async fn of(first: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (behind, _) = watch::channel(first);
        let connections = Arc::new(AtomicUsize::new(0));
        let (changes, counted) = (behind.clone(), Arc::clone(&connections));
        tokio::spawn(async move {
            while let Ok((mut near, _)) = listener.accept().await {
                counted.fetch_add(1, Ordering::SeqCst);
                let mut next = changes.subscribe();
                let behind = *next.borrow_and_update();
                let mut far = TcpStream::connect(behind).await.unwrap();
                tokio::spawn(async move {
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
                        _ = next.changed() => {}
                    }
                });
            }
        });
        Self { address, behind, connections }
    }
}

#[tokio::test]
async fn calls_and_waits_end_at_once_where_the_certificate_is_refused() {
    let (ours, theirs) = (Ca::new("ours"), Ca::new("theirs"));
    let server = ours.server(agent_names());
    let takes_us = Agent::default().serve(&server, &ours).await;
    let takes_others = Agent::default().serve(&server, &theirs).await;
    let place = Place::of(takes_us).await;
    let check = ServerCheck::Name(None);
    let tls = config(&ours, &ours.client(), &check);
    let endpoint = format!("https://localhost:{}", place.address.port());
    let client = Client::connect(&ConnectOptions::new(endpoint, tls, check)).await.unwrap();
    let (hour, pause) = (Duration::from_hours(1), Duration::from_millis(1));
    let retry =
        RetryPolicy { attempts: 50, first_pause: pause, longest_pause: pause, ..RetryPolicy::default() };
    let client = client.with_call_options(CallOptions { deadline: hour, retry, ..CallOptions::default() });
    let request = v1::ListCheckpointsRequest::default;
    client.list_checkpoints(request()).await.unwrap();
    assert_eq!(place.connections.load(Ordering::SeqCst), 1);

    place.behind.send_replace(takes_others);
    let refused = |error: CallError| {
        let CallError::NotConnected { source, .. } = &error else { panic!("{error}") };
        assert!(source.is_about_the_caller(), "{error}");
    };
    refused(client.list_checkpoints(request()).await.unwrap_err());
    assert_eq!(place.connections.load(Ordering::SeqCst), 2, "it was tried again after the refusal");
    refused(client.wait_operation("operations/1", hour).await.unwrap_err());
    refused(client.watch_devices(v1::WatchDevicesRequest::default()).await.unwrap_err());
    assert_eq!(place.connections.load(Ordering::SeqCst), 4, "each call asks once whether it is still so");

    // Who is taken again is served again.
    place.behind.send_replace(takes_us);
    client.list_checkpoints(request()).await.unwrap();
}
