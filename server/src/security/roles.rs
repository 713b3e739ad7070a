//! Who may do what: grants map identities to roles, one table maps methods to roles.
//!
//! ```text
//!   Identity --Policy::roles_of--> RoleSet --+
//!                                            +--> decide: Allowed | RoleRequired | UnknownMethod
//!   method path --rule_of--> MethodRule -----+
//! ```
//!
//! Deny by default, twice: an identity without a grant has no role, and a method without a line in
//! [`METHODS`] is refused whoever calls it, so that a new method fails closed until somebody says who may
//! call it. A pattern is matched against whole parsed names. `spiffe://d/a/*` stands for every path below
//! `/a/`, at any depth, and not for `/a` or `/ab`; `*.example` stands for exactly one label, as in a
//! certificate.

use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, PoisonError, RwLock};

use serde::{Deserialize, Serialize};

use super::identity::{DnsName, Identity, IdentityError, SpiffeId};

pub use super::methods::{Access, Decision, Effect, METHODS, MethodRule, decide, required_roles, rule_of};

/// What a caller may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Reads devices and operations.
    Viewer,
    /// Saves.
    Saver,
    /// Restores.
    Restorer,
    /// Migrates.
    Migrator,
    /// Is another agent.
    Peer,
    /// Everything a person may do, and what only a person may.
    Admin,
}

impl Role {
    /// Every role, in order.
    pub const ALL: [Role; 6] =
        [Role::Viewer, Role::Saver, Role::Restorer, Role::Migrator, Role::Peer, Role::Admin];

    /// The name, as configured.
    pub fn name(self) -> &'static str {
        match self {
            Role::Viewer => "viewer",
            Role::Saver => "saver",
            Role::Restorer => "restorer",
            Role::Migrator => "migrator",
            Role::Peer => "peer",
            Role::Admin => "admin",
        }
    }

    fn bit(self) -> u8 {
        1 << (self as u8)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A set of roles.
#[derive(Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct RoleSet(u8);

impl RoleSet {
    /// No role.
    pub const EMPTY: RoleSet = RoleSet(0);

    /// Whether the role is in it.
    pub fn contains(self, role: Role) -> bool {
        self.0 & role.bit() != 0
    }

    /// Whether no role is in it.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether every role of `other` is in it.
    pub fn contains_all(self, other: RoleSet) -> bool {
        other.0 & !self.0 == 0
    }

    /// Its roles, in order.
    pub fn iter(self) -> impl Iterator<Item = Role> {
        Role::ALL.into_iter().filter(move |role| self.contains(*role))
    }

    /// Both sets together.
    #[must_use]
    pub fn union(self, other: RoleSet) -> RoleSet {
        RoleSet(self.0 | other.0)
    }
}

impl FromIterator<Role> for RoleSet {
    fn from_iter<I: IntoIterator<Item = Role>>(roles: I) -> Self {
        RoleSet(roles.into_iter().fold(0, |bits, role| bits | role.bit()))
    }
}

impl fmt::Display for RoleSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&join(self.iter()))
    }
}

impl fmt::Debug for RoleSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RoleSet({self})")
    }
}

/// Role names with commas between.
pub fn join(roles: impl IntoIterator<Item = Role>) -> String {
    roles.into_iter().map(Role::name).collect::<Vec<_>>().join(",")
}

/// Why a grant cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    /// The name in it is no name.
    #[error(
        "grant for {pattern:?}: write spiffe://domain/path, spiffe://domain/path/*, host.example or *.example"
    )]
    Name {
        /// The pattern as written.
        pattern: String,
        /// What is wrong with the name.
        #[source]
        source: IdentityError,
    },
    /// A star where it stands for nothing.
    #[error(
        "grant for {pattern:?}: a star may only be the last path segment of a SPIFFE ID or the first label of a host name"
    )]
    Star {
        /// The pattern as written.
        pattern: String,
    },
}

