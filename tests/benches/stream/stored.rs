//! An agent's save into a local store, the same once more, and a restore out of it.

use std::path::Path;
use std::time::{Duration, Instant};

use vfio_checkpoint_client::call::{Client, new_request_id};
use vfio_checkpoint_proto::v1;

use crate::child::{Child, runtime, tell};
use crate::gib;
use crate::secrets::client;
use crate::service::{agent, save_request};

/// What one process has shown, in GiB a second.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kept {
    /// Into an empty store.
    pub(crate) save: f64,
    /// Once more, when the store has every chunk of it.
    pub(crate) again: f64,
    /// Out of it, verified.
    pub(crate) restore: f64,
}

/// One process with an empty store.
pub(crate) fn run(folder: &Path, mib: u64) -> Kept {
    let mut child = Child::start(&["stored", folder.to_str().unwrap(), &mib.to_string()]);
    let mut rate = || gib(mib) / child.hear().parse::<f64>().expect("seconds");
    Kept { save: rate(), again: rate(), restore: rate() }
}

pub(crate) fn keep(folder: &Path, mib: &str) {
    runtime().block_on(async {
        let devices = [
            ("nic0", format!("sim:seed=7,memory={mib}MiB")),
            ("nic1", format!("sim:seed=8,memory={mib}MiB")),
        ];
        let agent = agent(folder, "taker", &devices).await;
        let state_dir = agent.core().config.node.state_dir.clone();
        let client = client(folder, &agent.address().to_string()).await;
        let mut checkpoint = String::new();
        for _ in 0..2 {
            let request = v1::StartSaveRequest { store: "stores/local".to_owned(), ..save_request() };
            let begun = Instant::now();
            let operation = client.start_save(request).await.unwrap().operation.unwrap().name;
            checkpoint = ended(&client, &operation).await.checkpoint;
            tell(&begun.elapsed().as_secs_f64().to_string());
        }
        let request = v1::RestoreRequest {
            devices: vec!["devices/nic1".to_owned()],
            checkpoint,
            allow_fork: true,
            request_id: new_request_id().unwrap(),
            ..v1::RestoreRequest::default()
        };
        let begun = Instant::now();
        let operation = client.restore(request).await.unwrap().operation.unwrap().name;
        ended(&client, &operation).await;
        tell(&begun.elapsed().as_secs_f64().to_string());
        agent.stop().await.unwrap();
        std::fs::remove_dir_all(state_dir).unwrap();
    });
}

/// Waits for an operation, which has to succeed.
pub(crate) async fn ended(client: &Client, name: &str) -> v1::Operation {
    loop {
        let waited = client.wait_operation(name, Duration::from_mins(1)).await.unwrap();
        let operation = waited.operation.unwrap();
        if operation.done {
            assert_eq!(operation.result(), v1::OperationResult::Succeeded, "{operation:?}");
            return operation;
        }
    }
}
