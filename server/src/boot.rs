//! How an agent begins: journal, holder, devices, operations that were under way; in this order.
//!
//! ```text
//!   Journal::load --> slots, entries
//!   holder --> adopt what was kept, open (and so reset) the rest
//!   unfinished operations --> taken up
//!   devices that no operation claims --> back to RUNNING with their state, unless left stopped on request
//! ```
//! Nothing is served before all of it is done: whoever calls an agent finds every device in a state that has a name. Only
//! a kept device whose process does not answer is not waited for; the operations that claim it wait for it, unfinished.
//!
//! # Failure paths
//! A journal or a holder that cannot be used ends the agent before a device is touched. A device that cannot be opened
//! does not: it is UNAVAILABLE, and tried again.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures_util::future::join_all;
use tokio::sync::watch;
use vfio_checkpoint_device::address::{AddressError, DeviceAddress};
use vfio_checkpoint_device::chain;
use vfio_checkpoint_proto::ids::{DeviceName, IdError};

use crate::config::AgentConfig;
use crate::core::Core;
use crate::environment::Environment;
use crate::failpoint::reached;
use crate::journal::{DeviceRecord, Journal, JournalError, Recorded};
use crate::migration::say_farewells;
use crate::operation::record::OperationRecord;
use crate::operation::{Entry, Operations, Unfinished};
use crate::registry::keeper::{Keeper, KeeperError};
use crate::registry::opening::{Arrival, Opener, bring_back_unclaimed, retry_unavailable};
use crate::registry::{Registry, Slot};
use crate::security::reload::TlsSource;
use crate::stores::{Stores, StoresError, debts};

/// Why an agent cannot begin. No device was touched.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BootError {
    /// The journal.
    #[error("the agent cannot begin")]
    Journal(#[from] JournalError),
    /// The holder.
    #[error(
        "the agent cannot begin without its holder, which may be keeping devices that opening would reset"
    )]
    Keeper(#[from] KeeperError),
    /// A store.
    #[error(transparent)]
    Stores(#[from] StoresError),
    /// A device's name.
    #[error("the device name `{name}` in the configuration")]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it.
        #[source]
        source: IdError,
    },
    /// A device's address.
    #[error("the address `{address}` in the configuration")]
    Address {
        /// The address.
        address: String,
        /// What is wrong with it.
        #[source]
        source: AddressError,
    },
}

/// Brings an agent up to where it can be served. What it does in the background ends with its tasks.
pub async fn boot(
    config: Arc<AgentConfig>,
    environment: Environment,
    tls: Option<TlsSource>,
) -> Result<Arc<Core>, BootError> {
    let stores = Stores::new(&config, &environment)?;
    let (journal, recorded) = read_journal(&config, &environment).await?;
    reached(format_args!("boot: journal read"));
    let keeper = if let Some(socket) = &config.holder.socket {
        Some(Keeper::connect(&environment, socket.clone()).await?)
    } else {
        tracing::warn!("no holder.socket is configured: every device is reset when this agent ends");
        None
    };
    if let Some(keeper) = &keeper {
        for name in keeper.held().await? {
            if !config.devices.iter().any(|device| device.name == name) {
                tracing::error!(
                    device = %name,
                    "the holder keeps it, and it is not configured: it stays as it is, and nobody else can open it, until \
                     it is configured by this name again or the holder ends, which resets it"
                );
            }
        }
    }
    reached(format_args!("boot: holder found"));
    stores.take_over(&recorded);
    let revision = Arc::new(watch::Sender::new(0));
    let mut slots = Vec::with_capacity(config.devices.len());
    for device in &config.devices {
        let name = DeviceName::from_id(&device.name)
            .map_err(|source| BootError::Name { name: device.name.clone(), source })?;
        let address: DeviceAddress = device
            .address
            .parse()
            .map_err(|source| BootError::Address { address: device.address.clone(), source })?;
        let (pod, environment) = (device.owner_pod.clone(), environment.clone());
        slots.push(Slot::new(name, address, pod, environment, Arc::clone(&revision)).by(device.path));
    }

    let (entries, unfinished) = entries(recorded.operations);
    let operations = Operations::new(entries, recorded.requests);
    let registry = Registry::new(slots, revision);
    let core = Arc::new(Core::new(
        config,
        environment,
        journal.clone(),
        registry,
        operations,
        keeper.clone(),
        stores,
        tls,
    ));
    let opener = Opener {
        environment: core.environment.clone(),
        journal,
        keeper: keeper.clone(),
        call_limit: core.config.limits.device_call_timeout,
    };

    let before: BTreeMap<DeviceName, DeviceRecord> = recorded.devices.into_iter().collect();
    for slot in core.registry.all() {
        // Also of a device that does not come in: what is known of it stays known.
        if let Some(record) = before.get(slot.name()) {
            slot.set_record(record.clone());
        }
    }
    let arriving = core.registry.all().map(|slot| {
        let (opener, before) = (&opener, before.get(slot.name()).cloned());
        let tasks = &core.tasks;
        async move { (slot.name().clone(), opener.begin(slot, before, tasks).await) }
    });
    let arriving: BTreeMap<DeviceName, Arrival> = join_all(arriving).await.into_iter().collect();
    reached(format_args!("boot: devices in"));

    join_all(unfinished.into_iter().map(|unfinished| {
        let (core, arriving) = (&core, &arriving);
        async move { core.take_up(unfinished, arriving).await }
    }))
    .await;
    reached(format_args!("boot: operations taken up"));
    join_all(core.registry.all().map(|slot| bring_back_unclaimed(&core, slot))).await;
    reached(format_args!("boot: done"));

    core.tasks.spawn(retry_unavailable(Arc::clone(&core), opener, before, arriving));
    core.tasks.spawn(forget_finished(Arc::clone(&core)));
    core.tasks.spawn(say_farewells(Arc::clone(&core)));
    core.tasks.spawn(try_journal(Arc::clone(&core)));
    core.tasks.spawn(look_after_stores(Arc::clone(&core)));
    if let Some(keeper) = keeper {
        core.tasks.spawn(keeper.look_after(core.environment.clone()));
    }
    Ok(core)
}

