//! Open, duplicate, close, reset: what survives what.

use super::*;
use vfio_checkpoint_device::sim::{SizeReport, Workload};

#[test]
fn one_opener_at_a_time() {
    let (device, _) = device(small());
    let first = device.open().unwrap();
    assert_eq!(errno(device.open()), libc::EBUSY);
    let second = first.duplicate();
    drop(first);
    assert_eq!(errno(device.open()), libc::EBUSY);
    assert_eq!((device.handles(), device.close_resets()), (1, 0));
    drop(second);
    assert_eq!((device.handles(), device.close_resets()), (0, 1));
    device.open().unwrap();
}

#[test]
fn a_duplicate_keeps_the_session_alive() {
    let (device, _) = device(small());
    let mut first = device.open().unwrap();
    let mut second = first.duplicate();
    let mut stream = save_stream(&mut first, State::PreCopy);
    drop(first);
    assert_eq!(stream.read(&mut [0; 10]).unwrap(), Read::Bytes(10));
    assert_eq!(second.state().unwrap(), State::PreCopy);
    set(&mut second, State::StopCopy);
    assert_eq!(stream.read(&mut [0; 10]).unwrap(), Read::Bytes(10));
}

#[test]
fn the_last_close_resets() {
    let (device, time) = device(SimConfig {
        workload: Workload { dirty_bytes_per_second: 4096, working_set_bytes: None },
        ..small()
    });
    let pristine = device.digest();
    let mut handle = device.open().unwrap();
    time.advance(ms(5000));
    device.set_scratch(7);
    let mut stream = save_stream(&mut handle, State::StopCopy);
    assert_ne!(device.digest(), pristine);
    drop(handle);
    assert_eq!(errno(stream.read(&mut [0; 10])), libc::ENODEV);
    assert_eq!((device.state(), device.digest()), (State::Running, pristine));
    assert_eq!((device.resets(), device.close_resets()), (0, 1));
}

#[test]
fn without_a_reset_on_close_the_state_stays_and_the_streams_do_not() {
    let (device, _) = device(SimConfig { reset_on_last_close: false, ..small() });
    device.set_scratch(7);
    // STOP_COPY: reopened without a stream, but one can be had by way of STOP.
    let mut handle = device.open().unwrap();
    let mut stream = save_stream(&mut handle, State::StopCopy);
    drop(handle);
    assert_eq!(errno(stream.read(&mut [0; 10])), libc::ENODEV);
    let mut handle = device.open().unwrap();
    assert_eq!((handle.state().unwrap(), device.scratch()), (State::StopCopy, 7));
    assert!(set(&mut handle, State::StopCopy).is_none());
    set(&mut handle, State::Stop);
    drop(save_stream(&mut handle, State::StopCopy));
    set(&mut handle, State::Running);
    // PRE_COPY: there is nothing to hand the rest out on; going back works.
    let _ = save_stream(&mut handle, State::PreCopy);
    drop(handle);
    let mut handle = device.open().unwrap();
    assert_eq!(errno(handle.set_state(State::StopCopy)), libc::EINVAL);
    assert_eq!(handle.state().unwrap(), State::PreCopyP2p);
    set(&mut handle, State::Running);
    // RESUMING: nothing but a reset.
    let _ = restore_stream(&mut handle);
    drop(handle);
    let mut handle = device.open().unwrap();
    for target in [State::Stop, State::Running, State::RunningP2p, State::StopCopy, State::PreCopy] {
        assert_eq!(errno(handle.set_state(target)), libc::EINVAL);
    }
    assert_eq!(handle.state().unwrap(), State::Resuming);
    handle.reset().unwrap();
    assert_eq!((handle.state().unwrap(), device.scratch()), (State::Running, 0));
    assert_eq!((device.resets(), device.close_resets()), (1, 0));
}

#[test]
fn a_reset_loses_the_state_and_ends_everything() {
    let (device, _) = device(small());
    let pristine = device.digest();
    let mut handle = device.open().unwrap();
    device.write_memory(3, b"precious").unwrap();
    device.set_scratch(9);
    let mut stream = save_stream(&mut handle, State::PreCopy);
    handle.reset().unwrap();
    assert_eq!(device.digest(), pristine);
    assert_eq!(handle.state().unwrap(), State::Running);
    assert_eq!(errno(stream.read(&mut [0; 10])), libc::ENODEV);
    assert_eq!(device.resets(), 1);
}

#[test]
fn a_loaded_state_does_not_outlive_a_reset() {
    let (source, _) = device(SimConfig { seed: 5, ..small() });
    let (target, _) = device(SimConfig { seed: 6, ..small() });
    let pristine = target.digest();
    let blob = stop_copy(&mut source.open().unwrap());
    let mut handle = target.open().unwrap();
    load(&mut handle, &blob);
    assert_ne!(target.digest(), pristine);
    handle.reset().unwrap();
    assert_eq!(target.digest(), pristine, "the device's own seed");
}

