//! Pre-copy of a device that has something to copy: ENOMSG, dirty bytes, and a stop in the middle of a record.

use std::time::Duration;

use bytes::Bytes;
use vfio_checkpoint_device::driver::{Peers, SaveMode, SaveRead};
use vfio_checkpoint_device::kernel::{KernelDevice, KernelPath};
use vfio_checkpoint_device::operation::{BoxError, Decision, Left, Pace, PrecopyPolicy, StateSink};
use vfio_checkpoint_device::pool::MIN_CHUNK_BYTES;
use vfio_checkpoint_device::{
    ChunkPool, ConfigCapture, DataSize, DataStream, MigrationDevice, PrecopyInfo, Read,
};
use vfio_checkpoint_fsm::State;

use super::{Parameters, blank, programmed};
use crate::blobs::load;
use crate::facts::Facts;
use crate::kmsg::KernelLog;
use crate::save_restore::{Memory, driver, lane, read_all, request, restore, save};
use crate::uart;

/// Header, the byte that ends the records, one port.
const STOP_COPY_BYTES: u64 = 24 + 1 + 36;

/// A sink during whose work the device goes on working: each of the first chunks is followed by a register write.
struct Restless<'a> {
    memory: Memory,
    device: &'a KernelDevice,
    writes_left: u8,
}

impl StateSink for Restless<'_> {
    async fn chunk(&mut self, device: usize, bytes: Bytes) -> Result<(), BoxError> {
        if let Some(left) = self.writes_left.checked_sub(1) {
            self.writes_left = left;
            uart::scratch(self.device, 0x40 + left);
        }
        self.memory.chunk(device, bytes).await
    }

    async fn seal(&mut self, config: &[Option<ConfigCapture>]) -> Result<(), BoxError> {
        self.memory.seal(config).await
    }

    async fn mark_inconsistent(&mut self) -> Result<(), BoxError> {
        self.memory.mark_inconsistent().await
    }

    async fn discard(&mut self) -> Result<(), BoxError> {
        self.memory.discard().await
    }
}

/// The whole operation, with an answer of ENOMSG after every chunk: had one been taken for the end, the state would
/// be cut short. A record is 8 bytes, so it takes five until as much is copied as the device says it has, which with
/// a downtime limit of zero is when pre-copy ends.
pub(super) fn no_message(facts: &Facts) {
    const RECORD_BYTES: u32 = 8;
    const ROUNDS: u8 = 5;
    for path in [KernelPath::Container, KernelPath::Iommufd] {
        let parameters = Parameters::new();
        parameters.enomsg().dirty_bytes(RECORD_BYTES);
        let (source, destination) =
            (programmed(&facts.mttyv1[0], path, 11), programmed(&facts.mttyv1[1], path, 99));
        let policy = PrecopyPolicy {
            downtime_limit: Duration::ZERO,
            // Far more than it takes; what never gets there fails here.
            time_budget: Duration::from_secs(10),
            stop_over_limit: false,
        };
        let mut log = KernelLog::new();
        let mut sink = Restless { memory: Memory::new(1), device: &source, writes_left: ROUNDS };
        let report = save(&[lane(&source)], request(true), policy, &mut sink).expect("a save");
        let answers = log.mentions(&facts.mttyv1[0], "nothing now");
        assert_eq!(report.precopy_bytes, 24 + u64::from(ROUNDS) * u64::from(RECORD_BYTES));
        assert_eq!(report.bytes, [report.precopy_bytes + 1 + 36]);
        assert!(answers > usize::from(ROUNDS), "{answers}: every round ends with ENOMSG");
        assert_eq!(uart::registers(&source, 1)[0][7], 0x40, "the last write was in pre-copy");

        restore(&[lane(&destination)], &mut sink.memory).expect("a restore");
        assert_eq!(uart::registers(&destination, 1), uart::registers(&source, 1));
        println!(
            "figures: variant {path:?}: {answers} answers of ENOMSG in one save, {} bytes pre-copied in {ROUNDS} rounds \
             of register writes",
            report.precopy_bytes
        );
    }
}

