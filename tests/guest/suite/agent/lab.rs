//! An authority, agents and holders as processes, `vfioctl`, and a client of the library.
//!
//! A [`Lab`] is one node: a folder with certificates, configuration and journal. Agents come and go in it, all at one
//! address; what they log is kept, and printed where the test fails. Labs beside each other have one authority.

use std::cell::RefCell;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime};

use rustix::process::{
    Pid, PidfdFlags, PidfdGetfdFlags, Signal, WaitId, WaitIdOptions, kill_process, pidfd_getfd, pidfd_open,
    waitid,
};
use rustls_pki_types::UnixTime;
use serde_json::Value;
use tokio::runtime::Runtime;
use vfio_checkpoint_client::call::Client;
use vfio_checkpoint_client::connect::ConnectOptions;
use vfio_checkpoint_client::tls::{CredentialFiles, Credentials, ServerCheck, client_config};
use vfio_checkpoint_device::kernel::KernelPath;
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_server::security::identity::Identity;
use vfio_checkpoint_server::security::lab::{LabCa, Validity};

/// Nothing that a test waits for takes longer under emulation, unless it never comes.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);
const AGENT: &str = "/bin/vfio-checkpointd";
const CONTROL: &str = "/bin/vfioctl";

/// A device of the agent's: its name, its address, and the way to it.
pub(super) type Slot<'a> = (&'a str, &'a str, Option<KernelPath>);

/// One node.
pub(super) struct Lab {
    folder: PathBuf,
    ca: Arc<LabCa>,
    /// The agent's.
    identity: String,
    credentials: CredentialFiles,
    runtime: Runtime,
    has_holder: bool,
    /// Where the agent listens: where the first of them was given a port.
    listen: RefCell<String>,
}

impl Lab {
    pub(super) fn new() -> Self {
        let ca = LabCa::new(&"lab.test".parse().expect("a domain"), validity()).expect("an authority");
        Self::under(Arc::new(ca), "a")
    }

    /// Another node under the same authority.
    pub(super) fn beside(&self, name: &str) -> Self {
        Self::under(Arc::clone(&self.ca), name)
    }

    fn under(ca: Arc<LabCa>, name: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        // In memory, and short enough for a socket's path.
        let folder = PathBuf::from(format!("/run/lab{}", COUNT.fetch_add(1, Ordering::Relaxed)));
        fs::DirBuilder::new().mode(0o700).create(&folder).expect("a folder");
        let identity = format!("spiffe://lab.test/agent/{name}");
        for (who, id) in [("agent", identity.as_str()), ("caller", "spiffe://lab.test/caller")] {
            fs::create_dir(folder.join(who)).expect("a folder");
            let identity = Identity::Spiffe(id.parse().expect("an id"));
            let issued = ca.issue(&identity, &[], &[IpAddr::V4(Ipv4Addr::LOCALHOST)], validity());
            issued.and_then(|issued| issued.write(&folder.join(who), &ca.pem())).expect("a certificate");
        }
        let caller = folder.join("caller");
        let credentials = CredentialFiles {
            certificate: caller.join("tls.crt"),
            key: caller.join("tls.key"),
            ca: caller.join("ca.crt"),
        };
        let runtime = Runtime::new().expect("a runtime");
        let listen = RefCell::new("127.0.0.1:0".to_owned());
        Self { folder, ca, identity, credentials, runtime, has_holder: false, listen }
    }

