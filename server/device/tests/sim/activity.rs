//! What a running device does by itself: its workload, its DMA and the log of it, its interrupts.

use super::*;
use std::os::fd::{AsFd, OwnedFd};
use vfio_checkpoint_device::sim::{LogPages, SimDma, SimPci, Workload};
use vfio_checkpoint_device::{DirtyBitmap, InterruptKind, IovaRange, PciCommand, Rearm};

fn range(start: u64, length: u64) -> IovaRange {
    IovaRange::new(start, length).unwrap()
}

/// Two ranges of guest memory, 16 pages and 4; one page is written every millisecond.
fn writing(log: LogPages) -> SimConfig {
    SimConfig {
        dma: SimDma {
            ranges: vec![range(0x10_0000, 16 * PAGE), range(0x80_0000, 4 * PAGE)],
            bytes_per_second: 1000 * PAGE,
            log: Some(log),
        },
        ..small()
    }
}

fn report(handle: &mut SimHandle, range: IovaRange, page: u64) -> Result<DirtyBitmap, DeviceError> {
    let mut bitmap = DirtyBitmap::new(range, page)?;
    handle.dma_log().unwrap().report(&mut bitmap)?;
    Ok(bitmap)
}

#[test]
fn the_workload_runs_in_running_states_only() {
    let (device, time) = device(SimConfig {
        workload: Workload { dirty_bytes_per_second: 1000 * PAGE, working_set_bytes: None },
        dma: writing(LogPages::default()).dma,
        ..small()
    });
    let mut handle = device.open().unwrap();
    let mut seen = Vec::new();
    let path = [
        State::Running,
        State::RunningP2p,
        State::Running,
        State::PreCopy,
        State::PreCopyP2p,
        State::StopCopy,
        State::Stop,
        State::Resuming,
    ];
    for state in path {
        drop(set(&mut handle, state));
        let before = (device.page_writes(), device.dma_writes());
        time.advance(ms(10));
        seen.push((device.page_writes() - before.0, device.dma_writes() - before.1));
    }
    assert_eq!(seen, [(10, 10), (10, 0), (10, 10), (10, 10), (10, 0), (0, 0), (0, 0), (0, 0)]);
}

#[test]
fn the_same_seed_does_the_same_however_often_it_is_looked_at() {
    let config = SimConfig {
        memory_bytes: 1 << 20,
        workload: Workload { dirty_bytes_per_second: 777_777, working_set_bytes: Some(600_000) },
        ..SimConfig::default()
    };
    let (often, often_time) = device(config.clone());
    let (once, once_time) = device(config.clone());
    let (other, other_time) = device(SimConfig { seed: 2, ..config });
    for _ in 0..1000 {
        often_time.advance(ms(3));
        let _ = often.state();
    }
    once_time.advance(ms(3000));
    other_time.advance(ms(3000));
    assert_eq!(often.digest(), once.digest());
    assert_ne!(other.digest(), once.digest());
    // Only the working set.
    let (pristine, _) = device(SimConfig { memory_bytes: 1 << 20, ..SimConfig::default() });
    let (now, before) = (memory(&once, 1 << 20), memory(&pristine, 1 << 20));
    let end = 600_000usize.div_ceil(4096) * 4096;
    assert_eq!(now[end..], before[end..]);
    assert_ne!(now[..end], before[..end]);
}

#[test]
fn a_migrated_workload_goes_on_where_it_was() {
    let busy = SimConfig {
        workload: Workload { dirty_bytes_per_second: 1000 * PAGE, working_set_bytes: None },
        ..small()
    };
    let (source, time) = device(busy.clone());
    let mut handle = source.open().unwrap();
    time.advance(ms(7));
    let blob = stop_copy(&mut handle);
    let (target, target_time) = device(SimConfig { seed: 99, ..busy });
    let mut loaded = target.open().unwrap();
    load(&mut loaded, &blob);
    assert_eq!(target.page_writes(), 7);
    target_time.advance(ms(1));
    assert_eq!(target.page_writes(), 8);
    assert_ne!(target.digest(), source.digest());
}

