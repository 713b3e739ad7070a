//! `ListCheckpoints` of stores in which there is much.

use std::fs;
use std::path::{Path, PathBuf};

use prost::Message as _;
use vfio_checkpoint_proto::v1;

use crate::stored::Case;

/// Puts a second checkpoint beside one that is there, with another number at the end of its name.
fn copy(checkpoints: &Path, id: &str, number: u32) -> PathBuf {
    let other = format!("{}{number:04x}", &id[..id.len() - 4]);
    let (from, to) = (checkpoints.join(id), checkpoints.join(&other));
    fs::create_dir_all(&to).unwrap();
    let manifest = fs::read_to_string(from.join("manifest")).unwrap();
    fs::write(to.join("manifest"), manifest.replace(id, &other)).unwrap();
    fs::copy(from.join("table"), to.join("table")).unwrap();
    to
}

fn id_of(saved: &v1::Operation) -> &str {
    saved.checkpoint.rsplit('/').next().unwrap()
}

/// A page is short enough for every client, whatever is on it, and the pages together are all there is.
#[tokio::test(flavor = "multi_thread")]
async fn pages_of_large_sets_are_short() {
    let names: Vec<String> = (0..64).map(|number| format!("a-device-of-a-large-set-{number}")).collect();
    let addresses: Vec<String> = (0..64).map(|seed| format!("sim:seed={seed},memory=64KiB")).collect();
    let devices: Vec<(&str, &str)> =
        names.iter().map(String::as_str).zip(addresses.iter().map(String::as_str)).collect();
    let case = Case::new(&devices).await;
    let saved = case.save(&names.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let folder = case.store().join("checkpoints");
    for number in 0..99 {
        copy(&folder, id_of(&saved), number);
    }
    let (mut listed, mut pages, mut token) = (0, 0, String::new());
    loop {
        let request = v1::ListCheckpointsRequest { page_size: 1000, page_token: token, ..Default::default() };
        let page = case.saver.list_checkpoints(request).await.unwrap();
        assert!(page.encoded_len() < 1 << 20, "{} bytes", page.encoded_len());
        listed += page.checkpoints.len();
        pages += 1;
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    assert!(listed >= 99 && pages > 2, "{listed} on {pages} pages");
}