    /// What the certificate of its agent says.
    pub(super) fn identity(&self) -> &str {
        &self.identity
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Starts a holder. Agents that are started from now on use it.
    pub(super) fn holder(&mut self) -> Program {
        self.has_holder = true;
        let socket = self.holder_socket();
        let mut command = Command::new(AGENT);
        command.args(["hold", "--socket"]).arg(&socket);
        let (program, ()) = Program::start("holder", command, |line| line.contains("holding").then_some(()));
        program
    }

    fn holder_socket(&self) -> PathBuf {
        self.folder.join("holder").join("socket")
    }

    /// Starts an agent that owns these devices. It is served when this returns.
    pub(super) fn agent(&self, devices: &[Slot<'_>], more: &str) -> Agent {
        let config = self.path("agent.toml");
        fs::write(&config, self.config(devices, more)).expect("a configuration");
        let mut command = Command::new(AGENT);
        command.args(["serve", "--log-format", "json", "--config"]).arg(&config);
        let (program, address) = Program::start("agent", command, |line| {
            let line: Value = serde_json::from_str(line).ok()?;
            let fields = &line["fields"];
            (fields["message"] == "serving").then(|| fields["address"].as_str().expect("where").to_owned())
        });
        self.listen.replace(address.clone());
        Agent { program, endpoint: format!("https://{address}") }
    }

    fn config(&self, devices: &[Slot<'_>], more: &str) -> String {
        let (state, tls) = (self.path("state"), self.path("agent"));
        let mut lines = vec![
            more.to_owned(),
            format!("[node]\nstate_dir = \"{}\"", state.display()),
            format!("[server]\nlisten = \"{}\"", self.listen.borrow()),
            "[tls]".to_owned(),
            format!("certificate = \"{}\"", tls.join("tls.crt").display()),
            format!("key = \"{}\"", tls.join("tls.key").display()),
            format!("client_ca = \"{}\"", tls.join("ca.crt").display()),
            "[[grants]]\nwho = \"spiffe://lab.test/caller\"".to_owned(),
            "roles = [\"saver\", \"restorer\", \"migrator\", \"admin\"]".to_owned(),
            "[[grants]]\nwho = \"spiffe://lab.test/agent/*\"\nroles = [\"peer\"]".to_owned(),
        ];
        if self.has_holder {
            lines.push(format!("[holder]\nsocket = \"{}\"", self.holder_socket().display()));
        }
        for (name, address, path) in devices {
            lines.push(format!("[[devices]]\nname = \"{name}\"\naddress = \"{address}\""));
            lines.extend(path.map(|path| format!("path = \"{path}\"")));
        }
        lines.join("\n")
    }

    /// Runs `vfioctl`: its exit code, standard output and standard error.
    pub(super) fn control(&self, agent: &Agent, arguments: &[&str]) -> (Option<i32>, String, String) {
        let output = Command::new(CONTROL)
            .args(["--endpoint", &agent.endpoint, "-o", "json", "--ca"])
            .arg(&self.credentials.ca)
            .arg("--cert")
            .arg(&self.credentials.certificate)
            .arg("--key")
            .arg(&self.credentials.key)
            .args(arguments)
            .output()
            .expect("vfioctl runs");
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
        (output.status.code(), text(output.stdout), text(output.stderr))
    }

    /// The same, where it has to succeed: its JSON document.
    pub(super) fn succeed(&self, agent: &Agent, arguments: &[&str]) -> Value {
        let (code, stdout, stderr) = self.control(agent, arguments);
        assert_eq!(code, Some(0), "vfioctl {arguments:?}: {stderr}");
        serde_json::from_str(&stdout).expect("a JSON document")
    }

    /// Runs a test's own calls against an agent.
    pub(super) fn with_client<T>(&self, agent: &Agent, work: impl AsyncFnOnce(Client) -> T) -> T {
        let credentials = Credentials::from_files(&self.credentials).expect("credentials");
        let check = ServerCheck::Name(None);
        let tls = client_config(credentials, &check).expect("a TLS configuration");
        let options = ConnectOptions::new(agent.endpoint.clone(), tls, check);
        self.runtime.block_on(async {
            let client = Client::connect(&options).await.expect("a connection");
            work(client).await
        })
    }

    /// A device as the agent sees it.
    pub(super) fn device(&self, agent: &Agent, name: &str) -> v1::Device {
        let name = format!("devices/{name}");
        self.with_client(agent, async |client| {
            let answer = client.get_device(v1::GetDeviceRequest { name }).await;
            answer.expect("an answer").device.expect("a device")
        })
    }

    /// An operation once it is done.
    pub(super) fn done(&self, agent: &Agent, operation: &str) -> v1::Operation {
        self.with_client(agent, async |client| done(&client, operation).await)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // What is left behind is only in the way of a guest with little memory.
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// An operation once it is done.
pub(super) async fn done(client: &Client, operation: &str) -> v1::Operation {
    let answer = client.wait_operation(operation, PATIENCE).await.expect("an answer");
    let operation = answer.operation.expect("an operation");
    assert!(operation.done, "it is not done: {operation:?}");
    operation
}

/// An operation once it is as wanted.
pub(super) async fn until(
    client: &Client,
    operation: &str,
    wanted: impl Fn(&v1::Operation) -> bool,
) -> v1::Operation {
    let request = v1::WatchOperationRequest { name: operation.to_owned() };
    let mut watch = client.watch_operation(request).await.expect("a watch");
    let waiting = async {
        loop {
            let answer = watch.next().await.expect("a change").expect("more changes");
            let operation = answer.operation.expect("an operation");
            if wanted(&operation) {
                return operation;
            }
            assert!(!operation.done, "it ended before: {operation:?}");
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.expect("it comes to be as wanted")
}

/// A request for a save of these devices, by stop-copy.
pub(super) fn save_request(devices: &[&str]) -> v1::StartSaveRequest {
    v1::StartSaveRequest {
        devices: devices.iter().map(|name| format!("devices/{name}")).collect(),
        pre_copy: v1::PreCopyMode::Never.into(),
        memory_capture: v1::MemoryCapture::None.into(),
        ..v1::StartSaveRequest::default()
    }
}

fn validity() -> Validity {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("a clock after 1970");
    // A certificate of a guest whose clock is wrong would prove nothing about dates.
    assert!(now > Duration::from_hours(24 * 365 * 50), "the guest's clock is not set: {now:?}");
    Validity::starting(UnixTime::since_unix_epoch(now), Duration::from_hours(1))
}

/// An agent's process.
pub(super) struct Agent {
    program: Program,
    endpoint: String,
}

impl Agent {
    /// SIGKILL to its process id; it is gone with all of its fds when this returns.
    pub(super) fn kill(&self) {
        let pid = Pid::from_child(&self.program.child);
        kill_process(pid, Signal::KILL).expect("a signal");
        // Its id stays its own until it is dropped.
        let gone = waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT);
        gone.expect("its end");
    }

    /// Ends it as a service manager does.
    pub(super) fn stop(self) {
        self.program.stop();
    }

    /// Where it is served.
    pub(super) fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// The file of the only VFIO device that it has open, as whoever uses the device has it too.
    pub(super) fn device_file(&self) -> File {
        let folder = format!("/proc/{}/fd", self.program.child.id());
        let is_device = |fd: &OsString| {
            let target = fs::read_link(Path::new(&folder).join(fd)).unwrap_or_default();
            let target = target.to_string_lossy();
            target.starts_with("/dev/vfio/devices/") || target == "anon_inode:[vfio-device]"
        };
        let fds = fs::read_dir(&folder).expect("its fds").map(|entry| entry.expect("an fd").file_name());
        let fd =
            fds.filter(is_device).map(|fd| fd.to_str().and_then(|fd| fd.parse().ok()).expect("a number"));
        let fd = fd.max().expect("a device is open");
        let agent = pidfd_open(Pid::from_child(&self.program.child), PidfdFlags::empty()).expect("the agent");
        pidfd_getfd(agent, fd, PidfdGetfdFlags::empty()).expect("a duplicate of its fd").into()
    }

    /// What its fds are of.
    pub(super) fn files(&self) -> Vec<String> {
        let folder = format!("/proc/{}/fd", self.program.child.id());
        let links = fs::read_dir(folder).expect("its fds");
        links
            .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
            .map(|link| link.to_string_lossy().into_owned())
            .collect()
    }
}

/// A process of the test. Dropping it kills it; what it logged is printed where the test fails.
pub(super) struct Program {
    name: &'static str,
    child: Child,
    log: Option<JoinHandle<Vec<String>>>,
}

impl Program {
    /// Starts a program, and waits for the line on its standard error that says that it is ready.
    pub(super) fn start<T: Send + 'static>(
        name: &'static str,
        mut command: Command,
        is_ready: impl Fn(&str) -> Option<T> + Send + 'static,
    ) -> (Self, T) {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let stderr = child.stderr.take().expect("its standard error");
        let (said, ready) = mpsc::channel();
        let log = thread::spawn(move || {
            let mut lines = Vec::new();
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                if let Some(ready) = is_ready(&line) {
                    // Said twice, nobody listens any more.
                    let _ = said.send(ready);
                }
                lines.push(line);
            }
            lines
        });
        let program = Self { name, child, log: Some(log) };
        let ready = ready.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("the {name} never gets ready"));
        (program, ready)
    }

    /// SIGTERM, and it ends well.
    pub(super) fn stop(mut self) {
        kill_process(Pid::from_child(&self.child), Signal::TERM).expect("a signal");
        let status: ExitStatus = self.child.wait().expect("its end");
        assert!(status.success(), "the {} ended with {status}", self.name);
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // It may have ended, and been waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let lines = self.log.take().and_then(|log| log.join().ok()).unwrap_or_default();
        if thread::panicking() {
            println!("the {} said:\n{}", self.name, lines.join("\n"));
        }
    }
}

/// The path as an argument.
pub(super) fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}
