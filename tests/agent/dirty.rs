//! Dirty tracking: the log of pages that a device writes.

use std::time::Duration;

use tonic::Code;
use vfio_checkpoint_device::IovaRange;
use vfio_checkpoint_device::sim::{SimConfig, SimDma};
use vfio_checkpoint_proto::v1;

use crate::flow::{Bench, device, refused, refused_field, violations};
use crate::lab::{Lab, start};

const PAGE: u64 = 4096;

fn from(name: &str, ranges: &[(u64, u64)]) -> v1::StartDirtyTrackingRequest {
    let ranges = ranges.iter().map(|(start, length)| v1::IovaRange { start: *start, length_bytes: *length });
    v1::StartDirtyTrackingRequest {
        name: format!("devices/{name}"),
        page_bytes: PAGE,
        ranges: ranges.collect(),
    }
}

fn of(name: &str, start: u64, length_bytes: u64) -> v1::ReportDirtyPagesRequest {
    v1::ReportDirtyPagesRequest {
        name: format!("devices/{name}"),
        range: Some(v1::IovaRange { start, length_bytes }),
        page_bytes: PAGE,
    }
}

fn stop(name: &str) -> v1::StopDirtyTrackingRequest {
    v1::StopDirtyTrackingRequest { name: format!("devices/{name}") }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_is_started_read_and_ended() {
    let lab = Lab::new();
    let agent = start(lab.config("a", &[("nic0", "sim:seed=1,memory=1MiB")])).await;
    let saver = lab.client(&agent, "saver").await;
    let migrator = lab.client(&agent, "migrator").await;
    let started = saver.start_dirty_tracking(from("nic0", &[(0, 64 * PAGE)])).await.unwrap();
    assert_eq!(started.page_bytes, PAGE);
    // Reading clears the log, so it is read by whoever started it, and by nobody else.
    let others = migrator.report_dirty_pages(of("nic0", 0, 13 * PAGE)).await;
    refused(others, Code::PermissionDenied, "NOT_YOUR_DIRTY_LOG");
    refused(migrator.stop_dirty_tracking(stop("nic0")).await, Code::PermissionDenied, "NOT_YOUR_DIRTY_LOG");
    let others = migrator.start_dirty_tracking(from("nic0", &[(0, 64 * PAGE)])).await;
    refused(others, Code::PermissionDenied, "NOT_YOUR_DIRTY_LOG");
    // A reset that keeps the state keeps the log, and whose it is.
    let admin = lab.client(&agent, "admin").await;
    let keep = v1::ResetDeviceRequest {
        name: "devices/nic0".to_owned(),
        mode: v1::ResetMode::KeepState.into(),
        ..Default::default()
    };
    assert!(!admin.reset_device(keep).await.unwrap().state_lost);
    let others = migrator.report_dirty_pages(of("nic0", 0, 13 * PAGE)).await;
    refused(others, Code::PermissionDenied, "NOT_YOUR_DIRTY_LOG");
    let report = saver.report_dirty_pages(of("nic0", 0, 13 * PAGE)).await.unwrap();
    assert_eq!((report.bitmap.as_ref(), report.all_dirty), ([0u8, 0].as_slice(), false), "it wrote nothing");

    let again = saver.start_dirty_tracking(from("nic0", &[(0, 64 * PAGE)])).await;
    let refusal = refused(again, Code::FailedPrecondition, "DIRTY_TRACKING");
    assert!(refusal.message.contains("devices/nic0"), "{refusal}");
    saver.stop_dirty_tracking(stop("nic0")).await.unwrap();
    saver.stop_dirty_tracking(stop("nic0")).await.expect("there is nothing to stop, and that is well");

    // Where there is no log, every page counts as dirty, and no bit beyond the last page is set.
    let report = saver.report_dirty_pages(of("nic0", 0, 13 * PAGE)).await.unwrap();
    assert!(report.all_dirty);
    assert_eq!(report.bitmap.as_ref(), [0xff, 0b1_1111]);
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_tracked_is_told() {
    let lab = Lab::new();
    let blind = Bench::new(SimConfig {
        memory_bytes: 1 << 20,
        dma: SimDma { log: None, ..SimDma::default() },
        ..SimConfig::default()
    });
    let agent =
        start(lab.config("a", &[("nic0", "sim:seed=1,memory=1MiB"), ("blind", blind.address.as_str())]))
            .await;
    let saver = lab.client(&agent, "saver").await;
    let begin = |request| saver.start_dirty_tracking(request);
    refused_field(
        begin(v1::StartDirtyTrackingRequest { page_bytes: 0, ..from("nic0", &[(0, PAGE)]) }).await,
        "page_bytes",
    );
    refused_field(
        begin(v1::StartDirtyTrackingRequest { page_bytes: 3, ..from("nic0", &[(0, PAGE)]) }).await,
        "page_bytes",
    );
    // The kernel refuses it, and so does a device that is none of the kernel's.
    refused_field(begin(from("nic0", &[])).await, "ranges");
    refused_field(begin(from("nic0", &[(0, 2 * PAGE), (PAGE, PAGE)])).await, "ranges");
    refused_field(begin(from("nic0", &vec![(0, PAGE); 1025])).await, "ranges");
    refused_field(begin(from("nic0", &[(0, PAGE), (PAGE, 0)])).await, "ranges[1].length_bytes");
    refused_field(begin(from("nic0", &[(u64::MAX, 2)])).await, "ranges[0].length_bytes");
    refused_field(begin(from("", &[(0, PAGE)])).await, "name");
    refused(begin(from("nic9", &[(0, PAGE)])).await, Code::NotFound, "DEVICE_NOT_FOUND");

    let read = |request| saver.report_dirty_pages(request);
    refused_field(read(v1::ReportDirtyPagesRequest { range: None, ..of("nic0", 0, PAGE) }).await, "range");
    refused_field(read(of("nic0", 0, 0)).await, "range.length_bytes");
    refused_field(read(of("nic0", 1, PAGE)).await, "range");
    refused_field(read(of("nic0", 0, (8 << 20) * PAGE + PAGE)).await, "range");
    refused_field(
        read(v1::ReportDirtyPagesRequest { page_bytes: 5, ..of("nic0", 0, PAGE) }).await,
        "page_bytes",
    );
    refused(read(of("nic9", 0, PAGE)).await, Code::NotFound, "DEVICE_NOT_FOUND");
    refused_field(saver.stop_dirty_tracking(stop("a/b")).await, "name");
    refused(saver.stop_dirty_tracking(stop("nic9")).await, Code::NotFound, "DEVICE_NOT_FOUND");

    assert_eq!(device(&saver, "blind").await.dirty_source(), v1::DirtySource::AllDirty);
    refused(begin(from("blind", &[(0, PAGE)])).await, Code::FailedPrecondition, "DIRTY_TRACKING");
    let mut save = crate::flow::save_of(&["blind"]);
    save.forbid_all_dirty = true;
    let refusal = refused(saver.start_save(save).await, Code::FailedPrecondition, "BLOCKED");
    let blocker = ("BLOCKER_REASON_NO_DIRTY_TRACKING".to_owned(), "devices/blind".to_owned());
    assert_eq!(violations(&refusal), [blocker]);
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_that_a_device_writes_are_told_once_and_no_others() {
    let lab = Lab::new();
    // Three pages a second, out of three: 10, 11 and 12.
    let writing = Bench::new(SimConfig {
        memory_bytes: 1 << 20,
        dma: SimDma {
            ranges: vec![IovaRange::new(10 * PAGE, 3 * PAGE).unwrap()],
            bytes_per_second: 3 * PAGE,
            ..SimDma::default()
        },
        ..SimConfig::default()
    });
    let agent = start(lab.config("a", &[("nic0", writing.address.as_str())])).await;
    let saver = lab.client(&agent, "saver").await;
    saver.start_dirty_tracking(from("nic0", &[(0, 64 * PAGE)])).await.unwrap();
    let read = async |start: u64, pages: u64| {
        let report = saver.report_dirty_pages(of("nic0", start * PAGE, pages * PAGE)).await.unwrap();
        assert!(!report.all_dirty);
        report.bitmap.to_vec()
    };
    assert_eq!(read(0, 20).await, [0, 0, 0], "its time stands still");
    writing.time.advance(Duration::from_secs(1));
    assert_eq!(read(0, 10).await, [0, 0], "it writes elsewhere");
    assert_eq!(read(8, 12).await, [0b0001_1100, 0], "the first page of the range is the lowest bit");
    assert_eq!(read(0, 20).await, [0, 0, 0], "what was told is cleared");
    writing.time.advance(Duration::from_secs(1));
    assert_eq!(read(0, 20).await, [0, 0b0001_1100, 0], "it wrote them again");
    assert_eq!(writing.device.dma_writes(), 6);
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_is_out_of_service_is_not_asked() {
    let lab = Lab::new();
    let agent = start(lab.config("a", &[("gone", "vfio-user:/nonexistent/device.sock")])).await;
    let saver = lab.client(&agent, "saver").await;
    let started = saver.start_dirty_tracking(from("gone", &[(0, PAGE)])).await;
    let refusal = refused(started, Code::FailedPrecondition, "OUT_OF_SERVICE");
    assert!(refusal.message.contains("/nonexistent/device.sock"), "{refusal}");
    refused(saver.report_dirty_pages(of("gone", 0, PAGE)).await, Code::FailedPrecondition, "OUT_OF_SERVICE");
    refused(saver.stop_dirty_tracking(stop("gone")).await, Code::FailedPrecondition, "OUT_OF_SERVICE");
    agent.stop().await.unwrap();
}
