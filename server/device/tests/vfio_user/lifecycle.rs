//! Who may connect, and what is left of a client that is gone.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::thread;

use rustix::event::EventfdFlags;
use vfio_checkpoint_device::vfio_user::codec::{
    Capabilities, Command, DmaMap, FeatureId, FeatureOperation, FeaturePayload, Limits, LogControl, SetIrqs,
    Version,
};
use vfio_checkpoint_device::vfio_user::server::{ServeError, ServerOptions, serve};
use vfio_checkpoint_fsm::State;

use crate::raw::Raw;
use crate::served::{Served, slot, small};

/// `VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER`.
const ARM: u32 = 1 << 2 | 1 << 5;
const MSIX: u32 = 2;

#[test]
fn a_second_client_is_closed_at_once_and_the_first_goes_on() {
    let served = Served::small();
    let mut first = served.attach();
    first.set_state(State::StopCopy).unwrap();
    for _ in 0..5 {
        Raw::new(served.connect()).assert_closed();
    }
    assert!(!first.read(100).unwrap().is_empty());
    assert_eq!(served.slot.resets(), 0);
}

#[test]
fn a_client_that_connects_again_is_served() {
    let served = Served::small();
    for round in 0..50 {
        let mut client = served.attach();
        assert_eq!(client.state(), State::Running);
        client.set_state(State::Stop).unwrap();
        drop(client);
        assert!(served.slot.resets() <= round + 1);
    }
    let _client = served.attach();
    assert_eq!(served.slot.resets(), 50);
}

/// Wherever the connection is lost: the device is reset, and the next client finds one that runs and works.
#[test]
fn the_device_is_reset_when_its_client_is_lost_in_any_state() {
    let served = Served::small();
    let mut resets = 0;
    for state in State::ALL {
        let mut client = served.attach();
        assert_eq!((client.state(), served.slot.resets()), (State::Running, resets));
        match state {
            State::Error => served.slot.force_error(),
            State::Stop
            | State::Running
            | State::StopCopy
            | State::Resuming
            | State::RunningP2p
            | State::PreCopy
            | State::PreCopyP2p => client.set_state(state).unwrap(),
        }
        match state {
            State::StopCopy | State::PreCopy | State::PreCopyP2p => drop(client.read(100)),
            State::Resuming => drop(client.write(b"half a stream")),
            State::Error | State::Stop | State::Running | State::RunningP2p => {}
        }
        drop(client);
        resets += 1;
    }
    let mut client = served.attach();
    assert_eq!((client.state(), served.slot.resets()), (State::Running, resets));
    client.set_state(State::StopCopy).unwrap();
    assert!(!client.read(100).unwrap().is_empty());
}

#[test]
fn a_client_leaves_neither_interrupts_nor_windows_nor_a_log() {
    let served = Served::small();
    let window =
        DmaMap { flags: DmaMap::READ | DmaMap::WRITE, offset: 0, iova: 0x1000, length_bytes: 0x1000 };
    let log = || FeaturePayload::LogStart(LogControl { page_bytes: 4096, ranges: vec![(0, 1 << 20)] });
    for _ in 0..3 {
        let mut client = served.attach();
        let eventfd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        assert!(!served.slot.raise_interrupt(0).unwrap(), "armed by the client before");
        let arm = SetIrqs { flags: ARM, index: MSIX, start: 0, count: 1, data: &[] };
        client.call(&Command::SetIrqs(arm), &[eventfd.as_fd()]).unwrap();
        assert!(served.slot.raise_interrupt(0).unwrap());
        client.write_region(7, 4, &[0x06, 0x04]).unwrap();
        client.call(&Command::DmaMap(window), &[]).unwrap();
        client.feature(FeatureId::DmaLoggingStart, FeatureOperation::Set, log(), 0).unwrap();
    }
    let mut client = served.attach();
    assert_eq!(client.read_region(7, 4, 2).unwrap(), [0, 0], "the command register is as it was");
}

#[test]
fn a_device_can_be_left_as_its_client_left_it() {
    let options = ServerOptions { reset_on_disconnect: false, ..ServerOptions::default() };
    let served = Served::new(small(), options);
    let mut client = served.attach();
    client.set_state(State::StopCopy).unwrap();
    drop(client);
    let mut client = served.attach();
    assert_eq!(client.state(), State::StopCopy);
    assert_eq!(client.read(100), Err(libc::EINVAL), "the stream went with its client");
    client.set_state(State::Running).unwrap();
    assert_eq!(served.slot.resets(), 0);
}

