//! The next agent is in this process, and not all that it works with works: a thread, the journal, the holder.
//!
//! Its devices and its holder are processes of their own, as everywhere here. What an agent in a process of its own cannot
//! show is looked at in the agent itself.

use std::time::Duration;

use vfio_checkpoint_client::call::Client;
use vfio_checkpoint_client::transfer::TakeState;
use vfio_checkpoint_fsm::State;
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_server::config::DeviceConfig;
use vfio_checkpoint_server::registry::{DeviceView, Standing};
use vfio_checkpoint_server::serve::Agent;

use crate::every::{kill_at, state_lost};
use crate::faulty::Faulty;
use crate::figure;
use crate::job::{Job, Kind, done, held};
use crate::steps::Found;
use crate::world::{Content, World};

/// How long the agent waits before it tries again to open what is not open.
pub(crate) const RETRY: Duration = Duration::from_secs(30);
/// How long it waits before it looks after its holder again.
const LOOK: Duration = Duration::from_secs(5);

pub(crate) async fn begin(world: &World, faulty: &Faulty) -> Agent {
    let mut config = world.config();
    // Else it would wait for its certificates as long as for its devices, and one could not be told from the other.
    config.tls.reload_interval = Some(Duration::from_hours(1));
    Agent::start(config, faulty.environment()).await.unwrap()
}

fn view(agent: &Agent, index: usize) -> DeviceView {
    agent.core().registry.all().nth(index).unwrap().view()
}

async fn kept(agent: &Agent) -> Vec<String> {
    agent.core().keeper.as_ref().unwrap().held().await.unwrap()
}

fn state(view: &DeviceView) -> Option<State> {
    view.state.map(|(state, _)| state)
}

fn keep_state(name: &str) -> v1::ResetDeviceRequest {
    let mode = v1::ResetMode::KeepState.into();
    v1::ResetDeviceRequest { name: name.to_owned(), mode, ..Default::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kept_device_is_not_reset_because_something_else_fails() {
    let mut world = World::new(1, true).await;
    for lane in ["adopt", "journal"] {
        world.kill_agent();
        let faulty = Faulty::new();
        faulty.break_lane(lane, 0);
        let agent = begin(&world, &faulty).await;
        let view = view(&agent, 0);
        assert!(matches!(view.standing, Standing::Unavailable(_)), "{lane}: {view:?}");
        assert_eq!(kept(&agent).await, ["nic0"], "{lane}");
        agent.stop().await.unwrap();
        world.start().await;
        let client = world.client().await;
        assert_eq!(world.contents(&client).await, [Content::Own], "{lane}");
    }
    figure("2 starts that could not adopt a device, for no fault of it: not reset");
}

/// A device that is adopted only at the second try: one that ran, one that was left stopped, and two that operations left
/// where they were, which end before their device is there.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_adopted_late_comes_with_its_record_and_is_brought_back() {
    let mut world = World::new(1, true).await;
    for (killed, comes_to, is_claimed) in [
        (None, State::Running, false),
        (Some((Kind::StoppedSave, "after commit of ENDED")), State::Stop, false),
        // It is on record that it stays stopped: its state may run elsewhere by now.
        (Some((Kind::StoppedSave, "after commit of STOPPED")), State::Stop, true),
        (Some((Kind::Save, "save: Draining")), State::Running, true),
    ] {
        let client = world.client().await;
        let before = world.devices(&client).await.remove(0).logical_device;
        match killed {
            Some((kind, point)) => kill_at(&mut world, &Job::new(kind, 1), point).await,
            None => world.kill_agent(),
        }
        let faulty = Faulty::new();
        faulty.gate(RETRY);
        faulty.break_lane("adopt", 0);
        let agent = begin(&world, &faulty).await;
        let client = world.client_of(&agent).await;
        let missing = view(&agent, 0);
        assert!(matches!(missing.standing, Standing::Unavailable(_)), "{missing:?}");
        faulty.mend();
        faulty.pass(RETRY);
        // Before it waits again it has done all that it does.
        faulty.waits(RETRY, 2).await;
        let back = view(&agent, 0);
        assert_eq!((state(&back), &back.standing), (Some(comes_to), &Standing::Ready), "{killed:?}");
        assert_eq!(back.record, missing.record, "{killed:?}");
        let now = world.devices(&client).await.remove(0);
        // Where an operation ended without its device, what is in there counts as somebody new.
        assert_eq!(now.logical_device == before, !is_claimed, "{killed:?}");
        if comes_to == State::Stop {
            assert!(!client.reset_device(keep_state(&now.name)).await.unwrap().state_lost);
        }
        assert_eq!(world.contents(&client).await, [Content::Own], "{killed:?}");
        agent.stop().await.unwrap();
        world.start().await;
    }
    figure("4 devices that were adopted late: with their records, and where these say");
}

/// A set was saved and left stopped, and half of it is lost with the agent. The other half may run elsewhere by now.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_kept_of_a_set_that_stays_stopped_stays_stopped() {
    let mut world = World::new(2, true).await;
    let job = Job::new(Kind::StoppedSave, 2);
    kill_at(&mut world, &job, "after commit of STOPPED").await;
    world.kill_device(1);
    world.start_device(1, "sim:seed=2,memory=256KiB").await;
    let agent = begin(&world, &Faulty::new()).await;
    let client = world.client_of(&agent).await;
    let name = job.begin(&client, None).await.unwrap().name;
    let ended = done(&client, &name).await.unwrap();
    state_lost(Found::Done, &ended);
    assert_eq!(ended.failure.as_ref().unwrap().device, "devices/nic1");
    let (first, second) = (view(&agent, 0), view(&agent, 1));
    assert_eq!((state(&first), first.standing), (Some(State::Stop), Standing::Ready));
    assert_eq!((state(&second), second.standing), (Some(State::Running), Standing::Ready));
    let left_stopped = [first.record, second.record].map(|record| record.unwrap().left_stopped);
    assert_eq!(left_stopped, [true, false], "on record is what is");
    assert!(!client.reset_device(keep_state("devices/nic0")).await.unwrap().state_lost);
    assert_eq!(world.contents(&client).await, [Content::Own, Content::Fresh]);
    agent.stop().await.unwrap();
    figure("1 set that stays stopped of which half was lost: the other half stays stopped");
}

