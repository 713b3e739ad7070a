//! `vfioctl operations resolve`: what both sides know of a migration in doubt, and an admin's decision.
//!
//! ```text
//!   no decision   Resolve{validate_only}, once for each   both sides, what can be decided, what it costs
//!   a decision    Resolve{validate_only} -> asks -> Resolve
//! ```
//!
//! Invariants: nobody decides without having been shown what both sides know just now. Nothing is stated on record that was
//! not typed. Failure paths: a decision that the agent would not take is refused before anybody is asked, with what would do.

mod cost;

use clap::Args;
use serde::Serialize;
use vfio_checkpoint_client::call::{Client, printable};
use vfio_checkpoint_proto::ids::OperationName;
use vfio_checkpoint_proto::v1;

use crate::cli::OutputFormat;
use crate::commands::{confirm, missing};
use crate::outcome::{Exit, Failure};
use crate::render::{self, OperationDoc};
use crate::values::operation;

use cost::{Left, cost};

/// Show what is known of a migration that is in doubt, or end it.
#[derive(Debug, Args)]
pub(crate) struct ResolveArgs {
    /// Its name at the source
    #[arg(value_name = "OPERATION", value_parser = operation)]
    name: OperationName,
    /// Run the devices here again
    #[arg(long, conflicts_with = "let_go")]
    resume_here: bool,
    /// Reset the devices here: what the destination has is the device
    #[arg(long)]
    let_go: bool,
    #[command(flatten)]
    answered: Answered,
    /// Why, for whoever reads the audit log
    #[arg(long, value_name = "TEXT")]
    statement: Option<String>,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
}

/// What somebody answers for.
#[derive(Debug, Args)]
struct Answered {
    /// You answer for it that the destination is fenced: it does not run the devices, and never will. Needed where it
    /// has not said so itself
    #[arg(long, requires_all = ["resume_here", "statement"], conflicts_with_all = ["let_go", "accept_loss"])]
    peer_is_fenced: bool,
    /// You answer for it that the state here may be lost. Needed where the destination has not said that it runs the
    /// devices
    #[arg(long, requires_all = ["let_go", "statement"], conflicts_with = "resume_here")]
    accept_loss: bool,
}

pub(super) async fn run(client: &Client, args: ResolveArgs, format: OutputFormat) -> Result<Exit, Failure> {
    let request = |resolution: v1::Resolution| v1::ResolveRequest {
        operation: args.name.to_string(),
        resolution: resolution.into(),
        peer_is_fenced: args.answered.peer_is_fenced,
        accept_loss: args.answered.accept_loss,
        statement: args.statement.clone().unwrap_or_default(),
        validate_only: true,
    };
    let resolution = match (args.resume_here, args.let_go) {
        (true, _) => v1::Resolution::ResumeHere,
        (false, true) => v1::Resolution::LetGo,
        (false, false) if args.statement.is_some() || args.yes => {
            return Err(Failure::usage("there is no decision; give --resume-here or --let-go")
                .hint("without either, both sides and what can be decided are shown"));
        }
        (false, false) => {
            let here = ask(client, request(v1::Resolution::ResumeHere)).await?;
            let gone = ask(client, request(v1::Resolution::LetGo)).await?;
            let known = Known::new(&here)?.with(v1::Resolution::ResumeHere, &here, false).with(
                v1::Resolution::LetGo,
                &gone,
                false,
            );
            render::print(format, |_| known.text(), &known)?;
            return Ok(Exit::Done);
        }
    };
    let is_stated = args.answered.peer_is_fenced || args.answered.accept_loss;
    let found = ask(client, request(resolution)).await?;
    let known = Known::new(&found)?.with(resolution, &found, is_stated);
    if !found.refused.is_empty() {
        render::print(format, |_| known.text(), &known)?;
        return Err(refused(&args.name, &found.refused));
    }
    let question = match resolution {
        v1::Resolution::LetGo => "reset the devices here?",
        v1::Resolution::ResumeHere | v1::Resolution::Unspecified => "run the devices here again?",
    };
    confirm(format!("{}{question}", known.text()), args.yes).await?;
    let answer = ask(client, v1::ResolveRequest { validate_only: false, ..request(resolution) }).await?;
    if !answer.refused.is_empty() {
        return Err(refused(&args.name, &answer.refused));
    }
    let known = Known::new(&answer)?.with(resolution, &answer, is_stated);
    let known = Known { decided: Some(resolution_name(resolution)), ..known };
    let done = match resolution {
        v1::Resolution::LetGo => "the devices here are being reset",
        v1::Resolution::ResumeHere | v1::Resolution::Unspecified => "the devices here are being run again",
    };
    let table = |detail| {
        let rows = render::operations(detail, std::slice::from_ref(&known.operation));
        format!(
            "{}: {done}; to follow it call: vfioctl operations watch {}\n{rows}",
            args.name,
            args.name.id()
        )
    };
    render::print(format, table, &known)?;
    Ok(Exit::Done)
}

