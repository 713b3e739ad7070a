//! The rules of the messages of a migration.

use super::*;
use crate::ids::{KeyHash, Ticket};
use crate::version::VersionRange;

fn logical(id: u8) -> v1::LogicalDevice {
    v1::LogicalDevice { id: format!("{id:032x}"), epoch: 3 }
}

fn admit() -> v1::AdmitRequest {
    v1::AdmitRequest {
        logical_devices: vec![logical(1), logical(2)],
        devices: vec!["devices/x".into(), "devices/y".into()],
        source_key_sha256: vec![7; 32].into(),
        ..Default::default()
    }
}

fn migrate() -> v1::MigrateRequest {
    v1::MigrateRequest {
        devices: vec!["devices/a".into(), "devices/b".into()],
        target: Some(v1::MigrationTarget {
            endpoint: "https://node2:7443".into(),
            spiffe_id: String::new(),
            devices: vec!["devices/x".into(), "devices/y".into()],
            key_sha256: vec![5; 32].into(),
        }),
        ticket: vec![9; Ticket::BYTES].into(),
        memory_capture: v1::MemoryCapture::None.into(),
        ..Default::default()
    }
}

fn prepare() -> v1::PrepareRequest {
    v1::PrepareRequest {
        ticket: vec![9; Ticket::BYTES].into(),
        source_operation: "operations/o".into(),
        manifest: Some(manifest()),
        devices: vec!["devices/x".into(), "devices/y".into()],
        min_version: 1,
        max_version: 2,
        validate_only: false,
        commit_timeout: seconds(60),
    }
}

fn resolve() -> v1::ResolveRequest {
    v1::ResolveRequest {
        operation: "operations/o".into(),
        resolution: v1::Resolution::ResumeHere.into(),
        ..Default::default()
    }
}

#[test]
fn what_a_destination_cannot_admit_is_named() {
    refusals::<_, AdmitSpec>(
        &admit(),
        &[
            ("devices", |m| m.devices.clear()),
            ("devices", |m| m.devices = (0..65).map(|n| format!("devices/{n}")).collect()),
            ("devices[0]", |m| m.devices[0] = "x".into()),
            ("devices[1]", |m| m.devices[1] = "devices/x".into()),
            ("logical_devices", |m| m.logical_devices.clear()),
            ("logical_devices", |m| drop(m.logical_devices.pop())),
            ("logical_devices", |m| m.logical_devices.push(logical(3))),
            ("logical_devices[0].id", |m| m.logical_devices[0].id = "0".repeat(31)),
            ("logical_devices[1].id", |m| m.logical_devices[1].id.clear()),
            ("logical_devices[1].id", |m| m.logical_devices[1] = logical(1)),
            // One that is there twice under two epochs is there twice all the same.
            ("logical_devices[1].id", |m| {
                m.logical_devices[1] = v1::LogicalDevice { epoch: 4, ..logical(1) }
            }),
            ("source_key_sha256", |m| m.source_key_sha256 = Bytes::new()),
            ("source_key_sha256", |m| m.source_key_sha256 = vec![7; 31].into()),
            ("source_key_sha256", |m| m.source_key_sha256 = vec![7; 33].into()),
            ("ttl", |m| m.ttl = seconds(0)),
            ("ttl", |m| m.ttl = seconds(-1)),
            ("ttl", |m| m.ttl = Some(prost_types::Duration { seconds: 3600, nanos: 1 })),
            ("owner_pod", |m| m.owner_pod = "web-0".into()),
        ],
    );
}

#[test]
fn what_a_destination_is_asked_arrives_in_its_order() {
    let spec = AdmitSpec::try_from(admit()).unwrap();
    let ids: Vec<&str> = spec.logical_devices.iter().map(|logical| logical.id.as_str()).collect();
    assert_eq!(ids, [logical(1).id, logical(2).id]);
    assert_eq!(spec.devices.iter().map(crate::ids::DeviceName::id).collect::<Vec<_>>(), ["x", "y"]);
    assert_eq!((spec.source_key, spec.ttl), (KeyHash([7; 32]), Duration::from_mins(1)));
    assert_eq!((spec.require_ready, spec.owner_pod), (false, None));
    let most = v1::AdmitRequest { ttl: seconds(3600), owner_pod: "ops/web-0".into(), ..admit() };
    let spec = AdmitSpec::try_from(v1::AdmitRequest { require_ready: true, ..most }).unwrap();
    assert_eq!((spec.require_ready, spec.ttl), (true, Duration::from_hours(1)));
    assert_eq!(spec.owner_pod.unwrap().namespace(), "ops");
}

