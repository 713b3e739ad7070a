//! Device processes that say what they do, each in the same file: at no instant do two of them run the same state.
//!
//! ```text
//!   agent --vfio-user--> Watched --> SimDevice
//!                           |
//!                           '--> "source/0 leaves RUNNING D", the SET, "source/0 is STOP D"   one line after the other
//! ```
//! The lines of all devices are in one file to which each is appended at once, so their order is that of what happened. A
//! device may run from the line before the SET that leads there, and does until the line after the one that leads away:
//! what is found to run alone by that did so at every instant, also where an agent was killed or stood still meanwhile.
//!
//! D is the digest of what the device carries, read from the device itself: no agent has a say in it.

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use vfio_checkpoint_device::sim::{SimConfig, SimDevice};
use vfio_checkpoint_device::vfio_user::server::{PciFunction, Server, ServerOptions, SocketFile};
use vfio_checkpoint_device::{
    Call, ConfigSpace, DataSize, DataStream, DeviceCapabilities, DeviceError, DmaLog, Fingerprint, Identity,
    MigrationDevice, Threads,
};
use vfio_checkpoint_fsm::State;

use crate::children::this_program;

/// Says to this test program that it is a device process, and where its socket is.
const DEVICE: &str = "KILL_TEST_WATCHED";
/// What its device is, without `sim:`.
const SPEC: &str = "KILL_TEST_WATCHED_SPEC";
/// What it is called.
const NAME: &str = "KILL_TEST_WATCHED_NAME";
/// The file to which it says what it does.
const TOLD: &str = "KILL_TEST_WATCHED_TOLD";

/// A device process of the test program, called `name`.
pub(crate) fn command(socket: &Path, device: &str, name: &str, told: &Path) -> Command {
    let mut command = this_program("two::watch::a_device_that_is_watched");
    command.env(DEVICE, socket).env(NAME, name).env(TOLD, told);
    command.env(SPEC, device.strip_prefix("sim:").unwrap());
    command
}

/// Serves a device that is watched. Run by the other tests, in a process of its own; by itself it has nothing to do.
#[test]
fn a_device_that_is_watched() {
    let Some(socket) = env::var_os(DEVICE) else { return };
    let config = SimConfig::from_spec(&env::var(SPEC).unwrap()).unwrap();
    let vectors = config.pci.map_or((0, 0), |pci| (pci.msi_vectors, pci.msix_vectors));
    let function = PciFunction { msi_vectors: vectors.0, msix_vectors: vectors.1, ..PciFunction::default() };
    let slot = SimDevice::new(config, Arc::new(Threads::new())).unwrap();
    let told = OpenOptions::new().append(true).create(true).open(env::var_os(TOLD).unwrap()).unwrap();
    let inner = Box::new(slot.open().unwrap());
    let name = env::var(NAME).unwrap();
    let file = PathBuf::from(env::var_os(TOLD).unwrap());
    let (refusal, moves) = (refusal(&file, &name), moves(&file, &name));
    let mut device = Watched { inner, slot, name, told, refusal, moves };
    device.say("is");
    let (_file, listener) = SocketFile::bind(socket.as_ref()).unwrap();
    let options = ServerOptions { function, ..ServerOptions::default() };
    let server = Server::new(Box::new(device), listener, options).unwrap();
    eprintln!("listening on it");
    server.run().unwrap();
}

#[derive(Debug)]
struct Watched {
    inner: Box<dyn MigrationDevice>,
    slot: SimDevice,
    name: String,
    told: File,
    refusal: PathBuf,
    moves: PathBuf,
}

impl Watched {
    fn say(&mut self, what: &str) {
        let mut line = format!("{} {what} {} ", self.name, self.slot.state());
        for byte in self.slot.digest() {
            write!(line, "{byte:02x}").unwrap();
        }
        line.push('\n');
        self.told.write_all(line.as_bytes()).unwrap();
    }
}

/// Where it stands which SET a device refuses next.
fn refusal(told: &Path, device: &str) -> PathBuf {
    told.with_extension(format!("{}.refuses", device.replace('/', "-")))
}

/// Where it stands where somebody moves a device, who is not its agent.
fn moves(told: &Path, device: &str) -> PathBuf {
    told.with_extension(format!("{}.moves", device.replace('/', "-")))
}

impl MigrationDevice for Watched {
    fn identity(&self) -> &Identity {
        self.inner.identity()
    }

    fn fingerprint(&self) -> &Fingerprint {
        self.inner.fingerprint()
    }

    fn capabilities(&self) -> &DeviceCapabilities {
        self.inner.capabilities()
    }

    fn state(&mut self) -> Result<State, DeviceError> {
        if let Ok(wanted) = fs::read_to_string(&self.moves) {
            fs::remove_file(&self.moves).unwrap();
            let wanted = State::ALL.into_iter().find(|known| known.to_string() == wanted).unwrap();
            drop(self.set_state(wanted)?);
        }
        self.inner.state()
    }

    fn set_state(&mut self, target: State) -> Result<Option<DataStream>, DeviceError> {
        let refusal = &self.refusal;
        if fs::read_to_string(refusal).is_ok_and(|refused| refused == target.to_string()) {
            fs::remove_file(refusal).unwrap();
            let source = std::io::Error::from_raw_os_error(libc::EIO);
            return Err(DeviceError::Os { call: Call::SetState(target), source });
        }
        self.say("leaves");
        let set = self.inner.set_state(target);
        self.say("is");
        set
    }

    fn data_size(&mut self) -> Result<DataSize, DeviceError> {
        self.inner.data_size()
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        self.say("leaves");
        let reset = self.inner.reset();
        self.say("is");
        reset
    }

