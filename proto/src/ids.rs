//! Names and numbers that identify something: one type each, so that none can stand where another belongs.
//!
//! ```text
//!   "devices/nic0"  --parse-->  DeviceName      --Display, serde-->  "devices/nic0"
//! ```
//!
//! Invariants: a value was parsed, so it is bounded and holds none but the characters that its rule allows; it is safe
//! in a log line, a file name of one's own making and a metric. What comes as hexadecimal is kept in lowercase, so
//! that equal ids are equal values.
//!
//! Failure: [`IdError`] says what was expected, what was found (shortened) and where it went wrong.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

mod rules;

use rules::{Label, label, quoted, resource};

/// A text is not an id of the kind that was asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{found} is not {expected}: {problem}")]
pub struct IdError {
    expected: &'static str,
    found: String,
    problem: String,
}

impl IdError {
    fn new(expected: &'static str, found: &str, problem: impl Into<String>) -> Self {
        Self { expected, found: quoted(found), problem: problem.into() }
    }
}

/// A newtype over a validated text: `FromStr`, `Display`, and serde as that text.
macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The whole text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;

            fn try_from(text: String) -> Result<Self, IdError> {
                text.parse()
            }
        }

        impl TryFrom<&str> for $name {
            type Error = IdError;

            fn try_from(text: &str) -> Result<Self, IdError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.0
            }
        }
    };
}

text_id! {
    /// The resource name of a device, `devices/{device}`. `{device}` is 1 to 63 of a-z, 0-9, `-`, `.`, `_` and `:`,
    /// and begins and ends with a letter or digit: PCI addresses and UUIDs fit.
    DeviceName
}

impl DeviceName {
    const EXPECTED: &'static str = "a device name (`devices/{device}`)";
    const RULE: Label = Label { others: "-._:", max_bytes: 63 };

    /// The name of the device that the agent's configuration calls `id`.
    pub fn from_id(id: &str) -> Result<Self, IdError> {
        label(id, &Self::RULE).map_err(|problem| IdError::new(Self::EXPECTED, id, problem))?;
        Ok(Self(format!("devices/{id}")))
    }

    /// What the agent's configuration calls it: the part after `devices/`.
    pub fn id(&self) -> &str {
        self.0.strip_prefix("devices/").unwrap_or(&self.0)
    }
}

impl FromStr for DeviceName {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        resource(text, "devices/", &Self::RULE)
            .map_err(|problem| IdError::new(Self::EXPECTED, text, problem))?;
        Ok(Self(text.to_owned()))
    }
}

text_id! {
    /// The resource name of an operation, `operations/{operation}`. `{operation}` is 1 to 63 of a-z, 0-9 and `-`, and
    /// begins and ends with a letter or digit.
    OperationName
}

impl OperationName {
    const EXPECTED: &'static str = "an operation name (`operations/{operation}`)";
    const RULE: Label = Label { others: "-", max_bytes: 63 };

    /// The name of the operation `id`.
    pub fn from_id(id: &str) -> Result<Self, IdError> {
        label(id, &Self::RULE).map_err(|problem| IdError::new(Self::EXPECTED, id, problem))?;
        Ok(Self(format!("operations/{id}")))
    }

    /// The part after `operations/`.
    pub fn id(&self) -> &str {
        self.0.strip_prefix("operations/").unwrap_or(&self.0)
    }
}

impl FromStr for OperationName {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        resource(text, "operations/", &Self::RULE)
            .map_err(|problem| IdError::new(Self::EXPECTED, text, problem))?;
        Ok(Self(text.to_owned()))
    }
}

text_id! {
    /// The resource name of a store of the agent, `stores/{store}`. `{store}` is 1 to 63 of a-z, 0-9 and `-`, and begins
    /// and ends with a letter or digit.
    StoreName
}

impl StoreName {
    const EXPECTED: &'static str = "a store name (`stores/{store}`)";
    const RULE: Label = Label { others: "-", max_bytes: 63 };

    /// The name of the store that the agent's configuration calls `id`.
    pub fn from_id(id: &str) -> Result<Self, IdError> {
        label(id, &Self::RULE).map_err(|problem| IdError::new(Self::EXPECTED, id, problem))?;
        Ok(Self(format!("stores/{id}")))
    }

    /// What the agent's configuration calls it: the part after `stores/`.
    pub fn id(&self) -> &str {
        self.0.strip_prefix("stores/").unwrap_or(&self.0)
    }
}

impl FromStr for StoreName {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        resource(text, "stores/", &Self::RULE)
            .map_err(|problem| IdError::new(Self::EXPECTED, text, problem))?;
        Ok(Self(text.to_owned()))
    }
}

text_id! {
    /// The resource name of a checkpoint in a store, `stores/{store}/checkpoints/{checkpoint}`. `{checkpoint}` is 1 to 63
    /// of a-z, 0-9 and `-`, and begins and ends with a letter or digit.
    CheckpointName
}

impl CheckpointName {
    const EXPECTED: &'static str = "a checkpoint name (`stores/{store}/checkpoints/{checkpoint}`)";
    const BETWEEN: &'static str = "/checkpoints/";

