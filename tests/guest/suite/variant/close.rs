//! A device that is reset by its last close, as vfio-pci resets a function: who holds a duplicate keeps the state.

use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use vfio_checkpoint_device::kernel::{
    Attachment, KernelDevice, KernelFds, KernelPath, OpenError, OpenOptions,
};
use vfio_checkpoint_device::{Identity, MigrationDevice};
use vfio_checkpoint_fsm::{Outcome, Role, State};

use super::{Parameters, blank, programmed};
use crate::facts::Facts;
use crate::kmsg::KernelLog;
use crate::save_restore::{driver, open};
use crate::uart;

pub(super) fn last_close(facts: &Facts, path: KernelPath) {
    let uuid = &facts.mttyv1[0];
    let parameters = Parameters::new();
    let power_on = uart::registers(&blank(uuid, path), 1);
    let left = [
        State::Running,
        State::RunningP2p,
        State::Stop,
        State::StopCopy,
        State::PreCopy,
        State::PreCopyP2p,
        State::Resuming,
    ];
    for reset in [false, true] {
        if reset {
            parameters.reset_on_close();
        }
        for state in left {
            let mut former = programmed(uuid, path, 9);
            let registers = uart::registers(&former, 1);
            // The stream outlives the device's file, and is at its end with it.
            let stream = former.set_state(state).expect("a state to leave behind");
            drop(former);
            if let Some(vfio_checkpoint_device::DataStream::Save(mut stream)) = stream {
                let gone = stream.read(&mut [0; 64]).expect_err("the session is over");
                assert_eq!(gone.raw_os_error(), Some(libc::ENODEV), "{state}");
            }
            let mut device = open(uuid, path);
            let (found, expected) = if reset { (State::Running, &power_on) } else { (state, &registers) };
            assert_eq!(device.state().expect("a state"), found, "left in {state}");
            assert_eq!(&uart::registers(&device, 1), expected, "left in {state}");
            device.reset().expect("a reset");
        }
    }
    println!("figures: variant {path:?}: {} states lost by the last close, and kept without", left.len());
}

/// A process that holds duplicates of a device's fds and does nothing else, until it is told to end.
struct Holder {
    process: Child,
    ioas_id: Option<u32>,
}

impl Holder {
    fn take(fds: KernelFds) -> Self {
        let (attachment, ioas_id) = match fds.attachment {
            Attachment::Container { container } => (container, None),
            Attachment::Iommufd { iommufd, ioas_id } => (iommufd, Some(ioas_id)),
        };
        // It reads nothing but the end of its input, and writes nothing: the fds are only held.
        let process = Command::new("/bin/cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::from(fds.device))
            .stderr(Stdio::from(attachment))
            .spawn()
            .expect("a holder");
        Self { process, ioas_id }
    }

    /// Duplicates of what it holds.
    fn fds(&self) -> KernelFds {
        let pid = Pid::from_child(&self.process);
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).expect("the holder");
        let get = |fd| -> OwnedFd {
            pidfd_getfd(&pidfd, fd, PidfdGetfdFlags::empty()).expect("a duplicate of what it holds")
        };
        let attachment = match self.ioas_id {
            None => Attachment::Container { container: get(2) },
            Some(ioas_id) => Attachment::Iommufd { iommufd: get(2), ioas_id },
        };
        KernelFds { device: get(1), attachment }
    }

    /// Ends it; with it go its fds.
    fn end(mut self) {
        drop(self.process.stdin.take());
        assert!(self.process.wait().expect("the holder's end").success());
    }
}

/// An owner goes and another comes. Only the holder stands between the state and the reset of the last close.
pub(super) fn held(facts: &Facts, path: KernelPath) {
    let uuid = &facts.mttyv1[0];
    let parameters = Parameters::new();
    let power_on = uart::registers(&blank(uuid, path), 1);
    parameters.reset_on_close();
    // What the next owner finds and what is in the registers then, with a holder and without.
    let handover = |with_holder: bool| -> (State, uart::Registers, uart::Registers) {
        let mut owner = programmed(uuid, path, 33);
        let registers = uart::registers(&owner, 1);
        owner.set_state(State::Stop).expect("a stopped device");
        let identity: Identity = owner.opened().identity().clone();
        let holder = with_holder.then(|| Holder::take(owner.duplicate_fds().expect("duplicates")));
        drop(owner);

        let mut next = match &holder {
            Some(holder) => {
                let options = OpenOptions { path: Some(path), ..OpenOptions::default() };
                let busy = KernelDevice::open(uuid, &options).expect_err("the holder has it");
                assert!(matches!(busy, OpenError::InUse { .. }), "{busy:?}");
                KernelDevice::from_fds(holder.fds(), identity).expect("an adopted device")
            }
            None => open(uuid, path),
        };
        let found = next.state().expect("a state");
        // It is good for more than looking at: its state comes out.
        drop(next.set_state(State::StopCopy).expect("a stream"));
        next.set_state(State::Running).expect("a running device");
        let after = uart::registers(&next, 1);
        // The new owner outlives the holder.
        holder.into_iter().for_each(Holder::end);
        assert_eq!(next.state().expect("a state"), State::Running);
        assert_eq!(uart::registers(&next, 1), after);
        (found, registers, after)
    };
    let (found, before, after) = handover(true);
    assert_eq!((found, after), (State::Stop, before), "held, the device is as it was left");
    let (found, _, after) = handover(false);
    assert_eq!((found, after), (State::Running, power_on.clone()), "without a holder the state is gone");
    assert_eq!(uart::registers(&open(uuid, path), 1), power_on);
    println!(
        "figures: variant {path:?}: state kept over a change of owners by another process, and lost without"
    );
}

/// On a driver that does not reset on close, and does not crash either.
pub(super) fn found_resuming(facts: &Facts) {
    let uuid = &facts.mttyv1[0];
    let _parameters = Parameters::new();
    let mut former = blank(uuid, KernelPath::Iommufd);
    drop(former.set_state(State::Resuming).expect("a state to leave behind"));
    drop(former);

    let mut device = open(uuid, KernelPath::Iommufd);
    assert_eq!(device.state().expect("a state"), State::Resuming);
    let refused = device.set_state(State::Running).expect_err("there is nothing to load");
    assert_eq!(refused.raw_os_error(), Some(libc::EINVAL));
    let mut log = KernelLog::new();
    let mut driver = driver(&device);
    assert_eq!(driver.recover_left_over(Role::Destination).expect("a recovery"), Outcome::StateLost);
    assert_eq!(log.hops(uuid), [], "a reset and no SET");
    assert_eq!(device.state().expect("a state"), State::Running);
}