/// A save of one device, held.
async fn hold(client: &Client, device: &str) -> String {
    let request = v1::StartSaveRequest {
        devices: vec![device.to_owned()],
        memory_capture: v1::MemoryCapture::None.into(),
        after: v1::AfterSave::Hold.into(),
        ..Default::default()
    };
    let name = client.start_save(request).await.unwrap().operation.unwrap().name;
    let TakeState { mut taker, .. } = TakeState::open(client, &name.parse().unwrap()).await.unwrap();
    while taker.next().await.unwrap().is_some() {}
    taker.complete().await.unwrap();
    assert!(held(client, &name).await.unwrap());
    name
}

/// A stop leaves what is held to a holder that has its device, not to one that could have it.
#[tokio::test(flavor = "multi_thread")]
async fn a_stop_undoes_the_holds_whose_devices_nobody_keeps() {
    let mut world = World::new(1, true).await;
    world.kill_agent();
    let mut config = world.config();
    // It is in the agent itself, so nobody can keep it.
    config.devices.push(DeviceConfig {
        name: "inside".to_owned(),
        address: "sim:seed=9,memory=256KiB".to_owned(),
        path: None,
        owner_pod: String::new(),
    });
    for is_new in [false, true] {
        let faulty = Faulty::new();
        // A new holder gets nothing before the agent looks after it.
        faulty.gate(LOOK);
        let agent = Agent::start(config.clone(), faulty.environment()).await.unwrap();
        let client = world.client_of(&agent).await;
        let (inside, outside) = (hold(&client, "devices/inside").await, hold(&client, "devices/nic0").await);
        if is_new {
            world.kill_holder();
            world.start_holder().await;
            // The first call finds out that the holder is another one.
            let keeper = agent.core().keeper.clone().unwrap();
            assert!(keeper.held().await.is_err());
            assert!(kept(&agent).await.is_empty());
        }
        agent.stop().await.unwrap();

        let agent = Agent::start(config.clone(), faulty.environment()).await.unwrap();
        let client = world.client_of(&agent).await;
        let mut undone = vec![inside];
        if is_new {
            undone.push(outside);
        } else {
            assert!(held(&client, &outside).await.unwrap(), "it goes on being held");
            client.resume(v1::ResumeRequest { operation: outside.clone() }).await.unwrap();
            let ended = done(&client, &outside).await.unwrap();
            assert_eq!(ended.result(), v1::OperationResult::Succeeded, "{ended:?}");
        }
        for name in undone {
            let ended = done(&client, &name).await.unwrap();
            assert_eq!(ended.failure.as_ref().unwrap().reason, "SHUTTING_DOWN", "{ended:?}");
            assert_eq!(ended.outcome(), v1::StateOutcome::Preserved, "{ended:?}");
        }
        agent.stop().await.unwrap();
    }
    figure("2 stops with 2 holds each: 1 left to the holder that has its device, 3 undone");
}