#[test]
fn the_log_says_what_was_written_once() {
    let (device, time) = device(writing(LogPages::default()));
    let mut handle = device.open().unwrap();
    time.advance(ms(100));
    let (first, second) = (range(0x10_0000, 16 * PAGE), range(0x80_0000, 4 * PAGE));
    assert_eq!(handle.dma_log().unwrap().start(4096, &[first, second]).unwrap(), 4096);
    assert_eq!(report(&mut handle, first, 4096).unwrap().dirty_pages(), 0, "what was before does not count");
    time.advance(ms(5));
    let dirty = report(&mut handle, first, 4096).unwrap().dirty_pages()
        + report(&mut handle, second, 4096).unwrap().dirty_pages();
    assert_eq!(dirty, 5);
    assert_eq!(report(&mut handle, first, 4096).unwrap().dirty_pages(), 0, "reading clears");
    // A round and more: everything, in each report's own pages, and only the range that was asked for is cleared.
    time.advance(ms(50));
    assert_eq!(report(&mut handle, first, 8192).unwrap().dirty_pages(), 8);
    assert_eq!(report(&mut handle, range(0x80_0000, PAGE), 4096).unwrap().dirty_pages(), 1);
    assert_eq!(report(&mut handle, second, 4096).unwrap().dirty_pages(), 3);
    // A bitmap only gathers.
    let mut bitmap = DirtyBitmap::new(second, 4096).unwrap();
    bitmap.set(2);
    handle.dma_log().unwrap().report(&mut bitmap).unwrap();
    assert!(bitmap.is_set(2));
    // A held device starts none.
    set(&mut handle, State::RunningP2p);
    time.advance(ms(50));
    assert_eq!(report(&mut handle, first, 4096).unwrap().dirty_pages(), 0);
}

#[test]
fn a_device_may_track_larger_pages_than_asked_for() {
    let (device, time) = device(writing(LogPages { min_bytes: 16_384, max_bytes: 32_768 }));
    let mut handle = device.open().unwrap();
    let first = range(0x10_0000, 16 * PAGE);
    assert_eq!(handle.dma_log().unwrap().start(4096, &[first]).unwrap(), 16_384);
    while report(&mut handle, first, 16_384).unwrap().dirty_pages() == 0 {
        time.advance(ms(1));
    }
    time.advance(ms(1000));
    // One small page of a tracked page says that the whole is dirty, and does not clear it.
    assert_eq!(report(&mut handle, range(0x10_0000, PAGE), 4096).unwrap().dirty_pages(), 1);
    assert_eq!(report(&mut handle, first, 4096).unwrap().dirty_pages(), 16);
    assert_eq!(report(&mut handle, first, 4096).unwrap().dirty_pages(), 0);
    handle.dma_log().unwrap().stop().unwrap();
    let large = range(0, 1 << 30);
    assert_eq!(handle.dma_log().unwrap().start(1 << 20, &[large]).unwrap(), 32_768);
}

#[test]
fn the_log_refuses_what_the_kernel_refuses() {
    let (device, _) = device(writing(LogPages::default()));
    let mut handle = device.open().unwrap();
    let some = range(0x10_0000, 16 * PAGE);
    assert_eq!(errno(report(&mut handle, some, 4096)), libc::EINVAL, "not started");
    handle.dma_log().unwrap().stop().unwrap();
    let many: Vec<IovaRange> = (0..257).map(|at| range(at * 2 * PAGE, PAGE)).collect();
    for (what, page, ranges, wanted) in [
        ("no range", 4096, &[][..], libc::EINVAL),
        ("too many", 4096, &many[..], libc::E2BIG),
        ("page of 0", 0, &[some][..], libc::EINVAL),
        ("page of 3000", 3000, &[some][..], libc::EINVAL),
        ("start off a page", 4096, &[range(100, PAGE)][..], libc::EINVAL),
        ("length off a page", 4096, &[range(0, 100)][..], libc::EINVAL),
        ("overlap", 4096, &[some, range(0x10_1000, PAGE)][..], libc::EINVAL),
        ("the very end", 4096, &[range(u64::MAX - 4095, 4096)][..], libc::EOVERFLOW),
    ] {
        assert_eq!(errno(handle.dma_log().unwrap().start(page, ranges)), wanted, "{what}");
    }
    assert_eq!(handle.dma_log().unwrap().start(4096, &many[..256]).unwrap(), 4096);
    assert_eq!(errno(handle.dma_log().unwrap().start(4096, &[some])), libc::EINVAL, "started twice");
    for (what, range, page, wanted) in [
        ("a page of 512", range(0, PAGE), 512, libc::EINVAL),
        ("not tracked", range(PAGE, PAGE), 4096, libc::EINVAL),
        ("tracked in part", range(0, 2 * PAGE), 4096, libc::EINVAL),
        ("the very end", range(u64::MAX - 4095, 4096), 4096, libc::EOVERFLOW),
    ] {
        assert_eq!(errno(report(&mut handle, range, page)), wanted, "{what}");
    }
    handle.reset().unwrap();
    assert_eq!(errno(report(&mut handle, range(0, PAGE), 4096)), libc::EINVAL, "a reset stops it");
}

