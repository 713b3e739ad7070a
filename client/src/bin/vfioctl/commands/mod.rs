//! The commands, one file or folder each: what it takes, what it does, what it prints.

pub(crate) mod certs;
pub(crate) mod checkpoints;
pub(crate) mod context;
pub(crate) mod devices;
pub(crate) mod dirty_tracking;
pub(crate) mod doctor;
pub(crate) mod migrate;
pub(crate) mod operations;
pub(crate) mod restore;
pub(crate) mod save;
pub(crate) mod shell;

use std::io::{self, BufRead, IsTerminal, Write};

use serde::Serialize;
use vfio_checkpoint_client::call::{CallError, new_request_id};
use vfio_checkpoint_proto::ids::OperationName;
use vfio_checkpoint_proto::v1;

use crate::cli::OutputFormat;
use crate::outcome::{Exit, Failure};
use crate::render::{self, BlockerDoc};

/// No node has as many devices, and no agent keeps as many operations.
const MAX_PAGES: usize = 100;
/// The most of a page, as in the contract.
const PAGE_SIZE: i32 = 1000;

/// All pages. An agent that hands out pages without end is refused.
async fn all_pages<T>(
    mut page: impl AsyncFnMut(String) -> Result<(Vec<T>, String), CallError>,
) -> Result<Vec<T>, Failure> {
    let mut all = Vec::new();
    let mut token = String::new();
    for _ in 0..MAX_PAGES {
        let (more, next) = page(token).await.map_err(Failure::call)?;
        all.extend(more);
        if next.is_empty() {
            return Ok(all);
        }
        token = next;
    }
    let text = "the agent hands out pages without end; see that agent and client go together";
    Err(Failure::new(Exit::Failed, text))
}

/// An answer without what has to be in it.
pub(crate) fn missing(rpc: &'static str, field: &str) -> Failure {
    Failure::call(CallError::BadAnswer { rpc, problem: format!("it has no {field}") })
}

fn request_id() -> Result<String, Failure> {
    new_request_id()
        .ok_or_else(|| Failure::new(Exit::Failed, "this machine has no randomness for a request id"))
}

/// The name of an operation that was started.
fn started(rpc: &'static str, operation: Option<&v1::Operation>) -> Result<OperationName, Failure> {
    let operation = operation.ok_or_else(|| missing(rpc, "operation"))?;
    operation.name.parse().map_err(|_| missing(rpc, "operation with a name"))
}

fn blocker_docs(blockers: &[v1::Blocker]) -> Vec<BlockerDoc> {
    blockers.iter().map(BlockerDoc::new).collect()
}

fn blocked(blockers: &[BlockerDoc]) -> String {
    if blockers.is_empty() {
        return "nothing is in the way\n".to_owned();
    }
    blockers.iter().fold("this is in the way:\n".to_owned(), |text, blocker| text + &blocker.line())
}

/// What a dry run found, where there is nothing to predict.
#[derive(Debug, Serialize)]
struct Blockers {
    blockers: Vec<BlockerDoc>,
}

impl Blockers {
    fn print(self, format: OutputFormat) -> Result<Exit, Failure> {
        render::print(format, |_| blocked(&self.blockers), &self)?;
        Ok(if self.blockers.is_empty() { Exit::Done } else { Exit::Refused })
    }
}

/// Asks the person at the terminal. Where there is none, `--yes` has to say it.
async fn confirm(question: String, is_said: bool) -> Result<(), Failure> {
    if is_said {
        return Ok(());
    }
    if !io::stdin().is_terminal() {
        let text = format!("nobody can be asked here\n{question}");
        return Err(Failure::usage(text).hint("give --yes if that is wanted"));
    }
    let asked = tokio::task::spawn_blocking(move || {
        write!(io::stderr(), "{question} [y/N] ")?;
        let mut answer = String::new();
        io::stdin().lock().read_line(&mut answer)?;
        Ok::<_, io::Error>(matches!(answer.trim(), "y" | "Y" | "yes" | "Yes"))
    });
    match asked.await {
        Ok(Ok(true)) => Ok(()),
        Ok(Ok(false)) => Err(Failure::new(Exit::Refused, "nothing was done")),
        Ok(Err(error)) => Err(Failure::new(Exit::Failed, format!("the answer cannot be read: {error}"))),
        Err(error) => Err(Failure::new(Exit::Failed, format!("nobody could be asked: {error}"))),
    }
}
