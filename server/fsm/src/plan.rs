//! Whether a set of devices can be saved or restored as one, decided before anything is touched.
//!
//! Devices of one set may write into each other's memory. If one is stopped while a peer still runs, a
//! transfer between them is torn, and neither checkpoint nor source is sound. Hence the barrier: all devices
//! are quiesced before any is stopped, and all are at least quiesced again before any runs freely. It takes
//! P2P on every device.
//!
//! ```text
//!   devices            barrier
//!   none               refused: there is nothing to do, and success would mean nothing
//!   one                where it has P2P; it has no peer, so it may go without
//!   several, all P2P   yes
//!   several, not all   refused
//! ```
//!
//! Failure paths: a [`PlanRefusal`] is final for this set; no retry changes what the devices can do.

use std::fmt;

use crate::Capabilities;

/// Why no plan can be made for a set of devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PlanRefusal {
    /// The set is empty.
    NoDevices,
    /// The set has several devices and at least one of them cannot be quiesced.
    PeerWithoutP2p {
        /// The place of the first such device in the set, counted from 0.
        index: usize,
        /// The size of the set.
        devices: usize,
    },
}

impl fmt::Display for PlanRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoDevices => f.write_str("the set has no devices; name at least one"),
            Self::PeerWithoutP2p { index, devices } => write!(
                f,
                "device {index} of a set of {devices} lacks P2P, so it could write to a peer that is already \
                 stopped; handle it on its own, once nothing shares memory with it"
            ),
        }
    }
}

impl std::error::Error for PlanRefusal {}

/// What all devices of a set can do, or why they cannot be handled as one.
pub(crate) fn common_capabilities(devices: &[Capabilities]) -> Result<Capabilities, PlanRefusal> {
    let common = devices.iter().copied().reduce(Capabilities::intersection).ok_or(PlanRefusal::NoDevices)?;
    match devices.iter().position(|device| !device.p2p) {
        Some(index) if devices.len() > 1 => {
            Err(PlanRefusal::PeerWithoutP2p { index, devices: devices.len() })
        }
        Some(_) | None => Ok(common),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BARE: Capabilities = Capabilities { p2p: false, pre_copy: false };
    const P2P: Capabilities = Capabilities { p2p: true, pre_copy: false };
    const FULL: Capabilities = Capabilities { p2p: true, pre_copy: true };

    #[test]
    fn a_single_device_may_go_without_the_barrier() {
        assert_eq!(common_capabilities(&[BARE]), Ok(BARE));
        assert_eq!(common_capabilities(&[P2P]), Ok(P2P));
    }

    #[test]
    fn several_devices_need_p2p_on_all() {
        assert_eq!(common_capabilities(&[FULL, P2P]), Ok(P2P));
        assert_eq!(
            common_capabilities(&[FULL, BARE, BARE]),
            Err(PlanRefusal::PeerWithoutP2p { index: 1, devices: 3 })
        );
    }

    #[test]
    fn an_empty_set_is_refused() {
        assert_eq!(common_capabilities(&[]), Err(PlanRefusal::NoDevices));
    }
}
