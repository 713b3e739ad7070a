//! What is said of an operation on the way: once, and when it is time.
//!
//! Invariants: a caller who has to do something is told what, with the whole command. A migration that is in doubt is told
//! loudly; the moment in which every migration waits for the destination's answer is not.

use std::time::Duration;

use tokio::time::Instant;
use vfio_checkpoint_client::call::printable;
use vfio_checkpoint_proto::v1::{Operation, OperationAction, OperationPhase};

use crate::render;

/// How long an answer may take before it is worth a word. Devices run within seconds, or something is wrong.
const QUIET_DOUBT: Duration = Duration::from_secs(10);

/// Knows what was said.
#[derive(Debug)]
pub(crate) struct Teller {
    told: Vec<OperationAction>,
    doubt: Doubt,
    /// The options that lead to the destination, where it has to be told Ready and nobody was told so.
    ready_at: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Doubt {
    None,
    Since(Instant),
    Told,
}

impl Teller {
    pub(crate) fn new() -> Self {
        Self { told: Vec::new(), doubt: Doubt::None, ready_at: None }
    }

    /// The same for a migration whose destination waits for Ready.
    pub(crate) fn ready_at(self, options: Option<String>) -> Self {
        Self { ready_at: options, ..self }
    }

    /// What there is to say of an operation as it is now.
    pub(super) fn hear(&mut self, operation: &Operation, now: Instant) -> Vec<String> {
        let mut said = Vec::new();
        for action in operation.actions() {
            if !self.told.contains(&action)
                && let Some(text) = call_for(action, operation)
            {
                self.told.push(action);
                said.push(text);
            }
        }
        said.extend(self.ready(operation));
        said.extend(self.doubt(operation, now));
        said
    }

    /// The source has given all: what is left is with the destination.
    fn ready(&mut self, operation: &Operation) -> Option<String> {
        let there = operation.handover.as_ref().filter(|handover| !handover.peer_operation.is_empty())?;
        if operation.phase() != OperationPhase::Sealing {
            return None;
        }
        let options = self.ready_at.take()?;
        let name = printable(id(&there.peer_operation));
        Some(format!(
            "the destination has the state: once the memory of the workload is mapped there call: vfioctl {options} \
             operations ready {name}"
        ))
    }

