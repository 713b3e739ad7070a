use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

use bytes::Bytes;
use tempfile::TempDir;
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_seal::{SealHasher, Verifier};

use super::*;
use crate::document::Consistency;

fn manifest(devices: usize) -> v1::CheckpointManifest {
    v1::CheckpointManifest {
        format_version: 1,
        operation: "operations/1".to_owned(),
        create_time: Some(prost_types::Timestamp { seconds: 1_800_000_000, nanos: 5 }),
        devices: (0..devices)
            .map(|device| v1::DeviceManifest {
                source_device: format!("devices/{device}"),
                source_address: "sim:".to_owned(),
                backend: v1::Backend::Sim.into(),
                driver: "sim".to_owned(),
                fingerprint: Some(v1::Fingerprint {
                    facts: [("model".to_owned(), "x".to_owned()), ("version".to_owned(), "1".to_owned())]
                        .into(),
                }),
                logical_device: Some(v1::LogicalDevice { id: "ab".repeat(16), epoch: 7 }),
                data_size: Some(v1::DataSize { kind: v1::DataSizeKind::Known.into(), bytes: 9 }),
            })
            .collect(),
        source_disposition: v1::SourceDisposition::RunsOn.into(),
    }
}

fn config() -> v1::ConfigSpaceCapture {
    v1::ConfigSpaceCapture {
        command: 0x0406,
        interrupt_kind: v1::InterruptKind::MsiX.into(),
        interrupt_vectors: 3,
    }
}

/// Writes the chunks of each device, and seals all but the last `unsealed`.
async fn write(writer: &mut FolderWriter, devices: &[&[&[u8]]], unsealed: usize) {
    for (device, chunks) in (0..).zip(devices) {
        let mut verifier = Verifier::new();
        let mut hasher = SealHasher::new();
        for chunk in *chunks {
            hasher.update(chunk);
            writer.chunk(device, verifier.accept(Bytes::copy_from_slice(chunk))).await.unwrap();
        }
        if (device as usize) < devices.len() - unsealed {
            let seal = verifier.finish(&hasher.seal()).unwrap();
            writer.seal(device, seal, (device == 0).then(config)).await.unwrap();
        }
    }
}

const STATE: [&[&[u8]]; 2] = [&[b"first ", b"device"], &[b"second"]];

async fn saved(path: &Path) -> FolderManifest {
    let mut writer = FolderWriter::create(path, &manifest(2), Existing::Refuse).await.unwrap();
    write(&mut writer, &STATE, 0).await;
    writer.finish(Consistency::Consistent).await.unwrap()
}

