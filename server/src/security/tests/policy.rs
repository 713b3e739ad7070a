//! Grants, and the table: every role on every method.

use std::collections::BTreeSet;

use super::super::roles::{
    Access, Decision, Grant, METHODS, Pattern, PatternError, Policy, Role, RoleSet, decide, required_roles,
};
use super::*;

/// The table once more, the other way round and by hand: what each role may call. A change has to be made
/// twice.
fn allowed(role: Role) -> BTreeSet<&'static str> {
    let anybody = ["Health/Check", "Health/Watch"];
    let reader = [
        "MigrationService/GetAgent",
        "DeviceService/ListDevices",
        "DeviceService/GetDevice",
        "DeviceService/WatchDevices",
        "CheckpointService/GetCheckpoint",
        "CheckpointService/ListCheckpoints",
        "OperationService/GetOperation",
        "OperationService/ListOperations",
        "OperationService/WaitOperation",
        "OperationService/WatchOperation",
        "ServerReflection/ServerReflectionInfo",
    ];
    let dirty = [
        "DeviceService/StartDirtyTracking",
        "DeviceService/ReportDirtyPages",
        "DeviceService/StopDirtyTracking",
    ];
    let saver = [
        "CheckpointService/StartSave",
        "CheckpointService/Cutover",
        "CheckpointService/Resume",
        "CheckpointService/StreamState",
        "CheckpointService/DeleteCheckpoint",
        "CheckpointService/VerifyCheckpoint",
    ];
    let restorer = [
        "CheckpointService/Restore",
        "CheckpointService/Resume",
        "CheckpointService/StreamState",
        "CheckpointService/VerifyCheckpoint",
    ];
    let cancel = ["OperationService/CancelOperation"];
    let migrator = [
        "CheckpointService/Cutover",
        "MigrationService/Admit",
        "MigrationService/Migrate",
        "MigrationService/Commit",
        "MigrationService/Ready",
        "MigrationService/GetHandover",
    ];
    let agents = [
        "CheckpointService/StreamState",
        "MigrationService/GetAgent",
        "MigrationService/Prepare",
        "MigrationService/CommitHandover",
        "MigrationService/AbandonHandover",
        "MigrationService/GetHandover",
    ];
    let lists: &[&[&'static str]] = match role {
        Role::Viewer => &[&anybody, &reader],
        Role::Saver => &[&anybody, &reader, &dirty, &saver, &cancel],
        Role::Restorer => &[&anybody, &reader, &restorer, &cancel],
        Role::Migrator => &[&anybody, &reader, &dirty, &migrator, &cancel],
        Role::Peer => &[&anybody, &agents],
        Role::Admin => {
            let decides = &["DeviceService/ResetDevice", "MigrationService/Resolve"];
            &[&anybody, &reader, &dirty, &saver, &restorer, &migrator, &cancel, decides]
        }
    };
    lists.iter().flat_map(|list| list.iter().copied()).collect()
}

fn short(path: &str) -> &str {
    path.rsplit_once('.').unwrap().1
}

#[test]
fn every_role_on_every_method() {
    for role in Role::ALL {
        let expected = allowed(role);
        let roles: RoleSet = [role].into_iter().collect();
        for rule in METHODS {
            let passes = decide(rule.path, roles) == Decision::Allowed(rule);
            assert_eq!(passes, expected.contains(short(rule.path)), "{role} on {}", rule.path);
        }
        let known: BTreeSet<_> = METHODS.iter().map(|rule| short(rule.path)).collect();
        assert!(expected.is_subset(&known), "{role}: {:?}", expected.difference(&known));
    }
}

#[test]
fn without_a_role_only_health_and_unknown_methods_never() {
    for rule in METHODS {
        let decision = decide(rule.path, RoleSet::EMPTY);
        match rule.access {
            Access::Authenticated => {
                assert!(rule.path.starts_with("/grpc.health.v1.Health/"));
                assert_eq!(decision, Decision::Allowed(rule));
                assert_eq!(required_roles(rule.path), Some(&[][..]));
            }
            Access::AnyOf(roles) => {
                assert_eq!(decision, Decision::RoleRequired(roles));
                assert!(!roles.is_empty());
                assert_eq!(required_roles(rule.path), Some(roles));
            }
        }
    }
    let all: RoleSet = Role::ALL.into_iter().collect();
    for path in [
        "",
        "/",
        "/vfio.checkpoint.v1.DeviceService/NewMethod",
        "/vfio.checkpoint.v1.DeviceService/ListDevices/",
        "//vfio.checkpoint.v1.DeviceService/ListDevices",
        "/vfio.checkpoint.v1.deviceservice/listdevices",
        "/vfio.checkpoint.v2.DeviceService/ListDevices",
        "/vfio.checkpoint.v1.DeviceService/",
        "vfio.checkpoint.v1.DeviceService/ListDevices",
    ] {
        assert_eq!(decide(path, all), Decision::UnknownMethod, "{path:?}");
        assert_eq!(required_roles(path), None);
    }
}

