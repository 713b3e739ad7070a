//! `DEVICE_FEATURE` and the migration data stream, command by command.

use vfio_checkpoint_device::IovaRange;
use vfio_checkpoint_device::sim::{SimConfig, SimDma, SizeReport};
use vfio_checkpoint_device::vfio_user::codec::{
    FeatureId, FeatureOperation, FeaturePayload, LogControl, LogReport,
};
use vfio_checkpoint_device::vfio_user::server::ServerOptions;
use vfio_checkpoint_fsm::State;

use crate::raw::{Raw, payload};
use crate::served::{Served, paired, slot, small};

#[test]
fn features_are_probed_as_the_kernels_are() {
    let (full, _time) = slot(small());
    let dma = SimDma { log: None, ..SimDma::default() };
    let (bare, _time) = slot(SimConfig { dma, data_size: SizeReport::Unknown, ..small() });
    let (mut full, mut bare) = (paired(&full), paired(&bare));
    let (get, set, either) = ((true, false), (false, true), (false, false));
    for (feature, works, not, optional) in [
        (FeatureId::Migration, [get, either].as_slice(), [set].as_slice(), false),
        (FeatureId::MigDeviceState, &[get, set, (true, true), either], &[], false),
        (FeatureId::MigDataSize, &[get, either], &[set, (true, true)], true),
        (FeatureId::DmaLoggingStart, &[set, either], &[get], true),
        (FeatureId::DmaLoggingStop, &[set, either], &[get], true),
        (FeatureId::DmaLoggingReport, &[get, either], &[set], true),
    ] {
        for &(get, set) in works {
            assert_eq!(full.probe(feature, get, set), Ok(()), "{feature:?}");
            let expected = if optional { Err(libc::ENOTTY) } else { Ok(()) };
            assert_eq!(bare.probe(feature, get, set), expected, "{feature:?}");
        }
        for &(get, set) in not {
            assert_eq!(full.probe(feature, get, set), Err(libc::EINVAL), "{feature:?}");
        }
    }
    assert_eq!(full.probe(FeatureId::Other(12), false, true), Err(libc::ENOTTY));
    let small_room = full.feature(FeatureId::Migration, FeatureOperation::Get, FeaturePayload::Empty, 7);
    assert_eq!(small_room, Err(libc::EINVAL));
    let flags = full.feature(FeatureId::Migration, FeatureOperation::Get, FeaturePayload::Empty, 8).unwrap();
    assert_eq!(payload(&flags), FeaturePayload::Migration(0b111));
    let size = full.feature(FeatureId::MigDataSize, FeatureOperation::Get, FeaturePayload::Empty, 8).unwrap();
    assert!(matches!(payload(&size), FeaturePayload::DataSize(bytes) if bytes > 100_000));
    let set = FeaturePayload::Migration(7);
    assert_eq!(full.feature(FeatureId::Migration, FeatureOperation::Set, set, 0), Err(libc::EINVAL));
}

fn report(client: &mut Raw, iova: u64, length_bytes: u64, room: u32) -> Result<Vec<u8>, i32> {
    let asked = LogReport { iova, length_bytes, page_bytes: 4096, bitmap: &[] };
    let body = client.feature(
        FeatureId::DmaLoggingReport,
        FeatureOperation::Get,
        FeaturePayload::LogReport(asked),
        room,
    )?;
    let found = payload(&body);
    let FeaturePayload::LogReport(report) = found else { panic!("not a report: {found:?}") };
    Ok(report.bitmap.to_vec())
}

#[test]
fn the_dma_log_comes_over_the_socket() {
    let range = IovaRange::new(0x10_0000, 100 * 4096).unwrap();
    let dma = SimDma { ranges: vec![range], bytes_per_second: 4096 * 50, ..SimDma::default() };
    let served = Served::new(SimConfig { dma, ..small() }, ServerOptions::default());
    let mut client = served.attach();
    let start = |ranges| FeaturePayload::LogStart(LogControl { page_bytes: 2048, ranges });
    let set = FeatureOperation::Set;
    assert_eq!(report(&mut client, 0x10_0000, 4096, 1000), Err(libc::EINVAL), "not started");
    for wrong in [vec![], vec![(0, 0)], vec![(0, 8192), (4096, 4096)]] {
        assert_eq!(client.feature(FeatureId::DmaLoggingStart, set, start(wrong), 0), Err(libc::EINVAL));
    }
    let wraps = start(vec![(u64::MAX - 4095, 8192)]);
    assert_eq!(client.feature(FeatureId::DmaLoggingStart, set, wraps, 0), Err(libc::EOVERFLOW));
    let ranges = vec![(0x10_0000, 100 * 4096)];
    let started = client.feature(FeatureId::DmaLoggingStart, set, start(ranges.clone()), 0).unwrap();
    let in_force = LogControl { page_bytes: 4096, ranges };
    assert_eq!(payload(&started), FeaturePayload::LogStart(in_force), "the page size in force");

    served.time.advance(std::time::Duration::from_secs(1));
    let dirty = report(&mut client, 0x10_0000, 100 * 4096, 1000).unwrap();
    assert_eq!(dirty.len(), 16);
    assert_eq!(dirty.iter().map(|byte| byte.count_ones()).sum::<u32>(), 50);
    assert_eq!(report(&mut client, 0x10_0000, 100 * 4096, 1000).unwrap(), [0; 16], "cleared");
    assert_eq!(report(&mut client, 0x10_0000, 100 * 4096, 39), Err(libc::EINVAL), "no room for the bitmap");
    assert_eq!(
        report(&mut client, 0, u64::MAX, u32::MAX - 8),
        Err(libc::EINVAL),
        "more than a message holds"
    );
    client.feature(FeatureId::DmaLoggingStop, set, FeaturePayload::Empty, 0).unwrap();
    assert_eq!(report(&mut client, 0x10_0000, 4096, 1000), Err(libc::EINVAL));
}

#[test]
fn reads_are_short_rather_than_over_what_was_agreed_on() {
    let (slot, _time) = slot(SimConfig { memory_bytes: 4 << 20, ..small() });
    let mut client = paired(&slot);
    client.set_state(State::StopCopy).unwrap();
    assert_eq!(client.read(0), Err(libc::EINVAL));
    assert_eq!(client.read(u32::MAX - 8).unwrap().len(), 1 << 20);
    assert_eq!(client.read(10).unwrap().len(), 10);
    while !client.read(1 << 20).unwrap().is_empty() {}
    assert_eq!(client.read(1 << 20).unwrap(), b"", "the end stays the end");
}

/// A device that makes dirty pages readable on being asked how much is left is asked at the end of a round.
#[test]
fn dirty_pages_come_round_by_round() {
    let workload = vfio_checkpoint_device::sim::Workload {
        dirty_bytes_per_second: 10 * 4096,
        ..vfio_checkpoint_device::sim::Workload::default()
    };
    let served = Served::new(SimConfig { workload, ..small() }, ServerOptions::default());
    let mut client = served.attach();
    client.set_state(State::PreCopy).unwrap();
    let mut round = || {
        let mut bytes = 0;
        loop {
            match client.read(1 << 20) {
                Ok(data) => bytes += data.len(),
                Err(libc::ENOMSG) => return bytes,
                Err(errno) => panic!("errno {errno}"),
            }
        }
    };
    assert!(round() > 100_000);
    assert_eq!(round(), 0);
    served.time.advance(std::time::Duration::from_secs(1));
    assert_eq!(round(), 0, "asked at the end of this round");
    assert!(round() > 10 * 4096);
}
