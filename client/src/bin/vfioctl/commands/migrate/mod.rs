//! `vfioctl migrate`: devices from one node to another.
//!
//! ```text
//!   source                                         destination
//!   GetAgent, GetDevice ..: key, logical devices
//!                                                  Admit: a ticket for that key and these devices, and its own key
//!   Migrate{ticket, key} -> wait until done -> summary  (the two agents talk to each other)
//!   Migrate{validate_only} -> what is in the way   with --dry-run, see [`dry_run`]
//! ```
//!
//! Invariants: nothing is asked of the destination before the source has said what would come, and nothing of the source is
//! touched before the destination has said yes. A request id that was used before leads to the migration that it began, not
//! to another. Failure paths: a refusal says which side it is from; Ctrl-C cancels the migration, and one that is past that
//! point goes on; one in doubt is told loudly, and is waited for as long as its agent asks by itself.

mod destination;
mod dry_run;
mod summary;

use std::time::Duration;

use clap::{Args, ValueEnum};
use tonic::Code;
use vfio_checkpoint_client::call::{CallError, Client};
use vfio_checkpoint_proto::domain::key_hash;
use vfio_checkpoint_proto::ids::{DeviceName, PodName, RequestId};
use vfio_checkpoint_proto::v1;

use super::save::{Cutover, Memory, PreCopy};
use super::{PAGE_SIZE, all_pages, missing, operations, request_id, started};
use crate::cli::{Global, Waiting};
use crate::connection::Settings;
use crate::outcome::{Exit, Failure, judge};
use crate::render;
use crate::values::{bytes, device, duration, request};
use crate::wait;
use destination::{Destination, DestinationArgs};
use summary::Summary;

/// Move devices to another node.
#[derive(Debug, Args)]
pub(crate) struct MigrateArgs {
    /// The devices, which share a stop point; all of them move, or none
    #[arg(required = true, value_name = "DEVICE", value_parser = device)]
    devices: Vec<DeviceName>,
    #[command(flatten)]
    destination: DestinationArgs,
    /// Read state while the devices run
    #[arg(long, value_name = "WHEN", default_value = "auto")]
    pre_copy: PreCopy,
    /// Who says when to stop the devices
    #[arg(long, value_name = "WHO", default_value = "auto")]
    cutover: Cutover,
    /// How long to wait for a manual cutover, before the migration is undone
    #[arg(long, value_name = "TIME", value_parser = duration)]
    cutover_timeout: Option<Duration>,
    /// How long state is read at most while the devices run
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pre_copy_budget: Option<Duration>,
    /// The devices should stand still no longer than this
    #[arg(long, value_name = "TIME", value_parser = duration)]
    downtime_limit: Option<Duration>,
    /// What to do where the limit cannot be kept [default: abort where --downtime-limit is given, else stop]
    #[arg(long, value_name = "WHAT")]
    on_no_convergence: Option<OnNoConvergence>,
    /// Refuse where there is more state than this
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    max_bytes: Option<u64>,
    /// Take devices that do not say how much state they have, although there is a limit
    #[arg(long)]
    allow_unknown_size: bool,
    /// Who says when the destination may run the devices
    #[arg(long, value_name = "WHO", default_value = "auto")]
    commit: Commit,
    /// How long to wait for a manual commit, before the migration is undone
    #[arg(long, value_name = "TIME", value_parser = duration)]
    commit_timeout: Option<Duration>,
    /// Let the destination wait for `vfioctl operations ready`, said there, before it counts the devices as loaded
    #[arg(long)]
    require_ready: bool,
    /// How the workload's memory is moved along with its devices
    #[arg(long, value_name = "HOW", default_value = "none")]
    memory: Memory,
    /// The pod that uses the devices, NAMESPACE/NAME; both sides show it
    #[arg(long, value_name = "POD")]
    owner_pod: Option<PodName>,
    /// A UUID: the same one again leads to the same migration, and begins no other
    #[arg(long, value_name = "UUID", value_parser = request)]
    request_id: Option<RequestId>,
    /// Say what is in the way on both sides and what is expected, and do nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    waiting: Waiting,
}

/// What to do where the limit of the downtime cannot be kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum OnNoConvergence {
    /// Stop the devices all the same
    Stop,
    /// Undo the migration; the devices run on where they are
    Abort,
}

/// Who says when the destination may run the devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Commit {
    /// The agent, as soon as the destination has all
    Auto,
    /// The caller, by `vfioctl operations commit`; until then the devices stand still on both sides
    Manual,
}