#[test]
fn who_only_looks_changes_nothing() {
    let served = Served::small();
    served.slot.set_scratch(7);
    for _ in 0..5 {
        drop(Raw::new(served.connect()));
    }
    let _client = served.attach();
    assert_eq!((served.slot.resets(), served.slot.scratch()), (0, 7));
}

#[test]
fn a_connection_that_says_nothing_makes_room() {
    let options =
        ServerOptions { handshake_timeout: std::time::Duration::from_millis(20), ..ServerOptions::default() };
    let served = Served::new(small(), options);
    Raw::new(served.connect()).assert_closed();
    // Neither is half a first message.
    let version = Command::Version(Version::ours(Capabilities::default()));
    let version = version.encode(1, false, Limits::default()).unwrap();
    for part in [1, 15, 16, 30] {
        let mut half = Raw::new(served.connect());
        half.send_bytes(&version[..part], &[]).unwrap();
        half.assert_closed();
    }
    served.attach().set_state(State::Stop).unwrap();
}

#[test]
fn a_server_ends_when_told_to_whatever_it_is_doing() {
    let idle = Served::small();
    idle.handle.stop();
    let handle = idle.slot.clone();
    assert!(idle.ended().is_ok());
    assert_eq!(handle.handles(), 0, "the device came back and was closed");

    let busy = Served::small();
    let mut client = busy.attach();
    client.set_state(State::PreCopy).unwrap();
    busy.handle.stop();
    client.assert_closed();
    let slot = busy.slot.clone();
    let device = busy.ended().unwrap();
    assert_eq!((slot.state(), slot.resets(), slot.handles()), (State::Running, 1, 1));
    drop(device);
}

#[test]
fn a_server_for_one_client_ends_with_it() {
    let served = Served::new(small(), ServerOptions { once: true, ..ServerOptions::default() });
    // Somebody who only looks is no client.
    drop(Raw::new(served.connect()));
    let client = served.attach();
    drop(client);
    assert!(served.ended().is_ok());
}

/// A device that panics takes its connection and its server down, not the process.
#[test]
fn a_panic_in_the_device_is_an_error_of_the_server() {
    #[derive(Debug)]
    struct Panics(vfio_checkpoint_device::sim::SimHandle);

    impl vfio_checkpoint_device::MigrationDevice for Panics {
        fn identity(&self) -> &vfio_checkpoint_device::Identity {
            self.0.identity()
        }
        fn fingerprint(&self) -> &vfio_checkpoint_device::Fingerprint {
            self.0.fingerprint()
        }
        fn capabilities(&self) -> &vfio_checkpoint_device::DeviceCapabilities {
            self.0.capabilities()
        }
        fn state(&mut self) -> Result<State, vfio_checkpoint_device::DeviceError> {
            panic!("a device that panics");
        }
        fn set_state(
            &mut self,
            target: State,
        ) -> Result<Option<vfio_checkpoint_device::DataStream>, vfio_checkpoint_device::DeviceError> {
            self.0.set_state(target)
        }
        fn data_size(
            &mut self,
        ) -> Result<vfio_checkpoint_device::DataSize, vfio_checkpoint_device::DeviceError> {
            self.0.data_size()
        }
        fn reset(&mut self) -> Result<(), vfio_checkpoint_device::DeviceError> {
            self.0.reset()
        }
        fn dma_log(&mut self) -> Option<&mut dyn vfio_checkpoint_device::DmaLog> {
            self.0.dma_log()
        }
        fn config_space(&mut self) -> Option<&mut dyn vfio_checkpoint_device::ConfigSpace> {
            self.0.config_space()
        }
    }

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("device.sock");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let (slot, _time) = slot(small());
    let device = Box::new(Panics(slot.open().unwrap()));
    let server = thread::spawn(move || serve(device, listener, ServerOptions::default()));
    let mut client = Raw::attach(UnixStream::connect(&path).unwrap());
    let ask = vfio_checkpoint_device::vfio_user::codec::FeatureMessage::new(
        FeatureId::MigDeviceState,
        FeatureOperation::Get,
        FeaturePayload::Empty,
    );
    client.send(&Command::Feature(ask.reply_room(8)), false, &[]);
    assert!(matches!(server.join().unwrap(), Err(ServeError::Panicked)));
    client.assert_closed();
}
