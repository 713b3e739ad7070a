use super::*;

fn device() -> v1::Device {
    v1::Device {
        name: "devices/nic-a".to_owned(),
        backend: v1::Backend::Kernel.into(),
        driver: "mlx5_vfio_pci".to_owned(),
        state: v1::MigrationState::Running.into(),
        standing: v1::DeviceStanding::Quarantined.into(),
        standing_detail: "it could not be brought back\u{1b}[2J".to_owned(),
        capabilities: Some(v1::DeviceCapabilities { p2p: true, pre_copy: true, ..Default::default() }),
        data_size: Some(v1::DataSize { kind: v1::DataSizeKind::UpperBound.into(), bytes: 5 << 20 }),
        blockers: vec![v1::Blocker {
            reason: v1::BlockerReason::Unspecified.into(),
            message: "reset it first".to_owned(),
            ..Default::default()
        }],
        ..Default::default()
    }
}

fn operation() -> v1::Operation {
    v1::Operation {
        name: "operations/019aa7b4c10-5c0ffee15c0ffee1".to_owned(),
        kind: v1::OperationKind::Save.into(),
        phase: v1::OperationPhase::Done.into(),
        done: true,
        result: v1::OperationResult::Succeeded.into(),
        create_time: Some(prost_types::Timestamp { seconds: 1_800_000_000, nanos: 0 }),
        // A time that no calendar shows is left out, and stops nothing.
        end_time: Some(prost_types::Timestamp { seconds: i64::MAX, nanos: 0 }),
        downtime: Some(prost_types::Duration { seconds: 0, nanos: 12_300_000 }),
        eta: Some(prost_types::Duration { seconds: -1, nanos: 0 }),
        moved_bytes: 3 << 20,
        actions: vec![v1::OperationAction::Resume.into()],
        devices: vec![v1::OperationDevice {
            device: "devices/nic-a".to_owned(),
            seal: Some(v1::Seal { length_bytes: 3, blake3: vec![0xab; 2].into() }),
            ..Default::default()
        }],
        ..Default::default()
    }
}