fn eventfd() -> OwnedFd {
    rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap()
}

fn signals(eventfd: &OwnedFd) -> u64 {
    let mut count = [0; 8];
    rustix::io::read(eventfd, &mut count).map_or(0, |_| u64::from_ne_bytes(count))
}

#[test]
fn interrupts_are_armed_and_raised() {
    let (device, _) = device(small());
    let mut handle = device.open().unwrap();
    let space = handle.config_space().unwrap();
    assert_eq!(space.command().unwrap(), PciCommand(0));
    space.set_command(PciCommand(0xFFFF)).unwrap();
    assert_eq!(space.command().unwrap(), PciCommand(0x0547));
    let eventfds = [eventfd(), eventfd()];
    let fds: Vec<_> = eventfds.iter().map(AsFd::as_fd).collect();
    space.arm(InterruptKind::MsiX, &fds).unwrap();
    assert_eq!(space.capture().unwrap().interrupts, Some(Rearm { kind: InterruptKind::MsiX, vectors: 2 }));
    assert_eq!(errno(space.arm(InterruptKind::Msi, &fds)), libc::EINVAL, "another kind is armed");
    assert!(device.raise_interrupt(1).unwrap());
    assert!(!device.raise_interrupt(2).unwrap());
    assert_eq!([signals(&eventfds[0]), signals(&eventfds[1])], [0, 1]);
    // The kernel saves configuration space around a reset.
    handle.reset().unwrap();
    let space = handle.config_space().unwrap();
    assert_eq!(space.command().unwrap(), PciCommand(0x0547));
    assert!(device.raise_interrupt(0).unwrap());
    space.disarm(InterruptKind::Msi).unwrap();
    assert!(device.raise_interrupt(0).unwrap(), "another kind");
    space.disarm(InterruptKind::MsiX).unwrap();
    assert!(!device.raise_interrupt(0).unwrap());
    space.arm(InterruptKind::Msi, &fds[..1]).unwrap();
    drop(handle);
    let mut handle = device.open().unwrap();
    let capture = handle.config_space().unwrap().capture().unwrap();
    assert_eq!((capture.command, capture.interrupts), (PciCommand(0), None), "a fresh open");
}

#[test]
fn a_reset_may_clear_configuration_space() {
    let pci = Some(SimPci { kept_by_reset: false, ..SimPci::default() });
    let (device, _) = device(SimConfig { pci, ..small() });
    let mut handle = device.open().unwrap();
    let space = handle.config_space().unwrap();
    space.set_command(PciCommand(PciCommand::BUS_MASTER)).unwrap();
    space.arm(InterruptKind::Msi, &[eventfd().as_fd()]).unwrap();
    handle.reset().unwrap();
    let capture = handle.config_space().unwrap().capture().unwrap();
    assert_eq!((capture.command, capture.interrupts), (PciCommand(0), None));
}

#[test]
fn interrupts_refuse_what_the_kernel_refuses() {
    let pci = Some(SimPci { msi_vectors: 2, msix_vectors: 0, kept_by_reset: true });
    let (device, _) = device(SimConfig { pci, ..small() });
    let mut handle = device.open().unwrap();
    let space = handle.config_space().unwrap();
    let eventfds = [eventfd(), eventfd(), eventfd()];
    let fds: Vec<_> = eventfds.iter().map(AsFd::as_fd).collect();
    assert_eq!(errno(space.arm(InterruptKind::Msi, &fds)), libc::EINVAL, "more than there are");
    assert_eq!(errno(space.arm(InterruptKind::Msi, &[])), libc::EINVAL, "none");
    assert_eq!(errno(space.arm(InterruptKind::MsiX, &fds[..1])), libc::EINVAL, "no such kind");
    let file = std::fs::File::open("/dev/null").unwrap();
    assert_eq!(errno(space.arm(InterruptKind::Msi, &[file.as_fd()])), libc::EINVAL, "no eventfd");
    assert_eq!(space.capture().unwrap().interrupts, None);
    space.arm(InterruptKind::Msi, &fds[..2]).unwrap();
    space.arm(InterruptKind::Msi, &fds[2..]).unwrap();
    assert_eq!(space.capture().unwrap().interrupts, Some(Rearm { kind: InterruptKind::Msi, vectors: 1 }));
    assert!(!device.raise_interrupt(1).unwrap());
}
