//! The DMA log of a real device. mtty does no DMA, so what it logs is nothing; what is proved here is that the calls
//! and their refusals are the kernel's.

use vfio_checkpoint_device::kernel::KernelPath;
use vfio_checkpoint_device::{DirtyBitmap, DirtyReport, Driver, IovaRange, MigrationDevice};

use crate::Test;
use crate::facts::Facts;
use crate::save_restore::open;

pub(crate) const TESTS: &[Test] = &[
    ("dma_log::start_report_stop_container", |facts| start_report_stop(facts, KernelPath::Container)),
    ("dma_log::start_report_stop_iommufd", |facts| start_report_stop(facts, KernelPath::Iommufd)),
    ("dma_log::refusals", refusals),
];

const PAGE: u64 = 4096;

fn range(start: u64, length: u64) -> IovaRange {
    IovaRange::new(start, length).expect("a range")
}

fn start_report_stop(facts: &Facts, path: KernelPath) {
    let mut driver = Driver::new(Box::new(open(&facts.mtty1[0], path)));
    assert!(driver.capabilities().dma_logging);
    let logged = range(0, 64 << 20);
    let page = driver.start_dma_log(PAGE, &[logged]).expect("a started log");
    assert!(page.is_power_of_two());
    for _ in 0..2 {
        let report = driver.report_dma_log(logged, page).expect("a report");
        assert!(matches!(&report, DirtyReport::Pages(bitmap) if bitmap.dirty_pages() == 0), "{report:?}");
    }
    driver.stop_dma_log().expect("a stopped log");
}

fn refusals(facts: &Facts) {
    let mut device = open(&facts.mtty1[0], KernelPath::Iommufd);
    let log = device.dma_log().expect("a log");
    let errno = |result: Result<(), vfio_checkpoint_device::DeviceError>| {
        result.expect_err("a refusal").raw_os_error().expect("an errno")
    };
    let overlapping = [range(0, 2 * PAGE), range(PAGE, 2 * PAGE)];
    assert_eq!(errno(log.start(PAGE, &overlapping).map(|_| ())), libc::EINVAL, "overlapping ranges");
    assert_eq!(errno(log.start(PAGE, &[range(1, PAGE)]).map(|_| ())), libc::EINVAL, "not on a page");
    assert_eq!(errno(log.start(PAGE, &[]).map(|_| ())), libc::EINVAL, "no range");

    // What a driver does where no log was started is its own affair, and mtty says yes to everything; so the rest of
    // the refusals is the simulated device's to prove.
    let whole = range(0, 16 * PAGE);
    log.start(PAGE, &[whole]).expect("a started log");
    let mut bitmap = DirtyBitmap::new(whole, PAGE).expect("a bitmap");
    bitmap.set(3);
    log.report(&mut bitmap).expect("a report");
    assert!(bitmap.is_set(3), "a report never clears the caller's bitmap");
    log.stop().expect("a stopped log");
}
