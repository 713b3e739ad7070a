//! Every SET from every state, for every set of capabilities, against the state machine.

use super::*;
use vfio_checkpoint_device::sim::Hop;
use vfio_checkpoint_fsm::{Capabilities, Walk, path};

/// A device in a state, with a complete stream written where that is RESUMING.
fn device_in(migration: Capabilities, state: State, stream: &[u8]) -> (SimDevice, SimHandle) {
    let (device, _) = device(SimConfig { migration, ..small() });
    let mut handle = device.open().unwrap();
    match state {
        State::Error => device.force_error(),
        State::Resuming => write_all(&mut *restore_stream(&mut handle), stream, 1 << 20).unwrap(),
        State::Stop
        | State::Running
        | State::StopCopy
        | State::RunningP2p
        | State::PreCopy
        | State::PreCopyP2p => drop(set(&mut handle, state)),
    }
    device.take_hops();
    (device, handle)
}

#[test]
fn every_set_walks_as_the_state_machine_says() {
    let (source, _) = device(small());
    let stream = stop_copy(&mut source.open().unwrap());
    for migration in Capabilities::ALL {
        for from in State::ALL.into_iter().filter(|state| migration.supports(*state)) {
            for to in State::ALL {
                let (device, mut handle) = device_in(migration, from, &stream);
                let answer = handle.set_state(to);
                let hops = device.take_hops();
                let context = format!("{migration}: {from} -> {to}");
                match path(migration, from, to) {
                    Walk::NoOp => {
                        assert!(answer.unwrap().is_none(), "{context}");
                        assert_eq!((device.state(), hops.len()), (from, 0), "{context}");
                    }
                    Walk::Forbidden(_) => {
                        assert_eq!(errno(answer), libc::EINVAL, "{context}");
                        assert_eq!((device.state(), hops.len()), (from, 0), "{context}");
                    }
                    Walk::Path(path) => {
                        let stream = answer.unwrap();
                        let expected: Vec<Hop> = path.iter().map(|arc| Hop { arc, errno: None }).collect();
                        assert_eq!(hops, expected, "{context}");
                        assert_eq!(handle.state().unwrap(), to, "{context}");
                        let saves = matches!(stream, Some(DataStream::Save(_)));
                        let restores = matches!(stream, Some(DataStream::Restore(_)));
                        assert_eq!(saves || restores, path.opens_stream(), "{context}");
                        assert_eq!(restores, path.opens_stream() && to == State::Resuming, "{context}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_walk_that_fails_stays_where_the_failed_hop_began() {
    let (device, _) = device(small());
    let mut handle = device.open().unwrap();
    let _stream = restore_stream(&mut handle);
    device.take_hops();
    assert_eq!(errno(handle.set_state(State::StopCopy)), libc::EINVAL);
    assert_eq!(handle.state().unwrap(), State::Resuming);
    let hops = device.hops();
    assert_eq!(hops.len(), 1);
    assert_eq!(hops[0].arc.to_string(), "RESUMING -> STOP");
    assert_eq!(hops[0].errno, Some(libc::EINVAL));
}

#[test]
fn one_stream_serves_a_whole_saving_session_and_no_more() {
    let (device, _) = device(small());
    let mut handle = device.open().unwrap();
    let mut stream = save_stream(&mut handle, State::PreCopy);
    let mut buffer = [0; 100];
    for state in [State::PreCopyP2p, State::PreCopy, State::PreCopyP2p, State::StopCopy] {
        assert!(set(&mut handle, state).is_none());
        assert_eq!(stream.read(&mut buffer).unwrap(), Read::Bytes(100), "{state}");
    }
    set(&mut handle, State::Stop);
    assert_eq!(errno(stream.read(&mut buffer)), libc::ENODEV);
    // A later session has a stream of its own; the old one does not come back to life.
    let mut later = save_stream(&mut handle, State::StopCopy);
    assert_eq!(errno(stream.read(&mut buffer)), libc::ENODEV);
    assert_eq!(later.read(&mut buffer).unwrap(), Read::Bytes(100));
    assert_eq!(&buffer[..8], b"VCSIMDEV");
}

#[test]
fn error_is_left_by_a_reset_only() {
    let (device, _) = device(small());
    let mut handle = device.open().unwrap();
    let mut stream = save_stream(&mut handle, State::PreCopy);
    device.force_error();
    assert_eq!(handle.state().unwrap(), State::Error);
    assert_eq!(errno(stream.read(&mut [0; 10])), libc::ENODEV);
    assert_eq!(errno(stream.precopy_info()), libc::EINVAL);
    for target in State::ALL {
        assert_eq!(errno(handle.set_state(target)), libc::EINVAL);
    }
    handle.reset().unwrap();
    assert_eq!(handle.state().unwrap(), State::Running);
}
