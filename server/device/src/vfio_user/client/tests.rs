//! A device process of the kind that libvfio-user makes, with its habits, in a thread.

use std::io::{Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::thread::JoinHandle;

use super::*;
use crate::vfio_user::codec::{
    Code, DeviceInfo, HEADER_BYTES, Header, IrqInfo, LogControl, LogReport, RegionInfo, Reply, Version,
    encode_error,
};
use crate::{DirtyBitmap, Driver, InterruptKind, IovaRange, PciCommand, Read, Standing};
use vfio_checkpoint_fsm::Outcome;

const DATA: usize = 4096;
const ERRNO: i32 = libc::EINVAL;

/// What the process is like, and what it did.
#[derive(Debug, Default)]
struct Habits {
    /// How the stream is handed out: a length each, or an errno. After the last, nothing.
    reads: Vec<Result<usize, i32>>,
    /// It is gone when it is asked for this.
    dies_at: Option<Code>,
    /// It knows no migration.
    plain: bool,
}

struct Process {
    stream: UnixStream,
    habits: Habits,
    state: u32,
    reads: usize,
    seen: Vec<(Code, usize)>,
    fds: usize,
}

impl Process {
    fn run(mut self) -> Self {
        let limits = Limits::default();
        let mut header = [0; HEADER_BYTES];
        while self.stream.read_exact(&mut header).is_ok() {
            let header = Header::decode(&header, limits).unwrap();
            let mut body = vec![0; header.body_bytes()];
            self.stream.read_exact(&mut body).unwrap();
            self.seen.push((header.code, body.len()));
            if self.habits.dies_at == Some(header.code) {
                self.stream.shutdown(std::net::Shutdown::Both).unwrap();
                break;
            }
            let answer = match self.answer(Command::decode(header.code, &body).unwrap()) {
                Ok(mut bytes) => {
                    bytes[0..2].copy_from_slice(&header.id.to_le_bytes());
                    bytes
                }
                Err(errno) => encode_error(header.id, header.code, errno),
            };
            self.stream.write_all(&answer).unwrap();
        }
        self
    }

    fn answer(&mut self, command: Command<'_>) -> Result<Vec<u8>, i32> {
        let reply = match command {
            Command::Version(_) => {
                let size = u64::try_from(DATA).unwrap();
                Reply::Version(Version::ours(Capabilities {
                    max_data_xfer_bytes: size,
                    ..Capabilities::default()
                }))
            }
            Command::GetInfo { .. } => Reply::Info(DeviceInfo { flags: 3, regions: 9, irqs: 5 }),
            Command::GetRegionInfo { index, .. } => Reply::RegionInfo(RegionInfo {
                argsz: 32,
                flags: 3,
                index,
                cap_offset: 0,
                size_bytes: 256,
                offset: 0,
                capabilities: &[],
            }),
            Command::GetIrqInfo { index, .. } => Reply::IrqInfo(IrqInfo { flags: 1, index, count: 4 }),
            Command::SetIrqs(irqs) => {
                self.fds += usize::try_from(irqs.count).unwrap();
                Reply::Done(Code::SetIrqs)
            }
            Command::RegionRead { region, offset, .. } => {
                let data = [u8::try_from(offset).unwrap(), 0x10];
                return Ok(Reply::RegionRead { region, offset, data: &data }
                    .encode(0, Limits::default())
                    .unwrap());
            }
            Command::RegionWrite { region, offset, data } => {
                assert_eq!((offset, data), (4, [6, 4].as_slice()));
                Reply::RegionWrite { region, offset, count: 2 }
            }
            Command::Reset => {
                self.state = State::Running.into();
                Reply::Done(Code::Reset)
            }
            Command::Feature(request) => return self.feature(&request),
            Command::MigDataRead { size } => return self.read(size),
            Command::MigDataWrite { .. } => Reply::Done(Code::MigDataWrite),
            Command::DmaMap(_)
            | Command::DmaUnmap(_)
            | Command::DmaRead { .. }
            | Command::DmaWrite { .. }
            | Command::Other { .. } => return Err(ERRNO),
        };
        Ok(reply.encode(0, Limits::default()).unwrap())
    }

    fn feature(&mut self, request: &FeatureMessage<'_>) -> Result<Vec<u8>, i32> {
        if self.habits.plain {
            return Err(ERRNO);
        }
        let mut bitmap = Vec::new();
        let payload = match (request.feature, request.operation, &request.payload) {
            (FeatureId::MigDataSize | FeatureId::Other(_), _, _) => return Err(ERRNO),
            (_, FeatureOperation::Probe { .. }, _)
            | (FeatureId::DmaLoggingStop, FeatureOperation::Set, _) => FeaturePayload::Empty,
            (FeatureId::Migration, FeatureOperation::Get, _) => FeaturePayload::Migration(5),
            (FeatureId::MigDeviceState, FeatureOperation::Get, _) => {
                FeaturePayload::State(MigrationState { state: self.state, data_fd: 0 })
            }
            (FeatureId::MigDeviceState, FeatureOperation::Set, FeaturePayload::State(state)) => {
                self.state = state.state;
                self.reads = 0;
                request.payload.clone()
            }
            (FeatureId::DmaLoggingStart, FeatureOperation::Set, FeaturePayload::LogStart(control)) => {
                FeaturePayload::LogStart(LogControl { page_bytes: 8192, ..control.clone() })
            }
            (FeatureId::DmaLoggingReport, _, FeaturePayload::LogReport(report)) => {
                let bytes = LogReport::bitmap_bytes(report.length_bytes, report.page_bytes).unwrap();
                assert!(u64::from(request.reply_room_bytes()) >= bytes + 24);
                bitmap.resize(usize::try_from(bytes).unwrap(), 0);
                bitmap[0] = 1;
                FeaturePayload::LogReport(LogReport { bitmap: &bitmap, ..*report })
            }
            other => panic!("{other:?}"),
        };
        let reply = Reply::Feature(FeatureMessage::new(request.feature, request.operation, payload));
        Ok(reply.encode(0, Limits::default()).unwrap())
    }

    /// The reply is as long as what was asked for, whatever was read.
    fn read(&mut self, size: u32) -> Result<Vec<u8>, i32> {
        let now = self.habits.reads.get(self.reads).copied().unwrap_or(Ok(0))?;
        self.reads += 1;
        let now = now.min(usize::try_from(size).unwrap());
        let data = vec![7; now];
        let mut bytes = Reply::MigDataRead { data: &data }.encode(0, Limits::default()).unwrap();
        bytes.resize(HEADER_BYTES + 8 + usize::try_from(size).unwrap(), 0);
        let length = u32::try_from(bytes.len()).unwrap();
        bytes[4..8].copy_from_slice(&length.to_le_bytes());
        Ok(bytes)
    }
}

fn start(habits: Habits) -> (Result<VfioUserDevice, ConnectError>, JoinHandle<Process>) {
    let (stream, theirs) = UnixStream::pair().unwrap();
    let process =
        Process { stream: theirs, habits, state: State::Running.into(), reads: 0, seen: Vec::new(), fds: 0 };
    let thread = std::thread::spawn(|| process.run());
    (VfioUserDevice::over(stream, "nvme.sock".to_owned(), ConnectOptions::default()), thread)
}

fn device(habits: Habits) -> (VfioUserDevice, JoinHandle<Process>) {
    let (device, thread) = start(habits);
    (device.unwrap(), thread)
}

fn save(device: &mut VfioUserDevice, target: State) -> Box<dyn crate::SaveStream> {
    device.set_state(target).unwrap().unwrap().into_save(Call::SetState(target)).unwrap()
}

#[test]
fn a_device_says_what_it_is_and_can() {
    let (mut device, thread) = device(Habits::default());
    assert_eq!(device.identity().to_string(), "nvme.sock (vfio-user, vfio-user)");
    assert_eq!(
        device.fingerprint().to_string(),
        "driver=vfio-user irqs=5 pci_device=1000:1002 pci_revision=08 pci_subsystem=102c:102e regions=9"
    );
    assert_eq!(device.capabilities().to_string(), "STOP_COPY|PRE_COPY|RESET|DMA_LOGGING|PCI_CONFIG");
    assert_eq!(device.data_size().unwrap(), DataSize::Unknown);
    assert_eq!(device.state().unwrap(), State::Running);
    drop(device);
    thread.join().unwrap();
}

#[test]
fn a_short_read_is_not_the_end() {
    let reads = vec![Ok(100), Ok(1), Err(libc::ENOMSG), Ok(DATA + 9)];
    let (mut device, thread) = device(Habits { reads, ..Habits::default() });
    let mut stream = save(&mut device, State::PreCopy);
    let mut buffer = vec![0; 3 * DATA];
    assert_eq!(stream.read(&mut buffer).unwrap(), Read::Bytes(100));
    assert_eq!(stream.read(&mut buffer).unwrap(), Read::Bytes(1));
    assert_eq!(stream.read(&mut buffer).unwrap(), Read::NothingNow);
    assert!(matches!(stream.precopy_info(), Err(DeviceError::Absent { call: Call::PrecopyInfo })));
    drop((device, stream));
    thread.join().unwrap();
}

#[test]
fn one_session_has_one_stream_and_a_stream_one_session() {
    let reads = vec![Ok(10); 8];
    let (mut device, thread) = device(Habits { reads, ..Habits::default() });
    let mut buffer = [0; 64];
    let mut first = save(&mut device, State::PreCopy);
    assert_eq!(first.read(&mut buffer).unwrap(), Read::Bytes(10));
    // Still the same session: no new stream, and the old one reads on.
    assert!(device.set_state(State::StopCopy).unwrap().is_none());
    assert_eq!(first.read(&mut buffer).unwrap(), Read::Bytes(10));
    assert!(device.set_state(State::Stop).unwrap().is_none());
    assert_eq!(first.read(&mut buffer).unwrap_err().raw_os_error(), Some(libc::ENODEV));
    let mut second = save(&mut device, State::StopCopy);
    assert_eq!(first.read(&mut buffer).unwrap_err().raw_os_error(), Some(libc::ENODEV));
    assert_eq!(second.read(&mut buffer).unwrap(), Read::Bytes(10));
    device.reset().unwrap();
    assert_eq!(second.read(&mut buffer).unwrap_err().raw_os_error(), Some(libc::ENODEV));
    drop((device, first, second));
    thread.join().unwrap();
}

#[test]
fn writes_are_cut_to_what_was_agreed_on() {
    let (mut device, thread) = device(Habits::default());
    let call = Call::SetState(State::Resuming);
    let mut stream = device.set_state(State::Resuming).unwrap().unwrap().into_restore(call).unwrap();
    assert_eq!(stream.write(&vec![1; 3 * DATA]).unwrap(), DATA);
    assert_eq!(stream.write(&[1; 5]).unwrap(), 5);
    assert!(matches!(stream.write(&[]), Err(DeviceError::Argument { call: Call::Write, .. })));
    drop((device, stream));
    let process = thread.join().unwrap();
    let writes: Vec<_> = process.seen.iter().filter(|seen| seen.0 == Code::MigDataWrite).collect();
    assert_eq!(writes, [&(Code::MigDataWrite, 8 + DATA), &(Code::MigDataWrite, 8 + 5)]);
}

#[test]
fn a_process_that_dies_takes_the_state_with_it() {
    let (mut device, thread) = device(Habits { dies_at: Some(Code::MigDataRead), ..Habits::default() });
    let mut stream = save(&mut device, State::StopCopy);
    let error = stream.read(&mut [0; 64]).unwrap_err();
    assert!(matches!(error, DeviceError::Disconnected { call: Call::Read, .. }), "{error:?}");
    assert_eq!(error.raw_os_error(), Some(libc::ECONNRESET));
    thread.join().unwrap();
    assert!(device.is_disconnected());
    let error = device.state().unwrap_err();
    assert!(matches!(error, DeviceError::Disconnected { call: Call::GetState, .. }), "{error:?}");
    assert_eq!(error.raw_os_error(), Some(libc::ENOTCONN));
    assert!(device.reset().is_err() && device.set_state(State::Stop).is_err());
}

#[test]
fn the_driver_counts_the_state_behind_a_lost_connection_as_lost() {
    let (device, thread) = device(Habits { dies_at: Some(Code::MigDataRead), ..Habits::default() });
    let mut driver = Driver::new(Box::new(device));
    let mut session =
        driver.begin_save(crate::driver::SaveMode::StopCopy, crate::driver::Peers::None).unwrap();
    let error = session.read(&crate::ChunkPool::new(4096, 1)).unwrap_err();
    assert!(matches!(error, DeviceError::Disconnected { .. }), "{error:?}");
    let failure = driver.abort(error);
    assert_eq!((failure.outcome, failure.standing), (Outcome::StateLost, Standing::Quarantined));
    thread.join().unwrap();
}

#[test]
fn a_long_report_is_asked_for_in_parts() {
    let (mut device, thread) = device(Habits::default());
    let pages = 8 * u64::try_from(DATA).unwrap() + 3;
    let range = IovaRange::new(1 << 32, pages * 8192).unwrap();
    let log = device.dma_log().unwrap();
    assert_eq!(log.start(4096, &[range]).unwrap(), 8192);
    let mut bitmap = DirtyBitmap::new(range, 8192).unwrap();
    bitmap.set(5);
    log.report(&mut bitmap).unwrap();
    log.stop().unwrap();
    let part = u64::from(64 * ((4096_u32 - 32) / 8));
    // The process marks the first page of every part, and what was marked stays.
    assert!(bitmap.is_set(0) && bitmap.is_set(5) && bitmap.is_set(part));
    assert_eq!(bitmap.dirty_pages(), 3);
    drop(device);
    thread.join().unwrap();
}

#[test]
fn interrupts_are_armed_with_as_many_descriptors_at_a_time_as_the_peer_takes() {
    let (mut device, thread) = device(Habits::default());
    let (file, _other) = UnixStream::pair().unwrap();
    let space = device.config_space().unwrap();
    assert_eq!(space.command().unwrap(), PciCommand(0x1004));
    space.set_command(PciCommand(0x0406)).unwrap();
    space.arm(InterruptKind::MsiX, &[file.as_fd(); 3]).unwrap();
    let armed = space.capture().unwrap().interrupts.unwrap();
    assert_eq!((armed.kind, armed.vectors), (InterruptKind::MsiX, 3));
    assert!(matches!(
        space.arm(InterruptKind::Msi, &[file.as_fd(); 5]),
        Err(DeviceError::Argument { call: Call::SetIrqs, .. })
    ));
    space.disarm(InterruptKind::MsiX).unwrap();
    assert_eq!(space.capture().unwrap().interrupts, None);
    drop(device);
    let process = thread.join().unwrap();
    assert_eq!(process.fds, 3);
    // Disarmed before, armed one by one, disarmed after.
    assert_eq!(process.seen.iter().filter(|seen| seen.0 == Code::SetIrqs).count(), 5);
}

#[test]
fn a_process_without_migration_is_told_from_one_that_is_gone() {
    let (refused, thread) = start(Habits { plain: true, ..Habits::default() });
    assert!(matches!(refused, Err(ConnectError::NotMigratable { .. })), "{refused:?}");
    drop(refused);
    thread.join().unwrap();
    let (refused, thread) = start(Habits { dies_at: Some(Code::Feature), ..Habits::default() });
    assert!(matches!(refused, Err(ConnectError::Probe { .. })), "{refused:?}");
    thread.join().unwrap();
    let nobody = tempfile::tempdir().unwrap();
    let refused = VfioUserDevice::connect(&nobody.path().join("x.sock"), ConnectOptions::default());
    assert!(matches!(refused, Err(ConnectError::Socket { .. })), "{refused:?}");
}
