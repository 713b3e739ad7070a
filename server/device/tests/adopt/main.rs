//! A connection whose owner was killed, gone on with by another process; and what cannot be gone on with.
//!
//! Beside the other tests of vfio-user, not among them: a process that is being started has, for an instant, a duplicate of
//! every socket of this one, and those tests count on a socket's end when they close it.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking, its helpers included")]

use std::env;
use std::fs::File;
use std::io::{BufRead, BufReader, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Program, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use rustix::process::{Pid, Signal, kill_process};
use vfio_checkpoint_device::address::{Access, AdoptRefusal, DeviceAddress, Keepsake, OpenFailure, Opened};
use vfio_checkpoint_device::vfio_user::codec::{Command, HEADER_BYTES, Header, Limits, Reply};
use vfio_checkpoint_device::vfio_user::{
    ConnectError, ConnectOptions, KeptConnection, PeerError, VfioUserDevice,
};
use vfio_checkpoint_device::{Call, DeviceError, Driver, MigrationDevice, Standing};
use vfio_checkpoint_fsm::{Outcome, Role, State};

/// Says to the test binary that it is an owner, and of what.
const OWNER: &str = "VFIO_USER_TEST_OWNER";

/// Says to it which process the device is in.
const PROCESS: &str = "VFIO_USER_TEST_PROCESS";

/// Of the question that an owner asks first.
const FENCE_BYTES: usize = HEADER_BYTES + 16;

/// How an owner is stopped.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Death {
    /// Between two calls.
    Idle,
    /// It asked, and the whole reply is in the socket.
    ReplyUnread,
    /// It read some of a reply.
    ReplyCut,
    /// It wrote a request but for its last bytes.
    RequestCut { missing: usize },
    /// It writes as much state as it can to a process that reads nothing meanwhile.
    Writing,
}

impl Death {
    const ALL: [(Self, &str); 7] = [
        (Self::Idle, "idle"),
        (Self::ReplyUnread, "reply-unread"),
        (Self::ReplyCut, "reply-cut"),
        // More than the next owner's first question has, which vanishes in it; as many; and fewer.
        (Self::RequestCut { missing: 3000 }, "request-cut"),
        (Self::RequestCut { missing: FENCE_BYTES }, "request-cut-by-a-question"),
        (Self::RequestCut { missing: 10 }, "request-cut-late"),
        (Self::Writing, "writing"),
    ];
}

/// The real device process, which resets its device when its client hangs up.
struct Process {
    child: Child,
    path: PathBuf,
    folder: tempfile::TempDir,
}

