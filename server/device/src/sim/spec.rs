//! A simulated device named in one line of text: `sim`, or `sim:KEY=VALUE,…`.
//!
//! # Invariants
//! - A key that is not known, a value that cannot be and a configuration that no device can have are refused, each
//!   with the words of the line that are wrong; nothing is guessed.
//! - A key that is given twice counts as it was given last.

use super::{SimConfig, SimConfigError, Workload};

/// How a simulated device is named, for a help text.
pub const SPEC_HELP: &str = "sim, or sim:KEY=VALUE,… with seed=NUMBER, memory=SIZE, dirty=SIZE (a second), hot=SIZE (the \
                             part of the memory that is written to), \
                             firmware=TEXT, and p2p, pre_copy, reset and pci, each yes or no; a SIZE is bytes or has \
                             the suffix KiB, MiB or GiB";

/// Why a line does not name a simulated device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SimSpecError {
    /// A setting is not one, or its value cannot be.
    #[error("simulated device: {setting:?}: {reason}")]
    Setting {
        /// The setting as it was written.
        setting: String,
        /// What is wrong with it and what it may be.
        reason: String,
    },
    /// Every setting can be understood, and no device can be like that.
    #[error("no simulated device can be like that")]
    Config(#[from] SimConfigError),
}

impl SimConfig {
    /// The configuration that `settings` describe: what stands behind `sim:`, as `KEY=VALUE` separated by commas.
    /// Empty is the default device.
    pub fn from_spec(settings: &str) -> Result<Self, SimSpecError> {
        let mut config = Self::default();
        for setting in settings.split(',').filter(|setting| !setting.is_empty()) {
            apply(&mut config, setting)
                .map_err(|reason| SimSpecError::Setting { setting: setting.to_owned(), reason })?;
        }
        config.validate()?;
        Ok(config)
    }

    /// The settings in a device's name: what stands behind `sim:`, nothing for `sim` alone, and `None` where the name
    /// is not that of a simulated device.
    pub fn spec_in_name(name: &str) -> Option<&str> {
        let rest = name.strip_prefix("sim")?;
        if rest.is_empty() { Some("") } else { rest.strip_prefix(':') }
    }
}

fn apply(config: &mut SimConfig, setting: &str) -> Result<(), String> {
    let (key, value) = setting.split_once('=').ok_or("give KEY=VALUE")?;
    match key {
        "seed" => config.seed = value.parse().map_err(|_| "give a whole number")?,
        "memory" => config.memory_bytes = size(value)?,
        "dirty" => config.workload = Workload { dirty_bytes_per_second: size(value)?, ..config.workload },
        "hot" => {
            config.workload = Workload { working_set_bytes: Some(size(value)?), ..config.workload };
        }
        "firmware" => value.clone_into(&mut config.firmware),
        "p2p" => config.migration.p2p = yes(value)?,
        "pre_copy" => config.migration.pre_copy = yes(value)?,
        "reset" => config.reset = yes(value)?,
        "pci" => config.pci = yes(value)?.then(|| config.pci.unwrap_or_default()),
        _ => {
            return Err(
                "there are seed, memory, dirty, hot, firmware, p2p, pre_copy, reset and pci".to_owned()
            );
        }
    }
    Ok(())
}

fn yes(text: &str) -> Result<bool, String> {
    match text {
        "yes" => Ok(true),
        "no" => Ok(false),
        _ => Err("say yes or no".to_owned()),
    }
}

fn size(text: &str) -> Result<u64, String> {
    let (number, unit) = [("KiB", 10), ("MiB", 20), ("GiB", 30)]
        .into_iter()
        .find_map(|(suffix, shift)| Some((text.strip_suffix(suffix)?, 1_u64 << shift)))
        .unwrap_or((text, 1));
    let bytes = number.parse::<u64>().ok().and_then(|number| number.checked_mul(unit));
    bytes.ok_or_else(|| "give bytes, or a number with the suffix KiB, MiB or GiB".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_what_a_device_is_like() {
        assert_eq!(SimConfig::from_spec("").unwrap(), SimConfig::default());
        let config =
            SimConfig::from_spec("seed=7,memory=3MiB,dirty=64KiB,firmware=x,p2p=no,reset=no,pci=no").unwrap();
        assert_eq!((config.seed, config.memory_bytes, config.firmware.as_str()), (7, 3 << 20, "x"));
        assert_eq!(config.workload.dirty_bytes_per_second, 64 << 10);
        assert!(!config.migration.p2p && config.migration.pre_copy && !config.reset && config.pci.is_none());
    }

    #[test]
    fn what_is_wrong_is_named() {
        let wrong =
            ["seed", "seed=x", "memory=1TB", "memory=99999999999999999999", "p2p=maybe", "colour=red"];
        for setting in wrong {
            let error = SimConfig::from_spec(&format!("seed=1,{setting}")).unwrap_err();
            assert!(
                matches!(&error, SimSpecError::Setting { setting: named, .. } if named == setting),
                "{error}"
            );
        }
        assert!(matches!(SimConfig::from_spec("memory=0"), Err(SimSpecError::Config(_))));
    }

    #[test]
    fn a_name_is_sim_or_something_else() {
        assert_eq!(SimConfig::spec_in_name("sim"), Some(""));
        assert_eq!(SimConfig::spec_in_name("sim:seed=2"), Some("seed=2"));
        assert_eq!(SimConfig::spec_in_name("simple"), None);
        assert_eq!(SimConfig::spec_in_name("0000:03:00.1"), None);
    }
}
