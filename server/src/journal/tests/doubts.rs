//! A commit that failed, and of which nobody knows whether it is on the disk.

use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::SeqCst;

use super::*;

/// A disk whose syncs fail while it is told so, although they have done their work.
#[derive(Debug)]
struct LateDisk(Arc<AtomicU32>);

impl Disk for LateDisk {
    fn make_folder(&self, folder: &Path) -> io::Result<()> {
        Files.make_folder(folder)
    }

    fn is_empty(&self, path: &Path) -> bool {
        Files.is_empty(path)
    }

    fn open(&self, path: &Path, _: Wanted) -> Result<Database, redb::DatabaseError> {
        let mut options = std::fs::OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false).open(path)?;
        let file = redb::backends::FileBackend::new(file)?;
        redb::Builder::new().create_with_backend(FileOfLateDisk { file, late: Arc::clone(&self.0) })
    }
}

#[derive(Debug)]
struct FileOfLateDisk {
    file: redb::backends::FileBackend,
    /// How many more syncs fail.
    late: Arc<AtomicU32>,
}

impl redb::StorageBackend for FileOfLateDisk {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data()?;
        let left = self.late.load(SeqCst);
        self.late.store(left.saturating_sub(1), SeqCst);
        if left > 0 { Err(io::Error::other("late")) } else { Ok(()) }
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write(offset, data)
    }

    fn close(&self) -> io::Result<()> {
        self.file.close()
    }
}

/// What a commit changed that failed is not there, whether it was durable or not.
#[tokio::test]
async fn what_failed_and_is_durable_is_taken_back() {
    let folder = tempfile::tempdir().unwrap();
    let late = Arc::new(AtomicU32::new(0));
    let disk = Arc::new(LateDisk(Arc::clone(&late)));
    let journal = Journal::open(folder.path(), &executor(), disk).unwrap();
    let key = RequestKey { caller: "spiffe://lab.test/saver/a".to_owned(), request_id: "r".to_owned() };
    let of = |last, step| vec![Change::Operation(Box::new(operation(last, step)))];
    let steps =
        |found: Recorded| found.operations.into_iter().map(|one| (one.name, one.step)).collect::<Vec<_>>();
    journal.commit(of(1, RecordedStep::Admitted)).await.unwrap();
    let before = vec![(name(1), RecordedStep::Admitted)];

    // A row that is new, one that changes, and one that changes twice; one failure, and then two in a row.
    for failures in [1, 2] {
        let answer = RequestAnswer::Operation(name(2));
        let request = RequestRecord { digest: "0".repeat(64), at: UnixMillis(1), answer };
        let mut changes = of(1, RecordedStep::Begun);
        changes.extend(of(1, RecordedStep::Stopped));
        changes.extend(of(2, RecordedStep::Admitted));
        changes.push(Change::Request(key.clone(), request));
        late.store(failures, SeqCst);
        journal.commit(changes).await.unwrap_err();
        if failures == 1 {
            let found = journal.load().unwrap();
            assert!(found.requests.is_empty(), "taken back at once");
            assert_eq!(steps(found), before);
        }
        journal.commit(of(3, RecordedStep::Admitted)).await.unwrap();
        journal.commit(vec![Change::ForgetOperation(name(3))]).await.unwrap();
        let found = journal.load().unwrap();
        assert!(found.requests.is_empty());
        assert_eq!(steps(found), before, "after {failures}");
    }
    // What was removed comes back, too.
    late.store(2, SeqCst);
    journal.commit(vec![Change::ForgetOperation(name(1))]).await.unwrap_err();
    journal.commit(of(4, RecordedStep::Admitted)).await.unwrap();
    assert_eq!(steps(journal.load().unwrap()), [before[0].clone(), (name(4), RecordedStep::Admitted)]);
}
