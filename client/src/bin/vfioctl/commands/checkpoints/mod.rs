//! `vfioctl checkpoints`: list, get, verify and delete what is in a store of the agent; inspect what is on this machine.
//!
//! Failure paths: a verification says what is wrong with each device, and ends with the exit code 1; a stream that ends
//! before it has said what it found has found nothing.

mod inspect;

use clap::{Args, Subcommand};
use serde::Serialize;
use vfio_checkpoint_client::call::{CallError, Client, printable};
use vfio_checkpoint_proto::ids::{CheckpointName, StoreName};
use vfio_checkpoint_proto::v1;

use super::{PAGE_SIZE, all_pages, confirm, missing};
use crate::cli::{Global, OutputFormat};
use crate::connection::connect;
use crate::outcome::{Exit, Failure};
use crate::progress::Meter;
use crate::render::{self, CheckpointDoc, Detail};
use crate::values::{checkpoint, short_checkpoint, store};
use crate::wait::Interrupts;

/// Show, verify and delete checkpoints.
#[derive(Debug, Subcommand)]
pub(crate) enum CheckpointsCommand {
    /// List the checkpoints of a store, the newest first
    List {
        /// The store; the agent's first one if it is not said
        #[arg(long, value_name = "STORE", value_parser = store)]
        store: Option<StoreName>,
        /// How many to ask the agent for at a time; all are listed
        #[arg(
            long,
            value_name = "COUNT",
            default_value_t = PAGE_SIZE,
            value_parser = clap::value_parser!(i32).range(1..=i64::from(PAGE_SIZE))
        )]
        page_size: i32,
    },
    /// Show one checkpoint
    Get {
        /// Its name, STORE/ID
        #[arg(value_name = "CHECKPOINT", value_parser = checkpoint)]
        name: CheckpointName,
    },
    /// Let the agent read all of a checkpoint and compare every digest
    Verify {
        /// Its name, STORE/ID
        #[arg(value_name = "CHECKPOINT", value_parser = checkpoint)]
        name: CheckpointName,
    },
    /// Delete a checkpoint; its space is free after the store's next collection
    Delete(DeleteArgs),
    /// Verify a checkpoint on this machine, without an agent
    Inspect(inspect::InspectArgs),
}

/// Delete a checkpoint.
#[derive(Debug, Args)]
pub(crate) struct DeleteArgs {
    /// Its name, STORE/ID
    #[arg(value_name = "CHECKPOINT", value_parser = checkpoint)]
    name: CheckpointName,
    /// Do not ask
    #[arg(long, short)]
    yes: bool,
    /// Show what would be deleted, and do nothing
    #[arg(long)]
    dry_run: bool,
}

pub(crate) async fn run(global: &Global, command: CheckpointsCommand) -> Result<Exit, Failure> {
    let format = global.output_format;
    match command {
        CheckpointsCommand::List { store, page_size } => {
            list(&connect(global).await?, store, page_size, format).await
        }
        CheckpointsCommand::Get { name } => {
            let doc = get(&connect(global).await?, &name).await?;
            render::print(format, |detail| one(detail, &doc), &doc)?;
            Ok(Exit::Done)
        }
        CheckpointsCommand::Verify { name } => {
            let client = connect(global).await?;
            let mut interrupts = Interrupts::listen()?;
            let verified = tokio::select! {
                verified = verify(&client, &name) => verified?,
                () = interrupts.next() => {
                    return Err(Failure::new(Exit::Interrupted, "the verification was ended"));
                }
            };
            render::print(format, |_| verified.table(), &verified)?;
            Ok(if verified.is_sound { Exit::Done } else { Exit::Failed })
        }
        CheckpointsCommand::Delete(args) => delete(&connect(global).await?, args, format).await,
        CheckpointsCommand::Inspect(args) => inspect::run(args, format).await,
    }
}

async fn list(
    client: &Client,
    store: Option<StoreName>,
    page_size: i32,
    format: OutputFormat,
) -> Result<Exit, Failure> {
    let parent = store.map(String::from).unwrap_or_default();
    let all = all_pages(async |page_token| {
        let request = v1::ListCheckpointsRequest { parent: parent.clone(), page_size, page_token };
        let page = client.list_checkpoints(request).await?;
        Ok((page.checkpoints, page.next_page_token))
    });
    let all: Vec<CheckpointDoc> = all.await?.iter().map(CheckpointDoc::new).collect();
    render::print(format, |detail| render::checkpoints(detail, &all), &all)?;
    Ok(Exit::Done)
}

