//! The processes of a test, and what passes between them.

use std::env;
use std::io::{BufRead, BufReader, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    SocketAddrUnix, SocketFlags, SocketType,
};
use vfio_checkpoint_device::DeviceAddress;
use vfio_checkpoint_server::holder::{BootId, DeviceKey, Facts, HolderClient, Label};

/// No call takes as long: a test fails then instead of hanging.
pub(crate) const PATIENCE: Duration = Duration::from_mins(1);
/// Says to the test binary that it is an agent, and what it does.
pub(crate) const AGENT: &str = "HOLDER_TEST_AGENT";

/// A process that is killed with its value.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) child: Child,
    stderr: Option<JoinHandle<String>>,
}

impl Process {
    /// Starts it and waits until it says `ready` on standard error.
    fn start(command: &mut Command, ready: &str) -> Self {
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let mut said = String::new();
        while !said.contains(ready) {
            assert_ne!(stderr.read_line(&mut said).unwrap(), 0, "it ended: {said}");
        }
        let stderr = thread::spawn(move || {
            // Read on, so that it never waits for somebody who does.
            stderr.read_to_string(&mut said).unwrap();
            said
        });
        Self { child, stderr: Some(stderr) }
    }

    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        rustix::process::kill_process(rustix::process::Pid::from_child(&self.child), signal).unwrap();
    }

    /// Kills it with -9.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Its exit code and everything that it said.
    pub(crate) fn ended(mut self) -> (Option<i32>, String) {
        let code = self.child.wait().unwrap().code();
        (code, self.stderr.take().unwrap().join().unwrap())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Held by one test at a time: a process that is being started has, for an instant, a duplicate of every socket that
/// another test just closed.
static ALONE: Mutex<()> = Mutex::new(());

/// A folder for one test, with a folder for the holder's socket in it.
pub(crate) struct Place {
    _alone: MutexGuard<'static, ()>,
    pub(crate) folder: tempfile::TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        Self { _alone: alone, folder: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The holder's socket, in a folder that the holder makes.
    pub(crate) fn socket(&self) -> PathBuf {
        self.path("hold/agent.sock")
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vfio-checkpointd"));
        command.arg("hold").arg("--socket").arg(self.socket()).args(arguments);
        command
    }

    pub(crate) fn holder(&self, arguments: &[&str]) -> Process {
        Process::start(&mut self.command(arguments), "holding ")
    }

    /// A command line that does not get as far as holding: its exit code and what it said.
    pub(crate) fn refused(&self, arguments: &[&str]) -> (Option<i32>, String) {
        let output = self.command(arguments).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    }

    pub(crate) fn client(&self) -> HolderClient {
        HolderClient::connect(&self.socket(), PATIENCE).unwrap()
    }

    /// The real device process, which resets its device when its client hangs up.
    pub(crate) fn device_process(&self) -> (Process, DeviceAddress) {
        let path = self.path("device.sock");
        let mut command = Command::new(device_program());
        command.arg("--socket").arg(&path).args(["--device", "sim:memory=1MiB"]);
        let process = Process::start(&mut command, "listening on");
        (process, format!("vfio-user:{}", path.display()).parse().unwrap())
    }

    /// Runs an agent in a process of its own until it says that it did its job. It then waits to be killed.
    pub(crate) fn agent(&self, job: &str) -> Process {
        let ready = self.path("ready.sock");
        let _ = std::fs::remove_file(&ready);
        let listener = UnixListener::bind(&ready).unwrap();
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["--exact", "survive::an_agent_that_will_be_killed", "--nocapture"])
            .env(AGENT, format!("{job} {}", self.folder.path().display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        listener.set_nonblocking(true).unwrap();
        loop {
            let mut fds = [rustix::event::PollFd::new(&listener, rustix::event::PollFlags::IN)];
            let a_moment = rustix::event::Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
            if rustix::event::poll(&mut fds, Some(&a_moment)).unwrap() == 1 {
                break;
            }
            assert!(child.try_wait().unwrap().is_none(), "the agent ended before it was ready");
        }
        Process { child, stderr: None }
    }
}

/// The device process' program, which is another crate's: beside this test's, where cargo puts it.
fn device_program() -> PathBuf {
    static BUILT: Once = Once::new();
    let deps = env::current_exe().unwrap();
    let folder = deps.parent().and_then(Path::parent).unwrap().to_owned();
    let program = folder.join("vfio-user-device");
    BUILT.call_once(|| {
        if program.exists() {
            return;
        }
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["build", "-p", "vfio-checkpoint-device", "--bin", "vfio-user-device", "--target-dir"]);
        cargo.arg(folder.parent().unwrap()).current_dir(env!("CARGO_MANIFEST_DIR"));
        if folder.file_name().is_some_and(|name| name == "release") {
            cargo.arg("--release");
        }
        assert!(cargo.status().unwrap().success(), "building vfio-user-device");
    });
    program
}

pub(crate) fn key(text: &str) -> DeviceKey {
    DeviceKey::new(text).unwrap()
}

pub(crate) fn boot_id() -> BootId {
    BootId::new(std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap().trim()).unwrap()
}

pub(crate) fn label(text: &str) -> Label {
    Label {
        key: key(text),
        address: "0000:03:00.1".parse().unwrap(),
        operation: None,
        epoch: 1,
        facts: Facts::new("{}").unwrap(),
        boot_id: boot_id(),
    }
}

/// The writing ends of a pipe: they are all closed when the reading end ends.
pub(crate) struct Ends {
    reader: std::io::PipeReader,
    pub(crate) fds: Vec<OwnedFd>,
}

impl Ends {
    pub(crate) fn new(count: usize) -> Self {
        let (reader, writer) = std::io::pipe().unwrap();
        Self { reader, fds: (0..count).map(|_| writer.try_clone().unwrap().into()).collect() }
    }

    pub(crate) fn borrowed(&self) -> Vec<BorrowedFd<'_>> {
        self.fds.iter().map(AsFd::as_fd).collect()
    }

    /// Closes this process' and waits until nobody has one any more.
    pub(crate) fn closed_everywhere(mut self) {
        self.fds.clear();
        self.reader.read_to_end(&mut Vec::new()).unwrap();
    }

    /// What was written to one of them.
    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> usize {
        self.reader.read(buffer).unwrap()
    }

    /// Closes this process'. Somebody else still has one.
    pub(crate) fn held_elsewhere(mut self) -> Self {
        self.fds.clear();
        // Without flags nothing but the end is reported.
        let mut fds = [rustix::event::PollFd::new(&self.reader, rustix::event::PollFlags::empty())];
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        assert_eq!(rustix::event::poll(&mut fds, Some(&now)).unwrap(), 0, "the pipe ended");
        self
    }
}

/// A peer that sends what a test says and nothing else.
pub(crate) struct Raw {
    pub(crate) socket: OwnedFd,
}

impl Raw {
    pub(crate) fn connect(path: &Path) -> Self {
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .unwrap();
        rustix::net::connect(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
        let patience = Some(PATIENCE);
        rustix::net::sockopt::set_socket_timeout(&socket, rustix::net::sockopt::Timeout::Recv, patience)
            .unwrap();
        Self { socket }
    }

    /// One that said who it is, and was let in.
    pub(crate) fn agent(path: &Path) -> Self {
        let raw = Self::connect(path);
        raw.send(br#"{"hello":{"version":1,"pid":7}}"#, &[]);
        let welcome = raw.receive().unwrap();
        assert!(welcome.starts_with("{\"welcome\""), "{welcome}");
        raw
    }

    pub(crate) fn send(&self, packet: &[u8], fds: &[BorrowedFd<'_>]) {
        assert!(self.try_send(packet, fds), "the peer is gone");
    }

    /// Whether the peer was still there.
    pub(crate) fn try_send(&self, packet: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(fds)));
        let sent =
            rustix::net::sendmsg(&self.socket, &[IoSlice::new(packet)], &mut control, SendFlags::NOSIGNAL);
        match sent {
            Ok(_) => true,
            Err(rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET) => false,
            Err(errno) => panic!("{errno}"),
        }
    }

    /// The next packet as text. `None`: hung up.
    pub(crate) fn receive(&self) -> Option<String> {
        let mut buffer = vec![0; 128 * 1024];
        let mut control = RecvAncillaryBuffer::default();
        let received = rustix::net::recvmsg(
            &self.socket,
            &mut [IoSliceMut::new(&mut buffer)],
            &mut control,
            RecvFlags::empty(),
        );
        let bytes = match received {
            Ok(received) => received.bytes,
            Err(rustix::io::Errno::CONNRESET) => 0,
            Err(errno) => panic!("{errno}"),
        };
        buffer.truncate(bytes);
        (bytes > 0).then(|| String::from_utf8(buffer).unwrap())
    }
}
