//! Devices that fail on their way to RUNNING. A device that was reset runs, too, and so does the one that was first of a set:
//! only what is on record tells them from a restored state that runs.

use std::env;
use std::sync::Arc;

use vfio_checkpoint_device::fault::{Fault, FaultyDevice};
use vfio_checkpoint_device::sim::{SimConfig, SimDevice};
use vfio_checkpoint_device::vfio_user::server::{PciFunction, Server, ServerOptions, SocketFile};
use vfio_checkpoint_device::{Inline, Threads};
use vfio_checkpoint_fsm::State;
use vfio_checkpoint_proto::v1;

use crate::children::this_program;
use crate::every::{check, kill_at, state_lost};
use crate::figure;
use crate::job::{Job, Kind, done};
use crate::process::Process;
use crate::steps::Found;
use crate::world::{Content, MEMORY, World};

/// Says to this test program that it is a device process, and where its socket is.
const DEVICE: &str = "KILL_TEST_DEVICE";
/// The seed of its device.
const SEED: &str = "KILL_TEST_SEED";
/// Where the first SET to RUNNING leaves it, which fails.
const LANDING: &str = "KILL_TEST_LANDING";

/// Serves a device whose first SET to RUNNING fails. Run by the other tests, in a process of its own; by itself it has
/// nothing to do.
#[test]
fn a_device_that_will_be_killed() {
    let Some(socket) = env::var_os(DEVICE) else { return };
    let config = SimConfig::from_spec(&format!("seed={},{MEMORY}", env::var(SEED).unwrap())).unwrap();
    let vectors = config.pci.map_or((0, 0), |pci| (pci.msi_vectors, pci.msix_vectors));
    let function = PciFunction { msi_vectors: vectors.0, msix_vectors: vectors.1, ..PciFunction::default() };
    let landing = env::var(LANDING).unwrap();
    let landing = State::ALL.into_iter().find(|state| state.to_string() == landing).unwrap();
    let fault = Fault::Set { target: State::Running, landing, errno: libc::EIO };
    let slot = SimDevice::new(config, Arc::new(Threads::new())).unwrap();
    let device = FaultyDevice::new(Box::new(slot.open().unwrap()), &[fault], Inline::new(1).time());
    let (_file, listener) = SocketFile::bind(socket.as_ref()).unwrap();
    let options = ServerOptions { function, ..ServerOptions::default() };
    let server = Server::new(Box::new(device), listener, options).unwrap();
    eprintln!("listening on it");
    server.run().unwrap();
}

impl World {
    /// Puts another device process in the place of one: its first SET to RUNNING fails.
    async fn make_fail(&mut self, index: usize, landing: State) {
        self.kill_agent();
        self.kill_device(index);
        let mut command = this_program("failing::a_device_that_will_be_killed");
        command.env(DEVICE, self.socket(index)).env(SEED, (index + 1).to_string());
        command.env(LANDING, landing.to_string());
        let mut process = Process::start("a device that fails", &mut command);
        process.wait_for("listening", |line| line.contains("listening on").then_some(())).await;
        self.put_device(index, process);
        self.start().await;
    }
}

/// A restore of one device, which fails to run and is reset.
#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_was_reset_after_its_restore_failed_is_not_told_as_restored() {
    let mut world = World::new(1, true).await;
    let steps = [
        // The journal says that it may run, and it does at the second try.
        ("restore: Resetting", 1, Found::Done),
        ("before commit of BEGUN", 2, Found::Done),
        ("after commit of BEGUN", 2, Found::Undone),
        ("read back", 1, Found::Undone),
        ("before commit of ENDED", 1, Found::Undone),
    ];
    for (point, times, found) in steps {
        world.make_fail(0, State::Resuming).await;
        let job = Job::new(Kind::Restore, 1);
        world.arm(point, times).await;
        let driving = job.driven(&world).await;
        world.stopped(point).await;
        world.kill_agent();
        driving.abort();
        world.start().await;
        eprintln!("killed at {point}: {found:?}");
        check(&world, &job, found, true).await;
    }
    figure(&format!(
        "{} kills around the reset of a restore that failed: none told as restored",
        steps.len()
    ));
}

/// A restore of two that is reset before any of them runs. The process of the one dies with the agent: the other was reset, and
/// runs as nobody that was known before.
#[tokio::test(flavor = "multi_thread")]
async fn half_of_a_set_that_was_reset_is_not_told_as_restored() {
    let mut world = World::new(2, true).await;
    world.make_fail(0, State::Resuming).await;
    let job = Job::new(Kind::Restore, 2);
    kill_at(&mut world, &job, "read back").await;
    world.kill_device(1);
    world.start_device(1, &format!("sim:seed=2,{MEMORY}")).await;
    world.start().await;
    let client = world.client().await;
    let name = job.begin(&client, world.manifest.as_ref()).await.unwrap().name;
    let ended = done(&client, &name).await.unwrap();
    state_lost(Found::Undone, &ended);
    let (now, brought) = (world.devices(&client).await.remove(0), &ended.devices[0]);
    assert_ne!(now.logical_device, brought.logical_device, "{now:?}");
    assert_eq!(world.contents(&client).await, [Content::Fresh; 2]);
    figure("1 set that was reset and of which half was lost: not told as restored");
}

/// A restore of two, of which one runs and the other does not: both wait for somebody to decide, whatever happens to the
/// agent.
#[tokio::test(flavor = "multi_thread")]
async fn a_set_that_partly_runs_stays_quarantined() {
    let mut world = World::new(2, true).await;
    let steps = [("after commit of BEGUN", 2), ("read back", 1), ("after commit of ENDED", 1)];
    for (point, times) in steps {
        world.make_fail(1, State::RunningP2p).await;
        let job = Job::new(Kind::Restore, 2);
        world.arm(point, times).await;
        let driving = job.driven(&world).await;
        world.stopped(point).await;
        world.kill_agent();
        driving.abort();
        world.start().await;
        eprintln!("killed at {point}");
        let client = world.client().await;
        let name = job.begin(&client, world.manifest.as_ref()).await.unwrap().name;
        let ended = done(&client, &name).await.unwrap();
        assert_eq!(ended.result(), v1::OperationResult::Failed, "{ended:?}");
        assert_eq!(ended.outcome(), v1::StateOutcome::StateLost, "{ended:?}");
        let runs = world.devices(&client).await.remove(0);
        assert_eq!(runs.logical_device, ended.devices[0].logical_device, "{point}: it runs on as what it is");
        for device in world.devices(&client).await {
            assert_eq!(device.operation, "", "{device:?}");
            assert_eq!(device.standing(), v1::DeviceStanding::Quarantined, "{device:?}");
            let request = v1::ResetDeviceRequest {
                name: device.name,
                mode: v1::ResetMode::DiscardState.into(),
                ..Default::default()
            };
            assert!(client.reset_device(request).await.unwrap().state_lost);
        }
        assert_eq!(world.contents(&client).await, [Content::Fresh; 2]);
    }
    figure(&format!(
        "{} kills around the quarantine of a set that partly ran: quarantined still",
        steps.len()
    ));
}