async fn get(client: &Client, name: &CheckpointName) -> Result<CheckpointDoc, Failure> {
    let request = v1::GetCheckpointRequest { name: name.to_string() };
    let answer = client.get_checkpoint(request).await.map_err(Failure::call)?;
    Ok(CheckpointDoc::new(&answer.checkpoint.ok_or_else(|| missing("GetCheckpoint", "checkpoint"))?))
}

/// One checkpoint, and below it the states that are in it.
fn one(detail: Detail, doc: &CheckpointDoc) -> String {
    let mut text = render::checkpoints(detail, std::slice::from_ref(doc));
    if !doc.devices.is_empty() {
        text = format!("{text}\n{}", render::device_states(detail, &doc.devices));
    }
    text
}

/// What a verification found.
#[derive(Debug, Serialize)]
struct Verified {
    name: String,
    is_sound: bool,
    read_bytes: u64,
    total_bytes: u64,
    problems: Vec<String>,
}

impl Verified {
    fn table(&self) -> String {
        let name = printable(&short_checkpoint(&self.name));
        let bytes = render::bytes(self.read_bytes);
        if self.is_sound {
            return format!("{name} is sound: {bytes} were read, and are what was sealed\n");
        }
        let head = format!("{name} is NOT sound; {bytes} were read:\n");
        self.problems.iter().fold(head, |text, problem| text + "  " + &printable(problem) + "\n")
    }
}

async fn verify(client: &Client, name: &CheckpointName) -> Result<Verified, Failure> {
    let request = v1::VerifyCheckpointRequest { name: name.to_string() };
    let mut stream = client.verify_checkpoint(request).await.map_err(Failure::call)?;
    let meter = Meter::new(None);
    meter.phase("VERIFYING");
    while let Some(step) = stream.next().await.map_err(Failure::call)? {
        meter.expect(step.total_bytes);
        meter.reach(step.verified_bytes);
        if step.done {
            return Ok(Verified {
                name: name.to_string(),
                is_sound: step.problems.is_empty(),
                read_bytes: step.verified_bytes,
                total_bytes: step.total_bytes,
                problems: step.problems,
            });
        }
    }
    let problem = "it ended before it said what it had found".to_owned();
    Err(Failure::call(CallError::BadAnswer { rpc: "VerifyCheckpoint", problem }))
}

#[derive(Debug, Serialize)]
struct Deleted {
    name: String,
    /// Whether it was only asked what would be deleted.
    dry_run: bool,
}

async fn delete(client: &Client, args: DeleteArgs, format: OutputFormat) -> Result<Exit, Failure> {
    let name = args.name.to_string();
    let doc = Deleted { name: name.clone(), dry_run: args.dry_run };
    if args.dry_run {
        let found = get(client, &args.name).await?;
        let table = |detail| format!("this would be deleted:\n{}", one(detail, &found));
        render::print(format, table, &doc)?;
        return Ok(Exit::Done);
    }
    if !args.yes {
        let found = get(client, &args.name).await?;
        let question = format!("{}\ndelete this checkpoint?", one(Detail::Usual, &found).trim_end());
        confirm(question, false).await?;
    }
    client.delete_checkpoint(v1::DeleteCheckpointRequest { name }).await.map_err(Failure::call)?;
    render::print(format, |_| format!("{} is deleted\n", printable(&short_checkpoint(&doc.name))), &doc)?;
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_verification_found_for_people() {
        let mut verified = Verified {
            name: "stores/local/checkpoints/019aa7b4c10-5c0ffee15c0ffee1".to_owned(),
            is_sound: true,
            read_bytes: 100 << 20,
            total_bytes: 100 << 20,
            problems: Vec::new(),
        };
        let sound = verified.table();
        verified.is_sound = false;
        verified.problems = vec!["state 0: chunks/3f/3fab is damaged: it is missing".to_owned()];
        insta::assert_snapshot!(format!("{sound}{}", verified.table()));
    }
}
