//! Reasons in the details of a status.

use std::collections::HashMap;

use tonic_types::ErrorDetails;
use vfio_checkpoint_proto::v1::ErrorReason;

/// What every status of this agent carries, whatever is added to it.
pub(crate) fn error_info(reason: ErrorReason, metadata: HashMap<String, String>) -> ErrorDetails {
    ErrorDetails::with_error_info(reason.as_reason(), ErrorReason::DOMAIN, metadata)
}