fn names(path: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Opens and verifies, and says what is wrong.
async fn refusal(path: &Path) -> FolderError {
    match FolderReader::open(path).await {
        Ok(reader) => reader.verify().await.unwrap_err(),
        Err(error) => error,
    }
}

fn edit(path: &Path, from: &str, to: &str) {
    let file = path.join(MANIFEST_FILE);
    let text = fs::read_to_string(&file).unwrap();
    assert!(text.contains(from), "{from} is not in {text}");
    fs::write(&file, text.replacen(from, to, 1)).unwrap();
}

#[tokio::test]
async fn what_is_written_is_read_back() {
    let above = TempDir::new().unwrap();
    let path = above.path().join("checkpoint");
    let written = saved(&path).await;
    assert_eq!(names(&path), ["device-0.state", "device-1.state", "manifest.json"]);
    for name in names(&path) {
        assert_eq!(fs::metadata(path.join(&name)).unwrap().mode() & 0o777, 0o600, "{name}");
    }
    let reader = FolderReader::open(&path).await.unwrap();
    assert_eq!(*reader.manifest(), written);
    assert_eq!(*reader.wire_manifest(), manifest(2));
    assert_eq!((reader.config(0), reader.config(1)), (Some(config()), None));
    reader.verify().await.unwrap();
    // Twice, and in chunks that do not divide the length.
    for _ in 0..2 {
        let mut chunks = reader.chunks(0, 5).unwrap();
        let mut all = Vec::new();
        while let Some(chunk) = chunks.next().await.unwrap() {
            all.push(chunk);
        }
        assert_eq!(all, [&b"first"[..], b" devi", b"ce"]);
    }
    insta::assert_snapshot!(fs::read_to_string(path.join(MANIFEST_FILE)).unwrap());
}

#[tokio::test]
async fn an_empty_state_is_a_state() {
    let above = TempDir::new().unwrap();
    let path = above.path().join("checkpoint");
    let mut writer = FolderWriter::create(&path, &manifest(1), Existing::Refuse).await.unwrap();
    write(&mut writer, &[&[]], 0).await;
    writer.finish(Consistency::Inconsistent).await.unwrap();
    let reader = FolderReader::open(&path).await.unwrap();
    reader.verify().await.unwrap();
    assert_eq!(reader.chunks(0, 5).unwrap().next().await.unwrap(), None);
    assert_eq!(reader.manifest().consistency, Consistency::Inconsistent);
}

#[tokio::test]
async fn until_it_is_finished_there_is_no_checkpoint_and_giving_up_leaves_nothing() {
    let above = TempDir::new().unwrap();
    for unsealed in 0..=2 {
        let path = above.path().join("checkpoint");
        let mut writer = FolderWriter::create(&path, &manifest(2), Existing::Refuse).await.unwrap();
        write(&mut writer, &STATE, unsealed).await;
        assert!(matches!(refusal(&path).await, FolderError::NoCheckpoint { .. }));
        if unsealed == 1 {
            let error = writer.finish(Consistency::Consistent).await.unwrap_err();
            assert!(matches!(error, FolderError::Order { device: 1, .. }), "{error}");
        } else {
            writer.abandon().await;
        }
        assert!(!path.exists(), "{unsealed}");
    }
}

#[tokio::test]
async fn a_folder_that_was_there_stays_when_a_save_into_it_is_given_up() {
    let folder = TempDir::new().unwrap();
    let writer = FolderWriter::create(folder.path(), &manifest(2), Existing::Refuse).await.unwrap();
    writer.abandon().await;
    assert!(names(folder.path()).is_empty());
}

#[tokio::test]
async fn chunks_and_seals_out_of_place_end_the_work() {
    let above = TempDir::new().unwrap();
    let mut verifier = Verifier::new();
    let (_first, second) =
        (verifier.accept(Bytes::from_static(b"a")), verifier.accept(Bytes::from_static(b"b")));
    let path = above.path().join("gap");
    let mut writer = FolderWriter::create(&path, &manifest(1), Existing::Refuse).await.unwrap();
    writer.chunk(0, second).await.unwrap();
    let error = writer.finish(Consistency::Consistent).await.unwrap_err();
    assert!(matches!(error, FolderError::Order { device: 0, .. }), "{error}");
    assert!(!path.exists());

    let path = above.path().join("stranger");
    let mut writer = FolderWriter::create(&path, &manifest(1), Existing::Refuse).await.unwrap();
    writer.chunk(1, Verifier::new().accept(Bytes::from_static(b"a"))).await.unwrap();
    let error = writer.finish(Consistency::Consistent).await.unwrap_err();
    assert!(matches!(error, FolderError::Order { device: 1, .. }), "{error}");
}

#[tokio::test]
async fn a_folder_that_holds_something_is_refused() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("checkpoint");
    saved(&path).await;
    let error = FolderWriter::create(&path, &manifest(1), Existing::Refuse).await.unwrap_err();
    assert!(matches!(error, FolderError::NotEmpty { replaceable: true, .. }), "{error}");
    FolderReader::open(&path).await.unwrap().verify().await.unwrap();

    let mut writer = FolderWriter::create(&path, &manifest(1), Existing::Replace).await.unwrap();
    assert!(matches!(refusal(&path).await, FolderError::NoCheckpoint { .. }), "the old one goes first");
    write(&mut writer, &[&[b"new"]], 0).await;
    writer.finish(Consistency::Consistent).await.unwrap();
    assert_eq!(names(&path), ["device-0.state", "manifest.json"]);

    fs::write(path.join("thesis.txt"), "years").unwrap();
    for existing in [Existing::Refuse, Existing::Replace] {
        let error = FolderWriter::create(&path, &manifest(1), existing).await.unwrap_err();
        assert!(matches!(error, FolderError::NotEmpty { replaceable: false, .. }), "{error}");
    }
    assert_eq!(fs::read_to_string(path.join("thesis.txt")).unwrap(), "years");
    let file =
        FolderWriter::create(&path.join("thesis.txt"), &manifest(1), Existing::Replace).await.unwrap_err();
    assert!(matches!(file, FolderError::NotAFolder { .. }), "{file}");
}

#[tokio::test]
async fn consistency_can_be_set_and_nothing_else_changes() {
    let above = TempDir::new().unwrap();
    let path = above.path().join("checkpoint");
    let mut written = saved(&path).await;
    set_consistency(&path, Consistency::Inconsistent).await.unwrap();
    written.consistency = Consistency::Inconsistent;
    assert_eq!(*FolderReader::open(&path).await.unwrap().manifest(), written);
    assert_eq!(names(&path).len(), 3);
}