    /// The name of the checkpoint `id` of a store.
    pub fn new(store: &StoreName, id: &str) -> Result<Self, IdError> {
        format!("{store}{}{id}", Self::BETWEEN).parse()
    }

    /// The store that it is in.
    pub fn store(&self) -> StoreName {
        StoreName(self.0.split_once(Self::BETWEEN).map_or(&*self.0, |(store, _)| store).to_owned())
    }

    /// The part after `checkpoints/`.
    pub fn id(&self) -> &str {
        self.0.split_once(Self::BETWEEN).map_or("", |(_, id)| id)
    }
}

impl FromStr for CheckpointName {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let fail = |problem: String| IdError::new(Self::EXPECTED, text, problem);
        let Some((store, id)) = text.split_once(Self::BETWEEN) else {
            return Err(fail(format!("it has no `{}`", Self::BETWEEN)));
        };
        resource(store, "stores/", &StoreName::RULE).map_err(fail)?;
        label(id, &StoreName::RULE).map_err(|problem| fail(format!("after `checkpoints/`, {problem}")))?;
        Ok(Self(text.to_owned()))
    }
}

text_id! {
    /// What makes a call idempotent: a UUID that its caller made up, in lowercase.
    RequestId
}

impl FromStr for RequestId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        rules::uuid(text).map_err(|problem| {
            IdError::new("a request id (a UUID such as 1b4e28ba-2fa1-41d2-883f-0016d3cca427)", text, problem)
        })?;
        Ok(Self(text.to_ascii_lowercase()))
    }
}

text_id! {
    /// The state that lives in a device and moves: 32 hexadecimal digits, in lowercase.
    LogicalDeviceId
}

impl LogicalDeviceId {
    /// The id that these 16 bytes are, for example random ones.
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(format!("{:032x}", u128::from_be_bytes(bytes)))
    }
}

impl FromStr for LogicalDeviceId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        rules::hex(text, 32)
            .map_err(|problem| IdError::new("a logical device id (32 hexadecimal digits)", text, problem))?;
        Ok(Self(text.to_ascii_lowercase()))
    }
}

text_id! {
    /// A pod, `namespace/name`, by the rules of Kubernetes: the namespace is a DNS label, the name a DNS subdomain.
    PodName
}

impl PodName {
    /// The part before the slash.
    pub fn namespace(&self) -> &str {
        self.0.split_once('/').map_or("", |(namespace, _)| namespace)
    }

    /// The part after it.
    pub fn name(&self) -> &str {
        self.0.split_once('/').map_or("", |(_, name)| name)
    }
}

impl FromStr for PodName {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        rules::pod(text).map_err(|problem| IdError::new("a pod (`namespace/name`)", text, problem))?;
        Ok(Self(text.to_owned()))
    }
}

/// Which holder of a logical device's state is the rightful one. It rises with each take-over; a lower one never
/// writes, streams or runs again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Names one stream of device state, and no other. 16 hexadecimal digits as text, because JSON readers round numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct StreamId(pub u64);

impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl FromStr for StreamId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let fail = |problem: String| IdError::new("a stream id (16 hexadecimal digits)", text, problem);
        rules::hex(text, 16).map_err(fail)?;
        u64::from_str_radix(text, 16).map(Self).map_err(|error| fail(error.to_string()))
    }
}

impl TryFrom<String> for StreamId {
    type Error = IdError;

    fn try_from(text: String) -> Result<Self, IdError> {
        text.parse()
    }
}

impl From<StreamId> for String {
    fn from(id: StreamId) -> Self {
        id.to_string()
    }
}

/// SHA-256 of a public key: it names one agent, as an identity that several share does not.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct KeyHash(pub [u8; 32]);

impl fmt::Display for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyHash({self})")
    }
}

impl FromStr for KeyHash {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let wrong = |problem: &str| IdError::new("the SHA-256 of a key", text, problem);
        let digit = |letter: u8| char::from(letter).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
        let mut bytes = [0; 32];
        if text.len() != 2 * bytes.len() {
            return Err(wrong(&format!("it has {} bytes; 64 hexadecimal digits belong there", text.len())));
        }
        for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            // Digit by digit: what parses whole numbers takes a sign, too.
            let (Some(high), Some(low)) = (digit(digits[0]), digit(digits[1])) else {
                return Err(wrong("it has something else than hexadecimal digits"));
            };
            *byte = high << 4 | low;
        }
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for KeyHash {
    type Error = IdError;

    fn try_from(text: String) -> Result<Self, IdError> {
        text.parse()
    }
}

impl From<KeyHash> for String {
    fn from(hash: KeyHash) -> Self {
        hash.to_string()
    }
}

/// What lets one source bring one set of devices to a destination, or proves later that it is the one that did. Its bytes
/// are a secret: they are never logged.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Ticket(pub [u8; Self::BYTES]);

impl Ticket {
    /// How long one is.
    pub const BYTES: usize = 32;
}

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Ticket(..)")
    }
}

#[cfg(test)]
mod tests;
