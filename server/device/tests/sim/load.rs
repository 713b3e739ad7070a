//! Loading: everything that is refused, when, and with what.

use super::*;
use proptest::prelude::*;
use vfio_checkpoint_device::sim::Validation;

const END_RECORD: usize = 24;

fn blob() -> Vec<u8> {
    let (source, _) = device(small());
    stop_copy(&mut source.open().unwrap())
}

/// Recomputes the header's check, so that a changed field is judged by itself.
fn rechecked(mut blob: Vec<u8>) -> Vec<u8> {
    let check = blake3::hash(&blob[..72]);
    blob[72..80].copy_from_slice(&check.as_bytes()[..8]);
    blob
}

/// Writes a stream that must be refused. The errno of the write, and the device is good for nothing but a reset.
fn refusal(blob: &[u8]) -> i32 {
    let (device, _) = device(small());
    let mut handle = device.open().unwrap();
    let pristine = device.digest();
    let mut stream = restore_stream(&mut handle);
    let refused = errno(write_all(&mut *stream, blob, 100));
    assert_eq!(errno(stream.write(b"more")), libc::ENODEV, "a failed session takes nothing");
    for target in [State::Stop, State::Running, State::StopCopy] {
        assert_eq!(errno(handle.set_state(target)), libc::EINVAL);
        assert_eq!(handle.state().unwrap(), State::Resuming);
    }
    assert_eq!(device.digest(), pristine, "the device's own state is untouched");
    handle.reset().unwrap();
    assert_eq!(handle.state().unwrap(), State::Running);
    load(&mut handle, &self::blob());
    refused
}

#[test]
fn each_field_of_the_header_is_checked() {
    let good = blob();
    for (at, wanted) in [
        (0, libc::EINVAL),  // magic
        (8, libc::EINVAL),  // major version
        (12, libc::EINVAL), // flags
        (16, libc::EINVAL), // page size
        (20, libc::EINVAL), // register block
        (24, libc::EINVAL), // memory
        (40, libc::EINVAL), // firmware
    ] {
        let mut changed = good.clone();
        changed[at] ^= 1;
        assert_eq!(refusal(&changed), libc::EINVAL, "byte {at}, damaged");
        assert_eq!(refusal(&rechecked(changed)), wanted, "byte {at}, meant");
    }
    let mut seed = good.clone();
    seed[32] ^= 1;
    assert_eq!(refusal(&seed), libc::EINVAL, "a damaged seed");
    let mut minor = good;
    minor[10] = 7;
    let minor = rechecked(minor);
    let (device, _) = device(small());
    load(&mut device.open().unwrap(), &minor);
}

#[test]
fn another_device_does_not_fit() {
    for other in [
        SimConfig { firmware: "sim-firmware-2".into(), ..small() },
        SimConfig { memory_bytes: 11 * PAGE, ..small() },
        SimConfig { page_bytes: 8192, ..small() },
    ] {
        let (source, _) = device(other);
        let (target, _) = device(small());
        let mut handle = source.open().unwrap();
        let loading = target.open().unwrap();
        assert_eq!(handle.fingerprint().differences(loading.fingerprint()).len(), 1);
        assert_eq!(refusal(&stop_copy(&mut handle)), libc::EINVAL);
    }
}

#[test]
fn each_field_of_a_record_is_checked() {
    let good = blob();
    let end = good.len() - END_RECORD;
    let registers = end - 64 - 24;
    for (what, at, value, wanted) in [
        ("kind", 80, 9, libc::EOPNOTSUPP),
        ("flags", 84, 1, libc::EINVAL),
        ("first page", 88, 1, libc::EINVAL),
        ("first page, far out", 95, 0xFF, libc::EINVAL),
        ("length, odd", 96, 1, libc::EINVAL),
        ("length, huge", 103, 0xFF, libc::EINVAL),
        ("registers' value", registers + 8, 1, libc::EINVAL),
        ("registers' length", registers + 16, 63, libc::EINVAL),
        ("end's place", end + 8, good[end + 8] ^ 1, libc::EINVAL),
        ("end's length", end + 16, 1, libc::EINVAL),
    ] {
        let mut changed = good.clone();
        changed[at] = value;
        assert_eq!(refusal(&changed), wanted, "{what}");
    }
}

