//! A store in a bucket, against a real server that speaks S3.
//!
//! ```text
//!   agent, store::Store x 2 == S3 ==> moto_server (a process of its own, on loopback)
//! ```

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use serde_json::json;
use vfio_checkpoint_client::call::Client;
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_server::config::StoreConfig;
use vfio_checkpoint_store::{Ambient, Begin, Limits, Location, S3Options, Store, StoreError};

use crate::lab::{Lab, PATIENCE, start};
use crate::python::script;

const BUCKET: &str = "checkpoints";

/// The server, with an empty bucket.
struct Server {
    process: Child,
    address: String,
}

impl Server {
    fn start() -> Self {
        let prepared = Command::new(script("prepare")).stderr(Stdio::inherit()).output().unwrap();
        assert!(prepared.status.success(), "python/prepare failed");
        let environment = String::from_utf8(prepared.stdout).unwrap();
        let mut process = Command::new(format!("{}/bin/moto_server", environment.trim()))
            .args(["-H", "127.0.0.1", "-p", "0"])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(process.stderr.take().unwrap()).lines().map_while(Result::ok);
        let address = said
            .by_ref()
            .find_map(|line| Some(line.split_once("Running on http://")?.1.trim().to_owned()))
            .expect("the server says where it is");
        // It goes on saying things, and must not wait for somebody to read them.
        std::thread::spawn(move || said.for_each(drop));
        let server = Self { process, address };
        server.make_bucket();
        server
    }

    fn make_bucket(&self) {
        let mut connection = TcpStream::connect(&self.address).unwrap();
        let request = format!(
            "PUT /{BUCKET} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
            self.address
        );
        connection.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        connection.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }

    fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Its own child, by its id.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Keys that the server takes: it takes any.
fn credentials(lab: &Lab) -> std::path::PathBuf {
    let path = lab.path("keys");
    std::fs::write(&path, "AWS_ACCESS_KEY_ID=testing\nAWS_SECRET_ACCESS_KEY=testing\n").unwrap();
    path
}

#[derive(Debug, Default)]
struct Counting(AtomicU64);

impl Ambient for Counting {
    fn now(&self) -> SystemTime {
        SystemTime::now()
    }

    fn random(&self) -> u64 {
        self.0.fetch_add(1, Ordering::SeqCst)
    }
}

async fn store(server: &Server, lab: &Lab, first: u64) -> Store {
    let location = Location::S3 {
        bucket: BUCKET.to_owned(),
        prefix: "a/prefix".to_owned(),
        options: S3Options {
            endpoint: Some(server.endpoint()),
            region: Some("us-east-1".to_owned()),
            allow_http: true,
            ca: None,
            credentials: Some(credentials(lab)),
        },
    };
    let limits = Limits { grace: Duration::ZERO, ..Limits::default() };
    Store::open(&location, limits, Arc::new(Counting(AtomicU64::new(first)))).await.unwrap()
}

fn noise(seed: u8, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut bytes);
    bytes
}

async fn save(store: &Store, begin: Begin, state: &[u8]) -> Result<u64, StoreError> {
    let mut writer = store.begin(begin).await?;
    for part in state.chunks(1 << 20) {
        writer.chunk(0, Bytes::copy_from_slice(part)).await?;
    }
    writer.finish(0).await?;
    Ok(writer.commit(json!({})).await?.added.stored_bytes)
}

fn begin(store: &Store) -> Begin {
    Begin { id: store.new_id(), logical_devices: vec!["nic".to_owned()], reserve_bytes: 0 }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Python and packages: run tests/run interop"]
async fn two_agents_share_a_bucket() {
    let (server, lab) = (Server::start(), Lab::new());
    let (one, two) = (store(&server, &lab, 1 << 32).await, store(&server, &lab, 2 << 32).await);
    let state = noise(1, 4 << 20);
    let first = begin(&one);
    assert_eq!(save(&one, first.clone(), &state).await.unwrap(), 4 << 20);
    // A name is taken once, whoever comes second.
    assert!(save(&two, first.clone(), &state).await.is_err());
    // What one has, the other builds on.
    let second = begin(&two);
    assert_eq!(save(&two, second.clone(), &state).await.unwrap(), 0);
    one.delete(first.id).await.unwrap();
    let (here, there) = tokio::join!(one.collect(), two.collect());
    assert_eq!(here.unwrap().chunks + there.unwrap().chunks, 0, "the second needs them all");
    assert_eq!(one.verify(second.id, |_| {}).await.unwrap().problems, Vec::<String>::new());
    one.delete(second.id).await.unwrap();
    let (here, there) = tokio::join!(one.collect(), two.collect());
    assert!(here.unwrap().chunks + there.unwrap().chunks > 0);
    assert!(two.list(None, 10).await.unwrap().checkpoints.is_empty());
}

async fn done(client: &Client, operation: v1::Operation) -> v1::Operation {
    let ended = client.wait_operation(&operation.name, PATIENCE).await.unwrap().operation.unwrap();
    assert_eq!(ended.result(), v1::OperationResult::Succeeded, "{ended:?}");
    ended
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Python and packages: run tests/run interop"]
async fn an_agent_saves_to_a_bucket_and_restores_from_it() {
    let (server, lab) = (Server::start(), Lab::new());
    let mut config = lab.config("a", &[("n0", "sim:seed=1,memory=8MiB"), ("t0", "sim:seed=1,memory=8MiB")]);
    config.stores = vec![StoreConfig {
        name: "bucket".to_owned(),
        location: format!("s3://{BUCKET}/agents"),
        endpoint: Some(server.endpoint()),
        region: Some("us-east-1".to_owned()),
        credentials: Some(credentials(&lab)),
        ca: None,
        allow_http: true,
        keep_free_bytes: None,
        collect_interval: None,
    }];
    let agent = start(config).await;
    let (saver, restorer) = (lab.client(&agent, "saver").await, lab.client(&agent, "restorer").await);
    let request = v1::StartSaveRequest {
        devices: vec!["devices/n0".to_owned()],
        memory_capture: v1::MemoryCapture::None.into(),
        store: "stores/bucket".to_owned(),
        ..Default::default()
    };
    let kept = done(&saver, saver.start_save(request).await.unwrap().operation.unwrap()).await;
    let request = v1::RestoreRequest {
        devices: vec!["devices/t0".to_owned()],
        checkpoint: kept.checkpoint.clone(),
        allow_fork: true,
        ..Default::default()
    };
    let loaded = done(&restorer, restorer.restore(request).await.unwrap().operation.unwrap()).await;
    assert_eq!(loaded.devices[0].seal, kept.devices[0].seal);
    agent.stop().await.unwrap();
}