#[tokio::test]
async fn every_flipped_byte_and_every_truncation_is_found() {
    let above = TempDir::new().unwrap();
    let path = above.path().join("checkpoint");
    saved(&path).await;
    for device in 0..2 {
        let file = path.join(state_file(device));
        let whole = fs::read(&file).unwrap();
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x10;
            fs::write(&file, &damaged).unwrap();
            assert!(matches!(refusal(&path).await, FolderError::Damaged { .. }), "byte {at}");
            fs::write(&file, &whole[..at]).unwrap();
            assert!(matches!(refusal(&path).await, FolderError::Size { .. }), "cut at {at}");
        }
        fs::write(&file, [&whole[..], b"x"].concat()).unwrap();
        assert!(matches!(refusal(&path).await, FolderError::Size { .. }), "extended");
        fs::write(&file, &whole).unwrap();
    }
    // A file that shrinks after it was opened.
    let reader = FolderReader::open(&path).await.unwrap();
    fs::OpenOptions::new().write(true).open(path.join("device-0.state")).unwrap().set_len(3).unwrap();
    assert!(matches!(reader.verify().await.unwrap_err(), FolderError::Damaged { .. }));
    let mut chunks = reader.chunks(0, 100).unwrap();
    assert!(matches!(chunks.next().await.unwrap_err(), FolderError::Size { found_bytes: 3, .. }));
    assert!(chunks.next().await.unwrap().is_none());
}

#[tokio::test]
async fn what_is_not_a_regular_file_is_refused() {
    let above = TempDir::new().unwrap();
    for name in [MANIFEST_FILE, "device-0.state"] {
        let path = above.path().join(name);
        saved(&path).await;
        let aside = above.path().join("aside");
        fs::rename(path.join(name), &aside).unwrap();
        symlink(&aside, path.join(name)).unwrap();
        assert!(matches!(refusal(&path).await, FolderError::NotRegular { .. }), "link {name}");
        fs::remove_file(path.join(name)).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, path.join(name), Mode::RUSR).unwrap();
        assert!(matches!(refusal(&path).await, FolderError::NotRegular { .. }), "pipe {name}");
        fs::remove_file(path.join(name)).unwrap();
        fs::create_dir(path.join(name)).unwrap();
        assert!(matches!(refusal(&path).await, FolderError::NotRegular { .. }), "folder {name}");
    }
    // A link that was laid where a file will be made is not followed either.
    let path = above.path().join("trap");
    fs::create_dir(&path).unwrap();
    symlink(above.path().join("victim"), path.join("device-0.state")).unwrap();
    FolderWriter::create(&path, &manifest(1), Existing::Replace).await.unwrap().abandon().await;
    assert!(!above.path().join("victim").exists());
}

#[tokio::test]
async fn a_hostile_manifest_is_refused_and_the_field_named() {
    let above = TempDir::new().unwrap();
    let edits: BTreeMap<&str, (&str, &str)> = [
        ("devices[0].file", ("\"device-0.state\"", "\"../../etc/passwd\"")),
        ("devices[1].file", ("\"device-1.state\"", "\"device-0.state\"")),
        ("devices[0].blake3", ("\"blake3\": \"", "\"blake3\": \"zz")),
        ("devices[0].config", ("\"interrupt_vectors\": 3", "\"interrupt_vectors\": 2049")),
        ("manifest.devices[0].backend", ("BACKEND_SIM", "BACKEND_TOASTER")),
        ("manifest.create_time", ("\"2027", "\"x2027")),
        ("unknown field", ("\"format_version\": 1,", "\"format_version\": 1, \"path\": \"/\",")),
        ("format version 2", ("\"format_version\": 1,", "\"format_version\": 2, \"later\": 1,")),
        ("length_bytes", ("\"length_bytes\": 12", "\"length_bytes\": -1")),
        (
            "the manifest says 18446744073709551615",
            ("\"length_bytes\": 12", "\"length_bytes\": 18446744073709551615"),
        ),
    ]
    .into();
    for (index, (expected, (from, to))) in edits.into_iter().enumerate() {
        let path = above.path().join(index.to_string());
        saved(&path).await;
        edit(&path, from, to);
        let error = refusal(&path).await.to_string();
        let field = expected.replace("length_bytes", "invalid value");
        assert!(error.contains(&field), "{expected}: {error}");
    }
    let path = above.path().join("long");
    saved(&path).await;
    let text = fs::read_to_string(path.join(MANIFEST_FILE)).unwrap();
    fs::write(path.join(MANIFEST_FILE), text + &" ".repeat(1 << 20)).unwrap();
    assert!(matches!(refusal(&path).await, FolderError::ManifestTooLarge { .. }));
    let deep = "[".repeat(100_000);
    fs::write(path.join(MANIFEST_FILE), deep).unwrap();
    assert!(matches!(refusal(&path).await, FolderError::Json { .. }));
}

