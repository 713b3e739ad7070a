//! What must hold, read from the hardware and never from what an agent says of it.
//!
//! A logical device is known by a mark: the value of its device's scratch register, which travels with its state and is
//! gone with a reset.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, MutexGuard};

use vfio_checkpoint_device::sim::SimDevice;
use vfio_checkpoint_fsm::State;

use crate::log::{Log, say};

/// Who watches over a world. Clones are the same.
#[derive(Debug, Clone, Default)]
pub(crate) struct Oracle(Arc<Mutex<Known>>);

#[derive(Debug, Default)]
struct Known {
    devices: Vec<(&'static str, String, SimDevice)>,
    /// Each logical device, and whether it may run twice.
    marks: Vec<(u64, bool)>,
    /// Those that run on one host, all of them or none.
    set: Vec<u64>,
    /// What was in each of the set when it stopped to be saved.
    stopped: BTreeMap<u64, [u8; 32]>,
    /// Which of the set have run after they were loaded, and where.
    arrived: BTreeSet<(u64, &'static str)>,
    /// Whose last copy an agent reset.
    wiped: Vec<u64>,
    violations: Vec<String>,
}

impl Oracle {
    pub(crate) fn knows(&self, host: &'static str, name: &str, device: SimDevice) {
        self.known().devices.push((host, name.to_owned(), device));
    }

    /// A logical device that may run once, or twice where `may_fork`.
    pub(crate) fn watches(&self, mark: u64, may_fork: bool) {
        self.known().marks.push((mark, may_fork));
    }

    /// Logical devices that go from host to host together.
    pub(crate) fn watches_set(&self, marks: &[u64]) {
        self.known().set = marks.to_vec();
        for mark in marks {
            self.watches(*mark, false);
        }
    }

    /// A device did what it was told: what has run after a load is what had stopped.
    pub(crate) fn moved(&self, log: &Log, host: &'static str, device: &SimDevice, arc: (State, State)) {
        let mark = device.scratch();
        let mut known = self.known();
        if !known.set.contains(&mark) {
            return;
        }
        let (before, now) = arc;
        if now == State::StopCopy {
            known.stopped.insert(mark, device.digest());
        }
        if before == State::Resuming && now.is_running() && known.stopped.get(&mark) != Some(&device.digest())
        {
            let what = format!("logical device {mark:x} runs with a state in which it never stopped");
            say!(log, host, "VIOLATION: {what}");
            known.violations.push(what);
        }
        if matches!(before, State::Resuming | State::RunningP2p) && now == State::Running {
            known.arrived.insert((mark, host));
        }
    }

    /// A device in which `mark` was is reset.
    pub(crate) fn was_reset(&self, log: &Log, host: &str, mark: u64) {
        let mut known = self.known();
        if known.set.contains(&mark) && known.devices.iter().all(|(_, _, device)| device.scratch() != mark) {
            say!(log, host, "the last copy of {mark:x} is reset");
            known.wiped.push(mark);
        }
    }

    /// Whether an agent reset the last copy of anything.
    pub(crate) fn has_wiped(&self) -> bool {
        !self.known().wiped.is_empty()
    }

    /// Whether it has run there since it was loaded there.
    pub(crate) fn has_arrived(&self, mark: u64, host: &'static str) -> bool {
        self.known().arrived.contains(&(mark, host))
    }

    /// Looks whether any logical device runs twice.
    pub(crate) fn look(&self, log: &Log, host: &str) {
        let mut known = self.known();
        let mut found = Vec::new();
        for (mark, _) in known.marks.iter().filter(|(_, may_fork)| !may_fork) {
            let running = known
                .devices
                .iter()
                .filter(|(_, _, device)| device.state().is_running() && device.scratch() == *mark);
            let mut names = String::new();
            let count = running.map(|(host, name, _)| write!(names, " {host}/{name}")).count();
            if count > 1 {
                found.push(format!("logical device {mark:x} runs {count} times:{names}"));
            }
        }
        let mut hosts: Vec<_> = known
            .devices
            .iter()
            .filter(|(_, _, device)| device.state().is_running() && known.set.contains(&device.scratch()))
            .map(|(host, ..)| *host)
            .collect();
        hosts.dedup();
        if hosts.len() > 1 {
            found.push(format!("a set runs on {} hosts", hosts.len()));
        }
        for violation in found {
            say!(log, host, "VIOLATION: {violation}");
            known.violations.push(violation);
        }
    }

    /// Something that must hold does not.
    pub(crate) fn violated(&self, log: &Log, what: String) {
        say!(log, "oracle", "VIOLATION: {what}");
        self.known().violations.push(what);
    }

    /// What was violated, in order.
    pub(crate) fn violations(&self) -> Vec<String> {
        self.known().violations.clone()
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap()
    }
}