#[test]
fn order_and_completeness_are_checked() {
    let good = blob();
    let end = good.len() - END_RECORD;
    let registers = end - 64 - 24;
    let with_end = |mut blob: Vec<u8>| {
        let place = blob.len() as u64;
        let mut record = good[end..].to_vec();
        record[8..16].copy_from_slice(&place.to_le_bytes());
        blob.extend(record);
        blob
    };
    assert_eq!(refusal(&with_end(good[..registers].to_vec())), libc::EINVAL, "no registers");
    let no_memory = [&good[..80], &good[registers..end]].concat();
    assert_eq!(refusal(&with_end(no_memory)), libc::EINVAL, "no memory");
    let twice = [&good[..end], &good[registers..end]].concat();
    assert_eq!(refusal(&with_end(twice)), libc::EINVAL, "registers twice");
    let mut empty = [&good[..104], &good[80..]].concat();
    empty[96..104].fill(0);
    assert_eq!(refusal(&empty), libc::EINVAL, "a record of no pages");
    let late = [&good[..end], &good[80..registers]].concat();
    assert_eq!(refusal(&with_end(late)), libc::EINVAL, "memory behind the registers");
    assert_eq!(refusal(&[&good[..], &[0]].concat()), libc::ENOMEM, "too long");
    // What was sent twice is right, and the later one counts.
    let mut again = [&good[..registers], &good[80..registers]].concat();
    again[80 + 24] ^= 1;
    let again = with_end([&again[..], &good[registers..end]].concat());
    let (device, _) = device(small());
    let pristine = device.digest();
    let mut handle = device.open().unwrap();
    load(&mut handle, &again);
    assert_eq!(device.digest(), pristine);
}

#[test]
fn optional_records_are_skipped_up_to_a_length() {
    let good = blob();
    let end = good.len() - END_RECORD;
    let with = |length: u64| {
        let mut blob = good[..end].to_vec();
        blob.extend(77u32.to_le_bytes());
        blob.extend(1u32.to_le_bytes());
        blob.extend(0u64.to_le_bytes());
        blob.extend(length.to_le_bytes());
        blob.extend(vec![0xEE; usize::try_from(length).unwrap()]);
        let place = blob.len() as u64;
        let mut record = good[end..].to_vec();
        record[8..16].copy_from_slice(&place.to_le_bytes());
        blob.extend(record);
        blob
    };
    for length in [0, 1, 1 << 20] {
        let (device, _) = device(small());
        load(&mut device.open().unwrap(), &with(length));
    }
    assert_eq!(refusal(&with((1 << 20) + 1)), libc::EINVAL);
}

#[test]
fn a_stream_cut_anywhere_does_not_load() {
    let (source, _) = device(SimConfig { memory_bytes: 100, ..SimConfig::default() });
    let blob = stop_copy(&mut source.open().unwrap());
    let (device, _) = device(SimConfig { memory_bytes: 100, ..SimConfig::default() });
    let mut handle = device.open().unwrap();
    for length in 0..blob.len() {
        let mut stream = restore_stream(&mut handle);
        write_all(&mut *stream, &blob[..length], 7).unwrap();
        assert_eq!(errno(handle.set_state(State::Running)), libc::EINVAL, "{length} bytes");
        assert_eq!(handle.state().unwrap(), State::Resuming);
        // The rest may still come: nothing was wrong so far.
        if length % 50 == 0 {
            write_all(&mut *stream, &blob[length..], 7).unwrap();
            set(&mut handle, State::Running);
            assert_eq!(device.digest(), source.digest());
        }
        handle.reset().unwrap();
        assert_eq!(errno(stream.write(b"x")), libc::ENODEV);
    }
    assert_eq!(device.resets(), blob.len() as u64);
}

