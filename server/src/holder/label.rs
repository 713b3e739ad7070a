//! What is written on a held device.
//!
//! ```text
//!   Label { key, address, operation?, epoch, facts, boot_id }
//!            |                                 '- Keepsake::encode(): opaque to the holder
//!            '- the device's name; what a Put replaces, and a Take and a Drop name
//! ```
//!
//! # Invariants
//! - Every text is bounded and has no control characters, so that a label can be logged and always fits a packet.
//!
//! # Failure paths
//! [`InvalidLabel`] names the part that is wrong.

use std::fmt;

use serde::{Deserialize, Serialize};
use vfio_checkpoint_device::address::{DeviceAddress, Keepsake, KeepsakeError};

/// A part of a label that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} has {bytes} bytes; it must have 1 to {limit_bytes} and no control characters")]
pub struct InvalidLabel {
    /// Which part.
    pub what: &'static str,
    /// How long it is.
    pub bytes: usize,
    /// How long it may be.
    pub limit_bytes: usize,
}

macro_rules! texts {
    ($($(#[$doc:meta])* $name:ident, $what:literal, $limit:literal;)*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// Checks a text.
            pub fn new(text: impl Into<String>) -> Result<Self, InvalidLabel> {
                let text = text.into();
                if text.is_empty() || text.len() > $limit || text.chars().any(char::is_control) {
                    return Err(InvalidLabel { what: $what, bytes: text.len(), limit_bytes: $limit });
                }
                Ok(Self(text))
            }

            /// The text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidLabel;

            fn try_from(text: String) -> Result<Self, InvalidLabel> {
                Self::new(text)
            }
        }

        impl From<$name> for String {
            fn from(text: $name) -> Self {
                text.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    )*};
}

texts! {
    /// A device's name, by which it is held.
    DeviceKey, "the device's name", 256;
    /// The operation that a device belongs to.
    OperationId, "the operation's id", 256;
    /// Which run of the node's kernel: fds do not survive it.
    BootId, "the boot id", 64;
    /// What another process must know of the fds: opaque to the holder.
    Facts, "the facts", 16384;
}

impl BootId {
    /// That of the running kernel. Without `/proc` it is `unknown`, which is as good a name for the only boot there is
    /// to see.
    pub fn current() -> Self {
        let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        Self::new(text.trim()).unwrap_or_else(|_| Self("unknown".to_owned()))
    }
}

/// What is written on a held device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Label {
    /// The device's name.
    pub key: DeviceKey,
    /// Where it is.
    pub address: DeviceAddress,
    /// The operation that claims it, if one does.
    pub operation: Option<OperationId>,
    /// The epoch of the state that lives in it.
    pub epoch: u64,
    /// What its fds are.
    pub facts: Facts,
    /// The run of the kernel in which it was opened.
    pub boot_id: BootId,
}

/// A keepsake cannot be labelled.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LabelError {
    /// Its facts cannot be written down.
    #[error(transparent)]
    Keepsake(#[from] KeepsakeError),
    /// They are too long for a label.
    #[error(transparent)]
    Label(#[from] InvalidLabel),
}

impl Label {
    /// The label of a keepsake, of no operation and epoch 0.
    pub fn of(key: DeviceKey, keepsake: &Keepsake, boot_id: BootId) -> Result<Self, LabelError> {
        let facts = Facts::new(keepsake.encode()?)?;
        Ok(Self { key, address: keepsake.address.clone(), operation: None, epoch: 0, facts, boot_id })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_bounded_and_printable() {
        assert!(DeviceKey::new("x".repeat(256)).is_ok());
        for wrong in [String::new(), "x".repeat(257), "a\nb".to_owned(), "a\0".to_owned()] {
            let error = DeviceKey::new(wrong.clone()).unwrap_err();
            assert_eq!((error.what, error.bytes), ("the device's name", wrong.len()));
        }
        assert!(serde_json::from_str::<BootId>("\"\"").is_err());
        assert_eq!(serde_json::from_str::<BootId>("\"b\"").unwrap().as_str(), "b");
    }
}
