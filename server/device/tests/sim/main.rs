//! The simulated device through the interface that every backend has, and against the state machine.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking, its helpers included")]

mod activity;
mod lifecycle;
mod load;
mod precopy;
mod roundtrip;
mod states;

use std::sync::Arc;
use std::time::Duration;

use vfio_checkpoint_device::executor::VirtualTime;
use vfio_checkpoint_device::sim::{SimConfig, SimDevice, SimHandle};
use vfio_checkpoint_device::{DataStream, DeviceError, MigrationDevice, Read, RestoreStream, SaveStream};
use vfio_checkpoint_fsm::State;

const PAGE: u64 = 4096;

/// A device whose clock stands until the test moves it.
fn device(config: SimConfig) -> (SimDevice, Arc<VirtualTime>) {
    let time = Arc::new(VirtualTime::default());
    (SimDevice::new(config, time.clone()).unwrap(), time)
}

fn small() -> SimConfig {
    SimConfig { memory_bytes: 10 * PAGE + 100, ..SimConfig::default() }
}

fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

fn set(handle: &mut SimHandle, target: State) -> Option<DataStream> {
    handle.set_state(target).unwrap_or_else(|error| panic!("SET {target}: {error:?}"))
}

fn save_stream(handle: &mut SimHandle, target: State) -> Box<dyn SaveStream> {
    match set(handle, target) {
        Some(DataStream::Save(stream)) => stream,
        other => panic!("SET {target} gave {other:?}"),
    }
}

fn restore_stream(handle: &mut SimHandle) -> Box<dyn RestoreStream> {
    match set(handle, State::Resuming) {
        Some(DataStream::Restore(stream)) => stream,
        other => panic!("SET RESUMING gave {other:?}"),
    }
}

fn errno<T: std::fmt::Debug>(result: Result<T, DeviceError>) -> i32 {
    let error = result.unwrap_err();
    error.raw_os_error().unwrap_or_else(|| panic!("no errno: {error:?}"))
}

/// Reads until there is nothing for now, or no more, in pieces of `piece` bytes.
fn drain(stream: &mut dyn SaveStream, piece: usize, out: &mut Vec<u8>) -> Read {
    let mut buffer = vec![0xAA; piece];
    loop {
        match stream.read(&mut buffer).unwrap() {
            Read::Bytes(length) => out.extend_from_slice(&buffer[..length]),
            end @ (Read::Zero | Read::NothingNow) => return end,
        }
    }
}

/// A stop-copy out of whatever state the device is in; it stays in STOP_COPY.
fn stop_copy(handle: &mut SimHandle) -> Vec<u8> {
    let mut stream = save_stream(handle, State::StopCopy);
    let mut bytes = Vec::new();
    assert_eq!(drain(&mut *stream, 1 << 16, &mut bytes), Read::Zero);
    bytes
}

/// Writes a whole stream in pieces of `piece` bytes.
fn write_all(stream: &mut dyn RestoreStream, bytes: &[u8], piece: usize) -> Result<(), DeviceError> {
    for piece in bytes.chunks(piece) {
        assert_eq!(stream.write(piece)?, piece.len());
    }
    Ok(())
}

/// Loads a stream and runs.
fn load(handle: &mut SimHandle, bytes: &[u8]) {
    let mut stream = restore_stream(handle);
    write_all(&mut *stream, bytes, 1 << 16).unwrap();
    assert!(set(handle, State::Running).is_none());
}

/// All of the memory. For small devices.
fn memory(device: &SimDevice, bytes: u64) -> Vec<u8> {
    let mut memory = vec![0; usize::try_from(bytes).unwrap()];
    device.read_memory(0, &mut memory).unwrap();
    memory
}