async fn ask(client: &Client, request: v1::ResolveRequest) -> Result<v1::ResolveResponse, Failure> {
    client.resolve(request).await.map_err(Failure::call)
}

fn refused(name: &OperationName, why: &str) -> Failure {
    let text = format!("{name} is as it was: {}", printable(why));
    let hint = format!("to see what can be decided call: vfioctl operations resolve {}", name.id());
    Failure::new(Exit::Refused, text).because("UNRESOLVABLE").about(name).hint(&hint)
}

/// What both sides know, and what can be done about it.
#[derive(Debug, Serialize)]
struct Known {
    /// What was decided, if anything was.
    decided: Option<&'static str>,
    /// What the destination said just now.
    destination: Option<RecordDoc>,
    /// Why it was not reached.
    destination_error: String,
    /// What the source has.
    source_devices: Vec<SourceDoc>,
    decisions: Vec<Decision>,
    operation: OperationDoc,
    /// The verdict that holds: what the destination says, or else what is known here.
    #[serde(skip)]
    verdict: v1::HandoverVerdict,
    #[serde(skip)]
    left: Left,
    #[serde(skip)]
    here: Here,
}

#[derive(Debug, Serialize)]
struct SourceDoc {
    device: String,
    state: &'static str,
    standing: &'static str,
    /// Whether it still carries the state that was to move.
    copy: &'static str,
    #[serde(skip)]
    in_words: &'static str,
}

/// What the source knows, for people.
#[derive(Debug)]
struct Here {
    name: String,
    phase: &'static str,
    devices: Vec<String>,
    peer: String,
    since: Option<String>,
    doubt: String,
}

#[derive(Debug, Serialize)]
struct RecordDoc {
    operation: String,
    step: &'static str,
    verdict: &'static str,
    message: String,
    epochs: Vec<u64>,
}

#[derive(Debug, Serialize)]
struct Decision {
    resolution: &'static str,
    /// What is to be typed for it.
    options: &'static str,
    /// Whether it can be taken, with a statement if need be.
    is_open: bool,
    /// Whether somebody has to answer for what there is no evidence of.
    needs_statement: bool,
    /// What it costs.
    cost: String,
    /// Why it is not taken as it was asked for.
    refused: String,
}

impl Known {
    fn new(answer: &v1::ResolveResponse) -> Result<Self, Failure> {
        let operation = answer.operation.as_ref().ok_or_else(|| missing("Resolve", "operation"))?;
        let handover = operation.handover.clone().unwrap_or_default();
        let told = answer.destination.as_ref().map(v1::HandoverRecord::verdict);
        let here = Here {
            name: operation.name.clone(),
            phase: render::phase(operation.phase()),
            devices: operation.devices.iter().map(|device| printable(&device.device)).collect(),
            peer: if handover.peer.is_empty() { "the destination".to_owned() } else { handover.peer.clone() },
            since: render::moment(handover.stop_time.as_ref()),
            doubt: handover.doubt.clone(),
        };
        Ok(Self {
            decided: None,
            destination: answer.destination.as_ref().map(|record| RecordDoc {
                operation: record.operation.clone(),
                step: render::short(record.step().as_str_name(), "HANDOVER_STEP_"),
                verdict: render::verdict_name(record.verdict()),
                message: record.message.clone(),
                epochs: record.epochs.clone(),
            }),
            destination_error: answer.destination_error.clone(),
            source_devices: answer.source_devices.iter().map(SourceDoc::new).collect(),
            left: Left::of(&answer.source_devices),
            decisions: Vec::new(),
            operation: OperationDoc::new(operation),
            // A verdict never changes, so an older one holds where the destination is silent now.
            verdict: told
                .filter(|told| *told != v1::HandoverVerdict::Unspecified)
                .unwrap_or_else(|| handover.verdict()),
            here,
        })
    }

    fn with(mut self, resolution: v1::Resolution, answer: &v1::ResolveResponse, is_stated: bool) -> Self {
        let refused = answer.refused.clone();
        // What the agent takes as it is needs no more, whatever is known here.
        let needs_statement = needs_statement(resolution, self.verdict) && (is_stated || !refused.is_empty());
        let is_closed =
            resolution == v1::Resolution::ResumeHere && self.verdict == v1::HandoverVerdict::Committed;
        self.decisions.push(Decision {
            resolution: resolution_name(resolution),
            options: match (resolution, needs_statement) {
                (v1::Resolution::LetGo, true) => "--let-go --accept-loss --statement TEXT",
                (v1::Resolution::LetGo, false) => "--let-go",
                (v1::Resolution::ResumeHere | v1::Resolution::Unspecified, true) => {
                    "--resume-here --peer-is-fenced --statement TEXT"
                }
                (v1::Resolution::ResumeHere | v1::Resolution::Unspecified, false) => "--resume-here",
            },
            is_open: !is_closed && (refused.is_empty() || needs_statement),
            needs_statement,
            cost: cost(resolution, self.verdict, self.left),
            refused,
        });
        self
    }