pub(crate) async fn run(global: &Global, args: MigrateArgs) -> Result<Exit, Failure> {
    if args.commit_timeout.is_some() && args.commit == Commit::Auto {
        let failure = Failure::usage("--commit-timeout means nothing where the agent commits by itself");
        return Err(failure.hint("give --commit manual, too, or leave it out"));
    }
    if args.cutover_timeout.is_some() && args.cutover == Cutover::Auto {
        let failure =
            Failure::usage("--cutover-timeout means nothing where the agent stops the devices by itself");
        return Err(failure.hint("give --cutover manual, too, or leave it out"));
    }
    if args.pre_copy_budget.is_some() && args.pre_copy == PreCopy::Never {
        let failure =
            Failure::usage("--pre-copy-budget means nothing where no state is read while the devices run");
        return Err(failure.hint("leave out --pre-copy never, or the budget"));
    }
    let source = Settings::of(global)?;
    let destination = args.destination.find(&source)?;
    let target = destination.target(args.destination.takers(&args.devices)?);
    let request = migration(&args, target.clone())?;
    let client = source.connect(global).await?;
    if args.dry_run {
        return dry_run::run(&client, request, &destination, global).await;
    }
    let mut interrupts = wait::Interrupts::listen()?;
    // A ticket that nobody uses is void soon.
    let opened = tokio::select! {
        opened = open(&client, &request, &args, &destination, global) => opened?,
        () = interrupts.next() => return Err(Failure::new(Exit::Interrupted, "interrupted; nothing was touched")),
    };
    let operation = match opened {
        Opened::Admitted(v1::AdmitResponse { ticket, key_sha256, .. }) => {
            let target = Some(v1::MigrationTarget { key_sha256, ..target.clone() });
            let request = v1::MigrateRequest { target, ticket, ..request };
            let answer = client.migrate(request).await.map_err(Failure::call)?;
            answer.operation.ok_or_else(|| missing("Migrate", "operation"))?
        }
        Opened::Before(operation) => *operation,
    };
    let name = started("Migrate", Some(&operation))?;
    if !args.waiting.is_wanted() {
        operations::print_one(global.output_format, &operation)?;
        return Ok(Exit::Done);
    }
    render::say(&format!("migrating as {name} to {}", destination.endpoint));
    let teller = wait::Teller::new().ready_at(args.require_ready.then(|| args.destination.options(&target)));
    let done = wait::stay_with(&client, &name, &args.waiting, &mut interrupts, teller).await?;
    let (exit, problem) = judge(&done);
    if done.result() != v1::OperationResult::Succeeded {
        let text = problem.unwrap_or_else(|| format!("{name} has ended, and how is not said"));
        return Err(Failure::ended(if exit == Exit::Done { Exit::Failed } else { exit }, text, &done));
    }
    let summary = Summary::new(&done, &target, args.downtime_limit);
    render::print(global.output_format, |_| summary.table(), &summary)?;
    match problem {
        None => Ok(exit),
        Some(text) => Err(Failure::ended(exit, text, &done).printed()),
    }
}

fn migration(args: &MigrateArgs, target: v1::MigrationTarget) -> Result<v1::MigrateRequest, Failure> {
    let commit = match args.commit {
        Commit::Auto => v1::CommitMode::Auto,
        Commit::Manual => v1::CommitMode::Manual,
    };
    let no_convergence = match args.on_no_convergence {
        None => v1::NoConvergence::Unspecified,
        Some(OnNoConvergence::Stop) => v1::NoConvergence::StopAnyway,
        Some(OnNoConvergence::Abort) => v1::NoConvergence::Abort,
    };
    let request_id = match &args.request_id {
        Some(given) => given.to_string(),
        None => request_id()?,
    };
    let wire = |time: Option<Duration>| time.and_then(|time| prost_types::Duration::try_from(time).ok());
    Ok(v1::MigrateRequest {
        devices: args.devices.iter().map(ToString::to_string).collect(),
        target: Some(target),
        pre_copy: args.pre_copy.wire().into(),
        cutover: args.cutover.wire().into(),
        commit: commit.into(),
        commit_timeout: wire(args.commit_timeout),
        cutover_timeout: wire(args.cutover_timeout),
        pre_copy_budget: wire(args.pre_copy_budget),
        downtime_limit: wire(args.downtime_limit),
        max_bytes: args.max_bytes.unwrap_or_default(),
        allow_unknown_size: args.allow_unknown_size,
        no_convergence: no_convergence.into(),
        memory_capture: args.memory.wire().into(),
        request_id,
        owner_pod: args.owner_pod.clone().map(String::from).unwrap_or_default(),
        ..v1::MigrateRequest::default()
    })
}