    fn dma_log(&mut self) -> Option<&mut dyn DmaLog> {
        self.inner.dma_log()
    }

    fn config_space(&mut self) -> Option<&mut dyn ConfigSpace> {
        self.inner.config_space()
    }
}

/// One line of a device.
#[derive(Debug, Clone)]
struct Line {
    device: String,
    /// It is said after what it says; before it otherwise.
    is: bool,
    state: State,
    digest: String,
}

/// What the devices of a test have said.
#[derive(Debug)]
pub(crate) struct Watch(PathBuf);

impl Watch {
    pub(crate) fn new(file: PathBuf) -> Self {
        Self(file)
    }

    fn lines(&self) -> Vec<Line> {
        let text = fs::read_to_string(&self.0).unwrap();
        let line = |line: &str| {
            let words: Vec<&str> = line.split(' ').collect();
            let [device, verb, state, digest] = words[..] else { panic!("a device said {line:?}") };
            Line {
                device: device.to_owned(),
                is: verb == "is",
                state: State::ALL.into_iter().find(|known| known.to_string() == state).unwrap(),
                digest: digest.to_owned(),
            }
        };
        text.lines().map(line).collect()
    }

    /// A device refuses its next SET to this state, and stays where it is.
    pub(crate) fn refuse(&self, device: &str, state: &str) {
        fs::write(refusal(&self.0, device), state).unwrap();
    }

    /// Somebody who is not its agent moves a device to this state, before it is asked for its state next.
    pub(crate) fn moves(&self, device: &str, state: &str) {
        fs::write(moves(&self.0, device), state).unwrap();
    }

    /// What a device carries now.
    pub(crate) fn carries(&self, device: &str) -> String {
        self.lines().into_iter().rfind(|line| line.device == device).unwrap().digest
    }

    /// How many lines there are.
    pub(crate) fn len(&self) -> usize {
        self.lines().len()
    }

    /// Asserts that no two devices have run one of these states at an instant, and that from line `since` on, where it is
    /// given, each was in some device at every instant. Says how often one began to run.
    pub(crate) fn check(&self, states: &[String], since: Option<usize>) -> usize {
        let lines = self.lines();
        let ends = |index: usize, line: &Line| {
            let mut later = lines[index + 1..].iter();
            later.find(|later| later.is && later.device == line.device)
        };
        // By device: which of the states it has, and whether it may run.
        let mut now: BTreeMap<&str, BTreeSet<(&str, bool)>> = BTreeMap::new();
        let mut begun = 0;
        for (index, line) in lines.iter().enumerate() {
            let has = |line: &Line| {
                states.iter().find(|state| **state == line.digest).map(|_| line.state.is_running())
            };
            let mut found = BTreeSet::new();
            if let Some(runs) = has(line) {
                found.insert((line.digest.as_str(), runs));
            }
            // While it is on its way it may be here or there.
            if !line.is
                && let Some(end) = ends(index, line)
                && let Some(runs) = has(end)
            {
                found.insert((end.digest.as_str(), runs));
            }
            let before = now.insert(&line.device, found.clone()).unwrap_or_default();
            begun += found.iter().filter(|(_, runs)| *runs).filter(|ran| !before.contains(ran)).count();
            for state in states {
                let running: Vec<&&str> = now
                    .iter()
                    .filter(|(_, found)| found.contains(&(state.as_str(), true)))
                    .map(|(device, _)| device)
                    .collect();
                assert!(
                    running.len() < 2,
                    "{running:?} run one state at once, by line {index}:\n{}",
                    tail(&lines, index)
                );
                let there = now.values().flatten().any(|(found, _)| found == state);
                assert!(
                    there || since.is_none_or(|since| index < since),
                    "a state is nowhere, by line {index}:\n{}",
                    tail(&lines, index)
                );
            }
        }
        begun
    }
}

fn tail(lines: &[Line], index: usize) -> String {
    lines[index.saturating_sub(30)..=index].iter().fold(String::new(), |mut text, line| {
        let verb = if line.is { "is" } else { "leaves" };
        let _ = writeln!(text, "    {} {verb} {} {}", line.device, line.state, &line.digest[..8]);
        text
    })
}

mod tests {
    use super::*;

    fn check(lines: &[&str], since: Option<usize>) -> usize {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("told");
        fs::write(&file, lines.iter().fold(String::new(), |text, line| text + line + "\n")).unwrap();
        Watch::new(file).check(&["0123456789".to_owned()], since)
    }

    const HERE: [&str; 3] =
        ["a/0 is RUNNING 0123456789", "a/0 leaves RUNNING 0123456789", "a/0 is STOP 0123456789"];
    const THERE: [&str; 2] = ["b/0 leaves RESUMING 9999999999", "b/0 is RUNNING 0123456789"];
    const GONE: [&str; 2] = ["a/0 leaves STOP 0123456789", "a/0 is RUNNING 9999999999"];

    #[test]
    fn one_after_the_other_is_found_well() {
        assert_eq!(check(&[&HERE[..], &THERE, &GONE].concat(), Some(0)), 2);
    }

    #[test]
    #[should_panic(expected = "run one state at once")]
    fn two_at_once_are_found() {
        check(&[HERE[0], THERE[0], THERE[1]], None);
    }

    /// It may run there before the SET has returned, and here until the one that stops it has.
    #[test]
    #[should_panic(expected = "run one state at once")]
    fn two_that_may_run_at_once_are_found() {
        check(&[HERE[0], HERE[1], THERE[0], HERE[2], THERE[1]], None);
    }

    #[test]
    #[should_panic(expected = "a state is nowhere")]
    fn a_state_that_is_gone_is_found() {
        check(&[&HERE[..], &GONE, &THERE].concat(), Some(0));
    }
}
