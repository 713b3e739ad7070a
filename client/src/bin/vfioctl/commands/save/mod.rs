//! `vfioctl save`: state out of devices, into a folder or into a store of the agent.
//!
//! ```text
//!   --output DIR   StartSave -> stream -> folder        see [`folder`]
//!   --store NAME   StartSave -> wait -> what it added   see [`store`]
//! ```
//!
//! Failure paths: a refusal lists everything that is in the way, before anything is touched.

mod folder;
mod store;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde::Serialize;
use vfio_checkpoint_client::call::Client;
use vfio_checkpoint_proto::ids::{DeviceName, PodName, StoreName};
use vfio_checkpoint_proto::v1;

use super::{blocked, blocker_docs, request_id};
use crate::cli::{OutputFormat, Waiting};
use crate::outcome::{Exit, Failure};
use crate::render::{self, BlockerDoc};
use crate::values::{device, duration, store as store_name};

pub(super) use folder::fate;

/// Save the state of devices.
#[derive(Debug, Args)]
pub(crate) struct SaveArgs {
    /// The devices, which share a stop point
    #[arg(required = true, value_name = "DEVICE", value_parser = device)]
    devices: Vec<DeviceName>,
    #[command(flatten)]
    target: Target,
    /// Replace the checkpoint that is in the folder
    #[arg(long, conflicts_with = "store")]
    replace: bool,
    /// Read state while the devices run
    #[arg(long, value_name = "WHEN", default_value = "auto")]
    pre_copy: PreCopy,
    /// Who says when to stop the devices
    #[arg(long, value_name = "WHO", default_value = "auto")]
    cutover: Cutover,
    /// What becomes of the devices once their state is saved
    #[arg(long, value_name = "WHAT", default_value = "resume")]
    after: After,
    /// The devices should stand still no longer than this
    #[arg(long, value_name = "TIME", value_parser = duration)]
    downtime_limit: Option<Duration>,
    /// How the workload's memory is captured along with its devices
    #[arg(long, value_name = "HOW", default_value = "none")]
    memory: Memory,
    /// The pod that uses the devices, NAMESPACE/NAME; it is kept with the checkpoint
    #[arg(long, value_name = "POD")]
    owner_pod: Option<PodName>,
    /// Say what is in the way and what is expected, and do nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    waiting: Waiting,
}

/// Where the state goes.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Target {
    /// Into this folder, which must be new or empty
    #[arg(long, value_name = "DIR", conflicts_with_all = ["no_wait", "wait_timeout"])]
    output: Option<PathBuf>,
    /// Into this store of the agent, which keeps only what is new since the last ones
    #[arg(long, value_name = "STORE", value_parser = store_name)]
    store: Option<StoreName>,
}

/// Whether to read state while devices run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum PreCopy {
    /// Where every device can
    Auto,
    /// Never
    Never,
    /// Always; a device that cannot is refused
    Required,
}

/// Who says when to stop devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Cutover {
    /// The agent
    Auto,
    /// The caller, by `vfioctl operations cutover`
    Manual,
}

/// What becomes of saved devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum After {
    /// They run on at once
    Resume,
    /// They stay stopped until `vfioctl operations resume`, or until the hold runs out
    Hold,
    /// They stay stopped
    StayStopped,
}

/// How memory is captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Memory {
    /// Not at all: device state alone is wanted
    None,
    /// While the workload and its devices stand still
    WhileStopped,
    /// While it runs, with dirty tracking, and the rest while it stands still
    DirtyTracking,
}

impl PreCopy {
    pub(super) fn wire(self) -> v1::PreCopyMode {
        match self {
            Self::Auto => v1::PreCopyMode::Unspecified,
            Self::Never => v1::PreCopyMode::Never,
            Self::Required => v1::PreCopyMode::Required,
        }
    }
}

impl Cutover {
    pub(super) fn wire(self) -> v1::CutoverMode {
        match self {
            Self::Auto => v1::CutoverMode::Auto,
            Self::Manual => v1::CutoverMode::Manual,
        }
    }
}

impl Memory {
    pub(super) fn wire(self) -> v1::MemoryCapture {
        match self {
            Self::None => v1::MemoryCapture::None,
            Self::WhileStopped => v1::MemoryCapture::WhileStopped,
            Self::DirtyTracking => v1::MemoryCapture::DirtyTracking,
        }
    }
}

pub(crate) async fn run(client: &Client, args: SaveArgs, format: OutputFormat) -> Result<Exit, Failure> {
    let request = request(&args)?;
    if args.dry_run {
        return dry_run(client, request, format).await;
    }
    match &args.target.output {
        Some(output) => folder::save(client, request, output, args.replace, format).await,
        None => store::save(client, request, &args.waiting, format).await,
    }
}

fn request(args: &SaveArgs) -> Result<v1::StartSaveRequest, Failure> {
    let after = match args.after {
        After::Resume => v1::AfterSave::Resume,
        After::Hold => v1::AfterSave::Hold,
        After::StayStopped => v1::AfterSave::StayStopped,
    };
    Ok(v1::StartSaveRequest {
        devices: args.devices.iter().map(ToString::to_string).collect(),
        pre_copy: args.pre_copy.wire().into(),
        cutover: args.cutover.wire().into(),
        after: after.into(),
        downtime_limit: args.downtime_limit.and_then(|limit| prost_types::Duration::try_from(limit).ok()),
        memory_capture: args.memory.wire().into(),
        request_id: request_id()?,
        owner_pod: args.owner_pod.clone().map(String::from).unwrap_or_default(),
        store: args.target.store.clone().map(String::from).unwrap_or_default(),
        ..v1::StartSaveRequest::default()
    })
}

#[derive(Debug, Serialize)]
struct DryRun {
    blockers: Vec<BlockerDoc>,
    pre_copy: Option<bool>,
    total_bytes: Option<u64>,
    predicted_downtime_us: Option<u64>,
    rate_bytes_per_second: Option<u64>,
    rate_source: Option<String>,
}

async fn dry_run(
    client: &Client,
    request: v1::StartSaveRequest,
    format: OutputFormat,
) -> Result<Exit, Failure> {
    let answer = client
        .start_save(v1::StartSaveRequest { validate_only: true, ..request })
        .await
        .map_err(Failure::call)?;
    let prediction = answer.prediction.as_ref();
    let downtime = prediction.and_then(|known| render::span(known.downtime.as_ref()));
    let doc = DryRun {
        blockers: blocker_docs(&answer.blockers),
        pre_copy: prediction.map(|known| known.pre_copy),
        total_bytes: prediction
            .and_then(|known| known.total.as_ref())
            .filter(|total| match total.kind() {
                v1::DataSizeKind::Known | v1::DataSizeKind::UpperBound => true,
                v1::DataSizeKind::Unknown | v1::DataSizeKind::Unspecified => false,
            })
            .map(|total| total.bytes),
        predicted_downtime_us: downtime.and_then(|downtime| u64::try_from(downtime.as_micros()).ok()),
        rate_bytes_per_second: prediction.map(|known| known.rate_bytes_per_second),
        rate_source: prediction.map(|known| known.rate_source.clone()),
    };
    let table = |_| {
        let unknown = || "not known before".to_owned();
        let size = doc.total_bytes.map_or_else(unknown, render::bytes);
        let downtime =
            downtime.map_or_else(unknown, |downtime| format!("{} expected", render::time(downtime)));
        format!("{}state     {size}\ndowntime  {downtime}\n", blocked(&doc.blockers))
    };
    render::print(format, table, &doc)?;
    Ok(if doc.blockers.is_empty() { Exit::Done } else { Exit::Refused })
}
