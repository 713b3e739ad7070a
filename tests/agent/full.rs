//! A store on a disk that is really full: what is refused, what ends on the way, and how it is freed.
//!
//! ```text
//!   this program --unshare, mount tmpfs--> this program, one test: agent, device, store on a disk of 64 MiB
//! ```
//! The disk is in a mount namespace of the test's own, which ends with it. Where the machine lets nobody have one, the test
//! says so and passes.

use std::env;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use rustix::fs::{FallocateFlags, fallocate, statvfs};
use tonic::Code;
use vfio_checkpoint_client::call::Client;
use vfio_checkpoint_device::sim::{SimConfig, SizeReport};
use vfio_checkpoint_fsm::State;
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_server::config::StoreConfig;
use vfio_checkpoint_store::{Ambient, Limits, Location, Store};

use crate::flow::{Bench, device, done, failure, refused, save_of, soon, start_save, violations};
use crate::lab::{Lab, start};
use crate::unshared::{one_test, unshared};

/// Says to this test program that it has a disk of its own, and where.
pub(crate) const DISK: &str = "AGENT_TEST_DISK";
const MIB: u64 = 1 << 20;
/// What the store keeps for the time when its disk is full.
const BALLAST_BYTES: u64 = 16 * MIB;
/// What the store leaves free.
const KEPT_FREE_BYTES: u64 = 2 * MIB;

#[test]
fn a_store_on_a_full_disk_says_so_and_can_be_freed() {
    on_a_disk("full::on_a_disk_of_its_own");
}

/// Runs a test of this program where a disk is its own.
#[allow(clippy::print_stdout, reason = "what it says is the test's")]
pub(crate) fn on_a_disk(test: &str) {
    let folder = tempfile::tempdir().unwrap();
    // Few files, so that they can be used up as well.
    let mount = r#"mount -t tmpfs -o size=64m,nr_inodes=4096,mode=700 tmpfs "$AGENT_TEST_DISK""#;
    match unshared("--mount", mount, (DISK, folder.path().as_os_str())) {
        Some(there) => one_test(there, test),
        None => {
            println!("skipped: nobody may mount a disk of their own here (no root, and no user namespaces)");
        }
    }
}

/// The disk.
pub(crate) struct Disk(pub(crate) PathBuf);

impl Disk {
    fn free_bytes(&self) -> u64 {
        let stat = statvfs(&self.0).unwrap();
        stat.f_bavail * stat.f_frsize
    }

    /// Leaves so much room, and no more.
    fn leave(&self, bytes: u64) {
        let file = File::create(self.0.join("filler")).unwrap();
        fallocate(&file, FallocateFlags::empty(), 0, self.free_bytes() - bytes).unwrap();
        assert_eq!(self.free_bytes(), bytes);
    }

    /// Takes the last byte.
    pub(crate) fn fill(&self) {
        let mut filler = OpenOptions::new().append(true).create(true).open(self.0.join("filler")).unwrap();
        while filler.write_all(&[1; 4096]).is_ok() {}
        assert_eq!(filler.write_all(&[1]).unwrap_err().kind(), ErrorKind::StorageFull);
    }

    /// Leaves so many files, and no more. There is room in bytes.
    fn leave_files(&self, count: usize) {
        let folder = self.0.join("fillers");
        fs::create_dir(&folder).unwrap();
        let made = (0..100_000).find(|index| File::create(folder.join(index.to_string())).is_err()).unwrap();
        for index in made - count..made {
            fs::remove_file(folder.join(index.to_string())).unwrap();
        }
    }

    pub(crate) fn free(&self) {
        let _ = fs::remove_file(self.0.join("filler"));
        let _ = fs::remove_dir_all(self.0.join("fillers"));
    }
}

#[derive(Debug, Default)]
struct Here(AtomicU64);

impl Ambient for Here {
    fn now(&self) -> SystemTime {
        SystemTime::now()
    }

    fn random(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed)
    }
}

/// One agent with one store on the disk.
struct Case {
    saver: Client,
    disk: Disk,
    store: PathBuf,
}