    fn doubt(&mut self, operation: &Operation, now: Instant) -> Option<String> {
        let Some((text, hint)) = render::in_doubt(operation) else {
            let was = std::mem::replace(&mut self.doubt, Doubt::None);
            return (was == Doubt::Told)
                .then(|| format!("{} is in doubt no more", printable(&operation.name)));
        };
        let since = match self.doubt {
            Doubt::Told => return None,
            Doubt::Since(since) => since,
            Doubt::None => now,
        };
        let is_wrong = operation.handover.as_ref().is_some_and(|handover| !handover.doubt.is_empty());
        if !is_wrong && now.duration_since(since) < QUIET_DOUBT {
            self.doubt = Doubt::Since(since);
            return None;
        }
        self.doubt = Doubt::Told;
        Some(format!("{}: {text}\n  {hint}", printable(&operation.name)))
    }
}

/// What the caller has to do, where the operation waits for it.
fn call_for(action: OperationAction, operation: &Operation) -> Option<String> {
    let name = printable(id(&operation.name));
    let until = render::moment(operation.deadline.as_ref())
        .map(|time| format!("\n  if that is not said by {time}, the operation is undone"))
        .unwrap_or_default();
    match action {
        OperationAction::Cutover => {
            Some(format!("pause the workload and call: vfioctl operations cutover {name}"))
        }
        OperationAction::Resume => {
            Some(format!("the devices are held; to run them call: vfioctl operations resume {name}"))
        }
        OperationAction::Commit => {
            let handover = operation.handover.as_ref();
            let since = handover.and_then(|handover| render::moment(handover.prepare_time.as_ref()));
            let since = since.map(|time| format!(" since {time}")).unwrap_or_default();
            Some(format!(
                "everything is prepared{since}, and the devices stand still on both sides; once the rest of the workload \
                 is there, too, call: vfioctl operations commit {name}{until}"
            ))
        }
        OperationAction::Ready => Some(format!(
            "the state is loaded: once the memory of the workload is mapped here call: vfioctl operations ready {name}{until}"
        )),
        OperationAction::Unspecified
        | OperationAction::Stream
        | OperationAction::Cancel
        // Said where it is in doubt, with all that is known.
        | OperationAction::Resolve => None,
    }
}

fn id(name: &str) -> &str {
    name.strip_prefix("operations/").unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use vfio_checkpoint_proto::v1::{Handover, HandoverVerdict};

    use super::*;

    fn migration(phase: OperationPhase, actions: &[OperationAction], handover: Handover) -> Operation {
        Operation {
            name: "operations/1".to_owned(),
            phase: phase.into(),
            actions: actions.iter().map(|action| i32::from(*action)).collect(),
            handover: Some(handover),
            ..Operation::default()
        }
    }

    fn far() -> Handover {
        Handover {
            peer: "https://node2:7443".to_owned(),
            peer_operation: "operations/7".to_owned(),
            stop_time: Some(prost_types::Timestamp { seconds: 1_800_000_000, nanos: 0 }),
            prepare_time: Some(prost_types::Timestamp { seconds: 1_800_000_001, nanos: 0 }),
            ..Handover::default()
        }
    }

    #[test]
    fn what_is_to_be_called_is_said_once() {
        let now = Instant::now();
        let mut teller = Teller::new().ready_at(Some("--context two".to_owned()));
        let mut said = Vec::new();
        let mut prepared = migration(OperationPhase::Prepared, &[OperationAction::Commit], far());
        prepared.deadline = Some(prost_types::Timestamp { seconds: 1_800_000_060, nanos: 0 });
        for operation in [
            migration(
                OperationPhase::WaitingForCutover,
                &[OperationAction::Cutover, OperationAction::Cancel],
                far(),
            ),
            migration(OperationPhase::Sealing, &[], Handover::default()),
            migration(OperationPhase::Sealing, &[], far()),
            migration(OperationPhase::Sealing, &[], far()),
            prepared.clone(),
            prepared,
            migration(
                OperationPhase::Held,
                &[OperationAction::Resume, OperationAction::Ready],
                Handover::default(),
            ),
        ] {
            said.extend(teller.hear(&operation, now));
        }
        insta::assert_snapshot!(said.join("\n"));
    }

    #[test]
    fn a_doubt_is_told_when_it_is_one_and_when_it_is_none() {
        let start = Instant::now();
        let mut teller = Teller::new();
        let silent = Handover { in_doubt: true, ..far() };
        let at = |seconds| start + Duration::from_secs(seconds);
        let committing = |handover: &Handover| migration(OperationPhase::Committing, &[], handover.clone());
        // Every migration waits for the answer for a moment.
        assert!(teller.hear(&committing(&silent), at(0)).is_empty());
        assert!(teller.hear(&committing(&far()), at(1)).is_empty());
        assert!(teller.hear(&committing(&silent), at(2)).is_empty());
        assert!(teller.hear(&committing(&silent), at(11)).is_empty());
        let said = teller.hear(&committing(&silent), at(12));
        assert!(said[0].contains("IN DOUBT") && said[0].contains("operations resolve 1"), "{said:?}");
        assert!(teller.hear(&committing(&silent), at(30)).is_empty());
        let said = teller.hear(&migration(OperationPhase::LettingGo, &[], far()), at(31));
        assert_eq!(said, ["operations/1 is in doubt no more"]);
        // Where something is known to be wrong there is nothing to wait for.
        let wrong = Handover { doubt: "it refuses the connection\u{1b}[2J".to_owned(), ..silent };
        let said = teller.hear(&committing(&wrong), at(32));
        assert!(said[0].contains("it refuses the connection") && !said[0].contains('\u{1b}'), "{said:?}");
    }

    #[test]
    fn the_words_of_every_doubt() {
        let mut text = Vec::new();
        for verdict in [HandoverVerdict::Unspecified, HandoverVerdict::Lost, HandoverVerdict::Broken] {
            let handover = Handover { in_doubt: true, verdict: verdict.into(), ..far() };
            let operation = migration(OperationPhase::Committing, &[], handover);
            let (what, hint) = render::in_doubt(&operation).unwrap();
            text.push(format!("{what}\n  {hint}"));
            assert_eq!(render::is_for_somebody(&operation), verdict != HandoverVerdict::Unspecified);
        }
        assert_eq!(render::in_doubt(&migration(OperationPhase::Prepared, &[], far())), None);
        insta::assert_snapshot!(text.join("\n"));
    }
}