#[test]
fn migrations_that_are_refused_name_the_field() {
    fn target(request: &mut v1::MigrateRequest) -> &mut v1::MigrationTarget {
        request.target.as_mut().unwrap()
    }
    refusals::<_, MigrateSpec>(
        &migrate(),
        &[
            ("target", |m| m.target = None),
            ("target.endpoint", |m| target(m).endpoint.clear()),
            ("target.endpoint", |m| target(m).endpoint = "x".repeat(513)),
            ("target.endpoint", |m| target(m).endpoint.push('\n')),
            ("target.spiffe_id", |m| target(m).spiffe_id = "x".repeat(2049)),
            ("target.spiffe_id", |m| target(m).spiffe_id = "spiffe://a/\u{7}".into()),
            ("target.devices", |m| target(m).devices.clear()),
            ("target.devices", |m| drop(target(m).devices.pop())),
            ("target.devices[1]", |m| target(m).devices[1] = "devices/x".into()),
            ("target.devices[0]", |m| target(m).devices[0] = "operations/x".into()),
            ("target.key_sha256", |m| target(m).key_sha256.clear()),
            ("target.key_sha256", |m| target(m).key_sha256 = vec![5; 31].into()),
            ("target.key_sha256", |m| target(m).key_sha256 = vec![5; 33].into()),
            ("target.key_sha256", |m| {
                m.validate_only = true;
                target(m).key_sha256.truncate(1);
            }),
            ("commit", |m| m.commit = 3),
            ("commit_timeout", |m| m.commit_timeout = seconds(1)),
            ("commit_timeout", |m| {
                m.commit = v1::CommitMode::Auto.into();
                m.commit_timeout = seconds(1);
            }),
            ("commit_timeout", |m| {
                m.commit = v1::CommitMode::Manual.into();
                m.commit_timeout = seconds(86_401);
            }),
            ("ticket", |m| m.ticket = Bytes::new()),
            ("ticket", |m| m.ticket.truncate(31)),
            ("ticket", |m| m.ticket = vec![9; 33].into()),
            ("ticket", |m| {
                m.validate_only = true;
                m.ticket.truncate(1);
            }),
            // The rules that it shares with a save.
            ("devices", |m| m.devices.clear()),
            ("devices[1]", |m| m.devices[1] = "devices/a".into()),
            ("pre_copy", |m| m.pre_copy = 3),
            ("cutover", |m| m.cutover = 3),
            ("cutover_timeout", |m| m.cutover_timeout = seconds(1)),
            ("downtime_limit", |m| m.downtime_limit = seconds(0)),
            ("pre_copy_budget", |m| {
                m.pre_copy = v1::PreCopyMode::Never.into();
                m.pre_copy_budget = seconds(1);
            }),
            ("no_convergence", |m| m.no_convergence = 3),
            ("memory_capture", |m| m.memory_capture = 0),
            ("request_id", |m| m.request_id = "mine".into()),
            ("owner_pod", |m| m.owner_pod = "pod".into()),
        ],
    );
}

#[test]
fn what_a_source_is_asked_arrives() {
    let spec = MigrateSpec::try_from(migrate()).unwrap();
    let converges = |limit, no_convergence: v1::NoConvergence| {
        let no_convergence = no_convergence.into();
        let wire = v1::MigrateRequest { downtime_limit: limit, no_convergence, ..migrate() };
        MigrateSpec::try_from(wire).unwrap().save.no_convergence
    };
    // A limit that the caller gives is kept, unless it says otherwise.
    assert_eq!(converges(None, v1::NoConvergence::Unspecified), NoConvergence::StopAnyway);
    assert_eq!(converges(seconds(1), v1::NoConvergence::Unspecified), NoConvergence::Abort);
    assert_eq!(converges(seconds(1), v1::NoConvergence::StopAnyway), NoConvergence::StopAnyway);
    assert_eq!(spec.commit, CommitMode::Auto);
    assert_eq!((spec.ticket, spec.target.spiffe_id), (Some(Ticket([9; Ticket::BYTES])), None));
    assert_eq!(spec.target.key, Some(KeyHash([5; 32])));
    assert_eq!(spec.save.after, AfterSave::HandOver);
    assert!(!spec.save.validate_only);
    let manual = v1::CommitMode::Manual.into();
    for (given, timeout) in [(None, None), (seconds(90), Some(Duration::from_secs(90)))] {
        let wire = v1::MigrateRequest { commit: manual, commit_timeout: given, ..migrate() };
        assert_eq!(MigrateSpec::try_from(wire).unwrap().commit, CommitMode::Manual { timeout });
    }
    // Nothing is done, so nothing opens the destination.
    let mut dry = v1::MigrateRequest { ticket: Bytes::new(), validate_only: true, ..migrate() };
    dry.target.as_mut().unwrap().key_sha256.clear();
    let spec = MigrateSpec::try_from(dry).unwrap();
    assert!(spec.ticket.is_none() && spec.target.key.is_none() && spec.save.validate_only);
}

