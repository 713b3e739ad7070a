//! What was committed is there after a restart, whole, and what is not understood stops the agent.

mod doubts;

use std::time::Duration;

use vfio_checkpoint_device::{Seal, Threads};

use vfio_checkpoint_proto::ids::{Epoch, LogicalDeviceId};

use super::*;
use crate::environment::UnixMillis;
use crate::operation::record::{
    AfterRecord, Consistency, EndOutcome, EndRecord, EndResult, FailureRecord, JobRecord, OccupantRecord,
    OperationDeviceRecord, RecordedStep,
};

fn executor() -> Arc<dyn Executor> {
    Arc::new(Threads::new())
}

fn name(last: u64) -> OperationName {
    OperationName::from_id(&format!("{:011x}-{last:016x}", 1)).unwrap()
}

fn device() -> DeviceName {
    DeviceName::from_id("nic0").unwrap()
}

fn operation(last: u64, step: RecordedStep) -> OperationRecord {
    OperationRecord {
        name: name(last),
        job: JobRecord::Save {
            pre_copy: true,
            barrier: false,
            manual_cutover: true,
            after: AfterRecord::Hold,
        },
        devices: vec![OperationDeviceRecord {
            device: device(),
            logical: LogicalDeviceId::from_bytes([7; 16]),
            epoch: Epoch(3),
            seal: Some(Seal { bytes: 9, blake3: [1; 32] }),
            before: Some(OccupantRecord { logical: LogicalDeviceId::from_bytes([6; 16]), epoch: Epoch(1) }),
        }],
        caller: "spiffe://lab.test/saver/a".to_owned(),
        request_id: Some("00000001-0000-4000-8000-000000000000".to_owned()),
        owner_pod: "default/pod".to_owned(),
        created: UnixMillis(5),
        checkpoint: None,
        handover: None,
        trace_id: None,
        step,
    }
}

fn end() -> EndRecord {
    EndRecord {
        at: UnixMillis(99),
        result: EndResult::Failed,
        outcome: EndOutcome::StateLost,
        failure: Some(FailureRecord {
            reason: "DEVICE_FAILED".to_owned(),
            message: "it did".to_owned(),
            device: Some(device()),
        }),
        consistency: Some(Consistency::Inconsistent),
        moved_bytes: vec![9],
        pre_copy_bytes: 4,
        device_pre_copy_bytes: vec![1],
        downtime: Some(Duration::from_nanos(1_234_567_891)),
        predicted_downtime: None,
        quarantined: vec![device()],
        hung: vec![device()],
        unavailable: Vec::new(),
        left_stopped: false,
        revision: 47,
    }
}

fn key(caller: &str) -> RequestKey {
    RequestKey { caller: caller.to_owned(), request_id: "r".to_owned() }
}

fn request(operation: OperationName) -> RequestRecord {
    RequestRecord { digest: "d".repeat(64), at: UnixMillis(5), answer: RequestAnswer::Operation(operation) }
}

fn record() -> DeviceRecord {
    DeviceRecord {
        logical: LogicalDeviceId::from_bytes([8; 16]),
        epoch: Epoch(2),
        rate_bytes_per_second: Some(1 << 30),
        quarantined: true,
        left_stopped: false,
        handed_over: false,
        past: Vec::new(),
    }
}

fn open(folder: &Path) -> Result<Journal, JournalError> {
    Journal::open(folder, &executor(), Arc::new(Files))
}

/// As a later life of the agent finds it. What was committed holds the file no longer.
fn reopened(journal: Journal, folder: &Path) -> Journal {
    drop(journal);
    open(folder).unwrap()
}

#[tokio::test]
async fn every_step_and_record_is_read_back_as_it_was_written() {
    let folder = tempfile::tempdir().unwrap();
    let steps = [
        RecordedStep::Admitted,
        RecordedStep::Held {
            deadline: UnixMillis(77),
            limit: Some(Duration::from_secs(5)),
            stopped_at: Some(UnixMillis(76)),
        },
        RecordedStep::Running { inconsistent: false },
        RecordedStep::Running { inconsistent: true },
        RecordedStep::Stopped,
        RecordedStep::Ended(end()),
    ];
    let written: Vec<OperationRecord> =
        steps.into_iter().zip(0..).map(|(step, last)| operation(last, step)).collect();
    let restore = OperationRecord {
        job: JobRecord::Restore { barrier: true, hold: true },
        request_id: None,
        ..operation(100, RecordedStep::Admitted)
    };
    let journal = open(folder.path()).unwrap();
    assert!(journal.load().unwrap().operations.is_empty());
    let reset = RequestRecord { answer: RequestAnswer::Reset { state_lost: None }, ..request(name(0)) };
    let mut changes: Vec<Change> =
        written.iter().cloned().map(|record| Change::Operation(Box::new(record))).collect();
    changes.push(Change::Operation(Box::new(restore.clone())));
    changes.push(Change::Request(key("a"), request(name(0))));
    changes.push(Change::Request(key("b"), reset.clone()));
    changes.push(Change::Device(device(), record()));
    journal.commit(changes).await.unwrap();

    let journal = reopened(journal, folder.path());
    let found = journal.load().unwrap();
    assert_eq!(found.operations, [written, vec![restore]].concat(), "the oldest first");
    assert_eq!(found.requests, [(key("a"), request(name(0))), (key("b"), reset)]);
    assert_eq!(found.devices, [(device(), record())]);
}

