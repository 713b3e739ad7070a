//! A device on the wire.

use vfio_checkpoint_device::{Backend, DataSize};
use vfio_checkpoint_fsm::State;
use vfio_checkpoint_proto::v1;

use crate::operation::admission::{self, Blocker};
use crate::registry::{DeviceView, Standing};

/// A device as it is.
pub(in crate::rpc) fn device(view: &DeviceView) -> v1::Device {
    let blockers = admission::device_blockers(view).iter().map(blocker).collect();
    v1::Device {
        name: view.name.to_string(),
        address: view.address.clone(),
        backend: backend(view.backend).into(),
        driver: view.driver.clone(),
        state: view.state.map_or(v1::MigrationState::Unspecified, |(state, _)| migration_state(state)).into(),
        state_time: view.state.map(|(_, at)| at.timestamp()),
        standing: standing(&view.standing).into(),
        standing_detail: view.standing.detail(),
        capabilities: view.capabilities.map(|capabilities| v1::DeviceCapabilities {
            p2p: capabilities.migration.p2p,
            pre_copy: capabilities.migration.pre_copy,
            data_size: capabilities.data_size,
            dma_log: capabilities.dma_logging,
        }),
        data_size: Some(data_size(view.data_size)),
        fingerprint: Some(v1::Fingerprint {
            facts: view
                .fingerprint
                .facts()
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .collect(),
        }),
        logical_device: view
            .record
            .as_ref()
            .map(|record| v1::LogicalDevice { id: record.logical.to_string(), epoch: record.epoch.0 }),
        operation: view.lease.as_ref().map(ToString::to_string).unwrap_or_default(),
        owner_pod: view.owner_pod.clone(),
        dirty_source: dirty_source(view).into(),
        blockers,
        revision: view.revision,
    }
}

fn backend(backend: Backend) -> v1::Backend {
    match backend {
        Backend::Kernel => v1::Backend::Kernel,
        Backend::Sim => v1::Backend::Sim,
        Backend::VfioUser => v1::Backend::VfioUser,
    }
}

pub(super) fn migration_state(state: State) -> v1::MigrationState {
    match state {
        State::Error => v1::MigrationState::Error,
        State::Stop => v1::MigrationState::Stop,
        State::Running => v1::MigrationState::Running,
        State::StopCopy => v1::MigrationState::StopCopy,
        State::Resuming => v1::MigrationState::Resuming,
        State::RunningP2p => v1::MigrationState::RunningP2p,
        State::PreCopy => v1::MigrationState::PreCopy,
        State::PreCopyP2p => v1::MigrationState::PreCopyP2p,
    }
}

pub(super) fn standing(standing: &Standing) -> v1::DeviceStanding {
    match standing {
        Standing::Ready => v1::DeviceStanding::Ready,
        Standing::Quarantined => v1::DeviceStanding::Quarantined,
        Standing::Hung(_) => v1::DeviceStanding::Hung,
        Standing::Unavailable(_) | Standing::NotMigratable(_) => v1::DeviceStanding::Unavailable,
    }
}

/// Never the IOMMU: what it can track nobody turns on and reads, so saying it would admit a save that forbids `ALL_DIRTY`
/// and gets no dirty pages.
fn dirty_source(view: &DeviceView) -> v1::DirtySource {
    match view.capabilities {
        None => v1::DirtySource::Unspecified,
        Some(capabilities) if capabilities.dma_logging => v1::DirtySource::DeviceLog,
        Some(_) => v1::DirtySource::AllDirty,
    }
}

/// An amount of state.
pub(in crate::rpc) fn data_size(size: DataSize) -> v1::DataSize {
    let (kind, bytes) = match size {
        DataSize::Known(bytes) => (v1::DataSizeKind::Known, bytes),
        DataSize::UpperBound(bytes) => (v1::DataSizeKind::UpperBound, bytes),
        DataSize::Unknown => (v1::DataSizeKind::Unknown, 0),
    };
    v1::DataSize { kind: kind.into(), bytes }
}

/// One reason why a job cannot work.
pub(in crate::rpc) fn blocker(blocker: &Blocker) -> v1::Blocker {
    v1::Blocker {
        reason: blocker.reason.into(),
        device: blocker.device.as_ref().map(ToString::to_string).unwrap_or_default(),
        message: blocker.message.clone(),
    }
}