#[test]
fn no_method_is_twice_in_the_table() {
    let paths: BTreeSet<_> = METHODS.iter().map(|rule| rule.path).collect();
    assert_eq!(paths.len(), METHODS.len());
}

fn dns(name: &str) -> Identity {
    Identity::Dns(name.parse::<super::super::identity::DnsName>().unwrap().into())
}

#[test]
fn patterns_match_whole_names() {
    let matches = |pattern: &str, identity: &Identity| pattern.parse::<Pattern>().unwrap().matches(identity);
    for (pattern, identity, expected) in [
        ("spiffe://lab.example/a/b", spiffe("/a/b"), true),
        ("spiffe://lab.example/a/b", spiffe("/a/b/c"), false),
        ("spiffe://lab.example/a/*", spiffe("/a/b"), true),
        ("spiffe://lab.example/a/*", spiffe("/a/b/c"), true),
        ("spiffe://lab.example/a/*", spiffe("/a"), false),
        ("spiffe://lab.example/a/*", spiffe("/ab"), false),
        ("spiffe://lab.example/a/*", spiffe("/ab/c"), false),
        ("spiffe://lab.example/*", spiffe("/a"), true),
        ("spiffe://lab.exampl/*", spiffe("/a"), false),
        ("spiffe://other.example/*", spiffe("/a"), false),
        ("a.example", dns("a.example"), true),
        ("A.example", dns("a.EXAMPLE"), true),
        ("a.example", dns("b.a.example"), false),
        ("*.example", dns("a.example"), true),
        ("*.example", dns("b.a.example"), false),
        ("*.example", dns("example"), false),
        ("*.example", dns("aexample"), false),
        ("*.example", spiffe("/a"), false),
        ("spiffe://lab.example/*", dns("lab.example"), false),
    ] {
        assert_eq!(matches(pattern, &identity), expected, "{pattern} on {identity}");
    }
}

#[test]
fn patterns_that_mean_nothing_are_refused() {
    for text in
        ["*", "spiffe://*/a", "spiffe://lab.example/a*", "spiffe://lab.example/*/b", "a.*.example", "a/*"]
    {
        assert!(matches!(text.parse::<Pattern>(), Err(PatternError::Star { .. })), "{text}");
    }
    for text in ["", "spiffe://", "spiffe:lab.example", "spiffe://lab.example/a/", "a b", "*."] {
        assert!(matches!(text.parse::<Pattern>(), Err(PatternError::Name { .. })), "{text}");
    }
}

#[test]
fn grants_add_up_and_default_to_nothing() {
    let policy: Policy = serde_json::from_str(
        r#"{"grants": [
            {"who": "spiffe://lab.example/a/*", "roles": ["viewer"]},
            {"who": "spiffe://lab.example/a/b", "roles": ["saver", "restorer"]},
            {"who": "*.nodes.example", "roles": ["peer"]}
        ]}"#,
    )
    .unwrap();
    assert_eq!(policy.roles_of(&spiffe("/a/b")).to_string(), "viewer,saver,restorer");
    assert_eq!(policy.roles_of(&spiffe("/a/c")).to_string(), "viewer");
    assert_eq!(policy.roles_of(&dns("n1.nodes.example")).to_string(), "peer");
    assert!(policy.roles_of(&spiffe("/b")).is_empty());
    assert!(Policy::default().roles_of(&spiffe("/a/b")).is_empty());
    let again: Policy = serde_json::from_str(&serde_json::to_string(&policy).unwrap()).unwrap();
    assert_eq!(again, policy);
}

#[test]
fn a_misspelt_grant_is_an_error() {
    for text in [
        r#"{"who": "a.example", "roles": ["root"]}"#,
        r#"{"who": "a.example", "roles": [], "rolls": []}"#,
        r#"{"who": "*", "roles": ["admin"]}"#,
        r#"{"roles": ["admin"]}"#,
    ] {
        assert!(serde_json::from_str::<Grant>(text).is_err(), "{text}");
    }
}
