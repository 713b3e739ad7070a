//! The hops that mtty really took, from the kernel log: built with DEBUG it logs each before it takes it.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;

use vfio_checkpoint_fsm::State;

/// A reader of what the kernel logs from when it was made.
#[derive(Debug)]
pub(crate) struct KernelLog {
    file: File,
}

impl KernelLog {
    pub(crate) fn new() -> Self {
        let mut file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/kmsg")
            .expect("kernel log");
        file.seek(SeekFrom::End(0)).expect("the end of the kernel log");
        Self { file }
    }

    /// The hops of the device `uuid` since the last call, taken or tried.
    pub(crate) fn hops(&mut self, uuid: &str) -> Vec<(State, State)> {
        self.lines().iter().filter_map(|line| parse_hop(line, uuid)).collect()
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
