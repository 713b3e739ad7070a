//! The rules, by what they are about, in the order in which they are run.
//!
//! | module | about |
//! |---|---|
//! | `identity` | who the device is, and what of it a close leaves |
//! | `states` | which moves there are, and which are refused |
//! | `streams` | data fds: when one comes, how it is read, when it is over |
//! | `precopy` | saving while the device runs |
//! | `size` | what the device says of the size of its state |
//! | `restore` | loading: what is taken |
//! | `refusals` | loading: what has to be refused |
//! | `reset` | what a reset ends |
//! | `dma_log` | the log of pages written by DMA |
//! | `config` | PCI configuration space and interrupts |

mod config;
mod dma_log;
mod identity;
mod precopy;
mod refusals;
mod reset;
mod restore;
mod size;
mod states;
mod streams;

use super::rule::Rule;
use crate::{DeviceError, chain};

/// Where the kernel says what: the sources that rules refer to.
mod source {
    pub(super) const STATES: &str = "linux/vfio.h, enum vfio_device_mig_state";
    pub(super) const WALK: &str = "drivers/vfio/vfio_main.c, vfio_mig_get_next_state";
    pub(super) const DATA_FD: &str = "linux/vfio.h, struct vfio_device_feature_mig_state";
    pub(super) const FLAGS: &str = "linux/vfio.h, struct vfio_device_feature_migration";
    pub(super) const PRECOPY_INFO: &str = "linux/vfio.h, struct vfio_precopy_info";
    pub(super) const SIZE: &str = "linux/vfio.h, struct vfio_device_feature_mig_data_size";
    pub(super) const RESET: &str = "linux/vfio.h, VFIO_DEVICE_RESET and enum vfio_device_mig_state";
    pub(super) const CLOSE: &str = "drivers/vfio/pci/vfio_pci_core.c, vfio_pci_core_disable";
    pub(super) const DMA_LOG: &str = "linux/vfio.h, struct vfio_device_feature_dma_logging_control";
    pub(super) const DMA_CORE: &str = "drivers/vfio/vfio_main.c, vfio_ioctl_device_feature_logging_start";
    pub(super) const DMA_REPORT: &str = "linux/vfio.h, struct vfio_device_feature_dma_logging_report";
    pub(super) const CONFIG: &str = "drivers/vfio/pci/vfio_pci_config.c, vfio_basic_config_write";
    pub(super) const IRQS: &str = "linux/vfio.h, struct vfio_irq_set";
}

/// Every rule of the suite.
pub fn all() -> impl Iterator<Item = &'static Rule> {
    [
        identity::RULES,
        states::RULES,
        streams::RULES,
        precopy::RULES,
        size::RULES,
        restore::RULES,
        refusals::RULES,
        reset::RULES,
        dma_log::RULES,
        config::RULES,
    ]
    .into_iter()
    .flatten()
}

/// An errno by its name in the kernel's headers, where it is one that rules are about.
fn errno_name(error: &DeviceError) -> String {
    let name = match error.raw_os_error() {
        Some(libc::EINVAL) => "EINVAL",
        Some(libc::EFAULT) => "EFAULT",
        Some(libc::ENODEV) => "ENODEV",
        Some(libc::ENOMEM) => "ENOMEM",
        Some(libc::EIO) => "EIO",
        Some(libc::ENOTTY) => "ENOTTY",
        Some(libc::EBUSY) => "EBUSY",
        Some(libc::EOPNOTSUPP) => "EOPNOTSUPP",
        Some(libc::ENOSPC) => "ENOSPC",
        Some(_) | None => return chain(error),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::super::rule::Weight;
    use super::all;

    #[test]
    fn ids_are_unique_and_in_kebab_case() {
        let mut seen = HashSet::new();
        for rule in all() {
            assert!(seen.insert(rule.id), "twice: {}", rule.id);
            assert!(
                rule.id.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-'),
                "{}",
                rule.id
            );
        }
        assert!(seen.len() >= 45, "{}", seen.len());
    }

    #[test]
    fn every_rule_is_a_sentence_with_a_source_and_a_meaning() {
        for rule in all() {
            assert!(rule.contract.ends_with('.') && rule.contract.len() > 20, "{}", rule.id);
            assert!(!rule.source.is_empty(), "{}", rule.id);
            let meaning = match rule.weight {
                Weight::Matters { consequence } => consequence,
                Weight::Tolerated { how } => how,
            };
            assert!(meaning.len() > 20 && !meaning.ends_with('.'), "{}", rule.id);
        }
    }
}
