//! The other side of a migration or an arrival, and what is to be done about one in doubt.
//!
//! Invariants: a migration that is in doubt is never shown without saying so, and what leads on.

use serde::Serialize;
use vfio_checkpoint_client::call::printable;
use vfio_checkpoint_proto::v1;

use super::{bytes, moment, seconds, short};

/// How far the two sides are.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct HandoverDoc {
    pub(super) peer: String,
    pub(super) peer_operation: String,
    pub(super) stop_time: Option<String>,
    prepare_time: Option<String>,
    pub(super) verdict: &'static str,
    pub(super) in_doubt: bool,
    doubt: String,
    resent_bytes: u64,
    reconnects: u32,
    pub(super) resolution: String,
    awaits_ready: bool,
}

impl HandoverDoc {
    pub(crate) fn new(handover: &v1::Handover) -> Self {
        Self {
            peer: handover.peer.clone(),
            peer_operation: handover.peer_operation.clone(),
            stop_time: moment(handover.stop_time.as_ref()),
            prepare_time: moment(handover.prepare_time.as_ref()),
            verdict: verdict_name(handover.verdict()),
            in_doubt: handover.in_doubt,
            doubt: handover.doubt.clone(),
            resent_bytes: handover.resent_bytes,
            reconnects: handover.reconnects,
            resolution: handover.resolution.clone(),
            awaits_ready: handover.awaits_ready,
        }
    }

    /// What was sent twice.
    pub(crate) fn resent(&self) -> String {
        let times = if self.reconnects == 1 { "time" } else { "times" };
        format!("{}, connected anew {} {times}", bytes(self.resent_bytes), self.reconnects)
    }

    /// How it ended there.
    pub(crate) fn verdict_in_words(&self) -> String {
        let verdict = v1::HandoverVerdict::from_str_name(&format!("{VERDICT}{}", self.verdict));
        let words = verdict_in_words(verdict.unwrap_or_default());
        if self.peer_operation.is_empty() {
            return format!("{}: {words}", self.verdict);
        }
        format!("{}: {words}, as {} there", self.verdict, printable(&self.peer_operation))
    }
}

const VERDICT: &str = "HANDOVER_VERDICT_";

pub(crate) fn verdict_name(verdict: v1::HandoverVerdict) -> &'static str {
    short(verdict.as_str_name(), VERDICT)
}

/// A verdict for people.
pub(crate) fn verdict_in_words(verdict: v1::HandoverVerdict) -> &'static str {
    match verdict {
        v1::HandoverVerdict::Unspecified => "not known",
        v1::HandoverVerdict::Committed => "every device runs at the destination",
        v1::HandoverVerdict::Refused => "no device runs at the destination, and none will",
        v1::HandoverVerdict::Lost => {
            "the devices may have run at the destination, and what they had there is gone; none runs there, and none will"
        }
        v1::HandoverVerdict::Broken => {
            "some device may run at the destination, and not all do; nothing moves there until somebody decides"
        }
    }
}

/// What is said of a migration that is in doubt, and what leads on. None of any other operation.
pub(crate) fn in_doubt(operation: &v1::Operation) -> Option<(String, String)> {
    let handover = operation.handover.as_ref().filter(|handover| handover.in_doubt && !operation.done)?;
    let peer =
        if handover.peer.is_empty() { "the destination".to_owned() } else { printable(&handover.peer) };
    let what = match handover.verdict() {
        v1::HandoverVerdict::Unspecified | v1::HandoverVerdict::Committed | v1::HandoverVerdict::Refused => {
            format!("{peer} was told to run the devices, and whether it does is not known here")
        }
        v1::HandoverVerdict::Lost | v1::HandoverVerdict::Broken => {
            format!(
                "{peer} says {}: {}",
                verdict_name(handover.verdict()),
                verdict_in_words(handover.verdict())
            )
        }
    };
    let since = moment(handover.stop_time.as_ref());
    // What the devices here still have, the operation does not say: Resolve does.
    let here = match since {
        Some(time) => format!("The devices here were stopped at {}", seconds(Some(&time))),
        None => "The devices here were stopped".to_owned(),
    };
    let mut text = format!("IN DOUBT: {what}. {here}");
    if !handover.doubt.is_empty() {
        text.extend([format!(". The last word: {}", printable(&handover.doubt))]);
    }
    let name = printable(operation.name.strip_prefix("operations/").unwrap_or(&operation.name));
    let hint = if is_for_somebody(operation) {
        format!(
            "nothing leads on by itself; to see both sides and to decide call: vfioctl operations resolve {name}"
        )
    } else {
        format!(
            "the agent goes on asking: see that the destination's agent runs and can be reached; if it never comes back, \
             an admin decides: vfioctl operations resolve {name}"
        )
    };
    Some((text, hint))
}

/// Whether a migration is in doubt, and the destination has said all that it will.
pub(crate) fn is_for_somebody(operation: &v1::Operation) -> bool {
    operation.handover.as_ref().is_some_and(|handover| {
        handover.in_doubt
            && match handover.verdict() {
                v1::HandoverVerdict::Lost | v1::HandoverVerdict::Broken => true,
                v1::HandoverVerdict::Unspecified
                | v1::HandoverVerdict::Committed
                | v1::HandoverVerdict::Refused => false,
            }
    })
}
