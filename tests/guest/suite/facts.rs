//! What the guest has, as its init script says in the environment.

use std::env;

/// The devices of the guest.
#[derive(Debug)]
pub(crate) struct Facts {
    /// UUIDs of mtty devices with one port: 60 bytes of state.
    pub(crate) mtty1: Vec<String>,
    /// UUIDs of mtty devices with two ports: 96 bytes of state.
    pub(crate) mtty2: Vec<String>,
    /// UUIDs of devices of the test-only mtty variant, with one port. What they do, `variant::Parameters` says.
    pub(crate) mttyv1: Vec<String>,
    /// PCI address of an e1000e alone in its group, bound to vfio-pci.
    pub(crate) e1000e: String,
    /// PCI address of a function on vfio-pci whose group is not viable.
    pub(crate) nonviable: String,
    /// PCI address of the function that makes it so.
    pub(crate) nonviable_peer: String,
}

impl Facts {
    pub(crate) fn from_environment() -> Result<Self, String> {
        let fact = |name: &str| env::var(name).map_err(|_| format!("the environment lacks {name}"));
        let list = |name: &str, least: usize| {
            let items: Vec<String> = fact(name)?.split(',').map(str::to_owned).collect();
            if items.len() >= least {
                Ok(items)
            } else {
                Err(format!("{name} has fewer than {least} entries"))
            }
        };
        Ok(Self {
            mtty1: list("GUEST_MTTY1", 4)?,
            mtty2: list("GUEST_MTTY2", 2)?,
            mttyv1: list("GUEST_MTTYV1", 4)?,
            e1000e: fact("GUEST_E1000E")?,
            nonviable: fact("GUEST_NONVIABLE")?,
            nonviable_peer: fact("GUEST_NONVIABLE_PEER")?,
        })
    }
}