impl Process {
    /// Starts it and waits until it listens.
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("device.sock");
        let mut child = Program::new(env!("CARGO_BIN_EXE_vfio-user-device"))
            .arg("--socket")
            .arg(&path)
            .args(["--device", "sim:memory=1MiB"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = String::new();
        BufReader::new(child.stderr.take().unwrap()).read_line(&mut said).unwrap();
        assert!(said.starts_with("listening on"), "{said}");
        Self { child, path, folder }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn address(process: &Process) -> DeviceAddress {
    format!("vfio-user:{}", process.path.display()).parse().unwrap()
}

fn keeping() -> Access {
    Access { keep: true, adopt_within: Duration::from_millis(500), ..Access::default() }
}

/// Opens the device that the environment names, begins to save it, hands out its keepsake and waits to be killed. Run by
/// the other tests, in a process of its own; by itself it has nothing to do.
#[test]
fn an_owner_that_will_be_killed() {
    let Ok(job) = env::var(OWNER) else { return };
    let (death, rest) = job.split_once(' ').unwrap();
    let (pass, device) = rest.split_once(' ').unwrap();
    let death = Death::ALL.iter().find(|(_, name)| *name == death).unwrap().0;

    let address: DeviceAddress = device.parse().unwrap();
    let Opened { mut device, keepsake, .. } = address.open(keeping()).unwrap();
    let keepsake = keepsake.unwrap();
    if death == Death::Writing {
        writes(device, &keepsake);
        pass_on(Path::new(pass), &keepsake);
        // Killed here.
        let _ = std::io::stdin().read(&mut [0]);
        return;
    }
    let target = State::StopCopy;
    let mut save = device.set_state(target).unwrap().unwrap().into_save(Call::SetState(target)).unwrap();
    save.read(&mut [0; 1000]).unwrap();

    let mut socket = UnixStream::from(keepsake.fds[0].try_clone().unwrap());
    let read = Command::MigDataRead { size: 4096 }.encode(9, false, Limits::default()).unwrap();
    match death {
        Death::Idle => {}
        Death::ReplyUnread => {
            socket.write_all(&read).unwrap();
            arrives(&socket);
        }
        Death::ReplyCut => {
            socket.write_all(&read).unwrap();
            socket.read_exact(&mut [0; HEADER_BYTES + 3]).unwrap();
        }
        Death::RequestCut { missing } => {
            let data = vec![0; 4096];
            let write = Command::MigDataWrite { data: &data }.encode(9, false, Limits::default()).unwrap();
            socket.write_all(&write[..write.len() - missing]).unwrap();
        }
        Death::Writing => unreachable!("that is done by the device's own stream"),
    }
    pass_on(Path::new(pass), &keepsake);
    // Killed here.
    let _ = std::io::stdin().read(&mut [0]);
}

/// Begins to load a device whose process stands still. Some of what was written has gone out when this returns.
fn writes(mut device: Box<dyn MigrationDevice>, keepsake: &Keepsake) {
    let target = State::Resuming;
    let stream = device.set_state(target).unwrap().unwrap().into_restore(Call::SetState(target));
    let mut stream = stream.unwrap();
    let process = Pid::from_raw(env::var(PROCESS).unwrap().parse().unwrap()).unwrap();
    kill_process(process, Signal::STOP).unwrap();
    thread::spawn(move || {
        let _device = device;
        stream.write(&vec![0xa5; 4 << 20])
    });
    // A socket takes no more while more than a part of its buffer waits to be read.
    let has_room = || {
        let mut fds = [PollFd::new(&keepsake.fds[0], PollFlags::OUT)];
        rustix::event::poll(&mut fds, Some(&Timespec::default())).unwrap() == 1
    };
    let until = Instant::now() + Duration::from_mins(1);
    while has_room() {
        assert!(Instant::now() < until, "nothing goes out");
        thread::yield_now();
    }
}

fn arrives(socket: &UnixStream) {
    let mut fds = [PollFd::new(socket, PollFlags::IN)];
    rustix::event::poll(&mut fds, None).unwrap();
}

fn pass_on(to: &Path, keepsake: &Keepsake) {
    let stream = UnixStream::connect(to).unwrap();
    let facts = keepsake.encode().unwrap();
    let fds: Vec<_> = keepsake.fds.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    let slices = [IoSlice::new(facts.as_bytes())];
    rustix::net::sendmsg(&stream, &slices, &mut control, SendFlags::empty()).unwrap();
}

fn taken(listener: &UnixListener) -> Keepsake {
    let (stream, _) = listener.accept().unwrap();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut buffer = vec![0; 16 * 1024];
    let mut slices = [IoSliceMut::new(&mut buffer)];
    let message = rustix::net::recvmsg(&stream, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
    let mut fds: Vec<OwnedFd> = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = part {
            fds.extend(rights);
        }
    }
    buffer.truncate(message.bytes);
    Keepsake::decode(&String::from_utf8(buffer).unwrap(), fds).unwrap()
}

/// An owner in a process of its own opens the device, and is killed with -9 once it is where it should be.
fn killed(process: &Process, death: &str) -> Keepsake {
    let path = process.folder.path().join("pass.sock");
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).unwrap();
    let mut owner = Program::new(env::current_exe().unwrap())
        .args(["--exact", "an_owner_that_will_be_killed", "--nocapture"])
        .env(OWNER, format!("{death} {} {}", path.display(), address(process)))
        .env(PROCESS, process.child.id().to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let keepsake = taken(&listener);
    owner.kill().unwrap();
    owner.wait().unwrap();
    keepsake
}

/// The device, once its process is free. Not at once: another test that is just starting a process has, for an instant, a
/// duplicate of what was closed here.
fn opened_anew(process: &Process) -> Opened {
    let until = Instant::now() + Duration::from_mins(1);
    loop {
        match address(process).open(Access::default()) {
            Ok(opened) => return opened,
            Err(OpenFailure::VfioUser(ConnectError::Handshake { .. })) if Instant::now() < until => {}
            Err(error) => panic!("{error:?}"),
        }
    }
}

#[test]
fn a_device_survives_its_owner_and_goes_on_in_another_process() {
    for death in ["idle", "reply-unread", "reply-cut"] {
        let process = Process::start();
        let keepsake = killed(&process, death);
        let Opened { mut device, keepsake, .. } = address(&process).adopt(keepsake, keeping()).unwrap();
        // A reset would have left it in RUNNING.
        assert_eq!(device.state().unwrap(), State::StopCopy, "{death}");
        assert_eq!(device.fingerprint().facts().count(), 6);

        // And again, in the same process: ids differ from owner to owner.
        drop(device);
        let Opened { device, .. } = address(&process).adopt(keepsake.unwrap(), keeping()).unwrap();
        let mut driver = Driver::new(device);
        assert_eq!(driver.recover_left_over(Role::Source).unwrap(), Outcome::Preserved, "{death}");
        assert_eq!(driver.standing(), Standing::InService);
    }
}

/// Where a request was cut nobody can tell what the device did. The error says so, and the device is let go.
#[test]
fn a_request_cut_half_way_is_the_end_of_the_state() {
    for death in ["request-cut", "request-cut-by-a-question", "request-cut-late"] {
        let process = Process::start();
        let keepsake = killed(&process, death);
        let failure = address(&process).adopt(keepsake, keeping()).unwrap_err();
        assert!(failure.keepsake.is_none());
        let AdoptRefusal::VfioUser(error) = failure.source else { panic!("{death}: {failure:?}") };
        assert!(matches!(*error, ConnectError::StateLost { .. }), "{death}: {error:?}");
        assert!(error.to_string().contains("its state counts as lost"), "{error}");
        // The process noticed the end, reset its device and serves the next client.
        let mut next = opened_anew(&process);
        assert_eq!(next.device.state().unwrap(), State::Running);
    }
}

/// No SIGKILL cuts what the agent itself writes, however much of it and however slow the process is that reads it.
#[test]
fn a_write_goes_out_whole_or_not_at_all() {
    let process = Process::start();
    let keepsake = killed(&process, "writing");
    kill_process(Pid::from_child(&process.child), Signal::CONT).unwrap();
    let Opened { device, .. } = address(&process).adopt(keepsake, keeping()).unwrap();
    let mut driver = Driver::new(device);
    assert_eq!(driver.state().unwrap(), State::Resuming);
}

/// Without a duplicate anywhere the same death resets the device.
#[test]
fn a_device_that_nobody_keeps_is_reset() {
    let process = Process::start();
    drop(killed(&process, "idle"));
    let mut next = opened_anew(&process);
    assert_eq!(next.device.state().unwrap(), State::Running);
}

/// Owners that were given the same keepsake and died before they left one of their own.
#[test]
fn owners_that_died_while_taking_over_are_counted() {
    let process = Process::start();
    let device = VfioUserDevice::connect(&process.path, ConnectOptions::default()).unwrap();
    let KeptConnection { facts, socket } = device.keep().unwrap();
    let mut dead = UnixStream::from(socket.try_clone().unwrap());
    // The first id of the next owner, twice: its fence, unanswered.
    let fence = Command::GetInfo { argsz: 16 }.encode(4096, false, Limits::default()).unwrap();
    dead.write_all(&fence).unwrap();
    arrives(&dead);
    let kept = KeptConnection { facts: facts.after_owners(1), socket };
    let mut adopted = VfioUserDevice::adopt(kept, ConnectOptions::default()).unwrap();
    assert_eq!(
        adopted.keep().unwrap().facts.generation(),
        device.keep().unwrap().facts.after_owners(2).generation()
    );
    for _ in 0..3 {
        assert_eq!(MigrationDevice::state(&mut adopted).unwrap(), State::Running);
    }
}

/// How a peer answers the fence.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Answer {
    Yes,
    /// As another device would.
    OtherDevice,
    /// Not at all.
    None,
}

/// The facts of a real connection with a socket to a peer that is told what to say before it answers the fence.
fn adopt_from(
    said: Vec<Vec<u8>>,
    files: Vec<OwnedFd>,
    answer: Answer,
) -> Result<VfioUserDevice, ConnectError> {
    let process = Process::start();
    let device = VfioUserDevice::connect(&process.path, ConnectOptions::default()).unwrap();
    let KeptConnection { facts, .. } = device.keep().unwrap();
    let info = serde_json::to_value(&facts).unwrap();
    let number = |field: &str| u32::try_from(info[field].as_u64().unwrap()).unwrap();
    let info = vfio_checkpoint_device::vfio_user::codec::DeviceInfo {
        flags: number("device_flags"),
        regions: number("regions"),
        irqs: number("irqs") + u32::from(answer == Answer::OtherDevice),
    };
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let peer = thread::spawn(move || {
        for bytes in said {
            let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(&fds)));
            let slices = [IoSlice::new(&bytes)];
            let Ok(sent) = rustix::net::sendmsg(&theirs, &slices, &mut control, SendFlags::NOSIGNAL) else {
                return;
            };
            if theirs.write_all(&bytes[sent..]).is_err() {
                return;
            }
        }
        drop(files);
        let mut header = [0; HEADER_BYTES];
        if theirs.read_exact(&mut header).is_err() || answer == Answer::None {
            return;
        }
        let id = Header::decode(&header, Limits::default()).unwrap().id;
        // Who gave up does not read it.
        let _ = theirs.write_all(&Reply::Info(info).encode(id, Limits::default()).unwrap());
        let _ = theirs.read_to_end(&mut Vec::new());
    });
    let options = ConnectOptions { connect_within: Duration::from_secs(20), ..ConnectOptions::default() };
    // As the holder's: it does not keep a connection that is given up.
    let held = ours.try_clone().unwrap();
    let adopted = VfioUserDevice::adopt(KeptConnection { facts, socket: ours.into() }, options);
    if adopted.is_err() {
        peer.join().unwrap();
    }
    drop(held);
    adopted
}