impl Case {
    fn files(&self, below: &str) -> Vec<PathBuf> {
        fn files(folder: &Path) -> Vec<PathBuf> {
            let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
            let paths = entries.map(|entry| entry.unwrap().path());
            paths.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
        }
        let mut all = files(&self.store.join(below));
        all.sort();
        all
    }

    /// Everything that makes up checkpoints.
    fn content(&self) -> Vec<PathBuf> {
        ["chunks", "checkpoints", "devices", "intents", "condemned"]
            .iter()
            .flat_map(|below| self.files(below))
            .collect()
    }

    async fn ended(&self, name: &str) -> v1::Operation {
        done(&self.saver, &start_save(&self.saver, into_store(name)).await).await
    }

    async fn saved(&self, name: &str) -> String {
        let ended = self.ended(name).await;
        assert_eq!(ended.result(), v1::OperationResult::Succeeded, "{ended:?}");
        ended.checkpoint
    }

    async fn is_whole(&self, name: &str) {
        let request = v1::VerifyCheckpointRequest { name: name.to_owned() };
        let mut answers = self.saver.verify_checkpoint(request).await.unwrap();
        let mut last = None;
        while let Some(answer) = soon(answers.next()).await.unwrap() {
            last = Some(answer);
        }
        let last = last.unwrap();
        assert!(last.done && last.problems.is_empty(), "{name}: {last:?}");
    }

    /// It is not there, and the one before it is, and nothing else.
    async fn is_not_there(&self, name: &str, before: &str, content: &[PathBuf]) {
        let get = v1::GetCheckpointRequest { name: name.to_owned() };
        refused(self.saver.get_checkpoint(get).await, Code::NotFound, "CHECKPOINT_NOT_FOUND");
        let listed = self.saver.list_checkpoints(v1::ListCheckpointsRequest::default()).await.unwrap();
        let listed: Vec<&str> = listed.checkpoints.iter().map(|listed| listed.name.as_str()).collect();
        assert_eq!(listed, [before]);
        self.is_whole(before).await;
        assert_eq!(self.content(), content, "something of it is left");
    }

    /// Collects as another agent does, and waits for nobody.
    async fn collect(&self) {
        let limits = Limits { grace: Duration::ZERO, ..Limits::default() };
        let location = Location::Folder(self.store.clone());
        let store = Store::open(&location, limits, Arc::new(Here::default())).await.unwrap();
        assert!(store.collect().await.unwrap().chunks > 0);
    }
}

fn into_store(name: &str) -> v1::StartSaveRequest {
    v1::StartSaveRequest {
        store: "stores/small".to_owned(),
        pre_copy: v1::PreCopyMode::Never.into(),
        ..save_of(&[name])
    }
}

fn bench(seed: u64, mib: u64, data_size: SizeReport) -> Bench {
    Bench::new(SimConfig { seed, memory_bytes: mib * MIB, data_size, ..SimConfig::default() })
}

