//! Every pair of states of every set of flags: the kernel's own table, walked with each of them.

use vfio_checkpoint_device::kernel::{KernelDevice, KernelPath, OpenError, OpenOptions};
use vfio_checkpoint_fsm::Capabilities;

use super::Parameters;
use crate::facts::Facts;
use crate::matrix::{Compared, compare};
use crate::save_restore::open;

pub(super) fn matrices(facts: &Facts, path: KernelPath) {
    let parameters = Parameters::new();
    let mut total = Compared::default();
    for capabilities in Capabilities::ALL {
        parameters.flags(capabilities);
        let compared = compare(&facts.mttyv1[0], path, capabilities);
        println!(
            "figures: variant {path:?}: {capabilities}: {} state pairs and {} hops compared",
            compared.pairs, compared.hops
        );
        total += compared;
    }
    println!(
        "figures: variant {path:?}: {} flag sets, {} state pairs and {} hops compared: kernel, fsm, simulated device; \
         {} times STOP_COPY back into a pre-copy refused",
        Capabilities::ALL.len(),
        total.pairs,
        total.hops,
        total.back_into_precopy
    );
}

pub(super) fn without_stop_copy(facts: &Facts) {
    let parameters = Parameters::new();
    for (flags, path) in [("0", KernelPath::Container), ("6", KernelPath::Iommufd)] {
        parameters.set("migration_flags", flags);
        let options = OpenOptions { path: Some(path), ..OpenOptions::default() };
        let refused =
            KernelDevice::open(&facts.mttyv1[0], &options).expect_err("a device that cannot migrate");
        assert!(matches!(refused, OpenError::NotMigratable { .. }), "{refused:?}");
    }
    parameters.flags(Capabilities { p2p: true, pre_copy: true });
    drop(open(&facts.mttyv1[0], KernelPath::Iommufd));
}