    fn text(&self) -> String {
        let Here { name, phase, devices, peer, since, doubt } = &self.here;
        let mut text = format!("{}, {phase}\n", printable(name));
        if let Some(time) = since {
            text.extend([format!("stopped      {time}\n")]);
        }
        let mut label = "here";
        for SourceDoc { device, state, in_words, .. } in &self.source_devices {
            text.extend([format!("{label:12} {device}, {state}: {in_words}\n")]);
            label = "";
        }
        if self.source_devices.is_empty() {
            let devices = render::or_dash(Some(devices.join(", ")));
            text.extend([format!("{label:12} {devices}: {}\n", cost::in_words(v1::SourceCopy::Unspecified))]);
        }
        text.extend([format!("destination  {}", printable(peer))]);
        match &self.destination {
            Some(record) => {
                let message = if record.message.is_empty() {
                    String::new()
                } else {
                    format!("\n             {}", printable(&record.message))
                };
                text.extend([format!(", {}: {}{message}\n", printable(&record.operation), record.step)]);
            }
            None if self.destination_error.is_empty() => text += " was not asked\n",
            None => {
                text.extend([format!(" was not reached: {}\n", printable(&self.destination_error))]);
            }
        }
        if !doubt.is_empty() {
            text.extend([format!("last word    {}\n", printable(doubt))]);
        }
        let verdict = self.verdict;
        let told = match verdict {
            v1::HandoverVerdict::Unspecified => "verdict      none is known\n".to_owned(),
            v1::HandoverVerdict::Committed
            | v1::HandoverVerdict::Refused
            | v1::HandoverVerdict::Lost
            | v1::HandoverVerdict::Broken => {
                format!(
                    "verdict      {}: {}\n",
                    render::verdict_name(verdict),
                    render::verdict_in_words(verdict)
                )
            }
        };
        text.push_str(&told);
        for decision in &self.decisions {
            let shown = if decision.is_open {
                format!("\n{}\n  {}\n", decision.options, decision.cost)
            } else {
                let why = if decision.refused.is_empty() {
                    decision.cost.clone()
                } else {
                    printable(&decision.refused)
                };
                format!("\n{} cannot be decided\n  {why}\n", decision.options)
            };
            text.push_str(&shown);
        }
        text
    }
}

impl SourceDoc {
    fn new(found: &v1::SourceDevice) -> Self {
        let state = match found.state() {
            v1::MigrationState::Unspecified => "not readable",
            state @ (v1::MigrationState::Error
            | v1::MigrationState::Stop
            | v1::MigrationState::Running
            | v1::MigrationState::StopCopy
            | v1::MigrationState::Resuming
            | v1::MigrationState::RunningP2p
            | v1::MigrationState::PreCopy
            | v1::MigrationState::PreCopyP2p) => render::short(state.as_str_name(), "MIGRATION_STATE_"),
        };
        Self {
            device: printable(&found.device),
            state,
            standing: render::short(found.standing().as_str_name(), "DEVICE_STANDING_"),
            copy: render::short(found.copy().as_str_name(), "SOURCE_COPY_"),
            in_words: cost::in_words(found.copy()),
        }
    }
}

fn resolution_name(resolution: v1::Resolution) -> &'static str {
    render::short(resolution.as_str_name(), "RESOLUTION_")
}

