//! What `python/prepare` does where it cannot do its work: it fails and says why.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Output};

use crate::python::script;

/// A folder with nothing but these commands of the system.
fn commands(folder: &Path, names: &[&str]) {
    let path = std::env::var_os("PATH").unwrap();
    for name in names {
        let found = std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file());
        symlink(found.unwrap_or_else(|| panic!("this machine has no {name}")), folder.join(name)).unwrap();
    }
}

fn fails_with(output: &Output, says: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{stderr}");
    assert_eq!(output.stdout, b"", "no environment where there is none");
    assert!(stderr.contains(says), "{says:?} is not in: {stderr}");
}

#[test]
#[ignore = "needs Python and packages: run tests/run interop"]
fn without_a_python_the_packages_are_named() {
    let (path, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    // Without apt-get nothing can be installed, whoever runs this.
    commands(path.path(), &["bash", "dirname"]);
    let prepare = Command::new(path.path().join("bash"))
        .arg(script("prepare"))
        .env("PATH", path.path())
        .env("VFIO_CHECKPOINT_CACHE", cache.path())
        .output()
        .unwrap();
    fails_with(&prepare, "interop/prepare: missing packages: python3 python3-venv");
}

#[test]
#[ignore = "needs Python and packages: run tests/run interop"]
fn without_an_index_it_fails_and_leaves_nothing_that_looks_whole() {
    let cache = tempfile::tempdir().unwrap();
    let prepare = Command::new(script("prepare"))
        .env("VFIO_CHECKPOINT_CACHE", cache.path())
        .env("PIP_NO_INDEX", "1")
        .output()
        .unwrap();
    fails_with(&prepare, "interop/prepare: pip cannot install requirements.txt");
    // What was begun lies there, without the mark by which the next run would take it.
    let begun: Vec<_> = fs::read_dir(cache.path().join("tools"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir())
        .collect();
    assert!(matches!(&begun[..], [one] if !one.join("whole").exists()), "{begun:?}");
}
