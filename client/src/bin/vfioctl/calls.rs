//! Commands that are one call, or a few: devices and operations.
//!
//! Lists ask for page after page until there is no more; an agent that hands out pages without end is refused.

use vfio_checkpoint_client::call::{CallError, Client};
use vfio_checkpoint_proto::ids::OperationName;
use vfio_checkpoint_proto::v1;

use crate::args::{Devices, Operations, OutputFormat};
use crate::outcome::{Exit, Failure, judge};
use crate::render::{self, DeviceDoc, OperationDoc};
use crate::wait;

/// No node has as many devices, and no agent keeps as many operations.
const MAX_PAGES: usize = 100;
const PAGE_SIZE: i32 = 1000;

pub(crate) async fn devices(
    client: &Client,
    command: Devices,
    format: OutputFormat,
) -> Result<Exit, Failure> {
    match command {
        Devices::List => {
            let mut all = Vec::new();
            let mut page_token = String::new();
            for _ in 0..MAX_PAGES {
                let request = v1::ListDevicesRequest { page_size: PAGE_SIZE, page_token };
                let page = client.list_devices(request).await.map_err(Failure::call)?;
                all.extend(page.devices.iter().map(DeviceDoc::new));
                page_token = page.next_page_token;
                if page_token.is_empty() {
                    render::print(format, || render::devices(&all), &all)?;
                    return Ok(Exit::Done);
                }
            }
            Err(endless())
        }
        Devices::Get { name } => {
            let request = v1::GetDeviceRequest { name: name.to_string() };
            let answer = client.get_device(request).await.map_err(Failure::call)?;
            let device = DeviceDoc::new(&answer.device.ok_or_else(|| missing("GetDevice", "device"))?);
            render::print(format, || render::devices(std::slice::from_ref(&device)), &device)?;
            Ok(Exit::Done)
        }
    }
}

pub(crate) async fn operations(
    client: &Client,
    command: Operations,
    format: OutputFormat,
) -> Result<Exit, Failure> {
    match command {
        Operations::List { active } => list(client, active, format).await,
        Operations::Get { name } => {
            let request = v1::GetOperationRequest { name: name.to_string() };
            let answer = client.get_operation(request).await.map_err(Failure::call)?;
            show(format, answer.operation, "GetOperation")
        }
        Operations::Watch { name } => {
            let mut interrupts = wait::Interrupts::listen()?;
            let done = tokio::select! {
                done = wait::done(client, &name) => done?,
                // Only looking ends: the operation is somebody's and goes on.
                () = interrupts.next() => return Err(Failure::new(Exit::Interrupted, format!("{name} goes on"))),
            };
            let doc = OperationDoc::new(&done);
            render::print(format, || render::operations(std::slice::from_ref(&doc)), &doc)?;
            match judge(&done) {
                (exit, None) => Ok(exit),
                (exit, Some(text)) => Err(Failure::new(exit, text)),
            }
        }
        Operations::Cancel { name } => cancel(client, &name, format).await,
        Operations::Cutover { name } => {
            let request = v1::CutoverRequest { operation: name.to_string() };
            let answer = client.cutover(request).await.map_err(Failure::call)?;
            show(format, answer.operation, "Cutover")
        }
        Operations::Resume { name } => {
            let request = v1::ResumeRequest { operation: name.to_string() };
            let answer = client.resume(request).await.map_err(Failure::call)?;
            show(format, answer.operation, "Resume")
        }
    }
}

async fn list(client: &Client, active_only: bool, format: OutputFormat) -> Result<Exit, Failure> {
    let mut all = Vec::new();
    let mut page_token = String::new();
    for _ in 0..MAX_PAGES {
        let request = v1::ListOperationsRequest {
            page_size: PAGE_SIZE,
            page_token,
            active_only,
            device: String::new(),
        };
        let page = client.list_operations(request).await.map_err(Failure::call)?;
        all.extend(page.operations.iter().map(OperationDoc::new));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            render::print(format, || render::operations(&all), &all)?;
            return Ok(Exit::Done);
        }
    }
    Err(endless())
}

async fn cancel(client: &Client, name: &OperationName, format: OutputFormat) -> Result<Exit, Failure> {
    let request = v1::CancelOperationRequest { name: name.to_string() };
    client.cancel_operation(request).await.map_err(Failure::call)?;
    let done = wait::done(client, name).await?;
    let doc = OperationDoc::new(&done);
    render::print(format, || render::operations(std::slice::from_ref(&doc)), &doc)?;
    match (done.result(), judge(&done)) {
        // It was undone, as was asked for.
        (v1::OperationResult::Cancelled, (Exit::Failed, _)) => Ok(Exit::Done),
        (v1::OperationResult::Succeeded, _) => {
            let text = format!("{name} had succeeded before it could be cancelled");
            Err(Failure::new(Exit::Failed, text))
        }
        (
            v1::OperationResult::Cancelled | v1::OperationResult::Failed | v1::OperationResult::Unspecified,
            (exit, text),
        ) => Err(Failure::new(exit, text.unwrap_or_default())),
    }
}

fn show(format: OutputFormat, operation: Option<v1::Operation>, rpc: &'static str) -> Result<Exit, Failure> {
    let doc = OperationDoc::new(&operation.ok_or_else(|| missing(rpc, "operation"))?);
    render::print(format, || render::operations(std::slice::from_ref(&doc)), &doc)?;
    Ok(Exit::Done)
}

pub(crate) fn missing(rpc: &'static str, field: &str) -> Failure {
    Failure::call(CallError::BadAnswer { rpc, problem: format!("it has no {field}") })
}

fn endless() -> Failure {
    Failure::new(Exit::Failed, "the agent hands out pages without end; see that agent and client go together")
}