/// Run by the other test, in a process of its own; by itself it has nothing to do.
#[tokio::test(flavor = "multi_thread")]
async fn on_a_disk_of_its_own() {
    let Some(at) = env::var_os(DISK) else { return };
    let disk = Disk(at.into());
    let store = disk.0.join("store");
    let (first, known, unknown) =
        (bench(1, 12, SizeReport::Exact), bench(2, 8, SizeReport::Exact), bench(3, 8, SizeReport::Unknown));
    let lab = Lab::new();
    let benches = [("first", &first), ("known", &known), ("unknown", &unknown)];
    let devices: Vec<(&str, &str)> =
        benches.iter().map(|(name, bench)| (*name, bench.address.as_str())).collect();
    let mut config = lab.config("a", &devices);
    config.stores = vec![StoreConfig {
        name: "small".to_owned(),
        location: store.display().to_string(),
        endpoint: None,
        region: None,
        credentials: None,
        ca: None,
        allow_http: false,
        keep_free_bytes: Some(KEPT_FREE_BYTES),
        collect_interval: None,
    }];
    let agent = start(config).await;
    let case = Case { saver: lab.client(&agent, "saver").await, disk, store };

    let before = case.saved("first").await;
    assert_eq!(fs::metadata(case.store.join(".ballast")).unwrap().len(), BALLAST_BYTES);
    let content = case.content();

    // What does not fit, and is known not to, is refused before anything is done to the device.
    case.disk.leave(4 * MIB);
    let hops = known.device.hops();
    let refusal =
        refused(case.saver.start_save(into_store("known")).await, Code::FailedPrecondition, "BLOCKED");
    assert_eq!(violations(&refusal)[0].0, "BLOCKER_REASON_NO_SPACE", "{refusal}");
    let dry = v1::StartSaveRequest { validate_only: true, ..into_store("known") };
    let told = case.saver.start_save(dry).await.unwrap();
    assert_eq!(told.blockers[0].reason(), v1::BlockerReason::NoSpace, "{told:?}");
    assert_eq!((known.device.hops(), known.device.resets()), (hops, 0), "it was touched");
    assert_eq!(case.content(), content);

    // What is not known runs out of bytes on the way, and out of files, which only the kernel says.
    let digest = unknown.device.digest();
    for is_out_of in ["bytes", "files"] {
        case.disk.free();
        if is_out_of == "bytes" {
            case.disk.leave(4 * MIB);
        } else {
            case.disk.leave_files(100);
        }
        let hops = unknown.device.take_hops();
        let failed = case.ended("unknown").await;
        assert_eq!(failure(&failed), "STORE_FULL", "{is_out_of}: {failed:?}");
        assert_eq!(failed.outcome(), v1::StateOutcome::Preserved, "{is_out_of}: {failed:?}");
        assert!(!unknown.device.take_hops().is_empty(), "{is_out_of}: it was to fail on the way: {hops:?}");
        assert!(failed.moved_bytes < 8 * MIB, "{is_out_of}: {failed:?}");
        // Bytes are counted before each chunk, so that what is to stay free stays; files are not.
        let message = &failed.failure.as_ref().unwrap().message;
        assert_eq!(message.contains("bytes are needed"), is_out_of == "bytes", "{message}");
        assert_eq!((unknown.device.state(), unknown.device.resets()), (State::Running, 0), "{is_out_of}");
        assert_eq!(unknown.device.digest(), digest, "{is_out_of}");
        assert_eq!(device(&case.saver, "unknown").await.operation, "", "{is_out_of}");
        case.is_not_there(&failed.checkpoint, &before, &content).await;
    }
    case.disk.free();

    // Not one byte is left: nothing is touched, also where nobody knows how much there will be.
    case.disk.fill();
    let _ = unknown.device.take_hops();
    let failed = case.ended("unknown").await;
    assert_eq!(failure(&failed), "STORE_FULL", "{failed:?}");
    assert!(failed.failure.as_ref().unwrap().message.contains("nothing was touched"), "{failed:?}");
    assert_eq!(unknown.device.take_hops(), []);
    case.is_not_there(&failed.checkpoint, &before, &content).await;

    // What is deleted can be freed all the same: the store lets its ballast go for that, and takes it in again.
    let delete = v1::DeleteCheckpointRequest { name: before.clone() };
    case.saver.delete_checkpoint(delete).await.unwrap();
    case.collect().await;
    assert_eq!(case.files("chunks"), Vec::<PathBuf>::new());
    assert_eq!(fs::metadata(case.store.join(".ballast")).unwrap().len(), BALLAST_BYTES);
    assert!(case.disk.free_bytes() > 10 * MIB, "{}", case.disk.free_bytes());
    for name in ["known", "unknown"] {
        let saved = case.saved(name).await;
        case.is_whole(&saved).await;
        case.saver.delete_checkpoint(v1::DeleteCheckpointRequest { name: saved }).await.unwrap();
        case.collect().await;
    }
    assert_eq!(unknown.device.digest(), digest);
    agent.stop().await.unwrap();
}
