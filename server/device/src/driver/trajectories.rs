//! Every kind of fault besides a failing SET, at the start, in the middle and at the end of a stream: what the driver
//! does is a snapshot, exactly, and harmless faults must be harmless.

use std::io::Write as _;
use std::time::Duration;

use vfio_checkpoint_fsm::{Capabilities, Outcome, State};

use super::SaveMode;
use super::tests::{driver, restore, save, slot, tell};
use crate::Call;
use crate::fault::Fault;

const FULL: Capabilities = Capabilities { p2p: true, pre_copy: true };
const EIO: i32 = libc::EIO;

/// The faults, with whether a save and a restore get through them unharmed.
fn faults() -> Vec<(&'static str, Fault, bool, bool)> {
    let mut all = vec![
        ("reads are short", Fault::ShortReads { max_bytes: 7 }, true, true),
        ("writes are short", Fault::ShortWrites { max_bytes: 7 }, true, true),
        ("new initial data is claimed", Fault::Reinit { initial_bytes: 1 << 20 }, true, true),
        ("a read-back fails", Fault::Get { errno: EIO }, false, false),
        ("a reset fails that nobody asks for", Fault::Reset { errno: EIO }, true, true),
        (
            "a SET is slow",
            Fault::Slow { call: Call::SetState(State::Stop), takes: Duration::from_secs(5) },
            true,
            true,
        ),
    ];
    for after_bytes in [0, 70_000, 100_100] {
        all.extend([
            ("a read is interrupted", Fault::Read { after_bytes, errno: libc::EINTR }, true, true),
            ("a write is interrupted", Fault::Write { after_bytes, errno: libc::EINTR }, true, true),
            ("a read fails", Fault::Read { after_bytes, errno: EIO }, false, true),
            ("a write fails", Fault::Write { after_bytes, errno: libc::EFAULT }, true, false),
            ("the device falls into ERROR", Fault::SuddenError { after_bytes }, false, false),
        ]);
    }
    all
}

#[test]
fn every_other_fault_has_its_exact_trajectory() {
    let (clean, time) = slot(FULL);
    let whole = save(&mut driver(&clean, &time, &[]), SaveMode::StopCopy).unwrap();
    let mut report = String::new();
    let mut asserted = 0;
    for (name, fault, save_unharmed, restore_unharmed) in faults() {
        for mode in [SaveMode::StopCopy, SaveMode::PreCopy] {
            let (device, time) = slot(FULL);
            let digest = device.digest();
            let saved = save(&mut driver(&device, &time, &[fault]), mode);
            assert_eq!(saved.is_ok(), save_unharmed, "{name}: {fault:?}: {saved:?}");
            assert_eq!((device.digest(), device.resets()), (digest, 0), "{name}: {fault:?}");
            match saved {
                Ok(state) => assert!(mode == SaveMode::PreCopy || state == whole, "{name}: {fault:?}"),
                Err(failure) => tell(&mut report, &format!("{mode:?} save: {name}: {fault:?}"), &failure),
            }
            asserted += 1;
        }
        let (device, time) = slot(FULL);
        let restored = restore(&mut driver(&device, &time, &[fault]), &whole);
        assert_eq!(restored.is_ok(), restore_unharmed, "{name}: {fault:?}: {restored:?}");
        match restored {
            Ok(()) => {
                assert_eq!((device.digest(), device.resets()), (clean.digest(), 0), "{name}: {fault:?}");
            }
            Err(failure) => {
                assert_eq!(
                    failure.outcome == Outcome::StateLost,
                    failure.resets() == 1,
                    "{name}: {failure:?}"
                );
                tell(&mut report, &format!("restore: {name}: {fault:?}"), &failure);
            }
        }
        asserted += 1;
    }
    insta::assert_snapshot!("other_faults", report);
    // Past the test harness, which keeps what a passing test prints.
    let _ =
        writeln!(std::io::stdout(), "\nfigures: trajectories: {asserted} of other faults, asserted exactly");
}

/// Nothing for now is for pre-copy; in a stop-copy it would cut the state short.
#[test]
fn nothing_for_now_is_waited_out_in_pre_copy_and_an_error_in_stop_copy() {
    let fault = Fault::NothingNow { after_bytes: 70_000, times: 3 };
    let (device, time) = slot(FULL);
    let failure = save(&mut driver(&device, &time, &[fault]), SaveMode::StopCopy).unwrap_err();
    assert_eq!(failure.first.raw_os_error(), Some(libc::ENOMSG));
    assert_eq!(
        (failure.outcome, failure.state, failure.resets()),
        (Outcome::Preserved, Some(State::Running), 0)
    );

    let (device, time) = slot(FULL);
    let mut driver = driver(&device, &time, &[fault]);
    let pool = crate::ChunkPool::new(0, 2);
    let mut session = driver.begin_save(SaveMode::PreCopy, super::Peers::None).unwrap();
    let mut read = Vec::new();
    for _ in 0..8 {
        read.push(match session.read(&pool).unwrap() {
            super::SaveRead::Chunk(chunk) => chunk.len(),
            super::SaveRead::NothingNow => 0,
            super::SaveRead::End => panic!("not the end"),
        });
    }
    let after = read.iter().rposition(|bytes| *bytes > 0).unwrap();
    let pauses = read[..after].iter().filter(|bytes| **bytes == 0).count();
    assert!(pauses >= 2, "the rest comes after the pauses: {read:?}");
    assert!(read.iter().sum::<usize>() > 100_000, "{read:?}");
}
