//! Every move from every state, with every set of states that a device can have: the answer over the socket is the
//! device's own, errno for errno, state for state, byte for byte.

use vfio_checkpoint_device::sim::SimConfig;
use vfio_checkpoint_device::{DataStream, MigrationDevice, Read};
use vfio_checkpoint_fsm::{Capabilities, State};

use crate::raw::Raw;
use crate::served::{paired, slot, small};

/// What a read or a write of the stream answers, in one form for both sides.
type Said = (Result<Vec<u8>, i32>, Result<(), i32>);

fn direct_stream(stream: &mut Option<DataStream>) -> Said {
    match stream {
        Some(DataStream::Save(save)) => {
            let mut buffer = vec![0; 5000];
            let read = match save.read(&mut buffer) {
                Ok(Read::Bytes(length)) => Ok(buffer[..length].to_vec()),
                Ok(Read::Zero) => Ok(Vec::new()),
                Ok(Read::NothingNow) => Err(libc::ENOMSG),
                Err(error) => Err(error.raw_os_error().unwrap()),
            };
            (read, Err(libc::EINVAL))
        }
        Some(DataStream::Restore(restore)) => {
            let written = restore.write(b"not a stream").map(drop);
            (Err(libc::EINVAL), written.map_err(|error| error.raw_os_error().unwrap()))
        }
        None => (Err(libc::EINVAL), Err(libc::EINVAL)),
    }
}

fn remote_stream(client: &mut Raw) -> Said {
    (client.read(5000), client.write(b"not a stream"))
}

#[test]
fn every_move_gives_the_same_answer_over_the_socket() {
    let mut compared = 0;
    for migration in Capabilities::ALL {
        let states =
            State::ALL.into_iter().filter(|&state| migration.supports(state) || state == State::Error);
        for from in states {
            for to in State::ALL {
                let config = SimConfig { migration, ..small() };
                let (near, _time) = slot(config.clone());
                let (far, _time) = slot(config);
                let mut direct = near.open().unwrap();
                let mut stream = None;
                let mut client = paired(&far);
                if from == State::Error {
                    near.force_error();
                    far.force_error();
                } else {
                    stream = direct.set_state(from).unwrap();
                    client.set_state(from).unwrap();
                }
                let what = format!("{from} to {to} with {migration}");

                let expected = direct.set_state(to).map_err(|error| error.raw_os_error().unwrap());
                let answered = client.set_state(to);
                assert_eq!(answered, expected.as_ref().map(drop).map_err(|errno| *errno), "{what}");
                assert_eq!(client.state(), direct.state().unwrap(), "{what}");
                assert_eq!(near.hops(), far.hops(), "{what}");
                if let Ok(Some(opened)) = expected {
                    stream = Some(opened);
                }
                assert_eq!(remote_stream(&mut client), direct_stream(&mut stream), "{what}");
                assert_eq!(near.digest(), far.digest(), "{what}");

                assert_eq!(client.reset(), direct.reset().map_err(|error| error.raw_os_error().unwrap()));
                assert_eq!(client.state(), State::Running, "{what}");
                assert_eq!(remote_stream(&mut client), direct_stream(&mut stream), "{what}, reset");
                compared += 1;
            }
        }
    }
    println!("{compared} moves compared");
    assert_eq!(compared, (5 + 6 + 6 + 8) * 8);
}

#[test]
fn a_state_that_does_not_exist_is_einval() {
    let (slot, _time) = slot(small());
    let mut client = paired(&slot);
    for number in [8, 9, 255, u32::MAX] {
        assert_eq!(client.set_state_number(number), Err(libc::EINVAL));
    }
    assert_eq!(client.state(), State::Running);
}

/// Two devices of a set reach the barrier before either stops.
#[test]
fn a_set_of_devices_goes_through_the_p2p_states() {
    let (one, _time) = slot(small());
    let (other, _time) = slot(small());
    let mut clients = [paired(&one), paired(&other)];
    for state in
        [State::PreCopy, State::PreCopyP2p, State::StopCopy, State::Stop, State::RunningP2p, State::Running]
    {
        for client in &mut clients {
            client.set_state(state).unwrap();
        }
        assert_eq!([one.state(), other.state()], [state; 2]);
    }
}