fn checkpoint(id: &str) -> CheckpointName {
    format!("stores/local/checkpoints/{id}").parse().unwrap()
}

#[tokio::test]
async fn what_is_owed_is_read_back_until_it_is_paid_and_a_file_from_before_opens() {
    let folder = tempfile::tempdir().unwrap();
    let journal = open(folder.path()).unwrap();
    journal.commit(vec![Change::Device(device(), record())]).await.unwrap();
    drop(journal);
    // As the agents wrote it that had no debts.
    let database = Database::open(folder.path().join("journal.redb")).unwrap();
    let transaction = database.begin_write().unwrap();
    assert!(transaction.delete_table(DEBTS).unwrap());
    transaction.commit().unwrap();
    drop(database);

    let journal = open(folder.path()).unwrap();
    let found = journal.load().unwrap();
    assert_eq!((found.devices, found.debts), (vec![(device(), record())], Vec::new()));
    let debts = [("a", Owed::Inconsistent), ("b", Owed::Discard)];
    let debts = debts.map(|(id, owed)| (checkpoint(id), DebtRecord { owed }));
    let changes = debts.iter().map(|(name, record)| Change::Debt(name.clone(), *record));
    journal.commit(changes.collect()).await.unwrap();
    let journal = reopened(journal, folder.path());
    assert_eq!(journal.load().unwrap().debts, debts);
    journal.commit(vec![Change::ForgetDebt(checkpoint("a"))]).await.unwrap();
    assert_eq!(reopened(journal, folder.path()).load().unwrap().debts, debts[1..]);
}

#[test]
fn what_is_kept_of_the_past_is_bounded_and_a_record_from_before_is_read() {
    let before = r#"{"logical":"08080808080808080808080808080808","epoch":2,"rate_bytes_per_second":null,
        "quarantined":false,"left_stopped":true}"#;
    let mut record: DeviceRecord = serde_json::from_str(before).unwrap();
    assert_eq!(record.past, Vec::new());
    for index in 100..200 {
        record = record.after_discard(LogicalDeviceId::from_bytes([index; 16]));
        record.left_stopped = false;
    }
    assert_eq!(record.past.len(), DeviceRecord::MAX_PAST);
    // The one that was left stopped outlives those that run nowhere.
    assert!(!record.past[0].runs_nowhere);
    assert_eq!(record.past[0].logical, LogicalDeviceId::from_bytes([8; 16]));
    assert_eq!(record.past.last().unwrap().logical, LogicalDeviceId::from_bytes([198; 16]));
}

#[tokio::test]
async fn the_last_word_counts_and_what_is_forgotten_is_gone() {
    let folder = tempfile::tempdir().unwrap();
    let journal = open(folder.path()).unwrap();
    let first = Change::Operation(Box::new(operation(1, RecordedStep::Admitted)));
    let ended = operation(1, RecordedStep::Ended(end()));
    journal.commit(vec![first, Change::Request(key("a"), request(name(1)))]).await.unwrap();
    journal.commit(vec![Change::Operation(Box::new(ended.clone()))]).await.unwrap();
    assert_eq!(journal.load().unwrap().operations, [ended]);
    let gone = vec![Change::ForgetOperation(name(1)), Change::ForgetRequest(key("a"))];
    journal.commit(gone.clone()).await.unwrap();
    // Said again it is no error.
    journal.commit(gone).await.unwrap();
    let found = journal.load().unwrap();
    assert!(found.operations.is_empty() && found.requests.is_empty());
}

#[test]
fn one_agent_at_a_time() {
    let folder = tempfile::tempdir().unwrap();
    let _first = open(folder.path()).unwrap();
    let error = open(folder.path()).unwrap_err();
    assert!(matches!(error, JournalError::InUse { .. }), "{error:?}");
    assert!(error.to_string().contains("another agent"), "{error}");
}

