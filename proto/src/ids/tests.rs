use super::*;

fn problem<T: FromStr<Err = IdError> + fmt::Debug>(text: &str) -> String {
    text.parse::<T>().unwrap_err().to_string()
}

#[test]
fn device_names_fit_addresses_and_uuids() {
    for id in
        ["nic0", "0000:03:00.1", "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001", "a", "gpu_0.vf1", &"x".repeat(63)]
    {
        let name: DeviceName = format!("devices/{id}").parse().unwrap();
        assert_eq!(name.id(), id);
        assert_eq!(name, DeviceName::from_id(id).unwrap());
        assert_eq!(name.to_string(), format!("devices/{id}"));
    }
}

#[test]
fn what_is_wrong_with_a_device_name_is_said() {
    for (text, said) in [
        ("", "it is empty"),
        ("nic0", "does not begin with `devices/`"),
        ("devices/", "after `devices/`, it is empty"),
        ("devices/..", "must begin and end with a letter or digit"),
        ("devices/../etc", "'/' at byte 2 is not allowed"),
        ("devices/a/b", "'/' at byte 1 is not allowed"),
        ("devices/NIC", "'N' at byte 0 is not allowed"),
        ("devices/a\n", "'\\n' at byte 1 is not allowed"),
        ("devices/é", "'é' at byte 0 is not allowed"),
        ("devices/-a", "must begin and end with a letter or digit"),
        ("devices/a:", "must begin and end with a letter or digit"),
    ] {
        let found = problem::<DeviceName>(text);
        assert!(found.contains(said), "{text:?}: {found}");
    }
    assert!(problem::<DeviceName>(&format!("devices/{}", "x".repeat(64))).contains("it has 64 bytes"));
    let long = problem::<DeviceName>(&"\u{1b}[2J".repeat(1_000_000));
    assert!(long.len() < 1000 && !long.contains('\u{1b}'), "{long}");
}

#[test]
fn operations_requests_logical_devices_and_streams() {
    let operation: OperationName = "operations/01jq3v8d5n4k2".parse().unwrap();
    assert_eq!(operation.id(), "01jq3v8d5n4k2");
    assert_eq!(operation, OperationName::from_id("01jq3v8d5n4k2").unwrap());
    assert!(OperationName::from_id("a.b").is_err());
    assert!(problem::<OperationName>("devices/a").contains("operations/"));

    let request: RequestId = "1B4E28BA-2fa1-41d2-883f-0016D3CCA427".parse().unwrap();
    assert_eq!(request.as_str(), "1b4e28ba-2fa1-41d2-883f-0016d3cca427");
    for bad in [
        "",
        "1b4e28ba2fa141d2883f0016d3cca427",
        "1b4e28ba-2fa1-41d2-883f-0016d3cca42g",
        "{1b4e28ba-2fa1-41d2-883f-0016d3cca}",
    ] {
        assert!(bad.parse::<RequestId>().is_err(), "{bad}");
    }
    assert!(problem::<RequestId>("1b4e28b-a2fa1-41d2-883f-0016d3cca427").contains("8 belong there"));

    let logical: LogicalDeviceId = "00112233445566778899AABBCCDDEEFF".parse().unwrap();
    assert_eq!(logical.as_str(), "00112233445566778899aabbccddeeff");
    let bytes = [0, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff];
    assert_eq!(logical, LogicalDeviceId::from_bytes(bytes));
    assert!(problem::<LogicalDeviceId>("00").contains("it has 2 digits"));

    assert_eq!(StreamId(0xab).to_string(), "00000000000000ab");
    assert_eq!("00000000000000ab".parse::<StreamId>().unwrap(), StreamId(0xab));
    assert!("+0000000000000ab".parse::<StreamId>().is_err());
}

#[test]
fn pods_follow_kubernetes() {
    let pod: PodName = "team-a/web-7d4b.0".parse().unwrap();
    assert_eq!((pod.namespace(), pod.name()), ("team-a", "web-7d4b.0"));
    for (text, said) in [
        ("web", "it has no slash"),
        ("/web", "in the namespace, it is empty"),
        ("a.b/web", "in the namespace, '.'"),
        ("a/", "in the part \"\" of the name, it is empty"),
        ("a/b..c", "of the name, it is empty"),
        ("a/b/c", "'/' at byte 1"),
        ("a/B", "'B' at byte 0"),
    ] {
        let found = problem::<PodName>(text);
        assert!(found.contains(said), "{text:?}: {found}");
    }
    assert!(format!("{}/a", "n".repeat(64)).parse::<PodName>().is_err());
    assert!(format!("n/{}", "a".repeat(254)).parse::<PodName>().is_err());
    assert!(format!("n/{}", "a".repeat(253)).parse::<PodName>().is_ok());
}

#[test]
fn serde_is_the_text_and_validates() {
    // serde's own deserializers of a plain string: no format is needed.
    use serde::de::IntoDeserializer as _;
    use serde::de::value::{Error, StrDeserializer};
    let read = |text: &'static str| -> Result<DeviceName, Error> {
        let text: StrDeserializer<'_, Error> = text.into_deserializer();
        DeviceName::deserialize(text)
    };
    assert_eq!(read("devices/a").unwrap().as_str(), "devices/a");
    assert!(read("devices/A").unwrap_err().to_string().contains("'A' at byte 0"));
}

#[test]
fn the_hash_of_a_key_is_64_digits_and_nothing_else() {
    // Every byte in every place, so that no digit and no order is lost.
    for at in 0..32 {
        for byte in 0..=u8::MAX {
            let mut bytes = [0x5a; 32];
            bytes[at] = byte;
            let hash = KeyHash(bytes);
            let text = hash.to_string();
            assert_eq!((text.len(), &text[2 * at..2 * at + 2]), (64, format!("{byte:02x}").as_str()));
            assert_eq!(text.parse::<KeyHash>().unwrap(), hash);
            assert_eq!(text.to_uppercase().parse::<KeyHash>().unwrap(), hash);
        }
    }
    assert_eq!(format!("{:?}", KeyHash([0xab; 32])), format!("KeyHash({})", "ab".repeat(32)));
    assert_eq!(String::from(KeyHash([1; 32])), "01".repeat(32));
    assert_eq!(KeyHash::try_from("01".repeat(32)).unwrap(), KeyHash([1; 32]));
    let good = "0f".repeat(32);
    for bad in [
        String::new(),
        good[1..].to_owned(),
        format!("{good}0"),
        format!("0x{}", &good[2..]),
        // A sign is a digit for whatever parses numbers.
        format!("+f{}", &good[2..]),
        format!("-f{}", &good[2..]),
        format!(" f{}", &good[2..]),
        format!("{}g", &good[1..]),
        // As many bytes, and not as many letters.
        format!("\u{e9}{}", &good[2..]),
        "\u{1b}[2J".repeat(16),
    ] {
        let said = problem::<KeyHash>(&bad);
        assert!(said.contains("hexadecimal digits") && !said.contains('\u{1b}'), "{bad:?}: {said}");
    }
    assert!(problem::<KeyHash>(&"f".repeat(1_000_000)).len() < 1000);
}

#[test]
fn a_ticket_keeps_its_bytes_to_itself() {
    assert_eq!(format!("{:?}", Ticket([7; Ticket::BYTES])), "Ticket(..)");
}
