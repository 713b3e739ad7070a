//! The table of methods: who may call what.
//!
//! ```text
//!   /package.Service/Method -> METHODS -> MethodRule { access, effect } -> decide(path, roles) -> Decision
//! ```
//!
//! One table, read from top to bottom by whoever reviews it. A method that is not in it is refused, so a new
//! one fails closed; a test goes through every line with every role.

use super::roles::Role::{self, Admin, Migrator, Peer, Restorer, Saver, Viewer};
use super::roles::RoleSet;
use Access::{AnyOf, Authenticated};
use Effect::{Mutates, Reads};

/// Who may call a method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Whoever has a verified certificate, even without a role.
    Authenticated,
    /// Whoever has one of these roles.
    AnyOf(&'static [Role]),
}

/// Whether a call changes anything: allowed calls that do are audited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Only reads.
    Reads,
    /// Changes a device or an operation.
    Mutates,
}

/// One line of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MethodRule {
    /// The full gRPC path.
    pub path: &'static str,
    /// Who may call it.
    pub access: Access,
    /// What it does.
    pub effect: Effect,
}

const fn rule(path: &'static str, access: Access, effect: Effect) -> MethodRule {
    MethodRule { path, access, effect }
}

/// Whoever may look.
const READERS: Access = AnyOf(&[Viewer, Saver, Restorer, Migrator, Admin]);
/// Whoever may look, and other agents.
const AGENTS: Access = AnyOf(&[Viewer, Saver, Restorer, Migrator, Peer, Admin]);
/// Whoever needs to know which pages a device wrote.
const DIRTY: Access = AnyOf(&[Saver, Migrator, Admin]);

/// Every method that can be called at all.
pub const METHODS: &[MethodRule] = &[
    rule("/vfio.checkpoint.v1.DeviceService/ListDevices", READERS, Reads),
    rule("/vfio.checkpoint.v1.DeviceService/GetDevice", READERS, Reads),
    rule("/vfio.checkpoint.v1.DeviceService/WatchDevices", READERS, Reads),
    rule("/vfio.checkpoint.v1.DeviceService/ResetDevice", AnyOf(&[Admin]), Mutates),
    rule("/vfio.checkpoint.v1.DeviceService/StartDirtyTracking", DIRTY, Mutates),
    // A report clears what it reports, so it changes what the next one says.
    rule("/vfio.checkpoint.v1.DeviceService/ReportDirtyPages", DIRTY, Mutates),
    rule("/vfio.checkpoint.v1.DeviceService/StopDirtyTracking", DIRTY, Mutates),
    rule("/vfio.checkpoint.v1.CheckpointService/StartSave", AnyOf(&[Saver, Admin]), Mutates),
    rule("/vfio.checkpoint.v1.CheckpointService/Cutover", AnyOf(&[Saver, Migrator, Admin]), Mutates),
    rule("/vfio.checkpoint.v1.CheckpointService/Restore", AnyOf(&[Restorer, Admin]), Mutates),
    rule("/vfio.checkpoint.v1.CheckpointService/Resume", AnyOf(&[Saver, Restorer, Admin]), Mutates),
    // Any stream's role here; whether it fits the operation is the handler's to check.
    rule(
        "/vfio.checkpoint.v1.CheckpointService/StreamState",
        AnyOf(&[Saver, Restorer, Peer, Admin]),
        Mutates,
    ),
    rule("/vfio.checkpoint.v1.CheckpointService/GetCheckpoint", READERS, Reads),
    rule("/vfio.checkpoint.v1.CheckpointService/ListCheckpoints", READERS, Reads),
    // Of the caller's own making; that is the handler's to check.
    rule("/vfio.checkpoint.v1.CheckpointService/DeleteCheckpoint", AnyOf(&[Saver, Admin]), Mutates),
    rule("/vfio.checkpoint.v1.CheckpointService/VerifyCheckpoint", AnyOf(&[Saver, Restorer, Admin]), Reads),
    rule("/vfio.checkpoint.v1.MigrationService/GetAgent", AGENTS, Reads),
    rule("/vfio.checkpoint.v1.MigrationService/Admit", AnyOf(&[Migrator, Admin]), Mutates),
    rule("/vfio.checkpoint.v1.MigrationService/Migrate", AnyOf(&[Migrator, Admin]), Mutates),
    rule("/vfio.checkpoint.v1.MigrationService/Commit", AnyOf(&[Migrator, Admin]), Mutates),
    rule("/vfio.checkpoint.v1.MigrationService/Ready", AnyOf(&[Migrator, Admin]), Mutates),
    rule("/vfio.checkpoint.v1.MigrationService/Resolve", AnyOf(&[Admin]), Mutates),
    rule("/vfio.checkpoint.v1.MigrationService/Prepare", AnyOf(&[Peer]), Mutates),
    rule("/vfio.checkpoint.v1.MigrationService/CommitHandover", AnyOf(&[Peer]), Mutates),
    rule("/vfio.checkpoint.v1.MigrationService/AbandonHandover", AnyOf(&[Peer]), Mutates),
    // What it changes, that the record may be forgotten, takes the proof of whoever prepared.
    rule("/vfio.checkpoint.v1.MigrationService/GetHandover", AnyOf(&[Migrator, Peer, Admin]), Reads),
    rule("/vfio.checkpoint.v1.OperationService/GetOperation", READERS, Reads),
    rule("/vfio.checkpoint.v1.OperationService/ListOperations", READERS, Reads),
    rule("/vfio.checkpoint.v1.OperationService/WaitOperation", READERS, Reads),
    rule("/vfio.checkpoint.v1.OperationService/WatchOperation", READERS, Reads),
    rule(
        "/vfio.checkpoint.v1.OperationService/CancelOperation",
        AnyOf(&[Saver, Restorer, Migrator, Admin]),
        Mutates,
    ),
    rule("/grpc.health.v1.Health/Check", Authenticated, Reads),
    rule("/grpc.health.v1.Health/Watch", Authenticated, Reads),
    rule("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", READERS, Reads),
];

/// The line for a method. None is a refusal.
pub fn rule_of(method_path: &str) -> Option<&'static MethodRule> {
    METHODS.iter().find(|rule| rule.path == method_path)
}

/// The roles of which one suffices; an empty slice asks for a verified certificate only; None is a refusal.
pub fn required_roles(method_path: &str) -> Option<&'static [Role]> {
    rule_of(method_path).map(|rule| match rule.access {
        Authenticated => &[][..],
        AnyOf(roles) => roles,
    })
}

/// What is decided about a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// It may pass.
    Allowed(&'static MethodRule),
    /// It needs one of these roles.
    RoleRequired(&'static [Role]),
    /// Nothing is known of such a method.
    UnknownMethod,
}

/// Decides about a call by a caller with these roles.
pub fn decide(method_path: &str, roles: RoleSet) -> Decision {
    let Some(rule) = rule_of(method_path) else { return Decision::UnknownMethod };
    match rule.access {
        Authenticated => Decision::Allowed(rule),
        AnyOf(needed) if needed.iter().any(|role| roles.contains(*role)) => Decision::Allowed(rule),
        AnyOf(needed) => Decision::RoleRequired(needed),
    }
}