#[test]
fn a_folder_that_cannot_be_made_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let error = open(&file.join("state")).unwrap_err();
    assert!(matches!(&error, JournalError::Folder { path, .. } if path.starts_with(&file)), "{error:?}");
}

#[test]
fn a_file_that_was_emptied_is_refused_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    drop(open(folder.path()).unwrap());
    let file = folder.path().join("journal.redb");
    std::fs::write(&file, "").unwrap();
    let error = open(folder.path()).unwrap_err();
    assert!(matches!(&error, JournalError::Empty { path } if *path == file), "{error:?}");
    assert!(error.to_string().contains("put its backup in its place"), "{error}");
    assert_eq!(std::fs::metadata(&file).unwrap().len(), 0, "nothing is begun in its place");
}

#[test]
fn a_file_of_another_format_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let database = Database::create(folder.path().join("journal.redb")).unwrap();
    let transaction = database.begin_write().unwrap();
    transaction.open_table(META).unwrap().insert("format", FORMAT + 1).unwrap();
    transaction.commit().unwrap();
    drop(database);
    let error = open(folder.path()).unwrap_err();
    assert!(matches!(error, JournalError::Format { found, .. } if found == FORMAT + 1), "{error:?}");
}

#[test]
fn nothing_that_is_not_understood_is_thrown_away() {
    for (table, key, text) in [
        ("operations", "operations/x", r#"{"name":"operations/x"}"#),
        ("devices", "devices/x", r#"{"colour":"red"}"#),
        ("requests", "a\nr", "garbage"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let journal = open(folder.path()).unwrap();
        let definition: TableDefinition<'_, &str, &[u8]> = TableDefinition::new(table);
        let writing = |database: &Database| {
            let transaction = database.begin_write().unwrap();
            transaction.open_table(definition).unwrap().insert(key, text.as_bytes()).unwrap();
            transaction.commit().map_err(JournalError::storage)
        };
        locked(&journal.shared.file).run(writing).unwrap();
        let error = journal.load().unwrap_err();
        assert!(
            matches!(&error, JournalError::Record { table: named, key: at, .. } if *named == table && at == key),
            "{error:?}"
        );
    }
}

#[test]
fn a_key_is_read_as_it_was_written() {
    let key = key("spiffe://lab.test/a");
    assert_eq!(RequestKey::parse(&key.text()), Some(key));
    assert_eq!(RequestKey::parse("no line break"), None);
}

/// A commit that nobody waits for any more is under way: the file is its, too.
#[tokio::test]
async fn what_is_settled_can_be_opened_again() {
    let folder = tempfile::tempdir().unwrap();
    let journal = Journal::open(folder.path(), &executor(), Arc::new(Files)).unwrap();
    let (go_on, told) = std::sync::mpsc::channel::<()>();
    journal.shared.lane.submit(Box::new(move || told.recv().unwrap()));
    let mut commit =
        Box::pin(journal.commit(vec![Change::Operation(Box::new(operation(1, RecordedStep::Begun)))]));
    assert!(futures_util::poll!(&mut commit).is_pending());
    drop(commit);
    let mut settled = Box::pin(journal.settled());
    assert!(futures_util::poll!(&mut settled).is_pending(), "the commit has not come to its end");
    go_on.send(()).unwrap();
    settled.await;
    drop(journal);
    let again = Journal::open(folder.path(), &executor(), Arc::new(Files)).expect("nobody has it");
    assert_eq!(again.load().unwrap().operations.len(), 1);
}

/// A disk that is full while it is told to be.
#[derive(Debug)]
struct FullDisk(Arc<std::sync::atomic::AtomicBool>);

impl Disk for FullDisk {
    fn make_folder(&self, folder: &Path) -> io::Result<()> {
        Files.make_folder(folder)
    }

    fn is_empty(&self, path: &Path) -> bool {
        Files.is_empty(path)
    }

    fn open(&self, path: &Path, wanted: Wanted) -> Result<Database, redb::DatabaseError> {
        let mut options = std::fs::OpenOptions::new();
        let file = options.read(true).write(true).create(wanted == Wanted::OldOrNew).open(path)?;
        let file = redb::backends::FileBackend::new(file)?;
        redb::Builder::new().create_with_backend(FileOfFullDisk { file, full: Arc::clone(&self.0) })
    }
}

#[derive(Debug)]
struct FileOfFullDisk {
    file: redb::backends::FileBackend,
    full: Arc<std::sync::atomic::AtomicBool>,
}

impl FileOfFullDisk {
    fn room(&self) -> io::Result<()> {
        if self.full.load(std::sync::atomic::Ordering::SeqCst) {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        Ok(())
    }
}

impl redb::StorageBackend for FileOfFullDisk {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.room()?;
        self.file.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.room()?;
        self.file.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.room()?;
        self.file.write(offset, data)
    }

    fn close(&self) -> io::Result<()> {
        self.file.close()
    }
}

/// redb refuses everything after an I/O error, for as long as the file is open.
#[tokio::test]
async fn a_disk_that_was_full_once_takes_commits_again() {
    let folder = tempfile::tempdir().unwrap();
    let full = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let disk = Arc::clone(&full);
    let journal = Journal::open(folder.path(), &executor(), Arc::new(FullDisk(disk))).unwrap();
    let failing = journal.failing();
    let of = |last| vec![Change::Operation(Box::new(operation(last, RecordedStep::Begun)))];
    journal.commit(of(1)).await.unwrap();
    assert!(!*failing.borrow());

    full.store(true, std::sync::atomic::Ordering::SeqCst);
    for attempt in 0..3 {
        let error = journal.commit(of(2)).await.unwrap_err();
        assert!(error.is_of_storage(), "{attempt}: {error:?}");
        assert!(chain(&error).contains("no storage space"), "{attempt}: {}", chain(&error));
        assert!(*failing.borrow(), "{attempt}");
    }
    full.store(false, std::sync::atomic::Ordering::SeqCst);
    journal.commit(of(3)).await.unwrap();
    assert!(!*failing.borrow());
    let names = |found: Recorded| found.operations.into_iter().map(|one| one.name).collect::<Vec<_>>();
    assert_eq!(names(journal.load().unwrap()), [name(1), name(3)], "all of a commit or nothing");
    assert_eq!(names(reopened(journal, folder.path()).load().unwrap()), [name(1), name(3)]);
}

/// Whatever an earlier start left behind that did not come to its end.
#[test]
fn a_file_that_was_begun_and_not_finished_is_begun_anew() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("journal.new"), [0xa5; 5000]).unwrap();
    drop(open(folder.path()).unwrap());
    let found: Vec<_> =
        std::fs::read_dir(folder.path()).unwrap().map(|one| one.unwrap().file_name()).collect();
    assert_eq!(found, ["journal.redb"]);
}

/// A file that is gone is not begun anew behind the agent's back.
#[tokio::test]
async fn a_file_that_is_gone_is_not_begun_anew() {
    let folder = tempfile::tempdir().unwrap();
    let journal = open(folder.path()).unwrap();
    let file = folder.path().join("journal.redb");
    std::fs::rename(&file, folder.path().join("elsewhere")).unwrap();
    let io = || JournalError::storage(redb::Error::Io(io::Error::other("as a disk says it")));
    locked(&journal.shared.file).run(|_| Err::<(), _>(io())).unwrap_err();
    let change = Change::Operation(Box::new(operation(1, RecordedStep::Begun)));
    let error = journal.commit(vec![change.clone()]).await.unwrap_err();
    assert!(matches!(&error, JournalError::Open { path, .. } if *path == file), "{error:?}");
    std::fs::rename(folder.path().join("elsewhere"), &file).unwrap();
    journal.commit(vec![change]).await.unwrap();
}

/// Whatever is wrong with the file, and wherever: an error that names it, and never a panic. What is not noticed is where
/// nothing is written.
#[test]
fn a_damaged_file_is_named_with_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    drop(open(folder.path()).unwrap());
    let file = folder.path().join("journal.redb");
    let good = std::fs::read(&file).unwrap();
    let mut cases: Vec<(String, Vec<u8>)> =
        vec![("garbage".to_owned(), vec![0xa5; 70_000]), ("zeros".to_owned(), vec![0; good.len()])];
    for cut in [1, 100, 320, 4096, 8192, good.len() / 2, good.len() - 1] {
        cases.push((format!("cut to {cut}"), good[..cut].to_vec()));
    }
    for at in (0..320).step_by(4).chain((4096..good.len().min(1 << 16)).step_by(1024)) {
        let mut bad = good.clone();
        bad[at..at + 4].iter_mut().for_each(|byte| *byte ^= 0xff);
        cases.push((format!("four bytes at {at}"), bad));
    }
    let mut damaged = 0;
    for (case, bytes) in cases {
        std::fs::write(&file, bytes).unwrap();
        match open(folder.path()).and_then(|journal| journal.load()) {
            Ok(_) => {}
            Err(JournalError::Damaged { path, .. }) => {
                damaged += 1;
                assert_eq!(path, file, "{case}");
            }
            Err(error) => panic!("{case}: {error:?}"),
        }
    }
    assert!(damaged > 10, "{damaged}");
    std::fs::write(&file, good).unwrap();
    open(folder.path()).unwrap().load().unwrap();
}