fn left_over(bytes: usize) -> Vec<u8> {
    let data = vec![0xa5; bytes];
    Reply::MigDataRead { data: &data }.encode(3, Limits::default()).unwrap()
}

fn lost_by(adopted: Result<VfioUserDevice, ConnectError>) -> DeviceError {
    match adopted {
        Err(ConnectError::StateLost { source, .. }) => source,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_left_over_is_skipped_within_bounds() {
    assert!(adopt_from(vec![left_over(10); 16], Vec::new(), Answer::Yes).is_ok());
    assert!(adopt_from(vec![left_over(1 << 20); 4], Vec::new(), Answer::Yes).is_ok());
    for flood in [vec![left_over(10); 17], vec![left_over(1 << 20); 5]] {
        let error = lost_by(adopt_from(flood, Vec::new(), Answer::Yes));
        let DeviceError::Peer { source, .. } = &error else { panic!("{error:?}") };
        assert!(matches!(**source, PeerError::TooManyLeftOver), "{error:?}");
    }
}

#[test]
fn the_rest_of_a_message_is_skipped_where_an_answer_follows_and_is_the_end_where_none_does() {
    for garbage in [vec![0; 64], vec![0xff; 64], b"the rest of a blob, which is no message".to_vec()] {
        adopt_from(vec![garbage.clone()], Vec::new(), Answer::Yes).unwrap();
        lost_by(adopt_from(vec![garbage], Vec::new(), Answer::None));
    }
    // More of it than messages can have been left over.
    let flood = vec![vec![0xff; 1 << 20]; 9];
    let error = lost_by(adopt_from(flood, Vec::new(), Answer::Yes));
    assert!(matches!(error, DeviceError::Peer { .. }), "{error:?}");
}

#[test]
fn a_peer_that_answers_as_another_device_or_not_at_all_is_hung_up_on() {
    let other = lost_by(adopt_from(Vec::new(), Vec::new(), Answer::OtherDevice));
    assert!(matches!(other, DeviceError::Peer { call: Call::Open, .. }), "{other:?}");
    let gone = lost_by(adopt_from(Vec::new(), Vec::new(), Answer::None));
    assert!(matches!(gone, DeviceError::Disconnected { .. }), "{gone:?}");
}

#[test]
fn descriptors_that_come_with_what_is_left_over_are_closed() {
    let pipe_with_ends = |count: usize| {
        let (reader, writer) = std::io::pipe().unwrap();
        let ends: Vec<OwnedFd> = (0..count).map(|_| writer.try_clone().unwrap().into()).collect();
        (reader, ends)
    };
    let (mut reader, ends) = pipe_with_ends(2);
    let adopted = adopt_from(vec![left_over(10), left_over(10)], ends, Answer::Yes).unwrap();
    assert_eq!(reader.read(&mut [0]).unwrap(), 0, "nobody holds the other end");
    drop(adopted);
    // More than may come with a message.
    let (mut reader, ends) = pipe_with_ends(12);
    assert!(matches!(lost_by(adopt_from(vec![left_over(10)], ends, Answer::Yes)), DeviceError::Peer { .. }));
    assert_eq!(reader.read(&mut [0]).unwrap(), 0, "nobody holds the other end");
}

#[test]
fn what_is_no_connection_is_not_touched() {
    let process = Process::start();
    let device = VfioUserDevice::connect(&process.path, ConnectOptions::default()).unwrap();
    let KeptConnection { facts, .. } = device.keep().unwrap();
    let socket = File::open("/dev/null").unwrap().into();
    let refused = VfioUserDevice::adopt(KeptConnection { facts, socket }, ConnectOptions::default());
    assert!(matches!(refused, Err(ConnectError::NotAConnection { .. })), "{refused:?}");
}
