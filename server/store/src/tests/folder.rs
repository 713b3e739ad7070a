//! A store in a folder: links, pipes, space, permissions, torn files.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::PathBuf;

use super::{TestAmbient, assert_all_whole, limits, load, noise, save};
use crate::key::ChunkKey;
use crate::{Begin, Limits, Location, Store, StoreError};

struct Case {
    _folder: tempfile::TempDir,
    root: PathBuf,
    store: Store,
}

async fn case() -> Case {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("store");
    let store = Store::open(&Location::Folder(root.clone()), limits(), TestAmbient::new()).await.unwrap();
    Case { _folder: folder, root, store }
}

#[tokio::test]
async fn it_is_for_its_owner_only() {
    let Case { root, _folder, .. } = case().await;
    assert_eq!(fs::metadata(root).unwrap().permissions().mode() & 0o777, 0o700);
}

#[tokio::test]
async fn links_and_pipes_are_refused_wherever_they_are() {
    let Case { root, store, _folder: folder } = case().await;
    let saved = save(&store, &[&noise(1, 100_000)]).await.unwrap();
    let secret = folder.path().join("secret");
    let manifest = root.join(format!("checkpoints/{}/manifest", saved.id));
    // The file itself: a link to another manifest, even.
    fs::rename(&manifest, &secret).unwrap();
    symlink(&secret, &manifest).unwrap();
    let refused = store.get(saved.id).await.unwrap_err();
    assert!(matches!(refused, StoreError::NotRegular { .. }), "{refused}");
    fs::remove_file(&manifest).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, &manifest, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    let refused = store.get(saved.id).await.unwrap_err();
    assert!(refused.to_string().contains("look who put it there"), "{refused}");
    fs::remove_file(&manifest).unwrap();
    fs::rename(&secret, &manifest).unwrap();
    assert_all_whole(&store).await;
    // A folder on the way, for reading and for writing.
    let outside = folder.path().join("outside");
    fs::rename(root.join("chunks"), &outside).unwrap();
    symlink(&outside, root.join("chunks")).unwrap();
    let before = count(&outside);
    assert!(matches!(load(&store, saved.id, 0).await, Err(StoreError::NotRegular { .. })));
    assert!(matches!(save(&store, &[&noise(2, 100_000)]).await, Err(StoreError::NotRegular { .. })));
    assert_eq!(count(&outside), before, "nothing was written through the link");
    assert!(matches!(store.collect().await, Err(StoreError::NotRegular { .. })));
    assert_eq!(count(&outside), before, "nothing was deleted through the link");
}

fn count(folder: &std::path::Path) -> usize {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| if path.is_dir() { count(&path) } else { 1 }).sum()
}

#[tokio::test]
async fn space_is_taken_before_a_save_begins_and_given_back() {
    let Case { root, store, _folder } = case().await;
    let space = store.space().await.unwrap().unwrap();
    let begin =
        |reserve_bytes| Begin { id: store.new_id(), logical_devices: vec!["x".to_owned()], reserve_bytes };
    let refused = store.begin(begin(space.total_bytes)).await.unwrap_err();
    assert!(matches!(refused, StoreError::NoSpace { .. }), "{refused}");
    assert_eq!(count(&root), 1, "there is the marker and nothing else");

    let reserved = 512 << 20;
    let mut writer = store.begin(begin(reserved)).await.unwrap();
    let with = store.space().await.unwrap().unwrap().free_bytes;
    // Others use the disk, too, but they do not free as much in between.
    assert!(with + reserved / 2 < space.free_bytes, "{with} of {}", space.free_bytes);
    writer.chunk(0, noise(1, 8 << 20).into()).await.unwrap();
    writer.finish(0).await.unwrap();
    let saved = writer.commit(serde_json::Value::Null).await.unwrap();
    let after = store.space().await.unwrap().unwrap().free_bytes;
    assert!(after > with, "what was reserved is free again");
    assert_eq!(assert_all_whole(&store).await, [saved.id]);
}

#[tokio::test]
async fn a_save_that_does_not_fit_beside_what_is_to_stay_free_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let limits = Limits { keep_free_bytes: u64::MAX, ..limits() };
    let store =
        Store::open(&Location::Folder(folder.path().into()), limits, TestAmbient::new()).await.unwrap();
    let refused = save(&store, &[b"x"]).await.unwrap_err();
    assert_eq!(
        refused.to_string(),
        "the store has no room: 1 bytes are needed and 0 are free; delete checkpoints, and collect"
    );
}

/// After a power cut a chunk that no manifest names may be anything. It is never built on, and goes.
#[tokio::test]
async fn a_torn_chunk_of_a_save_that_never_was_is_nothing() {
    let Case { root, store, _folder } = case().await;
    let state = noise(1, 100_000);
    let saved = save(&store, &[&state]).await.unwrap();
    let torn = ChunkKey { blake3: *blake3::hash(&noise(2, 9)).as_bytes(), upload: store.new_id() };
    let path = root.join(torn.path().as_ref());
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, b"").unwrap();
    store.collect().await.unwrap();
    assert!(!path.exists());
    assert!(load(&store, saved.id, 0).await.unwrap() == state);
}

#[tokio::test]
async fn a_folder_that_holds_something_else_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("letters.txt"), "x").unwrap();
    let location = Location::Folder(folder.path().into());
    let refused = Store::open(&location, limits(), TestAmbient::new()).await.unwrap_err();
    assert!(refused.to_string().contains("give it a place of its own"), "{refused}");
    fs::remove_file(folder.path().join("letters.txt")).unwrap();
    fs::write(folder.path().join(crate::key::MARKER), "vfio-checkpoint store, format 9\n").unwrap();
    let refused = Store::open(&location, limits(), TestAmbient::new()).await.unwrap_err();
    assert!(refused.to_string().contains("use a version that reads it"), "{refused}");
}
