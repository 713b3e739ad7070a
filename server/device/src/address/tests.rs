use std::fs::File;
use std::os::fd::OwnedFd;

use super::*;
use crate::{Backend, Identity};

fn null() -> OwnedFd {
    File::open("/dev/null").unwrap().into()
}

fn parse(text: &str) -> DeviceAddress {
    text.parse().unwrap()
}

#[test]
fn an_address_prints_as_what_it_was_parsed_from() {
    for text in [
        "0000:03:00.1",
        "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001",
        "sim",
        "sim:seed=7,memory=3MiB,p2p=no",
        "vfio-user:/run/nvme.sock",
        "vfio-user:relative.sock",
        "vfio-user:sim",
    ] {
        let address = parse(text);
        assert_eq!(address.to_string(), text);
        let json = serde_json::to_string(&address).unwrap();
        assert_eq!(json, format!("{text:?}"));
        assert_eq!(serde_json::from_str::<DeviceAddress>(&json).unwrap(), address);
    }
    // One spelling each.
    assert_eq!(parse("sim:").to_string(), "sim");
    assert_eq!(parse("0000:0A:00.0").to_string(), "0000:0a:00.0");
}

#[test]
fn what_is_wrong_with_a_text_is_said() {
    let wrong = |text: &str| text.parse::<DeviceAddress>().unwrap_err();
    assert!(matches!(wrong("../../etc/passwd"), AddressError::Name(_)));
    assert!(matches!(wrong("simple"), AddressError::Name(_)));
    assert!(matches!(wrong(""), AddressError::Name(_)));
    assert!(matches!(wrong("sim:colour=red"), AddressError::Sim(SimSpecError::Setting { .. })));
    assert!(matches!(wrong("sim:memory=0"), AddressError::Sim(SimSpecError::Config(_))));
    assert!(wrong("vfio-user:").to_string().contains("give the path"));
    assert!(wrong("vfio-user:a\0b").to_string().contains("NUL"));
    assert!(wrong(&format!("vfio-user:/{}", "x".repeat(107))).to_string().contains("107 bytes"));
    assert!(format!("vfio-user:/{}", "x".repeat(106)).parse::<DeviceAddress>().is_ok());
    assert_eq!(wrong(&"x".repeat(5000)), AddressError::TooLong { bytes: 5000 });
    assert!(serde_json::from_str::<DeviceAddress>("\"nothing\"").is_err());
}

#[test]
fn blockers_are_told_without_opening() {
    let folder = tempfile::tempdir().unwrap();
    let roots = SysRoots::default();
    let at = |name: &str| parse(&format!("vfio-user:{}", folder.path().join(name).display()));
    assert!(parse("sim").blockers(&roots).is_empty());
    assert!(matches!(at("none.sock").blockers(&roots)[..], [AddressBlocker::NoSocket { .. }]));
    File::create(folder.path().join("file")).unwrap();
    assert!(matches!(at("file").blockers(&roots)[..], [AddressBlocker::NotASocket { .. }]));
    let listener = std::os::unix::net::UnixListener::bind(folder.path().join("a.sock")).unwrap();
    listener.set_nonblocking(true).unwrap();
    assert!(at("a.sock").blockers(&roots).is_empty());
    assert!(listener.accept().is_err(), "nobody connected");
    assert!(matches!(
        parse("0000:ff:1f.7").blockers(&SysRoots { sys: folder.path().to_owned(), ..roots })[..],
        [AddressBlocker::NotFound(_)]
    ));
}

#[test]
fn a_simulated_device_opens_under_its_name_and_leaves_nothing_to_keep() {
    let access = Access { name: Some("slot-3".to_owned()), keep: true, ..Access::default() };
    let opened = parse("sim:memory=1MiB").open(access).unwrap();
    assert_eq!(opened.device.identity().name, "slot-3");
    assert!(opened.keepsake.is_none());
    assert_eq!(opened.sim.unwrap().handles(), 1);
}

fn kernel_keepsake(ioas_id: Option<u32>, count: usize) -> Keepsake {
    Keepsake {
        address: parse("0000:ff:1f.7"),
        identity: Identity {
            name: "0000:ff:1f.7".to_owned(),
            backend: Backend::Kernel,
            driver: "vfio-pci".to_owned(),
        },
        kind: KeepsakeKind::Kernel { path: KernelPath::Iommufd, ioas_id },
        fds: (0..count).map(|_| null()).collect(),
    }
}

#[test]
fn a_keepsake_reads_back_as_it_was_written() {
    let keepsake = kernel_keepsake(Some(7), 2);
    let text = keepsake.encode().unwrap();
    let again = Keepsake::decode(&text, keepsake.fds).unwrap();
    assert_eq!(
        (&again.address, &again.identity, &again.kind),
        (&keepsake.address, &keepsake.identity, &keepsake.kind)
    );
    assert_eq!(again.fds.len(), 2);

    let newer = text.replace("\"version\":1", "\"version\":2");
    assert!(matches!(Keepsake::decode(&newer, Vec::new()), Err(KeepsakeError::Version { version: 2 })));
    assert!(matches!(Keepsake::decode("{}", Vec::new()), Err(KeepsakeError::Facts(_))));
    let long = " ".repeat(17 * 1024);
    assert!(matches!(Keepsake::decode(&long, Vec::new()), Err(KeepsakeError::TooLong { .. })));
}

/// Whatever is wrong, the fds come back: closing the last duplicate would reset the device.
#[test]
fn what_cannot_be_adopted_comes_back() {
    let adopt = |address: &str, keepsake| parse(address).adopt(keepsake, Access::default()).unwrap_err();
    let failure = adopt("0000:ff:1f.6", kernel_keepsake(Some(7), 2));
    assert!(matches!(failure.source, AdoptRefusal::AnotherDevice { .. }));
    assert_eq!(failure.keepsake.unwrap().fds.len(), 2);

    let failure = adopt("0000:ff:1f.7", kernel_keepsake(Some(7), 3));
    assert!(matches!(failure.source, AdoptRefusal::Keepsake(KeepsakeError::Fds { given: 3, wanted: 2 })));
    assert_eq!(failure.keepsake.unwrap().fds.len(), 3);

    let failure = adopt("0000:ff:1f.7", kernel_keepsake(None, 2));
    assert!(matches!(failure.source, AdoptRefusal::Keepsake(KeepsakeError::NoIoas)));
    assert_eq!(failure.keepsake.unwrap().fds.len(), 2);

    // No such device on this node, and no VFIO device behind the fds either.
    let failure = adopt("0000:ff:1f.7", kernel_keepsake(Some(7), 2));
    assert!(matches!(failure.source, AdoptRefusal::Kernel(_)), "{failure:?}");
    let keepsake = failure.keepsake.unwrap();
    assert_eq!(
        (keepsake.fds.len(), keepsake.kind),
        (2, KeepsakeKind::Kernel { path: KernelPath::Iommufd, ioas_id: Some(7) })
    );
}
