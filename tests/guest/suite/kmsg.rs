//! The hops that mtty really took, from the kernel log: built with DEBUG it logs each before it takes it. And whether
//! the kernel had anything to complain of.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vfio_checkpoint_fsm::State;

use crate::Test;

/// Nothing that is waited for takes longer under emulation, unless it never comes.
const PATIENCE: Duration = Duration::from_secs(30);

/// To be run last: it looks back on all others.
pub(crate) const TESTS: &[Test] = &[("kmsg::the_kernel_warned_of_nothing", |_| no_warnings())];

/// A reader of what the kernel logs from when it was made.
#[derive(Debug)]
pub(crate) struct KernelLog {
    file: File,
}

impl KernelLog {
    pub(crate) fn new() -> Self {
        let mut log = Self::from_boot();
        log.file.seek(SeekFrom::End(0)).expect("the end of the kernel log");
        log
    }

    /// A reader of everything since the kernel started.
    fn from_boot() -> Self {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/kmsg")
            .expect("kernel log");
        Self { file }
    }

    /// The hops of the device `uuid` since the last call, taken or tried.
    pub(crate) fn hops(&mut self, uuid: &str) -> Vec<(State, State)> {
        self.lines().iter().filter_map(|line| parse_hop(line, uuid)).collect()
    }

    /// Waits until the device `uuid` takes a hop out of this state; what was logged until then is read.
    pub(crate) fn until_out_of(&mut self, uuid: &str, state: State) {
        let begun = Instant::now();
        while !self.hops(uuid).iter().any(|(from, _)| *from == state) {
            let left = PATIENCE.checked_sub(begun.elapsed()).expect("it leaves the state");
            let left = Timespec::try_from(left).expect("a time");
            poll(&mut [PollFd::new(&self.file, PollFlags::IN)], Some(&left)).expect("the kernel log");
        }
    }

    /// The hops of several devices since the last call in the order in which they were logged, each with the device's
    /// place in `uuids`.
    pub(crate) fn hops_of_all(&mut self, uuids: &[&str]) -> Vec<(usize, State, State)> {
        let hop = |line: &String| {
            uuids
                .iter()
                .enumerate()
                .find_map(|(device, uuid)| parse_hop(line, uuid).map(|(from, to)| (device, from, to)))
        };
        self.lines().iter().filter_map(hop).collect()
    }

    /// How many lines about the device `uuid` since the last call hold `text`.
    pub(crate) fn mentions(&mut self, uuid: &str, text: &str) -> usize {
        self.lines().iter().filter(|line| line.contains(uuid) && line.contains(text)).count()
    }

    fn lines(&mut self) -> Vec<String> {
        let mut lines = Vec::new();
        // One record a read; the kernel cuts none shorter than this.
        let mut record = [0; 8192];
        loop {
            match self.file.read(&mut record) {
                Ok(0) => return lines,
                Ok(length) => lines.push(String::from_utf8_lossy(&record[..length]).into_owned()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return lines,
                Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                    panic!("the kernel log was overwritten before it was read: make log_buf_len larger")
                }
                Err(error) => panic!("reading the kernel log: {error}"),
            }
        }
    }
}

/// `…;mtty UUID: mtty_step_state: 2 -> 5`
fn parse_hop(line: &str, uuid: &str) -> Option<(State, State)> {
    let (prefix, hop) = line.split_once("mtty_step_state: ")?;
    if !prefix.contains(uuid) {
        return None;
    }
    let (from, to) = hop.lines().next()?.split_once(" -> ")?;
    let state = |number: &str| {
        State::try_from(number.trim().parse::<u32>().expect("a state's number")).expect("a state")
    };
    Some((state(from), state(to)))
}

/// A SET out of ERROR, a stream that a walk drops, a file used after its device: the kernel survives them and says so.
fn no_warnings() {
    let lines = KernelLog::from_boot().lines();
    let complaints: Vec<_> = lines
        .iter()
        .filter(|line| ["cut here", "WARNING:", "BUG:"].iter().any(|complaint| line.contains(complaint)))
        .collect();
    assert!(complaints.is_empty(), "{complaints:#?}");
    println!("figures: kernel log: {} lines and no warning", lines.len());
}