/// What a migration begins with.
enum Opened {
    /// What lets the source in, and who it is that does.
    Admitted(v1::AdmitResponse),
    /// It has begun already.
    Before(Box<v1::Operation>),
}

/// Asks the source what would come, and the destination to let it in.
async fn open(
    client: &Client,
    request: &v1::MigrateRequest,
    args: &MigrateArgs,
    destination: &Destination,
    global: &Global,
) -> Result<Opened, Failure> {
    if args.request_id.is_some()
        && let Some(operation) = begun_before(client, request).await?
    {
        return Ok(Opened::Before(Box::new(operation)));
    }
    let source_key_sha256 = source_key(client).await?;
    let mut logical_devices = Vec::with_capacity(args.devices.len());
    for name in &args.devices {
        logical_devices.push(logical_device(client, name).await?);
    }
    let there = |failure: Failure| {
        let text = format!("nothing was touched; this is about the destination, {}:", destination.endpoint);
        let exit = failure.exit;
        failure.after(&Failure::new(exit, text))
    };
    let admit = v1::AdmitRequest {
        logical_devices,
        devices: request.target.as_ref().map(|target| target.devices.clone()).unwrap_or_default(),
        source_key_sha256,
        ttl: None,
        require_ready: args.require_ready,
        owner_pod: request.owner_pod.clone(),
    };
    let other = destination.settings.connect(global).await.map_err(there)?;
    let admitted = other.admit(admit).await.map_err(|error| there(Failure::call(error)))?;
    if admitted.key_sha256.is_empty() {
        let old = Failure::new(Exit::Refused, "its agent does not say its key with a ticket");
        return Err(there(old.hint("this agent is older than its source; run a newer one there")));
    }
    Ok(Opened::Admitted(admitted))
}

/// A ticket is for one use, so a migration that goes on cannot be asked for again with a new one: it is looked for.
async fn begun_before(
    client: &Client,
    request: &v1::MigrateRequest,
) -> Result<Option<v1::Operation>, Failure> {
    let all = all_pages(async |page_token| {
        let question = v1::ListOperationsRequest { page_size: PAGE_SIZE, page_token, ..Default::default() };
        let page = client.list_operations(question).await?;
        Ok((page.operations, page.next_page_token))
    });
    let Some(found) = all.await?.into_iter().find(|found| found.request_id == request.request_id) else {
        return Ok(None);
    };
    let devices = found.devices.iter().map(|device| &device.device);
    if found.kind() == v1::OperationKind::Migration && devices.eq(&request.devices) {
        return Ok(Some(found));
    }
    let text = format!("{} was started with this request id, and is something else", found.name);
    Err(Failure::new(Exit::Refused, text)
        .because("REQUEST_ID_REUSED")
        .about(&found.name)
        .hint("make up a new one"))
}

async fn source_key(client: &Client) -> Result<bytes::Bytes, Failure> {
    let agent = client.get_agent(v1::GetAgentRequest {}).await.map_err(|error| {
        // One from before there were migrations.
        let is_old = error.refusal().is_some_and(|refusal| refusal.code == Code::Unimplemented);
        let failure = Failure::call(error);
        if is_old { failure.hint("this agent knows no migrations; run a newer one") } else { failure }
    })?;
    key_hash("key_sha256", &agent.key_sha256).map_err(|invalid| {
        Failure::call(CallError::BadAnswer { rpc: "GetAgent", problem: invalid.to_string() })
    })?;
    Ok(agent.key_sha256)
}

/// What lives in a device of the source.
async fn logical_device(client: &Client, name: &DeviceName) -> Result<v1::LogicalDevice, Failure> {
    let request = v1::GetDeviceRequest { name: name.to_string() };
    let answer = client.get_device(request).await.map_err(Failure::call)?;
    let device = answer.device.ok_or_else(|| missing("GetDevice", "device"))?;
    device.logical_device.ok_or_else(|| {
        let text = format!("{name} was never opened, so nothing lives in it that could move");
        let hint = format!("see why: vfioctl devices get {}", name.id());
        Failure::new(Exit::Refused, text).because("DEVICE_UNAVAILABLE").hint(&hint)
    })
}