/// All operations of the journal, and those of them that are not over.
fn entries(records: Vec<OperationRecord>) -> (Vec<Arc<Entry>>, Vec<Unfinished>) {
    let mut unfinished = Vec::new();
    let mut entries = Vec::with_capacity(records.len());
    for record in records {
        let step = record.step.clone();
        let entry = Arc::new(Entry::recorded(record));
        entries.push(Arc::clone(&entry));
        if !step.is_ended() {
            unfinished.push(Unfinished { entry, step });
        }
    }
    (entries, unfinished)
}

/// Opens the journal, and reads what is in it.
async fn read_journal(
    config: &AgentConfig,
    environment: &Environment,
) -> Result<(Journal, Recorded), JournalError> {
    let folder = config.node.state_dir.clone();
    let (executor, disk) = (Arc::clone(&environment.executor), Arc::clone(&environment.disk));
    let opened = environment.blocking("journal-open", move || {
        let journal = Journal::open(&folder, &executor, disk)?;
        let recorded = journal.load()?;
        Ok((journal, recorded))
    });
    opened.await.map_err(JournalError::Lane)?
}

/// Pays what is owed to stores, and collects in them.
async fn look_after_stores(core: Arc<Core>) {
    tokio::join!(debts::pay(&core), core.stores.collect());
}

/// While the journal cannot be written, tries it: who stays away from an agent that is not serving brings it no commit by
/// which it would find out that it can be written again.
async fn try_journal(core: Arc<Core>) {
    const EVERY: std::time::Duration = std::time::Duration::from_secs(3);
    let mut failing = core.journal.failing();
    while failing.wait_for(|failing| *failing).await.is_ok() {
        core.environment.sleep(EVERY).await;
        // The journal itself tells how that went.
        let _ = core.journal.commit(Vec::new()).await;
    }
}

/// Forgets what ended long ago, for as long as the agent lives.
async fn forget_finished(core: Arc<Core>) {
    const EVERY: std::time::Duration = std::time::Duration::from_mins(10);
    loop {
        let limits = &core.config.limits;
        let now = core.environment.unix_now();
        let changes = core.operations.forget(now, limits.keep_finished, limits.keep_finished_count);
        if !changes.is_empty()
            && let Err(error) = core.journal.commit(changes).await
        {
            tracing::error!(error = %chain(&error), "finished operations cannot be forgotten in the journal");
        }
        core.environment.sleep(EVERY).await;
    }
}
