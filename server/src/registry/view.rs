//! A device as others see it.

use vfio_checkpoint_device::{Backend, DataSize, DeviceCapabilities, Fingerprint};
use vfio_checkpoint_fsm::State;
use vfio_checkpoint_proto::ids::{DeviceName, OperationName};

use crate::environment::UnixMillis;
use crate::journal::DeviceRecord;

/// What was known of a device at one moment.
#[derive(Debug, Clone, PartialEq)]
pub struct DeviceView {
    /// Which one.
    pub name: DeviceName,
    /// Where it is.
    pub address: String,
    /// What serves it, by its address.
    pub backend: Backend,
    /// The driver behind it; empty until it was opened.
    pub driver: String,
    /// The state that was read back last, and when.
    pub state: Option<(State, UnixMillis)>,
    /// Whether it takes work.
    pub standing: Standing,
    /// What it can do. None until it was opened.
    pub capabilities: Option<DeviceCapabilities>,
    /// How much state a stop-copy would bring.
    pub data_size: DataSize,
    /// What must match on another device.
    pub fingerprint: Fingerprint,
    /// What lives in it. None until it was opened for the first time.
    pub record: Option<DeviceRecord>,
    /// The operation that has it.
    pub lease: Option<OperationName>,
    /// The pod that uses it.
    pub owner_pod: String,
    /// Changes with every change.
    pub revision: u64,
}

impl DeviceView {
    /// Whether what lives in the device, and whether it takes work, is as `earlier` says.
    pub fn is_still(&self, earlier: &Self) -> bool {
        let state = |view: &Self| view.state.map(|(state, _)| state);
        self.record == earlier.record && self.standing == earlier.standing && state(self) == state(earlier)
    }

    /// Whether it says what `other` says, whenever that was read back.
    pub(super) fn is_as(&self, other: &Self) -> bool {
        let state = self.state.map(|(state, _)| state);
        let then = other.state.map(|(state, _)| state);
        state == then && Self { state: None, ..self.clone() } == Self { state: None, ..other.clone() }
    }
}

/// Whether a device takes work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// It does.
    Ready,
    /// Somebody must decide.
    Quarantined,
    /// A call on it did not return.
    Hung(String),
    /// It could not be opened.
    Unavailable(String),
    /// It is there and has no migration.
    NotMigratable(String),
}

impl Standing {
    /// One sentence for people; empty where there is nothing to say.
    pub fn detail(&self) -> String {
        match self {
            Self::Ready => String::new(),
            Self::Quarantined => {
                "it could not be brought back to RUNNING by itself; look at it, then ResetDevice".to_owned()
            }
            Self::Hung(why) | Self::Unavailable(why) | Self::NotMigratable(why) => why.clone(),
        }
    }
}
