//! `vfioctl checkpoints inspect`: verifies what is on this machine, without an agent.
//!
//! ```text
//!   PATH with manifest.json                      a folder of `save --output`: every file against its seal
//!   PATH with the marker of a store              all of its checkpoints, or one
//!   PATH = STORE/checkpoints/ID                  that one
//! ```
//!
//! Invariants: nothing is written, and no folder is made into a store by looking at it. Nothing that is read is trusted:
//! the readers bound lengths, follow no links and compare every digest. Failure paths: what is wrong with a checkpoint is
//! told and ends with the exit code 1; a path that holds none is a mistake of the command line.

use std::error::Error as _;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use clap::Args;
use serde::{Deserialize as _, Serialize};
use vfio_checkpoint_client::call::printable;
use vfio_checkpoint_client::document::{About, Consistency};
use vfio_checkpoint_client::folder::{FolderError, FolderReader, MANIFEST_FILE};
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_store::key::{CHECKPOINTS, MARKER};
use vfio_checkpoint_store::{Ambient, CheckpointId, Limits, Location, Manifest, Store, StoreError};

use crate::cli::OutputFormat;
use crate::outcome::{Exit, Failure};
use crate::progress::Meter;
use crate::render::{self, Detail, DeviceStateDoc};

/// How many checkpoints of a store are read at once.
const PAGE: usize = 100;

/// The kind of a folder of `save --output`.
const FOLDER: &str = "FOLDER";

/// Verify a checkpoint on this machine.
#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// A folder of `save --output`, a store's folder, or STORE/checkpoints/ID in it
    path: PathBuf,
    /// Only this checkpoint of the store
    #[arg(long, value_name = "ID")]
    checkpoint: Option<CheckpointId>,
}

/// What was found at a path.
#[derive(Debug, Serialize)]
struct Inspection {
    path: String,
    kind: &'static str,
    is_sound: bool,
    checkpoints: Vec<Inspected>,
}

/// One checkpoint, verified.
#[derive(Debug, Serialize)]
struct Inspected {
    /// Its id in the store, or its operation.
    name: String,
    is_sound: bool,
    problems: Vec<String>,
    consistency: &'static str,
    node: Option<String>,
    caller: Option<String>,
    devices: Vec<DeviceStateDoc>,
}

/// What lies at a path.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    Folder,
    Store { root: PathBuf, id: Option<CheckpointId> },
}

pub(super) async fn run(args: InspectArgs, format: OutputFormat) -> Result<Exit, Failure> {
    let (kind, checkpoints) = match found(&args.path)? {
        Found::Folder if args.checkpoint.is_some() => {
            let text = format!("{} is no store; leave --checkpoint out", args.path.display());
            return Err(Failure::usage(text));
        }
        Found::Folder => (FOLDER, vec![inspect_folder(&args.path).await?]),
        Found::Store { root, id } => ("STORE", inspect_store(&root, args.checkpoint.or(id)).await?),
    };
    let is_sound = checkpoints.iter().all(|checkpoint| checkpoint.is_sound);
    let doc = Inspection { path: args.path.display().to_string(), kind, is_sound, checkpoints };
    render::print(format, |detail| doc.table(detail), &doc)?;
    Ok(if doc.is_sound { Exit::Done } else { Exit::Failed })
}

fn found(path: &Path) -> Result<Found, Failure> {
    let wrong = |problem: String| Failure::usage(format!("{} {problem}", path.display()));
    let absolute = match std::fs::canonicalize(path) {
        Ok(absolute) => absolute,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let hint = "give a folder of `save --output`, or the folder of a store";
            return Err(wrong("is not there".to_owned()).hint(hint));
        }
        Err(error) => return Err(wrong(format!("cannot be looked at: {error}"))),
    };
    if is_there(&absolute.join(MANIFEST_FILE)) {
        return Ok(Found::Folder);
    }
    if is_there(&absolute.join(MARKER)) {
        return Ok(Found::Store { root: absolute, id: None });
    }
    let above = absolute.parent().filter(|parent| parent.ends_with(CHECKPOINTS)).and_then(Path::parent);
    if let Some(root) = above.filter(|root| is_there(&root.join(MARKER))) {
        let name = absolute.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let id = name.parse().map_err(|error| wrong(format!("is no checkpoint: {error}")))?;
        return Ok(Found::Store { root: root.to_owned(), id: Some(id) });
    }
    Err(wrong(format!("holds no checkpoint: it has no {MANIFEST_FILE}, and is not in the folder of a store")))
}

fn is_there(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_file())
}

async fn inspect_folder(path: &Path) -> Result<Inspected, Failure> {
    let meter = Meter::new(None);
    meter.phase("VERIFYING");
    let opened = FolderReader::open(path).await;
    let reader = match opened {
        Ok(reader) => reader,
        Err(error @ FolderError::Io { .. }) => return Err(Failure::new(Exit::Failed, error)),
        // Whatever else it is, the folder is not as it was written.
        Err(error) => return Ok(Inspected::unreadable(path.display().to_string(), error.to_string())),
    };
    let wire = reader.wire_manifest();
    let seals: Vec<v1::Seal> = reader.seals().map(Into::into).collect();
    let problems = match reader.verify().await {
        Ok(()) => Vec::new(),
        Err(error) => vec![error.to_string()],
    };
    let consistency = match reader.manifest().consistency {
        Consistency::Consistent => "CONSISTENT",
        Consistency::Inconsistent => "INCONSISTENT",
    };
    Ok(Inspected {
        name: wire.operation.clone(),
        is_sound: problems.is_empty(),
        problems,
        consistency,
        node: None,
        caller: None,
        devices: states(wire, &seals),
    })
}

