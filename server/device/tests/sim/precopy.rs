//! Pre-copy, step by step: what can be read when, and what the device says is left.

use super::*;
use vfio_checkpoint_device::PrecopyInfo;
use vfio_checkpoint_device::sim::{Precopy, PrecopyIdle, Refill, Reinit, Workload};

/// Ten pages and a bit; one page is written every millisecond.
fn busy(precopy: Precopy) -> SimConfig {
    SimConfig {
        precopy,
        workload: Workload { dirty_bytes_per_second: 1000 * PAGE, working_set_bytes: Some(8 * PAGE) },
        ..small()
    }
}

const HEADER: u64 = 80;
const RECORD: u64 = 24;
const MEMORY: u64 = 10 * PAGE + 100;

fn left(initial_bytes: u64, dirty_bytes: u64) -> PrecopyInfo {
    PrecopyInfo { initial_bytes, dirty_bytes, reinit: false }
}

#[test]
fn initial_data_is_counted_to_the_byte() {
    let (device, _) = device(small());
    let mut handle = device.open().unwrap();
    let mut stream = save_stream(&mut handle, State::PreCopy);
    let total = HEADER + RECORD + MEMORY;
    let mut read = 0;
    for piece in [1, 50, 60, 4096, 5000, 30_000] {
        assert_eq!(stream.precopy_info().unwrap(), left(total - read, 0));
        let Read::Bytes(length) = stream.read(&mut vec![0; piece]).unwrap() else { panic!("more is there") };
        assert_eq!(length, piece);
        read += piece as u64;
    }
    let mut rest = Vec::new();
    assert_eq!(drain(&mut *stream, 100, &mut rest), Read::NothingNow);
    assert_eq!(rest.len() as u64, total - read);
    assert_eq!(stream.precopy_info().unwrap(), left(0, 0));
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), Read::NothingNow);
}

#[test]
fn dirty_pages_become_readable_by_asking() {
    let (device, time) = device(busy(Precopy::default()));
    let mut handle = device.open().unwrap();
    let mut stream = save_stream(&mut handle, State::PreCopy);
    let mut bytes = Vec::new();
    drain(&mut *stream, 1 << 16, &mut bytes);
    time.advance(ms(1));
    assert_eq!(drain(&mut *stream, 1 << 16, &mut bytes), Read::NothingNow, "nobody asked");
    assert_eq!(bytes.len() as u64, HEADER + RECORD + MEMORY);
    assert_eq!(stream.precopy_info().unwrap(), left(0, RECORD + PAGE));
    bytes.clear();
    drain(&mut *stream, 1 << 16, &mut bytes);
    assert_eq!(bytes.len() as u64, RECORD + PAGE);
    // The whole working set is one run, however often it was written.
    time.advance(ms(1000));
    assert_eq!(stream.precopy_info().unwrap(), left(0, RECORD + 8 * PAGE));
}

#[test]
fn dirty_pages_become_readable_by_reading_where_the_device_is_like_that() {
    let (device, time) = device(busy(Precopy { refill: Refill::OnRead, ..Precopy::default() }));
    let mut handle = device.open().unwrap();
    let mut stream = save_stream(&mut handle, State::PreCopy);
    let mut bytes = Vec::new();
    drain(&mut *stream, 1 << 16, &mut bytes);
    time.advance(ms(1));
    bytes.clear();
    assert_eq!(drain(&mut *stream, 1 << 16, &mut bytes), Read::NothingNow);
    assert_eq!(bytes.len() as u64, RECORD + PAGE);
}

#[test]
fn a_page_that_is_due_anyway_is_not_due_twice() {
    let (device, time) = device(busy(Precopy::default()));
    let mut handle = device.open().unwrap();
    let mut stream = save_stream(&mut handle, State::PreCopy);
    time.advance(ms(1000));
    assert_eq!(stream.precopy_info().unwrap(), left(HEADER + RECORD + MEMORY, 0));
}

#[test]
fn rereads_are_limited_in_time() {
    for refill in [Refill::OnInfo, Refill::OnRead] {
        let (device, time) = device(busy(Precopy { refill, reread_interval: ms(100), ..Precopy::default() }));
        let mut handle = device.open().unwrap();
        let mut stream = save_stream(&mut handle, State::PreCopy);
        let mut offered = Vec::new();
        for _ in 0..250 {
            stream.precopy_info().unwrap();
            let mut bytes = Vec::new();
            assert_eq!(drain(&mut *stream, 1 << 16, &mut bytes), Read::NothingNow);
            offered.push(bytes.len() as u64);
            time.advance(ms(1));
        }
        let expected: Vec<u64> = (0..250)
            .map(|at| match at {
                0 => HEADER + RECORD + MEMORY,
                100 | 200 => RECORD + 8 * PAGE,
                _ => 0,
            })
            .collect();
        assert_eq!(offered, expected, "{refill:?}");
    }
}