#[test]
fn a_device_may_find_out_late() {
    let mut bad = blob();
    bad[0] ^= 1;
    let (device, _) = device(SimConfig { validation: Validation::OnExit, ..small() });
    let mut handle = device.open().unwrap();
    write_all(&mut *restore_stream(&mut handle), &bad, 1000).unwrap();
    assert_eq!(errno(handle.set_state(State::Running)), libc::EINVAL);
    assert_eq!(handle.state().unwrap(), State::Resuming);
    handle.reset().unwrap();
    load(&mut handle, &blob());
}

#[test]
fn there_is_room_for_so_much_foreign_content() {
    let mut blob = blob();
    // Three pages become arbitrary.
    for page in [1, 4, 7] {
        blob[104 + page * 4096] ^= 0x80;
    }
    for (pages, fits) in [(3, true), (2, false)] {
        let config = SimConfig { overlay_limit_bytes: pages * PAGE, ..small() };
        let (device, _) = device(config);
        let mut handle = device.open().unwrap();
        let written = write_all(&mut *restore_stream(&mut handle), &blob, 1 << 20);
        assert_eq!(written.is_ok(), fits);
        if let Err(error) = written {
            assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
            assert_eq!(errno(handle.set_state(State::Running)), libc::EINVAL);
        }
    }
}

#[test]
fn an_empty_write_is_the_callers_mistake() {
    let (device, _) = device(small());
    let mut handle = device.open().unwrap();
    let mut stream = restore_stream(&mut handle);
    assert!(matches!(stream.write(&[]), Err(DeviceError::Argument { .. })));
    drop(stream);
    handle.reset().unwrap();
    let mut stream = save_stream(&mut handle, State::StopCopy);
    assert!(matches!(stream.read(&mut []), Err(DeviceError::Argument { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn arbitrary_bytes_are_refused_or_loaded_and_nothing_else(
        noise in prop::collection::vec(any::<u8>(), 0..300),
        good_prefix in 0usize..600,
        piece in 1usize..200,
        late: bool,
    ) {
        let validation = if late { Validation::OnExit } else { Validation::OnWrite };
        let config = SimConfig { memory_bytes: 300, validation, ..SimConfig::default() };
        let (source, _) = device(config.clone());
        let mut bytes = stop_copy(&mut source.open().unwrap());
        bytes.truncate(good_prefix);
        bytes.extend(&noise);
        let (device, _) = device(config);
        let mut handle = device.open().unwrap();
        let mut stream = restore_stream(&mut handle);
        if !bytes.is_empty() {
            let _ = write_all(&mut *stream, &bytes, piece);
        }
        let left = handle.set_state(State::Running);
        let state = handle.state().unwrap();
        prop_assert_eq!(left.is_ok(), state == State::Running);
        prop_assert!(state == State::Running || state == State::Resuming);
        handle.reset().unwrap();
    }

    #[test]
    fn mutated_records_never_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        piece in 1usize..2000,
    ) {
        let config = SimConfig { memory_bytes: 9000, overlay_limit_bytes: 8192, ..SimConfig::default() };
        let (source, _) = device(config.clone());
        let mut bytes = stop_copy(&mut source.open().unwrap());
        for (at, value) in changes {
            // The heads of header and records, where lengths are.
            let heads: Vec<usize> = (0..104).chain(bytes.len() - 112..bytes.len()).collect();
            bytes[*at.get(&heads)] = value;
        }
        let bytes = rechecked(bytes);
        let (device, _) = device(config);
        let mut handle = device.open().unwrap();
        let written = write_all(&mut *restore_stream(&mut handle), &bytes, piece);
        let left = handle.set_state(State::Running);
        prop_assert!(written.is_ok() || left.is_err(), "a failed write never loads");
    }
}
