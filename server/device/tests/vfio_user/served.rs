//! A simulated device behind a server.

use std::io::{BufRead, BufReader};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use vfio_checkpoint_device::MigrationDevice;
use vfio_checkpoint_device::executor::VirtualTime;
use vfio_checkpoint_device::sim::{SimConfig, SimDevice};
use vfio_checkpoint_device::vfio_user::server::{
    ServeError, Server, ServerHandle, ServerOptions, serve_stream,
};

use crate::raw::Raw;

/// A small device whose clock stands still.
pub(crate) fn slot(config: SimConfig) -> (SimDevice, Arc<VirtualTime>) {
    let time = Arc::new(VirtualTime::default());
    (SimDevice::new(config, time.clone()).unwrap(), time)
}

pub(crate) fn small() -> SimConfig {
    SimConfig { memory_bytes: 100_000, ..SimConfig::default() }
}

/// A server on a thread, with its socket in a folder of its own.
pub(crate) struct Served {
    pub(crate) slot: SimDevice,
    pub(crate) time: Arc<VirtualTime>,
    pub(crate) path: PathBuf,
    pub(crate) handle: ServerHandle,
    thread: Option<JoinHandle<Result<Box<dyn MigrationDevice>, ServeError>>>,
    _folder: tempfile::TempDir,
    _closes_count: NoProcessStarts,
}

impl Served {
    pub(crate) fn new(config: SimConfig, options: ServerOptions) -> Self {
        let closes_count = NoProcessStarts::meanwhile();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("device.sock");
        let (slot, time) = slot(config);
        let listener = UnixListener::bind(&path).unwrap();
        let server = Server::new(Box::new(slot.open().unwrap()), listener, options).unwrap();
        let handle = server.handle();
        let thread = Some(thread::spawn(move || server.run()));
        Self { slot, time, path, handle, thread, _folder: folder, _closes_count: closes_count }
    }

    /// With a small device and the usual options.
    pub(crate) fn small() -> Self {
        Self::new(small(), ServerOptions::default())
    }

    /// A connection that said nothing yet.
    pub(crate) fn connect(&self) -> UnixStream {
        UnixStream::connect(&self.path).unwrap()
    }

    /// A client that has agreed on a version. Whoever was there before is gone then, with what it left.
    pub(crate) fn attach(&self) -> Raw {
        Raw::attach(self.connect())
    }

    /// The server's end, which somebody else brought about.
    pub(crate) fn ended(mut self) -> Result<Box<dyn MigrationDevice>, ServeError> {
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.handle.stop();
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(thread::panicking() || ended.is_ok_and(|served| served.is_ok()), "the server failed");
        }
    }
}

/// A client at the other end of a pair of sockets, with a server of its own that ends with it.
pub(crate) fn paired(slot: &SimDevice) -> Raw {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let device = Box::new(slot.open().unwrap());
    let _detached = thread::spawn(move || drop(serve_stream(device, &theirs, &ServerOptions::default())));
    Raw::attach(ours)
}

/// The binary, in another process.
pub(crate) struct Process {
    pub(crate) child: Child,
    pub(crate) path: PathBuf,
    folder: tempfile::TempDir,
}

impl Process {
    /// Starts it and waits until it listens.
    pub(crate) fn start(arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("device.sock");
        let mut child = spawn(command(&path).args(arguments));
        let mut said = String::new();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        stderr.read_line(&mut said).unwrap();
        assert_eq!(said, format!("listening on {}\n", path.display()));
        Self { child, path, folder }
    }

    pub(crate) fn attach(&self) -> Raw {
        Raw::attach(UnixStream::connect(&self.path).unwrap())
    }

    /// The folder of its socket, for a test's own files.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How many tests rely on a close being a hang-up.
static RELYING: (Mutex<usize>, Condvar) = (Mutex::new(0), Condvar::new());

fn relying() -> MutexGuard<'static, usize> {
    RELYING.0.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts a process, once no test relies on a close. A test that does so itself must not start one.
pub(crate) fn spawn(command: &mut Command) -> Child {
    let _none =
        RELYING.1.wait_while(relying(), |relying| *relying > 0).unwrap_or_else(PoisonError::into_inner);
    command.spawn().unwrap()
}

/// As long as this lives no test starts a process.
///
/// Between fork and exec a new process has a duplicate of every socket in this program. What is closed meanwhile, by
/// whichever test, is no hang-up, and the server refuses who connects again because the client before is still there.
pub(crate) struct NoProcessStarts;

impl NoProcessStarts {
    pub(crate) fn meanwhile() -> Self {
        *relying() += 1;
        Self
    }
}

impl Drop for NoProcessStarts {
    fn drop(&mut self) {
        *relying() -= 1;
        RELYING.1.notify_all();
    }
}

/// The binary's command line for a socket.
pub(crate) fn command(path: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vfio-user-device"));
    command.arg("--socket").arg(path).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command
}
