//! `vfioctl save --store`: state out of devices into a store of the agent.
//!
//! ```text
//!   StartSave{store} -> wait until done -> GetCheckpoint -> what it is called, and what it added
//! ```
//!
//! Failure paths: Ctrl-C cancels the save. A checkpoint that is there and cannot be read back is still told by its name.

use std::time::Duration;

use serde::Serialize;
use vfio_checkpoint_client::call::{Client, printable};
use vfio_checkpoint_proto::v1;

use crate::cli::{OutputFormat, Waiting};
use crate::commands::{operations, started};
use crate::outcome::{Exit, Failure, judge};
use crate::render::{self, AddedDoc, CheckpointDoc};
use crate::values::short_checkpoint;
use crate::wait;

pub(super) async fn save(
    client: &Client,
    request: v1::StartSaveRequest,
    waiting: &Waiting,
    format: OutputFormat,
) -> Result<Exit, Failure> {
    let mut interrupts = wait::Interrupts::listen()?;
    let answer = client.start_save(request).await.map_err(Failure::call)?;
    let name = started("StartSave", answer.operation.as_ref())?;
    if !waiting.is_wanted() {
        if let Some(operation) = &answer.operation {
            operations::print_one(format, operation)?;
        }
        return Ok(Exit::Done);
    }
    render::say(&format!("saving as {name}"));
    let done = wait::stay(client, &name, waiting, &mut interrupts).await?;
    let (exit, problem) = judge(&done);
    // The name is known from the beginning; whether there is a checkpoint of that name shows in the end.
    let is_there = done.result() == v1::OperationResult::Succeeded && !done.checkpoint.is_empty();
    if !is_there {
        let text = problem.unwrap_or_else(|| format!("{name} has ended without a checkpoint"));
        return Err(Failure::ended(if exit == Exit::Done { Exit::Failed } else { exit }, text, &done));
    }
    let checkpoint = read_back(client, &done.checkpoint).await;
    let summary = Summary::new(&done, checkpoint.as_ref());
    render::print(format, |_| summary.table(), &summary)?;
    match problem {
        None => Ok(exit),
        Some(text) => Err(Failure::ended(exit, text, &done).printed()),
    }
}

/// The checkpoint as the store has it. It is there whatever becomes of this call.
async fn read_back(client: &Client, name: &str) -> Option<CheckpointDoc> {
    match client.get_checkpoint(v1::GetCheckpointRequest { name: name.to_owned() }).await {
        Ok(answer) => answer.checkpoint.as_ref().map(CheckpointDoc::new),
        Err(error) => {
            render::say(&format!("the checkpoint is there, and what it added is not known: {error}"));
            None
        }
    }
}

#[derive(Debug, Serialize)]
struct Summary {
    operation: String,
    checkpoint: String,
    result: &'static str,
    consistency: &'static str,
    moved_bytes: u64,
    added: Option<AddedDoc>,
    predicted_downtime_us: Option<u64>,
    downtime_us: Option<u64>,
    devices: Vec<String>,
}

impl Summary {
    fn new(done: &v1::Operation, checkpoint: Option<&CheckpointDoc>) -> Self {
        Self {
            operation: done.name.clone(),
            checkpoint: done.checkpoint.clone(),
            result: render::short(done.result().as_str_name(), "OPERATION_RESULT_"),
            consistency: render::short(done.consistency().as_str_name(), "CHECKPOINT_CONSISTENCY_"),
            moved_bytes: done.moved_bytes,
            added: checkpoint.and_then(|checkpoint| checkpoint.added),
            predicted_downtime_us: render::micros(done.predicted_downtime.as_ref()),
            downtime_us: render::micros(done.downtime.as_ref()),
            devices: done.devices.iter().map(|device| device.device.clone()).collect(),
        }
    }

    fn table(&self) -> String {
        let time = |us: Option<u64>| render::or_dash(us.map(|us| render::time(Duration::from_micros(us))));
        let consistency = match self.consistency {
            "CONSISTENT" => "consistent",
            other => other,
        };
        let devices: Vec<String> = self.devices.iter().map(|device| printable(device)).collect();
        format!(
            "checkpoint  {}\nsaved       {}, {consistency}\nadded       {}\n\
             downtime    {} ({} predicted)\ndevices     {}\n",
            printable(&short_checkpoint(&self.checkpoint)),
            render::bytes(self.moved_bytes),
            self.added.map_or_else(|| "-".to_owned(), |added| added.text()),
            time(self.downtime_us),
            time(self.predicted_downtime_us),
            devices.join(", "),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_for_people_and_for_programs() {
        let summary = Summary {
            operation: "operations/019aa7b4c10-5c0ffee15c0ffee1".to_owned(),
            checkpoint: "stores/local/checkpoints/019aa7b4c10-5c0ffee15c0ffee1".to_owned(),
            result: "SUCCEEDED",
            consistency: "CONSISTENT",
            moved_bytes: 100 << 20,
            added: Some(AddedDoc { chunks: 7, plain_bytes: 3 << 20, stored_bytes: 1 << 20 }),
            predicted_downtime_us: Some(11_000),
            downtime_us: Some(12_300),
            devices: vec!["devices/nic-a".to_owned(), "devices/nic-b".to_owned()],
        };
        let json = render::json(&summary).unwrap();
        insta::assert_snapshot!(format!("{}{json}", summary.table()));
    }
}
