//! The contract of vfio-checkpoint.