/// Whom a grant is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Pattern {
    /// This SPIFFE ID.
    Spiffe(SpiffeId),
    /// Every SPIFFE ID below this one.
    SpiffeBelow(SpiffeId),
    /// This host.
    Dns(DnsName),
    /// Every host with one label before this name.
    DnsBelow(DnsName),
}

impl Pattern {
    /// Whether the identity is meant.
    pub fn matches(&self, identity: &Identity) -> bool {
        match (self, identity) {
            (Pattern::Spiffe(id), Identity::Spiffe(peer)) => id == peer,
            (Pattern::SpiffeBelow(prefix), Identity::Spiffe(peer)) => {
                peer.as_str().strip_prefix(prefix.as_str()).is_some_and(|rest| rest.starts_with('/'))
            }
            (Pattern::Dns(name), Identity::Dns(peers)) => peers.iter().any(|peer| peer == name),
            (Pattern::DnsBelow(suffix), Identity::Dns(peers)) => peers
                .iter()
                .any(|peer| peer.as_str().split_once('.').is_some_and(|(_, rest)| rest == suffix.as_str())),
            (Pattern::Spiffe(_) | Pattern::SpiffeBelow(_), Identity::Dns(_))
            | (Pattern::Dns(_) | Pattern::DnsBelow(_), Identity::Spiffe(_)) => false,
        }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Pattern::Spiffe(id) => write!(f, "{id}"),
            Pattern::SpiffeBelow(id) => write!(f, "{id}/*"),
            Pattern::Dns(name) => write!(f, "{name}"),
            Pattern::DnsBelow(name) => write!(f, "*.{name}"),
        }
    }
}

impl FromStr for Pattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        let bad_name = |source| PatternError::Name { pattern: text.to_owned(), source };
        let (name, star) = match (text.strip_suffix("/*"), text.strip_prefix("*.")) {
            (Some(prefix), None) if text.starts_with("spiffe://") => (prefix, true),
            (None, Some(suffix)) => (suffix, true),
            (None, None) => (text, false),
            (Some(_), Some(_) | None) => return Err(PatternError::Star { pattern: text.to_owned() }),
        };
        if name.contains('*') {
            return Err(PatternError::Star { pattern: text.to_owned() });
        }
        if text.starts_with("spiffe:") {
            let id = name.parse().map_err(bad_name)?;
            return Ok(if star { Pattern::SpiffeBelow(id) } else { Pattern::Spiffe(id) });
        }
        let host = name.parse().map_err(bad_name)?;
        Ok(if star { Pattern::DnsBelow(host) } else { Pattern::Dns(host) })
    }
}

impl TryFrom<String> for Pattern {
    type Error = PatternError;

    fn try_from(text: String) -> Result<Self, PatternError> {
        text.parse()
    }
}

impl From<Pattern> for String {
    fn from(pattern: Pattern) -> Self {
        pattern.to_string()
    }
}

/// Roles for whoever matches.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grant {
    /// Whom it is for.
    pub who: Pattern,
    /// What they may do.
    pub roles: Vec<Role>,
}

/// All grants.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// The grants. Their order has no meaning: what matches adds up.
    pub grants: Vec<Grant>,
}

impl Policy {
    /// Every role that some grant gives to this identity.
    pub fn roles_of(&self, identity: &Identity) -> RoleSet {
        self.grants
            .iter()
            .filter(|grant| grant.who.matches(identity))
            .fold(RoleSet::EMPTY, |roles, grant| roles.union(grant.roles.iter().copied().collect()))
    }
}

/// The policy in force; a new one takes effect with the next request. Requests that are under way go on: who replaces it
/// ends the connections of those who lost a role.
#[derive(Debug, Clone, Default)]
pub struct PolicyHandle(Arc<RwLock<Arc<Policy>>>);

impl PolicyHandle {
    /// Puts a first policy in force.
    pub fn new(policy: Policy) -> Self {
        Self(Arc::new(RwLock::new(Arc::new(policy))))
    }

    /// The policy in force.
    pub fn current(&self) -> Arc<Policy> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Puts another policy in force.
    pub fn replace(&self, policy: Policy) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(policy);
    }
}