fn migration() -> v1::Operation {
    v1::Operation {
        name: "operations/019aa7b4c12-5c0ffee15c0ffee1".to_owned(),
        kind: v1::OperationKind::Migration.into(),
        phase: v1::OperationPhase::Committing.into(),
        actions: vec![v1::OperationAction::Resolve.into()],
        handover: Some(v1::Handover {
            peer: "https://node2:7443".to_owned(),
            peer_operation: "operations/019aa7b4c13-5c0ffee15c0ffee2".to_owned(),
            stop_time: Some(prost_types::Timestamp { seconds: 1_800_000_000, nanos: 0 }),
            in_doubt: true,
            doubt: "10.0.0.2:7443 refuses the connection\u{1b}[2J".to_owned(),
            resent_bytes: 1 << 20,
            reconnects: 2,
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn resolved() -> v1::Operation {
    let mut operation = migration();
    operation.done = true;
    operation.phase = v1::OperationPhase::Done.into();
    let handover = operation.handover.as_mut().unwrap();
    handover.in_doubt = false;
    handover.verdict = v1::HandoverVerdict::Lost.into();
    handover.resolution = "RESUME_HERE by spiffe://lab/admin: power is off".to_owned();
    operation
}

fn checkpoint() -> v1::Checkpoint {
    v1::Checkpoint {
        name: "stores/local/checkpoints/019aa7b4c10-5c0ffee15c0ffee1".to_owned(),
        manifest: Some(v1::CheckpointManifest {
            create_time: Some(prost_types::Timestamp { seconds: 1_800_000_000, nanos: 0 }),
            source_disposition: v1::SourceDisposition::StaysStopped.into(),
            devices: vec![v1::DeviceManifest {
                source_device: "devices/nic-a".to_owned(),
                driver: "mlx5_vfio_pci".to_owned(),
                logical_device: Some(v1::LogicalDevice { id: "ab".repeat(16), epoch: 3 }),
                ..Default::default()
            }],
            ..Default::default()
        }),
        consistency: v1::CheckpointConsistency::Inconsistent.into(),
        seals: vec![v1::Seal { length_bytes: 100 << 20, blake3: vec![0xab; 32].into() }],
        size_bytes: 100 << 20,
        added: Some(v1::CheckpointAdded { chunks: 7, plain_bytes: 3 << 20, stored_bytes: 1 << 20 }),
        caller: "spiffe://example.org/ns/ops/sa/saver".to_owned(),
        owner_pod: "ops/web-0".to_owned(),
        node: "node1".to_owned(),
        ..Default::default()
    }
}

fn damaged() -> v1::Checkpoint {
    v1::Checkpoint {
        name: "stores/local/checkpoints/019aa7b4c11-5c0ffee15c0ffee1".to_owned(),
        damage: "checkpoints/019aa7b4c11-5c0ffee15c0ffee1/table is damaged: it is missing".to_owned(),
        ..Default::default()
    }
}

fn all(documents: &impl Serialize, table: impl Fn(Detail) -> String) -> String {
    let (json, yaml) = (json(documents).unwrap(), yaml(documents).unwrap());
    format!("{}\n{}\n{json}\n{yaml}", table(Detail::Usual), table(Detail::Wide))
}

#[test]
fn devices_in_every_format() {
    let docs = [DeviceDoc::new(&device()), DeviceDoc::new(&v1::Device::default())];
    insta::assert_snapshot!(all(&docs, |detail| devices(detail, &docs)));
}

#[test]
fn operations_in_every_format() {
    let docs = [OperationDoc::new(&operation())];
    insta::assert_snapshot!(all(&docs, |detail| operations(detail, &docs)));
}

#[test]
fn migrations_in_every_format() {
    let docs = [OperationDoc::new(&migration()), OperationDoc::new(&resolved())];
    let text = all(&docs, |detail| operations(detail, &docs));
    assert!(text.chars().all(|letter| letter == '\n' || !letter.is_control()), "{text:?}");
    insta::assert_snapshot!(text);
}

#[test]
fn checkpoints_in_every_format() {
    let docs = [CheckpointDoc::new(&checkpoint()), CheckpointDoc::new(&damaged())];
    let text = all(&docs, |detail| checkpoints(detail, &docs));
    insta::assert_snapshot!(format!("{}\n{text}", device_states(Detail::Wide, &docs[0].devices)));
}

#[test]
fn no_usual_table_is_wider_than_a_terminal() {
    let (devices_, operations_) = ([DeviceDoc::new(&device())], [OperationDoc::new(&operation())]);
    let checkpoint = [CheckpointDoc::new(&checkpoint())];
    for table in [
        devices(Detail::Usual, &devices_),
        operations(Detail::Usual, &operations_),
        checkpoints(Detail::Usual, &checkpoint),
        device_states(Detail::Usual, &checkpoint[0].devices),
    ] {
        assert!(table.lines().all(|line| line.chars().count() <= 100), "{table}");
    }
}

#[test]
fn control_characters_stay_out_of_tables_and_are_escaped_in_documents() {
    let docs = [DeviceDoc::new(&device())];
    let text = all(&docs, |detail| devices(detail, &docs)) + &device_change(&docs[0]);
    assert!(text.chars().all(|letter| letter == '\n' || !letter.is_control()), "{text:?}");
}

#[test]
fn a_text_stays_a_text_in_yaml() {
    // What YAML 1.1 or 1.2 takes for something else.
    for text in [
        "",
        "~",
        "null",
        "true",
        "yes",
        "on",
        "123",
        "0x10",
        "1e5",
        "12e03",
        ".5",
        "1:30",
        "2027-01-15",
        "a: b",
        "- a",
        "#",
    ] {
        let written = yaml(&[text]).unwrap();
        assert!(written.starts_with("- \"") || written.starts_with("- '"), "{written}");
    }
}
