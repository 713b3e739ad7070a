//! What goes out comes in: digests, content, sizes, for any size, content and segmentation.

use super::*;
use proptest::prelude::*;
use vfio_checkpoint_device::DataSize;
use vfio_checkpoint_device::sim::{Precopy, Refill, Workload};

fn config(memory_bytes: u64, page_bytes: u32, seed: u64) -> SimConfig {
    SimConfig { memory_bytes, page_bytes, seed, ..SimConfig::default() }
}

/// Sizes around the ends of words, pages and records.
fn sizes() -> impl Strategy<Value = u64> {
    prop_oneof![1u64..20, 4090u64..4110, 1u64..300_000, (1u64 << 20) - 3..(1 << 20) + 5000]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn stop_copy_carries_the_state(
        bytes in sizes(),
        page_shift in 12u32..=16,
        seeds: (u64, u64),
        scratch: u64,
        writes in prop::collection::vec((any::<prop::sample::Index>(), prop::collection::vec(any::<u8>(), 1..6000)), 0..8),
        busy in 0u64..3000,
        pieces in (1usize..70_000, 1usize..70_000),
    ) {
        let source_config = SimConfig {
            workload: Workload { dirty_bytes_per_second: 1 << 20, working_set_bytes: None },
            ..config(bytes, 1 << page_shift, seeds.0)
        };
        let (source, time) = device(source_config.clone());
        let mut handle = source.open().unwrap();
        source.set_scratch(scratch);
        for (at, written) in &writes {
            time.advance(ms(busy));
            let at = at.index(usize::try_from(bytes).unwrap());
            let end = (at + written.len()).min(usize::try_from(bytes).unwrap());
            source.write_memory(at as u64, &written[..end - at]).unwrap();
        }
        time.advance(ms(busy));
        let expected_bytes = handle.data_size().unwrap();
        let mut stream = save_stream(&mut handle, State::StopCopy);
        let mut blob = Vec::new();
        drain(&mut *stream, pieces.0, &mut blob);
        prop_assert_eq!(expected_bytes, DataSize::Known(blob.len() as u64));

        let (target, _) = device(SimConfig { seed: seeds.1, ..source_config });
        let mut loading = target.open().unwrap();
        let mut stream = restore_stream(&mut loading);
        write_all(&mut *stream, &blob, pieces.1).unwrap();
        set(&mut loading, State::Stop);
        prop_assert_eq!(target.digest(), source.digest());
        prop_assert_eq!(memory(&target, bytes), memory(&source, bytes));
        prop_assert_eq!(target.scratch(), scratch);

        // And out again: the same state is the same stream, but for the cut into dirty and clean.
        prop_assert_eq!(stop_copy(&mut loading), blob);
    }

    #[test]
    fn damage_to_the_content_loads_and_shows(
        bytes in prop_oneof![1u64..20, 1u64..100_000],
        dirt in 0u64..50,
        flips in prop::collection::vec(any::<prop::sample::Index>(), 1..4),
    ) {
        let (source, time) = device(SimConfig {
            workload: Workload { dirty_bytes_per_second: 4096, working_set_bytes: None },
            ..config(bytes, 4096, 3)
        });
        let mut handle = source.open().unwrap();
        time.advance(Duration::from_secs(dirt));
        let mut blob = stop_copy(&mut handle);
        // One record: its body begins behind the header and its own head.
        for flip in flips {
            let bit = flip.index(usize::try_from(bytes).unwrap() * 8);
            blob[80 + 24 + bit / 8] ^= 1 << (bit % 8);
        }
        let (target, _) = device(config(bytes, 4096, 4));
        let mut loading = target.open().unwrap();
        load(&mut loading, &blob);
        set(&mut loading, State::Stop);
        let same = memory(&target, bytes) == memory(&source, bytes);
        prop_assert_eq!(target.digest() == source.digest(), same);
        prop_assert_eq!(&memory(&target, bytes)[..], &blob[104..104 + usize::try_from(bytes).unwrap()]);
    }

    #[test]
    fn precopy_carries_the_state_whatever_happens_meanwhile(
        bytes in 1u64..200_000,
        initial in prop::option::of(any::<prop::sample::Index>()),
        on_read: bool,
        interval in 0u64..50,
        rounds in prop::collection::vec((0u64..40, 1usize..30_000, 0usize..4, any::<bool>()), 0..30),
    ) {
        let initial_bytes = initial.map(|index| index.index(usize::try_from(bytes).unwrap()) as u64);
        let refill = if on_read { Refill::OnRead } else { Refill::OnInfo };
        let (source, time) = device(SimConfig {
            workload: Workload { dirty_bytes_per_second: 8 << 20, working_set_bytes: None },
            precopy: Precopy { initial_bytes, refill, reread_interval: ms(interval), ..Precopy::default() },
            ..config(bytes, 4096, 9)
        });
        let mut handle = source.open().unwrap();
        let mut stream = save_stream(&mut handle, State::PreCopy);
        let mut blob = Vec::new();
        for (pause, piece, reads, ask) in rounds {
            time.advance(ms(pause));
            if ask {
                stream.precopy_info().unwrap();
            }
            let mut buffer = vec![0; piece];
            for _ in 0..reads {
                if let Read::Bytes(length) = stream.read(&mut buffer).unwrap() {
                    blob.extend_from_slice(&buffer[..length]);
                }
            }
        }
        let DataSize::UpperBound(bound) = handle.data_size().unwrap() else { panic!("a bound while pre-copying") };
        set(&mut handle, State::PreCopyP2p);
        set(&mut handle, State::StopCopy);
        let DataSize::Known(left) = handle.data_size().unwrap() else { panic!("known once stopped") };
        let before = blob.len() as u64;
        drain(&mut *stream, 5000, &mut blob);
        prop_assert_eq!(blob.len() as u64 - before, left);
        prop_assert!(left <= bound, "{} <= {}", left, bound);
        prop_assert_eq!(handle.data_size().unwrap(), DataSize::Known(0));

        let (target, _) = device(config(bytes, 4096, 10));
        let mut loading = target.open().unwrap();
        write_all(&mut *restore_stream(&mut loading), &blob, 777).unwrap();
        set(&mut loading, State::Stop);
        prop_assert_eq!(target.digest(), source.digest());
        prop_assert_eq!(memory(&target, bytes), memory(&source, bytes));
    }
}