#[tokio::test]
async fn a_full_disk_is_told_and_leaves_nothing_behind() {
    // The kernel's device that is always full stands in for a file system that is: only what a write says counts here.
    let error = FolderError::io(
        "write",
        Path::new("/x"),
        io::Write::write(&mut fs::OpenOptions::new().write(true).open("/dev/full").unwrap(), b"x")
            .unwrap_err(),
    );
    assert!(error.to_string().contains("free some space"), "{error}");
}

#[tokio::test]
async fn a_second_writer_is_refused_and_takes_nothing_from_the_first() {
    let temporary = tempfile::tempdir().unwrap();
    let path = temporary.path().join("checkpoint");
    let first = FolderWriter::create(&path, &manifest(1), Existing::Refuse).await.unwrap();
    let second = FolderWriter::create(&path, &manifest(1), Existing::Replace).await.unwrap_err();
    assert!(second.to_string().contains("another save"), "{second}");
    assert!(path.join("device-0.state").exists());
    drop(first);
}

#[tokio::test]
async fn a_probe_finds_what_a_save_would_and_leaves_nothing() {
    let root = TempDir::new().unwrap();
    let (new, free, full) = (root.path().join("new"), root.path().join("free"), root.path().join("full"));
    fs::create_dir(&free).unwrap();
    saved(&full).await;
    for path in [&new, &free] {
        check_free(path, Existing::Refuse).await.unwrap();
    }
    // What a probe left that was killed is in nobody's way who may replace what is there.
    fs::write(full.join(PROBE_FILE), "").unwrap();
    check_free(&full, Existing::Replace).await.unwrap();
    assert_eq!(names(root.path()), ["free", "full"]);
    assert_eq!(names(&free), Vec::<String>::new());
    assert_eq!(names(&full), ["device-0.state", "device-1.state", "manifest.json"]);

    let found = check_free(&full, Existing::Refuse).await.unwrap_err();
    assert!(matches!(found, FolderError::NotEmpty { replaceable: true, .. }), "{found}");
    // Not even a superuser makes a folder there, though no right is missing.
    for path in ["/proc/here", "/proc/self"] {
        let found = check_free(Path::new(path), Existing::Refuse).await.unwrap_err();
        let is_expected = matches!(found, FolderError::Io { .. } | FolderError::NotEmpty { .. });
        assert!(is_expected, "{path}: {found}");
    }
    let _writer = FolderWriter::create(&free, &manifest(1), Existing::Refuse).await.unwrap();
    let found = check_free(&free, Existing::Replace).await.unwrap_err();
    assert!(found.to_string().contains("is another save writing there?"), "{found}");
}

#[tokio::test]
async fn room_is_what_is_free_and_what_a_replacement_frees() {
    let root = TempDir::new().unwrap();
    let (new, full) = (root.path().join("new"), root.path().join("full"));
    saved(&full).await;
    fs::write(full.join("device-0.state"), vec![1; 64 << 20]).unwrap();
    for (path, existing) in [(&new, Existing::Refuse), (&full, Existing::Replace)] {
        check_room(path, existing, 1).await.unwrap();
        let found = check_room(path, existing, u64::MAX).await.unwrap_err();
        assert!(matches!(found, FolderError::NoRoom { needed_bytes: u64::MAX, .. }), "{found}");
    }
    let free_bytes = async |path: &Path, existing| match check_room(path, existing, u64::MAX).await {
        Err(FolderError::NoRoom { free_bytes, .. }) => free_bytes,
        other => panic!("{other:?}"),
    };
    // Others write here as well, so it is not exact to the byte.
    let (beside, replaced) =
        (free_bytes(&new, Existing::Refuse).await, free_bytes(&full, Existing::Replace).await);
    assert!(replaced > beside + (32 << 20), "{replaced} {beside}");
}

/// Whoever opens a pipe as a file waits until somebody writes to it.
#[tokio::test]
async fn a_pipe_is_no_folder_and_is_not_waited_for() {
    let folder = TempDir::new().unwrap();
    let pipe = folder.path().join("pipe");
    let mode = Mode::RUSR | Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    let limit = std::time::Duration::from_secs(10);
    let manifest = manifest(1);
    let read = tokio::time::timeout(limit, FolderReader::open(&pipe)).await;
    let written =
        tokio::time::timeout(limit, FolderWriter::create(&pipe, &manifest, Existing::Replace)).await;
    // Lets go of whoever waits, so that this ends. Nobody does, so there is nobody to write to.
    let writer = open(&pipe, OFlags::WRONLY | OFlags::NONBLOCK, Mode::empty());
    assert_eq!(writer.unwrap_err(), rustix::io::Errno::NXIO);
    for refused in [read.unwrap().map(drop), written.unwrap().map(drop)] {
        let refused = refused.unwrap_err();
        assert!(matches!(refused, FolderError::NotAFolder { .. }), "{refused}");
    }
}
