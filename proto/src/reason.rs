//! Stable reasons as they are on the wire.
//!
//! ```text
//!   v1::ErrorReason::DeviceNotFound --as_reason--> "DEVICE_NOT_FOUND" --> google.rpc.ErrorInfo.reason
//!   v1::FailureReason::DeviceFailed --as_reason--> "DEVICE_FAILED"    --> OperationFailure.reason
//! ```
//! The enums of reason.proto are where a client's author reads of them and where the agent takes them from, so there is no
//! reason that is not documented.

use crate::v1::{ErrorReason, FailureReason};

/// Every value of an enum but UNSPECIFIED; they are numbered without gaps, which a test holds.
fn all<T: TryFrom<i32>>() -> impl Iterator<Item = T> {
    (1..).map_while(|number| T::try_from(number).ok())
}

impl ErrorReason {
    /// The domain of every `google.rpc.ErrorInfo` of this service.
    pub const DOMAIN: &str = "vfio.checkpoint.v1";

    /// As in `google.rpc.ErrorInfo.reason`.
    pub fn as_reason(self) -> &'static str {
        without(self.as_str_name(), "ERROR_REASON_")
    }

    /// All of them but UNSPECIFIED.
    pub fn all() -> impl Iterator<Item = Self> {
        all()
    }
}

impl FailureReason {
    /// As in `OperationFailure.reason`.
    pub fn as_reason(self) -> &'static str {
        without(self.as_str_name(), "FAILURE_REASON_")
    }

    /// All of them but UNSPECIFIED.
    pub fn all() -> impl Iterator<Item = Self> {
        all()
    }
}

fn without(name: &'static str, prefix: &str) -> &'static str {
    name.strip_prefix(prefix).unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use prost::Message as _;
    use prost_types::FileDescriptorSet;

    use super::*;
    use crate::v1::FILE_DESCRIPTOR_SET;

    /// The values of an enum as its file has them, without their prefix and the first.
    fn declared(name: &str, prefix: &str) -> Vec<String> {
        let set = FileDescriptorSet::decode(FILE_DESCRIPTOR_SET).unwrap();
        let mut enums = set.file.iter().flat_map(|file| &file.enum_type);
        let found = enums.find(|descriptor| descriptor.name() == name).unwrap();
        found
            .value
            .iter()
            .skip(1)
            .map(|value| value.name().strip_prefix(prefix).unwrap().to_owned())
            .collect()
    }

    #[test]
    fn all_are_all_that_the_file_declares_by_the_names_of_the_wire() {
        let errors: Vec<String> = ErrorReason::all().map(|reason| reason.as_reason().to_owned()).collect();
        assert_eq!(errors, declared("ErrorReason", "ERROR_REASON_"));
        let failures: Vec<String> =
            FailureReason::all().map(|reason| reason.as_reason().to_owned()).collect();
        assert_eq!(failures, declared("FailureReason", "FAILURE_REASON_"));
    }
}
