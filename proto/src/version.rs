//! Which version of the stream's protocol two sides speak.
//!
//! ```text
//!   ours    [min ........ max]
//!   theirs        [min ........ max]
//!                          ^ the highest that both speak
//! ```
//!
//! Invariant: both sides come to the same version whoever computes it. Failure: [`NoCommonVersion`] names both ranges,
//! so that its reader knows which side to upgrade.

use std::fmt;

/// A version of the protocol. 0 is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version(pub u32);

impl Version {
    /// Whether a giver can go on with a stream of this version after its connection broke.
    pub fn resumes(self) -> bool {
        self >= Self(2)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The versions that one side speaks: all from `min` to `max`, never empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct VersionRange {
    min: Version,
    max: Version,
}

impl VersionRange {
    /// What this build speaks. Version 2 is version 1 and streams that can be resumed.
    pub const OURS: Self = Self { min: Version(1), max: Version(2) };

    /// The versions from `min` to `max`, both included. None where there are none or `min` is 0.
    pub fn new(min: u32, max: u32) -> Option<Self> {
        (1 <= min && min <= max).then_some(Self { min: Version(min), max: Version(max) })
    }

    /// The lowest.
    pub fn min(self) -> Version {
        self.min
    }

    /// The highest.
    pub fn max(self) -> Version {
        self.max
    }

    /// Whether `version` is one of them.
    pub fn contains(self, version: Version) -> bool {
        self.min <= version && version <= self.max
    }
}

impl fmt::Display for VersionRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.min == self.max {
            write!(f, "{}", self.min)
        } else {
            write!(f, "{} to {}", self.min, self.max)
        }
    }
}

/// Two sides have no version in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no common protocol version: this side speaks {ours}, the other {theirs}; upgrade the older one")]
pub struct NoCommonVersion {
    /// What this side speaks.
    pub ours: VersionRange,
    /// What the other speaks.
    pub theirs: VersionRange,
}

/// The highest version that both speak.
pub fn negotiate(ours: VersionRange, theirs: VersionRange) -> Result<Version, NoCommonVersion> {
    let highest = ours.max.min(theirs.max);
    if ours.contains(highest) && theirs.contains(highest) {
        Ok(highest)
    } else {
        Err(NoCommonVersion { ours, theirs })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_small_ranges_agree_on_the_highest_common_version_or_on_none() {
        let ranges: Vec<VersionRange> =
            (0..=6).flat_map(|min| (0..=6).filter_map(move |max| VersionRange::new(min, max))).collect();
        assert_eq!(ranges.len(), 21, "1 <= min <= max <= 6");
        let (mut agreed, mut not) = (0, 0);
        for &ours in &ranges {
            for &theirs in &ranges {
                let common = (0..=7).map(Version).filter(|v| ours.contains(*v) && theirs.contains(*v)).max();
                match negotiate(ours, theirs) {
                    Ok(version) => {
                        agreed += 1;
                        assert_eq!(Some(version), common, "{ours} and {theirs}");
                    }
                    Err(error) => {
                        not += 1;
                        assert_eq!((common, error), (None, NoCommonVersion { ours, theirs }));
                    }
                }
                assert_eq!(negotiate(ours, theirs).ok(), negotiate(theirs, ours).ok(), "the same for both");
            }
        }
        assert_eq!(agreed + not, 21 * 21);
        assert!(agreed > 0 && not > 0);
    }

    #[test]
    fn the_neighbours_of_this_version_are_spoken_with_and_resume_from_2_on() {
        for (min, max, agreed) in [(1, 1, 1), (1, 2, 2), (2, 3, 2)] {
            let theirs = VersionRange::new(min, max).unwrap();
            assert_eq!(negotiate(VersionRange::OURS, theirs), Ok(Version(agreed)));
        }
        assert_eq!([1, 2, 3].map(|version| Version(version).resumes()), [false, true, true]);
    }

    #[test]
    fn the_refusal_names_both_ranges() {
        let theirs = VersionRange::new(3, 3).unwrap();
        let said = negotiate(VersionRange::OURS, theirs).unwrap_err().to_string();
        assert!(said.contains("this side speaks 1 to 2, the other 3;"), "{said}");
    }
}