#[test]
fn what_a_device_lacks_it_refuses() {
    let (device, _) = device(SimConfig {
        reset: false,
        data_size: SizeReport::Unknown,
        pci: None,
        dma: vfio_checkpoint_device::sim::SimDma { log: None, ..Default::default() },
        ..small()
    });
    let mut handle = device.open().unwrap();
    let capabilities = *handle.capabilities();
    assert_eq!(capabilities.to_string(), "STOP_COPY|P2P|PRE_COPY");
    assert_eq!(errno(handle.reset()), libc::EINVAL);
    assert_eq!(device.resets(), 0);
    assert!(matches!(handle.data_size(), Err(DeviceError::Absent { .. })));
    assert!(handle.dma_log().is_none());
    assert!(handle.config_space().is_none());
}

#[test]
fn a_configuration_is_checked_field_by_field() {
    use vfio_checkpoint_device::IovaRange;
    use vfio_checkpoint_device::sim::{LogPages, Precopy, Reinit, SimDma, SimPci};
    use vfio_checkpoint_fsm::Capabilities;

    let base = SimConfig::default;
    let ranges = |ranges: &[(u64, u64)]| SimDma {
        ranges: ranges.iter().map(|(start, length)| IovaRange::new(*start, *length).unwrap()).collect(),
        ..SimDma::default()
    };
    let reinit = Precopy { reinit: Some(Reinit { after_bytes: 0, initial_bytes: 0 }), ..Precopy::default() };
    for (config, field) in [
        (SimConfig { name: String::new(), ..base() }, "name"),
        (SimConfig { memory_bytes: 0, ..base() }, "memory_bytes"),
        (SimConfig { memory_bytes: (1 << 40) + 1, ..base() }, "memory_bytes"),
        (SimConfig { page_bytes: 2048, ..base() }, "page_bytes"),
        (SimConfig { page_bytes: 5000, ..base() }, "page_bytes"),
        (SimConfig { page_bytes: 1 << 17, ..base() }, "page_bytes"),
        (
            SimConfig { precopy: Precopy { initial_bytes: Some(1 << 30), ..Precopy::default() }, ..base() },
            "precopy.initial_bytes",
        ),
        (SimConfig { precopy: reinit, ..base() }, "precopy.reinit.initial_bytes"),
        (
            SimConfig { precopy: reinit, migration: Capabilities { p2p: true, pre_copy: false }, ..base() },
            "precopy.reinit",
        ),
        (
            SimConfig {
                workload: Workload { dirty_bytes_per_second: 1 << 41, working_set_bytes: None },
                ..base()
            },
            "workload.dirty_bytes_per_second",
        ),
        (
            SimConfig {
                workload: Workload { dirty_bytes_per_second: 0, working_set_bytes: Some(0) },
                ..base()
            },
            "workload.working_set_bytes",
        ),
        (SimConfig { dma: ranges(&[(1, 4096)]), ..base() }, "dma.ranges"),
        (SimConfig { dma: ranges(&[(0, 8192), (4096, 4096)]), ..base() }, "dma.ranges"),
        (SimConfig { dma: ranges(&[(0, 1 << 39)]), ..base() }, "dma.ranges"),
        (
            SimConfig { dma: SimDma { bytes_per_second: u64::MAX, ..SimDma::default() }, ..base() },
            "dma.bytes_per_second",
        ),
        (
            SimConfig {
                dma: SimDma { log: Some(LogPages { min_bytes: 8192, max_bytes: 4096 }), ..SimDma::default() },
                ..base()
            },
            "dma.log.min_bytes",
        ),
        (
            SimConfig { pci: Some(SimPci { msi_vectors: 3, ..SimPci::default() }), ..base() },
            "pci.msi_vectors",
        ),
        (
            SimConfig { pci: Some(SimPci { msix_vectors: 2049, ..SimPci::default() }), ..base() },
            "pci.msix_vectors",
        ),
    ] {
        let error = SimDevice::new(config, Arc::new(VirtualTime::default())).unwrap_err();
        assert_eq!(error.field, field, "{error}");
    }
}

#[test]
fn a_device_that_failed_alone_is_reset_on_opening() {
    for reset_on_last_close in [true, false] {
        let (device, _) = device(SimConfig { reset_on_last_close, ..small() });
        device.force_error();
        let mut handle = device.open().unwrap();
        let expected = if reset_on_last_close { State::Running } else { State::Error };
        assert_eq!(handle.state().unwrap(), expected);
        assert_eq!(device.handles(), 1);
    }
}

#[test]
fn memory_is_written_in_running_states_within_bounds() {
    use vfio_checkpoint_device::sim::SimMemoryError;

    let (device, _) = device(SimConfig { overlay_limit_bytes: PAGE, ..small() });
    let memory_bytes = 10 * PAGE + 100;
    let past = SimMemoryError::OutOfRange { memory_bytes };
    assert_eq!(device.write_memory(memory_bytes - 1, &[1, 2]), Err(past));
    assert_eq!(device.write_memory(u64::MAX, &[1, 2]), Err(past));
    assert_eq!(device.read_memory(memory_bytes, &mut [0]), Err(past));
    device.write_memory(0, b"arbitrary").unwrap();
    // The same page again takes no more room.
    device.write_memory(0, b"otherwise").unwrap();
    assert_eq!(device.write_memory(PAGE, b"arbitrary"), Err(SimMemoryError::NoRoom));
    let mut handle = device.open().unwrap();
    set(&mut handle, State::Stop);
    assert_eq!(device.write_memory(0, &[1]), Err(SimMemoryError::NotRunning { state: State::Stop }));
}
