//! What a decision about a migration in doubt costs, by what each side has.
//!
//! ```text
//!   source devices, as they were read back --> Left --.
//!   verdict of the destination ------------------------+--> what becomes of the devices here, and what is lost
//! ```
//!
//! Invariants: that nothing is lost is said only where the agent has told that the state is there. Failure paths: of an agent
//! that does not tell what its devices have, it is not known.

use vfio_checkpoint_proto::v1;

/// How much of the state that was to move is left at the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Left {
    /// All of it, standing still.
    Whole,
    /// Not all of it: a device was reset since.
    Gone,
    /// It is not known to be all.
    Unclear,
}

impl Left {
    pub(super) fn of(devices: &[v1::SourceDevice]) -> Self {
        let any = |copy| devices.iter().any(|device| device.copy() == copy);
        if any(v1::SourceCopy::Gone) {
            Self::Gone
        } else if devices.is_empty()
            || any(v1::SourceCopy::Unspecified)
            || any(v1::SourceCopy::MovedOn)
            || any(v1::SourceCopy::Unknown)
        {
            Self::Unclear
        } else {
            Self::Whole
        }
    }
}

/// What a device of the source has, for people.
pub(super) fn in_words(copy: v1::SourceCopy) -> &'static str {
    match copy {
        v1::SourceCopy::Unspecified => "the agent does not say whether the state is there",
        v1::SourceCopy::Kept => "stands still, with its state",
        v1::SourceCopy::Gone => "was reset since: its state is gone, and what is in it now is somebody new",
        v1::SourceCopy::MovedOn => "runs: somebody else has moved it, and its state has gone on",
        v1::SourceCopy::Unknown => "nobody can tell whether its state is there",
    }
}

/// What a decision costs, with this verdict known and so much left here.
pub(super) fn cost(resolution: v1::Resolution, verdict: v1::HandoverVerdict, left: Left) -> String {
    let (here, all) = match resolution {
        v1::Resolution::LetGo => (let_go(left), loses_here(verdict, left)),
        v1::Resolution::ResumeHere | v1::Resolution::Unspecified => {
            (resumes(left), costs_there(verdict, left))
        }
    };
    format!("{here} {all}")
}

fn let_go(left: Left) -> &'static str {
    match left {
        Left::Whole | Left::Unclear => "The devices here are reset.",
        Left::Gone => "The devices here are reset; what they had is gone already, or a part of it.",
    }
}

fn resumes(left: Left) -> &'static str {
    match left {
        Left::Whole => "The devices here run on from where they stopped.",
        Left::Gone => {
            "What is left of the devices here runs on, and the state of those that were reset stays gone: the migration ends \
             with the state lost."
        }
        Left::Unclear => "What is left of the devices here runs on. It is not known whether that is all.",
    }
}

/// What is lost where the source lets go.
fn loses_here(verdict: v1::HandoverVerdict, left: Left) -> &'static str {
    match (verdict, left) {
        (v1::HandoverVerdict::Committed, Left::Whole | Left::Gone | Left::Unclear) => {
            "Those of the destination go on. Nothing is lost."
        }
        (v1::HandoverVerdict::Refused | v1::HandoverVerdict::Lost, Left::Whole | Left::Unclear) => {
            "Theirs is the only copy of the state, and it is lost for good."
        }
        (v1::HandoverVerdict::Refused | v1::HandoverVerdict::Lost, Left::Gone) => {
            "The destination has no copy, either: the state is lost for good."
        }
        (v1::HandoverVerdict::Broken, Left::Whole | Left::Gone | Left::Unclear) => {
            "What the destination has is a part of them at best; the rest is lost for good."
        }
        (v1::HandoverVerdict::Unspecified, Left::Whole | Left::Gone | Left::Unclear) => {
            "The destination is told once more to run them. If it does not, their state is lost for good."
        }
    }
}

/// What it costs to resume, beside what it does to the devices here.
fn costs_there(verdict: v1::HandoverVerdict, left: Left) -> &'static str {
    match (verdict, left) {
        (v1::HandoverVerdict::Committed, Left::Whole | Left::Gone | Left::Unclear) => {
            "The destination runs the devices: a second copy would run here."
        }
        (v1::HandoverVerdict::Refused, Left::Whole) => "Nothing is lost.",
        (v1::HandoverVerdict::Refused | v1::HandoverVerdict::Lost, Left::Gone)
        | (v1::HandoverVerdict::Refused, Left::Unclear) => "The destination has no copy.",
        (v1::HandoverVerdict::Lost, Left::Whole | Left::Unclear) => {
            "What they did at the destination since then, if they ran, is as if it had not been, but the network and the \
             disks may have seen it."
        }
        (v1::HandoverVerdict::Broken | v1::HandoverVerdict::Unspecified, Left::Gone) => {
            "The destination may have the only whole copy, and this gives it up. If it runs it after all, what is left here \
             runs as a second one: fence its node first, by its power or its network, and only then say so."
        }
        (v1::HandoverVerdict::Broken | v1::HandoverVerdict::Unspecified, Left::Whole | Left::Unclear) => {
            "If the destination runs them after all, two copies run at once and can spoil what they write to: fence its \
             node first, by its power or its network, and only then say so."
        }
    }
}
