//! The variant's stream: mtty's own at the defaults; with records, one in which no record can be lost unseen.

use vfio_checkpoint_device::driver::Standing;
use vfio_checkpoint_device::kernel::{KernelDevice, KernelPath};
use vfio_checkpoint_device::{DataStream, MigrationDevice, Read};
use vfio_checkpoint_fsm::{Outcome, State};

use super::{Parameters, blank, programmed};
use crate::blobs::{blob, load};
use crate::facts::Facts;
use crate::save_restore::{open, read_all};
use crate::uart;

/// What is proved on the variant holds for mtty: with nothing set they are the same device.
pub(super) fn as_mtty(facts: &Facts) {
    let _parameters = Parameters::new();
    let (mtty, variant) =
        (open(&facts.mtty1[0], KernelPath::Iommufd), blank(&facts.mttyv1[0], KernelPath::Iommufd));
    for seed in [1, 2] {
        uart::program(&variant, 1, seed);
        let whole = blob(&variant);
        assert_eq!(whole.len(), 60);
        load(&mtty, &whole).expect("mtty takes it");
        assert_eq!(uart::registers(&mtty, 1), uart::registers(&variant, 1));
        assert_eq!(blob(&mtty), whole);
        uart::program(&variant, 1, 77);
        load(&variant, &blob(&mtty)).expect("and it takes mtty's");
        assert_eq!(blob(&variant), whole);
    }
}

/// A stream of `records` records, read record by record.
fn parts(device: &mut KernelDevice, records: u8) -> (Vec<Vec<u8>>, Vec<u8>) {
    let Some(DataStream::Save(mut stream)) = device.set_state(State::PreCopy).expect("a session") else {
        panic!("PRE_COPY opens a stream")
    };
    let mut parts = Vec::new();
    let mut buffer = [0; 256];
    for value in 0..=records {
        let Read::Bytes(bytes) = stream.read(&mut buffer).expect("the header or a record") else {
            panic!("the header or a record")
        };
        parts.push(buffer[..bytes].to_vec());
        uart::scratch(device, value);
    }
    device.set_state(State::StopCopy).expect("the stop");
    let rest = read_all(&mut *stream).expect("the rest");
    device.set_state(State::Running).expect("a running device");
    (parts, rest)
}

pub(super) fn damaged_records(facts: &Facts) {
    let parameters = Parameters::new();
    parameters.dirty_bytes(16);
    let mut device = programmed(&facts.mttyv1[0], KernelPath::Iommufd, 5);
    // More than the sequence counts, so that it wraps.
    let (parts, rest) = parts(&mut device, 200);
    let joined = |order: &[usize]| -> Vec<u8> {
        let mut blob: Vec<u8> = order.iter().flat_map(|&part| parts[part].clone()).collect();
        blob.extend_from_slice(&rest);
        blob
    };
    let whole: Vec<usize> = (0..parts.len()).collect();
    let lost = [&whole[..3], &whole[4..]].concat();
    let last_lost = whole[..200].to_vec();
    let doubled = [&whole[..3], &whole[2..]].concat();
    let mut swapped = whole.clone();
    swapped.swap(2, 3);
    let mut cut = joined(&whole);
    cut.remove(24 + 16 + 5);
    let destination = blank(&facts.mttyv1[1], KernelPath::Iommufd);
    let cases = [
        ("a lost record", joined(&lost)),
        ("the last record lost", joined(&last_lost)),
        ("a doubled record", joined(&doubled)),
        ("swapped records", joined(&swapped)),
        ("a cut record", cut),
        ("no end", joined(&whole)[..24 + 200 * 16].to_vec()),
        ("bytes behind the end", [joined(&whole), vec![0]].concat()),
    ];
    let count = cases.len();
    for (name, damaged) in cases {
        let failure = load(&destination, &damaged).expect_err(name);
        assert_eq!(
            (failure.outcome, failure.standing, failure.state, failure.resets()),
            (Outcome::StateLost, Standing::InService, Some(State::Running), 1),
            "{name}: {failure}"
        );
        load(&destination, &joined(&whole)).unwrap_or_else(|failure| panic!("after {name}: {failure}"));
        assert_eq!(uart::registers(&destination, 1), uart::registers(&device, 1), "after {name}");
    }
    println!("figures: variant: {count} streams with damaged records refused by the real driver");
}