#[test]
fn what_one_agent_asks_of_another_is_checked_like_all_else() {
    refusals::<_, PrepareSpec>(
        &prepare(),
        &[
            ("ticket", |m| m.ticket = Bytes::new()),
            ("source_operation", |m| m.source_operation = "o".into()),
            ("manifest", |m| m.manifest = None),
            ("manifest.devices", |m| m.manifest.as_mut().unwrap().devices.clear()),
            ("manifest.format_version", |m| m.manifest.as_mut().unwrap().format_version = 2),
            ("devices", |m| m.devices.clear()),
            ("devices", |m| drop(m.devices.pop())),
            ("devices[1]", |m| m.devices[1] = "devices/x".into()),
            ("min_version", |m| m.min_version = 0),
            ("min_version", |m| m.min_version = 3),
            ("commit_timeout", |m| m.commit_timeout = None),
            ("commit_timeout", |m| m.commit_timeout = seconds(0)),
            ("commit_timeout", |m| m.commit_timeout = seconds(86_401)),
        ],
    );
    let spec = PrepareSpec::try_from(prepare()).unwrap();
    assert_eq!((Some(spec.versions), spec.commit_timeout), (VersionRange::new(1, 2), Duration::from_mins(1)));
    let dry = v1::PrepareRequest { ticket: Bytes::new(), validate_only: true, ..prepare() };
    assert!(PrepareSpec::try_from(dry).unwrap().ticket.is_none());

    let commit = v1::CommitHandoverRequest {
        operation: "operations/o".into(),
        epochs: vec![4, 5],
        proof: vec![7; 32].into(),
    };
    refusals::<_, CommitHandoverSpec>(
        &commit,
        &[
            ("operation", |m| m.operation.clear()),
            ("epochs", |m| m.epochs.clear()),
            ("epochs", |m| m.epochs = vec![1; 65]),
            ("proof", |m| m.proof.clear()),
        ],
    );
    assert_eq!(CommitHandoverSpec::try_from(commit).unwrap().epochs, [Epoch(4), Epoch(5)]);
}

#[test]
fn a_decision_is_whole_or_is_refused() {
    refusals::<_, ResolveSpec>(
        &resolve(),
        &[
            ("operation", |m| m.operation = "devices/o".into()),
            ("resolution", |m| m.resolution = 0),
            ("resolution", |m| m.resolution = 3),
            // What one decision takes means nothing with the other, and is no slip to be passed over.
            ("accept_loss", |m| m.accept_loss = true),
            ("peer_is_fenced", |m| {
                m.resolution = v1::Resolution::LetGo.into();
                m.peer_is_fenced = true;
            }),
            ("statement", |m| m.peer_is_fenced = true),
            ("statement", |m| {
                m.resolution = v1::Resolution::LetGo.into();
                m.accept_loss = true;
            }),
            ("statement", |m| m.statement = "x".repeat(1025)),
            ("statement", |m| m.statement = "power is off\n".into()),
        ],
    );
    let bare = ResolveSpec::try_from(resolve()).unwrap();
    assert_eq!((bare.resolution, bare.is_stated), (Resolution::ResumeHere, false));
    let stated = |resolution: v1::Resolution, peer_is_fenced, accept_loss| {
        let statement = "x".repeat(1024);
        let wire = v1::ResolveRequest { peer_is_fenced, accept_loss, statement, ..resolve() };
        ResolveSpec::try_from(v1::ResolveRequest { resolution: resolution.into(), ..wire }).unwrap()
    };
    let here = stated(v1::Resolution::ResumeHere, true, false);
    assert_eq!((here.resolution, here.is_stated), (Resolution::ResumeHere, true));
    let gone = stated(v1::Resolution::LetGo, false, true);
    assert_eq!((gone.resolution, gone.is_stated), (Resolution::LetGo, true));
    assert!(!stated(v1::Resolution::LetGo, false, false).is_stated);
}

#[test]
fn a_ticket_is_shown_to_nobody() {
    let spec = MigrateSpec::try_from(migrate()).unwrap();
    let shown = format!("{spec:?}");
    assert!(shown.contains("Ticket(..)") && !shown.contains("9, 9"), "{shown}");
}
