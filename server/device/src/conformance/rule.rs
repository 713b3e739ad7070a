//! What a rule is, and what can come of it: data, and a check that looks at one device.
//!
//! ```text
//!   Rule { id, contract, source, weight } --check--> Answer --with the weight--> Finding
//!                                             Ok(seen)                 Holds
//!                                             Instead::Differs         Differs: matters, or tolerated and how
//!                                             Instead::NotApplicable   the device lacks what the rule is about
//!                                             Instead::NotObserved     it could not be seen here, and why
//!                                             Instead::Stuck           Differs, and the run ends
//! ```
//!
//! # Invariants
//! - No rule is passed over in silence: each ends in a [`Finding`] or is named among those that were not run.
//! - An id never changes its meaning; scripts may depend on it.
//!
//! # Failure paths
//! An error that a check did not look for is a difference, with its causes: a rule never ends the suite, except where
//! the device can no longer be brought back to RUNNING.

use std::fmt;

use serde::Serialize;

use super::bench::Bench;
use crate::kernel::quirks::Quirk;
use crate::{DeviceError, chain};

/// One rule of the kernel's contract.
#[derive(Debug)]
pub struct Rule {
    /// Stable name, in kebab-case.
    pub id: &'static str,
    /// What a device has to do, in one sentence.
    pub contract: &'static str,
    /// Where the kernel says so.
    pub source: &'static str,
    /// What it means where a device does otherwise.
    pub weight: Weight,
    /// Differences of single drivers that are known: a driver with one of these is expected to differ here.
    pub quirks: &'static [Quirk],
    pub(super) check: fn(&mut Bench) -> Answer,
}

/// What it means for this project's driver where a device differs from a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(tag = "if_different", rename_all = "snake_case")]
pub enum Weight {
    /// State would be lost, or the device would wedge.
    Matters {
        /// What happens.
        consequence: &'static str,
    },
    /// The driver copes.
    Tolerated {
        /// How it copes.
        how: &'static str,
    },
}

/// What was found about one rule on one device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "verdict", rename_all = "snake_case")]
pub enum Verdict {
    /// The device does as the rule says.
    Holds {
        /// What was seen.
        seen: String,
    },
    /// The device does otherwise.
    Differs {
        /// What was seen.
        seen: String,
        /// Whether the difference matters for this project.
        matters: bool,
        /// What follows from it, or how the driver copes.
        meaning: String,
    },
    /// The device lacks what the rule is about.
    NotApplicable {
        /// What it lacks.
        why: String,
    },
    /// The rule could not be observed in this run.
    NotObserved {
        /// What would be needed.
        why: String,
    },
}

impl Verdict {
    /// What was seen, or why nothing was.
    pub fn text(&self) -> &str {
        match self {
            Self::Holds { seen } | Self::Differs { seen, .. } => seen,
            Self::NotApplicable { why } | Self::NotObserved { why } => why,
        }
    }

    /// Whether the device differs in a way that matters.
    pub fn matters(&self) -> bool {
        match self {
            Self::Differs { matters, .. } => *matters,
            Self::Holds { .. } | Self::NotApplicable { .. } | Self::NotObserved { .. } => false,
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Holds { .. } => "holds",
            Self::Differs { .. } => "DIFFERS",
            Self::NotApplicable { .. } => "not applicable",
            Self::NotObserved { .. } => "not observed",
        })
    }
}

/// What a check ends with: what was seen where the rule holds.
pub(super) type Answer = Result<String, Instead>;

/// Why a check did not end with "holds".
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Instead {
    NotApplicable(String),
    NotObserved(String),
    Differs(String),
    /// The device cannot be brought back to where the next rule could begin.
    Stuck(String),
}

#[allow(clippy::wildcard_enum_match_arm, reason = "what is not the end of the device is an answer of it")]
impl From<DeviceError> for Instead {
    fn from(error: DeviceError) -> Self {
        match error {
            // No rule is about a device that is gone.
            DeviceError::Disconnected { .. } | DeviceError::Hung(_) => Self::Stuck(chain(&error)),
            _ => Self::Differs(chain(&error)),
        }
    }
}

impl Instead {
    /// Puts the case before what was seen.
    pub(super) fn during(self, case: impl fmt::Display) -> Self {
        let with = |text: String| format!("{case}: {text}");
        match self {
            Self::NotApplicable(why) => Self::NotApplicable(with(why)),
            Self::NotObserved(why) => Self::NotObserved(with(why)),
            Self::Differs(seen) => Self::Differs(with(seen)),
            Self::Stuck(why) => Self::Stuck(with(why)),
        }
    }
}

#[allow(clippy::unnecessary_wraps, reason = "the end of a check, as `differs` and the others are")]
pub(super) fn holds(seen: impl Into<String>) -> Answer {
    Ok(seen.into())
}

pub(super) fn differs<T>(seen: impl Into<String>) -> Result<T, Instead> {
    Err(Instead::Differs(seen.into()))
}

pub(super) fn not_applicable<T>(why: impl Into<String>) -> Result<T, Instead> {
    Err(Instead::NotApplicable(why.into()))
}

pub(super) fn not_observed<T>(why: impl Into<String>) -> Result<T, Instead> {
    Err(Instead::NotObserved(why.into()))
}
