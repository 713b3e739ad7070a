//! The parameters of the variant, in sysfs. `tests/guest/kbuild/variant.c` says what each does and when it is read.

use std::fs;

use vfio_checkpoint_fsm::{Capabilities, State};

const FOLDER: &str = "/sys/module/mtty_variant/parameters";
const DEFAULTS: [(&str, &str); 10] = [
    ("migration_flags", "7"),
    ("reset_on_close", "0"),
    ("enomsg", "0"),
    ("dirty_bytes", "0"),
    ("no_data_size", "0"),
    ("dma_dirty", "0"),
    ("no_dma_log", "0"),
    ("fail_hops", "-1"),
    ("error_hops", "-1"),
    ("fail_resets", "0"),
];

/// The parameters of a test. Dropping brings the defaults back, also where the test fails.
#[derive(Debug)]
pub(crate) struct Parameters;

impl Parameters {
    /// The defaults: the variant does as mtty does.
    pub(crate) fn new() -> Self {
        let parameters = Self;
        parameters.defaults();
        parameters
    }

    pub(crate) fn flags(&self, capabilities: Capabilities) -> &Self {
        self.set("migration_flags", &capabilities.kernel_flags().to_string())
    }

    pub(crate) fn reset_on_close(&self) -> &Self {
        self.set("reset_on_close", "1")
    }

    pub(crate) fn enomsg(&self) -> &Self {
        self.set("enomsg", "1")
    }

    pub(crate) fn dirty_bytes(&self, bytes: u32) -> &Self {
        self.set("dirty_bytes", &bytes.to_string())
    }

    pub(crate) fn dma_dirty(&self) -> &Self {
        self.set("dma_dirty", "1")
    }

    /// These hops fail, once each, and leave the device where they began.
    pub(crate) fn fail_hops(&self, hops: &[(State, State)]) -> &Self {
        self.set("fail_hops", &list(hops))
    }

    /// These hops fail, once each, and land in ERROR.
    pub(crate) fn error_hops(&self, hops: &[(State, State)]) -> &Self {
        self.set("error_hops", &list(hops))
    }

    pub(crate) fn fail_resets(&self, count: u32) -> &Self {
        self.set("fail_resets", &count.to_string())
    }

    /// Every fault that was asked for has struck.
    #[allow(clippy::unused_self, reason = "the parameters are this test's for as long as it has the value")]
    pub(crate) fn all_struck(&self) -> bool {
        let none_left = |name| get(name).split(',').all(|state| state == "-1");
        none_left("fail_hops") && none_left("error_hops") && get("fail_resets") == "0"
    }

    /// Any parameter, by its name.
    pub(crate) fn set(&self, name: &str, value: &str) -> &Self {
        fs::write(format!("{FOLDER}/{name}"), value)
            .unwrap_or_else(|error| panic!("the parameter {name} to {value}: {error}"));
        self
    }

    fn defaults(&self) {
        for (name, value) in DEFAULTS {
            self.set(name, value);
        }
    }
}

impl Drop for Parameters {
    fn drop(&mut self) {
        self.defaults();
    }
}

fn get(name: &str) -> String {
    fs::read_to_string(format!("{FOLDER}/{name}")).expect("a parameter").trim().to_owned()
}

fn list(hops: &[(State, State)]) -> String {
    let numbers: Vec<String> =
        hops.iter().flat_map(|&(from, to)| [from, to]).map(|state| u32::from(state).to_string()).collect();
    numbers.join(",")
}