#[test]
fn nothing_for_now_may_be_zero() {
    let (device, _) = device(SimConfig::mtty_like());
    let mut handle = device.open().unwrap();
    let mut stream = save_stream(&mut handle, State::PreCopy);
    let mut bytes = Vec::new();
    assert_eq!(drain(&mut *stream, 10, &mut bytes), Read::Zero);
    assert_eq!(bytes.len() as u64, HEADER, "only the header is pre-copied");
    set(&mut handle, State::StopCopy);
    assert_eq!(drain(&mut *stream, 10, &mut bytes), Read::Zero);
    assert_eq!(bytes.len() as u64, HEADER + RECORD + 36 + RECORD + 64 + RECORD);
    // To the byte what a plain stop-copy gives.
    set(&mut handle, State::Running);
    assert_eq!(stop_copy(&mut handle), bytes);
}

#[test]
fn a_held_device_cannot_be_asked_for_more() {
    let (device, time) = device(busy(Precopy::default()));
    let mut handle = device.open().unwrap();
    let mut stream = save_stream(&mut handle, State::PreCopy);
    drain(&mut *stream, 1 << 16, &mut Vec::new());
    time.advance(ms(1));
    set(&mut handle, State::PreCopyP2p);
    // It works on: only DMA to others is held.
    time.advance(ms(1000));
    assert_eq!(device.page_writes(), 1001);
    assert_eq!(stream.precopy_info().unwrap(), left(0, 0));
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), Read::NothingNow);
    // What was captured before can still be read.
    set(&mut handle, State::PreCopy);
    assert_eq!(stream.precopy_info().unwrap(), left(0, RECORD + 8 * PAGE));
    set(&mut handle, State::PreCopyP2p);
    assert_eq!(stream.precopy_info().unwrap(), left(0, RECORD + 8 * PAGE));
    let mut bytes = Vec::new();
    drain(&mut *stream, 1 << 16, &mut bytes);
    assert_eq!(bytes.len() as u64, RECORD + 8 * PAGE);
}

#[test]
fn memory_past_the_initial_part_waits_for_stop_copy() {
    let (device, time) = device(busy(Precopy { initial_bytes: Some(3 * PAGE), ..Precopy::default() }));
    let mut handle = device.open().unwrap();
    let mut stream = save_stream(&mut handle, State::PreCopy);
    let mut bytes = Vec::new();
    drain(&mut *stream, 1 << 16, &mut bytes);
    assert_eq!(bytes.len() as u64, HEADER + RECORD + 3 * PAGE);
    time.advance(ms(100));
    // Only what was out can be dirty.
    assert_eq!(stream.precopy_info().unwrap(), left(0, RECORD + 3 * PAGE));
    set(&mut handle, State::StopCopy);
    bytes.clear();
    drain(&mut *stream, 1 << 16, &mut bytes);
    let memory = RECORD + (MEMORY - 3 * PAGE) + RECORD + 3 * PAGE;
    assert_eq!(bytes.len() as u64, memory + RECORD + 64 + RECORD);
}

#[test]
fn how_much_is_left_can_be_asked_while_pre_copying_only() {
    let (device, _) = device(small());
    let mut handle = device.open().unwrap();
    let mut stream = save_stream(&mut handle, State::PreCopy);
    set(&mut handle, State::StopCopy);
    assert_eq!(errno(stream.precopy_info()), libc::EINVAL);
    set(&mut handle, State::Running);
    assert_eq!(errno(stream.precopy_info()), libc::EINVAL);
    // In a later session the old stream is a disabled file.
    let _later = save_stream(&mut handle, State::PreCopy);
    assert_eq!(errno(stream.precopy_info()), libc::ENODEV);
}

#[test]
fn a_reconfiguration_raises_initial_bytes_for_who_opted_in() {
    for reinit_feature in [true, false] {
        let reinit = Some(Reinit { after_bytes: 5 * PAGE, initial_bytes: 2 * PAGE });
        let (device, _) = device(SimConfig {
            precopy: Precopy { reinit, reinit_feature, ..Precopy::default() },
            ..small()
        });
        let mut handle = device.open().unwrap();
        assert_eq!(handle.capabilities().precopy_reinit, reinit_feature);
        let before = device.digest();
        let mut stream = save_stream(&mut handle, State::PreCopy);
        let mut blob = Vec::new();
        assert!(!stream.precopy_info().unwrap().reinit);
        drain(&mut *stream, 1 << 16, &mut blob);
        assert_eq!(device.digest(), before, "it happens when somebody asks");
        let info = stream.precopy_info().unwrap();
        let again = RECORD + 2 * PAGE;
        assert_eq!(
            info,
            if reinit_feature {
                PrecopyInfo { initial_bytes: again, dirty_bytes: 0, reinit: true }
            } else {
                left(0, again)
            }
        );
        assert_ne!(device.digest(), before);
        assert!(!stream.precopy_info().unwrap().reinit, "said once");
        let known = blob.len() as u64;
        drain(&mut *stream, 1 << 16, &mut blob);
        assert_eq!(blob.len() as u64, known + again);
        assert_eq!(stream.precopy_info().unwrap(), left(0, 0));
        set(&mut handle, State::StopCopy);
        drain(&mut *stream, 1 << 16, &mut blob);
        let (target, _) = super::device(small());
        let mut loading = target.open().unwrap();
        load(&mut loading, &blob);
        assert_eq!(target.digest(), device.digest());
    }
}

