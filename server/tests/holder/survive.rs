//! A device whose agent is killed: with the holder it goes on, without it is reset.

use std::env;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use rustix::process::Signal;
use vfio_checkpoint_device::address::{Access, Keepsake, Opened};
use vfio_checkpoint_device::sim::SimDevice;
use vfio_checkpoint_device::vfio_user::codec::{Command, Limits};
use vfio_checkpoint_device::{Call, DeviceAddress, MigrationDevice, Read as Got, Threads};
use vfio_checkpoint_fsm::State;
use vfio_checkpoint_server::holder::{HolderClient, Label};

use crate::processes::{AGENT, PATIENCE, Place, boot_id, key};

const KEY: &str = "nic-0";

fn keeping() -> Access {
    Access { keep: true, ..Access::default() }
}

/// The whole state of a device that is stopped or runs. It is left in STOP.
fn state_of(device: &mut dyn MigrationDevice) -> Vec<u8> {
    let target = State::StopCopy;
    let mut stream = device.set_state(target).unwrap().unwrap().into_save(Call::SetState(target)).unwrap();
    let (mut state, mut buffer) = (Vec::new(), vec![0; 64 * 1024]);
    loop {
        match stream.read(&mut buffer).unwrap() {
            Got::Bytes(bytes) => state.extend_from_slice(&buffer[..bytes]),
            Got::Zero => break,
            Got::NothingNow => panic!("nothing now, in STOP_COPY"),
        }
    }
    device.set_state(State::Stop).unwrap();
    state
}

/// Loads a state. The device is left in STOP.
fn load(device: &mut dyn MigrationDevice, state: &[u8]) {
    let target = State::Resuming;
    let mut stream = device.set_state(target).unwrap().unwrap().into_restore(Call::SetState(target)).unwrap();
    let mut left = state;
    while !left.is_empty() {
        left = &left[stream.write(left).unwrap()..];
    }
    device.set_state(State::Stop).unwrap();
}

fn sim(text: &str) -> SimDevice {
    let DeviceAddress::Sim(address) = text.parse().unwrap() else { panic!("{text}") };
    SimDevice::new(address.config().unwrap(), Arc::new(Threads::new())).unwrap()
}

/// A state that no reset brings about: another seed's memory.
fn precious() -> (Vec<u8>, [u8; 32]) {
    let source = sim("sim:seed=9,memory=1MiB");
    let state = state_of(&mut source.open().unwrap());
    (state, digest_of(&sim("sim:seed=9,memory=1MiB"), None))
}

/// The digest of a device, after a state was loaded into it if there is one.
fn digest_of(device: &SimDevice, state: Option<&[u8]>) -> [u8; 32] {
    let mut handle = device.open().unwrap();
    match state {
        Some(state) => load(&mut handle, state),
        None => drop(handle.set_state(State::Stop).unwrap()),
    }
    device.digest()
}

fn digest_of_state(state: &[u8]) -> [u8; 32] {
    digest_of(&sim("sim:seed=3,memory=1MiB"), Some(state))
}

/// Opens the device process' device, brings the precious state into it, leaves it in STOP, has it held if that is its job,
/// and waits to be killed. Run by the other tests, in a process of its own; by itself it has nothing to do.
#[test]
fn an_agent_that_will_be_killed() {
    let Ok(job) = env::var(AGENT) else { return };
    let (job, folder) = job.split_once(' ').unwrap();
    let folder = Path::new(folder);
    let device: DeviceAddress =
        format!("vfio-user:{}", folder.join("device.sock").display()).parse().unwrap();
    let Opened { mut device, keepsake, .. } = device.open(keeping()).unwrap();
    let keepsake = keepsake.unwrap();
    let client = (job == "held").then(|| {
        let mut client = HolderClient::connect(&folder.join("hold/agent.sock"), PATIENCE).unwrap();
        // Put before anything happens to the device, as an agent should.
        assert!(!put(&mut client, &keepsake));
        client
    });
    drop(keepsake);
    load(&mut *device, &precious().0);
    let mut ready = UnixStream::connect(folder.join("ready.sock")).unwrap();
    // Killed here.
    let _ = ready.read(&mut [0]);
    drop((client, device));
}

fn put(client: &mut HolderClient, keepsake: &Keepsake) -> bool {
    let label = Label::of(key(KEY), keepsake, boot_id()).unwrap();
    let fds: Vec<_> = keepsake.fds.iter().map(AsFd::as_fd).collect();
    client.put(&label, &fds).unwrap()
}

