//! A DMA log with something in it: exactly the pages that were written, once.

use vfio_checkpoint_device::kernel::{KernelDevice, KernelPath};
use vfio_checkpoint_device::{DirtyBitmap, DirtyReport, Driver, IovaRange, MigrationDevice};
use vfio_checkpoint_fsm::State;

use super::{Parameters, blank};
use crate::facts::Facts;
use crate::save_restore::{driver, open};
use crate::uart;

const PAGE: u64 = 4096;

fn range(start: u64, length: u64) -> IovaRange {
    IovaRange::new(start, length).expect("a range")
}

fn write(device: &KernelDevice, values: &[u8]) {
    for &value in values {
        uart::scratch(device, value);
    }
}

/// The pages of a range that a report says were written.
fn report(driver: &mut Driver, range: IovaRange, page: u64) -> Vec<u64> {
    match driver.report_dma_log(range, page).expect("a report") {
        DirtyReport::Pages(bitmap) => {
            let marked: Vec<u64> = (0..bitmap.pages()).filter(|&page| bitmap.is_set(page)).collect();
            assert_eq!(bitmap.dirty_pages(), marked.len() as u64);
            marked
        }
        DirtyReport::AllDirty { reason, .. } => panic!("the log could not be read: {reason}"),
    }
}

fn all_dirty(driver: &mut Driver, asked: IovaRange) {
    let report = driver.report_dma_log(asked, PAGE).expect("an answer");
    assert!(matches!(&report, DirtyReport::AllDirty { range, .. } if *range == asked), "{report:?}");
    assert_eq!(report.ranges(), [asked]);
}

pub(super) fn exact(facts: &Facts, path: KernelPath) {
    let parameters = Parameters::new();
    parameters.dma_dirty();
    let mut device = blank(&facts.mttyv1[0], path);
    let mut driver = driver(&device);
    assert!(driver.capabilities().dma_logging);
    // Given in the wrong order; pages count through both, by address: 0 to 99 and 100 to 299.
    let (low, high) = (range(1 << 20, 100 * PAGE), range(1 << 40, 200 * PAGE));
    assert_eq!(driver.start_dma_log(PAGE, &[high, low]).expect("a log"), PAGE);
    assert!(report(&mut driver, low, PAGE).is_empty() && report(&mut driver, high, PAGE).is_empty());

    write(&device, &[0, 5, 6, 7, 99, 100, 255, 5]);
    let written = driver.report_dma_log(low, PAGE).expect("a report");
    assert_eq!(
        written.ranges(),
        [range(1 << 20, PAGE), range((1 << 20) + 5 * PAGE, 3 * PAGE), range((1 << 20) + 99 * PAGE, PAGE)]
    );
    assert_eq!(report(&mut driver, high, PAGE), [0, 155], "a report of one range leaves the other");
    assert!(report(&mut driver, low, PAGE).is_empty(), "a report clears the log");
    assert!(report(&mut driver, high, PAGE).is_empty());

    // In parts, and in coarser pages, one of which is a part of the report and stays for the next.
    write(&device, &[1, 50, 98]);
    assert_eq!(report(&mut driver, range((1 << 20) + 48 * PAGE, 4 * PAGE), PAGE), [2]);
    assert_eq!(report(&mut driver, range(1 << 20, 64 * PAGE), 16 * PAGE), [0]);
    assert_eq!(report(&mut driver, low, PAGE), [98]);

    // Every page that a value can name, over many words of the bitmap.
    let every: Vec<u8> = (0..=255).collect();
    write(&device, &every);
    assert_eq!(report(&mut driver, low, PAGE).len() + report(&mut driver, high, PAGE).len(), 256);

    // Only a running device does DMA, and only what it does between reports counts.
    for (state, expected) in
        [(State::PreCopy, vec![3]), (State::PreCopyP2p, vec![]), (State::RunningP2p, vec![])]
    {
        device.set_state(state).expect("a state");
        write(&device, &[3]);
        assert_eq!(report(&mut driver, low, PAGE), expected, "{state}");
    }
    device.set_state(State::Running).expect("a running device");

    // The device's own bits never clear the caller's.
    write(&device, &[9]);
    let mut bitmap = DirtyBitmap::new(low, PAGE).expect("a bitmap");
    bitmap.set(3);
    device.dma_log().expect("a log").report(&mut bitmap).expect("a report");
    assert!(bitmap.is_set(3) && bitmap.is_set(9) && bitmap.dirty_pages() == 2);
    driver.stop_dma_log().expect("a stopped log");
    println!("figures: variant {path:?}: 256 of 300 pages written and reported, none twice, none besides");
}

pub(super) fn refusals(facts: &Facts) {
    let parameters = Parameters::new();
    parameters.dma_dirty();
    let whole = range(0, 300 * PAGE);
    let device = blank(&facts.mttyv1[0], KernelPath::Iommufd);
    let mut own = driver(&device);
    let start = |driver: &mut Driver, page, ranges: &[IovaRange]| {
        driver.start_dma_log(page, ranges).map_err(|error| error.raw_os_error().expect("an errno"))
    };

    all_dirty(&mut own, whole);
    assert_eq!(start(&mut own, PAGE, &[whole]), Ok(PAGE));
    assert_eq!(start(&mut own, PAGE, &[whole]), Err(libc::EINVAL), "a log that is started already");
    all_dirty(&mut own, range(0, 301 * PAGE));
    all_dirty(&mut own, range(1 << 30, PAGE));
    write(&device, &[8]);
    assert_eq!(report(&mut own, whole, PAGE), [8], "no refusal took anything away");

    // A stop forgets what was not reported.
    write(&device, &[8]);
    own.stop_dma_log().expect("a stopped log");
    all_dirty(&mut own, whole);
    own.stop_dma_log().expect("stopping again is nothing");
    assert_eq!(start(&mut own, PAGE, &[whole]), Ok(PAGE));
    assert!(report(&mut own, whole, PAGE).is_empty());

    // So does a reset.
    write(&device, &[8]);
    own.reset().expect("a reset");
    all_dirty(&mut own, whole);

    // The device takes the nearest page size that it can do, and says so.
    assert_eq!(start(&mut own, 1 << 20, &[range(0, 4 << 20)]), Ok(64 << 10));
    write(&device, &[2]);
    assert_eq!(report(&mut own, range(0, 4 << 20), 64 << 10), [2]);
    write(&device, &[2]);
    assert_eq!(report(&mut own, range(0, 4 << 20), PAGE), (32..48).collect::<Vec<u64>>());
    let too_much = range(0, 1 << 50);
    own.stop_dma_log().expect("a stopped log");
    assert_eq!(start(&mut own, PAGE, &[too_much]), Err(libc::ENOSPC));

    // And so does the last close, whether or not it resets.
    assert_eq!(start(&mut own, PAGE, &[whole]), Ok(PAGE));
    drop(own);
    drop(device);
    let mut next = driver(&open(&facts.mttyv1[0], KernelPath::Container));
    all_dirty(&mut next, whole);
}