#[test]
fn digests_differ_by_seed_memory_and_registers() {
    let (a, _) = device(SimConfig { seed: 1, ..small() });
    let (same, _) = device(SimConfig { seed: 1, name: "other".into(), ..small() });
    let (seed, _) = device(SimConfig { seed: 2, ..small() });
    let (size, _) = device(SimConfig { memory_bytes: 10 * PAGE + 101, ..small() });
    assert_eq!(a.digest(), same.digest());
    assert_ne!(a.digest(), seed.digest());
    assert_ne!(a.digest(), size.digest());
    same.set_scratch(1);
    assert_ne!(a.digest(), same.digest());
    same.set_scratch(0);
    same.write_memory(5000, &[0x55]).unwrap();
    assert_ne!(a.digest(), same.digest());
    // Put back by hand, it is pristine again: what counts is the content, not its history.
    let mut byte = [0];
    a.read_memory(5000, &mut byte).unwrap();
    same.write_memory(5000, &byte).unwrap();
    assert_eq!(a.digest(), same.digest());
}

#[test]
fn a_digest_is_of_the_content_not_of_how_it_is_kept() {
    let whole = |seed| SimConfig { memory_bytes: 2 * PAGE, seed, ..SimConfig::default() };
    let ((a, _), (b, _)) = (device(whole(1)), device(whole(2)));
    assert_ne!(a.digest(), b.digest());
    // Nothing of either seed is left.
    let foreign: Vec<u8> = (0u32..).map(|n| n.to_le_bytes()[n as usize % 2]).take(8192).collect();
    a.write_memory(0, &foreign).unwrap();
    assert_ne!(a.digest(), b.digest());
    b.write_memory(0, &foreign).unwrap();
    assert_eq!(a.digest(), b.digest());
}

#[test]
fn content_is_noise() {
    let (device, _) = device(SimConfig { memory_bytes: 2 << 20, ..SimConfig::default() });
    let content = memory(&device, 2 << 20);
    let mut words: Vec<u64> =
        content.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect();
    let count = words.len();
    words.sort_unstable();
    words.dedup();
    assert_eq!(words.len(), count, "no word occurs twice in 2 MiB");
    let ones: u32 = words.iter().map(|word| word.count_ones()).sum();
    let share = f64::from(ones) / f64::from(u32::try_from(count * 64).unwrap());
    assert!((0.499..0.501).contains(&share), "{share}");
}

#[test]
fn a_huge_device_costs_nothing_until_it_is_written() {
    let (device, time) = device(SimConfig {
        memory_bytes: 64 << 30,
        workload: Workload { dirty_bytes_per_second: 1 << 40, working_set_bytes: Some(4 << 20) },
        ..SimConfig::default()
    });
    let pristine = device.digest();
    let mut end = [0; 16];
    device.read_memory((64 << 30) - 16, &mut end).unwrap();
    assert!(device.read_memory((64 << 30) - 15, &mut end).is_err());
    // A year: the work of catching up is bounded by the working set.
    time.advance(Duration::from_hours(365 * 24));
    assert_ne!(device.digest(), pristine);
    assert_eq!(device.page_writes(), 365 * 86_400 * (1 << 28));
    let mut handle = device.open().unwrap();
    let pages = 64u64 << 18;
    let full = 80 + (64u64 << 30) + pages / 256 * 24 + 24 + 64 + 24;
    assert_eq!(handle.data_size().unwrap(), DataSize::Known(full));
}