#[test]
fn with_the_holder_a_device_outlives_its_agent() {
    let place = Place::new();
    let (_process, address) = place.device_process();
    let _holder = place.holder(&[]);
    place.agent("held").kill();

    // The next agent finds it as it was: in STOP, with the state that was loaded. A reset leaves it in RUNNING.
    let mut client = place.client();
    let labels = client.list().unwrap();
    assert_eq!(labels.iter().map(|label| label.key.as_str()).collect::<Vec<_>>(), [KEY]);
    assert_eq!(labels[0].address, address);
    let taken = client.take(&key(KEY)).unwrap();
    assert_eq!(taken.handed_out, 0);
    let Opened { mut device, keepsake, .. } =
        address.adopt(taken.into_keepsake().unwrap(), keeping()).unwrap();
    assert_eq!(device.state().unwrap(), State::Stop);
    assert_eq!(digest_of_state(&state_of(&mut *device)), precious().1);
    assert!(put(&mut client, &keepsake.unwrap()), "in place of the first");
    drop((device, client));

    // And the one after that. One that took the device and died before it left a keepsake of its own is counted.
    let mut client = place.client();
    let dead = UnixStream::from(client.take(&key(KEY)).unwrap().fds.remove(0));
    // Its first question, of the third owner's part of the ids, is answered and the answer is not read.
    let question = Command::GetInfo { argsz: 16 }.encode(2 * 4096, false, Limits::default()).unwrap();
    (&dead).write_all(&question).unwrap();
    drop(dead);
    let taken = client.take(&key(KEY)).unwrap();
    assert_eq!(taken.handed_out, 1);
    let Opened { mut device, .. } = address.adopt(taken.into_keepsake().unwrap(), Access::default()).unwrap();
    assert_eq!(device.state().unwrap(), State::Stop);
    assert_eq!(digest_of_state(&state_of(&mut *device)), precious().1);

    // Once it is dropped, the last close is the agent's again.
    assert!(client.remove(&key(KEY)).unwrap());
    assert!(!client.remove(&key(KEY)).unwrap());
    drop(device);
    was_reset(&address);
}

fn was_reset(address: &DeviceAddress) {
    let mut device = address.open(Access::default()).unwrap().device;
    assert_eq!(device.state().unwrap(), State::Running);
    let digest = digest_of_state(&state_of(&mut *device));
    assert_ne!(digest, precious().1);
    assert_eq!(digest, digest_of(&sim("sim:memory=1MiB"), None), "as at power-on");
}

#[test]
fn without_the_holder_the_same_death_resets_the_device() {
    let place = Place::new();
    let (_process, address) = place.device_process();
    place.agent("not-held").kill();
    was_reset(&address);
}

#[test]
fn a_holder_that_ends_says_what_it_lets_go() {
    let place = Place::new();
    let (_process, address) = place.device_process();
    let holder = place.holder(&[]);
    place.agent("held").kill();
    holder.signal(Signal::TERM);
    let (code, said) = holder.ended();
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains(KEY) && said.contains("the last close resets it"), "{said}");
    assert!(!place.socket().exists());
    was_reset(&address);
}

/// The agent that has the device open is the other holder of it: it goes on, and fills the next holder.
#[test]
fn a_holder_that_is_killed_takes_nothing_from_a_living_agent() {
    let place = Place::new();
    let (_process, address) = place.device_process();
    let holder = place.holder(&[]);
    let Opened { mut device, keepsake, .. } = address.open(keeping()).unwrap();
    let keepsake = keepsake.unwrap();
    let mut client = place.client();
    assert!(!put(&mut client, &keepsake));
    load(&mut *device, &precious().0);
    holder.kill();
    assert!(client.list().is_err());
    assert!(client.is_closed());
    assert_eq!(device.state().unwrap(), State::Stop);

    let _next = place.holder(&[]);
    let mut client = place.client();
    assert!(client.list().unwrap().is_empty());
    assert!(!put(&mut client, &keepsake));
    drop((device, keepsake));
    let taken = client.take(&key(KEY)).unwrap().into_keepsake().unwrap();
    let mut device = address.adopt(taken, Access::default()).unwrap().device;
    assert_eq!(digest_of_state(&state_of(&mut *device)), precious().1);
}
