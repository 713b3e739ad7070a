//! Names: only the kernel's own spelling passes, and it survives the way through text and JSON.

use super::*;

#[test]
fn the_kernels_names_pass() {
    for name in ["0000:03:00.1", "10000:e1:1f.7", "ffffffff:ff:00.0", MTTY] {
        let parsed: DeviceName = name.parse().unwrap();
        assert_eq!(parsed.to_string(), name);
        let json = serde_json::to_string(&parsed).unwrap();
        assert_eq!(json, format!("{name:?}"));
        assert_eq!(serde_json::from_str::<DeviceName>(&json).unwrap(), parsed);
    }
    let shouted: DeviceName = MTTY.to_uppercase().parse().unwrap();
    assert_eq!(shouted.to_string(), MTTY, "people paste names in capitals");
}

#[test]
fn nothing_else_does() {
    let overlong = "0".repeat(5000);
    for name in [
        "",
        ".",
        "..",
        "/",
        "03:00.1",
        "0000:03:00.8",
        "0000:03:20.0",
        "0000:003:00.0",
        "000:03:00.0",
        "00000:03:00.0",
        "0000:03:00.+1",
        "0000:+3:00.1",
        "+000:03:00.1",
        "0000:03:00.1/",
        "0000:03:00.1/..",
        "../0000:03:00.1",
        "../../../etc/passwd",
        "0000:03:00.1\n",
        "0000:03:00.1\0",
        "83b8f4f2509f382f3c1ee6bfe0fa1001",
        "{83b8f4f2-509f-382f-3c1e-e6bfe0fa1001}",
        "83b8f4f2-509f-382f-3c1e-e6bfe0fa100",
        "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001/../..",
        "+3b8f4f2-509f-382f-3c1e-e6bfe0fa1001",
        "83b8f4f25-09f-382f-3c1e-e6bfe0fa1001",
        "８３b8f4f2-509f-382f-3c1e-e6bfe0fa1001",
        overlong.as_str(),
    ] {
        let error = name.parse::<DeviceName>().unwrap_err();
        assert!(error.shown.len() <= 64 * 4 && error.to_string().len() < 600, "{name:?}");
        let tree = Tree::new();
        assert!(matches!(find(&tree.roots(), name), Err(DiscoveryError::InvalidName(_))), "{name:?}");
    }
}

#[test]
fn entries_that_are_no_names_are_no_devices() {
    let tree = Tree::new();
    let devices = tree.path("sys/bus/pci/devices");
    for name in [
        "0000:03:00.1 ",
        "0000:03:00.1\n",
        "..0000:03:00.1",
        "0000:03:00.A",
        "0000:03:00",
        "x".repeat(200).as_str(),
    ] {
        fs::create_dir(devices.join(name)).unwrap();
    }
    assert_eq!(discover(&tree.roots()).unwrap(), []);
}

#[test]
fn names_sort_by_number() {
    let mut names: Vec<DeviceName> = [MTTY, "10000:00:00.0", "0000:10:00.0", "0000:02:00.0"]
        .iter()
        .map(|name| name.parse().unwrap())
        .collect();
    names.sort();
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    assert_eq!(names, ["0000:02:00.0", "0000:10:00.0", "10000:00:00.0", MTTY]);
}
