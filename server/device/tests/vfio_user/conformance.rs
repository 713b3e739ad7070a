//! The rules of the migration contract on a device in another process: the same suite as on every other backend.

use std::io::Write as _;
use std::sync::Arc;

use vfio_checkpoint_device::conformance::{self, LastClose, Options, Subject, Verdict};
use vfio_checkpoint_device::vfio_user::{ConnectOptions, VfioUserDevice};
use vfio_checkpoint_device::{Executor, MigrationDevice, Threads};

use crate::served::{NoProcessStarts, Process};

#[test]
fn a_device_in_another_process_conforms() {
    let mut held = 0;
    let mut unseen = 0;
    let devices =
        ["sim:memory=64KiB", "sim:memory=64KiB,p2p=no", "sim:memory=5000,pre_copy=no", "sim:memory=1,pci=no"];
    for device in devices {
        let process = Process::start(&["--device", device]);
        let path = process.path.clone();
        // The device is closed and opened again all the time.
        let _guard = NoProcessStarts::meanwhile();
        let open = move || {
            let device = VfioUserDevice::connect(&path, ConnectOptions::default())?;
            Ok(Box::new(device) as Box<dyn MigrationDevice>)
        };
        // The server resets the device when its client is gone.
        let subject = Subject::new(Box::new(open)).last_close(LastClose::Resets);
        let executor: Arc<dyn Executor> = Arc::new(Threads::new());
        let options = Options { allow_restart: true, ..Options::default() };
        let report = conformance::run(subject, &options, &executor, &mut |_| ()).unwrap();
        let differences: Vec<_> = report.differences().collect();
        assert!(differences.is_empty() && report.conforms(), "{device}: {differences:#?}");
        for finding in &report.findings {
            match finding.verdict {
                Verdict::Holds { .. } => held += 1,
                Verdict::NotObserved { .. } => unseen += 1,
                Verdict::Differs { .. } | Verdict::NotApplicable { .. } => {}
            }
        }
    }
    let rules = conformance::rules::all().count();
    // Past the test harness, which keeps what a passing test prints.
    let _ = writeln!(
        std::io::stdout(),
        "\nfigures: conformance: {rules} rules x {} vfio-user processes: {held} hold, 0 differ, {unseen} not observed",
        devices.len()
    );
}