/// Whether what is known leaves something open that somebody has to answer for.
fn needs_statement(resolution: v1::Resolution, verdict: v1::HandoverVerdict) -> bool {
    match (resolution, verdict) {
        (v1::Resolution::LetGo, v1::HandoverVerdict::Committed)
        | (
            v1::Resolution::ResumeHere | v1::Resolution::Unspecified,
            v1::HandoverVerdict::Committed | v1::HandoverVerdict::Refused | v1::HandoverVerdict::Lost,
        ) => false,
        (
            v1::Resolution::LetGo,
            v1::HandoverVerdict::Unspecified
            | v1::HandoverVerdict::Refused
            | v1::HandoverVerdict::Lost
            | v1::HandoverVerdict::Broken,
        )
        | (
            v1::Resolution::ResumeHere | v1::Resolution::Unspecified,
            v1::HandoverVerdict::Unspecified | v1::HandoverVerdict::Broken,
        ) => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(
        destination: Option<(v1::HandoverStep, v1::HandoverVerdict)>,
        refused: &str,
    ) -> v1::ResolveResponse {
        let kept = (v1::MigrationState::Stop, v1::SourceCopy::Kept);
        v1::ResolveResponse {
            source_devices: vec![found("devices/a", kept), found("devices/b", kept)],
            ..told(destination, refused)
        }
    }

    fn found(device: &str, (state, copy): (v1::MigrationState, v1::SourceCopy)) -> v1::SourceDevice {
        v1::SourceDevice {
            device: device.to_owned(),
            state: state.into(),
            standing: v1::DeviceStanding::Ready.into(),
            copy: copy.into(),
        }
    }

    /// Of an agent that does not say what its devices have.
    fn told(
        destination: Option<(v1::HandoverStep, v1::HandoverVerdict)>,
        refused: &str,
    ) -> v1::ResolveResponse {
        let operation = v1::Operation {
            name: "operations/1".to_owned(),
            phase: v1::OperationPhase::Committing.into(),
            devices: ["devices/a", "devices/b"]
                .map(|device| v1::OperationDevice { device: device.to_owned(), ..Default::default() })
                .to_vec(),
            handover: Some(v1::Handover {
                peer: "https://node2:7443".to_owned(),
                peer_operation: "operations/7".to_owned(),
                stop_time: Some(prost_types::Timestamp { seconds: 1_800_000_000, nanos: 0 }),
                in_doubt: true,
                doubt: "10.0.0.2:7443 refuses the connection".to_owned(),
                ..Default::default()
            }),
            ..Default::default()
        };
        let destination_error =
            if destination.is_some() { String::new() } else { "no answer within 5 s\u{1b}[2J".to_owned() };
        v1::ResolveResponse {
            operation: Some(operation),
            destination: destination.map(|(step, verdict)| v1::HandoverRecord {
                operation: "operations/7".to_owned(),
                step: step.into(),
                verdict: verdict.into(),
                message: "devices/x did not leave RESUMING".to_owned(),
                epochs: vec![4, 4],
            }),
            destination_error,
            refused: refused.to_owned(),
            source_devices: Vec::new(),
        }
    }

    fn both(here: &v1::ResolveResponse, gone: &v1::ResolveResponse) -> Known {
        Known::new(here).unwrap().with(v1::Resolution::ResumeHere, here, false).with(
            v1::Resolution::LetGo,
            gone,
            false,
        )
    }

    #[test]
    fn both_sides_and_what_each_decision_costs() {
        use v1::HandoverStep::{Committing, Over};
        use v1::HandoverVerdict::{Broken, Committed, Lost, Refused, Unspecified};
        let mut text = Vec::new();
        for (destination, here, gone) in [
            (None, "the destination may run the devices", "what is here may be the last copy"),
            (
                Some((Committing, Unspecified)),
                "the destination may run the devices",
                "what is here may be the last copy",
            ),
            (Some((Over, Committed)), "the destination has said that it runs the devices", ""),
            (Some((Over, Refused)), "", "what is here may be the last copy"),
            (Some((Over, Lost)), "", "what is here may be the last copy"),
            (
                Some((Over, Broken)),
                "the destination may run the devices",
                "what is here may be the last copy",
            ),
        ] {
            let known = both(&answer(destination, here), &answer(destination, gone));
            assert!(known.text().chars().all(|letter| letter == '\n' || !letter.is_control()));
            text.push(known.text());
        }
        insta::assert_snapshot!(text.join("\n-----\n"));
    }

    /// What is decided by is what the devices here have, and not what they had once.
    #[test]
    fn what_is_not_left_here_is_not_offered() {
        use v1::HandoverVerdict::{Broken, Committed, Lost, Refused, Unspecified};
        use v1::{MigrationState as State, SourceCopy as Copy};
        let mut text = Vec::new();
        for devices in [
            vec![
                found("devices/a", (State::Running, Copy::Gone)),
                found("devices/b", (State::Stop, Copy::Kept)),
            ],
            vec![
                found("devices/a", (State::Running, Copy::MovedOn)),
                found("devices/b", (State::Unspecified, Copy::Unknown)),
            ],
            Vec::new(),
        ] {
            for verdict in [Unspecified, Committed, Refused, Lost, Broken] {
                let step = v1::HandoverStep::Over;
                let answer = v1::ResolveResponse {
                    source_devices: devices.clone(),
                    ..told(Some((step, verdict)), "")
                };
                text.push(both(&answer, &answer).text());
            }
        }
        insta::assert_snapshot!(text.join("\n-----\n"));
    }

    #[test]
    fn for_programs_it_is_one_document() {
        let silent = answer(None, "the destination may run the devices");
        insta::assert_snapshot!(render::json(&both(&silent, &silent)).unwrap());
    }
}