async fn inspect_store(root: &Path, id: Option<CheckpointId>) -> Result<Vec<Inspected>, Failure> {
    let failed = |error: StoreError| Failure::new(Exit::Failed, chain(&error));
    let location = Location::Folder(root.to_owned());
    let store = Store::open(&location, Limits::default(), Arc::new(Here)).await.map_err(failed)?;
    if let Some(id) = id {
        let inspected = match inspect_one(&store, id).await {
            Err(error @ StoreError::NotFound { .. }) => return Err(Failure::usage(error)),
            other => other.map_err(failed)?,
        };
        return Ok(vec![inspected]);
    }
    let mut all = Vec::new();
    let mut before = None;
    loop {
        let page = store.list(before, PAGE).await.map_err(failed)?;
        for listed in page.checkpoints {
            match inspect_one(&store, listed.id).await {
                Ok(inspected) => all.push(inspected),
                // Deleted since it was listed.
                Err(StoreError::NotFound { .. }) => {}
                Err(error) => return Err(failed(error)),
            }
        }
        before = page.next;
        if before.is_none() {
            return Ok(all);
        }
    }
}

async fn inspect_one(store: &Store, id: CheckpointId) -> Result<Inspected, StoreError> {
    let checkpoint = match store.get(id).await {
        Ok(checkpoint) => checkpoint,
        Err(error @ (StoreError::Damaged { .. } | StoreError::NotRegular { .. })) => {
            return Ok(Inspected::unreadable(id.to_string(), chain(&error)));
        }
        Err(other) => return Err(other),
    };
    let meter = Meter::new(Some(checkpoint.manifest.plain_bytes()));
    meter.phase("VERIFYING");
    let verified = store.verify(id, |bytes| meter.reach(bytes)).await?;
    let mut problems = verified.problems;
    let (about, devices) = match read_about(&checkpoint.manifest) {
        Ok((about, devices)) => (Some(about), devices),
        Err(problem) => {
            problems.push(problem);
            (None, Vec::new())
        }
    };
    Ok(Inspected {
        name: id.to_string(),
        is_sound: problems.is_empty(),
        problems,
        consistency: if checkpoint.is_inconsistent { "INCONSISTENT" } else { "CONSISTENT" },
        node: about.as_ref().map(|about| about.node.clone()),
        caller: about.map(|about| about.caller),
        devices,
    })
}

/// What the agent said of a checkpoint, as far as it can be believed.
fn read_about(manifest: &Manifest) -> Result<(About, Vec<DeviceStateDoc>), String> {
    let about = About::deserialize(&manifest.about).map_err(|error| format!("manifest, about: {error}"))?;
    let wire = about.manifest.to_wire().map_err(|(field, problem)| format!("{field}: {problem}"))?;
    if wire.devices.len() != manifest.states.len() {
        let (said, are) = (wire.devices.len(), manifest.states.len());
        return Err(format!("the manifest tells of {said} devices, and there are {are} states"));
    }
    let seals: Vec<v1::Seal> = manifest.states.iter().map(|state| state.seal.into()).collect();
    let devices = states(&wire, &seals);
    Ok((about, devices))
}

fn states(wire: &v1::CheckpointManifest, seals: &[v1::Seal]) -> Vec<DeviceStateDoc> {
    wire.devices
        .iter()
        .enumerate()
        .map(|(index, device)| DeviceStateDoc::new(device, seals.get(index)))
        .collect()
}

impl Inspected {
    fn unreadable(name: String, problem: String) -> Self {
        Self {
            name,
            is_sound: false,
            problems: vec![problem],
            consistency: "UNSPECIFIED",
            node: None,
            caller: None,
            devices: Vec::new(),
        }
    }
}

impl Inspection {
    fn table(&self, detail: Detail) -> String {
        if self.checkpoints.is_empty() {
            return "the store has no checkpoints\n".to_owned();
        }
        let mut text = String::new();
        for checkpoint in &self.checkpoints {
            let verdict = match (checkpoint.is_sound, checkpoint.consistency) {
                (true, "INCONSISTENT") => "is sound, and marked INCONSISTENT",
                (true, _) => "is sound",
                (false, _) => "is NOT sound",
            };
            // A folder is called what it is called on the command line; its operation is nothing that is here.
            let name = if self.kind == FOLDER { &self.path } else { &checkpoint.name };
            text.extend([format!("{} {verdict}\n", printable(name))]);
            for problem in &checkpoint.problems {
                text.extend([format!("  {}\n", printable(problem))]);
            }
            for line in render::device_states(detail, &checkpoint.devices).lines() {
                if !checkpoint.devices.is_empty() {
                    text.extend([format!("  {line}\n")]);
                }
            }
        }
        text
    }
}

/// An error with everything below it.
fn chain(error: &StoreError) -> String {
    let mut text = error.to_string();
    let mut below = error.source();
    while let Some(cause) = below {
        text.extend([format!(": {cause}")]);
        below = cause.source();
    }
    text
}

/// The clock and the randomness of this machine, which reading does not need.
#[derive(Debug)]
struct Here;

impl Ambient for Here {
    fn now(&self) -> SystemTime {
        SystemTime::now()
    }

    fn random(&self) -> u64 {
        RandomState::new().build_hasher().finish()
    }
}