/// What the policy sees, step by step: nothing, then dirty state, then nothing again.
pub(super) fn dirty_bytes(facts: &Facts) {
    const RECORD_BYTES: u32 = 4096;
    let parameters = Parameters::new();
    parameters.enomsg().dirty_bytes(RECORD_BYTES);
    let device = programmed(&facts.mttyv1[0], KernelPath::Iommufd, 3);
    let mut driver = driver(&device);
    let pool = ChunkPool::new(MIN_CHUNK_BYTES, 2);
    let policy = PrecopyPolicy { downtime_limit: Duration::from_millis(10), ..PrecopyPolicy::default() };
    let mut session = driver.begin_save(SaveMode::PreCopy, Peers::None).expect("a session");
    let mut blob = Vec::new();

    assert_eq!(session.precopy_info().expect("info").expect("a device that says"), info(24, 0));
    let SaveRead::Chunk(header) = session.read(&pool).expect("the header") else { panic!("the header") };
    blob.extend_from_slice(&header);
    assert_eq!(blob.len(), 24);
    // So slow that what is left takes longer than the limit, in the last round too.
    let slow = policy.time_budget / 2;
    let mut pace = Pace::default();
    pace.read(session.read_bytes(), slow, false);
    for round in 1..=3 {
        assert_eq!(session.read(&pool).expect("a read"), SaveRead::NothingNow, "ENOMSG is not the end");
        pace.read(0, slow, true);
        assert_eq!(session.precopy_info().expect("info"), Some(info(0, 0)));
        // Two writes before anybody looks are one change.
        uart::scratch(&device, round);
        uart::scratch(&device, 0x80 | round);
        let left = session.precopy_info().expect("info");
        assert_eq!(left, Some(info(0, RECORD_BYTES.into())));
        let size = driver.data_size().expect("a size");
        assert_eq!(size, DataSize::UpperBound(STOP_COPY_BYTES));
        let mut seen = Left { precopy: left, stop_copy: size, nothing_now: false, pace };
        assert_eq!(policy.decide(&[seen], Duration::ZERO), Decision::Continue);
        let SaveRead::Chunk(record) = session.read(&pool).expect("a record") else { panic!("a record") };
        assert_eq!(record.len(), 4096);
        blob.extend_from_slice(&record);
        seen.precopy = session.precopy_info().expect("info");
        pace.read(record.len() as u64, slow, false);
        seen.pace = pace;
        assert_eq!(policy.decide(&[seen], Duration::ZERO), Decision::CutOver, "it converged");
    }
    driver.quiesce(&session).expect("the barrier");
    driver.stop_copy(&mut session).expect("the stop");
    while let SaveRead::Chunk(chunk) = session.read(&pool).expect("a chunk") {
        blob.extend_from_slice(&chunk);
    }
    let stopped = driver.finish_save(session).expect("a whole state");
    driver.resume(stopped).expect("a running device");

    let destination = blank(&facts.mttyv1[1], KernelPath::Container);
    load(&destination, &blob).expect("the blob loads");
    assert_eq!(uart::registers(&destination, 1), uart::registers(&device, 1));
    println!("figures: variant: 3 rounds of {RECORD_BYTES} dirty bytes reported, read and converged");
}

fn info(initial_bytes: u64, dirty_bytes: u64) -> PrecopyInfo {
    PrecopyInfo { initial_bytes, dirty_bytes, reinit: false }
}

/// A record that was begun before the stop is finished after it; one that was not begun is not missed.
pub(super) fn cut_record(facts: &Facts) {
    let parameters = Parameters::new();
    parameters.dirty_bytes(1000);
    let mut device = programmed(&facts.mttyv1[0], KernelPath::Container, 4);
    let Some(DataStream::Save(mut stream)) = device.set_state(State::PreCopy).expect("a session") else {
        panic!("PRE_COPY opens a stream")
    };
    let mut blob = vec![0; 24];
    assert_eq!(stream.read(&mut blob).expect("the header"), Read::Bytes(24));
    uart::scratch(&device, 1);
    let mut part = [0; 300];
    assert_eq!(stream.read(&mut part).expect("a part"), Read::Bytes(300));
    blob.extend_from_slice(&part);
    assert_eq!(stream.precopy_info().expect("info"), info(0, 700));
    uart::scratch(&device, 2);
    assert_eq!(stream.precopy_info().expect("info"), info(0, 1700));
    device.set_state(State::StopCopy).expect("the stop");
    blob.extend(read_all(&mut *stream).expect("the rest"));
    assert_eq!(blob.len(), 24 + 1000 + 1 + 36);
    device.set_state(State::Running).expect("a running device");

    let destination = blank(&facts.mttyv1[1], KernelPath::Container);
    load(&destination, &blob).expect("the blob loads");
    assert_eq!(uart::registers(&destination, 1), uart::registers(&device, 1));
}