#[test]
fn zero_only_where_configured_and_never_the_end_before_stop_copy() {
    for (idle, answer) in [(PrecopyIdle::NoMessage, Read::NothingNow), (PrecopyIdle::Zero, Read::Zero)] {
        let (device, _) = device(SimConfig { precopy: Precopy { idle, ..Precopy::default() }, ..small() });
        let mut handle = device.open().unwrap();
        let mut stream = save_stream(&mut handle, State::PreCopy);
        assert_eq!(drain(&mut *stream, 4096, &mut Vec::new()), answer);
        set(&mut handle, State::PreCopyP2p);
        assert_eq!(drain(&mut *stream, 4096, &mut Vec::new()), answer);
        set(&mut handle, State::StopCopy);
        let mut rest = Vec::new();
        assert_eq!(drain(&mut *stream, 4096, &mut rest), Read::Zero);
        assert_eq!(rest.len() as u64, RECORD + 64 + RECORD);
        assert_eq!(stream.read(&mut [0; 10]).unwrap(), Read::Zero, "for ever");
    }
}

#[test]
fn a_page_is_never_torn() {
    let (device, time) = device(busy(Precopy::default()));
    let mut handle = device.open().unwrap();
    let before = memory(&device, MEMORY);
    let mut stream = save_stream(&mut handle, State::PreCopy);
    let mut head = vec![0; 80 + 24 + 100];
    assert_eq!(stream.read(&mut head).unwrap(), Read::Bytes(204));
    // Every page of the working set changes while page 0 is half out.
    time.advance(ms(8));
    let mut blob = head;
    drain(&mut *stream, 1000, &mut blob);
    let after = memory(&device, MEMORY);
    let page = usize::try_from(PAGE).unwrap();
    assert_eq!(blob[104..104 + page], before[..page], "as it was when its first byte was read");
    assert_eq!(blob[104 + page..], after[page..], "the others as they are");
    assert_eq!(stream.precopy_info().unwrap(), left(0, RECORD + PAGE), "page 0 is due again");
}

#[test]
fn a_captured_page_that_changes_again_is_due_once() {
    let (device, time) = device(busy(Precopy::default()));
    let mut handle = device.open().unwrap();
    let mut stream = save_stream(&mut handle, State::PreCopy);
    drain(&mut *stream, 1 << 16, &mut Vec::new());
    time.advance(ms(8));
    let due = left(0, RECORD + 8 * PAGE);
    assert_eq!(stream.precopy_info().unwrap(), due);
    time.advance(ms(8));
    assert_eq!(stream.precopy_info().unwrap(), due);
    drain(&mut *stream, 1 << 16, &mut Vec::new());
    assert_eq!(stream.precopy_info().unwrap(), left(0, 0));
}

#[test]
fn a_reconfiguration_makes_no_page_due_twice() {
    // One page is initial, the other nine and a bit were never sent; the reconfiguration takes three.
    let precopy = Precopy {
        initial_bytes: Some(PAGE),
        reinit_feature: true,
        reinit: Some(Reinit { after_bytes: HEADER, initial_bytes: 3 * PAGE }),
        ..Precopy::default()
    };
    let (device, _) = device(SimConfig { precopy, ..small() });
    let mut handle = device.open().unwrap();
    let mut stream = save_stream(&mut handle, State::PreCopy);
    assert_eq!(stream.read(&mut [0; 80]).unwrap(), Read::Bytes(80));
    let info = stream.precopy_info().unwrap();
    assert_eq!(info, PrecopyInfo { initial_bytes: RECORD + 3 * PAGE, dirty_bytes: 0, reinit: true });
    set(&mut handle, State::StopCopy);
    let mut rest = Vec::new();
    drain(&mut *stream, 1 << 16, &mut rest);
    assert_eq!(rest.len() as u64, 2 * RECORD + MEMORY + RECORD + 64 + RECORD);
}
