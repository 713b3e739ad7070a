//! `vfioctl devices`: list, get, watch, reset.
//!
//! A watch outlives the agent: where the stream breaks because the agent is away, it is opened again for a while. Resets
//! take a request id, so that a lost answer does not reset twice.

use std::time::Duration;

use clap::{Args, Subcommand};
use serde::Serialize;
use vfio_checkpoint_client::call::{CallError, Client, Watch, printable};
use vfio_checkpoint_proto::ids::DeviceName;
use vfio_checkpoint_proto::v1;

use super::{PAGE_SIZE, all_pages, confirm, missing, request_id};
use crate::cli::OutputFormat;
use crate::outcome::{Exit, Failure};
use crate::render::{self, DeviceDoc, Reader};
use crate::values::device;
use crate::wait::{Interrupts, MAX_AWAY, is_away};

/// How long is waited before a watch is opened again.
const AWAY_PAUSE: Duration = Duration::from_secs(2);

/// Show, watch and reset devices.
#[derive(Debug, Subcommand)]
pub(crate) enum DevicesCommand {
    /// List the agent's devices
    List,
    /// Show one device
    Get {
        /// Its name
        #[arg(value_name = "DEVICE", value_parser = device)]
        name: DeviceName,
    },
    /// Show devices as they are, then each change, until Ctrl-C; with -o json a document a line
    Watch {
        /// Only these
        #[arg(value_name = "DEVICE", value_parser = device)]
        names: Vec<DeviceName>,
    },
    /// Bring a device that stands elsewhere back to RUNNING; the only way out of quarantine
    Reset(ResetArgs),
}

/// Bring a device back.
#[derive(Debug, Args)]
pub(crate) struct ResetArgs {
    /// Its name
    #[arg(value_name = "DEVICE", value_parser = device)]
    name: DeviceName,
    #[command(flatten)]
    mode: Mode,
    /// Do not ask
    #[arg(long, short)]
    yes: bool,
    /// Ask the agent whether it would work, and do nothing
    #[arg(long)]
    dry_run: bool,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Mode {
    /// Keep the state that is in the device, and fail where that cannot be
    #[arg(long)]
    keep_state: bool,
    /// Reset it; the state that is in the device is lost
    #[arg(long)]
    discard_state: bool,
}

pub(crate) async fn run(
    client: &Client,
    command: DevicesCommand,
    format: OutputFormat,
) -> Result<Exit, Failure> {
    match command {
        DevicesCommand::List => {
            let all = all_pages(async |page_token| {
                let request = v1::ListDevicesRequest { page_size: PAGE_SIZE, page_token };
                let page = client.list_devices(request).await?;
                Ok((page.devices, page.next_page_token))
            });
            let all: Vec<DeviceDoc> = all.await?.iter().map(DeviceDoc::new).collect();
            render::print(format, |detail| render::devices(detail, &all), &all)?;
            Ok(Exit::Done)
        }
        DevicesCommand::Get { name } => {
            let device = get(client, &name).await?;
            render::print(format, |detail| render::devices(detail, std::slice::from_ref(&device)), &device)?;
            Ok(Exit::Done)
        }
        DevicesCommand::Watch { names } => {
            let mut interrupts = Interrupts::listen()?;
            tokio::select! {
                ended = watch(client, &names, format) => ended,
                () = interrupts.next() => Ok(Exit::Interrupted),
            }
        }
        DevicesCommand::Reset(args) => reset(client, args, format).await,
    }
}

async fn get(client: &Client, name: &DeviceName) -> Result<DeviceDoc, Failure> {
    let request = v1::GetDeviceRequest { name: name.to_string() };
    let answer = client.get_device(request).await.map_err(Failure::call)?;
    Ok(DeviceDoc::new(&answer.device.ok_or_else(|| missing("GetDevice", "device"))?))
}

async fn watch(client: &Client, names: &[DeviceName], format: OutputFormat) -> Result<Exit, Failure> {
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    let mut away = 0;
    loop {
        let request = v1::WatchDevicesRequest { names: names.clone() };
        let error = match client.watch_devices(request).await {
            Ok(stream) => match follow(stream, format, &mut away).await? {
                None => return Ok(Exit::Done),
                Some(error) => error,
            },
            Err(error) => error,
        };
        if !is_away(&error) || away == MAX_AWAY {
            return Err(Failure::call(error));
        }
        away += 1;
        render::say(&format!("{error}\nasking again"));
        tokio::time::sleep(AWAY_PAUSE).await;
    }
}

/// Prints what comes, until nobody reads it, the agent has no more to say, or the stream breaks.
async fn follow(
    mut stream: Watch<v1::WatchDevicesResponse>,
    format: OutputFormat,
    away: &mut u32,
) -> Result<Option<CallError>, Failure> {
    loop {
        match stream.next().await {
            Ok(Some(change)) => {
                *away = 0;
                let device = change.device.ok_or_else(|| missing("WatchDevices", "device"))?;
                let device = DeviceDoc::new(&device);
                if render::print_next(format, |_| render::device_change(&device), &device)? == Reader::Gone {
                    return Ok(None);
                }
            }
            Ok(None) => return Ok(None),
            Err(error) => return Ok(Some(error)),
        }
    }
}

#[derive(Debug, Serialize)]
struct Reset {
    /// Whether it was only asked for.
    dry_run: bool,
    state_lost: bool,
    device: DeviceDoc,
}

async fn reset(client: &Client, args: ResetArgs, format: OutputFormat) -> Result<Exit, Failure> {
    let mode = if args.mode.keep_state { v1::ResetMode::KeepState } else { v1::ResetMode::DiscardState };
    if !args.dry_run {
        let device = get(client, &args.name).await?;
        let question = match mode {
            v1::ResetMode::KeepState => "bring it back to RUNNING with the state that it carries?",
            v1::ResetMode::DiscardState | v1::ResetMode::Unspecified => {
                "reset it? Its state is lost for good."
            }
        };
        confirm(format!("{}: {question}", device.stands()), args.yes).await?;
    }
    let request = v1::ResetDeviceRequest {
        name: args.name.to_string(),
        mode: mode.into(),
        validate_only: args.dry_run,
        request_id: request_id()?,
    };
    let answer = client.reset_device(request).await.map_err(Failure::call)?;
    let device = DeviceDoc::new(&answer.device.ok_or_else(|| missing("ResetDevice", "device"))?);
    let doc = Reset { dry_run: args.dry_run, state_lost: answer.state_lost, device };
    let table = |detail| {
        let name = printable(args.name.as_str());
        let fate = match (args.dry_run, answer.state_lost) {
            (false, true) => "was reset; its state is lost",
            (false, false) => "was brought back; its state is kept",
            (true, true) => "would be reset, and its state lost",
            (true, false) => "would be brought back with its state",
        };
        format!("{name} {fate}\n{}", render::devices(detail, std::slice::from_ref(&doc.device)))
    };
    render::print(format, table, &doc)?;
    Ok(Exit::Done)
}
